// test_last_layer.c: a step that wants few logits runs the last layer for their tokens alone. The logits and the KV
// must be those of a step that wants them all: with chunks and several sequences, some of which want none, on the fused
// path, the standard one and between, for every class of models.
#include "model/synthetic.h"

#include "ops/kv_page.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N_SEQS = 3, N_STEPS = 4, N_PAGES = 24, MOST_TOKENS = 128, PAGES_EACH = N_PAGES / N_SEQS };

// Tokens of each sequence in each step; where only one token is wanted of two, all run.
static const size_t steps[N_STEPS][N_SEQS] = {{70, 41, 0}, {0, 9, 64}, {37, 1, 1}, {2, 0, 0}};

// Bits of the sequences that want their last token's logits in a step.
static const unsigned wishes[][N_STEPS] = {{7, 7, 7, 7}, {2, 4, 1, 1}, {0, 2, 5, 0}, {0, 0, 0, 1}};
enum { ALL_TOKENS = 8 }; // a wish: everybody's

static struct ops counting;
static const struct ops *real;
static size_t mlp_tokens; // of all layers

static void count_norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    mlp_tokens += a->n_tokens;
    real->norm_gate_up(ctx, a);
}

static size_t n_ff;
static void count_silu_mul(const struct op_ctx *ctx, float *act, const float *gate, const float *up, size_t n) {
    mlp_tokens += n / n_ff;
    real->silu_mul(ctx, act, gate, up, n);
}

struct plan {
    struct batch batch;
    int32_t token[MOST_TOKENS], position[MOST_TOKENS], seq[MOST_TOKENS], rows[MOST_TOKENS];
    int32_t seq_start[N_SEQS + 1], page_start[N_SEQS + 1], pages[N_PAGES], kv_len[N_SEQS];
};

// Step `index` behind the ones before it. The pages of a sequence are every third one, backwards.
static void plan_step(struct plan *p, size_t index, unsigned wish) {
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
        size_t n = steps[index][s], done = 0;
        if (n == 0) continue;
        for (size_t i = 0; i < index; i++) done += steps[i][s];
        p->seq_start[b->n_seqs] = (int32_t)b->n_tokens;
        p->page_start[b->n_seqs] = (int32_t)n_pages;
        for (size_t i = 0; i < n; i++, b->n_tokens++) {
            p->token[b->n_tokens] = (int32_t)((s * 31 + (done + i) * 7) % 90 + 3);
            p->position[b->n_tokens] = (int32_t)(done + i);
            p->seq[b->n_tokens] = (int32_t)b->n_seqs;
            if (wish == ALL_TOKENS || (wish >> s & 1 && i + 1 == n)) p->rows[b->n_logit_rows++] = (int32_t)b->n_tokens;
        }
        for (size_t i = 0; i < PAGES_EACH; i++) p->pages[n_pages++] = (int32_t)(N_PAGES - 1 - i * N_SEQS - s);
        p->kv_len[b->n_seqs++] = (int32_t)(done + n);
    }
    p->seq_start[b->n_seqs] = (int32_t)b->n_tokens;
    p->page_start[b->n_seqs] = (int32_t)n_pages;
}

// A run and its KV; `wish`: as in wishes, or NULL: all tokens.
struct trial {
    struct run *run;
    struct kv_store kv;
    const unsigned *wish;
    struct plan plan;
};

static void trial_open(struct trial *t, const struct model *m, struct run_options *o, enum dtype kv,
                       const unsigned *wish) {
    struct error err = {0};
    *t = (struct trial){.wish = wish};
    t->run = run_create(m, o, &err);
    if (!t->run || !kv_store_create(&t->kv, &m->config, kv, N_PAGES, &err)) fail_msg("%s", err.text);
    memset(t->kv.memory, 0xFF, t->kv.bytes);
    run_poison(t->run);
}

static const float *trial_step(struct trial *t, const struct model *m, size_t step) {
    plan_step(&t->plan, step, t->wish ? t->wish[step] : ALL_TOKENS);
    return model_forward(m, t->run, &t->kv, &t->plan.batch);
}

static void trial_close(struct trial *t) {
    run_free(t->run);
    kv_store_free(&t->kv);
}

// The tokens that the last layer's MLP has to run.
static size_t last_tokens(const struct batch *b) {
    return 2 * b->n_logit_rows <= b->n_tokens && b->n_tokens > b->n_seqs ? b->n_logit_rows : b->n_tokens;
}

static void compare(const char *what, const struct model *m, struct run_options *o, enum dtype kv,
                    const unsigned *wish) {
    struct trial all, few;
    trial_open(&all, m, o, kv, NULL);
    trial_open(&few, m, o, kv, wish);
    for (size_t i = 0; i < N_STEPS; i++) {
        const float *expected = trial_step(&all, m, i);
        mlp_tokens = 0;
        const float *found = trial_step(&few, m, i);
        const struct batch *b = &few.plan.batch;
        assert_int_equal(mlp_tokens, (m->config.n_layers - 1) * b->n_tokens + last_tokens(b));
        for (size_t r = 0; r < b->n_logit_rows; r++) {
            size_t t = (size_t)b->logit_rows[r], n = m->config.n_vocab;
            if (memcmp(expected + t * n, found + r * n, n * sizeof *found) != 0)
                fail_msg("%s, step %zu: row %zu of the logits differs", what, i, r);
        }
        if (memcmp(all.kv.memory, few.kv.memory, all.kv.bytes) != 0) fail_msg("%s, step %zu: the KV differs", what, i);
    }
    trial_close(&all);
    trial_close(&few);
}

static void bits_do_not_depend_on_what_is_wanted(void **state) {
    (void)state;
    static const char *const models[] = {"tiny-qwen3:bf16", "tiny-qwen3:q8_0", "tiny-qwen2:q4_k", "tiny-qwen2:bf16",
                                         "tiny-llama:f32"};
    static const enum dtype kv_types[] = {DTYPE_BF16, DTYPE_Q8_0, DTYPE_F32};
    static const char *const ways[][2] = {{"portable", "off"},
                                          {"auto", "off"},
                                          {"auto", "on"},
                                          {"auto", "norm_qkv"},
                                          {"auto", "rope_attention"},
                                          {"auto", "norm_qkv,qk_norm_rope_store"}};
    struct pool *pool = pool_create(2, NULL);
    assert_non_null(pool);
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        struct error err = {0};
        struct model *m = model_synthetic(models[i], pool, NULL, &err);
        if (!m) fail_msg("%s", err.text);
        n_ff = m->config.n_ff;
        for (size_t way = 0; way < sizeof ways / sizeof *ways; way++) {
            struct run_options o = {.ops = &counting,
                                    .pool = pool,
                                    .max_tokens = MOST_TOKENS,
                                    .max_logit_rows = MOST_TOKENS,
                                    .max_positions = PAGES_EACH * KV_PAGE_TOKENS};
            const char *isa = ways[way][0], *fusion = ways[way][1];
            assert_true(fusion_parse(fusion, &o.fusion, NULL));
            real = ops_cpu(isa, &err);
            if (!real) fail_msg("%s", err.text);
            counting = *real;
            counting.silu_mul = count_silu_mul;
            if (real->norm_gate_up) counting.norm_gate_up = count_norm_gate_up;
            for (size_t k = 0; k < sizeof wishes / sizeof *wishes; k++) {
                char what[160];
                enum dtype kv = kv_types[(i + way + k) % 3];
                snprintf(what, sizeof what, "%s, KV %s, %s, fusion %s, wish %zu", models[i], dtype_info(kv)->name, isa,
                         fusion, k);
                compare(what, m, &o, kv, wishes[k]);
            }
        }
        model_free(m);
    }
    pool_free(pool);
}

static void count_taps(void *user, const char *name, int layer, const float *data, size_t n_rows, size_t n_columns) {
    (void)data, (void)n_columns;
    if (strcmp(name, "resid") == 0 && layer >= 0) *(size_t *)user += n_rows;
}

// Who watches sees every token in every layer; and some ops are not faster with few tokens less.
static void a_step_may_run_all(void **state) {
    (void)state;
    struct error err = {0};
    struct model *m = model_synthetic("tiny-qwen3", NULL, NULL, &err);
    struct pool *pool = pool_create(1, NULL);
    if (!m || !pool) fail_msg("%s", err.text);
    struct ops watched = *ops_cpu("portable", NULL);
    struct run_options o = {.ops = &watched,
                            .pool = pool,
                            .max_tokens = MOST_TOKENS,
                            .max_logit_rows = N_SEQS,
                            .max_positions = PAGES_EACH * KV_PAGE_TOKENS};
    struct trial t;
    size_t rows = 0, tokens = steps[0][0] + steps[0][1];
    trial_open(&t, m, &o, DTYPE_BF16, wishes[0]);
    run_set_tap(t.run, count_taps, &rows);
    trial_step(&t, m, 0);
    assert_int_equal(rows, m->config.n_layers * tokens);
    run_set_tap(t.run, NULL, NULL);
    real = ops_cpu("portable", NULL);
    watched.silu_mul = count_silu_mul;
    n_ff = m->config.n_ff;
    for (int i = 0; i < 2; i++) {
        watched.least_left_out = tokens - 2 + (size_t)i;
        mlp_tokens = 0;
        trial_step(&t, m, 0);
        assert_int_equal(mlp_tokens, (m->config.n_layers - 1) * tokens + (i ? tokens : 2));
    }
    trial_close(&t);
    model_free(m);
    pool_free(pool);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(bits_do_not_depend_on_what_is_wanted),
                                       cmocka_unit_test(a_step_may_run_all)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
