// schema_objects.c: arrays and objects, from conjunctions of schemas.
#include "base/buffer.h"
#include "server/schema_parts.h"

#include <stdio.h>
#include <string.h>

enum { MAX_PREFIX = 512, MAX_PROPERTIES = 512, MAX_UNIQUE = 10, MAX_COUNTED = 64 };

// ---- Arrays

struct array_form {
    uint32_t min, max; // max: NO_LIMIT
    bool unique;
    const struct pyjson *contains; // the schema that has it; NULL
    size_t n_prefix;
    uint32_t prefix[MAX_PREFIX], rest; // parts; rest: of all further items
};

// The schemas of item `index`.
static enum outcome item_schemas(struct compiler *c, const struct items *items, size_t index, struct schemas *out) {
    for (size_t i = 0; i < items->n; i++) {
        const struct pyjson *prefix = pyjson_get(items->list[i].schema, "prefixItems");
        const struct pyjson *s = pyjson_get(items->list[i].schema, "items");
        if (prefix && index < prefix->n) {
            s = prefix->first;
            for (size_t k = 0; k < index; k++) s = s->next;
        }
        if (s && !schemas_add(c, out, s)) return REFUSED;
    }
    return DONE;
}

static enum outcome item_part(struct compiler *c, const struct items *items, size_t index, uint32_t *part) {
    struct schemas s = {0};
    if (item_schemas(c, items, index, &s) == REFUSED) return REFUSED;
    return compile_part(c, &s, "items", part);
}

static enum outcome read_array(struct compiler *c, const struct items *items, struct array_form *f) {
    *f = (struct array_form){.max = NO_LIMIT};
    for (size_t i = 0; i < items->n; i++) {
        const struct pyjson *s = items->list[i].schema, *prefix = pyjson_get(s, "prefixItems");
        const struct pyjson *unique = pyjson_get(s, "uniqueItems"), *rest = pyjson_get(s, "items");
        uint32_t n = 0;
        bool there;
        if (read_count(c, s, "minItems", &n, &there) == REFUSED) return REFUSED;
        if (there && n > f->min) f->min = n;
        if (read_count(c, s, "maxItems", &n, &there) == REFUSED) return REFUSED;
        if (there && n < f->max) f->max = n;
        if (unique && unique->type != PYJSON_TRUE && unique->type != PYJSON_FALSE)
            return refuse(c, "uniqueItems", "expected true or false");
        if (unique && unique->type == PYJSON_TRUE) f->unique = true;
        if (pyjson_get(s, "contains") && f->contains) return refuse(c, "contains", "more than one is not supported");
        if (pyjson_get(s, "contains")) f->contains = s;
        if (prefix && prefix->type != PYJSON_ARRAY) return refuse(c, "prefixItems", "expected an array of schemas");
        if (rest && rest->type == PYJSON_ARRAY) return refuse(c, "items", "a list is not supported: use prefixItems");
        if (prefix && prefix->n > MAX_PREFIX) return refuse(c, "prefixItems", "more than 512");
        if (prefix && prefix->n > f->n_prefix) f->n_prefix = prefix->n;
    }
    return DONE;
}

// The parts of the items; what no item can be ends the array.
static enum outcome read_items(struct compiler *c, const struct items *items, struct array_form *f) {
    for (size_t i = 0; i < f->n_prefix && i < f->max; i++) {
        enum outcome result = item_part(c, items, i, &f->prefix[i]);
        if (result == REFUSED) return REFUSED;
        if (result == NEVER) f->max = (uint32_t)i;
    }
    if (f->n_prefix > f->max) f->n_prefix = f->max;
    if (f->max > f->n_prefix) {
        enum outcome result = item_part(c, items, MAX_PREFIX, &f->rest);
        if (result == REFUSED) return REFUSED;
        if (result == NEVER) f->max = (uint32_t)f->n_prefix;
    }
    return f->min > f->max ? NEVER : DONE;
}

static uint32_t less(uint32_t n, uint32_t by) {
    return n == NO_LIMIT ? n : n > by ? n - by : 0;
}

// The values of null and boolean, where no other type may come.
static enum outcome few_values(struct compiler *c, const struct items *items, struct schemas *values, bool *given) {
    static const struct pyjson null = {.type = PYJSON_NULL}, no = {.type = PYJSON_FALSE}, yes = {.type = PYJSON_TRUE};
    unsigned types;
    enum outcome result = read_types(c, items, &types, given);
    *given = result == DONE && !(types & ~(unsigned)(IS_NULL | IS_BOOLEAN));
    if (!*given) return result;
    bool ok = !(types & IS_NULL) || schemas_add(c, values, &null);
    if (types & IS_BOOLEAN) ok = ok && schemas_add(c, values, &no) && schemas_add(c, values, &yes);
    return ok ? DONE : REFUSED;
}

// Different values out of few: which ones are left is part of the place.
static enum outcome compile_unique(struct compiler *c, const struct items *items, const struct array_form *f,
                                   uint32_t next, uint32_t *out) {
    struct grammar *g = c->g;
    struct schemas s = {0}, values = {0};
    struct items flat = {0};
    uint32_t parts[MAX_UNIQUE], nodes[1 << MAX_UNIQUE];
    bool given = false;
    enum outcome result = item_schemas(c, items, MAX_PREFIX, &s);
    for (size_t i = 0; result == DONE && i < s.n; i++) result = flatten(c, s.list[i], &flat);
    if (result == DONE) result = read_values(c, &flat, &values, &given);
    if (result == DONE && !given) result = few_values(c, &flat, &values, &given);
    if (result == NEVER) values.n = 0;
    if (result == REFUSED) return REFUSED;
    if (f->n_prefix || (!given && result == DONE) || values.n > MAX_UNIQUE)
        return refuse(c, "uniqueItems", "this is supported for booleans, null and an enum of up to 10 values");
    for (size_t i = 0; i < flat.n; i++)
        if (pyjson_get(flat.list[i].schema, "anyOf") || pyjson_get(flat.list[i].schema, "oneOf"))
            return refuse(c, "uniqueItems", "this is supported for booleans, null and an enum of up to 10 values");
    if (f->min > values.n) return NEVER;
    uint32_t end = grammar_byte(g, ']', next), close = grammar_space(g, end);
    for (size_t i = 0; i < values.n; i++)
        if (!literal(c, values.list[i], grammar_return(g), &parts[i])) return REFUSED;
    for (uint32_t used = ((uint32_t)1 << values.n); used-- > 0;) {
        uint32_t count = (uint32_t)__builtin_popcount(used);
        bool any = count >= f->min;
        uint32_t all = used ? close : end;
        for (size_t i = 0; i < values.n && count < f->max; i++) {
            if (used >> i & 1) continue;
            uint32_t one = grammar_space(g, grammar_call(g, parts[i], nodes[used | 1u << i]));
            if (used) one = grammar_byte(g, ',', one);
            all = any ? grammar_split(g, all, one) : one;
            any = true;
        }
        nodes[used] = any ? all : grammar_hole(g);
    }
    *out = grammar_byte(g, '[', nodes[0]);
    return DONE;
}

// Items of which some are of a kind: where the text stands is how many items it has and how many of the kind, each as
// far as it matters. Without maxContains, an item of the kind may also be taken for any other.
struct contains {
    uint32_t least, most; // of the kind; most: NO_LIMIT
    bool others, kinds;   // there are items that are not of the kind, and some that are
    uint32_t other_part, kind_part;
    uint32_t n_items, n_kind; // the counts that are told apart; the last stands for all above it, if there is no limit
    uint32_t end, close;
};

static enum outcome read_contains(struct compiler *c, const struct items *items, const struct array_form *f,
                                  struct contains *k) {
    const struct pyjson *kind = pyjson_get(f->contains, "contains");
    struct schemas any = {0}, both = {0};
    bool there;
    *k = (struct contains){.least = 1, .most = NO_LIMIT};
    if (read_count(c, f->contains, "minContains", &k->least, &there) == REFUSED) return REFUSED;
    if (read_count(c, f->contains, "maxContains", &k->most, &there) == REFUSED) return REFUSED;
    if (item_schemas(c, items, 0, &any) == REFUSED || item_schemas(c, items, 0, &both) == REFUSED) return REFUSED;
    if (!schemas_add(c, &both, kind)) return REFUSED;
    const struct pyjson *none = k->most == NO_LIMIT ? NULL : schema_not(c, kind);
    if (k->most != NO_LIMIT && (!none || !schemas_add(c, &any, none))) return REFUSED;
    enum outcome result = compile_part(c, &any, "items", &k->other_part);
    if (result == REFUSED) return REFUSED;
    k->others = result == DONE;
    if ((result = compile_part(c, &both, "contains", &k->kind_part)) == REFUSED) return REFUSED;
    k->kinds = result == DONE;
    k->n_items = f->max != NO_LIMIT ? f->max : f->min ? f->min : 1;
    k->n_kind = k->most != NO_LIMIT ? k->most : k->least;
    if (k->least > k->most || f->min > f->max) return NEVER;
    if (k->n_items <= MAX_COUNTED && k->n_kind <= MAX_COUNTED) return DONE;
    return refuse(c, "contains", "where more than 64 items must be counted, this is not supported");
}

static uint32_t one_item(struct grammar *g, uint32_t part, bool first, uint32_t then) {
    uint32_t item = grammar_space(g, grammar_call(g, part, then));
    return first ? item : grammar_byte(g, ',', item);
}

static enum outcome compile_contains(struct compiler *c, const struct items *items, const struct array_form *f,
                                     uint32_t next, uint32_t *out) {
    struct grammar *g = c->g;
    struct contains k;
    uint32_t after[MAX_COUNTED + 1] = {0}, here[MAX_COUNTED + 1] = {0}; // where one more item leads to; this many
    bool lives_after[MAX_COUNTED + 1] = {false}, lives[MAX_COUNTED + 1] = {false};
    enum outcome result = read_contains(c, items, f, &k);
    if (result != DONE) return result;
    k.end = grammar_byte(g, ']', next);
    k.close = grammar_space(g, k.end);
    for (uint32_t i = k.n_items + 1; i-- > 0;) {
        bool last = i == k.n_items, loops = last && f->max == NO_LIMIT;
        const uint32_t *to = loops ? here : after;
        const bool *leads = loops ? lives : lives_after;
        for (uint32_t n = k.n_kind + 1; n-- > 0;) {
            bool ends = i >= f->min && n >= k.least, counts = n < k.n_kind, more = !last || loops;
            uint32_t up = counts ? n + 1 : n, hole = grammar_hole(g), way = 0;
            bool kind = more && k.kinds && (counts || k.most == NO_LIMIT);
            lives[n] = ends;
            here[n] = hole;
            // Where it would go round in the same place, that place must be able to end.
            kind = kind && (loops && up == n ? ends : leads[up]);
            lives[n] = ends || kind;
            bool other = more && k.others && (loops ? lives[n] : lives_after[n]);
            lives[n] = lives[n] || other;
            if (!lives[n]) continue;
            bool any = ends;
            if (ends) way = i ? k.close : k.end;
            if (kind) {
                uint32_t one = one_item(g, k.kind_part, i == 0, to[up]);
                way = any ? grammar_split(g, way, one) : one;
                any = true;
            }
            if (other) {
                uint32_t one = one_item(g, k.other_part, i == 0, to[n]);
                way = any ? grammar_split(g, way, one) : one;
            }
            grammar_fill(g, hole, way, way);
        }
        memcpy(after, here, sizeof after);
        memcpy(lives_after, lives, sizeof lives_after);
    }
    if (!lives[0]) return NEVER;
    *out = grammar_byte(g, '[', here[0]);
    return DONE;
}

enum outcome compile_array(struct compiler *c, const struct items *items, uint32_t next, uint32_t *out) {
    struct grammar *g = c->g;
    struct array_form f;
    enum outcome result = read_array(c, items, &f);
    if (result != DONE) return result;
    if (f.contains && (f.unique || f.n_prefix))
        return refuse(c, "contains", "beside uniqueItems or prefixItems this is not supported");
    if (f.unique && f.max > 1) return compile_unique(c, items, &f, next, out);
    if (f.contains) return compile_contains(c, items, &f, next, out);
    if ((result = read_items(c, items, &f)) != DONE) return result;
    uint32_t end = grammar_byte(g, ']', next), close = grammar_space(g, end), more = 0;
    uint32_t n_prefix = (uint32_t)f.n_prefix;
    if (f.max > n_prefix) more = grammar_byte(g, ',', grammar_space(g, grammar_call(g, f.rest, grammar_return(g))));
    if (n_prefix == 0 && f.max > 0) { // the first item has no comma in front
        uint32_t others = grammar_repeat(g, more, less(f.min, 1), less(f.max, 1), close);
        uint32_t first = grammar_space(g, grammar_call(g, f.rest, others));
        *out = grammar_byte(g, '[', f.min ? first : grammar_split(g, end, first));
        return DONE;
    }
    uint32_t at = grammar_repeat(g, more, less(f.min, n_prefix), less(f.max, n_prefix), close);
    for (uint32_t i = n_prefix; i > 0; i--) {
        uint32_t value = grammar_space(g, grammar_call(g, f.prefix[i - 1], at));
        at = i > 1 ? grammar_byte(g, ',', value) : value;
        if (i - 1 >= f.min) at = grammar_split(g, i > 1 ? close : end, at);
    }
    *out = grammar_byte(g, '[', n_prefix ? at : end);
    return DONE;
}

// ---- Objects

struct property {
    const char *key;
    size_t n_key;
    bool required, never;
    uint32_t part;
};

struct object_form {
    struct property list[MAX_PROPERTIES]; // [n]
    size_t n, n_required;
    uint32_t min, max;
    bool more;             // properties that it does not name may come
    struct text_form name; // of those
    uint32_t rest;         // the part of their values
};

bool names_properties(const struct pyjson *schema) {
    const struct pyjson *properties = pyjson_get(schema, "properties"), *required = pyjson_get(schema, "required");
    if (required && required->n) return true;
    for (const struct pyjson *p = properties ? properties->first : NULL; p; p = p->next)
        if (p->type != PYJSON_FALSE) return true;
    return properties && properties->n == 0;
}

static struct property *find(struct object_form *f, const char *key, size_t n) {
    for (size_t i = 0; i < f->n; i++)
        if (f->list[i].n_key == n && memcmp(f->list[i].key, key, n) == 0) return &f->list[i];
    return NULL;
}

static enum outcome add_name(struct compiler *c, struct object_form *f, const char *key, size_t n, bool required) {
    struct property *p = find(f, key, n);
    if (!p && f->n == MAX_PROPERTIES) return refuse(c, required ? "required" : "properties", "more than 512");
    if (!p) {
        p = &f->list[f->n++];
        *p = (struct property){.key = key, .n_key = n};
    }
    p->required = p->required || required;
    return DONE;
}

// The names of all properties, in the order in which they are written, and the counts.
static enum outcome read_names(struct compiler *c, const struct items *items, struct object_form *f) {
    *f = (struct object_form){.max = NO_LIMIT};
    for (size_t i = 0; i < items->n; i++) {
        const struct pyjson *s = items->list[i].schema, *properties = pyjson_get(s, "properties");
        const struct pyjson *patterns = pyjson_get(s, "patternProperties");
        uint32_t n = 0;
        bool there;
        if (properties && properties->type != PYJSON_OBJECT) return refuse(c, "properties", "expected an object");
        if (patterns && patterns->type != PYJSON_OBJECT) return refuse(c, "patternProperties", "expected an object");
        for (const struct pyjson *p = properties ? properties->first : NULL; p; p = p->next)
            if (add_name(c, f, p->key, p->n_key, false) == REFUSED) return REFUSED;
        if (read_count(c, s, "minProperties", &n, &there) == REFUSED) return REFUSED;
        if (there && n > f->min) f->min = n;
        if (read_count(c, s, "maxProperties", &n, &there) == REFUSED) return REFUSED;
        if (there && n < f->max) f->max = n;
    }
    for (size_t i = 0; i < items->n; i++) {
        const struct pyjson *required = pyjson_get(items->list[i].schema, "required");
        if (required && required->type != PYJSON_ARRAY) return refuse(c, "required", "expected an array of strings");
        for (const struct pyjson *r = required ? required->first : NULL; r; r = r->next) {
            if (r->type != PYJSON_STRING) return refuse(c, "required", "expected an array of strings");
            if (add_name(c, f, r->text, r->n_text, true) == REFUSED) return REFUSED;
        }
    }
    return DONE;
}

static const struct pyjson *named(const struct pyjson *object, const struct property *p) {
    for (const struct pyjson *m = object ? object->first : NULL; m; m = m->next)
        if (m->n_key == p->n_key && memcmp(m->key, p->key, p->n_key) == 0) return m;
    return NULL;
}

static const struct language *language_of(struct compiler *c, const struct pyjson *pattern) {
    struct error why = {0};
    const struct language *l = pattern_language(c->arena, pattern->key, pattern->n_key, &c->pattern_budget, &why);
    if (!l) refuse(c, "patternProperties", why.text);
    return l;
}

// The schemas of a property that one schema names or its patterns match; else its additionalProperties.
static enum outcome property_schemas(struct compiler *c, const struct pyjson *s, const struct property *p,
                                     struct schemas *out) {
    const struct pyjson *own = named(pyjson_get(s, "properties"), p), *other = pyjson_get(s, "additionalProperties");
    const struct pyjson *patterns = pyjson_get(s, "patternProperties");
    bool any = own != NULL;
    if (own && !schemas_add(c, out, own)) return REFUSED;
    for (const struct pyjson *m = patterns ? patterns->first : NULL; m; m = m->next) {
        const struct language *l = language_of(c, m);
        if (!l) return REFUSED;
        if (!language_has(l, p->key, p->n_key)) continue;
        if (!schemas_add(c, out, m)) return REFUSED;
        any = true;
    }
    return any || !other || schemas_add(c, out, other) ? DONE : REFUSED;
}

// What propertyNames asks of every name.
static enum outcome read_name_form(struct compiler *c, const struct items *items, struct text_form *form) {
    struct items flat = {0};
    struct schemas values = {0};
    unsigned types;
    bool given;
    *form = (struct text_form){.max = NO_LIMIT};
    for (size_t i = 0; i < items->n; i++) {
        const struct pyjson *names = pyjson_get(items->list[i].schema, "propertyNames");
        enum outcome result = names ? flatten(c, names, &flat) : DONE;
        if (result != DONE) return result;
    }
    for (size_t i = 0; i < flat.n; i++)
        if (pyjson_get(flat.list[i].schema, "anyOf") || pyjson_get(flat.list[i].schema, "oneOf"))
            return refuse(c, "propertyNames", "anyOf and oneOf are not supported here");
    enum outcome result = read_types(c, &flat, &types, &given);
    if (result == DONE && given && !(types & IS_STRING)) result = NEVER;
    if (result == DONE) result = read_text_form(c, &flat, form);
    if (result == DONE) result = read_values(c, &flat, &values, &given);
    if (result == DONE && given) return refuse(c, "propertyNames", "enum and const are not supported here");
    return result;
}

// Which further properties may come, and with which values.
static enum outcome read_rest(struct compiler *c, const struct items *items, struct object_form *f) {
    const struct pyjson *pattern = NULL, *holder = NULL;
    bool closed = false, open = false, listed = false;
    struct schemas values = {0};
    for (size_t i = 0; i < items->n; i++) {
        const struct pyjson *s = items->list[i].schema, *patterns = pyjson_get(s, "patternProperties");
        const struct pyjson *more = pyjson_get(s, "additionalProperties");
        if (more && more->type != PYJSON_FALSE) open = true;
        listed = listed || names_properties(s);
        if (patterns && patterns->n) {
            if (pattern || patterns->n > 1)
                return refuse(c, "patternProperties", "more than one pattern is not supported");
            pattern = patterns->first;
            holder = s;
        }
    }
    for (size_t i = 0; i < items->n; i++) {
        const struct pyjson *s = items->list[i].schema, *more = pyjson_get(s, "additionalProperties");
        if (s == holder || !more) continue;
        if (more->type == PYJSON_FALSE) closed = true;
        else if (!schemas_add(c, &values, more)) return REFUSED;
    }
    f->more = !closed && (open || !listed || pattern);
    if (!f->more) return DONE;
    if (pattern) {
        const struct language *l = language_of(c, pattern);
        if (!l || !schemas_add(c, &values, pattern)) return REFUSED;
        if (f->name.n_languages == MAX_LANGUAGES - 1) return refuse(c, "propertyNames", "too many patterns");
        f->name.languages[f->name.n_languages++] = l;
    }
    if (f->n) {
        struct language_name names[MAX_PROPERTIES];
        for (size_t i = 0; i < f->n; i++) names[i] = (struct language_name){f->list[i].key, f->list[i].n_key};
        const struct language *l = language_except(c->arena, names, f->n);
        if (!l) return no_memory(c);
        f->name.languages[f->name.n_languages++] = l;
    }
    enum outcome result = compile_part(c, &values, "additionalProperties", &f->rest);
    if (result == NEVER) f->more = false;
    return result == REFUSED ? REFUSED : DONE;
}

static enum outcome read_properties(struct compiler *c, const struct items *items, struct object_form *f) {
    enum outcome result = read_name_form(c, items, &f->name);
    if (result == REFUSED) return REFUSED;
    bool no_names = result == NEVER;
    if (no_names) f->name = (struct text_form){.max = NO_LIMIT};
    for (size_t i = 0; i < f->n; i++) {
        struct property *p = &f->list[i];
        struct schemas s = {0};
        for (size_t k = 0; k < items->n; k++)
            if (property_schemas(c, items->list[k].schema, p, &s) == REFUSED) return REFUSED;
        result = no_names || !text_has(&f->name, p->key, p->n_key) ? NEVER : compile_part(c, &s, p->key, &p->part);
        if (result == REFUSED) return REFUSED;
        p->never = result == NEVER;
        if (p->never && p->required) return NEVER;
        if (p->required) f->n_required++;
    }
    if (no_names) return DONE;
    return read_rest(c, items, f);
}

// "key": value
static enum outcome compile_member(struct compiler *c, const struct property *p, uint32_t next, uint32_t *out) {
    struct buffer key = {0};
    bool ok = pyjson_write_string(p->key, p->n_key, &key);
    uint32_t value = grammar_call(c->g, p->part, next);
    uint32_t colon = grammar_byte(c->g, ':', grammar_split(c->g, value, grammar_byte(c->g, ' ', value)));
    if (ok) *out = grammar_text(c->g, buffer_text(&key), key.len, colon);
    buffer_free(&key);
    return ok ? DONE : no_memory(c);
}

// Any further property, as a part.
static enum outcome compile_further(struct compiler *c, const struct object_form *f, uint32_t *part) {
    struct error why = {0};
    uint32_t value = grammar_call(c->g, f->rest, grammar_return(c->g));
    uint32_t colon = grammar_byte(c->g, ':', grammar_split(c->g, value, grammar_byte(c->g, ' ', value)));
    if (text_compile(c->g, c->arena, &c->parts, &f->name, colon, part, &why)) return DONE;
    return refuse(c, "propertyNames", why.text);
}

// minProperties and maxProperties are honoured where they say nothing, or count what the schema does not name.
static enum outcome check_counts(struct compiler *c, const struct object_form *f, size_t n_named) {
    if (f->max < f->min || f->max < f->n_required) return NEVER;
    if (f->min > n_named && !f->more) return NEVER;
    if (n_named == 0) {
        if (f->min <= 1) return DONE;
        return refuse(c, "minProperties", "more than 1 is not supported for names that are not listed");
    }
    if (f->min > f->n_required) return refuse(c, "minProperties", "more than are required is not supported");
    if (f->max < n_named || (f->more && f->max != NO_LIMIT))
        return refuse(c, "maxProperties", "fewer than may come is not supported");
    return DONE;
}

enum outcome compile_object(struct compiler *c, const struct items *items, uint32_t next, uint32_t *out) {
    struct grammar *g = c->g;
    struct object_form *f = arena_alloc(c->arena, 1, sizeof *f);
    if (!f) return no_memory(c);
    enum outcome result = read_names(c, items, f);
    if (result == DONE) result = read_properties(c, items, f);
    if (result != DONE) return result;
    size_t n_named = 0;
    for (size_t i = 0; i < f->n; i++) n_named += !f->list[i].never;
    if ((result = check_counts(c, f, n_named)) != DONE) return result;
    // From the last property to the first: where the text goes on when nothing was written yet, and when something was.
    uint32_t end = grammar_byte(g, '}', next), close = grammar_space(g, end), first = end, later = close, part;
    if (f->more && f->max > 0) {
        if (compile_further(c, f, &part) == REFUSED) return REFUSED;
        uint32_t again = grammar_byte(g, ',', grammar_space(g, grammar_call(g, part, grammar_return(g))));
        uint32_t others = grammar_repeat(g, again, 0, less(f->max, 1), close);
        uint32_t one = grammar_space(g, grammar_call(g, part, others));
        first = n_named == 0 && f->min ? one : grammar_split(g, end, one);
        later = grammar_repeat(g, again, 0, NO_LIMIT, close);
    }
    for (size_t i = f->n; i > 0; i--) {
        const struct property *p = &f->list[i - 1];
        uint32_t member = 0;
        if (p->never) continue;
        if (compile_member(c, p, later, &member) == REFUSED) return REFUSED;
        uint32_t begin = grammar_space(g, member), follow = grammar_byte(g, ',', begin);
        first = p->required ? begin : grammar_split(g, begin, first);
        later = p->required ? follow : grammar_split(g, follow, later);
    }
    *out = grammar_byte(g, '{', first);
    return DONE;
}
