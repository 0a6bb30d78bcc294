// stage_serving.c: the engine as requests see it. Whatever may not change a sequence's bits is changed, one thing at a
// time, and the hashes of the logits behind every generated token must stay: chunks of the prompt, neighbours in the
// batch, pages, reuse of KV, recomputation, the scheduler, threads, the standard path, and NaN in all unused memory.
#include "doctor/doctor.h"

#include "base/clock.h"
#include "base/size.h"
#include "ops/kv_page.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REPLY = 6, MAX_PROMPT = 70, BATCH = 64 };

// What a session or request gave: for each generated token its id, the hash of all logits so far, and its own logit.
struct outcome {
    int32_t id[REPLY];
    uint64_t hash[REPLY];
    double logit[REPLY];
    size_t n;
    char error[256]; // "" when all went well
};

struct stage {
    struct doctor *d;
    struct stage_report *r;
    struct error *err;
    tandem_engine *engine;
    int32_t prompt[MAX_PROMPT], other[MAX_PROMPT]; // two prompts without a common beginning
    size_t n;                                      // tokens of both
    struct outcome plain;                          // what the prompt gives alone, in one chunk
    size_t n_ways, n_skipped;
    uint64_t n_preemptions, n_cached;
};

static tandem_sampling greedy(void) {
    return (tandem_sampling){.top_p = 1, .repeat_penalty = 1, .ignore_end = true};
}

struct engine_size {
    int threads; // 0: the doctor's
    size_t chunk, max_batch, context, kv_tokens;
};

static tandem_engine *open_engine(struct stage *s, struct engine_size size) {
    char why[1024];
    tandem_options o = {.model = s->d->options.model,
                        .threads = size.threads ? size.threads : pool_size(s->d->pool),
                        .context = size.context,
                        .kv_tokens = size.kv_tokens,
                        .chunk = size.chunk,
                        .max_batch = size.max_batch,
                        .fusion = s->d->options.fusion,
                        .isa = s->d->options.isa,
                        .device = s->d->options.device ? s->d->options.device : "cpu",
                        .kv_type = s->d->options.kv_type};
    tandem_engine *e = tandem_open(&o, why, sizeof why);
    if (!e) {
        error_set(s->err, "%s", why);
        return NULL;
    }
    doctor_poison(&e->kv, e->kv.memory, e->kv.bytes); // NaN in every type of KV: a slot is written before it is read
    run_poison(e->run);
    return e;
}

// ---- Asking --------------------------------------------------------------------------------------------------------

static tandem_session *new_session(struct stage *s, tandem_engine *e, const int32_t *ids, size_t n) {
    char why[1024];
    tandem_sampling sampling = greedy();
    tandem_session *t = tandem_session_new(e, &sampling, why, sizeof why);
    if (t && tandem_session_append(t, ids, n, why, sizeof why) == TANDEM_OK) return t;
    tandem_session_free(t);
    error_set(s->err, "%s", why);
    return NULL;
}

static void record(struct outcome *o, const tandem_session *t, const tandem_token *token) {
    o->id[o->n] = token->id;
    o->hash[o->n] = t->hash;
    o->logit[o->n] = (double)t->last_logits[token->id];
    o->n++;
}

// The next n tokens of a session, one after the other.
static void continue_alone(tandem_session *t, size_t n, struct outcome *o) {
    for (size_t i = 0; i < n && !o->error[0]; i++) {
        tandem_token token;
        int status = tandem_session_next(t, &token, o->error, sizeof o->error);
        if (status == TANDEM_OK || status == TANDEM_END) {
            o->error[0] = '\0';
            record(o, t, &token);
        } else if (!o->error[0]) {
            snprintf(o->error, sizeof o->error, "tandem_session_next returned %d", status);
        }
    }
}

static void wrong(struct stage *s, const char *check, const char *variant, const struct outcome *got, size_t first,
                  size_t i) {
    struct fault *f = stage_fault(s->r, FAULT_SERVING, check);
    f->prompt = 0;
    f->position = (int)(s->n + first + i) - 1; // of the token whose logits differ
    snprintf(f->variant, sizeof f->variant, "%s", variant);
    snprintf(f->tensor, sizeof f->tensor, "logits");
    if (got->error[0]) {
        fault_say(f, "%s, %s: after %zu tokens the engine says: %s", check, variant, got->n, got->error);
        return;
    }
    f->channel = got->id[i];
    f->expected = s->plain.logit[first + i];
    f->found = got->logit[i];
    fault_say(f, "%s, %s: the logits behind position %d differ: token %d (logit %.9g) instead of token %d (logit %.9g)",
              check, variant, f->position, got->id[i], got->logit[i], s->plain.id[first + i],
              s->plain.logit[first + i]);
}

// Tokens first .. of the plain answer.
static void expect_same(struct stage *s, const char *check, const char *variant, const struct outcome *got,
                        size_t first, size_t n) {
    s->n_ways++;
    for (size_t i = 0; i < n; i++) {
        s->r->n_checks++;
        // A hash chains all logits since a session began: sessions that begin later cannot be compared by it.
        bool same = i < got->n && got->id[i] == s->plain.id[first + i] &&
                    (first > 0 ? got->logit[i] == s->plain.logit[first + i] : got->hash[i] == s->plain.hash[i]);
        if (same) continue;
        wrong(s, check, variant, got, first, i < got->n ? i : got->n > 0 ? got->n - 1 : 0);
        return;
    }
}

// KV pages that nobody holds become NaN: what a check computed must not be there when the next one forgets to.
static void poison_free_pages(tandem_engine *e) {
    const struct kv_store *kv = &e->kv;
    for (size_t page = 0; page < kv->n_pages; page++) {
        if (e->pages.uses[page] > 0 || kv_is_cached(&e->pages, (int32_t)page)) continue;
        for (size_t i = 0; i < kv->n_layers; i++) {
            const struct kv_layer *l = &kv->layers[i];
            size_t bytes = kv_page_bytes(l);
            doctor_poison(kv, (unsigned char *)l->k + page * bytes, bytes);
            doctor_poison(kv, (unsigned char *)l->v + page * bytes, bytes);
        }
    }
}

// The prompt alone in a fresh session.
static bool ask(struct stage *s, tandem_engine *e, const char *check, const char *variant) {
    struct outcome o = {0};
    poison_free_pages(e);
    tandem_session *t = new_session(s, e, s->prompt, s->n);
    if (!t) return false;
    continue_alone(t, REPLY, &o);
    expect_same(s, check, variant, &o, 0, REPLY);
    tandem_session_free(t);
    return true;
}

// Whether there is time for another check; counts what is left out.
static bool time_left(struct stage *s) {
    if (clock_seconds() < s->d->deadline) return true;
    s->n_skipped++;
    return false;
}

// ---- One prompt ----------------------------------------------------------------------------------------------------

static bool check_plain(struct stage *s) {
    tandem_session *t = new_session(s, s->engine, s->prompt, s->n);
    if (!t) return false;
    continue_alone(t, REPLY, &s->plain);
    tandem_session_free(t);
    if (s->plain.n == REPLY) return ask(s, s->engine, "the same request twice", "alone");
    wrong(s, "the engine answers", "alone", &s->plain, 0, 0);
    return true;
}

static bool check_chunks(struct stage *s) {
    static const size_t chunks[] = {1, 7, 32, 2, 31, 33, 64};
    size_t whole = s->engine->chunk;
    bool ok = true;
    for (size_t i = 0; ok && i < sizeof chunks / sizeof chunks[0]; i++) {
        char variant[64];
        if (chunks[i] >= s->n || (i >= 3 && !time_left(s))) continue;
        s->engine->chunk = chunks[i];
        snprintf(variant, sizeof variant, "chunks of %zu", chunks[i]);
        ok = ask(s, s->engine, chunks[i] == 1 ? "prefill = decode" : "the chunk size does not matter", variant);
    }
    s->engine->chunk = whole;
    return ok;
}

// What was generated, given as a prompt, must lead to the same next token; and ids may come in pieces.
static bool check_pieces(struct stage *s) {
    int32_t ids[MAX_PROMPT + REPLY];
    char why[256];
    poison_free_pages(s->engine);
    memcpy(ids, s->prompt, s->n * sizeof *ids);
    memcpy(ids + s->n, s->plain.id, REPLY * sizeof *ids);
    tandem_session *t = new_session(s, s->engine, ids, s->n + REPLY - 1);
    if (!t) return false;
    struct outcome o = {0};
    continue_alone(t, 1, &o);
    expect_same(s, "prefill = decode", "the reply as part of the prompt", &o, REPLY - 1, 1);
    tandem_session_free(t);
    t = new_session(s, s->engine, ids, 5);
    if (!t) return false;
    struct outcome p = {0}, ignored = {0};
    continue_alone(t, 1, &ignored);
    bool ok = tandem_session_truncate(t, 5, why, sizeof why) == TANDEM_OK &&
              tandem_session_append(t, ids + 5, s->n - 5, why, sizeof why) == TANDEM_OK;
    if (!ok) error_set(s->err, "%s", why);
    t->hash = 0;
    if (ok) continue_alone(t, REPLY, &p);
    if (ok) expect_same(s, "appends do not matter", "after 5 tokens and one step", &p, 0, REPLY);
    tandem_session_free(t);
    return ok;
}

// Pages are taken and given back out of order, so that the prompt gets others; unused ones stay NaN.
static bool check_pages(struct stage *s) {
    enum { N = 5 };
    tandem_session *held[N] = {0};
    struct outcome ignored;
    bool ok = true;
    for (size_t i = 0; ok && i < N; i++) {
        held[i] = new_session(s, s->engine, s->other, i % 2 ? s->n : s->n / 2);
        ok = held[i] != NULL;
        ignored = (struct outcome){0};
        if (ok) continue_alone(held[i], 1, &ignored);
    }
    for (size_t i = 0; i < N; i += 2) {
        tandem_session_free(held[i]);
        held[i] = NULL;
    }
    ok = ok && ask(s, s->engine, "page numbers do not matter", "pages in another order");
    for (size_t i = 0; i < N; i++) tandem_session_free(held[i]);
    return ok;
}

// ---- Reuse ---------------------------------------------------------------------------------------------------------

static bool set_ids(struct stage *s, tandem_session *t, const int32_t *ids, size_t n, size_t *reused) {
    char why[256];
    if (tandem_session_set(t, ids, n, reused, why, sizeof why) == TANDEM_OK) return true;
    return error_set(s->err, "%s", why);
}

// A fork that goes another way, in turns with its origin: two that write to one page would undo each other's work.
static bool check_parting(struct stage *s) {
    char why[256];
    struct outcome whole = s->plain, ignored = {0}, parted = {0};
    tandem_session *t = new_session(s, s->engine, s->prompt, s->n), *fork = NULL, *cold = NULL;
    if (!t) return false;
    continue_alone(t, 1, &ignored);
    fork = tandem_session_fork(t, why, sizeof why);
    bool ok = fork && tandem_session_append(fork, s->other, 1, why, sizeof why) == TANDEM_OK;
    if (!ok) error_set(s->err, "%s", why);
    ignored = (struct outcome){0};
    if (ok) continue_alone(fork, 1, &ignored);
    ignored = (struct outcome){0};
    if (ok) continue_alone(t, 2, &ignored);
    ok = ok && (cold = new_session(s, s->engine, fork->ids, fork->n_ids)) != NULL;
    if (ok) {
        fork->hash = 0;
        continue_alone(fork, 2, &parted);
        s->plain = (struct outcome){0};
        continue_alone(cold, 2, &s->plain);
        expect_same(s, "forks do not disturb each other", "a fork with another continuation", &parted, 0, 2);
    }
    s->plain = whole;
    tandem_session_free(t);
    tandem_session_free(fork);
    tandem_session_free(cold);
    return ok;
}

static bool check_reuse(struct stage *s) {
    int32_t ids[MAX_PROMPT];
    char why[256];
    size_t reused = 0;
    struct outcome a = {0}, b = {0}, c = {0}, f = {0}, g = {0}, ignored = {0};
    poison_free_pages(s->engine);
    memcpy(ids, s->prompt, s->n * sizeof *ids);
    ids[s->n * 2 / 3] = s->other[0]; // the beginning is the prompt's, the rest is computed for nothing
    tandem_session *t = new_session(s, s->engine, ids, s->n);
    if (!t) return false;
    continue_alone(t, 2, &ignored);
    bool ok = set_ids(s, t, s->prompt, s->n, &reused);
    t->hash = 0;
    if (ok) continue_alone(t, REPLY, &a);
    if (ok) expect_same(s, "prefix reuse = cold", "tandem_session_set after another ending", &a, 0, REPLY);
    ok = ok && tandem_session_truncate(t, s->n, why, sizeof why) == TANDEM_OK;
    t->hash = 0;
    if (ok) continue_alone(t, REPLY, &b);
    if (ok) expect_same(s, "prefix reuse = cold", "tandem_session_truncate after the reply", &b, 0, REPLY);
    ok = ok && tandem_session_truncate(t, 0, why, sizeof why) == TANDEM_OK &&
         tandem_session_append(t, s->prompt, s->n, why, sizeof why) == TANDEM_OK;
    t->hash = 0;
    if (ok) continue_alone(t, REPLY, &c);
    if (ok) expect_same(s, "recomputed = kept", "all KV dropped and computed again", &c, 0, REPLY);
    tandem_session_free(t);
    t = ok ? new_session(s, s->engine, s->prompt, s->n) : NULL;
    if (!t) return false;
    continue_alone(t, 2, &f);
    tandem_session *fork = tandem_session_fork(t, why, sizeof why);
    if (!fork) {
        tandem_session_free(t);
        return error_set(s->err, "%s", why);
    }
    g = f;
    continue_alone(t, REPLY - 2, &f);
    continue_alone(fork, REPLY - 2, &g);
    expect_same(s, "forks do not disturb each other", "the origin", &f, 0, REPLY);
    expect_same(s, "forks do not disturb each other", "the fork", &g, 0, REPLY);
    tandem_session_free(t);
    tandem_session_free(fork);
    return check_parting(s);
}

// ---- Batches -------------------------------------------------------------------------------------------------------

// The prompt at place `mine` among n sessions with other prompts of other lengths, all in one step.
static bool check_batch(struct stage *s, size_t n, size_t mine) {
    tandem_session *all[BATCH] = {0};
    tandem_token tokens[BATCH];
    int status[BATCH];
    struct outcome o = {0};
    char variant[64];
    bool ok = true;
    poison_free_pages(s->engine);
    for (size_t i = 0; ok && i < n; i++) {
        size_t from = i % 7, length = 1 + (i * 5) % 19;
        if (from + length > s->n) from = 0, length = 1;
        all[i] =
            i == mine ? new_session(s, s->engine, s->prompt, s->n) : new_session(s, s->engine, s->other + from, length);
        ok = all[i] != NULL;
    }
    for (size_t k = 0; ok && k < REPLY && !o.error[0]; k++) {
        if (tandem_next_many(all, n, tokens, status, o.error, sizeof o.error) < 0) break;
        if (status[mine] != TANDEM_OK && status[mine] != TANDEM_END) break;
        record(&o, all[mine], &tokens[mine]);
    }
    snprintf(variant, sizeof variant, "%zu sessions, this one at place %zu", n, mine);
    if (ok) expect_same(s, "batch 1 = batch N", variant, &o, 0, REPLY);
    for (size_t i = 0; i < n; i++) tandem_session_free(all[i]);
    return ok;
}

static bool check_batches(struct stage *s) {
    static const size_t sizes[] = {2, 5, 64, 16, 3, 8, 33};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        if (i >= 3 && !time_left(s)) continue;
        if (!check_batch(s, sizes[i], i % 2 ? 0 : sizes[i] - 1)) return false;
    }
    return true;
}

// A neighbour whose KV holds NaN fails by itself, and changes nothing here.
static bool check_poisoned_neighbour(struct stage *s) {
    struct outcome o = {0};
    char why[256] = "";
    tandem_session *pair[2] = {new_session(s, s->engine, s->other, s->n), new_session(s, s->engine, s->prompt, s->n)};
    bool ok = pair[0] && pair[1];
    tandem_token tokens[2];
    int status[2];
    for (size_t k = 0; ok && k < REPLY; k++) {
        if (k == 2) { // V of the neighbour's first page, layer 0
            const struct kv_layer *l = &s->engine->kv.layers[0];
            size_t page = kv_page_bytes(l);
            doctor_poison(&s->engine->kv, (unsigned char *)l->v + (size_t)pair[0]->kv.pages[0] * page, page);
        }
        tandem_next_many(pair, 2, tokens, status, why, sizeof why);
        if (k >= 2 && status[0] != TANDEM_ERROR) {
            struct fault *f = stage_fault(s->r, FAULT_SERVING, "NaN fails its sequence");
            f->position = (int)(s->n + k);
            fault_say(f, "a session whose KV holds NaN got token %d instead of an error", tokens[0].id);
            break;
        }
        if (status[1] != TANDEM_OK && status[1] != TANDEM_END) {
            snprintf(o.error, sizeof o.error, "%s", why);
            break;
        }
        record(&o, pair[1], &tokens[1]);
        if (k >= 2) break;
    }
    s->r->n_checks++;
    if (ok) expect_same(s, "batch 1 = batch N", "beside a session whose KV holds NaN", &o, 0, 3);
    tandem_session_free(pair[0]);
    tandem_session_free(pair[1]);
    return ok;
}

// ---- Sampling ------------------------------------------------------------------------------------------------------

// Noise belongs to a token, not to its place in the order: a token that was not chosen may be forbidden, and the choice
// stays.
static bool check_sampling(struct stage *s) {
    char why[256];
    tandem_session *t = new_session(s, s->engine, s->prompt, s->n);
    if (!t) return false;
    bool ok = true;
    for (uint64_t seed = 1; ok && seed <= 8; seed++) {
        const float never = -1000;
        int32_t likeliest = s->plain.id[0];
        tandem_sampling sampling = {
            .temperature = 1.5, .top_p = 1, .repeat_penalty = 1, .ignore_end = true, .seed = seed};
        int32_t chosen[2] = {-1, -1};
        for (int i = 0; ok && i < 2; i++) {
            struct outcome o = {0};
            if (i == 1) sampling.bias_ids = &likeliest, sampling.bias = &never, sampling.n_bias = 1;
            ok = tandem_session_set_sampling(t, &sampling, why, sizeof why) == TANDEM_OK &&
                 tandem_session_truncate(t, s->n, why, sizeof why) == TANDEM_OK;
            if (!ok) break;
            continue_alone(t, 1, &o);
            if (o.n) chosen[i] = o.id[0];
        }
        s->r->n_checks++;
        if (!ok || chosen[0] == chosen[1] || chosen[0] == likeliest) continue;
        struct fault *f = stage_fault(s->r, FAULT_SERVING, "noise belongs to the token");
        snprintf(f->op, sizeof f->op, "sampler_choose");
        f->prompt = 0;
        f->position = (int)s->n;
        f->expected = chosen[0];
        f->found = chosen[1];
        fault_say(
            f,
            "noise belongs to the token: seed %d chooses %d, and %d when token %d, which was not chosen, is forbidden",
            (int)seed, chosen[0], chosen[1], likeliest);
        break;
    }
    s->n_ways++;
    tandem_session_free(t);
    return ok || error_set(s->err, "%s", why);
}

// ---- The scheduler -------------------------------------------------------------------------------------------------

struct answers {
    struct stage *s;
    struct outcome out[4];
    size_t cached[4];
};

static bool take_event(void *user, const tandem_event *event) {
    (void)user;
    struct answers *a = event->user;
    // `user` of a request is the answers; which one is the request's number modulo four.
    struct outcome *o = &a->out[event->request % 4];
    if (event->kind == TANDEM_EVENT_START) a->cached[event->request % 4] = event->n_cached;
    if (event->kind == TANDEM_EVENT_TOKEN && o->n < REPLY) o->id[o->n++] = event->token.id;
    if (event->kind == TANDEM_EVENT_DONE) {
        if (o->n > 0) o->hash[o->n - 1] = event->logits_hash;
        if (event->error) snprintf(o->error, sizeof o->error, "%s", event->error);
    }
    return true;
}

// Tokens, and the hash of all logits, of one request.
static void expect_answer(struct stage *s, const char *check, const char *variant, struct outcome *got) {
    s->n_ways++;
    s->r->n_checks += REPLY;
    for (size_t i = 0; i < REPLY; i++) {
        bool last = i == REPLY - 1;
        if (i < got->n && got->id[i] == s->plain.id[i] && (!last || got->hash[i] == s->plain.hash[i])) continue;
        if (i < got->n) got->logit[i] = NAN; // events do not tell it
        wrong(s, check, variant, got, 0, i < got->n ? i : got->n > 0 ? got->n - 1 : 0);
        return;
    }
}

// n requests at once, of which every second is the prompt; long_tail: how many tokens each generates beyond REPLY.
static bool submit_all(struct stage *s, tandem_engine *e, struct answers *a, size_t n, size_t tokens, bool same) {
    tandem_sampling sampling = greedy();
    char why[256];
    *a = (struct answers){.s = s};
    uint64_t ids[4];
    for (size_t i = 0; i < n; i++) {
        tandem_request_options o = {.prompt = same || i % 2 == 0 ? s->prompt : s->other,
                                    .n_prompt = s->n,
                                    .max_tokens = tokens,
                                    .sampling = &sampling,
                                    .hash = true,
                                    .user = a};
        if (tandem_submit(e, &o, &ids[i], why, sizeof why) != TANDEM_OK) return error_set(s->err, "%s", why);
    }
    while (tandem_step(e, take_event, NULL) == TANDEM_OK) continue;
    struct answers sorted = {.s = s};
    for (size_t i = 0; i < n; i++) {
        sorted.out[i] = a->out[ids[i] % 4];
        sorted.cached[i] = a->cached[ids[i] % 4];
    }
    *a = sorted;
    return true;
}

// A prompt that comes when others' pages are cached and none of its own.
static bool check_stranger(struct stage *s) {
    struct answers a;
    struct outcome whole = s->plain;
    for (size_t i = 0; i < s->n; i++) s->other[i] = (int32_t)(((size_t)s->other[i] + 3) % s->d->model->config.n_vocab);
    tandem_session *t = new_session(s, s->engine, s->other, s->n);
    if (!t) return false;
    s->plain = (struct outcome){0};
    continue_alone(t, REPLY, &s->plain);
    tandem_session_free(t);
    bool ok = submit_all(s, s->engine, &a, 2, REPLY, false);
    if (ok) expect_answer(s, "another prompt's cache does not matter", "the first of its kind", &a.out[1]);
    s->plain = whole;
    return ok;
}

static bool check_requests(struct stage *s) {
    struct answers a;
    char variant[64];
    struct outcome whole = s->plain, other = {0};
    tandem_session *t = new_session(s, s->engine, s->other, s->n);
    if (!t) return false;
    continue_alone(t, REPLY, &other);
    tandem_session_free(t);
    poison_free_pages(s->engine);
    for (int round = 0; round < 2; round++) {
        if (!submit_all(s, s->engine, &a, 4, REPLY, false)) return false;
        for (size_t i = 0; i < 4; i += 2) {
            snprintf(variant, sizeof variant, "4 requests at once, %zu tokens from the cache", a.cached[i]);
            expect_answer(s, round ? "prefix cache = cold" : "requests = a session alone", variant, &a.out[i]);
            s->n_cached += a.cached[i];
        }
        s->plain = other; // the neighbours, too: what is cached for the prompt is nothing to them
        for (size_t i = 1; i < 4; i += 2)
            expect_answer(s, "another prompt's cache does not matter", "4 requests at once", &a.out[i]);
        s->plain = whole;
    }
    return check_stranger(s);
}

// So little KV that not all can run to their end: some are put back and computed again.
static bool check_preemption(struct stage *s) {
    size_t pages = (s->n + REPLY + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS; // of one request
    size_t n = s->n;
    // The prompt nearly fills its last page, so that every request asks for one more at the same time.
    s->n = pages * KV_PAGE_TOKENS - REPLY - KV_PAGE_TOKENS + 3;
    if (s->n < 4 || s->n > n) s->n = n;
    pages = (s->n + REPLY + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    tandem_engine *e = open_engine(s, (struct engine_size){.max_batch = 4,
                                                           .context = pages * KV_PAGE_TOKENS,
                                                           .kv_tokens = (2 * pages - 1) * KV_PAGE_TOKENS});
    struct outcome whole = s->plain;
    struct answers a;
    bool ok = e != NULL;
    if (ok) {
        tandem_session *t = new_session(s, e, s->prompt, s->n);
        s->plain = (struct outcome){0};
        ok = t != NULL;
        if (ok) continue_alone(t, REPLY, &s->plain);
        tandem_session_free(t);
    }
    ok = ok && submit_all(s, e, &a, 4, REPLY, false);
    for (size_t i = 0; ok && i < 4; i += 2)
        expect_answer(s, "preempted and recomputed = undisturbed", "4 requests, KV for fewer than two", &a.out[i]);
    if (ok) s->n_preemptions = tandem_statistics(e).n_preemptions;
    tandem_close(e);
    s->plain = whole;
    s->n = n;
    return ok;
}

// ---- Threads and paths ---------------------------------------------------------------------------------------------

static bool check_threads(struct stage *s) {
    int cores = pool_usable_cpus(), counts[] = {1, cores + 2, 3, 2};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        if (counts[i] == pool_size(s->d->pool) || (i >= 2 && !time_left(s))) continue;
        char variant[64];
        snprintf(variant, sizeof variant, "%d threads", counts[i]);
        tandem_engine *e = open_engine(s, (struct engine_size){.threads = counts[i],
                                                               .max_batch = 2,
                                                               .context = s->engine->context,
                                                               .kv_tokens = s->engine->context});
        bool ok = e && ask(s, e, "threads do not matter", variant);
        tandem_close(e);
        if (!ok) return false;
    }
    return true;
}

static bool check_standard(struct stage *s) {
    run_set_fusion(s->engine->run, 0);
    bool ok = ask(s, s->engine, "fused = standard", "--fusion=off");
    run_set_fusion(s->engine->run, s->engine->fusion);
    return ok;
}

static bool check_poison(struct stage *s) {
    run_poison(s->engine->run);
    return ask(s, s->engine, "unused memory does not matter", "activations and unused KV are NaN");
}

// ---- The stage -----------------------------------------------------------------------------------------------------

static bool open_stage(struct stage *s) {
    const struct model_config *c = &s->d->model->config;
    const struct doctor_prompt *p = &s->d->prompts[0];
    s->n = s->d->model->weight_bytes < ((size_t)256 << 20) ? MAX_PROMPT : 40;
    if (s->n + REPLY > c->context) s->n = c->context > REPLY + 8 ? c->context - REPLY : 8;
    if (s->n > p->n) s->n = p->n;
    for (size_t i = 0; i < s->n; i++) {
        s->prompt[i] = p->ids[i];
        s->other[i] = (int32_t)(((size_t)p->ids[s->n - 1 - i] + 1 + i) % c->n_vocab);
    }
    if (s->other[0] == s->prompt[0]) s->other[0] = (int32_t)(((size_t)s->other[0] + 1) % c->n_vocab);
    size_t context = s->n + REPLY + 2, pages = (context + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    if (context > c->context) context = c->context;
    s->engine = open_engine(s, (struct engine_size){.chunk = s->n,
                                                    .max_batch = BATCH,
                                                    .context = context,
                                                    .kv_tokens = (BATCH + 8 * pages) * KV_PAGE_TOKENS});
    return s->engine != NULL;
}

// In order of what they tell for their time.
static const struct {
    const char *name;
    bool (*run)(struct stage *);
} checks[] = {{"chunks", check_chunks},
              {"appends", check_pieces},
              {"pages", check_pages},
              {"reuse and forks", check_reuse},
              {"sampling", check_sampling},
              {"batches to 64", check_batches},
              {"NaN beside it", check_poisoned_neighbour},
              {"NaN in unused memory", check_poison},
              {"standard path", check_standard},
              {"scheduler and cache", check_requests},
              {"preemption", check_preemption},
              {"threads", check_threads}};

static bool run_checks(struct stage *s) {
    enum { N = sizeof checks / sizeof checks[0] };
    if (!check_plain(s)) return false;
    if (s->plain.n < REPLY) return true; // the engine itself fails: nothing can be compared
    struct buffer names = {0};
    for (size_t i = 0; i < N; i++) {
        if (i > 5 && !doctor_model_is_small(s->d) && clock_seconds() > s->d->deadline + 0.2 * s->d->options.budget) {
            stage_note(s->r, "not checked for lack of time: %s", checks[i].name);
            continue;
        }
        if (!checks[i].run(s)) {
            buffer_free(&names);
            return false;
        }
        (void)buffer_printf(&names, "%s%s", names.len ? ", " : "", checks[i].name);
        doctor_progress(s->d, (double)(i + 1) / N);
    }
    (void)buffer_printf(&s->r->summary, "%zu ways to ask for the same %d tokens%s: %s", s->n_ways, REPLY,
                        s->r->n_faults ? "" : ", the same bits", buffer_text(&names));
    buffer_free(&names);
    return true;
}

bool stage_serving(struct doctor *d, struct stage_report *r, struct error *err) {
    struct stage s = {.d = d, .r = r, .err = err};
    struct error why = {0};
    s.err = &why;
    bool opened = open_stage(&s);
    s.err = err;
    if (!opened) { // the model loads, and T runs it: an engine that does not is at fault
        r->n_checks++;
        struct fault *f = stage_fault(r, FAULT_SERVING, "the engine opens");
        snprintf(f->op, sizeof f->op, "tandem_open");
        fault_say(f, "%s", why.text);
        return true;
    }
    bool ok = run_checks(&s);
    tandem_close(s.engine);
    if (!ok) return false;
    stage_figure(r, "ways", (double)s.n_ways);
    stage_figure(r, "preemptions", (double)s.n_preemptions);
    stage_figure(r, "cached_tokens", (double)s.n_cached);
    if (s.n_skipped) stage_note(r, "%zu variants were left out for lack of time", s.n_skipped);
    return true;
}
