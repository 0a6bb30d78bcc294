// fusion.c: every fused op's composition from primitives, and the choice between the two. It owns the registry of
// names and primitive lists; backends own the ops themselves.
#include "base/size.h"
#include "ops/ops.h"

#include <stdio.h>
#include <string.h>

// The one list. The names, the primitives and the dispatch (DISPATCH, below) are all made from it: a
// fused op without a line here has no ops_ function, so that its caller does not link.
#define FUSED_OPS(X)                                                                                                   \
    X(NORM_QKV, norm_qkv, "rmsnorm", "matmul", "bias")                                                                 \
    X(QK_NORM_ROPE_STORE, qk_norm_rope_store, "head_rmsnorm", "rope", "kv_store")                                      \
    X(ATTENTION, attention, "attn_scores", "attn_softmax", "attn_values", "attn_combine")                              \
    X(ROPE_ATTENTION, rope_attention, "head_rmsnorm", "rope", "kv_store", "attn_scores", "attn_softmax",               \
      "attn_values", "attn_combine")                                                                                   \
    X(OUT_RESIDUAL, out_residual, "matmul", "add")                                                                     \
    X(NORM_GATE_UP, norm_gate_up, "rmsnorm", "matmul", "silu_mul")                                                     \
    X(DOWN_RESIDUAL, down_residual, "matmul", "add")                                                                   \
    X(NORM_HEAD, norm_head, "gather", "rmsnorm", "matmul")

#define LIST(UPPER, lower, ...) static const char *const primitives_##lower[] = {__VA_ARGS__, NULL};
FUSED_OPS(LIST)
// The whole step replaces the whole sequence.
static const char *const primitives_step[] = {"embed",        "rmsnorm",  "matmul",      "bias",         "head_rmsnorm",
                                              "rope",         "kv_store", "attn_scores", "attn_softmax", "attn_values",
                                              "attn_combine", "add",      "silu_mul",    "gather",       NULL};

#define INFO(UPPER, lower, ...) [FUSED_##UPPER] = {#lower, primitives_##lower},
static const struct fusion_info infos[FUSED_COUNT] = {FUSED_OPS(INFO)[FUSED_STEP] = {"step", primitives_step}};
#define COUNT(UPPER, lower, ...) +1
_Static_assert(FUSED_OPS(COUNT) + 1 == FUSED_COUNT, "every fused op registers its primitives");

static const uint32_t all_ops = (1u << FUSED_COUNT) - 1;

const struct fusion_info *fusion_info(enum fused_op op) {
    return &infos[op];
}

bool fusion_available(const struct ops *ops, enum fused_op op) {
    switch (op) {
#define AVAILABLE(UPPER, lower, ...)                                                                                   \
    case FUSED_##UPPER: return ops->lower != NULL;
        FUSED_OPS(AVAILABLE)
    case FUSED_STEP: return ops->device && ops->device->begin;
    case FUSED_COUNT: break;
    }
    return false;
}

void ops_tap(const struct op_ctx *ctx, const char *name, const float *data, size_t n_rows, size_t n_columns) {
    if (!ctx->tap) return;
    struct device *d = ctx->ops->device;
    if (d) data = d->show(d, data, n_rows * n_columns * sizeof *data);
    if (data) ctx->tap(ctx->tap_user, name, ctx->layer, data, n_rows, n_columns);
}

static void project(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, const float *b,
                    size_t n_tokens) {
    ctx->ops->matmul(ctx, y, x, w, n_tokens);
    if (b) ctx->ops->bias(ctx, y, b, n_tokens, w->n_out);
}

static void compose_norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    ctx->ops->rmsnorm(ctx, a->normed, a->x, a->norm, a->eps, a->n_tokens, a->wk->n_in);
    ops_tap(ctx, "attn_norm", a->normed, a->n_tokens, a->wk->n_in);
    if (a->wq) project(ctx, a->q, a->normed, a->wq, a->bq, a->n_tokens);
    project(ctx, a->k, a->normed, a->wk, a->bk, a->n_tokens);
    project(ctx, a->v, a->normed, a->wv, a->bv, a->n_tokens);
}

static void outputs_norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    if (a->wq) ops_tap(ctx, "q", a->q, a->n_tokens, a->wq->n_out);
    ops_tap(ctx, "k", a->k, a->n_tokens, a->wk->n_out);
    ops_tap(ctx, "v", a->v, a->n_tokens, a->wv->n_out);
}

static void compose_qk_norm_rope_store(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a) {
    size_t n = a->batch->n_tokens;
    bool has_q = a->n_heads > 0;
    if (has_q && a->q_norm) {
        ctx->ops->head_rmsnorm(ctx, a->q, a->q_norm, a->eps, n, a->n_heads, a->head_dim);
        ops_tap(ctx, "q_norm", a->q, n, a->n_heads * a->head_dim);
    }
    if (a->k_norm) {
        ctx->ops->head_rmsnorm(ctx, a->k, a->k_norm, a->eps, n, a->n_kv_heads, a->head_dim);
        ops_tap(ctx, "k_norm", a->k, n, a->n_kv_heads * a->head_dim);
    }
    if (has_q) ctx->ops->rope(ctx, a->q, a->cos_sin, n, a->n_heads, a->head_dim);
    ctx->ops->rope(ctx, a->k, a->cos_sin, n, a->n_kv_heads, a->head_dim);
    ctx->ops->kv_store(ctx, a->kv, a->batch, a->k, a->v);
}

static void outputs_qk_norm_rope_store(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a) {
    if (a->n_heads > 0) ops_tap(ctx, "q_rope", a->q, a->batch->n_tokens, a->n_heads * a->head_dim);
    ops_tap(ctx, "k_rope", a->k, a->batch->n_tokens, a->n_kv_heads * a->head_dim);
}

// Floats that composed attention needs per thread: scores, two numbers a block, and a block's values each; of
// the shortest blocks that a backend may have.
static bool attention_floats(size_t n_positions, size_t head_dim, size_t *out) {
    size_t per_block;
    size_t n_blocks = n_positions / ATTN_BLOCK + (n_positions % ATTN_BLOCK != 0);
    return size_add(head_dim, 2, &per_block) && size_mul_add(n_blocks, per_block, n_positions, out);
}

struct attention_job {
    const struct op_ctx *ctx;
    const struct attention_args *a;
    size_t per_thread;
};

static void attention_piece(void *user, size_t begin, size_t end, int thread) {
    const struct attention_job *j = user;
    const struct attention_args *a = j->a;
    const struct ops *ops = j->ctx->ops;
    float *scores = j->ctx->scratch + (size_t)thread * j->per_thread;
    for (size_t i = begin; i < end; i++) {
        size_t t = i / a->n_heads, kv_head = i % a->n_heads / (a->n_heads / a->n_kv_heads);
        const struct batch *host = a->batch->host ? a->batch->host : a->batch;
        size_t n_kv = (size_t)host->position[t] + 1;
        size_t n_blocks = (n_kv + ops->attn_block - 1) / ops->attn_block;
        const int32_t *pages = a->batch->pages + host->page_start[host->seq[t]];
        float *max = scores + n_kv, *sum = max + n_blocks, *o = sum + n_blocks;
        ops->attn_scores(j->ctx, scores, a->q + i * a->head_dim, a->kv, kv_head, pages, n_kv, a->scale);
        ops->attn_softmax(j->ctx, scores, max, sum, n_kv);
        ops->attn_values(j->ctx, o, scores, a->kv, kv_head, pages, n_kv);
        ops->attn_combine(j->ctx, a->out + i * a->head_dim, max, sum, o, n_blocks, a->head_dim);
    }
}

static void compose_attention(const struct op_ctx *ctx, const struct attention_args *a) {
    size_t n_threads = ctx->ops->device ? 1 : (size_t)pool_size(ctx->pool);
    struct attention_job j = {ctx, a, ctx->scratch_floats / n_threads};
    size_t n = a->batch->n_tokens * a->n_heads;
    if (ctx->ops->device) attention_piece(&j, 0, n, 0); // one after the other: a device's ops are queued in order
    else pool_for(ctx->pool, n, 1, attention_piece, &j);
}

static void outputs_attention(const struct op_ctx *ctx, const struct attention_args *a) {
    ops_tap(ctx, "attn", a->out, a->batch->n_tokens, a->n_heads * a->head_dim);
}

static void compose_rope_attention(const struct op_ctx *ctx, const struct rope_attention_args *a) {
    ops_qk_norm_rope_store(ctx, a->store);
    ops_attention(ctx, a->attention);
}

// Its parts tap their own results; whoever watches gets the parts.
static void outputs_rope_attention(const struct op_ctx *ctx, const struct rope_attention_args *a) {
    (void)ctx, (void)a;
}

static void compose_residual(const struct op_ctx *ctx, const struct proj_residual_args *a, const char *name) {
    ctx->ops->matmul(ctx, a->projected, a->in, a->w, a->n_tokens);
    ops_tap(ctx, name, a->projected, a->n_tokens, a->w->n_out);
    ctx->ops->add(ctx, a->x, a->projected, a->n_tokens * a->w->n_out);
}

static void compose_out_residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    compose_residual(ctx, a, "attn_out");
}

static void compose_down_residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    compose_residual(ctx, a, "mlp_out");
}

// The residual stream is the model layer's to tap.
static void outputs_out_residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    (void)ctx, (void)a;
}

static void outputs_down_residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    (void)ctx, (void)a;
}

static void compose_norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    size_t n_ff = a->w_gate->n_out;
    ctx->ops->rmsnorm(ctx, a->normed, a->x, a->norm, a->eps, a->n_tokens, a->w_gate->n_in);
    ops_tap(ctx, "mlp_norm", a->normed, a->n_tokens, a->w_gate->n_in);
    ctx->ops->matmul(ctx, a->gate, a->normed, a->w_gate, a->n_tokens);
    ops_tap(ctx, "gate", a->gate, a->n_tokens, n_ff);
    ctx->ops->matmul(ctx, a->up, a->normed, a->w_up, a->n_tokens);
    ops_tap(ctx, "up", a->up, a->n_tokens, n_ff);
    ctx->ops->silu_mul(ctx, a->act, a->gate, a->up, a->n_tokens * n_ff);
}

static void outputs_norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    ops_tap(ctx, "act", a->act, a->n_tokens, a->w_gate->n_out);
}

static void compose_norm_head(const struct op_ctx *ctx, const struct norm_head_args *a) {
    size_t n_rows = a->batch->n_logit_rows, hidden = a->head->n_in;
    ctx->ops->gather(ctx, a->rows, a->x, a->batch->logit_rows, n_rows, hidden);
    ctx->ops->rmsnorm(ctx, a->normed, a->rows, a->norm, a->eps, n_rows, hidden);
    ops_tap(ctx, "final_norm", a->normed, n_rows, hidden);
    ctx->ops->matmul(ctx, a->logits, a->normed, a->head, n_rows);
}

// The logits, too.
static void outputs_norm_head(const struct op_ctx *ctx, const struct norm_head_args *a) {
    (void)ctx, (void)a;
}

#define ARGS_norm_qkv norm_qkv_args
#define ARGS_qk_norm_rope_store qk_norm_rope_store_args
#define ARGS_attention attention_args
#define ARGS_rope_attention rope_attention_args
#define ARGS_out_residual proj_residual_args
#define ARGS_norm_gate_up norm_gate_up_args
#define ARGS_down_residual proj_residual_args
#define ARGS_norm_head norm_head_args

#define DISPATCH(UPPER, lower, ...)                                                                                    \
    void ops_##lower(const struct op_ctx *ctx, const struct ARGS_##lower *a) {                                         \
        if ((ctx->fusion >> FUSED_##UPPER & 1) && ctx->ops->lower &&                                                   \
            !(ctx->tap && FUSED_##UPPER == FUSED_ROPE_ATTENTION)) {                                                    \
            ctx->ops->lower(ctx, a);                                                                                   \
        } else {                                                                                                       \
            compose_##lower(ctx, a);                                                                                   \
        }                                                                                                              \
        outputs_##lower(ctx, a);                                                                                       \
    }
FUSED_OPS(DISPATCH)

static void names_text(uint32_t mask, char *text, size_t size) {
    size_t used = 0;
    if (size) text[0] = '\0';
    for (int i = 0; i < FUSED_COUNT; i++) {
        if (!(mask >> i & 1) || used >= size) continue;
        int n = snprintf(text + used, size - used, "%s%s", used ? "," : "", infos[i].name);
        if (n > 0) used += (size_t)n;
    }
}

bool fusion_parse(const char *text, uint32_t *mask, struct error *err) {
    if (strcmp(text, "on") == 0) return *mask = all_ops, true;
    if (strcmp(text, "off") == 0) return *mask = 0, true;
    uint32_t found = 0;
    for (const char *at = text;; at++) {
        size_t length = strcspn(at, ",");
        int i = 0;
        while (i < FUSED_COUNT && (strlen(infos[i].name) != length || strncmp(infos[i].name, at, length) != 0)) i++;
        if (i == FUSED_COUNT) {
            char known[256];
            names_text(all_ops, known, sizeof known);
            return error_set(err, "fusion '%.*s': expected on, off or a list of %s", (int)(length < 64 ? length : 64),
                             at, known);
        }
        found |= 1u << i;
        at += length;
        if (!*at) break;
    }
    *mask = found;
    return true;
}

const char *fusion_text(uint32_t mask, char *text, size_t size) {
    mask &= all_ops;
    if (mask == all_ops || mask == 0) {
        snprintf(text, size, "%s", mask ? "on" : "off");
    } else {
        names_text(mask, text, size);
    }
    return text;
}

// A matmul holds one weight row for each thread and the inputs rounded in up to two ways (bf16, integers, for weights
// of both kinds); composed attention its scores and blocks for each thread. They never run at once.
bool ops_scratch_floats(const struct ops_limits *limits, size_t *out) {
    size_t n_threads = limits->n_threads > 0 ? (size_t)limits->n_threads : 1;
    // Every token's input in two roundings, one of them in groups of up to 16 tokens, and of each thread a tile's rows
    // as f32 (16 of at most width + 32).
    enum { OWN_ROWS = 16, OWN_PAD = OWN_ROWS * 32, GROUP = 16 };
    size_t rows, own, matmul, attention;
    if (!size_mul_add(n_threads, OWN_ROWS, GROUP, &own) || !size_mul_add(limits->max_tokens, 2, own, &rows) ||
        !size_mul(rows, limits->max_width, &matmul) || !size_mul_add(n_threads, OWN_PAD, matmul, &matmul))
        return false;
    if (!attention_floats(limits->max_positions, limits->head_dim, &attention)) return false;
    if (!size_mul(attention, n_threads, &attention)) return false;
    *out = matmul > attention ? matmul : attention;
    return true;
}
