// schema_values.c: values of one type after the other: null, booleans, numbers, strings, and those that are listed.
#include "base/buffer.h"
#include "server/fields.h"
#include "server/schema_parts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST_AT_LEAST = 65536, // characters, items, properties that a text must have
    MAX_FORMATTED = 200    // characters of a string with a format, where the schema bounds them anyhow
};

// ---- Values

static bool is_whole(const struct pyjson *v) {
    return v->type == PYJSON_INT || (v->type == PYJSON_FLOAT && isfinite(v->number) && v->number == floor(v->number));
}

unsigned type_of(const struct pyjson *v) {
    switch (v->type) {
    case PYJSON_NULL: return IS_NULL;
    case PYJSON_FALSE:
    case PYJSON_TRUE: return IS_BOOLEAN;
    case PYJSON_INT:
    case PYJSON_FLOAT: return is_whole(v) ? IS_INTEGER : IS_FRACTION;
    case PYJSON_STRING: return IS_STRING;
    case PYJSON_ARRAY: return IS_ARRAY;
    default: return IS_OBJECT;
    }
}

static const struct pyjson *member(const struct pyjson *object, const struct pyjson *like) {
    for (const struct pyjson *m = object->first; m; m = m->next)
        if (m->n_key == like->n_key && memcmp(m->key, like->key, m->n_key) == 0) return m;
    return NULL;
}

bool value_equal(const struct pyjson *a, const struct pyjson *b) {
    unsigned type = type_of(a);
    if (type != type_of(b)) return false;
    if (type & IS_NUMBER) {
        if (a->type == PYJSON_INT && b->type == PYJSON_INT) return strcmp(a->text, b->text) == 0;
        return value_number(a) == value_number(b);
    }
    if (type == IS_STRING) return a->n_text == b->n_text && memcmp(a->text, b->text, a->n_text) == 0;
    if (type == IS_BOOLEAN) return a->type == b->type;
    if (type == IS_NULL) return true;
    if (a->n != b->n) return false;
    for (const struct pyjson *x = a->first, *y = b->first; x; x = x->next, y = y ? y->next : NULL) {
        const struct pyjson *other = type == IS_ARRAY ? y : member(b, x);
        if (!other || !value_equal(x, other)) return false;
    }
    return true;
}

// ---- Types

static const struct {
    const char *name;
    unsigned types;
} type_names[] = {{"null", IS_NULL},     {"boolean", IS_BOOLEAN}, {"integer", IS_INTEGER}, {"number", IS_NUMBER},
                  {"string", IS_STRING}, {"array", IS_ARRAY},     {"object", IS_OBJECT}};

static unsigned named_type(const struct pyjson *name) {
    for (size_t i = 0; i < sizeof type_names / sizeof type_names[0]; i++)
        if (pyjson_is_text(name, type_names[i].name)) return type_names[i].types;
    return 0;
}

// The types that a schema's other keywords are about.
static unsigned implied_types(const struct pyjson *schema) {
    static const struct {
        const char *key;
        unsigned types;
    } by[] = {{"properties", IS_OBJECT},
              {"required", IS_OBJECT},
              {"additionalProperties", IS_OBJECT},
              {"patternProperties", IS_OBJECT},
              {"propertyNames", IS_OBJECT},
              {"minProperties", IS_OBJECT},
              {"maxProperties", IS_OBJECT},
              {"items", IS_ARRAY},
              {"prefixItems", IS_ARRAY},
              {"minItems", IS_ARRAY},
              {"maxItems", IS_ARRAY},
              {"uniqueItems", IS_ARRAY},
              {"minLength", IS_STRING},
              {"maxLength", IS_STRING},
              {"pattern", IS_STRING},
              {"minimum", IS_NUMBER},
              {"maximum", IS_NUMBER},
              {"exclusiveMinimum", IS_NUMBER},
              {"exclusiveMaximum", IS_NUMBER},
              {"multipleOf", IS_NUMBER},
              {"contains", IS_ARRAY},
              {"dependentRequired", IS_OBJECT},
              {"dependentSchemas", IS_OBJECT}};
    const struct pyjson *format = pyjson_get(schema, "format");
    unsigned types = format && format->type == PYJSON_STRING && pattern_of_format(format->text) ? IS_STRING : 0;
    for (size_t i = 0; i < sizeof by / sizeof by[0]; i++)
        if (pyjson_get(schema, by[i].key)) types |= by[i].types;
    return types;
}

enum outcome read_types(struct compiler *c, const struct items *items, unsigned *types, bool *given) {
    unsigned implied = 0;
    *types = IS_ANY;
    *given = false;
    for (size_t i = 0; i < items->n; i++) {
        const struct pyjson *type = pyjson_get(items->list[i].schema, "type");
        unsigned here = type ? named_type(type) : IS_ANY;
        implied |= implied_types(items->list[i].schema);
        if (type && type->type == PYJSON_ARRAY) {
            for (const struct pyjson *t = type->first; t; t = t->next) {
                if (!named_type(t)) return refuse(c, "type", "expected names of types");
                here |= named_type(t);
            }
        }
        if (!here)
            return refuse(c, "type",
                          "expected null, boolean, integer, number, string, array, object or a list of them");
        *given = *given || type;
        *types &= here;
    }
    if (!*given && implied) *types = implied;
    return *types ? DONE : NEVER;
}

// ---- Numbers in schemas

enum outcome read_count(struct compiler *c, const struct pyjson *schema, const char *key, uint32_t *out, bool *there) {
    const struct pyjson *v = pyjson_get(schema, key);
    int64_t n = 0;
    *there = v != NULL;
    if (!v) return DONE;
    if (v->type == PYJSON_INT && v->text[0] != '-' && v->n_text > 9) n = NO_LIMIT;
    else if (!value_int(v, 0, NO_LIMIT, &n)) return refuse(c, key, "expected a whole number, not negative");
    if (n > MOST_AT_LEAST && strncmp(key, "min", 3) == 0) return refuse(c, key, "more than 65,536 is not supported");
    *out = n >= 1000000000 ? (uint32_t)NO_LIMIT : (uint32_t)n;
    return DONE;
}

static enum outcome read_bound(struct compiler *c, const struct pyjson *schema, const char *key, bool is_low,
                               bool excluded, struct number_form *f) {
    const struct pyjson *v = pyjson_get(schema, key);
    struct decimal d;
    if (!v) return DONE;
    if (!(type_of(v) & IS_NUMBER)) return refuse(c, key, "expected a number");
    switch (decimal_read(v, &d)) {
    case 0: number_bound(f, &d, is_low, excluded); return DONE;
    case -1: return is_low ? DONE : NEVER; // beyond what is written here
    case 1: return is_low ? NEVER : DONE;
    default: return refuse(c, key, "a bound of more than 17 decimals is not supported");
    }
}

static enum outcome read_multiple(struct compiler *c, const struct pyjson *schema, struct number_form *f) {
    const struct pyjson *v = pyjson_get(schema, "multipleOf");
    if (!v) return DONE;
    double by = type_of(v) & IS_NUMBER ? value_number(v) : 0, tenth = 1;
    if (!(by > 0)) return refuse(c, "multipleOf", "expected a number above 0");
    if (is_whole(v) && by <= 1000) {
        uint32_t a = f->multiple ? f->multiple : 1, b = (uint32_t)by, x = a, y = b;
        while (y) { // the least that both divide
            uint32_t rest = x % y;
            x = y;
            y = rest;
        }
        f->multiple = a / x * b;
        f->integer = true;
        if (f->multiple <= 1000) return DONE;
    }
    for (int places = 1; places <= 6; places++) {
        tenth *= 10;
        if (by != 1 / tenth) continue;
        if (f->decimals < 0 || f->decimals > places) f->decimals = places;
        return DONE;
    }
    return refuse(c, "multipleOf", "of whole numbers up to 1000, and of 0.1, 0.01 ... 0.000001, is supported");
}

enum outcome read_number_form(struct compiler *c, const struct items *items, bool integer, struct number_form *f) {
    *f = (struct number_form){.integer = integer, .decimals = -1};
    enum outcome result = DONE;
    for (size_t i = 0; result == DONE && i < items->n; i++) {
        const struct pyjson *s = items->list[i].schema;
        result = read_bound(c, s, "minimum", true, false, f);
        if (result == DONE) result = read_bound(c, s, "maximum", false, false, f);
        if (result == DONE) result = read_bound(c, s, "exclusiveMinimum", true, true, f);
        if (result == DONE) result = read_bound(c, s, "exclusiveMaximum", false, true, f);
        if (result == DONE) result = read_multiple(c, s, f);
    }
    return result;
}

static enum outcome compile_number(struct compiler *c, const struct items *items, bool integer, uint32_t next,
                                   uint32_t *out) {
    struct number_form f;
    enum outcome result = read_number_form(c, items, integer, &f);
    if (result != DONE || number_compile(c->g, &f, next, out)) return result;
    return refuse(c, f.multiple > 1 ? "multipleOf" : "minimum",
                  "together with bounds this is supported only for bounds from 0 to 9999, or for a bound of 0");
}

// ---- Strings

static enum outcome add_pattern(struct compiler *c, const char *key, const char *pattern, size_t n,
                                struct text_form *f) {
    struct error why = {0};
    if (f->n_languages == MAX_LANGUAGES - 1) return refuse(c, key, "too many patterns for one string");
    const struct language *l = pattern_language(c->arena, pattern, n, &c->pattern_budget, &why);
    if (!l) return refuse(c, key, why.text);
    f->languages[f->n_languages++] = l;
    return DONE;
}

// ^(?!^[...]*$) in front, as Pydantic writes for decimals, says that some other character is in the text: a language of
// its own, before the rest of the pattern.
static enum outcome add_patterns(struct compiler *c, const struct pyjson *pattern, struct text_form *f) {
    static const char begin[] = "^(?!^[", end[] = "]*$)";
    const char *text = pattern->text, *set = text + sizeof begin - 1;
    bool excludes = strncmp(text, begin, sizeof begin - 1) == 0 && strlen(text) == pattern->n_text;
    size_t n = excludes ? strcspn(set, "]\\[^") : 0;
    if (!excludes || n == 0 || strncmp(set + n, end, sizeof end - 1) != 0)
        return add_pattern(c, "pattern", text, pattern->n_text, f);
    struct buffer other = {0}, rest = {0};
    bool ok = buffer_append_text(&other, "[^") && buffer_append(&other, set, n) && buffer_append_byte(&other, ']') &&
              buffer_append_byte(&rest, '^') && buffer_append_text(&rest, set + n + sizeof end - 1);
    enum outcome result = ok ? add_pattern(c, "pattern", other.data, other.len, f) : no_memory(c);
    if (result == DONE) result = add_pattern(c, "pattern", rest.data, rest.len, f);
    buffer_free(&other);
    buffer_free(&rest);
    return result;
}

static enum outcome add_except(struct compiler *c, const struct pyjson *list, struct text_form *f) {
    if (f->n_languages == MAX_LANGUAGES - 1) return refuse(c, "not", "too many patterns for one string");
    struct language_name *names = arena_alloc(c->arena, list->n, sizeof *names);
    if (!names) return no_memory(c);
    size_t n = 0;
    for (const struct pyjson *v = list->first; v; v = v->next) names[n++] = (struct language_name){v->text, v->n_text};
    const struct language *l = language_except(c->arena, names, n);
    if (!l) return no_memory(c);
    f->languages[f->n_languages++] = l;
    return DONE;
}

enum outcome read_text_form(struct compiler *c, const struct items *items, struct text_form *f) {
    bool formatted = false, there;
    enum outcome result = DONE;
    *f = (struct text_form){.max = NO_LIMIT};
    for (size_t i = 0; result == DONE && i < items->n; i++) {
        const struct pyjson *s = items->list[i].schema;
        const struct pyjson *pattern = pyjson_get(s, "pattern"), *format = pyjson_get(s, "format");
        uint32_t n = 0;
        if (read_count(c, s, "minLength", &n, &there) == REFUSED) return REFUSED;
        if (there && n > f->min) f->min = n;
        if (read_count(c, s, "maxLength", &n, &there) == REFUSED) return REFUSED;
        if (there && n < f->max) f->max = n;
        if (pattern && pattern->type != PYJSON_STRING) return refuse(c, "pattern", "expected a string");
        if (format && format->type != PYJSON_STRING) return refuse(c, "format", "expected a string");
        const char *form = format ? pattern_of_format(format->text) : NULL;
        const struct pyjson *except = pyjson_get(s, except_key);
        if (pattern) result = add_patterns(c, pattern, f);
        if (result == DONE && except) result = add_except(c, except, f);
        if (result == DONE && form) result = add_pattern(c, "format", form, strlen(form), f);
        formatted = formatted || form;
    }
    if (formatted && f->max != NO_LIMIT && f->max > MAX_FORMATTED && f->min <= MAX_FORMATTED) f->max = MAX_FORMATTED;
    return result != DONE ? result : f->min > f->max ? NEVER : DONE;
}

static enum outcome compile_text(struct compiler *c, const struct items *items, uint32_t next, uint32_t *out) {
    struct text_form f;
    struct error why = {0};
    enum outcome result = read_text_form(c, items, &f);
    if (result != DONE) return result;
    if (text_compile(c->g, c->arena, &c->parts, &f, next, out, &why)) return DONE;
    return refuse(c, f.max != NO_LIMIT ? "maxLength" : f.min ? "minLength" : "pattern", why.text);
}

// ---- Values that are listed

// `own`: the list that v is from.
static bool one_of_values(const struct pyjson *schema, const struct pyjson *own, const struct pyjson *v) {
    const struct pyjson *list = pyjson_get(schema, "enum"), *only = pyjson_get(schema, "const");
    bool found = !list || list == own;
    for (const struct pyjson *e = list ? list->first : NULL; e && !found; e = e->next) found = value_equal(e, v);
    return found && (!only || value_equal(only, v));
}

// Is a keyword about arrays or objects there, which values are not examined by?
static const char *about_inside(const struct items *items, unsigned type) {
    static const char *const keys[] = {"items",
                                       "prefixItems",
                                       "minItems",
                                       "maxItems",
                                       "uniqueItems",
                                       "contains",
                                       "properties",
                                       "required",
                                       "additionalProperties",
                                       "patternProperties",
                                       "propertyNames",
                                       "minProperties",
                                       "maxProperties"};
    size_t from = type == IS_ARRAY ? 0 : 6, to = type == IS_ARRAY ? 6 : sizeof keys / sizeof keys[0];
    for (size_t i = 0; i < items->n; i++)
        for (size_t k = from; k < to; k++)
            if (pyjson_get(items->list[i].schema, keys[k])) return keys[k];
    return NULL;
}

static enum outcome satisfies(struct compiler *c, const struct items *items, unsigned types, const struct pyjson *own,
                              const struct pyjson *v) {
    unsigned type = type_of(v);
    if (!(type & types)) return NEVER;
    for (size_t i = 0; i < items->n; i++)
        if (!one_of_values(items->list[i].schema, own, v)) return NEVER;
    if (type == IS_STRING) {
        struct text_form f;
        enum outcome result = read_text_form(c, items, &f);
        return result != DONE ? result : text_has(&f, v->text, v->n_text) ? DONE : NEVER;
    }
    if (type & IS_NUMBER) {
        struct number_form f;
        enum outcome result = read_number_form(c, items, false, &f);
        return result != DONE ? result : number_has(&f, v) ? DONE : NEVER;
    }
    if (type & (IS_ARRAY | IS_OBJECT)) {
        const char *key = about_inside(items, type);
        if (key) return refuse(c, key, "together with enum or const this is not supported");
    }
    return DONE;
}

enum outcome read_values(struct compiler *c, const struct items *items, struct schemas *values, bool *given) {
    const struct pyjson *list = NULL, *only = NULL;
    unsigned types;
    bool has_type;
    *given = false;
    for (size_t i = 0; i < items->n; i++) {
        const struct pyjson *e = pyjson_get(items->list[i].schema, "enum");
        if (e && (e->type != PYJSON_ARRAY || e->n == 0)) return refuse(c, "enum", "expected an array, not empty");
        if (e && !list) list = e;
        if (!only) only = pyjson_get(items->list[i].schema, "const");
    }
    *given = list || only;
    if (!*given) return DONE;
    enum outcome result = read_types(c, items, &types, &has_type);
    if (result != DONE) return result;
    if (!has_type) types = IS_ANY;
    for (const struct pyjson *v = only ? only : list->first; v; v = only ? NULL : v->next) {
        bool known = false;
        result = satisfies(c, items, types, only ? NULL : list, v);
        if (result == REFUSED) return REFUSED;
        for (size_t i = 0; values->n <= 64 && i < values->n; i++) known = known || value_equal(values->list[i], v);
        if (result == DONE && !known && !schemas_add(c, values, v)) return REFUSED;
    }
    return values->n ? DONE : NEVER;
}

// ---- Their texts, as a tree

static int compare_texts(const void *a, const void *b) {
    const struct buffer *x = a, *y = b;
    int order = memcmp(x->data, y->data, x->len < y->len ? x->len : y->len);
    return order ? order : (x->len > y->len) - (x->len < y->len);
}

// The texts from `at` on; all n, in order and not equal, are the same before it. A value's text is never the beginning
// of another's but for numbers.
static uint32_t put_tree(struct grammar *g, const struct buffer *texts, size_t n, size_t at, uint32_t next) {
    const struct buffer *first = &texts[0], *last = &texts[n - 1];
    size_t common = at, most = first->len < last->len ? first->len : last->len;
    while (common < most && first->data[common] == last->data[common]) common++;
    bool any = false;
    uint32_t all = next;
    for (size_t from = 0, to; from < n && !g->full; from = to, any = true) {
        uint32_t one = next;
        to = from + 1;
        if (texts[from].len > common) {
            while (to < n && texts[to].data[common] == texts[from].data[common]) to++;
            one = to - from > 1 ? put_tree(g, texts + from, to - from, common, next)
                                : grammar_text(g, texts[from].data + common, texts[from].len - common, next);
        }
        all = any ? grammar_split(g, all, one) : one;
    }
    return grammar_text(g, first->data + at, common - at, all);
}

static bool put_values(struct compiler *c, const struct schemas *values, uint32_t next, uint32_t *out) {
    struct buffer *texts = arena_alloc_zero(c->arena, values->n, sizeof *texts);
    bool ok = texts != NULL;
    for (size_t i = 0; ok && i < values->n; i++) ok = pyjson_write_portable(values->list[i], &texts[i]);
    if (!ok) no_memory(c);
    size_t n = 0;
    if (ok) qsort(texts, values->n, sizeof *texts, compare_texts);
    for (size_t i = 0; ok && i < values->n; i++) {
        if (n && compare_texts(&texts[n - 1], &texts[i]) == 0) continue;
        struct buffer swap = texts[n];
        texts[n++] = texts[i];
        texts[i] = swap;
    }
    if (ok) *out = put_tree(c->g, texts, n, 0, next);
    for (size_t i = 0; texts && i < values->n; i++) buffer_free(&texts[i]);
    return ok;
}

// ---- All types

static enum outcome compile_type(struct compiler *c, const struct items *items, unsigned type, uint32_t next,
                                 uint32_t *out) {
    struct grammar *g = c->g;
    switch (type) {
    case IS_NULL: *out = grammar_text(g, "null", 4, next); return DONE;
    case IS_BOOLEAN:
        *out = grammar_split(g, grammar_text(g, "true", 4, next), grammar_text(g, "false", 5, next));
        return DONE;
    case IS_INTEGER: return compile_number(c, items, true, next, out);
    case IS_FRACTION: return compile_number(c, items, false, next, out); // and whole ones
    case IS_STRING: return compile_text(c, items, next, out);
    case IS_ARRAY: return compile_array(c, items, next, out);
    default: return compile_object(c, items, next, out);
    }
}

enum outcome compile_values(struct compiler *c, const struct items *items, uint32_t next, uint32_t *out) {
    struct schemas values = {0};
    unsigned types;
    bool given, any = false;
    uint32_t one;
    enum outcome result = read_values(c, items, &values, &given);
    if (result != DONE) return result;
    if (given) return put_values(c, &values, next, out) ? DONE : REFUSED;
    result = read_types(c, items, &types, &given);
    if (result != DONE) return result;
    if (!given && types == IS_ANY) {
        *out = grammar_json(c->g, false, next);
        return DONE;
    }
    if ((types & IS_NUMBER) == IS_NUMBER) types &= ~(unsigned)IS_INTEGER;
    for (unsigned type = 1; type <= IS_OBJECT; type <<= 1) {
        if (!(types & type)) continue;
        result = compile_type(c, items, type, next, &one);
        if (result == REFUSED) return REFUSED;
        if (result == NEVER) continue;
        *out = any ? grammar_split(c->g, *out, one) : one;
        any = true;
    }
    return any ? DONE : NEVER;
}
