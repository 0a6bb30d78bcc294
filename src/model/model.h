// model.h: a loaded model: its config, its weights bound once by name, type and exact shape, and THE layer sequence.
//
// A model is immutable once loaded. Weights stay in the mapped file, as stored; only small vectors (norms, biases) are
// converted to f32, and Llama's permuted q and k rows in GGUF are copied into the order that this engine uses.
#ifndef TANDEM_MODEL_MODEL_H
#define TANDEM_MODEL_MODEL_H

#include "base/file.h"
#include "base/log.h"
#include "base/pool.h"
#include "format/hub.h"
#include "format/tensor.h"
#include "model/config.h"
#include "ops/ops.h"

#include <stdbool.h>
#include <stddef.h>

struct layer_weights {
    const float *attn_norm, *mlp_norm; // [hidden]
    struct matrix wq, wk, wv,
        wo; // [n_heads * head_dim, hidden], [n_kv_heads * head_dim, hidden] x 2, [hidden, n_heads * head_dim]
    const float *bq, *bk, *bv;          // NULL where the config has none
    const float *q_norm, *k_norm;       // [head_dim], NULL where the config has none
    struct matrix w_gate, w_up, w_down; // [n_ff, hidden] x 2, [hidden, n_ff]
};

struct model {
    struct model_config config;
    struct generation_config generation;
    struct matrix embed, head;    // [n_vocab, hidden]; the same memory when tied
    const float *final_norm;      // [hidden]
    struct layer_weights *layers; // [n_layers]
    double *inv_freq;             // [head_dim / 2]
    double rope_magnitude;
    enum model_kind kind;
    char *path;
    size_t weight_bytes;     // of the matrices and vectors that a step reads
    struct tensor_set files; // a folder's; for GGUF the tensors of `gguf`
    struct gguf gguf;
    struct arena arena;     // vectors and copies
    struct file_map packed; // model_pack's copies
};

struct model_load_options {
    bool check_values; // read every weight once and refuse NaN and Inf by name
    struct pool *pool; // for that; NULL: one thread
    const struct log *log;
};

// Loads `path` (resolved by hub_resolve). Errors name the tensor or the field.
struct model *model_load(enum model_kind kind, const char *path, const struct model_load_options *options,
                         struct error *err);
void model_free(struct model *model);

// For what fills a model otherwise than model_load: binds the tensors of `files` (or `gguf`) to the config that is set.
bool model_bind(struct model *model, const struct log *log, struct error *err);

// ---- Weights in the CPU's own order (pack.c)

struct pack_options {
    struct pool *pool;
    const struct log *log; // progress, and what is not done and why
    const char *cache;     // the folder in which the copies of large GGUF files are kept; NULL: nowhere
    size_t cache_least;    // bytes of weights from which on a file is large
    // BF16 matrices, too, where no file keeps the copies: it makes every start slower, for a gain of a tenth.
    bool bf16_in_memory;
};
// Gives the matrices with quantised or BF16 weights their octets, for ops that take them (ops.h), from the cache: true
// if it has them, whole and made from this very file. Their values were checked before they were kept.
bool model_pack_cached(struct model *model, const struct pack_options *options);
// The same by making them, which takes as much memory again as they have, or a file of the cache, which is mapped.
// False, with a message to the log: there is room for neither, and the model is as it was. The bits of every product
// stay the same.
bool model_pack(struct model *model, const struct pack_options *options);
// Where the copy is kept or would be, and its bytes. *path: the file, to be freed; empty where it is not kept in one.
bool model_pack_place(struct model *model, const struct pack_options *options, struct buffer *path, size_t *bytes);
// What model_load's check_values does.
bool model_check_values(const struct model *model, struct pool *pool, const struct log *log, struct error *err);

// ---- Weights on a device ------------------------------------------------------------------------------------------

// What a step reads of a model: the model's own tables, or their copies in a device's memory.
struct device_weights {
    struct matrix embed, head;
    const float *final_norm;
    struct layer_weights *layers; // [n_layers]
    struct device *device;        // NULL: the model's own
    void **owned;                 // [n_owned] device memory
    size_t n_owned, bytes;
};
// Copies a model's weights to a device; the pool's threads help, if there is one. A matrix of a type that the device
// does not multiply is an error by name.
struct device_weights *weights_upload(const struct model *model, struct device *device, struct pool *pool,
                                      const struct log *log, struct error *err);
void weights_free(struct device_weights *weights); // NULL is fine
// A single matrix, to be freed as out->data. pool: NULL for small ones.
bool matrix_upload(const struct matrix *w, struct device *device, struct pool *pool, struct matrix *out,
                   struct error *err);
// Whether a device has what a model's ops need: head_dim, types of weights. False with what it lacks.
bool model_runs_on(const struct model *model, struct device *device, struct error *err);
// Bytes that weights_upload will take; 0 with the name of the matrix when the device cannot multiply one.
size_t weights_device_bytes(const struct model *model, struct device *device, struct error *err);

// ---- Running a step -----------------------------------------------------------------------------------------------

// The memory of a step, planned at start: activations for max_tokens tokens, logits for max_logit_rows rows, scratch.
struct run;
struct run_options {
    const struct ops *ops;
    struct pool *pool;
    int n_threads; // for run_bytes without a pool
    uint32_t fusion;
    size_t max_tokens, max_logit_rows, max_positions;
    const struct device_weights *weights; // on the ops' device; NULL for the host's ops
    size_t max_pages; // of all sequences of a step; 0: max_tokens sequences of max_positions; devices only
};
struct run *run_create(const struct model *model, const struct run_options *options, struct error *err);
void run_free(struct run *run);
size_t run_bytes(const struct model *model, const struct run_options *options); // SIZE_MAX on overflow

void run_set_tap(struct run *run, tap_fn *tap, void *user); // NULL: none
void run_set_fusion(struct run *run, uint32_t fusion);
void run_poison(
    struct run *run); // fills all of a step's memory with NaN, to show that nothing is read before it is written

// The KV pages of all layers, one layer after the other. [n_layers]
struct kv_store {
    struct kv_layer *layers;
    size_t n_layers, n_pages;
    void *memory;
    size_t bytes;
    struct device *device; // whose memory it is; NULL: the host's
};
size_t kv_store_bytes(const struct model_config *config, enum dtype type, size_t n_pages); // SIZE_MAX on overflow
bool kv_store_create(struct kv_store *kv, const struct model_config *config, enum dtype type, size_t n_pages,
                     struct error *err);
bool kv_store_create_on(struct device *device, struct kv_store *kv, const struct model_config *config, enum dtype type,
                        size_t n_pages, struct error *err); // device NULL: the host's
void kv_store_free(struct kv_store *kv);
void kv_store_copy_page(struct kv_store *kv, size_t from, size_t to); // every layer

// Runs one ragged batch through every layer: writes its K and V into its pages and returns the logits
// [n_logit_rows, n_vocab], on the host, valid until the next step. Token ids, positions and pages are in range: the
// engine checked. When the device failed they are NaN, and run_error says how.
const float *model_forward(const struct model *model, struct run *run, struct kv_store *kv, const struct batch *batch);
// The same in two halves: queue starts the step (on a device it returns before the step has ended), and the other two
// wait for it: for its logits, or for the most probable token of each of its rows alone, which is much less to fetch.
void model_queue(const struct model *model, struct run *run, struct kv_store *kv, const struct batch *batch);
const float *run_logits(struct run *run);
const struct greedy_choice *run_choices(struct run *run); // [n_logit_rows] valid until the next step but one
// On a device two steps may be under way: the turn (0 or 1) of the one queued last, and what the last step of a turn
// chose. A step waits for the one before the last.
unsigned run_turn(const struct run *run);
const struct greedy_choice *run_choices_of(struct run *run, unsigned turn);
// Puts K and V [batch->n_tokens, n_kv_heads * head_dim], host memory, into one layer's pages, as a step would.
void run_store_kv(struct run *run, struct kv_layer *layer, const struct batch *batch, const float *k, const float *v);
bool run_error(struct run *run, struct error *err); // false, and why, when the run's device has failed

#endif
