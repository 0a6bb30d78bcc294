// pages.c: see pages.h.
#include "engine/pages.h"

#include "base/size.h"

#include <stdlib.h>

bool page_pool_create(struct page_pool *p, size_t n_pages, struct error *err) {
    *p = (struct page_pool){.n_pages = n_pages, .n_free = n_pages};
    p->free_list = size_alloc(n_pages, sizeof *p->free_list);
    p->uses = size_alloc_zero(n_pages, sizeof *p->uses);
    if (!p->free_list || !p->uses || n_pages > INT32_MAX) {
        page_pool_free(p);
        return error_set(err, "out of memory for the list of %zu KV pages", n_pages);
    }
    for (size_t i = 0; i < n_pages; i++) p->free_list[i] = (int32_t)(n_pages - 1 - i);
    return true;
}

void page_pool_free(struct page_pool *p) {
    free(p->free_list);
    free(p->uses);
    *p = (struct page_pool){0};
}

int32_t page_take(struct page_pool *p) {
    if (p->n_free == 0) return -1;
    int32_t page = p->free_list[--p->n_free];
    p->uses[page] = 1;
    return page;
}

void page_share(struct page_pool *p, int32_t page) {
    p->uses[page]++;
}

void page_drop(struct page_pool *p, int32_t page) {
    if (--p->uses[page] == 0) p->free_list[p->n_free++] = page;
}

bool page_is_shared(const struct page_pool *p, int32_t page) {
    return p->uses[page] > 1;
}
