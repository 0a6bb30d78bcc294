// diagnose.c: from a fault to its place and its cause. It owns the workloads: steps with chunks, neighbours and pages
// out of order, on KV full of NaN; then sessions and requests on an engine. Each runs under the walk
// (diagnose_walk.h), which names the first thing that does not follow from what came before it.
#include "doctor/bridge.h"
#include "doctor/diagnose_walk.h"

#include "base/size.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_SEQS = 3, MAX_LENGTH = 96, STEP_TOKENS = 80, STEP_ROWS = 8, N_PAGES = 16 };

// Tokens of each sequence in each step: a chunk alone (over two page borders, so that what counts pages shows), two
// next to each other, single tokens, and chunks whose lengths are no multiple of anything.
static const size_t steps[][N_SEQS] = {{70, 0, 0}, {9, 31, 0}, {1, 1, 5}, {5, 8, 1}, {3, 1, 0}, {1, 0, 0}};
enum { N_STEPS = sizeof steps / sizeof steps[0] };

// Pages in no order.
static const int32_t page_order[N_PAGES] = {7, 2, 12, 9, 4, 14, 1, 10, 5, 15, 0, 8, 3, 13, 6, 11};

struct examination {
    struct doctor *d;
    struct oracle_weights weights;
    struct finding *finding;
    size_t max_rows;
};

// ---- Steps of our own ----------------------------------------------------------------------------------------------

struct plan {
    struct batch batch;
    int32_t token[STEP_TOKENS], position[STEP_TOKENS], seq[STEP_TOKENS], rows[STEP_ROWS];
    int32_t seq_start[N_SEQS + 1], page_start[N_SEQS + 1], pages[N_SEQS * MAX_LENGTH / KV_PAGE_TOKENS], kv_len[N_SEQS];
    struct walk_sequence sequences[N_SEQS]; // of the batch, in its order
};

struct workload {
    struct walk_sequence sequences[N_SEQS];
    size_t done[N_SEQS], n_pages[N_SEQS];
    int32_t pages[N_SEQS][MAX_LENGTH / KV_PAGE_TOKENS];
    size_t n_taken;
};

static void plan_step(struct workload *l, const size_t counts[N_SEQS], struct plan *p) {
    struct batch *b = &p->batch;
    *b = (struct batch){.token = p->token,
                        .position = p->position,
                        .seq = p->seq,
                        .seq_start = p->seq_start,
                        .page_start = p->page_start,
                        .pages = p->pages,
                        .kv_len = p->kv_len,
                        .logit_rows = p->rows};
    size_t n_pages = 0;
    for (size_t s = 0; s < N_SEQS; s++) {
        size_t n = counts[s] < l->sequences[s].n - l->done[s] ? counts[s] : l->sequences[s].n - l->done[s];
        if (n == 0) continue;
        p->sequences[b->n_seqs] = l->sequences[s];
        p->seq_start[b->n_seqs] = (int32_t)b->n_tokens;
        p->page_start[b->n_seqs] = (int32_t)n_pages;
        for (size_t i = 0; i < n; i++, b->n_tokens++) {
            p->token[b->n_tokens] = l->sequences[s].ids[l->done[s] + i];
            p->position[b->n_tokens] = (int32_t)(l->done[s] + i);
            p->seq[b->n_tokens] = (int32_t)b->n_seqs;
        }
        l->done[s] += n;
        while (l->n_pages[s] * KV_PAGE_TOKENS < l->done[s]) l->pages[s][l->n_pages[s]++] = page_order[l->n_taken++];
        memcpy(p->pages + n_pages, l->pages[s], l->n_pages[s] * sizeof *p->pages);
        n_pages += l->n_pages[s];
        p->kv_len[b->n_seqs] = (int32_t)l->done[s];
        if (n > 3) p->rows[b->n_logit_rows++] = (int32_t)(b->n_tokens - 3); // not only the last
        p->rows[b->n_logit_rows++] = (int32_t)b->n_tokens - 1;
        b->n_seqs++;
    }
    p->seq_start[b->n_seqs] = (int32_t)b->n_tokens;
    p->page_start[b->n_seqs] = (int32_t)n_pages;
}

// The sequences: pieces of the first prompt.
static bool open_workload(const struct doctor *d, struct workload *l) {
    static const size_t wanted[N_SEQS] = {89, 41, 6};
    const struct doctor_prompt *p = &d->prompts[0];
    *l = (struct workload){0};
    size_t at = 0, context = d->model->config.context < MAX_LENGTH ? d->model->config.context : MAX_LENGTH;
    if (d->n_prompts == 0 || p->n == 0) return false;
    for (int s = 0; s < N_SEQS; s++) {
        size_t n = wanted[s] < context ? wanted[s] : context;
        if (at + n > p->n) at = 0; // a short prompt: sequences overlap
        if (n > p->n) n = p->n;
        l->sequences[s] = (struct walk_sequence){p->ids + at, n};
        at += n;
    }
    return true;
}

static bool run_steps(struct examination *x, struct walk *walk, struct run *run, struct kv_store *kv,
                      struct error *err) {
    struct workload l;
    struct plan *p = size_alloc(1, sizeof *p);
    if (!p) return error_set(err, "out of memory");
    bool ok = true;
    if (open_workload(x->d, &l)) {
        for (int i = 0; ok && i < N_STEPS && !x->finding->found; i++) {
            plan_step(&l, steps[i], p);
            if (p->batch.n_tokens == 0) continue;
            walk_expect(walk, &p->batch, p->sequences, p->batch.n_seqs);
            const float *logits = model_forward(x->d->model, run, kv, &p->batch);
            walk_finish(walk, logits);
            ok = walk_ok(walk, err);
        }
    }
    free(p);
    return ok;
}

// All steps, on one path of one table of ops. on_device: the table is a bridge, for one thread.
static bool walk_path(struct examination *x, const struct ops *ops, uint32_t fusion, struct pool *pool, bool on_device,
                      struct error *err) {
    struct doctor *d = x->d;
    struct pool *own = on_device ? pool_create(1, err) : NULL;
    if (on_device && !own) return false;
    struct walk_options o = {.ops = ops,
                             .on_device = on_device,
                             .fusion = fusion,
                             .model = d->model,
                             .weights = &x->weights,
                             .pool = pool,
                             .max_tokens = STEP_TOKENS,
                             .max_rows = x->max_rows};
    struct walk *walk = walk_create(&o, x->finding, err);
    struct kv_store kv = {0};
    struct run *run = NULL;
    bool ok = walk && kv_store_create(&kv, &d->model->config, d->kv_type, N_PAGES, err);
    if (ok) {
        memset(kv.memory, 0xFF, kv.bytes); // NaN
        struct run_options r = {.ops = walk_ops(walk),
                                .pool = own ? own : pool,
                                .fusion = fusion,
                                .max_tokens = STEP_TOKENS,
                                .max_logit_rows = STEP_ROWS,
                                .max_positions = MAX_LENGTH};
        run = run_create(d->model, &r, err);
        ok = run && run_steps(x, walk, run, &kv, err);
    }
    if (x->finding->found && !x->finding->fault.variant[0])
        snprintf(x->finding->fault.variant, sizeof x->finding->fault.variant,
                 on_device ? "%s, fusion %s" : "%s, fusion %s, %d threads", ops->name, fusion ? "on" : "off",
                 pool_size(pool));
    run_free(run);
    if (kv.memory) kv_store_free(&kv);
    walk_free(walk);
    pool_free(own);
    return ok;
}

// ---- A device's ops ------------------------------------------------------------------------------------------------

// The fused path and the standard one of a device's ops, each op alone on the host's inputs; then with each of its
// kernels in another's place. What lies between ops (a recorded step, a kernel of all layers) is not walked through.
static bool walk_device(struct examination *x, struct error *err) {
    struct doctor *d = x->d;
    struct device *device = d->ops->device;
    struct bridge *bridge = bridge_create(d->ops, d->model, d->weights, err);
    bool ok = bridge && walk_path(x, bridge_ops(bridge), d->fusion, d->pool, true, err);
    if (ok && !x->finding->found && d->fusion) ok = walk_path(x, bridge_ops(bridge), 0, d->pool, true, err);
    for (size_t i = 0; ok && i < device->n_variants && !x->finding->found; i++) {
        bool used = device->variants >> i & 1;
        device->variants ^= 1u << i;
        ok = walk_path(x, bridge_ops(bridge), d->fusion, d->pool, true, err);
        device->variants ^= 1u << i;
        if (ok && x->finding->found)
            snprintf(x->finding->fault.variant, sizeof x->finding->fault.variant, "%s, fusion on, %s %s", d->ops->name,
                     used ? "without" : "with", device->variant_names[i]);
    }
    ok = ok && bridge_error(bridge, err); // else what was found may be the bridge's own doing
    bridge_free(bridge);
    return ok;
}

// Every op alone is right: what the stages found lies between them.
static void name_between_ops(struct doctor_report *report) {
    const struct fault *f = &report->first;
    if (f->kind != FAULT_FUSED || (strcmp(f->op, fusion_info(FUSED_STEP)->name) != 0 &&
                                   strcmp(f->op, fusion_info(FUSED_ROPE_ATTENTION)->name) != 0))
        return;
    bool step = strcmp(f->op, fusion_info(FUSED_STEP)->name) == 0;
    struct diagnosis *d = &report->diagnoses[0];
    *d = (struct diagnosis){.confidence = 0.8};
    snprintf(d->name, sizeof d->name, "%s",
             step ? "recorded step, or kernel of all layers" : "merged attention kernel");
    snprintf(d->text, sizeof d->text, "every op alone is right, and so is the path without %s (--fusion leaves it out)",
             f->op);
    report->n_diagnoses = 1;
}

// The fused path, and the standard one.
static bool walk_paths(struct examination *x, struct error *err) {
    struct doctor *d = x->d;
    if (d->ops->device) return walk_device(x, err);
    if (!walk_path(x, d->ops, d->fusion, d->pool, false, err)) return false;
    return x->finding->found || d->fusion == 0 || walk_path(x, d->ops, 0, d->pool, false, err);
}

// What an ordinary run does not show: other numbers of threads, another instruction set.
static bool walk_variants(struct examination *x, struct error *err) {
    struct doctor *d = x->d;
    const struct ops *portable = ops_cpu("portable", NULL);
    struct pool *three = pool_create(3, err), *one = pool_create(1, err);
    bool ok = three && one;
    const struct {
        const struct ops *ops;
        uint32_t fusion;
        struct pool *pool;
    } paths[] = {{d->ops, d->fusion, three}, {d->ops, d->fusion, one}, {d->ops, 0, one}, {portable, 0, d->pool}};
    for (size_t i = 0; ok && i < sizeof paths / sizeof paths[0] && !x->finding->found; i++) {
        if (!paths[i].ops || (i == 3 && paths[i].ops == d->ops)) continue;
        ok = walk_path(x, paths[i].ops, paths[i].fusion, paths[i].pool, false, err);
    }
    pool_free(three);
    pool_free(one);
    return ok;
}

// ---- An engine -----------------------------------------------------------------------------------------------------

enum { MAX_SESSIONS = 6, ENGINE_CONTEXT = 192 };

struct service {
    struct examination *x;
    tandem_engine *engine;
    struct walk *walk;
    tandem_session *sessions[MAX_SESSIONS];
    struct walk_sequence sequences[MAX_SESSIONS];
};

// The token that the logits and the sampling call for; -1: not foreseen. top_k at most; noise as sampler.h says, or
// (by_rank) drawn for the place in the order instead of the token.
static int32_t foresee(const tandem_engine *e, const tandem_sampling *s, const float *logits, size_t position,
                       bool by_rank) {
    size_t n_vocab = e->model->config.n_vocab;
    int32_t best = -1;
    double best_score = -INFINITY;
    size_t n = s->temperature == 0 ? 1 : s->top_k > 0 && (size_t)s->top_k < n_vocab ? (size_t)s->top_k : n_vocab;
    if (s->top_p < 1 || s->min_p > 0 || s->n_bias || s->repeat_penalty != 1 || s->presence_penalty != 0 ||
        s->frequency_penalty != 0)
        return -1;
    float last = INFINITY;
    int32_t last_id = -1;
    for (size_t rank = 0; rank < n; rank++) { // falling logits, ties by id
        int32_t next = -1;
        for (size_t i = 0; i < n_vocab; i++) {
            bool later = logits[i] < last || (logits[i] == last && (int32_t)i > last_id);
            if (s->ignore_end && engine_is_end(e, (int32_t)i)) continue;
            if (later && (next < 0 || logits[i] > logits[next])) next = (int32_t)i;
        }
        if (next < 0) break;
        last = logits[next];
        last_id = next;
        if (s->temperature == 0) return next;
        double noise = sampler_uniform(s->seed, position, by_rank ? (int32_t)rank : next);
        double score = (double)(float)((double)logits[next] / s->temperature) - log(-log(noise));
        if (score > best_score) best_score = score, best = next;
    }
    return best;
}

static void judge_choice(struct service *v, const tandem_session *s, const float *logits, size_t row, int32_t found) {
    size_t n_vocab = v->engine->model->config.n_vocab;
    const float *own = logits + row * n_vocab;
    size_t position = s->n_ids - 1;
    int32_t want = foresee(v->engine, &s->sampling, own, position, false);
    if (want < 0 || want == found || v->x->finding->found) return;
    finding_place(v->x->finding, "sampler", -1, "the token that logits and noise call for");
    struct fault *f = &v->x->finding->fault;
    f->position = (int)position;
    f->channel = found;
    f->expected = want;
    f->found = found;
    fault_say(f, "sampler: position %zu got token %d, logits and noise call for %d", position, found, want);
    if (s->sampling.temperature > 0 && foresee(v->engine, &s->sampling, own, position, true) == found)
        finding_name(v->x->finding, 0.8, "sampler noise by rank", "noise was drawn for the place in the order");
    else if (s->sampling.temperature > 0 && foresee(v->engine, &s->sampling, own, position + 1, false) == found)
        finding_name(v->x->finding, 0.8, "sampler noise of another position", "that of position %zu", position + 1);
    else finding_name(v->x->finding, 0.4, "sampler", "greedy or not, another token is due");
}

// Makes n tokens of some sessions together, under the walk.
static bool generate(struct service *v, const int *who, size_t n_who, size_t n_tokens, struct error *err) {
    tandem_session *group[MAX_SESSIONS];
    tandem_token tokens[MAX_SESSIONS];
    int status[MAX_SESSIONS];
    for (size_t i = 0; i < n_who; i++) group[i] = v->sessions[who[i]];
    for (size_t k = 0; k < n_tokens && !v->x->finding->found; k++) {
        size_t n_sequences = 0;
        for (int i = 0; i < MAX_SESSIONS; i++)
            if (v->sessions[i])
                v->sequences[n_sequences++] = (struct walk_sequence){v->sessions[i]->ids, v->sessions[i]->n_ids};
        walk_expect(v->walk, NULL, v->sequences, n_sequences);
        int done = tandem_next_many(group, n_who, tokens, status, err->text, sizeof err->text);
        walk_finish(v->walk, NULL);
        if (!walk_ok(v->walk, err)) return false;
        size_t rows;
        const float *logits = walk_logits(v->walk, &rows);
        for (size_t i = 0, row = 0; done >= 0 && logits && i < n_who && row < rows; i++)
            if (status[i] == TANDEM_OK || status[i] == TANDEM_END)
                judge_choice(v, group[i], logits, row++, tokens[i].id);
    }
    return true;
}

static bool open_session(struct service *v, int i, const int32_t *ids, size_t n, bool sampled, struct error *err) {
    tandem_sampling s = {
        .temperature = sampled ? 1.2 : 0, .top_k = 12, .top_p = 1, .repeat_penalty = 1, .seed = 5, .ignore_end = true};
    v->sessions[i] = tandem_session_new(v->engine, &s, err->text, sizeof err->text);
    return v->sessions[i] && tandem_session_append(v->sessions[i], ids, n, err->text, sizeof err->text) == TANDEM_OK;
}

static void close_session(struct service *v, int i) {
    tandem_session_free(v->sessions[i]);
    v->sessions[i] = NULL;
}

// Sessions that grow together, fork, go back, end, and leave their pages to others.
static bool serve_sessions(struct service *v, struct error *err) {
    const struct doctor_prompt *p = &v->x->d->prompts[0];
    if (p->n < 300) return true;
    const int32_t *ids = p->ids;
    char *text = err->text;
    size_t size = sizeof err->text;
    bool ok = open_session(v, 0, ids, 45, true, err) && generate(v, (int[]){0}, 1, 3, err) &&
              open_session(v, 1, ids + 60, 70, false, err) && generate(v, (int[]){0, 1}, 2, 2, err);
    if (ok) ok = (v->sessions[2] = tandem_session_fork(v->sessions[0], text, size)) != NULL;
    ok = ok && tandem_session_append(v->sessions[2], ids + 140, 2, text, size) == TANDEM_OK &&
         generate(v, (int[]){0, 1, 2}, 3, 2, err) && generate(v, (int[]){2, 0}, 2, 1, err);
    ok = ok && tandem_session_truncate(v->sessions[1], 40, text, size) == TANDEM_OK &&
         generate(v, (int[]){1, 2}, 2, 2, err);
    if (ok) close_session(v, 0);
    ok = ok && open_session(v, 3, ids + 150, 50, true, err) && generate(v, (int[]){1, 2, 3}, 3, 3, err);
    int32_t other[48];
    memcpy(other, ids + 150, 40 * sizeof *other);
    memcpy(other + 40, ids + 210, 8 * sizeof *other);
    ok = ok && tandem_session_set(v->sessions[3], other, 48, NULL, text, size) == TANDEM_OK &&
         generate(v, (int[]){3, 1}, 2, 2, err);
    for (int i = 0; i < MAX_SESSIONS; i++) close_session(v, i);
    return ok;
}

// ---- Requests ------------------------------------------------------------------------------------------------------

enum { MAX_REQUESTS = 5, REQUEST_TOKENS = 6, MAX_IDS = 96 };

struct request_ids {
    int32_t ids[MAX_IDS];
    size_t n;
};

struct office {
    struct request_ids requests[MAX_REQUESTS];
    struct walk_sequence sequences[MAX_REQUESTS];
};

static bool note_event(void *user, const tandem_event *e) {
    (void)user;
    struct request_ids *r = e->user;
    if (e->kind == TANDEM_EVENT_TOKEN && r->n < MAX_IDS) r->ids[r->n++] = e->token.id;
    return true;
}

// Runs what was submitted to its end.
static bool work_off(struct service *v, struct office *o, struct error *err) {
    for (int step = 0; step < 200; step++) {
        for (int i = 0; i < MAX_REQUESTS; i++)
            o->sequences[i] = (struct walk_sequence){o->requests[i].ids, o->requests[i].n};
        walk_expect(v->walk, NULL, o->sequences, MAX_REQUESTS);
        int status = tandem_step(v->engine, note_event, NULL);
        walk_finish(v->walk, NULL);
        if (!walk_ok(v->walk, err)) return false;
        if (status == TANDEM_END) break;
    }
    return true;
}

// Requests with equal beginnings next to each other; then others, alone, on what those left behind.
static bool serve_requests(struct service *v, struct error *err) {
    const struct doctor_prompt *p = &v->x->d->prompts[0];
    if (p->n < 300 || v->x->finding->found) return true;
    struct office *o = size_alloc_zero(1, sizeof *o);
    if (!o) return error_set(err, "out of memory");
    tandem_sampling s = {.top_p = 1, .repeat_penalty = 1, .ignore_end = true};
    bool ok = true;
    for (int i = 0; ok && i < MAX_REQUESTS; i++) {
        struct request_ids *r = &o->requests[i];
        memcpy(r->ids, p->ids + (i < 3 ? 0 : 230 + 4 * i), 40 * sizeof *r->ids);
        memcpy(r->ids + 40, p->ids + 40 + 7 * i, (size_t)(10 + 5 * i) * sizeof *r->ids);
        r->n = 50 + 5 * (size_t)i;
        tandem_request_options q = {
            .prompt = r->ids, .n_prompt = r->n, .max_tokens = REQUEST_TOKENS, .sampling = &s, .user = r};
        ok = tandem_submit(v->engine, &q, NULL, err->text, sizeof err->text) == TANDEM_OK;
        if (ok && i >= 2) ok = work_off(v, o, err);
    }
    free(o);
    return ok;
}

// The engine as users open it, with the spying table in its run.
static bool walk_engine(struct examination *x, struct error *err) {
    struct doctor *d = x->d;
    struct service v = {.x = x};
    size_t context = d->model->config.context;
    tandem_options options = {.model = d->options.model,
                              .device = "cpu", // where the walk can read what ops leave
                              .threads = d->options.threads,
                              .context = context < ENGINE_CONTEXT ? context : ENGINE_CONTEXT,
                              .kv_tokens = 13 * KV_PAGE_TOKENS,
                              .chunk = 16,
                              .max_batch = 4,
                              .fusion = d->options.fusion,
                              .isa = d->options.isa,
                              .kv_type = d->options.kv_type};
    if (context < ENGINE_CONTEXT) return true; // too short for these sessions
    v.engine = tandem_open(&options, err->text, sizeof err->text);
    if (!v.engine) return true; // the model's own fault: the stages said so
    tandem_engine *e = v.engine;
    struct finding loaded = {0};
    struct walk_options o = {.ops = e->ops,
                             .fusion = e->fusion,
                             .model = e->model,
                             .weights = &x->weights,
                             .pool = e->pool,
                             .max_tokens = e->max_step_tokens,
                             .max_rows = x->max_rows / 4 + 1}; // the ops were judged: this is about the batch
    struct oracle_weights own; // the engine has loaded the model once more: its own reading of it
    bool ok = oracle_weights_bind(&own, e->model, err);
    o.weights = &own;
    if (ok && !weights_check_model(&o, &loaded)) *x->finding = loaded;
    struct run *product = e->run;
    ok = ok && (v.walk = walk_create(&o, x->finding, err)) != NULL;
    struct run_options r = {.pool = e->pool,
                            .fusion = e->fusion,
                            .max_tokens = e->max_step_tokens,
                            .max_logit_rows = e->max_batch,
                            .max_positions = e->context};
    if (ok) r.ops = walk_ops(v.walk);
    struct run *spied = ok ? run_create(e->model, &r, err) : NULL;
    if (spied) {
        e->run = spied;
        ok = serve_sessions(&v, err) && serve_requests(&v, err);
        e->run = product;
    }
    if (x->finding->found && !x->finding->fault.variant[0])
        snprintf(x->finding->fault.variant, sizeof x->finding->fault.variant, "engine, %s", e->ops->name);
    for (int i = 0; i < MAX_SESSIONS; i++) close_session(&v, i);
    run_free(spied);
    walk_free(v.walk);
    oracle_weights_free(&own);
    tandem_close(v.engine);
    return ok || x->finding->found; // a call that fails because of the fault is no failure of the search
}

// ---- The report ----------------------------------------------------------------------------------------------------

// A weight that the file itself holds wrong.
static bool broken_file(struct doctor_report *report) {
    const struct fault *f = &report->first;
    if (f->kind != FAULT_WEIGHT || isfinite(f->found) || !f->tensor[0]) return false;
    struct diagnosis *d = &report->diagnoses[0];
    *d = (struct diagnosis){.confidence = 0.99};
    snprintf(d->name, sizeof d->name, "NaN or Inf in the file");
    snprintf(d->text, sizeof d->text, "the file of %s holds it: download or convert the model again", f->tensor);
    report->n_diagnoses = 1;
    return true;
}

static size_t n_parameters(const struct model_config *c) {
    size_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    return c->n_layers * c->hidden * (2 * q + 2 * kv + 3 * c->n_ff) + c->hidden * c->n_vocab;
}

bool diagnose(struct doctor *d, struct doctor_report *report, struct error *err) {
    struct finding *finding = size_alloc_zero(1, sizeof *finding);
    struct examination x = {.d = d, .finding = finding};
    if (!finding) return error_set(err, "out of memory");
    // Large models are judged on fewer rows of each call.
    size_t rows = 1500000000u / (n_parameters(&d->model->config) + 1);
    x.max_rows = rows < 6 ? 6 : rows > STEP_TOKENS ? STEP_TOKENS : rows;
    bool ok = oracle_weights_bind(&x.weights, d->model, err);
    struct walk_options o = {.model = d->model, .weights = &x.weights};
    if (ok && weights_check_model(&o, finding) && !broken_file(report)) {
        ok = walk_paths(&x, err);
        if (ok && !finding->found) ok = walk_engine(&x, err); // on the CPU: what a step is made of is the host's work
        if (ok && !finding->found && !d->ops->device) ok = walk_variants(&x, err);
        if (ok && !finding->found && d->ops->device) name_between_ops(report);
    }
    if (ok && finding->found) {
        finding->fault.stage = report->first.stage;
        if (report->first.prompt >= 0) finding->fault.prompt = report->first.prompt;
        report->first = finding->fault;
        memcpy(report->diagnoses, finding->diagnoses, sizeof report->diagnoses);
        report->n_diagnoses = finding->n_diagnoses;
    }
    oracle_weights_free(&x.weights);
    free(finding);
    return ok;
}
