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
                                                     const unsigned char *page, int lane,
                                                     const fresh_row<KV::HD> *fresh, int slot) {
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
        for (int e = 0; e < 4; e++) s[2 * m + e / 2][e % 2] = d[m][e];
}

// Lifts the scores of the lane's two rows up to slot n - 1; those beyond become -inf, whose p is 0. `m`: the least
// units for the rows, from all lanes that have them.
static __device__ __forceinline__ void column_lift(float (&s)[4][2], float (&m)[2], int n, int lane) {
    int g = lane / 4;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        m[e] = NO_UNIT;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            s[j][e] = 8 * j + g < n ? s[j][e] + LIFT : MINUS_INFINITY;
            m[e] = fmaxf(m[e], s[j][e]);
        }
        m[e] = fmaxf(m[e], __shfl_xor_sync(~0u, m[e], 4));
        m[e] = fmaxf(m[e], __shfl_xor_sync(~0u, m[e], 8));
        m[e] = ceilf(fmaxf(m[e], __shfl_xor_sync(~0u, m[e], 16)));
    }
}

// A lane's two rows of a chunk so far. of[i][0], of[i][1] are channel 16 i + g of theirs, of[i][2], of[i][3] channel
// 16 i + 8 + g; l[0] and l[1] their sums.
template <int HD> struct column_chain {
    float unit[2], l[4], of[HD / 16][4];

    __device__ __forceinline__ void start() {
        unit[0] = unit[1] = NO_UNIT;
#pragma unroll
        for (int e = 0; e < 4; e++) l[e] = 0;
#pragma unroll
        for (int i = 0; i < HD / 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) of[i][e] = 0;
    }

    // Raises the units to `to` where that is higher; by the whole warp.
    __device__ __forceinline__ void raise(const float (&to)[2]) {
        if (__all_sync(~0u, to[0] <= unit[0] && to[1] <= unit[1])) return;
        float a[2] = {raise_unit(unit[0], to[0]), raise_unit(unit[1], to[1])};
#pragma unroll
        for (int e = 0; e < 4; e++) l[e] *= a[e % 2];
#pragma unroll
        for (int i = 0; i < HD / 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) of[i][e] *= a[e % 2];
    }

    // Lifted scores become p, column g's pairs of slots 8 j + 2t, 8 j + 2t + 1, whose sums join the chunk's.
    __device__ __forceinline__ void weigh(uint32_t (&p)[4], const float (&s)[4][2]) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            p[j] = transpose(pack_bf16(exp2_fast(s[j][0] - unit[0]), exp2_fast(s[j][1] - unit[1])));
        mma(l, ONES, ONES, ONES, ONES, p[0], p[1]);
        mma(l, ONES, ONES, ONES, ONES, p[2], p[3]);
    }

    // A page's values join the chunk's. SPECIAL: some slots are not in use, or one is this step's: a loop of its own,
    // since a branch within would keep the chip from overlapping the rounds.
    template <typename KV, bool SPECIAL>
    __device__ __forceinline__ void add(const unsigned char *page, const uint32_t (&p)[4], const v_slots &slots,
                                        const fresh_row<HD> *fresh, int lane) {
        int g = lane / 4;
#pragma unroll
        for (int i = 0; i < HD / 16; i++) {
            uint4 u, v;
            page_reader<KV>::two(u, v, page, i, lane);
            if (SPECIAL) {
                u = real_slots(u, slots, fresh->v[16 * i + g]);
                v = real_slots(v, slots, fresh->v[16 * i + 8 + g]);
            }
            mma(of[i], u.x, v.x, u.y, v.y, p[0], p[1]);
            mma(of[i], u.z, v.z, u.w, v.w, p[2], p[3]);
        }
    }
};

#endif
