// oracle_ops.c: the oracle's single ops, from the formulas in oracle.h. Plain loops; only the product of matrices is
// cut into blocks, so that a whole model takes seconds.
#include "model/oracle_parts.h"

#include "base/size.h"

#include <stdlib.h>

// pool_for, or one thread without a pool.
static void parallel(struct pool *pool, size_t n, size_t grain, pool_fn *fn, void *ctx) {
    if (pool) pool_for(pool, n, grain, fn, ctx);
    else if (n) fn(ctx, 0, n, 0);
}

bool oracle_embed(enum oracle_kind kind, double *x, const struct matrix *table, const int32_t *token, size_t n_tokens,
                  struct error *err) {
    for (size_t t = 0; t < n_tokens; t++) {
        if (token[t] < 0 || (size_t)token[t] >= table->n_out)
            return error_set(err, "token %zu: expected an id below %zu, found %d", t, table->n_out, token[t]);
        double *row = x + t * table->n_in;
        if (!oracle_row(table, (size_t)token[t], row, err)) return false;
        for (size_t i = 0; i < table->n_in; i++) row[i] = oracle_operand(kind, row[i]);
    }
    return true;
}

// ---- RMSNorm -------------------------------------------------------------------------------------------------------

struct norm_job {
    enum oracle_kind kind;
    double *y;
    const double *x;
    const float *w;
    double eps;
    size_t n;
};

static void norm_rows(void *ctx, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct norm_job *j = ctx;
    for (size_t row = begin; row < end; row++) {
        const double *x = j->x + row * j->n;
        double *y = j->y + row * j->n, squares = 0;
        for (size_t i = 0; i < j->n; i++) {
            double v = oracle_operand(j->kind, x[i]);
            squares += v * v;
        }
        double mean = squares / (double)j->n;
        if (j->kind == ORACLE_T) {
            for (size_t i = 0; i < j->n; i++) y[i] = x[i] / sqrt(mean + j->eps) * (double)j->w[i];
            continue;
        }
        float r = (float)(1 / sqrt((double)((float)mean + (float)j->eps)));
        for (size_t i = 0; i < j->n; i++) {
            double normed = oracle_bf16((double)((float)oracle_bf16(x[i]) * r));
            y[i] = oracle_bf16(normed * oracle_bf16((double)j->w[i]));
        }
    }
}

void oracle_rmsnorm(enum oracle_kind kind, struct pool *pool, double *y, const double *x, const float *w, double eps,
                    size_t n_rows, size_t n) {
    struct norm_job job = {.kind = kind, .y = y, .x = x, .w = w, .eps = eps, .n = n};
    parallel(pool, n_rows, 16, norm_rows, &job);
}

void oracle_head_rmsnorm(enum oracle_kind kind, struct pool *pool, double *y, const double *x, const float *w,
                         double eps, size_t n_tokens, size_t n_heads, size_t head_dim) {
    oracle_rmsnorm(kind, pool, y, x, w, eps, n_tokens * n_heads, head_dim);
}

// ---- Matrix product ------------------------------------------------------------------------------------------------

enum {
    LANES = 8,   // tokens side by side in the vectors of the inner loop
    TOKENS = 64, // tokens that share one conversion of a weight row
    ROWS = 32,   // weight rows that share one pass over the tokens' inputs
    TILE = 4,    // rows of the inner loop
};

// The sums of LANES tokens with one weight row.
typedef double lanes[LANES];

struct product_job {
    enum oracle_kind kind;
    double *y;       // [n_tokens, n_out]
    const double *x; // [token groups, n_in, LANES] LANES tokens of one channel side by side; 0 beyond the last token
    const struct oracle_matrix *w;
    const float *bias;
    size_t n_tokens, first_token; // of this block of at most TOKENS tokens
};

// sum[r][l] += w[r][i] x[i][l] for TILE rows, LANES tokens and n channels, i ascending. w: [TILE][ORACLE_CHUNK].
typedef void tile_fn(lanes *sum, const double *w, const lanes *x, size_t n);

static void tile_plain(lanes *sum, const double *w, const lanes *x, size_t n) {
    for (size_t r = 0; r < TILE; r++)
        for (size_t i = 0; i < n; i++)
            for (size_t l = 0; l < LANES; l++) sum[r][l] += w[r * ORACLE_CHUNK + i] * x[i][l];
}

#if defined(__x86_64__)
// The same operations in wider registers, and so the same bits (no fused multiply-add). 64-byte vectors, or a loop over
// l, would not stay in registers with gcc 12.
typedef double quad __attribute__((vector_size(32), may_alias));

__attribute__((target("avx2"))) static void tile_avx2(lanes *sum, const double *w, const lanes *x, size_t n) {
    quad *s = (quad *)sum, low[TILE], high[TILE];
    for (size_t r = 0; r < TILE; r++) {
        low[r] = s[2 * r];
        high[r] = s[2 * r + 1];
    }
    for (size_t i = 0; i < n; i++) {
        const quad *v = (const quad *)x[i];
        for (size_t r = 0; r < TILE; r++) {
            low[r] += w[r * ORACLE_CHUNK + i] * v[0];
            high[r] += w[r * ORACLE_CHUNK + i] * v[1];
        }
    }
    for (size_t r = 0; r < TILE; r++) {
        s[2 * r] = low[r];
        s[2 * r + 1] = high[r];
    }
}
#endif

static tile_fn *choose_tile(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return tile_avx2;
#endif
    return tile_plain;
}

static void product_rows(void *ctx, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct product_job *j = ctx;
    size_t n_in = j->w->m.n_in, n_groups = (j->n_tokens + LANES - 1) / LANES, n_rows = end - begin;
    tile_fn *tile = choose_tile();
    lanes sum[TOKENS / LANES][ROWS] __attribute__((aligned(64)));
    double w[ROWS][ORACLE_CHUNK] __attribute__((aligned(64)));
    memset(sum, 0, sizeof sum);
    memset(w, 0, sizeof w); // rows beyond n_rows are multiplied, not used
    for (size_t first = 0; first < n_in; first += ORACLE_CHUNK) {
        size_t n = n_in - first < ORACLE_CHUNK ? n_in - first : ORACLE_CHUNK;
        for (size_t r = 0; r < n_rows; r++) {
            oracle_elements(j->w, begin + r, first, w[r], n);
            if (j->kind == ORACLE_H && j->w->m.type != DTYPE_BF16)
                for (size_t i = 0; i < n; i++) w[r][i] = oracle_bf16(w[r][i]);
        }
        for (size_t g = 0; g < n_groups; g++) {
            const lanes *x = (const lanes *)j->x + (j->first_token / LANES + g) * n_in + first;
            for (size_t r = 0; r < n_rows; r += TILE) tile(&sum[g][r], w[r], x, n);
        }
    }
    for (size_t t = 0; t < j->n_tokens; t++) {
        double *y = j->y + (j->first_token + t) * j->w->m.n_out;
        for (size_t r = 0; r < n_rows; r++) {
            double v = sum[t / LANES][r][t % LANES];
            if (j->bias) v += oracle_operand(j->kind, (double)j->bias[begin + r]);
            y[begin + r] = oracle_operand(j->kind, v);
        }
    }
}

bool oracle_product(enum oracle_kind kind, struct pool *pool, double *y, const double *x, const struct oracle_matrix *w,
                    const float *bias, size_t n_tokens, struct error *err) {
    size_t n_in = w->m.n_in, padded, elements;
    if (!oracle_matrix_check(&w->m, err)) return false;
    bool fits = size_align_up(n_tokens, LANES, &padded) && size_mul(padded, n_in, &elements);
    double *columns = fits ? size_alloc_aligned(elements, sizeof *columns) : NULL;
    if (!columns) return error_set(err, "out of memory for %zu tokens of the oracle", n_tokens);
    for (size_t t = 0; t < padded; t++) {
        double *to = columns + t / LANES * LANES * n_in + t % LANES;
        for (size_t i = 0; i < n_in; i++) to[i * LANES] = t < n_tokens ? oracle_operand(kind, x[t * n_in + i]) : 0;
    }
    struct product_job job = {.kind = kind, .y = y, .x = columns, .w = w, .bias = bias};
    for (; job.first_token < n_tokens; job.first_token += TOKENS) {
        job.n_tokens = n_tokens - job.first_token < TOKENS ? n_tokens - job.first_token : TOKENS;
        if (pool) pool_for(pool, w->m.n_out, ROWS, product_rows, &job);
        else
            for (size_t r = 0; r < w->m.n_out; r += ROWS)
                product_rows(&job, r, w->m.n_out - r < ROWS ? w->m.n_out : r + ROWS, 0);
    }
    free(columns);
    return true;
}

bool oracle_linear(enum oracle_kind kind, struct pool *pool, double *y, const double *x, const struct matrix *w,
                   const float *bias, size_t n_tokens, struct error *err) {
    struct oracle_matrix m = {.m = *w};
    return oracle_product(kind, pool, y, x, &m, bias, n_tokens, err);
}

// ---- RoPE ----------------------------------------------------------------------------------------------------------

// Angle rates: Su et al. 2021, theta^(-2i/d). Linear scaling divides them all (position interpolation). Llama 3.1:
// wavelengths beyond original / low_freq_factor are stretched by the factor, those below original / high_freq_factor
// stay, with a linear blend in original / wavelength between. YaRN (Peng et al. 2023, section 3.2): the dimension in
// which a rate turns n times over the original context is d ln(original / 2 pi n) / 2 ln theta; from beta_fast's
// (rounded down) to beta_slow's (rounded up) the stretch goes from none to the factor, linearly in the dimension.
static double scaled_rate(const struct rope_config *r, size_t i, size_t head_dim, double rate) {
    const double pi = acos(-1.0);
    double keep = 1; // share of the unstretched rate
    if (r->scaling == ROPE_PLAIN) return rate;
    if (r->scaling == ROPE_LINEAR) keep = 0;
    if (r->scaling == ROPE_LLAMA3) {
        double turns = r->original_context * rate / (2 * pi);
        keep = (turns - r->low_freq_factor) / (r->high_freq_factor - r->low_freq_factor);
    }
    if (r->scaling == ROPE_YARN) {
        double per_log = (double)head_dim / (2 * log(r->theta));
        double fast = floor(per_log * log(r->original_context / (2 * pi * r->beta_fast)));
        double slow = ceil(per_log * log(r->original_context / (2 * pi * r->beta_slow)));
        fast = fmax(fast, 0);
        slow = fmin(slow, (double)head_dim - 1);
        if (slow == fast) slow += 0.001;
        keep = 1 - ((double)i - fast) / (slow - fast);
    }
    keep = fmin(fmax(keep, 0), 1);
    return keep * rate + (1 - keep) * rate / r->factor;
}

bool oracle_rope_rates(enum oracle_kind kind, const struct model *model, double *rates, double *magnitude,
                       struct error *err) {
    const struct model_config *c = &model->config;
    const struct tensor *factors =
        model->kind == MODEL_GGUF ? tensor_find(&model->gguf.tensors, "rope_freqs.weight") : NULL;
    size_t half = c->head_dim / 2;
    if (factors && (factors->type != DTYPE_F32 || factors->n_elements != half))
        return error_set(err, "oracle: tensor rope_freqs.weight: expected %zu F32 factors", half);
    for (size_t i = 0; i < half; i++) {
        double rate = pow(c->rope.theta, -2 * (double)i / (double)c->head_dim);
        if (kind == ORACLE_H) { // 1 / theta^(2i/d), each step in f32
            float exponent = (float)(2 * i) / (float)c->head_dim;
            rate = (double)(1 / (float)pow((double)(float)c->rope.theta, (double)exponent));
        }
        rate = scaled_rate(&c->rope, i, c->head_dim, rate);
        if (factors) {
            float factor;
            memcpy(&factor, (const unsigned char *)factors->data + i * sizeof factor, sizeof factor);
            rate /= (double)factor;
        }
        rates[i] = kind == ORACLE_H ? (double)(float)rate : rate;
    }
    *magnitude = 1;
    if (c->rope.scaling == ROPE_YARN)
        *magnitude = c->rope.attn_factor > 0 ? c->rope.attn_factor : 0.1 * log(c->rope.factor) + 1;
    return true;
}

struct rope_job {
    enum oracle_kind kind;
    double *y;
    const double *x, *rates;
    double magnitude;
    const int32_t *position;
    size_t n_heads, head_dim;
};

static void rope_tokens(void *ctx, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct rope_job *j = ctx;
    size_t half = j->head_dim / 2;
    for (size_t t = begin; t < end; t++) {
        for (size_t i = 0; i < half; i++) {
            double angle = (double)j->position[t] * j->rates[i];
            if (j->kind == ORACLE_H) angle = (double)(float)angle;
            double cosine = cos(angle) * j->magnitude, sine = sin(angle) * j->magnitude;
            if (j->kind == ORACLE_H) {
                cosine = oracle_bf16((double)((float)cos(angle) * (float)j->magnitude));
                sine = oracle_bf16((double)((float)sin(angle) * (float)j->magnitude));
            }
            for (size_t h = 0; h < j->n_heads; h++) {
                size_t at = (t * j->n_heads + h) * j->head_dim + i;
                double lo = oracle_operand(j->kind, j->x[at]), hi = oracle_operand(j->kind, j->x[at + half]);
                double lo_cos = oracle_operand(j->kind, lo * cosine), lo_sin = oracle_operand(j->kind, lo * sine);
                double hi_cos = oracle_operand(j->kind, hi * cosine), hi_sin = oracle_operand(j->kind, hi * sine);
                j->y[at] = oracle_operand(j->kind, lo_cos - hi_sin);
                j->y[at + half] = oracle_operand(j->kind, hi_cos + lo_sin);
            }
        }
    }
}

void oracle_rope(enum oracle_kind kind, struct pool *pool, double *y, const double *x, const double *rates,
                 double magnitude, const int32_t *position, size_t n_tokens, size_t n_heads, size_t head_dim) {
    struct rope_job job = {.kind = kind,
                           .y = y,
                           .x = x,
                           .rates = rates,
                           .magnitude = magnitude,
                           .position = position,
                           .n_heads = n_heads,
                           .head_dim = head_dim};
    parallel(pool, n_tokens, 4, rope_tokens, &job);
}

// ---- Attention -----------------------------------------------------------------------------------------------------

struct attention_job {
    enum oracle_kind kind;
    double *out;
    const struct oracle_attention *a;
    double *scores; // [threads, n_positions]
};

// sum_i a[i] b[i] in LANES partial sums.
static double dot(enum oracle_kind kind, const double *a, const double *b, size_t n) {
    double part[LANES] = {0}, sum = 0;
    size_t i = 0;
    if (kind == ORACLE_T)
        for (; i + LANES <= n; i += LANES)
            for (size_t l = 0; l < LANES; l++) part[l] += a[i + l] * b[i + l];
    for (; i < n; i++) sum += oracle_operand(kind, a[i]) * oracle_operand(kind, b[i]);
    for (size_t l = 0; l < LANES; l++) sum += part[l];
    return sum;
}

// Scores of one query and one head become probabilities.
static void softmax(enum oracle_kind kind, double *s, size_t n) {
    double max = -INFINITY, sum = 0;
    for (size_t j = 0; j < n; j++)
        if (!(s[j] <= max)) max = s[j]; // a NaN, too, is taken
    for (size_t j = 0; j < n; j++) {
        s[j] = exp(s[j] - max);
        if (kind == ORACLE_H) s[j] = (double)(float)s[j];
        sum += s[j];
    }
    for (size_t j = 0; j < n; j++)
        s[j] = kind == ORACLE_H ? oracle_bf16((double)((float)s[j] / (float)sum)) : s[j] / sum;
}

static void attend(void *ctx, size_t begin, size_t end, int thread) {
    const struct attention_job *j = ctx;
    const struct oracle_attention *a = j->a;
    size_t d = a->head_dim, kv_width = a->n_kv_heads * d;
    double *s = j->scores + (size_t)thread * a->n_positions;
    float scale = (float)(1 / sqrt((double)d));
    for (size_t item = begin; item < end; item++) {
        size_t t = item / a->n_heads, h = item % a->n_heads, n = (size_t)a->position[t] + 1;
        const double *q = a->q + item * d, *k = a->k + h / (a->n_heads / a->n_kv_heads) * d, *v = a->v + (k - a->k);
        double *out = j->out + item * d;
        for (size_t p = 0; p < n; p++) {
            double score = dot(j->kind, q, k + p * kv_width, d);
            s[p] = j->kind == ORACLE_H ? oracle_bf16((double)((float)oracle_bf16(score) * scale))
                                       : score / sqrt((double)d);
        }
        softmax(j->kind, s, n);
        for (size_t c = 0; c < d; c++) out[c] = 0;
        for (size_t p = 0; p < n; p++)
            for (size_t c = 0; c < d; c++) out[c] += s[p] * oracle_operand(j->kind, v[p * kv_width + c]);
        for (size_t c = 0; c < d; c++) out[c] = oracle_operand(j->kind, out[c]);
    }
}

bool oracle_attention(enum oracle_kind kind, struct pool *pool, double *out, const struct oracle_attention *a,
                      struct error *err) {
    if (a->n_kv_heads == 0 || a->n_heads % a->n_kv_heads != 0)
        return error_set(err, "oracle: %zu heads do not share %zu KV heads evenly", a->n_heads, a->n_kv_heads);
    for (size_t t = 0; t < a->n_tokens; t++)
        if (a->position[t] < 0 || (size_t)a->position[t] >= a->n_positions)
            return error_set(err, "oracle: token %zu: expected a position below %zu, found %d", t, a->n_positions,
                             a->position[t]);
    size_t n;
    bool fits = size_mul(pool ? (size_t)pool_size(pool) : 1, a->n_positions, &n);
    struct attention_job job = {
        .kind = kind, .out = out, .a = a, .scores = fits ? size_alloc(n, sizeof(double)) : NULL};
    if (!job.scores) return error_set(err, "out of memory for the scores of %zu positions", a->n_positions);
    parallel(pool, a->n_tokens * a->n_heads, a->n_heads, attend, &job);
    free(job.scores);
    return true;
}

// ---- Element by element --------------------------------------------------------------------------------------------

struct pair_job {
    enum oracle_kind kind;
    double *out;
    const double *a, *b;
};

static void silu_mul_elements(void *ctx, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct pair_job *j = ctx;
    for (size_t i = begin; i < end; i++) {
        double g = oracle_operand(j->kind, j->a[i]), silu = g / (1 + exp(-g));
        if (j->kind == ORACLE_H) silu = oracle_bf16((double)(float)silu);
        j->out[i] = oracle_operand(j->kind, silu * oracle_operand(j->kind, j->b[i]));
    }
}

void oracle_silu_mul(enum oracle_kind kind, struct pool *pool, double *act, const double *gate, const double *up,
                     size_t n) {
    struct pair_job job = {.kind = kind, .out = act, .a = gate, .b = up};
    parallel(pool, n, 4096, silu_mul_elements, &job);
}

static void add_elements(void *ctx, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct pair_job *j = ctx;
    for (size_t i = begin; i < end; i++)
        j->out[i] = oracle_operand(j->kind, oracle_operand(j->kind, j->a[i]) + oracle_operand(j->kind, j->b[i]));
}

void oracle_add(enum oracle_kind kind, struct pool *pool, double *x, const double *y, size_t n) {
    struct pair_job job = {.kind = kind, .out = x, .a = x, .b = y};
    parallel(pool, n, 4096, add_elements, &job);
}
