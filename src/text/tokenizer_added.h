// tokenizer_added.h: the added tokens of a tokenizer: texts that become one id before anything else looks at them.
#ifndef TANDEM_TEXT_TOKENIZER_ADDED_H
#define TANDEM_TEXT_TOKENIZER_ADDED_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { ADDED_MAX_BYTES = 1024 }; // of one token's text, which bounds the cost of looking for it

struct added_token {
    char *text;
    size_t n;
    int32_t id;
    bool special, lstrip, rstrip, single_word;
};

// All zero is empty. Sorted by added_set_sort before the first search.
struct added_set {
    struct added_token *tokens;
    size_t n, cap;
    bool first[256]; // bytes that some token begins with
};

bool added_set_add(struct added_set *set, const struct added_token *token, const char *text, size_t n,
                   struct error *err); // copies the text
void added_set_sort(struct added_set *set);
void added_set_free(struct added_set *set);

// Cuts `text` at the set's tokens and calls, in order, `plain` for the text between them (never empty) and `token` for
// each one found. Leftmost, then longest. Without `special`, tokens flagged special are found and passed over: they are
// plain text, and other tokens that begin inside them stay hidden, as in `tokenizers`.
struct added_sink {
    bool (*plain)(void *context, const char *text, size_t n, struct error *err);
    bool (*token)(void *context, int32_t id, struct error *err);
    void *context;
};
bool added_set_cut(const struct added_set *set, const char *text, size_t n, bool special, const struct added_sink *sink,
                   struct error *err);

#endif
