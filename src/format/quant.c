// quant.c: GGUF's block formats to f32, bit for bit as the `gguf` Python package's reference dequantisers give them
// (gguf/quants.py). It owns the layouts; which type is which is dtype.c's.
//
// In the layouts below, numbers in brackets are bytes. The order of the float operations is part of the contract: a
// scale is multiplied first (d * scale), then the product with the element, then the minimum is subtracted.
#include "format/quant.h"

#include "format/dtype.h"

enum {
    SMALL_LEN = 32, // elements in a block of the simple types
    K_LEN = 256,    // elements in a superblock of the K types
    Q8_0_BYTES = 34,
    Q4_0_BYTES = 18,
    Q4_1_BYTES = 20,
    Q5_0_BYTES = 22,
    Q5_1_BYTES = 24,
    Q2_K_BYTES = 84,
    Q3_K_BYTES = 110,
    Q4_K_BYTES = 144,
    Q5_K_BYTES = 176,
    Q6_K_BYTES = 210,
};

static float half_at(const unsigned char *p) {
    return f16_to_f32((uint16_t)(p[0] | p[1] << 8));
}

static uint32_t word_at(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

// d [2], q [32] signed: y = q * d.
void quant_q8_0_to_f32(const unsigned char *src, float *dst, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, src += Q8_0_BYTES, dst += SMALL_LEN) {
        float d = half_at(src);
        for (int i = 0; i < SMALL_LEN; i++) dst[i] = (float)(signed char)src[2 + i] * d;
    }
}

// d [2], q [16]: low nibbles are elements 0 to 15, high ones 16 to 31: y = d * (q - 8).
void quant_q4_0_to_f32(const unsigned char *src, float *dst, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, src += Q4_0_BYTES, dst += SMALL_LEN) {
        float d = half_at(src);
        for (int i = 0; i < 16; i++) dst[i] = d * (float)((src[2 + i] & 15) - 8);
        for (int i = 0; i < 16; i++) dst[16 + i] = d * (float)((src[2 + i] >> 4) - 8);
    }
}

// d [2], m [2], q [16] as in Q4_0: y = d * q + m.
void quant_q4_1_to_f32(const unsigned char *src, float *dst, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, src += Q4_1_BYTES, dst += SMALL_LEN) {
        float d = half_at(src), m = half_at(src + 2);
        for (int i = 0; i < 16; i++) dst[i] = d * (float)(src[4 + i] & 15) + m;
        for (int i = 0; i < 16; i++) dst[16 + i] = d * (float)(src[4 + i] >> 4) + m;
    }
}

// The fifth bits of Q5_0 and Q5_1: bit i of `high` belongs to element i. Writes the 5-bit elements to q[32].
static void unpack_5(const unsigned char *low, uint32_t high, int q[SMALL_LEN]) {
    for (int i = 0; i < 16; i++) {
        q[i] = (low[i] & 15) | (int)((high >> i & 1) << 4);
        q[16 + i] = low[i] >> 4 | (int)((high >> (16 + i) & 1) << 4);
    }
}

// d [2], fifth bits [4], q [16] as in Q4_0: y = d * (q - 16).
void quant_q5_0_to_f32(const unsigned char *src, float *dst, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, src += Q5_0_BYTES, dst += SMALL_LEN) {
        float d = half_at(src);
        int q[SMALL_LEN];
        unpack_5(src + 6, word_at(src + 2), q);
        for (int i = 0; i < SMALL_LEN; i++) dst[i] = d * (float)(q[i] - 16);
    }
}

// d [2], m [2], fifth bits [4], q [16] as in Q4_0: y = d * q + m.
void quant_q5_1_to_f32(const unsigned char *src, float *dst, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, src += Q5_1_BYTES, dst += SMALL_LEN) {
        float d = half_at(src), m = half_at(src + 2);
        int q[SMALL_LEN];
        unpack_5(src + 8, word_at(src + 4), q);
        for (int i = 0; i < SMALL_LEN; i++) dst[i] = d * (float)q[i] + m;
    }
}

// scales [16] (low nibble scale, high nibble minimum, of 16 elements each), q [64], d [2], dmin [2]. Element
// 128 h + 32 s + l stands in bits 2s, 2s+1 of q[32 h + l]: y = (d * scale) * q - dmin * minimum.
void quant_q2_k_to_f32(const unsigned char *src, float *dst, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, src += Q2_K_BYTES, dst += K_LEN) {
        const unsigned char *q = src + 16;
        float d = half_at(src + 80), dmin = half_at(src + 82);
        for (int group = 0; group < 16; group++) { // 16 elements of one scale
            float scale = d * (float)(src[group] & 15), min = dmin * (float)(src[group] >> 4);
            const unsigned char *bytes = q + 32 * (group / 8) + 16 * (group % 2);
            int shift = 2 * (group / 2 % 4);
            for (int i = 0; i < 16; i++) dst[16 * group + i] = scale * (float)(bytes[i] >> shift & 3) - min;
        }
    }
}

// high bits [32], q [64] (as in Q2_K), scales [12], d [2]. The high bit of element 32 s + l is bit s of high[l]; where
// it is 0, 4 is subtracted. Scale k has its low 4 bits in nibble k / 8 of scales[k % 8] and its high 2 bits at 2 (k /
// 4) of scales[8 + k % 4], and is stored plus 32: y = (d * scale) * q.
void quant_q3_k_to_f32(const unsigned char *src, float *dst, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, src += Q3_K_BYTES, dst += K_LEN) {
        const unsigned char *q = src + 32, *scales = src + 96;
        float d = half_at(src + 108);
        for (int group = 0; group < 16; group++) {
            int low = scales[group % 8] >> 4 * (group / 8) & 15;
            int high = scales[8 + group % 4] >> 2 * (group / 4) & 3;
            float scale = d * (float)((low | high << 4) - 32);
            const unsigned char *bytes = q + 32 * (group / 8) + 16 * (group % 2);
            const unsigned char *mask = src + 16 * (group % 2);
            int shift = 2 * (group / 2 % 4), bit = group / 2;
            for (int i = 0; i < 16; i++) {
                int value = (bytes[i] >> shift & 3) - 4 + ((mask[i] >> bit & 1) << 2);
                dst[16 * group + i] = scale * (float)value;
            }
        }
    }
}

// The eight 6-bit scales and minima of Q4_K and Q5_K in 12 bytes: 0 to 3 in the low 6 bits of bytes 0 to 3 (scales) and
// 4 to 7 (minima); 4 to 7 in the nibbles of bytes 8 to 11, their top 2 bits in the top 2 bits of bytes 0 to 7.
static void unpack_scale_min(const unsigned char *packed, int k, float *scale, float *min) {
    if (k < 4) {
        *scale = (float)(packed[k] & 63);
        *min = (float)(packed[4 + k] & 63);
    } else {
        *scale = (float)((packed[4 + k] & 15) | (packed[k - 4] >> 2 & 48));
        *min = (float)(packed[4 + k] >> 4 | (packed[k] >> 2 & 48));
    }
}

// d [2], dmin [2], scales [12], q [128]: elements 64 g + l in the low nibbles of q[32 g + l], 64 g + 32 + l in the
// high: y = (d * scale) * q - dmin * minimum, a scale for 32 elements.
void quant_q4_k_to_f32(const unsigned char *src, float *dst, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, src += Q4_K_BYTES, dst += K_LEN) {
        float d = half_at(src), dmin = half_at(src + 2);
        for (int k = 0; k < 8; k++) {
            float scale, min;
            unpack_scale_min(src + 4, k, &scale, &min);
            scale = d * scale;
            min = dmin * min;
            const unsigned char *q = src + 16 + 32 * (k / 2);
            int shift = 4 * (k % 2);
            for (int i = 0; i < 32; i++) dst[32 * k + i] = scale * (float)(q[i] >> shift & 15) - min;
        }
    }
}

// d [2], dmin [2], scales [12], fifth bits [32], q [128]: as Q4_K, with bit k of high[l] above element 32 k + l.
void quant_q5_k_to_f32(const unsigned char *src, float *dst, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, src += Q5_K_BYTES, dst += K_LEN) {
        const unsigned char *high = src + 16;
        float d = half_at(src), dmin = half_at(src + 2);
        for (int k = 0; k < 8; k++) {
            float scale, min;
            unpack_scale_min(src + 4, k, &scale, &min);
            scale = d * scale;
            min = dmin * min;
            const unsigned char *q = src + 48 + 32 * (k / 2);
            int shift = 4 * (k % 2);
            for (int i = 0; i < 32; i++) {
                int value = (q[i] >> shift & 15) | (high[i] >> k & 1) << 4;
                dst[32 * k + i] = scale * (float)value - min;
            }
        }
    }
}

// low nibbles [128], high bits [64], scales [16] signed, d [2]. Of each half h of 128 elements, element 32 s + l has
// its low bits in nibble s / 2 of low[64 h + 32 (s % 2) + l] and its high 2 bits at 2 s of high[32 h + l]: y = (d *
// scale) * (q - 32), a scale for 16 elements.
void quant_q6_k_to_f32(const unsigned char *src, float *dst, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, src += Q6_K_BYTES, dst += K_LEN) {
        float d = half_at(src + 208);
        for (int group = 0; group < 16; group++) {
            int half = group / 8, s = group / 2 % 4, at = 16 * (group % 2);
            const unsigned char *low = src + 64 * half + 32 * (s % 2) + at;
            const unsigned char *high = src + 128 + 32 * half + at;
            float scale = d * (float)(signed char)src[192 + group];
            int nibble = 4 * (s / 2), shift = 2 * s;
            for (int i = 0; i < 16; i++) {
                int value = (low[i] >> nibble & 15) | (high[i] >> shift & 3) << 4;
                dst[16 * group + i] = scale * (float)(value - 32);
            }
        }
    }
}
