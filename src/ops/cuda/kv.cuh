// kv.cuh: what kernels see of a batch and of a layer's K and V, where the elements of a page stand, and the per-head
// norm and rotation.
#ifndef TANDEM_OPS_CUDA_KV_CUH
#define TANDEM_OPS_CUDA_KV_CUH

#include "format/fp8.h"
#include "ops/cuda/common.cuh"
#include "ops/cuda/matrix.cuh"

// How K and V are stored: bf16, or eight bits (format/fp8.h).
struct kv_view {
    unsigned char *k, *v;
    int n_kv_heads, head_dim;
    bool is_fp8;
};

struct batch_view {
    const int32_t *position, *seq, *seq_start, *page_start, *pages;
    int n_tokens, n_seqs;
};

static inline bool is_fp8(const struct kv_layer *kv) {
    return kv->type == DTYPE_FP8;
}

static inline kv_view view(const struct kv_layer *kv) {
    return {(unsigned char *)kv->k, (unsigned char *)kv->v, (int)kv->n_kv_heads, (int)kv->head_dim, is_fp8(kv)};
}

static inline batch_view view(const struct batch *b) {
    return {b->position, b->seq, b->seq_start, b->page_start, b->pages, (int)b->n_tokens, (int)b->n_seqs};
}

static inline const struct batch *host_of(const struct batch *b) {
    return b->host ? b->host : b;
}

// Where a token's k and v belong.
struct kv_place {
    int page, slot;
};

static __device__ __forceinline__ kv_place place_of(const batch_view &b, int token) {
    int position = b.position[token];
    return {b.pages[b.page_start[b.seq[token]] + position / KV_PAGE_TOKENS], position % KV_PAGE_TOKENS};
}

// What a product of q, k and v does with k and v of prompts, heads of HEAD_DIM channels (heads.cuh).
enum { HEAD_DIM = 128 };
struct heads_end {
    kv_view kv;
    batch_view b;
    const float *norm;    // [head_dim] K's, or NULL
    const float *cos_sin; // [n_tokens, head_dim]
    float eps;
    int n_single; // the first tokens, whose k and v are wanted as floats, too
};

// A head's page of K or V in bf16: [head_dim / 32][slots][32 channels], and of a slot's four 16-byte words there word w
// stands in place w ^ slot / 2 % 4: a slot's channels are whole sectors, eight slots' words of the same channels lie in
// different banks of shared memory, and that is how wgmma's 64-byte swizzle has them.
//
// In eight bits a K page is a matrix [slots, channels], a V page one [channels, slots], both in units (matrix.cuh). Two
// elements, eight channels apart, share 16 bits, the first one's in bits 15 and 10 to 4, as they stand in a bf16, the
// second one's sign in 11, the higher bits of its exponent in 14 to 12 and the rest in 3 to 0. So a lane's 8 bytes of
// 32 columns of K are four pairs; of V, a lane's 16 bytes are four pairs of slots of two units. The blocks' scales
// follow: of K [slots][head_dim / 32], of V [head_dim / 32][4 lanes][8 slots].
template <int DIM> struct bf16_kv {
    static constexpr int HD = DIM, BYTES = KV_PAGE_TOKENS * DIM * 2; // of a head's page
    static constexpr bool IS_FP8 = false;
};

template <int DIM> struct fp8_kv {
    static constexpr int HD = DIM, BYTES = KV_PAGE_TOKENS * DIM + DIM;
    static constexpr bool IS_FP8 = true;
};

static __device__ __forceinline__ size_t head_page_bytes(const kv_view &kv) {
    return (size_t)kv.head_dim * (kv.is_fp8 ? KV_PAGE_TOKENS + 1 : 2 * KV_PAGE_TOKENS);
}

static __device__ __forceinline__ unsigned char *head_page(const kv_view &kv, bool of_v, int page, int kv_head) {
    return (of_v ? kv.v : kv.k) + ((size_t)page * kv.n_kv_heads + kv_head) * head_page_bytes(kv);
}

// In bf16, K and V alike: where the word is that channels c - c % 8 and the next seven of a slot are, and element c.
static __device__ __forceinline__ int kv_word(int slot, int c) {
    return (c / 32 * KV_PAGE_TOKENS + slot) * 4 + ((c % 32 / 8) ^ (slot / 2 % 4));
}

static __device__ __forceinline__ int kv_index(int slot, int c) {
    return kv_word(slot, c) * 8 + c % 8;
}

// Stores channels c to c + 7 of a slot in bf16; c is a multiple of 8.
static __device__ __forceinline__ void kv_put_word(const kv_view &kv, bool of_v, const kv_place &at, int kv_head, int c,
                                                   float4 x, float4 y) {
    reinterpret_cast<uint4 *>(head_page(kv, of_v, at.page, kv_head))[kv_word(at.slot, c)] =
        make_uint4(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w), pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
}

// Stores channel c of a slot, and returns what it will be read as. By a whole warp: lane l has a channel c with
// c % 32 = l, all of one block.
static __device__ __forceinline__ __nv_bfloat16 kv_put(const kv_view &kv, bool of_v, int page, int kv_head, int slot,
                                                       int c, float x) {
    unsigned char *to = head_page(kv, of_v, page, kv_head);
    if (!kv.is_fp8) {
        __nv_bfloat16 rounded = __float2bfloat16_rn(x);
        reinterpret_cast<__nv_bfloat16 *>(to)[kv_index(slot, c)] = rounded;
        return rounded;
    }
    uint32_t most = __float_as_uint(x) & 0x7FFFFFFFu;
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        uint32_t other = __shfl_xor_sync(~0u, most, o);
        most = other > most ? other : most;
    }
    uint32_t s = fp8_scale(most), b = 0;
    float y = x * __uint_as_float(fp8_inverse_bits(s));
    // 2^23 is added and taken away again: rounds to an integer.
    float steps = fabsf(y) * 512.0f + 8388608.0f;
    if (s != FP8_NAN) b = fp8_round(__float_as_uint(y), __float_as_uint(steps) & 0x7FFFFFu);
    uint32_t second = __shfl_xor_sync(~0u, b, 8);
    if ((c & 8) == 0) {
        int at = of_v ? (c / 16 * CHUNK_LANES + c % 8 * 4 + slot % 8 / 2) * 8 + slot / 8 * 2 + slot % 2
                      : ((slot / 8 * (kv.head_dim / 32) + c / 32) * CHUNK_LANES + slot % 8 * 4 + c % 8 / 2) * 4 +
                            c % 32 / 16 * 2 + c % 2;
        reinterpret_cast<uint16_t *>(to)[at] = (uint16_t)((b & 0x80u) << 8 | (b & 0x7Fu) << 4 | (second & 0x80u) << 4 |
                                                          (second & 0x70u) << 8 | (second & 0xFu));
    }
    int blocks = kv.head_dim / FP8_BLOCK;
    if (c % FP8_BLOCK == 0)
        to[KV_PAGE_TOKENS * kv.head_dim +
           (of_v ? c / FP8_BLOCK * KV_PAGE_TOKENS + slot % 8 / 2 * 8 + slot / 8 * 2 + slot % 2
                 : slot * blocks + c / FP8_BLOCK)] = (unsigned char)s;
    return __float2bfloat16_rn(__uint_as_float((b & 0x80u) << 24 | (b & 0x7Fu) << 20) * __uint_as_float(s << 23));
}

// ---- A lane's share of 32 columns, as bf16 pairs, of a page in shared memory: of K's slots 8 j + g (columns: channels
// 32 i + ...), or of V's channels 8 i + g (columns: slots). By whole warps.
// ----------------------------------------------------------------------------------------------------------------

template <typename KV> struct page_reader;

template <int DIM> struct page_reader<bf16_kv<DIM>> {
    static __device__ __forceinline__ uint4 k(const unsigned char *page, int j, int i, int lane) {
        int row = lane % 8, word = lane / 8;
        return load_matrices<false>(page + (i * KV_PAGE_TOKENS + j * 8) * 64 + row * 64 + (word ^ row / 2) * 16);
    }
    static __device__ __forceinline__ uint4 v(const unsigned char *page, int i, int lane) {
        uintptr_t first = (uintptr_t)(page + lane * 64 + lane / 2 % 4 * 16); // the page is aligned to 64 bytes
        return load_matrices<true>((const unsigned char *)(first ^ (uintptr_t)(i % 4 * 16)) +
                                   i / 4 * KV_PAGE_TOKENS * 64);
    }
    // Of units 2 i and 2 i + 1.
    static __device__ __forceinline__ void two(uint4 &a, uint4 &b, const unsigned char *page, int i, int lane) {
        a = v(page, 2 * i, lane);
        b = v(page, 2 * i + 1, lane);
    }
};

template <int DIM> struct page_reader<fp8_kv<DIM>> {
    static __device__ __forceinline__ uint32_t first(uint32_t w, uint32_t scales) {
        return mul_bf16_pairs(w & 0x87F087F0u, scales);
    }
    static __device__ __forceinline__ uint32_t second(uint32_t w, uint32_t scales) {
        return mul_bf16_pairs((w << 4 & 0x80F080F0u) | (w >> 4 & 0x07000700u), scales);
    }
    static __device__ __forceinline__ uint4 k(const unsigned char *page, int j, int i, int lane) {
        uint2 w = reinterpret_cast<const uint2 *>(page)[(j * (DIM / 32) + i) * CHUNK_LANES + lane];
        uint32_t s = page[KV_PAGE_TOKENS * DIM + (8 * j + lane / 4) * (DIM / 32) + i] * 0x00800080u;
        return make_uint4(first(w.x, s), second(w.x, s), first(w.y, s), second(w.y, s));
    }
    // The scales of slots 8 e + 2 t and the next one, e from 0 to 3, of the 32 channels that channel 16 i is one of.
    static __device__ __forceinline__ uint4 scales(const unsigned char *page, int i, int lane) {
        uint2 s = reinterpret_cast<const uint2 *>(page + KV_PAGE_TOKENS * DIM)[i / 2 * 4 + lane % 4];
        return make_uint4(__byte_perm(s.x, 0, 0x4140) << 7, __byte_perm(s.x, 0, 0x4342) << 7,
                          __byte_perm(s.y, 0, 0x4140) << 7, __byte_perm(s.y, 0, 0x4342) << 7);
    }
    static __device__ __forceinline__ void two(uint4 &a, uint4 &b, const unsigned char *page, int i, int lane) {
        uint4 w = reinterpret_cast<const uint4 *>(page)[i * CHUNK_LANES + lane], s = scales(page, i, lane);
        a = make_uint4(first(w.x, s.x), first(w.y, s.y), first(w.z, s.z), first(w.w, s.w));
        b = make_uint4(second(w.x, s.x), second(w.y, s.y), second(w.z, s.z), second(w.w, s.w));
    }
    static __device__ __forceinline__ uint4 v(const unsigned char *page, int i, int lane) {
        uint4 a, b;
        two(a, b, page, i / 2, lane);
        return i % 2 ? b : a;
    }
};

// ---- Norm and rotation of a head ----------------------------------------------------------------------------------

// A lane owns the pairs (c, c + head_dim / 2) for c = lane, lane + 32, ...; it adds its squares in that order, then
// comes the tree of warp_sum.
static __device__ __forceinline__ void head_norm(float *x, const float *w, float eps, int dim, int lane) {
    int half = dim / 2;
    float s = 0;
    for (int c = lane; c < half; c += 32) {
        s = fmaf(x[c], x[c], s);
        s = fmaf(x[c + half], x[c + half], s);
    }
    float r = 1.0f / sqrtf(warp_sum(s) / (float)dim + eps);
    for (int c = lane; c < half; c += 32) {
        x[c] = x[c] * r * w[c];
        x[c + half] = x[c + half] * r * w[c + half];
    }
}

static __device__ __forceinline__ void head_rope(float *x, const float *cos_sin, int dim, int lane) {
    int half = dim / 2;
    for (int c = lane; c < half; c += 32) {
        float lo = x[c], hi = x[c + half], cosine = cos_sin[c], sine = cos_sin[c + half];
        x[c] = fmaf(lo, cosine, -(hi * sine));
        x[c + half] = fmaf(hi, cosine, lo * sine);
    }
}

// The same with a head's channels in registers: pair i is (lane + 32 i, lane + 32 i + DIM / 2), beyond the head zeros.
template <int DIM> struct head_registers {
    static constexpr int PAIRS = (DIM / 2 + 31) / 32;
    float lo[PAIRS], hi[PAIRS];
};

// NULL: zeros.
template <int DIM> static __device__ __forceinline__ head_registers<DIM> read_head(const float *x, int lane) {
    constexpr int HALF = DIM / 2;
    head_registers<DIM> h;
#pragma unroll
    for (int i = 0; i < head_registers<DIM>::PAIRS; i++) {
        int c = lane + 32 * i;
        bool real = x && c < HALF;
        h.lo[i] = real ? x[c] : 0.0f;
        h.hi[i] = real ? x[c + HALF] : 0.0f;
    }
    return h;
}

template <int DIM>
static __device__ __forceinline__ void normalise_head(head_registers<DIM> &h, const head_registers<DIM> &w, float eps) {
    float s = 0;
#pragma unroll
    for (int i = 0; i < head_registers<DIM>::PAIRS; i++) {
        s = fmaf(h.lo[i], h.lo[i], s);
        s = fmaf(h.hi[i], h.hi[i], s);
    }
    float r = 1.0f / sqrtf(warp_sum(s) / (float)DIM + eps);
#pragma unroll
    for (int i = 0; i < head_registers<DIM>::PAIRS; i++) {
        h.lo[i] = h.lo[i] * r * w.lo[i];
        h.hi[i] = h.hi[i] * r * w.hi[i];
    }
}

template <int DIM>
static __device__ __forceinline__ void rotate_head(head_registers<DIM> &h, const head_registers<DIM> &cos_sin) {
#pragma unroll
    for (int i = 0; i < head_registers<DIM>::PAIRS; i++) {
        float lo = h.lo[i], hi = h.hi[i];
        h.lo[i] = fmaf(lo, cos_sin.lo[i], -(hi * cos_sin.hi[i]));
        h.hi[i] = fmaf(hi, cos_sin.lo[i], lo * cos_sin.hi[i]);
    }
}

// All that is read is asked for at once. `w` NULL: no norm; `cos_sin` NULL: no rotation.
template <int DIM>
static __device__ __forceinline__ head_registers<DIM> load_head(const float *x, const float *w, const float *cos_sin,
                                                                float eps, int lane) {
    head_registers<DIM> h = read_head<DIM>(x, lane), norm = read_head<DIM>(w, lane),
                        turn = read_head<DIM>(cos_sin, lane);
    if (w) normalise_head<DIM>(h, norm, eps);
    if (cos_sin) rotate_head<DIM>(h, turn);
    return h;
}

#endif
