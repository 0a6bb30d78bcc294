// linear.c: the portable embed, matmul, bias, add and gather. Norms and attention are elsewhere.
#include "format/groups.h"
#include "ops/cpu/activation.h"
#include "ops/cpu/ref/ref.h"

#include <string.h>

enum { ROW_GRAIN = 16, TOKEN_GRAIN = 4, ELEMENT_GRAIN = 4096 };

// One row, exactly as f32.
static void row_to_f32(const struct matrix *w, size_t row, float *out) {
    const unsigned char *src = (const unsigned char *)w->data + row * w->row_bytes;
    if (w->type == DTYPE_BF16) {
        for (size_t i = 0; i < w->n_in; i++) {
            uint16_t h;
            memcpy(&h, src + 2 * i, sizeof h);
            out[i] = bf16_to_f32(h);
        }
    } else if (w->type == DTYPE_F32) {
        memcpy(out, src, w->n_in * sizeof(float));
    } else {
        dtype_to_f32(w->type, src, out, w->n_in);
    }
}

struct embed_job {
    float *x;
    const struct matrix *table;
    const int32_t *token;
};

static void embed_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct embed_job *j = user;
    for (size_t t = begin; t < end; t++) row_to_f32(j->table, (size_t)j->token[t], j->x + t * j->table->n_in);
}

static void embed(const struct op_ctx *ctx, float *x, const struct matrix *table, const int32_t *token,
                  size_t n_tokens) {
    struct embed_job j = {x, table, token};
    pool_for(ctx->pool, n_tokens, TOKEN_GRAIN, embed_piece, &j);
}

// One BF16 row as f32, dealt out for dotpair.
static void dealt_row(const struct matrix *w, size_t row, float *out) {
    const unsigned char *src = (const unsigned char *)w->data + row * w->row_bytes;
    for (size_t i = 0; i < w->n_in; i++) {
        uint16_t h;
        memcpy(&h, src + 2 * i, sizeof h);
        out[dealt_place(i, w->n_in)] = bf16_to_f32(h);
    }
}

struct matmul_job {
    float *y;
    const float
        *x; // [n_tokens, n_in] as it is multiplied: for BF16 rounded and dealt out, for quantised weights act_rows
    const struct matrix *w;
    size_t n_tokens;
    float *rows; // [n_threads, n_in] one weight row of each thread
};

static void matmul_piece(void *user, size_t begin, size_t end, int thread) {
    const struct matmul_job *j = user;
    size_t n = j->w->n_in;
    float *row = j->rows + (size_t)thread * n;
    for (size_t o = begin; o < end; o++) {
        if (j->w->type == DTYPE_BF16) dealt_row(j->w, o, row);
        else row_to_f32(j->w, o, row);
        for (size_t t = 0; t < j->n_tokens; t++) {
            const float *x = j->x + t * n;
            j->y[t * j->w->n_out + o] = j->w->type == DTYPE_BF16 ? dotpair_bf16(row, x, n) : dot16_f32(row, x, n);
        }
    }
}

// A row of quantised weights: integers, scales and minima of n elements.
struct groups {
    int8_t *q;
    float *scale, *min;
};

static float qdot(const struct matrix *w, const struct groups *g, const struct act_row *x) {
    const bool bytes = ops_rounds_to_int8(w->type);
    const float *scale = bytes ? x->scale : x->wide_scale;
    size_t len = dtype_group_len(w->type);
    bool has_min = dtype_has_min(w->type);
    float y = 0.0f;
    for (size_t i = 0, k = 0; k < w->n_in; i++, k += len) {
        int32_t products = 0, sum = 0;
        for (size_t e = k; e < k + len; e++) products += g->q[e] * (bytes ? x->q[e] : x->wide[e]);
        y = fmaf(g->scale[i] * scale[k / ACT_BLOCK], (float)products, y);
        if (!has_min) continue;
        for (size_t e = k; e < k + len; e++) sum += x->q[e];
        y = fmaf(g->min[i], scale[k / ACT_BLOCK] * (float)sum, y);
    }
    return y;
}

static void quantised_piece(void *user, size_t begin, size_t end, int thread) {
    const struct matmul_job *j = user;
    size_t n = j->w->n_in;
    float *row = j->rows + (size_t)thread * n; // n / 4 + 2 * (n / 16) floats of it
    struct groups g = {(int8_t *)row, row + n / 4, row + n / 4 + n / ACT_GROUP};
    for (size_t o = begin; o < end; o++) {
        dtype_to_groups(j->w->type, (const uint8_t *)j->w->data + o * j->w->row_bytes, g.q, g.scale, g.min, n);
        for (size_t t = 0; t < j->n_tokens; t++) {
            struct act_row x = act_row_at((float *)(uintptr_t)j->x, n, t);
            j->y[t * j->w->n_out + o] = qdot(j->w, &g, &x);
        }
    }
}

struct round_job {
    float *y;
    const float *x;
    size_t n;
    bool bytes; // activations for quantised weights: with 8 bits, or with 13
};

static void round_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct round_job *j = user;
    for (size_t t = begin; t < end; t++) {
        const float *x = j->x + t * j->n;
        float *y = j->y + t * j->n;
        for (size_t i = 0; i < j->n; i++) y[dealt_place(i, j->n)] = bf16_to_f32(bf16_from_f32(x[i]));
    }
}

static void act_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct round_job *j = user;
    for (size_t t = begin; t < end; t++) {
        struct act_row row = act_row_at(j->y, j->n, t);
        for (size_t b = 0; b < j->n / ACT_BLOCK; b++) {
            const float *x = j->x + t * j->n + b * ACT_BLOCK;
            if (j->bytes) row.scale[b] = act_block(x, row.q + b * ACT_BLOCK);
            else row.wide_scale[b] = act_wide_block(x, row.wide + b * ACT_BLOCK);
        }
    }
}

// Scratch: [n_threads, n_in] rows, then the rounded inputs, at most [n_tokens, n_in].
static void matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens) {
    struct matmul_job j = {y, x, w, n_tokens, ctx->scratch};
    struct round_job r = {ctx->scratch + (size_t)pool_size(ctx->pool) * w->n_in, x, w->n_in,
                          ops_rounds_to_int8(w->type)};
    bool quantised = dtype_info(w->type)->is_quantised;
    if (w->type == DTYPE_BF16) pool_for(ctx->pool, n_tokens, TOKEN_GRAIN, round_piece, &r);
    if (quantised) pool_for(ctx->pool, n_tokens, TOKEN_GRAIN, act_piece, &r);
    if (quantised || w->type == DTYPE_BF16) j.x = r.y;
    pool_for(ctx->pool, w->n_out, ROW_GRAIN, quantised ? quantised_piece : matmul_piece, &j);
}

struct bias_job {
    float *y;
    const float *b;
    size_t n;
};

static void bias_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct bias_job *j = user;
    for (size_t t = begin; t < end; t++)
        for (size_t i = 0; i < j->n; i++) j->y[t * j->n + i] += j->b[i];
}

static void bias(const struct op_ctx *ctx, float *y, const float *b, size_t n_rows, size_t n) {
    struct bias_job j = {y, b, n};
    pool_for(ctx->pool, n_rows, TOKEN_GRAIN, bias_piece, &j);
}

static void add_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct round_job *j = user;
    for (size_t i = begin; i < end; i++) j->y[i] += j->x[i];
}

static void add(const struct op_ctx *ctx, float *x, const float *y, size_t n) {
    struct round_job j = {x, y, 0, false};
    pool_for(ctx->pool, n, ELEMENT_GRAIN, add_piece, &j);
}

static void gather(const struct op_ctx *ctx, float *y, const float *x, const int32_t *rows, size_t n_rows, size_t n) {
    (void)ctx;
    for (size_t r = 0; r < n_rows; r++) memcpy(y + r * n, x + (size_t)rows[r] * n, n * sizeof(float));
}

void ref_fill_linear(struct ops *ops) {
    ops->embed = embed;
    ops->matmul = matmul;
    ops->bias = bias;
    ops->add = add;
    ops->gather = gather;
}
