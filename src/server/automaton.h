// automaton.h: texts that may be generated, as an automaton over bytes, and from it masks over a vocabulary's tokens.
//
// A GRAMMAR is a nondeterministic automaton: nodes that match one byte of a range, nodes that lead to two others, and
// nodes that match any JSON value (which need a stack, jsonscan's). It is made once for a request. An AUTOMATON runs
// it: sets of nodes become states when they are first met, each with its transitions and, when asked for, its mask.
// States are forgotten when there are too many; work is counted, and a grammar that takes too much fails by name.
#ifndef TANDEM_SERVER_AUTOMATON_H
#define TANDEM_SERVER_AUTOMATON_H

#include "base/error.h"
#include "text/tokenizer.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_NODES = 100000 };

enum node_kind { NODE_BYTES, NODE_SPLIT, NODE_JSON, NODE_JSON_OBJECT, NODE_ACCEPT };

struct node {
    uint8_t kind, low, high; // NODE_BYTES: low <= byte <= high
    uint32_t next, other;    // other: NODE_SPLIT
};

struct grammar {
    struct node *nodes; // [n]
    size_t n, cap;
    uint32_t start;
    bool full; // a node could not be added: too many, or no memory
};

// Grammars are built from back to front: each call returns a node that matches something and goes on at `next`.
uint32_t grammar_accept(struct grammar *g);
uint32_t grammar_bytes(struct grammar *g, unsigned char low, unsigned char high, uint32_t next);
uint32_t grammar_split(struct grammar *g, uint32_t a, uint32_t b);
uint32_t grammar_json(struct grammar *g, bool object, uint32_t next); // any JSON value, or any object
uint32_t grammar_text(struct grammar *g, const char *text, size_t n, uint32_t next);
uint32_t grammar_hole(struct grammar *g); // a split, to be filled: for loops
void grammar_fill(struct grammar *g, uint32_t hole, uint32_t a, uint32_t b);
void grammar_free(struct grammar *g);

// A vocabulary's tokens in the order of their bytes, with the length that each has in common with the one before it.
struct vocabulary;
struct vocabulary *vocabulary_create(const struct tokenizer *tok, size_t n_vocab, const int32_t *end_ids,
                                     size_t n_end_ids, struct error *err);
void vocabulary_free(struct vocabulary *v);

struct automaton;
// Takes the grammar. `calls`: <tool_call> and </tool_call> may come as tokens.
struct automaton *automaton_create(const struct vocabulary *v, struct grammar *g, bool calls, struct error *err);
void automaton_free(struct automaton *a);  // NULL is fine
void automaton_reset(struct automaton *a); // back to the start
// The tokens that may come next: never none, because end tokens come where nothing else can. [n_vocab bits]
const uint32_t *automaton_mask(struct automaton *a);
bool automaton_accept(struct automaton *a, const char *bytes, size_t n); // false: they do not match
bool automaton_complete(struct automaton *a);                            // the text may end here
bool automaton_only_end(struct automaton *a);                            // and must
const char *automaton_failed(const struct automaton *a);                 // NULL: it did not

#endif
