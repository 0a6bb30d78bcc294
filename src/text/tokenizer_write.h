// tokenizer_write.h: a tokenizer as GGUF metadata, tokenizer.ggml.*: the other direction of tokenizer_gguf.c.
#ifndef TANDEM_TEXT_TOKENIZER_WRITE_H
#define TANDEM_TEXT_TOKENIZER_WRITE_H

#include "format/gguf_write.h"
#include "text/tokenizer.h"

// n_vocab: rows of the embedding; those behind the last token become unused ones ("[PAD151669]"). An error if GGUF has
// no name for the pre-tokeniser.
bool tokenizer_write_gguf(const struct tokenizer *tok, size_t n_vocab, struct gguf_writer *w, struct error *err);

#endif
