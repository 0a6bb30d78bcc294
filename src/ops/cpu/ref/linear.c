// linear.c: the portable embed, matmul, bias, add and gather. Norms and attention are elsewhere.
#include "ops/cpu/math.h"
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

struct matmul_job {
    float *y;
    const float *x; // as it is multiplied: rounded, for bf16 weights
    const struct matrix *w;
    size_t n_tokens;
    float *rows; // [n_threads, n_in] one weight row of each thread
};

static void matmul_piece(void *user, size_t begin, size_t end, int thread) {
    const struct matmul_job *j = user;
    size_t n = j->w->n_in;
    float *row = j->rows + (size_t)thread * n;
    for (size_t o = begin; o < end; o++) {
        row_to_f32(j->w, o, row);
        for (size_t t = 0; t < j->n_tokens; t++) {
            const float *x = j->x + t * n;
            j->y[t * j->w->n_out + o] = j->w->type == DTYPE_BF16 ? dot16_bf16(row, x, n) : dot16_f32(row, x, n);
        }
    }
}

struct round_job {
    float *y;
    const float *x;
};

static void round_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct round_job *j = user;
    for (size_t i = begin; i < end; i++) j->y[i] = bf16_to_f32(bf16_from_f32(j->x[i]));
}

// Scratch: [n_threads, n_in] rows, then [n_tokens, n_in] rounded inputs.
static void matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens) {
    struct matmul_job j = {y, x, w, n_tokens, ctx->scratch};
    if (w->type == DTYPE_BF16) {
        struct round_job r = {ctx->scratch + (size_t)pool_size(ctx->pool) * w->n_in, x};
        pool_for(ctx->pool, n_tokens * w->n_in, ELEMENT_GRAIN, round_piece, &r);
        j.x = r.y;
    }
    pool_for(ctx->pool, w->n_out, ROW_GRAIN, matmul_piece, &j);
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
    struct round_job j = {x, y};
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
