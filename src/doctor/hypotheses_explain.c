// hypotheses_explain.c: comparing a call's numbers with the right formula, and the list of known mistakes that are
// tried on what differs. The formulas are hypotheses.c's and hypotheses_attention.c's.
#include "doctor/hypotheses.h"

#include "base/size.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { JUDGE_ROWS = 32 }; // rows evaluated at once

// ---- Judging -------------------------------------------------------------------------------------------------------

// Which rows and columns hold faults, and how many were compared.
struct survey {
    bool *row, *column, *seen; // [n_rows], [n_columns], [n_rows] compared at all
};

static void note_fault(const struct call *c, struct judgement *j, struct survey *s, size_t row, size_t column,
                       double want, double bound) {
    if (j->n_faulty++ == 0) {
        j->row = row;
        j->column = j->min_column = column;
        j->expected = want;
        j->found = (double)c->found[row * c->n_columns + column];
        j->bound = bound;
    }
    if (column < j->min_column) j->min_column = column;
    s->row[row] = s->column[column] = true;
}

// Up to `most` of the places that are `faulty` (or are not), spread over all of them; in order behind the `n` that are
// there. Returns the new number.
static size_t spread(const bool *is, const bool *seen, size_t n_places, bool faulty, size_t most, size_t *list,
                     size_t n) {
    size_t total = 0, k = 0;
    for (size_t i = 0; i < n_places; i++) total += is[i] == faulty && (!seen || seen[i]);
    size_t take = total < most ? total : most;
    for (size_t i = 0, at = 0; i < n_places && k < take; i++) {
        if (is[i] != faulty || (seen && !seen[i])) continue;
        size_t due = take < 2 ? 0 : k * (total - 1) / (take - 1);
        if (at++ == due) list[n + k++] = i;
    }
    return n + k;
}

static int by_number(const void *a, const void *b) {
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return x < y ? -1 : x > y;
}

// The grid on which hypotheses are tried: faulty rows and columns, and some of the others, which a right explanation
// must leave alone.
static void choose_grid(const struct call *c, const struct survey *s, struct judgement *j) {
    j->n_rows = spread(s->row, s->seen, c->n_rows, true, GRID_ROWS - 3, j->rows, 0);
    j->n_rows = spread(s->row, s->seen, c->n_rows, false, 3, j->rows, j->n_rows);
    j->n_columns = spread(s->column, NULL, c->n_columns, true, GRID_COLUMNS - 12, j->columns, 0);
    j->n_columns = spread(s->column, NULL, c->n_columns, false, 12, j->columns, j->n_columns);
    qsort(j->columns, j->n_columns, sizeof *j->columns, by_number); // heads are worked out once each
}

static bool compare_rows(const struct call *c, size_t n, struct judgement *j, struct survey *s, double *want,
                         double *bound, const size_t *columns) {
    size_t rows[JUDGE_ROWS];
    for (size_t begin = 0; begin < n; begin += JUDGE_ROWS) {
        struct grid g = {.rows = rows, .columns = columns, .n_columns = c->n_columns};
        for (; g.n_rows < JUDGE_ROWS && begin + g.n_rows < n; g.n_rows++) {
            // Spread over all rows, the first and the last among them.
            size_t i = begin + g.n_rows;
            rows[g.n_rows] = n == c->n_rows ? i : n < 2 ? 0 : i * (c->n_rows - 1) / (n - 1);
            s->seen[rows[g.n_rows]] = true;
        }
        if (!formula_evaluate(c, NULL, &g, want, bound)) return false;
        for (size_t i = 0; i < g.n_rows * c->n_columns; i++) {
            size_t row = rows[i / c->n_columns], column = i % c->n_columns;
            double found = (double)c->found[row * c->n_columns + column];
            j->n_checked++;
            if (isfinite(want[i]) && !(fabs(found - want[i]) <= bound[i]))
                note_fault(c, j, s, row, column, want[i], bound[i]);
        }
    }
    return true;
}

bool call_judge(const struct call *c, size_t max_rows, struct judgement *j, struct error *err) {
    *j = (struct judgement){0};
    size_t *columns = size_alloc(c->n_columns, sizeof *columns);
    double *want = size_alloc(JUDGE_ROWS * c->n_columns, sizeof *want);
    double *bound = size_alloc(JUDGE_ROWS * c->n_columns, sizeof *bound);
    struct survey s = {.row = size_alloc_zero(c->n_rows, 1), .column = size_alloc_zero(c->n_columns, 1)};
    s.seen = size_alloc_zero(c->n_rows, 1);
    bool ok = columns && want && bound && s.row && s.column && s.seen;
    for (size_t k = 0; ok && k < c->n_columns; k++) columns[k] = k;
    ok = ok && compare_rows(c, c->n_rows < max_rows ? c->n_rows : max_rows, j, &s, want, bound, columns);
    if (ok && j->n_faulty) choose_grid(c, &s, j);
    free(columns);
    free(want);
    free(bound);
    free(s.row);
    free(s.column);
    free(s.seen);
    return ok || error_set(err, "the reference for %s could not be evaluated: out of memory", c->op);
}

// ---- Explaining ----------------------------------------------------------------------------------------------------

enum { MAX_CANDIDATES = 400 };

struct guess {
    const char *name;
    char detail[96];
    double remaining;     // share of the error that is left, 0 to 1
    double contradiction; // share of the right values around it that it would change
};

struct explain {
    const struct call *c;
    const struct judgement *j;
    struct grid g;
    size_t n, n_faulty; // elements of the grid, and those of them that are faulty
    double *right, *bound, *twisted, *found;
    bool *faulty;
    struct guess list[MAX_CANDIDATES];
    size_t n_candidates;
};

// The share of the error that is left when `guess` is believed: the mean over faulty elements.
static double remaining(const struct explain *e, const double *guess) {
    double sum = 0;
    for (size_t i = 0; i < e->n; i++) {
        if (!e->faulty[i]) continue;
        bool finite = isfinite(e->found[i]);
        if (!finite || !isfinite(guess[i])) {
            sum += finite != isfinite(guess[i]);
            continue;
        }
        double left = fabs(e->found[i] - guess[i]), was = fabs(e->found[i] - e->right[i]);
        if (left <= e->bound[i]) left = fmin(left, 1e-3 * was);
        sum += left < was ? left / was : 1;
    }
    return sum / (double)e->n_faulty;
}

// The share of the values that are right which would be others.
static double contradiction(const struct explain *e, const double *guess) {
    double n = 0, others = 0;
    for (size_t i = 0; i < e->n; i++) {
        if (e->faulty[i] || !isfinite(e->right[i])) continue;
        n++;
        others += !(fabs(e->found[i] - guess[i]) <= 4 * e->bound[i] + 1e-6 * fabs(guess[i]));
    }
    return n > 0 ? others / n : 0;
}

// `guess`: what it makes of the grid; NULL: it says nothing about values that are right.
static void add_candidate(struct explain *e, const char *name, const char *detail, double left, const double *guess) {
    if (e->n_candidates == MAX_CANDIDATES || left > 0.5) return;
    struct guess *c = &e->list[e->n_candidates++];
    c->name = name;
    c->remaining = left;
    c->contradiction = guess ? contradiction(e, guess) : 0;
    snprintf(c->detail, sizeof c->detail, "%s", detail);
}

static void try_twist(struct explain *e, const struct twist *t) {
    if (!formula_evaluate(e->c, t, &e->g, e->twisted, NULL)) return;
    add_candidate(e, t->name, t->detail, remaining(e, e->twisted), e->twisted);
}

static void try_kind(struct explain *e, enum twist_kind kind, int arg, double value, const char *name,
                     const char *format, ...) __attribute__((format(printf, 6, 7)));
static void try_kind(struct explain *e, enum twist_kind kind, int arg, double value, const char *name,
                     const char *format, ...) {
    struct twist t = {.kind = kind, .arg = arg, .value = value, .name = name};
    va_list args;
    va_start(args, format);
    vsnprintf(t.detail, sizeof t.detail, format, args);
    va_end(args);
    try_twist(e, &t);
}

static void try_other(struct explain *e, enum twist_kind kind, const struct alternative *list, size_t n) {
    for (size_t i = 0; i < n; i++) {
        struct twist t = {.kind = kind, .other = &list[i], .name = list[i].name};
        snprintf(t.detail, sizeof t.detail, "%s", list[i].detail);
        try_twist(e, &t);
    }
}

static bool is_head(const struct call *c) {
    return c->layer < 0 && c->w && c->formula == FORMULA_LINEAR;
}

static void try_rows(struct explain *e) {
    const struct call *c = e->c;
    bool logits = c->rows != NULL;
    const char *name = logits ? "logits of the wrong row" : "neighbour's row";
    if (c->n_rows > 1 || c->n_x_rows > 1) {
        try_kind(e, TWIST_ROW_SHIFT, 1, 0, name, "the row after the right one");
        try_kind(e, TWIST_ROW_SHIFT, -1, 0, name, "the row before the right one");
        try_kind(e, TWIST_ROW_FIRST, 0, 0, name, "row 0 for all");
        try_kind(e, TWIST_ROW_LAST, 0, 0, name, "the last row for all");
    }
}

static void try_norm(struct explain *e) {
    const struct call *c = e->c;
    double eps = (double)c->eps;
    static const double others[] = {1e-5, 1e-6};
    if (!c->norm) return;
    try_kind(e, TWIST_EPS, 0, 0, "norm eps missing", "0 instead of %g", eps);
    try_kind(e, TWIST_EPS, 0, 2 * eps, "norm eps doubled", "%g instead of %g", 2 * eps, eps);
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        if (fabs(others[i] - eps) > 1e-3 * eps)
            try_kind(e, TWIST_EPS, 0, others[i], "norm eps wrong", "%g instead of %g", others[i], eps);
    try_kind(e, TWIST_NORM_ORDER, 0, 0, "norm order", "rounded to bf16 before the weight is applied");
    try_kind(e, TWIST_NORM_PLUS_1, 0, 0, "norm weight plus one", "w + 1 instead of w");
    try_kind(e, TWIST_NORM_BARE, 0, 0, "norm weight missing", "normalised, not weighted");
    try_kind(e, TWIST_NORM_SUM, 0, 0, "norm by the sum", "sum of squares instead of their mean");
    try_kind(e, TWIST_NORM_CENTRED, 0, 0, "norm centred", "the mean is subtracted first, as in LayerNorm");
    try_kind(e, TWIST_NORM_SKIPPED, 0, 0, "norm left out", "the input as it is");
    try_other(e, TWIST_NORM_OTHER, c->norms, c->n_norms);
}

static void try_product(struct explain *e) {
    const struct call *c = e->c;
    size_t n = c->w->n_in;
    static const size_t tiles[] = {4, 8, 16, 32, 64, 128, 256};
    const char *transposed = is_head(c) ? "LM head transposed" : "projection transposed";
    try_other(e, TWIST_MATRIX_OTHER, c->matrices, c->n_matrices);
    if (c->formula == FORMULA_GATE_UP) try_other(e, TWIST_UP_OTHER, c->matrices, c->n_matrices);
    if (c->formula != FORMULA_GATE_UP) try_kind(e, TWIST_TRANSPOSED, 0, 0, transposed, "read as [n_in, n_out]");
    for (int by = -1; by <= 1; by += 2)
        try_kind(e, TWIST_WEIGHT_SHIFT, by, 0, "weight row off by one", "row o %+d of the matrix", by);
    for (size_t i = 0; i < sizeof tiles / sizeof tiles[0]; i++) {
        size_t tail = n % tiles[i];
        if (tail == 0) tail = tiles[i];
        if (tail < n)
            try_kind(e, TWIST_K_TAIL, (int)tail, 0, "K tail skipped", "the last %zu of %zu terms are missing", tail, n);
    }
    try_kind(e, TWIST_BF16_SUM, 1, 0, "accumulation in bf16", "the sum is rounded to bf16 after every term");
    try_kind(e, TWIST_BF16_SUM, 16, 0, "accumulation in bf16", "sixteen sums, each rounded to bf16 after every term");
    if (c->w->type == DTYPE_BF16)
        try_kind(e, TWIST_INPUT_UNROUNDED, 0, 0, "input not rounded", "f32 input where bf16 is due");
    else try_kind(e, TWIST_INPUT_ROUNDED, 0, 0, "input rounded", "to bf16, where the weights are no bf16");
    if (!dtype_info(c->w->type)->is_quantised) return;
    for (int by = -1; by <= 1; by += 2)
        try_kind(e, TWIST_BLOCK_SCALE, by, 0, "block scale of the neighbour", "the scale %s",
                 by < 0 ? "before" : "after");
    try_kind(e, TWIST_ZERO_POINT, 0, 0, "zero point ignored", "%s read without its offset",
             dtype_info(c->w->type)->name);
    try_kind(e, TWIST_NIBBLES, 0, 0, "nibbles swapped", "low and high half of each block of %s",
             dtype_info(c->w->type)->name);
    try_kind(e, TWIST_NIBBLES_PAIRED, 0, 0, "nibbles swapped", "neighbours in one byte, as %s does not pack",
             dtype_info(c->w->type)->name);
}

static void try_residual(struct explain *e) {
    try_kind(e, TWIST_RESIDUAL_LOST, 0, 0, "lost residual", "the projection replaced the residual stream");
    try_kind(e, TWIST_PROJECTION_LOST, 0, 0, "lost residual", "the projection was never added");
    try_kind(e, TWIST_RESIDUAL_TWICE, 0, 0, "residual added twice", "2 x + y");
    try_kind(e, TWIST_PROJECTION_TWICE, 0, 0, "residual added twice", "x + 2 y");
    try_kind(e, TWIST_SUBTRACTED, 0, 0, "residual subtracted", "x - y");
}

static void try_linear(struct explain *e) {
    const struct call *c = e->c;
    try_rows(e);
    try_norm(e);
    if (c->w) try_product(e);
    if (c->bias) {
        try_kind(e, TWIST_NO_BIAS, 0, 0, "bias left out", "the config asks for one");
        try_kind(e, TWIST_BIAS_TWICE, 0, 0, "bias added twice", "y + 2 b");
    }
    if (c->add) try_residual(e);
}

static void try_activation(struct explain *e) {
    try_kind(e, TWIST_GATE_UP_SWAPPED, 0, 0, "gate and up swapped", "silu(up) * gate");
    try_kind(e, TWIST_GELU_TANH, 0, 0, "silu replaced by gelu", "the tanh form");
    try_kind(e, TWIST_GELU_ERF, 0, 0, "silu replaced by gelu", "the erf form");
    try_kind(e, TWIST_RELU, 0, 0, "silu replaced by relu", "max(gate, 0) * up");
    try_kind(e, TWIST_SIGMOID, 0, 0, "silu without its factor", "sigmoid(gate) * up");
    try_kind(e, TWIST_NO_UP, 0, 0, "up left out", "silu(gate)");
    try_kind(e, TWIST_WRONG_HALF, 0, 0, "SwiGLU on the wrong half", "channels 2i and 2i + 1 of [gate, up]");
    try_kind(e, TWIST_SHIFT_HALF, 0, 0, "SwiGLU on the wrong half", "up of the channel half the width further");
    try_kind(e, TWIST_EXP_OVERFLOW, 0, 0, "silu overflows", "exp of a large gate");
}

static void try_rope(struct explain *e) {
    const struct call *c = e->c;
    static const double thetas[] = {1e4, 1e5, 5e5, 1e6, 5e6};
    try_kind(e, TWIST_INTERLEAVED, 0, 0, "RoPE pairing interleaved", "channels 2i and 2i + 1 instead of halves");
    for (size_t i = 0; i < sizeof thetas / sizeof thetas[0]; i++)
        if (fabs(thetas[i] - c->model->config.rope.theta) > 1)
            try_kind(e, TWIST_THETA, 0, thetas[i], thetas[i] < 10001 ? "RoPE theta 10,000" : "RoPE theta wrong",
                     "%g instead of %g", thetas[i], c->model->config.rope.theta);
    for (int by = -1; by <= 1; by += 2)
        try_kind(e, TWIST_POSITION, by, 0, "RoPE position off by one", "position %+d", by);
    try_kind(e, TWIST_POSITION_STEP, 0, 0, "RoPE position restarts at each chunk",
             "counted from the step's first token");
    try_kind(e, TWIST_POSITION_ROW, 0, 0, "RoPE position is the row", "the index in the batch, not in the sequence");
    try_kind(e, TWIST_HALF_DIMS, 0, 0, "RoPE on half of the dims", "the first half of each head alone");
    try_kind(e, TWIST_HALF_DIMS, 1, 0, "RoPE on half of the dims", "the first half of the pairs alone");
    try_kind(e, TWIST_HALF_WRITTEN, 0, 0, "only the rotated dims written", "the others keep what they held");
    try_kind(e, TWIST_ROPE_SKIPPED, 0, 0, "RoPE left out", "not rotated");
    try_kind(e, TWIST_ROPE_BACK, 0, 0, "RoPE turned back", "the sine's sign");
    try_kind(e, TWIST_ROPE_TWICE, 0, 0, "RoPE applied twice", "twice the angle");
    try_kind(e, TWIST_ROPE_BF16, 0, 0, "RoPE in bf16", "cosines and sines rounded to bf16");
}

static void try_heads(struct explain *e) {
    try_rows(e);
    try_norm(e);
    if (e->c->norm) try_kind(e, TWIST_NORM_TOKEN, 0, 0, "norm over all heads", "one mean for the whole row");
    if (e->c->norm && e->c->cos_sin)
        try_kind(e, TWIST_NORM_LATE, 0, 0, "norm after RoPE", "rotated first, then normalised");
    if (e->c->cos_sin) try_rope(e);
}

static void try_attention(struct explain *e) {
    const struct call *c = e->c;
    double d = (double)c->head_dim;
    try_rows(e);
    try_kind(e, TWIST_SCALE, 0, 1, "attention scale missing", "1 instead of 1 / sqrt(%g)", d);
    try_kind(e, TWIST_SCALE, 0, c->scale * c->scale, "attention scale squared or 1/head_dim", "1 / %g", d);
    try_kind(e, TWIST_SCALE, 0, 1 / c->scale, "attention scale inverted", "sqrt(%g)", d);
    try_kind(e, TWIST_SCALE, 0, 1 / sqrt(d * (double)c->n_heads), "attention scale of the width",
             "1 / sqrt(all heads' channels)");
    for (int by = -1; by <= 1; by += 2)
        try_kind(e, TWIST_MASK, by, 0, "causal mask off by one",
                 by < 0 ? "a token does not see itself" : "a token sees the one after it");
    try_kind(e, TWIST_NO_MASK, 0, 0, "no causal mask inside a chunk", "all tokens of the step are seen");
    try_kind(e, TWIST_PAGE_UP, 0, 0, "stale tail of a page read", "all slots of the last page are seen");
    try_kind(e, TWIST_ZERO_WEIGHT, 0, 0, "NaN from unused KV", "slots behind the last position count with weight 0");
    try_kind(e, TWIST_PAGE_DOWN, 0, 0, "last page's length wrong", "only whole pages are seen");
    for (size_t n = ATTN_BLOCK; n <= 4096; n *= 2) {
        try_kind(e, TWIST_PREFIX, 0, (double)n, "context cut", "only the first %zu positions are seen", n);
        try_kind(e, TWIST_WINDOW, 0, (double)n, "context cut", "only the last %zu positions are seen", n);
    }
    try_kind(e, TWIST_HEAD_MODULO, 0, 0, "GQA head mapping modulo", "KV head h %% %zu instead of h / %zu",
             c->n_kv_heads, c->n_heads / c->n_kv_heads);
    for (int by = -1; by <= 1 && c->n_kv_heads > 1; by += 2)
        try_kind(e, TWIST_HEAD_SHIFT, by, 0, "KV head off by one", "KV head %+d", by);
    try_kind(e, TWIST_HEAD_FIRST, 0, 0, "KV head 0 for all", "query heads are not grouped");
    try_kind(e, TWIST_KV_SWAPPED, 0, 0, "K and V swapped", "scores from V, values from K");
    try_kind(e, TWIST_V_IS_K, 0, 0, "K and V swapped", "values from K");
    try_kind(e, TWIST_NHD, 0, 0, "NHD read as HND", "pages read as [slot][head][channel]");
    try_kind(e, TWIST_PAGES_REVERSED, 0, 0, "page order permuted", "reversed");
    try_kind(e, TWIST_PAGES_ROTATED, 0, 0, "page order permuted", "one further, cyclic");
    try_kind(e, TWIST_PAGES_PLAIN, 0, 0, "page list ignored", "page i of the store for page i of the sequence");
    for (size_t by = 1; by < c->batch->n_seqs; by++)
        try_kind(e, TWIST_PAGES_OTHER, (int)by, 0, "another sequence's pages", "those of the sequence %zu further", by);
    for (int by = -1; by <= 1; by += 2)
        try_kind(e, TWIST_SLOT_SHIFT, by, 0, "slot off by one", "slot %+d of each page", by);
    try_kind(e, TWIST_NO_MAXIMUM, 0, 0, "softmax without maximum", "exp of the scores themselves overflows");
    try_kind(e, TWIST_P_BF16, 0, 0, "probabilities in bf16", "rounded before they meet V");
    try_kind(e, TWIST_BF16_SUM, 1, 0, "accumulation in bf16", "the sum of values is rounded after every term");
    try_kind(e, TWIST_NO_RESCALE, 0, 0, "blocks not rescaled", "their maxima are ignored when they are combined");
    try_kind(e, TWIST_LAST_BLOCK, 0, 0, "blocks not combined", "the last one alone counts");
    try_kind(e, TWIST_NO_DIVISION, 0, 0, "softmax not divided", "the sum of weights is left out");
}

static void try_embed(struct explain *e) {
    try_rows(e);
    for (int by = -1; by <= 1; by += 2)
        try_kind(e, TWIST_WEIGHT_SHIFT, by, 0, "embedding row off by one", "row id %+d", by);
    try_kind(e, TWIST_TRANSPOSED, 0, 0, "embedding transposed", "read as [hidden, n_vocab]");
    if (!dtype_info(e->c->w->type)->is_quantised) return;
    for (int by = -1; by <= 1; by += 2)
        try_kind(e, TWIST_BLOCK_SCALE, by, 0, "block scale of the neighbour", "the scale %s",
                 by < 0 ? "before" : "after");
    try_kind(e, TWIST_ZERO_POINT, 0, 0, "zero point ignored", "without the offset");
    try_kind(e, TWIST_NIBBLES, 0, 0, "nibbles swapped", "low and high half of each block");
    try_kind(e, TWIST_NIBBLES_PAIRED, 0, 0, "nibbles swapped", "neighbours in one byte");
}

// ---- What needs no formula -----------------------------------------------------------------------------------------

// Whether the faulty elements are exactly the last rows, or the last columns of every row.
static bool is_tail(const struct explain *e) {
    const struct call *c = e->c;
    const struct judgement *j = e->j;
    bool rows = j->row > 0 && j->n_faulty == (c->n_rows - j->row) * c->n_columns;
    bool columns = j->min_column > 0 && j->n_faulty == c->n_rows * (c->n_columns - j->min_column);
    return rows || columns;
}

// Elements that were never written. True: nothing else needs to be tried.
static bool try_unwritten(struct explain *e) {
    size_t poison = 0, zero = 0;
    for (size_t i = 0; i < e->n; i++) {
        if (!e->faulty[i]) continue;
        poison += is_poison((float)e->found[i]);
        zero += e->found[i] == 0;
    }
    const char *name = is_tail(e) ? "tile tail skipped" : "output not written";
    double n = (double)e->n_faulty;
    if (poison)
        add_candidate(e, name, "these elements hold what was there before the call", 1 - (double)poison / n, NULL);
    else if (zero) add_candidate(e, name, "these elements are zero", 1 - (double)zero / n, NULL);
    return poison == e->n_faulty;
}

// The same number added to a channel in every row: a bias.
static void try_offset(struct explain *e) {
    const struct call *c = e->c;
    if (c->formula != FORMULA_LINEAR || !c->w || e->g.n_rows < 3) return;
    memcpy(e->twisted, e->right, e->n * sizeof *e->twisted);
    for (size_t k = 0; k < e->g.n_columns; k++) {
        double sum = 0, n = 0;
        for (size_t r = 0; r < e->g.n_rows; r++) {
            size_t i = r * e->g.n_columns + k;
            if (!e->faulty[i] || !isfinite(e->found[i])) continue;
            sum += e->found[i] - e->right[i];
            n++;
        }
        for (size_t r = 0; r < e->g.n_rows && n >= 3; r++) e->twisted[r * e->g.n_columns + k] += sum / n;
    }
    add_candidate(e, c->bias ? "wrong bias" : "uninitialised bias",
                  "the same number was added to a channel in every row", fmin(1, 2 * remaining(e, e->twisted)), NULL);
}

static void try_factor(struct explain *e) {
    double above = 0, below = 0, hidden = (double)e->c->model->config.hidden;
    for (size_t i = 0; i < e->n; i++) {
        if (!e->faulty[i] || !isfinite(e->found[i])) continue;
        above += e->found[i] * e->right[i];
        below += e->right[i] * e->right[i];
    }
    if (!(below > 0) || e->n_faulty < 3 || above == 0) return;
    double factor = above / below;
    for (size_t i = 0; i < e->n; i++) e->twisted[i] = e->right[i] * factor;
    char detail[96];
    const char *of = fabs(factor * factor / hidden - 1) < 1e-3   ? " = sqrt(hidden)"
                     : fabs(factor * factor * hidden - 1) < 1e-3 ? " = 1 / sqrt(hidden)"
                                                                 : "";
    snprintf(detail, sizeof detail, "times %.6g%s", factor, of);
    add_candidate(e, e->c->formula == FORMULA_EMBED ? "embedding scaled" : "scaled", detail,
                  fmin(1, 2 * remaining(e, e->twisted)), NULL);
}

// ---- The verdict ---------------------------------------------------------------------------------------------------

// What speaks against a guess: the error that it leaves, and, less, the right values that it would change. (A mistake
// in one head or channel alone does change others' values when it is tried everywhere.)
static double against(const struct guess *g) {
    return g->remaining + 0.05 * g->contradiction;
}

static int by_merit(const void *a, const void *b) {
    double x = against(a), y = against(b);
    return x < y ? -1 : x > y;
}

// Confidence: the share of the error that the hypothesis explains, times its lead over the best one of another name,
// shared among those that explain as much, and less where only few numbers bear witness. Never certainty.
static size_t verdict(struct explain *e, struct diagnosis *out, size_t max) {
    size_t n = 0;
    qsort(e->list, e->n_candidates, sizeof e->list[0], by_merit); // ties share: their order does not matter
    for (size_t i = 0; i < e->n_candidates && n < max; i++) {
        const struct guess *c = &e->list[i];
        bool seen = false;
        for (size_t k = 0; k < i; k++) seen = seen || strcmp(e->list[k].name, c->name) == 0;
        if (seen) continue;
        double tied = 0, next = 1;
        for (size_t k = 0; k < e->n_candidates; k++) {
            bool first = true; // of its name
            for (size_t m = 0; m < k; m++) first = first && strcmp(e->list[m].name, e->list[k].name) != 0;
            if (!first) continue;
            double other = against(&e->list[k]);
            if (fabs(other - against(c)) < 1e-3) tied++;
            else if (other < next) next = other;
        }
        double own = fmax(0, against(c) - 0.05), lead = next > own ? (next - own) / (next + own) : 0;
        double witness = (double)e->n_faulty / ((double)e->n_faulty + 1);
        double confidence = fmin(0.99, (1 - c->remaining) * lead * witness / tied);
        if (confidence < 0.05) continue;
        out[n] = (struct diagnosis){.confidence = confidence};
        snprintf(out[n].name, sizeof out[n].name, "%s", c->name);
        snprintf(out[n].text, sizeof out[n].text, "%s; explains %.4g%% of the error in %zu faulty values", c->detail,
                 100 * (1 - c->remaining), e->n_faulty);
        n++;
    }
    return n;
}

static bool explain_open(struct explain *e, const struct call *c, const struct judgement *j) {
    e->c = c;
    e->j = j;
    e->g = (struct grid){j->rows, j->columns, j->n_rows, j->n_columns};
    e->n = j->n_rows * j->n_columns;
    e->right = size_alloc(e->n, sizeof *e->right);
    e->bound = size_alloc(e->n, sizeof *e->bound);
    e->twisted = size_alloc(e->n, sizeof *e->twisted);
    e->found = size_alloc(e->n, sizeof *e->found);
    e->faulty = size_alloc(e->n, sizeof *e->faulty);
    if (!e->right || !e->bound || !e->twisted || !e->found || !e->faulty) return false;
    if (!formula_evaluate(c, NULL, &e->g, e->right, e->bound)) return false;
    for (size_t i = 0; i < e->n; i++) {
        e->found[i] = (double)c->found[j->rows[i / j->n_columns] * c->n_columns + j->columns[i % j->n_columns]];
        e->faulty[i] = isfinite(e->right[i]) && !(fabs(e->found[i] - e->right[i]) <= e->bound[i]);
        e->n_faulty += e->faulty[i];
    }
    return e->n_faulty > 0;
}

size_t call_explain(const struct call *c, const struct judgement *j, struct diagnosis *out, size_t max) {
    struct explain *e = size_alloc_zero(1, sizeof *e);
    size_t n = 0;
    if (e && explain_open(e, c, j)) {
        if (!try_unwritten(e)) {
            switch (c->formula) {
            case FORMULA_EMBED: try_embed(e); break;
            case FORMULA_LINEAR: try_linear(e); break;
            case FORMULA_GATE_UP:
                try_rows(e);
                try_norm(e);
                try_product(e);
                try_activation(e);
                break;
            case FORMULA_HEADS: try_heads(e); break;
            case FORMULA_SILU:
                try_rows(e);
                try_activation(e);
                break;
            case FORMULA_ADD:
                try_rows(e);
                try_residual(e);
                break;
            case FORMULA_ATTENTION: try_attention(e); break;
            }
            try_offset(e);
            try_factor(e);
        }
        n = verdict(e, out, max);
    }
    if (e) {
        free(e->right);
        free(e->bound);
        free(e->twisted);
        free(e->found);
        free(e->faulty);
    }
    free(e);
    return n;
}
