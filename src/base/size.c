// size.c: allocation with checked sizes; see size.h.
#include "base/size.h"

#include <stdlib.h>

void *size_alloc(size_t count, size_t item) {
    size_t bytes;
    if (!size_mul(count, item, &bytes)) return NULL;
    return malloc(bytes ? bytes : 1);
}

void *size_alloc_zero(size_t count, size_t item) {
    size_t bytes;
    if (!size_mul(count, item, &bytes)) return NULL;
    return calloc(bytes ? bytes : 1, 1);
}

void *size_realloc(void *old, size_t count, size_t item) {
    size_t bytes;
    if (!size_mul(count, item, &bytes)) return NULL;
    return realloc(old, bytes ? bytes : 1);
}

void *size_alloc_aligned(size_t count, size_t item) {
    size_t bytes;
    if (!size_mul(count, item, &bytes) || !size_align_up(bytes ? bytes : 1, 64, &bytes)) return NULL;
    return aligned_alloc(64, bytes);
}
