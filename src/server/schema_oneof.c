// schema_oneof.c: are two alternatives plainly apart? What is not plain counts as not apart.
#include "server/schema_parts.h"

#include <string.h>

enum { MAX_APART = 4, MAX_APART_WORK = 60000 };

static const struct pyjson *property_of(const struct items *items, const char *key, size_t n, size_t from, size_t *at) {
    for (size_t i = from; i < items->n; i++) {
        const struct pyjson *properties = pyjson_get(items->list[i].schema, "properties");
        for (const struct pyjson *m = properties ? properties->first : NULL; m; m = m->next) {
            if (m->n_key != n || memcmp(m->key, key, n) != 0) continue;
            *at = i;
            return m;
        }
    }
    return NULL;
}

static bool requires(const struct items *items, const char *key, size_t n) {
    for (size_t i = 0; i < items->n; i++) {
        const struct pyjson *required = pyjson_get(items->list[i].schema, "required");
        for (const struct pyjson *r = required ? required->first : NULL; r; r = r->next)
            if (r->type == PYJSON_STRING && r->n_text == n && memcmp(r->text, key, n) == 0) return true;
    }
    return false;
}

// May an object that is written for `items` have this property?
static bool may_write(const struct items *items, const char *key, size_t n) {
    size_t at;
    if (property_of(items, key, n, 0, &at) || requires(items, key, n)) return true;
    bool named = false;
    for (size_t i = 0; i < items->n; i++) named = named || names_properties(items->list[i].schema);
    if (!named) return true;
    for (size_t i = 0; i < items->n; i++) {
        const struct item *item = &items->list[i];
        const struct pyjson *more = pyjson_get(item->schema, "additionalProperties");
        if ((more && more->type != PYJSON_FALSE) || pyjson_get(item->schema, "patternProperties")) return true;
        if (pyjson_get(item->schema, "anyOf") && !item->any_of_done) return true;
        if (pyjson_get(item->schema, "oneOf") && !item->one_of_done) return true;
    }
    return false;
}

static enum outcome flat_property(struct compiler *c, const struct items *items, const char *key, size_t n,
                                  struct items *out, bool *there) {
    size_t at = 0;
    *there = false;
    for (const struct pyjson *p; (p = property_of(items, key, n, at, &at)); at++) {
        enum outcome result = flatten(c, p, out);
        if (result != DONE) return result;
        *there = true;
    }
    return DONE;
}

// Of objects: b requires what a never has, or a property that one of them requires has no value in common.
static enum outcome objects_apart(struct compiler *c, const struct items *a, const struct items *b, bool lasting,
                                  int depth, bool *apart) {
    for (size_t i = 0; i < b->n && !lasting; i++) {
        const struct pyjson *required = pyjson_get(b->list[i].schema, "required");
        for (const struct pyjson *r = required ? required->first : NULL; r && !*apart; r = r->next)
            *apart = r->type == PYJSON_STRING && !may_write(a, r->text, r->n_text);
    }
    for (size_t i = 0; i < a->n && !*apart && depth < MAX_APART; i++) {
        const struct pyjson *properties = pyjson_get(a->list[i].schema, "properties");
        for (const struct pyjson *p = properties ? properties->first : NULL; p && !*apart; p = p->next) {
            struct items x = {0}, y = {0};
            bool in_a, in_b;
            if (!requires(a, p->key, p->n_key) && !requires(b, p->key, p->n_key)) continue;
            if (++c->work > MAX_APART_WORK) return refuse(c, "oneOf", "the schema takes too much work: simplify it");
            enum outcome result = flat_property(c, a, p->key, p->n_key, &x, &in_a);
            if (result == DONE) result = flat_property(c, b, p->key, p->n_key, &y, &in_b);
            if (result == DONE && in_a && in_b) result = are_apart(c, &x, &y, lasting, depth + 1, apart);
            if (result == REFUSED) return REFUSED;
        }
    }
    return DONE;
}

// The types that `items` allow; of what is written, where there is none, those that its keywords are about.
static enum outcome types_of(struct compiler *c, const struct items *items, bool written, unsigned *types) {
    bool given;
    enum outcome result = read_types(c, items, types, &given);
    bool open = !written; // an alternative that is still to be taken may bring a type
    for (size_t i = 0; i < items->n; i++) {
        const struct item *item = &items->list[i];
        open = open || (pyjson_get(item->schema, "anyOf") && !item->any_of_done) ||
               (pyjson_get(item->schema, "oneOf") && !item->one_of_done);
    }
    if (result == DONE && !given && open) *types = IS_ANY;
    return result;
}

// Does all of a lie below all of b?
static bool is_below(const struct number_form *a, const struct number_form *b) {
    if (!a->has_high || !b->has_low) return false;
    int order = decimal_compare(&a->high, &b->low);
    return order < 0 || (order == 0 && (a->below || b->above));
}

static enum outcome numbers_apart(struct compiler *c, const struct items *a, const struct items *b, bool *apart) {
    struct number_form x, y;
    enum outcome result = read_number_form(c, a, false, &x);
    if (result == DONE) result = read_number_form(c, b, false, &y);
    if (result == DONE) *apart = is_below(&x, &y) || is_below(&y, &x);
    return result;
}

enum outcome are_apart(struct compiler *c, const struct items *a, const struct items *b, bool lasting, int depth,
                       bool *apart) {
    struct schemas x = {0}, y = {0};
    bool listed_x, listed_y;
    unsigned types_a, types_b;
    *apart = true;
    enum outcome result = types_of(c, a, !lasting, &types_a);
    if (result == DONE) result = types_of(c, b, false, &types_b);
    if (result == DONE) result = read_values(c, a, &x, &listed_x);
    if (result == DONE) result = read_values(c, b, &y, &listed_y);
    if (result != DONE) return result == NEVER ? DONE : result;
    if (listed_x) types_a = 0;
    for (size_t i = 0; i < x.n; i++) types_a |= type_of(x.list[i]);
    if (!(types_a & types_b)) return DONE;
    *apart = false;
    if (listed_x && listed_y) {
        c->work += x.n * y.n / 16;
        for (size_t i = 0; i < x.n; i++)
            for (size_t k = 0; k < y.n; k++)
                if (value_equal(x.list[i], y.list[k])) return DONE;
        *apart = true;
        return DONE;
    }
    if ((types_a & types_b) == IS_OBJECT) return objects_apart(c, a, b, lasting, depth, apart);
    if (!((types_a & types_b) & ~(unsigned)IS_NUMBER)) {
        result = numbers_apart(c, a, b, apart);
        return result == NEVER ? DONE : result;
    }
    return DONE;
}
