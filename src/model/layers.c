// layers.c: THE layer sequence, written once for every backend, every phase and every T; and the memory that it runs
// in.
#include "model/model.h"

#include "base/size.h"
#include "ops/kv_page.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// All of a step's memory, allocated once: model_forward allocates nothing.
struct run {
    struct op_ctx ctx;
    size_t max_tokens, max_logit_rows;
    size_t n_rows, n_vocab;               // of the last step's logits
    bool is_fetched;                      // they are on the host, in `fetched`
    struct device_weights host;           // the model's own tables
    const struct device_weights *weights; // what the ops read: `host`, or a device's copies
    struct device *device;                // whose memory `memory` is; NULL: the host's
    float *memory;
    size_t bytes;     // of `memory`
    float *x;         // [max_tokens, hidden] the residual stream
    float *normed;    // [max_tokens, hidden]
    float *q;         // [max_tokens, n_heads * head_dim]
    float *k, *v;     // [max_tokens, n_kv_heads * head_dim]
    float *attn;      // [max_tokens, n_heads * head_dim]
    float *projected; // [max_tokens, hidden]
    float *gate, *up; // [max_tokens, n_ff]
    float *cos_sin;   // [max_tokens, head_dim]
    float *rows;      // [max_logit_rows, hidden]
    float *x_last;    // [max_logit_rows, hidden] the residual stream of the tokens that the last layer is left with
    float *logits;    // [max_logit_rows, n_vocab]
    int32_t *last;    // [last_arrays] on the host: the arrays of the last layer's batch
    // On a device only.
    float *rope;  // [max_positions, head_dim] the cosines and sines of every position
    float *board; // what a kernel of all layers keeps from step to step
    size_t n_board;
    struct layer_refs *refs; // [n_layers] its arguments
    int32_t *arrays;         // [n_arrays] a step's batch, and the last layer's
    int32_t *staging[2];     // [n_arrays] the same on the host, in turns
    size_t n_arrays;
    int32_t *chosen;                  // [max_logit_rows] what the last step chose, for the next one
    struct greedy_choice *choices[2]; // [max_logit_rows] on the host, where the device writes too, in turns
    unsigned turn;                    // of the last step: 0 or 1; the device's marks of this number end the steps
    size_t turn_rows[2];              // its rows
    uint64_t seen[2];                 // the record_key of the last step of each turn
    float *fetched;                   // [max_logit_rows, n_vocab] the logits on the host
};

// 32-bit numbers that the arrays of a step's batch take at most; each array begins at a multiple of 4.
static size_t batch_arrays(const struct run_options *o) {
    size_t per_seq = (o->max_positions + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS, pages = o->max_pages;
    if (!pages && !size_mul(per_seq, o->max_tokens, &pages)) return SIZE_MAX;
    size_t n, rows, row = sizeof(struct sample_row) / sizeof(int32_t);
    return size_mul_add(o->max_tokens + 4, 7, pages, &n) && size_mul(o->max_logit_rows + 1, row, &rows) &&
                   size_add(n, rows + MOST_BANNED, &n)
               ? n
               : SIZE_MAX;
}

// The same for the batch of the tokens whose logits are wanted.
static size_t last_arrays(const struct run_options *o) {
    struct run_options last = *o;
    last.max_tokens = o->max_logit_rows;
    return batch_arrays(&last);
}

static size_t all_arrays(const struct run_options *o) {
    size_t n;
    return size_add(batch_arrays(o), last_arrays(o), &n) ? n : SIZE_MAX;
}

static struct layers_shape shape_of(const struct model_config *c) {
    return (struct layers_shape){c->n_layers, c->hidden, c->n_ff, c->n_heads, c->n_kv_heads, c->head_dim};
}

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
                                .n_threads = o->ops->device ? 1
                                             : o->pool      ? pool_size(o->pool)
                                                            : o->n_threads};
    size_t scratch;
    if (!ops_scratch_floats(&limits, &scratch)) return SIZE_MAX;
    size_t own = 0; // what the backend wants beside
    if (o->ops->scratch_floats && !o->ops->scratch_floats(o->ops, &limits, &own)) return SIZE_MAX;
    if (own > scratch) scratch = own;
    bool device = o->ops->device != NULL;
    struct layers_shape shape = shape_of(c);
    size_t board = o->ops->board_floats ? o->ops->board_floats(o->ops, &shape) : 0;
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
        {o->max_logit_rows, c->hidden, run ? &run->x_last : NULL},
        {o->max_logit_rows, c->n_vocab, run ? &run->logits : NULL},
        {1, scratch, run ? &run->ctx.scratch : NULL},
        {device ? o->max_positions : 0, c->head_dim, run ? &run->rope : NULL},
        {device ? all_arrays(o) : 0, 1, run ? (float **)&run->arrays : NULL},
        {device ? o->max_logit_rows : 0, 1, run ? (float **)&run->chosen : NULL},
        {board, 1, run ? &run->board : NULL},
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
    if (run) run->n_board = board;
    return total;
}

size_t run_bytes(const struct model *model, const struct run_options *options) {
    size_t bytes;
    return size_mul(lay_out(&model->config, options, NULL), sizeof(float), &bytes) ? bytes : SIZE_MAX;
}

// Cosines, then sines, of a position's angles; computed in f64, rounded once. [head_dim]
static void rope_row(const struct model *m, int32_t position, float *row) {
    size_t half = m->config.head_dim / 2;
    for (size_t i = 0; i < half; i++) {
        double angle = (double)position * m->inv_freq[i];
        row[i] = (float)(cos(angle) * m->rope_magnitude);
        row[half + i] = (float)(sin(angle) * m->rope_magnitude);
    }
}

// Of every token.
static void rope_table(const struct model *m, const struct batch *b, float *cos_sin) {
    for (size_t t = 0; t < b->n_tokens; t++) {
        float *row = cos_sin + t * m->config.head_dim;
        if (t > 0 && b->position[t] == b->position[t - 1])
            memcpy(row, row - m->config.head_dim, m->config.head_dim * sizeof *row);
        else rope_row(m, b->position[t], row);
    }
}

struct rope_work {
    const struct model *model;
    float *cos_sin;
};

static void rope_rows(void *ctx, size_t begin, size_t end, int thread) {
    (void)thread;
    struct rope_work *w = ctx;
    for (size_t i = begin; i < end; i++) rope_row(w->model, (int32_t)i, w->cos_sin + i * w->model->config.head_dim);
}

// What only a run on a device has.
static bool create_device_parts(struct run *run, const struct model *m, const struct run_options *o,
                                struct error *err) {
    struct device *d = run->device;
    run->n_arrays = all_arrays(o);
    run->fetched = d->alloc_host(d, o->max_logit_rows * m->config.n_vocab * sizeof *run->fetched);
    bool has_all = run->fetched != NULL;
    for (int i = 0; i < 2; i++) {
        run->staging[i] = d->alloc_host(d, run->n_arrays * sizeof *run->staging[i]);
        run->choices[i] = d->alloc_host(d, o->max_logit_rows * sizeof *run->choices[i]);
        has_all = has_all && run->staging[i] && run->choices[i];
    }
    if (!has_all) return error_set(err, "out of host memory for the logits of %zu rows", o->max_logit_rows);
    run->refs = size_alloc_zero(m->config.n_layers, sizeof *run->refs);
    if (!run->refs) return error_set(err, "out of memory for %zu layers", m->config.n_layers);
    d->fill(d, run->board, 0xFF, run->n_board * sizeof *run->board);
    enum { GRAIN = 64 };
    size_t row = m->config.head_dim, n_rows = o->max_positions;
    float *table = size_alloc(n_rows, row * sizeof *table);
    if (!table) return error_set(err, "out of memory for the rotations of %zu positions", n_rows);
    pool_for(o->pool, n_rows, GRAIN, rope_rows, &(struct rope_work){m, table});
    d->put(d, run->rope, table, n_rows * row * sizeof *table);
    free(table);
    return d->sync(d, err);
}

struct run *run_create(const struct model *model, const struct run_options *o, struct error *err) {
    struct run *run = size_alloc_zero(1, sizeof *run);
    size_t bytes = run_bytes(model, o);
    struct device *d = o->ops->device;
    if (run) {
        run->device = d;
        if (d) run->memory = bytes == SIZE_MAX ? NULL : d->alloc(d, bytes, "activations", err);
        else if (bytes != SIZE_MAX) run->memory = size_alloc_aligned(bytes, 1);
    }
    if (!run || !run->memory) {
        if (!d) error_set(err, "out of memory for the activations of %zu tokens", o->max_tokens);
        free(run);
        return NULL;
    }
    run->ctx = (struct op_ctx){.ops = o->ops, .pool = o->pool, .fusion = o->fusion, .layer = -1};
    run->bytes = bytes;
    // NaN, for no kernel to compute with: some copy the padding of a tile along.
    if (d) d->fill(d, run->memory, 0xFF, bytes);
    run->max_tokens = o->max_tokens;
    run->max_logit_rows = o->max_logit_rows;
    run->host = (struct device_weights){
        .embed = model->embed, .head = model->head, .final_norm = model->final_norm, .layers = model->layers};
    run->weights = d ? o->weights : &run->host;
    lay_out(&model->config, o, run);
    run->ctx.chosen = run->chosen;
    run->last = size_alloc(last_arrays(o), sizeof *run->last);
    if (!d) run->choices[0] = size_alloc(o->max_logit_rows, sizeof *run->choices[0]);
    bool ok = run->last && (d || run->choices[0]);
    if (!ok) error_set(err, "out of memory for the activations of %zu tokens", o->max_tokens);
    if (!ok || (d && !create_device_parts(run, model, o, err))) {
        run_free(run);
        return NULL;
    }
    return run;
}

void run_free(struct run *run) {
    if (!run) return;
    struct device *d = run->device;
    if (d) {
        d->free(d, run->memory);
        d->free_host(d, run->fetched);
        for (int i = 0; i < 2; i++) {
            d->free_host(d, run->staging[i]);
            d->free_host(d, run->choices[i]);
        }
        free(run->refs);
    } else {
        free(run->memory);
        free(run->choices[0]);
    }
    free(run->last);
    free(run);
}

bool run_error(struct run *run, struct error *err) {
    return !run->device || run->device->sync(run->device, err);
}

void run_poison(struct run *run) {
    // On a device the table of rotations, which every step reads, stands behind what steps write.
    size_t n = run->device ? (size_t)((unsigned char *)run->rope - (unsigned char *)run->memory) : run->bytes;
    if (run->device) run->device->fill(run->device, run->memory, 0xFF, n);
    else memset(run->memory, 0xFF, n);
}

void run_set_tap(struct run *run, tap_fn *tap, void *user) {
    run->ctx.tap = tap;
    run->ctx.tap_user = user;
}

void run_set_fusion(struct run *run, uint32_t fusion) {
    run->ctx.fusion = fusion;
}

// What becomes of q, k and v, or, without_q, of k and v alone.
static struct qk_norm_rope_store_args store_args(const struct model *m, struct run *r, struct kv_layer *kv,
                                                 const struct batch *b, const struct layer_weights *w, bool without_q) {
    const struct model_config *c = &m->config;
    return (struct qk_norm_rope_store_args){.batch = b,
                                            .n_heads = without_q ? 0 : c->n_heads,
                                            .n_kv_heads = c->n_kv_heads,
                                            .head_dim = c->head_dim,
                                            .q_norm = w->q_norm,
                                            .k_norm = w->k_norm,
                                            .eps = (float)c->rms_eps,
                                            .cos_sin = r->cos_sin,
                                            .q = r->q,
                                            .k = r->k,
                                            .v = r->v,
                                            .kv = kv};
}

static void norm_qkv(struct run *r, const float *x, const struct layer_weights *w,
                     const struct qk_norm_rope_store_args *store) {
    ops_norm_qkv(&r->ctx, &(struct norm_qkv_args){.n_tokens = store->batch->n_tokens,
                                                  .x = x,
                                                  .norm = w->attn_norm,
                                                  .eps = store->eps,
                                                  .wq = store->n_heads ? &w->wq : NULL,
                                                  .wk = &w->wk,
                                                  .wv = &w->wv,
                                                  .bq = w->bq,
                                                  .bk = w->bk,
                                                  .bv = w->bv,
                                                  .normed = r->normed,
                                                  .q = r->q,
                                                  .k = r->k,
                                                  .v = r->v,
                                                  .store = store});
}

// x: [n_tokens, hidden] the residual stream of the batch's tokens; here and below.
static void attention_block(const struct model *m, struct run *r, struct kv_layer *kv, const struct batch *b, float *x,
                            const struct layer_weights *w) {
    const struct model_config *c = &m->config;
    struct qk_norm_rope_store_args store = store_args(m, r, kv, b, w, false);
    norm_qkv(r, x, w, &store);
    struct attention_args attention = {.batch = b,
                                       .n_heads = c->n_heads,
                                       .n_kv_heads = c->n_kv_heads,
                                       .head_dim = c->head_dim,
                                       .scale = (float)(1 / sqrt((double)c->head_dim)),
                                       .q = r->q,
                                       .kv = kv,
                                       .out = r->attn,
                                       .reader = &w->wo};
    ops_rope_attention(&r->ctx, &(struct rope_attention_args){&store, &attention});
    ops_out_residual(&r->ctx,
                     &(struct proj_residual_args){
                         .n_tokens = b->n_tokens, .in = r->attn, .w = &w->wo, .projected = r->projected, .x = x});
    ops_tap(&r->ctx, "resid_mid", x, b->n_tokens, c->hidden);
}

// All that a layer has to do for tokens whose result nobody wants: its K and V are what later ones attend to.
static void store_kv(const struct model *m, struct run *r, struct kv_layer *kv, const struct batch *b, const float *x,
                     const struct layer_weights *w) {
    struct qk_norm_rope_store_args store = store_args(m, r, kv, b, w, true);
    norm_qkv(r, x, w, &store);
    ops_qk_norm_rope_store(&r->ctx, &store);
}

static void mlp_block(const struct model *m, struct run *r, const struct batch *b, float *x,
                      const struct layer_weights *w) {
    ops_norm_gate_up(&r->ctx, &(struct norm_gate_up_args){.n_tokens = b->n_tokens,
                                                          .x = x,
                                                          .norm = w->mlp_norm,
                                                          .eps = (float)m->config.rms_eps,
                                                          .w_gate = &w->w_gate,
                                                          .w_up = &w->w_up,
                                                          .normed = r->normed,
                                                          .gate = r->gate,
                                                          .up = r->up,
                                                          .act = r->gate,
                                                          .reader = &w->w_down});
    ops_down_residual(&r->ctx,
                      &(struct proj_residual_args){
                          .n_tokens = b->n_tokens, .in = r->gate, .w = &w->w_down, .projected = r->projected, .x = x});
    ops_tap(&r->ctx, "resid", x, b->n_tokens, m->config.hidden);
}

// Whether nobody wants to see what a step of one token a sequence does inside.
static bool runs_as_one(const struct run *r, const struct batch *b) {
    uint32_t all;
    return fusion_available(r->ctx.ops, FUSED_STEP) && fusion_parse("on", &all, NULL) && r->ctx.fusion == all &&
           !r->ctx.tap && b->n_tokens == b->n_seqs;
}

// All layers as one op, where the backend has it for this step; `opening`, unless NULL, in the same op.
static bool all_layers(const struct model *m, struct run *r, struct kv_store *kv, const struct batch *b,
                       const struct step_opening *opening) {
    const struct model_config *c = &m->config;
    if (!r->n_board || !runs_as_one(r, b)) return false;
    for (size_t i = 0; i < c->n_layers; i++) {
        const struct layer_weights *w = &r->weights->layers[i];
        r->refs[i] = (struct layer_refs){w->attn_norm, w->mlp_norm, w->bq,    w->bk,      w->bv,
                                         w->q_norm,    w->k_norm,   &w->wq,   &w->wk,     &w->wv,
                                         &w->wo,       &w->w_gate,  &w->w_up, &w->w_down, &kv->layers[i]};
    }
    return r->ctx.ops->layers(&r->ctx, &(struct layers_args){.shape = shape_of(c),
                                                             .batch = b,
                                                             .opening = opening,
                                                             .layers = r->refs,
                                                             .eps = (float)c->rms_eps,
                                                             .scale = (float)(1 / sqrt((double)c->head_dim)),
                                                             .cos_sin = r->cos_sin,
                                                             .x = r->x,
                                                             .board = r->board});
}

// Among which tokens those of the rows are chosen.
static enum sampling_filter filter_of(const struct run *r, const struct batch *b) {
    return b->sample ? sampling_filter(b->sample, b->n_logit_rows, r->n_vocab) : FILTER_NONE;
}

static void head_and_choice(const struct model *m, struct run *r, const struct batch *b, const float *x) {
    if (b->n_logit_rows == 0) return;
    ops_norm_head(&r->ctx, &(struct norm_head_args){.batch = b,
                                                    .x = x,
                                                    .norm = r->weights->final_norm,
                                                    .eps = (float)m->config.rms_eps,
                                                    .head = &r->weights->head,
                                                    .rows = r->rows,
                                                    .normed = r->rows,
                                                    .logits = r->logits});
    ops_tap(&r->ctx, "logits", r->logits, b->n_logit_rows, m->config.n_vocab);
    if (b->sample)
        r->ctx.ops->sample(&r->ctx, &(struct sample_args){.batch = b,
                                                          .logits = r->logits,
                                                          .n_vocab = m->config.n_vocab,
                                                          .filter = filter_of(r, b->host),
                                                          .out = r->choices[r->turn],
                                                          .chosen = r->chosen});
    else if (r->ctx.ops->choose)
        r->ctx.ops->choose(&r->ctx, r->choices[r->turn], r->logits, b->n_logit_rows, m->config.n_vocab);
}

// Of each token's position.
static void rotations(const struct model *m, struct run *r, const struct batch *b) {
    if (r->device) r->ctx.ops->gather(&r->ctx, r->cos_sin, r->rope, b->position, b->n_tokens, m->config.head_dim);
    else rope_table(m, b, r->cos_sin);
}

// What the last layer is left with when every token's K and V are stored: the tokens whose logits are wanted, as a
// batch of one token a sequence, with its arrays in r->last. False: it has all tokens, since too few would be left out,
// several of a sequence are wanted, somebody watches, or the step is of one token a sequence, and may be recorded.
static bool last_batch(struct run *r, const struct batch *b, struct batch *last) {
    size_t n = b->n_logit_rows, n_pages = 0;
    if (2 * n > b->n_tokens || b->n_tokens - n < r->ctx.ops->least_left_out || b->n_tokens == b->n_seqs || r->ctx.tap)
        return false;
    for (size_t i = 1; i < n; i++)
        if (b->seq[b->logit_rows[i]] <= b->seq[b->logit_rows[i - 1]]) return false;
    int32_t *token = r->last, *position = token + n, *kv_len = position + n, *index = kv_len + n,
            *page_start = index + n + 1, *pages = page_start + n + 1;
    for (size_t i = 0; i < n; i++) {
        int32_t t = b->logit_rows[i], seq = b->seq[t], n_own = b->position[t] / KV_PAGE_TOKENS + 1;
        token[i] = b->token[t];
        position[i] = b->position[t];
        kv_len[i] = position[i] + 1;
        index[i] = (int32_t)i;
        page_start[i] = (int32_t)n_pages;
        memcpy(pages + n_pages, b->pages + b->page_start[seq], (size_t)n_own * sizeof *pages);
        n_pages += (size_t)n_own;
    }
    index[n] = (int32_t)n;
    page_start[n] = (int32_t)n_pages;
    *last = (struct batch){.n_tokens = n,
                           .n_seqs = n,
                           .n_logit_rows = n,
                           .token = token,
                           .position = position,
                           .seq = index,
                           .seq_start = index,
                           .page_start = page_start,
                           .pages = pages,
                           .kv_len = kv_len,
                           .logit_rows = index,
                           .sample = b->sample,
                           .banned = b->banned,
                           .n_banned = b->n_banned};
    return true;
}

// THE layer sequence. `last`: the last layer's batch, b or what last_batch makes of it.
static void run_layers(const struct model *m, struct run *r, struct kv_store *kv, const struct batch *b,
                       const struct batch *last) {
    const struct device_weights *w = r->weights;
    float *x = r->x;
    r->ctx.layer = -1;
    rotations(m, r, b);
    r->ctx.ops->embed(&r->ctx, x, &w->embed, b->token, b->n_tokens);
    ops_tap(&r->ctx, "embed", x, b->n_tokens, m->config.hidden);
    bool done = all_layers(m, r, kv, b, NULL);
    for (size_t i = 0; !done && i < m->config.n_layers; i++) {
        r->ctx.layer = (int)i;
        if (i + 1 == m->config.n_layers && last != b) {
            store_kv(m, r, &kv->layers[i], b, x, &w->layers[i]);
            if (last->n_tokens == 0) return;
            r->ctx.ops->gather(&r->ctx, r->x_last, x, b->logit_rows, last->n_tokens, m->config.hidden);
            rotations(m, r, last);
            b = last;
            x = r->x_last;
        }
        attention_block(m, r, &kv->layers[i], b, x, &w->layers[i]);
        mlp_block(m, r, b, x, &w->layers[i]);
    }
    r->ctx.layer = -1;
    head_and_choice(m, r, b, x);
}

// Puts a batch's arrays where the device may fetch them, from number `at` of the staging on; *placed has the same shape
// and points to where they belong there. A step's places depend on its shape alone, so that a recorded sequence finds
// the next batch of its shape where the last one was. Returns the number behind them.
static size_t stage_batch(struct run *r, size_t at, const struct batch *b, struct batch *placed) {
    *placed = *b;
    placed->host = b;
    size_t per_row = sizeof *b->sample / sizeof(int32_t);
    int32_t *staging = r->staging[r->turn];
    const struct {
        const void *from;
        const int32_t **to;
        size_t n;
    } parts[] = {
        {b->sample, (const int32_t **)&placed->sample, b->sample ? b->n_logit_rows * per_row : 0},
        {b->banned, &placed->banned, b->n_banned},
        {b->token, &placed->token, b->n_tokens},
        {b->position, &placed->position, b->n_tokens},
        {b->seq, &placed->seq, b->n_tokens},
        {b->seq_start, &placed->seq_start, b->n_seqs + 1},
        {b->page_start, &placed->page_start, b->n_seqs + 1},
        {b->kv_len, &placed->kv_len, b->n_seqs},
        {b->logit_rows, &placed->logit_rows, b->n_logit_rows},
        {b->pages, &placed->pages, (size_t)b->page_start[b->n_seqs]}, // the last, since only its length varies
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (parts[i].n) memcpy(staging + at, parts[i].from, parts[i].n * sizeof *staging);
        if (parts[i].from) *parts[i].to = r->arrays + at;
        at += (parts[i].n + 3) & ~(size_t)3;
    }
    return at;
}

// Which staging the next step has.
static void turn_staging(struct run *r, const struct batch *b) {
    r->turn ^= 1;
    r->turn_rows[r->turn] = b->n_logit_rows;
    r->device->reach(r->device, r->turn); // the step before the last may not have read its staging yet
}

static void send_staged(struct run *r, size_t n) {
    r->device->send(r->device, r->arrays, r->staging[r->turn], n * sizeof *r->arrays);
}

void run_store_kv(struct run *r, struct kv_layer *layer, const struct batch *b, const float *k, const float *v) {
    struct device *d = r->device;
    size_t bytes = b->n_tokens * layer->n_kv_heads * layer->head_dim * sizeof *k;
    if (!d) {
        r->ctx.ops->kv_store(&r->ctx, layer, b, k, v);
        return;
    }
    struct batch placed;
    turn_staging(r, b);
    send_staged(r, stage_batch(r, 0, b, &placed));
    d->put(d, r->k, k, bytes);
    d->put(d, r->v, v, bytes);
    r->ctx.ops->kv_store(&r->ctx, layer, &placed, r->k, r->v);
    d->sync(d, NULL);
}

// What a recorded sequence depends on: its shape, its memory, and the contexts' length up to the next power of two. 0:
// not to be recorded.
static uint64_t record_key(const struct run *r, const struct kv_store *kv, const struct batch *b) {
    enum { MAX_RECORDED = 256 }; // sequences
    if (!runs_as_one(r, b) || b->n_seqs > MAX_RECORDED) return 0;
    int32_t longest = ATTN_CHUNK;
    for (size_t i = 0; i < b->n_seqs; i++)
        while (longest < b->kv_len[i]) longest *= 2;
    uint64_t sampling = b->sample ? 1 + 3 * (b->n_banned + 1) + filter_of(r, b) : 0;
    const uint64_t parts[] = {b->n_tokens,          b->n_logit_rows,       (uint64_t)longest,
                              (uintptr_t)r->memory, (uintptr_t)kv->memory, 2 * sampling + r->turn};
    uint64_t key = 14695981039346656037u;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) key = (key ^ parts[i]) * 1099511628211u;
    return key ? key : 1;
}

// A step of one token whose layers are one op: it is so few kernels that they are queued one by one, and without a
// break behind the step before. False: nothing has been queued.
static bool chain_step(const struct model *m, struct run *r, struct kv_store *kv, const struct batch *placed,
                       size_t n_staged) {
    struct device *d = r->device;
    if (!d->mark_by_choice || placed->n_tokens != 1 || placed->n_logit_rows != 1) return false;
    struct step_opening opening = {r->staging[r->turn], r->arrays, n_staged, &r->weights->embed, r->rope};
    r->ctx.layer = -1;
    if (!all_layers(m, r, kv, placed, &opening)) return false;
    d->mark_by_choice(d, r->turn);
    head_and_choice(m, r, placed, r->x);
    return true;
}

static void forward_on_device(const struct model *m, struct run *r, struct kv_store *kv, const struct batch *b,
                              const struct batch *last) {
    struct device *d = r->device;
    struct batch placed, placed_last;
    turn_staging(r, b);
    size_t n_staged = stage_batch(r, 0, b, &placed);
    if (chain_step(m, r, kv, &placed, n_staged)) return;
    if (last != b) n_staged = stage_batch(r, n_staged, last, &placed_last);
    send_staged(r, n_staged);
    enum { RECORDED_AT_ONCE = 8 }; // sequences
    uint64_t key = record_key(r, kv, b), seen = r->seen[r->turn];
    r->seen[r->turn] = key;
    if (b->n_seqs > RECORDED_AT_ONCE && key != seen) key = 0; // worth recording when it has come again
    if (!(key && d->begin(d, key))) {
        run_layers(m, r, kv, &placed, last == b ? &placed : &placed_last);
        if (key) d->end(d);
    }
    d->mark(d, r->turn);
}

void model_queue(const struct model *m, struct run *r, struct kv_store *kv, const struct batch *b) {
    r->is_fetched = false;
    r->n_rows = b->n_logit_rows;
    r->n_vocab = m->config.n_vocab;
    struct batch rows;
    const struct batch *last = last_batch(r, b, &rows) ? &rows : b;
    if (r->device) forward_on_device(m, r, kv, b, last);
    else run_layers(m, r, kv, b, last);
}

const float *run_logits(struct run *r) {
    struct device *d = r->device;
    if (!d) return r->logits;
    if (r->is_fetched) return r->fetched;
    r->is_fetched = true;
    d->get(d, r->fetched, r->logits, r->n_rows * r->n_vocab * sizeof *r->fetched);
    if (!d->sync(d, NULL))
        for (size_t i = 0; i < r->n_rows * r->n_vocab; i++) r->fetched[i] = NAN;
    return r->fetched;
}

// On the host: the logarithm of the sum is f64.
static struct greedy_choice choose(const float *logits, size_t n) {
    struct greedy_choice c = {.ok = 1};
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(logits[i])) c.ok = 0;
        if (logits[i] > logits[c.id]) c.id = (int32_t)i;
    }
    if (!c.ok) return c;
    for (size_t i = 0; i < n; i++) sum += exp((double)logits[i] - (double)logits[c.id]);
    c.logprob = (float)-log(sum);
    return c;
}

const struct greedy_choice *run_choices(struct run *r) {
    struct device *d = r->device;
    if (!d) {
        for (size_t i = 0; i < r->n_rows; i++) r->choices[0][i] = choose(r->logits + i * r->n_vocab, r->n_vocab);
        return r->choices[0];
    }
    return run_choices_of(r, r->turn);
}

unsigned run_turn(const struct run *r) {
    return r->turn;
}

const struct greedy_choice *run_choices_of(struct run *r, unsigned turn) {
    if (!r->device->reach(r->device, turn))
        for (size_t i = 0; i < r->turn_rows[turn]; i++) r->choices[turn][i].ok = 0;
    return r->choices[turn];
}

const float *model_forward(const struct model *m, struct run *r, struct kv_store *kv, const struct batch *b) {
    model_queue(m, r, kv, b);
    return run_logits(r);
}

// ---- KV -----------------------------------------------------------------------------------------------------------

size_t kv_store_bytes(const struct model_config *c, enum dtype type, size_t n_pages) {
    size_t n, row = 2 * kv_bytes(type, c->head_dim) * KV_PAGE_TOKENS;
    return size_mul(row, c->n_kv_heads * c->n_layers, &n) && size_mul(n, n_pages, &n) ? n : SIZE_MAX;
}

bool kv_store_create_on(struct device *d, struct kv_store *kv, const struct model_config *c, enum dtype type,
                        size_t n_pages, struct error *err) {
    *kv = (struct kv_store){.n_layers = c->n_layers, .n_pages = n_pages, .device = d};
    if (!kv_type_fits(type, c->head_dim, d, err)) return false;
    kv->bytes = kv_store_bytes(c, type, n_pages);
    size_t per_layer = kv->bytes / (2 * c->n_layers);
    bool fits = kv->bytes != SIZE_MAX;
    if (d) d->load_attention(d, type, c->head_dim);
    kv->layers = size_alloc_zero(c->n_layers, sizeof *kv->layers);
    // Not cleared: a slot is written before it is read, and `tandem check` proves it with poison.
    if (fits && kv->layers) kv->memory = d ? d->alloc(d, kv->bytes, "KV pages", err) : size_alloc_aligned(kv->bytes, 1);
    if (!kv->layers || !kv->memory) {
        bool said = d && fits && kv->layers;
        kv_store_free(kv);
        return said ? false : error_set(err, "out of memory for %zu KV pages of %d tokens", n_pages, KV_PAGE_TOKENS);
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

bool kv_store_create(struct kv_store *kv, const struct model_config *c, enum dtype type, size_t n_pages,
                     struct error *err) {
    return kv_store_create_on(NULL, kv, c, type, n_pages, err);
}

void kv_store_free(struct kv_store *kv) {
    free(kv->layers);
    if (kv->device) kv->device->free(kv->device, kv->memory);
    else free(kv->memory);
    *kv = (struct kv_store){0};
}

void kv_store_copy_page(struct kv_store *kv, size_t from, size_t to) {
    struct device *d = kv->device;
    for (size_t i = 0; i < kv->n_layers; i++) {
        struct kv_layer *l = &kv->layers[i];
        size_t page = kv_page_bytes(l);
        unsigned char *of[] = {l->k, l->v};
        for (size_t j = 0; j < 2; j++) {
            if (d) d->move(d, of[j] + to * page, of[j] + from * page, page);
            else memcpy(of[j] + to * page, of[j] + from * page, page);
        }
    }
}
