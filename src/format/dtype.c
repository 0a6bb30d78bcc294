// dtype.c: the table of element types, and conversion of plain ones; block types are quant.c's.
#include "format/dtype.h"

#include "base/size.h"
#include "format/fp8.h"
#include "format/quant.h"

#include <string.h>
#include <strings.h>

static const struct dtype_info infos[DTYPE_COUNT] = {
    [DTYPE_F32] = {"F32", 1, 4, false, true},      [DTYPE_F16] = {"F16", 1, 2, false, true},
    [DTYPE_BF16] = {"BF16", 1, 2, false, true},    [DTYPE_Q8_0] = {"Q8_0", 32, 34, true, true},
    [DTYPE_Q4_0] = {"Q4_0", 32, 18, true, true},   [DTYPE_Q4_1] = {"Q4_1", 32, 20, true, true},
    [DTYPE_Q5_0] = {"Q5_0", 32, 22, true, true},   [DTYPE_Q5_1] = {"Q5_1", 32, 24, true, true},
    [DTYPE_Q2_K] = {"Q2_K", 256, 84, true, true},  [DTYPE_Q3_K] = {"Q3_K", 256, 110, true, true},
    [DTYPE_Q4_K] = {"Q4_K", 256, 144, true, true}, [DTYPE_Q5_K] = {"Q5_K", 256, 176, true, true},
    [DTYPE_Q6_K] = {"Q6_K", 256, 210, true, true}, [DTYPE_FP8] = {"FP8", 32, 33, true, false},
    [DTYPE_F64] = {"F64", 1, 8, false, false},     [DTYPE_I8] = {"I8", 1, 1, false, false},
    [DTYPE_U8] = {"U8", 1, 1, false, false},       [DTYPE_I16] = {"I16", 1, 2, false, false},
    [DTYPE_I32] = {"I32", 1, 4, false, false},     [DTYPE_I64] = {"I64", 1, 8, false, false},
    [DTYPE_BOOL] = {"BOOL", 1, 1, false, false},
};

const struct dtype_info *dtype_info(enum dtype type) {
    return &infos[type];
}

bool dtype_from_name(const char *name, enum dtype *out) {
    for (int i = 0; i < DTYPE_COUNT; i++) {
        if (strcasecmp(name, infos[i].name) == 0) {
            *out = (enum dtype)i;
            return true;
        }
    }
    return false;
}

bool dtype_row_bytes(enum dtype type, size_t n, size_t *out) {
    const struct dtype_info *info = &infos[type];
    return n % info->block_len == 0 && size_mul(n / info->block_len, info->block_bytes, out);
}

// Exact, and without branches, so that a loop over it becomes vector code. A normal number only needs its exponent
// moved from bias 15 to bias 127; a subnormal m * 2^-24 is what (0.5 with m as its low bits) - 0.5 gives; for infinity
// and NaN the exponent moves on to 255. No step meets an f32 subnormal, so flush-to-zero cannot change it.
static inline float widen_f16(uint32_t h) {
    union {
        uint32_t u;
        float f;
    } normal, subnormal;
    uint32_t magnitude = h & 0x7FFFu;
    uint32_t is_subnormal = 0u - (uint32_t)(magnitude < 0x400u), is_special = 0u - (uint32_t)(magnitude >= 0x7C00u);
    normal.u = (magnitude << 13) + (112u << 23) + (is_special & 112u << 23);
    subnormal.u = 0x3F000000u | magnitude;
    subnormal.f -= 0.5f;
    normal.u = (subnormal.u & is_subnormal) | (normal.u & ~is_subnormal) | (h & 0x8000u) << 16;
    return normal.f;
}

float f16_to_f32(uint16_t h) {
    return widen_f16(h);
}

uint16_t f16_from_f32(float f) {
    union {
        float f;
        uint32_t u;
    } v = {.f = f};
    uint16_t sign = (uint16_t)(v.u >> 16 & 0x8000);
    uint32_t u = v.u & 0x7FFFFFFFu;
    if (u > 0x7F800000u) return (uint16_t)(sign | 0x7E00u | (u >> 13 & 0x3FFu)); // NaN, quiet
    if (u >= 0x47800000u) return (uint16_t)(sign | 0x7C00u);                     // 2^16 and up
    if (u < 0x33000000u) return sign;                                            // below 2^-25
    if (u < 0x38800000u) { // below 2^-14: subnormal; the shift that leaves multiples of 2^-24
        uint32_t shift = 126u - (u >> 23), mantissa = (u & 0x7FFFFFu) | 0x800000u;
        uint32_t half = 1u << (shift - 1), kept = mantissa >> shift;
        return (uint16_t)(sign | (kept + (((mantissa & (2 * half - 1)) + (kept & 1)) > half)));
    }
    u -= 112u << 23;
    return (uint16_t)(sign | ((u + 0xFFFu + (u >> 13 & 1u)) >> 13)); // a carry out of 65504 ends at infinity
}

static void f16_row_to_f32(const unsigned char *src, float *dst, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, src + 2 * i, sizeof h);
        dst[i] = widen_f16(h);
    }
}

static void bf16_row_to_f32(const unsigned char *src, float *dst, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, src + 2 * i, sizeof h);
        dst[i] = bf16_to_f32(h);
    }
}

void dtype_to_f32(enum dtype type, const void *src, float *dst, size_t n) {
    const unsigned char *bytes = src;
    size_t n_blocks = n / infos[type].block_len;
    switch (type) {
    case DTYPE_F32:
        if (n) memcpy(dst, src, n * sizeof *dst);
        break;
    case DTYPE_F16: f16_row_to_f32(bytes, dst, n); break;
    case DTYPE_BF16: bf16_row_to_f32(bytes, dst, n); break;
    case DTYPE_FP8: fp8_to_f32(src, dst, n); break;
    case DTYPE_Q8_0: quant_q8_0_to_f32(bytes, dst, n_blocks); break;
    case DTYPE_Q4_0: quant_q4_0_to_f32(bytes, dst, n_blocks); break;
    case DTYPE_Q4_1: quant_q4_1_to_f32(bytes, dst, n_blocks); break;
    case DTYPE_Q5_0: quant_q5_0_to_f32(bytes, dst, n_blocks); break;
    case DTYPE_Q5_1: quant_q5_1_to_f32(bytes, dst, n_blocks); break;
    case DTYPE_Q2_K: quant_q2_k_to_f32(bytes, dst, n_blocks); break;
    case DTYPE_Q3_K: quant_q3_k_to_f32(bytes, dst, n_blocks); break;
    case DTYPE_Q4_K: quant_q4_k_to_f32(bytes, dst, n_blocks); break;
    case DTYPE_Q5_K: quant_q5_k_to_f32(bytes, dst, n_blocks); break;
    case DTYPE_Q6_K: quant_q6_k_to_f32(bytes, dst, n_blocks); break;
    case DTYPE_F64:
    case DTYPE_I8:
    case DTYPE_U8:
    case DTYPE_I16:
    case DTYPE_I32:
    case DTYPE_I64:
    case DTYPE_BOOL:
    case DTYPE_COUNT: break; // no weights: the caller checked is_weight
    }
}
