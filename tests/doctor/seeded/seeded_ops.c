// seeded_ops.c: broken ops. Each runs the right op, works out the mistaken numbers by itself in plain C, and puts them
// where the seed says (a layer, a head, a channel). It shares no code with what looks for the mistakes.
#include "ops/kv_page.h"
#include "seeded.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct seed *sown;
static struct ops broken;
static const struct ops *right;

static float *floats(size_t n) {
    float *p = calloc(n ? n : 1, sizeof *p);
    if (!p) abort();
    return p;
}

static float bf16(float v) {
    return bf16_to_f32(bf16_from_f32(v));
}

static bool here(enum seed_site site, int layer) {
    return sown && sown->site == site && (sown->layer < 0 || sown->layer == layer);
}

static struct op_ctx right_ctx(const struct op_ctx *ctx) {
    struct op_ctx c = *ctx;
    c.ops = right;
    return c;
}

// Puts the mistaken numbers into the seed's head or channel, or everywhere. head_dim 0: no heads.
static bool is_put(size_t column, size_t head_dim) {
    if (head_dim && sown->head >= 0 && column / head_dim != (size_t)sown->head) return false;
    return sown->channel < 0 || (head_dim && sown->head >= 0 ? column % head_dim : column) == (size_t)sown->channel;
}

static void put(float *y, const float *wrong, size_t n_rows, size_t n_columns, size_t head_dim) {
    for (size_t i = 0; i < n_rows * n_columns; i++)
        if (is_put(i % n_columns, head_dim)) y[i] = wrong[i];
}

// ---- Norms ---------------------------------------------------------------------------------------------------------

static void wrong_norm(float *y, const float *x, const float *w, float eps, size_t n_rows, size_t n) {
    if (sown->mistake == EPS_MISSING) eps = 0;
    if (sown->mistake == EPS_DOUBLED) eps *= 2;
    for (size_t t = 0; t < n_rows; t++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++) sum += (double)x[t * n + i] * (double)x[t * n + i];
        float r = (float)(1 / sqrt(sum / (double)n + (double)eps));
        for (size_t i = 0; i < n; i++) {
            float v = x[t * n + i] * r;
            y[t * n + i] = sown->mistake == NORM_ORDER ? bf16(bf16(v) * w[i]) : v * w[i];
        }
    }
}

static void broken_rmsnorm(const struct op_ctx *ctx, float *y, const float *x, const float *w, float eps, size_t n_rows,
                           size_t n) {
    struct op_ctx c = right_ctx(ctx);
    float *wrong = floats(n_rows * n);
    if (here(SITE_RMSNORM, ctx->layer)) wrong_norm(wrong, x, w, eps, n_rows, n);
    right->rmsnorm(&c, y, x, w, eps, n_rows, n);
    if (here(SITE_RMSNORM, ctx->layer)) put(y, wrong, n_rows, n, 0);
    free(wrong);
}

static void broken_head_rmsnorm(const struct op_ctx *ctx, float *x, const float *w, float eps, size_t n_tokens,
                                size_t n_heads, size_t head_dim) {
    struct op_ctx c = right_ctx(ctx);
    size_t n = n_tokens * n_heads * head_dim;
    float *wrong = floats(n);
    if (here(SITE_HEAD_RMSNORM, ctx->layer)) wrong_norm(wrong, x, w, eps, n_tokens * n_heads, head_dim);
    right->head_rmsnorm(&c, x, w, eps, n_tokens, n_heads, head_dim);
    if (here(SITE_HEAD_RMSNORM, ctx->layer)) put(x, wrong, n_tokens, n_heads * head_dim, head_dim);
    free(wrong);
}

// ---- Products ------------------------------------------------------------------------------------------------------

// A row of W as the mistaken op reads it.
static void wrong_row(const struct matrix *m, size_t row, float *out) {
    const struct dtype_info *info = dtype_info(m->type);
    const unsigned char *data = (const unsigned char *)m->data + row * m->row_bytes;
    if (sown->mistake == TRANSPOSED) { // plain types
        for (size_t i = 0; i < m->n_in; i++) {
            size_t at = i * m->n_out + row;
            dtype_to_f32(m->type, (const unsigned char *)m->data + at * info->block_bytes, &out[i], 1);
        }
        return;
    }
    dtype_to_f32(m->type, data, out, m->n_in);
    if (m->type != DTYPE_Q8_0 && m->type != DTYPE_Q4_0) return;
    size_t n_blocks = m->n_in / 32;
    for (size_t b = 0; b < n_blocks; b++) {
        uint16_t own, next;
        memcpy(&own, data + b * info->block_bytes, 2);
        memcpy(&next, data + (b + 1) % n_blocks * info->block_bytes, 2);
        float scale = f16_to_f32(own), other = f16_to_f32(next), copy[32];
        memcpy(copy, out + 32 * b, sizeof copy);
        for (size_t i = 0; i < 32; i++) {
            if (sown->mistake == BLOCK_SCALE) out[32 * b + i] = scale != 0 ? copy[i] / scale * other : 0;
            if (sown->mistake == ZERO_POINT) out[32 * b + i] = copy[i] + 8 * scale;
            if (sown->mistake == NIBBLES) out[32 * b + i] = copy[(i + 16) % 32];
        }
    }
}

// out[t] = w . x[., t] with the mistake, all tokens side by side; x is [n, n_tokens], sums room for [n_tokens].
static void wrong_dots(float *out, const float *w, const float *x, size_t n, size_t n_tokens, double *sums) {
    if (sown->mistake == K_TAIL) n -= 32;
    memset(out, 0, n_tokens * sizeof *out);
    memset(sums, 0, n_tokens * sizeof *sums);
    for (size_t i = 0; i < n; i++) {
        const float *xi = x + i * n_tokens;
        if (sown->mistake == BF16_SUM)
            for (size_t t = 0; t < n_tokens; t++) out[t] = bf16(out[t] + w[i] * xi[t]);
        else
            for (size_t t = 0; t < n_tokens; t++) sums[t] += (double)w[i] * (double)xi[t];
    }
    for (size_t t = 0; sown->mistake != BF16_SUM && t < n_tokens; t++) out[t] = (float)sums[t];
}

// y = W x with the mistake; `y` holds what stood in the output before. Only the columns that put() takes are computed.
static void wrong_matmul(float *y, const float *x, const struct matrix *m, size_t n_tokens, size_t head_dim) {
    float *row = floats(m->n_in), *in = floats(n_tokens * m->n_in), *dots = floats(n_tokens);
    double *sums = calloc(n_tokens + 1, sizeof *sums);
    if (!sums) abort();
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t i = 0; i < m->n_in; i++) {
            float v = x[t * m->n_in + i];
            in[i * n_tokens + t] = m->type == DTYPE_BF16 ? bf16(v) : v;
        }
    static atomic_uint turn;
    for (size_t o = 0; o < m->n_out; o++) {
        if (!is_put(o, head_dim) && sown->mistake != WRONG_HALF) continue; // which mixes columns
        wrong_row(m, o, row);
        wrong_dots(dots, row, in, m->n_in, n_tokens, sums);
        for (size_t t = 0; t < n_tokens; t++) {
            size_t from = t;
            if (sown->mistake == NEIGHBOUR_ROW) from = (t + 1) % n_tokens;
            if (sown->mistake == WRONG_ROW) from = t > 0 ? t - 1 : 0;
            if (sown->mistake == TOKEN_TAIL && t >= n_tokens / 8 * 8 && n_tokens > 8) continue;
            if (sown->mistake == COLUMN_TAIL && o >= m->n_out - 3) continue;
            float v = dots[from];
            if (sown->mistake == GARBAGE_BIAS) v += o % 7 == 3 ? 3e4f : o % 5 == 2 ? -17.5f : 0.25f;
            // A lost update: which one is lost depends on who came first.
            if (sown->mistake == RACE && o % 16 == 5 && atomic_fetch_add(&turn, 1) % 11 == 0) v -= row[0] * in[from];
            y[t * m->n_out + o] = v;
        }
    }
    free(row);
    free(in);
    free(dots);
    free(sums);
}

static void broken_matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *m, size_t n_tokens) {
    struct op_ctx c = right_ctx(ctx);
    size_t n = n_tokens * m->n_out;
    float *wrong = floats(n);
    memcpy(wrong, y, n * sizeof *wrong);
    right->matmul(&c, y, x, m, n_tokens);
    if (here(SITE_MATMUL, ctx->layer)) {
        wrong_matmul(wrong, x, m, n_tokens, 0);
        put(y, wrong, n_tokens, m->n_out, 0);
    }
    free(wrong);
}

static void broken_norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    struct op_ctx c = right_ctx(ctx);
    size_t hidden = a->wk->n_in, head_dim = a->wk->n_out % 64 == 0 ? 64 : a->wk->n_out;
    int first = a->wq ? 0 : 1;
    struct {
        const struct matrix *m;
        const float *bias;
        float *y, *before;
    } parts[] = {{a->wq, a->bq, a->q, NULL}, {a->wk, a->bk, a->k, NULL}, {a->wv, a->bv, a->v, NULL}};
    for (int i = first; i < 3; i++) {
        parts[i].before = floats(a->n_tokens * parts[i].m->n_out);
        memcpy(parts[i].before, parts[i].y, a->n_tokens * parts[i].m->n_out * sizeof(float));
    }
    right->norm_qkv(&c, a);
    if (here(SITE_NORM_QKV, ctx->layer)) {
        float *normed = floats(a->n_tokens * hidden);
        wrong_norm(normed, a->x, a->norm, a->eps, a->n_tokens, hidden);
        for (int i = first; i < 3; i++) {
            wrong_matmul(parts[i].before, normed, parts[i].m, a->n_tokens, head_dim);
            for (size_t k = 0; parts[i].bias && k < a->n_tokens * parts[i].m->n_out; k++)
                parts[i].before[k] += parts[i].bias[k % parts[i].m->n_out];
            put(parts[i].y, parts[i].before, a->n_tokens, parts[i].m->n_out, head_dim);
        }
        free(normed);
    }
    for (int i = first; i < 3; i++) free(parts[i].before);
}

static void broken_residual(const struct op_ctx *ctx, const struct proj_residual_args *a, enum seed_site site) {
    struct op_ctx c = right_ctx(ctx);
    size_t n = a->n_tokens * a->w->n_out;
    bool is_here = here(site, ctx->layer);
    float *before = floats(n), *y = floats(n);
    memcpy(before, a->x, n * sizeof *before);
    memcpy(y, a->x, n * sizeof *y);
    if (site == SITE_OUT_RESIDUAL) right->out_residual(&c, a);
    else right->down_residual(&c, a);
    if (is_here) {
        enum mistake is = sown->mistake;
        wrong_matmul(y, a->in, a->w, a->n_tokens, 0);
        for (size_t i = 0; i < n; i++)
            y[i] = is == RESIDUAL_REPLACED    ? y[i]
                   : is == PROJECTION_DROPPED ? before[i]
                   : is == PROJECTION_TWICE   ? before[i] + 2 * y[i]
                                              : before[i] + y[i];
        put(a->x, y, a->n_tokens, a->w->n_out, 0);
    }
    free(before);
    free(y);
}

static void broken_out_residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    broken_residual(ctx, a, SITE_OUT_RESIDUAL);
}

static void broken_down_residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    broken_residual(ctx, a, SITE_DOWN_RESIDUAL);
}

static void broken_add(const struct op_ctx *ctx, float *x, const float *y, size_t n) {
    struct op_ctx c = right_ctx(ctx);
    float *before = floats(n);
    memcpy(before, x, n * sizeof *before);
    right->add(&c, x, y, n);
    for (size_t i = 0; here(SITE_ADD, ctx->layer) && i < n; i++)
        x[i] = sown->mistake == RESIDUAL_REPLACED ? y[i] : before[i] + 2 * y[i];
    free(before);
}

// ---- The MLP -------------------------------------------------------------------------------------------------------

static float wrong_act(const float *gate, const float *up, size_t i, size_t n) {
    float g = gate[i], u = up[i];
    if (sown->mistake == GATE_UP_SWAPPED) g = up[i], u = gate[i];
    if (sown->mistake == WRONG_HALF) { // the two halves of [gate, up] taken as pairs
        g = 2 * i < n ? gate[2 * i] : up[2 * i - n];
        u = 2 * i + 1 < n ? gate[2 * i + 1] : up[2 * i + 1 - n];
    }
    if (sown->mistake == GELU) return 0.5f * g * (1 + tanhf(0.7978845608f * (g + 0.044715f * g * g * g))) * u;
    return g / (1 + expf(-g)) * u;
}

static void broken_norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    struct op_ctx c = right_ctx(ctx);
    size_t hidden = a->w_gate->n_in, n_ff = a->w_gate->n_out, n = a->n_tokens * n_ff;
    float *gate = floats(n), *up = floats(n), *normed = floats(a->n_tokens * hidden), *act = floats(n);
    memcpy(act, a->act, n * sizeof *act);
    right->norm_gate_up(&c, a);
    if (here(SITE_NORM_GATE_UP, ctx->layer)) {
        wrong_norm(normed, a->x, a->norm, a->eps, a->n_tokens, hidden);
        wrong_matmul(gate, normed, a->w_gate, a->n_tokens, 0);
        wrong_matmul(up, normed, a->w_up, a->n_tokens, 0);
        for (size_t i = 0; i < n; i++) {
            bool skipped = sown->mistake == TOKEN_TAIL && i / n_ff >= a->n_tokens / 8 * 8 && a->n_tokens > 8;
            if (!skipped) act[i] = wrong_act(gate + i / n_ff * n_ff, up + i / n_ff * n_ff, i % n_ff, n_ff);
        }
        put(a->act, act, a->n_tokens, n_ff, 0);
    }
    free(gate), free(up), free(normed), free(act);
}

static void broken_silu_mul(const struct op_ctx *ctx, float *act, const float *gate, const float *up, size_t n) {
    struct op_ctx c = right_ctx(ctx);
    float *wrong = floats(n);
    for (size_t i = 0; here(SITE_SILU_MUL, ctx->layer) && i < n; i++) wrong[i] = wrong_act(gate, up, i, n);
    right->silu_mul(&c, act, gate, up, n);
    if (here(SITE_SILU_MUL, ctx->layer)) put(act, wrong, n / 512, 512, 0); // n_ff of the shapes that seeds use
    free(wrong);
}

// ---- Embedding and head --------------------------------------------------------------------------------------------

static void broken_embed(const struct op_ctx *ctx, float *x, const struct matrix *table, const int32_t *token,
                         size_t n_tokens) {
    struct op_ctx c = right_ctx(ctx);
    int32_t *ids = calloc(n_tokens, sizeof *ids);
    if (!ids) abort();
    for (size_t t = 0; t < n_tokens; t++)
        ids[t] = sown && sown->mistake == EMBED_ROW ? (token[t] + 1) % (int32_t)table->n_out : token[t];
    right->embed(&c, x, table, ids, n_tokens);
    if (sown && sown->mistake == EMBED_SCALED)
        for (size_t i = 0; i < n_tokens * table->n_in; i++) x[i] /= sqrtf((float)table->n_in);
    free(ids);
}

static void broken_gather(const struct op_ctx *ctx, float *y, const float *x, const int32_t *rows, size_t n_rows,
                          size_t n) {
    (void)ctx;
    for (size_t r = 0; r < n_rows; r++) {
        size_t row = rows[r] > 0 ? (size_t)rows[r] - 1 : 0;
        memcpy(y + r * n, x + row * n, n * sizeof *y);
    }
}

static void broken_norm_head(const struct op_ctx *ctx, const struct norm_head_args *a) {
    struct op_ctx c = right_ctx(ctx);
    size_t n_rows = a->batch->n_logit_rows, hidden = a->head->n_in, n = n_rows * a->head->n_out;
    float *x = floats(n_rows * hidden), *normed = floats(n_rows * hidden), *logits = floats(n);
    memcpy(logits, a->logits, n * sizeof *logits);
    right->norm_head(&c, a);
    if (here(SITE_NORM_HEAD, -1)) {
        for (size_t r = 0; r < n_rows; r++) {
            size_t row = (size_t)a->batch->logit_rows[r];
            if (sown->mistake == WRONG_ROW) row = row > 0 ? row - 1 : 0;
            memcpy(x + r * hidden, a->x + row * hidden, hidden * sizeof *x);
        }
        wrong_norm(normed, x, a->norm, a->eps, n_rows, hidden);
        struct seed plain = *sown;
        const struct seed *own = sown;
        if (own->mistake == WRONG_ROW) plain.mistake = EMBED_ROW, sown = &plain; // the rows are shifted already
        wrong_matmul(logits, normed, a->head, n_rows, 0);
        sown = own;
        put(a->logits, logits, n_rows, a->head->n_out, 0);
    }
    free(x), free(normed), free(logits);
}

// ---- Heads ---------------------------------------------------------------------------------------------------------

// Cosine and sine of pair i as a mistaken op has them; the model's theta is 1e6 in the shapes that seeds use.
static void wrong_angle(const float *table, size_t half, size_t i, float *cosine, float *sine) {
    *cosine = table[i], *sine = table[half + i];
    if (sown->mistake != ROPE_POSITION && sown->mistake != ROPE_THETA) return;
    // The position, from the fastest and the slowest pair's angles: pair 0 turns by it.
    double fast = atan2((double)table[half], (double)table[0]);
    double slow_rate = pow(1e6, -(double)(half / 2) / (double)half),
           slow = atan2((double)table[half + half / 2], (double)table[half / 2]);
    double about = slow / slow_rate, turn = 2 * 3.14159265358979323846;
    double position = round(fast + turn * round((about - fast) / turn));
    if (sown->mistake == ROPE_POSITION) position -= 1;
    double rate = pow(sown->mistake == ROPE_THETA ? 1e4 : 1e6, -(double)i / (double)half);
    *cosine = (float)cos(position * rate), *sine = (float)sin(position * rate);
}

static void wrong_rope(float *x, const float *cos_sin, size_t n_tokens, size_t n_heads, size_t head_dim) {
    size_t half = head_dim / 2, n_pairs = sown->mistake == ROPE_HALF ? half / 2 : half;
    for (size_t t = 0; t < n_tokens; t++) {
        for (size_t h = 0; h < n_heads; h++) {
            float *v = x + (t * n_heads + h) * head_dim;
            for (size_t i = 0; i < n_pairs; i++) {
                size_t lo = i, hi = i + half;
                float cosine, sine;
                if (sown->mistake == ROPE_INTERLEAVED) lo = 2 * i, hi = 2 * i + 1;
                wrong_angle(cos_sin + t * head_dim, half, i, &cosine, &sine);
                float a = v[lo], b = v[hi];
                v[lo] = a * cosine - b * sine;
                if (sown->mistake != ROPE_HALF_WRITTEN) v[hi] = b * cosine + a * sine;
            }
        }
    }
}

static void broken_rope(const struct op_ctx *ctx, float *x, const float *cos_sin, size_t n_tokens, size_t n_heads,
                        size_t head_dim) {
    struct op_ctx c = right_ctx(ctx);
    size_t n = n_tokens * n_heads * head_dim;
    float *wrong = floats(n);
    memcpy(wrong, x, n * sizeof *wrong);
    right->rope(&c, x, cos_sin, n_tokens, n_heads, head_dim);
    if (here(SITE_ROPE, ctx->layer)) {
        wrong_rope(wrong, cos_sin, n_tokens, n_heads, head_dim);
        put(x, wrong, n_tokens, n_heads * head_dim, head_dim);
    }
    free(wrong);
}

// Writes K and V where a mistaken op would.
static void wrong_store(struct kv_layer *kv, const struct batch *b, const float *k, const float *v) {
    for (size_t t = 0; t < b->n_tokens; t++) {
        const int32_t *pages = b->pages + b->page_start[b->seq[t]];
        size_t n_pages = (size_t)(b->page_start[b->seq[t] + 1] - b->page_start[b->seq[t]]);
        size_t position = (size_t)b->position[t] + (sown->mistake == STORE_LATE);
        if (position / KV_PAGE_TOKENS >= n_pages) position--;
        size_t page = (size_t)pages[position / KV_PAGE_TOKENS], slot = position % KV_PAGE_TOKENS;
        for (size_t h = 0; h < kv->n_kv_heads; h++) {
            size_t row = sown->mistake == STORE_NHD ? (page * KV_PAGE_TOKENS + slot) * kv->n_kv_heads + h
                                                    : (page * kv->n_kv_heads + h) * KV_PAGE_TOKENS + slot;
            size_t from = (t * kv->n_kv_heads + h) * kv->head_dim;
            bool swap = sown->mistake == STORE_SWAPPED;
            kv_store_row(kv, KV_K, row, (swap ? v : k) + from);
            kv_store_row(kv, KV_V, row, (swap ? k : v) + from);
        }
    }
}

static void broken_kv_store(const struct op_ctx *ctx, struct kv_layer *kv, const struct batch *b, const float *k,
                            const float *v) {
    struct op_ctx c = right_ctx(ctx);
    if (here(SITE_KV_STORE, ctx->layer)) wrong_store(kv, b, k, v);
    else right->kv_store(&c, kv, b, k, v);
}

static void broken_qk_norm_rope_store(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a) {
    struct op_ctx c = right_ctx(ctx);
    if (!here(SITE_QK_NORM_ROPE_STORE, ctx->layer)) {
        right->qk_norm_rope_store(&c, a);
        return;
    }
    size_t t = a->batch->n_tokens, d = a->head_dim;
    float *xs[] = {a->q, a->k};
    const size_t heads[] = {a->n_heads, a->n_kv_heads};
    const float *norms[] = {a->q_norm, a->k_norm};
    bool rope = sown->mistake >= ROPE_INTERLEAVED && sown->mistake <= ROPE_HALF_WRITTEN;
    for (int i = 0; i < 2; i++) {
        size_t n = t * heads[i] * d;
        const float *norm = sown->mistake == QK_NORM_SWAPPED ? norms[1 - i] : norms[i];
        float *wrong = floats(n), *before = floats(n);
        memcpy(before, xs[i], n * sizeof *before);
        memcpy(wrong, before, n * sizeof *wrong);
        if (sown->mistake == NORM_AFTER_ROPE) {
            right->rope(&c, wrong, a->cos_sin, t, heads[i], d);
            wrong_norm(wrong, wrong, norm, a->eps, t * heads[i], d);
        } else {
            if (norm) wrong_norm(wrong, wrong, norm, a->eps, t * heads[i], d);
            if (rope) wrong_rope(wrong, a->cos_sin, t, heads[i], d);
            else right->rope(&c, wrong, a->cos_sin, t, heads[i], d);
        }
        if (norms[i]) right->head_rmsnorm(&c, xs[i], norms[i], a->eps, t, heads[i], d);
        right->rope(&c, xs[i], a->cos_sin, t, heads[i], d);
        bool store_only = sown->mistake == STORE_LATE || sown->mistake == STORE_NHD || sown->mistake == STORE_SWAPPED;
        if (!store_only) put(xs[i], wrong, t, heads[i] * d, d);
        free(wrong);
        free(before);
    }
    wrong_store(a->kv, a->batch, a->k, a->v);
}

// ---- Attention -----------------------------------------------------------------------------------------------------

// The row that a mistaken op reads.
static size_t wrong_place(const struct attention_args *a, const int32_t *pages, size_t n_pages, size_t j, size_t head) {
    size_t index = j / KV_PAGE_TOKENS, slot = j % KV_PAGE_TOKENS;
    if (sown->mistake == READ_REVERSED) index = n_pages - 1 - index;
    size_t page = (size_t)pages[index], n = a->n_kv_heads;
    return sown->mistake == READ_NHD ? (page * KV_PAGE_TOKENS + slot) * n + head
                                     : (page * n + head) * KV_PAGE_TOKENS + slot;
}

static void wrong_head(const struct attention_args *a, size_t t, size_t h, float *out) {
    const struct batch *b = a->batch;
    enum mistake is = sown->mistake;
    size_t seq = (size_t)b->seq[t], n_pages = (size_t)(b->page_start[seq + 1] - b->page_start[seq]), d = a->head_dim;
    size_t right_n = (size_t)b->position[t] + 1, n = right_n, room = n_pages * KV_PAGE_TOKENS;
    size_t kv_head = is == HEAD_MODULO ? h % a->n_kv_heads : h / (a->n_heads / a->n_kv_heads);
    const int32_t *pages = b->pages + b->page_start[seq];
    const enum kv_side keys = is == READ_SWAPPED ? KV_V : KV_K, values = is == READ_SWAPPED ? KV_K : KV_V;
    const void *key_data = keys == KV_K ? a->kv->k : a->kv->v, *value_data = values == KV_K ? a->kv->k : a->kv->v;
    float scale = is == SCALE_MISSING ? 1 : is == SCALE_SQUARED ? a->scale * a->scale : a->scale;
    if (is == MASK_MORE && n < room) n++;
    if (is == MASK_LESS && n > 1) n--;
    if (is == MASK_NONE) n = (size_t)b->kv_len[seq];
    if (is == READ_WHOLE_PAGES && n >= KV_PAGE_TOKENS) n = n / KV_PAGE_TOKENS * KV_PAGE_TOKENS;
    if (is == READ_TAIL || is == READ_ZERO_WEIGHTS) n = (n + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS * KV_PAGE_TOKENS;
    if (is == READ_PREFIX && n > KV_PAGE_TOKENS) n = KV_PAGE_TOKENS;
    float *p = floats(n), m = -INFINITY, l = 0;
    for (size_t j = 0; j < n; j++) {
        size_t at = wrong_place(a, pages, n_pages, j, kv_head);
        double sum = 0;
        for (size_t i = 0; i < d; i++)
            sum += (double)a->q[(t * a->n_heads + h) * d + i] * (double)kv_value(a->kv, keys, key_data, at, i);
        p[j] = (float)sum * scale;
        if (is == READ_ZERO_WEIGHTS && j >= right_n) p[j] = -INFINITY;
        m = p[j] > m ? p[j] : m;
    }
    for (size_t i = 0; i < d; i++) out[i] = 0;
    for (size_t j = 0; j < n; j++) {
        size_t at = wrong_place(a, pages, n_pages, j, kv_head);
        float weight = expf(is == NO_MAXIMUM ? p[j] : p[j] - m);
        l += weight;
        for (size_t i = 0; i < d; i++) {
            out[i] += weight * kv_value(a->kv, values, value_data, at, i);
            if (is == BF16_VALUES) out[i] = bf16(out[i]);
        }
    }
    for (size_t i = 0; i < d; i++) out[i] /= l;
    free(p);
}

static void broken_attention(const struct op_ctx *ctx, const struct attention_args *a) {
    struct op_ctx c = right_ctx(ctx);
    right->attention(&c, a);
    if (!here(SITE_ATTENTION, ctx->layer)) return;
    size_t width = a->n_heads * a->head_dim, n = a->batch->n_tokens;
    float *wrong = floats(n * width);
    for (size_t i = 0; i < n * a->n_heads; i++)
        if (sown->head < 0 || i % a->n_heads == (size_t)sown->head)
            wrong_head(a, i / a->n_heads, i % a->n_heads, wrong + i * a->head_dim);
    put(a->out, wrong, n, width, a->head_dim);
    free(wrong);
}

static void broken_attn_scores(const struct op_ctx *ctx, float *s, const float *q, const struct kv_layer *kv,
                               size_t kv_head, const int32_t *pages, size_t n_kv, float scale) {
    struct op_ctx c = right_ctx(ctx);
    struct kv_layer swapped = *kv;
    bool now = here(SITE_ATTN_SCORES, ctx->layer) && (sown->head < 0 || kv_head == (size_t)sown->head);
    if (now && sown->mistake == SCALE_MISSING) scale = 1;
    if (now && sown->mistake == READ_SWAPPED) swapped.k = kv->v;
    right->attn_scores(&c, s, q, &swapped, kv_head, pages, n_kv, scale);
    if (now && sown->mistake == MASK_LESS && n_kv > 1) s[n_kv - 1] = -INFINITY;
}

static void broken_attn_softmax(const struct op_ctx *ctx, float *s, float *block_max, float *block_sum, size_t n_kv) {
    struct op_ctx c = right_ctx(ctx);
    if (!here(SITE_ATTN_SOFTMAX, ctx->layer)) {
        right->attn_softmax(&c, s, block_max, block_sum, n_kv);
        return;
    }
    for (size_t begin = 0, b = 0; begin < n_kv; begin += ATTN_BLOCK, b++) {
        float sum = 0;
        for (size_t j = begin; j < begin + ATTN_BLOCK && j < n_kv; j++) sum += s[j] = expf(s[j]);
        block_max[b] = 0;
        block_sum[b] = sum;
    }
}

static void broken_attn_values(const struct op_ctx *ctx, float *o, const float *p, const struct kv_layer *kv,
                               size_t kv_head, const int32_t *pages, size_t n_kv) {
    struct op_ctx c = right_ctx(ctx);
    right->attn_values(&c, o, p, kv, kv_head, pages, n_kv);
    if (!here(SITE_ATTN_VALUES, ctx->layer) || (sown->head >= 0 && kv_head != (size_t)sown->head)) return;
    for (size_t b = 0; b * ATTN_BLOCK < n_kv; b++) {
        for (size_t i = 0; i < kv->head_dim; i++) {
            float sum = 0;
            for (size_t j = b * ATTN_BLOCK; j < (b + 1) * ATTN_BLOCK && j < n_kv; j++) {
                size_t row = ((size_t)pages[b] * kv->n_kv_heads + kv_head) * KV_PAGE_TOKENS + j % KV_PAGE_TOKENS;
                sum = bf16(sum + p[j] * kv_value(kv, KV_V, kv->v, row, i));
            }
            o[b * kv->head_dim + i] = sum;
        }
    }
}

static void broken_attn_combine(const struct op_ctx *ctx, float *out, const float *block_max, const float *block_sum,
                                const float *o, size_t n_blocks, size_t head_dim) {
    struct op_ctx c = right_ctx(ctx);
    right->attn_combine(&c, out, block_max, block_sum, o, n_blocks, head_dim);
    if (!here(SITE_ATTN_COMBINE, ctx->layer)) return;
    for (size_t i = 0; i < head_dim; i++) {
        float sum = 0, l = 0;
        for (size_t b = 0; b < n_blocks; b++) sum += o[b * head_dim + i], l += block_sum[b];
        out[i] = sum / l;
    }
}

const struct ops *seeded_table(const struct ops *table) {
    if (!sown || sown->site >= SITE_CALLS) return table;
    right = table;
    broken = *table;
    switch (sown->site) {
    case SITE_NORM_QKV: broken.norm_qkv = broken_norm_qkv; break;
    case SITE_QK_NORM_ROPE_STORE: broken.qk_norm_rope_store = broken_qk_norm_rope_store; break;
    case SITE_ATTENTION: broken.attention = broken_attention; break;
    case SITE_OUT_RESIDUAL: broken.out_residual = broken_out_residual; break;
    case SITE_NORM_GATE_UP: broken.norm_gate_up = broken_norm_gate_up; break;
    case SITE_DOWN_RESIDUAL: broken.down_residual = broken_down_residual; break;
    case SITE_NORM_HEAD: broken.norm_head = broken_norm_head; break;
    case SITE_EMBED: broken.embed = broken_embed; break;
    case SITE_RMSNORM: broken.rmsnorm = broken_rmsnorm; break;
    case SITE_MATMUL: broken.matmul = broken_matmul; break;
    case SITE_HEAD_RMSNORM: broken.head_rmsnorm = broken_head_rmsnorm; break;
    case SITE_ROPE: broken.rope = broken_rope; break;
    case SITE_KV_STORE: broken.kv_store = broken_kv_store; break;
    case SITE_ADD: broken.add = broken_add; break;
    case SITE_SILU_MUL: broken.silu_mul = broken_silu_mul; break;
    case SITE_GATHER: broken.gather = broken_gather; break;
    case SITE_ATTN_SCORES: broken.attn_scores = broken_attn_scores; break;
    case SITE_ATTN_SOFTMAX: broken.attn_softmax = broken_attn_softmax; break;
    case SITE_ATTN_VALUES: broken.attn_values = broken_attn_values; break;
    case SITE_ATTN_COMBINE: broken.attn_combine = broken_attn_combine; break;
    default: return table;
    }
    return &broken;
}
