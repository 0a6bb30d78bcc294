// bpe_queue.h: the queue of mergeable pairs of one word: lowest rank first, leftmost first where ranks tie.
//
// Words are long where somebody holds down a key: ten million spaces are ten million pairs of one rank. So each rank
// has a list of positions, which mostly come in order; ranks that hold any are in a heap. A position that comes late,
// before one already taken from its list, goes to a heap of single entries; short words use only that. Every step is
// O(log n) at worst, and nearly O(1) in long runs.
#ifndef TANDEM_TEXT_BPE_QUEUE_H
#define TANDEM_TEXT_BPE_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bpe_heap {
    uint64_t *keys;
    size_t len, cap;
};

struct bpe_queue {
    struct bpe_heap single;   // rank << 32 | position
    struct bpe_heap ranks;    // those whose list holds positions
    struct bpe_list *by_rank; // [n_ranks]; NULL until a long word came
    size_t n_ranks;
    bool use_lists;
};

// Begins a word. n_ranks 0: without lists. Keeps memory of earlier words, whose n_ranks were the same or 0.
bool bpe_queue_start(struct bpe_queue *q, size_t n_ranks);
bool bpe_queue_push(struct bpe_queue *q, uint32_t rank, uint32_t at);  // false: no memory
bool bpe_queue_pop(struct bpe_queue *q, uint32_t *rank, uint32_t *at); // false: empty
void bpe_queue_free(struct bpe_queue *q);

#endif
