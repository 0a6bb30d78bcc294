// layers_chip.cuh: in the place of src/ops/cuda/layers_chip.cuh, for the emulator (emulator.h).
#ifndef TANDEM_TESTS_LAYERS_CHIP_CUH
#define TANDEM_TESTS_LAYERS_CHIP_CUH

#include "ops/cuda/chip.cuh"

static inline uint4 load4_relaxed(const uint32_t *p) {
    return make_uint4(load_relaxed(p), load_relaxed(p + 1), load_relaxed(p + 2), load_relaxed(p + 3));
}

#endif
