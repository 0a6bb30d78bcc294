// groups.c: see groups.h. The layouts are explained in quant.c.
#include "format/groups.h"

enum { SMALL_LEN = 32, K_LEN = 256 };

static float half_at(const uint8_t *p) {
    return f16_to_f32((uint16_t)(p[0] | p[1] << 8));
}

static uint32_t word_at(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

size_t dtype_group_len(enum dtype type) {
    return type == DTYPE_Q2_K || type == DTYPE_Q3_K || type == DTYPE_Q6_K ? 16 : 32;
}

bool dtype_has_min(enum dtype type) {
    return type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q2_K || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
}

// 32 nibbles in 16 bytes, low ones first, and their fifth bits; less `offset`.
static void nibbles(const uint8_t *from, uint32_t high, int offset, int8_t *q) {
    for (int i = 0; i < 16; i++) {
        q[i] = (int8_t)(((from[i] & 15) | (int)(high >> i & 1) << 4) - offset);
        q[16 + i] = (int8_t)((from[i] >> 4 | (int)(high >> (16 + i) & 1) << 4) - offset);
    }
}

static void small_block(enum dtype type, const uint8_t *b, int8_t *q, float *scale, float *min) {
    *scale = half_at(b);
    if (type == DTYPE_Q8_0) {
        for (int i = 0; i < SMALL_LEN; i++) q[i] = (int8_t)b[2 + i];
    } else if (type == DTYPE_Q4_0) {
        nibbles(b + 2, 0, 8, q);
    } else if (type == DTYPE_Q4_1) {
        *min = half_at(b + 2);
        nibbles(b + 4, 0, 0, q);
    } else if (type == DTYPE_Q5_0) {
        nibbles(b + 6, word_at(b + 2), 16, q);
    } else { // Q5_1
        *min = half_at(b + 2);
        nibbles(b + 8, word_at(b + 4), 0, q);
    }
}

// The 6-bit scale and minimum k of Q4_K and Q5_K.
static void scale_min(const uint8_t *packed, int k, float *scale, float *min) {
    if (k < 4) {
        *scale = (float)(packed[k] & 63);
        *min = (float)(packed[4 + k] & 63);
    } else {
        *scale = (float)((packed[4 + k] & 15) | (packed[k - 4] >> 2 & 48));
        *min = (float)(packed[4 + k] >> 4 | (packed[k] >> 2 & 48));
    }
}

// Q4_K, and Q5_K with `high`.
static void k_32(const uint8_t *b, const uint8_t *high, const uint8_t *low, int8_t *q, float *scale, float *min) {
    float d = half_at(b), dmin = half_at(b + 2);
    for (int k = 0; k < 8; k++) {
        scale_min(b + 4, k, &scale[k], &min[k]);
        scale[k] = d * scale[k];
        min[k] = -(dmin * min[k]);
        for (int i = 0; i < 32; i++)
            q[32 * k + i] = (int8_t)((low[32 * (k / 2) + i] >> 4 * (k % 2) & 15) | (high ? high[i] >> k & 1 : 0) << 4);
    }
}

static void q2_k(const uint8_t *b, int8_t *q, float *scale, float *min) {
    float d = half_at(b + 80), dmin = half_at(b + 82);
    for (int g = 0; g < 16; g++) {
        scale[g] = d * (float)(b[g] & 15);
        min[g] = -(dmin * (float)(b[g] >> 4));
        const uint8_t *bytes = b + 16 + 32 * (g / 8) + 16 * (g % 2);
        for (int i = 0; i < 16; i++) q[16 * g + i] = (int8_t)(bytes[i] >> 2 * (g / 2 % 4) & 3);
    }
}

static void q3_k(const uint8_t *b, int8_t *q, float *scale) {
    const uint8_t *scales = b + 96;
    float d = half_at(b + 108);
    for (int g = 0; g < 16; g++) {
        int low = scales[g % 8] >> 4 * (g / 8) & 15, high = scales[8 + g % 4] >> 2 * (g / 4) & 3;
        scale[g] = d * (float)((low | high << 4) - 32);
        const uint8_t *bytes = b + 32 + 32 * (g / 8) + 16 * (g % 2), *mask = b + 16 * (g % 2);
        for (int i = 0; i < 16; i++)
            q[16 * g + i] = (int8_t)((bytes[i] >> 2 * (g / 2 % 4) & 3) - 4 + ((mask[i] >> g / 2 & 1) << 2));
    }
}

static void q6_k(const uint8_t *b, int8_t *q, float *scale) {
    float d = half_at(b + 208);
    for (int g = 0; g < 16; g++) {
        int half = g / 8, s = g / 2 % 4, at = 16 * (g % 2);
        const uint8_t *low = b + 64 * half + 32 * (s % 2) + at, *high = b + 128 + 32 * half + at;
        scale[g] = d * (float)(int8_t)b[192 + g];
        for (int i = 0; i < 16; i++)
            q[16 * g + i] = (int8_t)(((low[i] >> 4 * (s / 2) & 15) | (high[i] >> 2 * s & 3) << 4) - 32);
    }
}

void dtype_to_groups(enum dtype type, const void *src, int8_t *q, float *scale, float *min, size_t n) {
    const struct dtype_info *info = dtype_info(type);
    size_t n_groups = info->block_len / dtype_group_len(type);
    const uint8_t *b = src;
    for (size_t done = 0; done < n; done += info->block_len, b += info->block_bytes) {
        if (info->block_len == SMALL_LEN) small_block(type, b, q, scale, min);
        else if (type == DTYPE_Q4_K) k_32(b, NULL, b + 16, q, scale, min);
        else if (type == DTYPE_Q5_K) k_32(b, b + 16, b + 48, q, scale, min);
        else if (type == DTYPE_Q2_K) q2_k(b, q, scale, min);
        else if (type == DTYPE_Q3_K) q3_k(b, q, scale);
        else q6_k(b, q, scale);
        q += info->block_len;
        scale += n_groups;
        min += n_groups;
    }
}
