// template.c: `tandem template`: chat messages as JSON to the exact prompt text.
#include "cli/cli.h"
#include "cli/documents.h"

#include <stdio.h>

struct work {
    enum template_kind kind;
    struct template_options options;
    bool terminate; // -0: a NUL behind each text
};

static bool render_one(void *user, const char *text, size_t n, struct error *err) {
    const struct work *w = user;
    struct template_document *doc = template_parse(text, n, "messages", err);
    struct buffer out = {0};
    bool ok = doc && template_render(w->kind, doc, w->options, &out, NULL, err);
    if (ok) {
        fwrite(buffer_text(&out), 1, out.len, stdout);
        if (w->terminate) putchar('\0');
    }
    buffer_free(&out);
    template_document_free(doc);
    return ok;
}

static int run(const struct cli_options *o) {
    struct work w = {.options = {.enable_thinking = -1, .add_generation_prompt = -1}, .terminate = o->given[OPT_NULL]};
    if (!cli_on_off(o, OPT_THINK, &w.options.enable_thinking)) return EXIT_USAGE;
    struct tokenizer *tok = cli_open_tokenizer(o, &w.kind);
    if (!tok) return EXIT_FAULT;
    tokenizer_free(tok);
    if (w.kind == TEMPLATE_UNKNOWN)
        return cli_fail("the model's chat template is missing or unknown; name one with --template: %s",
                        template_names());
    struct buffer input = {0};
    struct error err = {0};
    int status = EXIT_FAULT;
    if (cli_read(NULL, &input)) {
        if (w.terminate) status = for_each_document(&input, render_one, &w);
        else status = render_one(&w, buffer_text(&input), input.len, &err) ? EXIT_GOOD : cli_fail("%s", err.text);
    }
    buffer_free(&input);
    return status;
}

static const enum option_id options[] = {OPT_NULL, OPT_THINK, OPT_TEMPLATE, OPT_HELP};

const struct command command_template = {
    .name = "template",
    .summary = "chat messages to the exact prompt text",
    .usage = "[MODEL] [options] < messages.json",
    .details = "A document is an array of messages, or {\"messages\", \"tools\", \"enable_thinking\", "
               "\"add_generation_prompt\"}.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
