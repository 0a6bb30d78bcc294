// format.c: see format.h.
#include "server/format.h"

#include <string.h>

static bool read_tool_choice(struct generation *g, const struct pyjson *v, struct chat_prompt *p, struct fault *f) {
    g->tools = p->tools && p->tools->n ? p->tools : NULL;
    g->has_tools = g->tools != NULL;
    if (!v || pyjson_is_text(v, "auto")) return true;
    if (pyjson_is_text(v, "none")) {
        g->has_tools = false;
        p->tools = NULL;
        return true;
    }
    return fault_set(f, 400, "tool_choice", "tool_choice: expected \"auto\" or \"none\"");
}

bool format_read_openai(struct generation *g, const struct pyjson *body, struct chat_prompt *p, struct fault *f) {
    const struct pyjson *format = NULL;
    if (!read_tool_choice(g, field(body, "tool_choice"), p, f) ||
        !field_typed(body, "response_format", PYJSON_OBJECT, &format, f))
        return false;
    if (format && !pyjson_is_text(pyjson_get(format, "type"), "text"))
        return fault_set(f, 400, "response_format", "response_format: expected type \"text\"");
    return true;
}

bool format_read_anthropic(struct generation *g, const struct pyjson *body, struct chat_prompt *p, struct fault *f) {
    const struct pyjson *choice = NULL;
    if (!field_typed(body, "tool_choice", PYJSON_OBJECT, &choice, f)) return false;
    return read_tool_choice(g, choice ? field(choice, "type") : NULL, p, f);
}

bool format_read_responses(struct generation *g, const struct pyjson *body, struct chat_prompt *p, struct fault *f) {
    const struct pyjson *text = NULL, *format;
    if (!read_tool_choice(g, field(body, "tool_choice"), p, f) || !field_typed(body, "text", PYJSON_OBJECT, &text, f))
        return false;
    format = text ? field(text, "format") : NULL;
    if (format && !pyjson_is_text(pyjson_get(format, "type"), "text"))
        return fault_set(f, 400, "text", "text.format: expected type \"text\"");
    return true;
}
