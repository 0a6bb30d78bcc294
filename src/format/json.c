// json.c: see json.h. jansson does the parsing; it bounds the depth at 2,048 and checks UTF-8 itself.
#include "format/json.h"

#include "base/buffer.h"
#include "base/file.h"

#include <inttypes.h>
#include <string.h>

json_t *json_parse(const char *text, size_t n, const char *name, struct error *err) {
    if (n > JSON_MAX_BYTES) {
        error_set(err, "%s: %zu bytes of JSON, more than the limit of %d", name, n, JSON_MAX_BYTES);
        return NULL;
    }
    json_error_t problem;
    json_t *root = json_loadb(n ? text : "", n, JSON_REJECT_DUPLICATES, &problem);
    if (!root)
        error_set(err, "%s: line %d, column %d: not valid JSON: %s", name, problem.line, problem.column, problem.text);
    // jansson 2.14 steps over a NUL that follows a number or a word.
    if (root && n && memchr(text, '\0', n)) {
        error_set(err, "%s: not valid JSON: NUL byte", name);
        json_decref(root);
        root = NULL;
    }
    return root;
}

json_t *json_load_path(const char *path, size_t max_bytes, struct error *err) {
    struct buffer text = {0};
    json_t *root = NULL;
    if (file_read(path, max_bytes, &text, err)) root = json_parse(text.data, text.len, path, err);
    buffer_free(&text);
    return root;
}

static const char *type_name(const json_t *value) {
    switch (json_typeof(value)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "an array";
    case JSON_STRING: return "a string";
    case JSON_INTEGER: return "an integer";
    case JSON_REAL: return "a number with a fraction or exponent";
    case JSON_TRUE: return "true";
    case JSON_FALSE: return "false";
    case JSON_NULL: return "null";
    }
    return "something else";
}

// The member, NULL when it is absent or null.
static const json_t *member(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    return json_is_null(value) ? NULL : value;
}

bool json_read_int(const json_t *object, const char *where, const char *key, int64_t min, int64_t max, int64_t *out,
                   struct error *err) {
    const json_t *value = member(object, key);
    if (!value) return true;
    if (!json_is_integer(value))
        return error_set(err, "%s: \"%s\": expected an integer, found %s", where, key, type_name(value));
    int64_t n = json_integer_value(value);
    if (n < min || n > max)
        return error_set(err, "%s: \"%s\": expected an integer from %" PRId64 " to %" PRId64 ", found %" PRId64, where,
                         key, min, max, n);
    *out = n;
    return true;
}

bool json_read_number(const json_t *object, const char *where, const char *key, double *out, struct error *err) {
    const json_t *value = member(object, key);
    if (!value) return true;
    if (!json_is_number(value))
        return error_set(err, "%s: \"%s\": expected a number, found %s", where, key, type_name(value));
    *out = json_number_value(value); // finite: jansson refuses what overflows a double
    return true;
}

bool json_read_bool(const json_t *object, const char *where, const char *key, bool *out, struct error *err) {
    const json_t *value = member(object, key);
    if (!value) return true;
    if (!json_is_boolean(value))
        return error_set(err, "%s: \"%s\": expected true or false, found %s", where, key, type_name(value));
    *out = json_is_true(value);
    return true;
}

bool json_read_text(const json_t *object, const char *where, const char *key, const char **out, struct error *err) {
    const json_t *value = member(object, key);
    if (!value) return true;
    if (!json_is_string(value))
        return error_set(err, "%s: \"%s\": expected a string, found %s", where, key, type_name(value));
    *out = json_string_value(value);
    return true;
}
