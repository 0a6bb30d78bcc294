// automaton.c: see automaton.h.
#include "server/automaton.h"

#include "base/size.h"
#include "server/jsonscan.h"

#include <stdlib.h>
#include <string.h>

// ---- Grammars

static uint32_t add(struct grammar *g, struct node node) {
    if (g->n == g->cap && !g->full) {
        size_t cap = g->cap ? 2 * g->cap : 256;
        struct node *nodes = cap <= 2 * MAX_NODES ? size_realloc(g->nodes, cap, sizeof *nodes) : NULL;
        if (nodes) {
            g->nodes = nodes;
            g->cap = cap;
        }
    }
    if (g->full || g->n == g->cap || g->n >= MAX_NODES) {
        g->full = true;
        return 0;
    }
    g->nodes[g->n] = node;
    return (uint32_t)g->n++;
}

uint32_t grammar_accept(struct grammar *g) {
    return add(g, (struct node){.kind = NODE_ACCEPT});
}

uint32_t grammar_bytes(struct grammar *g, unsigned char low, unsigned char high, uint32_t next) {
    return add(g, (struct node){.kind = NODE_BYTES, .low = low, .high = high, .next = next});
}

uint32_t grammar_split(struct grammar *g, uint32_t a, uint32_t b) {
    return add(g, (struct node){.kind = NODE_SPLIT, .next = a, .other = b});
}

uint32_t grammar_json(struct grammar *g, bool object, uint32_t next) {
    return add(g, (struct node){.kind = object ? NODE_JSON_OBJECT : NODE_JSON, .next = next});
}

uint32_t grammar_text(struct grammar *g, const char *text, size_t n, uint32_t next) {
    while (n > 0) next = grammar_bytes(g, (unsigned char)text[n - 1], (unsigned char)text[n - 1], next), n--;
    return next;
}

uint32_t grammar_hole(struct grammar *g) {
    return grammar_split(g, 0, 0);
}

void grammar_fill(struct grammar *g, uint32_t hole, uint32_t a, uint32_t b) {
    if (g->full) return;
    g->nodes[hole].next = a;
    g->nodes[hole].other = b;
}

void grammar_free(struct grammar *g) {
    free(g->nodes);
    *g = (struct grammar){0};
}

// ---- The vocabulary

struct entry {
    const char *bytes;
    size_t n;
    int32_t id;
    size_t common; // bytes that it shares with the entry before it
    bool call;     // <tool_call> or </tool_call>
};

struct vocabulary {
    struct entry *entries; // [n] in the order of their bytes
    size_t n, n_vocab, longest;
    int32_t *end_ids;
    size_t n_end_ids;
};

static int compare(const void *a, const void *b) {
    const struct entry *x = a, *y = b;
    int order = memcmp(x->bytes, y->bytes, x->n < y->n ? x->n : y->n);
    if (order) return order;
    return x->n != y->n ? (x->n > y->n) - (x->n < y->n) : (x->id > y->id) - (x->id < y->id);
}

// Tokens that mark the structure of a chat are no text, whatever bytes they show.
static bool is_mark(const char *bytes, size_t n) {
    static const char *const marks[] = {"<think>", "</think>", "<tool_response>", "</tool_response>"};
    for (size_t i = 0; i < sizeof marks / sizeof marks[0]; i++)
        if (strlen(marks[i]) == n && memcmp(bytes, marks[i], n) == 0) return true;
    return false;
}

struct vocabulary *vocabulary_create(const struct tokenizer *tok, size_t n_vocab, const int32_t *end_ids,
                                     size_t n_end_ids, struct error *err) {
    struct vocabulary *v = size_alloc_zero(1, sizeof *v);
    if (v) v->entries = size_alloc(n_vocab, sizeof *v->entries);
    if (v) v->end_ids = size_alloc(n_end_ids, sizeof *v->end_ids);
    if (!v || !v->entries || !v->end_ids) {
        error_set(err, "out of memory for the order of %zu tokens", n_vocab);
        vocabulary_free(v);
        return NULL;
    }
    v->n_vocab = n_vocab;
    v->n_end_ids = n_end_ids;
    for (size_t i = 0; i < n_end_ids; i++) v->end_ids[i] = end_ids[i];
    for (int32_t id = 0; (size_t)id < n_vocab; id++) {
        size_t n = 0;
        const char *bytes = tokenizer_token_bytes(tok, id, &n);
        if (!bytes || n == 0 || tokenizer_is_special(tok, id) || is_mark(bytes, n)) continue;
        bool call =
            (n == 11 && memcmp(bytes, "<tool_call>", n) == 0) || (n == 12 && memcmp(bytes, "</tool_call>", n) == 0);
        v->entries[v->n++] = (struct entry){.bytes = bytes, .n = n, .id = id, .call = call};
        if (n > v->longest) v->longest = n;
    }
    qsort(v->entries, v->n, sizeof *v->entries, compare);
    for (size_t i = 1; i < v->n; i++) {
        struct entry *a = &v->entries[i - 1], *b = &v->entries[i];
        while (b->common < a->n && b->common < b->n && a->bytes[b->common] == b->bytes[b->common]) b->common++;
    }
    return v;
}

void vocabulary_free(struct vocabulary *v) {
    if (!v) return;
    free(v->entries);
    free(v->end_ids);
    free(v);
}

// ---- States

enum { MAX_STATES = 16384, MAX_MASKS = 256, MAX_THREADS = 2048, MAX_SPACE = 20, DEAD = -1, UNKNOWN = -2 };
static const uint64_t MAX_WORK = 400000000; // steps of threads, in the life of an automaton

struct thread { // a node that waits for a byte; NODE_JSON: with what it has read
    uint32_t node;
    uint32_t spaces; // in a row
    struct jsonscan scan;
};

struct state {
    struct thread *threads; // [n], in order
    size_t n;
    uint64_t hash;
    bool accepts;
    int32_t next[256]; // states, DEAD, UNKNOWN
    uint32_t *mask;    // NULL: not asked for yet
};

struct automaton {
    const struct vocabulary *v;
    struct grammar g;
    bool calls;
    struct state *states; // [n_states]
    size_t n_states, cap_states, n_masks;
    int32_t *table; // [2 * MAX_STATES] by hash; -1: empty
    int32_t now;
    struct thread *set; // [MAX_THREADS] a set in the making
    size_t n_set;
    bool set_accepts, set_full;
    uint32_t *mark; // [g.n] == round: node is in the set already
    uint32_t round;
    int32_t *path; // [v->longest + 1]
    uint32_t *only_end;
    uint64_t work;
    const char *failed;
};

void automaton_free(struct automaton *a) {
    if (!a) return;
    for (size_t i = 0; i < a->n_states; i++) {
        free(a->states[i].threads);
        free(a->states[i].mask);
    }
    free(a->states);
    free(a->table);
    free(a->set);
    free(a->mark);
    free(a->path);
    free(a->only_end);
    grammar_free(&a->g);
    free(a);
}

static void set_begin(struct automaton *a) {
    a->n_set = 0;
    a->set_accepts = a->set_full = false;
    a->round++;
}

static void set_add(struct automaton *a, struct thread t) {
    if (a->n_set == MAX_THREADS) a->set_full = true;
    else a->set[a->n_set++] = t;
}

// All nodes that wait for a byte, from `node` on. The stack holds each node once.
static void set_follow(struct automaton *a, uint32_t node) {
    uint32_t stack[1024];
    size_t n = 0;
    stack[n++] = node;
    while (n > 0) {
        uint32_t at = stack[--n];
        a->work++;
        if (a->mark[at] == a->round) continue;
        a->mark[at] = a->round;
        const struct node *p = &a->g.nodes[at];
        if (p->kind == NODE_ACCEPT) {
            a->set_accepts = true;
        } else if (p->kind == NODE_SPLIT) {
            if (n + 2 > sizeof stack / sizeof stack[0]) {
                a->set_full = true;
                return;
            }
            stack[n++] = p->next;
            stack[n++] = p->other;
        } else {
            set_add(a, (struct thread){.node = at});
        }
    }
}

static uint64_t hash_set(const struct automaton *a) {
    uint64_t h = a->set_accepts;
    const unsigned char *bytes = (const unsigned char *)a->set;
    for (size_t i = 0; i < a->n_set * sizeof *a->set; i += 8) {
        uint64_t word;
        memcpy(&word, bytes + i, 8);
        h = (h ^ word) * 0x9E3779B97F4A7C15u;
        h ^= h >> 29;
    }
    return h;
}

static bool same_set(const struct automaton *a, const struct state *s, uint64_t hash) {
    return s->hash == hash && s->n == a->n_set && s->accepts == a->set_accepts &&
           memcmp(s->threads, a->set, a->n_set * sizeof *a->set) == 0;
}

static int32_t add_state(struct automaton *a, uint64_t hash) {
    if (a->n_states == a->cap_states) {
        size_t cap = a->cap_states ? 2 * a->cap_states : 64;
        struct state *states = size_realloc(a->states, cap, sizeof *states);
        if (!states) return DEAD;
        a->states = states;
        a->cap_states = cap;
    }
    struct state *s = &a->states[a->n_states];
    *s = (struct state){.n = a->n_set, .hash = hash, .accepts = a->set_accepts};
    s->threads = size_alloc(a->n_set, sizeof *s->threads);
    if (!s->threads) return DEAD;
    memcpy(s->threads, a->set, a->n_set * sizeof *s->threads);
    for (int i = 0; i < 256; i++) s->next[i] = UNKNOWN;
    return (int32_t)a->n_states++;
}

// The state of the set in the making. DEAD: it is empty, or the automaton failed.
static int32_t set_state(struct automaton *a) {
    if (a->set_full || a->work > MAX_WORK || a->n_states >= MAX_STATES) {
        if (a->n_states < MAX_STATES) a->failed = "the schema takes too much time: simplify it";
        else a->failed = "the schema has too many states: simplify it";
        return DEAD;
    }
    if (a->n_set == 0 && !a->set_accepts) return DEAD;
    uint64_t hash = hash_set(a);
    size_t slot = hash % (2 * MAX_STATES);
    for (; a->table[slot] >= 0; slot = (slot + 1) % (2 * MAX_STATES))
        if (same_set(a, &a->states[a->table[slot]], hash)) return a->table[slot];
    int32_t made = add_state(a, hash);
    if (made < 0) a->failed = "out of memory";
    else a->table[slot] = made;
    return made;
}

static bool is_space(unsigned char c) {
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

// A thread inside any JSON reads a byte.
static void step_json(struct automaton *a, const struct thread *t, unsigned char c) {
    const struct node *p = &a->g.nodes[t->node];
    struct thread next = *t;
    bool fresh = t->scan.state == SCAN_VALUE && t->scan.depth == 0;
    if (fresh && (is_space(c) || (p->kind == NODE_JSON_OBJECT && c != '{'))) return;
    bool in_string = t->scan.state >= SCAN_STRING && t->scan.state <= SCAN_UTF8;
    next.spaces = !in_string && is_space(c) ? t->spaces + 1 : 0;
    if (next.spaces > MAX_SPACE || !jsonscan_feed(&next.scan, c)) return;
    uint8_t s = next.scan.state;
    if (s == SCAN_DONE) {
        if (t->scan.state == SCAN_DONE || is_space(c)) return; // a number that ended: it went on elsewhere already
        set_follow(a, p->next);
        return;
    }
    set_add(a, next);
    if (next.scan.depth == 0 && (s == SCAN_ZERO || s == SCAN_DIGITS || s == SCAN_FRACTION || s == SCAN_EXPONENT))
        set_follow(a, p->next);
}

static int32_t step(struct automaton *a, int32_t from, unsigned char c) {
    int32_t known = a->states[from].next[c];
    if (known != UNKNOWN) return known;
    set_begin(a);
    for (size_t i = 0; i < a->states[from].n; i++) {
        const struct thread *t = &a->states[from].threads[i];
        const struct node *p = &a->g.nodes[t->node];
        a->work++;
        if (p->kind != NODE_BYTES) step_json(a, t, c);
        else if (c >= p->low && c <= p->high) set_follow(a, p->next);
    }
    int32_t to = set_state(a);
    a->states[from].next[c] = to;
    return to;
}

// Forgets every state but the current one, which becomes the only one.
static void forget(struct automaton *a) {
    struct state keep = a->states[a->now];
    for (size_t i = 0; i < a->n_states; i++) {
        free(a->states[i].mask);
        if ((int32_t)i != a->now) free(a->states[i].threads);
    }
    for (size_t i = 0; i < 2 * MAX_STATES; i++) a->table[i] = -1;
    keep.mask = NULL;
    for (int i = 0; i < 256; i++) keep.next[i] = UNKNOWN;
    a->states[0] = keep;
    a->n_states = 1;
    a->n_masks = 0;
    a->now = 0;
    a->table[keep.hash % (2 * MAX_STATES)] = 0;
}

// ---- Running

void automaton_reset(struct automaton *a) {
    if (a->failed) return;
    if (a->n_states > MAX_STATES / 2) forget(a);
    set_begin(a);
    set_follow(a, a->g.start);
    a->now = set_state(a);
}

struct automaton *automaton_create(const struct vocabulary *v, struct grammar *g, bool calls, struct error *err) {
    struct automaton *a = size_alloc_zero(1, sizeof *a);
    if (!a) {
        grammar_free(g);
        error_set(err, "out of memory");
        return NULL;
    }
    a->v = v;
    a->g = *g;
    a->calls = calls;
    *g = (struct grammar){0};
    a->table = size_alloc(2 * MAX_STATES, sizeof *a->table);
    a->set = size_alloc_zero(MAX_THREADS, sizeof *a->set);
    a->mark = size_alloc_zero(a->g.n, sizeof *a->mark);
    a->path = size_alloc(v->longest + 1, sizeof *a->path);
    a->only_end = size_alloc_zero((v->n_vocab + 31) / 32, sizeof *a->only_end);
    bool ok = a->table && a->set && a->mark && a->path && a->only_end;
    if (!ok) error_set(err, "out of memory");
    for (size_t i = 0; ok && i < 2 * MAX_STATES; i++) a->table[i] = -1;
    for (size_t i = 0; ok && i < v->n_end_ids; i++)
        a->only_end[v->end_ids[i] / 32] |= (uint32_t)1 << v->end_ids[i] % 32;
    if (ok) {
        automaton_reset(a);
        if (a->failed) ok = error_set(err, "%s", a->failed);
    }
    if (ok) return a;
    automaton_free(a);
    return NULL;
}

static bool fill_mask(struct automaton *a, uint32_t *mask) {
    const struct vocabulary *v = a->v;
    size_t alive = 0; // path[0..alive] are states
    bool any = false;
    a->path[0] = a->now;
    for (size_t i = 0; i < v->n && !a->failed; i++) {
        const struct entry *e = &v->entries[i];
        if (e->common < alive) alive = e->common;
        else if (e->common > alive) continue; // the prefix that it shares is dead
        while (alive < e->n) {
            int32_t next = step(a, a->path[alive], (unsigned char)e->bytes[alive]);
            if (next < 0) break;
            a->path[++alive] = next;
        }
        if (alive < e->n || (e->call && !a->calls)) continue;
        mask[e->id / 32] |= (uint32_t)1 << e->id % 32;
        any = true;
    }
    return any;
}

const uint32_t *automaton_mask(struct automaton *a) {
    if (a->failed || a->now < 0) return a->only_end;
    if (a->n_states > MAX_STATES / 2 || a->n_masks >= MAX_MASKS) forget(a);
    struct state *s = &a->states[a->now];
    if (s->mask) return s->mask;
    size_t n_words = (a->v->n_vocab + 31) / 32;
    uint32_t *mask = size_alloc_zero(n_words, sizeof *mask);
    if (!mask) {
        a->failed = "out of memory";
        return a->only_end;
    }
    bool any = fill_mask(a, mask);
    if (a->failed) {
        free(mask);
        return a->only_end;
    }
    s = &a->states[a->now]; // the list may have moved
    if (s->accepts || !any)
        for (size_t i = 0; i < n_words; i++) mask[i] |= a->only_end[i];
    s->mask = mask;
    a->n_masks++;
    return mask;
}

bool automaton_accept(struct automaton *a, const char *bytes, size_t n) {
    if (!a->failed && a->n_states > MAX_STATES / 2 && a->now >= 0) forget(a);
    for (size_t i = 0; i < n && a->now >= 0 && !a->failed; i++) a->now = step(a, a->now, (unsigned char)bytes[i]);
    return a->now >= 0 && !a->failed;
}

bool automaton_complete(struct automaton *a) {
    return !a->failed && a->now >= 0 && a->states[a->now].accepts;
}

bool automaton_only_end(struct automaton *a) {
    return automaton_complete(a) && a->states[a->now].n == 0;
}

const char *automaton_failed(const struct automaton *a) {
    return a->failed;
}
