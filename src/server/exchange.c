// exchange.c: one HTTP request and its answer. It owns the hand-over between the threads that make an answer and the
// loop that sends it.
#include "server/internal.h"

#include "base/clock.h"
#include "base/size.h"
#include "base/utf8.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct exchange *exchange_create(struct server *s, struct MHD_Connection *connection, const struct route *route) {
    struct exchange *x = size_alloc_zero(1, sizeof *x);
    if (!x) return NULL;
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    x->server = s;
    x->route = route;
    x->number = atomic_fetch_add(&s->next_number, 1) + 1;
    x->fd = info ? info->connect_fd : -1;
    x->connection = connection;
    x->content_type = "application/json";
    x->last_write = x->last_read = x->received = clock_seconds();
    atomic_init(&x->refs, 1);
    pthread_mutex_init(&x->lock, NULL);
    pthread_mutex_lock(&s->lock);
    x->next = s->exchanges;
    if (x->next) x->next->prev = x;
    s->exchanges = x;
    pthread_mutex_unlock(&s->lock);
    return x;
}

void exchange_unref(struct exchange *x) {
    struct server *s = x->server;
    for (int n = atomic_load(&x->refs); n > 1;)
        if (atomic_compare_exchange_weak(&x->refs, &n, n - 1)) return;
    // The lists are read under the server's lock: what is found there must not vanish.
    pthread_mutex_lock(&s->lock);
    if (atomic_fetch_sub(&x->refs, 1) > 1) {
        pthread_mutex_unlock(&s->lock);
        return;
    }
    if (x->prev) x->prev->next = x->next;
    else s->exchanges = x->next;
    if (x->next) x->next->prev = x->prev;
    pthread_mutex_unlock(&s->lock);
    buffer_free(&x->body);
    buffer_free(&x->out);
    pthread_mutex_destroy(&x->lock);
    free(x);
}

// Lets the loop go on with this connection. The lock is held.
static void wake(struct exchange *x) {
    if (!x->suspended || !x->connection || !x->ready) return;
    x->suspended = false;
    MHD_resume_connection(x->connection);
}

// The answer is complete: what is left of it is to be read at 1 KiB/s or faster, so that nobody can hold it for ever.
// The lock is held.
static void complete(struct exchange *x) {
    x->done = true;
    x->read_until = clock_seconds() + x->server->options.read_s + (double)(x->out.len - x->sent) / 1024;
}

void exchange_reply_type(struct exchange *x, int status, struct buffer *body, const char *content_type) {
    pthread_mutex_lock(&x->lock);
    if (!x->ready) {
        buffer_free(&x->out);
        x->out = *body;
        *body = (struct buffer){0};
        x->status = status;
        x->content_type = content_type;
        x->ready = true;
        complete(x);
        wake(x);
    }
    pthread_mutex_unlock(&x->lock);
    buffer_free(body);
}

void exchange_reply(struct exchange *x, int status, struct buffer *body) {
    exchange_reply_type(x, status, body, "application/json");
}

void exchange_stream(struct exchange *x) {
    pthread_mutex_lock(&x->lock);
    if (!x->ready) { // else it failed meanwhile, and says so
        x->status = 200;
        x->content_type = "text/event-stream";
        x->stream = x->ready = true;
        x->last_write = x->last_read = clock_seconds();
        wake(x);
    }
    pthread_mutex_unlock(&x->lock);
}

void exchange_write(struct exchange *x, const struct buffer *bytes) {
    pthread_mutex_lock(&x->lock);
    if (x->connection && !x->done && !x->broken) {
        if (x->sent > 65536 && x->sent > x->out.len / 2) {
            memmove(x->out.data, x->out.data + x->sent, x->out.len - x->sent);
            x->out.len -= x->sent;
            x->sent = 0;
        }
        if (x->out.len - x->sent + bytes->len > MAX_PENDING || !buffer_append(&x->out, bytes->data, bytes->len))
            x->broken = true; // the watcher cancels and drops it
        x->last_write = clock_seconds();
    }
    pthread_mutex_unlock(&x->lock);
}

void exchange_wake(struct exchange *x) {
    pthread_mutex_lock(&x->lock);
    if (x->out.len > x->sent || x->broken) wake(x);
    pthread_mutex_unlock(&x->lock);
}

void exchange_end(struct exchange *x) {
    pthread_mutex_lock(&x->lock);
    complete(x);
    wake(x);
    pthread_mutex_unlock(&x->lock);
}

bool exchange_is_gone(struct exchange *x) {
    pthread_mutex_lock(&x->lock);
    bool gone = !x->connection || x->broken;
    pthread_mutex_unlock(&x->lock);
    return gone;
}

static const char *openai_type(int status) {
    switch (status) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 404: return "not_found_error";
    case 429: return "rate_limit_error";
    default:
        return status < 500 ? "invalid_request_error" : status == 503 ? "service_unavailable_error" : "server_error";
    }
}

static const char *anthropic_type(int status) {
    switch (status) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 404: return "not_found_error";
    case 413: return "request_too_large";
    case 429: return "rate_limit_error";
    case 503: return "overloaded_error";
    default: return status < 500 ? "invalid_request_error" : "api_error";
    }
}

// A message may quote a request's bytes, cut anywhere: what is no UTF-8 becomes '?'.
static void clean(char *text, size_t n) {
    uint32_t code;
    for (size_t i = 0, length; i < n; i += length) {
        length = utf8_decode((const unsigned char *)text + i, n - i, &code);
        if (length == 0) text[i] = '?', length = 1;
    }
}

bool error_json(struct buffer *out, enum dialect dialect, int status, const char *param, const char *code,
                const char *given) {
    char message[sizeof(struct error)];
    snprintf(message, sizeof message, "%s", given);
    size_t n = strlen(message);
    clean(message, n);
    if (dialect == ANTHROPIC)
        return buffer_printf(
                   out, "{\"type\": \"error\", \"error\": {\"type\": \"%s\", \"message\": ", anthropic_type(status)) &&
               pyjson_write_string(message, n, out) && buffer_append_text(out, "}}");
    bool ok = buffer_append_text(out, "{\"error\": {\"message\": ") && pyjson_write_string(message, n, out) &&
              buffer_printf(out, ", \"type\": \"%s\", \"param\": ", openai_type(status));
    if (param && *param) ok = ok && pyjson_write_string(param, strlen(param), out);
    else ok = ok && buffer_append_text(out, "null");
    if (code) return ok && buffer_printf(out, ", \"code\": \"%s\"}}", code);
    return ok && buffer_printf(out, ", \"code\": %d}}", status);
}

void exchange_fail(struct exchange *x, int status, const char *param, const char *message) {
    struct buffer body = {0};
    error_json(&body, x->route ? x->route->dialect : OPENAI, status, param, NULL, message);
    exchange_reply(x, status, &body);
}

void exchange_fault(struct exchange *x, const struct fault *f) {
    struct buffer body = {0};
    int status = f->status ? f->status : 500;
    error_json(&body, x->route->dialect, status, f->param, f->code, f->status ? f->error.text : "out of memory");
    exchange_reply(x, status, &body);
}
