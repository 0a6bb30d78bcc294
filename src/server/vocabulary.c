// vocabulary.c: see vocabulary.h.
#include "server/vocabulary.h"

#include "base/size.h"

#include <stdlib.h>
#include <string.h>

struct entry {
    const unsigned char *bytes;
    size_t n;
    int32_t id;
    bool call;
};

static int compare(const void *a, const void *b) {
    const struct entry *x = a, *y = b;
    int order = memcmp(x->bytes, y->bytes, x->n < y->n ? x->n : y->n);
    if (order) return order;
    return x->n != y->n ? (x->n > y->n) - (x->n < y->n) : (x->id > y->id) - (x->id < y->id);
}

static bool is_text(const unsigned char *bytes, size_t n, const char *text) {
    return strlen(text) == n && memcmp(bytes, text, n) == 0;
}

// Tokens that mark the structure of a chat are no text, whatever bytes they show.
static bool is_mark(const unsigned char *bytes, size_t n) {
    static const char *const marks[] = {"<think>", "</think>", "<tool_response>", "</tool_response>"};
    for (size_t i = 0; i < sizeof marks / sizeof marks[0]; i++)
        if (is_text(bytes, n, marks[i])) return true;
    return false;
}

static size_t list_tokens(const struct tokenizer *tok, size_t n_vocab, struct entry *entries) {
    size_t n_entries = 0;
    for (int32_t id = 0; (size_t)id < n_vocab; id++) {
        size_t n = 0;
        const unsigned char *bytes = (const unsigned char *)tokenizer_token_bytes(tok, id, &n);
        if (!bytes || n == 0 || n >= MAX_TOKEN || tokenizer_is_special(tok, id) || is_mark(bytes, n)) continue;
        bool call = is_text(bytes, n, "<tool_call>") || is_text(bytes, n, "</tool_call>");
        entries[n_entries++] = (struct entry){.bytes = bytes, .n = n, .id = id, .call = call};
    }
    return n_entries;
}

// The branches of the tree in the order of a walk: first what is below a branch, then what is beside it. With
// v->branches NULL it only counts.
static void grow(struct vocabulary *v, const struct entry *entries, size_t n_entries) {
    size_t open[MAX_TOKEN + 1], depth = 0; // the branch of each byte of the entry before
    v->n = 0;
    for (size_t i = 0; i < n_entries; i++) {
        const struct entry *e = &entries[i];
        size_t common = 0;
        const struct entry *before = i ? &entries[i - 1] : NULL;
        while (before && common < before->n && common < e->n && before->bytes[common] == e->bytes[common]) common++;
        if (common == e->n) common--; // the same bytes again: a twin of the last branch
        for (; depth > common; depth--)
            if (v->branches) v->branches[open[depth - 1]].end = (uint32_t)v->n;
        for (; depth < e->n; depth++) {
            open[depth] = v->n;
            if (v->branches)
                v->branches[v->n] = (struct branch){.byte = e->bytes[depth], .depth = (uint16_t)depth, .id = -1};
            v->n++;
        }
        if (v->branches) v->branches[v->n - 1].id = e->id, v->branches[v->n - 1].call = e->call;
        if (e->n > v->longest) v->longest = e->n;
    }
    for (; v->branches && depth > 0; depth--) v->branches[open[depth - 1]].end = (uint32_t)v->n;
}

struct vocabulary *vocabulary_create(const struct tokenizer *tok, size_t n_vocab, const int32_t *end_ids,
                                     size_t n_end_ids, struct error *err) {
    struct vocabulary *v = size_alloc_zero(1, sizeof *v);
    struct entry *entries = size_alloc(n_vocab + 1, sizeof *entries);
    if (v) v->only_end = size_alloc_zero(n_vocab / 32 + 1, sizeof *v->only_end);
    bool ok = v && v->only_end && entries;
    if (ok) {
        v->n_words = (n_vocab + 31) / 32;
        for (size_t i = 0; i < n_end_ids; i++) v->only_end[end_ids[i] / 32] |= (uint32_t)1 << end_ids[i] % 32;
        size_t n = list_tokens(tok, n_vocab, entries);
        qsort(entries, n, sizeof *entries, compare);
        grow(v, entries, n);
        v->branches = size_alloc(v->n + 1, sizeof *v->branches);
        ok = v->branches != NULL;
        if (ok) grow(v, entries, n);
    }
    free(entries);
    if (ok) return v;
    error_set(err, "out of memory for the order of %zu tokens", n_vocab);
    vocabulary_free(v);
    return NULL;
}

void vocabulary_free(struct vocabulary *v) {
    if (!v) return;
    free(v->branches);
    free(v->only_end);
    free(v);
}
