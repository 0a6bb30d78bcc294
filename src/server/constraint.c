// constraint.c: see constraint.h.
#include "server/constraint.h"

#include "base/size.h"
#include "server/masks.h"

#include <stdlib.h>
#include <string.h>

struct constraint {
    const struct tokenizer *tok;
    size_t think_budget;
    int32_t think_open, think_close, call_open; // -1: none
    struct masks *masks;
    struct cursor *cursor; // NULL: the form is free
    bool on_call;          // only between <tool_call> and </tool_call>
    bool active;
    bool may_think;
    size_t n_words;
    uint32_t *bits; // [n_words]
};

bool constraint_for(const struct generation *g, struct choice *c, struct error *err) {
    if (g->think_budget == SIZE_MAX && !g->automaton) return true;
    struct constraint *k = c->constraint = size_alloc_zero(1, sizeof *k);
    if (!k) return error_set(err, "out of memory");
    const tandem_engine *e = g->s->engine;
    k->tok = e->tokenizer;
    k->think_budget = g->think_budget;
    k->think_open = tokenizer_find(k->tok, "<think>");
    k->think_close = tokenizer_find(k->tok, "</think>");
    k->call_open = tokenizer_find(k->tok, "<tool_call>");
    k->may_think = g->may_think;
    k->n_words = (e->model->config.n_vocab + 31) / 32;
    k->bits = size_alloc(k->n_words, sizeof *k->bits);
    if (!k->bits) return error_set(err, "out of memory");
    if (!g->automaton) return true;
    k->masks = g->s->masks;
    k->on_call = g->constrains_calls;
    k->active = !k->on_call;
    k->cursor = cursor_create(g->automaton, err);
    return k->cursor != NULL;
}

void constraint_free(struct constraint *k) {
    if (!k) return;
    cursor_free(k->cursor);
    free(k->bits);
    free(k);
}

static void set_bit(struct constraint *k, int32_t id) {
    k->bits[id / 32] |= (uint32_t)1 << id % 32;
}

const uint32_t *constraint_mask(struct constraint *k, const struct choice *c) {
    if (c->thinking) {
        if (c->n_reasoning < k->think_budget || k->think_close < 0) return NULL;
        memset(k->bits, 0, k->n_words * sizeof *k->bits);
        set_bit(k, k->think_close);
        return k->bits;
    }
    if (!k->cursor || !k->active) return NULL;
    cursor_mask(k->cursor, k->bits);
    if (c->n_tokens == 0 && k->may_think && k->think_open >= 0) set_bit(k, k->think_open); // the thinking may begin
    return k->bits;
}

bool constraint_accept(struct constraint *k, int32_t id, bool thought) {
    if (thought || !k->cursor) return true;
    if (!k->active) {
        if (id == k->call_open) {
            cursor_reset(k->cursor);
            k->active = true;
        }
        return true;
    }
    size_t n = 0;
    const char *bytes = tokenizer_token_bytes(k->tok, id, &n);
    if (!tokenizer_is_special(k->tok, id)) cursor_accept(k->cursor, bytes, bytes ? n : 0);
    if (!cursor_only_end(k->cursor)) {
        masks_prepare(k->masks, k->cursor);
        return true;
    }
    if (!k->on_call) return false;
    k->active = false;
    return true;
}

const char *constraint_failed(const struct constraint *k) {
    return k->cursor ? cursor_failed(k->cursor) : NULL;
}
