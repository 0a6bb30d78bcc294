// mistake.h: what sources see that sow.py has patched, on the emulated GPU and, compiled by nvcc, on a real one. There
// the kernels of each source have the mistake's number in their own memory: mistake_tell_kernels puts it there.
#ifndef TANDEM_TESTS_MISTAKE_H
#define TANDEM_TESTS_MISTAKE_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif
extern int sown_mistake; // 0: none
// For a GPU that is open. False: it could not be done.
typedef bool mistake_teller(void);
void mistake_enrol(mistake_teller *tell);
bool mistake_tell_kernels(void);
#ifdef __cplusplus
}
#endif

#ifdef __CUDACC__
static __device__ int kernels_mistake;

static bool tell_these_kernels() {
    cudaError_t status = cudaMemcpyToSymbol(kernels_mistake, &sown_mistake, sizeof sown_mistake);
    if (status != cudaErrorInvalidSymbol) return status == cudaSuccess;
    cudaGetLastError(); // none was sown in these
    return true;
}

__attribute__((constructor)) static void enrol_these_kernels() {
    mistake_enrol(tell_these_kernels);
}
#endif

#ifdef __CUDA_ARCH__
#define MISTAKE(n) (kernels_mistake == (n))
#else
#define MISTAKE(n) (sown_mistake == (n))
#endif

#endif
