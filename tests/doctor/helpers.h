// helpers.h: what the doctor's tests share: opening a doctor on a small model and running some of its stages.
#ifndef TANDEM_TESTS_DOCTOR_HELPERS_H
#define TANDEM_TESTS_DOCTOR_HELPERS_H

#include "doctor/doctor.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct clinic {
    struct doctor *doctor;
    struct doctor_report *report;
};

// Two threads and little time: the first of every sweep.
static inline struct clinic open_clinic(const char *model, uint32_t stages) {
    struct error err = {0};
    struct doctor_options options = {
        .model = model, .stages = stages, .threads = 2, .seed = 1, .budget = 1, .no_diagnosis = true};
    struct clinic c = {.doctor = doctor_open(&options, &err)};
    if (!c.doctor) fail_msg("%s", err.text);
    c.report = calloc(1, sizeof *c.report);
    assert_non_null(c.report);
    return c;
}

static inline void examine(struct clinic *c) {
    struct error err = {0};
    if (!doctor_run(c->doctor, c->report, &err)) fail_msg("%s", err.text);
}

static inline void close_clinic(struct clinic *c) {
    doctor_report_free(c->report);
    free(c->report);
    doctor_close(c->doctor);
}

// The verdict must be good; else the first fault is told.
static inline void expect_healthy(const struct clinic *c) {
    if (c->report->verdict != VERDICT_OK) fail_msg("false alarm: %s", c->report->first.message);
}

// Some fault of the report names this op (NULL: any) and layer (-2: any).
static inline void expect_fault(const struct clinic *c, const char *op, int layer) {
    assert_int_equal(c->report->verdict, VERDICT_FAULT);
    const struct fault *f = &c->report->first;
    if (op && strcmp(f->op, op) != 0) fail_msg("expected a fault in %s, found %s: %s", op, f->op, f->message);
    if (layer != -2 && f->layer != layer) fail_msg("expected layer %d, found %d: %s", layer, f->layer, f->message);
    assert_true(f->message[0]);
}

#endif
