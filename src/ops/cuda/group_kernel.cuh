// group_kernel.cuh: products for many tokens by Hopper's asynchronous matrix instructions: the kernel, for any kind of
// weights (products.cuh); how a slice of them is multiplied is the consumer's, which groups.cu has for bf16 and
// group_quantised.cu for the others.
//
// Four warps of a block (the producers) have copies run ahead through rings of stages, a slice of the tile's rows, or
// of its tokens, each; groups of four warps (the consumers) multiply. Weights go from shared memory to registers, in
// whose order they are stored; tokens are read from shared memory by the instruction itself, and are packed for it.
#ifndef TANDEM_OPS_CUDA_GROUP_KERNEL_CUH
#define TANDEM_OPS_CUDA_GROUP_KERNEL_CUH

#include "ops/cuda/groups.cuh"
#include "ops/cuda/packed.cuh"
#include "ops/cuda/products.cuh"

enum { HALF = PACKED_COLUMNS, HALF_BYTES = PACKED_BYTES, K_STEP = MATRIX_BYTES, COLUMN_STEP = HALF_BYTES };
enum { PRODUCERS = 4, HALF_PRODUCERS = 2 }; // warps; of each kind, where rings are apart

// WM groups of 64 rows times WN groups of C chains of N tokens. The producer is a group, too, which gives registers
// away: consumers need more than all threads can have alike.
// A stage holds a slice, of weights or of tokens: copies of less than 2 KB take the time of longer ones. Weights may be
// more stages ahead (AHEAD), for they are asked for before the tokens are there; a tile of several chains has one ring
// of both, where less is to be waited for. Where blocks share a tile, each keeps the sums of up to HELD slices.
template <typename W_, int WM_, int WN_, int C_, int N_, int AHEAD_, int STAGES_, int HELD_ = 0> struct group_shape {
    using W = W_;
    static constexpr int WM = WM_, WN = WN_, C = C_, N = N_, AHEAD = AHEAD_, STAGES = STAGES_, HELD = HELD_;
    static constexpr int UNITS = 8 * WM, ROWS = 64 * WM, TOKENS = WN * C * N, TOKEN_UNITS = TOKENS / 8;
    static constexpr int UNIT_BYTES = W::RECORD, TOKEN_BYTES = TOKEN_UNITS * HALF_BYTES; // of a half
    static constexpr int WEIGHT_STAGE = UNITS * UNIT_BYTES, TOKEN_STAGE = 2 * TOKEN_BYTES, WARPS = 4 * WM * WN;
    static constexpr int STAGE = WEIGHT_STAGE + TOKEN_STAGE, THREADS = WARPS * 32 + 128;
    static constexpr int REGISTERS = WARPS == 4 ? 208 : 232, PRODUCER_REGISTERS = 40;
    static constexpr int BARRIERS = 2 * (AHEAD + STAGES) + 1;
    static constexpr bool APART = C == 1; // rings
    static_assert(APART || AHEAD == STAGES, "a ring of both");
    static constexpr int WEIGHTS_AT = 256, TOKENS_AT = WEIGHTS_AT + AHEAD * WEIGHT_STAGE;
    static constexpr int STAGED_AT = TOKENS_AT + STAGES * TOKEN_STAGE, SUMS = WARPS * N * 16 * (int)sizeof(float);
    static constexpr int HELD_AT = STAGED_AT + SUMS, INBOX_AT = HELD_AT + HELD * SUMS;
    static constexpr int SHARED = HELD > 0 ? INBOX_AT + SUMS : HELD_AT;
    static_assert(BARRIERS * 8 <= WEIGHTS_AT, "barriers");
    static constexpr int BLOCKS = WARPS == 4 && SHARED <= 113 * 1024 ? 2 : 1; // an SM shall hold
    static constexpr int LEAST_BLOCKS = WARPS == 4 ? 2 : 1;                   // for which it has registers
    static_assert(BLOCKS * SHARED <= 226 * 1024, "shared memory");
};

// What becomes of a tile's sums where all of its rows exist and none has a bias (results.cuh): PLAIN and QKV; RESIDUAL;
// GATE_UP, packed alone; QKV where K and V are stored at once (heads.cuh). And of all others.
enum ending { END_ANY, END_ROWS, END_ADDED, END_GATED, END_HEADS };

struct group_args {
    product_args p;
    enum product_mode mode;
    const unsigned char *tokens; // packed (packed.cuh)
    unsigned char *act;          // GATE_UP: where the result goes too, so packed and rounded; or NULL
    int token_units, row_tiles, token_tiles;
    int sharing; // blocks of a cluster, one after the other, which share a tile's slices; 1: one has them all
    size_t part; // 0: a tile's slices are added up. Else (PLAIN) each is apart, and its results lie so many floats
                 // behind the last one's (parts.cu)
    enum ending ending;
};

// Tiles of 128 rows by 256 tokens of bf16 weights (pieces.cu). Whether K and V have been stored (product_args.heads).
bool cuda_piece_product(struct cuda_state *s, const char *what, group_args &a, int rows);
void cuda_piece_setup(struct cuda_state *s);
// With weights of such a type (group_quantised.cu); whether it is one.
void cuda_group_quantised(struct cuda_state *s, const char *what, group_args &a, int rows, enum dtype type);
bool cuda_has_group_quantised(enum dtype type);

// ---- The product --------------------------------------------------------------------------------------------------

// Tiles are counted in bands of some tiles of tokens by all rows, within a band through the tokens first: blocks that
// run together share both weights and tokens, and those of few tiles stay in the cache.
enum { BAND = 8 };

static __device__ __forceinline__ int row_tile(const group_args &a, int tile) {
    int first = tile / (BAND * a.row_tiles) * BAND;
    return (tile - first * a.row_tiles) / min((int)BAND, a.token_tiles - first);
}

static __device__ __forceinline__ int token_tile(const group_args &a, int tile) {
    int first = tile / (BAND * a.row_tiles) * BAND;
    return first + (tile - first * a.row_tiles) % min((int)BAND, a.token_tiles - first);
}

static __host__ __device__ __forceinline__ int all_slices(const group_args &a) {
    return a.p.columns / SLICE;
}

// Pieces of work: a tile, or some of its slices.
static __host__ __device__ __forceinline__ int all_pieces(const group_args &a) {
    return a.row_tiles * a.token_tiles * (a.part ? all_slices(a) : a.sharing);
}

struct piece_of_work {
    int row, token, first, n, rank; // which tile of rows, and of tokens; its first slice, and how many
};

// Slices apart come last. A whole tile shall wait for no more divisions than it needs: every one takes some 100 cycles.
static __device__ __forceinline__ piece_of_work piece_at(const group_args &a, int index) {
    int all = all_slices(a), tile = index, rank = 0, first = 0, n = all;
    if (a.part) {
        int tiles = a.row_tiles * a.token_tiles;
        tile = index % tiles;
        rank = first = index / tiles;
        n = 1;
    } else if (a.sharing > 1) {
        tile = index / a.sharing;
        rank = index % a.sharing;
        first = all * rank / a.sharing;
        n = all * (rank + 1) / a.sharing - first;
    }
    return {row_tile(a, tile), token_tile(a, tile), first, n, rank};
}

// Two rings in shared memory, each with barriers for what has come and for what has been read; or one, whose barriers
// both names are for. Every lane of a warp says that it has read a stage, which costs nothing: what lanes have read
// before a __syncwarp and one lane's arrival, compute-sanitizer's racecheck takes for a race.
template <class S> struct ring {
    unsigned char *shared;
    uint64_t *weights_full, *weights_empty; // [AHEAD]
    uint64_t *tokens_full, *tokens_empty;   // [STAGES]
    uint64_t *inbox;                        // of sums from the cluster's block before

    __device__ __forceinline__ unsigned char *weights(int stage) const {
        return shared + S::WEIGHTS_AT + stage * S::WEIGHT_STAGE;
    }

    __device__ __forceinline__ unsigned char *tokens(int stage) const {
        return shared + S::TOKENS_AT + stage * S::TOKEN_STAGE;
    }
};

// A place in a ring of N stages.
struct position {
    int stage, round;

    template <int N> __device__ __forceinline__ void advance() {
        if (++stage == N) stage = 0, round++;
    }
};

template <typename W>
static __device__ __forceinline__ const unsigned char *unit_of(const group_args &a, int pair, int odd) {
    if (a.mode == PRODUCT_GATE_UP) return pair_unit<W, PRODUCT_GATE_UP>(a.p, pair, odd);
    if (a.mode == PRODUCT_QKV) return pair_unit<W, PRODUCT_QKV>(a.p, pair, odd);
    return pair_unit<W, PRODUCT_PLAIN>(a.p, pair, odd);
}

// Half of the producer warps ask for weights, each for its share of every stage's units: a warp's lanes ask for copies
// one after the other, which takes longer than the copies where a single warp asks for all. They need not wait for the
// kernel before.
template <class S>
static __device__ __forceinline__ void produce_weights(const group_args &a, const ring<S> &r, int part, int lane) {
    constexpr int UNITS = S::UNITS / HALF_PRODUCERS;
    int n_pieces = all_pieces(a), mine = part * UNITS + lane;
    position at = {0, 0};
    for (int i = (int)blockIdx.x; i < n_pieces; i += (int)gridDim.x) {
        piece_of_work w = piece_at(a, i);
        const unsigned char *unit =
            unit_of<typename S::W>(a, w.row * (S::UNITS / 2) + mine / 2, mine % 2) + (size_t)w.first * S::UNIT_BYTES;
        for (int k = 0; k < w.n; k++, unit += S::UNIT_BYTES) {
            uint64_t *full = &r.weights_full[at.stage];
            if (at.round > 0) barrier_wait(&r.weights_empty[at.stage], (uint32_t)(at.round - 1) & 1);
            if (lane == 0) barrier_expect(full, S::WEIGHT_STAGE / HALF_PRODUCERS);
            __syncwarp();
            if (lane < UNITS) bulk_copy(r.weights(at.stage) + mine * S::UNIT_BYTES, unit, S::UNIT_BYTES, full);
            at.advance<S::AHEAD>();
        }
    }
}

// The others ask for tokens, each for half of a slice's columns.
template <class S>
static __device__ __forceinline__ void produce_tokens(const group_args &a, const ring<S> &r, int half, int lane) {
    int n_pieces = all_pieces(a);
    size_t step = 2 * (size_t)a.token_units * HALF_BYTES;
    position at = {0, 0};
    dependency_wait();
    if (lane > 0) return;
    for (int i = (int)blockIdx.x; i < n_pieces; i += (int)gridDim.x) {
        piece_of_work w = piece_at(a, i);
        const unsigned char *tokens =
            a.tokens + (size_t)w.token * S::TOKEN_BYTES + (size_t)half * step / 2 + (size_t)w.first * step;
        for (int k = 0; k < w.n; k++, tokens += step) {
            uint64_t *full = &r.tokens_full[at.stage];
            if (at.round > 0) barrier_wait(&r.tokens_empty[at.stage], (uint32_t)(at.round - 1) & 1);
            barrier_expect(full, S::TOKEN_BYTES);
            bulk_copy(r.tokens(at.stage) + half * S::TOKEN_BYTES, tokens, S::TOKEN_BYTES, full);
            at.advance<S::STAGES>();
        }
    }
}

// Where weights and tokens have one ring, a warp asks for its quarter of every stage; weights of the first stages are
// asked for before the kernel before has ended.
template <class S>
static __device__ __forceinline__ void produce_both(const group_args &a, const ring<S> &r, int quarter, int lane) {
    constexpr int UNITS = S::UNITS / PRODUCERS, PIECE = S::TOKEN_STAGE / PRODUCERS;
    int n_pieces = all_pieces(a), mine = quarter * UNITS + lane, filled = 0;
    int ahead = min((int)S::STAGES, piece_at(a, (int)blockIdx.x).n);
    int part = quarter * PIECE; // of a stage's tokens, whose halves lie apart in memory
    size_t half = (size_t)a.token_units * HALF_BYTES;
    position at = {0, 0};
    auto ask = [&](int stage, const unsigned char *unit) {
        if (lane == 0) barrier_expect(&r.tokens_full[stage], (S::WEIGHT_STAGE + S::TOKEN_STAGE) / PRODUCERS);
        __syncwarp();
        if (lane < UNITS)
            bulk_copy(r.weights(stage) + mine * S::UNIT_BYTES, unit, S::UNIT_BYTES, &r.tokens_full[stage]);
    };
    for (int i = (int)blockIdx.x; i < n_pieces; i += (int)gridDim.x) {
        piece_of_work w = piece_at(a, i);
        const unsigned char *unit =
            unit_of<typename S::W>(a, w.row * (S::UNITS / 2) + mine / 2, mine % 2) + (size_t)w.first * S::UNIT_BYTES;
        const unsigned char *tokens = a.tokens + (size_t)w.token * S::TOKEN_BYTES + (size_t)w.first * 2 * half +
                                      part / S::TOKEN_BYTES * half + part % S::TOKEN_BYTES;
        for (int k = 0; k < w.n; k++, filled++, unit += S::UNIT_BYTES, tokens += 2 * half) {
            if (filled == 0) {
                for (int stage = 0; stage < ahead; stage++) ask(stage, unit + stage * S::UNIT_BYTES);
                dependency_wait();
            }
            if (filled >= ahead) {
                if (at.round > 0) barrier_wait(&r.tokens_empty[at.stage], (uint32_t)(at.round - 1) & 1);
                ask(at.stage, unit);
            }
            if (lane == 31) bulk_copy(r.tokens(at.stage) + part, tokens, PIECE, &r.tokens_full[at.stage]);
            at.advance<S::STAGES>();
        }
    }
}

// Which part of a tile a warp has.
struct part {
    int wm, wn, warp, lane;
};

// ---- Results ------------------------------------------------------------------------------------------------------
// They pass through shared memory, a chain of a warp at a time: [N tokens][16 rows], so that one short piece of code,
// which need not be fetched anew for every register, writes rows' neighbours together. Four rows stand at `place`.

static __device__ __forceinline__ int place(int token, int quad) {
    return token * 4 + (quad ^ (token / 4 % 2 * 2)); // against bank conflicts
}

template <int N>
static __device__ __forceinline__ void put_chain(float *staged, const float (&total)[N / 2], int g, int t) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        int token = i / 4 * 8 + 2 * t + i % 2, row = g + i / 2 % 2 * 8;
        staged[place(token, row / 4) * 4 + row % 4] = total[i];
    }
}

static __device__ __forceinline__ float4 add4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Four rows' results to memory, of which the first `n` exist; `whole`: all four, and aligned.
static __device__ __forceinline__ void put_rows(float *to, float4 v, int n, bool whole) {
    if (whole) {
        *reinterpret_cast<float4 *>(to) = v;
        return;
    }
    if (n > 0) to[0] = v.x;
    if (n > 1) to[1] = v.y;
    if (n > 2) to[2] = v.z;
    if (n > 3) to[3] = v.w;
}

static __device__ __forceinline__ float4 take_rows(const float *from, int n, bool whole) {
    if (whole) return *reinterpret_cast<const float4 *>(from);
    return make_float4(n > 0 ? from[0] : 0.0f, n > 1 ? from[1] : 0.0f, n > 2 ? from[2] : 0.0f, n > 3 ? from[3] : 0.0f);
}

// A warp's finished sums of pair `pair` and a chain's tokens from `token` on; `part`: floats to where a part of them
// begins.
template <int N>
static __device__ __forceinline__ void finish_chain(const group_args &a, const float *staged, size_t part, int pair,
                                                    int token, int lane) {
    const product_args &p = a.p;
    const float4 *quads = reinterpret_cast<const float4 *>(staged);
    if (a.mode == PRODUCT_GATE_UP) {
        int column = pair * 8 + lane % 2 * 4, n = p.n_out[0] - column;
        bool whole = n >= 4 && p.n_out[0] % 4 == 0;
#pragma unroll 2
        for (int i = lane / 2; i < N; i += 16) {
            float4 gate = quads[place(i, lane % 2)], up = quads[place(i, lane % 2 + 2)];
            if (token + i >= p.n_tokens || n <= 0) continue;
            float4 v = make_float4(silu_mul(gate.x, up.x), silu_mul(gate.y, up.y), silu_mul(gate.z, up.z),
                                   silu_mul(gate.w, up.w));
            if (p.y[0]) put_rows(p.y[0] + (size_t)(token + i) * p.n_out[0] + column, v, n, whole);
            if (a.act)
                *reinterpret_cast<uint2 *>(a.act + packed_at(token + i, column, a.token_units)) =
                    make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
        }
        return;
    }
    int segment = 0;
    if (a.mode == PRODUCT_QKV)
        while (segment < 2 && pair >= p.n_pairs[segment]) pair -= p.n_pairs[segment++];
    int n_out = p.n_out[segment], row = pair * 16 + lane % 4 * 4, n = n_out - row;
    bool whole = n >= 4 && n_out % 4 == 0, has_bias = p.b[segment] != NULL;
    float *to = p.y[segment] + part + (size_t)(token + lane / 4) * n_out + row;
    if (n <= 0) return;
    float4 before[N / 8]; // all asked for before the first is used
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
        bool real = a.mode == PRODUCT_RESIDUAL && token + lane / 4 + i * 8 < p.n_tokens;
        before[i] = take_rows(real ? to + (size_t)(i * 8) * n_out : NULL, real ? n : 0, real && whole);
        if (has_bias) before[i] = take_rows(p.b[segment] + row, n, false);
    }
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
        float4 v = quads[place(lane / 4 + i * 8, lane % 4)];
        if (token + lane / 4 + i * 8 >= p.n_tokens) continue;
        if (a.mode == PRODUCT_RESIDUAL || has_bias) v = add4(before[i], v);
        put_rows(to + (size_t)(i * 8) * n_out, v, n, whole);
    }
}

// A warp's finished piece of work, chain after chain.
template <class S>
static __device__ __forceinline__ void finish_tile(const group_args &a, const ring<S> &r, const piece_of_work &w,
                                                   int thread, const float (&total)[S::C][S::N / 2]) {
    int from = opaque(thread), pair = w.row * (S::UNITS / 2) + from / 128 % S::WM * 4 + from / 32 % 4;
    int token = w.token * S::TOKENS + from / 128 / S::WM * S::C * S::N;
    float *staged = reinterpret_cast<float *>(r.shared + S::STAGED_AT) + from / 32 * S::N * 16;
    size_t part = (size_t)w.first * a.part;
#pragma unroll 1
    for (int c = 0; c < S::C; c++) {
#pragma unroll
        for (int k = 0; k < S::C; k++)
            if (k == c) put_chain<S::N>(staged, total[k], from % 32 / 4, from % 4);
        __syncwarp();
        finish_chain<S::N>(a, staged, part, pair, token + c * S::N, from % 32);
        __syncwarp();
    }
}

template <class S, class CONSUMER>
static __global__ void __launch_bounds__(S::THREADS, S::LEAST_BLOCKS) k_group(group_args a) {
#if HOPPER
    DYNAMIC_SHARED(shared);
    int thread = (int)threadIdx.x, warp = thread / 32;
    uint64_t *bar = reinterpret_cast<uint64_t *>(shared), *tokens = bar + 2 * S::AHEAD;
    ring<S> r = {shared, bar, bar + S::AHEAD, tokens, tokens + S::STAGES, tokens + 2 * S::STAGES};
    if (!S::APART) r.weights_full = r.tokens_full, r.weights_empty = r.tokens_empty;
    if (thread == 0) {
        for (int i = 0; S::APART && i < S::AHEAD; i++) {
            barrier_init_for(&r.weights_full[i], HALF_PRODUCERS);
            barrier_init_for(&r.weights_empty[i], 32 * S::WARPS);
        }
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init_for(&r.tokens_full[i], S::APART ? HALF_PRODUCERS : PRODUCERS);
            barrier_init_for(&r.tokens_empty[i], 32 * S::WARPS);
        }
        barrier_init(r.inbox);
        barrier_fence();
        if (S::HELD > 0 && blockIdx.x % (unsigned)a.sharing > 0) barrier_expect(r.inbox, S::SUMS);
    }
    if (S::HELD > 0) cluster_sync(); // the others' barriers are there
    else __syncthreads();
    dependents_may_start();
    if (warp >= S::WARPS) {
        int which = warp - S::WARPS, lane = thread % 32;
        registers_down<S::PRODUCER_REGISTERS>();
        if constexpr (!S::APART) produce_both<S>(a, r, which, lane);
        else if (which < HALF_PRODUCERS) produce_weights<S>(a, r, which, lane);
        else produce_tokens<S>(a, r, which - HALF_PRODUCERS, lane);
    } else {
        registers_up<S::REGISTERS>();
        dependency_wait();
        CONSUMER::template run<S>(a, r, thread);
    }
#endif
}

#endif
