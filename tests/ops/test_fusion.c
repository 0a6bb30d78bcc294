// The registry, the choice between a fused op and its composition, and what the compositions call and show, in order.
#include "helpers.h"

enum { HIDDEN = 48, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 64, FF = 72, VOCAB = 33, T = 5, PAGES = 2 };

struct log {
    char text[512];
};

static void watch(void *user, const char *name, int layer, const float *data, size_t n_rows, size_t n_columns) {
    struct log *log = user;
    size_t used = strlen(log->text);
    assert_int_equal(layer, 3);
    for (size_t i = 0; i < n_rows * n_columns; i++) assert_true(isfinite(data[i]));
    snprintf(log->text + used, sizeof log->text - used, "%s[%zu,%zu] ", name, n_rows, n_columns);
}

// A small layer's arguments. Every buffer that an op should write starts as NaN.
struct layer {
    struct batch batch;
    int32_t position[T], seq[T], page_start[2], pages[PAGES], rows[2];
    float *x, *normed, *q, *k, *v, *attn, *projected, *gate, *up, *logits, *head_rows, *norm, *cos_sin, *bias;
    float *wq, *wk, *wo, *wg, *wd, *wh, *kp, *vp;
    struct matrix mq, mk, mv, mo, mg, mu, md, mh;
    struct kv_layer kv;
};

static struct matrix matrix_of(float **data, size_t n_out, size_t n_in, uint32_t seed) {
    *data = random_floats(n_out * n_in, 0.3f, seed);
    return (struct matrix){"w", DTYPE_F32, n_out, n_in, n_in * sizeof(float), *data, NULL};
}

static void layer_open(struct layer *l) {
    memset(l, 0, sizeof *l);
    l->page_start[1] = PAGES;
    for (int t = 0; t < T; t++) l->position[t] = 30 + t;
    l->pages[0] = 1;
    l->rows[0] = 4, l->rows[1] = 1;
    l->batch = (struct batch){.n_tokens = T,
                              .n_seqs = 1,
                              .n_logit_rows = 2,
                              .position = l->position,
                              .seq = l->seq,
                              .page_start = l->page_start,
                              .pages = l->pages,
                              .logit_rows = l->rows};
    l->mq = matrix_of(&l->wq, HEADS * HEAD_DIM, HIDDEN, 1);
    l->mk = matrix_of(&l->wk, KV_HEADS * HEAD_DIM, HIDDEN, 2);
    l->mv = l->mk;
    l->mo = matrix_of(&l->wo, HIDDEN, HEADS * HEAD_DIM, 3);
    l->mg = matrix_of(&l->wg, FF, HIDDEN, 4);
    l->mu = l->mg;
    l->md = matrix_of(&l->wd, HIDDEN, FF, 5);
    l->mh = matrix_of(&l->wh, VOCAB, HIDDEN, 6);
    l->x = random_floats(T * HIDDEN, 1.0f, 7);
    l->norm = random_floats(HEADS * HEAD_DIM, 2.0f, 8);
    l->cos_sin = random_floats(T * HEAD_DIM, 1.0f, 9);
    l->bias = random_floats(HEADS * HEAD_DIM, 1.0f, 10);
    size_t slots = PAGES * KV_HEADS * KV_PAGE_TOKENS * HEAD_DIM;
    l->kp = random_floats(slots, 1.0f, 11); // positions below 30 hold something already
    l->vp = random_floats(slots, 1.0f, 12);
    l->kv = (struct kv_layer){DTYPE_F32, l->kp, l->vp, PAGES, KV_HEADS, HEAD_DIM};
    l->normed = nan_floats(T * HIDDEN);
    l->q = nan_floats(T * HEADS * HEAD_DIM);
    l->k = nan_floats(T * KV_HEADS * HEAD_DIM);
    l->v = nan_floats(T * KV_HEADS * HEAD_DIM);
    l->attn = nan_floats(T * HEADS * HEAD_DIM);
    l->projected = nan_floats(T * HIDDEN);
    l->gate = nan_floats(T * FF);
    l->up = nan_floats(T * FF);
    l->logits = nan_floats(2 * VOCAB);
    l->head_rows = nan_floats(2 * HIDDEN);
}

static void layer_close(struct layer *l) {
    float *all[] = {l->x,  l->normed, l->q,    l->k,       l->v,         l->attn, l->projected, l->gate,
                    l->up, l->logits, l->norm, l->cos_sin, l->head_rows, l->bias, l->wq,        l->wk,
                    l->wo, l->wg,     l->wd,   l->wh,      l->kp,        l->vp};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

static struct ops_limits limits(int n_threads) {
    return (struct ops_limits){T, 35, HEADS * HEAD_DIM, HEADS, HEAD_DIM, n_threads};
}

static void run_layer(struct op_ctx *c, struct layer *l, bool with_norms) {
    const float *bias = with_norms ? NULL : l->bias, *qk_norm = with_norms ? l->norm : NULL;
    ops_norm_qkv(c, &(struct norm_qkv_args){T, l->x, l->norm, 1e-6f, &l->mq, &l->mk, &l->mv, bias, bias, bias,
                                            l->normed, l->q, l->k, l->v, NULL});
    ops_qk_norm_rope_store(c, &(struct qk_norm_rope_store_args){&l->batch, HEADS, KV_HEADS, HEAD_DIM, qk_norm, qk_norm,
                                                                1e-6f, l->cos_sin, l->q, l->k, l->v, &l->kv});
    ops_attention(c,
                  &(struct attention_args){&l->batch, HEADS, KV_HEADS, HEAD_DIM, 0.125f, l->q, &l->kv, l->attn, NULL});
    ops_out_residual(c, &(struct proj_residual_args){T, l->attn, &l->mo, l->projected, l->x});
    ops_norm_gate_up(c, &(struct norm_gate_up_args){T, l->x, l->norm, 1e-6f, &l->mg, &l->mu, l->normed, l->gate, l->up,
                                                    l->gate, NULL});
    ops_down_residual(c, &(struct proj_residual_args){T, l->gate, &l->md, l->projected, l->x});
    ops_norm_head(
        c, &(struct norm_head_args){&l->batch, l->x, l->norm, 1e-6f, &l->mh, l->head_rows, l->normed, l->logits});
}

// What a composition shows, its names, order and shapes; a family without q/k norms shows none.
static void test_taps(void **state) {
    (void)state;
    static const char *const expected[] = {
        "attn_norm[5,48] q[5,256] k[5,128] v[5,128] q_rope[5,256] k_rope[5,128] attn[5,256] attn_out[5,48] "
        "mlp_norm[5,48] gate[5,72] up[5,72] act[5,72] mlp_out[5,48] final_norm[2,48] ",
        "attn_norm[5,48] q[5,256] k[5,128] v[5,128] q_norm[5,256] k_norm[5,128] q_rope[5,256] k_rope[5,128] "
        "attn[5,256] attn_out[5,48] mlp_norm[5,48] gate[5,72] up[5,72] act[5,72] mlp_out[5,48] final_norm[2,48] "};
    for (int with_norms = 0; with_norms < 2; with_norms++) {
        struct layer l;
        struct log log = {""};
        layer_open(&l);
        struct op_ctx c = open_ctx(ops_cpu("portable", NULL), limits(2), 0);
        c.tap = watch, c.tap_user = &log, c.layer = 3;
        run_layer(&c, &l, with_norms);
        assert_string_equal(log.text, expected[with_norms]);
        for (int i = 0; i < 2 * VOCAB; i++) assert_true(isfinite(l.logits[i]));
        close_ctx(&c);
        layer_close(&l);
    }
}

// K and V alone: the same ones, and q is neither written nor shown.
static void test_without_q(void **state) {
    (void)state;
    struct layer l, m;
    struct log log = {""};
    layer_open(&l);
    layer_open(&m);
    struct op_ctx c = open_ctx(ops_cpu("portable", NULL), limits(1), 0);
    run_layer(&c, &l, true);
    c.tap = watch, c.tap_user = &log, c.layer = 3;
    ops_norm_qkv(&c, &(struct norm_qkv_args){T, m.x, m.norm, 1e-6f, NULL, &m.mk, &m.mv, NULL, NULL, NULL, m.normed, m.q,
                                             m.k, m.v, NULL});
    ops_qk_norm_rope_store(&c, &(struct qk_norm_rope_store_args){&m.batch, 0, KV_HEADS, HEAD_DIM, m.norm, m.norm, 1e-6f,
                                                                 m.cos_sin, m.q, m.k, m.v, &m.kv});
    assert_string_equal(log.text, "attn_norm[5,48] k[5,128] v[5,128] k_norm[5,128] k_rope[5,128] ");
    size_t slots = PAGES * KV_HEADS * KV_PAGE_TOKENS * HEAD_DIM;
    assert_memory_equal(l.kp, m.kp, slots * sizeof(float));
    assert_memory_equal(l.vp, m.vp, slots * sizeof(float));
    for (int i = 0; i < T * HEADS * HEAD_DIM; i++) assert_true(isnan(m.q[i]));
    close_ctx(&c);
    layer_close(&l);
    layer_close(&m);
}

// The residual is added once, onto what x held; the composition is exactly its primitives, called by hand.
static void test_composition(void **state) {
    (void)state;
    struct layer l, m;
    layer_open(&l);
    layer_open(&m);
    struct op_ctx c = open_ctx(ops_cpu("portable", NULL), limits(1), 0);
    const struct ops *ops = c.ops;
    run_layer(&c, &l, true);
    ops->rmsnorm(&c, m.normed, m.x, m.norm, 1e-6f, T, HIDDEN);
    ops->matmul(&c, m.q, m.normed, &m.mq, T);
    ops->matmul(&c, m.k, m.normed, &m.mk, T);
    ops->matmul(&c, m.v, m.normed, &m.mv, T);
    ops->head_rmsnorm(&c, m.q, m.norm, 1e-6f, T, HEADS, HEAD_DIM);
    ops->head_rmsnorm(&c, m.k, m.norm, 1e-6f, T, KV_HEADS, HEAD_DIM);
    ops->rope(&c, m.q, m.cos_sin, T, HEADS, HEAD_DIM);
    ops->rope(&c, m.k, m.cos_sin, T, KV_HEADS, HEAD_DIM);
    ops->kv_store(&c, &m.kv, &m.batch, m.k, m.v);
    for (size_t i = 0; i < T * HEADS; i++) {
        size_t n_kv = (size_t)m.position[i / HEADS] + 1, head = i % HEADS / 2;
        float s[64], max[2], sum[2], o[2 * HEAD_DIM];
        ops->attn_scores(&c, s, m.q + i * HEAD_DIM, &m.kv, head, m.pages, n_kv, 0.125f);
        ops->attn_softmax(&c, s, max, sum, n_kv);
        ops->attn_values(&c, o, s, &m.kv, head, m.pages, n_kv);
        ops->attn_combine(&c, m.attn + i * HEAD_DIM, max, sum, o, (n_kv + 31) / 32, HEAD_DIM);
    }
    ops->matmul(&c, m.projected, m.attn, &m.mo, T);
    for (int i = 0; i < T * HIDDEN; i++) m.x[i] += m.projected[i];
    ops->rmsnorm(&c, m.normed, m.x, m.norm, 1e-6f, T, HIDDEN);
    ops->matmul(&c, m.gate, m.normed, &m.mg, T);
    ops->matmul(&c, m.up, m.normed, &m.mu, T);
    ops->silu_mul(&c, m.gate, m.gate, m.up, T * FF);
    ops->matmul(&c, m.projected, m.gate, &m.md, T);
    for (int i = 0; i < T * HIDDEN; i++) m.x[i] += m.projected[i];
    ops->gather(&c, m.head_rows, m.x, m.rows, 2, HIDDEN);
    ops->rmsnorm(&c, m.normed, m.head_rows, m.norm, 1e-6f, 2, HIDDEN);
    ops->matmul(&c, m.logits, m.normed, &m.mh, 2);
    assert_memory_equal(l.x, m.x, T * HIDDEN * sizeof(float));
    assert_memory_equal(l.logits, m.logits, 2 * VOCAB * sizeof(float));
    close_ctx(&c);
    layer_close(&l);
    layer_close(&m);
}

static int calls;

static void fused_out_residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    (void)ctx, (void)a;
    calls++;
}

// A backend's fused op runs when its own bit is set, and then alone; without one the bit changes nothing.
static void test_choice(void **state) {
    (void)state;
    struct layer l;
    layer_open(&l);
    struct op_ctx c = open_ctx(ops_cpu("portable", NULL), limits(1), 0);
    struct ops ops = *c.ops;
    ops.out_residual = fused_out_residual;
    assert_true(fusion_available(&ops, FUSED_OUT_RESIDUAL));
    assert_false(fusion_available(&ops, FUSED_STEP));
    c.ops = &ops;
    struct proj_residual_args a = {T, l.attn, &l.mo, l.projected, l.x};
    for (int i = 0; i < T * HEADS * HEAD_DIM; i++) l.attn[i] = 1.0f;
    ops_out_residual(&c, &a);
    assert_int_equal(calls, 0);
    assert_true(!isnan(l.projected[0]));
    l.projected[0] = NAN;
    c.fusion = ~(1u << FUSED_OUT_RESIDUAL);
    ops_out_residual(&c, &a);
    assert_int_equal(calls, 0);
    l.projected[0] = NAN;
    c.fusion = 1u << FUSED_OUT_RESIDUAL;
    ops_out_residual(&c, &a);
    assert_int_equal(calls, 1);
    assert_true(isnan(l.projected[0]));
    close_ctx(&c);
    layer_close(&l);
}

static void test_registry(void **state) {
    (void)state;
    for (int i = 0; i < FUSED_COUNT; i++) {
        const struct fusion_info *info = fusion_info((enum fused_op)i);
        uint32_t mask = 0;
        char text[64];
        assert_non_null(info->name);
        assert_non_null(info->primitives[0]);
        assert_true(fusion_parse(info->name, &mask, NULL));
        assert_int_equal(mask, 1u << i);
        assert_string_equal(fusion_text(mask, text, sizeof text), info->name);
        for (int j = 0; j < i; j++) assert_string_not_equal(info->name, fusion_info((enum fused_op)j)->name);
    }
    char small[6] = "zzzzz"; // a list that does not fit is cut, and ended
    assert_string_equal(fusion_text(3, small, sizeof small), "norm_");
    size_t n = 77;
    struct ops_limits l = {SIZE_MAX / 8, 1, 16, 1, 64, 1};
    assert_false(ops_scratch_floats(&l, &n) || n != 77);
    l = (struct ops_limits){1, SIZE_MAX / 4, 16, 1, 64, 8};
    assert_false(ops_scratch_floats(&l, &n) || n != 77);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_registry),    cmocka_unit_test(test_choice),    cmocka_unit_test(test_taps),
        cmocka_unit_test(test_composition), cmocka_unit_test(test_without_q),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
