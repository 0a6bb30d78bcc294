// diagnose_spy.h: what the walk's two files share: its state, and the questions that the spying ops ask of it.
#ifndef TANDEM_DOCTOR_DIAGNOSE_SPY_H
#define TANDEM_DOCTOR_DIAGNOSE_SPY_H

#include "doctor/diagnose_kv.h"
#include "doctor/diagnose_walk.h"

// Steps of a program: the primitives; attention's four parts are one.
enum step_op {
    OP_EMBED,
    OP_NORM,
    OP_MATMUL,
    OP_BIAS,
    OP_HEAD_NORM,
    OP_ROPE,
    OP_STORE,
    OP_ATTENTION,
    OP_ADD,
    OP_SILU,
    OP_GATHER,
    OP_FUSED // any fused op
};

// Where results stand between ops.
enum slot {
    SLOT_X,
    SLOT_NORMED,
    SLOT_Q,
    SLOT_K,
    SLOT_V,
    SLOT_ATTN,
    SLOT_PROJECTED,
    SLOT_GATE,
    SLOT_UP,
    SLOT_ACT,
    SLOT_ROWS,
    SLOT_LOGITS,
    SLOT_COUNT
};

// A result as its op left it, and as it was before that.
struct result {
    float *copy, *before;
    size_t n, n_before, cap;
    const float *at;    // where the op put it
    const char *writer; // which op
    int layer;
};

// The primitives in the order in which a step must run them; a fused op takes all that bear its name.
struct entry {
    enum step_op op;
    enum fused_op fused; // FUSED_COUNT: none
    enum weight_part part;
    int layer;
};

struct walk {
    struct ops ops; // first: op_ctx.ops points here
    struct walk_options o;
    struct finding *finding;
    struct entry *program;
    size_t n_program, head_at, at; // the head's entries begin at head_at
    struct result slots[SLOT_COUNT];
    const struct batch *planned;
    struct batch *seen, *previous; // the step's batch as its first op saw it, the step's before
    const struct walk_sequence *sequences, **of_seq;
    size_t n_sequences, n_logit_rows;
    struct kv_shadow *shadow;
    const float *cos_sin;
    const struct kv_layer *kv;
    bool out_of_memory, watch_norm, in_step;
    struct alternative norms[MAX_ALTERNATIVES], matrices[MAX_ALTERNATIVES];
};

// The next entry of the program, if it is this one; NULL: a fault, now or before.
const struct entry *walk_next(struct walk *w, enum step_op op, enum fused_op fused);
const char *walk_op_name(const struct walk *w, const struct entry *e);
// Remembers a result.
void walk_keep(struct walk *w, enum slot slot, const struct entry *e, const float *data, size_t n);
// Is an input what the op before it left?
bool walk_input(struct walk *w, enum slot slot, const struct entry *e, const float *data, size_t n, size_t n_columns);
bool walk_batch(struct walk *w, const struct entry *e, const struct batch *b);
// Are cosines and sines those of the batch's positions?
bool walk_angles(struct walk *w, const struct entry *e, const struct batch *b, const float *cos_sin);
// Judges one output. PART_COUNT: no such weight.
bool walk_judge(struct walk *w, const struct entry *e, struct call *c, enum weight_part norm_part,
                enum weight_part matrix_part, const char *check);
void walk_start(struct walk *w); // a step begins: embed was called

// diagnose_spy.c: fills w->ops.
void spy_fill(struct walk *w);

#endif
