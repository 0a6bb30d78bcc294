// quantised.c: qdot (ops.h) in AVX2, and the rounding of activations to integers.
//
// A tile of sixteen rows and 256 columns is unpacked into L1 (unpack.h) and meets the tokens four by four. Lanes are
// rows, so each lane's chain of fmas is the one that ops.h states. vpmaddubsw multiplies unsigned weights with signed
// activations and adds pairs in 16 bits; how many of its results fit in 16 bits before they must be widened depends on
// the type. Q8_0's weights are widened to meet its activations of 13 bits in vpmaddwd. It needs nothing unpacked where
// rows stand in octets. The next tile's rows are fetched while this one is multiplied.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "ops/cpu/avx2/kernels.h"
#include "ops/cpu/avx2/octets.h"
#include "ops/cpu/avx2/vec.h"

enum {
    MAX_N = AVX2_BESIDE,  // tokens at a time
    OCTET_COLUMNS = 1024, // columns that all tokens meet before the next ones, where nothing is unpacked: 16 KiB
};

// ---- Activations --------------------------------------------------------------------------------------------------

// A block's q and all that follows from it alone.
static void put_bytes(const struct act_row *row, size_t b, __m256i q) {
    const size_t apart = row->apart;
    char fours[ACT_BLOCK];
    _mm256_storeu_si256((__m256i *)(void *)fours, q);
    for (size_t i = 0; i < ACT_BLOCK; i += 4) memcpy(row->q + (b * ACT_BLOCK + i) * apart, fours + i, 4);
    __m256i lanes = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q); // 32-bit lane: i % 4 < 2, and the others
    lanes = _mm256_add_epi16(lanes, _mm256_shuffle_epi32(lanes, 0x4E));
    lanes = _mm256_add_epi16(lanes, _mm256_shuffle_epi32(lanes, 0xB1));
    __m128i first = _mm256_castsi256_si128(lanes), second = _mm256_extracti128_si256(lanes, 1);
    _mm_storeu_si32(row->lanes16 + 4 * b * apart, first);
    _mm_storeu_si32(row->lanes16 + (4 * b + 2) * apart, second);
    _mm_storeu_si32(row->lanes32 + 2 * b * apart, _mm_add_epi16(first, second));
    __m128i sums = _mm_madd_epi16(_mm_unpacklo_epi32(first, second), _mm_set1_epi16(1));
    _mm_storeu_si32(row->sum + 2 * b * apart, _mm_packs_epi32(sums, sums));
}

// The largest magnitude of 32.
INLINE float largest_of(const __m256 v[4]) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i m = _mm256_setzero_si256();
    for (size_t i = 0; i < 4; i++) m = _mm256_max_epu32(m, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
    __m128i m4 = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    m4 = _mm_max_epu32(m4, _mm_shuffle_epi32(m4, 0x4E));
    m4 = _mm_max_epu32(m4, _mm_shuffle_epi32(m4, 0xB1));
    return float_from_bits((uint32_t)_mm_cvtsi128_si32(m4));
}

// The integers of 32, sixteen in a register: of its halves the first has elements 0 to 3 and 8 to 11.
INLINE void round_words(__m256i words[2], const __m256 v[4], float inverse) {
    const __m256 by = _mm256_set1_ps(inverse);
    __m256i q[4];
    for (size_t i = 0; i < 4; i++) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], by));
    for (size_t i = 0; i < 2; i++) words[i] = _mm256_packs_epi32(q[2 * i], q[2 * i + 1]);
}

// act_block and its sums.
static void round_block(const struct act_row *row, size_t b, const __m256 v[4], float largest) {
    const size_t at = b * row->apart;
    float inverse = act_inverse(largest, ACT_MOST, &row->scale[at]);
    __m256i words[2], bytes = _mm256_setzero_si256();
    if (inverse > 0) {
        round_words(words, v, inverse);
        bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]),
                                            _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
    put_bytes(row, b, bytes);
    int first = row->sum[2 * at], second = row->sum[2 * at + 1];
    row->weighted[at] = row->scale[at] * (float)(first + second);
    row->less[at] = -8 * (first + second);
}

// act_wide_block, each four dealt out.
static void round_wide(const struct act_row *row, size_t b, const __m256 v[4], float largest) {
    const __m256i dealt =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    float inverse = act_inverse(largest, ACT_MOST_WIDE, &row->wide_scale[b * row->apart]);
    __m256i words[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    if (inverse > 0) round_words(words, v, inverse);
    for (size_t i = 0; i < 2; i++) {
        words[i] = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(words[i], 0xD8), dealt);
        int16_t *to = row->wide + (b * ACT_BLOCK + 16 * i) * row->apart;
        if (row->apart == 1) {
            _mm256_storeu_si256((__m256i *)(void *)to, words[i]);
            continue;
        }
        __m128i half[2] = {_mm256_castsi256_si128(words[i]), _mm256_extracti128_si256(words[i], 1)};
        for (size_t f = 0; f < 4; f++, to += 4 * row->apart)
            _mm_storeu_si64(to, f % 2 ? _mm_unpackhi_epi64(half[f / 2], half[f / 2]) : half[f / 2]);
    }
}

void avx2_round_row(struct act_row *row, const float *x, size_t n, bool bytes, bool wide) {
    for (size_t b = 0; b < n / ACT_BLOCK; b++) {
        __m256 v[4];
        for (size_t i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(x + b * ACT_BLOCK + 8 * i);
        float largest = largest_of(v);
        if (bytes) round_block(row, b, v, largest);
        if (wide) round_wide(row, b, v, largest);
    }
}

// ---- Products -----------------------------------------------------------------------------------------------------

INLINE __m256i load_8(const void *p) {
    return _mm256_load_si256((const __m256i *)p);
}

// Integer sums of 32 columns of Q8_0: sum[octet][token]. Octet o's four columns i are at w + o * octet + i * step: 0
// and 2 in the low bytes of 16-bit numbers, 1 and 3 in the high ones.
INLINE void wide_sums(const uint8_t *w, size_t octet, size_t step, size_t g, const struct act_tile *x,
                      __m256i (*sum)[MAX_N], const size_t N) {
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; i++) {
        __m256i low[2], high[2];
        for (size_t o = 0; o < 2; o++) {
            __m256i v = load_32(w + o * octet + i * step);
            low[o] = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
            high[o] = _mm256_srai_epi16(v, 8);
        }
        for (size_t t = 0; t < N; t++) {
            const int16_t *four = x->wide + (32 * g + 4 * i) * N + 4 * t;
            __m256i first = broadcast_4(four), second = broadcast_4(four + 2);
            for (size_t o = 0; o < 2; o++) {
                __m256i p = _mm256_madd_epi16(low[o], first);
                if (i == 0) sum[o][t] = p;
                else add_dwords(&sum[o][t], p);
                add_dwords(&sum[o][t], _mm256_madd_epi16(high[o], second));
            }
        }
    }
}

// The same of any other type, `len` columns. Its integers are unsigned in the tile. Sums of signed ones (u - offset)
// fit in a 16-bit lane: they are at most 16 * 127 * 16 (5 bits, 32 columns) or 8 * 127 * 32 (6 bits, 16 columns), and
// what overflows on the way there comes back. So are those of unsigned 4 bits; of 5 bits, only half a group's.
INLINE void narrow_sums(enum dtype type, const struct weight_tile *tile, size_t g, size_t len, const struct act_tile *x,
                        __m256i (*sum)[MAX_N], const size_t N) {
    const int shift = unpack_offset(type) ? __builtin_ctz((unsigned)unpack_offset(type)) : 0;
    const size_t steps = type == DTYPE_Q5_1 || type == DTYPE_Q5_K ? 4 : len / 4;
    const int16_t *lanes = (len == 32 ? x->lanes32 : x->lanes16) + 2 * g * N;
    for (size_t j = 0; j < len / 4; j += steps) {
        __m256i pairs[2][MAX_N];
#pragma GCC unroll 8
        for (size_t i = 0; i < steps; i++) {
            const uint8_t(*at)[4] = tile->q[g * len / 4 + j + i];
            __m256i w[2] = {load_8(at), load_8(at + OCTET)};
            for (size_t t = 0; t < N; t++) {
                __m256i four = broadcast_4(x->q + (g * len + 4 * (j + i)) * N + 4 * t);
                __m256i less = i == 0 && shift ? _mm256_slli_epi16(broadcast_4(lanes + 2 * t), shift) : four;
                for (size_t o = 0; o < 2; o++) {
                    __m256i p = _mm256_maddubs_epi16(w[o], four);
                    if (i == 0) pairs[o][t] = shift ? _mm256_sub_epi16(p, less) : p;
                    else add_words(&pairs[o][t], p);
                }
            }
        }
        for (size_t o = 0; o < 2; o++) {
            for (size_t t = 0; t < N; t++) {
                __m256i s = _mm256_madd_epi16(pairs[o][t], _mm256_set1_epi16(1));
                sum[o][t] = j == 0 ? s : _mm256_add_epi32(sum[o][t], s);
            }
        }
    }
}

// Where a tile's weights are multiplied from: unpacked, or Q8_0's two octets as they stand. `next` of what comes behind
// them is fetched meanwhile, one or two octets' share.
struct source {
    const struct weight_tile *tile; // NULL: octets
    const uint8_t *octets;
    size_t apart; // bytes from the first octet to the second
    const char *next;
    size_t n_fetched; // octets
};

// Adds n columns to the chains of N tokens, which stay in memory: the integer sums need the registers. out: [N,
// TILE_ROWS]
INLINE void add_tile(enum dtype type, float *out, struct source *w, const struct act_tile *x, size_t n,
                     const bool packed, const size_t N) {
    const bool has_min =
        type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q2_K || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
    const size_t len = type == DTYPE_Q2_K || type == DTYPE_Q3_K || type == DTYPE_Q6_K ? 16 : 32;
    const struct weight_tile *tile = w->tile;
    const uint8_t *at = w->octets;
    for (size_t g = 0; g < n / len; g++, at += octet_block_bytes(DTYPE_Q8_0)) {
        const size_t block = g * len / ACT_BLOCK;
        __m256i sum[2][MAX_N];
        if (len == ACT_BLOCK || g % 2 == 0)
            for (size_t o = 0; o < w->n_fetched; o++) fetch_ahead(type, &w->next);
        __asm__ volatile("" ::: "memory"); // gcc would keep the chains in registers and put the sums aside
        if (packed) wide_sums(at + 16, w->apart, 32, g, x, sum, N);
        else if (type == DTYPE_Q8_0) wide_sums(tile->q[8 * g][0], 32, 64, g, x, sum, N);
        else narrow_sums(type, tile, g, len, x, sum, N);
        __m256 factor[2];
        for (size_t o = 0; o < 2; o++)
            factor[o] = packed ? octet_halves(at + o * w->apart) : _mm256_load_ps(&tile->scale[g][OCTET * o]);
        for (size_t t = 0; t < N; t++) {
            const float *scales = type == DTYPE_Q8_0 ? x->wide_scale : x->scale;
            __m256 d = _mm256_broadcast_ss(scales + block * N + t), weighted = d;
            if (has_min && len == 32) weighted = _mm256_broadcast_ss(x->weighted + block * N + t);
            if (has_min && len == 16) {
                __m256i total = broadcast_4(x->lanes16 + 2 * (g * N + t));
                total = _mm256_madd_epi16(total, _mm256_set1_epi16(1));
                weighted = _mm256_mul_ps(d, _mm256_cvtepi32_ps(total));
            }
            for (size_t o = 0; o < 2; o++) {
                float *to = out + t * TILE_ROWS + OCTET * o;
                __m256 scale = _mm256_mul_ps(factor[o], d);
                __m256 acc = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum[o][t]), _mm256_loadu_ps(to));
                if (has_min) acc = _mm256_fmadd_ps(_mm256_load_ps(&tile->min[g][OCTET * o]), weighted, acc);
                _mm256_storeu_ps(to, acc);
            }
        }
    }
}

// All tokens meet n columns, from k on.
INLINE void all_tokens(enum dtype type, float *out, struct source *w, const float *x, size_t n_in, size_t n_tokens,
                       size_t k, size_t n, const bool packed) {
    for (size_t t = 0, N; t < n_tokens; t += N, out += N * TILE_ROWS) {
        const struct act_tile tokens = act_tile_at(x, n_in, t, n_tokens, k, MAX_N);
        N = n_tokens - t < MAX_N ? n_tokens - t : MAX_N;
        w->n_fetched = t > MAX_N ? 0 : n_tokens <= MAX_N ? 2 : 1; // the first eight tokens share the fetching
        switch (N) {
        case 1: add_tile(type, out, w, &tokens, n, packed, 1); break;
        case 2: add_tile(type, out, w, &tokens, n, packed, 2); break;
        case 3: add_tile(type, out, w, &tokens, n, packed, 3); break;
        default: add_tile(type, out, w, &tokens, n, packed, MAX_N); break;
        }
    }
}

INLINE void quantised(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                      size_t n_tokens, const bool packed) {
    const size_t columns = packed ? OCTET_COLUMNS : TILE_COLUMNS;
    struct weight_tile tile;
    struct source from = {.tile = packed ? NULL : &tile, .apart = OCTET * w->row_bytes, .next = next_tile(w, row)};
    memset(out, 0, n_tokens * TILE_ROWS * sizeof *out);
    for (size_t k = 0; k < w->n_in; k += columns) {
        size_t n = w->n_in - k < columns ? w->n_in - k : columns;
        if (packed) from.octets = w->octets + row * w->row_bytes + k / ACT_BLOCK * octet_block_bytes(type);
        else make_tile(type, &tile, w, row, n_rows, k, n, NULL);
        all_tokens(type, out, &from, x, w->n_in, n_tokens, k, n, packed);
    }
}

void avx2_quantised(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    struct act_row token = act_row_at((float *)(uintptr_t)x, w->n_in, 0);
    if (n_tokens == 1 && avx2_one_token(out, w, row, n_rows, &token)) return;
    if (w->type == DTYPE_Q8_0 && w->octets && n_rows == TILE_ROWS) {
        quantised(DTYPE_Q8_0, out, w, row, n_rows, x, n_tokens, true);
        return;
    }
    switch (w->type) {
#define CASE(type)                                                                                                     \
    case type: quantised(type, out, w, row, n_rows, x, n_tokens, false); break;
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
