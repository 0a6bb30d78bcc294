// test_session.c: sessions on tandem-tiny: however a prompt arrives, alone or in company, the tokens and bits are the
// same.
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/engine.h"

static tandem_engine *engine;
static char err[1024];

static int set_up(void **state) {
    (void)state;
    tandem_options options = {
        .model = "models/tandem-tiny", .context = 256, .kv_tokens = 2048, .chunk = 16, .max_batch = 6};
    engine = tandem_open(&options, err, sizeof err);
    if (!engine) print_error("%s\n", err);
    return engine ? 0 : 1;
}

static int tear_down(void **state) {
    (void)state;
    bool whole = engine->pages.n_free == engine->pages.n_pages; // no page leaked by any test
    tandem_close(engine);
    return whole ? 0 : 1;
}

// A prompt of n ids that is different for every salt.
static void make_prompt(int32_t *ids, size_t n, int salt) {
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)((i * 131 + (size_t)salt * 977 + 17) % 8000);
}

static tandem_session *open_session(void) {
    tandem_sampling sampling = tandem_sampling_default(engine, true);
    sampling.seed = 3;
    sampling.ignore_end = true;
    tandem_session *s = tandem_session_new(engine, &sampling, err, sizeof err);
    assert_non_null(s);
    return s;
}

static void generate(tandem_session *s, size_t n, int32_t *out) {
    for (size_t i = 0; i < n; i++) {
        tandem_token token;
        assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_OK);
        out[i] = token.id;
    }
}

enum { MOST = 12 };

static uint64_t alone(int salt, size_t n_prompt, int32_t *out) {
    int32_t ids[256];
    make_prompt(ids, n_prompt, salt);
    tandem_session *s = open_session();
    assert_int_equal(tandem_session_append(s, ids, n_prompt, err, sizeof err), TANDEM_OK);
    generate(s, MOST, out);
    uint64_t hash = s->hash;
    tandem_session_free(s);
    return hash;
}

static void pieces_do_not_matter(void **state) {
    (void)state;
    int32_t ids[256], whole[MOST], pieces[MOST];
    uint64_t hash = alone(1, 77, whole);
    make_prompt(ids, 77, 1);
    tandem_session *s = open_session();
    for (size_t at = 0; at < 77;) {
        size_t n = 77 - at < 1 + at % 9 ? 77 - at : 1 + at % 9;
        assert_int_equal(tandem_session_append(s, ids + at, n, err, sizeof err), TANDEM_OK);
        at += n;
    }
    generate(s, MOST, pieces);
    assert_memory_equal(whole, pieces, sizeof whole);
    assert_true(hash == s->hash);
    tandem_session_free(s);
}

// Several sessions of different lengths, joining and leaving between steps.
static void company_does_not_matter(void **state) {
    (void)state;
    enum { GROUP = 5 };
    static const size_t lengths[GROUP] = {1, 31, 32, 33, 100};
    tandem_session *sessions[GROUP];
    int32_t expected[GROUP][MOST], got[GROUP][MOST];
    uint64_t hashes[GROUP];
    for (int i = 0; i < GROUP; i++) {
        int32_t ids[256];
        hashes[i] = alone(i, lengths[i], expected[i]);
        make_prompt(ids, lengths[i], i);
        sessions[i] = open_session();
        assert_int_equal(tandem_session_append(sessions[i], ids, lengths[i], err, sizeof err), TANDEM_OK);
    }
    int made[GROUP] = {0};
    for (int step = 0; step < MOST + GROUP; step++) { // session i takes part in steps i .. i + MOST - 1
        tandem_session *now[GROUP];
        int who[GROUP], status[GROUP];
        tandem_token tokens[GROUP];
        size_t n = 0;
        for (int i = 0; i < GROUP; i++)
            if (step >= i && step < i + MOST) who[n] = i, now[n++] = sessions[i];
        if (n == 0) continue;
        assert_int_equal(tandem_next_many(now, n, tokens, status, err, sizeof err), TANDEM_OK);
        for (size_t k = 0; k < n; k++) {
            assert_int_equal(status[k], TANDEM_OK);
            got[who[k]][made[who[k]]++] = tokens[k].id;
        }
    }
    for (int i = 0; i < GROUP; i++) {
        assert_memory_equal(got[i], expected[i], sizeof expected[i]);
        assert_true(sessions[i]->hash == hashes[i]);
        tandem_session_free(sessions[i]);
    }
}

static void set_reuses_the_common_prefix(void **state) {
    (void)state;
    int32_t ids[256], cold[MOST], warm[MOST];
    size_t reused;
    make_prompt(ids, 120, 4);
    tandem_session *s = open_session();
    assert_int_equal(tandem_session_set(s, ids, 100, &reused, err, sizeof err), TANDEM_OK);
    assert_int_equal(reused, 0);
    generate(s, 5, warm);
    assert_int_equal(tandem_session_set(s, ids, 120, &reused, err, sizeof err), TANDEM_OK);
    assert_int_equal(reused, 100);
    s->hash = 0;
    generate(s, MOST, warm);
    uint64_t hash = alone(4, 120, cold);
    assert_memory_equal(cold, warm, sizeof cold);
    assert_true(hash == s->hash);
    ids[40] ^= 1; // an edit in the middle: what follows is computed again
    assert_int_equal(tandem_session_set(s, ids, 120, &reused, err, sizeof err), TANDEM_OK);
    assert_int_equal(reused, 40);
    tandem_session_free(s);
}

static void forks_share_until_they_part(void **state) {
    (void)state;
    int32_t ids[256], expected[MOST], a[MOST], b[MOST];
    make_prompt(ids, 45, 5);
    alone(5, 45, expected);
    tandem_session *s = open_session();
    assert_int_equal(tandem_session_append(s, ids, 45, err, sizeof err), TANDEM_OK);
    generate(s, 4, a);
    size_t used = engine->pages.n_free;
    tandem_session *fork = tandem_session_fork(s, err, sizeof err);
    assert_non_null(fork);
    assert_int_equal(engine->pages.n_free, used); // nothing was copied
    generate(s, MOST - 4, a + 4);
    generate(fork, MOST - 4, b + 4);
    memcpy(b, a, 4 * sizeof *a);
    assert_memory_equal(a, expected, sizeof a);
    assert_memory_equal(b, expected, sizeof b);
    tandem_session_free(s);
    generate(fork, 3, a); // outlives its origin
    tandem_session_free(fork);
}

static void truncate_goes_back(void **state) {
    (void)state;
    int32_t ids[256], expected[MOST], got[MOST];
    make_prompt(ids, 64, 6);
    alone(6, 64, expected);
    tandem_session *s = open_session();
    assert_int_equal(tandem_session_append(s, ids, 64, err, sizeof err), TANDEM_OK);
    generate(s, MOST, got);
    assert_int_equal(tandem_session_truncate(s, 64, err, sizeof err), TANDEM_OK);
    generate(s, MOST, got);
    assert_memory_equal(got, expected, sizeof got);
    assert_int_equal(tandem_session_truncate(s, 1000, err, sizeof err), TANDEM_ERROR);
    assert_non_null(strstr(err, "1000"));
    tandem_session_free(s);
}

static void limits_are_errors_that_lose_nothing(void **state) {
    (void)state;
    int32_t ids[300];
    tandem_token token;
    make_prompt(ids, 300, 7);
    tandem_session *s = open_session();
    assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_ERROR); // empty
    assert_int_equal(tandem_session_append(s, ids, 257, err, sizeof err), TANDEM_ERROR);
    assert_non_null(strstr(err, "257"));
    ids[3] = 8192;
    assert_int_equal(tandem_session_append(s, ids, 10, err, sizeof err), TANDEM_ERROR);
    assert_non_null(strstr(err, "8192"));
    ids[3] = -1;
    assert_int_equal(tandem_session_append(s, ids, 10, err, sizeof err), TANDEM_ERROR);
    ids[3] = 0;
    assert_int_equal(tandem_session_append(s, ids, 255, err, sizeof err), TANDEM_OK);
    assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_OK);
    assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_FULL);
    size_t n;
    tandem_session_ids(s, &n);
    assert_int_equal(n, 256);
    int status;
    tandem_session *twice[] = {s, s};
    assert_int_equal(tandem_next_many(twice, 2, &token, &status, err, sizeof err), TANDEM_ERROR);
    tandem_session_free(s);
}

static void cancel_is_one_step(void **state) {
    (void)state;
    int32_t ids[256], rest[MOST], expected[MOST];
    tandem_token token;
    make_prompt(ids, 60, 8);
    alone(8, 60, expected);
    tandem_session *s = open_session();
    assert_int_equal(tandem_session_append(s, ids, 60, err, sizeof err), TANDEM_OK);
    tandem_session_cancel(s);
    assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_CANCELLED);
    generate(s, MOST, rest); // goes on as if nothing had happened
    assert_memory_equal(rest, expected, sizeof rest);
    tandem_session_free(s);
}

static void nan_is_never_sampled(void **state) {
    (void)state;
    int32_t ids[256];
    tandem_token token;
    make_prompt(ids, 40, 9);
    tandem_session *s = open_session(), *other = open_session();
    assert_int_equal(tandem_session_append(s, ids, 40, err, sizeof err), TANDEM_OK);
    assert_int_equal(tandem_session_append(other, ids, 40, err, sizeof err), TANDEM_OK);
    assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_OK);
    memset((unsigned char *)engine->kv.layers[0].v + (size_t)s->kv.pages[0] * 2 * 32 * 128 * 2, 0xFF, 256); // bf16 NaN
    assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_ERROR);
    assert_non_null(strstr(err, "NaN"));
    assert_int_equal(s->kv.n_kv, 0);
    assert_int_equal(tandem_session_next(other, &token, err, sizeof err), TANDEM_OK);
    tandem_session_free(s);
    tandem_session_free(other);
}

static void *worker(void *arg) {
    int32_t *out = arg;
    alone(11, 50, out);
    return NULL;
}

static void calls_from_many_threads_take_turns(void **state) {
    (void)state;
    pthread_t threads[4];
    int32_t out[4][MOST];
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&threads[i], NULL, worker, out[i]), 0);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    for (int i = 1; i < 4; i++) assert_memory_equal(out[0], out[i], sizeof out[0]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pieces_do_not_matter),
        cmocka_unit_test(company_does_not_matter),
        cmocka_unit_test(set_reuses_the_common_prefix),
        cmocka_unit_test(forks_share_until_they_part),
        cmocka_unit_test(truncate_goes_back),
        cmocka_unit_test(limits_are_errors_that_lose_nothing),
        cmocka_unit_test(cancel_is_one_step),
        cmocka_unit_test(nan_is_never_sampled),
        cmocka_unit_test(calls_from_many_threads_take_turns),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
