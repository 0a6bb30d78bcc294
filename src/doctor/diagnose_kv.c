// diagnose_kv.c: see diagnose_kv.h.
#include "doctor/diagnose_kv.h"

#include "base/size.h"
#include "ops/kv_page.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// One position of one prefix: K and V of every layer, as stored.
struct position_kv {
    uint64_t key, parent; // of the tokens up to this one, and up to the one before
    int32_t position;
    bool *stored;         // [n_layers]
    unsigned char *bytes; // [n_layers, 2, row_bytes]
};

struct kv_shadow {
    size_t n_layers, n_kv_heads;
    size_t head_bytes;        // of one head; 0 before the first store
    unsigned char *room;      // for a row, of any type, as it stands in its page
    struct position_kv *list; // [n]
    size_t n, cap;
    struct arena arena;
};

struct kv_shadow *kv_shadow_create(const struct model_config *c, struct error *err) {
    struct kv_shadow *s = size_alloc_zero(1, sizeof *s);
    if (s) *s = (struct kv_shadow){.n_layers = c->n_layers, .n_kv_heads = c->n_kv_heads};
    if (s && (s->room = arena_alloc(&s->arena, c->head_dim, sizeof(float)))) return s;
    kv_shadow_free(s);
    return error_set(err, "out of memory"), NULL;
}

void kv_shadow_free(struct kv_shadow *s) {
    if (!s) return;
    arena_free(&s->arena);
    free(s->list);
    free(s);
}

// Of the tokens up to and with `position`.
static uint64_t prefix_key(const struct walk_sequence *q, int32_t position) {
    uint64_t h = 0x9E3779B97F4A7C15u;
    for (int32_t i = 0; i <= position && (size_t)i < q->n; i++) {
        h = (h ^ (uint64_t)(uint32_t)q->ids[i]) * 0xBF58476D1CE4E5B9u;
        h ^= h >> 29;
    }
    return h;
}

static struct position_kv *find(const struct kv_shadow *s, uint64_t key, int32_t position) {
    for (size_t i = s->n; i-- > 0;)
        if (s->list[i].key == key && s->list[i].position == position) return &s->list[i];
    return NULL;
}

static struct position_kv *find_or_add(struct kv_shadow *s, uint64_t key, uint64_t parent, int32_t position) {
    struct position_kv *p = find(s, key, position);
    if (p) return p;
    if (s->n == s->cap) {
        size_t cap = s->cap ? 2 * s->cap : 64;
        struct position_kv *list = size_realloc(s->list, cap, sizeof *list);
        if (!list) return NULL;
        s->list = list;
        s->cap = cap;
    }
    p = &s->list[s->n];
    *p = (struct position_kv){.key = key, .parent = parent, .position = position};
    p->stored = arena_alloc_zero(&s->arena, s->n_layers, sizeof *p->stored);
    p->bytes = arena_alloc(&s->arena, s->n_layers, 2 * s->n_kv_heads * s->head_bytes);
    if (!p->stored || !p->bytes) return NULL;
    s->n++;
    return p;
}

static unsigned char *shadow_row(const struct kv_shadow *s, const struct position_kv *p, int layer, int is_v) {
    return p->bytes + (2 * (size_t)layer + (size_t)is_v) * s->n_kv_heads * s->head_bytes;
}

// ---- Places --------------------------------------------------------------------------------------------------------

// How a mistaken writer or reader finds a slot.
struct way {
    const char *name, *detail;
    int slot, page, head, seq; // added to the right index, cyclic
    bool swapped;              // K where V belongs
    bool nhd;                  // [slot][head]
    bool plain;                // page i of the store
    bool next;                 // of the next position, which may lie on the next page
};

static const struct way right_way = {0};
static const struct way ways[] = {
    {.name = "K and V swapped", .detail = "K stands in V's pages and V in K's", .swapped = true},
    {.name = "KV written one slot late", .detail = "position p stands in the slot of p + 1", .next = true},
    {.name = "KV written one slot late", .detail = "one slot further, within the page", .slot = 1},
    {.name = "KV written one slot early", .detail = "one slot before", .slot = -1},
    {.name = "NHD read as HND", .detail = "pages are written as [slot][head][channel]", .nhd = true},
    {.name = "page order permuted", .detail = "on the next page of the sequence", .page = 1},
    {.name = "page order permuted", .detail = "on the page before", .page = -1},
    {.name = "page list ignored", .detail = "on page i of the store", .plain = true},
    {.name = "page shared between sequences", .detail = "on another sequence's page", .seq = 1},
    {.name = "KV head off by one", .detail = "under the head after", .head = 1},
    {.name = "KV head off by one", .detail = "under the head before", .head = -1},
};

static size_t cyclic(size_t at, int by, size_t n) {
    return (at + n + (size_t)(by + (int)n)) % n;
}

// The row of one head of one position of one sequence, copied to `room`; NULL: outside.
static const unsigned char *slot_of(const struct kv_layer *kv, const struct batch *b, size_t seq, size_t position,
                                    size_t head, int is_v, const struct way *way, unsigned char *room) {
    if (way->next) position++;
    seq = cyclic(seq, way->seq, b->n_seqs);
    size_t n_pages = (size_t)(b->page_start[seq + 1] - b->page_start[seq]);
    size_t index = position / KV_PAGE_TOKENS, slot = cyclic(position % KV_PAGE_TOKENS, way->slot, KV_PAGE_TOKENS);
    if (way->page) index = cyclic(index, way->page, n_pages);
    if (index >= n_pages && !way->plain) return NULL;
    size_t page = way->plain ? index : (size_t)b->pages[(size_t)b->page_start[seq] + index];
    if (page >= kv->n_pages) return NULL;
    head = cyclic(head, way->head, kv->n_kv_heads);
    size_t row = way->nhd ? (page * KV_PAGE_TOKENS + slot) * kv->n_kv_heads + head
                          : (page * kv->n_kv_heads + head) * KV_PAGE_TOKENS + slot;
    enum kv_side side = is_v != (int)way->swapped ? KV_V : KV_K;
    kv_read(kv, side, side == KV_V ? kv->v : kv->k, row, room);
    return room;
}

static float element_at(const struct kv_layer *kv, const unsigned char *row, size_t c) {
    return kv_channel(kv->type, row, c);
}

// The first channel that differs, of two rows of which one does; the last, when only their encoding does.
static size_t first_difference(const struct kv_layer *kv, const unsigned char *a, const unsigned char *b) {
    size_t c = 0;
    while (c + 1 < kv->head_dim && float_bits_of(element_at(kv, a, c)) == float_bits_of(element_at(kv, b, c))) c++;
    return c;
}

// ---- Storing -------------------------------------------------------------------------------------------------------

// What a store should have left in row (token, head) of K or V.
struct stored {
    const struct kv_layer *kv;
    const struct batch *b;
    const float *k, *v;
    unsigned char *room; // for a row
};

static const float *source(const struct stored *s, size_t t, size_t head, int is_v) {
    return (is_v ? s->v : s->k) + (t * s->kv->n_kv_heads + head) * s->kv->head_dim;
}

// Row (token, head) as it should be, and whether it is found `way`.
static bool found_there(const struct stored *s, size_t t, size_t head, int is_v, const struct way *way,
                        unsigned char *row) {
    size_t bytes = kv_row_bytes(s->kv);
    kv_round(s->kv->type, source(s, t, head, is_v), row, s->kv->head_dim);
    const unsigned char *at =
        slot_of(s->kv, s->b, (size_t)s->b->seq[t], (size_t)s->b->position[t], head, is_v, way, s->room);
    return at && memcmp(at, row, bytes) == 0;
}

// Whether the bits are those of another rounding: cut off.
static bool is_cut(const struct stored *s, size_t t, size_t head, int is_v) {
    if (s->kv->type != DTYPE_BF16) return false;
    const float *from = source(s, t, head, is_v);
    const unsigned char *at =
        slot_of(s->kv, s->b, (size_t)s->b->seq[t], (size_t)s->b->position[t], head, is_v, &right_way, s->room);
    for (size_t c = 0; c < s->kv->head_dim; c++) {
        uint32_t u;
        memcpy(&u, &from[c], 4);
        if (float_bits_of(element_at(s->kv, at, c)) != (u & 0xFFFF0000u)) return false;
    }
    return true;
}

static void name_store(const struct stored *s, unsigned char *row, struct finding *f) {
    double best = 0, second = 0, cut = 0, all = 0;
    const struct way *is = NULL;
    for (size_t k = 0; k < sizeof ways / sizeof ways[0]; k++) {
        double hits = 0, n = 0;
        for (size_t i = 0; i < 2 * s->b->n_tokens * s->kv->n_kv_heads; i++) {
            size_t t = i / 2 / s->kv->n_kv_heads, head = i / 2 % s->kv->n_kv_heads;
            if (found_there(s, t, head, (int)(i % 2), &right_way, row)) continue;
            hits += found_there(s, t, head, (int)(i % 2), &ways[k], row);
            if (k == 0) cut += is_cut(s, t, head, (int)(i % 2));
            n++;
        }
        if (n > 0) hits /= n;
        if (k == 0) all = n;
        if (hits > best) {
            second = is && strcmp(is->name, ways[k].name) == 0 ? second : best;
            best = hits;
            is = &ways[k];
        } else if (hits > second && is && strcmp(is->name, ways[k].name) != 0) {
            second = hits;
        }
    }
    if (all > 0 && cut == all) finding_name(f, 0.95, "KV cut instead of rounded", "the low bits are dropped");
    else if (is && best >= 0.5)
        finding_name(f, 0.98 * best * (best > second ? 1 : 0.5), is->name,
                     "%s; %.4g%% of the misplaced rows are found so", is->detail, 100 * best);
    else finding_name(f, 0.5, "KV not stored", "the rows stand nowhere near");
}

bool kv_shadow_store(struct kv_shadow *s, const char *op, int layer, const struct kv_layer *kv, const struct batch *b,
                     const struct walk_sequence *const *of_seq, const float *k, const float *v, struct finding *f) {
    struct stored job = {kv, b, k, v, s->room};
    size_t head_bytes = s->head_bytes = kv_row_bytes(kv);
    unsigned char *row = size_alloc(head_bytes, 1);
    bool ok = row != NULL;
    for (size_t i = 0; ok && i < 2 * b->n_tokens * kv->n_kv_heads; i++) {
        size_t t = i / 2 / kv->n_kv_heads, head = i / 2 % kv->n_kv_heads;
        int is_v = (int)(i % 2);
        if (!found_there(&job, t, head, is_v, &right_way, row)) {
            const unsigned char *at =
                slot_of(kv, b, (size_t)b->seq[t], (size_t)b->position[t], head, is_v, &right_way, s->room);
            size_t c = at ? first_difference(kv, at, row) : 0;
            finding_place(f, op, layer, "K and V stand in their slots");
            f->fault.head = (int)head;
            f->fault.position = b->position[t];
            f->fault.channel = (int)c;
            f->fault.expected = (double)element_at(kv, row, c);
            f->fault.found = at ? (double)element_at(kv, at, c) : 0;
            fault_say(&f->fault,
                      "%s, layer %d: %s of position %d, head %zu, channel %zu: expected %.9g in its slot, found %.9g",
                      op, layer, is_v ? "V" : "K", b->position[t], head, c, f->fault.expected, f->fault.found);
            name_store(&job, row, f);
            ok = false;
            break;
        }
        const struct walk_sequence *q = of_seq[b->seq[t]];
        struct position_kv *p =
            find_or_add(s, prefix_key(q, b->position[t]), prefix_key(q, b->position[t] - 1), b->position[t]);
        ok = p != NULL;
        if (!ok) break;
        memcpy(shadow_row(s, p, layer, is_v) + head * head_bytes, row, head_bytes);
        p->stored[layer] = true;
    }
    free(row);
    return ok;
}

// ---- Reading -------------------------------------------------------------------------------------------------------

// What is wrong with one slot: the sequence, position and head that should be there.
struct slot_fault {
    const struct kv_shadow *s;
    int layer;
    const struct kv_layer *kv;
    const unsigned char *at;   // what is there
    const unsigned char *want; // what was stored for this prefix; NULL: nothing ever was
    size_t head;
    int is_v;
    int32_t position;
    uint64_t parent; // of the prefix
};

// Does the row stand in the same slot of some other page?
static bool stands_elsewhere(const struct slot_fault *f, size_t *page) {
    size_t bytes = f->s->head_bytes, slot = (size_t)f->position % KV_PAGE_TOKENS;
    const unsigned char *data = f->is_v ? f->kv->v : f->kv->k;
    for (*page = 0; *page < f->kv->n_pages; ++*page) {
        kv_read(f->kv, f->is_v ? KV_V : KV_K, data, kv_row(f->kv, *page, f->head, slot), f->s->room);
        if (memcmp(f->s->room, f->want, bytes) == 0) return true;
    }
    return false;
}

// Whose K or V a slot holds instead.
static void name_content(const struct slot_fault *f, struct finding *out) {
    size_t bytes = f->s->head_bytes, page;
    bool blank = true;
    for (size_t c = 0; c < f->kv->head_dim; c++)
        blank = blank && !(element_at(f->kv, f->at, c) == element_at(f->kv, f->at, c));
    for (size_t i = 0; i < 2 * f->s->n; i++) {
        const struct position_kv *p = &f->s->list[i / 2];
        int other = (int)(i % 2);
        if (!p->stored[f->layer]) continue;
        if (memcmp(shadow_row(f->s, p, f->layer, other) + f->head * bytes, f->at, bytes) != 0) continue;
        if (other != f->is_v) finding_name(out, 0.9, "K and V swapped", "the slot holds the other of the two");
        else if (!f->want && f->position > 0 && p->position == f->position && p->parent == f->parent)
            finding_name(out, 0.9, "stale KV kept", "position %d still holds the token that stood there before",
                         f->position);
        else if (!f->want && p->position == f->position)
            finding_name(out, 0.9, "another prompt's page", "position %d holds that of a sequence with other tokens",
                         f->position);
        else if (p->position == f->position)
            finding_name(out, 0.9, "page shared between sequences",
                         "position %d of another sequence: two sequences write to one page", f->position);
        else if (p->position + 1 == f->position)
            finding_name(out, 0.85, "KV written one slot late", "the slot holds position %d", p->position);
        else
            finding_name(out, 0.8, "page shared between sequences",
                         "the slot holds position %d of some sequence: its page was given away", p->position);
        return;
    }
    if (f->want && stands_elsewhere(f, &page))
        finding_name(out, 0.85, "page not copied", "page %zu holds it, which is not this sequence's any more", page);
    else if (blank) finding_name(out, 0.85, "stale tail of a page read", "the slot was never written");
    else finding_name(out, 0.5, "stale KV", "the slot holds what no step of this walk stored");
}

// Compares one head of one position. False: finding is filled.
static bool slot_ok(const struct slot_fault *f, const char *op, struct finding *out) {
    if (f->want && f->at && memcmp(f->at, f->want, f->s->head_bytes) == 0) return true;
    size_t c = f->want && f->at ? first_difference(f->kv, f->at, f->want) : 0;
    finding_place(out, op, f->layer, "pages hold what was stored");
    out->fault.head = (int)f->head;
    out->fault.position = f->position;
    out->fault.channel = (int)c;
    if (f->at) out->fault.found = (double)element_at(f->kv, f->at, c);
    if (f->want) out->fault.expected = (double)element_at(f->kv, f->want, c);
    if (f->want)
        fault_say(&out->fault,
                  "KV of layer %d: %s of position %d, head %zu, channel %zu was stored as %.9g and is now %.9g",
                  f->layer, f->is_v ? "V" : "K", f->position, f->head, c, out->fault.expected, out->fault.found);
    else
        fault_say(&out->fault, "KV of layer %d: position %d is read, but was never computed for these tokens", f->layer,
                  f->position);
    if (f->at) name_content(f, out);
    return false;
}

bool kv_shadow_check(const struct kv_shadow *s, const char *op, int layer, const struct kv_layer *kv,
                     const struct batch *b, const struct walk_sequence *const *of_seq, struct finding *f) {
    size_t bytes = s->head_bytes;
    for (size_t q = 0; q < b->n_seqs; q++) {
        for (int32_t j = 0; j < b->kv_len[q]; j++) {
            const struct position_kv *p = find(s, prefix_key(of_seq[q], j), j);
            bool known = p && p->stored[layer];
            for (size_t i = 0; i < 2 * kv->n_kv_heads; i++) {
                struct slot_fault slot = {.s = s,
                                          .layer = layer,
                                          .kv = kv,
                                          .head = i / 2,
                                          .is_v = (int)(i % 2),
                                          .position = j,
                                          .parent = prefix_key(of_seq[q], j - 1)};
                slot.at = slot_of(kv, b, q, (size_t)j, slot.head, slot.is_v, &right_way, s->room);
                slot.want = known ? shadow_row(s, p, layer, slot.is_v) + slot.head * bytes : NULL;
                if (!slot_ok(&slot, op, f)) return false;
            }
        }
    }
    return true;
}
