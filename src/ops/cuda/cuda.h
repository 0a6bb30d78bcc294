// cuda.h: the CUDA backend's door. In a build without nvcc there are no GPUs: ops_cuda_open says so.
#ifndef TANDEM_OPS_CUDA_CUDA_H
#define TANDEM_OPS_CUDA_CUDA_H

#include "ops/ops.h"

#ifdef TANDEM_CUDA
int ops_cuda_count(void); // usable GPUs; 0 also without a driver
const struct ops *ops_cuda_open(int index, struct error *err);
void ops_cuda_close(const struct ops *ops);
#else
static inline int ops_cuda_count(void) {
    return 0;
}
static inline const struct ops *ops_cuda_open(int index, struct error *err) {
    error_set(err, "device cuda:%d: this build has no CUDA (nvcc was not found when it was made)", index);
    return NULL;
}
static inline void ops_cuda_close(const struct ops *ops) {
    (void)ops;
}
#endif

#endif
