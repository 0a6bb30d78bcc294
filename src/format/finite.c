// finite.c: see finite.h. Loops without an early end, so that they become vector code.
#include "format/finite.h"

#include <string.h>

// n numbers of 16 bits, `stride` bytes apart: whether the exponent of none is all ones.
static inline bool finite_16(const unsigned char *p, size_t n, size_t stride, uint16_t exponent) {
    uint16_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, p + i * stride, sizeof h);
        bad |= (uint16_t)((h & exponent) == exponent);
    }
    return !bad;
}

static bool finite_f32(const unsigned char *p, size_t n) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, p + 4 * i, sizeof u);
        bad |= (uint32_t)((u & 0x7F800000u) == 0x7F800000u);
    }
    return !bad;
}

// Where a block's f16 numbers stand: the scale, and in some types a minimum behind it (layouts: quant.c).
static size_t halves_of(enum dtype type, size_t *n) {
    *n = type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q2_K || type == DTYPE_Q4_K || type == DTYPE_Q5_K ? 2
                                                                                                                    : 1;
    return type == DTYPE_Q2_K ? 80 : type == DTYPE_Q3_K ? 108 : type == DTYPE_Q6_K ? 208 : 0;
}

bool dtype_is_finite(enum dtype type, const void *src, size_t n) {
    const unsigned char *p = src;
    if (type == DTYPE_F32) return finite_f32(p, n);
    if (type == DTYPE_BF16) return finite_16(p, n, 2, 0x7F80);
    if (type == DTYPE_F16) return finite_16(p, n, 2, 0x7C00);
    size_t n_halves, at = halves_of(type, &n_halves), n_blocks = n / dtype_info(type)->block_len;
    bool finite = finite_16(p + at, n_blocks, dtype_info(type)->block_bytes, 0x7C00);
    if (n_halves == 2) finite = finite_16(p + at + 2, n_blocks, dtype_info(type)->block_bytes, 0x7C00) && finite;
    return finite;
}
