// arena.h: many small allocations that live and die together (names, strings, tables of one loaded file).
#ifndef TANDEM_BASE_ARENA_H
#define TANDEM_BASE_ARENA_H

#include <stddef.h>

struct arena_block;

// All zero is a valid empty arena.
struct arena {
    struct arena_block *blocks; // newest first
};

// `count` items of `item` bytes, aligned to 16, not cleared; NULL on overflow or lack of memory.
void *arena_alloc(struct arena *a, size_t count, size_t item);
void *arena_alloc_zero(struct arena *a, size_t count, size_t item);

// A NUL-terminated copy of `n` bytes.
char *arena_copy_text(struct arena *a, const char *text, size_t n);

void arena_free(struct arena *a); // frees every block

#endif
