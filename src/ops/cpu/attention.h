// attention.h: the scalar arithmetic that every CPU's attention over K and V of Q8_0 shares (formula: struct
// attention_args). Vector files repeat it lane by lane. It owns no loops over positions.
#ifndef TANDEM_OPS_CPU_ATTENTION_H
#define TANDEM_OPS_CPU_ATTENTION_H

#include "ops/cpu/activation.h"
#include "ops/kv_page.h"

enum { MOST_HEAD_DIM = 512 }; // of a head whose q is rounded

// Rounds a head of q, [n], to integers; returns f.
static inline float attn_round_query(const float *q, int16_t *to, size_t n) {
    uint32_t max = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = float_bits(q[i]) & 0x7FFFFFFFu;
        max = bits > max ? bits : max;
    }
    float largest = float_from_bits(max);
    if (!(largest >= 0x1p-100f && largest <= FLT_MAX)) {
        memset(to, 0, n * sizeof *to);
        return largest < 0x1p-100f ? 0.0f : NAN;
    }
    float inverse = 32767.0f / largest;
    for (size_t i = 0; i < n; i++) to[i] = (int16_t)round_to_int(q[i] * inverse);
    return largest / 32767.0f;
}

// What a block's probabilities times scales are multiplied with before they are rounded, from the bits of D; *factor:
// what the sum of their products is multiplied with.
static inline float attn_weight_scale(uint16_t most, float *factor) {
    float d = f16_to_f32(most);
    if (!(d <= 65504.0f)) return *factor = NAN, 0.0f;
    *factor = d / 32767.0f;
    return d > 0.0f ? 32767.0f / d : 0.0f;
}

#endif
