// runtime.c: the emulated GPU's memory, streams, graphs and launches.
#include "internal.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct emulator_options emulated_options = {.seed = 1};
struct emulator_counts emulated_counts;

static uint64_t random_state = 0x9E3779B97F4A7C15u;

uint64_t emulated_random(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state >> 11;
}

bool emulated_chance(unsigned n) {
    return !emulated_options.keep_order && emulated_random() % n == 0;
}

void emulator_set(const struct emulator_options *o) {
    emulated_options = *o;
    random_state = (o->seed + 1) * 0x9E3779B97F4A7C15u;
    for (int i = 0; i < 8; i++) emulated_random();
}

struct emulator_counts emulator_counts(void) {
    return emulated_counts;
}

// ---- Memory: each allocation ends at a page that nobody may touch, and begins behind one --------------------------

enum { PAGE = 4096, ALIGNED = 256 };
static const size_t total_memory = (size_t)4 << 30;

struct allocation {
    unsigned char *base, *at; // the mapping; what the caller has
    size_t mapped, bytes;
    bool is_device;
    struct allocation *next;
};
static struct allocation *allocations;
static size_t used;

static void report_fault(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    char text[160];
    emulated_describe(info->si_addr, text, sizeof text);
    emulated_fail("a read or write at %p: %s", info->si_addr, text);
}

static void watch_faults(void) {
    static char stack[64 * 1024];
    static bool done;
    if (done) return;
    done = true;
    sigaltstack(&(stack_t){.ss_sp = stack, .ss_size = sizeof stack}, NULL);
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_ONSTACK};
    action.sa_sigaction = report_fault;
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
}

void emulated_describe(const void *address, char *text, size_t size) {
    const unsigned char *p = address;
    for (const struct allocation *a = allocations; a; a = a->next) {
        if (p < a->base || p >= a->base + a->mapped) continue;
        if (p >= a->at && p < a->at + a->bytes)
            snprintf(text, size, "written before the kernel before had ended, byte %zu of %zu", (size_t)(p - a->at),
                     a->bytes);
        else if (p < a->at)
            snprintf(text, size, "%zu bytes before an allocation of %zu", (size_t)(a->at - p), a->bytes);
        else snprintf(text, size, "%zu bytes behind an allocation of %zu", (size_t)(p - a->at) - a->bytes, a->bytes);
        return;
    }
    snprintf(text, size, "no allocation is near");
}

void emulated_check_range(const void *p, size_t bytes, const char *what) {
    const unsigned char *at = p;
    for (const struct allocation *a = allocations; a; a = a->next)
        if (at >= a->at && at + bytes <= a->at + a->bytes) return;
    char text[160];
    emulated_describe(p, text, sizeof text);
    emulated_fail("%s is outside device memory: %s", what, text);
}

static cudaError_t allocate(void **memory, size_t bytes, bool is_device) {
    watch_faults();
    if (bytes > total_memory - used) return cudaErrorMemoryAllocation;
    size_t kept = (bytes + ALIGNED - 1) / ALIGNED * ALIGNED, pages = (kept + PAGE - 1) / PAGE * PAGE;
    struct allocation *a = calloc(1, sizeof *a);
    if (!a) return cudaErrorMemoryAllocation;
    a->mapped = pages + 2 * PAGE;
    a->base = mmap(NULL, a->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (a->base == MAP_FAILED || mprotect(a->base + PAGE, pages, PROT_READ | PROT_WRITE) != 0) {
        free(a);
        return cudaErrorMemoryAllocation;
    }
    memset(a->base + PAGE, 0xFF, pages);
    a->at = a->base + PAGE + pages - kept;
    a->bytes = bytes;
    a->is_device = is_device;
    a->next = allocations;
    allocations = a;
    if (is_device) used += bytes;
    *memory = a->at;
    return cudaSuccess;
}

static void check_edges(const struct allocation *a) {
    for (const unsigned char *p = a->base + PAGE; p < a->base + a->mapped - PAGE; p++)
        if ((p < a->at || p >= a->at + a->bytes) && *p != 0xFF) {
            char text[160];
            emulated_describe(p, text, sizeof text);
            emulated_fail("something wrote %s", text);
        }
}

static cudaError_t release(void *memory) {
    for (struct allocation **at = &allocations; *at; at = &(*at)->next) {
        struct allocation *a = *at;
        if (a->at != memory) continue;
        check_edges(a);
        if (a->is_device) used -= a->bytes;
        munmap(a->base, a->mapped);
        *at = a->next;
        free(a);
        return cudaSuccess;
    }
    return cudaErrorInvalidValue;
}

// Device memory can only be read, or written again.
static void protect(bool read_only) {
    for (const struct allocation *a = allocations; a; a = a->next)
        if (a->is_device)
            mprotect(a->base + PAGE, a->mapped - 2 * PAGE, read_only ? PROT_READ : PROT_READ | PROT_WRITE);
}

// ---- What is queued -----------------------------------------------------------------------------------------------

enum node_kind { KERNEL, COPY, FILL, FENCE, EVENT }; // FENCE, EVENT: nothing behind it begins early

struct node {
    enum node_kind kind;
    struct kernel_node kernel;
    void *to;
    const void *from;
    int byte;
    size_t bytes;
    struct emulated_event *event;
};

// How often it was recorded, and how many of these records were reached.
struct emulated_event {
    uint64_t recorded, reached;
    struct emulated_stream *stream;
};

struct emulated_graph {
    struct node *nodes;
    size_t n, room;
};

struct emulated_stream {
    struct emulated_graph queue, *recording;
    struct emulated_stream *next;
};
static struct emulated_stream *streams;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void append(struct emulated_graph *list, struct node node) {
    if (list->n == list->room) {
        list->room = list->room ? 2 * list->room : 64;
        list->nodes = realloc(list->nodes, list->room * sizeof *list->nodes);
        if (!list->nodes) emulated_fail("out of memory");
    }
    list->nodes[list->n++] = node;
}

// Copies of all nodes, with arguments of their own.
static void append_all(struct emulated_graph *to, const struct emulated_graph *from) {
    for (size_t i = 0; i < from->n; i++) {
        struct node n = from->nodes[i];
        if (n.kind == KERNEL) {
            void *arguments = malloc(n.kernel.kernel.bytes);
            if (!arguments) emulated_fail("out of memory");
            memcpy(arguments, n.kernel.kernel.arguments, n.kernel.kernel.bytes);
            n.kernel.kernel.arguments = arguments;
        }
        append(to, n);
    }
}

static void clear(struct emulated_graph *list) {
    for (size_t i = 0; i < list->n; i++)
        if (list->nodes[i].kind == KERNEL) free(list->nodes[i].kernel.kernel.arguments);
    list->n = 0;
}

// ---- Running it ---------------------------------------------------------------------------------------------------

enum { MOST_EARLY = 6 };

struct early {
    size_t node, index; // which block of which kernel; node SIZE_MAX: none
    struct block *block;
};

enum { MOST_TOGETHER = 64 }; // a block has some 800 pieces of memory, of which a process may have 65,000

static struct block *plain, *together[MOST_TOGETHER];
static struct early early[MOST_EARLY];

static void create_blocks(void) {
    if (plain) return;
    plain = block_create();
    for (int i = 0; i < MOST_EARLY; i++) early[i] = (struct early){SIZE_MAX, 0, block_create()};
    for (int i = 0; i < MOST_EARLY; i++)
        if (!plain || !early[i].block) emulated_fail("out of memory");
}

static size_t n_blocks(const struct kernel_node *k) {
    return (size_t)k->grid.x * k->grid.y * k->grid.z;
}

// Begins blocks of the kernels behind `at`.
static void begin_early(const struct emulated_graph *q, size_t at) {
    for (size_t i = at + 1; i < q->n && i <= at + MOST_EARLY && q->nodes[i].kind == KERNEL && q->nodes[i].kernel.early;
         i++) {
        if (q->nodes[i].kernel.cluster) break;
        struct early *free_one = NULL;
        bool begun = false;
        for (int j = 0; j < MOST_EARLY; j++) {
            if (early[j].node == SIZE_MAX) free_one = &early[j];
            else if (early[j].node == i) begun = true;
        }
        if (begun || !free_one || !emulated_chance(4)) continue;
        free_one->index = (size_t)emulated_random() % n_blocks(&q->nodes[i].kernel);
        bool read_only = emulated_chance(16);
        if (read_only) protect(true);
        bool ended = block_start(free_one->block, &q->nodes[i].kernel, free_one->index, true);
        if (read_only) protect(false);
        if (ended) emulated_fail("a block ended before the kernel before it");
        free_one->node = i;
    }
}

static int sms(void) {
    return emulated_options.n_sms ? emulated_options.n_sms : 8;
}

static void run_kernel(const struct emulated_graph *q, size_t at) {
    const struct kernel_node *k = &q->nodes[at].kernel;
    size_t n = n_blocks(k);
    // All at once where the GPU holds them, else one cluster after the other: blocks that wait for another cluster
    // hang.
    size_t at_once = !k->cluster ? 1 : n <= MOST_TOGETHER && n <= (size_t)sms() ? n : k->cluster;
    uint32_t *order = malloc(n * sizeof *order);
    if (!order) emulated_fail("out of memory");
    for (size_t i = 0; i < n / at_once; i++) {
        size_t j = emulated_options.keep_order ? i : (size_t)emulated_random() % (i + 1);
        order[i] = order[j];
        order[j] = (uint32_t)i;
    }
    begin_early(q, at);
    for (size_t i = 0; k->cluster && i < at_once; i++)
        if (!together[i] && !(together[i] = block_create())) emulated_fail("out of memory");
    for (size_t i = 0; k->cluster && i < n; i += at_once)
        blocks_run_together(together, order[i / at_once] * at_once, at_once, k);
    if (k->cluster) {
        free(order);
        emulated_counts.launches++;
        emulated_counts.together += at_once == n;
        return;
    }
    for (size_t i = 0; i < n; i++) {
        struct early *begun = NULL;
        for (int j = 0; j < MOST_EARLY; j++)
            if (early[j].node == at && early[j].index == order[i]) begun = &early[j];
        if (begun) {
            block_resume(begun->block);
            begun->node = SIZE_MAX;
        } else if (!block_start(plain, k, order[i], false)) emulated_fail("a block waits for nothing");
    }
    free(order);
    emulated_counts.launches++;
}

// Up to where `until` was last recorded; NULL: all of it. No block behind an event has begun.
static void run_queue(struct emulated_graph *q, struct emulated_event *until) {
    create_blocks();
    size_t done = 0;
    while (done < q->n && !(until && until->reached == until->recorded)) {
        const struct node *n = &q->nodes[done];
        if (n->kind == KERNEL) run_kernel(q, done);
        else if (n->kind == COPY) memmove(n->to, n->from, n->bytes);
        else if (n->kind == FILL) memset(n->to, n->byte, n->bytes);
        else if (n->kind == EVENT) n->event->reached++;
        done++;
    }
    for (size_t i = 0; i < done; i++)
        if (q->nodes[i].kind == KERNEL) free(q->nodes[i].kernel.kernel.arguments);
    if (done) memmove(q->nodes, q->nodes + done, (q->n - done) * sizeof *q->nodes);
    q->n -= done;
}

static void run_all(void) {
    for (struct emulated_stream *s = streams; s; s = s->next) run_queue(&s->queue, NULL);
}

static struct emulated_graph *target(cudaStream_t s) {
    return s->recording ? s->recording : &s->queue;
}

// ---- The runtime's functions --------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int *n) {
    *n = 1;
    return cudaSuccess;
}

cudaError_t emulated_clusters(int *n, const cudaLaunchConfig_t *c) {
    *n = sms() / (int)c->attrs[1].val.clusterDim.x;
    return cudaSuccess;
}

static int most_shared = MOST_SHARED; // of a block's dynamic shared memory

cudaError_t emulated_properties(struct cudaDeviceProp *p, int device, int chip) {
    if (device != 0) return cudaErrorInvalidValue;
    if (emulated_options.chip) chip = emulated_options.chip;
    *p = (struct cudaDeviceProp){.totalGlobalMem = total_memory, .major = chip / 10, .minor = chip % 10};
    most_shared = chip == 90 || chip == 100 ? MOST_SHARED : chip == 80 ? 163 * 1024 : 99 * 1024;
    snprintf(p->name, sizeof p->name, "emulated on the CPU");
    p->multiProcessorCount = sms();
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "out of memory" : e == cudaSuccess ? "no error" : "invalid argument";
}

const char *cudaGetErrorName(cudaError_t e) {
    return e == cudaErrorMemoryAllocation           ? "cudaErrorMemoryAllocation"
           : e == cudaErrorStreamCaptureUnsupported ? "cudaErrorStreamCaptureUnsupported"
                                                    : "cudaErrorInvalidValue";
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    (void)flags;
    *s = calloc(1, sizeof **s);
    if (!*s) return cudaErrorMemoryAllocation;
    pthread_mutex_lock(&lock);
    (*s)->next = streams;
    streams = *s;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t s) {
    pthread_mutex_lock(&lock);
    run_queue(&s->queue, NULL);
    for (struct emulated_stream **at = &streams; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    free(s->queue.nodes);
    free(s);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    if (s->recording) return cudaErrorStreamCaptureUnsupported;
    pthread_mutex_lock(&lock);
    run_queue(&s->queue, NULL);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
    (void)flags;
    *e = calloc(1, sizeof **e);
    return *e ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaEventDestroy(cudaEvent_t e) {
    pthread_mutex_lock(&lock);
    run_all();
    pthread_mutex_unlock(&lock);
    free(e);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    if (s->recording) return cudaErrorStreamCaptureUnsupported;
    e->stream = s;
    e->recorded++;
    append(&s->queue, (struct node){.kind = EVENT, .event = e});
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    pthread_mutex_lock(&lock);
    if (e->reached < e->recorded) run_queue(&e->stream->queue, e);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

// Nothing runs but for those who ask.
cudaError_t cudaStreamQuery(cudaStream_t s) {
    pthread_mutex_lock(&lock);
    run_queue(&s->queue, NULL);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
    (void)mode;
    if (s->recording) return cudaErrorStreamCaptureUnsupported;
    s->recording = calloc(1, sizeof *s->recording);
    return s->recording ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    *graph = s->recording;
    s->recording = NULL;
    return *graph ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    (void)flags;
    *exec = calloc(1, sizeof **exec);
    if (!*exec) return cudaErrorMemoryAllocation;
    append_all(*exec, graph);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    if (s->recording) return cudaErrorStreamCaptureUnsupported;
    append(&s->queue, (struct node){.kind = FENCE});
    append_all(&s->queue, exec);
    append(&s->queue, (struct node){.kind = FENCE});
    emulated_counts.replayed++;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    clear(graph);
    free(graph->nodes);
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    return cudaGraphDestroy(exec);
}

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    pthread_mutex_lock(&lock);
    cudaError_t e = allocate(memory, bytes, true);
    pthread_mutex_unlock(&lock);
    return e;
}

cudaError_t cudaFree(void *memory) {
    if (!memory) return cudaSuccess;
    pthread_mutex_lock(&lock);
    run_all();
    cudaError_t e = release(memory);
    pthread_mutex_unlock(&lock);
    return e;
}

cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    cudaError_t e = allocate(memory, bytes, false);
    pthread_mutex_unlock(&lock);
    return e;
}

cudaError_t cudaFreeHost(void *memory) {
    return cudaFree(memory);
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = total_memory - used;
    *total = total_memory;
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int byte, size_t bytes) {
    pthread_mutex_lock(&lock);
    run_all();
    emulated_check_range(to, bytes, "what is filled");
    memset(to, byte, bytes);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t s) {
    emulated_check_range(to, bytes, "what is filled");
    append(target(s), (struct node){.kind = FILL, .to = to, .byte = byte, .bytes = bytes});
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t s) {
    if (kind != cudaMemcpyDeviceToHost) emulated_check_range(to, bytes, "a copy's target");
    if (kind != cudaMemcpyHostToDevice) emulated_check_range(from, bytes, "a copy's source");
    append(target(s), (struct node){.kind = COPY, .to = to, .from = from, .bytes = bytes});
    return cudaSuccess;
}

// ---- Launches -----------------------------------------------------------------------------------------------------

// Dynamic shared memory beyond 48 KB must have been allowed.
struct allowed {
    const void *kernel;
    size_t bytes;
    struct allowed *next;
};
static struct allowed *allowed;

cudaError_t emulated_allow_shared(const void *kernel, int bytes) {
    if (bytes < 0 || bytes > most_shared) return cudaErrorInvalidValue;
    struct allowed *a = malloc(sizeof *a);
    if (!a) return cudaErrorMemoryAllocation;
    *a = (struct allowed){kernel, (size_t)bytes, allowed};
    allowed = a;
    return cudaSuccess;
}

cudaError_t emulated_launch(const cudaLaunchConfig_t *c, struct emulated_kernel kernel) {
    size_t most = 48 * 1024;
    for (const struct allowed *a = allowed; a; a = a->next)
        if (a->kernel == kernel.kernel) {
            most = a->bytes;
            break;
        }
    dim3 g = c->gridDim, b = c->blockDim;
    if (c->dynamicSmemBytes > most || b.x == 0 || b.x % 32 || b.x > MOST_THREADS || b.y != 1 || b.z != 1 || g.x == 0 ||
        g.y == 0 || g.z == 0 || g.x > 0x7FFFFFFF || g.y > 65535 || g.z > 65535) {
        free(kernel.arguments);
        return cudaErrorInvalidValue;
    }
    bool may_begin = false;
    unsigned cluster = 0;
    for (unsigned i = 0; i < c->numAttrs; i++)
        if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = c->attrs[i].val.clusterDim.x;
    if (cluster && (g.x % cluster || cluster > MOST_TOGETHER || cluster > (unsigned)sms())) {
        free(kernel.arguments);
        return cudaErrorInvalidValue;
    }
    for (unsigned i = 0; i < c->numAttrs; i++)
        may_begin |= c->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                     c->attrs[i].val.programmaticStreamSerializationAllowed;
    append(target(c->stream), (struct node){.kind = KERNEL,
                                            .kernel = {.kernel = kernel,
                                                       .grid = g,
                                                       .threads = b.x,
                                                       .shared = c->dynamicSmemBytes,
                                                       .early = may_begin,
                                                       .cluster = cluster}});
    return cudaSuccess;
}
