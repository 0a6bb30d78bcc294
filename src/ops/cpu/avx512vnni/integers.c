// integers.c: products of integers with a block of K or V of Q8_0, with VNNI. avx2/integers.c walks the blocks and has
// all else; the bits are its, for every sum is exact.
//
// An octet's line of 32 bytes is eight positions (K; of V eight channels) by two pairs of channels (positions). Widened
// to 16 bits it fills a register: its halves meet one pair each, and are added up at the end. A block's four octets
// meet the same pairs, which stay in registers.
#include "ops/cpu/avx512/avx512.h"

#if defined(__AVX512VNNI__)

#include "ops/cpu/avx2/attention.h"

enum { BLOCK = 32, OCTETS = 4, OCTET_BYTES = 256, LINE = 64, STEPS = 8 }; // steps: two pairs each

// Asks for the block's share, one of as many as it has blocks of channels, of what comes next: 17 lines.
INLINE void fetch_lines(const unsigned char *next, size_t block, size_t step) {
    if (!next) return;
    const char *at = (const char *)next + (17 * block + 2 * step) * LINE;
    _mm_prefetch(at, _MM_HINT_T0);
    _mm_prefetch(at + LINE, _MM_HINT_T0);
    if (step + 1 == STEPS) _mm_prefetch(at + (size_t)2 * LINE, _MM_HINT_T0);
}

// The sums of R rows with sixteen positions or channels, the first ones in found[0]. pairs[r]: 16 pairs.
INLINE void multiply(__m512i (*found)[2], const unsigned char *octets, const __m512i *pairs, const unsigned char *next,
                     size_t block, const size_t R) {
    __m512i sum[4][OCTETS];
    for (size_t r = 0; r < R; r++)
        for (size_t o = 0; o < OCTETS; o++) sum[r][o] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (size_t i = 0; i < STEPS; i++) {
        const __m512i which =
            _mm512_inserti64x4(_mm512_set1_epi32((int)(2 * i)), _mm256_set1_epi32((int)(2 * i + 1)), 1);
        __m512i two[4];
        for (size_t r = 0; r < R; r++) two[r] = _mm512_permutexvar_epi32(which, pairs[r]);
        fetch_lines(next, block, i);
        for (size_t o = 0; o < OCTETS; o++) {
            const void *line = octets + o * OCTET_BYTES + 32 * i;
            const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)line));
            for (size_t r = 0; r < R; r++) sum[r][o] = _mm512_dpwssd_epi32(sum[r][o], wide, two[r]);
        }
    }
    for (size_t r = 0; r < R; r++)
        for (size_t o = 0; o < 2; o++)
            found[r][o] = _mm512_add_epi32(_mm512_shuffle_i64x2(sum[r][2 * o], sum[r][2 * o + 1], 0x44),
                                           _mm512_shuffle_i64x2(sum[r][2 * o], sum[r][2 * o + 1], 0xEE));
}

INLINE __m512 sixteen_halves(const unsigned char *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

INLINE void scores(float *s, const struct queries *q, size_t first, const unsigned char *k, size_t head_dim,
                   const unsigned char *next, const size_t R) {
    __m512 t[4][2];
    for (size_t r = 0; r < R; r++) t[r][0] = t[r][1] = _mm512_setzero_ps();
    for (size_t b = 0; b < head_dim / BLOCK; b++) {
        __m512i pairs[4], sum[4][2];
        for (size_t r = 0; r < R; r++) pairs[r] = _mm512_loadu_si512(q->q[first + r] + BLOCK * b);
        multiply(sum, k + kv_block_at(head_dim, b), pairs, next, b, R);
        for (size_t o = 0; o < 2; o++) {
            const __m512 d = sixteen_halves(k + kv_scale_at(b, 16 * o));
            for (size_t r = 0; r < R; r++) t[r][o] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(sum[r][o]), t[r][o]);
        }
    }
    for (size_t r = 0; r < R; r++) {
        const __m512 factor = _mm512_set1_ps(q->factor[first + r]);
        for (size_t o = 0; o < 2; o++) _mm512_storeu_ps(s + r * ATTN_BLOCK + 16 * o, _mm512_mul_ps(t[r][o], factor));
    }
}

void avx512vnni_byte_scores(float *s, const struct queries *q, size_t n_rows, const unsigned char *k, size_t n,
                            size_t head_dim, const unsigned char *next) {
    (void)n; // what stands in the rest comes to nothing
    size_t r = 0;
    for (; r + 4 <= n_rows; r += 4, next = NULL) scores(s + r * ATTN_BLOCK, q, r, k, head_dim, next, 4);
    for (; r + 2 <= n_rows; r += 2, next = NULL) scores(s + r * ATTN_BLOCK, q, r, k, head_dim, next, 2);
    for (; r < n_rows; r++, next = NULL) scores(s + r * ATTN_BLOCK, q, r, k, head_dim, next, 1);
}

INLINE __mmask32 first_of_32(size_t n) {
    return (__mmask32)(UINT32_MAX >> (BLOCK - n));
}

// g of one block of channels for the first n positions, 0 for the others, and what their sums are multiplied with.
INLINE float weight_scales(__m512 g[2], const unsigned char *scales, size_t n) {
    const __m512i d = _mm512_maskz_loadu_epi16(first_of_32(n), scales);
    const __m256i half[2] = {_mm512_castsi512_si256(d), _mm512_extracti64x4_epi64(d, 1)};
    // The largest: the smallest of the complements, which one instruction finds.
    const __m256i both = _mm256_max_epu16(half[0], half[1]);
    __m128i most = _mm_max_epu16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    most = _mm_minpos_epu16(_mm_xor_si128(most, _mm_set1_epi16(-1)));
    float factor, inverse = attn_weight_scale((uint16_t)~_mm_cvtsi128_si32(most), &factor);
    for (size_t i = 0; i < 2; i++) g[i] = _mm512_mul_ps(_mm512_cvtph_ps(half[i]), _mm512_set1_ps(inverse));
    return factor;
}

// W of one row and block of channels from its first n probabilities.
INLINE __m512i round_weights(const float *p, const __m512 g[2], size_t n) {
    const __mmask32 real = first_of_32(n);
    __m256i words[2];
    for (size_t i = 0; i < 2; i++) {
        const __m512 v = _mm512_maskz_loadu_ps((__mmask16)(real >> 16 * i), p + 16 * i);
        words[i] = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v, g[i])));
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(words[0]), words[1], 1);
}

// Adds a block's values to R rows; p[r]: n[r] probabilities.
INLINE void values(float *const *out, const float *const *p, const struct joint *joint, const size_t *n,
                   const unsigned char *v, size_t head_dim, const unsigned char *next, const size_t R) {
    __m512i weights[MOST_HEAD_DIM / BLOCK][4];
    float factors[MOST_HEAD_DIM / BLOCK][4];
    for (size_t b = 0; b < head_dim / BLOCK; b++) { // all at once: each is a long chain of latencies
        __m512 g[2];
        for (size_t r = 0; r < R; r++) {
            if (r > 0 && n[r] == n[r - 1]) factors[b][r] = factors[b][r - 1];
            else factors[b][r] = weight_scales(g, v + kv_scale_at(b, 0), n[r]);
            weights[b][r] = round_weights(p[r], g, n[r]);
        }
    }
    for (size_t b = 0; b < head_dim / BLOCK; b++) {
        __m512i sum[4][2];
        multiply(sum, v + kv_block_at(head_dim, b), weights[b], next, b, R);
        for (size_t r = 0; r < R; r++) {
            for (size_t o = 0; o < 2; o++) {
                float *to = out[r] + BLOCK * b + 16 * o;
                __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][o]), _mm512_set1_ps(factors[b][r]));
                if (!joint[r].first)
                    y = _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(joint[r].a),
                                        _mm512_mul_ps(y, _mm512_set1_ps(joint[r].c)));
                _mm512_storeu_ps(to, y);
            }
        }
    }
}

void avx512vnni_byte_values(float *const *out, const float *const *p, const struct joint *joint, const size_t *n,
                            size_t n_rows, const unsigned char *v, size_t head_dim, const unsigned char *next) {
    if (n_rows == 4) values(out, p, joint, n, v, head_dim, next, 4);
    else if (n_rows == 2) values(out, p, joint, n, v, head_dim, next, 2);
    else values(out, p, joint, n, v, head_dim, next, 1);
}

#endif
