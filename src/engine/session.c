// session.c: sessions and steps: which tokens of which sessions are computed next, in which pages, and what is sampled.
// It owns no weights and no kernels.
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

// ---- Life
// ------------------------------------------------------------------------------------------------------------

static bool copy_sampling(tandem_session *s, const tandem_sampling *p, struct error *err) {
    if (!sampling_check(p, s->engine->model->config.n_vocab, err)) return false;
    int32_t *ids = size_alloc(p->n_bias, sizeof *ids);
    float *bias = size_alloc(p->n_bias, sizeof *bias);
    if (!ids || !bias) {
        free(ids);
        free(bias);
        return error_set(err, "out of memory for %zu logit biases", p->n_bias);
    }
    for (size_t i = 0; i < p->n_bias; i++) {
        ids[i] = p->bias_ids[i];
        bias[i] = p->bias[i];
    }
    free(s->bias_ids);
    free(s->bias);
    s->bias_ids = ids;
    s->bias = bias;
    s->sampling = *p;
    s->sampling.bias_ids = ids;
    s->sampling.bias = bias;
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
    s->pages = size_alloc(pages_for(engine->context), sizeof *s->pages);
    tandem_sampling defaults = tandem_sampling_default(engine, true);
    bool ok = s->ids && s->pages ? copy_sampling(s, sampling ? sampling : &defaults, err)
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

// Drops the KV from position n on.
static void drop_kv(tandem_session *s, size_t n) {
    if (n >= s->n_kv) return;
    while (s->n_pages > pages_for(n)) page_drop(&s->engine->pages, s->pages[--s->n_pages]);
    s->n_kv = n;
}

void tandem_session_free(tandem_session *s) {
    if (!s) return;
    pthread_mutex_lock(&s->engine->lock);
    while (s->n_pages > 0) page_drop(&s->engine->pages, s->pages[--s->n_pages]);
    pthread_mutex_unlock(&s->engine->lock);
    free(s->ids);
    free(s->pages);
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
    memcpy(s->pages, from->pages, from->n_pages * sizeof *s->pages);
    for (size_t i = 0; i < from->n_pages; i++) page_share(&s->engine->pages, from->pages[i]);
    s->n_ids = from->n_ids;
    s->n_prompt = from->n_prompt;
    s->n_kv = from->n_kv;
    s->n_pages = from->n_pages;
    s->hash = from->hash;
    pthread_mutex_unlock(&s->engine->lock);
    return s;
}

// ---- Contents
// --------------------------------------------------------------------------------------------------------

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
    while (same < n && same < s->n_kv && s->ids[same] == ids[same]) same++;
    if (same == n && n > 0) same--; // the last token's logits are wanted: it is computed again
    drop_kv(s, same);
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
    drop_kv(s, n > 0 ? n - 1 : 0); // the last token's logits will be wanted
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

// ---- Steps
// -----------------------------------------------------------------------------------------------------------

// Makes the pages of positions [n_kv, n_kv + n) exist and belong to this session alone.
static bool make_room(tandem_session *s, size_t n, struct error *err) {
    struct page_pool *pool = &s->engine->pages;
    size_t slot = s->n_kv % KV_PAGE_TOKENS, last = s->n_kv / KV_PAGE_TOKENS;
    if (slot != 0 && page_is_shared(pool, s->pages[last])) {
        int32_t copy = page_take(pool);
        if (copy < 0) goto full;
        kv_store_copy_page(&s->engine->kv, (size_t)s->pages[last], (size_t)copy);
        page_drop(pool, s->pages[last]);
        s->pages[last] = copy;
    }
    while (s->n_pages < pages_for(s->n_kv + n)) {
        int32_t page = page_take(pool);
        if (page < 0) goto full;
        s->pages[s->n_pages++] = page;
    }
    return true;
full:
    return error_set(err, "no free KV page: all %zu (of %d tokens each) are in use by this engine's sessions",
                     pool->n_pages, KV_PAGE_TOKENS);
}

// A session's share of a step: its next n tokens, and whether the last one's logits are wanted.
struct share {
    tandem_session *session;
    size_t n;
    bool wants_logits;
};

// Runs one ragged batch. The rooms were made. Returns the logits, a row for each share that wants them, in order.
static const float *run_step(tandem_engine *e, const struct share *shares, size_t n_shares) {
    struct step_arrays *a = &e->step;
    struct batch b = {.token = a->token,
                      .position = a->position,
                      .seq = a->seq,
                      .seq_start = a->seq_start,
                      .page_start = a->page_start,
                      .pages = a->pages,
                      .kv_len = a->kv_len,
                      .logit_rows = a->logit_rows,
                      .n_seqs = n_shares};
    size_t n_pages = 0;
    for (size_t i = 0; i < n_shares; i++) {
        const tandem_session *s = shares[i].session;
        a->seq_start[i] = (int32_t)b.n_tokens;
        a->page_start[i] = (int32_t)n_pages;
        for (size_t k = 0; k < shares[i].n; k++, b.n_tokens++) {
            a->token[b.n_tokens] = s->ids[s->n_kv + k];
            a->position[b.n_tokens] = (int32_t)(s->n_kv + k);
            a->seq[b.n_tokens] = (int32_t)i;
        }
        memcpy(a->pages + n_pages, s->pages, s->n_pages * sizeof *a->pages);
        n_pages += s->n_pages;
        a->kv_len[i] = (int32_t)(s->n_kv + shares[i].n);
        if (shares[i].wants_logits) a->logit_rows[b.n_logit_rows++] = (int32_t)b.n_tokens - 1;
    }
    a->seq_start[n_shares] = (int32_t)b.n_tokens;
    a->page_start[n_shares] = (int32_t)n_pages;
    const float *logits = model_forward(e->model, e->run, &e->kv, &b);
    for (size_t i = 0; i < n_shares; i++) shares[i].session->n_kv += shares[i].n;
    return logits;
}

// Samples a session's next token from its logits and puts it behind its ids.
static int choose_token(tandem_session *s, const float *logits, tandem_token *token, struct error *err) {
    tandem_engine *e = s->engine;
    size_t n_vocab = e->model->config.n_vocab;
    if (!logits_finite(logits, n_vocab)) {
        size_t position = s->n_ids;
        drop_kv(s, 0);
        error_set(err, "the logits for position %zu hold NaN or Inf: nothing was sampled, the session's KV was dropped",
                  position);
        return TANDEM_ERROR;
    }
    s->last_logits = logits;
    s->hash = logits_hash(s->hash, logits, n_vocab);
    struct sampler_history h = {.ids = s->ids, .n = s->n_ids, .n_prompt = s->n_prompt};
    int32_t id =
        sampler_choose(&e->sampler, &s->sampling, logits, h, e->end_ids, s->sampling.ignore_end ? e->n_end_ids : 0);
    *token = (tandem_token){.id = id, .logprob = logits_logprob(logits, n_vocab, id)};
    s->ids[s->n_ids++] = id;
    return engine_is_end(e, id) ? TANDEM_END : TANDEM_OK;
}

// Computes all but a session's last token, in chunks. TANDEM_OK, TANDEM_CANCELLED or TANDEM_ERROR.
static int prefill(tandem_session *s, struct error *err) {
    while (s->n_ids - s->n_kv > 1) {
        if (atomic_exchange(&s->cancelled, false)) return TANDEM_CANCELLED;
        size_t n = s->n_ids - 1 - s->n_kv;
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
    struct share shares[64]; // a group larger than this runs in several steps: each row's bits are the same
    size_t where[64];
    pthread_mutex_lock(&e->lock);
    for (size_t begin = 0; begin < n;) {
        size_t n_shares = 0;
        for (; begin < n && n_shares < 64; begin++) {
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
            status[where[i]] =
                choose_token(shares[i].session, logits + i * e->model->config.n_vocab, &tokens[where[i]], &error);
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
    while (ok && s->n_kv < n) {
        ok = make_room(s, 1, err);
        if (ok) run_step(e, &(struct share){.session = s, .n = 1, .wants_logits = true}, 1);
    }
    run_set_tap(e->run, NULL, NULL);
    run_set_fusion(e->run, e->fusion);
    pthread_mutex_unlock(&e->lock);
    tandem_session_free(s);
    return ok;
}
