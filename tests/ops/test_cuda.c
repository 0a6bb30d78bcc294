// test_cuda.c: the CUDA backend on a real GPU, whole models deep: every way to run a sequence (standard and fused, each
// fused op alone, any chunking, next to neighbours, other pages, recorded or not) gives the same bytes of logits, over
// poisoned pages; and every intermediate result is as close to the f64 oracle as the contract asks. Skipped, with the
// reason, where there is no GPU.
#include "base/clock.h"
#include "base/size.h"
#include "model/model.h"
#include "model/oracle.h"
#include "model/synthetic.h"
#include "ops/ops.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MAX_TOKENS = 2048, MAX_ROWS = 512, KEEP_EVERY = 37, MAX_SEQS = 256 };

static const struct ops *cuda;
static struct pool *pool;

static void *checked(size_t count, size_t item) {
    void *p = size_alloc_zero(count, item);
    assert_non_null(p);
    return p;
}

static uint32_t all_fused(void) {
    uint32_t mask;
    assert_true(fusion_parse("on", &mask, NULL));
    return mask;
}

// ---- Running a sequence one way
// --------------------------------------------------------------------------------------

struct subject {
    struct model *model;
    struct device_weights *weights;
    size_t length; // of the sequence
    bool whole;    // in one chunk of `length`, also by the standard path
};

struct way {
    char name[80];
    uint32_t fusion;
    size_t chunk, n_seqs;
    bool backwards; // pages
};

static int32_t id_at(const struct model *m, size_t seq, size_t position) {
    return (int32_t)((position * 7919 + seq * 104729 + position * position * 31 + 17) % m->config.n_vocab);
}

static bool kept(size_t position, size_t length) {
    return position % KEEP_EVERY == 0 || position + 1 == length;
}

static size_t n_kept(size_t length) {
    size_t n = 0;
    for (size_t i = 0; i < length; i++) n += kept(i, length);
    return n;
}

// Logits of sequence 0 at the kept positions: [n_kept, n_vocab].
static void run_way(const struct subject *s, const struct way *w, float *out) {
    const struct model_config *c = &s->model->config;
    struct error err = {0};
    size_t per_seq = (s->length + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS, n_pages = per_seq * w->n_seqs;
    struct run_options o = {.ops = cuda,
                            .pool = pool,
                            .fusion = w->fusion,
                            .max_tokens = w->chunk * w->n_seqs,
                            .max_logit_rows = w->chunk * w->n_seqs < MAX_ROWS ? w->chunk * w->n_seqs : MAX_ROWS,
                            .max_positions = s->length,
                            .weights = s->weights,
                            .max_pages = n_pages};
    struct run *run = run_create(s->model, &o, &err);
    if (!run) fail_msg("%s", err.text);
    struct kv_store kv;
    if (!kv_store_create_on(cuda->device, &kv, c, DTYPE_BF16, n_pages, &err)) fail_msg("%s", err.text);
    cuda->device->fill(cuda->device, kv.memory, 0xFF, kv.bytes); // NaN
    size_t most = o.max_tokens;
    int32_t *token = checked(most, 4), *position = checked(most, 4), *seq = checked(most, 4), *rows = checked(most, 4);
    int32_t *seq_start = checked(w->n_seqs + 1, 4), *page_start = checked(w->n_seqs + 1, 4);
    int32_t *kv_len = checked(w->n_seqs, 4), *pages = checked(n_pages, 4);
    for (size_t i = 0; i < n_pages; i++) {
        size_t page = i % per_seq * w->n_seqs + i / per_seq;
        pages[i] = (int32_t)(w->backwards ? n_pages - 1 - page : page);
    }
    for (size_t at = 0; at < s->length; at += w->chunk) {
        size_t n = s->length - at < w->chunk ? s->length - at : w->chunk;
        struct batch b = {.n_seqs = w->n_seqs,
                          .token = token,
                          .position = position,
                          .seq = seq,
                          .seq_start = seq_start,
                          .page_start = page_start,
                          .pages = pages,
                          .kv_len = kv_len,
                          .logit_rows = rows};
        for (size_t q = 0; q < w->n_seqs; q++) {
            seq_start[q] = (int32_t)b.n_tokens;
            page_start[q] = (int32_t)(q * per_seq);
            kv_len[q] = (int32_t)(at + n);
            for (size_t i = 0; i < n; i++, b.n_tokens++) {
                token[b.n_tokens] = id_at(s->model, q, at + i);
                position[b.n_tokens] = (int32_t)(at + i);
                seq[b.n_tokens] = (int32_t)q;
                if (q == 0 && kept(at + i, s->length)) rows[b.n_logit_rows++] = (int32_t)b.n_tokens;
            }
        }
        seq_start[w->n_seqs] = (int32_t)b.n_tokens;
        page_start[w->n_seqs] = (int32_t)n_pages;
        const float *logits = model_forward(s->model, run, &kv, &b);
        if (!run_error(run, &err)) fail_msg("%s: %s", w->name, err.text);
        memcpy(out, logits, b.n_logit_rows * c->n_vocab * sizeof *out);
        out += b.n_logit_rows * c->n_vocab;
    }
    int32_t *all[] = {token, position, seq, rows, seq_start, page_start, kv_len, pages};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    kv_store_free(&kv);
    run_free(run);
}

static size_t add_way(struct way *ways, size_t n, uint32_t fusion, size_t chunk, size_t n_seqs, bool backwards) {
    char text[256];
    struct way *w = &ways[n];
    *w = (struct way){.fusion = fusion, .chunk = chunk, .n_seqs = n_seqs, .backwards = backwards};
    snprintf(w->name, sizeof w->name, "fusion %.30s, chunk %zu, %zu sequences%s",
             fusion_text(fusion, text, sizeof text), chunk, n_seqs, backwards ? ", pages backwards" : "");
    return n + 1;
}

// Every way against the standard path in chunks of 97.
static void compare_ways(const struct subject *s, const char *name) {
    enum { MOST = 80 };
    struct way *ways = checked(MOST, sizeof *ways);
    const uint32_t on = all_fused();
    const uint32_t step = 1u << FUSED_STEP;
    size_t n = add_way(ways, 0, 0, 97, 1, false);
    n = add_way(ways, n, 0, 1, 1, false);
    n = add_way(ways, n, on, 1, 1, false);
    n = add_way(ways, n, on & ~step, 1, 1, true);
    n = add_way(ways, n, on & ~(1u << FUSED_ROPE_ATTENTION), 1, 1, false);
    for (int op = 0; op < FUSED_STEP; op++) {
        n = add_way(ways, n, 1u << op, 1, 3, true);
        n = add_way(ways, n, 1u << op, 50, 1, false);
    }
    static const size_t chunks[] = {2,  3,  4,  5,  7,  8,  9,   15,  16,  17,  24, 31,
                                    32, 33, 48, 63, 64, 65, 100, 128, 129, 200, 300};
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++)
        if (chunks[i] <= s->length) n = add_way(ways, n, on, chunks[i], 1, i % 2);
    if (s->whole) n = add_way(ways, n, on, s->length, 1, true);
    if (s->whole) n = add_way(ways, n, 0, s->length, 1, true);
    static const size_t neighbours[] = {2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 100, 256};
    for (size_t i = 0; i < sizeof neighbours / sizeof *neighbours; i++)
        n = add_way(ways, n, on, 1, neighbours[i], i % 2);
    n = add_way(ways, n, on, 13, 7, true);
    n = add_way(ways, n, on & ~step, 1, 32, true);
    size_t floats = n_kept(s->length) * s->model->config.n_vocab, different = 0;
    float *expected = checked(floats, sizeof *expected), *found = checked(floats, sizeof *found);
    for (size_t i = 0; i < n; i++) {
        double start = clock_seconds();
        for (size_t k = 0; k < floats; k++) found[k] = NAN;
        run_way(s, &ways[i], i == 0 ? expected : found);
        size_t first = floats, wrong = 0;
        for (size_t k = 0; k < floats; k++) {
            if (i == 0 && !isfinite(expected[k])) fail_msg("%s: %s: no number at %zu", name, ways[i].name, k);
            if (i == 0 || memcmp(&expected[k], &found[k], sizeof *found) == 0) continue;
            if (wrong++ == 0) first = k;
        }
        if (wrong) {
            size_t v = s->model->config.n_vocab;
            print_message("%s: %s: %zu of %zu logits differ, first kept row %zu, id %zu: %.9g, not %.9g\n", name,
                          ways[i].name, wrong, floats, first / v, first % v, (double)found[first],
                          (double)expected[first]);
            different++;
        } else if (clock_seconds() - start > 2) {
            print_message("%s: %s: %.1f s\n", name, ways[i].name, clock_seconds() - start);
        }
    }
    print_message("%s: %zu ways, %zu differ\n", name, n, different);
    free(expected);
    free(found);
    free(ways);
    assert_int_equal(different, 0);
}

static void open_subject(struct subject *s, const char *model, size_t length, bool whole) {
    struct error err = {0};
    *s = (struct subject){.length = length, .whole = whole};
    struct model_load_options load = {.pool = pool};
    s->model = strncmp(model, "synthetic:", 10) == 0 ? model_synthetic(model, pool, NULL, &err)
                                                     : model_load(MODEL_FOLDER, model, &load, &err);
    if (!s->model) fail_msg("%s", err.text);
    if (!model_runs_on(s->model, cuda->device, &err)) fail_msg("%s", err.text);
    s->weights = weights_upload(s->model, cuda->device, NULL, &err);
    if (!s->weights) fail_msg("%s", err.text);
}

static void close_subject(struct subject *s) {
    weights_free(s->weights);
    model_free(s->model);
}

static void same_bits(const char *model, size_t length, bool whole) {
    if (!cuda) skip();
    struct subject s;
    open_subject(&s, model, length, whole);
    compare_ways(&s, model);
    close_subject(&s);
}

static void test_tiny_qwen3(void **state) {
    (void)state;
    same_bits("synthetic:tiny-qwen3", 601, true);
}

static void test_tiny_qwen2(void **state) {
    (void)state;
    same_bits("synthetic:tiny-qwen2", 301, true);
}

static void test_tiny_llama(void **state) {
    (void)state;
    same_bits("synthetic:tiny-llama", 300, true);
}

static void test_tandem_tiny(void **state) {
    (void)state;
    same_bits("models/tandem-tiny", 290, true);
}

static void test_full_shape(void **state) {
    (void)state;
    same_bits("synthetic:qwen3-0.6b", 280, false);
}

// ---- Against the oracle
// ----------------------------------------------------------------------------------------------

enum { ORACLE_TOKENS = 70 };

// One recorded activation of one path.
struct record {
    char name[32];
    int layer;
    size_t n;
    double *data;
};

struct records {
    struct record *list;
    size_t n;
};

static struct record *add_record(struct records *r, const char *name, int layer, size_t n) {
    r->list = realloc(r->list, (r->n + 1) * sizeof *r->list);
    assert_non_null(r->list);
    struct record *x = &r->list[r->n++];
    snprintf(x->name, sizeof x->name, "%s", name);
    x->layer = layer;
    x->n = n;
    x->data = checked(n, sizeof *x->data);
    return x;
}

static void record_oracle(void *user, const char *name, int layer, const double *data, size_t n_rows,
                          size_t n_columns) {
    memcpy(add_record(user, name, layer, n_rows * n_columns)->data, data, n_rows * n_columns * sizeof *data);
}

static void record_run(void *user, const char *name, int layer, const float *data, size_t n_rows, size_t n_columns) {
    struct record *r = add_record(user, name, layer, n_rows * n_columns);
    for (size_t i = 0; i < r->n; i++) r->data[i] = (double)data[i];
}

static void free_records(struct records *r) {
    for (size_t i = 0; i < r->n; i++) free(r->list[i].data);
    free(r->list);
}

static const struct record *find_record(const struct records *r, const char *name, int layer) {
    for (size_t i = 0; i < r->n; i++)
        if (r->list[i].layer == layer && strcmp(r->list[i].name, name) == 0) return &r->list[i];
    return NULL;
}

static double distance(const struct record *a, const struct record *b) {
    double sum = 0;
    for (size_t i = 0; i < a->n; i++) sum += (a->data[i] - b->data[i]) * (a->data[i] - b->data[i]);
    return sqrt(sum / (double)a->n);
}

static void run_oracle(const struct subject *s, enum oracle_kind kind, struct records *out) {
    struct error err = {0};
    int32_t ids[ORACLE_TOKENS];
    size_t rows[ORACLE_TOKENS];
    for (size_t i = 0; i < ORACLE_TOKENS; i++) ids[i] = id_at(s->model, 0, i), rows[i] = i;
    struct oracle *o = oracle_create(s->model, kind, pool, ORACLE_TOKENS, &err);
    double *logits = checked(ORACLE_TOKENS * s->model->config.n_vocab, sizeof *logits);
    struct oracle_step step = {.ids = ids,
                               .n = ORACLE_TOKENS,
                               .tap = record_oracle,
                               .tap_user = out,
                               .logit_rows = rows,
                               .n_logit_rows = ORACLE_TOKENS};
    if (!o || !oracle_run(o, &step, logits, &err)) fail_msg("%s", err.text);
    free(logits);
    oracle_free(o);
}

static void run_device(const struct subject *s, uint32_t fusion, struct records *out) {
    struct error err = {0};
    int32_t ids[ORACLE_TOKENS], position[ORACLE_TOKENS], seq[ORACLE_TOKENS] = {0};
    int32_t seq_start[] = {0, ORACLE_TOKENS}, page_start[] = {0, 3}, pages[] = {2, 0, 1}, kv_len[] = {ORACLE_TOKENS};
    for (int32_t i = 0; i < ORACLE_TOKENS; i++) ids[i] = id_at(s->model, 0, (size_t)i), position[i] = i;
    struct run_options o = {.ops = cuda,
                            .pool = pool,
                            .fusion = fusion,
                            .max_tokens = ORACLE_TOKENS,
                            .max_logit_rows = ORACLE_TOKENS,
                            .max_positions = ORACLE_TOKENS,
                            .weights = s->weights};
    struct run *run = run_create(s->model, &o, &err);
    struct kv_store kv;
    if (!run || !kv_store_create_on(cuda->device, &kv, &s->model->config, DTYPE_BF16, 3, &err))
        fail_msg("%s", err.text);
    struct batch b = {.n_tokens = ORACLE_TOKENS,
                      .n_seqs = 1,
                      .n_logit_rows = ORACLE_TOKENS,
                      .token = ids,
                      .position = position,
                      .seq = seq,
                      .seq_start = seq_start,
                      .page_start = page_start,
                      .pages = pages,
                      .kv_len = kv_len,
                      .logit_rows = position};
    run_set_tap(run, record_run, out);
    model_forward(s->model, run, &kv, &b);
    if (!run_error(run, &err)) fail_msg("%s", err.text);
    kv_store_free(&kv);
    run_free(run);
}

// Every result's error against T, at most twice H's; the logits', at most `logits_limit` of it.
static void judge(const char *model, double logits_limit) {
    if (!cuda) skip();
    struct subject s;
    struct records t = {0}, h = {0};
    open_subject(&s, model, ORACLE_TOKENS, false);
    run_oracle(&s, ORACLE_T, &t);
    run_oracle(&s, ORACLE_H, &h);
    size_t bad = 0;
    for (int fused = 0; fused < 2; fused++) {
        struct records found = {0};
        double worst = 0, logits = -1;
        run_device(&s, fused ? all_fused() : 0, &found);
        assert_true(found.n > 0);
        for (size_t i = 0; i < found.n; i++) {
            const struct record *r = &found.list[i], *exact = find_record(&t, r->name, r->layer),
                                *hf = find_record(&h, r->name, r->layer);
            if (!exact || !hf || exact->n != r->n)
                fail_msg("%s: no oracle for %s of layer %d", model, r->name, r->layer);
            double mine = distance(r, exact), theirs = distance(hf, exact);
            double ratio = theirs > 0 ? mine / theirs : mine > 0 ? INFINITY : 0;
            bool is_logits = strcmp(r->name, "logits") == 0;
            if (is_logits) logits = ratio;
            else if (ratio > worst) worst = ratio;
            if (ratio <= (is_logits ? logits_limit : 2.0)) continue;
            if (bad++ < 20)
                print_message("%s: %s of layer %d: error %.4g, Hugging Face's %.4g\n", model, r->name, r->layer, mine,
                              theirs);
        }
        print_message("%s, %s: error over Hugging Face's: logits %.3f, worst activation %.3f\n", model,
                      fused ? "fused" : "standard", logits, worst);
        free_records(&found);
    }
    free_records(&t);
    free_records(&h);
    close_subject(&s);
    assert_int_equal(bad, 0);
}

static void test_oracle_tiny(void **state) {
    (void)state;
    // The CPU's ops have 0.47, 0.56 and 0.52 on the same ids: these models' logits cancel more than a trained model's.
    judge("synthetic:tiny-qwen3", 0.6);
    judge("synthetic:tiny-qwen2", 0.6);
    judge("synthetic:tiny-llama", 0.6);
}

static void test_oracle_tandem_tiny(void **state) {
    (void)state;
    judge("models/tandem-tiny", 0.5);
}

// ---- Opening, and what cannot be opened
// ------------------------------------------------------------------------------

static void test_devices_by_name(void **state) {
    (void)state;
    struct error err = {0};
    assert_null(ops_open("gpu", NULL, NULL, &err));
    assert_non_null(strstr(err.text, "expected auto, cpu, cuda or cuda:N"));
    assert_null(ops_open("cuda:x", NULL, NULL, &err));
    assert_null(ops_open("cuda:999", NULL, NULL, &err));
    assert_non_null(strstr(err.text, "cuda:999"));
    const struct ops *cpu = ops_open("cpu", NULL, NULL, &err);
    assert_non_null(cpu);
    assert_null(cpu->device);
    ops_close(cpu);
}

static void test_too_much_memory(void **state) {
    (void)state;
    if (!cuda) skip();
    struct error err = {0};
    assert_null(cuda->device->alloc(cuda->device, (size_t)1 << 50, "a test", &err));
    assert_non_null(strstr(err.text, "out of memory for a test"));
    assert_true(cuda->device->sync(cuda->device, &err));
}

static int open_gpu(void **state) {
    (void)state;
    struct error err = {0};
    pool = pool_create(0, &err);
    cuda = ops_open("cuda", NULL, NULL, &err);
    if (!cuda) print_message("skipped: %s\n", err.text);
    else print_message("on %s\n", cuda->device->name);
    return pool ? 0 : -1;
}

static int close_gpu(void **state) {
    (void)state;
    ops_close(cuda);
    pool_free(pool);
    return 0;
}

// With an argument: only the tests whose names match it (cmocka's pattern).
int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_devices_by_name), cmocka_unit_test(test_too_much_memory),
        cmocka_unit_test(test_oracle_tiny),     cmocka_unit_test(test_oracle_tandem_tiny),
        cmocka_unit_test(test_tiny_qwen3),      cmocka_unit_test(test_tiny_qwen2),
        cmocka_unit_test(test_tiny_llama),      cmocka_unit_test(test_tandem_tiny),
        cmocka_unit_test(test_full_shape),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, open_gpu, close_gpu);
}
