// columns.cuh: one page for a few rows (up to 8: one token's query heads of a KV head), whose K and V are the sixteen
// rows of the matrix instruction and whose q and p its eight columns: half the instructions of attention.cuh's
// functions, and q stays in registers. The bits are the same: an instruction's sums do not depend on whose rows they
// are (docs/NUMERICS.md).
#ifndef TANDEM_OPS_CUDA_COLUMNS_CUH
#define TANDEM_OPS_CUDA_COLUMNS_CUH

#include "ops/cuda/attention.cuh"

// q as a lane holds it: column g (a row of q, zero from R on), of each 32 channels the lane's four pairs. A lane's own
// two rows of scores and results are 2 t and the next one.
template <int HD, int R> struct columns {
    uint32_t of[HD / 32][4];

    __device__ __forceinline__ void load(const q_rows<HD, R> *q, int lane) {
        int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < HD / 32; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                of[i][e] = 0;
                if (g < R) of[i][e] = *reinterpret_cast<const uint32_t *>(&q->of[g][i * 32 + e * 8 + 2 * t]);
            }
    }
};

// Scores of the lane's rows at slots 8 j + g. `fresh`: the k of slot `slot`, if that is not negative.
template <typename KV, int R>
static __device__ __forceinline__ void column_scores(float (&s)[4][2], const columns<KV::HD, R> &q,
                                                     const unsigned char *page, int lane, const fresh_row<KV::HD> *fresh,
                                                     int slot) {
    constexpr int HD = KV::HD;
    int g = lane / 4, t = lane % 4;
    float d[2][4] = {};
#pragma unroll
    for (int i = 0; i < HD / 32; i++) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            uint4 u = page_reader<KV>::k(page, 2 * m, i, lane), v = page_reader<KV>::k(page, 2 * m + 1, i, lane);
            if (16 * m + g == slot) u = fresh->k[i][t];
            if (16 * m + 8 + g == slot) v = fresh->k[i][t];
            mma(d[m], u.x, v.x, u.y, v.y, q.of[i][0], q.of[i][1]);
            mma(d[m], u.z, v.z, u.w, v.w, q.of[i][2], q.of[i][3]);
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[2 * m + e / 2][e % 2] = d[m][e];
}

// softmax_row of the lane's two rows; p: column g's pairs of slots 8 j + 2t, 8 j + 2t + 1.
static __device__ __forceinline__ void column_softmax(uint32_t (&p)[4], float (&m)[2], float (&l)[2],
                                                      const float (&s)[4][2], int n, int lane) {
    int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        m[e] = MINUS_INFINITY;
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (8 * j + g < n) m[e] = fmaxf(m[e], s[j][e]);
        m[e] = fmaxf(m[e], __shfl_xor_sync(~0u, m[e], 4));
        m[e] = fmaxf(m[e], __shfl_xor_sync(~0u, m[e], 8));
        m[e] = ceilf(fmaxf(m[e], __shfl_xor_sync(~0u, m[e], 16)));
    }
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        bool real = 8 * j + g < n;
        float e0 = real ? exp2_fast(s[j][0] - m[0]) : 0.0f, e1 = real ? exp2_fast(s[j][1] - m[1]) : 0.0f;
        p[j] = transpose(pack_bf16(e0, e1));
        sum += bf16_low(p[j]);
        sum += bf16_high(p[j]);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
#pragma unroll
    for (int e = 0; e < 2; e++) l[e] = __shfl_sync(~0u, sum, (2 * t + e) * 4);
}

// page_values: d[0], d[1] are channel 16 i + g of the lane's rows, d[2], d[3] channel 16 i + 8 + g.
template <typename KV, bool SPECIAL, typename TAKE>
static __device__ __forceinline__ void column_values(const unsigned char *page, const uint32_t (&p)[4],
                                                     const v_slots &slots, const fresh_row<KV::HD> *fresh, int lane,
                                                     const TAKE &take) {
    int g = lane / 4;
#pragma unroll
    for (int i = 0; i < KV::HD / 16; i++) {
        float d[4] = {0, 0, 0, 0};
        uint4 u, v;
        page_reader<KV>::two(u, v, page, i, lane);
        if (SPECIAL) {
            u = real_slots(u, slots, fresh->v[16 * i + g]);
            v = real_slots(v, slots, fresh->v[16 * i + 8 + g]);
        }
        mma(d, u.x, v.x, u.y, v.y, p[0], p[1]);
        mma(d, u.z, v.z, u.w, v.w, p[2], p[3]);
        take(i, d);
    }
}

#endif
