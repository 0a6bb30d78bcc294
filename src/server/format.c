// format.c: see format.h. It turns what a request asks for into one grammar of the whole answer, or of tool calls
// alone.
#include "server/format.h"

#include "server/masks.h"
#include "server/schema.h"

#include <string.h>

// What was asked for, before it becomes a grammar.
struct form {
    bool json, required;             // a JSON answer; a tool must be called
    const struct pyjson *schema;     // of the answer; NULL: any object
    const char *schema_where, *tool; // for messages; the one tool that must be called
    bool parallel;
};

static const struct pyjson *function_of(const struct pyjson *tool) {
    return pyjson_get(tool, "function");
}

// The name in {"name": ...} or {"function": {"name": ...}}; NULL: none.
static const struct pyjson *name_in(const struct pyjson *v) {
    const struct pyjson *name = field(v, "name");
    if (!name) name = field(field(v, "function"), "name");
    return name && name->type == PYJSON_STRING ? name : NULL;
}

bool format_allows(const struct generation *g, const char *tool) {
    for (const struct pyjson *t = g->allowed ? g->allowed->first : NULL; t; t = t->next)
        if (pyjson_is_text(name_in(t), tool)) return true;
    return !g->allowed;
}

bool format_has_tool(const struct generation *g, const char *tool) {
    for (const struct pyjson *t = g->tools ? g->tools->first : NULL; t; t = t->next)
        if (pyjson_is_text(pyjson_get(function_of(t), "name"), tool)) return format_allows(g, tool);
    return false;
}

static bool is_strict(const struct pyjson *tool) {
    const struct pyjson *strict = pyjson_get(function_of(tool), "strict");
    return strict && strict->type == PYJSON_TRUE;
}

static uint32_t text(struct grammar *g, const char *s, uint32_t next) {
    return grammar_text(g, s, strlen(s), next);
}

// The arguments of one tool: its schema, or any object where that is not supported and not asked for strictly.
static bool put_arguments(struct grammar *g, const struct pyjson *tool, uint32_t next, uint32_t *out,
                          struct error *err) {
    const struct pyjson *schema = field(function_of(tool), "parameters");
    struct error why = {0};
    struct grammar_mark before = grammar_mark(g);
    if (schema && schema_compile(g, schema, "tools", next, out, &why)) return true;
    if (schema && is_strict(tool)) {
        *err = why;
        return false;
    }
    grammar_rewind(g, before);
    *out = grammar_json(g, true, next);
    return true;
}

// What follows <tool_call>, for every tool that may be called: \n{"name": ..., "arguments": ...}\n</tool_call>
static bool put_call(struct grammar *g, const struct generation *gen, const char *only, uint32_t next, uint32_t *out,
                     struct error *err) {
    uint32_t end = text(g, "}\n</tool_call>", next);
    bool any = false;
    for (const struct pyjson *t = gen->tools->first; t; t = t->next) {
        const struct pyjson *name = pyjson_get(function_of(t), "name");
        uint32_t one;
        struct buffer quoted = {0};
        if ((only && !pyjson_is_text(name, only)) || !format_allows(gen, name->text)) continue;
        if (!put_arguments(g, t, end, &one, err)) return false;
        if (!pyjson_write_string(name->text, name->n_text, &quoted)) return error_set(err, "out of memory");
        one = text(g, "\n{\"name\": ", grammar_text(g, quoted.data, quoted.len, text(g, ", \"arguments\": ", one)));
        buffer_free(&quoted);
        *out = any ? grammar_split(g, *out, one) : one;
        any = true;
    }
    return any || error_set(err, "tool_choice: there is no tool called \"%.100s\"", only ? only : "");
}

// Calls, one behind the other.
static bool put_calls(struct grammar *g, const struct generation *gen, const struct form *form, uint32_t next,
                      uint32_t *out, struct error *err) {
    uint32_t again = form->parallel ? grammar_hole(g) : next, call;
    if (!put_call(g, gen, form->tool, again, &call, err)) return false;
    call = text(g, "<tool_call>", call);
    if (form->parallel) grammar_fill(g, again, next, text(g, "\n", call));
    *out = call;
    return true;
}

static bool make_grammar(struct generation *gen, const struct form *form, struct grammar *g, struct error *err) {
    uint32_t end = grammar_accept(g), start = end, other;
    if (form->json) {
        if (!form->schema) start = grammar_json(g, true, end);
        else if (!schema_compile(g, form->schema, form->schema_where, end, &start, err)) return false;
        if (gen->has_tools) {
            if (!put_calls(g, gen, form, end, &other, err)) return false;
            start = form->required ? other : grammar_split(g, start, other);
        }
    } else if (form->required) {
        if (!put_calls(g, gen, form, end, &start, err)) return false;
    } else {
        if (!put_call(g, gen, NULL, end, &start, err)) return false;
        gen->constrains_calls = true;
    }
    if (!gen->constrains_calls && gen->may_think) // what stands between </think> and the answer
        for (int i = 0; i < 2; i++) start = grammar_split(g, start, grammar_byte(g, '\n', start));
    g->start = start;
    return !g->full || error_set(err, "the schemas are too large: more than %d places", MAX_NODES);
}

static bool finish(struct generation *g, const struct form *form, const char *param, struct fault *f) {
    bool strict = false;
    for (const struct pyjson *t = g->has_tools ? g->tools->first : NULL; t; t = t->next)
        strict = strict || is_strict(t);
    if (!form->json && !form->required && !strict && !g->allowed) return true;
    struct error err = {0};
    struct grammar grammar = {0};
    bool ok = make_grammar(g, form, &grammar, &err);
    if (ok) {
        g->automaton = masks_automaton(g->s->masks, &grammar, g->has_tools, &err);
        ok = g->automaton || error_prefix(&err, "%s: ", param);
    }
    grammar_free(&grammar);
    return ok || fault_set(f, 400, param, "%s", err.text);
}

// "auto", "none", "required" (or "any"), or the name of a tool.
static bool choose_tools(struct generation *g, const char *mode, const char *tool, struct form *form,
                         struct chat_prompt *p, struct fault *f) {
    g->tools = p->tools && p->tools->n ? p->tools : NULL;
    g->has_tools = g->tools != NULL;
    form->tool = tool;
    if (tool) form->parallel = false; // one call of this tool
    form->required = tool || strcmp(mode, "required") == 0 || strcmp(mode, "any") == 0;
    if (!form->required && strcmp(mode, "auto") != 0 && strcmp(mode, "none") != 0)
        return fault_set(f, 400, "tool_choice",
                         "tool_choice: expected \"auto\", \"none\", \"required\" or a tool, found \"%.40s\"", mode);
    if (form->required && !g->has_tools)
        return fault_set(f, 400, "tool_choice", "tool_choice: a tool must be called, but there are no tools");
    if (strcmp(mode, "none") == 0 && !tool) {
        g->has_tools = false;
        p->tools = NULL;
    }
    return true;
}

// {"type": "allowed_tools", ...}: the prompt has all tools, so that it begins as other requests' do; only these may be
// called. Chat completions put mode and tools one level deeper.
static bool choose_allowed(struct generation *g, const struct pyjson *v, struct form *form, struct chat_prompt *p,
                           struct fault *f) {
    const struct pyjson *inner = field(v, "allowed_tools"), *holder = inner ? inner : v, *list = NULL;
    const char *mode = "auto";
    if (!field_text(holder, "mode", &mode, f) || !field_typed(holder, "tools", PYJSON_ARRAY, &list, f)) return false;
    if (strcmp(mode, "auto") != 0 && strcmp(mode, "required") != 0)
        return fault_set(f, 400, "tool_choice", "tool_choice: mode must be \"auto\" or \"required\", found \"%.40s\"",
                         mode);
    if (!list || list->n == 0 || list->n > MAX_TOOLS)
        return fault_set(f, 400, "tool_choice", "tool_choice: allowed_tools needs tools, an array of 1 to %d",
                         MAX_TOOLS);
    if (!choose_tools(g, mode, NULL, form, p, f)) return false;
    for (const struct pyjson *t = list->first; t; t = t->next) {
        const struct pyjson *name = name_in(t);
        if (!name) return fault_set(f, 400, "tool_choice", "tool_choice: every allowed tool needs a name");
        if (!format_has_tool(g, name->text))
            return fault_set(f, 400, "tool_choice", "tool_choice: there is no tool called \"%.100s\"", name->text);
    }
    g->allowed = list;
    return true;
}

static bool read_choice(struct generation *g, const struct pyjson *v, struct form *form, struct chat_prompt *p,
                        struct fault *f) {
    if (!v) return choose_tools(g, "auto", NULL, form, p, f);
    if (v->type == PYJSON_STRING) return choose_tools(g, v->text, NULL, form, p, f);
    const struct pyjson *name = name_in(v), *type = field(v, "type");
    if (pyjson_is_text(type, "allowed_tools")) return choose_allowed(g, v, form, p, f);
    if (name) return choose_tools(g, "required", name->text, form, p, f);
    static const char *const modes[] = {"auto", "none", "required", "any"};
    for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++)
        if (pyjson_is_text(type, modes[i])) return choose_tools(g, modes[i], NULL, form, p, f);
    return fault_set(f, 400, "tool_choice",
                     "tool_choice: expected a string, an object that names a function, or allowed_tools");
}

// {"type": "json_schema", ...}: `holder` is the object that has the schema.
static bool read_format(const struct pyjson *format, const struct pyjson *holder, const char *param, struct form *form,
                        struct fault *f) {
    const struct pyjson *type = pyjson_get(format, "type"), *schema = field(holder, "schema");
    if (!format || pyjson_is_text(type, "text")) return true;
    form->json = true;
    form->schema_where = param;
    if (pyjson_is_text(type, "json_object")) { // llama.cpp's older form has a schema here
        form->schema = field(format, "schema");
        return true;
    }
    if (!pyjson_is_text(type, "json_schema"))
        return fault_set(f, 400, param, "%s: type must be \"text\", \"json_object\" or \"json_schema\"", param);
    if (!schema) return fault_set(f, 400, param, "%s: json_schema needs a schema", param);
    form->schema = schema;
    return true;
}

bool format_read_openai(struct generation *g, const struct pyjson *body, struct chat_prompt *p, struct fault *f) {
    struct form form = {.parallel = true};
    const struct pyjson *format = NULL;
    return field_bool(body, "parallel_tool_calls", &form.parallel, f) &&
           read_choice(g, field(body, "tool_choice"), &form, p, f) &&
           field_typed(body, "response_format", PYJSON_OBJECT, &format, f) &&
           read_format(format, field(format, "json_schema"), "response_format", &form, f) &&
           finish(g, &form, form.json ? "response_format" : "tools", f);
}

bool format_read_anthropic(struct generation *g, const struct pyjson *body, struct chat_prompt *p, struct fault *f) {
    struct form form = {.parallel = true};
    const struct pyjson *choice = NULL, *config = NULL, *format = NULL;
    bool alone = false;
    if (!field_typed(body, "tool_choice", PYJSON_OBJECT, &choice, f) ||
        !field_typed(body, "output_config", PYJSON_OBJECT, &config, f) ||
        !field_typed(body, "output_format", PYJSON_OBJECT, &format, f) ||
        !field_bool(choice, "disable_parallel_tool_use", &alone, f) ||
        (config && !field_typed(config, "format", PYJSON_OBJECT, &format, f)))
        return false;
    form.parallel = !alone;
    const struct pyjson *type = field(choice, "type"), *name = field(choice, "name");
    if (choice && (!type || type->type != PYJSON_STRING))
        return fault_set(f, 400, "tool_choice", "tool_choice: type must be \"auto\", \"any\", \"tool\" or \"none\"");
    if (pyjson_is_text(type, "tool") && (!name || name->type != PYJSON_STRING))
        return fault_set(f, 400, "tool_choice", "tool_choice: a tool must be named");
    bool named = pyjson_is_text(type, "tool");
    return choose_tools(g, type && !named ? type->text : "auto", named ? name->text : NULL, &form, p, f) &&
           read_format(format, format, "output_config", &form, f) &&
           finish(g, &form, form.json ? "output_config" : "tools", f);
}

bool format_read_responses(struct generation *g, const struct pyjson *body, struct chat_prompt *p, struct fault *f) {
    struct form form = {.parallel = true};
    const struct pyjson *text_field = NULL, *format = NULL;
    return field_bool(body, "parallel_tool_calls", &form.parallel, f) &&
           read_choice(g, field(body, "tool_choice"), &form, p, f) &&
           field_typed(body, "text", PYJSON_OBJECT, &text_field, f) &&
           field_typed(text_field, "format", PYJSON_OBJECT, &format, f) &&
           read_format(format, format, "text", &form, f) && finish(g, &form, form.json ? "text" : "tools", f);
}
