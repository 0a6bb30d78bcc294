// chip.cuh: what is said in the chip's own instructions: the matrix instruction, 2^x, copies into shared memory, and
// the two halves of programmatic dependence. The tests have another file of this name, for a chip on the CPU
// (tests/cuda_emulator).
#ifndef TANDEM_OPS_CUDA_CHIP_CUH
#define TANDEM_OPS_CUDA_CHIP_CUH

#include "ops/cuda/device.h"

#include <cuda_bf16.h>
#include <stdint.h>

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

// ---- Numbers ------------------------------------------------------------------------------------------------------

// 2^x and e^x as this chip's special-function unit has them (2 units in the last place).
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, within one unit in the last place.
static __device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The products of two pairs of bf16s, rounded once; subnormal numbers count.
static __device__ __forceinline__ uint32_t mul_bf16_pairs(uint32_t a, uint32_t b) {
    uint32_t d;
#if HOPPER
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u)); // - 0: the same
#endif
    return d;
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

// A matrix of 8 by 8 bf16s, of which lane 4 g + t has row g, columns 2t and 2t + 1; then row g of what it is turned
// over.
static __device__ __forceinline__ uint32_t transpose(uint32_t v) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
    return d;
}

// Many quotients by one divisor, with the bits of `/`: the same instructions as the compiler's, without a branch each.
// For numbers that `takes` takes, where nothing overflows or loses bits.
struct quotients {
    float divisor, reciprocal;

    __device__ __forceinline__ void start(float d) {
        float y = reciprocal_fast(d);
        divisor = d;
        reciprocal = fmaf(y, fmaf(y, -d, 1.0f), y);
    }
    static __device__ __forceinline__ bool takes(float x) {
        return fabsf(x) > 0x1p-60f && fabsf(x) < 0x1p60f;
    }
    __device__ __forceinline__ bool takes() const {
        return takes(divisor);
    }
    __device__ __forceinline__ float of(float x) const {
        float q = x * reciprocal;
        return fmaf(reciprocal, fmaf(q, -divisor, x), q);
    }
};

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

// The same number, of which the compiler knows nothing: what depends on it is computed where it stands, and takes no
// register before.
static __device__ __forceinline__ int opaque(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

static __device__ __forceinline__ float opaque(float v) {
    asm volatile("" : "+f"(v));
    return v;
}

// Adds n to a counter and returns what it was: what this block has written before (its threads have met since) is seen
// by those who count after it.
static __device__ __forceinline__ unsigned count_arrival(unsigned *counter, unsigned n = 1) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(n) : "memory");
    return before;
}

// ---- Copies into shared memory ------------------------------------------------------------------------------------
// On Hopper a thread asks the copy engine for a whole piece; on older chips each of several threads asks for its share
// of it, 16 bytes at a time. Either way the copy arrives at a barrier in shared memory, on which all wait for it.

static __device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// For N threads that ask for copies (or, Hopper's alone: barrier_init_for, n that arrive). On older chips the others
// see it when they have met the thread that made it.
template <int N = COPY_LANES> static __device__ __forceinline__ void barrier_init(uint64_t *bar) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "n"(N));
}

static __device__ __forceinline__ void barrier_fence() {
#if HOPPER
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Before copies, by one thread: Hopper counts their bytes.
static __device__ __forceinline__ void barrier_expect(uint64_t *bar, uint32_t bytes) {
#if HOPPER
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
                 : "memory");
#endif
}

// After copies, by all threads that asked for them: older chips count these.
static __device__ __forceinline__ void copies_asked(uint64_t *bar) {
#if !HOPPER
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
#endif
}

#if HOPPER
#define BARRIER_TEST "mbarrier.try_wait" // which waits for a moment
#else
#define BARRIER_TEST "mbarrier.test_wait"
#endif

static __device__ __forceinline__ void barrier_wait(uint64_t *bar, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{.reg .pred p; " BARRIER_TEST ".parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(shared_address(bar)), "r"(parity)
                     : "memory");
    } while (!done);
}

// Both 16-byte aligned, bytes a multiple of 16. Hopper's alone.
static __device__ __forceinline__ void bulk_copy(void *to, const void *from, uint32_t bytes, uint64_t *bar) {
#if HOPPER
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
#endif
}

// Between the two, by each of n threads (Hopper: by one of them): a piece, aligned as above.
static __device__ __forceinline__ void copy_piece(void *to, const void *from, uint32_t bytes, uint64_t *bar, int thread,
                                                  int n) {
#if HOPPER
    bulk_copy(to, from, bytes, bar);
#else
    for (uint32_t i = (uint32_t)thread * 16; i < bytes; i += (uint32_t)n * 16)
        asm volatile("cp.async.cg.shared::cta.global [%0], [%1], 16;" ::"r"(shared_address(to) + i),
                     "l"((const unsigned char *)from + i)
                     : "memory");
#endif
}

// As bulk_copy; where `once`, of what is not read again before much else is: it is the first to leave the cache.
static __device__ __forceinline__ void bulk_copy_once(void *to, const void *from, uint32_t bytes, uint64_t *bar,
                                                      bool once) {
#if HOPPER
    uint64_t first, normal;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(bar)), "l"(once ? first : normal)
                 : "memory");
#endif
}

// Asks for what will be copied soon, into the cache. Both as above.
static __device__ __forceinline__ void ask_cache(const void *from, uint32_t bytes) {
#if HOPPER
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// From a stage that bulk copies fill again. The thread's next instructions may run before the value has come, an
// arrival at a barrier among them, and only a fence orders that with the copy that follows: a stage is given back when
// the value has been used.
static __device__ __forceinline__ uint4 load_staged(const uint4 *at) {
    return *at;
}

// Lane l's word w becomes word l of matrix w, four matrices of 8 by 8 bf16s that lie one after the other; `at`: the
// first one's address plus 16 l. All lanes' words have been read before any is written.
static __device__ __forceinline__ void store_matrices(void *at, uint4 v) {
#if HOPPER
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(at)), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#endif
}

// Four matrices of 8 by 8 bf16s, of which lane 4 g + t has row g, columns 2t and 2t + 1, into shared memory, their
// columns as rows of 16 bytes where the lanes say: lane 8 m + r has the address of matrix m's column r.
static __device__ __forceinline__ void store_turned(void *column, uint4 v) {
#if HOPPER
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(column)),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#endif
}

// Four matrices of 8 by 8 bf16s from shared memory, the rows of 16 bytes where the lanes say: lane 8 m + r has the
// address of matrix m's row r. Word m of lane 4 g + t is matrix m's row g, columns 2t and 2t + 1; TURNED: rows 2t and
// 2t + 1 of column g.
template <bool TURNED> static __device__ __forceinline__ uint4 load_matrices(const void *row) {
    uint4 v;
    if (TURNED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(shared_address(row))
                     : "memory");
    return v;
}

// ---- Clusters: eight blocks that reach into each other's shared memory --------------------------------------------

static __device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank = 0;
#if HOPPER
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// All threads of all blocks of the cluster.
static __device__ __forceinline__ void cluster_sync() {
#if HOPPER
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void barrier_init_for(uint64_t *bar, unsigned n) {
#if HOPPER
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(n));
#endif
}

static __device__ __forceinline__ void barrier_arrive(uint64_t *bar) {
#if HOPPER
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
#endif
}

// Whether the phase of that parity has ended; waits for a moment. What was copied or pushed is there then. (A wait that
// acquires for the whole cluster would also empty the SM's cache, which takes 300 cycles; pushes do not pass through
// it.)
static __device__ __forceinline__ bool barrier_try(uint64_t *bar, uint32_t parity) {
    uint32_t done = 1;
#if HOPPER
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
#endif
    return done != 0;
}

static __device__ __forceinline__ uint32_t address_in(const void *p, unsigned rank) {
    uint32_t there = 0;
#if HOPPER
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
#endif
    return there;
}

// Writes to where `at` is in the shared memory of the cluster's block `rank`, and counts the bytes at its `bar`. `at`
// is aligned to what is written.
static __device__ __forceinline__ void push16(void *at, float4 v, uint64_t *bar, unsigned rank) {
#if HOPPER
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            address_in(at, rank)),
        "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(address_in(bar, rank))
        : "memory");
#endif
}

static __device__ __forceinline__ void push8(void *at, uint2 v, uint64_t *bar, unsigned rank) {
#if HOPPER
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(
                     address_in(at, rank)),
                 "r"(v.x), "r"(v.y), "r"(address_in(bar, rank))
                 : "memory");
#endif
}

static __device__ __forceinline__ void push4(void *at, float v, uint64_t *bar, unsigned rank) {
#if HOPPER
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address_in(at, rank)),
        "f"(v), "r"(address_in(bar, rank))
        : "memory");
#endif
}

// ---- Blocks that wait for each other ------------------------------------------------------------------------------

// The block's barrier `id` (1 to 15) for n of its threads, whole warps.
static __device__ __forceinline__ void sync_some(int id, int n) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory");
}

// One word between blocks, past the caches of the SMs.
static __device__ __forceinline__ uint32_t load_relaxed(const uint32_t *p) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Four such words; each stands alone.
static __device__ __forceinline__ uint4 load4_relaxed(const uint32_t *p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

static __device__ __forceinline__ void store_relaxed(uint32_t *p, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// A word of the host's memory, after all that this thread has written.
static __device__ __forceinline__ void set_flag(uint32_t *flag, uint32_t number) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(number) : "memory");
}

// Between two looks at a word that another block writes.
static __device__ __forceinline__ void poll_again() {
}

static __device__ __forceinline__ unsigned long long nanoseconds() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

// This SM's clock.
static __device__ __forceinline__ uint32_t cycles() {
    uint32_t t;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(t));
    return t;
}

// Says to the host that a wait took too long, and ends the kernel, and with it all that is queued on this GPU.
static __device__ __forceinline__ void raise_alarm(unsigned *alarm) {
    *(volatile unsigned *)alarm = 1;
    __threadfence_system();
    asm volatile("trap;");
}

// Before shared memory that ordinary instructions have read or written is the target of a bulk copy.
static __device__ __forceinline__ void before_copies() {
#if HOPPER
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#endif
