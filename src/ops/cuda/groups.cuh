// groups.cuh: Hopper's asynchronous matrix instructions, which four warps (a warp group) issue together: wgmma. The
// tests have another file of this name (tests/cuda_emulator).
//
// d += a b: a 64 rows by 16, b 16 by N columns, bf16 in, f32 sums. Warp w of the group has rows 16 w .. 16 w + 15 of a
// and of d, in the lanes' order of chip.cuh's mma; d[4 j .. 4 j + 3] is what that has as d for columns 8 j .. 8 j + 7.
// b lies in shared memory as matrices of 8 columns by 8 k, 128 bytes each, a column's 8 k beside each other, or in rows
// of 64 bytes (group_operand_64).
//
// Order: group_fence; group_mma one after the other on the same d (the next one waits for the last one's sums by
// itself); group_commit ends a batch; group_wait<P> waits until at most P batches are under way. From group_mma until
// then nothing may read or write its d or its a, nor overwrite its b. After other instructions have written d or a,
// group_fence comes first.
#ifndef TANDEM_OPS_CUDA_GROUPS_CUH
#define TANDEM_OPS_CUDA_GROUPS_CUH

#include "ops/cuda/chip.cuh"

// So many powers of two a row's unit is above the score that raised it, so that few others do (group_attention.cu).
enum { UNIT_RANGE = 16 };

// From so many tokens on tiles of 128 rows by 256 tokens are taken, and end, in other ways (pieces.cu, docs/SPEED.md).
enum { MANY_TOKENS = 4096 };

// Where b lies: 8 columns' matrices for consecutive k are `k_step` bytes apart, columns' neighbours `column_step`.
static __device__ __forceinline__ uint64_t group_operand(const void *b, uint32_t k_step, uint32_t column_step) {
    return (uint64_t)((shared_address(b) & 0x3FFFFu) >> 4) | (uint64_t)(k_step >> 4) << 16 |
           (uint64_t)(column_step >> 4) << 32;
}

// b in rows of 64 bytes, aligned to 512, whose 16-byte words stand in place w ^ row / 2 % 4. A row is 32 k of a column:
// eights of columns are `row_step` apart, `across_step` is of no use. Or, for ACROSS, 32 columns of a k:
// eights of k are `row_step` apart, the next 32 columns `across_step`.
static __device__ __forceinline__ uint64_t group_operand_64(const void *b, uint32_t across_step, uint32_t row_step) {
    return group_operand(b, across_step, row_step) | (uint64_t)2 << 62;
}

static __device__ __forceinline__ void group_fence() {
#if HOPPER
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void group_commit() {
#if HOPPER
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Of sums that are not read yet; what the batches that have ended took as `a` may be overwritten.
template <int P> static __device__ __forceinline__ void group_wait_all_but() {
#if HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(P) : "memory");
#endif
}

#define GROUP_D8(d, i)                                                                                                 \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])

#define GROUP_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GROUP_D32(d, i) GROUP_D8(d, i), GROUP_D8(d, i + 8), GROUP_D8(d, i + 16), GROUP_D8(d, i + 24)
#define GROUP_D36(d) GROUP_D32(d, 0), GROUP_D4(d, 32)
#define GROUP_D68(d) GROUP_D32(d, 0), GROUP_D32(d, 32), GROUP_D4(d, 64)

// The sums' registers are named, so that the compiler reads none of them earlier.
template <int P> static __device__ __forceinline__ void group_wait(float (&d)[16]) {
#if HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %16;" : GROUP_D8(d, 0), GROUP_D8(d, 8) : "n"(P) : "memory");
#endif
}

template <int P> static __device__ __forceinline__ void group_wait(float (&d)[32]) {
#if HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %32;"
                 : GROUP_D8(d, 0), GROUP_D8(d, 8), GROUP_D8(d, 16), GROUP_D8(d, 24)
                 : "n"(P)
                 : "memory");
#endif
}

template <int P> static __device__ __forceinline__ void group_wait(float (&d)[64]) {
#if HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %64;"
                 : GROUP_D8(d, 0), GROUP_D8(d, 8), GROUP_D8(d, 16), GROUP_D8(d, 24), GROUP_D8(d, 32), GROUP_D8(d, 40),
                   GROUP_D8(d, 48), GROUP_D8(d, 56)
                 : "n"(P)
                 : "memory");
#endif
}

template <int P> static __device__ __forceinline__ void group_wait(float (&d)[36]) {
#if HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %36;" : GROUP_D36(d) : "n"(P) : "memory");
#endif
}

template <int P> static __device__ __forceinline__ void group_wait(float (&d)[68]) {
#if HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %68;" : GROUP_D68(d) : "n"(P) : "memory");
#endif
}

// `add`: 0 takes d as +0.
static __device__ __forceinline__ void group_mma(float (&d)[16], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint64_t b, uint32_t add) {
#if HOPPER
    asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0;}"
                 : GROUP_D8(d, 0), GROUP_D8(d, 8)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add));
#endif
}

static __device__ __forceinline__ void group_mma(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint64_t b, uint32_t add) {
#if HOPPER
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                 "%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;}"
                 : GROUP_D8(d, 0), GROUP_D8(d, 8), GROUP_D8(d, 16), GROUP_D8(d, 24)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add));
#endif
}

static __device__ __forceinline__ void group_mma(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint64_t b, uint32_t add) {
#if HOPPER
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                 "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"
                 "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;}"
                 : GROUP_D8(d, 0), GROUP_D8(d, 8), GROUP_D8(d, 16), GROUP_D8(d, 24), GROUP_D8(d, 32), GROUP_D8(d, 40),
                   GROUP_D8(d, 48), GROUP_D8(d, 56)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add));
#endif
}

#if HOPPER
// Names of 36 and of 68 sums, and an instruction on them.
#define GROUP_NAMES_36                                                                                                 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"   \
    "%30,%31,%32,%33,%34,%35"
#define GROUP_NAMES_68                                                                                                 \
    GROUP_NAMES_36 ",%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
                   "%60,%61,%62,%63,%64,%65,%66,%67"
#define GROUP_MMA(columns, names, inputs, add, across)                                                                 \
    "{.reg .pred p; setp.ne.b32 p, " add ", 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" names  \
    "}, " inputs ", p, 1, 1, " across ";}"
#endif

// ACROSS: b has columns beside each other (1), or k (0).
template <int ACROSS>
static __device__ __forceinline__ void group_mma_across(float (&d)[36], uint32_t a0, uint32_t a1, uint32_t a2,
                                                        uint32_t a3, uint64_t b, uint32_t add) {
#if HOPPER
    asm volatile(GROUP_MMA("72", GROUP_NAMES_36, "{%36,%37,%38,%39}, %40", "%41", "%42")
                 : GROUP_D36(d)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add), "n"(ACROSS));
#endif
}

template <int ACROSS>
static __device__ __forceinline__ void group_mma_across(float (&d)[68], uint32_t a0, uint32_t a1, uint32_t a2,
                                                        uint32_t a3, uint64_t b, uint32_t add) {
#if HOPPER
    asm volatile(GROUP_MMA("136", GROUP_NAMES_68, "{%68,%69,%70,%71}, %72", "%73", "%74")
                 : GROUP_D68(d)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add), "n"(ACROSS));
#endif
}

// A number that is the same in all of a warp's lanes, so that the compiler knows.
static __device__ __forceinline__ int warp_uniform(int v) {
    return __shfl_sync(~0u, v, 0);
}

// Registers of a warp group's threads from here on; every warp of it comes here.
template <int N> static __device__ __forceinline__ void registers_up() {
#if HOPPER
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

template <int N> static __device__ __forceinline__ void registers_down() {
#if HOPPER
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

#endif
