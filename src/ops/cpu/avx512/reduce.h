// reduce.h: dot16's tree (math.h) for sixteen dot products at once. Files under avx512/ and avx512bf16/ include it.
#ifndef TANDEM_OPS_CPU_AVX512_REDUCE_H
#define TANDEM_OPS_CPU_AVX512_REDUCE_H

#include "ops/cpu/avx2/vec.h"

// v[4 * i + j]: sixteen sums of a dot product; its value is in lane 4 * j + i. Lanes l and l + 8 meet first, then l +
// 4, l + 2 and l + 1.
INLINE __m512 reduce_16(const __m512 v[16]) {
    __m512 a[8], b[4], c[2];
    for (size_t i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xEE));
    for (size_t i = 0; i < 4; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xDD));
    for (size_t i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0xEE));
    return _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xDD));
}

#endif
