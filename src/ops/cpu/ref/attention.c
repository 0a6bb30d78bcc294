// attention.c: the portable parts of attention, for one token and one head (formula and order: struct attention_args).
// Only positions below n_kv are read, so that unused slots may hold anything.
#include "ops/cpu/math.h"
#include "ops/cpu/ref/ref.h"
#include "ops/kv_page.h"

enum { PIECE = 32 }; // channels that are widened at a time: a block of Q8_0

// The row of a position; `data` is the layer's K or V.
static const unsigned char *row_of(const struct kv_layer *kv, const void *data, size_t kv_head, const int32_t *pages,
                                   size_t position) {
    size_t page = (size_t)pages[position / KV_PAGE_TOKENS];
    return (const unsigned char *)data + kv_row_at(kv, page, kv_head, position % KV_PAGE_TOKENS);
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

static void attn_scores(const struct op_ctx *ctx, float *s, const float *q, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv, float scale) {
    (void)ctx;
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

static void attn_values(const struct op_ctx *ctx, float *o, const float *p, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv) {
    (void)ctx;
    for (size_t begin = 0; begin < n_kv; begin += ATTN_BLOCK, o += kv->head_dim) {
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
    ops->attn_scores = attn_scores;
    ops->attn_softmax = attn_softmax;
    ops->attn_values = attn_values;
    ops->attn_combine = attn_combine;
}
