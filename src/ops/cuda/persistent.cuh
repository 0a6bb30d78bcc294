// persistent.cuh: what the kernel of all layers (persistent.cu) is given, and its shared memory.
#ifndef TANDEM_OPS_CUDA_PERSISTENT_CUH
#define TANDEM_OPS_CUDA_PERSISTENT_CUH

#include "ops/cuda/attention.cuh"
#include "ops/cuda/choice.cuh"
#include "ops/cuda/products.cuh"
#include "ops/cuda/quantised.cuh"

enum {
    CLUSTER = 8,        // blocks; rank r owns columns 128 r .. 128 r + 127 of x
    MOST_CLUSTERS = 16, // the first n_kv_heads of them have a KV head each
    WORKERS = 256,
    WORKER_WARPS = WORKERS / 32,
    PERSISTENT_THREADS = WORKERS + 128, // and four warps that fetch or work beside; registers go by such groups
    FETCHERS = 3,                       // of these: to ask for one slot's bytes takes a warp 400 to 800 cycles
    WORKER_REGISTERS = 184,             // where 168 do not suffice
    FETCHER_REGISTERS = 136,
    OWN_ROWS = 128,
    MOST_HIDDEN = CLUSTER * OWN_ROWS,
    HEAD = 128, // head_dim
    MOST_GROUP = 2,
    MOST_LAYERS = 40,
    NUMBERED_LAYERS = 64,                                  // of a launch
    MOST_PAGES = 128,                                      // of a block: every eighth chunk's
    MOST_CHUNKS = MOST_PAGES / (int)CHUNK_PAGES * CLUSTER, // of a context: 32,768 positions
    WINDOW = 72,                                           // chunks that are collected at once
    COLLECTED = 32,                                        // channels that a block collects of every chunk
    CHUNK_NOTES = MOST_GROUP * (HEAD + 2),                 // what is noted of a chunk: o, units and sums
    Q_NOTES = MOST_GROUP * HEAD / 2,                       // two values each
    HEAD_NOTES = Q_NOTES + MOST_CHUNKS * CHUNK_NOTES,      // of a KV head: q, the chunks
    LAYER_CYCLES = 12000, // over which a block's copies of a layer's bf16 weights are spread
    MOST_SHARE = 4,       // slices of n_ff of one cluster
    SLOT_BYTES = 16 * 1024,
    N_SLOTS = 11,
    MOST_STEPS = 2 * MOST_GROUP + 4 + 2 * MOST_GROUP + 6 * MOST_SHARE,
    BOARD_ROWS = WORKER_WARPS, // a sum's rows on the board are a multiple of them
    WATCHED = 3,               // rows that a warp waits for at once
};
static_assert((int)NORM_WARPS == (int)WORKER_WARPS && (int)NORM_WARPS == (int)CLUSTER,
              "a warp of the norm's order is a rank's columns");

enum weight { W_Q, W_K, W_V, W_OUT, W_GATE, W_UP, W_DOWN, N_WEIGHTS };

// How blocks attend to a context: a chunk each; or several, each at its own pace, and with others' help. A kernel for
// each: instructions that a layer skips cost time, too.
enum pace { ONE_CHUNK, OWN_PACE };

// In half-layers' order, attention's first.
struct persistent_layer {
    const unsigned char *w[N_WEIGHTS]; // in units
    const float *norm[2];              // before attention, before the MLP
    const float *head_norm[2];         // q's, k's
    const float *bias[3];              // q's, k's, v's
    unsigned char *kv[2];              // bf16
};

// The beginning of a step in the same kernel, table NULL: in one before it.
struct persistent_opening {
    const unsigned char *table; // the embedding, in units
    const int32_t *chosen;
    int32_t token, position;        // token < 0: chosen[~token], or best's
    const unsigned long long *best; // the key of what the step before chose (choice.cuh); NULL: it stands in chosen
    const float *rope;              // [positions, HEAD]
    const int32_t *staged;          // [n_words] to `arrays`
    int32_t *arrays;
    int n_words, columns;
};

struct persistent_args {
    batch_view b;
    persistent_opening open;
    float *x;             // [hidden]
    const float *cos_sin; // [HEAD]
    // What clusters tell each other: [2][n_layers][heads' rows + n_ff slices' rows][MOST_HIDDEN] sums of one slice of
    // out's or down's columns; both numbers of rows are rounded up to BOARD_ROWS, with rows of -0. A word is EMPTY
    // until it is written: a launch writes one half, and empties what the launch before wrote in the other.
    uint32_t *board;
    // [n_kv_heads][HEAD_NOTES] what blocks tell each other about a deep context: a word each, and above it the number
    // of the launch and the layer.
    uint64_t *notes;
    uint32_t *launches; // whose last bit is the half
    unsigned *alarm;    // on the host: set when a wait took too long
    int n_layers, hidden, n_ff, n_kv_heads;
    choice_work choice;                   // of the step before, to be made beside
    unsigned long long *best;             // of this step, to be set to 0 before its head; or NULL
    int n_helpers;                        // blocks of clusters without a KV head that attend, too, for each KV head
    bool is_biased, is_normed;            // some layer of the former kind; all heads of all layers of the latter
    float eps, scale;                     // scale: times log2 e
    short first_slice[MOST_CLUSTERS + 1]; // of n_ff: each cluster's first; the next one's
    persistent_layer layer[MOST_LAYERS];
};

// The pages of a step that opens itself.
template <enum pace PACE> struct persistent_pages {
    static constexpr int MOST = PACE == ONE_CHUNK ? CLUSTER * (int)CHUNK_PAGES : CLUSTER * (int)MOST_PAGES;
    int id[MOST];
};

// A chunk's result: attention.cuh's partial.
struct chunk_result {
    float o[MOST_GROUP * HEAD]; // in the order of chain_chunks
    float4 state[MOST_GROUP];   // unit, sum
};

// Some channels of many chunks.
struct collection {
    float o[WINDOW][COLLECTED];
    float2 state[WINDOW]; // of their row
};

// A slot of weights: n pieces of `bytes`, `stride` bytes apart, from `from` on.
struct fetch_step {
    uint32_t from, stride, bytes;
    uint16_t n, weight;
};

// The chunks that a block attends to: n, chunks first, first + step, ... before end, of KV head `head`, whose first
// `helped` ones are dealt to others than the blocks of its cluster.
struct chunk_share {
    int head, first, step, end, n, helped;
};

struct persistent_shared {
    unsigned char ring[N_SLOTS][SLOT_BYTES];  // weights and pages, in the order of their use
    float x[MOST_HIDDEN];                     // pushed by all ranks
    float qkv[(MOST_GROUP + 2) * HEAD];       // pushed: q of the group's heads, k, v
    unsigned char act[MOST_SHARE][SLICE * 2]; // pushed: in put_inputs' order
    union {
        float sums[WATCHED * BOARD_ROWS][OWN_ROWS]; // from the board, between the products of two half-layers
        chunk_result chunk[CLUSTER];                // pushed
        collection window;
    };
    alignas(16) float norm[2][MOST_HIDDEN]; // the weights of half-layers in turns
    float head_norm[2][2][HEAD];            // of layers in turns; q's and k's
    unsigned char inputs[MOST_HIDDEN * 2];  // of a product, rounded, in put_inputs' order
    float cos_sin[HEAD];                    // of the token's position
    alignas(16) float own[OWN_ROWS];
    // As the matrix instruction takes them: q's rows, times attention's scale, rounded (of every 32 channels, lane t
    // has 2t, 2t + 1, 2t + 8, 2t + 9, ...), and pages' weights (slots alike), those of chunks in turns.
    uint4 q[MOST_GROUP][HEAD / 32][4], p[2][CHUNK_PAGES][MOST_GROUP][4];
    alignas(16) float unit[2][MOST_GROUP][CHUNK_PAGES]; // of p; NO_UNIT: no such page
    float part[NORM_WARPS][MOST_SHARE * 32];            // sums of slices of inputs
    alignas(16) float norm_sums[NORM_WARPS];            // pushed with x
    alignas(16) fetch_step steps[MOST_STEPS];           // of a layer
    int page[MOST_PAGES];                               // the ids of this rank's pages
    chunk_share share;
    uint32_t first_number; // of this launch's notes
    uint32_t settled;      // never read (settle)
    uint64_t full[N_SLOTS], empty[N_SLOTS];
    uint64_t x_arrived, qkv_arrived, chunks_arrived, act_arrived;
};

static_assert(!HOPPER || sizeof(persistent_shared) <= MAX_SHARED, "an SM's shared memory");
static_assert((int)MOST_LAYERS < (int)NUMBERED_LAYERS, "what notes are numbered by, all bits set at first");

#endif
