// json.h: small JSON from files and requests, by way of jansson, with the limits that hostile input needs: duplicate
// keys are errors, depth is bounded, and messages name the file, line and column.
#ifndef TANDEM_FORMAT_JSON_H
#define TANDEM_FORMAT_JSON_H

#include "base/error.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// A tree takes up to 40 times its text. Larger files have readers of their own (json_scan.h, text/tokenizer_reader.h).
enum { JSON_MAX_BYTES = 16 << 20 };

// Parses `n` bytes; `name` is used in messages. The caller owns the reference. NULL on error.
json_t *json_parse(const char *text, size_t n, const char *name, struct error *err);
json_t *json_load_path(const char *path, size_t max_bytes, struct error *err);

// A JSON number's value, whatever the program's locale.
double json_double(const char *text);

// Members of an object. Each returns false with a message that names `where` and the key when the type is wrong; an
// absent key or null leaves *out as it is and returns true.
bool json_read_int(const json_t *object, const char *where, const char *key, int64_t min, int64_t max, int64_t *out,
                   struct error *err);
bool json_read_number(const json_t *object, const char *where, const char *key, double *out, struct error *err);
bool json_read_bool(const json_t *object, const char *where, const char *key, bool *out, struct error *err);
bool json_read_text(const json_t *object, const char *where, const char *key, const char **out, struct error *err);

#endif
