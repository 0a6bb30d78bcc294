// Every seeded mistake (tests/doctor/seeded) must be found by the doctor, nearly all in the right op and layer, most by
// name; and models that nothing is wrong with must be left in peace.
//
//   test_seeded                the test
//   test_seeded --markdown     prints the table of docs/DOCTOR.md instead
//   test_seeded --part I/N     every N-th seed, from the I-th on, on one thread, beside the other parts
//   test_seeded --only TEXT    only the seeds whose name contains TEXT, with what the doctor says
//   test_seeded --direct       the diagnosis alone, without the stages before it (with --only or not)
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/clock.h"
#include "doctor/doctor.h"
#include "seeded/seeded.h"

// What became of one seed.
struct outcome {
    bool fault, localised, named;
    const char *stage; // that found it first
    char op[48], name[64];
    int layer;
    double confidence, seconds;
};

static struct settings {
    bool markdown, direct;
    const char *only, *kv_type;
    size_t part, n_parts; // n_parts 0: all
} settings;

static void print_report(const struct doctor_report *r) {
    printf("  %s\n", r->first.message);
    for (size_t i = 0; i < r->n_diagnoses; i++)
        printf("  %3.0f%%  %s: %s\n", 100 * r->diagnoses[i].confidence, r->diagnoses[i].name, r->diagnoses[i].text);
}

// Examines a model with `seed` sown (NULL: none). report is the caller's to free.
static bool examine(const struct seed *seed, const char *model, struct doctor_report *report, struct error *err) {
    // What no single op shows needs the stages of whole runs and of the engine.
    double budget = seed && seed->site >= SITE_STEP ? 4 : 0.5;
    struct doctor_options options = {
        .model = model, .threads = 2, .seed = 11, .budget = budget, .kv_type = settings.kv_type};
    if (settings.n_parts) options.threads = 1; // the other parts have the other processors
    if (seed && seed->site == SITE_ENGINE) {   // no op and no step is broken: time for the engine alone
        options.stages = 1u << STAGE_SERVING;
        options.budget = 60;
        options.threads = 2;
    }
    sown = seed;
    struct doctor *d = doctor_open(&options, err);
    bool ok = d != NULL;
    if (ok && settings.direct) {
        d->report = report;
        report->verdict = VERDICT_FAULT;
        double started = clock_seconds();
        ok = d->model && diagnose(d, report, err);
        report->diagnose_seconds = clock_seconds() - started;
        if (!report->first.message[0]) report->verdict = VERDICT_OK;
    } else if (ok) {
        ok = doctor_run(d, report, err);
    }
    doctor_close(d);
    sown = NULL;
    return ok;
}

static void judge_outcome(const struct seed *s, const struct doctor_report *r, struct outcome *o) {
    o->fault = r->verdict == VERDICT_FAULT;
    o->stage = "-";
    for (int i = STAGE_COUNT - 1; i >= 0; i--)
        if (r->stages[i].verdict == VERDICT_FAULT) o->stage = r->stages[i].name;
    snprintf(o->op, sizeof o->op, "%s", r->first.op);
    o->layer = r->first.layer;
    o->localised = o->fault && strcmp(r->first.op, s->op) == 0 && r->first.layer == s->first_layer &&
                   (s->head < 0 || r->first.head < 0 || r->first.head == s->head || s->site >= SITE_ATTN_SCORES);
    if (r->n_diagnoses > 0) {
        snprintf(o->name, sizeof o->name, "%s", r->diagnoses[0].name);
        o->confidence = r->diagnoses[0].confidence;
    }
    o->named = o->fault && strcmp(o->name, s->cause) == 0;
}

static bool run_seed(const struct seed *s, struct outcome *o) {
    struct doctor_report *r = calloc(1, sizeof *r);
    struct error err = {0};
    *o = (struct outcome){.stage = "-"};
    if (!r) return false;
    double started = clock_seconds();
    bool ok = examine(s, s->model, r, &err);
    o->seconds = clock_seconds() - started;
    if (ok) judge_outcome(s, r, o);
    else printf("%s: %s\n", s->name, err.text);
    if (ok && settings.only) print_report(r);
    doctor_report_free(r);
    free(r);
    return ok;
}

static void layer_text(int layer, char *text, size_t size) {
    if (layer < 0) snprintf(text, size, "-");
    else snprintf(text, size, "%d", layer);
}

static void print_row(const struct seed *s, const struct outcome *o) {
    char layer[16], found[16];
    layer_text(s->first_layer, layer, sizeof layer);
    layer_text(o->layer, found, sizeof found);
    if (settings.markdown) {
        printf("| %s | %s, %s | %s | %s, %s%s | %s%s, %.0f%% | %.1f |\n", s->name, s->op, layer, o->stage, o->op, found,
               o->localised ? "" : " (wrong)", *o->name ? o->name : "-", o->named ? "" : " (wrong)",
               100 * o->confidence, o->seconds);
        fflush(stdout);
        return;
    }
    printf("%-46s %-10s %s%-20s %2s  %s%-36s %3.0f%% %5.1f s\n", s->name, o->fault ? o->stage : "MISSED",
           o->localised ? " " : "!", o->op, found, o->named ? " " : "!", *o->name ? o->name : "-", 100 * o->confidence,
           o->seconds);
    fflush(stdout);
}

static void every_seed_is_found(void **state) {
    (void)state;
    size_t n = 0, found = 0, localised = 0, named = 0;
    double started = clock_seconds();
    if (settings.markdown)
        printf("| bug | truth: op, layer | found by | named op, layer | cause, confidence | s "
               "|\n|---|---|---|---|---|---|\n");
    for (size_t i = 0; i < n_seeds; i++) {
        struct outcome o;
        if (settings.n_parts && i % settings.n_parts + 1 != settings.part) continue;
        if (settings.only && !strstr(seeds[i].name, settings.only)) continue;
        assert_true(run_seed(&seeds[i], &o));
        print_row(&seeds[i], &o);
        n++;
        found += o.fault;
        localised += o.localised;
        named += o.named;
    }
    printf("\n%zu bugs: %zu found, %zu localised to op and layer (%.1f%%), %zu named (%.1f%%), in %.0f s\n", n, found,
           localised, 100.0 * (double)localised / (double)n, named, 100.0 * (double)named / (double)n,
           clock_seconds() - started);
    if (settings.only) return;
    assert_true(n >= (settings.n_parts ? 100 / settings.n_parts : 100));
    assert_int_equal(found, n);
    assert_true((double)localised >= 0.95 * (double)n);
    assert_true((double)named >= 0.80 * (double)n);
}

// With K and V in 8 bits: whatever reads or writes them, and the engine's pages.
static void kv_seeds_are_found_in_q8_0(void **state) {
    (void)state;
    size_t n = 0, found = 0, localised = 0, named = 0;
    if (settings.markdown || settings.only || settings.part != settings.n_parts) return; // once: with the last part
    settings.kv_type = "q8_0";
    for (size_t i = 0; i < n_seeds; i++) {
        struct outcome o;
        enum seed_site site = seeds[i].site;
        bool of_kv = site == SITE_KV_STORE || site == SITE_ATTN_VALUES || site == SITE_ENGINE ||
                     (seeds[i].mistake >= STORE_LATE && seeds[i].mistake <= STORE_SWAPPED);
        if (!of_kv && !(site == SITE_ATTENTION && seeds[i].layer == 2)) continue;
        assert_true(run_seed(&seeds[i], &o));
        print_row(&seeds[i], &o);
        n++;
        found += o.fault;
        localised += o.localised;
        named += o.named;
    }
    settings.kv_type = NULL;
    assert_true(n >= 12);
    assert_int_equal(found, n);
    assert_int_equal(localised, n);
    assert_true(named + 1 >= n);
}

// A diagnosis that is asked although nothing is wrong names nothing. (tests/e2e/test_check.py has the stages.)
static void healthy_models_are_left_in_peace(void **state) {
    (void)state;
    static const char *const models[] = {"synthetic:tiny-qwen3",      "synthetic:tiny-qwen2",
                                         "synthetic:tiny-llama:f32",  "synthetic:tiny-qwen3:q8_0",
                                         "synthetic:tiny-qwen2:q4_1", "synthetic:tiny-llama:q6_k",
                                         "synthetic:tiny-qwen3:q4_k", "models/tandem-tiny"};
    bool was_direct = settings.direct;
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        settings.kv_type = i % 3 == 0 ? "q8_0" : NULL;
        struct doctor_report *r = calloc(1, sizeof *r);
        struct error err = {0};
        assert_non_null(r);
        settings.direct = true;
        assert_true(examine(NULL, models[i], r, &err));
        if (r->first.message[0]) {
            printf("%s:\n", models[i]);
            print_report(r);
        }
        assert_int_equal(r->first.message[0], 0);
        assert_int_equal(r->n_diagnoses, 0);
        doctor_report_free(r);
        free(r);
    }
    settings.direct = was_direct;
    settings.kv_type = NULL;
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--markdown") == 0) settings.markdown = true;
        else if (strcmp(argv[i], "--direct") == 0) settings.direct = true;
        else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc) settings.only = argv[++i];
        else if (strcmp(argv[i], "--part") == 0 && i + 1 < argc &&
                 sscanf(argv[++i], "%zu/%zu", &settings.part, &settings.n_parts) == 2)
            continue;
        else return fprintf(stderr, "usage: test_seeded [--markdown] [--direct] [--part I/N] [--only TEXT]\n"), 2;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(healthy_models_are_left_in_peace),
        cmocka_unit_test(kv_seeds_are_found_in_q8_0),
        cmocka_unit_test(every_seed_is_found),
    };
    bool seeds_alone = settings.markdown || settings.only || settings.part > 1;
    return seeds_alone
               ? cmocka_run_group_tests_name("seeded", ((const struct CMUnitTest[]){tests[1], tests[2]}), NULL, NULL)
               : cmocka_run_group_tests_name("seeded", tests, NULL, NULL);
}
