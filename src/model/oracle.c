// oracle.c: a whole sequence through an oracle: the layer sequence once more, written apart from layers.c, over plain
// f64 arrays. The ops are oracle_ops.c's.
#include "model/oracle_parts.h"

#include "base/size.h"

#include <stdlib.h>

struct oracle {
    const struct model *model;
    enum oracle_kind kind;
    struct pool *pool;
    struct oracle_weights weights;
    size_t max_positions, n_positions; // room, and how many were run
    double *rates, magnitude;          // [head_dim / 2]
    double *k, *v;                     // [n_layers, max_positions, n_kv_heads * head_dim]

    // One call's activations, kept from call to call; [capacity, ...].
    size_t capacity;
    double *memory;
    double *x, *normed, *projected; // hidden
    double *q, *attn;               // n_heads * head_dim
    double *gate, *up;              // n_ff
    int32_t *position;
};

struct oracle *oracle_create(const struct model *model, enum oracle_kind kind, struct pool *pool, size_t max_positions,
                             struct error *err) {
    const struct model_config *c = &model->config;
    struct oracle *o = size_alloc_zero(1, sizeof *o);
    if (!o) {
        error_set(err, "out of memory");
        return NULL;
    }
    o->model = model;
    o->kind = kind;
    o->pool = pool;
    o->max_positions = max_positions;
    size_t n;
    if (max_positions == 0 || max_positions > INT32_MAX || !size_mul(c->n_kv_heads, c->head_dim, &n) ||
        !size_mul(n, max_positions, &n) || !size_mul(n, c->n_layers, &n)) {
        error_set(err, "oracle: cannot hold %zu positions", max_positions);
        goto err;
    }
    // Pages that no position reaches are never touched, so that they cost no memory.
    o->k = size_alloc(n, sizeof *o->k);
    o->v = size_alloc(n, sizeof *o->v);
    o->rates = size_alloc(c->head_dim / 2, sizeof *o->rates);
    if (!o->k || !o->v || !o->rates) {
        error_set(err, "out of memory for the oracle's K and V of %zu positions", max_positions);
        goto err;
    }
    if (!oracle_rope_rates(kind, model, o->rates, &o->magnitude, err) || !oracle_weights_bind(&o->weights, model, err))
        goto err;
    return o;
err:
    oracle_free(o);
    return NULL;
}

void oracle_free(struct oracle *o) {
    if (!o) return;
    oracle_weights_free(&o->weights);
    free(o->rates);
    free(o->k);
    free(o->v);
    free(o->memory);
    free(o->position);
    free(o);
}

// Room for the activations of n tokens.
static bool reserve(struct oracle *o, size_t n, struct error *err) {
    const struct model_config *c = &o->model->config;
    size_t q = c->n_heads * c->head_dim, total;
    if (n <= o->capacity) return true;
    free(o->memory);
    free(o->position);
    o->capacity = 0;
    bool fits = size_mul(n, 3 * c->hidden + 2 * q + 2 * c->n_ff, &total);
    o->memory = fits ? size_alloc(total, sizeof *o->memory) : NULL;
    o->position = size_alloc(n, sizeof *o->position);
    if (!o->memory || !o->position) return error_set(err, "out of memory for %zu tokens of the oracle", n);
    o->capacity = n;
    o->x = o->memory;
    o->normed = o->x + n * c->hidden;
    o->projected = o->normed + n * c->hidden;
    o->q = o->projected + n * c->hidden;
    o->attn = o->q + n * q;
    o->gate = o->attn + n * q;
    o->up = o->gate + n * c->n_ff;
    return true;
}

static void tap(const struct oracle_step *s, const char *name, int layer, const double *data, size_t rows,
                size_t columns) {
    if (s->tap) s->tap(s->tap_user, name, layer, data, rows, columns);
}

static bool project(const struct oracle *o, double *y, const double *x, const struct oracle_matrix *w,
                    const float *bias, size_t n, struct error *err) {
    return oracle_product(o->kind, o->pool, y, x, w, bias, n, err);
}

static bool attention_block(struct oracle *o, const struct oracle_step *s, size_t layer, struct error *err) {
    const struct model_config *c = &o->model->config;
    const struct oracle_layer *w = &o->weights.layers[layer];
    size_t n = s->n, q_width = c->n_heads * c->head_dim, kv_width = c->n_kv_heads * c->head_dim;
    double *all_k = o->k + layer * o->max_positions * kv_width, *k = all_k + s->position0 * kv_width;
    double *all_v = o->v + layer * o->max_positions * kv_width, *v = all_v + s->position0 * kv_width;
    int i = (int)layer;

    oracle_rmsnorm(o->kind, o->pool, o->normed, o->x, w->attn_norm, c->rms_eps, n, c->hidden);
    tap(s, "attn_norm", i, o->normed, n, c->hidden);
    if (!project(o, o->q, o->normed, &w->wq, w->bq, n, err) || !project(o, k, o->normed, &w->wk, w->bk, n, err) ||
        !project(o, v, o->normed, &w->wv, w->bv, n, err))
        return false;
    tap(s, "q", i, o->q, n, q_width);
    tap(s, "k", i, k, n, kv_width);
    tap(s, "v", i, v, n, kv_width);
    if (w->q_norm) {
        oracle_head_rmsnorm(o->kind, o->pool, o->q, o->q, w->q_norm, c->rms_eps, n, c->n_heads, c->head_dim);
        tap(s, "q_norm", i, o->q, n, q_width);
    }
    if (w->k_norm) {
        oracle_head_rmsnorm(o->kind, o->pool, k, k, w->k_norm, c->rms_eps, n, c->n_kv_heads, c->head_dim);
        tap(s, "k_norm", i, k, n, kv_width);
    }
    oracle_rope(o->kind, o->pool, o->q, o->q, o->rates, o->magnitude, o->position, n, c->n_heads, c->head_dim);
    oracle_rope(o->kind, o->pool, k, k, o->rates, o->magnitude, o->position, n, c->n_kv_heads, c->head_dim);
    tap(s, "q_rope", i, o->q, n, q_width);
    tap(s, "k_rope", i, k, n, kv_width);
    struct oracle_attention a = {.q = o->q,
                                 .k = all_k,
                                 .v = all_v,
                                 .position = o->position,
                                 .n_tokens = n,
                                 .n_positions = s->position0 + n,
                                 .n_heads = c->n_heads,
                                 .n_kv_heads = c->n_kv_heads,
                                 .head_dim = c->head_dim};
    if (!oracle_attention(o->kind, o->pool, o->attn, &a, err)) return false;
    tap(s, "attn", i, o->attn, n, q_width);
    if (!project(o, o->projected, o->attn, &w->wo, NULL, n, err)) return false;
    tap(s, "attn_out", i, o->projected, n, c->hidden);
    oracle_add(o->kind, o->pool, o->x, o->projected, n * c->hidden);
    tap(s, "resid_mid", i, o->x, n, c->hidden);
    return true;
}

static bool mlp_block(struct oracle *o, const struct oracle_step *s, size_t layer, struct error *err) {
    const struct model_config *c = &o->model->config;
    const struct oracle_layer *w = &o->weights.layers[layer];
    size_t n = s->n;
    int i = (int)layer;

    oracle_rmsnorm(o->kind, o->pool, o->normed, o->x, w->mlp_norm, c->rms_eps, n, c->hidden);
    tap(s, "mlp_norm", i, o->normed, n, c->hidden);
    if (!project(o, o->gate, o->normed, &w->w_gate, NULL, n, err) ||
        !project(o, o->up, o->normed, &w->w_up, NULL, n, err))
        return false;
    tap(s, "gate", i, o->gate, n, c->n_ff);
    tap(s, "up", i, o->up, n, c->n_ff);
    oracle_silu_mul(o->kind, o->pool, o->gate, o->gate, o->up, n * c->n_ff);
    tap(s, "act", i, o->gate, n, c->n_ff);
    if (!project(o, o->projected, o->gate, &w->w_down, NULL, n, err)) return false;
    tap(s, "mlp_out", i, o->projected, n, c->hidden);
    oracle_add(o->kind, o->pool, o->x, o->projected, n * c->hidden);
    tap(s, "resid", i, o->x, n, c->hidden);
    return true;
}

// The wanted rows through the last norm and the head.
static bool head(struct oracle *o, const struct oracle_step *s, double *logits, struct error *err) {
    const struct model_config *c = &o->model->config;
    double *rows = size_alloc(s->n_logit_rows * c->hidden, sizeof *rows);
    if (!rows) return error_set(err, "out of memory for %zu rows of logits", s->n_logit_rows);
    for (size_t r = 0; r < s->n_logit_rows; r++)
        memcpy(rows + r * c->hidden, o->x + s->logit_rows[r] * c->hidden, c->hidden * sizeof *rows);
    oracle_rmsnorm(o->kind, o->pool, rows, rows, o->weights.final_norm, c->rms_eps, s->n_logit_rows, c->hidden);
    tap(s, "final_norm", -1, rows, s->n_logit_rows, c->hidden);
    bool ok = project(o, logits, rows, &o->weights.head, NULL, s->n_logit_rows, err);
    if (ok) tap(s, "logits", -1, logits, s->n_logit_rows, c->n_vocab);
    free(rows);
    return ok;
}

static bool check(const struct oracle *o, const struct oracle_step *s, const double *logits, struct error *err) {
    if (s->n == 0) return error_set(err, "oracle: expected at least one token");
    if (s->position0 > o->n_positions)
        return error_set(err, "oracle: position %zu does not follow the %zu that were run", s->position0,
                         o->n_positions);
    if (s->n > o->max_positions - s->position0)
        return error_set(err, "oracle: positions %zu to %zu are beyond its %zu", s->position0, s->position0 + s->n - 1,
                         o->max_positions);
    for (size_t r = 0; r < s->n_logit_rows; r++)
        if (s->logit_rows[r] >= s->n)
            return error_set(err, "oracle: logits of row %zu: expected a row below %zu", s->logit_rows[r], s->n);
    if (s->n_logit_rows > 0 && !logits) return error_set(err, "oracle: no room for logits was given");
    return true;
}

bool oracle_run(struct oracle *o, const struct oracle_step *s, double *logits, struct error *err) {
    const struct model_config *c = &o->model->config;
    if (!check(o, s, logits, err) || !reserve(o, s->n, err)) return false;
    for (size_t t = 0; t < s->n; t++) o->position[t] = (int32_t)(s->position0 + t);
    if (!oracle_embed(o->kind, o->x, &o->weights.embed.m, s->ids, s->n, err)) return false;
    o->n_positions = s->position0; // until this step has gone through
    tap(s, "embed", -1, o->x, s->n, c->hidden);
    for (size_t layer = 0; layer < c->n_layers; layer++)
        if (!attention_block(o, s, layer, err) || !mlp_block(o, s, layer, err)) return false;
    o->n_positions = s->position0 + s->n;
    return s->n_logit_rows == 0 || head(o, s, logits, err);
}
