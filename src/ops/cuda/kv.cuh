// kv.cuh: what kernels see of a batch and of a layer's K and V, where the elements of a page stand, and the per-head
// norm and rotation.
#ifndef TANDEM_OPS_CUDA_KV_CUH
#define TANDEM_OPS_CUDA_KV_CUH

#include "ops/cuda/common.cuh"
#include "ops/cuda/matrix.cuh"

struct kv_view {
    __nv_bfloat16 *k, *v;
    int n_kv_heads, head_dim;
};

struct batch_view {
    const int32_t *position, *seq, *seq_start, *page_start, *pages;
    int n_tokens, n_seqs;
};

static inline kv_view view(const struct kv_layer *kv) {
    return {(__nv_bfloat16 *)kv->k, (__nv_bfloat16 *)kv->v, (int)kv->n_kv_heads, (int)kv->head_dim};
}

static inline batch_view view(const struct batch *b) {
    return {b->position, b->seq, b->seq_start, b->page_start, b->pages, (int)b->n_tokens, (int)b->n_seqs};
}

// A head's K page is a matrix [slots, channels], its V page one [channels, slots], both in units (matrix.cuh).
static __device__ __forceinline__ size_t head_page(const kv_view &kv, int page, int kv_head) {
    return ((size_t)page * kv.n_kv_heads + kv_head) * KV_PAGE_TOKENS * kv.head_dim;
}

static __device__ __forceinline__ size_t k_index(const kv_view &kv, int page, int kv_head, int slot, int c) {
    return head_page(kv, page, kv_head) + unit_index((size_t)slot, (size_t)c, (size_t)kv.head_dim);
}

static __device__ __forceinline__ size_t v_index(const kv_view &kv, int page, int kv_head, int slot, int c) {
    return head_page(kv, page, kv_head) + unit_index((size_t)c, (size_t)slot, KV_PAGE_TOKENS);
}

static __device__ __forceinline__ void kv_put(const kv_view &kv, int page, int kv_head, int slot, int c, float k,
                                              float v) {
    kv.k[k_index(kv, page, kv_head, slot, c)] = __float2bfloat16_rn(k);
    kv.v[v_index(kv, page, kv_head, slot, c)] = __float2bfloat16_rn(v);
}

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
