// pattern.h: regular expressions (ECMA-262, what JSON Schema's "pattern" asks for) as automata over code points. What
// no finite automaton can say (back references) or what few schemas need (look-around, \b, \p) is refused by name.
#ifndef TANDEM_SERVER_PATTERN_H
#define TANDEM_SERVER_PATTERN_H

#include "base/arena.h"
#include "base/error.h"
#include "server/grammar.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct code_set {
    const struct code_range *ranges; // [n] in order, apart from one another
    size_t n;
};

struct language_edge {
    const struct code_set *set;
    uint32_t to;
};

struct language_state {
    const struct language_edge *edges; // [n]
    size_t n;
    bool accepts;
};

// A set of strings: those along whose characters an accepting state is reached from one of `starts`.
struct language {
    const struct language_state *states; // [n]
    size_t n;
    const uint32_t *starts; // [n_starts]
    size_t n_starts;
};

// The strings in which `pattern` matches somewhere. NULL: `err` says why; all memory is the arena's. `budget`: of work,
// which may be shared by many patterns.
enum { PATTERN_BUDGET = 150000 };
const struct language *pattern_language(struct arena *arena, const char *pattern, size_t n, size_t *budget,
                                        struct error *err);
// All strings but these. NULL: no memory.
struct language_name {
    const char *text; // UTF-8
    size_t n;
};
const struct language *language_except(struct arena *arena, const struct language_name *names, size_t n);
bool language_has(const struct language *l, const char *text, size_t n); // UTF-8
// The strings of a known "format", as a pattern: NULL for formats that only annotate.
const char *pattern_of_format(const char *format);

#endif
