// The model stage: healthy models pass; a mistake in one layer of the plain or of the fused path is found there; and
// logits that are wrong at the end of right layers are found too.
#include "helpers.h"

static const struct ops *right; // the table that the wrong ones are made from; set by each test
static struct ops wrong;

static struct clinic open_wrong(void) {
    struct clinic c = open_clinic("synthetic:tiny-qwen3", 1u << STAGE_MODEL);
    right = c.doctor->ops;
    wrong = *right;
    wrong.name = "cpu/wrong";
    c.doctor->ops = &wrong;
    return c;
}

static void healthy_models_pass(void **state) {
    (void)state;
    static const char *const models[] = {"synthetic:tiny-qwen3",      "synthetic:tiny-qwen2",
                                         "synthetic:tiny-llama",      "synthetic:tiny-llama:f16",
                                         "synthetic:tiny-qwen2:q4_0", "synthetic:tiny-qwen3:q6_k"};
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        struct clinic c = open_clinic(models[i], 1u << STAGE_MODEL);
        c.doctor->options.budget = 30;
        examine(&c);
        expect_healthy(&c);
        assert_true(c.report->stages[STAGE_MODEL].n_figures >= 8);
        assert_non_null(strstr(buffer_text(&c.report->stages[STAGE_MODEL].summary), "3 layers judged"));
        close_clinic(&c);
    }
}

static void trained_logits_err_by_less_than_half_of_h(void **state) {
    (void)state;
    struct clinic c = open_clinic("models/tandem-tiny", 1u << STAGE_MODEL);
    c.doctor->options.budget = 20;
    examine(&c);
    expect_healthy(&c);
    const struct stage_report *s = &c.report->stages[STAGE_MODEL];
    double ours = NAN, theirs = NAN, kl = NAN, kl_h = NAN;
    for (size_t i = 0; i < s->n_figures; i++) {
        if (strcmp(s->figures[i].name, "logits_rms_error") == 0) ours = s->figures[i].value;
        if (strcmp(s->figures[i].name, "logits_rms_error_h") == 0) theirs = s->figures[i].value;
        if (strcmp(s->figures[i].name, "kl_mean") == 0) kl = s->figures[i].value;
        if (strcmp(s->figures[i].name, "kl_mean_h") == 0) kl_h = s->figures[i].value;
    }
    assert_true(ours < 0.5 * theirs);
    assert_true(kl < 0.25 * kl_h);
    close_clinic(&c);
}

// The last layer's SwiGLU, on the plain path only, by one value: the other layers' inputs are right.
static void silu_of_the_last_layer(const struct op_ctx *ctx, float *act, const float *gate, const float *up, size_t n) {
    right->silu_mul(ctx, act, gate, up, n);
    if (ctx->layer == 2) act[n - 1] *= 1.0001f;
}

static void one_value_in_one_layer(void **state) {
    (void)state;
    struct clinic c = open_wrong();
    wrong.silu_mul = silu_of_the_last_layer;
    wrong.norm_gate_up = NULL;
    examine(&c);
    expect_fault(&c, "silu_mul", 2);
    assert_int_equal(c.report->first.channel, 511);
    close_clinic(&c);
}

static void fused_attention_of_one_head(const struct op_ctx *ctx, const struct attention_args *a) {
    right->attention(ctx, a);
    size_t n = a->batch->n_tokens;
    if (ctx->layer == 1) a->out[((n - 1) * a->n_heads + 3) * a->head_dim + 9] += 0.25f;
}

static void one_head_of_a_fused_op(void **state) {
    (void)state;
    struct clinic c = open_wrong();
    wrong.attention = fused_attention_of_one_head;
    examine(&c);
    expect_fault(&c, "attention", 1);
    assert_int_equal(c.report->first.head, 3);
    assert_int_equal(c.report->first.channel, 9);
    assert_int_equal(c.report->first.kind, FAULT_FUSED);
    assert_true(fabs(c.report->first.found - c.report->first.expected - 0.25) < 1e-3);
    close_clinic(&c);
}

// Right layers, wrong weights: every op does what it is told, and only whole runs against T can tell.
static void weights_of_another_layer(void **state) {
    (void)state;
    struct clinic c = open_clinic("synthetic:tiny-qwen3", 1u << STAGE_MODEL);
    c.doctor->model->layers[1].w_up = c.doctor->model->layers[2].w_up;
    examine(&c);
    expect_fault(&c, NULL, -2);
    assert_int_equal(c.report->first.kind, FAULT_LOGITS);
    close_clinic(&c);
}

static void nan_in_the_logits(const struct op_ctx *ctx, const struct norm_head_args *a) {
    right->norm_head(ctx, a);
    a->logits[a->batch->n_logit_rows * a->head->n_out - 5] = NAN;
}

static void a_logit_that_is_nan(void **state) {
    (void)state;
    struct clinic c = open_wrong();
    wrong.norm_head = nan_in_the_logits;
    examine(&c);
    expect_fault(&c, "norm_head", -1);
    close_clinic(&c);
}

static void rope_theta_of_another_model(void **state) {
    (void)state;
    struct clinic c = open_clinic("synthetic:tiny-qwen3", 1u << STAGE_MODEL);
    for (size_t i = 0; i < 32; i++) c.doctor->model->inv_freq[i] = pow(10000, -(double)i / 32);
    examine(&c);
    expect_fault(&c, "rope", 0);
    close_clinic(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(healthy_models_pass),         cmocka_unit_test(trained_logits_err_by_less_than_half_of_h),
        cmocka_unit_test(one_value_in_one_layer),      cmocka_unit_test(one_head_of_a_fused_op),
        cmocka_unit_test(weights_of_another_layer),    cmocka_unit_test(a_logit_that_is_nan),
        cmocka_unit_test(rope_theta_of_another_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
