// json_scan.c: see json_scan.h. It owns the grammar; what a file's members mean is its reader's business.
#include "format/json_scan.h"

#include "base/size.h"
#include "base/utf8.h"
#include "format/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A key of an object that is not closed yet: where its quote stands. The hash makes sorting cheap; equal ones are
// compared in full, so that chosen collisions cost no more than n log n.
struct key {
    uint32_t hash, at;
};

struct checker {
    const char *text, *name;
    size_t n, at;
    struct key *keys; // [n_keys] of all open objects, the innermost last
    size_t n_keys, cap;
    struct buffer number; // a number as a C string
    struct error *err;
};

static bool fail(struct checker *c, size_t at, const char *what) {
    size_t line = 1, column = 1;
    for (size_t i = 0; i < at && i < c->n; i++) {
        if (c->text[i] == '\n') line++, column = 1;
        else column++;
    }
    return error_set(c->err, "%s: line %zu, column %zu: not valid JSON: %s", c->name, line, column, what);
}

static bool no_memory(struct checker *c) {
    return error_set(c->err, "%s: out of memory", c->name);
}

// ---- Characters ---------------------------------------------------------------------------------------------------

// Each of these reads one thing at text[*at], *at < n, and steps over it; it returns NULL or what is wrong.

static const char *hex4(const char *text, size_t n, size_t *at, uint32_t *out) {
    uint32_t v = 0;
    for (int i = 0; i < 4; i++, ++*at) {
        char c = *at < n ? text[*at] : '\0';
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) return "\\u without four hexadecimal digits";
        v = v << 4 | (uint32_t)digit;
    }
    *out = v;
    return NULL;
}

static const char *escape(const char *text, size_t n, size_t *at, uint32_t *code) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    static const char lone[] = "\\u names half of a surrogate pair";
    size_t p = *at + 1;
    char c = p < n ? text[p] : '\0';
    const char *found = c ? strchr(from, c) : NULL;
    *at = p + (p < n);
    if (found) {
        *code = (uint32_t)(unsigned char)to[found - from];
        return NULL;
    }
    if (c != 'u') return "unknown escape in a string";
    const char *wrong = hex4(text, n, at, code);
    if (wrong) return wrong;
    if (*code == 0) return "NUL (\\u0000) in a string is not supported";
    if (*code < 0xD800 || *code > 0xDFFF) return NULL;
    uint32_t low;
    if (*code > 0xDBFF || n - *at < 6 || text[*at] != '\\' || text[*at + 1] != 'u') return lone;
    *at += 2;
    if ((wrong = hex4(text, n, at, &low))) return wrong;
    if (low < 0xDC00 || low > 0xDFFF) return lone;
    *code = 0x10000 + ((*code - 0xD800) << 10) + (low - 0xDC00);
    return NULL;
}

static const char *character(const char *text, size_t n, size_t *at, uint32_t *code) {
    unsigned char c = (unsigned char)text[*at];
    if (c == '\\') return escape(text, n, at, code);
    if (c < 0x20) return "control character in a string";
    size_t length = utf8_decode((const unsigned char *)text + *at, n - *at, code);
    if (length == 0) return "";
    *at += length;
    return NULL;
}

// ---- Duplicate keys -----------------------------------------------------------------------------------------------

// Order of two keys that stand at text[a] and text[b]; any total order will do.
static int compare_texts(const struct checker *c, size_t a, size_t b) {
    for (a++, b++;;) {
        bool end_a = a >= c->n || c->text[a] == '"', end_b = b >= c->n || c->text[b] == '"';
        if (end_a || end_b) return end_a && end_b ? 0 : end_a ? -1 : 1;
        uint32_t x = 0, y = 0;
        if (character(c->text, c->n, &a, &x) || character(c->text, c->n, &b, &y)) return 0;
        if (x != y) return x < y ? -1 : 1;
    }
}

static int compare_keys(const void *a, const void *b, void *context) {
    const struct key *x = a, *y = b;
    if (x->hash != y->hash) return x->hash < y->hash ? -1 : 1;
    int order = compare_texts(context, x->at, y->at);
    return order ? order : (x->at > y->at) - (x->at < y->at);
}

static bool fail_duplicate(struct checker *c, size_t at) {
    struct json_cursor cursor = {c->text, c->n, at};
    struct buffer key = {0};
    char what[192];
    bool known = json_cursor_text(&cursor, &key);
    snprintf(what, sizeof what, "duplicate object key \"%.100s\"", known ? buffer_text(&key) : "?");
    buffer_free(&key);
    return fail(c, at, what);
}

// The keys from `first` on are those of one object, which ends here.
static bool check_duplicates(struct checker *c, size_t first) {
    size_t n = c->n_keys - first;
    struct key *keys = n ? c->keys + first : NULL;
    c->n_keys = first;
    if (n < 2) return true;
    qsort_r(keys, n, sizeof *keys, compare_keys, c);
    for (size_t i = 1; i < n; i++)
        if (keys[i].hash == keys[i - 1].hash && compare_texts(c, keys[i].at, keys[i - 1].at) == 0)
            return fail_duplicate(c, keys[i].at);
    return true;
}

static bool add_key(struct checker *c, size_t at, uint32_t hash) {
    if (c->n_keys == c->cap) {
        size_t cap;
        if (!size_add(c->cap, c->cap / 2, &cap) || !size_add(cap, 64, &cap)) return no_memory(c);
        struct key *keys = size_realloc(c->keys, cap, sizeof *keys);
        if (!keys) return no_memory(c);
        c->keys = keys;
        c->cap = cap;
    }
    c->keys[c->n_keys++] = (struct key){.hash = hash, .at = (uint32_t)at};
    return true;
}

// ---- The grammar --------------------------------------------------------------------------------------------------

static int peek(const struct checker *c) {
    return c->at < c->n ? (unsigned char)c->text[c->at] : -1;
}

static bool is_space(char c) {
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

static void skip_space(struct checker *c) {
    while (c->at < c->n && is_space(c->text[c->at])) c->at++;
}

// Something is wrong with the character or escape at `at`, whose text is shown.
static bool fail_in_string(struct checker *c, size_t at, const char *wrong) {
    char what[96];
    size_t n = 0;
    while (n < 6 && at + n < c->n && c->text[at + n] > ' ' && c->text[at + n] != '"') n++;
    snprintf(what, sizeof what, "%s: '%.*s'", wrong, (int)n, c->text + at);
    return fail(c, at, what);
}

// At the quote. `hash` gets the FNV-1a hash of the string's characters.
static bool check_string(struct checker *c, uint32_t *hash) {
    size_t start = c->at++;
    uint32_t h = 0x811C9DC5u;
    for (;;) {
        if (c->at >= c->n) return fail(c, start, "a string without an end");
        if (c->text[c->at] == '"') break;
        size_t at = c->at;
        uint32_t code = 0;
        const char *wrong = character(c->text, c->n, &c->at, &code);
        if (wrong && !*wrong) {
            char what[64];
            snprintf(what, sizeof what, "unable to decode byte 0x%02x as UTF-8", (unsigned char)c->text[at]);
            return fail(c, at, what);
        }
        if (wrong) return fail_in_string(c, at, wrong);
        h = (h ^ code) * 0x01000193u;
    }
    c->at++;
    *hash = h;
    return true;
}

static bool digits(struct checker *c) {
    size_t start = c->at;
    while (peek(c) >= '0' && peek(c) <= '9') c->at++;
    return c->at > start;
}

static bool integer_fits(const char *text, size_t n) {
    uint64_t value = 0;
    bool negative = text[0] == '-';
    for (size_t i = negative; i < n; i++) {
        uint64_t digit = (uint64_t)(text[i] - '0');
        if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, digit, &value)) return false;
    }
    return value <= (uint64_t)INT64_MAX + negative;
}

static bool check_number(struct checker *c) {
    size_t start = c->at;
    bool is_real = false;
    if (peek(c) == '-') c->at++;
    if (peek(c) == '0') c->at++;
    else if (!digits(c)) return fail(c, start, "a digit is missing in a number");
    if (peek(c) == '.') {
        is_real = true;
        c->at++;
        if (!digits(c)) return fail(c, start, "a digit is missing after the decimal point");
    }
    if (peek(c) == 'e' || peek(c) == 'E') {
        is_real = true;
        c->at++;
        if (peek(c) == '+' || peek(c) == '-') c->at++;
        if (!digits(c)) return fail(c, start, "a digit is missing in the exponent");
    }
    if (!is_real) return integer_fits(c->text + start, c->at - start) || fail(c, start, "too big integer");
    buffer_clear(&c->number);
    if (!buffer_append(&c->number, c->text + start, c->at - start)) return no_memory(c);
    return isfinite(json_double(buffer_text(&c->number))) || fail(c, start, "real number overflow");
}

static bool check_word(struct checker *c) {
    static const char *const words[] = {"null", "true", "false"};
    for (size_t i = 0; i < 3; i++) {
        size_t n = strlen(words[i]);
        if (c->n - c->at >= n && memcmp(c->text + c->at, words[i], n) == 0) {
            c->at += n;
            return true;
        }
    }
    if (c->at >= c->n) return fail(c, c->at, "the text ends where a value was expected");
    char what[64];
    size_t near = 0;
    while (near < 20 && c->at + near < c->n && c->text[c->at + near] > ' ') near++; // ASCII only: no half character
    snprintf(what, sizeof what, "a value was expected near '%.*s'", (int)near, c->text + c->at);
    return fail(c, c->at, what);
}

static bool check_value(struct checker *c, int depth);

// At the bracket.
static bool check_container(struct checker *c, int depth) {
    size_t start = c->at, first_key = c->n_keys;
    bool is_object = c->text[c->at++] == '{';
    int close = is_object ? '}' : ']';
    if (depth >= JSON_SCAN_MAX_DEPTH) return fail(c, start, "the maximum depth of 128 is passed");
    skip_space(c);
    if (peek(c) == close) {
        c->at++;
        return true;
    }
    for (;;) {
        if (is_object) {
            skip_space(c);
            size_t at = c->at;
            uint32_t hash = 0;
            if (peek(c) != '"') return fail(c, c->at, "a key in quotes was expected");
            if (!check_string(c, &hash) || !add_key(c, at, hash)) return false;
            skip_space(c);
            if (peek(c) != ':') return fail(c, c->at, "':' was expected");
            c->at++;
        }
        if (!check_value(c, depth + 1)) return false;
        skip_space(c);
        if (peek(c) == close) break;
        if (peek(c) != ',') return fail(c, c->at, is_object ? "',' or '}' was expected" : "',' or ']' was expected");
        c->at++;
    }
    c->at++;
    return !is_object || check_duplicates(c, first_key);
}

static bool check_value(struct checker *c, int depth) {
    skip_space(c);
    int byte = peek(c);
    uint32_t hash;
    if (byte == '{' || byte == '[') return check_container(c, depth);
    if (byte == '"') return check_string(c, &hash);
    if (byte == '-' || (byte >= '0' && byte <= '9')) return check_number(c);
    return check_word(c);
}

bool json_scan_check(const char *text, size_t n, const char *name, struct error *err) {
    struct checker c = {.text = text, .name = name, .n = n, .err = err};
    if (n > UINT32_MAX) return error_set(err, "%s: %zu bytes of JSON, more than 4 GiB", name, n);
    bool ok = check_value(&c, 0);
    skip_space(&c);
    if (ok && c.at < n) ok = fail(&c, c.at, "text after the end of the value (end of file expected)");
    free(c.keys);
    buffer_free(&c.number);
    return ok;
}

// ---- The cursor ---------------------------------------------------------------------------------------------------

static char here(const struct json_cursor *c) {
    return c->at < c->n ? c->text[c->at] : '\0';
}

// The end of the number that begins at the cursor; `*integer`: it has neither fraction nor exponent.
static size_t number_end(const struct json_cursor *c, bool *integer) {
    size_t at = c->at;
    *integer = true;
    for (; at < c->n; at++) {
        char b = c->text[at];
        if (b == '.' || b == 'e' || b == 'E') *integer = false;
        else if (b != '-' && b != '+' && (b < '0' || b > '9')) break;
    }
    return at;
}

char json_cursor_type(struct json_cursor *c) {
    while (c->at < c->n && is_space(c->text[c->at])) c->at++;
    char b = here(c);
    if (b != '-' && (b < '0' || b > '9')) return b;
    bool integer;
    number_end(c, &integer);
    return integer ? 'i' : 'r';
}

void json_cursor_enter(struct json_cursor *c) {
    json_cursor_type(c);
    if (c->at < c->n) c->at++;
}

bool json_cursor_more(struct json_cursor *c) {
    char b = json_cursor_type(c);
    if (b == ',') {
        c->at++;
        return json_cursor_type(c) != '\0';
    }
    if (b == '}' || b == ']') {
        c->at++;
        return false;
    }
    return b != '\0';
}

bool json_cursor_text(struct json_cursor *c, struct buffer *out) {
    buffer_clear(out);
    json_cursor_type(c);
    if (c->at < c->n) c->at++; // the quote
    while (c->at < c->n && c->text[c->at] != '"') {
        size_t start = c->at;
        while (c->at < c->n && c->text[c->at] != '"' && c->text[c->at] != '\\') c->at++;
        if (!buffer_append(out, c->text + start, c->at - start)) return false;
        if (here(c) != '\\') continue;
        uint32_t code = 0;
        char bytes[4];
        const char *wrong = escape(c->text, c->n, &c->at, &code);
        if (!wrong && !buffer_append(out, bytes, utf8_encode(code, bytes))) return false;
    }
    if (c->at < c->n) c->at++;
    return true;
}

bool json_cursor_key(struct json_cursor *c, struct buffer *out) {
    if (!json_cursor_text(c, out)) return false;
    if (json_cursor_type(c) == ':') c->at++;
    return true;
}

bool json_cursor_size(struct json_cursor *c, size_t *out) {
    if (json_cursor_type(c) != 'i') return false;
    bool integer;
    size_t end = number_end(c, &integer), value = 0;
    for (size_t at = c->at; at < end; at++) {
        char b = c->text[at];
        size_t digit = (size_t)(b - '0');
        if (b == '-' && end - at == 2 && c->text[at + 1] == '0') continue; // -0
        if (b < '0' || b > '9' || !size_mul_add(value, 10, digit, &value)) return false;
    }
    c->at = end;
    *out = value;
    return true;
}

// Brackets inside strings do not count; the text was checked, so that counting brackets finds the value's end.
void json_cursor_skip(struct json_cursor *c) {
    size_t depth = 0;
    json_cursor_type(c);
    do {
        char b = here(c);
        if (b == '"') {
            for (c->at++; c->at < c->n && c->text[c->at] != '"'; c->at++)
                if (c->text[c->at] == '\\') c->at++;
        }
        if (b == '{' || b == '[') depth++;
        if ((b == '}' || b == ']') && depth > 0) depth--;
        if (c->at < c->n) c->at++;
        if (depth == 0 && b != '{' && b != '[' && b != '}' && b != ']' && b != '"') { // the rest of a number or word
            while (c->at < c->n && !strchr(",:}]{[\" \t\r\n", c->text[c->at])) c->at++;
        }
    } while (depth > 0 && c->at < c->n);
    if (c->at > c->n) c->at = c->n;
}
