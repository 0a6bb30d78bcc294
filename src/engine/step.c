// step.c: one step of the model for whoever asks: sessions (session.c) and requests (request.c). It owns the step's
// arrays and the check of the logits; which tokens run is decided elsewhere.
#include "engine/engine.h"

#include "base/size.h"
#include "engine/tripwire.h"

#include <stdlib.h>
#include <string.h>

bool engine_can_choose(const tandem_engine *e, const tandem_sampling *s) {
    return e->ops->sample && s->repeat_penalty == 1 && s->presence_penalty == 0 && s->frequency_penalty == 0 &&
           s->n_bias == 0;
}

static struct sample_row sample_row(const tandem_sampling *s) {
    return (struct sample_row){.scale = s && s->temperature > 0 ? sampling_scale(s->temperature) : 0,
                               .top_p = s ? s->top_p : 1,
                               .min_p = s ? s->min_p : 0,
                               .seed = s ? s->seed : 0,
                               .top_k = s ? s->top_k : 0,
                               .ban = s && s->ignore_end};
}

void engine_queue(tandem_engine *e, const struct engine_share *shares, size_t n_shares) {
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
        const struct engine_share *s = &shares[i];
        a->seq_start[i] = (int32_t)b.n_tokens;
        a->page_start[i] = (int32_t)n_pages;
        for (size_t k = 0; k < s->n; k++, b.n_tokens++) {
            a->token[b.n_tokens] = s->ids[s->kv->n_kv + k];
            a->position[b.n_tokens] = (int32_t)(s->kv->n_kv + k);
            a->seq[b.n_tokens] = (int32_t)i;
        }
        memcpy(a->pages + n_pages, s->kv->pages, s->kv->n_pages * sizeof *a->pages);
        n_pages += s->kv->n_pages;
        a->kv_len[i] = (int32_t)(s->kv->n_kv + s->n);
        for (size_t k = s->n_rows; k > 0; k--) {
            a->sample[b.n_logit_rows] = sample_row(s->sampling);
            a->logit_rows[b.n_logit_rows++] = (int32_t)(b.n_tokens - k);
        }
        if (s->sampling) b.sample = a->sample;
    }
    if (b.sample) {
        b.banned = e->end_ids;
        b.n_banned = e->n_end_ids;
    }
    a->seq_start[n_shares] = (int32_t)b.n_tokens;
    a->page_start[n_shares] = (int32_t)n_pages;
    model_queue(e->model, e->run, &e->kv, &b);
}

const float *engine_run(tandem_engine *e, const struct engine_share *shares, size_t n_shares) {
    requests_settle(e);
    engine_queue(e, shares, n_shares);
    return run_logits(e->run);
}

// ---- Choosing on the host

struct choosing {
    tandem_engine *engine;
    struct engine_choice *choices; // [n]
    size_t n;
    atomic_size_t next; // not yet taken
};

static void choose_one(tandem_engine *e, struct sampler *sampler, struct engine_choice *c) {
    size_t n_vocab = e->model->config.n_vocab;
    c->is_finite = logits_finite(c->logits, n_vocab);
    if (!c->is_finite) return;
    if (c->wants_hash) c->hash = logits_hash(c->hash, c->logits, n_vocab);
    int32_t id = sampler_choose(sampler, c->sampling, c->logits, c->history, e->end_ids,
                                c->sampling->ignore_end ? e->n_end_ids : 0, c->mask);
    c->token = (tandem_token){.id = id};
    if (c->wants_logprob) logits_logprobs(c->logits, n_vocab, &c->token, c->top, c->n_top);
}

// Each piece has a sampler of its own, and takes choices until none is left.
static void choose_piece(void *ctx, size_t begin, size_t end, int thread) {
    struct choosing *j = ctx;
    (void)thread;
    for (size_t s = begin; s < end; s++)
        for (size_t i; (i = atomic_fetch_add(&j->next, 1)) < j->n;)
            choose_one(j->engine, &j->engine->samplers[s], &j->choices[i]);
}

void engine_choose(tandem_engine *e, struct engine_choice *choices, size_t n) {
    struct choosing j = {.engine = e, .choices = choices, .n = n};
    pool_for(e->pool, n < e->n_samplers ? n : e->n_samplers, 1, choose_piece, &j);
}

bool engine_check_logits(tandem_engine *e, const float *logits, const int32_t *ids, const struct kv_seq *kv, size_t n,
                         struct error *err) {
    if (!run_error(e->run, err)) return false; // the device failed, and stays so
    if (logits_finite(logits, e->model->config.n_vocab)) return true;
    engine_explain_logits(e, ids, kv, n, err);
    return false;
}

void engine_explain_logits(tandem_engine *e, const int32_t *ids, const struct kv_seq *kv, size_t n, struct error *err) {
    if (run_error(e->run, err))
        tripwire_explain(e, &(struct tripwire_sequence){.ids = ids, .pages = kv->pages, .n = n}, err);
}

bool engine_copy_sampling(const tandem_engine *e, const tandem_sampling *from, tandem_sampling *to, int32_t **ids_out,
                          float **bias_out, struct error *err) {
    if (!sampling_check(from, e->model->config.n_vocab, err)) return false;
    int32_t *ids = size_alloc(from->n_bias, sizeof *ids);
    float *bias = size_alloc(from->n_bias, sizeof *bias);
    if (!ids || !bias) {
        free(ids);
        free(bias);
        return error_set(err, "out of memory for %zu logit biases", from->n_bias);
    }
    for (size_t i = 0; i < from->n_bias; i++) {
        ids[i] = from->bias_ids[i];
        bias[i] = from->bias[i];
    }
    *to = *from;
    to->bias_ids = *ids_out = ids;
    to->bias = *bias_out = bias;
    return true;
}
