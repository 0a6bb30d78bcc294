// attention.c: attention in AVX2: its four parts, and the fused op made of the same pieces.
//
// The fused op walks the blocks of one KV head once for a tile of query rows: the query heads that share the KV head,
// times some neighbouring tokens of one sequence. A K vector is loaded and widened once for four rows, a V vector once
// for two. Every row keeps its own maximum, sum and output, in the order that ops.h states, so a tile's other rows
// change nothing. With few tokens and a long context the blocks themselves go to different threads.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "ops/cpu/avx2/attention.h"
#include "ops/cpu/avx2/kernels.h"

// Where a block of K or V vectors of one head starts.
static const unsigned char *block_at(const struct kv_layer *kv, const void *data, size_t page, size_t kv_head) {
    return (const unsigned char *)data + kv_head_at(kv, page, kv_head);
}

// Eight channels of a row from channel c on; not of FP8.
INLINE __m256 load_8(enum dtype type, const unsigned char *row, size_t c) {
    return load_as_f32(type, row + kv_bytes(type, c));
}

// 32 channels of a row from channel c on, a multiple of 32. FP8: fp8.h.
INLINE void load_32(enum dtype type, const unsigned char *row, size_t c, __m256 x[4]) {
    if (type == DTYPE_FP8) {
        const unsigned char *block = row + kv_bytes(type, c);
        __m256 scale = _mm256_castsi256_ps(_mm256_set1_epi32((int)((unsigned)block[0] << 23)));
        for (size_t i = 0; i < 4; i++) {
            __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(block + 1 + 8 * i));
            __m256i wide = _mm256_slli_epi32(_mm256_cvtepi8_epi32(bytes), 20); // the sign in bits 27 to 31
            wide = _mm256_and_si256(wide, _mm256_set1_epi32((int)0x87F00000u));
            x[i] = _mm256_mul_ps(_mm256_castsi256_ps(wide), scale);
        }
        return;
    }
    for (size_t i = 0; i < 4; i++) x[i] = load_8(type, row, c + 8 * i);
}

// Asks for row j of the block that comes next.
INLINE void fetch_row(const unsigned char *next, size_t j, size_t row_bytes) {
    for (size_t at = 0; at < row_bytes; at += 64) _mm_prefetch((const char *)next + j * row_bytes + at, _MM_HINT_T0);
}

// The last two steps of dot16_reduce for four sums at once.
INLINE __m128 reduce_four(const __m128 a[4]) {
    __m128 u = _mm_add_ps(_mm_movelh_ps(a[0], a[1]), _mm_movehl_ps(a[1], a[0]));
    __m128 v = _mm_add_ps(_mm_movelh_ps(a[2], a[3]), _mm_movehl_ps(a[3], a[2]));
    return _mm_add_ps(_mm_shuffle_ps(u, v, 0x88), _mm_shuffle_ps(u, v, 0xDD));
}

// s[r * ATTN_BLOCK + j] = dot16(q[r], k_j) * scale for R rows and J positions, R * J <= 4, at k; sums [r * J + j].
INLINE void scores_at(enum dtype type, float *s, const float *const *q, const unsigned char *k, size_t head_dim,
                      float scale, const size_t R, const size_t J) {
    const size_t row_bytes = kv_bytes(type, head_dim);
    __m256 low[4], high[4], x[4];
    for (size_t i = 0; i < 4; i++) low[i] = high[i] = _mm256_setzero_ps();
    size_t c = 0;
    for (; c + 2 * DOT_LANES <= head_dim; c += 2 * DOT_LANES) {
        for (size_t j = 0; j < J; j++) {
            load_32(type, k + j * row_bytes, c, x);
            for (size_t r = 0; r < R; r++) {
                size_t i = r * J + j;
                low[i] = _mm256_fmadd_ps(_mm256_loadu_ps(q[r] + c), x[0], low[i]);
                high[i] = _mm256_fmadd_ps(_mm256_loadu_ps(q[r] + c + 8), x[1], high[i]);
                low[i] = _mm256_fmadd_ps(_mm256_loadu_ps(q[r] + c + 16), x[2], low[i]);
                high[i] = _mm256_fmadd_ps(_mm256_loadu_ps(q[r] + c + 24), x[3], high[i]);
            }
        }
    }
    for (size_t i = 0; c < head_dim && i < R * J; i++) {
        const float *row = q[i / J];
        float acc[DOT_LANES];
        _mm256_storeu_ps(acc, low[i]);
        _mm256_storeu_ps(acc + 8, high[i]);
        for (size_t l = 0; c + l < head_dim; l++)
            acc[l % DOT_LANES] = fmaf(row[c + l], kv_channel(type, k + i % J * row_bytes, c + l), acc[l % DOT_LANES]);
        low[i] = _mm256_loadu_ps(acc);
        high[i] = _mm256_loadu_ps(acc + 8);
    }
    __m128 sums[4];
    float out[4];
    for (size_t i = 0; i < 4; i++) sums[i] = reduce_to_4(low[i], high[i]);
    _mm_storeu_ps(out, _mm_mul_ps(reduce_four(sums), _mm_set1_ps(scale)));
    for (size_t r = 0; r < R; r++) memcpy(s + r * ATTN_BLOCK, out + r * J, J * sizeof *s);
}

// The same for the first n positions of a block; `next`: the block after it.
INLINE void scores(enum dtype type, float *s, const float *const *q, const unsigned char *k, size_t n, size_t head_dim,
                   float scale, const unsigned char *next, const size_t R) {
    const size_t row_bytes = kv_bytes(type, head_dim), J = 4 / R;
    size_t j = 0;
    for (; j + J <= n; j += J) {
        for (size_t i = 0; next && i < J; i++) fetch_row(next, j + i, row_bytes);
        scores_at(type, s + j, q, k + j * row_bytes, head_dim, scale, R, J);
    }
    for (; J > 1 && j < n; j++) scores_at(type, s + j, q, k + j * row_bytes, head_dim, scale, R, 1);
}

INLINE void scores_rows_of(enum dtype type, float *s, const float *const *q, size_t n_rows, const unsigned char *k,
                           size_t n, size_t head_dim, float scale, const unsigned char *next) {
    size_t r = 0;
    for (; r + 4 <= n_rows; r += 4, next = NULL)
        scores(type, s + r * ATTN_BLOCK, q + r, k, n, head_dim, scale, next, 4);
    for (; r + 2 <= n_rows; r += 2, next = NULL)
        scores(type, s + r * ATTN_BLOCK, q + r, k, n, head_dim, scale, next, 2);
    for (; r < n_rows; r++, next = NULL) scores(type, s + r * ATTN_BLOCK, q + r, k, n, head_dim, scale, next, 1);
}

static void scores_rows(const struct kv_layer *kv, float *s, const float *const *q, size_t n_rows,
                        const unsigned char *k, size_t n, float scale, const unsigned char *next) {
    switch (kv->type) {
    case DTYPE_F32: scores_rows_of(DTYPE_F32, s, q, n_rows, k, n, kv->head_dim, scale, next); break;
    case DTYPE_F16: scores_rows_of(DTYPE_F16, s, q, n_rows, k, n, kv->head_dim, scale, next); break;
    case DTYPE_FP8: scores_rows_of(DTYPE_FP8, s, q, n_rows, k, n, kv->head_dim, scale, next); break;
    default: scores_rows_of(DTYPE_BF16, s, q, n_rows, k, n, kv->head_dim, scale, next);
    }
}

// V lanes of 8 channels each at channel c, for R rows; p[r] holds the block's first n probabilities.
INLINE void values_at(enum dtype type, float *const *out, const float *const *p, const struct joint *joint,
                      const unsigned char *v, size_t n, size_t head_dim, size_t c, const unsigned char *next,
                      const size_t R, const size_t V) {
    const size_t row_bytes = kv_bytes(type, head_dim);
    __m256 o[4][4];
    for (size_t r = 0; r < R; r++)
        for (size_t i = 0; i < V; i++) o[r][i] = _mm256_setzero_ps();
    for (size_t j = 0; j < n; j++) {
        __m256 x[4];
        if (next) fetch_row(next, j, row_bytes);
        if (V == 4) load_32(type, v + j * row_bytes, c, x);
        for (size_t i = 0; V < 4 && i < V; i++) x[i] = load_8(type, v + j * row_bytes, c + 8 * i);
        for (size_t r = 0; r < R; r++) {
            __m256 p8 = _mm256_broadcast_ss(p[r] + j);
            for (size_t i = 0; i < V; i++) o[r][i] = _mm256_fmadd_ps(p8, x[i], o[r][i]);
        }
    }
    for (size_t r = 0; r < R; r++) {
        __m256 a = _mm256_set1_ps(joint[r].a), b = _mm256_set1_ps(joint[r].c);
        for (size_t i = 0; i < V; i++) {
            float *to = out[r] + c + 8 * i;
            _mm256_storeu_ps(to, joint[r].first ? o[r][i]
                                                : _mm256_fmadd_ps(_mm256_loadu_ps(to), a, _mm256_mul_ps(o[r][i], b)));
        }
    }
}

INLINE void values(enum dtype type, float *const *out, const float *const *p, const struct joint *joint,
                   const unsigned char *v, size_t n, size_t head_dim, const unsigned char *next, const size_t R) {
    size_t c = 0;
    for (; c + 32 <= head_dim; c += 32, next = NULL) values_at(type, out, p, joint, v, n, head_dim, c, next, R, 4);
    if (type == DTYPE_FP8) return; // whole blocks
    for (; c + 8 <= head_dim; c += 8) values_at(type, out, p, joint, v, n, head_dim, c, NULL, R, 1);
    for (; c < head_dim; c++) {
        for (size_t r = 0; r < R; r++) {
            float o = 0.0f;
            for (size_t j = 0; j < n; j++) o = fmaf(p[r][j], kv_channel(type, v + j * kv_bytes(type, head_dim), c), o);
            out[r][c] = joint[r].first ? o : fmaf(out[r][c], joint[r].a, o * joint[r].c);
        }
    }
}

INLINE void values_rows_of(enum dtype type, float *const *out, const float *const *p, const struct joint *joint,
                           size_t n_rows, const unsigned char *v, size_t n, size_t head_dim,
                           const unsigned char *next) {
    if (n_rows == 2) values(type, out, p, joint, v, n, head_dim, next, 2);
    else values(type, out, p, joint, v, n, head_dim, next, 1);
}

static void values_rows(const struct kv_layer *kv, float *const *out, const float *const *p, const struct joint *joint,
                        size_t n_rows, const unsigned char *v, size_t n, const unsigned char *next) {
    switch (kv->type) {
    case DTYPE_F32: values_rows_of(DTYPE_F32, out, p, joint, n_rows, v, n, kv->head_dim, next); break;
    case DTYPE_F16: values_rows_of(DTYPE_F16, out, p, joint, n_rows, v, n, kv->head_dim, next); break;
    case DTYPE_FP8: values_rows_of(DTYPE_FP8, out, p, joint, n_rows, v, n, kv->head_dim, next); break;
    default: values_rows_of(DTYPE_BF16, out, p, joint, n_rows, v, n, kv->head_dim, next);
    }
}

// ---- The four parts -----------------------------------------------------------------------------------------------

static void attn_scores(const struct op_ctx *ctx, float *s, const float *q, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv, float scale) {
    (void)ctx;
    if (kv->type == DTYPE_Q8_0) {
        avx2_integer_scores(s, q, kv, kv_head, pages, n_kv, scale);
        return;
    }
    for (size_t j = 0; j < n_kv; j += ATTN_BLOCK) {
        const unsigned char *k = block_at(kv, kv->k, (size_t)pages[j / KV_PAGE_TOKENS], kv_head);
        scores_rows(kv, s + j, &q, 1, k, in_block(n_kv, j), scale, NULL);
    }
}

static void attn_softmax(const struct op_ctx *ctx, float *s, float *block_max, float *block_sum, size_t n_kv) {
    (void)ctx;
    for (size_t j = 0, b = 0; j < n_kv; j += ATTN_BLOCK, b++)
        softmax_block(s + j, in_block(n_kv, j), block_max + b, block_sum + b);
}

static void attn_values(const struct op_ctx *ctx, float *o, const float *p, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv) {
    (void)ctx;
    const struct joint joint = {.first = true};
    if (kv->type == DTYPE_Q8_0) {
        avx2_integer_values(o, p, kv, kv_head, pages, n_kv);
        return;
    }
    for (size_t j = 0; j < n_kv; j += ATTN_BLOCK, o += kv->head_dim, p += ATTN_BLOCK) {
        const unsigned char *v = block_at(kv, kv->v, (size_t)pages[j / KV_PAGE_TOKENS], kv_head);
        values_rows(kv, &o, &p, &joint, 1, v, in_block(n_kv, j), NULL);
    }
}

static void attn_combine(const struct op_ctx *ctx, float *out, const float *block_max, const float *block_sum,
                         const float *o, size_t n_blocks, size_t head_dim) {
    (void)ctx;
    float m = block_max[0], l = block_sum[0];
    memcpy(out, o, head_dim * sizeof *out);
    for (size_t b = 1; b < n_blocks; b++) {
        struct joint j = join(&m, &l, block_max[b], block_sum[b]);
        const float *from = o + b * head_dim;
        size_t i = 0;
        for (; i + 8 <= head_dim; i += 8) {
            __m256 x = _mm256_mul_ps(_mm256_loadu_ps(from + i), _mm256_set1_ps(j.c));
            _mm256_storeu_ps(out + i, _mm256_fmadd_ps(_mm256_loadu_ps(out + i), _mm256_set1_ps(j.a), x));
        }
        for (; i < head_dim; i++) out[i] = fmaf(out[i], j.a, from[i] * j.c);
    }
    divide(out, l, head_dim);
}

// ---- The fused op -------------------------------------------------------------------------------------------------

// One block for rows [r, r + n) of a tile, n <= 2; s: their scores.
static void add_block(const struct attention_args *a, struct rows *rows, size_t r, size_t n_rows, float *s,
                      size_t begin, const unsigned char *v, const unsigned char *next) {
    struct joint joint[2];
    const float *p[2];
    size_t n[2] = {0, 0};
    for (size_t i = 0; i < n_rows; i++) {
        p[i] = s + i * ATTN_BLOCK;
        n[i] = in_block(rows->n_kv[r + i], begin);
        if (n[i] == 0) continue;
        joint[i] = add_weights(rows, r + i, s + i * ATTN_BLOCK, n[i], begin);
    }
    if (n_rows == 2 && n[0] == n[1] && n[0] > 0) {
        values_rows(a->kv, rows->out + r, p, joint, 2, v, n[0], next);
        return;
    }
    for (size_t i = 0; i < n_rows; i++)
        if (n[i] > 0) values_rows(a->kv, rows->out + r + i, p + i, joint + i, 1, v, n[i], next);
}

static void attend(const struct attention_args *a, struct rows *rows, const int32_t *pages, size_t kv_head) {
    float s[MAX_ROWS * ATTN_BLOCK];
    size_t longest = 0;
    for (size_t r = 0; r < rows->n; r++) longest = rows->n_kv[r] > longest ? rows->n_kv[r] : longest;
    for (size_t begin = 0; begin < longest; begin += ATTN_BLOCK) {
        size_t page = (size_t)pages[begin / KV_PAGE_TOKENS];
        size_t next = begin + ATTN_BLOCK < longest ? (size_t)pages[begin / KV_PAGE_TOKENS + 1] : page;
        const unsigned char *k = block_at(a->kv, a->kv->k, page, kv_head),
                            *v = block_at(a->kv, a->kv->v, page, kv_head);
        const unsigned char *next_v = block_at(a->kv, a->kv->v, next, kv_head);
        scores_rows(a->kv, s, rows->q, rows->n, k, in_block(longest, begin), a->scale,
                    block_at(a->kv, a->kv->k, next, kv_head));
        for (size_t r = 0; r < rows->n; r += 2, next_v = NULL)
            add_block(a, rows, r, rows->n - r < 2 ? 1 : 2, s + r * ATTN_BLOCK, begin, v, next_v);
    }
    for (size_t r = 0; r < rows->n; r++) divide(rows->out[r], rows->l[r], a->head_dim);
}

// ---- Many query rows: K and V of a block are widened once ---------------------------------------------------------

enum { WIDE_ROWS = 6, WIDE_HEAD = 256 }; // from so many rows on; the widest head

// n rows of K or V as f32, and zeros up to a multiple of four. head_dim is a multiple of 32.
INLINE void widen_of(enum dtype type, float *to, const unsigned char *from, size_t n, size_t head_dim) {
    for (size_t j = 0; j < n; j++, to += head_dim, from += kv_bytes(type, head_dim)) {
        for (size_t c = 0; c < head_dim; c += 32) {
            __m256 x[4];
            load_32(type, from, c, x);
            for (size_t i = 0; i < 4; i++) _mm256_store_ps(to + c + 8 * i, x[i]);
        }
    }
    memset(to, 0, (ATTN_BLOCK - n) % 4 * head_dim * sizeof *to);
}

static void widen(const struct kv_layer *kv, float *to, const unsigned char *from, size_t n) {
    switch (kv->type) {
    case DTYPE_F32: widen_of(DTYPE_F32, to, from, n, kv->head_dim); break;
    case DTYPE_F16: widen_of(DTYPE_F16, to, from, n, kv->head_dim); break;
    case DTYPE_FP8: widen_of(DTYPE_FP8, to, from, n, kv->head_dim); break;
    default: widen_of(DTYPE_BF16, to, from, n, kv->head_dim);
    }
}

// Eight lanes of dot16 (0: the low ones, 8: the high ones) of two query rows and four K vectors: sum[2 * vector + row].
INLINE void wide_half(__m256 *sum, const float *q0, const float *q1, const float *k, size_t head_dim, size_t lanes) {
    for (size_t i = 0; i < 8; i++) sum[i] = _mm256_setzero_ps();
    for (size_t c = lanes; c < head_dim; c += DOT_LANES) {
        __m256 a = _mm256_loadu_ps(q0 + c), b = _mm256_loadu_ps(q1 + c);
        for (size_t i = 0; i < 4; i++) {
            __m256 x = _mm256_load_ps(k + i * head_dim + c);
            sum[2 * i] = _mm256_fmadd_ps(x, a, sum[2 * i]);
            sum[2 * i + 1] = _mm256_fmadd_ps(x, b, sum[2 * i + 1]);
        }
    }
}

// The first n scores of a block, rounded up to four, of every row: two rows and four vectors of K at a time.
void avx2_wide_scores(float *s, const float *const *q, size_t n_rows, const float *k, size_t n, size_t head_dim,
                      float scale) {
    for (size_t r = 0; r < n_rows; r += 2) {
        const float *q0 = q[r], *q1 = q[r + 1 < n_rows ? r + 1 : r];
        for (size_t j = 0; j < n; j += 4) {
            __m256 low[8], high[8], a[4], b[2];
            wide_half(low, q0, q1, k + j * head_dim, head_dim, 0);
            wide_half(high, q0, q1, k + j * head_dim, head_dim, 8);
            // dot16's tree for eight dot products at once: lanes l + 8, l + 4, l + 2, l + 1.
            for (size_t i = 0; i < 8; i++) low[i] = _mm256_add_ps(low[i], high[i]);
            for (size_t i = 0; i < 4; i++)
                a[i] = _mm256_add_ps(_mm256_permute2f128_ps(low[2 * i], low[2 * i + 1], 0x20),
                                     _mm256_permute2f128_ps(low[2 * i], low[2 * i + 1], 0x31));
            for (size_t i = 0; i < 2; i++)
                b[i] = _mm256_add_ps(_mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44),
                                     _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0xEE));
            __m256 v = _mm256_add_ps(_mm256_shuffle_ps(b[0], b[1], 0x88), _mm256_shuffle_ps(b[0], b[1], 0xDD));
            v = _mm256_mul_ps(v, _mm256_set1_ps(scale));
            _mm_storeu_ps(s + r * ATTN_BLOCK + j, _mm256_castps256_ps128(v));
            _mm_storeu_ps(s + (r + 1) * ATTN_BLOCK + j, _mm256_extractf128_ps(v, 1));
        }
    }
}

void avx2_wide_values(float *const *out, const float *const *p, const struct joint *joint, const float *v, size_t n,
                      size_t head_dim) {
    for (size_t c = 0; c < head_dim; c += 16)
        values_at(DTYPE_F32, out, p, joint, (const unsigned char *)v, n, head_dim, c, NULL, 4, 2);
}

// Adds a block's widened V to rows [r, r + n_rows), n_rows <= 4, of which neighbours with as many positions go
// together.
static void add_wide(const struct cpu_kernels *kernels, struct rows *rows, size_t r, size_t n_rows, float *s,
                     size_t begin, const float *v, size_t head_dim) {
    struct joint joint[4];
    const float *p[4];
    size_t n[4] = {0};
    for (size_t i = 0; i < n_rows; i++) {
        p[i] = s + i * ATTN_BLOCK;
        n[i] = in_block(rows->n_kv[r + i], begin);
        if (n[i] > 0) joint[i] = add_weights(rows, r + i, s + i * ATTN_BLOCK, n[i], begin);
    }
    const unsigned char *bytes = (const unsigned char *)v;
    if (n_rows == 4 && n[0] > 0 && n[0] == n[1] && n[1] == n[2] && n[2] == n[3]) {
        kernels->wide_values(rows->out + r, p, joint, v, n[0], head_dim);
        return;
    }
    for (size_t i = 0; i < n_rows;) {
        size_t m = i + 1 < n_rows && n[i] == n[i + 1] ? 2 : 1;
        if (n[i] > 0) values_rows_of(DTYPE_F32, rows->out + r + i, p + i, joint + i, m, bytes, n[i], head_dim, NULL);
        i += m;
    }
}

static void attend_wide(const struct cpu_kernels *kernels, const struct attention_args *a, struct rows *rows,
                        const int32_t *pages, size_t kv_head) {
    float s[MAX_ROWS * ATTN_BLOCK], wide[ATTN_BLOCK * WIDE_HEAD] __attribute__((aligned(64)));
    size_t longest = 0;
    for (size_t r = 0; r < rows->n; r++) longest = rows->n_kv[r] > longest ? rows->n_kv[r] : longest;
    for (size_t begin = 0; begin < longest; begin += ATTN_BLOCK) {
        size_t page = (size_t)pages[begin / KV_PAGE_TOKENS], n = in_block(longest, begin);
        widen(a->kv, wide, block_at(a->kv, a->kv->k, page, kv_head), n);
        kernels->wide_scores(s, rows->q, rows->n, wide, n, a->head_dim, a->scale);
        widen(a->kv, wide, block_at(a->kv, a->kv->v, page, kv_head), n);
        for (size_t r = 0; r < rows->n; r += 4)
            add_wide(kernels, rows, r, rows->n - r < 4 ? rows->n - r : 4, s + r * ATTN_BLOCK, begin, wide, a->head_dim);
    }
    for (size_t r = 0; r < rows->n; r++) divide(rows->out[r], rows->l[r], a->head_dim);
}

struct attention_job {
    const struct cpu_kernels *kernels;
    const struct attention_args *a;
    size_t group, tile; // query heads of a KV head; tokens of a tile
};

static void attend_any(const struct cpu_kernels *kernels, const struct attention_args *a, struct rows *rows,
                       const int32_t *pages, size_t kv_head) {
    if (a->kv->type == DTYPE_Q8_0) avx2_integer_attend(kernels, a, rows, pages, kv_head);
    else if (rows->n >= WIDE_ROWS && a->head_dim % 32 == 0 && a->head_dim <= WIDE_HEAD)
        attend_wide(kernels, a, rows, pages, kv_head);
    else attend(a, rows, pages, kv_head);
}

// Tokens [t0, t1) of sequence `seq`, one KV head.
static void attend_run(const struct attention_job *j, size_t t0, size_t t1, size_t kv_head) {
    const struct attention_args *a = j->a;
    const int32_t *pages = a->batch->pages + a->batch->page_start[a->batch->seq[t0]];
    struct rows rows = {0};
    for (size_t t = t0; t < t1; t++) {
        for (size_t h = kv_head * j->group; h < (kv_head + 1) * j->group; h++) {
            size_t at = (t * a->n_heads + h) * a->head_dim;
            rows.q[rows.n] = a->q + at;
            rows.out[rows.n] = a->out + at;
            rows.n_kv[rows.n++] = (size_t)a->batch->position[t] + 1;
            if (rows.n < MAX_ROWS) continue;
            attend_any(j->kernels, a, &rows, pages, kv_head);
            rows.n = 0;
        }
    }
    if (rows.n) attend_any(j->kernels, a, &rows, pages, kv_head);
}

static void attention_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct attention_job *j = user;
    const struct batch *b = j->a->batch;
    for (size_t i = begin; i < end; i++) {
        size_t kv_head = i % j->a->n_kv_heads, t = i / j->a->n_kv_heads * j->tile;
        size_t last = b->n_tokens - t < j->tile ? b->n_tokens : t + j->tile;
        while (t < last) { // a tile may hold the end of one sequence and the start of the next
            size_t run = t + 1;
            while (run < last && b->seq[run] == b->seq[t]) run++;
            attend_run(j, t, run, kv_head);
            t = run;
        }
    }
}

// ---- Few tokens and long contexts: blocks of positions go to different threads ------------------------------------
// Each block's maximum, sum and output are kept, and combined in order afterwards by the same function as in the
// composition: the same bits, whoever computed which block.

struct split_job {
    const struct cpu_kernels *kernels;
    const struct attention_args *a;
    size_t group, n_blocks, n_segments, segment; // blocks of the longest row; pieces of a row, and blocks in each
    float *rows;                                 // [n_tokens * n_heads, split_floats]
};

// Of one row: max [n_blocks], sum [n_blocks], output [n_blocks, head_dim].
static size_t split_floats(size_t n_blocks, size_t head_dim) {
    return n_blocks * (head_dim + 2);
}

static void split_integers(const struct split_job *j, size_t t, size_t head, size_t n_rows, size_t begin, size_t end) {
    const struct attention_args *a = j->a;
    struct rows rows = {.n = n_rows};
    float *max[MAX_ROWS], *sum[MAX_ROWS];
    for (size_t r = 0; r < n_rows; r++) {
        rows.q[r] = a->q + (t * a->n_heads + head + r) * a->head_dim;
        max[r] = j->rows + (t * a->n_heads + head + r) * split_floats(j->n_blocks, a->head_dim);
        sum[r] = max[r] + j->n_blocks;
        rows.out[r] = sum[r] + j->n_blocks;
    }
    avx2_integer_blocks(j->kernels, a, &rows, max, sum, a->batch->pages + a->batch->page_start[a->batch->seq[t]],
                        head / j->group, (size_t)a->batch->position[t] + 1, begin, end);
}

// Blocks [begin, end) for up to MAX_ROWS query heads of token t, from `head` on.
static void split_heads(const struct split_job *j, size_t t, size_t head, size_t n_rows, size_t begin, size_t end) {
    const struct attention_args *a = j->a;
    const struct joint joint[2] = {{.first = true}, {.first = true}};
    const int32_t *pages = a->batch->pages + a->batch->page_start[a->batch->seq[t]];
    size_t n_kv = (size_t)a->batch->position[t] + 1, kv_head = head / j->group;
    if (a->kv->type == DTYPE_Q8_0) {
        split_integers(j, t, head, n_rows, begin, end);
        return;
    }
    float s[MAX_ROWS * ATTN_BLOCK], *row[MAX_ROWS];
    const float *q[MAX_ROWS];
    for (size_t r = 0; r < n_rows; r++) {
        q[r] = a->q + (t * a->n_heads + head + r) * a->head_dim;
        row[r] = j->rows + (t * a->n_heads + head + r) * split_floats(j->n_blocks, a->head_dim);
    }
    for (size_t b = begin; b < end && b * ATTN_BLOCK < n_kv; b++) {
        size_t page = (size_t)pages[b * ATTN_BLOCK / KV_PAGE_TOKENS], n = in_block(n_kv, b * ATTN_BLOCK);
        const unsigned char *k = block_at(a->kv, a->kv->k, page, kv_head),
                            *v = block_at(a->kv, a->kv->v, page, kv_head);
        size_t next = (b + 1) * ATTN_BLOCK < n_kv ? (size_t)pages[(b + 1) * ATTN_BLOCK / KV_PAGE_TOKENS] : page;
        const unsigned char *next_v = block_at(a->kv, a->kv->v, next, kv_head);
        scores_rows(a->kv, s, q, n_rows, k, n, a->scale, block_at(a->kv, a->kv->k, next, kv_head));
        for (size_t r = 0; r < n_rows; r += 2) {
            size_t pair = n_rows - r < 2 ? 1 : 2;
            const float *p[2];
            float *out[2];
            for (size_t i = 0; i < pair; i++) {
                p[i] = s + (r + i) * ATTN_BLOCK;
                out[i] = row[r + i] + 2 * j->n_blocks + b * a->head_dim;
                softmax_block(s + (r + i) * ATTN_BLOCK, n, row[r + i] + b, row[r + i] + j->n_blocks + b);
            }
            values_rows(a->kv, out, p, joint, pair, v, n, next_v);
            next_v = NULL;
        }
    }
}

static void split_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct split_job *j = user;
    for (size_t i = begin; i < end; i++) {
        size_t segment = i % j->n_segments, kv_head = i / j->n_segments % j->a->n_kv_heads;
        size_t t = i / j->n_segments / j->a->n_kv_heads, first = segment * j->segment;
        for (size_t h = 0; h < j->group; h += MAX_ROWS)
            split_heads(j, t, kv_head * j->group + h, j->group - h < MAX_ROWS ? j->group - h : MAX_ROWS, first,
                        first + j->segment);
    }
}

static void combine_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct split_job *j = user;
    for (size_t i = begin; i < end; i++) {
        size_t n_kv = (size_t)j->a->batch->position[i / j->a->n_heads] + 1;
        const float *row = j->rows + i * split_floats(j->n_blocks, j->a->head_dim);
        attn_combine(NULL, j->a->out + i * j->a->head_dim, row, row + j->n_blocks, row + 2 * j->n_blocks,
                     (n_kv + ATTN_BLOCK - 1) / ATTN_BLOCK, j->a->head_dim);
    }
}

// False: there is enough to do for every thread without splitting, or the scratch is too small for it.
static bool split(const struct op_ctx *ctx, const struct attention_args *a, size_t n_items) {
    size_t n_threads = (size_t)pool_size(ctx->pool), longest = 0, n_rows = a->batch->n_tokens * a->n_heads;
    enum { FEW = 4, LEAST = 4 }; // items a thread below which to split; blocks in a segment at least
    if (n_threads == 1 || n_items >= FEW * n_threads) return false;
    for (size_t t = 0; t < a->batch->n_tokens; t++)
        longest = (size_t)a->batch->position[t] + 1 > longest ? (size_t)a->batch->position[t] + 1 : longest;
    struct split_job j = {
        .kernels = ctx->ops->kernels, .a = a, .group = a->n_heads / a->n_kv_heads, .rows = ctx->scratch};
    j.n_blocks = (longest + ATTN_BLOCK - 1) / ATTN_BLOCK;
    if (j.n_blocks < 2 * LEAST || ctx->scratch_floats / n_rows < split_floats(j.n_blocks, a->head_dim)) return false;
    size_t pieces = (FEW * n_threads + n_items - 1) / n_items;
    j.segment = (j.n_blocks + pieces - 1) / pieces;
    if (j.segment < LEAST) j.segment = LEAST;
    j.n_segments = (j.n_blocks + j.segment - 1) / j.segment;
    pool_for(ctx->pool, a->batch->n_tokens * a->n_kv_heads * j.n_segments, 1, split_piece, &j);
    pool_for(ctx->pool, n_rows, 1, combine_piece, &j);
    return true;
}

static void attention(const struct op_ctx *ctx, const struct attention_args *a) {
    struct attention_job j = {.kernels = ctx->ops->kernels, .a = a, .group = a->n_heads / a->n_kv_heads};
    j.tile = j.group < MAX_ROWS ? MAX_ROWS / j.group : 1;
    size_t n_items = (a->batch->n_tokens + j.tile - 1) / j.tile * a->n_kv_heads;
    if (!split(ctx, a, n_items)) pool_for(ctx->pool, n_items, 1, attention_piece, &j);
}

void avx2_fill_attention(struct ops *ops) {
    ops->attn_scores = attn_scores;
    ops->attn_softmax = attn_softmax;
    ops->attn_values = attn_values;
    ops->attn_combine = attn_combine;
    ops->attention = attention;
}

#endif
