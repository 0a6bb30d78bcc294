// chat.c: OpenAI's /v1/chat/completions, and what /v1/completions shares with it.
#include "server/chat.h"

#include "base/clock.h"
#include "server/format.h"

#include <stdio.h>
#include <string.h>

// ---- Shared with /v1/completions

bool openai_read_common(struct generation *g, const struct pyjson *body, struct fault *f) {
    const struct pyjson *options = NULL;
    int64_t n = 1, limit = -1;
    bool ok = field_bool(body, "stream", &g->streams, f) &&
              field_typed(body, "stream_options", PYJSON_OBJECT, &options, f) &&
              field_int(body, "n", 1, (int64_t)g->s->engine->max_batch, &n, f) &&
              field_int(body, "max_tokens", 0, INT64_MAX, &limit, f) &&
              field_int(body, "max_completion_tokens", 0, INT64_MAX, &limit, f) &&
              field_bool(body, "timings_per_token", &g->timings, f) && generation_read_stops(g, body, "stop", f) &&
              generation_read_stop_ids(g, body, f);
    if (!ok || (options && !field_bool(options, "include_usage", &g->include_usage, f))) return false;
    if (options && !g->streams)
        return fault_set(f, 400, "stream_options", "stream_options: only allowed with \"stream\": true");
    g->n = (size_t)n;
    g->max_tokens = limit < 0 ? g->s->options.max_tokens : (size_t)limit;
    return true;
}

bool openai_usage(struct generation *g, struct buffer *out) {
    size_t n_prompt = generation_prompt_tokens(g), n_output = generation_output_tokens(g);
    return buffer_printf(out,
                         ", \"usage\": {\"prompt_tokens\": %zu, \"completion_tokens\": %zu, \"total_tokens\": %zu, "
                         "\"prompt_tokens_details\": {\"cached_tokens\": %zu}, "
                         "\"completion_tokens_details\": {\"reasoning_tokens\": %zu}}",
                         n_prompt, n_output, n_prompt + n_output, generation_cached_tokens(g),
                         generation_reasoning_tokens(g));
}

bool openai_timings(struct generation *g, struct buffer *out) {
    if (!g->timings) return true;
    double first = g->first_token > 0 ? g->first_token - g->x->received : 0;
    double decode = g->last_token > g->first_token ? g->last_token - g->first_token : 0;
    size_t n_output = generation_output_tokens(g), n_prompt = generation_prompt_tokens(g);
    return buffer_printf(
        out,
        ", \"timings\": {\"cache_n\": %zu, \"prompt_n\": %zu, \"prompt_ms\": %.3f, \"predicted_n\": %zu, "
        "\"predicted_ms\": %.3f, \"predicted_per_second\": %.3f}",
        generation_cached_tokens(g), n_prompt - generation_cached_tokens(g), first * 1e3, n_output, decode * 1e3,
        decode > 0 && n_output > 1 ? (double)(n_output - 1) / decode : 0.0);
}

void openai_fail(struct generation *g, int status, const char *message) {
    buffer_clear(&g->scratch);
    if (error_json(&g->scratch, OPENAI, status, NULL, NULL, message)) generation_write(g, NULL, &g->scratch);
}

void openai_start(struct generation *g, bool ok, const struct fault *f) {
    if (ok) {
        generation_submit(g);
        return;
    }
    exchange_fault(g->x, f);
    generation_free(g);
}

// ---- Log-probabilities

static bool put_token(const struct tandem_engine *e, const tandem_token *t, struct buffer *out) {
    size_t n = 0;
    const char *bytes = tokenizer_token_bytes(e->tokenizer, t->id, &n);
    bool ok = buffer_append_text(out, "{\"token\": ") && write_string(out, bytes ? bytes : "", bytes ? n : 0) &&
              buffer_printf(out, ", \"logprob\": %.9g, \"bytes\": [", (double)t->logprob);
    for (size_t i = 0; ok && bytes && i < n; i++) ok = buffer_printf(out, i ? ", %d" : "%d", (unsigned char)bytes[i]);
    return ok && buffer_append_byte(out, ']');
}

bool openai_put_logprob(const struct tandem_engine *engine, const tandem_event *e, struct buffer *out) {
    bool ok = (!out->len || buffer_append_text(out, ", ")) && put_token(engine, &e->token, out) &&
              buffer_append_text(out, ", \"top_logprobs\": [");
    for (size_t i = 0; ok && i < e->n_top; i++)
        ok = (i == 0 || buffer_append_text(out, ", ")) && put_token(engine, &e->top[i], out) &&
             buffer_append_byte(out, '}');
    return ok && buffer_append_text(out, "]}");
}

static void chat_token(struct choice *c, const tandem_event *e) {
    if (!openai_put_logprob(c->g->s->engine, e, &c->logprobs)) c->failed = true;
}

static bool put_logprobs(struct choice *c, struct buffer *out) {
    if (!c->g->logprobs) return buffer_append_text(out, ", \"logprobs\": null");
    bool ok = buffer_append_text(out, ", \"logprobs\": {\"content\": [") &&
              buffer_append(out, buffer_text(&c->logprobs), c->logprobs.len) &&
              buffer_append_text(out, "], \"refusal\": null}");
    buffer_clear(&c->logprobs);
    return ok;
}

// ---- A stream

// The beginning of a chunk, up to the list of choices.
static bool open_chunk(struct generation *g) {
    buffer_clear(&g->scratch);
    return buffer_printf(&g->scratch,
                         "{\"id\": \"%s\", \"object\": \"chat.completion.chunk\", \"created\": %ld, \"model\": ", g->id,
                         g->created) &&
           write_string(&g->scratch, g->s->options.model_name, strlen(g->s->options.model_name)) &&
           buffer_printf(&g->scratch, ", \"system_fingerprint\": \"tandem-%s\", \"choices\": [", tandem_version());
}

static bool open_delta(struct choice *c) {
    return open_chunk(c->g) && buffer_printf(&c->g->scratch, "{\"index\": %zu, \"delta\": {", c->index);
}

static void send_delta(struct choice *c, bool ok, const char *finish) {
    struct generation *g = c->g;
    struct buffer *out = &g->scratch;
    ok = ok && buffer_append_byte(out, '}') && put_logprobs(c, out);
    if (finish) ok = ok && buffer_printf(out, ", \"finish_reason\": \"%s\"", finish);
    else ok = ok && buffer_append_text(out, ", \"finish_reason\": null");
    if (finish && c->malformed[0])
        ok = ok && buffer_append_text(out, ", \"tool_call_error\": ") &&
             write_string(out, c->malformed, strlen(c->malformed));
    ok = ok && buffer_append_text(out, "}]") && openai_timings(g, out);
    if (g->include_usage) ok = ok && buffer_append_text(out, ", \"usage\": null");
    if (ok && buffer_append_byte(out, '}')) generation_write(g, NULL, out);
    else c->failed = true;
}

static void chat_begin(struct generation *g) {
    for (size_t i = 0; i < g->n_choices; i++)
        send_delta(&g->choices[i],
                   open_delta(&g->choices[i]) &&
                       buffer_append_text(&g->scratch, "\"role\": \"assistant\", \"content\": \"\""),
                   NULL);
}

static void chat_text(struct choice *c, enum stream_part part, const char *text, size_t n) {
    const char *key = part == STREAM_REASONING ? "reasoning_content" : "content";
    send_delta(c,
               open_delta(c) && buffer_printf(&c->g->scratch, "\"%s\": ", key) && write_string(&c->g->scratch, text, n),
               NULL);
}

static void chat_call_begin(struct choice *c, size_t k) {
    struct buffer *out = &c->g->scratch;
    const struct call *call = &c->calls[k];
    send_delta(c,
               open_delta(c) &&
                   buffer_printf(out,
                                 "\"tool_calls\": [{\"index\": %zu, \"id\": \"%s\", \"type\": \"function\", "
                                 "\"function\": {\"name\": ",
                                 k, call->id) &&
                   write_string(out, buffer_text(&call->name), call->name.len) &&
                   buffer_append_text(out, ", \"arguments\": \"\"}}]"),
               NULL);
}

static void chat_call_arguments(struct choice *c, size_t k, const char *text, size_t n) {
    struct buffer *out = &c->g->scratch;
    send_delta(c,
               open_delta(c) &&
                   buffer_printf(out, "\"tool_calls\": [{\"index\": %zu, \"function\": {\"arguments\": ", k) &&
                   write_string(out, text, n) && buffer_append_text(out, "}}]"),
               NULL);
}

static void chat_call_end(struct choice *c, size_t k) {
    (void)c;
    (void)k;
}

static void chat_choice_end(struct choice *c) {
    send_delta(c, open_delta(c), c->finish);
}

void openai_done(struct generation *g) {
    struct buffer done = {.data = (char *)(uintptr_t) "[DONE]", .len = 6, .cap = 7};
    generation_write(g, NULL, &done);
}

static void chat_end(struct generation *g) {
    if (g->include_usage && open_chunk(g) && buffer_append_byte(&g->scratch, ']') && openai_usage(g, &g->scratch) &&
        buffer_append_byte(&g->scratch, '}'))
        generation_write(g, NULL, &g->scratch);
    openai_done(g);
}

// ---- A whole answer

static bool put_calls(const struct choice *c, struct buffer *out) {
    bool ok = buffer_append_text(out, ", \"tool_calls\": [");
    for (size_t i = 0; ok && i < c->n_calls; i++) {
        const struct call *call = &c->calls[i];
        ok = buffer_printf(out, "%s{\"id\": \"%s\", \"type\": \"function\", \"function\": {\"name\": ", i ? ", " : "",
                           call->id) &&
             write_string(out, buffer_text(&call->name), call->name.len) &&
             buffer_append_text(out, ", \"arguments\": ") &&
             write_string(out, buffer_text(&call->arguments), call->arguments.len) && buffer_append_text(out, "}}");
    }
    return ok && buffer_append_byte(out, ']');
}

static bool put_message(struct choice *c, struct buffer *out) {
    bool ok = buffer_printf(out, "{\"index\": %zu, \"message\": {\"role\": \"assistant\", \"content\": ", c->index);
    if (c->n_calls && c->text.len == 0) ok = ok && buffer_append_text(out, "null");
    else ok = ok && write_string(out, buffer_text(&c->text), c->text.len);
    ok = ok && buffer_append_text(out, ", \"refusal\": null");
    if (c->reasoning.len)
        ok = ok && buffer_append_text(out, ", \"reasoning_content\": ") &&
             write_string(out, buffer_text(&c->reasoning), c->reasoning.len);
    if (c->n_calls) ok = ok && put_calls(c, out);
    ok = ok && buffer_append_byte(out, '}') && put_logprobs(c, out) &&
         buffer_printf(out, ", \"finish_reason\": \"%s\"", c->finish);
    if (c->malformed[0])
        ok = ok && buffer_append_text(out, ", \"tool_call_error\": ") &&
             write_string(out, c->malformed, strlen(c->malformed));
    return ok && buffer_append_byte(out, '}');
}

static void chat_whole(struct generation *g, struct buffer *out) {
    bool ok =
        buffer_printf(out, "{\"id\": \"%s\", \"object\": \"chat.completion\", \"created\": %ld, \"model\": ", g->id,
                      g->created) &&
        write_string(out, g->s->options.model_name, strlen(g->s->options.model_name)) &&
        buffer_printf(out, ", \"system_fingerprint\": \"tandem-%s\", \"choices\": [", tandem_version());
    for (size_t i = 0; ok && i < g->n_choices; i++)
        ok = (i == 0 || buffer_append_text(out, ", ")) && put_message(&g->choices[i], out);
    if (ok && buffer_append_byte(out, ']') && openai_usage(g, out) && openai_timings(g, out))
        buffer_append_byte(out, '}');
}

static const struct writer writer = {.begin = chat_begin,
                                     .text = chat_text,
                                     .call_begin = chat_call_begin,
                                     .call_arguments = chat_call_arguments,
                                     .call_end = chat_call_end,
                                     .choice_end = chat_choice_end,
                                     .end = chat_end,
                                     .fail = openai_fail,
                                     .whole = chat_whole,
                                     .token = chat_token};

// ---- The request

static bool read_logprobs(struct generation *g, const struct pyjson *body, struct fault *f) {
    int64_t n_top = 0;
    if (!field_bool(body, "logprobs", &g->logprobs, f) || !field_int(body, "top_logprobs", 0, 20, &n_top, f))
        return false;
    if (n_top && !g->logprobs)
        return fault_set(f, 400, "top_logprobs", "top_logprobs: only allowed with \"logprobs\": true");
    g->n_top = (size_t)n_top;
    return true;
}

static bool read_chat(struct generation *g, struct fault *f) {
    const struct pyjson *body = prompt_body(g->x, &g->arena, f);
    struct chat_prompt p = {0};
    int64_t budget = -1;
    bool ok = body && prompt_check_model(g->s, body, f) &&
              field_typed(body, "messages", PYJSON_ARRAY, &p.messages, f) &&
              field_typed(body, "tools", PYJSON_ARRAY, &p.tools, f) && prompt_read_thinking(body, &p, f) &&
              openai_read_common(g, body, f) && read_logprobs(g, body, f) &&
              field_int(body, "thinking_budget", 0, INT32_MAX, &budget, f);
    if (!ok) return false;
    if (!p.messages) return fault_set(f, 400, "messages", "messages: this field is required");
    if (budget >= 0) g->think_budget = (size_t)budget;
    if (p.tools && p.tools->n && !prompt_check_tools(p.tools, f)) return false;
    g->may_think = prompt_may_think(g->s, &p);
    return format_read_openai(g, body, &p, f) && generation_read_sampling(g, body, prompt_thinks(g->s, &p), f) &&
           prompt_into(g, &p, f);
}

void handle_chat(struct exchange *x) {
    struct fault f = {0};
    struct generation *g = generation_create(x, &writer, "chatcmpl-");
    if (g) openai_start(g, read_chat(g, &f), &f);
}
