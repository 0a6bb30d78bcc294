// tokenizer.c: encoding and decoding over the parts of a tokenizer. How those come out of files is the work of
// tokenizer_json.c and tokenizer_gguf.c.
#include "text/tokenizer.h"

#include "base/size.h"
#include "text/tokenizer_parts.h"
#include "text/unicode.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool token_ids_append(struct token_ids *list, const int32_t *ids, size_t n) {
    size_t need;
    if (n == 0) return true;
    if (!size_add(list->n, n, &need)) return false;
    if (need > list->cap) {
        size_t cap = list->cap < 32 ? 64 : list->cap;
        if (list->cap >= 32 && !size_mul(cap, 2, &cap)) return false;
        if (cap < need) cap = need;
        int32_t *grown = size_realloc(list->ids, cap, sizeof *grown);
        if (!grown) return false;
        list->ids = grown;
        list->cap = cap;
    }
    memcpy(list->ids + list->n, ids, n * sizeof *ids);
    list->n = need;
    return true;
}

void token_ids_free(struct token_ids *list) {
    free(list->ids);
    *list = (struct token_ids){0};
}

struct tokenizer *tokenizer_create(struct error *err) {
    struct tokenizer *tok = calloc(1, sizeof *tok);
    if (!tok) goto err;
    tok->bos = tok->eos = -1;
    tok->bpe = bpe_create();
    tok->pre = pretokenizer_create();
    if (!tok->bpe || !tok->pre) goto err;
    return tok;
err:
    error_set(err, "tokenizer: out of memory");
    tokenizer_free(tok);
    return NULL;
}

void tokenizer_free(struct tokenizer *tok) {
    if (!tok) return;
    bpe_free(tok->bpe);
    pretokenizer_free(tok->pre);
    added_set_free(&tok->exact);
    added_set_free(&tok->normalized);
    free(tok->special);
    free(tok->chat_template);
    free(tok);
}

bool tokenizer_add(struct tokenizer *tok, const struct added_token *token, const char *text, size_t n, bool normalized,
                   struct error *err) {
    int shown = n < 60 ? (int)n : 60;
    if (n == 0) return true; // `tokenizers` keeps no empty one
    int32_t known = bpe_find(tok->bpe, text, n);
    if (known >= 0 && known != token->id)
        return error_set(err, "added token \"%.*s\" has id %d, but that text is id %d already", shown, text, token->id,
                         known);
    if (known < 0 && !bpe_add_token(tok->bpe, token->id, text, n, err)) return error_prefix(err, "added tokens: ");
    if (!normalized || !tok->nfc)
        return added_set_add(normalized ? &tok->normalized : &tok->exact, token, text, n, err);
    struct buffer form = {0};
    bool ok = unicode_nfc(text, n, &form) || error_set(err, "added tokens: out of memory");
    ok = ok && added_set_add(&tok->normalized, token, buffer_text(&form), form.len, err);
    buffer_free(&form);
    return ok;
}

static void flag_special(struct tokenizer *tok, const struct added_set *set) {
    for (size_t i = 0; i < set->n; i++) {
        if (set->tokens[i].special) tok->special[set->tokens[i].id] = 1;
    }
}

bool tokenizer_finish(struct tokenizer *tok, bool ignore_merges, struct error *err) {
    if (bpe_n_ids(tok->bpe) == 0) return error_set(err, "the vocabulary is empty");
    bpe_finish(tok->bpe, ignore_merges);
    added_set_sort(&tok->exact);
    added_set_sort(&tok->normalized);
    tok->special = calloc((size_t)bpe_n_ids(tok->bpe), 1);
    if (!tok->special) return error_set(err, "tokenizer: out of memory");
    flag_special(tok, &tok->exact);
    flag_special(tok, &tok->normalized);
    snprintf(tok->description, sizeof tok->description, "byte-level BPE, %s pre-tokeniser%s",
             pretokenizer_name(tok->pre), tok->nfc ? ", NFC" : "");
    return true;
}

// One call of tokenizer_encode: text falls from added tokens through NFC, added tokens again and the pre-tokeniser to
// the merging of words.
struct encoding {
    const struct tokenizer *tok;
    bool special;
    struct token_ids *out;
    struct bpe_scratch scratch;
};

static bool encode_word(void *context, const char *word, size_t n, struct error *err) {
    struct encoding *e = context;
    return bpe_encode(e->tok->bpe, word, n, &e->scratch, e->out, err);
}

static bool encode_token(void *context, int32_t id, struct error *err) {
    struct encoding *e = context;
    return token_ids_append(e->out, &id, 1) || error_set(err, "tokenising: out of memory");
}

static bool encode_plain(void *context, const char *text, size_t n, struct error *err) {
    struct encoding *e = context;
    if (!e->tok->prefix_space || text[0] == ' ') return pretokenizer_run(e->tok->pre, text, n, encode_word, e, err);
    struct buffer spaced = {0};
    bool ok = (buffer_append_byte(&spaced, ' ') && buffer_append(&spaced, text, n)) ||
              error_set(err, "tokenising: out of memory");
    ok = ok && pretokenizer_run(e->tok->pre, spaced.data, spaced.len, encode_word, e, err);
    buffer_free(&spaced);
    return ok;
}

static bool encode_exact(void *context, const char *text, size_t n, struct error *err) {
    struct encoding *e = context;
    const struct added_sink sink = {encode_plain, encode_token, e};
    if (!e->tok->nfc || unicode_nfc_prefix(text, n) == n)
        return added_set_cut(&e->tok->normalized, text, n, e->special, &sink, err);
    struct buffer form = {0};
    bool ok = unicode_nfc(text, n, &form) || error_set(err, "tokenising: out of memory");
    ok = ok && added_set_cut(&e->tok->normalized, form.data, form.len, e->special, &sink, err);
    buffer_free(&form);
    return ok;
}

bool tokenizer_encode(const struct tokenizer *tok, const char *text, size_t n, bool special, struct token_ids *out,
                      struct error *err) {
    struct encoding e = {.tok = tok, .special = special, .out = out};
    const struct added_sink sink = {encode_exact, encode_token, &e};
    size_t before = out->n;
    bool ok = added_set_cut(&tok->exact, text, n, special, &sink, err);
    if (!ok) out->n = before;
    bpe_scratch_free(&e.scratch);
    return ok;
}

bool tokenizer_decode(const struct tokenizer *tok, const int32_t *ids, size_t n, bool skip_special, struct buffer *out,
                      struct error *err) {
    for (size_t i = 0; i < n; i++) {
        size_t len;
        const char *bytes = bpe_bytes(tok->bpe, ids[i], &len);
        if (!bytes)
            return error_set(err, "id %d has no token; the tokenizer has ids from 0 to %d", ids[i],
                             bpe_n_ids(tok->bpe) - 1);
        if (skip_special && tok->special[ids[i]]) continue;
        if (!buffer_append(out, bytes, len)) return error_set(err, "decoding: out of memory");
    }
    return true;
}

const char *tokenizer_token_bytes(const struct tokenizer *tok, int32_t id, size_t *n) {
    return bpe_bytes(tok->bpe, id, n);
}

bool tokenizer_is_special(const struct tokenizer *tok, int32_t id) {
    return id >= 0 && id < bpe_n_ids(tok->bpe) && tok->special[id];
}

int32_t tokenizer_find(const struct tokenizer *tok, const char *text) {
    return bpe_find_bytes(tok->bpe, text, strlen(text));
}

int32_t tokenizer_n_ids(const struct tokenizer *tok) {
    return bpe_n_ids(tok->bpe);
}

int32_t tokenizer_bos(const struct tokenizer *tok) {
    return tok->bos;
}

int32_t tokenizer_eos(const struct tokenizer *tok) {
    return tok->eos;
}

bool tokenizer_adds_bos(const struct tokenizer *tok) {
    return tok->adds_bos;
}

const char *tokenizer_chat_template(const struct tokenizer *tok) {
    return tok->chat_template;
}

const char *tokenizer_describe(const struct tokenizer *tok) {
    return tok->description;
}
