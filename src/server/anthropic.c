// anthropic.c: Anthropic's /v1/messages and /v1/messages/count_tokens. Messages are turned into OpenAI's form first, so
// that prompts are made in one place.
#include "server/format.h"

#include "base/size.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- Messages into OpenAI's form

static bool no_memory(struct fault *f) {
    return fault_set(f, 500, NULL, "out of memory");
}

static bool take_text(const struct pyjson *v, const char *name, struct buffer *out, struct fault *f);

// One block's text: a text, a document that is text, or the name of a tool that was found. Others are an error.
static bool take_block(const struct pyjson *b, const char *name, struct buffer *out, struct fault *f) {
    const struct pyjson *type = pyjson_get(b, "type"), *text = pyjson_get(b, "text");
    if (pyjson_is_text(type, "document")) {
        const struct pyjson *source = field(b, "source"), *kind = pyjson_get(source, "type");
        text = pyjson_is_text(kind, "text") ? pyjson_get(source, "data") : NULL;
        if (pyjson_is_text(kind, "content")) return take_text(field(source, "content"), name, out, f);
    } else if (pyjson_is_text(type, "tool_reference")) {
        text = pyjson_get(b, "tool_name");
    } else if (!pyjson_is_text(type, "text")) {
        text = NULL;
    }
    if (!text || text->type != PYJSON_STRING)
        return fault_set(f, 400, name, "%s: this model reads text only; a block has type \"%.40s\"", name,
                         type && type->type == PYJSON_STRING ? type->text : "?");
    return buffer_append(out, text->text, text->n_text) || no_memory(f);
}

// The text of a string or of an array of blocks, appended.
static bool take_text(const struct pyjson *v, const char *name, struct buffer *out, struct fault *f) {
    if (!v) return true;
    if (v->type == PYJSON_STRING) return buffer_append(out, v->text, v->n_text) || no_memory(f);
    if (v->type != PYJSON_ARRAY)
        return fault_set(f, 400, name, "%s: expected a string or an array of blocks, found %s", name,
                         pyjson_type_name(v));
    for (const struct pyjson *b = v->first; b; b = b->next)
        if (!take_block(b, name, out, f)) return false;
    return true;
}

// The system prompt. Claude Code puts a block in front that names the request, for its own billing: it would make every
// prompt differ from its first token on, and tells the model nothing.
static bool take_system(const struct pyjson *v, struct buffer *out, struct fault *f) {
    static const char billing[] = "x-anthropic-billing-header:";
    if (!v || v->type != PYJSON_ARRAY) return take_text(v, "system", out, f);
    for (const struct pyjson *b = v->first; b; b = b->next) {
        const struct pyjson *text = b == v->first ? pyjson_get(b, "text") : NULL;
        bool header = text && text->type == PYJSON_STRING && strncmp(text->text, billing, sizeof billing - 1) == 0;
        if (!header && !take_block(b, "system", out, f)) return false;
    }
    return true;
}

static bool put_text(struct buffer *out, const char *role, const struct buffer *text) {
    return buffer_printf(out, "%s{\"role\": \"%s\", \"content\": ", out->len > 1 ? ", " : "", role) &&
           pyjson_write_string(buffer_text(text), text->len, out);
}

// A user's blocks: results of tools become messages of their own, in front of the text.
static bool put_user(const struct pyjson *content, const char *name, struct buffer *out, struct fault *f) {
    struct buffer text = {0};
    bool ok = true, any = content && content->type == PYJSON_STRING, results = false;
    if (!content || content->type != PYJSON_ARRAY) {
        ok = take_text(content, name, &text, f);
        any = true;
    }
    for (const struct pyjson *b = content && content->type == PYJSON_ARRAY ? content->first : NULL; ok && b;
         b = b->next) {
        if (pyjson_is_text(pyjson_get(b, "type"), "tool_result")) {
            struct buffer result = {0};
            ok = take_text(field(b, "content"), name, &result, f) &&
                 ((put_text(out, "tool", &result) && buffer_append_byte(out, '}')) || no_memory(f));
            buffer_free(&result);
            results = true;
        } else {
            ok = take_block(b, name, &text, f);
            any = true;
        }
    }
    if (ok && (any || !results)) ok = (put_text(out, "user", &text) && buffer_append_byte(out, '}')) || no_memory(f);
    buffer_free(&text);
    return ok;
}

static bool put_assistant(const struct pyjson *content, const char *name, struct buffer *out, struct fault *f) {
    struct buffer text = {0}, thinking = {0}, calls = {0};
    bool ok = true;
    if (!content || content->type != PYJSON_ARRAY) ok = take_text(content, name, &text, f);
    for (const struct pyjson *b = content && content->type == PYJSON_ARRAY ? content->first : NULL; ok && b;
         b = b->next) {
        const struct pyjson *type = pyjson_get(b, "type"), *t = pyjson_get(b, "text"),
                            *thought = pyjson_get(b, "thinking");
        const struct pyjson *call = pyjson_get(b, "name"), *input = pyjson_get(b, "input");
        if (pyjson_is_text(type, "text") && t && t->type == PYJSON_STRING) {
            ok = buffer_append(&text, t->text, t->n_text) || no_memory(f);
        } else if (pyjson_is_text(type, "thinking") && thought && thought->type == PYJSON_STRING) {
            ok = buffer_append(&thinking, thought->text, thought->n_text) || no_memory(f);
        } else if (pyjson_is_text(type, "tool_use") && call && call->type == PYJSON_STRING && input &&
                   input->type == PYJSON_OBJECT) {
            ok = (buffer_append_text(&calls, calls.len ? ", " : "") &&
                  buffer_append_text(&calls, "{\"type\": \"function\", \"function\": {\"name\": ") &&
                  pyjson_write_portable(call, &calls) && buffer_append_text(&calls, ", \"arguments\": ") &&
                  pyjson_write_portable(input, &calls) && buffer_append_text(&calls, "}}")) ||
                 no_memory(f);
        } else if (!pyjson_is_text(type, "redacted_thinking")) {
            ok = fault_set(f, 400, name, "%s: expected text, thinking and tool_use blocks with their fields", name);
        }
    }
    ok = ok && (put_text(out, "assistant", &text) || no_memory(f));
    if (ok && thinking.len)
        ok = (buffer_append_text(out, ", \"reasoning_content\": ") &&
              pyjson_write_string(thinking.data, thinking.len, out)) ||
             no_memory(f);
    if (ok && calls.len)
        ok = (buffer_append_text(out, ", \"tool_calls\": [") && buffer_append(out, calls.data, calls.len) &&
              buffer_append_byte(out, ']')) ||
             no_memory(f);
    ok = ok && (buffer_append_byte(out, '}') || no_memory(f));
    buffer_free(&text);
    buffer_free(&thinking);
    buffer_free(&calls);
    return ok;
}

// What the system says between the messages, as Claude Code's reminders.
static bool put_system(const struct pyjson *content, const char *name, struct buffer *out, struct fault *f) {
    struct buffer text = {0};
    bool ok = take_text(content, name, &text, f) &&
              ((put_text(out, "system", &text) && buffer_append_byte(out, '}')) || no_memory(f));
    buffer_free(&text);
    return ok;
}

static const struct pyjson *parse(struct arena *arena, const struct buffer *text, struct fault *f) {
    struct error err = {0};
    const struct pyjson *v = pyjson_parse(arena, buffer_text(text), text->len, "messages", &err);
    if (!v) fault_set(f, 400, "messages", "%s", err.text);
    return v;
}

// An assistant's message at the end is the beginning of the answer, unless it called a tool.
static bool is_prefill(const struct pyjson *m) {
    const struct pyjson *content = pyjson_get(m, "content");
    if (!pyjson_is_text(pyjson_get(m, "role"), "assistant") || !pyjson_truthy(content)) return false;
    for (const struct pyjson *b = content && content->type == PYJSON_ARRAY ? content->first : NULL; b; b = b->next)
        if (pyjson_is_text(pyjson_get(b, "type"), "tool_use")) return false;
    return true;
}

static bool convert_messages(struct arena *arena, const struct pyjson *body, struct chat_prompt *p, struct fault *f) {
    const struct pyjson *list = NULL;
    struct buffer out = {0}, system = {0};
    if (!field_typed(body, "messages", PYJSON_ARRAY, &list, f)) return false;
    if (!list || list->n == 0) return fault_set(f, 400, "messages", "messages: expected at least one message");
    bool ok = buffer_append_byte(&out, '[') || no_memory(f);
    ok = ok && take_system(field(body, "system"), &system, f);
    if (ok && field(body, "system"))
        ok = (put_text(&out, "system", &system) && buffer_append_byte(&out, '}')) || no_memory(f);
    size_t i = 0;
    for (const struct pyjson *m = list->first; ok && m; m = m->next, i++) {
        char name[48];
        snprintf(name, sizeof name, "messages[%zu]", i);
        const struct pyjson *role = pyjson_get(m, "role"), *content = pyjson_get(m, "content");
        if (pyjson_is_text(role, "user")) ok = put_user(content, name, &out, f);
        else if (pyjson_is_text(role, "assistant")) ok = put_assistant(content, name, &out, f);
        else if (pyjson_is_text(role, "system")) ok = put_system(content, name, &out, f);
        else ok = fault_set(f, 400, name, "%s: role must be \"user\", \"assistant\" or \"system\"", name);
        p->continues = is_prefill(m);
    }
    ok = ok && (buffer_append_byte(&out, ']') || no_memory(f));
    if (ok) p->messages = parse(arena, &out, f);
    buffer_free(&out);
    buffer_free(&system);
    return ok && p->messages;
}

// Tools with a type of their own run on Anthropic's servers, or are known to its models alone: they are left out.
static bool convert_tools(struct arena *arena, const struct pyjson *body, struct chat_prompt *p, struct fault *f) {
    const struct pyjson *list = NULL;
    struct buffer out = {0};
    if (!field_typed(body, "tools", PYJSON_ARRAY, &list, f)) return false;
    if (!list || list->n == 0) return true;
    bool ok = buffer_append_byte(&out, '[');
    size_t i = 0;
    for (const struct pyjson *t = list->first; ok && t; t = t->next, i++) {
        const struct pyjson *name = field(t, "name"), *schema = field(t, "input_schema"),
                            *about = field(t, "description"), *strict = field(t, "strict");
        const struct pyjson *type = field(t, "type");
        if (!schema && type && type->type == PYJSON_STRING && strcmp(type->text, "custom") != 0) continue;
        if (!name || !schema) {
            fault_set(f, 400, "tools", "tools[%zu]: expected name and input_schema", i);
            buffer_free(&out);
            return false;
        }
        ok = buffer_printf(&out, "%s{\"type\": \"function\", \"function\": {\"name\": ", out.len > 1 ? ", " : "") &&
             pyjson_write_portable(name, &out);
        if (about) ok = ok && buffer_append_text(&out, ", \"description\": ") && pyjson_write_portable(about, &out);
        ok = ok && buffer_append_text(&out, ", \"parameters\": ") && pyjson_write_portable(schema, &out);
        if (strict) ok = ok && buffer_append_text(&out, ", \"strict\": ") && pyjson_write_portable(strict, &out);
        ok = ok && buffer_append_text(&out, "}}");
    }
    ok = ok && buffer_append_byte(&out, ']');
    if (ok) p->tools = parse(arena, &out, f);
    else no_memory(f);
    buffer_free(&out);
    return ok && p->tools && prompt_check_tools(p->tools, f);
}

// ---- Writing. Blocks of content are numbered in the order in which they come.

enum block { NO_BLOCK, THINKING, TEXT, TOOL_USE };

struct own {
    enum block open;
    size_t index; // of the open block, or of the next one
};

static bool put_usage(struct generation *g, struct buffer *out) {
    size_t cached = generation_cached_tokens(g);
    return buffer_printf(out,
                         "\"usage\": {\"input_tokens\": %zu, \"cache_creation_input_tokens\": 0, "
                         "\"cache_read_input_tokens\": %zu, \"output_tokens\": %zu}",
                         generation_prompt_tokens(g) - cached, cached, generation_output_tokens(g));
}

static bool open_message(struct generation *g, struct buffer *out) {
    const char *model = g->s->options.model_name;
    return buffer_printf(out, "{\"id\": \"%s\", \"type\": \"message\", \"role\": \"assistant\", \"model\": ", g->id) &&
           write_string(out, model, strlen(model)) && buffer_append_text(out, ", \"content\": [");
}

static bool put_stop(const struct choice *c, struct buffer *out) {
    const char *text = stream_stop_text(c->stream), *reason = "end_turn";
    if (text) reason = "stop_sequence";
    else if (strcmp(c->finish, "length") == 0) reason = "max_tokens";
    else if (strcmp(c->finish, "tool_calls") == 0) reason = "tool_use";
    return buffer_printf(out, "\"stop_reason\": \"%s\", \"stop_sequence\": ", reason) &&
           (text ? write_string(out, text, strlen(text)) : buffer_append_text(out, "null"));
}

static void tell(struct generation *g, const char *event, bool ok) {
    if (ok) generation_write(g, event, &g->scratch);
    else g->choices[0].failed = true;
}

static void messages_begin(struct generation *g) {
    buffer_clear(&g->scratch);
    tell(g, "message_start",
         buffer_append_text(&g->scratch, "{\"type\": \"message_start\", \"message\": ") &&
             open_message(g, &g->scratch) &&
             buffer_append_text(&g->scratch, "], \"stop_reason\": null, \"stop_sequence\": null, ") &&
             put_usage(g, &g->scratch) && buffer_append_text(&g->scratch, "}}"));
}

static bool open_delta(struct generation *g, const char *type) {
    struct own *own = g->own;
    buffer_clear(&g->scratch);
    return buffer_printf(&g->scratch,
                         "{\"type\": \"content_block_delta\", \"index\": %zu, \"delta\": {\"type\": \"%s\", ",
                         own->index, type);
}

static void close_block(struct generation *g) {
    struct own *own = g->own;
    if (own->open == NO_BLOCK) return;
    if (own->open == THINKING)
        tell(g, "content_block_delta",
             open_delta(g, "signature_delta") && buffer_append_text(&g->scratch, "\"signature\": \"tandem\"}}"));
    buffer_clear(&g->scratch);
    tell(g, "content_block_stop",
         buffer_printf(&g->scratch, "{\"type\": \"content_block_stop\", \"index\": %zu}", own->index));
    own->open = NO_BLOCK;
    own->index++;
}

static void open_block(struct generation *g, enum block kind) {
    struct own *own = g->own;
    if (own->open == kind) return;
    close_block(g);
    own->open = kind;
    buffer_clear(&g->scratch);
    tell(g, "content_block_start",
         buffer_printf(&g->scratch, "{\"type\": \"content_block_start\", \"index\": %zu, \"content_block\": %s}",
                       own->index,
                       kind == THINKING ? "{\"type\": \"thinking\", \"thinking\": \"\", \"signature\": \"\"}"
                                        : "{\"type\": \"text\", \"text\": \"\"}"));
}

static void messages_text(struct choice *c, enum stream_part part, const char *text, size_t n) {
    struct generation *g = c->g;
    bool thinking = part == STREAM_REASONING;
    open_block(g, thinking ? THINKING : TEXT);
    tell(g, "content_block_delta",
         open_delta(g, thinking ? "thinking_delta" : "text_delta") &&
             buffer_printf(&g->scratch, "\"%s\": ", thinking ? "thinking" : "text") &&
             write_string(&g->scratch, text, n) && buffer_append_text(&g->scratch, "}}"));
}

static void messages_call_begin(struct choice *c, size_t k) {
    struct generation *g = c->g;
    struct own *own = g->own;
    close_block(g);
    own->open = TOOL_USE;
    buffer_clear(&g->scratch);
    tell(g, "content_block_start",
         buffer_printf(
             &g->scratch,
             "{\"type\": \"content_block_start\", \"index\": %zu, \"content_block\": {\"type\": \"tool_use\", \"id\": "
             "\"%s\", \"name\": ",
             own->index, c->calls[k].id) &&
             write_string(&g->scratch, buffer_text(&c->calls[k].name), c->calls[k].name.len) &&
             buffer_append_text(&g->scratch, ", \"input\": {}}}"));
}

static void messages_call_arguments(struct choice *c, size_t k, const char *text, size_t n) {
    struct generation *g = c->g;
    (void)k;
    tell(g, "content_block_delta",
         open_delta(g, "input_json_delta") && buffer_append_text(&g->scratch, "\"partial_json\": ") &&
             write_string(&g->scratch, text, n) && buffer_append_text(&g->scratch, "}}"));
}

static void messages_call_end(struct choice *c, size_t k) {
    (void)k;
    close_block(c->g);
}

static void messages_choice_end(struct choice *c) {
    struct generation *g = c->g;
    close_block(g);
    buffer_clear(&g->scratch);
    tell(g, "message_delta",
         buffer_append_text(&g->scratch, "{\"type\": \"message_delta\", \"delta\": {") && put_stop(c, &g->scratch) &&
             buffer_append_text(&g->scratch, "}, ") && put_usage(g, &g->scratch) &&
             buffer_append_byte(&g->scratch, '}'));
}

static void messages_end(struct generation *g) {
    buffer_clear(&g->scratch);
    tell(g, "message_stop", buffer_append_text(&g->scratch, "{\"type\": \"message_stop\"}"));
}

static void messages_fail(struct generation *g, int status, const char *message) {
    buffer_clear(&g->scratch);
    tell(g, "error", error_json(&g->scratch, ANTHROPIC, status, NULL, NULL, message));
}

static void messages_whole(struct generation *g, struct buffer *out) {
    struct choice *c = &g->choices[0];
    const char *comma = "";
    bool ok = open_message(g, out);
    if (c->reasoning.len) {
        ok = ok && buffer_append_text(out, "{\"type\": \"thinking\", \"thinking\": ") &&
             write_string(out, c->reasoning.data, c->reasoning.len) &&
             buffer_append_text(out, ", \"signature\": \"tandem\"}");
        comma = ", ";
    }
    if (c->text.len) {
        ok = ok && buffer_printf(out, "%s{\"type\": \"text\", \"text\": ", comma) &&
             write_string(out, c->text.data, c->text.len) && buffer_append_byte(out, '}');
        comma = ", ";
    }
    for (size_t i = 0; ok && i < c->n_calls; i++, comma = ", ")
        ok = buffer_printf(out, "%s{\"type\": \"tool_use\", \"id\": \"%s\", \"name\": ", comma, c->calls[i].id) &&
             write_string(out, buffer_text(&c->calls[i].name), c->calls[i].name.len) &&
             buffer_append_text(out, ", \"input\": ") &&
             buffer_append(out, buffer_text(&c->calls[i].arguments), c->calls[i].arguments.len) &&
             buffer_append_byte(out, '}');
    if (!ok || !buffer_append_text(out, "], ") || !put_stop(c, out) || !buffer_append_text(out, ", ") ||
        !put_usage(g, out) || !buffer_append_byte(out, '}'))
        c->failed = true;
}

static const struct writer writer = {.begin = messages_begin,
                                     .text = messages_text,
                                     .call_begin = messages_call_begin,
                                     .call_arguments = messages_call_arguments,
                                     .call_end = messages_call_end,
                                     .choice_end = messages_choice_end,
                                     .end = messages_end,
                                     .fail = messages_fail,
                                     .whole = messages_whole};

// ---- The request

// Thinking is off unless the request enables it, as clients of this interface expect.
static bool read_thinking(const struct pyjson *body, struct chat_prompt *p, size_t *budget, struct fault *f) {
    const struct pyjson *thinking = NULL;
    int64_t n = -1;
    p->enable_thinking = 0;
    p->add_generation_prompt = -1;
    if (!field_typed(body, "thinking", PYJSON_OBJECT, &thinking, f)) return false;
    if (!thinking) return true;
    const struct pyjson *type = pyjson_get(thinking, "type");
    if (pyjson_is_text(type, "disabled")) return true;
    if (!pyjson_is_text(type, "enabled") && !pyjson_is_text(type, "adaptive"))
        return fault_set(f, 400, "thinking", "thinking: type must be \"enabled\", \"adaptive\" or \"disabled\"");
    p->enable_thinking = 1;
    if (!field_int(thinking, "budget_tokens", 0, INT32_MAX, &n, f)) return false;
    if (n >= 0) *budget = (size_t)n;
    return true;
}

static bool read_prompt(struct server *s, struct arena *arena, const struct pyjson *body, struct chat_prompt *p,
                        size_t *budget, struct fault *f) {
    return body && prompt_check_model(s, body, f) && convert_messages(arena, body, p, f) &&
           convert_tools(arena, body, p, f) && read_thinking(body, p, budget, f);
}

static bool read_messages(struct generation *g, struct fault *f) {
    const struct pyjson *body = prompt_body(g->x, &g->arena, f);
    struct chat_prompt p = {0};
    int64_t limit = -1;
    if (!read_prompt(g->s, &g->arena, body, &p, &g->think_budget, f) || !field_bool(body, "stream", &g->streams, f) ||
        !field_int(body, "max_tokens", 1, INT64_MAX, &limit, f) || !generation_read_stops(g, body, "stop_sequences", f))
        return false;
    if (limit < 0) return fault_set(f, 400, "max_tokens", "max_tokens: this field is required");
    g->max_tokens = (size_t)limit;
    generation_default_stop_ids(g); // a request has no field for them
    g->own = size_alloc_zero(1, sizeof(struct own));
    if (!g->own) return no_memory(f);
    g->may_think = prompt_may_think(g->s, &p);
    return format_read_anthropic(g, body, &p, f) && generation_read_sampling(g, body, prompt_thinks(g->s, &p), f) &&
           prompt_into(g, &p, f);
}

void handle_messages(struct exchange *x) {
    struct fault f = {0};
    struct generation *g = generation_create(x, &writer, "msg_");
    if (!g) return;
    if (read_messages(g, &f)) {
        generation_submit(g);
        return;
    }
    exchange_fault(x, &f);
    generation_free(g);
}

void handle_count_tokens(struct exchange *x) {
    struct arena arena = {0};
    struct fault f = {0};
    struct chat_prompt p = {0};
    struct token_ids ids = {0};
    struct buffer out = {0};
    size_t budget = 0;
    const struct pyjson *body = prompt_body(x, &arena, &f);
    if (read_prompt(x->server, &arena, body, &p, &budget, &f) && prompt_ids(x->server, x->tenant, &p, &ids, &f) &&
        buffer_printf(&out, "{\"input_tokens\": %zu}", ids.n))
        exchange_reply(x, 200, &out);
    else exchange_fault(x, &f);
    buffer_free(&out);
    token_ids_free(&ids);
    arena_free(&arena);
}
