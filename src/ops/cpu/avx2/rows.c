// rows.c: norms, rope, the KV store and silu_mul in AVX2, and the fused op that joins the first three. Products and
// attention are elsewhere.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "ops/cpu/avx2/vec.h"
#include "ops/kv_page.h"

enum {
    TOKEN_GRAIN = 8, // as many positions of Q8_0 share cache lines
    ELEMENT_GRAIN = 4096
};

static float square_sum(const float *x, size_t n) {
    __m256 low = _mm256_setzero_ps(), high = low;
    size_t k = 0;
    for (; k + DOT_LANES <= n; k += DOT_LANES) {
        __m256 a = _mm256_loadu_ps(x + k), b = _mm256_loadu_ps(x + k + 8);
        low = _mm256_fmadd_ps(a, a, low);
        high = _mm256_fmadd_ps(b, b, high);
    }
    float acc[DOT_LANES];
    _mm256_storeu_ps(acc, low);
    _mm256_storeu_ps(acc + 8, high);
    for (size_t l = 0; k + l < n; l++) acc[l] = fmaf(x[k + l], x[k + l], acc[l]);
    return dot16_reduce_at(acc);
}

void avx2_rmsnorm_row(float *y, const float *x, const float *w, float eps, size_t n, bool round) {
    float r = 1.0f / sqrtf(square_sum(x, n) / (float)n + eps);
    __m256 r8 = _mm256_set1_ps(r);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), r8), _mm256_loadu_ps(w + i));
        _mm256_storeu_ps(y + i, round ? _mm256_castsi256_ps(round_to_bf16(v)) : v);
    }
    for (; i < n; i++) {
        float v = (x[i] * r) * w[i];
        y[i] = round ? bf16_to_f32(bf16_from_f32(v)) : v;
    }
}

struct norm_job {
    float *y;
    const float *x, *w;
    float eps;
    size_t n;
};

static void norm_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct norm_job *j = user;
    for (size_t t = begin; t < end; t++) avx2_rmsnorm_row(j->y + t * j->n, j->x + t * j->n, j->w, j->eps, j->n, false);
}

static void rmsnorm(const struct op_ctx *ctx, float *y, const float *x, const float *w, float eps, size_t n_rows,
                    size_t n) {
    struct norm_job j = {y, x, w, eps, n};
    pool_for(ctx->pool, n_rows, ELEMENT_GRAIN / (n + 1) + 1, norm_piece, &j);
}

static void head_rmsnorm(const struct op_ctx *ctx, float *x, const float *w, float eps, size_t n_tokens, size_t n_heads,
                         size_t head_dim) {
    rmsnorm(ctx, x, x, w, eps, n_tokens * n_heads, head_dim);
}

// Rotates one head; cos_sin [head_dim].
static void rope_head(float *x, const float *cos_sin, size_t head_dim) {
    size_t half = head_dim / 2, i = 0;
    float *lo = x, *hi = x + half;
    const float *c = cos_sin, *s = cos_sin + half;
    for (; i + 8 <= half; i += 8) {
        __m256 a = _mm256_loadu_ps(lo + i), b = _mm256_loadu_ps(hi + i);
        __m256 c8 = _mm256_loadu_ps(c + i), s8 = _mm256_loadu_ps(s + i);
        _mm256_storeu_ps(lo + i, _mm256_fmsub_ps(a, c8, _mm256_mul_ps(b, s8)));
        _mm256_storeu_ps(hi + i, _mm256_fmadd_ps(b, c8, _mm256_mul_ps(a, s8)));
    }
    for (; i < half; i++) {
        float a = lo[i], b = hi[i];
        lo[i] = fmaf(a, c[i], -(b * s[i]));
        hi[i] = fmaf(b, c[i], a * s[i]);
    }
}

struct rope_job {
    float *x;
    const float *cos_sin;
    size_t n_heads, head_dim;
};

static void rope_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct rope_job *j = user;
    for (size_t t = begin; t < end; t++) {
        for (size_t h = 0; h < j->n_heads; h++)
            rope_head(j->x + (t * j->n_heads + h) * j->head_dim, j->cos_sin + t * j->head_dim, j->head_dim);
    }
}

static void rope(const struct op_ctx *ctx, float *x, const float *cos_sin, size_t n_tokens, size_t n_heads,
                 size_t head_dim) {
    struct rope_job j = {x, cos_sin, n_heads, head_dim};
    pool_for(ctx->pool, n_tokens, TOKEN_GRAIN, rope_piece, &j);
}

// One block of Q8_0, as kv_round makes it.
static void store_q8_0(unsigned char *block, const float *x) {
    __m256 v[4];
    __m256i max = _mm256_setzero_si256(), q[4];
    for (size_t i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        __m256i bits = _mm256_and_si256(_mm256_castps_si256(v[i]), _mm256_set1_epi32(0x7FFFFFFF));
        max = _mm256_max_epi32(max, bits);
    }
    __m128i max4 = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    max4 = _mm_max_epi32(max4, _mm_shuffle_epi32(max4, 0x4E));
    max4 = _mm_max_epi32(max4, _mm_shuffle_epi32(max4, 0xB1));
    uint16_t half = f16_from_f32(float_from_bits((uint32_t)_mm_cvtsi128_si32(max4)) / 127.0f);
    float d = f16_to_f32(half);
    memcpy(block, &half, sizeof half);
    if (!(d > 0.0f && d <= 65504.0f)) {
        memset(block + 2, 0, 32);
        return;
    }
    const __m256 inverse = _mm256_set1_ps(1.0f / d), most = _mm256_set1_ps(127.0f), least = _mm256_set1_ps(-127.0f);
    for (size_t i = 0; i < 4; i++) {
        __m256 scaled = _mm256_max_ps(_mm256_min_ps(_mm256_mul_ps(v[i], inverse), most), least);
        q[i] = _mm256_cvtps_epi32(scaled);
    }
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)(void *)(block + 2), packed);
}

// One K or V vector to its row of Q8_0.
static void store_dealt(const struct kv_layer *kv, enum kv_side side, unsigned char *head, size_t slot,
                        const float *x) {
    unsigned char block[34];
    for (size_t b = 0; b < kv->head_dim / 32; b++) {
        store_q8_0(block, x + 32 * b);
        kv_write_block(side, kv->head_dim, head, slot, b, block);
    }
}

// One K or V vector to its row, as kv_round rounds it; not of Q8_0.
static void store_row(const struct kv_layer *kv, void *row, const float *x) {
    size_t n = kv->head_dim, i = 0;
    uint16_t *to = row;
    switch (kv->type) {
    case DTYPE_BF16:
        for (; i + 8 <= n; i += 8) {
            __m256i h = _mm256_srli_epi32(round_to_bf16(_mm256_loadu_ps(x + i)), 16);
            __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
            _mm_storeu_si128((__m128i *)(void *)(to + i), packed);
        }
        break;
    case DTYPE_F16:
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i *)(void *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
        break;
    default: break;
    }
    kv_round(kv->type, x + i, (unsigned char *)row + kv_bytes(kv->type, i), n - i);
}

static void store_token(const struct kv_layer *kv, const struct batch *batch, size_t t, const float *k,
                        const float *v) {
    size_t position = (size_t)batch->position[t];
    const int32_t *pages = batch->pages + batch->page_start[batch->seq[t]];
    size_t page = (size_t)pages[position / KV_PAGE_TOKENS];
    for (size_t h = 0; h < kv->n_kv_heads; h++) {
        size_t at = kv_head_at(kv, page, h), from = (t * kv->n_kv_heads + h) * kv->head_dim;
        unsigned char *of_k = (unsigned char *)kv->k + at, *of_v = (unsigned char *)kv->v + at;
        size_t slot = position % KV_PAGE_TOKENS, row = slot * kv_row_bytes(kv);
        if (kv->type == DTYPE_Q8_0) {
            store_dealt(kv, KV_K, of_k, slot, k + from);
            store_dealt(kv, KV_V, of_v, slot, v + from);
        } else {
            store_row(kv, of_k + row, k + from);
            store_row(kv, of_v + row, v + from);
        }
    }
}

struct store_job {
    struct kv_layer *kv;
    const struct batch *batch;
    const float *k, *v;
};

static void store_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct store_job *j = user;
    for (size_t t = begin; t < end; t++) store_token(j->kv, j->batch, t, j->k, j->v);
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
    size_t i = begin;
    for (; i + 8 <= end; i += 8)
        _mm256_storeu_ps(j->act + i, silu_mul_8(_mm256_loadu_ps(j->gate + i), _mm256_loadu_ps(j->up + i)));
    for (; i < end; i++) j->act[i] = j->gate[i] / (1.0f + exp32(-j->gate[i])) * j->up[i];
}

static void silu_mul(const struct op_ctx *ctx, float *act, const float *gate, const float *up, size_t n) {
    struct silu_job j = {act, gate, up};
    pool_for(ctx->pool, n, ELEMENT_GRAIN, silu_piece, &j);
}

static void norm_rope_heads(float *x, const float *norm, float eps, const float *cos_sin, size_t n_heads,
                            size_t head_dim) {
    for (size_t h = 0; h < n_heads; h++, x += head_dim) {
        if (norm) avx2_rmsnorm_row(x, x, norm, eps, head_dim, false);
        rope_head(x, cos_sin, head_dim);
    }
}

static void qk_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct qk_norm_rope_store_args *a = user;
    for (size_t t = begin; t < end; t++) {
        const float *cos_sin = a->cos_sin + t * a->head_dim;
        norm_rope_heads(a->q + t * a->n_heads * a->head_dim, a->q_norm, a->eps, cos_sin, a->n_heads, a->head_dim);
        norm_rope_heads(a->k + t * a->n_kv_heads * a->head_dim, a->k_norm, a->eps, cos_sin, a->n_kv_heads, a->head_dim);
        store_token(a->kv, a->batch, t, a->k, a->v);
    }
}

static void qk_norm_rope_store(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a) {
    struct qk_norm_rope_store_args copy = *a;
    pool_for(ctx->pool, a->batch->n_tokens, TOKEN_GRAIN, qk_piece, &copy);
}

void avx2_fill_rows(struct ops *ops) {
    ops->rmsnorm = rmsnorm;
    ops->head_rmsnorm = head_rmsnorm;
    ops->rope = rope;
    ops->kv_store = kv_store;
    ops->silu_mul = silu_mul;
    ops->qk_norm_rope_store = qk_norm_rope_store;
}

#endif
