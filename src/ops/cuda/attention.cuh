// attention.cuh: what all attention kernels compute alike: one page for 16 rows, and the combination of pages.
//
// A tile is up to 16 rows: consecutive tokens of a sequence times the query heads of one KV head. q times the scale is
// rounded to bf16, and so is p. Scores are in units of log 2 and lifted (below). A chunk is 256 absolute positions: its
// values are one chain of matrix instructions of 16 positions each, in ascending order, from +0, and its sum is the
// same chain with ones in V's place. Chunks join a row in ascending order (chain_add, chain_value). p is 2^(s - unit),
// the unit a whole number not below any of the row's scores in the chunk. Which one it is, when it is raised, and
// whether further positions with p = 0 follow, changes no bit: powers of two scale exactly, and a lifted score's
// difference to a whole number is exact. So nothing depends on how rows, pages or chunks are spread over warps, blocks
// and launches.
#ifndef TANDEM_OPS_CUDA_ATTENTION_CUH
#define TANDEM_OPS_CUDA_ATTENTION_CUH

#include "ops/cuda/common.cuh"
#include "ops/cuda/kv.cuh"
#include "ops/cuda/packed.cuh"

enum { ATTN_THREADS = 256, ATTN_WARPS = ATTN_THREADS / 32, ROWS = 16, CHUNK_PAGES = ATTN_CHUNK / ATTN_BLOCK };
static_assert(CHUNK_PAGES == ATTN_WARPS && KV_PAGE_TOKENS == ATTN_BLOCK, "a warp a page of the chunk");

static const float LOG2_E = 1.44269504088896340736f;
#define MINUS_INFINITY __int_as_float((int)0xFF800000)

struct attention_params {
    kv_view kv;
    batch_view b;
    const float *q;                 // [n_tokens, n_heads * head_dim]
    float *out;                     // the same; of prompts NULL where only the packed ones are read
    float scale;                    // 1 / sqrt(head_dim), times log2 e
    int n_heads, tile_tokens, rows; // rows: tile_tokens * heads of a KV head
    // Chunks spread over blocks (block z takes z, z + gridDim.z, ...) or warps (stream.cu), or all in one.
    bool split;
    int max_chunks;
    float *partial; // [tile, kv_head][max_chunks][part_floats]; stream.cu: [tile][max_chunks][kv_head][part_floats]
    unsigned *arrivals;
    int n_tiles;           // of prompts, by group_attention.cu: tiles of a KV head
    unsigned char *packed; // where the results go, too, rounded, for the next product (packed.cuh); or NULL
    int token_units;       // of that
    // With the norms, the rotation and the store of one token a sequence.
    const float *k, *v, *q_norm, *k_norm, *cos_sin;
    float eps;
};

// Floats of a chunk's part of a tile: values, maxima, sums; a multiple of four.
static __host__ __device__ __forceinline__ size_t part_floats(int rows, int head_dim) {
    return (size_t)(rows * (head_dim + 2) + 3) / 4 * 4;
}

// Results of a token's channels from `column` on (a multiple of 8; of all heads), to memory.
static __device__ __forceinline__ void put_results(const attention_params &p, int token, int column, float4 a,
                                                   float4 b) {
    float4 *out = reinterpret_cast<float4 *>(p.out + (size_t)token * p.n_heads * p.kv.head_dim + column);
    out[0] = a;
    out[1] = b;
    if (p.packed)
        *reinterpret_cast<uint4 *>(p.packed + packed_at(token, column, p.token_units)) =
            make_uint4(pack_bf16(a.x, a.y), pack_bf16(a.z, a.w), pack_bf16(b.x, b.y), pack_bf16(b.z, b.w));
}

// Pages of a row's chunk that hold positions up to its own.
static __device__ __forceinline__ int row_blocks(int position, int chunk) {
    int n = position / ATTN_BLOCK + 1 - chunk * CHUNK_PAGES;
    return position < 0 || n < 0 ? 0 : min(n, (int)CHUNK_PAGES);
}

// ---- One block of 32 positions, by a warp -------------------------------------------------------------------------

// q's rows, times attention's scale, rounded: [N][HD + 8]. Rows from N on are zero.
template <int HD, int N = ROWS> struct q_rows { __nv_bfloat16 of[N][HD + 8]; };

template <int HD, int N>
static __device__ __forceinline__ void put_q(q_rows<HD, N> *q, int row, int c, float v, float scale) {
    q->of[row][c] = __float2bfloat16_rn(v * scale);
}

// This step's own k and v of a head, as they will be read from their page, which may not have them yet.
template <int HD> struct fresh_row {
    uint4 k[HD / 32][4]; // as a unit's row: lane t's share of each 32 columns
    uint32_t v[HD];      // in both halves

    __device__ __forceinline__ void put(bool of_v, int c, __nv_bfloat16 value) {
        if (of_v) v[c] = pack_bf16(__bfloat162float(value), __bfloat162float(value));
        else reinterpret_cast<__nv_bfloat16 *>(k)[row_index(c)] = value;
    }
};

// Rounds this step's k or v of a head, which a warp has in registers: beside, and into its page. `row`: room for HD
// floats in shared memory.
template <int HD, typename FRESH>
static __device__ __forceinline__ void store_fresh(FRESH *f, float *row, const kv_view &kv, int page, int kv_head,
                                                   int slot, bool of_v, const head_registers<HD> &x, int lane) {
    constexpr int PAIRS = head_registers<HD>::PAIRS, HALF = HD / 2;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        if (lane + 32 * i >= HALF) continue;
        row[lane + 32 * i] = x.lo[i];
        row[lane + 32 * i + HALF] = x.hi[i];
    }
    __syncwarp();
#pragma unroll
    for (int c = lane; c < HD; c += 32) f->put(of_v, c, kv_put(kv, of_v, page, kv_head, slot, c, row[c]));
}

// Scores of rows g, g + 8 (TALL; otherwise of row g) at positions 8 j + 2t, 8 j + 2t + 1. `fresh`: the k of slot
// `slot`, if that is not negative.
template <typename KV, bool TALL, int N>
static __device__ __forceinline__ void scores(float (&s)[4][4], const q_rows<KV::HD, N> *q, const unsigned char *page,
                                              int lane, const fresh_row<KV::HD> *fresh = NULL, int slot = -1) {
    constexpr int HD = KV::HD;
    int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = 0;
#pragma unroll
    for (int i = 0; i < HD / 32; i++) {
        uint32_t h[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            h[e] = 0;
            if ((!TALL && e % 2) || (N < 8 && g >= N)) continue;
            h[e] = *reinterpret_cast<const uint32_t *>(&q->of[g + e % 2 * 8][i * 32 + e / 2 * 8 + 2 * t]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 k = page_reader<KV>::k(page, j, i, lane);
            if (8 * j + g == slot) k = fresh->k[i][t];
            mma(s[j], h[0], h[1], h[2], h[3], k.x, k.y);
            mma(s[j], h[4], h[5], h[6], h[7], k.z, k.w);
        }
    }
}

// A lane's share of a V page is 16 bytes for every 8 channels: slots 2t and 2t + 1 of each 8. What of them is to be
// read from the page, and where this step's own v belongs: what an unused slot holds may be no number.
struct v_slots {
    uint32_t keep[4], put[4];
};

// Slots below n are in use; slot `fresh` (-1: none) is this step's.
static __device__ __forceinline__ v_slots slots_in_use(int n, int fresh, int t) {
    v_slots s;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        int slot = 8 * e + 2 * t;
        s.put[e] = slot == fresh ? 0xFFFFu : slot + 1 == fresh ? 0xFFFF0000u : 0u;
        s.keep[e] = (slot + 1 < n ? 0xFFFFFFFFu : slot < n ? 0xFFFFu : 0u) & ~s.put[e];
    }
    return s;
}

static __device__ __forceinline__ uint4 real_slots(uint4 v, const v_slots &s, uint32_t fresh) {
    return make_uint4((v.x & s.keep[0]) | (fresh & s.put[0]), (v.y & s.keep[1]) | (fresh & s.put[1]),
                      (v.z & s.keep[2]) | (fresh & s.put[2]), (v.w & s.keep[3]) | (fresh & s.put[3]));
}

// ---- A chunk's chain ----------------------------------------------------------------------------------------------
// A score is lifted: LIFT is added, which rounds it to a multiple of 2^-15 (beyond -128 to 128, of the sum's last
// place). Then s - unit is exact wherever 2^(s - unit) is not zero, and exp2_fast of it is that of its fraction times a
// power of two (seen for every fraction and exponent on an H200), as long as it is not positive: units are not below
// scores.
static const float LIFT = 384.0f;
static const float NO_UNIT = -1e30f; // below that of any score: finite, so that differences are numbers

static const uint32_t ONES = 0x3F803F80u; // two of V's: with them the chain is the sum of p

// Lifts the scores of a row (half 0: g, 1: g + 8) up to position n - 1 of the block; those beyond become -inf, whose p
// is 0. Returns the highest that the lane has.
static __device__ __forceinline__ float lift_row(float (&s)[4][4], int half, int n, int t) {
    float m = NO_UNIT;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float &x = s[j][2 * half + e];
            x = 8 * j + 2 * t + e < n ? x + LIFT : MINUS_INFINITY;
            m = fmaxf(m, x);
        }
    return m;
}

// The least unit for a row of whose lifted scores its four lanes have the highest.
static __device__ __forceinline__ float row_unit(float m) {
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    return ceilf(fmaxf(m, __shfl_xor_sync(~0u, m, 2)));
}

// p of a row's lifted scores, in pairs, in units of `unit`.
static __device__ __forceinline__ void row_weights(uint32_t (&p)[4], const float (&s)[4][4], int half, float unit) {
#pragma unroll
    for (int j = 0; j < 4; j++)
        p[j] = pack_bf16(exp2_fast(s[j][2 * half] - unit), exp2_fast(s[j][2 * half + 1] - unit));
}

// Raises a unit to `to` if that is higher. Returns what those in the old one are to be multiplied by.
static __device__ __forceinline__ float raise_unit(float &unit, float to) {
    float before = unit;
    unit = fmaxf(unit, to);
    return exp2_fast(before - unit);
}

// A chunk of a lane's two rows so far: their units, sums (two of l) and values. What lies e-th of four is row e % 2's
// where ROWS_ACROSS, else row e / 2's.
template <int N, bool ROWS_ACROSS> struct chunk_chain {
    float unit[2], l[4], of[N][4];

    __device__ __forceinline__ void start() {
        unit[0] = unit[1] = NO_UNIT;
#pragma unroll
        for (int e = 0; e < 4; e++) l[e] = 0;
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) of[i][e] = 0;
    }

    // Raises the units to `to` where that is higher; by the whole warp.
    __device__ __forceinline__ void raise(const float (&to)[2]) {
        if (__all_sync(~0u, to[0] <= unit[0] && to[1] <= unit[1])) return;
        float a[2] = {raise_unit(unit[0], to[0]), raise_unit(unit[1], to[1])};
#pragma unroll
        for (int e = 0; e < 4; e++) l[e] *= a[ROWS_ACROSS ? e % 2 : e / 2];
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) of[i][e] *= a[ROWS_ACROSS ? e % 2 : e / 2];
    }
};

// A page's p of rows g and g + 8 join their chunk's sums, l[0] and l[2] (all four lanes have them).
static __device__ __forceinline__ void chain_sum(float (&l)[4], const uint32_t (&p)[4], const uint32_t (&p8)[4]) {
    mma(l, p[0], p8[0], p[1], p8[1], ONES, ONES);
    mma(l, p[2], p8[2], p[3], p8[3], ONES, ONES);
}

// A page's values of channels 8 i + 2t, + 1 of rows g, g + 8 join their chunk's. `v`: the lane's share of the page.
static __device__ __forceinline__ void chain_values(float (&o)[4], const uint32_t (&p)[4], const uint32_t (&p8)[4],
                                                    uint4 v) {
    mma(o, p[0], p8[0], p[1], p8[1], v.x, v.y);
    mma(o, p[2], p8[2], p[3], p8[3], v.z, v.w);
}

// ---- Combining ----------------------------------------------------------------------------------------------------
// A row's unit (m) and sum (l) over the chunks so far.
struct chain {
    float m, l;
};

#define CHAIN_START                                                                                                    \
    { MINUS_INFINITY, 0.0f }

// Takes in the next chunk: its values are weighted with c, those so far with a (both powers of two).
static __device__ __forceinline__ void chain_add(chain &s, float m, float l, float &a, float &c) {
    float m2 = fmaxf(s.m, m);
    a = exp2_fast(s.m - m2);
    c = exp2_fast(m - m2);
    s.l = fmaf(l, c, s.l * a);
    s.m = m2;
}

// Values so far, with those of the next chunk. Where a is 1, fmaf(of, c, sum) is the same.
static __device__ __forceinline__ float chain_value(float sum, float a, float of, float c) {
    return fmaf(of, c, sum * a);
}

// Calls `call` with KV as a type.
#define BY_KV(is_fp8, dim, call)                                                                                       \
    do {                                                                                                               \
        switch (dim) {                                                                                                 \
        case 32: is_fp8 ? call(fp8_kv<32>) : call(bf16_kv<32>); break;                                                 \
        case 64: is_fp8 ? call(fp8_kv<64>) : call(bf16_kv<64>); break;                                                 \
        case 96: is_fp8 ? call(fp8_kv<96>) : call(bf16_kv<96>); break;                                                 \
        case 128: is_fp8 ? call(fp8_kv<128>) : call(bf16_kv<128>); break;                                              \
        default: cuda_check(s, cudaErrorInvalidValue, "attention with this head_dim");                                 \
        }                                                                                                              \
    } while (0)

// Attention of many tokens of few sequences: wide.cu. False: this batch is not for it.
bool cuda_wide_attention(struct cuda_state *s, attention_params p, const struct batch *host, size_t n_single,
                         int head_dim, bool packed_only);
// The same by warp groups: group_attention.cu. False: not this shape.
bool cuda_group_attention(struct cuda_state *s, const attention_params &p, size_t tiles, int head_dim);
// Attention of many sequences of one token each, with norms, rotation and store: stream.cu. False: this batch is not
// for it.
bool cuda_stream_attention(struct cuda_state *s, const attention_params &p, size_t n_tokens, size_t scratch_floats,
                           int head_dim);
size_t cuda_stream_floats(int n_sms, const struct ops_limits *l);

// Their parts of cuda_load_attention.
void cuda_load_wide(struct cuda_state *s, bool is_fp8, int head_dim);
void cuda_load_group_attention(struct cuda_state *s, bool is_fp8, int head_dim);
void cuda_load_stream(struct cuda_state *s, bool is_fp8, int head_dim);

#endif
