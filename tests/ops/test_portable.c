// The portable ops against independent f64 computations, with bounds derived from the number of roundings.
#include "ops/cpu/math.h"
#include "ops/ops.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint32_t rng = 1;

static float uniform(void) {
    rng = rng * 1664525u + 1013904223u;
    return (float)(rng >> 8) / 8388608.0f - 1.0f;
}

static float *random_floats(size_t n, float scale) {
    float *x = malloc(n * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++) x[i] = uniform() * scale;
    return x;
}

static struct op_ctx open_ctx(int n_threads) {
    struct op_ctx c = {.ops = ops_cpu("portable", NULL), .pool = pool_create(n_threads, NULL)};
    struct ops_limits l = {300, 512, 300, 6, 80, n_threads};
    assert_true(ops_scratch_floats(&l, &c.scratch_floats));
    c.scratch = malloc((c.scratch_floats + 1) * sizeof(float));
    assert_non_null(c.scratch);
    for (size_t i = 0; i < c.scratch_floats; i++) c.scratch[i] = NAN;
    c.scratch[c.scratch_floats] = 1234.5f;
    return c;
}

static void close_ctx(struct op_ctx *c) {
    assert_true(c->scratch[c->scratch_floats] == 1234.5f);
    pool_free(c->pool);
    free(c->scratch);
}

static void test_exp32(void **state) {
    (void)state;
    assert_true(exp32(-INFINITY) == 0.0f && exp32(0.0f) == 1.0f && isinf(exp32(INFINITY)) && isnan(exp32(NAN)));
    assert_true(exp32(89.0f) == INFINITY && exp32(-104.0f) == 0.0f);
    for (int i = 0; i < 1000000; i++) {
        float x = -103.0f + 191.7f * (float)i / 1e6f;
        double e = exp((double)x), got = (double)exp32(x);
        double ulp = fmax(ldexp(1.0, ilogb(e) - 23), 0x1p-149);
        assert_true(fabs(got - e) <= 1.5 * ulp);
    }
}

// Each lane of dot16 adds in its own order: a sum that keeps its bits only in that order.
static void test_dot16_order(void **state) {
    (void)state;
    float a[40], b[40], lane[16] = {0};
    for (int k = 0; k < 40; k++) {
        a[k] = uniform() * ldexpf(1.0f, (k * 7) % 31 - 15);
        b[k] = uniform();
        lane[k % 16] = fmaf(a[k], b[k], lane[k % 16]);
    }
    float e[8], f[4];
    for (int l = 0; l < 8; l++) e[l] = lane[l] + lane[l + 8];
    for (int l = 0; l < 4; l++) f[l] = e[l] + e[l + 4];
    assert_true(dot16_f32(a, b, 40) == (f[0] + f[2]) + (f[1] + f[3]));
    for (int k = 0; k < 40; k++) {
        a[k] = bf16_to_f32(bf16_from_f32(a[k]));
        b[k] = bf16_to_f32(bf16_from_f32(b[k]));
    }
    assert_true(dot16_f32(a, b, 40) == dot16_bf16(a, b, 40));
}

// |dot16 - exact| <= (n/16 + 5) u sum |a b|, u = 2^-24. And each row's bits are the same at any T and thread count.
static void test_matmul(void **state) {
    (void)state;
    enum { N_IN = 83, N_OUT = 37, T = 9 };
    float *x = random_floats(T * N_IN, 1.0f), *wf = random_floats(N_OUT * N_IN, 1.0f);
    static uint16_t wb[N_OUT * N_IN];
    for (int i = 0; i < N_OUT * N_IN; i++) wb[i] = bf16_from_f32(wf[i]);
    for (int bf = 0; bf < 2; bf++) {
        struct matrix w = {"w", bf ? DTYPE_BF16 : DTYPE_F32, N_OUT, N_IN, N_IN * (bf ? 2 : 4), wf};
        if (bf) w.data = wb;
        float y[T * N_OUT], one[N_OUT];
        struct op_ctx c = open_ctx(1), d = open_ctx(3);
        c.ops->matmul(&c, y, x, &w, T);
        for (int t = 0; t < T; t++) {
            d.ops->matmul(&d, one, x + t * N_IN, &w, 1);
            assert_memory_equal(one, y + t * N_OUT, sizeof one);
            for (int o = 0; o < N_OUT; o++) {
                double sum = 0, size = 0;
                for (int i = 0; i < N_IN; i++) {
                    float xi = x[t * N_IN + i], wi = wf[o * N_IN + i];
                    if (bf) xi = bf16_to_f32(bf16_from_f32(xi)), wi = bf16_to_f32(wb[o * N_IN + i]);
                    sum += (double)xi * (double)wi;
                    size += fabs((double)xi * (double)wi);
                }
                assert_true(fabs((double)one[o] - sum) <= (N_IN / 16 + 6) * 0x1p-24 * size);
            }
        }
        close_ctx(&c);
        close_ctx(&d);
    }
    free(x);
    free(wf);
}

static void test_rmsnorm(void **state) {
    (void)state;
    enum { N = 203 };
    float *x = random_floats(N, 2.0f), *w = random_floats(N, 128.0f), y[N];
    x[7] = 3000.0f; // one hot channel
    struct op_ctx c = open_ctx(2);
    c.ops->rmsnorm(&c, y, x, w, 1e-6f, 1, N);
    double sum = 0;
    for (int i = 0; i < N; i++) sum += (double)x[i] * (double)x[i];
    double r = 1 / sqrt(sum / N + (double)1e-6f);
    // the sum's relative error is halved by the root; six single roundings besides
    for (int i = 0; i < N; i++)
        assert_true(fabs((double)y[i] - (double)x[i] * r * (double)w[i]) <=
                    ((N / 16 + 5) / 2.0 + 6) * 0x1p-24 * fabs((double)y[i]));
    close_ctx(&c);
    free(x);
    free(w);
}

// Two sequences of 70 and 41 positions on permuted pages, all other slots NaN; attention and the store before it
// against plain f64 softmax, and whole against token by token.
static void test_attention(void **state) {
    (void)state;
    enum { H = 6, KVH = 2, D = 80, T = 111, PAGES = 8, SLOTS = PAGES * KVH * KV_PAGE_TOKENS * D };
    int32_t position[T], seq[T], seq_start[] = {0, 70, T}, page_start[] = {0, 3, 5}, pages[] = {6, 1, 4, 7, 2};
    int32_t kv_len[] = {70, 41};
    for (int t = 0; t < T; t++) seq[t] = t >= 70, position[t] = t - seq_start[seq[t]];
    struct batch b = {.n_tokens = T,
                      .n_seqs = 2,
                      .position = position,
                      .seq = seq,
                      .seq_start = seq_start,
                      .page_start = page_start,
                      .pages = pages,
                      .kv_len = kv_len};
    float *k = random_floats(T * KVH * D, 1.0f), *v = random_floats(T * KVH * D, 1.0f);
    float *q = random_floats(T * H * D, 1.0f), *out = random_floats(T * H * D, 1.0f), *again = malloc(T * H * D * 4);
    float *kp = malloc(SLOTS * 4), *vp = malloc(SLOTS * 4);
    assert_true(again && kp && vp);
    for (int i = 0; i < SLOTS; i++) kp[i] = vp[i] = NAN;
    struct kv_layer kv = {DTYPE_F32, kp, vp, PAGES, KVH, D};
    struct op_ctx c = open_ctx(3);
    c.ops->kv_store(&c, &kv, &b, k, v);
    struct attention_args a = {&b, H, KVH, D, 1.0f / sqrtf(D), q, &kv, out};
    ops_attention(&c, &a);
    for (int t = 0; t < T; t++) {
        int first = seq_start[seq[t]];
        for (int h = 0; h < H; h++) {
            double s[T], max = -INFINITY, sum = 0;
            for (int j = first; j <= t; j++) {
                s[j] = 0;
                for (int i = 0; i < D; i++)
                    s[j] += (double)q[(t * H + h) * D + i] * (double)k[(j * KVH + h / 3) * D + i];
                s[j] *= (double)a.scale;
                max = fmax(max, s[j]);
            }
            for (int j = first; j <= t; j++) sum += s[j] = exp(s[j] - max);
            for (int i = 0; i < D; i++) {
                double o = 0;
                for (int j = first; j <= t; j++) o += s[j] / sum * (double)v[(j * KVH + h / 3) * D + i];
                // |v| < 1, scores below 9 with 11 roundings, exp 1.5 ulp twice, sums of 32, 3 blocks
                assert_true(fabs(o - (double)out[(t * H + h) * D + i]) <= 200 * 0x1p-24);
            }
        }
    }
    for (int t = 0; t < T; t++) {
        struct batch one = {.n_tokens = 1,
                            .n_seqs = 2,
                            .position = position + t,
                            .seq = seq + t,
                            .page_start = page_start,
                            .pages = pages};
        struct attention_args a1 = {&one, H, KVH, D, a.scale, q + t * H * D, &kv, again + t * H * D};
        ops_attention(&c, &a1);
    }
    assert_memory_equal(out, again, T * H * D * 4);
    close_ctx(&c);
    free(k), free(v), free(q), free(out), free(again), free(kp), free(vp);
}

static void test_fusion_text(void **state) {
    (void)state;
    uint32_t mask = 0;
    char text[256];
    struct error err;
    assert_true(fusion_parse("norm_qkv,attention", &mask, NULL));
    assert_int_equal(mask, 1u << FUSED_NORM_QKV | 1u << FUSED_ATTENTION);
    assert_string_equal(fusion_text(mask, text, sizeof text), "norm_qkv,attention");
    assert_true(fusion_parse("on", &mask, NULL) && mask == (1u << FUSED_COUNT) - 1);
    assert_string_equal(fusion_text(mask, text, sizeof text), "on");
    assert_true(fusion_parse("off", &mask, NULL) && mask == 0);
    mask = 5;
    assert_false(fusion_parse("norm_qkv,", &mask, &err));
    assert_false(fusion_parse("norm", &mask, &err) || mask != 5);
    assert_non_null(strstr(err.text, "down_residual"));
    assert_null(ops_cpu("mmx", &err));
    assert_non_null(strstr(err.text, "portable"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp32),   cmocka_unit_test(test_dot16_order), cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_rmsnorm), cmocka_unit_test(test_attention),   cmocka_unit_test(test_fusion_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
