// check.c: `tandem check`: the doctor's examination, as a table that a person reads at a glance, or as JSON.
#include "cli/cli.h"

#include "doctor/doctor.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const verdicts[] = {[VERDICT_SKIPPED] = "skipped", [VERDICT_OK] = "ok", [VERDICT_FAULT] = "FAULT"};

// ---- For people ----------------------------------------------------------------------------------------------------

static const char *color(const char *code) {
    return cli_can_color(STDOUT_FILENO) ? code : "";
}

static void print_lines(const char *label, const char *text) {
    for (const char *at = text; *at;) {
        size_t n = strcspn(at, "\n");
        printf("           %s%.*s\n", label, (int)n, at);
        at += n + (at[n] == '\n');
    }
}

static const char *verdict_color(enum verdict v) {
    return color(v == VERDICT_FAULT ? "\033[1;31m" : v == VERDICT_OK ? "\033[32m" : "");
}

static void print_stage(void *user, const struct stage_report *s) {
    (void)user;
    enum { SHOWN = 8 };
    printf("  %-8s %s%-5s%s %7zu checks %7.1f s   %s\n", s->name, verdict_color(s->verdict), verdicts[s->verdict],
           color("\033[0m"), s->n_checks, s->seconds, s->summary.data ? s->summary.data : "");
    for (size_t i = 0; i < s->n_faults && i < SHOWN; i++) print_lines("fault: ", s->faults[i].message);
    if (s->n_faults > SHOWN) printf("           %zu more faults\n", s->n_faults - SHOWN);
    if (s->notes.data) print_lines("", s->notes.data);
    fflush(stdout);
}

static void print_place(const struct fault *f) {
    printf("first fault  %s", f->op[0] ? f->op : f->check);
    if (f->layer >= 0) printf(", layer %d", f->layer);
    if (f->head >= 0) printf(", head %d", f->head);
    if (f->position >= 0) printf(", position %d", f->position);
    if (f->channel >= 0) printf(", channel %d", f->channel);
    if (f->tensor[0]) printf(" (%s)", f->tensor);
    if (!isnan(f->expected) || !isnan(f->found)) printf(": expected %.9g, found %.9g", f->expected, f->found);
    if (f->variant[0]) printf(" [%s]", f->variant);
    printf("\n             %s\n", f->message);
}

static void print_report(const struct doctor_report *report, double seconds) {
    putchar('\n');
    if (report->verdict == VERDICT_FAULT) print_place(&report->first);
    for (size_t i = 0; i < report->n_diagnoses; i++)
        printf("%-11s  %s (%.0f%% sure): %s\n", i ? "or" : "diagnosis", report->diagnoses[i].name,
               100 * report->diagnoses[i].confidence, report->diagnoses[i].text);
    printf("verdict      %s%s%s  (%.1f s)\n", verdict_color(report->verdict), verdicts[report->verdict],
           color("\033[0m"), seconds);
}

static void print_head(const struct doctor *d) {
    char fusion[256];
    printf("%s: ", d->options.model);
    if (d->model)
        printf("%s, %zu layers, hidden %zu, %s; ", arch_name(d->model->config.arch), d->model->config.n_layers,
               d->model->config.hidden, dtype_info(d->model->layers[0].w_down.type)->name);
    printf("%s, %d thread%s, fusion %s\n\n", d->ops->name, pool_size(d->pool), pool_size(d->pool) == 1 ? "" : "s",
           fusion_text(d->fusion, fusion, sizeof fusion));
    fflush(stdout);
}

// ---- JSON ----------------------------------------------------------------------------------------------------------

static json_t *number(double x) {
    return isfinite(x) ? json_real(x) : json_null();
}

static json_t *index_json(int i) {
    return i >= 0 ? json_integer(i) : json_null();
}

static json_t *text_json(const char *text) {
    return text[0] ? json_string(text) : json_null();
}

static json_t *fault_json(const struct fault *f) {
    return json_pack("{s:s,s:s,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:s}", "stage", doctor_stage_name(f->stage), "check",
                     f->check, "op", text_json(f->op), "tensor", text_json(f->tensor), "variant", text_json(f->variant),
                     "layer", index_json(f->layer), "head", index_json(f->head), "position", index_json(f->position),
                     "channel", index_json(f->channel), "expected", number(f->expected), "found", number(f->found),
                     "message", f->message);
}

static json_t *stage_json(const struct stage_report *s) {
    static const char *const names[] = {[VERDICT_SKIPPED] = "skipped", [VERDICT_OK] = "ok", [VERDICT_FAULT] = "fault"};
    json_t *faults = json_array(), *notes = json_array(), *figures = json_object();
    for (size_t i = 0; i < s->n_figures; i++)
        json_object_set_new(figures, s->figures[i].name, number(s->figures[i].value));
    for (size_t i = 0; i < s->n_faults && i < MAX_FAULTS; i++) json_array_append_new(faults, fault_json(&s->faults[i]));
    for (const char *at = s->notes.data ? s->notes.data : ""; *at;) {
        size_t n = strcspn(at, "\n");
        json_array_append_new(notes, json_stringn(at, n));
        at += n + (at[n] == '\n');
    }
    return json_pack("{s:s,s:s,s:I,s:f,s:s,s:o,s:I,s:o,s:o}", "name", s->name, "verdict", names[s->verdict], "checks",
                     (json_int_t)s->n_checks, "seconds", s->seconds, "summary", s->summary.data ? s->summary.data : "",
                     "figures", figures, "n_faults", (json_int_t)s->n_faults, "faults", faults, "notes", notes);
}

static json_t *report_json(const struct doctor *d, const struct doctor_report *report) {
    bool fault = report->verdict == VERDICT_FAULT;
    json_t *stages = json_array(), *diagnosis = json_array();
    char fusion[256];
    for (int i = 0; i < STAGE_COUNT; i++) json_array_append_new(stages, stage_json(&report->stages[i]));
    for (size_t i = 0; i < report->n_diagnoses; i++)
        json_array_append_new(diagnosis, json_pack("{s:s,s:f,s:s}", "name", report->diagnoses[i].name, "confidence",
                                                   report->diagnoses[i].confidence, "text", report->diagnoses[i].text));
    return json_pack("{s:s,s:o,s:o,s:o,s:s,s:s,s:i,s:s}", "verdict", fault ? "fault" : "ok", "stages", stages, "first",
                     fault ? fault_json(&report->first) : json_null(), "diagnosis", diagnosis, "model",
                     d->options.model, "ops", d->ops->name, "threads", pool_size(d->pool), "fusion",
                     fusion_text(d->fusion, fusion, sizeof fusion));
}

// ---- The command ---------------------------------------------------------------------------------------------------

static int examine(const struct doctor_options *options, bool json) {
    struct error err = {0};
    struct doctor *d = doctor_open(options, &err);
    struct doctor_report *report = calloc(1, sizeof *report);
    int status = EXIT_FAULT;
    if (!d || !report) {
        cli_fail("%s", d ? "out of memory" : err.text);
    } else {
        if (!json) print_head(d);
        if (!doctor_run(d, report, &err)) {
            cli_fail("%s", err.text);
        } else {
            double seconds = report->diagnose_seconds;
            for (int i = 0; i < STAGE_COUNT; i++) seconds += report->stages[i].seconds;
            if (!json) print_report(report, seconds);
            bool told = !json || cli_print_json(report_json(d, report));
            if (told && report->verdict == VERDICT_OK) status = EXIT_GOOD;
        }
        doctor_report_free(report);
    }
    free(report);
    doctor_close(d);
    return status;
}

// --synthetic SHAPE [--type TYPE] in place of MODEL, as in bench. NULL: `status` is what to exit with.
static const char *choose_model(const struct cli_options *o, char *text, size_t size, int *status) {
    *status = EXIT_USAGE;
    if (!o->given[OPT_SYNTHETIC]) {
        if (o->given[OPT_TYPE]) return cli_usage("--type goes with --synthetic"), NULL;
        *status = EXIT_FAULT;
        return cli_model(o);
    }
    if (o->model) return cli_usage("expected MODEL or --synthetic, found both"), NULL;
    snprintf(text, size, "synthetic:%.64s:%.32s", o->text[OPT_SYNTHETIC],
             o->given[OPT_TYPE] ? o->text[OPT_TYPE] : "bf16");
    return text;
}

static int run(const struct cli_options *o) {
    size_t threads = 0, seed = 1;
    uint32_t stages = 0;
    int status = EXIT_FAULT;
    struct error err = {0};
    if (!cli_size(o, OPT_THREADS, 1, 1024, &threads) || !cli_size(o, OPT_SEED, 0, SIZE_MAX, &seed)) return EXIT_USAGE;
    if (o->given[OPT_STAGE] && !doctor_stages_parse(o->text[OPT_STAGE], &stages, &err))
        return cli_usage("--stage: %s", err.text);
    bool on_gpu = o->given[OPT_DEVICE] && strncmp(o->text[OPT_DEVICE], "cuda", 4) == 0;
    char synthetic[128];
    const char *model = choose_model(o, synthetic, sizeof synthetic, &status);
    if (!model) return status;
    bool json = o->given[OPT_JSON];
    struct cli_bar bar = {0};
    struct doctor_options options = {.model = model,
                                     .stages = stages,
                                     .thorough = o->given[OPT_THOROUGH],
                                     .isa = o->text[OPT_ISA],
                                     .device = on_gpu ? o->text[OPT_DEVICE] : NULL,
                                     .fusion = o->text[OPT_FUSION],
                                     .kv_type = o->text[OPT_KV_TYPE],
                                     .threads = (int)threads,
                                     .seed = seed,
                                     .stage_done = json ? NULL : print_stage,
                                     .log = cli_log(&bar)};
    return examine(&options, json);
}

static const enum option_id options[] = {OPT_SYNTHETIC, OPT_TYPE,    OPT_STAGE, OPT_THOROUGH, OPT_JSON,   OPT_FUSION,
                                         OPT_KV_TYPE,   OPT_THREADS, OPT_ISA,   OPT_SEED,     OPT_DEVICE, OPT_HELP};

const struct command command_check = {
    .name = "check",
    .summary = "the doctor: prove that the fast path computes the model, or name what is wrong",
    .usage = "[MODEL | --synthetic SHAPE [--type TYPE]] [--stage LIST] [--thorough] [--json]",
    .details = "Stages: weights (what the file holds is what the model reads), ops (every op against its primitives, "
               "bit for bit,\n"
               "and against f64 arithmetic), model (whole runs against f64), serving (batch, chunks, pages, reuse and "
               "threads change\n"
               "no bit). Status 1 when any finds a fault. docs/DOCTOR.md tells what each one proves and how to read "
               "it.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
