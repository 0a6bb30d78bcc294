// watch.c: the thread that looks after what no other thread would notice: clients that left while their connection was
// suspended, deadlines of heads, bodies and generations, readers that do not read, and silence in a stream.
#include "server/generate.h"
#include "server/internal.h"

#include "base/clock.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/socket.h>

// An event names the descriptor and, since those are used again, its connection.
static struct epoll_event interest(const struct connection *c) {
    return (struct epoll_event){.events = EPOLLRDHUP | EPOLLET,
                                .data.u64 = (uint64_t)c->serial << 32 | (uint32_t)c->fd};
}

bool watch_connection(struct server *s, struct connection *c) {
    c->serial = ++s->last_serial;
    if (c->fd < 0 || (size_t)c->fd >= s->n_fds) return false;
    s->by_fd[c->fd] = c;
    struct epoll_event e = interest(c);
    return epoll_ctl(s->epoll, EPOLL_CTL_ADD, c->fd, &e) == 0; // closing the descriptor takes it out again
}

void watch_exchange(struct exchange *x) {
    struct server *s = x->server;
    pthread_mutex_lock(&s->lock);
    struct connection *c = (size_t)x->fd < s->n_fds ? s->by_fd[x->fd] : NULL;
    if (c) {
        struct epoll_event e = interest(c);
        epoll_ctl(s->epoll, EPOLL_CTL_MOD, c->fd, &e); // tells again what was told already
    }
    pthread_mutex_unlock(&s->lock);
}

// Cancels what is in progress and wakes the connection, so that the loop closes it. x->lock is held.
static void give_up(struct exchange *x) {
    x->broken = true;
    if (x->generation) generation_cancel(x->generation);
    if (x->connection && x->suspended) {
        x->suspended = false;
        MHD_resume_connection(x->connection);
    }
}

static void look_at_exchange(struct server *s, struct exchange *x, double now) {
    static const struct buffer ping = {.data = (char *)(uintptr_t) ": ping\n\n", .len = 8, .cap = 9};
    bool silent = false;
    enum timeout what;
    pthread_mutex_lock(&x->lock);
    if (x->generation && generation_check_deadline(x->generation, now, &what)) s->metrics.timeouts[what]++;
    bool unread = x->stream && x->out.len > x->sent;
    bool stalls = (unread && now - x->last_read > s->options.read_s) || (x->done && now > x->read_until);
    if (x->connection && stalls && !x->lost) {
        s->metrics.timeouts[TIMEOUT_READ]++;
        x->lost = "timed out: not read (limit: read)";
        give_up(x);
        shutdown(x->fd, SHUT_RDWR); // the loop waits for this socket to become writable
    } else if (x->connection && x->handed_over) {
        if (x->broken) {
            give_up(x);
            if (unread) shutdown(x->fd, SHUT_RDWR);
        } else if (x->stream && !x->done && !unread) {
            silent = now - x->last_write >= s->options.ping_s;
            x->last_read = now; // nothing to read is no stall
        }
    }
    pthread_mutex_unlock(&x->lock);
    if (silent) {
        exchange_write(x, &ping);
        exchange_wake(x);
    }
}

// How much a connection has sent since it was made.
static uint64_t n_received(int fd) {
    struct tcp_info info = {0};
    socklen_t size = sizeof info;
    return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0 ? info.tcpi_bytes_received : 0;
}

// A request that does not come to its end. libmicrohttpd reads it and writes nothing, so that a last word can be put
// in; with TLS it would have to be encrypted. A connection that never sent anything, or waits between two requests, is
// closed in silence, as everybody does it.
static void drop_late(struct server *s, struct connection *c) {
    enum timeout what = c->in_body ? TIMEOUT_BODY : c->fresh ? TIMEOUT_HEAD : TIMEOUT_IDLE;
    double limit = c->in_body ? s->options.body_s : s->options.head_s;
    char body[200], answer[400];
    s->metrics.timeouts[what]++;
    if (!s->tls_cert && what != TIMEOUT_IDLE && n_received(c->fd) > 0) {
        int n = snprintf(body, sizeof body,
                         "{\"error\": {\"message\": \"timed out: the request's %s is not complete after %g s (limit: "
                         "%s)\", \"type\": \"invalid_request_error\", \"param\": null, \"code\": 408}}",
                         c->in_body ? "body" : "head", limit, c->in_body ? "body" : "head");
        n = snprintf(answer, sizeof answer,
                     "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
                     "Connection: close\r\n\r\n%s",
                     n, body);
        if (send(c->fd, answer, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
        } // then without
    }
    shutdown(c->fd, SHUT_RDWR);
    c->deadline = 0;
}

static void look_at_all(struct server *s) {
    double now = clock_seconds();
    pthread_mutex_lock(&s->lock);
    for (struct connection *c = s->connections; c; c = c->next)
        if (c->deadline > 0 && now > c->deadline) drop_late(s, c);
    for (struct exchange *x = s->exchanges; x; x = x->next) look_at_exchange(s, x, now);
    pthread_mutex_unlock(&s->lock);
}

// The client closed its side, or the connection broke. A request that is complete is cancelled. One that is not will
// never be: libmicrohttpd may not see an end that came with the last bytes, so that its limit of time is shortened.
static void client_left(struct server *s, uint64_t event) {
    size_t fd = (uint32_t)event;
    double soon = clock_seconds() + LEFT_S;
    pthread_mutex_lock(&s->lock);
    struct connection *c = fd < s->n_fds ? s->by_fd[fd] : NULL;
    if (c && c->serial == event >> 32) {
        struct exchange *x = c->exchange;
        if (x) {
            pthread_mutex_lock(&x->lock);
            if (x->connection && x->handed_over) give_up(x);
            pthread_mutex_unlock(&x->lock);
        }
        c->left = true;
        if (c->deadline > soon) c->deadline = soon;
    }
    pthread_mutex_unlock(&s->lock);
}

void *watch_run(void *user) {
    struct server *s = user;
    double next = 0;
    while (!atomic_load(&s->stopping)) {
        struct epoll_event events[64];
        int n = epoll_wait(s->epoll, events, 64, 100);
        for (int i = 0; i < n; i++) client_left(s, events[i].data.u64);
        double now = clock_seconds();
        if (now < next) continue;
        next = now + 0.25;
        look_at_all(s);
    }
    return NULL;
}
