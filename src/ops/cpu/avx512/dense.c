// dense.c: dot products with BF16, F16 and F32 rows as stored, in AVX-512: the sixteen partial sums of an output are
// one register. BF16 inputs are dealt out as in math.h: of each 32 the 16 odd ones, then the 16 even ones.
#include "ops/cpu/avx512/avx512.h"

#if defined(__AVX512F__)

#include "ops/cpu/avx2/vec.h"

void avx512_deal_pairs(float *to, const float *from, size_t n) {
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m512 a = _mm512_loadu_ps(from + i), b = _mm512_loadu_ps(from + i + 16);
        _mm512_storeu_ps(to + i, _mm512_permutex2var_ps(a, odd, b));
        _mm512_storeu_ps(to + i + 16, _mm512_permutex2var_ps(a, even, b));
    }
    for (; i < n; i++) to[i] = from[i];
}

enum { STEP = 32 };

struct step_input {
    __m512 first, second; // BF16: the odd ones and the even ones; else sixteen and sixteen
};

INLINE struct step_input load_input(const float *x, size_t k) {
    return (struct step_input){_mm512_loadu_ps(x + k), _mm512_loadu_ps(x + k + 16)};
}

INLINE __m512 load_16(enum dtype type, const uint8_t *w) {
    if (type == DTYPE_F32) return _mm512_loadu_ps(w);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)w));
}

INLINE void step(enum dtype type, __m512 *sum, const uint8_t *w, const struct step_input *in, const size_t N) {
    __m512 first, second;
    if (type == DTYPE_BF16) {
        __m512i pairs = _mm512_loadu_si512(w);
        first = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000u)));
        second = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    } else {
        first = load_16(type, w);
        second = load_16(type, w + (type == DTYPE_F32 ? 64 : 32));
    }
    for (size_t t = 0; t < N; t++) sum[t] = _mm512_fmadd_ps(first, in[t].first, sum[t]);
    for (size_t t = 0; t < N; t++) sum[t] = _mm512_fmadd_ps(second, in[t].second, sum[t]);
}

static void tail(const struct matrix *w, size_t row, size_t k, float *acc, const float *x) {
    float last[STEP];
    size_t n = w->n_in - k, size = w->type == DTYPE_F32 ? 4 : 2;
    dtype_to_f32(w->type, (const uint8_t *)w->data + row * w->row_bytes + k * size, last, n);
    for (size_t i = 0; i < n; i++) {
        // Pairs: the odd one first.
        size_t e = w->type != DTYPE_BF16 ? i : i % 2 ? i - 1 : i + 1 < n ? i + 1 : i;
        size_t lane = w->type == DTYPE_BF16 ? i / 2 : i % DOT_LANES;
        acc[lane] = fmaf(last[e], x[k + e], acc[lane]);
    }
}

#include "ops/cpu/avx512/tiles.h"

void avx512_dense(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    if (w->type == DTYPE_BF16) all_tokens(DTYPE_BF16, out, w, row, n_rows, x, n_tokens);
    else if (w->type == DTYPE_F16) all_tokens(DTYPE_F16, out, w, row, n_rows, x, n_tokens);
    else all_tokens(DTYPE_F32, out, w, row, n_rows, x, n_tokens);
}

static const struct cpu_kernels kernels = {
    avx512_dense,  avx512_quantised,   avx512_pair,        avx512_deal_pairs, NULL,
    AVX512_BESIDE, avx512_wide_scores, avx512_wide_values, avx2_byte_scores,  avx2_byte_values};

void avx512_fill(struct ops *ops) {
    ops->name = "cpu/avx512";
    ops->kernels = &kernels;
}

#else

void avx512_fill(struct ops *ops) {
    (void)ops;
}

#endif
