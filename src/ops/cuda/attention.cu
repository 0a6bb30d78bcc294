// attention.cu: paged attention, as primitives and fused.
//
// A tile is up to 16 rows: consecutive tokens of a sequence times the query heads of one KV head. q is rounded to two
// bf16s (high and low part), so that scores keep nearly f32's precision; p is rounded to bf16. Blocks of 32 positions
// (a page) are independent: own maximum, p, sum and values. The blocks of a chunk of 256 positions are combined over
// the chunk's maximum, in ascending order; chunks are combined in ascending order as ops.h combines blocks. Nothing
// depends on how rows, pages or chunks are spread over warps, blocks and launches. Scores are in units of log 2.
#include "ops/cuda/common.cuh"
#include "ops/cuda/kv.cuh"
#include "ops/cuda/matrix.cuh"
#include "ops/cuda/products.cuh"

enum { ATTN_THREADS = 256, ATTN_WARPS = ATTN_THREADS / 32, ROWS = 16, CHUNK_PAGES = ATTN_CHUNK / ATTN_BLOCK };
static_assert(CHUNK_PAGES == ATTN_WARPS && KV_PAGE_TOKENS == ATTN_BLOCK, "a warp a page of the chunk");

static const float LOG2_E = 1.44269504088896340736f;
#define MINUS_INFINITY __int_as_float((int)0xFF800000)

// ---- One block of 32 positions, by a warp
// ----------------------------------------------------------------------------

// q's rows, rounded in two parts: [ROWS][HD + 8] each.
template <int HD> struct q_rows { __nv_bfloat16 high[ROWS][HD + 8], low[ROWS][HD + 8]; };

template <int HD> static __device__ __forceinline__ void put_q(q_rows<HD> *q, int row, int c, float v) {
    __nv_bfloat16 high = __float2bfloat16_rn(v);
    q->high[row][c] = high;
    q->low[row][c] = __float2bfloat16_rn(v - __bfloat162float(high));
}

// Scores of rows g, g + 8 at positions 8 j + 2t, 8 j + 2t + 1: the high parts' chain plus the low parts'. Where rows
// 8 to 15 are not used (not TALL), the low parts stand there, and one chain does for both. `page` [4][HD / 32][32
// lanes].
template <int HD, bool TALL>
static __device__ __forceinline__ void scores(float (&s)[4][4], const q_rows<HD> *q, const uint4 *page, float scale,
                                              int lane) {
    int g = lane / 4, t = lane % 4;
    float low[4][4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = 0;
#pragma unroll
    for (int i = 0; i < HD / 32; i++) {
        uint32_t h[8], l[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            int row = TALL ? g + e % 2 * 8 : g, c = i * 32 + e / 2 * 8 + 2 * t;
            bool is_low = !TALL && e % 2;
            h[e] = *reinterpret_cast<const uint32_t *>(is_low ? &q->low[row][c] : &q->high[row][c]);
            if (TALL) l[e] = *reinterpret_cast<const uint32_t *>(&q->low[row][c]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 k = page[(j * (HD / 32) + i) * CHUNK_LANES + lane];
            mma(s[j], h[0], h[1], h[2], h[3], k.x, k.y);
            mma(s[j], h[4], h[5], h[6], h[7], k.z, k.w);
            if (!TALL) continue;
            mma(low[j], l[0], l[1], l[2], l[3], k.x, k.y);
            mma(low[j], l[4], l[5], l[6], l[7], k.z, k.w);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < (TALL ? 4 : 2); e++) s[j][e] = (s[j][e] + (TALL ? low[j][e] : s[j][2 + e])) * scale;
}

// The softmax of one row (half 0: g, 1: g + 8) up to position n - 1 of the block: scores become rounded p in pairs, 0
// beyond; m and l are the row's maximum (-inf: no position) and sum.
static __device__ __forceinline__ void softmax_row(uint32_t (&p)[4], float &m, float &l, const float (&s)[4][4],
                                                   int half, int n, int t) {
    m = MINUS_INFINITY;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (8 * j + 2 * t + e < n) m = fmaxf(m, s[j][2 * half + e]);
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    l = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float e0 = 8 * j + 2 * t < n ? exp2_fast(s[j][2 * half] - m) : 0.0f;
        float e1 = 8 * j + 2 * t + 1 < n ? exp2_fast(s[j][2 * half + 1] - m) : 0.0f;
        p[j] = pack_bf16(e0, e1);
        l += bf16_low(p[j]);
        l += bf16_high(p[j]);
    }
    l += __shfl_xor_sync(~0u, l, 1);
    l += __shfl_xor_sync(~0u, l, 2);
}

// Clears the second, or both, of a pair of slots that stand at `slot` when they are not below n: what an unused slot
// holds may be no number.
static __device__ __forceinline__ uint32_t real_slots(uint32_t pair, int slot, int n) {
    return slot + 1 < n ? pair : slot < n ? pair & 0xFFFFu : 0u;
}

// Clears the slots of a V page in shared memory from n on.
template <int HD> static __device__ __forceinline__ void clear_slots(uint4 *page, int n, int lane) {
    int t = lane % 4;
#pragma unroll 1
    for (int i = lane; i < HD / 8 * CHUNK_LANES; i += 32) {
        uint4 v = page[i];
        v.x = real_slots(v.x, 2 * t, n);
        v.y = real_slots(v.y, 8 + 2 * t, n);
        v.z = real_slots(v.z, 16 + 2 * t, n);
        v.w = real_slots(v.w, 24 + 2 * t, n);
        page[i] = v;
    }
}

// Values of channels 8 i + 2t, + 1 of rows g, g + 8. `v`: the lane's share of the page, [HD / 8][32 lanes].
static __device__ __forceinline__ void values(float (&o)[4], const uint32_t (&p)[4], const uint32_t (&p8)[4], uint4 v) {
    o[0] = o[1] = o[2] = o[3] = 0;
    mma(o, p[0], p8[0], p[1], p8[1], v.x, v.y);
    mma(o, p[2], p8[2], p[3], p8[3], v.z, v.w);
}

// ---- Combining
// -------------------------------------------------------------------------------------------------------

// A row's blocks of one chunk: the weights of blocks 0 .. n - 1 (stride apart), the chunk's maximum and sum.
static __device__ __forceinline__ void chunk_weights(float *weight, float &m, float &l, const float *block_max,
                                                     const float *block_sum, int n, int stride) {
    m = block_max[0];
    for (int i = 1; i < n; i++) m = fmaxf(m, block_max[i * stride]);
    for (int i = 0; i < n; i++) {
        float w = exp2_fast(block_max[i * stride] - m);
        weight[i * stride] = w;
        l = i == 0 ? block_sum[0] * w : fmaf(block_sum[i * stride], w, l);
    }
}

// A row's maximum and sum over the chunks so far.
struct chain {
    float m, l;
};

// Takes in a chunk: afterwards o = fma(o, a, chunk's o * c), or the chunk's o if it is the first.
static __device__ __forceinline__ void chain_add(chain &s, float m, float l, float &a, float &c) {
    float m2 = fmaxf(s.m, m);
    a = exp2_fast(s.m - m2);
    c = exp2_fast(m - m2);
    s.l = fmaf(s.l, a, l * c);
    s.m = m2;
}

// ---- Primitives
// ------------------------------------------------------------------------------------------------------

template <int HD>
static __global__ void k_scores(float *s, const float *q, kv_view kv, int kv_head, const int32_t *pages, int n_kv,
                                float scale) {
    __shared__ q_rows<HD> rows;
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x, block = (int)blockIdx.x;
    for (int c = lane; c < HD; c += 32) {
        for (int r = 1; r < 8; r++) put_q(&rows, r, c, 0.0f);
        put_q(&rows, 0, c, q[c]);
    }
    __syncwarp();
    float out[4][4];
    scores<HD, false>(out, &rows, reinterpret_cast<const uint4 *>(kv.k + head_page(kv, pages[block], kv_head)), scale,
                      lane);
    for (int j = 0; lane < 4 && j < 4; j++)
        for (int e = 0; e < 2; e++) {
            int position = block * ATTN_BLOCK + 8 * j + 2 * lane + e;
            if (position < n_kv) s[position] = out[j][e];
        }
}

static __global__ void k_softmax(float *s, float *block_max, float *block_sum, int n_kv) {
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x, t = lane % 4, first = (int)blockIdx.x * ATTN_BLOCK, n = n_kv - first;
    float in[4][4] = {}, m, l;
    uint32_t p[4];
    for (int j = 0; j < 4; j++)
        for (int e = 0; e < 2; e++)
            if (8 * j + 2 * t + e < n) in[j][e] = s[first + 8 * j + 2 * t + e];
    __syncwarp();
    softmax_row(p, m, l, in, 0, n, t);
    for (int j = 0; lane < 4 && j < 4; j++) {
        if (8 * j + 2 * t < n) s[first + 8 * j + 2 * t] = bf16_low(p[j]);
        if (8 * j + 2 * t + 1 < n) s[first + 8 * j + 2 * t + 1] = bf16_high(p[j]);
    }
    if (lane == 0) {
        block_max[blockIdx.x] = m;
        block_sum[blockIdx.x] = l;
    }
}

static __global__ void k_values(float *o, const float *p, kv_view kv, int kv_head, const int32_t *pages, int n_kv) {
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x, g = lane / 4, t = lane % 4, first = (int)blockIdx.x * ATTN_BLOCK, n = n_kv - first;
    uint32_t pairs[4], none[4] = {0, 0, 0, 0};
    for (int j = 0; j < 4; j++) {
        int at = 8 * j + 2 * t;
        pairs[j] = pack_bf16(g == 0 && at < n ? p[first + at] : 0.0f, g == 0 && at + 1 < n ? p[first + at + 1] : 0.0f);
    }
    const uint4 *page = reinterpret_cast<const uint4 *>(kv.v + head_page(kv, pages[blockIdx.x], kv_head));
    for (int i = 0; i < kv.head_dim / 8; i++) {
        float out[4];
        uint4 x = page[i * CHUNK_LANES + lane];
        x.x = real_slots(x.x, 2 * t, n);
        x.y = real_slots(x.y, 8 + 2 * t, n);
        x.z = real_slots(x.z, 16 + 2 * t, n);
        x.w = real_slots(x.w, 24 + 2 * t, n);
        values(out, pairs, none, x);
        for (int e = 0; g == 0 && e < 2; e++) o[(size_t)blockIdx.x * kv.head_dim + i * 8 + 2 * t + e] = out[e];
    }
}

static __global__ void k_combine(float *out, const float *block_max, const float *block_sum, const float *o,
                                 int n_blocks, int head_dim) {
    dependents_may_start();
    dependency_wait();
    int channel = (int)threadIdx.x;
    chain s = {0, 0};
    float sum = 0;
    for (int first = 0; first < n_blocks; first += CHUNK_PAGES) {
        float weight[CHUNK_PAGES], m, l;
        int n = min(CHUNK_PAGES, n_blocks - first);
        chunk_weights(weight, m, l, block_max + first, block_sum + first, n, 1);
        float of = 0;
        for (int i = 0; i < n; i++) {
            float v = o[(size_t)(first + i) * head_dim + channel];
            of = i == 0 ? v * weight[0] : fmaf(v, weight[i], of);
        }
        if (first == 0) {
            s = {m, l};
            sum = of;
        } else {
            float a, c;
            chain_add(s, m, l, a, c);
            sum = fmaf(sum, a, of * c);
        }
    }
    out[channel] = sum / s.l;
}

// ---- Fused
// -----------------------------------------------------------------------------------------------------------

struct attention_params {
    kv_view kv;
    batch_view b;
    const float *q;                 // [n_tokens, n_heads * head_dim]
    float *out;                     // the same
    float scale;                    // 1 / sqrt(head_dim), times log2 e
    int n_heads, tile_tokens, rows; // rows: tile_tokens * heads of a KV head
    // Chunks spread over blocks (block z takes z, z + gridDim.z, ...), or all in one.
    bool split;
    int max_chunks;
    float *partial; // [tile, kv_head][max_chunks][rows][head_dim + 2]
    unsigned *arrivals;
    // With the norms, the rotation and the store of one token a sequence.
    const float *k, *v, *q_norm, *k_norm, *cos_sin;
    float eps;
};

template <int HD> struct attention_shared {
    uint4 k[ATTN_WARPS][ATTN_BLOCK * HD / 8], v[ATTN_WARPS][ATTN_BLOCK * HD / 8];
    q_rows<HD> q;
    uint64_t k_arrived[ATTN_WARPS], v_arrived[ATTN_WARPS];
    float max[CHUNK_PAGES][ROWS], sum[CHUNK_PAGES][ROWS], weight[CHUNK_PAGES][ROWS];
    float chunk_max[ROWS], chunk_sum[ROWS];
    int position[ROWS];         // of each row's token; -1: no such row
    __nv_bfloat16 fresh[2][HD]; // this step's k and v
    bool last;
    alignas(16) float o[4]; // [CHUNK_PAGES][rows][HD]
};

template <int HD>
static __device__ __forceinline__ void ask_for(attention_shared<HD> *sh, const attention_params &p, bool of_v,
                                               int kv_head, const int32_t *pages, int index, int warp) {
    size_t at = head_page(p.kv, __ldcg(pages + index), kv_head);
    const __nv_bfloat16 *from = (of_v ? p.kv.v : p.kv.k) + at;
    uint64_t *bar = of_v ? &sh->v_arrived[warp] : &sh->k_arrived[warp];
    barrier_expect(bar, ATTN_BLOCK * HD * 2);
    bulk_copy(of_v ? sh->v[warp] : sh->k[warp], from, ATTN_BLOCK * HD * 2, bar);
}

// q's rows (normed and rotated where FUSED) into shared memory, a warp a row; and where FUSED this token's k and v,
// into their page and beside.
template <int HD, bool FUSED, int RT>
static __device__ __forceinline__ void prepare_rows(attention_shared<HD> *sh, const attention_params &p, int token,
                                                    int kv_head, bool owns_position, int warp, int lane) {
    int group = p.n_heads / p.kv.n_kv_heads;
    constexpr int PAIRS = head_registers<HD>::PAIRS, HALF = HD / 2;
    const float *cos_sin = FUSED ? p.cos_sin + (size_t)token * HD : NULL;
#pragma unroll 1
    for (int row = warp; row < (RT > 8 ? 16 : 8); row += ATTN_WARPS) {
        head_registers<HD> x = {};
        if (sh->position[row] >= 0)
            x = load_head<HD>(
                p.q + ((size_t)(token + row / group) * p.n_heads + (size_t)kv_head * group + row % group) * HD,
                FUSED ? p.q_norm : NULL, cos_sin, p.eps, lane);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            if (lane + 32 * i >= HALF) continue;
            put_q(&sh->q, row, lane + 32 * i, x.lo[i]);
            put_q(&sh->q, row, lane + 32 * i + HALF, x.hi[i]);
        }
    }
    if (!FUSED || !owns_position || warp < ATTN_WARPS - 2) return;
    bool of_v = warp == ATTN_WARPS - 1;
    head_registers<HD> x = load_head<HD>((of_v ? p.v : p.k) + ((size_t)token * p.kv.n_kv_heads + kv_head) * HD,
                                         of_v ? NULL : p.k_norm, of_v ? NULL : cos_sin, p.eps, lane);
    int position = sh->position[0], slot = position % KV_PAGE_TOKENS;
    int page = p.b.pages[p.b.page_start[p.b.seq[token]] + position / KV_PAGE_TOKENS];
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) {
        int c = lane + 32 * (i / 2) + i % 2 * HALF;
        if (lane + 32 * (i / 2) >= HALF) continue;
        __nv_bfloat16 rounded = __float2bfloat16_rn(i % 2 ? x.hi[i / 2] : x.lo[i / 2]);
        sh->fresh[of_v][c] = rounded;
        if (of_v) p.kv.v[v_index(p.kv, page, kv_head, slot, c)] = rounded;
        else p.kv.k[k_index(p.kv, page, kv_head, slot, c)] = rounded;
    }
}

// A warp's page of a chunk: scores, softmax, values; the next chunk's page is asked for as soon as this one is read.
template <int HD, bool FUSED, int RT>
static __device__ __forceinline__ void one_page(attention_shared<HD> *sh, const attention_params &p, int kv_head,
                                                const int32_t *pages, int index, int last_page, int limit, int next,
                                                uint32_t parity, int warp, int lane) {
    int g = lane / 4, t = lane % 4, first = index * ATTN_BLOCK, n = limit - first;
    constexpr bool tall = RT > 8;
    float s[4][4], m[2], l[2];
    uint32_t pairs[2][4] = {};
#if HOPPER
    barrier_wait(&sh->k_arrived[warp], parity);
#else
    const uint4 *from_k = reinterpret_cast<const uint4 *>(p.kv.k + head_page(p.kv, pages[index], kv_head));
    const uint4 *from_v = reinterpret_cast<const uint4 *>(p.kv.v + head_page(p.kv, pages[index], kv_head));
    for (int i = lane; i < ATTN_BLOCK * HD / 8; i += 32) {
        sh->k[warp][i] = from_k[i];
        sh->v[warp][i] = from_v[i];
    }
    __syncwarp();
#endif
    bool patch = FUSED && index == last_page;
    int slot = (limit - 1) % KV_PAGE_TOKENS;
    if (patch) {
        __nv_bfloat16 *k = reinterpret_cast<__nv_bfloat16 *>(sh->k[warp]);
        for (int c = lane; c < HD; c += 32) k[unit_index((size_t)slot, (size_t)c, HD)] = sh->fresh[0][c];
        __syncwarp();
    }
    scores<HD, tall>(s, &sh->q, sh->k[warp], p.scale, lane);
    __syncwarp();
    if (HOPPER && next <= last_page && lane == 0) ask_for<HD>(sh, p, false, kv_head, pages, next, warp);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = g + half * 8;
        if (half == 1 && !tall) break;
        softmax_row(pairs[half], m[half], l[half], s, half, sh->position[row] + 1 - first, t);
        if (t == 0 && row < p.rows) {
            sh->max[index % CHUNK_PAGES][row] = m[half];
            sh->sum[index % CHUNK_PAGES][row] = l[half];
        }
    }
#if HOPPER
    barrier_wait(&sh->v_arrived[warp], parity);
#endif
    if (patch) {
        __nv_bfloat16 *v = reinterpret_cast<__nv_bfloat16 *>(sh->v[warp]);
        for (int c = lane; c < HD; c += 32) v[unit_index((size_t)c, (size_t)slot, KV_PAGE_TOKENS)] = sh->fresh[1][c];
        __syncwarp();
    }
    if (n < ATTN_BLOCK) {
        clear_slots<HD>(sh->v[warp], n, lane);
        __syncwarp();
    }
    float *o = sh->o + (size_t)warp * p.rows * HD;
#pragma unroll 4
    for (int i = 0; i < HD / 8; i++) {
        float d[4];
        values(d, pairs[0], pairs[1], sh->v[warp][i * CHUNK_LANES + lane]);
        if (g < p.rows) *reinterpret_cast<float2 *>(o + g * HD + i * 8 + 2 * t) = make_float2(d[0], d[1]);
        if (tall && g + 8 < p.rows)
            *reinterpret_cast<float2 *>(o + (g + 8) * HD + i * 8 + 2 * t) = make_float2(d[2], d[3]);
    }
    __syncwarp();
    if (HOPPER && next <= last_page && lane == 0) ask_for<HD>(sh, p, true, kv_head, pages, next, warp);
}

// Blocks of a row's chunk that hold positions up to its own.
static __device__ __forceinline__ int row_blocks(int position, int chunk) {
    int n = position / ATTN_BLOCK + 1 - chunk * CHUNK_PAGES;
    return position < 0 || n < 0 ? 0 : min(n, (int)CHUNK_PAGES);
}

// RT: at least p.rows.
template <int HD, bool FUSED, int RT>
static __global__ void __launch_bounds__(ATTN_THREADS, 1) k_attention(attention_params p) {
    DYNAMIC_SHARED(raw);
    attention_shared<HD> *sh = reinterpret_cast<attention_shared<HD> *>(raw);
    constexpr int OWN = (RT * HD + ATTN_THREADS - 1) / ATTN_THREADS;
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
    if (HOPPER && lane == 0) {
        barrier_init(&sh->k_arrived[warp]);
        barrier_init(&sh->v_arrived[warp]);
        barrier_fence();
        if (chunk * CHUNK_PAGES + warp <= last_page) {
            ask_for<HD>(sh, p, false, kv_head, pages, chunk * CHUNK_PAGES + warp, warp);
            ask_for<HD>(sh, p, true, kv_head, pages, chunk * CHUNK_PAGES + warp, warp);
        }
    }
    if (thread < ROWS)
        sh->position[thread] =
            thread < p.rows && token + thread / group < end ? __ldcg(p.b.position + token + thread / group) : -1;
    __syncthreads();
    if (FUSED) dependency_wait();
    prepare_rows<HD, FUSED, RT>(sh, p, token, kv_head, chunk == (n_chunks - 1) % stride, warp, lane);
    __syncthreads();

    chain state[OWN];
    float sum[OWN];
    size_t tile = (size_t)token * p.kv.n_kv_heads + kv_head, size = (size_t)p.rows * (HD + 2);
    for (uint32_t parity = 0; chunk < n_chunks; chunk += stride, parity ^= 1) {
        int index = chunk * CHUNK_PAGES + warp, next = index + stride * CHUNK_PAGES;
        if (index <= last_page)
            one_page<HD, FUSED, RT>(sh, p, kv_head, pages, index, last_page, limit, next, parity, warp, lane);
        __syncthreads();
        if (thread < p.rows) {
            int n = row_blocks(sh->position[thread], chunk);
            float m = 0, l = 0;
            if (n > 0) chunk_weights(&sh->weight[0][thread], m, l, &sh->max[0][thread], &sh->sum[0][thread], n, ROWS);
            sh->chunk_max[thread] = m;
            sh->chunk_sum[thread] = l;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int at = i * ATTN_THREADS + thread, row = at / HD,
                n = row < p.rows ? row_blocks(sh->position[row], chunk) : 0;
            if (n == 0) continue;
            float of = sh->o[at] * sh->weight[0][row];
            for (int k = 1; k < n; k++) of = fmaf(sh->o[(size_t)k * p.rows * HD + at], sh->weight[k][row], of);
            if (apart) {
                float *mine = p.partial + (tile * p.max_chunks + chunk) * size;
                mine[at] = of;
                if (at % HD == 0) {
                    mine[p.rows * HD + row] = sh->chunk_max[row];
                    mine[p.rows * (HD + 1) + row] = sh->chunk_sum[row];
                }
            } else if (chunk == 0) {
                state[i] = {sh->chunk_max[row], sh->chunk_sum[row]};
                sum[i] = of;
            } else {
                float a, c;
                chain_add(state[i], sh->chunk_max[row], sh->chunk_sum[row], a, c);
                sum[i] = fmaf(sum[i], a, of * c);
            }
        }
        __syncthreads();
    }

    if (apart) {
        __threadfence();
        __syncthreads();
        if (thread == 0) sh->last = atomicAdd(p.arrivals + tile, 1u) == (unsigned)min(n_chunks, stride) - 1;
        __syncthreads();
        if (!sh->last) return;
        __threadfence();
        if (thread == 0) p.arrivals[tile] = 0;
        const float *all = p.partial + tile * p.max_chunks * size;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int at = i * ATTN_THREADS + thread, row = at / HD;
            if (row >= p.rows) continue;
            for (int k = 0; k < n_chunks; k++) {
                const float *from = all + k * size;
                float of = __ldcg(from + at), m = __ldcg(from + p.rows * HD + row),
                      l = __ldcg(from + p.rows * (HD + 1) + row);
                if (k == 0) {
                    state[i] = {m, l};
                    sum[i] = of;
                } else {
                    float a, c;
                    chain_add(state[i], m, l, a, c);
                    sum[i] = fmaf(sum[i], a, of * c);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int at = i * ATTN_THREADS + thread, row = at / HD;
        if (row >= p.rows || sh->position[row] < 0) continue;
        p.out[((size_t)(token + row / group) * p.n_heads + (size_t)kv_head * group + row % group) * HD + at % HD] =
            sum[i] / state[i].l;
    }
}

// ---- Launchers
// -------------------------------------------------------------------------------------------------------

// Calls `call` with HD as a constant.
#define BY_HEAD_DIM(dim, call)                                                                                         \
    do {                                                                                                               \
        switch (dim) {                                                                                                 \
        case 32: call(32); break;                                                                                      \
        case 64: call(64); break;                                                                                      \
        case 96: call(96); break;                                                                                      \
        case 128: call(128); break;                                                                                    \
        default: cuda_check(s, cudaErrorInvalidValue, "attention with this head_dim");                                 \
        }                                                                                                              \
    } while (0)

static void attn_scores(const struct op_ctx *ctx, float *out, const float *q, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv, float scale) {
    struct cuda_state *s = cuda_of(ctx);
#define SCORES(HD)                                                                                                     \
    launch_kernel(s, "attn_scores", k_scores<HD>, {grid_for((n_kv + ATTN_BLOCK - 1) / ATTN_BLOCK), 32, 0}, out, q,     \
                  view(kv), (int)kv_head, pages, (int)n_kv, scale *LOG2_E)
    BY_HEAD_DIM(kv->head_dim, SCORES);
}

static void attn_softmax(const struct op_ctx *ctx, float *scores, float *block_max, float *block_sum, size_t n_kv) {
    launch_kernel(cuda_of(ctx), "attn_softmax", k_softmax, {grid_for((n_kv + ATTN_BLOCK - 1) / ATTN_BLOCK), 32, 0},
                  scores, block_max, block_sum, (int)n_kv);
}

static void attn_values(const struct op_ctx *ctx, float *o, const float *p, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv) {
    launch_kernel(cuda_of(ctx), "attn_values", k_values, {grid_for((n_kv + ATTN_BLOCK - 1) / ATTN_BLOCK), 32, 0}, o, p,
                  view(kv), (int)kv_head, pages, (int)n_kv);
}

static void attn_combine(const struct op_ctx *ctx, float *out, const float *block_max, const float *block_sum,
                         const float *o, size_t n_blocks, size_t head_dim) {
    launch_kernel(cuda_of(ctx), "attn_combine", k_combine, {grid_for(1), (unsigned)head_dim, 0}, out, block_max,
                  block_sum, o, (int)n_blocks, (int)head_dim);
}

// The longest context, up to the next power of two, in chunks: what a recorded sequence may depend on.
static size_t most_chunks(const struct batch *b) {
    const struct batch *host = b->host ? b->host : b;
    size_t longest = ATTN_CHUNK;
    for (size_t i = 0; i < host->n_seqs; i++)
        while (longest < (size_t)host->kv_len[i]) longest *= 2;
    return longest / ATTN_CHUNK;
}

static attention_params params_for(const struct op_ctx *ctx, const struct attention_args *a, bool one_each) {
    struct cuda_state *s = cuda_of(ctx);
    int group = (int)(a->n_heads / a->n_kv_heads);
    attention_params p = {};
    p.kv = view(a->kv);
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
    return p;
}

template <int HD> static size_t attention_bytes(int rows) {
    return sizeof(attention_shared<HD>) + CHUNK_PAGES * (size_t)rows * HD * sizeof(float);
}

template <int HD, bool FUSED>
static void launch_attention(struct cuda_state *s, const attention_params &p, size_t n_tokens, size_t chunks) {
    // As many blocks as the SMs hold at once: each loads its next chunk while it works on one.
    size_t tiles = n_tokens * (size_t)p.kv.n_kv_heads, fit = (size_t)s->n_sms / tiles, blocks = 1;
    if (p.split) blocks = fit == 0 ? 1 : chunks < fit ? chunks : fit;
    struct launch l = {grid_for(n_tokens, (size_t)p.kv.n_kv_heads, blocks), ATTN_THREADS, attention_bytes<HD>(p.rows)};
    if (p.rows <= 2) launch_kernel(s, "attention", k_attention<HD, FUSED, 2>, l, p);
    else if (p.rows <= 8) launch_kernel(s, "attention", k_attention<HD, FUSED, 8>, l, p);
    else launch_kernel(s, "attention", k_attention<HD, FUSED, 16>, l, p);
}

static void attention(const struct op_ctx *ctx, const struct attention_args *a) {
    struct cuda_state *s = cuda_of(ctx);
    attention_params p = params_for(ctx, a, a->batch->n_tokens == a->batch->n_seqs);
#define ATTENTION(HD) launch_attention<HD, false>(s, p, a->batch->n_tokens, most_chunks(a->batch))
    BY_HEAD_DIM(a->head_dim, ATTENTION);
}

// For a batch of one token a sequence; else its parts.
static void rope_attention(const struct op_ctx *ctx, const struct rope_attention_args *r) {
    const struct attention_args *a = r->attention;
    struct cuda_state *s = cuda_of(ctx);
    if (a->batch->n_tokens != a->batch->n_seqs) {
        ops_qk_norm_rope_store(ctx, r->store);
        ops_attention(ctx, a);
        return;
    }
    attention_params p = params_for(ctx, a, true);
    p.k = r->store->k;
    p.v = r->store->v;
    p.q_norm = r->store->q_norm;
    p.k_norm = r->store->k_norm;
    p.cos_sin = r->store->cos_sin;
    p.eps = r->store->eps;
#define ROPE_ATTENTION(HD) launch_attention<HD, true>(s, p, a->batch->n_tokens, most_chunks(a->batch))
    BY_HEAD_DIM(a->head_dim, ROPE_ATTENTION);
}

size_t cuda_split_floats(const struct ops *ops, const struct ops_limits *l) {
    (void)ops;
    size_t rows = l->max_tokens * l->n_heads < SPLIT_ROWS ? l->max_tokens * l->n_heads : SPLIT_ROWS, chunks = 1;
    while (chunks * ATTN_CHUNK < l->max_positions) chunks *= 2;
    return rows * chunks * (l->head_dim + 2);
}

template <int HD, bool FUSED, int RT> static void allow(struct cuda_state *s) {
    cuda_check(s,
               cudaFuncSetAttribute(k_attention<HD, FUSED, RT>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)attention_bytes<HD>(RT)),
               "preparing attention");
}

template <int HD> static void allow_shared(struct cuda_state *s) {
    allow<HD, false, 2>(s);
    allow<HD, false, 8>(s);
    allow<HD, false, 16>(s);
    allow<HD, true, 2>(s);
    allow<HD, true, 8>(s);
    allow<HD, true, 16>(s);
}

extern "C" bool cuda_attention_setup(struct cuda_state *s) {
    allow_shared<32>(s);
    allow_shared<64>(s);
    allow_shared<96>(s);
    allow_shared<128>(s);
    return s->failed == cudaSuccess;
}

extern "C" void cuda_fill_attention(struct ops *ops) {
    ops->attn_scores = attn_scores;
    ops->attn_softmax = attn_softmax;
    ops->attn_values = attn_values;
    ops->attn_combine = attn_combine;
    ops->attention = attention;
    ops->rope_attention = rope_attention;
}
