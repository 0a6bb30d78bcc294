// pattern.c: see pattern.h. The automaton is the one of Glushkov ("The abstract theory of automata", 1961): a state for
// each character class as it is written, and an edge between two that may stand side by side.
#include "server/pattern.h"

#include "base/utf8.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_POSITIONS = 8192,
    MAX_EDGES = 200000,
    MAX_NESTING = 64,
    MAX_CODE = 0x10FFFF,
    MAX_RANGES = 256, // of one class
    UNBOUNDED = 1 << 20
};

// A list of positions, as a tree: joining two costs one node.
struct list {
    const struct list *a, *b;
    uint32_t position; // where a is NULL
};

// What a part of the pattern may begin and end with.
struct part {
    bool empty; // it may be
    const struct list *first, *last;
};

enum mark { MARK_NONE, MARK_BEGIN, MARK_END }; // ^ and $ stand for marks before and behind the string

struct position {
    const struct code_set *set; // NULL: a mark
    enum mark mark;
    uint32_t edges; // the first of the edges that leave it, plus one
};

struct edge {
    uint32_t to, next; // next: plus one
};

struct reader {
    struct arena *arena;
    const unsigned char *text;
    size_t n, at;
    int nesting, dry;           // dry: only to find the end of an atom
    size_t *budget;             // of atoms, with those read again for a repetition, and of edges
    struct position *positions; // [n_positions]
    size_t n_positions;
    struct edge *edges; // [n_edges]
    size_t n_edges, cap_edges;
    struct error *err;
};

static bool refuse(struct reader *r, const char *what) {
    return error_set(r->err, "%s at byte %zu of the pattern", what, r->at);
}

static bool no_memory(struct reader *r) {
    return error_set(r->err, "out of memory");
}

static bool too_much(struct reader *r) {
    *r->budget = 0;
    return error_set(r->err, "the pattern repeats too much");
}

// ---- Sets of code points

struct ranges {
    struct code_range list[MAX_RANGES];
    size_t n;
};

static bool add_range(struct ranges *s, uint32_t low, uint32_t high) {
    if (s->n == MAX_RANGES) return false;
    s->list[s->n++] = (struct code_range){low, high};
    return true;
}

static int compare_ranges(const void *a, const void *b) {
    const struct code_range *x = a, *y = b;
    return x->low != y->low ? (x->low > y->low) - (x->low < y->low) : (x->high > y->high) - (x->high < y->high);
}

// In order, and apart from one another.
static void normalise(struct ranges *s) {
    size_t n = 0;
    qsort(s->list, s->n, sizeof *s->list, compare_ranges);
    for (size_t i = 0; i < s->n; i++) {
        if (n && s->list[i].low <= s->list[n - 1].high + 1) {
            if (s->list[i].high > s->list[n - 1].high) s->list[n - 1].high = s->list[i].high;
        } else {
            s->list[n++] = s->list[i];
        }
    }
    s->n = n;
}

static bool complement(struct ranges *s) {
    struct ranges out = {.n = 0};
    uint32_t from = 0;
    normalise(s);
    for (size_t i = 0; i < s->n; i++) {
        if (s->list[i].low > from && !add_range(&out, from, s->list[i].low - 1)) return false;
        from = s->list[i].high + 1;
    }
    if (from <= MAX_CODE && !add_range(&out, from, MAX_CODE)) return false;
    *s = out;
    return true;
}

// \d, \w and \s. Some readers of patterns call a few more characters white space than ECMA-262 does: \s has only what
// all agree on (`wide` false), and \S nothing that any of them calls so (`wide` true).
static bool add_class(struct ranges *s, char name, bool wide) {
    static const struct code_range digits[] = {{'0', '9'}}, word[] = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}},
                                   spaces[] = {{'\t', '\r'},     {' ', ' '},       {0xA0, 0xA0},
                                               {0x1680, 0x1680}, {0x2000, 0x200A}, {0x2028, 0x2029},
                                               {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}},
                                   more[] = {{0x1C, 0x1F}, {0x85, 0x85}, {0xFEFF, 0xFEFF}};
    const struct code_range *list = name == 'd' ? digits : name == 'w' ? word : spaces;
    size_t n = name == 'd' ? 1 : name == 'w' ? 4 : 9;
    bool ok = true;
    for (size_t i = 0; i < n; i++) ok = ok && add_range(s, list[i].low, list[i].high);
    for (size_t i = 0; name == 's' && wide && i < 3; i++) ok = ok && add_range(s, more[i].low, more[i].high);
    return ok;
}

// \d ... \S, into a set.
static bool add_escaped_class(struct ranges *s, char name, bool negated_around) {
    char lower = (char)(name | 0x20);
    if (name == lower) return add_class(s, lower, negated_around);
    struct ranges other = {.n = 0};
    bool ok = add_class(&other, lower, !negated_around) && complement(&other);
    for (size_t i = 0; ok && i < other.n; i++) ok = add_range(s, other.list[i].low, other.list[i].high);
    return ok;
}

// ---- Positions and edges

static bool join(struct reader *r, const struct list *a, const struct list *b, const struct list **out) {
    if (!a || !b) {
        *out = a ? a : b;
        return true;
    }
    struct list *l = arena_alloc(r->arena, 1, sizeof *l);
    if (!l) return no_memory(r);
    *l = (struct list){a, b, 0};
    *out = l;
    return true;
}

static bool add_position(struct reader *r, struct ranges *s, enum mark mark, struct part *out) {
    *out = (struct part){0};
    if (r->dry) return true;
    if (r->n_positions == MAX_POSITIONS) return error_set(r->err, "more than %d characters long", MAX_POSITIONS);
    struct list *l = arena_alloc(r->arena, 1, sizeof *l);
    struct code_set *set = s ? arena_alloc(r->arena, 1, sizeof *set) : NULL;
    struct code_range *ranges = NULL;
    if (s) {
        normalise(s);
        ranges = arena_alloc(r->arena, s->n + 1, sizeof *ranges);
    }
    if (!l || (s && (!set || !ranges))) return no_memory(r);
    if (s) {
        memcpy(ranges, s->list, s->n * sizeof *ranges);
        *set = (struct code_set){ranges, s->n};
    }
    *l = (struct list){NULL, NULL, (uint32_t)r->n_positions};
    r->positions[r->n_positions++] = (struct position){set, mark, 0};
    *out = (struct part){.first = l, .last = l};
    return true;
}

static bool add_edge(struct reader *r, uint32_t from, uint32_t to) {
    if ((*r->budget)-- == 0) return too_much(r);
    if (r->n_edges == r->cap_edges) {
        size_t cap = r->cap_edges ? 2 * r->cap_edges : 256;
        struct edge *edges = cap <= 2 * MAX_EDGES ? arena_alloc(r->arena, cap, sizeof *edges) : NULL;
        if (!edges) return error_set(r->err, "the pattern is too entangled");
        if (r->n_edges) memcpy(edges, r->edges, r->n_edges * sizeof *edges);
        r->edges = edges;
        r->cap_edges = cap;
    }
    r->edges[r->n_edges++] = (struct edge){to, r->positions[from].edges};
    r->positions[from].edges = (uint32_t)r->n_edges;
    return true;
}

// Edges from every position of `from` to every one of `to`. A list's right side is followed in a loop, its left side
// in a call: lists grow to the right.
static bool connect_one(struct reader *r, uint32_t from, const struct list *to) {
    for (; to->a; to = to->b)
        if (!connect_one(r, from, to->a)) return false;
    return add_edge(r, from, to->position);
}

static bool connect(struct reader *r, const struct list *from, const struct list *to) {
    if (!from || !to) return true;
    for (; from->a; from = from->b)
        if (!connect(r, from->a, to)) return false;
    return connect_one(r, from->position, to);
}

static bool follow(struct reader *r, const struct part *a, const struct part *b, struct part *out) {
    struct part both = {.empty = a->empty && b->empty, .first = a->first, .last = b->last};
    if (!connect(r, a->last, b->first)) return false;
    if (a->empty && !join(r, a->first, b->first, &both.first)) return false;
    if (b->empty && !join(r, a->last, b->last, &both.last)) return false;
    *out = both;
    return true;
}

// ---- Reading

static bool read_alternatives(struct reader *r, struct part *out);

static bool next_is(struct reader *r, char c) {
    if (r->at >= r->n || r->text[r->at] != (unsigned char)c) return false;
    r->at++;
    return true;
}

// One code point; the text is valid UTF-8.
static uint32_t read_code(struct reader *r) {
    uint32_t code = 0;
    size_t length = utf8_decode(r->text + r->at, r->n - r->at, &code);
    r->at += length ? length : 1;
    return code;
}

static bool read_hex(struct reader *r, int digits, uint32_t *out) {
    uint32_t value = 0;
    if (r->n - r->at < (size_t)digits) return false;
    for (int i = 0; i < digits; i++) {
        unsigned char c = r->text[r->at + (size_t)i], lower = c | 0x20;
        if (c >= '0' && c <= '9') value = value * 16 + (uint32_t)(c - '0');
        else if (lower >= 'a' && lower <= 'f') value = value * 16 + (uint32_t)(lower - 'a' + 10);
        else return false;
    }
    r->at += (size_t)digits;
    *out = value;
    return true;
}

// Behind \u: XXXX, a pair of them, or {X...}.
static bool read_unicode(struct reader *r, uint32_t *out) {
    if (next_is(r, '{')) {
        uint32_t value = 0, digit;
        while (r->at < r->n && r->text[r->at] != '}' && value <= MAX_CODE) {
            if (!read_hex(r, 1, &digit)) return refuse(r, "not a hexadecimal digit");
            value = value * 16 + digit;
        }
        *out = value;
        return (next_is(r, '}') && value <= MAX_CODE) || refuse(r, "no code point");
    }
    if (!read_hex(r, 4, out)) return refuse(r, "\\u without four hexadecimal digits");
    size_t behind = r->at;
    uint32_t low;
    if (*out >= 0xD800 && *out < 0xDC00 && next_is(r, '\\') && next_is(r, 'u') && read_hex(r, 4, &low) &&
        low >= 0xDC00 && low < 0xE000) {
        *out = 0x10000 + ((*out - 0xD800) << 10) + (low - 0xDC00);
        return true;
    }
    r->at = behind;
    return true;
}

// Behind a backslash: a class (then *is_class) or a character.
static bool read_escape(struct reader *r, struct ranges *s, bool negated, bool *is_class, uint32_t *code) {
    static const char names[] = "tnvfr", values[] = "\t\n\v\f\r";
    *is_class = false;
    if (r->at == r->n) return refuse(r, "a backslash at the end");
    uint32_t c = read_code(r);
    const char *name = c && c < 0x80 ? strchr(names, (int)c) : NULL;
    if (name) {
        *code = (unsigned char)values[name - names];
    } else if (c && c < 0x80 && strchr("dDwWsS", (int)c)) {
        *is_class = true;
        return add_escaped_class(s, (char)c, negated) || refuse(r, "a class of too many ranges");
    } else if (c == 'u') {
        return read_unicode(r, code);
    } else if (c == 'x') {
        return read_hex(r, 2, code) || refuse(r, "\\x without two hexadecimal digits");
    } else if (c == '0') {
        *code = 0;
    } else if (c == 'c') {
        if (r->at == r->n) return refuse(r, "\\c without a letter");
        *code = r->text[r->at++] & 31u;
    } else if ((c >= '1' && c <= '9') || c == 'k') {
        return refuse(r, "a back reference is not supported");
    } else if (c == 'b' || c == 'B') {
        return refuse(r, "\\b and \\B are not supported");
    } else if (c == 'p' || c == 'P') {
        return refuse(r, "\\p is not supported");
    } else if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) {
        return refuse(r, "an unknown escape");
    } else {
        *code = c;
    }
    return true;
}

// One member of [...], or the end of a range.
static bool read_member(struct reader *r, struct ranges *s, bool negated, bool *is_class, uint32_t *code) {
    *is_class = false;
    if (!next_is(r, '\\')) {
        *code = read_code(r);
        return true;
    }
    if (next_is(r, 'b')) {
        *code = 8;
        return true;
    }
    return read_escape(r, s, negated, is_class, code);
}

static bool read_class(struct reader *r, struct part *out) {
    struct ranges s = {.n = 0};
    bool negated = next_is(r, '^'), is_class, ends_in_class;
    while (r->at < r->n && r->text[r->at] != ']') {
        uint32_t low, high;
        if (!read_member(r, &s, negated, &is_class, &low)) return false;
        high = low;
        if (r->at + 1 < r->n && r->text[r->at] == '-' && r->text[r->at + 1] != ']') {
            r->at++;
            if (!read_member(r, &s, negated, &ends_in_class, &high)) return false;
            if (is_class || ends_in_class || high < low) return refuse(r, "a range that is none");
        }
        if (!is_class && !add_range(&s, low, high)) return refuse(r, "a class of too many ranges");
    }
    if (!next_is(r, ']')) return refuse(r, "a [ without its ]");
    if (negated && !complement(&s)) return refuse(r, "a class of too many ranges");
    return add_position(r, &s, MARK_NONE, out);
}

static bool read_group(struct reader *r, struct part *out) {
    if (next_is(r, '?')) {
        if (next_is(r, '<')) {
            if (r->at < r->n && (r->text[r->at] == '=' || r->text[r->at] == '!'))
                return refuse(r, "look-behind is not supported");
            while (r->at < r->n && r->text[r->at] != '>' && r->text[r->at] != ')') r->at++;
            if (!next_is(r, '>')) return refuse(r, "a group's name without its >");
        } else if (!next_is(r, ':')) {
            return refuse(r, "look-ahead and flags are not supported");
        }
    }
    if (r->nesting == MAX_NESTING) return refuse(r, "too many groups inside one another");
    r->nesting++;
    bool ok = read_alternatives(r, out);
    r->nesting--;
    return ok && (next_is(r, ')') || refuse(r, "a ( without its )"));
}

static bool read_atom(struct reader *r, struct part *out) {
    struct ranges s = {.n = 0};
    uint32_t code = 0;
    bool is_class = false;
    if ((*r->budget)-- == 0) return too_much(r);
    switch (r->text[r->at]) {
    case '(': r->at++; return read_group(r, out);
    case '[': r->at++; return read_class(r, out);
    case '^': r->at++; return add_position(r, NULL, MARK_BEGIN, out);
    case '$': r->at++; return add_position(r, NULL, MARK_END, out);
    case '*':
    case '+':
    case '?': return refuse(r, "nothing to repeat");
    case '.':
        r->at++;
        add_range(&s, '\n', '\n');
        add_range(&s, '\r', '\r');
        add_range(&s, 0x2028, 0x2029);
        complement(&s);
        return add_position(r, &s, MARK_NONE, out);
    case '\\':
        r->at++;
        if (!read_escape(r, &s, false, &is_class, &code)) return false;
        break;
    default: code = read_code(r);
    }
    if (!is_class) add_range(&s, code, code);
    return add_position(r, &s, MARK_NONE, out);
}

// {n}, {n,}, {n,m}: false where it is none, and nothing was read.
static bool read_bounds(struct reader *r, uint32_t *min, uint32_t *max) {
    size_t at = r->at + 1;
    uint32_t n[2] = {0, 0};
    bool comma = false, digits[2] = {false, false};
    for (; at < r->n && r->text[at] != '}'; at++) {
        unsigned char c = r->text[at];
        if (c == ',' && !comma) {
            comma = true;
        } else if (c >= '0' && c <= '9') {
            digits[comma] = true;
            if (n[comma] < UNBOUNDED) n[comma] = n[comma] * 10 + (uint32_t)(c - '0');
        } else {
            return false;
        }
    }
    if (at >= r->n || !digits[0]) return false;
    r->at = at + 1;
    *min = n[0];
    *max = !comma ? n[0] : digits[1] ? n[1] : UNBOUNDED;
    return true;
}

static bool read_quantifier(struct reader *r, uint32_t *min, uint32_t *max) {
    *min = *max = 1;
    if (next_is(r, '*')) *min = 0, *max = UNBOUNDED;
    else if (next_is(r, '+')) *max = UNBOUNDED;
    else if (next_is(r, '?')) *min = 0;
    else if (r->at >= r->n || r->text[r->at] != '{' || !read_bounds(r, min, max)) return true;
    next_is(r, '?'); // whether a match is long or short makes no difference to which strings match
    return *min <= *max || refuse(r, "a repetition of less than none");
}

// The atom at `from`, again.
static bool copy_atom(struct reader *r, size_t from, struct part *out) {
    r->at = from;
    return read_atom(r, out);
}

static bool repeat_atom(struct reader *r, size_t from, uint32_t min, uint32_t max, struct part *out) {
    struct part one, tail = {.empty = true}, head = {.empty = true};
    uint32_t copies = min;
    if (max == UNBOUNDED) {
        if (!copy_atom(r, from, &tail) || !connect(r, tail.last, tail.first)) return false;
        if (min == 0) tail.empty = true;
        else copies--;
    }
    for (uint32_t i = min; max != UNBOUNDED && i < max; i++) {
        if (!copy_atom(r, from, &one) || !follow(r, &one, &tail, &tail)) return false;
        tail.empty = true;
    }
    for (uint32_t i = 0; i < copies; i++)
        if (!copy_atom(r, from, &one) || !follow(r, &head, &one, &head)) return false;
    return follow(r, &head, &tail, out);
}

static bool read_term(struct reader *r, struct part *out) {
    size_t from = r->at, end;
    uint32_t min, max;
    r->dry++;
    bool ok = read_atom(r, out) && read_quantifier(r, &min, &max);
    r->dry--;
    end = r->at;
    if (!ok || r->dry) return ok;
    if (min == 1 && max == 1) ok = copy_atom(r, from, out);
    else ok = repeat_atom(r, from, min, max, out);
    r->at = end;
    return ok;
}

static bool read_sequence(struct reader *r, struct part *out) {
    struct part one;
    *out = (struct part){.empty = true};
    while (r->at < r->n && r->text[r->at] != '|' && r->text[r->at] != ')')
        if (!read_term(r, &one) || !follow(r, out, &one, out)) return false;
    return true;
}

static bool read_alternatives(struct reader *r, struct part *out) {
    struct part one;
    if (!read_sequence(r, out)) return false;
    while (next_is(r, '|')) {
        if (!read_sequence(r, &one)) return false;
        out->empty = out->empty || one.empty;
        if (!join(r, one.first, out->first, &out->first) || !join(r, one.last, out->last, &out->last)) return false;
    }
    return true;
}

// ---- From positions to a language

// Any characters, in a loop, with a mark before or behind them; optional as a whole.
static bool any_text(struct reader *r, enum mark mark, struct part *out) {
    struct ranges s = {.n = 0};
    struct part sign, loop;
    add_range(&s, 0, MAX_CODE);
    bool ok = add_position(r, NULL, mark, &sign) && add_position(r, &s, MARK_NONE, &loop) &&
              connect(r, loop.last, loop.first);
    if (!ok) return false;
    loop.empty = true;
    ok = mark == MARK_BEGIN ? follow(r, &sign, &loop, out) : follow(r, &loop, &sign, out);
    out->empty = true;
    return ok;
}

static void mark_list(const struct list *l, bool *marks) {
    if (!l) return;
    for (; l->a; l = l->b) mark_list(l->a, marks);
    marks[l->position] = true;
}

// `ends`: [n_positions] may be the last.
static bool put_state(struct reader *r, const bool *ends, uint32_t at, struct language_state *state) {
    size_t n = 0;
    for (uint32_t e = r->positions[at].edges; e; e = r->edges[e - 1].next) n++;
    struct language_edge *edges = arena_alloc(r->arena, n + 1, sizeof *edges);
    if (!edges) return no_memory(r);
    *state = (struct language_state){.edges = edges};
    for (uint32_t e = r->positions[at].edges; e; e = r->edges[e - 1].next) {
        uint32_t to = r->edges[e - 1].to;
        const struct position *p = &r->positions[to];
        if (p->mark == MARK_END) state->accepts = state->accepts || ends[to];
        else if (p->mark == MARK_NONE) edges[state->n++] = (struct language_edge){p->set, to};
    }
    return true;
}

static const struct language *make_language(struct reader *r, const struct part *whole) {
    struct language *l = arena_alloc(r->arena, 1, sizeof *l);
    struct language_state *states = arena_alloc(r->arena, r->n_positions, sizeof *states);
    uint32_t *starts = arena_alloc(r->arena, r->n_positions, sizeof *starts);
    bool *begins = arena_alloc_zero(r->arena, r->n_positions, sizeof *begins);
    bool *ends = arena_alloc_zero(r->arena, r->n_positions, sizeof *ends);
    bool ok = (l && states && starts && begins && ends) || no_memory(r);
    if (ok) mark_list(whole->first, begins);
    if (ok) mark_list(whole->last, ends);
    if (ok) *l = (struct language){.states = states, .n = r->n_positions, .starts = starts};
    for (uint32_t i = 0; ok && i < r->n_positions; i++) {
        ok = put_state(r, ends, i, &states[i]);
        if (ok && r->positions[i].mark == MARK_BEGIN && begins[i]) starts[l->n_starts++] = i;
    }
    return ok ? l : NULL;
}

const struct language *pattern_language(struct arena *arena, const char *pattern, size_t n, size_t *budget,
                                        struct error *err) {
    struct reader r = {.arena = arena, .text = (const unsigned char *)pattern, .n = n, .budget = budget, .err = err};
    struct part before, inside, behind, whole;
    r.positions = arena_alloc(arena, MAX_POSITIONS, sizeof *r.positions);
    if (!r.positions) {
        no_memory(&r);
        return NULL;
    }
    // ^ and $ inside match the marks themselves; where they are not written, any text stands around the match.
    if (!any_text(&r, MARK_BEGIN, &before) || !read_alternatives(&r, &inside)) return NULL;
    if (r.at < n) {
        refuse(&r, "a ) without its (");
        return NULL;
    }
    if (!any_text(&r, MARK_END, &behind) || !follow(&r, &before, &inside, &whole) ||
        !follow(&r, &whole, &behind, &whole))
        return NULL;
    return make_language(&r, &whole);
}

// ---- All but some names

struct leaf {                      // of a tree of names
    uint32_t code, child, sibling; // child, sibling: plus one
    bool ends;
};

static const struct code_set *make_set(struct arena *arena, struct code_range *ranges, size_t n) {
    struct code_set *set = arena_alloc(arena, 1, sizeof *set);
    if (set) *set = (struct code_set){ranges, n};
    return set;
}

static int compare_codes(const void *a, const void *b) {
    const struct code_range *x = a, *y = b;
    return (x->low > y->low) - (x->low < y->low);
}

// The edges of one leaf: to its children, and with every other character to `anything`.
static bool put_leaf(struct arena *arena, const struct leaf *tree, uint32_t at, uint32_t anything,
                     struct language_state *state) {
    size_t n = 0, n_other = 0;
    for (uint32_t c = tree[at].child; c; c = tree[c - 1].sibling) n++;
    struct language_edge *edges = arena_alloc(arena, n + 1, sizeof *edges);
    struct code_range *ranges = arena_alloc(arena, n + 1, sizeof *ranges);
    struct code_range *other = arena_alloc(arena, n + 1, sizeof *other);
    if (!edges || !ranges || !other) return false;
    n = 0;
    for (uint32_t c = tree[at].child; c; c = tree[c - 1].sibling, n++) {
        ranges[n] = (struct code_range){tree[c - 1].code, tree[c - 1].code};
        edges[n] = (struct language_edge){make_set(arena, &ranges[n], 1), c - 1};
        if (!edges[n].set) return false;
        other[n] = ranges[n];
    }
    qsort(other, n, sizeof *other, compare_codes);
    uint32_t from = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t code = other[i].low;
        if (code > from) other[n_other++] = (struct code_range){from, code - 1};
        from = code + 1;
    }
    other[n_other++] = (struct code_range){from, MAX_CODE};
    edges[n] = (struct language_edge){make_set(arena, other, n_other), anything};
    *state = (struct language_state){.edges = edges, .n = n + 1, .accepts = !tree[at].ends};
    return edges[n].set != NULL;
}

const struct language *language_except(struct arena *arena, const struct language_name *names, size_t n) {
    size_t most = 2, used = 1;
    for (size_t i = 0; i < n; i++) most += names[i].n;
    struct leaf *tree = arena_alloc_zero(arena, most, sizeof *tree);
    struct language *l = arena_alloc_zero(arena, 1, sizeof *l);
    struct language_state *states = arena_alloc(arena, most, sizeof *states);
    uint32_t *starts = arena_alloc_zero(arena, 1, sizeof *starts);
    struct code_range *all = arena_alloc_zero(arena, 1, sizeof *all);
    struct language_edge *loop = arena_alloc_zero(arena, 1, sizeof *loop);
    if (!tree || !l || !states || !starts || !all || !loop) return NULL;
    for (size_t i = 0; i < n; i++) {
        uint32_t at = 0, code = 0, c;
        for (size_t k = 0, length; k < names[i].n; k += length) {
            length = utf8_decode((const unsigned char *)names[i].text + k, names[i].n - k, &code);
            if (!length) length = 1;
            for (c = tree[at].child; c && tree[c - 1].code != code; c = tree[c - 1].sibling) {
            }
            if (!c) {
                tree[used] = (struct leaf){.code = code, .sibling = tree[at].child};
                tree[at].child = c = (uint32_t)++used;
            }
            at = c - 1;
        }
        tree[at].ends = true;
    }
    for (uint32_t i = 0; i < used; i++)
        if (!put_leaf(arena, tree, i, (uint32_t)used, &states[i])) return NULL;
    all->high = MAX_CODE;
    *loop = (struct language_edge){make_set(arena, all, 1), (uint32_t)used};
    states[used] = (struct language_state){.edges = loop, .n = 1, .accepts = true};
    *l = (struct language){.states = states, .n = used + 1, .starts = starts, .n_starts = 1};
    return loop->set ? l : NULL;
}

static bool set_has(const struct code_set *s, uint32_t code) {
    for (size_t i = 0; i < s->n; i++)
        if (code >= s->ranges[i].low && code <= s->ranges[i].high) return true;
    return false;
}

bool language_has(const struct language *l, const char *text, size_t n) {
    bool *now = calloc(2 * l->n + 2, sizeof *now), *next = now + l->n, accepts = false;
    if (!now) return false;
    bool *both = now;
    for (size_t i = 0; i < l->n_starts; i++) now[l->starts[i]] = true;
    for (size_t at = 0, length; at < n; at += length) {
        uint32_t code = 0;
        length = utf8_decode((const unsigned char *)text + at, n - at, &code);
        if (!length) length = 1;
        memset(next, 0, l->n);
        for (size_t i = 0; i < l->n; i++)
            for (size_t e = 0; now[i] && e < l->states[i].n; e++)
                if (set_has(l->states[i].edges[e].set, code)) next[l->states[i].edges[e].to] = true;
        bool *swap = now;
        now = next;
        next = swap;
    }
    for (size_t i = 0; i < l->n; i++) accepts = accepts || (now[i] && l->states[i].accepts);
    free(both);
    return accepts;
}

// ---- Formats

#define DAY                                                                                                            \
    "((000[1-9]|00[1-9]\\d|0[1-9]\\d\\d|[1-9]\\d{3})-((0[13578]|1[02])-(0[1-9]|[12]\\d|3[01])|(0[469]|11)-(0[1-9]|["   \
    "12]\\d|30)|02-(0[1-9]|1\\d|2[0-8]))|(\\d\\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-"   \
    "02-29)"
#define CLOCK "([01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(\\.\\d{1,6})?"
#define ZONE "(Z|[+-]([01]\\d|2[0-3]):[0-5]\\d)"
#define BYTE "(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)"
#define LABEL "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
#define H4 "[0-9a-fA-F]{1,4}"

const char *pattern_of_format(const char *format) {
    static const char *const formats[][2] = {
        {"date", "^" DAY "$"},
        {"time", "^" CLOCK ZONE "$"},
        {"date-time", "^" DAY "T" CLOCK ZONE "$"},
        {"duration", "^P(\\d{1,4}W|\\d{1,4}Y(\\d{1,4}M(\\d{1,4}D)?)?(T\\d{1,4}S)?|\\d{1,4}M(\\d{1,4}D)?|\\d{1,4}D(T\\d{"
                     "1,4}H(\\d{1,4}M)?)?|T(\\d{1,4}H(\\d{1,4}M(\\d{1,4}S)?)?|\\d{1,4}M(\\d{1,4}S)?|\\d{1,4}S))$"},
        {"uuid", "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"},
        {"email",
         "^[A-Za-z0-9]+([._+-][A-Za-z0-9]+)*@([A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?\\.)+[A-Za-z]{2,12}$"},
        {"hostname", "^" LABEL "(\\." LABEL "){0,3}$"},
        {"ipv4", "^" BYTE "(\\." BYTE "){3}$"},
        {"ipv6", "^((" H4 ":){7}" H4 "|(" H4 ":){1,6}:" H4 "|(" H4 ":){1,7}:|:(:" H4 "){1,7}|::)$"},
        {"uri",
         "^[A-Za-z][A-Za-z0-9+.-]{0,30}:(//[A-Za-z0-9](-?[A-Za-z0-9])*(\\.[A-Za-z0-9](-?[A-Za-z0-9])*)*(:[0-9]{1,4})?"
         "(/([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*)*|[A-Za-z0-9._~+@-]+)([?]([A-Za-z0-9._~!$&'()*+,;=:@/"
         "?-]|%[0-9A-Fa-f]{2})*)?(#[A-Za-z0-9._~-]*)?$"}};
    for (size_t i = 0; i < sizeof formats / sizeof formats[0]; i++)
        if (strcmp(format, formats[i][0]) == 0) return formats[i][1];
    return NULL;
}
