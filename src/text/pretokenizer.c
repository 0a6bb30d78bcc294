// pretokenizer.c: the scanners. None looks behind its own start, and each reads a run of white space at most three
// times, so that all are linear. An invalid byte counts as a character that is no letter, number or space.
#include "text/pretokenizer.h"

#include "text/unicode.h"

#include <string.h>

static const char qwen2_regex[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+"
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char llama3_regex[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?"
                                   "[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char gpt2_regex[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

bool pretokenizer_recognise(const char *regex, size_t n, enum pretokenizer_step *out) {
    static const struct {
        const char *text;
        size_t n;
        enum pretokenizer_step step;
    } known[] = {{qwen2_regex, sizeof qwen2_regex - 1, PRETOKENIZER_QWEN2},
                 {llama3_regex, sizeof llama3_regex - 1, PRETOKENIZER_LLAMA3},
                 {gpt2_regex, sizeof gpt2_regex - 1, PRETOKENIZER_GPT2}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (known[i].n == n && memcmp(known[i].text, regex, n) == 0) {
            *out = known[i].step;
            return true;
        }
    }
    return false;
}

struct character {
    uint32_t c;
    unsigned class; // enum unicode_class_bit
    size_t len;     // 0: at the end
};

static struct character look(const char *text, size_t n, size_t at) {
    struct character ch = {0};
    if (at >= n) return ch;
    ch.len = utf8_decode(text + at, n - at, &ch.c);
    ch.class = unicode_class(ch.c);
    return ch;
}

// Skips characters whose class meets `mask`, or none of it; at most `max`. Returns where it stopped.
static size_t skip(const char *text, size_t n, size_t at, unsigned mask, bool wanted, size_t max) {
    for (; max > 0; max--) {
        struct character ch = look(text, n, at);
        if (ch.len == 0 || ((ch.class & mask) != 0) != wanted) break;
        at += ch.len;
    }
    return at;
}

// 's 't 're 've 'm 'll 'd; with `fold` in any case (U+017F folds to s). 0: none.
static size_t contraction(const char *text, size_t n, bool fold) {
    if (n < 2 || text[0] != '\'') return 0;
    char a = text[1], b = n > 2 ? text[2] : '\0';
    if (fold) {
        if (a >= 'A' && a <= 'Z') a = (char)(a + 32);
        if (b >= 'A' && b <= 'Z') b = (char)(b + 32);
        if (n > 2 && memcmp(text + 1, "\xC5\xBF", 2) == 0) return 3;
    }
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    return 0;
}

// White space: all of it at the end of the text; else all but the last character, which may belong to what follows.
static size_t space_run(const char *text, size_t n) {
    size_t at = 0, last = 0;
    for (struct character ch; (ch = look(text, n, at)).len && ch.class & UNICODE_SPACE; at += ch.len) last = at;
    return at == n || last == 0 ? at : last;
}

enum { LETTER_OR_NUMBER = UNICODE_LETTER | UNICODE_NUMBER, ANY = LETTER_OR_NUMBER | UNICODE_SPACE };

static size_t next_qwen2(const char *text, size_t n, size_t max_digits) {
    size_t len = contraction(text, n, true);
    if (len) return len;
    struct character ch = look(text, n, 0);
    if (ch.class & UNICODE_LETTER) return skip(text, n, 0, UNICODE_LETTER, true, SIZE_MAX);
    bool newline = ch.c == '\r' || ch.c == '\n';
    if (!newline && !(ch.class & UNICODE_NUMBER)) {
        len = skip(text, n, ch.len, UNICODE_LETTER, true, SIZE_MAX);
        if (len > ch.len) return len;
    }
    if (ch.class & UNICODE_NUMBER) return skip(text, n, 0, UNICODE_NUMBER, true, max_digits);
    size_t from = ch.c == ' ' ? 1 : 0;
    len = skip(text, n, from, ANY, false, SIZE_MAX);
    if (len > from) {
        while (len < n && (text[len] == '\r' || text[len] == '\n')) len++;
        return len;
    }
    size_t after_newline = 0, at = 0;
    for (; (ch = look(text, n, at)).len && ch.class & UNICODE_SPACE; at += ch.len)
        if (ch.c == '\r' || ch.c == '\n') after_newline = at + 1;
    return after_newline ? after_newline : space_run(text, n);
}

static size_t next_gpt2(const char *text, size_t n) {
    size_t len = contraction(text, n, false);
    if (len) return len;
    size_t from = text[0] == ' ' ? 1 : 0;
    struct character ch = look(text, n, from);
    if (ch.class & UNICODE_LETTER) return skip(text, n, from, UNICODE_LETTER, true, SIZE_MAX);
    if (ch.class & UNICODE_NUMBER) return skip(text, n, from, UNICODE_NUMBER, true, SIZE_MAX);
    if (ch.len && !(ch.class & UNICODE_SPACE)) return skip(text, n, from, ANY, false, SIZE_MAX);
    return space_run(text, n);
}

static size_t next_piece(enum pretokenizer_step step, const char *text, size_t n) {
    switch (step) {
    case PRETOKENIZER_QWEN2: return next_qwen2(text, n, 1);
    case PRETOKENIZER_LLAMA3: return next_qwen2(text, n, 3);
    case PRETOKENIZER_GPT2: return next_gpt2(text, n);
    case PRETOKENIZER_DIGIT_EACH:
    case PRETOKENIZER_DIGIT_RUN: break;
    }
    struct character ch = look(text, n, 0);
    bool digit = (ch.class & UNICODE_DIGIT) != 0;
    if (digit && step == PRETOKENIZER_DIGIT_EACH) return ch.len;
    return skip(text, n, 0, UNICODE_DIGIT, digit, SIZE_MAX);
}

static bool run_step(const struct pretokenizer *p, int step, const char *text, size_t n, pretokenizer_word *word,
                     void *user) {
    if (step == p->n_steps) return n == 0 || word(user, text, n);
    for (size_t at = 0; at < n;) {
        size_t len = next_piece(p->steps[step], text + at, n - at);
        if (!run_step(p, step + 1, text + at, len, word, user)) return false;
        at += len;
    }
    return true;
}

bool pretokenizer_run(const struct pretokenizer *p, const char *text, size_t n, pretokenizer_word *word, void *user) {
    return run_step(p, 0, text, n, word, user);
}
