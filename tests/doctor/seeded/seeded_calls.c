// seeded_calls.c: mistakes between the ops, in a step's batch, in the engine and in loading. Each __wrap_ function
// stands in the place of the product's (the linker's --wrap) and calls it, unless the sown seed is its own.
#include "engine/engine.h"
#include "seeded.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static bool is(enum mistake mistake) {
    return sown && sown->mistake == mistake;
}

static bool is_at(enum mistake mistake, int layer) {
    return is(mistake) && (sown->layer < 0 || sown->layer == layer);
}

// The model in use, for mistakes that reach for another layer's weights.
static const struct model *model;

// ---- The model's calls ---------------------------------------------------------------------------------------------

void __real_ops_norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a);
void __wrap_ops_norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a);
void __wrap_ops_norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    struct norm_qkv_args b = *a;
    static float garbage[8192]; // what malloc gave: mostly zeros, with remains of other data
    for (size_t i = 0; i < 8192; i++)
        garbage[i] = i % 11 == 4 ? 1e29f : i % 13 == 6 ? -3.2e7f : i % 5 == 0 ? 1e-38f : 0;
    struct matrix swapped;
    if (is_at(CALL_BIAS, ctx->layer)) b.bq = b.bk = b.bv = garbage;
    if (is_at(CALL_NORM_OTHER, ctx->layer) && model)
        b.norm = model->layers[ctx->layer > 0 ? 0 : model->config.n_layers - 1].attn_norm;
    if (is_at(CALL_EPS, ctx->layer)) b.eps = 0;
    if (is_at(CALL_MATRIX_OTHER, ctx->layer) && model) {
        swapped = *a->wv;
        b.wk = &swapped;
    }
    __real_ops_norm_qkv(ctx, &b);
}

static void store_heads(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a) {
    if (is_at(CALL_NORM_LATE, ctx->layer) && a->q_norm) {
        size_t n = a->batch->n_tokens;
        ctx->ops->rope(ctx, a->q, a->cos_sin, n, a->n_heads, a->head_dim);
        ctx->ops->rope(ctx, a->k, a->cos_sin, n, a->n_kv_heads, a->head_dim);
        ctx->ops->head_rmsnorm(ctx, a->q, a->q_norm, a->eps, n, a->n_heads, a->head_dim);
        ctx->ops->head_rmsnorm(ctx, a->k, a->k_norm, a->eps, n, a->n_kv_heads, a->head_dim);
        ctx->ops->kv_store(ctx, a->kv, a->batch, a->k, a->v);
        return;
    }
    ops_qk_norm_rope_store(ctx, a);
}

static void attend(const struct op_ctx *ctx, const struct attention_args *a) {
    struct attention_args b = *a;
    if (is_at(CALL_SCALE, ctx->layer)) b.scale = 1 / (float)a->head_dim;
    struct batch longer = *a->batch;
    int32_t lengths[64], positions[4096];
    if (is(CALL_LENGTH) && a->batch->n_seqs <= 64 && a->batch->n_tokens <= 4096) { // advanced once in every layer
        for (size_t s = 0; s < longer.n_seqs; s++) {
            int32_t room = (longer.page_start[s + 1] - longer.page_start[s]) * KV_PAGE_TOKENS;
            lengths[s] = a->batch->kv_len[s] + ctx->layer < room ? a->batch->kv_len[s] + ctx->layer : room;
        }
        for (size_t t = 0; t < longer.n_tokens; t++) {
            positions[t] = a->batch->position[t] + ctx->layer;
            if (positions[t] >= lengths[longer.seq[t]]) positions[t] = lengths[longer.seq[t]] - 1;
        }
        longer.kv_len = lengths;
        longer.position = positions;
        b.batch = &longer;
    }
    ops_attention(ctx, &b);
}

void __real_ops_rope_attention(const struct op_ctx *ctx, const struct rope_attention_args *a);
void __wrap_ops_rope_attention(const struct op_ctx *ctx, const struct rope_attention_args *a);
void __wrap_ops_rope_attention(const struct op_ctx *ctx, const struct rope_attention_args *a) {
    bool mine = sown && sown->site == SITE_CALLS;
    if (!mine) {
        __real_ops_rope_attention(ctx, a);
        return;
    }
    store_heads(ctx, a->store);
    attend(ctx, a->attention);
}

void __real_ops_out_residual(const struct op_ctx *ctx, const struct proj_residual_args *a);
void __wrap_ops_out_residual(const struct op_ctx *ctx, const struct proj_residual_args *a);
void __wrap_ops_out_residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    size_t n = a->n_tokens * a->w->n_out;
    if (is_at(CALL_SKIPPED, ctx->layer)) return; // each of two believed that the other did it
    float *before = is_at(CALL_RESTORED, ctx->layer) ? malloc(n * sizeof *before) : NULL;
    if (before) memcpy(before, a->x, n * sizeof *before);
    __real_ops_out_residual(ctx, a);
    if (before) memcpy(a->x, before, n * sizeof *before);
    free(before);
}

// ---- A step --------------------------------------------------------------------------------------------------------

struct stale {
    int32_t position[4096], pages[4096], kv_len[64];
    size_t n_tokens, n_seqs, n_pages;
};

static void break_batch(struct batch *b, int32_t *numbers, struct stale *old) {
    size_t n_pages = (size_t)b->page_start[b->n_seqs];
    if (is(STEP_POSITION)) {
        for (size_t t = 0; t < b->n_tokens; t++) numbers[t] = b->position[t] + sown->channel;
        for (size_t t = 0; t < b->n_tokens; t++) {
            int32_t room = (b->page_start[b->seq[t] + 1] - b->page_start[b->seq[t]]) * KV_PAGE_TOKENS;
            if (numbers[t] >= room) numbers[t] = room - 1;
            if (numbers[t] < 0) numbers[t] = 0;
        }
        b->position = numbers;
    }
    if (is(STEP_RESTART)) {
        for (size_t t = 0; t < b->n_tokens; t++) numbers[t] = (int32_t)t - b->seq_start[b->seq[t]];
        b->position = numbers;
    }
    if (is(STEP_PAGES)) { // a sequence's first and last page change places
        memcpy(numbers, b->pages, n_pages * sizeof *numbers);
        for (size_t s = 0; s < b->n_seqs; s++) {
            int32_t first = b->page_start[s], last = b->page_start[s + 1] - 1;
            if (last > first) numbers[first] = b->pages[last], numbers[last] = b->pages[first];
        }
        b->pages = numbers;
    }
    if (is(STEP_PAGE_SHARED) && b->n_seqs > 1) {
        memcpy(numbers, b->pages, n_pages * sizeof *numbers);
        numbers[b->page_start[1]] = b->pages[0];
        b->pages = numbers;
    }
    if (is(STEP_ROWS) && b->n_logit_rows) {
        for (size_t r = 0; r < b->n_logit_rows; r++) numbers[r] = b->logit_rows[r] > 0 ? b->logit_rows[r] - 1 : 0;
        b->logit_rows = numbers;
    }
    if (is(STEP_SEQ) && b->n_seqs > 1) {
        for (size_t t = 0; t < b->n_tokens; t++) numbers[t] = b->seq[t] == 1 ? 0 : b->seq[t];
        b->seq = numbers;
    }
    if (is(STEP_STALE)) { // the plan of the last batch of this shape
        bool same = old->n_tokens == b->n_tokens && old->n_seqs == b->n_seqs && old->n_pages == n_pages;
        struct stale now = {.n_tokens = b->n_tokens, .n_seqs = b->n_seqs, .n_pages = n_pages};
        if (b->n_tokens > 4096 || n_pages > 4096 || b->n_seqs > 64) return;
        memcpy(now.position, b->position, b->n_tokens * sizeof *now.position);
        if (same) {
            memcpy(numbers, old->position, b->n_tokens * sizeof *numbers);
            b->position = numbers;
        }
        *old = now;
    }
}

// Every step's batch: the engine's steps go through model_queue, the doctor's own through model_forward.
static void break_step(const struct model *m, struct batch *changed) {
    static struct stale old;
    static int32_t numbers[1 << 16];
    model = m;
    if (!sown) old.n_tokens = 0;
    if (changed->n_tokens < 1 << 16) break_batch(changed, numbers, &old);
}

void __real_model_queue(const struct model *m, struct run *run, struct kv_store *kv, const struct batch *b);
void __wrap_model_queue(const struct model *m, struct run *run, struct kv_store *kv, const struct batch *b);
void __wrap_model_queue(const struct model *m, struct run *run, struct kv_store *kv, const struct batch *b) {
    struct batch changed = *b;
    break_step(m, &changed);
    __real_model_queue(m, run, kv, &changed);
}

const float *__real_model_forward(const struct model *m, struct run *run, struct kv_store *kv, const struct batch *b);
const float *__wrap_model_forward(const struct model *m, struct run *run, struct kv_store *kv, const struct batch *b);
const float *__wrap_model_forward(const struct model *m, struct run *run, struct kv_store *kv, const struct batch *b) {
    static float *last;
    static size_t n_last;
    struct batch changed = *b;
    if (!sown) n_last = 0;
    break_step(m, &changed);
    const float *logits = __real_model_forward(m, run, kv, &changed);
    if (!is(STEP_LOGITS_STALE) || b->n_logit_rows == 0) return logits;
    size_t n = b->n_logit_rows * m->config.n_vocab;
    float *now = malloc(n * sizeof *now);
    if (!now) abort();
    memcpy(now, logits, n * sizeof *now);
    if (n_last >= n) memcpy((float *)(uintptr_t)logits, last, n * sizeof *last);
    free(last);
    last = now;
    n_last = n;
    return logits;
}

// ---- The engine ----------------------------------------------------------------------------------------------------

void __real_kv_store_copy_page(struct kv_store *kv, size_t from, size_t to);
void __wrap_kv_store_copy_page(struct kv_store *kv, size_t from, size_t to);
void __wrap_kv_store_copy_page(struct kv_store *kv, size_t from, size_t to) {
    if (!is(ENGINE_COPY)) __real_kv_store_copy_page(kv, from, to);
}

bool __real_kv_reserve(struct kv_pool *p, struct kv_seq *seq, size_t n, struct kv_copy *copy);
bool __wrap_kv_reserve(struct kv_pool *p, struct kv_seq *seq, size_t n, struct kv_copy *copy);
bool __wrap_kv_reserve(struct kv_pool *p, struct kv_seq *seq, size_t n, struct kv_copy *copy) {
    bool ok = __real_kv_reserve(p, seq, n, copy);
    if (ok && is(ENGINE_SHARED_PAGE) && copy->to >= 0) { // the half-full page of a fork is not replaced
        seq->pages[seq->n_kv / KV_PAGE_TOKENS] = copy->from;
        kv_share(p, copy->from);
        kv_drop(p, copy->to);
        *copy = (struct kv_copy){-1, -1};
    }
    return ok;
}

size_t __real_kv_match(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids, size_t n, size_t limit);
size_t __wrap_kv_match(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids, size_t n, size_t limit);
size_t __wrap_kv_match(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids, size_t n, size_t limit) {
    size_t found = __real_kv_match(p, seq, ids, n, limit);
    if (is(ENGINE_MATCH) && found == 0 && n > KV_PAGE_TOKENS + 1 && limit >= KV_PAGE_TOKENS) { // a collision believed
        int32_t *other = malloc(n * sizeof *other);
        if (!other) abort();
        for (size_t i = 0; i < p->n_pages; i++) {
            if (!kv_is_cached(p, (int32_t)i)) continue;
            memcpy(other, ids, n * sizeof *other);
            memcpy(other, p->ids + i * p->page_tokens, p->page_tokens * sizeof *other);
            found = __real_kv_match(p, seq, other, n, limit);
            if (found) break;
        }
        free(other);
    }
    return found;
}

void __real_kv_trim(struct kv_pool *p, struct kv_seq *seq, size_t n);
void __wrap_kv_trim(struct kv_pool *p, struct kv_seq *seq, size_t n);
void __wrap_kv_trim(struct kv_pool *p, struct kv_seq *seq, size_t n) {
    size_t had = seq->n_kv;
    __real_kv_trim(p, seq, n);
    if (is(ENGINE_TRIM) && n > 0 && had > n) seq->n_kv = n + 1; // one position too many is kept
}

const float *__real_engine_run(tandem_engine *e, const struct engine_share *shares, size_t n_shares);
const float *__wrap_engine_run(tandem_engine *e, const struct engine_share *shares, size_t n_shares);
const float *__wrap_engine_run(tandem_engine *e, const struct engine_share *shares, size_t n_shares) {
    struct engine_share changed[64];
    struct kv_seq seqs[64];
    if (!is(ENGINE_POSITION) || n_shares > 64) return __real_engine_run(e, shares, n_shares);
    for (size_t i = 0; i < n_shares; i++) { // every sequence but the first is a position behind
        changed[i] = shares[i];
        seqs[i] = *shares[i].kv;
        if (i > 0 && seqs[i].n_kv > 0) {
            seqs[i].n_kv--;
            changed[i].ids = shares[i].ids + 1;
        }
        changed[i].kv = &seqs[i];
    }
    return __real_engine_run(e, changed, n_shares);
}

int32_t __real_sampler_choose(struct sampler *s, const tandem_sampling *p, const float *logits,
                              struct sampler_history h, const int32_t *banned, size_t n_banned, const uint32_t *mask);
int32_t __wrap_sampler_choose(struct sampler *s, const tandem_sampling *p, const float *logits,
                              struct sampler_history h, const int32_t *banned, size_t n_banned, const uint32_t *mask);
int32_t __wrap_sampler_choose(struct sampler *s, const tandem_sampling *p, const float *logits,
                              struct sampler_history h, const int32_t *banned, size_t n_banned, const uint32_t *mask) {
    if (!is(ENGINE_NOISE) || p->temperature == 0) return __real_sampler_choose(s, p, logits, h, banned, n_banned, mask);
    size_t k = p->top_k > 0 && (size_t)p->top_k < s->n_vocab ? (size_t)p->top_k : s->n_vocab;
    tandem_token *top = calloc(k, sizeof *top);
    float *biased = calloc(s->n_vocab, sizeof *biased);
    if (!top || !biased) abort();
    memcpy(biased, logits, s->n_vocab * sizeof *biased);
    for (size_t i = 0; i < p->n_bias; i++) biased[p->bias_ids[i]] += p->bias[i];
    logits_top(biased, s->n_vocab, top, k);
    double best = -INFINITY;
    int32_t id = top[0].id;
    for (size_t rank = 0; rank < k; rank++) {
        double noise = -log(-log(sampler_uniform(p->seed, h.n, (int32_t)rank)));
        double score = (double)biased[top[rank].id] / p->temperature + noise;
        if (score > best) best = score, id = top[rank].id;
    }
    free(top);
    free(biased);
    return id;
}

// ---- Loading -------------------------------------------------------------------------------------------------------

static void *copy_of(struct model *m, const void *data, size_t bytes) {
    void *copy = arena_alloc(&m->arena, bytes, 1);
    if (!copy) abort();
    return memcpy(copy, data, bytes);
}

static void break_model(struct model *m) {
    const struct model_config *c = &m->config;
    size_t layer = sown->layer < 0 ? 0 : (size_t)sown->layer, n_kv = c->n_kv_heads * c->head_dim;
    struct layer_weights *w = &m->layers[layer], *other = &m->layers[layer ? layer - 1 : c->n_layers - 1];
    struct matrix swap;
    const float *vector;
    float *changed;
    switch (sown->mistake) {
    case LOAD_BIAS: // allocated because the class has one, never written
        changed = copy_of(m, w->attn_norm, c->hidden * sizeof(float));
        changed = arena_alloc(&m->arena, n_kv, sizeof *changed);
        if (!changed) abort();
        for (size_t i = 0; i < n_kv; i++) changed[i] = i % 3 == 0 ? NAN : i % 7 == 2 ? 4.1e21f : 2e-41f;
        w->bk = changed;
        break;
    case LOAD_BIAS_MISSING: w->bq = NULL; break;
    case LOAD_NORM_LAYER: w->mlp_norm = other->mlp_norm; break;
    case LOAD_QK_SWAPPED: vector = w->q_norm, w->q_norm = w->k_norm, w->k_norm = vector; break;
    case LOAD_GATE_UP: swap = w->w_gate, w->w_gate = w->w_up, w->w_up = swap; break;
    case LOAD_KV: w->wk = w->wv; break;
    case LOAD_LAYER: w->wo = other->wo; break;
    case LOAD_WRONG_TYPE: // bf16 bits read as f16
        changed = copy_of(m, w->attn_norm, c->hidden * sizeof(float));
        for (size_t i = 0; i < c->hidden; i++) changed[i] = f16_to_f32(bf16_from_f32(changed[i]));
        w->attn_norm = changed;
        break;
    case LOAD_PLUS_ONE:
        changed = copy_of(m, m->final_norm, c->hidden * sizeof(float));
        for (size_t i = 0; i < c->hidden; i++) changed[i] += 1;
        m->final_norm = changed;
        break;
    case LOAD_ROW: { // the table begins a row late
        size_t bytes = m->embed.n_out * m->embed.row_bytes;
        unsigned char *copy = copy_of(m, m->embed.data, bytes);
        memmove(copy, copy + m->embed.row_bytes, bytes - m->embed.row_bytes);
        m->embed.data = copy;
        break;
    }
    case LOAD_UNTIED: { // a head of its own, that nobody filled with the embedding
        size_t bytes = m->head.n_out * m->head.row_bytes;
        unsigned char *copy = copy_of(m, m->head.data, bytes);
        for (size_t i = 0; i < bytes; i += 2) copy[i] = (unsigned char)(copy[i] * 31 + i);
        m->head.data = copy;
        break;
    }
    default: break;
    }
}

struct model *__real_model_load(enum model_kind kind, const char *path, const struct model_load_options *options,
                                struct error *err);
struct model *__wrap_model_load(enum model_kind kind, const char *path, const struct model_load_options *options,
                                struct error *err);
struct model *__wrap_model_load(enum model_kind kind, const char *path, const struct model_load_options *options,
                                struct error *err) {
    struct model *m = __real_model_load(kind, path, options, err);
    model = m; // ops may run before any step does
    if (m && sown && sown->site == SITE_LOAD) break_model(m);
    return m;
}

void __real_rope_rates(const struct model_config *config, const float *factors, double *inv_freq, double *magnitude);
void __wrap_rope_rates(const struct model_config *config, const float *factors, double *inv_freq, double *magnitude);
void __wrap_rope_rates(const struct model_config *config, const float *factors, double *inv_freq, double *magnitude) {
    struct model_config fallback = *config;
    if (is(LOAD_THETA)) fallback.rope.theta = 10000;
    __real_rope_rates(&fallback, factors, inv_freq, magnitude);
}

const struct ops *__real_ops_cpu(const char *isa, struct error *err);
const struct ops *__wrap_ops_cpu(const char *isa, struct error *err);
const struct ops *__wrap_ops_cpu(const char *isa, struct error *err) {
    const struct ops *table = __real_ops_cpu(isa, err);
    // The portable table is a user's last resort and stays whole.
    return table && !(isa && strcmp(isa, "portable") == 0) ? seeded_table(table) : table;
}
