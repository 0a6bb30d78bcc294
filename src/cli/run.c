// run.c: `tandem run`: one completion of a prompt, a chat turn, a JSON conversation or plain ids.
#include "cli/cli.h"
#include "cli/manifest.h"

#include "base/clock.h"
#include "text/stream.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// One generation in progress.
struct generation {
    const struct cli_options *o;
    tandem_engine *engine;
    tandem_session *session;
    struct cli_sampling sampling;
    struct stream *stream;
    struct buffer text, reasoning;
    struct token_ids prompt, tokens;
    json_t *logprobs; // NULL: not asked for
    size_t n_top;
    bool quiet; // --json: nothing is streamed
    const char *finish;
    double load_s, first_token_s, prompt_s, decode_s;
    char err[1024];
};

static tandem_session *interrupted; // what Ctrl-C cancels: a signal handler can reach nothing else

static void on_interrupt(int signal_number) {
    (void)signal_number;
    if (interrupted) tandem_session_cancel(interrupted);
    cli_on_interrupt(NULL); // the second one ends the program
}

static void emit(void *user, enum stream_part part, const char *text, size_t n) {
    struct generation *g = user;
    buffer_append(part == STREAM_CONTENT ? &g->text : &g->reasoning, text, n);
    if (g->quiet) return;
    if (part == STREAM_CONTENT) {
        fwrite(text, 1, n, stdout);
        fflush(stdout);
    } else if (isatty(STDERR_FILENO)) {
        bool color = cli_can_color(STDERR_FILENO);
        fprintf(stderr, "%s%.*s%s", color ? "\033[2m" : "", (int)n, text, color ? "\033[0m" : "");
    }
}

// ---- The prompt ---------------------------------------------------------------------------------------------------

// A question of nothing would be answered, too.
static bool is_no_empty_input(const struct cli_options *o, const struct buffer *text) {
    return text->len > 0 || cli_fail("the prompt is empty: %s holds nothing; -p TEXT gives one",
                                     o->given[OPT_FILE] ? o->text[OPT_FILE] : "standard input") == 0;
}

// *thinking: what the options say on entry, and what holds for this document on return.
static bool prompt_from_messages(struct generation *g, bool *thinking, bool *opened_thinking) {
    const struct cli_options *o = g->o;
    struct error err = {0};
    struct template_document *doc = NULL;
    struct buffer text = {0};
    int think;
    bool ok = cli_on_off(o, OPT_THINK, &think);
    if (ok && o->given[OPT_MESSAGES]) {
        ok = cli_read(o->text[OPT_MESSAGES], &text);
        if (ok) doc = template_parse(buffer_text(&text), text.len, o->text[OPT_MESSAGES], &err);
    } else if (ok) {
        if (o->given[OPT_PROMPT]) ok = buffer_append_text(&text, o->text[OPT_PROMPT]);
        else ok = cli_read(o->text[OPT_FILE], &text) && is_no_empty_input(o, &text);
        doc = ok ? template_document_create(&err) : NULL;
        if (doc && !template_add_message(doc, "user", buffer_text(&text), text.len, NULL, 0, &err)) {
            template_document_free(doc);
            doc = NULL;
        }
    }
    if (ok && doc && o->given[OPT_SYSTEM] &&
        !template_set_system(doc, o->text[OPT_SYSTEM], strlen(o->text[OPT_SYSTEM]), &err)) {
        template_document_free(doc);
        doc = NULL;
    }
    struct template_options options = {.enable_thinking = think, .add_generation_prompt = -1};
    if (ok && (!doc || !engine_render(g->engine, doc, options, NULL, &g->prompt, &err))) {
        cli_fail("%s", err.text);
        ok = false;
    }
    if (ok && think < 0 && template_enable_thinking(doc) == 0 && template_can_hush(g->engine->template_kind))
        *thinking = false;
    *opened_thinking = template_opens_thinking(g->engine->template_kind);
    template_document_free(doc);
    buffer_free(&text);
    return ok;
}

static bool prompt_from_text(struct generation *g) {
    struct error err = {0};
    struct buffer text = {0};
    bool ok = g->o->given[OPT_PROMPT] ? buffer_append_text(&text, g->o->text[OPT_PROMPT])
                                      : cli_read(g->o->text[OPT_FILE], &text);
    int32_t bos = g->engine->tokenizer ? tokenizer_bos(g->engine->tokenizer) : -1;
    if (ok && !g->engine->tokenizer) ok = cli_fail("the model has no tokenizer: %s", g->engine->tokenizer_error) == 0;
    if (ok && tokenizer_adds_bos(g->engine->tokenizer) && bos >= 0) ok = token_ids_append(&g->prompt, &bos, 1);
    if (ok && !tokenizer_encode(g->engine->tokenizer, buffer_text(&text), text.len, true, &g->prompt, &err)) {
        cli_fail("%s", err.text);
        ok = false;
    }
    buffer_free(&text);
    return ok;
}

// ---- Generating ---------------------------------------------------------------------------------------------------

static json_t *logprob_json(const tandem_engine *e, tandem_token t) {
    size_t n = 0;
    const char *bytes = e->tokenizer ? tokenizer_token_bytes(e->tokenizer, t.id, &n) : NULL;
    struct buffer text = {0}; // bytes that are no whole characters become U+FFFD
    struct stream *s = stream_create(&(struct stream_options){0}, NULL);
    json_t *out = NULL;
    struct generation sink = {.quiet = true};
    if (s && stream_feed(s, bytes ? bytes : "", n, emit, &sink) && stream_finish(s, emit, &sink)) text = sink.text;
    out = json_pack("{s:i,s:s%,s:f}", "id", (int)t.id, "token", buffer_text(&text), text.len, "logprob",
                    (double)t.logprob);
    stream_free(s);
    buffer_free(&text);
    return out;
}

static bool note_logprobs(struct generation *g, tandem_token token) {
    tandem_token top[100];
    logits_top(g->session->last_logits, g->engine->model->config.n_vocab, top, g->n_top);
    json_t *entry = logprob_json(g->engine, token), *list = json_array();
    for (size_t i = 0; i < g->n_top; i++) json_array_append_new(list, logprob_json(g->engine, top[i]));
    return entry && json_object_set_new(entry, "top", list) == 0 && json_array_append_new(g->logprobs, entry) == 0;
}

// Generates until the end. Returns the last status.
static int generate(struct generation *g) {
    double start = clock_seconds(), first = 0;
    int status = TANDEM_OK;
    g->finish = "length";
    while (g->tokens.n < g->sampling.max_tokens) {
        tandem_token token;
        status = tandem_session_next(g->session, &token, g->err, sizeof g->err);
        if (status != TANDEM_OK && status != TANDEM_END) break;
        if (g->tokens.n == 0) first = clock_seconds();
        if (!token_ids_append(&g->tokens, &token.id, 1) || (g->logprobs && !note_logprobs(g, token))) {
            snprintf(g->err, sizeof g->err, "out of memory");
            status = TANDEM_ERROR;
            break;
        }
        if (cli_is_stop_id(g->o, token.id)) status = TANDEM_END;
        if (status == TANDEM_END) break;
        size_t n = 0;
        const char *bytes = g->engine->tokenizer ? tokenizer_token_bytes(g->engine->tokenizer, token.id, &n) : NULL;
        if (bytes) stream_feed(g->stream, bytes, n, emit, g);
        if (stream_stopped(g->stream)) {
            status = TANDEM_END;
            break;
        }
        if (ferror(stdout)) break; // nobody reads on
    }
    stream_finish(g->stream, emit, g);
    if (status == TANDEM_END) g->finish = "stop";
    if (status == TANDEM_ERROR) g->finish = "error";
    double end = clock_seconds();
    if (g->tokens.n > 0) {
        g->prompt_s = first - start;
        g->first_token_s = g->load_s + g->prompt_s;
        g->decode_s = end - first;
    }
    return status;
}

static json_t *ids_json(const struct token_ids *list) {
    json_t *array = json_array();
    for (size_t i = 0; i < list->n; i++) json_array_append_new(array, json_integer(list->ids[i]));
    return array;
}

static json_t *result_json(struct generation *g) {
    char hash[17], fusion[256];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)g->session->hash);
    double n_prompt = (double)g->prompt.n, n_decoded = g->tokens.n > 1 ? (double)(g->tokens.n - 1) : 0;
    json_t *out = json_pack(
        "{s:s%,s:s%,s:o,s:o,s:s,s:{s:I,s:I,s:I},s:{s:f,s:f,s:f,s:f},s:s,s:o,s:s,s:s}", "text", buffer_text(&g->text),
        g->text.len, "reasoning", buffer_text(&g->reasoning), g->reasoning.len, "tokens", ids_json(&g->tokens),
        "prompt_tokens", ids_json(&g->prompt), "finish_reason", g->finish, "usage", "prompt_tokens",
        (json_int_t)g->prompt.n, "cached_tokens", (json_int_t)0, "completion_tokens", (json_int_t)g->tokens.n,
        "timings", "load_s", g->load_s, "first_token_s", g->first_token_s, "prompt_tps",
        g->prompt_s > 0 ? n_prompt / g->prompt_s : 0.0, "decode_tps", g->decode_s > 0 ? n_decoded / g->decode_s : 0.0,
        "logits_hash", hash, "sampling", cli_sampling_json(&g->sampling), "device", g->engine->ops->name, "fusion",
        fusion_text(g->engine->fusion, fusion, sizeof fusion));
    if (out && g->logprobs) json_object_set(out, "logprobs", g->logprobs);
    if (out && g->err[0]) json_object_set_new(out, "error", json_string(g->err));
    return out;
}

static bool prepare(struct generation *g) {
    const struct cli_options *o = g->o;
    bool thinking = false, opened_thinking = false, plain = o->given[OPT_IDS] || o->given[OPT_RAW];
    if (!cli_thinking(o, g->engine, &thinking) || !cli_sampling(o, g->engine, thinking, &g->sampling)) return false;
    bool asked = thinking;
    if (o->given[OPT_IDS]) {
        if (!cli_parse_ids(o->text[OPT_IDS], &g->prompt)) return false;
    } else if (o->given[OPT_RAW] ? !prompt_from_text(g) : !prompt_from_messages(g, &thinking, &opened_thinking)) {
        return false;
    }
    if (thinking != asked && !cli_sampling(o, g->engine, thinking, &g->sampling)) return false; // the document's mode
    struct error err = {0};
    struct stream_options stream = {.stops = o->stops,
                                    .n_stops = o->n_stops,
                                    .split_thinking = !plain && template_has_thinking(g->engine->template_kind),
                                    .starts_in_thinking = opened_thinking};
    g->stream = stream_create(&stream, &err);
    if (!g->stream) return cli_fail("%s", err.text) == 0;
    if (g->prompt.n == 0) return cli_fail("the prompt is empty: expected at least one token") == 0;
    g->session = tandem_session_new(g->engine, &g->sampling.values, g->err, sizeof g->err);
    if (!g->session || tandem_session_append(g->session, g->prompt.ids, g->prompt.n, g->err, sizeof g->err) < 0)
        return cli_fail("%s", g->err) == 0;
    return true;
}

static int check_usage(const struct cli_options *o) {
    int sources = o->given[OPT_PROMPT] + o->given[OPT_FILE] + o->given[OPT_MESSAGES] + o->given[OPT_IDS];
    if (sources > 1) return cli_usage("expected one of --prompt, --file, --messages and --ids");
    if (o->given[OPT_LOGPROBS] && !o->given[OPT_JSON]) return cli_usage("--logprobs needs --json");
    if (o->given[OPT_SYSTEM] && (o->given[OPT_RAW] || o->given[OPT_IDS]))
        return cli_usage("--system goes with a chat prompt, not with --raw or --ids");
    return EXIT_GOOD;
}

static bool write_manifest(const struct generation *g) {
    struct error err = {0};
    struct manifest_run r = {.model = cli_model(g->o),
                             .sampling = &g->sampling,
                             .prompt = &g->prompt,
                             .tokens = &g->tokens,
                             .finish = g->finish,
                             .hash = g->session->hash};
    return manifest_write(g->o->text[OPT_MANIFEST], g->engine, &r, &err) || cli_fail("%s", err.text) == 0;
}

static int run(const struct cli_options *o) {
    struct generation g = {.o = o, .quiet = o->given[OPT_JSON]};
    int status = check_usage(o);
    if (status != EXIT_GOOD) return status;
    if (!cli_size(o, OPT_LOGPROBS, 0, 100, &g.n_top)) return EXIT_USAGE;
    if (o->given[OPT_LOGPROBS]) g.logprobs = json_array();
    double start = clock_seconds();
    g.engine = cli_open(o);
    if (!g.engine) return EXIT_FAULT;
    g.load_s = clock_seconds() - start;
    status = EXIT_FAULT;
    if (prepare(&g)) {
        interrupted = g.session;
        cli_on_interrupt(on_interrupt);
        int last = generate(&g);
        cli_on_interrupt(NULL);
        interrupted = NULL;
        bool printed = true;
        if (g.quiet) printed = cli_print_json(result_json(&g));
        else putchar('\n');
        if (o->given[OPT_MANIFEST] && !write_manifest(&g)) printed = false;
        if (last == TANDEM_ERROR) cli_fail("%s", g.err);
        if (last == TANDEM_CANCELLED) status = EXIT_INTERRUPTED;
        else status = last == TANDEM_ERROR || !printed ? EXIT_FAULT : EXIT_GOOD;
    }
    tandem_session_free(g.session);
    stream_free(g.stream);
    buffer_free(&g.text);
    buffer_free(&g.reasoning);
    token_ids_free(&g.prompt);
    token_ids_free(&g.tokens);
    json_decref(g.logprobs);
    tandem_close(g.engine);
    return status;
}

static const enum option_id options[] = {OPT_PROMPT,
                                         OPT_FILE,
                                         OPT_MESSAGES,
                                         OPT_IDS,
                                         OPT_RAW,
                                         OPT_SYSTEM,
                                         OPT_THINK,
                                         OPT_JSON,
                                         OPT_LOGPROBS,
                                         OPT_MANIFEST,
                                         OPT_MAX_TOKENS,
                                         OPT_STOP,
                                         OPT_STOP_ID,
                                         OPT_GREEDY,
                                         OPT_TEMP,
                                         OPT_TOP_K,
                                         OPT_TOP_P,
                                         OPT_MIN_P,
                                         OPT_REPEAT_PENALTY,
                                         OPT_PRESENCE_PENALTY,
                                         OPT_FREQUENCY_PENALTY,
                                         OPT_LOGIT_BIAS,
                                         OPT_SEED,
                                         OPT_IGNORE_EOS,
                                         OPT_TEMPLATE,
                                         OPT_CTX,
                                         OPT_THREADS,
                                         OPT_DEVICE,
                                         OPT_ISA,
                                         OPT_FUSION,
                                         OPT_KV_TYPE,
                                         OPT_REPACK,
                                         OPT_HELP};

const struct command command_run = {
    .name = "run",
    .summary = "one completion of a prompt",
    .usage = "[MODEL] (-p TEXT | -f FILE | --messages FILE | --ids IDS | < FILE) [options]",
    .details = "The prompt is one turn of a chat unless --raw says otherwise. The answer goes to stdout as it comes; "
               "what the\n"
               "model thinks is shown dimmed on stderr when that is a terminal.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
