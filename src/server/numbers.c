// numbers.c: see numbers.h.
#include "server/numbers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- Decimal numbers

static bool is_zero(const struct decimal *d) {
    for (int i = 0; i < MAX_WHOLE; i++)
        if (d->whole[i]) return false;
    for (int i = 0; i < MAX_FRACTION; i++)
        if (d->fraction[i]) return false;
    return true;
}

int decimal_read(const struct pyjson *v, struct decimal *out) {
    char made[40];
    const char *text = v->text;
    *out = (struct decimal){0};
    if (v->type == PYJSON_FLOAT) { // the shortest text that reads back as this double
        for (int digits = 1; digits <= 17; digits++) {
            snprintf(made, sizeof made, "%.*e", digits - 1, v->number);
            if (strtod(made, NULL) == v->number) break;
        }
        text = made;
    }
    out->negative = *text == '-';
    if (out->negative) text++;
    const char *e = strpbrk(text, "eE");
    long exponent = e ? strtol(e + 1, NULL, 10) : 0;
    size_t n = e ? (size_t)(e - text) : strlen(text), n_whole = strcspn(text, ".eE");
    if (text[0] == 'i' || text[0] == 'n') return out->negative ? -1 : 1; // an overflow
    long place = (long)n_whole - 1 + exponent;                           // 10^place is worth of the first digit
    int lost = 0;
    for (size_t i = 0; i < n; i++) {
        if (text[i] == '.') continue;
        uint8_t digit = (uint8_t)(text[i] - '0');
        if (digit && place >= MAX_WHOLE) return out->negative ? -1 : 1;
        if (digit && place < -MAX_FRACTION) lost = 2;
        if (place >= 0 && place < MAX_WHOLE) out->whole[MAX_WHOLE - 1 - place] = digit;
        else if (place < 0 && place >= -MAX_FRACTION) out->fraction[-1 - place] = digit;
        place--;
    }
    if (is_zero(out)) out->negative = false;
    return lost;
}

static int compare_magnitudes(const struct decimal *a, const struct decimal *b) {
    int order = memcmp(a->whole, b->whole, MAX_WHOLE);
    return order ? order : memcmp(a->fraction, b->fraction, MAX_FRACTION);
}

int decimal_compare(const struct decimal *a, const struct decimal *b) {
    if (a->negative != b->negative) return a->negative ? -1 : 1;
    int order = compare_magnitudes(a, b);
    return a->negative ? -order : order;
}

void number_bound(struct number_form *f, const struct decimal *bound, bool is_low, bool excluded) {
    bool *has = is_low ? &f->has_low : &f->has_high, *strict = is_low ? &f->above : &f->below;
    struct decimal *old = is_low ? &f->low : &f->high;
    int order = *has ? decimal_compare(bound, old) : 0;
    if (*has && order != 0 && (order > 0) != is_low) return; // the old one is stricter
    *strict = *has && order == 0 ? *strict || excluded : excluded;
    *old = *bound;
    *has = true;
}

// ---- Bounded magnitudes

enum { N_DIGITS = MAX_WHOLE + MAX_FRACTION };

// Magnitudes from low to high, whose digits are tried one by one. A state knows whether the digits so far equal those
// of a bound: then the next must not fall short of it, or exceed it.
struct magnitude {
    struct grammar *g;
    bool has_high, above, below, integer;
    uint8_t low[N_DIGITS], high[N_DIGITS]; // MAX_WHOLE before the point
    int decimals;
    uint32_t next;
    uint32_t known[N_DIGITS + 1][2][2]; // plus one; 0: not made yet
    bool dead[N_DIGITS + 1][2][2];
};

static void put_digits(const struct decimal *d, uint8_t *digits) {
    memcpy(digits, d->whole, MAX_WHOLE);
    memcpy(digits + MAX_WHOLE, d->fraction, MAX_FRACTION);
}

static bool all_zero(const uint8_t *digits, int from) {
    for (int i = from; i < N_DIGITS; i++)
        if (digits[i]) return false;
    return true;
}

// May the number end in front of digit `at`? Digits that are not written are zeros.
static bool may_end(const struct magnitude *m, int at, bool at_low, bool at_high) {
    if (at_low && (!all_zero(m->low, at) || m->above)) return false;
    return !at_high || !all_zero(m->high, at) || !m->below;
}

static bool digits_from(struct magnitude *m, int at, bool at_low, bool at_high, uint32_t *out);

// Ways to go on with one digit from `least` on.
static bool digit_ways(struct magnitude *m, int at, bool at_low, bool at_high, uint8_t least, uint32_t *out) {
    struct grammar *g = m->g;
    uint8_t from = at_low && m->low[at] > least ? m->low[at] : least, to = at_high ? m->high[at] : 9;
    bool any = false;
    for (int digit = from; digit <= to;) {
        bool low = at_low && digit == m->low[at], high = at_high && digit == m->high[at];
        int last = digit; // digits between the bounds go the same way
        if (!low && !high) last = at_high ? to - 1 : to;
        uint32_t rest;
        if (digits_from(m, at + 1, low, high, &rest)) {
            uint32_t one = grammar_bytes(g, (unsigned char)('0' + digit), (unsigned char)('0' + last), rest);
            *out = any ? grammar_split(g, *out, one) : one;
            any = true;
        }
        digit = last + 1;
    }
    return any;
}

// What may stand from digit `at` on: one of the whole part, the point and a fraction, or the end. False: nothing.
static bool digits_from(struct magnitude *m, int at, bool at_low, bool at_high, uint32_t *out) {
    struct grammar *g = m->g;
    uint32_t *known = &m->known[at][at_low][at_high];
    bool *dead = &m->dead[at][at_low][at_high];
    if (*known) *out = *known - 1;
    if (*known || *dead) return !*dead;
    bool any = false, ends = at >= MAX_WHOLE && may_end(m, at, at_low, at_high);
    uint32_t digits, all = 0;
    int n_decimals = at - MAX_WHOLE;
    if (at < MAX_WHOLE) {
        any = digit_ways(m, at, at_low, at_high, 0, &all);
    } else if (at < N_DIGITS && !m->integer && n_decimals < m->decimals &&
               digit_ways(m, at, at_low, at_high, 0, &digits)) {
        all = at == MAX_WHOLE ? grammar_byte(g, '.', digits) : digits;
        any = true;
    }
    if (ends) {
        all = any ? grammar_split(g, all, m->next) : m->next;
        any = true;
    }
    *dead = !any;
    *known = any ? all + 1 : 0;
    *out = all;
    return any;
}

// All magnitudes; the whole part has no zeros in front.
static bool magnitude_compile(struct magnitude *m, uint32_t *out) {
    bool any = false, at_low = true, at_high = m->has_high;
    // A number whose first digit is digit `at` of MAX_WHOLE: those before it are zeros.
    for (int at = 0; at < MAX_WHOLE; at++) {
        uint32_t one;
        bool last = at + 1 == MAX_WHOLE;
        if (digit_ways(m, at, at_low, at_high, last ? 0 : 1, &one)) {
            *out = any ? grammar_split(m->g, *out, one) : one;
            any = true;
        }
        if (at_low && m->low[at] > 0) return any; // shorter ones are too small
        at_high = at_high && m->high[at] == 0;
    }
    return any;
}

static bool bounded(struct grammar *g, const struct number_form *f, uint32_t next, uint32_t *out) {
    bool any = false;
    for (int negative = 0; negative < 2; negative++) {
        struct magnitude m = {.g = g, .integer = f->integer, .next = next, .decimals = f->decimals};
        if (m.decimals < 0 || m.decimals > MAX_FRACTION) m.decimals = MAX_FRACTION;
        // Below zero the magnitudes' bounds are the others.
        bool has_low = negative ? f->has_high : f->has_low, has_high = negative ? f->has_low : f->has_high;
        const struct decimal *low = negative ? &f->high : &f->low, *high = negative ? &f->low : &f->high;
        bool above = negative ? f->below : f->above, below = negative ? f->above : f->below;
        bool low_here = has_low && (is_zero(low) || low->negative == (negative == 1));
        if (has_high && !is_zero(high) && high->negative != (negative == 1)) continue;
        if (negative && has_high && is_zero(high)) continue; // only -0
        m.has_high = has_high;
        m.below = below;
        if (has_high) put_digits(high, m.high);
        if (low_here) put_digits(low, m.low);
        m.above = low_here && above;
        if (negative && f->integer && all_zero(m.low, 0)) m.above = true; // no -0
        uint32_t one;
        if (!magnitude_compile(&m, &one)) continue;
        if (negative) one = grammar_byte(g, '-', one);
        *out = any ? grammar_split(g, *out, one) : one;
        any = true;
    }
    if (!any) *out = grammar_hole(g);
    return !g->full;
}

// ---- Multiples

enum { MAX_MULTIPLE = 1000, MAX_DIVIDED = 4 }; // with bounds: digits of the larger one

// Whole numbers that m divides, one digit at a time: a state is the remainder so far.
static bool multiples(struct grammar *g, const struct number_form *f, uint32_t next, uint32_t *out) {
    uint32_t m = f->multiple, holes[MAX_MULTIPLE];
    bool below_zero = !f->has_low || f->low.negative, above_zero = !f->has_high || !f->high.negative;
    for (uint32_t r = 0; r < m; r++) holes[r] = grammar_hole(g);
    for (uint32_t r = 0; r < m; r++) {
        uint32_t all = r == 0 ? next : holes[r];
        for (uint32_t d = 0; d < 10; d++) {
            uint32_t one = grammar_byte(g, (char)('0' + d), holes[(10 * r + d) % m]);
            all = d == 0 && r ? one : grammar_split(g, all, one);
        }
        grammar_fill(g, holes[r], all, all);
    }
    uint32_t positive = 0;
    for (uint32_t d = 1; d < 10; d++) {
        uint32_t one = grammar_byte(g, (char)('0' + d), holes[d % m]);
        positive = d == 1 ? one : grammar_split(g, positive, one);
    }
    bool zero = (!f->has_low || below_zero || (is_zero(&f->low) && !f->above)) &&
                (!f->has_high || !(f->high.negative || (is_zero(&f->high) && f->below)));
    uint32_t all = grammar_hole(g); // nothing
    if (above_zero && !(f->has_high && is_zero(&f->high))) all = grammar_split(g, all, positive);
    if (below_zero) all = grammar_split(g, all, grammar_byte(g, '-', positive));
    if (zero) all = grammar_split(g, all, grammar_byte(g, '0', next));
    *out = all;
    return !g->full;
}

static long small(const struct decimal *d) { // the magnitude of a whole number below 10^MAX_DIVIDED; -1: it is none
    long n = 0;
    for (int i = 0; i < MAX_WHOLE; i++) {
        if (i < MAX_WHOLE - MAX_DIVIDED && d->whole[i]) return -1;
        n = n * 10 + d->whole[i];
    }
    for (int i = 0; i < MAX_FRACTION; i++)
        if (d->fraction[i]) return -1;
    return n;
}

// The multiples between two small bounds, one by one.
static bool listed(struct grammar *g, const struct number_form *f, uint32_t next, uint32_t *out) {
    long low = small(&f->low) * (f->low.negative ? -1 : 1), high = small(&f->high) * (f->high.negative ? -1 : 1);
    bool any = false;
    for (long n = f->above ? low + 1 : low; n <= (f->below ? high - 1 : high); n++) {
        char text[24];
        if (n % (long)f->multiple) continue;
        int length = snprintf(text, sizeof text, "%ld", n);
        uint32_t one = grammar_text(g, text, (size_t)length, next);
        *out = any ? grammar_split(g, *out, one) : one;
        any = true;
    }
    if (!any) *out = grammar_hole(g);
    return !g->full;
}

bool number_compile(struct grammar *g, const struct number_form *f, uint32_t next, uint32_t *out) {
    bool free_low = !f->has_low || is_zero(&f->low), free_high = !f->has_high || is_zero(&f->high);
    if (f->multiple > 1) {
        if (f->multiple > MAX_MULTIPLE) return false;
        if (f->has_low && f->has_high && small(&f->low) >= 0 && small(&f->high) >= 0) return listed(g, f, next, out);
        return free_low && free_high && multiples(g, f, next, out);
    }
    if (!f->integer && !f->has_low && !f->has_high && f->decimals < 0) {
        *out = grammar_number(g, next);
        return !g->full;
    }
    return bounded(g, f, next, out);
}

bool number_has(const struct number_form *f, const struct pyjson *v) {
    struct decimal d;
    int read = decimal_read(v, &d);
    if (read == 1 || read == -1) return !(read > 0 ? f->has_high : f->has_low) && f->multiple <= 1 && f->decimals < 0;
    int low = f->has_low ? decimal_compare(&d, &f->low) : 1, high = f->has_high ? decimal_compare(&d, &f->high) : -1;
    if (low < 0 || (low == 0 && f->above) || high > 0 || (high == 0 && f->below)) return false;
    for (int i = f->integer ? 0 : f->decimals; i >= 0 && i < MAX_FRACTION; i++)
        if (d.fraction[i]) return false;
    if (f->multiple <= 1) return true;
    uint64_t n = 0;
    for (int i = 0; i < MAX_WHOLE; i++) n = n * 10 + d.whole[i];
    return n % f->multiple == 0;
}
