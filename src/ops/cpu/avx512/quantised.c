// quantised.c: qdot (ops.h) in AVX-512 without VNNI: as in avx2/quantised.c, with the sixteen rows of a tile in one
// register.
#include "ops/cpu/avx512/avx512.h"

#if defined(__AVX512BW__)

#include "ops/cpu/avx2/octets.h"
#include "ops/cpu/avx2/vec.h"
#include "ops/cpu/avx512/spread.h"

enum { MAX_N = AVX512_BESIDE };

// Adds in the sum's own register, as in avx2/vec.h.
INLINE void add_words_512(__m512i *sum, __m512i v) {
    __asm__("vpaddw %1, %0, %0" : "+v"(*sum) : "v"(v));
}

INLINE void add_dwords_512(__m512i *sum, __m512i v) {
    __asm__("vpaddd %1, %0, %0" : "+v"(*sum) : "v"(v));
}

INLINE __m512i wide_step(__m512i sum, __m512i w, __m512i x) {
    add_dwords_512(&sum, _mm512_madd_epi16(w, x));
    return sum;
}

INLINE void integer_sums(enum dtype type, const struct weight_tile *tiles, size_t g, size_t len, const int8_t *q,
                         const size_t apart, __m512i (*sum)[MAX_N], const size_t R, const size_t N) {
    // How many results of vpmaddubsw fit in 16 bits: 4 * 2 * 127 * 31 is below 2^15, 2 * 2 * 127 * 63 too.
    const size_t steps = type == DTYPE_Q6_K                                               ? 2
                         : type == DTYPE_Q5_0 || type == DTYPE_Q5_1 || type == DTYPE_Q5_K ? 4
                                                                                          : len / 4;
    const __m512i ones = _mm512_set1_epi16(1);
    for (size_t j = 0; j < len / 4; j += steps) {
        __m512i pairs[2][MAX_N];
#pragma GCC unroll 8
        for (size_t i = 0; i < steps; i++, q += 4 * apart) {
            __m512i w[2];
            for (size_t r = 0; r < R; r++) w[r] = _mm512_load_si512(tiles[r].q[g * len / 4 + j + i]);
            for (size_t t = 0; t < N; t++) {
                const __m512i x = spread(q + 4 * t);
                for (size_t r = 0; r < R; r++) {
                    const __m512i p = _mm512_maddubs_epi16(w[r], x);
                    if (i == 0) pairs[r][t] = p;
                    else add_words_512(&pairs[r][t], p);
                }
            }
        }
        for (size_t r = 0; r < R; r++)
            for (size_t t = 0; t < N; t++)
                sum[r][t] = _mm512_add_epi32(sum[r][t], _mm512_madd_epi16(pairs[r][t], ones));
    }
}

#include "ops/cpu/avx512/lanes.h"

void avx512_quantised(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    any_type(out, w, row, n_rows, x, n_tokens);
}

bool avx512_pair(float *const *out, const struct matrix *const *w, const size_t *row, const float *x, size_t n_tokens) {
    return any_pair(out, w, row, x, n_tokens);
}

#endif
