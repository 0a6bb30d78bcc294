// attention.c: attention of many query rows with a block of K and V as f32, in AVX-512. avx2/attention.c walks the
// blocks and has all else; the bits are its.
#include "ops/cpu/avx512/avx512.h"

#if defined(__AVX512F__)

#include "ops/cpu/avx2/attention.h"
#include "ops/cpu/avx512/reduce.h"

enum { ROWS = 4, POSITIONS = 4, VECTORS = 4 }; // at a time; of 16 channels

void avx512_wide_scores(float *s, const float *const *q, size_t n_rows, const float *k, size_t n, size_t head_dim,
                        float scale) {
    for (size_t r = 0; r < n_rows; r += ROWS, s += ROWS * ATTN_BLOCK) {
        const float *row[ROWS];
        for (size_t i = 0; i < ROWS; i++) row[i] = q[r + i < n_rows ? r + i : r];
        for (size_t j = 0; j < n; j += POSITIONS) {
            __m512 sum[POSITIONS * ROWS];
            for (size_t i = 0; i < POSITIONS * ROWS; i++) sum[i] = _mm512_setzero_ps();
            for (size_t c = 0; c < head_dim; c += DOT_LANES) {
                __m512 in[ROWS];
                for (size_t i = 0; i < ROWS; i++) in[i] = _mm512_loadu_ps(row[i] + c);
                for (size_t p = 0; p < POSITIONS; p++) {
                    const __m512 x = _mm512_loadu_ps(k + (j + p) * head_dim + c);
                    for (size_t i = 0; i < ROWS; i++) sum[ROWS * p + i] = _mm512_fmadd_ps(x, in[i], sum[ROWS * p + i]);
                }
            }
            const __m512 v = _mm512_mul_ps(reduce_16(sum), _mm512_set1_ps(scale)); // [row][position]
            _mm_storeu_ps(s + j, _mm512_castps512_ps128(v));
            _mm_storeu_ps(s + ATTN_BLOCK + j, _mm512_extractf32x4_ps(v, 1));
            _mm_storeu_ps(s + 2 * ATTN_BLOCK + j, _mm512_extractf32x4_ps(v, 2));
            _mm_storeu_ps(s + 3 * ATTN_BLOCK + j, _mm512_extractf32x4_ps(v, 3));
        }
    }
}

// Channels c .. c + 16 * V of four rows.
INLINE void wide_values(float *const *out, const float *const *p, const struct joint *joint, const float *v, size_t n,
                        size_t head_dim, size_t c, const size_t V) {
    __m512 o[ROWS][VECTORS];
    for (size_t r = 0; r < ROWS; r++)
        for (size_t i = 0; i < V; i++) o[r][i] = _mm512_setzero_ps();
    for (size_t j = 0; j < n; j++) {
        __m512 x[VECTORS];
        for (size_t i = 0; i < V; i++) x[i] = _mm512_loadu_ps(v + j * head_dim + c + 16 * i);
        for (size_t r = 0; r < ROWS; r++) {
            const __m512 weight = _mm512_set1_ps(p[r][j]);
            for (size_t i = 0; i < V; i++) o[r][i] = _mm512_fmadd_ps(weight, x[i], o[r][i]);
        }
    }
    for (size_t r = 0; r < ROWS; r++) {
        const __m512 a = _mm512_set1_ps(joint[r].a), b = _mm512_set1_ps(joint[r].c);
        for (size_t i = 0; i < V; i++) {
            float *to = out[r] + c + 16 * i;
            if (!joint[r].first) o[r][i] = _mm512_fmadd_ps(_mm512_loadu_ps(to), a, _mm512_mul_ps(o[r][i], b));
            _mm512_storeu_ps(to, o[r][i]);
        }
    }
}

void avx512_wide_values(float *const *out, const float *const *p, const struct joint *joint, const float *v, size_t n,
                        size_t head_dim) {
    size_t c = 0;
    for (; c + 16 * VECTORS <= head_dim; c += 16 * VECTORS) wide_values(out, p, joint, v, n, head_dim, c, VECTORS);
    for (; c < head_dim; c += 16) wide_values(out, p, joint, v, n, head_dim, c, 1);
}

#endif
