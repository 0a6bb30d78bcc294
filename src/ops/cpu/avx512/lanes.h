// lanes.h: qdot over unpacked tiles with a row in each of sixteen lanes. Eight tokens stand side by side and meet a
// tile together: their chains and the integer sums of a group stay in registers, and every activation is broadcast from
// memory. The file that includes it gives, before, how the integers of a group are summed:
//   integer_sums(type, tile, g, len, q, apart, sum, N)  adds group g to sum[token], lanes are rows; not of Q8_0. q: the
//                                                       group's activations, [len / 4][apart][4]
//   wide_step(sum, w, x)                                sum + the products of two 16-bit numbers in each lane
#ifndef TANDEM_OPS_CPU_AVX512_LANES_H
#define TANDEM_OPS_CPU_AVX512_LANES_H

// Sums of 32 columns of Q8_0: of four the elements 0 and 2 are the low bytes of 16-bit numbers, 1 and 3 the high ones.
// fours: [8][apart][4]
INLINE void wide_sums(const struct weight_tile *tile, size_t g, const int16_t *fours, const size_t apart, __m512i *sum,
                      const size_t N) {
    for (size_t t = 0; t < N; t++) sum[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; i++, fours += 4 * apart) {
        __m512i v = _mm512_load_si512(tile->q[8 * g + i]), high = _mm512_srai_epi16(v, 8);
        __m512i low = _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8);
        for (size_t t = 0; t < N; t++) sum[t] = wide_step(sum[t], low, spread(fours + 4 * t));
        for (size_t t = 0; t < N; t++) sum[t] = wide_step(sum[t], high, spread(fours + 4 * t + 2));
    }
}

// `factor` times a group's sum of activations, in every lane. lanes: its two sums.
INLINE __m512i times_total(const int16_t *lanes, int factor) {
    return _mm512_madd_epi16(spread(lanes), _mm512_set1_epi16((short)factor));
}

// Adds n columns to the chains of N tokens. next: NULL, or what is fetched meanwhile. out: [N, TILE_ROWS]
INLINE void add_tile(enum dtype type, float *out, const struct weight_tile *tile, const struct act_tile *x, bool first,
                     size_t n, const char **next, const size_t N) {
    const bool has_min =
        type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q2_K || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
    const size_t len = type == DTYPE_Q2_K || type == DTYPE_Q3_K || type == DTYPE_Q6_K ? 16 : 32;
    const int offset = unpack_offset(type);
    const float *scales = type == DTYPE_Q8_0 ? x->wide_scale : x->scale;
    const int16_t *lanes = len == 32 ? x->lanes32 : x->lanes16;
    const size_t apart = N == MAX_N ? MAX_N : x->apart; // where it is known, no register holds it
    __m512 acc[MAX_N];
    for (size_t t = 0; t < N; t++) acc[t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(out + t * TILE_ROWS);
    for (size_t g = 0; g < n / len; g++) {
        const size_t block = g * len / ACT_BLOCK * apart;
        __m512i sum[MAX_N];
        for (size_t o = 0; next && (len == ACT_BLOCK || g % 2 == 0) && o < TILE_ROWS / OCTET; o++)
            fetch_ahead(type, next);
        if (type == DTYPE_Q8_0) {
            wide_sums(tile, g, x->wide + 32 * g * apart, apart, sum, N);
        } else {
            for (size_t t = 0; t < N; t++)
                sum[t] = offset ? times_total(lanes + 2 * (g * apart + t), -offset) : _mm512_setzero_si512();
            integer_sums(type, tile, g, len, x->q + g * len * apart, apart, sum, N);
        }
        const __m512 factor = _mm512_load_ps(tile->scale[g]);
        for (size_t t = 0; t < N; t++) {
            const __m512 d = _mm512_set1_ps(scales[block + t]);
            acc[t] = _mm512_fmadd_ps(_mm512_mul_ps(factor, d), _mm512_cvtepi32_ps(sum[t]), acc[t]);
            if (!has_min) continue;
            __m512 weighted;
            if (len == 32) weighted = _mm512_set1_ps(x->weighted[block + t]);
            else weighted = _mm512_mul_ps(d, _mm512_cvtepi32_ps(times_total(lanes + 2 * (g * apart + t), 1)));
            acc[t] = _mm512_fmadd_ps(_mm512_load_ps(tile->min[g]), weighted, acc[t]);
        }
    }
    for (size_t t = 0; t < N; t++) _mm512_storeu_ps(out + t * TILE_ROWS, acc[t]);
}

// All tokens meet n columns, from k on. The first ones fetch what `next` points to.
INLINE void all_tokens(enum dtype type, float *out, const struct weight_tile *tile, const float *x, size_t n_in,
                       size_t n_tokens, size_t k, size_t n, const char *next) {
    const char **fetched = &next;
    for (size_t t = 0, N; t < n_tokens; t += N, out += N * TILE_ROWS, fetched = NULL) {
        const struct act_tile tokens = act_tile_at(x, n_in, t, n_tokens, k, MAX_N);
        const size_t left = tokens.apart - t % MAX_N;
        N = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        switch (N) {
        case 1: add_tile(type, out, tile, &tokens, k == 0, n, fetched, 1); break;
        case 2: add_tile(type, out, tile, &tokens, k == 0, n, fetched, 2); break;
        case 4: add_tile(type, out, tile, &tokens, k == 0, n, fetched, 4); break;
        default: add_tile(type, out, tile, &tokens, k == 0, n, fetched, MAX_N); break;
        }
    }
}

INLINE void quantised(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                      size_t n_tokens) {
    struct weight_tile tile;
    const char *next = next_tile(w, row);
    for (size_t k = 0; k < w->n_in; k += TILE_COLUMNS) {
        size_t n = w->n_in - k < TILE_COLUMNS ? w->n_in - k : TILE_COLUMNS;
        make_tile(type, &tile, w, row, n_rows, k, n, NULL);
        all_tokens(type, out, &tile, x, w->n_in, n_tokens, k, n, next);
        next += n / ACT_BLOCK * TILE_ROWS * bytes_of_32(type);
    }
}

INLINE void any_type(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    // One token is not worth unpacking a tile: AVX2 multiplies rows as they stand, to the same bits.
    struct act_row token = act_row_at((float *)(uintptr_t)x, w->n_in, 0);
    if (n_tokens == 1 && avx2_one_token(out, w, row, n_rows, &token)) return;
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
