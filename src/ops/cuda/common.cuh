// common.cuh: what kernels share: orders of sums, and launching with programmatic dependence.
#ifndef TANDEM_OPS_CUDA_COMMON_CUH
#define TANDEM_OPS_CUDA_COMMON_CUH

#include "ops/cuda/chip.cuh"
#include "ops/cuda/device.h"

#include <cuda_bf16.h>
#include <stdint.h>

// ---- Launching ----------------------------------------------------------------------------------------------------
// A kernel may start before the one queued before it has ended: until `dependency_wait` it reads only what no kernel of
// the last steps wrote (weights, old K and V), and it writes nothing. Every thread that reads or writes anything else
// waits first; so do all blocks that end early, since a grid's end stands for the end of all before it. K and V of the
// step before are old where what starts the kernel of all layers has waited itself before it does: choices, and heads
// that tell their best row. Behind anything else that kernel begins `alone`, and so does what follows K and V that
// attention of other tokens of the same step reads (has_new_kv).

struct launch {
    dim3 grid;
    unsigned threads;
    size_t shared;
    unsigned cluster; // blocks; 0: no clusters
    bool alone;       // it begins when all before it have ended
};

enum { MOST_ATTRIBUTES = 2 };

static inline cudaLaunchConfig_t launch_config(struct cuda_state *s, struct launch l,
                                               cudaLaunchAttribute (&attributes)[MOST_ATTRIBUTES]) {
    cuda_add_parts(s);
    s->packed = NULL;
    s->follows_choice = false;
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = !l.alone && !s->has_new_kv;
    s->has_new_kv = false;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = l.cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = l.grid;
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared;
    config.stream = s->stream;
    config.attrs = attributes;
    config.numAttrs = l.cluster ? 2 : HOPPER ? 1 : 0;
    return config;
}

template <typename... P, typename... A>
static void launch_kernel(struct cuda_state *s, const char *what, void (*kernel)(P...), struct launch l, A... args) {
    if (s->failed != cudaSuccess || l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return;
    cudaLaunchAttribute attributes[MOST_ATTRIBUTES] = {};
    cudaLaunchConfig_t config = launch_config(s, l, attributes);
    cuda_check(s, cudaLaunchKernelEx(&config, kernel, P(args)...), what);
}

// What a block may have of an SM's shared memory: of the older chips 8.6, 8.9 and 12.0 have the least.
enum { SM_SHARED = (HOPPER ? 227 : 99) * 1024 };

// A kernel may take so many bytes of an SM's shared memory when it is launched.
template <typename... P>
static void allow_shared(struct cuda_state *s, const char *what, void (*kernel)(P...), size_t bytes) {
    cuda_check(s, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes), what);
}

static inline dim3 grid_for(size_t x, size_t y = 1, size_t z = 1) {
    return dim3((unsigned)x, (unsigned)y, (unsigned)z);
}

// ---- A warp's copies into shared memory ---------------------------------------------------------------------------

// Whether a lane is one of the COPY_LANES.
static __device__ __forceinline__ bool asks(int lane) {
    return HOPPER ? lane == 0 : true;
}

// A single piece, by these.
static __device__ __forceinline__ void warp_copy(void *to, const void *from, uint32_t bytes, uint64_t *bar, int lane) {
    barrier_expect(bar, bytes);
    copy_piece(to, from, bytes, bar, lane, COPY_LANES);
    copies_asked(bar);
}

// ---- Numbers ------------------------------------------------------------------------------------------------------

static __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&v);
}

static __device__ __forceinline__ float bf16_low(uint32_t v) {
    return __uint_as_float(v << 16);
}

static __device__ __forceinline__ float bf16_high(uint32_t v) {
    return __uint_as_float(v & 0xFFFF0000u);
}

// silu(gate) * up; no quotient, which has a branch for numbers at the range's ends, and takes twice as long.
static __device__ __forceinline__ float silu_mul(float gate, float up) {
    return gate * reciprocal_fast(1.0f + exp2_fast(gate * -1.44269504088896340736f)) * up;
}

// The sum of a warp's values, in every lane: a fixed tree.
static __device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    return v;
}

// ---- RMSNorm ------------------------------------------------------------------------------------------------------
// A row's squares are summed by 256 threads: thread i takes elements 4 i .. 4 i + 3 of every 1,024, one after the
// other; then the tree of warp_sum; then the eight warps in order. n is a multiple of 4.

enum { NORM_THREADS = 256, NORM_WARPS = NORM_THREADS / 32 };

static __device__ __forceinline__ float norm_partial(const float *x, int n, int thread) {
    float s = 0;
    for (int k = 4 * thread; k < n; k += 4 * NORM_THREADS) {
        float4 v = *reinterpret_cast<const float4 *>(x + k);
        s = fmaf(v.x, v.x, s);
        s = fmaf(v.y, v.y, s);
        s = fmaf(v.z, v.z, s);
        s = fmaf(v.w, v.w, s);
    }
    return warp_sum(s);
}

// From the eight warps' sums.
static __device__ __forceinline__ float norm_rate(const float *sums, int n, float eps) {
    float s = sums[0];
#pragma unroll
    for (int w = 1; w < NORM_WARPS; w++) s += sums[w];
    return 1.0f / sqrtf(s / (float)n + eps);
}

#endif
