// group_kernel.cuh: products for many tokens by Hopper's asynchronous matrix instructions: the kernel, for any kind of
// weights (products.cuh); how a slice of them is multiplied is the consumer's, which groups.cu has for bf16 and
// group_quantised.cu for the others.
//
// Four warps of a block (the producers) have copies run ahead through a ring of stages, a slice of the tile's rows and
// tokens each; groups of four warps (the consumers) multiply. Weights go from shared memory to
// registers, in whose order they are stored; tokens are read from shared memory by the instruction itself, and are
// packed for it.
#ifndef TANDEM_OPS_CUDA_GROUP_KERNEL_CUH
#define TANDEM_OPS_CUDA_GROUP_KERNEL_CUH

#include "ops/cuda/groups.cuh"
#include "ops/cuda/packed.cuh"
#include "ops/cuda/products.cuh"

enum { HALF = PACKED_COLUMNS, HALF_BYTES = PACKED_BYTES, K_STEP = MATRIX_BYTES, COLUMN_STEP = HALF_BYTES };
enum { PRODUCERS = 4 }; // warps

// WM groups of 64 rows times WN groups of C chains of N tokens. The producer is a group, too, which gives registers
// away: consumers need more than all threads can have alike.
// A stage holds a slice: copies of less than 2 KB take the time of longer ones.
template <typename W_, int WM_, int WN_, int C_, int N_, int STAGES_> struct group_shape {
    using W = W_;
    static constexpr int WM = WM_, WN = WN_, C = C_, N = N_, STAGES = STAGES_;
    static constexpr int UNITS = 8 * WM, ROWS = 64 * WM, TOKENS = WN * C * N, TOKEN_UNITS = TOKENS / 8;
    static constexpr int UNIT_BYTES = W::RECORD, TOKEN_BYTES = TOKEN_UNITS * HALF_BYTES; // of a half
    static constexpr int STAGE = UNITS * UNIT_BYTES + 2 * TOKEN_BYTES, WARPS = 4 * WM * WN;
    static constexpr int THREADS = WARPS * 32 + 128;
    static constexpr int BLOCKS = WARPS == 4 ? 2 : 1; // an SM shall hold
    static constexpr int REGISTERS = WARPS == 4 ? 208 : 232, PRODUCER_REGISTERS = 40;
    static constexpr int SHARED = STAGE * STAGES + WARPS * N * 16 * (int)sizeof(float);
    static_assert(BLOCKS * SHARED <= 226 * 1024, "shared memory");
};

struct group_args {
    product_args p;
    enum product_mode mode;
    const unsigned char *tokens; // packed (packed.cuh)
    unsigned char *act;          // GATE_UP: where the result goes too, so packed and rounded; or NULL
    int token_units, row_tiles, token_tiles;
};

// Tiles of 128 rows by 256 tokens of bf16 weights (pieces.cu).
void cuda_piece_product(struct cuda_state *s, const char *what, group_args &a, int rows);
void cuda_piece_setup(struct cuda_state *s);
// With weights of such a type (group_quantised.cu); whether it is one.
void cuda_group_quantised(struct cuda_state *s, const char *what, group_args &a, int rows, enum dtype type);
bool cuda_has_group_quantised(enum dtype type);

// ---- The product
// -----------------------------------------------------------------------------------------------------

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

template <class S> struct ring {
    unsigned char *stages;
    uint64_t *full, *empty; // [STAGES]
};

template <typename W>
static __device__ __forceinline__ const unsigned char *unit_of(const group_args &a, int pair, int odd) {
    if (a.mode == PRODUCT_GATE_UP) return pair_unit<W, PRODUCT_GATE_UP>(a.p, pair, odd);
    if (a.mode == PRODUCT_QKV) return pair_unit<W, PRODUCT_QKV>(a.p, pair, odd);
    return pair_unit<W, PRODUCT_PLAIN>(a.p, pair, odd);
}

// A producer warp: its quarter of every stage. A warp's lanes ask for copies one after the other, which takes longer
// than the copies where a single warp asks for all. Weights of the first stages are asked for before the kernel before
// has ended.
template <class S>
static __device__ __forceinline__ void produce(const group_args &a, const ring<S> &r, int quarter, int lane) {
    constexpr int UNITS = S::UNITS / PRODUCERS, PIECE = S::TOKEN_BYTES * 2 / PRODUCERS;
    int steps = a.p.columns / SLICE, n_tiles = a.row_tiles * a.token_tiles;
    int stage = 0, round = 0, filled = 0, ahead = min((int)S::STAGES, steps), mine = quarter * UNITS + lane;
    int piece = quarter * PIECE; // of a stage's tokens, whose halves lie apart in memory
    size_t half_bytes = (size_t)a.token_units * HALF_BYTES;
    unsigned char *weights_to = r.stages + mine * S::UNIT_BYTES;
    unsigned char *tokens_to = r.stages + S::UNITS * S::UNIT_BYTES + piece;
    for (int tile = (int)blockIdx.x; tile < n_tiles; tile += (int)gridDim.x) {
        const unsigned char *unit = unit_of<typename S::W>(a, row_tile(a, tile) * (S::UNITS / 2) + mine / 2, mine % 2);
        const unsigned char *tokens = a.tokens + (size_t)token_tile(a, tile) * S::TOKEN_BYTES +
                                      piece / S::TOKEN_BYTES * half_bytes + piece % S::TOKEN_BYTES;
        for (int h = 0; h < steps; h++, filled++) {
            if (filled == 0) { // weights of `ahead` stages, then the wait for the tokens
                for (int i = 0; i < ahead; i++) {
                    if (lane == 0) barrier_expect(&r.full[i], S::STAGE / PRODUCERS);
                    __syncwarp();
                    if (lane < UNITS)
                        bulk_copy(weights_to + i * S::STAGE, unit + i * S::UNIT_BYTES, S::UNIT_BYTES, &r.full[i]);
                }
                dependency_wait();
            }
            if (filled >= ahead) {
                if (round > 0) barrier_wait(&r.empty[stage], (uint32_t)(round - 1) & 1);
                if (lane == 0) barrier_expect(&r.full[stage], S::STAGE / PRODUCERS);
                __syncwarp();
                if (lane < UNITS)
                    bulk_copy(weights_to + stage * S::STAGE, unit + h * S::UNIT_BYTES, S::UNIT_BYTES, &r.full[stage]);
            }
            if (lane == 31)
                bulk_copy(tokens_to + stage * S::STAGE, tokens + (size_t)h * 2 * half_bytes, PIECE, &r.full[stage]);
            if (++stage == S::STAGES) stage = 0, round++;
        }
    }
}

// A consumer's view of its ring: the next stage to be waited for, and the next to be given back.
struct position {
    int stage, round;
};

template <class S> static __device__ __forceinline__ void advance(position &at) {
    if (++at.stage == S::STAGES) at.stage = 0, at.round++;
}

// Which part of a tile a warp has.
struct part {
    int wm, wn, warp, lane;
};

// ---- Results
// ---------------------------------------------------------------------------------------------------------
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

// A warp's finished sums of pair `pair` and a chain's tokens from `token` on.
template <int N>
static __device__ __forceinline__ void finish_chain(const group_args &a, const float *staged, int pair, int token,
                                                    int lane) {
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
    float *to = p.y[segment] + (size_t)(token + lane / 4) * n_out + row;
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

// A warp's finished tile, chain after chain.
template <class S>
static __device__ __forceinline__ void finish_tile(const group_args &a, const ring<S> &r, int tile, int thread,
                                                   const float (&total)[S::C][S::N / 2]) {
    int from = opaque(thread), pair = row_tile(a, tile) * (S::UNITS / 2) + from / 128 % S::WM * 4 + from / 32 % 4;
    int token = token_tile(a, tile) * S::TOKENS + from / 128 / S::WM * S::C * S::N;
    float *staged = reinterpret_cast<float *>(r.stages + S::STAGE * S::STAGES) + from / 32 * S::N * 16;
#pragma unroll 1
    for (int c = 0; c < S::C; c++) {
#pragma unroll
        for (int k = 0; k < S::C; k++)
            if (k == c) put_chain<S::N>(staged, total[k], from % 32 / 4, from % 4);
        __syncwarp();
        finish_chain<S::N>(a, staged, pair, token + c * S::N, from % 32);
        __syncwarp();
    }
}

template <class S, class CONSUMER>
static __global__ void __launch_bounds__(S::THREADS, S::BLOCKS) k_group(group_args a) {
#if HOPPER
    DYNAMIC_SHARED(shared);
    __shared__ __align__(8) uint64_t full[S::STAGES], empty[S::STAGES];
    int thread = (int)threadIdx.x, warp = thread / 32;
    ring<S> r = {shared, full, empty};
    if (thread == 0) {
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init_for(&full[i], PRODUCERS);
            barrier_init_for(&empty[i], S::WARPS);
        }
        barrier_fence();
    }
    __syncthreads();
    dependents_may_start();
    if (warp >= S::WARPS) {
        registers_down<S::PRODUCER_REGISTERS>();
        produce<S>(a, r, warp - S::WARPS, thread % 32);
    } else {
        registers_up<S::REGISTERS>();
        dependency_wait();
        CONSUMER::template run<S>(a, r, thread);
    }
#endif
}

#endif
