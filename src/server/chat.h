// chat.h: what OpenAI's two completion dialects share.
#ifndef TANDEM_SERVER_CHAT_H
#define TANDEM_SERVER_CHAT_H

#include "server/prompt.h"

// stream, stream_options, n, max_tokens and relatives, timings_per_token.
bool openai_read_common(struct generation *g, const struct pyjson *body, struct fault *f);
bool openai_usage(struct generation *g, struct buffer *out);   // , "usage": {...}
bool openai_timings(struct generation *g, struct buffer *out); // , "timings": {...} if asked for
// One more item of a list of log-probabilities.
bool openai_put_logprob(const struct tandem_engine *engine, const tandem_event *e, struct buffer *out);
void openai_fail(struct generation *g, int status, const char *message);
void openai_done(struct generation *g); // [DONE]
// Sends the generation or answers with what is wrong.
void openai_start(struct generation *g, bool ok, const struct fault *f);

#endif
