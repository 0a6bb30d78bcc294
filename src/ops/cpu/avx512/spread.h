// spread.h: one broadcast that files under avx512/ and avx512vnni/ share.
#ifndef TANDEM_OPS_CPU_AVX512_SPREAD_H
#define TANDEM_OPS_CPU_AVX512_SPREAD_H

// Four bytes in every 32-bit lane, straight from memory: by way of a general register, as gcc takes two neighbours of
// which both are wanted, costs three times as much.
INLINE __m512i spread(const void *p) {
    __m512i v;
    __asm__("vpbroadcastd %1, %0" : "=v"(v) : "m"(*(const char(*)[4])p));
    return v;
}

#endif
