// grammar.h: what texts may be generated, as a pushdown automaton over bytes: nodes that match one byte of a range,
// that lead to two others, that call a part of the grammar (which may be recursive) or repeat one, counting.
//
// Grammars are built from back to front: each call returns a node that matches something and goes on at `next`. A part
// that is called or repeated ends in grammar_return. The first failure to add a node sets `full`, and what is returned
// from then on means nothing.
#ifndef TANDEM_SERVER_GRAMMAR_H
#define TANDEM_SERVER_GRAMMAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_NODES = 400000, MAX_STACK = 192 }; // calls and repetitions inside one another

enum node_kind { NODE_BYTES, NODE_SPLIT, NODE_CALL, NODE_REPEAT, NODE_RETURN, NODE_ACCEPT };

struct node {
    uint8_t kind, low, high, unused; // NODE_BYTES: low <= byte <= high
    uint32_t next;
    uint32_t other; // NODE_SPLIT: the other way; NODE_CALL: what is called; NODE_REPEAT: in `repeats`
};

#define NO_LIMIT UINT32_MAX

struct repeat {
    uint32_t body, min, max; // max: NO_LIMIT
};

// Parts that many places call. 0: not made yet; else the node, plus one.
struct common_parts {
    uint32_t back, space, character, value;
};

struct grammar {
    struct node *nodes; // [n]
    size_t n, cap;
    struct repeat *repeats; // [n_repeats]
    size_t n_repeats, cap_repeats;
    struct common_parts common;
    uint32_t start;
    bool full; // a node could not be added: too many, or no memory
};

uint32_t grammar_accept(struct grammar *g); // the whole text may end here
uint32_t grammar_return(struct grammar *g); // the end of a part
uint32_t grammar_bytes(struct grammar *g, unsigned char low, unsigned char high, uint32_t next);
uint32_t grammar_byte(struct grammar *g, char byte, uint32_t next);
uint32_t grammar_text(struct grammar *g, const char *text, size_t n, uint32_t next);
uint32_t grammar_split(struct grammar *g, uint32_t a, uint32_t b);
uint32_t grammar_hole(struct grammar *g); // a split, to be filled: for loops. Unfilled it matches nothing
void grammar_fill(struct grammar *g, uint32_t hole, uint32_t a, uint32_t b);
uint32_t grammar_call(struct grammar *g, uint32_t part, uint32_t next);
// min to max times (NO_LIMIT) the part, which matches one byte or more.
uint32_t grammar_repeat(struct grammar *g, uint32_t part, uint32_t min, uint32_t max, uint32_t next);

// ---- Pieces of JSON

uint32_t grammar_space(struct grammar *g, uint32_t next); // nothing, a space, or a line break and spaces
uint32_t grammar_string(struct grammar *g, uint32_t min, uint32_t max, uint32_t next); // characters, in quotes
uint32_t grammar_digits(struct grammar *g, int n, uint32_t next);                      // 1 to n
uint32_t grammar_number(struct grammar *g, uint32_t next);                             // any, with bounded digits
uint32_t grammar_json(struct grammar *g, bool object, uint32_t next);                  // any JSON value, or any object

// A range of code points.
struct code_range {
    uint32_t low, high;
};
// One of these code points as a string's character, escaped only where JSON asks for it, the way most writers do.
// Ranges are in order and do not overlap; surrogates in them match nothing.
uint32_t grammar_code(struct grammar *g, const struct code_range *ranges, size_t n, uint32_t next);

// ---- The rest

struct grammar_mark { // for grammar_rewind: forgets what was added since
    size_t n, n_repeats;
};
struct grammar_mark grammar_mark(const struct grammar *g);
void grammar_rewind(struct grammar *g, struct grammar_mark mark);
bool grammar_copy(const struct grammar *from, struct grammar *to); // false: no memory
void grammar_free(struct grammar *g);
// The most calls inside one another that each node needs to get to the end of its part; UINT8_MAX: it cannot, within
// MAX_STACK. needs[g->n]. False: the grammar is too entangled.
bool grammar_needs(const struct grammar *g, uint8_t *needs);

#endif
