// cuda_runtime_api.h: the part of CUDA's runtime that the backend calls, as the emulator has it (emulator.h). It stands
// in for the toolkit's header of the same name. Kernels are launched through a template, in C++ only.
#ifndef TANDEM_TESTS_CUDA_RUNTIME_API_H
#define TANDEM_TESTS_CUDA_RUNTIME_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CUDART_VERSION 13000

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cudaError {
    cudaSuccess,
    cudaErrorInvalidValue,
    cudaErrorMemoryAllocation,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorLaunchTimeout = 702,
    cudaErrorNotReady = 600,
    cudaErrorStreamCaptureUnsupported = 900,
} cudaError_t;

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
};
enum { cudaStreamNonBlocking = 1, cudaHostAllocDefault = 0, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaLaunchAttributeID {
    cudaLaunchAttributeClusterDimension = 4,
    cudaLaunchAttributeProgrammaticStreamSerialization = 6
};

typedef struct emulated_stream *cudaStream_t;
typedef struct emulated_event *cudaEvent_t;
typedef struct emulated_graph *cudaGraph_t;
typedef struct emulated_graph *cudaGraphExec_t;

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int major, minor, multiProcessorCount;
};

typedef struct dim3 {
    unsigned x, y, z;
#ifdef __cplusplus
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {
    }
#endif
} dim3;

typedef struct cudaLaunchAttribute {
    enum cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
} cudaLaunchAttribute;

typedef struct cudaLaunchConfig {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
} cudaLaunchConfig_t;

cudaError_t cudaGetDeviceCount(int *n);
cudaError_t emulated_properties(struct cudaDeviceProp *p, int device, int chip); // chip: 90, or 86 of the older ones
#define cudaGetDeviceProperties(p, device) emulated_properties(p, device, TANDEM_CUDA_CHIP >= 90 ? 90 : 86)
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaGetLastError(void);
const char *cudaGetErrorString(cudaError_t e);
const char *cudaGetErrorName(cudaError_t e);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t s);
cudaError_t cudaStreamSynchronize(cudaStream_t s);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t e);
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s);
cudaError_t cudaEventSynchronize(cudaEvent_t e);
cudaError_t cudaStreamQuery(cudaStream_t s);
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaMalloc(void **memory, size_t bytes);
cudaError_t cudaFree(void *memory);
cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaMemGetInfo(size_t *available, size_t *total);
cudaError_t cudaMemset(void *to, int byte, size_t bytes);
cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t s);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t s);

// A kernel with its arguments, copied: `call` runs one thread of it. `kernel` is its address.
struct emulated_kernel {
    void (*call)(const void *arguments);
    void *arguments; // malloc'd, the callee's
    size_t bytes;
    const void *kernel;
};
cudaError_t emulated_launch(const cudaLaunchConfig_t *config, struct emulated_kernel kernel);
cudaError_t emulated_allow_shared(const void *kernel, int bytes);
cudaError_t emulated_clusters(int *n, const cudaLaunchConfig_t *config);

#ifdef __cplusplus
}

extern "C++" {
#include <new>
#include <stdlib.h>
#include <tuple>
#include <type_traits>

template <typename... P> struct emulated_call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
    static void call(const void *memory) {
        const emulated_call *c = static_cast<const emulated_call *>(memory);
        std::apply(c->kernel, c->arguments);
    }
};

template <typename... P>
static cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...), P... args) {
    static_assert((std::is_trivially_copyable<P>::value && ...), "arguments are copied as bytes");
    using call = emulated_call<P...>;
    void *memory = malloc(sizeof(call));
    if (!memory) return cudaErrorMemoryAllocation;
    new (memory) call{kernel, std::tuple<P...>(args...)};
    return emulated_launch(config, {call::call, memory, sizeof(call), reinterpret_cast<const void *>(kernel)});
}

template <typename K> static cudaError_t cudaFuncSetAttribute(K kernel, cudaFuncAttribute, int value) {
    return emulated_allow_shared((const void *)kernel, value);
}

template <typename K> static cudaError_t cudaOccupancyMaxActiveClusters(int *n, K, const cudaLaunchConfig_t *config) {
    return emulated_clusters(n, config);
}
}
#endif

#endif
