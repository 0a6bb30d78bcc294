// sampling.h: the arithmetic of choosing a token, for the host's sampler and for a device's: both include it, and both
// choose the same token. It uses what IEEE 754 defines to the bit: f32 and f64 additions and products, each rounded by
// itself (the build forbids contraction), conversions, integers. No library function is called.
//
// Of a row of logits, after biases and penalties (engine/sampler.c), at a temperature above 0:
//   order   a token is BETTER than another if its logit is higher; of equal ones the smaller id (-0 equals +0).
//   weight  floor(2^31 * 2^y), y = (logit - best logit) * (f32)scale in f32; 0 from y = -32 down. scale: log2 e / T.
//   score   logit * scale + noise, in f64. Noise is Gumbel's in powers of two, -log2(-ln u), u of (seed, position, id).
// Kept is a token for which all of these hold:
//   top_k   fewer than top_k tokens are better (0: off);
//   top_p   the weights of the better tokens add up to less than top_p times all weights of those that top_k keeps;
//   min_p   its weight is at least min_p * 2^31.
// The best token is always kept. Chosen is the kept token of the highest score; of equal ones the smaller id. By
// Gumbel's trick that is a draw from the softmax of what is kept. Weights are integers, so that their sums do not
// depend on an order.
#ifndef TANDEM_OPS_SAMPLING_H
#define TANDEM_OPS_SAMPLING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define SAMPLING static __host__ __device__ __forceinline__
#else
#define SAMPLING static inline
#endif

// How one row's token is chosen on a device.
struct sample_row {
    double scale; // sampling_scale of the temperature; 0: greedy, and nothing below but ban counts
    double top_p; // 1: off
    double min_p; // 0: off
    uint64_t seed;
    int32_t top_k; // 0: off
    int32_t ban;   // the batch's banned ids are never chosen
};

#define SAMPLING_ONE 0x80000000u // the best token's weight
#define SAMPLING_FEW 64          // with top_k up to this a device looks for the best tokens alone, and weighs no others

// Of a row of n tokens: whether top_k leaves any out; whether a filter does; and whether it is so small a top_k.
SAMPLING bool sampling_top_k_cuts(const struct sample_row *r, int n) {
    return r->top_k > 0 && r->top_k < n;
}

SAMPLING bool sampling_filters(const struct sample_row *r, int n) {
    return r->scale > 0 && (sampling_top_k_cuts(r, n) || r->top_p < 1 || r->min_p > 0);
}

SAMPLING bool sampling_keeps_few(const struct sample_row *r, int n) {
    return r->scale > 0 && sampling_top_k_cuts(r, n) && r->top_k <= SAMPLING_FEW;
}

// What the rows of a step ask for: the most of theirs.
enum sampling_filter {
    FILTER_NONE,
    FILTER_FEW, // sampling_keeps_few; and any top_p and min_p
    FILTER_ANY,
};

static inline enum sampling_filter sampling_filter(const struct sample_row *rows, size_t n, size_t n_vocab) {
    enum sampling_filter most = FILTER_NONE;
    for (size_t i = 0; i < n; i++) {
        if (!sampling_filters(&rows[i], (int)n_vocab)) continue;
        if (!sampling_keeps_few(&rows[i], (int)n_vocab)) return FILTER_ANY;
        most = FILTER_FEW;
    }
    return most;
}

SAMPLING uint32_t sampling_bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

SAMPLING float sampling_float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

SAMPLING double sampling_scale(double temperature) {
    double scale = 1.44269504088896340736 / temperature;
    return scale < 1e30 ? scale : 1e30;
}

// ---- Order

// A number that is larger for the better token; different for different ids. No NaN.
SAMPLING uint64_t sampling_place(float logit, int32_t id) {
    uint32_t u = sampling_bits_of(logit + 0.0f);
    u ^= u >> 31 ? 0xFFFFFFFFu : 0x80000000u;
    return (uint64_t)u << 32 | (0xFFFFFFFFu - (uint32_t)id);
}

// ---- Weight

// 2^f, f in (-1, 0]: 1 + f Q(f), Q fitted (minimax, relative error 4e-11) and rounded to f32.
SAMPLING float sampling_exp2_fraction(float f) {
    float q = 1.0787810e-5f;
    q = q * f + 1.4715387e-4f;
    q = q * f + 1.32766250e-3f;
    q = q * f + 9.61549394e-3f;
    q = q * f + 5.55034466e-2f;
    q = q * f + 0.240226433f;
    q = q * f + 0.693147182f;
    return 1.0f + f * q;
}

SAMPLING uint32_t sampling_weight(float logit, float best, float scale) {
    float y = (logit - best) * scale;
    if (!(y > -32.0f)) return 0;
    int n = (int)y; // towards 0
    return (uint32_t)(sampling_exp2_fraction(y - (float)n) * 2147483648.0f) >> -n;
}

// ---- Noise

// The finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
SAMPLING uint64_t sampling_mix(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// What all tokens of a row share.
SAMPLING uint64_t sampling_key(uint64_t seed, uint64_t position) {
    return sampling_mix(sampling_mix(seed) ^ position);
}

SAMPLING uint64_t sampling_random(uint64_t key, int32_t id) {
    return sampling_mix(key ^ (uint64_t)(uint32_t)id);
}

// ln(1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1]: f - f^2 / 2 + f^3 P(f), P fitted (minimax, relative error 6e-9).
SAMPLING float sampling_log1p(float f) {
    float p = -7.63227195e-2f;
    p = p * f + 0.127608553f;
    p = p * f + -0.131606355f;
    p = p * f + 0.142018825f;
    p = p * f + -0.166233271f;
    p = p * f + 0.200012207f;
    p = p * f + -0.250008225f;
    p = p * f + 0.333333313f;
    float z = f * f;
    return f - (0.5f * z - z * f * p);
}

// x = 2^result * (1 + *f), 1 + *f in [sqrt(1/2), sqrt(2)). x is normal and positive.
SAMPLING int sampling_split(float x, float *f) {
    const uint32_t root_half = 0x3F3504F3u;
    int32_t i = (int32_t)(sampling_bits_of(x) - root_half), exponent = i >> 23;
    *f = sampling_float_of(sampling_bits_of(x) - ((uint32_t)exponent << 23)) - 1.0f;
    return exponent;
}

// -log2(-ln u), u = random / 2^64. Where u is near 1 it is known by what it lacks to 1, so that the result's relative
// error is that of f32 everywhere.
SAMPLING float sampling_noise(uint64_t random) {
    float lacking = (float)(~random | 1) * 0x1p-64f, f;
    int e = 0;
    if (lacking < 0.25f) f = -lacking;
    else e = sampling_split((float)(random | 1) * 0x1p-64f, &f);
    float waited = -((float)e * 0.693147182f + sampling_log1p(f));
    e = sampling_split(waited, &f);
    return -((float)e + sampling_log1p(f) * 1.44269502f);
}

SAMPLING double sampling_score(float logit, double scale, float noise) {
    return (double)logit * scale + (double)noise;
}

// What sampling_loses takes of the highest score so far: a number that no score from there on is below, less a
// constant.
SAMPLING float sampling_below(double highest) {
    float f = (float)highest;
    return f * (f < 0 ? 1 + 0x1p-20f : 1 - 0x1p-20f) - (31.5f + 0x1p-12f);
}

// Whether a score is certainly lower than `highest`, of which `below` is sampling_below, as most are: in f32, and
// without the noise. (float)scale is the scale. Noise is at least n only where u lacks at most 2^-n to 1, since -ln u
// >= 1 - u: the first n bits of u are ones then. n is here the nearest integer to half less than what is wanted of the
// noise, up to 31; 2^-12 is more than what is rounded on the way.
SAMPLING int sampling_loses(float logit, float scale, uint64_t random, float below) {
    float x = logit * scale, low = x * (1 - 0x1p-20f), high = x * (1 + 0x1p-20f);
    float free = (low > high ? low : high) - below; // 31 - n, before it is rounded
    free = free < 31 ? free : 31;                   // NaN, too
    free = free > 0 ? free : 0;
    return (uint32_t)(~random >> 33) >> (sampling_bits_of(free + 0x1p23f) & 31) != 0;
}

#endif
