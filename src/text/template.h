// template.h: from chat messages to the exact prompt text.
//
// A model's Jinja template is never executed: it is recognised by its content, and a renderer written here produces the
// same bytes as Jinja2 would.
#ifndef TANDEM_TEXT_TEMPLATE_H
#define TANDEM_TEXT_TEMPLATE_H

#include "base/buffer.h"
#include "base/error.h"

#include <jansson.h>
#include <stdbool.h>

enum template_kind {
    TEMPLATE_UNKNOWN,
    TEMPLATE_QWEN3,   // thinking, tools
    TEMPLATE_QWEN25,  // ChatML with tools and Qwen2.5's default system prompt
    TEMPLATE_SMOLLM2, // ChatML with SmolLM2's default system prompt
    TEMPLATE_CHATML   // ChatML, no default system prompt
};

// Recognises a template's text; TEMPLATE_UNKNOWN where it is none of ours (or NULL).
enum template_kind template_recognise(const char *jinja);
const char *template_name(enum template_kind kind); // "qwen3", ...: what --template takes
bool template_from_name(const char *name, enum template_kind *out);
const char *template_names(void); // "qwen3, qwen2.5, smollm2, chatml", for error messages
bool template_has_thinking(enum template_kind kind);

// Options that override what the document says.
struct template_options {
    int enable_thinking;       // -1: as the document says (absent: the template's default), 0: false, 1: true
    int add_generation_prompt; // -1: as the document says (absent: true), 0, 1
};

// `document`: an array of messages, or {"messages", "tools", "enable_thinking", "add_generation_prompt"} (CLI.md).
// Appends the prompt to `out`. A role, a type or a member that the template has no rule for is an error that names it.
bool template_render(enum template_kind kind, const json_t *document, struct template_options options,
                     struct buffer *out, struct error *err);

// Parses a document as template_render wants it: duplicate keys, depth and lone surrogates are errors, NUL is allowed.
json_t *template_parse(const char *text, size_t n, const char *name, struct error *err);

#endif
