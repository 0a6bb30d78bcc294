// doctor.h: `tandem check`: proves on the user's machine that the path which serves requests computes the model.
//
// A doctor examines one model in stages. A stage makes checks, counts them, and records faults: what was checked, where
// (op, layer, head, position, channel as far as it knows), what was expected and what was found. When all stages are
// done and any found a fault, diagnose() looks for its place and its cause.
//
// The ops, the model loader and the engine under test are reached through their ordinary entry points (ops_cpu,
// model_load, model_forward, ops_norm_qkv, tandem_open, tandem_session_* ...) at every use, and no table of them
// outlives a doctor: a test that links a broken function in a right one's place is judged like the product.
#ifndef TANDEM_DOCTOR_DOCTOR_H
#define TANDEM_DOCTOR_DOCTOR_H

#include "base/buffer.h"
#include "base/error.h"
#include "engine/engine.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum doctor_stage {
    STAGE_WEIGHTS, // stage_weights.c: what the file holds is what the model reads
    STAGE_OPS,     // stage_ops.c: every op alone
    STAGE_MODEL,   // stage_model.c: the whole sequence of layers
    STAGE_SERVING, // stage_serving.c: the engine: whatever may not change a sequence's bits
    STAGE_COUNT
};

enum verdict { VERDICT_SKIPPED, VERDICT_OK, VERDICT_FAULT };

// What kind of evidence a fault is: diagnose() starts from it.
enum fault_kind {
    FAULT_LOAD,    // the model cannot be loaded; message says why
    FAULT_WEIGHT,  // a bound weight differs from the file, is missing, or is NaN or Inf; `tensor` names it
    FAULT_FUSED,   // a fused op differs from the composition of its primitives
    FAULT_OP,      // an op differs from the oracle
    FAULT_VARIANT, // an op differs between instruction sets, thread counts, batch sizes or page layouts
    FAULT_LOGITS,  // the model's logits differ from the oracle's
    FAULT_SERVING, // the engine's results differ between two ways to ask for the same
};

// One thing that is wrong. -1: not known or not applicable; NaN likewise.
struct fault {
    enum doctor_stage stage;
    enum fault_kind kind;
    char check[128];  // what was checked: "matmul against T", "prefill = decode"
    char op[48];      // primitive or fused op as ops.h names it, or a function of the engine; "" when not known
    char tensor[96];  // the weight or the traced tensor ("layers.3.q", CLI.md) that differs; "" when none
    char variant[96]; // how it ran: "T=17", "chunk 7", "avx2, 3 threads"; "" for the ordinary way
    int layer, head, position, channel; // head and channel within the head for per-head tensors, else channel only
    int prompt;                         // index in doctor.prompts, for FAULT_LOGITS and FAULT_SERVING
    double expected, found;
    char message[512]; // one line for people; names what the other fields name
};

enum { MAX_FAULTS = 32 }; // kept for each stage; n_faults counts on

// A number that a script may want.
struct figure {
    const char *name; // "kl_mean"; a constant
    double value;
};

enum { MAX_FIGURES = 16 };

#define FINITE_CHECK "no NaN, no Inf" // of weights: when it fails, the other stages are not run

struct stage_report {
    enum doctor_stage stage;
    const char *name; // "weights", "ops", "model", "serving"
    enum verdict verdict;
    size_t n_checks;
    double seconds;
    size_t n_faults;                     // all that were found
    struct fault faults[MAX_FAULTS + 1]; // the first of them, in the order in which the model computes; and a spare
    struct figure figures[MAX_FIGURES];
    size_t n_figures;
    struct buffer summary; // one line: what was covered and the figures that matter
    struct buffer notes;   // lines worth reading that are no fault
};

// A cause that explains a fault, and how sure that is.
struct diagnosis {
    char name[64];     // "lost residual", as in docs/DOCTOR.md
    double confidence; // 0 to 1
    char text[512];
};

enum { MAX_DIAGNOSES = 8 };

// All zero but what doctor_run fills. Large: allocate it.
struct doctor_report {
    enum verdict verdict;
    struct stage_report stages[STAGE_COUNT];
    struct fault first; // the first fault of the model's computation, when verdict is FAULT: the earliest stage's first
                        // one, unless diagnose() found a better place
    struct diagnosis diagnoses[MAX_DIAGNOSES]; // most probable first
    size_t n_diagnoses;
    double diagnose_seconds;
};

struct doctor_options {
    const char *model;  // as in tandem_options
    uint32_t stages;    // bit (1 << enum doctor_stage); 0: all
    bool thorough;      // every layer, every T, long contexts, more prompts
    const char *isa;    // as in tandem_options
    const char *device; // "cuda", "cuda:N": the path that is examined runs there, the oracles on the CPU; NULL: the CPU
    const char *fusion; // as in tandem_options; what the fused path is
    const char *kv_type; // as in tandem_options
    int threads;         // 0: as many as this process may use
    uint64_t seed;       // of the generated prompts and inputs
    double
        budget; // seconds that the stages should take together; 0: 25 for a small model, else 240; thorough: no limit
    bool no_diagnosis;
    void (*stage_done)(void *user, const struct stage_report *stage); // or NULL
    struct log log;                                                   // messages and progress bars
    void *user;
};

// A prompt that the model and serving stages run.
struct doctor_prompt {
    char name[32]; // "random", "text", "repeated"
    int32_t *ids;
    size_t n;
};

enum { MAX_PROMPTS = 8 };

// One examination. Stages read it; only doctor_open and doctor_close change what is above the line.
struct doctor {
    struct doctor_options options;
    char *path; // resolved
    enum model_kind kind;
    struct model *model;            // NULL when it could not be loaded: `load_error` says why
    char load_error[1024];          //
    const struct ops *ops;          // under test
    struct device_weights *weights; // on the ops' device; NULL: they have none
    uint32_t fusion;                // under test
    enum dtype kv_type;             //
    struct pool *pool;              //
    struct tokenizer *tokens;       // NULL when the model has none
    struct doctor_prompt prompts[MAX_PROMPTS];
    size_t n_prompts;
    // ---
    enum doctor_stage stage; // in progress
    double deadline;         // clock_seconds() at which the stage in progress should be done
    struct doctor_report *report;
};

// Loads the model. A model that does not load is a fault that doctor_run reports; an unknown path, instruction set or
// fusion is an error. NULL on error.
struct doctor *doctor_open(const struct doctor_options *options, struct error *err);
void doctor_close(struct doctor *d); // NULL is fine

// Runs the stages and, on a fault, the diagnosis. False: the examination itself failed (out of memory). `report` is to
// be zero; doctor_report_free frees what it holds.
bool doctor_run(struct doctor *d, struct doctor_report *report, struct error *err);
void doctor_report_free(struct doctor_report *report);

const char *doctor_stage_name(enum doctor_stage stage);
// Memory of a KV store becomes NaN, wherever it is.
void doctor_poison(const struct kv_store *kv, void *memory, size_t bytes);
// pages[n] become 0 to n - 1: in this order where `seed` is 0, else mixed up by it.
void doctor_order_pages(int32_t *pages, size_t n, uint32_t seed);
bool doctor_model_is_small(const struct doctor *d); // every layer is examined, whatever the time
bool doctor_stages_parse(const char *list, uint32_t *mask, struct error *err); // "weights,ops"

// ---- Stages: each fills its report's checks, faults, summary and notes. False: it could not be carried out. -------

bool stage_weights(struct doctor *d, struct stage_report *r, struct error *err);
bool stage_ops(struct doctor *d, struct stage_report *r, struct error *err);
bool stage_model(struct doctor *d, struct stage_report *r, struct error *err);
bool stage_serving(struct doctor *d, struct stage_report *r, struct error *err);

// diagnose.c: called when the verdict is FAULT. Reads the stages' faults, refines report->first, fills the diagnoses.
bool diagnose(struct doctor *d, struct doctor_report *report, struct error *err);

// ---- For the stages and the diagnosis -----------------------------------------------------------------------------

// A new fault with every place unknown, verdict set to FAULT; a discarded one beyond MAX_FAULTS, never NULL.
struct fault *stage_fault(struct stage_report *r, enum fault_kind kind, const char *check);
// Formats a fault's message.
void fault_say(struct fault *f, const char *format, ...) __attribute__((format(printf, 2, 3)));
// A line of the stage's notes, without the newline.
void stage_note(struct stage_report *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
void stage_figure(struct stage_report *r, const char *name, double value);
void doctor_progress(const struct doctor *d, double fraction); // of the stage in progress

// A run of one prompt through model_forward on KV of its own, teacher-forced.
struct forward_options {
    const struct ops *ops; // NULL: the doctor's
    struct pool *pool;     // NULL: the doctor's
    uint32_t fusion;
    enum dtype kv_type;
    size_t chunk;        // tokens a step; 0: all at once
    bool poison;         // every KV slot and all activations are NaN before the first step
    uint32_t page_order; // 0: ascending pages; else the seed of a permutation over twice as many pages
    tap_fn *tap;         // or NULL
    void *user;
};
// logits: [n, n_vocab], of every position.
bool doctor_forward(const struct doctor *d, const struct forward_options *o, const int32_t *ids, size_t n,
                    float *logits, struct error *err);

#endif
