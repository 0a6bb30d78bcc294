// tokenizer_parts.h: the inside of a tokenizer, for the files that fill it (tokenizer_json.c) and use it (tokenizer.c).
#ifndef TANDEM_TEXT_TOKENIZER_PARTS_H
#define TANDEM_TEXT_TOKENIZER_PARTS_H

#include "base/arena.h"
#include "text/bpe.h"
#include "text/pretokenizer.h"
#include "text/tokenizer.h"

enum { TOKENIZER_MAX_IDS = 1 << 24 };

struct token {
    const char *content; // as the file spells it: byte-level alphabet, or an added token's text; NULL: no such id
    const char *bytes;   // what it decodes to
    size_t n_content, n_bytes;
    bool added, special;
};

struct added_token {
    int32_t id;
    const char *text; // what is matched: the content, normalised where the file asks for it
    size_t n;
    bool lstrip, rstrip;
};

// Added tokens sorted by first byte, the longest first.
struct added_set {
    struct added_token *tokens; // [n]
    size_t n;
    size_t start[257]; // those that begin with byte b: start[b] .. start[b + 1]
};

struct tokenizer {
    struct arena arena;
    struct token *tokens; // [n_ids]
    int32_t n_ids;
    int32_t *slots; // [mask + 1] hash of contents; -1: free
    size_t mask;
    int32_t byte_id[256];
    struct bpe bpe;
    bool ignore_merges, nfc;
    struct pretokenizer pre;
    struct added_set raw, normalized; // matched before and after normalisation
    int32_t bos, eos;
    bool adds_bos;
    const char *chat_template;
    char describe[96];
};

struct tokenizer *tokenizer_new(int32_t n_ids, struct error *err);
// Names an id. The content is copied. Errors: id out of range or taken, content taken by another id.
bool tokenizer_put(struct tokenizer *tok, int32_t id, const char *content, size_t n, struct error *err);
int32_t tokenizer_find_content(const struct tokenizer *tok, const char *content, size_t n); // -1: none
bool tokenizer_merge(struct tokenizer *tok, const char *left, size_t n_left, const char *right, size_t n_right,
                     uint32_t rank, struct error *err);
// Call when all is in place: byte tokens, added sets, description.
bool tokenizer_finish(struct tokenizer *tok, struct error *err);
bool added_set_add(struct tokenizer *tok, struct added_set *set, struct added_token token);

#endif
