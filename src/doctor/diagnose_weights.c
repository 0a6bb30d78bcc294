// diagnose_weights.c: is a weight that an op reads the one that the file holds under its name? And if not, what is it?
// The right reading is the oracle's own binding.
#include "doctor/diagnose_walk.h"

#include "base/size.h"
#include "model/names.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void finding_place(struct finding *f, const char *op, int layer, const char *check) {
    if (f->found) return;
    f->found = true;
    f->fault = (struct fault){
        .layer = layer, .head = -1, .position = -1, .channel = -1, .prompt = -1, .expected = NAN, .found = NAN};
    snprintf(f->fault.op, sizeof f->fault.op, "%s", op);
    snprintf(f->fault.check, sizeof f->fault.check, "%s", check);
}

void finding_name(struct finding *f, double confidence, const char *name, const char *format, ...) {
    if (f->n_diagnoses == MAX_DIAGNOSES) return;
    struct diagnosis *d = &f->diagnoses[f->n_diagnoses++];
    *d = (struct diagnosis){.confidence = confidence};
    snprintf(d->name, sizeof d->name, "%s", name);
    va_list args;
    va_start(args, format);
    vsnprintf(d->text, sizeof d->text, format, args);
    va_end(args);
}

const struct oracle_matrix *weights_matrix(const struct oracle_weights *w, enum weight_part part, int layer) {
    const struct oracle_layer *l = layer >= 0 ? &w->layers[layer] : NULL;
    switch (part) {
    case PART_EMBED: return &w->embed;
    case PART_HEAD: return &w->head;
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

const float *weights_vector(const struct oracle_weights *w, enum weight_part part, int layer) {
    const struct oracle_layer *l = layer >= 0 ? &w->layers[layer] : NULL;
    switch (part) {
    case PART_FINAL_NORM: return w->final_norm;
    case PART_ATTN_NORM: return l->attn_norm;
    case PART_MLP_NORM: return l->mlp_norm;
    case PART_Q_NORM: return l->q_norm;
    case PART_K_NORM: return l->k_norm;
    case PART_BQ: return l->bq;
    case PART_BK: return l->bk;
    case PART_BV: return l->bv;
    default: return NULL;
    }
}

// ---- Matrices ------------------------------------------------------------------------------------------------------

static bool same_bits(double a, double b) {
    return a == b || (isnan(a) && isnan(b));
}

// Whether row `row` of m holds row `from` of `right`; *column: the first that differs.
static bool rows_equal(const struct matrix *m, size_t row, const struct oracle_matrix *right, size_t from, double *a,
                       double *b, size_t *column) {
    if (m->n_in != right->m.n_in || !oracle_row(m, row, a, NULL)) return false;
    oracle_elements(right, from, 0, b, m->n_in);
    for (size_t i = 0; i < m->n_in; i++)
        if (!same_bits(a[i], b[i])) return *column = i, false;
    return true;
}

// Does m, from a few rows that can tell, look like `other`, `shift` rows further?
static bool looks_like(const struct matrix *m, const struct oracle_matrix *other, size_t shift, double *a, double *b) {
    if (m->n_in != other->m.n_in) return false;
    size_t column, n = m->n_out < other->m.n_out ? m->n_out : other->m.n_out;
    const size_t rows[] = {0, n / 3, n / 2, n - 1};
    int equal = 0;
    for (size_t i = 0; i < 4; i++)
        equal += rows_equal(m, rows[i], other, (rows[i] + shift) % other->m.n_out, a, b, &column);
    return equal == 4 || (shift && equal == 3); // shifted: what stands at the end is anybody's guess
}

static const char *wrong_matrix_name(enum weight_part part, enum weight_part is) {
    bool mlp = (part == PART_GATE && is == PART_UP) || (part == PART_UP && is == PART_GATE);
    bool kv = (part == PART_WK && is == PART_WV) || (part == PART_WV && is == PART_WK);
    if (mlp) return "gate and up swapped";
    if (kv) return "K and V swapped";
    if (part == PART_HEAD) return "LM head untied";
    return part == is ? "weight of the wrong layer" : "another tensor bound";
}

static void name_matrix(const struct walk_options *o, enum weight_part part, int layer, const struct matrix *m,
                        struct finding *f, double *a, double *b) {
    static const enum weight_part parts[] = {PART_EMBED, PART_HEAD, PART_WQ, PART_WK,  PART_WV,
                                             PART_WO,    PART_GATE, PART_UP, PART_DOWN};
    char name[WEIGHT_NAME_SIZE];
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        bool layered = weight_is_layered(parts[i]);
        for (int l = 0; l < (layered ? (int)o->model->config.n_layers : 1); l++) {
            int at = layered ? l : -1;
            if (parts[i] == part && at == layer) continue;
            if (!looks_like(m, weights_matrix(o->weights, parts[i], at), 0, a, b)) continue;
            weight_name(o->model->kind, parts[i], (size_t)l, name, sizeof name);
            finding_name(f, 0.97, wrong_matrix_name(part, parts[i]), "it holds %s", name);
            return;
        }
    }
    const struct oracle_matrix *right = weights_matrix(o->weights, part, layer);
    for (size_t shift = 1; shift < right->m.n_out; shift++) {
        size_t mirrored = shift % 2 ? (shift + 1) / 2 : right->m.n_out - shift / 2; // 1, -1, 2, -2, ...
        if (shift > 64) break;
        if (!looks_like(m, right, mirrored, a, b)) continue;
        finding_name(f, 0.95, part == PART_EMBED ? "embedding row off by one" : "weight row off by one",
                     "row o holds row o %+ld of the file's",
                     shift % 2 ? (long)mirrored : (long)mirrored - (long)right->m.n_out);
        return;
    }
    if (right->interleaved_head) {
        struct oracle_matrix plain = *right;
        plain.interleaved_head = 0;
        if (looks_like(m, &plain, 0, a, b))
            finding_name(f, 0.95, "rows not put back", "GGUF's order of q and k rows of this family was kept");
        return;
    }
    if (part == PART_HEAD) finding_name(f, 0.7, "LM head untied", "it is neither the embedding nor any other tensor");
}

bool weights_check_matrix(const struct walk_options *o, enum weight_part part, int layer, const struct matrix *m,
                          struct finding *f) {
    const struct oracle_matrix *right = weights_matrix(o->weights, part, layer);
    bool same_place = m->data == right->m.data && m->type == right->m.type && m->n_out == right->m.n_out &&
                      m->n_in == right->m.n_in && m->row_bytes == right->m.row_bytes;
    if (same_place && !right->interleaved_head) return true;
    char name[WEIGHT_NAME_SIZE];
    weight_name(o->model->kind, part, layer < 0 ? 0 : (size_t)layer, name, sizeof name);
    size_t width = m->n_in > right->m.n_in ? m->n_in : right->m.n_in, column = 0;
    double *a = size_alloc(width, sizeof *a), *b = size_alloc(width, sizeof *b);
    bool ok = a && b && m->n_out == right->m.n_out && m->n_in == right->m.n_in;
    size_t row = 0;
    for (; ok && row < m->n_out; row++) {
        ok = rows_equal(m, row, right, row, a, b, &column);
        if (!ok) break;
    }
    if (!ok && a && b) {
        finding_place(f, "weights", layer, "bound weight = the file's");
        snprintf(f->fault.tensor, sizeof f->fault.tensor, "%s", name);
        f->fault.kind = FAULT_WEIGHT;
        if (m->n_in == right->m.n_in && m->n_out == right->m.n_out) {
            f->fault.channel = (int)row;
            f->fault.expected = b[column];
            f->fault.found = a[column];
            fault_say(&f->fault, "tensor %s: the model reads %.9g at [%zu, %zu], the file holds %.9g", name, a[column],
                      row, column, b[column]);
        } else {
            fault_say(&f->fault, "tensor %s: the model reads [%zu, %zu], the file holds [%zu, %zu]", name, m->n_out,
                      m->n_in, right->m.n_out, right->m.n_in);
        }
        name_matrix(o, part, layer, m, f, a, b);
    }
    free(a);
    free(b);
    return ok;
}

// ---- Vectors -------------------------------------------------------------------------------------------------------

static size_t vector_length(const struct model_config *c, enum weight_part part) {
    size_t rows, columns;
    return weight_shape(c, part, &rows, &columns) ? rows : 0;
}

static bool vectors_equal(const float *a, const float *b, size_t n, size_t *at) {
    for (size_t i = 0; i < n; i++)
        if (!same_bits((double)a[i], (double)b[i])) return *at = i, false;
    return true;
}

static const char *wrong_vector_name(enum weight_part part, enum weight_part is) {
    bool qk = (part == PART_Q_NORM && is == PART_K_NORM) || (part == PART_K_NORM && is == PART_Q_NORM);
    bool bias = part >= PART_BQ && part <= PART_BV;
    if (qk) return "q-norm and k-norm swapped";
    if (bias) return "wrong bias";
    return part == is ? "norm weight of the wrong layer" : "another norm's weight";
}

// A vector that was read in another way than its type says, or not at all.
static void name_vector(const struct walk_options *o, enum weight_part part, int layer, const float *v, size_t n,
                        struct finding *f) {
    static const enum weight_part parts[] = {PART_FINAL_NORM, PART_ATTN_NORM, PART_MLP_NORM, PART_Q_NORM,
                                             PART_K_NORM,     PART_BQ,        PART_BK,       PART_BV};
    char name[WEIGHT_NAME_SIZE];
    size_t at, ones = 0, zeros = 0, plus = 0, wild = 0;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        bool layered = weight_is_layered(parts[i]);
        for (int l = 0; l < (layered ? (int)o->model->config.n_layers : 1); l++) {
            const float *other = weights_vector(o->weights, parts[i], layered ? l : -1);
            if ((parts[i] == part && l == layer) || !other || vector_length(&o->model->config, parts[i]) != n) continue;
            if (!vectors_equal(v, other, n, &at)) continue;
            weight_name(o->model->kind, parts[i], (size_t)l, name, sizeof name);
            finding_name(f, 0.97, wrong_vector_name(part, parts[i]), "it holds %s", name);
            return;
        }
    }
    const float *right = weights_vector(o->weights, part, layer);
    size_t shifted = 0, times = 0;
    for (size_t i = 0; i < n; i++) {
        ones += v[i] == 1;
        zeros += v[i] == 0;
        plus += v[i] == right[i] + 1;
        shifted += v[i] == right[(i + 1) % n];
        times += v[i] == right[i] || fabsf(v[i]) > 1e6f || !isfinite(v[i]) || fabsf(v[i]) < 1e-20f;
        wild += !isfinite(v[i]) || fabsf(v[i]) > 1e6f || (v[i] != 0 && fabsf(v[i]) < 1e-20f);
    }
    bool bias = part >= PART_BQ && part <= PART_BV;
    if (plus == n) finding_name(f, 0.97, "norm weight plus one", "w + 1 instead of w");
    else if (ones == n) finding_name(f, 0.97, "norm weight missing", "every value is 1");
    else if (zeros == n) finding_name(f, 0.95, bias ? "bias left out" : "norm weight missing", "every value is 0");
    else if (shifted + 1 >= n) finding_name(f, 0.9, "offset by one element", "value i holds value i + 1");
    else if (wild * 4 >= n || (wild > 0 && times == n))
        finding_name(f, 0.9, bias ? "uninitialised bias" : "vector read in the wrong type",
                     "%zu of %zu values are NaN, infinite, huge or next to zero, as memory that nobody wrote is", wild,
                     n);
    else
        finding_name(f, bias ? 0.6 : 0.3, bias ? "uninitialised bias" : "vector read in the wrong type",
                     "the values stand nowhere in the file");
}

bool weights_check_vector(const struct walk_options *o, enum weight_part part, int layer, const float *v, size_t n,
                          struct finding *f) {
    const float *right = weights_vector(o->weights, part, layer);
    char name[WEIGHT_NAME_SIZE];
    size_t at = 0;
    if (!v && !right) return true;
    if (v && right && vectors_equal(v, right, n, &at)) return true;
    weight_name(o->model->kind, part, layer < 0 ? 0 : (size_t)layer, name, sizeof name);
    finding_place(f, "weights", layer, "bound weight = the file's");
    snprintf(f->fault.tensor, sizeof f->fault.tensor, "%s", name);
    f->fault.kind = FAULT_WEIGHT;
    if (!right) {
        for (size_t i = 0; i < n && at == 0; i++)
            if (v[i] != 0) at = i;
        f->fault.channel = (int)at;
        f->fault.expected = 0;
        f->fault.found = (double)v[at];
        fault_say(&f->fault, "tensor %s: the model adds %.9g at [%zu], but neither config nor file has such a vector",
                  name, (double)v[at], at);
        finding_name(f, 0.97, "uninitialised bias", "%s is added, which the config does not ask for", name);
    } else if (!v) {
        fault_say(&f->fault, "tensor %s: the file holds it, the model has none", name);
        finding_name(f, 0.95, part >= PART_BQ && part <= PART_BV ? "bias left out" : "norm weight missing",
                     "the config asks for %s", name);
    } else {
        f->fault.channel = (int)at;
        f->fault.expected = (double)right[at];
        f->fault.found = (double)v[at];
        fault_say(&f->fault, "tensor %s: the model reads %.9g at [%zu], the file holds %.9g", name, (double)v[at], at,
                  (double)right[at]);
        name_vector(o, part, layer, v, n, f);
    }
    return false;
}

bool weights_check_model(const struct walk_options *o, struct finding *f) {
    const struct model *m = o->model;
    const struct model_config *c = &m->config;
    size_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    if (!weights_check_matrix(o, PART_EMBED, -1, &m->embed, f)) return false;
    for (int i = 0; i < (int)c->n_layers; i++) {
        const struct layer_weights *w = &m->layers[i];
        const struct {
            enum weight_part part;
            const float *v;
            size_t n;
        } vectors[] = {{PART_ATTN_NORM, w->attn_norm, c->hidden},
                       {PART_BQ, w->bq, q},
                       {PART_BK, w->bk, kv},
                       {PART_BV, w->bv, kv},
                       {PART_Q_NORM, w->q_norm, c->head_dim},
                       {PART_K_NORM, w->k_norm, c->head_dim},
                       {PART_MLP_NORM, w->mlp_norm, c->hidden}};
        const struct {
            enum weight_part part;
            const struct matrix *m;
        } matrices[] = {{PART_WQ, &w->wq},       {PART_WK, &w->wk},   {PART_WV, &w->wv},      {PART_WO, &w->wo},
                        {PART_GATE, &w->w_gate}, {PART_UP, &w->w_up}, {PART_DOWN, &w->w_down}};
        for (size_t k = 0; k < 7; k++)
            if (!weights_check_vector(o, vectors[k].part, i, vectors[k].v, vectors[k].n, f)) return false;
        for (size_t k = 0; k < 7; k++)
            if (!weights_check_matrix(o, matrices[k].part, i, matrices[k].m, f)) return false;
    }
    return weights_check_vector(o, PART_FINAL_NORM, -1, m->final_norm, c->hidden, f) &&
           weights_check_matrix(o, PART_HEAD, -1, &m->head, f);
}
