// pointwise.c: the portable norms, rope, silu_mul and kv_store. Products with weight matrices are elsewhere.
#include "ops/cpu/math.h"
#include "ops/cpu/ref/ref.h"
#include "ops/kv_page.h"

enum { TOKEN_GRAIN = 4, ELEMENT_GRAIN = 1024 };

struct norm_job {
    float *y;
    const float *x, *w;
    float eps;
    size_t n;
};

static void norm_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct norm_job *j = user;
    for (size_t t = begin; t < end; t++) {
        const float *x = j->x + t * j->n;
        float *y = j->y + t * j->n;
        float r = 1.0f / sqrtf(dot16_f32(x, x, j->n) / (float)j->n + j->eps);
        for (size_t i = 0; i < j->n; i++) y[i] = (x[i] * r) * j->w[i];
    }
}

static void rmsnorm(const struct op_ctx *ctx, float *y, const float *x, const float *w, float eps, size_t n_rows,
                    size_t n) {
    struct norm_job j = {y, x, w, eps, n};
    pool_for(ctx->pool, n_rows, TOKEN_GRAIN, norm_piece, &j);
}

static void head_rmsnorm(const struct op_ctx *ctx, float *x, const float *w, float eps, size_t n_tokens, size_t n_heads,
                         size_t head_dim) {
    rmsnorm(ctx, x, x, w, eps, n_tokens * n_heads, head_dim);
}

struct rope_job {
    float *x;
    const float *cos_sin;
    size_t n_heads, head_dim;
};

static void rope_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct rope_job *j = user;
    size_t half = j->head_dim / 2;
    for (size_t t = begin; t < end; t++) {
        const float *c = j->cos_sin + t * j->head_dim, *s = c + half;
        for (size_t h = 0; h < j->n_heads; h++) {
            float *lo = j->x + (t * j->n_heads + h) * j->head_dim, *hi = lo + half;
            for (size_t i = 0; i < half; i++) {
                float a = lo[i], b = hi[i];
                lo[i] = fmaf(a, c[i], -(b * s[i]));
                hi[i] = fmaf(b, c[i], a * s[i]);
            }
        }
    }
}

static void rope(const struct op_ctx *ctx, float *x, const float *cos_sin, size_t n_tokens, size_t n_heads,
                 size_t head_dim) {
    struct rope_job j = {x, cos_sin, n_heads, head_dim};
    pool_for(ctx->pool, n_tokens, TOKEN_GRAIN, rope_piece, &j);
}

struct store_job {
    struct kv_layer *kv;
    const struct batch *batch;
    const float *k, *v;
};

static void store_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct store_job *j = user;
    struct kv_layer *kv = j->kv;
    for (size_t t = begin; t < end; t++) {
        size_t position = (size_t)j->batch->position[t];
        const int32_t *pages = j->batch->pages + j->batch->page_start[j->batch->seq[t]];
        size_t page = (size_t)pages[position / KV_PAGE_TOKENS];
        for (size_t h = 0; h < kv->n_kv_heads; h++) {
            size_t row = kv_row(kv, page, h, position % KV_PAGE_TOKENS);
            size_t from = (t * kv->n_kv_heads + h) * kv->head_dim;
            kv_store_row(kv, KV_K, row, j->k + from);
            kv_store_row(kv, KV_V, row, j->v + from);
        }
    }
}

static void kv_store(const struct op_ctx *ctx, struct kv_layer *kv, const struct batch *batch, const float *k,
                     const float *v) {
    struct store_job j = {kv, batch, k, v};
    pool_for(ctx->pool, batch->n_tokens, TOKEN_GRAIN, store_piece, &j);
}

struct silu_job {
    float *act;
    const float *gate, *up;
};

static void silu_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct silu_job *j = user;
    for (size_t i = begin; i < end; i++) {
        float g = j->gate[i];
        j->act[i] = (g / (1.0f + exp32(-g))) * j->up[i];
    }
}

static void silu_mul(const struct op_ctx *ctx, float *act, const float *gate, const float *up, size_t n) {
    struct silu_job j = {act, gate, up};
    pool_for(ctx->pool, n, ELEMENT_GRAIN, silu_piece, &j);
}

void ref_fill_pointwise(struct ops *ops) {
    ops->rmsnorm = rmsnorm;
    ops->head_rmsnorm = head_rmsnorm;
    ops->rope = rope;
    ops->kv_store = kv_store;
    ops->silu_mul = silu_mul;
}
