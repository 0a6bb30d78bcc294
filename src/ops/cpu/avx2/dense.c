// dense.c: dot products with BF16, F16 and F32 rows as stored, in AVX2.
//
// Two rows meet three tokens at a time (one token: four rows), so that the sixteen partial sums of each pair stay in
// registers: twelve of the sixteen. Weights are converted again for every three tokens, which runs beside the fmas.
// Long rows go by pieces of K, so that three tokens' inputs stay in L1; the sums wait in memory in between.
//
// BF16: a 32-bit lane holds a pair, the odd element in its upper half. So lane l of dotpair is lane l here, and the
// conversion is a mask and a shift. The inputs are dealt out in the same way: of each 16 the 8 odd ones, the 8 even
// ones.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "ops/cpu/avx2/kernels.h"
#include "ops/cpu/avx2/vec.h"

enum {
    PIECE = 1024, // elements of K at a time, a multiple of 32
    MAX_N = 3,    // tokens at a time
};

// Holds a value in a register: gcc would fold the load into every fma that uses it, and loads are the limit then.
INLINE __m256 keep(__m256 v) {
    __asm__("" : "+x"(v));
    return v;
}

// Eight of 16 stored elements: for BF16 the odd ones (half 0) or the even ones, else the first or the last.
INLINE __m256 half_of_16(enum dtype type, const uint8_t *w, size_t half) {
    if (type != DTYPE_BF16) return load_as_f32(type, w + half * (type == DTYPE_F32 ? 32 : 16));
    __m256i pairs = _mm256_loadu_si256((const __m256i *)(const void *)w);
    return _mm256_castsi256_ps(half ? _mm256_slli_epi32(pairs, 16)
                                    : _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xFFFF0000u)));
}

// Adds 16 elements of R rows to the sums of N tokens. For BF16 they all belong to `a`, eight lanes; else the first 8 to
// `a`, the others to `b`.
INLINE void add_16(enum dtype type, const uint8_t *w, size_t row_bytes, const float *x, size_t stride,
                   __m256 (*a)[MAX_N], __m256 (*b)[MAX_N], const size_t R, const size_t N) {
    for (size_t half = 0; half < 2; half++) {
        __m256(*sum)[MAX_N] = half && type != DTYPE_BF16 ? b : a, v[4];
        for (size_t r = 0; r < R; r++) v[r] = half_of_16(type, w + r * row_bytes, half);
        for (size_t t = 0; t < N; t++) {
            __m256 in = keep(_mm256_loadu_ps(x + t * stride + 8 * half));
            for (size_t r = 0; r < R; r++) sum[r][t] = _mm256_fmadd_ps(v[r], in, sum[r][t]);
        }
    }
}

// The sums of R rows and N tokens, continued over n elements, n a multiple of 16. acc: [R, MAX_N, 16]
INLINE void dots(enum dtype type, float *acc, const uint8_t *w, size_t row_bytes, const float *x, size_t stride,
                 size_t n, bool first, const size_t R, const size_t N) {
    const size_t size = type == DTYPE_F32 ? 4 : 2;
    __m256 low[4][MAX_N], high[4][MAX_N];
    for (size_t r = 0; r < R; r++) {
        for (size_t t = 0; t < N; t++) {
            low[r][t] = first ? _mm256_setzero_ps() : _mm256_load_ps(acc + (r * MAX_N + t) * DOT_LANES);
            high[r][t] = first ? _mm256_setzero_ps() : _mm256_load_ps(acc + (r * MAX_N + t) * DOT_LANES + 8);
        }
    }
    size_t k = 0;
    for (; k + 32 <= n; k += 32) {
        const uint8_t *second = w + (k + 16) * size;
        // One token: memory is the limit. The next rows stand behind these; as much of them is fetched as is used here.
        for (size_t i = 0; N == 1 && R == 4 && i < 32 * size * R; i += 64)
            _mm_prefetch((const char *)w + R * row_bytes + k * size * R + i, _MM_HINT_T0);
        add_16(type, w + k * size, row_bytes, x + k, stride, low, high, R, N);
        if (type == DTYPE_BF16) add_16(type, second, row_bytes, x + k + 16, stride, high, low, R, N);
        else add_16(type, second, row_bytes, x + k + 16, stride, low, high, R, N);
        // Ties the two halves: gcc would make two loops of this one, each with too few chains to fill the fma units.
        __asm__ volatile("" : "+x"(low[0][0]), "+x"(high[0][0]));
    }
    if (k < n) add_16(type, w + k * size, row_bytes, x + k, stride, low, high, R, N);
    for (size_t r = 0; r < R; r++) {
        for (size_t t = 0; t < N; t++) {
            _mm256_store_ps(acc + (r * MAX_N + t) * DOT_LANES, low[r][t]);
            _mm256_store_ps(acc + (r * MAX_N + t) * DOT_LANES + 8, high[r][t]);
        }
    }
}

// The last n_in % 16 elements, from k on. Lanes go on where the whole blocks of 32 (pairs) or 16 ended.
static void add_tail(const struct matrix *w, size_t row, size_t k, float *acc, const float *x) {
    float tail[DOT_LANES];
    size_t n = w->n_in - k, size = w->type == DTYPE_F32 ? 4 : 2;
    dtype_to_f32(w->type, (const uint8_t *)w->data + row * w->row_bytes + k * size, tail, n);
    if (w->type != DTYPE_BF16) {
        for (size_t l = 0; l < n; l++) acc[l] = fmaf(tail[l], x[k + l], acc[l]);
        return;
    }
    acc += k / 2 % DOT_LANES;
    for (size_t i = 0; i < n; i += 2) {
        if (i + 1 < n) acc[i / 2] = fmaf(tail[i + 1], x[k + i + 1], acc[i / 2]);
        acc[i / 2] = fmaf(tail[i], x[k + i], acc[i / 2]);
    }
}

INLINE void rows(enum dtype type, float *acc, const struct matrix *w, size_t row, size_t n_rows, size_t k,
                 const float *x, size_t n, const size_t N) {
    const uint8_t *at = (const uint8_t *)w->data + row * w->row_bytes + k * (type == DTYPE_F32 ? 4 : 2);
    const size_t R = N == 1 ? 4 : 2, stride = MAX_N * DOT_LANES;
    size_t r = 0;
    for (; r + R <= n_rows; r += R)
        dots(type, acc + r * stride, at + r * w->row_bytes, w->row_bytes, x + k, w->n_in, n, k == 0, R, N);
    for (; r < n_rows; r++)
        dots(type, acc + r * stride, at + r * w->row_bytes, w->row_bytes, x + k, w->n_in, n, k == 0, 1, N);
}

INLINE void tokens(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                   const size_t N) {
    float acc[TILE_ROWS * MAX_N * DOT_LANES] __attribute__((aligned(32)));
    size_t whole = w->n_in / DOT_LANES * DOT_LANES, k = 0;
    do {
        size_t n = whole - k < PIECE ? whole - k : PIECE;
        rows(type, acc, w, row, n_rows, k, x, n, N);
        k += n;
    } while (k < whole);
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t t = 0; t < N; t++) {
            float *at = acc + (r * MAX_N + t) * DOT_LANES;
            if (k < w->n_in) add_tail(w, row + r, k, at, x + t * w->n_in);
            out[t * TILE_ROWS + r] = dot16_reduce_at(at);
        }
    }
}

INLINE void dense(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                  size_t n_tokens) {
    size_t t = 0;
    for (; t + 3 <= n_tokens; t += 3) tokens(type, out + t * TILE_ROWS, w, row, n_rows, x + t * w->n_in, 3);
    if (n_tokens - t == 2) tokens(type, out + t * TILE_ROWS, w, row, n_rows, x + t * w->n_in, 2);
    if (n_tokens - t == 1) tokens(type, out + t * TILE_ROWS, w, row, n_rows, x + t * w->n_in, 1);
}

void avx2_dense(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    if (w->type == DTYPE_BF16) dense(DTYPE_BF16, out, w, row, n_rows, x, n_tokens);
    else if (w->type == DTYPE_F16) dense(DTYPE_F16, out, w, row, n_rows, x, n_tokens);
    else dense(DTYPE_F32, out, w, row, n_rows, x, n_tokens);
}

#endif
