// persistent_ring.cuh: how the blocks of the kernel of all layers (persistent.cu) wait: for each other, and for slots
// of the ring through which weights and pages come; and what each of them is.
#ifndef TANDEM_OPS_CUDA_PERSISTENT_RING_CUH
#define TANDEM_OPS_CUDA_PERSISTENT_RING_CUH

#include "ops/cuda/persistent.cuh"

// ---- Waiting ------------------------------------------------------------------------------------------------------

// A kernel that waits for what will never come must end all the same: after a second it raises the alarm, and dies.
static const unsigned long long PATIENCE = 1000 * 1000 * 1000; // nanoseconds

static __device__ __noinline__ unsigned long long waiting_since(unsigned *alarm, unsigned long long since) {
    unsigned long long now = nanoseconds();
    if (since == 0) return now;
    if (now - since >= PATIENCE) raise_alarm(alarm);
    return since;
}

struct patience {
    unsigned looks;
    unsigned long long since;
    __device__ __forceinline__ void look(const persistent_args &p) {
        if ((++looks & 0xFFF) == 0) since = waiting_since(p.alarm, since);
    }
};

static __device__ __forceinline__ void wait_for(const persistent_args &p, uint64_t *bar, uint32_t parity) {
    patience w = {};
    while (!barrier_try(bar, parity)) w.look(p);
}

// A thread's number, opaque: what follows from it is not kept in registers from layer to layer, of which there are too
// few.
static __device__ __forceinline__ int afresh(int thread) {
    static_assert(PERSISTENT_THREADS < 512, "the number of a thread");
    return opaque(thread) & 511;
}

// ---- The ring -----------------------------------------------------------------------------------------------------

// A place in the ring; all warps of a block count alike.
struct ring_place {
    unsigned slot;
    uint32_t lap;
    __device__ __forceinline__ ring_place ahead(unsigned n) const {
        ring_place r = {slot + n, lap};
        if (r.slot >= N_SLOTS) {
            r.slot -= N_SLOTS;
            r.lap++;
        }
        return r;
    }
    __device__ __forceinline__ uint32_t parity() const {
        return lap & 1;
    }
};

// By a whole warp: until the next n slots have come, a lane each.
static __device__ __forceinline__ void await_slots(const persistent_args &p, persistent_shared *sh, ring_place at,
                                                   int n, int lane) {
    if (lane < n) {
        ring_place mine = at.ahead((unsigned)lane);
        wait_for(p, &sh->full[mine.slot], mine.parity());
    }
    __syncwarp();
}

// This warp needs a slot no longer: what it read there has been used.
static __device__ __forceinline__ void give_back(persistent_shared *sh, ring_place at, int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&sh->empty[at.slot]);
}

// This warp needs the next n slots no longer, or never did.
static __device__ __forceinline__ void pass(persistent_shared *sh, ring_place &at, int n, int lane) {
    __syncwarp();
    if (lane < n) barrier_arrive(&sh->empty[at.ahead((unsigned)lane).slot]);
    at = at.ahead((unsigned)n);
}

// The n slots from `first` on whose weights this warp holds, but which it gives back later.
struct kept_slots {
    ring_place first;
    int n;
};

// The next n slots join those that are kept, which they follow.
static __device__ __forceinline__ void keep(kept_slots &kept, ring_place &at, int n) {
    if (kept.n == 0) kept.first = at;
    kept.n += n;
    at = at.ahead((unsigned)n);
}

static __device__ __forceinline__ void give_all_back(persistent_shared *sh, kept_slots &kept, int lane) {
    pass(sh, kept.first, kept.n, lane);
    kept.n = 0;
}

// ---- Where everything is ------------------------------------------------------------------------------------------

// What a block is.
struct block_place {
    int cluster, rank, kv_head; // kv_head -1: none
    int slice, n_slices;        // of n_ff
    int n_chunks, last_page;    // of the context
};

// The pages of a chunk; none or fewer: there are none.
static __device__ __forceinline__ int pages_of(const block_place &me, int chunk) {
    return min((int)CHUNK_PAGES, me.last_page + 1 - chunk * (int)CHUNK_PAGES);
}

// A deep context's chunks to the blocks that attend.
static __device__ __forceinline__ chunk_share deal_chunks(const persistent_args &p, const block_place &me,
                                                          int n_helpers) {
    int at_once = CLUSTER + n_helpers, rounds = (me.n_chunks + at_once - 1) / at_once;
    int helped = max(0, me.n_chunks - CLUSTER * rounds);
    chunk_share s = {me.kv_head, helped + me.rank, CLUSTER, me.n_chunks, 0, helped};
    if (me.kv_head < 0) {
        int helper = (me.cluster - p.n_kv_heads) * CLUSTER + me.rank, first = helper / p.n_kv_heads;
        s = {helper % p.n_kv_heads, first, n_helpers, first < n_helpers ? helped : 0, 0, helped};
    }
    if (s.first < s.end) s.n = (s.end - s.first + s.step - 1) / s.step;
    return s;
}

static __host__ __device__ __forceinline__ int whole_slices(int columns) {
    return (columns + SLICE - 1) / SLICE;
}

static __host__ __device__ __forceinline__ int board_rows(int n) {
    return (n + BOARD_ROWS - 1) / BOARD_ROWS * BOARD_ROWS;
}

#endif
