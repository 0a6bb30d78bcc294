// schema_logic.c: not, if, dependentRequired and dependentSchemas, rewritten as alternatives of schemas without them.
// What is written for an alternative is valid for the keyword; what cannot be said so is refused. Soundness first: an
// alternative may say less than the keyword allows, never more.
#include "server/schema_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char except_key[] = "not enum";

enum { MAX_REWRITES = 1024, MAX_NUMBERS = 64, MAX_DEPTH = 32 };

// A keyword of one schema as it was rewritten, so that it has one address and what is compiled for it is found again.
struct rewrite {
    const struct pyjson *of, *ways; // ways: an array
    struct rewrite *next;
};

// What a schema is made of. NULL: no memory, which all of them pass on.

static struct pyjson *make(struct compiler *c, enum pyjson_type type) {
    struct pyjson *v = pyjson_new(c->arena, type);
    if (!v) no_memory(c);
    return v;
}

static struct pyjson *copy(struct compiler *c, const struct pyjson *v) { // what is in it stays shared
    struct pyjson *own = make(c, PYJSON_NULL);
    if (own) *own = *v, own->next = NULL;
    return own;
}

static struct pyjson *text(struct compiler *c, const char *s, size_t n) {
    struct pyjson *v = pyjson_new_string(c->arena, s, n);
    if (!v) no_memory(c);
    return v;
}

static struct pyjson *count(struct compiler *c, uint32_t n) {
    char digits[16];
    struct pyjson *v = text(c, digits, (size_t)snprintf(digits, sizeof digits, "%u", n));
    if (v) v->type = PYJSON_INT;
    return v;
}

// Puts a member into an object, whose NULL it takes over; or an item into an array.
static struct pyjson *put_n(struct pyjson *object, const char *key, size_t n_key, struct pyjson *value) {
    if (!object || !value) return NULL;
    value->key = key;
    value->n_key = n_key;
    pyjson_append(object, value);
    return object;
}

static struct pyjson *put(struct pyjson *object, const char *key, struct pyjson *value) {
    return put_n(object, key, strlen(key), value);
}

static struct pyjson *add(struct pyjson *array, struct pyjson *value) {
    if (!array || !value) return NULL;
    pyjson_append(array, value);
    return array;
}

static struct pyjson *typed(struct compiler *c, const char *type) { // {"type": type}
    return put(make(c, PYJSON_OBJECT), "type", text(c, type, strlen(type)));
}

static struct pyjson *negated(struct compiler *c, const struct pyjson *schema) { // {"not": schema}
    return put(make(c, PYJSON_OBJECT), "not", copy(c, schema));
}

// {"allOf": [a, b]}
static struct pyjson *both(struct compiler *c, struct pyjson *a, struct pyjson *b) {
    return put(make(c, PYJSON_OBJECT), "allOf", add(add(make(c, PYJSON_ARRAY), a), b));
}

// {"properties": {name: value}}, extended
static struct pyjson *with_property(struct compiler *c, struct pyjson *schema, const char *name, size_t n,
                                    struct pyjson *value) {
    return put(schema, "properties", put_n(make(c, PYJSON_OBJECT), name, n, value));
}

static enum outcome add_way(struct pyjson *ways, struct pyjson *way) {
    return add(ways, way) ? DONE : REFUSED;
}

// ---- Negation: each way is a schema for which `s` does not hold; together they are all that is not `s`, but for what
// docs/SERVING.md says.

static enum outcome negate(struct compiler *c, const char *key, const struct pyjson *s, struct pyjson *ways, int depth);

static enum outcome cannot(struct compiler *c, const char *key, const char *inner) {
    char why[100];
    snprintf(why, sizeof why, "of %.40s is not supported", inner);
    return refuse(c, key, why);
}

static const struct {
    const char *name;
    unsigned types;
} plain_types[] = {{"null", IS_NULL},     {"boolean", IS_BOOLEAN}, {"number", IS_NUMBER},
                   {"string", IS_STRING}, {"array", IS_ARRAY},     {"object", IS_OBJECT}};
enum { N_TYPES = sizeof plain_types / sizeof plain_types[0] };

// The types that have nothing of `taken`, as one way.
static enum outcome other_types(struct compiler *c, unsigned taken, struct pyjson *ways) {
    struct pyjson *names = make(c, PYJSON_ARRAY);
    for (size_t i = 0; i < N_TYPES; i++)
        if (!(plain_types[i].types & taken))
            names = add(names, text(c, plain_types[i].name, strlen(plain_types[i].name)));
    if (names && names->n == 0) return DONE;
    return add_way(ways, put(make(c, PYJSON_OBJECT), "type", names));
}

struct number {
    const struct pyjson *v;
    struct decimal d;
};

static int compare_numbers(const void *a, const void *b) {
    return decimal_compare(&((const struct number *)a)->d, &((const struct number *)b)->d);
}

// Numbers but for a few: below the first, between two, above the last.
static enum outcome other_numbers(struct compiler *c, struct number *list, size_t n, struct pyjson *ways) {
    qsort(list, n, sizeof *list, compare_numbers);
    enum outcome result = DONE;
    for (size_t i = 0; result == DONE && i <= n; i++) {
        struct pyjson *way = typed(c, "number");
        if (i > 0) way = put(way, "exclusiveMinimum", copy(c, list[i - 1].v));
        if (i < n) way = put(way, "exclusiveMaximum", copy(c, list[i].v));
        result = add_way(ways, way);
    }
    return result;
}

static enum outcome negate_values(struct compiler *c, const char *key, const struct pyjson *first, bool one,
                                  struct pyjson *ways) {
    struct number numbers[MAX_NUMBERS];
    struct pyjson *texts = make(c, PYJSON_ARRAY), *left = make(c, PYJSON_ARRAY);
    unsigned taken = 0;
    size_t n = 0;
    bool has[2] = {false, false};
    if (!texts || !left) return REFUSED;
    for (const struct pyjson *v = first; v; v = one ? NULL : v->next) {
        unsigned type = type_of(v);
        taken |= type & IS_NUMBER ? (unsigned)IS_NUMBER : type;
        if (type & IS_NUMBER && n == MAX_NUMBERS) return refuse(c, key, "of more than 64 numbers is not supported");
        if (type & IS_NUMBER) {
            numbers[n].v = v;
            if (decimal_read(v, &numbers[n++].d) != 0) return cannot(c, key, "a number of so many digits");
        }
        if (type == IS_BOOLEAN) has[v->type == PYJSON_TRUE] = true;
        if (type == IS_STRING && !add(texts, copy(c, v))) return REFUSED;
        if (type & (IS_ARRAY | IS_OBJECT) && v->n) return cannot(c, key, "an array or object that is not empty");
    }
    enum outcome result = other_types(c, taken, ways);
    if (result == DONE && taken & IS_NUMBER) result = other_numbers(c, numbers, n, ways);
    if (result == DONE && taken & IS_STRING) result = add_way(ways, put(typed(c, "string"), except_key, texts));
    if (result == DONE && taken & IS_ARRAY) result = add_way(ways, put(typed(c, "array"), "minItems", count(c, 1)));
    if (result == DONE && taken & IS_OBJECT)
        result = add_way(ways, put(typed(c, "object"), "minProperties", count(c, 1)));
    for (int i = 0; i < 2 && result == DONE && taken & IS_BOOLEAN; i++)
        if (!has[i])
            result = add_way(ways, put(make(c, PYJSON_OBJECT), "const", make(c, i ? PYJSON_TRUE : PYJSON_FALSE)));
    return result;
}

static enum outcome negate_type(struct compiler *c, const char *key, const struct pyjson *type, struct pyjson *ways) {
    struct pyjson holder = {.type = PYJSON_OBJECT}, member = *type;
    struct item item = {.schema = &holder};
    const struct items alone = {.list = &item, .n = 1};
    unsigned types;
    bool given;
    member.key = "type";
    member.n_key = 4;
    pyjson_append(&holder, &member);
    if (read_types(c, &alone, &types, &given) != DONE) return cannot(c, key, "this type");
    if ((types & IS_NUMBER) == IS_INTEGER && strcmp(key, "oneOf") == 0) return cannot(c, key, "integer");
    return other_types(c, types & IS_NUMBER ? types | IS_NUMBER : types, ways); // not an integer: no number at all
}

// A bound of a count: what it turns into, one less or one more.
static enum outcome negate_count(struct compiler *c, const struct pyjson *s, const char *key, const char *type,
                                 const char *turned, bool is_min, struct pyjson *ways) {
    uint32_t n = 0;
    bool there;
    if (read_count(c, s, key, &n, &there) == REFUSED) return REFUSED;
    if (is_min ? n == 0 : n == NO_LIMIT) return DONE;
    return add_way(ways, put(typed(c, type), turned, count(c, is_min ? n - 1 : n + 1)));
}

static enum outcome negate_properties(struct compiler *c, const struct pyjson *properties, struct pyjson *ways) {
    enum outcome result = DONE;
    for (const struct pyjson *p = properties->first; result == DONE && p; p = p->next) {
        if (p->type == PYJSON_TRUE || (p->type == PYJSON_OBJECT && p->n == 0)) continue;
        struct pyjson *way = put(typed(c, "object"), "required", add(make(c, PYJSON_ARRAY), text(c, p->key, p->n_key)));
        result = add_way(ways, with_property(c, way, p->key, p->n_key, negated(c, p)));
    }
    return result;
}

static enum outcome negate_required(struct compiler *c, const char *key, const struct pyjson *names,
                                    struct pyjson *ways) {
    enum outcome result = DONE;
    for (const struct pyjson *r = names->first; result == DONE && r; r = r->next) {
        if (r->type != PYJSON_STRING) return cannot(c, key, "required without names");
        result = add_way(ways, with_property(c, typed(c, "object"), r->text, r->n_text, make(c, PYJSON_FALSE)));
    }
    return result;
}

// None of them holds.
static enum outcome negate_any(struct compiler *c, const struct pyjson *list, struct pyjson *ways) {
    struct pyjson *all = make(c, PYJSON_ARRAY);
    for (const struct pyjson *s = list->first; s; s = s->next) all = add(all, negated(c, s));
    return add_way(ways, put(make(c, PYJSON_OBJECT), "allOf", all));
}

static enum outcome negate_member(struct compiler *c, const char *key, const struct pyjson *s, const struct pyjson *m,
                                  struct pyjson *ways, int depth) {
    static const struct {
        const char *key, *type, *turned;
    } counts[] = {{"minLength", "string", "maxLength"},
                  {"maxLength", "string", "minLength"},
                  {"minItems", "array", "maxItems"},
                  {"maxItems", "array", "minItems"},
                  {"minProperties", "object", "maxProperties"},
                  {"maxProperties", "object", "minProperties"}};
    static const char *const bounds[][2] = {{"minimum", "exclusiveMaximum"},
                                            {"maximum", "exclusiveMinimum"},
                                            {"exclusiveMinimum", "maximum"},
                                            {"exclusiveMaximum", "minimum"}};
    const struct pyjson *target;
    bool list = m->type == PYJSON_ARRAY;
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        if (strcmp(m->key, counts[i].key) == 0)
            return negate_count(c, s, m->key, counts[i].type, counts[i].turned, i % 2 == 0, ways);
    for (size_t i = 0; i < sizeof bounds / sizeof bounds[0]; i++)
        if (strcmp(m->key, bounds[i][0]) == 0) return add_way(ways, put(typed(c, "number"), bounds[i][1], copy(c, m)));
    if (strcmp(m->key, "type") == 0) return negate_type(c, key, m, ways);
    if (strcmp(m->key, "const") == 0) return negate_values(c, key, m, true, ways);
    if (strcmp(m->key, "enum") == 0 && list && m->n) return negate_values(c, key, m->first, false, ways);
    if (strcmp(m->key, "required") == 0 && list) return negate_required(c, key, m, ways);
    if (strcmp(m->key, "properties") == 0 && m->type == PYJSON_OBJECT) return negate_properties(c, m, ways);
    if (strcmp(m->key, "anyOf") == 0 && list && m->n) return negate_any(c, m, ways);
    if (strcmp(m->key, "not") == 0) return add_way(ways, copy(c, m));
    if (strcmp(m->key, "items") == 0 && !list && !pyjson_get(s, "prefixItems"))
        return add_way(ways, put(typed(c, "array"), "contains", negated(c, m)));
    if (strcmp(m->key, "contains") == 0 && !pyjson_get(s, "minContains") && !pyjson_get(s, "maxContains"))
        return add_way(ways, put(typed(c, "array"), "items", negated(c, m)));
    if (strcmp(m->key, "$ref") == 0)
        return target_of(c, s, &target) == DONE ? negate(c, key, target, ways, depth + 1) : REFUSED;
    if (strcmp(m->key, "allOf") != 0 || !list || !m->n) return cannot(c, key, m->key);
    enum outcome result = DONE;
    for (const struct pyjson *a = m->first; result == DONE && a; a = a->next)
        result = negate(c, key, a, ways, depth + 1);
    return result;
}

static enum outcome negate(struct compiler *c, const char *key, const struct pyjson *s, struct pyjson *ways,
                           int depth) {
    if (s->type == PYJSON_TRUE) return DONE;
    if (s->type == PYJSON_FALSE) return add_way(ways, make(c, PYJSON_OBJECT));
    if (s->type != PYJSON_OBJECT) return refuse(c, key, "a schema is an object, true or false");
    if (depth > MAX_DEPTH) return refuse(c, key, "this leads to itself");
    if (++c->work > MAX_WORK) return refuse(c, key, "the schema takes too much work: simplify it");
    enum outcome result = check_keywords(c, s);
    for (const struct pyjson *m = s->first; result == DONE && m; m = m->next)
        if (is_honoured(m->key)) result = negate_member(c, key, s, m, ways, depth);
    return result;
}

const struct pyjson *schema_not(struct compiler *c, const struct pyjson *schema) {
    return negated(c, schema);
}

// ---- The keywords

static enum outcome rewrite_if(struct compiler *c, const struct pyjson *s, const struct pyjson *test,
                               struct pyjson *ways) {
    const struct pyjson *then = pyjson_get(s, "then"), *otherwise = pyjson_get(s, "else");
    struct pyjson *others = make(c, PYJSON_ARRAY);
    if (!others || !add(ways, then ? both(c, copy(c, test), copy(c, then)) : copy(c, test))) return REFUSED;
    enum outcome result = negate(c, "if", test, others, 0);
    for (const struct pyjson *w = others->first; result == DONE && w; w = w->next)
        result = add_way(ways, otherwise ? both(c, copy(c, w), copy(c, otherwise)) : copy(c, w));
    return result;
}

// Without the property, or with what it brings along: names, or a schema.
static enum outcome rewrite_dependent(struct compiler *c, const struct pyjson *m, bool names, struct pyjson *ways) {
    enum outcome result =
        add_way(ways, with_property(c, make(c, PYJSON_OBJECT), m->key, m->n_key, make(c, PYJSON_FALSE)));
    if (result != DONE) return result;
    return add_way(ways, names ? put(make(c, PYJSON_OBJECT), "required", copy(c, m)) : copy(c, m));
}

// The ways of one keyword, which `of` stands for, from the last time or made now.
static enum outcome ways_of(struct compiler *c, const struct pyjson *schema, const struct pyjson *of, const char *key,
                            const struct pyjson **out) {
    size_t n = 0;
    for (struct rewrite *r = c->rewrites; r; r = r->next, n++) {
        if (r->of != of) continue;
        *out = r->ways;
        return DONE;
    }
    if (n == MAX_REWRITES) return refuse(c, key, "the schema takes too much work: simplify it");
    struct rewrite *r = arena_alloc(c->arena, 1, sizeof *r);
    struct pyjson *ways = make(c, PYJSON_ARRAY);
    if (!r || !ways) return no_memory(c);
    enum outcome result;
    if (strcmp(key, "not") == 0 || strcmp(key, "oneOf") == 0) result = negate(c, key, of, ways, 0);
    else if (strcmp(key, "if") == 0) result = rewrite_if(c, schema, of, ways);
    else result = rewrite_dependent(c, of, strcmp(key, "dependentRequired") == 0, ways);
    if (result != DONE) return result;
    *r = (struct rewrite){of, put(make(c, PYJSON_OBJECT), "anyOf", ways), c->rewrites};
    if (!r->ways) return REFUSED;
    c->rewrites = r;
    *out = r->ways;
    return DONE;
}

static enum outcome apply(struct compiler *c, const struct pyjson *schema, const struct pyjson *of, const char *key,
                          struct items *out) {
    const struct pyjson *any = NULL;
    if (++c->work > MAX_WORK) return refuse(c, key, "the schema takes too much work: simplify it");
    enum outcome result = ways_of(c, schema, of, key, &any);
    if (result != DONE) return result;
    const struct pyjson *ways = any->first;
    if (ways->n == 0) return NEVER;
    return flatten(c, ways->n == 1 ? ways->first : any, out);
}

enum outcome flatten_not(struct compiler *c, const struct pyjson *schema, const char *key, struct items *out) {
    return apply(c, NULL, schema, key, out);
}

enum outcome flatten_logic(struct compiler *c, const struct pyjson *schema, struct items *out) {
    static const char *const dependent[] = {"dependentRequired", "dependentSchemas"};
    const struct pyjson *not = pyjson_get(schema, "not"), *test = pyjson_get(schema, "if");
    enum outcome result = not ? apply(c, schema, not, "not", out) : DONE;
    if (result == DONE && test && (pyjson_get(schema, "then") || pyjson_get(schema, "else")))
        result = apply(c, schema, test, "if", out);
    for (size_t i = 0; i < 2 && result == DONE; i++) {
        const struct pyjson *map = pyjson_get(schema, dependent[i]);
        if (map && map->type != PYJSON_OBJECT) return refuse(c, dependent[i], "expected an object");
        for (const struct pyjson *m = map ? map->first : NULL; result == DONE && m; m = m->next) {
            if (i == 0 && m->type != PYJSON_ARRAY) return refuse(c, dependent[i], "expected arrays of strings");
            result = apply(c, schema, m, dependent[i], out);
        }
    }
    return result;
}
