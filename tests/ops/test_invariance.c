// A sequence's bits do not depend on how its tokens are cut into steps, on its neighbours, on its pages, on threads, on
// fusion or on the instruction set: a whole layer over two sequences, in many schedules, against each sequence run
// alone and whole by the portable standard path. Every slot and buffer that a step should not read is NaN.
#include "helpers.h"

enum { HIDDEN = 112, FF = 83, VOCAB = 37, LONG = 101, SHORT = 46, PAGES = 9, MAX_POS = 128 };

struct shape {
    size_t n_heads, n_kv_heads, head_dim;
    enum dtype weights, kv;
    bool qk_norm, bias;
};

static const struct shape shapes[] = {
    {6, 2, 64, DTYPE_BF16, DTYPE_BF16, true, false}, {3, 3, 80, DTYPE_F32, DTYPE_F32, true, false},
    {5, 1, 96, DTYPE_BF16, DTYPE_F32, false, true},  {4, 2, 128, DTYPE_F16, DTYPE_Q8_0, true, false},
    {2, 1, 256, DTYPE_BF16, DTYPE_BF16, true, true},
};

enum { WQ, WK, WV, WO, WG, WU, WD, WH, N_MATRICES };

struct model {
    struct shape shape;
    struct matrix w[N_MATRICES];
    void *data[N_MATRICES];
    float *norm, *bias, *cos_sin; // [1024], [1024], [MAX_POS, head_dim]
    float *input[2];              // [LONG or SHORT, HIDDEN]
};

static const size_t lengths[2] = {LONG, SHORT};

static void matrix_open(struct model *m, int i, size_t n_out, size_t n_in) {
    float *values = random_floats(n_out * n_in, 0.2f, (uint32_t)i + 100);
    size_t size = m->shape.weights == DTYPE_F32 ? 4 : 2;
    void *data = checked_alloc(n_out * n_in, size);
    for (size_t k = 0; k < n_out * n_in; k++) {
        if (size == 4) ((float *)data)[k] = values[k];
        if (m->shape.weights == DTYPE_BF16) ((uint16_t *)data)[k] = bf16_from_f32(values[k]);
        if (m->shape.weights == DTYPE_F16) ((uint16_t *)data)[k] = f16_from_f32(values[k]);
    }
    free(values);
    m->data[i] = data;
    m->w[i] = (struct matrix){"w", m->shape.weights, n_out, n_in, n_in * size, data, NULL};
}

static void model_open(struct model *m, struct shape s) {
    m->shape = s;
    size_t q = s.n_heads * s.head_dim, kv = s.n_kv_heads * s.head_dim;
    matrix_open(m, WQ, q, HIDDEN);
    matrix_open(m, WK, kv, HIDDEN);
    matrix_open(m, WV, kv, HIDDEN);
    matrix_open(m, WO, HIDDEN, q);
    matrix_open(m, WG, FF, HIDDEN);
    matrix_open(m, WU, FF, HIDDEN);
    matrix_open(m, WD, HIDDEN, FF);
    matrix_open(m, WH, VOCAB, HIDDEN);
    m->norm = random_floats(1024, 2.0f, 1);
    m->norm[5] = 128.0f;
    m->bias = random_floats(1024, 1.0f, 2);
    m->cos_sin = random_floats(MAX_POS * s.head_dim, 1.0f, 3);
    for (uint32_t i = 0; i < 2; i++) {
        m->input[i] = random_floats(lengths[i] * HIDDEN, 2.0f, 4 + i);
        m->input[i][11] = 900.0f; // one hot channel
        m->input[i][12] = 1e-41f; // one subnormal
    }
}

static void model_close(struct model *m) {
    for (int i = 0; i < N_MATRICES; i++) free(m->data[i]);
    free(m->norm), free(m->bias), free(m->cos_sin), free(m->input[0]), free(m->input[1]);
}

// A run's settings and what it gave.
struct trial {
    const char *isa;
    uint32_t fusion;
    int n_threads;
    size_t chunk[2];   // tokens of each sequence per step, 0: the sequence takes no part
    int32_t page_step; // page of the i-th request for a page: i * page_step % PAGES
    float *x[2], *logits[2];
};

struct buffers {
    float *x, *normed, *q, *k, *v, *attn, *projected, *gate, *up, *rows, *logits, *cos_sin;
};

static void run_step(struct op_ctx *c, const struct model *m, const struct batch *b, struct kv_layer *kv,
                     const struct buffers *f) {
    const struct shape *s = &m->shape;
    const float *bias = s->bias ? m->bias : NULL, *qk = s->qk_norm ? m->norm : NULL;
    size_t n = b->n_tokens;
    const float eps = 1e-6f;
    ops_norm_qkv(c, &(struct norm_qkv_args){n, f->x, m->norm, eps, &m->w[WQ], &m->w[WK], &m->w[WV], bias, bias, bias,
                                            f->normed, f->q, f->k, f->v, NULL});
    ops_qk_norm_rope_store(c, &(struct qk_norm_rope_store_args){b, s->n_heads, s->n_kv_heads, s->head_dim, qk, qk, eps,
                                                                f->cos_sin, f->q, f->k, f->v, kv});
    ops_attention(c,
                  &(struct attention_args){b, s->n_heads, s->n_kv_heads, s->head_dim, 0.1f, f->q, kv, f->attn, NULL});
    ops_out_residual(c, &(struct proj_residual_args){n, f->attn, &m->w[WO], f->projected, f->x});
    ops_norm_gate_up(c, &(struct norm_gate_up_args){n, f->x, m->norm, eps, &m->w[WG], &m->w[WU], f->normed, f->gate,
                                                    f->up, f->gate, NULL});
    ops_down_residual(c, &(struct proj_residual_args){n, f->gate, &m->w[WD], f->projected, f->x});
    ops_norm_head(c, &(struct norm_head_args){b, f->x, m->norm, eps, &m->w[WH], f->rows, f->normed, f->logits});
}

// One step's batch: up to chunk[s] further tokens of each sequence; false when both are done.
struct plan {
    struct batch batch;
    int32_t token[LONG + SHORT], position[LONG + SHORT], seq[LONG + SHORT], rows[LONG + SHORT];
    int32_t seq_start[3], page_start[3], pages[2 * PAGES], kv_len[2];
    int of[2]; // which sequence the batch's first and second are
};

static bool plan_step(struct plan *p, const struct trial *t, size_t done[2], int32_t table[2][PAGES],
                      int32_t *n_taken) {
    struct batch *b = &p->batch;
    *b = (struct batch){.token = p->token,
                        .position = p->position,
                        .seq = p->seq,
                        .seq_start = p->seq_start,
                        .page_start = p->page_start,
                        .pages = p->pages,
                        .kv_len = p->kv_len,
                        .logit_rows = p->rows};
    p->seq_start[0] = p->page_start[0] = 0;
    for (int s = 0; s < 2; s++) {
        size_t n = lengths[s] - done[s] < t->chunk[s] ? lengths[s] - done[s] : t->chunk[s];
        if (n == 0) continue;
        size_t have = (done[s] + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
        size_t need = (done[s] + n + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
        for (; have < need; have++) table[s][have] = (*n_taken)++ * t->page_step % PAGES;
        for (size_t i = 0; i < n; i++, b->n_tokens++) {
            p->position[b->n_tokens] = (int32_t)(done[s] + i);
            p->seq[b->n_tokens] = (int32_t)b->n_seqs;
            p->rows[b->n_tokens] = (int32_t)b->n_tokens;
        }
        int32_t first = p->page_start[b->n_seqs];
        for (size_t i = 0; i < need; i++) p->pages[(size_t)first + i] = table[s][i];
        done[s] += n;
        p->kv_len[b->n_seqs] = (int32_t)done[s];
        p->of[b->n_seqs++] = s;
        p->seq_start[b->n_seqs] = (int32_t)b->n_tokens;
        p->page_start[b->n_seqs] = first + (int32_t)need;
    }
    b->n_logit_rows = b->n_tokens;
    return b->n_tokens > 0;
}

static void trial_run(const struct model *m, struct trial *t) {
    const struct shape *s = &m->shape;
    size_t width = s->n_heads * s->head_dim, kv_width = s->n_kv_heads * s->head_dim;
    size_t max_tokens = t->chunk[0] + t->chunk[1], slots = PAGES * KV_PAGE_TOKENS * kv_width;
    struct op_ctx c = open_ctx(ops_cpu(t->isa, NULL),
                               (struct ops_limits){max_tokens, MAX_POS, width > HIDDEN ? width : HIDDEN, s->n_heads,
                                                   s->head_dim, t->n_threads},
                               t->fusion);
    float *kp = nan_floats(slots), *vp = nan_floats(slots); // as bf16, too, each half is a NaN or 0
    memset(kp, 0xFF, slots * sizeof *kp);
    memset(vp, 0xFF, slots * sizeof *vp);
    struct kv_layer kv = {s->kv, kp, vp, PAGES, s->n_kv_heads, s->head_dim};
    for (int i = 0; i < 2; i++) t->x[i] = nan_floats(LONG * HIDDEN), t->logits[i] = nan_floats(LONG * VOCAB);
    struct plan p;
    size_t done[2] = {0, 0};
    int32_t table[2][PAGES], n_taken = 1;
    while (plan_step(&p, t, done, table, &n_taken)) {
        size_t n = p.batch.n_tokens;
        struct buffers f = {nan_floats(n * HIDDEN),   nan_floats(n * HIDDEN),    nan_floats(n * width),
                            nan_floats(n * kv_width), nan_floats(n * kv_width),  nan_floats(n * width),
                            nan_floats(n * HIDDEN),   nan_floats(n * FF),        nan_floats(n * FF),
                            nan_floats(n * HIDDEN),   nan_floats(n * VOCAB + 1), nan_floats(n * s->head_dim)};
        f.logits[n * VOCAB] = canary;
        for (size_t i = 0; i < n; i++) {
            size_t position = (size_t)p.position[i];
            memcpy(f.x + i * HIDDEN, m->input[p.of[p.seq[i]]] + position * HIDDEN, HIDDEN * 4);
            memcpy(f.cos_sin + i * s->head_dim, m->cos_sin + position * s->head_dim, s->head_dim * 4);
        }
        run_step(&c, m, &p.batch, &kv, &f);
        assert_true(f.logits[n * VOCAB] == canary);
        for (size_t i = 0; i < n; i++) {
            size_t position = (size_t)p.position[i];
            int of = p.of[p.seq[i]];
            memcpy(t->x[of] + position * HIDDEN, f.x + i * HIDDEN, HIDDEN * 4);
            memcpy(t->logits[of] + position * VOCAB, f.logits + i * VOCAB, VOCAB * 4);
        }
        float *all[] = {f.x, f.normed, f.q, f.k, f.v, f.attn, f.projected, f.gate, f.up, f.rows, f.logits, f.cos_sin};
        for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    }
    close_ctx(&c);
    free(kp), free(vp);
}

static void trial_close(struct trial *t) {
    for (int i = 0; i < 2; i++) free(t->x[i]), free(t->logits[i]);
}

static void compare(const struct model *m, const struct trial *alone, struct trial *t, int s) {
    if (memcmp(alone->x[s], t->x[s], lengths[s] * HIDDEN * 4) == 0 &&
        memcmp(alone->logits[s], t->logits[s], lengths[s] * VOCAB * 4) == 0)
        return;
    fail_msg("sequence %d differs: head_dim %zu, isa %s, fusion %x, %d threads, chunks %zu and %zu, page step %d", s,
             m->shape.head_dim, t->isa, t->fusion, t->n_threads, t->chunk[0], t->chunk[1], t->page_step);
}

static void test_invariance(void **state) {
    (void)state;
    static const size_t chunks[][2] = {{LONG, SHORT}, {1, 1}, {32, 1}, {1, 33}, {31, 7}, {5, SHORT}, {LONG, 2}, {3, 0}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        struct model m;
        model_open(&m, shapes[i]);
        struct trial alone[2] = {{"portable", 0, 1, {LONG, 0}, 1, {0}, {0}},
                                 {"portable", 0, 1, {0, SHORT}, 1, {0}, {0}}};
        for (int s = 0; s < 2; s++) {
            trial_run(&m, &alone[s]);
            for (size_t k = 0; k < lengths[s] * VOCAB; k++) assert_true(isfinite(alone[s].logits[s][k]));
        }
        for (size_t j = 0; j < sizeof chunks / sizeof chunks[0]; j++) {
            for (int variant = 0; variant < 4; variant++) {
                static const int32_t steps[] = {1, 2, 4, 5};
                // Threads that share a core wait long for each other: schedules of many steps run on one.
                int most = j % 4 == 0 ? 4 : 1;
                struct trial t = {variant & 1 ? "auto" : "portable",
                                  variant & 2 ? UINT32_MAX : 0,
                                  1 + (int)(i + j + (size_t)variant) % most,
                                  {chunks[j][0], chunks[j][1]},
                                  steps[(j + (size_t)variant) % 4],
                                  {0},
                                  {0}};
                // Portable has nothing fused, and is slow: two schedules.
                if (!(variant & 1) && ((variant & 2) || j % 4 != 0)) continue;
                trial_run(&m, &t);
                for (int s = 0; s < 2; s++)
                    if (chunks[j][s]) compare(&m, &alone[s], &t, s);
                trial_close(&t);
            }
        }
        trial_close(&alone[0]), trial_close(&alone[1]);
        model_close(&m);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_invariance)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
