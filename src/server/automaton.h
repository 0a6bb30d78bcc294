// automaton.h: a grammar at work: masks over a vocabulary's tokens that say which may come next.
//
// An AUTOMATON runs a grammar: sets of places become states when they are first met, each with its transitions and,
// when asked for, its mask. Requests with the same grammar share one, each with a CURSOR; any thread may call, one at a
// time for each cursor. What a mask says follows from the text alone, never from what others asked before. States are
// forgotten when there are too many; a grammar that takes too much time or memory fails by name.
#ifndef TANDEM_SERVER_AUTOMATON_H
#define TANDEM_SERVER_AUTOMATON_H

#include "base/error.h"
#include "server/grammar.h"
#include "server/vocabulary.h"

struct automaton;
// Takes the grammar. `calls`: <tool_call> and </tool_call> may come as tokens. With one reference. The vocabulary
// must outlive it.
struct automaton *automaton_create(const struct vocabulary *v, struct grammar *g, bool calls, struct error *err);
struct automaton *automaton_ref(struct automaton *a);
void automaton_unref(struct automaton *a);                                             // NULL is fine
bool automaton_is_for(const struct automaton *a, const struct grammar *g, bool calls); // made from an equal grammar?
bool automaton_is_shared(struct automaton *a);                                         // is there another reference?
size_t automaton_bytes(struct automaton *a);                                           // of memory, about
const char *automaton_failed(struct automaton *a);                                     // NULL: it did not

// A state, for a mask to be made ahead of its use.
struct automaton_place {
    uint64_t generation;
    int32_t state;
};
void automaton_prepare(struct automaton *a,
                       struct automaton_place place); // on another thread; of an old place: nothing

struct cursor;
struct cursor *cursor_create(struct automaton *a, struct error *err); // at the start
void cursor_free(struct cursor *c);                                   // NULL is fine
void cursor_reset(struct cursor *c);                                  // back to the start
// The tokens that may come next: never none, because end tokens come where nothing else can. bits[n_vocab / 32, up]
void cursor_mask(struct cursor *c, uint32_t *bits);
bool cursor_accept(struct cursor *c, const char *bytes, size_t n); // false: they do not match
bool cursor_complete(struct cursor *c);                            // the text may end here
bool cursor_only_end(struct cursor *c);                            // and must
const char *cursor_failed(struct cursor *c);                       // NULL: it did not
// Where it is; false: its mask is there already, or it has none.
bool cursor_place(struct cursor *c, struct automaton_place *place);
struct automaton *cursor_automaton(struct cursor *c);

#endif
