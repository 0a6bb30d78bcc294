// layers_chip.cuh: what the kernel of all layers (persistent.cu) alone says in the chip's own instructions. The tests
// have another file of this name, for a chip on the CPU (tests/cuda_emulator).
#ifndef TANDEM_OPS_CUDA_LAYERS_CHIP_CUH
#define TANDEM_OPS_CUDA_LAYERS_CHIP_CUH

#include "ops/cuda/chip.cuh"

// Four words between blocks, past the caches of the SMs; each stands alone.
static __device__ __forceinline__ uint4 load4_relaxed(const uint32_t *p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

#endif
