// quantised.c: qdot (ops.h) in AVX2, and the rounding of activations to int8.
//
// A tile of sixteen rows and 256 columns is unpacked into L1 (unpack.h) and meets the tokens four by four. Lanes are
// rows, so each lane's chain of fmas is the one that ops.h states. vpmaddubsw multiplies unsigned weights with signed
// activations and adds pairs in 16 bits; how many of its results fit in 16 bits before they must be widened depends on
// the type. Q8_0's weights are signed: their sign goes to the activation.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "ops/cpu/avx2/kernels.h"
#include "ops/cpu/avx2/unpack.h"
#include "ops/cpu/avx2/vec.h"

enum {
    MAX_N = 4,         // tokens at a time
    DIRECT_TOKENS = 1, // up to so many tokens, rows are not unpacked into a tile
};

// ---- Activations
// -----------------------------------------------------------------------------------------------------

// act_block and its sums; x [32].
static void round_block(const struct act_row *row, size_t b, const float *x) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    __m256 v[4];
    for (size_t i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(x + 8 * i);
    __m256i m = _mm256_setzero_si256();
    for (size_t i = 0; i < 4; i++) m = _mm256_max_epu32(m, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
    __m128i m4 = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    m4 = _mm_max_epu32(m4, _mm_shuffle_epi32(m4, 0x4E));
    m4 = _mm_max_epu32(m4, _mm_shuffle_epi32(m4, 0xB1));
    float largest = float_from_bits((uint32_t)_mm_cvtsi128_si32(m4));
    if (!(largest >= 0x1p-100f && largest <= FLT_MAX)) {
        memset(row->q + b * ACT_BLOCK, 0, ACT_BLOCK);
        row->scale[b] = largest < 0x1p-100f ? 0.0f : NAN;
        row->weighted[b] = row->scale[b] * 0.0f;
        row->sum[2 * b] = row->sum[2 * b + 1] = 0;
        return;
    }
    __m256 inverse = _mm256_set1_ps(127.0f / largest);
    __m256i q[4];
    for (size_t i = 0; i < 4; i++) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    __m256i s0 = _mm256_add_epi32(q[0], q[1]), s1 = _mm256_add_epi32(q[2], q[3]);
    __m256i s = _mm256_hadd_epi32(s0, s1); // lanes: two of s0, two of s1, twice
    __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    s4 = _mm_hadd_epi32(s4, s4);
    int first = _mm_cvtsi128_si32(s4), second = _mm_extract_epi32(s4, 1);
    __m256i words0 = _mm256_packs_epi32(q[0], q[1]), words1 = _mm256_packs_epi32(q[2], q[3]);
    __m256i bytes =
        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words0, words1), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)(void *)(row->q + b * ACT_BLOCK), bytes);
    row->scale[b] = largest / 127.0f;
    row->sum[2 * b] = (int16_t)first;
    row->sum[2 * b + 1] = (int16_t)second;
    row->weighted[b] = row->scale[b] * (float)(first + second);
}

void avx2_round_row(struct act_row *row, const float *x, size_t n) {
    for (size_t b = 0; b < n / ACT_BLOCK; b++) round_block(row, b, x + b * ACT_BLOCK);
}

// ---- Products
// --------------------------------------------------------------------------------------------------------

INLINE __m256i broadcast_4(const int8_t *p) {
    int v;
    memcpy(&v, p, sizeof v);
    return _mm256_set1_epi32(v);
}

// Integer sums of `len` columns at `column` of the tile: sum[octet][token].
INLINE void integer_sums(enum dtype type, const struct weight_tile *tile, size_t column, size_t len,
                         const int8_t *const *x, __m256i (*sum)[MAX_N], const size_t N) {
    // The largest pair is 2 * 127 * (largest weight): 15, 31 or 63 leave room for 8, 4 or 2 of them in 16 bits.
    const size_t steps = type == DTYPE_Q8_0                                               ? 1
                         : type == DTYPE_Q6_K                                             ? 2
                         : type == DTYPE_Q5_0 || type == DTYPE_Q5_1 || type == DTYPE_Q5_K ? 4
                                                                                          : 8;
    const __m256i ones = _mm256_set1_epi16(1);
    for (size_t o = 0; o < 2; o++)
        for (size_t t = 0; t < N; t++) sum[o][t] = _mm256_setzero_si256();
    for (size_t j = 0; j < len / 4; j += steps) {
        __m256i pairs[2][MAX_N];
        for (size_t o = 0; o < 2; o++)
            for (size_t t = 0; t < N; t++) pairs[o][t] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (size_t i = j; i < (j + steps < len / 4 ? j + steps : len / 4); i++) {
            const __m256i *at = (const __m256i *)(const void *)tile->q[column / 4 + i];
            __m256i w[2] = {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
            for (size_t t = 0; t < N; t++) {
                __m256i x4 = broadcast_4(x[t] + column + 4 * i);
                for (size_t o = 0; o < 2; o++) {
                    __m256i p = type == DTYPE_Q8_0
                                    ? _mm256_maddubs_epi16(_mm256_abs_epi8(w[o]), _mm256_sign_epi8(x4, w[o]))
                                    : _mm256_maddubs_epi16(w[o], x4);
                    pairs[o][t] = _mm256_add_epi16(pairs[o][t], p);
                }
            }
        }
        for (size_t o = 0; o < 2; o++)
            for (size_t t = 0; t < N; t++)
                sum[o][t] = _mm256_add_epi32(sum[o][t], _mm256_madd_epi16(pairs[o][t], ones));
    }
}

// Adds n columns, from k on in x, to the chains of N tokens. out: [N, TILE_ROWS]
INLINE void add_tile(enum dtype type, float *out, const struct weight_tile *tile, const struct act_row *x, size_t k,
                     size_t n, bool first, const size_t N) {
    const bool has_min =
        type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q2_K || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
    const size_t len = type == DTYPE_Q2_K || type == DTYPE_Q3_K || type == DTYPE_Q6_K ? 16 : 32;
    const int offset = unpack_offset(type);
    __m256 acc[2][MAX_N];
    const int8_t *q[MAX_N];
    for (size_t t = 0; t < N; t++) {
        q[t] = x[t].q + k;
        for (size_t o = 0; o < 2; o++)
            acc[o][t] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(out + t * TILE_ROWS + OCTET * o);
    }
    for (size_t g = 0; g < n / len; g++) {
        const size_t group = k / len + g, block = (k + g * len) / ACT_BLOCK;
        __m256i sum[2][MAX_N];
        integer_sums(type, tile, g * len, len, q, sum, N);
        for (size_t t = 0; t < N; t++) {
            int total = len == 32 ? x[t].sum[2 * group] + x[t].sum[2 * group + 1] : x[t].sum[group];
            __m256 d = _mm256_broadcast_ss(&x[t].scale[block]);
            for (size_t o = 0; o < 2; o++) {
                __m256i s = sum[o][t];
                if (offset) s = _mm256_sub_epi32(s, _mm256_set1_epi32(offset * total));
                __m256 scale = _mm256_mul_ps(_mm256_load_ps(&tile->scale[g][OCTET * o]), d);
                acc[o][t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(s), acc[o][t]);
                if (!has_min) continue;
                __m256 weighted = len == 32 ? _mm256_broadcast_ss(&x[t].weighted[block])
                                            : _mm256_mul_ps(d, _mm256_set1_ps((float)total));
                acc[o][t] = _mm256_fmadd_ps(_mm256_load_ps(&tile->min[g][OCTET * o]), weighted, acc[o][t]);
            }
        }
    }
    for (size_t t = 0; t < N; t++)
        for (size_t o = 0; o < 2; o++) _mm256_storeu_ps(out + t * TILE_ROWS + OCTET * o, acc[o][t]);
}

// ---- One token: the tile is not worth its making
// -------------------------------------------------------------------

// Lane r of *low: the sum of v[r]'s eight lanes. With `apart` the sums of its first four, in low, and of its last, in
// high.
INLINE void sum_lanes(const __m256i *v, bool apart, __m256i *low, __m256i *high) {
    __m256i a[4], b[2];
    for (size_t i = 0; i < 4; i++) {
        __m256i x = v[2 * i], y = v[2 * i + 1];
        a[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
    }
    for (size_t i = 0; i < 2; i++)
        b[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(a[2 * i], a[2 * i + 1]),
                                _mm256_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
    *low = _mm256_permute2x128_si256(b[0], b[1], 0x20);
    *high = _mm256_permute2x128_si256(b[0], b[1], 0x31);
    if (!apart) *low = _mm256_add_epi32(*low, *high);
}

// Adds a group's integer sums of eight rows, and its minima, to their chains.
INLINE __m256 add_group(enum dtype type, __m256 acc, __m256i sum, const float *scale, const float *min, __m256 d,
                        int total, float weighted) {
    const bool has_min = type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
    const int offset = unpack_offset(type);
    if (offset) sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(offset * total));
    acc = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_load_ps(scale), d), _mm256_cvtepi32_ps(sum), acc);
    if (has_min) acc = _mm256_fmadd_ps(_mm256_load_ps(min), _mm256_set1_ps(weighted), acc);
    return acc;
}

INLINE void one_token(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows,
                      const struct act_row *x) {
    const __m256i ones = _mm256_set1_epi16(1);
    struct weight_tile tile; // its scales and minima only
    for (size_t first = 0; first < TILE_ROWS && first < n_rows; first += OCTET) {
        __m256 acc = _mm256_setzero_ps();
        const char *next = (const char *)w->data + (row + first + OCTET) * w->row_bytes;
        for (size_t k = 0; k < w->n_in; k += TILE_COLUMNS) {
            size_t n = w->n_in - k < TILE_COLUMNS ? w->n_in - k : TILE_COLUMNS;
            const uint8_t *rows[OCTET];
            rows_at(w, row, first, n_rows, k, rows);
            load_scales(type, &tile, first, rows, n);
#pragma GCC unroll 8
            for (size_t b = 0; b < n_blocks(type, n); b++) {
                const size_t block = k / ACT_BLOCK + b;
                __m256i v[OCTET], low, high, q = _mm256_loadu_si256((const __m256i *)(const void *)(x->q + 32 * block));
                fetch_ahead(type, &next);
                load_block(type, rows, b, v);
                for (size_t r = 0; r < OCTET; r++) {
                    __m256i pairs = type == DTYPE_Q8_0
                                        ? _mm256_maddubs_epi16(_mm256_abs_epi8(v[r]), _mm256_sign_epi8(q, v[r]))
                                        : _mm256_maddubs_epi16(v[r], q);
                    v[r] = _mm256_madd_epi16(pairs, ones);
                }
                sum_lanes(v, type == DTYPE_Q6_K, &low, &high);
                __m256 d = _mm256_broadcast_ss(x->scale + block);
                int sum0 = x->sum[2 * block], sum1 = x->sum[2 * block + 1];
                if (type == DTYPE_Q6_K) {
                    acc = add_group(type, acc, low, &tile.scale[2 * b][first], NULL, d, sum0, 0);
                    acc = add_group(type, acc, high, &tile.scale[2 * b + 1][first], NULL, d, sum1, 0);
                } else {
                    acc = add_group(type, acc, low, &tile.scale[b][first], &tile.min[b][first], d, sum0 + sum1,
                                    x->weighted[block]);
                }
            }
        }
        _mm256_storeu_ps(out + first, acc);
    }
}

INLINE void quantised(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                      size_t n_tokens) {
    struct weight_tile tile;
    if (n_tokens <= DIRECT_TOKENS && type != DTYPE_Q2_K && type != DTYPE_Q3_K) {
        for (size_t t = 0; t < n_tokens; t++) {
            struct act_row token = act_row_at((float *)(uintptr_t)x, w->n_in, t);
            one_token(type, out + t * TILE_ROWS, w, row, n_rows, &token);
        }
        return;
    }
    const char *next = (const char *)w->data + (row + TILE_ROWS) * w->row_bytes;
    for (size_t k = 0; k < w->n_in; k += TILE_COLUMNS) {
        size_t n = w->n_in - k < TILE_COLUMNS ? w->n_in - k : TILE_COLUMNS;
        unpack_tile(type, &tile, w, row, n_rows, k, n, &next);
        struct act_row rows[MAX_N];
        size_t t = 0;
        for (; t + 4 <= n_tokens; t += 4) {
            for (size_t i = 0; i < 4; i++) rows[i] = act_row_at((float *)(uintptr_t)x, w->n_in, t + i);
            add_tile(type, out + t * TILE_ROWS, &tile, rows, k, n, k == 0, 4);
        }
        for (; t < n_tokens; t++) {
            rows[0] = act_row_at((float *)(uintptr_t)x, w->n_in, t);
            add_tile(type, out + t * TILE_ROWS, &tile, rows, k, n, k == 0, 1);
        }
    }
}

void avx2_quantised(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    switch (w->type) {
#define CASE(type)                                                                                                     \
    case type: quantised(type, out, w, row, n_rows, x, n_tokens); break;
        CASE(DTYPE_Q8_0)
        CASE(DTYPE_Q4_0)
        CASE(DTYPE_Q4_1)
        CASE(DTYPE_Q5_0)
        CASE(DTYPE_Q5_1)
        CASE(DTYPE_Q2_K)
        CASE(DTYPE_Q3_K)
        CASE(DTYPE_Q4_K)
        CASE(DTYPE_Q5_K)
        CASE(DTYPE_Q6_K)
#undef CASE
    default: break; // no other type is quantised
    }
}

#endif
