// conversation.h: a chat as the engine keeps it: the messages, and for every reply the ids that were generated. A
// prompt for the next turn is made of those ids, never of re-tokenised text, so that the KV of earlier turns is reused.
#ifndef TANDEM_ENGINE_CONVERSATION_H
#define TANDEM_ENGINE_CONVERSATION_H

#include "engine/engine.h"

struct reply_ids {
    size_t message;       // index of the assistant message
    struct token_ids ids; // of its content alone: no thinking, no end token
};

// All zero but `doc` (template_document_create) is an empty conversation.
struct conversation {
    struct template_document *doc;
    struct reply_ids *replies; // [n_replies] in order
    size_t n_replies, cap;
};

void conversation_free(struct conversation *c);

// Adds an assistant message and the ids that were generated for it (end token and thinking included; what belongs to
// the content is found here). When those ids do not spell `content`, the text will be tokenised again.
bool conversation_add_reply(struct conversation *c, const tandem_engine *e, const char *content, size_t n_content,
                            const char *reasoning, size_t n_reasoning, const int32_t *ids, size_t n_ids,
                            struct error *err);

// Forgets all messages from n_messages on.
void conversation_truncate(struct conversation *c, size_t n_messages);

// The ids of the next prompt.
bool conversation_render(const struct conversation *c, const tandem_engine *e, struct template_options options,
                         struct token_ids *ids, struct error *err);

#endif
