// layers.c: THE layer sequence, written once for every backend, every phase and every T; and the memory that it runs
// in.
#include "model/model.h"

#include "base/size.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// All of a step's memory, allocated once: model_forward allocates nothing.
struct run {
    struct op_ctx ctx;
    size_t max_tokens, max_logit_rows;
    float *memory;
    float *x;         // [max_tokens, hidden] the residual stream
    float *normed;    // [max_tokens, hidden]
    float *q;         // [max_tokens, n_heads * head_dim]
    float *k, *v;     // [max_tokens, n_kv_heads * head_dim]
    float *attn;      // [max_tokens, n_heads * head_dim]
    float *projected; // [max_tokens, hidden]
    float *gate, *up; // [max_tokens, n_ff]
    float *cos_sin;   // [max_tokens, head_dim]
    float *rows;      // [max_logit_rows, hidden]
    float *logits;    // [max_logit_rows, n_vocab]
};

// The pieces of run.memory, in order; each is aligned to 16 floats. Returns the floats needed, SIZE_MAX on overflow.
// With `run`, fills its pointers.
static size_t lay_out(const struct model_config *c, const struct run_options *o, struct run *run) {
    size_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    size_t width = c->hidden > c->n_ff ? c->hidden : c->n_ff;
    struct ops_limits limits = {.max_tokens = o->max_tokens,
                                .max_positions = o->max_positions,
                                .max_width = width > q ? width : q,
                                .n_heads = c->n_heads,
                                .head_dim = c->head_dim,
                                .n_threads = pool_size(o->pool)};
    size_t scratch;
    if (!ops_scratch_floats(&limits, &scratch)) return SIZE_MAX;
    struct {
        size_t rows, columns;
        float **at;
    } parts[] = {
        {o->max_tokens, c->hidden, run ? &run->x : NULL},
        {o->max_tokens, c->hidden, run ? &run->normed : NULL},
        {o->max_tokens, q, run ? &run->q : NULL},
        {o->max_tokens, kv, run ? &run->k : NULL},
        {o->max_tokens, kv, run ? &run->v : NULL},
        {o->max_tokens, q, run ? &run->attn : NULL},
        {o->max_tokens, c->hidden, run ? &run->projected : NULL},
        {o->max_tokens, c->n_ff, run ? &run->gate : NULL},
        {o->max_tokens, c->n_ff, run ? &run->up : NULL},
        {o->max_tokens, c->head_dim, run ? &run->cos_sin : NULL},
        {o->max_logit_rows, c->hidden, run ? &run->rows : NULL},
        {o->max_logit_rows, c->n_vocab, run ? &run->logits : NULL},
        {1, scratch, run ? &run->ctx.scratch : NULL},
    };
    size_t total = 0;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (run) *parts[i].at = run->memory + total;
        size_t n;
        if (!size_mul(parts[i].rows, parts[i].columns, &n) || !size_add(total, n, &total) ||
            !size_align_up(total, 16, &total))
            return SIZE_MAX;
    }
    if (run) run->ctx.scratch_floats = scratch;
    return total;
}

size_t run_bytes(const struct model *model, const struct run_options *options) {
    size_t bytes;
    return size_mul(lay_out(&model->config, options, NULL), sizeof(float), &bytes) ? bytes : SIZE_MAX;
}

struct run *run_create(const struct model *model, const struct run_options *o, struct error *err) {
    struct run *run = size_alloc_zero(1, sizeof *run);
    size_t floats = lay_out(&model->config, o, NULL);
    if (run && floats != SIZE_MAX) run->memory = size_alloc_aligned(floats, sizeof *run->memory);
    if (!run || !run->memory) {
        error_set(err, "out of memory for the activations of %zu tokens", o->max_tokens);
        free(run);
        return NULL;
    }
    run->ctx = (struct op_ctx){.ops = o->ops, .pool = o->pool, .fusion = o->fusion, .layer = -1};
    run->max_tokens = o->max_tokens;
    run->max_logit_rows = o->max_logit_rows;
    lay_out(&model->config, o, run);
    return run;
}

void run_free(struct run *run) {
    if (!run) return;
    free(run->memory);
    free(run);
}

void run_set_tap(struct run *run, tap_fn *tap, void *user) {
    run->ctx.tap = tap;
    run->ctx.tap_user = user;
}

void run_set_fusion(struct run *run, uint32_t fusion) {
    run->ctx.fusion = fusion;
}

static void tap(const struct op_ctx *ctx, const char *name, const float *data, size_t rows, size_t columns) {
    if (ctx->tap) ctx->tap(ctx->tap_user, name, ctx->layer, data, rows, columns);
}

// Cosines, then sines, of every token's angles; computed in f64, rounded once.
static void rope_table(const struct model *m, const struct batch *b, float *cos_sin) {
    size_t half = m->config.head_dim / 2;
    for (size_t t = 0; t < b->n_tokens; t++) {
        float *row = cos_sin + t * m->config.head_dim;
        if (t > 0 && b->position[t] == b->position[t - 1]) {
            memcpy(row, row - m->config.head_dim, m->config.head_dim * sizeof *row);
            continue;
        }
        for (size_t i = 0; i < half; i++) {
            double angle = (double)b->position[t] * m->inv_freq[i];
            row[i] = (float)(cos(angle) * m->rope_magnitude);
            row[half + i] = (float)(sin(angle) * m->rope_magnitude);
        }
    }
}

static void attention_block(const struct model *m, struct run *r, struct kv_layer *kv, const struct batch *b,
                            const struct layer_weights *w) {
    const struct model_config *c = &m->config;
    float eps = (float)c->rms_eps;
    ops_norm_qkv(&r->ctx, &(struct norm_qkv_args){.n_tokens = b->n_tokens,
                                                  .x = r->x,
                                                  .norm = w->attn_norm,
                                                  .eps = eps,
                                                  .wq = &w->wq,
                                                  .wk = &w->wk,
                                                  .wv = &w->wv,
                                                  .bq = w->bq,
                                                  .bk = w->bk,
                                                  .bv = w->bv,
                                                  .normed = r->normed,
                                                  .q = r->q,
                                                  .k = r->k,
                                                  .v = r->v});
    ops_qk_norm_rope_store(&r->ctx, &(struct qk_norm_rope_store_args){.batch = b,
                                                                      .n_heads = c->n_heads,
                                                                      .n_kv_heads = c->n_kv_heads,
                                                                      .head_dim = c->head_dim,
                                                                      .q_norm = w->q_norm,
                                                                      .k_norm = w->k_norm,
                                                                      .eps = eps,
                                                                      .cos_sin = r->cos_sin,
                                                                      .q = r->q,
                                                                      .k = r->k,
                                                                      .v = r->v,
                                                                      .kv = kv});
    ops_attention(&r->ctx, &(struct attention_args){.batch = b,
                                                    .n_heads = c->n_heads,
                                                    .n_kv_heads = c->n_kv_heads,
                                                    .head_dim = c->head_dim,
                                                    .scale = (float)(1 / sqrt((double)c->head_dim)),
                                                    .q = r->q,
                                                    .kv = kv,
                                                    .out = r->attn});
    ops_out_residual(&r->ctx,
                     &(struct proj_residual_args){
                         .n_tokens = b->n_tokens, .in = r->attn, .w = &w->wo, .projected = r->projected, .x = r->x});
    tap(&r->ctx, "resid_mid", r->x, b->n_tokens, c->hidden);
}

static void mlp_block(const struct model *m, struct run *r, const struct batch *b, const struct layer_weights *w) {
    ops_norm_gate_up(&r->ctx, &(struct norm_gate_up_args){.n_tokens = b->n_tokens,
                                                          .x = r->x,
                                                          .norm = w->mlp_norm,
                                                          .eps = (float)m->config.rms_eps,
                                                          .w_gate = &w->w_gate,
                                                          .w_up = &w->w_up,
                                                          .normed = r->normed,
                                                          .gate = r->gate,
                                                          .up = r->up,
                                                          .act = r->gate});
    ops_down_residual(
        &r->ctx, &(struct proj_residual_args){
                     .n_tokens = b->n_tokens, .in = r->gate, .w = &w->w_down, .projected = r->projected, .x = r->x});
    tap(&r->ctx, "resid", r->x, b->n_tokens, m->config.hidden);
}

const float *model_forward(const struct model *m, struct run *r, struct kv_store *kv, const struct batch *b) {
    r->ctx.layer = -1;
    rope_table(m, b, r->cos_sin);
    r->ctx.ops->embed(&r->ctx, r->x, &m->embed, b->token, b->n_tokens);
    tap(&r->ctx, "embed", r->x, b->n_tokens, m->config.hidden);
    for (size_t i = 0; i < m->config.n_layers; i++) {
        r->ctx.layer = (int)i;
        attention_block(m, r, &kv->layers[i], b, &m->layers[i]);
        mlp_block(m, r, b, &m->layers[i]);
    }
    r->ctx.layer = -1;
    if (b->n_logit_rows == 0) return r->logits;
    ops_norm_head(&r->ctx, &(struct norm_head_args){.batch = b,
                                                    .x = r->x,
                                                    .norm = m->final_norm,
                                                    .eps = (float)m->config.rms_eps,
                                                    .head = &m->head,
                                                    .rows = r->rows,
                                                    .normed = r->rows,
                                                    .logits = r->logits});
    tap(&r->ctx, "logits", r->logits, b->n_logit_rows, m->config.n_vocab);
    return r->logits;
}

// ---- KV
// --------------------------------------------------------------------------------------------------------------

bool kv_store_create(struct kv_store *kv, const struct model_config *c, enum dtype type, size_t n_pages,
                     struct error *err) {
    *kv = (struct kv_store){.n_layers = c->n_layers, .n_pages = n_pages};
    size_t element = type == DTYPE_F32 ? 4 : 2, per_layer,
           page = c->n_kv_heads * KV_PAGE_TOKENS * c->head_dim * element;
    bool fits = size_mul(page, n_pages, &per_layer) && size_mul(per_layer, 2 * c->n_layers, &kv->bytes);
    kv->layers = size_alloc_zero(c->n_layers, sizeof *kv->layers);
    // Not cleared: a slot is written before it is read, and `tandem check` proves it with poison.
    kv->memory = fits ? size_alloc_aligned(kv->bytes, 1) : NULL;
    if (!kv->layers || !kv->memory) {
        kv_store_free(kv);
        return error_set(err, "out of memory for %zu KV pages of %d tokens", n_pages, KV_PAGE_TOKENS);
    }
    for (size_t i = 0; i < c->n_layers; i++) {
        unsigned char *at = (unsigned char *)kv->memory + 2 * i * per_layer;
        kv->layers[i] = (struct kv_layer){.type = type,
                                          .k = at,
                                          .v = at + per_layer,
                                          .n_pages = n_pages,
                                          .n_kv_heads = c->n_kv_heads,
                                          .head_dim = c->head_dim};
    }
    return true;
}

void kv_store_free(struct kv_store *kv) {
    free(kv->layers);
    free(kv->memory);
    *kv = (struct kv_store){0};
}

void kv_store_copy_page(struct kv_store *kv, size_t from, size_t to) {
    for (size_t i = 0; i < kv->n_layers; i++) {
        struct kv_layer *l = &kv->layers[i];
        size_t page = l->n_kv_heads * KV_PAGE_TOKENS * l->head_dim * (l->type == DTYPE_F32 ? 4 : 2);
        memcpy((unsigned char *)l->k + to * page, (const unsigned char *)l->k + from * page, page);
        memcpy((unsigned char *)l->v + to * page, (const unsigned char *)l->v + from * page, page);
    }
}
