// automaton.c: see automaton.h. It owns the states and their masks; what a grammar means is in grammar.h.
#include "server/automaton.h"

#include "base/size.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_STATES = 8192,
    MAX_MASKS = 256,
    MAX_THREADS = 2048,
    MAX_FRAMES = 1 << 18,
    MAX_VISITS = 8192, // places that one byte leads to
    DEAD = -1,
    UNKNOWN = -2
};
static const uint64_t MAX_WORK = 60000000; // steps of threads for one mask or one text

static const char TOO_LONG[] = "the schema takes too much time: simplify it";
static const char TOO_MANY[] = "the schema has too many states: simplify it";
static const char NO_MEMORY[] = "out of memory";

struct frame { // where a call returns to, or a repetition goes on; frame 0: nowhere
    uint32_t node, count, parent, depth;
};

struct thread { // a node that waits for a byte, and its stack
    uint32_t node, stack;
};

struct state {
    uint64_t hash;
    uint32_t *mask; // NULL: not made, or forgotten
    size_t n;
    int32_t same; // the state that stands for all with the same mask; UNKNOWN
    bool accepts, filling;
    int32_t next[256]; // states, DEAD, UNKNOWN
    struct thread threads[];
};

struct visit {
    uint32_t round;
    struct thread at;
};

struct cursor {
    struct automaton *a;
    struct cursor *prev, *next;
    int32_t now;
};

struct automaton {
    const struct vocabulary *v;
    bool calls;
    struct grammar g;
    uint8_t *needs; // [g.n]
    atomic_int refs, waiting;
    pthread_mutex_t lock; // guards all below
    pthread_cond_t filled;
    struct cursor *cursors;
    uint64_t generation; // of the states: they change at once, in forget()
    struct state **states;
    size_t n_states, n_masks, n_fillers, n_threads;
    int32_t *table; // [2 * MAX_STATES] by hash; -1: empty
    struct frame *frames;
    size_t n_frames, cap_frames;
    uint32_t *frame_table; // [2 * cap_frames] 0: empty
    struct thread *set;    // [MAX_THREADS] a set in the making
    size_t n_set;
    bool set_accepts, set_full;
    struct visit *visits; // [2 * MAX_VISITS] of this round
    uint32_t round;
    size_t n_visits;
    struct thread *stack; // [MAX_VISITS] places to go on from
    uint64_t work;
    const char *failed;
};

// ---- The lock: who makes a mask gives it to whoever waits

static void lock(struct automaton *a) {
    atomic_fetch_add(&a->waiting, 1);
    pthread_mutex_lock(&a->lock);
    atomic_fetch_sub(&a->waiting, 1);
}

static void unlock(struct automaton *a) {
    pthread_mutex_unlock(&a->lock);
}

static void let_others(struct automaton *a) {
    if (atomic_load(&a->waiting) == 0) return;
    unlock(a);
    for (int i = 0; i < 100 && atomic_load(&a->waiting) > 0; i++) sched_yield();
    pthread_mutex_lock(&a->lock);
}

// ---- Stacks

static size_t frame_slot(const struct automaton *a, const struct frame *f) {
    uint64_t h = (f->node * 0x9E3779B97F4A7C15u) ^ (f->count * 0xC2B2AE3D27D4EB4Fu) ^ (f->parent * 0x165667B19E3779F9u);
    h ^= h >> 29;
    size_t slot = (h * 0x9E3779B97F4A7C15u >> 20) % (2 * a->cap_frames);
    for (; a->frame_table[slot]; slot = (slot + 1) % (2 * a->cap_frames)) {
        const struct frame *known = &a->frames[a->frame_table[slot]];
        if (known->node == f->node && known->count == f->count && known->parent == f->parent) break;
    }
    return slot;
}

static bool grow_frames(struct automaton *a) {
    size_t cap = a->cap_frames ? 2 * a->cap_frames : 256;
    struct frame *frames = cap <= MAX_FRAMES ? size_realloc(a->frames, cap, sizeof *frames) : NULL;
    if (frames) a->frames = frames;
    uint32_t *table = frames ? size_alloc_zero(2 * cap, sizeof *table) : NULL;
    if (!table) {
        a->failed = cap > MAX_FRAMES ? TOO_MANY : NO_MEMORY;
        return false;
    }
    free(a->frame_table);
    a->frame_table = table;
    a->cap_frames = cap;
    if (a->n_frames == 0) a->frames[a->n_frames++] = (struct frame){0};
    for (size_t i = 1; i < a->n_frames; i++) table[frame_slot(a, &a->frames[i])] = (uint32_t)i;
    return true;
}

// 0 where there is no memory, and the automaton has failed.
static uint32_t push(struct automaton *a, uint32_t node, uint32_t count, uint32_t parent) {
    if (a->n_frames == a->cap_frames && !grow_frames(a)) return 0;
    struct frame f = {node, count, parent, a->frames[parent].depth + 1};
    size_t slot = frame_slot(a, &f);
    if (a->frame_table[slot]) return a->frame_table[slot];
    a->frames[a->n_frames] = f;
    a->frame_table[slot] = (uint32_t)a->n_frames;
    return (uint32_t)a->n_frames++;
}

// ---- Sets of threads

static void set_begin(struct automaton *a) {
    a->n_set = a->n_visits = 0;
    a->set_accepts = a->set_full = false;
    a->round++;
}

// Is this the first time in this set?
static bool visit(struct automaton *a, struct thread t) {
    uint64_t h = ((uint64_t)t.node << 32 | t.stack) * 0x9E3779B97F4A7C15u;
    size_t slot = (h >> 40) % (2 * (size_t)MAX_VISITS);
    for (;; slot = (slot + 1) % (2 * (size_t)MAX_VISITS)) {
        struct visit *v = &a->visits[slot];
        if (v->round != a->round) {
            if (a->n_visits == MAX_VISITS) {
                a->set_full = true;
                return false;
            }
            a->n_visits++;
            *v = (struct visit){a->round, t};
            return true;
        }
        if (v->at.node == t.node && v->at.stack == t.stack) return false;
    }
}

static void set_add(struct automaton *a, struct thread t) {
    if (a->n_set == MAX_THREADS) a->set_full = true;
    else a->set[a->n_set++] = t;
}

static void go(struct automaton *a, size_t *n, uint32_t node, uint32_t stack) {
    struct thread t = {node, stack};
    // What cannot end within the depth that is left is not begun, so that every text can be completed.
    if (a->needs[node] == UINT8_MAX || a->frames[stack].depth + a->needs[node] > MAX_STACK) return;
    if (visit(a, t)) a->stack[(*n)++] = t;
}

// A repetition that was made `count` times.
static void go_repeat(struct automaton *a, size_t *n, uint32_t node, uint32_t count, uint32_t stack) {
    const struct node *p = &a->g.nodes[node];
    const struct repeat *r = &a->g.repeats[p->other];
    if (r->max == NO_LIMIT && count > r->min) count = r->min; // it only matters whether these are enough
    if (count >= r->min) go(a, n, p->next, stack);
    if (count < r->max) go(a, n, r->body, push(a, node, count, stack));
}

// Adds all nodes that wait for a byte, from `node` on.
static void set_follow(struct automaton *a, uint32_t node, uint32_t stack) {
    size_t n = 0;
    go(a, &n, node, stack);
    while (n > 0 && !a->set_full && !a->failed) {
        struct thread t = a->stack[--n];
        const struct node *p = &a->g.nodes[t.node];
        const struct frame *f = &a->frames[t.stack];
        a->work++;
        switch ((enum node_kind)p->kind) {
        case NODE_BYTES: set_add(a, t); break;
        case NODE_ACCEPT: a->set_accepts = true; break;
        case NODE_SPLIT:
            go(a, &n, p->other, t.stack);
            go(a, &n, p->next, t.stack);
            break;
        case NODE_CALL: go(a, &n, p->other, push(a, t.node, 0, t.stack)); break;
        case NODE_REPEAT: go_repeat(a, &n, t.node, 0, t.stack); break;
        case NODE_RETURN:
            if (t.stack == 0) break;
            if (a->g.nodes[f->node].kind == NODE_CALL) go(a, &n, a->g.nodes[f->node].next, f->parent);
            else go_repeat(a, &n, f->node, f->count + 1, f->parent);
            break;
        }
    }
}

// ---- States

static uint64_t hash_set(const struct automaton *a) {
    uint64_t h = a->set_accepts;
    for (size_t i = 0; i < a->n_set; i++) {
        h = (h ^ ((uint64_t)a->set[i].node << 32 | a->set[i].stack)) * 0x9E3779B97F4A7C15u;
        h ^= h >> 29;
    }
    return h;
}

static int32_t add_state(struct automaton *a, uint64_t hash, size_t slot) {
    struct state *s = malloc(sizeof *s + a->n_set * sizeof *s->threads);
    if (!s) {
        a->failed = NO_MEMORY;
        return DEAD;
    }
    s->hash = hash;
    s->mask = NULL;
    s->n = a->n_set;
    s->same = UNKNOWN;
    s->accepts = a->set_accepts;
    s->filling = false;
    for (int i = 0; i < 256; i++) s->next[i] = UNKNOWN;
    memcpy(s->threads, a->set, a->n_set * sizeof *a->set);
    a->states[a->n_states] = s;
    a->n_threads += s->n;
    a->table[slot] = (int32_t)a->n_states;
    return (int32_t)a->n_states++;
}

// The state of the set in the making.
static int32_t set_state(struct automaton *a) {
    if (a->failed) return DEAD;
    if (a->set_full || a->n_states == MAX_STATES) a->failed = TOO_MANY;
    if (a->work > MAX_WORK) a->failed = TOO_LONG;
    if (a->failed || (a->n_set == 0 && !a->set_accepts)) return DEAD;
    uint64_t hash = hash_set(a);
    size_t slot = hash % (2 * MAX_STATES);
    for (; a->table[slot] >= 0; slot = (slot + 1) % (2 * MAX_STATES)) {
        const struct state *s = a->states[a->table[slot]];
        if (s->hash == hash && s->n == a->n_set && s->accepts == a->set_accepts &&
            memcmp(s->threads, a->set, a->n_set * sizeof *a->set) == 0)
            return a->table[slot];
    }
    return add_state(a, hash, slot);
}

static int32_t make_step(struct automaton *a, int32_t from, unsigned char c) {
    struct state *s = a->states[from];
    set_begin(a);
    for (size_t i = 0; i < s->n; i++) {
        const struct node *p = &a->g.nodes[s->threads[i].node];
        a->work++;
        if (c >= p->low && c <= p->high) set_follow(a, p->next, s->threads[i].stack);
    }
    return s->next[c] = set_state(a);
}

static inline int32_t step(struct automaton *a, int32_t from, unsigned char c) {
    int32_t known = a->states[from]->next[c];
    return known != UNKNOWN ? known : make_step(a, from, c);
}

static int32_t start_state(struct automaton *a) {
    set_begin(a);
    set_follow(a, a->g.start, 0);
    return set_state(a);
}

static void drop_masks(struct automaton *a) {
    for (size_t i = 0; i < a->n_states; i++) {
        if (a->states[i]->filling) continue;
        free(a->states[i]->mask);
        a->states[i]->mask = NULL;
    }
    a->n_masks = a->n_fillers;
}

static uint32_t move_stack(struct automaton *a, const struct frame *old, uint32_t stack) {
    if (stack == 0) return 0;
    uint32_t parent = move_stack(a, old, old[stack].parent);
    return push(a, old[stack].node, old[stack].count, parent);
}

// Forgets every state where no cursor is.
static void forget(struct automaton *a) {
    struct state **old = a->states;
    struct frame *old_frames = a->frames;
    size_t n_old = a->n_states;
    a->states = size_alloc_zero(MAX_STATES, sizeof *a->states);
    free(a->frame_table);
    a->frames = NULL;
    a->frame_table = NULL;
    a->n_frames = a->cap_frames = a->n_states = a->n_masks = a->n_threads = 0;
    a->generation++;
    for (size_t i = 0; i < 2 * MAX_STATES; i++) a->table[i] = -1;
    if (!a->states) a->failed = NO_MEMORY;
    else grow_frames(a);
    for (struct cursor *c = a->cursors; c; c = c->next) {
        if (c->now < 0) continue;
        if (a->failed) {
            c->now = DEAD;
            continue;
        }
        const struct state *s = old[c->now];
        set_begin(a);
        a->set_accepts = s->accepts;
        for (size_t i = 0; i < s->n; i++)
            set_add(a, (struct thread){s->threads[i].node, move_stack(a, old_frames, s->threads[i].stack)});
        c->now = set_state(a);
    }
    for (size_t i = 0; i < n_old; i++) {
        free(old[i]->mask);
        free(old[i]);
    }
    free(old);
    free(old_frames);
}

// At the beginning of what may make states.
static void begin_work(struct automaton *a) {
    a->work = 0;
    if (a->n_fillers || a->failed) return;
    if (a->n_states > MAX_STATES / 2 || a->n_frames > MAX_FRAMES / 2) forget(a);
}

// ---- Masks

// A counter that is far from its bounds, further than a token is long, is as good as any other such.
static uint32_t far_count(const struct automaton *a, const struct frame *f) {
    const struct node *p = &a->g.nodes[f->node];
    if (p->kind != NODE_REPEAT) return 0;
    const struct repeat *r = &a->g.repeats[p->other];
    uint32_t reach = (uint32_t)a->v->longest + 1;
    if (f->count < r->min) return r->min - f->count > reach ? r->min - reach - 1 : f->count;
    if (r->max == NO_LIMIT || r->max - f->count <= reach) return f->count;
    return r->max - reach - 1;
}

static uint32_t far_stack(struct automaton *a, uint32_t stack) {
    if (stack == 0) return 0;
    struct frame f = a->frames[stack];
    uint32_t parent = far_stack(a, f.parent), count = far_count(a, &f);
    return parent == f.parent && count == f.count ? stack : push(a, f.node, count, parent);
}

// The state whose mask is that of this one too.
static int32_t same_mask(struct automaton *a, int32_t at) {
    const struct state *s = a->states[at];
    if (s->same != UNKNOWN) return s->same;
    set_begin(a);
    a->set_accepts = s->accepts;
    for (size_t i = 0; i < s->n && !a->failed; i++) {
        struct thread t = {s->threads[i].node, far_stack(a, s->threads[i].stack)};
        if (visit(a, t)) set_add(a, t);
    }
    int32_t same = set_state(a);
    if (same < 0) return DEAD;
    return a->states[at]->same = same;
}

static bool fill_mask(struct automaton *a, int32_t from, uint32_t *mask) {
    const struct vocabulary *v = a->v;
    int32_t path[MAX_TOKEN + 1];
    bool any = false;
    path[0] = from;
    for (size_t i = 0, ticks = 0; i < v->n && !a->failed; ticks++) {
        const struct branch *b = &v->branches[i];
        int32_t next = step(a, path[b->depth], b->byte);
        if (ticks % 4096 == 4095) let_others(a);
        if (next < 0) {
            i = b->end;
            continue;
        }
        path[b->depth + 1] = next;
        i++;
        if (b->id < 0 || (b->call && !a->calls)) continue;
        mask[b->id / 32] |= (uint32_t)1 << b->id % 32;
        any = true;
    }
    return any;
}

static void make_mask(struct automaton *a, struct state *s, int32_t at) {
    if (a->n_masks >= MAX_MASKS) drop_masks(a);
    uint32_t *mask = size_alloc_zero(a->v->n_words + 1, sizeof *mask);
    if (!mask) {
        a->failed = NO_MEMORY;
        return;
    }
    s->filling = true;
    a->n_fillers++;
    a->n_masks++;
    bool any = fill_mask(a, at, mask);
    if (s->accepts || !any)
        for (size_t i = 0; i < a->v->n_words; i++) mask[i] |= a->v->only_end[i];
    s->mask = mask;
    s->filling = false;
    a->n_fillers--;
    pthread_cond_broadcast(&a->filled);
}

// NULL: the automaton has failed. Valid while it is locked.
static const uint32_t *mask_of(struct automaton *a, int32_t at) {
    for (;;) {
        int32_t same = a->failed ? DEAD : same_mask(a, at);
        if (same < 0 || a->failed) return NULL;
        struct state *s = a->states[same];
        if (s->mask) return s->mask;
        if (s->filling) pthread_cond_wait(&a->filled, &a->lock);
        else make_mask(a, s, same);
    }
}

void automaton_prepare(struct automaton *a, struct automaton_place place) {
    lock(a);
    if (place.generation == a->generation && !a->failed) {
        if (!a->n_fillers) a->work = 0;
        mask_of(a, place.state);
    }
    unlock(a);
}

// ---- Life

static void automaton_free(struct automaton *a) {
    for (size_t i = 0; a->states && i < a->n_states; i++) {
        free(a->states[i]->mask);
        free(a->states[i]);
    }
    free(a->states);
    free(a->table);
    free(a->frames);
    free(a->frame_table);
    free(a->set);
    free(a->visits);
    free(a->stack);
    free(a->needs);
    grammar_free(&a->g);
    pthread_mutex_destroy(&a->lock);
    pthread_cond_destroy(&a->filled);
    free(a);
}

void automaton_unref(struct automaton *a) {
    if (a && atomic_fetch_sub(&a->refs, 1) == 1) automaton_free(a);
}

struct automaton *automaton_ref(struct automaton *a) {
    atomic_fetch_add(&a->refs, 1);
    return a;
}

bool automaton_is_shared(struct automaton *a) {
    return atomic_load(&a->refs) > 1;
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
    atomic_init(&a->refs, 1);
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->filled, NULL);
    a->needs = size_alloc(a->g.n + 1, sizeof *a->needs);
    a->states = size_alloc_zero(MAX_STATES, sizeof *a->states);
    a->table = size_alloc(2 * MAX_STATES, sizeof *a->table);
    a->set = size_alloc(MAX_THREADS, sizeof *a->set);
    a->visits = size_alloc_zero(2 * MAX_VISITS, sizeof *a->visits);
    a->stack = size_alloc(MAX_VISITS + 1, sizeof *a->stack);
    bool ok = a->needs && a->states && a->table && a->set && a->visits && a->stack && grow_frames(a);
    if (!ok) error_set(err, "out of memory");
    if (ok && !grammar_needs(&a->g, a->needs)) ok = error_set(err, "%s", TOO_LONG);
    if (ok && a->needs[a->g.start] > MAX_STACK)
        ok = error_set(err,
                       "nothing can satisfy the schema within %d levels: what it requires never ends, or excludes "
                       "itself",
                       MAX_STACK);
    for (size_t i = 0; ok && i < 2 * MAX_STATES; i++) a->table[i] = -1;
    if (ok && start_state(a) < 0) ok = error_set(err, "%s", a->failed ? a->failed : TOO_MANY);
    if (ok) return a;
    automaton_free(a);
    return NULL;
}

bool automaton_is_for(const struct automaton *a, const struct grammar *g, bool calls) {
    return a->calls == calls && a->g.start == g->start && a->g.n == g->n && a->g.n_repeats == g->n_repeats &&
           memcmp(a->g.nodes, g->nodes, g->n * sizeof *g->nodes) == 0 &&
           (g->n_repeats == 0 || memcmp(a->g.repeats, g->repeats, g->n_repeats * sizeof *g->repeats) == 0);
}

size_t automaton_bytes(struct automaton *a) {
    lock(a);
    size_t n = sizeof *a + a->g.n * (sizeof *a->g.nodes + 1) + a->n_states * sizeof **a->states +
               a->n_threads * sizeof *a->set + a->n_masks * a->v->n_words * sizeof(uint32_t) +
               a->cap_frames * (sizeof *a->frames + 2 * sizeof *a->frame_table) +
               MAX_STATES * (sizeof *a->states + 2 * sizeof *a->table) + MAX_THREADS * sizeof *a->set +
               MAX_VISITS * (2 * sizeof *a->visits + sizeof *a->stack);
    unlock(a);
    return n;
}

const char *automaton_failed(struct automaton *a) {
    lock(a);
    const char *failed = a->failed;
    unlock(a);
    return failed;
}

// ---- Cursors

struct cursor *cursor_create(struct automaton *a, struct error *err) {
    struct cursor *c = size_alloc_zero(1, sizeof *c);
    if (!c) {
        error_set(err, "out of memory");
        return NULL;
    }
    c->a = automaton_ref(a);
    c->now = DEAD;
    lock(a);
    c->next = a->cursors;
    if (c->next) c->next->prev = c;
    a->cursors = c;
    unlock(a);
    cursor_reset(c);
    return c;
}

void cursor_free(struct cursor *c) {
    if (!c) return;
    struct automaton *a = c->a;
    lock(a);
    if (c->prev) c->prev->next = c->next;
    else a->cursors = c->next;
    if (c->next) c->next->prev = c->prev;
    unlock(a);
    automaton_unref(a);
    free(c);
}

void cursor_reset(struct cursor *c) {
    struct automaton *a = c->a;
    lock(a);
    begin_work(a);
    c->now = a->failed ? DEAD : start_state(a);
    unlock(a);
}

void cursor_mask(struct cursor *c, uint32_t *bits) {
    struct automaton *a = c->a;
    lock(a);
    begin_work(a);
    const uint32_t *mask = c->now >= 0 ? mask_of(a, c->now) : NULL;
    memcpy(bits, mask ? mask : a->v->only_end, a->v->n_words * sizeof *bits);
    unlock(a);
}

bool cursor_accept(struct cursor *c, const char *bytes, size_t n) {
    struct automaton *a = c->a;
    lock(a);
    for (size_t i = 0; i < n && c->now >= 0 && !a->failed; i++) {
        begin_work(a);
        c->now = step(a, c->now, (unsigned char)bytes[i]);
    }
    bool ok = c->now >= 0 && !a->failed;
    unlock(a);
    return ok;
}

bool cursor_complete(struct cursor *c) {
    lock(c->a);
    bool complete = !c->a->failed && c->now >= 0 && c->a->states[c->now]->accepts;
    unlock(c->a);
    return complete;
}

bool cursor_only_end(struct cursor *c) {
    lock(c->a);
    bool only = !c->a->failed && c->now >= 0 && c->a->states[c->now]->accepts && c->a->states[c->now]->n == 0;
    unlock(c->a);
    return only;
}

const char *cursor_failed(struct cursor *c) {
    return automaton_failed(c->a);
}

bool cursor_place(struct cursor *c, struct automaton_place *place) {
    struct automaton *a = c->a;
    lock(a);
    *place = (struct automaton_place){a->generation, c->now};
    bool wanted = !a->failed && c->now >= 0;
    if (wanted) {
        int32_t same = a->states[c->now]->same;
        wanted = same < 0 || !a->states[same]->mask;
    }
    unlock(a);
    return wanted;
}

struct automaton *cursor_automaton(struct cursor *c) {
    return c->a;
}
