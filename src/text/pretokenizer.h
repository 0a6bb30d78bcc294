// pretokenizer.h: cuts text into the words that byte-pair encoding works on, as a tokenizer.json's "pre_tokenizer"
// says.
//
// The patterns of the model families that tandem runs are recognised and scanned by hand, in one pass over our own
// character classes. Any other pattern goes to PCRE2, whose Unicode tables are older than those of `tokenizers`.
#ifndef TANDEM_TEXT_PRETOKENIZER_H
#define TANDEM_TEXT_PRETOKENIZER_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>

enum pretokenizer_style {
    PRETOKENIZER_QWEN2,            // numbers one by one, newlines end punctuation
    PRETOKENIZER_LLAMA3,           // the same, numbers in groups of up to three
    PRETOKENIZER_GPT2,             // ByteLevel's own pattern
    PRETOKENIZER_DIGITS,           // each number character alone
    PRETOKENIZER_DIGITS_CONTIGUOUS // runs of number characters
};

enum { PRETOKENIZER_MAX_STAGES = 8 };

struct pretokenizer;

// A pre-tokeniser without stages gives its input as one word. NULL: no memory.
struct pretokenizer *pretokenizer_create(void);
void pretokenizer_free(struct pretokenizer *p);

// Adds a stage that cuts each piece of the stage before it. A pattern isolates: matches and what lies between them are
// pieces. It is compiled for any bytes; invalid UTF-8 never matches.
bool pretokenizer_add(struct pretokenizer *p, enum pretokenizer_style style, struct error *err);
bool pretokenizer_add_pattern(struct pretokenizer *p, const char *pattern, size_t n, struct error *err);

// Calls `word` for each word, in order; together they are the text. Stops at the first false.
typedef bool pretokenizer_word(void *context, const char *word, size_t n, struct error *err);
bool pretokenizer_run(const struct pretokenizer *p, const char *text, size_t n, pretokenizer_word *word, void *context,
                      struct error *err);

const char *pretokenizer_name(const struct pretokenizer *p); // "qwen2", "llama3", "gpt2", "smollm", "digits", "pattern"

#endif
