// json.c: see json.h. jansson holds the tree; json_scan.h reads the text, because jansson's own parser drops characters
// of a string in silence when memory runs out in the middle of it, and steps over NULs behind numbers.
#include "format/json.h"

#include "base/buffer.h"
#include "base/file.h"
#include "format/json_scan.h"

#include <inttypes.h>
#include <locale.h>
#include <stdlib.h>
#include <string.h>

static json_t *build(struct json_cursor *c, struct buffer *text);

static json_t *build_object(struct json_cursor *c, struct buffer *text) {
    json_t *object = json_object();
    struct buffer key = {0};
    bool ok = object != NULL;
    for (json_cursor_enter(c); ok && json_cursor_more(c);)
        ok = json_cursor_key(c, &key) && json_object_set_new_nocheck(object, buffer_text(&key), build(c, text)) == 0;
    buffer_free(&key);
    if (ok) return object;
    json_decref(object);
    return NULL;
}

static json_t *build_array(struct json_cursor *c, struct buffer *text) {
    json_t *array = json_array();
    bool ok = array != NULL;
    for (json_cursor_enter(c); ok && json_cursor_more(c);) ok = json_array_append_new(array, build(c, text)) == 0;
    if (ok) return array;
    json_decref(array);
    return NULL;
}

static json_t *build_number(struct json_cursor *c, struct buffer *text, bool is_integer) {
    size_t start = c->at;
    json_cursor_skip(c);
    buffer_clear(text);
    if (!buffer_append(text, c->text + start, c->at - start)) return NULL;
    return is_integer ? json_integer(strtoll(buffer_text(text), NULL, 10)) : json_real(json_double(buffer_text(text)));
}

// The value at the cursor, whose text was checked. NULL: no memory.
static json_t *build(struct json_cursor *c, struct buffer *text) {
    char type = json_cursor_type(c);
    switch (type) {
    case '{': return build_object(c, text);
    case '[': return build_array(c, text);
    case '"': return json_cursor_text(c, text) ? json_stringn_nocheck(buffer_text(text), text->len) : NULL;
    case 'i':
    case 'r': return build_number(c, text, type == 'i');
    default: json_cursor_skip(c); return type == 't' ? json_true() : type == 'f' ? json_false() : json_null();
    }
}

double json_double(const char *text) {
    // glibc's "C" locale is static: nothing is allocated. A program around us may write numbers with commas.
    locale_t c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    return strtod_l(text, NULL, c_locale);
}

json_t *json_parse(const char *text, size_t n, const char *name, struct error *err) {
    if (n > JSON_MAX_BYTES) {
        error_set(err, "%s: %zu bytes of JSON, more than the limit of %d", name, n, JSON_MAX_BYTES);
        return NULL;
    }
    if (!json_scan_check(text, n, name, err)) return NULL;
    struct json_cursor c = {text, n, 0};
    struct buffer scratch = {0};
    char type = json_cursor_type(&c);
    json_t *root = NULL;
    if (type != '{' && type != '[') error_set(err, "%s: line 1: expected an object or an array", name);
    else if (!(root = build(&c, &scratch))) error_set(err, "%s: out of memory", name);
    buffer_free(&scratch);
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
