// texts.c: see texts.h. Several languages and a length at once are the product of their automata.
#include "server/texts.h"

#include "base/size.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_PRODUCT = 60000, MAX_STEPS = 250000, MAX_BOTH = 600 };

struct text_part {
    const struct code_range *ranges; // [n]
    size_t n;
    uint32_t node;
};

struct place { // of the product: a state of each language, and the characters so far
    uint32_t at[MAX_LANGUAGES], count;
};

struct product {
    struct grammar *g;
    struct arena *arena;
    struct text_parts *parts;
    const struct text_form *form;
    uint32_t end;         // behind the closing quote
    struct place *places; // [n]
    uint32_t *nodes;      // [n] holes, filled one after the other
    size_t n;
    uint32_t *table; // [2 * MAX_PRODUCT] plus one; 0: empty
    struct error *err;
};

static bool too_large(struct product *p) {
    return error_set(p->err, "this takes too many places: more than %d for one string", MAX_PRODUCT);
}

// The grammar of one character of the set, going on at `next`.
static uint32_t one_of(struct product *p, const struct code_range *ranges, size_t n, uint32_t next) {
    struct grammar *g = p->g;
    uint32_t low = ranges[0].low, high = ranges[0].high;
    bool plain = n == 1 && low >= 0x20 && high < 0x80 && !(low <= '"' && '"' <= high) && !(low <= '\\' && '\\' <= high);
    if (plain) return grammar_bytes(g, (unsigned char)low, (unsigned char)high, next);
    struct text_parts *parts = p->parts;
    for (size_t i = 0; i < parts->n; i++)
        if (parts->list[i].n == n && memcmp(parts->list[i].ranges, ranges, n * sizeof *ranges) == 0)
            return grammar_call(g, parts->list[i].node, next);
    if (parts->n == parts->cap) {
        size_t cap = parts->cap ? 2 * parts->cap : 32;
        struct text_part *list = arena_alloc(p->arena, cap, sizeof *list);
        if (!list) {
            g->full = true;
            return 0;
        }
        if (parts->n) memcpy(list, parts->list, parts->n * sizeof *list);
        parts->list = list;
        parts->cap = cap;
    }
    struct code_range *copy = arena_alloc(p->arena, n, sizeof *copy);
    if (!copy) {
        g->full = true;
        return 0;
    }
    memcpy(copy, ranges, n * sizeof *copy);
    uint32_t node = grammar_code(g, copy, n, grammar_return(g));
    parts->list[parts->n++] = (struct text_part){copy, n, node};
    return grammar_call(g, node, next);
}

static size_t intersect(const struct code_range *a, size_t n_a, const struct code_set *b, struct code_range *out) {
    size_t n = 0;
    for (size_t i = 0, k = 0; i < n_a && k < b->n && n < MAX_BOTH;) {
        uint32_t low = a[i].low > b->ranges[k].low ? a[i].low : b->ranges[k].low;
        uint32_t high = a[i].high < b->ranges[k].high ? a[i].high : b->ranges[k].high;
        if (low <= high) out[n++] = (struct code_range){low, high};
        if (a[i].high < b->ranges[k].high) i++;
        else k++;
    }
    return n;
}

// The node of a place, which may be new. False: there are too many.
static bool node_of(struct product *p, const struct place *at, uint32_t *out) {
    uint64_t h = at->count;
    for (size_t i = 0; i < p->form->n_languages; i++) h = (h ^ at->at[i]) * 0x9E3779B97F4A7C15u, h ^= h >> 29;
    size_t slot = (h * 0x9E3779B97F4A7C15u >> 20) % (2 * MAX_PRODUCT);
    for (; p->table[slot]; slot = (slot + 1) % (2 * MAX_PRODUCT)) {
        size_t known = p->table[slot] - 1;
        if (memcmp(&p->places[known], at, sizeof *at) == 0) {
            *out = p->nodes[known];
            return true;
        }
    }
    if (p->n == MAX_PRODUCT) return too_large(p);
    p->places[p->n] = *at;
    *out = p->nodes[p->n] = grammar_hole(p->g);
    p->table[slot] = (uint32_t)++p->n;
    return !p->g->full || too_large(p);
}

struct ways { // that lead on from a place
    bool any;
    uint32_t node;
};

static void add_way(struct product *p, struct ways *w, uint32_t node) {
    w->node = w->any ? grammar_split(p->g, w->node, node) : node;
    w->any = true;
}

// Every character that all languages from `i` on allow too.
static bool add_edges(struct product *p, const struct place *from, size_t i, const struct code_range *ranges, size_t n,
                      struct place *to, struct ways *w) {
    if (++p->parts->steps > MAX_STEPS) return too_large(p);
    if (i == p->form->n_languages) {
        uint32_t node;
        if (!node_of(p, to, &node)) return false;
        add_way(p, w, one_of(p, ranges, n, node));
        return true;
    }
    const struct language_state *s = &p->form->languages[i]->states[from->at[i]];
    for (size_t e = 0; e < s->n; e++) {
        struct code_range both[MAX_BOTH];
        size_t n_both = intersect(ranges, n, s->edges[e].set, both);
        to->at[i] = s->edges[e].to;
        if (n_both && !add_edges(p, from, i + 1, both, n_both, to, w)) return false;
    }
    return true;
}

static bool fill_place(struct product *p, size_t index) {
    static const struct code_range all[] = {{0, 0xD7FF}, {0xE000, 0x10FFFF}};
    const struct text_form *f = p->form;
    struct place from = p->places[index], to = {.count = from.count + 1};
    struct ways w = {0};
    bool accepts = from.count >= f->min;
    for (size_t i = 0; i < f->n_languages; i++) accepts = accepts && f->languages[i]->states[from.at[i]].accepts;
    if (f->max == NO_LIMIT && to.count > f->min) to.count = f->min; // it only matters whether these are enough
    if (from.count < f->max && !add_edges(p, &from, 0, all, 2, &to, &w)) return false;
    if (accepts) add_way(p, &w, p->end);
    if (w.any) grammar_fill(p->g, p->nodes[index], w.node, w.node);
    return !p->g->full || too_large(p);
}

// Every choice of a first state of each language.
static bool add_starts(struct product *p, size_t i, struct place *at, struct ways *w) {
    uint32_t node;
    if (i == p->form->n_languages) {
        if (!node_of(p, at, &node)) return false;
        add_way(p, w, node);
        return true;
    }
    const struct language *l = p->form->languages[i];
    for (size_t k = 0; k < l->n_starts; k++) {
        at->at[i] = l->starts[k];
        if (!add_starts(p, i + 1, at, w)) return false;
    }
    return true;
}

bool text_compile(struct grammar *g, struct arena *arena, struct text_parts *parts, const struct text_form *form,
                  uint32_t next, uint32_t *out, struct error *err) {
    if (form->n_languages == 0) {
        *out = grammar_string(g, form->min, form->max, next);
        return true;
    }
    struct product p = {.g = g, .arena = arena, .parts = parts, .form = form, .err = err};
    struct place start = {.count = 0};
    struct ways w = {0};
    p.end = grammar_byte(g, '"', next);
    p.places = size_alloc(MAX_PRODUCT, sizeof *p.places);
    p.nodes = size_alloc(MAX_PRODUCT, sizeof *p.nodes);
    p.table = size_alloc_zero(2 * MAX_PRODUCT, sizeof *p.table);
    bool ok = (p.places && p.nodes && p.table) || error_set(err, "out of memory");
    ok = ok && add_starts(&p, 0, &start, &w);
    for (size_t i = 0; ok && i < p.n; i++) ok = fill_place(&p, i);
    if (ok) *out = grammar_byte(g, '"', w.any ? w.node : grammar_hole(g));
    free(p.places);
    free(p.nodes);
    free(p.table);
    return ok;
}

bool text_has(const struct text_form *form, const char *text, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)text[i] & 0xC0) != 0x80;
    bool ok = count >= form->min && count <= form->max;
    for (size_t i = 0; ok && i < form->n_languages; i++) ok = language_has(form->languages[i], text, n);
    return ok;
}
