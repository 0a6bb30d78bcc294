// common.c: what subcommands share beyond options: messages, the progress bar, opening a model, sampling, input.
#include "cli/cli.h"

#include "base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *command_name = ""; // set once by main, before anything else runs

void cli_set_command(const char *name) {
    command_name = name;
}

static void complain(const char *format, va_list args) {
    int saved = errno; // of which cli_flush may tell later
    fflush(stdout);
    errno = saved;
    fprintf(stderr, "tandem: %s%s", command_name, *command_name ? ": " : "");
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
}

int cli_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    complain(format, args);
    va_end(args);
    return EXIT_FAULT;
}

int cli_interrupted(const char *what_became) {
    cli_fail("interrupted: %s", what_became);
    return EXIT_INTERRUPTED;
}

static bool usage_was_wrong;

int cli_usage(const char *format, ...) {
    usage_was_wrong = true;
    va_list args;
    va_start(args, format);
    complain(format, args);
    va_end(args);
    fprintf(stderr, "try: tandem %s%s--help\n", command_name, *command_name ? " " : "");
    return EXIT_USAGE;
}

bool cli_usage_was_wrong(void) {
    return usage_was_wrong;
}

// ---- Opening ------------------------------------------------------------------------------------------------------

// On a terminal only, and only for work that takes over a second.
static void show_progress(void *user, const char *what, double fraction) {
    struct cli_bar *bar = user;
    enum { WIDTH = 30 };
    if (!cli_can_redraw()) return;
    double now = clock_seconds();
    if (bar->started == 0) bar->started = now;
    if (now - bar->started < 1 && !bar->shown) return;
    bar->shown = true;
    int full = (int)(fraction * WIDTH);
    fprintf(stderr, "\r%s [", what);
    for (int i = 0; i < WIDTH; i++) fputc(i < full ? '#' : ' ', stderr);
    fprintf(stderr, "] %3d%%", (int)(100 * fraction));
    if (fraction >= 1) {
        fprintf(stderr, "\r\033[K");
        *bar = (struct cli_bar){0};
    }
}

static void show_message(void *user, enum tandem_log_level level, const char *text) {
    (void)user;
    fprintf(stderr, "tandem: %s: %s%s\n", command_name, level == TANDEM_LOG_WARN ? "warning: " : "", text);
}

static void show_log(void *user, enum log_level level, const char *text) {
    show_message(user, level == LOG_WARN ? TANDEM_LOG_WARN : TANDEM_LOG_INFO, text);
}

struct log cli_log(struct cli_bar *bar) {
    return (struct log){.message = show_log, .progress = show_progress, .user = bar};
}

const char *cli_model(const struct cli_options *o) {
    if (o->model) return o->model;
    const char *found = cli_default_model();
    if (!found)
        cli_fail(
            "no MODEL was given, and the default model tandem-tiny was found neither beside the program nor under its "
            "prefix");
    return found;
}

tandem_engine *cli_open(const struct cli_options *o) {
    return cli_open_as(o, &(tandem_options){0});
}

tandem_engine *cli_open_as(const struct cli_options *o, const tandem_options *base) {
    size_t threads = 0, context = 0;
    if (!cli_size(o, OPT_THREADS, 1, 1024, &threads) || !cli_size(o, OPT_CTX, 1, (size_t)1 << 24, &context))
        return NULL;
    const char *model = base->model ? base->model : cli_model(o);
    if (!model) return NULL;
    struct cli_bar bar = {0};
    tandem_options options = {.model = model,
                              .threads = (int)threads,
                              .context = base->context ? base->context : context,
                              .kv_tokens = base->kv_tokens,
                              .chunk = base->chunk,
                              .max_batch = base->max_batch,
                              .max_queue = base->max_queue,
                              .fusion = base->fusion ? base->fusion : o->text[OPT_FUSION],
                              .isa = base->isa ? base->isa : o->text[OPT_ISA],
                              .kv_type = base->kv_type ? base->kv_type : o->text[OPT_KV_TYPE],
                              .device = base->device ? base->device : o->text[OPT_DEVICE],
                              .repack = o->text[OPT_REPACK],
                              .chat_template = o->text[OPT_TEMPLATE],
                              .log = show_message,
                              .progress = show_progress,
                              .user = &bar};
    char err[1024];
    tandem_engine *engine = tandem_open(&options, err, sizeof err);
    if (!engine) cli_fail("%s", err);
    return engine;
}

struct tokenizer *cli_open_tokenizer(const struct cli_options *o, enum template_kind *kind) {
    struct error err = {0};
    enum model_kind files;
    struct buffer path = {0};
    struct tokenizer *tok = NULL;
    const char *model = cli_model(o);
    if (!model) return NULL;
    if (hub_resolve(model, &files, &path, &err)) {
        struct gguf g;
        if (files == MODEL_SYNTHETIC) {
            error_set(&err, "model %s: a synthetic model has no tokenizer", model);
        } else if (files == MODEL_FOLDER) {
            tok = tokenizer_open_folder(path.data, &err);
        } else if (gguf_open(path.data, &g, &err)) {
            tok = tokenizer_open_gguf(&g, &err);
            gguf_close(&g);
        }
    }
    buffer_free(&path);
    const char *name = o->text[OPT_TEMPLATE];
    if (tok && !name) *kind = template_recognise(tokenizer_chat_template(tok));
    else if (tok) template_from_name(name, kind); // a name that is known: cli_parse saw to it
    if (!tok) cli_fail("%s", err.text);
    return tok;
}

// ---- Sampling -----------------------------------------------------------------------------------------------------

bool cli_thinking(const struct cli_options *o, const tandem_engine *engine, bool *out) {
    int think;
    if (!cli_on_off(o, OPT_THINK, &think)) return false;
    bool always = template_opens_thinking(engine->template_kind), never = !template_has_thinking(engine->template_kind);
    if ((think == 0 && always) || (think == 1 && never))
        show_message(NULL, TANDEM_LOG_WARN,
                     always ? "--think off: by its template, this model always thinks first"
                            : "--think on: by its template, this model never thinks first");
    *out = template_has_thinking(engine->template_kind) && (think != 0 || !template_can_hush(engine->template_kind));
    return true;
}

bool cli_is_stop_id(const struct cli_options *o, int32_t id) {
    for (size_t i = 0; i < o->n_stop_ids; i++)
        if (o->stop_ids[i] == id) return true;
    return false;
}

static bool number_flag(const struct cli_options *o, enum option_id id, double min, double max, const char *flag,
                        double *value, const char **source) {
    if (!cli_number(o, id, min, max, value)) return false;
    if (o->given[id]) *source = flag;
    return true;
}

bool cli_sampling(const struct cli_options *o, const tandem_engine *engine, bool thinking, struct cli_sampling *s) {
    *s = (struct cli_sampling){.max_tokens = SIZE_MAX, .presence_source = "default", .frequency_source = "default"};
    sampling_defaults(engine, thinking, &s->values, &s->sources);
    size_t top_k = (size_t)s->values.top_k, seed = 0;
    if (!number_flag(o, OPT_TEMP, 0, 100, "--temp", &s->values.temperature, &s->sources.temperature) ||
        !number_flag(o, OPT_TOP_P, 1e-9, 1, "--top-p", &s->values.top_p, &s->sources.top_p) ||
        !number_flag(o, OPT_MIN_P, 0, 1, "--min-p", &s->values.min_p, &s->sources.min_p) ||
        !number_flag(o, OPT_REPEAT_PENALTY, 1e-3, 100, "--repeat-penalty", &s->values.repeat_penalty,
                     &s->sources.repeat_penalty) ||
        !number_flag(o, OPT_PRESENCE_PENALTY, -2, 2, "--presence-penalty", &s->values.presence_penalty,
                     &s->presence_source) ||
        !number_flag(o, OPT_FREQUENCY_PENALTY, -2, 2, "--frequency-penalty", &s->values.frequency_penalty,
                     &s->frequency_source) ||
        !cli_size(o, OPT_TOP_K, 0, INT32_MAX, &top_k) || !cli_size(o, OPT_MAX_TOKENS, 0, SIZE_MAX, &s->max_tokens) ||
        !cli_size(o, OPT_SEED, 0, SIZE_MAX, &seed))
        return false;
    s->values.top_k = (int32_t)top_k;
    if (o->given[OPT_TOP_K]) s->sources.top_k = "--top-k";
    if (o->given[OPT_GREEDY]) {
        s->values.temperature = 0;
        s->sources.temperature = "--greedy";
    }
    s->values.seed = seed;
    s->seed_source = o->given[OPT_SEED] ? "--seed" : "random";
    if (!o->given[OPT_SEED] && getrandom(&s->values.seed, sizeof s->values.seed, 0) != sizeof s->values.seed)
        s->values.seed = (uint64_t)(clock_seconds() * 1e9);
    s->values.seed &= INT64_MAX; // what JSON readers can hold
    s->values.bias_ids = o->bias_ids;
    s->values.bias = o->bias;
    s->values.n_bias = o->n_biases;
    s->values.ignore_end = o->given[OPT_IGNORE_EOS];
    for (size_t i = 0, n = engine->model->config.n_vocab; i < o->n_stop_ids; i++)
        if ((size_t)o->stop_ids[i] >= n)
            return cli_fail("--stop-id: token id %d is not in the vocabulary of %zu", o->stop_ids[i], n) == 0;
    return true;
}

json_t *cli_sampling_json(const struct cli_sampling *s) {
    return json_pack(
        "{s:{s:f,s:s},s:{s:i,s:s},s:{s:f,s:s},s:{s:f,s:s},s:{s:f,s:s},s:{s:f,s:s},s:{s:f,s:s},s:{s:I,s:s}}",
        "temperature", "value", s->values.temperature, "source", s->sources.temperature, "top_k", "value",
        (int)s->values.top_k, "source", s->sources.top_k, "top_p", "value", s->values.top_p, "source", s->sources.top_p,
        "min_p", "value", s->values.min_p, "source", s->sources.min_p, "repeat_penalty", "value",
        s->values.repeat_penalty, "source", s->sources.repeat_penalty, "presence_penalty", "value",
        s->values.presence_penalty, "source", s->presence_source, "frequency_penalty", "value",
        s->values.frequency_penalty, "source", s->frequency_source, "seed", "value", (json_int_t)s->values.seed,
        "source", s->seed_source);
}

// ---- Input and output ---------------------------------------------------------------------------------------------

static bool read_stream(int fd, const char *name, struct buffer *out) {
    char piece[65536];
    for (ssize_t n; (n = read(fd, piece, sizeof piece)) != 0;) {
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 || !buffer_append(out, piece, (size_t)n))
            return cli_fail("cannot read %s: %s", name, n < 0 ? strerror(errno) : "out of memory") == 0;
    }
    return true;
}

// A file that the user names may be a pipe, as in -f <(command).
bool cli_read(const char *path, struct buffer *out) {
    struct error err = {0};
    struct stat st;
    if (!path || strcmp(path, "-") == 0) {
        if (isatty(STDIN_FILENO))
            fprintf(stderr, "tandem: %s: reading from the terminal; Ctrl-D ends it\n", command_name);
        return read_stream(STDIN_FILENO, "standard input", out);
    }
    if (stat(path, &st) == 0 && (S_ISFIFO(st.st_mode) || S_ISCHR(st.st_mode))) {
        int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
        if (fd < 0) return cli_fail("cannot open %s: %s", path, strerror(errno)) == 0;
        bool ok = read_stream(fd, path, out);
        close(fd);
        return ok;
    }
    return file_read(path, (size_t)1 << 30, out, &err) || cli_fail("%s", err.text) == 0;
}

bool cli_parse_ids(const char *text, struct token_ids *out) {
    for (const char *p = text; *p;) {
        if (*p == ',' || *p == ' ' || *p == '\n' || *p == '\t' || *p == '\r') {
            p++;
            continue;
        }
        char *end;
        errno = 0;
        long id = strtol(p, &end, 10);
        if (end == p || errno || id < 0 || id > INT32_MAX || (*end && !strchr(", \n\t\r", *end))) {
            cli_fail("expected token ids separated by commas or spaces, found \"%.20s\"", p);
            return false;
        }
        int32_t value = (int32_t)id;
        if (!token_ids_append(out, &value, 1)) {
            cli_fail("out of memory");
            return false;
        }
        p = end;
    }
    return true;
}

// Whoever closes a pipe, as head does, knows.
static bool reader_is_gone(void) {
    struct pollfd out = {.fd = STDOUT_FILENO, .events = POLLOUT};
    return poll(&out, 1, 0) == 1 && (out.revents & (POLLERR | POLLHUP)) != 0;
}

bool cli_flush(void) {
    static bool reported;
    if (fflush(stdout) == 0 && !ferror(stdout)) return true;
    if (!reported && !reader_is_gone()) cli_fail("cannot write to standard output: %s", strerror(errno));
    reported = true;
    return false;
}

bool cli_print_json(json_t *value) {
    if (!value) {
        cli_fail("out of memory for the JSON answer");
        return false;
    }
    int bad = json_dumpf(value, stdout, JSON_COMPACT | JSON_ENCODE_ANY);
    json_decref(value);
    fputc('\n', stdout);
    return cli_flush() && !bad;
}
