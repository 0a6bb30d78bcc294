// dense.c: dot products with BF16, F16 and F32 rows as stored, in AVX2.
//
// Two rows meet five tokens at a time. A pair's sixteen partial sums are two registers, the low lanes and the high
// ones, and each has a walk along the row to itself: ten chains of fmas, which is as many as leave registers for their
// inputs. Long rows go by pieces of K, so that five tokens' inputs stay in L1; the sums wait in memory in between. One
// token reads four rows, both halves at once, as they stand in memory.
//
// BF16: a 32-bit lane holds a pair, the odd element in its upper half. So lane l of dotpair is lane l here, and the
// conversion is a mask and a shift. The inputs are dealt out in the same way: of each 16 the 8 odd ones, the 8 even
// ones. Its rows may stand in octets (format/octets.h): the same walk, from line to line.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "format/octets.h"
#include "ops/cpu/avx2/kernels.h"
#include "ops/cpu/avx2/vec.h"

enum {
    PIECE = 1024, // elements of K at a time, a multiple of 32
    MAX_N = 5,    // tokens at a time
    AHEAD = 1024, // bytes of octets that are fetched before they are used
};

// Where rows stand that are multiplied together: the first one, bytes to the next row and, of BF16, from 32 elements to
// the next 32. `next` is fetched meanwhile.
struct place {
    const uint8_t *at;
    size_t row, line;
    const uint8_t *next; // packed: in the order of memory; else as `at`
};

// Holds a value in a register: gcc would fold the load into every fma that uses it, and loads are the limit then.
INLINE __m256 keep(__m256 v) {
    __asm__("" : "+x"(v));
    return v;
}

// Eight of 16 stored elements: for BF16 the odd ones (half 0) or the even ones, else the first or the last.
INLINE __m256 half_of_16(enum dtype type, const uint8_t *w, size_t half) {
    if (type != DTYPE_BF16) return load_as_f32(type, w + half * (type == DTYPE_F32 ? 32 : 16));
    __m256i pairs = _mm256_loadu_si256((const __m256i *)(const void *)w);
    return _mm256_castsi256_ps(half ? _mm256_slli_epi32(pairs, 16)
                                    : _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xFFFF0000u)));
}

// Adds eight elements of R rows, `in_16` of the 16 at w, to a half of N tokens' sums; x: where these 16 are.
INLINE void add_8(enum dtype type, const uint8_t *w, size_t row_bytes, const float *x, size_t stride, size_t in_16,
                  __m256 (*sum)[MAX_N], const size_t R, const size_t N) {
    __m256 v[4];
    for (size_t r = 0; r < R; r++) v[r] = half_of_16(type, w + r * row_bytes, in_16);
    for (size_t t = 0; t < N; t++) {
        __m256 in = keep(_mm256_loadu_ps(x + t * stride + 8 * in_16));
        for (size_t r = 0; r < R; r++) sum[r][t] = _mm256_fmadd_ps(v[r], in, sum[r][t]);
    }
}

// Each half of the lanes fetches half of R rows' lines.
INLINE void fetch_half(const uint8_t *next, size_t row, const bool packed, const size_t half, const size_t R) {
    const size_t share = (R + 1) / 2;
    for (size_t i = 0; i < share; i++) {
        const size_t r = half * share + i;
        if (packed) _mm_prefetch((const char *)next + i * QUAD_LINE, _MM_HINT_T0);
        else if (r < R) _mm_prefetch((const char *)next + r * row, _MM_HINT_T0);
    }
}

INLINE void start(__m256 (*sum)[MAX_N], const float *acc, bool first, const size_t R, const size_t N) {
    for (size_t r = 0; r < R; r++)
        for (size_t t = 0; t < N; t++)
            sum[r][t] = first ? _mm256_setzero_ps() : _mm256_load_ps(acc + (r * MAX_N + t) * DOT_LANES);
}

INLINE void finish(__m256 (*sum)[MAX_N], float *acc, const size_t R, const size_t N) {
    for (size_t r = 0; r < R; r++)
        for (size_t t = 0; t < N; t++) _mm256_store_ps(acc + (r * MAX_N + t) * DOT_LANES, sum[r][t]);
}

// Half the lanes (0: the low ones) of the sums of R rows and N tokens, continued over n elements, n a multiple of 16.
// acc: [R, MAX_N, 16], from that half on.
INLINE void half_dots(enum dtype type, float *acc, struct place w, const float *x, size_t stride, size_t n, bool first,
                      const bool packed, const size_t half, const size_t R, const size_t N) {
    const size_t size = type == DTYPE_F32 ? 4 : 2, fetched = packed ? R / 2 * QUAD_LINE : 32 * size;
    const uint8_t *at = w.at + 32 * half, *next = w.next + (packed ? half * (n / 32) * fetched : 0);
    __m256 sum[4][MAX_N];
    start(sum, acc, first, R, N);
    if (type == DTYPE_BF16) { // of each 32 the pairs of the first 16 or of the others
        for (size_t k = 16 * half; k < n; k += 32, at += w.line, next += fetched) {
            fetch_half(next, w.row, packed, half, R);
            add_8(type, at, w.row, x + k, stride, 0, sum, R, N);
            add_8(type, at, w.row, x + k, stride, 1, sum, R, N);
        }
    } else {
        for (size_t k = 0; k < n; k += 16) {
            fetch_half(next + k * size, w.row, false, half, R);
            add_8(type, w.at + k * size, w.row, x + k, stride, half, sum, R, N);
        }
    }
    finish(sum, acc, R, N);
}

// The same of all lanes.
INLINE void dots(enum dtype type, float *acc, struct place w, const float *x, size_t stride, size_t n, bool first,
                 const bool packed, const size_t R, const size_t N) {
    const size_t size = type == DTYPE_F32 ? 4 : 2;
    if (N > 1) {
        half_dots(type, acc, w, x, stride, n, first, packed, 0, R, N);
        half_dots(type, acc + 8, w, x, stride, n, first, packed, 1, R, N);
        return;
    }
    __m256 low[4][MAX_N], high[4][MAX_N];
    start(low, acc, first, R, N);
    start(high, acc + 8, first, R, N);
    __m256(*second)[MAX_N] = type == DTYPE_BF16 ? low : high, (*third)[MAX_N] = type == DTYPE_BF16 ? high : low;
    const uint8_t *at = w.at;
    size_t k = 0;
    for (; k + 32 <= n; k += 32, at += w.line) {
        // Memory is the limit. The next rows stand behind these; as much of them is fetched as is used here.
        const uint8_t *next = packed ? at + AHEAD : w.at + R * w.row + k * size * R;
        for (size_t i = 0; R == 4 && i < 32 * size * R; i += 64) _mm_prefetch((const char *)next + i, _MM_HINT_T0);
        add_8(type, at, w.row, x + k, stride, 0, low, R, N);
        add_8(type, at, w.row, x + k, stride, 1, second, R, N);
        add_8(type, at + 16 * size, w.row, x + k + 16, stride, 0, third, R, N);
        add_8(type, at + 16 * size, w.row, x + k + 16, stride, 1, high, R, N);
        // Ties the two halves: gcc would make two loops of this one, each with too few chains to fill the fma units.
        __asm__ volatile("" : "+x"(low[0][0]), "+x"(high[0][0]));
    }
    if (k < n) {
        add_8(type, at, w.row, x + k, stride, 0, low, R, N);
        add_8(type, at, w.row, x + k, stride, 1, second, R, N);
    }
    finish(low, acc, R, N);
    finish(high, acc + 8, R, N);
}

// The last n_in % 16 elements, from k on. Lanes go on where the whole blocks of 32 (pairs) or 16 ended.
static void add_tail(const struct matrix *w, size_t row, size_t k, float *acc, const float *x) {
    float tail[DOT_LANES];
    size_t n = w->n_in - k, size = w->type == DTYPE_F32 ? 4 : 2;
    dtype_to_f32(w->type, (const uint8_t *)w->data + row * w->row_bytes + k * size, tail, n);
    if (w->type != DTYPE_BF16) {
        for (size_t l = 0; l < n; l++) acc[l] = fmaf(tail[l], x[k + l], acc[l]);
        return;
    }
    acc += k / 2 % DOT_LANES;
    for (size_t i = 0; i < n; i += 2) {
        if (i + 1 < n) acc[i / 2] = fmaf(tail[i + 1], x[k + i + 1], acc[i / 2]);
        acc[i / 2] = fmaf(tail[i], x[k + i], acc[i / 2]);
    }
}

INLINE void rows(enum dtype type, float *acc, const struct matrix *w, size_t row, size_t n_rows, size_t k,
                 const float *x, size_t n, bool fetch, const bool packed, const size_t N) {
    const size_t size = type == DTYPE_F32 ? 4 : 2, R = N <= 2 ? 4 : 2, stride = MAX_N * DOT_LANES;
    const size_t ahead = fetch ? QUAD_ROWS * w->row_bytes : 0;
    size_t r = 0;
    if (packed) { // whole tiles only
        for (; r < n_rows; r += R) {
            const uint8_t *quad =
                w->octets + (row + r / QUAD_ROWS * QUAD_ROWS) * w->row_bytes + k / 32 * QUAD_ROWS * QUAD_LINE;
            struct place p = {quad + r % QUAD_ROWS * QUAD_LINE, QUAD_LINE, QUAD_ROWS * QUAD_LINE,
                              quad + ahead + r % QUAD_ROWS * (n / 32) * QUAD_LINE};
            dots(type, acc + r * stride, p, x + k, w->n_in, n, k == 0, true, R, N);
        }
        return;
    }
    const uint8_t *first = (const uint8_t *)w->data + row * w->row_bytes + k * size;
    struct place p = {first, w->row_bytes, 32 * size, first + ahead};
    for (; r + R <= n_rows; r += R, p.at += R * w->row_bytes, p.next += R * w->row_bytes)
        dots(type, acc + r * stride, p, x + k, w->n_in, n, k == 0, false, R, N);
    for (; r < n_rows; r++, p.at += w->row_bytes, p.next += w->row_bytes)
        dots(type, acc + r * stride, p, x + k, w->n_in, n, k == 0, false, 1, N);
}

INLINE void tokens(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                   bool fetch, const bool packed, const size_t N) {
    float acc[TILE_ROWS * MAX_N * DOT_LANES] __attribute__((aligned(32)));
    size_t whole = w->n_in / DOT_LANES * DOT_LANES, k = 0;
    do {
        size_t n = whole - k < PIECE ? whole - k : PIECE;
        rows(type, acc, w, row, n_rows, k, x, n, fetch, packed, N);
        k += n;
    } while (k < whole);
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t t = 0; t < N; t++) {
            float *at = acc + (r * MAX_N + t) * DOT_LANES;
            if (k < w->n_in) add_tail(w, row + r, k, at, x + t * w->n_in);
            out[t * TILE_ROWS + r] = dot16_reduce_at(at);
        }
    }
}

INLINE void dense(enum dtype type, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                  size_t n_tokens, const bool packed) {
    for (size_t t = 0, n; t < n_tokens; t += n, out += n * TILE_ROWS, x += n * w->n_in) {
        const size_t left = n_tokens - t;
        n = left >= 9 || left == 5 ? 5 : left == 8 || left == 7 || left == 4 ? 4 : left >= 3 ? 3 : left;
        if (n == 5) tokens(type, out, w, row, n_rows, x, t == 0, packed, 5);
        else if (n == 4) tokens(type, out, w, row, n_rows, x, t == 0, packed, 4);
        else if (n == 3) tokens(type, out, w, row, n_rows, x, t == 0, packed, 3);
        else if (n == 2) tokens(type, out, w, row, n_rows, x, t == 0, packed, 2);
        else tokens(type, out, w, row, n_rows, x, t == 0, packed, 1);
    }
}

void avx2_dense(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens) {
    if (w->type == DTYPE_BF16 && w->octets && n_rows == TILE_ROWS)
        dense(DTYPE_BF16, out, w, row, n_rows, x, n_tokens, true);
    else if (w->type == DTYPE_BF16) dense(DTYPE_BF16, out, w, row, n_rows, x, n_tokens, false);
    else if (w->type == DTYPE_F16) dense(DTYPE_F16, out, w, row, n_rows, x, n_tokens, false);
    else dense(DTYPE_F32, out, w, row, n_rows, x, n_tokens, false);
}

#endif
