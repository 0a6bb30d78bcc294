// cuda_sampling.c: see cuda_sampling.h.
#include "cuda_sampling.h"

#include "base/size.h"
#include "engine/sampler.h"
#include "format/noise.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint32_t state;

static uint32_t next_random(void) {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

static double uniform(void) {
    return ((double)next_random() + 0.5) / 4294967296.0;
}

// Like a model's, with ties, nearly flat, all equal, with one that towers, rounded to few values, signed zeros.
static void fill_row(float *x, size_t n) {
    unsigned kind = next_random() % 8;
    float spread = kind == 1 ? 0.001f : kind == 2 ? 0 : kind == 3 ? 9.0f : 2.5f;
    struct noise noise;
    noise_seed(&noise, next_random(), 0);
    noise_floats(&noise, x, n, spread);
    for (size_t i = 0; i < n; i++) {
        if (kind == 4) x[i] = roundf(x[i] * 2) / 2;
        if (kind == 5) x[i] = next_random() % 2 ? 0.0f : -0.0f;
        if (kind == 6) x[i] = x[i] > 0 ? 0.25f * roundf(x[i]) : x[i] - 60; // a few that matter
    }
    if (kind == 7)
        for (int i = 0; i < 3; i++) x[next_random() % n] = 25 + (float)i * 0.125f;
}

// `few`: a small top_k, which needs another sequence of kernels where all rows have one.
static tandem_sampling random_sampling(size_t n, bool few) {
    static const double temperatures[] = {0, 0.1, 0.6, 0.7, 1, 1, 1.5, 5};
    static const int32_t ks[] = {0, 0, 1, 2, 20, 50, 1000, 100000};
    static const double ps[] = {1, 1, 0.95, 0.8, 0.5, 0.999, 1e-6, 0.3};
    static const double mins[] = {0, 0, 0, 0, 0.05, 0.5, 1, 1e-4};
    tandem_sampling p = {.temperature = temperatures[next_random() % 8],
                         .top_k = ks[next_random() % 8],
                         .top_p = ps[next_random() % 8],
                         .min_p = mins[next_random() % 8],
                         .repeat_penalty = 1,
                         .seed = next_random() % 3 ? next_random() : (uint64_t)next_random() << 32 | 7,
                         .ignore_end = next_random() % 2};
    if (next_random() % 4 == 0) p.temperature = 0.05 + 2 * uniform();
    if (next_random() % 4 == 0) p.top_k = (int32_t)(next_random() % (2 * n));
    if (next_random() % 4 == 0) p.top_p = uniform();
    if (few) p.top_k = 1 + (int32_t)(next_random() % SAMPLING_FEW);
    return p;
}

static struct sample_row row_of(const tandem_sampling *p) {
    return (struct sample_row){.scale = p->temperature > 0 ? sampling_scale(p->temperature) : 0,
                               .top_p = p->top_p,
                               .min_p = p->min_p,
                               .seed = p->seed,
                               .top_k = p->top_k,
                               .ban = p->ignore_end};
}

// Memory of the device's and, of the same size, of the host's.
struct twin {
    void *device, *host;
    size_t bytes;
};

static struct twin twin(const struct ops *cuda, size_t bytes) {
    struct error err = {0};
    struct twin t = {cuda->device->alloc(cuda->device, bytes, "a test", &err), size_alloc_zero(1, bytes), bytes};
    if (!t.device || !t.host) fail_msg("%s", err.text);
    return t;
}

static void send(const struct ops *cuda, const struct twin *t) {
    cuda->device->put(cuda->device, t->device, t->host, t->bytes);
}

static void untwin(const struct ops *cuda, struct twin *t) {
    cuda->device->free(cuda->device, t->device);
    free(t->host);
}

struct rows {
    struct twin logits, sample, position, order, banned, chosen;
    struct greedy_choice *out;
    tandem_sampling *asked;
    bool *spoilt; // holds a NaN or an Inf
};

static void make_round(struct rows *r, const struct sampling_plan *plan) {
    bool few = next_random() % 2;
    for (size_t i = 0; i < plan->n_rows; i++) {
        float *x = (float *)r->logits.host + i * plan->n_vocab;
        r->asked[i] = random_sampling(plan->n_vocab, few);
        ((struct sample_row *)r->sample.host)[i] = row_of(&r->asked[i]);
        ((int32_t *)r->position.host)[i] = (int32_t)(next_random() % 40000);
        ((int32_t *)r->order.host)[i] = (int32_t)(plan->n_rows - 1 - i);
        fill_row(x, plan->n_vocab);
        r->spoilt[i] = next_random() % 16 == 0;
        if (r->spoilt[i]) x[next_random() % plan->n_vocab] = next_random() % 2 ? NAN : -INFINITY;
    }
    int32_t *banned = r->banned.host;
    banned[0] = (int32_t)(next_random() % plan->n_vocab);
    banned[1] = (int32_t)plan->n_vocab - 1;
    banned[2] = 5;
}

static size_t compare_round(const struct rows *r, const struct sampling_plan *plan, struct sampler *sampler,
                            const int32_t *chosen) {
    static const int32_t zeros[40001];
    size_t different = 0;
    for (size_t i = 0; i < plan->n_rows; i++) {
        const float *x = (const float *)r->logits.host + i * plan->n_vocab;
        size_t position = (size_t)((int32_t *)r->position.host)[plan->n_rows - 1 - i] + 1;
        const tandem_sampling *p = &r->asked[i];
        struct greedy_choice want = {.ok = !r->spoilt[i]}, got = r->out[i];
        struct sampler_history h = {.ids = zeros, .n = position, .n_prompt = position};
        if (want.ok) want.id = sampler_choose(sampler, p, x, h, r->banned.host, p->ignore_end ? 3 : 0, NULL);
        if (got.ok == want.ok && got.id == want.id && chosen[i] == want.id) continue;
        if (different++ < 4)
            print_message("temperature %g, top_k %d, top_p %g, min_p %g, ban %d, row %zu: %d (%d, ok %d), the host has "
                          "%d (ok %d)\n",
                          p->temperature, p->top_k, p->top_p, p->min_p, p->ignore_end, i, got.id, chosen[i], got.ok,
                          want.id, want.ok);
    }
    return different;
}

size_t compare_sampling(const struct ops *cuda, const struct sampling_plan *plan, size_t *n_filtered) {
    struct device *d = cuda->device;
    struct error err = {0};
    size_t n = plan->n_rows, different = 0;
    struct sampler sampler;
    struct rows r = {.logits = twin(cuda, n * plan->n_vocab * sizeof(float)),
                     .sample = twin(cuda, n * sizeof(struct sample_row)),
                     .position = twin(cuda, n * sizeof(int32_t)),
                     .order = twin(cuda, n * sizeof(int32_t)),
                     .banned = twin(cuda, 3 * sizeof(int32_t)),
                     .chosen = twin(cuda, n * sizeof(int32_t)),
                     .out = d->alloc_host(d, n * sizeof *r.out),
                     .asked = size_alloc_zero(n, sizeof *r.asked),
                     .spoilt = size_alloc_zero(n, sizeof *r.spoilt)};
    if (!r.out || !r.asked || !r.spoilt || !sampler_create(&sampler, plan->n_vocab, &err)) fail_msg("%s", err.text);
    state = plan->seed * 2654435761u + 1;
    *n_filtered = 0;
    for (size_t round = 0; round < plan->n_rounds; round++) {
        make_round(&r, plan);
        const struct twin *sent[] = {&r.logits, &r.sample, &r.position, &r.order, &r.banned};
        for (size_t i = 0; i < sizeof sent / sizeof *sent; i++) send(cuda, sent[i]);
        const struct batch host = {.n_logit_rows = n,
                                   .position = r.position.host,
                                   .logit_rows = r.order.host,
                                   .sample = r.sample.host,
                                   .banned = r.banned.host,
                                   .n_banned = 3};
        struct batch b = host;
        b.host = &host;
        b.position = r.position.device;
        b.logit_rows = r.order.device;
        b.sample = r.sample.device;
        b.banned = r.banned.device;
        struct sample_args a = {.batch = &b,
                                .logits = r.logits.device,
                                .n_vocab = plan->n_vocab,
                                .filter = sampling_filter(host.sample, n, plan->n_vocab),
                                .out = r.out,
                                .chosen = r.chosen.device};
        for (size_t i = 0; i < n; i++) {
            const tandem_sampling *p = &r.asked[i];
            *n_filtered += p->temperature > 0 && (p->top_k || p->top_p < 1 || p->min_p > 0);
        }
        cuda->sample(&(struct op_ctx){.ops = cuda}, &a);
        d->get(d, r.chosen.host, r.chosen.device, r.chosen.bytes);
        if (!d->sync(d, &err)) fail_msg("%s", err.text);
        different += compare_round(&r, plan, &sampler, r.chosen.host);
    }
    struct twin *all[] = {&r.logits, &r.sample, &r.position, &r.order, &r.banned, &r.chosen};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) untwin(cuda, all[i]);
    d->free_host(d, r.out);
    free(r.asked);
    free(r.spoilt);
    sampler_free(&sampler);
    return different;
}

static struct greedy_choice choice_of(const float *x, size_t n) {
    struct greedy_choice c = {.ok = 1};
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) return (struct greedy_choice){0};
        if (x[i] > x[c.id]) c.id = (int32_t)i;
    }
    for (size_t i = 0; i < n; i++) sum += exp((double)x[i] - (double)x[c.id]);
    c.logprob = (float)-log(sum);
    return c;
}

size_t compare_choices(const struct ops *cuda, size_t n_vocab, size_t n_rows, unsigned seed) {
    struct device *d = cuda->device;
    struct error err = {0};
    struct twin logits = twin(cuda, n_rows * n_vocab * sizeof(float));
    struct greedy_choice *out = d->alloc_host(d, n_rows * sizeof *out);
    size_t different = 0;
    float *x = logits.host;
    if (!out) fail_msg("out of memory");
    state = seed * 2654435761u + 1;
    for (size_t i = 0; i < n_rows; i++, x += n_vocab) {
        fill_row(x, n_vocab);
        int32_t best = choice_of(x, n_vocab).id;
        if (i % 2) x[next_random() % n_vocab] = x[best];
        if (i % 4 == 3) x[next_random() % n_vocab] = next_random() % 2 ? NAN : -INFINITY;
    }
    send(cuda, &logits);
    cuda->choose(&(struct op_ctx){.ops = cuda}, out, logits.device, n_rows, n_vocab);
    if (!d->sync(d, &err)) fail_msg("%s", err.text);
    for (size_t i = 0; i < n_rows; i++) {
        struct greedy_choice want = choice_of((float *)logits.host + i * n_vocab, n_vocab), got = out[i];
        if (got.ok == want.ok && (!want.ok || (got.id == want.id && fabsf(got.logprob - want.logprob) < 1e-5f)))
            continue;
        if (different++ < 4)
            print_message("row %zu of %zu: token %d, %.7f, ok %d; f64 has %d, %.7f, ok %d\n", i, n_vocab, got.id,
                          (double)got.logprob, got.ok, want.id, (double)want.logprob, want.ok);
    }
    untwin(cuda, &logits);
    d->free_host(d, out);
    return different;
}
