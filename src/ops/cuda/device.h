// ops/cuda/device.h: what the CUDA backend's own files share: the state behind a table, and how kernels are launched.
// C and CUDA C++ include it.
#ifndef TANDEM_OPS_CUDA_DEVICE_H
#define TANDEM_OPS_CUDA_DEVICE_H

#ifdef __cplusplus
extern "C" {
#endif

#include "ops/ops.h"

#include <cuda_runtime_api.h>

// The chips that a build is for (the Makefile's CUDA_CHIP). 90: Hopper, with bulk copies and programmatic dependence;
// 80: every chip from Ampere on, without.
#define HOPPER (TANDEM_CUDA_CHIP >= 90)

enum { COPY_LANES = HOPPER ? 1 : 32 }; // lanes of a warp that ask for its copies into shared memory

enum {
    SPLIT_ROWS = 1024,       // tokens times heads up to which attention splits a sequence's chunks over blocks
    MOST_ARRIVALS = 16384,   // counters: tokens times KV heads
    MOST_PARTIAL = 16 << 20, // floats of attention's partial results, about
    SMALL_TOKENS = 8,        // up to here products norm and round their inputs themselves
};

// Kernels that may stand in for others and return the same bits, as device.variants numbers them (device.c names them).
enum {
    VARIANT_STORE_HEADS = 1 << 0,
    VARIANT_WIDE_ATTENTION = 1 << 1,
    N_ANY_CHIP = 2, // the rest is Hopper's
    VARIANT_PERSISTENT = 1 << 2,
    VARIANT_WGMMA = 1 << 3,
    VARIANT_STREAM_ATTENTION = 1 << 4,
    VARIANT_CLUSTERS = 1 << 5,
    VARIANT_WGMMA_QUANTISED = 1 << 6,
    VARIANT_WGMMA_ATTENTION = 1 << 7,
    VARIANT_PARTS = 1 << 8,
    VARIANT_CHAINED = 1 << 9,
    VARIANT_BESIDE = 1 << 10,
    N_VARIANTS = 11
};

// Where and what a choice marks; NULL: nowhere.
struct choice_mark {
    uint32_t *flag;
    uint32_t number;
};

// A choice among the logits of rows (choice.cuh). out NULL: none.
struct choice_work {
    struct greedy_choice *out; // [n_rows]
    int32_t *chosen;           // [n_rows] the ids, for the next step; NULL: not wanted, but logarithms are
    const float *logits;       // [n_rows, n]
    void *parts;
    unsigned *arrivals;
    int n;
    struct choice_mark mark;
};

// One opened GPU. `ops` comes first: a table's address is its state's.
struct cuda_state {
    struct ops ops;
    struct device device;
    char short_name[16]; // "cuda:0"
    int index, n_sms;
    cudaStream_t stream;
    cudaEvent_t marks[DEVICE_MARKS];
    cudaError_t failed;    // the first error; nothing is done after it
    const char *failed_at; // what was being done
    unsigned *arrivals;    // [MOST_ARRIVALS] zero between launches
    void *parts;           // for choose
    unsigned *alarm;       // on the host: a kernel whose blocks wait for each other has waited too long
    int n_clusters;        // of eight blocks that the GPU holds at once, each with an SM's shared memory
    int n_pairs;           // of two such blocks
    void *sampling;        // for sample
    uint32_t loaded_types; // bit (1 << enum dtype): the kernels for such weights are loaded
    uint32_t loaded_kv;    // the same of kinds of K and V (attention.cu)
    void *shown;           // for device.show
    size_t shown_bytes;
    struct recording *recordings;
    size_t n_recordings;
    uint64_t recording; // the key of the sequence being recorded, 0: none
    // The last op's result that also stands in scratch as the next product takes it: valid until anything else is
    // queued.
    const float *packed;
    int packed_tokens;
    const float *stored; // k, where the last product of q, k and v has stored K and V (heads.cuh); else NULL
    bool has_new_kv;     // of this step, which a kernel soon to come would take for old ones: the next begins alone
    // Of the last product, what is still to be added to x (parts.cu); x NULL: nothing. Whatever is queued next adds it
    // first.
    struct {
        float *x; // [n_tokens, n_out]
        const float *parts;
        int n_out, n_parts, n_tokens;
    } pending;
    int tile_shape;  // of products by warp groups: 0, or one to be measured (groups.cu); -1: clusters.cuh
    uint32_t *flags; // [DEVICE_MARKS] on the host: numbers of the last choices that marked
    uint32_t flagged[DEVICE_MARKS]; // what they will be
    bool is_flagged[DEVICE_MARKS];  // the last mark is a flag, not an event
    unsigned marking;               // 1 + the mark of the next choice; 0: none
    // Of the last step: the next one's kernel of all layers makes it beside its own work; whatever else is queued next,
    // or waits for it, has it made first. out NULL: none.
    struct choice_work choice;
    unsigned long long *best; // [2] of steps in turns: the best logit's key (choice.cuh), 0 before the head
    unsigned best_turn;       // of the last one
    bool best_told;           // its head has told it
    bool follows_choice;      // a kernel that starts others when all before it have ended was queued last
};

struct choice_mark cuda_take_mark(struct cuda_state *s);

// The choice that is left: queued now, or taken by who makes it beside other work.
void cuda_choose_now(struct cuda_state *s);
static inline struct choice_work cuda_take_choice(struct cuda_state *s) {
    struct choice_work c = s->choice;
    s->choice.out = NULL;
    return c;
}

static inline struct cuda_state *cuda_of(const struct op_ctx *ctx) {
    return (struct cuda_state *)(uintptr_t)ctx->ops;
}

// Queues what is pending, a choice among it: before anything else that may read or write x, and before the stream
// changes.
void cuda_add_parts(struct cuda_state *s);

// Keeps the first error.
void cuda_check(struct cuda_state *s, cudaError_t e, const char *what);

void cuda_fill_pointwise(struct ops *ops);
void cuda_fill_products(struct ops *ops);
void cuda_fill_attention(struct ops *ops);
void cuda_fill_choose(struct ops *ops);
void cuda_fill_persistent(struct ops *ops);
void cuda_fill_sample(struct ops *ops);
size_t cuda_choose_bytes(void);
size_t cuda_sample_bytes(void);
bool cuda_persistent_setup(struct cuda_state *s);
bool cuda_groups_setup(struct cuda_state *s);

// Loads kernels, which takes some 0.2 ms each: those for weights of a type, and those for attention to K and V of a
// kind. Once loaded they are not loaded again.
void cuda_load_products(struct cuda_state *s, enum dtype type);
void cuda_load_attention(struct cuda_state *s, bool is_fp8, int head_dim);
// Rows [row, row + n_rows) of a matrix, as stored, to their places in the device's order.
void cuda_pack_rows(struct cuda_state *s, const struct matrix *out, const void *rows, size_t row, size_t n_rows);
// The same for quantised weights; the bytes of 8 rows by 128 columns of such (0: not a type that is multiplied here),
// and rows of an embedding.
void cuda_pack_quantised(struct cuda_state *s, const struct matrix *out, const void *rows, size_t row, size_t n_rows);
size_t cuda_quantised_record(enum dtype type);
void cuda_quantised_embed(const struct op_ctx *ctx, float *x, const struct matrix *table, const int32_t *token,
                          size_t n_tokens);
void cuda_load_quantised(struct cuda_state *s, enum dtype type);
void cuda_load_group_quantised(struct cuda_state *s, enum dtype type);

#ifdef __cplusplus
}
#endif

#endif
