// test_synthetic.c: models with random weights: every type's values have the scale that was asked for, the bytes depend
// on the name alone, and activations stay sane through all layers.
#include "model/synthetic.h"

#include "engine/engine.h"
#include "format/noise.h"
#include "model/names.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const char *const tiny[] = {"tiny-qwen3", "tiny-qwen2", "tiny-llama"};

static bool is_weight(int type) {
    return dtype_info((enum dtype)type)->is_weight;
}

static void noise_has_the_deviation_asked_for(void **state) {
    (void)state;
    enum { N = 1 << 16 };
    float *v = malloc(N * sizeof *v);
    unsigned char *row = malloc(N * sizeof(float));
    assert_true(v && row);
    for (int type = 0; type < DTYPE_COUNT; type++) {
        if (!is_weight(type)) continue;
        struct noise noise;
        noise_seed(&noise, 5, (uint64_t)type);
        noise_row(&noise, (enum dtype)type, row, N, 0.03f);
        dtype_to_f32((enum dtype)type, row, v, N);
        double sum = 0, squares = 0;
        for (int i = 0; i < N; i++) {
            assert_true(isfinite(v[i]));
            sum += (double)v[i];
            squares += (double)v[i] * (double)v[i];
        }
        double mean = sum / N, rms = sqrt(squares / N);
        if (fabs(mean) > 0.0012 || fabs(rms - 0.03) > 0.0018)
            fail_msg("%s: mean %g, rms %g, expected about 0 and 0.03", dtype_info((enum dtype)type)->name, mean, rms);
    }
    free(v);
    free(row);
}

static void bytes_depend_on_the_name_alone(void **state) {
    (void)state;
    struct pool *pool = pool_create(3, NULL);
    for (size_t i = 0; i < 3; i++) {
        for (int type = 0; type < DTYPE_COUNT; type++) {
            if (!is_weight(type)) continue;
            char name[96], other[96];
            struct error err = {0};
            snprintf(name, sizeof name, "synthetic:%s:%s:7", tiny[i], dtype_info((enum dtype)type)->name);
            snprintf(other, sizeof other, "synthetic:%s:%s:8", tiny[i], dtype_info((enum dtype)type)->name);
            struct model *a = model_synthetic(name, NULL, NULL, &err), *b = model_synthetic(name, pool, NULL, &err),
                         *c = model_synthetic(other, pool, NULL, &err);
            if (!a || !b || !c) fail_msg("%s", err.text);
            assert_int_equal(a->files.maps[0].size, b->files.maps[0].size);
            assert_memory_equal(a->files.maps[0].data, b->files.maps[0].data, a->files.maps[0].size);
            assert_int_not_equal(memcmp(a->embed.data, c->embed.data, a->embed.row_bytes), 0);
            assert_int_equal(a->layers[1].w_up.type, type);
            assert_int_not_equal(memcmp(a->layers[0].wk.data, a->layers[1].wk.data, a->layers[0].wk.row_bytes), 0);
            model_free(a);
            model_free(b);
            model_free(c);
        }
    }
    pool_free(pool);
}

struct seen {
    double rms[64];
    char names[64][24];
    size_t n;
};

static void see(void *user, const char *name, int layer, const float *data, size_t rows, size_t columns) {
    struct seen *s = user;
    double squares = 0;
    (void)layer;
    for (size_t i = 0; i < rows * columns; i++) squares += (double)data[i] * (double)data[i];
    if (s->n == 64) return;
    s->rms[s->n] = sqrt(squares / (double)(rows * columns));
    snprintf(s->names[s->n++], sizeof s->names[0], "%.20s", name);
}

static void activations_stay_sane(void **state) {
    (void)state;
    static const char *const types[] = {"bf16", "f16", "q8_0", "q4_0", "q4_k", "q6_k", "q2_k", "q3_k"};
    for (size_t i = 0; i < 3; i++) {
        for (size_t k = 0; k < sizeof types / sizeof types[0]; k++) {
            char name[96], text[512];
            struct error err = {0};
            snprintf(name, sizeof name, "synthetic:%s:%s", tiny[i], types[k]);
            tandem_engine *e = tandem_open(&(tandem_options){.model = name, .context = 64, .threads = 1}, text, 512);
            if (!e) fail_msg("%s", text);
            static const int32_t ids[] = {3, 14, 15, 92, 65, 35};
            struct seen s = {0};
            assert_true(engine_trace(e, ids, 6, 0, see, &s, &err));
            assert_true(s.n > 20);
            for (size_t n = 0; n < s.n; n++)
                if (!(s.rms[n] > 0.02 && s.rms[n] < 8)) fail_msg("%s: %s has RMS %g", name, s.names[n], s.rms[n]);
            tandem_close(e);
        }
    }
}

static void published_shapes(void **state) {
    (void)state;
    struct model_config c;
    assert_true(synthetic_config("qwen3-0.6b", &c, NULL));
    assert_int_equal(c.n_layers * (c.hidden * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads) + 3 * c.hidden * c.n_ff),
                     440401920); // matrices of all layers
    assert_true(c.tied && c.qk_norm && !c.qkv_bias && c.n_vocab == 151936 && c.rope.theta == 1e6);
    assert_true(synthetic_config("qwen3-8b", &c, NULL));
    assert_true(!c.tied && c.hidden == 4096 && c.n_layers == 36 && c.n_ff == 12288);
}

static void mixes_are_those_of_quantize(void **state) {
    (void)state;
    struct error err = {0};
    struct model *m = model_synthetic("synthetic:tiny-qwen3:q4_k_m", NULL, NULL, &err);
    if (!m) fail_msg("%s", err.text);
    assert_int_equal(m->embed.type, DTYPE_Q6_K); // the head's
    assert_int_equal(m->layers[0].w_up.type, DTYPE_Q4_K);
    assert_int_equal(m->layers[2].w_down.type, DTYPE_Q6_K);
    model_free(m);
    m = model_synthetic("synthetic:tiny-llama:q4_0", NULL, NULL, &err);
    if (!m) fail_msg("%s", err.text);
    assert_int_equal(m->head.type, DTYPE_Q4_0); // a plain type is every matrix's
    model_free(m);
}

static void names_are_checked(void **state) {
    (void)state;
    static const struct {
        const char *name, *says;
    } bad[] = {
        {"synthetic:qwen9", "expected one of qwen3-0.6b"},
        {"synthetic:tiny-qwen3:q9", "type \"q9\": expected one of f32"},
        {"synthetic:tiny-qwen3:i32", "type \"i32\""},
        {"synthetic:tiny-qwen3:bf16:x", "seed"},
        {"synthetic:tiny-qwen3:bf16:1:2", "expected synthetic:SHAPE"},
        {"synthetic:", "synthetic shape \"\""},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct error err = {0};
        assert_null(model_synthetic(bad[i].name, NULL, NULL, &err));
        if (!strstr(err.text, bad[i].says)) fail_msg("%s: %s", bad[i].name, err.text);
    }
}

static void names_go_both_ways(void **state) {
    (void)state;
    for (int kind = MODEL_FOLDER; kind <= MODEL_GGUF; kind++) {
        for (int part = 0; part < PART_COUNT; part++) {
            char name[WEIGHT_NAME_SIZE];
            enum weight_part found;
            size_t layer;
            weight_name((enum model_kind)kind, (enum weight_part)part, 27, name, sizeof name);
            assert_true(weight_from_name((enum model_kind)kind, name, &found, &layer));
            assert_int_equal(found, part);
            assert_int_equal(layer, weight_is_layered((enum weight_part)part) ? 27 : 0);
        }
        enum weight_part part;
        size_t layer;
        assert_false(weight_from_name((enum model_kind)kind, "rope_freqs.weight", &part, &layer));
        assert_false(weight_from_name((enum model_kind)kind, "blk.01.attn_q.weight", &part, &layer));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(noise_has_the_deviation_asked_for),
        cmocka_unit_test(bytes_depend_on_the_name_alone),
        cmocka_unit_test(activations_stay_sane),
        cmocka_unit_test(published_shapes),
        cmocka_unit_test(mixes_are_those_of_quantize),
        cmocka_unit_test(names_are_checked),
        cmocka_unit_test(names_go_both_ways),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
