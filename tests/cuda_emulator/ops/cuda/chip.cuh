// chip.cuh: in the place of src/ops/cuda/chip.cuh, for the emulator (emulator.h).
#ifndef TANDEM_TESTS_CHIP_CUH
#define TANDEM_TESTS_CHIP_CUH

#include "cuda_bf16.h"
#include "ops/cuda/device.h"

#include <stdint.h>

#define DYNAMIC_SHARED(name) unsigned char *name = emulated_dynamic_shared()

static inline void dependents_may_start() {
    emulated_pause();
}

static inline void dependency_wait() {
    emulated_dependency_wait();
}

static inline float exp2_fast(float x) {
    return exp2f(x);
}

static inline float reciprocal_fast(float x) {
    return 1.0f / x;
}

static inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    float low =
        (float)((double)__uint_as_float(a << 16) * (double)__uint_as_float(b << 16) + (double)__uint_as_float(c << 16));
    float high = (float)((double)__uint_as_float(a >> 16 << 16) * (double)__uint_as_float(b >> 16 << 16) +
                         (double)__uint_as_float(c >> 16 << 16));
    return (uint32_t)__float2bfloat16_rn(low).bits | (uint32_t)__float2bfloat16_rn(high).bits << 16;
}

static inline float half_to_float(uint16_t v) {
    uint32_t sign = (uint32_t)(v >> 15) << 31, rest = v & 0x7FFFu;
    if (rest >= 0x7C00u) return __uint_as_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

static inline unsigned count_arrival(unsigned *counter, unsigned n = 1) {
    return atomicAdd(counter, n);
}

static inline uint32_t transpose(uint32_t v) {
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4, shift = g % 2 * 16;
    uint32_t a = __shfl_sync(~0u, v, 8 * t + g / 2), b = __shfl_sync(~0u, v, 8 * t + 4 + g / 2);
    return (a >> shift & 0xFFFFu) | (b >> shift & 0xFFFFu) << 16;
}

struct quotients {
    float divisor;

    void start(float d) {
        divisor = d;
    }
    static bool takes(float x) {
        return fabsf(x) > 0x1p-60f && fabsf(x) < 0x1p60f;
    }
    bool takes() const {
        return takes(divisor);
    }
    float of(float x) const {
        return x / divisor;
    }
};

static inline void store_matrices(void *at, uint4 v) {
    int lane = (int)threadIdx.x % 32;
    uint32_t *to = (uint32_t *)((unsigned char *)at - 16 * lane) + lane;
    __syncwarp();
    to[0] = v.x;
    to[32] = v.y;
    to[64] = v.z;
    to[96] = v.w;
}

static inline void store_turned(void *column, uint4 v) {
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
    __syncwarp();
    for (int m = 0; m < 4; m++)
        for (int e = 0; e < 2; e++)
            ((uint16_t *)__shfl_sync(~0u, (uintptr_t)column, 8 * m + 2 * t + e))[g] = (uint16_t)(words[m] >> 16 * e);
}

template <bool TURNED> static inline uint4 load_matrices(const void *row) {
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t words[4];
    __syncwarp();
    for (int m = 0; m < 4; m++) {
        uint32_t pair[2];
        for (int e = 0; e < 2; e++) {
            int r = TURNED ? 2 * t + e : g, c = TURNED ? g : 2 * t + e;
            pair[e] = ((const uint16_t *)__shfl_sync(~0u, (uintptr_t)row, 8 * m + r))[c];
        }
        words[m] = pair[0] | pair[1] << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

static inline uint32_t mul_bf16_pairs(uint32_t a, uint32_t b) {
    __nv_bfloat162 d = __floats2bfloat162_rn(__uint_as_float(a << 16) * __uint_as_float(b << 16),
                                             __uint_as_float(a & 0xFFFF0000u) * __uint_as_float(b & 0xFFFF0000u));
    return emulated_bits<uint32_t>(d);
}

// One order for all callers, ascending k; a chip's own may be another.
static inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    emulated_mma(d, a, b);
}

static inline void barrier_init_for(uint64_t *bar, unsigned n) {
    emulated_barrier_init(bar, n);
}

template <int N = COPY_LANES> static inline void barrier_init(uint64_t *bar) {
    barrier_init_for(bar, N);
}

static inline void barrier_wait(uint64_t *bar, uint32_t parity) {
    emulated_barrier_wait(bar, parity);
}

#if HOPPER
static inline void barrier_expect(uint64_t *bar, uint32_t bytes) {
    emulated_barrier_expect(bar, bytes);
}

static inline void copies_asked(uint64_t *) {
}

static inline void bulk_copy(void *to, const void *from, uint32_t bytes, uint64_t *bar) {
    emulated_bulk_copy(to, from, bytes, bar);
}

static inline void copy_piece(void *to, const void *from, uint32_t bytes, uint64_t *bar, int, int) {
    bulk_copy(to, from, bytes, bar);
}

static inline void bulk_copy_once(void *to, const void *from, uint32_t bytes, uint64_t *bar, bool) {
    bulk_copy(to, from, bytes, bar);
}

static inline void ask_cache(const void *, uint32_t) {
}

static inline uint4 load_staged(const uint4 *at) {
    emulated_load_staged(at);
    return *at;
}

static inline void barrier_arrive(uint64_t *bar) {
    emulated_barrier_arrive(bar);
}

static inline bool barrier_try(uint64_t *bar, uint32_t parity) {
    emulated_barrier_wait(bar, parity);
    return true;
}

static inline void push16(void *at, float4 v, uint64_t *bar, unsigned rank) {
    emulated_push(at, &v, sizeof v, bar, rank);
}

static inline void push8(void *at, uint2 v, uint64_t *bar, unsigned rank) {
    emulated_push(at, &v, sizeof v, bar, rank);
}

static inline void push4(void *at, float v, uint64_t *bar, unsigned rank) {
    emulated_push(at, &v, sizeof v, bar, rank);
}

static inline unsigned cluster_rank() {
    return emulated_cluster_rank();
}

static inline void cluster_sync() {
    emulated_cluster_sync();
}
#else
static inline void barrier_expect(uint64_t *, uint32_t) {
}
static inline void copies_asked(uint64_t *bar) {
    emulated_barrier_arrive(bar);
}
static inline void bulk_copy(void *, const void *, uint32_t, uint64_t *) {
}
// The first thread asks for the others' shares, too, which wait for each other anyway.
static inline void copy_piece(void *to, const void *from, uint32_t bytes, uint64_t *bar, int thread, int) {
    if (thread != 0) return;
    emulated_barrier_await(bar, bytes);
    emulated_bulk_copy(to, from, bytes, bar);
}

static inline void bulk_copy_once(void *, const void *, uint32_t, uint64_t *, bool) {
}
static inline void ask_cache(const void *, uint32_t) {
}
static inline uint4 load_staged(const uint4 *at) {
    return *at;
}
static inline void barrier_arrive(uint64_t *) {
}
static inline bool barrier_try(uint64_t *, uint32_t) {
    return true;
}
static inline void push16(void *, float4, uint64_t *, unsigned) {
}
static inline void push8(void *, uint2, uint64_t *, unsigned) {
}
static inline void push4(void *, float, uint64_t *, unsigned) {
}
static inline unsigned cluster_rank() {
    return 0;
}
static inline void cluster_sync() {
}
#endif

static inline void sync_some(int id, int n) {
    emulated_sync_some(id, (unsigned)n);
}

static inline uint32_t load_relaxed(const uint32_t *p) {
    return *(const volatile uint32_t *)p;
}

static inline uint4 load4_relaxed(const uint32_t *p) {
    return make_uint4(load_relaxed(p), load_relaxed(p + 1), load_relaxed(p + 2), load_relaxed(p + 3));
}

static inline void store_relaxed(uint32_t *p, uint32_t v) {
    emulated_pause();
    *(volatile uint32_t *)p = v;
}

static inline void set_flag(uint32_t *flag, uint32_t number) {
    *(volatile uint32_t *)flag = number;
}

static inline void poll_again() {
    emulated_spin();
}

static inline int opaque(int v) {
    return v;
}

static inline float opaque(float v) {
    return v;
}

// Nobody grows impatient: the emulator itself sees when nothing moves any more.
static inline unsigned long long nanoseconds() {
    return 0;
}

static inline uint32_t cycles() {
    static uint32_t t;
    return t += 1000;
}

static inline void raise_alarm(unsigned *alarm) {
    *alarm = 1;
}

static inline void before_copies() {
}

static inline void barrier_fence() {
}

#endif
