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

// A head's K page is a matrix [slots, channels], its V page one [channels, slots], both in units (matrix.cuh); in eight
// bits a lane's eight elements of 32 columns are in the order 2, 0, 3, 1, 6, 4, 7, 5, in which pairs come apart by two
// masks, and the blocks' scales follow: of K [slots][head_dim / 32], of V [head_dim / 32][slots].
template <int DIM> struct bf16_kv {
    static constexpr int HD = DIM, BYTES = KV_PAGE_TOKENS * DIM * 2; // of a head's page
};

template <int DIM> struct fp8_kv { static constexpr int HD = DIM, BYTES = KV_PAGE_TOKENS * DIM + DIM; };

static __device__ __forceinline__ size_t head_page_bytes(const kv_view &kv) {
    return (size_t)kv.head_dim * (kv.is_fp8 ? KV_PAGE_TOKENS + 1 : 2 * KV_PAGE_TOKENS);
}

static __device__ __forceinline__ unsigned char *head_page(const kv_view &kv, bool of_v, int page, int kv_head) {
    return (of_v ? kv.v : kv.k) + ((size_t)page * kv.n_kv_heads + kv_head) * head_page_bytes(kv);
}

static __device__ __forceinline__ size_t kv_index(bool of_v, int slot, int c, int dim) {
    return of_v ? unit_index((size_t)c, (size_t)slot, KV_PAGE_TOKENS)
                : unit_index((size_t)slot, (size_t)c, (size_t)dim);
}

// Stores channel c of a slot, and returns what it will be read as. By a whole warp: lane l has a channel c with
// c % 32 = l, all of one block.
static __device__ __forceinline__ __nv_bfloat16 kv_put(const kv_view &kv, bool of_v, int page, int kv_head, int slot,
                                                       int c, float x) {
    unsigned char *to = head_page(kv, of_v, page, kv_head);
    size_t at = kv_index(of_v, slot, c, kv.head_dim);
    if (!kv.is_fp8) {
        __nv_bfloat16 rounded = __float2bfloat16_rn(x);
        reinterpret_cast<__nv_bfloat16 *>(to)[at] = rounded;
        return rounded;
    }
    uint32_t most = __float_as_uint(x) & 0x7FFFFFFFu;
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        uint32_t other = __shfl_xor_sync(~0u, most, o);
        most = other > most ? other : most;
    }
    uint32_t s = fp8_scale(most), b = 0, e = at % 8;
    float y = x * __uint_as_float(fp8_inverse_bits(s));
    // 2^23 is added and taken away again: rounds to an integer.
    float steps = fabsf(y) * 512.0f + 8388608.0f;
    if (s != FP8_NAN) b = fp8_round(__float_as_uint(y), __float_as_uint(steps) & 0x7FFFFFu);
    to[at - e + (e & 4) + (e & 1) * 2 + (e & 2 ? 0 : 1)] = (unsigned char)b;
    int blocks = kv.head_dim / FP8_BLOCK;
    if (c % FP8_BLOCK == 0)
        to[KV_PAGE_TOKENS * kv.head_dim +
           (of_v ? c / FP8_BLOCK * KV_PAGE_TOKENS + slot : slot * blocks + c / FP8_BLOCK)] = (unsigned char)s;
    return __float2bfloat16_rn(__uint_as_float((b & 0x80u) << 24 | (b & 0x7Fu) << 20) * __uint_as_float(s << 23));
}

// ---- A lane's share of 32 columns, as bf16 pairs: of K's slots 8 j + g (columns: channels 32 i + ...), or of V's
// channels 8 i + g (columns: slots)
// ----------------------------------------------------------------------------------------------------------------

template <typename KV> struct page_reader;

template <int DIM> struct page_reader<bf16_kv<DIM>> {
    static __device__ __forceinline__ uint4 k(const unsigned char *page, int j, int i, int lane) {
        return reinterpret_cast<const uint4 *>(page)[(j * (DIM / 32) + i) * CHUNK_LANES + lane];
    }
    static __device__ __forceinline__ uint4 v(const unsigned char *page, int i, int lane) {
        return reinterpret_cast<const uint4 *>(page)[i * CHUNK_LANES + lane];
    }
};

template <int DIM> struct page_reader<fp8_kv<DIM>> {
    // The pair in bits 8 to 15 and 24 to 31.
    static __device__ __forceinline__ uint32_t pair(uint32_t w, uint32_t scales) {
        return mul_bf16_pairs((w & 0x80008000u) | (w >> 4 & 0x07F007F0u), scales);
    }
    static __device__ __forceinline__ uint4 k(const unsigned char *page, int j, int i, int lane) {
        uint2 w = reinterpret_cast<const uint2 *>(page)[(j * (DIM / 32) + i) * CHUNK_LANES + lane];
        uint32_t s = page[KV_PAGE_TOKENS * DIM + (8 * j + lane / 4) * (DIM / 32) + i];
        s = s << 7 | s << 23;
        return make_uint4(pair(w.x, s), pair(w.x << 8, s), pair(w.y, s), pair(w.y << 8, s));
    }
    static __device__ __forceinline__ uint32_t two_scales(const unsigned char *scales) {
        uint32_t s = *reinterpret_cast<const uint16_t *>(scales);
        return (s & 0xFFu) << 7 | (s & 0xFF00u) << 15;
    }
    static __device__ __forceinline__ uint4 v(const unsigned char *page, int i, int lane) {
        uint2 w = reinterpret_cast<const uint2 *>(page)[i * CHUNK_LANES + lane];
        const unsigned char *s = page + KV_PAGE_TOKENS * DIM + i / 4 * KV_PAGE_TOKENS + 2 * (lane % 4);
        return make_uint4(pair(w.x, two_scales(s)), pair(w.x << 8, two_scales(s + 8)), pair(w.y, two_scales(s + 16)),
                          pair(w.y << 8, two_scales(s + 24)));
    }
};

// ---- Norm and rotation of a head
// ----------------------------------------------------------------------------------------------------------------

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

// The same with a head's channels in registers: pair i is (lane + 32 i, lane + 32 i + DIM / 2). All that is read is
// asked for at once. `w` NULL: no norm; `cos_sin` NULL: no rotation.
template <int DIM> struct head_registers {
    static constexpr int PAIRS = (DIM / 2 + 31) / 32;
    float lo[PAIRS], hi[PAIRS];
};

template <int DIM>
static __device__ __forceinline__ head_registers<DIM> load_head(const float *x, const float *w, const float *cos_sin,
                                                                float eps, int lane) {
    constexpr int PAIRS = head_registers<DIM>::PAIRS, HALF = DIM / 2;
    head_registers<DIM> h;
    float wl[PAIRS], wh[PAIRS], cosine[PAIRS], sine[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        int c = lane + 32 * i;
        bool real = c < HALF;
        h.lo[i] = real ? x[c] : 0.0f;
        h.hi[i] = real ? x[c + HALF] : 0.0f;
        wl[i] = real && w ? w[c] : 0.0f;
        wh[i] = real && w ? w[c + HALF] : 0.0f;
        cosine[i] = real && cos_sin ? cos_sin[c] : 0.0f;
        sine[i] = real && cos_sin ? cos_sin[c + HALF] : 0.0f;
    }
    if (w) {
        float s = 0;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            s = fmaf(h.lo[i], h.lo[i], s);
            s = fmaf(h.hi[i], h.hi[i], s);
        }
        float r = 1.0f / sqrtf(warp_sum(s) / (float)DIM + eps);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            h.lo[i] = h.lo[i] * r * wl[i];
            h.hi[i] = h.hi[i] * r * wh[i];
        }
    }
    if (cos_sin) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            float lo = h.lo[i], hi = h.hi[i];
            h.lo[i] = fmaf(lo, cosine[i], -(hi * sine[i]));
            h.hi[i] = fmaf(hi, cosine[i], lo * sine[i]);
        }
    }
    return h;
}

#endif
