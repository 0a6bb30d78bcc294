// vec.h: math.h in eight lanes: the same operations in the same order, hence the same bits. The sixteen partial sums of
// dot16 are a pair of registers. Only files under avx2/ include it.
#ifndef TANDEM_OPS_CPU_AVX2_VEC_H
#define TANDEM_OPS_CPU_AVX2_VEC_H

#include "format/dtype.h"
#include "ops/cpu/math.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE __m256 load_bf16(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}

// Eight stored elements as f32; `type` is F32, F16 or BF16.
INLINE __m256 load_as_f32(enum dtype type, const void *p) {
    if (type == DTYPE_F32) return _mm256_loadu_ps(p);
    if (type == DTYPE_F16) return _mm256_cvtph_ps(_mm_loadu_si128(p));
    return load_bf16(p);
}

// bf16_from_f32 in eight lanes: each bf16 in the upper half of its lane, the lower half zero.
INLINE __m256i round_to_bf16(__m256 x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i upper = _mm256_blendv_epi8(rounded, quiet, is_nan);
    return _mm256_and_si256(upper, _mm256_set1_epi32((int)0xFFFF0000u));
}

// dot16_reduce's first step and the second: lanes l of four.
INLINE __m128 reduce_to_4(__m256 low, __m256 high) {
    __m256 sum = _mm256_add_ps(low, high);
    return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}

INLINE float dot16_reduce_2(__m256 low, __m256 high) {
    __m128 a = reduce_to_4(low, high);
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

// dot16_reduce of sixteen sums in memory.
INLINE float dot16_reduce_at(const float *acc) {
    return dot16_reduce_2(_mm256_loadu_ps(acc), _mm256_loadu_ps(acc + 8));
}

INLINE __m256i broadcast_4(const void *p) {
    int v;
    memcpy(&v, p, sizeof v);
    return _mm256_set1_epi32(v);
}

// Adds in the sum's own register. Left to itself, gcc adds in the order of a tree, for which it has too few registers.
INLINE void add_words(__m256i *sum, __m256i v) {
    __asm__("vpaddw %1, %0, %0" : "+x"(*sum) : "x"(v));
}

INLINE void add_dwords(__m256i *sum, __m256i v) {
    __asm__("vpaddd %1, %0, %0" : "+x"(*sum) : "x"(v));
}

// exp32 in eight lanes.
INLINE __m256 exp32_8(__m256 x) {
    const __m256 magic = _mm256_set1_ps(12582912.0f), one = _mm256_set1_ps(1.0f);
    x = _mm256_min_ps(_mm256_set1_ps(89.0f), x); // NaN stays: the second operand is returned
    x = _mm256_max_ps(_mm256_set1_ps(-104.5f), x);
    __m256 t = _mm256_fmadd_ps(x, _mm256_set1_ps(0x1.715476p+0f), magic);
    __m256 n = _mm256_sub_ps(t, magic);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e400p-1f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040.0f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, one);
    p = _mm256_fmadd_ps(p, r, one);
    __m256i e = _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_castps_si256(magic));
    __m256i e1 = _mm256_srai_epi32(e, 1), e2 = _mm256_sub_epi32(e, e1), bias = _mm256_set1_epi32(127);
    __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e1, bias), 23));
    __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e2, bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(p, low), high);
}

// silu(gate) * up
INLINE __m256 silu_mul_8(__m256 gate, __m256 up) {
    __m256 minus = _mm256_xor_ps(gate, _mm256_set1_ps(-0.0f));
    __m256 divisor = _mm256_add_ps(_mm256_set1_ps(1.0f), exp32_8(minus));
    return _mm256_mul_ps(_mm256_div_ps(gate, divisor), up);
}

#endif
