// check.c: one examination from start to end: loading, the stages in order, the report. The checks are the stages'.
#include "doctor/doctor.h"

#include "base/clock.h"
#include "base/size.h"
#include "format/hub.h"
#include "ops/kv_page.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// `share` is the stage's part of the time that all may take together.
static const struct {
    const char *name;
    bool (*run)(struct doctor *, struct stage_report *, struct error *);
    double share;
} stages[STAGE_COUNT] = {
    [STAGE_WEIGHTS] = {"weights", stage_weights, 0.05},
    [STAGE_OPS] = {"ops", stage_ops, 0.3},
    [STAGE_MODEL] = {"model", stage_model, 0.4},
    [STAGE_SERVING] = {"serving", stage_serving, 0.25},
};

const char *doctor_stage_name(enum doctor_stage stage) {
    return stages[stage].name;
}

bool doctor_model_is_small(const struct doctor *d) {
    return d->model->weight_bytes < ((size_t)128 << 20);
}

bool doctor_stages_parse(const char *list, uint32_t *mask, struct error *err) {
    *mask = 0;
    for (const char *at = list;; at++) {
        size_t n = strcspn(at, ",");
        int i = 0;
        while (i < STAGE_COUNT && (strlen(stages[i].name) != n || strncmp(stages[i].name, at, n) != 0)) i++;
        if (i == STAGE_COUNT)
            return error_set(err, "expected a list of weights, ops, model and serving, found \"%.*s\"",
                             (int)(n < 64 ? n : 64), at);
        *mask |= 1u << i;
        at += n;
        if (!*at) return true;
    }
}

// ---- Reports -------------------------------------------------------------------------------------------------------

struct fault *stage_fault(struct stage_report *r, enum fault_kind kind, const char *check) {
    r->verdict = VERDICT_FAULT;
    size_t i = r->n_faults < MAX_FAULTS ? r->n_faults : MAX_FAULTS;
    r->n_faults++;
    struct fault *f = &r->faults[i]; // the one behind the last is written and never read
    *f = (struct fault){.stage = r->stage,
                        .kind = kind,
                        .layer = -1,
                        .head = -1,
                        .position = -1,
                        .channel = -1,
                        .prompt = -1,
                        .expected = NAN,
                        .found = NAN};
    snprintf(f->check, sizeof f->check, "%s", check);
    return f;
}

void fault_say(struct fault *f, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(f->message, sizeof f->message, format, args);
    va_end(args);
}

// A note is a convenience: one that finds no memory is lost.
void stage_note(struct stage_report *r, const char *format, ...) {
    char line[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    (void)buffer_printf(&r->notes, "%s\n", line);
}

void stage_figure(struct stage_report *r, const char *name, double value) {
    if (r->n_figures < MAX_FIGURES) r->figures[r->n_figures++] = (struct figure){name, value};
}

void doctor_report_free(struct doctor_report *report) {
    for (int i = 0; i < STAGE_COUNT; i++) {
        buffer_free(&report->stages[i].summary);
        buffer_free(&report->stages[i].notes);
    }
}

void doctor_poison(const struct kv_store *kv, void *memory, size_t bytes) {
    if (kv->device) kv->device->fill(kv->device, memory, 0xFF, bytes);
    else memset(memory, 0xFF, bytes);
}

void doctor_order_pages(int32_t *pages, size_t n, uint32_t seed) {
    for (size_t i = 0; i < n; i++) pages[i] = (int32_t)i;
    if (seed == 0) return;
    for (size_t i = n; i > 1; i--) {
        seed = seed * 1664525u + 1013904223u;
        size_t k = (size_t)(seed >> 8) % i;
        int32_t swap = pages[i - 1];
        pages[i - 1] = pages[k];
        pages[k] = swap;
    }
}

void doctor_progress(const struct doctor *d, double fraction) {
    char what[64];
    snprintf(what, sizeof what, "checking %s", stages[d->stage].name);
    // 1 would end the bar: only the end of a stage does.
    if (d->options.log.progress)
        d->options.log.progress(d->options.log.user, what, fraction < 0.999 ? fraction : 0.999);
}

// ---- Prompts -------------------------------------------------------------------------------------------------------

enum { PROMPT_TOKENS = 1024 };

// A public-domain text with names, numbers, code and other scripts, so that many kinds of token occur.
static const char sample_text[] =
    "The doctor examines the engine.\n\nQ: What is 23 + 48?\nA: 23 + 48 = 71. In 1687 Isaac Newton published the "
    "Principia; he was 44 years old, and had written: \"Hypotheses non fingo.\"\n\n```python\ndef add(a, b):\n    "
    "return a + b  # 0x1F, 3.14e-5\n```\n\nZwei Seelen wohnen, ach! in meiner Brust. "
    "\xe5\xad\xa6\xe8\x80\x8c\xe6\x97\xb6"
    "\xe4\xb9\xa0\xe4\xb9\x8b\xef\xbc\x8c\xe4\xb8\x8d\xe4\xba\xa6\xe8\xaf\xb4\xe4\xb9\x8e\xef\xbc\x9f "
    "\xf0\x9f\xa9\xba\n"
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way.\n";

// SplitMix64: its constants and shifts, from the published algorithm.
static uint64_t next_random(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static bool add_prompt(struct doctor *d, const char *name, const int32_t *ids, size_t n, struct error *err) {
    struct doctor_prompt *p = &d->prompts[d->n_prompts];
    p->ids = size_alloc(n, sizeof *ids);
    if (!p->ids) return error_set(err, "out of memory for a prompt");
    memcpy(p->ids, ids, n * sizeof *ids);
    p->n = n;
    snprintf(p->name, sizeof p->name, "%s", name);
    d->n_prompts++;
    return true;
}

// Random ids; the sample text where there is a tokenizer; and a short motif that repeats, which makes attention sharp.
static bool make_prompts(struct doctor *d, struct error *err) {
    int32_t ids[PROMPT_TOKENS];
    uint64_t state = d->options.seed;
    size_t n_vocab = d->model->config.n_vocab, n = PROMPT_TOKENS;
    if (n > d->model->config.context) n = d->model->config.context;
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(next_random(&state) % n_vocab);
    if (!add_prompt(d, "random", ids, n, err)) return false;
    struct token_ids text = {0};
    if (d->tokens && tokenizer_encode(d->tokens, sample_text, sizeof sample_text - 1, false, &text, NULL) &&
        text.n > 1) {
        bool in_range = true;
        for (size_t i = 0; i < text.n; i++) in_range = in_range && text.ids[i] >= 0 && (size_t)text.ids[i] < n_vocab;
        if (in_range && !add_prompt(d, "text", text.ids, text.n < n ? text.n : n, err)) {
            token_ids_free(&text);
            return false;
        }
    }
    token_ids_free(&text);
    for (size_t i = 7; i < n; i++) ids[i] = ids[i % 7];
    return add_prompt(d, "repeated", ids, n, err);
}

// ---- Opening -------------------------------------------------------------------------------------------------------

static void open_tokenizer(struct doctor *d) {
    if (d->kind == MODEL_GGUF) d->tokens = tokenizer_open_gguf(&d->model->gguf, NULL);
    else if (d->kind == MODEL_FOLDER) d->tokens = tokenizer_open_folder(d->path, NULL);
}

// The weights' copy on the device, where the ops have one, or in the CPU's own order, as the engine has them.
static bool place_model(struct doctor *d, struct error *err) {
    struct device *device = d->ops->device;
    if (!device && d->ops->takes_octets)
        model_pack(d->model, &(struct pack_options){
                                 .pool = d->pool, .log = &d->options.log, .bf16_in_memory = d->kind != MODEL_FOLDER});
    if (!device) return true;
    if (!model_runs_on(d->model, device, err)) return false;
    d->weights = weights_upload(d->model, device, d->pool, &d->options.log, err);
    return d->weights != NULL;
}

static bool open_parts(struct doctor *d, struct error *err) {
    const struct doctor_options *o = &d->options;
    struct buffer path = {0};
    struct error why = {0};
    bool ok = o->model || error_set(err, "no model was named");
    ok = ok && kv_type_parse(o->kv_type, &d->kv_type, err);
    if (ok) d->ops = o->device ? ops_open(o->device, o->isa, NULL, err) : ops_cpu(o->isa, err);
    ok = d->ops && fusion_parse(o->fusion ? o->fusion : "on", &d->fusion, err) &&
         (d->pool = pool_create(o->threads, err)) != NULL && hub_resolve(o->model, &d->kind, &path, err);
    if (ok) d->path = strdup(buffer_text(&path));
    buffer_free(&path);
    if (!ok) return false;
    if (!d->path) return error_set(err, "out of memory");
    // Values are the weights stage's to judge.
    struct model_load_options load = {.pool = d->pool, .log = &d->options.log};
    d->model = model_load(d->kind, d->path, &load, &why);
    snprintf(d->load_error, sizeof d->load_error, "%s", why.text);
    if (!d->model) return true;
    if (!kv_type_fits(d->kv_type, d->model->config.head_dim, d->ops->device, err)) return false;
    if (!place_model(d, err)) return false;
    if (d->options.budget <= 0) d->options.budget = doctor_model_is_small(d) ? 25 : 240;
    if (d->options.thorough) d->options.budget = INFINITY;
    open_tokenizer(d);
    return make_prompts(d, err);
}

struct doctor *doctor_open(const struct doctor_options *options, struct error *err) {
    struct doctor *d = size_alloc_zero(1, sizeof *d);
    if (!d) {
        error_set(err, "out of memory");
        return NULL;
    }
    d->options = *options;
    if (!d->options.stages) d->options.stages = (1u << STAGE_COUNT) - 1;
    if (!open_parts(d, err)) {
        doctor_close(d);
        return NULL;
    }
    return d;
}

void doctor_close(struct doctor *d) {
    if (!d) return;
    for (size_t i = 0; i < d->n_prompts; i++) free(d->prompts[i].ids);
    tokenizer_free(d->tokens);
    weights_free(d->weights);
    ops_close(d->ops);
    model_free(d->model);
    pool_free(d->pool);
    free(d->path);
    free(d);
}

// ---- Running -------------------------------------------------------------------------------------------------------

// What cannot be loaded is the weights stage's fault, whatever stages were asked for.
static void report_load_error(const struct doctor *d, struct stage_report *r) {
    r->n_checks = 1;
    struct fault *f = stage_fault(r, FAULT_LOAD, "the model loads");
    snprintf(f->op, sizeof f->op, "model_load");
    fault_say(f, "%s", d->load_error);
    // A loader's message about one tensor begins with its name.
    if (sscanf(d->load_error, "tensor %95[^: ]", f->tensor) == 1) {
        const char *dot = strchr(f->tensor, '.'); // "model.layers.7.", "blk.7."
        if (dot) sscanf(strncmp(dot, ".layers.", 8) == 0 ? dot + 8 : dot + 1, "%d", &f->layer);
    }
}

// The engine refuses such weights, and every number after them would be a fault.
static bool weights_are_finite(const struct doctor *d) {
    const struct stage_report *r = &d->report->stages[STAGE_WEIGHTS];
    for (size_t i = 0; i < r->n_faults && i < MAX_FAULTS; i++)
        if (strcmp(r->faults[i].check, FINITE_CHECK) == 0) return false;
    return true;
}

static bool run_stage(struct doctor *d, enum doctor_stage stage, struct error *err) {
    struct stage_report *r = &d->report->stages[stage];
    bool wanted = (d->options.stages >> stage & 1) && stages[stage].run;
    if (d->model && !wanted) return true;
    if (!d->model && stage != STAGE_WEIGHTS) return true;
    if (d->model && stage != STAGE_WEIGHTS && !weights_are_finite(d)) return true;
    double started = clock_seconds();
    d->stage = stage;
    d->deadline = started + d->options.budget * stages[stage].share;
    r->verdict = VERDICT_OK;
    bool ok = true;
    if (d->model) ok = stages[stage].run(d, r, err);
    else report_load_error(d, r);
    r->seconds = clock_seconds() - started;
    if (d->options.log.progress) d->options.log.progress(d->options.log.user, "checking", 1);
    if (!ok) return error_prefix(err, "stage %s: ", r->name);
    if (d->options.stage_done) d->options.stage_done(d->options.user, r);
    return true;
}

bool doctor_run(struct doctor *d, struct doctor_report *report, struct error *err) {
    d->report = report;
    for (int i = 0; i < STAGE_COUNT; i++) {
        report->stages[i].stage = (enum doctor_stage)i;
        report->stages[i].name = stages[i].name;
    }
    report->verdict = VERDICT_OK;
    for (int i = 0; i < STAGE_COUNT; i++)
        if (!run_stage(d, (enum doctor_stage)i, err)) return false;
    for (int i = STAGE_COUNT - 1; i >= 0; i--) {
        if (report->stages[i].verdict != VERDICT_FAULT) continue;
        report->verdict = VERDICT_FAULT;
        report->first = report->stages[i].faults[0];
    }
    if (report->verdict != VERDICT_FAULT || d->options.no_diagnosis || !d->model) return true;
    double started = clock_seconds();
    bool ok = diagnose(d, report, err);
    report->diagnose_seconds = clock_seconds() - started;
    return ok || error_prefix(err, "diagnosis: ");
}
