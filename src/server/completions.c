// completions.c: OpenAI's /v1/completions: raw prompts, several at once, echo, log-probabilities of the prompt.
#include "server/chat.h"

#include <stdlib.h>
#include <string.h>

// The four lists of "logprobs", as they grow: indices into part.logprobs and, for the generated part, choice.extra and
// choice.logprobs.
enum { TOKENS, VALUES, TOPS, OFFSETS, N_LISTS };

struct lists {
    struct buffer *list[N_LISTS];
    size_t *offset; // characters in front of the next token
};

static size_t count_characters(const char *bytes, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)bytes[i] & 0xC0) != 0x80;
    return count;
}

static bool put_text(const tandem_engine *e, int32_t id, struct buffer *out) {
    size_t n = 0;
    const char *bytes = tokenizer_token_bytes(e->tokenizer, id, &n);
    return write_string(out, bytes ? bytes : "", bytes ? n : 0);
}

// One token. `logprob` NULL: the first of a prompt, which has none.
static bool put_token(const tandem_engine *e, struct lists *l, int32_t id, const float *logprob,
                      const tandem_token *top, size_t n_top) {
    bool ok = true;
    size_t n = 0;
    for (int i = 0; i < N_LISTS; i++) ok = ok && (l->list[i]->len == 0 || buffer_append_text(l->list[i], ", "));
    ok = ok && put_text(e, id, l->list[TOKENS]) && buffer_printf(l->list[OFFSETS], "%zu", *l->offset);
    const char *bytes = tokenizer_token_bytes(e->tokenizer, id, &n);
    if (bytes) *l->offset += count_characters(bytes, n);
    if (!logprob) return ok && buffer_append_text(l->list[VALUES], "null") && buffer_append_text(l->list[TOPS], "null");
    ok = ok && buffer_printf(l->list[VALUES], "%.9g", (double)*logprob) && buffer_append_byte(l->list[TOPS], '{');
    for (size_t i = 0; ok && i < n_top; i++) {
        bool twice = false; // two tokens may look alike; a key comes once
        for (size_t k = 0; k < i; k++) {
            size_t a = 0, b = 0;
            const char *x = tokenizer_token_bytes(e->tokenizer, top[i].id, &a);
            const char *y = tokenizer_token_bytes(e->tokenizer, top[k].id, &b);
            struct buffer one = {0}, two = {0};
            write_string(&one, x ? x : "", a);
            write_string(&two, y ? y : "", b);
            twice = twice || strcmp(buffer_text(&one), buffer_text(&two)) == 0;
            buffer_free(&one);
            buffer_free(&two);
        }
        if (twice) continue;
        ok = (i == 0 || buffer_append_text(l->list[TOPS], ", ")) && put_text(e, top[i].id, l->list[TOPS]) &&
             buffer_printf(l->list[TOPS], ": %.9g", (double)top[i].logprob);
    }
    return ok && buffer_append_byte(l->list[TOPS], '}');
}

struct own { // of a generation
    size_t prompt_characters[MAX_PROMPTS];
};

static struct lists choice_lists(struct choice *c) {
    return (struct lists){.list = {&c->extra[0], &c->extra[1], &c->extra[2], &c->logprobs}, .offset = &c->n_extra};
}

static void completion_token(struct choice *c, const tandem_event *e) {
    const tandem_engine *engine = c->g->s->engine;
    struct lists l = choice_lists(c);
    if (c->n_tokens == 1 && c->g->echo) c->n_extra = ((struct own *)c->g->own)->prompt_characters[c->part];
    if (engine_is_end(engine, e->token.id)) return; // it is not in the text
    if (!put_token(engine, &l, e->token.id, &e->token.logprob, e->top, e->n_top)) c->failed = true;
}

static void completion_prompt_token(struct part *p, const tandem_event *e) {
    struct generation *g = p->g;
    size_t index = (size_t)(p - g->parts);
    struct lists l = {.list = {&p->logprobs[0], &p->logprobs[1], &p->logprobs[2], &p->logprobs[3]},
                      .offset = &((struct own *)g->own)->prompt_characters[index]};
    bool ok = true;
    if (p->n_told++ == 0) ok = put_token(g->s->engine, &l, p->prompt.ids[0], NULL, NULL, 0);
    if (!ok || !put_token(g->s->engine, &l, e->token.id, &e->token.logprob, e->top, e->n_top))
        g->choices[index * g->n].failed = true;
}

// ---- Writing

static bool put_logprobs(struct choice *c, bool with_prompt, struct buffer *out) {
    static const char *const names[N_LISTS] = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};
    if (!c->g->logprobs) return buffer_append_text(out, ", \"logprobs\": null");
    struct part *p = &c->g->parts[c->part];
    struct lists l = choice_lists(c);
    bool ok = buffer_append_text(out, ", \"logprobs\": {");
    if (with_prompt && p->n_told == 0 && p->prompt.n == 1) { // a prompt of one token has no events
        struct lists alone = {.list = {&p->logprobs[0], &p->logprobs[1], &p->logprobs[2], &p->logprobs[3]},
                              .offset = &((struct own *)c->g->own)->prompt_characters[c->part]};
        p->n_told = 1;
        ok = put_token(c->g->s->engine, &alone, p->prompt.ids[0], NULL, NULL, 0);
    }
    for (int i = 0; i < N_LISTS; i++) {
        struct buffer *mine = l.list[i], *before = &p->logprobs[i];
        ok = ok && buffer_printf(out, "%s\"%s\": [", i ? ", " : "", names[i]);
        if (with_prompt) ok = ok && buffer_append(out, buffer_text(before), before->len);
        if (with_prompt && before->len && mine->len) ok = ok && buffer_append_text(out, ", ");
        ok = ok && buffer_append(out, buffer_text(mine), mine->len) && buffer_append_byte(out, ']');
        buffer_clear(mine);
    }
    return ok && buffer_append_byte(out, '}');
}

static bool open_answer(struct generation *g, struct buffer *out) {
    return buffer_printf(out, "{\"id\": \"%s\", \"object\": \"text_completion\", \"created\": %ld, \"model\": ", g->id,
                         g->created) &&
           write_string(out, g->s->options.model_name, strlen(g->s->options.model_name)) &&
           buffer_printf(out, ", \"system_fingerprint\": \"tandem-%s\", \"choices\": [", tandem_version());
}

static bool prompt_text(const struct choice *c, struct buffer *out) {
    const struct token_ids *ids = &c->g->parts[c->part].prompt;
    return tokenizer_decode(c->g->s->engine->tokenizer, ids->ids, ids->n, false, out, NULL);
}

static void send_chunk(struct choice *c, const char *text, size_t n, const char *finish) {
    struct generation *g = c->g;
    struct buffer *out = &g->scratch;
    buffer_clear(out);
    bool ok = open_answer(g, out) && buffer_printf(out, "{\"index\": %zu, \"text\": ", c->index) &&
              write_string(out, text, n) && put_logprobs(c, false, out);
    if (finish) ok = ok && buffer_printf(out, ", \"finish_reason\": \"%s\"}]", finish);
    else ok = ok && buffer_append_text(out, ", \"finish_reason\": null}]");
    ok = ok && openai_timings(g, out);
    if (g->include_usage) ok = ok && buffer_append_text(out, ", \"usage\": null");
    if (ok && buffer_append_byte(out, '}')) generation_write(g, NULL, out);
    else c->failed = true;
}

static void completion_begin(struct generation *g) {
    for (size_t i = 0; g->echo && i < g->n_choices; i++) {
        struct buffer text = {0};
        if (prompt_text(&g->choices[i], &text)) send_chunk(&g->choices[i], buffer_text(&text), text.len, NULL);
        buffer_free(&text);
    }
}

static void completion_text(struct choice *c, enum stream_part part, const char *text, size_t n) {
    (void)part;
    send_chunk(c, text, n, NULL);
}

static void completion_choice_end(struct choice *c) {
    send_chunk(c, "", 0, c->finish);
}

static void completion_end(struct generation *g) {
    buffer_clear(&g->scratch);
    if (g->include_usage && open_answer(g, &g->scratch) && buffer_append_byte(&g->scratch, ']') &&
        openai_usage(g, &g->scratch) && buffer_append_byte(&g->scratch, '}'))
        generation_write(g, NULL, &g->scratch);
    openai_done(g);
}

static void completion_whole(struct generation *g, struct buffer *out) {
    bool ok = open_answer(g, out);
    for (size_t i = 0; ok && i < g->n_choices; i++) {
        struct choice *c = &g->choices[i];
        struct buffer text = {0};
        ok = (!g->echo || prompt_text(c, &text)) && buffer_append(&text, buffer_text(&c->text), c->text.len) &&
             buffer_printf(out, "%s{\"index\": %zu, \"text\": ", i ? ", " : "", i) &&
             write_string(out, buffer_text(&text), text.len) && put_logprobs(c, g->echo, out) &&
             buffer_printf(out, ", \"finish_reason\": \"%s\"}", c->finish);
        buffer_free(&text);
    }
    if (ok && buffer_append_byte(out, ']') && openai_usage(g, out) && openai_timings(g, out))
        buffer_append_byte(out, '}');
}

static const struct writer writer = {.begin = completion_begin,
                                     .text = completion_text,
                                     .choice_end = completion_choice_end,
                                     .end = completion_end,
                                     .fail = openai_fail,
                                     .whole = completion_whole,
                                     .token = completion_token,
                                     .prompt_token = completion_prompt_token};

// ---- The request

static bool add_text(struct generation *g, const struct pyjson *v, struct fault *f) {
    const tandem_engine *e = g->s->engine;
    struct token_ids ids = {0};
    struct error err = {0};
    int32_t bos = tokenizer_bos(e->tokenizer);
    bool ok = true;
    if (tokenizer_adds_bos(e->tokenizer) && bos >= 0) ok = token_ids_append(&ids, &bos, 1);
    ok = ok && tokenizer_encode(e->tokenizer, v->text, v->n_text, true, &ids, &err);
    if (!ok) fault_set(f, 400, "prompt", "prompt: %s", err.text);
    else if (ids.n == 0) ok = fault_set(f, 400, "prompt", "prompt: expected at least one token");
    ok =
        ok && prompt_fits(g->s, ids.n, f) && (generation_add_part(g, &ids) || fault_set(f, 500, NULL, "out of memory"));
    token_ids_free(&ids);
    return ok;
}

static bool add_ids(struct generation *g, const struct pyjson *list, struct fault *f) {
    struct token_ids ids = {0};
    size_t n_vocab = g->s->engine->model->config.n_vocab;
    bool ok = list->n > 0 || fault_set(f, 400, "prompt", "prompt: expected at least one token");
    ok = ok && prompt_fits(g->s, list->n, f);
    for (const struct pyjson *v = list->first; ok && v; v = v->next) {
        int64_t n;
        if (!value_int(v, 0, (int64_t)n_vocab - 1, &n))
            ok = fault_set(f, 400, "prompt", "prompt: expected token ids from 0 to %zu", n_vocab - 1);
        int32_t id = ok ? (int32_t)n : 0;
        ok = ok && (token_ids_append(&ids, &id, 1) || fault_set(f, 500, NULL, "out of memory"));
    }
    ok = ok && (generation_add_part(g, &ids) || fault_set(f, 500, NULL, "out of memory"));
    token_ids_free(&ids);
    return ok;
}

// A string, an array of strings, an array of ids, or an array of such arrays.
static bool read_prompt(struct generation *g, const struct pyjson *v, struct fault *f) {
    if (!v) return fault_set(f, 400, "prompt", "prompt: this field is required");
    if (v->type == PYJSON_STRING) return add_text(g, v, f);
    if (v->type != PYJSON_ARRAY || v->n == 0)
        return fault_set(f, 400, "prompt",
                         "prompt: expected a string, or an array of strings, of token ids, or of arrays of "
                         "token ids, not empty");
    if (v->first->type == PYJSON_INT) return add_ids(g, v, f);
    if (v->n > MAX_PROMPTS)
        return fault_set(f, 400, "prompt", "prompt: at most %d prompts, found %zu", MAX_PROMPTS, v->n);
    for (const struct pyjson *i = v->first; i; i = i->next) {
        if (i->type == PYJSON_STRING ? !add_text(g, i, f) : i->type == PYJSON_ARRAY && !add_ids(g, i, f)) return false;
        if (i->type != PYJSON_STRING && i->type != PYJSON_ARRAY)
            return fault_set(f, 400, "prompt", "prompt: expected strings or arrays of token ids, found %s",
                             pyjson_type_name(i));
    }
    return true;
}

static bool read_logprobs(struct generation *g, const struct pyjson *body, struct fault *f) {
    const struct pyjson *v = field(body, "logprobs");
    int64_t n = 0;
    if (!v || v->type == PYJSON_FALSE) return true;
    if (v->type != PYJSON_TRUE && !field_int(body, "logprobs", 0, 20, &n, f)) return false;
    g->logprobs = true;
    g->n_top = v->type == PYJSON_TRUE ? 1 : (size_t)n;
    return true;
}

static bool read_completion(struct generation *g, struct fault *f) {
    const struct pyjson *body = prompt_body(g->x, &g->arena, f);
    int64_t best_of = 1;
    bool ok = body && prompt_check_model(g->s, body, f) && openai_read_common(g, body, f) &&
              read_logprobs(g, body, f) && field_bool(body, "echo", &g->echo, f) &&
              field_int(body, "best_of", 1, 1000, &best_of, f) && generation_read_sampling(g, body, false, f);
    if (!ok) return false;
    if ((size_t)best_of > g->n) return fault_set(f, 400, "best_of", "best_of: more than n is not supported");
    if (field(body, "suffix")) return fault_set(f, 400, "suffix", "suffix: not supported");
    if (!field(body, "max_tokens") && !field(body, "max_completion_tokens")) g->max_tokens = 16; // OpenAI's default
    if (g->echo && g->logprobs && g->streams)
        return fault_set(f, 400, "echo", "echo: with logprobs the answer cannot be streamed");
    g->own = calloc(1, sizeof(struct own));
    if (!g->own) return fault_set(f, 500, NULL, "out of memory");
    return read_prompt(g, field(body, "prompt"), f);
}

void handle_completions(struct exchange *x) {
    struct fault f = {0};
    struct generation *g = generation_create(x, &writer, "cmpl-");
    if (g) openai_start(g, read_completion(g, &f), &f);
}
