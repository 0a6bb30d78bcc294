// tiles.h: how a tile of dense rows is walked: four rows meet up to four tokens, whose sums stay in registers, one of
// 16 lanes for each pair, and sixteen sums go through dot16's tree together. The file that includes it says before what
// a step is:
//   STEP                     elements of K in a step
//   struct step_input, load_input(x, k)                a token's elements
//   step(type, acc, w, x, N)  adds a step of one row to the sums of N tokens
//   tail(w, row, k, acc, x)  the last n_in % STEP elements, into the sixteen sums
#ifndef TANDEM_OPS_CPU_AVX512_TILES_H
#define TANDEM_OPS_CPU_AVX512_TILES_H

#include "format/octets.h"
#include "ops/cpu/avx512/reduce.h"

enum {
    PIECE = 1024, // elements of K at a time, so that the tokens' inputs stay in L1
    MAX_N = 4,    // tokens at a time
    AHEAD = 1024, // bytes of octets that are fetched before one token meets them
};

// Where four rows stand: each one, bytes from a step to the next, and what is fetched meanwhile, in the order of
// memory.
struct place {
    const uint8_t *at[QUAD_ROWS], *next;
    size_t line;
};

// Rows r .. r + 4 of a tile from element k on; those that it lacks repeat the last one.
INLINE struct place rows_at(const struct matrix *w, size_t row, size_t n_rows, size_t r, size_t k, bool one) {
    const size_t size = w->type == DTYPE_F32 ? 4 : 2;
    struct place p;
    if (w->type == DTYPE_BF16 && w->octets && n_rows == TILE_ROWS) {
        const uint8_t *quad = w->octets + (row + r) * w->row_bytes + k / STEP * QUAD_ROWS * QUAD_LINE;
        for (size_t i = 0; i < QUAD_ROWS; i++) p.at[i] = quad + i * QUAD_LINE;
        p.line = QUAD_ROWS * QUAD_LINE;
        p.next = quad + (one ? AHEAD : QUAD_ROWS * w->row_bytes);
        return p;
    }
    for (size_t i = 0; i < QUAD_ROWS; i++)
        p.at[i] = (const uint8_t *)w->data + (row + (r + i < n_rows ? r + i : n_rows - 1)) * w->row_bytes + k * size;
    p.line = STEP * size;
    p.next = (const uint8_t *)w->data + (row + r + QUAD_ROWS) * w->row_bytes + k * size * QUAD_ROWS;
    return p;
}

// Adds n elements, a multiple of STEP, to the sums of four rows and N tokens: v[4 * row + token]. x: from element k on.
INLINE void dots(enum dtype type, __m512 *v, struct place w, const float *x, size_t stride, size_t k, size_t n,
                 const bool fetch, const size_t N) {
    for (size_t i = 0; i < n; i += STEP) {
        struct step_input in[MAX_N];
        for (size_t t = 0; t < N; t++) in[t] = load_input(x + t * stride, k + i);
        for (size_t r = 0; r < QUAD_ROWS; r++) {
            for (size_t l = 0; fetch && l < (type == DTYPE_F32 ? 2 : 1); l++, w.next += QUAD_LINE)
                _mm_prefetch((const char *)w.next, _MM_HINT_T0);
            step(type, v + QUAD_ROWS * r, w.at[r], in, N);
            w.at[r] += w.line;
        }
    }
}

// The last n_in % STEP elements, from k on, of four rows, from `row` on.
static void add_tail(__m512 *v, const struct matrix *w, size_t row, size_t n_rows, size_t k, const float *x, size_t N) {
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t t = 0; t < N; t++) {
            float acc[DOT_LANES];
            _mm512_storeu_ps(acc, v[QUAD_ROWS * r + t]);
            tail(w, row + r, k, acc, x + t * w->n_in);
            v[QUAD_ROWS * r + t] = _mm512_loadu_ps(acc);
        }
    }
}

// All of K for the four rows from r on: v[4 * row + token]. waiting: the sums between two pieces of K.
INLINE void four_rows(enum dtype type, __m512 *v, float *waiting, const struct matrix *w, size_t row, size_t n_rows,
                      size_t r, const float *x, size_t k, bool fetch, const size_t N) {
    const size_t whole = w->n_in / STEP * STEP, n = whole - k < PIECE ? whole - k : PIECE;
    for (size_t i = 0; i < 4 * MAX_N; i++)
        v[i] = k == 0 || i % MAX_N >= N ? _mm512_setzero_ps() : _mm512_load_ps(waiting + i * DOT_LANES);
    const struct place p = rows_at(w, row, n_rows, r, k, N == 1);
    if (fetch) dots(type, v, p, x, w->n_in, k, n, true, N);
    else dots(type, v, p, x, w->n_in, k, n, false, N);
    if (k + n < whole) {
        for (size_t i = 0; i < 4 * MAX_N; i++)
            if (i % MAX_N < N) _mm512_store_ps(waiting + i * DOT_LANES, v[i]);
    } else if (whole < w->n_in && r < n_rows) {
        add_tail(v, w, row + r, n_rows - r < QUAD_ROWS ? n_rows - r : QUAD_ROWS, whole, x, N);
    }
}

INLINE void tokens(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                   bool fetch, const size_t N) {
    float waiting[TILE_ROWS * MAX_N * DOT_LANES] __attribute__((aligned(64)));
    const size_t whole = w->n_in / STEP * STEP;
    for (size_t k = 0; k == 0 || k < whole; k += PIECE) {
        const bool last = k + PIECE >= whole;
        __m512 one[4 * QUAD_ROWS]; // one token's four rows beside the next four
        for (size_t r = 0; r < TILE_ROWS; r += QUAD_ROWS) {
            __m512 v[4 * MAX_N];
            four_rows(type, v, waiting + r * MAX_N * DOT_LANES, w, row, n_rows, r, x, k, fetch, N);
            if (!last) continue;
            if (N == 1) {
                for (size_t i = 0; i < QUAD_ROWS; i++) one[QUAD_ROWS * i + r / QUAD_ROWS] = v[QUAD_ROWS * i];
                continue;
            }
            float found[MAX_N][QUAD_ROWS];
            _mm512_storeu_ps(found[0], reduce_16(v));
            for (size_t t = 0; t < N; t++) memcpy(out + t * TILE_ROWS + r, found[t], sizeof found[t]);
        }
        if (N == 1 && last) _mm512_storeu_ps(out, reduce_16(one));
    }
}

// The first tokens fetch the rows that come next.
INLINE void all_tokens(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                       size_t n_tokens) {
    for (size_t t = 0, n; t < n_tokens; t += n, out += n * TILE_ROWS, x += n * w->n_in) {
        n = n_tokens - t < MAX_N ? n_tokens - t : MAX_N;
        if (n == 4) tokens(type, out, w, row, n_rows, x, t == 0, 4);
        else if (n == 3) tokens(type, out, w, row, n_rows, x, t == 0, 3);
        else if (n == 2) tokens(type, out, w, row, n_rows, x, t == 0, 2);
        else tokens(type, out, w, row, n_rows, x, t == 0, 1);
    }
}

#endif
