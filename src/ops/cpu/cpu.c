// cpu.c: chooses the CPU's table of ops, and is the one place that asks what the CPU has. It owns the list of
// instruction sets; each set's files own their ops.
#include "ops/cpu/avx2/avx2.h"
#include "ops/cpu/avx512/avx512.h"
#include "ops/cpu/ref/ref.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

enum isa { PORTABLE, AVX2, AVX512, AVX512VNNI, AVX512BF16, ISA_COUNT };

// Filled once, constant from then on.
static struct isa_info infos[ISA_COUNT] = {
    [PORTABLE] = {"portable", "nothing", true, NULL},
    [AVX2] = {"avx2", "AVX2, FMA, F16C", false, "this CPU lacks it"},
    [AVX512] = {"avx512", "AVX-512 F, BW, VL, DQ", false, "this CPU lacks it"},
    [AVX512VNNI] = {"avx512vnni", "the same and VNNI", false, "this CPU lacks it"},
    [AVX512BF16] = {"avx512bf16", "the same and BF16", false, "this CPU lacks it"},
};
static struct ops tables[ISA_COUNT];
static size_t automatic; // what "auto" takes
static pthread_once_t once = PTHREAD_ONCE_INIT;

#if defined(__x86_64__)
// Intel's cores do as many products a cycle with two plain fmas as with vdpbf16ps, and measured a third more
// (docs/SPEED.md). AMD's do twice as many with vdpbf16ps. The bits are the same.
static bool plain_is_faster(void) {
    uint32_t a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx && c == signature_INTEL_ecx &&
           d == signature_INTEL_edx;
}

static bool bits(uint32_t word, uint32_t mask) {
    return (word & mask) == mask;
}

// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, CPUID leaves 1 and 7, and XGETBV: the system
// must save the wide registers, too.
static void ask_cpu(void) {
    uint32_t a, b, c, d, xcr0, high;
    const uint32_t fma_osxsave_avx_f16c = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bits(c, fma_osxsave_avx_f16c)) return;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if (!bits(xcr0, 0x06) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    infos[AVX2].available = bits(b, 1u << 5);
    const uint32_t f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    infos[AVX512].available = infos[AVX2].available && bits(xcr0, 0xE6) && bits(b, f_dq_bw_vl);
    infos[AVX512VNNI].available = infos[AVX512].available && bits(c, 1u << 11);
    bool has_leaf_1 = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d);
    if (!infos[AVX512VNNI].available || !has_leaf_1 || !bits(a, 1u << 5)) return;
    infos[AVX512BF16].available = avx512bf16_adds_pairs();
    infos[AVX512BF16].why_not = "this CPU's vdpbf16ps rounds in another way";
}
#endif

// Portable first; an instruction set's table is a copy of the one before with entries overridden.
static void fill(void) {
    tables[PORTABLE].name = "cpu/portable";
    ref_fill_linear(&tables[PORTABLE]);
    ref_fill_pointwise(&tables[PORTABLE]);
    ref_fill_attention(&tables[PORTABLE]);
    static void (*const fills[])(struct ops *) = {
        [AVX2] = avx2_fill, [AVX512] = avx512_fill, [AVX512VNNI] = avx512vnni_fill, [AVX512BF16] = avx512bf16_fill};
#if defined(__x86_64__)
    ask_cpu();
    const bool skips_bf16 = plain_is_faster();
#else
    const bool skips_bf16 = false;
#endif
    for (size_t i = AVX2; i < ISA_COUNT; i++) {
        tables[i] = tables[i - 1];
        fills[i](&tables[i]);
        if (!infos[i].available) continue;
        infos[i].why_not = NULL;
        if (i != AVX512BF16 || !skips_bf16) automatic = i;
    }
}

const struct isa_info *ops_cpu_isas(size_t *n) {
    pthread_once(&once, fill);
    *n = ISA_COUNT;
    return infos;
}

const struct ops *ops_cpu(const char *isa, struct error *err) {
    pthread_once(&once, fill);
    char known[128] = "auto";
    for (size_t i = 0; i < ISA_COUNT; i++) {
        if (isa && strcmp(isa, infos[i].name) == 0 && infos[i].available) return &tables[i];
        if (!infos[i].available) continue;
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, ", %s", infos[i].name);
    }
    if (!isa || strcmp(isa, "auto") == 0) return &tables[automatic];
    for (size_t i = 0; i < ISA_COUNT; i++) {
        if (strcmp(isa, infos[i].name) != 0) continue;
        error_set(err, "instruction set '%s': %s; expected one of %s", isa, infos[i].why_not, known);
        return NULL;
    }
    error_set(err, "instruction set '%s': expected one of %s", isa, known);
    return NULL;
}
