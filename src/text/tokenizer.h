// tokenizer.h: text to token ids and back, exactly as Hugging Face's `tokenizers` library does it for byte-level BPE.
//
// A tokenizer is immutable once open; any number of threads may use one. Ids are int32_t, as everywhere in tandem.
#ifndef TANDEM_TEXT_TOKENIZER_H
#define TANDEM_TEXT_TOKENIZER_H

#include "base/buffer.h"
#include "base/error.h"
#include "format/gguf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

// A growable list of ids. All zero is empty.
struct token_ids {
    int32_t *ids;
    size_t n, cap;
};
bool token_ids_append(struct token_ids *list, const int32_t *ids, size_t n); // false: no memory
void token_ids_free(struct token_ids *list);

// A folder that holds tokenizer.json and, optionally, tokenizer_config.json (special ids, chat template) and
// chat_template.jinja.
struct tokenizer *tokenizer_open_folder(const char *folder, struct error *err);
// tokenizer.json and tokenizer_config.json as bytes (fuzzing); config may be NULL.
struct tokenizer *tokenizer_open_bytes(const char *json, size_t n_json, const char *config, size_t n_config,
                                       struct error *err);
// The vocabulary in GGUF metadata (tokenizer.ggml.*; pre-tokenisers qwen2, llama-bpe, smollm, gpt-2). Everything needed
// is copied; `g` may be closed afterwards.
struct tokenizer *tokenizer_open_gguf(const struct gguf *g, struct error *err);
void tokenizer_free(struct tokenizer *tok); // NULL is fine

// Appends the ids of `text`, any bytes. Invalid UTF-8 is tokenised as its bytes. With `special` the text of special
// tokens becomes their ids; without, it is plain text. Added tokens that are not flagged special (<think>, <tool_call>)
// are always ids. Nothing is added in front or behind. Linear in n, but for a logarithm in very long words. Errors: a
// byte for which the vocabulary has no token (none of the supported families), a pattern that meets its limits, memory;
// `out` is as it was then.
bool tokenizer_encode(const struct tokenizer *tok, const char *text, size_t n, bool special, struct token_ids *out,
                      struct error *err);

// Appends the bytes that `n` ids stand for; not necessarily whole UTF-8 characters. Ids without a token (padding rows
// of the embedding) are an error that names them.
bool tokenizer_decode(const struct tokenizer *tok, const int32_t *ids, size_t n, bool skip_special, struct buffer *out,
                      struct error *err);

// The bytes of one token and their count; NULL where the id has no token.
const char *tokenizer_token_bytes(const struct tokenizer *tok, int32_t id, size_t *n);
bool tokenizer_is_special(const struct tokenizer *tok, int32_t id);
int32_t tokenizer_find(const struct tokenizer *tok,
                       const char *text);                         // id of a token with exactly these bytes; -1: none
int32_t tokenizer_n_ids(const struct tokenizer *tok);             // one more than the largest id
int32_t tokenizer_bos(const struct tokenizer *tok);               // -1: none
int32_t tokenizer_eos(const struct tokenizer *tok);               // -1: none
bool tokenizer_adds_bos(const struct tokenizer *tok);             // prompts begin with bos
const char *tokenizer_chat_template(const struct tokenizer *tok); // Jinja text, never executed; NULL: none
const char *tokenizer_describe(const struct tokenizer *tok);      // "byte-level BPE, qwen2 pre-tokeniser, NFC"

#endif
