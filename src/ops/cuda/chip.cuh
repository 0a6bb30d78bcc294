// chip.cuh: what is said in the chip's own instructions: the matrix instruction, 2^x, copies into shared memory, and
// the two halves of programmatic dependence. The tests have another file of this name, for a chip on the CPU
// (tests/cuda_emulator).
#ifndef TANDEM_OPS_CUDA_CHIP_CUH
#define TANDEM_OPS_CUDA_CHIP_CUH

#include <cuda_bf16.h>
#include <stdint.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HOPPER 1 // bulk copies and programmatic dependence
#else
#define HOPPER 0
#endif

// A block's shared memory whose size its launch decides.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

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

// 2^x and e^x as this chip's special-function unit has them (2 units in the last place).
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
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

// Two bf16s' a b + c, each rounded once; subnormal numbers count.
static __device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// An f16, by its bits.
static __device__ __forceinline__ float half_to_float(uint16_t v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
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
