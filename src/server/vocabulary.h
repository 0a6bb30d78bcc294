// vocabulary.h: a vocabulary's tokens as a tree of their bytes, so that tokens with the same beginning are tried at
// once and those behind an impossible byte are skipped at once. Special tokens and marks of a chat's structure are not
// in it.
#ifndef TANDEM_SERVER_VOCABULARY_H
#define TANDEM_SERVER_VOCABULARY_H

#include "base/error.h"
#include "text/tokenizer.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_TOKEN = 1024 }; // bytes; longer tokens are never written under a constraint

struct branch {
    int32_t id;     // of the token that ends here; -1: none
    uint32_t end;   // the first branch that is not below this one
    uint16_t depth; // bytes above it
    uint8_t byte;
    bool call; // <tool_call> or </tool_call>
};

struct vocabulary {
    struct branch *branches; // [n] each before what is below it
    size_t n, n_words, longest;
    uint32_t *only_end; // [n_words] the mask of the end tokens
};

struct vocabulary *vocabulary_create(const struct tokenizer *tok, size_t n_vocab, const int32_t *end_ids,
                                     size_t n_end_ids, struct error *err);
void vocabulary_free(struct vocabulary *v);

#endif
