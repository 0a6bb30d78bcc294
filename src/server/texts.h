// texts.h: strings of a given form, as grammar: of some length, in some languages at once.
#ifndef TANDEM_SERVER_TEXTS_H
#define TANDEM_SERVER_TEXTS_H

#include "server/grammar.h"
#include "server/pattern.h"

enum { MAX_LANGUAGES = 6 };

struct text_form {
    uint32_t min, max; // characters; max: NO_LIMIT
    const struct language *languages[MAX_LANGUAGES];
    size_t n_languages;
};

// Sets of characters that the grammar has a part for already. All zero: none.
struct text_parts {
    struct text_part *list; // [n] the arena's
    size_t n, cap;
    size_t steps; // that products took, of all strings
};

// A JSON string of the form. With languages, characters are escaped only where they must be, so that each string is
// written in one way. False: it takes too many places; `err` says so.
bool text_compile(struct grammar *g, struct arena *arena, struct text_parts *parts, const struct text_form *form,
                  uint32_t next, uint32_t *out, struct error *err);
bool text_has(const struct text_form *form, const char *text, size_t n);

#endif
