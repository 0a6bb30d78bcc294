// replies.c: see replies.h. A ring of the last replies, found by a hash and compared byte by byte.
#include "server/replies.h"

#include "base/size.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_REPLIES = 2048, MAX_BYTES = 64 << 20, MAX_ONE = 1 << 20 };

struct reply {
    uint64_t hash, tenant;
    char *text; // [n]
    size_t n;
    struct token_ids ids;
};

struct replies {
    pthread_mutex_t lock;
    struct reply ring[MAX_REPLIES]; // n from `first` on
    size_t first, n, bytes;
};

struct replies *replies_create(void) {
    struct replies *r = size_alloc_zero(1, sizeof *r);
    if (r) pthread_mutex_init(&r->lock, NULL);
    return r;
}

static size_t reply_bytes(const struct reply *p) {
    return p->n + p->ids.n * sizeof *p->ids.ids;
}

static void forget_oldest(struct replies *r) {
    struct reply *p = &r->ring[r->first];
    r->bytes -= reply_bytes(p);
    free(p->text);
    token_ids_free(&p->ids);
    *p = (struct reply){0};
    r->first = (r->first + 1) % MAX_REPLIES;
    r->n--;
}

void replies_free(struct replies *r) {
    if (!r) return;
    while (r->n) forget_oldest(r);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

static uint64_t hash_of(const char *text, size_t n) { // FNV-1a
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)text[i]) * 0x100000001B3u;
    return h;
}

static struct reply *find(struct replies *r, uint64_t tenant, const char *text, size_t n, uint64_t hash) {
    for (size_t i = r->n; i > 0; i--) { // the youngest first
        struct reply *p = &r->ring[(r->first + i - 1) % MAX_REPLIES];
        if (p->hash == hash && p->tenant == tenant && p->n == n && memcmp(p->text, text, n) == 0) return p;
    }
    return NULL;
}

void replies_add(struct replies *r, uint64_t tenant, const char *text, size_t n, const int32_t *ids, size_t n_ids) {
    if (n == 0 || n > MAX_ONE || n_ids > MAX_ONE) return;
    struct reply p = {.hash = hash_of(text, n), .tenant = tenant, .text = size_alloc(n, 1), .n = n};
    if (!p.text || !token_ids_append(&p.ids, ids, n_ids)) { // then it is tokenised again: slower, not wrong
        free(p.text);
        token_ids_free(&p.ids);
        return;
    }
    memcpy(p.text, text, n);
    pthread_mutex_lock(&r->lock);
    while (r->n && (r->n == MAX_REPLIES || r->bytes + reply_bytes(&p) > MAX_BYTES)) forget_oldest(r);
    r->ring[(r->first + r->n++) % MAX_REPLIES] = p;
    r->bytes += reply_bytes(&p);
    pthread_mutex_unlock(&r->lock);
}

bool replies_find(struct replies *r, uint64_t tenant, const char *text, size_t n, struct token_ids *ids) {
    if (n == 0) return false;
    pthread_mutex_lock(&r->lock);
    const struct reply *p = find(r, tenant, text, n, hash_of(text, n));
    bool ok = p && token_ids_append(ids, p->ids.ids, p->ids.n);
    pthread_mutex_unlock(&r->lock);
    return ok;
}

struct tenant_replies {
    struct replies *r;
    uint64_t tenant;
};

// One stretch between special tokens.
static bool encode_stretch(void *user, const struct tokenizer *tok, const char *text, size_t n, struct token_ids *ids,
                           struct error *err) {
    static const char head[] = "assistant\n";
    const struct tenant_replies *t = user;
    size_t skip = sizeof head - 1;
    if (n > skip && memcmp(text, head, skip) == 0) {
        struct token_ids said = {0};
        bool known = replies_find(t->r, t->tenant, text + skip, n - skip, &said);
        bool ok = !known || (tokenizer_encode(tok, head, skip, false, ids, err) &&
                             (token_ids_append(ids, said.ids, said.n) || error_set(err, "out of memory")));
        token_ids_free(&said);
        if (known || !ok) return ok;
    }
    return tokenizer_encode(tok, text, n, false, ids, err);
}

bool replies_render(struct replies *r, uint64_t tenant, const tandem_engine *e, const struct template_document *doc,
                    struct template_options options, struct token_ids *ids, struct error *err) {
    struct tenant_replies t = {r, tenant};
    return engine_render(e, doc, options, &(struct template_stretches){encode_stretch, &t}, ids, err);
}
