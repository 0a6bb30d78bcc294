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

const struct route *route_find(const struct server *s, const char *path, const char *method, bool *path_known) {
    static const struct route model = {"/v1/models/NAME", "GET", OPENAI, false, false, handle_model};
    static const char models[] = "/v1/models/";
    *path_known = false;
    if (strcmp(method, "HEAD") == 0) method = "GET"; // libmicrohttpd leaves the body out
    for (size_t i = 0; i < sizeof routes / sizeof routes[0]; i++) {
        if (strcmp(routes[i].path, path) != 0) continue;
        *path_known = true;
        if (strcmp(routes[i].method, method) == 0) return &routes[i];
    }
    if (strncmp(path, models, sizeof models - 1) == 0 && strcmp(path + sizeof models - 1, s->options.model_name) == 0) {
        *path_known = true;
        if (strcmp(method, "GET") == 0) return &model;
    }
    return NULL;
}
