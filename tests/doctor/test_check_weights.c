// The weights stage: healthy models pass, and whatever the model reads instead of the file's values is found.
#include "helpers.h"

static const char *const tiny = "synthetic:tiny-qwen3";

static struct clinic open_tiny(const char *model) {
    return open_clinic(model, 1u << STAGE_WEIGHTS);
}

static void healthy_models_pass(void **state) {
    (void)state;
    static const char *const models[] = {"synthetic:tiny-qwen3", "synthetic:tiny-qwen2", "synthetic:tiny-llama:q4_k",
                                         "synthetic:tiny-qwen3:f16", "models/tandem-tiny"};
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        struct clinic c = open_tiny(models[i]);
        examine(&c);
        expect_healthy(&c);
        assert_true(c.report->stages[STAGE_WEIGHTS].n_checks > 90);
        close_clinic(&c);
    }
}

static void a_bias_that_the_file_never_had(void **state) {
    (void)state;
    struct clinic c = open_tiny(tiny);
    float garbage[1024] = {1e29f};
    c.doctor->model->layers[1].bk = garbage;
    examine(&c);
    expect_fault(&c, "norm_qkv", 1);
    assert_string_equal(c.report->first.tensor, "model.layers.1.self_attn.k_proj.bias");
    assert_non_null(strstr(c.report->first.message, "nowhere"));
    close_clinic(&c);
}

static void a_bias_that_was_forgotten(void **state) {
    (void)state;
    struct clinic c = open_tiny("synthetic:tiny-qwen2");
    c.doctor->model->layers[2].bq = NULL;
    examine(&c);
    expect_fault(&c, "norm_qkv", 2);
    assert_non_null(strstr(c.report->first.message, "not bound"));
    close_clinic(&c);
}

static void another_layers_norm(void **state) {
    (void)state;
    struct clinic c = open_tiny(tiny);
    c.doctor->model->layers[2].mlp_norm = c.doctor->model->layers[0].mlp_norm;
    examine(&c);
    expect_fault(&c, "norm_gate_up", 2);
    assert_non_null(strstr(c.report->first.message, "model.layers.0.post_attention_layernorm.weight"));
    close_clinic(&c);
}

static void swapped_head_norms(void **state) {
    (void)state;
    struct clinic c = open_tiny(tiny);
    struct layer_weights *w = &c.doctor->model->layers[0];
    const float *q = w->q_norm;
    w->q_norm = w->k_norm;
    w->k_norm = q;
    examine(&c);
    expect_fault(&c, "qk_norm_rope_store", 0);
    assert_int_equal(c.report->stages[STAGE_WEIGHTS].n_faults, 2);
    close_clinic(&c);
}

static void one_wrong_value_in_a_norm(void **state) {
    (void)state;
    struct clinic c = open_tiny(tiny);
    float norm[256];
    memcpy(norm, c.doctor->model->final_norm, sizeof norm);
    norm[200] = nextafterf(norm[200], 10);
    c.doctor->model->final_norm = norm;
    examine(&c);
    expect_fault(&c, "norm_head", -1);
    assert_int_equal(c.report->first.channel, 200);
    close_clinic(&c);
}

static void swapped_matrices(void **state) {
    (void)state;
    struct clinic c = open_tiny(tiny);
    struct layer_weights *w = &c.doctor->model->layers[1];
    struct matrix gate = w->w_gate;
    w->w_gate = w->w_up;
    w->w_up = gate;
    examine(&c);
    expect_fault(&c, "norm_gate_up", 1);
    assert_non_null(strstr(c.report->first.message, "up_proj"));
    close_clinic(&c);
}

static void rows_begin_one_element_late(void **state) {
    (void)state;
    struct clinic c = open_tiny(tiny);
    struct matrix *w = &c.doctor->model->layers[1].w_down;
    w->data = (const unsigned char *)w->data + 2;
    examine(&c);
    expect_fault(&c, "down_residual", 1);
    close_clinic(&c);
}

static void a_tied_head_that_is_not(void **state) {
    (void)state;
    struct clinic c = open_tiny(tiny);
    c.doctor->model->head = c.doctor->model->layers[0].w_gate;
    examine(&c);
    expect_fault(&c, "norm_head", -1);
    close_clinic(&c);
}

static void theta_of_another_model(void **state) {
    (void)state;
    struct clinic c = open_tiny(tiny);
    for (size_t i = 0; i < 32; i++) c.doctor->model->inv_freq[i] = pow(10000, -(double)i / 32);
    examine(&c);
    expect_fault(&c, "rope", -1);
    assert_int_equal(c.report->first.channel, 1);
    close_clinic(&c);
}

static void nan_and_inf_are_faults(void **state) {
    (void)state;
    struct clinic c = open_tiny(tiny);
    const struct matrix *w = &c.doctor->model->layers[2].wv;
    uint16_t *values = (uint16_t *)(uintptr_t)w->data; // of a synthetic model: ours to spoil
    values[5 * w->n_in + 7] = 0x7FC0;
    values[9 * w->n_in] = 0xFF80;
    examine(&c);
    expect_fault(&c, "norm_qkv", 2);
    assert_int_equal(c.report->first.channel, 5);
    assert_non_null(strstr(c.report->first.message, "1 NaN and 1 Inf"));
    close_clinic(&c);
}

static void large_and_empty_values_are_named_only(void **state) {
    (void)state;
    struct clinic c = open_tiny(tiny);
    const struct matrix *w = &c.doctor->model->layers[2].wv;
    memset((unsigned char *)(uintptr_t)w->data + 3 * w->row_bytes, 0, 2 * w->row_bytes);
    examine(&c);
    expect_healthy(&c);
    assert_non_null(strstr(buffer_text(&c.report->stages[STAGE_WEIGHTS].notes), "2 of"));
    close_clinic(&c);
}

static void what_does_not_load_is_a_fault(void **state) {
    (void)state;
    char folder[] = "/tmp/tandem-check-XXXXXX", path[128];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/config.json", folder);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs("{\"architectures\": [\"Nobody\"]}", f);
    fclose(f);
    struct clinic c = open_tiny(folder);
    examine(&c);
    expect_fault(&c, "model_load", -1);
    assert_int_equal(c.report->first.kind, FAULT_LOAD);
    close_clinic(&c);
    remove(path);
    remove(folder);
}

static void stage_lists(void **state) {
    (void)state;
    struct error err = {0};
    uint32_t mask;
    assert_true(doctor_stages_parse("serving,weights", &mask, &err));
    assert_int_equal(mask, 1u << STAGE_SERVING | 1u << STAGE_WEIGHTS);
    assert_false(doctor_stages_parse("weights,", &mask, &err));
    assert_false(doctor_stages_parse("weight", &mask, &err));
    assert_non_null(strstr(err.text, "weight"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(healthy_models_pass),
        cmocka_unit_test(a_bias_that_the_file_never_had),
        cmocka_unit_test(a_bias_that_was_forgotten),
        cmocka_unit_test(another_layers_norm),
        cmocka_unit_test(swapped_head_norms),
        cmocka_unit_test(one_wrong_value_in_a_norm),
        cmocka_unit_test(swapped_matrices),
        cmocka_unit_test(rows_begin_one_element_late),
        cmocka_unit_test(a_tied_head_that_is_not),
        cmocka_unit_test(theta_of_another_model),
        cmocka_unit_test(nan_and_inf_are_faults),
        cmocka_unit_test(large_and_empty_values_are_named_only),
        cmocka_unit_test(what_does_not_load_is_a_fault),
        cmocka_unit_test(stage_lists),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
