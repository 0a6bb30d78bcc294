// pyjson.h: JSON values as Python's json module sees them, for what a chat template prints.
//
// A template writes tools and arguments with json.dumps, so a value must come back out as Python would write it:
// members in the order they came, integers of any length digit by digit, floats as repr() prints them. jansson keeps
// neither long integers nor the difference between 1e400 and an error; configuration files, which need neither, use
// format/json.h. Values live in an arena and are never freed one by one, so depth costs no stack on the way out.
#ifndef TANDEM_TEXT_PYJSON_H
#define TANDEM_TEXT_PYJSON_H

#include "base/arena.h"
#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>

enum { PYJSON_MAX_DEPTH = 900 }; // Python's own limit is a little under 1,000

enum pyjson_type {
    PYJSON_NULL,
    PYJSON_FALSE,
    PYJSON_TRUE,
    PYJSON_INT,
    PYJSON_FLOAT,
    PYJSON_STRING,
    PYJSON_ARRAY,
    PYJSON_OBJECT
};

struct pyjson {
    enum pyjson_type type;
    double number;               // PYJSON_FLOAT; infinite where the text overflows a double, as in Python
    const char *text;            // [n_text] PYJSON_STRING: valid UTF-8, NUL may occur inside, NUL-terminated;
    size_t n_text;               // PYJSON_INT: its digits
    struct pyjson *first, *last; // PYJSON_ARRAY, PYJSON_OBJECT: what is inside, in order
    size_t n;                    // and how many
    const char *key;             // [n_key] of a member of an object, as `text`
    size_t n_key;
    struct pyjson *next; // the next item or member
};

// Parses one JSON text (RFC 8259, nothing else: no NaN, no comments) into `arena`. Errors, with line and column and
// `name` in front: bad syntax, invalid UTF-8, lone surrogates, duplicate keys, depth beyond PYJSON_MAX_DEPTH. A failed
// parse leaves its pieces to the arena. Keys are compared after unescaping; time is n log n.
struct pyjson *pyjson_parse(struct arena *arena, const char *text, size_t n, const char *name, struct error *err);

// Appends json.dumps(value, ensure_ascii=False). False: no memory.
bool pyjson_write(const struct pyjson *value, struct buffer *out);
bool pyjson_write_portable(const struct pyjson *value, struct buffer *out); // but infinity as 1e999, to be read back
bool pyjson_write_string(const char *text, size_t n, struct buffer *out);   // quoted and escaped

// Building by hand: text is copied and must be valid UTF-8. NULL or false: no memory.
struct pyjson *pyjson_new(struct arena *arena, enum pyjson_type type);
struct pyjson *pyjson_new_string(struct arena *arena, const char *text, size_t n);
void pyjson_append(struct pyjson *array, struct pyjson *item);
bool pyjson_set(struct arena *arena, struct pyjson *object, const char *key, struct pyjson *value); // key not in it yet

const struct pyjson *pyjson_get(const struct pyjson *object, const char *key); // NULL: absent, or not an object
bool pyjson_is_text(const struct pyjson *value, const char *text);             // a string equal to `text`
bool pyjson_truthy(const struct pyjson *value);                                // Python's bool(); false for NULL
const char *pyjson_type_name(const struct pyjson *value);                      // "null", "a string", ...: for messages

#endif
