// http.c: starting and stopping the server, and libmicrohttpd's callbacks: heads, bodies, keys, and sending answers. It
// owns the loop's side of an exchange; what an answer says is made elsewhere.
#include "server/generate.h"
#include "server/internal.h"

#include "base/clock.h"
#include "base/file.h"
#include "base/size.h"
#include "server/masks.h"
#include "server/replies.h"
#include "server/sandbox.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <netdb.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// A body that is too large is read and thrown away up to DISCARD bytes, so that the client gets to read why.
enum {
    DISCARD = 64 << 20,
    DEFAULT_BODY = 8 << 20,
    DEFAULT_CONNECTIONS = 16384,
    HEAD_BYTES = 32 << 10,
    SEND_BUFFER = 128 << 10,
    MAX_FDS = 1 << 20
};

// ---- Heads

static const char *header(struct MHD_Connection *c, const char *name) {
    return MHD_lookup_connection_value(c, MHD_HEADER_KIND, name);
}

// Does a Host header's value name this machine's loopback? A name that somebody else's DNS answers does not.
static bool is_loopback_host(const char *host) {
    static const char *const names[] = {"localhost", "127.0.0.1", "[::1]"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        size_t n = strlen(names[i]);
        if (strncasecmp(host, names[i], n) == 0 && (host[n] == '\0' || host[n] == ':')) return true;
    }
    return strncmp(host, "127.", 4) == 0 && strspn(host, "0123456789.:") == strlen(host);
}

// 0, or the status with which the head is refused, and why.
static int check_head(struct exchange *x, struct MHD_Connection *c, const char **why) {
    struct server *s = x->server;
    const char *host = header(c, "Host"), *origin = header(c, "Origin"), *length = header(c, "Content-Length");
    static const char rebinding[] =
        "the Host header must name the loopback address: this server is for this machine only";
    if (s->loopback && host && !is_loopback_host(host)) return *why = rebinding, 403;
    if (origin) { // a page of ours, or no page at all: there is no CORS
        const char *at = strstr(origin, "://");
        if (!at || !host || strcasecmp(at + 3, host) != 0)
            return *why = "requests from web pages of another origin are refused (Origin differs from Host)", 403;
    }
    if (s->options.api_key_file && !x->route->keyless) { // not s->keys: SIGHUP changes it
        const char *bearer = header(c, "Authorization"), *key = header(c, "x-api-key");
        if (bearer && strncasecmp(bearer, "Bearer ", 7) == 0) key = bearer + 7;
        pthread_mutex_lock(&s->lock);
        x->tenant = keys_check(s->keys, key ? key : "");
        if (!x->tenant) s->metrics.rejected_key++;
        pthread_mutex_unlock(&s->lock);
        if (!x->tenant)
            return *why = key ? "the API key is not valid" : "an API key is required: Authorization: Bearer KEY", 401;
    }
    if (length) {
        char *end;
        errno = 0;
        unsigned long long n = strtoull(length, &end, 10);
        if (errno || *end || n > DISCARD) return *why = NULL, 413;
    }
    return 0;
}

// A page of ours and the like need no key; what is unknown does, so that nobody can look around.
static const struct route unknown_route = {.path = "", .method = "", .dialect = OPENAI};

// ---- Sending

static ssize_t read_stream(void *user, uint64_t position, char *to, size_t max) {
    struct exchange *x = user;
    (void)position;
    ssize_t result = 0;
    pthread_mutex_lock(&x->lock);
    size_t n = x->out.len - x->sent;
    if (x->broken) {
        // Not END_WITH_ERROR: libmicrohttpd 0.9.75 then keeps the connection until it times out. Nothing can be sent
        // any more, which it notices and closes.
        shutdown(x->fd, SHUT_RDWR);
        result = MHD_CONTENT_READER_END_OF_STREAM;
    } else if (n) {
        if (n > max) n = max;
        memcpy(to, x->out.data + x->sent, n);
        x->sent += n;
        x->total += n;
        if (x->sent == x->out.len) x->sent = x->out.len = 0;
        x->last_read = clock_seconds();
        result = (ssize_t)n;
    } else if (x->done) {
        result = MHD_CONTENT_READER_END_OF_STREAM;
    } else {
        x->suspended = true;
        MHD_suspend_connection(x->connection);
    }
    pthread_mutex_unlock(&x->lock);
    return result;
}

static enum MHD_Result send_answer(struct exchange *x) {
    struct MHD_Response *r;
    char number[32];
    if (x->stream) {
        r = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 16384, read_stream, x, NULL);
    } else {
        size_t n = x->out.len;
        char *bytes = n ? buffer_take(&x->out) : NULL;
        r = bytes ? MHD_create_response_from_buffer(n, bytes, MHD_RESPMEM_MUST_FREE)
                  : MHD_create_response_from_buffer(0, (void *)(uintptr_t) "", MHD_RESPMEM_PERSISTENT);
        x->total = n;
    }
    if (!r) return MHD_NO;
    snprintf(number, sizeof number, "req_%016" PRIx64, x->number);
    MHD_add_response_header(r, "Content-Type", x->content_type);
    MHD_add_response_header(r, "x-request-id", number);
    MHD_add_response_header(r, "Cache-Control", "no-store");
    MHD_add_response_header(r, "X-Content-Type-Options", "nosniff");
    if (x->status == 429 || x->status == 503) MHD_add_response_header(r, "Retry-After", "1");
    if (x->allow) MHD_add_response_header(r, "Allow", strcmp(x->allow, "GET") == 0 ? "GET, HEAD" : x->allow);
    if (x->status == 401) MHD_add_response_header(r, "WWW-Authenticate", "Bearer");
    if (x->is_page) {
        MHD_add_response_header(r, "Content-Security-Policy", buffer_text(&x->server->page_policy));
        MHD_add_response_header(r, "Referrer-Policy", "no-referrer");
    }
    if (x->stream) MHD_add_response_header(r, "X-Accel-Buffering", "no"); // nginx: pass it on at once
    enum MHD_Result ok = MHD_queue_response(x->connection, (unsigned)x->status, r);
    MHD_destroy_response(r);
    return ok;
}

// Answers from the loop itself: nothing else knows this exchange yet.
static enum MHD_Result refuse(struct exchange *x, int status, const char *why) {
    exchange_fail(x, status, NULL, why);
    return send_answer(x);
}

// ---- Receiving

static struct connection *connection_of(struct MHD_Connection *c) {
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    return info ? info->socket_context : NULL;
}

static void set_deadline(struct server *s, struct MHD_Connection *c, double seconds, bool in_body) {
    struct connection *n = connection_of(c);
    if (!n) return;
    pthread_mutex_lock(&s->lock);
    if (n->left && seconds > LEFT_S) seconds = LEFT_S;
    n->deadline = seconds > 0 ? clock_seconds() + seconds : 0;
    n->in_body = in_body;
    n->fresh = false;
    pthread_mutex_unlock(&s->lock);
}

static enum MHD_Result too_large(struct exchange *x) {
    char why[128];
    snprintf(why, sizeof why, "the body is larger than the limit of %zu bytes", x->server->options.max_body);
    return refuse(x, 413, why);
}

static enum MHD_Result begin(struct server *s, struct MHD_Connection *c, const char *url, const char *method,
                             void **slot) {
    const char *allow;
    const struct route *route = route_find(s, url, method, &allow);
    struct exchange *x = exchange_create(s, c, route ? route : &unknown_route);
    if (!x) return MHD_NO;
    *slot = x;
    struct connection *n = connection_of(c);
    pthread_mutex_lock(&s->lock);
    if (n) n->exchange = x;
    pthread_mutex_unlock(&s->lock);
    if (!route && strncmp(url, "/v1/messages", 12) == 0) {
        static const struct route unknown_anthropic = {.path = "", .method = "", .dialect = ANTHROPIC};
        x->route = &unknown_anthropic;
    }
    const char *why = NULL;
    int status = check_head(x, c, &why);
    if (status == 413) return too_large(x);
    if (status) return refuse(x, status, why);
    if (!route) {
        char text[512];
        x->allow = allow;
        if (allow) snprintf(text, sizeof text, "wrong method: %.20s %.150s (expected %s)", method, url, allow);
        else
            snprintf(text, sizeof text, "unknown route: %.20s %.150s (did you mean %s?)", method, url, route_hint(url));
        return refuse(x, allow ? 405 : 404, text);
    }
    if (route->generates) {
        if (atomic_load(&s->draining)) return refuse(x, 503, "the server is shutting down");
        tandem_stats now = tandem_statistics(s->engine);
        if (now.n_waiting >= now.max_waiting) {
            pthread_mutex_lock(&s->lock);
            s->metrics.rejected_queue++;
            pthread_mutex_unlock(&s->lock);
            return refuse(x, 429, "the queue is full: try again later");
        }
    }
    set_deadline(s, c, s->options.body_s, true);
    return MHD_YES;
}

// The body is there: a worker takes over.
static enum MHD_Result hand_over(struct server *s, struct exchange *x) {
    set_deadline(s, x->connection, 0, false);
    x->received = clock_seconds();
    pthread_mutex_lock(&s->job_lock);
    bool room = s->n_jobs < MAX_JOBS;
    if (room) {
        pthread_mutex_lock(&x->lock);
        x->handed_over = x->suspended = true;
        MHD_suspend_connection(x->connection);
        pthread_mutex_unlock(&x->lock);
        atomic_fetch_add(&x->refs, 1);
        s->jobs[(s->first_job + s->n_jobs++) % MAX_JOBS] = x;
        pthread_cond_signal(&s->job_came);
    }
    pthread_mutex_unlock(&s->job_lock);
    if (!room) return refuse(x, 429, "too many requests wait to be read: try again later");
    watch_exchange(x);
    return MHD_YES;
}

static enum MHD_Result on_request(void *user, struct MHD_Connection *c, const char *url, const char *method,
                                  const char *version, const char *upload, size_t *n_upload, void **slot) {
    struct server *s = user;
    struct exchange *x = *slot;
    (void)version;
    if (!x) return begin(s, c, url, method, slot);
    if (*n_upload) {
        size_t n = *n_upload;
        *n_upload = 0;
        if (x->ready) return MHD_YES; // refused already
        x->received_bytes += n;
        if (x->received_bytes > s->options.max_body) {
            buffer_free(&x->body);
            return x->received_bytes > DISCARD ? MHD_NO : MHD_YES;
        }
        return buffer_append(&x->body, upload, n) ? MHD_YES : MHD_NO;
    }
    if (x->received_bytes > s->options.max_body) return too_large(x);
    if (!x->handed_over) {
        if (strcmp(x->route->method, "POST") == 0) return hand_over(s, x);
        set_deadline(s, c, 0, false);
        x->route->handle(x);
    }
    pthread_mutex_lock(&x->lock);
    bool send = x->ready && !x->broken; // else the server stops, or gave this client up
    pthread_mutex_unlock(&x->lock);
    return send ? send_answer(x) : MHD_NO; // what is ready does not change any more
}

static void log_exchange(struct server *s, const struct exchange *x, bool whole) {
    struct buffer line = {0};
    char when[32];
    time_t now = time(NULL);
    struct tm utc;
    gmtime_r(&now, &utc);
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &utc);
    buffer_printf(&line,
                  "{\"time\": \"%s\", \"request\": \"req_%016" PRIx64 "\", \"route\": \"%s\", \"status\": %d, "
                  "\"seconds\": %.4f, \"bytes_in\": %zu, \"bytes_out\": %zu, \"end\": \"%s\"",
                  when, x->number, x->route->path, x->status, clock_seconds() - x->received, x->body.len, x->total,
                  whole     ? "sent"
                  : x->lost ? x->lost
                            : "lost");
    if (s->options.log_prompts && x->body.len) {
        buffer_append_text(&line, ", \"body\": ");
        struct arena arena = {0};
        struct pyjson *v = pyjson_parse(&arena, x->body.data, x->body.len, "body", NULL);
        if (!v || !pyjson_write_portable(v, &line)) buffer_append_text(&line, "null");
        arena_free(&arena);
    }
    buffer_append_byte(&line, '}');
    s->options.log(s->options.user, buffer_text(&line));
    buffer_free(&line);
}

static void on_completed(void *user, struct MHD_Connection *c, void **slot, enum MHD_RequestTerminationCode why) {
    struct server *s = user;
    struct exchange *x = *slot;
    if (!x) return;
    *slot = NULL;
    pthread_mutex_lock(&x->lock);
    bool whole = why == MHD_REQUEST_TERMINATED_COMPLETED_OK && !x->broken;
    x->connection = NULL;
    x->suspended = false;
    if (x->generation) generation_cancel(x->generation);
    pthread_mutex_unlock(&x->lock);
    pthread_mutex_lock(&s->lock);
    struct connection *n = connection_of(c);
    if (n) n->exchange = NULL;
    s->metrics.requests[x->status / 100 < 6 ? x->status / 100 : 0]++;
    if (!whole) s->metrics.disconnects++;
    pthread_mutex_unlock(&s->lock);
    if (whole) set_deadline(s, c, s->options.idle_s, false); // the next request on this connection
    if (s->options.log) log_exchange(s, x, whole);
    exchange_unref(x);
}

static void on_connection(void *user, struct MHD_Connection *c, void **slot, enum MHD_ConnectionNotificationCode what) {
    struct server *s = user;
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        struct connection *n = size_alloc_zero(1, sizeof *n);
        const union MHD_ConnectionInfo *info = MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD);
        if (!n) return;
        n->fd = info ? info->connect_fd : -1;
        // A reader that does not read: what it leaves unread waits in our buffer, which is bounded, not in the
        // kernel's.
        setsockopt(n->fd, SOL_SOCKET, SO_SNDBUF, &(int){SEND_BUFFER}, sizeof(int));
        n->deadline = clock_seconds() + s->options.head_s;
        n->fresh = true;
        pthread_mutex_lock(&s->lock);
        watch_connection(s, n);
        n->next = s->connections;
        if (n->next) n->next->prev = n;
        s->connections = n;
        pthread_mutex_unlock(&s->lock);
        *slot = n;
    } else if (*slot) {
        struct connection *n = *slot;
        pthread_mutex_lock(&s->lock);
        if (n->prev) n->prev->next = n->next;
        else s->connections = n->next;
        if (n->next) n->next->prev = n->prev;
        if (n->fd >= 0 && (size_t)n->fd < s->n_fds && s->by_fd[n->fd] == n) s->by_fd[n->fd] = NULL;
        pthread_mutex_unlock(&s->lock);
        free(n);
        *slot = NULL;
    }
}

// ---- Threads

static void *work(void *user) {
    struct server *s = user;
    for (;;) {
        pthread_mutex_lock(&s->job_lock);
        while (s->n_jobs == 0 && !atomic_load(&s->stopping)) pthread_cond_wait(&s->job_came, &s->job_lock);
        struct exchange *x = NULL;
        if (s->n_jobs) {
            x = s->jobs[s->first_job];
            s->first_job = (s->first_job + 1) % MAX_JOBS;
            s->n_jobs--;
        }
        pthread_mutex_unlock(&s->job_lock);
        if (!x) return NULL;
        if (atomic_load(&s->stopping)) exchange_fail(x, 503, NULL, "the server is shutting down");
        else if (!exchange_is_gone(x)) x->route->handle(x);
        exchange_unref(x);
    }
}

static void *run_engine(void *user) {
    struct server *s = user;
    while (!atomic_load(&s->stopping) || tandem_wait(s->engine, 0)) {
        if (tandem_wait(s->engine, 0.1)) {
            tandem_step(s->engine, generation_event, s);
            generations_send(s);
        }
        atomic_store(&s->last_step, clock_seconds());
    }
    return NULL;
}

// ---- Starting and stopping

// The address to bind. `loopback` tells whether only this machine can reach it.
static bool resolve(const char *host, int port, struct sockaddr_storage *to, bool *loopback, struct error *err) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV}, *list = NULL;
    char service[16];
    snprintf(service, sizeof service, "%d", port);
    int status = getaddrinfo(host, service, &hints, &list);
    if (status) return error_set(err, "host %s: %s", host, gai_strerror(status));
    memcpy(to, list->ai_addr, list->ai_addrlen);
    freeaddrinfo(list);
    if (to->ss_family == AF_INET) *loopback = (ntohl(((struct sockaddr_in *)to)->sin_addr.s_addr) >> 24) == 127;
    else *loopback = IN6_IS_ADDR_LOOPBACK(&((struct sockaddr_in6 *)to)->sin6_addr);
    return true;
}

static bool load_tls(struct server *s, struct error *err) {
    const struct server_options *o = &s->options;
    struct buffer cert = {0}, key = {0};
    if (!o->tls_cert != !o->tls_key) return error_set(err, "TLS needs both a certificate and a key");
    if (!o->tls_cert) return true;
    bool ok = file_read(o->tls_cert, 1 << 20, &cert, err) && file_read(o->tls_key, 1 << 20, &key, err);
    s->tls_cert = ok ? buffer_take(&cert) : NULL;
    s->tls_key = ok ? buffer_take(&key) : NULL;
    buffer_free(&cert);
    buffer_free(&key);
    return s->tls_cert && s->tls_key ? true : ok ? error_set(err, "out of memory") : false;
}

// Seconds after which libmicrohttpd itself closes a connection on which nothing moves: an answer of one piece that is
// not read. The other limits come first.
static unsigned inactivity(const struct server_options *o) {
    double longest = fmax(fmax(o->head_s, o->body_s), fmax(o->idle_s, o->read_s));
    return (unsigned)fmin(longest + 2, 1e6);
}

static bool listen_on(struct server *s, struct error *err) {
    struct server_options *o = &s->options;
    struct sockaddr_storage address;
    struct rlimit files;
    memset(&address, 0, sizeof address);
    if (!resolve(o->host, o->port, &address, &s->loopback, err)) return false;
    if (!s->loopback && !s->keys)
        return error_set(err,
                         "host %s can be reached from other machines: that needs --api-key-file (a key a line), or "
                         "--host 127.0.0.1",
                         o->host);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
        if (files.rlim_cur != RLIM_INFINITY && files.rlim_cur > 128 && o->max_connections > files.rlim_cur - 100)
            o->max_connections = files.rlim_cur - 100;
        s->n_fds = files.rlim_cur < MAX_FDS ? (size_t)files.rlim_cur : MAX_FDS;
    }
    s->by_fd = size_alloc_zero(s->n_fds, sizeof *s->by_fd);
    if (!s->by_fd) return error_set(err, "out of memory for %zu connections", s->n_fds);
    struct MHD_OptionItem tls[] = {{MHD_OPTION_HTTPS_MEM_CERT, 0, s->tls_cert},
                                   {MHD_OPTION_HTTPS_MEM_KEY, 0, s->tls_key},
                                   {MHD_OPTION_END, 0, NULL}};
    if (!s->tls_cert) tls[0].option = MHD_OPTION_END;
    unsigned flags = MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | (s->tls_cert ? MHD_USE_TLS : 0) |
                     (address.ss_family == AF_INET6 ? MHD_USE_IPv6 : 0);
    s->daemon =
        MHD_start_daemon(flags, (uint16_t)o->port, NULL, NULL, on_request, s, MHD_OPTION_SOCK_ADDR, &address,
                         MHD_OPTION_NOTIFY_COMPLETED, on_completed, s, MHD_OPTION_NOTIFY_CONNECTION, on_connection, s,
                         MHD_OPTION_CONNECTION_LIMIT, (unsigned)o->max_connections, MHD_OPTION_CONNECTION_TIMEOUT,
                         inactivity(o), MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)HEAD_BYTES,
                         MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_LISTENING_ADDRESS_REUSE, 1u,
                         MHD_OPTION_LISTEN_BACKLOG_SIZE, 1024u, MHD_OPTION_ARRAY, tls, MHD_OPTION_END);
    if (!s->daemon)
        return error_set(err, "cannot listen on %s port %d: %s", o->host, o->port,
                         errno ? strerror(errno) : "is the TLS certificate valid?");
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(s->daemon, MHD_DAEMON_INFO_BIND_PORT);
    snprintf(s->url, sizeof s->url, strchr(o->host, ':') ? "%s://[%s]:%d" : "%s://%s:%d",
             s->tls_cert ? "https" : "http", o->host, info ? info->port : o->port);
    return true;
}

static void set_defaults(struct server_options *o) {
    if (!o->host) o->host = "127.0.0.1";
    if (!o->max_body) o->max_body = DEFAULT_BODY;
    if (!o->max_connections) o->max_connections = DEFAULT_CONNECTIONS;
    if (o->head_s <= 0) o->head_s = 10;
    if (o->body_s <= 0) o->body_s = 60;
    if (o->idle_s <= 0) o->idle_s = 60;
    if (o->queue_s <= 0) o->queue_s = 600;
    if (o->first_token_s <= 0) o->first_token_s = 1800;
    if (o->total_s <= 0) o->total_s = 3600;
    if (o->ping_s <= 0) o->ping_s = 5;
    if (o->read_s <= 0) o->read_s = 60;
}

// All threads but the engine's have little to do, but at once, however busy the processors are. Threads that ask for
// short turns get them earlier (Linux 6.12 or newer, others take no notice), and they take over what their maker asked
// for.
static void ask_for_short_turns(bool on) {
    struct { // as the kernel has it; few C libraries do
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
        uint32_t least, most;
    } a = {.size = sizeof a};
    int before = errno;
    if (syscall(SYS_sched_getattr, 0, &a, sizeof a, 0) == 0 && a.policy == SCHED_OTHER) {
        a.runtime = on ? 100000 : 0; // nanoseconds; 0: the usual
        syscall(SYS_sched_setattr, 0, &a, 0);
    }
    errno = before;
}

static bool start_threads(struct server *s, struct error *err) {
    if (pthread_create(&s->engine_thread, NULL, run_engine, s) == 0) s->n_threads++;
    ask_for_short_turns(true);
    if (s->n_threads == 1 && pthread_create(&s->watcher, NULL, watch_run, s) == 0) s->n_threads++;
    for (int i = 0; i < N_WORKERS && s->n_threads == 2 + i; i++)
        if (pthread_create(&s->workers[i], NULL, work, s) == 0) s->n_threads++;
    return s->n_threads == 2 + N_WORKERS || error_set(err, "cannot start the server's threads: %s", strerror(errno));
}

// The last step: every thread is there, and every file but the keys was read.
static bool enter_sandbox(struct server *s, struct error *err) {
    if (s->options.sandbox == 0) return error_set(&s->no_sandbox, "it was turned off"), true;
    tzset(); // reads a file the first time
    if (s->engine->ops->device) error_set(&s->no_sandbox, "the GPU's driver needs what it forbids");
    else s->sandboxed = sandbox_enter(s->keys != NULL, &s->no_sandbox);
    return s->sandboxed || s->options.sandbox < 0 || error_set(err, "no sandbox: %s", s->no_sandbox.text);
}

struct server *server_start(tandem_engine *engine, const struct server_options *options, struct error *err) {
    struct server *s = size_alloc_zero(1, sizeof *s);
    if (!s) {
        error_set(err, "out of memory");
        return NULL;
    }
    s->engine = engine;
    s->options = *options;
    set_defaults(&s->options);
    s->started = clock_seconds();
    s->created = (long)time(NULL);
    atomic_init(&s->last_step, s->started); // else a first step that takes long looks like none for an age
    pthread_mutex_init(&s->lock, NULL);
    pthread_mutex_init(&s->job_lock, NULL);
    pthread_cond_init(&s->job_came, NULL);
    s->epoll = epoll_create1(EPOLL_CLOEXEC);
    s->replies = replies_create();
    bool ok = s->epoll >= 0 && s->replies ? true : error_set(err, "cannot start: %s", strerror(errno));
    if (ok)
        s->vocabulary = vocabulary_create(engine->tokenizer, engine->model->config.n_vocab, engine->end_ids,
                                          engine->n_end_ids, err);
    if (s->vocabulary) s->masks = masks_create(s->vocabulary, MAX_MASK_BYTES, err);
    ok = ok && s->masks && (page_policy(&s->page_policy) || error_set(err, "cannot read the web page"));
    if (ok && options->api_key_file) ok = (s->keys = keys_load(options->api_key_file, err)) != NULL;
    ok = ok && load_tls(s, err) && start_threads(s, err) && listen_on(s, err);
    ask_for_short_turns(false);
    if (ok && enter_sandbox(s, err)) return s;
    server_stop(s);
    return NULL;
}

const char *server_url(const struct server *s) {
    return s->url;
}

const char *server_sandbox(const struct server *s, const char **why_not) {
    if (why_not) *why_not = s->no_sandbox.text;
    return s->sandboxed ? "seccomp" : "off";
}

bool server_reload_keys(struct server *s, struct error *err) {
    if (!s->options.api_key_file) return error_set(err, "there is no key file");
    struct keys *now = keys_load(s->options.api_key_file, err), *before;
    if (!now) return false; // the old ones stay
    pthread_mutex_lock(&s->lock);
    before = s->keys;
    s->keys = now;
    pthread_mutex_unlock(&s->lock);
    keys_free(before);
    return true;
}

void server_drain(struct server *s) {
    atomic_store(&s->draining, true);
}

size_t server_n_active(struct server *s) {
    return atomic_load(&s->n_generations);
}

static bool has_exchanges(struct server *s) {
    pthread_mutex_lock(&s->lock);
    bool any = s->exchanges != NULL;
    pthread_mutex_unlock(&s->lock);
    return any;
}

void server_stop(struct server *s) {
    atomic_store(&s->draining, true);
    pthread_mutex_lock(&s->job_lock);
    atomic_store(&s->stopping, true);
    pthread_cond_broadcast(&s->job_came);
    pthread_mutex_unlock(&s->job_lock);
    for (int i = 2; i < s->n_threads; i++) pthread_join(s->workers[i - 2], NULL);
    generations_cancel_all(s);
    if (s->n_threads > 0) pthread_join(s->engine_thread, NULL);
    if (s->daemon) {
        // Last words get a moment to be sent.
        for (double end = clock_seconds() + 1; clock_seconds() < end && has_exchanges(s);) usleep(10000);
        pthread_mutex_lock(&s->lock); // the loop can stop only when nothing is suspended
        for (struct exchange *x = s->exchanges; x; x = x->next) {
            pthread_mutex_lock(&x->lock);
            x->broken = true;
            if (x->suspended && x->connection) MHD_resume_connection(x->connection);
            x->suspended = false;
            pthread_mutex_unlock(&x->lock);
        }
        pthread_mutex_unlock(&s->lock);
        MHD_stop_daemon(s->daemon);
    }
    if (s->n_threads > 1) pthread_join(s->watcher, NULL);
    if (s->epoll >= 0) close(s->epoll);
    free(s->by_fd);
    keys_free(s->keys);
    buffer_free(&s->page_policy);
    replies_free(s->replies);
    masks_free(s->masks);
    vocabulary_free(s->vocabulary);
    free(s->tls_cert);
    if (s->tls_key) memset(s->tls_key, 0, strlen(s->tls_key));
    free(s->tls_key);
    pthread_mutex_destroy(&s->lock);
    pthread_mutex_destroy(&s->job_lock);
    pthread_cond_destroy(&s->job_came);
    free(s);
}
