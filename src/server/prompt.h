// prompt.h: from the messages of a request to the prompt's ids. Other dialects turn their messages into OpenAI's first.
#ifndef TANDEM_SERVER_PROMPT_H
#define TANDEM_SERVER_PROMPT_H

#include "server/generate.h"

struct chat_prompt {
    const struct pyjson *messages; // an array in OpenAI's form
    const struct pyjson *tools;    // an array, or NULL
    int enable_thinking;           // -1: not said
    int add_generation_prompt;     // -1: not said
    bool continues;                // the last message, an assistant's, is to be continued
};

// What a request says about the prompt's end: chat_template_kwargs, enable_thinking, reasoning_effort,
// add_generation_prompt, continue_final_message.
bool prompt_read_thinking(const struct pyjson *body, struct chat_prompt *p, struct fault *f);
// Checks an array of tools in OpenAI's form.
bool prompt_check_tools(const struct pyjson *tools, struct fault *f);
// Whether the model will think, for the choice of sampling presets: the switch, then the last /think or /no_think.
bool prompt_thinks(const struct server *s, const struct chat_prompt *p);
// Whether the answer's first token may be <think>.
bool prompt_may_think(const struct server *s, const struct chat_prompt *p);
// The ids. 400 names the message.
bool prompt_ids(struct server *s, uint64_t tenant, const struct chat_prompt *p, struct token_ids *ids, struct fault *f);
// The same, and what a generation has to know of it: the part is added, thinking is set up. 400 if it exceeds the
// context.
bool prompt_into(struct generation *g, const struct chat_prompt *p, struct fault *f);
// The document as the template gets it, as text.
bool prompt_document(const struct chat_prompt *p, struct buffer *out, struct fault *f);
struct template_options prompt_options(const struct server *s, const struct chat_prompt *p);
// Parses the body into `arena`: an object. NULL: `f` says what is wrong.
const struct pyjson *prompt_body(struct exchange *x, struct arena *arena, struct fault *f);
// The "model" field: 404 for another model's name.
bool prompt_check_model(const struct server *s, const struct pyjson *body, struct fault *f);
bool prompt_fits(const struct server *s, size_t n_ids, struct fault *f);

#endif
