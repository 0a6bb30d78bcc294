// bpe.h: byte-pair merging over token ids: which two neighbours become which token, and in which order.
#ifndef TANDEM_TEXT_BPE_H
#define TANDEM_TEXT_BPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bpe_merge {
    int32_t left, right, merged;
    uint32_t rank; // the lower merges first
};

// A hash table of merges. All zero is empty.
struct bpe {
    struct bpe_merge *slots; // [mask + 1]; merged < 0: free
    size_t mask;
};

bool bpe_reserve(struct bpe *b, size_t n_merges);       // once, before bpe_add; false: no memory
bool bpe_add(struct bpe *b, const struct bpe_merge *m); // false: the pair is there already
const struct bpe_merge *bpe_find(const struct bpe *b, int32_t left, int32_t right); // NULL: they do not merge
void bpe_free(struct bpe *b);

// Memory that merging needs, kept between words. All zero is empty.
struct bpe_scratch {
    int32_t *next, *prev; // [cap] neighbours of a symbol, for long words
    uint64_t *heap;       // [heap_cap] rank << 32 | position
    size_t cap, n_heap, heap_cap;
};
void bpe_scratch_free(struct bpe_scratch *s);

// Merges ids[0 .. n) in place and returns how many are left: always the pair of lowest rank, the leftmost among equals.
// n log n; n is below 2^31. SIZE_MAX: no memory.
size_t bpe_apply(const struct bpe *b, int32_t *ids, size_t n, struct bpe_scratch *s);

#endif
