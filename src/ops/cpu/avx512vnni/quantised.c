// quantised.c: qdot (ops.h) with VNNI: vpdpbusd multiplies four unsigned weights of a row with four signed activations
// and adds them up in 32 bits, without saturation, vpdpwssd Q8_0's with two activations of 13 bits.
#include "ops/cpu/avx512/avx512.h"

#if defined(__AVX512VNNI__)

#include "ops/cpu/avx2/octets.h"
#include "ops/cpu/avx2/vec.h"
#include "ops/cpu/avx512/spread.h"

enum { MAX_N = AVX512_BESIDE };

INLINE __m512i wide_step(__m512i sum, __m512i w, __m512i x) {
    return _mm512_dpwssd_epi32(sum, w, x);
}

INLINE void integer_sums(enum dtype type, const struct weight_tile *tiles, size_t g, size_t len, const int8_t *q,
                         const size_t apart, __m512i (*sum)[MAX_N], const size_t R, const size_t N) {
    (void)type;
#pragma GCC unroll 8
    for (size_t i = 0; i < len / 4; i++, q += 4 * apart) {
        __m512i w[2];
        for (size_t r = 0; r < R; r++) w[r] = _mm512_load_si512(tiles[r].q[g * len / 4 + i]);
        for (size_t t = 0; t < N; t++) {
            const __m512i x = spread(q + 4 * t);
            for (size_t r = 0; r < R; r++) sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], w[r], x);
        }
    }
}

#include "ops/cpu/avx512/lanes.h"

void avx512vnni_quantised(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                          size_t n_tokens) {
    any_type(out, w, row, n_rows, x, n_tokens);
}

bool avx512vnni_pair(float *const *out, const struct matrix *const *w, const size_t *row, const float *x,
                     size_t n_tokens) {
    return any_pair(out, w, row, x, n_tokens);
}

static const struct cpu_kernels kernels = {
    avx512_dense,  avx512vnni_quantised, avx512vnni_pair,    avx512_deal_pairs,      NULL,
    AVX512_BESIDE, avx512_wide_scores,   avx512_wide_values, avx512vnni_byte_scores, avx512vnni_byte_values};

void avx512vnni_fill(struct ops *ops) {
    ops->name = "cpu/avx512vnni";
    ops->kernels = &kernels;
}

#else

void avx512vnni_fill(struct ops *ops) {
    (void)ops;
}

#endif
