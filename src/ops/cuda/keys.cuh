// keys.cuh: a head of K in the registers of four lanes: its norm, its rotation, and its place in a page of bf16. Lane
// 4 g + t has channels 8 e + 2 t and 8 e + 2 t + 1 of token g: what it writes of a page, and both channels of every
// pair that turns. Formulas: ops.h; order of a norm's sum: kv.cuh.
#ifndef TANDEM_OPS_CUDA_KEYS_CUH
#define TANDEM_OPS_CUDA_KEYS_CUH

#include "ops/cuda/kv.cuh"

template <int DIM> struct key {
    float2 x[DIM / 8];

    __device__ __forceinline__ void load(const float *from) {
#pragma unroll
        for (int e = 0; e < DIM / 8; e++) x[e] = *reinterpret_cast<const float2 *>(from + 8 * e);
    }
};

// As normalise_head, whose lane l adds channels l, l + DIM / 2, l + 32, ...; of its tree's steps those over 16, 8 and 1
// lanes are within a lane here.
template <int DIM> static __device__ __forceinline__ void normalise_key(key<DIM> &h, const float *weights, float eps) {
    constexpr int HALF = DIM / 16;
    float2 s[4] = {};
#pragma unroll
    for (int e = 0; e < HALF; e++) {
        float2 &sum = s[e % 4], lo = h.x[e], hi = h.x[e + HALF];
        sum.x = fmaf(hi.x, hi.x, fmaf(lo.x, lo.x, sum.x));
        sum.y = fmaf(hi.y, hi.y, fmaf(lo.y, lo.y, sum.y));
    }
    float x = (s[0].x + s[2].x) + (s[1].x + s[3].x), y = (s[0].y + s[2].y) + (s[1].y + s[3].y);
#pragma unroll
    for (int o = 2; o; o >>= 1) {
        x += __shfl_xor_sync(~0u, x, o);
        y += __shfl_xor_sync(~0u, y, o);
    }
    float r = 1.0f / sqrtf((x + y) / (float)DIM + eps);
#pragma unroll
    for (int e = 0; e < DIM / 8; e++) {
        float2 w = *reinterpret_cast<const float2 *>(weights + 8 * e);
        h.x[e] = make_float2(h.x[e].x * r * w.x, h.x[e].y * r * w.y);
    }
}

// As rotate_head, and rounded.
template <int DIM>
static __device__ __forceinline__ void turn_key(uint32_t (&out)[DIM / 8], const key<DIM> &h, const key<DIM> &turn) {
    constexpr int HALF = DIM / 16;
#pragma unroll
    for (int e = 0; e < HALF; e++) {
        float2 lo = h.x[e], hi = h.x[e + HALF], cosine = turn.x[e], sine = turn.x[e + HALF];
        out[e] = pack_bf16(fmaf(lo.x, cosine.x, -(hi.x * sine.x)), fmaf(lo.y, cosine.y, -(hi.y * sine.y)));
        out[e + HALF] = pack_bf16(fmaf(hi.x, cosine.x, lo.x * sine.x), fmaf(hi.y, cosine.y, lo.y * sine.y));
    }
}

// `to`'s 16 bytes of every 32 channels.
template <int DIM>
static __device__ __forceinline__ void store_key(const kv_view &kv, const kv_place &at, int head,
                                                 const uint32_t (&out)[DIM / 8], int t) {
    uint4 *to = reinterpret_cast<uint4 *>(head_page(kv, false, at.page, head)) +
                at.slot / 8 * (DIM / 32) * CHUNK_LANES + at.slot % 8 * 4 + t;
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
        to[i * CHUNK_LANES] = make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
}

#endif
