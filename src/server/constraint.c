// constraint.c: see constraint.h.
#include "server/constraint.h"

#include "base/size.h"

#include <stdlib.h>
#include <string.h>

struct constraint {
    size_t think_budget;
    int32_t think_close; // -1: none
    size_t n_words;
    uint32_t *bits; // [n_words]
};

bool constraint_for(const struct generation *g, struct choice *c, struct error *err) {
    if (g->think_budget == SIZE_MAX) return true;
    struct constraint *k = c->constraint = size_alloc_zero(1, sizeof *k);
    if (!k) return error_set(err, "out of memory");
    const tandem_engine *e = g->s->engine;
    k->think_budget = g->think_budget;
    k->think_close = tokenizer_find(e->tokenizer, "</think>");
    k->n_words = (e->model->config.n_vocab + 31) / 32;
    k->bits = size_alloc(k->n_words, sizeof *k->bits);
    return k->bits || error_set(err, "out of memory");
}

void constraint_free(struct constraint *k) {
    if (!k) return;
    free(k->bits);
    free(k);
}

static const uint32_t *only(struct constraint *k, int32_t id) {
    memset(k->bits, 0, k->n_words * sizeof *k->bits);
    k->bits[id / 32] |= (uint32_t)1 << id % 32;
    return k->bits;
}

const uint32_t *constraint_mask(struct constraint *k, bool thinking, size_t n_reasoning) {
    if (thinking && n_reasoning >= k->think_budget && k->think_close >= 0) return only(k, k->think_close);
    return NULL;
}

void constraint_accept(struct constraint *k, int32_t id, bool thinking) {
    (void)k;
    (void)id;
    (void)thinking;
}
