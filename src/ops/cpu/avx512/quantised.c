// quantised.c: qdot (ops.h) in AVX-512 without VNNI: as in avx2/quantised.c, with the sixteen rows of a tile in one
// register.
#include "ops/cpu/avx512/avx512.h"

#if defined(__AVX512BW__)

#include "ops/cpu/avx2/octets.h"
#include "ops/cpu/avx2/vec.h"

enum { MAX_N = 8 };

INLINE __m512i wide_step(__m512i sum, __m512i w, __m512i x) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
}

INLINE void integer_sums(enum dtype type, const struct weight_tile *tile, size_t column, size_t len,
                         const int8_t *const *x, __m512i *sum, const size_t N) {
    // How many results of vpmaddubsw fit in 16 bits: avx2/quantised.c.
    const size_t steps = type == DTYPE_Q6_K                                               ? 2
                         : type == DTYPE_Q5_0 || type == DTYPE_Q5_1 || type == DTYPE_Q5_K ? 4
                                                                                          : 8;
    const __m512i ones = _mm512_set1_epi16(1), zero = _mm512_setzero_si512();
    for (size_t t = 0; t < N; t++) sum[t] = zero;
    for (size_t j = 0; j < len / 4; j += steps) {
        __m512i pairs[MAX_N];
        for (size_t i = j; i < j + steps && i < len / 4; i++) {
            __m512i w = _mm512_load_si512(tile->q[column / 4 + i]);
            for (size_t t = 0; t < N; t++) {
                int four;
                memcpy(&four, x[t] + column + 4 * i, sizeof four);
                __m512i p = _mm512_maddubs_epi16(w, _mm512_set1_epi32(four));
                pairs[t] = i == j ? p : _mm512_add_epi16(pairs[t], p);
            }
        }
        for (size_t t = 0; t < N; t++) sum[t] = _mm512_add_epi32(sum[t], _mm512_madd_epi16(pairs[t], ones));
    }
}

#include "ops/cpu/avx512/lanes.h"

void avx512_quantised(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    any_type(out, w, row, n_rows, x, n_tokens);
}

#endif
