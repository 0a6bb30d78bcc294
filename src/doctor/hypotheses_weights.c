// hypotheses_weights.c: rows of a weight matrix as they are, and as a mistaken reader would see them. It owns the
// mistakes; the right reading is the oracle's.
#include "doctor/hypotheses.h"

#include "model/oracle.h"

#include <string.h>

enum { MAX_BLOCK = 256 };

// A block, taken apart: element i is scale[i] * (q[i] - zero) - minus[i].
struct block {
    float scale[MAX_BLOCK], minus[MAX_BLOCK];
    int q[MAX_BLOCK], zero;
    size_t len, group; // elements, and elements that share a scale
};

static float half_at(const unsigned char *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return f16_to_f32(h);
}

// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (layouts: format/quant.c).
static void open_small(enum dtype type, const unsigned char *p, struct block *b) {
    bool has_min = type == DTYPE_Q4_1 || type == DTYPE_Q5_1, five = type == DTYPE_Q5_0 || type == DTYPE_Q5_1;
    float d = half_at(p), m = has_min ? half_at(p + 2) : 0;
    const unsigned char *at = p + (has_min ? 4 : 2);
    uint32_t high = 0;
    if (five) {
        memcpy(&high, at, sizeof high);
        at += 4;
    }
    *b = (struct block){.len = 32, .group = 32};
    b->zero = type == DTYPE_Q4_0 ? 8 : type == DTYPE_Q5_0 ? 16 : 0;
    for (int i = 0; i < 32; i++) {
        if (type == DTYPE_Q8_0) b->q[i] = (signed char)at[i];
        else b->q[i] = (i < 16 ? at[i] & 15 : at[i - 16] >> 4) | (int)((high >> i & 1) << 4);
        b->scale[i] = d;
        b->minus[i] = -m;
    }
}

static void open_q4_k(const unsigned char *p, struct block *b) {
    float d = half_at(p), dmin = half_at(p + 2);
    const unsigned char *s = p + 4, *q = p + 16;
    *b = (struct block){.len = 256, .group = 32};
    for (int k = 0; k < 8; k++) {
        int scale = k < 4 ? s[k] & 63 : (s[4 + k] & 15) | (s[k - 4] >> 2 & 48);
        int min = k < 4 ? s[4 + k] & 63 : s[4 + k] >> 4 | (s[k] >> 2 & 48);
        for (int i = 0; i < 32; i++) {
            b->q[32 * k + i] = q[32 * (k / 2) + i] >> 4 * (k % 2) & 15;
            b->scale[32 * k + i] = d * (float)scale;
            b->minus[32 * k + i] = dmin * (float)min;
        }
    }
}

static void open_q6_k(const unsigned char *p, struct block *b) {
    float d = half_at(p + 208);
    *b = (struct block){.len = 256, .group = 16, .zero = 32};
    for (int i = 0; i < 256; i++) {
        int half = i / 128, s = i % 128 / 32, l = i % 32;
        int low = p[64 * half + 32 * (s % 2) + l] >> 4 * (s / 2) & 15, high = p[128 + 32 * half + l] >> 2 * s & 3;
        b->q[i] = low | high << 4;
        b->scale[i] = d * (float)(signed char)p[192 + i / 16];
    }
}

static bool open_block(enum dtype type, const unsigned char *p, struct block *b) {
    switch (type) {
    case DTYPE_Q8_0:
    case DTYPE_Q4_0:
    case DTYPE_Q4_1:
    case DTYPE_Q5_0:
    case DTYPE_Q5_1: open_small(type, p, b); return true;
    case DTYPE_Q4_K: open_q4_k(p, b); return true;
    case DTYPE_Q6_K: open_q6_k(p, b); return true;
    default: return false;
    }
}

// The element whose place a reader with the wrong idea of nibbles takes for element i.
static size_t nibble_place(const struct block *b, enum twist_kind kind, size_t i) {
    size_t half = b->len == 32 ? 16 : 32, unit = i / (2 * half) * 2 * half, at = i % (2 * half);
    if (kind == TWIST_NIBBLES) return unit + (at + half) % (2 * half);
    return unit + at / 2 + at % 2 * half; // 2j is the low nibble of byte j, 2j + 1 the high one
}

static bool quantised_row(const struct matrix *w, const struct twist *t, size_t row, double *out) {
    const struct dtype_info *info = dtype_info(w->type);
    const unsigned char *data = (const unsigned char *)w->data + row * w->row_bytes;
    size_t n_blocks = w->n_in / info->block_len;
    struct block b, other;
    bool nibbles = t->kind == TWIST_NIBBLES || t->kind == TWIST_NIBBLES_PAIRED;
    if (nibbles && (w->type == DTYPE_Q8_0 || w->type == DTYPE_Q6_K)) return false;
    for (size_t k = 0; k < n_blocks; k++) {
        if (!open_block(w->type, data + k * info->block_bytes, &b)) return false;
        for (size_t i = 0; i < b.len; i++) {
            float scale = b.scale[i], minus = b.minus[i];
            int q = nibbles ? b.q[nibble_place(&b, t->kind, i)] : b.q[i], zero = b.zero;
            if (t->kind == TWIST_ZERO_POINT) zero = 0, minus = 0;
            if (t->kind == TWIST_BLOCK_SCALE) {
                size_t groups = w->n_in / b.group, group = (k * b.len + i) / b.group;
                size_t from = (group + groups + (size_t)(t->arg + (int)groups)) % groups;
                if (!open_block(w->type, data + from * b.group / b.len * info->block_bytes, &other)) return false;
                scale = other.scale[from * b.group % b.len];
            }
            out[k * b.len + i] = (double)(scale * (float)(q - zero) - minus);
        }
    }
    return true;
}

// Element `at` of a plain matrix's data, counted over the whole of it.
static double flat_element(const struct matrix *w, size_t at) {
    const unsigned char *p = w->data;
    if (w->type == DTYPE_F32) {
        float f;
        memcpy(&f, p + 4 * at, sizeof f);
        return (double)f;
    }
    uint16_t h;
    memcpy(&h, p + 2 * at, sizeof h);
    return (double)(w->type == DTYPE_BF16 ? bf16_to_f32(h) : f16_to_f32(h));
}

bool formula_weight_row(const struct matrix *w, const struct twist *t, size_t row, double *out) {
    size_t total = w->n_out * w->n_in;
    switch (t->kind) {
    case TWIST_BLOCK_SCALE:
    case TWIST_ZERO_POINT:
    case TWIST_NIBBLES:
    case TWIST_NIBBLES_PAIRED: return dtype_info(w->type)->is_quantised && quantised_row(w, t, row, out);
    case TWIST_TRANSPOSED:
        if (dtype_info(w->type)->is_quantised) return false;
        for (size_t i = 0; i < w->n_in; i++) out[i] = flat_element(w, i * w->n_out + row);
        return true;
    case TWIST_WEIGHT_OFFSET:
        if (dtype_info(w->type)->is_quantised) return false;
        for (size_t i = 0; i < w->n_in; i++)
            out[i] = flat_element(w, (row * w->n_in + i + (size_t)t->arg + total) % total);
        return true;
    case TWIST_WEIGHT_SHIFT: row = (row + (size_t)(t->arg + (int)w->n_out)) % w->n_out; break;
    case TWIST_MATRIX_OTHER:
        w = t->other->matrix;
        if (row >= w->n_out) return false;
        break;
    default: break;
    }
    return oracle_row(w, row, out, NULL);
}
