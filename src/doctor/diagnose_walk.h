// diagnose_walk.h: a walk through real steps in the order of computation. A table of spying ops stands in the place of
// the ops under test: every call is run, its inputs are compared with what the ops before it left, its weights with the
// file's, its batch with the one that was planned, and its numbers with the formula for the inputs that it saw. The
// first thing that does not follow is the fault. It owns no workload: diagnose.c makes the steps.
#ifndef TANDEM_DOCTOR_DIAGNOSE_WALK_H
#define TANDEM_DOCTOR_DIAGNOSE_WALK_H

#include "doctor/doctor.h"
#include "doctor/hypotheses.h"
#include "model/names.h"
#include "model/oracle_parts.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// What the walk found first.
struct finding {
    bool found;
    struct fault fault;
    struct diagnosis diagnoses[MAX_DIAGNOSES];
    size_t n_diagnoses;
};

// A sequence as it should be: the walk compares positions, tokens and KV with it.
struct walk_sequence {
    const int32_t *ids; // what the sequence holds, prompt and generated
    size_t n;
};

struct walk;

struct walk_options {
    const struct ops *ops; // under test
    uint32_t fusion;
    const struct model *model;
    const struct oracle_weights *weights; // the independent reading
    struct pool *pool;
    size_t max_tokens; // of a step
    size_t max_rows;   // judged of each call
    bool on_device;    // `ops` is a bridge to a device's, which round as docs/NUMERICS.md says of a GPU
};
struct walk *walk_create(const struct walk_options *options, struct finding *finding, struct error *err);
void walk_free(struct walk *w); // NULL is fine

// The table to run with, and the tap: for run_create and run_set_tap.
const struct ops *walk_ops(struct walk *w);

// The next steps' batches are exactly `batch` (NULL: any that continues one of `sequences`).
void walk_expect(struct walk *w, const struct batch *batch, const struct walk_sequence *sequences, size_t n_sequences);

// A step is over: was everything done, and are these (or, NULL, whatever) its logits?
void walk_finish(struct walk *w, const float *logits);
// Memory ran out during a step.
bool walk_ok(const struct walk *w, struct error *err);
// The logits that the last step's head gave: [n_logit_rows, n_vocab]; NULL before any.
const float *walk_logits(const struct walk *w, size_t *n_rows);

// ---- diagnose_batch.c ----------------------------------------------------------------------------------------------

// Compares a batch with the planned one (or with the sequences that it must continue). False: finding is filled.
struct batch_view {
    const struct batch *planned;  // NULL: none
    const struct batch *previous; // of the step before; NULL: none
    const struct walk_sequence *sequences;
    size_t n_sequences;
    int layer;
    size_t n_pages;
};
bool batch_check(const struct batch_view *v, const struct batch *b, const struct walk_sequence **of_seq,
                 struct finding *f);
// A deep copy; NULL: no memory. Free with free().
struct batch *batch_copy(const struct batch *b);

// ---- diagnose_weights.c --------------------------------------------------------------------------------------------

// Compares a bound weight with the file. False: finding is filled.
bool weights_check_matrix(const struct walk_options *o, enum weight_part part, int layer, const struct matrix *m,
                          struct finding *f);
bool weights_check_vector(const struct walk_options *o, enum weight_part part, int layer, const float *v, size_t n,
                          struct finding *f);
// Every weight of the model.
bool weights_check_model(const struct walk_options *o, struct finding *f);

// The expected matrix or vector of a part; NULL when the config has none.
const struct oracle_matrix *weights_matrix(const struct oracle_weights *w, enum weight_part part, int layer);
const float *weights_vector(const struct oracle_weights *w, enum weight_part part, int layer);

// ---- Filling a finding ---------------------------------------------------------------------------------------------

void finding_place(struct finding *f, const char *op, int layer, const char *check);
void finding_name(struct finding *f, double confidence, const char *name, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

#endif
