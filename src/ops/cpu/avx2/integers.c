// integers.c: attention over K and V of Q8_0 in AVX2: products of integers (formula: struct attention_args).
//
// Eight bits are widened to sixteen, vpmaddwd multiplies two neighbours and adds them: of K, eight positions by two
// channels, with two channels of q; of V, eight channels by two positions, with the weights of two positions. What was
// widened serves up to four query rows. Every sum is exact, so that its order does not matter.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "ops/cpu/avx2/attention.h"
#include "ops/cpu/avx2/kernels.h"

enum { BLOCK = 32, OCTET_BYTES = 256, LINE = 64 };

INLINE __m256i widen(const unsigned char *p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
}

INLINE __m256 halves(const unsigned char *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

// attn_round_query; n is a multiple of 32.
static float round_query(const float *q, int16_t *to, size_t n) {
    __m256i max = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 8) {
        __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(q + i));
        max = _mm256_max_epu32(max, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
    }
    __m128i max4 = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    max4 = _mm_max_epu32(max4, _mm_shuffle_epi32(max4, 0x4E));
    max4 = _mm_max_epu32(max4, _mm_shuffle_epi32(max4, 0xB1));
    float largest = float_from_bits((uint32_t)_mm_cvtsi128_si32(max4));
    if (!(largest >= 0x1p-100f && largest <= FLT_MAX)) {
        memset(to, 0, n * sizeof *to);
        return largest < 0x1p-100f ? 0.0f : NAN;
    }
    const __m256 inverse = _mm256_set1_ps(32767.0f / largest);
    for (size_t i = 0; i < n; i += 16) {
        __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(q + i), inverse));
        __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(q + i + 8), inverse));
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
        _mm256_store_si256((__m256i *)(void *)(to + i), words);
    }
    return largest / 32767.0f;
}

static void round_queries(struct queries *to, const float *const *q, size_t n_rows, size_t head_dim, float scale) {
    for (size_t r = 0; r < n_rows; r++) to->factor[r] = round_query(q[r], to->q[r], head_dim) * scale;
}

// Asks for a piece of the block that comes next, `step` of as many as there are pairs of octets: 8.5 lines of 17.
INLINE void fetch_line(const unsigned char *next, size_t step, size_t i) {
    if (next && i % 2 == 0) _mm_prefetch((const char *)next + (step * 17 + i) * (LINE / 2), _MM_HINT_T0);
}

// Adds 16 pairs of two octets to R rows' sums; pairs: [R][16] of two words each, `stride` words from row to row.
INLINE void add_pairs(__m256i (*sum)[2], const unsigned char *octets, const int16_t *pairs, size_t stride, size_t n,
                      const unsigned char *next, size_t step, const size_t R) {
    for (size_t r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 16
    for (size_t i = 0; i < 16; i++) {
        if (i >= n) break;
        __m256i a = widen(octets + 16 * i), b = widen(octets + OCTET_BYTES + 16 * i);
        fetch_line(next, step, i);
        for (size_t r = 0; r < R; r++) {
            __m256i two = broadcast_4(pairs + r * stride + 2 * i);
            add_dwords(&sum[r][0], _mm256_madd_epi16(a, two));
            add_dwords(&sum[r][1], _mm256_madd_epi16(b, two));
        }
    }
}

// s[r * ATTN_BLOCK + j], the scores of R rows, from row `first` on, with the first n positions of a block, rounded up
// to sixteen (what stands in the rest comes to nothing).
INLINE void scores(float *s, const struct queries *q, size_t first, const unsigned char *k, size_t n, size_t head_dim,
                   const unsigned char *next, const size_t R) {
    const size_t n_blocks = head_dim / BLOCK;
    for (size_t j = 0; j < n; j += 16) {
        __m256 t[4][2];
        for (size_t r = 0; r < R; r++) t[r][0] = t[r][1] = _mm256_setzero_ps();
        for (size_t b = 0; b < n_blocks; b++) {
            __m256i sum[4][2];
            add_pairs(sum, k + kv_block_at(head_dim, b) + j / 8 * OCTET_BYTES, q->q[first] + BLOCK * b, MOST_HEAD_DIM,
                      16, next, j / 16 * n_blocks + b, R);
            for (size_t o = 0; o < 2; o++) {
                __m256 d = halves(k + kv_scale_at(b, j + 8 * o));
                for (size_t r = 0; r < R; r++) t[r][o] = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(sum[r][o]), t[r][o]);
            }
        }
        for (size_t r = 0; r < R; r++) {
            __m256 factor = _mm256_set1_ps(q->factor[first + r]);
            _mm256_storeu_ps(s + r * ATTN_BLOCK + j, _mm256_mul_ps(t[r][0], factor));
            _mm256_storeu_ps(s + r * ATTN_BLOCK + j + 8, _mm256_mul_ps(t[r][1], factor));
        }
    }
}

void avx2_byte_scores(float *s, const struct queries *q, size_t n_rows, const unsigned char *k, size_t n,
                      size_t head_dim, const unsigned char *next) {
    size_t r = 0;
    for (; r + 4 <= n_rows; r += 4, next = NULL) scores(s + r * ATTN_BLOCK, q, r, k, n, head_dim, next, 4);
    for (; r + 2 <= n_rows; r += 2, next = NULL) scores(s + r * ATTN_BLOCK, q, r, k, n, head_dim, next, 2);
    for (; r < n_rows; r++, next = NULL) scores(s + r * ATTN_BLOCK, q, r, k, n, head_dim, next, 1);
}

// g of one block of channels for the first n positions, 0 for the others, and what their sums are multiplied with.
INLINE float weight_scales(__m256 g[4], const unsigned char *scales, size_t n) {
    const __m256i count = _mm256_set1_epi16((short)n);
    const __m256i place = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m256i d[2];
    for (size_t i = 0; i < 2; i++) {
        __m256i real = _mm256_cmpgt_epi16(count, _mm256_add_epi16(place, _mm256_set1_epi16((short)(16 * i))));
        d[i] = _mm256_and_si256(real, _mm256_loadu_si256((const __m256i *)(const void *)(scales + 32 * i)));
    }
    // The largest: the smallest of the complements, which one instruction finds.
    __m256i both = _mm256_max_epu16(d[0], d[1]);
    __m128i most = _mm_max_epu16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    most = _mm_minpos_epu16(_mm_xor_si128(most, _mm_set1_epi16(-1)));
    float factor, inverse = attn_weight_scale((uint16_t)~_mm_cvtsi128_si32(most), &factor);
    for (size_t i = 0; i < 4; i++) {
        __m128i eight = i % 2 ? _mm256_extracti128_si256(d[i / 2], 1) : _mm256_castsi256_si128(d[i / 2]);
        g[i] = _mm256_mul_ps(_mm256_cvtph_ps(eight), _mm256_set1_ps(inverse));
    }
    return factor;
}

// W of one row and block of channels from its first n probabilities.
INLINE void round_weights(int16_t *w, const float *p, const __m256 g[4], size_t n) {
    __m256i v[4];
    for (size_t i = 0; i < 4; i++) {
        __m256i place = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32((int)(8 * i)));
        __m256i real = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), place);
        v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_maskload_ps(p + 8 * i, real), g[i]));
    }
    for (size_t i = 0; i < 2; i++) {
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[2 * i], v[2 * i + 1]), 0xD8);
        _mm256_store_si256((__m256i *)(void *)(w + 16 * i), words);
    }
}

// Adds a block's values to R rows; p[r]: n[r] probabilities.
INLINE void values(float *const *out, const float *const *p, const struct joint *joint, const size_t *n,
                   const unsigned char *v, size_t head_dim, const unsigned char *next, const size_t R) {
    size_t most = 0;
    for (size_t r = 0; r < R; r++) most = n[r] > most ? n[r] : most;
    int16_t weights[MOST_HEAD_DIM / BLOCK][4][ATTN_BLOCK] __attribute__((aligned(32)));
    float factors[MOST_HEAD_DIM / BLOCK][4];
    for (size_t b = 0; b < head_dim / BLOCK; b++) { // all at once: each is a long chain of latencies
        __m256 g[4];
        for (size_t r = 0; r < R; r++) {
            if (r > 0 && n[r] == n[r - 1]) factors[b][r] = factors[b][r - 1];
            else factors[b][r] = weight_scales(g, v + kv_scale_at(b, 0), n[r]);
            round_weights(weights[b][r], p[r], g, n[r]);
        }
    }
    for (size_t b = 0; b < head_dim / BLOCK; b++) {
        const float *factor = factors[b];
        for (size_t h = 0; h < 2; h++) {
            __m256i sum[4][2];
            add_pairs(sum, v + kv_block_at(head_dim, b) + 2 * h * OCTET_BYTES, weights[b][0], ATTN_BLOCK,
                      (most + 1) / 2, next, 2 * b + h, R);
            for (size_t r = 0; r < R; r++) {
                for (size_t o = 0; o < 2; o++) {
                    float *to = out[r] + BLOCK * b + 16 * h + 8 * o;
                    __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[r][o]), _mm256_set1_ps(factor[r]));
                    if (!joint[r].first)
                        y = _mm256_fmadd_ps(_mm256_loadu_ps(to), _mm256_set1_ps(joint[r].a),
                                            _mm256_mul_ps(y, _mm256_set1_ps(joint[r].c)));
                    _mm256_storeu_ps(to, y);
                }
            }
        }
    }
}

void avx2_byte_values(float *const *out, const float *const *p, const struct joint *joint, const size_t *n,
                      size_t n_rows, const unsigned char *v, size_t head_dim, const unsigned char *next) {
    if (n_rows == 4) values(out, p, joint, n, v, head_dim, next, 4);
    else if (n_rows == 2) values(out, p, joint, n, v, head_dim, next, 2);
    else values(out, p, joint, n, v, head_dim, next, 1);
}

static const unsigned char *head_of(const struct kv_layer *kv, const void *data, size_t kv_head, const int32_t *pages,
                                    size_t block) {
    return (const unsigned char *)data + kv_head_at(kv, (size_t)pages[block], kv_head);
}

void avx2_integer_scores(float *s, const float *q, const struct kv_layer *kv, size_t kv_head, const int32_t *pages,
                         size_t n_kv, float scale) {
    struct queries one;
    round_queries(&one, &q, 1, kv->head_dim, scale);
    for (size_t j = 0; j < n_kv; j += ATTN_BLOCK) {
        float room[ATTN_BLOCK];
        size_t n = in_block(n_kv, j);
        avx2_byte_scores(room, &one, 1, head_of(kv, kv->k, kv_head, pages, j / ATTN_BLOCK), n, kv->head_dim, NULL);
        memcpy(s + j, room, n * sizeof *s);
    }
}

void avx2_integer_values(float *o, const float *p, const struct kv_layer *kv, size_t kv_head, const int32_t *pages,
                         size_t n_kv) {
    const struct joint joint = {.first = true};
    for (size_t j = 0; j < n_kv; j += ATTN_BLOCK, o += kv->head_dim, p += ATTN_BLOCK) {
        size_t n = in_block(n_kv, j);
        avx2_byte_values(&o, &p, &joint, &n, 1, head_of(kv, kv->v, kv_head, pages, j / ATTN_BLOCK), kv->head_dim, NULL);
    }
}

// Of n_rows rows those with n[r] > 0, as many at a time as byte_values takes.
static void add_values(const struct cpu_kernels *kernels, float *const *out, const float *const *p,
                       const struct joint *joint, const size_t *n, size_t n_rows, const unsigned char *v,
                       size_t head_dim, const unsigned char *next) {
    for (size_t r = 0; r < n_rows; next = NULL) {
        size_t m = 0;
        while (m < 4 && r + m < n_rows && n[r + m] > 0) m++;
        if (m == 3) m = 2;
        if (m > 0) kernels->byte_values(out + r, p + r, joint + r, n + r, m, v, head_dim, next);
        r += m > 0 ? m : 1;
    }
}

void avx2_integer_attend(const struct cpu_kernels *kernels, const struct attention_args *a, struct rows *rows,
                         const int32_t *pages, size_t kv_head) {
    struct queries q;
    float s[MAX_ROWS * ATTN_BLOCK];
    const float *p[MAX_ROWS];
    size_t longest = 0;
    for (size_t r = 0; r < rows->n; r++) {
        longest = rows->n_kv[r] > longest ? rows->n_kv[r] : longest;
        p[r] = s + r * ATTN_BLOCK;
    }
    round_queries(&q, rows->q, rows->n, a->head_dim, a->scale);
    for (size_t begin = 0; begin < longest; begin += ATTN_BLOCK) {
        size_t block = begin / ATTN_BLOCK, next = begin + ATTN_BLOCK < longest ? block + 1 : block, n[MAX_ROWS];
        struct joint joint[MAX_ROWS];
        kernels->byte_scores(s, &q, rows->n, head_of(a->kv, a->kv->k, kv_head, pages, block), in_block(longest, begin),
                             a->head_dim, head_of(a->kv, a->kv->k, kv_head, pages, next));
        for (size_t r = 0; r < rows->n; r++) {
            n[r] = in_block(rows->n_kv[r], begin);
            if (n[r] > 0) joint[r] = add_weights(rows, r, s + r * ATTN_BLOCK, n[r], begin);
        }
        add_values(kernels, rows->out, p, joint, n, rows->n, head_of(a->kv, a->kv->v, kv_head, pages, block),
                   a->head_dim, head_of(a->kv, a->kv->v, kv_head, pages, next));
    }
    for (size_t r = 0; r < rows->n; r++) divide(rows->out[r], rows->l[r], a->head_dim);
}

void avx2_integer_blocks(const struct cpu_kernels *kernels, const struct attention_args *a, const struct rows *rows,
                         float *const *max, float *const *sum, const int32_t *pages, size_t kv_head, size_t n_kv,
                         size_t begin, size_t end) {
    struct queries q;
    float s[MAX_ROWS * ATTN_BLOCK];
    round_queries(&q, rows->q, rows->n, a->head_dim, a->scale);
    for (size_t b = begin; b < end && b * ATTN_BLOCK < n_kv; b++) {
        size_t n = in_block(n_kv, b * ATTN_BLOCK), counts[MAX_ROWS];
        size_t next = (b + 1) * ATTN_BLOCK < n_kv ? b + 1 : b;
        const float *p[MAX_ROWS];
        float *out[MAX_ROWS];
        struct joint joint[MAX_ROWS];
        kernels->byte_scores(s, &q, rows->n, head_of(a->kv, a->kv->k, kv_head, pages, b), n, a->head_dim,
                             head_of(a->kv, a->kv->k, kv_head, pages, next));
        for (size_t r = 0; r < rows->n; r++) {
            p[r] = s + r * ATTN_BLOCK;
            out[r] = rows->out[r] + b * a->head_dim;
            counts[r] = n;
            joint[r] = (struct joint){.first = true};
            softmax_block(s + r * ATTN_BLOCK, n, max[r] + b, sum[r] + b);
        }
        add_values(kernels, out, p, joint, counts, rows->n, head_of(a->kv, a->kv->v, kv_head, pages, b), a->head_dim,
                   head_of(a->kv, a->kv->v, kv_head, pages, next));
    }
}

#endif
