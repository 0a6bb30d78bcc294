// replies.h: what the model said lately, as text and as the token ids that it was generated in. A later turn sends the
// text back; made of the same ids, its prompt finds the same KV pages, which tokenising the text anew might not.
#ifndef TANDEM_SERVER_REPLIES_H
#define TANDEM_SERVER_REPLIES_H

#include "engine/engine.h"

struct replies; // any thread

struct replies *replies_create(void); // NULL: no memory
void replies_free(struct replies *r);
// Remembers; the oldest are forgotten. `text` [n] is what the ids spell.
void replies_add(struct replies *r, uint64_t tenant, const char *text, size_t n, const int32_t *ids, size_t n_ids);
// Appends the ids of a tenant's reply. False: it is not known, or there is no memory.
bool replies_find(struct replies *r, uint64_t tenant, const char *text, size_t n, struct token_ids *ids);

// The ids of a chat document's prompt, with the model's own ids for what it said itself.
bool replies_render(struct replies *r, uint64_t tenant, const tandem_engine *e, const struct template_document *doc,
                    struct template_options options, struct token_ids *ids, struct error *err);

#endif
