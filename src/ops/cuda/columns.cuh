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

// This step's own k and v of a head, which their page may not have yet: k as fresh_row has it, v in words of eight
// channels, as pages in bf16 have them.
template <int HD> struct fresh_words {
    uint4 k[HD / 32][4], v[HD / 8], zeros;

    __device__ __forceinline__ void put(bool of_v, int c, __nv_bfloat16 value) {
        reinterpret_cast<__nv_bfloat16 *>(of_v ? v : k[0])[of_v ? c : row_index(c)] = value;
    }
    __device__ __forceinline__ uint32_t v_twice(int c) const {
        return reinterpret_cast<const uint16_t *>(v)[c] * 0x10001u;
    }
};

// ---- A page as the instruction's sixteen rows ---------------------------------------------------------------------
// Operands a, of the first of two instructions, and b, of the second, are K's slots 16 m and on with channels 32 i and
// on, or V's channels 16 i and on with all slots. Of V's, those below `n` are in use, and slot `own` (-1: none) is this
// step's, which the page may not have.

// In eight bits a lane makes them of its share of the page, and sees to V's slots in registers where SPECIAL: some are
// not in use, or one is this step's. That is a loop of its own, since a branch within would keep the chip from
// overlapping the rounds.
template <typename KV> struct column_page {
    static constexpr bool MASKS = true;
    const unsigned char *page;
    const fresh_words<KV::HD> *fresh;
    v_slots slots;
    int lane;

    __device__ __forceinline__ void keys(const unsigned char *from, int its_lane) {
        page = from;
        lane = its_lane;
    }
    __device__ __forceinline__ void values(const unsigned char *from, const fresh_words<KV::HD> *f, int n, int own,
                                           int its_lane) {
        page = from;
        fresh = f;
        lane = its_lane;
        slots = slots_in_use(n, own, lane % 4);
    }
    __device__ __forceinline__ void keys_at(uint4 &a, uint4 &b, int m, int i) const {
        uint4 u = page_reader<KV>::k(page, 2 * m, i, lane), v = page_reader<KV>::k(page, 2 * m + 1, i, lane);
        a = make_uint4(u.x, v.x, u.y, v.y);
        b = make_uint4(u.z, v.z, u.w, v.w);
    }
    template <bool SPECIAL> __device__ __forceinline__ void values_at(uint4 &a, uint4 &b, int i) const {
        uint4 u, v;
        page_reader<KV>::two(u, v, page, i, lane);
        if (SPECIAL) {
            u = real_slots(u, slots, fresh->v_twice(16 * i + lane / 4));
            v = real_slots(v, slots, fresh->v_twice(16 * i + 8 + lane / 4));
        }
        a = make_uint4(u.x, v.x, u.y, v.y);
        b = make_uint4(u.z, v.z, u.w, v.w);
    }
};

// In bf16 load_matrices brings them as they are, each lane giving it a word of a slot: its page's, or this step's, or
// zeros where it is not in use.
template <int DIM> struct column_page<bf16_kv<DIM>> {
    static constexpr bool MASKS = false;
    enum { STEP = KV_PAGE_TOKENS * 64 };
    const unsigned char *at[2][2]; // slots from 0 on and from 16 on; the first 16 of 32 channels and the others
    int step[2];                   // from there to the next 32

    // The lane's slots are `slot` and 16 more, and of 16 channels its word is `word`.
    __device__ __forceinline__ void read_from(const unsigned char *page, int slot, int word) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            step[s] = STEP;
#pragma unroll
            for (int c = 0; c < 2; c++) at[s][c] = page + (slot + 16 * s) * 64 + ((word + 2 * c) ^ (slot / 2 % 4)) * 16;
        }
    }
    __device__ __forceinline__ void instead(int s, const uint4 *word, int bytes) {
        at[s][0] = reinterpret_cast<const unsigned char *>(word);
        at[s][1] = at[s][0] + bytes;
        step[s] = 2 * bytes;
    }
    __device__ __forceinline__ void keys(const unsigned char *page, int lane) {
        read_from(page, lane % 16, lane / 16);
    }
    __device__ __forceinline__ void values(const unsigned char *page, const fresh_words<DIM> *fresh, int n, int own,
                                           int lane) {
        int slot = lane % 8 + lane / 16 * 8, word = lane / 8 % 2;
        read_from(page, slot, word);
#pragma unroll
        for (int s = 0; s < 2; s++) {
            if (slot + 16 * s >= n) instead(s, &fresh->zeros, 0);
            if (slot + 16 * s == own) instead(s, fresh->v + word, 32);
        }
    }
    __device__ __forceinline__ void keys_at(uint4 &a, uint4 &b, int m, int i) const {
        a = load_matrices<false>(at[m][0] + i * STEP);
        b = load_matrices<false>(at[m][1] + i * STEP);
    }
    template <bool SPECIAL> __device__ __forceinline__ void values_at(uint4 &a, uint4 &b, int i) const {
        a = load_matrices<true>(at[0][i % 2] + i / 2 * step[0]);
        b = load_matrices<true>(at[1][i % 2] + i / 2 * step[1]);
    }
};

// Scores of the lane's rows at slots 8 j + g, but for this step's own.
template <typename KV, int R>
static __device__ __forceinline__ void column_scores(float (&s)[4][2], const columns<KV::HD, R> &q,
                                                     const column_page<KV> &page) {
    float d[2][4] = {};
#pragma unroll
    for (int i = 0; i < KV::HD / 32; i++) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            uint4 a, b;
            page.keys_at(a, b, m, i);
            mma(d[m], a.x, a.y, a.z, a.w, q.of[i][0], q.of[i][1]);
            mma(d[m], b.x, b.y, b.z, b.w, q.of[i][2], q.of[i][3]);
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[2 * m + e / 2][e % 2] = d[m][e];
}

// Those at slot `own`, by an instruction whose rows are all this step's k.
template <int HD, int R>
static __device__ __forceinline__ void fresh_scores(float (&s)[4][2], const columns<HD, R> &q,
                                                    const fresh_words<HD> *fresh, int own, int lane) {
    float d[4] = {};
#pragma unroll
    for (int i = 0; i < HD / 32; i++) {
        uint4 k = fresh->k[i][lane % 4];
        mma(d, k.x, k.x, k.y, k.y, q.of[i][0], q.of[i][1]);
        mma(d, k.z, k.z, k.w, k.w, q.of[i][2], q.of[i][3]);
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (8 * j + lane / 4 == own) s[j][e] = d[e];
}

// ---- A chunk ------------------------------------------------------------------------------------------------------

// Lifts the scores of the lane's two rows up to slot n - 1; those beyond become -inf, whose p is 0. `m`: the least
// units for the rows, from all lanes that have them.
static __device__ __forceinline__ void column_lift(float (&s)[4][2], float (&m)[2], int n, int lane) {
    int g = lane / 4;
#pragma unroll
    for (int e = 0; e < 2; e++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            s[j][e] = 8 * j + g < n ? s[j][e] + LIFT : MINUS_INFINITY;
            m[e] = j ? fmaxf(m[e], s[j][e]) : s[j][e];
        }
        m[e] = fmaxf(m[e], __shfl_xor_sync(~0u, m[e], 4));
        m[e] = fmaxf(m[e], __shfl_xor_sync(~0u, m[e], 8));
        m[e] = ceilf(fmaxf(m[e], __shfl_xor_sync(~0u, m[e], 16)));
    }
}

// A lane's two rows of a chunk so far. of[i][0], of[i][1] are channel 16 i + g of theirs, of[i][2], of[i][3] channel
// 16 i + 8 + g; l[0] and l[1] their sums.
template <int HD> struct column_chain : chunk_chain<HD / 16, true> {
    using chunk_chain<HD / 16, true>::unit;
    using chunk_chain<HD / 16, true>::l;
    using chunk_chain<HD / 16, true>::of;

    // Lifted scores become p, column g's pairs of slots 8 j + 2t, 8 j + 2t + 1, whose sums join the chunk's.
    __device__ __forceinline__ void weigh(uint32_t (&p)[4], const float (&s)[4][2]) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            p[j] = transpose(pack_bf16(exp2_fast(s[j][0] - unit[0]), exp2_fast(s[j][1] - unit[1])));
        mma(l, ONES, ONES, ONES, ONES, p[0], p[1]);
        mma(l, ONES, ONES, ONES, ONES, p[2], p[3]);
    }

    // A page's values join the chunk's.
    template <bool SPECIAL, typename KV>
    __device__ __forceinline__ void add(const column_page<KV> &page, const uint32_t (&p)[4]) {
#pragma unroll
        for (int i = 0; i < HD / 16; i++) {
            uint4 a, b;
            page.template values_at<SPECIAL>(a, b, i);
            mma(of[i], a.x, a.y, a.z, a.w, p[0], p[1]);
            mma(of[i], b.x, b.y, b.z, b.w, p[2], p[3]);
        }
    }
};

#endif
