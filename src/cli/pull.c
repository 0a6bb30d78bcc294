// pull.c: `tandem pull`: a model from the hub, into the Hugging Face cache.
#include "cli/cli.h"

#include "base/clock.h"
#include "format/pull.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

struct display {
    double started, drawn;
    bool line; // is a bar on the screen?
};

// "3.1 GB"
static const char *size_text(uint64_t bytes, char *out, size_t n) {
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB"};
    double value = (double)bytes;
    size_t unit = 0;
    while (value >= 999.5 && unit + 1 < sizeof units / sizeof *units) value /= 1000, unit++;
    snprintf(out, n, unit && value < 99.95 ? "%.1f %s" : "%.0f %s", value, units[unit]);
    return out;
}

// A file's name within `width` columns, its end shown: that is where names differ.
static void print_name(const char *name, size_t width) {
    size_t n = strlen(name);
    if (n > width) fprintf(stderr, "..%s", name + n - (width - 2));
    else fprintf(stderr, "%s", name);
}

static void clear_line(struct display *d) {
    if (d->line) fprintf(stderr, "\r\033[K");
    d->line = false;
}

static void draw(struct display *d, const struct pull_progress *p, double now) {
    enum { WIDTH = 16, NAME = 34 };
    char done[16], size[16], speed[16];
    double seconds = now - d->started, rate = seconds > 0 ? (double)p->all_done / seconds : 0;
    fprintf(stderr, "\r\033[K%zu/%zu ", p->index + 1, p->n_files);
    print_name(p->file, NAME);
    if (p->size) {
        int full = (int)(WIDTH * (double)p->done / (double)p->size);
        fprintf(stderr, " [");
        for (int i = 0; i < WIDTH; i++) fputc(i < full ? '#' : ' ', stderr);
        fprintf(stderr, "] %s of %s", size_text(p->done, done, sizeof done), size_text(p->size, size, sizeof size));
    } else {
        fprintf(stderr, " %s", size_text(p->done, done, sizeof done));
    }
    if (p->checking) fprintf(stderr, ", checking");
    else if (seconds > 1 && rate > 0) {
        fprintf(stderr, ", %s/s", size_text((uint64_t)rate, speed, sizeof speed));
        double left = p->all_size > p->all_done ? (double)(p->all_size - p->all_done) / rate : 0;
        if (left > 0 && left < 360000) fprintf(stderr, ", %d:%02d left", (int)left / 60, (int)left % 60);
    }
    d->line = true;
    d->drawn = now;
}

static void show(void *user, const struct pull_progress *p) {
    struct display *d = user;
    double now = clock_seconds();
    char size[16];
    if (!p->finished) {
        if (cli_can_redraw() && now - d->drawn > 0.1) draw(d, p, now);
        return;
    }
    clear_line(d);
    fprintf(stderr, "tandem: pull: %zu/%zu %s: %s%s\n", p->index + 1, p->n_files, p->file,
            size_text(p->done, size, sizeof size),
            p->source == PULL_CACHED    ? ", here already"
            : p->source == PULL_RESUMED ? ", resumed"
                                        : "");
}

static void show_message(void *user, enum log_level level, const char *text) {
    clear_line(user);
    fprintf(stderr, "tandem: pull: %s%s\n", level == LOG_WARN ? "warning: " : "", text);
}

static int tell_json(const struct cli_options *o, const struct pull_result *r, uint64_t fetched, double seconds) {
    static const char *const sources[] = {
        [PULL_CACHED] = "cached", [PULL_FETCHED] = "downloaded", [PULL_RESUMED] = "resumed"};
    json_t *list = json_array();
    for (size_t i = 0; i < r->n_files; i++)
        json_array_append_new(list, json_pack("{s:s,s:I,s:s}", "name", r->files[i].name, "bytes",
                                              (json_int_t)r->files[i].size, "source", sources[r->files[i].source]));
    const char *revision = o->given[OPT_REVISION] ? o->text[OPT_REVISION] : "main";
    return cli_print_json(json_pack("{s:s,s:s,s:s,s:s,s:o,s:I,s:f}", "model", o->model, "revision", revision, "commit",
                                    r->commit, "path", r->path, "files", list, "downloaded_bytes", (json_int_t)fetched,
                                    "seconds", seconds))
               ? EXIT_GOOD
               : EXIT_FAULT;
}

static int tell(const struct cli_options *o, const struct pull_result *r, double seconds) {
    uint64_t fetched = 0, all = 0;
    char a[16], b[16];
    for (size_t i = 0; i < r->n_files; i++) fetched += r->files[i].fetched, all += r->files[i].size;
    fprintf(stderr, "tandem: pull: %s at %.12s: %zu files, %s; downloaded %s in %.1f s\n", o->model, r->commit,
            r->n_files, size_text(all, a, sizeof a), size_text(fetched, b, sizeof b), seconds);
    if (o->given[OPT_JSON]) return tell_json(o, r, fetched, seconds);
    puts(r->path);
    return cli_flush() ? EXIT_GOOD : EXIT_FAULT;
}

static int run(const struct cli_options *o) {
    struct error err = {0};
    struct hub_settings hub;
    struct pull_result result;
    if (!o->model) return cli_usage("expected OWNER/NAME: which model to download");
    if (!hub_is_name(o->model))
        return cli_usage("expected OWNER/NAME, as the hub calls a model, found \"%s\"", o->model);
    if (!hub_settings_read(&hub, &err)) return cli_fail("%s", err.text);
    struct display display = {.started = clock_seconds()};
    struct log log = {.message = show_message, .user = &display};
    struct pull_options options = {.model = o->model,
                                   .revision = o->text[OPT_REVISION],
                                   .includes = o->includes,
                                   .n_includes = o->n_includes,
                                   .log = &log,
                                   .progress = show,
                                   .user = &display,
                                   .stop = cli_stop_on_interrupt()};
    bool ok = pull_model(&hub, &options, &result, &err);
    cli_on_interrupt(NULL);
    clear_line(&display);
    int status;
    if (ok) status = tell(o, &result, clock_seconds() - display.started);
    else if (atomic_load(options.stop))
        status = cli_interrupted("what came is kept: the same command goes on from there");
    else status = cli_fail("%s", err.text);
    if (ok) pull_result_free(&result);
    hub_settings_free(&hub);
    return status;
}

static const enum option_id options[] = {OPT_REVISION, OPT_INCLUDE, OPT_JSON, OPT_HELP};

const struct command command_pull = {
    .name = "pull",
    .summary = "download a model into the Hugging Face cache",
    .usage = "OWNER/NAME [--revision R] [--include GLOB] [--json]",
    .details =
        "Downloads what tandem reads: config, tokenizer, chat template and safetensors; after that OWNER/NAME is a "
        "MODEL\n"
        "for every command. --include 'GLOB' takes the files of these names instead ('*' matches '/' too), as in\n"
        "--include '*Q8_0.gguf'. The folder's path goes to stdout. An interrupted download goes on where it ended; "
        "every\n"
        "file is checked by the hub's digest.\n\n"
        "The cache and its variables are huggingface_hub's: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN (or the file\n"
        "that `hf auth login` writes) for private and gated models, HF_HUB_OFFLINE; and https_proxy, no_proxy,\n"
        "SSL_CERT_FILE.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
