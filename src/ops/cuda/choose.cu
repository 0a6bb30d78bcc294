// choose.cu: the most probable token of each row of logits, so that rows need not travel to the host.
#include "ops/cuda/common.cuh"

enum { THREADS = 256, PARTS = 32 };

// What a block found in its part of a row.
struct part {
    float max, sum; // sum of 2^((x - max) log2 e)
    int32_t id;     // the smallest that has the maximum
    int32_t bad;    // NaN or Inf was seen
};

static const float LOG2_E = 1.44269504088896340736f;

static __device__ __forceinline__ void better(float &max, int32_t &id, float max2, int32_t id2) {
    if (max2 > max || (max2 == max && id2 < id)) {
        max = max2;
        id = id2;
    }
}

// Parts of equal length, each added in one order; the row's last block to arrive combines them in ascending order.
static __global__ void k_choose(struct greedy_choice *out, const float *logits, part *parts, unsigned *arrivals,
                                int n) {
    __shared__ float maxima[THREADS / 32], sums[THREADS / 32];
    __shared__ int32_t ids[THREADS / 32], bad[THREADS / 32];
    __shared__ bool last;
    dependents_may_start();
    dependency_wait();
    int thread = (int)threadIdx.x, row = (int)blockIdx.y, length = (n + PARTS - 1) / PARTS;
    int first = (int)blockIdx.x * length, end = min(n, first + length);
    const float *x = logits + (size_t)row * n;
    float max = __int_as_float((int)0xFF800000);
    int32_t id = 0x7FFFFFFF, wrong = 0;
    for (int i = first + thread; i < end; i += THREADS) {
        float v = x[i];
        wrong |= !isfinite(v);
        better(max, id, v, i);
    }
    for (int o = 16; o; o >>= 1) {
        better(max, id, __shfl_xor_sync(~0u, max, o), __shfl_xor_sync(~0u, id, o));
        wrong |= __shfl_xor_sync(~0u, wrong, o);
    }
    if (thread % 32 == 0) {
        maxima[thread / 32] = max;
        ids[thread / 32] = id;
        bad[thread / 32] = wrong;
    }
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++) {
        better(max, id, maxima[w], ids[w]);
        wrong |= bad[w];
    }
    float sum = 0;
    for (int i = first + thread; i < end; i += THREADS) sum += exp2_fast((x[i] - max) * LOG2_E);
    sum = warp_sum(sum);
    if (thread % 32 == 0) sums[thread / 32] = sum;
    __syncthreads();
    if (thread == 0) {
        sum = sums[0];
        for (int w = 1; w < THREADS / 32; w++) sum += sums[w];
        parts[row * PARTS + blockIdx.x] = {max, sum, id, wrong};
        __threadfence();
        last = atomicAdd(arrivals + row, 1u) == PARTS - 1;
        if (last) {
            __threadfence();
            arrivals[row] = 0;
            const volatile part *all = parts + row * PARTS;
            float m = all[0].max;
            int32_t best = all[0].id;
            wrong = 0;
            for (int i = 0; i < PARTS; i++) {
                better(m, best, all[i].max, all[i].id);
                wrong |= all[i].bad;
            }
            float total = 0;
            for (int i = 0; i < PARTS; i++)
                if (all[i].sum > 0) total = fmaf(all[i].sum, exp2_fast((all[i].max - m) * LOG2_E), total);
            out[row] = {best, wrong ? 0.0f : -logf(total), !wrong};
        }
    }
}

static void choose(const struct op_ctx *ctx, struct greedy_choice *out, const float *logits, size_t n_rows, size_t n) {
    struct cuda_state *s = cuda_of(ctx);
    for (size_t at = 0; at < n_rows; at += SPLIT_ROWS) {
        size_t rows = n_rows - at < SPLIT_ROWS ? n_rows - at : SPLIT_ROWS;
        launch_kernel(s, "choose", k_choose, {grid_for(PARTS, rows), THREADS, 0}, out + at, logits + at * n,
                      (part *)s->parts, s->arrivals, (int)n);
    }
}

extern "C" size_t cuda_choose_bytes(void) {
    return sizeof(part) * PARTS * SPLIT_ROWS;
}

extern "C" void cuda_fill_choose(struct ops *ops) {
    ops->choose = choose;
}
