// attention.c: the portable parts of attention, for one token and one head (formula and order: struct attention_args).
// Only positions below n_kv are read, so that unused slots may hold anything.
#include "ops/cpu/attention.h"
#include "ops/cpu/ref/ref.h"
#include "ops/kv_page.h"

#include <string.h>

enum { PIECE = 32 }; // channels that are widened at a time

// Where the head's rows of a position's page begin; `data` is the layer's K or V.
static const unsigned char *head_of(const struct kv_layer *kv, const void *data, size_t kv_head, const int32_t *pages,
                                    size_t position) {
    return (const unsigned char *)data + kv_head_at(kv, (size_t)pages[position / KV_PAGE_TOKENS], kv_head);
}

// The row of a position, not of Q8_0.
static const unsigned char *row_of(const struct kv_layer *kv, const void *data, size_t kv_head, const int32_t *pages,
                                   size_t position) {
    return head_of(kv, data, kv_head, pages, position) + position % KV_PAGE_TOKENS * kv_row_bytes(kv);
}

// Channels c and on of a row, at most PIECE; returns how many.
static size_t widen(const struct kv_layer *kv, const unsigned char *row, size_t c, float x[PIECE]) {
    size_t n = kv->head_dim - c < PIECE ? kv->head_dim - c : PIECE;
    dtype_to_f32(kv->type, row + kv_bytes(kv->type, c), x, n);
    return n;
}

static size_t block_end(size_t begin, size_t n_kv) {
    return begin + ATTN_BLOCK < n_kv ? begin + ATTN_BLOCK : n_kv;
}

static float scale_of(const unsigned char *head, size_t block, size_t slot) {
    uint16_t half;
    memcpy(&half, head + kv_scale_at(block, slot), sizeof half);
    return f16_to_f32(half);
}

// Scores over K of Q8_0.
static void integer_scores(float *s, const float *q, const struct kv_layer *kv, size_t kv_head, const int32_t *pages,
                           size_t n_kv, float scale) {
    int16_t rounded[MOST_HEAD_DIM];
    float factor = attn_round_query(q, rounded, kv->head_dim) * scale;
    for (size_t j = 0; j < n_kv; j++) {
        const unsigned char *head = head_of(kv, kv->k, kv_head, pages, j);
        float t = 0.0f;
        for (size_t b = 0; b < kv->head_dim / 32; b++) {
            int32_t sum = 0;
            for (size_t c = 32 * b; c < 32 * b + 32; c++)
                sum += rounded[c] * (int8_t)head[kv_integer_at(KV_K, kv->head_dim, j % KV_PAGE_TOKENS, c)];
            t = fmaf(scale_of(head, b, j % KV_PAGE_TOKENS), (float)sum, t);
        }
        s[j] = t * factor;
    }
}

static void attn_scores(const struct op_ctx *ctx, float *s, const float *q, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv, float scale) {
    (void)ctx;
    if (kv->type == DTYPE_Q8_0) {
        integer_scores(s, q, kv, kv_head, pages, n_kv, scale);
        return;
    }
    for (size_t j = 0; j < n_kv; j++) {
        const unsigned char *row = row_of(kv, kv->k, kv_head, pages, j);
        float acc[DOT_LANES] = {0}, x[PIECE];
        for (size_t c = 0; c < kv->head_dim; c += PIECE) {
            size_t n = widen(kv, row, c, x);
            for (size_t i = 0; i < n; i++) acc[i % DOT_LANES] = fmaf(q[c + i], x[i], acc[i % DOT_LANES]);
        }
        s[j] = dot16_reduce(acc) * scale;
    }
}

// A NaN score makes its p, and so the sum, NaN: nothing hides it.
static void attn_softmax(const struct op_ctx *ctx, float *s, float *block_max, float *block_sum, size_t n_kv) {
    (void)ctx;
    for (size_t begin = 0, b = 0; begin < n_kv; begin += ATTN_BLOCK, b++) {
        size_t end = block_end(begin, n_kv);
        float m = s[begin];
        for (size_t j = begin + 1; j < end; j++) m = s[j] > m ? s[j] : m;
        for (size_t j = begin; j < end; j++) s[j] = exp32(s[j] - m);
        block_max[b] = m;
        block_sum[b] = sum16_f32(s + begin, end - begin);
    }
}

// One block's values over V of Q8_0, n <= ATTN_BLOCK positions; `head`: its page's rows.
static void integer_values(float *o, const float *p, size_t n, const unsigned char *head, size_t head_dim) {
    for (size_t b = 0; b < head_dim / 32; b++) {
        uint16_t most = 0, half; // magnitudes of f16 are in the order of their bits
        int16_t w[ATTN_BLOCK];
        for (size_t j = 0; j < n; j++) {
            memcpy(&half, head + kv_scale_at(b, j), sizeof half);
            most = half > most ? half : most;
        }
        float factor, inverse = attn_weight_scale(most, &factor);
        for (size_t j = 0; j < n; j++) w[j] = (int16_t)round_to_int(p[j] * (scale_of(head, b, j) * inverse));
        for (size_t c = 32 * b; c < 32 * b + 32; c++) {
            int32_t sum = 0;
            for (size_t j = 0; j < n; j++) sum += w[j] * (int8_t)head[kv_integer_at(KV_V, head_dim, j, c)];
            o[c] = (float)sum * factor;
        }
    }
}

static void attn_values(const struct op_ctx *ctx, float *o, const float *p, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv) {
    (void)ctx;
    for (size_t begin = 0; begin < n_kv; begin += ATTN_BLOCK, o += kv->head_dim) {
        if (kv->type == DTYPE_Q8_0) {
            integer_values(o, p + begin, block_end(begin, n_kv) - begin, head_of(kv, kv->v, kv_head, pages, begin),
                           kv->head_dim);
            continue;
        }
        for (size_t c = 0; c < kv->head_dim; c++) o[c] = 0.0f;
        for (size_t j = begin; j < block_end(begin, n_kv); j++) {
            const unsigned char *row = row_of(kv, kv->v, kv_head, pages, j);
            float x[PIECE];
            for (size_t c = 0; c < kv->head_dim; c += PIECE) {
                size_t n = widen(kv, row, c, x);
                for (size_t i = 0; i < n; i++) o[c + i] = fmaf(p[j], x[i], o[c + i]);
            }
        }
    }
}

static void attn_combine(const struct op_ctx *ctx, float *out, const float *block_max, const float *block_sum,
                         const float *o, size_t n_blocks, size_t head_dim) {
    (void)ctx;
    float m = block_max[0], l = block_sum[0];
    for (size_t i = 0; i < head_dim; i++) out[i] = o[i];
    for (size_t b = 1; b < n_blocks; b++) {
        float m_new = block_max[b] > m ? block_max[b] : m;
        float a = exp32(m - m_new), c = exp32(block_max[b] - m_new);
        l = fmaf(l, a, block_sum[b] * c);
        for (size_t i = 0; i < head_dim; i++) out[i] = fmaf(out[i], a, o[b * head_dim + i] * c);
        m = m_new;
    }
    for (size_t i = 0; i < head_dim; i++) out[i] /= l;
}

void ref_fill_attention(struct ops *ops) {
    ops->attn_block = ATTN_BLOCK;
    ops->attn_scores = attn_scores;
    ops->attn_softmax = attn_softmax;
    ops->attn_values = attn_values;
    ops->attn_combine = attn_combine;
}
