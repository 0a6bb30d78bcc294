// hypotheses.c: the formulas of embedding, norms, products, residuals and the MLP's activation, right and wrong, in
// f64. Heads and attention are hypotheses_attention.c's, the list of mistakes and their judge hypotheses_explain.c's.
#include "doctor/hypotheses.h"

#include "base/size.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define U 0x1p-24 // unit roundoff of f32

static const struct twist no_twist = {.kind = TWIST_NONE};

static double bf16(double v) {
    return (double)bf16_to_f32(bf16_from_f32((float)v));
}

float poison_float(void) {
    union {
        uint32_t u;
        float f;
    } v = {.u = 0x7FC0DEADu}; // a quiet NaN that no arithmetic makes
    return v.f;
}

uint32_t float_bits_of(float f) {
    union {
        float f;
        uint32_t u;
    } v = {.f = f};
    return v.u;
}

bool is_poison(float f) {
    return float_bits_of(f) == 0x7FC0DEADu;
}

// Which row of x an output row reads.
static size_t input_row(const struct call *c, const struct twist *t, size_t row) {
    size_t from = c->rows ? (size_t)c->rows[row] : row;
    switch (t->kind) {
    case TWIST_ROW_SHIFT: return (from + (size_t)(t->arg + (int)c->n_x_rows)) % c->n_x_rows;
    case TWIST_ROW_FIRST: return 0;
    case TWIST_ROW_LAST: return c->n_x_rows - 1;
    default: return from;
    }
}

// One row of a norm. slack[i]: how far f32 arithmetic may be away.
static void norm_row(const struct call *c, const struct twist *t, const float *x, double *y, double *slack) {
    size_t n = c->n_in;
    double sum = 0, mean = 0, eps = t->kind == TWIST_EPS ? t->value : (double)c->eps;
    const float *w = t->kind == TWIST_NORM_OTHER ? t->other->vector : c->norm;
    if (t->kind == TWIST_NORM_CENTRED) {
        for (size_t i = 0; i < n; i++) mean += (double)x[i];
        mean /= (double)n;
    }
    for (size_t i = 0; i < n; i++) sum += ((double)x[i] - mean) * ((double)x[i] - mean);
    if (t->kind != TWIST_NORM_SUM) sum /= (double)n;
    double r = 1 / sqrt(sum + eps);
    for (size_t i = 0; i < n; i++) {
        double v = ((double)x[i] - mean) * r, weight = (double)w[i];
        if (t->kind == TWIST_NORM_ORDER) v = bf16(v);
        if (t->kind == TWIST_NORM_PLUS_1) weight += 1;
        if (t->kind == TWIST_NORM_BARE) weight = 1;
        y[i] = t->kind == TWIST_NORM_SKIPPED ? (double)x[i] : v * weight;
        if (t->kind == TWIST_NORM_ORDER) y[i] = bf16(y[i]);
        slack[i] = fabs(y[i]) * ((double)n / 16 + 12) * U + FLT_MIN;
    }
}

// An input so close to a border between two bf16 values that f32 arithmetic may have taken the other one gets the
// distance between them as slack.
static void round_bf16(size_t n, double *v, double *slack) {
    for (size_t i = 0; i < n; i++) {
        double low = bf16(v[i] - slack[i]), high = bf16(v[i] + slack[i]);
        slack[i] = high - low;
        v[i] = bf16(v[i]);
    }
}

// To integers of at most m in blocks (ops.h), with the same slack at borders, and the scale's own where the input is
// not exact.
static void round_integers(float m, size_t n, double *v, double *slack) {
    for (size_t begin = 0; begin < n; begin += ACT_BLOCK) {
        float most = 0;
        double loose = 0;
        for (size_t i = begin; i < begin + ACT_BLOCK; i++) {
            most = fabsf((float)v[i]) > most || isnan(v[i]) ? fabsf((float)v[i]) : most;
            loose = fmax(loose, slack[i]);
        }
        float inverse = m / most, d = most / m;
        if (most < 0x1p-100f) inverse = d = 0;
        double relative = loose > 0 ? loose / (double)most + 4 * U : 0;
        for (size_t i = begin; i < begin + ACT_BLOCK; i++) {
            float scaled = (float)v[i] * inverse, q = nearbyintf(scaled);
            double border = 0.5 - fabs((double)scaled - (double)q);
            bool either = border < slack[i] * (double)inverse + fabs((double)scaled) * relative;
            slack[i] = (double)fabsf(q) * (double)d * relative + (either && slack[i] > 0 ? (double)d : 0);
            v[i] = isfinite(most) ? (double)d * (double)q : (double)NAN;
        }
    }
}

// A product's input as the weights' type asks for it.
static void round_input(const struct call *c, const struct twist *t, size_t n, double *v, double *slack) {
    const struct dtype_info *type = dtype_info(c->w->type);
    if (t->kind == TWIST_INPUT_UNROUNDED) return;
    if (c->w->type == DTYPE_BF16 || t->kind == TWIST_INPUT_ROUNDED || (type->is_quantised && c->on_device))
        round_bf16(n, v, slack);
    else if (type->is_quantised) round_integers(ops_rounds_to_int8(c->w->type) ? ACT_MOST : ACT_MOST_WIDE, n, v, slack);
}

// The prepared inputs of a grid's rows. [n_rows, n_in] each.
struct inputs {
    double *v, *slack;
};

static void inputs_free(struct inputs *in) {
    free(in->v);
    free(in->slack);
}

static bool inputs_open(const struct call *c, const struct twist *t, const struct grid *g, struct inputs *in) {
    size_t n;
    *in = (struct inputs){0};
    if (!size_mul(g->n_rows, c->n_in, &n) || !(in->v = size_alloc(n, sizeof *in->v)) ||
        !(in->slack = size_alloc_zero(n, sizeof *in->slack))) {
        inputs_free(in);
        return false;
    }
    for (size_t r = 0; r < g->n_rows; r++) {
        const float *x = c->x + input_row(c, t, g->rows[r]) * c->n_in;
        double *v = in->v + r * c->n_in, *slack = in->slack + r * c->n_in;
        if (c->norm) norm_row(c, t, x, v, slack);
        else
            for (size_t i = 0; i < c->n_in; i++) v[i] = (double)x[i];
        if (c->w) round_input(c, t, c->n_in, v, slack);
    }
    return true;
}

static double dot(const struct twist *t, const double *w, const double *x, size_t n) {
    if (t->kind == TWIST_BF16_SUM) {
        size_t lanes = (size_t)t->arg;
        double acc[16] = {0};
        for (size_t i = 0; i < n; i++) acc[i % lanes] = bf16(acc[i % lanes] + w[i] * x[i]);
        for (size_t half = lanes / 2; half > 0; half /= 2)
            for (size_t l = 0; l < half; l++) acc[l] = bf16(acc[l] + acc[l + half]);
        return acc[0];
    }
    if (t->kind == TWIST_K_TAIL) n -= (size_t)t->arg < n ? (size_t)t->arg : n;
    double acc[4] = {0};
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (size_t l = 0; l < 4; l++) acc[l] += w[i + l] * x[i + l];
    for (; i < n; i++) acc[0] += w[i] * x[i];
    return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

// Columns of a product, shared between threads.
struct product_job {
    const struct twist *t;
    const struct matrix *w;
    const struct inputs *in;
    const struct grid *g;
    double *y, *bound; // [n_rows, n_columns]; bound may be NULL
    double *norms;     // [n_rows] of the inputs
    double *scratch;   // [n_threads, n_in]
    bool ok;
};

static void product_piece(void *user, size_t begin, size_t end, int thread) {
    struct product_job *j = user;
    size_t n = j->w->n_in;
    double *row = j->scratch + (size_t)thread * n;
    for (size_t k = begin; k < end; k++) {
        if (!formula_weight_row(j->w, j->t, j->g->columns[k], row)) {
            j->ok = false; // only ever set to false
            return;
        }
        double square = 0;
        for (size_t i = 0; i < n; i++) square += row[i] * row[i];
        for (size_t r = 0; r < j->g->n_rows; r++) {
            const double *x = j->in->v + r * n, *slack = j->in->slack + r * n;
            size_t at = r * j->g->n_columns + k;
            j->y[at] = dot(j->t, row, x, n);
            if (!j->bound) continue;
            // |sum of the terms' magnitudes| is at most the product of the norms; ties of the input's rounding add up.
            double ties = 0;
            for (size_t i = 0; i < n; i++) ties += fabs(row[i]) * slack[i];
            double terms = dtype_info(j->w->type)->is_quantised ? 8 : 2; // scale * u and min may cancel
            j->bound[at] = terms * ((double)n / 16 + 8) * U * sqrt(square) * j->norms[r] + ties + FLT_MIN;
        }
    }
}

static bool product(const struct call *c, const struct twist *t, const struct matrix *w, const struct inputs *in,
                    const struct grid *g, double *y, double *bound) {
    size_t n_threads = c->pool ? (size_t)pool_size(c->pool) : 1, n = w->n_in;
    struct product_job j = {.t = t, .w = w, .in = in, .g = g, .y = y, .bound = bound, .ok = true};
    j.norms = size_alloc_zero(g->n_rows, sizeof *j.norms);
    j.scratch = size_alloc(n_threads * n, sizeof *j.scratch);
    if (j.norms && j.scratch) {
        for (size_t r = 0; r < g->n_rows; r++) {
            for (size_t i = 0; i < n; i++) j.norms[r] += in->v[r * n + i] * in->v[r * n + i];
            j.norms[r] = sqrt(j.norms[r]);
        }
        if (c->pool && g->n_columns >= 64) pool_for(c->pool, g->n_columns, 16, product_piece, &j);
        else product_piece(&j, 0, g->n_columns, 0);
    } else {
        j.ok = false;
    }
    free(j.norms);
    free(j.scratch);
    return j.ok;
}

static double residual_sum(const struct twist *t, double before, double projected) {
    switch (t->kind) {
    case TWIST_RESIDUAL_LOST: return projected;
    case TWIST_PROJECTION_LOST: return before;
    case TWIST_RESIDUAL_TWICE: return 2 * before + projected;
    case TWIST_PROJECTION_TWICE: return before + 2 * projected;
    case TWIST_SUBTRACTED: return before - projected;
    default: return before + projected;
    }
}

bool formula_linear(const struct call *c, const struct twist *t, const struct grid *g, double *want, double *bound) {
    struct inputs in;
    if (!inputs_open(c, t, g, &in)) return false;
    bool ok = true;
    if (c->w) ok = product(c, t, c->w, &in, g, want, bound);
    for (size_t r = 0; ok && r < g->n_rows; r++) {
        for (size_t k = 0; k < g->n_columns; k++) {
            size_t at = r * g->n_columns + k, column = g->columns[k];
            if (!c->w) want[at] = in.v[r * c->n_in + column];
            if (!c->w && bound) bound[at] = in.slack[r * c->n_in + column];
            if (c->bias && t->kind != TWIST_NO_BIAS)
                want[at] += (double)c->bias[column] * (t->kind == TWIST_BIAS_TWICE ? 2 : 1);
            if (c->add) {
                double before = (double)c->add[g->rows[r] * c->n_columns + column];
                want[at] = residual_sum(t, before, want[at]);
                if (bound) bound[at] += fabs(before) * U;
            }
            if (bound && (c->bias || c->add)) bound[at] += 2 * fabs(want[at]) * U;
            if (t->kind == TWIST_NORM_ORDER && !c->w) continue;
        }
    }
    inputs_free(&in);
    return ok;
}

// ---- The MLP's activation ------------------------------------------------------------------------------------------

static double activation(const struct twist *t, double gate, double up) {
    const double root = 0.79788456080286535588; // sqrt(2 / pi)
    switch (t->kind) {
    case TWIST_GELU_TANH: return 0.5 * gate * (1 + tanh(root * (gate + 0.044715 * gate * gate * gate))) * up;
    case TWIST_GELU_ERF: return 0.5 * gate * (1 + erf(gate / sqrt(2.0))) * up;
    case TWIST_RELU: return (gate > 0 ? gate : 0) * up;
    case TWIST_SIGMOID: return up / (1 + exp(-gate));
    case TWIST_NO_UP: return gate / (1 + exp(-gate));
    case TWIST_GATE_UP_SWAPPED: return up / (1 + exp(-up)) * gate;
    case TWIST_EXP_OVERFLOW: return (double)(expf((float)gate) / (1.0f + expf((float)gate)) * (float)gate) * up;
    default: return gate / (1 + exp(-gate)) * up;
    }
}

// How far an activation may be off when gate and up are: |d silu| <= 1.1 |d gate|. A GPU's e^x is 2^(x log2 e), rounded
// as a number of x's size.
static double activation_bound(const struct call *c, double gate, double up, double d_gate, double d_up) {
    double silu = fabs(gate / (1 + exp(-gate))), roundings = c->on_device ? 14 + 3 * fabs(gate) : 12;
    return 1.1 * d_gate * (fabs(up) + d_up) + silu * d_up + roundings * silu * fabs(up) * U + 1.2e-36 * (1 + fabs(up));
}

// Gate and up of channels 2i and 2i + 1 of [gate, up] (wrong half), or up of another half's channel.
static double element_of(const float *gate, const float *up, size_t n, size_t at) {
    return (double)(at < n ? gate[at] : up[at - n]);
}

static bool formula_silu(const struct call *c, const struct twist *t, const struct grid *g, double *want,
                         double *bound) {
    size_t n = c->n_columns;
    for (size_t r = 0; r < g->n_rows; r++) {
        size_t row = input_row(c, t, g->rows[r]);
        const float *gate = c->x + row * n, *up = c->up + row * n;
        for (size_t k = 0; k < g->n_columns; k++) {
            size_t i = g->columns[k], at = r * g->n_columns + k;
            double a = (double)gate[i], b = (double)up[i];
            if (t->kind == TWIST_WRONG_HALF) a = element_of(gate, up, n, 2 * i), b = element_of(gate, up, n, 2 * i + 1);
            if (t->kind == TWIST_SHIFT_HALF) b = (double)up[(i + n / 2) % n];
            want[at] = activation(t, a, b);
            if (bound) bound[at] = activation_bound(c, a, b, 0, 0);
        }
    }
    return true;
}

// The columns of gate and up that a column of the output is made of.
static void gate_up_columns(const struct twist *t, size_t n, size_t column, size_t *gate, size_t *up) {
    *gate = *up = column;
    if (t->kind == TWIST_WRONG_HALF) *gate = 2 * column, *up = 2 * column + 1; // of [gate, up]
    if (t->kind == TWIST_SHIFT_HALF) *up = (column + n / 2) % n;
}

static bool formula_gate_up(const struct call *c, const struct twist *t, const struct grid *g, double *want,
                            double *bound) {
    size_t n = g->n_rows * g->n_columns, n_ff = c->n_columns;
    double *up = size_alloc(n, sizeof *up), *d_up = size_alloc_zero(n, sizeof *d_up);
    double *d_gate = size_alloc_zero(n, sizeof *d_gate);
    size_t *columns = size_alloc(2 * g->n_columns, sizeof *columns);
    struct inputs in = {0};
    bool ok = up && d_up && d_gate && columns && inputs_open(c, t, g, &in);
    if (ok && t->kind == TWIST_WRONG_HALF) { // the two matrices as one, a column at a time
        for (size_t k = 0; ok && k < g->n_columns; k++) {
            size_t pair[2];
            gate_up_columns(t, n_ff, g->columns[k], &pair[0], &pair[1]);
            for (int side = 0; ok && side < 2; side++) {
                size_t column = pair[side] % n_ff;
                for (size_t r = 0; ok && r < g->n_rows; r++) {
                    struct grid one = {&g->rows[r], &column, 1, 1};
                    struct inputs row = {in.v + r * c->n_in, in.slack + r * c->n_in};
                    ok = product(c, t, pair[side] < n_ff ? c->w : c->w_up, &row, &one,
                                 (side ? up : want) + r * g->n_columns + k, NULL);
                }
            }
        }
    } else if (ok) {
        for (size_t k = 0; k < g->n_columns; k++)
            gate_up_columns(t, n_ff, g->columns[k], &columns[k], &columns[g->n_columns + k]);
        struct grid of_gate = *g, of_up = *g;
        of_gate.columns = columns;
        of_up.columns = columns + g->n_columns;
        struct twist gate_twist = *t, up_twist = *t;
        if (t->kind == TWIST_UP_OTHER) gate_twist.kind = TWIST_NONE, up_twist.kind = TWIST_MATRIX_OTHER;
        if (t->kind == TWIST_MATRIX_OTHER) up_twist.kind = TWIST_NONE;
        ok = product(c, &gate_twist, c->w, &in, &of_gate, want, bound ? d_gate : NULL) &&
             product(c, &up_twist, c->w_up, &in, &of_up, up, bound ? d_up : NULL);
    }
    for (size_t i = 0; ok && i < n; i++) {
        if (bound) bound[i] = activation_bound(c, want[i], up[i], d_gate[i], d_up[i]);
        want[i] = activation(t, want[i], up[i]);
    }
    inputs_free(&in);
    free(up);
    free(d_up);
    free(d_gate);
    free(columns);
    return ok;
}

// ---- Embedding and the rest ----------------------------------------------------------------------------------------

static bool formula_embed(const struct call *c, const struct twist *t, const struct grid *g, double *want,
                          double *bound) {
    double *row = size_alloc(c->w->n_in, sizeof *row);
    bool ok = row != NULL;
    for (size_t r = 0; ok && r < g->n_rows; r++) {
        size_t from = g->rows[r];
        if (t->kind == TWIST_ROW_SHIFT) from = (from + (size_t)(t->arg + (int)c->n_rows)) % c->n_rows;
        ok = formula_weight_row(c->w, t, (size_t)c->token[from], row);
        for (size_t k = 0; ok && k < g->n_columns; k++) {
            want[r * g->n_columns + k] = row[g->columns[k]];
            if (bound) bound[r * g->n_columns + k] = 0;
        }
    }
    free(row);
    return ok;
}

static bool formula_add(const struct call *c, const struct twist *t, const struct grid *g, double *want,
                        double *bound) {
    for (size_t r = 0; r < g->n_rows; r++) {
        for (size_t k = 0; k < g->n_columns; k++) {
            size_t at = r * g->n_columns + k;
            double y = (double)c->x[input_row(c, t, g->rows[r]) * c->n_columns + g->columns[k]];
            want[at] = residual_sum(t, (double)c->add[g->rows[r] * c->n_columns + g->columns[k]], y);
            if (bound) bound[at] = 2 * U * fabs(want[at]) + FLT_MIN;
        }
    }
    return true;
}

bool formula_evaluate(const struct call *c, const struct twist *twist, const struct grid *g, double *want,
                      double *bound) {
    const struct twist *t = twist ? twist : &no_twist;
    switch (c->formula) {
    case FORMULA_EMBED: return formula_embed(c, t, g, want, bound);
    case FORMULA_LINEAR: return formula_linear(c, t, g, want, bound);
    case FORMULA_GATE_UP: return formula_gate_up(c, t, g, want, bound);
    case FORMULA_HEADS: return formula_heads(c, t, g, want, bound);
    case FORMULA_SILU: return formula_silu(c, t, g, want, bound);
    case FORMULA_ADD: return formula_add(c, t, g, want, bound);
    case FORMULA_ATTENTION: return formula_attention(c, t, g, want, bound);
    }
    return false;
}
