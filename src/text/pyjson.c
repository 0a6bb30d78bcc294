// pyjson.c: see pyjson.h. It owns the parser and the printer; what a chat message may hold is template.c's business.
#include "text/pyjson.h"

#include "base/size.h"
#include "base/utf8.h"
#include "format/json.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A bounded cursor over the text.
struct parser {
    struct arena *arena;
    const char *text, *name;
    size_t n, at;
    struct buffer scratch; // one string while it is unescaped
    struct error *err;
};

static bool fail(struct parser *p, size_t at, const char *what) {
    size_t line = 1, column = 1;
    for (size_t i = 0; i < at && i < p->n; i++) {
        if (p->text[i] == '\n') line++, column = 1;
        else column++;
    }
    return error_set(p->err, "%s: line %zu, column %zu: %s", p->name, line, column, what);
}

static bool no_memory(struct parser *p) {
    return error_set(p->err, "%s: out of memory", p->name);
}

static int peek(const struct parser *p) {
    return p->at < p->n ? (unsigned char)p->text[p->at] : -1;
}

static void skip_space(struct parser *p) {
    while (p->at < p->n &&
           (p->text[p->at] == ' ' || p->text[p->at] == '\t' || p->text[p->at] == '\n' || p->text[p->at] == '\r'))
        p->at++;
}

static bool parse_hex4(struct parser *p, uint32_t *out) {
    uint32_t v = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        int c = peek(p);
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) return fail(p, p->at, "\\u must be followed by four hexadecimal digits");
        v = v << 4 | (uint32_t)digit;
    }
    *out = v;
    return true;
}

// After the backslash.
static bool parse_escape(struct parser *p) {
    size_t start = p->at - 1;
    int c = peek(p);
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *found = c > 0 ? strchr(from, c) : NULL;
    if (found) {
        p->at++;
        return buffer_append_byte(&p->scratch, to[found - from]) || no_memory(p);
    }
    if (c != 'u') return fail(p, start, "unknown escape in a string");
    p->at++;
    uint32_t code = 0, low = 0;
    if (!parse_hex4(p, &code)) return false;
    if (code >= 0xD800 && code <= 0xDBFF && p->n - p->at >= 6 && p->text[p->at] == '\\' && p->text[p->at + 1] == 'u') {
        p->at += 2;
        if (!parse_hex4(p, &low)) return false;
        if (low < 0xDC00 || low > 0xDFFF) return fail(p, start, "lone surrogate in a string");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code >= 0xD800 && code <= 0xDFFF) return fail(p, start, "lone surrogate in a string");
    char bytes[4];
    return buffer_append(&p->scratch, bytes, utf8_encode(code, bytes)) || no_memory(p);
}

// At the opening quote. The text lands in the arena.
static bool parse_text(struct parser *p, const char **text, size_t *n) {
    size_t start = p->at++;
    buffer_clear(&p->scratch);
    for (size_t run = p->at;;) { // from `run` on, bytes stand for themselves
        int c = peek(p);
        if (c < 0) return fail(p, start, "string without an end");
        if (c < 0x20) return fail(p, p->at, "control character in a string");
        if (c == '"' || c == '\\') {
            if (!buffer_append(&p->scratch, p->text + run, p->at - run)) return no_memory(p);
            if (c == '"') break;
            p->at++;
            if (!parse_escape(p)) return false;
            run = p->at;
            continue;
        }
        uint32_t code = 0;
        size_t length = c < 0x80 ? 1 : utf8_decode((const unsigned char *)p->text + p->at, p->n - p->at, &code);
        if (length == 0) return fail(p, p->at, "invalid UTF-8");
        p->at += length;
    }
    p->at++;
    *text = arena_copy_text(p->arena, buffer_text(&p->scratch), p->scratch.len);
    *n = p->scratch.len;
    return *text || no_memory(p);
}

static bool digits(struct parser *p) {
    size_t start = p->at;
    while (peek(p) >= '0' && peek(p) <= '9') p->at++;
    return p->at > start;
}

static bool parse_number(struct parser *p, struct pyjson *v) {
    size_t start = p->at;
    bool is_float = false;
    if (peek(p) == '-') p->at++;
    if (peek(p) == '0') p->at++;
    else if (!digits(p)) return fail(p, start, "not a JSON value");
    if (peek(p) == '.') {
        is_float = true;
        p->at++;
        if (!digits(p)) return fail(p, start, "a digit is missing after the decimal point");
    }
    if (peek(p) == 'e' || peek(p) == 'E') {
        is_float = true;
        p->at++;
        if (peek(p) == '+' || peek(p) == '-') p->at++;
        if (!digits(p)) return fail(p, start, "a digit is missing in the exponent");
    }
    char *copy = arena_copy_text(p->arena, p->text + start, p->at - start);
    if (!copy) return no_memory(p);
    if (is_float) {
        v->type = PYJSON_FLOAT;
        v->number = json_double(copy);
        return true;
    }
    v->type = PYJSON_INT;
    v->text = strcmp(copy, "-0") == 0 ? "0" : copy; // an int has no negative zero
    v->n_text = strlen(v->text);
    return true;
}

static int compare_keys(const void *a, const void *b) {
    const struct pyjson *x = *(const struct pyjson *const *)a, *y = *(const struct pyjson *const *)b;
    size_t n = x->n_key < y->n_key ? x->n_key : y->n_key;
    int order = n ? memcmp(x->key, y->key, n) : 0;
    return order ? order : (x->n_key > y->n_key) - (x->n_key < y->n_key);
}

static bool check_duplicates(struct parser *p, const struct pyjson *object, size_t start) {
    if (object->n < 2) return true;
    const struct pyjson **sorted = size_alloc(object->n, sizeof *sorted);
    if (!sorted) return no_memory(p);
    size_t n = 0;
    for (const struct pyjson *m = object->first; m; m = m->next) sorted[n++] = m;
    qsort(sorted, n, sizeof *sorted, compare_keys);
    bool ok = true;
    for (size_t i = 1; i < n && ok; i++) {
        if (compare_keys(&sorted[i - 1], &sorted[i]) != 0) continue;
        char what[160];
        snprintf(what, sizeof what, "duplicate key \"%.100s\" in this object", sorted[i]->key);
        ok = fail(p, start, what);
    }
    free(sorted);
    return ok;
}

static struct pyjson *parse_value(struct parser *p, int depth);

// At the opening bracket or brace.
static bool parse_container(struct parser *p, struct pyjson *v, int depth) {
    size_t start = p->at;
    bool is_object = p->text[p->at++] == '{';
    char close = is_object ? '}' : ']';
    v->type = is_object ? PYJSON_OBJECT : PYJSON_ARRAY;
    if (depth >= PYJSON_MAX_DEPTH) return fail(p, start, "nested too deep (the limit is 900)");
    skip_space(p);
    if (peek(p) == close) {
        p->at++;
        return true;
    }
    for (;;) {
        const char *key = NULL;
        size_t n_key = 0;
        skip_space(p);
        if (is_object) {
            if (peek(p) != '"') return fail(p, p->at, "a key in quotes was expected");
            if (!parse_text(p, &key, &n_key)) return false;
            skip_space(p);
            if (peek(p) != ':') return fail(p, p->at, "':' was expected");
            p->at++;
        }
        struct pyjson *item = parse_value(p, depth + 1);
        if (!item) return false;
        item->key = key;
        item->n_key = n_key;
        pyjson_append(v, item);
        skip_space(p);
        if (peek(p) == close) break;
        if (peek(p) != ',') return fail(p, p->at, is_object ? "',' or '}' was expected" : "',' or ']' was expected");
        p->at++;
    }
    p->at++;
    return !is_object || check_duplicates(p, v, start);
}

static bool parse_word(struct parser *p, struct pyjson *v) {
    static const struct {
        const char *word;
        enum pyjson_type type;
    } words[] = {{"null", PYJSON_NULL}, {"true", PYJSON_TRUE}, {"false", PYJSON_FALSE}};
    for (size_t i = 0; i < 3; i++) {
        size_t n = strlen(words[i].word);
        if (p->n - p->at >= n && memcmp(p->text + p->at, words[i].word, n) == 0) {
            v->type = words[i].type;
            p->at += n;
            return true;
        }
    }
    return fail(p, p->at, p->at < p->n ? "not a JSON value" : "the text ends where a value was expected");
}

static struct pyjson *parse_value(struct parser *p, int depth) {
    struct pyjson *v = pyjson_new(p->arena, PYJSON_NULL);
    if (!v) {
        no_memory(p);
        return NULL;
    }
    skip_space(p);
    int c = peek(p);
    bool ok;
    if (c == '{' || c == '[') {
        ok = parse_container(p, v, depth);
    } else if (c == '"') {
        v->type = PYJSON_STRING;
        ok = parse_text(p, &v->text, &v->n_text);
    } else if (c == '-' || (c >= '0' && c <= '9')) {
        ok = parse_number(p, v);
    } else {
        ok = parse_word(p, v);
    }
    return ok ? v : NULL;
}

struct pyjson *pyjson_parse(struct arena *arena, const char *text, size_t n, const char *name, struct error *err) {
    struct parser p = {.arena = arena, .text = text, .n = n, .name = name, .err = err};
    struct pyjson *v = parse_value(&p, 0);
    skip_space(&p);
    if (v && p.at < n) {
        fail(&p, p.at, "text after the end of the value");
        v = NULL;
    }
    buffer_free(&p.scratch);
    return v;
}

bool pyjson_write_string(const char *text, size_t n, struct buffer *out) {
    if (!buffer_append_byte(out, '"')) return false;
    size_t start = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c >= 0x20 && c != '"' && c != '\\') continue;
        if (!buffer_append(out, text + start, i - start)) return false;
        start = i + 1;
        static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
        const char *found = c ? strchr(from, c) : NULL;
        if (!(found ? buffer_printf(out, "\\%c", to[found - from]) : buffer_printf(out, "\\u%04x", c))) return false;
    }
    return buffer_append(out, text + start, n - start) && buffer_append_byte(out, '"');
}

static bool same_double(const char *text, double x) {
    double back = strtod(text, NULL);
    return !(back < x) && !(back > x);
}

// Adds one to the last digit before the exponent; false where that would carry beyond the first digit. Above a power of
// two doubles lie twice as far apart as below it, so there the next decimal up may read back when the nearest does not.
static bool round_up(char *text) {
    char *at = strchr(text, 'e');
    while (at-- > text) {
        if (*at < '0' || *at > '9') continue; // the point, or what the locale has for it
        if (*at != '9') {
            ++*at;
            return true;
        }
        *at = '0';
    }
    return false;
}

// Python's repr(float): the fewest digits that read back as the same double; an exponent below 1e-4 and from 1e16 on.
static bool write_float(double x, const char *infinity, struct buffer *out) {
    if (isinf(x)) return buffer_printf(out, "%s%s", x < 0 ? "-" : "", infinity);
    char text[40];
    for (int precision = 0; precision < 17; precision++) {
        snprintf(text, sizeof text, "%.*e", precision, fabs(x));
        if (same_double(text, fabs(x))) break;
        if (round_up(text) && same_double(text, fabs(x))) break;
    }
    char mantissa[24];
    int n = 0;
    const char *at = text;
    for (; *at != 'e'; at++)
        if (*at >= '0' && *at <= '9') mantissa[n++] = *at;
    mantissa[n] = '\0';
    int exponent = (int)strtol(at + 1, NULL, 10);
    while (n > 1 && mantissa[n - 1] == '0') mantissa[--n] = '\0';
    if (signbit(x) && !buffer_append_byte(out, '-')) return false;
    if (exponent < -4 || exponent >= 16)
        return buffer_printf(out, "%c%s%se%c%02d", mantissa[0], n > 1 ? "." : "", mantissa + 1,
                             exponent < 0 ? '-' : '+', abs(exponent));
    if (exponent < 0) return buffer_printf(out, "0.%.*s%s", -exponent - 1, "0000", mantissa);
    if (n <= exponent + 1) return buffer_printf(out, "%s%.*s.0", mantissa, exponent + 1 - n, "0000000000000000");
    return buffer_printf(out, "%.*s.%s", exponent + 1, mantissa, mantissa + exponent + 1);
}

static bool write_value(const struct pyjson *v, const char *infinity, struct buffer *out) {
    switch (v->type) {
    case PYJSON_NULL: return buffer_append_text(out, "null");
    case PYJSON_FALSE: return buffer_append_text(out, "false");
    case PYJSON_TRUE: return buffer_append_text(out, "true");
    case PYJSON_INT: return buffer_append(out, v->text, v->n_text);
    case PYJSON_FLOAT: return write_float(v->number, infinity, out);
    case PYJSON_STRING: return pyjson_write_string(v->text, v->n_text, out);
    case PYJSON_ARRAY:
    case PYJSON_OBJECT: break;
    }
    bool is_object = v->type == PYJSON_OBJECT;
    if (!buffer_append_byte(out, is_object ? '{' : '[')) return false;
    for (const struct pyjson *m = v->first; m; m = m->next) {
        if (m != v->first && !buffer_append_text(out, ", ")) return false;
        if (is_object && !(pyjson_write_string(m->key, m->n_key, out) && buffer_append_text(out, ": "))) return false;
        if (!write_value(m, infinity, out)) return false;
    }
    return buffer_append_byte(out, is_object ? '}' : ']');
}

bool pyjson_write(const struct pyjson *value, struct buffer *out) {
    return write_value(value, "Infinity", out);
}

bool pyjson_write_portable(const struct pyjson *value, struct buffer *out) {
    return write_value(value, "1e999", out);
}

struct pyjson *pyjson_new(struct arena *arena, enum pyjson_type type) {
    struct pyjson *v = arena_alloc_zero(arena, 1, sizeof *v);
    if (v) *v = (struct pyjson){.type = type, .text = ""};
    return v;
}

struct pyjson *pyjson_new_string(struct arena *arena, const char *text, size_t n) {
    struct pyjson *v = pyjson_new(arena, PYJSON_STRING);
    if (!v) return NULL;
    v->text = arena_copy_text(arena, text, n);
    v->n_text = n;
    return v->text ? v : NULL;
}

void pyjson_append(struct pyjson *array, struct pyjson *item) {
    item->next = NULL;
    if (array->last) array->last->next = item;
    else array->first = item;
    array->last = item;
    array->n++;
}

bool pyjson_set(struct arena *arena, struct pyjson *object, const char *key, struct pyjson *value) {
    size_t n = strlen(key);
    char *copy = arena_copy_text(arena, key, n);
    if (!copy) return false;
    value->key = copy;
    value->n_key = n;
    pyjson_append(object, value);
    return true;
}

const struct pyjson *pyjson_get(const struct pyjson *object, const char *key) {
    if (!object || object->type != PYJSON_OBJECT) return NULL;
    size_t n = strlen(key);
    for (const struct pyjson *m = object->first; m; m = m->next)
        if (m->n_key == n && memcmp(m->key, key, n) == 0) return m;
    return NULL;
}

bool pyjson_is_text(const struct pyjson *v, const char *text) {
    return v && v->type == PYJSON_STRING && v->n_text == strlen(text) && memcmp(v->text, text, v->n_text) == 0;
}

bool pyjson_truthy(const struct pyjson *v) {
    if (!v) return false;
    switch (v->type) {
    case PYJSON_NULL:
    case PYJSON_FALSE: return false;
    case PYJSON_TRUE: return true;
    case PYJSON_INT: return strcmp(v->text, "0") != 0;
    case PYJSON_FLOAT: return v->number < 0 || v->number > 0;
    case PYJSON_STRING: return v->n_text > 0;
    case PYJSON_ARRAY:
    case PYJSON_OBJECT: return v->n > 0;
    }
    return false;
}

const char *pyjson_type_name(const struct pyjson *v) {
    static const char *const names[] = {"null",    "false",    "true",     "an integer",
                                        "a float", "a string", "an array", "an object"};
    return v ? names[v->type] : "nothing";
}
