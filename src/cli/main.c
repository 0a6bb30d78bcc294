// main.c: the table of subcommands, and the only place that reads the environment.
#include "cli/cli.h"

#include "base/file.h"

#include <langinfo.h>
#include <limits.h>
#include <locale.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef TANDEM_PREFIX
#define TANDEM_PREFIX "/usr/local"
#endif

static const struct command *const commands[] = {
    &command_chat,    &command_serve,    &command_run,        &command_tokenize, &command_template,
    &command_inspect, &command_trace,    &command_diff,       &command_check,    &command_bench,
    &command_replay,  &command_quantize, &command_perplexity, &command_pull};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static void print_usage(FILE *to) {
    fprintf(to,
            "tandem %s: runs Qwen3 models, and proves its numbers\n\nusage: tandem SUBCOMMAND [MODEL] [options]\n\n",
            tandem_version());
    for (int i = 0; i < N_COMMANDS; i++) fprintf(to, "  %-11s %s\n", commands[i]->name, commands[i]->summary);
    fprintf(
        to,
        "\nMODEL is a folder in Hugging Face's layout, a .gguf file, or OWNER/NAME in the Hugging Face cache; without\n"
        "one, the embedded tandem-tiny. `tandem SUBCOMMAND --help` tells more. --version prints the version.\n");
}

// Where the default model may stand, as seen from the program's own folder.
const char *cli_default_model(void) {
    static const char *const places[] = {"/../models/tandem-tiny", "/../../models/tandem-tiny",
                                         "/../share/tandem/models/tandem-tiny"};
    static char found[PATH_MAX];
    char self[PATH_MAX], path[PATH_MAX + 64];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n > 0) {
        self[n] = '\0';
        *strrchr(self, '/') = '\0';
        for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
            snprintf(path, sizeof path, "%s%s", self, places[i]);
            if (file_is_folder(path) && realpath(path, found)) return found;
        }
    }
    const char *installed = TANDEM_PREFIX "/share/tandem/models/tandem-tiny";
    return file_is_folder(installed) && realpath(installed, found) ? found : NULL;
}

const char *cli_history_path(void) {
    static char path[4096];
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    if (state && *state == '/') snprintf(path, sizeof path, "%s/tandem", state);
    else if (home && *home == '/') snprintf(path, sizeof path, "%s/.local/state/tandem", home);
    else return NULL;
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(path, 0700);
        *slash = '/';
    }
    mkdir(path, 0700);
    size_t n = strlen(path);
    snprintf(path + n, sizeof path - n, "/history");
    return path;
}

bool cli_can_redraw(void) {
    const char *terminal = getenv("TERM");
    return isatty(STDERR_FILENO) && terminal && strcmp(terminal, "dumb") != 0;
}

bool cli_can_color(int fd) {
    const char *terminal = getenv("TERM"), *plain = getenv("NO_COLOR");
    return isatty(fd) && terminal && strcmp(terminal, "dumb") != 0 && !(plain && *plain);
}

void cli_die(int signal_number) {
    file_remove_temporaries();
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static bool ignores_interrupt; // as nohup and a script's & have it

void cli_on_interrupt(void (*handler)(int)) {
    if (!ignores_interrupt) signal(SIGINT, handler ? handler : cli_die);
}

static atomic_bool interrupted; // a signal handler can reach nothing else

static void interrupt(int signal_number) {
    (void)signal_number;
    atomic_store(&interrupted, true);
    cli_on_interrupt(NULL); // the second one ends the program
}

atomic_bool *cli_stop_on_interrupt(void) {
    cli_on_interrupt(interrupt);
    return &interrupted;
}

static void install_handlers(void) {
    static const int ends[] = {SIGINT, SIGTERM, SIGHUP};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (signal(ends[i], cli_die) == SIG_IGN) {
            signal(ends[i], SIG_IGN);
            if (ends[i] == SIGINT) ignores_interrupt = true;
        }
    signal(SIGPIPE, SIG_IGN); // writing says so, and what was begun is put in order
    signal(SIGXFSZ, SIG_IGN);
    file_guard_install();
}

int main(int argc, char **argv) {
    // Without a locale of its own, as in a container, line editing would drop every letter beyond ASCII.
    if (!setlocale(LC_CTYPE, "") || strcmp(nl_langinfo(CODESET), "ANSI_X3.4-1968") == 0) setlocale(LC_CTYPE, "C.UTF-8");
    install_handlers();
    if (argc < 2) {
        print_usage(stderr);
        return EXIT_USAGE;
    }
    if (argc == 3 && strcmp(argv[1], "help") == 0) { // help SUBCOMMAND
        static char option[] = "--help";
        argv[1] = argv[2];
        argv[2] = option;
    }
    const char *name = argv[1];
    if (strcmp(name, "--version") == 0) {
        printf("tandem %s\n", tandem_version());
        return cli_flush() ? EXIT_GOOD : EXIT_FAULT;
    }
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        print_usage(stdout);
        return cli_flush() ? EXIT_GOOD : EXIT_FAULT;
    }
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(name, commands[i]->name) != 0) continue;
        cli_set_command(name);
        static struct cli_options options;
        int status;
        if (!cli_parse(commands[i], argc - 1, argv + 1, &options, &status)) return cli_flush() ? status : EXIT_FAULT;
        status = commands[i]->run(&options);
        if (status == EXIT_FAULT && cli_usage_was_wrong()) status = EXIT_USAGE;
        bool flushed = cli_flush();
        if (status == EXIT_INTERRUPTED) cli_die(SIGINT);
        if (!flushed) return EXIT_FAULT;
        if (file_guard_tripped() && status == EXIT_GOOD)
            return cli_fail("a model file was truncated while it was in use: the result is not to be trusted");
        return status;
    }
    return cli_usage("unknown subcommand \"%s\"", name);
}
