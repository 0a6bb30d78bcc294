// test_steps.c: requests on the emulated GPU, whose steps are queued before the tokens of the step before are known:
// the same tokens as with the host's sampler, which makes every step wait; whatever ends in the meantime, is preempted,
// stopped or cancelled.
#include "emulator.h"

#include "engine/engine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 9, MOST = 16, PAGES = 5 };

static char err[1024];

struct result {
    int32_t ids[MOST];
    size_t n, n_done, stop_after, n_generated;
    enum tandem_finish finish;
    char error[256];
};

static bool note(void *user, const tandem_event *event) {
    struct result *r = (struct result *)event->user + event->choice;
    assert_int_equal(r->n_done, 0);
    assert_ptr_equal(user, NULL);
    if (event->kind == TANDEM_EVENT_TOKEN) {
        assert_true(r->n < MOST && event->token.id >= 0);
        r->ids[r->n++] = event->token.id;
        assert_int_equal(event->n_generated, r->n);
        assert_int_equal(event->position, event->n_prompt + r->n - 1);
        return r->stop_after == 0 || r->n < r->stop_after;
    }
    if (event->kind == TANDEM_EVENT_DONE) {
        r->n_done++;
        r->finish = event->finish;
        r->n_generated = event->n_generated;
        if (event->error) snprintf(r->error, sizeof r->error, "%s", event->error);
    }
    return true;
}

static tandem_engine *open_engine(size_t kv_tokens, size_t chunk, size_t batch, uint64_t seed) {
    emulator_set(&(struct emulator_options){.seed = seed, .n_sms = 8});
    tandem_options o = {.model = "synthetic:tiny-qwen3",
                        .device = "cuda",
                        .threads = 1,
                        .context = 64,
                        .kv_tokens = kv_tokens,
                        .chunk = chunk,
                        .max_batch = batch};
    tandem_engine *e = tandem_open(&o, err, sizeof err);
    if (!e) fail_msg("%s", err);
    return e;
}

static void close_engine(tandem_engine *e) {
    struct error why = {0};
    if (!kv_check(&e->pages, &why)) fail_msg("%s", why.text);
    assert_int_equal(kv_available(&e->pages), e->pages.n_pages);
    tandem_close(e);
}

// Of every kind that a device chooses.
static tandem_sampling sampling_of(int i) {
    tandem_sampling s = {.temperature = 0.9, .top_p = 1, .repeat_penalty = 1, .seed = (uint64_t)(100 + i)};
    if (i % 5 == 1) s.temperature = 0;
    if (i % 5 == 2) s.top_k = 20, s.top_p = 0.9;
    if (i % 5 == 3) s.min_p = 0.2;
    if (i % 5 == 4) s.top_p = 0.6;
    s.ignore_end = i % 2;
    return s;
}

static uint64_t submit(tandem_engine *e, int i, bool on_host, struct result *r) {
    int32_t ids[40];
    size_t n = (size_t)(29 + i * 7 % 3);
    for (size_t k = 0; k < n; k++) ids[k] = (int32_t)((k * 31 + (size_t)(i % 3) * 97 + (k < 8 ? 0 : (size_t)i)) % 640);
    tandem_sampling s = sampling_of(i);
    uint64_t id = 0;
    tandem_request_options o = {.prompt = ids,
                                .n_prompt = n,
                                .max_tokens = (size_t)(5 + i % 6),
                                .sampling = &s,
                                .n = i == 4 ? 2 : 1,
                                .hash = on_host, // its logits must be fetched
                                .user = r};
    r->stop_after = i == 3 ? 2 : 0;
    if (tandem_submit(e, &o, &id, err, sizeof err) != TANDEM_OK) fail_msg("%s", err);
    return id;
}

static size_t run_all(tandem_engine *e) {
    size_t steps = 0;
    while (tandem_step(e, note, NULL) == TANDEM_OK) assert_true(++steps < 1000);
    assert_int_equal(tandem_step(e, note, NULL), TANDEM_END);
    return steps;
}

// [i][0], and [4][1] for its second choice.
static void run_crowd(tandem_engine *e, bool on_host, struct result (*r)[2]) {
    memset(r, 0, N * sizeof *r);
    for (int i = 0; i < N; i++) {
        submit(e, i, on_host && i != 6, r[i]);
        if (i % 4 == 3) tandem_step(e, note, NULL); // some come later
    }
    run_all(e);
    for (int i = 0; i < N; i++) assert_int_equal(r[i][0].n_done, 1);
}

static void assert_same(struct result (*a)[2], struct result (*b)[2]) {
    for (int i = 0; i < N; i++)
        for (int k = 0; k < 2; k++) {
            assert_int_equal(a[i][k].n, b[i][k].n);
            assert_memory_equal(a[i][k].ids, b[i][k].ids, a[i][k].n * sizeof *a[i][k].ids);
            assert_int_equal(a[i][k].finish, b[i][k].finish);
            assert_int_equal(a[i][k].n_generated, b[i][k].n_generated);
        }
}

static void late_steps_change_no_token(void **state) {
    (void)state;
    static struct result host[N][2], late[N][2];
    tandem_engine *e = open_engine(512, 64, 5, 1);
    run_crowd(e, true, host);
    close_engine(e);
    assert_int_equal(host[3][0].n, 2);
    assert_int_equal(host[3][0].finish, TANDEM_FINISH_END);
    static const size_t shapes[][3] = {{512, 64, 5}, {PAGES * 32, 64, 4}};
    uint64_t preemptions = 0;
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        e = open_engine(shapes[k][0], shapes[k][1], shapes[k][2], 2 + k);
        for (int again = 0; again < 2 - (int)k; again++) { // the second time from the cache
            run_crowd(e, false, late);
            assert_same(host, late);
        }
        preemptions += tandem_statistics(e).n_preemptions;
        close_engine(e);
    }
    assert_true(preemptions > 0);
}

// In company of a request whose steps wait for the host, and with a session between the steps.
static void sessions_and_hosts_stand_between(void **state) {
    (void)state;
    static struct result alone[2], r[2];
    memset(alone, 0, sizeof alone);
    memset(r, 0, sizeof r);
    tandem_engine *e = open_engine(512, 64, 4, 7);
    submit(e, 5, false, &alone[0]);
    run_all(e);
    submit(e, 5, false, &r[0]);
    tandem_sampling s = sampling_of(0);
    tandem_session *session = tandem_session_new(e, &s, err, sizeof err);
    assert_int_equal(tandem_session_append(session, (const int32_t[]){4, 5}, 2, err, sizeof err), TANDEM_OK);
    for (int i = 0; i < 3; i++) {
        tandem_token token;
        assert_int_equal(tandem_step(e, note, NULL), TANDEM_OK);
        assert_true(tandem_session_next(session, &token, err, sizeof err) >= 0);
        if (i == 1) submit(e, 0, true, &r[1]);
    }
    run_all(e);
    tandem_session_free(session);
    assert_int_equal(r[0].n, alone[0].n);
    assert_memory_equal(r[0].ids, alone[0].ids, r[0].n * sizeof *r[0].ids);
    close_engine(e);
}

static void cancelled_under_way(void **state) {
    (void)state;
    static struct result r[3];
    memset(r, 0, sizeof r);
    tandem_engine *e = open_engine(512, 64, 4, 9);
    uint64_t id[2];
    for (int i = 0; i < 2; i++) id[i] = submit(e, 5 + 6 * i, false, &r[i]);
    for (int i = 0; i < 3; i++) tandem_step(e, note, NULL);
    size_t n = r[0].n;
    tandem_cancel(e, id[0]);
    tandem_step(e, note, NULL);
    assert_int_equal(r[0].n_done, 1);
    assert_int_equal(r[0].finish, TANDEM_FINISH_CANCELLED);
    assert_int_equal(r[0].n, n);
    tandem_cancel(e, id[1]); // the last one: nothing stays under way
    assert_int_equal(tandem_step(e, note, NULL), TANDEM_END);
    assert_int_equal(r[1].finish, TANDEM_FINISH_CANCELLED);
    close_engine(e);
    e = open_engine(512, 64, 4, 10); // closed in the middle of a step
    submit(e, 5, false, &r[2]);
    for (int i = 0; i < 2; i++) tandem_step(e, note, NULL);
    tandem_close(e);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(late_steps_change_no_token),
        cmocka_unit_test(sessions_and_hosts_stand_between),
        cmocka_unit_test(cancelled_under_way),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
