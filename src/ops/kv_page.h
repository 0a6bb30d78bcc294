// kv_page.h: how K and V stand in their pages (struct kv_layer, ops.h): the place of a row, and what a row is rounded
// to. It owns the layout and the rounding, for the CPU's ops and for those who judge them; which page is whose is
// engine/kv.h's.
//
// A row is one head's head_dim channels of one position, as dtype.h stores a row of its type. Row (page, kv_head, slot)
// is the ((page * n_kv_heads + kv_head) * KV_PAGE_TOKENS + slot)th. (A device may order a page's rows and channels in
// its own way.)
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

// Where a row begins, in bytes from kv->k or kv->v.
static inline size_t kv_row_at(const struct kv_layer *kv, size_t page, size_t kv_head, size_t slot) {
    return ((page * kv->n_kv_heads + kv_head) * KV_PAGE_TOKENS + slot) * kv_row_bytes(kv);
}

// Rounds n channels as a store does. BF16, F16: nearest even; F32: not at all. Q8_0: blocks of 32 with the scale
// d = f16(a / 127), a = max |x_i|, and q_i = nearest_even(x_i * (1 / d)), at most 127 in magnitude; all zero where d
// is. NaN, Inf and an `a` beyond what d holds make d NaN or Inf and q zero, so that every value of the block is NaN.
// FP8: format/fp8.h.
void kv_round(enum dtype type, const float *x, void *row, size_t n);

// The n channels that a row holds, exactly: dtype_to_f32(type, row, x, n). One of them:
float kv_channel(enum dtype type, const void *row, size_t channel);

// What x becomes by being stored and read: [n]
void kv_as_stored(enum dtype type, const float *x, float *out, size_t n);

// --kv-type's names; NULL is "bf16". False with what is wrong: the name; or a head that is no whole number of blocks,
// or a device (NULL: none) that does not store it.
bool kv_type_parse(const char *name, enum dtype *out, struct error *err);
bool kv_type_fits(enum dtype type, size_t head_dim, const struct device *device, struct error *err);

#endif
