// test_oracle.c: the oracles' single ops on cases worked out by hand, their invariance, and what they refuse. Whole
// models are compared with NumPy and with Hugging Face's goldens in tests/e2e/test_oracle.py.
#include "model/oracle.h"

#include "model/oracle_parts.h"
#include "model/synthetic.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void assert_near(double found, double expected, double relative) {
    if (!(fabs(found - expected) <= relative * fabs(expected)))
        fail_msg("found %.17g, expected %.17g", found, expected);
}

static void bf16_rounding(void **state) {
    (void)state;
    const double pairs[][2] = {
        {0, 0},
        {1, 1},
        {1 + 0x1p-8, 1}, // a tie goes to the even neighbour
        {1 + 0x1.8p-7, 1 + 0x1p-6},
        {1 + 0x1p-8 + 0x1p-40, 1 + 0x1p-7}, // f32 would lose what breaks the tie
        {-(1 + 0x1p-8 + 0x1p-40), -(1 + 0x1p-7)},
        {0x1.ffp127, INFINITY},
        {0x1.fep127, 0x1.fep127},
        {-0x1p200, -INFINITY},
        {0x1p-133, 0x1p-133},
        {0x1.8p-134, 0x1p-133}, // below the middle of 0 and 2^-133 it would be 0
        {0x1p-134, 0},
        {0x1.01p-126, 0x1p-126},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        double v = oracle_bf16(pairs[i][0]);
        if (v != pairs[i][1]) fail_msg("%a: found %a, expected %a", pairs[i][0], v, pairs[i][1]);
    }
    assert_true(signbit(oracle_bf16(-0.0)) && isnan(oracle_bf16((double)NAN)));
    for (unsigned i = 1; i < 200000; i++) { // against the conversion from f32, where both say the same
        union {
            uint32_t u;
            float f;
        } x = {.u = i * 21473u};
        if (isnan(x.f)) continue;
        double expected = (double)bf16_to_f32(bf16_from_f32(x.f)), found = oracle_bf16((double)x.f);
        if (found != expected) fail_msg("%a: found %a, expected %a", (double)x.f, found, expected);
    }
}

static void rmsnorm_by_hand(void **state) {
    (void)state;
    const double x[4] = {3, 4, 0, 0}; // mean of squares 6.25
    const float w[4] = {1, 2, 3, 1.01f};
    double y[4];
    oracle_rmsnorm(ORACLE_T, NULL, y, x, w, 0, 1, 4);
    assert_near(y[0], 1.2, 1e-15);
    assert_near(y[1], 3.2, 1e-15);
    assert_true(y[2] == 0 && y[3] == 0);
    oracle_rmsnorm(ORACLE_T, NULL, y, x, w, 0.75, 1, 4); // eps: 6.25 + 0.75 = 7
    assert_near(y[0], 3 / sqrt(7), 1e-15);
    // H: 4 * 0.4 = 1.6 becomes 1.6015625 before the weight; after it, 3.2 would become 3.203125.
    oracle_rmsnorm(ORACLE_H, NULL, y, x, w, 0, 1, 4);
    assert_true(y[1] == 3.203125);
    // 1.203125 * bf16(1.4140625) = 1.70129...: the order of rounding shows, 1.2 * 1.4140625 would give 1.6953125.
    const float late[4] = {1.4140625f, 1, 1, 1};
    oracle_rmsnorm(ORACLE_H, NULL, y, x, late, 0, 1, 4);
    assert_true(y[0] == 1.703125);
    oracle_head_rmsnorm(ORACLE_T, NULL, y, x, w, 0, 1, 2, 2); // heads {3, 4} and {0, 0}; eps 0 over a head of zeros
    assert_near(y[0], 3 / sqrt(12.5), 1e-15);
    assert_near(y[1], 8 / sqrt(12.5), 1e-15);
    assert_true(isnan(y[2]));
}

static void rope_by_hand(void **state) {
    (void)state;
    const double x[4] = {1, 10, 2, 20}, rates[2] = {1, 0.5};
    const int32_t position[1] = {3};
    double y[4];
    oracle_rope(ORACLE_T, NULL, y, x, rates, 1, position, 1, 1, 4);
    assert_near(y[0], cos(3) - 2 * sin(3), 1e-15); // channel 0 pairs with 2
    assert_near(y[2], 2 * cos(3) + sin(3), 1e-15);
    assert_near(y[1], 10 * cos(1.5) - 20 * sin(1.5), 1e-15);
    assert_near(y[3], 20 * cos(1.5) + 10 * sin(1.5), 1e-15);
    oracle_rope(ORACLE_H, NULL, y, x, rates, 1, position, 1, 1, 4);
    double c = oracle_bf16((double)cosf(3)), s = oracle_bf16((double)sinf(3));
    assert_true(y[0] == oracle_bf16(c - oracle_bf16(2 * s)));
    oracle_rope(ORACLE_T, NULL, y, x, rates, 2, position, 1, 2, 2); // two heads of one pair each, magnitude 2
    assert_near(y[0], 2 * (cos(3) - 10 * sin(3)), 1e-15);
    assert_near(y[3], 2 * (20 * cos(3) + 2 * sin(3)), 1e-15);
}

static void attention_by_hand(void **state) {
    (void)state;
    // One KV head of one channel for two heads; scores are q * k.
    const double q[4] = {1, -1, 2, 0}, k[3] = {0, 1, (double)NAN}, v[3] = {10, 20, (double)NAN};
    const int32_t position[2] = {1, 0};
    double out[4];
    struct oracle_attention a = {.q = q,
                                 .k = k,
                                 .v = v,
                                 .position = position,
                                 .n_tokens = 2,
                                 .n_positions = 3,
                                 .n_heads = 2,
                                 .n_kv_heads = 1,
                                 .head_dim = 1};
    assert_true(oracle_attention(ORACLE_T, NULL, out, &a, NULL));
    double e = exp(1);
    assert_near(out[0], (10 + 20 * e) / (1 + e), 1e-15);
    assert_near(out[1], (10 * e + 20) / (1 + e), 1e-15);
    assert_true(out[2] == 10 && out[3] == 10); // position 0 sees itself only
    assert_true(oracle_attention(ORACLE_H, NULL, out, &a, NULL));
    assert_true(out[0] == oracle_bf16(10 * oracle_bf16(1 / (1 + e)) + 20 * oracle_bf16(e / (1 + e))));
    const int32_t beyond[2] = {1, 3}, before[2] = {-1, 0};
    struct error err;
    a.position = beyond;
    assert_false(oracle_attention(ORACLE_T, NULL, out, &a, &err));
    assert_non_null(strstr(err.text, "below 3"));
    a.position = before;
    assert_false(oracle_attention(ORACLE_T, NULL, out, &a, &err));
    a.position = position;
    a.n_heads = 3;
    a.n_kv_heads = 2;
    assert_false(oracle_attention(ORACLE_T, NULL, out, &a, &err));
}

static void silu_mul_and_add(void **state) {
    (void)state;
    double gate[3] = {0, 1, -800}, up[3] = {5, 3, 1}, act[3];
    oracle_silu_mul(ORACLE_T, NULL, act, gate, up, 3);
    assert_near(act[1], 3 / (1 + exp(-1)), 1e-15);
    assert_true(act[0] == 0 && fabs(act[2]) < 1e-300);
    oracle_silu_mul(ORACLE_H, NULL, act, gate, up, 3);
    assert_true(act[1] == oracle_bf16(3 * oracle_bf16(1 / (1 + exp(-1)))));
    double x[2] = {256, 1}, y[2] = {1, 0x1p-30};
    oracle_add(ORACLE_H, NULL, x, y, 2);
    assert_true(x[0] == 256 && x[1] == 1); // 257 is no bf16 value
    oracle_add(ORACLE_T, NULL, x, y, 2);
    assert_true(x[0] == 257 && x[1] == 1 + 0x1p-30);
}

// Every row and token count around the tiles, against a plain sum.
static void products(void **state) {
    (void)state;
    enum { N_IN = 300, N_OUT = 37, T = 70 };
    static float w[N_OUT][N_IN], bias[N_OUT];
    static double x[T][N_IN], y[T][N_OUT];
    struct matrix m = {
        .name = "w", .type = DTYPE_F32, .n_out = N_OUT, .n_in = N_IN, .row_bytes = sizeof w[0], .data = w};
    for (int o = 0; o < N_OUT; o++) {
        bias[o] = (float)o;
        for (int i = 0; i < N_IN; i++) w[o][i] = (float)sin(o + 0.1 * i);
    }
    for (int t = 0; t < T; t++)
        for (int i = 0; i < N_IN; i++) x[t][i] = cos(t + 0.3 * i);
    struct pool *pool = pool_create(3, NULL);
    for (size_t n = 1; n <= T; n += n < 18 ? 1 : 13) {
        memset(y, 0xFF, sizeof y);
        assert_true(oracle_linear(ORACLE_T, n % 2 ? pool : NULL, y[0], x[0], &m, bias, n, NULL));
        for (size_t t = 0; t < T; t++) {
            for (int o = 0; o < N_OUT; o++) {
                double sum = 0;
                for (int i = 0; i < N_IN; i++) sum += (double)w[o][i] * x[t][i];
                if (t < n) assert_true(y[t][o] == sum + (double)bias[o]);
                else assert_true(isnan(y[t][o])); // untouched
            }
        }
    }
    assert_true(oracle_linear(ORACLE_H, pool, y[0], x[0], &m, bias, 1, NULL));
    double sum = 0;
    for (int i = 0; i < N_IN; i++) sum += oracle_bf16((double)w[1][i]) * oracle_bf16(x[0][i]);
    assert_true(y[0][1] == oracle_bf16(sum + 1));
    pool_free(pool);
    struct error err;
    m.type = DTYPE_I32;
    assert_false(oracle_linear(ORACLE_T, NULL, y[0], x[0], &m, NULL, 1, &err));
    m.type = DTYPE_Q8_0; // 300 is no multiple of 32
    assert_false(oracle_linear(ORACLE_T, NULL, y[0], x[0], &m, NULL, 1, &err));
    m.type = DTYPE_F32;
    m.row_bytes = 4;
    assert_false(oracle_linear(ORACLE_T, NULL, y[0], x[0], &m, NULL, 1, &err));
}

static void embedding(void **state) {
    (void)state;
    const float table[3][2] = {{1, 2}, {3, 4.00390625f}, {5, 6}};
    struct matrix m = {.name = "t", .type = DTYPE_F32, .n_out = 3, .n_in = 2, .row_bytes = 8, .data = table};
    const int32_t good[2] = {2, 1}, high[1] = {3}, low[1] = {-1};
    double x[4];
    struct error err;
    assert_true(oracle_embed(ORACLE_T, x, &m, good, 2, &err));
    assert_true(x[0] == 5 && x[1] == 6 && x[2] == 3 && x[3] == 4.00390625);
    assert_true(oracle_embed(ORACLE_H, x, &m, good, 2, &err));
    assert_true(x[3] == 4);
    assert_false(oracle_embed(ORACLE_T, x, &m, high, 1, &err));
    assert_false(oracle_embed(ORACLE_T, x, &m, low, 1, &err));
    assert_false(oracle_row(&m, 3, x, &err));
}

// Every type's elements are those that the engine multiplies with: two readers of one definition.
static void elements_of_every_type(void **state) {
    (void)state;
    enum { N = 2048 };
    unsigned char bytes[N * 4];
    float expected[N];
    double found[N];
    srand(7);
    for (int type = 0; type < DTYPE_COUNT; type++) {
        if (!dtype_info((enum dtype)type)->is_weight) continue;
        struct matrix m = {.name = "m", .type = (enum dtype)type, .n_out = 1, .n_in = N, .data = bytes};
        assert_true(dtype_row_bytes(m.type, N, &m.row_bytes));
        for (int round = 0; round < 20; round++) {
            for (size_t i = 0; i < m.row_bytes; i++) bytes[i] = (unsigned char)(rand() >> 8);
            dtype_to_f32(m.type, bytes, expected, N);
            assert_true(oracle_row(&m, 0, found, NULL));
            for (int i = 0; i < N; i++) {
                // Infinite scales give NaN in one order of operations and Inf in the other: no weights.
                if (!isfinite(expected[i])) continue;
                if (found[i] != (double)expected[i])
                    fail_msg("%s [%d]: found %a, expected %a", dtype_info(m.type)->name, i, found[i],
                             (double)expected[i]);
            }
        }
    }
}

// ---- Whole sequences -----------------------------------------------------------------------------------------------

enum { N_IDS = 40 };

static void some_ids(int32_t *ids) {
    for (int i = 0; i < N_IDS; i++) ids[i] = (i * 37 + 11) % 200;
}

// Runs ids in steps of `chunk`; logits of all rows.
static void run_in(struct oracle *o, const int32_t *ids, size_t chunk, double *logits, size_t n_vocab) {
    size_t rows[N_IDS];
    for (size_t i = 0; i < N_IDS; i++) rows[i] = i;
    for (size_t at = 0; at < N_IDS; at += chunk) {
        size_t n = N_IDS - at < chunk ? N_IDS - at : chunk;
        struct oracle_step step = {.ids = ids + at, .n = n, .position0 = at, .logit_rows = rows, .n_logit_rows = n};
        assert_true(oracle_run(o, &step, logits + at * n_vocab, NULL));
    }
}

static void bits_do_not_depend_on_chunks_or_threads(void **state) {
    (void)state;
    const char *const names[] = {"synthetic:tiny-qwen3", "synthetic:tiny-qwen2:q8_0", "synthetic:tiny-llama:f32"};
    int32_t ids[N_IDS];
    some_ids(ids);
    for (size_t i = 0; i < 3; i++) {
        struct error err = {0};
        struct model *m = model_synthetic(names[i], NULL, NULL, &err);
        if (!m) fail_msg("%s", err.text);
        struct pool *pool = pool_create(3, NULL);
        size_t n_vocab = m->config.n_vocab;
        double *whole = malloc(N_IDS * n_vocab * sizeof *whole), *other = malloc(N_IDS * n_vocab * sizeof *other);
        assert_true(whole && other);
        for (int kind = ORACLE_T; kind <= ORACLE_H; kind++) {
            struct oracle *o = oracle_create(m, (enum oracle_kind)kind, NULL, N_IDS, &err);
            if (!o) fail_msg("%s", err.text);
            run_in(o, ids, N_IDS, whole, n_vocab);
            run_in(o, ids, 7, other, n_vocab); // over what is already there
            assert_memory_equal(whole, other, N_IDS * n_vocab * sizeof *whole);
            oracle_free(o);
            o = oracle_create(m, (enum oracle_kind)kind, pool, 3 * N_IDS, &err);
            run_in(o, ids, 9, other, n_vocab);
            assert_memory_equal(whole, other, N_IDS * n_vocab * sizeof *whole);
            oracle_free(o);
            for (size_t k = 0; k < N_IDS * n_vocab; k++) assert_true(isfinite(whole[k]));
        }
        free(whole);
        free(other);
        pool_free(pool);
        model_free(m);
    }
}

static void refusals(void **state) {
    (void)state;
    struct error err = {0};
    struct model *m = model_synthetic("synthetic:tiny-qwen3", NULL, NULL, &err);
    assert_non_null(m);
    assert_null(oracle_create(m, ORACLE_T, NULL, 0, &err));
    assert_null(oracle_create(m, ORACLE_T, NULL, SIZE_MAX / 2, &err));
    struct oracle *o = oracle_create(m, ORACLE_T, NULL, 4, &err);
    assert_non_null(o);
    int32_t ids[6] = {1, 2, 3, 4, 5, 6};
    const size_t row[1] = {2};
    double *logits = malloc(m->config.n_vocab * sizeof *logits);
    struct oracle_step step = {.ids = ids, .n = 5};
    assert_false(oracle_run(o, &step, NULL, &err)); // more than it has room for
    step.n = 0;
    assert_false(oracle_run(o, &step, NULL, &err));
    step.n = 2;
    step.position0 = 1;
    assert_false(oracle_run(o, &step, NULL, &err)); // a gap
    step.position0 = 0;
    step.logit_rows = row;
    step.n_logit_rows = 1;
    assert_false(oracle_run(o, &step, logits, &err)); // row 2 of 2
    step.n = 3;
    assert_false(oracle_run(o, &step, NULL, &err)); // nowhere to put it
    assert_true(oracle_run(o, &step, logits, &err));
    ids[1] = (int32_t)m->config.n_vocab;
    assert_false(oracle_run(o, &step, logits, &err));
    free(logits);
    oracle_free(o);
    oracle_free(NULL);
    model_free(m);
}

// A model's files are read afresh: a mistake in the model's own binding does not reach the oracle.
static void files_are_read_by_name(void **state) {
    (void)state;
    struct error err = {0};
    struct model_load_options options = {0};
    struct model *m = model_load(MODEL_FOLDER, "models/tandem-tiny", &options, &err);
    if (!m) fail_msg("%s", err.text);
    int32_t ids[2] = {10, 20};
    const size_t row[1] = {1};
    double *right = malloc(m->config.n_vocab * sizeof *right), *wrong = malloc(m->config.n_vocab * sizeof *wrong);
    struct oracle_step step = {.ids = ids, .n = 2, .logit_rows = row, .n_logit_rows = 1};
    struct oracle *o = oracle_create(m, ORACLE_T, NULL, 2, &err);
    assert_true(o && oracle_run(o, &step, right, &err));
    oracle_free(o);
    m->layers[3].attn_norm = m->layers[4].attn_norm;
    m->layers[1].wq.data = m->layers[0].wq.data;
    m->inv_freq[3] *= 2;
    o = oracle_create(m, ORACLE_T, NULL, 2, &err);
    assert_true(o && oracle_run(o, &step, wrong, &err));
    oracle_free(o);
    assert_memory_equal(right, wrong, m->config.n_vocab * sizeof *right);
    free(right);
    free(wrong);
    model_free(m);
}

// Scaled rates against the engine's, which were written apart from these.
static void rates_of_every_scaling(void **state) {
    (void)state;
    struct model m = {.config = {.head_dim = 128, .context = 4096}};
    const struct rope_config configs[] = {
        {.theta = 1e6},
        {.theta = 1e4, .scaling = ROPE_LINEAR, .factor = 4},
        {.theta = 1e6, .scaling = ROPE_YARN, .factor = 4, .original_context = 32768, .beta_fast = 32, .beta_slow = 1},
        {.theta = 5e5,
         .scaling = ROPE_LLAMA3,
         .factor = 8,
         .original_context = 8192,
         .low_freq_factor = 1,
         .high_freq_factor = 4},
    };
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++) {
        double expected[64], found[64], in_f32[64], magnitude, expected_magnitude;
        m.config.rope = configs[i];
        rope_rates(&m.config, NULL, expected, &expected_magnitude);
        assert_true(oracle_rope_rates(ORACLE_T, &m, found, &magnitude, NULL));
        assert_true(magnitude == expected_magnitude);
        assert_true(oracle_rope_rates(ORACLE_H, &m, in_f32, &magnitude, NULL));
        for (int k = 0; k < 64; k++) {
            assert_near(found[k], expected[k], 1e-13);
            assert_near(in_f32[k], expected[k], 1e-6);
            assert_true((double)(float)in_f32[k] == in_f32[k]);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bf16_rounding),
        cmocka_unit_test(rmsnorm_by_hand),
        cmocka_unit_test(rope_by_hand),
        cmocka_unit_test(attention_by_hand),
        cmocka_unit_test(silu_mul_and_add),
        cmocka_unit_test(products),
        cmocka_unit_test(embedding),
        cmocka_unit_test(elements_of_every_type),
        cmocka_unit_test(bits_do_not_depend_on_chunks_or_threads),
        cmocka_unit_test(refusals),
        cmocka_unit_test(files_are_read_by_name),
        cmocka_unit_test(rates_of_every_scaling),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
