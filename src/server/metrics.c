// metrics.c: /metrics, in Prometheus' text format.
#include "server/internal.h"

#include "base/clock.h"

#include <inttypes.h>

static const double bounds[] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60};
enum { N_BOUNDS = sizeof bounds / sizeof bounds[0] };

void histogram_add(struct histogram *h, double seconds) {
    size_t i = 0;
    while (i < N_BOUNDS && seconds > bounds[i]) i++;
    h->count[i]++;
    h->n++;
    h->sum += seconds;
}

static void move(struct histogram *from, struct histogram *to) {
    for (size_t i = 0; i < sizeof from->count / sizeof from->count[0]; i++) to->count[i] += from->count[i];
    to->n += from->n;
    to->sum += from->sum;
    *from = (struct histogram){0};
}

void times_move(struct times *from, struct times *to) {
    move(&from->first_token, &to->first_token);
    move(&from->between_tokens, &to->between_tokens);
}

static bool put(struct buffer *out, const char *name, const char *type, const char *help, double value) {
    return buffer_printf(out, "# HELP tandem_%s %s\n# TYPE tandem_%s %s\ntandem_%s %.17g\n", name, help, name, type,
                         name, value);
}

static bool put_histogram(struct buffer *out, const char *name, const char *help, const struct histogram *h) {
    bool ok = buffer_printf(out, "# HELP tandem_%s %s\n# TYPE tandem_%s histogram\n", name, help, name);
    uint64_t below = 0;
    for (size_t i = 0; ok && i < N_BOUNDS; i++) {
        below += h->count[i];
        ok = buffer_printf(out, "tandem_%s_bucket{le=\"%g\"} %" PRIu64 "\n", name, bounds[i], below);
    }
    return ok &&
           buffer_printf(out,
                         "tandem_%s_bucket{le=\"+Inf\"} %" PRIu64 "\ntandem_%s_sum %.9g\ntandem_%s_count %" PRIu64 "\n",
                         name, h->n, name, h->sum, name, h->n);
}

bool metrics_write(struct server *s, struct buffer *out) {
    tandem_stats now = tandem_statistics(s->engine);
    pthread_mutex_lock(&s->lock);
    struct metrics m = s->metrics;
    pthread_mutex_unlock(&s->lock);
    double pages = (double)now.kv_pages, uptime = clock_seconds() - s->started;
    bool ok =
        put(out, "requests_running", "gauge", "Sequences that are computed now.", (double)now.n_running) &&
        put(out, "requests_waiting", "gauge", "Requests in the queue.", (double)now.n_waiting) &&
        put(out, "queue_limit", "gauge", "Requests that the queue holds.", (double)now.max_waiting) &&
        put(out, "kv_pages", "gauge", "KV pages in all.", pages) &&
        put(out, "kv_pages_used", "gauge", "KV pages that running sequences hold.", (double)now.kv_pages_used) &&
        put(out, "kv_pages_cached", "gauge", "KV pages kept for equal prompt beginnings.",
            (double)now.kv_pages_cached) &&
        put(out, "kv_usage_ratio", "gauge", "Share of the KV pages in use.",
            pages > 0 ? (double)now.kv_pages_used / pages : 0) &&
        put(out, "steps_total", "counter", "Steps of the model.", (double)now.n_steps) &&
        put(out, "prompt_tokens_total", "counter", "Prompt tokens computed.", (double)now.n_prompt_tokens) &&
        put(out, "cached_tokens_total", "counter", "Prompt tokens taken from the prefix cache.",
            (double)now.n_cached_tokens) &&
        put(out, "generated_tokens_total", "counter", "Tokens generated.", (double)now.n_generated_tokens) &&
        put(out, "preemptions_total", "counter", "Sequences that gave their KV back and were computed again.",
            (double)now.n_preemptions) &&
        put(out, "evictions_total", "counter", "Cached KV pages given up.", (double)now.n_evictions) &&
        put(out, "rejected_queue_total", "counter", "Requests refused because the queue was full.",
            (double)m.rejected_queue) &&
        put(out, "rejected_key_total", "counter", "Requests without a valid API key.", (double)m.rejected_key) &&
        put(out, "disconnects_total", "counter", "Answers that were not read to the end.", (double)m.disconnects) &&
        put(out, "uptime_seconds", "gauge", "Since the start.", uptime) &&
        buffer_append_text(
            out, "# HELP tandem_responses_total Answers by class of status.\n# TYPE tandem_responses_total counter\n");
    for (int i = 1; ok && i < 6; i++)
        ok = buffer_printf(out, "tandem_responses_total{status=\"%dxx\"} %" PRIu64 "\n", i, m.requests[i]);
    static const char *const timeouts[N_TIMEOUTS] = {"head", "body", "idle", "queue", "first_token", "total", "read"};
    ok = ok &&
         buffer_append_text(out, "# HELP tandem_timeouts_total What was given up because a limit of time had passed.\n"
                                 "# TYPE tandem_timeouts_total counter\n");
    for (int i = 0; ok && i < N_TIMEOUTS; i++)
        ok = buffer_printf(out, "tandem_timeouts_total{limit=\"%s\"} %" PRIu64 "\n", timeouts[i], m.timeouts[i]);
    return ok &&
           put_histogram(out, "first_token_seconds", "From the request to its first token.", &m.times.first_token) &&
           put_histogram(out, "between_tokens_seconds", "From one token of an answer to the next.",
                         &m.times.between_tokens) &&
           put_histogram(out, "request_seconds", "From the request to the end of its answer.", &m.total);
}
