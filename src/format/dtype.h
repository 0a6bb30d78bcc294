// dtype.h: the element types of stored tensors, and their exact conversion to f32.
//
// A quantised type stores blocks of `block_len` consecutive elements of a row; a row's length is a multiple of it. The
// block layouts are those of GGUF (source: the GGUF specification and the `gguf` Python package's reference
// dequantisers).
#ifndef TANDEM_FORMAT_DTYPE_H
#define TANDEM_FORMAT_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum dtype {
    DTYPE_F32,
    DTYPE_F16,
    DTYPE_BF16,
    DTYPE_Q8_0,
    DTYPE_Q4_0,
    DTYPE_Q4_1,
    DTYPE_Q5_0,
    DTYPE_Q5_1,
    DTYPE_Q2_K,
    DTYPE_Q3_K,
    DTYPE_Q4_K,
    DTYPE_Q5_K,
    DTYPE_Q6_K,
    DTYPE_FP8, // K and V only (format/fp8.h)
    DTYPE_F64, // from here on: may stand in a file (traces, goldens), but no op multiplies with it
    DTYPE_I8,
    DTYPE_U8,
    DTYPE_I16,
    DTYPE_I32,
    DTYPE_I64,
    DTYPE_BOOL,
    DTYPE_COUNT
};

struct dtype_info {
    const char *name;   // "BF16", "Q4_K": upper case, as safetensors and GGUF spell it
    size_t block_len;   // elements in a block; 1 for plain types
    size_t block_bytes; // bytes in a block
    bool is_quantised;
    bool is_weight; // may hold a model's weights
};

const struct dtype_info *dtype_info(enum dtype type);
bool dtype_from_name(const char *name, enum dtype *out); // case-insensitive

// Bytes of a row of `n` elements; false when n is no multiple of block_len or the product overflows.
bool dtype_row_bytes(enum dtype type, size_t n, size_t *out);

// Converts `n` elements (whole blocks) at `src` (any alignment) to f32, each exactly as the format defines it: f32
// arithmetic in the order of the reference dequantiser, so that values agree bit for bit with the `gguf` package.
// `type` must have is_weight, or be FP8.
void dtype_to_f32(enum dtype type, const void *src, float *dst, size_t n);

static inline float bf16_to_f32(uint16_t h) {
    union {
        uint32_t u;
        float f;
    } v = {.u = (uint32_t)h << 16};
    return v.f;
}

// Round to nearest even; NaN stays NaN (quiet), overflow goes to infinity.
static inline uint16_t bf16_from_f32(float f) {
    union {
        float f;
        uint32_t u;
    } v = {.f = f};
    if ((v.u & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)((v.u >> 16) | 0x40u);
    return (uint16_t)((v.u + 0x7FFFu + ((v.u >> 16) & 1u)) >> 16);
}

float f16_to_f32(uint16_t h);
uint16_t f16_from_f32(float f); // round to nearest even

#endif
