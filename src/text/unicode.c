// unicode.c: UTF-8 and NFC over the generated tables. It knows nothing of tokens.
#include "text/unicode.h"

#include "base/size.h"

#include <stdlib.h>
#include <string.h>

// Hangul arithmetic (source: The Unicode Standard, section 3.12).
enum {
    HANGUL_S = 0xAC00,
    HANGUL_L = 0x1100,
    HANGUL_V = 0x1161,
    HANGUL_T = 0x11A7,
    HANGUL_N_L = 19,
    HANGUL_N_V = 21,
    HANGUL_N_T = 28,
    HANGUL_N_S = HANGUL_N_L * HANGUL_N_V * HANGUL_N_T
};

size_t unicode_decode(const char *text, size_t n, uint32_t *c) {
    const unsigned char *s = (const unsigned char *)text;
    unsigned lead = s[0];
    if (lead < 0x80) {
        *c = lead;
        return 1;
    }
    *c = UNICODE_INVALID + lead;
    if (lead < 0xC2 || lead > 0xF4) return 1;
    size_t len = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    if (n < len) return 1;
    // The second byte's range excludes overlong forms, surrogates and what lies beyond U+10FFFF.
    unsigned low = lead == 0xE0   ? 0xA0
                   : lead == 0xF0 ? 0x90
                                  : 0x80,
             high = lead == 0xED   ? 0x9F
                    : lead == 0xF4 ? 0x8F
                                   : 0xBF;
    if (s[1] < low || s[1] > high) return 1;
    uint32_t value = lead & (0x7Fu >> len);
    for (size_t i = 1; i < len; i++) {
        if ((s[i] & 0xC0) != 0x80) return 1;
        value = value << 6 | (s[i] & 0x3Fu);
    }
    *c = value;
    return len;
}

size_t unicode_decode_last(const char *text, size_t n, uint32_t *c) {
    for (size_t back = n < 4 ? n : 4; back > 1; back--) {
        if (unicode_decode(text + n - back, back, c) == back) return back;
    }
    return unicode_decode(text + n - 1, 1, c);
}

size_t unicode_encode(uint32_t c, char out[4]) {
    if (c >= UNICODE_INVALID) {
        out[0] = (char)(unsigned char)(c - UNICODE_INVALID);
        return 1;
    }
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (char)(0xC0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3F));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xE0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3F));
        out[2] = (char)(0x80 | (c & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3F));
    out[2] = (char)(0x80 | (c >> 6 & 0x3F));
    out[3] = (char)(0x80 | (c & 0x3F));
    return 4;
}

// One character between decomposition and composition.
struct mark {
    uint32_t c;
    uint32_t combining_class;
};
struct marks {
    struct mark *items;
    size_t n, cap;
};

static uint32_t combining_class(uint32_t c) {
    size_t low = 0, high = unicode_n_combining;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        if (unicode_combining[mid].c == c) return unicode_combining[mid].combining_class;
        if (unicode_combining[mid].c < c) low = mid + 1;
        else high = mid;
    }
    return 0;
}

static bool marks_add(struct marks *m, uint32_t c) {
    if (m->n == m->cap) {
        size_t cap;
        if (!size_mul(m->cap ? m->cap : 32, 2, &cap)) return false;
        struct mark *items = size_realloc(m->items, cap, sizeof *items);
        if (!items) return false;
        m->items = items;
        m->cap = cap;
    }
    m->items[m->n++] = (struct mark){c, combining_class(c)};
    return true;
}

static bool decompose(struct marks *m, uint32_t c) {
    if (c - HANGUL_S < HANGUL_N_S) {
        uint32_t s = c - HANGUL_S, t = s % HANGUL_N_T;
        return marks_add(m, HANGUL_L + s / (HANGUL_N_V * HANGUL_N_T)) &&
               marks_add(m, HANGUL_V + s / HANGUL_N_T % HANGUL_N_V) && (t == 0 || marks_add(m, HANGUL_T + t));
    }
    size_t low = 0, high = unicode_n_decompositions;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        const struct unicode_decomposition *d = &unicode_decompositions[mid];
        if (d->c == c) {
            for (size_t i = 0; i < 4 && d->to[i]; i++) {
                if (!marks_add(m, d->to[i])) return false;
            }
            return true;
        }
        if (d->c < c) low = mid + 1;
        else high = mid;
    }
    return marks_add(m, c);
}

// The primary composite of two characters, 0 when there is none.
static uint32_t compose(uint32_t first, uint32_t second) {
    if (first - HANGUL_L < HANGUL_N_L && second - HANGUL_V < HANGUL_N_V)
        return HANGUL_S + ((first - HANGUL_L) * HANGUL_N_V + (second - HANGUL_V)) * HANGUL_N_T;
    if (first - HANGUL_S < HANGUL_N_S && (first - HANGUL_S) % HANGUL_N_T == 0 && second > HANGUL_T &&
        second - HANGUL_T < HANGUL_N_T)
        return first + (second - HANGUL_T);
    size_t low = 0, high = unicode_n_compositions;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        const struct unicode_composition *u = &unicode_compositions[mid];
        if (u->first == first && u->second == second) return u->c;
        if (u->first < first || (u->first == first && u->second < second)) low = mid + 1;
        else high = mid;
    }
    return 0;
}

// Sorts one run of marks by class, stably: by insertion where it is short, else by counting.
static bool sort_run(struct mark *run, size_t n) {
    if (n <= 32) {
        for (size_t i = 1; i < n; i++) {
            struct mark m = run[i];
            size_t j = i;
            for (; j > 0 && run[j - 1].combining_class > m.combining_class; j--) run[j] = run[j - 1];
            run[j] = m;
        }
        return true;
    }
    size_t place[257] = {0};
    struct mark *sorted = size_alloc(n, sizeof *sorted);
    if (!sorted) return false;
    for (size_t i = 0; i < n; i++) place[run[i].combining_class + 1]++;
    for (size_t k = 1; k < 257; k++) place[k] += place[k - 1];
    for (size_t i = 0; i < n; i++) sorted[place[run[i].combining_class]++] = run[i];
    memcpy(run, sorted, n * sizeof *run);
    free(sorted);
    return true;
}

static bool sort_marks(struct marks *m) {
    for (size_t i = 0; i < m->n;) {
        if (m->items[i].combining_class == 0) {
            i++;
            continue;
        }
        size_t end = i + 1;
        while (end < m->n && m->items[end].combining_class != 0) end++;
        if (!sort_run(m->items + i, end - i)) return false;
        i = end;
    }
    return true;
}

// Canonical composition (source: The Unicode Standard, definition D117): each character joins the last starter unless
// a kept character of the same or a higher class, or a starter, stands between them.
static void compose_marks(struct marks *m) {
    size_t kept = 0, starter = SIZE_MAX;
    uint32_t last_class = 0;
    for (size_t i = 0; i < m->n; i++) {
        struct mark mark = m->items[i];
        if (starter != SIZE_MAX && (starter + 1 == kept || last_class < mark.combining_class)) {
            uint32_t joined = compose(m->items[starter].c, mark.c);
            if (joined) {
                m->items[starter].c = joined;
                continue;
            }
        }
        if (mark.combining_class == 0) starter = kept;
        last_class = mark.combining_class;
        m->items[kept++] = mark;
    }
    m->n = kept;
}

static bool is_safe(uint32_t c) {
    return !(unicode_classes(c) & UNICODE_NFC_UNSAFE);
}

size_t unicode_nfc_prefix(const char *text, size_t n) {
    size_t i = 0, previous = 0;
    while (i < n) {
        uint32_t c;
        size_t len = unicode_decode(text + i, n - i, &c);
        if (!is_safe(c)) return previous; // the character before it may be changed too
        previous = i;
        i += len;
    }
    return n;
}

bool unicode_nfc(const char *text, size_t n, struct buffer *out) {
    struct marks m = {0};
    bool ok = false;
    size_t i = 0;
    while (i < n) {
        size_t clean = unicode_nfc_prefix(text + i, n - i);
        if (!buffer_append(out, text + i, clean)) goto done;
        i += clean;
        if (i == n) break;
        // A segment: one character, and all that follow up to the next that stands on its own.
        m.n = 0;
        uint32_t c;
        do {
            i += unicode_decode(text + i, n - i, &c);
            if (!decompose(&m, c)) goto done;
            if (i < n) unicode_decode(text + i, n - i, &c);
        } while (i < n && !is_safe(c));
        if (!sort_marks(&m)) goto done;
        compose_marks(&m);
        for (size_t k = 0; k < m.n; k++) {
            char bytes[4];
            if (!buffer_append(out, bytes, unicode_encode(m.items[k].c, bytes))) goto done;
        }
    }
    ok = true;
done:
    free(m.items);
    return ok;
}
