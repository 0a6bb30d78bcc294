// size.h: checked size arithmetic. Sizes and offsets that come from a file or a request go through these functions; a
// raw product or sum of such numbers is a bug, whatever the compiler says.
#ifndef TANDEM_BASE_SIZE_H
#define TANDEM_BASE_SIZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Each returns false, and leaves *out alone, when the result does not fit.
static inline bool size_add(size_t a, size_t b, size_t *out) {
    size_t r;
    if (__builtin_add_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}

static inline bool size_mul(size_t a, size_t b, size_t *out) {
    size_t r;
    if (__builtin_mul_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}

// a - b, false when b > a.
static inline bool size_sub(size_t a, size_t b, size_t *out) {
    if (b > a) return false;
    *out = a - b;
    return true;
}

// a * b + c.
static inline bool size_mul_add(size_t a, size_t b, size_t c, size_t *out) {
    size_t product;
    return size_mul(a, b, &product) && size_add(product, c, out);
}

// Rounds up to a multiple of `alignment`, a power of two.
static inline bool size_align_up(size_t n, size_t alignment, size_t *out) {
    size_t r;
    if (!size_add(n, alignment - 1, &r)) return false;
    *out = r & ~(alignment - 1);
    return true;
}

// A 64-bit number from a file as a size.
static inline bool size_from_u64(uint64_t n, size_t *out) {
    if (n > SIZE_MAX) return false;
    *out = (size_t)n;
    return true;
}

// Does [offset, offset + length) lie inside [0, total)?
static inline bool size_range_fits(size_t offset, size_t length, size_t total) {
    return offset <= total && length <= total - offset;
}

// malloc and calloc for `count` items of `item` bytes; NULL on overflow as on lack of memory. A count of 0 gives a
// pointer that may be freed.
void *size_alloc(size_t count, size_t item);
void *size_alloc_zero(size_t count, size_t item);

// realloc under the same rule; on failure the old block stays valid.
void *size_realloc(void *old, size_t count, size_t item);

// As size_alloc, aligned to 64 bytes (a cache line, an AVX-512 vector); free with free().
void *size_alloc_aligned(size_t count, size_t item);

#endif
