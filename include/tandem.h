/* tandem.h: the public C API of tandem, a Qwen3 inference engine.
 *
 * Two nouns. An ENGINE is a loaded model with its threads, its tokenizer and its planned memory; it is shared. A
 * SESSION is one conversation: a list of token ids and the KV computed for them; it is mutable and belongs to one
 * caller.
 *
 * Many users at once go through REQUESTS: they are submitted to an engine, which schedules them itself.
 *
 * Threads: every call on an engine or on its sessions may come from any thread; calls on one engine take turns (a lock
 * inside), and one session must not be used by two threads at once. The one exception is tandem_session_cancel, which
 * any thread may call at any time. Callbacks run on the thread that made the call and must not call back into the same
 * engine.
 *
 * Errors: calls that can fail take `err` and `err_size` (NULL and 0 are fine). On failure they return NULL or a
 * negative status and write a NUL-terminated message that names the thing, what was expected and what was found.
 *
 * Numbers: the same session state and sampling give the same tokens, whatever runs beside it, however the prompt was
 * cut into appends, and at any thread count.
 */
#ifndef TANDEM_H
#define TANDEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define TANDEM_API __attribute__((visibility("default")))
#else
#define TANDEM_API
#endif

typedef struct tandem_engine tandem_engine;
typedef struct tandem_session tandem_session;

/* What calls return: >= 0 is good. */
enum tandem_status {
    TANDEM_OK = 0,
    TANDEM_END = 1,       /* the model ended its text: an end token came */
    TANDEM_CANCELLED = 2, /* tandem_session_cancel was called; the session is as it was after the last token */
    TANDEM_FULL = 3,      /* the context is full: nothing was generated */
    TANDEM_BUSY = 4,      /* the queue of requests is full: try later */
    TANDEM_ERROR = -1
};

/* "0.1.0". */
TANDEM_API const char *tandem_version(void);

/* ---- Engine -------------------------------------------------------------------------------------------------------
 */

enum tandem_log_level { TANDEM_LOG_INFO = 0, TANDEM_LOG_WARN = 1 };

/* All zero is a good default for every field but `model`. */
typedef struct tandem_options {
    const char *model;   /* a folder in Hugging Face's layout, a .gguf file, OWNER/NAME in the Hugging Face cache, or
                            synthetic:SHAPE[:TYPE[:SEED]] for random weights */
    int threads;         /* 0: as many as this process may use */
    size_t context;      /* most tokens of a session; 0: the model's, at most 8,192 */
    size_t kv_tokens;    /* tokens that the KV of all sessions together holds; 0: `context` */
    size_t chunk;        /* most prompt tokens of one step, of all its sequences; 0: 256, on a GPU 2,048 */
    size_t max_batch;    /* most sessions in one tandem_next_many, most sequences in one tandem_step; 0: 8 */
    size_t max_queue;    /* most requests that wait for tandem_step; 0: 1,024 */
    const char *fusion;  /* "on", "off" or a list of fused ops; NULL: "on" */
    const char *device;  /* "auto", "cpu", "cuda" or "cuda:N"; NULL: "auto", a GPU where one can run the model */
    const char *isa;     /* "auto", "portable", "avx2", "avx512", "avx512vnni", "avx512bf16"; NULL: "auto" */
    const char *kv_type; /* "bf16", "f16", "f32", "q8_0" or "fp8"; NULL: "bf16" */
    const char *repack;  /* "on": a CPU multiplies a copy of the weights in an order of its own, which is kept in
                            ~/.cache/tandem for GGUF files of 32 MiB and more; "memory": it is kept nowhere; "off":
                            there is none; NULL: "on" */
    const char *chat_template; /* a name ("qwen3", "chatml", ...); NULL: recognised from the model's template */
    void (*log)(void *user, enum tandem_log_level level, const char *text); /* or NULL */
    void (*progress)(void *user, const char *what, double fraction);        /* or NULL; 1 ends a bar */
    void *user;
} tandem_options;

/* Loads a model and plans all memory. The caller owns the engine. NULL on error. */
TANDEM_API tandem_engine *tandem_open(const tandem_options *options, char *err, size_t err_size);

/* Frees the engine. Its sessions must have been freed before. NULL is fine. */
TANDEM_API void tandem_close(tandem_engine *engine);

/* Most tokens that a session of this engine may hold. */
TANDEM_API size_t tandem_context(const tandem_engine *engine);

/* The memory plan in bytes. */
typedef struct tandem_memory {
    size_t weights;     /* read in every step: mapped from the file, or the GPU's copy */
    size_t kv;          /* KV pages, all sessions together */
    size_t activations; /* activations, logits, sampling and scratch of a step */
} tandem_memory;
TANDEM_API tandem_memory tandem_memory_plan(const tandem_engine *engine);

/* ---- Text ---------------------------------------------------------------------------------------------------------
 */

/* Text (n bytes, any bytes) to ids. `special`: the text of special tokens (<|im_start|>) becomes their ids; else it is
 * plain text. *ids is malloc'ed: free it with tandem_free. Returns TANDEM_OK or TANDEM_ERROR. */
TANDEM_API int tandem_tokenize(const tandem_engine *engine, const char *text, size_t n, bool special, int32_t **ids,
                               size_t *n_ids, char *err, size_t err_size);

/* Ids to bytes (not necessarily whole UTF-8 characters). *text is malloc'ed and NUL-terminated. */
TANDEM_API int tandem_detokenize(const tandem_engine *engine, const int32_t *ids, size_t n_ids, char **text, size_t *n,
                                 char *err, size_t err_size);

/* Chat messages to the prompt's ids. `json`: an array of {"role", "content", ...}, or an object with "messages",
 * "tools", "enable_thinking", "add_generation_prompt". `thinking`: -1 as the document says, 0 off, 1 on. Text inside
 * messages never becomes special tokens. *ids is malloc'ed. */
TANDEM_API int tandem_apply_template(const tandem_engine *engine, const char *json, size_t n, int thinking,
                                     int32_t **ids, size_t *n_ids, char *err, size_t err_size);

TANDEM_API void tandem_free(void *memory);

/* ---- Sampling -----------------------------------------------------------------------------------------------------
 */

/* How the next token is chosen. tandem_sampling_default fills it from the model's generation_config.json (and, for
 * Qwen3, the preset of the thinking mode). Order: logit_bias, repeat_penalty, presence and frequency penalties,
 * temperature, top_k, top_p, min_p. Noise is a function of (seed, position, token id) alone. */
typedef struct tandem_sampling {
    double temperature;    /* 0: greedy; 0 to 100 */
    int32_t top_k;         /* 0: off */
    double top_p;          /* 1: off; above 0 */
    double min_p;          /* 0: off; relative to the best token's probability */
    double repeat_penalty; /* 1: off; divides positive logits of every token in the context, multiplies negative ones */
    double presence_penalty;  /* subtracted once from every generated token's logit; -2 to 2 */
    double frequency_penalty; /* subtracted for each time that a token was generated; -2 to 2 */
    uint64_t seed;
    const int32_t *bias_ids; /* [n_bias] token ids and what is added to their logits; the caller's memory, copied */
    const float *bias;
    size_t n_bias;
    bool ignore_end; /* the end tokens are never sampled */
} tandem_sampling;

TANDEM_API tandem_sampling tandem_sampling_default(const tandem_engine *engine, bool thinking);

/* ---- Session ------------------------------------------------------------------------------------------------------
 */

/* A new, empty session. `sampling` NULL: the default with thinking on. The caller owns it. */
TANDEM_API tandem_session *tandem_session_new(tandem_engine *engine, const tandem_sampling *sampling, char *err,
                                              size_t err_size);
TANDEM_API void tandem_session_free(tandem_session *session); /* NULL is fine */

/* Changes the sampling from the next token on. */
TANDEM_API int tandem_session_set_sampling(tandem_session *session, const tandem_sampling *sampling, char *err,
                                           size_t err_size);

/* Puts ids behind what the session holds. Nothing is computed yet. An id out of range or a full context is an error,
 * and leaves the session as it was. */
TANDEM_API int tandem_session_append(tandem_session *session, const int32_t *ids, size_t n, char *err, size_t err_size);

/* Makes the session's ids equal to `ids`, keeping the KV of the longest common prefix; *reused tells how many tokens
 * that is (may be NULL). This is how a next turn continues a conversation. */
TANDEM_API int tandem_session_set(tandem_session *session, const int32_t *ids, size_t n, size_t *reused, char *err,
                                  size_t err_size);

/* One generated token. */
typedef struct tandem_token {
    int32_t id;
    float logprob; /* natural log of the model's probability, before sampling changed it */
} tandem_token;

/* Computes what was appended, samples the next token and puts it behind the session's ids. TANDEM_OK: *token holds it;
 * TANDEM_END: an end token came (it is put behind the ids too, and *token holds it); TANDEM_FULL, TANDEM_CANCELLED,
 * TANDEM_ERROR. NaN or Inf in the logits is an error whose message names the op and the layer that made it first:
 * nothing is sampled, and the session's KV is dropped. */
TANDEM_API int tandem_session_next(tandem_session *session, tandem_token *token, char *err, size_t err_size);

/* The same for several sessions of one engine in one step: status[i] and tokens[i] are session i's. Prompts that are
 * not yet computed are computed first, in chunks. A session's tokens are the same as alone. Returns TANDEM_ERROR only
 * when no step could be made (more than max_batch sessions, sessions of different engines, one session twice). */
TANDEM_API int tandem_next_many(tandem_session *const *sessions, size_t n, tandem_token *tokens, int *status, char *err,
                                size_t err_size);

/* Called for every token with its bytes (not necessarily whole characters); returning false ends the generation. */
typedef bool tandem_token_callback(void *user, const tandem_token *token, const char *bytes, size_t n_bytes);

/* Calls tandem_session_next up to max_tokens times. Returns the last status: TANDEM_OK when max_tokens were generated
 * or the callback said stop. The callback is not called for the end token. */
TANDEM_API int tandem_session_generate(tandem_session *session, size_t max_tokens, tandem_token_callback *callback,
                                       void *user, char *err, size_t err_size);

/* A second session with the same ids; the KV is shared until one of them changes it. */
TANDEM_API tandem_session *tandem_session_fork(tandem_session *session, char *err, size_t err_size);

/* Drops all ids from position n on. n beyond the end is an error. */
TANDEM_API int tandem_session_truncate(tandem_session *session, size_t n, char *err, size_t err_size);

/* Makes the call in progress on this session, or the next one, return TANDEM_CANCELLED within one step. Any thread,
 * also a signal handler. */
TANDEM_API void tandem_session_cancel(tandem_session *session);

/* The session's ids, valid until the next call on it; *n tells how many. */
TANDEM_API const int32_t *tandem_session_ids(const tandem_session *session, size_t *n);

/* ---- Requests -----------------------------------------------------------------------------------------------------
 *
 * A request is a prompt and how to continue it. Any thread submits; one thread calls tandem_step in a loop and gets
 * events. Each step runs one batch: a token for every sequence that generates and chunks of the prompts of others.
 * Requests with the same `tenant` share the KV of equal beginnings; the events tell how many tokens that saved. A
 * request's tokens and log-probabilities are the same bits, whatever runs beside it. Every accepted request gets
 * exactly one TANDEM_EVENT_DONE for each of its choices.
 */

enum tandem_event_kind {
    TANDEM_EVENT_START = 0,  /* its first tokens were computed: n_prompt, n_cached */
    TANDEM_EVENT_PROMPT = 1, /* prompt_logprobs: the log-probability of the prompt's token at `position` */
    TANDEM_EVENT_TOKEN = 2,  /* a generated token (end tokens come too) */
    TANDEM_EVENT_DONE = 3    /* the choice has ended: finish, error */
};

enum tandem_finish {
    TANDEM_FINISH_END = 0,       /* an end token came, or the callback returned false */
    TANDEM_FINISH_LENGTH = 1,    /* max_tokens, or the context is full */
    TANDEM_FINISH_CANCELLED = 2, /* tandem_cancel */
    TANDEM_FINISH_ERROR = 3      /* `error` says what */
};

typedef struct tandem_event {
    enum tandem_event_kind kind;
    uint64_t request;
    void *user;              /* the request's */
    size_t choice;           /* 0 to n - 1 */
    size_t position;         /* PROMPT, TOKEN: of the token in its sequence */
    tandem_token token;      /* PROMPT, TOKEN; logprob is 0 unless asked for */
    const tandem_token *top; /* [n_top] the most probable tokens in falling order, if asked for */
    size_t n_top;
    size_t n_prompt, n_cached, n_generated;
    enum tandem_finish finish; /* DONE */
    const char *error;         /* DONE with FINISH_ERROR; else NULL */
    uint64_t logits_hash;      /* DONE: of all logits that tokens were sampled from, if asked for */
} tandem_event;

/* All zero but the prompt is good: one choice, the default sampling, until the context is full. */
typedef struct tandem_request_options {
    const int32_t *prompt; /* [n_prompt] copied; at least one token */
    size_t n_prompt;
    size_t max_tokens;               /* 0: until the context is full */
    bool prompt_only;                /* nothing is generated */
    const tandem_sampling *sampling; /* copied; NULL: the default. Choice i > 0 draws from a seed of its own */
    size_t n;                        /* choices of the same prompt, whose KV they share; 0: 1 */
    int priority;                    /* -1: after all others, 0, 1: before all others */
    uint64_t tenant;                 /* who asks; below 2^62 */
    bool logprobs;                   /* fill token.logprob */
    size_t n_top;                    /* and so many of the most probable tokens; 0 to 100 */
    bool prompt_logprobs; /* for the prompt's tokens from the second on, too (nothing is taken from the cache then) */
    bool hash;            /* fill logits_hash */
    void *user;
    /* Called by tandem_step before a token is sampled, for all choices of a step before the first of its events.
     * Returns a bit for each id that may come (bit id % 32 of word id / 32; at least one is set), valid until it is
     * called for this choice again or the choice has ended, or NULL: all may. NULL: no such constraint. */
    const uint32_t *(*mask)(void *user, size_t choice);
} tandem_request_options;

/* TANDEM_OK: *id (may be NULL) names the request, and events will come; TANDEM_BUSY: the queue is full; TANDEM_ERROR:
 * a field is wrong, or the prompt is longer than the context or the KV. Does not wait for a step in progress. */
TANDEM_API int tandem_submit(tandem_engine *engine, const tandem_request_options *options, uint64_t *id, char *err,
                             size_t err_size);

/* Ends a request at the next step; events that are under way may still come. An unknown id is fine. Does not wait. */
TANDEM_API void tandem_cancel(tandem_engine *engine, uint64_t id);

/* Called for each event, in order; must not call the engine, but for tandem_submit and tandem_cancel. Returning false
 * for a TOKEN ends that choice with TANDEM_FINISH_END. */
typedef bool tandem_event_callback(void *user, const tandem_event *event);

/* Makes one step of all requests. TANDEM_OK: call again; TANDEM_END: there is no request. Faults end requests, not
 * steps. On a GPU that chooses all tokens of a step, the call queues that step and tells of the one before; what ended
 * in the meantime costs the step a row, and changes nothing else. */
TANDEM_API int tandem_step(tandem_engine *engine, tandem_event_callback *callback, void *user);

/* Waits until there is something to do for tandem_step, at most so long. True: there is. */
TANDEM_API bool tandem_wait(tandem_engine *engine, double seconds);

typedef struct tandem_stats {
    size_t n_running, n_waiting, max_waiting; /* sequences now, and the queue's limit */
    size_t kv_pages, kv_pages_used,
        kv_pages_cached; /* all; held by sequences; kept for equal beginnings, held by none */
    uint64_t n_steps, n_prompt_tokens, n_cached_tokens, n_generated_tokens, n_preemptions, n_evictions; /* ever */
} tandem_stats;

/* Of the moment after the last step. Does not wait. */
TANDEM_API tandem_stats tandem_statistics(tandem_engine *engine);

#ifdef __cplusplus
}
#endif

#endif
