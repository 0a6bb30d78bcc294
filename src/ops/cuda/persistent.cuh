// persistent.cuh: what the kernel of all layers (persistent.cu) is given, and its shared memory.
#ifndef TANDEM_OPS_CUDA_PERSISTENT_CUH
#define TANDEM_OPS_CUDA_PERSISTENT_CUH

#include "ops/cuda/attention.cuh"
#include "ops/cuda/products.cuh"
#include "ops/cuda/quantised.cuh"

enum {
    CLUSTER = 8,        // blocks; rank r owns columns 128 r .. 128 r + 127 of x
    MOST_CLUSTERS = 16, // the first n_kv_heads of them have a KV head each
    WORKERS = 256,
    WORKER_WARPS = WORKERS / 32,
    PERSISTENT_THREADS = WORKERS + 32, // and a warp that fetches
    OWN_ROWS = 128,
    MOST_HIDDEN = CLUSTER * OWN_ROWS,
    HEAD = 128, // head_dim
    MOST_GROUP = 2,
    MOST_LAYERS = 40,
    MOST_CHUNKS = 16, // of a context: 4,096 positions
    MOST_SHARE = 4,   // slices of n_ff of one cluster
    SLOT_BYTES = 16 * 1024,
    N_SLOTS = 11,
};
static_assert((int)NORM_WARPS == (int)WORKER_WARPS && (int)NORM_WARPS == (int)CLUSTER,
              "a warp of the norm's order is a rank's columns");

struct persistent_layer {
    const unsigned char *wq, *wk, *wv, *wo, *gate, *up, *down; // in units
    const float *attn_norm, *mlp_norm, *q_norm, *k_norm, *bq, *bk, *bv;
    unsigned char *k, *v; // bf16
};

struct persistent_args {
    batch_view b;
    float *x;             // [hidden]
    const float *cos_sin; // [HEAD]
    // What clusters tell each other: [2][n_layers][n_heads + n_ff slices][MOST_HIDDEN] sums of one slice of out's or
    // down's columns. A word is EMPTY until it is written: a launch writes one half, and empties what the launch before
    // wrote in the other.
    uint32_t *board;
    uint32_t *launches; // whose last bit is the half
    unsigned *alarm;    // on the host: set when a wait took too long
    int n_layers, hidden, n_ff, n_kv_heads;
    float eps, scale;                     // scale: times log2 e
    short first_slice[MOST_CLUSTERS + 1]; // of n_ff: each cluster's first; the next one's
    persistent_layer layer[MOST_LAYERS];
};

// A chunk's result: attention.cuh's partial.
struct chunk_result {
    float o[MOST_GROUP * HEAD];
    float4 state[MOST_GROUP]; // maximum, sum
};

struct persistent_shared {
    unsigned char ring[N_SLOTS][SLOT_BYTES];  // weights and pages, in the order of their use
    float x[MOST_HIDDEN];                     // pushed by all ranks
    float qkv[(MOST_GROUP + 2) * HEAD];       // pushed: q of the group's heads, k, v
    unsigned char act[MOST_SHARE][SLICE * 2]; // pushed: in put_inputs' order
    union {
        chunk_result chunk[MOST_CHUNKS];  // pushed; no product is under way then
        float part[NORM_WARPS][2 * HEAD]; // sums of slices of inputs
    };
    unsigned char inputs[MOST_HIDDEN * 2]; // of a product, rounded, in put_inputs' order
    alignas(16) float own[OWN_ROWS];
    q_rows<HEAD> q;
    alignas(16) float o[CHUNK_PAGES][MOST_GROUP * HEAD];
    float max[CHUNK_PAGES][MOST_GROUP], sum[CHUNK_PAGES][MOST_GROUP];
    float head_norms[2][HEAD], cos_sin[HEAD]; // q's and k's
    float norm_sums[NORM_WARPS];              // pushed with x
    int page[MOST_CHUNKS];                    // the ids of this rank's pages
    uint64_t full[N_SLOTS], empty[N_SLOTS];
    uint64_t x_arrived, qkv_arrived, chunks_arrived, act_arrived;
};

#endif
