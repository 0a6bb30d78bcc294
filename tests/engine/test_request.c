// test_request.c: requests on tandem-tiny: alone, in company, chunked, preempted, from the cache or forked, the tokens,
// log-probabilities and logits are the same bits; and every request ends.
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/engine.h"

enum { CONTEXT = 256, MOST = 40 };

static char err[1024];

static tandem_engine *open_engine(size_t kv_tokens, size_t chunk, size_t batch) {
    tandem_options options = {.model = "models/tandem-tiny",
                              .context = CONTEXT,
                              .kv_tokens = kv_tokens,
                              .chunk = chunk,
                              .max_batch = batch,
                              .max_queue = 50};
    tandem_engine *e = tandem_open(&options, err, sizeof err);
    if (!e) fail_msg("%s", err);
    return e;
}

static void close_engine(tandem_engine *e) {
    struct error why = {0};
    if (!kv_check(&e->pages, &why)) fail_msg("%s", why.text);
    assert_int_equal(kv_available(&e->pages), e->pages.n_pages);
    tandem_close(e);
}

// A prompt of n ids; prompts of one family are equal in their first `same` ids.
static void make_prompt(int32_t *ids, size_t n, int family, size_t same, int salt) {
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)((i * 131 + (size_t)family * 977 + (i < same ? 0 : (size_t)salt * 7919) + 17) % 8000);
}

// What came of one choice.
struct result {
    int32_t ids[MOST];
    float logprobs[MOST], top[MOST];
    float prompt[CONTEXT];
    size_t n, n_prompt_told, n_cached, n_done, stop_after;
    enum tandem_finish finish;
    char error[256];
    uint64_t hash;
};

static bool note(void *user, const tandem_event *event) {
    (void)user;
    struct result *r = (struct result *)event->user + event->choice;
    if (event->kind == TANDEM_EVENT_PROMPT) {
        assert_int_equal(event->position, ++r->n_prompt_told);
        r->prompt[event->position] = event->token.logprob;
    } else if (event->kind == TANDEM_EVENT_TOKEN) {
        assert_true(r->n < MOST);
        r->ids[r->n] = event->token.id;
        r->logprobs[r->n] = event->token.logprob;
        r->top[r->n++] = event->n_top ? event->top[event->n_top - 1].logprob : 0;
        return r->stop_after == 0 || r->n < r->stop_after;
    } else if (event->kind == TANDEM_EVENT_DONE) {
        r->n_done++;
        r->finish = event->finish;
        r->hash = event->logits_hash;
        r->n_cached = event->n_cached;
        if (event->error) strncpy(r->error, event->error, sizeof r->error - 1);
    }
    return true;
}

static tandem_sampling sampling_of(const tandem_engine *e) {
    tandem_sampling s = tandem_sampling_default(e, true);
    s.seed = 11;
    s.ignore_end = true;
    return s;
}

static uint64_t submit(tandem_engine *e, const int32_t *ids, size_t n_ids, size_t n_tokens, size_t n,
                       struct result *r) {
    tandem_sampling sampling = sampling_of(e);
    uint64_t id = 0;
    tandem_request_options o = {.prompt = ids,
                                .n_prompt = n_ids,
                                .max_tokens = n_tokens,
                                .sampling = &sampling,
                                .n = n,
                                .logprobs = true,
                                .n_top = 2,
                                .hash = true,
                                .user = r};
    if (tandem_submit(e, &o, &id, err, sizeof err) != TANDEM_OK) fail_msg("%s", err);
    return id;
}

static void run_all(tandem_engine *e) {
    int steps = 0;
    while (tandem_step(e, note, NULL) == TANDEM_OK) assert_true(++steps < 100000);
}

static void assert_same(const struct result *a, const struct result *b) {
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->ids, b->ids, a->n * sizeof *a->ids);
    assert_memory_equal(a->logprobs, b->logprobs, a->n * sizeof *a->logprobs);
    assert_memory_equal(a->top, b->top, a->n * sizeof *a->top);
    assert_true(a->hash == b->hash && a->n > 0);
}

// Sixteen prompts alone on a session, then together as requests, on engines whose chunks, places and KV force every way
// of being computed.
static void company_chunks_preemption_and_cache_change_no_bit(void **state) {
    (void)state;
    enum { N = 10, TOKENS = 12 };
    static struct result alone[N], got[N], again[N];
    static int32_t ids[N][CONTEXT];
    size_t length[N];
    memset(alone, 0, sizeof alone);
    tandem_engine *e = open_engine(4096, 256, 8);
    for (int i = 0; i < N; i++) {
        length[i] = (size_t)(1 + i * 13 % 90);
        make_prompt(ids[i], length[i], i % 3, 64, i);
        tandem_sampling sampling = sampling_of(e);
        tandem_session *s = tandem_session_new(e, &sampling, err, sizeof err);
        assert_int_equal(tandem_session_append(s, ids[i], length[i], err, sizeof err), TANDEM_OK);
        for (int k = 0; k < TOKENS; k++) {
            tandem_token token, top[2];
            assert_int_equal(tandem_session_next(s, &token, err, sizeof err), TANDEM_OK);
            logits_top(s->last_logits, 8192, top, 2);
            alone[i].ids[k] = token.id;
            alone[i].logprobs[k] = token.logprob;
            alone[i].top[k] = top[1].logprob;
        }
        alone[i].n = TOKENS;
        alone[i].hash = s->hash;
        tandem_session_free(s);
    }
    close_engine(e);
    static const size_t shapes[][3] = {{4096, 256, 16}, {4096, 7, 5}, {256, 32, 10}};
    uint64_t preemptions = 0;
    for (size_t k = 0; k < sizeof shapes / sizeof shapes[0]; k++) {
        e = open_engine(shapes[k][0], shapes[k][1], shapes[k][2]);
        memset(got, 0, sizeof got);
        memset(again, 0, sizeof again);
        for (int i = 0; i < N; i++) {
            submit(e, ids[i], length[i], TOKENS, 1, &got[i]);
            if (i % 3 == 0) tandem_step(e, note, NULL); // some come later
        }
        run_all(e);
        for (int i = 0; i < N; i++) submit(e, ids[i], length[i], TOKENS, 1, &again[i]);
        run_all(e);
        size_t cached = 0;
        for (int i = 0; i < N; i++) {
            assert_same(&alone[i], &got[i]);
            assert_same(&alone[i], &again[i]);
            assert_int_equal(got[i].n_done + again[i].n_done, 2);
            cached += again[i].n_cached;
        }
        assert_true(cached > 0);
        preemptions += tandem_statistics(e).n_preemptions;
        close_engine(e);
    }
    assert_true(preemptions > 0);
}

// A step takes as many tokens of prompts as `chunk` says, which is more than one sequence may hold.
static void a_step_takes_several_whole_prompts(void **state) {
    (void)state;
    enum { N = 4, LENGTH = 200 };
    static struct result got[N];
    int32_t ids[LENGTH];
    memset(got, 0, sizeof got);
    tandem_engine *e = open_engine(2048, N * LENGTH, 8);
    for (int i = 0; i < N; i++) {
        make_prompt(ids, LENGTH, i, 0, i);
        submit(e, ids, LENGTH, 2, 1, &got[i]);
    }
    tandem_step(e, note, NULL);
    for (int i = 0; i < N; i++) assert_int_equal(got[i].n, 1);
    run_all(e);
    close_engine(e);
}

static void choices_share_the_prompt(void **state) {
    (void)state;
    tandem_engine *e = open_engine(2048, 64, 8);
    static struct result group[4], single[1], other[4];
    int32_t ids[CONTEXT];
    memset(group, 0, sizeof group);
    memset(single, 0, sizeof single);
    memset(other, 0, sizeof other);
    make_prompt(ids, 77, 1, 0, 1);
    submit(e, ids, 77, 20, 4, group);
    while (group[3].n == 0) tandem_step(e, note, NULL);
    assert_true(tandem_statistics(e).kv_pages_used <= 2 + 4); // two full pages for all, and the last one for each
    run_all(e);
    submit(e, ids, 77, 20, 1, single);
    run_all(e);
    assert_same(&group[0], &single[0]);
    for (int i = 1; i < 4; i++) {
        assert_int_equal(group[i].n, 20);
        assert_memory_not_equal(group[0].ids, group[i].ids, 20 * sizeof *ids); // a seed of its own
    }
    submit(e, ids, 77, 20, 4, other);
    run_all(e);
    for (int i = 0; i < 4; i++) assert_same(&group[i], &other[i]);
    close_engine(e);
}

static void tells_the_prompts_log_probabilities(void **state) {
    (void)state;
    static struct result r[2];
    int32_t ids[CONTEXT];
    tandem_engine *e = open_engine(2048, 16, 4);
    make_prompt(ids, 90, 2, 0, 1);
    memset(r, 0, sizeof r);
    submit(e, ids, 90, 1, 1, &r[1]); // fills the cache, which must not be used
    run_all(e);
    memset(r, 0, sizeof r);
    submit(e, ids, 50, 20, 1, &r[1]); // company
    tandem_request_options o = {
        .prompt = ids, .n_prompt = 90, .prompt_only = true, .prompt_logprobs = true, .user = &r[0]};
    assert_int_equal(tandem_submit(e, &o, NULL, err, sizeof err), TANDEM_OK);
    run_all(e);
    assert_int_equal(r[0].n_prompt_told, 89);
    assert_int_equal(r[0].n, 0);
    assert_int_equal(r[0].finish, TANDEM_FINISH_LENGTH);
    assert_int_equal(r[0].n_cached, 0);
    tandem_session *s = tandem_session_new(e, NULL, err, sizeof err);
    for (size_t i = 1; i < 90; i += 11) { // as a session has them
        tandem_token token;
        assert_int_equal(tandem_session_set(s, ids, i, NULL, err, sizeof err), TANDEM_OK);
        assert_true(tandem_session_next(s, &token, err, sizeof err) >= 0);
        float expected = logits_logprob(s->last_logits, 8192, ids[i]);
        assert_memory_equal(&expected, &r[0].prompt[i], sizeof expected);
    }
    tandem_session_free(s);
    close_engine(e);
}

static void every_request_ends_in_one_way(void **state) {
    (void)state;
    static struct result r[6];
    int32_t ids[CONTEXT];
    tandem_engine *e = open_engine(512, 32, 4);
    memset(r, 0, sizeof r);
    make_prompt(ids, CONTEXT, 1, 0, 1);
    uint64_t waiting, running;
    running = submit(e, ids, 10, 30, 1, &r[0]);
    r[1].stop_after = 3; // the callback says stop
    submit(e, ids, 10, 30, 1, &r[1]);
    submit(e, ids, CONTEXT - 3, 30, 1, &r[2]); // runs into the end of the context
    submit(e, ids, CONTEXT, 30, 1, &r[3]);     // there is no room for a reply
    for (int i = 0; i < 3; i++) tandem_step(e, note, NULL);
    waiting = submit(e, ids, 10, 30, 2, &r[4]);
    tandem_cancel(e, running);
    tandem_cancel(e, waiting);
    tandem_cancel(e, 4711);
    size_t n = r[0].n;
    tandem_step(e, note, NULL);
    assert_int_equal(r[0].n, n); // within one step
    run_all(e);
    assert_int_equal(r[0].finish, TANDEM_FINISH_CANCELLED);
    assert_int_equal(r[4].finish, TANDEM_FINISH_CANCELLED);
    assert_int_equal(r[5].finish, TANDEM_FINISH_CANCELLED);
    assert_int_equal(r[1].finish, TANDEM_FINISH_END);
    assert_int_equal(r[1].n, 3);
    assert_int_equal(r[2].finish, TANDEM_FINISH_LENGTH);
    assert_int_equal(r[2].n, 3);
    assert_int_equal(r[3].finish, TANDEM_FINISH_LENGTH);
    assert_int_equal(r[3].n, 0);
    for (int i = 0; i < 6; i++) assert_int_equal(r[i].n_done, 1);
    assert_int_equal(tandem_step(e, note, NULL), TANDEM_END);
    assert_false(tandem_wait(e, 0.01));
    // Closing with requests under way leaks nothing (the sanitizers look).
    submit(e, ids, 10, 30, 2, &r[4]);
    tandem_step(e, note, NULL);
    submit(e, ids, 10, 30, 1, &r[0]);
    tandem_close(e);
}

static void refuses_what_is_wrong(void **state) {
    (void)state;
    tandem_engine *e = open_engine(512, 32, 4);
    int32_t ids[CONTEXT + 1] = {0};
    tandem_sampling hot = tandem_sampling_default(e, true);
    hot.temperature = -1;
    const struct {
        tandem_request_options o;
        const char *says;
    } cases[] = {
        {{.prompt = ids, .n_prompt = 0}, "empty"},
        {{.prompt = ids, .n_prompt = CONTEXT + 1}, "257"},
        {{.prompt = (const int32_t[]){1, 8192}, .n_prompt = 2}, "8192"},
        {{.prompt = (const int32_t[]){-1}, .n_prompt = 1}, "-1"},
        {{.prompt = ids, .n_prompt = 1, .n = 5}, "n: expected 1 to 4"},
        {{.prompt = ids, .n_prompt = 1, .n_top = 101}, "n_top"},
        {{.prompt = ids, .n_prompt = 1, .priority = 2}, "priority"},
        {{.prompt = ids, .n_prompt = 1, .tenant = UINT64_MAX}, "tenant"},
        {{.prompt = ids, .n_prompt = 1, .sampling = &hot}, "temperature"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_int_equal(tandem_submit(e, &cases[i].o, NULL, err, sizeof err), TANDEM_ERROR);
        assert_non_null(strstr(err, cases[i].says));
    }
    struct result r = {0};
    for (int i = 0; i < 50; i++) submit(e, ids, 1, 1, 1, &r);
    tandem_request_options more = {.prompt = ids, .n_prompt = 1, .user = &r};
    assert_int_equal(tandem_submit(e, &more, NULL, err, sizeof err), TANDEM_BUSY);
    assert_non_null(strstr(err, "limit 50"));
    // Sessions that hold the KV fail a request by name; they themselves take cached pages.
    tandem_session *s[2];
    for (int i = 0; i < 2; i++) {
        tandem_token token;
        s[i] = tandem_session_new(e, NULL, err, sizeof err);
        assert_int_equal(tandem_session_append(s[i], ids, CONTEXT - 1, err, sizeof err), TANDEM_OK);
        assert_true(tandem_session_next(s[i], &token, err, sizeof err) >= 0);
    }
    tandem_step(e, note, NULL);
    run_all(e);
    assert_int_equal(r.n_done, 50);
    assert_int_equal(r.finish, TANDEM_FINISH_ERROR);
    assert_non_null(strstr(r.error, "no free KV page"));
    tandem_session_free(s[0]);
    tandem_session_free(s[1]);
    close_engine(e);
}

enum { MASKED = 4 };

// A choice's own bits: the other choices' stay as they are.
static const uint32_t *allow_one(void *user, size_t choice) {
    static uint32_t bits[MASKED][8192 / 32];
    struct result *r = (struct result *)user + choice;
    memset(bits[choice], 0, sizeof bits[choice]);
    size_t id = 100 * (choice + 1) + r->n;
    bits[choice][id / 32] = (uint32_t)1 << id % 32;
    return bits[choice];
}

static void a_mask_binds(void **state) {
    (void)state;
    static struct result r[MASKED];
    memset(r, 0, sizeof r);
    tandem_engine *e = open_engine(512, 32, MASKED);
    tandem_request_options o = {
        .prompt = (const int32_t[]){5, 6}, .n_prompt = 2, .max_tokens = 9, .n = MASKED, .user = r, .mask = allow_one};
    assert_int_equal(tandem_submit(e, &o, NULL, err, sizeof err), TANDEM_OK);
    run_all(e);
    for (int c = 0; c < MASKED; c++)
        for (int i = 0; i < 9; i++) assert_int_equal(r[c].ids[i], 100 * (c + 1) + i);
    close_engine(e);
}

// Four threads submit and cancel while one steps.
struct crowd {
    tandem_engine *engine;
    struct result results[100];
};

static void *submit_many(void *user) {
    struct crowd *c = user;
    int32_t ids[40];
    make_prompt(ids, 40, 1, 20, (int)((uintptr_t)user % 7));
    for (int i = 0; i < 100; i++) {
        tandem_request_options o = {.prompt = ids,
                                    .n_prompt = (size_t)(1 + i % 40),
                                    .max_tokens = (size_t)(1 + i % 5),
                                    .n = (size_t)(1 + i % 2),
                                    .user = &c->results[i]};
        uint64_t id;
        char text[256];
        if (o.n > 1) o.user = &c->results[i & ~1]; // two slots
        if (o.n > 1 && i + 1 >= 100) break;
        int status = tandem_submit(c->engine, &o, &id, text, sizeof text);
        if (status == TANDEM_BUSY) {
            tandem_statistics(c->engine);
            continue;
        }
        if (i % 4 == 3) tandem_cancel(c->engine, id);
    }
    return NULL;
}

static bool count_done(void *user, const tandem_event *event) {
    if (event->kind == TANDEM_EVENT_DONE) ++*(size_t *)user;
    return true;
}

static void threads_may_submit_and_cancel(void **state) {
    (void)state;
    static struct crowd crowds[4];
    pthread_t threads[4];
    size_t n_done = 0;
    tandem_engine *e = open_engine(512, 32, 8);
    for (int i = 0; i < 4; i++) {
        crowds[i].engine = e;
        assert_int_equal(pthread_create(&threads[i], NULL, submit_many, &crowds[i]), 0);
    }
    for (int i = 0; i < 200 || tandem_wait(e, 0); i++) {
        tandem_wait(e, 0.001);
        tandem_step(e, count_done, &n_done);
    }
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    while (tandem_step(e, count_done, &n_done) == TANDEM_OK) {
    }
    assert_true(n_done > 50);
    close_engine(e);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(company_chunks_preemption_and_cache_change_no_bit),
                                       cmocka_unit_test(a_step_takes_several_whole_prompts),
                                       cmocka_unit_test(choices_share_the_prompt),
                                       cmocka_unit_test(tells_the_prompts_log_probabilities),
                                       cmocka_unit_test(every_request_ends_in_one_way),
                                       cmocka_unit_test(refuses_what_is_wrong),
                                       cmocka_unit_test(a_mask_binds),
                                       cmocka_unit_test(threads_may_submit_and_cancel)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
