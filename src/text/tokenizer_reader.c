// tokenizer_reader.c: see tokenizer_reader.h. It knows the grammar of two members and nothing of what they mean.
#include "text/tokenizer_reader.h"

#include "text/unicode.h"

#include <inttypes.h>
#include <string.h>

// The offset behind the string that begins at json[i], a quotation mark; n when it does not end.
static size_t skip_string(const char *json, size_t n, size_t i) {
    for (i++; i < n; i++) {
        if (json[i] == '\\') i++;
        else if (json[i] == '"') return i + 1;
    }
    return n;
}

// The offset behind the object or array that begins at json[i]; n when it does not end.
static size_t skip_nested(const char *json, size_t n, size_t i) {
    size_t depth = 0;
    while (i < n) {
        char c = json[i];
        if (c == '"') {
            i = skip_string(json, n, i);
            continue;
        }
        if (c == '{' || c == '[') depth++;
        if ((c == '}' || c == ']') && --depth == 0) return i + 1;
        i++;
    }
    return n;
}

static bool is_key(const char *json, size_t start, size_t end, const char *name) {
    size_t n = strlen(name);
    return end - start == n + 2 && memcmp(json + start + 1, name, n) == 0;
}

bool tokenizer_outline(const char *json, size_t n, struct tokenizer_outline *out, struct error *err) {
    size_t depth = 0, copied = 0, start = 0, end = 0, key = 0, key_end = 0;
    bool in_model = false;
    *out = (struct tokenizer_outline){.json = json};
    for (size_t i = 0; i < n;) {
        char c = json[i];
        if (c == '"') {
            start = i;
            i = end = skip_string(json, n, i);
            continue;
        }
        if (c == ':') {
            key = start;
            key_end = end;
        } else if (c == '{' || c == '[') {
            bool vocab = in_model && depth == 2 && c == '{' && is_key(json, key, key_end, "vocab");
            bool merges = in_model && depth == 2 && c == '[' && is_key(json, key, key_end, "merges");
            if (vocab || merges) {
                size_t stop = skip_nested(json, n, i);
                *(vocab ? &out->vocab : &out->merges) = i;
                *(vocab ? &out->vocab_end : &out->merges_end) = stop;
                if (!buffer_append(&out->rest, json + copied, i - copied) ||
                    !buffer_append_text(&out->rest, vocab ? "{}" : "[]"))
                    goto no_memory;
                i = copied = stop;
                continue;
            }
            if (depth == 1) in_model = is_key(json, key, key_end, "model");
            depth++;
        } else if ((c == '}' || c == ']') && depth > 0) {
            depth--;
        }
        i++;
    }
    if (buffer_append(&out->rest, json + copied, n - copied)) return true;
no_memory:
    buffer_free(&out->rest);
    return error_set(err, "tokenizer.json: out of memory");
}

struct cursor {
    const char *json;
    size_t at, end;
    const char *what; // for messages
};

struct text {
    const char *data;
    size_t n;
};

static bool fail(const struct cursor *c, const char *expected, struct error *err) {
    if (c->at >= c->end) return error_set(err, "%s: expected %s, found the end of the text", c->what, expected);
    unsigned char found = (unsigned char)c->json[c->at];
    if (found < 0x20 || found >= 0x7F)
        return error_set(err, "%s: byte %zu: expected %s, found the byte 0x%02X", c->what, c->at, expected, found);
    return error_set(err, "%s: byte %zu: expected %s, found '%c'", c->what, c->at, expected, found);
}

static char peek(struct cursor *c) { // the next byte behind white space; 0 at the end
    while (c->at < c->end) {
        char b = c->json[c->at];
        if (b != ' ' && b != '\n' && b != '\t' && b != '\r') return b;
        c->at++;
    }
    return 0;
}

static bool take(struct cursor *c, char wanted) {
    if (peek(c) != wanted || c->at >= c->end) return false;
    c->at++;
    return true;
}

static bool read_hex(struct cursor *c, uint32_t *out) {
    *out = 0;
    if (c->end - c->at < 4) return false;
    for (int i = 0; i < 4; i++) {
        char b = c->json[c->at++];
        int digit = b >= '0' && b <= '9'   ? b - '0'
                    : b >= 'a' && b <= 'f' ? b - 'a' + 10
                    : b >= 'A' && b <= 'F' ? b - 'A' + 10
                                           : -1;
        if (digit < 0) return false;
        *out = *out << 4 | (uint32_t)digit;
    }
    return true;
}

// An escape, behind its backslash.
static bool read_escape(struct cursor *c, struct buffer *out, struct error *err) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    char b = c->at < c->end ? c->json[c->at] : 0;
    const char *known = b ? strchr(names, b) : NULL;
    uint32_t code, low;
    char bytes[4];
    if (known) {
        c->at++;
        return buffer_append_byte(out, values[known - names]) || error_set(err, "%s: out of memory", c->what);
    }
    if (b != 'u') return fail(c, "an escape", err);
    c->at++;
    if (!read_hex(c, &code)) return fail(c, "four hexadecimal digits", err);
    if (code >= 0xD800 && code < 0xDC00) {
        if (c->end - c->at < 6 || c->json[c->at] != '\\' || c->json[c->at + 1] != 'u')
            return fail(c, "the other half of a surrogate pair", err);
        c->at += 2;
        if (!read_hex(c, &low) || low < 0xDC00 || low > 0xDFFF)
            return fail(c, "the other half of a surrogate pair", err);
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code == 0 || (code >= 0xDC00 && code < 0xE000)) return fail(c, "an escape of a character before this", err);
    return buffer_append(out, bytes, unicode_encode(code, bytes)) || error_set(err, "%s: out of memory", c->what);
}

// A string. It points into the file, or into `decoded` where it has escapes.
static bool read_string(struct cursor *c, struct buffer *decoded, struct text *out, struct error *err) {
    if (!take(c, '"')) return fail(c, "a string", err);
    size_t start = c->at;
    bool escaped = false;
    buffer_clear(decoded);
    while (c->at < c->end && c->json[c->at] != '"') {
        unsigned char b = (unsigned char)c->json[c->at];
        if (b == '\\') {
            if (!buffer_append(decoded, c->json + start, c->at - start))
                return error_set(err, "%s: out of memory", c->what);
            escaped = true;
            c->at++;
            if (!read_escape(c, decoded, err)) return false;
            start = c->at;
            continue;
        }
        uint32_t code = b;
        size_t len = b < 0x80 ? 1 : unicode_decode(c->json + c->at, c->end - c->at, &code);
        if (code < 0x20 || code >= UNICODE_INVALID) return fail(c, "text in UTF-8 without control characters", err);
        c->at += len;
    }
    if (c->at >= c->end) return fail(c, "the end of a string", err);
    *out = (struct text){c->json + start, c->at - start};
    if (escaped) {
        if (!buffer_append(decoded, out->data, out->n)) return error_set(err, "%s: out of memory", c->what);
        *out = (struct text){buffer_text(decoded), decoded->len};
    }
    c->at++;
    return true;
}

static bool read_integer(struct cursor *c, int64_t *out, struct error *err) {
    bool negative = peek(c) == '-';
    if (negative) c->at++;
    size_t start = c->at;
    int64_t value = 0;
    while (c->at < c->end && c->json[c->at] >= '0' && c->json[c->at] <= '9') {
        int digit = c->json[c->at] - '0';
        if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, digit, &value))
            return fail(c, "an integer that fits in 64 bits", err);
        c->at++;
    }
    char b = c->at < c->end ? c->json[c->at] : 0;
    if (c->at == start || (c->json[start] == '0' && c->at - start > 1) || b == '.' || b == 'e' || b == 'E')
        return fail(c, "an integer", err);
    *out = negative ? -value : value;
    return true;
}

bool tokenizer_read_vocab(const struct tokenizer_outline *o, struct bpe *bpe, struct error *err) {
    struct cursor c = {o->json, o->vocab, o->vocab_end, "tokenizer.json: vocab"};
    struct buffer decoded = {0};
    struct text token;
    int64_t id = -1;
    bool ok = false;
    if (o->vocab_end == 0) return error_set(err, "tokenizer.json: model: \"vocab\": expected an object");
    take(&c, '{');
    if (peek(&c) != '}') {
        do {
            if (!read_string(&c, &decoded, &token, err)) goto done;
            if (!take(&c, ':')) {
                fail(&c, "':'", err);
                goto done;
            }
            if (!read_integer(&c, &id, err)) goto done;
            if (!bpe_add_token(bpe, id, token.data, token.n, err)) {
                error_prefix(err, "%s: ", c.what);
                goto done;
            }
        } while (take(&c, ','));
    }
    ok = take(&c, '}') || fail(&c, "',' or '}'", err);
done:
    buffer_free(&decoded);
    return ok;
}

// A merge is "left right" or ["left", "right"].
static bool read_merge(struct cursor *c, struct buffer decoded[2], struct bpe *bpe, struct error *err) {
    struct text left, right;
    if (take(c, '[')) {
        if (!read_string(c, &decoded[0], &left, err)) return false;
        if (!take(c, ',')) return fail(c, "',' and the other side of a merge", err);
        if (!read_string(c, &decoded[1], &right, err)) return false;
        if (!take(c, ']')) return fail(c, "']' behind two sides of a merge", err);
    } else {
        if (!read_string(c, &decoded[0], &left, err)) return false;
        const char *space = left.n ? memchr(left.data, ' ', left.n) : NULL;
        size_t n = space ? (size_t)(space - left.data) : 0;
        if (!space || memchr(space + 1, ' ', left.n - n - 1))
            return error_set(err, "%s: merge %zu, \"%.*s\", is no pair with one space between", c->what,
                             bpe_n_merges(bpe), left.n < 60 ? (int)left.n : 60, left.data);
        right = (struct text){space + 1, left.n - n - 1};
        left.n = n;
    }
    return bpe_add_merge(bpe, left.data, left.n, right.data, right.n, err) || error_prefix(err, "%s: ", c->what);
}

bool tokenizer_read_merges(const struct tokenizer_outline *o, struct bpe *bpe, struct error *err) {
    struct cursor c = {o->json, o->merges, o->merges_end, "tokenizer.json: merges"};
    struct buffer decoded[2] = {{0}, {0}};
    bool ok = false;
    if (o->merges_end == 0) return error_set(err, "tokenizer.json: model: \"merges\": expected an array");
    take(&c, '[');
    if (peek(&c) != ']') {
        do {
            if (!read_merge(&c, decoded, bpe, err)) goto done;
        } while (take(&c, ','));
    }
    ok = take(&c, ']') || fail(&c, "',' or ']'", err);
done:
    buffer_free(&decoded[0]);
    buffer_free(&decoded[1]);
    return ok;
}
