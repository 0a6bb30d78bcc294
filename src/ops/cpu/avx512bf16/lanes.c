// lanes.c: dot products of BF16 rows with many tokens by vdpbf16ps, lane by lane as in avx2/lanes.c: a register holds
// sixteen rows' chains of one token. Sixteen tokens stand side by side, so that a step takes a load and sixteen
// products with what is broadcast from memory.
#include "ops/cpu/avx512/avx512.h"

#if defined(__AVX512BF16__)

#include "format/octets.h"
#include "ops/cpu/avx2/vec.h"

enum {
    LINE = 32,  // elements of a row that hold one pair of every lane
    LEVELS = 4, // of the tree
    TOKENS = 16,
    FROM = 24, // tokens from which on it pays to lay out the lanes of a tile
};

// How many of n_tokens stand side by side, the last ones perhaps missing: they fit where f32 values would.
static size_t beside(size_t n_tokens) {
    size_t n = 1;
    while (n < n_tokens && n < TOKENS) n *= 2;
    return n;
}

// Sixteen rows of sixteen 32-bit values to sixteen columns.
INLINE void transpose_16(__m512i v[16]) {
    __m512i a[16], b[16];
    for (size_t i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (size_t i = 0; i < 16; i += 4) { // b[4 * i + j]: of rows 4 i to 4 i + 3 the columns j, 4 + j, 8 + j, 12 + j
        for (size_t j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    }
    for (size_t j = 0; j < 4; j++) {
        const __m512i even[2] = {_mm512_shuffle_i32x4(b[j], b[4 + j], 0x88),
                                 _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88)};
        const __m512i odd[2] = {_mm512_shuffle_i32x4(b[j], b[4 + j], 0xDD),
                                _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xDD)};
        v[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        v[4 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(even[0], even[1], 0xDD);
        v[12 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xDD);
    }
}

// Sixteen pairs of 32 values that bf16 can hold.
INLINE __m512i pairs_of(const float *x) {
    const __m512i a = _mm512_srli_epi32(_mm512_loadu_si512(x), 16),
                  b = _mm512_srli_epi32(_mm512_loadu_si512(x + 16), 16);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
}

// n_tokens rows [n] to [16 lanes][n / 32][beside] pairs.
static void deal(float *to, const float *from, size_t n, size_t n_tokens) {
    const size_t apart = beside(n_tokens), lane = n / LINE * apart;
    const __mmask16 real = (__mmask16)(UINT32_MAX >> (32 - apart));
    for (size_t c = 0; c < n / LINE; c++) {
        __m512i v[TOKENS];
        for (size_t t = 0; t < TOKENS; t++)
            v[t] = t < n_tokens ? pairs_of(from + t * n + c * LINE) : _mm512_setzero_si512();
        transpose_16(v);
        for (size_t l = 0; l < DOT_LANES; l++)
            _mm512_mask_storeu_epi32(to + lane_order[l] * lane + c * apart, real, v[l]);
    }
}

// Floats between lanes of a panel, which would else share their places in L1.
static size_t lane_floats(size_t n_in) {
    return n_in / LINE * TILE_ROWS + TILE_ROWS;
}

// panel: [16 lanes][n_in / 32][16 rows] pairs; of rows that the tile lacks the last one's.
static void fill_panel(float *panel, const struct matrix *w, size_t row, size_t n_rows) {
    const bool packed = w->octets && n_rows == TILE_ROWS;
    const size_t line = packed ? QUAD_ROWS * QUAD_LINE : QUAD_LINE, lane = lane_floats(w->n_in);
    const uint8_t *rows[TILE_ROWS];
    for (size_t r = 0; r < TILE_ROWS; r++) {
        if (packed) rows[r] = w->octets + (row + r / QUAD_ROWS * QUAD_ROWS) * w->row_bytes + r % QUAD_ROWS * QUAD_LINE;
        else rows[r] = (const uint8_t *)w->data + (row + (r < n_rows ? r : n_rows - 1)) * w->row_bytes;
    }
    for (size_t c = 0; c < w->n_in / LINE; c++, panel += TILE_ROWS) {
        __m512i v[TILE_ROWS];
        for (size_t r = 0; r < TILE_ROWS; r++) v[r] = _mm512_loadu_si512(rows[r] + c * line);
        transpose_16(v);
        for (size_t l = 0; l < DOT_LANES; l++) _mm512_storeu_si512(panel + lane_order[l] * lane, v[l]);
    }
}

// Adds the products of sixteen rows' pairs with one of a token.
INLINE __m512 add_products(__m512 sum, __m512i w, const float *pair) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*pair));
    return sum;
}

// N tokens that stand side by side with sixteen rows. next: NULL, or the rows that come next, which are fetched
// meanwhile.
INLINE void group(float *out, const float *w, const float *x, size_t n_in, const uint8_t *next, const size_t N) {
    float waiting[LEVELS][TOKENS][TILE_ROWS] __attribute__((aligned(64)));
    for (size_t step = 0; step < DOT_LANES; step++, w += TILE_ROWS) {
        __m512 sum[TOKENS];
        for (size_t t = 0; t < N; t++) sum[t] = _mm512_setzero_ps();
        for (size_t k = 0; k < n_in; k += LINE, x += N, w += TILE_ROWS) {
            const __m512i pairs = _mm512_loadu_si512(w);
            if (next) _mm_prefetch((const char *)next, _MM_HINT_T1), next += QUAD_LINE;
            for (size_t t = 0; t < N; t++) sum[t] = add_products(sum[t], pairs, x + t);
        }
        size_t level = 0;
        for (; step >> level & 1; level++)
            for (size_t t = 0; t < N; t++) sum[t] = _mm512_add_ps(_mm512_load_ps(waiting[level][t]), sum[t]);
        float *to = level == LEVELS ? out : waiting[level][0];
        for (size_t t = 0; t < N; t++) _mm512_storeu_ps(to + t * TILE_ROWS, sum[t]);
    }
}

// The first tokens fetch the rows that come next. out: [TILE_TOKENS, TILE_ROWS], of missing tokens any values.
static void multiply(float *out, float *panel, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                     size_t n_tokens) {
    const uint8_t *next = (w->octets ? w->octets : (const uint8_t *)w->data) + (row + TILE_ROWS) * w->row_bytes;
    fill_panel(panel, w, row, n_rows);
    for (size_t t = 0; t < n_tokens; t += TOKENS, out += TOKENS * TILE_ROWS, x += TOKENS * w->n_in, next = NULL) {
        switch (beside(n_tokens - t)) {
        case 1: group(out, panel, x, w->n_in, next, 1); break;
        case 2: group(out, panel, x, w->n_in, next, 2); break;
        case 4: group(out, panel, x, w->n_in, next, 4); break;
        case 8: group(out, panel, x, w->n_in, next, 8); break;
        default: group(out, panel, x, w->n_in, next, TOKENS);
        }
    }
}

const struct lane_kernels avx512bf16_lanes = {TOKENS, FROM, deal, multiply};

#endif
