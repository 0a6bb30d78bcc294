// device.c: an opened GPU: its memory, its stream, its recorded sequences (CUDA graphs), and its table of ops. It owns
// no kernels.
#include "ops/cuda/device.h"

#include "base/size.h"
#include "ops/cuda/cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_RECORDINGS = 512,
    LEFT_OUT = 128, // tokens: fewer cost a layer less than gathering the others does (docs/SPEED.md)
};

// Those that `make gpu-check` has held against the others on a GPU, an H200, are on by default.
enum {
    VARIANTS_PROVEN = HOPPER ? VARIANT_WIDE_ATTENTION | VARIANT_WGMMA | VARIANT_PERSISTENT | VARIANT_STREAM_ATTENTION |
                                   VARIANT_CLUSTERS | VARIANT_WGMMA_QUANTISED | VARIANT_STORE_HEADS |
                                   VARIANT_WGMMA_ATTENTION | VARIANT_PARTS | VARIANT_CHAINED | VARIANT_BESIDE
                             : VARIANT_STORE_HEADS | VARIANT_WIDE_ATTENTION
};
static const char *const variant_names[N_VARIANTS + 1] = {
    "store-heads",     "wide-attention",  "persistent",        "wgmma",         "stream-attention", "cluster-products",
    "wgmma-quantised", "wgmma-attention", "products-in-parts", "chained-steps", "choice-beside",    NULL};

struct recording {
    uint64_t key;
    cudaGraphExec_t graph;
};

static struct cuda_state *state(struct device *d) {
    return (struct cuda_state *)(void *)((char *)d - offsetof(struct cuda_state, device));
}

static bool is_alarmed(const struct cuda_state *s) {
    return s->alarm && *(volatile unsigned *)s->alarm;
}

// The kernel that raised the alarm has ended the whole context: neither its own error nor that of whatever was asked
// for next would say why.
void cuda_check(struct cuda_state *s, cudaError_t e, const char *what) {
    if (e == cudaSuccess || s->failed != cudaSuccess) return;
    s->failed = is_alarmed(s) ? cudaErrorLaunchTimeout : e;
    s->failed_at = is_alarmed(s) ? "running all layers in one kernel, whose blocks waited for each other" : what;
}

// ---- Recorded sequences -------------------------------------------------------------------------------------------

static void forget_recordings(struct cuda_state *s) {
    for (size_t i = 0; i < s->n_recordings; i++) cudaGraphExecDestroy(s->recordings[i].graph);
    s->n_recordings = 0;
}

static bool begin(struct device *d, uint64_t key) {
    struct cuda_state *s = state(d);
    cuda_add_parts(s);
    s->packed = NULL;
    s->follows_choice = false;
    if (s->failed != cudaSuccess) return true;
    for (size_t i = 0; i < s->n_recordings; i++) {
        if (s->recordings[i].key != key) continue;
        cuda_check(s, cudaGraphLaunch(s->recordings[i].graph, s->stream), "launching a recorded step");
        return true;
    }
    if (s->n_recordings == MAX_RECORDINGS) forget_recordings(s);
    s->recording = key;
    cuda_check(s, cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeThreadLocal), "recording a step");
    return false;
}

static void end(struct device *d) {
    struct cuda_state *s = state(d);
    cudaGraph_t graph = NULL;
    struct recording *r = &s->recordings[s->n_recordings];
    cuda_add_parts(s);
    cuda_check(s, cudaStreamEndCapture(s->stream, &graph), "recording a step");
    if (s->failed == cudaSuccess) {
        cuda_check(s, cudaGraphInstantiate(&r->graph, graph, 0), "recording a step");
        if (s->failed == cudaSuccess) {
            r->key = s->recording;
            s->n_recordings++;
            cuda_check(s, cudaGraphLaunch(r->graph, s->stream), "launching a recorded step");
        }
    }
    if (graph) cudaGraphDestroy(graph);
    s->recording = 0;
}

// ---- Memory -------------------------------------------------------------------------------------------------------

static size_t available(struct device *d) {
    cudaSetDevice(state(d)->index);
    size_t free_bytes = 0, total = 0;
    return cudaMemGetInfo(&free_bytes, &total) == cudaSuccess ? free_bytes : 0;
}

static void *device_alloc(struct device *d, size_t bytes, const char *what, struct error *err) {
    void *memory = NULL;
    cudaSetDevice(state(d)->index);
    if (cudaMalloc(&memory, bytes ? bytes : 1) == cudaSuccess) return memory;
    (void)cudaGetLastError();
    error_set(err, "%s: out of memory for %s: %.2f GB asked for, %.2f GB of %.2f GB are free", d->name, what,
              (double)bytes / 1e9, (double)available(d) / 1e9, (double)d->memory / 1e9);
    return NULL;
}

// Recorded sequences may point into what is freed.
static void device_free(struct device *d, void *memory) {
    struct cuda_state *s = state(d);
    if (!memory) return;
    cuda_add_parts(s);
    cudaStreamSynchronize(s->stream);
    forget_recordings(s);
    cudaFree(memory);
}

static void *alloc_host(struct device *d, size_t bytes) {
    cudaSetDevice(state(d)->index);
    void *memory = NULL;
    if (cudaHostAlloc(&memory, bytes ? bytes : 1, cudaHostAllocDefault) == cudaSuccess) return memory;
    (void)cudaGetLastError();
    return NULL;
}

static void free_host(struct device *d, void *memory) {
    (void)d;
    if (memory) cudaFreeHost(memory);
}

static void copy(struct cuda_state *s, void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    cudaSetDevice(s->index); // the calling thread may be a new one
    cuda_add_parts(s);
    s->packed = NULL;
    s->follows_choice = false;
    if (s->failed != cudaSuccess || bytes == 0) return;
    cuda_check(s, cudaMemcpyAsync(to, from, bytes, kind, s->stream), "copying");
}

static void check_wait(struct cuda_state *s, cudaError_t e) {
    cuda_check(s, is_alarmed(s) ? cudaErrorLaunchTimeout : e, "running a step");
}

static void wait(struct cuda_state *s) {
    cuda_choose_now(s);
    if (s->failed == cudaSuccess) check_wait(s, cudaStreamSynchronize(s->stream));
}

static void put(struct device *d, void *to, const void *from, size_t bytes) {
    copy(state(d), to, from, bytes, cudaMemcpyHostToDevice);
    wait(state(d));
}

static void put_later(struct device *d, void *to, const void *from, size_t bytes) {
    copy(state(d), to, from, bytes, cudaMemcpyHostToDevice);
}

static void get(struct device *d, void *to, const void *from, size_t bytes) {
    copy(state(d), to, from, bytes, cudaMemcpyDeviceToHost);
    wait(state(d));
}

static void move(struct device *d, void *to, const void *from, size_t bytes) {
    copy(state(d), to, from, bytes, cudaMemcpyDeviceToDevice);
}

static void fill(struct device *d, void *to, uint8_t byte, size_t bytes) {
    struct cuda_state *s = state(d);
    cuda_add_parts(s);
    s->packed = NULL;
    s->follows_choice = false;
    if (s->failed == cudaSuccess) cuda_check(s, cudaMemsetAsync(to, byte, bytes, s->stream), "filling memory");
}

static bool sync_device(struct device *d, struct error *err) {
    struct cuda_state *s = state(d);
    wait(s);
    if (s->failed == cudaSuccess) return true;
    return error_set(err, "%s failed while %s: %s (%s)", d->name, s->failed_at, cudaGetErrorString(s->failed),
                     cudaGetErrorName(s->failed));
}

static void mark_by_choice(struct device *d, unsigned number) {
    struct cuda_state *s = state(d);
    s->flagged[number]++;
    s->is_flagged[number] = true;
    s->marking = number + 1;
}

struct choice_mark cuda_take_mark(struct cuda_state *s) {
    unsigned i = s->marking;
    s->marking = 0;
    return i ? (struct choice_mark){s->flags + i - 1, s->flagged[i - 1]} : (struct choice_mark){NULL, 0};
}

// Looks at the GPU itself now and then: it may have failed.
static void await_flag(struct cuda_state *s, unsigned number) {
    enum { LOOKS = 4096 };
    const volatile uint32_t *flag = s->flags + number;
    for (unsigned looks = 1; *flag != s->flagged[number]; looks++) {
        if (looks % LOOKS) continue;
        cudaError_t e = cudaStreamQuery(s->stream);
        if (e == cudaErrorNotReady) continue;
        if (e == cudaSuccess && *flag != s->flagged[number]) e = cudaErrorLaunchTimeout;
        if (e != cudaSuccess) {
            check_wait(s, e);
            return;
        }
    }
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
}

static void mark(struct device *d, unsigned number) {
    struct cuda_state *s = state(d);
    cuda_choose_now(s);
    s->is_flagged[number] = false;
    s->follows_choice = false;
    if (s->failed == cudaSuccess) cuda_check(s, cudaEventRecord(s->marks[number], s->stream), "running a step");
}

static bool reach(struct device *d, unsigned number) {
    struct cuda_state *s = state(d);
    if (s->choice.mark.flag == s->flags + number) cuda_choose_now(s);
    if (s->failed == cudaSuccess && s->is_flagged[number]) await_flag(s, number);
    else if (s->failed == cudaSuccess) check_wait(s, cudaEventSynchronize(s->marks[number]));
    return s->failed == cudaSuccess;
}

static const void *show(struct device *d, const void *data, size_t bytes) {
    struct cuda_state *s = state(d);
    if (bytes > s->shown_bytes) {
        free_host(d, s->shown);
        s->shown = alloc_host(d, bytes);
        s->shown_bytes = s->shown ? bytes : 0;
    }
    if (!s->shown) return NULL;
    get(d, s->shown, data, bytes);
    return s->failed == cudaSuccess ? s->shown : NULL;
}

// ---- Matrices -----------------------------------------------------------------------------------------------------

// Records of 8 rows by 128 columns (matrix.cuh, quantised.cuh): rows to whole pairs of units, columns to whole slices.
static size_t matrix_bytes(struct device *d, const struct matrix *w) {
    (void)d;
    size_t rows, columns, n, record = w->type == DTYPE_BF16 ? 8 * 128 * 2 : cuda_quantised_record(w->type);
    if (w->n_in % 4 != 0 || w->n_in % dtype_info(w->type)->block_len != 0 || !size_align_up(w->n_out, 16, &rows) ||
        !size_align_up(w->n_in, 128, &columns) || !size_mul(rows / 8, columns / 128, &n) || !size_mul(n, record, &n))
        return 0;
    return n;
}

static bool new_matrix(struct device *d, struct matrix *out, const struct matrix *w, struct error *err) {
    size_t bytes = matrix_bytes(d, w);
    if (bytes == 0)
        return error_set(err, "%s cannot multiply tensor %s [%zu, %zu] of type %s", d->name, w->name, w->n_out, w->n_in,
                         dtype_info(w->type)->name);
    void *memory = device_alloc(d, bytes, "weights", err);
    if (!memory) return false;
    *out = *w;
    out->data = memory;
    cuda_load_products(state(d), w->type);
    fill(d, memory, 0, bytes);
    return true;
}

static void pack_rows(struct device *d, const struct matrix *out, const void *rows, size_t first, size_t n) {
    if (out->type == DTYPE_BF16) cuda_pack_rows(state(d), out, rows, first, n);
    else cuda_pack_quantised(state(d), out, rows, first, n);
}

static bool can_attend(size_t head_dim) {
    return head_dim > 0 && head_dim % 32 == 0 && head_dim <= 128;
}

static void load_attention(struct device *d, enum dtype kv_type, size_t head_dim) {
    cudaSetDevice(state(d)->index);
    if (can_attend(head_dim)) cuda_load_attention(state(d), kv_type == DTYPE_FP8, (int)head_dim);
}

static bool can_run(struct device *d, size_t n_heads, size_t n_kv_heads, size_t head_dim, struct error *err) {
    if (!can_attend(head_dim))
        return error_set(err, "%s: head_dim 32, 64, 96 or 128 is expected, the model has %zu", d->name, head_dim);
    if (n_heads / n_kv_heads > 16)
        return error_set(err, "%s: at most 16 query heads for a KV head are expected, the model has %zu", d->name,
                         n_heads / n_kv_heads);
    return true;
}

// ---- Opening ------------------------------------------------------------------------------------------------------

int ops_cuda_count(void) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return n;
}

static bool find_gpu(int index, struct error *err) {
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    (void)cudaGetLastError();
    if (e == cudaErrorInsufficientDriver) {
        int driver = 0;
        cudaDriverGetVersion(&driver);
        if (driver == 0)
            return error_set(err, "device cuda:%d: no CUDA driver was found on this machine (libcuda.so.1)", index);
        return error_set(err, "device cuda:%d: the driver supports CUDA %d.%d, this build needs %d.%d", index,
                         driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    if (e == cudaErrorNoDevice || (e == cudaSuccess && n == 0))
        return error_set(err, "device cuda:%d: the CUDA driver finds no GPU on this machine", index);
    if (e != cudaSuccess) return error_set(err, "device cuda:%d: %s", index, cudaGetErrorString(e));
    if (index >= n) return error_set(err, "device cuda:%d: this machine has %d, cuda:0 to cuda:%d", index, n, n - 1);
    return true;
}

static bool start(struct cuda_state *s, struct error *err) {
    struct cudaDeviceProp p;
    cudaError_t e = cudaGetDeviceProperties(&p, s->index);
    if (e == cudaSuccess) {
        snprintf(s->device.name, sizeof s->device.name, "%s (%.120s)", s->short_name, p.name);
        s->device.memory = p.totalGlobalMem;
        s->n_sms = p.multiProcessorCount;
        int chip = p.major * 10 + p.minor;
        if (HOPPER ? chip != 90 : chip < 80)
            return error_set(err, "device %s: its compute capability is %d.%d; this build has kernels for %s",
                             s->device.name, p.major, p.minor,
                             HOPPER ? "9.0 (H100, H200; make CUDA_CHIP=80 builds for others from 8.0 on)"
                                    : "8.0 and later");
        e = cudaSetDevice(s->index);
    }
    if (e == cudaSuccess) e = cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking);
    for (int i = 0; i < DEVICE_MARKS && e == cudaSuccess; i++)
        e = cudaEventCreateWithFlags(&s->marks[i], cudaEventDisableTiming);
    if (e == cudaSuccess) e = cudaHostAlloc((void **)&s->flags, DEVICE_MARKS * sizeof *s->flags, cudaHostAllocDefault);
    if (e == cudaSuccess) memset(s->flags, 0, DEVICE_MARKS * sizeof *s->flags);
    if (e == cudaSuccess) e = cudaMalloc((void **)&s->arrivals, MOST_ARRIVALS * sizeof *s->arrivals);
    if (e == cudaSuccess) e = cudaMemset(s->arrivals, 0, MOST_ARRIVALS * sizeof *s->arrivals);
    if (e == cudaSuccess) e = cudaMalloc(&s->parts, cuda_choose_bytes());
    if (e == cudaSuccess) e = cudaMalloc((void **)&s->best, 2 * sizeof *s->best);
    if (e == cudaSuccess) e = cudaMemset(s->best, 0, 2 * sizeof *s->best);
    if (e == cudaSuccess) e = cudaMalloc(&s->sampling, cuda_sample_bytes());
    if (e == cudaSuccess) e = cudaMemset(s->sampling, 0, cuda_sample_bytes());
    if (e == cudaSuccess && HOPPER) {
        cuda_persistent_setup(s);
        cuda_groups_setup(s);
        e = s->failed;
    }
    return e == cudaSuccess ||
           error_set(err, "device %s: %s (%s)", s->short_name, cudaGetErrorString(e), cudaGetErrorName(e));
}

const struct ops *ops_cuda_open(int index, struct error *err) {
    if (!find_gpu(index, err)) return NULL;
    struct cuda_state *s = size_alloc_zero(1, sizeof *s);
    if (s) s->recordings = size_alloc_zero(MAX_RECORDINGS, sizeof *s->recordings);
    if (!s || !s->recordings) {
        free(s);
        error_set(err, "out of memory");
        return NULL;
    }
    s->index = index;
    snprintf(s->short_name, sizeof s->short_name, "cuda:%d", index);
    s->device = (struct device){.can_run = can_run,
                                .alloc = device_alloc,
                                .free = device_free,
                                .alloc_host = alloc_host,
                                .free_host = free_host,
                                .available = available,
                                .put = put,
                                .send = put_later,
                                .get = get,
                                .move = move,
                                .fill = fill,
                                .sync = sync_device,
                                .mark = mark,
                                .reach = reach,
                                .mark_by_choice = mark_by_choice,
                                .show = show,
                                .matrix_bytes = matrix_bytes,
                                .new_matrix = new_matrix,
                                .pack_rows = pack_rows,
                                .load_attention = load_attention,
                                .begin = begin,
                                .end = end,
                                .variant_names = variant_names,
                                .n_variants = HOPPER ? N_VARIANTS : N_ANY_CHIP,
                                .variants = VARIANTS_PROVEN,
                                .kv_types = 1u << DTYPE_BF16 | 1u << DTYPE_FP8};
    s->ops =
        (struct ops){.name = s->short_name, .device = &s->device, .least_left_out = LEFT_OUT, .attn_block = ATTN_CHUNK};
    cuda_fill_pointwise(&s->ops);
    cuda_fill_products(&s->ops);
    cuda_fill_attention(&s->ops);
    cuda_fill_choose(&s->ops);
    cuda_fill_persistent(&s->ops);
    cuda_fill_sample(&s->ops);
    if (start(s, err)) return &s->ops;
    ops_cuda_close(&s->ops);
    return NULL;
}

void ops_cuda_close(const struct ops *ops) {
    if (!ops) return;
    struct cuda_state *s = (struct cuda_state *)(uintptr_t)ops;
    forget_recordings(s);
    if (s->arrivals) cudaFree(s->arrivals);
    if (s->parts) cudaFree(s->parts);
    if (s->best) cudaFree(s->best);
    if (s->alarm) cudaFreeHost(s->alarm);
    if (s->flags) cudaFreeHost(s->flags);
    if (s->sampling) cudaFree(s->sampling);
    free_host(&s->device, s->shown);
    for (int i = 0; i < DEVICE_MARKS; i++)
        if (s->marks[i]) cudaEventDestroy(s->marks[i]);
    if (s->stream) cudaStreamDestroy(s->stream);
    free(s->recordings);
    free(s);
}
