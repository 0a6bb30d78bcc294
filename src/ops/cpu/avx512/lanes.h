// lanes.h: qdot over unpacked tiles with a row in each of sixteen lanes. The file that includes it gives, before, how
// the integers of a group are summed:
//   integer_sums(type, tile, column, len, x, sum, N)  sum[token], lanes are rows; not of Q8_0
//   wide_step(sum, w, x)                              sum + the products of two 16-bit numbers in each lane
#ifndef TANDEM_OPS_CPU_AVX512_LANES_H
#define TANDEM_OPS_CPU_AVX512_LANES_H

// Sums of 32 columns of Q8_0: of four the elements 0 and 2 are the low bytes of 16-bit numbers, 1 and 3 the high ones.
INLINE void wide_sums(const struct weight_tile *tile, size_t column, const int16_t *const *x, __m512i *sum,
                      const size_t N) {
    for (size_t t = 0; t < N; t++) sum[t] = _mm512_setzero_si512();
    for (size_t i = 0; i < 8; i++) {
        __m512i v = _mm512_load_si512(tile->q[column / 4 + i]), high = _mm512_srai_epi16(v, 8);
        __m512i low = _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8);
        for (size_t t = 0; t < N; t++) {
            int two[2];
            memcpy(two, x[t] + column + 4 * i, sizeof two);
            sum[t] = wide_step(sum[t], low, _mm512_set1_epi32(two[0]));
            sum[t] = wide_step(sum[t], high, _mm512_set1_epi32(two[1]));
        }
    }
}

// Adds n columns, from k on in x, to the chains of N tokens. out: [N, TILE_ROWS]
INLINE void add_tile(enum dtype type, float *out, const struct weight_tile *tile, const struct act_row *x, size_t k,
                     size_t n, const size_t N) {
    const bool has_min =
        type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q2_K || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
    const size_t len = type == DTYPE_Q2_K || type == DTYPE_Q3_K || type == DTYPE_Q6_K ? 16 : 32;
    const int offset = unpack_offset(type);
    __m512 acc[MAX_N];
    const int8_t *q[MAX_N];
    const int16_t *wide[MAX_N];
    for (size_t t = 0; t < N; t++) {
        q[t] = x[t].q + k;
        wide[t] = x[t].wide + k;
        acc[t] = k == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(out + t * TILE_ROWS);
    }
    for (size_t g = 0; g < n / len; g++) {
        const size_t group = k / len + g, block = (k + g * len) / ACT_BLOCK;
        __m512i sum[MAX_N];
        if (type == DTYPE_Q8_0) wide_sums(tile, g * len, wide, sum, N);
        else integer_sums(type, tile, g * len, len, q, sum, N);
        for (size_t t = 0; t < N; t++) {
            int total = 0;
            if (offset || has_min) total = len == 32 ? x[t].sum[2 * group] + x[t].sum[2 * group + 1] : x[t].sum[group];
            __m512 d = _mm512_set1_ps(type == DTYPE_Q8_0 ? x[t].wide_scale[block] : x[t].scale[block]);
            if (offset) sum[t] = _mm512_sub_epi32(sum[t], _mm512_set1_epi32(offset * total));
            __m512 scale = _mm512_mul_ps(_mm512_load_ps(tile->scale[g]), d);
            acc[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum[t]), acc[t]);
            if (!has_min) continue;
            __m512 weighted = _mm512_set1_ps(len == 32 ? x[t].weighted[block] : x[t].scale[block] * (float)total);
            acc[t] = _mm512_fmadd_ps(_mm512_load_ps(tile->min[g]), weighted, acc[t]);
        }
    }
    for (size_t t = 0; t < N; t++) _mm512_storeu_ps(out + t * TILE_ROWS, acc[t]);
}

INLINE void quantised(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                      size_t n_tokens) {
    struct weight_tile tile;
    const char *next = next_tile(w, row);
    for (size_t k = 0; k < w->n_in; k += TILE_COLUMNS) {
        size_t n = w->n_in - k < TILE_COLUMNS ? w->n_in - k : TILE_COLUMNS;
        make_tile(type, &tile, w, row, n_rows, k, n, &next);
        struct act_row rows[MAX_N];
        size_t t = 0;
        for (; t + MAX_N <= n_tokens; t += MAX_N) {
            for (size_t i = 0; i < MAX_N; i++) rows[i] = act_row_at((float *)(uintptr_t)x, w->n_in, t + i);
            add_tile(type, out + t * TILE_ROWS, &tile, rows, k, n, MAX_N);
        }
        for (; t < n_tokens; t++) {
            rows[0] = act_row_at((float *)(uintptr_t)x, w->n_in, t);
            add_tile(type, out + t * TILE_ROWS, &tile, rows, k, n, 1);
        }
    }
}

INLINE void any_type(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    // One token is not worth unpacking octets: AVX2 multiplies them as they stand, to the same bits.
    struct act_row token = act_row_at((float *)(uintptr_t)x, w->n_in, 0);
    if (n_tokens == 1 && w->octets && avx2_one_token(out, w, row, n_rows, &token)) return;
    switch (w->type) {
#define CASE(type)                                                                                                     \
    case type: quantised(type, out, w, row, n_rows, x, n_tokens); break;
        CASE(DTYPE_Q8_0)
        CASE(DTYPE_Q4_0)
        CASE(DTYPE_Q4_1)
        CASE(DTYPE_Q5_0)
        CASE(DTYPE_Q5_1)
        CASE(DTYPE_Q2_K)
        CASE(DTYPE_Q3_K)
        CASE(DTYPE_Q4_K)
        CASE(DTYPE_Q5_K)
        CASE(DTYPE_Q6_K)
#undef CASE
    default: break; // no other type is quantised
    }
}

#endif
