// seeded.h: deliberately broken code, linked in place of the right one by the linker's --wrap, for one test program and
// nothing else. One SEED is one mistake in one place, and the truth about it. While no seed is sown, every wrapped
// function is the product's own.
#ifndef TANDEM_TESTS_DOCTOR_SEEDED_H
#define TANDEM_TESTS_DOCTOR_SEEDED_H

#include "model/model.h"

#include <stdbool.h>
#include <stddef.h>

// What is broken. In brackets: in which functions.
enum mistake {
    // norms [norm_qkv, norm_gate_up, norm_head, rmsnorm, head_rmsnorm, qk_norm_rope_store]
    EPS_MISSING,
    EPS_DOUBLED,
    NORM_ORDER,
    NORM_OTHER_LAYER,
    QK_NORM_SWAPPED,
    NORM_AFTER_ROPE,
    // rope [qk_norm_rope_store, rope]
    ROPE_INTERLEAVED,
    ROPE_THETA,
    ROPE_POSITION,
    ROPE_HALF,
    ROPE_HALF_WRITTEN,
    // products [norm_qkv, out_residual, norm_gate_up, down_residual, norm_head, matmul]
    BF16_SUM,
    K_TAIL,
    TOKEN_TAIL,
    COLUMN_TAIL,
    NEIGHBOUR_ROW,
    BLOCK_SCALE,
    ZERO_POINT,
    NIBBLES,
    TRANSPOSED,
    WRONG_ROW,
    GARBAGE_BIAS,
    RACE,
    // residual [out_residual, down_residual, add]
    RESIDUAL_REPLACED,
    PROJECTION_DROPPED,
    PROJECTION_TWICE,
    // MLP [norm_gate_up, silu_mul]
    GATE_UP_SWAPPED,
    GELU,
    WRONG_HALF,
    // embedding [embed]
    EMBED_SCALED,
    EMBED_ROW,
    // KV [qk_norm_rope_store, kv_store]
    STORE_LATE,
    STORE_NHD,
    STORE_SWAPPED,
    // attention [attention, its parts]
    SCALE_MISSING,
    SCALE_SQUARED,
    MASK_MORE,
    MASK_LESS,
    MASK_NONE,
    HEAD_MODULO,
    READ_SWAPPED,
    READ_NHD,
    READ_REVERSED,
    READ_WHOLE_PAGES,
    READ_TAIL,
    READ_ZERO_WEIGHTS,
    READ_PREFIX,
    NO_MAXIMUM,
    BF16_VALUES,
    NO_RESCALE,
    // between the ops [ops_*: the model's calls]
    CALL_BIAS,
    CALL_SKIPPED,
    CALL_NORM_OTHER,
    CALL_EPS,
    CALL_RESTORED,
    CALL_NORM_LATE,
    CALL_SCALE,
    CALL_MATRIX_OTHER,
    CALL_LENGTH,
    // a step's batch [model_forward]
    STEP_POSITION,
    STEP_RESTART,
    STEP_PAGES,
    STEP_STALE,
    STEP_ROWS,
    STEP_SEQ,
    STEP_LOGITS_STALE,
    STEP_PAGE_SHARED,
    // the engine [kv_*, sampler_choose, kv_store_copy_page, engine_run]
    ENGINE_COPY,
    ENGINE_SHARED_PAGE,
    ENGINE_MATCH,
    ENGINE_TRIM,
    ENGINE_POSITION,
    ENGINE_NOISE,
    // loading [model_load, rope_rates]
    LOAD_BIAS,
    LOAD_NORM_LAYER,
    LOAD_QK_SWAPPED,
    LOAD_GATE_UP,
    LOAD_KV,
    LOAD_WRONG_TYPE,
    LOAD_ROW,
    LOAD_UNTIED,
    LOAD_LAYER,
    LOAD_PLUS_ONE,
    LOAD_BIAS_MISSING,
    LOAD_THETA,
};

// The function that holds the mistake: a fused op, a primitive, one of attention's parts, or the model and engine.
enum seed_site {
    SITE_NORM_QKV,
    SITE_QK_NORM_ROPE_STORE,
    SITE_ATTENTION,
    SITE_OUT_RESIDUAL,
    SITE_NORM_GATE_UP,
    SITE_DOWN_RESIDUAL,
    SITE_NORM_HEAD,
    SITE_EMBED,
    SITE_RMSNORM,
    SITE_MATMUL,
    SITE_HEAD_RMSNORM,
    SITE_ROPE,
    SITE_KV_STORE,
    SITE_ADD,
    SITE_SILU_MUL,
    SITE_GATHER,
    SITE_ATTN_SCORES,
    SITE_ATTN_SOFTMAX,
    SITE_ATTN_VALUES,
    SITE_ATTN_COMBINE,
    SITE_CALLS, // ops_*
    SITE_STEP,
    SITE_ENGINE,
    SITE_LOAD,
};

struct seed {
    const char *name; // of the row in docs/DOCTOR.md
    enum mistake mistake;
    enum seed_site site;
    int layer, head, channel; // where; -1: everywhere. layer -1 in SITE_NORM_HEAD and SITE_EMBED
    const char *model;
    // The truth.
    const char *op; // what the doctor should name
    int first_layer;
    const char *cause;
};
extern const struct seed seeds[];
extern const size_t n_seeds;

extern const struct seed *sown; // NULL: none

// seeded_ops.c: the table with the sown mistake in its site; NULL when the site is in no table.
const struct ops *seeded_table(const struct ops *right);

#endif
