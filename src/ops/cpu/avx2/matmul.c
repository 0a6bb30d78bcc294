// matmul.c: matrix products in AVX2, alone and fused with what stands before and behind them.
//
// A parallel loop runs over tiles of TILE_ROWS rows of one or more matrices. A tile computes its dot products for all
// tokens into a small buffer on the stack, and the epilogue adds a bias or a residual, or joins gate and up, on the way
// to memory. Which tile an element is in changes nothing about its sum: each has sixteen partial sums of its own.
//
// One token reads rows as stored, four at a time. More tokens (and quantised weights) go by chunks of K: SIX rows of a
// chunk become f32 in L1, and meet the tokens two by two.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "ops/cpu/avx2/vec.h"

enum {
    TILE_ROWS = 12,    // rows of a tile: a multiple of 4 (one token) and of CHUNK_ROWS
    CHUNK_ROWS = 6,    // rows converted at a time
    CHUNK = 512,       // elements of K converted at a time: a multiple of every block_len, and 12 KiB of L1
    TILE_TOKENS = 128, // tokens whose partial sums are kept between chunks: 48 KiB of L2
    ROUND_GRAIN = 16384,
};

// ---- Dot products
// ----------------------------------------------------------------------------------------------------

// Lanes of the last n % 16 terms, by hand.
static void dot_tail(float *acc, const float *w, const float *x, size_t n) {
    for (size_t l = 0; l < n; l++) acc[l] = fmaf(w[l], x[l], acc[l]);
}

// out[r * stride] = dot16(row r, x) for R rows as stored.
INLINE void dot_stored(enum dtype type, float *out, size_t stride, const uint8_t *w, size_t row_bytes, const float *x,
                       size_t n, const size_t R) {
    const size_t size = type == DTYPE_F32 ? 4 : 2;
    __m256 low[4], high[4];
    for (size_t r = 0; r < R; r++) low[r] = high[r] = _mm256_setzero_ps();
    size_t k = 0;
    for (; k + DOT_LANES <= n; k += DOT_LANES) {
        __m256 a = _mm256_loadu_ps(x + k), b = _mm256_loadu_ps(x + k + 8);
        for (size_t r = 0; r < R; r++) {
            const uint8_t *at = w + r * row_bytes + k * size;
            low[r] = _mm256_fmadd_ps(load_as_f32(type, at), a, low[r]);
            high[r] = _mm256_fmadd_ps(load_as_f32(type, at + 8 * size), b, high[r]);
        }
    }
    for (size_t r = 0; r < R; r++) {
        float acc[DOT_LANES], tail[DOT_LANES] = {0};
        _mm256_storeu_ps(acc, low[r]);
        _mm256_storeu_ps(acc + 8, high[r]);
        if (k < n) {
            dtype_to_f32(type, w + r * row_bytes + k * size, tail, n - k);
            dot_tail(acc, tail, x + k, n - k);
        }
        out[r * stride] = dot16_reduce_at(acc);
    }
}

INLINE void dots_stored(enum dtype type, float *out, size_t stride, const uint8_t *w, size_t row_bytes, size_t n_rows,
                        const float *x, size_t n) {
    size_t r = 0;
    for (; r + 4 <= n_rows; r += 4) dot_stored(type, out + r * stride, stride, w + r * row_bytes, row_bytes, x, n, 4);
    for (; r < n_rows; r++) dot_stored(type, out + r * stride, stride, w + r * row_bytes, row_bytes, x, n, 1);
}

// Holds a value in a register: gcc would fold the load into every fma that uses it, and loads are the limit then.
INLINE __m256 keep(__m256 v) {
    __asm__("" : "+x"(v));
    return v;
}

// Continues the partial sums of R rows (a chunk in f32, CHUNK apart) and N tokens (n_in apart) over n terms.
// acc: [CHUNK_ROWS, TILE_TOKENS, 16]
INLINE void dot_chunk(float *acc, const float *w, const float *x, size_t n_in, size_t n, bool first, const size_t R,
                      const size_t N) {
    __m256 low[3][2], high[3][2];
    for (size_t r = 0; r < R; r++) {
        for (size_t t = 0; t < N; t++) {
            const float *at = acc + (r * TILE_TOKENS + t) * DOT_LANES;
            low[r][t] = first ? _mm256_setzero_ps() : _mm256_load_ps(at);
            high[r][t] = first ? _mm256_setzero_ps() : _mm256_load_ps(at + 8);
        }
    }
    size_t k = 0;
    for (; k + DOT_LANES <= n; k += DOT_LANES) {
        for (size_t r = 0; r < R; r++) {
            __m256 a = keep(_mm256_load_ps(w + r * CHUNK + k));
            for (size_t t = 0; t < N; t++) low[r][t] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x + t * n_in + k), low[r][t]);
        }
        for (size_t r = 0; r < R; r++) {
            __m256 a = keep(_mm256_load_ps(w + r * CHUNK + k + 8));
            for (size_t t = 0; t < N; t++)
                high[r][t] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x + t * n_in + k + 8), high[r][t]);
        }
    }
    for (size_t r = 0; r < R; r++) {
        for (size_t t = 0; t < N; t++) {
            float *at = acc + (r * TILE_TOKENS + t) * DOT_LANES;
            _mm256_store_ps(at, low[r][t]);
            _mm256_store_ps(at + 8, high[r][t]);
            dot_tail(at, w + r * CHUNK + k, x + t * n_in + k, n - k);
        }
    }
}

static void dot_chunk_rows(float *acc, const float *w, size_t n_rows, const float *x, size_t n_in, size_t n_tokens,
                           size_t n, bool first) {
    const size_t row = TILE_TOKENS * DOT_LANES;
    size_t t = 0;
    for (; t + 2 <= n_tokens; t += 2, x += 2 * n_in, acc += 2 * DOT_LANES) {
        size_t r = 0;
        for (; r + 3 <= n_rows; r += 3) dot_chunk(acc + r * row, w + r * CHUNK, x, n_in, n, first, 3, 2);
        for (; r < n_rows; r++) dot_chunk(acc + r * row, w + r * CHUNK, x, n_in, n, first, 1, 2);
    }
    if (t == n_tokens) return;
    size_t r = 0;
    for (; r + 3 <= n_rows; r += 3) dot_chunk(acc + r * row, w + r * CHUNK, x, n_in, n, first, 3, 1);
    for (; r < n_rows; r++) dot_chunk(acc + r * row, w + r * CHUNK, x, n_in, n, first, 1, 1);
}

static void chunk_to_f32(const struct matrix *w, size_t row, size_t k, float *out, size_t n) {
    const struct dtype_info *info = dtype_info(w->type);
    const uint8_t *from = (const uint8_t *)w->data + row * w->row_bytes + k / info->block_len * info->block_bytes;
    size_t i = 0;
    if (w->type == DTYPE_BF16)
        for (; i + 8 <= n; i += 8) _mm256_store_ps(out + i, load_bf16(from + 2 * i));
    if (i < n) dtype_to_f32(w->type, from + i / info->block_len * info->block_bytes, out + i, n - i);
}

// out[r * TILE_TOKENS + t] = dot16(row + r, x[t]) for up to TILE_ROWS rows and TILE_TOKENS tokens.
static void dots_by_chunk(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                          size_t n_tokens) {
    float chunk[CHUNK_ROWS * CHUNK] __attribute__((aligned(32)));
    float acc[CHUNK_ROWS * TILE_TOKENS * DOT_LANES] __attribute__((aligned(32)));
    for (size_t r0 = 0; r0 < n_rows; r0 += CHUNK_ROWS) {
        size_t n_chunk = n_rows - r0 < CHUNK_ROWS ? n_rows - r0 : CHUNK_ROWS;
        for (size_t k = 0; k < w->n_in; k += CHUNK) {
            size_t n = w->n_in - k < CHUNK ? w->n_in - k : CHUNK;
            for (size_t r = 0; r < n_chunk; r++) chunk_to_f32(w, row + r0 + r, k, chunk + r * CHUNK, n);
            dot_chunk_rows(acc, chunk, n_chunk, x + k, w->n_in, n_tokens, n, k == 0);
        }
        for (size_t r = 0; r < n_chunk; r++) {
            for (size_t t = 0; t < n_tokens; t++)
                out[(r0 + r) * TILE_TOKENS + t] = dot16_reduce_at(acc + (r * TILE_TOKENS + t) * DOT_LANES);
        }
    }
}

static void dots(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    const uint8_t *at = (const uint8_t *)w->data + row * w->row_bytes;
    if (n_tokens == 1 && w->type == DTYPE_BF16)
        dots_stored(DTYPE_BF16, out, TILE_TOKENS, at, w->row_bytes, n_rows, x, w->n_in);
    else if (n_tokens == 1 && w->type == DTYPE_F32)
        dots_stored(DTYPE_F32, out, TILE_TOKENS, at, w->row_bytes, n_rows, x, w->n_in);
    else if (n_tokens == 1 && w->type == DTYPE_F16)
        dots_stored(DTYPE_F16, out, TILE_TOKENS, at, w->row_bytes, n_rows, x, w->n_in);
    else dots_by_chunk(out, w, row, n_rows, x, n_tokens);
}

// ---- Tiles and epilogues
// ---------------------------------------------------------------------------------------------

struct part {
    const struct matrix *w, *up; // up: NULL, or gate's partner
    const float *x;              // [n_tokens, n_in] as it is multiplied
    float *y;                    // [n_tokens, n_out]
    const float *bias;           // NULL or [n_out]
    bool add;                    // y += instead of y =
};

struct product {
    struct part parts[3];
    size_t n_parts, n_tokens;
};

static size_t n_tiles(const struct matrix *w) {
    return (w->n_out + TILE_ROWS - 1) / TILE_ROWS;
}

// out[r][t] to y[t][row + r].
static void write_tile(const struct part *p, const float *out, size_t row, size_t n_rows, size_t t0, size_t n_tokens) {
    for (size_t t = 0; t < n_tokens; t++) {
        float *y = p->y + (t0 + t) * p->w->n_out + row;
        for (size_t r = 0; r < n_rows; r++) {
            float v = out[r * TILE_TOKENS + t];
            if (p->bias) v += p->bias[row + r];
            y[r] = p->add ? y[r] + v : v;
        }
    }
}

static void run_tile(const struct part *p, size_t tile, size_t n_tokens) {
    float out[TILE_ROWS * TILE_TOKENS], up[TILE_ROWS * TILE_TOKENS];
    size_t row = tile * TILE_ROWS, n_in = p->w->n_in;
    size_t n_rows = p->w->n_out - row < TILE_ROWS ? p->w->n_out - row : TILE_ROWS;
    for (size_t t0 = 0; t0 < n_tokens; t0 += TILE_TOKENS) {
        size_t n = n_tokens - t0 < TILE_TOKENS ? n_tokens - t0 : TILE_TOKENS;
        dots(out, p->w, row, n_rows, p->x + t0 * n_in, n);
        if (p->up) {
            dots(up, p->up, row, n_rows, p->x + t0 * n_in, n);
            for (size_t r = 0; r < n_rows; r++) {
                float *g = out + r * TILE_TOKENS, *u = up + r * TILE_TOKENS;
                size_t t = 0;
                for (; t + 8 <= n; t += 8)
                    _mm256_storeu_ps(g + t, silu_mul_8(_mm256_loadu_ps(g + t), _mm256_loadu_ps(u + t)));
                for (; t < n; t++) g[t] = g[t] / (1.0f + exp32(-g[t])) * u[t];
            }
        }
        write_tile(p, out, row, n_rows, t0, n);
    }
}

static void product_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct product *p = user;
    for (size_t i = begin; i < end; i++) {
        size_t part = 0, tile = i;
        while (tile >= n_tiles(p->parts[part].w)) tile -= n_tiles(p->parts[part++].w);
        run_tile(&p->parts[part], tile, p->n_tokens);
    }
}

static void run_product(const struct op_ctx *ctx, struct product *p) {
    size_t n = 0;
    for (size_t i = 0; i < p->n_parts; i++) n += n_tiles(p->parts[i].w);
    pool_for(ctx->pool, n, n / (8 * (size_t)pool_size(ctx->pool)) + 1, product_piece, p);
}

// ---- Inputs
// ----------------------------------------------------------------------------------------------------------

struct round_job {
    float *y;
    const float *x;
};

static void round_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct round_job *j = user;
    size_t i = begin;
    for (; i + 8 <= end; i += 8)
        _mm256_storeu_ps(j->y + i, _mm256_castsi256_ps(round_to_bf16(_mm256_loadu_ps(j->x + i))));
    for (; i < end; i++) j->y[i] = bf16_to_f32(bf16_from_f32(j->x[i]));
}

// x as `w` multiplies it: itself, or rounded to bf16 in the scratch.
static const float *input(const struct op_ctx *ctx, const float *x, const struct matrix *w, size_t n_tokens) {
    if (w->type != DTYPE_BF16) return x;
    struct round_job j = {ctx->scratch, x};
    pool_for(ctx->pool, n_tokens * w->n_in, ROUND_GRAIN, round_piece, &j);
    return ctx->scratch;
}

struct norm_job {
    float *rounded, *plain; // either may be NULL
    const float *x, *w;
    const int32_t *rows; // NULL: row t is x[t]
    float eps;
    size_t n;
};

static void norm_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct norm_job *j = user;
    for (size_t t = begin; t < end; t++) {
        const float *x = j->x + (j->rows ? (size_t)j->rows[t] : t) * j->n;
        if (j->rounded) avx2_rmsnorm_row(j->rounded + t * j->n, x, j->w, j->eps, j->n, true);
        if (j->plain) avx2_rmsnorm_row(j->plain + t * j->n, x, j->w, j->eps, j->n, false);
    }
}

// Sets the parts' x to the norm of `j->x`, normalised once, rounded once where a part has bf16 weights.
static void norm_input(const struct op_ctx *ctx, struct norm_job j, float *plain, struct product *p) {
    for (size_t i = 0; i < p->n_parts; i++) {
        const struct part *part = &p->parts[i];
        if (part->w->type == DTYPE_BF16) j.rounded = ctx->scratch;
        else j.plain = plain;
    }
    j.n = p->parts[0].w->n_in;
    pool_for(ctx->pool, p->n_tokens, ROUND_GRAIN / (4 * j.n + 1) + 1, norm_piece, &j);
    for (size_t i = 0; i < p->n_parts; i++) p->parts[i].x = p->parts[i].w->type == DTYPE_BF16 ? j.rounded : j.plain;
}

// ---- The ops
// ---------------------------------------------------------------------------------------------------------

static void matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens) {
    struct product p = {
        .parts = {{.w = w, .x = input(ctx, x, w, n_tokens), .y = y}}, .n_parts = 1, .n_tokens = n_tokens};
    run_product(ctx, &p);
}

static void norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    struct product p = {.parts = {{.w = a->wq, .y = a->q, .bias = a->bq},
                                  {.w = a->wk, .y = a->k, .bias = a->bk},
                                  {.w = a->wv, .y = a->v, .bias = a->bv}},
                        .n_parts = 3,
                        .n_tokens = a->n_tokens};
    norm_input(ctx, (struct norm_job){.x = a->x, .w = a->norm, .eps = a->eps}, a->normed, &p);
    run_product(ctx, &p);
}

static void residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    struct product p = {.parts = {{.w = a->w, .x = input(ctx, a->in, a->w, a->n_tokens), .y = a->x, .add = true}},
                        .n_parts = 1,
                        .n_tokens = a->n_tokens};
    run_product(ctx, &p);
}

static void norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    struct norm_job norm = {.x = a->x, .w = a->norm, .eps = a->eps};
    struct product p = {.parts = {{.w = a->w_gate, .up = a->w_up, .y = a->act}}, .n_parts = 1, .n_tokens = a->n_tokens};
    if ((a->w_gate->type == DTYPE_BF16) == (a->w_up->type == DTYPE_BF16)) {
        norm_input(ctx, norm, a->normed, &p);
        run_product(ctx, &p);
        return;
    }
    // Inputs that differ (one of the two is bf16, a rare file): the two products stay apart.
    p.parts[0] = (struct part){.w = a->w_gate, .y = a->gate};
    p.parts[1] = (struct part){.w = a->w_up, .y = a->up};
    p.n_parts = 2;
    norm_input(ctx, norm, a->normed, &p);
    run_product(ctx, &p);
    ctx->ops->silu_mul(ctx, a->act, a->gate, a->up, a->n_tokens * a->w_gate->n_out);
}

static void norm_head(const struct op_ctx *ctx, const struct norm_head_args *a) {
    struct product p = {.parts = {{.w = a->head, .y = a->logits}}, .n_parts = 1, .n_tokens = a->batch->n_logit_rows};
    struct norm_job norm = {.x = a->x, .w = a->norm, .eps = a->eps, .rows = a->batch->logit_rows};
    norm_input(ctx, norm, a->normed, &p);
    run_product(ctx, &p);
}

void avx2_fill_matmul(struct ops *ops) {
    ops->matmul = matmul;
    ops->norm_qkv = norm_qkv;
    ops->out_residual = residual;
    ops->norm_gate_up = norm_gate_up;
    ops->down_residual = residual;
    ops->norm_head = norm_head;
}

#endif
