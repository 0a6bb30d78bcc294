// lanes.h: qdot over unpacked tiles with a row in each of sixteen lanes. Eight tokens stand side by side and meet a
// tile together, or four of them two tiles: their chains and the integer sums of a group stay in registers, and every
// activation is broadcast from memory, for both tiles at once. The file that includes it gives, before, how the
// integers of a group are summed:
//   integer_sums(type, tiles, g, len, q, apart, sum, R, N)  adds group g of R tiles to sum[tile][token], lanes are
//   rows;
//                                                           not of Q8_0. q: the activations, [len / 4][apart][4]
//   wide_step(sum, w, x)                                    sum + the products of two 16-bit numbers in each lane
#ifndef TANDEM_OPS_CPU_AVX512_LANES_H
#define TANDEM_OPS_CPU_AVX512_LANES_H

// Sums of 32 columns of Q8_0: of four the elements 0 and 2 are the low bytes of 16-bit numbers, 1 and 3 the high ones.
// fours: [8][apart][4]
INLINE void wide_sums(const struct weight_tile *tiles, size_t g, const int16_t *fours, const size_t apart,
                      __m512i (*sum)[MAX_N], const size_t R, const size_t N) {
    for (size_t r = 0; r < R; r++)
        for (size_t t = 0; t < N; t++) sum[r][t] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; i++, fours += 4 * apart) {
        __m512i low[2], high[2];
        for (size_t r = 0; r < R; r++) {
            const __m512i v = _mm512_load_si512(tiles[r].q[8 * g + i]);
            high[r] = _mm512_srai_epi16(v, 8);
            low[r] = _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8);
        }
        for (size_t t = 0; t < N; t++) {
            const __m512i x = spread(fours + 4 * t);
            for (size_t r = 0; r < R; r++) sum[r][t] = wide_step(sum[r][t], low[r], x);
        }
        for (size_t t = 0; t < N; t++) {
            const __m512i x = spread(fours + 4 * t + 2);
            for (size_t r = 0; r < R; r++) sum[r][t] = wide_step(sum[r][t], high[r], x);
        }
    }
}

// `factor` times a group's sum of activations, in every lane. lanes: its two sums.
INLINE __m512i times_total(const int16_t *lanes, int factor) {
    return _mm512_madd_epi16(spread(lanes), _mm512_set1_epi16((short)factor));
}

// What unsigned weights make of a group beyond what signed ones do, to start its sum with. t: the token.
INLINE __m512i start(enum dtype type, const struct act_tile *x, size_t g, size_t len, size_t apart, size_t t) {
    const int offset = unpack_offset(type);
    if (offset == 0) return _mm512_setzero_si512();
    if (len == 16) return times_total(x->lanes16 + 2 * (g * apart + t), -offset);
    const __m512i less = spread(x->less + g * apart + t); // the one multiplication less is 5% of Q4_0's products
    return offset == 8 ? less : _mm512_slli_epi32(less, 1);
}

// Adds n columns to the chains of N tokens with R tiles. next: NULL, or what is fetched meanwhile for each tile. full:
// eight tokens stand side by side. out: of each tile [N, TILE_ROWS]
INLINE void add_tiles(enum dtype type, float *const *out, const struct weight_tile *tiles, const struct act_tile *x,
                      bool first, size_t n, const char **next, const bool full, const size_t R, const size_t N) {
    const bool has_min =
        type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q2_K || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
    const size_t len = type == DTYPE_Q2_K || type == DTYPE_Q3_K || type == DTYPE_Q6_K ? 16 : 32;
    const float *scales = type == DTYPE_Q8_0 ? x->wide_scale : x->scale;
    const size_t apart = full ? MAX_N : x->apart; // where it is known, no register holds it
    __m512 acc[2][MAX_N];
    for (size_t r = 0; r < R; r++)
        for (size_t t = 0; t < N; t++)
            acc[r][t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(out[r] + t * TILE_ROWS);
    for (size_t g = 0; g < n / len; g++) {
        const size_t block = g * len / ACT_BLOCK * apart;
        __m512i sum[2][MAX_N];
        for (size_t o = 0; next && (len == ACT_BLOCK || g % 2 == 0) && o < R * TILE_ROWS / OCTET; o++)
            fetch_ahead(type, next + o / 2);
        if (type == DTYPE_Q8_0) {
            wide_sums(tiles, g, x->wide + 32 * g * apart, apart, sum, R, N);
        } else {
            for (size_t t = 0; t < N; t++) {
                sum[0][t] = start(type, x, g, len, apart, t);
                if (R == 2) sum[1][t] = sum[0][t];
            }
            integer_sums(type, tiles, g, len, x->q + g * len * apart, apart, sum, R, N);
        }
        for (size_t t = 0; t < N; t++) {
            const __m512 d = _mm512_set1_ps(scales[block + t]);
            __m512 weighted = d;
            if (has_min && len == 32) weighted = _mm512_set1_ps(x->weighted[block + t]);
            if (has_min && len == 16)
                weighted = _mm512_mul_ps(d, _mm512_cvtepi32_ps(times_total(x->lanes16 + 2 * (g * apart + t), 1)));
            for (size_t r = 0; r < R; r++) {
                const __m512 scale = _mm512_mul_ps(_mm512_load_ps(tiles[r].scale[g]), d);
                acc[r][t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum[r][t]), acc[r][t]);
                if (has_min) acc[r][t] = _mm512_fmadd_ps(_mm512_load_ps(tiles[r].min[g]), weighted, acc[r][t]);
            }
        }
    }
    for (size_t r = 0; r < R; r++)
        for (size_t t = 0; t < N; t++) _mm512_storeu_ps(out[r] + t * TILE_ROWS, acc[r][t]);
}

// All tokens meet n columns of R tiles, from k on. The first ones fetch what `next` points to.
INLINE void all_tokens(enum dtype type, float *const *out, const struct weight_tile *tiles, const float *x, size_t n_in,
                       size_t n_tokens, size_t k, size_t n, const char **next, const size_t R) {
    for (size_t t = 0, N; t < n_tokens; t += N, next = NULL) {
        const struct act_tile tokens = act_tile_at(x, n_in, t, n_tokens, k, MAX_N);
        const size_t left = tokens.apart - t % MAX_N;
        const bool full = tokens.apart == MAX_N;
        float *to[2] = {out[0] + t * TILE_ROWS, R == 2 ? out[1] + t * TILE_ROWS : NULL};
        N = left >= 8 && R == 1 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (N == 1) add_tiles(type, to, tiles, &tokens, k == 0, n, next, false, R, 1);
        else if (N == 2) add_tiles(type, to, tiles, &tokens, k == 0, n, next, false, R, 2);
        else if (R == 1 && N == MAX_N) add_tiles(type, to, tiles, &tokens, k == 0, n, next, true, R, MAX_N);
        else if (R == 2 && full) add_tiles(type, to, tiles, &tokens, k == 0, n, next, true, R, 4);
        else add_tiles(type, to, tiles, &tokens, k == 0, n, next, false, R, 4);
    }
}

INLINE void quantised(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                      size_t n_tokens) {
    struct weight_tile tile;
    const char *next = next_tile(w, row);
    for (size_t k = 0; k < w->n_in; k += TILE_COLUMNS) {
        size_t n = w->n_in - k < TILE_COLUMNS ? w->n_in - k : TILE_COLUMNS;
        const char *from = next;
        make_tile(type, &tile, w, row, n_rows, k, n, NULL);
        all_tokens(type, &out, &tile, x, w->n_in, n_tokens, k, n, &from, 1);
        next += n / ACT_BLOCK * TILE_ROWS * bytes_of_32(type);
    }
}

// Two whole tiles.
INLINE void quantised_pair(enum dtype type, float *const *out, const struct matrix *const *w, const size_t *row,
                           const float *x, size_t n_tokens) {
    struct weight_tile tiles[2];
    const size_t n_in = w[0]->n_in, beyond = w[0] == w[1] ? TILE_ROWS : 0; // two neighbours, two neighbours next
    const char *next[2] = {next_tile(w[0], row[0] + beyond), next_tile(w[1], row[1] + beyond)};
    for (size_t k = 0; k < n_in; k += TILE_COLUMNS) {
        size_t n = n_in - k < TILE_COLUMNS ? n_in - k : TILE_COLUMNS;
        const char *from[2] = {next[0], next[1]};
        for (size_t r = 0; r < 2; r++) make_tile(type, &tiles[r], w[r], row[r], TILE_ROWS, k, n, NULL);
        all_tokens(type, out, tiles, x, n_in, n_tokens, k, n, from, 2);
        for (size_t r = 0; r < 2; r++) next[r] += n / ACT_BLOCK * TILE_ROWS * bytes_of_32(type);
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

INLINE bool any_pair(float *const *out, const struct matrix *const *w, const size_t *row, const float *x,
                     size_t n_tokens) {
    switch (w[0]->type) {
#define CASE(type)                                                                                                     \
    case type: quantised_pair(type, out, w, row, x, n_tokens); return true;
        CASE(DTYPE_Q8_0)
        CASE(DTYPE_Q4_0)
        CASE(DTYPE_Q4_1)
        CASE(DTYPE_Q5_0)
        CASE(DTYPE_Q5_1)
        CASE(DTYPE_Q4_K)
        CASE(DTYPE_Q5_K)
        CASE(DTYPE_Q6_K)
#undef CASE
    default: return false; // few files hold others
    }
}

#endif
