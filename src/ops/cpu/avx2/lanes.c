// lanes.c: dot products of BF16 rows with many tokens, in AVX2; dense.c has those with few.
//
// One lane of dotpair is a plain chain over K, and the lanes meet only in the tree at the end. So a tile walks one lane
// after the other: the lanes' elements of sixteen rows are laid side by side once, as f32, and a register holds eight
// rows' chains of one token. Six tokens, which stand side by side, too, are twelve chains, which need two loads and six
// broadcasts for twelve fmas, and nothing is added across a register. The lanes come in the tree's order (bits
// reversed), so that sums of lanes are added as soon as both are there and four levels of them are all that waits.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "format/octets.h"
#include "ops/cpu/avx2/kernels.h"
#include "ops/cpu/avx2/unpack.h"
#include "ops/cpu/avx2/vec.h"

enum {
    LANES_TOKENS = 6, // that stand side by side
    LANES_FROM = 12,  // tokens from which on it pays to lay out the lanes of a tile
    LINE = 32,        // elements of a row that hold one pair of every lane
    LEVELS = 4,       // of the tree
    PAD = LINE,       // floats between lanes, which would else share their places in L1
};

const uint8_t lane_order[DOT_LANES] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

// n_tokens rows [n] of a group, n a multiple of 32, to [16 lanes][n / 32][odd, even][LANES_TOKENS].
static void deal(float *to, const float *from, size_t n, size_t n_tokens) {
    for (size_t step = 0; step < DOT_LANES; step++) {
        for (size_t k = (size_t)2 * lane_order[step]; k < n; k += LINE, to += (size_t)2 * LANES_TOKENS) {
            for (size_t t = 0; t < n_tokens; t++) {
                to[t] = from[t * n + k + 1];
                to[LANES_TOKENS + t] = from[t * n + k];
            }
        }
    }
}

// panel: [16 lanes][n_in / 32][odd, even][16 rows]; of rows that the tile lacks any finite or other values.
static void fill_panel(float *panel, const struct matrix *w, size_t row, size_t n_rows) {
    const size_t lane = w->n_in + PAD;
    const bool packed = w->octets && n_rows == TILE_ROWS;
    const size_t line = packed ? QUAD_ROWS * QUAD_LINE : QUAD_LINE;
    const uint8_t *rows[TILE_ROWS];
    for (size_t r = 0; r < TILE_ROWS; r++) {
        if (packed) rows[r] = w->octets + (row + r / QUAD_ROWS * QUAD_ROWS) * w->row_bytes + r % QUAD_ROWS * QUAD_LINE;
        else rows[r] = (const uint8_t *)w->data + (row + (r < n_rows ? r : n_rows - 1)) * w->row_bytes;
    }
    for (size_t c = 0; c < w->n_in / LINE; c++, panel += 2 * TILE_ROWS) {
        for (size_t half = 0; half < 2; half++) {
            __m256i v[8], pairs[2][8];
            for (size_t o = 0; o < 2; o++) {
                for (size_t r = 0; r < 8; r++) v[r] = load_32(rows[8 * o + r] + c * line + 32 * half);
                transpose_8(v, pairs[o]);
            }
            for (size_t l = 0; l < 8; l++) {
                float *to = panel + lane_order[8 * half + l] * lane; // the order is its own inverse
                for (size_t o = 0; o < 2; o++) {
                    __m256i odd = _mm256_and_si256(pairs[o][l], _mm256_set1_epi32((int)0xFFFF0000u));
                    _mm256_storeu_ps(to + 8 * o, _mm256_castsi256_ps(odd));
                    _mm256_storeu_ps(to + 16 + 8 * o, _mm256_castsi256_ps(_mm256_slli_epi32(pairs[o][l], 16)));
                }
            }
        }
    }
}

// N tokens of a group with sixteen rows. next: NULL, or the sixteen rows that come next, which are fetched meanwhile.
INLINE void group(float *out, const float *w, const float *x, size_t n_in, const char *next, const size_t N) {
    float waiting[LEVELS][LANES_TOKENS][TILE_ROWS] __attribute__((aligned(64)));
    for (size_t step = 0; step < DOT_LANES; step++, w += PAD) {
        __m256 sum[LANES_TOKENS][2];
        for (size_t t = 0; t < N; t++) sum[t][0] = sum[t][1] = _mm256_setzero_ps();
        for (size_t k = 0; k < n_in; k += LINE, x += 2 * LANES_TOKENS, w += 2 * TILE_ROWS) {
            if (next) _mm_prefetch(next, _MM_HINT_T1), next += QUAD_LINE;
#pragma GCC unroll 2
            for (size_t h = 0; h < 2; h++) {
                const __m256 first = _mm256_loadu_ps(w + h * TILE_ROWS);
                const __m256 second = _mm256_loadu_ps(w + h * TILE_ROWS + 8);
                for (size_t t = 0; t < N; t++) {
                    const __m256 in = _mm256_broadcast_ss(x + h * LANES_TOKENS + t);
                    sum[t][0] = _mm256_fmadd_ps(first, in, sum[t][0]);
                    sum[t][1] = _mm256_fmadd_ps(second, in, sum[t][1]);
                }
            }
        }
        size_t level = 0;
        for (; step >> level & 1; level++) {
            for (size_t t = 0; t < N; t++) {
                sum[t][0] = _mm256_add_ps(_mm256_load_ps(waiting[level][t]), sum[t][0]);
                sum[t][1] = _mm256_add_ps(_mm256_load_ps(waiting[level][t] + 8), sum[t][1]);
            }
        }
        float *to = level == LEVELS ? out : waiting[level][0];
        for (size_t t = 0; t < N; t++) {
            _mm256_storeu_ps(to + t * TILE_ROWS, sum[t][0]);
            _mm256_storeu_ps(to + t * TILE_ROWS + 8, sum[t][1]);
        }
    }
}

static void multiply(float *out, float *panel, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                     size_t n_tokens) {
    const uint8_t *next = (w->octets ? w->octets : (const uint8_t *)w->data) + (row + TILE_ROWS) * w->row_bytes;
    fill_panel(panel, w, row, n_rows);
    for (size_t t = 0; t < n_tokens; t += LANES_TOKENS, out += LANES_TOKENS * TILE_ROWS, x += LANES_TOKENS * w->n_in) {
        switch (n_tokens - t) {
        case 1: group(out, panel, x, w->n_in, NULL, 1); break;
        case 2: group(out, panel, x, w->n_in, NULL, 2); break;
        case 3: group(out, panel, x, w->n_in, NULL, 3); break;
        case 4: group(out, panel, x, w->n_in, NULL, 4); break;
        case 5: group(out, panel, x, w->n_in, NULL, 5); break;
        default:
            if (t == 0) group(out, panel, x, w->n_in, (const char *)next, LANES_TOKENS);
            else group(out, panel, x, w->n_in, NULL, LANES_TOKENS);
        }
    }
}

const struct lane_kernels avx2_lanes = {LANES_TOKENS, LANES_FROM, deal, multiply};

#endif
