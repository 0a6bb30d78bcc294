// quantize.c: see quantize.h. Codes are kept as floats while they are fitted.
#include "format/quantize.h"

#include <math.h>
#include <string.h>

enum { SMALL = 32, SUPER = 256, MOST_CANDIDATES = 21 };

static void put_half(unsigned char *p, float f) {
    uint16_t h = f16_from_f32(f);
    p[0] = (unsigned char)h;
    p[1] = (unsigned char)(h >> 8);
}

// As it will be stored; what f16 cannot hold becomes its largest number, never Inf.
static float as_half(float f) {
    return f16_to_f32(f16_from_f32(f < -65504 ? -65504 : f > 65504 ? 65504 : f));
}

// Four lanes at a time, in any instruction set: the compilers' vector extension.
typedef float vec __attribute__((vector_size(16)));
typedef int32_t mask __attribute__((vector_size(16)));

static inline vec all(float f) {
    return (vec){f, f, f, f};
}

static inline vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline vec either(mask m, vec yes, vec no) {
    return (vec)(((mask)yes & m) | ((mask)no & ~m));
}

static inline float total(vec v) {
    return (v[0] + v[1]) + (v[2] + v[3]);
}

static inline float nearest(float x) { // ties to even, for magnitudes below 2^22
    return (x + 12582912.0f) - 12582912.0f;
}

static inline float clamp(float x, float low, float high) {
    return x < low ? low : x > high ? high : x;
}

// What one encoding of a block gives: the squared error, and sums over its values and codes.
struct sums {
    float error, q, qq, xq, x;
};

// q = round((x - m) / d) in [low, high]: the codes of y = d q + m for n (a multiple of 4) values.
static struct sums encode(const float *x, int n, float d, float m, float low, float high, float *q) {
    float inverse = d != 0 ? 1 / d : 0;
    if (!isfinite(inverse)) inverse = 0; // a subnormal step: everything is 0
    vec error = all(0), sq = error, sqq = error, sxq = error, sx = error;
    for (int i = 0; i < n; i += 4) {
        vec v = load(x + i), code = (v - all(m)) * all(inverse);
        code = (code + all(12582912.0f)) - all(12582912.0f); // as in nearest(); beyond its range it stays out of range
        code = either(code < all(low), all(low), code);
        code = either(code > all(high), all(high), code);
        vec off = v - (all(d) * code + all(m));
        memcpy(q + i, &code, sizeof code);
        error += off * off;
        sq += code;
        sqq += code * code;
        sxq += v * code;
        sx += v;
    }
    return (struct sums){total(error), total(sq), total(sqq), total(sxq), total(sx)};
}

// The element of the largest magnitude.
static float largest(const float *x, int n) {
    float most = 0;
    for (int i = 0; i < n; i++)
        if (fabsf(x[i]) > fabsf(most)) most = x[i];
    return most;
}

// ---- y = d q, q in [low, high]

// The best step for a block, rounded to f16 if `half`. Writes the codes.
static float fit_step(const float *x, int n, float low, float high, int n_candidates, bool half, float *q) {
    float best_codes[SMALL], most = largest(x, n), best = 0, least = INFINITY;
    if (most == 0) {
        memset(q, 0, (size_t)n * sizeof *q);
        return 0;
    }
    for (int k = 0; k < n_candidates; k++) {
        // Scales around that which sends the largest magnitude to the farthest code, which is `low`; the first is it.
        float reach = k == 0 ? low : low + (float)(k - n_candidates / 2) * 0.1f;
        float d = half ? as_half(most / reach) : most / reach;
        for (int round = 0; round < 2; round++) {
            struct sums s = encode(x, n, d, 0, low, high, best_codes);
            if (s.error < least) {
                least = s.error;
                best = d;
                memcpy(q, best_codes, (size_t)n * sizeof *q);
            }
            if (s.qq == 0) break;
            d = half ? as_half(s.xq / s.qq) : s.xq / s.qq;
        }
    }
    if (least == INFINITY) memset(q, 0, (size_t)n * sizeof *q);
    return best;
}

static void q8_0(const float *x, unsigned char *dst) {
    float q[SMALL], most = fabsf(largest(x, SMALL)), d = as_half(most / 127);
    float other[SMALL];
    struct sums s = encode(x, SMALL, d, 0, -127, 127, q);
    float fitted = s.qq > 0 ? as_half(s.xq / s.qq) : d;
    if (encode(x, SMALL, fitted, 0, -127, 127, other).error < s.error) {
        d = fitted;
        memcpy(q, other, sizeof q);
    }
    put_half(dst, d);
    for (int i = 0; i < SMALL; i++) dst[2 + i] = (unsigned char)(signed char)q[i];
}

// Codes of four bits, as in Q4_0: 0 to 15 in the low nibbles, 16 to 31 in the high ones.
static void put_nibbles(const float *q, float offset, unsigned char *dst) {
    for (int i = 0; i < 16; i++)
        dst[i] = (unsigned char)(((int)(q[i] + offset) & 15) | ((int)(q[16 + i] + offset) & 15) << 4);
}

static void put_fifth_bits(const float *q, float offset, unsigned char *dst) {
    uint32_t high = 0;
    for (int i = 0; i < SMALL; i++) high |= (uint32_t)((int)(q[i] + offset) >> 4 & 1) << i;
    for (int i = 0; i < 4; i++) dst[i] = (unsigned char)(high >> 8 * i);
}

static void q4_0(const float *x, unsigned char *dst) {
    float q[SMALL];
    put_half(dst, fit_step(x, SMALL, -8, 7, MOST_CANDIDATES, true, q));
    put_nibbles(q, 8, dst + 2);
}

static void q5_0(const float *x, unsigned char *dst) {
    float q[SMALL];
    put_half(dst, fit_step(x, SMALL, -16, 15, MOST_CANDIDATES, true, q));
    put_fifth_bits(q, 16, dst + 2);
    put_nibbles(q, 16, dst + 6);
}

// ---- y = d q + m, q in [0, high]

struct line {
    float d, m;
};

// The best line for a block; with `below`, m <= 0. `half`: both rounded to f16. Writes the codes.
static struct line fit_line(const float *x, int n, float high, bool below, bool half, float *q) {
    float codes[SMALL], low = x[0], top = x[0], least = INFINITY;
    struct line best = {0, 0};
    for (int i = 1; i < n; i++) {
        if (x[i] < low) low = x[i];
        if (x[i] > top) top = x[i];
    }
    if (below && low > 0) low = 0;
    for (int k = 0; k < 16; k++) {
        // The whole range, then ranges cut at both ends by up to 1.5 steps.
        float cut = (float)k * 0.1f * (top - low) / high / 2;
        struct line at = {(top - low - 2 * cut) / high, low + cut};
        for (int round = 0; round < 3; round++) {
            if (below && at.m > 0) at.m = 0;
            if (half) at = (struct line){as_half(at.d), as_half(at.m)};
            struct sums s = encode(x, n, at.d, at.m, 0, high, codes);
            if (s.error < least) {
                least = s.error;
                best = at;
                memcpy(q, codes, (size_t)n * sizeof *q);
            }
            float det = (float)n * s.qq - s.q * s.q;
            if (det <= 0) break;
            at.d = ((float)n * s.xq - s.q * s.x) / det;
            at.m = (s.x - at.d * s.q) / (float)n;
            if (below && at.m > 0 && s.qq > 0) at = (struct line){s.xq / s.qq, 0};
        }
    }
    if (least == INFINITY) memset(q, 0, (size_t)n * sizeof *q);
    return best;
}

static void q4_1(const float *x, unsigned char *dst) {
    float q[SMALL];
    struct line l = fit_line(x, SMALL, 15, false, true, q);
    put_half(dst, l.d);
    put_half(dst + 2, l.m);
    put_nibbles(q, 0, dst + 4);
}

static void q5_1(const float *x, unsigned char *dst) {
    float q[SMALL];
    struct line l = fit_line(x, SMALL, 31, false, true, q);
    put_half(dst, l.d);
    put_half(dst + 2, l.m);
    put_fifth_bits(q, 0, dst + 4);
    put_nibbles(q, 0, dst + 8);
}

// ---- K types: superblocks of 256

// The scales and minima of a superblock's parts as they are stored: whole numbers in [0, most], times d and dmin.
struct superblock {
    float d, dmin;
    float scale[16], minimum[16];
};

// Rounds the parts' own lines to a superblock's, then fits d and dmin to the codes that follow, twice.
static void fit_superblock(const float *x, int n_parts, int part_len, float high, float most, struct superblock *out,
                           float *q) {
    struct line lines[16];
    float top_d = 0, top_m = 0, least = INFINITY, codes[SUPER];
    for (int p = 0; p < n_parts; p++) {
        lines[p] = fit_line(x + (ptrdiff_t)p * part_len, part_len, high, true, false, codes);
        if (lines[p].d > top_d) top_d = lines[p].d;
        if (-lines[p].m > top_m) top_m = -lines[p].m;
    }
    struct superblock b = {.d = as_half(top_d / most), .dmin = as_half(top_m / most)};
    for (int round = 0; round < 3; round++) {
        float error = 0, ss = 0, sm = 0, mm = 0, xs = 0, xm = 0;
        for (int p = 0; p < n_parts; p++) {
            const float *part = x + (ptrdiff_t)p * part_len;
            float *c = codes + (ptrdiff_t)p * part_len;
            struct sums sums = {.error = INFINITY};
            float ideal_s = b.d > 0 ? lines[p].d / b.d : 0, ideal_m = b.dmin > 0 ? -lines[p].m / b.dmin : 0;
            // The nearest whole numbers of both, and their neighbours.
            for (int k = 0; k < 9; k++) {
                float s = clamp(nearest(ideal_s) + (float)(k % 3 - 1), 0, most), try[SMALL];
                float m = clamp(nearest(ideal_m) + (float)(k / 3 - 1), 0, most);
                struct sums e = encode(part, part_len, b.d * s, -(b.dmin * m), 0, high, try);
                if (e.error >= sums.error) continue;
                sums = e;
                b.scale[p] = s;
                b.minimum[p] = m;
                memcpy(c, try, (size_t)part_len * sizeof *c);
            }
            error += sums.error;
            ss += b.scale[p] * b.scale[p] * sums.qq;
            sm += b.scale[p] * b.minimum[p] * sums.q;
            mm += b.minimum[p] * b.minimum[p] * (float)part_len;
            xs += b.scale[p] * sums.xq;
            xm += b.minimum[p] * sums.x;
        }
        if (error < least) {
            least = error;
            *out = b;
            memcpy(q, codes, SUPER * sizeof *q);
        }
        // d and dmin that minimise |x - d s q + dmin m|^2 over the superblock.
        float det = ss * mm - sm * sm;
        if (det > 0) b.d = as_half((xs * mm - xm * sm) / det), b.dmin = as_half((xs * sm - xm * ss) / det);
        else if (ss > 0) b.d = as_half(xs / ss);
        if (!(b.d > 0) || !(b.dmin >= 0)) break;
    }
    if (least == INFINITY) { // only when every value is 0
        *out = (struct superblock){0};
        memset(q, 0, SUPER * sizeof *q);
    }
}

// Eight 6-bit scales and minima in 12 bytes (quant.c's unpack_scale_min reads them).
static void put_scales_and_minima(const struct superblock *b, unsigned char *packed) {
    for (int k = 0; k < 4; k++) {
        int s = (int)b->scale[k], m = (int)b->minimum[k], s4 = (int)b->scale[4 + k], m4 = (int)b->minimum[4 + k];
        packed[k] = (unsigned char)(s | (s4 >> 4) << 6);
        packed[4 + k] = (unsigned char)(m | (m4 >> 4) << 6);
        packed[8 + k] = (unsigned char)((s4 & 15) | (m4 & 15) << 4);
    }
}

static void put_k_nibbles(const float *q, unsigned char *dst) {
    for (int g = 0; g < 4; g++)
        for (int i = 0; i < 32; i++)
            dst[32 * g + i] = (unsigned char)(((int)q[64 * g + i] & 15) | ((int)q[64 * g + 32 + i] & 15) << 4);
}

static void q4_k(const float *x, unsigned char *dst) {
    struct superblock b = {0};
    float q[SUPER] = {0};
    fit_superblock(x, 8, 32, 15, 63, &b, q);
    put_half(dst, b.d);
    put_half(dst + 2, b.dmin);
    put_scales_and_minima(&b, dst + 4);
    put_k_nibbles(q, dst + 16);
}

static void q5_k(const float *x, unsigned char *dst) {
    struct superblock b = {0};
    float q[SUPER] = {0};
    fit_superblock(x, 8, 32, 31, 63, &b, q);
    put_half(dst, b.d);
    put_half(dst + 2, b.dmin);
    put_scales_and_minima(&b, dst + 4);
    memset(dst + 16, 0, 32);
    for (int k = 0; k < 8; k++)
        for (int i = 0; i < 32; i++) dst[16 + i] |= (unsigned char)(((int)q[32 * k + i] >> 4 & 1) << k);
    put_k_nibbles(q, dst + 48);
}

static void q2_k(const float *x, unsigned char *dst) {
    struct superblock b = {0};
    float q[SUPER] = {0};
    fit_superblock(x, 16, 16, 3, 15, &b, q);
    memset(dst, 0, 80);
    for (int k = 0; k < 16; k++) dst[k] = (unsigned char)((int)b.scale[k] | (int)b.minimum[k] << 4);
    for (int i = 0; i < SUPER; i++) dst[16 + 32 * (i / 128) + i % 32] |= (unsigned char)((int)q[i] << 2 * (i / 32 % 4));
    put_half(dst + 80, b.d);
    put_half(dst + 82, b.dmin);
}

// Signed scales: parts of 16 with y = d s q, s in [-most, most]. Writes the codes.
static void fit_signed_superblock(const float *x, float low, float high, float most, struct superblock *out, float *q) {
    float steps[16], top = 0, least = INFINITY, codes[SUPER];
    for (int p = 0; p < 16; p++) {
        steps[p] = fit_step(x + (ptrdiff_t)16 * p, 16, low, high, MOST_CANDIDATES, false, codes);
        if (fabsf(steps[p]) > top) top = fabsf(steps[p]);
    }
    struct superblock b = {.d = as_half(top / most)};
    for (int round = 0; round < 3; round++) {
        float error = 0, ss = 0, xs = 0;
        for (int p = 0; p < 16; p++) {
            struct sums sums = {.error = INFINITY};
            float ideal = b.d > 0 ? steps[p] / b.d : 0, *c = codes + (ptrdiff_t)16 * p;
            for (int k = -1; k <= 1; k++) {
                float s = clamp(nearest(ideal) + (float)k, -most, most), try[16];
                struct sums e = encode(x + (ptrdiff_t)16 * p, 16, b.d * s, 0, low, high, try);
                if (e.error >= sums.error) continue;
                sums = e;
                b.scale[p] = s;
                memcpy(c, try, sizeof try);
            }
            error += sums.error;
            ss += b.scale[p] * b.scale[p] * sums.qq;
            xs += b.scale[p] * sums.xq;
        }
        if (error < least) {
            least = error;
            *out = b;
            memcpy(q, codes, SUPER * sizeof *q);
        }
        if (!(ss > 0)) break;
        b.d = as_half(xs / ss);
    }
    if (least == INFINITY) {
        *out = (struct superblock){0};
        memset(q, 0, SUPER * sizeof *q);
    }
}

static void q6_k(const float *x, unsigned char *dst) {
    struct superblock b = {0};
    float q[SUPER] = {0};
    fit_signed_superblock(x, -32, 31, 127, &b, q);
    memset(dst, 0, 192);
    for (int i = 0; i < SUPER; i++) {
        int half = i / 128, s = i / 32 % 4, code = (int)q[i] + 32;
        dst[64 * half + 32 * (s % 2) + i % 32] |= (unsigned char)((code & 15) << 4 * (s / 2));
        dst[128 + 32 * half + i % 32] |= (unsigned char)((code >> 4) << 2 * s);
    }
    for (int k = 0; k < 16; k++) dst[192 + k] = (unsigned char)(signed char)b.scale[k];
    put_half(dst + 208, b.d);
}

static void q3_k(const float *x, unsigned char *dst) {
    struct superblock b = {0};
    float q[SUPER] = {0};
    unsigned char s[16];
    fit_signed_superblock(x, -4, 3, 31, &b, q);
    memset(dst, 0, 96);
    for (int i = 0; i < SUPER; i++) {
        int code = (int)q[i] + 4;
        dst[32 + 32 * (i / 128) + i % 32] |= (unsigned char)((code & 3) << 2 * (i / 32 % 4));
        dst[i % 32] |= (unsigned char)((code >> 2) << i / 32);
    }
    for (int k = 0; k < 16; k++) s[k] = (unsigned char)((int)b.scale[k] + 32);
    for (int k = 0; k < 8; k++) dst[96 + k] = (unsigned char)((s[k] & 15) | (s[8 + k] & 15) << 4);
    for (int k = 0; k < 4; k++)
        dst[104 + k] = (unsigned char)(s[k] >> 4 | s[4 + k] >> 4 << 2 | s[8 + k] >> 4 << 4 | s[12 + k] >> 4 << 6);
    put_half(dst + 108, b.d);
}

// ---- All types

static void plain(enum dtype type, const float *src, unsigned char *dst, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t h = type == DTYPE_BF16 ? bf16_from_f32(src[i]) : f16_from_f32(src[i]);
        memcpy(dst + 2 * i, &h, sizeof h);
    }
}

void dtype_from_f32(enum dtype type, const float *src, void *out, size_t n) {
    static void (*const blocks[DTYPE_COUNT])(const float *x, unsigned char *dst) = {
        [DTYPE_Q8_0] = q8_0, [DTYPE_Q4_0] = q4_0, [DTYPE_Q4_1] = q4_1, [DTYPE_Q5_0] = q5_0, [DTYPE_Q5_1] = q5_1,
        [DTYPE_Q2_K] = q2_k, [DTYPE_Q3_K] = q3_k, [DTYPE_Q4_K] = q4_k, [DTYPE_Q5_K] = q5_k, [DTYPE_Q6_K] = q6_k};
    unsigned char *dst = out;
    const struct dtype_info *info = dtype_info(type);
    if (blocks[type]) {
        for (size_t i = 0; i < n; i += info->block_len, dst += info->block_bytes) blocks[type](src + i, dst);
    } else if (type == DTYPE_F32) {
        if (n) memcpy(dst, src, n * sizeof *src);
    } else if (type == DTYPE_BF16 || type == DTYPE_F16) {
        plain(type, src, dst, n);
    }
}
