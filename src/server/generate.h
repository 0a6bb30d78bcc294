// generate.h: a generation: the requests that one exchange puts to the engine, and the way from tokens to text,
// reasoning and tool calls. What these look like on the wire is the dialect's (struct writer).
#ifndef TANDEM_SERVER_GENERATE_H
#define TANDEM_SERVER_GENERATE_H

#include "server/automaton.h"
#include "server/internal.h"
#include "server/toolcalls.h"

struct constraint;

struct call {
    char id[40];
    struct buffer name, arguments;
};

// One answer of a generation. After the submission it belongs to the engine's thread.
struct choice {
    struct generation *g;
    size_t index, part;
    struct stream *stream;
    struct toolcalls *parser; // NULL: no tools
    struct buffer text, reasoning;
    struct buffer raw;              // the bytes of all its tokens, special ones left out
    struct token_ids ids;           // in `raw`
    size_t content_at, content_raw; // where the ids and bytes behind </think> begin
    size_t n_tokens, n_reasoning;
    bool thinking;      // between <think> and </think>
    size_t n_forced;    // tokens of </think> that the budget forces, so far
    struct call *calls; // [n_calls]
    size_t n_calls;
    struct constraint *constraint; // NULL: none
    const char *finish;            // "stop", "length", "tool_calls"; NULL: in progress
    char malformed[200];           // why a tool call stayed text
    struct buffer logprobs;        // items that the writer has not sent yet
    struct buffer extra[3];        // the writer's
    size_t n_extra;
    double last_token;
    bool failed; // no memory
};

// One request of the engine.
struct part {
    struct generation *g;
    _Atomic uint64_t id; // 0: not submitted
    struct token_ids prompt;
    size_t n_cached, n_told;
    struct buffer logprobs[4]; // of the prompt: the writer's
};

// How a dialect writes. Streamed answers go through the first group, event by event; whole() is for the other ones.
struct writer {
    void (*begin)(struct generation *g); // before anything is computed
    void (*text)(struct choice *c, enum stream_part part, const char *text, size_t n);
    void (*call_begin)(struct choice *c, size_t call);
    void (*call_arguments)(struct choice *c, size_t call, const char *text, size_t n);
    void (*call_end)(struct choice *c, size_t call);
    void (*choice_end)(struct choice *c);
    void (*end)(struct generation *g);
    void (*fail)(struct generation *g, int status, const char *message);
    void (*whole)(struct generation *g, struct buffer *out);
    // Both kinds; NULL: no log-probabilities in this dialect.
    void (*token)(struct choice *c, const tandem_event *event);
    void (*prompt_token)(struct part *p, const tandem_event *event);
};

struct generation {
    struct exchange *x;
    struct server *s;
    const struct writer *writer;
    tandem_sampling sampling;
    int32_t *bias_ids;
    float *bias;
    size_t max_tokens; // SIZE_MAX: until the context is full
    size_t n;          // choices of each part
    struct part *parts;
    size_t n_parts;
    struct choice *choices; // [n_parts * n]
    size_t n_choices;
    char *stops[MAX_STOP_STRINGS];
    size_t n_stops;
    int32_t stop_ids[MAX_STOP_IDS]; // end a choice as the model's end tokens do
    size_t n_stop_ids;
    bool streams, include_usage, logprobs, echo, timings;
    size_t n_top;
    bool splits_thinking, starts_in_thinking;
    size_t think_budget; // SIZE_MAX: none
    bool has_tools;
    bool may_think;               // its first token may be <think>
    struct automaton *automaton;  // of the answer; NULL: free
    bool constrains_calls;        // ... of what stands between <tool_call> and </tool_call> alone
    struct arena arena;           // of the request, which the fields below point into
    const struct pyjson *tools;   // as the request gave them, in OpenAI's form; NULL: none
    const struct pyjson *allowed; // those of them that may be called, each an object with its name; NULL: all
    char id[48];
    long created;
    double submitted, last_token;
    _Atomic double first_step, first_token;
    struct buffer scratch; // an event in the making
    atomic_size_t n_open;  // choices in progress, one for the submitting worker, and one for a step that told of it
    struct generation *next_told; // server->told
    bool is_told;
    atomic_int fail_status; // 0: it did not fail
    char fail_text[512];
    pthread_mutex_t fail_lock;
    void *own; // the writer's, freed with free()
};

struct generation *generation_create(struct exchange *x, const struct writer *writer, const char *id_prefix);
void generation_free(struct generation *g); // before it was submitted
// Reads the sampling fields that all dialects share: temperature ... logit_bias, seed, stop strings excepted.
bool generation_read_sampling(struct generation *g, const struct pyjson *body, bool thinking, struct fault *f);
bool generation_add_stop(struct generation *g, const struct pyjson *v, const char *name, struct fault *f);
// What the server's options say is taken where the request says nothing.
bool generation_read_stops(struct generation *g, const struct pyjson *body, const char *name, struct fault *f);
void generation_default_stop_ids(struct generation *g);
bool generation_read_stop_ids(struct generation *g, const struct pyjson *body, struct fault *f); // "stop_token_ids"
bool generation_add_part(struct generation *g, struct token_ids *prompt);                        // takes the ids
// Submits. The generation belongs to the engine's thread from now on, whatever comes; the exchange's answer is its
// task.
void generation_submit(struct generation *g);

bool generation_event(void *server, const tandem_event *event); // a tandem_event_callback
// After a step: sends what its events made, once for each connection.
void generations_send(struct server *s);
void generation_cancel(struct generation *g);
// Cancels it if it is too late; true: it was, by `what`. It was not before.
bool generation_check_deadline(struct generation *g, double now, enum timeout *what);
void generations_cancel_all(struct server *s);

// For writers.
void generation_write(struct generation *g, const char *event,
                      const struct buffer *data);                  // one event; event may be NULL
bool write_string(struct buffer *out, const char *text, size_t n); // any bytes: what is no UTF-8 becomes U+FFFD
size_t generation_prompt_tokens(const struct generation *g);
size_t generation_cached_tokens(const struct generation *g);
size_t generation_output_tokens(const struct generation *g);
size_t generation_reasoning_tokens(const struct generation *g);
void random_id(char *out, size_t size, const char *prefix); // prefix and 24 hex digits

#endif
