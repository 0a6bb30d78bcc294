// attention.cuh: what all attention kernels compute alike: one page for 16 rows, and the combination of pages.
//
// A tile is up to 16 rows: consecutive tokens of a sequence times the query heads of one KV head. q is rounded to two
// bf16s (high and low part), so that scores keep nearly f32's precision; p is rounded to bf16. Blocks of 32 positions
// (a page) are independent: own maximum, p, sum and values. The blocks of a chunk of 256 positions are combined over
// the chunk's maximum, in ascending order; chunks are combined in ascending order as ops.h combines blocks. Nothing
// depends on how rows, pages or chunks are spread over warps, blocks and launches. Scores are in units of log 2.
#ifndef TANDEM_OPS_CUDA_ATTENTION_CUH
#define TANDEM_OPS_CUDA_ATTENTION_CUH

#include "ops/cuda/common.cuh"
#include "ops/cuda/kv.cuh"
#include "ops/cuda/matrix.cuh"

enum { ATTN_THREADS = 256, ATTN_WARPS = ATTN_THREADS / 32, ROWS = 16, CHUNK_PAGES = ATTN_CHUNK / ATTN_BLOCK };
static_assert(CHUNK_PAGES == ATTN_WARPS && KV_PAGE_TOKENS == ATTN_BLOCK, "a warp a page of the chunk");

static const float LOG2_E = 1.44269504088896340736f;
#define MINUS_INFINITY __int_as_float((int)0xFF800000)

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

// Blocks of a row's chunk that hold positions up to its own.
static __device__ __forceinline__ int row_blocks(int position, int chunk) {
    int n = position / ATTN_BLOCK + 1 - chunk * CHUNK_PAGES;
    return position < 0 || n < 0 ? 0 : min(n, (int)CHUNK_PAGES);
}

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

// Attention of many tokens of few sequences: wide.cu. False: this batch is not for it.
bool cuda_wide_attention(struct cuda_state *s, const attention_params &p, const struct batch *host, int head_dim);

#endif
