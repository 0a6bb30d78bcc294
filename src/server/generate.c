// generate.c: see generate.h. It owns the life of a generation and the split of tokens into reasoning, content and
// calls.
#include "server/generate.h"

#include "base/clock.h"
#include "base/size.h"
#include "base/utf8.h"
#include "server/constraint.h"
#include "server/format.h"
#include "server/replies.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

void random_id(char *out, size_t size, const char *prefix) {
    uint64_t bits[2] = {0};
    if (getrandom(bits, sizeof bits, 0) != (ssize_t)sizeof bits) bits[0] = (uint64_t)(clock_seconds() * 1e9);
    snprintf(out, size, "%s%016llx%08llx", prefix, (unsigned long long)bits[0], (unsigned long long)(bits[1] >> 32));
}

bool write_string(struct buffer *out, const char *text, size_t n) {
    struct buffer clean = {0};
    uint32_t code;
    size_t run = 0;
    bool ok = true;
    for (size_t i = 0; ok && i < n;) { // from `run` on, all is UTF-8
        size_t length = (unsigned char)text[i] < 0x80 ? 1 : utf8_decode((const unsigned char *)text + i, n - i, &code);
        if (length == 0) {
            ok = buffer_append(&clean, text + run, i - run) && buffer_append_text(&clean, "\xEF\xBF\xBD");
            run = i + 1;
        }
        i += length ? length : 1;
    }
    if (run == 0) return pyjson_write_string(text, n, out);
    ok = ok && buffer_append(&clean, text + run, n - run) && pyjson_write_string(buffer_text(&clean), clean.len, out);
    buffer_free(&clean);
    return ok;
}

// ---- Life

struct generation *generation_create(struct exchange *x, const struct writer *writer, const char *id_prefix) {
    struct generation *g = size_alloc_zero(1, sizeof *g);
    if (!g) {
        exchange_fail(x, 500, NULL, "out of memory");
        return NULL;
    }
    g->x = x;
    g->s = x->server;
    g->writer = writer;
    g->n = 1;
    g->max_tokens = SIZE_MAX;
    g->think_budget = SIZE_MAX;
    g->created = (long)time(NULL);
    random_id(g->id, sizeof g->id, id_prefix);
    pthread_mutex_init(&g->fail_lock, NULL);
    atomic_fetch_add(&x->refs, 1);
    atomic_fetch_add(&g->s->n_generations, 1);
    return g;
}

static void choice_free(struct choice *c) {
    stream_free(c->stream);
    toolcalls_free(c->parser);
    constraint_free(c->constraint);
    buffer_free(&c->text);
    buffer_free(&c->reasoning);
    buffer_free(&c->raw);
    buffer_free(&c->logprobs);
    for (size_t i = 0; i < sizeof c->extra / sizeof c->extra[0]; i++) buffer_free(&c->extra[i]);
    token_ids_free(&c->ids);
    for (size_t i = 0; i < c->n_calls; i++) {
        buffer_free(&c->calls[i].name);
        buffer_free(&c->calls[i].arguments);
    }
    free(c->calls);
}

void generation_free(struct generation *g) {
    struct server *s = g->s;
    for (size_t i = 0; g->choices && i < g->n_choices; i++) choice_free(&g->choices[i]);
    for (size_t i = 0; i < g->n_parts; i++) {
        token_ids_free(&g->parts[i].prompt);
        for (size_t k = 0; k < sizeof g->parts[i].logprobs / sizeof g->parts[i].logprobs[0]; k++)
            buffer_free(&g->parts[i].logprobs[k]);
    }
    for (size_t i = 0; i < g->n_stops; i++) free(g->stops[i]);
    free(g->choices);
    free(g->parts);
    free(g->bias_ids);
    free(g->bias);
    free(g->own);
    automaton_unref(g->automaton);
    buffer_free(&g->scratch);
    arena_free(&g->arena);
    pthread_mutex_destroy(&g->fail_lock);
    exchange_unref(g->x);
    free(g);
    atomic_fetch_sub(&s->n_generations, 1);
}

bool generation_add_part(struct generation *g, struct token_ids *prompt) {
    if (!g->parts) g->parts = size_alloc_zero(MAX_PROMPTS, sizeof *g->parts);
    if (!g->parts || g->n_parts == MAX_PROMPTS) return false;
    struct part *p = &g->parts[g->n_parts++];
    p->g = g;
    p->prompt = *prompt;
    *prompt = (struct token_ids){0};
    return true;
}

// ---- Sampling fields

static bool read_bias(struct generation *g, const struct pyjson *map, struct fault *f) {
    enum { MAX_BIAS = 4096 };
    if (map->n > MAX_BIAS)
        return fault_set(f, 400, "logit_bias", "logit_bias: at most %d entries, found %zu", MAX_BIAS, map->n);
    g->bias_ids = size_alloc(map->n, sizeof *g->bias_ids);
    g->bias = size_alloc(map->n, sizeof *g->bias);
    if (!g->bias_ids || !g->bias) return fault_set(f, 500, NULL, "out of memory");
    size_t n = 0;
    for (const struct pyjson *m = map->first; m; m = m->next, n++) {
        struct pyjson number = {.type = PYJSON_INT, .text = m->key, .n_text = m->n_key};
        int64_t id;
        bool digits = m->n_key > 0 && strspn(m->key, "0123456789") == m->n_key;
        bool is_number = m->type == PYJSON_INT || m->type == PYJSON_FLOAT;
        double x = is_number ? value_number(m) : 0;
        if (!digits || !value_int(&number, 0, INT32_MAX, &id) || (size_t)id >= g->s->engine->model->config.n_vocab)
            return fault_set(f, 400, "logit_bias", "logit_bias: \"%.40s\" is not a token id of this model (0 to %zu)",
                             m->key, g->s->engine->model->config.n_vocab - 1);
        if (!is_number || !(x >= -100 && x <= 100))
            return fault_set(f, 400, "logit_bias", "logit_bias of token %lld: expected a number from -100 to 100",
                             (long long)id);
        g->bias_ids[n] = (int32_t)id;
        g->bias[n] = (float)x;
    }
    g->sampling.bias_ids = g->bias_ids;
    g->sampling.bias = g->bias;
    g->sampling.n_bias = n;
    return true;
}

bool generation_read_sampling(struct generation *g, const struct pyjson *body, bool thinking, struct fault *f) {
    tandem_sampling *p = &g->sampling;
    *p = g->s->options.sampling[thinking];
    int64_t top_k = p->top_k, seed = 0;
    const struct pyjson *bias = NULL;
    bool ok = field_number(body, "temperature", 0, 100, &p->temperature, f) &&
              field_number(body, "top_p", 1e-9, 1, &p->top_p, f) && field_number(body, "min_p", 0, 1, &p->min_p, f) &&
              field_int(body, "top_k", -1, INT32_MAX, &top_k, f) &&
              field_number(body, "repetition_penalty", 0.01, 100, &p->repeat_penalty, f) &&
              field_number(body, "repeat_penalty", 0.01, 100, &p->repeat_penalty, f) &&
              field_number(body, "presence_penalty", -2, 2, &p->presence_penalty, f) &&
              field_number(body, "frequency_penalty", -2, 2, &p->frequency_penalty, f) &&
              field_bool(body, "ignore_eos", &p->ignore_end, f) &&
              field_int(body, "seed", INT64_MIN, INT64_MAX, &seed, f) &&
              field_typed(body, "logit_bias", PYJSON_OBJECT, &bias, f);
    if (!ok) return false;
    p->top_k = top_k < 0 ? 0 : (int32_t)top_k; // -1: off, as vLLM has it
    if (field(body, "seed")) p->seed = (uint64_t)seed;
    else if (!g->s->options.seed_given && getrandom(&p->seed, sizeof p->seed, 0) < 0) p->seed = (uint64_t)g->created;
    return !bias || read_bias(g, bias, f);
}

bool generation_add_stop(struct generation *g, const struct pyjson *v, const char *name, struct fault *f) {
    if (v->type != PYJSON_STRING || v->n_text == 0 || memchr(v->text, 0, v->n_text))
        return fault_set(f, 400, name, "%s: expected text, not empty and without NUL, found %s", name,
                         pyjson_type_name(v));
    if (v->n_text > MAX_STOP_BYTES)
        return fault_set(f, 400, name, "%s: a stop text has at most %d bytes, found %zu", name, MAX_STOP_BYTES,
                         v->n_text);
    if (g->n_stops == MAX_STOP_STRINGS)
        return fault_set(f, 400, name, "%s: at most %d stop texts", name, MAX_STOP_STRINGS);
    g->stops[g->n_stops] = strdup(v->text);
    if (!g->stops[g->n_stops]) return fault_set(f, 500, NULL, "out of memory");
    g->n_stops++;
    return true;
}

bool generation_read_stops(struct generation *g, const struct pyjson *body, const char *name, struct fault *f) {
    const struct pyjson *v = field(body, name);
    const struct server_options *o = &g->s->options;
    for (size_t i = 0; !v && i < o->n_stops; i++) {
        if (!(g->stops[i] = strdup(o->stops[i]))) return fault_set(f, 500, NULL, "out of memory");
        g->n_stops++;
    }
    if (!v) return true;
    if (v->type == PYJSON_STRING) return generation_add_stop(g, v, name, f);
    if (v->type != PYJSON_ARRAY)
        return fault_set(f, 400, name, "%s: expected a string or an array of strings, found %s", name,
                         pyjson_type_name(v));
    for (const struct pyjson *i = v->first; i; i = i->next)
        if (!generation_add_stop(g, i, name, f)) return false;
    return true;
}

void generation_default_stop_ids(struct generation *g) {
    const struct server_options *o = &g->s->options;
    for (size_t i = 0; i < o->n_stop_ids; i++) g->stop_ids[i] = o->stop_ids[i];
    g->n_stop_ids = o->n_stop_ids;
}

bool generation_read_stop_ids(struct generation *g, const struct pyjson *body, struct fault *f) {
    static const char name[] = "stop_token_ids";
    const struct pyjson *list = NULL;
    size_t n_vocab = g->s->engine->model->config.n_vocab;
    if (!field_typed(body, name, PYJSON_ARRAY, &list, f)) return false;
    if (!list) generation_default_stop_ids(g);
    if (list && list->n > MAX_STOP_IDS)
        return fault_set(f, 400, name, "%s: at most %d ids, found %zu", name, MAX_STOP_IDS, list->n);
    for (const struct pyjson *v = list ? list->first : NULL; v; v = v->next) {
        int64_t id;
        if (!value_int(v, 0, (int64_t)n_vocab - 1, &id))
            return fault_set(f, 400, name, "%s: expected token ids of this model (0 to %zu)", name, n_vocab - 1);
        g->stop_ids[g->n_stop_ids++] = (int32_t)id;
    }
    return true;
}

// ---- Failing and ending

static void fail(struct generation *g, int status, const char *message) {
    pthread_mutex_lock(&g->fail_lock);
    if (!atomic_load(&g->fail_status)) {
        snprintf(g->fail_text, sizeof g->fail_text, "%.500s", message);
        atomic_store(&g->fail_status, status);
    }
    pthread_mutex_unlock(&g->fail_lock);
}

void generation_cancel(struct generation *g) {
    fail(g, 499, "the client closed the connection");
    for (size_t i = 0; i < g->n_parts; i++) {
        uint64_t id = atomic_load(&g->parts[i].id);
        if (id) tandem_cancel(g->s->engine, id);
    }
}

bool generation_check_deadline(struct generation *g, double now, enum timeout *what) {
    const struct server_options *o = &g->s->options;
    char text[100] = "";
    double waited = now - g->x->received;
    if (atomic_load(&g->fail_status)) return false;
    if (g->first_step == 0 && waited > o->queue_s) {
        *what = TIMEOUT_QUEUE;
        snprintf(text, sizeof text, "timed out: not begun after %g s in the queue (limit: queue)", o->queue_s);
    } else if (g->first_token == 0 && waited > o->first_token_s) {
        *what = TIMEOUT_FIRST_TOKEN;
        snprintf(text, sizeof text, "timed out: no token after %g s (limit: first-token)", o->first_token_s);
    } else if (waited > o->total_s) {
        *what = TIMEOUT_TOTAL;
        snprintf(text, sizeof text, "timed out: not complete after %g s (limit: total)", o->total_s);
    }
    if (!text[0]) return false;
    fail(g, 503, text);
    generation_cancel(g);
    return true;
}

void generations_cancel_all(struct server *s) {
    pthread_mutex_lock(&s->lock);
    for (struct exchange *x = s->exchanges; x; x = x->next) {
        pthread_mutex_lock(&x->lock);
        if (x->generation) {
            fail(x->generation, 503, "the server is shutting down");
            generation_cancel(x->generation);
        }
        pthread_mutex_unlock(&x->lock);
    }
    pthread_mutex_unlock(&s->lock);
}

static void note_times(struct generation *g) {
    struct server *s = g->s;
    pthread_mutex_lock(&s->lock);
    histogram_add(&s->metrics.total, clock_seconds() - g->x->received);
    pthread_mutex_unlock(&s->lock);
}

// Everybody is done with it: the answer is completed.
static void release(struct generation *g) {
    if (atomic_fetch_sub(&g->n_open, 1) > 1) return;
    struct exchange *x = g->x;
    int status = atomic_load(&g->fail_status);
    pthread_mutex_lock(&x->lock);
    x->generation = NULL;
    bool streaming = x->stream;
    pthread_mutex_unlock(&x->lock);
    for (size_t i = 0; i < g->n_choices && !status; i++)
        if (g->choices[i].failed) status = 500, fail(g, 500, "out of memory");
    if (status && streaming) {
        g->writer->fail(g, status, g->fail_text);
        exchange_end(x);
    } else if (status) {
        exchange_fail(x, status, NULL, g->fail_text);
    } else if (g->streams) {
        g->writer->end(g);
        exchange_end(x);
    } else {
        struct buffer body = {0};
        g->writer->whole(g, &body);
        exchange_reply(x, 200, &body);
    }
    note_times(g);
    generation_free(g);
}

// ---- Submitting

static void calls_text(void *user, const char *text, size_t n) {
    struct choice *c = user;
    if (!buffer_append(&c->text, text, n)) c->failed = true;
    if (c->g->streams) c->g->writer->text(c, STREAM_CONTENT, text, n);
}

static void calls_begin(void *user, const char *name) {
    struct choice *c = user;
    struct call *list = size_realloc(c->calls, c->n_calls + 1, sizeof *list);
    if (!list) {
        c->failed = true;
        return;
    }
    c->calls = list;
    struct call *call = &list[c->n_calls++];
    *call = (struct call){0};
    random_id(call->id, sizeof call->id, c->g->x->route->dialect == ANTHROPIC ? "toolu_" : "call_");
    if (!buffer_append_text(&call->name, name)) c->failed = true;
    if (c->g->streams) c->g->writer->call_begin(c, c->n_calls - 1);
}

static void calls_arguments(void *user, const char *text, size_t n) {
    struct choice *c = user;
    if (c->n_calls == 0) return; // no memory
    if (!buffer_append(&c->calls[c->n_calls - 1].arguments, text, n)) c->failed = true;
    if (c->g->streams) c->g->writer->call_arguments(c, c->n_calls - 1, text, n);
}

static void calls_end(void *user) {
    struct choice *c = user;
    if (c->g->streams && c->n_calls) c->g->writer->call_end(c, c->n_calls - 1);
}

// Is there a tool of this name that may be called?
static bool calls_known(void *user, const char *name) {
    return format_has_tool(((const struct choice *)user)->g, name);
}

static void emit(void *user, enum stream_part part, const char *text, size_t n) {
    struct choice *c = user;
    if (part == STREAM_REASONING) {
        if (!buffer_append(&c->reasoning, text, n)) c->failed = true;
        if (c->g->streams) c->g->writer->text(c, part, text, n);
    } else if (c->parser) {
        if (!toolcalls_feed(c->parser, text, n)) c->failed = true;
    } else {
        calls_text(c, text, n);
    }
}

static bool make_choices(struct generation *g, struct error *err) {
    struct stream_options options = {.stops = (const char *const *)g->stops,
                                     .n_stops = g->n_stops,
                                     .split_thinking = g->splits_thinking,
                                     .starts_in_thinking = g->starts_in_thinking};
    g->n_choices = g->n * g->n_parts;
    g->choices = size_alloc_zero(g->n_choices, sizeof *g->choices);
    if (!g->choices) return error_set(err, "out of memory");
    for (size_t i = 0; i < g->n_choices; i++) {
        struct choice *c = &g->choices[i];
        struct toolcalls_sink sink = {calls_text, calls_begin, calls_arguments, calls_end, calls_known, c};
        c->g = g;
        c->index = i;
        c->part = i / g->n;
        c->thinking = g->starts_in_thinking;
        c->stream = stream_create(&options, err);
        if (!c->stream) return false;
        if (g->has_tools && !(c->parser = toolcalls_create(&sink, g->streams, err))) return false;
        if (!constraint_for(g, c, err)) return false;
    }
    return true;
}

static const uint32_t *mask(void *user, size_t index) {
    const struct part *p = user;
    struct generation *g = p->g;
    struct choice *c = &g->choices[(size_t)(p - g->parts) * g->n + index];
    return c->constraint ? constraint_mask(c->constraint, c) : NULL;
}

static int submit_part(struct generation *g, struct part *p, struct error *err) {
    bool only = g->max_tokens == 0;
    if (g->automaton) g->sampling.ignore_end = false; // where the answer is complete, it ends
    tandem_request_options o = {.prompt = p->prompt.ids,
                                .n_prompt = p->prompt.n,
                                .max_tokens = g->max_tokens == SIZE_MAX ? 0 : g->max_tokens,
                                .prompt_only = only,
                                .sampling = &g->sampling,
                                .n = g->n,
                                .tenant = g->x->tenant,
                                .logprobs = g->logprobs,
                                .n_top = g->n_top,
                                .prompt_logprobs = g->logprobs && g->echo,
                                .user = p,
                                .mask = g->choices[0].constraint ? mask : NULL};
    uint64_t id = 0;
    int status = tandem_submit(g->s->engine, &o, &id, err->text, sizeof err->text);
    if (status == TANDEM_OK) atomic_store(&p->id, id);
    return status;
}

void generation_submit(struct generation *g) {
    struct exchange *x = g->x;
    struct error err = {0};
    if (!make_choices(g, &err)) {
        exchange_fail(x, 500, NULL, err.text);
        generation_free(g);
        return;
    }
    g->submitted = clock_seconds();
    atomic_init(&g->n_open, g->n_choices + 1);
    pthread_mutex_lock(&x->lock);
    x->generation = g;
    pthread_mutex_unlock(&x->lock);
    if (g->streams) g->writer->begin(g);
    bool ok = true;
    for (size_t i = 0; i < g->n_parts; i++) {
        int status = ok && !atomic_load(&g->fail_status) ? submit_part(g, &g->parts[i], &err) : TANDEM_CANCELLED;
        if (status == TANDEM_OK) continue;
        if (status == TANDEM_BUSY) fail(g, 429, err.text);
        else if (status == TANDEM_ERROR) fail(g, 400, err.text);
        ok = false;
        atomic_fetch_sub(&g->n_open, g->n); // the worker's own one keeps it above 0
    }
    if (!ok || atomic_load(&g->fail_status) || exchange_is_gone(x)) generation_cancel(g);
    else if (g->streams) exchange_stream(x);
    release(g);
}

// ---- Events: the engine's thread

static void note_token(struct generation *g, struct choice *c) {
    struct times *times = &g->s->step_times;
    double now = clock_seconds();
    if (g->first_token == 0) histogram_add(&times->first_token, now - g->x->received);
    if (c->last_token > 0) histogram_add(&times->between_tokens, now - c->last_token);
    if (g->first_token == 0) g->first_token = now;
    g->last_token = c->last_token = now;
}

// Follows <think> and </think> by their ids.
static void follow_thinking(struct choice *c, int32_t id) {
    const struct tokenizer *tok = c->g->s->engine->tokenizer;
    if (!c->g->splits_thinking) return;
    if (c->thinking) {
        c->n_reasoning++;
        if (id == tokenizer_find(tok, "</think>")) c->thinking = false;
    } else if (c->n_tokens == 1 && id == tokenizer_find(tok, "<think>")) {
        c->thinking = true;
        c->n_reasoning++;
    }
}

static bool is_stop_id(const struct generation *g, int32_t id) {
    for (size_t i = 0; i < g->n_stop_ids; i++)
        if (g->stop_ids[i] == id) return true;
    return false;
}

static bool on_token(struct generation *g, struct choice *c, const tandem_event *e) {
    const tandem_engine *engine = g->s->engine;
    int32_t id = e->token.id;
    c->n_tokens++;
    note_token(g, c);
    if (is_stop_id(g, id)) return false; // no part of the text, as an end token
    bool thought = c->thinking, complete = false;
    follow_thinking(c, id);
    if (c->constraint) complete = !constraint_accept(c->constraint, id, thought || c->thinking);
    if (c->constraint && constraint_failed(c->constraint)) {
        fail(g, 400, constraint_failed(c->constraint));
        generation_cancel(g);
        return false;
    }
    if (g->logprobs && g->writer->token) g->writer->token(c, e);
    if (engine_is_end(engine, id) || tokenizer_is_special(engine->tokenizer, id)) return true;
    size_t n = 0;
    const char *bytes = tokenizer_token_bytes(engine->tokenizer, id, &n);
    if (!bytes) return true; // a padding row of the embedding
    if (!buffer_append(&c->raw, bytes, n) || !token_ids_append(&c->ids, &id, 1)) c->failed = true;
    if (!stream_feed(c->stream, bytes, n, emit, c)) c->failed = true;
    return !stream_stopped(c->stream) && !c->failed && !complete;
}

// Remembers what was said, for the next turn: all of it, as it stays in a tool loop, and what is behind the thinking.
static void remember(struct choice *c) {
    struct generation *g = c->g;
    const struct tokenizer *tok = g->s->engine->tokenizer;
    int32_t close = tokenizer_find(tok, "</think>");
    size_t begin = 0, at = 0, n;
    replies_add(g->s->replies, g->x->tenant, c->raw.data, c->raw.len, c->ids.ids, c->ids.n);
    for (size_t i = 0; i < c->ids.n; i++)
        if (c->ids.ids[i] == close) begin = i + 1;
    if (begin == 0 && !c->thinking) return;
    for (; begin < c->ids.n; begin++) {
        const char *bytes = tokenizer_token_bytes(tok, c->ids.ids[begin], &n);
        if (!bytes || n == 0 || strspn(bytes, "\n") < n) break;
    }
    for (size_t i = 0; i < begin; i++)
        if (tokenizer_token_bytes(tok, c->ids.ids[i], &n)) at += n;
    if (begin < c->ids.n && at < c->raw.len)
        replies_add(g->s->replies, g->x->tenant, c->raw.data + at, c->raw.len - at, c->ids.ids + begin,
                    c->ids.n - begin);
}

static void on_done(struct generation *g, struct choice *c, const tandem_event *e) {
    if (e->finish == TANDEM_FINISH_ERROR) fail(g, 500, e->error ? e->error : "the engine failed");
    if (e->finish == TANDEM_FINISH_CANCELLED) fail(g, 499, "cancelled");
    if (!atomic_load(&g->fail_status)) {
        if (!stream_finish(c->stream, emit, c)) c->failed = true;
        if (c->parser && !toolcalls_finish(c->parser)) c->failed = true;
        if (c->parser && toolcalls_malformed(c->parser))
            snprintf(c->malformed, sizeof c->malformed, "%s", toolcalls_malformed(c->parser));
        if (e->finish == TANDEM_FINISH_LENGTH) c->finish = "length";
        else c->finish = c->n_calls && !c->malformed[0] ? "tool_calls" : "stop";
        if (g->x->route->path && c->ids.n && !stream_stopped(c->stream)) remember(c);
        if (g->streams) g->writer->choice_end(c);
    } else if (e->finish == TANDEM_FINISH_ERROR && g->n_choices > 1) {
        generation_cancel(g); // the other choices have no reader any more
    }
    release(g);
}

bool generation_event(void *server, const tandem_event *e) {
    struct part *p = e->user;
    struct generation *g = p->g;
    struct choice *c = &g->choices[(size_t)(p - g->parts) * g->n + e->choice];
    struct server *s = server;
    if (!g->is_told) {
        g->is_told = true;
        g->next_told = s->told;
        s->told = g;
        atomic_fetch_add(&g->n_open, 1);
    }
    switch (e->kind) {
    case TANDEM_EVENT_START:
        p->n_cached = e->n_cached;
        if (g->first_step == 0) g->first_step = clock_seconds();
        return true;
    case TANDEM_EVENT_PROMPT:
        if (g->writer->prompt_token) g->writer->prompt_token(p, e);
        return true;
    case TANDEM_EVENT_TOKEN: return on_token(g, c, e);
    case TANDEM_EVENT_DONE: on_done(g, c, e); return true;
    }
    return true;
}

void generations_send(struct server *s) {
    if (s->step_times.first_token.n || s->step_times.between_tokens.n) {
        pthread_mutex_lock(&s->lock);
        times_move(&s->step_times, &s->metrics.times);
        pthread_mutex_unlock(&s->lock);
    }
    for (struct generation *g; (g = s->told);) {
        s->told = g->next_told;
        g->is_told = false;
        if (atomic_load(&g->n_open) > 1) exchange_wake(g->x); // else its end does
        release(g);
    }
}

// ---- For writers

void generation_write(struct generation *g, const char *event, const struct buffer *data) {
    struct buffer bytes = {0};
    if (event) buffer_printf(&bytes, "event: %s\n", event);
    if (buffer_append_text(&bytes, "data: ") && buffer_append(&bytes, data->data, data->len) &&
        buffer_append_text(&bytes, "\n\n"))
        exchange_write(g->x, &bytes);
    buffer_free(&bytes);
}

size_t generation_prompt_tokens(const struct generation *g) {
    size_t n = 0;
    for (size_t i = 0; i < g->n_parts; i++) n += g->parts[i].prompt.n;
    return n;
}

size_t generation_cached_tokens(const struct generation *g) {
    size_t n = 0;
    for (size_t i = 0; i < g->n_parts; i++) n += g->parts[i].n_cached;
    return n;
}

size_t generation_output_tokens(const struct generation *g) {
    size_t n = 0;
    for (size_t i = 0; i < g->n_choices; i++) n += g->choices[i].n_tokens;
    return n;
}

size_t generation_reasoning_tokens(const struct generation *g) {
    size_t n = 0;
    for (size_t i = 0; i < g->n_choices; i++) n += g->choices[i].n_reasoning;
    return n;
}
