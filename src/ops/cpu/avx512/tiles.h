// tiles.h: how a tile of dense rows is walked: R rows meet N tokens, whose sums stay in registers, one of 16 lanes for
// each pair. The file that includes it says before what a step is:
//   STEP                     elements of K in a step
//   struct step_input, load_input(x, stride, k)        a token's elements
//   step(type, acc, w, x)    adds a step of one row to a token's sums
//   tail(w, row, k, acc, x)  the last n_in % STEP elements, into the sixteen sums
#ifndef TANDEM_OPS_CPU_AVX512_TILES_H
#define TANDEM_OPS_CPU_AVX512_TILES_H

#include "format/octets.h"

enum { PIECE = 1024, MAX_N = 4 }; // elements of K at a time, so that the tokens' inputs stay in L1; tokens at a time

// acc: [R, MAX_N, 16], continued over n elements, a multiple of STEP. packed: w is in octets, R is 4 or 8.
INLINE void dots(enum dtype type, float *acc, const uint8_t *w, size_t row_bytes, const float *x, size_t stride,
                 size_t k, size_t n, const bool packed, const size_t R, const size_t N) {
    const size_t size = type == DTYPE_F32 ? 4 : 2;
    __m512 sum[8][MAX_N];
    for (size_t r = 0; r < R; r++)
        for (size_t t = 0; t < N; t++)
            sum[r][t] = k == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + (r * MAX_N + t) * DOT_LANES);
    for (size_t end = k + n; k < end; k += STEP) {
        struct step_input in[MAX_N];
        for (size_t t = 0; t < N; t++) in[t] = load_input(x + t * stride, k);
        for (size_t r = 0; r < R; r++) {
            const uint8_t *at = w + r * row_bytes + k * size;
            if (packed)
                at = w + r / QUAD_ROWS * QUAD_ROWS * row_bytes + (k / STEP * QUAD_ROWS + r % QUAD_ROWS) * QUAD_LINE;
            step(type, sum[r], at, in, N);
        }
    }
    for (size_t r = 0; r < R; r++)
        for (size_t t = 0; t < N; t++) _mm512_storeu_ps(acc + (r * MAX_N + t) * DOT_LANES, sum[r][t]);
}

INLINE void rows(enum dtype type, float *acc, const struct matrix *w, size_t row, size_t n_rows, size_t k,
                 const float *x, size_t n, const size_t N) {
    const size_t R = N == 1 ? 8 : 4, stride = MAX_N * DOT_LANES;
    size_t r = 0;
    if (type == DTYPE_BF16 && w->octets && n_rows == TILE_ROWS) {
        for (; r < TILE_ROWS; r += R)
            dots(type, acc + r * stride, w->octets + (row + r) * w->row_bytes, w->row_bytes, x, w->n_in, k, n, true, R,
                 N);
        return;
    }
    const uint8_t *at = (const uint8_t *)w->data + row * w->row_bytes;
    for (; r + R <= n_rows; r += R)
        dots(type, acc + r * stride, at + r * w->row_bytes, w->row_bytes, x, w->n_in, k, n, false, R, N);
    for (; r < n_rows; r++)
        dots(type, acc + r * stride, at + r * w->row_bytes, w->row_bytes, x, w->n_in, k, n, false, 1, N);
}

INLINE void tokens(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                   const size_t N) {
    float acc[TILE_ROWS * MAX_N * DOT_LANES] __attribute__((aligned(64)));
    size_t whole = w->n_in / STEP * STEP, k = 0;
    do {
        size_t n = whole - k < PIECE ? whole - k : PIECE;
        rows(type, acc, w, row, n_rows, k, x, n, N);
        k += n;
    } while (k < whole);
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t t = 0; t < N; t++) {
            float *at = acc + (r * MAX_N + t) * DOT_LANES;
            if (k < w->n_in) tail(w, row + r, k, at, x + t * w->n_in);
            out[t * TILE_ROWS + r] = dot16_reduce_at(at);
        }
    }
}

INLINE void all_tokens(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                       size_t n_tokens) {
    size_t t = 0;
    for (; t + 4 <= n_tokens; t += 4) tokens(type, out + t * TILE_ROWS, w, row, n_rows, x + t * w->n_in, 4);
    if (n_tokens - t == 3) tokens(type, out + t * TILE_ROWS, w, row, n_rows, x + t * w->n_in, 3);
    if (n_tokens - t == 2) tokens(type, out + t * TILE_ROWS, w, row, n_rows, x + t * w->n_in, 2);
    if (n_tokens - t == 1) tokens(type, out + t * TILE_ROWS, w, row, n_rows, x + t * w->n_in, 1);
}

#endif
