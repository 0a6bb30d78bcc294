// masks.h: the automata of all requests: those with the same grammar share one, and what was worked out for one request
// stays for the next. A thread of its own makes masks while the engine computes the step that leads to them.
#ifndef TANDEM_SERVER_MASKS_H
#define TANDEM_SERVER_MASKS_H

#include "server/automaton.h"

struct masks;

// `max_bytes`: what automata that no request uses may take. The vocabulary must outlive it.
struct masks *masks_create(const struct vocabulary *v, size_t max_bytes, struct error *err);
void masks_free(struct masks *m); // NULL is fine; ends its thread
// Takes the grammar. With a reference for the caller, and with the first mask made. False: the grammar takes too much.
struct automaton *masks_automaton(struct masks *m, struct grammar *g, bool calls, struct error *err);
// The mask of where the cursor is will be asked for soon.
void masks_prepare(struct masks *m, struct cursor *c);

#endif
