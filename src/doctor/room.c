// room.c: see room.h.
#include "doctor/room.h"

#include "base/size.h"
#include "ops/kv_page.h"

#include <stdlib.h>

enum { PIECE_BYTES = 32 << 20, ALIGNMENT = 256 };

static void *take(struct room *r, size_t bytes, struct error *err) {
    size_t n;
    if (!size_align_up(bytes ? bytes : 1, ALIGNMENT, &n)) return error_set(err, "%zu bytes are too many", bytes), NULL;
    for (size_t i = 0; i < r->n; i++) {
        struct room_piece *p = &r->pieces[i];
        if (p->bytes - p->used < n) continue;
        p->used += n;
        return p->memory + p->used - n;
    }
    if (r->n == ROOM_PIECES) return error_set(err, "the device's memory is in too many pieces"), NULL;
    struct room_piece *p = &r->pieces[r->n];
    *p = (struct room_piece){.bytes = n > PIECE_BYTES ? n : PIECE_BYTES, .used = n};
    p->memory = r->device->alloc(r->device, p->bytes, "an examination", err);
    if (!p->memory) return NULL;
    r->n++;
    return p->memory;
}

void *room_take(struct room *r, size_t bytes, struct error *err) {
    void *memory = take(r, bytes, err);
    if (memory) r->device->fill(r->device, memory, 0xFF, bytes);
    return memory;
}

void *room_put(struct room *r, const void *from, size_t bytes, struct error *err) {
    void *memory = take(r, bytes, err);
    if (memory) r->device->put(r->device, memory, from, bytes);
    return memory;
}

void room_empty(struct room *r) {
    for (size_t i = 0; i < r->n; i++) r->pieces[i].used = 0;
}

void room_close(struct room *r) {
    for (size_t i = 0; i < r->n; i++) r->device->free(r->device, r->pieces[i].memory);
    r->n = 0;
}

bool room_put_batch(struct room *r, const struct batch *b, struct batch *placed, struct error *err) {
    *placed = *b;
    placed->host = b;
    const struct {
        const int32_t *from;
        const int32_t **to;
        size_t n;
    } parts[] = {{b->token, &placed->token, b->n_tokens},
                 {b->position, &placed->position, b->n_tokens},
                 {b->seq, &placed->seq, b->n_tokens},
                 {b->seq_start, &placed->seq_start, b->n_seqs + 1},
                 {b->page_start, &placed->page_start, b->n_seqs + 1},
                 {b->kv_len, &placed->kv_len, b->n_seqs},
                 {b->logit_rows, &placed->logit_rows, b->n_logit_rows},
                 {b->pages, &placed->pages, b->page_start ? (size_t)b->page_start[b->n_seqs] : 0}};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (!parts[i].from) continue;
        *parts[i].to = room_put(r, parts[i].from, parts[i].n * sizeof(int32_t), err);
        if (!*parts[i].to) return false;
    }
    return true;
}

// Each head of each page, from one order to the other.
static void arrange(const struct kv_layer *kv, enum kv_side side, bool to_host, unsigned char *host,
                    unsigned char *own) {
    size_t head = KV_PAGE_TOKENS * kv_row_bytes(kv), n = kv->n_pages * kv->n_kv_heads;
    for (size_t i = 0; i < n; i++) kv_arrange(kv, side, to_host, host + i * head, own + i * head);
}

bool room_put_pages(struct room *r, const struct kv_layer *host, struct kv_layer *placed, struct error *err) {
    size_t bytes = host->n_pages * kv_page_bytes(host);
    unsigned char *own = size_alloc(bytes, 1);
    *placed = *host;
    if (!own) return error_set(err, "out of memory for %zu KV pages", host->n_pages);
    arrange(host, KV_K, false, host->k, own);
    placed->k = room_put(r, own, bytes, err);
    arrange(host, KV_V, false, host->v, own);
    placed->v = placed->k ? room_put(r, own, bytes, err) : NULL;
    free(own);
    return placed->v != NULL;
}

bool room_get_pages(struct room *r, const struct kv_layer *placed, struct kv_layer *host, struct error *err) {
    size_t bytes = host->n_pages * kv_page_bytes(host);
    unsigned char *own = size_alloc(bytes, 1);
    if (!own) return error_set(err, "out of memory for %zu KV pages", host->n_pages);
    r->device->get(r->device, own, placed->k, bytes);
    arrange(host, KV_K, true, host->k, own);
    r->device->get(r->device, own, placed->v, bytes);
    arrange(host, KV_V, true, host->v, own);
    free(own);
    return true;
}
