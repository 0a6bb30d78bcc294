// choose.cu: the most probable token of each row of logits, so that rows need not travel to the host.
#include "ops/cuda/common.cuh"

enum {
    THREADS = 256,
    PARTS = 32,
    HELD = 19, // logits that a thread holds, asked for at once: of 155,648 in a row
};
static_assert(PARTS == 32, "a part a lane");

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
static __global__ void k_choose(struct greedy_choice *out, const float *logits, part *parts, unsigned *arrivals, int n,
                                choice_mark mark) {
    __shared__ float maxima[THREADS / 32], sums[THREADS / 32];
    __shared__ int32_t ids[THREADS / 32], bad[THREADS / 32];
    __shared__ bool last;
    dependency_wait();
    dependents_may_start();
    int thread = (int)threadIdx.x, row = (int)blockIdx.y, length = (n + PARTS - 1) / PARTS;
    int first = (int)blockIdx.x * length + thread, end = min(n, first - thread + length), rest = first + HELD * THREADS;
    const float *x = logits + (size_t)row * n;
    float held[HELD], max = __int_as_float((int)0xFF800000);
    int32_t id = 0x7FFFFFFF, wrong = 0;
    auto look = [&](float v, int i) {
        wrong |= !isfinite(v);
        better(max, id, v, i);
    };
#pragma unroll
    for (int k = 0; k < HELD; k++) held[k] = first + k * THREADS < end ? x[first + k * THREADS] : 0.0f;
#pragma unroll
    for (int k = 0; k < HELD; k++)
        if (first + k * THREADS < end) look(held[k], first + k * THREADS);
    for (int i = rest; i < end; i += THREADS) look(x[i], i);
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
#pragma unroll
    for (int k = 0; k < HELD; k++)
        if (first + k * THREADS < end) sum += exp2_fast((held[k] - max) * LOG2_E);
    for (int i = rest; i < end; i += THREADS) sum += exp2_fast((x[i] - max) * LOG2_E);
    sum = warp_sum(sum);
    if (thread % 32 == 0) sums[thread / 32] = sum;
    __syncthreads();
    if (thread == 0) {
        sum = sums[0];
        for (int w = 1; w < THREADS / 32; w++) sum += sums[w];
        parts[row * PARTS + blockIdx.x] = {max, sum, id, wrong};
        __threadfence();
        last = atomicAdd(arrivals + row, 1u) == PARTS - 1;
        if (last) arrivals[row] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!last || thread >= PARTS) return;
    const volatile part *mine = parts + row * PARTS + thread;
    float own_max = mine->max, best_max = own_max, own_sum = mine->sum, total = 0;
    int32_t best = mine->id;
    wrong = mine->bad;
    for (int o = 16; o; o >>= 1) {
        better(best_max, best, __shfl_xor_sync(~0u, best_max, o), __shfl_xor_sync(~0u, best, o));
        wrong |= __shfl_xor_sync(~0u, wrong, o);
    }
    float weight = exp2_fast((own_max - best_max) * LOG2_E);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        float s = __shfl_sync(~0u, own_sum, i), w = __shfl_sync(~0u, weight, i);
        if (s > 0) total = fmaf(s, w, total);
    }
    if (thread != 0) return;
    out[row] = {best, wrong ? 0.0f : -logf(total), !wrong};
    if (mark.flag) set_flag(mark.flag, mark.number);
}

static void choose(const struct op_ctx *ctx, struct greedy_choice *out, const float *logits, size_t n_rows, size_t n) {
    struct cuda_state *s = cuda_of(ctx);
    choice_mark mark = cuda_take_mark(s);
    for (size_t at = 0; at < n_rows; at += SPLIT_ROWS) {
        size_t rows = n_rows - at < SPLIT_ROWS ? n_rows - at : SPLIT_ROWS;
        launch_kernel(s, "choose", k_choose, {grid_for(PARTS, rows), THREADS, 0}, out + at, logits + at * n,
                      (part *)s->parts, s->arrivals, (int)n, mark);
    }
    s->follows_choice = mark.flag != NULL;
}

extern "C" size_t cuda_choose_bytes(void) {
    return sizeof(part) * PARTS * SPLIT_ROWS;
}

extern "C" void cuda_fill_choose(struct ops *ops) {
    ops->choose = choose;
}
