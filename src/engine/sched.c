// sched.c: see sched.h.
#include "engine/sched.h"

#include "base/size.h"

#include <inttypes.h>
#include <stdlib.h>

static size_t pages_for(const struct sched *s, size_t n_tokens) {
    return (n_tokens + s->pool->page_tokens - 1) / s->pool->page_tokens;
}

bool sched_create(struct sched *s, struct kv_pool *pool, const struct sched_options *o, struct error *err) {
    *s = (struct sched){.options = *o, .pool = pool};
    if (o->max_running == 0 || o->step_tokens < o->max_running || o->step_rows < o->max_running || o->overcommit < 100)
        return error_set(err,
                         "scheduler: expected at least one place and as many tokens and rows as places, found %zu "
                         "places, %zu tokens, %zu rows, overcommit %u %%",
                         o->max_running, o->step_tokens, o->step_rows, o->overcommit);
    return true;
}

void sched_free(struct sched *s) {
    for (size_t i = 0; i < s->n_tenants; i++) free(s->tenants[i]);
    free(s->tenants);
    *s = (struct sched){0};
}

// ---- Tenants

static uint64_t least_served(const struct sched *s, uint64_t otherwise) {
    uint64_t least = UINT64_MAX;
    for (size_t i = 0; i < s->n_tenants; i++)
        if (s->tenants[i]->n_seqs && s->tenants[i]->served < least) least = s->tenants[i]->served;
    return least == UINT64_MAX ? otherwise : least;
}

// A tenant that was served no more than those who wait now has nothing to be remembered for.
static void forget_idle_tenants(struct sched *s) {
    uint64_t least = least_served(s, UINT64_MAX);
    size_t n = 0;
    for (size_t i = 0; i < s->n_tenants; i++) {
        if (s->tenants[i]->n_seqs == 0 && s->tenants[i]->served <= least) free(s->tenants[i]);
        else s->tenants[n++] = s->tenants[i];
    }
    s->n_tenants = n;
}

static struct sched_tenant *tenant_of(struct sched *s, uint64_t number) {
    for (size_t i = 0; i < s->n_tenants; i++)
        if (s->tenants[i]->number == number) return s->tenants[i];
    if (s->n_tenants == s->cap_tenants) forget_idle_tenants(s);
    if (s->n_tenants == s->cap_tenants) {
        size_t cap = s->cap_tenants ? 2 * s->cap_tenants : 16;
        struct sched_tenant **list = size_realloc(s->tenants, cap, sizeof(struct sched_tenant *));
        if (!list) return NULL;
        s->tenants = list;
        s->cap_tenants = cap;
    }
    struct sched_tenant *t = size_alloc_zero(1, sizeof *t);
    if (!t) return NULL;
    t->number = number;
    s->tenants[s->n_tenants++] = t;
    return t;
}

// ---- The queue

// Where the sequence was is where it goes back to: in front of those that came later.
static void wait_add(struct sched *s, struct sched_seq *seq, bool front) {
    struct sched_queue *q = &seq->tenant->waiting[seq->priority];
    seq->prev = front ? NULL : q->last;
    seq->next = front ? q->first : NULL;
    if (seq->prev) seq->prev->next = seq;
    else q->first = seq;
    if (seq->next) seq->next->prev = seq;
    else q->last = seq;
    struct sched_seq *after = s->newest; // the youngest that is not younger than this one
    while (after && after->arrival > seq->arrival) after = after->older;
    seq->older = after;
    seq->newer = after ? after->newer : s->oldest;
    if (seq->older) seq->older->newer = seq;
    else s->oldest = seq;
    if (seq->newer) seq->newer->older = seq;
    else s->newest = seq;
    seq->state = SCHED_WAITING;
    s->n_waiting++;
}

static void wait_remove(struct sched *s, struct sched_seq *seq) {
    struct sched_queue *q = &seq->tenant->waiting[seq->priority];
    if (seq->prev) seq->prev->next = seq->next;
    else q->first = seq->next;
    if (seq->next) seq->next->prev = seq->prev;
    else q->last = seq->prev;
    if (seq->older) seq->older->newer = seq->newer;
    else s->oldest = seq->newer;
    if (seq->newer) seq->newer->older = seq->older;
    else s->newest = seq->older;
    s->n_waiting--;
}

enum sched_answer sched_submit(struct sched *s, struct sched_seq *seq, struct error *err) {
    const struct sched_options *o = &s->options;
    size_t pages = pages_for(s, seq->n_limit);
    if (seq->n_limit > o->max_length || pages > s->pool->n_pages) {
        error_set(err, "the prompt and the reply may have %zu tokens together; a sequence holds %zu, the KV %zu",
                  seq->n_limit, o->max_length, s->pool->n_pages * s->pool->page_tokens);
        return SCHED_TOO_LARGE;
    }
    if (1 + seq->n_forks > o->max_running) {
        error_set(err, "n is %zu, but at most %zu sequences run at once", 1 + seq->n_forks, o->max_running);
        return SCHED_TOO_LARGE;
    }
    if (s->n_waiting >= o->max_waiting) {
        error_set(err, "the queue is full: %zu sequences wait", s->n_waiting);
        return SCHED_QUEUE_FULL;
    }
    struct sched_tenant *t = tenant_of(s, seq->kv.tenant);
    if (!t) {
        error_set(err, "out of memory for a tenant");
        return SCHED_NO_MEMORY;
    }
    if (t->n_seqs++ == 0) { // being idle saves up no claim
        uint64_t least = UINT64_MAX;
        for (size_t i = 0; i < s->n_tenants; i++)
            if (s->tenants[i] != t && s->tenants[i]->n_seqs && s->tenants[i]->served < least)
                least = s->tenants[i]->served;
        if (least != UINT64_MAX && t->served < least) t->served = least;
    }
    seq->tenant = t;
    seq->rank = seq->priority;
    seq->arrival = s->step;
    wait_add(s, seq, false);
    return SCHED_TAKEN;
}

// ---- Running sequences, best first: high priority, then early admission

static bool runs_before(const struct sched_seq *a, const struct sched_seq *b) {
    return a->rank != b->rank ? a->rank > b->rank : a->order < b->order;
}

static void run_add(struct sched *s, struct sched_seq *seq) {
    struct sched_seq *after = s->last;
    while (after && runs_before(seq, after)) after = after->prev;
    seq->prev = after;
    seq->next = after ? after->next : s->first;
    if (seq->prev) seq->prev->next = seq;
    else s->first = seq;
    if (seq->next) seq->next->prev = seq;
    else s->last = seq;
    seq->state = SCHED_RUNNING;
    s->n_running++;
}

static void run_remove(struct sched *s, struct sched_seq *seq) {
    if (seq->prev) seq->prev->next = seq->next;
    else s->first = seq->next;
    if (seq->next) seq->next->prev = seq->prev;
    else s->last = seq->prev;
    s->n_running--;
    s->n_promised_forks -= seq->n_forks;
    s->promised_pages -= (1 + seq->n_forks) * pages_for(s, seq->n_limit);
}

static void preempt(struct sched *s, struct sched_seq *seq) {
    run_remove(s, seq);
    kv_trim(s->pool, &seq->kv, 0);
    seq->n_preempted++;
    s->n_preemptions++;
    wait_add(s, seq, true);
}

// ---- Admission

static struct sched_seq *next_waiting(const struct sched *s) {
    if (s->oldest && s->step - s->oldest->arrival > s->options.patience) {
        s->oldest->rank = SCHED_PRIORITIES - 1;
        return s->oldest;
    }
    for (int priority = SCHED_PRIORITIES - 1; priority >= 0; priority--) {
        const struct sched_tenant *best = NULL;
        for (size_t i = 0; i < s->n_tenants; i++) {
            const struct sched_tenant *t = s->tenants[i];
            if (t->waiting[priority].first && (!best || t->served < best->served)) best = t;
        }
        if (best) return best->waiting[priority].first;
    }
    return NULL;
}

// Takes what the cache has of a waiting sequence and says whether it can run now.
static bool fits_now(struct sched *s, struct sched_seq *seq) {
    const struct sched_options *o = &s->options;
    size_t places = 1 + seq->n_forks, taken = s->n_running + s->n_promised_forks;
    if (places > o->max_running - taken) return false;
    size_t worst = places * pages_for(s, seq->n_limit);
    if (s->n_running > 0 && s->promised_pages + worst > s->pool->n_pages * o->overcommit / 100) return false;
    // The last token is always computed: its logits are wanted.
    if (!seq->wants_all || seq->n_ids > seq->n_prompt)
        kv_match(s->pool, &seq->kv, seq->ids, seq->n_ids, seq->n_ids - 1);
    size_t missing = pages_for(s, seq->n_ids) - seq->kv.n_pages;
    // A page for every running sequence stays back, so that the next steps need not preempt at once.
    if (missing + s->n_running <= kv_available(s->pool)) return true;
    if (s->n_running == 0 && missing <= kv_available(s->pool)) return true;
    kv_trim(s->pool, &seq->kv, 0);
    return false;
}

static void charge(struct sched_seq *seq, size_t n_tokens) {
    if (n_tokens <= seq->n_charged) return;
    seq->tenant->served += n_tokens - seq->n_charged;
    seq->n_charged = n_tokens;
}

static void admit(struct sched *s) {
    for (struct sched_seq *seq; (seq = next_waiting(s)) != NULL;) {
        while (!fits_now(s, seq)) {
            // Only a higher priority drives a running sequence out.
            if (!s->last || s->last->rank >= seq->priority) return;
            preempt(s, s->last);
        }
        wait_remove(s, seq);
        if (!seq->admitted_once) {
            seq->n_reused = seq->kv.n_kv;
            seq->n_charged = seq->kv.n_kv; // what the cache gave costs nothing
            seq->admitted_once = true;
            seq->order = s->next_order++;
        }
        charge(seq, seq->n_ids); // at once, so that one tenant does not take all places of a step
        s->n_promised_forks += seq->n_forks;
        s->promised_pages += (1 + seq->n_forks) * pages_for(s, seq->n_limit);
        run_add(s, seq);
    }
}

// ---- A step

// Gives a running sequence pages for n tokens, preempting from the back of the order up to and including itself.
static bool give_pages(struct sched *s, struct sched_seq *seq, size_t n, struct kv_copy *copy) {
    while (!kv_reserve(s->pool, &seq->kv, n, copy)) {
        struct sched_seq *victim = s->last;
        if (victim == seq && victim == s->first) return false; // it is alone: nobody here can give it pages
        preempt(s, victim);
        if (victim == seq) return false;
    }
    return true;
}

// Every running sequence's share, best first, until the step is full.
static void deal_out(struct sched *s, struct sched_step *step, struct sched_seq **stuck) {
    const struct sched_options *o = &s->options;
    // Every running sequence is sure of a row and, when it generates, of a token.
    size_t generating = 0;
    for (const struct sched_seq *q = s->first; q; q = q->next) generating += !q->is_over && q->n_ids - q->kv.n_kv == 1;
    size_t left = o->step_tokens - generating, rows_left = o->step_rows - s->n_running;
    for (struct sched_seq *q = s->first, *next; q; q = next) {
        if (q->is_over) {
            next = q->next;
            continue;
        }
        size_t rest = q->n_ids - q->kv.n_kv, n = rest, rows = 1;
        bool all = q->wants_all && q->kv.n_kv < q->n_prompt;
        if (rest > 1) {
            if (n > left) n = left;
            if (all && n > rows_left + 1) n = rows_left + 1;
        }
        if (all) rows = n;
        else if (n < rest) rows = 0;
        struct kv_copy copy;
        if (n > 0 && !give_pages(s, q, n, &copy)) {
            // It was preempted itself, as the last: the plan is complete. Or it is alone and cannot go on.
            if (q->state == SCHED_RUNNING && step->n_shares == 0) *stuck = q;
            return;
        }
        next = q->next; // after the preemptions behind it
        if (n == 0) continue;
        if (rest > 1) left -= n;
        if (rows > 1) rows_left -= rows - 1;
        if (copy.to >= 0) step->copies[step->n_copies++] = copy;
        step->shares[step->n_shares++] = (struct sched_share){.seq = q, .n = n, .n_rows = rows};
        step->n_tokens += n;
        step->n_rows += rows;
    }
    if (step->n_shares == 0 && s->n_running == 0 && s->n_waiting > 0) *stuck = next_waiting(s);
}

static void put_singles_first(struct sched_step *step) {
    for (size_t i = 0, n = 0; i < step->n_shares; i++) {
        struct sched_share share = step->shares[i];
        if (share.n > 1) continue;
        step->shares[i] = step->shares[n];
        step->shares[n++] = share;
    }
}

void sched_plan(struct sched *s, struct sched_step *step, struct sched_seq **stuck) {
    *stuck = NULL;
    step->n_shares = step->n_copies = step->n_tokens = step->n_rows = 0;
    s->step++;
    admit(s);
    deal_out(s, step, stuck);
    put_singles_first(step);
}

void sched_begin(struct sched *s, const struct sched_step *step) {
    (void)s;
    for (size_t i = 0; i < step->n_shares; i++) {
        struct sched_seq *seq = step->shares[i].seq;
        seq->kv.n_kv += step->shares[i].n;
        charge(seq, seq->kv.n_kv);
    }
}

void sched_know(struct sched *s, struct sched_seq *seq) {
    kv_chain(s->pool, &seq->kv, seq->ids);
}

void sched_commit(struct sched *s, const struct sched_step *step) {
    sched_begin(s, step);
    for (size_t i = 0; i < step->n_shares; i++) sched_know(s, step->shares[i].seq);
}

void sched_fork(struct sched *s, struct sched_seq *from, struct sched_seq *to) {
    from->n_forks--;
    s->n_promised_forks--;
    to->n_forks = 0;
    to->order = from->order;
    to->arrival = from->arrival;
    to->rank = from->rank;
    to->admitted_once = true;
    to->n_reused = from->kv.n_kv;
    to->n_charged = from->kv.n_kv;
    to->tenant = from->tenant;
    to->tenant->n_seqs++;
    kv_fork(s->pool, &to->kv, &from->kv);
    run_add(s, to); // its worst case was promised with its origin's
}

void sched_end(struct sched *s, struct sched_seq *seq, bool poisoned) {
    if (seq->state == SCHED_RUNNING) run_remove(s, seq);
    else if (seq->state == SCHED_WAITING) wait_remove(s, seq);
    else return;
    if (poisoned) kv_poison(s->pool, &seq->kv);
    else kv_trim(s->pool, &seq->kv, 0);
    seq->state = SCHED_ENDED;
    seq->tenant->n_seqs--;
}

// ---- The check

bool sched_check(const struct sched *s, struct error *err) {
    size_t n = 0, forks = 0, promised = 0, waiting = 0, queued = 0;
    for (const struct sched_seq *q = s->first; q; q = q->next, n++) {
        if (q->state != SCHED_RUNNING) return error_set(err, "a sequence among the running is in state %d", q->state);
        if (q->next && runs_before(q->next, q)) return error_set(err, "the running are out of order");
        if (q->kv.n_pages < pages_for(s, q->kv.n_kv)) return error_set(err, "a running sequence lacks pages");
        if (q->kv.n_kv >= q->n_ids) return error_set(err, "a running sequence has nothing to compute");
        forks += q->n_forks;
        promised += (1 + q->n_forks) * pages_for(s, q->n_limit);
    }
    for (const struct sched_seq *q = s->oldest; q; q = q->newer, waiting++) {
        if (q->state != SCHED_WAITING) return error_set(err, "a sequence in the queue is in state %d", q->state);
        if (q->kv.n_pages) return error_set(err, "a waiting sequence holds %zu pages", q->kv.n_pages);
        if (q->newer && q->newer->arrival < q->arrival) return error_set(err, "the queue is out of order");
    }
    for (size_t i = 0; i < s->n_tenants; i++)
        for (int k = 0; k < SCHED_PRIORITIES; k++)
            for (const struct sched_seq *q = s->tenants[i]->waiting[k].first; q; q = q->next) queued++;
    if (n != s->n_running || forks != s->n_promised_forks || promised != s->promised_pages)
        return error_set(err, "%zu run with %zu forks and %zu pages, counted were %zu, %zu, %zu", n, forks, promised,
                         s->n_running, s->n_promised_forks, s->promised_pages);
    if (waiting != s->n_waiting || queued != waiting)
        return error_set(err, "%zu wait, %zu are queued, %zu counted", waiting, queued, s->n_waiting);
    if (n + forks > s->options.max_running) return error_set(err, "%zu places are taken", n + forks);
    return true;
}
