// server.h: the HTTP server: what the command line starts and stops. Everything else in this folder is private to it.
//
// Threads: libmicrohttpd's loop does input and output and nothing slow; two workers parse requests and build prompts;
// one thread owns the engine; one watches for clients that left, for deadlines and for pings.
#ifndef TANDEM_SERVER_SERVER_H
#define TANDEM_SERVER_SERVER_H

#include "base/error.h"
#include "engine/engine.h"

enum { SERVER_STOPS = 16, SERVER_STOP_BYTES = 1024, SERVER_STOP_IDS = 64 }; // at most: texts, bytes of one, and ids

struct server_options {
    const char *host;         // a name or address; NULL: 127.0.0.1
    int port;                 // 0: a free one
    const char *api_key_file; // NULL: no keys; then `host` must be a loopback address
    const char *tls_cert, *tls_key;
    const char *model_name;      // as clients call it
    tandem_sampling sampling[2]; // defaults: thinking off, on
    // Where a request names none: texts to end before, and ids that end a choice as the model's end tokens do.
    const char *const *stops;
    const int32_t *stop_ids;
    size_t n_stops, n_stop_ids;
    bool seed_given;        // sampling.seed is to be used where a request names none
    size_t max_tokens;      // of a chat reply where the request names none; SIZE_MAX: until the context is full
    int think;              // where a request does not say: -1 as the template has it, 0, 1
    size_t max_body;        // bytes; 0: 8 MiB
    size_t max_connections; // 0: 16,384, at most what the process may open
    double head_s, body_s;  // to receive a request's head, and its body; 0: 10 and 60
    double idle_s;          // until a connection's next request; 0: 60
    double queue_s;         // from a request until its first step; 0: 600
    double first_token_s;   // ... until its first token; 0: 1,800
    double total_s;         // ... until its end; 0: 3,600
    double ping_s;          // silence after which a stream gets a comment; 0: 5
    double read_s;          // a reader that takes nothing for so long is dropped; 0: 60
    int sandbox;            // 0: off, 1: required, -1: where it can be had (not with a GPU)
    bool log_prompts;       // prompts and replies go to the log too
    void (*log)(void *user, const char *line); // a JSON object a line, for each request; any thread. NULL: none
    void *user;
};

struct server;

// Listens and serves. The options' texts must live as long as the server.
struct server *server_start(tandem_engine *engine, const struct server_options *options, struct error *err);
const char *server_url(const struct server *server);                           // http://HOST:PORT
const char *server_sandbox(const struct server *server, const char **why_not); // "seccomp" or "off"
bool server_reload_keys(struct server *server, struct error *err);
void server_drain(struct server *server);      // refuses new work from now on, with 503
size_t server_n_active(struct server *server); // generations in progress
// Ends what is still in progress with an error, closes all connections and frees the server.
void server_stop(struct server *server);

#endif
