// toolcalls.h: from a model's text to tool calls, as Qwen3 writes them: <tool_call>\n{"name": ..., "arguments": {...}}
// \n</tool_call>. What is no such call is text, to the byte, and a reason is kept.
#ifndef TANDEM_SERVER_TOOLCALLS_H
#define TANDEM_SERVER_TOOLCALLS_H

#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>

struct toolcalls;

// What a parser reports, in order. `text` is not NUL-terminated. Between `begin` and `end` of a call come its arguments
// in pieces, the bytes that the model wrote: together one JSON object.
struct toolcalls_sink {
    void (*text)(void *user, const char *text, size_t n);
    void (*begin)(void *user, const char *name);
    void (*arguments)(void *user, const char *text, size_t n);
    void (*end)(void *user);
    // Is there a tool of this name?
    bool (*known)(void *user, const char *name);
    void *user;
};

// `incremental`: a call is reported while it is written; when it breaks off later, its arguments stay incomplete and
// the rest is text. Otherwise a call is reported when it is whole.
struct toolcalls *toolcalls_create(const struct toolcalls_sink *sink, bool incremental, struct error *err);
void toolcalls_free(struct toolcalls *t);
bool toolcalls_feed(struct toolcalls *t, const char *text, size_t n); // false: no memory
bool toolcalls_finish(struct toolcalls *t);
const char *toolcalls_malformed(const struct toolcalls *t); // why the first malformed call is none; NULL: there is none

#endif
