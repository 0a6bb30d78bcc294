// template_kind.c: the templates that tandem knows: their names, their abilities, and how their Jinja text is
// recognised. It owns the normal form under which two spellings of one template are equal; rendering is template.c's.
#include "base/buffer.h"
#include "text/template.h"

#include <stdint.h>
#include <string.h>

static const struct {
    const char *name;
    bool thinks, opens_thinking, can_hush, has_tools;
} kinds[] = {
    [TEMPLATE_UNKNOWN] = {"unknown", false, false, false, false},
    [TEMPLATE_QWEN3] = {"qwen3", true, false, true, true},
    [TEMPLATE_QWEN3_INSTRUCT_2507] = {"qwen3-instruct-2507", false, false, false, true},
    [TEMPLATE_QWEN3_INSTRUCT_REASONING] = {"qwen3-instruct-reasoning", false, false, false, true},
    [TEMPLATE_QWEN3_THINKING_2507] = {"qwen3-thinking-2507", true, true, false, true},
    [TEMPLATE_QWEN25] = {"qwen2.5", false, false, false, true},
    [TEMPLATE_QWEN2] = {"qwen2", false, false, false, false},
    [TEMPLATE_SMOLLM2] = {"smollm2", false, false, false, false},
    [TEMPLATE_CHATML] = {"chatml", false, false, false, false},
};

const char *template_name(enum template_kind kind) {
    return kinds[kind].name;
}

bool template_from_name(const char *name, enum template_kind *out) {
    for (int i = TEMPLATE_QWEN3; i <= TEMPLATE_CHATML; i++)
        if (strcmp(kinds[i].name, name) == 0) {
            *out = (enum template_kind)i;
            return true;
        }
    return false;
}

const char *template_names(void) {
    return "qwen3, qwen3-instruct-2507, qwen3-instruct-reasoning, qwen3-thinking-2507, qwen2.5, qwen2, smollm2, chatml";
}

bool template_has_thinking(enum template_kind kind) {
    return kinds[kind].thinks;
}

bool template_opens_thinking(enum template_kind kind) {
    return kinds[kind].opens_thinking;
}

bool template_can_hush(enum template_kind kind) {
    return kinds[kind].can_hush;
}

bool template_has_tools(enum template_kind kind) {
    return kinds[kind].has_tools;
}

// The normal form of a template: a list of tokens, each ended by the byte 1. A string literal is a quote and its
// decoded text (adjacent literals joined by + are one), a subscript with a literal is a dot and its name, output text
// between tags is a byte 2 and what trim_blocks, lstrip_blocks and the minus signs leave of it, comments are gone.
enum { TOKEN_END = 1, TOKEN_TEXT = 2 };

static bool is_space(char c) {
    return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v';
}

static bool is_word(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

// Output text [at, end), as Jinja leaves it. `after`: the tag before it, '%', '}', '#' or 0; `minus_before` and
// `minus_after`: the tags around it have a minus sign on this side; `next`: the tag after it, '%', '{', '#' or 0.
static bool put_data(struct buffer *out, const char *at, const char *end, char after, bool minus_before, char next,
                     bool minus_after) {
    if (next == 0 && end > at && end[-1] == '\n') end--; // keep_trailing_newline is off
    if (minus_before) {
        while (at < end && is_space(*at)) at++;
    } else if ((after == '%' || after == '#') && at < end && *at == '\n') {
        at++; // trim_blocks
    }
    if (minus_after) {
        while (end > at && is_space(end[-1])) end--;
    } else if (next == '%' || next == '#') { // lstrip_blocks
        const char *p = end;
        while (p > at && (p[-1] == ' ' || p[-1] == '\t')) p--;
        if ((p == at && after == 0) || (p > at && p[-1] == '\n') || (p == at && p[-1] == '\n')) end = p;
    }
    if (at == end) return true;
    return buffer_append_byte(out, TOKEN_TEXT) && buffer_append(out, at, (size_t)(end - at)) &&
           buffer_append_byte(out, TOKEN_END);
}

// The string literal at *at (a quote), decoded. False where it has no end.
static bool put_literal(struct buffer *out, const char **at) {
    const char *p = *at;
    char quote = *p++;
    for (; *p != quote; p++) {
        char c = *p;
        if (c == '\0') return false;
        if (c == '\\') {
            c = *++p;
            if (c == '\0') return false;
            if (c == 'n') c = '\n';
            else if (c == 't') c = '\t';
            else if (c == 'r') c = '\r';
            else if (c != '\\' && c != '\'' && c != '"') return false; // none of ours has another escape
        }
        if (!buffer_append_byte(out, c)) return false;
    }
    *at = p + 1;
    return true;
}

static const char *skip_spaces(const char *p) {
    while (is_space(*p)) p++;
    return p;
}

// ['name'] at p becomes .name; moves *at behind the bracket. 0: it is something else, -1: no memory or no end.
static int put_subscript(struct buffer *out, const char **at) {
    const char *p = skip_spaces(*at + 1);
    if (*p != '\'' && *p != '"') return 0;
    size_t keep = out->len;
    if (!buffer_append_byte(out, '.') || !buffer_append_byte(out, TOKEN_END)) return -1;
    size_t name = out->len;
    if (!put_literal(out, &p)) return -1;
    bool plain = out->len > name;
    for (size_t i = name; i < out->len; i++) plain = plain && is_word(out->data[i]);
    p = skip_spaces(p);
    if (*p != ']' || !plain) {
        out->len = keep;
        return 0;
    }
    *at = p + 1;
    return buffer_append_byte(out, TOKEN_END) ? 1 : -1;
}

// The tokens of a tag from *at to its closing mark ("%}" or "}}"), which *at then stands behind. `*minus`: the closing
// mark has a minus sign.
static bool put_tag(struct buffer *out, const char **at, const char *close, bool *minus) {
    const char *p = *at;
    bool after_literal = false, after_plus = false; // a literal, a literal and a plus: the next literal joins it
    bool after_name = false;                        // a subscript may follow
    for (;;) {
        p = skip_spaces(p);
        if (*p == '\0') return false;
        *minus = *p == '-' && p[1] == close[0] && p[2] == close[1];
        if (*minus) p++;
        if (p[0] == close[0] && p[1] == close[1]) break;
        if (*p == '\'' || *p == '"') {
            if (after_plus) out->len -= 3; // the end of the last literal, the plus and its end
            else if (!buffer_append_byte(out, '"')) return false;
            if (!put_literal(out, &p) || !buffer_append_byte(out, TOKEN_END)) return false;
            after_literal = true;
            after_plus = after_name = false;
            continue;
        }
        int subscript = *p == '[' && after_name ? put_subscript(out, &p) : 0;
        if (subscript < 0) return false;
        if (subscript > 0) continue;
        const char *start = p++;
        if (is_word(*start))
            while (is_word(*p)) p++;
        else if ((*start == '=' || *start == '!' || *start == '<' || *start == '>') && *p == '=') p++;
        if (!buffer_append(out, start, (size_t)(p - start)) || !buffer_append_byte(out, TOKEN_END)) return false;
        after_plus = *start == '+' && after_literal;
        after_literal = false;
        after_name = is_word(*start) || *start == ']' || *start == ')';
    }
    *at = p + 2;
    return true;
}

static bool normalise(const char *jinja, struct buffer *out) {
    const char *p = jinja;
    char after = 0;
    bool minus = false;
    for (;;) {
        const char *open = p;
        while (*open && !(*open == '{' && (open[1] == '{' || open[1] == '%' || open[1] == '#'))) open++;
        char next = *open ? open[1] : '\0';
        bool next_minus = next && open[2] == '-';
        if (!put_data(out, p, open, after, minus, next, next_minus)) return false;
        if (!next) return true;
        p = open + 2 + (next_minus ? 1 : 0);
        if (next == '#') {
            const char *end = strstr(p, "#}");
            if (!end) return false;
            minus = end > p && end[-1] == '-';
            p = end + 2;
            after = '#';
            continue;
        }
        char opening[2] = {next, TOKEN_END};
        if (!buffer_append(out, opening, 2) || !put_tag(out, &p, next == '%' ? "%}" : "}}", &minus)) return false;
        after = next == '%' ? '%' : '}';
    }
}

// FNV-1a, 64 bits. A name for a text, no defence: whoever writes a template that collides gets a wrong prompt.
static uint64_t fingerprint(const char *bytes, size_t n) {
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)bytes[i]) * 0x100000001B3u;
    return h;
}

// Of the normal forms of the texts in tests/data/templates; test_template.c holds the table against them.
static const struct {
    uint64_t fingerprint;
    enum template_kind kind;
} known[] = {
    {0x0167A473A6683E31u, TEMPLATE_QWEN3},                    // tests/data/qwen3-tokenizer
    {0xF1839B19199CA45Bu, TEMPLATE_QWEN3},                    // qwen3-strings.jinja
    {0x71D63A2636BF8C74u, TEMPLATE_QWEN3},                    // unsloth's, in many GGUF files: test_real.py
    {0x92F5940BCDDA3BD8u, TEMPLATE_QWEN3_INSTRUCT_2507},      // qwen3-instruct-2507.jinja
    {0x58F6F6EE982AA8FFu, TEMPLATE_QWEN3_INSTRUCT_REASONING}, // qwen3-instruct-reasoning.jinja
    {0x7E0A285F4D49FB9Cu, TEMPLATE_QWEN3_THINKING_2507},      // qwen3-thinking-2507.jinja
    {0x79239D569A790737u, TEMPLATE_QWEN25},                   // qwen2.5.jinja
    {0x30DE576B909A7BEDu, TEMPLATE_QWEN2},                    // qwen2.jinja
    {0xC8D811CC4030B1BEu, TEMPLATE_SMOLLM2},                  // smollm2.jinja
    {0x6893B2F71ABB2C2Fu, TEMPLATE_CHATML},                   // chatml.jinja
    {0x41EF64EA30C1CBD8u, TEMPLATE_CHATML},                   // chatml-default.jinja
};

enum template_kind template_recognise(const char *jinja) {
    if (!jinja) return TEMPLATE_UNKNOWN;
    struct buffer form = {0};
    enum template_kind kind = TEMPLATE_UNKNOWN;
    if (normalise(jinja, &form)) {
        uint64_t h = fingerprint(buffer_text(&form), form.len);
        for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
            if (known[i].fingerprint == h) kind = known[i].kind;
    }
    buffer_free(&form);
    return kind;
}
