// responses_tools.c: see responses_tools.h.
#include "server/responses_tools.h"

#include <string.h>

static bool is_string(const struct pyjson *v) {
    return v && v->type == PYJSON_STRING;
}

// What stands between a namespace and a name; "mcp__server__" brings it along.
static const char *mark_of(const struct pyjson *namespace) {
    size_t n = namespace->n_text;
    return n >= 2 && memcmp(namespace->text + n - 2, "__", 2) == 0 ? "" : "__";
}

bool responses_tool_name(const struct pyjson *namespace, const struct pyjson *name, struct buffer *out) {
    return (!namespace ||
            (buffer_append(out, namespace->text, namespace->n_text) && buffer_append_text(out, mark_of(namespace)))) &&
           buffer_append(out, name->text, name->n_text);
}

static bool starts(const char **text, size_t *n, const char *with, size_t n_with) {
    if (*n < n_with || memcmp(*text, with, n_with) != 0) return false;
    *text += n_with;
    *n -= n_with;
    return true;
}

static bool is_called(const struct pyjson *namespace, const struct pyjson *own, const char *name, size_t n) {
    return (!namespace || (starts(&name, &n, namespace->text, namespace->n_text) &&
                           starts(&name, &n, mark_of(namespace), strlen(mark_of(namespace))))) &&
           n == own->n_text && memcmp(name, own->text, n) == 0;
}

// ---- To the model

static bool put_name(const struct pyjson *namespace, const struct pyjson *name, struct buffer *out) {
    struct buffer whole = {0};
    bool ok = is_string(name) ? responses_tool_name(namespace, name, &whole) &&
                                    pyjson_write_string(buffer_text(&whole), whole.len, out)
                              : pyjson_write_portable(name, out); // which is refused by the check of all tools
    buffer_free(&whole);
    return ok;
}

static bool put_function(const struct pyjson *t, struct buffer *out) {
    static const char *const keys[] = {"description", "parameters", "strict"};
    bool ok = true;
    for (size_t k = 0; ok && k < 3; k++)
        if (field(t, keys[k]))
            ok = buffer_printf(out, ", \"%s\": ", keys[k]) && pyjson_write_portable(field(t, keys[k]), out);
    return ok;
}

// Free text becomes a function's one argument; the grammar is for the model to read.
static bool put_custom(const struct pyjson *t, struct buffer *out) {
    const struct pyjson *about = field(t, "description"), *format = field(t, "format");
    const struct pyjson *syntax = field(format, "syntax"), *definition = field(format, "definition");
    struct buffer text = {0};
    bool ok = !is_string(about) || buffer_append(&text, about->text, about->n_text);
    if (is_string(definition))
        ok = ok && buffer_append_text(&text, text.len ? "\n\n" : "") &&
             buffer_append_text(&text, "The input is text that follows this grammar") &&
             (!is_string(syntax) ||
              (buffer_append_text(&text, " (") && buffer_append(&text, syntax->text, syntax->n_text) &&
               buffer_append_text(&text, ")"))) &&
             buffer_append_text(&text, ":\n") && buffer_append(&text, definition->text, definition->n_text);
    ok = ok && buffer_append_text(out, ", \"description\": ") &&
         pyjson_write_string(buffer_text(&text), text.len, out) &&
         buffer_append_text(out, ", \"parameters\": {\"type\": \"object\", \"properties\": {\"input\": {\"type\": "
                                 "\"string\"}}, \"required\": [\"input\"], \"additionalProperties\": false}");
    buffer_free(&text);
    return ok;
}

static bool no_memory(struct fault *f) {
    return fault_set(f, 500, NULL, "out of memory");
}

// The tools of a list, and of the namespaces in it.
static bool put_list(const struct pyjson *list, const struct pyjson *namespace, const char *where, struct buffer *out,
                     struct fault *f) {
    size_t i = 0;
    for (const struct pyjson *t = list->first; t; t = t->next, i++) {
        const struct pyjson *name = field(t, "name"), *type = field(t, "type"), *inner = field(t, "tools");
        bool function = pyjson_is_text(type, "function"), custom = pyjson_is_text(type, "custom");
        char here[64];
        snprintf(here, sizeof here, "%s[%zu]", where, i);
        if (pyjson_is_text(type, "namespace") && !namespace && is_string(name) && inner &&
            inner->type == PYJSON_ARRAY) {
            char below[80];
            snprintf(below, sizeof below, "%s.tools", here);
            if (!put_list(inner, name, below, out, f)) return false;
            continue;
        }
        if (is_string(type) && !function && !custom) continue;
        if (!is_string(type) || !name)
            return fault_set(f, 400, here, "%s: expected a type, \"function\" or \"custom\", and a name", here);
        bool ok =
            buffer_printf(out, "%s{\"type\": \"function\", \"function\": {\"name\": ", out->len > 1 ? ", " : "") &&
            put_name(namespace, name, out) && (custom ? put_custom(t, out) : put_function(t, out)) &&
            buffer_append_text(out, "}}");
        if (!ok) return no_memory(f);
    }
    return true;
}

bool responses_tools(struct arena *arena, const struct pyjson *body, const struct pyjson **tools, struct fault *f) {
    const struct pyjson *list = NULL;
    struct buffer out = {0};
    if (!field_typed(body, "tools", PYJSON_ARRAY, &list, f)) return false;
    if (!list || list->n == 0) return true;
    bool ok = (buffer_append_byte(&out, '[') || no_memory(f)) && put_list(list, NULL, "tools", &out, f) &&
              (buffer_append_byte(&out, ']') || no_memory(f));
    struct error err = {0};
    if (ok && !(*tools = pyjson_parse(arena, buffer_text(&out), out.len, "tools", &err)))
        ok = fault_set(f, 400, "tools", "%s", err.text);
    buffer_free(&out);
    return ok && prompt_check_tools(*tools, f);
}

// ---- From the model

static struct responses_tool find(const struct pyjson *list, const struct pyjson *namespace, const char *name,
                                  size_t n) {
    struct responses_tool none = {0};
    for (const struct pyjson *t = list && list->type == PYJSON_ARRAY ? list->first : NULL; t; t = t->next) {
        const struct pyjson *own = field(t, "name"), *type = field(t, "type");
        bool custom = pyjson_is_text(type, "custom");
        if (!is_string(own)) continue;
        if (pyjson_is_text(type, "namespace") && !namespace) {
            struct responses_tool inner = find(field(t, "tools"), own, name, n);
            if (inner.name) return inner;
        } else if ((custom || pyjson_is_text(type, "function")) && is_called(namespace, own, name, n)) {
            return (struct responses_tool){own, namespace, custom};
        }
    }
    return none;
}

struct responses_tool responses_tool_find(const struct pyjson *body, const char *name, size_t n) {
    return find(field(body, "tools"), NULL, name, n);
}

bool responses_custom_input(const struct buffer *arguments, struct buffer *out) {
    struct arena arena = {0};
    const struct pyjson *v = pyjson_parse(&arena, buffer_text(arguments), arguments->len, "arguments", NULL);
    const struct pyjson *input = v ? field(v, "input") : NULL;
    if (!input && v && v->type == PYJSON_OBJECT && v->n == 1) input = v->first; // by another name
    if (!is_string(input) && v && v->type == PYJSON_STRING) input = v;
    bool ok = is_string(input) ? buffer_append(out, input->text, input->n_text)
                               : buffer_append(out, buffer_text(arguments), arguments->len);
    arena_free(&arena);
    return ok;
}
