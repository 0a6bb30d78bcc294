// kernels.h: the dot products of one tile, for the driver in matmul.c. The wider instruction sets bring kernels of
// their own and share the driver.
#ifndef TANDEM_OPS_CPU_AVX2_KERNELS_H
#define TANDEM_OPS_CPU_AVX2_KERNELS_H

#include "ops/cpu/activation.h"
#include "ops/ops.h"

enum {
    TILE_ROWS = 16,    // rows of a tile: the lanes of a product with quantised weights
    TILE_TOKENS = 128, // tokens of a tile: its results are 8 KiB
    AVX2_BESIDE = 4,   // tokens whose integers stand side by side; as many are multiplied at once
    AVX512_BESIDE = 8,
};

struct joint; // attention.h
struct queries;

// BF16 with many tokens and n_in a multiple of 32, lane by lane.
struct lane_kernels {
    size_t tokens, from; // that stand side by side; so many must there be at least for it to pay
    // n_tokens rows [n] of a group, rounded, to what `multiply` takes, in no more room.
    void (*deal)(float *to, const float *from, size_t n, size_t n_tokens);
    // out[t * TILE_ROWS + r] as below. x: groups of tokens, dealt out, `tokens` * n_in floats from one to the next, the
    // last one perhaps not full; panel: [lanes_panel_floats(n_in)] of the thread's own.
    void (*multiply)(float *out, float *panel, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                     size_t n_tokens);
};

// In which order lanes stand, in tokens and panels, so that both are read in one stream: dot16's tree's, its own
// inverse.
extern const uint8_t lane_order[];

// As many as a group's rows before they are dealt out, and as a panel.
static inline size_t lanes_panel_floats(size_t n_in) {
    return DOT_LANES * (n_in + 32);
}

// Products write out[t * TILE_ROWS + r] for rows row .. row + n_rows of w, n_rows <= TILE_ROWS, and n_tokens <=
// TILE_TOKENS.
struct cpu_kernels {
    // BF16, F16, F32. x: [n_tokens, n_in] as it is; for BF16 rounded and dealt out (deal_pairs).
    void (*dense)(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens);
    // x: act_rows, `beside` of them side by side (act_row_beside).
    void (*quantised)(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens);
    // NULL, or the same of two whole tiles, w[i] from row[i] on to out[i], of one type and width, together, for several
    // tokens; false: not of this type.
    bool (*quantised_pair)(float *const *out, const struct matrix *const *w, const size_t *row, const float *x,
                           size_t n_tokens);
    // From f32 values to what `dense` wants of BF16: of each 16 the odd ones, then the even ones.
    void (*deal_pairs)(float *to, const float *from, size_t n);
    const struct lane_kernels *lanes; // or NULL
    size_t beside;
    // Attention of many query rows with a block of K or V as f32, [32, head_dim], head_dim a multiple of 32.
    // s[r * ATTN_BLOCK + j] = dot16(q[r], k_j) * scale for the first n positions; n and n_rows are rounded up to four.
    void (*wide_scores)(float *s, const float *const *q, size_t n_rows, const float *k, size_t n, size_t head_dim,
                        float scale);
    // The first n positions of a block added to four rows; p[r]: its probabilities.
    void (*wide_values)(float *const *out, const float *const *p, const struct joint *joint, const float *v, size_t n,
                        size_t head_dim);
    // The same with a block of K or V of Q8_0 as it is stored. s[r * ATTN_BLOCK + j] for the first n positions, the
    // others' in any way. next: NULL, or the block that comes after it, which is fetched meanwhile.
    void (*byte_scores)(float *s, const struct queries *q, size_t n_rows, const unsigned char *k, size_t n,
                        size_t head_dim, const unsigned char *next);
    // The first n[r] > 0 positions added to n_rows rows, one, two or four; p[r]: their probabilities.
    void (*byte_values)(float *const *out, const float *const *p, const struct joint *joint, const size_t *n,
                        size_t n_rows, const unsigned char *v, size_t head_dim, const unsigned char *next);
};

extern const struct cpu_kernels avx2_kernels;
extern const struct lane_kernels avx2_lanes;

void avx2_wide_scores(float *s, const float *const *q, size_t n_rows, const float *k, size_t n, size_t head_dim,
                      float scale);
void avx2_byte_scores(float *s, const struct queries *q, size_t n_rows, const unsigned char *k, size_t n,
                      size_t head_dim, const unsigned char *next);
void avx2_byte_values(float *const *out, const float *const *p, const struct joint *joint, const size_t *n,
                      size_t n_rows, const unsigned char *v, size_t head_dim, const unsigned char *next);
void avx2_wide_values(float *const *out, const float *const *p, const struct joint *joint, const float *v, size_t n,
                      size_t head_dim);

void avx2_dense(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens);
void avx2_quantised(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens);
// avx2_quantised for one token; false: this type has no such version. out: [TILE_ROWS]
bool avx2_one_token(float *out, const struct matrix *w, size_t row, size_t n_rows, const struct act_row *x);
// act_block over a row and the sums, act_wide_block, or both.
void avx2_round_row(struct act_row *row, const float *x, size_t n, bool bytes, bool wide);

#endif
