// The ops stage: healthy ops pass, and a table with one wrong op in it does not, whatever is wrong with it.
#include "helpers.h"
#include "ops/kv_page.h"

static const struct ops *right; // the table that the wrong ones are made from; set by each test

static struct clinic open_ops(const char *model, struct ops *wrong) {
    struct clinic c = open_clinic(model, 1u << STAGE_OPS);
    right = c.doctor->ops;
    *wrong = *right;
    wrong->name = "cpu/wrong";
    c.doctor->ops = wrong;
    return c;
}

static void healthy_ops_pass(void **state) {
    (void)state;
    static const char *const models[] = {"synthetic:tiny-qwen3", "synthetic:tiny-qwen2:f16",
                                         "synthetic:tiny-llama:q8_0"};
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        struct clinic c = open_clinic(models[i], 1u << STAGE_OPS);
        examine(&c);
        expect_healthy(&c);
        assert_true(c.report->stages[STAGE_OPS].n_checks > 1000);
        close_clinic(&c);
    }
}

static void portable_passes(void **state) {
    (void)state;
    struct error err = {0};
    struct clinic c = open_clinic("synthetic:tiny-qwen3", 1u << STAGE_OPS);
    c.doctor->ops = ops_cpu("portable", &err);
    assert_non_null(c.doctor->ops);
    examine(&c);
    expect_healthy(&c);
    close_clinic(&c);
}

// Every instruction set that ops_cpu can name is one that the stage tries.
static void every_instruction_set_is_known(void **state) {
    (void)state;
    struct error err = {0};
    assert_null(ops_cpu("none", &err));
    const char *list = strstr(err.text, "one of ");
    assert_non_null(list);
    static const char known[] = " auto, portable, avx2, avx512, avx512bf16, avx512vnni, avx10, amx, neon,";
    char name[32], pattern[40];
    int n = 0;
    for (const char *at = list + 7; sscanf(at, "%31[a-z0-9]%n", name, &n) == 1; at += at[0] == ',' ? 2 : 0) {
        snprintf(pattern, sizeof pattern, " %s,", name);
        if (!strstr(known, pattern)) fail_msg("the ops stage does not know instruction set %s", name);
        at += n;
        if (*at != ',') break;
    }
}

// ---- Wrong primitives: nothing else replaces them ------------------------------------------------------------------

static void one_wrong(const char *op, int layer, void (*spoil)(struct ops *)) {
    struct ops wrong;
    struct clinic c = open_ops("synthetic:tiny-qwen3", &wrong);
    spoil(&wrong);
    examine(&c);
    expect_fault(&c, op, layer);
    close_clinic(&c);
}

static void only_primitives(struct ops *o) {
    o->norm_qkv = NULL;
    o->qk_norm_rope_store = NULL;
    o->attention = NULL;
    o->out_residual = NULL;
    o->norm_gate_up = NULL;
    o->down_residual = NULL;
    o->norm_head = NULL;
}

static void rmsnorm_without_eps(const struct op_ctx *ctx, float *y, const float *x, const float *w, float eps,
                                size_t n_rows, size_t n) {
    (void)eps;
    right->rmsnorm(ctx, y, x, w, 1e-12f, n_rows, n);
}
static void spoil_eps(struct ops *o) {
    only_primitives(o);
    o->rmsnorm = rmsnorm_without_eps;
}
static void eps_is_missing(void **state) {
    (void)state;
    one_wrong("rmsnorm", 0, spoil_eps);
}

// Rounds before the weight, as Hugging Face does: H's own error, so that only the strict bound can tell.
static void rmsnorm_in_hf_order(const struct op_ctx *ctx, float *y, const float *x, const float *w, float eps,
                                size_t n_rows, size_t n) {
    float one[1024];
    assert_true(n <= 1024);
    for (size_t i = 0; i < 1024; i++) one[i] = 1;
    right->rmsnorm(ctx, y, x, one, eps, n_rows, n);
    for (size_t i = 0; i < n_rows * n; i++) y[i] = bf16_to_f32(bf16_from_f32(y[i])) * w[i % n];
}
static void spoil_order(struct ops *o) {
    only_primitives(o);
    o->rmsnorm = rmsnorm_in_hf_order;
}
static void norm_order(void **state) {
    (void)state;
    one_wrong("rmsnorm", 0, spoil_order);
}

static void matmul_without_last(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w,
                                size_t n_tokens) {
    right->matmul(ctx, y, x, w, n_tokens);
    if (ctx->layer != 2) return;
    double last = (double)x[w->n_in - 1];
    y[w->n_out - 1] -= (float)(last * (double)bf16_to_f32(((const uint16_t *)w->data)[w->n_out * w->n_in - 1]));
}
static void spoil_matmul(struct ops *o) {
    only_primitives(o);
    o->matmul = matmul_without_last;
}
static void one_term_of_one_element_is_missing(void **state) {
    (void)state;
    one_wrong("matmul", 2, spoil_matmul);
}

static void rope_back(const struct op_ctx *ctx, float *x, const float *cos_sin, size_t n_tokens, size_t n_heads,
                      size_t head_dim) {
    float *turned = calloc(n_tokens * head_dim, sizeof *turned);
    assert_non_null(turned);
    for (size_t i = 0; i < n_tokens * head_dim; i++) turned[i] = i % head_dim < head_dim / 2 ? cos_sin[i] : -cos_sin[i];
    right->rope(ctx, x, turned, n_tokens, n_heads, head_dim);
    free(turned);
}
static void spoil_rope(struct ops *o) {
    only_primitives(o);
    o->rope = rope_back;
}
static void rope_turns_the_wrong_way(void **state) {
    (void)state;
    one_wrong("rope", 0, spoil_rope);
}

static void kv_store_one_late(const struct op_ctx *ctx, struct kv_layer *kv, const struct batch *b, const float *k,
                              const float *v) {
    right->kv_store(ctx, kv, b, k, v);
    for (size_t t = 0; t < b->n_tokens; t++) {
        int32_t p = b->position[t] + 1;
        if (p % KV_PAGE_TOKENS == 0) continue;
        size_t page = (size_t)b->pages[b->page_start[b->seq[t]] + p / KV_PAGE_TOKENS];
        ((uint16_t *)kv->v)[(page * kv->n_kv_heads * KV_PAGE_TOKENS + (size_t)p % KV_PAGE_TOKENS) * kv->head_dim] = 0;
    }
}
static void spoil_store(struct ops *o) {
    only_primitives(o);
    o->kv_store = kv_store_one_late;
}
static void a_slot_too_many_is_written(void **state) {
    (void)state;
    one_wrong("kv_store", 0, spoil_store);
}

// Every type of KV is healthy, and a mistake in the rounding of one is found.
static void other_kv_types_pass(void **state) {
    (void)state;
    static const enum dtype types[] = {DTYPE_F32, DTYPE_F16, DTYPE_Q8_0, DTYPE_FP8};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        struct clinic c = open_clinic("synthetic:tiny-qwen3", 1u << STAGE_OPS | 1u << STAGE_MODEL);
        c.doctor->kv_type = types[i];
        assert_true(kv_type_fits(types[i], c.doctor->model->config.head_dim, NULL, NULL));
        examine(&c);
        expect_healthy(&c);
        close_clinic(&c);
    }
}

// Q8_0 with a scale for 64 channels: the second block of each pair takes the first one's.
static void kv_store_shared_scale(const struct op_ctx *ctx, struct kv_layer *kv, const struct batch *b, const float *k,
                                  const float *v) {
    right->kv_store(ctx, kv, b, k, v);
    for (size_t t = 0; t < b->n_tokens; t++) {
        size_t p = (size_t)b->position[t],
               page = (size_t)b->pages[(size_t)b->page_start[b->seq[t]] + p / KV_PAGE_TOKENS];
        unsigned char *head = (unsigned char *)kv->v + kv_head_at(kv, page, 0);
        memcpy(head + kv_scale_at(1, p % KV_PAGE_TOKENS), head + kv_scale_at(0, p % KV_PAGE_TOKENS), 2);
    }
}
static void spoil_scale(struct ops *o) {
    only_primitives(o);
    o->kv_store = kv_store_shared_scale;
}
static void a_shared_kv_scale_is_found(void **state) {
    (void)state;
    struct ops wrong;
    struct clinic c = open_ops("synthetic:tiny-qwen3", &wrong);
    c.doctor->kv_type = DTYPE_Q8_0;
    spoil_scale(&wrong);
    examine(&c);
    expect_fault(&c, "kv_store", 0);
    close_clinic(&c);
}

static void silu_is_gelu(const struct op_ctx *ctx, float *act, const float *gate, const float *up, size_t n) {
    (void)ctx;
    for (size_t i = 0; i < n; i++) act[i] = 0.5f * gate[i] * (1 + erff(gate[i] * 0.70710678f)) * up[i];
}
static void spoil_silu(struct ops *o) {
    only_primitives(o);
    o->silu_mul = silu_is_gelu;
}
static void gelu_for_silu(void **state) {
    (void)state;
    one_wrong("silu_mul", 0, spoil_silu);
}

static void combine_halves(const struct op_ctx *ctx, float *out, const float *block_max, const float *block_sum,
                           const float *o, size_t n_blocks, size_t head_dim) {
    right->attn_combine(ctx, out, block_max, block_sum, o, n_blocks, head_dim);
    if (n_blocks > 64) out[0] *= 1.001f; // a silent limit of 2,048 positions
}
static void spoil_combine(struct ops *o) {
    only_primitives(o);
    o->attn_combine = combine_halves;
}
static void long_contexts_are_wrong(void **state) {
    (void)state;
    one_wrong("attention", 0, spoil_combine);
}

// ---- Wrong fused ops -----------------------------------------------------------------------------------------------

static void residual_is_lost(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    if (ctx->layer == 1) ctx->ops->matmul(ctx, a->x, a->in, a->w, a->n_tokens);
    else right->out_residual(ctx, a);
}
static void spoil_residual(struct ops *o) {
    o->out_residual = residual_is_lost;
}
static void lost_residual(void **state) {
    (void)state;
    one_wrong("out_residual", 1, spoil_residual);
}

static void tail_of_tile(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    right->norm_gate_up(ctx, a);
    if (a->n_tokens == 7) a->act[6 * a->w_gate->n_out + 3] = 0;
}
static void spoil_tile(struct ops *o) {
    o->norm_gate_up = tail_of_tile;
}
static void one_token_count_is_wrong(void **state) {
    (void)state;
    one_wrong("norm_gate_up", 0, spoil_tile);
}

static void pages_in_order(const struct op_ctx *ctx, const struct attention_args *a) {
    int32_t pages[64];
    struct batch b = *a->batch;
    struct attention_args straight = *a;
    for (int32_t i = 0; i < b.page_start[b.n_seqs] && i < 64; i++) pages[i] = i; // as a first request would have it
    if (b.page_start[b.n_seqs] < 64) b.pages = pages;
    straight.batch = &b;
    right->attention(ctx, &straight);
}
static void spoil_pages(struct ops *o) {
    o->attention = pages_in_order;
}
static void page_table_is_ignored(void **state) {
    (void)state;
    one_wrong("attention", 0, spoil_pages);
}

static void neighbours_row(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    right->norm_qkv(ctx, a);
    if (a->n_tokens < 2) return;
    memcpy(a->v + (a->n_tokens - 1) * a->wv->n_out, a->v + (a->n_tokens - 2) * a->wv->n_out, 4);
}
static void spoil_row(struct ops *o) {
    o->norm_qkv = neighbours_row;
}
static void a_neighbours_row_is_used(void **state) {
    (void)state;
    one_wrong("norm_qkv", 0, spoil_row);
}

static void rows_of_logits(const struct op_ctx *ctx, const struct norm_head_args *a) {
    struct batch b = *a->batch;
    int32_t rows[64];
    for (size_t i = 0; i < b.n_logit_rows && i < 64; i++) rows[i] = b.logit_rows[i] > 0 ? b.logit_rows[i] - 1 : 0;
    b.logit_rows = rows;
    struct norm_head_args shifted = *a;
    shifted.batch = &b;
    right->norm_head(ctx, &shifted);
}
static void spoil_head(struct ops *o) {
    o->norm_head = rows_of_logits;
}
static void logits_of_the_wrong_row(void **state) {
    (void)state;
    one_wrong("norm_head", -1, spoil_head);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(healthy_ops_pass),
        cmocka_unit_test(portable_passes),
        cmocka_unit_test(every_instruction_set_is_known),
        cmocka_unit_test(eps_is_missing),
        cmocka_unit_test(norm_order),
        cmocka_unit_test(one_term_of_one_element_is_missing),
        cmocka_unit_test(rope_turns_the_wrong_way),
        cmocka_unit_test(other_kv_types_pass),
        cmocka_unit_test(a_shared_kv_scale_is_found),
        cmocka_unit_test(a_slot_too_many_is_written),
        cmocka_unit_test(gelu_for_silu),
        cmocka_unit_test(long_contexts_are_wrong),
        cmocka_unit_test(lost_residual),
        cmocka_unit_test(one_token_count_is_wrong),
        cmocka_unit_test(page_table_is_ignored),
        cmocka_unit_test(a_neighbours_row_is_used),
        cmocka_unit_test(logits_of_the_wrong_row),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
