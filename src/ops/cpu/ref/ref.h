// ref.h: the portable C ops, from which every CPU table starts.
#ifndef TANDEM_OPS_CPU_REF_REF_H
#define TANDEM_OPS_CPU_REF_REF_H

#include "ops/ops.h"

void ref_fill_linear(struct ops *ops);    // embed, matmul, bias, add, gather
void ref_fill_pointwise(struct ops *ops); // norms, rope, silu_mul, kv_store
void ref_fill_attention(struct ops *ops); // attention's four parts

#endif
