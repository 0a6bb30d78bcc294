// hypotheses_attention.c: the formulas of what happens to heads, right and wrong, in f64: norm and rope of q and k, and
// attention over pages.
#include "doctor/hypotheses.h"

#include "base/size.h"
#include "model/oracle.h"
#include "ops/kv_page.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define U 0x1p-24

enum { MOST_HEAD_DIM = 512 };

static double bf16(double v) {
    return (double)bf16_to_f32(bf16_from_f32((float)v));
}

// ---- Norm and rope of heads ----------------------------------------------------------------------------------------

// One head on its way: n values and how far f32 may be away from each.
struct head {
    double v[MOST_HEAD_DIM], slack[MOST_HEAD_DIM];
    size_t n;
};

static void head_norm(const struct call *c, const struct twist *t, size_t row, struct head *h) {
    double sum = 0, mean = 0, eps = t->kind == TWIST_EPS ? t->value : (double)c->eps;
    const float *w = t->kind == TWIST_NORM_OTHER ? t->other->vector : c->norm;
    size_t n = h->n;
    if (t->kind == TWIST_NORM_CENTRED) {
        for (size_t i = 0; i < n; i++) mean += h->v[i];
        mean /= (double)n;
    }
    for (size_t i = 0; i < n; i++) sum += (h->v[i] - mean) * (h->v[i] - mean);
    if (t->kind == TWIST_NORM_TOKEN) { // of all heads together
        sum = 0;
        for (size_t i = 0; i < c->n_columns; i++)
            sum += (double)c->x[row * c->n_columns + i] * (double)c->x[row * c->n_columns + i];
        n = c->n_columns;
    }
    if (t->kind != TWIST_NORM_SUM) sum /= (double)n;
    double r = 1 / sqrt(sum + eps);
    for (size_t i = 0; i < h->n; i++) {
        double v = (h->v[i] - mean) * r, weight = (double)w[i];
        if (t->kind == TWIST_NORM_ORDER) v = bf16(v);
        if (t->kind == TWIST_NORM_PLUS_1) weight += 1;
        if (t->kind == TWIST_NORM_BARE) weight = 1;
        h->v[i] = t->kind == TWIST_NORM_ORDER ? bf16(v * weight) : v * weight;
        h->slack[i] += fabs(h->v[i]) * ((double)h->n / 16 + 12) * U + FLT_MIN;
    }
}

// The cosine and sine of a pair under a twist; false when the twist leaves the given table alone.
static bool twisted_angle(const struct call *c, const struct twist *t, const double *rates, double magnitude,
                          size_t row, size_t pair, double *cosine, double *sine) {
    if (!c->batch) return false;
    double position = (double)c->batch->position[row], rate = rates[pair];
    size_t first = (size_t)c->batch->seq_start[c->batch->seq[row]];
    switch (t->kind) {
    case TWIST_THETA: rate = pow(t->value, -2.0 * (double)pair / (double)c->head_dim); break;
    case TWIST_POSITION: position += t->arg; break;
    case TWIST_POSITION_STEP: position = (double)(row - first); break;
    case TWIST_POSITION_ROW: position = (double)row; break;
    default: return false;
    }
    *cosine = cos(position * rate) * magnitude;
    *sine = sin(position * rate) * magnitude;
    return true;
}

static void head_rope(const struct call *c, const struct twist *t, const double *rates, double magnitude, size_t row,
                      struct head *h) {
    size_t half = c->head_dim / 2, turned = t->kind == TWIST_HALF_DIMS ? half / 2 : half;
    const float *table = c->cos_sin + row * c->head_dim;
    struct head in = *h;
    if (t->kind == TWIST_ROPE_SKIPPED) return;
    for (size_t i = 0; i < turned; i++) {
        size_t lo = i, hi = i + half;
        if (t->kind == TWIST_INTERLEAVED) lo = 2 * i, hi = 2 * i + 1;
        double cosine = (double)table[i], sine = (double)table[half + i];
        if (t->kind == TWIST_HALF_DIMS) {
            // Rotary over the first half of the channels: pairs i and i + half / 2.
            hi = i + turned;
            cosine = (double)table[2 * i], sine = (double)table[half + 2 * i];
            if (t->arg == 1) hi = i + half, cosine = (double)table[i], sine = (double)table[half + i];
        }
        twisted_angle(c, t, rates, magnitude, row, i, &cosine, &sine);
        if (t->kind == TWIST_ROPE_BF16) cosine = bf16(cosine), sine = bf16(sine);
        if (t->kind == TWIST_ROPE_BACK) sine = -sine;
        if (t->kind == TWIST_ROPE_TWICE) {
            double twice = 2 * cosine * sine;
            cosine = cosine * cosine - sine * sine;
            sine = twice;
        }
        double a = in.v[lo], b = in.v[hi];
        h->v[lo] = a * cosine - b * sine;
        h->v[hi] = b * cosine + a * sine;
        double size = fabs(a * cosine) + fabs(b * sine) + fabs(b * cosine) + fabs(a * sine);
        h->slack[lo] = h->slack[hi] = 2 * U * size + in.slack[lo] + in.slack[hi] + FLT_MIN;
    }
}

bool formula_heads(const struct call *c, const struct twist *t, const struct grid *g, double *want, double *bound) {
    double rates[MOST_HEAD_DIM / 2], magnitude = 1;
    struct head h;
    if (c->head_dim == 0 || c->head_dim > MOST_HEAD_DIM) return false;
    if (c->cos_sin && !oracle_rope_rates(ORACLE_T, c->model, rates, &magnitude, NULL)) return false;
    for (size_t r = 0; r < g->n_rows; r++) {
        size_t row = g->rows[r], from = row, held = SIZE_MAX;
        if (t->kind == TWIST_ROW_SHIFT) from = (row + (size_t)(t->arg + (int)c->n_rows)) % c->n_rows;
        if (t->kind == TWIST_ROW_FIRST) from = 0;
        for (size_t k = 0; k < g->n_columns; k++) {
            size_t head = g->columns[k] / c->head_dim, channel = g->columns[k] % c->head_dim;
            const float *x = c->x + from * c->n_columns + head * c->head_dim;
            if (head != held) {
                h.n = c->head_dim;
                for (size_t i = 0; i < h.n; i++) h.v[i] = (double)x[i], h.slack[i] = 0;
                bool normed = c->norm && t->kind != TWIST_NORM_SKIPPED;
                if (normed && t->kind != TWIST_NORM_LATE) head_norm(c, t, row, &h);
                if (c->cos_sin) head_rope(c, t, rates, magnitude, row, &h);
                if (normed && t->kind == TWIST_NORM_LATE) head_norm(c, t, row, &h);
                if (t->kind == TWIST_HALF_WRITTEN)
                    for (size_t i = h.n / 2; i < h.n; i++) h.v[i] = (double)x[i];
                held = head;
            }
            want[r * g->n_columns + k] = h.v[channel];
            if (bound) bound[r * g->n_columns + k] = h.slack[channel];
        }
    }
    return true;
}

// ---- Attention -----------------------------------------------------------------------------------------------------

// What one head of one token sees.
struct view {
    const struct kv_layer *kv;
    const int32_t *pages; // of the sequence
    size_t n_pages, kv_head, begin, end;
    const struct twist *t;
};

// Position j's row; SIZE_MAX: outside.
static size_t place(const struct view *v, size_t j) {
    size_t index = j / KV_PAGE_TOKENS, slot = j % KV_PAGE_TOKENS, page;
    if (v->t->kind == TWIST_PAGES_REVERSED) index = index < v->n_pages ? v->n_pages - 1 - index : index;
    if (v->t->kind == TWIST_PAGES_ROTATED) index = (index + 1) % v->n_pages;
    if (v->t->kind == TWIST_SLOT_SHIFT) slot = (slot + (size_t)(v->t->arg + KV_PAGE_TOKENS)) % KV_PAGE_TOKENS;
    if (v->t->kind == TWIST_PAGES_PLAIN) {
        page = index;
    } else {
        if (index >= v->n_pages || v->pages[index] < 0) return SIZE_MAX;
        page = (size_t)v->pages[index];
    }
    if (page >= v->kv->n_pages) return SIZE_MAX;
    size_t n = v->kv->n_kv_heads;
    if (v->t->kind == TWIST_NHD) return (page * KV_PAGE_TOKENS + slot) * n + v->kv_head;
    return kv_row(v->kv, page, v->kv_head, slot);
}

static bool open_view(const struct call *c, const struct twist *t, size_t row, size_t head, struct view *v) {
    const struct batch *b = c->batch;
    size_t seq = (size_t)b->seq[row], n_kv = (size_t)b->position[row] + 1;
    if (t->kind == TWIST_PAGES_OTHER) seq = (seq + (size_t)(t->arg + (int)b->n_seqs)) % b->n_seqs;
    *v = (struct view){.kv = c->kv, .t = t, .pages = b->pages + b->page_start[seq], .end = n_kv};
    v->n_pages = (size_t)(b->page_start[seq + 1] - b->page_start[seq]);
    v->kv_head = head / (c->n_heads / c->n_kv_heads);
    if (t->kind == TWIST_HEAD_MODULO) v->kv_head = head % c->n_kv_heads;
    if (t->kind == TWIST_HEAD_SHIFT) v->kv_head = (v->kv_head + (size_t)(t->arg + (int)c->n_kv_heads)) % c->n_kv_heads;
    if (t->kind == TWIST_HEAD_FIRST) v->kv_head = 0;
    if (t->kind == TWIST_MASK) v->end = t->arg < 0 && n_kv <= (size_t)-t->arg ? 1 : n_kv + (size_t)t->arg;
    if (t->kind == TWIST_NO_MASK) v->end = (size_t)b->kv_len[seq];
    if (t->kind == TWIST_PAGE_UP || t->kind == TWIST_ZERO_WEIGHT)
        v->end = (n_kv + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS * KV_PAGE_TOKENS;
    if (t->kind == TWIST_PAGE_DOWN && n_kv >= KV_PAGE_TOKENS) v->end = n_kv / KV_PAGE_TOKENS * KV_PAGE_TOKENS;
    if (t->kind == TWIST_PREFIX && (double)n_kv > t->value) v->end = (size_t)t->value;
    if (t->kind == TWIST_WINDOW && (double)n_kv > t->value) v->begin = n_kv - (size_t)t->value;
    if (v->end > v->n_pages * KV_PAGE_TOKENS) v->end = v->n_pages * KV_PAGE_TOKENS;
    return v->end > v->begin;
}

// Scores of one head into s [end - begin]; the largest error that f32 may make in one.
static bool scores(const struct call *c, const struct view *v, const float *q, double *s, double *slack) {
    size_t n = c->head_dim;
    double scale = v->t->kind == TWIST_SCALE ? v->t->value : c->scale, q_norm = 0, q_most = 0;
    const enum kv_side keys = v->t->kind == TWIST_KV_SWAPPED ? KV_V : KV_K;
    double rounded[MOST_HEAD_DIM]; // q as it is multiplied
    for (size_t i = 0; i < n; i++) {
        rounded[i] = c->on_device ? kv_device_q((double)q[i], (float)c->scale) : (double)q[i];
        q_norm += rounded[i] * rounded[i];
        q_most = fmax(q_most, fabs(rounded[i]));
    }
    *slack = 0;
    for (size_t j = v->begin; j < v->end; j++) {
        size_t at = place(v, j);
        if (at == SIZE_MAX) return false;
        double sum = 0, k_norm = 0, k_sum = 0;
        for (size_t i = 0; i < n; i++) {
            double k = (double)kv_value(v->kv, keys, keys == KV_V ? v->kv->v : v->kv->k, at, i);
            sum += rounded[i] * k;
            k_norm += k * k;
            k_sum += fabs(k);
        }
        s[j - v->begin] = sum * scale;
        double off = fabs(scale) * ((double)n / 16 + 8) * U * sqrt(q_norm * k_norm) + 2 * U * fabs(sum * scale);
        off += fabs(scale) * kv_score_slack(c->on_device ? DTYPE_BF16 : v->kv->type, q_most, k_sum);
        if (c->on_device) off += fabs(scale) * kv_device_score_slack(n, sqrt(q_norm), sqrt(k_norm));
        if (!(off <= *slack)) *slack = off;
    }
    return true;
}

// Sums p v over [from, to) of the view into o, and of p into *l; most: the largest |v|.
static bool add_values(const struct view *v, const double *p, size_t from, size_t to, double *o, double *size,
                       double *most, double *l) {
    const enum kv_side values = v->t->kind == TWIST_KV_SWAPPED || v->t->kind == TWIST_V_IS_K ? KV_K : KV_V;
    bool rounded = v->t->kind == TWIST_BF16_SUM;
    for (size_t j = from; j < to; j++) {
        size_t at = place(v, j);
        if (at == SIZE_MAX) return false;
        double weight = p[j - v->begin];
        *l += weight;
        if (v->t->kind == TWIST_P_BF16) weight = bf16(weight);
        for (size_t i = 0; i < v->kv->head_dim; i++) {
            double value = (double)kv_value(v->kv, values, values == KV_V ? v->kv->v : v->kv->k, at, i);
            o[i] += weight * value;
            size[i] += fabs(weight * value);
            most[i] = fmax(most[i], fabs(value));
            if (rounded) o[i] = bf16(o[i]);
        }
    }
    return true;
}

// One head of one token. work: as many scores as there are positions.
static bool attend(const struct call *c, const struct twist *t, size_t row, size_t head, double *work, double *out,
                   double *bound) {
    struct view v;
    double o[MOST_HEAD_DIM] = {0}, size[MOST_HEAD_DIM] = {0}, most[MOST_HEAD_DIM] = {0}, l = 0, slack, m = -INFINITY;
    size_t n = c->head_dim, block = c->attn_block, n_blocks;
    size_t from_row = t->kind == TWIST_ROW_SHIFT ? (row + (size_t)(t->arg + (int)c->n_rows)) % c->n_rows : row;
    if (!open_view(c, t, from_row, head, &v)) return false;
    if (!scores(c, &v, c->x + from_row * c->n_columns + head * n, work, &slack)) return false;
    n_blocks = (v.end + block - 1) / block;
    for (size_t j = (size_t)c->batch->position[from_row] + 1; t->kind == TWIST_ZERO_WEIGHT && j < v.end; j++)
        work[j] = -INFINITY;
    for (size_t j = 0; j < v.end - v.begin; j++) m = work[j] > m ? work[j] : m;
    if (t->kind == TWIST_NO_RESCALE || t->kind == TWIST_LAST_BLOCK) {
        for (size_t from = v.begin; from < v.end; from += block) {
            size_t to = from + block < v.end ? from + block : v.end;
            double block_max = -INFINITY;
            for (size_t j = from; j < to; j++) block_max = fmax(block_max, work[j - v.begin]);
            for (size_t j = from; j < to; j++) work[j - v.begin] = exp(work[j - v.begin] - block_max);
            if (t->kind == TWIST_LAST_BLOCK && to < v.end) continue;
            if (!add_values(&v, work, from, to, o, size, most, &l)) return false;
        }
    } else {
        for (size_t j = 0; j < v.end - v.begin; j++)
            work[j] = t->kind == TWIST_NO_MAXIMUM ? (double)expf((float)work[j]) : exp(work[j] - m);
        if (!add_values(&v, work, v.begin, v.end, o, size, most, &l)) return false;
    }
    if (t->kind == TWIST_NO_MAXIMUM && l > (double)FLT_MAX) l = INFINITY;
    if (t->kind == TWIST_NO_DIVISION) l = 1;
    double relative = 2 * (2 * slack + (16 + (double)block + 2 * (double)n_blocks) * U);
    if (c->on_device) relative = expm1(relative) + KV_DEVICE_ROUNDED_P;
    for (size_t i = 0; i < n; i++) {
        out[i] = o[i] / l;
        double largest = 0; // of the channels that share a scale
        for (size_t k = i / 32 * 32; k < i / 32 * 32 + 32 && k < n; k++) largest = fmax(largest, most[k]);
        if (bound) bound[i] = relative * size[i] / l + kv_value_slack(c->kv->type, largest) + FLT_MIN;
    }
    return true;
}

bool formula_attention(const struct call *c, const struct twist *t, const struct grid *g, double *want, double *bound) {
    if (c->head_dim > MOST_HEAD_DIM || !c->batch || !c->kv) return false;
    size_t most = 0;
    for (size_t s = 0; s < c->batch->n_seqs; s++) {
        size_t n = (size_t)(c->batch->page_start[s + 1] - c->batch->page_start[s]) * KV_PAGE_TOKENS;
        if (n > most) most = n;
    }
    double *work = size_alloc(most + 1, sizeof *work);
    double out[MOST_HEAD_DIM], slack[MOST_HEAD_DIM];
    bool ok = work != NULL;
    for (size_t r = 0; ok && r < g->n_rows; r++) {
        size_t held = SIZE_MAX;
        for (size_t k = 0; ok && k < g->n_columns; k++) {
            size_t head = g->columns[k] / c->head_dim, channel = g->columns[k] % c->head_dim;
            if (head != held) ok = attend(c, t, g->rows[r], head, work, out, slack);
            held = head;
            want[r * g->n_columns + k] = out[channel];
            if (bound) bound[r * g->n_columns + k] = slack[channel];
        }
    }
    free(work);
    return ok;
}
