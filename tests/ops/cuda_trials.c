// cuda_trials.c: see cuda_trials.h.
#include "cuda_trials.h"

#include "tandem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum {
    REQUESTS = 500,
    SIDE_BY_SIDE = 256,
    UNDER_WAY = 2 * SIDE_BY_SIDE,
    MOST_PROMPT = 200,
    MOST_TOKENS = 16,
    TENANTS = 6
};

struct outcome {
    int32_t ids[MOST_TOKENS];
    size_t n;
    uint64_t hash;
};

struct trial {
    size_t request;
    struct outcome outcome;
    bool is_over;
};

static bool note(void *user, const tandem_event *event) {
    (void)user;
    struct trial *t = event->user;
    if (event->kind == TANDEM_EVENT_TOKEN) {
        assert_true(t->outcome.n < MOST_TOKENS);
        t->outcome.ids[t->outcome.n++] = event->token.id;
    } else if (event->kind == TANDEM_EVENT_DONE) {
        if (event->finish != TANDEM_FINISH_LENGTH)
            fail_msg("request %zu: %s", t->request, event->error ? event->error : "it ended early");
        t->outcome.hash = event->logits_hash;
        t->is_over = true;
    }
    return true;
}

// Prompts of 1 to 200 tokens, of which those of a family of five begin alike; a quarter is greedy.
static void submit(tandem_engine *e, const struct trial_plan *plan, struct trial *t, size_t request, uint64_t tenant) {
    char err[512];
    int32_t ids[MOST_PROMPT];
    size_t n = 1 + request * 37 % MOST_PROMPT, family = request % (REQUESTS / 5);
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)((i * 791 + (i < 70 ? family : REQUESTS + request) * 1047 + 17) % 4000);
    tandem_sampling sampling = {.top_p = 1, .repeat_penalty = 1, .seed = request, .ignore_end = true};
    if (request % 4) sampling.temperature = 0.4 + (double)(request % 7) / 5;
    if (request % 4 == 2) sampling.top_p = 0.9;
    if (request % 4 == 3) sampling.top_k = 20;
    tandem_request_options o = {.prompt = ids,
                                .n_prompt = n,
                                .max_tokens = 4 + request % (MOST_TOKENS - 3),
                                .sampling = &sampling,
                                .tenant = tenant,
                                .hash = plan->hash,
                                .user = t};
    *t = (struct trial){.request = request};
    if (tandem_submit(e, &o, NULL, err, sizeof err) != TANDEM_OK) fail_msg("request %zu: %s", request, err);
}

static void step(tandem_engine *e) {
    if (tandem_step(e, note, NULL) < 0) fail_msg("no step could be made");
}

static bool same(const struct outcome *a, const struct outcome *b) {
    return a->n == b->n && a->hash == b->hash && memcmp(a->ids, b->ids, a->n * sizeof *a->ids) == 0;
}

size_t differing_trials(const struct trial_plan *plan) {
    char err[512];
    // Less KV than all that may run would fill at most.
    tandem_options options = {.model = plan->model,
                              .device = plan->device,
                              .kv_type = plan->kv_type,
                              .context = 256,
                              .kv_tokens = SIDE_BY_SIDE * 160,
                              .max_batch = SIDE_BY_SIDE};
    tandem_engine *e = tandem_open(&options, err, sizeof err);
    if (!e) fail_msg("%s", err);
    struct trial *trials = calloc(UNDER_WAY, sizeof *trials);
    struct outcome *alone = calloc(REQUESTS, sizeof *alone);
    assert_true(trials && alone);
    uint64_t random = 88172645463325252u;
    for (size_t i = 0; i < REQUESTS; i++) {
        submit(e, plan, trials, i, TENANTS + i);
        while (!trials->is_over) step(e);
        alone[i] = trials->outcome;
    }
    size_t n_begun = 0, n_ended = 0, different = 0;
    for (size_t i = 0; i < UNDER_WAY; i++) trials[i].is_over = true;
    while (n_ended < plan->n_trials) {
        for (size_t i = 0; i < UNDER_WAY && n_begun < plan->n_trials; i++) {
            if (!trials[i].is_over) continue;
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            submit(e, plan, &trials[i], random % REQUESTS, random / REQUESTS % TENANTS);
            n_begun++;
        }
        step(e);
        for (size_t i = 0; i < UNDER_WAY; i++) {
            struct trial *t = &trials[i];
            if (!t->is_over || t->outcome.n == 0) continue;
            if (!same(&t->outcome, &alone[t->request]) && different++ == 0)
                print_message("request %zu differs among others, the first of them after %zu\n", t->request, n_ended);
            t->outcome.n = 0;
            n_ended++;
        }
    }
    tandem_stats stats = tandem_statistics(e);
    print_message("%s, %s KV: %zu trials in %llu steps, %llu tokens from the cache, %zu differ\n", plan->model,
                  plan->kv_type, n_ended, (unsigned long long)stats.n_steps, (unsigned long long)stats.n_cached_tokens,
                  different);
    free(alone);
    free(trials);
    tandem_close(e);
    return different;
}
