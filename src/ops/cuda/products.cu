// products.cu: matrix products and the ops fused around them.
//
// An output element is the sum over slices of 128 columns, in ascending order; a slice's sum is a chain of eight
// matrix instructions of 16 columns each, from +0. That order is the same in every kernel and for every number of
// tokens, so that all kernels return the same bits (docs/NUMERICS.md).
#include "ops/cuda/products.cuh"

enum { PRODUCT_THREADS = 256, WARPS = PRODUCT_THREADS / 32, MAX_SHARED = 226 * 1024 };

// ---- The standard product
// --------------------------------------------------------------------------------------------

// The share of lane 4 g + t in columns 2t, 2t+1 and 8+2t, 9+2t of one step, rounded.
static __device__ __forceinline__ uint32_t rounded_pair(const float *x, int k, int n_in) {
    float low = k < n_in ? x[k] : 0.0f, high = k + 1 < n_in ? x[k + 1] : 0.0f;
    return pack_bf16(low, high);
}

// A block computes 16 rows for 8 tokens; its warps take slices in turn.
static __global__ void __launch_bounds__(PRODUCT_THREADS)
    k_matmul(float *y, const float *x, const uint4 *w, int n_out, int n_in, int columns, int n_tokens) {
    __shared__ float part[WARPS][16 * 8];
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int n_slices = columns / SLICE, chunks = columns / 32, token = (int)blockIdx.y * 8 + g;
    const uint4 *a = w + (size_t)blockIdx.x * 2 * chunks * CHUNK_LANES + lane, *b = a + (size_t)chunks * CHUNK_LANES;
    const float *in = x + (size_t)token * n_in;
    float total = 0;
    for (int base = 0; base < n_slices; base += WARPS) {
        int s = base + warp;
        float d[4] = {0, 0, 0, 0};
        for (int c = s * 4; s < n_slices && c < s * 4 + 4; c++) {
            uint4 wa = a[c * CHUNK_LANES], wb = b[c * CHUNK_LANES];
            uint32_t p[4] = {0, 0, 0, 0};
            if (token < n_tokens)
                for (int i = 0; i < 4; i++) p[i] = rounded_pair(in, c * 32 + i * 8 + 2 * t, n_in);
            mma(d, wa.x, wb.x, wa.y, wb.y, p[0], p[1]);
            mma(d, wa.z, wb.z, wa.w, wb.w, p[2], p[3]);
        }
        part[warp][g * 8 + 2 * t] = d[0];
        part[warp][g * 8 + 2 * t + 1] = d[1];
        part[warp][(g + 8) * 8 + 2 * t] = d[2];
        part[warp][(g + 8) * 8 + 2 * t + 1] = d[3];
        __syncthreads();
        if (threadIdx.x < 128)
            for (int i = 0; i < WARPS && base + i < n_slices; i++)
                total = base + i == 0 ? part[0][threadIdx.x] : total + part[i][threadIdx.x];
        __syncthreads();
    }
    int row = (int)blockIdx.x * 16 + (int)threadIdx.x / 8;
    token = (int)blockIdx.y * 8 + (int)threadIdx.x % 8;
    if (threadIdx.x < 128 && row < n_out && token < n_tokens) y[(size_t)token * n_out + row] = total;
}

// ---- A few tokens: weights through shared memory, asked for before the kernel before has ended
// ------------------------

// The unit that stands at place `odd` of a pair: a pair is two units of one matrix, or (GATE_UP) a unit of gate and the
// same one of up.
template <enum product_mode MODE>
static __device__ __forceinline__ const uint4 *pair_unit(const product_args &p, int pair, int odd) {
    size_t unit = (size_t)p.columns / 32 * CHUNK_LANES;
    if (MODE == PRODUCT_GATE_UP) return p.w[odd] + (size_t)min(pair, (p.n_out[0] + 7) / 8 - 1) * unit;
    int segment = 0;
    while (segment < (MODE == PRODUCT_QKV ? 2 : 0) && pair >= p.n_pairs[segment]) pair -= p.n_pairs[segment++];
    return p.w[segment] + (size_t)(min(pair, p.n_pairs[segment] - 1) * 2 + odd) * unit;
}

// Where the shares of columns k .. k + 3 of a token stand in shared memory, and their rounding: 32 columns of a token
// are 64 bytes, in the order of matrix.cuh.
static __device__ __forceinline__ void put_inputs(unsigned char *acts, int k, int slots, int token, float4 v) {
    unsigned char *at = acts + (k / 32 * slots + token) * 64 + k % 8 / 2 * 16 + k % 32 / 8 * 4;
    *reinterpret_cast<uint32_t *>(at) = pack_bf16(v.x, v.y);
    *reinterpret_cast<uint32_t *>(at + 16) = pack_bf16(v.z, v.w);
}

static __device__ __forceinline__ float4 load4(const float *x, int k, int n) {
    return k < n ? *reinterpret_cast<const float4 *>(x + k) : make_float4(0, 0, 0, 0);
}

static __device__ __forceinline__ float4 scale4(float4 v, float r, float4 n) {
    return make_float4(v.x * r * n.x, v.y * r * n.y, v.z * r * n.z, v.w * r * n.w);
}

enum { HELD = 4, HELD_COLUMNS = HELD * 4 * PRODUCT_THREADS }; // of a single token's inputs, in registers

// One token's inputs of at most HELD_COLUMNS columns: read once. The norm's weights are asked for before the kernel
// before has ended.
template <bool NORM>
static __device__ __forceinline__ void stage_one(const product_args &p, unsigned char *acts, float *sums) {
    int thread = (int)threadIdx.x;
    float4 w[HELD], v[HELD];
#pragma unroll
    for (int i = 0; NORM && i < HELD; i++) w[i] = load4(p.norm, 4 * thread + i * 4 * PRODUCT_THREADS, p.n_in);
    dependency_wait();
    const float *x = input_row(p, 0);
#pragma unroll
    for (int i = 0; i < HELD; i++) v[i] = load4(x, 4 * thread + i * 4 * PRODUCT_THREADS, p.n_in);
    float r = 1.0f;
    if (NORM) {
        float s = 0; // as norm_partial
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (4 * thread + i * 4 * PRODUCT_THREADS >= p.n_in) break;
            s = fmaf(v[i].x, v[i].x, s);
            s = fmaf(v[i].y, v[i].y, s);
            s = fmaf(v[i].z, v[i].z, s);
            s = fmaf(v[i].w, v[i].w, s);
        }
        s = warp_sum(s);
        if (thread % 32 == 0) sums[thread / 32] = s;
        __syncthreads();
        r = norm_rate(sums, p.n_in, p.eps);
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int k = 4 * thread + i * 4 * PRODUCT_THREADS;
        if (k < p.columns) put_inputs(acts, k, 1, 0, NORM ? scale4(v[i], r, w[i]) : v[i]);
    }
}

// Several tokens' inputs, or long ones.
template <bool NORM, int SLOTS>
static __device__ __forceinline__ void stage_some(const product_args &p, unsigned char *acts, float *sums) {
    int thread = (int)threadIdx.x;
    dependency_wait();
    if (NORM) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            float s = i < p.n_tokens ? norm_partial(input_row(p, i), p.n_in, thread) : 0.0f;
            if (thread % 32 == 0) sums[i * NORM_WARPS + thread / 32] = s;
        }
        __syncthreads();
    }
    for (int k = 4 * thread; k < p.columns; k += 4 * PRODUCT_THREADS) {
        float4 n = NORM ? load4(p.norm, k, p.n_in) : make_float4(0, 0, 0, 0), v[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; i++)
            v[i] = i < p.n_tokens ? load4(input_row(p, i), k, p.n_in) : make_float4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            if (NORM) v[i] = scale4(v[i], norm_rate(sums + i * NORM_WARPS, p.n_in, p.eps), n);
            put_inputs(acts, k, SLOTS, i, v[i]);
        }
    }
}

// A block computes PAIRS pairs of units (RESIDUAL: one unit); its warps take slices in turn.
template <enum product_mode MODE, bool NORM, int SLOTS, int PAIRS>
static __global__ void __launch_bounds__(PRODUCT_THREADS) k_small(product_args p) {
    DYNAMIC_SHARED(shared);
    __shared__ __align__(8) uint64_t arrived;
    __shared__ float sums[SLOTS * NORM_WARPS];
    constexpr int UNITS = MODE == PRODUCT_RESIDUAL ? 1 : 2 * PAIRS, ROWS = UNITS * 8;
    constexpr int FINISHED = MODE == PRODUCT_GATE_UP ? ROWS / 2 : ROWS; // rows of results
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    int n_slices = p.columns / SLICE, unit_bytes = p.columns * 16, unit = unit_bytes / 16;
    uint4 *weights = reinterpret_cast<uint4 *>(shared);
    unsigned char *acts = shared + UNITS * unit_bytes;
    float *part = reinterpret_cast<float *>(acts + p.columns * 2 * SLOTS);
    auto source = [&](int i) {
        return MODE == PRODUCT_RESIDUAL ? p.w[0] + (size_t)blockIdx.x * unit
                                        : pair_unit<MODE>(p, (int)blockIdx.x * PAIRS + i / 2, i % 2);
    };
#if HOPPER
    if (thread == 0) {
        barrier_init(&arrived);
        barrier_fence();
        barrier_expect(&arrived, (uint32_t)(UNITS * unit_bytes));
#pragma unroll 1
        for (int i = 0; i < UNITS; i++) bulk_copy(weights + i * unit, source(i), (uint32_t)unit_bytes, &arrived);
    }
#else
    for (int i = 0; i < UNITS; i++)
        for (int k = thread; k < unit; k += PRODUCT_THREADS) weights[i * unit + k] = source(i)[k];
#endif
    dependents_may_start();
    if (SLOTS == 1) stage_one<NORM>(p, acts, sums);
    else stage_some<NORM, SLOTS>(p, acts, sums);
    // Where this thread's result goes, and what it is added to: asked for early.
    int token = thread % SLOTS, row = thread / SLOTS, segment = 0;
    float before = 0;
    if (MODE == PRODUCT_RESIDUAL || MODE == PRODUCT_GATE_UP) {
        row += (int)blockIdx.x * FINISHED;
    } else {
        int pair = (int)blockIdx.x * PAIRS + row / 16;
        if (MODE == PRODUCT_QKV)
            while (segment < 2 && pair >= p.n_pairs[segment]) pair -= p.n_pairs[segment++];
        row = pair * 16 + row % 16;
    }
    bool finishes = thread < FINISHED * SLOTS && token < p.n_tokens && row < p.n_out[segment];
    float *to = p.y[segment] + (size_t)token * p.n_out[segment] + row;
    if (MODE == PRODUCT_RESIDUAL && finishes) before = *to;
    if (MODE == PRODUCT_QKV && finishes && p.b[segment]) before = p.b[segment][row];
    __syncthreads();
    barrier_wait(&arrived, 0);
    for (int s = warp; s < n_slices; s += WARPS) {
        float d[PAIRS][4] = {};
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int at = (s * 4 + c) * CHUNK_LANES + lane;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (g < SLOTS) x = *reinterpret_cast<const uint4 *>(acts + ((s * 4 + c) * SLOTS + g) * 64 + t * 16);
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                uint4 u = weights[i * 2 * unit + at], v = make_uint4(0, 0, 0, 0);
                if (UNITS > 1) v = weights[(i * 2 + 1) * unit + at];
                mma(d[i], u.x, v.x, u.y, v.y, x.x, x.y);
                mma(d[i], u.z, v.z, u.w, v.w, x.z, x.w);
            }
        }
        // Results' rows of a block: pair by pair; GATE_UP's gate rows before all up rows.
        float *sum = part + s * ROWS * SLOTS;
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int first = MODE == PRODUCT_GATE_UP ? i * 8 + g : i * 16 + g;
                int second = MODE == PRODUCT_GATE_UP ? FINISHED + i * 8 + g : i * 16 + 8 + g;
                if (2 * t + e >= SLOTS) continue;
                sum[first * SLOTS + 2 * t + e] = d[i][e];
                if (UNITS > 1) sum[second * SLOTS + 2 * t + e] = d[i][2 + e];
            }
    }
    __syncthreads();
    if (!finishes) return;
    float sum = part[thread], up = MODE == PRODUCT_GATE_UP ? part[thread + FINISHED * SLOTS] : 0.0f;
#pragma unroll 8
    for (int s = 1; s < n_slices; s++) {
        sum += part[s * ROWS * SLOTS + thread];
        if (MODE == PRODUCT_GATE_UP) up += part[s * ROWS * SLOTS + thread + FINISHED * SLOTS];
    }
    if (MODE == PRODUCT_RESIDUAL) *to = before + sum;
    else if (MODE == PRODUCT_GATE_UP) *to = silu_mul(sum, up);
    else *to = MODE == PRODUCT_QKV && p.b[segment] ? sum + before : sum;
}

// ---- More tokens: inputs packed first, then tiles of rows by tokens
// --------------------------------------------------

// Tokens' inputs, normed (or as they are) and rounded, in units; tokens up to a whole tile and columns up to a whole
// slice become zero.
template <bool NORM> static __global__ void k_pack_inputs(product_args p, __nv_bfloat16 *packed) {
    __shared__ float sums[NORM_WARPS];
    dependents_may_start();
    dependency_wait();
    int i = (int)blockIdx.x, thread = (int)threadIdx.x;
    bool real = i < p.n_tokens;
    const float *x = real ? input_row(p, i) : NULL;
    float r = 1.0f;
    if (NORM && real) {
        float s = norm_partial(x, p.n_in, thread);
        if (thread % 32 == 0) sums[thread / 32] = s;
        __syncthreads();
        r = norm_rate(sums, p.n_in, p.eps);
    }
    for (int k = 4 * thread; k < p.columns; k += 4 * PRODUCT_THREADS) {
        float4 v = make_float4(0, 0, 0, 0);
        if (real && k < p.n_in) v = *reinterpret_cast<const float4 *>(x + k);
        if (NORM && real && k < p.n_in) {
            float4 n = *reinterpret_cast<const float4 *>(p.norm + k);
            v = make_float4(v.x * r * n.x, v.y * r * n.y, v.z * r * n.z, v.w * r * n.w);
        }
        uint32_t *at = reinterpret_cast<uint32_t *>(packed + unit_index((size_t)i, (size_t)k, (size_t)p.columns));
        at[0] = pack_bf16(v.x, v.y);
        at[4] = pack_bf16(v.z, v.w);
    }
}

// What happens to a finished sum of one row and token.
template <enum product_mode MODE>
static __device__ __forceinline__ void finish(const product_args &p, int segment, int row, int token, float sum) {
    if (row >= p.n_out[segment] || token >= p.n_tokens) return;
    float *at = p.y[segment] + (size_t)token * p.n_out[segment] + row;
    if (MODE == PRODUCT_RESIDUAL) *at += sum;
    else *at = p.b[segment] ? sum + p.b[segment][row] : sum;
}

// Two by four warps, each MT pairs of units by NT units of tokens: 32 MT rows by 32 NT tokens. A stage is a slice.
template <int MT, int NT> struct tile_shape {
    static constexpr int UNITS = 4 * MT, TOKENS = 4 * NT, STAGE = (UNITS + TOKENS) * SLICE * 16;
    static constexpr int STAGES = STAGE > 48 * 1024 ? 3 : STAGE > 24 * 1024 ? 4 : 6;
};

template <enum product_mode MODE, int MT, int NT>
static __device__ __forceinline__ void load_stage(const product_args &p, const uint4 *packed, unsigned char *stage,
                                                  uint64_t *bar, int slice, int lane, bool of_weights) {
    using S = tile_shape<MT, NT>;
    constexpr int BYTES = SLICE * 16;
    size_t at = (size_t)slice * 4 * CHUNK_LANES, unit = (size_t)p.columns / 32 * CHUNK_LANES;
    for (int i = lane; of_weights && i < S::UNITS; i += 32)
        bulk_copy(stage + i * BYTES, pair_unit<MODE>(p, (int)blockIdx.x * 2 * MT + i / 2, i % 2) + at, BYTES, bar);
    for (int i = lane; !of_weights && i < S::TOKENS; i += 32)
        bulk_copy(stage + (S::UNITS + i) * BYTES, packed + ((size_t)blockIdx.y * S::TOKENS + i) * unit + at, BYTES,
                  bar);
}

template <enum product_mode MODE, int MT, int NT>
static __global__ void __launch_bounds__(PRODUCT_THREADS, 1) k_tile(product_args p, const uint4 *packed) {
    using S = tile_shape<MT, NT>;
    DYNAMIC_SHARED(shared);
    __shared__ __align__(8) uint64_t arrived[S::STAGES];
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    int n_slices = p.columns / SLICE, wm = warp / 4, wn = warp % 4;
#if HOPPER
    if (thread == 0) {
        for (int i = 0; i < S::STAGES; i++) barrier_init(&arrived[i]);
        barrier_fence();
        for (int i = 0; i < S::STAGES && i < n_slices; i++) barrier_expect(&arrived[i], S::STAGE);
    }
    __syncthreads();
    for (int i = 0; warp == 0 && i < S::STAGES && i < n_slices; i++)
        load_stage<MODE, MT, NT>(p, packed, shared + i * S::STAGE, &arrived[i], i, lane, true);
#endif
    dependents_may_start();
    dependency_wait();
#if HOPPER
    for (int i = 0; warp == 0 && i < S::STAGES && i < n_slices; i++)
        load_stage<MODE, MT, NT>(p, packed, shared + i * S::STAGE, &arrived[i], i, lane, false);
#endif
    float total[MT][NT][4];
    for (int s = 0; s < n_slices; s++) {
        int at = s % S::STAGES;
        uint4 *stage = reinterpret_cast<uint4 *>(shared + at * S::STAGE);
#if HOPPER
        barrier_wait(&arrived[at], (uint32_t)(s / S::STAGES & 1));
#else
        size_t unit = (size_t)p.columns / 32 * CHUNK_LANES;
        for (int i = thread; i < (S::UNITS + S::TOKENS) * SLICE; i += PRODUCT_THREADS) {
            int u = i / SLICE;
            const uint4 *from = u < S::UNITS ? pair_unit<MODE>(p, (int)blockIdx.x * 2 * MT + u / 2, u % 2)
                                             : packed + ((size_t)blockIdx.y * S::TOKENS + u - S::UNITS) * unit;
            stage[i] = from[s * 4 * CHUNK_LANES + i % SLICE];
        }
        __syncthreads();
#endif
        const uint4 *a = stage + wm * MT * 2 * SLICE + lane, *b = stage + (S::UNITS + wn * NT) * SLICE + lane;
        float d[MT][NT][4] = {};
#pragma unroll
        for (int c = 0; c < SLICE / 32; c++) {
            uint4 x[NT];
#pragma unroll
            for (int j = 0; j < NT; j++) x[j] = b[j * SLICE + c * CHUNK_LANES];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                uint4 u = a[2 * i * SLICE + c * CHUNK_LANES], v = a[(2 * i + 1) * SLICE + c * CHUNK_LANES];
#pragma unroll
                for (int j = 0; j < NT; j++) mma(d[i][j], u.x, v.x, u.y, v.y, x[j].x, x[j].y);
#pragma unroll
                for (int j = 0; j < NT; j++) mma(d[i][j], u.z, v.z, u.w, v.w, x[j].z, x[j].w);
            }
        }
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) total[i][j][e] = s == 0 ? d[i][j][e] : total[i][j][e] + d[i][j][e];
        __syncthreads(); // the stage has been read
#if HOPPER
        if (warp == 0 && s + S::STAGES < n_slices) {
            if (lane == 0) barrier_expect(&arrived[at], S::STAGE);
            __syncwarp();
            load_stage<MODE, MT, NT>(p, packed, shared + at * S::STAGE, &arrived[at], s + S::STAGES, lane, true);
            load_stage<MODE, MT, NT>(p, packed, shared + at * S::STAGE, &arrived[at], s + S::STAGES, lane, false);
        }
#endif
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
        int pair = (int)blockIdx.x * 2 * MT + wm * MT + i, segment = 0;
        if (MODE == PRODUCT_QKV)
            while (segment < 2 && pair >= p.n_pairs[segment]) pair -= p.n_pairs[segment++];
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int token = ((int)blockIdx.y * S::TOKENS + wn * NT + j) * 8 + 2 * t + e;
                if (MODE == PRODUCT_GATE_UP) {
                    if (pair * 8 + g < p.n_out[0] && token < p.n_tokens)
                        p.y[0][(size_t)token * p.n_out[0] + pair * 8 + g] =
                            silu_mul(total[i][j][e], total[i][j][2 + e]);
                } else {
                    finish<MODE>(p, segment, pair * 16 + g, token, total[i][j][e]);
                    finish<MODE>(p, segment, pair * 16 + 8 + g, token, total[i][j][2 + e]);
                }
            }
    }
}

// ---- Launchers
// -------------------------------------------------------------------------------------------------------

static size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

static void matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens) {
    launch_kernel(cuda_of(ctx), "matmul", k_matmul,
                  {grid_for(round_up(w->n_out, 16) / 16, round_up(n_tokens, 8) / 8), PRODUCT_THREADS, 0}, y, x,
                  (const uint4 *)w->data, (int)w->n_out, (int)w->n_in, (int)padded_columns(w->n_in), (int)n_tokens);
}

static size_t small_shared(const product_args &p, int units, int slots) {
    size_t columns = (size_t)p.columns;
    return columns * 16 * units + columns * 2 * slots + columns / SLICE * 8 * units * slots * sizeof(float);
}

template <enum product_mode MODE, bool NORM, int MT, int NT>
static void launch_tiles(const struct op_ctx *ctx, const char *what, const product_args &p, size_t pairs) {
    using S = tile_shape<MT, NT>;
    size_t tokens = round_up((size_t)p.n_tokens, S::TOKENS * 8);
    __nv_bfloat16 *packed = (__nv_bfloat16 *)ctx->scratch;
    launch_kernel(cuda_of(ctx), what, k_pack_inputs<NORM>, {grid_for(tokens), PRODUCT_THREADS, 0}, p, packed);
    launch_kernel(cuda_of(ctx), what, k_tile<MODE, MT, NT>,
                  {grid_for(round_up(pairs, 2 * MT) / (2 * MT), tokens / (S::TOKENS * 8)), PRODUCT_THREADS,
                   (size_t)S::STAGE * S::STAGES},
                  p, (const uint4 *)packed);
}

// False when the weights do not fit into shared memory.
template <enum product_mode MODE, bool NORM, int PAIRS>
static bool launch_small(const struct op_ctx *ctx, const char *what, const product_args &p, size_t pairs) {
    int slots = p.n_tokens <= 1 && p.columns <= HELD_COLUMNS ? 1 : p.n_tokens <= 2 ? 2 : p.n_tokens <= 4 ? 4 : 8;
    int units = MODE == PRODUCT_RESIDUAL ? 1 : 2 * PAIRS;
    size_t blocks = MODE == PRODUCT_RESIDUAL ? ((size_t)p.n_out[0] + 7) / 8 : round_up(pairs, PAIRS) / PAIRS;
    struct launch l = {grid_for(blocks), PRODUCT_THREADS, small_shared(p, units, slots)};
    struct cuda_state *s = cuda_of(ctx);
    if (l.shared > MAX_SHARED) return false;
    if (slots == 1) launch_kernel(s, what, k_small<MODE, NORM, 1, PAIRS>, l, p);
    else if (slots == 2) launch_kernel(s, what, k_small<MODE, NORM, 2, PAIRS>, l, p);
    else if (slots == 4) launch_kernel(s, what, k_small<MODE, NORM, 4, PAIRS>, l, p);
    else launch_kernel(s, what, k_small<MODE, NORM, 8, PAIRS>, l, p);
    return true;
}

// As many pairs a block as give each SM about one block.
template <enum product_mode MODE> static constexpr int most_pairs() {
    return MODE == PRODUCT_RESIDUAL ? 1 : MODE == PRODUCT_QKV ? 2 : 3;
}

// `rows`: of all results (GATE_UP: of one of the two).
template <enum product_mode MODE, bool NORM>
static void product(const struct op_ctx *ctx, const char *what, const product_args &p, size_t rows) {
    size_t pairs = MODE == PRODUCT_GATE_UP ? round_up(rows, 8) / 8 : round_up(rows, 16) / 16;
    size_t n_sms = (size_t)cuda_of(ctx)->n_sms;
    constexpr int MOST = most_pairs<MODE>();
    // The next products' weights shall fit beside.
    bool many = pairs > n_sms && p.n_tokens <= 4 && (size_t)p.columns * 32 * MOST <= MAX_SHARED / 2;
    if (p.n_tokens <= SMALL_TOKENS && many && launch_small<MODE, NORM, MOST>(ctx, what, p, pairs)) return;
    if (p.n_tokens <= SMALL_TOKENS && launch_small<MODE, NORM, 1>(ctx, what, p, pairs)) return;
    size_t large = round_up(pairs, 8) / 8 * (round_up((size_t)p.n_tokens, 128) / 128);
    size_t medium = round_up(pairs, 4) / 4 * (round_up((size_t)p.n_tokens, 64) / 64);
    if (p.n_tokens <= 32) launch_tiles<MODE, NORM, 1, 1>(ctx, what, p, pairs);
    else if (p.n_tokens > 64 && large * 4 >= n_sms * 3) launch_tiles<MODE, NORM, 4, 4>(ctx, what, p, pairs);
    else if (medium * 2 >= n_sms) launch_tiles<MODE, NORM, 2, 2>(ctx, what, p, pairs);
    else launch_tiles<MODE, NORM, 1, 2>(ctx, what, p, pairs);
}

static product_args args_for(const struct matrix *w, size_t n_tokens, const float *x) {
    product_args p = {};
    p.w[0] = (const uint4 *)w->data;
    p.n_out[0] = (int)w->n_out;
    p.n_pairs[0] = (int)(round_up(w->n_out, 16) / 16);
    p.n_in = (int)w->n_in;
    p.columns = (int)padded_columns(w->n_in);
    p.n_tokens = (int)n_tokens;
    p.x = x;
    return p;
}

static void add_segment(product_args *p, int i, const struct matrix *w, float *y, const float *b) {
    p->w[i] = (const uint4 *)w->data;
    p->n_out[i] = (int)w->n_out;
    p->n_pairs[i] = (int)(round_up(w->n_out, 16) / 16);
    p->y[i] = y;
    p->b[i] = b;
}

static void norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    product_args p = args_for(a->wq, a->n_tokens, a->x);
    add_segment(&p, 0, a->wq, a->q, a->bq);
    add_segment(&p, 1, a->wk, a->k, a->bk);
    add_segment(&p, 2, a->wv, a->v, a->bv);
    p.norm = a->norm;
    p.eps = a->eps;
    product<PRODUCT_QKV, true>(ctx, "norm_qkv", p, 16 * (size_t)(p.n_pairs[0] + p.n_pairs[1] + p.n_pairs[2]));
}

static void residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    product_args p = args_for(a->w, a->n_tokens, a->in);
    p.y[0] = a->x;
    product<PRODUCT_RESIDUAL, false>(ctx, "residual", p, a->w->n_out);
}

static void norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    product_args p = args_for(a->w_gate, a->n_tokens, a->x);
    add_segment(&p, 1, a->w_up, NULL, NULL);
    p.y[0] = a->act;
    p.norm = a->norm;
    p.eps = a->eps;
    product<PRODUCT_GATE_UP, true>(ctx, "norm_gate_up", p, a->w_gate->n_out);
}

static void norm_head(const struct op_ctx *ctx, const struct norm_head_args *a) {
    product_args p = args_for(a->head, a->batch->n_logit_rows, a->x);
    p.y[0] = a->logits;
    p.norm = a->norm;
    p.eps = a->eps;
    p.rows = a->batch->logit_rows;
    product<PRODUCT_PLAIN, true>(ctx, "norm_head", p, a->head->n_out);
}

// The packed inputs of the widest product.
static bool scratch_floats(const struct ops *ops, const struct ops_limits *l, size_t *out) {
    size_t packed = round_up(l->max_tokens, 128) * padded_columns(l->max_width) / 2;
    size_t split = cuda_split_floats(ops, l);
    *out = packed > split ? packed : split;
    return true;
}

static void allow_shared(struct cuda_state *s, const void *kernel) {
    cuda_check(s, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MAX_SHARED),
               "preparing products");
}

template <enum product_mode MODE, bool NORM, int PAIRS> static void allow_small(struct cuda_state *s) {
    allow_shared(s, (const void *)k_small<MODE, NORM, 1, PAIRS>);
    allow_shared(s, (const void *)k_small<MODE, NORM, 2, PAIRS>);
    allow_shared(s, (const void *)k_small<MODE, NORM, 4, PAIRS>);
    allow_shared(s, (const void *)k_small<MODE, NORM, 8, PAIRS>);
}

template <enum product_mode MODE, bool NORM> static void allow_all(struct cuda_state *s) {
    allow_small<MODE, NORM, 1>(s);
    allow_small<MODE, NORM, most_pairs<MODE>()>(s);
    allow_shared(s, (const void *)k_tile<MODE, 1, 1>);
    allow_shared(s, (const void *)k_tile<MODE, 1, 2>);
    allow_shared(s, (const void *)k_tile<MODE, 2, 2>);
    allow_shared(s, (const void *)k_tile<MODE, 4, 4>);
}

extern "C" bool cuda_products_setup(struct cuda_state *s) {
    allow_all<PRODUCT_QKV, true>(s);
    allow_all<PRODUCT_RESIDUAL, false>(s);
    allow_all<PRODUCT_GATE_UP, true>(s);
    allow_all<PRODUCT_PLAIN, true>(s);
    return s->failed == cudaSuccess;
}

extern "C" void cuda_fill_products(struct ops *ops) {
    ops->matmul = matmul;
    ops->norm_qkv = norm_qkv;
    ops->out_residual = residual;
    ops->down_residual = residual;
    ops->norm_gate_up = norm_gate_up;
    ops->norm_head = norm_head;
    ops->scratch_floats = scratch_floats;
}
