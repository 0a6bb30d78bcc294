// stage_model.c: whole runs of the model: every op in its place judged by T, the logits against T with Hugging Face's
// rounding as the yardstick, and the fused path against the plain one, bit by bit.
#include "doctor/stage_ops.h"

#include "base/clock.h"
#include "base/size.h"
#include "model/oracle.h"
#include "ops/kv_page.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct stage {
    struct doctor *d;
    struct stage_report *r;
    struct error *err;
    struct judgement judged;
    bool to_int8;            // some products round their input so
    bool rounds_more_than_h; // ... or K and V are stored in 8 bits
    // Over all positions compared with T:
    double *kl, *kl_h; // [n_positions] KL(T || ours), KL(T || H)
    size_t n_positions, cap, n_prompts, n_agree, n_agree_h, n_ties, n_bugs;
    double squares, squares_h; // of the logits' errors
    size_t n_layers;
};

// ---- Ops in their places -------------------------------------------------------------------------------------------

// What a plain run computes, one layer at a time: judged as soon as the layer is complete.
struct inspection {
    struct stage *s;
    struct capture layer, head;
    struct op_sequence seq;
    float *x, *resid; // [n, hidden] the stream before the layer in progress, and after it
    size_t n;
    const int32_t *ids;
    const size_t *rows; // [n_rows] whose products are judged
    size_t n_rows;
    int done; // layers
    bool ok, out_of_time;
};

static void derive_stored(struct inspection *in) {
    const struct model_config *c = &in->s->d->model->config;
    size_t n = in->n * c->n_kv_heads * c->head_dim;
    kv_as_stored(in->s->d->kv_type, in->layer.seg[SEG_K_ROPE], in->layer.seg[SEG_KV_K], n);
    kv_as_stored(in->s->d->kv_type, in->layer.seg[SEG_V], in->layer.seg[SEG_KV_V], n);
}

static void inspect_layer(struct inspection *in, int layer) {
    struct stage *s = in->s;
    size_t hidden = s->d->model->config.hidden;
    struct op_case c = {.name = "in the model",
                        .d = s->d,
                        .weights = &s->d->model->layers[layer],
                        .layer = layer,
                        .seqs = &in->seq,
                        .n_seqs = 1,
                        .x = in->x};
    in->layer.n_rows = in->n;
    derive_stored(in);
    in->ok = judge_layer(&c, &in->layer, in->rows, in->n_rows, s->r, &s->judged, s->err);
    memcpy(in->x, in->layer.seg[SEG_RESID], in->n * hidden * sizeof *in->x);
    in->done++;
    s->n_layers++;
}

static void inspect_embed(struct inspection *in) {
    const struct matrix *table = &in->s->d->model->embed;
    double *t = size_alloc(in->n * table->n_in, sizeof *t);
    in->ok = t ? oracle_embed(ORACLE_T, t, table, in->ids, in->n, in->s->err)
               : error_set(in->s->err, "out of memory for the embedding of %zu tokens", in->n);
    for (size_t i = 0; in->ok && i < in->n * table->n_in; i++) {
        if (i % table->n_in == 0) in->s->r->n_checks++;
        if ((double)in->x[i] == t[i]) continue;
        struct fault *f = stage_fault(in->s->r, FAULT_OP, "embed against T");
        snprintf(f->op, sizeof f->op, "embed");
        snprintf(f->tensor, sizeof f->tensor, "embed");
        f->position = (int)(i / table->n_in);
        f->channel = (int)(i % table->n_in);
        f->expected = t[i];
        f->found = (double)in->x[i];
        fault_say(f, "embed: position %d, channel %d is %.9g, the embedding of token %d holds %.9g", f->position,
                  f->channel, f->found, in->ids[f->position], f->expected);
        break;
    }
    free(t);
}

static void inspect_tap(void *user, const char *name, int layer, const float *data, size_t n_rows, size_t n_columns) {
    struct inspection *in = user;
    if (!in->ok || in->out_of_time) return;
    if (layer < 0 && strcmp(name, "embed") == 0) {
        memcpy(in->x, data, n_rows * n_columns * sizeof *data);
        inspect_embed(in);
    }
    for (int seg = 0; layer >= 0 && seg < SEG_FINAL_NORM; seg++)
        if (strcmp(segment_infos[seg].name, name) == 0)
            memcpy(in->layer.seg[seg], data, n_rows * n_columns * sizeof *data);
    for (int seg = SEG_FINAL_NORM; layer < 0 && seg < SEG_COUNT; seg++)
        if (strcmp(segment_infos[seg].name, name) == 0)
            memcpy(in->head.seg[seg], data, n_rows * n_columns * sizeof *data);
    if (layer < 0 || strcmp(name, "resid") != 0) return;
    inspect_layer(in, layer);
    doctor_progress(in->s->d, 0.3 * (double)in->done / (double)in->s->d->model->config.n_layers);
    // Layers that are left unjudged here are still compared through the logits.
    in->out_of_time = clock_seconds() > in->s->d->deadline;
}

static bool inspect_run(struct stage *s, const struct doctor_prompt *p) {
    enum { TOKENS = 40, ROWS = 8, HEAD_ROWS = 4 };
    const struct model_config *c = &s->d->model->config;
    size_t n = p->n < TOKENS ? p->n : TOKENS, rows[ROWS], n_rows = 0;
    int32_t head_rows[HEAD_ROWS] = {(int32_t)n - 1, 0, (int32_t)n / 2, (int32_t)n / 3};
    struct arena arena = {0};
    struct inspection in = {.s = s, .seq = {.n = n}, .n = n, .ids = p->ids, .rows = rows, .ok = true};
    for (size_t i = 0; i < ROWS && i < n; i++) rows[n_rows++] = i < 2 ? i : n - 1 - (i - 2) * (n - 2) / ROWS;
    in.n_rows = n_rows;
    in.x = arena_alloc(&arena, n * c->hidden, sizeof *in.x);
    float *logits = size_alloc(n * c->n_vocab, sizeof *logits);
    bool ok = (in.x && logits) || error_set(s->err, "out of memory for %zu tokens", n);
    struct forward_options o = {.kv_type = s->d->kv_type, .poison = true, .tap = inspect_tap, .user = &in};
    ok = ok && capture_create(&in.layer, &arena, c, n, false, s->err) &&
         capture_create(&in.head, &arena, c, n, true, s->err) && doctor_forward(s->d, &o, p->ids, n, logits, s->err) &&
         in.ok;
    if (ok && !in.out_of_time) {
        struct capture head = in.head; // the rows that are judged, in front
        for (size_t i = 0; i < HEAD_ROWS && n >= HEAD_ROWS; i++) {
            size_t from = (size_t)head_rows[i];
            memcpy(logits + i * c->n_vocab, in.head.seg[SEG_LOGITS] + from * c->n_vocab, c->n_vocab * sizeof *logits);
        }
        float *normed = arena_alloc(&arena, n * c->hidden, sizeof *normed);
        ok = normed || error_set(s->err, "out of memory");
        for (size_t i = 0; ok && i < HEAD_ROWS && n >= HEAD_ROWS; i++)
            memcpy(normed + i * c->hidden, in.head.seg[SEG_FINAL_NORM] + (size_t)head_rows[i] * c->hidden,
                   c->hidden * sizeof *normed);
        head.seg[SEG_LOGITS] = logits;
        head.seg[SEG_FINAL_NORM] = normed;
        head.n_rows = HEAD_ROWS;
        struct head_case h = {.d = s->d, .x = in.x, .n_tokens = n, .rows = head_rows, .n_rows = HEAD_ROWS};
        if (ok && n >= HEAD_ROWS) ok = judge_head(&h, &head, s->r, &s->judged, s->err);
    }
    free(logits);
    arena_free(&arena);
    return ok;
}

// ---- Fused = plain -------------------------------------------------------------------------------------------------

// A run's tensors as one hash a row, in the order in which they were tapped.
struct tap_log {
    struct tap_entry {
        char name[16];
        int layer;
        size_t n_rows, first; // of `hashes`
    } * entries;
    size_t n, cap;
    struct buffer hashes; // uint64_t
    bool failed;
};

static uint64_t hash_row(const float *row, size_t n) {
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &row[i], sizeof bits);
        h = (h ^ bits) * 0x9E3779B97F4A7C15u;
        h ^= h >> 31;
    }
    return h;
}

static void log_tap(void *user, const char *name, int layer, const float *data, size_t n_rows, size_t n_columns) {
    struct tap_log *log = user;
    if (log->n == log->cap) {
        size_t cap = log->cap ? 2 * log->cap : 256;
        struct tap_entry *entries = size_realloc(log->entries, cap, sizeof *entries);
        if (!entries) {
            log->failed = true;
            return;
        }
        log->entries = entries;
        log->cap = cap;
    }
    struct tap_entry *e = &log->entries[log->n];
    *e = (struct tap_entry){.layer = layer, .n_rows = n_rows, .first = log->hashes.len / sizeof(uint64_t)};
    snprintf(e->name, sizeof e->name, "%s", name);
    for (size_t i = 0; i < n_rows; i++) {
        uint64_t h = hash_row(data + i * n_columns, n_columns);
        if (!buffer_append(&log->hashes, &h, sizeof h)) log->failed = true;
    }
    log->n++;
}

static void free_log(struct tap_log *log) {
    free(log->entries);
    buffer_free(&log->hashes);
}

// Keeps one row of one tensor.
struct row_tap {
    const char *name;
    int layer;
    size_t row, n;
    float *data;
    bool found;
};

static void keep_row(void *user, const char *name, int layer, const float *data, size_t n_rows, size_t n_columns) {
    struct row_tap *t = user;
    if (layer != t->layer || strcmp(name, t->name) != 0 || t->row >= n_rows || n_columns > t->n) return;
    memcpy(t->data, data + t->row * n_columns, n_columns * sizeof *data);
    t->n = n_columns;
    t->found = true;
}

static enum segment segment_of(const char *name) {
    for (int s = 0; s < SEG_COUNT; s++)
        if (strcmp(segment_infos[s].name, name) == 0) return (enum segment)s;
    return SEG_COUNT;
}

// The values at the first row that differs.
static bool find_value(struct stage *s, struct fault *f, const struct doctor_prompt *p, size_t n,
                       const struct forward_options *a, const struct forward_options *b, const struct tap_entry *where,
                       size_t row) {
    size_t widest = s->d->model->config.n_vocab;
    const struct model_config *c = &s->d->model->config;
    widest = c->n_ff > widest ? c->n_ff : widest;
    widest = c->n_heads * c->head_dim > widest ? c->n_heads * c->head_dim : widest;
    widest = c->hidden > widest ? c->hidden : widest;
    struct row_tap taps[2] = {{where->name, where->layer, row, widest, size_alloc(widest, sizeof(float)), false},
                              {where->name, where->layer, row, widest, size_alloc(widest, sizeof(float)), false}};
    struct forward_options ways[2] = {*a, *b};
    bool logits = where->layer < 0 && strcmp(where->name, "embed") != 0;
    float *out = logits ? size_alloc(n * c->n_vocab, sizeof *out) : NULL;
    bool ok = (taps[0].data && taps[1].data && (out || !logits)) || error_set(s->err, "out of memory");
    for (int i = 0; ok && i < 2; i++) {
        ways[i].tap = keep_row;
        ways[i].user = &taps[i];
        ok = doctor_forward(s->d, &ways[i], p->ids, n, out, s->err);
    }
    if (ok && taps[0].found && taps[1].found) {
        size_t hd = segment_head_dim(c, segment_of(where->name)), k = 0;
        while (k + 1 < taps[0].n && memcmp(&taps[0].data[k], &taps[1].data[k], sizeof(float)) == 0) k++;
        f->head = hd ? (int)(k / hd) : -1;
        f->channel = (int)(hd ? k % hd : k);
        f->expected = (double)taps[0].data[k];
        f->found = (double)taps[1].data[k];
    }
    free(out);
    free(taps[0].data);
    free(taps[1].data);
    return ok;
}

// One way against the plain run's log.
static bool compare_way(struct stage *s, const struct doctor_prompt *p, size_t n, const struct forward_options *plain,
                        const struct tap_log *expected, struct forward_options way, const char *check,
                        const char *variant) {
    struct tap_log log = {0};
    size_t n_vocab = s->d->model->config.n_vocab;
    float *logits = size_alloc(n * n_vocab, sizeof *logits);
    way.tap = log_tap;
    way.user = &log;
    bool ok = logits ? doctor_forward(s->d, &way, p->ids, n, logits, s->err)
                     : error_set(s->err, "out of memory for the logits of %zu tokens", n);
    if (ok && log.failed) ok = error_set(s->err, "out of memory for the trace of %zu tokens", n);
    free(logits);
    const uint64_t *a = (const uint64_t *)(const void *)expected->hashes.data;
    const uint64_t *b = (const uint64_t *)(const void *)log.hashes.data;
    s->r->n_checks += log.n;
    for (size_t i = 0, k = 0; ok && i < log.n; i++) {
        const struct tap_entry *e = &log.entries[i];
        while (k < expected->n &&
               (expected->entries[k].layer != e->layer || strcmp(expected->entries[k].name, e->name)))
            k++;
        if (k == expected->n) break;
        size_t row = 0;
        while (row < e->n_rows && a[expected->entries[k].first + row] == b[e->first + row]) row++;
        if (row == e->n_rows) continue;
        struct fault *f = stage_fault(s->r, way.fusion ? FAULT_FUSED : FAULT_VARIANT, check);
        enum segment seg = segment_of(e->name);
        f->layer = e->layer;
        f->position = (int)row;
        f->prompt = (int)(p - s->d->prompts);
        if (seg < SEG_COUNT)
            snprintf(f->op, sizeof f->op, "%s",
                     way.fusion ? fusion_info(segment_infos[seg].fused)->name : segment_infos[seg].primitive);
        else snprintf(f->op, sizeof f->op, "%s", e->name);
        if (e->layer >= 0) snprintf(f->tensor, sizeof f->tensor, "layers.%d.%s", e->layer, e->name);
        else snprintf(f->tensor, sizeof f->tensor, "%s", e->name);
        snprintf(f->variant, sizeof f->variant, "%s", variant);
        ok = find_value(s, f, p, n, plain, &way, e, row);
        fault_say(f, "%s, %s: %s is the first tensor that differs, at position %zu, channel %d: %.9g instead of %.9g",
                  check, variant, f->tensor, row, f->channel, f->found, f->expected);
        break;
    }
    free_log(&log);
    return ok;
}

static bool check_fusion(struct stage *s, const struct doctor_prompt *p, size_t most) {
    size_t n = p->n < most ? p->n : most;
    struct forward_options plain = {.kv_type = s->d->kv_type};
    struct tap_log log = {0};
    float *logits = size_alloc(n * s->d->model->config.n_vocab, sizeof *logits);
    struct forward_options traced = plain;
    traced.tap = log_tap;
    traced.user = &log;
    bool ok = logits ? doctor_forward(s->d, &traced, p->ids, n, logits, s->err)
                     : error_set(s->err, "out of memory for the logits of %zu tokens", n);
    free(logits);
    for (int i = 0; ok && i < FUSED_COUNT; i++) {
        struct forward_options way = plain;
        way.fusion = s->d->fusion & 1u << i;
        if (!way.fusion || !fusion_available(s->d->ops, (enum fused_op)i)) continue;
        char variant[96];
        snprintf(variant, sizeof variant, "--fusion=%s", fusion_info((enum fused_op)i)->name);
        ok = compare_way(s, p, n, &plain, &log, way, "fused = standard", variant);
    }
    struct forward_options way = plain;
    way.fusion = s->d->fusion;
    ok = ok && compare_way(s, p, n, &plain, &log, way, "fused = standard", "all fused ops");
    way.poison = true;
    way.page_order = 7;
    ok = ok && compare_way(s, p, n, &plain, &log, way, "unused memory does not matter",
                           "all fused ops, pages permuted, unused memory NaN");
    way.fusion = 0;
    ok = ok && compare_way(s, p, n, &plain, &log, way, "unused memory does not matter",
                           "standard path, pages permuted, unused memory NaN");
    free_log(&log);
    return ok;
}

// ---- On a device: what nobody watches ------------------------------------------------------------------------------

// One way to run the prompt: which fused ops, how many tokens a step (0: all), with which of the device's kernels in
// another's place; and what is to blame when it alone goes wrong.
struct silent_way {
    uint32_t fusion, flipped;
    size_t chunk;
    const char *op, *variant;
};

// The logits of a way that is not watched, so that steps are recorded and ops merge and begin early, against the
// standard path's.
static bool compare_silent(struct stage *s, const struct doctor_prompt *p, size_t n, const struct silent_way *way,
                           const float *plain, float *logits, bool *same) {
    struct device *device = s->d->ops->device;
    size_t n_vocab = s->d->model->config.n_vocab, at = 0;
    struct forward_options o = {.kv_type = s->d->kv_type, .fusion = way->fusion, .chunk = way->chunk, .poison = true};
    device->variants ^= way->flipped;
    bool ok = doctor_forward(s->d, &o, p->ids, n, logits, s->err);
    device->variants ^= way->flipped;
    s->r->n_checks += n;
    *same = ok && memcmp(plain, logits, n * n_vocab * sizeof *logits) == 0;
    if (!ok || *same) return ok;
    while (memcmp(&plain[at], &logits[at], sizeof *logits) == 0) at++;
    struct fault *f = stage_fault(s->r, FAULT_FUSED, "unwatched = standard");
    f->prompt = (int)(p - s->d->prompts);
    f->position = (int)(at / n_vocab);
    f->channel = (int)(at % n_vocab);
    f->expected = (double)plain[at];
    f->found = (double)logits[at];
    snprintf(f->op, sizeof f->op, "%s", way->op);
    snprintf(f->tensor, sizeof f->tensor, "logits");
    snprintf(f->variant, sizeof f->variant, "%s", way->variant);
    fault_say(f,
              "%s: the logits behind position %d differ from the standard path's: token %d's is %.9g instead of %.9g",
              way->variant, f->position, f->channel, f->found, f->expected);
    return true;
}

// First what differs least from the watched runs; the first way that goes wrong is told.
static bool check_silent(struct stage *s, const struct doctor_prompt *p, size_t most) {
    enum { MOST_WAYS = 48 };
    const struct ops *ops = s->d->ops;
    const uint32_t step = 1u << FUSED_STEP, merged = 1u << FUSED_ROPE_ATTENTION;
    size_t n = p->n < most ? p->n : most, n_vocab = s->d->model->config.n_vocab, n_ways = 0;
    struct silent_way ways[MOST_WAYS] = {
        {s->d->fusion & ~(step | merged), 0, 0, "", "fused ops, a prompt at once"},
        {s->d->fusion & ~(step | merged), 0, 1, "", "fused ops, a token at a time"},
        {s->d->fusion & ~step, 0, 1, fusion_info(FUSED_ROPE_ATTENTION)->name,
         "--fusion with rope_attention, a token at a time"},
        {s->d->fusion, 0, 1, fusion_info(FUSED_STEP)->name, "--fusion with step, a token at a time"}};
    char names[MOST_WAYS][96];
    n_ways = 4;
    for (size_t i = 0; i < 2 * ops->device->n_variants && n_ways < MOST_WAYS; i++, n_ways++) {
        size_t k = i / 2;
        bool used = ops->device->variants >> k & 1;
        snprintf(names[n_ways], sizeof names[0], "%s %s, %s", used ? "without" : "with", ops->device->variant_names[k],
                 i % 2 ? "a token at a time" : "a prompt at once");
        ways[n_ways] = (struct silent_way){s->d->fusion, 1u << k, i % 2, i % 2 ? fusion_info(FUSED_STEP)->name : "",
                                           names[n_ways]};
    }
    float *plain = size_alloc(n * n_vocab, sizeof *plain), *logits = size_alloc(n * n_vocab, sizeof *logits);
    struct forward_options standard = {.kv_type = s->d->kv_type};
    bool ok = (plain && logits) || error_set(s->err, "out of memory for the logits of %zu tokens", n), same = true;
    ok = ok && doctor_forward(s->d, &standard, p->ids, n, plain, s->err);
    for (size_t i = 0; ok && i < n_ways && same; i++) ok = compare_silent(s, p, n, &ways[i], plain, logits, &same);
    free(plain);
    free(logits);
    return ok;
}

// ---- Logits against T ----------------------------------------------------------------------------------------------

struct position_result {
    double kl, kl_h, squares, squares_h;
    size_t best_t, best, best_h;
    double margin; // T's logit of its best token over its logit of ours
};

static size_t best_of(const double *x, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

static double log_sum_exp(const double *x, size_t n) {
    double max = x[best_of(x, n)], sum = 0;
    for (size_t i = 0; i < n; i++) sum += exp(x[i] - max);
    return max + log(sum);
}

// KL(t || x), in nats.
static double divergence(const double *t, const double *x, size_t n) {
    double lt = log_sum_exp(t, n), lx = log_sum_exp(x, n), kl = 0;
    for (size_t i = 0; i < n; i++) kl += exp(t[i] - lt) * ((t[i] - lt) - (x[i] - lx));
    return kl > 0 ? kl : 0;
}

static struct position_result compare_logits(const double *t, const double *h, const double *ours, size_t n) {
    struct position_result r = {.kl = divergence(t, ours, n), .kl_h = divergence(t, h, n)};
    r.best_t = best_of(t, n), r.best = best_of(ours, n), r.best_h = best_of(h, n);
    r.margin = t[r.best_t] - t[r.best];
    for (size_t i = 0; i < n; i++) {
        r.squares += (ours[i] - t[i]) * (ours[i] - t[i]);
        r.squares_h += (h[i] - t[i]) * (h[i] - t[i]);
    }
    return r;
}

static bool keep_position(struct stage *s, const struct position_result *p) {
    if (s->n_positions == s->cap) {
        size_t cap = s->cap ? 2 * s->cap : 256;
        double *kl = size_realloc(s->kl, cap, sizeof *kl);
        if (kl) s->kl = kl;
        double *kl_h = size_realloc(s->kl_h, cap, sizeof *kl_h);
        if (kl_h) s->kl_h = kl_h;
        if (!kl || !kl_h) return error_set(s->err, "out of memory");
        s->cap = cap;
    }
    s->kl[s->n_positions] = p->kl;
    s->kl_h[s->n_positions++] = p->kl_h;
    s->squares += p->squares;
    s->squares_h += p->squares_h;
    s->n_agree += p->best == p->best_t;
    s->n_agree_h += p->best_h == p->best_t;
    return true;
}

enum { SHOWN_TIES = 3 };

// A best token that is not T's: a tie when T's margin is within what Hugging Face's rounding moves a logit by.
static void judge_mismatch(struct stage *s, const struct doctor_prompt *p, size_t position,
                           const struct position_result *r, size_t n_vocab) {
    double noise = sqrt((r->squares_h > r->squares ? r->squares_h : r->squares) / (double)n_vocab);
    bool tie = r->margin <= 6 * noise;
    if (r->best == r->best_t) return;
    if (tie) {
        if (++s->n_ties <= SHOWN_TIES)
            stage_note(s->r,
                       "%s, position %zu: the best token is %zu, T's is %zu: a tie (T's margin %.3g, a logit's error "
                       "%.3g)",
                       p->name, position, r->best, r->best_t, r->margin, noise);
        return;
    }
    s->n_bugs++;
    struct fault *f = stage_fault(s->r, FAULT_LOGITS, "the best token is T's, or tied with it");
    f->prompt = (int)(p - s->d->prompts);
    f->position = (int)position;
    f->channel = (int)r->best;
    snprintf(f->tensor, sizeof f->tensor, "logits");
    fault_say(
        f, "%s, position %zu: the best token is %zu, T's is %zu by a margin of %.3g: no tie (a logit's error is %.3g)",
        p->name, position, r->best, r->best_t, r->margin, noise);
}

static void judge_finite(struct stage *s, const struct doctor_prompt *p, size_t position, const float *row, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (isfinite(row[i])) continue;
        struct fault *f = stage_fault(s->r, FAULT_LOGITS, "logits are finite");
        f->prompt = (int)(p - s->d->prompts);
        f->position = (int)position;
        f->channel = (int)i;
        f->found = (double)row[i];
        snprintf(f->tensor, sizeof f->tensor, "logits");
        fault_say(f, "%s, position %zu: the logit of token %zu is %f", p->name, position, i, (double)row[i]);
        return;
    }
}

// One prompt: T and H in pieces until the time is up, then ours of the same tokens.
struct trial {
    struct oracle *t, *h;
    double *t_logits, *h_logits; // [PIECE, n_vocab]
    float *logits;               // [most, n_vocab] ours, from the start
    double *ours;                // [n_vocab]
};

enum { PIECE = 16 };

static bool open_trial(struct trial *a, struct stage *s, const struct doctor_prompt *p, size_t most) {
    size_t n_vocab = s->d->model->config.n_vocab;
    a->t = oracle_create(s->d->model, ORACLE_T, s->d->pool, most, s->err);
    a->h = a->t ? oracle_create(s->d->model, ORACLE_H, s->d->pool, most, s->err) : NULL;
    a->t_logits = size_alloc(PIECE * n_vocab, sizeof *a->t_logits);
    a->h_logits = size_alloc(PIECE * n_vocab, sizeof *a->h_logits);
    a->logits = size_alloc(most * n_vocab, sizeof *a->logits);
    a->ours = size_alloc(n_vocab, sizeof *a->ours);
    if (!a->t || !a->h) return false;
    if (!a->t_logits || !a->h_logits || !a->logits || !a->ours) return error_set(s->err, "out of memory for logits");
    struct forward_options o = {.fusion = s->d->fusion, .kv_type = s->d->kv_type, .chunk = 64};
    return doctor_forward(s->d, &o, p->ids, most, a->logits, s->err);
}

static void close_trial(struct trial *a) {
    oracle_free(a->t);
    oracle_free(a->h);
    free(a->t_logits);
    free(a->h_logits);
    free(a->logits);
    free(a->ours);
}

static bool check_logits(struct stage *s, const struct doctor_prompt *p, size_t most, double end) {
    struct trial a = {0};
    size_t n_vocab = s->d->model->config.n_vocab, rows[PIECE];
    bool ok = open_trial(&a, s, p, most);
    for (size_t i = 0; i < PIECE; i++) rows[i] = i;
    for (size_t at = 0; ok && at < most && (at == 0 || clock_seconds() < end); at += PIECE) {
        size_t n = most - at < PIECE ? most - at : PIECE;
        struct oracle_step step = {.ids = p->ids + at, .n = n, .position0 = at, .logit_rows = rows, .n_logit_rows = n};
        ok = oracle_run(a.t, &step, a.t_logits, s->err) && oracle_run(a.h, &step, a.h_logits, s->err);
        for (size_t i = 0; ok && i < n; i++) {
            const float *row = a.logits + (at + i) * n_vocab;
            for (size_t k = 0; k < n_vocab; k++) a.ours[k] = (double)row[k];
            struct position_result r =
                compare_logits(a.t_logits + i * n_vocab, a.h_logits + i * n_vocab, a.ours, n_vocab);
            s->r->n_checks += 2;
            judge_finite(s, p, at + i, row, n_vocab);
            judge_mismatch(s, p, at + i, &r, n_vocab);
            ok = keep_position(s, &r);
        }
        doctor_progress(s->d, 0.5 + 0.5 * (1 - (s->d->deadline - clock_seconds()) / (s->d->options.budget * 0.4)));
    }
    close_trial(&a);
    s->n_prompts++;
    return ok;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(double *sorted, size_t n, double q) {
    size_t i = (size_t)ceil(q * (double)n);
    return sorted[i > 0 ? i - 1 : 0];
}

static double mean(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i];
    return sum / (double)n;
}

// H's error is at least twice ours in a trained model (DESIGN.md section 3). Random weights, which do not amplify what
// the residual stream loses in H, come to 0.5 as well: that is told, and an error of 0.7 is a fault. A product that
// rounds its input to int8, and K and V in 8 bits, cannot promise either: they are held to T op by op, and what they
// cost is told.
static void judge_ratio(struct stage *s, double ours, double theirs) {
    double floor = 1e-6; // of a model whose logits H, too, computes exactly
    double ratio = theirs > floor ? ours / theirs : 0;
    s->r->n_checks++;
    if (s->rounds_more_than_h || ours <= 0.5 * theirs + floor) return;
    if (ours <= 0.7 * theirs + floor) {
        stage_note(s->r, "the logits' error is %.2f of H's: more than the half that trained models stay below", ratio);
        return;
    }
    struct fault *f = stage_fault(s->r, FAULT_LOGITS, "logits: RMS error at most half of H's");
    snprintf(f->tensor, sizeof f->tensor, "logits");
    f->prompt = 0;
    f->expected = 0.5 * theirs;
    f->found = ours;
    fault_say(
        f,
        "logits: RMS error %.3g against T over %zu positions, Hugging Face's rounding has %.3g: %.2f of it, where "
        "at most 0.50 is right",
        ours, s->n_positions, theirs, ratio);
}

// What rounding to int8 costs, with all the types of weights that ask for it.
static void note_cost(struct stage *s, double kl) {
    bool used[DTYPE_COUNT] = {0};
    char names[128] = "";
    for (size_t i = 0; i < s->d->model->config.n_layers; i++) {
        const struct layer_weights *w = &s->d->model->layers[i];
        const struct matrix *all[] = {&w->wq, &w->wk, &w->wv, &w->wo, &w->w_gate, &w->w_up, &w->w_down};
        for (size_t k = 0; k < sizeof all / sizeof all[0]; k++)
            used[all[k]->type] |= ops_rounds_to_int8(ops_input_rule(s->d->ops, all[k]->type));
    }
    for (int type = 0; type < DTYPE_COUNT; type++) {
        size_t n = strlen(names);
        if (used[type])
            snprintf(names + n, sizeof names - n, "%s%s", n ? ", " : "", dtype_info((enum dtype)type)->name);
    }
    stage_note(s->r, "%s weights: rounding the input of their products to int8 costs a KL of %.3g", names, kl);
}

static void judge_totals(struct stage *s) {
    size_t n = s->n_positions, values = n * s->d->model->config.n_vocab;
    if (n == 0) return;
    double ours = sqrt(s->squares / (double)values), theirs = sqrt(s->squares_h / (double)values);
    double ratio = theirs > 0 ? ours / theirs : 0, mean_kl = mean(s->kl, n), mean_h = mean(s->kl_h, n);
    judge_ratio(s, ours, theirs);
    qsort(s->kl, n, sizeof *s->kl, by_size);
    qsort(s->kl_h, n, sizeof *s->kl_h, by_size);
    double p999 = quantile(s->kl, n, 0.999), p999_h = quantile(s->kl_h, n, 0.999);
    const struct figure figures[] = {{"positions", (double)n},
                                     {"logits_rms_error", ours},
                                     {"logits_rms_error_h", theirs},
                                     {"kl_mean", mean_kl},
                                     {"kl_p999", p999},
                                     {"kl_mean_h", mean_h},
                                     {"kl_p999_h", p999_h},
                                     {"top1_agreement", (double)s->n_agree / (double)n},
                                     {"top1_agreement_h", (double)s->n_agree_h / (double)n},
                                     {"ties", (double)s->n_ties}};
    for (size_t i = 0; i < sizeof figures / sizeof figures[0]; i++)
        stage_figure(s->r, figures[i].name, figures[i].value);
    (void)buffer_printf(&s->r->summary,
                        "%zu layers judged in place; %zu prompts, %zu positions: error %.2f of H's, KL %.2g (H %.2g), "
                        "best token %zu/%zu (H %zu)",
                        s->n_layers, s->n_prompts, n, ratio, mean_kl, mean_h, s->n_agree, n, s->n_agree_h);
    stage_note(s->r, "logits: RMS error %.3g, H %.3g; KL(T || ours) p99.9 %.3g, KL(T || H) p99.9 %.3g", ours, theirs,
               p999, p999_h);
    if (s->n_ties > SHOWN_TIES) stage_note(s->r, "%zu more ties", s->n_ties - SHOWN_TIES);
    if (s->to_int8) note_cost(s, mean_kl);
    else if (s->rounds_more_than_h)
        stage_note(s->r, "K and V in %s: rounding them costs a KL of %.3g", dtype_info(s->d->kv_type)->name, mean_kl);
}

// ---- The stage -----------------------------------------------------------------------------------------------------

// Most positions of a prompt: their logits, and the oracles' K and V, have to fit.
static size_t most_positions(const struct stage *s, const struct doctor_prompt *p) {
    size_t n = ((size_t)1 << 25) / s->d->model->config.n_vocab, cap = s->d->options.thorough ? 512 : 96;
    n = n > cap ? cap : n < 16 ? 16 : n;
    return p->n < n ? p->n : n;
}

bool stage_model(struct doctor *d, struct stage_report *r, struct error *err) {
    struct stage s = {.d = d, .r = r, .err = err};
    for (size_t i = 0; i < d->model->config.n_layers; i++)
        s.to_int8 = s.to_int8 || ops_rounds_to_int8(ops_input_rule(d->ops, d->model->layers[i].w_down.type)) ||
                    ops_rounds_to_int8(ops_input_rule(d->ops, d->model->layers[i].wq.type));
    s.rounds_more_than_h = s.to_int8 || dtype_info(d->kv_type)->is_quantised;
    double started = clock_seconds(), time = d->deadline - started;
    const struct doctor_prompt *first = &d->prompts[d->n_prompts > 2 ? 1 : 0];
    double end = d->deadline;
    d->deadline = doctor_model_is_small(d) ? INFINITY : started + 0.4 * time;
    bool ok = inspect_run(&s, first);
    d->deadline = end;
    ok = ok && check_fusion(&s, &d->prompts[0], d->model->config.n_layers * d->model->config.hidden > 20000 ? 37 : 77);
    if (d->ops->device) ok = ok && check_silent(&s, &d->prompts[0], d->options.budget < 10 ? 35 : 70);
    double left = d->deadline - clock_seconds();
    for (size_t i = 0; ok && i < d->n_prompts; i++)
        ok = check_logits(&s, &d->prompts[i], most_positions(&s, &d->prompts[i]),
                          clock_seconds() + left / (double)d->n_prompts);
    if (ok) judge_totals(&s);
    free(s.kl);
    free(s.kl_h);
    return ok;
}
