// tokenizer_reader.h: the two large members of a tokenizer.json, "vocab" and "merges" of "model", read in one pass.
//
// A general JSON tree of Qwen3's 300,000 strings takes longer to build than everything else in opening a tokenizer, and
// is thrown away. So the two are cut out first: what remains is small, goes to the general parser and is checked there.
#ifndef TANDEM_TEXT_TOKENIZER_READER_H
#define TANDEM_TEXT_TOKENIZER_READER_H

#include "base/buffer.h"
#include "base/error.h"
#include "text/bpe.h"

#include <stdbool.h>
#include <stddef.h>

struct tokenizer_outline {
    const char *json;          // the whole file
    size_t vocab, vocab_end;   // json[vocab] is its {; both 0: no object of that name in "model"
    size_t merges, merges_end; // json[merges] is its [; both 0: no array of that name
    struct buffer rest;        // the file with those two empty; the caller frees it
};

// Errors: no memory. Whatever is not JSON shows when `rest` is parsed or the two members are read.
bool tokenizer_outline(const char *json, size_t n, struct tokenizer_outline *out, struct error *err);

// Each reads its member strictly; messages give the place as a byte offset. Escapes are decoded; invalid UTF-8, control
// characters and U+0000 are errors, as they are to the general parser.
bool tokenizer_read_vocab(const struct tokenizer_outline *o, struct bpe *bpe, struct error *err);
bool tokenizer_read_merges(const struct tokenizer_outline *o, struct bpe *bpe, struct error *err);

#endif
