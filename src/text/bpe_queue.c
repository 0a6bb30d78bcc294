// bpe_queue.c: see bpe_queue.h.
#include "text/bpe_queue.h"

#include "base/size.h"

#include <stdlib.h>

struct bpe_list {
    uint32_t *at;
    uint32_t head, n, cap; // at[head] to at[n - 1] are waiting
    bool unsorted;         // only while head is 0
};

static bool heap_push(struct bpe_heap *h, uint64_t key) {
    if (h->len == h->cap) {
        size_t cap = h->cap ? h->cap * 2 : 256;
        uint64_t *keys = size_realloc(h->keys, cap, sizeof *keys);
        if (!keys) return false;
        h->keys = keys;
        h->cap = cap;
    }
    size_t i = h->len++;
    for (; i > 0 && h->keys[(i - 1) / 2] > key; i = (i - 1) / 2) h->keys[i] = h->keys[(i - 1) / 2];
    h->keys[i] = key;
    return true;
}

static uint64_t heap_pop(struct bpe_heap *h) {
    uint64_t top = h->keys[0], last = h->keys[--h->len];
    size_t i = 0, n = h->len;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= n) break;
        if (child + 1 < n && h->keys[child + 1] < h->keys[child]) child++;
        if (h->keys[child] >= last) break;
        h->keys[i] = h->keys[child];
        i = child;
    }
    h->keys[i] = last;
    return top;
}

bool bpe_queue_start(struct bpe_queue *q, size_t n_ranks) {
    uint32_t rank, at;
    while (bpe_queue_pop(q, &rank, &at)) continue; // what a failed word left behind
    q->use_lists = n_ranks > 0;
    if (q->use_lists && !q->by_rank) {
        q->by_rank = size_alloc_zero(n_ranks, sizeof *q->by_rank);
        if (!q->by_rank) return false;
        q->n_ranks = n_ranks;
    }
    return true;
}

bool bpe_queue_push(struct bpe_queue *q, uint32_t rank, uint32_t at) {
    uint64_t key = (uint64_t)rank << 32 | at;
    if (!q->use_lists) return heap_push(&q->single, key);
    struct bpe_list *list = &q->by_rank[rank];
    bool late = list->n > list->head && list->at[list->n - 1] > at;
    if (late && list->head > 0) return heap_push(&q->single, key);
    if (list->n == list->cap) {
        size_t cap = list->cap ? (size_t)list->cap * 2 : 16;
        if (cap > UINT32_MAX) cap = UINT32_MAX;
        if (cap == list->cap) return false;
        uint32_t *grown = size_realloc(list->at, cap, sizeof *grown);
        if (!grown) return false;
        list->at = grown;
        list->cap = (uint32_t)cap;
    }
    if (list->n == list->head && !heap_push(&q->ranks, rank)) return false;
    list->unsorted = list->unsorted || late;
    list->at[list->n++] = at;
    return true;
}

static int compare_positions(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

bool bpe_queue_pop(struct bpe_queue *q, uint32_t *rank, uint32_t *at) {
    if (q->ranks.len == 0) {
        if (q->single.len == 0) return false;
    } else {
        uint32_t first = (uint32_t)q->ranks.keys[0];
        struct bpe_list *list = &q->by_rank[first];
        if (list->unsorted) qsort(list->at + list->head, list->n - list->head, sizeof *list->at, compare_positions);
        list->unsorted = false;
        uint32_t front = list->at[list->head];
        if (q->single.len == 0 || ((uint64_t)first << 32 | front) < q->single.keys[0]) {
            *rank = first;
            *at = front;
            if (++list->head == list->n) {
                heap_pop(&q->ranks);
                list->head = list->n = 0;
            }
            return true;
        }
    }
    uint64_t key = heap_pop(&q->single);
    *rank = (uint32_t)(key >> 32);
    *at = (uint32_t)key;
    return true;
}

void bpe_queue_free(struct bpe_queue *q) {
    for (size_t i = 0; i < q->n_ranks; i++) free(q->by_rank[i].at);
    free(q->by_rank);
    free(q->single.keys);
    free(q->ranks.keys);
    *q = (struct bpe_queue){0};
}
