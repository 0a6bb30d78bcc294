// octets.h: tiles from rows that stand in octets (format/octets.h): nothing is transposed, a register of the octet
// holds the same columns of eight rows already. Files under avx2/ and avx512/ include it.
#ifndef TANDEM_OPS_CPU_AVX2_OCTETS_H
#define TANDEM_OPS_CPU_AVX2_OCTETS_H

#include "ops/cpu/avx2/unpack.h"

// Types whose blocks have 256 elements.
INLINE bool has_superblocks(enum dtype type) {
    return type == DTYPE_Q4_K || type == DTYPE_Q5_K || type == DTYPE_Q6_K;
}

// Elements of the blocks that a step takes, all the columns that share its words, and how many steps a block has, how
// many registers of words, and how many registers of four columns come out of one.
struct octet_step {
    size_t columns, steps, words, out;
};

INLINE struct octet_step octet_step(enum dtype type) {
    if (type == DTYPE_Q8_0) return (struct octet_step){32, 1, 8, 1};
    if (type == DTYPE_Q6_K) return (struct octet_step){128, 2, 8, 4};
    if (has_superblocks(type)) return (struct octet_step){64, 4, 8, 2};
    return (struct octet_step){32, 1, 4, 2};
}

// Bytes of eight rows' block.
INLINE size_t octet_block_bytes(enum dtype type) {
    return type == DTYPE_Q6_K ? 1680 : has_superblocks(type) ? 8 * 8 * bytes_of_32(type) : 8 * bytes_of_32(type);
}

INLINE __m256i octet_word(const uint8_t *block, size_t at) {
    return _mm256_loadu_si256((const __m256i *)(const void *)(block + at));
}

// Bit 4 of each byte from four bits of each word, `shift` and the next three.
INLINE __m256i octet_fifth(__m256i bits, size_t shift) {
    const __m256i which = _mm256_set1_epi32((int)(shift / 8 * 0x01010101u));
    const __m256i in_lanes = _mm256_add_epi8(
        which, _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C, 0, 0x04040404, 0x08080808, 0x0C0C0C0C));
    const __m256i one = _mm256_set1_epi32(shift % 8 ? (int)0x80402010 : 0x08040201);
    __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(bits, in_lanes), one);
    return _mm256_and_si256(_mm256_cmpeq_epi8(bytes, one), _mm256_set1_epi8(16));
}

// Word j of a step: the integers of four columns in each of `out` registers, unsigned as in a tile. Register i's first
// column, counted from the step's: octet_column.
INLINE void octet_integers(enum dtype type, const uint8_t *block, size_t step, size_t j, __m256i *u) {
    const __m256i nibble = _mm256_set1_epi8(15), high = _mm256_set1_epi8(0x30);
    const struct small_layout l = small_layout(type);
    if (type == DTYPE_Q6_K) {
        __m256i a = octet_word(block, 32 * (16 * step + j)), c = octet_word(block, 32 * (16 * step + 8 + j));
        __m256i h = octet_word(block, 32 * (32 + 8 * step + j));
        u[0] = _mm256_or_si256(_mm256_and_si256(a, nibble), _mm256_and_si256(_mm256_slli_epi16(h, 4), high));
        u[1] = _mm256_or_si256(_mm256_and_si256(c, nibble), _mm256_and_si256(_mm256_slli_epi16(h, 2), high));
        u[2] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(a, 4), nibble), _mm256_and_si256(h, high));
        u[3] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(c, 4), nibble),
                               _mm256_and_si256(_mm256_srli_epi16(h, 2), high));
        return;
    }
    if (type == DTYPE_Q8_0) {
        u[0] = octet_word(block, 16 + 32 * j);
        return;
    }
    const size_t before = l.has_min ? 32u : 16u; // halves
    const size_t first = type == DTYPE_Q4_K   ? 32 * (4 + 8 * step)
                         : type == DTYPE_Q5_K ? 32 * (12 + 8 * step)
                         : l.has_fifth        ? before + 32
                                              : before;
    __m256i v = octet_word(block, first + 32 * j);
    u[0] = _mm256_and_si256(v, nibble);
    u[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    if (type == DTYPE_Q5_K) {
        __m256i bits = octet_word(block, 32 * (4 + j)), bit = _mm256_set1_epi8(16); // bit b of a byte: block b's
        bits = _mm256_srl_epi16(bits, _mm_cvtsi32_si128((int)(2 * step)));
        u[0] = _mm256_or_si256(u[0], _mm256_and_si256(_mm256_slli_epi16(bits, 4), bit));
        u[1] = _mm256_or_si256(u[1], _mm256_and_si256(_mm256_slli_epi16(bits, 3), bit));
    } else if (l.has_fifth) {
        __m256i bits = octet_word(block, before);
        u[0] = _mm256_or_si256(u[0], octet_fifth(bits, 4 * j));
        u[1] = _mm256_or_si256(u[1], octet_fifth(bits, 16 + 4 * j));
    }
}

INLINE size_t octet_column(enum dtype type, size_t i, size_t j) {
    return (has_superblocks(type) ? 32 : 16) * i + 4 * j;
}

INLINE __m256 octet_halves(const uint8_t *at) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)at));
}

// The scales and minima of one block, groups from `group` on of the tile.
INLINE void octet_scales(enum dtype type, struct weight_tile *tile, size_t group, size_t first, const uint8_t *block) {
    __m256i v[4];
    if (type == DTYPE_Q4_K || type == DTYPE_Q5_K) {
        for (size_t i = 0; i < 4; i++) v[i] = octet_word(block, 32 * i);
        scales_mins(tile, first, v);
    } else if (type == DTYPE_Q6_K) {
        __m256 d = octet_halves(block + 1664);
        for (size_t i = 0; i < 4; i++) v[i] = octet_word(block, 32 * (48 + i));
        scales_q6_k(tile, first, d, v);
    } else {
        _mm256_store_ps(&tile->scale[group][first], octet_halves(block));
        if (small_layout(type).has_min) _mm256_store_ps(&tile->min[group][first], octet_halves(block + 16));
    }
}

// unpack_tile of a whole tile of octets.
INLINE void unpack_octets(enum dtype type, struct weight_tile *tile, const struct matrix *w, size_t row, size_t k,
                          size_t n, const char **next) {
    const struct octet_step s = octet_step(type);
    const size_t len = s.columns * s.steps, bytes = octet_block_bytes(type);
    for (size_t first = 0; first < TILE_ROWS; first += OCTET) {
        const uint8_t *block = w->octets + (row + first) * w->row_bytes + k / len * bytes;
        for (size_t column = 0; column < n; column += len, block += bytes) {
            octet_scales(type, tile, column / ACT_BLOCK, first, block);
            for (size_t i = 0; i < s.steps; i++) {
                for (size_t b = 0; next && b < s.columns / ACT_BLOCK; b++) fetch_ahead(type, next);
#pragma GCC unroll 8
                for (size_t j = 0; j < s.words; j++) {
                    __m256i u[4];
                    octet_integers(type, block, i, j, u);
                    for (size_t o = 0; o < s.out; o++)
                        put_columns(tile, column + s.columns * i + octet_column(type, o, j), first, u[o]);
                }
            }
        }
    }
}

// Columns k .. k + n of a tile, wherever its rows stand. next: as in fetch_ahead, from next_tile, or NULL.
INLINE void make_tile(enum dtype type, struct weight_tile *tile, const struct matrix *w, size_t row, size_t n_rows,
                      size_t k, size_t n, const char **next) {
    if (w->octets && n_rows == TILE_ROWS && type != DTYPE_Q2_K && type != DTYPE_Q3_K)
        unpack_octets(type, tile, w, row, k, n, next);
    else unpack_tile(type, tile, w, row, n_rows, k, n, next);
}

INLINE const char *next_tile(const struct matrix *w, size_t row) {
    const uint8_t *data = w->octets ? w->octets : w->data;
    return (const char *)data + (row + TILE_ROWS) * w->row_bytes;
}

#endif
