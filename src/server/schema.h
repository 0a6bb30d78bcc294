// schema.h: from a JSON Schema (draft 2020-12) to the grammar of the JSON texts that it allows. A keyword is honoured
// or refused by name, never overlooked; every text that the grammar allows is valid. Not every valid text is allowed
// (docs/SERVING.md): properties come in the order of the schema, white space is bounded, a schema without a type takes
// those that its keywords are about, and properties that it does not name come only where it says so.
#ifndef TANDEM_SERVER_SCHEMA_H
#define TANDEM_SERVER_SCHEMA_H

#include "base/error.h"
#include "server/grammar.h"
#include "text/pyjson.h"

// Appends the grammar of `schema` in front of `next`. `where`: for messages, such as "response_format". False: `err`
// names the keyword and its place.
bool schema_compile(struct grammar *g, const struct pyjson *schema, const char *where, uint32_t next, uint32_t *start,
                    struct error *err);

#endif
