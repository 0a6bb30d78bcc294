// bpe.c: the merge table and the merging: a scan for short words, a heap over a linked list for long ones.
#include "text/bpe.h"

#include "base/size.h"

#include <stdlib.h>
#include <string.h>

static size_t hash_pair(int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15u;
    return (size_t)(h ^ h >> 29);
}

bool bpe_reserve(struct bpe *b, size_t n_merges) {
    size_t slots = 16, wanted;
    if (!size_mul(n_merges, 2, &wanted)) return false;
    while (slots < wanted) {
        if (!size_mul(slots, 2, &slots)) return false;
    }
    b->slots = size_alloc(slots, sizeof *b->slots);
    if (!b->slots) return false;
    b->mask = slots - 1;
    for (size_t i = 0; i < slots; i++) b->slots[i].merged = -1;
    return true;
}

static struct bpe_merge *find_slot(const struct bpe *b, int32_t left, int32_t right) {
    size_t i = hash_pair(left, right) & b->mask;
    while (b->slots[i].merged >= 0 && (b->slots[i].left != left || b->slots[i].right != right)) i = (i + 1) & b->mask;
    return &b->slots[i];
}

bool bpe_add(struct bpe *b, const struct bpe_merge *m) {
    struct bpe_merge *slot = find_slot(b, m->left, m->right);
    if (slot->merged >= 0) return false;
    *slot = *m;
    return true;
}

const struct bpe_merge *bpe_find(const struct bpe *b, int32_t left, int32_t right) {
    const struct bpe_merge *slot = find_slot(b, left, right);
    return slot->merged >= 0 ? slot : NULL;
}

void bpe_free(struct bpe *b) {
    free(b->slots);
    *b = (struct bpe){0};
}

void bpe_scratch_free(struct bpe_scratch *s) {
    free(s->next);
    free(s->prev);
    free(s->heap);
    *s = (struct bpe_scratch){0};
}

enum { SHORT_WORD = 24 };

static size_t apply_short(const struct bpe *b, int32_t *ids, size_t n) {
    const struct bpe_merge *pair[SHORT_WORD]; // pair[i] merges ids[i] and ids[i + 1]
    for (size_t i = 0; i + 1 < n; i++) pair[i] = bpe_find(b, ids[i], ids[i + 1]);
    while (n > 1) {
        size_t best = SIZE_MAX;
        for (size_t i = 0; i + 1 < n; i++)
            if (pair[i] && (best == SIZE_MAX || pair[i]->rank < pair[best]->rank)) best = i;
        if (best == SIZE_MAX) break;
        ids[best] = pair[best]->merged;
        n--;
        memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
        if (best + 1 < n) {
            memmove(pair + best + 1, pair + best + 2, (n - best - 2) * sizeof(*pair));
            pair[best] = bpe_find(b, ids[best], ids[best + 1]);
        }
        if (best > 0) pair[best - 1] = bpe_find(b, ids[best - 1], ids[best]);
    }
    return n;
}

static bool scratch_reserve(struct bpe_scratch *s, size_t n) {
    if (n <= s->cap) return true;
    int32_t *next = size_realloc(s->next, n, sizeof *next);
    if (!next) return false;
    s->next = next;
    int32_t *prev = size_realloc(s->prev, n, sizeof *prev);
    if (!prev) return false;
    s->prev = prev;
    s->cap = n;
    return true;
}

static bool heap_push(struct bpe_scratch *s, uint64_t key) {
    if (s->n_heap == s->heap_cap) {
        size_t cap = s->heap_cap ? s->heap_cap * 2 : 256;
        uint64_t *grown = size_realloc(s->heap, cap, sizeof *grown);
        if (!grown) return false;
        s->heap = grown;
        s->heap_cap = cap;
    }
    size_t i = s->n_heap++;
    for (; i > 0 && s->heap[(i - 1) / 2] > key; i = (i - 1) / 2) s->heap[i] = s->heap[(i - 1) / 2];
    s->heap[i] = key;
    return true;
}

static uint64_t heap_pop(struct bpe_scratch *s) {
    uint64_t top = s->heap[0], key = s->heap[--s->n_heap];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < s->n_heap; i = child) {
        if (child + 1 < s->n_heap && s->heap[child + 1] < s->heap[child]) child++;
        if (s->heap[child] >= key) break;
        s->heap[i] = s->heap[child];
    }
    s->heap[i] = key;
    return top;
}

static bool push_pair(const struct bpe *b, struct bpe_scratch *s, const int32_t *ids, int32_t left, int32_t right) {
    if (left < 0 || right < 0) return true;
    const struct bpe_merge *m = bpe_find(b, ids[left], ids[right]);
    return !m || heap_push(s, (uint64_t)m->rank << 32 | (uint32_t)left);
}

// A merged symbol stays at its left part's place; the right part's place is marked by ids[] = -1. A heap entry is stale
// when the pair at its place no longer has its rank.
static size_t apply_long(const struct bpe *b, int32_t *ids, size_t n, struct bpe_scratch *s) {
    if (!scratch_reserve(s, n)) return SIZE_MAX;
    s->n_heap = 0;
    for (size_t i = 0; i < n; i++) {
        s->prev[i] = (int32_t)i - 1;
        s->next[i] = i + 1 < n ? (int32_t)(i + 1) : -1;
    }
    for (size_t i = 0; i + 1 < n; i++)
        if (!push_pair(b, s, ids, (int32_t)i, (int32_t)i + 1)) return SIZE_MAX;
    while (s->n_heap > 0) {
        uint64_t key = heap_pop(s);
        int32_t at = (int32_t)(key & 0xFFFFFFFFu);
        if (ids[at] < 0 || s->next[at] < 0) continue;
        int32_t right = s->next[at];
        const struct bpe_merge *m = bpe_find(b, ids[at], ids[right]);
        if (!m || m->rank != key >> 32) continue;
        ids[at] = m->merged;
        ids[right] = -1;
        s->next[at] = s->next[right];
        if (s->next[at] >= 0) s->prev[s->next[at]] = at;
        if (!push_pair(b, s, ids, s->prev[at], at) || !push_pair(b, s, ids, at, s->next[at])) return SIZE_MAX;
    }
    size_t kept = 0;
    for (int32_t i = 0; i >= 0; i = s->next[i]) ids[kept++] = ids[i];
    return kept;
}

size_t bpe_apply(const struct bpe *b, int32_t *ids, size_t n, struct bpe_scratch *s) {
    return n <= SHORT_WORD ? apply_short(b, ids, n) : apply_long(b, ids, n, s);
}
