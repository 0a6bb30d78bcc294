// pages.h: which KV pages are free and how often each is used. Integers only: no tensor is in sight, so that it is
// tested without a model.
#ifndef TANDEM_ENGINE_PAGES_H
#define TANDEM_ENGINE_PAGES_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct page_pool {
    int32_t *free_list; // [n_pages] a stack of n_free
    uint32_t *uses;     // [n_pages] reference counts
    size_t n_pages, n_free;
};

bool page_pool_create(struct page_pool *p, size_t n_pages, struct error *err);
void page_pool_free(struct page_pool *p);

int32_t page_take(struct page_pool *p); // a free page with one use; -1: none left
void page_share(struct page_pool *p, int32_t page);
void page_drop(struct page_pool *p, int32_t page); // the last drop frees it
bool page_is_shared(const struct page_pool *p, int32_t page);

#endif
