// attention.h: what attention's two kernels in AVX2 share: a tile's rows, softmax of a block, and how blocks are
// joined. attention.c multiplies f32 values, integers.c the integers of Q8_0. Files under avx2/ and the AVX-512 folders
// include it.
#ifndef TANDEM_OPS_CPU_AVX2_ATTENTION_H
#define TANDEM_OPS_CPU_AVX2_ATTENTION_H

#include "ops/cpu/attention.h"
#include "ops/cpu/avx2/vec.h"

enum { MAX_ROWS = 16 }; // query rows of a tile

static inline size_t in_block(size_t n_kv, size_t begin) {
    return n_kv <= begin ? 0 : n_kv - begin < ATTN_BLOCK ? n_kv - begin : ATTN_BLOCK;
}

// One block's scores s[n] to p; positions past n count as score -inf, that is p = +0, which leaves every sum as it is.
static inline void softmax_block(float *s, size_t n, float *max, float *sum) {
    float room[ATTN_BLOCK], *p = s;
    if (n < ATTN_BLOCK) {
        p = room;
        for (size_t j = 0; j < ATTN_BLOCK; j++) p[j] = j < n ? s[j] : -INFINITY;
    }
    __m256 v[4], m8;
    for (size_t i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(p + 8 * i);
    m8 = _mm256_max_ps(_mm256_max_ps(v[0], v[1]), _mm256_max_ps(v[2], v[3]));
    __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
    m4 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    *max = _mm_cvtss_f32(_mm_max_ss(m4, _mm_movehdup_ps(m4)));
    for (size_t i = 0; i < 4; i++) {
        v[i] = exp32_8(_mm256_sub_ps(v[i], _mm256_set1_ps(*max)));
        _mm256_storeu_ps(p + 8 * i, v[i]);
    }
    if (n < ATTN_BLOCK) memcpy(s, p, n * sizeof *s);
    *sum = dot16_reduce_2(_mm256_add_ps(v[0], v[2]), _mm256_add_ps(v[1], v[3]));
}

// How a block's output joins what a row has so far: out = o_b, or fma(out, a, o_b * c).
struct joint {
    bool first;
    float a, c;
};

// Joins a block to a row's running maximum and sum.
static inline struct joint join(float *m, float *l, float block_max, float block_sum) {
    // One of the two is exp32(0) = 1; of a NaN both are taken.
    float next = block_max > *m ? block_max : *m;
    struct joint j = {.a = *m == next ? 1.0f : exp32(*m - next),
                      .c = block_max == next ? 1.0f : exp32(block_max - next)};
    *l = fmaf(*l, j.a, block_sum * j.c);
    *m = next;
    return j;
}

static inline void divide(float *out, float l, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_div_ps(_mm256_loadu_ps(out + i), _mm256_set1_ps(l)));
    for (; i < n; i++) out[i] /= l;
}

struct cpu_kernels;

// Query rows of one sequence that share a KV head.
struct rows {
    size_t n;
    const float *q[MAX_ROWS];
    float *out[MAX_ROWS];
    size_t n_kv[MAX_ROWS];
    float m[MAX_ROWS], l[MAX_ROWS];
};

// A block's scores s[n] of row r to p, and its part in the row's maximum and sum.
static inline struct joint add_weights(struct rows *rows, size_t r, float *s, size_t n, size_t begin) {
    float max, sum;
    softmax_block(s, n, &max, &sum);
    if (begin > 0) return join(&rows->m[r], &rows->l[r], max, sum);
    rows->m[r] = max;
    rows->l[r] = sum;
    return (struct joint){.first = true};
}

// A tile's queries as integers.
struct queries {
    int16_t q[MAX_ROWS][MOST_HEAD_DIM] __attribute__((aligned(64)));
    float factor[MAX_ROWS]; // with the scale of the scores
};

// Attention over K and V of Q8_0 (integers.c). The parts of one head, as ops.h has them:
void avx2_integer_scores(float *s, const float *q, const struct kv_layer *kv, size_t kv_head, const int32_t *pages,
                         size_t n_kv, float scale);
void avx2_integer_values(float *o, const float *p, const struct kv_layer *kv, size_t kv_head, const int32_t *pages,
                         size_t n_kv);
// A tile, whole.
void avx2_integer_attend(const struct cpu_kernels *kernels, const struct attention_args *a, struct rows *rows,
                         const int32_t *pages, size_t kv_head);
// Blocks [begin, end) of a tile whose rows have n_kv positions, each by itself: max[r][b], sum[r][b], and the output at
// rows->out[r] + b * head_dim.
void avx2_integer_blocks(const struct cpu_kernels *kernels, const struct attention_args *a, const struct rows *rows,
                         float *const *max, float *const *sum, const int32_t *pages, size_t kv_head, size_t n_kv,
                         size_t begin, size_t end);

#endif
