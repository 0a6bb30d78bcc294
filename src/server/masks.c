// masks.c: see masks.h.
#include "server/masks.h"

#include "base/size.h"

#include <pthread.h>
#include <stdlib.h>

enum { MAX_KEPT = 64, MAX_JOBS = 1024 };

struct kept {
    struct automaton *automaton;
    uint64_t hash, used; // used: the larger, the later
};

struct job {
    struct automaton *automaton;
    struct automaton_place place;
};

struct masks {
    const struct vocabulary *v;
    size_t max_bytes;
    pthread_mutex_t lock; // guards the list
    struct kept kept[MAX_KEPT];
    size_t n_kept;
    uint64_t clock;
    pthread_mutex_t job_lock; // guards all below
    pthread_cond_t job_came;
    struct job jobs[MAX_JOBS]; // a ring
    size_t first, n_jobs;
    bool stops;
    pthread_t thread;
};

static void *work(void *user) {
    struct masks *m = user;
    pthread_mutex_lock(&m->job_lock);
    while (!m->stops) {
        if (m->n_jobs == 0) {
            pthread_cond_wait(&m->job_came, &m->job_lock);
            continue;
        }
        struct job job = m->jobs[m->first];
        m->first = (m->first + 1) % MAX_JOBS;
        m->n_jobs--;
        pthread_mutex_unlock(&m->job_lock);
        automaton_prepare(job.automaton, job.place);
        automaton_unref(job.automaton);
        pthread_mutex_lock(&m->job_lock);
    }
    pthread_mutex_unlock(&m->job_lock);
    return NULL;
}

struct masks *masks_create(const struct vocabulary *v, size_t max_bytes, struct error *err) {
    struct masks *m = size_alloc_zero(1, sizeof *m);
    if (!m) {
        error_set(err, "out of memory");
        return NULL;
    }
    m->v = v;
    m->max_bytes = max_bytes;
    pthread_mutex_init(&m->lock, NULL);
    pthread_mutex_init(&m->job_lock, NULL);
    pthread_cond_init(&m->job_came, NULL);
    if (pthread_create(&m->thread, NULL, work, m) == 0) return m;
    pthread_mutex_destroy(&m->lock);
    pthread_mutex_destroy(&m->job_lock);
    pthread_cond_destroy(&m->job_came);
    free(m);
    error_set(err, "cannot start the thread that makes masks");
    return NULL;
}

void masks_free(struct masks *m) {
    if (!m) return;
    pthread_mutex_lock(&m->job_lock);
    m->stops = true;
    pthread_cond_signal(&m->job_came);
    pthread_mutex_unlock(&m->job_lock);
    pthread_join(m->thread, NULL);
    for (; m->n_jobs; m->n_jobs--, m->first = (m->first + 1) % MAX_JOBS) automaton_unref(m->jobs[m->first].automaton);
    for (size_t i = 0; i < m->n_kept; i++) automaton_unref(m->kept[i].automaton);
    pthread_mutex_destroy(&m->lock);
    pthread_mutex_destroy(&m->job_lock);
    pthread_cond_destroy(&m->job_came);
    free(m);
}

static uint64_t hash_of(const struct grammar *g, bool calls) {
    uint64_t h = g->start * 2u + calls;
    for (size_t i = 0; i < g->n; i++) {
        const struct node *p = &g->nodes[i];
        uint64_t word = (uint64_t)p->next << 32 ^ p->other ^ (uint64_t)p->kind << 24 ^ (uint64_t)p->low << 8 ^ p->high;
        h = (h ^ word) * 0x9E3779B97F4A7C15u;
        h ^= h >> 29;
    }
    return h;
}

// NULL: there is none. One that has failed is left to those who use it.
static struct automaton *find(struct masks *m, const struct grammar *g, bool calls, uint64_t hash) {
    for (size_t i = 0; i < m->n_kept; i++) {
        struct kept *k = &m->kept[i];
        if (k->hash != hash || !automaton_is_for(k->automaton, g, calls)) continue;
        if (automaton_failed(k->automaton)) {
            automaton_unref(k->automaton);
            *k = m->kept[--m->n_kept];
            return NULL;
        }
        k->used = ++m->clock;
        return automaton_ref(k->automaton);
    }
    return NULL;
}

// Lets go of what was used longest ago until `extra` bytes and a place are left.
static void make_room(struct masks *m, size_t extra) {
    size_t total = extra;
    for (size_t i = 0; i < m->n_kept; i++) total += automaton_bytes(m->kept[i].automaton);
    while (total > m->max_bytes || m->n_kept == MAX_KEPT) {
        size_t oldest = MAX_KEPT;
        for (size_t i = 0; i < m->n_kept; i++)
            if (!automaton_is_shared(m->kept[i].automaton) &&
                (oldest == MAX_KEPT || m->kept[i].used < m->kept[oldest].used))
                oldest = i;
        if (oldest == MAX_KEPT) return;
        total -= automaton_bytes(m->kept[oldest].automaton);
        automaton_unref(m->kept[oldest].automaton);
        m->kept[oldest] = m->kept[--m->n_kept];
    }
}

struct automaton *masks_automaton(struct masks *m, struct grammar *g, bool calls, struct error *err) {
    uint64_t hash = hash_of(g, calls);
    pthread_mutex_lock(&m->lock);
    struct automaton *a = find(m, g, calls, hash);
    pthread_mutex_unlock(&m->lock);
    if (a) {
        grammar_free(g);
        return a;
    }
    a = automaton_create(m->v, g, calls, err);
    if (!a) return NULL;
    struct cursor *c = cursor_create(a, err);
    struct automaton_place place;
    if (c && cursor_place(c, &place)) automaton_prepare(a, place);
    const char *failed = automaton_failed(a);
    if (failed) error_set(err, "%s", failed);
    bool ok = c && !failed;
    cursor_free(c);
    if (!ok) {
        automaton_unref(a);
        return NULL;
    }
    pthread_mutex_lock(&m->lock);
    make_room(m, automaton_bytes(a));
    if (m->n_kept < MAX_KEPT) m->kept[m->n_kept++] = (struct kept){automaton_ref(a), hash, ++m->clock};
    pthread_mutex_unlock(&m->lock);
    return a;
}

void masks_prepare(struct masks *m, struct cursor *c) {
    struct automaton_place place;
    if (!cursor_place(c, &place)) return;
    pthread_mutex_lock(&m->job_lock);
    if (m->n_jobs < MAX_JOBS) {
        struct job job = {automaton_ref(cursor_automaton(c)), place};
        m->jobs[(m->first + m->n_jobs++) % MAX_JOBS] = job;
        pthread_cond_signal(&m->job_came);
    }
    pthread_mutex_unlock(&m->job_lock);
}
