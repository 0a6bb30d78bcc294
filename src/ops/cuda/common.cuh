// common.cuh: what kernels share: the matrix instruction, orders of sums, copies into shared memory, and launching with
// programmatic dependence.
#ifndef TANDEM_OPS_CUDA_COMMON_CUH
#define TANDEM_OPS_CUDA_COMMON_CUH

#include "ops/cuda/device.h"

#include <cuda_bf16.h>
#include <stdint.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HOPPER 1 // bulk copies and programmatic dependence
#else
#define HOPPER 0
#endif

// ---- Launching
// -------------------------------------------------------------------------------------------------------
// A kernel may start before the one queued before it has ended: until `dependency_wait` it reads only what no kernel of
// the last steps wrote (weights, old K and V), and it writes nothing. Every thread that reads or writes anything else
// waits first; so do all blocks that end early, since a grid's end stands for the end of all before it.

struct launch {
    dim3 grid;
    unsigned threads;
    size_t shared;
};

template <typename... P, typename... A>
static void launch_kernel(struct cuda_state *s, const char *what, void (*kernel)(P...), struct launch l, A... args) {
    if (s->failed != cudaSuccess || l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = l.grid;
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared;
    config.stream = s->stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cuda_check(s, cudaLaunchKernelEx(&config, kernel, P(args)...), what);
}

static inline dim3 grid_for(size_t x, size_t y = 1, size_t z = 1) {
    return dim3((unsigned)x, (unsigned)y, (unsigned)z);
}

static __device__ __forceinline__ void dependents_may_start() {
#if HOPPER
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ __forceinline__ void dependency_wait() {
#if HOPPER
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Numbers
// ---------------------------------------------------------------------------------------------------------

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

// 2^x and e^x as this chip's special-function unit has them (2 units in the last place).
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float silu_mul(float gate, float up) {
    return gate / (1.0f + exp2_fast(gate * -1.44269504088896340736f)) * up;
}

// d += a b: a 16 rows by 16, b 16 by 8 columns, bf16 in, f32 sums. Lane 4 g + t holds of a: (g, 2t..), (g + 8, 2t..),
// (g, 2t + 8..), (g + 8, 2t + 8..); of b: (2t.., g), (2t + 8.., g); of d: (g, 2t), (g, 2t + 1), (g + 8, 2t), ...
static __device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                           uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The sum of a warp's values, in every lane: a fixed tree.
static __device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    return v;
}

// ---- RMSNorm
// ---------------------------------------------------------------------------------------------------------
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

// ---- Copies into shared memory
// ---------------------------------------------------------------------------------------
// One thread asks for a bulk copy, all wait for it on a barrier in shared memory. Older chips copy with all threads.

static __device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

static __device__ __forceinline__ void barrier_init(uint64_t *bar) {
#if HOPPER
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(bar)));
#endif
}

static __device__ __forceinline__ void barrier_fence() {
#if HOPPER
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

static __device__ __forceinline__ void barrier_expect(uint64_t *bar, uint32_t bytes) {
#if HOPPER
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
                 : "memory");
#endif
}

static __device__ __forceinline__ void barrier_wait(uint64_t *bar, uint32_t parity) {
#if HOPPER
    uint32_t done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(shared_address(bar)), "r"(parity)
                     : "memory");
    } while (!done);
#endif
}

// Both 16-byte aligned, bytes a multiple of 16.
static __device__ __forceinline__ void bulk_copy(void *to, const void *from, uint32_t bytes, uint64_t *bar) {
#if HOPPER
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
#endif
}

#endif
