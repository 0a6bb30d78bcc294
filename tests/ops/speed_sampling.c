// speed_sampling.c: how long a device takes to choose the tokens of a step, by settings and rows; next to the host's
// sampler. Not a test: `make build/tests/ops/speed_sampling`, on a machine with a GPU.
#include "base/clock.h"
#include "base/size.h"
#include "engine/sampler.h"
#include "format/noise.h"
#include "ops/ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 151936, ROWS = 256, REPEATS = 50 };

static const struct {
    const char *name;
    tandem_sampling p;
} settings[] = {
    {"greedy", {.temperature = 0, .top_p = 1, .repeat_penalty = 1}},
    {"temperature 0.6", {.temperature = 0.6, .top_p = 1, .repeat_penalty = 1}},
    {"temperature 0.6, end ids banned", {.temperature = 0.6, .top_p = 1, .repeat_penalty = 1, .ignore_end = true}},
    {"0.6, top_k 20, top_p 0.95", {.temperature = 0.6, .top_k = 20, .top_p = 0.95, .repeat_penalty = 1}},
    {"1, top_p 0.95", {.temperature = 1, .top_p = 0.95, .repeat_penalty = 1}},
    {"1, min_p 0.05", {.temperature = 1, .top_p = 1, .min_p = 0.05, .repeat_penalty = 1}},
    {"1, top_k 1000", {.temperature = 1, .top_k = 1000, .top_p = 1, .repeat_penalty = 1}},
};

int main(void) {
    struct error err = {0};
    const struct ops *cuda = ops_open("cuda", NULL, NULL, &err);
    float *x = size_alloc(ROWS, VOCAB * sizeof *x);
    struct sampler sampler;
    if (!cuda || !x || !sampler_create(&sampler, VOCAB, &err)) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    struct device *d = cuda->device;
    struct noise noise;
    noise_seed(&noise, 1, 1);
    noise_floats(&noise, x, (size_t)ROWS * VOCAB, 2.5f);
    float *logits = d->alloc(d, (size_t)ROWS * VOCAB * sizeof *x, "logits", &err);
    struct sample_row *rows = d->alloc(d, ROWS * sizeof *rows, "rows", &err), host[ROWS];
    int32_t *ints = d->alloc(d, (3 * ROWS + 64) * sizeof *ints, "integers", &err), order[ROWS], banned[3] = {5, 7, 9};
    struct greedy_choice *out = d->alloc_host(d, ROWS * sizeof *out);
    if (!logits || !rows || !ints || !out) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    for (int i = 0; i < ROWS; i++) order[i] = i;
    d->put(d, logits, x, (size_t)ROWS * VOCAB * sizeof *x);
    d->put(d, ints, order, sizeof order);        // logit_rows
    d->put(d, ints + ROWS, order, sizeof order); // positions
    d->put(d, ints + 3 * ROWS, banned, sizeof banned);
    printf("%-34s %10s %10s %10s %14s\n", "us a step", "1 row", "32 rows", "256 rows", "host, 1 row");
    for (size_t k = 0; k < sizeof settings / sizeof *settings; k++) {
        const tandem_sampling *p = &settings[k].p;
        for (int i = 0; i < ROWS; i++)
            host[i] = (struct sample_row){.scale = p->temperature > 0 ? sampling_scale(p->temperature) : 0,
                                          .top_p = p->top_p,
                                          .min_p = p->min_p,
                                          .seed = (uint64_t)i,
                                          .top_k = p->top_k,
                                          .ban = p->ignore_end};
        d->put(d, rows, host, sizeof host);
        printf("%-34s", settings[k].name);
        for (size_t n = 1; n <= ROWS; n = n == 1 ? 32 : 8 * n) {
            struct batch on_host = {.n_logit_rows = n, .sample = host, .n_banned = 3};
            struct batch b = {.host = &on_host,
                              .n_logit_rows = n,
                              .position = ints + ROWS,
                              .logit_rows = ints,
                              .sample = rows,
                              .banned = ints + (ptrdiff_t)3 * ROWS,
                              .n_banned = 3};
            struct sample_args a = {.batch = &b,
                                    .logits = logits,
                                    .n_vocab = VOCAB,
                                    .filter = sampling_filter(host, n, VOCAB),
                                    .out = out,
                                    .chosen = ints + (ptrdiff_t)2 * ROWS};
            double start = 0;
            for (int i = -5; i < REPEATS; i++) {
                if (i == 0) {
                    d->sync(d, &err);
                    start = clock_seconds();
                }
                cuda->sample(&(struct op_ctx){.ops = cuda}, &a);
            }
            d->sync(d, &err);
            printf(" %10.1f", (clock_seconds() - start) / REPEATS * 1e6);
        }
        double start = clock_seconds();
        static const int32_t zero[4];
        for (int i = 0; i < 5; i++)
            sampler_choose(&sampler, p, x, (struct sampler_history){.ids = zero, .n = 1, .n_prompt = 1}, banned,
                           p->ignore_end ? 3 : 0, NULL);
        printf(" %14.1f\n", (clock_seconds() - start) / 5 * 1e6);
    }
    if (!d->sync(d, &err)) fprintf(stderr, "%s\n", err.text);
    return 0;
}
