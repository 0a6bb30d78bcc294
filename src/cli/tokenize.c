// tokenize.c: `tandem tokenize`: text to ids, and with --decode ids to text.
#include "cli/cli.h"
#include "cli/documents.h"

#include "text/stream.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

struct work {
    const struct tokenizer *tok;
    const struct cli_options *o;
    struct token_ids ids; // reused
};

static void print_ids(const struct token_ids *ids, const char *open, const char *separator, const char *close) {
    fputs(open, stdout);
    for (size_t i = 0; i < ids->n; i++) printf("%s%d", i ? separator : "", ids->ids[i]);
    fputs(close, stdout);
}

static void append_text(void *user, enum stream_part part, const char *text, size_t n) {
    (void)part;
    buffer_append(user, text, n);
}

// A token's bytes as JSON text: what is no whole character becomes U+FFFD.
static json_t *token_json(const struct tokenizer *tok, int32_t id) {
    size_t n = 0;
    const char *bytes = tokenizer_token_bytes(tok, id, &n);
    struct buffer text = {0};
    struct stream *s = stream_create(&(struct stream_options){0}, NULL);
    if (s && stream_feed(s, bytes ? bytes : "", n, append_text, &text)) stream_finish(s, append_text, &text);
    json_t *out = json_stringn(buffer_text(&text), text.len);
    stream_free(s);
    buffer_free(&text);
    return out;
}

static bool print_json(const struct work *w) {
    json_t *ids = json_array(), *tokens = json_array();
    for (size_t i = 0; i < w->ids.n; i++) {
        json_array_append_new(ids, json_integer(w->ids.ids[i]));
        json_array_append_new(tokens, token_json(w->tok, w->ids.ids[i]));
    }
    return cli_print_json(json_pack("{s:o,s:o}", "ids", ids, "tokens", tokens));
}

static bool encode_one(void *user, const char *text, size_t n, struct error *err) {
    struct work *w = user;
    w->ids.n = 0;
    if (!tokenizer_encode(w->tok, text, n, w->o->given[OPT_SPECIAL], &w->ids, err)) return false;
    if (w->o->given[OPT_JSON]) return print_json(w);
    if (w->o->given[OPT_NULL]) print_ids(&w->ids, "[", ",", "]\n");
    else print_ids(&w->ids, "", " ", "\n");
    return true;
}

// One line of ids, NUL-terminated.
static bool decode_line(struct work *w, const char *line) {
    struct error err = {0};
    struct buffer text = {0};
    w->ids.n = 0;
    bool ok = cli_parse_ids(line, &w->ids);
    if (ok && !tokenizer_decode(w->tok, w->ids.ids, w->ids.n, w->o->given[OPT_SKIP_SPECIAL], &text, &err)) {
        cli_fail("%s", err.text);
        ok = false;
    }
    if (ok) {
        fwrite(buffer_text(&text), 1, text.len, stdout);
        putchar('\n');
    }
    buffer_free(&text);
    return ok;
}

static int decode_all(struct work *w, struct buffer *input) {
    for (char *line = input->data, *end = input->data + input->len; line < end;) {
        char *newline = memchr(line, '\n', (size_t)(end - line));
        if (newline) *newline = '\0';
        if (!decode_line(w, line)) return EXIT_FAULT;
        line = newline ? newline + 1 : end;
    }
    return EXIT_GOOD;
}

static int run(const struct cli_options *o) {
    if (o->given[OPT_NULL] && (o->given[OPT_PROMPT] || o->given[OPT_DECODE]))
        return cli_usage("-0 reads texts from standard input: it goes neither with --prompt nor with --decode");
    enum template_kind kind;
    struct tokenizer *tok = cli_open_tokenizer(o, &kind);
    if (!tok) return EXIT_FAULT;
    struct work w = {.tok = tok, .o = o};
    struct buffer input = {0};
    struct error err = {0};
    int status = EXIT_FAULT;
    bool ok = o->given[OPT_PROMPT] ? buffer_append_text(&input, o->text[OPT_PROMPT]) : cli_read(NULL, &input);
    if (ok && o->given[OPT_DECODE]) status = decode_all(&w, &input);
    else if (ok && o->given[OPT_NULL]) status = for_each_document(&input, encode_one, &w);
    else if (ok) status = encode_one(&w, buffer_text(&input), input.len, &err) ? EXIT_GOOD : cli_fail("%s", err.text);
    token_ids_free(&w.ids);
    buffer_free(&input);
    tokenizer_free(tok);
    return status;
}

static const enum option_id options[] = {OPT_PROMPT, OPT_SPECIAL,      OPT_JSON, OPT_NULL,
                                         OPT_DECODE, OPT_SKIP_SPECIAL, OPT_HELP};

const struct command command_tokenize = {
    .name = "tokenize",
    .summary = "text to token ids, and back",
    .usage = "[MODEL] [-p TEXT | < FILE] [options]",
    .details = "Prints ids separated by spaces. With -0, texts on stdin are separated by NUL, and each gives a line "
               "with a JSON\n"
               "array. --decode reads ids separated by spaces or commas, a sequence a line.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
