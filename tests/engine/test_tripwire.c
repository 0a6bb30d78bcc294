// test_tripwire.c: NaN and Inf in logits: the sequence fails with the first op that went bad, and its neighbours never
// notice.
//
// Channel 0 of the residual stream is reserved: only the token POISON has it in its embedding, and nothing writes to
// it. A weight of 3e38 in column 0 of a matrix is then harmless to every other token, and Inf for that one.
#include "engine/engine.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { POISON = 7, STEPS = 6 };

static char err[1024];

static float *values(const struct matrix *m) {
    assert_int_equal(m->type, DTYPE_F32);
    return (float *)(uintptr_t)m->data;
}

static tandem_engine *open_engine(const char *model, const char *fusion) {
    tandem_options options = {
        .model = model, .context = 128, .kv_tokens = 1024, .chunk = 8, .max_batch = 4, .threads = 2, .fusion = fusion};
    tandem_engine *e = tandem_open(&options, err, sizeof err);
    if (!e) fail_msg("%s", err);
    const struct model *m = e->model;
    float *embed = values(&m->embed);
    for (size_t t = 0; t < m->config.n_vocab; t++) embed[t * m->config.hidden] = t == POISON ? 16.0f : 0.0f;
    for (size_t i = 0; i < m->config.n_layers; i++) {
        memset(values(&m->layers[i].wo), 0, m->layers[i].wo.row_bytes); // row 0
        memset(values(&m->layers[i].w_down), 0, m->layers[i].w_down.row_bytes);
    }
    return e;
}

static void poison(const struct matrix *m, size_t row) {
    values(m)[row * m->n_in] = 3e38f;
}

// A prompt of n ids without POISON, but with it at `where` (SIZE_MAX: nowhere).
static tandem_session *open_session(tandem_engine *e, size_t n, int salt, size_t where) {
    int32_t ids[128];
    for (size_t i = 0; i < n; i++) ids[i] = i == where ? POISON : (int32_t)(20 + (i * 31 + (size_t)salt * 57) % 500);
    // Never a choice of its own: the poison stays where the test puts it.
    static const int32_t banned[] = {POISON};
    static const float bias[] = {-1000};
    tandem_sampling sampling = {
        .temperature = 1, .top_p = 1, .repeat_penalty = 1, .seed = 5, .bias_ids = banned, .bias = bias, .n_bias = 1};
    tandem_session *s = tandem_session_new(e, &sampling, err, sizeof err);
    if (!s || tandem_session_append(s, ids, n, err, sizeof err) != TANDEM_OK) fail_msg("%s", err);
    return s;
}

static void expect_failure(tandem_engine *e, size_t n, size_t where, const char *says) {
    tandem_session *s = open_session(e, n, 1, where);
    tandem_token token = {.id = -5};
    assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_ERROR);
    if (!strstr(err, says)) fail_msg("expected \"%s\" in: %s", says, err);
    char first[64];
    snprintf(first, sizeof first, "the logits for position %zu hold NaN or Inf", n);
    assert_non_null(strstr(err, first));
    assert_int_equal(token.id, -5);
    size_t left;
    tandem_session_ids(s, &left);
    assert_int_equal(left, n); // nothing was sampled
    tandem_session_free(s);
}

static void names_the_layer_and_the_position(void **state) {
    (void)state;
    static const char *const fusions[] = {"on", "off"};
    for (int i = 0; i < 2; i++) {
        tandem_engine *e = open_engine("synthetic:tiny-qwen3:f32", fusions[i]);
        poison(&e->model->layers[1].w_up, 5);
        const char *up = "matmul (the up projection) produced the first in layer 1 at position";
        char says[128];
        for (size_t where = 0; where < 40; where += 13) { // first, middle, last; across chunks and pages
            snprintf(says, sizeof says, "%s %zu%s: Inf in channel 5 of up", up, where, where == 39 ? "" : " (token 7)");
            expect_failure(e, 40, where, says);
        }
        tandem_session *s = open_session(e, 40, 1, SIZE_MAX); // the engine goes on
        tandem_token token;
        assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_OK);
        tandem_session_free(s);
        tandem_close(e);
    }
}

static void names_every_kind_of_op(void **state) {
    (void)state;
    tandem_engine *e = open_engine("synthetic:tiny-llama:f32", "on");
    const struct model *m = e->model;
    poison(&m->head, 3);
    expect_failure(e, 10, 9, "matmul (the head) produced the first at position 9: Inf in channel 3 of logits");
    poison(&m->layers[2].w_gate, 11);
    expect_failure(e, 10, 9, "matmul (the gate projection) produced the first in layer 2 at position 9");
    poison(&m->layers[2].wq, 1);
    expect_failure(e, 10, 9, "matmul (the q projection) produced the first in layer 2 at position 9");
    poison(&m->layers[1].wv, 1);
    expect_failure(e, 10, 4, "matmul (the v projection) produced the first in layer 1 at position 4");
    poison(&m->layers[0].wk, 2);
    expect_failure(e, 10, 4, "matmul (the k projection) produced the first in layer 0 at position 4 (token 7): Inf in");
    tandem_close(e);

    // Finite in f32, but not in the type in which V is stored.
    e = open_engine("synthetic:tiny-qwen2:f32", "on");
    float *bias = (float *)(uintptr_t)e->model->layers[1].bv;
    bias[2] = 3.4e38f;
    expect_failure(e, 10, SIZE_MAX, "kv_store produced the first in layer 1 at position 0");
    tandem_close(e);
}

static struct ops broken;
static const struct ops *sound;

static void broken_norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    sound->norm_gate_up(ctx, a);
    if (ctx->layer == 1) a->act[7] = NAN;
}

static void tells_a_fused_op_from_its_primitives(void **state) {
    (void)state;
    tandem_engine *e = open_engine("synthetic:tiny-qwen3:f32", "on");
    sound = e->ops;
    if (!sound->norm_gate_up) skip(); // the portable ops: nothing is fused
    broken = *sound;
    broken.norm_gate_up = broken_norm_gate_up;
    e->ops = &broken;
    struct run_options run = {.ops = &broken,
                              .pool = e->pool,
                              .fusion = e->fusion,
                              .max_tokens = e->max_step_tokens,
                              .max_logit_rows = e->max_batch,
                              .max_positions = e->context};
    run_free(e->run);
    e->run = run_create(e->model, &run, NULL);
    assert_non_null(e->run);
    expect_failure(e, 20, SIZE_MAX, "the fused op norm_gate_up produced the first at position 0");
    tandem_close(e);
}

// What a session generates when it is alone.
static uint64_t alone(tandem_engine *e, size_t n, int salt, int32_t *out) {
    tandem_session *s = open_session(e, n, salt, SIZE_MAX);
    for (int i = 0; i < STEPS; i++) {
        tandem_token token;
        assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_OK);
        out[i] = token.id;
    }
    uint64_t hash = s->hash;
    tandem_session_free(s);
    return hash;
}

static void neighbours_go_on(void **state) {
    (void)state;
    tandem_engine *e = open_engine("synthetic:tiny-qwen3:f32", "on");
    poison(&e->model->layers[1].w_up, 5);
    int32_t expected[2][STEPS], got[2][STEPS];
    uint64_t hashes[2] = {alone(e, 33, 2, expected[0]), alone(e, 12, 3, expected[1])};
    tandem_session *bad = open_session(e, 20, 4, 11),
                   *good[2] = {open_session(e, 33, 2, SIZE_MAX), open_session(e, 12, 3, SIZE_MAX)};
    for (int step = 0; step < STEPS; step++) {
        tandem_session *group[] = {good[0], bad, good[1]}; // it fails between them, again and again
        tandem_token tokens[3];
        int status[3];
        assert_int_equal(tandem_next_many(group, 3, tokens, status, err, sizeof err), TANDEM_OK);
        assert_int_equal(status[0], TANDEM_OK);
        assert_int_equal(status[1], TANDEM_ERROR);
        assert_int_equal(status[2], TANDEM_OK);
        assert_non_null(strstr(err, "in layer 1 at position 11 (token 7)"));
        got[0][step] = tokens[0].id;
        got[1][step] = tokens[2].id;
    }
    for (int i = 0; i < 2; i++) {
        assert_memory_equal(got[i], expected[i], sizeof expected[i]);
        assert_true(good[i]->hash == hashes[i]);
        tandem_session_free(good[i]);
    }
    tandem_session_free(bad);
    tandem_close(e);
}

// ---- Requests: the same among what the scheduler runs, and no page of the failed one stays in the cache.

struct outcome {
    uint64_t hash;
    size_t n, n_cached;
    enum tandem_finish finish;
    char error[512];
};

static bool note(void *user, const tandem_event *event) {
    (void)user;
    struct outcome *o = event->user;
    if (event->kind == TANDEM_EVENT_TOKEN) o->n++;
    if (event->kind != TANDEM_EVENT_DONE) return true;
    o->hash = event->logits_hash;
    o->finish = event->finish;
    o->n_cached = event->n_cached;
    if (event->error) snprintf(o->error, sizeof o->error, "%s", event->error);
    return true;
}

static void submit(tandem_engine *e, size_t n, int salt, size_t where, struct outcome *o) {
    int32_t ids[128];
    for (size_t i = 0; i < n; i++) ids[i] = i == where ? POISON : (int32_t)(20 + (i * 31 + (size_t)salt * 57) % 500);
    tandem_sampling sampling = {.top_p = 1, .repeat_penalty = 1};
    tandem_request_options options = {
        .prompt = ids, .n_prompt = n, .max_tokens = STEPS, .sampling = &sampling, .n = 1, .hash = true, .user = o};
    uint64_t id;
    if (tandem_submit(e, &options, &id, err, sizeof err) != TANDEM_OK) fail_msg("%s", err);
}

static void run_all(tandem_engine *e) {
    for (int i = 0; i < 1000 && tandem_step(e, note, NULL) == TANDEM_OK; i++) continue;
}

static void requests_fail_alone(void **state) {
    (void)state;
    tandem_engine *e = open_engine("synthetic:tiny-qwen3:f32", "on");
    poison(&e->model->layers[1].w_up, 5);
    struct outcome expected = {0}, good = {0}, bad = {0}, again = {0};
    submit(e, 70, 1, SIZE_MAX, &expected);
    run_all(e);
    assert_int_equal(expected.n, STEPS);
    submit(e, 70, 2, 50, &bad);
    submit(e, 70, 1, SIZE_MAX, &good);
    run_all(e);
    assert_int_equal(bad.finish, TANDEM_FINISH_ERROR);
    assert_int_equal(bad.n, 0);
    if (!strstr(bad.error, "(the up projection) produced the first in layer 1 at position 50"))
        fail_msg("%s", bad.error);
    assert_true(good.n == STEPS && good.hash == expected.hash && good.n_cached > 0);
    submit(e, 70, 2, 50, &again);
    run_all(e);
    assert_int_equal(again.n_cached, 0);
    assert_string_equal(again.error, bad.error);
    tandem_close(e);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_the_layer_and_the_position),
        cmocka_unit_test(names_every_kind_of_op),
        cmocka_unit_test(tells_a_fused_op_from_its_primitives),
        cmocka_unit_test(neighbours_go_on),
        cmocka_unit_test(requests_fail_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
