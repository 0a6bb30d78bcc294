// prompt.c: see prompt.h.
#include "server/prompt.h"

#include "server/replies.h"

#include <stdlib.h>
#include <string.h>

const struct pyjson *prompt_body(struct exchange *x, struct arena *arena, struct fault *f) {
    struct error err = {0};
    const struct pyjson *v = pyjson_parse(arena, buffer_text(&x->body), x->body.len, "body", &err);
    if (!v) {
        fault_set(f, 400, NULL, "%s", err.text);
        return NULL;
    }
    if (v->type != PYJSON_OBJECT) {
        fault_set(f, 400, NULL, "the body must be a JSON object, found %s", pyjson_type_name(v));
        return NULL;
    }
    return v;
}

bool prompt_check_model(const struct server *s, const struct pyjson *body, struct fault *f) {
    const char *model = NULL;
    if (!field_text(body, "model", &model, f)) return false;
    if (!model || strcmp(model, s->options.model_name) == 0) return true;
    return fault_set(f, 404, "model", "the model \"%.100s\" does not exist; this server has \"%s\"", model,
                     s->options.model_name);
}

bool prompt_fits(const struct server *s, size_t n_ids, struct fault *f) {
    if (n_ids <= s->engine->context) return true;
    // Clients that shorten a conversation look for these words, or for this code.
    f->code = "context_length_exceeded";
    return fault_set(f, 400, "messages", "prompt is too long: %zu tokens > %zu maximum, which the context holds", n_ids,
                     s->engine->context);
}

// ---- Messages

// The text of a message's content: a string, null, or an array of text parts.
static bool put_content(const struct pyjson *v, size_t index, struct buffer *out, struct fault *f) {
    char name[48];
    snprintf(name, sizeof name, "messages[%zu].content", index);
    if (!v || v->type == PYJSON_NULL || v->type == PYJSON_STRING)
        return pyjson_write_string(v && v->type == PYJSON_STRING ? v->text : "",
                                   v && v->type == PYJSON_STRING ? v->n_text : 0, out) ||
               fault_set(f, 500, NULL, "out of memory");
    if (v->type != PYJSON_ARRAY)
        return fault_set(f, 400, name, "%s: expected a string, null or an array of parts, found %s", name,
                         pyjson_type_name(v));
    struct buffer text = {0};
    bool ok = true;
    for (const struct pyjson *p = v->first; ok && p; p = p->next) {
        const struct pyjson *type = pyjson_get(p, "type");
        bool refusal = pyjson_is_text(type, "refusal"); // what an assistant once said
        bool is_text = refusal || pyjson_is_text(type, "text") || pyjson_is_text(type, "input_text") ||
                       pyjson_is_text(type, "output_text");
        const struct pyjson *part = pyjson_get(p, refusal ? "refusal" : "text");
        if (!is_text)
            ok = fault_set(f, 400, name, "%s: this model reads text only; a part has type \"%.40s\"", name,
                           type && type->type == PYJSON_STRING ? type->text : "?");
        else if (!part || part->type != PYJSON_STRING)
            ok = fault_set(f, 400, name, "%s: a text part needs \"text\", a string", name);
        else ok = buffer_append(&text, part->text, part->n_text) || fault_set(f, 500, NULL, "out of memory");
    }
    ok = ok && (pyjson_write_string(buffer_text(&text), text.len, out) || fault_set(f, 500, NULL, "out of memory"));
    buffer_free(&text);
    return ok;
}

static bool put_member(const struct pyjson *m, const char *key, struct buffer *out) {
    const struct pyjson *v = field(m, key);
    return !v || (buffer_printf(out, ", \"%s\": ", key) && pyjson_write_portable(v, out));
}

static bool put_message(const struct pyjson *m, size_t index, struct buffer *out, struct fault *f) {
    char name[48];
    snprintf(name, sizeof name, "messages[%zu]", index);
    if (m->type != PYJSON_OBJECT)
        return fault_set(f, 400, name, "%s: expected an object, found %s", name, pyjson_type_name(m));
    const struct pyjson *role = pyjson_get(m, "role");
    if (!role || role->type != PYJSON_STRING)
        return fault_set(f, 400, name, "%s: role must be a string, found %s", name, pyjson_type_name(role));
    bool developer = pyjson_is_text(role, "developer"); // OpenAI's newer name
    const char *reasoning = field(m, "reasoning_content") ? "reasoning_content" : "reasoning";
    bool ok = buffer_append_text(out, "{\"role\": ") &&
              pyjson_write_string(developer ? "system" : role->text, developer ? 6 : role->n_text, out) &&
              buffer_append_text(out, ", \"content\": ");
    if (!ok) return fault_set(f, 500, NULL, "out of memory");
    if (!put_content(pyjson_get(m, "content"), index, out, f)) return false;
    const struct pyjson *thought = field(m, reasoning);
    if (thought && thought->type == PYJSON_STRING)
        ok = buffer_append_text(out, ", \"reasoning_content\": ") && pyjson_write_portable(thought, out);
    ok = ok && put_member(m, "tool_calls", out) && buffer_append_byte(out, '}');
    return ok || fault_set(f, 500, NULL, "out of memory");
}

bool prompt_document(const struct chat_prompt *p, struct buffer *out, struct fault *f) {
    if (p->messages->n == 0) return fault_set(f, 400, "messages", "messages: expected at least one message");
    bool ok = buffer_append_text(out, "{\"messages\": [");
    size_t i = 0;
    for (const struct pyjson *m = p->messages->first; m; m = m->next, i++) {
        if (i && !buffer_append_text(out, ", ")) return fault_set(f, 500, NULL, "out of memory");
        if (!put_message(m, i, out, f)) return false;
    }
    ok = ok && buffer_append_byte(out, ']');
    if (p->tools && p->tools->n)
        ok = ok && buffer_append_text(out, ", \"tools\": ") && pyjson_write_portable(p->tools, out);
    return (ok && buffer_append_byte(out, '}')) || fault_set(f, 500, NULL, "out of memory");
}

bool prompt_check_tools(const struct pyjson *tools, struct fault *f) {
    size_t i = 0;
    if (tools->n > MAX_TOOLS) return fault_set(f, 400, "tools", "tools: at most %d, found %zu", MAX_TOOLS, tools->n);
    for (const struct pyjson *t = tools->first; t; t = t->next, i++) {
        const struct pyjson *function = pyjson_get(t, "function"), *name = pyjson_get(function, "name");
        const struct pyjson *parameters = field(function, "parameters");
        char param[48];
        snprintf(param, sizeof param, "tools[%zu]", i);
        if (!pyjson_is_text(pyjson_get(t, "type"), "function"))
            return fault_set(f, 400, param, "%s: type must be \"function\"", param);
        if (!function || function->type != PYJSON_OBJECT)
            return fault_set(f, 400, param, "%s: function must be an object, found %s", param,
                             pyjson_type_name(function));
        if (!name || name->type != PYJSON_STRING || name->n_text == 0 || name->n_text > 128 ||
            strlen(name->text) != name->n_text)
            return fault_set(f, 400, param, "%s: function.name must be a string of 1 to 128 bytes", param);
        if (parameters && parameters->type != PYJSON_OBJECT)
            return fault_set(f, 400, param, "%s: function.parameters must be an object, found %s", param,
                             pyjson_type_name(parameters));
    }
    return true;
}

// ---- Thinking

bool prompt_read_thinking(const struct pyjson *body, struct chat_prompt *p, struct fault *f) {
    const struct pyjson *kwargs = NULL;
    const char *effort = NULL;
    bool think = false, generate = false;
    p->enable_thinking = p->add_generation_prompt = -1;
    if (!field_typed(body, "chat_template_kwargs", PYJSON_OBJECT, &kwargs, f) ||
        !field_text(body, "reasoning_effort", &effort, f) || !field_bool(body, "enable_thinking", &think, f) ||
        !field_bool(body, "add_generation_prompt", &generate, f) ||
        !field_bool(body, "continue_final_message", &p->continues, f))
        return false;
    if (p->continues && generate)
        return fault_set(f, 400, "continue_final_message",
                         "continue_final_message: not with add_generation_prompt, which begins another message");
    if (effort) p->enable_thinking = strcmp(effort, "none") != 0;
    if (field(body, "enable_thinking")) p->enable_thinking = think;
    if (field(body, "add_generation_prompt")) p->add_generation_prompt = generate;
    if (!kwargs) return true;
    if (!field_bool(kwargs, "enable_thinking", &think, f)) return false;
    if (field(kwargs, "enable_thinking")) p->enable_thinking = think;
    return true;
}

struct template_options prompt_options(const struct server *s, const struct chat_prompt *p) {
    return (struct template_options){.enable_thinking = p->enable_thinking >= 0 ? p->enable_thinking : s->options.think,
                                     .add_generation_prompt = p->add_generation_prompt,
                                     .continues = p->continues};
}

// Whether the message that is to be continued has come no further than its thinking.
static bool continues_thinking(const struct chat_prompt *p) {
    const struct pyjson *last = p->messages->first;
    while (last && last->next) last = last->next;
    const struct pyjson *thought = field(last, "reasoning_content"), *content = field(last, "content");
    if (!thought) thought = field(last, "reasoning");
    bool empty = !content || (content->type == PYJSON_STRING && content->n_text == 0);
    return empty && thought && thought->type == PYJSON_STRING && thought->n_text;
}

// The last soft switch in one message: 1 /think, 0 /no_think, -1 none.
static int soft_switch(const struct pyjson *content) {
    if (!content || content->type != PYJSON_STRING) return -1;
    int last = -1;
    for (const char *at = content->text; (at = strchr(at, '/')) != NULL; at++) {
        if (strncmp(at, "/think", 6) == 0) last = 1;
        else if (strncmp(at, "/no_think", 9) == 0) last = 0;
    }
    return last;
}

bool prompt_thinks(const struct server *s, const struct chat_prompt *p) {
    enum template_kind kind = s->engine->template_kind;
    if (!template_has_thinking(kind)) return false;
    if (p->continues) return continues_thinking(p);
    if (template_opens_thinking(kind)) return true;
    if (template_can_hush(kind) && prompt_options(s, p).enable_thinking == 0) return false;
    int latest = -1;
    for (const struct pyjson *m = p->messages->first; m; m = m->next) {
        const struct pyjson *role = pyjson_get(m, "role");
        if (!pyjson_is_text(role, "user") && !pyjson_is_text(role, "system")) continue;
        int here = soft_switch(pyjson_get(m, "content"));
        if (here >= 0) latest = here;
    }
    return latest != 0;
}

bool prompt_may_think(const struct server *s, const struct chat_prompt *p) {
    return !p->continues && prompt_thinks(s, p) && !template_opens_thinking(s->engine->template_kind);
}

// ---- Ids

bool prompt_ids(struct server *s, uint64_t tenant, const struct chat_prompt *p, struct token_ids *ids,
                struct fault *f) {
    struct buffer text = {0};
    struct error err = {0};
    struct template_document *doc = NULL;
    bool ok = prompt_document(p, &text, f);
    if (ok) {
        doc = template_parse(buffer_text(&text), text.len, "messages", &err);
        ok = doc && replies_render(s->replies, tenant, s->engine, doc, prompt_options(s, p), ids, &err);
        if (!ok) fault_set(f, 400, "messages", "%s", err.text);
    }
    template_document_free(doc);
    buffer_free(&text);
    return ok;
}

// Whether the last turn of a prompt ends within its thinking.
static bool ends_in_thinking(const struct tokenizer *tok, const struct token_ids *ids) {
    int32_t open = tokenizer_find(tok, "<think>"), close = tokenizer_find(tok, "</think>");
    for (size_t i = ids->n; i-- > 0;) {
        if (ids->ids[i] == open) return true;
        if (ids->ids[i] == close || tokenizer_is_special(tok, ids->ids[i])) return false;
    }
    return false;
}

bool prompt_into(struct generation *g, const struct chat_prompt *p, struct fault *f) {
    struct token_ids ids = {0};
    enum template_kind kind = g->s->engine->template_kind;
    if (p->continues && g->automaton && !g->constrains_calls)
        return fault_set(f, 400, "messages",
                         "messages: the last message cannot be continued in a form that the whole answer must have "
                         "(structured output, or a tool that must be called)");
    bool ok = prompt_ids(g->s, g->x->tenant, p, &ids, f) && prompt_fits(g->s, ids.n, f);
    g->splits_thinking = template_has_thinking(kind);
    g->starts_in_thinking = template_opens_thinking(kind) && p->add_generation_prompt != 0;
    if (ok && p->continues)
        g->splits_thinking = g->starts_in_thinking =
            template_has_thinking(kind) && ends_in_thinking(g->s->engine->tokenizer, &ids);
    ok = ok && (generation_add_part(g, &ids) || fault_set(f, 500, NULL, "out of memory"));
    token_ids_free(&ids);
    return ok;
}
