// template_encode.c: token ids of a rendered prompt. Apart from template.c so that rendering needs no tokenizer.
#include "text/template.h"

bool template_encode(const struct tokenizer *tok, const char *text, size_t n, const struct template_marks *marks,
                     struct token_ids *ids, struct error *err) {
    size_t at = 0, before = ids->n;
    for (size_t i = 0; i < marks->n; i++) {
        const struct template_mark *m = &marks->marks[i];
        if (m->offset < at || m->offset > n || m->length > n - m->offset) {
            ids->n = before;
            return error_set(err, "special token %zu lies outside the prompt of %zu bytes", i, n);
        }
        char name[64]; // the longest that a template of ours writes is <|im_start|>
        if (m->length >= sizeof name) {
            ids->n = before;
            return error_set(err, "special token %zu has %zu bytes, more than %zu", i, m->length, sizeof name - 1);
        }
        for (size_t k = 0; k < m->length; k++) name[k] = text[m->offset + k];
        name[m->length] = '\0';
        int32_t id = tokenizer_find(tok, name);
        if (id < 0) {
            ids->n = before;
            return error_set(
                err, "the chat template writes %s, which the tokenizer does not have; give --template or --raw", name);
        }
        if (m->offset > at && !tokenizer_encode(tok, text + at, m->offset - at, false, ids, err)) {
            ids->n = before;
            return false;
        }
        if (!token_ids_append(ids, &id, 1)) {
            ids->n = before;
            return error_set(err, "out of memory for the token ids of a prompt");
        }
        at = m->offset + m->length;
    }
    if (n > at && !tokenizer_encode(tok, text + at, n - at, false, ids, err)) {
        ids->n = before;
        return false;
    }
    return true;
}
