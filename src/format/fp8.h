// fp8.h: blocks of 32 numbers in eight bits each, with a power of two as their common scale: how K and V are stored
// with --kv-type fp8. It owns the format; who stores what is ops/kv_page.h's.
//
// An element is an E4M3: sign, four bits of exponent, three of fraction; 448 is the largest that is written. A block's
// scale 2^e is the smallest that brings its largest magnitude to 448 or less, e at least -100. What stands in memory is
// its byte s = e + 247, since s << 23 and (element & 0x7F) << 20 are the bits of two f32s (the second perhaps
// subnormal) whose product is the element's value, exactly; and as bf16s s << 7 and (element & 0x7F) << 4 are. NaN, Inf
// and magnitudes beyond 57,344, where e would be above 7, make s 255 and the elements 0, so that every value is NaN.
#ifndef TANDEM_FORMAT_FP8_H
#define TANDEM_FORMAT_FP8_H

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FP8_INLINE static __host__ __device__ __forceinline__
#else
#define FP8_INLINE static inline
#endif

enum { FP8_BLOCK = 32, FP8_BLOCK_BYTES = 33, FP8_LEAST = 147, FP8_MOST = 254, FP8_NAN = 255 }; // bytes of scales

// The scale's byte for a block whose largest magnitude has these bits as f32 (the sign cleared).
FP8_INLINE uint32_t fp8_scale(uint32_t max_bits) {
    uint32_t s = (max_bits >> 23) + (247 - 127 - 8) + ((max_bits & 0x7FFFFFu) > 0x600000u); // 448 is 1.75 * 2^8
    return s < FP8_LEAST ? FP8_LEAST : s > FP8_MOST ? FP8_NAN : s;
}

// What an element is multiplied with before it is rounded: 2^-e, as bits of an f32. 0 for a block of NaNs.
FP8_INLINE uint32_t fp8_inverse_bits(uint32_t s) {
    return s == FP8_NAN ? 0 : (127 + 247 - s) << 23;
}

// Rounds an f32 of at most 448, given by its bits, to the nearest E4M3, ties to even. `steps`: its magnitude times 512,
// rounded to an integer (what counts below 2^-6).
FP8_INLINE uint32_t fp8_round(uint32_t bits, uint32_t steps) {
    uint32_t magnitude = bits & 0x7FFFFFFFu, sign = bits >> 24 & 0x80u;
    uint32_t normal = ((magnitude + 0x7FFFFu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    return sign | (magnitude < 0x3C800000u ? steps : normal);
}

// In place, in C: a row's blocks. Source [n], n a multiple of 32; `blocks` [n / 32] of FP8_BLOCK_BYTES.
void fp8_from_f32(const float *x, void *blocks, size_t n);
void fp8_to_f32(const void *blocks, float *x, size_t n);

#endif
