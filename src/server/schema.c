// schema.c: see schema.h. It owns references, conjunctions and alternatives.
#include "server/schema.h"

#include "base/buffer.h"
#include "server/fields.h"
#include "server/schema_parts.h"

#include <stdio.h>
#include <string.h>

enum { MAX_NESTING = 64, MAX_FLAT = 256, MAX_MEMOS = 8192 };

struct memo {
    struct schemas key;
    uint32_t node;
    size_t nesting; // where it is being compiled
    bool busy;
    enum outcome outcome;
};

enum outcome refuse(struct compiler *c, const char *keyword, const char *why) {
    error_set(c->err, "%s: schema%s: %.60s: %s", c->where, c->path, keyword, why);
    return REFUSED;
}

enum outcome no_memory(struct compiler *c) {
    error_set(c->err, "out of memory");
    return REFUSED;
}

bool literal(struct compiler *c, const struct pyjson *v, uint32_t next, uint32_t *out) {
    struct buffer text = {0};
    bool ok = pyjson_write_portable(v, &text) || error_set(c->err, "out of memory");
    if (ok) *out = grammar_text(c->g, buffer_text(&text), text.len, next);
    buffer_free(&text);
    return ok;
}

static void *grown(struct compiler *c, void *list, size_t n, size_t *cap, size_t size) {
    if (n < *cap) return list;
    size_t more = *cap ? 2 * *cap : 8;
    void *copy = arena_alloc(c->arena, more, size);
    if (!copy) {
        no_memory(c);
        return NULL;
    }
    if (n) memcpy(copy, list, n * size);
    *cap = more;
    return copy;
}

bool schemas_add(struct compiler *c, struct schemas *s, const struct pyjson *schema) {
    const struct pyjson **list = grown(c, s->list, s->n, &s->cap, sizeof *list);
    if (!list) return false;
    s->list = list;
    s->list[s->n++] = schema;
    return true;
}

static bool items_add(struct compiler *c, struct items *s, struct item item) {
    struct item *list = grown(c, s->list, s->n, &s->cap, sizeof *list);
    if (!list) return false;
    s->list = list;
    s->list[s->n++] = item;
    return true;
}

// ---- Keywords

static const char *const honoured[] = {"type",
                                       "enum",
                                       "const",
                                       "$ref",
                                       "allOf",
                                       "anyOf",
                                       "oneOf",
                                       "properties",
                                       "required",
                                       "additionalProperties",
                                       "propertyNames",
                                       "minProperties",
                                       "maxProperties",
                                       "items",
                                       "patternProperties",
                                       "prefixItems",
                                       "minItems",
                                       "maxItems",
                                       "minLength",
                                       "uniqueItems",
                                       "maxLength",
                                       "pattern",
                                       "format",
                                       "minimum",
                                       "maximum",
                                       "multipleOf",
                                       "exclusiveMinimum",
                                       "exclusiveMaximum",
                                       "not",
                                       "if",
                                       "dependentRequired",
                                       "dependentSchemas",
                                       "contains"};
// They say something only beside "if" and "contains".
static const char *const companions[] = {"then", "else", "minContains", "maxContains"};
static const char *const annotations[] = {
    "title",         "description",     "default",     "examples",       "$comment",
    "$defs",         "$anchor",         "definitions", "deprecated",     "readOnly",
    "writeOnly",     "contentEncoding", "$schema",     "$dynamicAnchor", "contentMediaType",
    "contentSchema", "discriminator",   "example",     "strict"};

static bool is_in(const char *key, const char *const *names, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (strcmp(key, names[i]) == 0) return true;
    return false;
}

bool is_honoured(const char *key) {
    return is_in(key, honoured, sizeof honoured / sizeof honoured[0]);
}

enum outcome check_keywords(struct compiler *c, const struct pyjson *schema) {
    for (const struct pyjson *m = schema->first; m; m = m->next) {
        if (is_honoured(m->key) || m->key == except_key) continue;
        if (is_in(m->key, companions, sizeof companions / sizeof companions[0])) continue;
        if (is_in(m->key, annotations, sizeof annotations / sizeof annotations[0])) continue;
        if (strncmp(m->key, "x-", 2) == 0) continue;
        if (strcmp(m->key, "$id") == 0 && schema == c->root) continue;
        return refuse(c, m->key, "this keyword is not supported here");
    }
    const struct pyjson *dialect = pyjson_get(schema, "$schema");
    if (dialect && (dialect->type != PYJSON_STRING || !strstr(dialect->text, "://json-schema.org/draft")))
        return refuse(c, "$schema", "only the dialects of json-schema.org are known");
    return DONE;
}

// ---- References

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

// The next step of a path, behind its slash: what % and ~ stand for is put in. NULL: it is too long.
static const char *read_step(const char *ref, char *name, size_t size) {
    size_t n = 0;
    while (*ref && *ref != '/') {
        char c = *ref++;
        if (c == '%' && hex_digit(ref[0]) >= 0 && hex_digit(ref[1]) >= 0) {
            c = (char)(hex_digit(ref[0]) * 16 + hex_digit(ref[1]));
            ref += 2;
        }
        if (c == '~' && (*ref == '0' || *ref == '1')) c = *ref++ == '0' ? '~' : '/';
        if (n + 1 == size) return NULL;
        name[n++] = c;
    }
    name[n] = '\0';
    return ref;
}

// The part of the root that "#/a/b" names.
static const struct pyjson *resolve(const struct pyjson *root, const char *ref) {
    if (*ref++ != '#') return NULL;
    const struct pyjson *at = root;
    while (ref && *ref == '/' && at) {
        char name[512];
        ref = read_step(ref + 1, name, sizeof name);
        if (!ref) return NULL;
        if (at->type == PYJSON_ARRAY) {
            const struct pyjson number = {.type = PYJSON_INT, .text = name, .n_text = strlen(name)};
            int64_t index = 0;
            if (hex_digit(name[0]) < 0 || !value_int(&number, 0, 100000, &index)) return NULL;
            at = at->first;
            while (at && index-- > 0) at = at->next;
        } else {
            at = pyjson_get(at, name);
        }
    }
    return !ref || *ref ? NULL : at;
}

enum outcome target_of(struct compiler *c, const struct pyjson *schema, const struct pyjson **out) {
    const struct pyjson *ref = pyjson_get(schema, "$ref");
    *out = ref->type == PYJSON_STRING ? resolve(c->root, ref->text) : NULL;
    if (!*out) return refuse(c, "$ref", "expected a path within the schema, such as #/$defs/name");
    return DONE;
}

// Nothing but a reference?
static bool is_reference(const struct pyjson *schema) {
    if (!pyjson_get(schema, "$ref")) return false;
    for (const struct pyjson *m = schema->first; m; m = m->next)
        if (strcmp(m->key, "$ref") != 0 && is_honoured(m->key)) return false;
    return true;
}

enum outcome flatten(struct compiler *c, const struct pyjson *schema, struct items *out) {
    const struct pyjson *target, *all = pyjson_get(schema, "allOf");
    enum outcome result;
    if (schema->type == PYJSON_TRUE) return DONE;
    if (schema->type == PYJSON_FALSE) return NEVER;
    if (schema->type != PYJSON_OBJECT) return refuse(c, "type", "a schema is an object, true or false");
    if (out->n == MAX_FLAT)
        return refuse(c, pyjson_get(schema, "$ref") ? "$ref" : "allOf", "this leads to itself, or to too many schemas");
    if ((result = check_keywords(c, schema)) != DONE) return result;
    if (!items_add(c, out, (struct item){.schema = schema})) return REFUSED;
    if (pyjson_get(schema, "$ref")) {
        if ((result = target_of(c, schema, &target)) != DONE) return result;
        if ((result = flatten(c, target, out)) != DONE) return result;
    }
    if (all && (all->type != PYJSON_ARRAY || all->n == 0))
        return refuse(c, "allOf", "expected an array of schemas, not empty");
    for (const struct pyjson *s = all ? all->first : NULL; s; s = s->next)
        if ((result = flatten(c, s, out)) != DONE) return result;
    return flatten_logic(c, schema, out);
}

// ---- Alternatives

static enum outcome compile_flat(struct compiler *c, const struct items *items, uint32_t next, uint32_t *out);

// Does a conjunction say anything but for the alternatives that were taken?
static bool is_empty(const struct items *items) {
    static const char *const structure[] = {"$ref", "allOf"};
    for (size_t i = 0; i < items->n; i++) {
        const struct item *item = &items->list[i];
        for (const struct pyjson *m = item->schema->first; m; m = m->next) {
            if (!is_honoured(m->key) || is_in(m->key, structure, 2)) continue;
            if (strcmp(m->key, "anyOf") == 0 && item->any_of_done) continue;
            if (strcmp(m->key, "oneOf") == 0 && item->one_of_done) continue;
            return false;
        }
    }
    return true;
}

static enum outcome with_branch(struct compiler *c, const struct items *items, const struct pyjson *branch,
                                struct items *out) {
    *out = (struct items){0};
    for (size_t i = 0; i < items->n; i++)
        if (!items_add(c, out, items->list[i])) return REFUSED;
    return flatten(c, branch, out);
}

// Is what is written for `written` none of what `b` allows? `lasting`: and stays so, whatever more is asked of it.
static enum outcome is_apart(struct compiler *c, const struct items *written, const struct pyjson *b, bool lasting,
                             bool *apart) {
    struct items other = {0};
    *apart = true;
    if (++c->work > MAX_WORK) return refuse(c, "oneOf", "the schema takes too much work: simplify it");
    enum outcome result = flatten(c, b, &other);
    if (result == DONE) result = are_apart(c, written, &other, lasting, 0, apart);
    return result == NEVER ? DONE : result;
}

// Of oneOf exactly one may hold: what is written for `a` is none of the others, plainly or because it is asked not to
// be. That may make it be written otherwise (what was implied is given then), so that all are looked at again.
static enum outcome exclude_others(struct compiler *c, const struct pyjson *list, const struct pyjson *a,
                                   struct items *written, bool *excluded) {
    bool apart, given;
    unsigned types;
    *excluded = false;
    for (const struct pyjson *b = list->first; b && !*excluded; b = b->next) {
        if (a != b && is_apart(c, written, b, false, &apart) == REFUSED) return REFUSED;
        *excluded = a != b && !apart;
    }
    if (!*excluded) return DONE;
    // Where fractions may come, "not an integer" must allow them, which "not" does not say.
    bool fractions = read_types(c, written, &types, &given) != DONE || (types & IS_FRACTION);
    for (const struct pyjson *b = list->first; b; b = b->next) {
        if (a == b) continue;
        if (is_apart(c, written, b, true, &apart) == REFUSED) return REFUSED;
        enum outcome result = apart ? DONE : flatten_not(c, b, fractions ? "oneOf" : "not", written);
        if (result == REFUSED)
            return refuse(c, "oneOf",
                          "its schemas must exclude each other, by their types, by a required property, by a "
                          "property's values, or so that \"not\" could say it (anyOf does not ask for that)");
        if (result == NEVER) return NEVER;
    }
    return DONE;
}

static enum outcome compile_union(struct compiler *c, const struct items *items, size_t index, bool one_of,
                                  uint32_t next, uint32_t *out) {
    const char *key = one_of ? "oneOf" : "anyOf";
    const struct pyjson *list = pyjson_get(items->list[index].schema, key);
    struct items rest = {0}, extended;
    bool any = false;
    if (list->type != PYJSON_ARRAY || list->n == 0) return refuse(c, key, "expected an array of schemas, not empty");
    for (size_t i = 0; i < items->n; i++)
        if (!items_add(c, &rest, items->list[i])) return REFUSED;
    if (one_of) rest.list[index].one_of_done = true;
    else rest.list[index].any_of_done = true;
    bool alone = is_empty(&rest);
    for (const struct pyjson *s = list->first; s; s = s->next) {
        uint32_t one;
        enum outcome result;
        bool excluded = false;
        result = with_branch(c, &rest, s, &extended);
        if (result == DONE && one_of) result = exclude_others(c, list, s, &extended, &excluded);
        if (result == DONE && alone && !excluded) {
            struct schemas single = {0};
            if (!schemas_add(c, &single, s)) return REFUSED;
            result = compile_part(c, &single, NULL, &one);
            if (result == DONE) one = grammar_call(c->g, one, next);
        } else if (result == DONE) {
            result = compile_flat(c, &extended, next, &one);
        }
        if (result == REFUSED) return REFUSED;
        if (result == NEVER) continue;
        *out = any ? grammar_split(c->g, *out, one) : one;
        any = true;
    }
    return any ? DONE : NEVER;
}

static enum outcome compile_flat(struct compiler *c, const struct items *items, uint32_t next, uint32_t *out) {
    c->work += 1 + items->n;
    if (c->work > MAX_WORK) return refuse(c, "anyOf", "the schema takes too much work: simplify it");
    if (c->g->full) return refuse(c, "size", "the schema is too large");
    for (size_t i = 0; i < items->n; i++) {
        const struct item *item = &items->list[i];
        if (pyjson_get(item->schema, "oneOf") && !item->one_of_done) return compile_union(c, items, i, true, next, out);
        if (pyjson_get(item->schema, "anyOf") && !item->any_of_done)
            return compile_union(c, items, i, false, next, out);
    }
    return compile_values(c, items, next, out);
}

// ---- Parts

static enum outcome compile_body(struct compiler *c, const struct schemas *s, uint32_t next, uint32_t *out) {
    struct items items = {0};
    for (size_t i = 0; i < s->n; i++) {
        enum outcome result = flatten(c, s->list[i], &items);
        if (result != DONE) return result;
    }
    return compile_flat(c, &items, next, out);
}

// What `s` comes to: references alone are their targets, and what allows anything is left out.
static enum outcome strip(struct compiler *c, const struct schemas *s, struct schemas *out) {
    enum { MAX_CHAIN = 64 };
    for (size_t i = 0; i < s->n; i++) {
        const struct pyjson *schema = s->list[i];
        for (int k = 0; schema->type == PYJSON_OBJECT && is_reference(schema); k++) {
            enum outcome result = check_keywords(c, schema);
            if (result == DONE) result = target_of(c, schema, &schema);
            if (result != DONE) return result;
            if (k == MAX_CHAIN) return refuse(c, "$ref", "this leads to itself");
        }
        bool known = schema->type == PYJSON_TRUE || (schema->type == PYJSON_OBJECT && schema->n == 0);
        if (schema->type == PYJSON_FALSE) return NEVER;
        for (size_t k = 0; k < out->n; k++) known = known || out->list[k] == schema;
        if (!known && !schemas_add(c, out, schema)) return REFUSED;
    }
    return DONE;
}

// Where the memo of these schemas is in the table, or would be.
static uint32_t *find_memo(struct compiler *c, const struct schemas *key) {
    uint64_t h = key->n;
    for (size_t i = 0; i < key->n; i++) h = (h ^ (uintptr_t)key->list[i]) * 0x9E3779B97F4A7C15u, h ^= h >> 29;
    size_t slot = h % (2 * MAX_MEMOS);
    for (; c->memo_table[slot]; slot = (slot + 1) % (2 * MAX_MEMOS)) {
        const struct memo *m = &c->memos[c->memo_table[slot] - 1];
        if (m->key.n == key->n && memcmp(m->key.list, key->list, key->n * sizeof *key->list) == 0) break;
    }
    return &c->memo_table[slot];
}

static enum outcome compile_memo(struct compiler *c, const struct schemas *key, uint32_t *part) {
    uint32_t *slot = find_memo(c, key);
    if (*slot) {
        const struct memo *known = &c->memos[*slot - 1];
        if (known->busy && known->nesting == c->nesting) return refuse(c, "$ref", "this leads to itself");
        *part = known->node;
        return known->outcome;
    }
    if (c->n_memos == MAX_MEMOS) return refuse(c, "size", "the schema is too large");
    struct memo *memos = grown(c, c->memos, c->n_memos, &c->cap_memos, sizeof *memos);
    if (!memos) return REFUSED;
    c->memos = memos;
    size_t index = c->n_memos++;
    *slot = (uint32_t)c->n_memos;
    uint32_t hole = grammar_hole(c->g), body;
    memos[index] = (struct memo){*key, hole, c->nesting, true, DONE};
    enum outcome result = compile_body(c, key, grammar_return(c->g), &body);
    if (result == DONE) grammar_fill(c->g, hole, body, body);
    c->memos[index].busy = false;
    c->memos[index].outcome = result;
    *part = hole;
    return result;
}

enum outcome compile_part(struct compiler *c, const struct schemas *s, const char *name, uint32_t *part) {
    struct schemas key = {0};
    size_t n = strlen(c->path);
    if (name) snprintf(c->path + n, sizeof c->path - n, ".%.40s", name);
    if (name) c->nesting++;
    enum outcome result = strip(c, s, &key);
    if (result == DONE && c->nesting > MAX_NESTING) result = refuse(c, "depth", "more than 64 levels");
    if (result == DONE && key.n == 0) *part = grammar_json(c->g, false, grammar_return(c->g));
    else if (result == DONE) result = compile_memo(c, &key, part);
    if (name) c->nesting--;
    c->path[n] = '\0';
    return result;
}

bool schema_compile(struct grammar *g, const struct pyjson *schema, const char *where, uint32_t next, uint32_t *start,
                    struct error *err) {
    struct arena arena = {0};
    struct compiler c = {
        .g = g, .arena = &arena, .root = schema, .where = where, .pattern_budget = PATTERN_BUDGET, .err = err};
    struct schemas root = {0};
    uint32_t part = 0;
    c.memo_table = arena_alloc_zero(&arena, 2 * MAX_MEMOS, sizeof *c.memo_table);
    enum outcome result = c.memo_table ? DONE : no_memory(&c);
    if (result == DONE) result = schemas_add(&c, &root, schema) ? compile_part(&c, &root, NULL, &part) : REFUSED;
    if (result == NEVER) {
        const char *key = schema->type == PYJSON_OBJECT && schema->first ? schema->first->key : "false";
        refuse(&c, key, "nothing can satisfy this schema");
    } else if (result == DONE && g->full) {
        result = REFUSED;
        error_set(err, "%s: the schema is too large: more than %d places", where, MAX_NODES);
    }
    *start = grammar_call(g, part, next);
    arena_free(&arena);
    return result == DONE;
}
