// attention.cu: paged attention, as primitives and fused: a block of threads takes a tile of up to 16 rows, and a warp
// a page of a chunk.
#include "ops/cuda/attention.cuh"
#include "ops/cuda/products.cuh"
#include "ops/cuda/wide.cuh"

// ---- Primitives ---------------------------------------------------------------------------------------------------

// A head's page into shared memory, by a warp.
template <typename KV>
static __device__ __forceinline__ void load_page(unsigned char *to, const unsigned char *from, int lane) {
    for (int i = lane; i < KV::BYTES / 16; i += 32)
        reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(from)[i];
    __syncwarp();
}

template <typename KV>
static __global__ void k_scores(float *s, const float *q, kv_view kv, int kv_head, const int32_t *pages, int n_kv,
                                float scale) {
    constexpr int HD = KV::HD;
    __shared__ q_rows<HD> rows;
    __shared__ __align__(64) unsigned char page[KV::BYTES];
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x, block = (int)blockIdx.x;
    for (int c = lane; c < HD; c += 32) {
        for (int r = 1; r < 8; r++) put_q(&rows, r, c, 0.0f, scale);
        put_q(&rows, 0, c, q[c], scale);
    }
    load_page<KV>(page, head_page(kv, false, pages[block], kv_head), lane);
    float out[4][4];
    scores<KV, false>(out, &rows, page, lane);
    for (int j = 0; lane < 4 && j < 4; j++)
        for (int e = 0; e < 2; e++) {
            int position = block * ATTN_BLOCK + 8 * j + 2 * lane + e;
            if (position < n_kv) s[position] = out[j][e];
        }
}

// A page's scores of one row, lifted, in all the rows of a matrix instruction. Returns the highest that the lane has.
static __device__ __forceinline__ float lifted(float (&in)[4][4], const float *s, int n, int t) {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) in[j][e] = e < 2 && 8 * j + 2 * t + e < n ? s[8 * j + 2 * t + e] : 0.0f;
    return lift_row(in, 0, n, t);
}

// A warp a chunk.
static __global__ void k_softmax(float *s, float *block_max, float *block_sum, int n_kv) {
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x, t = lane % 4, first = (int)blockIdx.x * ATTN_CHUNK,
        end = min(first + ATTN_CHUNK, n_kv);
    float in[4][4], most = NO_UNIT, sum[4] = {0, 0, 0, 0};
    uint32_t p[4], none[4] = {0, 0, 0, 0};
    for (int at = first; at < end; at += ATTN_BLOCK) most = fmaxf(most, lifted(in, s + at, end - at, t));
    float unit = row_unit(most);
    for (int at = first; at < end; at += ATTN_BLOCK) {
        lifted(in, s + at, end - at, t);
        __syncwarp();
        row_weights(p, in, 0, unit);
        chain_sum(sum, p, none);
        for (int j = 0; lane < 4 && j < 4; j++) {
            int slot = at + 8 * j + 2 * t;
            if (slot < end) s[slot] = bf16_low(p[j]);
            if (slot + 1 < end) s[slot + 1] = bf16_high(p[j]);
        }
    }
    if (lane == 0) {
        block_max[blockIdx.x] = unit - LIFT;
        block_sum[blockIdx.x] = sum[0];
    }
}

// A warp a chunk.
template <typename KV>
static __global__ void k_values(float *o, const float *p, kv_view kv, int kv_head, const int32_t *pages, int n_kv) {
    constexpr int HD = KV::HD;
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x, g = lane / 4, t = lane % 4;
    int first = (int)blockIdx.x * ATTN_CHUNK, end = min(first + ATTN_CHUNK, n_kv);
    uint32_t pairs[4], none[4] = {0, 0, 0, 0};
    float out[HD / 8][4] = {};
    __shared__ __align__(64) unsigned char page[KV::BYTES];
    for (int at = first; at < end; at += ATTN_BLOCK) {
        load_page<KV>(page, head_page(kv, true, pages[at / ATTN_BLOCK], kv_head), lane);
        for (int j = 0; j < 4; j++) {
            int slot = at + 8 * j + 2 * t;
            pairs[j] = pack_bf16(g == 0 && slot < end ? p[slot] : 0.0f, g == 0 && slot + 1 < end ? p[slot + 1] : 0.0f);
        }
        v_slots slots = slots_in_use(end - at, -1, t);
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
            chain_values(out[i], pairs, none, real_slots(page_reader<KV>::v(page, i, lane), slots, 0));
        __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < HD / 8; i++)
        for (int e = 0; g == 0 && e < 2; e++) o[(size_t)blockIdx.x * HD + i * 8 + 2 * t + e] = out[i][e];
}

static __global__ void k_combine(float *out, const float *block_max, const float *block_sum, const float *o,
                                 int n_blocks, int head_dim) {
    dependents_may_start();
    dependency_wait();
    int channel = (int)threadIdx.x;
    chain s = CHAIN_START;
    float sum = 0, a, c;
    for (int i = 0; i < n_blocks; i++) {
        chain_add(s, block_max[i], block_sum[i], a, c);
        sum = chain_value(sum, a, o[(size_t)i * head_dim + channel], c);
    }
    out[channel] = sum / s.l;
}

// ---- Fused --------------------------------------------------------------------------------------------------------

enum { HALF_SM = 113 * 1024 }; // the shared memory of each of two blocks on an SM
enum { LITTLE_SHARED = HOPPER ? (int)HALF_SM : (int)SM_SHARED };

// RT: at least the rows of a tile. TWO: the block shares its SM with another one. V pages for which there is no room
// then, or on a chip with little shared memory, the last warps', take their K pages' place.
template <typename KV, int RT, bool TWO> struct attention_shared {
    static constexpr int HD = KV::HD, Q = RT > 2 ? ROWS : 2;
    static constexpr int HALVES = RT > 8 ? 2 : 1;      // rows g and g + 8 of a matrix instruction, or g
    static constexpr int LANES = RT < 8 ? 4 * RT : 32; // that have a row g < RT
    // About what all but the pages takes.
    static constexpr int BESIDE = (int)sizeof(q_rows<HD, Q>) + 16 * HD + HALVES * CHUNK_PAGES * (LANES * 16 + 32) + 512;
    static constexpr int ROOM = ((int)LITTLE_SHARED - BESIDE) / KV::BYTES - ATTN_WARPS;
    static constexpr int V_PAGES = (HOPPER && !TWO) || ROOM > ATTN_WARPS ? (int)ATTN_WARPS : ROOM > 1 ? ROOM : 1;
    alignas(64) unsigned char k[ATTN_WARPS][KV::BYTES], v[V_PAGES][KV::BYTES];
    uint4 pairs[CHUNK_PAGES][HALVES][LANES]; // a chunk's p, in their page's units
    alignas(16) float units[8 * HALVES][CHUNK_PAGES];
    q_rows<HD, Q> q;
    fresh_row<HD> fresh;
    float row[2][HD]; // k and v before they are rounded
    uint64_t k_arrived[ATTN_WARPS], v_arrived[ATTN_WARPS];
    float max[2][ROWS]; // units of the chunks combined so far
    int position[ROWS]; // of each row's token; -1: no such row
    bool last;

    // Whether a warp's V page has the place of its K page: then it is asked for when that has been read.
    static __device__ __forceinline__ bool shares(int warp) {
        return V_PAGES < ATTN_WARPS && warp >= V_PAGES;
    }
    __device__ __forceinline__ unsigned char *v_page(int page) {
        return shares(page) ? k[page] : v[page];
    }
};

// By the lanes that ask for a warp's copies.
template <typename SHARED>
static __device__ __forceinline__ void ask_for(SHARED *sh, const attention_params &p, bool of_v, int kv_head, int page,
                                               int warp, int lane) {
    uint64_t *bar = of_v ? &sh->v_arrived[warp] : &sh->k_arrived[warp];
    barrier_expect(bar, sizeof sh->k[0]);
    copy_piece(of_v ? sh->v_page(warp) : sh->k[warp], head_page(p.kv, of_v, page, kv_head), sizeof sh->k[0], bar, lane,
               COPY_LANES);
    copies_asked(bar);
}

// q's rows (normed and rotated where FUSED) into shared memory, a warp a row; and where
// FUSED this token's k and v, beside, and into their page.
template <typename KV, bool FUSED, int RT, bool TWO>
static __device__ __forceinline__ void prepare_rows(attention_shared<KV, RT, TWO> *sh, const attention_params &p,
                                                    int token, int kv_head, int page, int slot, int warp, int lane) {
    constexpr int HD = KV::HD;
    int group = p.n_heads / p.kv.n_kv_heads;
    constexpr int PAIRS = head_registers<HD>::PAIRS, HALF = HD / 2;
    const float *cos_sin = FUSED ? p.cos_sin + (size_t)token * HD : NULL;
#pragma unroll 1
    for (int row = warp; row < (RT > 8 ? 16 : RT > 2 ? 8 : 2); row += ATTN_WARPS) {
        head_registers<HD> x = {};
        if (sh->position[row] >= 0)
            x = load_head<HD>(
                p.q + ((size_t)(token + row / group) * p.n_heads + (size_t)kv_head * group + row % group) * HD,
                FUSED ? p.q_norm : NULL, cos_sin, p.eps, lane);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            if (lane + 32 * i >= HALF) continue;
            put_q(&sh->q, row, lane + 32 * i, x.lo[i], p.scale);
            put_q(&sh->q, row, lane + 32 * i + HALF, x.hi[i], p.scale);
        }
    }
    if (!FUSED || slot < 0 || warp < ATTN_WARPS - 2) return;
    bool of_v = warp == ATTN_WARPS - 1;
    head_registers<HD> x = load_head<HD>((of_v ? p.v : p.k) + ((size_t)token * p.kv.n_kv_heads + kv_head) * HD,
                                         of_v ? NULL : p.k_norm, of_v ? NULL : cos_sin, p.eps, lane);
    store_fresh(&sh->fresh, sh->row[of_v], p.kv, page, kv_head, slot, of_v, x, lane);
}

// A warp's page of a chunk: scores, and p in the page's own units; its V is there then. The next chunk's K is asked for
// as soon as this one is read. `slot`: this step's own, -1 if that is in another page, or stored already. `page`: the
// page's number, `next_page`: that of the next chunk's, -1: there is none; of the lanes that ask.
template <typename KV, int RT, bool TWO>
static __device__ __forceinline__ void weigh_page(attention_shared<KV, RT, TWO> *sh, const attention_params &p,
                                                  int kv_head, int page, int next_page, int index, int slot,
                                                  uint32_t parity, int warp, int lane) {
    constexpr bool tall = RT > 8;
    int g = lane / 4, t = lane % 4, first = index * ATTN_BLOCK;
    float s[4][4];
    barrier_wait(&sh->k_arrived[warp], parity);
    scores<KV, tall>(s, &sh->q, sh->k[warp], lane, &sh->fresh, slot);
    __syncwarp();
    if (asks(lane) && sh->shares(warp)) ask_for(sh, p, true, kv_head, page, warp, lane);
    else if (asks(lane) && next_page >= 0) ask_for(sh, p, false, kv_head, next_page, warp, lane);
#pragma unroll
    for (int half = 0; half < sh->HALVES; half++) {
        uint32_t pairs[4];
        float unit = row_unit(lift_row(s, half, sh->position[g + half * 8] + 1 - first, t));
        row_weights(pairs, s, half, unit);
        if (lane < sh->LANES) sh->pairs[warp][half][lane] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        if (t == 0) sh->units[g + half * 8][warp] = unit;
    }
    barrier_wait(&sh->v_arrived[warp], parity);
}

// Sums of rows g and g + 8, over a chunk or over all so far: of channels 16 warp + 2t, + 1 and 16 warp + 8 + 2t, + 1.
struct row_sums {
    float of[2][4];
    chain of_row[2];
};

// One of a chunk's pages joins the chain. SPECIAL: some of its slots are not in use, or one is this step's.
template <bool SPECIAL, typename KV, int RT, bool TWO, int HALVES>
static __device__ __forceinline__ void chain_page(float (&of)[2][4], float (&l)[4], attention_shared<KV, RT, TWO> *sh,
                                                  int k, const float (&unit)[HALVES], const v_slots &slots, int warp,
                                                  int lane) {
    int g = lane / 4;
    uint32_t p[2][4] = {};
    uint4 v[2];
    page_reader<KV>::two(v[0], v[1], sh->v_page(k), warp, lane);
    if (SPECIAL)
#pragma unroll
        for (int e = 0; e < 2; e++) v[e] = real_slots(v[e], slots, sh->fresh.v[16 * warp + 8 * e + g]);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        float factor = exp2_fast(sh->units[g + half * 8][k] - unit[half]);
        uint32_t factors = pack_bf16(factor, factor);
        uint4 pairs = lane < sh->LANES ? sh->pairs[k][half][lane] : make_uint4(0, 0, 0, 0);
        p[half][0] = mul_bf16_pairs(pairs.x, factors);
        p[half][1] = mul_bf16_pairs(pairs.y, factors);
        p[half][2] = mul_bf16_pairs(pairs.z, factors);
        p[half][3] = mul_bf16_pairs(pairs.w, factors);
    }
    chain_values(of[0], p[0], p[1], v[0]);
    chain_values(of[1], p[0], p[1], v[1]);
    chain_sum(l, p[0], p[1]);
}

// A chunk of n_pages, by each warp that has channels. Of the last page n slots are in use; `slot`: this step's.
template <typename KV, int RT, bool TWO>
static __device__ __forceinline__ void chain_chunk(row_sums &chunk, attention_shared<KV, RT, TWO> *sh, int n_pages,
                                                   int n, int slot, int warp, int lane) {
    constexpr int HALVES = attention_shared<KV, RT, TWO>::HALVES;
    int g = lane / 4;
    bool special = n < ATTN_BLOCK || slot >= 0;
    float l[4] = {0, 0, 0, 0}, unit[HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        unit[half] = NO_UNIT;
#pragma unroll
        for (int k = 0; k < CHUNK_PAGES; k++) unit[half] = fmaxf(unit[half], sh->units[g + half * 8][k]);
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) chunk.of[j][e] = 0;
    if (n_pages == CHUNK_PAGES && !special) {
#pragma unroll
        for (int k = 0; k < CHUNK_PAGES; k++) chain_page<false>(chunk.of, l, sh, k, unit, {}, warp, lane);
    } else {
#pragma unroll 1
        for (int k = 0; k < n_pages - special; k++) chain_page<false>(chunk.of, l, sh, k, unit, {}, warp, lane);
        if (special) chain_page<true>(chunk.of, l, sh, n_pages - 1, unit, slots_in_use(n, slot, lane % 4), warp, lane);
    }
#pragma unroll
    for (int half = 0; half < HALVES; half++) chunk.of_row[half] = {unit[half], l[2 * half]};
}

// A chunk's part, to be combined with others.
template <int HD, int HALVES>
static __device__ __forceinline__ void put_part(float *to, const row_sums &chunk, int rows, int warp, int lane) {
    int t = lane % 4;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        int row = lane / 4 + half * 8;
        if (row >= rows) continue;
#pragma unroll
        for (int j = 0; j < 2; j++)
            *reinterpret_cast<float2 *>(to + row * HD + 16 * warp + 8 * j + 2 * t) =
                make_float2(chunk.of[j][2 * half], chunk.of[j][2 * half + 1]);
        if (t > 0 || warp > 0) continue;
        to[rows * HD + row] = chunk.of_row[half].m;
        to[rows * (HD + 1) + row] = chunk.of_row[half].l;
    }
}

static __device__ __forceinline__ void add_chunk(row_sums &sums, const row_sums &chunk, int half) {
    float a, c;
    chain_add(sums.of_row[half], chunk.of_row[half].m, chunk.of_row[half].l, a, c);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) sums.of[j][e] = chain_value(sums.of[j][e], a, chunk.of[j][e], c);
}

// The channels of one row that a thread combines: THREADS_A_ROW apart.
template <typename KV, int RT> struct own_channels {
    static constexpr int HD = KV::HD;
    static constexpr int THREADS_A_ROW = ATTN_THREADS / RT, N = (HD + THREADS_A_ROW - 1) / THREADS_A_ROW;
    int row, first;
    chain state;
    float sum[N];

    __device__ __forceinline__ own_channels(int thread) : row(thread / THREADS_A_ROW), first(thread % THREADS_A_ROW) {
        state = CHAIN_START;
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] = 0;
    }
};

// All chunks of a tile, of which `all` has the parts: through the shared memory that held pages, as many at a time as
// fit there, so that nothing is waited for one after the other. The weights of chain_add are computed side by side.
template <typename KV, int RT, bool TWO>
static __device__ __forceinline__ void combine_split(attention_shared<KV, RT, TWO> *sh, const attention_params &p,
                                                     own_channels<KV, RT> &mine, const float *all, int n_chunks,
                                                     int thread) {
    using own = own_channels<KV, RT>;
    constexpr int HD = KV::HD, AT_ONCE = 16;
    constexpr int ROOM = (int)(sizeof sh->k + sizeof sh->v) / (int)sizeof(float);
    static_assert(ROOM >= ROWS * (HD + 2) + 4 + 2 * ROWS, "at least a chunk");
    int size = (int)part_floats(p.rows, HD), most = ROOM / (size + 2 * p.rows), maxima = p.rows * HD;
    float *parts = reinterpret_cast<float *>(sh->k[0]);
    float2 *weights = reinterpret_cast<float2 *>(parts + most * size);
    if (thread < ROWS) sh->max[0][thread] = MINUS_INFINITY;
    for (int first = 0, turn = 0; first < n_chunks; first += most, turn ^= 1) {
        int n = min(most, n_chunks - first), quads = n * size / 4;
        const float4 *from = reinterpret_cast<const float4 *>(all + (size_t)first * size);
#pragma unroll 1
        for (int i = thread; i < quads; i += AT_ONCE * ATTN_THREADS) {
            float4 v[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) v[k] = __ldcg(from + min(i + k * ATTN_THREADS, quads - 1));
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                if (i + k * ATTN_THREADS < quads) reinterpret_cast<float4 *>(parts)[i + k * ATTN_THREADS] = v[k];
        }
        __syncthreads();
#pragma unroll 1
        for (int i = thread; i < n * p.rows; i += ATTN_THREADS) {
            int k = i / p.rows, row = i % p.rows;
            float before = sh->max[turn][row], m = parts[k * size + maxima + row];
#pragma unroll 8
            for (int j = 0; j < k; j++) before = fmaxf(before, parts[j * size + maxima + row]);
            float now = fmaxf(before, m);
            weights[i] = make_float2(exp2_fast(before - now), exp2_fast(m - now));
            if (k == n - 1) sh->max[turn ^ 1][row] = now;
        }
        __syncthreads();
        if (mine.row < p.rows) {
#pragma unroll 8
            for (int k = 0; k < n; k++) {
                const float *part = parts + k * size;
                float2 w = weights[k * p.rows + mine.row];
                mine.state.l = fmaf(part[maxima + p.rows + mine.row], w.y, mine.state.l * w.x); // as chain_add
#pragma unroll
                for (int c = 0; c < own::N; c++)
                    mine.sum[c] = chain_value(
                        mine.sum[c], w.x, part[mine.row * HD + min(mine.first + c * own::THREADS_A_ROW, HD - 1)], w.y);
            }
        }
        if (first + most < n_chunks) __syncthreads();
    }
}

// The results of a tile's rows, by each warp that has channels.
template <typename KV, int HALVES>
static __device__ __forceinline__ void put_rows(const attention_params &p, const row_sums &sums, const int *position,
                                                int token, int kv_head, int warp, int lane) {
    constexpr int HD = KV::HD;
    int group = p.n_heads / p.kv.n_kv_heads;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        int row = lane / 4 + half * 8;
        if (warp >= HD / 16 || row >= p.rows || position[row] < 0) continue;
        int row_token = token + row / group, head = kv_head * group + row % group;
        float l = sums.of_row[half].l;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int column = head * HD + 16 * warp + 8 * j + lane % 4 * 2;
            float a = sums.of[j][2 * half] / l, b = sums.of[j][2 * half + 1] / l;
            *reinterpret_cast<float2 *>(p.out + (size_t)row_token * p.n_heads * HD + column) = make_float2(a, b);
            if (p.packed)
                *reinterpret_cast<uint32_t *>(p.packed + packed_at(row_token, column, p.token_units)) = pack_bf16(a, b);
        }
    }
}

// RT: at least p.rows.
template <typename KV, bool FUSED, int RT, bool TWO>
static __global__ void __launch_bounds__(ATTN_THREADS, TWO ? 2 : 1) k_attention(attention_params p) {
    DYNAMIC_SHARED(raw);
    constexpr int HD = KV::HD;
    using shared = attention_shared<KV, RT, TWO>;
    shared *sh = reinterpret_cast<shared *>(raw);
    using own = own_channels<KV, RT>;
    int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32;
    int token = (int)blockIdx.x, kv_head = (int)blockIdx.y, group = p.n_heads / p.kv.n_kv_heads;
    dependents_may_start();
    if (!FUSED) dependency_wait(); // the kernel before stores K and V
    int seq = __ldcg(p.b.seq + token), seq_start = __ldcg(p.b.seq_start + seq);
    int end = min(token + p.tile_tokens, __ldcg(p.b.seq_start + seq + 1));
    int limit = __ldcg(p.b.position + end - 1) + 1, last_page = (limit - 1) / ATTN_BLOCK;
    int n_chunks = last_page / CHUNK_PAGES + 1, chunk = p.split ? (int)blockIdx.z : 0;
    int stride = p.split ? (int)gridDim.z : 1;
    bool apart = p.split && n_chunks > 1; // this block's chunks are combined with others' at the end
    if ((token - seq_start) % p.tile_tokens != 0 || chunk >= n_chunks) {
        if (FUSED) dependency_wait();
        return;
    }
    const int32_t *pages = p.b.pages + __ldcg(p.b.page_start + seq);
    int page = 0; // of the lanes that ask
    if (asks(lane)) {
        if (lane == 0) {
            barrier_init(&sh->k_arrived[warp]);
            barrier_init(&sh->v_arrived[warp]);
            barrier_fence();
        }
        if (!HOPPER) __syncwarp();
        if (chunk * CHUNK_PAGES + warp <= last_page) {
            page = __ldcg(pages + chunk * CHUNK_PAGES + warp);
            ask_for(sh, p, false, kv_head, page, warp, lane);
            if (!sh->shares(warp)) ask_for(sh, p, true, kv_head, page, warp, lane);
        }
    }
    if (thread < ROWS)
        sh->position[thread] =
            thread < p.rows && token + thread / group < end ? __ldcg(p.b.position + token + thread / group) : -1;
    // This step's k and v: in the last chunk, which one block has.
    int slot = FUSED && chunk == (n_chunks - 1) % stride ? (limit - 1) % KV_PAGE_TOKENS : -1;
    int slot_page = slot >= 0 ? __ldcg(pages + last_page) : 0;
    __syncthreads();

    constexpr int HALVES = shared::HALVES;
    size_t tile = (size_t)token * p.kv.n_kv_heads + kv_head, size = part_floats(p.rows, HD);
    if (FUSED) dependency_wait();
    prepare_rows<KV, FUSED, RT, TWO>(sh, p, token, kv_head, slot_page, slot, warp, lane);
    __syncthreads();
    row_sums sums = {{}, {CHAIN_START, CHAIN_START}};
    for (uint32_t parity = 0; chunk < n_chunks; chunk += stride, parity ^= 1) {
        int first = chunk * CHUNK_PAGES, index = first + warp, next = index + stride * CHUNK_PAGES, next_page = -1;
        int n_pages = min(last_page - first + 1, (int)CHUNK_PAGES);
        bool ends = first + n_pages > last_page;
        if (asks(lane) && next <= last_page) next_page = __ldcg(pages + next);
        if (index <= last_page)
            weigh_page(sh, p, kv_head, page, next_page, index, index == last_page ? slot : -1, parity, warp, lane);
        else if (lane < 8 * HALVES) sh->units[lane][warp] = NO_UNIT;
        __syncthreads(); // p and V are there
        if (warp < HD / 16) {
            row_sums part;
            chain_chunk(part, sh, n_pages, ends ? limit - last_page * ATTN_BLOCK : (int)ATTN_BLOCK, ends ? slot : -1,
                        warp, lane);
            if (apart) put_part<HD, HALVES>(p.partial + (tile * p.max_chunks + chunk) * size, part, p.rows, warp, lane);
            else
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    if (sh->position[lane / 4 + half * 8] >= first * ATTN_BLOCK) add_chunk(sums, part, half);
        }
        if (chunk + stride < n_chunks) {
            __syncthreads(); // they have been read
            if (next_page >= 0) ask_for(sh, p, !sh->shares(warp), kv_head, next_page, warp, lane);
        }
        page = next_page;
    }

    if (!apart) {
        put_rows<KV, HALVES>(p, sums, sh->position, token, kv_head, warp, lane);
        return;
    }
    __syncthreads();
    if (thread == 0) sh->last = count_arrival(p.arrivals + tile) == (unsigned)min(n_chunks, stride) - 1;
    __syncthreads();
    if (!sh->last) return;
    if (thread == 0) p.arrivals[tile] = 0;
    own mine(thread);
    combine_split(sh, p, mine, p.partial + tile * p.max_chunks * size, n_chunks, thread);
    if (mine.row >= p.rows || sh->position[mine.row] < 0) return;
#pragma unroll
    for (int i = 0; i < own::N; i++) {
        int c = mine.first + i * own::THREADS_A_ROW;
        if (c >= HD) continue;
        int row_token = token + mine.row / group, column = (kv_head * group + mine.row % group) * HD + c;
        float result = mine.sum[i] / mine.state.l;
        p.out[(size_t)row_token * p.n_heads * HD + column] = result;
        if (p.packed)
            *reinterpret_cast<__nv_bfloat16 *>(p.packed + packed_at(row_token, column, p.token_units)) =
                __float2bfloat16_rn(result);
    }
}

// ---- Launchers ----------------------------------------------------------------------------------------------------

static void attn_scores(const struct op_ctx *ctx, float *out, const float *q, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv, float scale) {
    struct cuda_state *s = cuda_of(ctx);
#define SCORES(KV)                                                                                                     \
    launch_kernel(s, "attn_scores", k_scores<KV>, {grid_for((n_kv + ATTN_BLOCK - 1) / ATTN_BLOCK), 32, 0}, out, q,     \
                  view(kv), (int)kv_head, pages, (int)n_kv, scale *LOG2_E)
    BY_KV(is_fp8(kv), kv->head_dim, SCORES);
}

static void attn_softmax(const struct op_ctx *ctx, float *scores, float *block_max, float *block_sum, size_t n_kv) {
    launch_kernel(cuda_of(ctx), "attn_softmax", k_softmax, {grid_for((n_kv + ATTN_CHUNK - 1) / ATTN_CHUNK), 32, 0},
                  scores, block_max, block_sum, (int)n_kv);
}

static void attn_values(const struct op_ctx *ctx, float *o, const float *p, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv) {
    struct cuda_state *s = cuda_of(ctx);
#define VALUES(KV)                                                                                                     \
    launch_kernel(s, "attn_values", k_values<KV>, {grid_for((n_kv + ATTN_CHUNK - 1) / ATTN_CHUNK), 32, 0}, o, p,       \
                  view(kv), (int)kv_head, pages, (int)n_kv)
    BY_KV(is_fp8(kv), kv->head_dim, VALUES);
}

static void attn_combine(const struct op_ctx *ctx, float *out, const float *block_max, const float *block_sum,
                         const float *o, size_t n_blocks, size_t head_dim) {
    launch_kernel(cuda_of(ctx), "attn_combine", k_combine, {grid_for(1), (unsigned)head_dim, 0}, out, block_max,
                  block_sum, o, (int)n_blocks, (int)head_dim);
}

// The longest context, up to the next power of two, in chunks: what a recorded sequence may depend on.
static size_t most_chunks(const struct batch *b) {
    const struct batch *host = host_of(b);
    size_t longest = ATTN_CHUNK;
    for (size_t i = 0; i < host->n_seqs; i++)
        while (longest < (size_t)host->kv_len[i]) longest *= 2;
    return longest / ATTN_CHUNK;
}

static size_t partial_floats(const attention_params &p, size_t n_tokens) {
    return p.split ? n_tokens * (size_t)(p.kv.n_kv_heads * p.max_chunks) * part_floats(p.rows, p.kv.head_dim) : 0;
}

// Whether the results shall be packed for the next product. Products in clusters, of up to 64 tokens, round their
// inputs themselves, but not products in parts, which are between; and of many sequences of one token each the
// scattered stores cost more than a kernel that packs (docs/SPEED.md).
static void pack_results(attention_params *p, const struct op_ctx *ctx, size_t n_tokens, bool one_each) {
    enum { MOST_ONE_EACH = 192 };
    struct cuda_state *s = cuda_of(ctx);
    if (one_each && n_tokens > MOST_ONE_EACH) return;
    size_t width = (size_t)p->n_heads * (size_t)p->kv.head_dim, units = packed_units(n_tokens);
    size_t bytes = width / PACKED_COLUMNS * units * PACKED_BYTES + BEYOND;
    bool parts = s->device.variants & VARIANT_PARTS && n_tokens >= FEWEST_IN_PARTS && n_tokens <= MOST_IN_PARTS;
    if (!HOPPER || !(s->device.variants & VARIANT_WGMMA) || (n_tokens <= CLUSTER_TOKENS && !parts) ||
        width % SLICE != 0 || partial_floats(*p, n_tokens) > half_floats(ctx) ||
        bytes > half_floats(ctx) * sizeof(float))
        return;
    p->packed = second_half(ctx);
    p->token_units = (int)units;
}

// To be called when attention has been queued.
static void say_packed(struct cuda_state *s, const attention_params &p) {
    if (!p.packed) return;
    s->packed = p.out;
    s->packed_tokens = p.b.n_tokens;
}

static attention_params params_for(const struct op_ctx *ctx, const struct attention_args *a, bool one_each) {
    struct cuda_state *s = cuda_of(ctx);
    int group = (int)(a->n_heads / a->n_kv_heads);
    attention_params p = {};
    p.kv = view(a->kv);
    cuda_load_attention(s, p.kv.is_fp8, p.kv.head_dim);
    p.b = view(a->batch);
    p.q = a->q;
    p.out = a->out;
    p.scale = a->scale * LOG2_E;
    p.n_heads = (int)a->n_heads;
    p.tile_tokens = one_each ? 1 : ROWS / group;
    p.rows = p.tile_tokens * group;
    p.partial = ctx->scratch;
    p.arrivals = s->arrivals;
    p.max_chunks = (int)most_chunks(a->batch);
    p.split = one_each && a->batch->n_tokens * a->n_heads <= SPLIT_ROWS && most_chunks(a->batch) > 1 &&
              a->batch->n_tokens * a->n_kv_heads < 3 * (size_t)s->n_sms;
    pack_results(&p, ctx, a->batch->n_tokens, one_each);
    return p;
}

template <typename KV, bool FUSED>
static void launch_attention(struct cuda_state *s, const attention_params &p, size_t n_tokens, size_t chunks) {
    // As many blocks as the SMs hold at once: each loads its next chunk while it works on one. Of bf16 one block has
    // enough on its way to keep an SM's copies busy, of fp8, with half the bytes, two have.
    size_t tiles = n_tokens * (size_t)p.kv.n_kv_heads, n_sms = (size_t)s->n_sms, blocks = 1;
    bool two = HOPPER && FUSED &&
               ((p.rows <= 2 && tiles > n_sms) || (p.rows <= 8 && p.split && p.kv.is_fp8 && chunks * tiles > n_sms));
    size_t fit = (two ? 2 * n_sms : n_sms) / tiles;
    if (p.split) blocks = fit == 0 ? 1 : chunks < fit ? chunks : fit;
    auto launch = [&](void (*kernel)(attention_params), size_t shared) {
        attention_params q = p;
        q.split = blocks > 1;
        launch_kernel(s, "attention", kernel,
                      {grid_for(n_tokens, (size_t)p.kv.n_kv_heads, blocks), ATTN_THREADS, shared}, q);
    };
    if constexpr (HOPPER && FUSED)
        if (two && p.rows <= 2) return launch(k_attention<KV, FUSED, 2, true>, sizeof(attention_shared<KV, 2, true>));
    if constexpr (HOPPER && FUSED && KV::IS_FP8)
        if (two) return launch(k_attention<KV, FUSED, 8, true>, sizeof(attention_shared<KV, 8, true>));
    if (p.rows <= 2) launch(k_attention<KV, FUSED, 2, false>, sizeof(attention_shared<KV, 2, false>));
    else if (p.rows <= 8) launch(k_attention<KV, FUSED, 8, false>, sizeof(attention_shared<KV, 8, false>));
    else launch(k_attention<KV, FUSED, 16, false>, sizeof(attention_shared<KV, 16, false>));
}

// Of all sequences but the first `n_single`, or, where the kernels of prompts don't take them, of all.
static void attend(const struct op_ctx *ctx, const struct attention_args *a, size_t n_single) {
    struct cuda_state *s = cuda_of(ctx);
    bool one_each = a->batch->n_tokens == a->batch->n_seqs;
    attention_params p = params_for(ctx, a, one_each);
#define ATTENTION(KV) launch_attention<KV, false>(s, p, a->batch->n_tokens, most_chunks(a->batch))
    bool packed_only = cuda_reads_packed(ctx, FUSED_OUT_RESIDUAL, a->reader, a->batch->n_tokens);
    if (one_each || !cuda_wide_attention(s, p, host_of(a->batch), n_single, (int)a->head_dim, packed_only))
        BY_KV(p.kv.is_fp8, a->head_dim, ATTENTION);
    say_packed(s, p);
}

static void attention(const struct op_ctx *ctx, const struct attention_args *a) {
    attend(ctx, a, 0);
}

// Of prompts: attention norms and rotates q itself. `stored`: K and V are in their pages. False: not for this batch.
static bool prompt_attention(const struct op_ctx *ctx, const struct rope_attention_args *r, size_t n_single,
                             bool stored) {
    const struct attention_args *a = r->attention;
    const struct batch *host = host_of(a->batch);
    struct cuda_state *s = cuda_of(ctx);
    if (!cuda_wide_takes(s, host, n_single) || !cuda_group_attention_takes(s, a->head_dim) ||
        (!stored && !cuda_store_kv(ctx, r->store)))
        return false;
    attention_params p = params_for(ctx, a, false);
    p.q_norm = r->store->q_norm;
    p.cos_sin = r->store->cos_sin;
    p.eps = r->store->eps;
    cuda_wide_attention(s, p, host, n_single, (int)a->head_dim,
                        cuda_reads_packed(ctx, FUSED_OUT_RESIDUAL, a->reader, a->batch->n_tokens));
    say_packed(s, p);
    return true;
}

// Of one token a sequence, with the norms, the rotation and the store. `whole`: of the step that these are the first
// tokens of, whose results are packed, or not, as one; or NULL.
static attention_params attend_each(const struct op_ctx *ctx, const struct rope_attention_args *r,
                                    const struct batch *batch, const attention_params *whole) {
    struct attention_args args = *r->attention, *a = &args;
    struct cuda_state *s = cuda_of(ctx);
    a->batch = batch;
    attention_params p = params_for(ctx, a, true);
    p.k = r->store->k;
    p.v = r->store->v;
    p.q_norm = r->store->q_norm;
    p.k_norm = r->store->k_norm;
    p.cos_sin = r->store->cos_sin;
    p.eps = r->store->eps;
    if (whole) {
        p.packed = whole->packed;
        p.token_units = whole->token_units;
        if (p.packed && partial_floats(p, batch->n_tokens) > half_floats(ctx)) p.split = false;
    }
#define ROPE_ATTENTION(KV) launch_attention<KV, true>(s, p, batch->n_tokens, most_chunks(batch))
    if (!cuda_stream_attention(s, p, batch->n_tokens, 2 * half_floats(ctx), (int)a->head_dim))
        BY_KV(p.kv.is_fp8, a->head_dim, ROPE_ATTENTION);
    return p;
}

// How many sequences of one token a batch begins with, if longer ones follow for the kernels of prompts, which would
// take a whole tile for each; else 0.
static size_t count_singles(const struct cuda_state *s, const struct batch *host) {
    size_t n = 0;
    while (n < host->n_seqs && host->seq_start[n + 1] - host->seq_start[n] == 1) n++;
    return n < host->n_seqs && cuda_wide_takes(s, host, n) ? n : 0;
}

bool cuda_heads_end(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a, heads_end *end) {
    struct cuda_state *s = cuda_of(ctx);
    const struct batch *host = host_of(a->batch);
    bool is_read = a->n_heads > 0; // by the attention that follows
    if (ctx->tap || !(ctx->fusion >> (is_read ? FUSED_ROPE_ATTENTION : FUSED_QK_NORM_ROPE_STORE) & 1)) return false;
    if (!(s->device.variants & VARIANT_STORE_HEADS) || is_fp8(a->kv) || a->head_dim != HEAD_DIM) return false;
    size_t n_single = is_read ? count_singles(s, host) : 0;
    if (is_read && (host->n_tokens == host->n_seqs || !cuda_wide_takes(s, host, n_single) ||
                    !cuda_group_attention_takes(s, a->head_dim)))
        return false;
    *end = {view(a->kv), view(a->batch), a->k_norm, a->cos_sin, a->eps, (int)n_single};
    return true;
}

// The first n sequences, of one token each.
static void attend_singles(const struct op_ctx *ctx, const struct rope_attention_args *r, size_t n) {
    struct batch batch = *r->attention->batch, host = *host_of(r->attention->batch);
    attention_params whole = params_for(ctx, r->attention, false);
    batch.n_tokens = batch.n_seqs = host.n_tokens = host.n_seqs = n;
    if (batch.host) batch.host = &host;
    attend_each(ctx, r, &batch, &whole);
}

// For batches that begin with sequences of one token; the longer ones' attention is fused only where it can norm q.
static void rope_attention(const struct op_ctx *ctx, const struct rope_attention_args *r) {
    const struct batch *b = r->attention->batch;
    struct cuda_state *s = cuda_of(ctx);
    if (b->n_tokens == b->n_seqs) {
        say_packed(s, attend_each(ctx, r, b, NULL));
        return;
    }
    bool stored = s->stored == r->store->k;
    s->stored = NULL;
    // These come first: what follows norms q and k in their place, and stores the same K and V once more.
    size_t n_single = count_singles(s, host_of(b));
    if (n_single) attend_singles(ctx, r, n_single);
    if (prompt_attention(ctx, r, n_single, stored)) return;
    ops_qk_norm_rope_store(ctx, r->store);
    attend(ctx, r->attention, n_single);
}

size_t cuda_split_floats(const struct ops *ops, const struct ops_limits *l) {
    size_t rows = l->max_tokens * l->n_heads, most = rows < SPLIT_ROWS ? rows : SPLIT_ROWS, chunks = 1;
    while (chunks * ATTN_CHUNK < l->max_positions) chunks *= 2;
    size_t floats = most * chunks * (l->head_dim + 4);
    size_t stream = cuda_stream_floats(((const struct cuda_state *)(const void *)ops)->n_sms, l);
    return floats > stream ? floats : stream;
}

template <typename KV, bool FUSED, int RT, bool TWO> static void allow_rows(struct cuda_state *s) {
    allow_shared(s, "preparing attention", k_attention<KV, FUSED, RT, TWO>, sizeof(attention_shared<KV, RT, TWO>));
}

template <typename KV> static void allow(struct cuda_state *s) {
    static_assert(!HOPPER || attention_shared<KV, 2, true>::V_PAGES == ATTN_WARPS ||
                      sizeof(attention_shared<KV, 2, true>) <= HALF_SM,
                  "two blocks an SM");
    static_assert(!HOPPER || !KV::IS_FP8 || sizeof(attention_shared<KV, 8, true>) <= HALF_SM, "two blocks an SM");
    static_assert(sizeof(attention_shared<KV, 16, false>) <= SM_SHARED, "an SM's shared memory");
    allow_rows<KV, false, 2, false>(s);
    allow_rows<KV, false, 8, false>(s);
    allow_rows<KV, false, 16, false>(s);
    if constexpr (HOPPER) allow_rows<KV, true, 2, true>(s);
    if constexpr (HOPPER && KV::IS_FP8) allow_rows<KV, true, 8, true>(s);
    allow_rows<KV, true, 2, false>(s);
    allow_rows<KV, true, 8, false>(s);
    allow_rows<KV, true, 16, false>(s);
}

extern "C" void cuda_load_attention(struct cuda_state *s, bool is_fp8, int head_dim) {
    unsigned kind = 1u << (head_dim / 32 * 2 + is_fp8);
    if (s->loaded_kv & kind) return;
    s->loaded_kv |= kind;
#define ALLOW(KV) allow<KV>(s)
    BY_KV(is_fp8, head_dim, ALLOW);
    cuda_load_wide(s, is_fp8, head_dim);
    if (!HOPPER) return;
    cuda_load_group_attention(s, is_fp8, head_dim);
    cuda_load_stream(s, is_fp8, head_dim);
}

extern "C" void cuda_fill_attention(struct ops *ops) {
    ops->attn_scores = attn_scores;
    ops->attn_softmax = attn_softmax;
    ops->attn_values = attn_values;
    ops->attn_combine = attn_combine;
    ops->attention = attention;
    ops->rope_attention = rope_attention;
}
