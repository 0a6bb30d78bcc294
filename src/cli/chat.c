// chat.c: `tandem chat`: a conversation on a terminal, or line by line from a pipe.
#include "cli/cli.h"

#include "base/clock.h"
#include "engine/conversation.h"
#include "text/stream.h"

#include <errno.h>
#include <histedit.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct chat {
    const struct cli_options *o;
    tandem_engine *engine;
    tandem_session *session;
    struct conversation talk;
    struct cli_sampling sampling;
    bool thinking, show_thinking, terminal;
    bool dimmed; // the terminal shows thinking now

    // The reply in progress.
    struct buffer content, reasoning;
    struct token_ids reply;

    // About the last turn, for /stats.
    size_t prompt_tokens, reused_tokens;
    double prompt_s, decode_s;
};

static tandem_session *interrupted; // what Ctrl-C cancels: a signal handler can reach nothing else

static void on_interrupt(int signal_number) {
    (void)signal_number;
    if (interrupted) tandem_session_cancel(interrupted);
}

// ---- Showing the reply --------------------------------------------------------------------------------------------

static void dim(struct chat *c, bool on) {
    if (c->dimmed == on) return;
    c->dimmed = on;
    bool color = cli_can_color(STDOUT_FILENO);
    fputs(on ? (color ? "\033[2m" : "") : color ? "\033[0m\n\n" : "\n\n", stdout);
}

static void show(void *user, enum stream_part part, const char *text, size_t n) {
    struct chat *c = user;
    buffer_append(part == STREAM_CONTENT ? &c->content : &c->reasoning, text, n);
    if (part == STREAM_REASONING && !(c->show_thinking && c->terminal)) return;
    if (c->terminal) dim(c, part == STREAM_REASONING);
    fwrite(text, 1, n, stdout);
    fflush(stdout);
}

// Generates one reply into c->content, c->reasoning, c->reply. Returns the last status.
static int generate(struct chat *c, char *err, size_t err_size) {
    struct stream_options options = {.stops = c->o->stops,
                                     .n_stops = c->o->n_stops,
                                     .split_thinking = template_has_thinking(c->engine->template_kind),
                                     .starts_in_thinking = template_opens_thinking(c->engine->template_kind)};
    struct stream *stream = stream_create(&options, NULL);
    if (!stream) {
        snprintf(err, err_size, "out of memory");
        return TANDEM_ERROR;
    }
    double start = clock_seconds(), first = start;
    int status = TANDEM_OK;
    for (size_t i = 0; i < c->sampling.max_tokens; i++) {
        tandem_token token;
        status = tandem_session_next(c->session, &token, err, err_size);
        if (i == 0) first = clock_seconds();
        if (status != TANDEM_OK && status != TANDEM_END) break;
        if (cli_is_stop_id(c->o, token.id)) break; // no part of the reply
        token_ids_append(&c->reply, &token.id, 1);
        if (status == TANDEM_END) break;
        size_t n;
        const char *bytes = tokenizer_token_bytes(c->engine->tokenizer, token.id, &n);
        if (bytes) stream_feed(stream, bytes, n, show, c);
        if (stream_stopped(stream) || ferror(stdout)) break;
    }
    stream_finish(stream, show, c);
    stream_free(stream);
    if (c->terminal) dim(c, false);
    putchar('\n');
    fflush(stdout);
    c->prompt_s = first - start;
    c->decode_s = clock_seconds() - first;
    return status;
}

// Renders the conversation, makes the session continue from what it already computed, and answers. false: no reply
// came.
static bool answer(struct chat *c) {
    struct token_ids prompt = {0};
    struct error error = {0};
    char err[1024] = "";
    struct template_options options = {.enable_thinking = c->thinking, .add_generation_prompt = 1};
    buffer_clear(&c->content);
    buffer_clear(&c->reasoning);
    c->reply.n = 0;
    bool ok = conversation_render(&c->talk, c->engine, options, &prompt, &error);
    if (!ok) snprintf(err, sizeof err, "%s", error.text);
    ok = ok && tandem_session_set(c->session, prompt.ids, prompt.n, &c->reused_tokens, err, sizeof err) == TANDEM_OK;
    if (ok) c->prompt_tokens = prompt.n;
    token_ids_free(&prompt);
    if (!ok) {
        cli_fail("%s", err);
        return false;
    }
    interrupted = c->session;
    int status = generate(c, err, sizeof err);
    interrupted = NULL;
    if (status == TANDEM_ERROR) {
        cli_fail("%s", err);
        return false;
    }
    if (status == TANDEM_FULL)
        fprintf(stderr, "[the context of %zu tokens is full; /clear begins anew]\n", c->engine->context);
    if (status == TANDEM_CANCELLED) fprintf(stderr, "[stopped]\n");
    if (!conversation_add_reply(&c->talk, c->engine, buffer_text(&c->content), c->content.len,
                                buffer_text(&c->reasoning), c->reasoning.len, c->reply.ids, c->reply.n, &error)) {
        cli_fail("%s", error.text);
        return false;
    }
    return true;
}

// One user turn. A turn that gets no reply is taken back. Returns false when it failed.
static bool say(struct chat *c, const char *text) {
    struct error err = {0};
    size_t before = template_n_messages(c->talk.doc);
    if (!template_add_message(c->talk.doc, "user", text, strlen(text), NULL, 0, &err)) {
        cli_fail("%s", err.text);
        return false;
    }
    if (answer(c)) return true;
    conversation_truncate(&c->talk, before);
    return false;
}

// ---- Commands -----------------------------------------------------------------------------------------------------

static const char help[] = "/help            this list\n"
                           "/clear           forget the conversation (the system prompt stays)\n"
                           "/think on|off    let the model think first, or not\n"
                           "/system [TEXT]   set the system prompt, or remove it\n"
                           "/regen           answer the last question again\n"
                           "/save FILE       write the conversation as JSON\n"
                           "/load FILE       continue a conversation from such a file\n"
                           "/stats           tokens, reuse and speed of the last turn\n"
                           "/exit            leave (Ctrl-D too); Ctrl-C stops a reply\n"
                           "A \\ at the end of a line: the turn goes on in the next one.\n";

static bool is_role(const struct chat *c, size_t i, const char *role) {
    const struct pyjson *message = template_message(c->talk.doc, i);
    return message && pyjson_is_text(pyjson_get(message, "role"), role);
}

static void clear(struct chat *c) {
    bool keeps = is_role(c, 0, "system");
    conversation_truncate(&c->talk, keeps ? 1 : 0);
    fprintf(stderr, "[the conversation is forgotten%s]\n", keeps ? "; the system prompt stays" : "");
}

static bool set_thinking(struct chat *c, const char *argument) {
    if (!template_can_hush(c->engine->template_kind)) {
        cli_fail("/think: this model's template (%s) has no switch for thinking",
                 template_name(c->engine->template_kind));
        return false;
    }
    if (strcmp(argument, "on") != 0 && strcmp(argument, "off") != 0) {
        cli_fail("/think: expected on or off");
        return false;
    }
    char err[1024];
    uint64_t seed = c->sampling.values.seed;
    c->thinking = strcmp(argument, "on") == 0;
    if (!cli_sampling(c->o, c->engine, c->thinking, &c->sampling)) return false;
    c->sampling.values.seed = seed;
    tandem_session_set_sampling(c->session, &c->sampling.values, err, sizeof err);
    fprintf(stderr, "[thinking %s: temperature %g (%s), top-p %g (%s), top-k %d (%s)]\n", argument,
            c->sampling.values.temperature, c->sampling.sources.temperature, c->sampling.values.top_p,
            c->sampling.sources.top_p, c->sampling.values.top_k, c->sampling.sources.top_k);
    return true;
}

static bool regenerate(struct chat *c) {
    size_t n = template_n_messages(c->talk.doc);
    if (n == 0 || !is_role(c, n - 1, "assistant")) {
        cli_fail("/regen: there is no reply yet");
        return false;
    }
    conversation_truncate(&c->talk, n - 1);
    c->sampling.values.seed++; // another draw
    char err[1024];
    tandem_session_set_sampling(c->session, &c->sampling.values, err, sizeof err);
    return answer(c);
}

static bool save(struct chat *c, const char *path) {
    struct buffer text = {0};
    struct error err = {0};
    if (!*path) error_set(&err, "/save: expected a file name");
    bool ok = *path && template_write(c->talk.doc, &text, &err) && buffer_append_byte(&text, '\n') &&
              file_write(path, text.data, text.len, &err);
    if (ok) fprintf(stderr, "[saved %zu messages to %s]\n", template_n_messages(c->talk.doc), path);
    else cli_fail("%s", err.text);
    buffer_free(&text);
    return ok;
}

static bool load(struct chat *c, const char *path) {
    struct buffer text = {0};
    struct error err = {0};
    struct template_document *doc = NULL;
    if (!*path) {
        cli_fail("/load: expected a file name");
    } else if (cli_read(path, &text)) {
        doc = template_parse(buffer_text(&text), text.len, path, &err);
        if (!doc) cli_fail("%s", err.text);
    }
    buffer_free(&text);
    if (!doc) return false;
    conversation_free(&c->talk);
    c->talk.doc = doc;
    fprintf(stderr, "[loaded %zu messages from %s]\n", template_n_messages(doc), path);
    return true;
}

static void stats(const struct chat *c) {
    size_t held;
    tandem_session_ids(c->session, &held);
    tandem_memory m = tandem_memory_plan(c->engine);
    size_t computed = c->prompt_tokens - c->reused_tokens, decoded = c->reply.n > 1 ? c->reply.n - 1 : 0;
    printf("prompt      %zu tokens, %zu reused, %zu computed in %.3f s (%.1f tok/s)\n", c->prompt_tokens,
           c->reused_tokens, computed, c->prompt_s, c->prompt_s > 0 ? (double)computed / c->prompt_s : 0.0);
    printf("reply       %zu tokens (%.1f tok/s)\n", c->reply.n, c->decode_s > 0 ? (double)decoded / c->decode_s : 0.0);
    printf("context     %zu of %zu tokens\n", held, c->engine->context);
    printf("sampling    temperature %g (%s), top-k %d (%s), top-p %g (%s), min-p %g (%s), seed %llu (%s)\n",
           c->sampling.values.temperature, c->sampling.sources.temperature, c->sampling.values.top_k,
           c->sampling.sources.top_k, c->sampling.values.top_p, c->sampling.sources.top_p, c->sampling.values.min_p,
           c->sampling.sources.min_p, (unsigned long long)c->sampling.values.seed, c->sampling.seed_source);
    printf("memory      weights %.1f MB, KV %.1f MB, activations %.1f MB; %s, %d threads\n", (double)m.weights / 1e6,
           (double)m.kv / 1e6, (double)m.activations / 1e6, c->engine->ops->name, pool_size(c->engine->pool));
}

static bool set_system(struct chat *c, const char *text) {
    struct error err = {0};
    // A message in front moves: the ids of replies are found by their text again.
    struct template_document *doc = c->talk.doc;
    c->talk.doc = NULL;
    conversation_free(&c->talk);
    c->talk.doc = doc;
    if (template_set_system(doc, *text ? text : NULL, strlen(text), &err)) return true;
    cli_fail("%s", err.text);
    return false;
}

// Runs a line that begins with '/'. Sets *leave for /exit. Returns false when it failed.
static bool command(struct chat *c, const char *line, bool *leave) {
    char name[16];
    size_t n = strcspn(line, " \t");
    const char *argument = line + n + strspn(line + n, " \t");
    snprintf(name, sizeof name, "%.*s", n < sizeof name ? (int)n : (int)sizeof name - 1, line);
    if (strcmp(name, "/exit") == 0 || strcmp(name, "/quit") == 0 || strcmp(name, "/bye") == 0) return *leave = true;
    if (strcmp(name, "/help") == 0 || strcmp(name, "/?") == 0) return fputs(help, stdout) >= 0;
    if (strcmp(name, "/clear") == 0) return clear(c), true;
    if (strcmp(name, "/stats") == 0) return stats(c), true;
    if (strcmp(name, "/think") == 0) return set_thinking(c, argument);
    if (strcmp(name, "/no_think") == 0) return set_thinking(c, "off");
    if (strcmp(name, "/system") == 0)
        return set_system(c, argument) &&
               fputs(*argument ? "[system prompt set]\n" : "[no system prompt]\n", stderr) >= 0;
    if (strcmp(name, "/regen") == 0) return regenerate(c);
    if (strcmp(name, "/save") == 0) return save(c, argument);
    if (strcmp(name, "/load") == 0) return load(c, argument);
    cli_fail("unknown command %s; /help lists them", name);
    return false;
}

// ---- Reading lines ------------------------------------------------------------------------------------------------

// The client data tells whether the turn goes on.
static char *prompt_text(EditLine *el) {
    static char first[] = "> ", next[] = ". ";
    bool *goes_on = NULL;
    el_get(el, EL_CLIENTDATA, &goes_on);
    return goes_on && *goes_on ? next : first;
}

static void trim(char *line) {
    size_t n = strlen(line);
    while (n > 0 && (line[n - 1] == '\n' || line[n - 1] == '\r')) line[--n] = '\0';
}

static bool handle(struct chat *c, char *line, bool *leave) {
    trim(line);
    if (line[strspn(line, " \t")] == '\0') return true;
    return line[0] == '/' ? command(c, line, leave) : say(c, line);
}

static int talk_on_terminal(struct chat *c) {
    EditLine *el = el_init("tandem", stdin, stdout, stderr);
    History *history_list = history_init();
    HistEvent event;
    const char *path = cli_history_path();
    struct buffer turn = {0};
    bool goes_on = false; // the line ended with a backslash
    if (!el || !history_list) return cli_fail("cannot start line editing");
    history(history_list, &event, H_SETSIZE, 1000);
    history(history_list, &event, H_SETUNIQUE, 1);
    if (path) history(history_list, &event, H_LOAD, path);
    el_set(el, EL_PROMPT, prompt_text);
    el_set(el, EL_EDITOR, "emacs");
    el_set(el, EL_HIST, history, history_list);
    el_set(el, EL_SIGNAL, 0);
    el_set(el, EL_CLIENTDATA, &goes_on);
    for (bool leave = false; !leave;) {
        int n;
        errno = 0;
        const char *got = el_gets(el, &n);
        if (!got && errno == EINTR) {
            fputs("^C\n", stdout);
            el_reset(el);
            buffer_clear(&turn);
            goes_on = false;
            continue;
        }
        if (!got || n <= 0) break;
        if (got[strspn(got, " \t\n")]) history(history_list, &event, H_ENTER, got);
        size_t length = strcspn(got, "\n");
        goes_on = length > 0 && got[length - 1] == '\\';
        if (!buffer_append(&turn, got, goes_on ? length - 1 : length) ||
            !buffer_append_byte(&turn, goes_on ? '\n' : '\0'))
            break;
        if (goes_on) continue;
        handle(c, turn.data, &leave);
        buffer_clear(&turn);
        fflush(stdout);
    }
    putchar('\n');
    buffer_free(&turn);
    if (path) history(history_list, &event, H_SAVE, path);
    history_end(history_list);
    el_end(el);
    return EXIT_GOOD;
}

static int talk_by_pipe(struct chat *c) {
    char *line = NULL;
    size_t size = 0;
    bool good = true, leave = false;
    ssize_t n;
    while (!leave && !ferror(stdout) && (n = getline(&line, &size, stdin)) >= 0) {
        if (strlen(line) == (size_t)n) {
            good = handle(c, line, &leave) && good;
        } else {
            cli_fail("a line of standard input holds a NUL byte; it is left out");
            good = false;
        }
    }
    free(line);
    return good ? EXIT_GOOD : EXIT_FAULT;
}

static bool prepare(struct chat *c) {
    struct error err = {0};
    char text[1024];
    const struct cli_options *o = c->o;
    if (!c->engine->tokenizer) return cli_fail("the model has no tokenizer: %s", c->engine->tokenizer_error) == 0;
    if (c->engine->template_kind == TEMPLATE_UNKNOWN)
        return cli_fail("the model's chat template is missing or unknown to tandem; name one with --template: %s",
                        template_names()) == 0;
    if (!cli_thinking(o, c->engine, &c->thinking) || !cli_sampling(o, c->engine, c->thinking, &c->sampling))
        return false;
    c->session = tandem_session_new(c->engine, &c->sampling.values, text, sizeof text);
    if (!c->session) return cli_fail("%s", text) == 0;
    c->talk.doc = template_document_create(&err);
    if (!c->talk.doc) return cli_fail("%s", err.text) == 0;
    if (o->given[OPT_LOAD] && !load(c, o->text[OPT_LOAD])) return false;
    return !o->given[OPT_SYSTEM] || set_system(c, o->text[OPT_SYSTEM]);
}

static int run(const struct cli_options *o) {
    struct chat c = {.o = o, .show_thinking = !o->given[OPT_HIDE_THINKING]};
    c.terminal = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
    c.engine = cli_open(o);
    if (!c.engine) return EXIT_FAULT;
    int status = EXIT_FAULT;
    if (prepare(&c)) {
        struct sigaction action = {.sa_handler = on_interrupt};
        if (c.terminal) {
            sigaction(SIGINT, &action, NULL); // without SA_RESTART: it ends the reading of a line
            printf("%s, %s, context %zu. /help lists commands, Ctrl-D leaves.\n", cli_model(o), c.engine->ops->name,
                   c.engine->context);
            status = talk_on_terminal(&c);
        } else {
            status = talk_by_pipe(&c);
        }
    }
    conversation_free(&c.talk);
    tandem_session_free(c.session);
    buffer_free(&c.content);
    buffer_free(&c.reasoning);
    token_ids_free(&c.reply);
    tandem_close(c.engine);
    return status;
}

static const enum option_id options[] = {OPT_SYSTEM,
                                         OPT_THINK,
                                         OPT_HIDE_THINKING,
                                         OPT_LOAD,
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
                                         OPT_TEMPLATE,
                                         OPT_CTX,
                                         OPT_THREADS,
                                         OPT_DEVICE,
                                         OPT_ISA,
                                         OPT_FUSION,
                                         OPT_KV_TYPE,
                                         OPT_REPACK,
                                         OPT_HELP};

const struct command command_chat = {
    .name = "chat",
    .summary = "talk with a model",
    .usage = "[MODEL] [options]",
    .details = "On a terminal: line editing and history, /help lists commands, Ctrl-C stops a reply, Ctrl-D leaves,\n"
               "a \\ at the end of a line carries the turn on to the next. From a pipe: every line of stdin is a turn, "
               "and the\n"
               "replies go to stdout.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
