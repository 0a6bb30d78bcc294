// parts.cuh: what groups.cu, which multiplies in parts, asks of parts.cu, which adds them up. (cuda_add_parts, for
// everybody else, stands in device.h.)
#ifndef TANDEM_OPS_CUDA_PARTS_CUH
#define TANDEM_OPS_CUDA_PARTS_CUH

#include "ops/cuda/products.cuh"

void cuda_parts_setup(struct cuda_state *s);

#endif
