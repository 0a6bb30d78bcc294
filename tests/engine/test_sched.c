// test_sched.c: the scheduler without a model: 100,000 requests with random lengths, prefixes, tenants, priorities,
// forks and cancellations, held to the books at every step.
//
// Every page carries a "content": for each slot a number that stands for the token and all tokens in front of it, which
// a simulated step writes and reads back as attention would. A page lost, shared wrongly or not copied shows there.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/sched.h"

enum { PAGE = 4, N_PAGES = 160, RUNNING = 12, STEP = 40, LENGTH = 200, MOST_FORKS = 3, N_TENANTS = 6 };

struct request {
    struct sched_seq seq;
    size_t n_reply; // tokens to generate
    int32_t ids[LENGTH], pages[LENGTH / PAGE + 1];
    bool used;
};

struct simulation {
    struct kv_pool pool;
    struct sched sched;
    uint64_t content[N_PAGES][PAGE];
    struct request *requests;
    size_t n_requests;
    struct sched_share shares[RUNNING];
    struct kv_copy copies[RUNNING];
    uint64_t rng;
    size_t n_done, n_cancelled, n_rejected, n_stuck, n_forked, n_reused, n_submitted;
};

static uint64_t draw(struct simulation *m, uint64_t below) {
    m->rng ^= m->rng << 13;
    m->rng ^= m->rng >> 7;
    m->rng ^= m->rng << 17;
    return m->rng % below;
}

static void open_simulation(struct simulation *m, uint64_t seed, struct sched_options o, size_t n_pages) {
    memset(m, 0, sizeof *m);
    m->rng = seed * 0x9E3779B97F4A7C15u + 1;
    m->n_requests = 64;
    m->requests = calloc(m->n_requests, sizeof *m->requests);
    assert_non_null(m->requests);
    assert_true(kv_pool_create(&m->pool, n_pages, PAGE, seed, NULL));
    assert_true(sched_create(&m->sched, &m->pool, &o, NULL));
}

static void close_simulation(struct simulation *m) {
    struct error err = {0};
    if (!kv_check(&m->pool, &err)) fail_msg("%s", err.text);
    assert_int_equal(kv_available(&m->pool), m->pool.n_pages); // nothing leaked
    assert_int_equal(m->sched.n_running + m->sched.n_waiting + m->sched.promised_pages, 0);
    for (size_t i = 0; i < m->n_requests; i++) assert_false(m->requests[i].used);
    sched_free(&m->sched);
    kv_pool_free(&m->pool);
    free(m->requests);
}

static struct request *free_request(struct simulation *m) {
    for (size_t i = 0; i < m->n_requests; i++)
        if (!m->requests[i].used) return &m->requests[i];
    return NULL;
}

static bool submit(struct simulation *m, uint64_t tenant, int priority, size_t n_prompt, size_t n_reply, size_t n_forks,
                   int family) {
    struct request *r = free_request(m);
    if (!r) return false;
    memset(r, 0, sizeof *r);
    // Prompts of a family begin alike and part somewhere.
    size_t part = n_prompt ? draw(m, n_prompt) : 0;
    for (size_t i = 0; i < n_prompt; i++) r->ids[i] = (int32_t)(i < part ? (uint64_t)family * 1000 + i : draw(m, 3));
    r->seq = (struct sched_seq){.ids = r->ids,
                                .n_ids = n_prompt,
                                .n_prompt = n_prompt,
                                .n_limit = n_prompt + n_reply,
                                .priority = priority,
                                .n_forks = n_forks,
                                .wants_all = draw(m, 20) == 0,
                                .kv = {.pages = r->pages, .tenant = tenant}};
    r->n_reply = n_reply;
    struct error err = {0};
    enum sched_answer answer = sched_submit(&m->sched, &r->seq, &err);
    if (answer != SCHED_TAKEN) {
        assert_true(err.text[0] != 0);
        m->n_rejected++;
        return false;
    }
    r->used = true;
    m->n_submitted++;
    return true;
}

static uint64_t next_content(uint64_t before, int32_t id) {
    return (before ^ (uint64_t)(uint32_t)id) * 0x100000001B3u + 0x9E37;
}

// Writes what a step computes and reads everything in front of it.
static void run_step(struct simulation *m, const struct sched_step *step) {
    for (size_t i = 0; i < step->n_copies; i++)
        memcpy(m->content[step->copies[i].to], m->content[step->copies[i].from], sizeof m->content[0]);
    for (size_t i = 0; i < step->n_shares; i++) {
        const struct sched_seq *q = step->shares[i].seq;
        uint64_t value = q->kv.tenant * 77 + 1;
        for (size_t at = 0; at < q->kv.n_kv + step->shares[i].n; at++) {
            value = next_content(value, q->ids[at]);
            uint64_t *slot = &m->content[q->kv.pages[at / PAGE]][at % PAGE];
            if (at < q->kv.n_kv) assert_true(*slot == value);
            else *slot = value;
        }
    }
}

static void end_request(struct simulation *m, struct sched_seq *q, bool poisoned) {
    struct request *r = (struct request *)q; // seq is its first member
    sched_end(&m->sched, q, poisoned);
    assert_true(r->used);
    r->used = false;
}

// The forks, in `out`.
static size_t fork_all(struct simulation *m, struct request *from, struct request **out) {
    size_t n = 0;
    while (from->seq.n_forks > 0) {
        struct request *r = free_request(m);
        assert_non_null(r);
        memset(r, 0, sizeof *r);
        r->used = true;
        r->n_reply = 1 + draw(m, from->n_reply);
        memcpy(r->ids, from->ids, sizeof r->ids);
        r->seq = (struct sched_seq){.ids = r->ids,
                                    .n_ids = from->seq.n_ids,
                                    .n_prompt = from->seq.n_prompt,
                                    .n_limit = from->seq.n_limit,
                                    .priority = from->seq.priority,
                                    .kv = {.pages = r->pages, .tenant = from->seq.kv.tenant}};
        sched_fork(&m->sched, &from->seq, &r->seq);
        m->n_forked++;
        out[n++] = r;
    }
    return n;
}

// A sampled token, or the end.
static void advance(struct simulation *m, struct request *r) {
    if (r->seq.n_ids == r->seq.n_prompt && !r->seq.n_preempted) m->n_reused += r->seq.n_reused;
    if (draw(m, 400) == 0) { // NaN
        end_request(m, &r->seq, true);
        m->n_cancelled++;
        return;
    }
    r->seq.ids[r->seq.n_ids++] = (int32_t)draw(m, 3);
    if (r->seq.n_ids - r->seq.n_prompt < r->n_reply) return;
    end_request(m, &r->seq, false);
    m->n_done++;
}

// Plans, checks and runs one step. Returns its number of tokens.
static size_t one_step(struct simulation *m) {
    struct sched_step step = {.shares = m->shares, .copies = m->copies};
    struct sched_seq *stuck = NULL;
    struct error err = {0};
    sched_plan(&m->sched, &step, &stuck);
    if (stuck) {
        end_request(m, stuck, false);
        m->n_stuck++;
        return 0;
    }
    assert_true(step.n_tokens <= m->sched.options.step_tokens);
    assert_true(step.n_rows <= m->sched.options.step_rows);
    assert_true(step.n_shares <= m->sched.options.max_running);
    run_step(m, &step);
    sched_commit(&m->sched, &step);
    for (size_t i = 0; i < step.n_shares; i++) {
        struct request *r = (struct request *)step.shares[i].seq;
        if (r->seq.kv.n_kv < r->seq.n_ids) continue;
        assert_true(step.shares[i].n_rows > 0);
        struct request *forks[MOST_FORKS];
        size_t n = fork_all(m, r, forks);
        for (size_t k = 0; k < n; k++) advance(m, forks[k]);
        advance(m, r);
    }
    if (!sched_check(&m->sched, &err)) fail_msg("%s", err.text);
    return step.n_tokens;
}

static void run_out(struct simulation *m) {
    for (int i = 0; i < 1000000 && m->sched.n_running + m->sched.n_waiting > 0; i++) one_step(m);
    assert_int_equal(m->sched.n_running + m->sched.n_waiting, 0);
}

static const struct sched_options usual = {.max_running = RUNNING,
                                           .step_tokens = STEP,
                                           .step_rows = RUNNING + 4,
                                           .max_waiting = 30,
                                           .max_length = LENGTH,
                                           .overcommit = 300,
                                           .patience = 400};

static void a_hundred_thousand_requests(void **state) {
    (void)state;
    static struct simulation m;
    open_simulation(&m, 1, usual, N_PAGES);
    struct error err = {0};
    while (m.n_submitted < 100000) {
        size_t burst = draw(&m, 4);
        for (size_t i = 0; i < burst; i++) {
            size_t n_prompt = 1 + draw(&m, 1 + draw(&m, 150)), n_reply = 1 + draw(&m, 1 + draw(&m, 49));
            size_t forks = draw(&m, 12) == 0 ? 1 + draw(&m, MOST_FORKS) : 0;
            if (m.n_requests - RUNNING > m.sched.n_running + m.sched.n_waiting)
                submit(&m, draw(&m, N_TENANTS), (int)draw(&m, SCHED_PRIORITIES), n_prompt, n_reply, forks,
                       (int)draw(&m, 8));
        }
        if (draw(&m, 5) == 0) { // somebody hangs up
            struct request *r = &m.requests[draw(&m, m.n_requests)];
            if (r->used) {
                end_request(&m, &r->seq, draw(&m, 10) == 0);
                m.n_cancelled++;
            }
        }
        one_step(&m);
        if (m.sched.step % 64 == 0 && !kv_check(&m.pool, &err)) fail_msg("%s", err.text);
    }
    run_out(&m);
    assert_int_equal(m.n_done + m.n_cancelled, m.n_submitted + m.n_forked); // every request ended, in one way
    assert_int_equal(m.n_stuck, 0);
    // The run was worth something: all of it happened.
    assert_true(m.sched.n_preemptions > 1000 && m.n_forked > 1000 && m.n_cancelled > 1000 && m.n_reused > 100000);
    assert_true(m.pool.n_evicted > 10000);
    close_simulation(&m);
}

// Many short worlds with different shapes.
static void other_shapes(void **state) {
    (void)state;
    static struct simulation m;
    for (uint64_t seed = 1; seed <= 150; seed++) {
        struct sched_options o = usual;
        o.max_running = 1 + seed % RUNNING;
        o.step_tokens = o.max_running + seed * 7 % 29;
        o.step_rows = o.max_running + seed % 3;
        o.overcommit = 100 + (unsigned)(seed * 37 % 500);
        o.patience = seed % 50;
        open_simulation(&m, seed, o, LENGTH / PAGE + seed % 60);
        for (int i = 0; i < 300; i++) {
            if (draw(&m, 2) && m.n_requests - RUNNING > m.sched.n_running + m.sched.n_waiting)
                submit(&m, draw(&m, 3), (int)draw(&m, SCHED_PRIORITIES), 1 + draw(&m, 120), 1 + draw(&m, 60),
                       draw(&m, 3), (int)draw(&m, 3));
            one_step(&m);
        }
        run_out(&m);
        close_simulation(&m);
    }
}

static void with_the_worst_case_promised_nothing_is_preempted(void **state) {
    (void)state;
    static struct simulation m;
    struct sched_options o = usual;
    o.overcommit = 100;
    open_simulation(&m, 5, o, 100);
    for (int i = 0; i < 3000; i++) {
        if (m.n_requests - RUNNING > m.sched.n_running + m.sched.n_waiting)
            submit(&m, draw(&m, 3), 1, 1 + draw(&m, 100), 1 + draw(&m, 90), 0, (int)draw(&m, 3));
        one_step(&m);
    }
    run_out(&m);
    assert_int_equal(m.sched.n_preemptions, 0);
    close_simulation(&m);
}

static uint64_t served(const struct sched *s, uint64_t number) {
    for (size_t i = 0; i < s->n_tenants; i++)
        if (s->tenants[i]->number == number) return s->tenants[i]->served;
    return 0;
}

// One tenant with many long requests, one with short ones, both always waiting: each gets half, at every moment, but
// for what the places of one step can hold.
static void tenants_get_equal_shares(void **state) {
    (void)state;
    static struct simulation m;
    open_simulation(&m, 9, usual, N_PAGES);
    size_t waiting[2] = {0};
    for (int i = 0; i < 20000; i++) {
        for (uint64_t t = 0; t < 2; t++) {
            waiting[t] = 0;
            for (size_t k = 0; k < m.n_requests; k++)
                waiting[t] +=
                    m.requests[k].used && m.requests[k].seq.kv.tenant == t && m.requests[k].seq.state == SCHED_WAITING;
            for (; waiting[t] < (t == 0 ? 15 : RUNNING); waiting[t]++)
                submit(&m, t, 1, t == 0 ? 100 : 10, t == 0 ? 40 : 5, 0, (int)(i % 1000));
        }
        one_step(&m);
        uint64_t a = served(&m.sched, 0), b = served(&m.sched, 1);
        assert_true((a > b ? a - b : b - a) <= RUNNING * 140);
    }
    assert_true(served(&m.sched, 1) > 100000);
    run_out(&m);
    close_simulation(&m);
}

static void priority_goes_first_and_patience_ends(void **state) {
    (void)state;
    static struct simulation m;
    struct sched_options o = usual;
    o.max_running = 2;
    o.patience = 100;
    open_simulation(&m, 3, o, N_PAGES);
    assert_true(submit(&m, 0, 0, 10, 100, 0, 1));
    assert_true(submit(&m, 0, 0, 10, 100, 0, 2));
    one_step(&m);
    assert_int_equal(m.sched.n_running, 2);
    assert_true(submit(&m, 1, 2, 10, 100, 0, 3)); // drives one out
    one_step(&m);
    assert_int_equal(m.sched.n_preemptions, 1);
    assert_int_equal(m.sched.first->priority, 2);
    // A stream of high priority, without end: the low ones still end.
    int steps = 0;
    for (size_t n_low = 2; steps < 2000 && n_low > 0; steps++) {
        n_low = 0;
        for (size_t k = 0; k < m.n_requests; k++) n_low += m.requests[k].used && m.requests[k].seq.priority == 0;
        while (m.sched.n_waiting < 4 && free_request(&m))
            if (!submit(&m, 1, 2, 10, 20, 0, 4)) break;
        one_step(&m);
    }
    assert_true(steps < 2000);
    run_out(&m);
    close_simulation(&m);
}

static void says_what_it_cannot_take(void **state) {
    (void)state;
    static struct simulation m;
    open_simulation(&m, 3, usual, 30);
    assert_false(submit(&m, 0, 1, 100, 100, 0, 1)); // 200 tokens, 120 in the KV
    assert_false(submit(&m, 0, 1, 10, 10, RUNNING, 1));
    for (int i = 0; i < 30; i++) assert_true(submit(&m, 0, 1, 10, 10, 0, 1));
    assert_false(submit(&m, 0, 1, 10, 10, 0, 1)); // the queue is full
    assert_int_equal(m.n_rejected, 3);
    run_out(&m);
    // Somebody else holds nearly all pages: the request is given back, not kept for ever.
    for (int i = 0; i < 28; i++) assert_true(kv_take(&m.pool) >= 0);
    assert_true(submit(&m, 0, 1, 20, 10, 0, 1));
    run_out(&m);
    assert_int_equal(m.n_stuck, 1);
    assert_true(submit(&m, 0, 1, 4, 20, 0, 1)); // begins, and cannot go on
    run_out(&m);
    assert_int_equal(m.n_stuck, 2);
    sched_free(&m.sched);
    kv_pool_free(&m.pool);
    free(m.requests);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_hundred_thousand_requests),
                                       cmocka_unit_test(other_shapes),
                                       cmocka_unit_test(with_the_worst_case_promised_nothing_is_preempted),
                                       cmocka_unit_test(tenants_get_equal_shares),
                                       cmocka_unit_test(priority_goes_first_and_patience_ends),
                                       cmocka_unit_test(says_what_it_cannot_take)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
