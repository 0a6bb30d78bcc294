// noise.c: see noise.h. It knows the block layouts (quant.c describes them) only as far as random blocks need it.
#include "format/noise.h"

#include <string.h>

// splitmix64 (https://prng.di.unimi.it/splitmix64.c): turns numbers that differ little into seeds that differ much.
static uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

void noise_seed(struct noise *noise, uint64_t seed, uint64_t stream) {
    uint64_t state = mix(seed) ^ stream;
    for (int i = 0; i < NOISE_LANES; i++) {
        state = mix(state);
        noise->lane[i] = (uint32_t)(state >> 32) | 1u; // xorshift's one forbidden state is 0
    }
}

// Marsaglia's xorshift32, in every lane.
static inline void step(struct noise *noise) {
    for (int i = 0; i < NOISE_LANES; i++) {
        uint32_t x = noise->lane[i];
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        noise->lane[i] = x;
    }
}

void noise_floats(struct noise *noise, float *dst, size_t n, float deviation) {
    // The sum of two uniform numbers in [-1/2, 1/2): a triangle of standard deviation 1 / sqrt(6).
    const float scale = deviation * 2.4494897f / 65536.0f;
    for (size_t at = 0; at < n; at += NOISE_LANES) {
        step(noise);
        float v[NOISE_LANES];
        for (int i = 0; i < NOISE_LANES; i++) {
            int32_t sum = (int16_t)(noise->lane[i] & 0xFFFFu) + (int16_t)(noise->lane[i] >> 16);
            v[i] = (float)sum * scale;
        }
        memcpy(dst + at, v, (n - at < NOISE_LANES ? n - at : NOISE_LANES) * sizeof *v);
    }
}

static void random_bytes(struct noise *noise, unsigned char *dst, size_t n) {
    for (size_t at = 0; at < n; at += sizeof noise->lane) {
        step(noise);
        memcpy(dst + at, noise->lane, n - at < sizeof noise->lane ? n - at : sizeof noise->lane);
    }
}

static void put_half(unsigned char *p, float f) {
    uint16_t h = f16_from_f32(f);
    p[0] = (unsigned char)h;
    p[1] = (unsigned char)(h >> 8);
}

// Eight 6-bit scales of at least 32, and the same numbers as minima (see quant.c's unpack_scale_min).
static void put_scales_and_minima(unsigned char *packed) {
    unsigned char s[8];
    for (int k = 0; k < 8; k++) s[k] = (unsigned char)(32 | (packed[k] & 31));
    for (int k = 0; k < 4; k++) {
        packed[k] = packed[4 + k] = (unsigned char)(s[k] | (s[4 + k] >> 4) << 6);
        packed[8 + k] = (unsigned char)((s[4 + k] & 15) | (s[4 + k] & 15) << 4);
    }
}

// Sixteen 6-bit scales plus 32, each of a magnitude of at least 16 (see quant_q3_k_to_f32).
static void put_signed_scales(unsigned char *packed) {
    unsigned char s[16];
    for (int k = 0; k < 16; k++) {
        int random = packed[k % 12] ^ k * 37, magnitude = 16 + (random & 15);
        s[k] = (unsigned char)(32 + (random & 16 ? magnitude : -magnitude));
    }
    for (int k = 0; k < 8; k++) packed[k] = (unsigned char)((s[k] & 15) | (s[8 + k] & 15) << 4);
    for (int k = 0; k < 4; k++)
        packed[8 + k] = (unsigned char)(s[k] >> 4 | s[4 + k] >> 4 << 2 | s[8 + k] >> 4 << 4 | s[12 + k] >> 4 << 6);
}

static void keep_symmetric(unsigned char *q, int n) {
    for (int i = 0; i < n; i++)
        if (q[i] == 0x80) q[i] = 0x81; // -128 has no positive twin, and quantisers never write it
}

// Turns a block of random bytes into a valid one. `d` is a positive step such that the values have deviation 1 times
// what the table in noise_row says; `sign` is 1 or -1.
static void make_valid(enum dtype type, unsigned char *b, float d, float sign) {
    switch (type) {
    case DTYPE_Q8_0:
        put_half(b, d);
        keep_symmetric(b + 2, 32);
        break;
    case DTYPE_Q4_0:
    case DTYPE_Q5_0: put_half(b, sign * d); break; // codes reach one step further down than up: signs balance it
    case DTYPE_Q4_1:
        put_half(b, d);
        put_half(b + 2, -7.5f * d);
        break;
    case DTYPE_Q5_1:
        put_half(b, d);
        put_half(b + 2, -15.5f * d);
        break;
    case DTYPE_Q2_K:
        for (int k = 0; k < 16; k++) b[k] = (unsigned char)((8 | (b[k] & 7)) * 17);
        put_half(b + 80, d);
        put_half(b + 82, 1.5f * d);
        break;
    case DTYPE_Q3_K:
        put_signed_scales(b + 96);
        put_half(b + 108, d);
        break;
    case DTYPE_Q4_K:
        put_half(b, d);
        put_half(b + 2, 7.5f * d);
        put_scales_and_minima(b + 4);
        break;
    case DTYPE_Q5_K:
        put_half(b, d);
        put_half(b + 2, 15.5f * d);
        put_scales_and_minima(b + 4);
        break;
    case DTYPE_Q6_K:
        for (int k = 0; k < 16; k++) // magnitudes from 64 to 127
            b[192 + k] = (unsigned char)(b[192 + k] & 128 ? 129 + (b[192 + k] & 63) : 64 + (b[192 + k] & 63));
        put_half(b + 208, d);
        break;
    default: break;
    }
}

// The deviation of a block's values when its step is 1: that of equally likely codes, times the scales' RMS.
static float unit_deviation(enum dtype type) {
    switch (type) {
    case DTYPE_Q8_0: return 73.6f;
    case DTYPE_Q4_0: return 4.637f;
    case DTYPE_Q4_1: return 4.610f;
    case DTYPE_Q5_0: return 9.247f;
    case DTYPE_Q5_1: return 9.233f;
    case DTYPE_Q2_K: return 1.118f * 11.7f;
    case DTYPE_Q3_K: return 2.345f * 23.9f;
    case DTYPE_Q4_K: return 4.610f * 48.4f;
    case DTYPE_Q5_K: return 9.233f * 48.4f;
    case DTYPE_Q6_K: return 18.48f * 97.3f;
    default: return 1;
    }
}

void noise_row(struct noise *noise, enum dtype type, unsigned char *dst, size_t n, float deviation) {
    const struct dtype_info *info = dtype_info(type);
    if (!info->is_quantised) {
        enum { PIECE = 256 };
        float v[PIECE];
        for (size_t at = 0; at < n; at += PIECE, dst += PIECE * info->block_bytes) {
            size_t piece = n - at < PIECE ? n - at : PIECE;
            noise_floats(noise, v, piece, deviation);
            for (size_t i = 0; i < piece; i++) {
                uint16_t h = type == DTYPE_BF16 ? bf16_from_f32(v[i]) : type == DTYPE_F16 ? f16_from_f32(v[i]) : 0;
                if (type == DTYPE_F32) memcpy(dst + 4 * i, &v[i], 4);
                else memcpy(dst + 2 * i, &h, 2);
            }
        }
        return;
    }
    float step_size = deviation / unit_deviation(type);
    for (size_t at = 0; at < n; at += info->block_len, dst += info->block_bytes) {
        random_bytes(noise, dst, info->block_bytes);
        uint32_t random = noise->lane[0];
        float jitter = 0.75f + 0.5f * (float)(random & 0xFFFFu) / 65536.0f; // real blocks differ in scale too
        make_valid(type, dst, step_size * jitter, random >> 31 ? -1.0f : 1.0f);
    }
}
