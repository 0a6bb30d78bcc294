// cpu.c: chooses the CPU's table of ops, and is the one place that asks what the CPU has. It owns the list of
// instruction sets; each set's files own their ops.
#include "ops/cpu/avx2/avx2.h"
#include "ops/cpu/ref/ref.h"

#include <pthread.h>
#include <string.h>

// Filled once, constant from then on.
static struct ops portable, avx2;
static bool has_avx2;
static pthread_once_t once = PTHREAD_ONCE_INIT;

// Portable first; an instruction set's table is a copy of it with entries overridden.
static void fill(void) {
    portable.name = "cpu/portable";
    ref_fill_linear(&portable);
    ref_fill_pointwise(&portable);
    ref_fill_attention(&portable);
    avx2 = portable;
    avx2_fill(&avx2);
#if defined(__x86_64__)
    // The compiler's support code reads CPUID, and XGETBV for whether the system saves the wide registers.
    __builtin_cpu_init();
    has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
}

const struct ops *ops_cpu(const char *isa, struct error *err) {
    pthread_once(&once, fill);
    if (!isa || strcmp(isa, "auto") == 0) return has_avx2 ? &avx2 : &portable;
    if (strcmp(isa, "portable") == 0) return &portable;
    if (strcmp(isa, "avx2") == 0 && has_avx2) return &avx2;
    if (strcmp(isa, "avx2") == 0) {
        error_set(err, "instruction set 'avx2': this CPU lacks it; expected one of auto, portable");
    } else {
        error_set(err, "instruction set '%s': expected one of auto, portable, avx2", isa);
    }
    return NULL;
}
