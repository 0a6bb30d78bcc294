// math.h: the scalar arithmetic that every CPU op shares: the order of sums, and the exponential. Vector files repeat
// the same operations lane by lane. It owns no loops over tensors.
#ifndef TANDEM_OPS_CPU_MATH_H
#define TANDEM_OPS_CPU_MATH_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum { DOT_LANES = 16 };

// The fixed tree that ends dot16 and sum16 (ops.h).
static inline float dot16_reduce(float acc[DOT_LANES]) {
    for (size_t half = DOT_LANES / 2; half > 0; half /= 2)
        for (size_t l = 0; l < half; l++) acc[l] += acc[l + half];
    return acc[0];
}

// dot16 of f32 values.
static inline float dot16_f32(const float *a, const float *b, size_t n) {
    float acc[DOT_LANES] = {0};
    for (size_t k = 0; k < n; k++) acc[k % DOT_LANES] = fmaf(a[k], b[k], acc[k % DOT_LANES]);
    return dot16_reduce(acc);
}

// Where element k of n stands in a vector dealt out for dotpair: of each whole 32 elements the 16 odd ones, then the 16
// even ones; the rest stays as it is. (Sums of pairs in one loop would need no dealing, but gcc 12 at -O3 compiles them
// to other sums.)
static inline size_t dealt_place(size_t k, size_t n) {
    size_t block = k / 32 * 32;
    return block + 32 > n ? k : block + (k % 2 ? 0 : DOT_LANES) + k % 32 / 2;
}

// dotpair of dealt vectors of values that bf16 can hold. Their product has 16 significant bits, so that it is exact in
// f32 (unless it is subnormal or overflows) and a product and a sum give fma's bits without its call.
static inline float dotpair_bf16(const float *a, const float *b, size_t n) {
    float acc[DOT_LANES] = {0};
    size_t k = 0, whole = n / 32 * 32;
    for (; k < whole; k += DOT_LANES)
        for (size_t l = 0; l < DOT_LANES; l++) acc[l] += a[k + l] * b[k + l];
    for (size_t l = 0; k < n; l++, k += 2) {
        if (k + 1 < n) acc[l] += a[k + 1] * b[k + 1];
        acc[l] += a[k] * b[k];
    }
    return dot16_reduce(acc);
}

static inline float sum16_f32(const float *a, size_t n) {
    float acc[DOT_LANES] = {0};
    for (size_t k = 0; k < n; k++) acc[k % DOT_LANES] += a[k];
    return dot16_reduce(acc);
}

static inline float float_from_bits(uint32_t u) {
    union {
        uint32_t u;
        float f;
    } v = {.u = u};
    return v.f;
}

static inline uint32_t float_bits(float f) {
    union {
        float f;
        uint32_t u;
    } v = {.f = f};
    return v.u;
}

// e^x: n = the integer nearest to x / ln 2, r = x - n ln 2 (ln 2 in two parts), Taylor's polynomial of degree 7 for
// e^r on |r| <= 0.347 (its remainder is below 0.05 ulp), times 2^n in two exact-or-final steps, so that subnormal
// results are rounded once. exp32(-inf) = 0, exp32(+inf) = +inf, NaN stays NaN.
static inline float exp32(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.5f ? -104.5f : x;
    const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    float t = fmaf(x, 0x1.715476p+0f, magic);
    float n = t - magic;
    float r = fmaf(-n, 0x1.62e400p-1f, x);
    r = fmaf(-n, 0x1.7f7d1cp-20f, r);
    float p = 1.0f / 5040.0f;
    p = fmaf(p, r, 1.0f / 720.0f);
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    int32_t e = (int32_t)(float_bits(t) - float_bits(magic));
    int32_t e1 = e >> 1, e2 = e - e1;
    return p * float_from_bits((uint32_t)(e1 + 127) << 23) * float_from_bits((uint32_t)(e2 + 127) << 23);
}

#endif
