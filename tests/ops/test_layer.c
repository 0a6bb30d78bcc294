// test_layer.c: all fused ops of one layer, in every way that they can run: portable and AVX2, composed and fused, one
// op fused at a time, one thread and several, whole batches and one token at a time. Every way must give the same
// bytes. Unused KV slots, scratch and outputs start as NaN, and canaries stand behind them.
#include "base/size.h"
#include "ops/kv_page.h"
#include "ops/ops.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { CANARY = 64, MAX_SEQS = 4 };
static const float canary_value = 12345.5f;

static uint64_t random_state = 1;

static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

// In (-1, 1), all magnitudes down to 2^-20.
static float random_float(void) {
    float v = (float)(int32_t)random_bits() * 0x1p-31f;
    return random_bits() % 4 ? v : v * ldexpf(1.0f, -(int)(random_bits() % 20));
}

static float *floats(size_t n) {
    float *p = size_alloc_aligned(n + CANARY, sizeof *p);
    assert_non_null(p);
    for (size_t i = 0; i < n; i++) p[i] = NAN;
    for (size_t i = n; i < n + CANARY; i++) p[i] = canary_value;
    return p;
}

static float *random_floats(size_t n, float scale) {
    float *p = floats(n);
    for (size_t i = 0; i < n; i++) p[i] = random_float() * scale;
    return p;
}

static void check_canary(const float *p, size_t n) {
    for (size_t i = n; i < n + CANARY; i++) assert_true(p[i] == canary_value);
}

static struct matrix random_matrix(enum dtype type, size_t n_out, size_t n_in) {
    struct matrix w = {.name = "w", .type = type, .n_out = n_out, .n_in = n_in};
    const struct dtype_info *info = dtype_info(type);
    assert_true(dtype_row_bytes(type, n_in, &w.row_bytes));
    uint8_t *data = size_alloc(n_out, w.row_bytes);
    assert_non_null(data);
    if (info->is_quantised) {
        // Any bytes are a valid block if its f16 scales are finite: random bytes, and the exponents tamed.
        for (size_t i = 0; i < n_out * w.row_bytes; i++) data[i] = (uint8_t)random_bits() & 0xBB;
    } else {
        for (size_t i = 0; i < n_out * n_in; i++) {
            float v = random_float() * 0.3f;
            uint16_t h = type == DTYPE_F16 ? f16_from_f32(v) : bf16_from_f32(v);
            if (type == DTYPE_F32) memcpy(data + 4 * i, &v, 4);
            else memcpy(data + 2 * i, &h, 2);
        }
    }
    w.data = data;
    return w;
}

struct shape {
    const char *name;
    size_t hidden, n_heads, n_kv_heads, head_dim, n_ff, n_vocab;
    enum dtype weights, kv;
    bool bias, norm;
    float norm_scale;                             // largest q/k norm weight
    size_t n_seqs, past[MAX_SEQS], new[MAX_SEQS]; // tokens before this step, tokens of this step
};

struct layer {
    struct shape s;
    size_t n_tokens, n_pages, max_positions;
    struct matrix wq, wk, wv, wo, gate, up, down, head;
    float *norm, *bq, *bk, *bv, *q_norm, *k_norm, *x, *cos_sin, *past_k, *past_v;
    int32_t token[512], position[512], seq[512], seq_start[MAX_SEQS + 1], page_start[MAX_SEQS + 1], pages[1024],
        kv_len[MAX_SEQS], logit_rows[512];
    struct batch batch;
};

static void layer_create(struct layer *l, const struct shape *s) {
    size_t q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    *l = (struct layer){.s = *s};
    l->wq = random_matrix(s->weights, q, s->hidden);
    l->wk = random_matrix(s->weights, kv, s->hidden);
    l->wv = random_matrix(s->weights, kv, s->hidden);
    l->wo = random_matrix(s->weights, s->hidden, q);
    l->gate = random_matrix(s->weights, s->n_ff, s->hidden);
    l->up = random_matrix(s->weights, s->n_ff, s->hidden);
    l->down = random_matrix(s->weights, s->hidden, s->n_ff);
    l->head = random_matrix(s->weights, s->n_vocab, s->hidden);
    l->norm = random_floats(s->hidden, 2.0f);
    l->bq = random_floats(q, 1.0f);
    l->bk = random_floats(kv, 1.0f);
    l->bv = random_floats(kv, 1.0f);
    l->q_norm = random_floats(s->head_dim, 2.0f);
    l->k_norm = random_floats(s->head_dim, 2.0f);
    l->k_norm[s->head_dim / 3] = s->norm_scale;
    size_t n_past = 0;
    for (size_t i = 0; i < s->n_seqs; i++) {
        size_t len = s->past[i] + s->new[i];
        l->seq_start[i] = (int32_t)l->n_tokens;
        l->page_start[i] = (int32_t)l->n_pages;
        l->kv_len[i] = (int32_t)len;
        for (size_t t = 0; t < s->new[i]; t++, l->n_tokens++) {
            l->position[l->n_tokens] = (int32_t)(s->past[i] + t);
            l->seq[l->n_tokens] = (int32_t)i;
            l->logit_rows[l->n_tokens] = (int32_t)l->n_tokens;
        }
        l->n_pages += (len + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
        n_past += s->past[i];
        if (len > l->max_positions) l->max_positions = len;
    }
    l->seq_start[s->n_seqs] = (int32_t)l->n_tokens;
    l->page_start[s->n_seqs] = (int32_t)l->n_pages;
    l->x = random_floats(l->n_tokens * s->hidden, 4.0f);
    for (size_t t = 0; t < l->n_tokens; t++) l->x[t * s->hidden + 1] = 300.0f; // a hot channel
    l->cos_sin = floats(l->n_tokens * s->head_dim);
    for (size_t t = 0; t < l->n_tokens; t++) {
        for (size_t c = 0; c < s->head_dim / 2; c++) {
            double angle = l->position[t] * pow(1e6, -2.0 * (double)c / (double)s->head_dim);
            l->cos_sin[t * s->head_dim + c] = (float)cos(angle);
            l->cos_sin[t * s->head_dim + s->head_dim / 2 + c] = (float)sin(angle);
        }
    }
    l->past_k = random_floats(n_past * kv, 3.0f);
    l->past_v = random_floats(n_past * kv, 3.0f);
    l->batch = (struct batch){.n_tokens = l->n_tokens,
                              .n_seqs = s->n_seqs,
                              .n_logit_rows = l->n_tokens,
                              .token = l->token,
                              .position = l->position,
                              .seq = l->seq,
                              .seq_start = l->seq_start,
                              .page_start = l->page_start,
                              .pages = l->pages,
                              .kv_len = l->kv_len,
                              .logit_rows = l->logit_rows};
}

static void layer_free(struct layer *l) {
    const struct matrix *w[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->gate, &l->up, &l->down, &l->head};
    float *p[] = {l->norm, l->bq, l->bk, l->bv, l->q_norm, l->k_norm, l->x, l->cos_sin, l->past_k, l->past_v};
    for (size_t i = 0; i < sizeof w / sizeof *w; i++) free((void *)(uintptr_t)w[i]->data);
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) free(p[i]);
}

// What a run leaves behind.
struct result {
    size_t n[7];
    float *data[7]; // q, k, v, attn, act, x, logits
};

static const char *const result_names[7] = {"q", "k", "v", "attn", "act", "x", "logits"};

static void result_free(struct result *r) {
    for (size_t i = 0; i < 7; i++) free(r->data[i]);
}

static void run_batch(const struct layer *l, const struct op_ctx *ctx, const struct batch *b, size_t first,
                      struct kv_layer *kv, struct result *r) {
    const struct shape *s = &l->s;
    size_t T = b->n_tokens, q = s->n_heads * s->head_dim, kvw = s->n_kv_heads * s->head_dim;
    size_t wide = s->n_ff > s->hidden ? s->n_ff : s->hidden;
    float *normed = floats(T * wide), *rows = floats(T * wide), *gate = floats(T * wide), *up = floats(T * wide);
    float *out[7];
    const size_t width[7] = {q, kvw, kvw, q, s->n_ff, s->hidden, s->n_vocab};
    for (size_t i = 0; i < 7; i++) out[i] = r->data[i] + first * width[i];
    const float *cos_sin = l->cos_sin + first * s->head_dim;
    float *x = out[5];
    memcpy(x, l->x + first * s->hidden, T * s->hidden * sizeof *x);
    ops_norm_qkv(ctx, &(struct norm_qkv_args){.n_tokens = T,
                                              .x = x,
                                              .norm = l->norm,
                                              .eps = 1e-6f,
                                              .wq = &l->wq,
                                              .wk = &l->wk,
                                              .wv = &l->wv,
                                              .bq = s->bias ? l->bq : NULL,
                                              .bk = s->bias ? l->bk : NULL,
                                              .bv = s->bias ? l->bv : NULL,
                                              .normed = normed,
                                              .q = out[0],
                                              .k = out[1],
                                              .v = out[2]});
    ops_qk_norm_rope_store(ctx, &(struct qk_norm_rope_store_args){.batch = b,
                                                                  .n_heads = s->n_heads,
                                                                  .n_kv_heads = s->n_kv_heads,
                                                                  .head_dim = s->head_dim,
                                                                  .q_norm = s->norm ? l->q_norm : NULL,
                                                                  .k_norm = s->norm ? l->k_norm : NULL,
                                                                  .eps = 1e-6f,
                                                                  .cos_sin = cos_sin,
                                                                  .q = out[0],
                                                                  .k = out[1],
                                                                  .v = out[2],
                                                                  .kv = kv});
    ops_attention(ctx, &(struct attention_args){.batch = b,
                                                .n_heads = s->n_heads,
                                                .n_kv_heads = s->n_kv_heads,
                                                .head_dim = s->head_dim,
                                                .scale = 1.0f / sqrtf((float)s->head_dim),
                                                .q = out[0],
                                                .kv = kv,
                                                .out = out[3]});
    ops_out_residual(
        ctx, &(struct proj_residual_args){.n_tokens = T, .in = out[3], .w = &l->wo, .projected = normed, .x = x});
    ops_norm_gate_up(ctx, &(struct norm_gate_up_args){.n_tokens = T,
                                                      .x = x,
                                                      .norm = l->norm,
                                                      .eps = 1e-6f,
                                                      .w_gate = &l->gate,
                                                      .w_up = &l->up,
                                                      .normed = normed,
                                                      .gate = out[4],
                                                      .up = up,
                                                      .act = out[4]});
    ops_down_residual(
        ctx, &(struct proj_residual_args){.n_tokens = T, .in = out[4], .w = &l->down, .projected = normed, .x = x});
    ops_norm_head(ctx, &(struct norm_head_args){.batch = b,
                                                .x = x,
                                                .norm = l->norm,
                                                .eps = 1e-6f,
                                                .head = &l->head,
                                                .rows = rows,
                                                .normed = normed,
                                                .logits = out[6]});
    float *all[] = {normed, rows, gate, up};
    for (size_t i = 0; i < 4; i++) {
        check_canary(all[i], T * wide);
        free(all[i]);
    }
}

// Fills the KV with NaN, then with the past of every sequence.
static void fill_kv(const struct layer *l, struct kv_layer *kv, const struct op_ctx *ctx) {
    memset(kv->k, 0xFF, kv->n_pages * kv_page_bytes(kv));
    memset(kv->v, 0xFF, kv->n_pages * kv_page_bytes(kv));
    size_t from = 0;
    for (size_t s = 0; s < l->s.n_seqs; s++) {
        for (size_t p = 0; p < l->s.past[s]; p++, from++) {
            int32_t position = (int32_t)p, seq = (int32_t)s;
            struct batch b = l->batch;
            b.n_tokens = 1;
            b.position = &position;
            b.seq = &seq;
            size_t at = from * kv->n_kv_heads * kv->head_dim;
            ctx->ops->kv_store(ctx, kv, &b, l->past_k + at, l->past_v + at);
        }
    }
}

struct way {
    const char *isa;
    uint32_t fusion;
    int n_threads;
    bool one_by_one;    // a step for each token
    uint64_t page_seed; // which permutation of the pages
};

static struct result run(struct layer *l, const struct way *way) {
    struct error err;
    const struct shape *s = &l->s;
    struct pool *pool = pool_create(way->n_threads, &err);
    assert_non_null(pool);
    struct op_ctx ctx = {.ops = ops_cpu(way->isa, &err), .pool = pool, .fusion = way->fusion};
    assert_non_null(ctx.ops);
    size_t q = s->n_heads * s->head_dim, kvw = s->n_kv_heads * s->head_dim;
    size_t width = s->hidden > q ? s->hidden : q;
    struct ops_limits limits = {.max_tokens = l->n_tokens,
                                .max_positions = l->max_positions,
                                .max_width = s->n_ff > width ? s->n_ff : width,
                                .n_heads = s->n_heads,
                                .head_dim = s->head_dim,
                                .n_threads = way->n_threads};
    assert_true(ops_scratch_floats(&limits, &ctx.scratch_floats));
    ctx.scratch = floats(ctx.scratch_floats);

    random_state = way->page_seed + 99;
    size_t n_pages = l->n_pages + 3;
    int32_t order[1024];
    for (size_t i = 0; i < n_pages; i++) order[i] = (int32_t)i;
    for (size_t i = n_pages - 1; i > 0 && way->page_seed; i--) {
        size_t other = random_bits() % (i + 1);
        int32_t swap = order[i];
        order[i] = order[other];
        order[other] = swap;
    }
    memcpy(l->pages, order, l->n_pages * sizeof *order);
    size_t kv_elements = n_pages * kvw * KV_PAGE_TOKENS;
    struct kv_layer kv = {.type = s->kv,
                          .k = floats(kv_elements),
                          .v = floats(kv_elements),
                          .n_pages = n_pages,
                          .n_kv_heads = s->n_kv_heads,
                          .head_dim = s->head_dim};
    fill_kv(l, &kv, &ctx);

    struct result r = {.n = {l->n_tokens * q, l->n_tokens * kvw, l->n_tokens * kvw, l->n_tokens * q,
                             l->n_tokens * s->n_ff, l->n_tokens * s->hidden, l->n_tokens * s->n_vocab}};
    for (size_t i = 0; i < 7; i++) r.data[i] = floats(r.n[i]);
    if (way->one_by_one) {
        for (size_t t = 0; t < l->n_tokens; t++) {
            struct batch b = l->batch;
            int32_t zero = 0;
            b.n_tokens = b.n_logit_rows = 1;
            b.position += t;
            b.seq += t;
            b.logit_rows = &zero;
            run_batch(l, &ctx, &b, t, &kv, &r);
        }
    } else {
        run_batch(l, &ctx, &l->batch, 0, &kv, &r);
    }
    for (size_t i = 0; i < 7; i++) check_canary(r.data[i], r.n[i]);
    check_canary(ctx.scratch, ctx.scratch_floats);
    check_canary(kv.k, kv_elements);
    check_canary(kv.v, kv_elements);
    free(kv.k);
    free(kv.v);
    free(ctx.scratch);
    pool_free(pool);
    return r;
}

static void expect_same(const char *what, const struct shape *s, const struct way *way, const struct result *want,
                        const struct result *got) {
    for (size_t o = 0; o < 7; o++) {
        for (size_t i = 0; i < want->n[o]; i++) {
            if (memcmp(want->data[o] + i, got->data[o] + i, sizeof(float)) == 0 && !isnan(want->data[o][i])) continue;
            fail_msg("%s, %s: %s, fusion %x, %d threads%s: %s[%zu]: expected %a, found %a", s->name, what, way->isa,
                     way->fusion, way->n_threads, way->one_by_one ? ", token by token" : "", result_names[o], i,
                     (double)want->data[o][i], (double)got->data[o][i]);
        }
    }
}

// Those besides portable that this CPU may have.
static const char *const isas[] = {"avx2", "avx512", "avx512vnni", "avx512bf16"};

static bool have(const char *isa) {
    return ops_cpu(isa, NULL) != NULL;
}

static void check_ways(const struct shape *s, const struct way *base, const struct way *ways, size_t n) {
    random_state = 7;
    struct layer l;
    layer_create(&l, s);
    struct result want = run(&l, base);
    for (size_t i = 0; i < n; i++) {
        struct result got = run(&l, &ways[i]);
        expect_same("all ways alike", s, &ways[i], &want, &got);
        result_free(&got);
    }
    result_free(&want);
    layer_free(&l);
}

static void check_shape(const struct shape *s, bool every_op) {
    struct way base = {"portable", 0, 1, false, 0};
    struct way ways[64] = {{"portable", ~0u, 2, false, 1}, {"portable", 0, 1, true, 2}};
    size_t n = 2;
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (!have(isas[i])) continue;
        ways[n++] = (struct way){isas[i], 0, 1, false, 3};
        ways[n++] = (struct way){isas[i], ~0u, 1, false, 4};
        ways[n++] = (struct way){isas[i], ~0u, 3, false, 5};
        ways[n++] = (struct way){isas[i], 0, 3, true, 6};
        ways[n++] = (struct way){isas[i], ~0u, 2, true, 7};
        for (uint32_t op = 0; every_op && op < FUSED_STEP; op++) {
            ways[n++] = (struct way){isas[i], 1u << op, 2, false, 8};
        }
    }
    check_ways(s, &base, ways, n);
}

// Qwen3's shape in small: group 2, head_dim not hidden / heads.
static const struct shape small = {"small",    64,    4,    2,     64, 96,  50, DTYPE_BF16,
                                   DTYPE_BF16, false, true, 96.5f, 1,  {0}, {1}};

static void every_t(void **state) {
    (void)state;
    static const size_t counts[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12,  13,
                                    14, 15, 16, 17, 18, 19, 20, 31, 32, 33, 64, 129, 300};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        struct shape s = small;
        s.new[0] = counts[i];
        if (counts[i] > 100) s.n_ff = 40, s.n_vocab = 20, s.n_heads = 2, s.n_kv_heads = 1;
        check_shape(&s, false);
    }
}

// Without gaps, on this machine's best instruction set: fused by three threads as composed by one.
static void every_t_to_300(void **state) {
    (void)state;
    for (size_t t = 1; t <= 300; t++) {
        struct shape s = small;
        s.new[0] = t;
        s.n_ff = 40, s.n_vocab = 20, s.n_heads = 2, s.n_kv_heads = 1;
        check_ways(&s, &(struct way){"auto", 0, 1, false, 1}, &(struct way){"auto", ~0u, 3, false, 2}, 1);
    }
}

static void every_op_alone(void **state) {
    (void)state;
    struct shape s = small;
    s.n_seqs = 3;
    s.past[0] = 31, s.new[0] = 1;
    s.past[1] = 0, s.new[1] = 9;
    s.past[2] = 65, s.new[2] = 3;
    check_shape(&s, true);
    s.kv = DTYPE_F32;
    s.bias = true;
    s.norm = false;
    s.n_heads = 6; // groups of 3
    check_shape(&s, true);
}

static void every_head_dim_and_group(void **state) {
    (void)state;
    static const size_t dims[] = {16, 32, 64, 72, 80, 96, 100, 128, 256};
    static const size_t groups[] = {1, 2, 3, 5, 7, 8, 16, 17, 24};
    for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
        struct shape s = small;
        s.head_dim = dims[d];
        s.n_kv_heads = 1 + d % 2;
        s.n_heads = groups[d] * s.n_kv_heads;
        s.kv = d % 2 ? DTYPE_F32 : DTYPE_BF16;
        s.n_seqs = 2;
        s.past[0] = 62, s.new[0] = 4;
        s.past[1] = 5, s.new[1] = 1;
        check_shape(&s, false);
    }
}

static void every_kv_type(void **state) {
    (void)state;
    static const enum dtype types[] = {DTYPE_F16, DTYPE_Q8_0, DTYPE_FP8};
    static const size_t dims[] = {32, 64, 96, 128, 256}, groups[] = {1, 2, 3, 7, 16};
    for (size_t k = 0; k < sizeof types / sizeof *types; k++) {
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
            struct shape s = small;
            s.kv = types[k];
            s.head_dim = dims[d];
            s.n_kv_heads = 1 + d % 2;
            s.n_heads = groups[d] * s.n_kv_heads;
            s.norm = d % 2 == 0;
            s.n_seqs = 2;
            s.past[0] = 62, s.new[0] = 4;
            s.past[1] = 5, s.new[1] = 1;
            check_shape(&s, dims[d] == 64);
        }
    }
    struct shape s = small; // the context cut into pieces for the threads
    s.kv = DTYPE_Q8_0;
    s.n_heads = 2, s.n_kv_heads = 1;
    s.past[0] = 1100, s.new[0] = 1;
    check_shape(&s, false);
    s.kv = DTYPE_FP8;
    check_shape(&s, false);
    s = small;
    s.kv = DTYPE_F16;
    s.head_dim = 72; // no whole number of vectors of 32
    s.new[0] = 40;
    check_shape(&s, false);
}

static void every_weight_type(void **state) {
    (void)state;
    for (enum dtype type = 0; type < DTYPE_COUNT; type++) {
        if (!dtype_info(type)->is_weight) continue;
        struct shape s = small;
        s.weights = type;
        s.n_seqs = 2;
        s.past[0] = 3, s.new[0] = 1;
        s.new[1] = 5;
        s.norm = type % 2;
        if (dtype_info(type)->is_quantised) {
            s.hidden = dtype_info(type)->block_len == 32 ? 1248 : 1280; // a part of a tile at the end
            s.n_heads = 4, s.n_kv_heads = 2, s.head_dim = 64;
            s.n_ff = 256, s.n_vocab = 17;
        } else {
            s.hidden = 1111 + (size_t)type; // a piece of K and a part of the next, with tails of all kinds
            s.n_ff = 77;
        }
        check_shape(&s, false);
    }
}

static void long_contexts(void **state) {
    (void)state;
    struct shape s = small;
    s.n_heads = 2, s.n_kv_heads = 1;
    s.n_seqs = 4;
    s.past[0] = 4095, s.new[0] = 1;
    s.past[1] = 1023, s.new[1] = 2;
    s.past[2] = 992, s.new[2] = 1;
    s.past[3] = 33, s.new[3] = 7;
    check_shape(&s, false);
}

// To 8,192 positions, over a page's end and at it, in every type of K and V.
static void contexts_to_8192(void **state) {
    (void)state;
    static const enum dtype types[] = {DTYPE_BF16, DTYPE_F32, DTYPE_F16, DTYPE_Q8_0, DTYPE_FP8};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        struct shape s = small;
        s.kv = types[i];
        s.n_heads = 2, s.n_kv_heads = 1;
        s.n_seqs = 3;
        s.past[0] = 8191, s.new[0] = 1;
        s.past[1] = 8185, s.new[1] = 5;
        s.past[2] = 8159, s.new[2] = 2;
        check_shape(&s, false);
    }
}

static void unknown_isa(void **state) {
    (void)state;
    struct error err;
    assert_null(ops_cpu("neon", &err));
    assert_non_null(strstr(err.text, "neon"));
    assert_non_null(strstr(err.text, "portable"));
    assert_non_null(ops_cpu(NULL, &err));
    assert_ptr_equal(ops_cpu("auto", &err), ops_cpu(NULL, &err));
}

// silu_mul and softmax reach exp32 with every kind of bits.
static void exp_all_lanes(void **state) {
    (void)state;
    if (!have("avx2")) skip();
    struct error err;
    struct pool *pool = pool_create(1, &err);
    assert_non_null(pool);
    struct op_ctx ctx = {.pool = pool};
    const struct ops *portable = ops_cpu("portable", &err), *avx2 = ops_cpu("avx2", &err);
    enum { N = 4096 };
    float gate[N], up[N], a[N], b[N];
    uint32_t bits = 0;
    for (size_t round = 0; round < 500; round++) {
        for (size_t i = 0; i < N; i++, bits += 2097u) {
            memcpy(&gate[i], &bits, sizeof bits);
            up[i] = 1.0f;
        }
        portable->silu_mul(&ctx, a, gate, up, N - round % 9);
        avx2->silu_mul(&ctx, b, gate, up, N - round % 9);
        for (size_t i = 0; i < N - round % 9; i++) {
            if (isnan(a[i]) && isnan(b[i])) continue;
            if (memcmp(a + i, b + i, sizeof *a) != 0)
                fail_msg("silu(%a): portable %a, avx2 %a", (double)gate[i], (double)a[i], (double)b[i]);
        }
    }
    pool_free(pool);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(unknown_isa),
        cmocka_unit_test(exp_all_lanes),
        cmocka_unit_test(every_op_alone),
        cmocka_unit_test(every_t),
        cmocka_unit_test(every_head_dim_and_group),
        cmocka_unit_test(every_kv_type),
        cmocka_unit_test(every_weight_type),
        cmocka_unit_test(long_contexts),
        cmocka_unit_test(contexts_to_8192),
        cmocka_unit_test(every_t_to_300),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
