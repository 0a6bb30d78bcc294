// arena.c: see arena.h.
#include "base/arena.h"

#include "base/size.h"

#include <stdalign.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK_BYTES = 64 * 1024, ALIGNMENT = 16 };

struct arena_block {
    struct arena_block *next;
    size_t used, size; // of data[]
    alignas(ALIGNMENT) unsigned char data[];
};

void *arena_alloc(struct arena *a, size_t count, size_t item) {
    size_t bytes;
    if (!size_mul(count, item, &bytes) || !size_align_up(bytes ? bytes : 1, ALIGNMENT, &bytes)) return NULL;
    struct arena_block *block = a->blocks;
    if (!block || block->size - block->used < bytes) {
        size_t size = bytes > BLOCK_BYTES ? bytes : BLOCK_BYTES;
        size_t total;
        if (!size_add(size, sizeof *block, &total)) return NULL;
        block = malloc(total);
        if (!block) return NULL;
        *block = (struct arena_block){.next = a->blocks, .size = size};
        a->blocks = block;
    }
    void *p = block->data + block->used;
    block->used += bytes;
    return p;
}

void *arena_alloc_zero(struct arena *a, size_t count, size_t item) {
    void *p = arena_alloc(a, count, item);
    if (p) memset(p, 0, count * item);
    return p;
}

char *arena_copy_text(struct arena *a, const char *text, size_t n) {
    size_t bytes;
    if (!size_add(n, 1, &bytes)) return NULL;
    char *copy = arena_alloc(a, bytes, 1);
    if (!copy) return NULL;
    if (n) memcpy(copy, text, n);
    copy[n] = '\0';
    return copy;
}

void arena_free(struct arena *a) {
    while (a->blocks) {
        struct arena_block *next = a->blocks->next;
        free(a->blocks);
        a->blocks = next;
    }
}
