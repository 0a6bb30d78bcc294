// one_token.c: qdot (ops.h) of a single token in AVX2: rows as stored or in octets, which are not worth unpacking into
// a tile. It owns no activations and no tiles (quantised.c).
//
// In octets, a register holds the same columns of eight rows: every product is in its row's 32-bit lane. Two octets
// share the token's broadcasts.
//
// As stored, eight rows go along K together, two in the halves of a register, so that products of a row's sixteen
// columns lie in one half and three steps of shuffles and sums leave a row in each 32-bit lane: from there on it is the
// tile's chain.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "ops/cpu/avx2/kernels.h"
#include "ops/cpu/avx2/octets.h"
#include "ops/cpu/avx2/vec.h"

INLINE __m256i twice(const int8_t *q) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)q));
}

INLINE __m256i low_nibbles(__m256i v) {
    return _mm256_and_si256(v, _mm256_set1_epi8(15));
}

INLINE __m256i high_nibbles(__m256i v) {
    return low_nibbles(_mm256_srli_epi16(v, 4));
}

INLINE __m256i add(__m256i a, __m256i b, const bool words) {
    return words ? _mm256_add_epi16(a, b) : _mm256_add_epi32(a, b);
}

// The first step and the second of the sums over a half's 32-bit lanes. Two registers of rows r, r + 4 and r + 1, r + 5
// become one; two of those become one with row r in lane r.
INLINE __m256i fold_rows(__m256i a, __m256i b, const bool words) {
    return add(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b), words);
}

INLINE __m256i fold_pairs(__m256i a, __m256i b, const bool words) {
    return add(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b), words);
}

// Row sums of a group's folded words. Those of signed integers fit in 16 bits (quantised.c); unsigned ones of five bits
// are made so for a moment.
INLINE __m256i row_sums(enum dtype type, __m256i words, const int16_t *lanes) {
    const bool borrow = type == DTYPE_Q5_1 || type == DTYPE_Q5_K;
    const int offset = borrow ? 16 : unpack_offset(type), shift = offset ? __builtin_ctz((unsigned)offset) : 0;
    const __m256i ones = _mm256_set1_epi16(1);
    int two;
    memcpy(&two, lanes, sizeof two);
    if (offset) words = _mm256_sub_epi16(words, _mm256_slli_epi16(_mm256_set1_epi32(two), shift));
    __m256i sums = _mm256_madd_epi16(words, ones);
    if (!borrow) return sums;
    return _mm256_add_epi32(sums, _mm256_slli_epi32(_mm256_madd_epi16(_mm256_set1_epi32(two), ones), shift));
}

// Adds a group's sums to the chains of eight rows. min: NULL for types without.
INLINE __m256 add_group(__m256 acc, __m256i sums, const float *scale, const float *min, __m256 d,
                        const float *weighted) {
    acc = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_load_ps(scale), d), _mm256_cvtepi32_ps(sums), acc);
    return min ? _mm256_fmadd_ps(_mm256_load_ps(min), _mm256_broadcast_ss(weighted), acc) : acc;
}

INLINE bool type_has_min(enum dtype type) {
    return type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
}

// Block b, of 32 columns, of the types that have no larger blocks: its row sums.
INLINE __m256i small_block(enum dtype type, const uint8_t *const *rows, size_t b, const int8_t *q,
                           const int16_t *lanes) {
    const struct small_layout l = small_layout(type);
    const __m256i q0 = twice(q), q1 = twice(q + 16);
    __m256i v[4];
    for (size_t i = 0; i < 4; i++) {
        __m256i u0 = load_two(rows, i, b * l.bytes + l.low), u1 = high_nibbles(u0);
        u0 = low_nibbles(u0);
        if (l.has_fifth) {
            __m256i a = fifth_bits(rows[i] + b * l.bytes + l.fifth),
                    c = fifth_bits(rows[i + 4] + b * l.bytes + l.fifth);
            u0 = _mm256_or_si256(u0, _mm256_permute2x128_si256(a, c, 0x20));
            u1 = _mm256_or_si256(u1, _mm256_permute2x128_si256(a, c, 0x31));
        }
        v[i] = _mm256_add_epi16(_mm256_maddubs_epi16(u0, q0), _mm256_maddubs_epi16(u1, q1));
    }
    return row_sums(type, fold_pairs(fold_rows(v[0], v[1], true), fold_rows(v[2], v[3], true), true), lanes);
}

// Sixteen columns of a row of Q8_0 times as many activations: sums of two.
INLINE __m256i wide_products(const uint8_t *row, __m256i x) {
    __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)row));
    return _mm256_madd_epi16(w, x);
}

// small_block of Q8_0.
INLINE __m256i wide_block(const uint8_t *const *rows, size_t b, const int16_t *wide) {
    const struct small_layout l = small_layout(DTYPE_Q8_0);
    const size_t at = b * l.bytes + l.low;
    const __m256i in_order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    __m256i x[2], v[4];
    for (size_t i = 0; i < 2; i++)
        x[i] = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(const void *)(wide + 16 * i)), in_order);
    for (size_t i = 0; i < 4; i++) {
        __m256i p[2];
        for (size_t h = 0; h < 2; h++) {
            const uint8_t *row = rows[i + 4 * h] + at;
            p[h] = _mm256_add_epi32(wide_products(row, x[0]), wide_products(row + 16, x[1]));
        }
        v[i] =
            _mm256_add_epi32(_mm256_permute2x128_si256(p[0], p[1], 0x20), _mm256_permute2x128_si256(p[0], p[1], 0x31));
    }
    return fold_pairs(fold_rows(v[0], v[1], false), fold_rows(v[2], v[3], false), false);
}

// Blocks b and b + 1, b even, of Q4_K and Q5_K: their folded words.
INLINE void two_blocks(enum dtype type, const uint8_t *const *rows, size_t b, const int8_t *q, __m256i *words) {
    const size_t at = (type == DTYPE_Q4_K ? 16 : 48) + 16 * b;
    const __m256i q0 = twice(q), q1 = twice(q + 16), q2 = twice(q + 32), q3 = twice(q + 48);
    __m256i first[4], second[4];
    for (size_t i = 0; i < 4; i++) {
        __m256i a = load_two(rows, i, at), c = load_two(rows, i, at + 16);
        __m256i u[4] = {low_nibbles(a), low_nibbles(c), high_nibbles(a), high_nibbles(c)};
        for (size_t h = 0; type == DTYPE_Q5_K && h < 4; h++) {
            __m256i bit = _mm256_srli_epi16(load_two(rows, i, 16 + 16 * (h % 2)), (int)(b + h / 2));
            u[h] = _mm256_or_si256(u[h], _mm256_slli_epi16(_mm256_and_si256(bit, _mm256_set1_epi8(1)), 4));
        }
        first[i] = _mm256_add_epi16(_mm256_maddubs_epi16(u[0], q0), _mm256_maddubs_epi16(u[1], q1));
        second[i] = _mm256_add_epi16(_mm256_maddubs_epi16(u[2], q2), _mm256_maddubs_epi16(u[3], q3));
    }
    words[0] = fold_pairs(fold_rows(first[0], first[1], true), fold_rows(first[2], first[3], true), true);
    words[1] = fold_pairs(fold_rows(second[0], second[1], true), fold_rows(second[2], second[3], true), true);
}

// Of half a superblock of Q6_K the four groups g, g + 2, g + 4 and g + 6, g 0 or 1: their folded words.
INLINE void four_groups(const uint8_t *const *rows, size_t half, size_t g, const int8_t *q, __m256i *words) {
    const __m256i high = _mm256_set1_epi8(0x30);
    __m256i folded[2][4];
#pragma GCC unroll 2
    for (size_t p = 0; p < 2; p++) {
        __m256i v[2][4];
#pragma GCC unroll 2
        for (size_t i = 0; i < 2; i++) {
            __m256i a = load_two(rows, 2 * p + i, 64 * half + 16 * g);
            __m256i c = load_two(rows, 2 * p + i, 64 * half + 16 * g + 32);
            __m256i h = load_two(rows, 2 * p + i, 128 + 32 * half + 16 * g);
            __m256i u[4] = {
                _mm256_or_si256(low_nibbles(a), _mm256_and_si256(_mm256_slli_epi16(h, 4), high)),
                _mm256_or_si256(low_nibbles(c), _mm256_and_si256(_mm256_slli_epi16(h, 2), high)),
                _mm256_or_si256(high_nibbles(a), _mm256_and_si256(h, high)),
                _mm256_or_si256(high_nibbles(c), _mm256_and_si256(_mm256_srli_epi16(h, 2), high)),
            };
            for (size_t s = 0; s < 4; s++) v[i][s] = _mm256_maddubs_epi16(u[s], twice(q + 32 * s));
        }
        for (size_t s = 0; s < 4; s++) folded[p][s] = fold_rows(v[0][s], v[1][s], true);
    }
    for (size_t s = 0; s < 4; s++) words[s] = fold_pairs(folded[0][s], folded[1][s], true);
}

// n columns of eight rows, from k on, whose scales and minima are in rows first .. of the tile.
INLINE __m256 add_columns(enum dtype type, __m256 acc, const uint8_t *const *rows, const struct weight_tile *tile,
                          size_t first, const struct act_row *x, size_t k, size_t n, const char **next) {
    const bool has_min = type_has_min(type);
    const int8_t *q = x->q + k;
    const int16_t *lanes16 = x->lanes16 + k / ACT_GROUP * 2, *lanes32 = x->lanes32 + k / ACT_BLOCK * 2;
    const float *scale = x->scale + k / ACT_BLOCK, *weighted = x->weighted + k / ACT_BLOCK;
    if (type == DTYPE_Q6_K) {
        for (size_t half = 0; half < 2; half++) {
            __m256i words[2][4]; // group g of a half: words[g % 2][g / 2]
            for (size_t g = 0; g < 2; g++) {
                fetch_ahead(type, next);
                fetch_ahead(type, next);
                four_groups(rows, half, g, q + 128 * half + 16 * g, words[g]);
            }
#pragma GCC unroll 8
            for (size_t i = 0; i < 8; i++) {
                size_t g = 8 * half + i;
                acc = add_group(acc, row_sums(type, words[i % 2][i / 2], lanes16 + 2 * g), &tile->scale[g][first], NULL,
                                _mm256_broadcast_ss(scale + g / 2), NULL);
            }
        }
    } else if (type == DTYPE_Q4_K || type == DTYPE_Q5_K) {
#pragma GCC unroll 4
        for (size_t b = 0; b < 8; b += 2) {
            __m256i words[2];
            fetch_ahead(type, next);
            fetch_ahead(type, next);
            two_blocks(type, rows, b, q + 32 * b, words);
            for (size_t i = b; i < b + 2; i++) {
                __m256i sums = row_sums(type, words[i - b], lanes32 + 2 * i);
                acc = add_group(acc, sums, &tile->scale[i][first], &tile->min[i][first], _mm256_broadcast_ss(scale + i),
                                weighted + i);
            }
        }
    } else if (type == DTYPE_Q8_0) {
        for (size_t b = 0; b < n / 32; b++) {
            fetch_ahead(type, next);
            __m256i sums = wide_block(rows, b, x->wide + k + 32 * b);
            acc = add_group(acc, sums, &tile->scale[b][first], NULL,
                            _mm256_broadcast_ss(x->wide_scale + k / ACT_BLOCK + b), NULL);
        }
    } else {
        for (size_t b = 0; b < n / 32; b++) {
            fetch_ahead(type, next);
            __m256i sums = small_block(type, rows, b, q + 32 * b, lanes32 + 2 * b);
            acc = add_group(acc, sums, &tile->scale[b][first], has_min ? &tile->min[b][first] : NULL,
                            _mm256_broadcast_ss(scale + b), weighted + b);
        }
    }
    return acc;
}

INLINE void one_token(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows,
                      const struct act_row *x) {
    struct weight_tile tile; // its scales and minima only
    for (size_t first = 0; first < TILE_ROWS && first < n_rows; first += OCTET) {
        __m256 acc = _mm256_setzero_ps();
        const char *next = (const char *)w->data + (row + first + OCTET) * w->row_bytes;
        for (size_t k = 0; k < w->n_in; k += TILE_COLUMNS) {
            size_t n = w->n_in - k < TILE_COLUMNS ? w->n_in - k : TILE_COLUMNS;
            const uint8_t *rows[OCTET];
            rows_at(w, row, first, n_rows, k, rows);
            load_scales(type, &tile, first, rows, n);
            acc = add_columns(type, acc, rows, &tile, first, x, k, n, &next);
        }
        _mm256_storeu_ps(out + first, acc);
    }
}

// ---- Octets -------------------------------------------------------------------------------------------------------
// R octets at once, 1 or 2: two share broadcasts, where the sums of two fit in the registers.

// Adds four columns of R octets, register i of a step's word, to the sums of their group.
INLINE void add_four(__m256i *sum, const __m256i *u, const int8_t *q, bool first, const size_t R) {
    const __m256i four = broadcast_4(q);
    for (size_t o = 0; o < R; o++) {
        __m256i p = _mm256_maddubs_epi16(u[o], four);
        if (first) sum[o] = p;
        else add_words(&sum[o], p);
    }
}

// The same of Q8_0, whose columns 0 and 2 lie in the low bytes of 16-bit numbers, 1 and 3 in the high ones.
INLINE void add_four_wide(__m256i *sum, const __m256i *u, const int16_t *x, bool first, const size_t R) {
    const __m256i low = broadcast_4(x), high = broadcast_4(x + 2);
    for (size_t o = 0; o < R; o++) {
        __m256i p = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(u[o], 8), 8), low);
        if (first) sum[o] = p;
        else add_dwords(&sum[o], p);
        add_dwords(&sum[o], _mm256_madd_epi16(_mm256_srai_epi16(u[o], 8), high));
    }
}

// Step i of the blocks at `block` and `stride` bytes on, whose scales and minima are in the tile from `group` on;
// column: of x.
INLINE void add_step(enum dtype type, __m256 *acc, const struct weight_tile *tile, size_t group, const uint8_t *block,
                     size_t stride, size_t i, const struct act_row *x, size_t column, const size_t R) {
    const struct octet_step s = octet_step(type);
    const bool in_16 = type == DTYPE_Q6_K, apart = has_superblocks(type);
    const size_t words_of_group = in_16 ? 4 : s.words, len = in_16 ? 16 : 32;
    const int16_t *lanes = in_16 ? x->lanes16 + column / 8 : x->lanes32 + column / 16;
    __m256i sum[4][2], ended[8][2]; // a chain takes its groups in ascending order, Q6_K's do not end so
#pragma GCC unroll 8
    for (size_t j = 0; j < s.words; j++) {
        __m256i u[2][4], pair[2];
        for (size_t o = 0; o < R; o++) octet_integers(type, block + o * stride, i, j, u[o]);
        for (size_t k = 0; k < s.out; k++) {
            for (size_t o = 0; o < R; o++) pair[o] = u[o][k];
            const size_t at = column + octet_column(type, k, j);
            const bool first = apart ? j % words_of_group == 0 : j == 0 && k == 0;
            if (type == DTYPE_Q8_0) add_four_wide(sum[0], pair, x->wide + at, first, R);
            else add_four(sum[apart ? k : 0], pair, x->q + at, first, R);
        }
        for (size_t k = 0; in_16 && j % 4 == 3 && k < 4; k++)
            for (size_t o = 0; o < R; o++)
                ended[2 * k + j / 4][o] = row_sums(type, sum[k][o], lanes + 2 * (2 * k + j / 4));
    }
    for (size_t g = 0; g < s.columns / len; g++) {
        const size_t b = (column + len * g) / ACT_BLOCK;
        const __m256 d = _mm256_broadcast_ss((type == DTYPE_Q8_0 ? x->wide_scale : x->scale) + b);
        for (size_t o = 0; o < R; o++) {
            __m256i sums = in_16                ? ended[g][o]
                           : type == DTYPE_Q8_0 ? sum[g][o]
                                                : row_sums(type, sum[g][o], lanes + 2 * g);
            acc[o] = add_group(acc[o], sums, &tile->scale[group + g][OCTET * o],
                               type_has_min(type) ? &tile->min[group + g][OCTET * o] : NULL, d, x->weighted + b);
        }
    }
}

// out: [OCTET * R]
INLINE void octets(enum dtype type, float *out, const struct matrix *w, size_t row, const struct act_row *x,
                   const size_t R) {
    const struct octet_step s = octet_step(type);
    const size_t len = s.columns * s.steps, bytes = octet_block_bytes(type), stride = OCTET * w->row_bytes;
    const size_t groups = type == DTYPE_Q6_K ? 8 : s.columns / ACT_BLOCK;
    const uint8_t *block = w->octets + row * w->row_bytes;
    const char *next = (const char *)block + R * stride;
    struct weight_tile tile; // its scales and minima only
    __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t k = 0; k < w->n_in; k += len, block += bytes) {
        for (size_t o = 0; o < R; o++) octet_scales(type, &tile, 0, OCTET * o, block + o * stride);
        for (size_t i = 0; i < s.steps; i++) {
            for (size_t b = 0; b < R * s.columns / ACT_BLOCK; b++) fetch_ahead(type, &next);
            add_step(type, acc, &tile, groups * i, block, stride, i, x, k + s.columns * i, R);
        }
    }
    for (size_t o = 0; o < R; o++) _mm256_storeu_ps(out + OCTET * o, acc[o]);
}

// A whole tile. out: [TILE_ROWS]
INLINE void one_token_octets(enum dtype type, float *out, const struct matrix *w, size_t row, const struct act_row *x) {
    const size_t R = type == DTYPE_Q5_K || type == DTYPE_Q6_K ? 1 : 2;
    for (size_t first = 0; first < TILE_ROWS; first += OCTET * R) octets(type, out + first, w, row + first, x, R);
}

#define ONE(name, type)                                                                                                \
    static __attribute__((noinline)) void name(float *out, const struct matrix *w, size_t row, size_t n_rows,          \
                                               const struct act_row *x) {                                              \
        if (w->octets && n_rows == TILE_ROWS) one_token_octets(type, out, w, row, x);                                  \
        else one_token(type, out, w, row, n_rows, x);                                                                  \
    }
ONE(one_q8_0, DTYPE_Q8_0)
ONE(one_q4_0, DTYPE_Q4_0)
ONE(one_q4_1, DTYPE_Q4_1)
ONE(one_q5_0, DTYPE_Q5_0)
ONE(one_q5_1, DTYPE_Q5_1)
ONE(one_q4_k, DTYPE_Q4_K)
ONE(one_q5_k, DTYPE_Q5_K)
ONE(one_q6_k, DTYPE_Q6_K)
#undef ONE

bool avx2_one_token(float *out, const struct matrix *w, size_t row, size_t n_rows, const struct act_row *x) {
    switch (w->type) {
    case DTYPE_Q8_0: one_q8_0(out, w, row, n_rows, x); return true;
    case DTYPE_Q4_0: one_q4_0(out, w, row, n_rows, x); return true;
    case DTYPE_Q4_1: one_q4_1(out, w, row, n_rows, x); return true;
    case DTYPE_Q5_0: one_q5_0(out, w, row, n_rows, x); return true;
    case DTYPE_Q5_1: one_q5_1(out, w, row, n_rows, x); return true;
    case DTYPE_Q4_K: one_q4_k(out, w, row, n_rows, x); return true;
    case DTYPE_Q5_K: one_q5_k(out, w, row, n_rows, x); return true;
    case DTYPE_Q6_K: one_q6_k(out, w, row, n_rows, x); return true;
    default: return false;
    }
}

#endif
