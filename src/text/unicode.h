// unicode.h: UTF-8, character classes and NFC as Hugging Face's `tokenizers` has them.
//
// The tables are measured from that library (tools/gen_unicode.py), because the Unicode versions inside it differ from
// those of PCRE2 and utf8proc, and a tokenizer must agree with the one that the model was trained with. Text may hold
// invalid UTF-8: each byte that is no part of a well-formed character is a unit of its own, in no class, left alone.
#ifndef TANDEM_TEXT_UNICODE_H
#define TANDEM_TEXT_UNICODE_H

#include "base/buffer.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum unicode_class {
    UNICODE_LETTER = 1,     // \p{L}
    UNICODE_NUMBER = 2,     // \p{N}
    UNICODE_SPACE = 4,      // \s in a pre-tokeniser's pattern
    UNICODE_WORD = 8,       // a word character, for added tokens with single_word
    UNICODE_STRIP = 16,     // a space, for added tokens with lstrip or rstrip
    UNICODE_DIGIT = 32,     // what the Digits pre-tokeniser splits off
    UNICODE_NFC_UNSAFE = 64 // NFC may change the character, or join it to what stands before it
};

struct unicode_combining {
    uint32_t c;
    uint8_t combining_class;
};
struct unicode_decomposition { // canonical and complete; 0 ends it early
    uint32_t c, to[4];
};
struct unicode_composition {
    uint32_t first, second, c;
};

// Generated, each sorted by its first members. Hangul syllables are in none of them: they follow from arithmetic.
extern const uint8_t unicode_page_of[0x1100]; // c >> 8 to a page
extern const uint8_t unicode_pages[][256];    // [page][c & 255]: bits of enum unicode_class
extern const struct unicode_combining unicode_combining[];
extern const struct unicode_decomposition unicode_decompositions[];
extern const struct unicode_composition unicode_compositions[];
extern const size_t unicode_n_combining, unicode_n_decompositions, unicode_n_compositions;

// What unicode_decode gives for a byte that is no part of a well-formed character: this plus the byte.
enum { UNICODE_INVALID = 0x110000 };

// The unit at text[0], n > 0: its length in bytes, 1 to 4, and its code point, or UNICODE_INVALID + the byte.
size_t unicode_decode(const char *text, size_t n, uint32_t *c);
// The unit that ends at text[n - 1], n > 0.
size_t unicode_decode_last(const char *text, size_t n, uint32_t *c);
size_t unicode_encode(uint32_t c, char out[4]); // the inverse of unicode_decode

static inline unsigned unicode_classes(uint32_t c) {
    return c < UNICODE_INVALID ? unicode_pages[unicode_page_of[c >> 8]][c & 255] : 0;
}

// How many bytes at the front of `text` are in normal form whatever follows them.
size_t unicode_nfc_prefix(const char *text, size_t n);
// Appends the NFC of `text`. Linear in n, but for sorting the marks of one base character. False: no memory.
bool unicode_nfc(const char *text, size_t n, struct buffer *out);

#endif
