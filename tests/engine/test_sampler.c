// test_sampler.c: filters keep what they say, noise follows the softmax, and choices depend on nothing else.
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/sampler.h"
#include "ops/sampling.h"

enum { N = 300 };

static struct sampler sampler;

static int set_up(void **state) {
    (void)state;
    return sampler_create(&sampler, N, NULL) ? 0 : 1;
}

static int tear_down(void **state) {
    (void)state;
    sampler_free(&sampler);
    return 0;
}

static tandem_sampling plain(void) {
    return (tandem_sampling){.temperature = 1, .top_p = 1, .repeat_penalty = 1};
}

// Logits 0, -0.1, -0.2 ... in a shuffled order: rank r stands at id (r * 7) % N.
static void ramp(float *logits) {
    for (int r = 0; r < N; r++) logits[r * 7 % N] = -0.1f * (float)r;
}

static int rank_of(int32_t id) {
    for (int r = 0; r < N; r++)
        if (r * 7 % N == id) return r;
    return -1;
}

static int32_t draw(const tandem_sampling *p, const float *logits, size_t position) {
    static const int32_t zeros[4096];
    struct sampler_history h = {.ids = zeros, .n = position, .n_prompt = position};
    return sampler_choose(&sampler, p, logits, h, NULL, 0, NULL);
}

static void greedy_takes_the_best(void **state) {
    (void)state;
    float logits[N];
    ramp(logits);
    tandem_sampling p = plain();
    p.temperature = 0;
    assert_int_equal(draw(&p, logits, 3), 0);
    logits[5] = logits[9] = 100; // a tie: the smaller id
    assert_int_equal(draw(&p, logits, 3), 5);
}

static void filters_bound_the_rank(void **state) {
    (void)state;
    float logits[N];
    ramp(logits);
    int largest_k = 0, largest_p = 0, largest_min = 0;
    for (uint64_t seed = 0; seed < 3000; seed++) {
        tandem_sampling k = plain(), top = plain(), min = plain();
        k.seed = top.seed = min.seed = seed;
        k.top_k = 5;
        top.top_p = 0.5;
        min.min_p = 0.5;
        int a = rank_of(draw(&k, logits, 1)), b = rank_of(draw(&top, logits, 1)), c = rank_of(draw(&min, logits, 1));
        if (a > largest_k) largest_k = a;
        if (b > largest_p) largest_p = b;
        if (c > largest_min) largest_min = c;
    }
    // The ramp's probabilities are geometric with ratio e^-0.1: half of the mass lies in the first 7, and e^-0.6 > 0.5.
    assert_int_equal(largest_k, 4);
    assert_int_equal(largest_p, 6);
    assert_int_equal(largest_min, 6);
}

static void frequencies_follow_the_softmax(void **state) {
    (void)state;
    float logits[N];
    for (int i = 0; i < N; i++) logits[i] = -INFINITY;
    for (int i = 0; i < N; i++) logits[i] = -1000;
    logits[10] = logf(0.5f), logits[20] = logf(0.3f), logits[30] = logf(0.2f);
    int count[N] = {0};
    enum { DRAWS = 20000 };
    tandem_sampling p = plain();
    for (uint64_t i = 0; i < DRAWS; i++) {
        p.seed = i;
        count[draw(&p, logits, 7)]++;
    }
    // Five standard deviations of a binomial count.
    assert_true(fabs(count[10] - 0.5 * DRAWS) < 5 * sqrt(DRAWS * 0.25));
    assert_true(fabs(count[20] - 0.3 * DRAWS) < 5 * sqrt(DRAWS * 0.21));
    assert_true(fabs(count[30] - 0.2 * DRAWS) < 5 * sqrt(DRAWS * 0.16));
}

// The draw among the survivors is the same whether the others were cut or are hopeless: noise belongs to ids, not
// ranks.
static void noise_belongs_to_the_id(void **state) {
    (void)state;
    float full[N], cut[N];
    ramp(full);
    for (int i = 0; i < N; i++) cut[i] = rank_of(i) < 20 ? full[i] : -1e4f;
    for (uint64_t seed = 0; seed < 500; seed++) {
        tandem_sampling a = plain(), b = plain();
        a.seed = b.seed = seed;
        a.top_k = 20;
        assert_int_equal(draw(&a, full, 11), draw(&b, cut, 11));
    }
}

static void top_k_equals_a_full_sort(void **state) {
    (void)state;
    uint64_t rng = 5;
    for (int round = 0; round < 200; round++) {
        float logits[N];
        for (int i = 0; i < N; i++) {
            rng = rng * 6364136223846793005u + 1442695040888963407u;
            logits[i] = (float)((rng >> 33) % 50); // many ties
        }
        tandem_sampling a = plain(), b = plain();
        a.seed = b.seed = (uint64_t)round;
        a.top_k = 1 + round % 40;
        int32_t got = draw(&a, logits, 2);
        int better = 0; // tokens that rank before the drawn one
        for (int i = 0; i < N; i++) better += logits[i] > logits[got] || (logits[i] == logits[got] && i < got);
        assert_true(better < a.top_k);
    }
}

// What ops/sampling.h says is chosen, step by step and slowly.
static int32_t by_definition(const tandem_sampling *p, const float *logits, size_t n, size_t position) {
    int32_t order[2 * N], chosen = -1;
    double scale = sampling_scale(p->temperature), highest = 0, sum = 0, all = 0;
    for (size_t i = 0; i < n; i++) { // insertion sort, the best first
        size_t at = i;
        for (; at > 0 && sampling_place(logits[order[at - 1]], order[at - 1]) < sampling_place(logits[i], (int32_t)i);
             at--)
            order[at] = order[at - 1];
        order[at] = (int32_t)i;
    }
    float best = logits[order[0]];
    size_t k = p->top_k > 0 && (size_t)p->top_k < n ? (size_t)p->top_k : n;
    for (size_t i = 0; i < k; i++) all += (double)sampling_weight(logits[order[i]], best, (float)scale);
    for (size_t i = 0; i < k; i++) {
        int32_t id = order[i];
        double weight = (double)sampling_weight(logits[id], best, (float)scale);
        if (i > 0 && sum >= p->top_p * all) break;
        sum += weight;
        if (weight < p->min_p * (double)SAMPLING_ONE) continue;
        uint64_t random = sampling_random(sampling_key(p->seed, position), id);
        double score = sampling_score(logits[id], scale, sampling_noise(random));
        if (chosen < 0 || score > highest || (score == highest && id < chosen)) chosen = id, highest = score;
    }
    return chosen;
}

// Lengths around the blocks in which logits are looked at, k on both sides of what a heap holds, ties and infinities.
static void chooses_what_the_definition_says(void **state) {
    (void)state;
    static const size_t lengths[] = {1, 2, 15, 16, 17, 31, 33, 300, 599};
    static const int32_t ks[] = {0, 1, 2, 3, 15, 16, 17, 20, 64, 255, 256, 257, 300, 598, 1000};
    static const int32_t zeros[1];
    uint64_t rng = 9;
    for (size_t l = 0; l < sizeof lengths / sizeof lengths[0]; l++) {
        struct sampler s;
        size_t n = lengths[l];
        assert_true(sampler_create(&s, n, NULL));
        for (int round = 0; round < 60; round++) {
            float logits[2 * N];
            for (size_t i = 0; i < n; i++) {
                rng = rng * 6364136223846793005u + 1442695040888963407u;
                int32_t x = (int32_t)(rng >> 40);
                if (round % 4 == 0) logits[i] = (float)(x % 7) - 3;            // many ties
                else if (round % 4 == 1) logits[i] = 0.01f * (float)i;         // ever better
                else if (round % 4 == 2) logits[i] = x % 9 ? -INFINITY : 0.5f; // masked
                else logits[i] = (float)x * 1e-6f;
                if (x % 11 == 0 && logits[i] == 0) logits[i] = -0.0f;
            }
            if (round % 4 == 2) logits[n / 2] = 1;
            for (size_t i = 0; i < sizeof ks / sizeof ks[0]; i++) {
                tandem_sampling p = plain();
                p.top_k = ks[i];
                p.top_p = round % 3 ? 0.8 : 1;
                p.min_p = round % 5 ? 0 : 0.1;
                p.seed = rng + i;
                struct sampler_history h = {.ids = zeros, .n = 7, .n_prompt = 7};
                assert_int_equal(sampler_choose(&s, &p, logits, h, NULL, 0, NULL), by_definition(&p, logits, n, 7));
                p.temperature = 0;
                int32_t best = sampler_choose(&s, &p, logits, h, NULL, 0, NULL);
                for (size_t j = 0; j < n; j++)
                    assert_true(sampling_place(logits[j], (int32_t)j) <= sampling_place(logits[best], best));
            }
        }
        sampler_free(&s);
    }
}

// What is not looked at more closely could not have won: not even against a score that is the same.
static void nothing_is_passed_over_that_could_win(void **state) {
    (void)state;
    static const double scales[] = {0.0144, 1, 1.4427, 2.4045, 14.4, 1e6, 1e30};
    static const float logits[] = {0, -0.0f, 1e-30f, -7.25f, 11.03f, -88.8f, 3e4f, -INFINITY};
    uint64_t rng = 5;
    for (int i = 0; i < 300000; i++) {
        rng = sampling_mix(rng);
        uint64_t random = rng;
        if (i < 65) random = i ? ~0ull >> (i - 1) : 0;
        else if (i < 130) random = ~(i > 65 ? ~0ull >> (i - 66) : 0);
        else if (i % 4 == 1) random = ~(rng >> (i % 60));
        else if (i % 4 == 2) random = rng >> (i % 60);
        float noise = sampling_noise(random);
        double scale = scales[rng >> 8 & 7 ? (rng >> 8 & 7) - 1 : 3];
        float logit = rng & 1 ? logits[rng >> 1 & 7] : (float)(int32_t)(rng >> 32) * 0x1p-26f;
        double score = sampling_score(logit, scale, noise);
        assert_false(sampling_loses(logit, (float)scale, random, sampling_below(score)));
        // Where two more were wanted of noise that may win, and is not rarer than one of a million tokens has it, it is
        // known to lose.
        if (noise > 0.6f && noise < 20 && scale < 10 && logit > -1e4f && logit < 1e4f)
            assert_true(sampling_loses(logit, (float)scale, random, sampling_below(score + 2.1)));
    }
    assert_true(sampling_loses(1, 1, ~0ull >> 1, sampling_below(3.0)));
    assert_true(sampling_loses(-INFINITY, 1, 0, sampling_below(-1e5)));
}

static void penalties(void **state) {
    (void)state;
    float logits[N];
    for (int i = 0; i < N; i++) logits[i] = -5;
    logits[1] = 2, logits[2] = 1.9f;
    int32_t ids[] = {2, 1, 1};
    struct sampler_history h = {.ids = ids, .n = 3, .n_prompt = 1};
    tandem_sampling p = plain();
    p.temperature = 0;
    assert_int_equal(sampler_choose(&sampler, &p, logits, h, NULL, 0, NULL), 1);
    p.presence_penalty = 0.2; // token 1 was generated, token 2 is prompt
    assert_int_equal(sampler_choose(&sampler, &p, logits, h, NULL, 0, NULL), 2);
    p.presence_penalty = 0;
    p.frequency_penalty = 0.06; // twice
    assert_int_equal(sampler_choose(&sampler, &p, logits, h, NULL, 0, NULL), 2);
    p.frequency_penalty = 0;
    p.repeat_penalty = 2; // both are in the context: their order stays
    assert_int_equal(sampler_choose(&sampler, &p, logits, h, NULL, 0, NULL), 1);
    int32_t bias_id = 7;
    float bias = 50;
    p.bias_ids = &bias_id, p.bias = &bias, p.n_bias = 1;
    assert_int_equal(sampler_choose(&sampler, &p, logits, h, NULL, 0, NULL), 7);
    assert_int_equal(sampler_choose(&sampler, &p, logits, h, &bias_id, 1, NULL), 1); // banned wins
}

static void uniform_is_open(void **state) {
    (void)state;
    for (int32_t i = 0; i < 100000; i++) {
        double u = sampler_uniform(3, 9, i);
        assert_true(u > 0 && u < 1);
    }
    assert_true(sampler_uniform(1, 2, 3) == sampler_uniform(1, 2, 3));
    assert_true(sampler_uniform(1, 2, 3) != sampler_uniform(2, 2, 3));
    assert_true(sampler_uniform(1, 2, 3) != sampler_uniform(1, 3, 3));
    assert_true(sampler_uniform(1, 2, 3) != sampler_uniform(1, 2, 4));
}

static void refuses_bad_fields(void **state) {
    (void)state;
    struct error err;
    int32_t outside = N;
    float nan_bias = NAN, fine = 1;
    tandem_sampling bad[8];
    static const char *const names[8] = {"temperature",    "top_k",    "top_p",      "min_p",
                                         "repeat_penalty", "presence", "logit_bias", "logit_bias"};
    for (int i = 0; i < 8; i++) bad[i] = plain();
    bad[0].temperature = NAN;
    bad[1].top_k = -1;
    bad[2].top_p = 0;
    bad[3].min_p = 1.5;
    bad[4].repeat_penalty = 0;
    bad[5].presence_penalty = 3;
    bad[6].bias_ids = &outside, bad[6].bias = &fine, bad[6].n_bias = 1;
    outside = N;
    int32_t inside = 1;
    bad[7].bias_ids = &inside, bad[7].bias = &nan_bias, bad[7].n_bias = 1;
    for (int i = 0; i < 8; i++) {
        assert_false(sampling_check(&bad[i], N, &err));
        assert_non_null(strstr(err.text, names[i]));
    }
    tandem_sampling good = plain();
    assert_true(sampling_check(&good, N, &err));
}

static void logprobs_and_finiteness(void **state) {
    (void)state;
    float logits[4] = {0, logf(2), logf(5), -INFINITY};
    assert_true(fabs((double)logits_logprob(logits, 3, 1) - log(0.25)) < 1e-6);
    tandem_token top[2];
    logits_top(logits, 3, top, 2);
    assert_int_equal(top[0].id, 2);
    assert_int_equal(top[1].id, 1);
    assert_true(logits_finite(logits, 3));
    assert_false(logits_finite(logits, 4));
    logits[0] = NAN;
    assert_false(logits_finite(logits, 3));
    float many[2 * N];
    for (int i = 0; i < 2 * N; i++) many[i] = (float)(i * 37 % 50);
    for (int i = 0; i < 2 * N; i++) {
        assert_true(logits_finite(many, 2 * N));
        float kept = many[i];
        many[i] = i % 2 ? INFINITY : NAN;
        assert_false(logits_finite(many, 2 * N));
        many[i] = kept;
    }
    static const size_t counts[] = {1, 5, 256, 257, 600};
    for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
        tandem_token all[2 * N], token = {.id = 3};
        logits_logprobs(many, 2 * N, &token, all, counts[c]);
        assert_true(token.logprob == logits_logprob(many, 2 * N, 3));
        for (size_t i = 0; i < counts[c]; i++) {
            uint64_t place = sampling_place(many[all[i].id], all[i].id);
            if (i > 0) assert_true(place < sampling_place(many[all[i - 1].id], all[i - 1].id));
            size_t better = 0;
            for (int j = 0; j < 2 * N; j++) better += sampling_place(many[j], j) > place;
            assert_int_equal(better, i);
            assert_true(all[i].logprob == logits_logprob(many, 2 * N, all[i].id));
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greedy_takes_the_best),
        cmocka_unit_test(filters_bound_the_rank),
        cmocka_unit_test(frequencies_follow_the_softmax),
        cmocka_unit_test(noise_belongs_to_the_id),
        cmocka_unit_test(top_k_equals_a_full_sort),
        cmocka_unit_test(chooses_what_the_definition_says),
        cmocka_unit_test(nothing_is_passed_over_that_could_win),
        cmocka_unit_test(penalties),
        cmocka_unit_test(uniform_is_open),
        cmocka_unit_test(refuses_bad_fields),
        cmocka_unit_test(logprobs_and_finiteness),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
