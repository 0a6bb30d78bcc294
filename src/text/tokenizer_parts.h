// tokenizer_parts.h: what a tokenizer is made of, for the files that build one. Others use tokenizer.h.
#ifndef TANDEM_TEXT_TOKENIZER_PARTS_H
#define TANDEM_TEXT_TOKENIZER_PARTS_H

#include "text/bpe.h"
#include "text/pretokenizer.h"
#include "text/tokenizer.h"
#include "text/tokenizer_added.h"

struct tokenizer {
    struct bpe *bpe;                    // every token, added ones included
    struct pretokenizer *pre;           //
    struct added_set exact, normalized; // looked for before and after normalisation
    unsigned char *special;             // [bpe_n_ids] bool
    bool nfc, prefix_space, adds_bos;   //
    int32_t bos, eos;                   // -1: none
    char *chat_template;                // NULL: none
    char description[128];
};

struct tokenizer *tokenizer_create(struct error *err);

// Adds a token of the added kind to the vocabulary (unless a token of that text is there under that id) and to the set
// that `normalized` names. `token` gives id and flags.
bool tokenizer_add(struct tokenizer *tok, const struct added_token *token, const char *text, size_t n, bool normalized,
                   struct error *err);

// The last step of building one, after all tokens and merges.
bool tokenizer_finish(struct tokenizer *tok, bool ignore_merges, struct error *err);

#endif
