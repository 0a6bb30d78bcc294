// diagnose_spy.c: the spying ops. Each runs the op under test, twice (a race shows as two results), and asks the walk
// whether inputs, weights, batch and numbers are right. It also runs norms on inputs small enough for their epsilon to
// count, and attention and silu on large ones: where a step's own numbers would hide a mistake.
#include "doctor/diagnose_spy.h"

#include "base/size.h"
#include "ops/kv_page.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A call of one op: `fused` FUSED_COUNT and op, or OP_FUSED and which.
struct op_args {
    enum step_op op;
    enum fused_op fused;
    float *y;
    const float *x, *w, *up; // up: silu_mul's, w: a vector; kv_store: x = k, up = v
    const struct matrix *m;
    float eps;
    size_t n_rows, n, n_heads, head_dim;
    const int32_t *ids;
    struct kv_layer *kv;
    const struct batch *batch;
    union {
        struct norm_qkv_args qkv;
        struct qk_norm_rope_store_args store;
        struct attention_args attention;
        struct proj_residual_args residual;
        struct norm_gate_up_args gate_up;
        struct norm_head_args head;
    } f;
};

// An output: where, how long, and whether it is an input, too.
struct output {
    float **at;
    size_t n;
    bool in_place;
    float *before, *first; // copies: before the call, after the first run
};
enum { MAX_OUTPUTS = 3 };

static struct walk *walk_of(const struct op_ctx *ctx) {
    return (struct walk *)(uintptr_t)ctx->ops;
}

static void invoke(const struct op_ctx *ctx, const struct op_args *a) {
    const struct ops *o = ctx->ops;
    switch (a->op) {
    case OP_EMBED: o->embed(ctx, a->y, a->m, a->ids, a->n_rows); return;
    case OP_NORM: o->rmsnorm(ctx, a->y, a->x, a->w, a->eps, a->n_rows, a->n); return;
    case OP_MATMUL: o->matmul(ctx, a->y, a->x, a->m, a->n_rows); return;
    case OP_BIAS: o->bias(ctx, a->y, a->w, a->n_rows, a->n); return;
    case OP_HEAD_NORM: o->head_rmsnorm(ctx, a->y, a->w, a->eps, a->n_rows, a->n_heads, a->head_dim); return;
    case OP_ROPE: o->rope(ctx, a->y, a->x, a->n_rows, a->n_heads, a->head_dim); return;
    case OP_STORE: o->kv_store(ctx, a->kv, a->batch, a->x, a->up); return;
    case OP_ADD: o->add(ctx, a->y, a->x, a->n); return;
    case OP_SILU: o->silu_mul(ctx, a->y, a->x, a->up, a->n); return;
    case OP_GATHER: o->gather(ctx, a->y, a->x, a->ids, a->n_rows, a->n); return;
    case OP_ATTENTION: return;
    case OP_FUSED: break;
    }
    switch (a->fused) {
    case FUSED_NORM_QKV: o->norm_qkv(ctx, &a->f.qkv); return;
    case FUSED_QK_NORM_ROPE_STORE: o->qk_norm_rope_store(ctx, &a->f.store); return;
    case FUSED_ATTENTION: o->attention(ctx, &a->f.attention); return;
    case FUSED_OUT_RESIDUAL: o->out_residual(ctx, &a->f.residual); return;
    case FUSED_NORM_GATE_UP: o->norm_gate_up(ctx, &a->f.gate_up); return;
    case FUSED_DOWN_RESIDUAL: o->down_residual(ctx, &a->f.residual); return;
    case FUSED_NORM_HEAD: o->norm_head(ctx, &a->f.head); return;
    case FUSED_ROPE_ATTENTION:
    case FUSED_STEP:
    case FUSED_COUNT: return;
    }
}

// The outputs of a call. The pointers point into `a`.
static size_t list_outputs(struct op_args *a, struct output *out) {
    size_t t = a->n_rows;
    switch (a->op) {
    case OP_EMBED: out[0] = (struct output){.at = &a->y, .n = t * a->m->n_in}; return 1;
    case OP_NORM: out[0] = (struct output){.at = &a->y, .n = t * a->n, .in_place = a->y == a->x}; return 1;
    case OP_MATMUL: out[0] = (struct output){.at = &a->y, .n = t * a->m->n_out}; return 1;
    case OP_BIAS: out[0] = (struct output){.at = &a->y, .n = t * a->n, .in_place = true}; return 1;
    case OP_HEAD_NORM:
    case OP_ROPE: out[0] = (struct output){.at = &a->y, .n = t * a->n_heads * a->head_dim, .in_place = true}; return 1;
    case OP_ADD: out[0] = (struct output){.at = &a->y, .n = a->n, .in_place = true}; return 1;
    case OP_SILU: out[0] = (struct output){.at = &a->y, .n = a->n, .in_place = a->y == a->x}; return 1;
    case OP_GATHER: out[0] = (struct output){.at = &a->y, .n = t * a->n}; return 1;
    case OP_STORE:
    case OP_ATTENTION: return 0;
    case OP_FUSED: break;
    }
    struct norm_qkv_args *qkv = &a->f.qkv;
    struct qk_norm_rope_store_args *s = &a->f.store;
    switch (a->fused) {
    case FUSED_NORM_QKV:
        out[0] = (struct output){.at = &qkv->q, .n = t * qkv->wq->n_out};
        out[1] = (struct output){.at = &qkv->k, .n = t * qkv->wk->n_out};
        out[2] = (struct output){.at = &qkv->v, .n = t * qkv->wv->n_out};
        return 3;
    case FUSED_QK_NORM_ROPE_STORE:
        out[0] = (struct output){.at = &s->q, .n = t * s->n_heads * s->head_dim, .in_place = true};
        out[1] = (struct output){.at = &s->k, .n = t * s->n_kv_heads * s->head_dim, .in_place = true};
        return 2;
    case FUSED_ATTENTION:
        out[0] = (struct output){.at = &a->f.attention.out, .n = t * a->f.attention.n_heads * a->f.attention.head_dim};
        return 1;
    case FUSED_OUT_RESIDUAL:
    case FUSED_DOWN_RESIDUAL:
        out[0] = (struct output){.at = &a->f.residual.x, .n = t * a->f.residual.w->n_out, .in_place = true};
        return 1;
    case FUSED_NORM_GATE_UP:
        out[0] = (struct output){.at = &a->f.gate_up.act, .n = t * a->f.gate_up.w_gate->n_out};
        return 1;
    case FUSED_NORM_HEAD:
        out[0] = (struct output){.at = &a->f.head.logits, .n = a->f.head.batch->n_logit_rows * a->f.head.head->n_out};
        return 1;
    case FUSED_ROPE_ATTENTION:
    case FUSED_STEP:
    case FUSED_COUNT: break;
    }
    return 0;
}

static float *copy_of(const float *x, size_t n) {
    float *copy = size_alloc(n, sizeof *copy);
    if (copy) memcpy(copy, x, n * sizeof *copy);
    return copy;
}

static void outputs_free(struct output *out, size_t n) {
    for (size_t i = 0; i < n; i++) {
        free(out[i].before);
        free(out[i].first);
    }
}

static void reset_output(const struct output *out) {
    if (out->in_place) memcpy(*out->at, out->before, out->n * sizeof(float));
    else
        for (size_t i = 0; i < out->n; i++) (*out->at)[i] = poison_float();
}

static void race(struct walk *w, const struct entry *e, const struct output *out) {
    size_t at = 0;
    while (float_bits_of(out->first[at]) == float_bits_of((*out->at)[at])) at++;
    finding_place(w->finding, walk_op_name(w, e), e->layer, "the same call gives the same bits");
    struct fault *f = &w->finding->fault;
    size_t columns = w->seen && w->seen->n_tokens ? out->n / w->seen->n_tokens : out->n;
    f->channel = (int)(columns ? at % columns : at);
    if (w->seen && columns && at / columns < w->seen->n_tokens) f->position = w->seen->position[at / columns];
    f->expected = (double)out->first[at];
    f->found = (double)(*out->at)[at];
    fault_say(f, "%s, layer %d: the same call on the same inputs gave %.9g, then %.9g", walk_op_name(w, e), e->layer,
              f->expected, f->found);
    finding_name(w->finding, 0.9, "race", "two runs of one call differ");
}

// Runs a call twice. False: a race, or no memory. out[].before holds what in-place outputs were.
static bool run_twice(struct walk *w, const struct op_ctx *ctx, const struct entry *e, struct op_args *a,
                      struct output *out, size_t n_out) {
    for (size_t i = 0; i < n_out; i++) {
        out[i].before = copy_of(*out[i].at, out[i].n);
        if (!out[i].before) return w->out_of_memory = true, false;
        reset_output(&out[i]);
    }
    invoke(ctx, a);
    for (size_t i = 0; i < n_out; i++) {
        out[i].first = copy_of(*out[i].at, out[i].n);
        if (!out[i].first) return w->out_of_memory = true, false;
        reset_output(&out[i]);
    }
    invoke(ctx, a);
    for (size_t i = 0; i < n_out; i++) {
        if (memcmp(out[i].first, *out[i].at, out[i].n * sizeof(float)) == 0) continue;
        race(w, e, &out[i]);
        return false;
    }
    return true;
}

// ---- Weights and epsilon of a call ---------------------------------------------------------------------------------

static const struct matrix *bound_matrix(const struct model *m, enum weight_part part, int layer) {
    const struct layer_weights *l = layer >= 0 ? &m->layers[layer] : NULL;
    switch (part) {
    case PART_EMBED: return &m->embed;
    case PART_HEAD: return &m->head;
    case PART_WQ: return &l->wq;
    case PART_WK: return &l->wk;
    case PART_WV: return &l->wv;
    case PART_WO: return &l->wo;
    case PART_GATE: return &l->w_gate;
    case PART_UP: return &l->w_up;
    case PART_DOWN: return &l->w_down;
    default: return NULL;
    }
}

// The op is to blame when it is handed another weight than the model bound, the loader when the model did.
static bool blame(struct walk *w, const struct entry *e, bool ok) {
    if (!ok) snprintf(w->finding->fault.op, sizeof w->finding->fault.op, "%s", walk_op_name(w, e));
    return ok;
}

static bool matrix_ok(struct walk *w, const struct entry *e, enum weight_part part, const struct matrix *m) {
    if (m == bound_matrix(w->o.model, part, e->layer)) return true; // compared before the walk
    return blame(w, e, weights_check_matrix(&w->o, part, e->layer, m, w->finding));
}

static bool vector_ok(struct walk *w, const struct entry *e, enum weight_part part, const float *v, size_t n) {
    return blame(w, e, weights_check_vector(&w->o, part, e->layer, v, n, w->finding));
}

static bool eps_ok(struct walk *w, const struct entry *e, float eps) {
    float right = (float)w->o.model->config.rms_eps;
    if (eps == right) return true;
    finding_place(w->finding, walk_op_name(w, e), e->layer, "the config's epsilon");
    w->finding->fault.expected = (double)right;
    w->finding->fault.found = (double)eps;
    fault_say(&w->finding->fault, "%s, layer %d: epsilon is %g, the config says %g", walk_op_name(w, e), e->layer,
              (double)eps, (double)right);
    finding_name(w->finding, 0.97,
                 eps == 0           ? "norm eps missing"
                 : eps == 2 * right ? "norm eps doubled"
                                    : "norm eps wrong",
                 "%g instead of %g", (double)eps, (double)right);
    return false;
}

// ---- Judging the outputs of a call ---------------------------------------------------------------------------------

static enum slot slot_of_part(enum weight_part part) {
    switch (part) {
    case PART_WQ:
    case PART_BQ:
    case PART_Q_NORM: return SLOT_Q;
    case PART_WK:
    case PART_BK:
    case PART_K_NORM: return SLOT_K;
    case PART_WV:
    case PART_BV: return SLOT_V;
    case PART_WO:
    case PART_DOWN: return SLOT_PROJECTED;
    case PART_GATE: return SLOT_GATE;
    case PART_UP: return SLOT_UP;
    case PART_HEAD: return SLOT_LOGITS;
    default: return SLOT_NORMED;
    }
}

static size_t heads_of(const struct walk *w, enum weight_part part) {
    bool heads =
        part == PART_WQ || part == PART_WK || part == PART_WV || part == PART_BQ || part == PART_BK || part == PART_BV;
    return heads ? w->o.model->config.head_dim : 0;
}

static struct call linear_call(const struct walk *w, const float *found, size_t n_rows, const float *x, size_t n_x_rows,
                               const struct matrix *m, enum weight_part part) {
    return (struct call){.formula = FORMULA_LINEAR,
                         .found = found,
                         .n_rows = n_rows,
                         .n_columns = m->n_out,
                         .x = x,
                         .n_x_rows = n_x_rows,
                         .n_in = m->n_in,
                         .w = m,
                         .head_dim = heads_of(w, part)};
}

static bool judge_primitive(struct walk *w, const struct entry *e, const struct op_args *a, const float *x,
                            const char *check) {
    struct call c = {
        .found = a->y, .n_rows = a->n_rows, .n_columns = a->n, .x = x, .n_x_rows = a->n_rows, .n_in = a->n};
    size_t width = a->n_heads * a->head_dim;
    switch (a->op) {
    case OP_EMBED:
        c = (struct call){.formula = FORMULA_EMBED,
                          .found = a->y,
                          .n_rows = a->n_rows,
                          .n_x_rows = a->n_rows,
                          .n_columns = a->m->n_in,
                          .w = a->m,
                          .token = a->ids,
                          .n_in = a->m->n_in};
        return walk_judge(w, e, &c, PART_COUNT, PART_EMBED, check);
    case OP_NORM:
        c.formula = FORMULA_LINEAR;
        c.norm = a->w;
        c.eps = a->eps;
        return walk_judge(w, e, &c, e->part, PART_COUNT, check);
    case OP_MATMUL:
        c = linear_call(w, a->y, a->n_rows, x, a->n_rows, a->m, e->part);
        return walk_judge(w, e, &c, PART_COUNT, e->part, check);
    case OP_BIAS:
        c.formula = FORMULA_LINEAR;
        c.bias = a->w;
        c.head_dim = w->o.model->config.head_dim;
        return walk_judge(w, e, &c, PART_COUNT, PART_COUNT, check);
    case OP_HEAD_NORM:
    case OP_ROPE:
        c.formula = FORMULA_HEADS;
        c.n_columns = c.n_in = width;
        c.head_dim = a->head_dim;
        if (a->op == OP_ROPE) c.cos_sin = a->x;
        else c.norm = a->w, c.eps = a->eps;
        return walk_judge(w, e, &c, a->op == OP_ROPE ? PART_COUNT : e->part, PART_COUNT, check);
    case OP_ADD:
        c.formula = FORMULA_ADD;
        c.n_columns = w->o.model->config.hidden;
        c.n_rows = c.n_x_rows = a->n / c.n_columns;
        c.add = x; // in place: what it was
        c.x = a->x;
        return walk_judge(w, e, &c, PART_COUNT, PART_COUNT, check);
    case OP_SILU:
        c.formula = FORMULA_SILU;
        c.n_columns = w->o.model->config.n_ff;
        c.n_rows = c.n_x_rows = a->n / c.n_columns;
        c.up = a->up;
        return walk_judge(w, e, &c, PART_COUNT, PART_COUNT, check);
    case OP_GATHER:
        c.formula = FORMULA_LINEAR;
        c.rows = a->ids;
        c.n_x_rows = w->seen ? w->seen->n_tokens : w->planned ? w->planned->n_tokens : a->n_rows;
        return walk_judge(w, e, &c, PART_COUNT, PART_COUNT, check);
    case OP_STORE:
    case OP_ATTENTION:
    case OP_FUSED: break;
    }
    return true;
}

static bool judge_attention(struct walk *w, const struct entry *e, const float *found, const float *q,
                            const struct kv_layer *kv, const char *check) {
    const struct model_config *m = &w->o.model->config;
    size_t width = m->n_heads * m->head_dim;
    struct call c = {.formula = FORMULA_ATTENTION,
                     .found = found,
                     .n_rows = w->seen->n_tokens,
                     .n_columns = width,
                     .head_dim = m->head_dim,
                     .x = q,
                     .n_x_rows = w->seen->n_tokens,
                     .n_in = width,
                     .kv = kv,
                     .n_heads = m->n_heads,
                     .n_kv_heads = m->n_kv_heads,
                     .scale = 1 / sqrt((double)m->head_dim)};
    return walk_judge(w, e, &c, PART_COUNT, PART_COUNT, check);
}

static bool judge_fused(struct walk *w, const struct entry *e, const struct op_args *a, const struct output *out,
                        const char *check) {
    struct call c;
    switch (a->fused) {
    case FUSED_NORM_QKV: {
        const struct norm_qkv_args *f = &a->f.qkv;
        const struct {
            const char *part;
            const struct matrix *m;
            const float *bias, *found;
            enum weight_part is;
        } parts[] = {
            {"q", f->wq, f->bq, f->q, PART_WQ}, {"k", f->wk, f->bk, f->k, PART_WK}, {"v", f->wv, f->bv, f->v, PART_WV}};
        for (int i = 0; i < 3; i++) {
            c = linear_call(w, parts[i].found, f->n_tokens, f->x, f->n_tokens, parts[i].m, parts[i].is);
            c.part = parts[i].part;
            c.norm = f->norm;
            c.eps = f->eps;
            c.bias = parts[i].bias;
            if (!walk_judge(w, e, &c, PART_ATTN_NORM, parts[i].is, check)) return false;
        }
        return true;
    }
    case FUSED_QK_NORM_ROPE_STORE: {
        const struct qk_norm_rope_store_args *f = &a->f.store;
        for (int i = 0; i < 2; i++) {
            size_t width = (i ? f->n_kv_heads : f->n_heads) * f->head_dim;
            c = (struct call){.formula = FORMULA_HEADS,
                              .part = i ? "k" : "q",
                              .found = i ? f->k : f->q,
                              .n_rows = a->n_rows,
                              .n_columns = width,
                              .head_dim = f->head_dim,
                              .x = out[i].before,
                              .n_x_rows = a->n_rows,
                              .n_in = width,
                              .norm = i ? f->k_norm : f->q_norm,
                              .eps = f->eps,
                              .cos_sin = f->cos_sin,
                              .batch = f->batch};
            if (!walk_judge(w, e, &c, c.norm ? i ? PART_K_NORM : PART_Q_NORM : PART_COUNT, PART_COUNT, check))
                return false;
        }
        return true;
    }
    case FUSED_ATTENTION: return judge_attention(w, e, a->f.attention.out, a->f.attention.q, a->f.attention.kv, check);
    case FUSED_OUT_RESIDUAL:
    case FUSED_DOWN_RESIDUAL: {
        const struct proj_residual_args *f = &a->f.residual;
        enum weight_part part = a->fused == FUSED_OUT_RESIDUAL ? PART_WO : PART_DOWN;
        c = linear_call(w, f->x, f->n_tokens, f->in, f->n_tokens, f->w, part);
        c.add = out[0].before;
        return walk_judge(w, e, &c, PART_COUNT, part, check);
    }
    case FUSED_NORM_GATE_UP: {
        const struct norm_gate_up_args *f = &a->f.gate_up;
        c = linear_call(w, f->act, f->n_tokens, f->x, f->n_tokens, f->w_gate, PART_GATE);
        c.formula = FORMULA_GATE_UP;
        c.w_up = f->w_up;
        c.norm = f->norm;
        c.eps = f->eps;
        return walk_judge(w, e, &c, PART_MLP_NORM, PART_GATE, check);
    }
    case FUSED_NORM_HEAD: {
        const struct norm_head_args *f = &a->f.head;
        c = linear_call(w, f->logits, f->batch->n_logit_rows, f->x, f->batch->n_tokens, f->head, PART_HEAD);
        c.norm = f->norm;
        c.eps = f->eps;
        c.rows = f->batch->logit_rows;
        return walk_judge(w, e, &c, PART_FINAL_NORM, PART_HEAD, check);
    }
    case FUSED_ROPE_ATTENTION:
    case FUSED_STEP:
    case FUSED_COUNT: break;
    }
    return true;
}

// ---- Probes --------------------------------------------------------------------------------------------------------

static float *scaled_copy(const float *x, size_t n, float factor) {
    float *copy = size_alloc(n, sizeof *copy);
    for (size_t i = 0; copy && i < n; i++) copy[i] = x[i] * factor;
    return copy;
}

// Brings a row's magnitude to where an epsilon of 1e-6 counts as much as the values.
static float eps_factor(const float *x, size_t n) {
    float most = 0;
    for (size_t i = 0; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    return most > 0 && isfinite(most) ? exp2f(floorf(log2f(1e-3f / most))) : 1;
}

// Runs the same op on scaled inputs into memory of its own, and judges that. Returns what walk_judge does.
static bool probe(struct walk *w, const struct op_ctx *ctx, const struct entry *e, const struct op_args *real) {
    struct op_args a = *real;
    struct output out[MAX_OUTPUTS];
    float *memory[MAX_OUTPUTS] = {0}, *x = NULL;
    bool norm = a.op == OP_NORM || a.op == OP_HEAD_NORM ||
                (a.op == OP_FUSED && a.fused != FUSED_OUT_RESIDUAL && a.fused != FUSED_DOWN_RESIDUAL &&
                 a.fused != FUSED_ATTENTION);
    bool large = a.op == OP_SILU || (a.op == OP_FUSED && a.fused == FUSED_ATTENTION);
    const char *check = norm ? "the formula, on inputs near epsilon" : "the formula, on large inputs";
    if (!norm && !large) return true;
    size_t n_out = list_outputs(&a, out), hidden = w->o.model->config.hidden, t = a.n_rows;
    bool ok = true;
    for (size_t i = 0; i < n_out; i++) {
        float factor = !out[i].in_place ? 1 : norm ? eps_factor(*out[i].at, out[i].n) : 64;
        memory[i] = scaled_copy(*out[i].at, out[i].n, factor);
        for (size_t k = 0; memory[i] && !out[i].in_place && k < out[i].n; k++) memory[i][k] = poison_float();
        ok = ok && memory[i];
    }
    if (a.op == OP_NORM) x = scaled_copy(a.x, t * a.n, eps_factor(a.x, t * a.n)), a.x = a.y == a.x ? memory[0] : x;
    if (a.op == OP_SILU) x = scaled_copy(a.x, a.n, 64), a.x = a.y == a.x ? memory[0] : x;
    if (a.op == OP_FUSED) {
        const float **in = a.fused == FUSED_NORM_QKV       ? &a.f.qkv.x
                           : a.fused == FUSED_NORM_GATE_UP ? &a.f.gate_up.x
                           : a.fused == FUSED_NORM_HEAD    ? &a.f.head.x
                           : a.fused == FUSED_ATTENTION    ? &a.f.attention.q
                                                           : NULL;
        size_t n = a.fused == FUSED_ATTENTION ? out[0].n : t * hidden;
        if (in) x = scaled_copy(*in, n, norm ? eps_factor(*in, n) : 64), *in = x, ok = ok && x;
    } else ok = ok && (x || a.op == OP_HEAD_NORM);
    for (size_t i = 0; ok && i < n_out; i++) *out[i].at = memory[i];
    for (size_t i = 0; ok && i < n_out; i++) ok = (out[i].before = copy_of(memory[i], out[i].n)) != NULL;
    if (!ok) w->out_of_memory = true;
    if (ok) {
        invoke(ctx, &a);
        ok = a.op == OP_FUSED ? judge_fused(w, e, &a, out, check)
                              : judge_primitive(w, e, &a, out[0].in_place ? out[0].before : a.x, check);
    }
    for (size_t i = 0; i < n_out; i++) {
        free(out[i].before);
        free(memory[i]);
    }
    free(x);
    return ok;
}

// ---- Attention's parts (the standard path) -------------------------------------------------------------------------

// Channel c of position j.
static double stored(const struct kv_layer *kv, enum kv_side side, const int32_t *pages, size_t j, size_t head,
                     size_t c) {
    size_t row = kv_row(kv, (size_t)pages[j / KV_PAGE_TOKENS], head, j % KV_PAGE_TOKENS);
    return (double)kv_value(kv, side, side == KV_K ? kv->k : kv->v, row, c);
}

static bool off(double found, double want, double bound) {
    return isfinite(want) && !(fabs(found - want) <= bound);
}

// One head of one token, part by part, each fed with what the part before it really gave.
struct parts {
    float *s, *max, *sum, *o, *p, *out;
};

static const char *first_wrong_part(const struct walk *w, const struct op_ctx *ctx, const struct kv_layer *kv,
                                    const float *q, size_t t, size_t head, const struct parts *m) {
    const struct model_config *c = &w->o.model->config;
    const struct batch *b = w->seen;
    const struct ops *ops = w->o.ops;
    const double u = 0x1p-24;
    size_t n = (size_t)b->position[t] + 1, d = c->head_dim, kv_head = head / (c->n_heads / c->n_kv_heads);
    size_t block = ops->attn_block, n_blocks = (n + block - 1) / block;
    const int32_t *pages = b->pages + b->page_start[b->seq[t]];
    double scale = (double)(float)(1 / sqrt((double)d));
    ops->attn_scores(ctx, m->s, q, kv, kv_head, pages, n, (float)scale);
    for (size_t j = 0; j < n; j++) {
        double want = 0, size = 0, q_most = 0, k_sum = 0;
        for (size_t i = 0; i < d; i++) {
            double k = stored(kv, KV_K, pages, j, kv_head, i), term = (double)q[i] * k;
            want += term, size += fabs(term), k_sum += fabs(k), q_most = fmax(q_most, fabs((double)q[i]));
        }
        double slack = size * ((double)d / 16 + 10) * u + kv_score_slack(kv->type, q_most, k_sum);
        if (off((double)m->s[j], want * scale, scale * slack + 1e-37)) return "attn_scores";
    }
    memcpy(m->p, m->s, n * sizeof *m->p);
    ops->attn_softmax(ctx, m->p, m->max, m->sum, n);
    for (size_t k = 0; k < n_blocks; k++) {
        size_t begin = k * block, end = begin + block < n ? begin + block : n;
        float most = m->s[begin];
        double sum = 0;
        for (size_t j = begin; j < end; j++) most = m->s[j] > most ? m->s[j] : most;
        for (size_t j = begin; j < end; j++) {
            double want = exp((double)m->s[j] - (double)most);
            if (off((double)m->p[j], want, 8 * u * want * (1 + fabs((double)m->s[j] - (double)most)) + 1e-37))
                return "attn_softmax";
            sum += (double)m->p[j];
        }
        if (off((double)m->max[k], (double)most, 0) || off((double)m->sum[k], sum, 40 * u * sum)) return "attn_softmax";
    }
    for (size_t i = 0; i < n_blocks * d; i++) m->o[i] = poison_float();
    ops->attn_values(ctx, m->o, m->p, kv, kv_head, pages, n);
    double most_v = 0; // of the channels that share a scale
    for (size_t i = 0; i < n_blocks * d; i++) {
        size_t begin = i / d * block, end = begin + block < n ? begin + block : n;
        double want = 0, size = 0;
        for (size_t k = 0; kv->type == DTYPE_Q8_0 && i % d % 32 == 0 && k < 32 * (end - begin); k++) {
            double v = fabs(stored(kv, KV_V, pages, begin + k / 32, kv_head, i % d + k % 32));
            most_v = k == 0 ? v : fmax(most_v, v);
        }
        for (size_t j = begin; j < end; j++) {
            double term = (double)m->p[j] * stored(kv, KV_V, pages, j, kv_head, i % d);
            want += term, size += fabs(term);
        }
        if (off((double)m->o[i], want, 40 * u * size + kv_value_slack(kv->type, most_v) + 1e-37)) return "attn_values";
    }
    for (size_t i = 0; i < d; i++) m->out[i] = poison_float();
    ops->attn_combine(ctx, m->out, m->max, m->sum, m->o, n_blocks, d);
    double most = (double)m->max[0], l = 0;
    for (size_t k = 1; k < n_blocks; k++) most = fmax(most, (double)m->max[k]);
    for (size_t k = 0; k < n_blocks; k++) l += (double)m->sum[k] * exp((double)m->max[k] - most);
    for (size_t i = 0; i < d; i++) {
        double want = 0, size = 0;
        for (size_t k = 0; k < n_blocks; k++) {
            double term = (double)m->o[k * d + i] * exp((double)m->max[k] - most);
            want += term, size += fabs(term);
        }
        if (off((double)m->out[i], want / l, (20 + 4 * (double)n_blocks) * u * size / l * (1 + fabs(most)) + 1e-37))
            return "attn_combine";
    }
    return NULL;
}

// Runs the parts for one token and all its heads (or one) with q times `factor`. The first part that is wrong; NULL:
// none.
static const char *judge_parts(struct walk *w, const struct op_ctx *ctx, const struct kv_layer *kv, const float *q,
                               size_t t, int only_head, float factor, int *head, float *out) {
    const struct model_config *c = &w->o.model->config;
    size_t n = (size_t)w->seen->position[t] + 1, d = c->head_dim, block = w->o.ops->attn_block,
           n_blocks = (n + block - 1) / block;
    size_t floats = 2 * n + n_blocks * (d + 2) + 2 * d;
    float *memory = size_alloc(floats, sizeof *memory);
    const char *wrong = NULL;
    if (!memory) return w->out_of_memory = true, NULL;
    struct parts m = {.s = memory, .p = memory + n, .max = memory + 2 * n};
    m.sum = m.max + n_blocks;
    m.o = m.sum + n_blocks;
    m.out = m.o + n_blocks * d;
    float *scaled = m.out + d;
    for (size_t h = 0; !wrong && h < c->n_heads; h++) {
        if (only_head >= 0 && (int)h != only_head) continue;
        for (size_t i = 0; i < d; i++) scaled[i] = q[(t * c->n_heads + h) * d + i] * factor;
        wrong = first_wrong_part(w, ctx, kv, scaled, t, h, &m);
        *head = (int)h;
        memcpy(out, m.out, d * sizeof *out);
    }
    free(memory);
    return wrong;
}

static void blame_part(struct walk *w, const char *part) {
    char rest[512];
    struct fault *f = &w->finding->fault;
    snprintf(f->op, sizeof f->op, "%s", part);
    snprintf(rest, sizeof rest, "%s", f->message);
    fault_say(f, "%s of %.480s", part, rest);
}

// The attention that the standard path composed: `found` is what out_residual reads. Also on large inputs, where a
// softmax without its maximum overflows.
static bool settle_attention(struct walk *w, const struct op_ctx *ctx, const float *found) {
    const struct entry *e = w->at < w->n_program ? &w->program[w->at] : NULL;
    if (!e || e->op != OP_ATTENTION || w->finding->found) return !w->finding->found;
    const struct result *q = &w->slots[SLOT_Q];
    const struct model_config *c = &w->o.model->config;
    size_t n = w->seen ? w->seen->n_tokens * c->n_heads * c->head_dim : 0;
    if (!w->seen || !w->kv || q->n != n || !walk_next(w, OP_ATTENTION, FUSED_COUNT)) return !w->finding->found;
    int head = -1;
    float out[512];
    struct op_ctx real = *ctx;
    real.ops = w->o.ops;
    if (!judge_attention(w, e, found, q->copy, w->kv, "the formula on the op's own inputs")) {
        size_t t = 0;
        while (t + 1 < w->seen->n_tokens && w->seen->position[t] != w->finding->fault.position) t++;
        const char *part = NULL; // a device's parts have roundings and units of their own (docs/NUMERICS.md)
        if (!w->o.on_device) part = judge_parts(w, &real, w->kv, q->copy, t, w->finding->fault.head, 1, &head, out);
        if (part) blame_part(w, part);
        return false;
    }
    for (size_t t = w->seen->n_tokens > 2 ? w->seen->n_tokens - 2 : 0; t < w->seen->n_tokens && !w->o.on_device; t++) {
        const char *part = judge_parts(w, &real, w->kv, q->copy, t, -1, 64, &head, out);
        if (!part) continue;
        finding_place(w->finding, part, e->layer, "the formula, on large inputs");
        w->finding->fault.head = head;
        w->finding->fault.position = w->seen->position[t];
        fault_say(&w->finding->fault, "%s, layer %d: head %d, position %d: wrong with q times 64", part, e->layer, head,
                  w->seen->position[t]);
        if (strcmp(part, "attn_softmax") == 0)
            finding_name(w->finding, 0.85, "softmax without maximum", "right on small scores, wrong on large ones");
        return false;
    }
    walk_keep(w, SLOT_ATTN, e, found, n);
    return true;
}

// ---- One call ------------------------------------------------------------------------------------------------------

// The op as it is, nothing else.
static void pass(const struct op_ctx *ctx, const struct op_args *a) {
    struct walk *w = walk_of(ctx);
    struct op_ctx real = *ctx;
    real.ops = w->o.ops;
    invoke(&real, a);
}

static bool examine(const struct op_ctx *ctx, const struct entry *e, struct op_args *a, struct output *out,
                    size_t n_out) {
    struct walk *w = walk_of(ctx);
    struct op_ctx real = *ctx;
    real.ops = w->o.ops;
    real.tap = NULL;
    if (!run_twice(w, &real, e, a, out, n_out)) return false;
    const char *check = "the formula on the op's own inputs";
    bool good = a->op == OP_FUSED ? judge_fused(w, e, a, out, check)
                                  : judge_primitive(w, e, a, n_out && out[0].in_place ? out[0].before : a->x, check);
    if (!good) return false;
    // The probe starts from the inputs as they were, and the op runs once more behind it: a store writes its slots
    // again.
    for (size_t i = 0; i < n_out; i++)
        if (out[i].in_place) memcpy(*out[i].at, out[i].before, out[i].n * sizeof(float));
    good = probe(w, &real, e, a);
    if (good) invoke(&real, a);
    return good;
}

// Runs a call whose inputs were found right: judged, or as it is when a fault is known. True: its outputs are right.
static bool run_call(const struct op_ctx *ctx, const struct entry *e, struct op_args *a, bool judged) {
    struct walk *w = walk_of(ctx);
    struct output out[MAX_OUTPUTS] = {0};
    bool ran = false, good = false;
    if (judged && !w->finding->found && !w->out_of_memory) {
        size_t n_out = list_outputs(a, out);
        good = examine(ctx, e, a, out, n_out);
        ran = good;
        for (size_t i = 0; !good && i < n_out; i++) // the call will be made again
            if (out[i].in_place && out[i].before) memcpy(*out[i].at, out[i].before, out[i].n * sizeof(float));
        outputs_free(out, n_out);
    }
    if (!ran) pass(ctx, a);
    return good;
}

// ---- The spying primitives -----------------------------------------------------------------------------------------

static void spy_embed(const struct op_ctx *ctx, float *x, const struct matrix *table, const int32_t *token, size_t n) {
    struct walk *w = walk_of(ctx);
    walk_start(w);
    struct op_args a = {.op = OP_EMBED, .y = x, .m = table, .ids = token, .n_rows = n};
    const struct entry *e = walk_next(w, OP_EMBED, FUSED_COUNT);
    bool good = e && matrix_ok(w, e, PART_EMBED, table);
    if (run_call(ctx, e, &a, good)) walk_keep(w, SLOT_X, e, x, n * table->n_in);
}

static void spy_rmsnorm(const struct op_ctx *ctx, float *y, const float *x, const float *v, float eps, size_t n_rows,
                        size_t n) {
    struct walk *w = walk_of(ctx);
    struct op_args a = {.op = OP_NORM, .y = y, .x = x, .w = v, .eps = eps, .n_rows = n_rows, .n = n};
    const struct entry *e = walk_next(w, OP_NORM, FUSED_COUNT);
    enum slot in = e && e->part == PART_FINAL_NORM ? SLOT_ROWS : SLOT_X;
    bool good = e && eps_ok(w, e, eps) && vector_ok(w, e, e->part, v, n) && walk_input(w, in, e, x, n_rows * n, n);
    if (run_call(ctx, e, &a, good)) walk_keep(w, SLOT_NORMED, e, y, n_rows * n);
}

static void spy_matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *m, size_t n) {
    struct walk *w = walk_of(ctx);
    struct op_args a = {.op = OP_MATMUL, .y = y, .x = x, .m = m, .n_rows = n};
    settle_attention(w, ctx, x);
    const struct entry *e = walk_next(w, OP_MATMUL, FUSED_COUNT);
    enum slot in = e && e->part == PART_WO ? SLOT_ATTN : e && e->part == PART_DOWN ? SLOT_ACT : SLOT_NORMED;
    bool good = e && matrix_ok(w, e, e->part, m) && walk_input(w, in, e, x, n * m->n_in, m->n_in);
    if (run_call(ctx, e, &a, good)) walk_keep(w, slot_of_part(e->part), e, y, n * m->n_out);
}

static void spy_bias(const struct op_ctx *ctx, float *y, const float *b, size_t n_rows, size_t n) {
    struct walk *w = walk_of(ctx);
    struct op_args a = {.op = OP_BIAS, .y = y, .w = b, .n_rows = n_rows, .n = n};
    const struct entry *e = walk_next(w, OP_BIAS, FUSED_COUNT);
    bool good = e && vector_ok(w, e, e->part, b, n) && walk_input(w, slot_of_part(e->part), e, y, n_rows * n, n);
    if (run_call(ctx, e, &a, good)) walk_keep(w, slot_of_part(e->part), e, y, n_rows * n);
}

static void spy_head_rmsnorm(const struct op_ctx *ctx, float *x, const float *v, float eps, size_t n_rows,
                             size_t n_heads, size_t head_dim) {
    struct walk *w = walk_of(ctx);
    struct op_args a = {.op = OP_HEAD_NORM,
                        .y = x,
                        .w = v,
                        .eps = eps,
                        .n_rows = n_rows,
                        .n_heads = n_heads,
                        .head_dim = head_dim,
                        .n = n_heads * head_dim};
    const struct entry *e = walk_next(w, OP_HEAD_NORM, FUSED_COUNT);
    bool good = e && eps_ok(w, e, eps) && vector_ok(w, e, e->part, v, head_dim) &&
                walk_input(w, slot_of_part(e->part), e, x, n_rows * a.n, a.n);
    if (run_call(ctx, e, &a, good)) walk_keep(w, slot_of_part(e->part), e, x, n_rows * a.n);
}

static void spy_rope(const struct op_ctx *ctx, float *x, const float *cos_sin, size_t n_rows, size_t n_heads,
                     size_t head_dim) {
    struct walk *w = walk_of(ctx);
    struct op_args a = {.op = OP_ROPE,
                        .y = x,
                        .x = cos_sin,
                        .n_rows = n_rows,
                        .n_heads = n_heads,
                        .head_dim = head_dim,
                        .n = n_heads * head_dim};
    const struct entry *e = walk_next(w, OP_ROPE, FUSED_COUNT);
    bool good = e && walk_input(w, slot_of_part(e->part), e, x, n_rows * a.n, a.n);
    w->cos_sin = cos_sin;
    if (run_call(ctx, e, &a, good)) walk_keep(w, slot_of_part(e->part), e, x, n_rows * a.n);
}

static bool kv_ok(struct walk *w, const struct entry *e, const struct kv_layer *kv, const float *k, const float *v) {
    const char *op = walk_op_name(w, e);
    bool ok = kv_shadow_store(w->shadow, op, e->layer, kv, w->seen, w->of_seq, k, v, w->finding) &&
              // The store was right: pages that changed since are the engine's doing, unless this walk gave them out.
              kv_shadow_check(w->shadow, w->planned ? op : "kv", e->layer, kv, w->seen, w->of_seq, w->finding);
    if (!ok && !w->finding->found) w->out_of_memory = true;
    return ok;
}

static void spy_kv_store(const struct op_ctx *ctx, struct kv_layer *kv, const struct batch *b, const float *k,
                         const float *v) {
    struct walk *w = walk_of(ctx);
    const struct model_config *c = &w->o.model->config;
    struct op_args a = {.op = OP_STORE, .x = k, .up = v, .kv = kv, .batch = b, .n_rows = b->n_tokens};
    const struct entry *e = walk_next(w, OP_STORE, FUSED_COUNT);
    size_t width = c->n_kv_heads * c->head_dim;
    w->kv = kv;
    bool good = e && walk_batch(w, e, b) && (!w->cos_sin || walk_angles(w, e, b, w->cos_sin)) &&
                walk_input(w, SLOT_K, e, k, b->n_tokens * width, width) &&
                walk_input(w, SLOT_V, e, v, b->n_tokens * width, width);
    pass(ctx, &a);
    if (good) kv_ok(w, e, kv, k, v);
}

static void spy_add(const struct op_ctx *ctx, float *x, const float *y, size_t n) {
    struct walk *w = walk_of(ctx);
    size_t hidden = w->o.model->config.hidden;
    struct op_args a = {.op = OP_ADD, .y = x, .x = y, .n = n, .n_rows = n / hidden};
    const struct entry *e = walk_next(w, OP_ADD, FUSED_COUNT);
    bool good = e && walk_input(w, SLOT_X, e, x, n, hidden) && walk_input(w, SLOT_PROJECTED, e, y, n, hidden);
    if (run_call(ctx, e, &a, good)) walk_keep(w, SLOT_X, e, x, n);
}

static void spy_silu_mul(const struct op_ctx *ctx, float *act, const float *gate, const float *up, size_t n) {
    struct walk *w = walk_of(ctx);
    size_t n_ff = w->o.model->config.n_ff;
    struct op_args a = {.op = OP_SILU, .y = act, .x = gate, .up = up, .n = n, .n_rows = n / n_ff};
    const struct entry *e = walk_next(w, OP_SILU, FUSED_COUNT);
    bool good = e && walk_input(w, SLOT_GATE, e, gate, n, n_ff) && walk_input(w, SLOT_UP, e, up, n, n_ff);
    if (run_call(ctx, e, &a, good)) walk_keep(w, SLOT_ACT, e, act, n);
}

// The rows that gather must take are the batch's.
static bool rows_ok(struct walk *w, const struct entry *e, const int32_t *rows, size_t n) {
    if (!w->seen || n != w->seen->n_logit_rows) return true;
    for (size_t i = 0; i < n; i++) {
        if (rows[i] == w->seen->logit_rows[i]) continue;
        finding_place(w->finding, "batch", e->layer, "the rows whose logits are wanted");
        w->finding->fault.expected = w->seen->logit_rows[i];
        w->finding->fault.found = rows[i];
        fault_say(&w->finding->fault, "batch: logit_rows[%zu] is %d, planned was %d", i, rows[i],
                  w->seen->logit_rows[i]);
        finding_name(w->finding, 0.95, "logits of the wrong row", "row %d instead of %d", rows[i],
                     w->seen->logit_rows[i]);
        return false;
    }
    return true;
}

static void spy_gather(const struct op_ctx *ctx, float *y, const float *x, const int32_t *rows, size_t n_rows,
                       size_t n) {
    struct walk *w = walk_of(ctx);
    struct op_args a = {.op = OP_GATHER, .y = y, .x = x, .ids = rows, .n_rows = n_rows, .n = n};
    const struct entry *e = walk_next(w, OP_GATHER, FUSED_COUNT);
    bool good = e && rows_ok(w, e, rows, n_rows) && (!w->seen || walk_input(w, SLOT_X, e, x, w->seen->n_tokens * n, n));
    if (run_call(ctx, e, &a, good)) walk_keep(w, SLOT_ROWS, e, y, n_rows * n);
}

// ---- The spying fused ops ------------------------------------------------------------------------------------------

static void spy_norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *f) {
    struct walk *w = walk_of(ctx);
    struct op_args a = {.op = OP_FUSED, .fused = FUSED_NORM_QKV, .n_rows = f->n_tokens, .f.qkv = *f};
    a.f.qkv.store = NULL; // the walk reads k and v, too
    const struct entry *e = walk_next(w, OP_FUSED, FUSED_NORM_QKV);
    size_t hidden = w->o.model->config.hidden;
    bool good = e && eps_ok(w, e, f->eps) && vector_ok(w, e, PART_ATTN_NORM, f->norm, hidden) &&
                matrix_ok(w, e, PART_WQ, f->wq) && matrix_ok(w, e, PART_WK, f->wk) && matrix_ok(w, e, PART_WV, f->wv) &&
                vector_ok(w, e, PART_BQ, f->bq, f->wq->n_out) && vector_ok(w, e, PART_BK, f->bk, f->wk->n_out) &&
                vector_ok(w, e, PART_BV, f->bv, f->wv->n_out) &&
                walk_input(w, SLOT_X, e, f->x, f->n_tokens * hidden, hidden);
    if (!run_call(ctx, e, &a, good)) return;
    walk_keep(w, SLOT_Q, e, f->q, f->n_tokens * f->wq->n_out);
    walk_keep(w, SLOT_K, e, f->k, f->n_tokens * f->wk->n_out);
    walk_keep(w, SLOT_V, e, f->v, f->n_tokens * f->wv->n_out);
}

static void spy_qk_norm_rope_store(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *f) {
    struct walk *w = walk_of(ctx);
    size_t n = f->batch->n_tokens, q = f->n_heads * f->head_dim, kv = f->n_kv_heads * f->head_dim;
    struct op_args a = {.op = OP_FUSED, .fused = FUSED_QK_NORM_ROPE_STORE, .n_rows = n, .f.store = *f};
    const struct entry *e = walk_next(w, OP_FUSED, FUSED_QK_NORM_ROPE_STORE);
    w->kv = f->kv;
    bool good = e && walk_batch(w, e, f->batch) && walk_angles(w, e, f->batch, f->cos_sin) && eps_ok(w, e, f->eps) &&
                vector_ok(w, e, PART_Q_NORM, f->q_norm, f->head_dim) &&
                vector_ok(w, e, PART_K_NORM, f->k_norm, f->head_dim) && walk_input(w, SLOT_Q, e, f->q, n * q, q) &&
                walk_input(w, SLOT_K, e, f->k, n * kv, kv) && walk_input(w, SLOT_V, e, f->v, n * kv, kv);
    if (!run_call(ctx, e, &a, good) || !kv_ok(w, e, f->kv, f->k, f->v)) return;
    walk_keep(w, SLOT_Q, e, f->q, n * q);
    walk_keep(w, SLOT_K, e, f->k, n * kv);
}

static void spy_attention(const struct op_ctx *ctx, const struct attention_args *f) {
    struct walk *w = walk_of(ctx);
    size_t n = f->batch->n_tokens * f->n_heads * f->head_dim;
    struct op_args a = {.op = OP_FUSED, .fused = FUSED_ATTENTION, .n_rows = f->batch->n_tokens, .f.attention = *f};
    a.f.attention.reader = NULL; // the walk reads the result, too
    const struct entry *e = walk_next(w, OP_FUSED, FUSED_ATTENTION);
    bool good = e && walk_batch(w, e, f->batch) && walk_input(w, SLOT_Q, e, f->q, n, f->n_heads * f->head_dim);
    if (run_call(ctx, e, &a, good)) walk_keep(w, SLOT_ATTN, e, f->out, n);
}

static void spy_residual(const struct op_ctx *ctx, const struct proj_residual_args *f, enum fused_op fused) {
    struct walk *w = walk_of(ctx);
    bool out = fused == FUSED_OUT_RESIDUAL;
    struct op_args a = {.op = OP_FUSED, .fused = fused, .n_rows = f->n_tokens, .f.residual = *f};
    if (out) settle_attention(w, ctx, f->in);
    const struct entry *e = walk_next(w, OP_FUSED, fused);
    size_t hidden = w->o.model->config.hidden;
    bool good = e && matrix_ok(w, e, out ? PART_WO : PART_DOWN, f->w) &&
                walk_input(w, out ? SLOT_ATTN : SLOT_ACT, e, f->in, f->n_tokens * f->w->n_in, f->w->n_in) &&
                walk_input(w, SLOT_X, e, f->x, f->n_tokens * hidden, hidden);
    if (run_call(ctx, e, &a, good)) walk_keep(w, SLOT_X, e, f->x, f->n_tokens * hidden);
}

static void spy_out_residual(const struct op_ctx *ctx, const struct proj_residual_args *f) {
    spy_residual(ctx, f, FUSED_OUT_RESIDUAL);
}

static void spy_down_residual(const struct op_ctx *ctx, const struct proj_residual_args *f) {
    spy_residual(ctx, f, FUSED_DOWN_RESIDUAL);
}

static void spy_norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *f) {
    struct walk *w = walk_of(ctx);
    size_t hidden = w->o.model->config.hidden;
    struct op_args a = {.op = OP_FUSED, .fused = FUSED_NORM_GATE_UP, .n_rows = f->n_tokens, .f.gate_up = *f};
    a.f.gate_up.reader = NULL;
    const struct entry *e = walk_next(w, OP_FUSED, FUSED_NORM_GATE_UP);
    bool good = e && eps_ok(w, e, f->eps) && vector_ok(w, e, PART_MLP_NORM, f->norm, hidden) &&
                matrix_ok(w, e, PART_GATE, f->w_gate) && matrix_ok(w, e, PART_UP, f->w_up) &&
                walk_input(w, SLOT_X, e, f->x, f->n_tokens * hidden, hidden);
    if (run_call(ctx, e, &a, good)) walk_keep(w, SLOT_ACT, e, f->act, f->n_tokens * f->w_gate->n_out);
}

static void spy_norm_head(const struct op_ctx *ctx, const struct norm_head_args *f) {
    struct walk *w = walk_of(ctx);
    size_t hidden = w->o.model->config.hidden;
    struct op_args a = {.op = OP_FUSED, .fused = FUSED_NORM_HEAD, .n_rows = f->batch->n_tokens, .f.head = *f};
    const struct entry *e = walk_next(w, OP_FUSED, FUSED_NORM_HEAD);
    bool good = e && walk_batch(w, e, f->batch) && eps_ok(w, e, f->eps) &&
                vector_ok(w, e, PART_FINAL_NORM, f->norm, hidden) && matrix_ok(w, e, PART_HEAD, f->head) &&
                walk_input(w, SLOT_X, e, f->x, f->batch->n_tokens * hidden, hidden);
    if (run_call(ctx, e, &a, good)) walk_keep(w, SLOT_LOGITS, e, f->logits, f->batch->n_logit_rows * f->head->n_out);
}

// ---- Attention's parts, on threads: they stay as they are, and are judged together ---------------------------------

static void spy_attn_scores(const struct op_ctx *ctx, float *s, const float *q, const struct kv_layer *kv,
                            size_t kv_head, const int32_t *pages, size_t n_kv, float scale) {
    struct op_ctx real = *ctx;
    real.ops = walk_of(ctx)->o.ops;
    real.ops->attn_scores(&real, s, q, kv, kv_head, pages, n_kv, scale);
}

static void spy_attn_softmax(const struct op_ctx *ctx, float *s, float *block_max, float *block_sum, size_t n_kv) {
    struct op_ctx real = *ctx;
    real.ops = walk_of(ctx)->o.ops;
    real.ops->attn_softmax(&real, s, block_max, block_sum, n_kv);
}

static void spy_attn_values(const struct op_ctx *ctx, float *o, const float *p, const struct kv_layer *kv,
                            size_t kv_head, const int32_t *pages, size_t n_kv) {
    struct op_ctx real = *ctx;
    real.ops = walk_of(ctx)->o.ops;
    real.ops->attn_values(&real, o, p, kv, kv_head, pages, n_kv);
}

static void spy_attn_combine(const struct op_ctx *ctx, float *out, const float *block_max, const float *block_sum,
                             const float *o, size_t n_blocks, size_t head_dim) {
    struct op_ctx real = *ctx;
    real.ops = walk_of(ctx)->o.ops;
    real.ops->attn_combine(&real, out, block_max, block_sum, o, n_blocks, head_dim);
}

void spy_fill(struct walk *w) {
    const struct ops *real = w->o.ops;
    w->ops = *real;
    w->ops.rope_attention = NULL;     // its two parts are watched
    w->ops.least_left_out = SIZE_MAX; // every token is watched in every layer
    w->ops.attn_scores = spy_attn_scores;
    w->ops.attn_softmax = spy_attn_softmax;
    w->ops.attn_values = spy_attn_values;
    w->ops.attn_combine = spy_attn_combine;
    w->ops.embed = spy_embed;
    w->ops.rmsnorm = spy_rmsnorm;
    w->ops.matmul = spy_matmul;
    w->ops.bias = spy_bias;
    w->ops.head_rmsnorm = spy_head_rmsnorm;
    w->ops.rope = spy_rope;
    w->ops.kv_store = spy_kv_store;
    w->ops.add = spy_add;
    w->ops.silu_mul = spy_silu_mul;
    w->ops.gather = spy_gather;
    if (real->norm_qkv) w->ops.norm_qkv = spy_norm_qkv;
    if (real->qk_norm_rope_store) w->ops.qk_norm_rope_store = spy_qk_norm_rope_store;
    if (real->attention) w->ops.attention = spy_attention;
    if (real->out_residual) w->ops.out_residual = spy_out_residual;
    if (real->norm_gate_up) w->ops.norm_gate_up = spy_norm_gate_up;
    if (real->down_residual) w->ops.down_residual = spy_down_residual;
    if (real->norm_head) w->ops.norm_head = spy_norm_head;
}
