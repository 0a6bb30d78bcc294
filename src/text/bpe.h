// bpe.h: a vocabulary of byte-level tokens, the merges that build them, and the merging of one word.
//
// Tokens are stored as tokenizer files write them, in the byte-level alphabet (each byte is one printable character: a
// space is U+0120), and as the bytes they stand for. It knows nothing of special tokens or of words.
#ifndef TANDEM_TEXT_BPE_H
#define TANDEM_TEXT_BPE_H

#include "base/error.h"
#include "text/bpe_queue.h"
#include "text/tokenizer.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { BPE_MAX_ID = (1 << 22) - 1 }; // four million ids; the largest vocabularies have 300,000

struct bpe;
struct bpe *bpe_create(void); // NULL: no memory
void bpe_free(struct bpe *b);

// Adds a token under an id that is not taken yet and a text that no other token has.
bool bpe_add_token(struct bpe *b, int64_t id, const char *text, size_t n, struct error *err);
// Adds the next merge in order of rank, both sides in the alphabet. Both and what they join to must be tokens, and no
// pair is merged twice.
bool bpe_add_merge(struct bpe *b, const char *left, size_t n_left, const char *right, size_t n_right,
                   struct error *err);
// Tokens added from here on are found by bpe_find, but are no words to ignore_merges: they are added tokens.
void bpe_end_model(struct bpe *b);
// Looks up the tokens of the 256 bytes, after all tokens were added. Returns how many have none; encoding such a byte
// is an error then.
int bpe_finish(struct bpe *b, bool ignore_merges);

int32_t bpe_find(const struct bpe *b, const char *text, size_t n);        // in the alphabet; -1: none
int32_t bpe_find_bytes(const struct bpe *b, const char *bytes, size_t n); // a token that stands for them; -1
const char *bpe_bytes(const struct bpe *b, int32_t id, size_t *n);        // what the id stands for; NULL: no token
const char *bpe_text(const struct bpe *b, int32_t id, size_t *n);         // in the alphabet; NULL: no token
int32_t bpe_n_ids(const struct bpe *b);                                   // one more than the largest id
size_t bpe_n_merges(const struct bpe *b);
void bpe_merge(const struct bpe *b, size_t rank, int32_t *left, int32_t *right); // rank < bpe_n_merges

// Memory for merging that is kept from word to word. All zero is valid.
struct bpe_scratch {
    struct bpe_symbol *symbols;
    size_t symbol_cap;
    struct bpe_queue queue;
};
void bpe_scratch_free(struct bpe_scratch *s);

// Appends the ids of one word, n > 0 bytes.
bool bpe_encode(const struct bpe *b, const char *word, size_t n, struct bpe_scratch *scratch, struct token_ids *out,
                struct error *err);

#endif
