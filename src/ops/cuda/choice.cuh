// choice.cuh: the most probable token of a row of logits, and its logarithm: by a kernel of its own (choose.cu), or
// beside the layers of the next step (persistent.cu), which then know the token by the best row that the head told. The
// same bits: 32 parts of equal length; in a part 256 threads' sums, each in ascending order, then the tree of warp_sum,
// then the eight warps in order; the parts in order.
#ifndef TANDEM_OPS_CUDA_CHOICE_CUH
#define TANDEM_OPS_CUDA_CHOICE_CUH

#include "ops/cuda/kv.cuh"
#include "ops/sampling.h"

enum {
    CHOICE_THREADS = 256,
    CHOICE_PARTS = 32,
    CHOICE_HELD = 19, // logits that a thread holds, asked for at once: of 155,648 in a row
};
static_assert(CHOICE_PARTS == 32, "a part a lane");

// What was found in a part of a row.
struct choice_part {
    float max, sum; // sum of 2^((x - max) log2 e)
    int32_t id;     // the smallest that has the maximum
    int32_t bad;    // NaN or Inf was seen
};

static const float CHOICE_LOG2_E = 1.44269504088896340736f;

static __device__ __forceinline__ void better(float &max, int32_t &id, float max2, int32_t id2) {
    if (max2 > max || (max2 == max && id2 < id)) {
        max = max2;
        id = id2;
    }
}

static __device__ __forceinline__ float choice_weight(float x, float max) {
    return exp2_fast((x - max) * CHOICE_LOG2_E);
}

// By a warp, when all parts of a row are there: the choice, in lane 0.
static __device__ __forceinline__ void combine_parts(const choice_work &c, int row, int lane) {
    const volatile choice_part *mine = (const choice_part *)c.parts + row * CHOICE_PARTS + lane;
    float own_max = mine->max, best_max = own_max, own_sum = mine->sum, total = 0;
    int32_t best = mine->id, wrong = mine->bad;
    for (int o = 16; o; o >>= 1) {
        better(best_max, best, __shfl_xor_sync(~0u, best_max, o), __shfl_xor_sync(~0u, best, o));
        wrong |= __shfl_xor_sync(~0u, wrong, o);
    }
    float weight = choice_weight(own_max, best_max);
#pragma unroll
    for (int i = 0; i < CHOICE_PARTS; i++) {
        float s = __shfl_sync(~0u, own_sum, i), w = __shfl_sync(~0u, weight, i);
        if (s > 0) total = fmaf(s, w, total);
    }
    if (lane != 0) return;
    if (c.chosen) {
        c.out[row] = {wrong ? 0 : best, 0.0f, !wrong};
        c.chosen[row] = wrong ? 0 : best;
    } else {
        c.out[row] = {best, wrong ? 0.0f : -logf(total), !wrong};
    }
    if (c.mark.flag) set_flag(c.mark.flag, c.mark.number);
}

// One part of the only row, by a warp, which stands for the eight of a block; the last one to arrive combines them.
static __device__ __forceinline__ void choose_beside(const choice_work &c, int part, int lane) {
    enum { AT_ONCE = 6 }; // registers are few where this is done, and time is long
    int length = (c.n + CHOICE_PARTS - 1) / CHOICE_PARTS, first = part * length + lane;
    int end = min(c.n, (part + 1) * length);
    float max = __int_as_float((int)0xFF800000), sum = 0;
    int32_t id = 0x7FFFFFFF, wrong = 0;
    auto each = [&](int from, int stride, auto look) {
#pragma unroll 1
        for (int at = from; at < end; at += AT_ONCE * stride) {
            float held[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                held[k] = at + k * stride < end ? __ldcg(c.logits + at + k * stride) : 0.0f;
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                if (at + k * stride < end) look(held[k], at + k * stride);
        }
    };
    each(first, 32, [&](float v, int i) {
        wrong |= !isfinite(v);
        better(max, id, v, i);
    });
    for (int o = 16; o; o >>= 1) {
        better(max, id, __shfl_xor_sync(~0u, max, o), __shfl_xor_sync(~0u, id, o));
        wrong |= __shfl_xor_sync(~0u, wrong, o);
    }
#pragma unroll 1
    for (int w = 0; w < CHOICE_THREADS / 32; w++) {
        float own = 0;
        each(first + 32 * w, CHOICE_THREADS, [&](float v, int) { own += choice_weight(v, max); });
        own = warp_sum(own);
        sum = w == 0 ? own : sum + own;
    }
    unsigned before = 0;
    if (lane == 0) {
        ((choice_part *)c.parts)[part] = {max, sum, id, wrong};
        before = count_arrival(c.arrivals);
        if (before == CHOICE_PARTS - 1) *c.arrivals = 0;
    }
    bool last = __shfl_sync(~0u, before, 0) == CHOICE_PARTS - 1;
    __syncwarp(); // what lane 0 has seen
    if (last) combine_parts(c, 0, lane);
}

// Has the choice made beside the next step's layers. False: it is not to be.
bool cuda_choose_beside(struct cuda_state *s, const choice_work &c);

// Whether the only row's token is the most probable of all.
static inline bool cuda_takes_best(const struct batch *b) {
    const struct sample_row *r = b->n_logit_rows == 1 ? host_of(b)->sample : NULL;
    return r && !(r->scale > 0) && !r->ban;
}

// ---- The best row of a product, told while it is multiplied -------------------------------------------------------

// Of several the largest stands for the largest value, and of these for the smallest row; never 0. What is no number
// counts as infinite: such a token means nothing.
static __device__ __forceinline__ unsigned long long best_key(float v, int32_t row) {
    uint32_t bits = __float_as_uint(isfinite(v) ? v + 0.0f : __int_as_float(0x7F800000));
    return (unsigned long long)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | (uint32_t)~row;
}

static __device__ __forceinline__ int32_t best_row(unsigned long long key) {
    return (int32_t) ~(uint32_t)key;
}

// By a whole warp: the largest of its keys.
static __device__ __forceinline__ void tell_best(unsigned long long *best, unsigned long long key, int lane) {
    for (int o = 16; o; o >>= 1) {
        uint32_t high = __shfl_xor_sync(~0u, (uint32_t)(key >> 32), o);
        unsigned long long other = (unsigned long long)high << 32 | __shfl_xor_sync(~0u, (uint32_t)key, o);
        if (other > key) key = other;
    }
    if (lane == 0 && key) atomicMax(best, key);
}

#endif
