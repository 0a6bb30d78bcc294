// options.c: the one table of all options: spelling, argument, help; and their parsing.
#include "cli/cli.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    char letter;          // 0: none
    const char *argument; // NULL: a flag
    const char *help;
} specs[OPT_COUNT] = {
    [OPT_HELP] = {"help", 'h', NULL, "show this help"},
    [OPT_JSON] = {"json", 0, NULL, "print one JSON object (or array) on stdout"},
    [OPT_THREADS] = {"threads", 't', "N", "threads (default: the CPUs that this process may use)"},
    [OPT_CTX] = {"ctx", 'c', "N", "context in tokens (default: the model's, at most 8192)"},
    [OPT_FUSION] = {"fusion", 0, "on|off|LIST", "fused ops: all, none (the standard path), or a list of names"},
    [OPT_KV_TYPE] = {"kv-type", 0, "TYPE",
                     "how K and V are stored: bf16 (default), f16, f32, q8_0, fp8; the last two take half the memory"},
    [OPT_REPACK] = {"repack", 0, "on|memory|off",
                    "CPU: keep weights in the CPU's own order too, in ~/.cache/tandem (default on)"},
    [OPT_ISA] = {"isa", 0, "NAME",
                 "instruction set: auto, portable, avx2, avx512, avx512vnni, avx512bf16 (default auto)"},
    [OPT_DEVICE] = {"device", 0, "NAME", "where to run: auto, cpu, cuda or cuda:N (default auto: a GPU, if one can)"},
    [OPT_TEMPLATE] = {"template", 0, "NAME", "chat template, in place of recognising the model's"},
    [OPT_SEED] = {"seed", 0, "N", "seed of the sampling noise (default: random)"},
    [OPT_TEMP] = {"temp", 0, "X", "temperature, 0 to 100; 0 is greedy"},
    [OPT_TOP_K] = {"top-k", 0, "N", "sample from the N best tokens; 0: off"},
    [OPT_TOP_P] = {"top-p", 0, "X", "sample from the best tokens that hold X of the probability; 1: off"},
    [OPT_MIN_P] = {"min-p", 0, "X", "drop tokens below X times the best one's probability; 0: off"},
    [OPT_REPEAT_PENALTY] = {"repeat-penalty", 0, "X", "divide the logits of tokens in the context; 1: off"},
    [OPT_PRESENCE_PENALTY] = {"presence-penalty", 0, "X", "subtract X once from a generated token's logit; -2 to 2"},
    [OPT_FREQUENCY_PENALTY] = {"frequency-penalty", 0, "X", "subtract X for each time a token was generated; -2 to 2"},
    [OPT_LOGIT_BIAS] = {"logit-bias", 0, "ID:X", "add X to a token's logit; may be repeated"},
    [OPT_MAX_TOKENS] = {"max-tokens", 'n', "N", "most tokens to generate (default: until the context is full)"},
    [OPT_STOP] = {"stop", 0, "TEXT", "end before this text; may be repeated"},
    [OPT_STOP_ID] = {"stop-id", 0, "ID", "end at this token, as at the model's end tokens; may be repeated"},
    [OPT_GREEDY] = {"greedy", 0, NULL, "always take the most probable token (--temp 0)"},
    [OPT_IGNORE_EOS] = {"ignore-eos", 0, NULL, "never sample an end token"},
    [OPT_THINK] = {"think", 0, "on|off", "thinking (default: as the chat template has it)"},
    [OPT_SYSTEM] = {"system", 0, "TEXT", "system prompt"},
    [OPT_PROMPT] = {"prompt", 'p', "TEXT", "the prompt"},
    [OPT_FILE] = {"file", 'f', "FILE", "read the prompt from a file (default: standard input)"},
    [OPT_RAW] = {"raw", 0, NULL, "continue the text as it is: no chat template; special tokens count"},
    [OPT_MESSAGES] = {"messages", 0, "FILE", "chat messages as JSON: an array, or {messages, tools, ...}; - is stdin"},
    [OPT_IDS] = {"ids", 0, "1,2,3", "token ids, no template"},
    [OPT_IDS_FILE] = {"ids-file", 0, "FILE", "token ids from a file"},
    [OPT_LOGPROBS] = {"logprobs", 0, "N", "with --json: log-probabilities of each token and the N best (0 to 100)"},
    [OPT_LOAD] = {"load", 0, "FILE", "continue a conversation that /save wrote"},
    [OPT_HIDE_THINKING] = {"hide-thinking", 0, NULL, "do not show what the model thinks"},
    [OPT_SPECIAL] = {"special", 0, NULL, "text of special tokens (<|im_start|>) becomes their ids"},
    [OPT_DECODE] = {"decode", 'd', NULL, "ids in (a sequence a line), text out"},
    [OPT_SKIP_SPECIAL] = {"skip-special", 0, NULL, "with --decode: leave special tokens out"},
    [OPT_NULL] = {"null", '0', NULL, "NUL-separated documents on stdin"},
    [OPT_TENSORS] = {"tensors", 0, NULL, "list every tensor"},
    [OPT_GLOBS] = {"tensors", 0, "GLOB,...", "which tensors (default: logits; see --help)"},
    [OPT_STATS] = {"stats", 0, NULL, "read every value: minimum, maximum, RMS, NaN, Inf; q/k-norm maxima by layer"},
    [OPT_MACHINE] = {"machine", 0, NULL, "say what this machine and this build can do"},
    [OPT_PATH] = {"path", 0, "fused|standard|T|H", "which path runs (default fused)"},
    [OPT_POSITIONS] = {"positions", 0, "LIST", "rows to write, as in 0,10-20,-1 (default: all; -1 is the last)"},
    [OPT_STAGE] = {"stage", 0, "LIST", "which stages: weights, ops, model, serving (default: all)"},
    [OPT_THOROUGH] = {"thorough", 0, NULL, "every layer, every size, long contexts; no limit of time"},
    [OPT_SYNTHETIC] = {"synthetic", 0, "SHAPE", "random weights of a shape in place of a MODEL (qwen3-0.6b, ...)"},
    [OPT_TYPE] = {"type", 0, "TYPE", "type of the weights"},
    [OPT_PREFILL] = {"prefill", 0, "N,...", "measure prompts of these lengths"},
    [OPT_PROMPTS] = {"prompts", 0, "N", "so many prompts of each length, in a step as many as --chunk holds"},
    [OPT_DECODE_STEPS] = {"decode", 0, NULL, "measure decoding"},
    [OPT_DECODE_TOKENS] = {"decode-tokens", 0, "N",
                           "decode so many from each depth on (default: what fills half a second, 4 to 64)"},
    [OPT_DEPTH] = {"depth", 0, "N,...", "decode with this many tokens in the KV already"},
    [OPT_BATCH] = {"batch", 0, "N,...", "decode this many sequences side by side"},
    [OPT_WORKLOAD] = {"workload", 0, "NAME",
                      "measure a whole workload: offline-256, or its first N requests: offline-N"},
    [OPT_REPEAT] = {"repeat", 0, "N", "repeats of every measurement"},
    [OPT_CSV] = {"csv", 0, NULL, "print comma-separated values"},
    [OPT_CHUNK] = {"chunk", 0, "N", "most prompt tokens of one step"},
    [OPT_TEXT_FILE] = {"file", 'f', "FILE", "the text (- is standard input)"},
    [OPT_SAVE_LOGITS] = {"save-logits", 0, "FILE", "write the logits of all scored tokens, for --kld"},
    [OPT_KLD] = {"kld", 0, "FILE", "compare with the logits that another run saved"},
    [OPT_PURE] = {"pure", 0, NULL, "every matrix in the one type, the head and the embedding included"},
    [OPT_FORCE] = {"force", 0, NULL, "replace a file that exists"},
    [OPT_MANIFEST] = {"manifest", 0, "FILE", "write a record of the run, for `tandem replay`"},
    [OPT_MODEL] = {"model", 0, "MODEL", "this model in place of the recorded one"},
    [OPT_FUSIONS] = {"fusion", 0, "on|off|LIST|on,off", "fused ops, as in run; on,off measures both in alternation"},
    [OPT_HOST] = {"host", 0, "HOST", "address to listen on (default 127.0.0.1; others need --api-key-file)"},
    [OPT_PORT] = {"port", 0, "PORT", "port (default 8080; 0: a free one)"},
    [OPT_API_KEY_FILE] = {"api-key-file", 0, "FILE", "API keys, one a line; SIGHUP reads them again"},
    [OPT_TLS_CERT] = {"tls-cert", 0, "FILE", "certificate (PEM); serves https"},
    [OPT_TLS_KEY] = {"tls-key", 0, "FILE", "its private key (PEM)"},
    [OPT_MAX_QUEUE] = {"max-queue", 0, "N", "requests that may wait; more get 429 (default 256)"},
    [OPT_MAX_RUNNING] = {"max-running", 0, "N", "sequences computed side by side (default 32)"},
    [OPT_KV_TOKENS] = {"kv-tokens", 0, "N", "tokens that the KV of all sequences holds (default: 4 contexts)"},
    [OPT_MODEL_NAME] = {"model-name", 0, "NAME", "the model's name for clients (default: from MODEL)"},
    [OPT_GRACE] = {"grace", 0, "S", "seconds that requests get to end after SIGTERM (default 30)"},
    [OPT_TIMEOUTS] =
        {"timeouts", 0, "NAME=S,...",
         "seconds: head=10,body=60,idle=60,queue=600,first-token=1800,total=3600,read=60 are the defaults"},
    [OPT_SANDBOX] = {"sandbox", 0, "on|off",
                     "refuse to start without the sandbox, or serve without (default: where it can be had)"},
    [OPT_LOG_REQUESTS] = {"log-requests", 0, NULL, "one JSON line on stderr for each request, without prompts"},
    [OPT_LOG_PROMPTS] = {"log-prompts", 0, NULL, "with --log-requests: their bodies too"},
    [OPT_REPORT] = {"report", 0, "FILE", "write a report for people, one HTML page"},
    [OPT_REVISION] = {"revision", 0, "R", "branch, tag or commit (default main)"},
    [OPT_INCLUDE] = {"include", 0, "GLOB", "download the files of these names instead; may be repeated"},
    [OPT_OUTPUT] = {"output", 'o', "FILE", "where to write"},
};

static void print_help(const struct command *c) {
    printf("usage: tandem %s %s\n\n%s\n", c->name, c->usage, c->summary);
    if (c->details) printf("\n%s", c->details);
    printf("\noptions:\n");
    for (size_t i = 0; i < c->n_options; i++) {
        char left[64], letter[6] = "    ";
        enum option_id id = c->options[i];
        if (specs[id].letter) snprintf(letter, sizeof letter, "-%c, ", specs[id].letter);
        snprintf(left, sizeof left, "%s--%s%s%s", letter, specs[id].name, specs[id].argument ? " " : "",
                 specs[id].argument ? specs[id].argument : "");
        printf("  %-32s %s\n", left, specs[id].help);
    }
}

// ID:X
static bool parse_bias(const char *text, struct cli_options *o) {
    char *end;
    errno = 0;
    long id = strtol(text, &end, 10);
    if (end == text || *end != ':' || errno || id < 0 || id > INT32_MAX || o->n_biases == MAX_BIASES) return false;
    const char *number = end + 1;
    float x = strtof(number, &end);
    if (end == number || *end || !isfinite(x)) return false;
    o->bias_ids[o->n_biases] = (int32_t)id;
    o->bias[o->n_biases++] = x;
    return true;
}

static bool parse_stop_id(const char *text, struct cli_options *o) {
    char *end;
    errno = 0;
    long id = strtol(text, &end, 10);
    if (end == text || *end || errno || id < 0 || id > INT32_MAX || o->n_stop_ids == MAX_STOPS) return false;
    o->stop_ids[o->n_stop_ids++] = (int32_t)id;
    return true;
}

// auto, cpu, cuda or cuda:N; the latter two with +KERNEL or ~KERNEL behind, whose names the device knows
static bool is_device(const char *text) {
    if (strcmp(text, "auto") == 0 || strcmp(text, "cpu") == 0) return true;
    if (strncmp(text, "cuda", 4) != 0) return false;
    text += 4;
    if (*text == ':') {
        size_t n = strspn(text + 1, "0123456789");
        if (n == 0 || n > 3) return false;
        text += 1 + n;
    }
    return *text == '\0' || *text == '+' || *text == '~';
}

static bool take(struct cli_options *o, enum option_id id, const char *argument, int *status) {
    o->given[id] = true;
    o->text[id] = argument;
    if (id == OPT_STOP) {
        if (!*argument || o->n_stops == MAX_STOPS) {
            *status = cli_usage("--stop: expected at most %d texts, none empty", MAX_STOPS);
            return false;
        }
        o->stops[o->n_stops++] = argument;
    }
    if (id == OPT_STOP_ID && !parse_stop_id(argument, o)) {
        *status = cli_usage("--stop-id: expected a token id (at most %d times), found \"%s\"", MAX_STOPS, argument);
        return false;
    }
    if (id == OPT_LOGIT_BIAS && !parse_bias(argument, o)) {
        *status = cli_usage("--logit-bias: expected ID:NUMBER (at most %d times), found \"%s\"", MAX_BIASES, argument);
        return false;
    }
    if (id == OPT_INCLUDE) {
        if (!*argument || o->n_includes == MAX_INCLUDES) {
            *status = cli_usage("--include: expected at most %d names, none empty", MAX_INCLUDES);
            return false;
        }
        o->includes[o->n_includes++] = argument;
    }
    enum template_kind kind;
    if (id == OPT_TEMPLATE && !template_from_name(argument, &kind)) {
        *status = cli_usage("--template: expected one of %s, found \"%s\"", template_names(), argument);
        return false;
    }
    if (id == OPT_DEVICE && !is_device(argument)) {
        *status = cli_usage("--device: expected auto, cpu, cuda or cuda:N, found \"%s\"", argument);
        return false;
    }
    return true;
}

bool cli_parse(const struct command *c, int argc, char **argv, struct cli_options *o, int *status) {
    struct option longs[OPT_COUNT + 1];
    char shorts[2 * OPT_COUNT + 2] = ":";
    size_t n_short = 1;
    memset(longs, 0, sizeof longs);
    memset(o, 0, sizeof *o);
    for (size_t i = 0; i < c->n_options; i++) {
        enum option_id id = c->options[i];
        longs[i] = (struct option){.name = specs[id].name, .has_arg = specs[id].argument != NULL, .val = 256 + (int)id};
        if (!specs[id].letter) continue;
        shorts[n_short++] = specs[id].letter;
        if (specs[id].argument) shorts[n_short++] = ':';
    }
    opterr = 0;
    optind = 1;
    for (int got; (got = getopt_long(argc, argv, shorts, longs, NULL)) != -1;) {
        const char *word = optind > 1 && optind <= argc ? argv[optind - 1] : "";
        if (got == '?' || got == ':') {
            *status = cli_usage(got == ':' ? "%s needs an argument" : "unknown option %s", word);
            return false;
        }
        enum option_id id = OPT_COUNT;
        for (size_t i = 0; i < c->n_options; i++)
            if (got == 256 + (int)c->options[i] || got == specs[c->options[i]].letter) id = c->options[i];
        if (id == OPT_HELP) {
            print_help(c);
            *status = EXIT_GOOD;
            return false;
        }
        if (!take(o, id, optarg, status)) return false;
    }
    if (optind < argc) o->model = argv[optind++];
    if (c->two_operands && optind < argc) o->operand_2 = argv[optind++];
    if (c->two_operands && !o->operand_2) {
        *status = cli_usage("expected two arguments: %s", c->usage);
        return false;
    }
    if (optind < argc) {
        const char *wanted = c->two_operands ? "two arguments" : c->usage[0] == '[' ? "one MODEL" : "one argument";
        *status = cli_usage("expected %s, found also \"%s\"", wanted, argv[optind]);
        return false;
    }
    return true;
}

bool cli_number(const struct cli_options *o, enum option_id id, double min, double max, double *out) {
    if (!o->given[id]) return true;
    char *end;
    double x = strtod(o->text[id], &end);
    if (end == o->text[id] || *end || !(x >= min && x <= max)) {
        cli_usage("--%s: expected a number from %g to %g, found \"%s\"", specs[id].name, min, max, o->text[id]);
        return false;
    }
    *out = x;
    return true;
}

bool cli_size(const struct cli_options *o, enum option_id id, size_t min, size_t max, size_t *out) {
    if (!o->given[id]) return true;
    char *end;
    errno = 0;
    unsigned long long n = strtoull(o->text[id], &end, 10);
    const char *digits = o->text[id];
    if (*digits < '0' || *digits > '9' || *end || errno || n < min || n > max) {
        cli_usage("--%s: expected a whole number from %zu to %zu, found \"%s\"", specs[id].name, min, max, o->text[id]);
        return false;
    }
    *out = (size_t)n;
    return true;
}

bool cli_sizes(const struct cli_options *o, enum option_id id, size_t min, size_t max, size_t *list, size_t cap,
               size_t *n) {
    if (!o->given[id]) return true;
    *n = 0;
    for (const char *p = o->text[id];; p++) {
        char *end;
        errno = 0;
        unsigned long long value = *p >= '0' && *p <= '9' ? strtoull(p, &end, 10) : (end = (char *)(uintptr_t)p, 0ull);
        if (end == p || errno || value < min || value > max || *n == cap || (*end && *end != ',')) {
            cli_usage("--%s: expected at most %zu whole numbers from %zu to %zu, separated by commas, found \"%s\"",
                      specs[id].name, cap, min, max, o->text[id]);
            return false;
        }
        list[(*n)++] = (size_t)value;
        if (!*end) return true;
        p = end;
    }
}

bool cli_on_off(const struct cli_options *o, enum option_id id, int *out) {
    *out = -1;
    if (!o->given[id]) return true;
    if (strcmp(o->text[id], "on") == 0) *out = 1;
    else if (strcmp(o->text[id], "off") == 0) *out = 0;
    else {
        cli_usage("--%s: expected on or off, found \"%s\"", specs[id].name, o->text[id]);
        return false;
    }
    return true;
}
