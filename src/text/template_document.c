// template_document.c: a conversation as it was given. It owns parsing, building and writing documents; what a message
// may hold is checked when it is rendered (template.c).
#include "text/template_document.h"

#include "base/utf8.h"

#include <stdlib.h>
#include <string.h>

struct template_document *template_document_create(struct error *err) {
    struct template_document *doc = calloc(1, sizeof *doc);
    if (doc) doc->messages = pyjson_new(&doc->arena, PYJSON_ARRAY);
    if (!doc || !doc->messages) {
        error_set(err, "out of memory for a conversation");
        template_document_free(doc);
        return NULL;
    }
    doc->enable_thinking = doc->add_generation_prompt = -1;
    return doc;
}

void template_document_free(struct template_document *doc) {
    if (!doc) return;
    arena_free(&doc->arena);
    free(doc);
}

static bool take_switch(const char *name, const struct pyjson *value, int *out, struct error *err) {
    if (value->type == PYJSON_NULL) return true; // as if it were absent
    if (value->type != PYJSON_TRUE && value->type != PYJSON_FALSE)
        return error_set(err, "%s: %s must be true or false, found %s", name, value->key, pyjson_type_name(value));
    *out = value->type == PYJSON_TRUE;
    return true;
}

static bool has_key(const struct pyjson *m, const char *key) {
    return m->n_key == strlen(key) && memcmp(m->key, key, m->n_key) == 0; // a key may hold a NUL
}

static bool take_member(struct template_document *doc, const char *name, struct pyjson *m, struct error *err) {
    if (has_key(m, "messages")) {
        if (m->type != PYJSON_ARRAY)
            return error_set(err, "%s: messages must be an array, found %s", name, pyjson_type_name(m));
        doc->messages = m;
        return true;
    }
    if (has_key(m, "tools")) {
        if (m->type != PYJSON_ARRAY && m->type != PYJSON_NULL)
            return error_set(err, "%s: tools must be an array, found %s", name, pyjson_type_name(m));
        doc->tools = m->type == PYJSON_ARRAY ? m : NULL;
        return true;
    }
    if (has_key(m, "enable_thinking")) return take_switch(name, m, &doc->enable_thinking, err);
    if (has_key(m, "add_generation_prompt")) return take_switch(name, m, &doc->add_generation_prompt, err);
    return error_set(err,
                     "%s: unknown member \"%.100s\"; a document is an array of messages or an object with messages, "
                     "tools, enable_thinking and add_generation_prompt",
                     name, m->key);
}

struct template_document *template_parse(const char *text, size_t n, const char *name, struct error *err) {
    struct template_document *doc = template_document_create(err);
    if (!doc) return NULL;
    struct pyjson *v = pyjson_parse(&doc->arena, text, n, name, err);
    bool ok = v != NULL;
    if (ok && v->type == PYJSON_ARRAY) {
        doc->messages = v;
    } else if (ok && v->type == PYJSON_OBJECT) {
        if (!pyjson_get(v, "messages")) ok = error_set(err, "%s: the document has no messages", name);
        for (struct pyjson *m = v->first, *next; ok && m; m = next) {
            next = m->next;
            ok = take_member(doc, name, m, err);
        }
    } else if (ok) {
        ok = error_set(err, "%s: a document is an array of messages or an object, found %s", name, pyjson_type_name(v));
    }
    if (ok) return doc;
    template_document_free(doc);
    return NULL;
}

static bool add_text(struct template_document *doc, struct pyjson *message, const char *key, const char *text, size_t n,
                     struct error *err) {
    uint32_t code;
    for (size_t at = 0, length; at < n; at += length) {
        length = utf8_decode((const unsigned char *)text + at, n - at, &code);
        if (length == 0) return error_set(err, "%s of a message: invalid UTF-8 at byte %zu", key, at);
    }
    struct pyjson *v = pyjson_new_string(&doc->arena, text, n);
    if (!v || !pyjson_set(&doc->arena, message, key, v)) return error_set(err, "out of memory for a message");
    return true;
}

static struct pyjson *new_message(struct template_document *doc, const char *role, const char *content,
                                  size_t n_content, const char *reasoning, size_t n_reasoning, struct error *err) {
    struct pyjson *m = pyjson_new(&doc->arena, PYJSON_OBJECT);
    if (!m) {
        error_set(err, "out of memory for a message");
        return NULL;
    }
    bool ok = add_text(doc, m, "role", role, strlen(role), err) &&
              add_text(doc, m, "content", content, n_content, err) &&
              (!reasoning || add_text(doc, m, "reasoning_content", reasoning, n_reasoning, err));
    return ok ? m : NULL;
}

bool template_add_message(struct template_document *doc, const char *role, const char *content, size_t n_content,
                          const char *reasoning, size_t n_reasoning, struct error *err) {
    struct pyjson *m = new_message(doc, role, content, n_content, reasoning, n_reasoning, err);
    if (m) pyjson_append(doc->messages, m);
    return m != NULL;
}

size_t template_n_messages(const struct template_document *doc) {
    return doc->messages->n;
}

const struct pyjson *template_message(const struct template_document *doc, size_t i) {
    const struct pyjson *m = doc->messages->first;
    for (; m && i > 0; i--) m = m->next;
    return m;
}

void template_truncate(struct template_document *doc, size_t n_messages) {
    struct pyjson *list = doc->messages;
    if (n_messages >= list->n) return;
    struct pyjson *last = NULL;
    for (size_t i = 0; i < n_messages; i++) last = last ? last->next : list->first;
    if (last) last->next = NULL;
    else list->first = NULL;
    list->last = last;
    list->n = n_messages;
}

int template_enable_thinking(const struct template_document *doc) {
    return doc->enable_thinking;
}

bool template_set_system(struct template_document *doc, const char *text, size_t n, struct error *err) {
    struct pyjson *list = doc->messages, *system = NULL;
    if (text) {
        system = new_message(doc, "system", text, n, NULL, 0, err);
        if (!system) return false;
    }
    if (list->first && pyjson_is_text(pyjson_get(list->first, "role"), "system")) {
        list->first = list->first->next;
        if (!list->first) list->last = NULL;
        list->n--;
    }
    if (system) {
        system->next = list->first;
        list->first = system;
        if (!list->last) list->last = system;
        list->n++;
    }
    return true;
}

static bool write_switch(struct buffer *out, const char *name, int value) {
    return value < 0 || buffer_printf(out, ", \"%s\": %s", name, value ? "true" : "false");
}

bool template_write(const struct template_document *doc, struct buffer *out, struct error *err) {
    size_t before = out->len;
    bool ok = buffer_append_text(out, "{\"messages\": ") && pyjson_write_portable(doc->messages, out) &&
              (!doc->tools || (buffer_append_text(out, ", \"tools\": ") && pyjson_write_portable(doc->tools, out))) &&
              write_switch(out, "enable_thinking", doc->enable_thinking) &&
              write_switch(out, "add_generation_prompt", doc->add_generation_prompt) && buffer_append_byte(out, '}');
    if (ok) return true;
    out->len = before;
    return error_set(err, "out of memory while writing a conversation");
}
