// avx512.h: the kernels of AVX-512 (F, BW, VL, DQ) and of its extensions VNNI and BF16. Everything else that these
// tables hold is AVX2's: what is not a product with weights is a small part of a step.
#ifndef TANDEM_OPS_CPU_AVX512_AVX512_H
#define TANDEM_OPS_CPU_AVX512_AVX512_H

#include "ops/cpu/avx2/kernels.h"

// `ops` holds AVX2's table; each takes what the one above has and overrides its kernels.
void avx512_fill(struct ops *ops);
void avx512vnni_fill(struct ops *ops);
void avx512bf16_fill(struct ops *ops);

// Whether vdpbf16ps adds as dotpair does on this CPU (docs/NUMERICS.md): runs it. Only where CPUID has AVX512_BF16.
bool avx512bf16_adds_pairs(void);

extern const struct lane_kernels avx512bf16_lanes;

bool avx512_pair(float *const *out, const struct matrix *const *w, const size_t *row, const float *x, size_t n_tokens);
bool avx512vnni_pair(float *const *out, const struct matrix *const *w, const size_t *row, const float *x,
                     size_t n_tokens);
void avx512_dense(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens);
void avx512_quantised(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x, size_t n_tokens);
void avx512_wide_scores(float *s, const float *const *q, size_t n_rows, const float *k, size_t n, size_t head_dim,
                        float scale);
void avx512_wide_values(float *const *out, const float *const *p, const struct joint *joint, const float *v, size_t n,
                        size_t head_dim);
void avx512vnni_byte_scores(float *s, const struct queries *q, size_t n_rows, const unsigned char *k, size_t n,
                            size_t head_dim, const unsigned char *next);
void avx512vnni_byte_values(float *const *out, const float *const *p, const struct joint *joint, const size_t *n,
                            size_t n_rows, const unsigned char *v, size_t head_dim, const unsigned char *next);
void avx512_deal_pairs(float *to, const float *from, size_t n);
void avx512vnni_quantised(float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                          size_t n_tokens);

#endif
