// text.c: /tokenize, /detokenize, /tokenizer_info, /apply-template: what the tokenizer and the template make of a text.
#include "server/prompt.h"

#include <string.h>

static bool put_ids(struct buffer *out, const struct token_ids *ids) {
    bool ok = buffer_append_byte(out, '[');
    for (size_t i = 0; ok && i < ids->n; i++) ok = buffer_printf(out, i ? ", %d" : "%d", ids->ids[i]);
    return ok && buffer_append_byte(out, ']');
}

// Answers with `out`, or with what is wrong.
static void answer(struct exchange *x, bool ok, struct buffer *out, const struct fault *f) {
    if (ok) exchange_reply(x, 200, out);
    else exchange_fault(x, f);
    buffer_free(out);
}

static bool put_strings(const tandem_engine *e, const struct token_ids *ids, struct buffer *out) {
    bool ok = buffer_append_text(out, ", \"token_strs\": [");
    for (size_t i = 0; ok && i < ids->n; i++) {
        size_t n = 0;
        const char *bytes = tokenizer_token_bytes(e->tokenizer, ids->ids[i], &n);
        ok = (i == 0 || buffer_append_text(out, ", ")) && write_string(out, bytes ? bytes : "", bytes ? n : 0);
    }
    return ok && buffer_append_byte(out, ']');
}

// {"prompt" or "content": text, "special" or "parse_special": bool, "return_token_strs": bool} or {"messages": [...]}.
static bool tokenize(struct exchange *x, struct arena *arena, struct buffer *out, struct fault *f) {
    struct server *s = x->server;
    const struct pyjson *body = prompt_body(x, arena, f), *text = NULL;
    struct token_ids ids = {0};
    struct error err = {0};
    struct chat_prompt p = {0};
    bool special = true, strings = false;
    bool ok = body && prompt_check_model(s, body, f) && field_typed(body, "prompt", PYJSON_STRING, &text, f) &&
              field_typed(body, "content", PYJSON_STRING, &text, f) && field_bool(body, "special", &special, f) &&
              field_bool(body, "parse_special", &special, f) && field_bool(body, "return_token_strs", &strings, f) &&
              field_typed(body, "messages", PYJSON_ARRAY, &p.messages, f) &&
              field_typed(body, "tools", PYJSON_ARRAY, &p.tools, f) && prompt_read_thinking(body, &p, f);
    if (ok && p.messages) {
        ok = (!p.tools || prompt_check_tools(p.tools, f)) && prompt_ids(s, x->tenant, &p, &ids, f);
    } else if (ok && text) {
        ok = tokenizer_encode(s->engine->tokenizer, text->text, text->n_text, special, &ids, &err) ||
             fault_set(f, 400, "prompt", "%s", err.text);
    } else if (ok) {
        ok = fault_set(f, 400, "prompt", "prompt: this field is required (or \"content\", or \"messages\")");
    }
    ok = ok && buffer_printf(out, "{\"count\": %zu, \"max_model_len\": %zu, \"tokens\": ", ids.n, s->engine->context) &&
         put_ids(out, &ids) && (!strings || put_strings(s->engine, &ids, out)) && buffer_append_byte(out, '}');
    token_ids_free(&ids);
    return ok;
}

void handle_tokenize(struct exchange *x) {
    struct arena arena = {0};
    struct buffer out = {0};
    struct fault f = {0};
    answer(x, tokenize(x, &arena, &out, &f), &out, &f);
    arena_free(&arena);
}

static bool detokenize(struct exchange *x, struct arena *arena, struct buffer *out, struct fault *f) {
    const struct tandem_engine *e = x->server->engine;
    const struct pyjson *body = prompt_body(x, arena, f), *list = NULL;
    struct token_ids ids = {0};
    struct buffer text = {0};
    struct error err = {0};
    if (!body || !prompt_check_model(x->server, body, f) || !field_typed(body, "tokens", PYJSON_ARRAY, &list, f))
        return false;
    if (!list) return fault_set(f, 400, "tokens", "tokens: this field is required");
    bool ok = true;
    for (const struct pyjson *v = list->first; ok && v; v = v->next) {
        int64_t n;
        ok = value_int(v, 0, INT32_MAX, &n) || fault_set(f, 400, "tokens", "tokens: expected an array of token ids");
        int32_t id = ok ? (int32_t)n : 0;
        ok = ok && token_ids_append(&ids, &id, 1);
    }
    ok = ok && (tokenizer_decode(e->tokenizer, ids.ids, ids.n, false, &text, &err) ||
                fault_set(f, 400, "tokens", "tokens: %s", err.text));
    ok = ok && buffer_append_text(out, "{\"prompt\": ") && write_string(out, buffer_text(&text), text.len) &&
         buffer_append_text(out, ", \"content\": ") && write_string(out, buffer_text(&text), text.len) &&
         buffer_append_byte(out, '}');
    token_ids_free(&ids);
    buffer_free(&text);
    return ok;
}

void handle_detokenize(struct exchange *x) {
    struct arena arena = {0};
    struct buffer out = {0};
    struct fault f = {0};
    answer(x, detokenize(x, &arena, &out, &f), &out, &f);
    arena_free(&arena);
}

// A special token as text, or null.
static bool put_token(struct buffer *out, const char *name, const struct tokenizer *tok, int32_t id) {
    size_t n = 0;
    const char *bytes = id >= 0 ? tokenizer_token_bytes(tok, id, &n) : NULL;
    return buffer_printf(out, ", \"%s\": ", name) &&
           (bytes ? write_string(out, bytes, n) : buffer_append_text(out, "null"));
}

// What vLLM's route of this name tells, as far as clients (lm-eval) read it.
void handle_tokenizer_info(struct exchange *x) {
    const struct tandem_engine *e = x->server->engine;
    const struct tokenizer *tok = e->tokenizer;
    const char *template = tokenizer_chat_template(tok);
    struct buffer out = {0};
    struct fault f = {0};
    bool ok =
        buffer_printf(&out, "{\"tokenizer_class\": \"Qwen2TokenizerFast\", \"model_max_length\": %zu", e->context) &&
        put_token(&out, "eos_token", tok, tokenizer_eos(tok)) &&
        put_token(&out, "bos_token", tok, tokenizer_bos(tok)) &&
        put_token(&out, "pad_token", tok, tokenizer_find(tok, "<|endoftext|>")) &&
        put_token(&out, "unk_token", tok, -1) && buffer_append_text(&out, ", \"chat_template\": ") &&
        (template ? write_string(&out, template, strlen(template)) : buffer_append_text(&out, "null")) &&
        buffer_append_byte(&out, '}');
    answer(x, ok, &out, &f);
}

static bool apply_template(struct exchange *x, struct arena *arena, struct buffer *out, struct fault *f) {
    struct server *s = x->server;
    const struct pyjson *body = prompt_body(x, arena, f);
    struct chat_prompt p = {0};
    struct buffer text = {0}, prompt = {0};
    struct error err = {0};
    struct template_document *doc = NULL;
    if (!body || !prompt_check_model(s, body, f) || !field_typed(body, "messages", PYJSON_ARRAY, &p.messages, f) ||
        !field_typed(body, "tools", PYJSON_ARRAY, &p.tools, f) || !prompt_read_thinking(body, &p, f) ||
        (p.tools && !prompt_check_tools(p.tools, f)))
        return false;
    if (!p.messages) return fault_set(f, 400, "messages", "messages: this field is required");
    bool ok = prompt_document(&p, &text, f);
    if (ok) {
        doc = template_parse(buffer_text(&text), text.len, "messages", &err);
        ok = (doc && template_render(s->engine->template_kind, doc, prompt_options(s, &p), &prompt, NULL, &err)) ||
             fault_set(f, 400, "messages", "%s", err.text);
    }
    ok = ok && buffer_append_text(out, "{\"prompt\": ") && write_string(out, buffer_text(&prompt), prompt.len) &&
         buffer_append_byte(out, '}');
    template_document_free(doc);
    buffer_free(&text);
    buffer_free(&prompt);
    return ok;
}

void handle_apply_template(struct exchange *x) {
    struct arena arena = {0};
    struct buffer out = {0};
    struct fault f = {0};
    answer(x, apply_template(x, &arena, &out, &f), &out, &f);
    arena_free(&arena);
}
