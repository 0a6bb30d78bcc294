// pretokenizer.h: cutting text into the words that BPE works on. The regular expressions that tokenizer files state are
// recognised by their text, and a scanner written for each does the cutting in linear time.
#ifndef TANDEM_TEXT_PRETOKENIZER_H
#define TANDEM_TEXT_PRETOKENIZER_H

#include <stdbool.h>
#include <stddef.h>

enum pretokenizer_step {
    PRETOKENIZER_QWEN2,      // one digit a word
    PRETOKENIZER_LLAMA3,     // as qwen2 with up to three digits a word
    PRETOKENIZER_GPT2,       // ByteLevel's own pattern
    PRETOKENIZER_DIGIT_EACH, // Digits, individual_digits: every digit alone
    PRETOKENIZER_DIGIT_RUN   // Digits: runs of digits
};

enum { PRETOKENIZER_MAX_STEPS = 8 };

// Every step cuts the pieces of the one before; a piece's neighbours are invisible to the next step.
struct pretokenizer {
    enum pretokenizer_step steps[PRETOKENIZER_MAX_STEPS];
    int n_steps;
};

// The step for a regular expression, by its text; false: none of ours.
bool pretokenizer_recognise(const char *regex, size_t n, enum pretokenizer_step *out);

// Calls word() for every piece in order; stops and returns false when that does.
typedef bool pretokenizer_word(void *user, const char *text, size_t n);
bool pretokenizer_run(const struct pretokenizer *p, const char *text, size_t n, pretokenizer_word *word, void *user);

#endif
