// persistent.cu: all layers of one token of one sequence in one kernel, which stays on the GPU from the embedding to
// the last layer's residual stream. Its bits are those of the kernels that it stands in for: the same slices, the same
// norm, the same pages and chunks, added in the same order.
//
// Clusters of eight blocks, one block an SM. A KV head belongs to one cluster: its rows of q, k and v, its pages, and
// the columns of the out product that its heads make; of a deep context the blocks of other clusters take some chunks.
// The columns of n_ff are dealt out to the clusters by slices of
// 128, gate, up and down alike. So a layer has two exchanges between clusters, of the sums of slices of out and of
// down; all others stay inside a cluster, whose blocks push into each other's shared memory. Three of a block's warps
// fetch all that the block will need of weights and pages, in the order of use, as far ahead as the ring in shared
// memory allows; but while clusters tell each other sums, no more is asked of the memory, which would stand in their
// way: slots whose weights are in registers are kept until x has come.
//
// Each instruction runs a few times a layer at most, and comes from far if the loop is long: a layer's two halves
// (attention, MLP) share all of their code but what lies between their two products.
#include "ops/cuda/persistent.cuh"

#include "ops/cuda/chip.cuh"
#include "ops/cuda/choice.cuh"
#include "ops/cuda/groups.cuh"
#include "ops/cuda/held.cuh"
#include "ops/cuda/persistent_attention.cuh"

static const uint32_t EMPTY = 0xFFFFFFFFu;   // on the board: a NaN that no sum is
static const uint32_t NOTHING = 0x80000000u; // there: -0, which changes no sum

// ---- Fetching -----------------------------------------------------------------------------------------------------

// Whether weights are stored as bf16s.
template <typename W> static __device__ constexpr bool are_bf16() {
    return W::RECORD == bf16_weights::RECORD;
}

// Whether workers take registers from the fetchers: 168 do not suffice.
template <typename W, enum pace PACE> static __device__ constexpr bool takes_registers() {
    return PACE == OWN_PACE || are_bf16<W>();
}

// Step i of a layer: whole units of q, k and v, then out's columns of the heads, slice by slice; then gate's and up's
// units, then down's columns, slice by slice. The pages come behind out's columns: those are held before attention,
// while q, k and v are awaited, for everybody's x waits for what a block does after it has attended.
template <typename W, int GROUP>
static __device__ __forceinline__ fetch_step plan_step(const persistent_args &p, const block_place &me, int i) {
    constexpr int Q = 2 * GROUP;
    uint32_t unit = (uint32_t)whole_slices(p.hidden) * W::RECORD;
    int ff_slices = whole_slices(p.n_ff), all_slices = ff_slices, slice = 0, weight = W_DOWN, index = -1;
    if (me.kv_head >= 0 && i < Q + 4) {
        weight = i < Q ? W_Q : i < Q + 2 ? W_K : W_V;
        index = i < Q ? me.kv_head * GROUP * 16 + me.rank * Q + i : me.kv_head * 16 + me.rank * 2 + (i - Q) % 2;
    } else if (me.kv_head >= 0 && i < 2 * Q + 4) {
        i -= Q + 4;
        weight = W_OUT;
        all_slices = p.n_kv_heads * GROUP;
        slice = me.kv_head * GROUP + i / 2;
    } else {
        if (me.kv_head >= 0) i -= 2 * Q + 4;
        if (i < 4 * me.n_slices) {
            weight = i % 2 ? W_UP : W_GATE;
            index = min((me.slice + i / 4) * 16 + me.rank * 2 + i % 4 / 2, (p.n_ff + 7) / 8 - 1);
        } else {
            i -= 4 * me.n_slices;
            slice = me.slice + i / 2;
        }
    }
    if (index >= 0) return {(uint32_t)index * unit, 0, unit, 1, (uint16_t)weight};
    // Rows 128 rank + 64 (i % 2) .. of one slice of columns.
    int begin = me.rank * (OWN_ROWS / 8) + i % 2 * 8, n = max(0, min(8, (p.hidden + 7) / 8 - begin));
    uint32_t stride = (uint32_t)all_slices * W::RECORD;
    return {(uint32_t)begin * stride + (uint32_t)slice * W::RECORD, stride, W::RECORD, (uint16_t)n, (uint16_t)weight};
}

// One of the warps that fill the ring's slots in turns.
struct fetcher {
    const persistent_args &p;
    persistent_shared *sh;
    ring_place at; // the next slot
    bool wrapped;
    int others;    // whose turn it is before this one's
    uint32_t last; // when it filled its last slot

    __device__ __forceinline__ void go_on() {
        at = at.ahead(1);
        wrapped |= at.slot == 0;
    }

    // Whether the next slot is its own; it goes on past another's.
    __device__ __forceinline__ bool has_turn() {
        bool has = others == 0;
        others = has ? FETCHERS - 1 : others - 1;
        if (!has) go_on();
        return has;
    }

    // Into the next slot, when it is free: lane i < n brings `bytes` from `from`. The slot has come when `beside` more
    // bytes have come, too. Returns where they are to be counted.
    __device__ __forceinline__ uint64_t *fill(const unsigned char *from, int n, uint32_t bytes, uint32_t beside,
                                              uint32_t pace, int lane) {
        if (wrapped) wait_for(p, &sh->empty[at.slot], at.parity() ^ 1);
        // What all blocks ask for at once stands in the way of what they tell each other.
        while (cycles() - last < pace) {
        }
        last = cycles();
        uint64_t *full = &sh->full[at.slot];
        if (lane == 0) barrier_expect(full, (uint32_t)n * bytes + beside);
        __syncwarp();
        // Weights and pages are read once a step: what clusters tell each other stays in the cache.
        if (lane < n) bulk_copy_once(sh->ring[at.slot] + (uint32_t)lane * bytes, from, bytes, full, true);
        go_on();
        return full;
    }
};

// The pages of the block's chunks.
static __device__ __forceinline__ void fetch_pages(fetcher &f, const block_place &me, const persistent_layer &w,
                                                   int lane) {
    const chunk_share &share = f.sh->share;
    size_t page_bytes = SLOT_BYTES / 2, stride = f.p.n_kv_heads * page_bytes;
    const unsigned char *kv = w.kv[lane % 2] + (size_t)share.head * page_bytes;
    const int *page = f.sh->page;
#pragma unroll 1
    for (int chunk = share.first; chunk < share.end; chunk += share.step, page += CHUNK_PAGES) {
        int n = pages_of(me, chunk);
#pragma unroll 1
        for (int k = 0; k < n; k++)
            if (f.has_turn()) f.fill(kv + (size_t)page[k] * stride, 2, SLOT_BYTES / 2, 0, 0, lane);
    }
}

template <typename W, int GROUP>
static __device__ __forceinline__ void fetch_all(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                                 int which, int lane) {
    fetcher f = {p, sh, {0, 0}, false, which, cycles()};
    int first_of_mlp = me.kv_head >= 0 ? 4 * GROUP + 4 : 0, n_steps = first_of_mlp + 6 * me.n_slices;
    unsigned turn = 1;
    uint32_t pace = are_bf16<W>() ? LAYER_CYCLES / (uint32_t)max(1, n_steps) * FETCHERS : 0;
#pragma unroll 1
    for (int l = 0; l < p.n_layers; l++) {
        const persistent_layer &w = p.layer[l];
#pragma unroll 1
        for (int i = 0;; i++) {
            if (i == first_of_mlp) fetch_pages(f, me, w, lane); // behind all if no step of the MLP is its
            if (i == n_steps) break;
            bool attention = i == 0 && me.kv_head >= 0, first = attention || i == first_of_mlp;
            turn ^= first;
            if (!f.has_turn()) continue;
            fetch_step s = sh->steps[i];
            const unsigned char *from = w.w[s.weight] + s.from + (uint32_t)lane * s.stride;
            if (!first) {
                f.fill(from, s.n, s.bytes, 0, pace, lane);
                continue;
            }
            // With a half-layer's first slot come its norms' weights.
            const float *head_norm = attention && lane < 2 ? w.head_norm[lane] : NULL;
            uint32_t x_bytes = (uint32_t)p.hidden * 4, head_bytes = attention && w.head_norm[0] ? HEAD * 4 : 0;
            uint64_t *full = f.fill(from, s.n, s.bytes, x_bytes + 2 * head_bytes, pace, lane);
            if (lane == 2) bulk_copy(sh->norm[turn], w.norm[!attention], x_bytes, full);
            else if (head_norm) bulk_copy(sh->head_norm[l % 2][lane], head_norm, HEAD * 4, full);
        }
    }
}

// ---- x, from the board to all blocks of a cluster -----------------------------------------------------------------

// The sum of one row's n slices (a multiple of BOARD_ROWS), in ascending order, as they appear on the board.
static __device__ __forceinline__ float collect(const persistent_args &p, const uint32_t *row, int n) {
    enum { AT_ONCE = 3 * BOARD_ROWS };
    float total = -0.0f;
    patience w = {};
#pragma unroll 1
    for (; n > 0; n -= AT_ONCE, row += AT_ONCE * MOST_HIDDEN) {
        float v[AT_ONCE], sum;
        for (bool complete = false;;) {
#pragma unroll
            for (int k = 0; k < AT_ONCE; k += BOARD_ROWS)
                if (k < n)
#pragma unroll
                    for (int i = k; i < k + BOARD_ROWS; i++)
                        v[i] = __uint_as_float(load_relaxed(row + (size_t)i * MOST_HIDDEN));
            sum = total;
#pragma unroll
            for (int k = 0; k < AT_ONCE; k += BOARD_ROWS)
                if (k < n)
#pragma unroll
                    for (int i = k; i < k + BOARD_ROWS; i++) sum += v[i];
            // EMPTY is no number, and so is a sum with it: but the model's own sums may be none.
            if (sum == sum || complete) break;
            w.look(p);
            if ((w.looks & 63) == 0) {
                bool missing = false;
#pragma unroll 1
                for (int i = 0; i < min(n, (int)AT_ONCE); i++)
                    missing |= load_relaxed(row + (size_t)i * MOST_HIDDEN) == EMPTY;
                complete = !missing;
            }
            poll_again();
        }
        total = sum;
    }
    return total;
}

static __device__ __forceinline__ bool has_come(uint4 v) {
    return v.x != EMPTY && v.y != EMPTY && v.z != EMPTY && v.w != EMPTY;
}

// The sums of the block's columns, n rows of the board (a multiple of BOARD_ROWS), into shared memory as they appear: a
// warp takes every eighth row, a lane four columns, if they exist.
static __device__ __forceinline__ void await_sums(const persistent_args &p, persistent_shared *sh,
                                                  const uint32_t *board, int n, bool exist, int warp, int lane) {
    uint4 v[WATCHED];
    bool missing[WATCHED];
    patience w = {};
    board += warp * MOST_HIDDEN + 4 * lane;
    float *to = sh->sums[warp] + 4 * lane;
#pragma unroll
    for (int i = 0; i < WATCHED; i++) missing[i] = exist && i * BOARD_ROWS < n;
    for (bool more = exist; more;) {
#pragma unroll
        for (int i = 0; i < WATCHED; i++)
            if (missing[i]) v[i] = load4_relaxed(board + i * BOARD_ROWS * MOST_HIDDEN);
        more = false;
#pragma unroll
        for (int i = 0; i < WATCHED; i++) {
            if (missing[i] && has_come(v[i])) {
                *reinterpret_cast<uint4 *>(to + i * BOARD_ROWS * OWN_ROWS) = v[i];
                missing[i] = false;
            }
            more |= missing[i];
        }
        if (!more) break;
        w.look(p);
        poll_again();
    }
}

// By all warps: the sum of a row's n slices in ascending order, for the thread whose column it is.
static __device__ __forceinline__ float collect_all(const persistent_args &p, persistent_shared *sh,
                                                    const uint32_t *board, int n, int n_columns, int thread) {
    enum { AT_ONCE = WATCHED * BOARD_ROWS };
    float total = -0.0f;
    int warp = thread / 32, lane = thread % 32;
    for (;;) {
        await_sums(p, sh, board, n, 4 * lane < n_columns, warp, lane);
        sync_some(1, WORKERS);
        if (thread < n_columns) {
            const float *from = sh->sums[0] + thread;
#pragma unroll
            for (int k = 0; k < AT_ONCE; k += BOARD_ROWS)
                if (k < n)
#pragma unroll
                    for (int i = k; i < k + BOARD_ROWS; i++) total += from[i * OWN_ROWS];
        }
        n -= AT_ONCE;
        if (n <= 0) return total;
        board += AT_ONCE * MOST_HIDDEN;
        sync_some(1, WORKERS); // they have been read
    }
}

// The block's columns of n rows of the board, into the cache, by a warp, each cluster some rows: what the launch before
// emptied has long left it, and who looks for a sum there would wait for the memory.
static __device__ __forceinline__ void ask_for_board(const uint32_t *board, int n, int cluster, int lane) {
    int n_clusters = (int)gridDim.x / CLUSTER;
    for (int row = cluster + lane * n_clusters; row < n; row += 32 * n_clusters)
        ask_cache(board + (size_t)row * MOST_HIDDEN, OWN_ROWS * 4);
}

// By the first four warps: their block's columns of x, and the sum of their squares (norm_partial's of one warp), to
// all blocks of the cluster.
static __device__ __forceinline__ void push_x(persistent_shared *sh, int rank, float x, int warp, int lane) {
    sh->own[warp * 32 + lane] = x;
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

// A norm's weights for this warp's slice of x.
static __device__ __forceinline__ float4 norm_weights(const persistent_args &p, const persistent_shared *sh,
                                                      uint32_t turn, int warp, int lane) {
    return load4(sh->norm[turn], warp * SLICE + 4 * lane, p.hidden);
}

// This warp's slice of x, when all of it has come, normed and rounded.
template <typename W>
static __device__ __forceinline__ void norm_inputs(const persistent_args &p, persistent_shared *sh, float4 w,
                                                   uint32_t turn, int warp, int lane) {
    wait_for(p, &sh->x_arrived, turn);
    float4 v = *reinterpret_cast<const float4 *>(sh->x + warp * SLICE + 4 * lane);
    float r = norm_rate(sh->norm_sums, p.hidden, p.eps) * held_units<W>::INPUTS;
    put_inputs(sh->inputs, warp * SLICE + 4 * lane, 1, 0, scale4(v, r, w));
    __syncwarp();
}

// ---- Products -----------------------------------------------------------------------------------------------------

// Two pairs of whole units, this warp's slice; the last of an odd number twice.
template <typename W>
static __device__ __forceinline__ void point_to_pairs(const unsigned char *(&u)[4], persistent_shared *sh,
                                                      ring_place at, int n_slots, int warp, int lane) {
    int here = warp * W::RECORD + lane * held_units<W>::LANE;
#pragma unroll
    for (unsigned i = 0; i < 4; i++) u[i] = sh->ring[at.ahead(i < 2 || n_slots == 4 ? i : i - 2).slot] + here;
}

static __device__ __forceinline__ int slots_of_two(int n) {
    return n > 1 ? 4 : 2;
}

// The norm's weights come with the first slot, and stay as long as that: they are held, too.
template <typename W>
static __device__ __forceinline__ void hold_pairs(const persistent_args &p, persistent_shared *sh, held_units<W> &h,
                                                  float4 &norm, ring_place &at, kept_slots &kept, uint32_t turn,
                                                  int n_pairs, int warp, int lane) {
    const unsigned char *u[4];
    await_slots(p, sh, at, slots_of_two(n_pairs), lane);
    point_to_pairs<W>(u, sh, at, slots_of_two(n_pairs), warp, lane);
    hold(h, u, lane);
    norm = norm_weights(p, sh, turn, warp, lane);
    keep(kept, at, slots_of_two(n_pairs));
}

// n_pairs pairs of whole units, a slice of x a warp: sums to part[slice]. The first two are held, and their slots lie
// behind `at`.
template <typename W>
static __device__ __forceinline__ void by_slices(const persistent_args &p, persistent_shared *sh, held_units<W> &h,
                                                 ring_place &at, int n_pairs, int warp, int lane) {
    const unsigned char *x = sh->inputs + warp * SLICE * 2, *next[4] = {};
    float *to = sh->part[warp] + lane / 4;
    int n = 0; // slots from `at` on of those that are held
#pragma unroll 1
    for (bool more = true; more; n_pairs -= 2, to += 32) {
        int n_next = slots_of_two(n_pairs - 2);
        more = n_pairs > 2;
        if (more) {
            ring_place then = at.ahead((unsigned)n);
            await_slots(p, sh, then, n_next, lane);
            point_to_pairs<W>(next, sh, then, n_next, warp, lane);
        }
        float d[2][4];
        multiply_held<true>(h, d, {x, x}, more, next, lane);
        if (lane % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                to[16 * i] = d[i][0];
                to[16 * i + 8] = d[i][2];
            }
        }
        pass(sh, at, n, lane);
        n = n_next;
    }
}

// The slices' sums in ascending order.
static __device__ __forceinline__ float add_slices(const persistent_args &p, const persistent_shared *sh, int row) {
    float s = sh->part[0][row];
    if (p.hidden == MOST_HIDDEN) {
#pragma unroll
        for (int i = 1; i < NORM_WARPS; i++) s += sh->part[i][row];
    } else {
#pragma unroll 1
        for (int i = 1; i * SLICE < p.hidden; i++) s += sh->part[i][row];
    }
    return s;
}

// Two slices of this warp's 16 rows; the last of an odd number twice. n_rows <= 8: the other unit does not exist.
template <typename W>
static __device__ __forceinline__ void point_to_rows(const unsigned char *(&u)[4], persistent_shared *sh, ring_place at,
                                                     int n_slots, int n_rows, int warp, int lane) {
    const uint32_t here = 2 * (uint32_t)warp % 8 * W::RECORD + (uint32_t)lane * held_units<W>::LANE;
    int other = n_rows > 8 ? W::RECORD : 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u[2 * i] = sh->ring[at.ahead((unsigned)(i * (n_slots - 2) + warp / 4)).slot] + here;
        u[2 * i + 1] = u[2 * i] + other;
    }
}

// Waits until all is in registers: an arrival does not wait for loads, and the copy that it lets in may overtake them.
template <typename W> static __device__ __forceinline__ void settle(persistent_shared *sh, const held_units<W> &h) {
    if (h.all_words() == 0x7FC0FFEE) sh->settled = 1;
}

template <typename W>
static __device__ __forceinline__ void hold_rows(const persistent_args &p, persistent_shared *sh, held_units<W> &h,
                                                 ring_place &at, kept_slots &kept, int n, int n_rows, int warp,
                                                 int lane) {
    const unsigned char *u[4];
    await_slots(p, sh, at, slots_of_two(n), lane);
    point_to_rows<W>(u, sh, at, slots_of_two(n), n_rows, warp, lane);
    hold(h, u, lane);
    keep(kept, at, slots_of_two(n));
}

// The block's rows, 16 a warp, times n slices of inputs, each of which has two slots, and a sum of its own on the
// board, from `row` on. What the last launch wrote there, in the board's other half, is emptied. The first two slices
// are held; the slots of the last ones are kept.
template <typename W>
static __device__ __forceinline__ void by_rows(const persistent_args &p, persistent_shared *sh, held_units<W> &h,
                                               ring_place &at, kept_slots &kept, int n, const unsigned char *inputs,
                                               uint32_t *row, ptrdiff_t other_half, int n_rows, int warp, int lane) {
    const unsigned char *next[4] = {};
    row += warp * 16 + lane / 4;
#pragma unroll 1
    for (bool more = true; more; n -= 2, row += 2 * MOST_HIDDEN, inputs += 2 * SLICE * 2) {
        int n_next = slots_of_two(n - 2), second = n > 1;
        more = n > 2;
        if (more) {
            give_all_back(sh, kept, lane);
            await_slots(p, sh, at, n_next, lane);
            point_to_rows<W>(next, sh, at, n_next, n_rows, warp, lane);
        }
        float d[2][4];
        multiply_held<false>(h, d, {inputs, inputs + second * SLICE * 2}, more, next, lane);
        if (lane % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int k = 0; k < 2; k++)
                    if (k * 8 + lane / 4 < n_rows)
                        store_relaxed(row + i * second * MOST_HIDDEN + k * 8, __float_as_uint(d[i][2 * k]));
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int k = 0; k < 2; k++)
                    if (k * 8 + lane / 4 < n_rows) row[other_half + i * second * MOST_HIDDEN + k * 8] = EMPTY;
        }
        if (more) keep(kept, at, n_next);
    }
}

// ---- q, k and v ---------------------------------------------------------------------------------------------------

// This block's rows of q, k and v, to the blocks that attend: the first `n_blocks`.
template <int GROUP>
static __device__ __forceinline__ void push_qkv(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                                const persistent_layer &w, int n_blocks, int thread) {
    constexpr int Q = 16 * GROUP, ROWS_HERE = Q + 32;
    int lane = thread % 32;
    if (thread < ROWS_HERE) {
        int part = thread < Q ? 0 : thread < Q + 16 ? 1 : 2, within = (thread - (part ? Q : 0)) % (part ? 16 : Q);
        float s = add_slices(p, sh, thread);
        if (p.is_biased && w.bias[part]) s += w.bias[part][(me.kv_head * CLUSTER + me.rank) * (part ? 16 : Q) + within];
        sh->own[thread] = s;
    }
    __syncwarp();
    // A warp's rows again, four a lane.
    int row = thread / 32 * 32 + lane % 8 * 4;
    if (row >= ROWS_HERE) return;
    unsigned kv_row = (unsigned)(row - Q);
    int to = row < Q ? me.rank * Q + row : GROUP * HEAD + me.rank * 16 + (int)(kv_row / 16 * HEAD + kv_row % 16);
    float4 v = *reinterpret_cast<const float4 *>(sh->own + row);
#pragma unroll
    for (int i = 0; i < CLUSTER; i += 4)
        if (i + lane / 8 < n_blocks) push16(sh->qkv + to, v, &sh->qkv_arrived, (unsigned)(i + lane / 8));
}

// ---- Gate and up --------------------------------------------------------------------------------------------------

// This block's 16 columns of each of its cluster's slices, to the cluster: a slice a warp.
template <typename W>
static __device__ __forceinline__ void push_act(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                                int warp, int lane) {
    if (warp >= me.n_slices) return;
    int j = lane % 16;
    float *own = sh->own + warp * 16;
    // part's rows of a slice: 8 of gate, 8 of up, the next 8 of gate, of up.
    float s = add_slices(p, sh, warp * 32 + j / 8 * 16 + j % 8 + lane / 16 * 8), up = __shfl_xor_sync(~0u, s, 16);
    if (lane < 16)
        own[j] = (me.slice + warp) * SLICE + me.rank * 16 + j < p.n_ff ? silu_mul(s, up) * held_units<W>::INPUTS : 0.0f;
    __syncwarp();
    // Of the slice's 32 columns 16 h .. 16 h + 15: four places of eight bytes.
    int h = me.rank % 2, t = lane % 4;
    float2 low = *reinterpret_cast<const float2 *>(own + 2 * t),
           high = *reinterpret_cast<const float2 *>(own + 2 * t + 8);
    push8(sh->act[warp] + me.rank / 2 * 64 + t * 16 + h * 8,
          make_uint2(pack_bf16(low.x, low.y), pack_bf16(high.x, high.y)), &sh->act_arrived, (unsigned)lane / 4);
}

// ---- The kernel ---------------------------------------------------------------------------------------------------

// The embedding's value, as the kernels of their own have it.
template <typename W> struct table_of;
template <> struct table_of<bf16_weights> {
    static __device__ __forceinline__ float value(const unsigned char *table, int row, int k, int columns) {
        return __bfloat162float(
            reinterpret_cast<const __nv_bfloat16 *>(table)[unit_index((size_t)row, (size_t)k, (size_t)columns)]);
    }
};
template <typename Q> struct table_of<quantised_weights<Q>> {
    static __device__ __forceinline__ float value(const unsigned char *table, int row, int k, int columns) {
        using W = quantised_weights<Q>;
        return W::value(table + ((size_t)(row / 8) * (columns / SLICE) + (size_t)(k / SLICE)) * W::RECORD, row % 8,
                        k % SLICE);
    }
};

// Column `row` of the embedding's row of this step's token.
template <typename W> static __device__ __forceinline__ float embedded(const persistent_opening &o, int row) {
    int id = o.token >= 0 ? o.token : o.best ? best_row(__ldcg(o.best)) : __ldcg(o.chosen + ~o.token);
    return table_of<W>::value(o.table, id, row, o.columns);
}

template <typename W, int GROUP, enum pace PACE>
static __device__ __forceinline__ void work(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                            int position, int token_page, int thread) {
    int warp = thread / 32, lane = thread % 32, row = me.rank * OWN_ROWS + thread;
    int n_heads = p.n_kv_heads * GROUP, heads_rows = board_rows(n_heads), ff_rows = board_rows(whole_slices(p.n_ff));
    int n_rows = p.hidden - me.rank * OWN_ROWS - warp * 16; // of by_rows
    int n_columns = min((int)OWN_ROWS, p.hidden - me.rank * OWN_ROWS);
    bool has_row = thread < n_columns;
    uint32_t launch = load_relaxed(p.launches), half = launch & 1;
    if (thread == 0) sh->first_number = launch * NUMBERED_LAYERS;
    if (PACE == OWN_PACE) sync_some(1, WORKERS);
    ptrdiff_t other_half = (ptrdiff_t)p.n_layers * (heads_rows + ff_rows) * MOST_HIDDEN;
    // This half-layer's rows on the board, in this block's columns.
    uint32_t *board = p.board + (half ? other_half : 0) + me.rank * OWN_ROWS;
    if (half) other_half = -other_half;
    if (me.cluster == 0 && thread < OWN_ROWS)
        for (int i = 0; i < p.n_layers; i++) {
            uint32_t *layer = board + (size_t)i * (heads_rows + ff_rows) * MOST_HIDDEN + thread;
            for (int k = n_heads; k < heads_rows; k++) store_relaxed(layer + (size_t)k * MOST_HIDDEN, NOTHING);
            layer += (size_t)heads_rows * MOST_HIDDEN;
            for (int k = whole_slices(p.n_ff); k < ff_rows; k++)
                store_relaxed(layer + (size_t)k * MOST_HIDDEN, NOTHING);
        }
    uint32_t turn = 0; // of the half-layers in which this block takes part
    ring_place at = {0, 0};
    kept_slots kept = {at, 0};
    float x = !has_row ? 0.0f : p.open.table ? embedded<W>(p.open, row) : p.x[row];
    const float *turning = p.open.table ? p.open.rope + (size_t)position * HEAD : p.cos_sin;
    if (thread < HEAD) sh->cos_sin[thread] = turning[thread]; // read behind the first products' barrier
#pragma unroll 1
    for (int i = 0;; i++) {
        thread = afresh(thread);
        warp = thread / 32, lane = thread % 32;
        bool mlp = i % 2;
        int rows_before = mlp ? heads_rows : ff_rows;
        bool takes_part = i < 2 * p.n_layers && (mlp ? me.n_slices > 0 : me.kv_head >= 0);
        int n_pairs = mlp ? 2 * me.n_slices : GROUP + 2;
        held_units<W> held;
        if (i == 2 * p.n_layers && me.cluster != 0) return;
        float4 norm;
        if (takes_part) hold_pairs<W>(p, sh, held, norm, at, kept, turn, n_pairs, warp, lane);
        if (i < 2 * p.n_layers && warp == WORKER_WARPS / 2) { // one that collects nothing, if a context is not deep
            const uint32_t *rows = board + (i > 0 ? (size_t)rows_before * MOST_HIDDEN : 0);
            ask_for_board(rows, mlp ? ff_rows : heads_rows, me.cluster, lane);
        }
        if (i > 0) {
            float sum = 0;
            if constexpr (PACE == OWN_PACE) sum = collect_all(p, sh, board, rows_before, n_columns, thread);
            else if (has_row) sum = collect(p, board + thread, rows_before);
            if (has_row) x += sum;
            board += (size_t)rows_before * MOST_HIDDEN;
            if (i == 2 * p.n_layers) break;
        } else {
            before_copies(); // the loads of what is held may be under way
        }
        give_all_back(sh, kept, lane);
        bool helps = PACE == OWN_PACE && !mlp && me.kv_head < 0 && sh->share.n > 0;
        if (!takes_part && !helps) {
            if (PACE == OWN_PACE) sync_some(1, WORKERS); // sums have been read
            continue;
        }
        if (takes_part) {
            if (thread == 0) barrier_expect(&sh->x_arrived, CLUSTER * (OWN_ROWS + 1) * 4);
            if (thread < OWN_ROWS) push_x(sh, me.rank, x, warp, lane);
            norm_inputs<W>(p, sh, norm, turn, warp, lane);
            turn ^= 1;
            by_slices<W>(p, sh, held, at, n_pairs, warp, lane);
            sync_some(1, WORKERS);
        }
        int n = mlp ? me.n_slices : GROUP, first = mlp ? me.slice : me.kv_head * GROUP;
        const persistent_layer &w = p.layer[i / 2];
        if (mlp) {
            if (thread == 0) barrier_expect(&sh->act_arrived, (uint32_t)n * SLICE * 2);
            push_act<W>(p, sh, me, warp, lane);
        } else if (takes_part && warp < (16 * GROUP + 32 + 31) / 32) {
            push_qkv<GROUP>(p, sh, me, w, min(me.n_chunks, (int)CLUSTER), thread);
        }
        if (takes_part) hold_rows<W>(p, sh, held, at, kept, n, n_rows, warp, lane);
        if (!mlp) {
            if (takes_part) settle(sh, held);
            if constexpr (PACE == ONE_CHUNK) {
                attend<GROUP, W>(p, sh, me, w, at, kept, i / 2, position, token_page, thread);
            } else {
                attend_deep<GROUP>(p, sh, me, w, at, kept, i / 2, position, token_page, thread);
            }
            if (helps) continue;
            if (PACE == OWN_PACE) collect_chunks<GROUP, W>(p, sh, me, i / 2, thread);
        }
        if (mlp) wait_for(p, &sh->act_arrived, i / 2 % 2);
        else finish_attention<GROUP, W, PACE>(p, sh, me, i / 2, thread);
        const unsigned char *inputs = mlp ? sh->act[0] : sh->inputs;
        by_rows<W>(p, sh, held, at, kept, n, inputs, board + (size_t)first * MOST_HIDDEN, other_half, n_rows, warp,
                   lane);
    }
    if (has_row) p.x[row] = x;
    // All that is on the board has come from blocks that know which half it is.
    if (me.rank == 0 && thread == 0) *p.launches += 1;
}

// By the warp that neither multiplies nor fetches: the batch's arrays, whose place nothing reads any more, and the
// choice of the step before.
static __device__ __forceinline__ void work_beside(const persistent_args &p, int lane) {
    if (blockIdx.x == 0 && p.open.table)
        for (int i = lane; i < p.open.n_words; i += 32) p.open.arrays[i] = __ldcg(p.open.staged + i);
    if (blockIdx.x == 0 && lane == 0 && p.best) *p.best = 0;
    if (!p.choice.out) return;
    for (int part = (int)blockIdx.x; part < CHOICE_PARTS; part += (int)gridDim.x) choose_beside(p.choice, part, lane);
}

template <typename W, int GROUP, enum pace PACE>
static __global__ void __launch_bounds__(PERSISTENT_THREADS, 1)
    k_layers(const __grid_constant__ persistent_args p, const __grid_constant__ persistent_pages<PACE> pages) {
    DYNAMIC_SHARED(raw);
    persistent_shared *sh = reinterpret_cast<persistent_shared *>(raw);
    int thread = (int)threadIdx.x, position = p.open.table ? p.open.position : __ldcg(p.b.position);
    const int32_t *listed = p.open.table ? NULL : p.b.pages + __ldcg(p.b.page_start);
    auto page_at = [&](int i) { return listed ? __ldcg(listed + i) : pages.id[i]; };
    block_place me;
    me.cluster = (int)blockIdx.x / CLUSTER;
    me.rank = (int)cluster_rank();
    me.kv_head = me.cluster < p.n_kv_heads ? me.cluster : -1;
    me.slice = p.first_slice[me.cluster];
    me.n_slices = p.first_slice[me.cluster + 1] - me.slice;
    me.last_page = position / ATTN_BLOCK;
    me.n_chunks = me.last_page / CHUNK_PAGES + 1;
    chunk_share share = deal_chunks(p, me, PACE == OWN_PACE ? p.n_helpers : 0);
    dependents_may_start();
    if (thread == 0) {
        sh->share = share;
        for (int i = 0; i < N_SLOTS; i++) {
            barrier_init_for(&sh->full[i], 1);
            barrier_init_for(&sh->empty[i], WORKER_WARPS);
        }
        barrier_init_for(&sh->x_arrived, 1);
        barrier_init_for(&sh->qkv_arrived, 1);
        barrier_init_for(&sh->act_arrived, 1);
        barrier_init_for(&sh->chunks_arrived, 1);
        barrier_fence();
    }
    // The pages of its chunks, in order.
    for (int i = thread; i < MOST_PAGES; i += PERSISTENT_THREADS) {
        int chunk = share.first + i / CHUNK_PAGES * share.step, index = chunk * CHUNK_PAGES + i % CHUNK_PAGES;
        if (chunk < share.end && index <= me.last_page) sh->page[i] = page_at(index);
    }
    for (int i = thread; i < MOST_STEPS; i += PERSISTENT_THREADS) sh->steps[i] = plan_step<W, GROUP>(p, me, i);
    cluster_sync();
    int token_page = page_at(me.last_page);
    bool idle = me.kv_head < 0 && me.n_slices == 0 && me.cluster != 0;
    if (thread >= WORKERS) {
        if (takes_registers<W, PACE>()) registers_down<FETCHER_REGISTERS>();
        int which = thread / 32 - WORKER_WARPS;
        if (!idle && which < FETCHERS) fetch_all<W, GROUP>(p, sh, me, which, thread % 32);
        dependency_wait();
        if (which == FETCHERS) work_beside(p, thread % 32);
    } else if (!idle) {
        if (takes_registers<W, PACE>()) registers_up<WORKER_REGISTERS>();
        dependency_wait();
        work<W, GROUP, PACE>(p, sh, me, position, token_page, thread);
    } else {
        dependency_wait();
    }
    __syncwarp();
    cluster_sync(); // nobody ends while others push to it
}

// ---- Launcher -----------------------------------------------------------------------------------------------------

static size_t rows_of(const struct layers_shape *s) {
    return (size_t)(board_rows((int)s->n_heads) + board_rows(whole_slices((int)s->n_ff)));
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

static size_t board_words(const struct layers_shape *l) {
    return 2 * l->n_layers * rows_of(l) * MOST_HIDDEN;
}

// The board, the notes, and the number of launches.
static size_t board_floats(const struct ops *ops, const struct layers_shape *l) {
    short first[MOST_CLUSTERS + 1];
    const struct cuda_state *s = (const struct cuda_state *)ops;
    return fits(s, l, first) ? board_words(l) + 2 * l->n_kv_heads * HEAD_NOTES + 1 : 0;
}

// The blocks that have no KV head, for each that there is. Who has no weights to fetch fetches no pages.
static int helpers_of(const short *first, const struct layers_shape *l, int n_clusters) {
    int n_kv_heads = (int)l->n_kv_heads;
    for (int c = n_kv_heads; c < n_clusters; c++)
        if (first[c] == first[c + 1]) return 0;
    return (n_clusters - n_kv_heads) * CLUSTER / n_kv_heads;
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

template <enum pace PACE> static persistent_pages<PACE> pages_of(const struct batch *host) {
    persistent_pages<PACE> p = {};
    int n = (host->kv_len[0] + ATTN_BLOCK - 1) / ATTN_BLOCK;
    for (int i = 0; i < n && i < p.MOST; i++) p.id[i] = host->pages[host->page_start[0] + i];
    return p;
}

// The choice of the step before, and a place for this one's best.
static void take_choice(struct cuda_state *s, persistent_args *p, const int32_t *chosen) {
    p->choice = cuda_take_choice(s);
    if (p->choice.out && p->choice.chosen == chosen) p->open.best = s->best + s->best_turn;
    s->best_turn ^= 1;
    p->best = s->best + s->best_turn;
}

static bool layers(const struct op_ctx *ctx, const struct layers_args *a) {
    struct cuda_state *s = cuda_of(ctx);
    const struct batch *host = host_of(a->batch);
    size_t longest = ATTN_CHUNK; // as a recorded sequence's key knows it
    const struct step_opening *o = a->opening;
    persistent_args p = {};
    while (host->n_seqs > 0 && longest < (size_t)host->kv_len[0]) longest *= 2;
    if (!(s->device.variants & VARIANT_PERSISTENT) || !a->board || host->n_tokens != 1 || host->n_seqs != 1 ||
        longest > MOST_CHUNKS * ATTN_CHUNK || !fits(s, &a->shape, p.first_slice))
        return false;
    if (o && (!(s->device.variants & VARIANT_CHAINED) || o->embed->type != a->layers[0].wq->type)) return false;
    p.b = view(a->batch);
    p.x = a->x;
    p.cos_sin = a->cos_sin;
    p.board = (uint32_t *)a->board;
    p.notes = (uint64_t *)(p.board + board_words(&a->shape));
    p.launches = (uint32_t *)(p.notes + a->shape.n_kv_heads * HEAD_NOTES);
    p.n_helpers = helpers_of(p.first_slice, &a->shape, s->n_clusters);
    p.alarm = s->alarm;
    p.n_layers = (int)a->shape.n_layers;
    p.hidden = (int)a->shape.hidden;
    p.n_ff = (int)a->shape.n_ff;
    p.n_kv_heads = (int)a->shape.n_kv_heads;
    p.eps = a->eps;
    p.scale = a->scale * LOG2_E;
    p.is_normed = true;
    for (size_t i = 0; i < a->shape.n_layers; i++) {
        const struct layer_refs *l = &a->layers[i];
        if (!is_plain(l, a->layers[0].wq->type)) return false;
        const struct matrix *w[N_WEIGHTS] = {l->wq, l->wk, l->wv, l->wo, l->w_gate, l->w_up, l->w_down};
        for (int k = 0; k < N_WEIGHTS; k++) p.layer[i].w[k] = (const unsigned char *)w[k]->data;
        p.layer[i].norm[0] = l->attn_norm, p.layer[i].norm[1] = l->mlp_norm;
        p.layer[i].head_norm[0] = l->q_norm, p.layer[i].head_norm[1] = l->k_norm;
        p.layer[i].bias[0] = l->bq, p.layer[i].bias[1] = l->bk, p.layer[i].bias[2] = l->bv;
        p.is_normed &= l->q_norm != NULL;
        p.is_biased |= l->bq || l->bk || l->bv;
        p.layer[i].kv[0] = (unsigned char *)l->kv->k, p.layer[i].kv[1] = (unsigned char *)l->kv->v;
    }
    if (o)
        p.open = {(const unsigned char *)o->embed->data,
                  ctx->chosen,
                  host->token[0],
                  host->position[0],
                  NULL,
                  o->rope,
                  o->staging,
                  o->arrays,
                  (int)o->n_words,
                  (int)padded_columns(o->embed->n_in)};
    return with_weights(a->layers[0].wq->type, [&](auto w) {
        if (o && s->device.variants & VARIANT_BESIDE) take_choice(s, &p, ctx->chosen);
        struct launch l = {grid_for((size_t)s->n_clusters * CLUSTER), PERSISTENT_THREADS, sizeof(persistent_shared),
                           CLUSTER, o && !s->follows_choice && !p.choice.out};
        using W = decltype(w);
        bool alone = a->shape.n_heads == a->shape.n_kv_heads;
        if (longest <= CLUSTER * ATTN_CHUNK)
            launch_kernel(s, "all layers", alone ? k_layers<W, 1, ONE_CHUNK> : k_layers<W, 2, ONE_CHUNK>, l, p,
                          pages_of<ONE_CHUNK>(host));
        else
            launch_kernel(s, "all layers", alone ? k_layers<W, 1, OWN_PACE> : k_layers<W, 2, OWN_PACE>, l, p,
                          pages_of<OWN_PACE>(host));
    });
}

// All blocks must be on the GPU at once, since they wait for each other: as many clusters as it holds.
template <typename W, int GROUP, enum pace PACE> static int clusters_that_fit(struct cuda_state *s) {
    int n = 0;
    allow_shared(s, "preparing the kernel of all layers", k_layers<W, GROUP, PACE>, sizeof(persistent_shared));
    struct launch l = {grid_for(CLUSTER), PERSISTENT_THREADS, sizeof(persistent_shared), CLUSTER};
    cudaLaunchAttribute attributes[MOST_ATTRIBUTES] = {};
    cudaLaunchConfig_t config = launch_config(s, l, attributes);
    cuda_check(s, cudaOccupancyMaxActiveClusters(&n, k_layers<W, GROUP, PACE>, &config),
               "preparing the kernel of all layers");
    return n;
}

extern "C" bool cuda_persistent_setup(struct cuda_state *s) {
    cuda_check(s, cudaHostAlloc((void **)&s->alarm, sizeof *s->alarm, cudaHostAllocDefault), "allocating host memory");
    if (s->failed != cudaSuccess) return false;
    *s->alarm = 0;
    s->n_clusters = MOST_CLUSTERS;
    for (int type = 0; type < DTYPE_COUNT; type++)
        with_weights((enum dtype)type, [&](auto w) {
            using W = decltype(w);
            int fit[] = {clusters_that_fit<W, 1, ONE_CHUNK>(s), clusters_that_fit<W, 2, ONE_CHUNK>(s),
                         clusters_that_fit<W, 1, OWN_PACE>(s), clusters_that_fit<W, 2, OWN_PACE>(s)};
            for (int n : fit) s->n_clusters = min(s->n_clusters, n);
        });
    return s->failed == cudaSuccess;
}

extern "C" void cuda_fill_persistent(struct ops *ops) {
    ops->layers = layers;
    ops->board_floats = board_floats;
}
