// schema_parts.h: what the files that compile schemas share.
//
// Everything is compiled from a CONJUNCTION: schemas that must all hold, flat: references are followed and allOf is
// taken apart. anyOf and oneOf are ways to extend it, tried one after the other; what is left is merged type by type.
#ifndef TANDEM_SERVER_SCHEMA_PARTS_H
#define TANDEM_SERVER_SCHEMA_PARTS_H

#include "base/arena.h"
#include "server/numbers.h"
#include "server/texts.h"

enum outcome { REFUSED, NEVER, DONE }; // NEVER: nothing can satisfy it

enum { IS_NULL = 1, IS_BOOLEAN = 2, IS_INTEGER = 4, IS_FRACTION = 8, IS_STRING = 16, IS_ARRAY = 32, IS_OBJECT = 64 };
enum { IS_NUMBER = IS_INTEGER | IS_FRACTION, IS_ANY = 127 };

struct item { // one schema of a conjunction
    const struct pyjson *schema;
    bool any_of_done, one_of_done; // one of its ways was taken
};

struct items {
    struct item *list; // [n] the arena's
    size_t n, cap;
};

// Schemas of one value as they stand in the document, not flat yet.
struct schemas {
    const struct pyjson **list; // [n] the arena's
    size_t n, cap;
};

struct memo;    // a part that was compiled before
struct rewrite; // a keyword that was rewritten before
enum { MAX_WORK = 30000 };

struct compiler {
    struct grammar *g;
    struct arena *arena;
    const struct pyjson *root;
    const char *where;
    struct text_parts parts;
    size_t pattern_budget, work;
    size_t nesting;     // values inside one another
    char path[256];     // of the schema in hand, for messages
    struct memo *memos; // [n_memos] the arena's
    size_t n_memos, cap_memos;
    uint32_t *memo_table; // by hash, plus one; 0: empty
    struct rewrite *rewrites;
    struct error *err;
};

// schema.c
enum outcome refuse(struct compiler *c, const char *keyword, const char *why);
enum outcome no_memory(struct compiler *c);
bool schemas_add(struct compiler *c, struct schemas *s, const struct pyjson *schema);
// The part of the grammar that matches a value for which all of `s` hold. `name`: for messages; NULL: the same value.
enum outcome compile_part(struct compiler *c, const struct schemas *s, const char *name, uint32_t *part);
enum outcome flatten(struct compiler *c, const struct pyjson *schema, struct items *out);
enum outcome check_keywords(struct compiler *c, const struct pyjson *schema);
bool is_honoured(const char *key);
enum outcome target_of(struct compiler *c, const struct pyjson *schema, const struct pyjson **out); // of its $ref
bool literal(struct compiler *c, const struct pyjson *v, uint32_t next, uint32_t *out); // the value itself, as text

// schema_logic.c: adds what not, if and dependent... of a schema come to.
enum outcome flatten_logic(struct compiler *c, const struct pyjson *schema, struct items *out);
// Adds that `schema` does not hold. `key`: for messages.
enum outcome flatten_not(struct compiler *c, const struct pyjson *schema, const char *key, struct items *out);
const struct pyjson *schema_not(struct compiler *c, const struct pyjson *schema); // NULL: no memory
// A keyword of its own, known by its address: no string but these.
extern const char except_key[];

// schema_values.c: one type after the other
enum outcome read_types(struct compiler *c, const struct items *items, unsigned *types, bool *given);
unsigned type_of(const struct pyjson *v);
bool value_equal(const struct pyjson *a, const struct pyjson *b);
enum outcome read_text_form(struct compiler *c, const struct items *items, struct text_form *f);
enum outcome read_number_form(struct compiler *c, const struct items *items, bool integer, struct number_form *f);
enum outcome read_count(struct compiler *c, const struct pyjson *schema, const char *key, uint32_t *out, bool *there);
// The values of enum and const that satisfy everything. *given false: there is neither.
enum outcome read_values(struct compiler *c, const struct items *items, struct schemas *values, bool *given);
enum outcome compile_values(struct compiler *c, const struct items *items, uint32_t next, uint32_t *out);

// schema_objects.c
enum outcome compile_array(struct compiler *c, const struct items *items, uint32_t next, uint32_t *out);
enum outcome compile_object(struct compiler *c, const struct items *items, uint32_t next, uint32_t *out);

bool names_properties(const struct pyjson *schema); // any that may come: else objects of any properties are written

// schema_oneof.c: is no text that is written for `a` valid for `b`? Both flat. `lasting`: nor for `a` and whatever
// more.
enum outcome are_apart(struct compiler *c, const struct items *a, const struct items *b, bool lasting, int depth,
                       bool *apart);

#endif
