// activation.c: what a matmul's input is rounded to, for those who judge its result. The ops round for themselves.
#include "ops/cpu/activation.h"

void ops_round_activation(enum dtype weights, const float *x, double *out, size_t n) {
    if (weights == DTYPE_BF16) {
        for (size_t i = 0; i < n; i++) out[i] = (double)bf16_to_f32(bf16_from_f32(x[i]));
    } else if (!dtype_info(weights)->is_quantised) {
        for (size_t i = 0; i < n; i++) out[i] = (double)x[i];
    } else if (!ops_rounds_to_int8(weights)) {
        for (size_t at = 0; at + ACT_BLOCK <= n; at += ACT_BLOCK) {
            int16_t q[ACT_BLOCK];
            double scale = (double)act_wide_block(x + at, q);
            for (size_t i = 0; i < ACT_BLOCK; i++) out[at + i] = scale * (double)q[i];
        }
    } else {
        for (size_t at = 0; at + ACT_BLOCK <= n; at += ACT_BLOCK) {
            int8_t q[ACT_BLOCK];
            double scale = (double)act_block(x + at, q);
            for (size_t i = 0; i < ACT_BLOCK; i++) out[at + i] = scale * (double)q[i];
        }
    }
}

bool ops_rounds_to_int8(enum dtype weights) {
    return dtype_info(weights)->is_quantised && weights != DTYPE_Q8_0;
}

enum dtype ops_input_rule(const struct ops *ops, enum dtype weights) {
    return ops->device && dtype_info(weights)->is_quantised ? DTYPE_BF16 : weights;
}
