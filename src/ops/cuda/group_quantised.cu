// group_quantised.cu: products for many tokens by Hopper's asynchronous matrix instructions (group_kernel.cuh), with
// quantised weights: their integers become bf16s in registers, a group of 16 or 32 columns is a chain of one or two
// instructions from +0, and sums are scaled and added as quantised.cuh says: to the same bits as by its kernels.
#include "ops/cuda/group_kernel.cuh"
#include "ops/cuda/quantised.cuh"

// A stage is a whole slice: of 64 rows by 64 tokens on half an SM, and of 128 by 128.
template <typename W> using small_shape = group_shape<W, 1, 1, 1, 64, 3, 3>;
template <typename W> using large_shape = group_shape<W, 2, 1, 2, 64, 3, 3>;

// A slice's weights of a warp's 16 rows, as the instructions take them: steps of 16 columns.
template <typename Q> struct quantised_slice {
    uint32_t a[8][4];
    typename Q::scales upper, lower;
};

template <typename Q>
static __device__ __forceinline__ void load_weights(quantised_slice<Q> &s, const unsigned char *record, int lane) {
    using W = quantised_weights<Q>;
#pragma unroll
    for (int c = 0; c < SLICE / 32; c++) {
        uint32_t u[4], v[4];
        W::fragment(record, lane, c, u);
        W::fragment(record + W::RECORD, lane, c, v);
#pragma unroll
        for (int step = 0; step < 2; step++) {
            uint32_t *a = s.a[2 * c + step];
            a[0] = u[2 * step], a[1] = v[2 * step], a[2] = u[2 * step + 1], a[3] = v[2 * step + 1];
        }
    }
    s.upper = Q::load(record + W::INTEGERS + lane / 4 * Q::SCALE_BYTES);
    s.lower = Q::load(record + W::RECORD + W::INTEGERS + lane / 4 * Q::SCALE_BYTES);
}

// A chain: the sums of group `i` of a slice, of `STEPS` steps.
template <int STEPS, int N>
static __device__ __forceinline__ void start_sums(float (&sum)[N / 2], const uint32_t (*a)[4], uint64_t tokens, int i,
                                                  uint32_t half_step) {
    group_fence();
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int step = i * STEPS + k;
        uint64_t at = tokens + (uint64_t)((step / 4 * half_step + step % 4 * 2 * K_STEP) >> 4);
        group_mma(sum, a[step][0], a[step][1], a[step][2], a[step][3], at, k > 0);
    }
    group_commit();
}

// The same of ones.
template <int STEPS, int N>
static __device__ __forceinline__ void start_plain(float (&sum)[N / 2], uint64_t tokens, int i, uint32_t half_step) {
    constexpr uint32_t ONES = 0x3F803F80u;
    group_fence();
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        int step = i * STEPS + k;
        uint64_t at = tokens + (uint64_t)((step / 4 * half_step + step % 4 * 2 * K_STEP) >> 4);
        group_mma(sum, ONES, ONES, ONES, ONES, at, k > 0);
    }
    group_commit();
}

template <int N>
static __device__ __forceinline__ void add_scaled(float (&d)[N / 2], float above, float below,
                                                  const float (&sum)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[i] = fmaf(i % 4 < 2 ? above : below, sum[i], d[i]);
}

// A slice's own sums for one chain of tokens.
template <class S, typename Q>
static __device__ __forceinline__ void sum_slice(float (&d)[S::N / 2], const quantised_slice<Q> &s, uint64_t tokens) {
    constexpr int GROUPS = SLICE / Q::GROUP, STEPS = Q::GROUP / 16, N = S::N, PER = 32 / Q::GROUP;
    float even[N / 2], odd[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[i] = 0;
    if constexpr (Q::HAS_MIN) {
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            start_sums<STEPS, N>(even, s.a, tokens, i, S::TOKEN_BYTES);
            start_plain<STEPS, N>(odd, tokens, i, S::TOKEN_BYTES);
            group_wait<1>(even);
            add_scaled<N>(d, s.upper.scale(i / PER, i % PER), s.lower.scale(i / PER, i % PER), even);
            group_wait<0>(odd);
            add_scaled<N>(d, s.upper.min(i / PER, i % PER), s.lower.min(i / PER, i % PER), odd);
        }
    } else {
        start_sums<STEPS, N>(even, s.a, tokens, 0, S::TOKEN_BYTES);
#pragma unroll
        for (int i = 0; i < GROUPS; i += 2) {
            start_sums<STEPS, N>(odd, s.a, tokens, i + 1, S::TOKEN_BYTES);
            group_wait<1>(even);
            add_scaled<N>(d, s.upper.scale(i / PER, i % PER), s.lower.scale(i / PER, i % PER), even);
            if (i + 2 < GROUPS) {
                start_sums<STEPS, N>(even, s.a, tokens, i + 2, S::TOKEN_BYTES);
                group_wait<1>(odd);
            } else {
                group_wait<0>(odd);
            }
            add_scaled<N>(d, s.upper.scale((i + 1) / PER, (i + 1) % PER), s.lower.scale((i + 1) / PER, (i + 1) % PER),
                          odd);
        }
    }
}

template <typename Q> struct quantised_consumer {
    template <class S> static __device__ __forceinline__ void run(const group_args &a, const ring<S> &r, int thread) {
        int group = thread / 128, lane = thread % 32;
        part at = {group % S::WM, group / S::WM, thread / 32 % 4, lane};
        int n_pieces = all_pieces(a);
        position weights = {0, 0}, tokens = {0, 0};
        for (int i = (int)blockIdx.x; i < n_pieces; i += (int)gridDim.x) {
            piece_of_work w = piece_at(a, i);
            float total[S::C][S::N / 2];
#pragma unroll
            for (int c = 0; c < S::C; c++)
#pragma unroll
                for (int i = 0; i < S::N / 2; i++) total[c][i] = -0.0f; // -0 + x is x, also for -0
            for (int s = 0; s < w.n; s++) {
                quantised_slice<Q> slice;
                barrier_wait(&r.weights_full[weights.stage], (uint32_t)weights.round & 1);
                load_weights<Q>(slice, r.weights(weights.stage) + (at.wm * 8 + at.warp * 2) * S::UNIT_BYTES, lane);
                barrier_wait(&r.tokens_full[tokens.stage], (uint32_t)tokens.round & 1);
                uint64_t operand =
                    group_operand(r.tokens(tokens.stage) + at.wn * S::C * S::N / 8 * HALF_BYTES, K_STEP, COLUMN_STEP);
#pragma unroll
                for (int c = 0; c < S::C; c++) {
                    float d[S::N / 2];
                    sum_slice<S, Q>(d, slice, operand + (uint64_t)((c * (S::N / 8) * COLUMN_STEP) >> 4));
#pragma unroll
                    for (int i = 0; i < S::N / 2; i++) total[c][i] += d[i];
                }
                __syncwarp(); // all lanes have used what they loaded, and waited for what reads tokens
                if (S::APART) barrier_arrive(&r.weights_empty[weights.stage]); // else it is one ring
                barrier_arrive(&r.tokens_empty[tokens.stage]);
                weights.advance<S::AHEAD>();
                tokens.advance<S::STAGES>();
            }
            finish_tile<S>(a, r, w, thread, total);
        }
    }
};

// ---- Launchers ----------------------------------------------------------------------------------------------------

template <typename F> static bool with_format(enum dtype type, F f) {
    switch (type) {
    case DTYPE_Q8_0: f(q8_0()); return true;
    case DTYPE_Q4_0: f(q4_0()); return true;
    case DTYPE_Q4_K: f(q4_k()); return true;
    case DTYPE_Q6_K: f(q6_k()); return true;
    default: return false;
    }
}

template <class S, typename Q> static void launch(struct cuda_state *s, const char *what, group_args &a, int rows) {
    a.row_tiles = (rows + S::ROWS - 1) / S::ROWS;
    a.token_tiles = (a.p.n_tokens + S::TOKENS - 1) / S::TOKENS;
    size_t tiles = (size_t)all_pieces(a), most = (size_t)s->n_sms * S::BLOCKS;
    launch_kernel(s, what, k_group<S, quantised_consumer<Q>>,
                  {grid_for(tiles < most ? tiles : most), S::THREADS, S::SHARED}, a);
}

bool cuda_has_group_quantised(enum dtype type) {
    return with_format(type, [](auto) {});
}

void cuda_group_quantised(struct cuda_state *s, const char *what, group_args &a, int rows, enum dtype type) {
    with_format(type, [&](auto q) {
        using Q = decltype(q);
        using LARGE = large_shape<quantised_weights<Q>>;
        using SMALL = small_shape<quantised_weights<Q>>;
        int large = (rows + LARGE::ROWS - 1) / LARGE::ROWS * ((a.p.n_tokens + LARGE::TOKENS - 1) / LARGE::TOKENS);
        bool is_large = s->tile_shape > 0 ? s->tile_shape % 2 == 0 : large * 4 >= s->n_sms * 3;
        if (is_large) launch<LARGE, Q>(s, what, a, rows);
        else launch<SMALL, Q>(s, what, a, rows);
    });
}

extern "C" void cuda_load_group_quantised(struct cuda_state *s, enum dtype type) {
    with_format(type, [&](auto q) {
        using Q = decltype(q);
        using LARGE = large_shape<quantised_weights<Q>>;
        using SMALL = small_shape<quantised_weights<Q>>;
        allow_shared(s, "preparing products", k_group<LARGE, quantised_consumer<Q>>, LARGE::SHARED);
        allow_shared(s, "preparing products", k_group<SMALL, quantised_consumer<Q>>, SMALL::SHARED);
    });
}
