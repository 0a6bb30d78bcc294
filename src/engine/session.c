// session.c: sessions: which of their tokens are computed next, in which pages, and what is sampled. It owns no weights
// and no kernels.
#include "engine/engine.h"

#include "base/size.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const struct error *e, char *err, size_t err_size) {
    if (err && err_size) snprintf(err, err_size, "%s", e->text);
    return TANDEM_ERROR;
}

static size_t pages_for(size_t n_tokens) {
    return (n_tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
}

// ---- Life ---------------------------------------------------------------------------------------------------------

static bool copy_sampling(tandem_session *s, const tandem_sampling *p, struct error *err) {
    tandem_sampling copy;
    int32_t *ids;
    float *bias;
    if (!engine_copy_sampling(s->engine, p, &copy, &ids, &bias, err)) return false;
    free(s->bias_ids);
    free(s->bias);
    s->bias_ids = ids;
    s->bias = bias;
    s->sampling = copy;
    return true;
}

static tandem_session *session_create(tandem_engine *engine, const tandem_sampling *sampling, struct error *err) {
    tandem_session *s = size_alloc_zero(1, sizeof *s);
    if (!s) {
        error_set(err, "out of memory");
        return NULL;
    }
    s->engine = engine;
    s->ids = size_alloc(engine->context, sizeof *s->ids);
    s->kv.pages = size_alloc(pages_for(engine->context), sizeof *s->kv.pages);
    s->kv.tenant = KV_PRIVATE;
    tandem_sampling defaults = tandem_sampling_default(engine, true);
    bool ok = s->ids && s->kv.pages ? copy_sampling(s, sampling ? sampling : &defaults, err)
                                    : error_set(err, "out of memory for a session of %zu tokens", engine->context);
    if (!ok) {
        tandem_session_free(s);
        return NULL;
    }
    return s;
}

tandem_session *tandem_session_new(tandem_engine *engine, const tandem_sampling *sampling, char *err, size_t err_size) {
    struct error error = {0};
    tandem_session *s = session_create(engine, sampling, &error);
    if (!s) fail(&error, err, err_size);
    return s;
}

void tandem_session_free(tandem_session *s) {
    if (!s) return;
    pthread_mutex_lock(&s->engine->lock);
    kv_trim(&s->engine->pages, &s->kv, 0);
    pthread_mutex_unlock(&s->engine->lock);
    free(s->ids);
    free(s->kv.pages);
    free(s->bias_ids);
    free(s->bias);
    free(s);
}

int tandem_session_set_sampling(tandem_session *s, const tandem_sampling *sampling, char *err, size_t err_size) {
    struct error error = {0};
    return copy_sampling(s, sampling, &error) ? TANDEM_OK : fail(&error, err, err_size);
}

tandem_session *tandem_session_fork(tandem_session *from, char *err, size_t err_size) {
    tandem_session *s = tandem_session_new(from->engine, &from->sampling, err, err_size);
    if (!s) return NULL;
    pthread_mutex_lock(&s->engine->lock);
    memcpy(s->ids, from->ids, from->n_ids * sizeof *s->ids);
    kv_fork(&s->engine->pages, &s->kv, &from->kv);
    s->n_ids = from->n_ids;
    s->n_prompt = from->n_prompt;
    s->hash = from->hash;
    pthread_mutex_unlock(&s->engine->lock);
    return s;
}

// ---- Contents -----------------------------------------------------------------------------------------------------

static bool check_ids(const tandem_session *s, const int32_t *ids, size_t n, struct error *err) {
    size_t n_vocab = s->engine->model->config.n_vocab;
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || (size_t)ids[i] >= n_vocab)
            return error_set(err, "token id %d at index %zu is not in the vocabulary of %zu", ids[i], i, n_vocab);
    return true;
}

static bool check_room(const tandem_session *s, size_t held, size_t n, struct error *err) {
    if (n <= s->engine->context - held) return true;
    return error_set(err, "the prompt has %zu tokens, the context holds %zu (the model allows %zu)", held + n,
                     s->engine->context, s->engine->model->config.context);
}

int tandem_session_append(tandem_session *s, const int32_t *ids, size_t n, char *err, size_t err_size) {
    struct error error = {0};
    if (!check_ids(s, ids, n, &error) || !check_room(s, s->n_ids, n, &error)) return fail(&error, err, err_size);
    if (n) memcpy(s->ids + s->n_ids, ids, n * sizeof *ids);
    s->n_ids += n;
    s->n_prompt = s->n_ids;
    return TANDEM_OK;
}

int tandem_session_set(tandem_session *s, const int32_t *ids, size_t n, size_t *reused, char *err, size_t err_size) {
    struct error error = {0};
    if (!check_ids(s, ids, n, &error) || !check_room(s, 0, n, &error)) return fail(&error, err, err_size);
    pthread_mutex_lock(&s->engine->lock);
    size_t same = 0;
    while (same < n && same < s->kv.n_kv && s->ids[same] == ids[same]) same++;
    if (same == n && n > 0) same--; // the last token's logits are wanted: it is computed again
    kv_trim(&s->engine->pages, &s->kv, same);
    if (n) memcpy(s->ids, ids, n * sizeof *ids);
    s->n_ids = s->n_prompt = n;
    pthread_mutex_unlock(&s->engine->lock);
    if (reused) *reused = same;
    return TANDEM_OK;
}

int tandem_session_truncate(tandem_session *s, size_t n, char *err, size_t err_size) {
    struct error error = {0};
    if (n > s->n_ids) {
        error_set(&error, "cannot truncate to %zu tokens: the session holds %zu", n, s->n_ids);
        return fail(&error, err, err_size);
    }
    pthread_mutex_lock(&s->engine->lock);
    kv_trim(&s->engine->pages, &s->kv, n > 0 ? n - 1 : 0); // the last token's logits will be wanted
    s->n_ids = n;
    if (s->n_prompt > n) s->n_prompt = n;
    pthread_mutex_unlock(&s->engine->lock);
    return TANDEM_OK;
}

void tandem_session_cancel(tandem_session *s) {
    atomic_store(&s->cancelled, true);
}

const int32_t *tandem_session_ids(const tandem_session *s, size_t *n) {
    *n = s->n_ids;
    return s->ids;
}

// ---- Steps --------------------------------------------------------------------------------------------------------

// Makes the pages of positions [n_kv, n_kv + n) exist and belong to this session alone.
static bool make_room(tandem_session *s, size_t n, struct error *err) {
    struct kv_copy copy;
    if (!kv_reserve(&s->engine->pages, &s->kv, n, &copy))
        return error_set(err, "no free KV page: all %zu (of %d tokens each) are in use by this engine's sessions",
                         s->engine->pages.n_pages, KV_PAGE_TOKENS);
    if (copy.to >= 0) kv_store_copy_page(&s->engine->kv, (size_t)copy.from, (size_t)copy.to);
    return true;
}

// A session's share of a step: its next n tokens, and whether the last one's logits are wanted.
struct share {
    tandem_session *session;
    size_t n;
    bool wants_logits;
};

enum { GROUP = 64 }; // more sessions than that run in several steps: each row's bits are the same

// Runs one ragged batch. The rooms were made. Returns the logits, a row for each share that wants them, in order.
static const float *run_step(tandem_engine *e, const struct share *shares, size_t n_shares) {
    struct engine_share list[GROUP];
    for (size_t i = 0; i < n_shares; i++)
        list[i] = (struct engine_share){.ids = shares[i].session->ids,
                                        .kv = &shares[i].session->kv,
                                        .n = shares[i].n,
                                        .n_rows = shares[i].wants_logits};
    const float *logits = engine_run(e, list, n_shares);
    for (size_t i = 0; i < n_shares; i++)
        kv_commit(&e->pages, &shares[i].session->kv, shares[i].session->ids, shares[i].n);
    return logits;
}

// A session's next token, to be chosen from its logits.
static struct engine_choice choice_of(const tandem_session *s, const float *logits) {
    return (struct engine_choice){.logits = logits,
                                  .sampling = &s->sampling,
                                  .history = {.ids = s->ids, .n = s->n_ids, .n_prompt = s->n_prompt},
                                  .wants_logprob = true,
                                  .wants_hash = true,
                                  .hash = s->hash};
}

// Puts a session's chosen token behind its ids.
static int take_token(tandem_session *s, const struct engine_choice *c, tandem_token *token, struct error *err) {
    tandem_engine *e = s->engine;
    if (!c->is_finite) {
        engine_explain_logits(e, s->ids, &s->kv, s->n_ids, err);
        kv_trim(&e->pages, &s->kv, 0);
        return TANDEM_ERROR;
    }
    s->last_logits = c->logits;
    s->hash = c->hash;
    *token = c->token;
    s->ids[s->n_ids++] = c->token.id;
    return engine_is_end(e, c->token.id) ? TANDEM_END : TANDEM_OK;
}

// Computes all but a session's last token, in chunks. TANDEM_OK, TANDEM_CANCELLED or TANDEM_ERROR.
static int prefill(tandem_session *s, struct error *err) {
    while (s->n_ids - s->kv.n_kv > 1) {
        if (atomic_exchange(&s->cancelled, false)) return TANDEM_CANCELLED;
        size_t n = s->n_ids - 1 - s->kv.n_kv;
        if (n > s->engine->chunk) n = s->engine->chunk;
        if (!make_room(s, n, err)) return TANDEM_ERROR;
        run_step(s->engine, &(struct share){.session = s, .n = n}, 1);
    }
    return TANDEM_OK;
}

// Whether a session can make a token at all.
static int can_continue(tandem_session *s, struct error *err) {
    if (atomic_exchange(&s->cancelled, false)) return TANDEM_CANCELLED;
    if (s->n_ids == 0) {
        error_set(err, "the session is empty: append a prompt of at least one token first");
        return TANDEM_ERROR;
    }
    return s->n_ids >= s->engine->context ? TANDEM_FULL : TANDEM_OK;
}

static bool check_group(tandem_session *const *sessions, size_t n, struct error *err) {
    if (n == 0) return error_set(err, "no session was given");
    if (n > sessions[0]->engine->max_batch)
        return error_set(err, "%zu sessions were given, max_batch is %zu", n, sessions[0]->engine->max_batch);
    for (size_t i = 0; i < n; i++) {
        if (sessions[i]->engine != sessions[0]->engine)
            return error_set(err, "session %zu belongs to another engine", i);
        for (size_t k = 0; k < i; k++)
            if (sessions[k] == sessions[i]) return error_set(err, "session %zu was given twice", i);
    }
    return true;
}

int tandem_next_many(tandem_session *const *sessions, size_t n, tandem_token *tokens, int *status, char *err,
                     size_t err_size) {
    struct error error = {0};
    if (!check_group(sessions, n, &error)) return fail(&error, err, err_size);
    tandem_engine *e = sessions[0]->engine;
    struct share shares[GROUP];
    struct engine_choice choices[GROUP];
    size_t where[GROUP];
    pthread_mutex_lock(&e->lock);
    for (size_t begin = 0; begin < n;) {
        size_t n_shares = 0;
        for (; begin < n && n_shares < GROUP; begin++) {
            tandem_session *s = sessions[begin];
            status[begin] = can_continue(s, &error);
            if (status[begin] == TANDEM_OK) status[begin] = prefill(s, &error);
            if (status[begin] == TANDEM_OK && !make_room(s, 1, &error)) status[begin] = TANDEM_ERROR;
            if (status[begin] != TANDEM_OK) continue;
            where[n_shares] = begin;
            shares[n_shares++] = (struct share){.session = s, .n = 1, .wants_logits = true};
        }
        if (n_shares == 0) continue;
        const float *logits = run_step(e, shares, n_shares);
        for (size_t i = 0; i < n_shares; i++)
            choices[i] = choice_of(shares[i].session, logits + i * e->model->config.n_vocab);
        engine_choose(e, choices, n_shares);
        for (size_t i = 0; i < n_shares; i++)
            status[where[i]] = take_token(shares[i].session, &choices[i], &tokens[where[i]], &error);
    }
    pthread_mutex_unlock(&e->lock);
    if (error.text[0]) fail(&error, err, err_size);
    return TANDEM_OK;
}

int tandem_session_next(tandem_session *s, tandem_token *token, char *err, size_t err_size) {
    int status = TANDEM_ERROR;
    int group = tandem_next_many(&s, 1, token, &status, err, err_size);
    return group < 0 ? group : status;
}

int tandem_session_generate(tandem_session *s, size_t max_tokens, tandem_token_callback *callback, void *user,
                            char *err, size_t err_size) {
    for (size_t i = 0; i < max_tokens; i++) {
        tandem_token token;
        int status = tandem_session_next(s, &token, err, err_size);
        if (status != TANDEM_OK) return status;
        size_t n = 0;
        const char *bytes = s->engine->tokenizer ? tokenizer_token_bytes(s->engine->tokenizer, token.id, &n) : NULL;
        if (callback && !callback(user, &token, bytes ? bytes : "", bytes ? n : 0)) break;
    }
    return TANDEM_OK;
}

bool engine_trace(tandem_engine *e, const int32_t *ids, size_t n, uint32_t fusion, tap_fn *tap, void *user,
                  struct error *err) {
    tandem_session *s = session_create(e, NULL, err);
    if (!s) return false;
    bool ok = check_ids(s, ids, n, err) && check_room(s, 0, n, err);
    pthread_mutex_lock(&e->lock);
    run_set_tap(e->run, tap, user);
    run_set_fusion(e->run, fusion);
    if (ok) {
        memcpy(s->ids, ids, n * sizeof *ids);
        s->n_ids = n;
    }
    // One token a step: the logits of every position, at the cost of speed; the bits are those of any other chunking.
    while (ok && s->kv.n_kv < n) {
        ok = make_room(s, 1, err);
        if (ok) run_step(e, &(struct share){.session = s, .n = 1, .wants_logits = true}, 1);
    }
    run_set_tap(e->run, NULL, NULL);
    run_set_fusion(e->run, e->fusion);
    pthread_mutex_unlock(&e->lock);
    tandem_session_free(s);
    return ok;
}
