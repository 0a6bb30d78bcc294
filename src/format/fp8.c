// fp8.c: see fp8.h.
#include "format/fp8.h"

#include <string.h>

static uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

// To the nearest integer, ties to even, for 0 <= x < 2^22.
static uint32_t nearest(float x) {
    return bits_of(x + 8388608.0f) - bits_of(8388608.0f);
}

void fp8_from_f32(const float *x, void *blocks, size_t n) {
    unsigned char *block = blocks;
    for (; n > 0; n -= FP8_BLOCK, x += FP8_BLOCK, block += FP8_BLOCK_BYTES) {
        uint32_t max = 0;
        for (size_t i = 0; i < FP8_BLOCK; i++) {
            uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFFu;
            max = magnitude > max ? magnitude : max;
        }
        uint32_t s = fp8_scale(max);
        block[0] = (unsigned char)s;
        memset(block + 1, 0, FP8_BLOCK);
        if (s == FP8_NAN) continue;
        float inverse = float_of(fp8_inverse_bits(s));
        for (size_t i = 0; i < FP8_BLOCK; i++) {
            uint32_t bits = bits_of(x[i] * inverse);
            block[1 + i] = (unsigned char)fp8_round(bits, nearest(float_of(bits & 0x7FFFFFFFu) * 512.0f));
        }
    }
}

void fp8_to_f32(const void *blocks, float *x, size_t n) {
    const unsigned char *block = blocks;
    for (; n > 0; n -= FP8_BLOCK, x += FP8_BLOCK, block += FP8_BLOCK_BYTES) {
        float scale = float_of((uint32_t)block[0] << 23);
        for (size_t i = 0; i < FP8_BLOCK; i++) {
            uint32_t b = block[1 + i];
            x[i] = float_of((b & 0x80u) << 24 | (b & 0x7Fu) << 20) * scale;
        }
    }
}
