// activation.h: a token's activations as the products with quantised weights take them (ops.h: qdot): integers in
// blocks of ACT_BLOCK with one f32 scale each, of 8 bits with their sums, or of 13 bits for Q8_0. It owns the scalar
// arithmetic and the place in the scratch; vector files repeat the arithmetic lane by lane.
#ifndef TANDEM_OPS_CPU_ACTIVATION_H
#define TANDEM_OPS_CPU_ACTIVATION_H

#include "ops/cpu/math.h"
#include "ops/ops.h"

#include <float.h>
#include <string.h>

enum { ACT_GROUP = 16 }; // the shortest group of any weight type

// Pointers into the scratch; n is a multiple of ACT_BLOCK. One row holds both roundings, where weights of both kinds
// share an input. The portable ops use q, wide (in its own order) and their scales alone. Where `apart` rows stand side
// by side, four bytes of one (four elements of q, a scale, a pair of sums; of wide eight, four elements too) are
// followed by those of the next.
struct act_row {
    int8_t *q;         // [n]
    float *scale;      // [n / ACT_BLOCK]
    float *weighted;   // [n / ACT_BLOCK] scale * (float)(sum of the block's q)
    int16_t *sum;      // [n / ACT_GROUP]
    int16_t *lanes16;  // [n / ACT_GROUP, 2] sums of the q_i with i % 4 < 2, and of the others
    int16_t *lanes32;  // [n / ACT_BLOCK, 2] the same of a block
    int32_t *less;     // [n / ACT_BLOCK] -8 times the sum of the block's q
    int16_t *wide;     // [n] the integers of 13 bits, each four in the order 0, 2, 1, 3
    float *wide_scale; // [n / ACT_BLOCK]
    size_t apart;
};

// Floats of scratch that a row takes: at most n.
static inline size_t act_row_floats(size_t n) {
    return (n / 4 + n / 2 + 8 * (n / ACT_BLOCK) + 15) & ~(size_t)15;
}

// Row i of `apart` from `q` on.
static inline struct act_row act_row_of(float *q, size_t n, size_t i, size_t apart) {
    const size_t blocks = apart * (n / ACT_BLOCK);
    float *wide = q + apart * (n / 4), *wide_scale = wide + apart * (n / 2);
    float *scale = wide_scale + blocks, *weighted = scale + blocks, *sum = weighted + blocks;
    float *lanes16 = sum + blocks, *lanes32 = lanes16 + 2 * blocks, *less = lanes32 + blocks;
    return (struct act_row){.q = (int8_t *)(q + i),
                            .scale = scale + i,
                            .weighted = weighted + i,
                            .sum = (int16_t *)(void *)(sum + i),
                            .lanes16 = (int16_t *)(void *)(lanes16 + i),
                            .lanes32 = (int16_t *)(void *)(lanes32 + i),
                            .less = (int32_t *)(void *)(less + i),
                            .wide = (int16_t *)(void *)(wide + 2 * i),
                            .wide_scale = wide_scale + i,
                            .apart = apart};
}

// Rows that stand one behind the other.
static inline struct act_row act_row_at(float *scratch, size_t n, size_t token) {
    return act_row_of(scratch + token * act_row_floats(n), n, 0, 1);
}

// Rows that stand side by side in groups of `beside`, the last of n_tokens in a smaller one.
static inline struct act_row act_row_beside(float *scratch, size_t n, size_t token, size_t n_tokens, size_t beside) {
    const size_t i = token % beside, first = token - i, left = n_tokens - first;
    return act_row_of(scratch + first * act_row_floats(n), n, i, left < beside ? left : beside);
}

// Some columns of the rows that stand side by side: what a product reads of them, from a column and a token on.
struct act_tile {
    const int8_t *q;                  // [columns / 4][apart][4]
    const int16_t *wide;              // [columns / 4][apart][4]
    const int16_t *lanes16, *lanes32; // [columns / ACT_GROUP][apart][2], [columns / ACT_BLOCK][apart][2]
    const int32_t *less;              // [columns / ACT_BLOCK][apart]
    const float *scale, *weighted;    // [columns / ACT_BLOCK][apart]
    const float *wide_scale;          // [columns / ACT_BLOCK][apart]
    size_t apart;
};

// Columns from k on, a multiple of ACT_BLOCK; the other arguments: act_row_beside's.
static inline struct act_tile act_tile_at(const float *x, size_t n_in, size_t t, size_t n_tokens, size_t k,
                                          size_t beside) {
    struct act_row row = act_row_beside((float *)(uintptr_t)x, n_in, t, n_tokens, beside);
    return (struct act_tile){.q = row.q + k * row.apart,
                             .wide = row.wide + k * row.apart,
                             .lanes16 = row.lanes16 + k / ACT_GROUP * 2 * row.apart,
                             .lanes32 = row.lanes32 + k / ACT_BLOCK * 2 * row.apart,
                             .less = row.less + k / ACT_BLOCK * row.apart,
                             .scale = row.scale + k / ACT_BLOCK * row.apart,
                             .weighted = row.weighted + k / ACT_BLOCK * row.apart,
                             .wide_scale = row.wide_scale + k / ACT_BLOCK * row.apart,
                             .apart = row.apart};
}

// The integer nearest to v, ties to even, for |v| < 2^21.
static inline int32_t round_to_int(float v) {
    const float magic = 12582912.0f; // 1.5 * 2^23
    return (int32_t)(float_bits(v + magic) - float_bits(magic));
}

// What a block is multiplied with before it is rounded to integers of at most `most`; *scale: what they are multiplied
// with afterwards. Below 2^-100 a block counts as zero; NaN or Inf makes the scale NaN. Both return 0.
static inline float act_inverse(float largest, float most, float *scale) {
    if (!(largest >= 0x1p-100f && largest <= FLT_MAX)) {
        *scale = largest < 0x1p-100f ? 0.0f : NAN;
        return 0.0f;
    }
    *scale = largest / most;
    return most / largest;
}

static inline float act_largest(const float *x) {
    uint32_t max = 0;
    for (size_t i = 0; i < ACT_BLOCK; i++) {
        uint32_t bits = float_bits(x[i]) & 0x7FFFFFFFu;
        max = bits > max ? bits : max;
    }
    return float_from_bits(max);
}

// One block; returns its scale.
static inline float act_block(const float *x, int8_t *q) {
    float scale, inverse = act_inverse(act_largest(x), ACT_MOST, &scale);
    for (size_t i = 0; i < ACT_BLOCK; i++) q[i] = inverse > 0 ? (int8_t)round_to_int(x[i] * inverse) : 0;
    return scale;
}

// The same in 13 bits.
static inline float act_wide_block(const float *x, int16_t *q) {
    float scale, inverse = act_inverse(act_largest(x), ACT_MOST_WIDE, &scale);
    for (size_t i = 0; i < ACT_BLOCK; i++) q[i] = inverse > 0 ? (int16_t)round_to_int(x[i] * inverse) : 0;
    return scale;
}

#endif
