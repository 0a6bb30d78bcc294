// schema.c: see schema.h.
#include "server/schema.h"

#include "base/buffer.h"
#include "server/fields.h"

#include <stdio.h>
#include <string.h>

enum { MAX_DEPTH = 32, MAX_REPEAT = 4096 };

struct compiler {
    struct grammar *g;
    const struct pyjson *root;
    const char *where;
    int depth;
    char path[256]; // of the schema in hand, for messages
    struct error *err;
};

static bool compile(struct compiler *c, const struct pyjson *schema, uint32_t next, uint32_t *out);

static bool refuse(struct compiler *c, const char *keyword, const char *why) {
    return error_set(c->err, "%s: schema%s: %s: %s", c->where, c->path, keyword, why);
}

// ---- Pieces of JSON

// Optional white space: nothing, a space, or a line break and an indentation.
static uint32_t space(struct grammar *g, uint32_t next) {
    uint32_t indent = next;
    for (int i = 0; i < 16; i++) indent = grammar_split(g, next, grammar_bytes(g, ' ', ' ', indent));
    return grammar_split(g, next,
                         grammar_split(g, grammar_bytes(g, ' ', ' ', next), grammar_bytes(g, '\n', '\n', indent)));
}

static uint32_t byte(struct grammar *g, char c, uint32_t next) {
    return grammar_bytes(g, (unsigned char)c, (unsigned char)c, next);
}

static uint32_t hex(struct grammar *g, uint32_t next) {
    return grammar_split(g, grammar_bytes(g, '0', '9', next),
                         grammar_split(g, grammar_bytes(g, 'a', 'f', next), grammar_bytes(g, 'A', 'F', next)));
}

static uint32_t tail(struct grammar *g, unsigned char low, unsigned char high, uint32_t next) {
    return grammar_bytes(g, low, high, next);
}

// One character of a string, escaped or not: valid UTF-8 (RFC 3629's table), no lone surrogate.
static uint32_t character(struct grammar *g, uint32_t next) {
    static const char plain[] = "\"\\/bfnrt";
    uint32_t one = tail(g, 0x80, 0xBF, next), two = tail(g, 0x80, 0xBF, one), three = tail(g, 0x80, 0xBF, two);
    uint32_t any =
        grammar_split(g, grammar_bytes(g, 0x20, 0x21, next),
                      grammar_split(g, grammar_bytes(g, 0x23, 0x5B, next), grammar_bytes(g, 0x5D, 0x7F, next)));
    any = grammar_split(g, any, grammar_bytes(g, 0xC2, 0xDF, one));
    any = grammar_split(g, any, grammar_bytes(g, 0xE0, 0xE0, tail(g, 0xA0, 0xBF, one)));
    any = grammar_split(g, any, grammar_bytes(g, 0xE1, 0xEC, two));
    any = grammar_split(g, any, grammar_bytes(g, 0xED, 0xED, tail(g, 0x80, 0x9F, one)));
    any = grammar_split(g, any, grammar_bytes(g, 0xEE, 0xEF, two));
    any = grammar_split(g, any, grammar_bytes(g, 0xF0, 0xF0, tail(g, 0x90, 0xBF, two)));
    any = grammar_split(g, any, grammar_bytes(g, 0xF1, 0xF3, three));
    any = grammar_split(g, any, grammar_bytes(g, 0xF4, 0xF4, tail(g, 0x80, 0x8F, two)));
    uint32_t h3 = hex(g, next), h2 = hex(g, h3), h1 = hex(g, h2);
    uint32_t first = grammar_split(g, grammar_bytes(g, '0', '9', h1),
                                   grammar_split(g, grammar_bytes(g, 'a', 'c', h1), grammar_bytes(g, 'A', 'C', h1)));
    first = grammar_split(g, first, grammar_split(g, grammar_bytes(g, 'e', 'f', h1), grammar_bytes(g, 'E', 'F', h1)));
    uint32_t low = grammar_bytes(g, '0', '7', h2); // not D800 to DFFF
    first = grammar_split(g, first, grammar_split(g, byte(g, 'd', low), byte(g, 'D', low)));
    uint32_t escape = byte(g, 'u', first);
    for (const char *p = plain; *p; p++) escape = grammar_split(g, escape, byte(g, *p, next));
    return grammar_split(g, any, byte(g, '\\', escape));
}

static uint32_t string(struct grammar *g, int64_t min, int64_t max, uint32_t next) {
    uint32_t end = byte(g, '"', next), at;
    if (max < 0) {
        at = grammar_hole(g);
        grammar_fill(g, at, end, character(g, at));
    } else {
        at = end;
        for (int64_t i = max; i > min; i--) at = grammar_split(g, end, character(g, at));
    }
    for (int64_t i = 0; i < min; i++) at = character(g, at);
    return byte(g, '"', at);
}

// 1 to n digits.
static uint32_t digits(struct grammar *g, int n, uint32_t next) {
    uint32_t at = grammar_bytes(g, '0', '9', next);
    for (int i = 1; i < n; i++) at = grammar_bytes(g, '0', '9', grammar_split(g, next, at));
    return at;
}

// At least `least` (0 or 1), or any where `negative`.
static uint32_t integer(struct grammar *g, bool negative, bool zero, uint32_t next) {
    uint32_t positive = grammar_bytes(g, '1', '9', grammar_split(g, next, digits(g, 17, next)));
    uint32_t any = zero ? grammar_split(g, byte(g, '0', next), positive) : positive;
    return negative ? grammar_split(g, any, byte(g, '-', positive)) : any;
}

static uint32_t number(struct grammar *g, uint32_t next) {
    uint32_t exponent = digits(g, 2, next);
    exponent = grammar_split(g, exponent, grammar_split(g, byte(g, '+', exponent), byte(g, '-', exponent)));
    exponent = grammar_split(g, next, grammar_split(g, byte(g, 'e', exponent), byte(g, 'E', exponent)));
    uint32_t fraction = grammar_split(g, exponent, byte(g, '.', digits(g, 17, exponent)));
    uint32_t whole = grammar_bytes(g, '1', '9', grammar_split(g, fraction, digits(g, 17, fraction)));
    whole = grammar_split(g, byte(g, '0', fraction), whole);
    return grammar_split(g, whole, byte(g, '-', whole));
}

// ---- Keywords

static bool is_annotation(const char *key) {
    static const char *const names[] = {
        "title",         "description", "default", "examples",        "$schema",
        "$id",           "$comment",    "$defs",   "definitions",     "deprecated",
        "readOnly",      "writeOnly",   "format",  "contentEncoding", "contentMediaType",
        "contentSchema", "strict",      "example", "$vocabulary"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(key, names[i]) == 0) return true;
    return false;
}

// Refuses every keyword that is neither in `known` (ended by NULL) nor an annotation.
static bool check_keywords(struct compiler *c, const struct pyjson *schema, const char *const *known) {
    for (const struct pyjson *m = schema->first; m; m = m->next) {
        bool found = is_annotation(m->key);
        for (size_t i = 0; !found && known[i]; i++) found = strcmp(m->key, known[i]) == 0;
        if (!found) {
            char name[64];
            snprintf(name, sizeof name, "%.60s", m->key);
            return refuse(c, name, "this keyword is not supported here");
        }
    }
    return true;
}

static bool read_count(struct compiler *c, const struct pyjson *schema, const char *key, int64_t *out) {
    const struct pyjson *v = pyjson_get(schema, key);
    if (!v) return true;
    if (value_int(v, 0, MAX_REPEAT, out)) return true;
    return refuse(c, key, "expected a whole number from 0 to 4096");
}

// The value itself, as text.
static bool literal(struct compiler *c, const struct pyjson *v, uint32_t next, uint32_t *out) {
    struct buffer text = {0};
    bool ok = pyjson_write_portable(v, &text) || error_set(c->err, "out of memory");
    if (ok) *out = grammar_text(c->g, buffer_text(&text), text.len, next);
    buffer_free(&text);
    return ok;
}

static const char *const type_names[] = {"null", "boolean", "integer", "number", "string", "array", "object"};

static bool has_type(const struct pyjson *v, const char *type) {
    switch (v->type) {
    case PYJSON_NULL: return strcmp(type, "null") == 0;
    case PYJSON_FALSE:
    case PYJSON_TRUE: return strcmp(type, "boolean") == 0;
    case PYJSON_INT: return strcmp(type, "integer") == 0 || strcmp(type, "number") == 0;
    case PYJSON_FLOAT: return strcmp(type, "number") == 0;
    case PYJSON_STRING: return strcmp(type, "string") == 0;
    case PYJSON_ARRAY: return strcmp(type, "array") == 0;
    case PYJSON_OBJECT: return strcmp(type, "object") == 0;
    }
    return false;
}

static bool type_allows(const struct pyjson *type, const struct pyjson *value) {
    if (!type) return true;
    if (type->type == PYJSON_STRING) return has_type(value, type->text);
    for (const struct pyjson *t = type->first; t; t = t->next)
        if (t->type == PYJSON_STRING && has_type(value, t->text)) return true;
    return false;
}

static bool compile_enum(struct compiler *c, const struct pyjson *schema, uint32_t next, uint32_t *out) {
    static const char *const known[] = {"enum", "const", "type", NULL};
    const struct pyjson *list = pyjson_get(schema, "enum"), *only = pyjson_get(schema, "const");
    const struct pyjson *type = pyjson_get(schema, "type");
    bool any = false;
    if (!check_keywords(c, schema, known)) return false;
    if (only && list) return refuse(c, "const", "together with enum this is not supported");
    if (list && (list->type != PYJSON_ARRAY || list->n == 0)) return refuse(c, "enum", "expected an array, not empty");
    for (const struct pyjson *v = only ? only : list->first; v; v = only ? NULL : v->next) {
        uint32_t one;
        if (!type_allows(type, v)) continue;
        if (!literal(c, v, next, &one)) return false;
        *out = any ? grammar_split(c->g, *out, one) : one;
        any = true;
    }
    return any || refuse(c, "enum", "no value has the type that is asked for");
}

// ---- Objects

struct property {
    const struct pyjson *schema; // NULL: any JSON
    const char *key;
    size_t n_key;
    bool required;
};

static bool is_required(const struct pyjson *required, const char *key, size_t n) {
    for (const struct pyjson *r = required ? required->first : NULL; r; r = r->next)
        if (r->type == PYJSON_STRING && r->n_text == n && memcmp(r->text, key, n) == 0) return true;
    return false;
}

static bool compile_value(struct compiler *c, const struct pyjson *schema, const char *name, uint32_t next,
                          uint32_t *out) {
    size_t n = strlen(c->path);
    snprintf(c->path + n, sizeof c->path - n, ".%.40s", name);
    bool ok = true;
    if (schema) ok = compile(c, schema, next, out);
    else *out = grammar_json(c->g, false, next);
    c->path[n] = '\0';
    return ok;
}

// "key": value
static bool compile_member(struct compiler *c, const struct property *p, uint32_t next, uint32_t *out) {
    struct buffer key = {0};
    uint32_t value;
    bool ok = compile_value(c, p->schema, p->key, next, &value) &&
              (pyjson_write_string(p->key, p->n_key, &key) || error_set(c->err, "out of memory"));
    if (ok) {
        uint32_t colon = byte(c->g, ':', grammar_split(c->g, value, byte(c->g, ' ', value)));
        *out = grammar_text(c->g, buffer_text(&key), key.len, colon);
    }
    buffer_free(&key);
    return ok;
}

// {string: value, ...}
static bool compile_map(struct compiler *c, const struct pyjson *value_schema, uint32_t next, uint32_t *out) {
    struct grammar *g = c->g;
    uint32_t end = space(g, byte(g, '}', next)), again = grammar_hole(g), value;
    if (!compile_value(c, value_schema, "additionalProperties", again, &value)) return false;
    uint32_t member = string(g, 0, -1, byte(g, ':', grammar_split(g, value, byte(g, ' ', value))));
    grammar_fill(g, again, end, byte(g, ',', space(g, member)));
    *out = byte(g, '{', grammar_split(g, byte(g, '}', next), space(g, member)));
    return true;
}

static bool compile_properties(struct compiler *c, const struct property *list, size_t n, uint32_t next,
                               uint32_t *out) {
    struct grammar *g = c->g;
    // From the last property to the first: where the text goes on when nothing was written yet, and when something was.
    uint32_t close = byte(g, '}', next), first = close, later = space(g, close);
    for (size_t i = n; i > 0; i--) {
        const struct property *p = &list[i - 1];
        uint32_t member;
        if (!compile_member(c, p, later, &member)) return false;
        uint32_t begin = space(g, member), follow = byte(g, ',', space(g, member));
        first = p->required ? begin : grammar_split(g, begin, first);
        later = p->required ? follow : grammar_split(g, follow, later);
    }
    *out = byte(g, '{', first);
    return true;
}

static bool compile_object(struct compiler *c, const struct pyjson *schema, uint32_t next, uint32_t *out) {
    enum { MAX_PROPERTIES = 512 };
    const struct pyjson *properties = pyjson_get(schema, "properties"), *required = pyjson_get(schema, "required");
    const struct pyjson *more = pyjson_get(schema, "additionalProperties");
    struct property list[MAX_PROPERTIES];
    size_t n = 0;
    if (properties && properties->type != PYJSON_OBJECT) return refuse(c, "properties", "expected an object");
    if (required && required->type != PYJSON_ARRAY) return refuse(c, "required", "expected an array of strings");
    bool closed = more && more->type == PYJSON_FALSE;
    const struct pyjson *rest = more && more->type == PYJSON_OBJECT ? more : NULL;
    for (const struct pyjson *p = properties ? properties->first : NULL; p; p = p->next) {
        bool needed = is_required(required, p->key, p->n_key);
        if (p->type == PYJSON_FALSE && !needed) continue; // never there
        if (n == MAX_PROPERTIES) return refuse(c, "properties", "more than 512");
        list[n++] = (struct property){.schema = p, .key = p->key, .n_key = p->n_key, .required = needed};
    }
    for (const struct pyjson *r = required ? required->first : NULL; r; r = r->next) {
        bool known = false;
        if (r->type != PYJSON_STRING) return refuse(c, "required", "expected an array of strings");
        for (size_t i = 0; i < n; i++)
            known = known || (list[i].n_key == r->n_text && memcmp(list[i].key, r->text, r->n_text) == 0);
        if (known) continue;
        if (closed) return refuse(c, "required", "a name that additionalProperties forbids");
        if (n == MAX_PROPERTIES) return refuse(c, "required", "more than 512");
        list[n++] = (struct property){.schema = rest, .key = r->text, .n_key = r->n_text, .required = true};
    }
    if (n == 0 && !closed && rest) return compile_map(c, rest, next, out);
    if (n == 0 && !closed && !properties) {
        *out = grammar_json(c->g, true, next);
        return true;
    }
    return compile_properties(c, list, n, next, out);
}

// ---- Arrays

// Between min and max items (max -1: no limit), each behind a comma but for the first where `first`.
static bool compile_items(struct compiler *c, const struct pyjson *items, int64_t min, int64_t max, bool first,
                          uint32_t end, uint32_t *out) {
    struct grammar *g = c->g;
    uint32_t at = end, value;
    if (max < 0) {
        uint32_t again = grammar_hole(g);
        if (!compile_value(c, items, "items", again, &value)) return false;
        uint32_t more = byte(g, ',', space(g, value));
        grammar_fill(g, again, end, more);
        if (min == 0) {
            *out = grammar_split(g, end, first ? value : more);
            return true;
        }
        at = first && min == 1 ? value : more;
        max = min - 1;
        min = max;
        for (int64_t i = max; i > 0; i--) {
            if (!compile_value(c, items, "items", at, &value)) return false;
            at = first && i == 1 ? value : byte(g, ',', space(g, value));
        }
        *out = at;
        return true;
    }
    for (int64_t i = max; i > 0; i--) {
        if (g->full) break;
        if (!compile_value(c, items, "items", at, &value)) return false;
        uint32_t one = first && i == 1 ? value : byte(g, ',', space(g, value));
        at = i > min ? grammar_split(g, end, one) : one;
    }
    *out = at;
    return true;
}

static bool compile_array(struct compiler *c, const struct pyjson *schema, uint32_t next, uint32_t *out) {
    struct grammar *g = c->g;
    const struct pyjson *items = pyjson_get(schema, "items"), *prefix = pyjson_get(schema, "prefixItems");
    int64_t min = 0, max = -1;
    if (!read_count(c, schema, "minItems", &min) || !read_count(c, schema, "maxItems", &max)) return false;
    if (prefix && prefix->type != PYJSON_ARRAY) return refuse(c, "prefixItems", "expected an array of schemas");
    if (items && items->type == PYJSON_FALSE && (max < 0 || max > (int64_t)(prefix ? prefix->n : 0)))
        max = prefix ? (int64_t)prefix->n : 0;
    if (max >= 0 && max < min) return refuse(c, "minItems", "more than maxItems, or than items allows");
    size_t n_prefix = prefix ? prefix->n : 0;
    if (max >= 0 && (int64_t)n_prefix > max) return refuse(c, "maxItems", "fewer than prefixItems: not supported");
    const struct pyjson *rest = items && (items->type == PYJSON_OBJECT) ? items : NULL;
    min = min > (int64_t)n_prefix ? min - (int64_t)n_prefix : 0;
    if (max >= 0) max -= (int64_t)n_prefix;
    uint32_t end = space(g, byte(g, ']', next)), at;
    if (!compile_items(c, rest, min, max, n_prefix == 0, end, &at)) return false;
    for (size_t i = n_prefix; i > 0; i--) {
        const struct pyjson *p = prefix->first;
        for (size_t k = 1; k < i; k++) p = p->next;
        uint32_t value;
        if (!compile_value(c, p->type == PYJSON_TRUE ? NULL : p, "prefixItems", at, &value)) return false;
        at = i == 1 ? value : byte(g, ',', space(g, value));
    }
    *out = byte(g, '[', space(g, at));
    return true;
}

// ---- Numbers and the rest

// Of the bounds of integers, those that a sign decides.
static bool compile_integer(struct compiler *c, const struct pyjson *schema, uint32_t next, uint32_t *out) {
    const struct pyjson *least = pyjson_get(schema, "minimum"), *above = pyjson_get(schema, "exclusiveMinimum");
    bool negative = true, zero = true;
    int64_t n;
    if (least) {
        if (!value_int(least, 0, 1, &n)) return refuse(c, "minimum", "of an integer, 0 and 1 are supported");
        negative = false;
        zero = n == 0;
    }
    if (above) {
        if (!value_int(above, -1, 0, &n)) return refuse(c, "exclusiveMinimum", "of an integer, -1 and 0 are supported");
        negative = false;
        if (n == 0) zero = false;
    }
    *out = integer(c->g, negative, zero, next);
    return true;
}

static bool compile_type(struct compiler *c, const struct pyjson *schema, const char *type, uint32_t next,
                         uint32_t *out) {
    struct grammar *g = c->g;
    int64_t min = 0, max = -1;
    if (strcmp(type, "null") == 0) *out = grammar_text(g, "null", 4, next);
    else if (strcmp(type, "boolean") == 0)
        *out = grammar_split(g, grammar_text(g, "true", 4, next), grammar_text(g, "false", 5, next));
    else if (strcmp(type, "integer") == 0) return compile_integer(c, schema, next, out);
    else if (strcmp(type, "number") == 0) {
        if (pyjson_get(schema, "minimum") || pyjson_get(schema, "exclusiveMinimum"))
            return refuse(c, "minimum", "of a number this is not supported");
        *out = number(g, next);
    } else if (strcmp(type, "string") == 0) {
        if (!read_count(c, schema, "minLength", &min) || !read_count(c, schema, "maxLength", &max)) return false;
        if (max >= 0 && max < min) return refuse(c, "minLength", "more than maxLength");
        *out = string(g, min, max, next);
    } else if (strcmp(type, "array") == 0) return compile_array(c, schema, next, out);
    else if (strcmp(type, "object") == 0) return compile_object(c, schema, next, out);
    else return refuse(c, "type", "expected null, boolean, integer, number, string, array or object");
    return true;
}

// The type that a schema without one is about: what satisfies that type satisfies the schema.
static const char *implied_type(const struct pyjson *schema) {
    static const char *const by[][2] = {
        {"properties", "object"}, {"required", "object"},         {"additionalProperties", "object"},
        {"items", "array"},       {"prefixItems", "array"},       {"minItems", "array"},
        {"maxItems", "array"},    {"minLength", "string"},        {"maxLength", "string"},
        {"minimum", "integer"},   {"exclusiveMinimum", "integer"}};
    for (size_t i = 0; i < sizeof by / sizeof by[0]; i++)
        if (pyjson_get(schema, by[i][0])) return by[i][1];
    return NULL;
}

static bool compile_typed(struct compiler *c, const struct pyjson *schema, uint32_t next, uint32_t *out) {
    static const char *const known[] = {
        "type",      "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems",
        "minLength", "maxLength",  "minimum",  "exclusiveMinimum",     NULL};
    const struct pyjson *type = pyjson_get(schema, "type");
    if (!check_keywords(c, schema, known)) return false;
    if (!type) {
        const char *implied = implied_type(schema);
        if (implied) return compile_type(c, schema, implied, next, out);
        *out = grammar_json(c->g, false, next);
        return true;
    }
    if (type->type == PYJSON_STRING) return compile_type(c, schema, type->text, next, out);
    if (type->type != PYJSON_ARRAY || type->n == 0)
        return refuse(c, "type", "expected a string or an array of strings");
    bool any = false;
    for (const struct pyjson *t = type->first; t; t = t->next) {
        uint32_t one;
        if (t->type != PYJSON_STRING) return refuse(c, "type", "expected a string or an array of strings");
        if (!compile_type(c, schema, t->text, next, &one)) return false;
        *out = any ? grammar_split(c->g, *out, one) : one;
        any = true;
    }
    return true;
}

// The part of the root that "#/a/b" names.
static const struct pyjson *resolve(const struct pyjson *root, const char *ref) {
    if (*ref++ != '#') return NULL;
    const struct pyjson *at = root;
    while (*ref == '/' && at) {
        char name[256];
        size_t n = 0;
        for (ref++; *ref && *ref != '/'; ref++) {
            char ch = *ref;
            if (ch == '~' && (ref[1] == '0' || ref[1] == '1')) ch = *++ref == '0' ? '~' : '/';
            if (n + 1 == sizeof name) return NULL;
            name[n++] = ch;
        }
        name[n] = '\0';
        if (at->type == PYJSON_ARRAY) {
            const struct pyjson number = {.type = PYJSON_INT, .text = name, .n_text = n};
            int64_t index = 0;
            if (!value_int(&number, 0, 100000, &index)) return NULL;
            at = at->first;
            while (at && index-- > 0) at = at->next;
        } else {
            at = pyjson_get(at, name);
        }
    }
    return *ref ? NULL : at;
}

// Of oneOf exactly one may match: then the branches must differ in type.
static bool are_disjoint(const struct pyjson *list) {
    unsigned seen = 0;
    for (const struct pyjson *s = list->first; s; s = s->next) {
        const struct pyjson *type = pyjson_get(s, "type");
        unsigned bit = 0;
        for (size_t i = 0; i < 7; i++)
            if (pyjson_is_text(type, type_names[i])) bit = 1u << (i == 2 ? 3 : i); // integers are numbers
        if (bit == 0 || (seen & bit)) return false;
        seen |= bit;
    }
    return true;
}

static bool compile_any_of(struct compiler *c, const struct pyjson *schema, const char *key, uint32_t next,
                           uint32_t *out) {
    const char *const known[] = {key, NULL};
    const struct pyjson *list = pyjson_get(schema, key);
    bool any = false;
    if (list->type != PYJSON_ARRAY || list->n == 0) return refuse(c, key, "expected an array of schemas, not empty");
    if (!check_keywords(c, schema, known)) return false;
    if (strcmp(key, "allOf") == 0 && list->n > 1) return refuse(c, key, "of more than one schema is not supported");
    if (strcmp(key, "oneOf") == 0 && list->n > 1 && !are_disjoint(list))
        return refuse(c, key, "its schemas must have different types (anyOf does not ask for that)");
    for (const struct pyjson *s = list->first; s; s = s->next) {
        uint32_t one;
        if (s->type == PYJSON_FALSE) continue;
        if (!compile_value(c, s, key, next, &one)) return false;
        *out = any ? grammar_split(c->g, *out, one) : one;
        any = true;
    }
    return any || refuse(c, key, "nothing can satisfy this");
}

static bool compile_ref(struct compiler *c, const struct pyjson *schema, uint32_t next, uint32_t *out) {
    static const char *const known[] = {"$ref", NULL};
    const struct pyjson *ref = pyjson_get(schema, "$ref");
    if (!check_keywords(c, schema, known)) return false;
    const struct pyjson *target = ref->type == PYJSON_STRING ? resolve(c->root, ref->text) : NULL;
    if (!target) return refuse(c, "$ref", "expected a path within the schema, such as #/$defs/name");
    return compile(c, target, next, out);
}

static bool compile(struct compiler *c, const struct pyjson *schema, uint32_t next, uint32_t *out) {
    static const char *const unions[] = {"anyOf", "oneOf", "allOf"};
    if (c->g->full) return error_set(c->err, "%s: the schema is too large: more than %d places", c->where, MAX_NODES);
    if (c->depth == MAX_DEPTH)
        return refuse(c, pyjson_get(schema, "$ref") ? "$ref" : "depth",
                      "more than 32 levels; recursive schemas are not supported");
    if (schema->type == PYJSON_TRUE) {
        *out = grammar_json(c->g, false, next);
        return true;
    }
    if (schema->type == PYJSON_FALSE) return refuse(c, "false", "nothing can satisfy this");
    if (schema->type != PYJSON_OBJECT) return refuse(c, "type", "a schema is an object, true or false");
    c->depth++;
    bool ok, done = false;
    if (pyjson_get(schema, "$ref")) ok = compile_ref(c, schema, next, out), done = true;
    else if (pyjson_get(schema, "enum") || pyjson_get(schema, "const"))
        ok = compile_enum(c, schema, next, out), done = true;
    else ok = true;
    for (size_t i = 0; !done && i < 3; i++)
        if (pyjson_get(schema, unions[i])) ok = compile_any_of(c, schema, unions[i], next, out), done = true;
    if (!done) ok = compile_typed(c, schema, next, out);
    c->depth--;
    return ok;
}

bool schema_compile(struct grammar *g, const struct pyjson *schema, const char *where, uint32_t next, uint32_t *start,
                    struct error *err) {
    struct compiler c = {.g = g, .root = schema, .where = where, .err = err};
    if (!compile(&c, schema, next, start)) return false;
    return !g->full || error_set(err, "%s: the schema is too large: more than %d places", where, MAX_NODES);
}
