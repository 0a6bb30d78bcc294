// choose.cu: the most probable token of each row of logits, so that rows need not travel to the host.
#include "ops/cuda/choice.cuh"

enum { THREADS = CHOICE_THREADS, PARTS = CHOICE_PARTS, HELD = CHOICE_HELD };

// Parts of equal length, each added in one order; the row's last block to arrive combines them in ascending order.
static __global__ void k_choose(choice_work c) {
    __shared__ float maxima[THREADS / 32], sums[THREADS / 32];
    __shared__ int32_t ids[THREADS / 32], bad[THREADS / 32];
    __shared__ bool last;
    dependency_wait();
    dependents_may_start();
    int thread = (int)threadIdx.x, n = c.n, row = (int)blockIdx.y, length = (n + PARTS - 1) / PARTS;
    int first = (int)blockIdx.x * length + thread, end = min(n, first - thread + length), rest = first + HELD * THREADS;
    const float *x = c.logits + (size_t)row * n;
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
        if (first + k * THREADS < end) sum += choice_weight(held[k], max);
    for (int i = rest; i < end; i += THREADS) sum += choice_weight(x[i], max);
    sum = warp_sum(sum);
    if (thread % 32 == 0) sums[thread / 32] = sum;
    __syncthreads();
    if (thread == 0) {
        sum = sums[0];
        for (int w = 1; w < THREADS / 32; w++) sum += sums[w];
        ((choice_part *)c.parts)[row * PARTS + blockIdx.x] = {max, sum, id, wrong};
        __threadfence();
        last = atomicAdd(c.arrivals + row, 1u) == PARTS - 1;
        if (last) c.arrivals[row] = 0;
        __threadfence();
    }
    __syncthreads();
    if (last && thread < PARTS) combine_parts(c, row, thread);
}

static void launch(struct cuda_state *s, const choice_work &c, size_t rows) {
    launch_kernel(s, "choose", k_choose, {grid_for(PARTS, rows), THREADS, 0}, c);
}

extern "C" void cuda_choose_now(struct cuda_state *s) {
    choice_work c = cuda_take_choice(s);
    if (!c.out) return;
    launch(s, c, 1);
    s->follows_choice = true;
}

bool cuda_choose_beside(struct cuda_state *s, const choice_work &c) {
    if (!c.mark.flag || !s->best_told || !(s->device.variants & VARIANT_BESIDE)) return false;
    cuda_choose_now(s);
    s->best_told = false;
    s->choice = c;
    return true;
}

static void choose(const struct op_ctx *ctx, struct greedy_choice *out, const float *logits, size_t n_rows, size_t n) {
    struct cuda_state *s = cuda_of(ctx);
    choice_work c = {out, NULL, logits, s->parts, s->arrivals, (int)n, cuda_take_mark(s)};
    if (cuda_choose_beside(s, c)) return;
    for (size_t at = 0; at < n_rows; at += SPLIT_ROWS) {
        size_t rows = n_rows - at < SPLIT_ROWS ? n_rows - at : SPLIT_ROWS;
        c.out = out + at;
        c.logits = logits + at * n;
        launch(s, c, rows);
    }
    s->follows_choice = c.mark.flag != NULL;
}

extern "C" size_t cuda_choose_bytes(void) {
    return sizeof(choice_part) * PARTS * SPLIT_ROWS;
}

extern "C" void cuda_fill_choose(struct ops *ops) {
    ops->choose = choose;
}
