// responses_tools.h: the tools of /v1/responses that are more than functions: custom tools, whose input is free text,
// and namespaces, which group tools. The model knows functions alone: it is told of them as such, and its calls are
// turned back.
#ifndef TANDEM_SERVER_RESPONSES_TOOLS_H
#define TANDEM_SERVER_RESPONSES_TOOLS_H

#include "server/prompt.h"

// The body's "tools" in OpenAI's chat form; *tools stays NULL where there are none that this server can offer: what
// runs on OpenAI's servers, or is known to its models alone, is left out, since Codex always sends some.
bool responses_tools(struct arena *arena, const struct pyjson *body, const struct pyjson **tools, struct fault *f);

// The name by which the model knows a tool of a namespace (NULL: of none).
bool responses_tool_name(const struct pyjson *namespace, const struct pyjson *name, struct buffer *out);

// What a name that the model wrote stands for.
struct responses_tool {
    const struct pyjson *name, *namespace; // NULL: none; `name` NULL: no tool of the request has this name
    bool is_custom;
};
struct responses_tool responses_tool_find(const struct pyjson *body, const char *name, size_t n);

// The free text that a call of a custom tool has in its arguments.
bool responses_custom_input(const struct buffer *arguments, struct buffer *out);

#endif
