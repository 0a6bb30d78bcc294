// keys.cuh: a head of K in the registers of four lanes: its norm, its rotation, and its place in a page of bf16. Lane
// 4 g + t has channels 32 i + 8 t and the next seven of token g: whole words of a page, and both channels of every pair
// that turns. Formulas: ops.h; order of a norm's sum: kv.cuh.
#ifndef TANDEM_OPS_CUDA_KEYS_CUH
#define TANDEM_OPS_CUDA_KEYS_CUH

#include "ops/cuda/kv.cuh"

template <int DIM> struct key {
    float x[DIM / 32][8];

    // Each 32 channels' from there on.
    __device__ __forceinline__ void load(const float *from) {
        load(from, from + 4);
    }
    // The same, the last four of each eight apart.
    __device__ __forceinline__ void load(const float *low, const float *high) {
#pragma unroll
        for (int i = 0; i < DIM / 32; i++) {
            float4 a = *reinterpret_cast<const float4 *>(low + 32 * i);
            float4 b = *reinterpret_cast<const float4 *>(high + 32 * i);
            float(&to)[8] = x[i];
            to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
        }
    }
};

// What this lane has of `kept` plus what the lane across o has of it: that lane keeps `given` in its place.
static __device__ __forceinline__ float add_across(float kept, float given, int o) {
    return kept + __shfl_xor_sync(~0u, given, o);
}

// As normalise_head, whose lane l adds channels l, l + DIM / 2, l + 32, ...: here lane t of four has those sums 8 t to
// 8 t + 7. Of its tree's steps those over 16 and 8 are over 2 lanes and 1 here, where each keeps half of what it has,
// and so are those over 4 and 2; that over 1 is over 2 again. `weights`: the lane's first.
template <int DIM> static __device__ __forceinline__ void normalise_key(key<DIM> &h, const float *weights, float eps) {
    constexpr int HALF = DIM / 64;
    bool second = threadIdx.x & 2, odd = threadIdx.x & 1;
    float s[8] = {};
#pragma unroll
    for (int i = 0; i < HALF; i++)
#pragma unroll
        for (int e = 0; e < 8; e++) s[e] = fmaf(h.x[i + HALF][e], h.x[i + HALF][e], fmaf(h.x[i][e], h.x[i][e], s[e]));
#pragma unroll
    for (int e = 0; e < 4; e++) s[e] = add_across(second ? s[e + 4] : s[e], second ? s[e] : s[e + 4], 2);
#pragma unroll
    for (int e = 0; e < 2; e++) s[e] = add_across(odd ? s[e + 2] : s[e], odd ? s[e] : s[e + 2], 1);
    float sum = add_across(second ? s[1] : s[0], second ? s[0] : s[1], 2); // sums 0 or 1, and 4 more
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float r = 1.0f / sqrtf(sum / (float)DIM + eps);
    key<DIM> w;
    w.load(weights);
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
#pragma unroll
        for (int e = 0; e < 8; e++) h.x[i][e] = h.x[i][e] * r * w.x[i][e];
}

// As rotate_head, and rounded.
template <int DIM>
static __device__ __forceinline__ void turn_key(uint32_t (&out)[DIM / 8], const key<DIM> &h, const key<DIM> &turn) {
    constexpr int HALF = DIM / 64;
#pragma unroll
    for (int i = 0; i < HALF; i++)
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
            float low[2], high[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float lo = h.x[i][e + k], hi = h.x[i + HALF][e + k];
                float cosine = turn.x[i][e + k], sine = turn.x[i + HALF][e + k];
                low[k] = fmaf(lo, cosine, -(hi * sine));
                high[k] = fmaf(hi, cosine, lo * sine);
            }
            out[4 * i + e / 2] = pack_bf16(low[0], low[1]);
            out[4 * (i + HALF) + e / 2] = pack_bf16(high[0], high[1]);
        }
}

// The lane's words.
template <int DIM>
static __device__ __forceinline__ void store_key(const kv_view &kv, const kv_place &at, int head,
                                                 const uint32_t (&out)[DIM / 8], int t) {
    uint4 *to = reinterpret_cast<uint4 *>(head_page(kv, false, at.page, head)) + kv_word(at.slot, 8 * t);
#pragma unroll
    for (int i = 0; i < DIM / 32; i++)
        to[kv_word(0, 32 * i)] = make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
}

#endif
