// kv.h: which KV pages are free, used and cached. Integers only: no tensor is in sight, so that it is tested without a
// model; whoever runs the model obeys the copies that this file asks for.
//
// A page holds the K and V of `page_tokens` consecutive positions of a sequence. A full page may be CACHED: it is found
// again by the token ids that it holds and by what stands in front of it. What stands in front is named by a serial
// number that is never given twice, and the ids are compared on every hit: the hash only finds the bucket, so that no
// collision can hand one sequence the memory of another. The first page of a sequence hangs below its tenant's number:
// tenants share nothing.
//
// A page is free (nobody uses it, nothing in it is wanted), used (by one or more sequences), or idle (cached, nobody
// uses it). Idle pages are taken, least recently used first, when no free one is left. A sequence lets go of its pages
// from the back, so that a page goes before the page in front of it and no idle page is cut off from its beginning.
#ifndef TANDEM_ENGINE_KV_H
#define TANDEM_ENGINE_KV_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// The number of a tenant whose pages are never cached.
#define KV_PRIVATE (UINT64_MAX >> 1)

struct kv_entry {
    uint64_t serial, parent; // 0: not cached
    int32_t next_in_bucket;  // -1: none
    int32_t older, newer;    // among the idle pages; -1: none
    uint32_t bucket;         // where it hangs
};

struct kv_pool {
    size_t n_pages, page_tokens;
    int32_t *free_list;       // [n_pages] a stack of n_free
    uint32_t *uses;           // [n_pages] how many sequences hold it
    struct kv_entry *entries; // [n_pages]
    int32_t *ids;             // [n_pages, page_tokens] the token ids of cached pages
    int32_t *buckets;         // [n_buckets] a power of two; -1: empty
    size_t n_buckets, n_free, n_idle, n_cached;
    int32_t oldest, newest; // idle pages
    uint64_t seed, last_serial;
    uint64_t n_evicted; // since the start
};

// `seed` keys the hash: a secret, so that nobody can fill one bucket on purpose.
bool kv_pool_create(struct kv_pool *p, size_t n_pages, size_t page_tokens, uint64_t seed, struct error *err);
void kv_pool_free(struct kv_pool *p);

// Pages that can be taken now.
static inline size_t kv_available(const struct kv_pool *p) {
    return p->n_free + p->n_idle;
}

int32_t kv_take(struct kv_pool *p); // one use; -1: none left
void kv_share(struct kv_pool *p, int32_t page);
void kv_drop(struct kv_pool *p, int32_t page); // the last drop makes it idle if it is cached, else free
bool kv_is_shared(const struct kv_pool *p, int32_t page);
bool kv_is_cached(const struct kv_pool *p, int32_t page);
void kv_forget(struct kv_pool *p, int32_t page); // no longer cached

// ---- A sequence's pages --------------------------------------------------------------------------------------------

// All zero but `pages` and `tenant` is an empty sequence.
struct kv_seq {
    int32_t *pages; // [room for the longest the sequence can get] the caller's memory
    size_t n_pages;
    size_t n_kv;     // positions whose K and V are computed
    size_t n_chain;  // the first n_chain pages are cached
    uint64_t tenant; // below KV_PRIVATE, or KV_PRIVATE
};

// A page's contents, to be copied before the step runs.
struct kv_copy {
    int32_t from, to;
};

// Gives an empty sequence the cached pages that hold the beginning of ids[0..n), at most `limit` tokens. Returns the
// number of tokens, which is seq->n_kv now.
size_t kv_match(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids, size_t n, size_t limit);

// Makes the pages of positions [n_kv, n_kv + n) exist and belong to this sequence alone. False: the pool has not
// enough; the sequence is as before. A half-full page that others use is replaced by a copy: *copy says which (from -1:
// none).
bool kv_reserve(struct kv_pool *p, struct kv_seq *seq, size_t n, struct kv_copy *copy);

// n more positions were computed; `ids` are the sequence's, from position 0. Pages that became full are cached. Where
// the same page is cached already, the sequence changes over to it: its bits are the same.
void kv_commit(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids, size_t n);
// Its second half alone, for who raises n_kv before the ids are known.
void kv_chain(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids);

void kv_trim(struct kv_pool *p, struct kv_seq *seq, size_t n);                 // drops positions from n on
void kv_fork(struct kv_pool *p, struct kv_seq *to, const struct kv_seq *from); // `to` is empty
void kv_poison(struct kv_pool *p, struct kv_seq *seq); // drops everything, and no page of it stays cached

// Checks every count, list and link; false with what is wrong. For tests.
bool kv_check(const struct kv_pool *p, struct error *err);

#endif
