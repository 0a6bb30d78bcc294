// bench_run.c: see bench_run.h.
#include "cli/bench_run.h"

#include "base/clock.h"
#include "base/size.h"
#include "format/noise.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST_STEPS = 64, FILL_TOKENS = 64, MOST_BANDWIDTHS = 4096 };

struct bench {
    tandem_engine *engine;
    struct bench_options options;
    struct run *run;
    struct kv_store kv;
    int32_t *token, *position, *seq;                 // [max_tokens]
    int32_t *seq_start, *page_start, *kv_len, *rows; // [max_batch + 1]
    int32_t *pages;                                  // [n_pages] 0, 1, 2, ...
    struct file_map buffer;                          // what the bandwidth is measured on
    void *device_buffers[2];                         // the same on a device
    size_t buffer_bytes;
    double bandwidths[MOST_BANDWIDTHS]; // [n_bandwidths] GB/s
    size_t n_bandwidths;
    // The repeats of the case in progress.
    double tps[BENCH_VARIANTS][BENCH_MOST_REPEATS], rate[BENCH_VARIANTS][BENCH_MOST_REPEATS];
    double share[BENCH_VARIANTS][BENCH_MOST_REPEATS], ratio[BENCH_MOST_REPEATS];
    uint64_t sink; // keeps the sums from being optimised away
};

// ---- Numbers about a case

static size_t pages_for(size_t n_tokens) {
    return (n_tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
}

size_t bench_pages(const struct bench_case *what) {
    return what->batch * pages_for(what->depth + (what->n_tokens ? what->n_tokens : MOST_STEPS));
}

static size_t kv_token_bytes(const tandem_engine *e) {
    const struct model_config *c = &e->model->config;
    size_t row;
    if (!dtype_row_bytes(e->kv_type, c->head_dim, &row)) row = 0;
    return 2 * c->n_layers * c->n_kv_heads * row;
}

size_t bench_page_bytes(const tandem_engine *e) {
    return kv_token_bytes(e) * KV_PAGE_TOKENS;
}

size_t bench_available_memory(void) {
    FILE *f = fopen("/proc/meminfo", "re");
    if (!f) return 0;
    char line[256];
    size_t kb = 0;
    while (kb == 0 && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %zu", &kb) != 1) kb = 0;
    fclose(f);
    return kb * 1024;
}

// Bytes of weights that every step reads: all but an embedding that is not the head too.
static double step_weight_bytes(const struct model *m) {
    double bytes = (double)m->weight_bytes;
    if (!m->config.tied) bytes -= (double)(m->embed.n_out * m->embed.row_bytes);
    return bytes;
}

// Floating-point operations of a step: the matrices for every token, the head for every row of logits, attention.
static double step_flops(const struct model_config *c, double n_tokens, double n_rows, double sum_of_contexts) {
    double q = (double)(c->n_heads * c->head_dim), kv = (double)(c->n_kv_heads * c->head_dim), h = (double)c->hidden;
    double layer = 2 * h * q + 2 * h * kv + 3 * h * (double)c->n_ff;
    return 2 * ((double)c->n_layers * (n_tokens * layer + 2 * sum_of_contexts * q) + n_rows * h * (double)c->n_vocab);
}

// ---- Bandwidth

struct read_job {
    const unsigned char *data;
    uint64_t *sink;
};

static void read_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct read_job *j = user;
    const uint64_t *p = (const uint64_t *)(const void *)(j->data + begin * 4096);
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0, n = (end - begin) * 512; i < n; i += 4) a += p[i], b += p[i + 1], c += p[i + 2], d += p[i + 3];
    __atomic_fetch_add(j->sink, a + b + c + d, __ATOMIC_RELAXED);
}

static void write_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    memset((unsigned char *)user + begin * 4096, (int)(begin % 251) + 1, (end - begin) * 4096);
}

// A device's: what a copy within its memory reads and writes.
static double device_bandwidth(struct bench *b) {
    struct device *d = b->engine->ops->device;
    enum { COPIES = 4 };
    d->move(d, b->device_buffers[1], b->device_buffers[0], b->buffer_bytes); // waits for nothing, but warms up
    d->sync(d, NULL);
    double start = clock_seconds();
    for (int i = 0; i < COPIES; i++)
        d->move(d, b->device_buffers[i % 2], b->device_buffers[1 - i % 2], b->buffer_bytes);
    d->sync(d, NULL);
    return 2.0 * COPIES * (double)b->buffer_bytes / (clock_seconds() - start) / 1e9;
}

static double measure_bandwidth(struct bench *b) {
    if (b->engine->ops->device) {
        double gbs_of_device = device_bandwidth(b);
        if (b->n_bandwidths < MOST_BANDWIDTHS) b->bandwidths[b->n_bandwidths++] = gbs_of_device;
        return gbs_of_device;
    }
    struct read_job j = {b->buffer.data, &b->sink};
    double start = clock_seconds();
    pool_for(b->engine->pool, b->buffer.size / 4096, 64, read_piece, &j);
    double gbs = (double)b->buffer.size / (clock_seconds() - start) / 1e9;
    if (b->n_bandwidths < MOST_BANDWIDTHS) b->bandwidths[b->n_bandwidths++] = gbs;
    return gbs;
}

static bool make_buffer(struct bench *b, struct error *err) {
    long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
    size_t size = (size_t)256 << 20, available = bench_available_memory();
    if (l3 > 0 && (size_t)l3 * 2 > size) size = (size_t)l3 * 2;
    if (size > (size_t)1 << 30) size = (size_t)1 << 30;
    if (available && size > available / 4) size = available / 4;
    size = size / 4096 * 4096;
    unsigned char *data;
    struct device *d = b->engine->ops->device;
    b->buffer_bytes = size;
    if (d) {
        b->buffer_bytes = (size_t)1 << 30;
        for (int i = 0; i < 2; i++)
            if (!(b->device_buffers[i] = d->alloc(d, b->buffer_bytes, "the measurement of the bandwidth", err)))
                return false;
        return true;
    }
    if (size == 0 || !file_map_memory(&b->buffer, size, &data, err)) return false;
    pool_for(b->engine->pool, size / 4096, 64, write_piece, data); // untouched memory would all be one zero page
    return true;
}

static int by_value(const void *x, const void *y) {
    double a = *(const double *)x, b = *(const double *)y;
    return (a > b) - (a < b);
}

struct spread bench_spread(const double *values, size_t n) {
    double sorted[MOST_BANDWIDTHS];
    if (n == 0) return (struct spread){0};
    memcpy(sorted, values, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, by_value);
    return (struct spread){.median = n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2,
                           .min = sorted[0],
                           .max = sorted[n - 1]};
}

struct spread bench_bandwidth(const struct bench *b) {
    return bench_spread(b->bandwidths, b->n_bandwidths);
}

size_t bench_buffer_bytes(const struct bench *b) {
    return b->buffer_bytes;
}

static double repeat_once(struct bench *b, const struct bench_case *what, size_t n_tokens, uint64_t *hash);

// ---- Life

struct bench *bench_create(tandem_engine *e, const struct bench_options *o, struct error *err) {
    struct bench *b = size_alloc_zero(1, sizeof *b);
    if (!b) {
        error_set(err, "out of memory");
        return NULL;
    }
    b->engine = e;
    b->options = *o;
    struct run_options run = {.ops = e->ops,
                              .pool = e->pool,
                              .fusion = o->fusion[0],
                              .max_tokens = o->max_tokens,
                              .max_logit_rows = o->max_batch,
                              .max_positions = o->max_positions};
    run.weights = e->weights;
    run.max_pages = o->n_pages;
    if (run.max_tokens < FILL_TOKENS) run.max_tokens = FILL_TOKENS;
    size_t n_tokens = o->max_tokens > FILL_TOKENS ? o->max_tokens : FILL_TOKENS, n_seqs = o->max_batch + 1;
    b->token = size_alloc(n_tokens, sizeof *b->token);
    b->position = size_alloc(n_tokens, sizeof *b->position);
    b->seq = size_alloc(n_tokens, sizeof *b->seq);
    b->seq_start = size_alloc(n_seqs, sizeof *b->seq_start);
    b->page_start = size_alloc(n_seqs, sizeof *b->page_start);
    b->kv_len = size_alloc(n_seqs, sizeof *b->kv_len);
    b->rows = size_alloc(n_seqs, sizeof *b->rows);
    b->pages = size_alloc(o->n_pages, sizeof *b->pages);
    bool ok = b->token && b->position && b->seq && b->seq_start && b->page_start && b->kv_len && b->rows && b->pages;
    if (!ok) error_set(err, "out of memory");
    for (size_t i = 0; ok && i < o->n_pages; i++) b->pages[i] = (int32_t)i;
    ok = ok && make_buffer(b, err) &&
         kv_store_create_on(e->ops->device, &b->kv, &e->model->config, e->kv_type, o->n_pages, err) &&
         (b->run = run_create(e->model, &run, err)) != NULL;
    if (!ok) {
        bench_free(b);
        return NULL;
    }
    uint64_t hash; // the first step of all touches every weight: not timed
    repeat_once(b, &(struct bench_case){.kind = BENCH_DECODE, .batch = 1, .n_tokens = 1}, 1, &hash);
    return b;
}

void bench_free(struct bench *b) {
    if (!b) return;
    int32_t *arrays[] = {b->token, b->position, b->seq, b->seq_start, b->page_start, b->kv_len, b->rows, b->pages};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) free(arrays[i]);
    run_free(b->run);
    kv_store_free(&b->kv);
    file_map_close(&b->buffer);
    struct device *d = b->engine->ops->device;
    for (int i = 0; d && i < 2; i++) d->free(d, b->device_buffers[i]);
    free(b);
}

// ---- Steps

// Token ids that differ by position and sequence, but are the same in every run.
static int32_t id_at(const struct bench *b, size_t seq, size_t position) {
    return (int32_t)((position * 7919 + seq * 104729 + 17) % b->engine->model->config.n_vocab);
}

// A batch of n tokens of each of n_seqs sequences, of which `first` is the first, from `start` on. n_pages: pages of
// each sequence.
static struct batch make_batch(struct bench *b, size_t first, size_t n_seqs, size_t start, size_t n, size_t n_pages,
                               bool logits) {
    struct batch batch = {.n_tokens = n_seqs * n,
                          .n_seqs = n_seqs,
                          .n_logit_rows = logits ? n_seqs : 0,
                          .token = b->token,
                          .position = b->position,
                          .seq = b->seq,
                          .seq_start = b->seq_start,
                          .page_start = b->page_start,
                          .pages = b->pages,
                          .kv_len = b->kv_len,
                          .logit_rows = b->rows};
    for (size_t s = 0; s <= n_seqs; s++) {
        b->seq_start[s] = (int32_t)(s * n);
        b->page_start[s] = (int32_t)((first + s) * n_pages);
        if (s == n_seqs) break;
        b->kv_len[s] = (int32_t)(start + n);
        b->rows[s] = (int32_t)(s * n + n - 1);
        for (size_t i = 0; i < n; i++) {
            b->token[s * n + i] = id_at(b, first + s, start + i);
            b->position[s * n + i] = (int32_t)(start + i);
            b->seq[s * n + i] = (int32_t)s;
        }
    }
    return batch;
}

// Writes random K and V for positions 0 .. depth of every sequence: as dear to read as real ones, and much cheaper to
// make. Every sequence gets the same, whatever the batch.
static bool fill_kv(struct bench *b, const struct bench_case *what, struct error *err) {
    const struct model_config *c = &b->engine->model->config;
    size_t width = c->n_kv_heads * c->head_dim, n_pages = bench_pages(what) / what->batch;
    float *k = size_alloc(FILL_TOKENS, 2 * width * sizeof *k), *v = k + FILL_TOKENS * width;
    if (!k) return error_set(err, "out of memory");
    for (size_t layer = 0; layer < c->n_layers; layer++) {
        struct noise noise;
        noise_seed(&noise, 99, layer);
        noise_floats(&noise, k, 2 * FILL_TOKENS * width, 1);
        for (size_t s = 0; s < what->batch; s++) {
            for (size_t at = 0; at < what->depth; at += FILL_TOKENS) {
                size_t n = what->depth - at < FILL_TOKENS ? what->depth - at : FILL_TOKENS;
                struct batch batch = make_batch(b, s, 1, at, n, n_pages, false);
                run_store_kv(b->run, &b->kv.layers[layer], &batch, k, v);
            }
        }
    }
    free(k);
    return true;
}

// Sequences that a step holds.
static size_t side_by_side(const struct bench *b, const struct bench_case *what, size_t n_tokens) {
    size_t fit = b->options.max_tokens / n_tokens;
    if (what->kind == BENCH_DECODE || fit > what->batch) return what->batch;
    return fit ? fit : 1;
}

// One timed repeat. Returns its seconds; *hash as in bench_result.
static double repeat_once(struct bench *b, const struct bench_case *what, size_t n_tokens, uint64_t *hash) {
    size_t n_pages = bench_pages(what) / what->batch, n_vocab = b->engine->model->config.n_vocab;
    size_t chunk = what->kind == BENCH_DECODE ? 1 : b->options.max_tokens;
    size_t most = side_by_side(b, what, n_tokens);
    double start = clock_seconds(), hashing = 0;
    for (size_t first = 0; first < what->batch; first += most) {
        size_t n_seqs = what->batch - first < most ? what->batch - first : most;
        bool is_ahead = false; // a step is under way that nobody has waited for
        for (size_t at = 0; at < n_tokens; at += chunk) {
            size_t n = n_tokens - at < chunk ? n_tokens - at : chunk;
            bool logits = what->kind == BENCH_DECODE || at + n == n_tokens;
            struct batch batch = make_batch(b, first, n_seqs, what->depth + at, n, n_pages, logits);
            model_queue(b->engine->model, b->run, &b->kv, &batch);
            // A step has ended when its tokens are known; the next one is queued before that, as the engine does.
            if (is_ahead) run_choices_of(b->run, run_turn(b->run) ^ 1);
            is_ahead = b->engine->ops->device && what->kind == BENCH_DECODE && at > 0;
            if (b->engine->ops->device && !is_ahead) run_choices(b->run);
            if (!logits || first > 0 || (what->kind == BENCH_DECODE && at > 0)) continue;
            double before = clock_seconds();
            *hash = logits_hash(0, run_logits(b->run), n_vocab);
            hashing = clock_seconds() - before;
        }
        if (is_ahead) run_choices(b->run);
    }
    return clock_seconds() - start - hashing;
}

static size_t choose_steps(struct bench *b, const struct bench_case *what) {
    if (what->n_tokens) return what->n_tokens;
    uint64_t hash;
    double seconds = repeat_once(b, what, 1, &hash), n = 0.5 / (seconds > 1e-6 ? seconds : 1e-6);
    return n < 4 ? 4 : n > MOST_STEPS ? MOST_STEPS : (size_t)n;
}

// The least that a repeat reads, in bytes, and its arithmetic.
static void count_work(const struct bench *b, const struct bench_case *what, size_t n_tokens, double *bytes,
                       double *flops) {
    const struct model *m = b->engine->model;
    size_t most = side_by_side(b, what, n_tokens);
    double batch = (double)what->batch, steps = (double)((what->batch + most - 1) / most),
           kv = (double)kv_token_bytes(b->engine);
    size_t chunk = what->kind == BENCH_DECODE ? 1 : b->options.max_tokens;
    *bytes = *flops = 0;
    for (size_t at = 0; at < n_tokens; at += chunk) {
        double n = (double)(n_tokens - at < chunk ? n_tokens - at : chunk), start = (double)(what->depth + at);
        bool logits = what->kind == BENCH_DECODE || at + chunk >= n_tokens;
        *bytes += steps * step_weight_bytes(m) + batch * kv * (start + n);
        *flops += step_flops(&m->config, batch * n, logits ? batch : 0, batch * n * (start + (n + 1) / 2));
    }
}

bool bench_measure(struct bench *b, const struct bench_case *what, struct bench_outcome *out, struct error *err) {
    const struct bench_options *o = &b->options;
    double bytes, flops, begin = clock_seconds();
    *out = (struct bench_outcome){0};
    if (!fill_kv(b, what, err)) return false;
    run_set_fusion(b->run, o->fusion[0]);
    out->n_tokens = choose_steps(b, what);
    count_work(b, what, out->n_tokens, &bytes, &flops);
    for (size_t r = 0; r < o->n_repeats && (r == 0 || clock_seconds() - begin < o->max_seconds); r++) {
        for (size_t i = 0; i < o->n_variants; i++) {
            size_t v = r % 2 ? o->n_variants - 1 - i : i; // who goes first alternates too
            uint64_t hash = 0;
            run_set_fusion(b->run, o->fusion[v]);
            double read = measure_bandwidth(b), seconds = repeat_once(b, what, out->n_tokens, &hash);
            b->tps[v][r] = (double)(out->n_tokens * what->batch) / seconds;
            b->rate[v][r] = bytes / seconds / 1e9;
            b->share[v][r] = b->rate[v][r] / read;
            if (!run_error(b->run, err)) return false;
            if (r > 0 && out->variants[v].hash != hash)
                return error_set(err, "repeat %zu gave other logits than the first: %016llx, then %016llx", r + 1,
                                 (unsigned long long)out->variants[v].hash, (unsigned long long)hash);
            out->variants[v].hash = hash;
        }
        b->ratio[r] = b->tps[0][r] / b->tps[o->n_variants - 1][r];
        out->n_repeats = r + 1;
        if (o->progress) o->progress(o->user, r + 1, o->n_repeats);
    }
    for (size_t v = 0; v < o->n_variants; v++) {
        struct bench_result *result = &out->variants[v];
        result->fusion = o->fusion[v];
        result->tps = bench_spread(b->tps[v], out->n_repeats);
        result->gbs = bench_spread(b->rate[v], out->n_repeats).median;
        result->share = bench_spread(b->share[v], out->n_repeats).median;
        result->gflops = flops / bytes * result->gbs;
    }
    out->ratio = bench_spread(b->ratio, out->n_repeats);
    return true;
}
