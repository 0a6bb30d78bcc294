// bridge.c: see bridge.h.
#include "doctor/bridge.h"

#include "base/size.h"
#include "doctor/room.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct bridge {
    struct ops table; // first: op_ctx.ops points here
    const struct ops *ops;
    struct device *device;
    const struct model *model;
    const struct device_weights *weights;
    struct room room;    // of one call
    struct room kv_room; // of the pages that attention's parts read, one call after the other
    const void *kv_held; // whose pages kv_room has; NULL: none
    struct kv_layer kv;
    struct matrix stranger; // a matrix that is not the model's; data NULL: none
    struct error why;
    bool failed;
};

// ---- One call ------------------------------------------------------------------------------------------------------

static struct bridge *bridge_of(const struct op_ctx *ctx) {
    return (struct bridge *)(uintptr_t)ctx->ops;
}

// Attention's parts find the pages where the part before left them.
static struct bridge *begin_part(const struct op_ctx *ctx) {
    struct bridge *b = bridge_of(ctx);
    room_empty(&b->room);
    return b;
}

static struct bridge *begin(const struct op_ctx *ctx) {
    struct bridge *b = begin_part(ctx);
    b->kv_held = NULL;
    return b;
}

// The call's own context; every scratch is new. `batch` NULL: the call knows no positions.
static bool open_ctx(struct bridge *b, const struct op_ctx *from, size_t n_tokens, const struct batch *batch,
                     struct op_ctx *ctx) {
    const struct model_config *c = &b->model->config;
    size_t q = c->n_heads * c->head_dim, width = c->hidden > c->n_ff ? c->hidden : c->n_ff, floats, own = 0;
    size_t longest = 1;
    for (size_t i = 0; batch && batch->kv_len && i < batch->n_seqs; i++)
        longest = (size_t)batch->kv_len[i] > longest ? (size_t)batch->kv_len[i] : longest;
    struct ops_limits limits = {.max_tokens = n_tokens,
                                .max_positions = longest,
                                .max_width = width > q ? width : q,
                                .n_heads = c->n_heads,
                                .head_dim = c->head_dim,
                                .n_threads = 1};
    if (!ops_scratch_floats(&limits, &floats) ||
        (b->ops->scratch_floats && !b->ops->scratch_floats(b->ops, &limits, &own)))
        return error_set(&b->why, "the scratch size overflows");
    if (own > floats) floats = own;
    *ctx = (struct op_ctx){.ops = b->ops, .pool = from->pool, .fusion = from->fusion, .layer = from->layer};
    ctx->scratch = room_take(&b->room, floats * sizeof(float), &b->why);
    ctx->scratch_floats = floats;
    return ctx->scratch != NULL;
}

static void *put(struct bridge *b, const void *data, size_t bytes) {
    return data ? room_put(&b->room, data, bytes, &b->why) : NULL;
}

static float *put_floats(struct bridge *b, const float *data, size_t n) {
    return put(b, data, n * sizeof *data);
}

static void get_floats(struct bridge *b, float *to, const float *from, size_t n) {
    b->device->get(b->device, to, from, n * sizeof *to);
}

static void end(struct bridge *b, bool ok) {
    if (!ok || !b->device->sync(b->device, &b->why)) b->failed = true;
    if (b->stranger.data) b->device->free(b->device, (void *)(uintptr_t)b->stranger.data);
    b->stranger.data = NULL;
}

// ---- Weights -------------------------------------------------------------------------------------------------------

static bool is_same(const struct matrix *a, const struct matrix *b) {
    return a->data == b->data && a->n_out == b->n_out && a->n_in == b->n_in && a->type == b->type &&
           a->row_bytes == b->row_bytes;
}

// The device's copy of a matrix; NULL: there is none, and none could be made.
static const struct matrix *matrix_of(struct bridge *b, const struct matrix *w) {
    const struct model *m = b->model;
    if (is_same(w, &m->embed)) return &b->weights->embed;
    if (is_same(w, &m->head)) return &b->weights->head;
    for (size_t i = 0; i < m->config.n_layers; i++) {
        const struct layer_weights *h = &m->layers[i], *d = &b->weights->layers[i];
        const struct matrix *host[] = {&h->wq, &h->wk, &h->wv, &h->wo, &h->w_gate, &h->w_up, &h->w_down};
        const struct matrix *device[] = {&d->wq, &d->wk, &d->wv, &d->wo, &d->w_gate, &d->w_up, &d->w_down};
        for (size_t k = 0; k < sizeof host / sizeof host[0]; k++)
            if (is_same(w, host[k])) return device[k];
    }
    if (b->stranger.data || !matrix_upload(w, b->device, NULL, &b->stranger, &b->why)) return NULL;
    return &b->stranger;
}

// ---- Primitives ----------------------------------------------------------------------------------------------------

static void bridge_embed(const struct op_ctx *ctx, float *x, const struct matrix *table, const int32_t *token,
                         size_t n_tokens) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    size_t n = n_tokens * table->n_in;
    const struct matrix *w = matrix_of(b, table);
    float *y = put_floats(b, x, n);
    int32_t *ids = put(b, token, n_tokens * sizeof *token);
    bool ok = w && y && ids && open_ctx(b, ctx, n_tokens, NULL, &own);
    if (ok) b->ops->embed(&own, y, w, ids, n_tokens), get_floats(b, x, y, n);
    end(b, ok);
}

static void bridge_rmsnorm(const struct op_ctx *ctx, float *y, const float *x, const float *w, float eps, size_t n_rows,
                           size_t n) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    float *in = put_floats(b, x, n_rows * n), *norm = put_floats(b, w, n);
    float *out = y == x ? in : put_floats(b, y, n_rows * n);
    bool ok = in && norm && out && open_ctx(b, ctx, n_rows, NULL, &own);
    if (ok) b->ops->rmsnorm(&own, out, in, norm, eps, n_rows, n), get_floats(b, y, out, n_rows * n);
    end(b, ok);
}

static void bridge_matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *m, size_t n_tokens) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    const struct matrix *w = matrix_of(b, m);
    float *in = put_floats(b, x, n_tokens * m->n_in), *out = put_floats(b, y, n_tokens * m->n_out);
    bool ok = w && in && out && open_ctx(b, ctx, n_tokens, NULL, &own);
    if (ok) b->ops->matmul(&own, out, in, w, n_tokens), get_floats(b, y, out, n_tokens * m->n_out);
    end(b, ok);
}

static void bridge_bias(const struct op_ctx *ctx, float *y, const float *bias, size_t n_rows, size_t n) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    float *out = put_floats(b, y, n_rows * n), *in = put_floats(b, bias, n);
    bool ok = out && in && open_ctx(b, ctx, n_rows, NULL, &own);
    if (ok) b->ops->bias(&own, out, in, n_rows, n), get_floats(b, y, out, n_rows * n);
    end(b, ok);
}

static void bridge_head_rmsnorm(const struct op_ctx *ctx, float *x, const float *w, float eps, size_t n_tokens,
                                size_t n_heads, size_t head_dim) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    size_t n = n_tokens * n_heads * head_dim;
    float *out = put_floats(b, x, n), *norm = put_floats(b, w, head_dim);
    bool ok = out && norm && open_ctx(b, ctx, n_tokens, NULL, &own);
    if (ok) b->ops->head_rmsnorm(&own, out, norm, eps, n_tokens, n_heads, head_dim), get_floats(b, x, out, n);
    end(b, ok);
}

static void bridge_rope(const struct op_ctx *ctx, float *x, const float *cos_sin, size_t n_tokens, size_t n_heads,
                        size_t head_dim) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    size_t n = n_tokens * n_heads * head_dim;
    float *out = put_floats(b, x, n), *table = put_floats(b, cos_sin, n_tokens * head_dim);
    bool ok = out && table && open_ctx(b, ctx, n_tokens, NULL, &own);
    if (ok) b->ops->rope(&own, out, table, n_tokens, n_heads, head_dim), get_floats(b, x, out, n);
    end(b, ok);
}

static void bridge_kv_store(const struct op_ctx *ctx, struct kv_layer *kv, const struct batch *batch, const float *k,
                            const float *v) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    struct batch placed;
    struct kv_layer pages;
    size_t n = batch->n_tokens * kv->n_kv_heads * kv->head_dim;
    float *keys = put_floats(b, k, n), *values = put_floats(b, v, n);
    bool ok = keys && values && room_put_batch(&b->room, batch, &placed, &b->why) &&
              room_put_pages(&b->room, kv, &pages, &b->why) && open_ctx(b, ctx, batch->n_tokens, batch, &own);
    if (ok) b->ops->kv_store(&own, &pages, &placed, keys, values);
    end(b, ok && room_get_pages(&b->room, &pages, kv, &b->why));
}

static void bridge_add(const struct op_ctx *ctx, float *x, const float *y, size_t n) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    float *out = put_floats(b, x, n), *in = put_floats(b, y, n);
    bool ok = out && in && open_ctx(b, ctx, 1, NULL, &own);
    if (ok) b->ops->add(&own, out, in, n), get_floats(b, x, out, n);
    end(b, ok);
}

static void bridge_silu_mul(const struct op_ctx *ctx, float *act, const float *gate, const float *up, size_t n) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    float *in = put_floats(b, gate, n), *other = put_floats(b, up, n);
    float *out = act == gate ? in : put_floats(b, act, n);
    bool ok = in && other && out && open_ctx(b, ctx, 1, NULL, &own);
    if (ok) b->ops->silu_mul(&own, out, in, other, n), get_floats(b, act, out, n);
    end(b, ok);
}

static void bridge_gather(const struct op_ctx *ctx, float *y, const float *x, const int32_t *rows, size_t n_rows,
                          size_t n) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    size_t most = 0;
    for (size_t i = 0; i < n_rows; i++) most = (size_t)rows[i] > most ? (size_t)rows[i] : most;
    float *in = put_floats(b, x, (most + 1) * n), *out = put_floats(b, y, n_rows * n);
    int32_t *list = put(b, rows, n_rows * sizeof *rows);
    bool ok = in && out && list && open_ctx(b, ctx, n_rows, NULL, &own);
    if (ok) b->ops->gather(&own, out, in, list, n_rows, n), get_floats(b, y, out, n_rows * n);
    end(b, ok);
}

// ---- Attention's parts ---------------------------------------------------------------------------------------------

// The layer's pages, which only a store changes.
static bool hold_pages(struct bridge *b, const struct kv_layer *kv) {
    if (b->kv_held == kv->k) return true;
    room_empty(&b->kv_room);
    bool ok = room_put_pages(&b->kv_room, kv, &b->kv, &b->why);
    b->kv_held = ok ? kv->k : NULL;
    return ok;
}

static size_t blocks_of(const struct bridge *b, size_t n_kv) {
    return (n_kv + b->ops->attn_block - 1) / b->ops->attn_block;
}

static const int32_t *put_list(struct bridge *b, const int32_t *pages, size_t n_kv) {
    return put(b, pages, (n_kv + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS * sizeof *pages);
}

static void bridge_attn_scores(const struct op_ctx *ctx, float *s, const float *q, const struct kv_layer *kv,
                               size_t kv_head, const int32_t *pages, size_t n_kv, float scale) {
    struct bridge *b = begin_part(ctx);
    struct op_ctx own;
    float *out = put_floats(b, s, n_kv), *in = put_floats(b, q, kv->head_dim);
    const int32_t *list = put_list(b, pages, n_kv);
    bool ok = out && in && list && hold_pages(b, kv) && open_ctx(b, ctx, 1, NULL, &own);
    if (ok) b->ops->attn_scores(&own, out, in, &b->kv, kv_head, list, n_kv, scale), get_floats(b, s, out, n_kv);
    end(b, ok);
}

static void bridge_attn_softmax(const struct op_ctx *ctx, float *s, float *block_max, float *block_sum, size_t n_kv) {
    struct bridge *b = begin_part(ctx);
    struct op_ctx own;
    size_t n = blocks_of(b, n_kv);
    float *p = put_floats(b, s, n_kv), *max = put_floats(b, block_max, n), *sum = put_floats(b, block_sum, n);
    bool ok = p && max && sum && open_ctx(b, ctx, 1, NULL, &own);
    if (ok) {
        b->ops->attn_softmax(&own, p, max, sum, n_kv);
        get_floats(b, s, p, n_kv);
        get_floats(b, block_max, max, n);
        get_floats(b, block_sum, sum, n);
    }
    end(b, ok);
}

static void bridge_attn_values(const struct op_ctx *ctx, float *o, const float *p, const struct kv_layer *kv,
                               size_t kv_head, const int32_t *pages, size_t n_kv) {
    struct bridge *b = begin_part(ctx);
    struct op_ctx own;
    size_t n = blocks_of(b, n_kv) * kv->head_dim;
    float *out = put_floats(b, o, n), *in = put_floats(b, p, n_kv);
    const int32_t *list = put_list(b, pages, n_kv);
    bool ok = out && in && list && hold_pages(b, kv) && open_ctx(b, ctx, 1, NULL, &own);
    if (ok) b->ops->attn_values(&own, out, in, &b->kv, kv_head, list, n_kv), get_floats(b, o, out, n);
    end(b, ok);
}

static void bridge_attn_combine(const struct op_ctx *ctx, float *out, const float *block_max, const float *block_sum,
                                const float *o, size_t n_blocks, size_t head_dim) {
    struct bridge *b = begin_part(ctx);
    struct op_ctx own;
    float *y = put_floats(b, out, head_dim), *max = put_floats(b, block_max, n_blocks),
          *sum = put_floats(b, block_sum, n_blocks), *in = put_floats(b, o, n_blocks * head_dim);
    bool ok = y && max && sum && in && open_ctx(b, ctx, 1, NULL, &own);
    if (ok) b->ops->attn_combine(&own, y, max, sum, in, n_blocks, head_dim), get_floats(b, out, y, head_dim);
    end(b, ok);
}

// ---- Fused ops -----------------------------------------------------------------------------------------------------

static void bridge_norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    struct norm_qkv_args d = *a;
    d.store = NULL;
    size_t t = a->n_tokens, hidden = a->wq->n_in;
    d.x = put_floats(b, a->x, t * hidden);
    d.norm = put_floats(b, a->norm, hidden);
    d.normed = put_floats(b, a->normed, t * hidden);
    d.wq = matrix_of(b, a->wq), d.wk = matrix_of(b, a->wk), d.wv = matrix_of(b, a->wv);
    d.bq = put_floats(b, a->bq, a->wq->n_out);
    d.bk = put_floats(b, a->bk, a->wk->n_out);
    d.bv = put_floats(b, a->bv, a->wv->n_out);
    d.q = put_floats(b, a->q, t * a->wq->n_out);
    d.k = put_floats(b, a->k, t * a->wk->n_out);
    d.v = put_floats(b, a->v, t * a->wv->n_out);
    bool ok = d.x && d.norm && d.normed && d.wq && d.wk && d.wv && d.q && d.k && d.v && !a->bq == !d.bq &&
              !a->bk == !d.bk && !a->bv == !d.bv && open_ctx(b, ctx, t, NULL, &own);
    if (ok) {
        b->ops->norm_qkv(&own, &d);
        get_floats(b, a->q, d.q, t * a->wq->n_out);
        get_floats(b, a->k, d.k, t * a->wk->n_out);
        get_floats(b, a->v, d.v, t * a->wv->n_out);
    }
    end(b, ok);
}

static void bridge_qk_norm_rope_store(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    struct qk_norm_rope_store_args d = *a;
    struct batch placed;
    struct kv_layer pages;
    size_t t = a->batch->n_tokens, q = t * a->n_heads * a->head_dim, kv = t * a->n_kv_heads * a->head_dim;
    d.batch = &placed;
    d.kv = &pages;
    d.q_norm = put_floats(b, a->q_norm, a->head_dim);
    d.k_norm = put_floats(b, a->k_norm, a->head_dim);
    d.cos_sin = put_floats(b, a->cos_sin, t * a->head_dim);
    d.q = put_floats(b, a->q, q);
    d.k = put_floats(b, a->k, kv);
    d.v = put_floats(b, a->v, kv);
    bool ok = d.cos_sin && d.q && d.k && d.v && !a->q_norm == !d.q_norm && !a->k_norm == !d.k_norm &&
              room_put_batch(&b->room, a->batch, &placed, &b->why) &&
              room_put_pages(&b->room, a->kv, &pages, &b->why) && open_ctx(b, ctx, t, a->batch, &own);
    if (ok) {
        b->ops->qk_norm_rope_store(&own, &d);
        get_floats(b, a->q, d.q, q);
        get_floats(b, a->k, d.k, kv);
    }
    end(b, ok && room_get_pages(&b->room, &pages, a->kv, &b->why));
}

static void bridge_attention(const struct op_ctx *ctx, const struct attention_args *a) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    struct attention_args d = *a;
    d.reader = NULL;
    struct batch placed;
    struct kv_layer pages;
    size_t n = a->batch->n_tokens * a->n_heads * a->head_dim;
    d.batch = &placed;
    d.kv = &pages;
    d.q = put_floats(b, a->q, n);
    d.out = put_floats(b, a->out, n);
    bool ok = d.q && d.out && room_put_batch(&b->room, a->batch, &placed, &b->why) &&
              room_put_pages(&b->room, a->kv, &pages, &b->why) && open_ctx(b, ctx, a->batch->n_tokens, a->batch, &own);
    if (ok) b->ops->attention(&own, &d), get_floats(b, a->out, d.out, n);
    end(b, ok);
}

static void residual(const struct op_ctx *ctx, const struct proj_residual_args *a, bool down) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    struct proj_residual_args d = *a;
    size_t t = a->n_tokens, n = t * a->w->n_out;
    d.w = matrix_of(b, a->w);
    d.in = put_floats(b, a->in, t * a->w->n_in);
    d.projected = put_floats(b, a->projected, n);
    d.x = put_floats(b, a->x, n);
    bool ok = d.w && d.in && d.projected && d.x && open_ctx(b, ctx, t, NULL, &own);
    if (ok) {
        (down ? b->ops->down_residual : b->ops->out_residual)(&own, &d);
        get_floats(b, a->x, d.x, n);
    }
    end(b, ok);
}

static void bridge_out_residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    residual(ctx, a, false);
}

static void bridge_down_residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    residual(ctx, a, true);
}

static void bridge_norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    struct norm_gate_up_args d = *a;
    d.reader = NULL;
    size_t t = a->n_tokens, hidden = a->w_gate->n_in, n = t * a->w_gate->n_out;
    d.w_gate = matrix_of(b, a->w_gate), d.w_up = matrix_of(b, a->w_up);
    d.x = put_floats(b, a->x, t * hidden);
    d.norm = put_floats(b, a->norm, hidden);
    d.normed = put_floats(b, a->normed, t * hidden);
    d.gate = put_floats(b, a->gate, n);
    d.up = put_floats(b, a->up, n);
    d.act = a->act == a->gate ? d.gate : put_floats(b, a->act, n);
    bool ok =
        d.w_gate && d.w_up && d.x && d.norm && d.normed && d.gate && d.up && d.act && open_ctx(b, ctx, t, NULL, &own);
    if (ok) b->ops->norm_gate_up(&own, &d), get_floats(b, a->act, d.act, n);
    end(b, ok);
}

static void bridge_norm_head(const struct op_ctx *ctx, const struct norm_head_args *a) {
    struct bridge *b = begin(ctx);
    struct op_ctx own;
    struct norm_head_args d = *a;
    struct batch placed;
    size_t n_rows = a->batch->n_logit_rows, hidden = a->head->n_in, n = n_rows * a->head->n_out;
    d.batch = &placed;
    d.head = matrix_of(b, a->head);
    d.x = put_floats(b, a->x, a->batch->n_tokens * hidden);
    d.norm = put_floats(b, a->norm, hidden);
    d.rows = put_floats(b, a->rows, n_rows * hidden);
    d.normed = a->normed == a->rows ? d.rows : put_floats(b, a->normed, n_rows * hidden);
    d.logits = put_floats(b, a->logits, n);
    bool ok = d.head && d.x && d.norm && d.rows && d.normed && d.logits &&
              room_put_batch(&b->room, a->batch, &placed, &b->why) &&
              open_ctx(b, ctx, a->batch->n_tokens, a->batch, &own);
    if (ok) b->ops->norm_head(&own, &d), get_floats(b, a->logits, d.logits, n);
    end(b, ok);
}

// ---- Life ----------------------------------------------------------------------------------------------------------

static void fill(struct bridge *b) {
    const struct ops *o = b->ops;
    b->table = (struct ops){.name = o->name,
                            .attn_block = o->attn_block,
                            .embed = bridge_embed,
                            .rmsnorm = bridge_rmsnorm,
                            .matmul = bridge_matmul,
                            .bias = bridge_bias,
                            .head_rmsnorm = bridge_head_rmsnorm,
                            .rope = bridge_rope,
                            .kv_store = bridge_kv_store,
                            .add = bridge_add,
                            .silu_mul = bridge_silu_mul,
                            .gather = bridge_gather,
                            .attn_scores = bridge_attn_scores,
                            .attn_softmax = bridge_attn_softmax,
                            .attn_values = bridge_attn_values,
                            .attn_combine = bridge_attn_combine,
                            .norm_qkv = o->norm_qkv ? bridge_norm_qkv : NULL,
                            .qk_norm_rope_store = o->qk_norm_rope_store ? bridge_qk_norm_rope_store : NULL,
                            .attention = o->attention ? bridge_attention : NULL,
                            .out_residual = o->out_residual ? bridge_out_residual : NULL,
                            .norm_gate_up = o->norm_gate_up ? bridge_norm_gate_up : NULL,
                            .down_residual = o->down_residual ? bridge_down_residual : NULL,
                            .norm_head = o->norm_head ? bridge_norm_head : NULL};
}

struct bridge *bridge_create(const struct ops *ops, const struct model *model, const struct device_weights *weights,
                             struct error *err) {
    struct bridge *b = size_alloc_zero(1, sizeof *b);
    if (!b) return error_set(err, "out of memory"), NULL;
    b->ops = ops;
    b->device = b->room.device = b->kv_room.device = ops->device;
    b->model = model;
    b->weights = weights;
    fill(b);
    return b;
}

void bridge_free(struct bridge *b) {
    if (!b) return;
    room_close(&b->room);
    room_close(&b->kv_room);
    free(b);
}

const struct ops *bridge_ops(struct bridge *b) {
    return &b->table;
}

bool bridge_error(const struct bridge *b, struct error *err) {
    return !b->failed || error_set(err, "%s", b->why.text);
}
