// unicode.h: what the tokenizer needs of Unicode: UTF-8, character classes and NFC, as the `tokenizers` library has
// them (unicode_tables.c is read off that library by tools/gen_unicode.py).
#ifndef TANDEM_TEXT_UNICODE_H
#define TANDEM_TEXT_UNICODE_H

#include "base/buffer.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum unicode_class_bit {
    UNICODE_LETTER = 1, // \p{L} in the pre-tokeniser's regex engine
    UNICODE_NUMBER = 2, // \p{N}
    UNICODE_SPACE = 4,  // \s
    UNICODE_DIGIT = 8   // what the Digits pre-tokeniser splits off
};

struct unicode_decomposition {
    uint32_t from, at, n; // `from` becomes unicode_decomposed[at .. at + n)
};
struct unicode_composition {
    uint32_t first, second, composed; // sorted by (first, second)
};
extern const uint8_t unicode_class_index[], unicode_class_blocks[];
extern const uint8_t unicode_combining_index[], unicode_combining_blocks[];
extern const uint32_t unicode_decomposed[];
extern const struct unicode_decomposition unicode_decompositions[];
extern const size_t unicode_n_decompositions;
extern const struct unicode_composition unicode_compositions[];
extern const size_t unicode_n_compositions;

// Bits of enum unicode_class_bit; 0 above U+10FFFF.
static inline unsigned unicode_class(uint32_t c) {
    if (c >= 0x110000) return 0;
    return unicode_class_blocks[unicode_class_index[c >> 8] * 256u + (c & 255u)];
}

enum { UNICODE_INVALID = 0x110000 }; // stands for one byte that is no part of valid UTF-8

// Decodes the character at text[0 .. n), n > 0, and returns its length in bytes. A byte that begins no valid character
// (overlong forms, surrogates and truncation included) gives UNICODE_INVALID and length 1.
size_t utf8_decode(const char *text, size_t n, uint32_t *out);
bool utf8_append(struct buffer *out, uint32_t c); // false: no memory

// Appends the NFC form of `text`. Invalid bytes are kept and nothing composes across them. n log n at worst.
bool unicode_nfc(const char *text, size_t n, struct buffer *out); // false: no memory

#endif
