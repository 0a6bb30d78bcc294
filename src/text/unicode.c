// unicode.c: UTF-8 and canonical composition (Unicode Standard Annex 15; Hangul by the arithmetic of chapter 3.12). The
// data is in unicode_tables.c.
#include "text/unicode.h"

#include "base/size.h"

#include <stdlib.h>

size_t utf8_decode(const char *text, size_t n, uint32_t *out) {
    const unsigned char *p = (const unsigned char *)text;
    *out = UNICODE_INVALID;
    if (p[0] < 0x80) {
        *out = p[0];
        return 1;
    }
    size_t len = p[0] < 0xC2 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : p[0] < 0xF5 ? 4 : 0;
    if (len == 0 || len > n) return 1;
    uint32_t c = p[0] & (0x7Fu >> len);
    for (size_t i = 1; i < len; i++) {
        if ((p[i] & 0xC0) != 0x80) return 1;
        c = c << 6 | (p[i] & 0x3Fu);
    }
    bool overlong = (len == 3 && c < 0x800) || (len == 4 && c < 0x10000);
    if (overlong || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) return 1;
    *out = c;
    return len;
}

bool utf8_append(struct buffer *out, uint32_t c) {
    char b[4];
    size_t n = 0;
    if (c < 0x80) b[n++] = (char)c;
    else {
        if (c < 0x800) b[n++] = (char)(0xC0 | c >> 6);
        else {
            if (c < 0x10000) b[n++] = (char)(0xE0 | c >> 12);
            else {
                b[n++] = (char)(0xF0 | c >> 18);
                b[n++] = (char)(0x80 | (c >> 12 & 0x3F));
            }
            b[n++] = (char)(0x80 | (c >> 6 & 0x3F));
        }
        b[n++] = (char)(0x80 | (c & 0x3F));
    }
    return buffer_append(out, b, n);
}

static unsigned combining(uint32_t c) {
    return unicode_combining_blocks[unicode_combining_index[c >> 8] * 256u + (c & 255u)];
}

// Hangul syllables are LV or LVT, computed, not listed.
enum { S_BASE = 0xAC00, L_BASE = 0x1100, V_BASE = 0x1161, T_BASE = 0x11A7, N_L = 19, N_V = 21, N_T = 28 };

static const struct unicode_decomposition *find_decomposition(uint32_t c) {
    size_t lo = 0, hi = unicode_n_decompositions;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (unicode_decompositions[mid].from < c) lo = mid + 1;
        else hi = mid;
    }
    return lo < unicode_n_decompositions && unicode_decompositions[lo].from == c ? &unicode_decompositions[lo] : NULL;
}

// The composite of two characters; 0: none.
static uint32_t compose(uint32_t a, uint32_t b) {
    if (a >= L_BASE && a < L_BASE + N_L && b >= V_BASE && b < V_BASE + N_V)
        return S_BASE + ((a - L_BASE) * N_V + (b - V_BASE)) * N_T;
    if (a >= S_BASE && a < S_BASE + N_L * N_V * N_T && (a - S_BASE) % N_T == 0 && b > T_BASE && b < T_BASE + N_T)
        return a + (b - T_BASE);
    size_t lo = 0, hi = unicode_n_compositions;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        const struct unicode_composition *p = &unicode_compositions[mid];
        if (p->first < a || (p->first == a && p->second < b)) lo = mid + 1;
        else hi = mid;
    }
    if (lo == unicode_n_compositions) return 0;
    const struct unicode_composition *p = &unicode_compositions[lo];
    return p->first == a && p->second == b ? p->composed : 0;
}

// A run of characters being decomposed, ordered and composed.
struct run {
    struct mark {
        uint32_t c;
        uint32_t ccc;
        size_t order;
    } * marks;
    size_t n, cap;
};

static bool run_push(struct run *r, uint32_t c) {
    if (r->n == r->cap) {
        size_t cap = r->cap ? r->cap * 2 : 64;
        struct mark *grown = size_realloc(r->marks, cap, sizeof *grown);
        if (!grown) return false;
        r->marks = grown;
        r->cap = cap;
    }
    r->marks[r->n] = (struct mark){.c = c, .ccc = combining(c), .order = r->n};
    r->n++;
    return true;
}

static bool run_decompose(struct run *r, uint32_t c) {
    if (c >= S_BASE && c < S_BASE + N_L * N_V * N_T) {
        uint32_t s = c - S_BASE;
        if (!run_push(r, L_BASE + s / (N_V * N_T)) || !run_push(r, V_BASE + s % (N_V * N_T) / N_T)) return false;
        return s % N_T == 0 || run_push(r, T_BASE + s % N_T);
    }
    const struct unicode_decomposition *d = c < 0xC0 ? NULL : find_decomposition(c);
    if (!d) return run_push(r, c);
    for (uint32_t i = 0; i < d->n; i++)
        if (!run_push(r, unicode_decomposed[d->at + i])) return false;
    return true;
}

static int compare_marks(const void *a, const void *b) {
    const struct mark *x = a, *y = b;
    if (x->ccc != y->ccc) return x->ccc < y->ccc ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

// Canonical order: every stretch of non-starters by class, stable.
static void run_order(struct run *r) {
    for (size_t i = 0; i < r->n;) {
        size_t j = i;
        bool sorted = true;
        while (j < r->n && r->marks[j].ccc != 0) {
            if (j > i && r->marks[j - 1].ccc > r->marks[j].ccc) sorted = false;
            j++;
        }
        if (!sorted) qsort(r->marks + i, j - i, sizeof *r->marks, compare_marks);
        i = j + 1;
    }
}

// Composes in place: a mark joins the last starter unless one of at least its class stands between.
static void run_compose(struct run *r) {
    size_t kept = 0, starter = SIZE_MAX;
    unsigned last = 0;
    for (size_t i = 0; i < r->n; i++) {
        struct mark m = r->marks[i];
        if (starter != SIZE_MAX && (kept == starter + 1 || last < m.ccc)) {
            uint32_t c = compose(r->marks[starter].c, m.c);
            if (c) {
                r->marks[starter].c = c;
                continue;
            }
        }
        if (m.ccc == 0) starter = kept;
        last = m.ccc;
        r->marks[kept++] = m;
    }
    r->n = kept;
}

static bool run_flush(struct run *r, struct buffer *out) {
    run_order(r);
    run_compose(r);
    for (size_t i = 0; i < r->n; i++)
        if (!utf8_append(out, r->marks[i].c)) return false;
    r->n = 0;
    return true;
}

// Below U+0300 nothing combines with what stands before it, and everything there is its own NFC.
bool unicode_nfc(const char *text, size_t n, struct buffer *out) {
    struct run run = {0};
    bool ok = buffer_reserve(out, n);
    size_t plain = 0; // text[plain .. i) is copied as it is
    for (size_t i = 0; ok && i < n;) {
        uint32_t c;
        size_t len = utf8_decode(text + i, n - i, &c);
        if (c < 0x300 || c == UNICODE_INVALID) {
            i += len;
            continue;
        }
        // The run begins at the character before and ends before the next one that nothing can change.
        size_t begin = i;
        if (begin > plain) {
            begin--;
            while (begin > plain && ((unsigned char)text[begin] & 0xC0) == 0x80) begin--;
        }
        ok = buffer_append(out, text + plain, begin - plain);
        uint32_t before = UNICODE_INVALID;
        if (begin < i && utf8_decode(text + begin, i - begin, &before) != i - begin) before = UNICODE_INVALID;
        if (ok && begin < i)
            ok = before == UNICODE_INVALID ? buffer_append(out, text + begin, i - begin) : run_decompose(&run, before);
        while (ok && c >= 0x300 && c != UNICODE_INVALID) {
            ok = run_decompose(&run, c);
            i += len;
            if (i == n) break;
            len = utf8_decode(text + i, n - i, &c);
        }
        ok = ok && run_flush(&run, out);
        plain = i;
    }
    ok = ok && buffer_append(out, text + plain, n - plain);
    free(run.marks);
    return ok;
}
