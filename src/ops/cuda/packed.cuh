// packed.cuh: how products for many tokens want their inputs (group_kernel.cuh), and who may write them so: rounded, in
// matrices of 8 tokens by 8 columns.
#ifndef TANDEM_OPS_CUDA_PACKED_CUH
#define TANDEM_OPS_CUDA_PACKED_CUH

#include "ops/cuda/device.h"
#include "ops/cuda/matrix.cuh"

enum {
    PACKED_COLUMNS = SLICE / 2,
    PACKED_BYTES = 8 * PACKED_COLUMNS * 2, // of eight tokens
    MATRIX_BYTES = 128,
    MOST_TOKENS = 256, // of a tile
};

// How products that add to the residual stream are done for more tokens than small.cuh has: up to so many in clusters
// (clusters.cuh), but some of these in parts (parts.cu); more by warp groups.
enum { CLUSTER_TOKENS = 64, FEWEST_IN_PARTS = 17, MOST_IN_PARTS = 32 };

// Bytes that a last tile of tokens may read behind what is packed.
enum { BEYOND = 32 * 1024 };

// Units of eight tokens that have room: whole tiles of any size.
static inline size_t packed_units(size_t n_tokens) {
    return (n_tokens + MOST_TOKENS - 1) / MOST_TOKENS * (MOST_TOKENS / 8);
}

// Where an element is: [columns / 64][token_units][8 matrices of 8 tokens by 8 columns].
static __host__ __device__ __forceinline__ size_t packed_at(int token, int column, int token_units) {
    return ((size_t)(column / PACKED_COLUMNS) * token_units + token / 8) * PACKED_BYTES +
           column % PACKED_COLUMNS / 8 * MATRIX_BYTES + token % 8 * 16 + column % 8 * 2;
}

// Scratch in halves: the first for what a product packs for itself and for attention's partial results, the second for
// results that are packed for the next product (cuda_state.packed). Behind them lie products' parts (parts.cu), where
// attention's partial results may reach.
enum { PARTS_FLOATS = 1 << 20 };

static inline size_t half_floats(const struct op_ctx *ctx) {
    return (ctx->scratch_floats - PARTS_FLOATS) / 8 * 4;
}

static inline unsigned char *second_half(const struct op_ctx *ctx) {
    return (unsigned char *)(ctx->scratch + half_floats(ctx));
}

static inline float *parts_of(const struct op_ctx *ctx) {
    return ctx->scratch + 2 * half_floats(ctx);
}

#endif
