// utf8.h: one strict UTF-8 decoder. It owns no tables and no policy: callers decide what an invalid byte becomes.
#ifndef TANDEM_BASE_UTF8_H
#define TANDEM_BASE_UTF8_H

#include <stddef.h>
#include <stdint.h>

// Length of the well-formed character at s[0..n), or 0 when the bytes are wrong or too few; *code gets the code point.
// Overlong forms, surrogates and code points beyond 0x10FFFF are wrong (Unicode 15, table 3-7).
static inline size_t utf8_decode(const unsigned char *s, size_t n, uint32_t *code) {
    if (n == 0) return 0;
    uint32_t c = s[0];
    if (c < 0x80) {
        *code = c;
        return 1;
    }
    size_t need = c >= 0xC2 && c <= 0xDF ? 2 : c >= 0xE0 && c <= 0xEF ? 3 : c >= 0xF0 && c <= 0xF4 ? 4 : 0;
    if (need == 0 || n < need) return 0;
    uint32_t value = c & (0x7Fu >> need);
    for (size_t i = 1; i < need; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0;
        value = value << 6 | (s[i] & 0x3Fu);
    }
    if ((need == 3 && value < 0x800) || (need == 4 && (value < 0x10000 || value > 0x10FFFF))) return 0;
    if (value >= 0xD800 && value <= 0xDFFF) return 0;
    *code = value;
    return need;
}

// Could s[0..n), n > 0, be the beginning of a character whose other bytes have not come yet?
static inline int utf8_is_partial(const unsigned char *s, size_t n) {
    size_t need = s[0] >= 0xC2 && s[0] <= 0xDF   ? 2
                  : s[0] >= 0xE0 && s[0] <= 0xEF ? 3
                  : s[0] >= 0xF0 && s[0] <= 0xF4 ? 4
                                                 : 0;
    if (n >= need) return 0;
    for (size_t i = 1; i < n; i++) {
        unsigned low = 0x80, high = 0xBF;
        if (i == 1) {
            if (s[0] == 0xE0) low = 0xA0;
            if (s[0] == 0xED) high = 0x9F;
            if (s[0] == 0xF0) low = 0x90;
            if (s[0] == 0xF4) high = 0x8F;
        }
        if (s[i] < low || s[i] > high) return 0;
    }
    return 1;
}

// Writes a code point (a scalar value) as 1 to 4 bytes; returns how many.
static inline size_t utf8_encode(uint32_t c, char out[4]) {
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n; i-- > 1; c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)((0xF00u >> n & 0xFFu) | c);
    return n;
}

#endif
