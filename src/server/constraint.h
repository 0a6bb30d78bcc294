// constraint.h: what one choice may generate: how long it may think, and the form of its answer. Thinking itself is
// free.
#ifndef TANDEM_SERVER_CONSTRAINT_H
#define TANDEM_SERVER_CONSTRAINT_H

#include "server/generate.h"

struct constraint; // of one choice; the engine's thread

// Makes c->constraint if the generation asks for one.
bool constraint_for(const struct generation *g, struct choice *c, struct error *err);
void constraint_free(struct constraint *k); // NULL is fine
// The tokens that may come next; NULL: all.
const uint32_t *constraint_mask(struct constraint *k, const struct choice *c);
// A token came; `thought`: it belongs to the thinking. False: the answer is complete.
bool constraint_accept(struct constraint *k, int32_t id, bool thought);
const char *constraint_failed(const struct constraint *k); // NULL: it did not

#endif
