// responses.c: OpenAI's /v1/responses, without state: nothing is stored, previous_response_id is refused. Items are
// turned into chat messages first.
#include "server/chat.h"
#include "server/format.h"
#include "server/responses_tools.h"

#include "base/size.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool no_memory(struct fault *f) {
    return fault_set(f, 500, NULL, "out of memory");
}

// ---- Items into chat messages

// What stands before the next message that an assistant's pieces (reasoning, text, calls) are gathered into.
struct gather {
    struct buffer *out;
    struct buffer reasoning, calls, text;
    bool open; // an assistant's message is being gathered
};

static bool flush(struct gather *a) {
    if (!a->open) return true;
    struct buffer *out = a->out;
    bool ok = buffer_printf(out, "%s{\"role\": \"assistant\", \"content\": ", out->len > 1 ? ", " : "") &&
              pyjson_write_string(buffer_text(&a->text), a->text.len, out);
    if (a->reasoning.len)
        ok = ok && buffer_append_text(out, ", \"reasoning_content\": ") &&
             pyjson_write_string(a->reasoning.data, a->reasoning.len, out);
    if (a->calls.len)
        ok = ok && buffer_append_text(out, ", \"tool_calls\": [") && buffer_append(out, a->calls.data, a->calls.len) &&
             buffer_append_byte(out, ']');
    buffer_clear(&a->reasoning);
    buffer_clear(&a->calls);
    buffer_clear(&a->text);
    a->open = false;
    return ok && buffer_append_byte(out, '}');
}

static bool add_parts(const struct pyjson *content, struct buffer *to, const char *name, struct fault *f) {
    if (!content || content->type == PYJSON_NULL) return true;
    if (content->type == PYJSON_STRING) return buffer_append(to, content->text, content->n_text) || no_memory(f);
    if (content->type != PYJSON_ARRAY)
        return fault_set(f, 400, name, "%s: expected a string or an array of parts, found %s", name,
                         pyjson_type_name(content));
    for (const struct pyjson *p = content->first; p; p = p->next) {
        const struct pyjson *type = pyjson_get(p, "type");
        const struct pyjson *text = pyjson_get(p, pyjson_is_text(type, "refusal") ? "refusal" : "text");
        if (!text || text->type != PYJSON_STRING)
            return fault_set(f, 400, name, "%s: this model reads text only; a part has type \"%.40s\"", name,
                             type && type->type == PYJSON_STRING ? type->text : "?");
        if (!buffer_append(to, text->text, text->n_text)) return no_memory(f);
    }
    return true;
}

static bool add_message(struct gather *a, const struct pyjson *item, const char *name, struct fault *f) {
    const struct pyjson *role = pyjson_get(item, "role"), *content = pyjson_get(item, "content");
    struct buffer text = {0};
    if (pyjson_is_text(role, "assistant")) {
        a->open = true;
        return add_parts(content, &a->text, name, f);
    }
    if (!pyjson_is_text(role, "user") && !pyjson_is_text(role, "system") && !pyjson_is_text(role, "developer"))
        return fault_set(f, 400, name, "%s: role must be user, assistant, system or developer", name);
    bool ok = (flush(a) || no_memory(f)) && add_parts(content, &text, name, f);
    ok = ok && ((buffer_printf(a->out, "%s{\"role\": \"%s\", \"content\": ", a->out->len > 1 ? ", " : "", role->text) &&
                 pyjson_write_string(buffer_text(&text), text.len, a->out) && buffer_append_byte(a->out, '}')) ||
                no_memory(f));
    buffer_free(&text);
    return ok;
}

// `own_name` NULL: the item's, as the model knows it.
static bool put_function(struct buffer *calls, const struct pyjson *item, const char *own_name) {
    const struct pyjson *namespace = field(item, "namespace");
    struct buffer name = {0};
    bool ok = own_name ? buffer_append_text(&name, own_name)
                       : responses_tool_name(namespace && namespace->type == PYJSON_STRING ? namespace : NULL,
                                             pyjson_get(item, "name"), &name);
    ok = ok && buffer_append_text(calls, calls->len ? ", " : "") &&
         buffer_append_text(calls, "{\"type\": \"function\", \"function\": {\"name\": ") &&
         pyjson_write_string(buffer_text(&name), name.len, calls) && buffer_append_text(calls, ", \"arguments\": ");
    buffer_free(&name);
    return ok;
}

static bool add_call(struct gather *a, const struct pyjson *item, const char *name, struct fault *f) {
    const struct pyjson *function = pyjson_get(item, "name"), *arguments = pyjson_get(item, "arguments");
    if (!function || function->type != PYJSON_STRING || !arguments || arguments->type != PYJSON_STRING)
        return fault_set(f, 400, name, "%s: a function_call needs name and arguments, strings", name);
    a->open = true;
    return (put_function(&a->calls, item, NULL) && pyjson_write_portable(arguments, &a->calls) &&
            buffer_append_text(&a->calls, "}}")) ||
           no_memory(f);
}

// Calls of tools that are no functions: local_shell_call with its action, custom_tool_call with its input.
static bool add_other_call(struct gather *a, const struct pyjson *item, const char *name, bool shell, struct fault *f) {
    const struct pyjson *function = pyjson_get(item, "name"), *input = pyjson_get(item, shell ? "action" : "input");
    if (!input || (shell ? input->type != PYJSON_OBJECT
                         : input->type != PYJSON_STRING || !function || function->type != PYJSON_STRING))
        return fault_set(f, 400, name,
                         "%s: a local_shell_call needs action, an object; a custom_tool_call name and input, strings",
                         name);
    a->open = true;
    bool ok = put_function(&a->calls, item, shell ? "local_shell" : NULL);
    if (shell) ok = ok && pyjson_write_portable(input, &a->calls) && buffer_append_text(&a->calls, "}}");
    else
        ok = ok && buffer_append_text(&a->calls, "{\"input\": ") && pyjson_write_portable(input, &a->calls) &&
             buffer_append_text(&a->calls, "}}}");
    return ok || no_memory(f);
}

static bool add_output(struct gather *a, const struct pyjson *item, const char *name, struct fault *f) {
    struct buffer text = {0};
    bool ok = (flush(a) || no_memory(f)) && add_parts(pyjson_get(item, "output"), &text, name, f);
    ok = ok && ((buffer_printf(a->out, "%s{\"role\": \"tool\", \"content\": ", a->out->len > 1 ? ", " : "") &&
                 pyjson_write_string(buffer_text(&text), text.len, a->out) && buffer_append_byte(a->out, '}')) ||
                no_memory(f));
    buffer_free(&text);
    return ok;
}

static bool add_item(struct gather *a, const struct pyjson *item, size_t i, struct fault *f) {
    char name[48];
    snprintf(name, sizeof name, "input[%zu]", i);
    const struct pyjson *type = field(item, "type");
    if (item->type != PYJSON_OBJECT)
        return fault_set(f, 400, name, "%s: expected an object, found %s", name, pyjson_type_name(item));
    if (!type || pyjson_is_text(type, "message")) return add_message(a, item, name, f);
    if (pyjson_is_text(type, "function_call")) return add_call(a, item, name, f);
    if (pyjson_is_text(type, "function_call_output") || pyjson_is_text(type, "custom_tool_call_output") ||
        pyjson_is_text(type, "local_shell_call_output"))
        return add_output(a, item, name, f);
    if (pyjson_is_text(type, "local_shell_call")) return add_other_call(a, item, name, true, f);
    if (pyjson_is_text(type, "custom_tool_call")) return add_other_call(a, item, name, false, f);
    // What a tool of OpenAI's servers did: its result stands in the message that follows.
    static const char *const hosted[] = {"web_search_call",       "file_search_call", "image_generation_call",
                                         "code_interpreter_call", "tool_search_call", "tool_search_output"};
    for (size_t k = 0; k < sizeof hosted / sizeof hosted[0]; k++)
        if (pyjson_is_text(type, hosted[k])) return true;
    if (pyjson_is_text(type, "reasoning")) {
        a->open = true;
        return add_parts(field(item, "content"), &a->reasoning, name, f);
    }
    return fault_set(f, 400, name, "%s: items of type \"%.40s\" are not supported", name,
                     type->type == PYJSON_STRING ? type->text : "?");
}

static bool convert_input(struct arena *arena, const struct pyjson *body, struct chat_prompt *p, struct fault *f) {
    const struct pyjson *input = field(body, "input");
    const char *instructions = NULL;
    struct buffer out = {0};
    struct gather a = {.out = &out};
    struct error err = {0};
    if (!field_text(body, "instructions", &instructions, f)) return false;
    if (!input || (input->type != PYJSON_STRING && input->type != PYJSON_ARRAY))
        return fault_set(f, 400, "input", "input: expected a string or an array of items, found %s",
                         pyjson_type_name(input));
    bool ok = buffer_append_byte(&out, '[');
    if (instructions)
        ok = ok && buffer_append_text(&out, "{\"role\": \"system\", \"content\": ") &&
             pyjson_write_string(instructions, strlen(instructions), &out) && buffer_append_byte(&out, '}');
    if (!ok) no_memory(f);
    size_t i = 0;
    if (input->type == PYJSON_STRING) {
        ok = ok && ((buffer_printf(&out, "%s{\"role\": \"user\", \"content\": ", out.len > 1 ? ", " : "") &&
                     pyjson_write_string(input->text, input->n_text, &out) && buffer_append_byte(&out, '}')) ||
                    no_memory(f));
    } else {
        for (const struct pyjson *item = input->first; ok && item; item = item->next, i++)
            ok = add_item(&a, item, i, f);
        ok = ok && (flush(&a) || no_memory(f));
    }
    ok = ok && (buffer_append_byte(&out, ']') || no_memory(f));
    if (ok && !(p->messages = pyjson_parse(arena, buffer_text(&out), out.len, "input", &err)))
        ok = fault_set(f, 400, "input", "%s", err.text);
    buffer_free(&out);
    buffer_free(&a.reasoning);
    buffer_free(&a.calls);
    buffer_free(&a.text);
    return ok;
}

// ---- Writing

enum item { NO_ITEM, REASONING, MESSAGE, CALL };

struct own {
    const struct pyjson *body;
    size_t sequence;
    enum item open;
    size_t index, start;            // output index of the open item; where its text begins in the choice's
    size_t logprobs, logprobs_sent; // where its log-probabilities begin, and those that no delta had yet
    bool in_call;                   // between <tool_call> and </tool_call>
    char item_id[48];
};

// Log-probabilities from one place of the list on.
static bool put_logprobs(const struct buffer *list, size_t from, struct buffer *out) {
    const char *text = buffer_text(list) + from;
    size_t n = list->len - from, comma = n > 2 && text[0] == ',' ? 2 : 0;
    return buffer_append_text(out, ", \"logprobs\": [") && buffer_append(out, text + comma, n - comma) &&
           buffer_append_byte(out, ']');
}

// Of the text alone: not of the thinking, of calls, or of the line breaks behind the thinking.
static void responses_token(struct choice *c, const tandem_event *e) {
    const tandem_engine *engine = c->g->s->engine;
    struct own *own = c->g->own;
    int32_t id = e->token.id;
    size_t n = 0;
    const char *bytes = tokenizer_token_bytes(engine->tokenizer, id, &n);
    bool opens = id == tokenizer_find(engine->tokenizer, "<tool_call>");
    bool closes = id == tokenizer_find(engine->tokenizer, "</tool_call>");
    if (c->g->has_tools && (opens || closes)) own->in_call = opens;
    bool mark = (c->g->has_tools && (opens || closes)) || id == tokenizer_find(engine->tokenizer, "</think>");
    if (c->thinking || own->in_call || mark || !bytes || engine_is_end(engine, id) ||
        tokenizer_is_special(engine->tokenizer, id) || (!c->text.len && !c->logprobs.len && strspn(bytes, "\n") == n))
        return;
    if (!openai_put_logprob(engine, e, &c->logprobs)) c->failed = true;
}

// `text` NULL: without its part.
static bool put_text_item(struct buffer *out, enum item kind, const char *id, const char *status, const char *text,
                          size_t n, const struct buffer *logprobs, size_t from) {
    bool ok =
        kind == REASONING
            ? buffer_printf(
                  out, "{\"type\": \"reasoning\", \"id\": \"%s\", \"status\": \"%s\", \"summary\": [], \"content\": [",
                  id, status)
            : buffer_printf(
                  out,
                  "{\"type\": \"message\", \"id\": \"%s\", \"status\": \"%s\", \"role\": \"assistant\", \"content\": [",
                  id, status);
    if (!text) return ok && buffer_append_text(out, "]}");
    ok = ok &&
         buffer_printf(out, "{\"type\": \"%s\", \"text\": ", kind == REASONING ? "reasoning_text" : "output_text") &&
         write_string(out, text, n);
    if (kind == MESSAGE)
        ok = ok && buffer_append_text(out, ", \"annotations\": []") && put_logprobs(logprobs, from, out);
    return ok && buffer_append_text(out, "}]}");
}

// `whole` false: what it is called with has not come yet.
static bool put_call_item(const struct generation *g, struct buffer *out, const struct call *call, const char *id,
                          const char *status, bool whole) {
    const struct pyjson *body = ((const struct own *)g->own)->body;
    struct responses_tool tool = responses_tool_find(body, buffer_text(&call->name), call->name.len);
    struct buffer input = {0};
    bool ok = !whole || (tool.is_custom ? responses_custom_input(&call->arguments, &input)
                                        : buffer_append(&input, buffer_text(&call->arguments), call->arguments.len));
    ok = ok &&
         buffer_printf(out, "{\"type\": \"%s\", \"id\": \"%s\", \"call_id\": \"%s\", \"status\": \"%s\", \"name\": ",
                       tool.is_custom ? "custom_tool_call" : "function_call", id, call->id, status) &&
         (tool.name ? write_string(out, tool.name->text, tool.name->n_text)
                    : write_string(out, buffer_text(&call->name), call->name.len)) &&
         (!tool.namespace || (buffer_append_text(out, ", \"namespace\": ") &&
                              write_string(out, tool.namespace->text, tool.namespace->n_text))) &&
         buffer_printf(out, ", \"%s\": ", tool.is_custom ? "input" : "arguments") &&
         write_string(out, buffer_text(&input), input.len) && buffer_append_byte(out, '}');
    buffer_free(&input);
    return ok;
}

static bool is_custom(const struct generation *g, const struct call *call) {
    const struct pyjson *body = ((const struct own *)g->own)->body;
    return responses_tool_find(body, buffer_text(&call->name), call->name.len).is_custom;
}

static bool put_echo(const struct pyjson *body, const char *key, const char *otherwise, struct buffer *out) {
    const struct pyjson *v = field(body, key);
    return buffer_printf(out, ", \"%s\": ", key) &&
           (v ? pyjson_write_portable(v, out) : buffer_append_text(out, otherwise));
}

static bool put_usage(struct generation *g, struct buffer *out) {
    size_t n_prompt = generation_prompt_tokens(g), n_output = generation_output_tokens(g);
    return buffer_printf(
        out,
        "{\"input_tokens\": %zu, \"input_tokens_details\": {\"cached_tokens\": %zu}, \"output_tokens\": %zu, "
        "\"output_tokens_details\": {\"reasoning_tokens\": %zu}, \"total_tokens\": %zu}",
        n_prompt, generation_cached_tokens(g), n_output, generation_reasoning_tokens(g), n_prompt + n_output);
}

static bool put_output(struct choice *c, struct buffer *out) {
    char id[48];
    const char *comma = "";
    bool ok = true;
    if (c->reasoning.len) {
        random_id(id, sizeof id, "rs_");
        ok = put_text_item(out, REASONING, id, "completed", c->reasoning.data, c->reasoning.len, NULL, 0);
        comma = ", ";
    }
    if (c->text.len || !c->n_calls) {
        random_id(id, sizeof id, "msg_");
        ok = ok && buffer_append_text(out, comma) &&
             put_text_item(out, MESSAGE, id, "completed", buffer_text(&c->text), c->text.len, &c->logprobs, 0);
        comma = ", ";
    }
    for (size_t i = 0; ok && i < c->n_calls; i++, comma = ", ") {
        random_id(id, sizeof id, is_custom(c->g, &c->calls[i]) ? "ctc_" : "fc_");
        ok = buffer_append_text(out, comma) && put_call_item(c->g, out, &c->calls[i], id, "completed", true);
    }
    return ok;
}

// The response object. `status`: in_progress, completed, incomplete, failed.
static bool put_response(struct generation *g, const char *status, const char *error, struct buffer *out) {
    const struct pyjson *body = ((struct own *)g->own)->body;
    const char *model = g->s->options.model_name;
    bool over = strcmp(status, "in_progress") != 0 && !error;
    bool ok =
        buffer_printf(out,
                      "{\"id\": \"%s\", \"object\": \"response\", \"created_at\": %ld, \"status\": \"%s\", \"model\": ",
                      g->id, g->created, status) &&
        write_string(out, model, strlen(model)) && buffer_append_text(out, ", \"output\": [") &&
        (!over || put_output(&g->choices[0], out)) && buffer_append_text(out, "], \"error\": ");
    if (error)
        ok = ok && buffer_append_text(out, "{\"code\": \"server_error\", \"message\": ") &&
             write_string(out, error, strlen(error)) && buffer_append_byte(out, '}');
    else ok = ok && buffer_append_text(out, "null");
    ok = ok &&
         buffer_printf(out, ", \"incomplete_details\": %s",
                       strcmp(status, "incomplete") == 0 ? "{\"reason\": \"max_output_tokens\"}" : "null") &&
         put_echo(body, "instructions", "null", out) && put_echo(body, "max_output_tokens", "null", out) &&
         put_echo(body, "metadata", "{}", out) && put_echo(body, "parallel_tool_calls", "true", out) &&
         put_echo(body, "reasoning", "{\"effort\": null, \"summary\": null}", out) &&
         put_echo(body, "text", "{\"format\": {\"type\": \"text\"}}", out) &&
         put_echo(body, "tool_choice", "\"auto\"", out) && put_echo(body, "tools", "[]", out) &&
         buffer_printf(out,
                       ", \"temperature\": %.17g, \"top_p\": %.17g, \"previous_response_id\": null, \"store\": false, "
                       "\"truncation\": \"disabled\", \"usage\": ",
                       g->sampling.temperature, g->sampling.top_p);
    if (over) ok = ok && put_usage(g, out);
    else ok = ok && buffer_append_text(out, "null");
    return ok && buffer_append_byte(out, '}');
}

static bool open_event(struct generation *g, const char *type) {
    struct own *own = g->own;
    buffer_clear(&g->scratch);
    return buffer_printf(&g->scratch, "{\"type\": \"%s\", \"sequence_number\": %zu", type, own->sequence++);
}

static void tell(struct generation *g, const char *type, bool ok) {
    if (ok && buffer_append_byte(&g->scratch, '}')) generation_write(g, type, &g->scratch);
    else g->choices[0].failed = true;
}

static void send_response(struct generation *g, const char *type, const char *status, const char *error) {
    tell(g, type,
         open_event(g, type) && buffer_append_text(&g->scratch, ", \"response\": ") &&
             put_response(g, status, error, &g->scratch));
}

static void responses_begin(struct generation *g) {
    send_response(g, "response.created", "in_progress", NULL);
    send_response(g, "response.in_progress", "in_progress", NULL);
}

// The fields that name the open item and its part.
static bool put_place(struct generation *g, bool part) {
    const struct own *own = g->own;
    return buffer_printf(&g->scratch, ", \"item_id\": \"%s\", \"output_index\": %zu%s", own->item_id, own->index,
                         part ? ", \"content_index\": 0" : "");
}

static const struct buffer *text_of(const struct choice *c, enum item kind) {
    return kind == REASONING ? &c->reasoning : &c->text;
}

// The whole of what a call is called with. Free text comes in one piece: as JSON it had come escaped.
static void tell_call(struct generation *g, const struct call *call) {
    struct buffer *out = &g->scratch, input = {0};
    if (is_custom(g, call)) {
        const char *delta = "response.custom_tool_call_input.delta", *done = "response.custom_tool_call_input.done";
        bool ok = responses_custom_input(&call->arguments, &input);
        tell(g, delta,
             ok && open_event(g, delta) && put_place(g, false) && buffer_append_text(out, ", \"delta\": ") &&
                 write_string(out, buffer_text(&input), input.len));
        tell(g, done,
             ok && open_event(g, done) && put_place(g, false) && buffer_append_text(out, ", \"input\": ") &&
                 write_string(out, buffer_text(&input), input.len));
        buffer_free(&input);
        return;
    }
    struct responses_tool tool =
        responses_tool_find(((struct own *)g->own)->body, buffer_text(&call->name), call->name.len);
    const char *type = "response.function_call_arguments.done";
    tell(g, type,
         open_event(g, type) && put_place(g, false) && buffer_append_text(out, ", \"name\": ") &&
             (tool.name ? write_string(out, tool.name->text, tool.name->n_text)
                        : write_string(out, buffer_text(&call->name), call->name.len)) &&
             buffer_append_text(out, ", \"arguments\": ") &&
             write_string(out, buffer_text(&call->arguments), call->arguments.len));
}

static void close_item(struct choice *c) {
    struct generation *g = c->g;
    struct own *own = g->own;
    struct buffer *out = &g->scratch;
    bool thinking = own->open == REASONING;
    if (own->open == NO_ITEM) return;
    const char *done = "response.output_item.done";
    if (own->open == CALL) {
        const struct call *call = &c->calls[c->n_calls - 1];
        tell_call(g, call);
        tell(g, done,
             open_event(g, done) && buffer_printf(out, ", \"output_index\": %zu, \"item\": ", own->index) &&
                 put_call_item(g, out, call, own->item_id, "completed", true));
    } else {
        const char *text = buffer_text(text_of(c, own->open)) + own->start;
        size_t n = text_of(c, own->open)->len - own->start;
        const char *type = thinking ? "response.reasoning_text.done" : "response.output_text.done";
        tell(g, type,
             open_event(g, type) && put_place(g, true) && buffer_append_text(out, ", \"text\": ") &&
                 write_string(out, text, n) && (thinking || put_logprobs(&c->logprobs, own->logprobs, out)));
        type = "response.content_part.done";
        tell(g, type,
             open_event(g, type) && put_place(g, true) &&
                 buffer_printf(
                     out, ", \"part\": {\"type\": \"%s\", \"text\": ", thinking ? "reasoning_text" : "output_text") &&
                 write_string(out, text, n) &&
                 (thinking || (buffer_append_text(out, ", \"annotations\": []") &&
                               put_logprobs(&c->logprobs, own->logprobs, out))) &&
                 buffer_append_byte(out, '}'));
        tell(g, done,
             open_event(g, done) && buffer_printf(out, ", \"output_index\": %zu, \"item\": ", own->index) &&
                 put_text_item(out, own->open, own->item_id, "completed", text, n, &c->logprobs, own->logprobs));
        if (!thinking) own->logprobs = own->logprobs_sent = c->logprobs.len;
    }
    own->open = NO_ITEM;
    own->index++;
}

// `before`: the bytes of the text that came with this piece, which is in the choice's buffer already.
static void open_text_item(struct choice *c, enum item kind, size_t before) {
    struct generation *g = c->g;
    struct own *own = g->own;
    bool thinking = kind == REASONING;
    if (own->open == kind) return;
    close_item(c);
    own->open = kind;
    own->start = text_of(c, kind)->len - before;
    random_id(own->item_id, sizeof own->item_id, thinking ? "rs_" : "msg_");
    tell(g, "response.output_item.added",
         open_event(g, "response.output_item.added") &&
             buffer_printf(&g->scratch, ", \"output_index\": %zu, \"item\": ", own->index) &&
             put_text_item(&g->scratch, kind, own->item_id, "in_progress", NULL, 0, NULL, 0));
    tell(g, "response.content_part.added",
         open_event(g, "response.content_part.added") && put_place(g, true) &&
             buffer_printf(&g->scratch, ", \"part\": {\"type\": \"%s\", \"text\": \"\"%s}",
                           thinking ? "reasoning_text" : "output_text",
                           thinking ? "" : ", \"annotations\": [], \"logprobs\": []"));
}

static void responses_text(struct choice *c, enum stream_part part, const char *text, size_t n) {
    struct generation *g = c->g;
    struct own *own = g->own;
    bool thinking = part == STREAM_REASONING;
    open_text_item(c, thinking ? REASONING : MESSAGE, n);
    const char *type = thinking ? "response.reasoning_text.delta" : "response.output_text.delta";
    tell(g, type,
         open_event(g, type) && put_place(g, true) && buffer_append_text(&g->scratch, ", \"delta\": ") &&
             write_string(&g->scratch, text, n) &&
             (thinking || put_logprobs(&c->logprobs, own->logprobs_sent, &g->scratch)));
    if (!thinking) own->logprobs_sent = c->logprobs.len;
}

static void responses_call_begin(struct choice *c, size_t k) {
    struct generation *g = c->g;
    struct own *own = g->own;
    struct call next = c->calls[k];
    c->n_calls = k; // what is open is an earlier item
    close_item(c);
    c->n_calls = k + 1;
    own->open = CALL;
    random_id(own->item_id, sizeof own->item_id, is_custom(g, &next) ? "ctc_" : "fc_");
    tell(g, "response.output_item.added",
         open_event(g, "response.output_item.added") &&
             buffer_printf(&g->scratch, ", \"output_index\": %zu, \"item\": ", own->index) &&
             put_call_item(g, &g->scratch, &next, own->item_id, "in_progress", false));
}

static void responses_call_arguments(struct choice *c, size_t k, const char *text, size_t n) {
    struct generation *g = c->g;
    const char *type = "response.function_call_arguments.delta";
    if (is_custom(g, &c->calls[k])) return;
    tell(g, type,
         open_event(g, type) && put_place(g, false) && buffer_append_text(&g->scratch, ", \"delta\": ") &&
             write_string(&g->scratch, text, n));
}

static void responses_call_end(struct choice *c, size_t k) {
    (void)k;
    close_item(c);
}

static void responses_choice_end(struct choice *c) {
    if (c->text.len == 0 && c->n_calls == 0) open_text_item(c, MESSAGE, 0); // an answer has a message, if an empty one
    close_item(c);
}

static const char *status_of(const struct generation *g) {
    return strcmp(g->choices[0].finish, "length") == 0 ? "incomplete" : "completed";
}

static void responses_end(struct generation *g) {
    bool whole = strcmp(status_of(g), "completed") == 0;
    send_response(g, whole ? "response.completed" : "response.incomplete", status_of(g), NULL);
}

static void responses_fail(struct generation *g, int status, const char *message) {
    (void)status;
    send_response(g, "response.failed", "failed", message);
}

static void responses_whole(struct generation *g, struct buffer *out) {
    if (!put_response(g, status_of(g), NULL, out)) g->choices[0].failed = true;
}

static const struct writer writer = {.begin = responses_begin,
                                     .text = responses_text,
                                     .call_begin = responses_call_begin,
                                     .call_arguments = responses_call_arguments,
                                     .call_end = responses_call_end,
                                     .choice_end = responses_choice_end,
                                     .end = responses_end,
                                     .fail = responses_fail,
                                     .whole = responses_whole,
                                     .token = responses_token};

// ---- The request

static bool read_logprobs(struct generation *g, const struct pyjson *body, struct fault *f) {
    const struct pyjson *include = NULL;
    int64_t n_top = 0;
    if (!field_typed(body, "include", PYJSON_ARRAY, &include, f) || !field_int(body, "top_logprobs", 0, 20, &n_top, f))
        return false;
    for (const struct pyjson *i = include ? include->first : NULL; i; i = i->next)
        if (pyjson_is_text(i, "message.output_text.logprobs")) g->logprobs = true;
    g->logprobs = g->logprobs || n_top > 0;
    g->n_top = (size_t)n_top;
    return true;
}

static bool read_responses(struct generation *g, struct fault *f) {
    const struct pyjson *body = prompt_body(g->x, &g->arena, f), *reasoning = NULL;
    struct chat_prompt p = {0};
    const char *effort = NULL;
    int64_t limit = -1;
    bool background = false;
    bool ok = body && prompt_check_model(g->s, body, f) && convert_input(&g->arena, body, &p, f) &&
              responses_tools(&g->arena, body, &p.tools, f) && prompt_read_thinking(body, &p, f) &&
              field_typed(body, "reasoning", PYJSON_OBJECT, &reasoning, f) &&
              field_bool(body, "stream", &g->streams, f) && field_bool(body, "background", &background, f) &&
              field_int(body, "max_output_tokens", 1, INT64_MAX, &limit, f);
    if (!ok || !read_logprobs(g, body, f) || (reasoning && !field_text(reasoning, "effort", &effort, f))) return false;
    if (effort && p.enable_thinking < 0) p.enable_thinking = strcmp(effort, "none") != 0;
    if (background) return fault_set(f, 400, "background", "background: not supported");
    if (field(body, "previous_response_id"))
        return fault_set(f, 400, "previous_response_id",
                         "previous_response_id: nothing is stored here; send the whole conversation");
    if (field(body, "conversation")) return fault_set(f, 400, "conversation", "conversation: nothing is stored here");
    g->max_tokens = limit < 0 ? g->s->options.max_tokens : (size_t)limit;
    struct own *own = g->own = size_alloc_zero(1, sizeof *own);
    if (!own) return no_memory(f);
    own->body = body;
    g->may_think = prompt_may_think(g->s, &p);
    return format_read_responses(g, body, &p, f) && generation_read_sampling(g, body, prompt_thinks(g->s, &p), f) &&
           prompt_into(g, &p, f);
}

void handle_responses(struct exchange *x) {
    struct fault f = {0};
    struct generation *g = generation_create(x, &writer, "resp_");
    if (g) openai_start(g, read_responses(g, &f), &f);
}
