// unpack.h: quantised weights as tiles: sixteen rows, some columns, four consecutive elements of a row side by side and
// the sixteen rows behind one another, so that a register's 32-bit lanes are rows. Elements are unsigned (`offset` is
// added to those of signed types; Q8_0's stay signed). Files under avx2/ and avx512/ include it.
#ifndef TANDEM_OPS_CPU_AVX2_UNPACK_H
#define TANDEM_OPS_CPU_AVX2_UNPACK_H

#include "format/groups.h"
#include "ops/cpu/avx2/kernels.h"
#include "ops/cpu/avx2/vec.h"

enum { TILE_COLUMNS = 256, OCTET = 8, TILE_GROUPS = TILE_COLUMNS / ACT_GROUP };

struct weight_tile {
    uint8_t q[TILE_COLUMNS / 4][TILE_ROWS][4];
    float scale[TILE_GROUPS][TILE_ROWS], min[TILE_GROUPS][TILE_ROWS];
} __attribute__((aligned(64)));

// What is added to the type's integers to make them unsigned.
INLINE int unpack_offset(enum dtype type) {
    return type == DTYPE_Q4_0 ? 8 : type == DTYPE_Q5_0 ? 16 : type == DTYPE_Q6_K ? 32 : type == DTYPE_Q3_K ? 4 : 0;
}

INLINE __m256i load_32(const uint8_t *p) {
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

// Eight rows of eight 32-bit values to eight columns.
INLINE void transpose_8(const __m256i *v, __m256i *out) {
    __m256i a[8], b[8];
    for (size_t i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (size_t i = 0; i < 2; i++) {
        b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (size_t i = 0; i < 4; i++) {
        out[i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
        out[4 + i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
    }
}

// Four columns of eight rows to their place: from `column` on, rows `first` ...
INLINE void put_columns(struct weight_tile *tile, size_t column, size_t first, __m256i v) {
    _mm256_store_si256((__m256i *)(void *)tile->q[column / 4][first], v);
}

// 32 elements of each of eight rows to their place: columns `column` .. column + 32, rows `first` ...
INLINE void put_block(struct weight_tile *tile, size_t column, size_t first, const __m256i *v) {
    __m256i out[OCTET];
    transpose_8(v, out);
    for (size_t j = 0; j < OCTET; j++) put_columns(tile, column + 4 * j, first, out[j]);
}

// Sixteen bytes of rows i and i + 4, `at` bytes from where they point.
INLINE __m256i load_two(const uint8_t *const *rows, size_t i, size_t at) {
    __m128i low = _mm_loadu_si128((const __m128i *)(const void *)(rows[i] + at));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   _mm_loadu_si128((const __m128i *)(const void *)(rows[i + 4] + at)), 1);
}

// Four 32-bit values of each of eight rows, rows[r] + at, as four registers with row r in lane r.
INLINE void four_columns(const uint8_t *const *rows, size_t at, __m256i *out) {
    __m256i v[4], a[4];
    for (size_t i = 0; i < 4; i++) v[i] = load_two(rows, i, at);
    for (size_t i = 0; i < 2; i++) {
        a[i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 + i] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (size_t i = 0; i < 2; i++) {
        out[2 * i] = _mm256_unpacklo_epi64(a[2 * i], a[2 * i + 1]);
        out[2 * i + 1] = _mm256_unpackhi_epi64(a[2 * i], a[2 * i + 1]);
    }
}

INLINE int half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return (short)h;
}

// The f16 at p[r] + at of eight rows.
INLINE __m256 halves(const uint8_t *const *p, size_t at) {
    __m128i v = _mm_cvtsi32_si128(half_at(p[0] + at));
    v = _mm_insert_epi16(v, half_at(p[1] + at), 1);
    v = _mm_insert_epi16(v, half_at(p[2] + at), 2);
    v = _mm_insert_epi16(v, half_at(p[3] + at), 3);
    v = _mm_insert_epi16(v, half_at(p[4] + at), 4);
    v = _mm_insert_epi16(v, half_at(p[5] + at), 5);
    v = _mm_insert_epi16(v, half_at(p[6] + at), 6);
    v = _mm_insert_epi16(v, half_at(p[7] + at), 7);
    return _mm256_cvtph_ps(v);
}

// 32 nibbles of 16 bytes: the low ones, then the high ones.
INLINE __m256i nibbles_32(const uint8_t *p) {
    __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p));
    v = _mm256_srlv_epi32(v, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    return _mm256_and_si256(v, _mm256_set1_epi8(15));
}

// 16 where a bit of the 32 is set, else 0.
INLINE __m256i fifth_bits(const uint8_t *p) {
    int bits;
    memcpy(&bits, p, sizeof bits);
    const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i one = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), which);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, one), one), _mm256_set1_epi8(16));
}

// The types with blocks of 32 elements: bytes of a block, and where its parts stand.
struct small_layout {
    size_t bytes, fifth, low;
    bool has_min, has_fifth;
};

INLINE struct small_layout small_layout(enum dtype type) {
    const bool has_min = type == DTYPE_Q4_1 || type == DTYPE_Q5_1, has_fifth = type == DTYPE_Q5_0 || type == DTYPE_Q5_1;
    const size_t fifth = has_min ? 4 : 2, low = fifth + (has_fifth ? 4 : 0);
    return (struct small_layout){low + (type == DTYPE_Q8_0 ? 32 : 16), fifth, low, has_min, has_fifth};
}

// The 32 elements of block b (counted from where the rows point) of eight rows. Not for Q2_K and Q3_K.
INLINE void load_block(enum dtype type, const uint8_t *const *rows, size_t b, __m256i *v) {
    const __m256i nibble = _mm256_set1_epi8(15);
    if (type == DTYPE_Q4_K || type == DTYPE_Q5_K) {
        const size_t q = type == DTYPE_Q4_K ? 16 : 48;
        for (size_t r = 0; r < OCTET; r++) {
            v[r] = load_32(rows[r] + q + 32 * (b / 2));
            v[r] = _mm256_and_si256(b % 2 ? _mm256_srli_epi16(v[r], 4) : v[r], nibble);
            if (type == DTYPE_Q4_K) continue;
            __m256i high = _mm256_srli_epi16(load_32(rows[r] + 16), (int)b);
            high = _mm256_and_si256(high, _mm256_set1_epi8(1));
            v[r] = _mm256_or_si256(v[r], _mm256_slli_epi16(high, 4));
        }
    } else if (type == DTYPE_Q6_K) {
        const size_t half = b / 4, s = b % 4;
        for (size_t r = 0; r < OCTET; r++) {
            v[r] = load_32(rows[r] + 64 * half + 32 * (s % 2));
            v[r] = _mm256_and_si256(s / 2 ? _mm256_srli_epi16(v[r], 4) : v[r], nibble);
            __m256i high = load_32(rows[r] + 128 + 32 * half); // its bits 2 s to bits 4, 5
            high = s < 2 ? _mm256_slli_epi16(high, (int)(4 - 2 * s)) : _mm256_srli_epi16(high, (int)(2 * s - 4));
            v[r] = _mm256_or_si256(v[r], _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
        }
    } else {
        const struct small_layout l = small_layout(type);
        for (size_t r = 0; r < OCTET; r++) {
            const uint8_t *at = rows[r] + b * l.bytes;
            v[r] = type == DTYPE_Q8_0 ? load_32(at + l.low) : nibbles_32(at + l.low);
            if (l.has_fifth) v[r] = _mm256_or_si256(v[r], fifth_bits(at + l.fifth));
        }
    }
}

// Byte i of each lane, 0 to 127, as f32.
INLINE __m256 byte_to_f32(__m256i v, int i) {
    v = _mm256_srli_epi32(v, 8 * i);
    return _mm256_cvtepi32_ps(i == 3 ? v : _mm256_and_si256(v, _mm256_set1_epi32(255)));
}

INLINE __m256 signed_byte_to_f32(__m256i v, int i) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * i), 24));
}

// The eight 6-bit scales and minima of Q4_K and Q5_K (layout: format/quant.c), times d and -dmin. v: of eight rows d
// and dmin, then the 12 bytes.
INLINE void scales_mins(struct weight_tile *tile, size_t first, const __m256i *v) {
    const __m256i six = _mm256_set1_epi8(0x3F), four = _mm256_set1_epi8(0x0F), two = _mm256_set1_epi8(0x30);
    __m256i scale[2], min[2];
    scale[0] = _mm256_and_si256(v[1], six);
    min[0] = _mm256_and_si256(v[2], six);
    scale[1] = _mm256_or_si256(_mm256_and_si256(v[3], four), _mm256_and_si256(_mm256_srli_epi16(v[1], 2), two));
    min[1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(v[3], 4), four),
                             _mm256_and_si256(_mm256_srli_epi16(v[2], 2), two));
    __m256i halves =
        _mm256_packus_epi32(_mm256_and_si256(v[0], _mm256_set1_epi32(0xFFFF)), _mm256_srli_epi32(v[0], 16));
    halves = _mm256_permute4x64_epi64(halves, 0xD8);
    __m256 d = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    __m256 minus = _mm256_xor_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)), _mm256_set1_ps(-0.0f));
    for (int g = 0; g < 8; g++) {
        _mm256_store_ps(&tile->scale[g][first], _mm256_mul_ps(d, byte_to_f32(scale[g / 4], g % 4)));
        _mm256_store_ps(&tile->min[g][first], _mm256_mul_ps(minus, byte_to_f32(min[g / 4], g % 4)));
    }
}

// Those of Q6_K: v: of eight rows the 16 bytes.
INLINE void scales_q6_k(struct weight_tile *tile, size_t first, __m256 d, const __m256i *v) {
    for (int g = 0; g < 16; g++)
        _mm256_store_ps(&tile->scale[g][first], _mm256_mul_ps(d, signed_byte_to_f32(v[g / 4], g % 4)));
}

// The scales and minima of `n` columns of eight rows. Not for Q2_K and Q3_K.
INLINE void load_scales(enum dtype type, struct weight_tile *tile, size_t first, const uint8_t *const *rows, size_t n) {
    __m256i v[4];
    if (type == DTYPE_Q4_K || type == DTYPE_Q5_K) {
        four_columns(rows, 0, v);
        scales_mins(tile, first, v);
    } else if (type == DTYPE_Q6_K) {
        four_columns(rows, 192, v);
        scales_q6_k(tile, first, halves(rows, 208), v);
    } else {
        const struct small_layout l = small_layout(type);
        for (size_t b = 0; b < n / 32; b++) {
            _mm256_store_ps(&tile->scale[b][first], halves(rows, b * l.bytes));
            if (l.has_min) _mm256_store_ps(&tile->min[b][first], halves(rows, b * l.bytes + 2));
        }
    }
}

// Q2_K and Q3_K, which few files hold: row by row.
static void unpack_slowly(enum dtype type, struct weight_tile *tile, size_t first, const uint8_t *const *rows) {
    for (size_t r = 0; r < OCTET; r++) {
        int8_t q[TILE_COLUMNS];
        float scale[TILE_GROUPS], min[TILE_GROUPS] = {0};
        dtype_to_groups(type, rows[r], q, scale, min, TILE_COLUMNS);
        for (size_t k = 0; k < TILE_COLUMNS; k++)
            tile->q[k / 4][first + r][k % 4] = (uint8_t)(q[k] + unpack_offset(type));
        for (size_t g = 0; g < TILE_GROUPS; g++) {
            tile->scale[g][first + r] = scale[g];
            tile->min[g][first + r] = min[g];
        }
    }
}

// Blocks of 32 in n columns. The K types have superblocks of 256 and nothing less: a constant, so that loops over it
// unroll and a block's shifts become constants too.
INLINE size_t n_blocks(enum dtype type, size_t n) {
    return type == DTYPE_Q4_K || type == DTYPE_Q5_K || type == DTYPE_Q6_K ? TILE_COLUMNS / 32 : n / 32;
}

// dtype_info's block_bytes / (block_len / ACT_BLOCK), as a constant: a call and a division in the loop over blocks cost
// more than the block.
INLINE size_t bytes_of_32(enum dtype type) {
    switch (type) {
    case DTYPE_Q4_K: return 18;
    case DTYPE_Q5_K: return 22;
    case DTYPE_Q6_K: return 26;
    default: return small_layout(type).bytes;
    }
}

// Fetches as much of what `next` points to as one block of eight rows takes, and moves on: rows stand one behind the
// other, so that a tile that asks for as much as it uses, evenly, has the next one in the cache when it ends. All the
// requests at once would fill the queue of cache misses and stall.
INLINE void fetch_ahead(enum dtype type, const char **next) {
    const size_t bytes = OCTET * bytes_of_32(type);
    for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(*next + i, _MM_HINT_T0);
    *next += bytes;
}

// Where column k of eight rows stands: rows first .. first + 8 of the tile at `row`, of which there are n_rows; lanes
// past them repeat the last.
INLINE void rows_at(const struct matrix *w, size_t row, size_t first, size_t n_rows, size_t k, const uint8_t **rows) {
    const struct dtype_info *info = dtype_info(w->type);
    for (size_t r = 0; r < OCTET; r++) {
        size_t i = first + r < n_rows ? first + r : n_rows - 1;
        rows[r] = (const uint8_t *)w->data + (row + i) * w->row_bytes + k / info->block_len * info->block_bytes;
    }
}

// Columns k .. k + n of rows row .. row + n_rows. next: as in fetch_ahead, or NULL.
INLINE void unpack_tile(enum dtype type, struct weight_tile *tile, const struct matrix *w, size_t row, size_t n_rows,
                        size_t k, size_t n, const char **next) {
    for (size_t first = 0; first < TILE_ROWS; first += OCTET) {
        const uint8_t *rows[OCTET];
        rows_at(w, row, first, n_rows, k, rows);
        if (type == DTYPE_Q2_K || type == DTYPE_Q3_K) {
            unpack_slowly(type, tile, first, rows);
            continue;
        }
        load_scales(type, tile, first, rows, n);
#pragma GCC unroll 8
        for (size_t b = 0; b < n_blocks(type, n); b++) {
            __m256i v[OCTET];
            if (next) fetch_ahead(type, next);
            load_block(type, rows, b, v);
            put_block(tile, 32 * b, first, v);
        }
    }
}

#endif
