// tiles.cuh: products for many tokens: inputs packed first, then tiles of rows by tokens; for any kind of weights W
// (products.cuh).
#ifndef TANDEM_OPS_CUDA_TILES_CUH
#define TANDEM_OPS_CUDA_TILES_CUH

#include "ops/cuda/products.cuh"

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

// Two by four warps, each MT pairs of units by NT units of tokens: 32 MT rows by 32 NT tokens. A stage is a slice.
template <typename W, int MT, int NT> struct tile_shape {
    static constexpr int UNITS = 4 * MT, TOKENS = 4 * NT, INPUT = SLICE * 16; // INPUT: bytes of 8 tokens
    static constexpr int STAGE = UNITS * W::RECORD + TOKENS * INPUT;
    static constexpr int ROOM = (int)MAX_SHARED / STAGE;
    static constexpr int STAGES = HOPPER ? STAGE > 48 * 1024 ? 3 : STAGE > 24 * 1024 ? 4 : 6 : ROOM < 4 ? ROOM : 4;
    static_assert(STAGE * STAGES <= MAX_SHARED, "an SM's shared memory");
};

// A slice's weights, or inputs: on Hopper a lane of the one warp that calls asks for a unit, else a warp of all.
template <typename W, enum product_mode MODE, int MT, int NT>
static __device__ __forceinline__ void load_stage(const product_args &p, const unsigned char *packed,
                                                  unsigned char *stage, uint64_t *bar, int slice, int warp, int lane,
                                                  bool of_weights) {
    using S = tile_shape<W, MT, NT>;
    size_t token_unit = (size_t)(p.columns / SLICE) * S::INPUT;
    int first = HOPPER ? lane : warp, step = HOPPER ? 32 : (int)WARPS;
    for (int i = first; of_weights && i < S::UNITS; i += step)
        copy_piece(stage + i * W::RECORD,
                   pair_unit<W, MODE>(p, (int)blockIdx.x * 2 * MT + i / 2, i % 2) + (size_t)slice * W::RECORD,
                   W::RECORD, bar, lane, 32);
    for (int i = first; !of_weights && i < S::TOKENS; i += step)
        copy_piece(stage + S::UNITS * W::RECORD + i * S::INPUT,
                   packed + ((size_t)blockIdx.y * S::TOKENS + i) * token_unit + (size_t)slice * S::INPUT, S::INPUT, bar,
                   lane, 32);
}

template <typename W, enum product_mode MODE, int MT, int NT>
static __global__ void __launch_bounds__(PRODUCT_THREADS, 1) k_tile(product_args p, const unsigned char *packed) {
    using S = tile_shape<W, MT, NT>;
    DYNAMIC_SHARED(shared);
    __shared__ __align__(8) uint64_t arrived[S::STAGES];
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    int n_slices = p.columns / SLICE, wm = warp / 4, wn = warp % 4;
    auto loads = [&] { return !HOPPER || warp == 0; };
    if (thread == 0) {
        for (int i = 0; i < S::STAGES; i++) barrier_init<COPY_THREADS>(&arrived[i]);
        barrier_fence();
        for (int i = 0; i < S::STAGES && i < n_slices; i++) barrier_expect(&arrived[i], S::STAGE);
    }
    __syncthreads();
    for (int i = 0; loads() && i < S::STAGES && i < n_slices; i++)
        load_stage<W, MODE, MT, NT>(p, packed, shared + i * S::STAGE, &arrived[i], i, warp, lane, true);
    dependents_may_start();
    dependency_wait();
    for (int i = 0; loads() && i < S::STAGES && i < n_slices; i++) {
        load_stage<W, MODE, MT, NT>(p, packed, shared + i * S::STAGE, &arrived[i], i, warp, lane, false);
        copies_asked(&arrived[i]);
    }
    float total[MT][NT][4];
    for (int s = 0; s < n_slices; s++) {
        int at = s % S::STAGES;
        unsigned char *stage = shared + at * S::STAGE;
        barrier_wait(&arrived[at], (uint32_t)(s / S::STAGES & 1));
        const unsigned char *b = stage + S::UNITS * W::RECORD + wn * NT * S::INPUT + lane * 16;
        float d[MT][NT][4];
        auto input = [&](int j, int c) {
            return *reinterpret_cast<const uint4 *>(b + j * S::INPUT + c * CHUNK_LANES * 16);
        };
        auto record = [&](int u) { return stage + (wm * MT * 2 + u) * W::RECORD; };
        W::template slice<MT, NT, true>(d, lane, record, input);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) total[i][j][e] = s == 0 ? d[i][j][e] : total[i][j][e] + d[i][j][e];
        __syncthreads(); // the stage has been read
        if (loads() && s + S::STAGES < n_slices) {
            if (lane == 0) barrier_expect(&arrived[at], S::STAGE);
            __syncwarp();
            load_stage<W, MODE, MT, NT>(p, packed, shared + at * S::STAGE, &arrived[at], s + S::STAGES, warp, lane,
                                        true);
            load_stage<W, MODE, MT, NT>(p, packed, shared + at * S::STAGE, &arrived[at], s + S::STAGES, warp, lane,
                                        false);
            copies_asked(&arrived[at]);
        }
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

template <typename W, enum product_mode MODE, bool NORM, int MT, int NT>
static void launch_tiles(const struct op_ctx *ctx, const char *what, const product_args &p, size_t pairs) {
    using S = tile_shape<W, MT, NT>;
    size_t tokens = round_up((size_t)p.n_tokens, S::TOKENS * 8);
    __nv_bfloat16 *packed = (__nv_bfloat16 *)ctx->scratch;
    launch_kernel(cuda_of(ctx), what, k_pack_inputs<NORM>, {grid_for(tokens), PRODUCT_THREADS, 0}, p, packed);
    launch_kernel(cuda_of(ctx), what, k_tile<W, MODE, MT, NT>,
                  {grid_for(round_up(pairs, 2 * MT) / (2 * MT), tokens / (S::TOKENS * 8)), PRODUCT_THREADS,
                   (size_t)S::STAGE * S::STAGES},
                  p, (const unsigned char *)packed);
}

template <typename W, enum product_mode MODE, int MT, int NT> static void allow_tile(struct cuda_state *s) {
    allow_shared(s, "preparing products", k_tile<W, MODE, MT, NT>, MAX_SHARED);
}

#endif
