// serve.c: `tandem serve`: options, signals and last words of the HTTP server.
#include "cli/cli.h"

#include "base/clock.h"
#include "server/server.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DEFAULT_PORT = 8080, DEFAULT_QUEUE = 256, DEFAULT_RUNNING = 32, DEFAULT_GRACE = 30 };

static int signal_pipe[2] = {-1, -1}; // a handler can reach nothing else

static void on_signal(int number) {
    int before = errno;
    char byte = (char)number;
    if (write(signal_pipe[1], &byte, 1) < 0) {
    } // full: enough signals wait already
    errno = before;
}

static bool catch_signals(void) {
    static const int caught[] = {SIGTERM, SIGINT, SIGHUP};
    if (pipe2(signal_pipe, O_CLOEXEC | O_NONBLOCK) != 0)
        return cli_fail("cannot catch signals: %s", strerror(errno)) == 0;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    for (size_t i = 0; i < sizeof caught / sizeof caught[0]; i++) sigaction(caught[i], &action, NULL);
    return true;
}

// The next signal; 0 when none came in time.
static int next_signal(int milliseconds) {
    struct pollfd p = {.fd = signal_pipe[0], .events = POLLIN};
    char byte = 0;
    if (poll(&p, 1, milliseconds) <= 0 || read(signal_pipe[0], &byte, 1) != 1) return 0;
    return byte;
}

static void log_line(void *user, const char *line) {
    (void)user;
    fprintf(stderr, "%s\n", line);
}

// "models/tandem-tiny/" is tandem-tiny, "OWNER/NAME" stays.
static const char *name_of(const char *model, char *text, size_t size) {
    snprintf(text, size, "%s", model);
    size_t n = strlen(text);
    while (n > 1 && text[n - 1] == '/') text[--n] = '\0';
    const char *slash = strrchr(text, '/');
    if (!slash || access(model, F_OK) != 0) return text;
    return slash + 1;
}

// NAME=SECONDS, separated by commas.
static bool read_timeouts(const char *list, struct server_options *s) {
    const struct {
        const char *name;
        double *seconds;
    } known[] = {{"head", &s->head_s},   {"body", &s->body_s}, {"idle", &s->idle_s},
                 {"queue", &s->queue_s}, {"read", &s->read_s}, {"first-token", &s->first_token_s},
                 {"total", &s->total_s}};
    for (const char *at = list;; at++) {
        size_t n = strcspn(at, "="), i = 0;
        while (i < sizeof known / sizeof known[0] && (strlen(known[i].name) != n || strncmp(known[i].name, at, n) != 0))
            i++;
        char *end = NULL;
        double x = at[n] == '=' ? strtod(at + n + 1, &end) : 0;
        if (i == sizeof known / sizeof known[0] || end == at + n + 1 || !(x >= 0.1 && x <= 1e6) ||
            (*end && *end != ',')) {
            cli_usage(
                "--timeouts: expected NAME=SECONDS,... with head, body, idle, queue, first-token, total or read and "
                "0.1 to 1000000 seconds, found \"%s\"",
                at);
            return false;
        }
        *known[i].seconds = x;
        if (!*end) return true;
        at = end;
    }
}

_Static_assert((int)MAX_STOPS <= (int)SERVER_STOP_IDS, "a server takes as many --stop-id as the command line");

// Ids are checked where sampling options are (--stop-id), but for --logit-bias.
static bool read_stops(const struct cli_options *o, const tandem_engine *engine, struct server_options *s) {
    if (o->n_stops > SERVER_STOPS) {
        cli_usage("--stop: a server takes at most %d texts, found %zu", SERVER_STOPS, o->n_stops);
        return false;
    }
    for (size_t i = 0; i < o->n_stops; i++) {
        if (strlen(o->stops[i]) <= SERVER_STOP_BYTES) continue;
        cli_usage("--stop: a text has at most %d bytes, found %zu", SERVER_STOP_BYTES, strlen(o->stops[i]));
        return false;
    }
    for (size_t i = 0, n = engine->model->config.n_vocab; i < o->n_biases; i++)
        if ((size_t)o->bias_ids[i] >= n)
            return cli_fail("--logit-bias: token id %d is not in the vocabulary of %zu", o->bias_ids[i], n) == 0;
    s->stops = o->stops;
    s->n_stops = o->n_stops;
    s->stop_ids = o->stop_ids;
    s->n_stop_ids = o->n_stop_ids;
    return true;
}

static bool read_options(const struct cli_options *o, const tandem_engine *engine, struct server_options *s,
                         size_t *grace) {
    size_t port = DEFAULT_PORT;
    struct cli_sampling sampling;
    if (!cli_size(o, OPT_PORT, 0, 65535, &port) || !cli_size(o, OPT_GRACE, 0, 86400, grace) ||
        !cli_on_off(o, OPT_THINK, &s->think) || !cli_on_off(o, OPT_SANDBOX, &s->sandbox) ||
        (o->given[OPT_TIMEOUTS] && !read_timeouts(o->text[OPT_TIMEOUTS], s)))
        return false;
    for (int thinking = 0; thinking < 2; thinking++) {
        if (!cli_sampling(o, engine, thinking, &sampling)) return false;
        s->sampling[thinking] = sampling.values;
    }
    if (!read_stops(o, engine, s)) return false;
    s->host = o->text[OPT_HOST];
    s->port = (int)port;
    s->api_key_file = o->text[OPT_API_KEY_FILE];
    s->tls_cert = o->text[OPT_TLS_CERT];
    s->tls_key = o->text[OPT_TLS_KEY];
    s->seed_given = o->given[OPT_SEED];
    s->max_tokens = sampling.max_tokens;
    s->log_prompts = o->given[OPT_LOG_PROMPTS];
    if (o->given[OPT_LOG_REQUESTS]) s->log = log_line;
    return true;
}

// Serves until SIGTERM or SIGINT; then requests in progress get their time, unless a second one comes.
static void serve(struct server *server, double grace) {
    double until = 0;
    for (;;) {
        int number = next_signal(until > 0 ? 50 : 1000);
        if (number == SIGHUP) {
            struct error err = {0};
            if (server_reload_keys(server, &err)) fprintf(stderr, "tandem: serve: the keys were read again\n");
            else fprintf(stderr, "tandem: serve: warning: the keys stay as they were: %s\n", err.text);
        } else if (number && until > 0) {
            return;
        } else if (number) {
            fprintf(stderr, "tandem: serve: shutting down; %zu requests get up to %.0f s (a second signal ends them)\n",
                    server_n_active(server), grace);
            server_drain(server);
            until = clock_seconds() + grace;
        }
        if (until > 0 && (server_n_active(server) == 0 || clock_seconds() > until)) return;
    }
}

static int serve_run(const struct cli_options *o) {
    struct server_options options = {0};
    size_t queue = DEFAULT_QUEUE, running = DEFAULT_RUNNING, kv_tokens = 0, chunk = 0, context = 0,
           grace = DEFAULT_GRACE;
    char name[512];
    struct error err = {0};
    if (!cli_size(o, OPT_MAX_QUEUE, 1, 1000000, &queue) || !cli_size(o, OPT_MAX_RUNNING, 1, 1024, &running) ||
        !cli_size(o, OPT_KV_TOKENS, 1, (size_t)1 << 32, &kv_tokens) || !cli_size(o, OPT_CHUNK, 1, 65536, &chunk) ||
        !cli_size(o, OPT_CTX, 1, (size_t)1 << 24, &context))
        return EXIT_USAGE;
    const char *model = cli_model(o);
    if (!model) return EXIT_FAULT;
    tandem_options base = {.kv_tokens = kv_tokens ? kv_tokens
                                        : context ? 4 * context
                                                  : 4 * 8192,
                           .max_batch = running,
                           .max_queue = queue,
                           .chunk = chunk};
    tandem_engine *engine = cli_open_as(o, &base);
    if (!engine) return EXIT_FAULT;
    options.model_name = o->given[OPT_MODEL_NAME] ? o->text[OPT_MODEL_NAME] : name_of(model, name, sizeof name);
    int status = EXIT_FAULT;
    if (!engine->tokenizer) {
        cli_fail("the model has no usable tokenizer: %s", engine->tokenizer_error);
    } else if (!read_options(o, engine, &options, &grace)) {
        status = EXIT_USAGE;
    } else if (catch_signals()) {
        struct server *server = server_start(engine, &options, &err);
        if (server) {
            const char *why, *sandbox = server_sandbox(server, &why);
            fprintf(stderr, "tandem: serve: sandbox: %s%s%s\n", sandbox, *why ? ": " : "", why);
            fprintf(stderr, "listening on %s\n", server_url(server));
            serve(server, (double)grace);
            server_stop(server);
            status = EXIT_GOOD;
        } else {
            cli_fail("%s", err.text);
        }
    }
    tandem_close(engine);
    return status;
}

static const enum option_id options[] = {OPT_HELP,
                                         OPT_HOST,
                                         OPT_PORT,
                                         OPT_API_KEY_FILE,
                                         OPT_TLS_CERT,
                                         OPT_TLS_KEY,
                                         OPT_MODEL_NAME,
                                         OPT_MAX_QUEUE,
                                         OPT_MAX_RUNNING,
                                         OPT_KV_TOKENS,
                                         OPT_CHUNK,
                                         OPT_GRACE,
                                         OPT_TIMEOUTS,
                                         OPT_SANDBOX,
                                         OPT_LOG_REQUESTS,
                                         OPT_LOG_PROMPTS,
                                         OPT_THREADS,
                                         OPT_CTX,
                                         OPT_FUSION,
                                         OPT_KV_TYPE,
                                         OPT_REPACK,
                                         OPT_ISA,
                                         OPT_DEVICE,
                                         OPT_TEMPLATE,
                                         OPT_THINK,
                                         OPT_SEED,
                                         OPT_TEMP,
                                         OPT_TOP_K,
                                         OPT_TOP_P,
                                         OPT_MIN_P,
                                         OPT_REPEAT_PENALTY,
                                         OPT_PRESENCE_PENALTY,
                                         OPT_FREQUENCY_PENALTY,
                                         OPT_GREEDY,
                                         OPT_LOGIT_BIAS,
                                         OPT_STOP,
                                         OPT_STOP_ID,
                                         OPT_MAX_TOKENS};

const struct command command_serve = {
    .name = "serve",
    .summary = "HTTP server: OpenAI's and Anthropic's interfaces",
    .usage = "[MODEL] [options]",
    .details =
        "Sampling options, --stop, --stop-id and --logit-bias are the defaults of requests that do not say. "
        "Prints\n"
        "`listening on http://HOST:PORT` on stderr when it is ready. SIGTERM ends it when the requests in progress "
        "are\ndone, a second one at once.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = serve_run,
};
