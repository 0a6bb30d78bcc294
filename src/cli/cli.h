// cli.h: what the subcommands share: options, opening the model, messages on stderr. Each subcommand is one file with
// one `struct command`; main.c is a table of them.
#ifndef TANDEM_CLI_CLI_H
#define TANDEM_CLI_CLI_H

#include "engine/engine.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { EXIT_GOOD = 0, EXIT_FAULT = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 }; // 130: as a shell reports SIGINT

// Every option of every subcommand; options.c holds their spelling and help.
enum option_id {
    OPT_HELP,
    OPT_JSON,
    OPT_THREADS,
    OPT_CTX,
    OPT_FUSION,
    OPT_KV_TYPE,
    OPT_REPACK,
    OPT_ISA,
    OPT_DEVICE,
    OPT_TEMPLATE, // running a model
    OPT_SEED,
    OPT_TEMP,
    OPT_TOP_K,
    OPT_TOP_P,
    OPT_MIN_P,
    OPT_REPEAT_PENALTY,
    OPT_PRESENCE_PENALTY,
    OPT_FREQUENCY_PENALTY,
    OPT_LOGIT_BIAS,
    OPT_MAX_TOKENS,
    OPT_STOP,
    OPT_STOP_ID,
    OPT_GREEDY,
    OPT_IGNORE_EOS, // sampling
    OPT_THINK,
    OPT_SYSTEM,
    OPT_PROMPT,
    OPT_FILE,
    OPT_RAW,
    OPT_MESSAGES,
    OPT_IDS,
    OPT_IDS_FILE,
    OPT_LOGPROBS,
    OPT_LOAD,
    OPT_HIDE_THINKING,
    OPT_SPECIAL,
    OPT_DECODE,
    OPT_SKIP_SPECIAL,
    OPT_NULL,
    OPT_TENSORS,
    OPT_STATS,
    OPT_MACHINE,
    OPT_PATH,
    OPT_POSITIONS,
    OPT_REPORT,
    OPT_OUTPUT,
    OPT_GLOBS,
    OPT_STAGE,
    OPT_THOROUGH,
    OPT_SYNTHETIC,
    OPT_TYPE,
    OPT_PREFILL,
    OPT_PROMPTS,
    OPT_DECODE_STEPS,
    OPT_DECODE_TOKENS,
    OPT_DEPTH,
    OPT_BATCH,
    OPT_WORKLOAD,
    OPT_REPEAT,
    OPT_CSV,
    OPT_CHUNK,
    OPT_FUSIONS,
    OPT_MANIFEST,
    OPT_PURE,
    OPT_TEXT_FILE,
    OPT_SAVE_LOGITS,
    OPT_KLD,
    OPT_FORCE,
    OPT_MODEL,
    OPT_HOST,
    OPT_PORT,
    OPT_API_KEY_FILE,
    OPT_TLS_CERT,
    OPT_TLS_KEY,
    OPT_MAX_QUEUE,
    OPT_MAX_RUNNING,
    OPT_KV_TOKENS,
    OPT_MODEL_NAME,
    OPT_GRACE,
    OPT_TIMEOUTS,
    OPT_SANDBOX,
    OPT_LOG_REQUESTS,
    OPT_LOG_PROMPTS,
    OPT_REVISION,
    OPT_INCLUDE,
    OPT_COUNT
};

enum { MAX_STOPS = 64, MAX_BIASES = 1024, MAX_INCLUDES = 64 };

// What was given on the command line. NULL, -1 or false: not given.
struct cli_options {
    bool given[OPT_COUNT];
    const char *text[OPT_COUNT]; // the argument as it was typed
    const char *stops[MAX_STOPS];
    size_t n_stops;
    int32_t stop_ids[MAX_STOPS];
    size_t n_stop_ids;
    int32_t bias_ids[MAX_BIASES];
    float bias[MAX_BIASES];
    size_t n_biases;
    const char *includes[MAX_INCLUDES];
    size_t n_includes;
    const char *model;     // the first positional argument
    const char *operand_2; // the second, of a command with two
};

struct command {
    const char *name;
    const char *summary; // one line
    const char *usage;   // after "usage: tandem NAME"
    const char *details; // more lines for --help, or NULL
    const enum option_id *options;
    size_t n_options;
    int (*run)(const struct cli_options *o);
    bool two_operands; // both needed (diff A B); else at most one, MODEL
};

extern const struct command command_chat, command_run, command_tokenize, command_template, command_inspect,
    command_trace, command_diff, command_check, command_bench, command_replay, command_quantize, command_perplexity,
    command_serve, command_pull;

// Says `tandem: SUBCOMMAND: ...` on stderr and returns EXIT_FAULT (cli_usage: EXIT_USAGE).
int cli_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
int cli_usage(const char *format, ...) __attribute__((format(printf, 1, 2)));
// Says `tandem: SUBCOMMAND: interrupted: ...` and returns EXIT_INTERRUPTED.
int cli_interrupted(const char *what_became);
// Has cli_usage been called? What a number in an option does not allow shows only when it is read.
bool cli_usage_was_wrong(void);
void cli_set_command(const char *name); // for those messages; called once by main

// Parses argv[1..] of a subcommand. false: `*status` is what to exit with (help was shown, or usage was wrong).
bool cli_parse(const struct command *command, int argc, char **argv, struct cli_options *o, int *status);

// Numbers in options. A bad one is reported; false then.
bool cli_size(const struct cli_options *o, enum option_id id, size_t min, size_t max, size_t *out);
bool cli_sizes(const struct cli_options *o, enum option_id id, size_t min, size_t max, size_t *list, size_t cap,
               size_t *n); // "1,2,3"; *n stays as it is when the option was not given
bool cli_number(const struct cli_options *o, enum option_id id, double min, double max, double *out);
bool cli_on_off(const struct cli_options *o, enum option_id id, int *out); // -1 when absent

// The model's path: what was named, or the embedded default, found beside the program or under its prefix. NULL
// (reported) when there is none. Valid until the program ends.
const char *cli_model(const struct cli_options *o);
const char *cli_default_model(void); // main.c: NULL when not found
const char *cli_history_path(void);  // main.c: NULL when there is no home folder
bool cli_can_redraw(void);           // main.c: is stderr a terminal on which a line can be drawn again?
bool cli_can_color(int fd);          // main.c: is it a terminal with colours, and NO_COLOR not set?

// Ctrl-C. cli_die, which main installs, removes what is unfinished and lets the signal end the program, so that a
// shell's loop ends, too. A subcommand that ends in order puts its own handler in its place (NULL: cli_die again), sets
// that handler to cli_die when it has been called, and returns EXIT_INTERRUPTED. Not for a process that ignores SIGINT.
void cli_on_interrupt(void (*handler)(int));
atomic_bool *cli_stop_on_interrupt(void); // puts a handler in place that sets what this returns
void cli_die(int signal_number);

// Messages and a progress bar on stderr, for what takes a struct log. All zero is a bar that was never shown.
struct cli_bar {
    double started;
    bool shown;
};
struct log cli_log(struct cli_bar *bar);

// Opens the engine with a progress bar and warnings on stderr; NULL (reported) on failure.
tandem_engine *cli_open(const struct cli_options *o);
// The same with fields of `base` that are set in place of what the options say.
tandem_engine *cli_open_as(const struct cli_options *o, const tandem_options *base);

// The tokenizer and template of a model, without its weights; NULL (reported) on failure.
struct tokenizer *cli_open_tokenizer(const struct cli_options *o, enum template_kind *kind);

// The sampling that results from flags, generation_config.json and presets, and where each value comes from.
struct cli_sampling {
    tandem_sampling values;
    struct sampling_sources sources;
    const char *seed_source, *presence_source, *frequency_source;
    size_t max_tokens; // SIZE_MAX: until the context is full
};
bool cli_sampling(const struct cli_options *o, const tandem_engine *engine, bool thinking, struct cli_sampling *out);
json_t *cli_sampling_json(const struct cli_sampling *s); // NULL: no memory

// Whether the model thinks: --think, else the template's default.
bool cli_thinking(const struct cli_options *o, const tandem_engine *engine, bool *out);

// Whether --stop-id named it.
bool cli_is_stop_id(const struct cli_options *o, int32_t id);

// Reads a whole file or, with NULL, standard input.
bool cli_read(const char *path, struct buffer *out);
// "1,2 3" to ids.
bool cli_parse_ids(const char *text, struct token_ids *out);
// Prints a JSON value and a newline on stdout, and drops the reference. false (reported) when it is NULL or stdout
// fails.
bool cli_print_json(json_t *value);
// Flushes stdout: a full disk or a closed pipe is an error.
bool cli_flush(void);

#endif
