// sample.cu: the next token of each row of logits, chosen on the device by the definition in ops/sampling.h: the same
// token as the host's sampler chooses. Three kernels, each a grid of (parts of a row) x (rows); the row's last block to
// arrive goes on alone. Everything that is added up is an integer, so that neither the number of parts nor the order of
// arrivals shows.
//   k_sample  the best logit, NaN and Inf; rows without a filter are chosen here. Where top_k is small, the best logits
//             of parts of the row, too: the top_k-th of them is one that top_k logits reach.
//   k_weigh   a histogram of the distances to the best logit: which bins top_k or top_p keeps whole, and which bin
//             holds the boundary. Not where top_k is small.
//   k_draw    the best score of those kept; tokens of the boundary's bin, or those that reach the logit above, are
//             listed and compared one by one. More than fit the list (nearly equal logits): the boundary is found by
//             halving, over the whole row.
#include "ops/cuda/choice.cuh"
#include "ops/sampling.h"

#include <float.h>

enum {
    THREADS = 256,
    WARPS = THREADS / 32,
    LEAST_PARTS = 4,
    MOST_PARTS = 128,
    MOST_ROWS = 256, // of a launch
    BINS = 2048,
    MOST_LISTED = 2048,
    AT_ONCE = 4, // elements that a thread asks for before it looks at one,
    MORE = 8,    // and where it does little with them
    TOPS = 16,   // of a block: each the best of 16 threads
    MOST_TOPS = 256,
};
static const float BINS_A_NAT = 48; // the last bin: 42 nats and more

enum task { TASK_NONE, TASK_WEIGH, TASK_DRAW, TASK_PICK };

// What a block found in its part of a row.
struct part {
    double score; // the best kept token's
    int32_t score_id;
    float best; // logit
    int32_t best_id, bad;
};

// A row between the kernels.
struct sample_state {
    unsigned arrived, n_listed; // 0 between kernels, 0 before k_draw
    int32_t task;
    float best;
    int32_t from, until; // bins below `from` are kept whole, those from there up to `until` are listed
    unsigned bar;        // TASK_PICK: `ordered` of a logit that top_k logits reach, which are listed
    uint64_t above;      // weights of the bins kept whole
    uint64_t total;      // of all weights
};

// Device memory of MOST_ROWS rows.
struct sample_memory {
    sample_state state[MOST_ROWS];
    part parts[MOST_ROWS][MOST_PARTS];
    unsigned tops[MOST_ROWS][MOST_TOPS]; // `ordered`
    unsigned count[MOST_ROWS][BINS];     // 0 between kernels, as `weight`
    unsigned long long weight[MOST_ROWS][BINS];
    uint64_t listed[MOST_ROWS][MOST_LISTED]; // places
};

// The step's arguments, the same for all three kernels.
struct sample_step {
    sample_memory *memory;
    const float *logits;           // [n_rows, n]
    const struct sample_row *rows; // [n_rows]
    const int32_t *position;       // [n_tokens]
    const int32_t *logit_rows;     // [n_rows]
    const int32_t *banned;         // [n_banned]
    struct greedy_choice *out;     // [n_rows]
    int32_t *chosen;               // [n_rows]
    int n, n_banned;
    choice_mark mark;
};

// ---- Parts of a row -----------------------------------------------------------------------------------------------

// A block's part of its row, and the banned ids in it.
struct span {
    const float *x;
    int first, end, n_banned;
    int32_t banned[MOST_BANNED];
};

static __device__ void open_span(span *shared, const sample_step &s, const sample_row &r) {
    if (threadIdx.x == 0) {
        int length = (s.n + (int)gridDim.x - 1) / (int)gridDim.x;
        shared->x = s.logits + (size_t)blockIdx.y * s.n;
        shared->first = min((int)blockIdx.x * length, s.n);
        shared->end = min(shared->first + length, s.n);
        shared->n_banned = 0;
        for (int i = 0; r.ban && i < s.n_banned && shared->n_banned < MOST_BANNED; i++)
            if (s.banned[i] >= shared->first && s.banned[i] < shared->end)
                shared->banned[shared->n_banned++] = s.banned[i];
    }
    __syncthreads();
}

static __device__ __forceinline__ bool is_banned(const span &p, int id) {
    for (int i = 0; i < p.n_banned; i++)
        if (p.banned[i] == id) return true;
    return false;
}

// visit(logits, first) for this thread's tokens of the span, N of them: first, first + THREADS, ...; what lies beyond
// the span is the lowest number.
template <int N, typename F> static __device__ __forceinline__ void each_batch(const span &p, F visit) {
    const float *x = p.x;
    for (int at = p.first + (int)threadIdx.x, end = p.end; at < end; at += N * THREADS) {
        float v[N];
        if (at + (N - 1) * THREADS < end) {
#pragma unroll
            for (int k = 0; k < N; k++) v[k] = x[at + k * THREADS];
        } else {
#pragma unroll
            for (int k = 0; k < N; k++) v[k] = at + k * THREADS < end ? x[at + k * THREADS] : -FLT_MAX;
        }
        visit(v, at);
    }
}

// visit(logit, id) for this thread's tokens of the span, banned ones included.
template <int N = AT_ONCE, typename F> static __device__ __forceinline__ void each_token(const span &p, F visit) {
    int end = p.end;
    each_batch<N>(p, [&](const float(&v)[N], int first) {
#pragma unroll
        for (int k = 0; k < N; k++)
            if (first + k * THREADS < end) visit(v[k], first + k * THREADS);
    });
}

// Numbers in the order of floats; of -0 and +0 one number.
static __device__ __forceinline__ unsigned ordered(float x) {
    return (unsigned)(sampling_place(x, 0) >> 32);
}

static __device__ __forceinline__ float from_ordered(unsigned u) {
    return __uint_as_float(u >> 31 ? u & 0x7FFFFFFFu : ~u);
}

// ---- Sums and maxima over a block; every thread gets the result ---------------------------------------------------

static __device__ __forceinline__ void better_logit(float &best, int32_t &id, float best2, int32_t id2) {
    if (best2 > best || (best2 == best && id2 < id)) {
        best = best2;
        id = id2;
    }
}

static __device__ __forceinline__ void better_score(double &best, int32_t &id, double best2, int32_t id2) {
    if (best2 > best || (best2 == best && id2 < id)) {
        best = best2;
        id = id2;
    }
}

static __device__ void block_best_logit(float &best, int32_t &id, int32_t &bad) {
    __shared__ float bests[WARPS];
    __shared__ int32_t ids[WARPS], bads[WARPS];
    int warp = (int)threadIdx.x / 32;
    for (int o = 16; o; o >>= 1) {
        better_logit(best, id, __shfl_xor_sync(~0u, best, o), __shfl_xor_sync(~0u, id, o));
        bad |= __shfl_xor_sync(~0u, bad, o);
    }
    __syncthreads(); // the last use is over
    if (threadIdx.x % 32 == 0) {
        bests[warp] = best;
        ids[warp] = id;
        bads[warp] = bad;
    }
    __syncthreads();
    for (int w = 0; w < WARPS; w++) {
        better_logit(best, id, bests[w], ids[w]);
        bad |= bads[w];
    }
}

static __device__ void block_best_score(double &best, int32_t &id) {
    __shared__ double bests[WARPS];
    __shared__ int32_t ids[WARPS];
    int warp = (int)threadIdx.x / 32;
    for (int o = 16; o; o >>= 1) better_score(best, id, __shfl_xor_sync(~0u, best, o), __shfl_xor_sync(~0u, id, o));
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        bests[warp] = best;
        ids[warp] = id;
    }
    __syncthreads();
    for (int w = 0; w < WARPS; w++) better_score(best, id, bests[w], ids[w]);
}

static __device__ uint64_t block_sum(uint64_t v) {
    __shared__ uint64_t sums[WARPS];
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < WARPS; w++) v += sums[w];
    return v;
}

// Whether this block is the last of its row's; then it sees what the others wrote.
static __device__ bool is_last(sample_state *state) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(&state->arrived, 1u) == gridDim.x - 1;
        if (last) state->arrived = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

static __device__ __forceinline__ uint64_t key_of(const sample_step &s, const sample_row &r) {
    return sampling_key(r.seed, (uint64_t)(s.position[s.logit_rows[blockIdx.y]] + 1));
}

static __device__ void answer(const sample_step &s, int32_t id, int32_t ok) {
    s.out[blockIdx.y] = {ok ? id : 0, 0.0f, ok};
    s.chosen[blockIdx.y] = ok ? id : 0;
    if (s.mark.flag) set_flag(s.mark.flag, s.mark.number);
}

// The best score that a thread knows of.
struct contest {
    double score;
    int32_t id;
    float below; // sampling_below(score)

    __device__ __forceinline__ void put(double s, int32_t candidate) {
        better_score(score, id, s, candidate);
        below = sampling_below(score);
    }
    // A token that is kept: its score, unless it cannot win.
    __device__ __forceinline__ void enter(float logit, int32_t candidate, double scale, uint64_t key) {
        uint64_t random = sampling_random(key, candidate);
        if (!sampling_loses(logit, (float)scale, random, below))
            put(sampling_score(logit, scale, sampling_noise(random)), candidate);
    }
};

static __device__ __forceinline__ bool min_p_keeps(const sample_row &r, float logit, float best) {
    return !(r.min_p > 0) || (double)sampling_weight(logit, best, (float)r.scale) >= r.min_p * (double)SAMPLING_ONE;
}

static const int NOBODY = 0x7FFFFFFF;

static __device__ __forceinline__ contest no_contest() {
    float lowest = __int_as_float((int)0xFF800000);
    return {(double)lowest, NOBODY, lowest};
}

// ---- The best logits of parts of a row ----------------------------------------------------------------------------

// Of a block: as many that a row has between SAMPLING_FEW and MOST_TOPS.
static __device__ __forceinline__ int tops_of_block() {
    return gridDim.x <= MOST_TOPS / TOPS ? TOPS : gridDim.x <= MOST_TOPS / 4 ? 4 : 1;
}

// `best`: the thread's.
static __device__ void tell_tops(unsigned *row_tops, float best) {
    __shared__ unsigned tops[TOPS];
    unsigned top = ordered(best);
#pragma unroll
    for (int o = THREADS / TOPS / 2; o; o >>= 1) top = max(top, __shfl_xor_sync(~0u, top, o));
    if (threadIdx.x % (THREADS / TOPS) == 0) tops[threadIdx.x / (THREADS / TOPS)] = top;
    __syncthreads();
    int n = tops_of_block(), each = TOPS / n;
    if ((int)threadIdx.x >= n) return;
    top = 0;
    for (int i = 0; i < each; i++) top = max(top, tops[(int)threadIdx.x * each + i]);
    row_tops[blockIdx.x * n + threadIdx.x] = top;
}

// The top_k-th highest of them.
static __device__ void find_bar(const unsigned *row_tops, const sample_row &r, sample_state *state) {
    __shared__ unsigned tops[MOST_TOPS];
    int n = (int)gridDim.x * tops_of_block(), thread = (int)threadIdx.x, higher = 0, same = 0;
    unsigned own = thread < n ? __ldcg(row_tops + thread) : 0;
    tops[thread] = own;
    __syncthreads();
    for (int i = 0; i < n; i++) {
        higher += tops[i] > own;
        same += tops[i] == own;
    }
    if (thread < n && higher < r.top_k && higher + same >= r.top_k) state->bar = own;
}

// ---- The kernels --------------------------------------------------------------------------------------------------

// A thread's best score in the span, of a row without a filter; `best` and `best_id` become those of its first tokens
// alone.
static __device__ __forceinline__ void draw_unfiltered(const sample_step &s, const sample_row &r, const span &p,
                                                       float &best, int32_t &best_id, int32_t &bad, contest &c) {
    __shared__ unsigned bar; // the highest contest.below of the block's threads: few scores are above it
    if (threadIdx.x == 0) bar = ordered(c.below);
    __syncthreads();
    uint64_t key = key_of(s, r);
    int first = p.first + (int)threadIdx.x, end = p.end;
    for (int id = first; id < min(first + MORE * THREADS, end); id += THREADS)
        if (!is_banned(p, id)) better_logit(best, best_id, p.x[id], id);
    if (best_id != NOBODY) {
        c.put(sampling_score(best, r.scale, sampling_noise(sampling_random(key, best_id))), best_id);
        atomicMax(&bar, ordered(c.below));
    }
    float scale = (float)r.scale, zero = 0; // or NaN
    each_batch<MORE>(p, [&](const float(&v)[MORE], int at) {
        float below = from_ordered(*(volatile unsigned *)&bar);
        unsigned may = 0; // win
#pragma unroll
        for (int k = 0; k < MORE; k++) {
            zero = fmaf(v[k], 0.0f, zero);
            may |= sampling_loses(v[k], scale, sampling_random(key, at + k * THREADS), below) ? 0u : 1u << k;
        }
        if (!may) return;
#pragma unroll 1
        for (int id = at; may; id += THREADS, may >>= 1)
            if ((may & 1) && id < end && !is_banned(p, id)) c.enter(p.x[id], id, r.scale, key);
        atomicMax(&bar, ordered(c.below));
    });
    bad = zero != 0;
}

static __global__ void __launch_bounds__(THREADS) k_sample(sample_step s) {
    __shared__ span p;
    dependency_wait();
    dependents_may_start();
    const sample_row r = s.rows[blockIdx.y];
    sample_state *state = &s.memory->state[blockIdx.y];
    part *parts = s.memory->parts[blockIdx.y];
    bool filtered = sampling_filters(&r, s.n);
    open_span(&p, s, r);
    float best = __int_as_float((int)0xFF800000);
    int32_t best_id = NOBODY, bad = 0;
    contest c = no_contest();
    bool draws = r.scale > 0 && !filtered, few = sampling_keeps_few(&r, s.n);
    if (draws) {
        draw_unfiltered(s, r, p, best, best_id, bad, c);
    } else {
        each_token<MORE>(p, [&](float v, int id) {
            bad |= !isfinite(v);
            if (!is_banned(p, id)) better_logit(best, best_id, v, id);
        });
    }
    if (few) tell_tops(s.memory->tops[blockIdx.y], best);
    block_best_logit(best, best_id, bad);
    if (draws) block_best_score(c.score, c.id);
    if (threadIdx.x == 0) parts[blockIdx.x] = {c.score, c.id, best, best_id, bad};
    if (!is_last(state)) return;
    if (few) find_bar(s.memory->tops[blockIdx.y], r, state);
    if (threadIdx.x < gridDim.x) {
        const volatile part *other = &parts[threadIdx.x];
        better_logit(best, best_id, other->best, other->best_id);
        better_score(c.score, c.id, other->score, other->score_id);
        bad |= other->bad;
    }
    block_best_logit(best, best_id, bad);
    block_best_score(c.score, c.id);
    if (threadIdx.x != 0) return;
    state->task = TASK_NONE;
    bad |= best_id == NOBODY;
    if (bad || !filtered) {
        answer(s, r.scale > 0 ? c.id : best_id, !bad);
        return;
    }
    bool cuts = sampling_top_k_cuts(&r, s.n) || r.top_p < 1;
    state->best = best;
    state->task = few ? TASK_PICK : cuts ? TASK_WEIGH : TASK_DRAW;
    state->from = BINS; // min_p alone
    state->until = 0;
}

static __device__ __forceinline__ int bin_of(float logit, float best) {
    float distance = best - logit;
    return distance < 42.0f ? (int)(distance * BINS_A_NAT) : BINS - 1;
}

// The bins up to and including the boundary's, from the whole row's histogram, which is cleared.
static __device__ void find_boundary(const sample_step &s, const sample_row &r, sample_state *state) {
    enum { OWN = BINS / THREADS };
    __shared__ uint64_t counts[THREADS], weights[THREADS];
    __shared__ int boundary;
    unsigned *count = s.memory->count[blockIdx.y];
    unsigned long long *weight = s.memory->weight[blockIdx.y];
    int thread = (int)threadIdx.x;
    uint64_t own_count[OWN], own_weight[OWN], n = 0, sum = 0;
    for (int i = 0; i < OWN; i++) {
        int bin = thread * OWN + i;
        own_count[i] = __ldcg(count + bin);
        own_weight[i] = __ldcg(weight + bin);
        count[bin] = 0;
        weight[bin] = 0;
        n += own_count[i];
        sum += own_weight[i];
    }
    uint64_t total = block_sum(sum);
    if (thread == 0) boundary = BINS - 1;
    counts[thread] = n;
    weights[thread] = sum;
    __syncthreads();
    uint64_t before_n = 0, before = 0;
    for (int i = 0; i < thread; i++) {
        before_n += counts[i];
        before += weights[i];
    }
    bool by_count = sampling_top_k_cuts(&r, s.n);
    double most = r.top_p * (double)total;
    for (int i = 0; i < OWN; i++) {
        bool behind = by_count ? before_n >= (uint64_t)r.top_k : (double)before >= most;
        before_n += own_count[i];
        before += own_weight[i];
        bool reaches = by_count ? before_n >= (uint64_t)r.top_k : (double)before >= most;
        if (behind || !reaches) continue;
        boundary = thread * OWN + i; // one thread alone comes here
        state->above = before - own_weight[i];
    }
    __syncthreads();
    if (thread != 0) return;
    state->total = total;
    state->from = by_count ? 0 : boundary; // top_k's own total is not known yet: all that it may keep are listed
    state->until = boundary + 1;
    state->task = TASK_DRAW;
}

static __global__ void __launch_bounds__(THREADS) k_weigh(sample_step s) {
    __shared__ span p;
    __shared__ unsigned counts[BINS], low[BINS], high[BINS];
    dependents_may_start();
    dependency_wait();
    sample_state *state = &s.memory->state[blockIdx.y];
    if (state->task != TASK_WEIGH) return;
    const sample_row r = s.rows[blockIdx.y];
    float best = state->best, scale = (float)r.scale;
    for (int i = (int)threadIdx.x; i < BINS; i += THREADS) counts[i] = low[i] = high[i] = 0;
    open_span(&p, s, r);
    each_token(p, [&](float v, int id) {
        if (is_banned(p, id)) return;
        int bin = bin_of(v, best);
        uint32_t w = sampling_weight(v, best, scale);
        atomicAdd(&counts[bin], 1u);
        if (w && atomicAdd(&low[bin], w) + w < w) atomicAdd(&high[bin], 1u); // a carry
    });
    __syncthreads();
    for (int i = (int)threadIdx.x; i < BINS; i += THREADS) {
        if (!counts[i]) continue;
        atomicAdd(&s.memory->count[blockIdx.y][i], counts[i]);
        unsigned long long w = (unsigned long long)high[i] << 32 | low[i];
        if (w) atomicAdd(&s.memory->weight[blockIdx.y][i], w);
    }
    if (is_last(state)) find_boundary(s, r, state);
}

// The tokens of the boundary's bin, each against all others.
static __device__ void judge_listed(const sample_step &s, const sample_row &r, const sample_state &state, int n,
                                    contest *c) {
    __shared__ uint64_t places[MOST_LISTED];
    __shared__ uint32_t weights[MOST_LISTED];
    const float *x = s.logits + (size_t)blockIdx.y * s.n;
    bool by_count = sampling_top_k_cuts(&r, s.n);
    uint64_t key = key_of(s, r), sum = 0, most_better = by_count ? (uint64_t)r.top_k : (uint64_t)s.n;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        uint64_t place = __ldcg(&s.memory->listed[blockIdx.y][i]);
        places[i] = place;
        weights[i] = sampling_weight(x[0xFFFFFFFFu - (uint32_t)place], state.best, (float)r.scale);
    }
    __syncthreads();
    if (by_count) {
        for (int i = (int)threadIdx.x; i < n; i += THREADS) {
            uint64_t better = 0;
            for (int j = 0; j < n; j++) better += places[j] > places[i];
            if (better < most_better) sum += weights[i];
        }
        sum = block_sum(sum);
    }
    double most = r.top_p * (double)(by_count ? sum : state.total);
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        uint64_t better = 0, above = by_count ? 0 : state.above;
        for (int j = 0; j < n; j++) {
            bool is_better = places[j] > places[i];
            better += is_better;
            above += is_better ? weights[j] : 0;
        }
        int32_t id = (int32_t)(0xFFFFFFFFu - (uint32_t)places[i]);
        if (better >= most_better || (r.top_p < 1 && above > 0 && (double)above >= most) ||
            !min_p_keeps(r, x[id], state.best))
            continue;
        c->enter(x[id], id, r.scale, key);
    }
}

// The lowest place of [low, high] whose tokens are kept by `kept(better tokens, their weights)`; that of `high` is.
template <typename F>
static __device__ uint64_t lowest_kept(const span &p, const sample_row &r, float best, uint64_t low, uint64_t high,
                                       F kept) {
    while (low < high) {
        uint64_t middle = low + (high - low) / 2, better = 0, above = 0;
        each_token(p, [&](float v, int id) {
            if (is_banned(p, id) || sampling_place(v, id) <= middle) return;
            better++;
            above += sampling_weight(v, best, (float)r.scale);
        });
        better = block_sum(better);
        above = block_sum(above);
        if (kept(better, above)) high = middle;
        else low = middle + 1;
    }
    return low;
}

// The same for any number of nearly equal logits: halving, some hundred passes over the row.
static __device__ void judge_row(const sample_step &s, const sample_row &r, const sample_state &state, span *p,
                                 contest *c) {
    __syncthreads();
    if (threadIdx.x == 0) { // the whole row
        p->first = 0;
        p->end = s.n;
        p->n_banned = 0;
        for (int i = 0; r.ban && i < s.n_banned && i < MOST_BANNED; i++) p->banned[p->n_banned++] = s.banned[i];
    }
    __syncthreads();
    uint64_t low = 0, high = sampling_place(state.best, 0), total = state.total, key = key_of(s, r);
    if (sampling_top_k_cuts(&r, s.n)) {
        uint64_t k = (uint64_t)r.top_k, sum = 0;
        low = lowest_kept(*p, r, state.best, low, high, [&](uint64_t better, uint64_t) { return better < k; });
        each_token(*p, [&](float v, int id) {
            if (!is_banned(*p, id) && sampling_place(v, id) >= low)
                sum += sampling_weight(v, state.best, (float)r.scale);
        });
        total = block_sum(sum);
    }
    if (r.top_p < 1) {
        double most = r.top_p * (double)total;
        low = lowest_kept(*p, r, state.best, low, high,
                          [&](uint64_t, uint64_t above) { return above == 0 || (double)above < most; });
    }
    *c = no_contest();
    each_token(*p, [&](float v, int id) {
        if (!is_banned(*p, id) && sampling_place(v, id) >= low && min_p_keeps(r, v, state.best))
            c->enter(v, id, r.scale, key);
    });
}

static __global__ void __launch_bounds__(THREADS) k_draw(sample_step s) {
    __shared__ span p;
    dependents_may_start();
    dependency_wait();
    sample_state *at = &s.memory->state[blockIdx.y];
    const sample_state state = *at;
    if (state.task != TASK_DRAW && state.task != TASK_PICK) return;
    const sample_row r = s.rows[blockIdx.y];
    part *parts = s.memory->parts[blockIdx.y];
    uint64_t key = key_of(s, r);
    contest c = no_contest();
    open_span(&p, s, r);
    auto list = [&](float v, int id) {
        unsigned place = atomicAdd(&at->n_listed, 1u);
        if (place < MOST_LISTED) s.memory->listed[blockIdx.y][place] = sampling_place(v, id);
    };
    if (state.task == TASK_PICK)
        each_token<MORE>(p, [&](float v, int id) {
            if (ordered(v) >= state.bar && !is_banned(p, id)) list(v, id);
        });
    else
        each_token(p, [&](float v, int id) {
            if (is_banned(p, id)) return;
            int bin = bin_of(v, state.best);
            if (bin >= state.from && bin < state.until) list(v, id);
            if (bin < state.from && min_p_keeps(r, v, state.best)) c.enter(v, id, r.scale, key);
        });
    block_best_score(c.score, c.id);
    if (threadIdx.x == 0) parts[blockIdx.x] = {c.score, c.id, 0, 0, 0};
    if (!is_last(at)) return;
    unsigned n = __ldcg(&at->n_listed);
    if (threadIdx.x < gridDim.x) {
        const volatile part *other = &parts[threadIdx.x];
        better_score(c.score, c.id, other->score, other->score_id);
    }
    if (n > MOST_LISTED) judge_row(s, r, state, &p, &c);
    else judge_listed(s, r, state, (int)n, &c);
    block_best_score(c.score, c.id);
    if (threadIdx.x != 0) return;
    at->n_listed = 0;
    answer(s, c.id, 1);
}

// ---- Launchers ----------------------------------------------------------------------------------------------------

static void sample(const struct op_ctx *ctx, const struct sample_args *a) {
    struct cuda_state *c = cuda_of(ctx);
    const struct batch *b = a->batch;
    choice_mark mark = cuda_take_mark(c);
    if (cuda_takes_best(b) &&
        cuda_choose_beside(c, {a->out, a->chosen, a->logits, c->parts, c->arrivals, (int)a->n_vocab, mark}))
        return;
    for (size_t at = 0; at < b->n_logit_rows; at += MOST_ROWS) {
        size_t rows = b->n_logit_rows - at < MOST_ROWS ? b->n_logit_rows - at : MOST_ROWS;
        size_t parts = 4 * (size_t)c->n_sms / rows;
        if (parts < LEAST_PARTS) parts = LEAST_PARTS;
        if (parts > MOST_PARTS) parts = MOST_PARTS;
        struct launch l = {grid_for(parts, rows), THREADS, 0};
        sample_step s = {(sample_memory *)c->sampling,
                         a->logits + at * a->n_vocab,
                         b->sample + at,
                         b->position,
                         b->logit_rows + at,
                         b->banned,
                         a->out + at,
                         a->chosen + at,
                         (int)a->n_vocab,
                         (int)b->n_banned,
                         mark};
        launch_kernel(c, "sampling", k_sample, l, s);
        if (a->filter == FILTER_NONE) continue;
        if (a->filter != FILTER_FEW) launch_kernel(c, "sampling", k_weigh, l, s);
        launch_kernel(c, "sampling", k_draw, l, s);
    }
    c->follows_choice = mark.flag != NULL;
}

extern "C" size_t cuda_sample_bytes(void) {
    return sizeof(sample_memory);
}

extern "C" void cuda_fill_sample(struct ops *ops) {
    ops->sample = sample;
}
