// cuda_bf16.h: what CUDA C++ has beyond C++, for g++: the words of the language, the indices of a thread, vectors,
// bf16, and the built-in functions that the kernels use. It stands in for the toolkit's header of the same name.
//
// A block's __shared__ variables are thread-local ones of the program, whose memory is one piece: the emulator fills it
// with poison before a block begins and puts it aside while another block runs.
#ifndef TANDEM_TESTS_CUDA_BF16_H
#define TANDEM_TESTS_CUDA_BF16_H

#include "cuda_runtime_api.h"

#include <math.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local

// ---- A thread's place, and where it meets others (emulator.c) -----------------------------------------------------

struct emulated_place {
    dim3 thread, block, block_size, grid_size;
};

extern "C" {
extern struct emulated_place emulated_place;
unsigned char *emulated_dynamic_shared(void);
void emulated_syncthreads(void);
void emulated_syncwarp(void);
// What `lane` brings; whether all lanes bring `true`. Every lane of the warp must come here.
uint64_t emulated_shuffle(uint64_t v, unsigned lane);
bool emulated_vote_all(bool v);
void emulated_mma(float d[4], const uint32_t a[4], const uint32_t b[2]);
void emulated_dependency_wait(void);
void emulated_barrier_init(uint64_t *barrier, unsigned n_threads);
void emulated_barrier_arrive(uint64_t *barrier);
void emulated_barrier_expect(uint64_t *barrier, uint32_t bytes);
void emulated_barrier_await(uint64_t *barrier, uint32_t bytes);
void emulated_barrier_wait(uint64_t *barrier, uint32_t parity);
void emulated_bulk_copy(void *to, const void *from, uint32_t bytes, uint64_t *barrier);
uint32_t emulated_shared_address(const void *p);
// The asynchronous matrix instructions of a group of four warps (src/ops/cuda/groups.cuh): d [n / 2] of this lane.
void emulated_group_fence(void);
void emulated_group_mma(float *d, int n, const uint32_t a[4], uint64_t b, bool across, bool add);
void emulated_load_staged(const void *at);
void emulated_group_commit(void);
void emulated_group_wait(int most);
void emulated_group_registers(int n);
void emulated_pause(void); // another thread may go on here
void emulated_spin(void);  // all others that can go on do, before this one looks again
void emulated_sync_some(int id, unsigned n);
unsigned emulated_cluster_rank(void);
void emulated_cluster_sync(void);
void emulated_push(void *at, const void *data, unsigned bytes, uint64_t *barrier, unsigned rank);
}

static constexpr const dim3 &threadIdx = emulated_place.thread;
static constexpr const dim3 &blockIdx = emulated_place.block;
static constexpr const dim3 &blockDim = emulated_place.block_size;
static constexpr const dim3 &gridDim = emulated_place.grid_size;

static inline void __syncthreads() {
    emulated_syncthreads();
}

static inline void __syncwarp() {
    emulated_syncwarp();
}

static inline void __threadfence() {
    emulated_pause();
}

// ---- Vectors and numbers ------------------------------------------------------------------------------------------

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return {x, y, z, w};
}

static inline uint2 make_uint2(uint32_t x, uint32_t y) {
    return {x, y};
}

static inline float2 make_float2(float x, float y) {
    return {x, y};
}

static inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

template <typename A, typename B> static inline A emulated_bits(B b) {
    static_assert(sizeof(A) == sizeof(B), "the same bits");
    A a;
    memcpy(&a, &b, sizeof a);
    return a;
}

static inline float __uint_as_float(uint32_t v) {
    return emulated_bits<float>(v);
}

static inline float __int_as_float(int v) {
    return emulated_bits<float>(v);
}

static inline uint32_t __float_as_uint(float v) {
    return emulated_bits<uint32_t>(v);
}

static inline int __float_as_int(float v) {
    return emulated_bits<int>(v);
}

// Byte i of the result is the one of y:x, x low, whose number is nibble i of the selector, below 8.
static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    uint64_t both = (uint64_t)y << 32 | x;
    uint32_t v = 0;
    for (int i = 0; i < 4; i++) v |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return v;
}

static inline int min(int a, int b) {
    return a < b ? a : b;
}

static inline int max(int a, int b) {
    return a > b ? a : b;
}

struct __nv_bfloat16 {
    uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

static inline float __bfloat162float(__nv_bfloat16 v) {
    return __uint_as_float((uint32_t)v.bits << 16);
}

static inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    uint32_t u = emulated_bits<uint32_t>(v);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
    return {(uint16_t)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16)};
}

static inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}

// ---- Memory -------------------------------------------------------------------------------------------------------

template <typename T> static inline T __ldcg(const T *p) {
    return *p;
}

static inline unsigned atomicAdd(unsigned *p, unsigned v) {
    emulated_pause();
    unsigned before = *p;
    *p = before + v;
    return before;
}

template <typename T> static inline T atomicMax(T *p, T v) {
    emulated_pause();
    T before = *p;
    if (v > before) *p = v;
    return before;
}

static inline unsigned long long atomicAdd(unsigned long long *p, unsigned long long v) {
    emulated_pause();
    unsigned long long before = *p;
    *p = before + v;
    return before;
}

template <typename T> static inline T __shfl_sync(unsigned, T v, int lane) {
    if constexpr (sizeof(T) == 8) return emulated_bits<T>(emulated_shuffle(emulated_bits<uint64_t>(v), (unsigned)lane));
    else return emulated_bits<T>((uint32_t)emulated_shuffle(emulated_bits<uint32_t>(v), (unsigned)lane));
}

template <typename T> static inline T __shfl_xor_sync(unsigned all, T v, int mask) {
    return __shfl_sync(all, v, (int)threadIdx.x % 32 ^ mask);
}

static inline int __all_sync(unsigned, int p) {
    return emulated_vote_all(p);
}

static inline int __any_sync(unsigned all, int p) {
    return !__all_sync(all, !p);
}

static inline int __vimax3_s32(int a, int b, int c) {
    int m = a > b ? a : b;
    return m > c ? m : c;
}

#endif
