// template_encode.c: token ids of a rendered prompt. Apart from template.c so that rendering needs no tokenizer.
#include "text/template.h"

#include <string.h>

static bool find_special(const struct tokenizer *tok, const char *text, size_t n, int32_t *id, struct error *err) {
    char name[64]; // the longest that a template of ours writes is <|im_start|>
    if (n >= sizeof name) return error_set(err, "a special token has %zu bytes, more than %zu", n, sizeof name - 1);
    memcpy(name, text, n);
    name[n] = '\0';
    *id = tokenizer_find(tok, name);
    return *id >= 0 ||
           error_set(err, "the chat template writes %s, which the tokenizer does not have; give --template or --raw",
                     name);
}

static bool encode_between(const struct tokenizer *tok, const struct template_stretches *between, const char *text,
                           size_t n, struct token_ids *ids, struct error *err) {
    if (n == 0) return true;
    return between ? between->encode(between->user, tok, text, n, ids, err)
                   : tokenizer_encode(tok, text, n, false, ids, err);
}

static bool encode_all(const struct tokenizer *tok, const char *text, size_t n, const struct template_marks *marks,
                       const struct template_stretches *between, struct token_ids *ids, struct error *err) {
    size_t at = 0;
    for (size_t i = 0; i < marks->n; i++) {
        const struct template_mark *m = &marks->marks[i];
        if (m->offset < at || m->offset > n || m->length > n - m->offset)
            return error_set(err, "special token %zu lies outside the prompt of %zu bytes", i, n);
        int32_t id;
        if (!find_special(tok, text + m->offset, m->length, &id, err) ||
            !encode_between(tok, between, text + at, m->offset - at, ids, err))
            return false;
        if (!token_ids_append(ids, &id, 1)) return error_set(err, "out of memory for the token ids of a prompt");
        at = m->offset + m->length;
    }
    return encode_between(tok, between, text + at, n - at, ids, err);
}

bool template_encode(const struct tokenizer *tok, const char *text, size_t n, const struct template_marks *marks,
                     const struct template_stretches *between, struct token_ids *ids, struct error *err) {
    size_t before = ids->n;
    if (encode_all(tok, text, n, marks, between, ids, err)) return true;
    ids->n = before;
    return false;
}
