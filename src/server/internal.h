// internal.h: what the files of the server share.
#ifndef TANDEM_SERVER_INTERNAL_H
#define TANDEM_SERVER_INTERNAL_H

#include "base/buffer.h"
#include "server/fields.h"
#include "server/server.h"
#include "text/pyjson.h"
#include "text/stream.h"

#include <microhttpd.h>
#include <pthread.h>
#include <stdatomic.h>

enum {
    MAX_PENDING = 4 << 20, // bytes that a slow reader may leave unread
    MAX_STOP_STRINGS = SERVER_STOPS,
    MAX_STOP_IDS = SERVER_STOP_IDS,
    MAX_STOP_BYTES = SERVER_STOP_BYTES,
    MAX_PROMPTS = 128, // of one completion request
    MAX_TOOLS = 256,
    MAX_MASK_BYTES = 64 << 20, // of automata that are kept for requests to come
    N_WORKERS = 2,
    LEFT_S = 1,    // seconds for what a client still sent before it left
    MAX_JOBS = 512 // bodies that wait for a worker
};

enum dialect { OPENAI, ANTHROPIC };

struct exchange;
struct generation;

struct route {
    const char *path, *method;
    enum dialect dialect;
    bool keyless;                       // no API key is asked for
    bool generates;                     // refused while draining and when the queue is full
    void (*handle)(struct exchange *x); // on the loop for GET, on a worker for POST
};

// One HTTP request, from its head to the last byte of its answer. Two owners: libmicrohttpd's connection, and whoever
// makes the answer (a worker, then the generation).
struct exchange {
    struct server *server;
    const struct route *route;
    uint64_t number, tenant;
    struct buffer body;
    size_t received_bytes;
    bool is_page;      // the answer is the web page: it goes with its policy
    const char *allow; // of a wrong method: the right one
    double received;   // when its body was complete
    int fd;
    atomic_int refs;

    struct exchange *prev, *next; // server->exchanges; guarded by the server's lock

    pthread_mutex_t lock;              // guards all below
    struct MHD_Connection *connection; // NULL: the client is gone
    bool handed_over;                  // a worker has it
    bool suspended, ready, stream, done, broken;
    int status;
    const char *content_type;
    struct buffer out; // from `sent` on: not yet taken by the connection
    size_t sent, total;
    double last_write, last_read;
    double read_until;             // when the rest of a complete answer is to be read
    const char *lost;              // why the answer was given up; NULL
    struct generation *generation; // in progress; NULL
};

struct connection { // one TCP connection; guarded by the server's lock
    struct connection *prev, *next;
    struct exchange *exchange; // the request in progress; NULL
    uint32_t serial;           // descriptors are used again
    int fd;
    double deadline; // for the next request's head or body; 0: none
    bool in_body;    // it is the body's
    bool fresh;      // no request has come yet
    bool left;       // its client will send no more
};

// What a request, a client or the model was too slow for; `--timeouts` and the metrics name them so.
enum timeout {
    TIMEOUT_HEAD,
    TIMEOUT_BODY,
    TIMEOUT_IDLE,
    TIMEOUT_QUEUE,
    TIMEOUT_FIRST_TOKEN,
    TIMEOUT_TOTAL,
    TIMEOUT_READ,
    N_TIMEOUTS
};

struct histogram {
    uint64_t count[16];
    double sum;
    uint64_t n;
};

struct times {
    struct histogram first_token, between_tokens;
};

struct metrics {          // guarded by the server's lock
    uint64_t requests[6]; // by status / 100
    uint64_t rejected_queue, rejected_key, disconnects, timeouts[N_TIMEOUTS];
    struct times times;
    struct histogram total;
};

struct replies;
struct keys;
struct vocabulary;
struct masks;

struct server {
    tandem_engine *engine;
    struct server_options options;
    char url[300];
    struct buffer page_policy;
    char *tls_cert, *tls_key;
    struct MHD_Daemon *daemon;
    bool loopback, sandboxed;
    struct error no_sandbox; // why not
    double started;
    long created; // wall clock, for "created" of the model
    atomic_bool draining, stopping;
    _Atomic double last_step; // when the engine made one, or was idle
    struct generation *told;  // the engine's thread alone: those that the step in progress had events for
    struct times step_times;  // the same: what it is to add to the metrics
    atomic_ulong next_number;
    atomic_size_t n_generations;

    pthread_mutex_t lock; // guards the lists and numbers below
    struct exchange *exchanges;
    struct connection *connections;
    struct connection **by_fd; // [n_fds]
    size_t n_fds;
    uint32_t last_serial;
    struct metrics metrics;
    struct keys *keys;       // NULL: none are asked for
    struct replies *replies; // has a lock of its own
    struct vocabulary *vocabulary;
    struct masks *masks;

    pthread_mutex_t job_lock;
    pthread_cond_t job_came;
    struct exchange *jobs[MAX_JOBS]; // a ring
    size_t first_job, n_jobs;
    pthread_t workers[N_WORKERS], engine_thread, watcher;
    int n_threads; // that were started
    int epoll;     // of all connections: whose client left
};

// ---- Exchanges (exchange.c). Any thread, while holding a reference.

struct exchange *exchange_create(struct server *s, struct MHD_Connection *connection, const struct route *route);
void exchange_unref(struct exchange *x);
// The whole answer: takes the bytes of `body` (which is empty afterwards).
void exchange_reply(struct exchange *x, int status, struct buffer *body);
void exchange_reply_type(struct exchange *x, int status, struct buffer *body, const char *content_type);
// An error object of the route's dialect. `param`: the field, or NULL.
void exchange_fail(struct exchange *x, int status, const char *param, const char *message);
void exchange_fault(struct exchange *x, const struct fault *f);      // the same; status 0: out of memory
void exchange_stream(struct exchange *x);                            // begins a stream of events
void exchange_write(struct exchange *x, const struct buffer *bytes); // more of it, which waits for the next line
void exchange_wake(struct exchange *x);                              // what was written is sent
void exchange_end(struct exchange *x);                               // its end
bool exchange_is_gone(struct exchange *x);                           // nobody will read the answer
// The error object as JSON. `code`: NULL: the status.
bool error_json(struct buffer *out, enum dialect dialect, int status, const char *param, const char *code,
                const char *message);

// ---- The rest

// routes.c. NULL: there is none; *allow is then the method that the path has, NULL if it is unknown.
const struct route *route_find(const struct server *s, const char *path, const char *method, const char **allow);
const char *route_hint(const char *path); // of an unknown path: what may be meant

struct keys *keys_load(const char *path, struct error *err);
void keys_free(struct keys *k);
// 0: no such key; else its tenant. Takes the same time for every key.
uint64_t keys_check(const struct keys *k, const char *key);

void *watch_run(void *server);                                 // watch.c: a thread
bool watch_connection(struct server *s, struct connection *c); // it begins; the server's lock is held
void watch_exchange(struct exchange *x); // its request is complete: who left before is noticed now

void histogram_add(struct histogram *h, double seconds); // metrics.c
void times_move(struct times *from, struct times *to);   // adds and clears
bool metrics_write(struct server *s, struct buffer *out);

bool page_policy(struct buffer *out); // page.c
void handle_page(struct exchange *x);
void handle_chat(struct exchange *x);        // chat.c
void handle_completions(struct exchange *x); // completions.c
void handle_messages(struct exchange *x);    // anthropic.c
void handle_count_tokens(struct exchange *x);
void handle_responses(struct exchange *x); // responses.c
void handle_tokenize(struct exchange *x);  // text.c
void handle_detokenize(struct exchange *x);
void handle_apply_template(struct exchange *x);
void handle_tokenizer_info(struct exchange *x);

#endif
