// tokenizer_gguf.c: tokenizers from GGUF metadata, tokenizer.ggml.*
// (source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer").
//
// GGUF names the pre-tokeniser and leaves out the normaliser and the flags of added tokens; both are taken to be what
// Hugging Face's files of that family say.
#include "format/gguf.h"
#include "text/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>

enum token_type { TYPE_NORMAL = 1, TYPE_UNKNOWN, TYPE_CONTROL, TYPE_USER_DEFINED, TYPE_UNUSED, TYPE_BYTE };

struct family {
    const char *name; // tokenizer.ggml.pre
    enum pretokenizer_style style;
    bool digits_first, nfc, ignore_merges, adds_bos;
    bool four_stages; // llama.cpp's "default", which no other tokenizer has
};

static const struct family families[] = {
    {.name = "qwen2", .style = PRETOKENIZER_QWEN2, .nfc = true},
    {.name = "deepseek-r1-qwen", .style = PRETOKENIZER_QWEN2, .nfc = true},
    {.name = "llama-bpe", .style = PRETOKENIZER_LLAMA3, .ignore_merges = true, .adds_bos = true},
    {.name = "llama3", .style = PRETOKENIZER_LLAMA3, .ignore_merges = true, .adds_bos = true},
    {.name = "llama-v3", .style = PRETOKENIZER_LLAMA3, .ignore_merges = true, .adds_bos = true},
    {.name = "smollm", .style = PRETOKENIZER_GPT2, .digits_first = true},
    {.name = "gpt-2", .style = PRETOKENIZER_GPT2},
    {.name = "gpt2", .style = PRETOKENIZER_GPT2},
    {.name = "default", .four_stages = true},
};

static int shown(struct gguf_string s) {
    return s.len < 60 ? (int)s.len : 60;
}

// llama.cpp's "default": punctuation and some symbols, GPT-2's pattern, numbers, and those three digits at a time; each
// cuts what the one before it left. llama.cpp takes it, too, for files that name no pre-tokeniser.
static bool add_four_stages(struct pretokenizer *p, struct error *err) {
    static const char punctuation[] = "[\\p{P}$+<=>^~|]+", three_digits[] = "[0-9]{3}";
    return pretokenizer_add_pattern(p, punctuation, sizeof punctuation - 1, err) &&
           pretokenizer_add(p, PRETOKENIZER_GPT2, err) && pretokenizer_add(p, PRETOKENIZER_DIGITS_CONTIGUOUS, err) &&
           pretokenizer_add_pattern(p, three_digits, sizeof three_digits - 1, err);
}

static bool read_family(struct tokenizer *tok, const struct gguf *g, const struct family **out, struct error *err) {
    struct gguf_string model, pre = {"default", 7};
    if (!gguf_get_string(g, "tokenizer.ggml.model", &model, err)) return false;
    if (model.len != 4 || memcmp(model.data, "gpt2", 4) != 0)
        return error_set(err,
                         "tokenizer.ggml.model is \"%.*s\"; tandem knows \"gpt2\" (byte-level BPE), and neither "
                         "SentencePiece (\"llama\") nor others",
                         shown(model), model.data);
    if (gguf_find(g, "tokenizer.ggml.pre") && !gguf_get_string(g, "tokenizer.ggml.pre", &pre, err)) return false;
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        const struct family *f = &families[i];
        if (strlen(f->name) != pre.len || memcmp(f->name, pre.data, pre.len) != 0) continue;
        *out = f;
        tok->nfc = f->nfc;
        tok->adds_bos = f->adds_bos;
        if (f->four_stages) return add_four_stages(tok->pre, err);
        return (!f->digits_first || pretokenizer_add(tok->pre, PRETOKENIZER_DIGITS, err)) &&
               pretokenizer_add(tok->pre, f->style, err);
    }
    return error_set(err, "tokenizer.ggml.pre is \"%.*s\"; tandem knows qwen2, llama-bpe, smollm, gpt-2 and default",
                     shown(pre), pre.data);
}

static const struct gguf_value *find_strings(const struct gguf *g, const char *key, struct error *err) {
    const struct gguf_value *v = gguf_find(g, key);
    if (v && v->type == GGUF_ARRAY && v->as.array.type == GGUF_STRING) return v;
    error_set(err, "%s: expected an array of strings, found %s", key, v ? "another type" : "nothing");
    return NULL;
}

// Two passes: all tokens, because merges may name any; then those that are looked for in the text. Unused ones only
// fill the rows of a padded embedding, and are no tokens.
static bool read_tokens(struct tokenizer *tok, const struct gguf *g, bool added, struct error *err) {
    const struct gguf_value *tokens = find_strings(g, "tokenizer.ggml.tokens", err);
    const struct gguf_value *types = gguf_find(g, "tokenizer.ggml.token_type");
    if (!tokens) return false;
    if (types && (types->type != GGUF_ARRAY || types->as.array.n != tokens->as.array.n ||
                  (types->as.array.type != GGUF_I32 && types->as.array.type != GGUF_U32)))
        return error_set(err, "tokenizer.ggml.token_type: expected an array of %zu 32-bit integers",
                         tokens->as.array.n);
    for (size_t i = 0; i < tokens->as.array.n; i++) {
        struct gguf_string s = tokens->as.array.strings[i];
        int64_t type = types ? gguf_array_i64(types, i) : TYPE_NORMAL;
        if (type < TYPE_NORMAL || type > TYPE_BYTE)
            return error_set(err, "tokenizer.ggml.token_type: token %zu has the unknown type %lld", i, (long long)type);
        if (type == TYPE_UNUSED) continue;
        bool looked_for = type == TYPE_CONTROL || type == TYPE_USER_DEFINED || type == TYPE_UNKNOWN;
        if (added && !looked_for) continue;
        struct added_token token = {.id = (int32_t)i, .special = type != TYPE_USER_DEFINED};
        if (i > BPE_MAX_ID) return error_set(err, "tokenizer.ggml.tokens: more than %d tokens", BPE_MAX_ID + 1);
        bool ok = added ? tokenizer_add(tok, &token, s.data, s.len, false, err)
                        : bpe_add_token(tok->bpe, (int64_t)i, s.data, s.len, err);
        if (!ok) return error_prefix(err, "tokenizer.ggml.tokens: ");
    }
    return true;
}

static bool read_merges(struct tokenizer *tok, const struct gguf *g, struct error *err) {
    const struct gguf_value *merges = find_strings(g, "tokenizer.ggml.merges", err);
    if (!merges) return false;
    for (size_t i = 0; i < merges->as.array.n; i++) {
        struct gguf_string s = merges->as.array.strings[i];
        const char *space = s.len ? memchr(s.data, ' ', s.len) : NULL;
        size_t n = space ? (size_t)(space - s.data) : 0;
        if (!space || memchr(space + 1, ' ', s.len - n - 1))
            return error_set(err, "tokenizer.ggml.merges: merge %zu, \"%.*s\", is no pair with one space between", i,
                             shown(s), s.data);
        if (!bpe_add_merge(tok->bpe, s.data, n, space + 1, s.len - n - 1, err))
            return error_prefix(err, "tokenizer.ggml.merges: ");
    }
    return true;
}

static bool read_id(const struct tokenizer *tok, const struct gguf *g, const char *key, int32_t *out,
                    struct error *err) {
    uint32_t id;
    size_t n;
    if (!gguf_find(g, key)) return true;
    if (!gguf_get_u32(g, key, &id, err)) return false;
    if (id > BPE_MAX_ID || !bpe_bytes(tok->bpe, (int32_t)id, &n))
        return error_set(err, "%s is %u, which is no token", key, id);
    *out = (int32_t)id;
    return true;
}

static bool read_rest(struct tokenizer *tok, const struct gguf *g, struct error *err) {
    if (!read_id(tok, g, "tokenizer.ggml.bos_token_id", &tok->bos, err) ||
        !read_id(tok, g, "tokenizer.ggml.eos_token_id", &tok->eos, err))
        return false;
    if (gguf_find(g, "tokenizer.ggml.add_bos_token") &&
        !gguf_get_bool(g, "tokenizer.ggml.add_bos_token", &tok->adds_bos, err))
        return false;
    if (tok->adds_bos && tok->bos < 0)
        return error_set(err, "the text begins with bos, but there is no tokenizer.ggml.bos_token_id");
    struct gguf_string chat;
    if (!gguf_find(g, "tokenizer.chat_template")) return true;
    if (!gguf_get_string(g, "tokenizer.chat_template", &chat, err)) return false;
    if (chat.len && memchr(chat.data, 0, chat.len))
        return error_set(err, "tokenizer.chat_template holds a zero byte; it is text");
    tok->chat_template = strndup(chat.len ? chat.data : "", chat.len);
    return tok->chat_template || error_set(err, "tokenizer.chat_template: out of memory");
}

struct tokenizer *tokenizer_open_gguf(const struct gguf *g, struct error *err) {
    const struct family *family = NULL;
    struct tokenizer *tok = tokenizer_create(err);
    if (!tok) return NULL;
    if (read_family(tok, g, &family, err) && read_tokens(tok, g, false, err) && read_merges(tok, g, err) &&
        read_tokens(tok, g, true, err) && tokenizer_finish(tok, family->ignore_merges, err) && read_rest(tok, g, err))
        return tok;
    tokenizer_free(tok);
    return NULL;
}
