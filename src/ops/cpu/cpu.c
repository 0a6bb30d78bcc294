// cpu.c: chooses the CPU's table of ops. It owns the list of instruction sets; each set's files own their ops.
#include "ops/cpu/ref/ref.h"

#include <pthread.h>
#include <string.h>

static struct ops portable;
static pthread_once_t once = PTHREAD_ONCE_INIT;

// Portable first; an instruction set's table is a copy of it with entries overridden.
static void fill(void) {
    portable.name = "cpu/portable";
    ref_fill_linear(&portable);
    ref_fill_pointwise(&portable);
    ref_fill_attention(&portable);
}

const struct ops *ops_cpu(const char *isa, struct error *err) {
    pthread_once(&once, fill);
    if (!isa || strcmp(isa, "auto") == 0 || strcmp(isa, "portable") == 0) return &portable;
    error_set(err, "instruction set '%s': expected one of auto, portable", isa);
    return NULL;
}
