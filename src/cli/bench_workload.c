// bench_workload.c: see bench_workload.h.
#include "cli/bench_workload.h"

#include "base/clock.h"
#include "base/size.h"
#include "cli/offline_256.h"
#include "model/synthetic.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_REQUESTS = 256 };

size_t workload_requests(const char *name) {
    char *end;
    if (strncmp(name, "offline-", 8) != 0 || name[8] < '1' || name[8] > '9') return 0;
    unsigned long n = strtoul(name + 8, &end, 10);
    return *end || n > MOST_REQUESTS ? 0 : n;
}

// A model's config, without its weights.
static bool read_config(const char *model, struct model_config *config, struct error *err) {
    struct buffer path = {0};
    enum model_kind kind;
    char shape[64] = "";
    bool ok = hub_resolve(model, &kind, &path, err);
    if (ok && kind == MODEL_SYNTHETIC) {
        const char *colon = strchr(model, ':');
        snprintf(shape, sizeof shape, "%.*s", (int)strcspn(colon + 1, ":"), colon + 1);
        ok = synthetic_config(shape, config, err);
    } else if (ok) {
        struct model *m = model_load(kind, path.data, &(struct model_load_options){0}, err);
        if (m) *config = m->config;
        ok = m != NULL;
        model_free(m);
    }
    buffer_free(&path);
    return ok;
}

size_t workload_kv_tokens(const struct cli_options *o, const char *model, size_t n_requests, size_t available) {
    struct model_config c;
    struct error err = {0};
    size_t tokens = 0;
    const struct ops *ops = ops_open(o->text[OPT_DEVICE], o->text[OPT_ISA], NULL, &err);
    bool on_cpu = ops && !ops->device;
    ops_close(ops);
    if (!ops || !read_config(model, &c, &err)) {
        cli_fail("%s", err.text);
        return 0;
    }
    for (size_t i = 0; i < n_requests; i++)
        tokens += ((size_t)offline_256_prompt[i] + offline_256_output[i] + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS *
                  KV_PAGE_TOKENS;
    size_t bytes_a_token = 2 * c.n_layers * c.n_kv_heads * c.head_dim * 4,
           most = available / bytes_a_token; // f32 at most
    return on_cpu && available && most < tokens ? (most > 2048 ? most : 2048) : tokens;
}

// One request while it runs.
struct asked {
    struct workload *workload;
    uint64_t hash; // of its ids so far
    size_t n;
};

struct workload {
    const struct workload_options *options;
    struct asked asked[MOST_REQUESTS];
    size_t n_done, n_cached, n_output, n_expected;
    char error[512];
};

static bool note(void *user, const tandem_event *event) {
    (void)user;
    struct asked *a = event->user;
    struct workload *w = a->workload;
    if (event->kind == TANDEM_EVENT_TOKEN) {
        a->hash = (a->hash ^ (uint64_t)(uint32_t)event->token.id) * 1099511628211u; // FNV-1a over whole ids
        a->n++;
        if (++w->n_output % 64 == 0 && w->options->progress)
            w->options->progress(w->options->user, w->n_output, w->n_expected);
    } else if (event->kind == TANDEM_EVENT_DONE) {
        w->n_done++;
        w->n_cached += event->n_cached;
        if (event->finish != TANDEM_FINISH_LENGTH && !w->error[0])
            snprintf(w->error, sizeof w->error, "%s", event->error ? event->error : "a request ended early");
    }
    return true;
}

static bool submit(tandem_engine *e, struct workload *w, size_t i, struct error *err) {
    int32_t ids[1024];
    char text[512];
    size_t n_vocab = e->model->config.n_vocab, range = n_vocab < 10000 ? n_vocab : 10000;
    for (size_t k = 0; k < offline_256_prompt[i]; k++) ids[k] = (int32_t)((k * 7919 + i * 104729 + 17) % range);
    tandem_sampling sampling = {.temperature = 0.6, .top_p = 1, .repeat_penalty = 1, .seed = i, .ignore_end = true};
    uint64_t id, tenant = w->options->repeat * MOST_REQUESTS + i; // nothing is taken from another's cache
    w->asked[i] = (struct asked){.workload = w, .hash = 14695981039346656037u};
    tandem_request_options o = {.prompt = ids,
                                .n_prompt = offline_256_prompt[i],
                                .max_tokens = offline_256_output[i],
                                .sampling = &sampling,
                                .n = 1,
                                .tenant = tenant,
                                .user = &w->asked[i]};
    if (tandem_submit(e, &o, &id, text, sizeof text) == TANDEM_OK) return true;
    return error_set(err, "request %zu: %s", i + 1, text);
}

bool workload_run(tandem_engine *e, const struct workload_options *o, struct workload_outcome *out, struct error *err) {
    struct workload *w = size_alloc_zero(1, sizeof *w);
    if (!w) return error_set(err, "out of memory");
    *out = (struct workload_outcome){0};
    w->options = o;
    for (size_t i = 0; i < o->n_requests; i++) {
        out->n_prompt += offline_256_prompt[i];
        w->n_expected += offline_256_output[i];
    }
    double start = clock_seconds();
    bool ok = true;
    for (size_t i = 0; ok && i < o->n_requests; i++) ok = submit(e, w, i, err);
    while (ok && w->n_done < o->n_requests && tandem_step(e, note, NULL) == TANDEM_OK) continue;
    out->seconds = clock_seconds() - start;
    out->n_output = w->n_output;
    out->n_cached = w->n_cached;
    for (size_t i = 0; i < o->n_requests; i++) out->tokens_hash = out->tokens_hash * 31 + w->asked[i].hash;
    if (ok && (w->error[0] || w->n_output != w->n_expected))
        ok = error_set(err, "%zu of %zu tokens were generated%s%s", w->n_output, w->n_expected, w->error[0] ? ": " : "",
                       w->error);
    free(w);
    return ok;
}
