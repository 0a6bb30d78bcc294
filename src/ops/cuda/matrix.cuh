// matrix.cuh: the order of elements in memory that tensor cores read without shuffling. A UNIT is 8 rows; each 32
// columns of it are 512 bytes: lane 4 g + t's 16 bytes hold row g, columns 2t, 2t+1, 8+2t, 9+2t, 16+2t, 17+2t, 24+2t,
// 25+2t. That is a lane's share of two steps of the 8-column operand of mma m16n8k16, and two units are its 16-row
// operand. Weights, rounded activations, and pages of K (rows: slots) and V (rows: channels, columns: slots) in eight
// bits are stored so.
#ifndef TANDEM_OPS_CUDA_MATRIX_CUH
#define TANDEM_OPS_CUDA_MATRIX_CUH

#include <stddef.h>

enum {
    UNIT_ROWS = 8,
    SLICE = 128,      // columns whose products are one chain; the slices' sums are added in ascending order
    CHUNK_LANES = 32, // uint4s in a unit's 32 columns
};

// Index of element (row, column) in bf16s; `columns` padded to a multiple of 32.
static __host__ __device__ __forceinline__ size_t unit_index(size_t row, size_t column, size_t columns) {
    return (row / 8 * (columns / 32) + column / 32) * 256 + (row % 8 * 4 + column % 8 / 2) * 8 + column % 32 / 8 * 2 +
           column % 2;
}

// The same of a row by itself, whose lanes' shares lie one after the other: 16 bytes of every 32 columns a lane.
static __host__ __device__ __forceinline__ int row_index(int column) {
    return (column / 32 * 4 + column % 8 / 2) * 8 + column % 32 / 8 * 2 + column % 2;
}

static __host__ __device__ __forceinline__ size_t padded_columns(size_t n) {
    return (n + SLICE - 1) / SLICE * SLICE;
}

#endif
