// dense.c: dot products with BF16 rows by vdpbf16ps, two products a lane at once.
//
// The instruction adds the odd element's product, then the even one's, each sum rounded to nearest: dotpair, as long as
// no product, sum or input is subnormal (it takes those as zero). Its rounding is not written down for every maker's
// CPU, so that avx512bf16_adds_pairs tries it before the table is offered.
#include "ops/cpu/avx512/avx512.h"

#if defined(__AVX512BF16__)

#include "ops/cpu/avx2/vec.h"

enum { STEP = 32 };

// Of each row's place for n floats the first half holds n bf16 values, in their order. In place: ascending, each 16
// values are read before anything is written behind them.
static void pack(float *to, const float *from, size_t n) {
    uint16_t *out = (uint16_t *)(void *)to;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512i v = _mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(from + i)), 16);
        _mm256_storeu_si256((__m256i *)(void *)(out + i), _mm512_cvtepi32_epi16(v));
    }
    for (; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        uint16_t upper = (uint16_t)(bits >> 16);
        memcpy(out + i, &upper, sizeof upper);
    }
}

struct step_input {
    __m512i pairs;
};

INLINE struct step_input load_input(const float *x, size_t k) {
    return (struct step_input){_mm512_loadu_si512((const uint8_t *)x + 2 * k)};
}

INLINE void step(enum dtype type, __m512 *sum, const uint8_t *w, const struct step_input *in, const size_t N) {
    (void)type;
    __m512i pairs = _mm512_loadu_si512(w);
    for (size_t t = 0; t < N; t++) sum[t] = _mm512_dpbf16_ps(sum[t], (__m512bh)pairs, (__m512bh)in[t].pairs);
}

static void tail(const struct matrix *w, size_t row, size_t k, float *acc, const float *x) {
    float last[STEP], in[STEP];
    size_t n = w->n_in - k;
    dtype_to_f32(DTYPE_BF16, (const uint8_t *)w->data + row * w->row_bytes + k * 2, last, n);
    dtype_to_f32(DTYPE_BF16, (const uint8_t *)x + k * 2, in, n);
    for (size_t i = 0; i < n; i += 2) {
        if (i + 1 < n) acc[i / 2] = fmaf(last[i + 1], in[i + 1], acc[i / 2]);
        acc[i / 2] = fmaf(last[i], in[i], acc[i / 2]);
    }
}

#include "ops/cpu/avx512/tiles.h"

static void dense(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    if (w->type == DTYPE_BF16) all_tokens(DTYPE_BF16, out, w, row, n_rows, x, n_tokens);
    else avx512_dense(out, w, row, n_rows, x, n_tokens);
}

// Many sums of random magnitudes, signs and cancellations against two fmas.
bool avx512bf16_adds_pairs(void) {
    uint64_t random = 1;
    for (int i = 0; i < 4096; i++) {
        uint32_t w[16], x[16];
        float acc[16], found[16];
        for (size_t l = 0; l < 16; l++) {
            uint32_t bits[5];
            for (size_t k = 0; k < 5; k++) { // exponents 2^-24 to 2^7, so that nothing is subnormal
                random = random * 6364136223846793005u + 1442695040888963407u;
                uint32_t r = (uint32_t)(random >> 32), exponent = 103 + (r >> 8) % 32;
                bits[k] = (r & 0x80000000u) | exponent << 23 | (r << 15 & 0x7F0000u);
            }
            w[l] = bits[0] >> 16 | (bits[1] & 0xFFFF0000u);
            x[l] = bits[2] >> 16 | (bits[3] & 0xFFFF0000u);
            acc[l] = float_from_bits(bits[4] | (uint32_t)(random >> 20 & 0xFFFF));
        }
        __m512 sum =
            _mm512_dpbf16_ps(_mm512_loadu_ps(acc), (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(x));
        _mm512_storeu_ps(found, sum);
        for (size_t l = 0; l < 16; l++) {
            float odd = fmaf(float_from_bits(w[l] & 0xFFFF0000u), float_from_bits(x[l] & 0xFFFF0000u), acc[l]);
            float both = fmaf(float_from_bits(w[l] << 16), float_from_bits(x[l] << 16), odd);
            if (float_bits(both) != float_bits(found[l])) return false;
        }
    }
    return true;
}

static const struct cpu_kernels kernels = {dense,
                                           avx512vnni_quantised,
                                           avx512vnni_pair,
                                           pack,
                                           &avx512bf16_lanes,
                                           AVX512_BESIDE,
                                           avx512_wide_scores,
                                           avx512_wide_values,
                                           avx512vnni_byte_scores,
                                           avx512vnni_byte_values};

void avx512bf16_fill(struct ops *ops) {
    ops->name = "cpu/avx512bf16";
    ops->kernels = &kernels;
}

#else

bool avx512bf16_adds_pairs(void) {
    return false;
}

void avx512bf16_fill(struct ops *ops) {
    (void)ops;
}

#endif
