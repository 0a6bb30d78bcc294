// fields.c: see fields.h.
#include "server/fields.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool fault_set(struct fault *f, int status, const char *param, const char *format, ...) {
    char text[sizeof f->error.text];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    f->status = status;
    snprintf(f->param, sizeof f->param, "%s", param ? param : "");
    return error_set(&f->error, "%s", text);
}

const struct pyjson *field(const struct pyjson *object, const char *key) {
    const struct pyjson *v = pyjson_get(object, key);
    return v && v->type != PYJSON_NULL ? v : NULL;
}

bool value_int(const struct pyjson *v, int64_t min, int64_t max, int64_t *out) {
    if (!v) return false;
    if (v->type == PYJSON_FLOAT) { // 16.0, as some clients write
        if (!(v->number >= -9e15 && v->number <= 9e15) || v->number != (double)(int64_t)v->number) return false;
        *out = (int64_t)v->number;
        return *out >= min && *out <= max;
    }
    if (v->type != PYJSON_INT) return false;
    char *end;
    errno = 0;
    long long n = strtoll(v->text, &end, 10);
    if (errno || *end || n < min || n > max) return false;
    *out = n;
    return true;
}

double value_number(const struct pyjson *v) {
    return v->type == PYJSON_INT ? strtod(v->text, NULL) : v->number;
}

// How a value is shown in a message.
static const char *show(const struct pyjson *v, char *text, size_t size) {
    if (v->type == PYJSON_INT) snprintf(text, size, "%.30s", v->text);
    else if (v->type == PYJSON_FLOAT) snprintf(text, size, "%g", v->number);
    else snprintf(text, size, "%s", pyjson_type_name(v));
    return text;
}

bool field_int(const struct pyjson *object, const char *key, int64_t min, int64_t max, int64_t *out, struct fault *f) {
    const struct pyjson *v = field(object, key);
    char text[40];
    if (!v || value_int(v, min, max, out)) return true;
    return fault_set(f, 400, key, "%s: expected an integer from %" PRId64 " to %" PRId64 ", found %s", key, min, max,
                     show(v, text, sizeof text));
}

bool field_number(const struct pyjson *object, const char *key, double min, double max, double *out, struct fault *f) {
    const struct pyjson *v = field(object, key);
    char text[40];
    if (!v) return true;
    bool number = v->type == PYJSON_INT || v->type == PYJSON_FLOAT;
    double x = number ? value_number(v) : 0;
    if (!number || !(x >= min && x <= max))
        return fault_set(f, 400, key, "%s: expected a number from %g to %g, found %s", key, min, max,
                         show(v, text, sizeof text));
    *out = x;
    return true;
}

bool field_bool(const struct pyjson *object, const char *key, bool *out, struct fault *f) {
    const struct pyjson *v = field(object, key);
    char text[40];
    if (!v) return true;
    if (v->type != PYJSON_TRUE && v->type != PYJSON_FALSE)
        return fault_set(f, 400, key, "%s: expected true or false, found %s", key, show(v, text, sizeof text));
    *out = v->type == PYJSON_TRUE;
    return true;
}

bool field_text(const struct pyjson *object, const char *key, const char **out, struct fault *f) {
    const struct pyjson *v = NULL;
    if (!field_typed(object, key, PYJSON_STRING, &v, f)) return false;
    if (!v) return true;
    if (memchr(v->text, 0, v->n_text)) return fault_set(f, 400, key, "%s: holds a NUL character", key);
    *out = v->text;
    return true;
}

bool field_typed(const struct pyjson *object, const char *key, enum pyjson_type type, const struct pyjson **out,
                 struct fault *f) {
    const struct pyjson *v = field(object, key), wanted = {.type = type};
    char text[40];
    if (!v) return true;
    if (v->type != type)
        return fault_set(f, 400, key, "%s: expected %s, found %s", key, pyjson_type_name(&wanted),
                         show(v, text, sizeof text));
    *out = v;
    return true;
}
