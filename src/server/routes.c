// routes.c: the table of routes, and the answers that need no model: health, models, version, metrics.
#include "server/internal.h"

#include "base/clock.h"

#include <stdio.h>
#include <string.h>

static void reply_text(struct exchange *x, int status, const char *text) {
    struct buffer body = {0};
    buffer_append_text(&body, text);
    exchange_reply(x, status, &body);
}

static void handle_live(struct exchange *x) {
    reply_text(x, 200, "{\"status\": \"live\"}");
}

// Ready: not draining, and when there is work, tokens come.
static void handle_ready(struct exchange *x) {
    enum { STALL_S = 60 };
    struct server *s = x->server;
    if (atomic_load(&s->draining)) {
        exchange_fail(x, 503, NULL, "not ready: the server is shutting down");
        return;
    }
    tandem_stats now = tandem_statistics(s->engine);
    double last = atomic_load(&s->last_step), silent = clock_seconds() - last;
    if ((now.n_running || now.n_waiting) && silent > STALL_S) {
        exchange_fail(x, 503, NULL, "not ready: there is work, but no step was made for a minute");
        return;
    }
    reply_text(x, 200, "{\"status\": \"ready\"}");
}

static bool put_model(const struct server *s, struct buffer *out) {
    const char *name = s->options.model_name;
    return buffer_append_text(out, "{\"id\": ") && pyjson_write_string(name, strlen(name), out) &&
           buffer_printf(out,
                         ", \"object\": \"model\", \"created\": %ld, \"owned_by\": \"tandem\", \"max_model_len\": %zu, "
                         "\"type\": \"model\", \"display_name\": ",
                         s->created, s->engine->context) &&
           pyjson_write_string(name, strlen(name), out) && buffer_append_byte(out, '}');
}

static void handle_models(struct exchange *x) {
    struct buffer body = {0};
    buffer_append_text(&body, "{\"object\": \"list\", \"data\": [");
    put_model(x->server, &body);
    buffer_append_text(&body, "], \"has_more\": false}");
    exchange_reply(x, 200, &body);
}

static void handle_model(struct exchange *x) {
    struct buffer body = {0};
    put_model(x->server, &body);
    exchange_reply(x, 200, &body);
}

static void handle_version(struct exchange *x) {
    struct buffer body = {0};
    buffer_printf(&body, "{\"version\": \"%s\", \"device\": \"%s\", \"sandbox\": \"%s\"}", tandem_version(),
                  x->server->engine->ops->name, server_sandbox(x->server, NULL));
    exchange_reply(x, 200, &body);
}

static void handle_metrics(struct exchange *x) {
    struct buffer body = {0};
    metrics_write(x->server, &body);
    exchange_reply_type(x, 200, &body, "text/plain; version=0.0.4; charset=utf-8");
}

static const struct route routes[] = {
    {"/", "GET", OPENAI, true, false, handle_page},
    {"/live", "GET", OPENAI, true, false, handle_live},
    {"/ready", "GET", OPENAI, false, false, handle_ready},
    {"/health", "GET", OPENAI, false, false, handle_ready},
    {"/metrics", "GET", OPENAI, false, false, handle_metrics},
    {"/version", "GET", OPENAI, false, false, handle_version},
    {"/v1/models", "GET", OPENAI, false, false, handle_models},
    {"/v1/chat/completions", "POST", OPENAI, false, true, handle_chat},
    {"/v1/completions", "POST", OPENAI, false, true, handle_completions},
    {"/v1/messages", "POST", ANTHROPIC, false, true, handle_messages},
    {"/v1/messages/count_tokens", "POST", ANTHROPIC, false, false, handle_count_tokens},
    {"/v1/responses", "POST", OPENAI, false, true, handle_responses},
    {"/tokenize", "POST", OPENAI, false, false, handle_tokenize},
    {"/detokenize", "POST", OPENAI, false, false, handle_detokenize},
    {"/tokenizer_info", "GET", OPENAI, false, false, handle_tokenizer_info},
    {"/apply-template", "POST", OPENAI, false, false, handle_apply_template},
};

// The path as it is in the table: without empty parts and a slash at the end.
static void normalise(const char *path, char *out, size_t size) {
    size_t n = 0;
    for (; *path && n + 1 < size; path++)
        if (*path != '/' || n == 0 || out[n - 1] != '/') out[n++] = *path;
    while (n > 1 && out[n - 1] == '/') n--;
    out[n] = '\0';
}

static const struct route *find(const struct server *s, const char *path, const char *method, const char **allow) {
    static const struct route model = {"/v1/models/NAME", "GET", OPENAI, false, false, handle_model};
    static const char models[] = "/v1/models/";
    if (strncmp(path, models, sizeof models - 1) == 0 && strcmp(path + sizeof models - 1, s->options.model_name) == 0) {
        *allow = model.method;
        return strcmp(method, "GET") == 0 ? &model : NULL;
    }
    for (size_t i = 0; i < sizeof routes / sizeof routes[0]; i++) {
        if (strcmp(routes[i].path, path) != 0) continue;
        *allow = routes[i].method;
        if (strcmp(routes[i].method, method) == 0) return &routes[i];
    }
    return NULL;
}

const struct route *route_find(const struct server *s, const char *path, const char *method, const char **allow) {
    char plain[300] = "/v1";
    *allow = NULL;
    if (strcmp(method, "HEAD") == 0) method = "GET"; // libmicrohttpd leaves the body out
    normalise(path, plain + 3, sizeof plain - 3);
    const struct route *r = find(s, plain + 3, method, allow);
    if (!*allow) r = find(s, plain, method, allow); // a base URL without its /v1, as llama.cpp takes it
    return r;
}

const char *route_hint(const char *path) {
    size_t n = strlen(path);
    for (size_t i = 1; i < sizeof routes / sizeof routes[0]; i++) { // a base URL that has too much
        size_t m = strlen(routes[i].path);
        if (n > m && strcmp(path + n - m, routes[i].path) == 0) return routes[i].path;
    }
    return "/v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models or another of the routes in "
           "docs/SERVING.md";
}
