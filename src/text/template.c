// template.c: from a conversation to the prompt text. It owns the check of what a message may hold and one renderer a
// template; documents are template_document.c's, names and recognition template_kind.c's.
#include "text/template.h"

#include "base/size.h"
#include "text/template_document.h"

#include <stdlib.h>
#include <string.h>

enum role { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL };
static const char *const role_names[] = {"system", "user", "assistant", "tool"};

struct text {
    const char *s; // [n], NUL may occur inside
    size_t n;
};

// A message after its check.
struct message {
    enum role role;
    struct text content, reasoning;
    bool has_reasoning;              // reasoning_content was given
    const struct pyjson *tool_calls; // a non-empty array of calls that were checked, or NULL
};

struct render {
    enum template_kind kind;
    struct message *messages; // [n]
    size_t n;
    const struct pyjson *tools; // a non-empty array, or NULL
    bool hush, add_generation_prompt;
    struct buffer *out;
    struct template_marks *marks; // or NULL
    bool no_memory;               // some append failed; the ones behind it did nothing
    struct error *err;
};

// What the text pieces of a template have in common.
static const char tools_head[] = "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
                                 "You are provided with function signatures within <tools></tools> XML tags:\n<tools>";
static const char tools_foot[] =
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n"
    "</tool_call>";
static const char qwen25_system[] = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
static const char qwen2_system[] = "You are a helpful assistant.";
static const char smollm2_system[] = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

// ---- text as Python's str has it

static bool starts_with(struct text t, const char *head) {
    size_t n = strlen(head);
    return t.n >= n && memcmp(t.s, head, n) == 0;
}

static bool ends_with(struct text t, const char *tail) {
    size_t n = strlen(tail);
    return t.n >= n && memcmp(t.s + t.n - n, tail, n) == 0;
}

static struct text strip_left(struct text t) { // lstrip('\n')
    while (t.n && *t.s == '\n') t = (struct text){t.s + 1, t.n - 1};
    return t;
}

static struct text strip_right(struct text t) { // rstrip('\n')
    while (t.n && t.s[t.n - 1] == '\n') t.n--;
    return t;
}

static const char *find(struct text t, const char *what) {
    return t.n ? memmem(t.s, t.n, what, strlen(what)) : NULL;
}

static struct text before_first(struct text t, const char *mark) { // split(mark)[0]
    const char *at = find(t, mark);
    return at ? (struct text){t.s, (size_t)(at - t.s)} : t;
}

static struct text after_last(struct text t, const char *mark) { // split(mark)[-1]
    for (const char *at; (at = find(t, mark));) {
        const char *behind = at + strlen(mark);
        t = (struct text){behind, (size_t)(t.s + t.n - behind)};
    }
    return t;
}

// ---- the check

static bool check_text(const struct pyjson *message, size_t index, const char *key, struct text *out, bool *given,
                       struct error *err) {
    const struct pyjson *v = pyjson_get(message, key);
    *given = v && v->type == PYJSON_STRING;
    *out = *given ? (struct text){v->text, v->n_text} : (struct text){"", 0};
    if (!v || *given || v->type == PYJSON_NULL) return true;
    return error_set(err, "message %zu: %s must be a string or null, found %s", index, key, pyjson_type_name(v));
}

// The object that holds the name and the arguments of a call. The two families differ in when they look into
// "function": Qwen3 when it is not empty, Qwen2.5 when it is there.
static const struct pyjson *call_body(enum template_kind kind, const struct pyjson *call) {
    const struct pyjson *function = pyjson_get(call, "function");
    bool inside = kind == TEMPLATE_QWEN25 ? function != NULL : pyjson_truthy(function);
    return inside ? function : call;
}

static bool check_tool_calls(enum template_kind kind, const struct pyjson *calls, size_t index, struct error *err) {
    size_t i = 0;
    for (const struct pyjson *call = calls->first; call; call = call->next, i++) {
        if (call->type != PYJSON_OBJECT)
            return error_set(err, "message %zu: tool_calls[%zu] must be an object, found %s", index, i,
                             pyjson_type_name(call));
        const struct pyjson *type = pyjson_get(call, "type");
        if (type && type->type != PYJSON_NULL && !pyjson_is_text(type, "function"))
            return error_set(err, "message %zu: tool_calls[%zu].type must be \"function\", found %s%.100s", index, i,
                             type->type == PYJSON_STRING ? "" : pyjson_type_name(type),
                             type->type == PYJSON_STRING ? type->text : "");
        const struct pyjson *body = call_body(kind, call);
        if (body->type != PYJSON_OBJECT)
            return error_set(err, "message %zu: tool_calls[%zu].function must be an object, found %s", index, i,
                             pyjson_type_name(body));
        const struct pyjson *name = pyjson_get(body, "name");
        if (!name || name->type != PYJSON_STRING)
            return error_set(err, "message %zu: tool_calls[%zu] needs a name that is a string, found %s", index, i,
                             pyjson_type_name(name));
        if (!pyjson_get(body, "arguments"))
            return error_set(err, "message %zu: tool_calls[%zu] has no arguments", index, i);
    }
    return true;
}

static bool check_message(enum template_kind kind, const struct pyjson *v, size_t index, struct message *m,
                          struct error *err) {
    if (v->type != PYJSON_OBJECT)
        return error_set(err, "message %zu must be an object, found %s", index, pyjson_type_name(v));
    const struct pyjson *role = pyjson_get(v, "role");
    if (!role || role->type != PYJSON_STRING)
        return error_set(err, "message %zu: role must be a string, found %s", index, pyjson_type_name(role));
    size_t r = 0;
    while (r < 4 && !pyjson_is_text(role, role_names[r])) r++;
    if (r == 4)
        return error_set(err,
                         "message %zu: unknown role \"%.100s\"; template %s knows system, user, assistant and tool",
                         index, role->text, template_name(kind));
    m->role = (enum role)r;
    bool has_content;
    if (!check_text(v, index, "content", &m->content, &has_content, err) ||
        !check_text(v, index, "reasoning_content", &m->reasoning, &m->has_reasoning, err))
        return false;
    const struct pyjson *calls = pyjson_get(v, "tool_calls");
    if (calls && calls->type != PYJSON_ARRAY && calls->type != PYJSON_NULL)
        return error_set(err, "message %zu: tool_calls must be an array, found %s", index, pyjson_type_name(calls));
    m->tool_calls = pyjson_truthy(calls) ? calls : NULL;
    if (!m->tool_calls) {
        if (!pyjson_get(v, "content")) return error_set(err, "message %zu has no content", index);
        return true;
    }
    if (m->role != ROLE_ASSISTANT)
        return error_set(err, "message %zu: only an assistant may have tool_calls, this is a %s", index, role_names[r]);
    if (!template_has_tools(kind))
        return error_set(err, "message %zu: template %s has no rule for tool_calls", index, template_name(kind));
    return check_tool_calls(kind, m->tool_calls, index, err);
}

static bool check(struct render *r, const struct template_document *doc) {
    if (r->kind == TEMPLATE_UNKNOWN)
        return error_set(r->err, "the model's chat template is none that tandem knows (%s)", template_names());
    r->n = doc->messages->n;
    if (r->n == 0) return error_set(r->err, "the conversation has no messages");
    r->messages = size_alloc_zero(r->n, sizeof *r->messages);
    if (!r->messages) return error_set(r->err, "out of memory for %zu messages", r->n);
    size_t i = 0;
    for (const struct pyjson *v = doc->messages->first; v; v = v->next, i++)
        if (!check_message(r->kind, v, i, &r->messages[i], r->err)) return false;
    r->tools = pyjson_truthy(doc->tools) ? doc->tools : NULL;
    if (r->tools && !template_has_tools(r->kind))
        return error_set(r->err, "template %s has no rule for tools", template_name(r->kind));
    i = 0;
    for (const struct pyjson *tool = r->tools ? r->tools->first : NULL; tool; tool = tool->next, i++)
        if (tool->type != PYJSON_OBJECT)
            return error_set(r->err, "tools[%zu] must be an object, found %s", i, pyjson_type_name(tool));
    return true;
}

// ---- output

static void put(struct render *r, struct text t) {
    if (!r->no_memory) r->no_memory = !buffer_append(r->out, t.s, t.n);
}

static void put_string(struct render *r, const char *s) {
    put(r, (struct text){s, strlen(s)});
}

static void put_json(struct render *r, const struct pyjson *v) {
    if (!r->no_memory) r->no_memory = !pyjson_write(v, r->out);
}

// The text of a special token, with its mark.
static void put_special(struct render *r, const char *token) {
    struct template_marks *list = r->marks;
    if (list && list->n == list->cap) {
        size_t cap = list->cap ? list->cap * 2 : 16;
        struct template_mark *grown = size_realloc(list->marks, cap, sizeof *grown);
        if (!grown) {
            r->no_memory = true;
            return;
        }
        list->marks = grown;
        list->cap = cap;
    }
    size_t offset = r->out->len;
    put_string(r, token);
    if (list && !r->no_memory) list->marks[list->n++] = (struct template_mark){offset, strlen(token)};
}

static void open_turn(struct render *r, enum role role) {
    put_special(r, "<|im_start|>");
    put_string(r, role_names[role]);
}

static void close_turn(struct render *r) {
    put_special(r, "<|im_end|>");
    put_string(r, "\n");
}

static void put_turn(struct render *r, enum role role, struct text content) {
    open_turn(r, role);
    put_string(r, "\n");
    put(r, content);
    close_turn(r);
}

static void put_tools(struct render *r) {
    put_string(r, tools_head);
    for (const struct pyjson *tool = r->tools->first; tool; tool = tool->next) {
        put_string(r, "\n");
        put_json(r, tool);
    }
    put_string(r, tools_foot);
}

// ---- the templates

static bool has_system(const struct render *r) {
    return r->messages[0].role == ROLE_SYSTEM;
}

static void put_call(struct render *r, const struct pyjson *call) {
    const struct pyjson *body = call_body(r->kind, call);
    const struct pyjson *name = pyjson_get(body, "name"), *arguments = pyjson_get(body, "arguments");
    put_string(r, "<tool_call>\n{\"name\": \"");
    put(r, (struct text){name->text, name->n_text});
    put_string(r, "\", \"arguments\": ");
    // Qwen3 takes a string for JSON that is ready; Qwen2.5 writes it as a JSON string.
    if (arguments->type == PYJSON_STRING && r->kind != TEMPLATE_QWEN25)
        put(r, (struct text){arguments->text, arguments->n_text});
    else put_json(r, arguments);
    put_string(r, "}\n</tool_call>");
}

// Results of tools that follow each other share one user turn.
static void put_tool_result(struct render *r, size_t i) {
    if (i == 0 || r->messages[i - 1].role != ROLE_TOOL) open_turn(r, ROLE_USER);
    put_string(r, "\n<tool_response>\n");
    put(r, r->messages[i].content);
    put_string(r, "\n</tool_response>");
    if (i + 1 == r->n || r->messages[i + 1].role != ROLE_TOOL) close_turn(r);
}

static void put_qwen3_assistant(struct render *r, const struct message *m, bool after_query, bool is_last) {
    struct text content = m->content, reasoning = m->reasoning;
    bool as_it_is = r->kind == TEMPLATE_QWEN3_INSTRUCT_2507;
    if (!as_it_is && !m->has_reasoning && find(content, "</think>")) {
        reasoning = strip_right(before_first(content, "</think>"));
        reasoning = strip_left(after_last(reasoning, "<think>"));
        content = strip_left(after_last(content, "</think>"));
    }
    open_turn(r, ROLE_ASSISTANT);
    put_string(r, "\n");
    if (!as_it_is && after_query && (reasoning.n || (is_last && r->kind != TEMPLATE_QWEN3_INSTRUCT_REASONING))) {
        put_string(r, "<think>\n");
        put(r, strip_right(strip_left(reasoning)));
        put_string(r, "\n</think>\n\n");
        put(r, strip_left(content));
    } else {
        put(r, content);
    }
    for (const struct pyjson *call = m->tool_calls ? m->tool_calls->first : NULL; call; call = call->next) {
        if (content.n || call != m->tool_calls->first) put_string(r, "\n");
        put_call(r, call);
    }
    close_turn(r);
}

// The last message of a user that is no tool result in disguise; the last message where there is none.
static size_t last_query(const struct render *r) {
    for (size_t i = r->n; i-- > 0;) {
        const struct message *m = &r->messages[i];
        if (m->role == ROLE_USER &&
            !(starts_with(m->content, "<tool_response>") && ends_with(m->content, "</tool_response>")))
            return i;
    }
    return r->n - 1;
}

static void render_qwen3(struct render *r) {
    if (r->tools || has_system(r)) {
        open_turn(r, ROLE_SYSTEM);
        put_string(r, "\n");
        if (has_system(r)) put(r, r->messages[0].content);
        if (r->tools && has_system(r)) put_string(r, "\n\n");
        if (r->tools) put_tools(r);
        close_turn(r);
    }
    size_t query = last_query(r);
    for (size_t i = 0; i < r->n; i++) {
        const struct message *m = &r->messages[i];
        if (m->role == ROLE_TOOL) put_tool_result(r, i);
        else if (m->role == ROLE_ASSISTANT) put_qwen3_assistant(r, m, i > query, i + 1 == r->n);
        else if (m->role == ROLE_USER || i > 0) put_turn(r, m->role, m->content);
    }
    if (!r->add_generation_prompt) return;
    open_turn(r, ROLE_ASSISTANT);
    put_string(r, "\n");
    if (template_opens_thinking(r->kind)) put_string(r, "<think>\n");
    if (template_can_hush(r->kind) && r->hush) put_string(r, "<think>\n\n</think>\n\n");
}

static void put_qwen25_assistant(struct render *r, const struct message *m) {
    if (!m->tool_calls) {
        put_turn(r, ROLE_ASSISTANT, m->content);
        return;
    }
    open_turn(r, ROLE_ASSISTANT);
    if (m->content.n) put_string(r, "\n");
    put(r, m->content);
    for (const struct pyjson *call = m->tool_calls->first; call; call = call->next) {
        put_string(r, "\n");
        put_call(r, call);
    }
    close_turn(r);
}

static void render_qwen25(struct render *r) {
    open_turn(r, ROLE_SYSTEM);
    put_string(r, "\n");
    if (has_system(r)) put(r, r->messages[0].content);
    else put_string(r, qwen25_system);
    if (r->tools) {
        put_string(r, "\n\n");
        put_tools(r);
    }
    close_turn(r);
    for (size_t i = 0; i < r->n; i++) {
        const struct message *m = &r->messages[i];
        if (m->role == ROLE_TOOL) put_tool_result(r, i);
        else if (m->role == ROLE_ASSISTANT) put_qwen25_assistant(r, m);
        else if (m->role == ROLE_USER || i > 0) put_turn(r, m->role, m->content);
    }
    if (r->add_generation_prompt) {
        open_turn(r, ROLE_ASSISTANT);
        put_string(r, "\n");
    }
}

static void render_chatml(struct render *r) {
    if (r->kind == TEMPLATE_SMOLLM2 && !has_system(r))
        put_turn(r, ROLE_SYSTEM, (struct text){smollm2_system, sizeof smollm2_system - 1});
    if (r->kind == TEMPLATE_QWEN2 && !has_system(r))
        put_turn(r, ROLE_SYSTEM, (struct text){qwen2_system, sizeof qwen2_system - 1});
    for (size_t i = 0; i < r->n; i++) put_turn(r, r->messages[i].role, r->messages[i].content);
    if (r->add_generation_prompt) {
        open_turn(r, ROLE_ASSISTANT);
        put_string(r, "\n");
    }
}

// Takes the end of the last turn back, and the end of a thinking that nothing follows.
static void reopen(struct render *r) {
    static const char *const ends[] = {"<|im_end|>\n", "\n</think>\n\n"};
    const struct message *last = &r->messages[r->n - 1];
    bool thinks = last->has_reasoning && last->reasoning.n && !strip_left(last->content).n;
    for (size_t i = 0; i < (thinks ? 2 : 1) && !r->no_memory; i++) {
        struct text all = {r->out->data, r->out->len};
        if (!ends_with(all, ends[i])) continue;
        r->out->len -= strlen(ends[i]);
        r->out->data[r->out->len] = '\0';
        if (i == 0 && r->marks) r->marks->n--;
    }
}

static bool check_last(const struct render *r) {
    const struct message *last = &r->messages[r->n - 1];
    if (last->role != ROLE_ASSISTANT)
        return error_set(r->err, "only an assistant's message can be continued, the last one is a %s's",
                         role_names[last->role]);
    return !last->tool_calls || error_set(r->err, "a message with tool calls cannot be continued");
}

static int choose(int override, int document, int fallback) {
    return override >= 0 ? override : document >= 0 ? document : fallback;
}

bool template_render(enum template_kind kind, const struct template_document *doc, struct template_options options,
                     struct buffer *out, struct template_marks *marks, struct error *err) {
    struct render r = {.kind = kind, .out = out, .marks = marks, .err = err};
    size_t before = out->len, marks_before = marks ? marks->n : 0;
    bool ok = check(&r, doc) && (!options.continues || check_last(&r));
    if (ok) {
        r.hush = !choose(options.enable_thinking, doc->enable_thinking, 1);
        r.add_generation_prompt =
            !options.continues && choose(options.add_generation_prompt, doc->add_generation_prompt, 1);
        if (kind == TEMPLATE_QWEN25) render_qwen25(&r);
        else if (!template_has_tools(kind)) render_chatml(&r);
        else render_qwen3(&r);
        if (options.continues) reopen(&r);
        if (r.no_memory) ok = error_set(err, "out of memory for a prompt of more than %zu bytes", out->len - before);
    }
    if (!ok) {
        out->len = before;
        if (out->data) out->data[before] = '\0';
        if (marks) marks->n = marks_before;
    }
    free(r.messages);
    return ok;
}

void template_marks_free(struct template_marks *marks) {
    free(marks->marks);
    *marks = (struct template_marks){0};
}
