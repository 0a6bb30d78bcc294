// sched.h: which tokens of which sequences are computed in the next step. Integers only, as in kv.h: whoever runs the
// model asks for a plan, runs it, says that it was run, and puts the sampled tokens behind the sequences' ids.
//
// A step has a budget of tokens. Every running sequence that generates gets one, what is left goes to prompts, in
// chunks, in the order in which the sequences were admitted. A waiting sequence is admitted when a place is free, when
// the worst cases of all that run (their longest possible length) fit into the KV times `overcommit`, and when the
// pages that it needs now are there. Which one: the highest priority; within it the tenant that was served the fewest
// tokens; within that, first come, first served. One that waited for `patience` steps goes first and is from then on of
// the highest priority.
// When the KV runs out in the middle, the sequence that was admitted last among those of the lowest priority gives its
// pages back and waits again, in front of its tenant's others; it is computed again from its ids (or found in the
// cache).
//
// Every sequence ends: the first in order is never preempted, and its worst case fits into the KV, which sched_submit
// checks.
#ifndef TANDEM_ENGINE_SCHED_H
#define TANDEM_ENGINE_SCHED_H

#include "engine/kv.h"

enum { SCHED_PRIORITIES = 3 };

struct sched_options {
    size_t max_running;  // sequences in a step; forks count
    size_t step_tokens;  // >= max_running
    size_t step_rows;    // logit rows of a step; >= max_running
    size_t max_waiting;  // sequences in the queue
    size_t max_length;   // tokens of a sequence, prompt and reply
    unsigned overcommit; // per cent; 100: the worst case always fits, nothing is ever preempted for lack of pages
    size_t patience;     // steps
};

enum sched_state { SCHED_NEW, SCHED_WAITING, SCHED_RUNNING, SCHED_ENDED };

struct sched_tenant;

// One sequence. The caller sets the first part and owns the memory; the scheduler keeps the rest.
struct sched_seq {
    int32_t *ids; // [n_limit]
    size_t n_ids; // known by now: the prompt and what was generated
    size_t n_prompt;
    size_t n_limit; // the longest that it can get
    int priority;   // 0 (low) to SCHED_PRIORITIES - 1
    size_t n_forks; // sequences that will be forked from this one when its prompt is computed
    bool wants_all; // the logits of every prompt token: no prefix is taken from the cache
    bool is_over;   // nothing more is computed: its last token is under way
    void *user;

    struct kv_seq kv; // the caller sets pages [pages of n_limit] and tenant
    enum sched_state state;
    size_t n_reused;    // tokens that the cache gave at the first admission
    size_t n_preempted; // how often
    size_t n_charged;   // positions for which the tenant was charged
    bool admitted_once;
    int rank;                        // its priority, the highest once it has waited too long
    uint64_t order;                  // admission; smaller is earlier
    uint64_t arrival;                // the step in which it came
    struct sched_seq *prev, *next;   // in its tenant's queue, or among the running
    struct sched_seq *older, *newer; // among all that wait
    struct sched_tenant *tenant;
};

struct sched_queue {
    struct sched_seq *first, *last;
};

struct sched_tenant {
    uint64_t number;
    uint64_t served; // tokens, the handicap of late comers included
    size_t n_seqs;   // waiting and running
    struct sched_queue waiting[SCHED_PRIORITIES];
};

struct sched {
    struct sched_options options;
    struct kv_pool *pool;
    struct sched_tenant **tenants; // [n_tenants]
    size_t n_tenants, cap_tenants;
    struct sched_seq *first, *last;     // running, best first
    struct sched_seq *oldest, *newest;  // waiting
    size_t n_running, n_promised_forks; // places taken: both together
    size_t n_waiting;
    size_t promised_pages; // the worst cases of all that run
    uint64_t step, next_order;
    uint64_t n_preemptions;
};

// A sequence's part of a step: ids[kv.n_kv] .. ids[kv.n_kv + n - 1]. The last n_rows of these tokens need logits.
struct sched_share {
    struct sched_seq *seq;
    size_t n, n_rows;
};

// One step. The arrays are the scheduler's caller's: [max_running] each. Sequences of one token come first: a device
// attends to them apart.
struct sched_step {
    struct sched_share *shares;
    struct kv_copy *copies; // to be made before the step runs
    size_t n_shares, n_copies, n_tokens, n_rows;
};

bool sched_create(struct sched *s, struct kv_pool *pool, const struct sched_options *options, struct error *err);
void sched_free(struct sched *s); // every sequence has ended

enum sched_answer { SCHED_TAKEN, SCHED_QUEUE_FULL, SCHED_TOO_LARGE, SCHED_NO_MEMORY };

// Puts a new sequence into the queue. SCHED_TOO_LARGE: it (with its forks) could never run; `err` says why.
enum sched_answer sched_submit(struct sched *s, struct sched_seq *seq, struct error *err);

// Chooses the next step: admits, gives pages, preempts. n_shares 0 with *stuck NULL: nothing to do. *stuck: a sequence
// that should run and cannot, because pages are held by others than this scheduler; end it.
void sched_plan(struct sched *s, struct sched_step *step, struct sched_seq **stuck);

// The planned step was run.
void sched_commit(struct sched *s, const struct sched_step *step);
// The same in two halves, for steps that go on while the next one is planned. The planned step is under way: whoever
// samples in it may put a stand-in for each token behind the sequence's ids. All ids of a sequence below kv.n_kv are
// known, since it was planned again or not: its full pages can be cached.
void sched_begin(struct sched *s, const struct sched_step *step);
void sched_know(struct sched *s, struct sched_seq *seq);

// After the commit that computed the whole prompt of `from`: `to` (SCHED_NEW) runs too, on the same pages.
void sched_fork(struct sched *s, struct sched_seq *from, struct sched_seq *to);

// The sequence leaves, whatever its state: it is done, cancelled or failed. `poisoned`: nothing that it computed stays
// in the cache.
void sched_end(struct sched *s, struct sched_seq *seq, bool poisoned);

// Checks counts, lists and what runs; false with what is wrong. For tests.
bool sched_check(const struct sched *s, struct error *err);

#endif
