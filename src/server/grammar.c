// grammar.c: see grammar.h.
#include "server/grammar.h"

#include "base/size.h"

#include <stdlib.h>
#include <string.h>

static uint32_t add(struct grammar *g, struct node node) {
    if (g->n == g->cap && !g->full) {
        size_t cap = g->cap ? 2 * g->cap : 256;
        if (cap > MAX_NODES) cap = MAX_NODES;
        struct node *nodes = cap > g->n ? size_realloc(g->nodes, cap, sizeof *nodes) : NULL;
        if (nodes) {
            g->nodes = nodes;
            g->cap = cap;
        }
    }
    if (g->full || g->n == g->cap) {
        g->full = true;
        return 0;
    }
    g->nodes[g->n] = node;
    return (uint32_t)g->n++;
}

uint32_t grammar_accept(struct grammar *g) {
    return add(g, (struct node){.kind = NODE_ACCEPT});
}

uint32_t grammar_return(struct grammar *g) {
    if (!g->common.back) g->common.back = add(g, (struct node){.kind = NODE_RETURN}) + 1;
    return g->common.back - 1;
}

uint32_t grammar_bytes(struct grammar *g, unsigned char low, unsigned char high, uint32_t next) {
    return add(g, (struct node){.kind = NODE_BYTES, .low = low, .high = high, .next = next});
}

uint32_t grammar_byte(struct grammar *g, char byte, uint32_t next) {
    return grammar_bytes(g, (unsigned char)byte, (unsigned char)byte, next);
}

uint32_t grammar_text(struct grammar *g, const char *text, size_t n, uint32_t next) {
    while (n > 0) next = grammar_byte(g, text[n - 1], next), n--;
    return next;
}

uint32_t grammar_split(struct grammar *g, uint32_t a, uint32_t b) {
    return a == b ? a : add(g, (struct node){.kind = NODE_SPLIT, .next = a, .other = b});
}

uint32_t grammar_hole(struct grammar *g) {
    uint32_t self = (uint32_t)g->n;
    return add(g, (struct node){.kind = NODE_SPLIT, .next = self, .other = self});
}

void grammar_fill(struct grammar *g, uint32_t hole, uint32_t a, uint32_t b) {
    if (g->full) return;
    g->nodes[hole].next = a;
    g->nodes[hole].other = b;
}

uint32_t grammar_call(struct grammar *g, uint32_t part, uint32_t next) {
    if (!g->full && g->nodes[next].kind == NODE_RETURN) return part; // it returns for both
    return add(g, (struct node){.kind = NODE_CALL, .next = next, .other = part});
}

uint32_t grammar_repeat(struct grammar *g, uint32_t part, uint32_t min, uint32_t max, uint32_t next) {
    if (max == 0) return next;
    if (g->n_repeats == g->cap_repeats && !g->full) {
        size_t cap = g->cap_repeats ? 2 * g->cap_repeats : 16;
        struct repeat *repeats = size_realloc(g->repeats, cap, sizeof *repeats);
        if (repeats) {
            g->repeats = repeats;
            g->cap_repeats = cap;
        } else {
            g->full = true;
        }
    }
    if (g->full) return 0;
    uint32_t at = (uint32_t)g->n_repeats++;
    g->repeats[at] = (struct repeat){part, min, max};
    return add(g, (struct node){.kind = NODE_REPEAT, .next = next, .other = at});
}

// ---- Pieces of JSON

uint32_t grammar_space(struct grammar *g, uint32_t next) {
    enum { MAX_INDENT = 16 };
    if (!g->common.space) {
        uint32_t back = grammar_return(g), indent = back;
        for (int i = 0; i < MAX_INDENT; i++) indent = grammar_split(g, back, grammar_byte(g, ' ', indent));
        uint32_t some = grammar_split(g, grammar_byte(g, ' ', back), grammar_byte(g, '\n', indent));
        g->common.space = grammar_split(g, back, some) + 1;
    }
    return grammar_call(g, g->common.space - 1, next);
}

static uint32_t hex(struct grammar *g, uint32_t next) {
    return grammar_split(g, grammar_bytes(g, '0', '9', next),
                         grammar_split(g, grammar_bytes(g, 'a', 'f', next), grammar_bytes(g, 'A', 'F', next)));
}

static uint32_t either_case(struct grammar *g, char low, char high, uint32_t next) {
    char upper_low = (char)(low - 'a' + 'A'), upper_high = (char)(high - 'a' + 'A');
    return grammar_split(g, grammar_bytes(g, (unsigned char)low, (unsigned char)high, next),
                         grammar_bytes(g, (unsigned char)upper_low, (unsigned char)upper_high, next));
}

// What follows \u: no lone surrogate.
static uint32_t unicode_escape(struct grammar *g, uint32_t next) {
    uint32_t h3 = hex(g, next), h2 = hex(g, h3), h1 = hex(g, h2);
    uint32_t second = either_case(g, 'd', 'd', either_case(g, 'c', 'f', h2)); // DC00 to DFFF
    second = grammar_byte(g, '\\', grammar_byte(g, 'u', second));
    uint32_t s3 = hex(g, second), s2 = hex(g, s3);
    uint32_t pair = grammar_split(g, grammar_bytes(g, '8', '9', s2), either_case(g, 'a', 'b', s2));
    uint32_t d = either_case(g, 'd', 'd', grammar_split(g, grammar_bytes(g, '0', '7', h2), pair));
    uint32_t rest = grammar_split(g, grammar_bytes(g, '0', '9', h1), either_case(g, 'a', 'c', h1));
    return grammar_split(g, d, grammar_split(g, rest, either_case(g, 'e', 'f', h1)));
}

// Any character of a string, escaped or not: valid UTF-8.
static uint32_t character(struct grammar *g) {
    static const char plain[] = "\"\\/bfnrt";
    static const struct code_range raw[] = {{0x20, 0x21}, {0x23, 0x5B}, {0x5D, 0x10FFFF}};
    if (!g->common.character) {
        uint32_t back = grammar_return(g), escape = grammar_byte(g, 'u', unicode_escape(g, back));
        for (const char *p = plain; *p; p++) escape = grammar_split(g, escape, grammar_byte(g, *p, back));
        escape = grammar_byte(g, '\\', escape);
        g->common.character = grammar_split(g, grammar_code(g, raw, 3, back), escape) + 1;
    }
    return g->common.character - 1;
}

uint32_t grammar_string(struct grammar *g, uint32_t min, uint32_t max, uint32_t next) {
    uint32_t end = grammar_byte(g, '"', next), part = character(g);
    return grammar_byte(g, '"', grammar_repeat(g, part, min, max, end));
}

uint32_t grammar_digits(struct grammar *g, int n, uint32_t next) {
    uint32_t at = grammar_bytes(g, '0', '9', next);
    for (int i = 1; i < n; i++) at = grammar_bytes(g, '0', '9', grammar_split(g, next, at));
    return at;
}

uint32_t grammar_number(struct grammar *g, uint32_t next) {
    uint32_t exponent = grammar_digits(g, 2, next);
    exponent =
        grammar_split(g, exponent, grammar_split(g, grammar_byte(g, '+', exponent), grammar_byte(g, '-', exponent)));
    exponent = grammar_split(g, next, either_case(g, 'e', 'e', exponent));
    uint32_t fraction = grammar_split(g, exponent, grammar_byte(g, '.', grammar_digits(g, 17, exponent)));
    uint32_t whole = grammar_bytes(g, '1', '9', grammar_split(g, fraction, grammar_digits(g, 17, fraction)));
    whole = grammar_split(g, grammar_byte(g, '0', fraction), whole);
    return grammar_split(g, whole, grammar_byte(g, '-', whole));
}

// Items inside brackets, with commas between them; `first` is the part of each.
static uint32_t list(struct grammar *g, char open, char close, uint32_t item, uint32_t next) {
    uint32_t back = grammar_return(g);
    uint32_t more = grammar_byte(g, ',', grammar_space(g, grammar_call(g, item, back)));
    uint32_t end = grammar_byte(g, close, next);
    uint32_t some = grammar_call(g, item, grammar_repeat(g, more, 0, NO_LIMIT, grammar_space(g, end)));
    return grammar_byte(g, open, grammar_split(g, end, grammar_space(g, some)));
}

static uint32_t any_object(struct grammar *g, uint32_t value, uint32_t next) {
    uint32_t of = grammar_call(g, value, grammar_return(g));
    uint32_t member =
        grammar_string(g, 0, NO_LIMIT, grammar_byte(g, ':', grammar_split(g, of, grammar_byte(g, ' ', of))));
    return list(g, '{', '}', member, next);
}

uint32_t grammar_json(struct grammar *g, bool object, uint32_t next) {
    if (!g->common.value) {
        uint32_t back = grammar_return(g), value = grammar_hole(g);
        uint32_t any = grammar_split(g, any_object(g, value, back), list(g, '[', ']', value, back));
        any = grammar_split(g, any, grammar_string(g, 0, NO_LIMIT, back));
        any = grammar_split(g, any, grammar_number(g, back));
        any = grammar_split(g, any, grammar_text(g, "true", 4, back));
        any = grammar_split(g, any, grammar_text(g, "false", 5, back));
        grammar_fill(g, value, any, grammar_text(g, "null", 4, back));
        g->common.value = value + 1;
    }
    return object ? any_object(g, g->common.value - 1, next) : grammar_call(g, g->common.value - 1, next);
}

// ---- Code points

// low to high, of which the first byte, `prefix` and the bits above 6 * left, goes before `left` continuation bytes.
static uint32_t utf8_range(struct grammar *g, uint32_t low, uint32_t high, int left, unsigned prefix, uint32_t next) {
    if (left == 0) return grammar_bytes(g, (unsigned char)(prefix | low), (unsigned char)(prefix | high), next);
    int shift = 6 * left;
    uint32_t last = high >> shift, mask = ((uint32_t)1 << shift) - 1, result = 0;
    bool any = false;
    for (uint32_t first = low >> shift, upto; first <= last; first = upto + 1) {
        uint32_t from = first == low >> shift ? low & mask : 0, to = first == last ? high & mask : mask;
        upto = first; // first bytes whose rests are the same, whole, are one range
        if (from == 0 && to == mask) upto = (high & mask) == mask ? last : last - 1;
        uint32_t rest = utf8_range(g, from, to, left - 1, 0x80, next);
        uint32_t one = grammar_bytes(g, (unsigned char)(prefix | first), (unsigned char)(prefix | upto), rest);
        result = any ? grammar_split(g, result, one) : one;
        any = true;
    }
    return result;
}

struct choice { // of the ways to match a code point
    struct grammar *g;
    bool any;
    uint32_t node;
};

static void choice_add(struct choice *c, uint32_t node) {
    c->node = c->any ? grammar_split(c->g, c->node, node) : node;
    c->any = true;
}

// ASCII from low to high: what JSON wants escaped is escaped.
static void add_ascii(struct choice *c, uint32_t low, uint32_t high, uint32_t next) {
    static const char named[] = "\bb\ff\nn\rr\tt";
    for (uint32_t at = low; at <= high && at < 0x20; at++) {
        const char *name = strchr("\b\f\n\r\t", (int)at);
        static const char digits[] = "0123456789abcdef";
        char text[7] = {'\\', 'u', '0', '0', digits[at >> 4], digits[at & 15], 0};
        size_t n = 6;
        if (at && name) text[1] = strchr(named, (int)at)[1], n = 2;
        choice_add(c, grammar_text(c->g, text, n, next));
    }
    static const struct code_range plain[] = {{0x20, 0x21}, {0x23, 0x5B}, {0x5D, 0x7F}};
    for (size_t i = 0; i < 3; i++) {
        uint32_t from = low > plain[i].low ? low : plain[i].low, to = high < plain[i].high ? high : plain[i].high;
        if (from <= to) choice_add(c, grammar_bytes(c->g, (unsigned char)from, (unsigned char)to, next));
    }
    if (low <= '"' && '"' <= high) choice_add(c, grammar_text(c->g, "\\\"", 2, next));
    if (low <= '\\' && '\\' <= high) choice_add(c, grammar_text(c->g, "\\\\", 2, next));
}

uint32_t grammar_code(struct grammar *g, const struct code_range *ranges, size_t n, uint32_t next) {
    static const struct {
        uint32_t low, high, prefix;
        int left;
    } spans[] = {
        {0x80, 0x7FF, 0xC0, 1}, {0x800, 0xD7FF, 0xE0, 2}, {0xE000, 0xFFFF, 0xE0, 2}, {0x10000, 0x10FFFF, 0xF0, 3}};
    struct choice c = {.g = g};
    for (size_t i = 0; i < n && !g->full; i++) {
        uint32_t low = ranges[i].low, high = ranges[i].high;
        if (low < 0x80) add_ascii(&c, low, high < 0x7F ? high : 0x7F, next);
        for (size_t k = 0; k < sizeof spans / sizeof spans[0]; k++) {
            uint32_t from = low > spans[k].low ? low : spans[k].low, to = high < spans[k].high ? high : spans[k].high;
            if (from <= to) choice_add(&c, utf8_range(g, from, to, spans[k].left, spans[k].prefix, next));
        }
    }
    return c.any ? c.node : grammar_hole(g);
}

// ---- The rest

struct grammar_mark grammar_mark(const struct grammar *g) {
    return (struct grammar_mark){g->n, g->n_repeats};
}

void grammar_rewind(struct grammar *g, struct grammar_mark mark) {
    uint32_t *parts[] = {&g->common.back, &g->common.space, &g->common.character, &g->common.value};
    g->n = mark.n;
    g->n_repeats = mark.n_repeats;
    g->full = false;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        if (*parts[i] > mark.n) *parts[i] = 0;
}

bool grammar_copy(const struct grammar *from, struct grammar *to) {
    *to = *from;
    to->cap = from->n;
    to->cap_repeats = from->n_repeats;
    to->nodes = size_alloc(from->n + 1, sizeof *to->nodes);
    to->repeats = size_alloc(from->n_repeats + 1, sizeof *to->repeats);
    if (!to->nodes || !to->repeats) {
        grammar_free(to);
        return false;
    }
    memcpy(to->nodes, from->nodes, from->n * sizeof *to->nodes);
    if (from->n_repeats) memcpy(to->repeats, from->repeats, from->n_repeats * sizeof *to->repeats);
    return true;
}

void grammar_free(struct grammar *g) {
    free(g->nodes);
    free(g->repeats);
    *g = (struct grammar){0};
}

static unsigned need_of(const struct grammar *g, const uint8_t *needs, const struct node *p) {
    unsigned next = needs[p->next], inside, other;
    const struct repeat *r;
    switch ((enum node_kind)p->kind) {
    case NODE_RETURN:
    case NODE_ACCEPT: return 0;
    case NODE_SPLIT: other = needs[p->other]; return next < other ? next : other;
    case NODE_CALL: inside = needs[p->other] + 1u; break;
    case NODE_REPEAT:
        r = &g->repeats[p->other];
        inside = r->min ? needs[r->body] + 1u : 0;
        break;
    default: return next;
    }
    if (next >= UINT8_MAX || inside > MAX_STACK) return UINT8_MAX;
    return next > inside ? next : inside;
}

bool grammar_needs(const struct grammar *g, uint8_t *needs) {
    enum { MAX_WORK = 20000000 };
    bool forward = true, changed = true;
    memset(needs, UINT8_MAX, g->n);
    // Most nodes go on at one made before them, those of patterns at one made after: few rounds, to and fro, settle
    // all.
    for (size_t work = 0; changed; work += g->n, forward = !forward) {
        if (work > MAX_WORK) return false;
        changed = false;
        for (size_t k = 0; k < g->n; k++) {
            size_t i = forward ? k : g->n - 1 - k;
            unsigned need = need_of(g, needs, &g->nodes[i]);
            if (need >= needs[i]) continue;
            needs[i] = (uint8_t)need;
            changed = true;
        }
    }
    return true;
}
