// avx2.h: what the AVX2 files share. Entry points stand in the table (ops.h); nobody else includes this.
#ifndef TANDEM_OPS_CPU_AVX2_AVX2_H
#define TANDEM_OPS_CPU_AVX2_AVX2_H

#include "ops/ops.h"

void avx2_fill(struct ops *ops); // overrides what AVX2 has a version of

void avx2_fill_rows(struct ops *ops);
void avx2_fill_matmul(struct ops *ops);
void avx2_fill_attention(struct ops *ops);

// One row of rmsnorm; y may be x. With `round`, every result is rounded to bf16 (and stays f32).
void avx2_rmsnorm_row(float *y, const float *x, const float *w, float eps, size_t n, bool round);

#endif
