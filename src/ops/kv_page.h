// kv_page.h: how K and V stand in their pages (struct kv_layer, ops.h): the place of a row, and what a row is rounded
// to. It owns the layout and the rounding, for the CPU's ops and for those who judge them; which page is whose is
// engine/kv.h's.
//
// A row is one head's head_dim channels of one position, as dtype.h stores a row of its type. Row (page, kv_head, slot)
// is the ((page * n_kv_heads + kv_head) * KV_PAGE_TOKENS + slot)th, and stands there, but for Q8_0. (A device may order
// a page's rows and channels in its own way.)
//
// Q8_0: the KV_PAGE_TOKENS rows of one head in a page are dealt out, so that a vector's lanes are positions of K and
// channels of V, and each lane has two neighbours to multiply and add:
//   scales    f16  [head_dim / 32][32 slots]
//   K         int8 [head_dim / 32][4 octets of slots][16 pairs of channels][8 slots][2 channels]
//   V         int8 [head_dim / 32][4 octets of channels][16 pairs of slots][8 channels][2 slots]
#ifndef TANDEM_OPS_KV_PAGE_H
#define TANDEM_OPS_KV_PAGE_H

#include "base/error.h"
#include "ops/ops.h"

// Bytes of n channels of a row; n is a multiple of the type's block.
static inline size_t kv_bytes(enum dtype type, size_t n) {
    switch (type) {
    case DTYPE_F32: return 4 * n;
    case DTYPE_Q8_0: return n / 32 * 34;
    case DTYPE_FP8: return n / 32 * 33;
    default: return 2 * n;
    }
}

static inline size_t kv_row_bytes(const struct kv_layer *kv) {
    return kv_bytes(kv->type, kv->head_dim);
}

// Of one page of K or of V.
static inline size_t kv_page_bytes(const struct kv_layer *kv) {
    return kv->n_kv_heads * KV_PAGE_TOKENS * kv_row_bytes(kv);
}

// Where one head's rows of a page begin, in bytes from kv->k or kv->v.
static inline size_t kv_head_at(const struct kv_layer *kv, size_t page, size_t kv_head) {
    return (page * kv->n_kv_heads + kv_head) * KV_PAGE_TOKENS * kv_row_bytes(kv);
}

// A row's number.
static inline size_t kv_row(const struct kv_layer *kv, size_t page, size_t kv_head, size_t slot) {
    return (page * kv->n_kv_heads + kv_head) * KV_PAGE_TOKENS + slot;
}

enum kv_side { KV_K, KV_V };

// Copies a row, [kv_row_bytes] as kv_round makes it, out of `data`, which holds what kv->k or kv->v does.
void kv_read(const struct kv_layer *kv, enum kv_side side, const void *data, size_t row, void *to);
// Whether a row's bytes are the same in two such arrays.
bool kv_same_row(const struct kv_layer *kv, enum kv_side side, const void *a, const void *b, size_t row);
// Rounds x [head_dim] into its row.
void kv_store_row(const struct kv_layer *kv, enum kv_side side, size_t row, const float *x);
// One channel of a row, exactly.
float kv_value(const struct kv_layer *kv, enum kv_side side, const void *data, size_t row, size_t channel);

// Where Q8_0's scales and integers stand, in bytes from kv_head_at; block: of 32 channels.
static inline size_t kv_scale_at(size_t block, size_t slot) {
    return 2 * (block * KV_PAGE_TOKENS + slot);
}
static inline size_t kv_block_at(size_t head_dim, size_t block) {
    return 2 * head_dim + block * 32 * KV_PAGE_TOKENS;
}
static inline size_t kv_integer_at(enum kv_side side, size_t head_dim, size_t slot, size_t channel) {
    size_t lane = side == KV_K ? slot : channel % 32, pair = side == KV_K ? channel % 32 : slot;
    return kv_block_at(head_dim, channel / 32) + lane / 8 * 256 + pair / 2 * 16 + lane % 8 * 2 + pair % 2;
}

// Puts block b of a row of Q8_0 in its place; `head`: at kv_head_at.
void kv_write_block(enum kv_side side, size_t head_dim, unsigned char *head, size_t slot, size_t b,
                    const unsigned char *block);

// Rounds n channels as a store does. BF16, F16: nearest even; F32: not at all. Q8_0: blocks of 32 with the scale
// d = f16(a / 127), a = max |x_i|, and q_i = nearest_even(x_i * (1 / d)), at most 127 in magnitude; all zero where d
// is. NaN, Inf and an `a` beyond what d holds make d NaN or Inf and q zero, so that every value of the block is NaN.
// FP8: format/fp8.h.
void kv_round(enum dtype type, const float *x, void *row, size_t n);

// One of the channels that a row as kv_round makes it holds, exactly; all of them: dtype_to_f32(type, row, x, n).
float kv_channel(enum dtype type, const void *row, size_t channel);

// A GPU's order (ops/cuda/kv.cuh) of one head's rows of a page, BF16 or FP8, both arrays in host memory: to the order
// above (to_host), or from it. For those who judge what stands in a device's pages; any bits survive the way there and
// back.
void kv_arrange(const struct kv_layer *kv, enum kv_side side, bool to_host, void *host, void *own);

// What x becomes by being stored and read: [n]
void kv_as_stored(enum dtype type, const float *x, float *out, size_t n);

// What attention's roundings for K and V of Q8_0 (ops.h) may add to an error; 0 for other types. Of a score, before its
// scale: from q's largest magnitude and the sum of K's. Of an output: from V's largest magnitude in the 32 channels.
// (D * 127 is at most 1.6 times that: a scale among f16's subnormals may be so far off.)
static inline double kv_score_slack(enum dtype type, double largest_q, double sum_k) {
    return type == DTYPE_Q8_0 ? 0.501 / 32767 * largest_q * sum_k : 0;
}
static inline double kv_value_slack(enum dtype type, double largest_v) {
    return type == DTYPE_Q8_0 ? 0.501 / 32767 * 1.6 * ATTN_BLOCK * largest_v : 0;
}

// What a GPU's attention makes of a value of q before it multiplies it: times the scale of the scores, in units of log
// 2, it is rounded to bf16; here it is divided by that scale again. `scale`: 1 / sqrt(head_dim).
static inline double kv_device_q(double q, float scale) {
    float log2_scale = scale * 1.44269504088896340736f;
    return (double)bf16_to_f32(bf16_from_f32((float)q * log2_scale)) / (double)log2_scale;
}

// What a GPU's attention may be off by beyond that and f32's own rounding (docs/NUMERICS.md). A score, before its
// scale, from the norms of q and k: each matrix instruction of 16 columns cuts 17 terms off where the largest of them
// ends. An output, relative to the sum of its terms' sizes: probabilities are bf16, in the values' sum and perhaps in
// their own.
#define KV_DEVICE_ROUNDED_P (2 * 0x1p-8)
static inline double kv_device_score_slack(size_t head_dim, double norm_q, double norm_k) {
    return (double)((head_dim + 15) / 16) * 17 * 0x1p-23 * norm_q * norm_k;
}

// --kv-type's names; NULL is "bf16". False with what is wrong: the name; or a head that is no whole number of blocks,
// or a device (NULL: none) that does not store it.
bool kv_type_parse(const char *name, enum dtype *out, struct error *err);
bool kv_type_fits(enum dtype type, size_t head_dim, const struct device *device, struct error *err);

#endif
