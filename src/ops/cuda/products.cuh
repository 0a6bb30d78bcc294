// products.cuh: the arguments that all product kernels share.
#ifndef TANDEM_OPS_CUDA_PRODUCTS_CUH
#define TANDEM_OPS_CUDA_PRODUCTS_CUH

#include "ops/cuda/common.cuh"
#include "ops/cuda/matrix.cuh"

enum product_mode {
    PRODUCT_PLAIN,    // y = W x
    PRODUCT_QKV,      // three matrices, each with its y and perhaps a bias
    PRODUCT_RESIDUAL, // y += W x
    PRODUCT_GATE_UP,  // y = silu(W0 x) * (W1 x)
};

struct product_args {
    const uint4 *w[3]; // in units
    float *y[3];       // [n_tokens, n_out]
    const float *b[3]; // [n_out] or NULL
    int n_out[3], n_pairs[3];
    int n_in, columns; // columns: padded to whole slices
    int n_tokens;
    const float *x;      // [n_tokens, n_in], or the rows of it that `rows` names
    const int32_t *rows; // [n_tokens] or NULL
    const float *norm;   // [n_in]
    float eps;
};

static __device__ __forceinline__ const float *input_row(const product_args &p, int i) {
    return p.x + (size_t)(p.rows ? p.rows[i] : i) * p.n_in;
}

// Floats of scratch that attention's partial results take.
size_t cuda_split_floats(const struct ops *ops, const struct ops_limits *limits);

#endif
