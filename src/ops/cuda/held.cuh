// held.cuh: products of one token with weights that a warp holds in registers, loaded while it waits for the token: the
// sums of bf16_weights' and quantised_weights' slices, bit for bit. Their inputs are INPUTS times as large.
#ifndef TANDEM_OPS_CUDA_HELD_CUH
#define TANDEM_OPS_CUDA_HELD_CUH

#include "ops/cuda/products.cuh"
#include "ops/cuda/quantised.cuh"

// A slice of one token's inputs, as weights' own slices take it. The matrix instruction multiplies all eight columns
// with it, and the first one's sums are read.
static __device__ __forceinline__ uint4 load_input(const unsigned char *inputs, int c, int lane) {
    return *reinterpret_cast<const uint4 *>(inputs + c * 64 + lane % 4 * 16);
}

// Four units' slices in registers, loaded while there is waiting. Units 2 i and 2 i + 1 are 16 rows, or eight twice.
// A pointer to a unit is one to this lane's share of its first 32 columns, LANE bytes.
template <typename W> struct held_units;

template <> struct held_units<bf16_weights> {
    static constexpr int LANE = 16;
    static constexpr float INPUTS = 1;
    uint4 w[4][4]; // [unit][32 columns]

    __device__ __forceinline__ void load(const unsigned char *const (&u)[4], int c, int) {
#pragma unroll
        for (int i = 0; i < 4; i++) w[i][c] = *reinterpret_cast<const uint4 *>(u[i] + c * CHUNK_LANES * LANE);
    }
    // All that is held, in one word.
    __device__ __forceinline__ uint32_t all_words() const {
        uint32_t all = 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int c = 0; c < 4; c++) all ^= w[i][c].x ^ w[i][c].y ^ w[i][c].z ^ w[i][c].w;
        return all;
    }
    // As bf16_weights' slice.
    __device__ __forceinline__ void multiply(float (&d)[2][4], int c, const uint4 (&x)[2]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint4 &a = w[2 * i][c], &b = w[2 * i + 1][c];
            mma(d[i], a.x, b.x, a.y, b.y, x[i].x, x[i].y);
            mma(d[i], a.z, b.z, a.w, b.w, x[i].z, x[i].w);
        }
    }
};

// As they are stored: unpacked they would take twice the registers.
template <typename Q> struct held_units<quantised_weights<Q>> {
    static_assert((Q::BITS == 8 || Q::BITS == 4) && Q::GROUP == 32 && !Q::HAS_MIN, "one scale for 32 columns");
    static constexpr int WORDS = Q::BITS / 4, LANE = WORDS * 4; // of a lane's 32 columns
    // What inputs are multiplied by. Integers stand as 64ths: where inputs are 64 times as large, scales are taken as
    // they are stored, else 64 times as large. What is faster was measured (docs/SPEED.md).
    static constexpr float INPUTS = Q::BITS == 8 ? 64 : 1;
    uint32_t w[4][4][WORDS];
    typename Q::scales scales[4];

    __device__ __forceinline__ void load(const unsigned char *const (&u)[4], int c, int lane) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned char *at = u[i] + c * CHUNK_LANES * LANE;
            if constexpr (WORDS == 2) {
                uint2 both = *reinterpret_cast<const uint2 *>(at);
                w[i][c][0] = both.x;
                w[i][c][1] = both.y;
            } else {
                w[i][c][0] = *reinterpret_cast<const uint32_t *>(at);
            }
            // The last chunk's scales, and so the next ones', are read when they have been used.
            if (c == 3)
                scales[i] = Q::load(u[i] + (quantised_weights<Q>::INTEGERS + lane / 4 * Q::SCALE_BYTES - lane * LANE));
        }
    }
    // As above.
    __device__ __forceinline__ uint32_t all_words() const {
        uint32_t all = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            all ^= scales[i].raw.x ^ scales[i].raw.y;
#pragma unroll
            for (int c = 0; c < 4; c++)
#pragma unroll
                for (int k = 0; k < WORDS; k++) all ^= w[i][c][k];
        }
        return all;
    }
    // As quantised_weights' fragment.
    static __device__ __forceinline__ void unpack(uint32_t (&f)[4], const uint32_t (&v)[WORDS]) {
        if constexpr (WORDS == 2) {
            f[0] = to_bf16<Q::BIAS>(__byte_perm(v[0], 0, 0x4140));
            f[1] = to_bf16<Q::BIAS>(__byte_perm(v[0], 0, 0x4342));
            f[2] = to_bf16<Q::BIAS>(__byte_perm(v[1], 0, 0x4140));
            f[3] = to_bf16<Q::BIAS>(__byte_perm(v[1], 0, 0x4342));
        } else {
            f[0] = to_bf16<Q::BIAS>(v[0] & 0x000F000Fu);
            f[1] = to_bf16<Q::BIAS, 4>(v[0] & 0x00F000F0u);
            f[2] = to_bf16<Q::BIAS>(v[0] >> 8 & 0x000F000Fu);
            f[3] = to_bf16<Q::BIAS, 4>(v[0] >> 8 & 0x00F000F0u);
        }
    }
    // As quantised_weights' slice.
    __device__ __forceinline__ void multiply(float (&d)[2][4], int c, const uint4 (&x)[2]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t a[4], b[4];
            float sum[4] = {};
            unpack(a, w[2 * i][c]);
            unpack(b, w[2 * i + 1][c]);
            mma(sum, a[0], b[0], a[1], b[1], x[i].x, x[i].y);
            mma(sum, a[2], b[2], a[3], b[3], x[i].z, x[i].w);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const typename Q::scales &its = scales[2 * i + e / 2];
                d[i][e] = fmaf(INPUTS == 1 ? its.scale(c, 0) : its.own(c), sum[e], d[i][e]);
            }
        }
    }
};

template <typename W>
static __device__ __forceinline__ void hold(held_units<W> &h, const unsigned char *const (&u)[4], int lane) {
#pragma unroll
    for (int c = 0; c < 4; c++) h.load(u, c, lane);
}

// d[i] = held units 2 i, 2 i + 1, times x[i], or both times x[0] (SAME); `more`: then the next ones are held. What is
// read is on its way while the matrix instructions run.
template <bool SAME, typename W>
static __device__ __forceinline__ void multiply_held(held_units<W> &h, float (&d)[2][4],
                                                     const unsigned char *const (&x)[2], bool more,
                                                     const unsigned char *const (&next)[4], int lane) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) d[i][e] = 0;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        uint4 inputs[2] = {load_input(x[0], c, lane)};
        inputs[1] = SAME ? inputs[0] : load_input(x[1], c, lane);
        h.multiply(d, c, inputs);
        if (more) h.load(next, c, lane);
    }
}

#endif
