// fuzz_body.c: bodies of every POST route, read by the server's own code, and what the model might say to them. The
// engine is a stand-in: it takes what is submitted and writes the tokens that the input names, where the request's mask
// allows them. Every request must end in one whole answer, which is JSON or a stream of events.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/utf8.h"
#include "engine/engine.h"
#include "server/generate.h"
#include "server/jsonscan.h"
#include "server/masks.h"
#include "server/replies.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int __wrap_tandem_submit(tandem_engine *engine, const tandem_request_options *o, uint64_t *id, char *err, size_t n_err);
void __wrap_tandem_cancel(tandem_engine *engine, uint64_t id);
const union MHD_ConnectionInfo *__wrap_MHD_get_connection_info(struct MHD_Connection *c,
                                                               enum MHD_ConnectionInfoType type, ...);

// Little of each: what costs time or memory, or makes the search for leaks slow, is not what is fuzzed.
enum { MAX_PARTS_TAKEN = 6, MAX_CHOICES = 4, MAX_TOKENS = 24, KEPT_BYTES = 2 << 20 };

static struct { tandem_request_options options; } taken[MAX_PARTS_TAKEN];
static size_t n_taken;
static bool cancelled;

const char *__asan_default_options(void);
const char *__asan_default_options(void) {
    return "quarantine_size_mb=8:malloc_context_size=6";
}

static void require(bool ok) {
    if (!ok) abort();
}

// Takes the request, as far as there is room: what is beyond is refused, as by a full queue.
int __wrap_tandem_submit(tandem_engine *engine, const tandem_request_options *o, uint64_t *id, char *err,
                         size_t n_err) {
    (void)engine;
    if (n_taken == MAX_PARTS_TAKEN || o->n > MAX_CHOICES) {
        snprintf(err, n_err, "the queue is full");
        return TANDEM_BUSY;
    }
    require(o->n_prompt > 0);
    taken[n_taken].options = *o;
    *id = ++n_taken;
    return TANDEM_OK;
}

void __wrap_tandem_cancel(tandem_engine *engine, uint64_t id) {
    (void)engine;
    (void)id;
    cancelled = true;
}

const union MHD_ConnectionInfo *__wrap_MHD_get_connection_info(struct MHD_Connection *c,
                                                               enum MHD_ConnectionInfoType type, ...) {
    (void)c;
    (void)type;
    return NULL;
}

static struct server *make_server(void) {
    struct error err = {0};
    static struct server s;
    tandem_options o = {.model = "models/tandem-tiny", .context = 512, .max_batch = MAX_CHOICES};
    s.engine = tandem_open(&o, err.text, sizeof err.text);
    if (!s.engine) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    s.options.model_name = "tandem-tiny";
    s.options.max_tokens = SIZE_MAX;
    s.options.think = -1;
    s.options.sampling[0] = s.options.sampling[1] =
        (tandem_sampling){.temperature = 1, .top_p = 1, .repeat_penalty = 1};
    s.options.queue_s = s.options.first_token_s = s.options.total_s = s.options.read_s = 1e9;
    pthread_mutex_init(&s.lock, NULL);
    s.replies = replies_create();
    s.vocabulary = vocabulary_create(s.engine->tokenizer, s.engine->model->config.n_vocab, s.engine->end_ids,
                                     s.engine->n_end_ids, &err);
    s.masks = s.vocabulary ? masks_create(s.vocabulary, KEPT_BYTES, &err) : NULL;
    require(s.replies && s.masks);
    return &s;
}

// The token that the bytes name, or the next one that is allowed.
static int32_t allowed(const uint32_t *mask, size_t n_vocab, size_t wanted) {
    for (size_t i = 0; i < n_vocab; i++) {
        size_t id = (wanted + i) % n_vocab;
        if (!mask || (mask[id / 32] >> id % 32 & 1)) return (int32_t)id;
    }
    abort(); // a mask that allows nothing
}

static void play_choice(struct server *s, const tandem_request_options *o, size_t choice, const uint8_t **text,
                        size_t *n) {
    size_t n_vocab = s->engine->model->config.n_vocab;
    tandem_event e = {.user = o->user, .kind = TANDEM_EVENT_START, .choice = choice};
    generation_event(s, &e);
    bool goes_on = true;
    enum tandem_finish finish = TANDEM_FINISH_END;
    size_t most = o->prompt_only ? 0 : o->max_tokens && o->max_tokens < MAX_TOKENS ? o->max_tokens : MAX_TOKENS;
    size_t i = 0;
    for (; i < most && goes_on && *n > 1 && !cancelled; i++) {
        const uint32_t *mask = o->mask ? o->mask(o->user, choice) : NULL;
        int32_t id = allowed(mask, n_vocab, ((size_t)(*text)[0] << 8 | (*text)[1]) * 7 % n_vocab);
        *text += 2;
        *n -= 2;
        e = (tandem_event){.user = o->user, .kind = TANDEM_EVENT_TOKEN, .choice = choice, .token = {.id = id}};
        e.token.logprob = -1;
        e.top = &e.token;
        e.n_top = o->n_top ? 1 : 0;
        goes_on = generation_event(s, &e) && !engine_is_end(s->engine, id);
        if (i % 2) generations_send(s); // a step may have several tokens of one request, by its choices
    }
    if (i == most && goes_on) finish = TANDEM_FINISH_LENGTH;
    if (cancelled) finish = TANDEM_FINISH_CANCELLED;
    if (*n == 1 && **text == 'E') finish = TANDEM_FINISH_ERROR;
    e = (tandem_event){.user = o->user, .kind = TANDEM_EVENT_DONE, .choice = choice, .finish = finish};
    generation_event(s, &e);
    generations_send(s);
}

// JSON, as RFC 8259 has it: a judge of its own, which knows nothing of the server's reader. What it sees of an answer
// is no news to the fuzzer, and following it took most of the time.
#define UNTRACED __attribute__((no_sanitize("coverage", "address", "undefined")))

UNTRACED static const char *skip_space(const char *at, const char *end) {
    while (at < end && (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t')) at++;
    return at;
}

UNTRACED static const char *skip_string(const char *at, const char *end) {
    if (at == end || *at++ != '"') return NULL;
    for (; at < end && *at != '"'; at++) {
        if ((unsigned char)*at < 0x20) return NULL;
        if (*at != '\\') continue;
        if (++at == end || *at == '\0' || !strchr("\"\\/bfnrtu", *at)) return NULL;
        for (int i = 0; i < 4 && *at == 'u'; i++)
            if (at + i + 1 >= end || !strchr("0123456789abcdefABCDEF", at[i + 1]) || !at[i + 1]) return NULL;
    }
    return at < end ? at + 1 : NULL;
}

UNTRACED static const char *skip_digits(const char *at, const char *end) {
    const char *start = at;
    while (at < end && *at >= '0' && *at <= '9') at++;
    return at > start ? at : NULL;
}

UNTRACED static const char *skip_number(const char *at, const char *end) {
    if (at < end && *at == '-') at++;
    if (at < end && *at == '0') at++;
    else at = skip_digits(at, end);
    if (at && at < end && *at == '.') at = skip_digits(at + 1, end);
    if (!at || at == end || (*at != 'e' && *at != 'E')) return at;
    if (++at < end && (*at == '+' || *at == '-')) at++;
    return skip_digits(at, end);
}

// Behind one value; NULL: it is none.
UNTRACED static const char *skip_value(const char *at, const char *end, int depth) {
    static const char *const words[] = {"null", "true", "false"};
    at = skip_space(at, end);
    if (at == end || depth > 2000) return NULL;
    if (*at == '"') return skip_string(at, end);
    for (size_t i = 0; i < 3; i++)
        if ((size_t)(end - at) >= strlen(words[i]) && memcmp(at, words[i], strlen(words[i])) == 0)
            return at + strlen(words[i]);
    if (*at != '{' && *at != '[') return skip_number(at, end);
    bool object = *at++ == '{';
    char close = object ? '}' : ']';
    at = skip_space(at, end);
    if (at < end && *at == close) return at + 1;
    for (;;) {
        if (object && !(at = skip_string(skip_space(at, end), end))) return NULL;
        if (object && ((at = skip_space(at, end)) == end || *at++ != ':')) return NULL;
        if (!(at = skip_value(at, end, depth + 1))) return NULL;
        at = skip_space(at, end);
        if (at == end || (*at != ',' && *at != close)) return NULL;
        if (*at++ == close) return at;
    }
}

static void require_json(const char *text, size_t n) {
    const char *end = skip_value(text, text + n, 0);
    require(end && skip_space(end, text + n) == text + n);
    for (size_t i = 0, length; i < n; i += length) {
        uint32_t code;
        length = (unsigned char)text[i] < 0x80 ? 1 : utf8_decode((const unsigned char *)text + i, n - i, &code);
        require(length > 0);
    }
}

// Events, each of "data: " and JSON (or [DONE]), some named.
static void require_events(const char *text, size_t n) {
    while (n > 0) {
        const char *end = memchr(text, '\n', n);
        require(end != NULL);
        size_t line = (size_t)(end - text);
        if (line > 6 && memcmp(text, "data: ", 6) == 0) {
            if (line != 12 || memcmp(text + 6, "[DONE]", 6) != 0) require_json(text + 6, line - 6);
        } else {
            require(line == 0 || text[0] == ':' || (line > 7 && memcmp(text, "event: ", 7) == 0));
        }
        text += line + 1;
        n -= line + 1;
    }
}

// The first byte chooses the route; then comes the body, up to a NUL, and the tokens.
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const paths[] = {
        "/v1/chat/completions",      "/v1/completions", "/v1/responses", "/v1/messages",
        "/v1/messages/count_tokens", "/tokenize",       "/detokenize",   "/apply-template"};
    static struct server *s;
    static char connection;
    const char *allow;
    if (!s) s = make_server();
    if (size == 0) return 0;
    const struct route *route = route_find(s, paths[data[0] % (sizeof paths / sizeof paths[0])], "POST", &allow);
    const uint8_t *end = memchr(data + 1, 0, size - 1), *tokens = end ? end + 1 : data + size;
    size_t n_body = (size_t)((end ? end : data + size) - (data + 1)), n_tokens = (size_t)(data + size - tokens);
    struct exchange *x = exchange_create(s, NULL, route);
    require(x && route);
    x->connection = (struct MHD_Connection *)(void *)&connection; // never waits, so that it is never woken
    require(buffer_append(&x->body, data + 1, n_body));
    n_taken = 0;
    cancelled = false;
    route->handle(x);
    for (size_t i = 0; i < n_taken; i++)
        for (size_t k = 0; k < taken[i].options.n; k++) play_choice(s, &taken[i].options, k, &tokens, &n_tokens);
    require(x->ready && x->done && x->status >= 200 && x->status < 600 && x->generation == NULL);
    if (x->stream) require_events(x->out.data, x->out.len);
    else require_json(x->out.data, x->out.len);
    require(atomic_load(&x->refs) == 1);
    exchange_unref(x);
    require(atomic_load(&s->n_generations) == 0);
    return 0;
}
