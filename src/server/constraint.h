// constraint.h: what may be generated: the limit of thinking, and answers that must be JSON.
#ifndef TANDEM_SERVER_CONSTRAINT_H
#define TANDEM_SERVER_CONSTRAINT_H

#include "server/generate.h"

struct constraint; // of one choice; the engine's thread

// Makes c->constraint if the generation asks for one.
bool constraint_for(const struct generation *g, struct choice *c, struct error *err);
void constraint_free(struct constraint *k); // NULL is fine
// The tokens that may come next; NULL: all.
const uint32_t *constraint_mask(struct constraint *k, bool thinking, size_t n_reasoning);
void constraint_accept(struct constraint *k, int32_t id, bool thinking);

#endif
