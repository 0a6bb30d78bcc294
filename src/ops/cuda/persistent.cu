// persistent.cu: all layers of one token of one sequence in one kernel, which stays on the GPU from the embedding to
// the last layer's residual stream. Its bits are those of the kernels that it stands in for: the same slices, the same
// norm, the same pages and chunks, added in the same order.
//
// Clusters of eight blocks, one block an SM. A KV head belongs to one cluster: its rows of q, k and v, its pages, and
// the columns of the out product that its heads make. The columns of n_ff are dealt out to the clusters by slices of
// 128, gate, up and down alike. So a layer has two exchanges between clusters, of the sums of slices of out and of
// down; all others stay inside a cluster, whose blocks push into each other's shared memory. A block's last warp
// fetches all that the block will need of weights and pages, in the order of use, as far ahead as the ring in shared
// memory allows.
#include "ops/cuda/persistent.cuh"

#include <type_traits>

static const uint32_t EMPTY = 0xFFFFFFFFu; // on the board: a NaN that no sum is

// ---- Waiting
// ---------------------------------------------------------------------------------------------------------

// A kernel that waits for what will never come must end all the same: after a second somebody raises the alarm, and
// then nobody waits any more.
struct patience {
    unsigned looks;
    unsigned long long since;
};

static const unsigned long long PATIENCE = 1000 * 1000 * 1000, GONE = ~0ull; // nanoseconds

// Since when there has been waiting; GONE: that is too long.
static __device__ __noinline__ unsigned long long waiting_since(volatile unsigned *alarm, unsigned long long since) {
    unsigned long long now = nanoseconds();
    if (*alarm) return GONE;
    if (since == 0) return now;
    if (now - since < PATIENCE) return since;
    *alarm = 1;
    return GONE;
}

static __device__ __forceinline__ bool gives_up(const persistent_args &p, patience &w) {
    if ((++w.looks & 0xFFF) != 0) return false;
    w.since = waiting_since(p.alarm, w.since);
    return w.since == GONE;
}

static __device__ __forceinline__ void wait_for(const persistent_args &p, uint64_t *bar, uint32_t parity) {
    patience w = {};
    while (!barrier_try(bar, parity) && !gives_up(p, w)) {
    }
}

// ---- The ring
// --------------------------------------------------------------------------------------------------------

// A place in the ring; all warps of a block count alike.
struct ring_place {
    unsigned slot;
    uint32_t parity;
    __device__ __forceinline__ void step() {
        if (++slot == N_SLOTS) {
            slot = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ ring_place ahead(unsigned n) const {
        ring_place r = {slot + n, parity};
        if (r.slot >= N_SLOTS) {
            r.slot -= N_SLOTS;
            r.parity ^= 1;
        }
        return r;
    }
};

static __device__ __forceinline__ void release(persistent_shared *sh, ring_place at, int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&sh->empty[at.slot]);
}

// ---- Where everything is
// ---------------------------------------------------------------------------------------------

// What a block is.
struct block_place {
    int cluster, rank, kv_head; // kv_head -1: none
    int slice, n_slices;        // of n_ff
    int n_chunks, last_page;
};

static __device__ __forceinline__ int whole_slices(int columns) {
    return (columns + SLICE - 1) / SLICE;
}

// The board's rows of a layer: n_heads of out, then n_ff's.
static __device__ __forceinline__ uint32_t *board_row(const persistent_args &p, int group, unsigned half, int layer,
                                                      int row) {
    int rows = p.n_kv_heads * group + whole_slices(p.n_ff);
    return p.board + (((size_t)half * p.n_layers + layer) * rows + row) * MOST_HIDDEN;
}

// ---- Fetching
// --------------------------------------------------------------------------------------------------------

template <typename W> struct fetcher {
    const persistent_args &p;
    persistent_shared *sh;
    int lane;
    ring_place at;
    bool wrapped;

    // The next slot, free; its copies must bring `bytes`.
    __device__ __forceinline__ unsigned char *open(uint32_t bytes) {
        if (wrapped) wait_for(p, &sh->empty[at.slot], at.parity ^ 1);
        if (lane == 0) barrier_expect(&sh->full[at.slot], bytes);
        __syncwarp();
        return sh->ring[at.slot];
    }
    __device__ __forceinline__ void copy(void *to, const void *from, uint32_t bytes) {
        bulk_copy(to, from, bytes, &sh->full[at.slot]);
    }
    __device__ __forceinline__ void close() {
        at.step();
        if (at.slot == 0) wrapped = true;
    }
    __device__ __forceinline__ void unit(const unsigned char *w, int index, uint32_t bytes) {
        unsigned char *to = open(bytes);
        if (lane == 0) copy(to, w + (size_t)index * bytes, bytes);
        close();
    }
    // Rows 128 rank + 8 first .. of w, `units` of them, columns from `slice` on, `n_slices` of them.
    __device__ __forceinline__ void columns(const unsigned char *w, int rank, int first, int units, int all_slices,
                                            int slice, int n_slices) {
        uint32_t bytes = (uint32_t)n_slices * W::RECORD;
        int begin = rank * (OWN_ROWS / 8) + first, n = max(0, min(units, (p.hidden + 7) / 8 - begin));
        unsigned char *to = open((uint32_t)n * bytes);
        if (lane < n) copy(to + lane * bytes, w + ((size_t)(begin + lane) * all_slices + slice) * W::RECORD, bytes);
        close();
    }
};

template <typename W, int GROUP>
static __device__ __forceinline__ void fetch_all(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                                 int lane) {
    fetcher<W> f = {p, sh, lane, {0, 0}, false};
    uint32_t unit_bytes = (uint32_t)whole_slices(p.hidden) * W::RECORD;
    int out_slices = p.n_kv_heads * GROUP, ff_slices = whole_slices(p.n_ff);
    int ff_units = (p.n_ff + 7) / 8;
#pragma unroll 1
    for (int l = 0; l < p.n_layers; l++) {
        const persistent_layer &w = p.layer[l];
        if (me.kv_head >= 0) {
#pragma unroll 1
            for (int i = 0; i < 2 * GROUP; i++)
                f.unit(w.wq, me.kv_head * GROUP * 16 + me.rank * 2 * GROUP + i, unit_bytes);
#pragma unroll 1
            for (int i = 0; i < 4; i++) f.unit(i < 2 ? w.wk : w.wv, me.kv_head * 16 + me.rank * 2 + i % 2, unit_bytes);
            kv_view kv = {w.k, w.v, p.n_kv_heads, HEAD, false};
            int mine = 0;
#pragma unroll 1
            for (int chunk = me.rank; chunk < me.n_chunks; chunk += CLUSTER)
#pragma unroll 1
                for (int i = chunk * CHUNK_PAGES; i < (chunk + 1) * CHUNK_PAGES && i <= me.last_page; i++) {
                    int page = sh->page[mine++];
                    unsigned char *to = f.open(SLOT_BYTES);
                    if (lane == 0) {
                        f.copy(to, head_page(kv, false, page, me.kv_head), SLOT_BYTES / 2);
                        f.copy(to + SLOT_BYTES / 2, head_page(kv, true, page, me.kv_head), SLOT_BYTES / 2);
                    }
                    f.close();
                }
#pragma unroll 1
            for (int i = 0; i < 2 * GROUP; i++)
                f.columns(w.wo, me.rank, i * (8 / GROUP), 8 / GROUP, out_slices, me.kv_head * GROUP, GROUP);
        }
#pragma unroll 1
        for (int s = me.slice; s < me.slice + me.n_slices; s++)
#pragma unroll 1
            for (int i = 0; i < 4; i++)
                f.unit(i % 2 ? w.up : w.gate, min(s * 16 + me.rank * 2 + i / 2, ff_units - 1), unit_bytes);
#pragma unroll 1
        for (int s = me.slice; s < me.slice + me.n_slices; s++)
#pragma unroll 1
            for (int i = 0; i < 2; i++) f.columns(w.down, me.rank, i * 8, 8, ff_slices, s, 1);
    }
}

// ---- x, from the board to all blocks of a cluster
// --------------------------------------------------------------------

// The sum of one row's n slices, in ascending order, as they appear on the board.
static __device__ __forceinline__ float collect(const persistent_args &p, const uint32_t *row, int n) {
    enum { AT_ONCE = 24 };
    float total = 0;
    patience w = {};
#pragma unroll 1
    for (int first = 0; first < n; first += AT_ONCE) {
        uint32_t v[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) v[i] = first + i < n ? EMPTY : 0;
        for (;;) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (v[i] == EMPTY) v[i] = load_relaxed(row + (size_t)(first + i) * MOST_HIDDEN);
            bool missing = false;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) missing |= v[i] == EMPTY;
            if (!missing || gives_up(p, w)) break;
            poll_again();
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i >= n) break;
            float f = __uint_as_float(v[i]);
            total = first + i == 0 ? f : total + f;
        }
    }
    return total;
}

// By the first four warps: their block's columns of x, and the sum of their squares (norm_partial's of one warp), to
// all blocks of the cluster.
static __device__ __forceinline__ void push_x(persistent_shared *sh, int rank, float x, int thread) {
    int warp = thread / 32, lane = thread % 32;
    sh->own[thread] = x;
    sync_some(2, OWN_ROWS);
    float4 v = *reinterpret_cast<const float4 *>(sh->own + 4 * lane);
#pragma unroll
    for (unsigned i = 0; i < 2; i++)
        push16(sh->x + OWN_ROWS * rank + 4 * lane, v, &sh->x_arrived, (unsigned)warp * 2 + i);
    float s = 0;
    s = fmaf(v.x, v.x, s);
    s = fmaf(v.y, v.y, s);
    s = fmaf(v.z, v.z, s);
    s = fmaf(v.w, v.w, s);
    s = warp_sum(s);
    if (lane < 2) push4(&sh->norm_sums[rank], s, &sh->x_arrived, (unsigned)(warp * 2 + lane));
}

// This warp's slice of x, when all of it has come, normed and rounded.
static __device__ __forceinline__ void norm_inputs(const persistent_args &p, persistent_shared *sh, float4 w,
                                                   uint32_t parity, int warp, int lane) {
    wait_for(p, &sh->x_arrived, parity);
    float4 v = *reinterpret_cast<const float4 *>(sh->x + warp * SLICE + 4 * lane);
    float r = norm_rate(sh->norm_sums, p.hidden, p.eps);
    put_inputs(sh->inputs, warp * SLICE + 4 * lane, 1, 0, scale4(v, r, w));
    __syncwarp();
}

// ---- Products
// --------------------------------------------------------------------------------------------------------

// A slice of one token's inputs, as weights' own slices take it.
static __device__ __forceinline__ uint4 load_input(const unsigned char *inputs, int c, int lane) {
    return lane < 4 ? *reinterpret_cast<const uint4 *>(inputs + c * 64 + lane * 16) : make_uint4(0, 0, 0, 0);
}

static __device__ __forceinline__ void multiply(float (&d)[4], uint4 u, uint4 v, uint4 x) {
    mma(d, u.x, v.x, u.y, v.y, x.x, x.y);
    mma(d, u.z, v.z, u.w, v.w, x.z, x.w);
}

// PAIRS pairs of whole units, a slice of x a warp: sums to part[slice][first row ..].
template <typename W, int PAIRS>
static __device__ __forceinline__ void by_slices(const persistent_args &p, persistent_shared *sh, ring_place &at,
                                                 int first_row, int warp, int lane) {
    const unsigned char *w[2 * PAIRS];
    ring_place place = at;
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) {
        w[i] = sh->ring[place.slot] + warp * W::RECORD;
        wait_for(p, &sh->full[place.slot], place.parity);
        place.step();
    }
    if (warp * SLICE < p.hidden) {
        float d[PAIRS][1][4];
        W::template slice<PAIRS, 1, true>(
            d, lane, [&](int u) { return w[u]; },
            [&](int, int c) { return load_input(sh->inputs + warp * SLICE * 2, c, lane); });
        float *to = sh->part[warp] + first_row + lane / 4;
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            if (lane % 4 == 0) {
                to[16 * i] = d[i][0][0];
                to[16 * i + 8] = d[i][0][2];
            }
    }
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) {
        release(sh, at, lane);
        at.step();
    }
}

// The slices' sums in ascending order.
static __device__ __forceinline__ float add_slices(const persistent_args &p, const persistent_shared *sh, int row) {
    float s = sh->part[0][row];
#pragma unroll
    for (int i = 1; i < NORM_WARPS; i++)
        if (i * SLICE < p.hidden) s += sh->part[i][row];
    return s;
}

// A warp's 16 of the block's rows times SLICES slices of inputs, each of which has a sum of its own, to the board from
// `row` on. u: the first unit's records; the other unit's stand `next` bytes further. What the last launch wrote there,
// to the board's other half, is emptied.
template <typename W, int SLICES>
static __device__ __forceinline__ void to_board(const persistent_args &p, const unsigned char *const (&u)[SLICES],
                                                int next, const unsigned char *inputs, uint32_t *row, uint32_t *old,
                                                int rank, int warp, int lane) {
    int first = rank * OWN_ROWS + warp * 16, n_rows = min(16, p.hidden - first);
    float d[SLICES][1][1][4] = {};
    if (n_rows <= 0) return;
    if (n_rows <= 8) next = 0; // the other unit does not exist
    if constexpr (std::is_same<W, bf16_weights>::value) {
        // The slices' chains side by side: each is eight instructions long.
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
            for (int s = 0; s < SLICES; s++) {
                const unsigned char *at = u[s] + (c * CHUNK_LANES + lane) * 16;
                multiply(d[s][0][0], *reinterpret_cast<const uint4 *>(at), *reinterpret_cast<const uint4 *>(at + next),
                         load_input(inputs + s * SLICE * 2, c, lane));
            }
    } else {
#pragma unroll
        for (int s = 0; s < SLICES; s++)
            W::template slice<1, 1, true>(
                d[s], lane, [&](int unit) { return u[s] + unit * next; },
                [&](int, int c) { return load_input(inputs + s * SLICE * 2, c, lane); });
    }
#pragma unroll
    for (int s = 0; s < SLICES; s++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = i * 8 + lane / 4;
            if (lane % 4 == 0 && r < n_rows)
                store_relaxed(row + s * MOST_HIDDEN + first + r, __float_as_uint(d[s][0][0][2 * i]));
        }
#pragma unroll
    for (int s = 0; s < SLICES; s++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = i * 8 + lane / 4;
            if (lane % 4 == 0 && r < n_rows) old[s * MOST_HIDDEN + first + r] = EMPTY;
        }
}

// The next n slots are no longer needed, whether this warp has read them or not.
static __device__ __forceinline__ void pass(const persistent_args &p, persistent_shared *sh, ring_place &at, int n,
                                            int lane) {
#pragma unroll 1
    for (int i = 0; i < n; i++) {
        wait_for(p, &sh->full[at.slot], at.parity);
        release(sh, at, lane);
        at.step();
    }
}

// Slot `at`, when all of it is there.
static __device__ __forceinline__ const unsigned char *arrived(const persistent_args &p, const persistent_shared *sh,
                                                               ring_place at) {
    wait_for(p, const_cast<uint64_t *>(&sh->full[at.slot]), at.parity);
    return sh->ring[at.slot];
}

// The out product: the heads' slices side by side in a slot.
template <typename W, int GROUP>
static __device__ __forceinline__ void out_sums(const persistent_args &p, persistent_shared *sh, ring_place at,
                                                uint32_t *row, uint32_t *old, int rank, int warp, int lane) {
    constexpr int UNITS = 8 / GROUP; // a slot
    const unsigned char *u[GROUP];
    u[0] = arrived(p, sh, at.ahead((unsigned)(2 * warp / UNITS))) + 2 * warp % UNITS * GROUP * W::RECORD;
    for (int s = 1; s < GROUP; s++) u[s] = u[0] + s * W::RECORD;
    to_board<W, GROUP>(p, u, GROUP * W::RECORD, sh->inputs, row, old, rank, warp, lane);
}

// SLICES slices of the down product from `slice` of the cluster's on, two slots each.
template <typename W, int SLICES>
static __device__ __forceinline__ void down_sums(const persistent_args &p, persistent_shared *sh, ring_place at,
                                                 int slice, uint32_t *row, uint32_t *old, int rank, int warp,
                                                 int lane) {
    const unsigned char *u[SLICES];
#pragma unroll
    for (int s = 0; s < SLICES; s++)
        u[s] = arrived(p, sh, at.ahead((unsigned)(2 * s + warp / 4))) + 2 * warp % 8 * W::RECORD;
    to_board<W, SLICES>(p, u, W::RECORD, sh->act[slice], row, old, rank, warp, lane);
}

// ---- q, k and v
// ------------------------------------------------------------------------------------------------------

// This block's rows of q, k and v, to the blocks that attend: the first `n_blocks`.
template <int GROUP>
static __device__ __forceinline__ void push_qkv(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                                const persistent_layer &w, int n_blocks, int thread) {
    constexpr int Q = 16 * GROUP, ROWS_HERE = Q + 32;
    int row = thread, part = row < Q ? 0 : row < Q + 16 ? 1 : 2, within = part == 0 ? row : (row - Q) % 16;
    int at = part == 0 ? me.rank * Q + within : (GROUP + part - 1) * HEAD + me.rank * 16 + within;
    if (row < ROWS_HERE) {
        const float *bias = part == 0 ? w.bq : part == 1 ? w.bk : w.bv;
        float s = add_slices(p, sh, row);
        if (bias) s += bias[part == 0 ? me.kv_head * GROUP * HEAD + at : me.kv_head * HEAD + me.rank * 16 + within];
        sh->own[row] = s;
    }
    __syncwarp();
    // A warp's rows again, four a lane.
    int first = thread / 32 * 32, lane = thread % 32;
    row = first + lane % 8 * 4;
    if (row >= ROWS_HERE) return;
    part = row < Q ? 0 : row < Q + 16 ? 1 : 2;
    within = part == 0 ? row : (row - Q) % 16;
    at = part == 0 ? me.rank * Q + within : (GROUP + part - 1) * HEAD + me.rank * 16 + within;
    float4 v = *reinterpret_cast<const float4 *>(sh->own + row);
    for (int i = lane / 8; i < n_blocks; i += 4) push16(sh->qkv + at, v, &sh->qkv_arrived, (unsigned)i);
}

// ---- Attention
// -------------------------------------------------------------------------------------------------------

// q's rows, a warp each.
template <int GROUP>
static __device__ __forceinline__ void prepare_q(const persistent_args &p, persistent_shared *sh, bool has_norm,
                                                 int warp, int lane) {
    if (warp >= GROUP) return;
    head_registers<HEAD> x =
        load_head<HEAD>(sh->qkv + warp * HEAD, has_norm ? sh->head_norms[0] : NULL, sh->cos_sin, p.eps, lane);
#pragma unroll
    for (int i = 0; i < head_registers<HEAD>::PAIRS; i++) {
        put_q(&sh->q, warp, lane + 32 * i, x.lo[i]);
        put_q(&sh->q, warp, lane + 32 * i + HEAD / 2, x.hi[i]);
    }
}

// This token's k and v, by the last two warps: into their page, in memory and where it stands in the ring.
template <int GROUP>
static __device__ __forceinline__ void put_kv(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                              const persistent_layer &w, ring_place at, int position, int page,
                                              int warp, int lane) {
    if (warp < WORKER_WARPS - 2) return;
    bool of_v = warp == WORKER_WARPS - 1;
    head_registers<HEAD> x =
        load_head<HEAD>(sh->qkv + (GROUP + of_v) * HEAD, of_v || !w.k_norm ? NULL : sh->head_norms[1],
                        of_v ? NULL : sh->cos_sin, p.eps, lane);
    kv_view kv = {w.k, w.v, p.n_kv_heads, HEAD, false};
    int slot = position % KV_PAGE_TOKENS;
    __nv_bfloat16 *here = reinterpret_cast<__nv_bfloat16 *>(sh->ring[at.slot]) + of_v * (SLOT_BYTES / 4);
    __nv_bfloat16 *there = reinterpret_cast<__nv_bfloat16 *>(head_page(kv, of_v, page, me.kv_head));
    wait_for(p, &sh->full[at.slot], at.parity);
#pragma unroll
    for (int i = 0; i < 2 * head_registers<HEAD>::PAIRS; i++) {
        int c = lane + 32 * (i / 2) + i % 2 * (HEAD / 2);
        size_t index = kv_index(of_v, slot, c, HEAD);
        here[index] = there[index] = __float2bfloat16_rn(i % 2 ? x.hi[i / 2] : x.lo[i / 2]);
    }
    stores_before_copies();
}

// A warp's page, of which n positions are seen: o, maximum and sum of each row.
template <int GROUP>
static __device__ __forceinline__ void attend_page(const persistent_args &p, persistent_shared *sh, ring_place at,
                                                   int n, int warp, int lane) {
    int g = lane / 4, t = lane % 4;
    const uint4 *v = reinterpret_cast<const uint4 *>(sh->ring[at.slot] + SLOT_BYTES / 2) + lane;
    v_slots slots = slots_in_use(n, -1, t);
    float s[4][4], m, l;
    uint32_t pairs[4], none[4] = {0, 0, 0, 0};
    wait_for(p, &sh->full[at.slot], at.parity);
    scores<bf16_kv<HEAD>, false>(s, &sh->q, sh->ring[at.slot], p.scale, lane);
    softmax_row(pairs, m, l, s, 0, n, t);
    if (t == 0 && g < GROUP) {
        sh->max[warp][g] = m;
        sh->sum[warp][g] = l;
    }
#pragma unroll 8
    for (int i = 0; i < HEAD / 8; i++) {
        float d[4];
        uint4 x = v[i * CHUNK_LANES];
        if (n < ATTN_BLOCK) x = real_slots(x, slots, 0); // what an unused slot holds may be no number
        values(d, pairs, none, x);
        if (g < GROUP) *reinterpret_cast<float2 *>(sh->o[warp] + g * HEAD + i * 8 + 2 * t) = make_float2(d[0], d[1]);
    }
}

// A chunk's n pages in order, to all blocks of the cluster.
template <int GROUP>
static __device__ __forceinline__ void push_chunk(persistent_shared *sh, int chunk, int n, int thread) {
    constexpr int QUADS = GROUP * HEAD / 4, AT_ONCE = WORKERS / QUADS; // blocks pushed to at once
    int quad = thread % QUADS, row = quad / (HEAD / 4);
    chain s = CHAIN_START;
    float4 of = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < CHUNK_PAGES; i++) {
        float a, c;
        if (i >= n) break;
        float4 o = *reinterpret_cast<const float4 *>(sh->o[i] + 4 * quad);
        chain_add(s, sh->max[i][row], sh->sum[i][row], a, c);
        of.x = chain_value(of.x, a, o.x, c);
        of.y = chain_value(of.y, a, o.y, c);
        of.z = chain_value(of.z, a, o.z, c);
        of.w = chain_value(of.w, a, o.w, c);
    }
    chunk_result *to = &sh->chunk[chunk];
#pragma unroll
    for (int i = 0; i < CLUSTER / AT_ONCE; i++) {
        unsigned rank = (unsigned)(thread / QUADS + i * AT_ONCE);
        push16(to->o + 4 * quad, of, &sh->chunks_arrived, rank);
        if (quad % (HEAD / 4) == 0) push16(&to->state[row], make_float4(s.m, s.l, 0, 0), &sh->chunks_arrived, rank);
    }
}

// The chunks in ascending order: attention's result, rounded, as inputs of the next product.
template <int GROUP>
static __device__ __forceinline__ void chain_chunks(persistent_shared *sh, int n_chunks, int thread) {
    if (thread >= GROUP * HEAD) return;
    int row = thread / HEAD;
    chain s = CHAIN_START;
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < n_chunks; i++) {
        float4 next = sh->chunk[i].state[row];
        float a, c;
        chain_add(s, next.x, next.y, a, c);
        sum = chain_value(sum, a, sh->chunk[i].o[thread], c);
    }
    int k = thread;
    *reinterpret_cast<__nv_bfloat16 *>(sh->inputs + k / 32 * 64 + k % 8 / 2 * 16 + k % 32 / 8 * 4 + k % 2 * 2) =
        __float2bfloat16_rn(sum / s.l);
}

// ---- Gate and up
// -----------------------------------------------------------------------------------------------------

// This block's 16 columns of each of its cluster's slices, to the cluster. Two slices a warp.
static __device__ __forceinline__ void push_act(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                                int warp, int lane) {
    int slice = warp * 2 + lane / 16, j = lane % 16;
    float *own = sh->own + warp * 32;
    float v = 0;
    if (slice < me.n_slices) {
        // part's rows of a slice: 8 of gate, 8 of up, the next 8 of gate, of up.
        int row = slice * 32 + j / 8 * 16 + j % 8;
        float gate = add_slices(p, sh, row), up = add_slices(p, sh, row + 8);
        if ((me.slice + slice) * SLICE + me.rank * 16 + j < p.n_ff) v = silu_mul(gate, up);
    }
    own[lane] = v;
    __syncwarp();
    // Of a slice's 32 columns 16 h .. 16 h + 15: four places of eight bytes.
    int chunk = me.rank / 2, h = me.rank % 2, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (warp * 2 + i >= me.n_slices) break;
        const float *from = own + i * 16 + 2 * t;
        uint2 pairs = make_uint2(pack_bf16(from[0], from[1]), pack_bf16(from[8], from[9]));
        push8(sh->act[warp * 2 + i] + chunk * 64 + t * 16 + h * 8, pairs, &sh->act_arrived, (unsigned)lane / 4);
    }
}

// ---- The kernel
// ------------------------------------------------------------------------------------------------------

// q's weights, then k's.
static __device__ __forceinline__ float head_norms_of(const persistent_layer &w, int thread) {
    return (thread < HEAD ? w.q_norm : w.k_norm)[thread % HEAD];
}

template <typename W, int GROUP>
static __device__ __forceinline__ void work(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                            int position, int token_page, int thread) {
    int warp = thread / 32, lane = thread % 32, row = me.rank * OWN_ROWS + thread;
    int out_rows = p.n_kv_heads * GROUP, ff_rows = whole_slices(p.n_ff), n_attending = min(me.n_chunks, (int)CLUSTER);
    bool attends = me.kv_head >= 0 && me.rank < me.n_chunks, owns = (me.n_chunks - 1) % CLUSTER == me.rank;
    unsigned half = load_relaxed(p.launches) & 1;
    uint32_t phase = 0, x_phase = 0;
    ring_place at = {0, 0};
    float x = thread < OWN_ROWS && row < p.hidden ? p.x[row] : 0.0f;
    float4 attn_norm = load4(p.layer[0].attn_norm, warp * SLICE + 4 * lane, p.hidden);
    float head_norm = p.layer[0].q_norm ? head_norms_of(p.layer[0], thread) : 0.0f;
#pragma unroll 1
    for (int l = 0; l < p.n_layers; l++, phase ^= 1) {
        const persistent_layer &w = p.layer[l];
        if (attends) sh->head_norms[thread / HEAD][thread % HEAD] = head_norm;
        if (thread < OWN_ROWS && row < p.hidden && l > 0)
            x += collect(p, board_row(p, GROUP, half, l - 1, out_rows) + row, ff_rows);
        if (me.kv_head >= 0) {
            if (thread == 0) barrier_expect(&sh->x_arrived, CLUSTER * (OWN_ROWS + 1) * 4);
            if (thread < OWN_ROWS) push_x(sh, me.rank, x, thread);
            norm_inputs(p, sh, attn_norm, x_phase, warp, lane);
            x_phase ^= 1;
            // The next layer's, long before they are wanted.
            if (l + 1 < p.n_layers) {
                attn_norm = load4(p.layer[l + 1].attn_norm, warp * SLICE + 4 * lane, p.hidden);
                if (w.q_norm) head_norm = head_norms_of(p.layer[l + 1], thread);
            }
            by_slices<W, GROUP + 2>(p, sh, at, 0, warp, lane);
            sync_some(1, WORKERS);
            if (thread < (16 * GROUP + 32 + 31) / 32 * 32) push_qkv<GROUP>(p, sh, me, w, n_attending, thread);
            if (attends) {
                if (thread == 0) barrier_expect(&sh->qkv_arrived, (GROUP + 2) * HEAD * 4);
                wait_for(p, &sh->qkv_arrived, phase);
                prepare_q<GROUP>(p, sh, w.q_norm != NULL, warp, lane);
                if (owns && me.rank == me.n_chunks - 1)
                    put_kv<GROUP>(p, sh, me, w, at.ahead((unsigned)(me.last_page % CHUNK_PAGES)), position, token_page,
                                  warp, lane);
                sync_some(1, WORKERS);
#pragma unroll 1
                for (int chunk = me.rank; chunk < me.n_chunks; chunk += CLUSTER) {
                    int first = chunk * CHUNK_PAGES, n = min((int)CHUNK_PAGES, me.last_page + 1 - first);
                    if (warp < n)
                        attend_page<GROUP>(p, sh, at.ahead((unsigned)warp), position + 1 - (first + warp) * ATTN_BLOCK,
                                           warp, lane);
                    sync_some(1, WORKERS);
                    push_chunk<GROUP>(sh, chunk, n, thread);
                    pass(p, sh, at, n, lane);
                    if (chunk + CLUSTER >= me.n_chunks) break;
                    if (owns && chunk + CLUSTER == me.n_chunks - 1)
                        put_kv<GROUP>(p, sh, me, w, at.ahead((unsigned)(me.last_page % CHUNK_PAGES)), position,
                                      token_page, warp, lane);
                    sync_some(1, WORKERS);
                }
            }
            if (thread == 0) barrier_expect(&sh->chunks_arrived, (uint32_t)me.n_chunks * GROUP * (HEAD * 4 + 16));
            wait_for(p, &sh->chunks_arrived, phase);
            chain_chunks<GROUP>(sh, me.n_chunks, thread);
            sync_some(1, WORKERS);
            int head = me.kv_head * GROUP;
            out_sums<W, GROUP>(p, sh, at, board_row(p, GROUP, half, l, head), board_row(p, GROUP, half ^ 1, l, head),
                               me.rank, warp, lane);
            pass(p, sh, at, 2 * GROUP, lane);
        }
        float4 mlp_norm = load4(w.mlp_norm, warp * SLICE + 4 * lane, p.hidden);
        if (thread < OWN_ROWS && row < p.hidden) x += collect(p, board_row(p, GROUP, half, l, 0) + row, out_rows);
        if (me.n_slices == 0) continue;
        if (thread == 0) barrier_expect(&sh->x_arrived, CLUSTER * (OWN_ROWS + 1) * 4);
        if (thread < OWN_ROWS) push_x(sh, me.rank, x, thread);
        norm_inputs(p, sh, mlp_norm, x_phase, warp, lane);
        x_phase ^= 1;
        int done = 0;
        for (; done + 2 <= me.n_slices; done += 2) by_slices<W, 4>(p, sh, at, done * 32, warp, lane);
        if (done < me.n_slices) by_slices<W, 2>(p, sh, at, done * 32, warp, lane);
        sync_some(1, WORKERS);
        if (thread == 0) barrier_expect(&sh->act_arrived, (uint32_t)me.n_slices * SLICE * 2);
        if (warp * 2 < me.n_slices) push_act(p, sh, me, warp, lane);
        wait_for(p, &sh->act_arrived, phase);
        uint32_t *down = board_row(p, GROUP, half, l, out_rows + me.slice);
        uint32_t *old = board_row(p, GROUP, half ^ 1, l, out_rows + me.slice);
#pragma unroll 1
        for (int s = 0; s < me.n_slices;) {
            int n = min(2, me.n_slices - s);
            uint32_t *to = down + s * MOST_HIDDEN, *clear = old + s * MOST_HIDDEN;
            if (n == 2) down_sums<W, 2>(p, sh, at, s, to, clear, me.rank, warp, lane);
            else down_sums<W, 1>(p, sh, at, s, to, clear, me.rank, warp, lane);
            pass(p, sh, at, 2 * n, lane);
            s += n;
        }
    }
    if (me.cluster != 0 || thread >= OWN_ROWS) return;
    if (row < p.hidden) p.x[row] = x + collect(p, board_row(p, GROUP, half, p.n_layers - 1, out_rows) + row, ff_rows);
    // All that is on the board has come from blocks that know which half it is.
    if (me.rank == 0 && thread == 0) *p.launches += 1;
}

template <typename W, int GROUP>
static __global__ void __launch_bounds__(PERSISTENT_THREADS, 1) k_layers(const __grid_constant__ persistent_args p) {
    DYNAMIC_SHARED(raw);
    persistent_shared *sh = reinterpret_cast<persistent_shared *>(raw);
    int thread = (int)threadIdx.x, position = __ldcg(p.b.position), first_page = __ldcg(p.b.page_start);
    block_place me;
    me.cluster = (int)blockIdx.x / CLUSTER;
    me.rank = (int)cluster_rank();
    me.kv_head = me.cluster < p.n_kv_heads ? me.cluster : -1;
    me.slice = p.first_slice[me.cluster];
    me.n_slices = p.first_slice[me.cluster + 1] - me.slice;
    me.last_page = position / ATTN_BLOCK;
    me.n_chunks = me.last_page / CHUNK_PAGES + 1;
    dependents_may_start();
    if (thread == 0) {
        for (int i = 0; i < N_SLOTS; i++) {
            barrier_init_for(&sh->full[i], 1);
            barrier_init_for(&sh->empty[i], WORKER_WARPS);
        }
        barrier_init_for(&sh->x_arrived, 1);
        barrier_init_for(&sh->qkv_arrived, 1);
        barrier_init_for(&sh->chunks_arrived, 1);
        barrier_init_for(&sh->act_arrived, 1);
        barrier_fence();
    }
    if (thread < MOST_CHUNKS) {
        // The pages of chunks rank, rank + 8, in order.
        int index = (me.rank + thread / CHUNK_PAGES * CLUSTER) * CHUNK_PAGES + thread % CHUNK_PAGES;
        sh->page[thread] = index <= me.last_page ? __ldcg(p.b.pages + first_page + index) : 0;
    }
    for (int i = thread; i < ROWS / 2 * HEAD; i += PERSISTENT_THREADS) put_q(&sh->q, i / HEAD, i % HEAD, 0.0f);
    cluster_sync();
    bool idle = me.kv_head < 0 && me.n_slices == 0 && me.cluster != 0;
    if (thread >= WORKERS) {
        if (!idle) fetch_all<W, GROUP>(p, sh, me, thread % 32);
        dependency_wait();
    } else if (!idle) {
        dependency_wait();
        if (thread < HEAD) sh->cos_sin[thread] = p.cos_sin[thread];
        sync_some(1, WORKERS);
        work<W, GROUP>(p, sh, me, position, __ldcg(p.b.pages + first_page + me.last_page), thread);
    } else {
        dependency_wait();
    }
    __syncwarp();
    cluster_sync(); // nobody ends while others push to it
}

// ---- Launcher
// --------------------------------------------------------------------------------------------------------

static size_t rows_of(const struct layers_shape *s) {
    return s->n_heads + (s->n_ff + SLICE - 1) / SLICE;
}

// The slices of n_ff to clusters: as few as can be to each, and of two that are equal rather to one without a KV head.
// False: they are too many.
static bool deal_slices(short *first, const struct layers_shape *s, int n_clusters) {
    int share[MOST_CLUSTERS] = {}, n_slices = (int)((s->n_ff + SLICE - 1) / SLICE);
    for (int i = 0; i < n_slices; i++) {
        int best = 0, least = 1 << 20;
        for (int c = 0; c < n_clusters; c++) {
            int cost = 2 * (share[c] + (c < (int)s->n_kv_heads)) + (c >= (int)s->n_kv_heads);
            if (cost < least) best = c, least = cost;
        }
        share[best]++;
    }
    first[0] = 0;
    for (int c = 0; c < MOST_CLUSTERS; c++) {
        first[c + 1] = (short)(first[c] + share[c]);
        if (share[c] > MOST_SHARE) return false;
    }
    return true;
}

static bool fits(const struct cuda_state *s, const struct layers_shape *l, short *first) {
    return HOPPER && l->head_dim == HEAD && l->n_heads % l->n_kv_heads == 0 &&
           l->n_heads / l->n_kv_heads <= MOST_GROUP && l->n_layers <= MOST_LAYERS && l->hidden <= MOST_HIDDEN &&
           l->hidden % 4 == 0 && l->n_kv_heads <= (size_t)s->n_clusters && deal_slices(first, l, s->n_clusters);
}

// The board, and the number of launches.
static size_t board_floats(const struct ops *ops, const struct layers_shape *l) {
    short first[MOST_CLUSTERS + 1];
    const struct cuda_state *s = (const struct cuda_state *)ops;
    return fits(s, l, first) ? 2 * l->n_layers * rows_of(l) * MOST_HIDDEN + 1 : 0;
}

// All matrices have one type, and the kernel is made for it.
static bool is_plain(const struct layer_refs *l, enum dtype type) {
    const struct matrix *all[] = {l->wq, l->wk, l->wv, l->wo, l->w_gate, l->w_up, l->w_down};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (all[i]->type != type) return false;
    return l->kv->type == DTYPE_BF16;
}

// Calls f with the weights' class; false when the kernel is not made for the type.
template <typename F> static bool with_weights(enum dtype type, F f) {
    switch (type) {
    case DTYPE_BF16: f(bf16_weights()); return true;
    case DTYPE_Q8_0: f(quantised_weights<q8_0>()); return true;
    case DTYPE_Q4_0: f(quantised_weights<q4_0>()); return true;
    default: return false;
    }
}

static bool layers(const struct op_ctx *ctx, const struct layers_args *a) {
    struct cuda_state *s = cuda_of(ctx);
    const struct batch *host = a->batch->host ? a->batch->host : a->batch;
    size_t longest = ATTN_CHUNK; // as a recorded sequence's key knows it
    persistent_args p = {};
    while (host->n_seqs > 0 && longest < (size_t)host->kv_len[0]) longest *= 2;
    if (!(s->device.variants & VARIANT_PERSISTENT) || !a->board || host->n_tokens != 1 || host->n_seqs != 1 ||
        longest > MOST_CHUNKS * ATTN_CHUNK || !fits(s, &a->shape, p.first_slice))
        return false;
    p.b = view(a->batch);
    p.x = a->x;
    p.cos_sin = a->cos_sin;
    p.board = (uint32_t *)a->board;
    p.launches = p.board + 2 * a->shape.n_layers * rows_of(&a->shape) * MOST_HIDDEN;
    p.alarm = s->alarm;
    p.n_layers = (int)a->shape.n_layers;
    p.hidden = (int)a->shape.hidden;
    p.n_ff = (int)a->shape.n_ff;
    p.n_kv_heads = (int)a->shape.n_kv_heads;
    p.eps = a->eps;
    p.scale = a->scale * LOG2_E;
    for (size_t i = 0; i < a->shape.n_layers; i++) {
        const struct layer_refs *l = &a->layers[i];
        if (!is_plain(l, a->layers[0].wq->type)) return false;
        p.layer[i] = {(const unsigned char *)l->wq->data,
                      (const unsigned char *)l->wk->data,
                      (const unsigned char *)l->wv->data,
                      (const unsigned char *)l->wo->data,
                      (const unsigned char *)l->w_gate->data,
                      (const unsigned char *)l->w_up->data,
                      (const unsigned char *)l->w_down->data,
                      l->attn_norm,
                      l->mlp_norm,
                      l->q_norm,
                      l->k_norm,
                      l->bq,
                      l->bk,
                      l->bv,
                      (unsigned char *)l->kv->k,
                      (unsigned char *)l->kv->v};
    }
    struct launch l = {grid_for((size_t)s->n_clusters * CLUSTER), PERSISTENT_THREADS, sizeof(persistent_shared),
                       CLUSTER};
    return with_weights(a->layers[0].wq->type, [&](auto w) {
        if (a->shape.n_heads == a->shape.n_kv_heads) launch_kernel(s, "all layers", k_layers<decltype(w), 1>, l, p);
        else launch_kernel(s, "all layers", k_layers<decltype(w), 2>, l, p);
    });
}

// All blocks must be on the GPU at once, since they wait for each other: as many clusters as it holds.
template <typename W, int GROUP> static int clusters_that_fit(struct cuda_state *s) {
    int n = 0;
    cuda_check(s,
               cudaFuncSetAttribute(k_layers<W, GROUP>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)sizeof(persistent_shared)),
               "preparing the kernel of all layers");
    struct launch l = {grid_for(CLUSTER), PERSISTENT_THREADS, sizeof(persistent_shared), CLUSTER};
    cudaLaunchAttribute attributes[MOST_ATTRIBUTES] = {};
    cudaLaunchConfig_t config = launch_config(s, l, attributes);
    cuda_check(s, cudaOccupancyMaxActiveClusters(&n, k_layers<W, GROUP>, &config),
               "preparing the kernel of all layers");
    return n;
}

extern "C" bool cuda_persistent_setup(struct cuda_state *s) {
    if (!HOPPER) return true;
    cuda_check(s, cudaHostAlloc((void **)&s->alarm, sizeof *s->alarm, cudaHostAllocDefault), "allocating host memory");
    if (s->failed != cudaSuccess) return false;
    *s->alarm = 0;
    s->n_clusters = MOST_CLUSTERS;
    for (int type = 0; type < DTYPE_COUNT; type++)
        with_weights((enum dtype)type, [&](auto w) {
            s->n_clusters = min(s->n_clusters, clusters_that_fit<decltype(w), 1>(s));
            s->n_clusters = min(s->n_clusters, clusters_that_fit<decltype(w), 2>(s));
        });
    return s->failed == cudaSuccess;
}

extern "C" void cuda_fill_persistent(struct ops *ops) {
    ops->layers = layers;
    ops->board_floats = board_floats;
}
