// hypotheses.h: what an op should have given for the inputs that it saw, and what it would have given under each of a
// list of known mistakes: all in f64, from the formulas. It owns no search: diagnose_walk.c feeds it calls.
//
// A CALL is one output of one op: its inputs as they were, and the numbers that came out. A TWIST is a named wrong
// formula. The same function evaluates the right formula (no twist) and the twisted ones, on any grid of rows and
// columns; for the right one it also derives how far f32 arithmetic in any order may be away (the bound).
#ifndef TANDEM_DOCTOR_HYPOTHESES_H
#define TANDEM_DOCTOR_HYPOTHESES_H

#include "base/error.h"
#include "doctor/doctor.h"
#include "model/model.h"

#include <stdbool.h>
#include <stddef.h>

enum formula {
    FORMULA_EMBED,     // row token[t] of the table
    FORMULA_LINEAR,    // gather, rmsnorm, matmul, bias, residual: whichever are given
    FORMULA_GATE_UP,   // rmsnorm, two matmuls, silu(gate) * up
    FORMULA_HEADS,     // rmsnorm of heads, rope: whichever are given
    FORMULA_SILU,      // silu(x) * up
    FORMULA_ADD,       // add + x
    FORMULA_ATTENTION, // causal grouped-query attention over pages
};

// A weight that might have been used in the right one's place.
struct alternative {
    const char *name; // of the mistake: "norm weight of the wrong layer"
    char detail[96];  // "that of layer 3"
    const float *vector;
    const struct matrix *matrix;
};
enum { MAX_ALTERNATIVES = 160 };

struct call {
    enum formula formula;
    const char *op, *part; // "norm_qkv" and "q"; part is "" when the op has one output
    int layer;             // -1: outside
    const struct model *model;
    struct pool *pool;         // NULL: one thread
    const struct batch *batch; // NULL: not known
    bool on_device;            // the op rounds as a GPU's does (docs/NUMERICS.md)
    const float *found;        // [n_rows, n_columns]
    size_t n_rows, n_columns;
    size_t head_dim; // 0: the columns are no heads

    const float *x; // [n_x_rows, n_in] as it was before the call
    size_t n_x_rows, n_in;
    const int32_t *rows; // row of x for each row; NULL: the same row
    const float *norm;   // NULL: none
    float eps;
    const struct matrix *w, *w_up; // w: matmul, gate, or the embedding's table
    const float *bias;             // NULL: none
    const float *add;              // the residual before; NULL: none
    const float *up;               // silu's second input
    const float *cos_sin;          // [n_rows, head_dim]; NULL: no rope
    const int32_t *token;          // embed
    const struct kv_layer *kv;     // attention
    size_t n_heads, n_kv_heads;
    double scale;
    size_t attn_block; // positions that attention sums before it combines

    const struct alternative *norms, *matrices; // what else might have been used
    size_t n_norms, n_matrices;
};

enum twist_kind {
    TWIST_NONE,
    // which row
    TWIST_ROW_SHIFT, // arg rows further, cyclic
    TWIST_ROW_FIRST, // row 0 for all
    TWIST_ROW_LAST,
    // norms
    TWIST_EPS,          // value instead of eps
    TWIST_NORM_ORDER,   // rounded to bf16 before the weight
    TWIST_NORM_PLUS_1,  // weight + 1
    TWIST_NORM_BARE,    // no weight
    TWIST_NORM_SUM,     // the sum of squares, not their mean
    TWIST_NORM_CENTRED, // mean subtracted first
    TWIST_NORM_SKIPPED, // no norm at all
    TWIST_NORM_TOKEN,   // one norm over all heads
    TWIST_NORM_LATE,    // after rope
    TWIST_NORM_OTHER,   // another weight: `other`
    // products
    TWIST_MATRIX_OTHER,
    TWIST_UP_OTHER,        // of gate and up, the second
    TWIST_TRANSPOSED,      // the data read as [n_in, n_out]
    TWIST_WEIGHT_SHIFT,    // row o + arg of W
    TWIST_WEIGHT_OFFSET,   // data begins arg elements later
    TWIST_K_TAIL,          // the last arg terms are left out
    TWIST_BF16_SUM,        // accumulator rounded to bf16 after every term; arg 16: in sixteen lanes
    TWIST_INPUT_UNROUNDED, // the input not rounded to bf16
    TWIST_INPUT_ROUNDED,   // rounded although the weights are not bf16
    TWIST_BLOCK_SCALE,     // scale of the block arg further
    TWIST_ZERO_POINT,      // neither zero point nor minimum
    TWIST_NIBBLES,         // low and high half of a block swapped
    TWIST_NIBBLES_PAIRED,  // elements 2i, 2i+1 in one byte
    TWIST_NO_BIAS,
    TWIST_BIAS_TWICE,
    // residual
    TWIST_RESIDUAL_LOST,
    TWIST_PROJECTION_LOST,
    TWIST_RESIDUAL_TWICE,
    TWIST_PROJECTION_TWICE,
    TWIST_SUBTRACTED,
    // gate and up
    TWIST_GATE_UP_SWAPPED,
    TWIST_GELU_TANH,
    TWIST_GELU_ERF,
    TWIST_RELU,
    TWIST_SIGMOID,    // without the factor g
    TWIST_NO_UP,      // silu(g)
    TWIST_WRONG_HALF, // of the fused [gate, up], pairs 2i and 2i + 1
    TWIST_SHIFT_HALF, // up of the channel half the width further
    TWIST_EXP_OVERFLOW,
    // rope
    TWIST_INTERLEAVED,
    TWIST_THETA,         // value
    TWIST_POSITION,      // position + arg
    TWIST_POSITION_STEP, // index in this step's share of the sequence
    TWIST_POSITION_ROW,  // index in the batch
    TWIST_HALF_DIMS,     // only the first half of the pairs is rotated
    TWIST_HALF_WRITTEN,  // only the rotated (lower) dims are written
    TWIST_ROPE_SKIPPED,
    TWIST_ROPE_BACK, // the other way round
    TWIST_ROPE_TWICE,
    TWIST_ROPE_BF16, // cos and sin rounded to bf16
    // attention
    TWIST_SCALE,       // value instead of scale
    TWIST_MASK,        // sees arg more positions
    TWIST_NO_MASK,     // sees the whole step
    TWIST_PAGE_UP,     // sees to the end of the last page
    TWIST_PAGE_DOWN,   // sees whole pages only
    TWIST_WINDOW,      // sees only the last value positions
    TWIST_PREFIX,      // sees only the first value positions
    TWIST_HEAD_MODULO, // KV head h % n_kv_heads
    TWIST_HEAD_SHIFT,  // KV head + arg, cyclic
    TWIST_HEAD_FIRST,  // KV head 0 for all
    TWIST_KV_SWAPPED,  // scores from V, values from K
    TWIST_V_IS_K,      // values from K
    TWIST_NHD,         // pages read as [slot][head]
    TWIST_PAGES_REVERSED,
    TWIST_PAGES_ROTATED,
    TWIST_PAGES_PLAIN, // page i of the store for page i of the sequence
    TWIST_PAGES_OTHER, // sequence seq + arg's pages, cyclic
    TWIST_SLOT_SHIFT,  // slot + arg of the page, cyclic
    TWIST_NO_MAXIMUM,  // exp of the scores themselves, in f32
    TWIST_P_BF16,      // probabilities rounded to bf16
    TWIST_NO_RESCALE,  // blocks added without their maxima
    TWIST_LAST_BLOCK,  // the last block only
    TWIST_NO_DIVISION, // not divided by the sum
    TWIST_ZERO_WEIGHT, // slots behind the last position count with weight 0, which makes NaN of NaN
};

struct twist {
    enum twist_kind kind;
    int arg;
    double value;
    const struct alternative *other;
    const char *name; // as docs/DOCTOR.md lists it
    char detail[96];
};

// A grid of output elements.
struct grid {
    const size_t *rows, *columns;
    size_t n_rows, n_columns;
};

// Fills want [n_rows, n_columns] of the grid; and, unless NULL, how far a right result may be from it. False when the
// twist does not apply to this call or memory runs out.
bool formula_evaluate(const struct call *c, const struct twist *twist, const struct grid *g, double *want,
                      double *bound);

// formula_evaluate's parts, by file.
bool formula_linear(const struct call *c, const struct twist *t, const struct grid *g, double *want, double *bound);
bool formula_attention(const struct call *c, const struct twist *t, const struct grid *g, double *want, double *bound);
bool formula_heads(const struct call *c, const struct twist *t, const struct grid *g, double *want, double *bound);

// One row of W as f64, twisted. scratch: [2 * n_in].
bool formula_weight_row(const struct matrix *w, const struct twist *t, size_t row, double *out);

// ---- Judging -------------------------------------------------------------------------------------------------------

enum { GRID_ROWS = 12, GRID_COLUMNS = 48 };

// What is wrong with a call's numbers.
struct judgement {
    size_t n_checked, n_faulty;
    size_t row, column; // the first faulty element, by row, then column
    size_t min_column;
    double expected, found, bound;
    size_t rows[GRID_ROWS], columns[GRID_COLUMNS]; // faulty ones, in order
    size_t n_rows, n_columns;
};
// Compares a call's numbers with the right formula. False: memory ran out. At most max_rows rows are compared.
bool call_judge(const struct call *c, size_t max_rows, struct judgement *j, struct error *err);

// Tries every twist that applies on the faulty elements; adds what explains them to `out` (most probable first), and
// returns how many are there.
size_t call_explain(const struct call *c, const struct judgement *j, struct diagnosis *out, size_t max);

// The bits that outputs hold before a call: an element that still has them was never written.
float poison_float(void);
bool is_poison(float f);
uint32_t float_bits_of(float f);

#endif
