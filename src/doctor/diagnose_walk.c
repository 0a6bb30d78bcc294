// diagnose_walk.c: the spying table, and what is compared at each call; see diagnose_walk.h. What the numbers should be
// is hypotheses.c's, which batch diagnose_batch.c's, which weights diagnose_weights.c's; KV is diagnose_kv.c's.
#include "doctor/diagnose_spy.h"

#include "base/size.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const op_names[] = {"embed",    "rmsnorm",   "matmul", "bias",     "head_rmsnorm", "rope",
                                       "kv_store", "attention", "add",    "silu_mul", "gather"};

const char *walk_op_name(const struct walk *w, const struct entry *e) {
    bool fused = e->fused != FUSED_COUNT && (w->o.fusion >> e->fused & 1) && fusion_available(w->o.ops, e->fused);
    return fused ? fusion_info(e->fused)->name : op_names[e->op];
}

// ---- The program ---------------------------------------------------------------------------------------------------

static void put(struct walk *w, enum step_op op, enum fused_op fused, enum weight_part part, int layer) {
    w->program[w->n_program++] = (struct entry){op, fused, part, layer};
}

static bool make_program(struct walk *w) {
    const struct model_config *c = &w->o.model->config;
    enum { MOST = 21 };
    w->program = size_alloc(c->n_layers + 1, MOST * sizeof *w->program);
    if (!w->program) return false;
    put(w, OP_EMBED, FUSED_COUNT, PART_EMBED, -1);
    for (int i = 0; i < (int)c->n_layers; i++) {
        static const enum weight_part qkv[] = {PART_WQ, PART_WK, PART_WV}, bias[] = {PART_BQ, PART_BK, PART_BV};
        put(w, OP_NORM, FUSED_NORM_QKV, PART_ATTN_NORM, i);
        for (int k = 0; k < 3; k++) {
            put(w, OP_MATMUL, FUSED_NORM_QKV, qkv[k], i);
            if (c->qkv_bias) put(w, OP_BIAS, FUSED_NORM_QKV, bias[k], i);
        }
        if (c->qk_norm) put(w, OP_HEAD_NORM, FUSED_QK_NORM_ROPE_STORE, PART_Q_NORM, i);
        if (c->qk_norm) put(w, OP_HEAD_NORM, FUSED_QK_NORM_ROPE_STORE, PART_K_NORM, i);
        put(w, OP_ROPE, FUSED_QK_NORM_ROPE_STORE, PART_WQ, i);
        put(w, OP_ROPE, FUSED_QK_NORM_ROPE_STORE, PART_WK, i);
        put(w, OP_STORE, FUSED_QK_NORM_ROPE_STORE, PART_COUNT, i);
        put(w, OP_ATTENTION, FUSED_ATTENTION, PART_COUNT, i);
        put(w, OP_MATMUL, FUSED_OUT_RESIDUAL, PART_WO, i);
        put(w, OP_ADD, FUSED_OUT_RESIDUAL, PART_WO, i);
        put(w, OP_NORM, FUSED_NORM_GATE_UP, PART_MLP_NORM, i);
        put(w, OP_MATMUL, FUSED_NORM_GATE_UP, PART_GATE, i);
        put(w, OP_MATMUL, FUSED_NORM_GATE_UP, PART_UP, i);
        put(w, OP_SILU, FUSED_NORM_GATE_UP, PART_COUNT, i);
        put(w, OP_MATMUL, FUSED_DOWN_RESIDUAL, PART_DOWN, i);
        put(w, OP_ADD, FUSED_DOWN_RESIDUAL, PART_DOWN, i);
    }
    w->head_at = w->n_program;
    put(w, OP_GATHER, FUSED_NORM_HEAD, PART_COUNT, -1);
    put(w, OP_NORM, FUSED_NORM_HEAD, PART_FINAL_NORM, -1);
    put(w, OP_MATMUL, FUSED_NORM_HEAD, PART_HEAD, -1);
    return true;
}

static const char *layer_text(int layer, char *text, size_t size) {
    if (layer < 0) snprintf(text, size, "outside the layers");
    else snprintf(text, size, "layer %d", layer);
    return text;
}

// An op that should have run did not.
static void missing(struct walk *w, const struct entry *e, const char *instead) {
    char where[32];
    finding_place(w->finding, walk_op_name(w, e), e->layer, "every op runs, in order");
    fault_say(&w->finding->fault, "%s, %s: it did not run; %s did", walk_op_name(w, e),
              layer_text(e->layer, where, sizeof where), instead);
    if (e->op == OP_ADD || e->fused == FUSED_OUT_RESIDUAL || e->fused == FUSED_DOWN_RESIDUAL)
        finding_name(w->finding, 0.95, "lost residual", "the projection is never added to the residual stream");
    else if (e->op == OP_HEAD_NORM) {
        finding_name(w->finding, 0.9, "norm left out", "q and k are not normalised");
        w->watch_norm = true;
    } else finding_name(w->finding, 0.8, "op left out", "%s", walk_op_name(w, e));
}

// The program's next entry is this primitive (or the first of this fused op): moves on. NULL: a fault, or one is known.
const struct entry *walk_next(struct walk *w, enum step_op op, enum fused_op fused) {
    if (w->watch_norm && op == OP_HEAD_NORM && fused == FUSED_COUNT) {
        w->watch_norm = false;
        w->finding->n_diagnoses = 0;
        finding_name(w->finding, 0.95, "norm after RoPE", "q and k are rotated first, then normalised");
    }
    if (w->finding->found || w->out_of_memory) return NULL;
    const struct entry *e = w->at < w->n_program ? &w->program[w->at] : NULL;
    bool fits = e && (fused != FUSED_COUNT
                          ? e->fused == fused && (w->at == 0 || e[-1].fused != fused || e[-1].layer != e->layer)
                          : e->op == op);
    if (fits) {
        if (fused == FUSED_COUNT) w->at++;
        while (fused != FUSED_COUNT && w->at < w->n_program && w->program[w->at].fused == fused &&
               w->program[w->at].layer == e->layer)
            w->at++;
        return e;
    }
    if (op == OP_BIAS && fused == FUSED_COUNT && w->at > 0) {
        const struct entry *last = &w->program[w->at - 1];
        finding_place(w->finding, "bias", last->layer, "every op runs, in order");
        fault_say(&w->finding->fault, "bias, layer %d: a bias is added that the config does not have", last->layer);
        finding_name(w->finding, 0.97, "uninitialised bias", "the config says that there is none");
        return NULL;
    }
    if (e) missing(w, e, fused != FUSED_COUNT ? fusion_info(fused)->name : op_names[op]);
    else {
        finding_place(w->finding, op_names[op], -1, "every op runs, in order");
        fault_say(&w->finding->fault, "%s ran once more after the step's last op", op_names[op]);
    }
    return NULL;
}

// ---- What was left and what is read --------------------------------------------------------------------------------

void walk_keep(struct walk *w, enum slot slot, const struct entry *e, const float *data, size_t n) {
    struct result *s = &w->slots[slot];
    if (n > s->cap) {
        float *copy = size_realloc(s->copy, n, sizeof *copy),
              *before = copy ? size_realloc(s->before, n, sizeof *copy) : NULL;
        if (copy) s->copy = copy;
        if (!before) {
            w->out_of_memory = true;
            return;
        }
        s->before = before;
        s->cap = n;
    }
    float *swap = s->before;
    s->before = s->copy;
    s->n_before = s->n;
    s->copy = swap;
    memcpy(s->copy, data, n * sizeof *data);
    s->n = n;
    s->at = data;
    s->writer = walk_op_name(w, e);
    s->layer = e->layer;
}

// Compares an input with what the op before it left. False: it is something else.
bool walk_input(struct walk *w, enum slot slot, const struct entry *e, const float *data, size_t n, size_t n_columns) {
    struct result *s = &w->slots[slot];
    if (w->finding->found) return false;
    if (s->n != n) return true;
    if (memcmp(s->copy, data, n * sizeof *data) == 0) return true;
    size_t at = 0;
    while (float_bits_of(s->copy[at]) == float_bits_of(data[at])) at++;
    bool intact = memcmp(s->copy, s->at, n * sizeof *data) == 0; // the writer's memory: then the reader was misled
    bool undone = s->n_before == n && memcmp(s->before, data, n * sizeof *data) == 0;
    const char *op = intact ? walk_op_name(w, e) : s->writer;
    char where[32];
    finding_place(w->finding, op, intact ? e->layer : s->layer, "an op reads what the op before it left");
    struct fault *f = &w->finding->fault;
    f->channel = (int)(at % n_columns);
    if (w->seen && n == w->seen->n_tokens * n_columns) f->position = w->seen->position[at / n_columns];
    f->expected = (double)s->copy[at];
    f->found = (double)data[at];
    fault_say(f, "%s, %s: its input at row %zu, channel %zu is %.9g, but %s left %.9g", walk_op_name(w, e),
              layer_text(e->layer, where, sizeof where), at / n_columns, at % n_columns, f->found, s->writer,
              f->expected);
    const struct result *p = &w->slots[SLOT_PROJECTED];
    if (slot == SLOT_X && undone)
        finding_name(w->finding, 0.95, "lost residual", "the sum that %s made is gone", s->writer);
    else if (slot == SLOT_X && p->n == n && memcmp(p->copy, data, n * sizeof *data) == 0)
        finding_name(w->finding, 0.95, "lost residual", "the projection stands in the residual stream's place");
    else if (undone) finding_name(w->finding, 0.9, "stale input", "what stood there before %s ran", s->writer);
    else if (n > n_columns && memcmp(s->copy + n_columns, data, (n - n_columns) * sizeof *data) == 0)
        finding_name(w->finding, 0.9, "neighbour's row", "row t + 1 in row t's place");
    else if (n > n_columns && memcmp(s->copy, data + n_columns, (n - n_columns) * sizeof *data) == 0)
        finding_name(w->finding, 0.9, "neighbour's row", "row t - 1 in row t's place");
    else {
        for (int k = 0; k < SLOT_COUNT; k++) {
            if (k == (int)slot || w->slots[k].n != n || memcmp(w->slots[k].copy, data, n * sizeof *data) != 0) continue;
            bool kv = (slot == SLOT_K && k == SLOT_V) || (slot == SLOT_V && k == SLOT_K);
            bool mlp = (slot == SLOT_GATE && k == SLOT_UP) || (slot == SLOT_UP && k == SLOT_GATE);
            finding_name(w->finding, 0.95,
                         kv    ? "K and V swapped"
                         : mlp ? "gate and up swapped"
                               : "wrong buffer",
                         "it is what %s left for another op", w->slots[k].writer);
            break;
        }
    }
    return false;
}

// ---- The batch -----------------------------------------------------------------------------------------------------

bool walk_batch(struct walk *w, const struct entry *e, const struct batch *b) {
    struct batch_view v = {.planned = w->seen ? w->seen : w->planned,
                           .previous = w->previous,
                           .sequences = w->sequences,
                           .n_sequences = w->n_sequences,
                           .layer = e->layer,
                           .n_pages = w->kv ? w->kv->n_pages : SIZE_MAX};
    if (!batch_check(&v, b, w->of_seq, w->finding)) return false;
    if (w->seen) return true;
    w->seen = batch_copy(b);
    if (w->seen && w->planned)
        for (size_t s = 0; s < b->n_seqs; s++) w->of_seq[s] = &w->sequences[s]; // planned in this order
    return w->seen || (w->out_of_memory = true, false);
}

// The cosines and sines are those of the batch's positions.
bool walk_angles(struct walk *w, const struct entry *e, const struct batch *b, const float *cos_sin) {
    const struct model_config *c = &w->o.model->config;
    size_t half = c->head_dim / 2;
    double *rates = size_alloc(half, sizeof *rates), magnitude = 1;
    if (!rates || !oracle_rope_rates(ORACLE_T, w->o.model, rates, &magnitude, NULL)) {
        free(rates);
        return w->out_of_memory = true, false;
    }
    for (size_t i = 0; i < b->n_tokens * c->head_dim; i++) {
        size_t t = i / c->head_dim, k = i % c->head_dim, pair = k % half;
        double angle = (double)b->position[t] * rates[pair];
        double want = (k < half ? cos(angle) : sin(angle)) * magnitude;
        // f64 angles, rounded once; a rate's last bits may come from another way to compute the power.
        if (fabs((double)cos_sin[i] - want) <= magnitude * (1.2e-7 + 1e-13 * fabs(angle))) continue;
        finding_place(w->finding, "rope", e->layer, "the table of cosines and sines = the formula");
        struct fault *f = &w->finding->fault;
        f->position = b->position[t];
        f->channel = (int)k;
        f->expected = want;
        f->found = (double)cos_sin[i];
        fault_say(f, "rope: %s of channel %zu at position %d is %.9g, expected %.9g", k < half ? "cosine" : "sine",
                  pair, b->position[t], f->found, want);
        // The table as rows of "heads" (1, 0): rotating them gives cosines and sines, so that rope's mistakes apply.
        float *unit = size_alloc_zero(b->n_tokens * c->head_dim, sizeof *unit);
        float *right = size_alloc(b->n_tokens * c->head_dim, sizeof *right);
        for (size_t k2 = 0; unit && right && k2 < b->n_tokens * c->head_dim; k2++) {
            double a = (double)b->position[k2 / c->head_dim] * rates[k2 % half];
            unit[k2] = k2 % c->head_dim < half ? 1 : 0;
            right[k2] = (float)((k2 % c->head_dim < half ? cos(a) : sin(a)) * magnitude);
        }
        struct call call = {.formula = FORMULA_HEADS,
                            .op = "rope",
                            .part = "table",
                            .layer = -1,
                            .model = w->o.model,
                            .batch = b,
                            .found = cos_sin,
                            .n_rows = b->n_tokens,
                            .n_columns = c->head_dim,
                            .head_dim = c->head_dim,
                            .x = unit,
                            .n_x_rows = b->n_tokens,
                            .n_in = c->head_dim,
                            .cos_sin = right};
        struct judgement j;
        if (unit && right && call_judge(&call, w->o.max_rows, &j, NULL) && j.n_faulty)
            w->finding->n_diagnoses += call_explain(&call, &j, w->finding->diagnoses, MAX_DIAGNOSES);
        free(unit);
        free(right);
        break;
    }
    free(rates);
    return !w->finding->found;
}

// ---- Judging -------------------------------------------------------------------------------------------------------

static void fill_place(struct walk *w, const struct call *c, const struct judgement *j) {
    struct fault *f = &w->finding->fault;
    char where[32], head[32] = "";
    size_t row = c->rows ? (size_t)c->rows[j->row] : j->row;
    f->kind = FAULT_OP;
    if (c->head_dim) f->head = (int)(j->column / c->head_dim);
    f->channel = (int)(c->head_dim ? j->column % c->head_dim : j->column);
    if (w->seen && row < w->seen->n_tokens) f->position = w->seen->position[row];
    else if (w->planned && row < w->planned->n_tokens) f->position = w->planned->position[row];
    f->expected = j->expected;
    f->found = j->found;
    if (c->head_dim) snprintf(head, sizeof head, "head %d, ", f->head);
    fault_say(f,
              "%s%s%s, %s: %sposition %d, channel %d: expected %.9g +- %.2g, found %.9g; %zu of %zu values are wrong",
              c->op, *c->part ? " " : "", c->part, layer_text(c->layer, where, sizeof where), head, f->position,
              f->channel, j->expected, j->bound, j->found, j->n_faulty, j->n_checked);
}

static size_t other_norms(struct walk *w, enum weight_part part, int layer) {
    static const enum weight_part parts[] = {PART_ATTN_NORM, PART_MLP_NORM, PART_FINAL_NORM, PART_Q_NORM, PART_K_NORM};
    const struct model_config *c = &w->o.model->config;
    size_t n = 0, length, rows, columns;
    if (!weight_shape(c, part, &length, &columns)) return 0;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (!weight_shape(c, parts[i], &rows, &columns) || rows != length) continue;
        bool layered = weight_is_layered(parts[i]);
        for (int l = 0; l < (layered ? (int)c->n_layers : 1) && n < MAX_ALTERNATIVES; l++) {
            int at = layered ? l : -1;
            if (parts[i] == part && at == layer) continue;
            bool qk = parts[i] == PART_Q_NORM || parts[i] == PART_K_NORM;
            struct alternative *a = &w->norms[n++];
            *a = (struct alternative){.vector = weights_vector(w->o.weights, parts[i], at)};
            a->name = parts[i] == part    ? "norm weight of the wrong layer"
                      : qk && at == layer ? "q-norm and k-norm swapped"
                                          : "another norm's weight";
            char name[WEIGHT_NAME_SIZE];
            weight_name(w->o.model->kind, parts[i], (size_t)l, name, sizeof name);
            snprintf(a->detail, sizeof a->detail, "%.90s", name);
        }
    }
    return n;
}

static size_t other_matrices(struct walk *w, enum weight_part part, int layer) {
    static const enum weight_part parts[] = {PART_WQ, PART_WK, PART_WV, PART_WO, PART_GATE, PART_UP, PART_DOWN};
    if (layer < 0) return 0;
    const struct matrix *own = &weights_matrix(w->o.weights, part, layer)->m;
    size_t n = 0;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        for (int l = 0; l < (int)w->o.model->config.n_layers && n < MAX_ALTERNATIVES; l++) {
            const struct oracle_matrix *m = weights_matrix(w->o.weights, parts[i], l);
            bool fits = m->m.n_in == own->n_in && m->m.n_out == own->n_out && !m->interleaved_head;
            if (!fits || (parts[i] == part && l == layer) || (parts[i] != part && l != layer)) continue;
            bool mlp = (part == PART_GATE || part == PART_UP) && (parts[i] == PART_GATE || parts[i] == PART_UP);
            bool kv = (part == PART_WK || part == PART_WV) && (parts[i] == PART_WK || parts[i] == PART_WV);
            struct alternative *a = &w->matrices[n++];
            *a = (struct alternative){.matrix = &m->m};
            a->name = parts[i] == part ? "weight of the wrong layer"
                      : mlp            ? "gate and up swapped"
                      : kv             ? "K and V swapped"
                                       : "another tensor's weight";
            snprintf(a->detail, sizeof a->detail, "%.90s", m->m.name);
        }
    }
    return n;
}

// Judges one output. `norm_part`, `matrix_part`: PART_COUNT: none.
bool walk_judge(struct walk *w, const struct entry *e, struct call *c, enum weight_part norm_part,
                enum weight_part matrix_part, const char *check) {
    struct judgement j;
    struct error err;
    if (w->finding->found) return false;
    c->op = walk_op_name(w, e);
    c->layer = e->layer;
    c->on_device = w->o.on_device;
    c->attn_block = w->o.ops->attn_block;
    c->model = w->o.model;
    c->pool = w->o.pool;
    if (!c->part) c->part = "";
    if (!c->batch) c->batch = w->seen ? w->seen : w->planned;
    if (!call_judge(c, w->o.max_rows, &j, &err)) return w->out_of_memory = true, false;
    if (j.n_faulty == 0) return true;
    finding_place(w->finding, c->op, e->layer, check);
    fill_place(w, c, &j);
    if (norm_part != PART_COUNT) c->n_norms = other_norms(w, norm_part, e->layer);
    if (matrix_part != PART_COUNT) c->n_matrices = other_matrices(w, matrix_part, e->layer);
    c->norms = w->norms;
    c->matrices = w->matrices;
    w->finding->n_diagnoses = call_explain(c, &j, w->finding->diagnoses, MAX_DIAGNOSES);
    return false;
}

// ---- Life ----------------------------------------------------------------------------------------------------------

struct walk *walk_create(const struct walk_options *o, struct finding *finding, struct error *err) {
    struct walk *w = size_alloc_zero(1, sizeof *w);
    if (!w) {
        error_set(err, "out of memory");
        return NULL;
    }
    w->o = *o;
    w->finding = finding;
    w->shadow = kv_shadow_create(&o->model->config, err);
    w->of_seq = size_alloc_zero(o->max_tokens, sizeof *w->of_seq);
    if (!w->shadow || !w->of_seq || !make_program(w)) {
        error_set(err, "out of memory for the walk");
        walk_free(w);
        return NULL;
    }
    w->at = w->n_program;
    spy_fill(w);
    return w;
}

void walk_free(struct walk *w) {
    if (!w) return;
    for (int i = 0; i < SLOT_COUNT; i++) {
        free(w->slots[i].copy);
        free(w->slots[i].before);
    }
    kv_shadow_free(w->shadow);
    free(w->seen);
    free(w->previous);
    free(w->of_seq);
    free(w->program);
    free(w);
}

const struct ops *walk_ops(struct walk *w) {
    return &w->ops;
}

void walk_expect(struct walk *w, const struct batch *batch, const struct walk_sequence *sequences, size_t n) {
    w->planned = batch;
    w->sequences = sequences;
    w->n_sequences = n;
}

void walk_start(struct walk *w) {
    if (w->in_step) walk_finish(w, NULL);
    w->at = 0;
    w->in_step = true;
    free(w->previous);
    w->previous = w->seen;
    w->seen = NULL;
}

void walk_finish(struct walk *w, const float *logits) {
    bool headless = w->at == w->head_at && (!w->seen || w->seen->n_logit_rows == 0);
    if (w->in_step && !w->finding->found && w->at < w->n_program && !headless)
        missing(w, &w->program[w->at], "the step's end");
    const struct result *l = &w->slots[SLOT_LOGITS];
    if (logits && !w->finding->found && w->in_step && l->n && memcmp(l->copy, logits, l->n * sizeof *logits) != 0) {
        size_t at = 0;
        while (float_bits_of(l->copy[at]) == float_bits_of(logits[at])) at++;
        finding_place(w->finding, "logits", -1, "the step returns what its head computed");
        w->finding->fault.channel = (int)(at % w->o.model->config.n_vocab);
        w->finding->fault.expected = (double)l->copy[at];
        w->finding->fault.found = (double)logits[at];
        fault_say(&w->finding->fault, "logits: value %zu is %.9g, but the head computed %.9g", at, (double)logits[at],
                  (double)l->copy[at]);
        size_t n_vocab = w->o.model->config.n_vocab;
        if (l->n_before >= n_vocab && memcmp(l->before, logits, n_vocab * sizeof *logits) == 0)
            finding_name(w->finding, 0.97, "logits one step stale", "they are the step's before");
        else if (l->n > n_vocab && memcmp(l->copy + n_vocab, logits, n_vocab * sizeof *logits) == 0)
            finding_name(w->finding, 0.95, "logits of the wrong row", "row 0 holds row 1");
    }
    w->in_step = false;
}

bool walk_ok(const struct walk *w, struct error *err) {
    return !w->out_of_memory || error_set(err, "out of memory for the diagnosis");
}

const float *walk_logits(const struct walk *w, size_t *n_rows) {
    *n_rows = w->slots[SLOT_LOGITS].n / w->o.model->config.n_vocab;
    return *n_rows ? w->slots[SLOT_LOGITS].copy : NULL;
}
