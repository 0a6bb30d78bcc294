// conversation.c: see conversation.h.
#include "engine/conversation.h"

#include "base/size.h"

#include <stdlib.h>
#include <string.h>

void conversation_truncate(struct conversation *c, size_t n_messages) {
    template_truncate(c->doc, n_messages);
    while (c->n_replies > 0 && c->replies[c->n_replies - 1].message >= n_messages)
        token_ids_free(&c->replies[--c->n_replies].ids);
}

void conversation_free(struct conversation *c) {
    while (c->n_replies > 0) token_ids_free(&c->replies[--c->n_replies].ids);
    free(c->replies);
    template_document_free(c->doc);
    *c = (struct conversation){0};
}

static bool is_newlines(const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (bytes[i] != '\n') return false;
    return true;
}

// The part of the generated ids that spells the content: after the last </think> and the newlines behind it, up to the
// end token. false: those ids spell something else.
static bool content_ids(const tandem_engine *e, const int32_t *ids, size_t n, const char *content, size_t n_content,
                        const int32_t **from, size_t *count) {
    int32_t close = tokenizer_find(e->tokenizer, "</think>");
    size_t begin = 0, at = 0;
    while (n > 0 && engine_is_end(e, ids[n - 1])) n--;
    for (size_t i = 0; i < n && close >= 0; i++)
        if (ids[i] == close) begin = i + 1;
    for (size_t size; begin < n; begin++) {
        const char *bytes = tokenizer_token_bytes(e->tokenizer, ids[begin], &size);
        if (!bytes || !is_newlines(bytes, size)) break;
    }
    for (size_t i = begin; i < n; i++) {
        size_t size;
        const char *bytes = tokenizer_token_bytes(e->tokenizer, ids[i], &size);
        if (!bytes || size > n_content - at || memcmp(content + at, bytes, size) != 0) return false;
        at += size;
    }
    *from = ids + begin;
    *count = n - begin;
    return at == n_content;
}

bool conversation_add_reply(struct conversation *c, const tandem_engine *e, const char *content, size_t n_content,
                            const char *reasoning, size_t n_reasoning, const int32_t *ids, size_t n_ids,
                            struct error *err) {
    size_t message = template_n_messages(c->doc), count;
    const int32_t *from;
    if (!template_add_message(c->doc, "assistant", content, n_content, n_reasoning ? reasoning : NULL, n_reasoning,
                              err))
        return false;
    if (!content_ids(e, ids, n_ids, content, n_content, &from, &count)) return true;
    if (c->n_replies == c->cap) {
        size_t cap = c->cap ? 2 * c->cap : 16;
        struct reply_ids *replies = size_realloc(c->replies, cap, sizeof *replies);
        if (!replies) return error_set(err, "out of memory");
        c->replies = replies;
        c->cap = cap;
    }
    struct reply_ids *r = &c->replies[c->n_replies];
    *r = (struct reply_ids){.message = message};
    if (!token_ids_append(&r->ids, from, count)) return error_set(err, "out of memory");
    c->n_replies++;
    return true;
}

// Does a stretch of the prompt between two special tokens hold reply r as it was said?
static bool holds_reply(const struct tokenizer *tok, const char *text, size_t n, const struct reply_ids *r) {
    static const char head[] = "assistant\n";
    size_t at = sizeof head - 1;
    if (n < at || memcmp(text, head, at) != 0) return false;
    for (size_t i = 0; i < r->ids.n; i++) {
        size_t size;
        const char *bytes = tokenizer_token_bytes(tok, r->ids.ids[i], &size);
        if (!bytes || size > n - at || memcmp(text + at, bytes, size) != 0) return false;
        at += size;
    }
    return at == n;
}

struct said {
    const struct conversation *c;
    size_t next; // the first reply that has not been found yet
};

// Encodes one stretch between special tokens, with a reply's own ids where it is one.
static bool encode_stretch(void *user, const struct tokenizer *tok, const char *text, size_t n, struct token_ids *ids,
                           struct error *err) {
    static const char head[] = "assistant\n";
    struct said *s = user;
    for (size_t i = s->next; i < s->c->n_replies; i++) {
        const struct reply_ids *r = &s->c->replies[i];
        if (!holds_reply(tok, text, n, r)) continue;
        s->next = i + 1;
        if (!tokenizer_encode(tok, head, sizeof head - 1, false, ids, err)) return false;
        return token_ids_append(ids, r->ids.ids, r->ids.n) || error_set(err, "out of memory");
    }
    return tokenizer_encode(tok, text, n, false, ids, err);
}

bool conversation_render(const struct conversation *c, const tandem_engine *e, struct template_options options,
                         struct token_ids *ids, struct error *err) {
    struct said said = {c, 0};
    return engine_render(e, c->doc, options, &(struct template_stretches){encode_stretch, &said}, ids, err);
}
