// groups.cuh: in the place of src/ops/cuda/groups.cuh, for the emulator (emulator.h).
#ifndef TANDEM_TESTS_GROUPS_CUH
#define TANDEM_TESTS_GROUPS_CUH

#include "ops/cuda/chip.cuh"

enum { UNIT_RANGE = 1 };    // so that units change in tests, too
enum { MANY_TOKENS = 256 }; // and steps have more and fewer

static inline uint64_t group_operand(const void *b, uint32_t k_step, uint32_t column_step) {
    return (uint64_t)((emulated_shared_address(b) & 0x3FFFFu) >> 4) | (uint64_t)(k_step >> 4) << 16 |
           (uint64_t)(column_step >> 4) << 32;
}

static inline uint64_t group_operand_64(const void *b, uint32_t across_step, uint32_t row_step) {
    return group_operand(b, across_step, row_step) | (uint64_t)2 << 62;
}

static inline void group_fence() {
    emulated_group_fence();
}

static inline void group_commit() {
    emulated_group_commit();
}

template <int P> static inline void group_wait_all_but() {
    emulated_group_wait(P);
}

template <int P, int N> static inline void group_wait(float (&)[N]) {
    emulated_group_wait(P);
}

template <int N>
static inline void group_mma(float (&d)[N], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b,
                             uint32_t add) {
    const uint32_t a[4] = {a0, a1, a2, a3};
    emulated_group_mma(d, 2 * N, a, b, false, add != 0);
}

template <int ACROSS, int N>
static inline void group_mma_across(float (&d)[N], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b,
                                    uint32_t add) {
    const uint32_t a[4] = {a0, a1, a2, a3};
    emulated_group_mma(d, 2 * N, a, b, ACROSS != 0, add != 0);
}

static inline int warp_uniform(int v) {
    return __shfl_sync(~0u, v, 0);
}

template <int N> static inline void registers_up() {
    emulated_group_registers(N);
}

template <int N> static inline void registers_down() {
    emulated_group_registers(N);
}

#endif
