// kv_page.c: see kv_page.h.
#include "ops/kv_page.h"

#include "format/fp8.h"
#include "ops/cpu/activation.h"

#include <stdio.h>
#include <string.h>

enum { BLOCK = 32, BLOCK_BYTES = 34 }; // Q8_0: scale, integers

static void round_block(const float *x, unsigned char *block) {
    uint32_t max = 0;
    for (size_t i = 0; i < BLOCK; i++) {
        uint32_t bits = float_bits(x[i]) & 0x7FFFFFFFu;
        max = bits > max ? bits : max;
    }
    uint16_t half = f16_from_f32(float_from_bits(max) / 127.0f);
    float d = f16_to_f32(half);
    memcpy(block, &half, sizeof half);
    memset(block + 2, 0, BLOCK);
    if (!(d > 0.0f && d <= 65504.0f)) return;
    float inverse = 1.0f / d;
    for (size_t i = 0; i < BLOCK; i++) {
        float v = x[i] * inverse; // beyond 127 where d is subnormal
        v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
        block[2 + i] = (unsigned char)(int8_t)round_to_int(v);
    }
}

void kv_round(enum dtype type, const float *x, void *row, size_t n) {
    switch (type) {
    case DTYPE_F32: memcpy(row, x, n * sizeof *x); break;
    case DTYPE_F16:
        for (size_t i = 0; i < n; i++) ((uint16_t *)row)[i] = f16_from_f32(x[i]);
        break;
    case DTYPE_Q8_0:
        for (size_t i = 0; i < n; i += BLOCK) round_block(x + i, (unsigned char *)row + i / BLOCK * BLOCK_BYTES);
        break;
    case DTYPE_FP8: fp8_from_f32(x, row, n); break;
    default:
        for (size_t i = 0; i < n; i++) ((uint16_t *)row)[i] = bf16_from_f32(x[i]);
    }
}

float kv_channel(enum dtype type, const void *row, size_t channel) {
    switch (type) {
    case DTYPE_F32: return ((const float *)row)[channel];
    case DTYPE_F16: return f16_to_f32(((const uint16_t *)row)[channel]);
    case DTYPE_Q8_0: {
        const unsigned char *block = (const unsigned char *)row + channel / BLOCK * BLOCK_BYTES;
        uint16_t half;
        memcpy(&half, block, sizeof half);
        return (float)(int8_t)block[2 + channel % BLOCK] * f16_to_f32(half);
    }
    case DTYPE_FP8: {
        float x[FP8_BLOCK];
        fp8_to_f32((const unsigned char *)row + channel / FP8_BLOCK * FP8_BLOCK_BYTES, x, FP8_BLOCK);
        return x[channel % FP8_BLOCK];
    }
    default: return bf16_to_f32(((const uint16_t *)row)[channel]);
    }
}

// Block b of Q8_0's row `slot` in the place of its head's rows.
static void read_block(enum kv_side side, size_t head_dim, const unsigned char *head, size_t slot, size_t b,
                       unsigned char *block) {
    memcpy(block, head + kv_scale_at(b, slot), 2);
    for (size_t c = 0; c < BLOCK; c++) block[2 + c] = head[kv_integer_at(side, head_dim, slot, b * BLOCK + c)];
}

void kv_write_block(enum kv_side side, size_t head_dim, unsigned char *head, size_t slot, size_t b,
                    const unsigned char *block) {
    memcpy(head + kv_scale_at(b, slot), block, 2);
    for (size_t c = 0; c < BLOCK; c++) head[kv_integer_at(side, head_dim, slot, b * BLOCK + c)] = block[2 + c];
}

void kv_read(const struct kv_layer *kv, enum kv_side side, const void *data, size_t row, void *to) {
    size_t bytes = kv_row_bytes(kv), slot = row % KV_PAGE_TOKENS;
    const unsigned char *from = data;
    if (kv->type != DTYPE_Q8_0) memcpy(to, from + row * bytes, bytes);
    for (size_t b = 0; kv->type == DTYPE_Q8_0 && b < kv->head_dim / BLOCK; b++)
        read_block(side, kv->head_dim, from + (row - slot) * bytes, slot, b, (unsigned char *)to + b * BLOCK_BYTES);
}

bool kv_same_row(const struct kv_layer *kv, enum kv_side side, const void *a, const void *b, size_t row) {
    size_t bytes = kv_row_bytes(kv), slot = row % KV_PAGE_TOKENS;
    const unsigned char *x = a, *y = b;
    if (kv->type != DTYPE_Q8_0) return memcmp(x + row * bytes, y + row * bytes, bytes) == 0;
    x += (row - slot) * bytes, y += (row - slot) * bytes;
    for (size_t c = 0; c < kv->head_dim; c++) {
        size_t at = kv_integer_at(side, kv->head_dim, slot, c), scale = kv_scale_at(c / BLOCK, slot);
        if (x[at] != y[at] || memcmp(x + scale, y + scale, 2) != 0) return false;
    }
    return true;
}

void kv_store_row(const struct kv_layer *kv, enum kv_side side, size_t row, const float *x) {
    size_t bytes = kv_row_bytes(kv), slot = row % KV_PAGE_TOKENS;
    unsigned char *to = side == KV_K ? kv->k : kv->v, block[BLOCK_BYTES];
    if (kv->type != DTYPE_Q8_0) kv_round(kv->type, x, to + row * bytes, kv->head_dim);
    for (size_t b = 0; kv->type == DTYPE_Q8_0 && b < kv->head_dim / BLOCK; b++) {
        round_block(x + b * BLOCK, block);
        kv_write_block(side, kv->head_dim, to + (row - slot) * bytes, slot, b, block);
    }
}

float kv_value(const struct kv_layer *kv, enum kv_side side, const void *data, size_t row, size_t channel) {
    size_t bytes = kv_row_bytes(kv), slot = row % KV_PAGE_TOKENS;
    const unsigned char *from = data;
    if (kv->type != DTYPE_Q8_0) return kv_channel(kv->type, from + row * bytes, channel);
    uint16_t half;
    from += (row - slot) * bytes;
    memcpy(&half, from + kv_scale_at(channel / BLOCK, slot), sizeof half);
    return (float)(int8_t)from[kv_integer_at(side, kv->head_dim, slot, channel)] * f16_to_f32(half);
}

void kv_as_stored(enum dtype type, const float *x, float *out, size_t n) {
    unsigned char row[4 * BLOCK];
    for (size_t i = 0; i < n; i += BLOCK) {
        size_t part = n - i < BLOCK ? n - i : BLOCK;
        kv_round(type, x + i, row, part);
        dtype_to_f32(type, row, out + i, part);
    }
}

static const enum dtype kv_types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32, DTYPE_Q8_0, DTYPE_FP8};
enum { N_TYPES = sizeof kv_types / sizeof kv_types[0] };

bool kv_type_parse(const char *name, enum dtype *out, struct error *err) {
    enum dtype type = DTYPE_BF16;
    bool known = !name || dtype_from_name(name, &type);
    for (size_t i = 0; known && i < N_TYPES; i++)
        if (kv_types[i] == type) return *out = type, true;
    return error_set(err, "KV type: expected bf16, f16, f32, q8_0 or fp8, found %s", name);
}

bool kv_type_fits(enum dtype type, size_t head_dim, const struct device *device, struct error *err) {
    size_t block = dtype_info(type)->block_len;
    if (head_dim % block != 0)
        return error_set(err, "KV type: %s stores blocks of %zu channels, the model's heads have %zu",
                         dtype_info(type)->name, block, head_dim);
    if (!device || device->kv_types >> type & 1) return true;
    char names[64] = "";
    for (size_t i = 0, used = 0; i < N_TYPES && used < sizeof names; i++)
        if (device->kv_types >> kv_types[i] & 1)
            used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? " or " : "",
                                     dtype_info(kv_types[i])->name);
    return error_set(err, "KV type: %s stores K and V as %s, %s was asked for", device->name, names,
                     dtype_info(type)->name);
}
