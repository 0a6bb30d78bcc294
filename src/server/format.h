// format.h: what a request asks of the form of its answer: tools, tool_choice, response_format.
#ifndef TANDEM_SERVER_FORMAT_H
#define TANDEM_SERVER_FORMAT_H

#include "server/prompt.h"

// tool_choice, parallel_tool_calls and response_format in OpenAI's form. May take the tools out of the prompt.
bool format_read_openai(struct generation *g, const struct pyjson *body, struct chat_prompt *p, struct fault *f);
// tool_choice in Anthropic's form; p->tools are in OpenAI's.
bool format_read_anthropic(struct generation *g, const struct pyjson *body, struct chat_prompt *p, struct fault *f);
// The same for responses: tool_choice, text.format.
bool format_read_responses(struct generation *g, const struct pyjson *body, struct chat_prompt *p, struct fault *f);

bool format_allows(const struct generation *g, const char *tool);   // by tool_choice's list of allowed tools
bool format_has_tool(const struct generation *g, const char *tool); // it exists, and is allowed

#endif
