// kv.c: see kv.h.
#include "engine/kv.h"

#include "base/size.h"

#include <stdlib.h>
#include <string.h>

bool kv_pool_create(struct kv_pool *p, size_t n_pages, size_t page_tokens, uint64_t seed, struct error *err) {
    *p = (struct kv_pool){.n_pages = n_pages, .page_tokens = page_tokens, .seed = seed, .oldest = -1, .newest = -1};
    size_t n_ids;
    if (n_pages > INT32_MAX / 4 || !size_mul(n_pages, page_tokens, &n_ids))
        return error_set(err, "KV: %zu pages of %zu tokens are more than can be counted", n_pages, page_tokens);
    p->n_buckets = 16;
    while (p->n_buckets < 2 * n_pages) p->n_buckets *= 2;
    p->free_list = size_alloc(n_pages, sizeof *p->free_list);
    p->uses = size_alloc_zero(n_pages, sizeof *p->uses);
    p->entries = size_alloc_zero(n_pages, sizeof *p->entries);
    p->ids = size_alloc(n_ids, sizeof *p->ids);
    p->buckets = size_alloc(p->n_buckets, sizeof *p->buckets);
    if (!p->free_list || !p->uses || !p->entries || !p->ids || !p->buckets) {
        kv_pool_free(p);
        return error_set(err, "out of memory for the list of %zu KV pages", n_pages);
    }
    for (size_t i = 0; i < p->n_buckets; i++) p->buckets[i] = -1;
    for (size_t i = 0; i < n_pages; i++) p->free_list[i] = (int32_t)(n_pages - 1 - i);
    p->n_free = n_pages;
    return true;
}

void kv_pool_free(struct kv_pool *p) {
    free(p->free_list);
    free(p->uses);
    free(p->entries);
    free(p->ids);
    free(p->buckets);
    *p = (struct kv_pool){0};
}

// ---- Idle pages, from the least to the most recently used

static void idle_remove(struct kv_pool *p, int32_t page) {
    struct kv_entry *e = &p->entries[page];
    if (e->older >= 0) p->entries[e->older].newer = e->newer;
    else p->oldest = e->newer;
    if (e->newer >= 0) p->entries[e->newer].older = e->older;
    else p->newest = e->older;
    p->n_idle--;
}

static void idle_add(struct kv_pool *p, int32_t page) {
    struct kv_entry *e = &p->entries[page];
    e->older = p->newest;
    e->newer = -1;
    if (p->newest >= 0) p->entries[p->newest].newer = page;
    else p->oldest = page;
    p->newest = page;
    p->n_idle++;
}

// ---- The cache

// The finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
static uint64_t mix(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static uint32_t bucket_of(const struct kv_pool *p, uint64_t parent, const int32_t *ids) {
    uint64_t h = mix(p->seed ^ parent);
    for (size_t i = 0; i < p->page_tokens; i++) h = mix(h ^ (uint64_t)(uint32_t)ids[i]);
    return (uint32_t)(h & (p->n_buckets - 1));
}

static int32_t *page_ids(const struct kv_pool *p, int32_t page) {
    return p->ids + (size_t)page * p->page_tokens;
}

static int32_t find(const struct kv_pool *p, uint32_t bucket, uint64_t parent, const int32_t *ids) {
    int32_t page = p->buckets[bucket];
    while (page >= 0 &&
           (p->entries[page].parent != parent || memcmp(page_ids(p, page), ids, p->page_tokens * sizeof *ids) != 0))
        page = p->entries[page].next_in_bucket;
    return page;
}

static void unlink_entry(struct kv_pool *p, int32_t page) {
    struct kv_entry *e = &p->entries[page];
    int32_t *at = &p->buckets[e->bucket];
    while (*at != page) at = &p->entries[*at].next_in_bucket;
    *at = e->next_in_bucket;
    e->serial = 0;
    p->n_cached--;
}

// The serial of a sequence's page in front of page n_chain. Serials have the top bit clear, tenants get it.
static uint64_t chain_end(const struct kv_pool *p, const struct kv_seq *seq) {
    return seq->n_chain ? p->entries[seq->pages[seq->n_chain - 1]].serial : seq->tenant | (uint64_t)1 << 63;
}

// Caches a full page behind the sequence's chain, or changes the sequence over to the page that is cached already.
static void chain_page(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids) {
    int32_t page = seq->pages[seq->n_chain];
    uint64_t parent = chain_end(p, seq);
    uint32_t bucket = bucket_of(p, parent, ids);
    int32_t same = find(p, bucket, parent, ids);
    if (same == page) { // a fork of this sequence cached it
        seq->n_chain++;
        return;
    }
    if (same >= 0) {
        kv_share(p, same);
        kv_drop(p, page);
        seq->pages[seq->n_chain++] = same;
        return;
    }
    struct kv_entry *e = &p->entries[page];
    *e = (struct kv_entry){.serial = ++p->last_serial,
                           .parent = parent,
                           .next_in_bucket = p->buckets[bucket],
                           .older = -1,
                           .newer = -1,
                           .bucket = bucket};
    p->buckets[bucket] = page;
    memcpy(page_ids(p, page), ids, p->page_tokens * sizeof *ids);
    p->n_cached++;
    seq->n_chain++;
}

void kv_forget(struct kv_pool *p, int32_t page) {
    if (p->entries[page].serial == 0) return;
    if (p->uses[page] == 0) {
        idle_remove(p, page);
        p->free_list[p->n_free++] = page;
    }
    unlink_entry(p, page);
}

// ---- Pages

int32_t kv_take(struct kv_pool *p) {
    if (p->n_free == 0) {
        if (p->n_idle == 0) return -1;
        kv_forget(p, p->oldest);
        p->n_evicted++;
    }
    int32_t page = p->free_list[--p->n_free];
    p->uses[page] = 1;
    return page;
}

void kv_share(struct kv_pool *p, int32_t page) {
    if (p->uses[page]++ == 0) idle_remove(p, page);
}

void kv_drop(struct kv_pool *p, int32_t page) {
    if (--p->uses[page] > 0) return;
    if (p->entries[page].serial) idle_add(p, page);
    else p->free_list[p->n_free++] = page;
}

bool kv_is_shared(const struct kv_pool *p, int32_t page) {
    return p->uses[page] > 1;
}

bool kv_is_cached(const struct kv_pool *p, int32_t page) {
    return p->entries[page].serial != 0;
}

// ---- Sequences

static size_t pages_for(const struct kv_pool *p, size_t n_tokens) {
    return (n_tokens + p->page_tokens - 1) / p->page_tokens;
}

size_t kv_match(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids, size_t n, size_t limit) {
    if (n > limit) n = limit;
    if (seq->tenant == KV_PRIVATE) return 0;
    for (; n - seq->n_kv >= p->page_tokens; seq->n_kv += p->page_tokens) {
        uint64_t parent = chain_end(p, seq);
        int32_t page = find(p, bucket_of(p, parent, ids + seq->n_kv), parent, ids + seq->n_kv);
        if (page < 0) break;
        kv_share(p, page);
        seq->pages[seq->n_pages++] = page;
        seq->n_chain++;
    }
    return seq->n_kv;
}

bool kv_reserve(struct kv_pool *p, struct kv_seq *seq, size_t n, struct kv_copy *copy) {
    size_t last = seq->n_kv / p->page_tokens, wanted = pages_for(p, seq->n_kv + n);
    bool half = seq->n_kv % p->page_tokens != 0, copies = half && kv_is_shared(p, seq->pages[last]);
    *copy = (struct kv_copy){-1, -1};
    if ((wanted > seq->n_pages ? wanted - seq->n_pages : 0) + copies > kv_available(p)) return false;
    if (copies) {
        *copy = (struct kv_copy){.from = seq->pages[last], .to = kv_take(p)};
        kv_drop(p, seq->pages[last]);
        seq->pages[last] = copy->to;
    } else if (half) {
        kv_forget(p, seq->pages[last]); // trimmed, and now written again: what the cache knows of it will be wrong
    }
    while (seq->n_pages < wanted) seq->pages[seq->n_pages++] = kv_take(p);
    return true;
}

void kv_chain(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids) {
    if (seq->tenant == KV_PRIVATE) return;
    while ((seq->n_chain + 1) * p->page_tokens <= seq->n_kv) {
        if (chain_end(p, seq) == 0) return; // a page in front was forgotten: what hangs behind it cannot be named
        chain_page(p, seq, ids + seq->n_chain * p->page_tokens);
    }
}

void kv_commit(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids, size_t n) {
    seq->n_kv += n;
    kv_chain(p, seq, ids);
}

void kv_trim(struct kv_pool *p, struct kv_seq *seq, size_t n) {
    if (n > seq->n_kv) n = seq->n_kv;
    while (seq->n_pages > pages_for(p, n)) kv_drop(p, seq->pages[--seq->n_pages]);
    if (seq->n_chain > n / p->page_tokens) seq->n_chain = n / p->page_tokens;
    seq->n_kv = n;
}

void kv_fork(struct kv_pool *p, struct kv_seq *to, const struct kv_seq *from) {
    if (from->n_pages) memcpy(to->pages, from->pages, from->n_pages * sizeof *to->pages);
    for (size_t i = 0; i < from->n_pages; i++) kv_share(p, from->pages[i]);
    to->n_pages = from->n_pages;
    to->n_kv = from->n_kv;
    to->n_chain = to->tenant == from->tenant ? from->n_chain : 0;
}

void kv_poison(struct kv_pool *p, struct kv_seq *seq) {
    for (size_t i = 0; i < seq->n_pages; i++) kv_forget(p, seq->pages[i]);
    kv_trim(p, seq, 0);
}

// ---- The check

static bool check_lists(const struct kv_pool *p, unsigned char *seen, struct error *err) {
    enum { FREE = 1, IDLE = 2, CACHED = 4 };
    for (size_t i = 0; i < p->n_free; i++) {
        int32_t page = p->free_list[i];
        if (seen[page]) return error_set(err, "page %d is free twice", page);
        seen[page] = FREE;
    }
    size_t n = 0;
    for (int32_t page = p->oldest, before = -1; page >= 0; before = page, page = p->entries[page].newer, n++) {
        if (seen[page]) return error_set(err, "page %d is idle and in another list", page);
        if (p->entries[page].older != before) return error_set(err, "page %d: broken link among idle pages", page);
        seen[page] = IDLE;
    }
    if (n != p->n_idle) return error_set(err, "%zu idle pages are linked, %zu counted", n, p->n_idle);
    n = 0;
    for (size_t b = 0; b < p->n_buckets; b++)
        for (int32_t page = p->buckets[b]; page >= 0; page = p->entries[page].next_in_bucket, n++) {
            if (seen[page] & CACHED) return error_set(err, "page %d is cached twice", page);
            if (seen[page] & FREE) return error_set(err, "page %d is free and cached", page);
            if (bucket_of(p, p->entries[page].parent, page_ids(p, page)) != b)
                return error_set(err, "page %d hangs in bucket %zu", page, b);
            seen[page] |= CACHED;
        }
    if (n != p->n_cached) return error_set(err, "%zu cached pages are linked, %zu counted", n, p->n_cached);
    for (size_t i = 0; i < p->n_pages; i++) {
        bool used = p->uses[i] > 0, cached = seen[i] & CACHED;
        if (used == ((seen[i] & (FREE | IDLE)) != 0))
            return error_set(err, "page %zu: %u uses, but list %d", i, p->uses[i], seen[i]);
        if (cached != (p->entries[i].serial != 0)) return error_set(err, "page %zu: serial without a bucket", i);
        if ((seen[i] & IDLE) && !cached) return error_set(err, "page %zu is idle and not cached", i);
    }
    return true;
}

bool kv_check(const struct kv_pool *p, struct error *err) {
    unsigned char *seen = calloc(p->n_pages + 1, 1);
    if (!seen) return error_set(err, "out of memory");
    bool ok = check_lists(p, seen, err);
    free(seen);
    return ok;
}
