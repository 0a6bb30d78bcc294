// stage_ops.h: what the parts of the ops stage share: a layer's ops run one after the other on chosen inputs, every
// intermediate result kept. For stage_ops.c (what is run), stage_ops_run.c (running) and stage_ops_judge.c (against T).
#ifndef TANDEM_DOCTOR_STAGE_OPS_H
#define TANDEM_DOCTOR_STAGE_OPS_H

#include "base/arena.h"
#include "doctor/doctor.h"
#include "doctor/room.h"

// The results of a layer's ops, in the order in which they are computed; then the head's.
enum segment {
    SEG_ATTN_NORM,
    SEG_Q,
    SEG_K,
    SEG_V,
    SEG_Q_NORM,
    SEG_K_NORM,
    SEG_Q_ROPE,
    SEG_K_ROPE,
    SEG_KV_K, // as stored
    SEG_KV_V,
    SEG_ATTN,
    SEG_ATTN_OUT,
    SEG_RESID_MID,
    SEG_MLP_NORM,
    SEG_GATE,
    SEG_UP,
    SEG_ACT,
    SEG_MLP_OUT,
    SEG_RESID,
    SEG_FINAL_NORM,
    SEG_LOGITS,
    SEG_COUNT
};

struct segment_info {
    const char *name;      // as in `tandem trace`
    const char *primitive; // that computes it
    enum fused_op fused;   // that computes it
};
extern const struct segment_info segment_infos[SEG_COUNT];

// Columns of a segment, and of one of its heads (0: it has none).
size_t segment_columns(const struct model_config *c, enum segment seg);
size_t segment_head_dim(const struct model_config *c, enum segment seg);

// One run's results. A fused op does not show its inner ones: those are not present.
struct capture {
    size_t n_rows, max_rows;
    float *seg[SEG_COUNT]; // [n_rows, columns]
    bool present[SEG_COUNT];
    bool kv_touched; // a slot of the KV that is no token's of this step has changed
    int touched_position, touched_channel;
    bool overran; // scratch was written beyond its end
};
// With room for max_rows rows of a layer's segments, or (head) of the head's.
bool capture_create(struct capture *c, struct arena *arena, const struct model_config *config, size_t max_rows,
                    bool head, struct error *err);

// One sequence of a step: positions past .. past + n - 1, after `past` positions whose K and V are given.
struct op_sequence {
    size_t past, n;
    const float *past_k, *past_v; // [past, n_kv_heads * head_dim], values that the KV type holds exactly
};

// A step of one layer: its weights, sequences and the residual stream before it.
struct op_case {
    const char *name;
    const struct doctor *d;
    const struct layer_weights *weights;
    int layer;
    const struct op_sequence *seqs; // [n_seqs]
    size_t n_seqs;
    const float *x; // [tokens of all sequences, hidden]
};
size_t case_tokens(const struct op_case *c);
int case_position(const struct op_case *c, size_t row);

struct op_way {
    const struct ops *ops;
    struct pool *pool;
    uint32_t fusion;
    uint32_t page_order; // 0: ascending; else the seed of a permutation over more pages than are needed
    // On a device only.
    struct room *room; // for the case's memory
    uint32_t flipped;  // kernels (device.variants) that are used where they are not, or not where they are
    bool unwatched;    // nothing is fetched before the last op is queued: of a layer, what it stores and the stream
};                     // behind it are captured, and fused ops with parts that are shown run, too
// Runs the case. Everything that it does not write first is NaN.
bool run_layer(const struct op_case *c, const struct op_way *way, struct capture *out, struct error *err);

// norm_head of n_rows of the rows of x [n_tokens, hidden].
struct head_case {
    const struct doctor *d;
    const float *x;
    size_t n_tokens;
    const int32_t *rows; // [n_rows]
    size_t n_rows;
};
bool run_head(const struct head_case *c, const struct op_way *way, struct capture *out, struct error *err);

// The largest errors that were found, for the summary.
struct judgement {
    double worst_of_h; // RMS error of a row over H's, and where
    char where[64];
    double worst_of_bound; // error of an element over its bound
    size_t n_values;       // judged
    double quantised_cost; // largest RMS error of a product that rounds its input to int8, relative to T's RMS
};

// Judges the results of a run of primitives by T, each op fed what the run fed it. `rows` [n_rows] are the rows whose
// products are judged; all other ops are judged on every row.
bool judge_layer(const struct op_case *c, const struct capture *run, const size_t *rows, size_t n_rows,
                 struct stage_report *r, struct judgement *j, struct error *err);
bool judge_head(const struct head_case *c, const struct capture *run, struct stage_report *r, struct judgement *j,
                struct error *err);

// A fault at one value of a segment.
struct fault *segment_fault(struct stage_report *r, enum fault_kind kind, const char *check,
                            const struct model_config *config, int layer, enum segment seg, int position, size_t column,
                            double expected, double found);

#endif
