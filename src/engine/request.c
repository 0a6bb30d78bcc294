// request.c: requests: what users submit, run by the scheduler. It owns the inbox that other threads write, the memory
// of requests, and the way from logits to events. Which tokens run is sched.c's.
//
// Two locks. The engine's is held for a whole step. The inbox's is held for moments: submitting and cancelling never
// wait for the model.
#include "engine/engine.h"

#include "base/size.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { DEFAULT_QUEUE = 1024, MAX_TOP = 100, OVERCOMMIT = 300, PATIENCE = 4096 };

struct choice {
    struct sched_seq seq; // first: a sched_seq of ours is a choice
    struct request *request;
    size_t index;
    tandem_sampling sampling; // the request's, with a seed of its own
    size_t n_known; // of seq.ids: a stand-in for the token that a step under way chooses may stand behind them
    uint64_t hash;
    const struct engine_choice *chosen; // for the step that is told of: what the host chose; NULL
    bool ended;
};

struct request {
    uint64_t id;
    struct request *prev, *next; // in the inbox, then among the live ones
    struct choice *choices;      // [n_choices]
    size_t n_choices, n_live;
    size_t n_told;         // PROMPT events up to this position were given
    size_t n_flying;       // shares of steps under way
    bool started, dropped; // dropped: the last step under way frees it
    int32_t *bias_ids;
    float *bias;
    tandem_request_options options; // its pointers are not used
};

// A sequence's part of a step under way.
struct flight_share {
    struct choice *choice;
    size_t n_rows, row; // its rows of logits; the first of them
    size_t at;          // the place among the sequence's ids of the token that the step chooses; NOWHERE: none
};
#define NOWHERE SIZE_MAX

// A step between being queued and being told of. At most two: while a device runs one, the host tells of the one
// before. A step is LATE when the next one may be queued before its tokens are known: the device alone chooses, and
// hands its choices on. The tokens' places among the ids then hold stand-ins: ~row, as batch.token takes them.
struct flight {
    struct flight_share *shares;  // [max_batch]
    struct greedy_choice *chosen; // [max_batch] by the device
    size_t n_shares, n_rows;
    unsigned turn;
    bool is_out, is_late, has_landed, has_chosen;
};

struct requests {
    struct sched sched;
    struct flight flights[2];
    size_t last;                  // the flight of the last step
    struct sched_step step;       // [max_batch] arrays
    struct engine_share *shares;  // [max_batch]
    struct engine_choice *chosen; // [max_batch] by the host
    tandem_token *tops;           // [max_batch, MAX_TOP] of them
    tandem_token top[MAX_TOP];    // of a prompt's token
    size_t max_queue;
    tandem_stats now;               // what publish() copies
    struct request *first, *newest; // live, in order of arrival

    pthread_mutex_t lock; // guards all below
    pthread_cond_t changed;
    struct request *inbox_first, *inbox_last;
    uint64_t *cancels; // [n_cancels] ids
    size_t n_cancels, cap_cancels;
    size_t n_inbox, n_waiting; // sequences
    bool busy;                 // there were live requests after the last step
    uint64_t last_id;
    tandem_stats stats;
};

static size_t pages_for(size_t n_tokens) {
    return (n_tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
}

bool requests_create(tandem_engine *e, const tandem_options *o, struct error *err) {
    struct requests *r = e->requests = size_alloc_zero(1, sizeof *r);
    if (!r) return error_set(err, "out of memory for requests");
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    r->max_queue = o->max_queue ? o->max_queue : DEFAULT_QUEUE;
    r->step.shares = size_alloc(e->max_batch, sizeof *r->step.shares);
    r->step.copies = size_alloc(e->max_batch, sizeof *r->step.copies);
    r->shares = size_alloc(e->max_batch, sizeof *r->shares);
    r->chosen = size_alloc(e->max_batch, sizeof *r->chosen);
    r->tops = size_alloc(e->max_batch, MAX_TOP * sizeof *r->tops);
    bool has_flights = r->chosen && r->tops;
    for (int i = 0; i < 2; i++) {
        r->flights[i].shares = size_alloc(e->max_batch, sizeof *r->flights[i].shares);
        r->flights[i].chosen = size_alloc(e->max_batch, sizeof *r->flights[i].chosen);
        has_flights = has_flights && r->flights[i].shares && r->flights[i].chosen;
    }
    if (!r->step.shares || !r->step.copies || !r->shares || !has_flights)
        return error_set(err, "out of memory for steps of %zu requests", e->max_batch);
    struct sched_options options = {.max_running = e->max_batch,
                                    .step_tokens = e->max_step_tokens,
                                    .step_rows = e->max_batch,
                                    .max_waiting = SIZE_MAX, // the inbox keeps the limit
                                    .max_length = e->context,
                                    .overcommit = OVERCOMMIT,
                                    .patience = PATIENCE};
    r->now.kv_pages = r->stats.kv_pages = e->pages.n_pages;
    return sched_create(&r->sched, &e->pages, &options, err);
}

static void request_free(struct request *q) {
    if (!q) return;
    for (size_t i = 0; q->choices && i < q->n_choices; i++) {
        free(q->choices[i].seq.ids);
        free(q->choices[i].seq.kv.pages);
    }
    free(q->choices);
    free(q->bias_ids);
    free(q->bias);
    free(q);
}

// A share of a step under way is over.
static void release(struct request *q) {
    if (--q->n_flying == 0 && q->dropped) request_free(q);
}

void requests_free(tandem_engine *e) {
    struct requests *r = e->requests;
    if (!r) return;
    for (int i = 0; i < 2; i++) {
        struct flight *f = &r->flights[i];
        for (size_t k = 0; f->is_out && k < f->n_shares; k++) release(f->shares[k].choice->request);
        free(f->shares);
        free(f->chosen);
    }
    for (struct request *q = r->first, *next; q; q = next) {
        next = q->next;
        for (size_t i = 0; i < q->n_choices; i++) sched_end(&r->sched, &q->choices[i].seq, false);
        request_free(q);
    }
    for (struct request *q = r->inbox_first, *next; q; q = next) {
        next = q->next;
        request_free(q);
    }
    sched_free(&r->sched);
    free(r->step.shares);
    free(r->step.copies);
    free(r->shares);
    free(r->chosen);
    free(r->tops);
    free(r->cancels);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->changed);
    free(r);
    e->requests = NULL;
}

// ---- Submitting and cancelling: any thread

static bool check_options(const tandem_engine *e, const tandem_request_options *o, size_t n, struct error *err) {
    if (o->n_prompt == 0 || !o->prompt) return error_set(err, "the prompt is empty: expected at least one token");
    if (o->n_prompt > e->context)
        return error_set(err, "the prompt has %zu tokens, the context holds %zu (the model allows %zu)", o->n_prompt,
                         e->context, e->model->config.context);
    for (size_t i = 0; i < o->n_prompt; i++)
        if (o->prompt[i] < 0 || (size_t)o->prompt[i] >= e->model->config.n_vocab)
            return error_set(err, "token id %d at index %zu of the prompt is not in the vocabulary of %zu",
                             o->prompt[i], i, e->model->config.n_vocab);
    if (n > e->max_batch)
        return error_set(err, "n: expected 1 to %zu (the sequences of a step), found %zu", e->max_batch, n);
    if (o->n_top > MAX_TOP) return error_set(err, "n_top: expected 0 to %d, found %zu", MAX_TOP, o->n_top);
    if (o->priority < -1 || o->priority > 1)
        return error_set(err, "priority: expected -1, 0 or 1, found %d", o->priority);
    if (o->tenant >> 62) return error_set(err, "tenant: expected a number below 2^62");
    return true;
}

static bool make_choices(const tandem_engine *e, struct request *q, const tandem_request_options *o,
                         const tandem_sampling *sampling, struct error *err) {
    size_t limit = e->context - o->n_prompt;
    if (o->prompt_only) limit = 0;
    else if (o->max_tokens && o->max_tokens < limit) limit = o->max_tokens;
    limit += o->n_prompt;
    for (size_t i = 0; i < q->n_choices; i++) {
        struct choice *c = &q->choices[i];
        *c = (struct choice){.request = q, .index = i, .sampling = *sampling, .n_known = o->n_prompt};
        c->seq = (struct sched_seq){.n_ids = o->n_prompt,
                                    .n_prompt = o->n_prompt,
                                    .n_limit = limit,
                                    .priority = o->priority + 1,
                                    .n_forks = i == 0 ? q->n_choices - 1 : 0,
                                    .wants_all = o->prompt_logprobs && i == 0,
                                    .kv = {.tenant = o->tenant}};
        if (i > 0) c->sampling.seed ^= i * 0x9E3779B97F4A7C15u;
        c->seq.ids = size_alloc(limit, sizeof *c->seq.ids);
        c->seq.kv.pages = size_alloc(pages_for(limit), sizeof *c->seq.kv.pages);
        if (!c->seq.ids || !c->seq.kv.pages) return error_set(err, "out of memory for a request of %zu tokens", limit);
        memcpy(c->seq.ids, o->prompt, o->n_prompt * sizeof *c->seq.ids);
    }
    return true;
}

static struct request *request_create(const tandem_engine *e, const tandem_request_options *o, struct error *err) {
    size_t n = o->n ? o->n : 1;
    if (!check_options(e, o, n, err)) return NULL;
    struct request *q = size_alloc_zero(1, sizeof *q);
    if (q) q->choices = size_alloc_zero(n, sizeof *q->choices);
    if (!q || !q->choices) {
        error_set(err, "out of memory for a request");
        request_free(q);
        return NULL;
    }
    q->options = *o;
    q->n_choices = q->n_live = n;
    tandem_sampling defaults = tandem_sampling_default(e, true), sampling;
    if (!engine_copy_sampling(e, o->sampling ? o->sampling : &defaults, &sampling, &q->bias_ids, &q->bias, err) ||
        !make_choices(e, q, o, &sampling, err)) {
        request_free(q);
        return NULL;
    }
    return q;
}

int tandem_submit(tandem_engine *e, const tandem_request_options *o, uint64_t *id, char *err, size_t err_size) {
    struct requests *r = e->requests;
    struct error error = {0};
    int status = TANDEM_ERROR;
    struct request *q = request_create(e, o, &error);
    pthread_mutex_lock(&r->lock);
    if (q && r->n_inbox + r->n_waiting + 1 > r->max_queue) {
        error_set(&error, "the queue is full: %zu requests wait (limit %zu)", r->n_inbox + r->n_waiting, r->max_queue);
        status = TANDEM_BUSY;
    } else if (q) {
        q->id = ++r->last_id;
        if (id) *id = q->id;
        q->prev = r->inbox_last;
        if (r->inbox_last) r->inbox_last->next = q;
        else r->inbox_first = q;
        r->inbox_last = q;
        r->n_inbox++;
        pthread_cond_signal(&r->changed);
        status = TANDEM_OK;
    }
    pthread_mutex_unlock(&r->lock);
    if (status == TANDEM_OK) return status;
    request_free(q);
    if (err && err_size) snprintf(err, err_size, "%s", error.text);
    return status;
}

void tandem_cancel(tandem_engine *e, uint64_t id) {
    struct requests *r = e->requests;
    pthread_mutex_lock(&r->lock);
    if (r->n_cancels == r->cap_cancels) {
        size_t cap = r->cap_cancels ? 2 * r->cap_cancels : 64;
        uint64_t *list = size_realloc(r->cancels, cap, sizeof *list);
        if (list) {
            r->cancels = list;
            r->cap_cancels = cap;
        }
    }
    if (r->n_cancels < r->cap_cancels) r->cancels[r->n_cancels++] = id;
    pthread_cond_signal(&r->changed);
    pthread_mutex_unlock(&r->lock);
}

static bool has_work(const struct requests *r) {
    return r->busy || r->inbox_first || r->n_cancels;
}

bool tandem_wait(tandem_engine *e, double seconds) {
    struct requests *r = e->requests;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    if (!(seconds > 0)) seconds = 0;
    if (seconds > 1e6) seconds = 1e6;
    until.tv_sec += (time_t)seconds;
    until.tv_nsec += (long)((seconds - (double)(time_t)seconds) * 1e9);
    if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
    pthread_mutex_lock(&r->lock);
    while (!has_work(r))
        if (pthread_cond_timedwait(&r->changed, &r->lock, &until) == ETIMEDOUT) break;
    bool work = has_work(r);
    pthread_mutex_unlock(&r->lock);
    return work;
}

tandem_stats tandem_statistics(tandem_engine *e) {
    struct requests *r = e->requests;
    pthread_mutex_lock(&r->lock);
    tandem_stats stats = r->stats;
    stats.n_waiting = r->n_waiting + r->n_inbox;
    stats.max_waiting = r->max_queue;
    pthread_mutex_unlock(&r->lock);
    return stats;
}

// ---- Events: the engine's thread

struct sink {
    tandem_engine *engine;
    struct requests *r;
    tandem_event_callback *callback;
    void *user;
};

static bool tell(struct sink *k, const struct choice *c, tandem_event event) {
    const struct request *q = c->request;
    event.request = q->id;
    event.user = q->options.user;
    event.choice = c->index;
    event.n_prompt = c->seq.n_prompt;
    event.n_cached = q->choices[0].seq.n_reused;
    event.n_generated = c->n_known - c->seq.n_prompt;
    return !k->callback || k->callback(k->user, &event);
}

static void drop_request(struct requests *r, struct request *q) {
    if (q->prev) q->prev->next = q->next;
    else r->first = q->next;
    if (q->next) q->next->prev = q->prev;
    else r->newest = q->prev;
    if (q->n_flying) q->dropped = true;
    else request_free(q);
}

// Ends one choice; with the last one the request goes. `error`: it failed, and nothing that it computed is kept.
static void end_choice(struct sink *k, struct choice *c, enum tandem_finish finish, const char *error) {
    struct request *q = c->request;
    if (c->ended) return;
    c->ended = true;
    sched_end(&k->r->sched, &c->seq, finish == TANDEM_FINISH_ERROR);
    tell(k, c, (tandem_event){.kind = TANDEM_EVENT_DONE, .finish = finish, .error = error, .logits_hash = c->hash});
    if (--q->n_live == 0) drop_request(k->r, q);
}

static void end_request(struct sink *k, struct request *q, enum tandem_finish finish, const char *error) {
    size_t n = q->n_choices;
    struct choice *choices = q->choices;
    for (size_t i = 0; i < n; i++) {
        bool last = q->n_live == 1;
        bool live = !choices[i].ended;
        end_choice(k, &choices[i], finish, error);
        if (live && last) return; // the request is gone
    }
}

// What other threads asked for since the last step.
static void take_inbox(struct sink *k) {
    struct requests *r = k->r;
    pthread_mutex_lock(&r->lock);
    struct request *inbox = r->inbox_first;
    uint64_t *cancels = r->cancels;
    size_t n_cancels = r->n_cancels;
    r->inbox_first = r->inbox_last = NULL;
    r->cancels = NULL;
    r->n_waiting += r->n_inbox;
    r->n_inbox = r->n_cancels = r->cap_cancels = 0;
    pthread_mutex_unlock(&r->lock);
    for (struct request *q = inbox, *next; q; q = next) {
        struct error err = {0};
        next = q->next;
        q->prev = r->newest;
        q->next = NULL;
        if (r->newest) r->newest->next = q;
        else r->first = q;
        r->newest = q;
        if (sched_submit(&r->sched, &q->choices[0].seq, &err) != SCHED_TAKEN)
            end_request(k, q, TANDEM_FINISH_ERROR, err.text);
    }
    for (size_t i = 0; i < n_cancels; i++)
        for (struct request *q = r->first; q; q = q->next)
            if (q->id == cancels[i]) {
                end_request(k, q, TANDEM_FINISH_CANCELLED, NULL);
                break;
            }
    free(cancels);
}

// The log-probabilities of the prompt's tokens that the n rows of logits, which end at position n_kv - 1, decide.
static bool tell_prompt(struct sink *k, struct choice *c, const float *logits, size_t n_rows) {
    tandem_engine *e = k->engine;
    size_t n_vocab = e->model->config.n_vocab, first = c->seq.kv.n_kv - n_rows;
    struct request *q = c->request;
    for (size_t i = 0; i < n_rows; i++) {
        size_t position = first + i + 1; // of the token that row i decides
        const float *row = logits + i * n_vocab;
        if (position >= c->seq.n_prompt || position <= q->n_told) continue;
        struct error err = {0};
        if (!engine_check_logits(e, row, c->seq.ids, &c->seq.kv, position, &err)) {
            end_request(k, q, TANDEM_FINISH_ERROR, err.text);
            return false;
        }
        int32_t id = c->seq.ids[position];
        logits_top(row, n_vocab, k->r->top, q->options.n_top);
        q->n_told = position;
        tell(k, c,
             (tandem_event){.kind = TANDEM_EVENT_PROMPT,
                            .position = position,
                            .token = {.id = id, .logprob = logits_logprob(row, n_vocab, id)},
                            .top = k->r->top,
                            .n_top = q->options.n_top});
    }
    return true;
}

// Whether a device chooses a choice's tokens, and nothing more is asked about them: then its logits stay there.
static bool is_chosen_there(const tandem_engine *e, const struct choice *c) {
    const tandem_request_options *o = &c->request->options;
    return engine_can_choose(e, &c->sampling) && !o->mask && !o->logprobs && !o->hash && !c->seq.wants_all;
}

// Puts a token behind a choice's known ids and tells of it.
static void accept(struct sink *k, struct choice *c, tandem_event event) {
    int32_t id = event.token.id;
    event.position = c->n_known;
    c->seq.ids[c->n_known++] = id;
    if (c->seq.n_ids < c->n_known) c->seq.n_ids = c->n_known; // no stand-in held the place
    k->r->now.n_generated_tokens++;
    bool go_on = tell(k, c, event);
    if (!go_on || engine_is_end(k->engine, id)) end_choice(k, c, TANDEM_FINISH_END, NULL);
    else if (c->n_known == c->seq.n_limit) end_choice(k, c, TANDEM_FINISH_LENGTH, NULL);
}

// A device's choice for a choice's next token.
static void take(struct sink *k, struct choice *c, const struct greedy_choice *chosen) {
    tandem_engine *e = k->engine;
    struct error err = {0};
    if (chosen->ok) {
        accept(k, c, (tandem_event){.kind = TANDEM_EVENT_TOKEN, .token = {.id = chosen->id}});
        return;
    }
    if (c->seq.kv.n_kv < c->n_known) error_set(&err, "NaN or Inf in the logits of position %zu", c->n_known - 1);
    else engine_explain_logits(e, c->seq.ids, &c->seq.kv, c->n_known, &err);
    end_choice(k, c, TANDEM_FINISH_ERROR, err.text);
}

// Whether a device chose a choice's next token.
static bool was_chosen_there(const tandem_engine *e, const struct flight *f, const struct choice *c) {
    return f->has_chosen && is_chosen_there(e, c) && c->n_known < c->seq.n_limit;
}

// The token of one choice, to be chosen from its logits.
static struct engine_choice choice_of(const struct choice *c, const float *logits, tandem_token *top) {
    const tandem_request_options *o = &c->request->options;
    return (struct engine_choice){.logits = logits,
                                  .sampling = &c->sampling,
                                  .history = {.ids = c->seq.ids, .n = c->seq.n_ids, .n_prompt = c->seq.n_prompt},
                                  .mask = o->mask ? o->mask(o->user, c->index) : NULL,
                                  .wants_logprob = o->logprobs,
                                  .wants_hash = o->hash,
                                  .top = top,
                                  .n_top = o->logprobs ? o->n_top : 0,
                                  .hash = c->hash};
}

// Chooses all tokens that a step leaves to the host, before any of them is told of: side by side.
static void choose(struct sink *k, const struct flight *f) {
    tandem_engine *e = k->engine;
    struct requests *r = k->r;
    size_t n = 0;
    for (size_t i = 0; i < f->n_shares; i++) {
        const struct flight_share *s = &f->shares[i];
        struct choice *c = s->choice;
        if (s->at == NOWHERE || c->ended) continue;
        size_t n_forks = c->seq.n_forks, row = s->row + s->n_rows - 1;
        for (size_t fork = 0; fork <= n_forks; fork++) {
            struct choice *to = &c[fork]; // a request's choices stand side by side; the first is forked
            if (to->ended || to->seq.n_ids == to->seq.n_limit || (fork == 0 && was_chosen_there(e, f, to))) continue;
            r->chosen[n] = choice_of(to, run_logits(e->run) + row * e->model->config.n_vocab, r->tops + n * MAX_TOP);
            to->chosen = &r->chosen[n++];
        }
    }
    engine_choose(e, r->chosen, n);
}

// Takes what the host chose for a choice's next token.
static void sample(struct sink *k, struct choice *c) {
    tandem_engine *e = k->engine;
    const struct engine_choice *chosen = c->chosen;
    struct error err = {0};
    c->chosen = NULL;
    if (!chosen) {
        end_choice(k, c, TANDEM_FINISH_LENGTH, NULL);
        return;
    }
    if (!chosen->is_finite) {
        engine_explain_logits(e, c->seq.ids, &c->seq.kv, c->seq.n_ids, &err);
        end_choice(k, c, TANDEM_FINISH_ERROR, err.text);
        return;
    }
    c->hash = chosen->hash;
    accept(k, c,
           (tandem_event){.kind = TANDEM_EVENT_TOKEN,
                          .token = chosen->token,
                          .top = chosen->n_top ? chosen->top : NULL,
                          .n_top = chosen->n_top});
}

// What one share of a step leads to.
static void use_share(struct sink *k, const struct flight *f, const struct flight_share *share) {
    struct choice *c = share->choice;
    struct request *q = c->request;
    if (!q->started) {
        q->started = true;
        k->r->now.n_cached_tokens += c->seq.n_reused;
        tell(k, c, (tandem_event){.kind = TANDEM_EVENT_START});
    }
    if (share->n_rows && c->seq.wants_all) {
        const float *logits = run_logits(k->engine->run) + share->row * k->engine->model->config.n_vocab;
        if (!tell_prompt(k, c, logits, share->n_rows)) return;
    }
    if (share->at == NOWHERE) return;
    bool there = was_chosen_there(k->engine, f, c);
    if (c->seq.n_forks) {
        struct choice *choices = q->choices;
        size_t n = q->n_choices;
        for (size_t i = 1; i < n; i++) sched_fork(&k->r->sched, &c->seq, &choices[i].seq);
        for (size_t i = 1; i < n; i++) sample(k, &choices[i]); // choice 0 lives: so does the request
    }
    if (there) take(k, c, &f->chosen[share->row + share->n_rows - 1]);
    else sample(k, c);
}

// ---- Steps under way: the engine's thread

// Waits for a step and puts the tokens that a device chose in the places of their stand-ins.
static void land(tandem_engine *e, struct flight *f) {
    if (!f->is_out || f->has_landed) return;
    f->has_landed = true;
    if (!f->has_chosen) return;
    const struct greedy_choice *chosen = run_choices_of(e->run, f->turn);
    if (f->n_rows) memcpy(f->chosen, chosen, f->n_rows * sizeof *chosen);
    for (size_t i = 0; f->is_late && i < f->n_shares; i++) {
        const struct flight_share *s = &f->shares[i];
        if (s->at != NOWHERE) s->choice->seq.ids[s->at] = f->chosen[s->row + s->n_rows - 1].id;
    }
}

void requests_settle(tandem_engine *e) {
    for (int i = 0; e->requests && i < 2; i++) land(e, &e->requests->flights[i]);
}

// Tells of a step, which makes what it led to known.
static void deliver(struct sink *k, struct flight *f) {
    if (!f->is_out) return;
    land(k->engine, f);
    choose(k, f);
    for (size_t i = 0; i < f->n_shares; i++) {
        const struct flight_share *s = &f->shares[i];
        if (f->is_late && s->choice->seq.state != SCHED_ENDED) sched_know(&k->r->sched, &s->choice->seq);
        if (!s->choice->ended) use_share(k, f, s);
        release(s->choice->request);
    }
    f->is_out = false;
}

// Whether a planned share leaves nothing to the host that the next step waits for.
static bool can_be_late(const tandem_engine *e, const struct sched_share *s) {
    const struct choice *c = (const struct choice *)s->seq;
    if (s->seq->wants_all && s->n_rows) return false;
    if (s->seq->kv.n_kv + s->n < s->seq->n_ids) return true; // a part of its prompt
    return s->seq->n_forks == 0 && s->seq->n_ids < s->seq->n_limit && is_chosen_there(e, c);
}

static void publish(struct requests *r) {
    const struct kv_pool *p = r->sched.pool;
    r->now.n_running = r->sched.n_running;
    r->now.kv_pages_used = p->n_pages - kv_available(p);
    r->now.kv_pages_cached = p->n_idle;
    r->now.n_preemptions = r->sched.n_preemptions;
    r->now.n_evictions = p->n_evicted;
    pthread_mutex_lock(&r->lock);
    r->n_waiting = r->sched.n_waiting;
    r->busy = r->first != NULL;
    r->stats = r->now;
    pthread_mutex_unlock(&r->lock);
}

// Queues the planned step.
static void begin_plan(struct sink *k, struct flight *f) {
    struct requests *r = k->r;
    tandem_engine *e = k->engine;
    *f = (struct flight){.shares = f->shares,
                         .chosen = f->chosen,
                         .n_shares = r->step.n_shares,
                         .is_out = true,
                         .is_late = e->ops->sample != NULL,
                         .has_chosen = e->ops->sample != NULL};
    for (size_t i = 0; i < r->step.n_copies; i++)
        kv_store_copy_page(&e->kv, (size_t)r->step.copies[i].from, (size_t)r->step.copies[i].to);
    for (size_t i = 0; i < r->step.n_shares; i++) {
        const struct sched_share *s = &r->step.shares[i];
        struct choice *c = (struct choice *)s->seq;
        r->shares[i] = (struct engine_share){.ids = s->seq->ids,
                                             .kv = &s->seq->kv,
                                             .n = s->n,
                                             .n_rows = s->n_rows,
                                             .sampling = is_chosen_there(e, c) ? &c->sampling : NULL};
        f->shares[i] = (struct flight_share){.choice = c, .n_rows = s->n_rows, .row = f->n_rows, .at = NOWHERE};
        f->n_rows += s->n_rows;
        c->request->n_flying++;
        if (s->seq->n_ids == s->seq->n_prompt) r->now.n_prompt_tokens += s->n;
        f->is_late = f->is_late && can_be_late(e, s);
    }
    engine_queue(e, r->shares, r->step.n_shares);
    f->turn = run_turn(e->run);
    r->now.n_steps++;
    if (f->is_late) sched_begin(&r->sched, &r->step);
    else sched_commit(&r->sched, &r->step);
    for (size_t i = 0; i < f->n_shares; i++) {
        struct flight_share *s = &f->shares[i];
        struct sched_seq *seq = &s->choice->seq;
        if (seq->kv.n_kv < seq->n_ids) continue;
        s->at = seq->n_ids;
        if (!f->is_late) continue;
        seq->ids[seq->n_ids++] = ~(int32_t)(s->row + s->n_rows - 1);
        seq->is_over = seq->n_ids == seq->n_limit;
    }
}

int tandem_step(tandem_engine *e, tandem_event_callback *callback, void *user) {
    struct requests *r = e->requests;
    struct sink k = {.engine = e, .r = r, .callback = callback, .user = user};
    struct sched_seq *stuck = NULL;
    pthread_mutex_lock(&e->lock);
    struct flight *before = &r->flights[r->last], *now = &r->flights[1 - r->last];
    take_inbox(&k);
    sched_plan(&r->sched, &r->step, &stuck);
    if (stuck && !before->is_out)
        end_request(&k, ((struct choice *)stuck)->request, TANDEM_FINISH_ERROR,
                    "no free KV page: all are held by this engine's sessions");
    else if (r->step.n_shares) begin_plan(&k, now);
    deliver(&k, before);
    if (!now->is_late || !r->first) deliver(&k, now); // else it is told of when the next one is under way
    r->last = 1 - r->last;
    publish(r);
    bool busy = r->first != NULL;
    pthread_mutex_unlock(&e->lock);
    return busy ? TANDEM_OK : TANDEM_END;
}
