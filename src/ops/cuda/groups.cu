// groups.cu: products for many tokens by Hopper's asynchronous matrix instructions. It owns the kernels, their tiles
// and the choice among them; what a product is, and what happens around it, is products.cu's.
//
// Four warps of a block (the producers) have copies run ahead through a ring of stages, 64 columns of the tile's rows
// and tokens each; groups of four warps (the consumers) multiply. Weights go from shared memory to registers, in whose
// order they are stored; tokens are read from shared memory by the instruction itself, and are packed for it. A slice
// of 128 columns is one chain of eight instructions from +0; a finished chain is added to the total while the next one
// runs. The bits are those of products.cu's kernels.
#include "ops/cuda/groups.cuh"
#include "ops/cuda/products.cuh"

enum { HALF = SLICE / 2, HALF_BYTES = 8 * HALF * 2, K_STEP = 128, COLUMN_STEP = HALF_BYTES, MOST_TOKENS = 256 };

enum { PRODUCERS = 4 }; // warps

// Bytes that a last tile of tokens may read behind what is packed.
enum { BEYOND = 32 * 1024 };

// WM groups of 64 rows times WN groups of C chains of N tokens. The producer is a group, too, which gives registers
// away: consumers need more than all threads can have alike.
template <int WM_, int WN_, int C_, int N_, int STAGES_> struct group_shape {
    static constexpr int WM = WM_, WN = WN_, C = C_, N = N_, STAGES = STAGES_;
    static constexpr int UNITS = 8 * WM, ROWS = 64 * WM, TOKENS = WN * C * N, TOKEN_UNITS = TOKENS / 8;
    static constexpr int STAGE = (UNITS + TOKEN_UNITS) * HALF_BYTES, WARPS = 4 * WM * WN;
    static constexpr int THREADS = WARPS * 32 + 128;
    static constexpr int BLOCKS = WARPS == 4 ? 2 : 1; // an SM shall hold
    static constexpr int REGISTERS = WARPS == 4 ? 208 : 232, PRODUCER_REGISTERS = 40;
    static constexpr int SHARED = STAGE * STAGES + WARPS * N * 16 * (int)sizeof(float);
    static_assert(BLOCKS * SHARED <= 226 * 1024, "shared memory");
};

typedef group_shape<1, 1, 1, 32, 8> shape_64x32;
typedef group_shape<1, 1, 1, 64, 6> shape_64x64;
typedef group_shape<1, 2, 1, 64, 8> shape_64x128;
typedef group_shape<2, 1, 1, 64, 8> shape_128x64;
typedef group_shape<2, 1, 2, 64, 6> shape_128x128;
typedef group_shape<2, 1, 3, 64, 4> shape_128x192;
typedef group_shape<2, 1, 4, 64, 4> shape_128x256;

struct group_args {
    product_args p;
    enum product_mode mode;
    const unsigned char *tokens; // packed: [columns / 64][token_units][8 matrices of 8 tokens by 8 columns]
    unsigned char *act;          // GATE_UP: where the result goes too, so packed and rounded; or NULL
    int token_units, row_tiles, token_tiles;
};

static __host__ __device__ __forceinline__ size_t packed_at(int token, int column, int token_units) {
    return ((size_t)(column / HALF) * token_units + token / 8) * HALF_BYTES + column % HALF / 8 * K_STEP +
           token % 8 * 16 + column % 8 * 2;
}

// ---- Packing
// ---------------------------------------------------------------------------------------------------------

// A block a token: normed, or as it is, and rounded; columns up to a whole slice become zero.
template <bool NORM> static __global__ void k_pack_tokens(product_args p, unsigned char *packed, int token_units) {
    __shared__ float sums[NORM_WARPS];
    dependents_may_start();
    dependency_wait();
    int i = (int)blockIdx.x, thread = (int)threadIdx.x;
    const float *x = input_row(p, i);
    float r = 1.0f;
    if (NORM) {
        float s = norm_partial(x, p.n_in, thread);
        if (thread % 32 == 0) sums[thread / 32] = s;
        __syncthreads();
        r = norm_rate(sums, p.n_in, p.eps);
    }
    for (int k = 4 * thread; k < p.columns; k += 4 * NORM_THREADS) {
        float4 v = make_float4(0, 0, 0, 0);
        if (k < p.n_in) v = *reinterpret_cast<const float4 *>(x + k);
        if (NORM && k < p.n_in) {
            float4 n = *reinterpret_cast<const float4 *>(p.norm + k);
            v = make_float4(v.x * r * n.x, v.y * r * n.y, v.z * r * n.z, v.w * r * n.w);
        }
        *reinterpret_cast<uint2 *>(packed + packed_at(i, k, token_units)) =
            make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
    }
}

// ---- The product
// -----------------------------------------------------------------------------------------------------

// Tiles are counted through the tokens first: blocks that run together share weights.
static __device__ __forceinline__ int row_tile(const group_args &a, int tile) {
    return tile / a.token_tiles;
}

static __device__ __forceinline__ int token_tile(const group_args &a, int tile) {
    return tile % a.token_tiles;
}

template <class S> struct ring {
    unsigned char *stages;
    uint64_t *full, *empty; // [STAGES]
};

static __device__ __forceinline__ const unsigned char *unit_of(const group_args &a, int pair, int odd) {
    if (a.mode == PRODUCT_GATE_UP) return pair_unit<bf16_weights, PRODUCT_GATE_UP>(a.p, pair, odd);
    if (a.mode == PRODUCT_QKV) return pair_unit<bf16_weights, PRODUCT_QKV>(a.p, pair, odd);
    return pair_unit<bf16_weights, PRODUCT_PLAIN>(a.p, pair, odd);
}

// A producer warp: its quarter of every stage. A warp's lanes ask for copies one after the other, which takes longer
// than the copies where a single warp asks for all. Weights of the first stages are asked for before the kernel before
// has ended.
template <class S>
static __device__ __forceinline__ void produce(const group_args &a, const ring<S> &r, int quarter, int lane) {
    constexpr int UNITS = S::UNITS / PRODUCERS, TOKEN_BYTES = S::TOKEN_UNITS * HALF_BYTES / PRODUCERS;
    int halves = a.p.columns / HALF, n_tiles = a.row_tiles * a.token_tiles, stage = 0, round = 0, filled = 0;
    int ahead = min((int)S::STAGES, halves), mine = quarter * UNITS + lane;
    unsigned char *weights_to = r.stages + mine * HALF_BYTES;
    unsigned char *tokens_to = r.stages + S::UNITS * HALF_BYTES + quarter * TOKEN_BYTES;
    for (int tile = (int)blockIdx.x; tile < n_tiles; tile += (int)gridDim.x) {
        const unsigned char *unit = unit_of(a, row_tile(a, tile) * (S::UNITS / 2) + mine / 2, mine % 2);
        const unsigned char *tokens =
            a.tokens + (size_t)token_tile(a, tile) * S::TOKEN_UNITS * HALF_BYTES + quarter * TOKEN_BYTES;
        for (int h = 0; h < halves; h++, filled++) {
            if (filled == 0) { // weights of `ahead` stages, then the wait for the tokens
                for (int i = 0; i < ahead; i++) {
                    if (lane == 0) barrier_expect(&r.full[i], S::STAGE / PRODUCERS);
                    __syncwarp();
                    if (lane < UNITS)
                        bulk_copy(weights_to + i * S::STAGE, unit + i * HALF_BYTES, HALF_BYTES, &r.full[i]);
                }
                dependency_wait();
            }
            if (filled >= ahead) {
                if (round > 0) barrier_wait(&r.empty[stage], (uint32_t)(round - 1) & 1);
                if (lane == 0) barrier_expect(&r.full[stage], S::STAGE / PRODUCERS);
                __syncwarp();
                if (lane < UNITS)
                    bulk_copy(weights_to + stage * S::STAGE, unit + h * HALF_BYTES, HALF_BYTES, &r.full[stage]);
            }
            if (lane == 31)
                bulk_copy(tokens_to + stage * S::STAGE, tokens + (size_t)h * a.token_units * HALF_BYTES, TOKEN_BYTES,
                          &r.full[stage]);
            if (++stage == S::STAGES) stage = 0, round++;
        }
    }
}

// A consumer's view of its ring: the next half slice to be waited for, and the next to be given back.
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

// A slice's weights of this warp's 16 rows, as the instructions take them, and where its tokens are.
struct slice {
    uint32_t a[8][4];
    uint64_t tokens[2];
};

template <class S>
static __device__ __forceinline__ void load_slice(slice &s, const ring<S> &r, position &at, const part &part) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const unsigned char *stage = r.stages + at.stage * S::STAGE;
        const uint4 *weights =
            reinterpret_cast<const uint4 *>(stage + (part.wm * 8 + part.warp * 2) * HALF_BYTES) + part.lane;
        barrier_wait(&r.full[at.stage], (uint32_t)at.round & 1);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            uint4 u = weights[c * CHUNK_LANES], v = weights[c * CHUNK_LANES + HALF_BYTES / 16];
            uint32_t *a = s.a[half * 4 + c * 2];
            a[0] = u.x, a[1] = v.x, a[2] = u.y, a[3] = v.y;
            a[4] = u.z, a[5] = v.z, a[6] = u.w, a[7] = v.w;
        }
        s.tokens[half] =
            group_operand(stage + (S::UNITS + part.wn * S::C * S::N / 8) * HALF_BYTES, K_STEP, COLUMN_STEP);
        advance<S>(at);
    }
}

template <class S> static __device__ __forceinline__ void give_back(const ring<S> &r, position &at, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (lane == 0) barrier_arrive(&r.empty[at.stage]);
        advance<S>(at);
    }
}

// One chain: a slice of one of the group's chains of tokens.
template <class S> static __device__ __forceinline__ void multiply(float (&d)[S::N / 2], const slice &s, int chain) {
    group_fence();
#pragma unroll
    for (int k = 0; k < 8; k++)
        group_mma(d, s.a[k][0], s.a[k][1], s.a[k][2], s.a[k][3],
                  s.tokens[k / 4] + (uint64_t)((chain * (S::N / 8) * COLUMN_STEP + k % 4 * 2 * K_STEP) >> 4), k > 0);
    group_commit();
}

template <class S, int P>
static __device__ __forceinline__ void add_chain(float (&total)[S::N / 2], float (&d)[S::N / 2]) {
    group_wait<P>(d);
#pragma unroll
    for (int i = 0; i < S::N / 2; i++) total[i] += d[i];
}

// One slice; meanwhile the next one's weights are loaded. With a single chain a slice, it stays under way while the
// slice before is added.
template <class S>
static __device__ __forceinline__ void step(const ring<S> &r, float (&total)[S::C][S::N / 2], float (&d)[S::N / 2],
                                            float (&other)[S::N / 2], const slice &now, slice &following,
                                            position &next, position &last, bool more, bool is_first, const part &at) {
    multiply<S>(d, now, 0);
    if constexpr (S::C == 1) {
        add_chain<S, 1>(total[0], other);
        if (!is_first) give_back<S>(r, last, at.lane);
        if (more) load_slice<S>(following, r, next, at);
    } else {
        multiply<S>(other, now, 1);
        if (more) load_slice<S>(following, r, next, at);
        add_chain<S, 1>(total[0], d);
        add_chain<S, 0>(total[1], other);
        give_back<S>(r, last, at.lane);
    }
}

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
            put_rows(p.y[0] + (size_t)(token + i) * p.n_out[0] + column, v, n, whole);
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

template <class S> static __device__ __forceinline__ void consume(const group_args &a, const ring<S> &r, int thread) {
    int group = thread / 128, lane = thread % 32;
    part at = {group % S::WM, group / S::WM, thread / 32 % 4, lane};
    int n_slices = a.p.columns / SLICE, n_tiles = a.row_tiles * a.token_tiles;
    position next = {0, 0}, last = {0, 0};
    for (int tile = (int)blockIdx.x; tile < n_tiles; tile += (int)gridDim.x) {
        float total[S::C][S::N / 2], d0[S::N / 2], d1[S::N / 2];
#pragma unroll
        for (int i = 0; i < S::N / 2; i++) {
            d0[i] = d1[i] = -0.0f;
#pragma unroll
            for (int c = 0; c < S::C; c++) total[c][i] = -0.0f; // -0 + x is x, also for -0
        }
        if constexpr (S::C > 2) {
            slice now;
            for (int s = 0; s < n_slices; s++) {
                load_slice<S>(now, r, next, at);
                multiply<S>(d0, now, 0);
                multiply<S>(d1, now, 1);
                add_chain<S, 1>(total[0], d0);
                multiply<S>(d0, now, 2);
                add_chain<S, 1>(total[1], d1);
                if constexpr (S::C == 4) {
                    multiply<S>(d1, now, 3);
                    add_chain<S, 1>(total[2], d0);
                    add_chain<S, 0>(total[3], d1);
                } else {
                    add_chain<S, 0>(total[2], d0);
                }
                give_back<S>(r, last, lane);
            }
        } else {
            slice even, odd;
            load_slice<S>(even, r, next, at);
            for (int s = 0; s < n_slices; s += 2) {
                bool more = s + 1 < n_slices;
                step<S>(r, total, d0, d1, even, odd, next, last, more, s == 0, at);
                if (!more) break;
                if constexpr (S::C == 2) step<S>(r, total, d0, d1, odd, even, next, last, s + 2 < n_slices, false, at);
                else step<S>(r, total, d1, d0, odd, even, next, last, s + 2 < n_slices, false, at);
            }
            if constexpr (S::C == 1) {
                if (n_slices % 2 == 0) add_chain<S, 0>(total[0], d1);
                else add_chain<S, 0>(total[0], d0);
                give_back<S>(r, last, lane);
            }
        }
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
}

template <class S> static __global__ void __launch_bounds__(S::THREADS, S::BLOCKS) k_group(group_args a) {
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
        consume<S>(a, r, thread);
    }
#endif
}

// ---- Launchers
// -------------------------------------------------------------------------------------------------------

// Tiles, and how long an H200's SMs take for them when all have one: us for a slice of columns, and for what is done
// once a tile (docs/SPEED.md).
struct shape_info {
    int rows, tokens, per_sm;
    float slice, once;
};
static const shape_info shapes[] = {
    {64, 32, 2, 0.93f, 0.0f},   {64, 64, 2, 1.16f, 0.0f},  {64, 128, 1, 1.06f, 0.0f}, {128, 64, 1, 1.18f, 0.0f},
    {128, 128, 1, 1.62f, 0.0f}, {128, 192, 1, 1.9f, 1.5f}, {128, 256, 1, 2.0f, 3.0f},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

static int tiles_of(int n, int size) {
    return (n + size - 1) / size;
}

// The least time of the busiest SM.
static int choose_shape(int rows, int n_tokens, int columns, int n_sms) {
    int best = 0;
    float least = 0;
    for (int i = 0; i < N_SHAPES; i++) {
        const shape_info *s = &shapes[i];
        int n = tiles_of(rows, s->rows) * tiles_of(n_tokens, s->tokens);
        float cost = (float)tiles_of(n, n_sms * s->per_sm) * ((float)(columns / SLICE) * s->slice + s->once);
        if (n <= n_sms && s->per_sm > 1) cost *= 0.8f; // alone on its SM
        if (i > 0 && cost >= least) continue;
        best = i;
        least = cost;
    }
    return best;
}

template <class S> static void launch(struct cuda_state *s, const char *what, group_args &a, int rows) {
    a.row_tiles = tiles_of(rows, S::ROWS);
    a.token_tiles = tiles_of(a.p.n_tokens, S::TOKENS);
    size_t tiles = (size_t)a.row_tiles * (size_t)a.token_tiles, most = (size_t)s->n_sms * S::BLOCKS;
    launch_kernel(s, what, k_group<S>, {grid_for(tiles < most ? tiles : most), S::THREADS, S::SHARED}, a);
}

bool cuda_group_product(const struct op_ctx *ctx, const char *what, enum product_mode mode, const product_args &p,
                        size_t pairs) {
    struct cuda_state *s = cuda_of(ctx);
    if (!HOPPER || !(s->device.variants & VARIANT_WGMMA)) return false;
    size_t token_units = ((size_t)p.n_tokens + MOST_TOKENS - 1) / MOST_TOKENS * (MOST_TOKENS / 8);
    unsigned char *first = (unsigned char *)ctx->scratch, *second = first + ctx->scratch_floats / 8 * 16;
    int rows = (int)pairs * 16,
        shape = s->tile_shape ? s->tile_shape - 1 : choose_shape(rows, p.n_tokens, p.columns, s->n_sms);
    group_args a = {p, mode, first, NULL, (int)token_units, 0, 0};
    if (mode == PRODUCT_RESIDUAL && s->packed == p.x && s->packed_tokens == p.n_tokens) {
        a.tokens = second;
    } else if (p.norm) {
        launch_kernel(s, what, k_pack_tokens<true>, {grid_for((size_t)p.n_tokens), NORM_THREADS, 0}, p, first,
                      (int)token_units);
    } else {
        launch_kernel(s, what, k_pack_tokens<false>, {grid_for((size_t)p.n_tokens), NORM_THREADS, 0}, p, first,
                      (int)token_units);
    }
    bool packs = mode == PRODUCT_GATE_UP && p.n_out[0] % SLICE == 0;
    if (packs) a.act = second;
    switch (shape) {
    case 0: launch<shape_64x32>(s, what, a, rows); break;
    case 1: launch<shape_64x64>(s, what, a, rows); break;
    case 2: launch<shape_64x128>(s, what, a, rows); break;
    case 3: launch<shape_128x64>(s, what, a, rows); break;
    case 4: launch<shape_128x128>(s, what, a, rows); break;
    case 5: launch<shape_128x192>(s, what, a, rows); break;
    default: launch<shape_128x256>(s, what, a, rows); break;
    }
    if (packs) {
        s->packed = p.y[0];
        s->packed_tokens = p.n_tokens;
    }
    return true;
}

// Tokens packed for a product, and a second time for the next one.
size_t cuda_group_floats(const struct ops_limits *l) {
    size_t tokens = (l->max_tokens + MOST_TOKENS - 1) / MOST_TOKENS * MOST_TOKENS;
    return tokens * padded_columns(l->max_width) + 2 * BEYOND / sizeof(float);
}

template <class S> static void allow(struct cuda_state *s) {
    cuda_check(s, cudaFuncSetAttribute(k_group<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::SHARED),
               "preparing products");
}

extern "C" bool cuda_groups_setup(struct cuda_state *s) {
    allow<shape_64x32>(s);
    allow<shape_64x64>(s);
    allow<shape_64x128>(s);
    allow<shape_128x64>(s);
    allow<shape_128x128>(s);
    allow<shape_128x192>(s);
    allow<shape_128x256>(s);
    return s->failed == cudaSuccess;
}
