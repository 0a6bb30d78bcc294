// pretokenizer.c: the stages of a pre-tokeniser: hand-written scanners, and PCRE2 for patterns that have none.
#include "text/pretokenizer.h"

#include "text/unicode.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define QWEN2_TAIL "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

static const struct {
    const char *pattern;
    enum pretokenizer_style style;
} known_patterns[] = {
    {CONTRACTIONS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" QWEN2_TAIL, PRETOKENIZER_QWEN2},
    {CONTRACTIONS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}" QWEN2_TAIL, PRETOKENIZER_LLAMA3},
    {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", PRETOKENIZER_GPT2},
};

struct stage {
    enum pretokenizer_style style;
    pcre2_code *code; // NULL: scanned by hand
    char *pattern;    // for messages
};

struct pretokenizer {
    struct stage stages[PRETOKENIZER_MAX_STAGES];
    size_t n_stages;
    pcre2_match_context *limits;
};

enum { WORDLIKE = UNICODE_LETTER | UNICODE_NUMBER, KIND = UNICODE_LETTER | UNICODE_NUMBER | UNICODE_SPACE };

// How far the characters go on from `at` whose classes, masked, are `value`.
static size_t run_end(const char *text, size_t n, size_t at, unsigned mask, unsigned value) {
    while (at < n) {
        uint32_t c;
        size_t len = unicode_decode(text + at, n - at, &c);
        if ((unicode_classes(c) & mask) != value) break;
        at += len;
    }
    return at;
}

// 's 't 'm 'd 're 've 'll at text[0]; 0 when there is none. Without regard to case, the long s counts as s.
static size_t contraction(const char *text, size_t n, bool any_case) {
    if (n < 2 || text[0] != '\'') return 0;
    char fold = any_case ? 0x20 : 0, a = (char)(text[1] | fold);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if (n < 3) return 0;
    char b = (char)(text[2] | fold);
    if ((a == 'r' || a == 'v') && b == 'e') return 3;
    if (a == 'l' && b == 'l') return 3;
    if (any_case && memcmp(text + 1, "\xC5\xBF", 2) == 0) return 3;
    return 0;
}

// \s*[\r\n]+ where `newlines`, else \s+(?!\S)|\s+, at a space: up to the last newline of the run; else the run but for
// its last character, which goes with the word behind it, unless the run is one character or the end of the text.
static size_t scan_spaces(const char *text, size_t n, bool newlines) {
    size_t at = 0, last = 0, after_newline = 0;
    while (at < n) {
        uint32_t c;
        size_t len = unicode_decode(text + at, n - at, &c);
        if (!(unicode_classes(c) & UNICODE_SPACE)) break;
        last = at;
        at += len;
        if (c == '\r' || c == '\n') after_newline = at;
    }
    if (newlines && after_newline) return after_newline;
    return at == n || last == 0 ? at : last;
}

// The patterns of Qwen2 and Llama 3, which differ in how many numbers stay together.
static size_t scan_qwen2(const char *text, size_t n, int max_numbers) {
    size_t len = contraction(text, n, true);
    if (len) return len;
    uint32_t c, next = 0;
    len = unicode_decode(text, n, &c);
    unsigned k = unicode_classes(c), next_k = UNICODE_SPACE; // the end of the text begins no word
    if (k & UNICODE_LETTER) return run_end(text, n, len, UNICODE_LETTER, UNICODE_LETTER);
    if (k & UNICODE_NUMBER) {
        for (int i = 1; i < max_numbers && len < n; i++) {
            size_t more = unicode_decode(text + len, n - len, &next);
            if (!(unicode_classes(next) & UNICODE_NUMBER)) break;
            len += more;
        }
        return len;
    }
    if (len < n) {
        unicode_decode(text + len, n - len, &next);
        next_k = unicode_classes(next);
    }
    if ((next_k & UNICODE_LETTER) && c != '\r' && c != '\n')
        return run_end(text, n, len, UNICODE_LETTER, UNICODE_LETTER);
    if (!(k & UNICODE_SPACE) || (c == ' ' && !(next_k & KIND))) {
        len = run_end(text, n, len, KIND, 0);
        while (len < n && (text[len] == '\r' || text[len] == '\n')) len++;
        return len;
    }
    return scan_spaces(text, n, true);
}

static size_t scan_gpt2(const char *text, size_t n) {
    size_t len = contraction(text, n, false);
    if (len) return len;
    uint32_t c;
    len = unicode_decode(text, n, &c);
    unsigned k = unicode_classes(c) & KIND;
    if (c == ' ' && len < n) {
        len += unicode_decode(text + len, n - len, &c);
        k = unicode_classes(c) & KIND;
    }
    if (k & UNICODE_SPACE) return scan_spaces(text, n, false);
    return run_end(text, n, len, KIND, k);
}

static size_t scan_digits(const char *text, size_t n, bool contiguous) {
    uint32_t c;
    size_t len = unicode_decode(text, n, &c);
    unsigned k = unicode_classes(c) & UNICODE_DIGIT;
    return k && !contiguous ? len : run_end(text, n, len, UNICODE_DIGIT, k);
}

static size_t scan(enum pretokenizer_style style, const char *text, size_t n) {
    switch (style) {
    case PRETOKENIZER_QWEN2: return scan_qwen2(text, n, 1);
    case PRETOKENIZER_LLAMA3: return scan_qwen2(text, n, 3);
    case PRETOKENIZER_GPT2: return scan_gpt2(text, n);
    case PRETOKENIZER_DIGITS: return scan_digits(text, n, false);
    case PRETOKENIZER_DIGITS_CONTIGUOUS: return scan_digits(text, n, true);
    }
    return n;
}

struct pretokenizer *pretokenizer_create(void) {
    struct pretokenizer *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->limits = pcre2_match_context_create(NULL);
    if (!p->limits) {
        free(p);
        return NULL;
    }
    // A hostile pattern ends in an error, not in minutes of backtracking. The interpreter counts depth and heap (KiB).
    pcre2_set_match_limit(p->limits, 10000000);
    pcre2_set_depth_limit(p->limits, 100000);
    pcre2_set_heap_limit(p->limits, 256 * 1024);
    return p;
}

void pretokenizer_free(struct pretokenizer *p) {
    if (!p) return;
    for (size_t i = 0; i < p->n_stages; i++) {
        pcre2_code_free(p->stages[i].code);
        free(p->stages[i].pattern);
    }
    pcre2_match_context_free(p->limits);
    free(p);
}

static bool check_room(const struct pretokenizer *p, struct error *err) {
    if (p->n_stages < PRETOKENIZER_MAX_STAGES) return true;
    return error_set(err, "pre_tokenizer: more than %d stages", PRETOKENIZER_MAX_STAGES);
}

bool pretokenizer_add(struct pretokenizer *p, enum pretokenizer_style style, struct error *err) {
    if (!check_room(p, err)) return false;
    p->stages[p->n_stages++] = (struct stage){.style = style};
    return true;
}

bool pretokenizer_add_pattern(struct pretokenizer *p, const char *pattern, size_t n, struct error *err) {
    for (size_t i = 0; i < sizeof known_patterns / sizeof *known_patterns; i++) {
        if (strlen(known_patterns[i].pattern) == n && memcmp(known_patterns[i].pattern, pattern, n) == 0)
            return pretokenizer_add(p, known_patterns[i].style, err);
    }
    if (!check_room(p, err)) return false;
    int shown = n < 200 ? (int)n : 200;
    if (n > 10000)
        return error_set(err, "pre_tokenizer: pattern of %zu bytes, at most 10000 allowed: %.*s...", n, shown, pattern);
    struct stage stage = {.pattern = strndup(pattern, n)};
    if (!stage.pattern) return error_set(err, "pre_tokenizer: out of memory");
    int code;
    size_t offset;
    stage.code =
        pcre2_compile((PCRE2_SPTR)pattern, n, PCRE2_UTF | PCRE2_UCP | PCRE2_MATCH_INVALID_UTF | PCRE2_NEVER_BACKSLASH_C,
                      &code, &offset, NULL);
    if (!stage.code) {
        char reason[200] = "unknown";
        pcre2_get_error_message(code, (PCRE2_UCHAR *)reason, sizeof reason);
        free(stage.pattern);
        return error_set(err, "pre_tokenizer: pattern %.*s: %s at byte %zu", shown, pattern, reason, offset);
    }
    pcre2_jit_compile(stage.code, PCRE2_JIT_COMPLETE); // without JIT it is slower, not wrong
    p->stages[p->n_stages++] = stage;
    return true;
}

struct run {
    const struct pretokenizer *p;
    pretokenizer_word *word;
    void *context;
};

static bool run_stage(const struct run *run, size_t i, const char *text, size_t n, struct error *err);

static bool run_pattern(const struct run *run, size_t i, const char *text, size_t n, struct error *err) {
    const struct stage *stage = &run->p->stages[i];
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    if (!match) return error_set(err, "pre-tokeniser: out of memory");
    bool ok = false;
    size_t done = 0, at = 0;
    while (at < n) {
        int found = pcre2_match(stage->code, (PCRE2_SPTR)text, n, at, 0, match, run->p->limits);
        if (found == PCRE2_ERROR_JIT_STACKLIMIT) // the interpreter has more room
            found = pcre2_match(stage->code, (PCRE2_SPTR)text, n, at, PCRE2_NO_JIT, match, run->p->limits);
        if (found == PCRE2_ERROR_NOMATCH) break;
        if (found < 0) {
            char reason[200] = "unknown";
            pcre2_get_error_message(found, (PCRE2_UCHAR *)reason, sizeof reason);
            error_set(err, "pre-tokeniser: pattern %.200s: %s at byte %zu of the text", stage->pattern, reason, at);
            goto done;
        }
        const size_t *span = pcre2_get_ovector_pointer(match);
        if (span[1] <= span[0] || span[0] < done) { // an empty match cuts nothing
            uint32_t c;
            at = span[0] > at ? span[0] : at;
            if (at < n) at += unicode_decode(text + at, n - at, &c);
            continue;
        }
        if (span[0] > done && !run_stage(run, i + 1, text + done, span[0] - done, err)) goto done;
        if (!run_stage(run, i + 1, text + span[0], span[1] - span[0], err)) goto done;
        done = at = span[1];
    }
    ok = done == n || run_stage(run, i + 1, text + done, n - done, err);
done:
    pcre2_match_data_free(match);
    return ok;
}

static bool run_stage(const struct run *run, size_t i, const char *text, size_t n, struct error *err) {
    if (i == run->p->n_stages) return run->word(run->context, text, n, err);
    if (run->p->stages[i].code) return run_pattern(run, i, text, n, err);
    for (size_t at = 0; at < n;) {
        size_t len = scan(run->p->stages[i].style, text + at, n - at);
        if (!run_stage(run, i + 1, text + at, len, err)) return false;
        at += len;
    }
    return true;
}

bool pretokenizer_run(const struct pretokenizer *p, const char *text, size_t n, pretokenizer_word *word, void *context,
                      struct error *err) {
    if (n == 0) return true;
    return run_stage(&(struct run){p, word, context}, 0, text, n, err);
}

const char *pretokenizer_name(const struct pretokenizer *p) {
    static const char *const names[] = {"qwen2", "llama3", "gpt2", "digits", "digits"};
    const struct stage *s = p->stages;
    if (p->n_stages == 0) return "whole-text";
    if (p->n_stages == 1) return s[0].code ? "pattern" : names[s[0].style];
    bool smollm = p->n_stages == 2 && !s[0].code && !s[1].code && s[0].style == PRETOKENIZER_DIGITS &&
                  s[1].style == PRETOKENIZER_GPT2;
    return smollm ? "smollm" : "sequence";
}
