// stage_ops_judge.c: the results of primitives against T, each fed what the run itself fed it. Two rules for each
// value:
// - within the bound that follows from the rounding points and sum orders that ops.h states (T then gets the input as
//   the op rounds it), which is what a correct op cannot miss and most mistakes do;
// - a row's RMS error at most twice that of Hugging Face's rounding points, against plain T (DESIGN.md section 3).
#include "doctor/stage_ops.h"

#include "base/size.h"
#include "format/groups.h"
#include "model/oracle.h"
#include "ops/kv_page.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const double unit = 0x1p-24;  // unit roundoff of f32
static const double tiny = 0x1p-140; // well above f32's subnormal steps, well below all that matters

struct judge {
    const struct doctor *d;
    const struct model_config *config;
    struct pool *pool;
    const struct capture *run;
    const struct op_case *c; // NULL for the head
    const int32_t *head_rows;
    int layer;
    struct stage_report *r;
    struct judgement *j;
    struct arena arena; // of one op's arrays
    struct error *err;
};

// One op's answer key: [n_rows, columns] each, but for `found`, which is the run's.
struct answers {
    enum segment seg;
    const char *op; // primitive
    size_t n_rows, columns;
    const size_t *rows; // [n_rows] which rows of the run; NULL: all
    double *strict;     // T, fed what the op multiplies
    double *plain;      // T, fed the op's input (may be strict)
    double *h;          // H; NULL: no yardstick
    double *bound;      // of |found - strict|
};

static double *doubles(struct judge *g, size_t rows, size_t columns) {
    size_t n;
    double *p = size_mul(rows, columns, &n) ? arena_alloc(&g->arena, n, sizeof *p) : NULL;
    if (!p) error_set(g->err, "out of memory to judge %zu rows", rows);
    return p;
}

static size_t run_row(const struct answers *a, size_t i) {
    return a->rows ? a->rows[i] : i;
}

static int position_of(const struct judge *g, size_t row) {
    return g->c ? case_position(g->c, row) : g->head_rows[row];
}

// The run's rows as f64.
static double *widen(struct judge *g, const float *from, size_t columns, const size_t *rows, size_t n_rows) {
    double *to = doubles(g, n_rows, columns);
    for (size_t i = 0; to && i < n_rows; i++) {
        const float *row = from + (rows ? rows[i] : i) * columns;
        for (size_t k = 0; k < columns; k++) to[i * columns + k] = (double)row[k];
    }
    return to;
}

static void value_fault(struct judge *g, const struct answers *a, size_t row, size_t column, double found) {
    char check[128];
    size_t at = row * a->columns + column;
    snprintf(check, sizeof check, "%s against T", a->op);
    struct fault *f = segment_fault(g->r, FAULT_OP, check, g->config, g->layer, a->seg, position_of(g, run_row(a, row)),
                                    column, a->strict[at], found);
    snprintf(f->op, sizeof f->op, "%s", a->op);
    snprintf(f->variant, sizeof f->variant, "%s", g->c ? g->c->name : "");
    fault_say(f, "%s: %s [%zu, %zu] is %.9g, T says %.9g: off by %.3g, where rounding allows %.3g", f->tensor, a->op,
              run_row(a, row), column, found, a->strict[at], fabs(found - a->strict[at]), a->bound[at]);
}

static void row_fault(struct judge *g, const struct answers *a, size_t row, double ours, double theirs) {
    char check[128];
    snprintf(check, sizeof check, "%s: error at most twice H's", a->op);
    struct fault *f = segment_fault(g->r, FAULT_OP, check, g->config, g->layer, a->seg, position_of(g, run_row(a, row)),
                                    0, theirs, ours);
    f->channel = f->head = -1;
    snprintf(f->op, sizeof f->op, "%s", a->op);
    fault_say(f, "%s: row %zu of %s has an RMS error of %.3g against T, Hugging Face's rounding has %.3g", f->tensor,
              run_row(a, row), a->op, ours, theirs);
}

// Judges one row: false when it is wrong.
static bool judge_row(struct judge *g, const struct answers *a, size_t i) {
    const float *found = g->run->seg[a->seg] + run_row(a, i) * a->columns;
    double ours = 0, theirs = 0, floor = 0, size = 0;
    for (size_t k = 0; k < a->columns; k++) {
        size_t at = i * a->columns + k;
        if (isnan(a->strict[at]) && isnan(found[k])) continue; // the op was fed NaN: what made it has its own fault
        double off = fabs((double)found[k] - a->strict[at]);
        if (!(off <= a->bound[at])) {
            value_fault(g, a, i, k, (double)found[k]);
            return false;
        }
        if (off > g->j->worst_of_bound * a->bound[at]) g->j->worst_of_bound = off / a->bound[at];
        double e = (double)found[k] - a->plain[at];
        ours += e * e;
        floor += a->bound[at] * a->bound[at];
        size += a->plain[at] * a->plain[at];
        if (a->h) theirs += (a->h[at] - a->plain[at]) * (a->h[at] - a->plain[at]);
    }
    g->j->n_values += a->columns;
    ours = sqrt(ours), theirs = sqrt(theirs), floor = sqrt(floor);
    if (a->plain != a->strict && !a->h && size > 0 && ours / sqrt(size) > g->j->quantised_cost)
        g->j->quantised_cost = ours / sqrt(size);
    if (!a->h) return true;
    if (!(ours <= 2 * theirs + floor)) {
        row_fault(g, a, i, ours, theirs);
        return false;
    }
    if (theirs > 8 * floor && ours > g->j->worst_of_h * theirs) {
        g->j->worst_of_h = ours / theirs;
        if (g->layer >= 0) snprintf(g->j->where, sizeof g->j->where, "%s, layer %d", a->op, g->layer);
        else snprintf(g->j->where, sizeof g->j->where, "%s, head", a->op);
    }
    return true;
}

// The first wrong row is enough of one op.
static void judge_answers(struct judge *g, const struct answers *a) {
    bool right = true;
    for (size_t i = 0; i < a->n_rows && right; i++) {
        g->r->n_checks++;
        right = judge_row(g, a, i);
    }
    arena_free(&g->arena);
}

// ---- Norms ---------------------------------------------------------------------------------------------------------

// Rows of n_heads heads with one weight [n]; n_heads 1: rmsnorm.
static bool judge_norm(struct judge *g, enum segment seg, const float *x, const float *w, size_t n_rows, size_t n_heads,
                       size_t n) {
    struct answers a = {.seg = seg, .op = segment_infos[seg].primitive, .n_rows = n_rows, .columns = n_heads * n};
    double *in = widen(g, x, a.columns, NULL, n_rows), eps = (double)(float)g->config->rms_eps;
    a.strict = a.plain = doubles(g, n_rows, a.columns);
    a.h = doubles(g, n_rows, a.columns);
    a.bound = doubles(g, n_rows, a.columns);
    if (!in || !a.strict || !a.h || !a.bound) return false;
    oracle_rmsnorm(ORACLE_T, g->pool, a.strict, in, w, eps, n_rows * n_heads, n);
    oracle_rmsnorm(ORACLE_H, g->pool, a.h, in, w, eps, n_rows * n_heads, n);
    // Half of the sum's error (n / 16 + 4 roundings in each lane's chain, all terms positive), the mean, the root, the
    // division and two products.
    double relative = ((double)n / 32 + 12) * unit;
    for (size_t i = 0; i < n_rows * a.columns; i++)
        a.bound[i] = fabs(a.strict[i]) * relative + tiny * (1 + fabs((double)w[i % n]));
    judge_answers(g, &a);
    return true;
}

// ---- Products ------------------------------------------------------------------------------------------------------

// Each weight row's norm, for bounds; with minima, that of |scale u| + |min|, which is what is summed.
struct norms_job {
    struct judge *g;
    const struct matrix *w;
    double *norms;
    double *rows;     // [n_threads, n_in]
    int8_t *integers; // [n_threads, n_in]
    float *groups;    // [n_threads, 2 * n_in / group length]
};

static double quantised_norm(const struct norms_job *j, size_t row, size_t thread) {
    const struct matrix *w = j->w;
    size_t len = dtype_group_len(w->type), n_groups = w->n_in / len;
    int8_t *q = j->integers + thread * w->n_in;
    float *scale = j->groups + thread * 2 * n_groups, *min = scale + n_groups;
    double squares = 0;
    dtype_to_groups(w->type, (const unsigned char *)w->data + row * w->row_bytes, q, scale, min, w->n_in);
    for (size_t i = 0; i < w->n_in; i++) {
        double part = fabs((double)scale[i / len] * q[i]);
        if (dtype_has_min(w->type)) part += fabs((double)min[i / len]);
        squares += part * part;
    }
    return sqrt(squares);
}

static void norm_rows(void *user, size_t begin, size_t end, int thread) {
    const struct norms_job *j = user;
    size_t n = j->w->n_in;
    double *row = j->rows + (size_t)thread * n;
    for (size_t o = begin; o < end; o++) {
        if (dtype_info(j->w->type)->is_quantised) {
            j->norms[o] = quantised_norm(j, o, (size_t)thread);
            continue;
        }
        double squares = 0;
        bool ok = oracle_row(j->w, o, row, NULL);
        for (size_t i = 0; i < n; i++) squares += row[i] * row[i];
        j->norms[o] = ok ? sqrt(squares) : 0;
    }
}

static bool row_norms(struct judge *g, const struct matrix *w, double *norms) {
    size_t n_threads = (size_t)pool_size(g->pool);
    struct norms_job j = {.g = g, .w = w, .norms = norms, .rows = doubles(g, n_threads, w->n_in)};
    j.integers = arena_alloc(&g->arena, n_threads * w->n_in, 1);
    j.groups = arena_alloc(&g->arena, n_threads * (w->n_in / 8 + 1), sizeof *j.groups);
    if (!j.rows || !j.integers || !j.groups) return error_set(g->err, "out of memory for the norms of %s", w->name);
    pool_for(g->pool, w->n_out, 32, norm_rows, &j);
    return true;
}

// seg = x w^T + bias, for the chosen rows.
static bool judge_product(struct judge *g, enum segment seg, const float *x, const struct matrix *w, const float *bias,
                          const size_t *rows, size_t n_rows) {
    struct answers a = {.seg = seg, .op = "matmul", .n_rows = n_rows, .columns = w->n_out, .rows = rows};
    enum dtype rule = ops_input_rule(g->d->ops, w->type);
    bool quantised = dtype_info(w->type)->is_quantised, to_int8 = ops_rounds_to_int8(rule);
    bool rounds = dtype_info(rule)->is_quantised || rule == DTYPE_BF16;
    double *in = widen(g, x, w->n_in, rows, n_rows), *rounded = doubles(g, n_rows, w->n_in);
    double *norms = doubles(g, 1, w->n_out);
    a.strict = doubles(g, n_rows, w->n_out);
    a.plain = rounds ? doubles(g, n_rows, w->n_out) : a.strict;
    // What int8 inputs cost is told, not judged: H does not round to int8.
    a.h = to_int8 ? NULL : doubles(g, n_rows, w->n_out);
    a.bound = doubles(g, n_rows, w->n_out);
    if (!in || !rounded || !norms || !a.strict || !a.plain || (!to_int8 && !a.h) || !a.bound || !row_norms(g, w, norms))
        return false;
    for (size_t i = 0; i < n_rows; i++)
        ops_round_activation(rule, x + (rows ? rows[i] : i) * w->n_in, rounded + i * w->n_in, w->n_in);
    if (!oracle_linear(ORACLE_T, g->pool, a.strict, rounded, w, bias, n_rows, g->err) ||
        (rounds && !oracle_linear(ORACLE_T, g->pool, a.plain, in, w, bias, n_rows, g->err)) ||
        (a.h && !oracle_linear(ORACLE_H, g->pool, a.h, in, w, bias, n_rows, g->err)))
        return false;
    // A chain of n / 16 terms and the tree, or of two terms for each group of at least 16, against the sum of the
    // terms' sizes, which Cauchy and Schwarz bound.
    double chain = ((double)w->n_in / (quantised ? 8 : 16) + 8) * unit;
    for (size_t i = 0; i < n_rows; i++) {
        double squares = 0;
        for (size_t k = 0; k < w->n_in; k++) squares += rounded[i * w->n_in + k] * rounded[i * w->n_in + k];
        for (size_t o = 0; o < w->n_out; o++) {
            double y = a.strict[i * w->n_out + o], b = bias ? fabs((double)bias[o]) : 0;
            a.bound[i * w->n_out + o] = chain * sqrt(squares) * norms[o] + 2 * unit * (fabs(y) + b) + tiny;
        }
    }
    judge_answers(g, &a);
    return true;
}

// ---- RoPE and the KV -----------------------------------------------------------------------------------------------

static bool judge_rope(struct judge *g, enum segment seg, const float *x, size_t n_heads) {
    size_t hd = g->config->head_dim, n_rows = g->run->n_rows;
    struct answers a = {.seg = seg, .op = "rope", .n_rows = n_rows, .columns = n_heads * hd};
    double *in = widen(g, x, a.columns, NULL, n_rows), *rates = doubles(g, 2, hd / 2), magnitude, h_magnitude;
    int32_t *position = arena_alloc(&g->arena, n_rows, sizeof *position);
    a.strict = a.plain = doubles(g, n_rows, a.columns);
    a.h = doubles(g, n_rows, a.columns);
    a.bound = doubles(g, n_rows, a.columns);
    if (!in || !rates || !position || !a.strict || !a.h || !a.bound) return false;
    for (size_t i = 0; i < n_rows; i++) position[i] = case_position(g->c, i);
    if (!oracle_rope_rates(ORACLE_T, g->d->model, rates, &magnitude, g->err) ||
        !oracle_rope_rates(ORACLE_H, g->d->model, rates + hd / 2, &h_magnitude, g->err))
        return false;
    oracle_rope(ORACLE_T, g->pool, a.strict, in, rates, magnitude, position, n_rows, n_heads, hd);
    oracle_rope(ORACLE_H, g->pool, a.h, in, rates + hd / 2, h_magnitude, position, n_rows, n_heads, hd);
    for (size_t i = 0; i < n_rows * a.columns; i++) {
        size_t pair = i % hd < hd / 2 ? i + hd / 2 : i - hd / 2;
        a.bound[i] = 4 * unit * magnitude * (fabs(in[i]) + fabs(in[pair])) + tiny;
    }
    judge_answers(g, &a);
    return true;
}

// K and V are rounded once: exactly.
static bool judge_store(struct judge *g, enum segment seg, const float *x) {
    size_t n_rows = g->run->n_rows;
    struct answers a = {.seg = seg, .op = "kv_store", .n_rows = n_rows, .columns = segment_columns(g->config, seg)};
    a.strict = a.plain = doubles(g, n_rows, a.columns);
    a.bound = doubles(g, n_rows, a.columns);
    float *row = arena_alloc(&g->arena, a.columns, sizeof *row);
    if (!a.strict || !a.bound) return false;
    if (!row) return error_set(g->err, "out of memory to judge %zu rows", n_rows);
    for (size_t i = 0; i < n_rows * a.columns; i++) {
        if (i % a.columns == 0) kv_as_stored(g->d->kv_type, x + i, row, a.columns);
        a.strict[i] = (double)row[i % a.columns];
        a.bound[i] = 0;
    }
    judge_answers(g, &a);
    return true;
}

// ---- Attention -----------------------------------------------------------------------------------------------------

static double norm2(const double *v, size_t n) {
    double squares = 0;
    for (size_t i = 0; i < n; i++) squares += v[i] * v[i];
    return sqrt(squares);
}

static double sum_of_sizes(const double *v, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += fabs(v[i]);
    return sum;
}

// The bound of one sequence's results. A score's error d moves every probability by a factor of at most exp(2 d); then
// come the sums over blocks of positions and their combination. A GPU rounds probabilities to bf16s, and with K and V
// of Q8_0 the CPU rounds q and them to integers, whose error goes by the largest of them (kv_page.h).
static void attention_bound(const struct judge *g, const struct oracle_attention *o, double *bound) {
    size_t hd = o->head_dim, group = o->n_heads / o->n_kv_heads, kv = o->n_kv_heads * hd;
    size_t block = g->c->d->ops->attn_block;
    bool on_device = g->c->d->ops->device != NULL;
    enum dtype type = on_device ? DTYPE_BF16 : g->c->d->kv_type;
    double rounded_p = on_device ? KV_DEVICE_ROUNDED_P : 0;
    for (size_t t = 0; t < o->n_tokens; t++)
        for (size_t h = 0; h < o->n_heads; h++) {
            size_t from = h / group * hd;
            double longest = 0, q = norm2(o->q + (t * o->n_heads + h) * hd, hd), most_q = 0, most_sum = 0;
            double *out = bound + (t * o->n_heads + h) * hd;
            for (size_t c = 0; c < hd; c++)
                out[c] = 0, most_q = fmax(most_q, fabs(o->q[(t * o->n_heads + h) * hd + c]));
            for (int32_t j = 0; j <= o->position[t]; j++) {
                const double *v = o->v + (size_t)j * kv + from;
                double k = norm2(o->k + (size_t)j * kv + from, hd);
                longest = k > longest ? k : longest;
                most_sum = fmax(most_sum, sum_of_sizes(o->k + (size_t)j * kv + from, hd));
                for (size_t c = 0; c < hd; c++) out[c] = fabs(v[c]) > out[c] ? fabs(v[c]) : out[c];
            }
            double score = ((double)hd / 16 + 8) * unit * q * longest / sqrt((double)hd);
            if (on_device) score += kv_device_score_slack(hd, q, longest) / sqrt((double)hd);
            score += kv_score_slack(type, most_q, most_sum) / sqrt((double)hd);
            double n_blocks = (double)((size_t)o->position[t] / block + 1);
            double relative =
                expm1(2 * (2 * score + 4 * unit)) + (2 * n_blocks + 2 * (double)block + 16) * unit + rounded_p;
            for (size_t c = 0, end; c < hd; c = end) { // channels that share a scale
                double largest = 0;
                end = c + 32 < hd ? c + 32 : hd;
                for (size_t i = c; i < end; i++) largest = fmax(largest, out[i]);
                for (size_t i = c; i < end; i++) out[i] = out[i] * relative + kv_value_slack(type, largest) + tiny;
            }
        }
}

// K and V of one sequence, its past and what this step stored, as f64.
static void gather_kv(const struct judge *g, const struct op_sequence *s, size_t first_row, bool of_v, double *out) {
    size_t width = g->config->n_kv_heads * g->config->head_dim;
    const float *past = of_v ? s->past_v : s->past_k;
    const float *own = g->run->seg[of_v ? SEG_KV_V : SEG_KV_K] + first_row * width;
    for (size_t i = 0; i < s->past * width; i++) out[i] = (double)past[i];
    for (size_t i = 0; i < s->n * width; i++) out[s->past * width + i] = (double)own[i];
}

static bool judge_attention(struct judge *g) {
    size_t hd = g->config->head_dim, q_width = g->config->n_heads * hd, kv = g->config->n_kv_heads * hd;
    struct answers a = {.seg = SEG_ATTN, .op = "attention", .n_rows = g->run->n_rows, .columns = q_width};
    double *q = widen(g, g->run->seg[SEG_Q_ROPE], q_width, NULL, a.n_rows);
    bool on_device = g->c->d->ops->device != NULL;
    double *rounded = on_device ? widen(g, g->run->seg[SEG_Q_ROPE], q_width, NULL, a.n_rows) : q;
    a.strict = doubles(g, a.n_rows, q_width);
    a.plain = on_device ? doubles(g, a.n_rows, q_width) : a.strict;
    a.h = doubles(g, a.n_rows, q_width);
    a.bound = doubles(g, a.n_rows, q_width);
    if (!q || !rounded || !a.strict || !a.plain || !a.h || !a.bound) return false;
    for (size_t i = 0; on_device && i < a.n_rows * q_width; i++)
        rounded[i] = kv_device_q(q[i], (float)(1 / sqrt((double)hd)));
    size_t row = 0;
    for (size_t s = 0; s < g->c->n_seqs; s++) {
        const struct op_sequence *seq = &g->c->seqs[s];
        size_t n_positions = seq->past + seq->n;
        double *k = doubles(g, n_positions, kv), *v = doubles(g, n_positions, kv);
        int32_t *position = arena_alloc(&g->arena, seq->n, sizeof *position);
        if (!k || !v || !position) return false;
        gather_kv(g, seq, row, false, k);
        gather_kv(g, seq, row, true, v);
        for (size_t i = 0; i < seq->n; i++) position[i] = (int32_t)(seq->past + i);
        struct oracle_attention o = {.q = q + row * q_width,
                                     .k = k,
                                     .v = v,
                                     .position = position,
                                     .n_tokens = seq->n,
                                     .n_positions = n_positions,
                                     .n_heads = g->config->n_heads,
                                     .n_kv_heads = g->config->n_kv_heads,
                                     .head_dim = hd};
        if ((on_device && !oracle_attention(ORACLE_T, g->pool, a.plain + row * q_width, &o, g->err)) ||
            !oracle_attention(ORACLE_H, g->pool, a.h + row * q_width, &o, g->err))
            return false;
        o.q = rounded + row * q_width;
        if (!oracle_attention(ORACLE_T, g->pool, a.strict + row * q_width, &o, g->err)) return false;
        attention_bound(g, &o, a.bound + row * q_width);
        row += seq->n;
    }
    judge_answers(g, &a);
    return true;
}

// ---- Pointwise -----------------------------------------------------------------------------------------------------

static bool judge_add(struct judge *g, enum segment seg, const float *x, const float *y) {
    struct answers a = {.seg = seg, .op = "add", .n_rows = g->run->n_rows, .columns = g->config->hidden};
    a.strict = a.plain = widen(g, x, a.columns, NULL, a.n_rows);
    double *h = a.h = widen(g, x, a.columns, NULL, a.n_rows), *in = widen(g, y, a.columns, NULL, a.n_rows);
    a.bound = doubles(g, a.n_rows, a.columns);
    if (!a.strict || !h || !in || !a.bound) return false;
    oracle_add(ORACLE_T, g->pool, a.strict, in, a.n_rows * a.columns);
    oracle_add(ORACLE_H, g->pool, h, in, a.n_rows * a.columns);
    for (size_t i = 0; i < a.n_rows * a.columns; i++) a.bound[i] = 1.01 * unit * fabs(a.strict[i]);
    judge_answers(g, &a);
    return true;
}

static bool judge_silu_mul(struct judge *g) {
    struct answers a = {.seg = SEG_ACT, .op = "silu_mul", .n_rows = g->run->n_rows, .columns = g->config->n_ff};
    double *gate = widen(g, g->run->seg[SEG_GATE], a.columns, NULL, a.n_rows);
    double *up = widen(g, g->run->seg[SEG_UP], a.columns, NULL, a.n_rows);
    a.strict = a.plain = doubles(g, a.n_rows, a.columns);
    a.h = doubles(g, a.n_rows, a.columns);
    a.bound = doubles(g, a.n_rows, a.columns);
    if (!gate || !up || !a.strict || !a.h || !a.bound) return false;
    oracle_silu_mul(ORACLE_T, g->pool, a.strict, gate, up, a.n_rows * a.columns);
    oracle_silu_mul(ORACLE_H, g->pool, a.h, gate, up, a.n_rows * a.columns);
    // exp32's ulp, a sum, a division, a product; silu is 0 where exp(-g) leaves f32 (docs/NUMERICS.md). A GPU's e^x is
    // 2^(x log2 e): the rounding of the constant and of the product is that of a number of x's size; its reciprocal is
    // off by an ulp, and 0 where it would be subnormal.
    for (size_t i = 0; i < a.n_rows * a.columns; i++) {
        bool on_device = g->c->d->ops->device != NULL;
        double roundings = on_device ? 10 + 3 * fabs(gate[i]) : 8, least = on_device ? 1.1e-36 : 3e-37;
        a.bound[i] = roundings * unit * fabs(a.strict[i]) + least * fabs(up[i]) + tiny;
    }
    judge_answers(g, &a);
    return true;
}

// ---- Whole cases ---------------------------------------------------------------------------------------------------

static bool judge_attention_block(struct judge *g, const size_t *rows, size_t n_rows) {
    const struct layer_weights *w = g->c->weights;
    const struct capture *run = g->run;
    const struct model_config *c = g->config;
    const float *q = run->seg[SEG_Q], *k = run->seg[SEG_K];
    if (!judge_norm(g, SEG_ATTN_NORM, g->c->x, w->attn_norm, run->n_rows, 1, c->hidden) ||
        !judge_product(g, SEG_Q, run->seg[SEG_ATTN_NORM], &w->wq, w->bq, rows, n_rows) ||
        !judge_product(g, SEG_K, run->seg[SEG_ATTN_NORM], &w->wk, w->bk, rows, n_rows) ||
        !judge_product(g, SEG_V, run->seg[SEG_ATTN_NORM], &w->wv, w->bv, rows, n_rows))
        return false;
    if (w->q_norm) {
        if (!judge_norm(g, SEG_Q_NORM, q, w->q_norm, run->n_rows, c->n_heads, c->head_dim) ||
            !judge_norm(g, SEG_K_NORM, k, w->k_norm, run->n_rows, c->n_kv_heads, c->head_dim))
            return false;
        q = run->seg[SEG_Q_NORM];
        k = run->seg[SEG_K_NORM];
    }
    return judge_rope(g, SEG_Q_ROPE, q, c->n_heads) && judge_rope(g, SEG_K_ROPE, k, c->n_kv_heads) &&
           judge_store(g, SEG_KV_K, run->seg[SEG_K_ROPE]) && judge_store(g, SEG_KV_V, run->seg[SEG_V]) &&
           judge_attention(g) && judge_product(g, SEG_ATTN_OUT, run->seg[SEG_ATTN], &w->wo, NULL, rows, n_rows) &&
           judge_add(g, SEG_RESID_MID, g->c->x, run->seg[SEG_ATTN_OUT]);
}

static bool judge_mlp_block(struct judge *g, const size_t *rows, size_t n_rows) {
    const struct layer_weights *w = g->c->weights;
    const struct capture *run = g->run;
    return judge_norm(g, SEG_MLP_NORM, run->seg[SEG_RESID_MID], w->mlp_norm, run->n_rows, 1, g->config->hidden) &&
           judge_product(g, SEG_GATE, run->seg[SEG_MLP_NORM], &w->w_gate, NULL, rows, n_rows) &&
           judge_product(g, SEG_UP, run->seg[SEG_MLP_NORM], &w->w_up, NULL, rows, n_rows) && judge_silu_mul(g) &&
           judge_product(g, SEG_MLP_OUT, run->seg[SEG_ACT], &w->w_down, NULL, rows, n_rows) &&
           judge_add(g, SEG_RESID, run->seg[SEG_RESID_MID], run->seg[SEG_MLP_OUT]);
}

bool judge_layer(const struct op_case *c, const struct capture *run, const size_t *rows, size_t n_rows,
                 struct stage_report *r, struct judgement *j, struct error *err) {
    struct judge g = {.d = c->d,
                      .config = &c->d->model->config,
                      .pool = c->d->pool,
                      .run = run,
                      .c = c,
                      .layer = c->layer,
                      .r = r,
                      .j = j,
                      .err = err};
    bool ok = judge_attention_block(&g, rows, n_rows) && judge_mlp_block(&g, rows, n_rows);
    arena_free(&g.arena);
    return ok;
}

bool judge_head(const struct head_case *c, const struct capture *run, struct stage_report *r, struct judgement *j,
                struct error *err) {
    const struct model *m = c->d->model;
    struct judge g = {.d = c->d,
                      .config = &m->config,
                      .pool = c->d->pool,
                      .run = run,
                      .head_rows = c->rows,
                      .layer = -1,
                      .r = r,
                      .j = j,
                      .err = err};
    size_t hidden = m->config.hidden;
    float *x = size_alloc(c->n_rows * hidden, sizeof *x);
    if (!x) return error_set(err, "out of memory");
    for (size_t i = 0; i < c->n_rows; i++)
        memcpy(x + i * hidden, c->x + (size_t)c->rows[i] * hidden, hidden * sizeof *x);
    bool ok = judge_norm(&g, SEG_FINAL_NORM, x, m->final_norm, c->n_rows, 1, hidden) &&
              judge_product(&g, SEG_LOGITS, run->seg[SEG_FINAL_NORM], &m->head, NULL, NULL, c->n_rows);
    arena_free(&g.arena);
    free(x);
    return ok;
}
