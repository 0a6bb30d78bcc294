// template.h: from chat messages to the exact prompt text.
//
// A model's Jinja template is never executed: it is recognised by its content, and a renderer written here produces the
// same bytes as Jinja2 would.
#ifndef TANDEM_TEXT_TEMPLATE_H
#define TANDEM_TEXT_TEMPLATE_H

#include "base/buffer.h"
#include "base/error.h"
#include "text/pyjson.h"
#include "text/tokenizer.h"

#include <stdbool.h>
#include <stddef.h>

enum template_kind {
    TEMPLATE_UNKNOWN,
    TEMPLATE_QWEN3,                    // thinking that can be switched off, tools
    TEMPLATE_QWEN3_INSTRUCT_2507,      // never thinks, tools; replies of the past are written as they are
    TEMPLATE_QWEN3_INSTRUCT_REASONING, // the same with qwen3's rules for thinking in replies of the past
    TEMPLATE_QWEN3_THINKING_2507,      // always thinks: the prompt ends with an open <think>; tools
    TEMPLATE_QWEN25,                   // ChatML with tools and Qwen2.5's default system prompt
    TEMPLATE_QWEN2,                    // ChatML with Qwen2's default system prompt
    TEMPLATE_SMOLLM2,                  // ChatML with SmolLM2's default system prompt
    TEMPLATE_CHATML                    // ChatML, no default system prompt
};

// Recognises a template's text; TEMPLATE_UNKNOWN where it is none of ours (or NULL). Spelling does not matter
// (whitespace, quotes, comments, x['y'] for x.y); any other difference from the texts that we know does.
enum template_kind template_recognise(const char *jinja);
const char *template_name(enum template_kind kind); // "qwen3", ...: what --template takes; "unknown"
bool template_from_name(const char *name, enum template_kind *out);
const char *template_names(void);                      // "qwen3, ..., chatml", for error messages
bool template_has_thinking(enum template_kind kind);   // the model may write <think>
bool template_opens_thinking(enum template_kind kind); // a generation prompt ends with an open <think>
bool template_can_hush(enum template_kind kind);       // enable_thinking=false makes a difference
bool template_has_tools(enum template_kind kind);      // it has rules for tools and calls

// A conversation: messages, tools and the two switches. Owns everything in it.
struct template_document;

struct template_document *template_document_create(struct error *err); // no messages yet
void template_document_free(struct template_document *doc);            // NULL is fine

// Parses what CLI.md calls a document: an array of messages, or {"messages", "tools", "enable_thinking",
// "add_generation_prompt"}. Duplicate keys, depth and lone surrogates are errors, "\u0000" is allowed. What a message
// may hold is checked when it is rendered, because that depends on the template.
struct template_document *template_parse(const char *text, size_t n, const char *name, struct error *err);

// Appends {"role": role, "content": content}, and "reasoning_content" unless `reasoning` is NULL. Texts are copied;
// invalid UTF-8 in them is an error.
bool template_add_message(struct template_document *doc, const char *role, const char *content, size_t n_content,
                          const char *reasoning, size_t n_reasoning, struct error *err);
size_t template_n_messages(const struct template_document *doc);
// A message as it was given; NULL where i is not in [0, template_n_messages). pyjson_get(m, "role") and so on read it.
const struct pyjson *template_message(const struct template_document *doc, size_t i);
void template_truncate(struct template_document *doc, size_t n_messages); // keeps the first n_messages
int template_enable_thinking(const struct template_document *doc);        // what it says: -1 nothing, 0, 1
// Puts the system message in front, replaces it, or (NULL) removes it.
bool template_set_system(struct template_document *doc, const char *text, size_t n, struct error *err);
// Appends the document as JSON that template_parse reads back.
bool template_write(const struct template_document *doc, struct buffer *out, struct error *err);

// Where the template itself wrote the text of a special token; equal text inside a message is no mark.
struct template_mark {
    size_t offset, length; // in the rendered text
};
// All zero is empty; free with template_marks_free.
struct template_marks {
    struct template_mark *marks; // [n] in order
    size_t n, cap;
};
void template_marks_free(struct template_marks *marks);

// Options that override what the document says.
struct template_options {
    int enable_thinking;       // -1: as the document says (absent: the template's default), 0: false, 1: true
    int add_generation_prompt; // -1: as the document says (absent: true), 0, 1
    // The last message, which must be an assistant's without tool calls, stays open: the prompt ends behind its content
    // (or, if that is empty, behind its reasoning, before </think>), and there is no generation prompt.
    bool continues;
};

// Appends the prompt to `out`, and to `marks` (may be NULL) its special tokens, offsets counted from the start of
// out->data. A role or a type that the template has no rule for is an error that names it, and so are tools and tool
// calls where the template would drop them; other members that the template does not read ("id", "name") are ignored,
// as Jinja ignores them. After an error `out` and `marks` are as before.
bool template_render(enum template_kind kind, const struct template_document *doc, struct template_options options,
                     struct buffer *out, struct template_marks *marks, struct error *err);

// Another way to encode what stands between special tokens: `encode` appends the ids of text[n], n > 0.
struct template_stretches {
    bool (*encode)(void *user, const struct tokenizer *tok, const char *text, size_t n, struct token_ids *ids,
                   struct error *err);
    void *user;
};

// Appends the ids of a rendered prompt: the marked special tokens become their ids (one that the tokenizer does not
// have is an error), and special-token text that came in with a message stays plain text, so that a user cannot close
// his own turn. text[n] is what template_render appended to an empty buffer; `between` may be NULL. After an error
// `ids` is as before.
bool template_encode(const struct tokenizer *tok, const char *text, size_t n, const struct template_marks *marks,
                     const struct template_stretches *between, struct token_ids *ids, struct error *err);

#endif
