// tokenizer_added.c: finding added tokens in text.
#include "text/tokenizer_added.h"

#include "base/size.h"
#include "text/unicode.h"

#include <stdlib.h>
#include <string.h>

bool added_set_add(struct added_set *set, const struct added_token *token, const char *text, size_t n,
                   struct error *err) {
    if (n > ADDED_MAX_BYTES)
        return error_set(err, "added token %d is %zu bytes long, at most %d allowed", token->id, n, ADDED_MAX_BYTES);
    if (set->n == set->cap) {
        size_t cap = set->cap ? set->cap * 2 : 32;
        struct added_token *tokens = size_realloc(set->tokens, cap, sizeof *tokens);
        if (!tokens) return error_set(err, "added tokens: out of memory");
        set->tokens = tokens;
        set->cap = cap;
    }
    struct added_token copy = *token;
    copy.n = n;
    copy.text = malloc(n + 1);
    if (!copy.text) return error_set(err, "added tokens: out of memory");
    memcpy(copy.text, text, n);
    copy.text[n] = 0;
    set->tokens[set->n++] = copy;
    if (n > 0) set->first[(unsigned char)text[0]] = true;
    return true;
}

static int compare_tokens(const void *left, const void *right) {
    const struct added_token *a = left, *b = right;
    int order = memcmp(a->text, b->text, a->n < b->n ? a->n : b->n);
    if (order) return order;
    return a->n != b->n ? (a->n < b->n ? -1 : 1) : (a->id > b->id) - (a->id < b->id);
}

void added_set_sort(struct added_set *set) {
    if (set->n > 1) qsort(set->tokens, set->n, sizeof *set->tokens, compare_tokens);
}

void added_set_free(struct added_set *set) {
    for (size_t i = 0; i < set->n; i++) free(set->tokens[i].text);
    free(set->tokens);
    *set = (struct added_set){0};
}

// The first token of [low, high), which share `depth` bytes, whose next byte is at least `byte`. Tokens that end at
// `depth` come first and count as less.
static size_t lower_bound(const struct added_set *set, size_t low, size_t high, size_t depth, unsigned byte) {
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        const struct added_token *t = &set->tokens[mid];
        if (t->n <= depth || (unsigned char)t->text[depth] < byte) low = mid + 1;
        else high = mid;
    }
    return low;
}

// The longest token that `text` begins with. The sorted list is walked like a trie: each byte narrows the range.
static const struct added_token *longest_at(const struct added_set *set, const char *text, size_t n) {
    const struct added_token *found = NULL;
    size_t low = 0, high = set->n;
    for (size_t depth = 0; depth < n && low < high; depth++) {
        unsigned byte = (unsigned char)text[depth];
        low = lower_bound(set, low, high, depth, byte);
        high = lower_bound(set, low, high, depth, byte + 1);
        if (low < high && set->tokens[low].n == depth + 1) found = &set->tokens[low];
    }
    return found;
}

static bool has_class(const char *text, size_t n, bool at_end, unsigned class, size_t *len) {
    uint32_t c;
    if (n == 0) return false;
    *len = at_end ? unicode_decode_last(text, n, &c) : unicode_decode(text, n, &c);
    return (unicode_classes(c) & class) != 0;
}

bool added_set_cut(const struct added_set *set, const char *text, size_t n, bool special, const struct added_sink *sink,
                   struct error *err) {
    size_t done = 0, at = 0, len;
    while (at < n && set->n > 0) {
        if (!set->first[(unsigned char)text[at]]) {
            at++;
            continue;
        }
        const struct added_token *t = longest_at(set, text + at, n - at);
        if (!t) {
            at++;
            continue;
        }
        size_t start = at, stop = at + t->n;
        at = stop;
        if (t->special && !special) continue;
        if (t->single_word && (has_class(text, start, true, UNICODE_WORD, &len) ||
                               has_class(text + stop, n - stop, false, UNICODE_WORD, &len)))
            continue;
        if (t->lstrip) {
            while (start > done && has_class(text + done, start - done, true, UNICODE_STRIP, &len)) start -= len;
        }
        if (t->rstrip) {
            while (has_class(text + stop, n - stop, false, UNICODE_STRIP, &len)) stop += len;
        }
        if (start > done && !sink->plain(sink->context, text + done, start - done, err)) return false;
        if (!sink->token(sink->context, t->id, err)) return false;
        done = stop;
    }
    return done >= n || sink->plain(sink->context, text + done, n - done, err);
}
