// error.h: the one way in which a fallible call says what went wrong.
//
// A fallible function returns false (or NULL) and fills the caller's `struct error`. A message names the thing, what
// was expected and what was found. Callers that do not care pass NULL.
#ifndef TANDEM_BASE_ERROR_H
#define TANDEM_BASE_ERROR_H

#include <stdbool.h>

struct error {
    char text[1024]; // NUL-terminated; a longer message is cut at a character border; control bytes but \n, \t are '?'
};

// Formats the message into `err` (which may be NULL) and returns false, so that a failing function can end with
// `return error_set(err, "...", ...);`.
bool error_set(struct error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Puts a formatted prefix before the message that `err` already holds ("shard 3: " + "truncated ..."). Returns false.
bool error_prefix(struct error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
