// fields.h: reading the fields of a request. Each call names the field in its error; an absent field or null leaves
// *out alone.
#ifndef TANDEM_SERVER_FIELDS_H
#define TANDEM_SERVER_FIELDS_H

#include "base/error.h"
#include "text/pyjson.h"

#include <stdint.h>

// What is wrong with a request: the field (for "param") and the message.
struct fault {
    int status; // 0: nothing is wrong
    char param[64];
    const char *code; // a name that clients know; NULL: the status
    struct error error;
};

// Fills `f` and returns false. `param` may be NULL.
bool fault_set(struct fault *f, int status, const char *param, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

const struct pyjson *field(const struct pyjson *object, const char *key); // NULL: absent or null
bool field_int(const struct pyjson *object, const char *key, int64_t min, int64_t max, int64_t *out, struct fault *f);
bool field_number(const struct pyjson *object, const char *key, double min, double max, double *out, struct fault *f);
bool field_bool(const struct pyjson *object, const char *key, bool *out, struct fault *f);
// *out is NUL-terminated; a NUL inside is an error.
bool field_text(const struct pyjson *object, const char *key, const char **out, struct fault *f);
bool field_typed(const struct pyjson *object, const char *key, enum pyjson_type type, const struct pyjson **out,
                 struct fault *f);
bool value_int(const struct pyjson *value, int64_t min, int64_t max, int64_t *out); // false: none, or out of range
double value_number(const struct pyjson *value);                                    // an INT's or FLOAT's

#endif
