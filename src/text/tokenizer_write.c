// tokenizer_write.c: see tokenizer_write.h.
#include "text/tokenizer_write.h"

#include "base/size.h"
#include "text/tokenizer_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TYPE_NORMAL = 1, TYPE_CONTROL = 3, TYPE_USER_DEFINED = 4, TYPE_UNUSED = 5 };

// What GGUF calls a pre-tokeniser; NULL: nothing.
static const char *gguf_name(const char *name) {
    static const struct {
        const char *ours, *gguf;
    } names[] = {{"qwen2", "qwen2"}, {"llama3", "llama-bpe"}, {"gpt2", "gpt-2"}, {"smollm", "smollm"}};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(names[i].ours, name) == 0) return names[i].gguf;
    return NULL;
}

static void mark_added(const struct added_set *set, int32_t *types, size_t n) {
    for (size_t i = 0; i < set->n; i++)
        if ((size_t)set->tokens[i].id < n)
            types[set->tokens[i].id] = set->tokens[i].special ? TYPE_CONTROL : TYPE_USER_DEFINED;
}

static bool write_tokens(const struct tokenizer *tok, size_t n, struct gguf_writer *w) {
    int32_t *types = size_alloc(n, sizeof *types);
    bool ok = types && gguf_write_strings(w, "tokenizer.ggml.tokens", n);
    for (size_t i = 0; ok && i < n; i++) {
        size_t len = 0;
        char pad[32];
        const char *text = i <= BPE_MAX_ID ? bpe_text(tok->bpe, (int32_t)i, &len) : NULL;
        types[i] = text ? TYPE_NORMAL : TYPE_UNUSED;
        if (!text) len = (size_t)snprintf(pad, sizeof pad, "[PAD%zu]", i);
        ok = gguf_write_element(w, text ? text : pad, len);
    }
    if (ok) {
        mark_added(&tok->exact, types, n);
        mark_added(&tok->normalized, types, n);
        ok = gguf_write_i32s(w, "tokenizer.ggml.token_type", types, n);
    }
    free(types);
    return ok;
}

static bool write_merges(const struct tokenizer *tok, struct gguf_writer *w) {
    struct buffer pair = {0};
    size_t n = bpe_n_merges(tok->bpe);
    bool ok = gguf_write_strings(w, "tokenizer.ggml.merges", n);
    for (size_t i = 0; ok && i < n; i++) {
        int32_t sides[2];
        size_t n_left, n_right;
        bpe_merge(tok->bpe, i, &sides[0], &sides[1]);
        const char *left = bpe_text(tok->bpe, sides[0], &n_left), *right = bpe_text(tok->bpe, sides[1], &n_right);
        buffer_clear(&pair);
        ok = buffer_append(&pair, left, n_left) && buffer_append_byte(&pair, ' ') &&
             buffer_append(&pair, right, n_right) && gguf_write_element(w, pair.data, pair.len);
    }
    buffer_free(&pair);
    return ok;
}

bool tokenizer_write_gguf(const struct tokenizer *tok, size_t n_vocab, struct gguf_writer *w, struct error *err) {
    const char *pre = gguf_name(pretokenizer_name(tok->pre));
    if (!pre)
        return error_set(err, "the tokenizer's pre-tokeniser (%s) has no name in GGUF", pretokenizer_name(tok->pre));
    bool ok = gguf_write_string(w, "tokenizer.ggml.model", "gpt2", 4) &&
              gguf_write_string(w, "tokenizer.ggml.pre", pre, strlen(pre)) && write_tokens(tok, n_vocab, w) &&
              write_merges(tok, w) &&
              (tok->bos < 0 || gguf_write_u32(w, "tokenizer.ggml.bos_token_id", (uint32_t)tok->bos)) &&
              (tok->eos < 0 || gguf_write_u32(w, "tokenizer.ggml.eos_token_id", (uint32_t)tok->eos)) &&
              gguf_write_bool(w, "tokenizer.ggml.add_bos_token", tok->adds_bos) &&
              (!tok->chat_template ||
               gguf_write_string(w, "tokenizer.chat_template", tok->chat_template, strlen(tok->chat_template)));
    return ok || error_set(err, "out of memory for the tokenizer");
}
