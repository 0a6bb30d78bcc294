// activation.h: a token's activations as the products with quantised weights take them (ops.h: qdot): int8 in blocks of
// ACT_BLOCK with one f32 scale each, and the sums of the integers. It owns the scalar arithmetic and the place in the
// scratch; vector files repeat the arithmetic lane by lane.
#ifndef TANDEM_OPS_CPU_ACTIVATION_H
#define TANDEM_OPS_CPU_ACTIVATION_H

#include "ops/cpu/math.h"
#include "ops/ops.h"

#include <float.h>
#include <string.h>

enum { ACT_GROUP = 16 }; // the shortest group of any weight type

enum { ACT_TOKENS = 4 }; // tokens whose rows stand side by side for kernels that multiply so many at once

// Pointers into the scratch; n is a multiple of ACT_BLOCK. The portable ops use q and scale alone. Where `apart` rows
// stand side by side, four bytes of one (four elements of q, a scale, a pair of sums) are followed by those of the
// next.
struct act_row {
    int8_t *q;        // [n]
    float *scale;     // [n / ACT_BLOCK]
    float *weighted;  // [n / ACT_BLOCK] scale * (float)(sum of the block's q)
    int16_t *sum;     // [n / ACT_GROUP]
    int16_t *lanes16; // [n / ACT_GROUP, 2] sums of the q_i with i % 4 < 2, and of the others
    int16_t *lanes32; // [n / ACT_BLOCK, 2] the same of a block
    size_t apart;
};

// Floats of scratch that a row takes: at most n.
static inline size_t act_row_floats(size_t n) {
    return (n / 4 + 6 * (n / ACT_BLOCK) + 15) & ~(size_t)15;
}

// Row i of `apart` from `q` on.
static inline struct act_row act_row_of(float *q, size_t n, size_t i, size_t apart) {
    const size_t blocks = apart * (n / ACT_BLOCK);
    float *scale = q + apart * (n / 4), *weighted = scale + blocks, *sum = weighted + blocks;
    float *lanes16 = sum + blocks, *lanes32 = lanes16 + 2 * blocks;
    return (struct act_row){.q = (int8_t *)(q + i),
                            .scale = scale + i,
                            .weighted = weighted + i,
                            .sum = (int16_t *)(void *)(sum + i),
                            .lanes16 = (int16_t *)(void *)(lanes16 + i),
                            .lanes32 = (int16_t *)(void *)(lanes32 + i),
                            .apart = apart};
}

// Rows that stand one behind the other.
static inline struct act_row act_row_at(float *scratch, size_t n, size_t token) {
    return act_row_of(scratch + token * act_row_floats(n), n, 0, 1);
}

// Rows that stand side by side in groups of ACT_TOKENS, the last of n_tokens in a smaller one.
static inline struct act_row act_row_beside(float *scratch, size_t n, size_t token, size_t n_tokens) {
    const size_t i = token % ACT_TOKENS, first = token - i, left = n_tokens - first;
    return act_row_of(scratch + first * act_row_floats(n), n, i, left < ACT_TOKENS ? left : ACT_TOKENS);
}

// The integer nearest to v, ties to even, for |v| < 2^21.
static inline int32_t round_to_int(float v) {
    const float magic = 12582912.0f; // 1.5 * 2^23
    return (int32_t)(float_bits(v + magic) - float_bits(magic));
}

// One block; returns its scale. Below 2^-100 a block counts as zero; NaN or Inf makes the scale NaN.
static inline float act_block(const float *x, int8_t *q) {
    uint32_t max = 0;
    for (size_t i = 0; i < ACT_BLOCK; i++) {
        uint32_t bits = float_bits(x[i]) & 0x7FFFFFFFu;
        max = bits > max ? bits : max;
    }
    float largest = float_from_bits(max);
    if (!(largest >= 0x1p-100f && largest <= FLT_MAX)) {
        memset(q, 0, ACT_BLOCK);
        return largest < 0x1p-100f ? 0.0f : NAN;
    }
    float inverse = 127.0f / largest;
    for (size_t i = 0; i < ACT_BLOCK; i++) q[i] = (int8_t)round_to_int(x[i] * inverse);
    return largest / 127.0f;
}

#endif
