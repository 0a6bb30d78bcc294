// tripwire.c: see tripwire.h.
//
// Which token to compute again: the first position that has a bad number in its K or V in any layer, since everything
// before it is good; or, if there is none, the last position, whose bad number arose behind its last K and V.
#include "engine/tripwire.h"

#include "base/size.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The first bad value that the taps of one step showed.
struct sighting {
    bool found;
    char name[24];
    int layer;
    size_t channel;
    float value;
};

static void watch(void *user, const char *name, int layer, const float *data, size_t n_rows, size_t n_columns) {
    struct sighting *s = user;
    for (size_t i = 0; !s->found && i < n_rows * n_columns; i++) {
        if (isfinite(data[i])) continue;
        *s = (struct sighting){.found = true, .layer = layer, .channel = i % n_columns, .value = data[i]};
        snprintf(s->name, sizeof s->name, "%s", name);
    }
}

// What a tap shows, as an op and what it works on.
static const char *op_of(const char *tap) {
    static const struct {
        const char *tap, *op;
    } ops[] = {
        {"embed", "embed"},
        {"attn_norm", "rmsnorm (the attention's norm)"},
        {"q", "matmul (the q projection)"},
        {"k", "matmul (the k projection)"},
        {"v", "matmul (the v projection)"},
        {"q_norm", "head_rmsnorm (q)"},
        {"k_norm", "head_rmsnorm (k)"},
        {"q_rope", "rope (q)"},
        {"k_rope", "rope (k)"},
        {"attn", "attention"},
        {"attn_out", "matmul (the output projection)"},
        {"resid_mid", "add (the residual after attention)"},
        {"mlp_norm", "rmsnorm (the MLP's norm)"},
        {"gate", "matmul (the gate projection)"},
        {"up", "matmul (the up projection)"},
        {"act", "silu_mul"},
        {"mlp_out", "matmul (the down projection)"},
        {"resid", "add (the residual after the MLP)"},
        {"final_norm", "rmsnorm (the final norm)"},
        {"logits", "matmul (the head)"},
    };
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++)
        if (strcmp(ops[i].tap, tap) == 0) return ops[i].op;
    return tap;
}

// ---- Stored K and V

// Where the rows of one position stand in a layer: [n_kv_heads] rows of row_bytes, `stride` bytes apart.
struct slot {
    unsigned char *k, *v;
    size_t row_bytes, stride;
};

static struct slot slot_of(const struct kv_layer *l, const struct tripwire_sequence *s, size_t position) {
    struct slot at = {0};
    if (!dtype_row_bytes(l->type, l->head_dim, &at.row_bytes)) return at;
    at.stride = KV_PAGE_TOKENS * at.row_bytes;
    size_t page = (size_t)s->pages[position / KV_PAGE_TOKENS];
    size_t offset = page * l->n_kv_heads * at.stride + position % KV_PAGE_TOKENS * at.row_bytes;
    at.k = (unsigned char *)l->k + offset;
    at.v = (unsigned char *)l->v + offset;
    return at;
}

static bool row_is_finite(enum dtype type, const unsigned char *row, size_t n) {
    enum { PIECE = 256 };
    float v[PIECE];
    const struct dtype_info *info = dtype_info(type);
    for (size_t at = 0; at < n; at += PIECE) {
        size_t piece = n - at < PIECE ? n - at : PIECE;
        dtype_to_f32(type, row + at / info->block_len * info->block_bytes, v, piece);
        for (size_t i = 0; i < piece; i++)
            if (!isfinite(v[i])) return false;
    }
    return true;
}

static bool stored_is_finite(const struct kv_layer *l, const struct tripwire_sequence *s, size_t position) {
    struct slot at = slot_of(l, s, position);
    for (size_t h = 0; h < l->n_kv_heads && at.k; h++)
        if (!row_is_finite(l->type, at.k + h * at.stride, l->head_dim) ||
            !row_is_finite(l->type, at.v + h * at.stride, l->head_dim))
            return false;
    return true;
}

// The first layer whose stored K or V of a position is bad, or -1.
static int bad_layer(const tandem_engine *e, const struct tripwire_sequence *s, size_t position) {
    for (size_t i = 0; i < e->kv.n_layers; i++)
        if (!stored_is_finite(&e->kv.layers[i], s, position)) return (int)i;
    return -1;
}

// Copies one position's K and V of all layers out of the pages, or back.
static void move_slots(const tandem_engine *e, const struct tripwire_sequence *s, size_t position, unsigned char *saved,
                       bool back) {
    for (size_t i = 0; i < e->kv.n_layers; i++) {
        const struct kv_layer *l = &e->kv.layers[i];
        struct slot at = slot_of(l, s, position);
        for (size_t h = 0; h < l->n_kv_heads && at.k; h++) {
            unsigned char *rows[] = {at.k + h * at.stride, at.v + h * at.stride};
            for (int r = 0; r < 2; r++, saved += at.row_bytes)
                memcpy(back ? rows[r] : saved, back ? saved : rows[r], at.row_bytes);
        }
    }
}

// ---- Computing one token again

static struct sighting run_position(tandem_engine *e, struct run *run, const struct tripwire_sequence *s,
                                    size_t position, uint32_t fusion) {
    int32_t token = s->ids[position], at = (int32_t)position, zero = 0, kv_len = at + 1;
    int32_t seq_start[] = {0, 1}, page_start[] = {0, (int32_t)(position / KV_PAGE_TOKENS + 1)};
    struct batch b = {.n_tokens = 1,
                      .n_seqs = 1,
                      .n_logit_rows = 1,
                      .token = &token,
                      .position = &at,
                      .seq = &zero,
                      .seq_start = seq_start,
                      .page_start = page_start,
                      .pages = s->pages,
                      .kv_len = &kv_len,
                      .logit_rows = &zero};
    struct sighting seen = {0};
    run_set_fusion(run, fusion);
    run_set_tap(run, watch, &seen);
    model_forward(e->model, run, &e->kv, &b);
    run_set_tap(run, NULL, NULL);
    return seen;
}

// The standard path was good: which fused op, alone, is not?
static bool find_fused(tandem_engine *e, struct run *run, const struct tripwire_sequence *s, size_t position,
                       struct error *err) {
    for (int op = 0; op < FUSED_COUNT; op++) {
        if (!(e->fusion >> op & 1) || !fusion_available(e->ops, (enum fused_op)op)) continue;
        struct sighting seen = run_position(e, run, s, position, 1u << op);
        bool stored = bad_layer(e, s, position) < 0;
        if (!seen.found && stored) continue;
        error_set(err,
                  "the fused op %s produced the first at position %zu%s%s; its primitives do not: run with "
                  "--fusion=off, and report it",
                  fusion_info((enum fused_op)op)->name, position, seen.found ? ", seen in " : "",
                  seen.found ? seen.name : "");
        return true;
    }
    return false;
}

static const char *what_is(float v) {
    return isnan(v) ? "NaN" : "Inf";
}

static void explain_position(tandem_engine *e, struct run *run, const struct tripwire_sequence *s, size_t position,
                             struct error *err) {
    char layer[32] = "", chunk[64] = "";
    struct sighting seen = run_position(e, run, s, position, 0);
    int stored = bad_layer(e, s, position); // by the standard path now
    bool before_store = seen.found && strcmp(seen.name, "attn") != 0 && seen.layer <= stored;
    if (position + 1 < s->n) snprintf(chunk, sizeof chunk, " (token %d)", s->ids[position]);
    if (stored >= 0 && !(seen.found && (seen.layer < stored || before_store))) {
        error_set(err, "kv_store produced the first in layer %d at position %zu: K and V were finite and are not as %s",
                  stored, position, dtype_info(e->kv.layers[stored].type)->name);
        return;
    }
    if (seen.found) {
        if (seen.layer >= 0) snprintf(layer, sizeof layer, " in layer %d", seen.layer);
        error_set(err, "%s produced the first%s at position %zu%s: %s in channel %zu of %s", op_of(seen.name), layer,
                  position, chunk, what_is(seen.value), seen.channel, seen.name);
        return;
    }
    if (!find_fused(e, run, s, position, err))
        error_set(err,
                  "computed again, position %zu is finite on every path: memory was overwritten, or the machine is at "
                  "fault",
                  position);
}

void tripwire_explain(tandem_engine *e, const struct tripwire_sequence *s, struct error *err) {
    if (e->kv.device) { // its pages are not the host's to look into
        error_set(err, "the logits for position %zu hold NaN or Inf: nothing was sampled, the KV was dropped", s->n);
        return;
    }
    struct run_options options = {
        .ops = e->ops, .pool = e->pool, .max_tokens = 1, .max_logit_rows = 1, .max_positions = e->context};
    size_t first = 0, row = 0, bytes = 0;
    struct run *run = NULL;
    unsigned char *saved = NULL;
    if (s->n > 0 && e->kv.n_layers > 0 && dtype_row_bytes(e->kv.layers[0].type, e->model->config.head_dim, &row) &&
        size_mul(2 * e->kv.n_layers * e->model->config.n_kv_heads, row, &bytes)) {
        run = run_create(e->model, &options, NULL);
        saved = size_alloc(bytes, 1);
    }
    if (run && saved) {
        while (first + 1 < s->n && bad_layer(e, s, first) < 0) first++;
        move_slots(e, s, first, saved, false);
        explain_position(e, run, s, first, err);
        move_slots(e, s, first, saved, true);
    } else {
        error_set(err, "no memory to find out which op");
    }
    error_prefix(
        err, "the logits for position %zu hold NaN or Inf: nothing was sampled, the sequence's KV was dropped; ", s->n);
    run_free(run);
    free(saved);
}
