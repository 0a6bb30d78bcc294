// clusters.cuh: products that add to the residual stream, for a few dozen tokens; for any kind of weights W
// (products.cuh).
//
// Such a product has few rows and many columns. The eight blocks of a cluster share the slices of 64 rows for 32
// tokens: each multiplies its own, and pushes their sums to the blocks that add them up, eight rows each, in ascending
// order: so to the bits of every other kernel. A block's weights are in shared memory before the kernel before has
// ended, and it rounds its own columns of the inputs.
#ifndef TANDEM_OPS_CUDA_CLUSTERS_CUH
#define TANDEM_OPS_CUDA_CLUSTERS_CUH

#include "ops/cuda/products.cuh"

enum {
    SHARING_BLOCKS = 8, // of a cluster; each adds up one unit of rows
    SHARING_ROWS = SHARING_BLOCKS * UNIT_ROWS,
    SHARING_TOKENS = 32,
    SHARING_PITCH = SHARING_TOKENS + 4, // floats between rows' sums: against bank conflicts
    SHARING_HELD = 12,                  // of a thread's inputs, asked for at once
    SHARING_BARRIERS = 128,             // bytes
};

// Where things stand in shared memory: for `most` slices of a block, of `n_slices` in all.
template <typename W> struct sharing_layout {
    int inputs, sums, bytes;
    __host__ __device__ __forceinline__ explicit sharing_layout(int n_slices) {
        int most = (n_slices + SHARING_BLOCKS - 1) / SHARING_BLOCKS;
        inputs = SHARING_BARRIERS + most * SHARING_BLOCKS * W::RECORD;
        inputs = (inputs + 127) / 128 * 128;
        sums = inputs + most * SLICE * 2 * SHARING_TOKENS;
        bytes = sums + n_slices * UNIT_ROWS * SHARING_PITCH * (int)sizeof(float);
    }
};

// The inputs of slices first .. first + n of 32 tokens, rounded.
static __device__ __forceinline__ void stage_share(const product_args &p, unsigned char *acts, int first, int n,
                                                   int first_token) {
    constexpr int QUADS = 8; // of a chunk's columns; a warp has one chunk's of four tokens
    int thread = (int)threadIdx.x, quad = thread % QUADS, slot = thread / QUADS, token = first_token + slot;
    const float *x = input_row(p, min(token, p.n_tokens - 1));
    int chunks = n * (SLICE / 32);
    for (int base = 0; base < chunks; base += SHARING_HELD) {
        float4 v[SHARING_HELD];
#pragma unroll
        for (int i = 0; i < SHARING_HELD; i++) {
            int k = first * SLICE + (base + i) * 32 + quad * 4;
            bool real = base + i < chunks && token < p.n_tokens && k < p.n_in;
            v[i] = real ? *reinterpret_cast<const float4 *>(x + k) : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < SHARING_HELD; i++)
            if (base + i < chunks) put_inputs(acts, (base + i) * 32 + quad * 4, SHARING_TOKENS, slot, v[i]);
    }
}

template <typename W> static __global__ void __launch_bounds__(PRODUCT_THREADS) k_sharing(product_args p) {
    constexpr int NT = SHARING_TOKENS / 8, PAIRS = SHARING_BLOCKS / 2;
    DYNAMIC_SHARED(shared);
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    int n_slices = p.columns / SLICE, rank = (int)cluster_rank(), tile = (int)blockIdx.x / SHARING_BLOCKS;
    int first = n_slices * rank / SHARING_BLOCKS, n = n_slices * (rank + 1) / SHARING_BLOCKS - first;
    int first_token = (int)blockIdx.y * SHARING_TOKENS, token_units = min(NT, (p.n_tokens - first_token + 7) / 8);
    sharing_layout<W> layout(n_slices);
    uint64_t *arrived = reinterpret_cast<uint64_t *>(shared), *summed = arrived + 1;
    unsigned char *weights = shared + SHARING_BARRIERS, *acts = shared + layout.inputs;
    float *sums = reinterpret_cast<float *>(shared + layout.sums); // [n_slices][8 rows][SHARING_PITCH tokens]
    if (thread == 0) {
        barrier_init(arrived);
        barrier_init(summed);
        barrier_fence();
        barrier_expect(arrived, (uint32_t)(SHARING_BLOCKS * n * W::RECORD));
        barrier_expect(summed, (uint32_t)(n_slices * UNIT_ROWS * token_units * 8 * (int)sizeof(float)));
#pragma unroll 1
        for (int i = 0; n > 0 && i < SHARING_BLOCKS; i++)
            bulk_copy(weights + i * n * W::RECORD,
                      pair_unit<W, PRODUCT_RESIDUAL>(p, tile * PAIRS + i / 2, i % 2) + (size_t)first * W::RECORD,
                      (uint32_t)(n * W::RECORD), arrived);
    }
    dependents_may_start();
    cluster_sync(); // the others' barriers are there
    dependency_wait();
    stage_share(p, acts, first, n, first_token);
    // Where this thread's result goes, and what it is added to: asked for early.
    int token = first_token + thread / UNIT_ROWS, row = tile * SHARING_ROWS + rank * UNIT_ROWS + thread % UNIT_ROWS;
    bool finishes = token < p.n_tokens && row < p.n_out[0];
    float *to = p.y[0] + (size_t)token * p.n_out[0] + row, before = finishes ? *to : 0.0f;
    __syncthreads();
    barrier_wait(arrived, 0);
    for (int i = warp; i < PAIRS * n; i += WARPS) {
        int pair = i % PAIRS, s = i / PAIRS;
        float d[1][NT][4];
        auto input = [&](int j, int c) {
            return *reinterpret_cast<const uint4 *>(acts + ((s * 4 + c) * SHARING_TOKENS + j * 8 + g) * 64 + t * 16);
        };
        auto record = [&](int u) { return weights + ((pair * 2 + u) * n + s) * W::RECORD; };
        W::template slice<1, NT, true>(d, lane, record, input);
        // Of two neighbours one pushes the upper unit's row for four tokens, the other the lower one's.
        bool lower = t % 2 != 0;
        float *at = sums + ((first + s) * UNIT_ROWS + g) * SHARING_PITCH + t / 2 * 4;
#pragma unroll
        for (int j = 0; j < NT; j++) {
            float *e = d[0][j], other[2];
            for (int i = 0; i < 2; i++) other[i] = __shfl_xor_sync(~0u, lower ? e[i] : e[2 + i], 1);
            float4 v =
                lower ? make_float4(other[0], other[1], e[2], e[3]) : make_float4(e[0], e[1], other[0], other[1]);
            if (j < token_units) push16(at + j * 8, v, summed, (unsigned)(pair * 2 + lower));
        }
    }
    barrier_wait(summed, 0);
    if (!finishes) return;
    const float *sum_of = sums + thread % UNIT_ROWS * SHARING_PITCH + thread / UNIT_ROWS;
    float sum = sum_of[0];
#pragma unroll 8
    for (int s = 1; s < n_slices; s++) sum += sum_of[s * UNIT_ROWS * SHARING_PITCH];
    *to = before + sum;
}

// Whether it is in use, and the GPU holds all clusters at once: `n_clusters` of them that take an SM's
// shared memory each, or more of smaller ones.
template <typename W> static bool may_share(const struct cuda_state *s, size_t n_out, size_t columns, size_t n_tokens) {
    sharing_layout<W> layout((int)columns / SLICE);
    size_t tiles = round_up(n_out, SHARING_ROWS) / SHARING_ROWS;
    size_t tokens = round_up(n_tokens, SHARING_TOKENS) / SHARING_TOKENS;
    size_t per_sm = MAX_SHARED / ((size_t)layout.bytes + 1024); // which each block takes beside
    if (!HOPPER || !(s->device.variants & VARIANT_CLUSTERS) || s->tile_shape > 0) return false;
    if (tiles * tokens > (size_t)s->n_clusters * per_sm && s->tile_shape == 0) return false;
    return s->n_clusters > 0 && per_sm > 0;
}

// False: it may not.
template <typename W> static bool launch_sharing(const struct op_ctx *ctx, const char *what, const product_args &p) {
    struct cuda_state *s = cuda_of(ctx);
    sharing_layout<W> layout(p.columns / SLICE);
    size_t tiles = round_up((size_t)p.n_out[0], SHARING_ROWS) / SHARING_ROWS;
    size_t tokens = round_up((size_t)p.n_tokens, SHARING_TOKENS) / SHARING_TOKENS;
    if (!may_share<W>(s, (size_t)p.n_out[0], (size_t)p.columns, (size_t)p.n_tokens)) return false;
    launch_kernel(s, what, k_sharing<W>,
                  {grid_for(tiles * SHARING_BLOCKS, tokens), PRODUCT_THREADS, (size_t)layout.bytes, SHARING_BLOCKS}, p);
    return true;
}

template <typename W> static void allow_sharing(struct cuda_state *s) {
    allow_shared(s, "preparing products", k_sharing<W>, MAX_SHARED);
}

#endif
