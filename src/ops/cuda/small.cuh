// small.cuh: the standard product, and products for a few tokens with the ops fused around them; for any kind of
// weights W (products.cuh).
#ifndef TANDEM_OPS_CUDA_SMALL_CUH
#define TANDEM_OPS_CUDA_SMALL_CUH

#include "ops/cuda/choice.cuh"
#include "ops/cuda/products.cuh"

// ---- The standard product -----------------------------------------------------------------------------------------

// The share of lane 4 g + t in columns 2t, 2t+1 and 8+2t, 9+2t of one step, rounded.
static __device__ __forceinline__ uint32_t rounded_pair(const float *x, int k, int n_in) {
    float low = k < n_in ? x[k] : 0.0f, high = k + 1 < n_in ? x[k + 1] : 0.0f;
    return pack_bf16(low, high);
}

// A block computes 16 rows for 8 tokens; its warps take slices in turn.
template <typename W>
static __global__ void __launch_bounds__(PRODUCT_THREADS)
    k_matmul(float *y, const float *x, const unsigned char *w, int n_out, int n_in, int columns, int n_tokens) {
    __shared__ float part[WARPS][16 * 8];
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int n_slices = columns / SLICE, unit = n_slices * W::RECORD, token = (int)blockIdx.y * 8 + g;
    const unsigned char *records = w + (size_t)blockIdx.x * 2 * unit;
    const float *in = x + (size_t)token * n_in;
    float total = 0;
    for (int base = 0; base < n_slices; base += WARPS) {
        int s = base + warp;
        float d[1][1][4] = {};
        auto input = [&](int, int c) {
            uint32_t r[4] = {0, 0, 0, 0};
            for (int i = 0; i < 4 && token < n_tokens; i++)
                r[i] = rounded_pair(in, s * SLICE + c * 32 + i * 8 + 2 * t, n_in);
            return make_uint4(r[0], r[1], r[2], r[3]);
        };
        auto record = [&](int u) { return records + (size_t)u * unit + (size_t)s * W::RECORD; };
        if (s < n_slices) W::template slice<1, 1, true>(d, lane, record, input);
        part[warp][g * 8 + 2 * t] = d[0][0][0];
        part[warp][g * 8 + 2 * t + 1] = d[0][0][1];
        part[warp][(g + 8) * 8 + 2 * t] = d[0][0][2];
        part[warp][(g + 8) * 8 + 2 * t + 1] = d[0][0][3];
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

template <typename W>
static void launch_matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens) {
    launch_kernel(cuda_of(ctx), "matmul", k_matmul<W>,
                  {grid_for(round_up(w->n_out, 16) / 16, round_up(n_tokens, 8) / 8), PRODUCT_THREADS, 0}, y, x,
                  (const unsigned char *)w->data, (int)w->n_out, (int)w->n_in, (int)padded_columns(w->n_in),
                  (int)n_tokens);
}

// ---- A few tokens: weights through shared memory, asked for before the kernel before has ended --------------------

// A block computes PAIRS pairs of units (RESIDUAL: one unit); its warps take slices in turn.
template <typename W, enum product_mode MODE, bool NORM, int SLOTS, int PAIRS>
static __global__ void __launch_bounds__(PRODUCT_THREADS) k_small(product_args p) {
    DYNAMIC_SHARED(shared);
    __shared__ __align__(8) uint64_t arrived;
    __shared__ float sums[SLOTS * NORM_WARPS];
    constexpr int UNITS = MODE == PRODUCT_RESIDUAL ? 1 : 2 * PAIRS, ROWS = UNITS * 8;
    constexpr int FINISHED = MODE == PRODUCT_GATE_UP ? ROWS / 2 : ROWS; // rows of results
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    int n_slices = p.columns / SLICE, unit = n_slices * W::RECORD;
    unsigned char *acts = shared + UNITS * unit;
    float *part = reinterpret_cast<float *>(acts + p.columns * 2 * SLOTS);
    auto source = [&](int i) {
        return MODE == PRODUCT_RESIDUAL ? p.w[0] + (size_t)blockIdx.x * unit
                                        : pair_unit<W, MODE>(p, (int)blockIdx.x * PAIRS + i / 2, i % 2);
    };
    if (thread == 0) {
        barrier_init<COPY_THREADS>(&arrived);
        barrier_fence();
    }
    if (!HOPPER) __syncthreads();
    if (!HOPPER || thread == 0) {
        barrier_expect(&arrived, (uint32_t)(UNITS * unit));
#pragma unroll 1
        for (int i = 0; i < UNITS; i++)
            copy_piece(shared + i * unit, source(i), (uint32_t)unit, &arrived, thread, COPY_THREADS);
        copies_asked(&arrived);
    }
    // What follows a head at once reads K and V that the step's layers wrote: they have ended then.
    bool holds = MODE == PRODUCT_PLAIN && SLOTS == 1 && p.best;
    if (!holds) dependents_may_start();
    if (SLOTS == 1) stage_one<NORM>(p, acts, sums);
    else stage_some<NORM, SLOTS>(p, acts, sums);
    if (holds) dependents_may_start();
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
        float d[PAIRS][1][4];
        auto input = [&](int, int c) {
            if (g >= SLOTS) return make_uint4(0, 0, 0, 0);
            return *reinterpret_cast<const uint4 *>(acts + ((s * 4 + c) * SLOTS + g) * 64 + t * 16);
        };
        auto record = [&](int u) { return shared + u * unit + s * W::RECORD; };
        W::template slice<PAIRS, 1, (UNITS > 1)>(d, lane, record, input);
        // Results' rows of a block: pair by pair; GATE_UP's gate rows before all up rows.
        float *sum = part + s * ROWS * SLOTS;
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int first = MODE == PRODUCT_GATE_UP ? i * 8 + g : i * 16 + g;
                int second = MODE == PRODUCT_GATE_UP ? FINISHED + i * 8 + g : i * 16 + 8 + g;
                if (2 * t + e >= SLOTS) continue;
                sum[first * SLOTS + 2 * t + e] = d[i][0][e];
                if (UNITS > 1) sum[second * SLOTS + 2 * t + e] = d[i][0][2 + e];
            }
    }
    __syncthreads();
    if (MODE == PRODUCT_PLAIN && SLOTS == 1 && p.best) {
        if (warp > (FINISHED - 1) / 32) return;
        unsigned long long key = 0;
        if (finishes) {
            float sum = part[thread];
#pragma unroll 8
            for (int s = 1; s < n_slices; s++) sum += part[s * ROWS + thread];
            *to = sum;
            key = best_key(sum, row);
        }
        tell_best(p.best, key, lane);
        return;
    }
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

template <typename W> static size_t small_shared(const product_args &p, int units, int slots) {
    size_t columns = (size_t)p.columns;
    return columns / SLICE * W::RECORD * units + columns * 2 * slots +
           columns / SLICE * 8 * units * slots * sizeof(float);
}

// False when the weights do not fit into shared memory.
template <typename W, enum product_mode MODE, bool NORM, int PAIRS>
static bool launch_small(const struct op_ctx *ctx, const char *what, const product_args &p, size_t pairs) {
    int slots = p.n_tokens <= 1 && p.columns <= HELD_COLUMNS ? 1
                : W::RARE                                    ? 8
                : p.n_tokens <= 2                            ? 2
                : p.n_tokens <= 4                            ? 4
                                                             : 8;
    int units = MODE == PRODUCT_RESIDUAL ? 1 : 2 * PAIRS;
    size_t blocks = MODE == PRODUCT_RESIDUAL ? ((size_t)p.n_out[0] + 7) / 8 : round_up(pairs, PAIRS) / PAIRS;
    struct launch l = {grid_for(blocks), PRODUCT_THREADS, small_shared<W>(p, units, slots)};
    struct cuda_state *s = cuda_of(ctx);
    if (l.shared > MAX_SHARED) return false;
    if constexpr (!W::RARE) {
        if (slots == 2) launch_kernel(s, what, k_small<W, MODE, NORM, 2, PAIRS>, l, p);
        if (slots == 4) launch_kernel(s, what, k_small<W, MODE, NORM, 4, PAIRS>, l, p);
    }
    s->best_told = slots == 1 && p.best;
    if (slots == 1) launch_kernel(s, what, k_small<W, MODE, NORM, 1, PAIRS>, l, p);
    if (slots == 8) launch_kernel(s, what, k_small<W, MODE, NORM, 8, PAIRS>, l, p);
    return true;
}

template <typename W, enum product_mode MODE, bool NORM, int PAIRS> static void allow_small(struct cuda_state *s) {
    allow_shared(s, "preparing products", k_small<W, MODE, NORM, 1, PAIRS>, MAX_SHARED);
    if constexpr (!W::RARE) {
        allow_shared(s, "preparing products", k_small<W, MODE, NORM, 2, PAIRS>, MAX_SHARED);
        allow_shared(s, "preparing products", k_small<W, MODE, NORM, 4, PAIRS>, MAX_SHARED);
    }
    allow_shared(s, "preparing products", k_small<W, MODE, NORM, 8, PAIRS>, MAX_SHARED);
}

#endif
