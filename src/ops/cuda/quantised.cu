// quantised.cu: products with quantised weights, rows of quantised embeddings, and the device's copies of such
// matrices. Formats, and the order of the sums: quantised.cuh.
#include "ops/cuda/clusters.cuh"
#include "ops/cuda/quantised.cuh"
#include "ops/cuda/small.cuh"
#include "ops/cuda/tiles.cuh"

// Calls f with the format's class; false when there is none for the type.
template <typename F> static bool with_format(enum dtype type, F f) {
    switch (type) {
    case DTYPE_Q8_0: f(q8_0()); return true;
    case DTYPE_Q4_0: f(q4_0()); return true;
    case DTYPE_Q4_1: f(q4_1()); return true;
    case DTYPE_Q5_0: f(q5_0()); return true;
    case DTYPE_Q5_1: f(q5_1()); return true;
    case DTYPE_Q2_K: f(q2_k()); return true;
    case DTYPE_Q3_K: f(q3_k()); return true;
    case DTYPE_Q4_K: f(q4_k()); return true;
    case DTYPE_Q5_K: f(q5_k()); return true;
    case DTYPE_Q6_K: f(q6_k()); return true;
    default: return false;
    }
}

// ---- Kernels ------------------------------------------------------------------------------------------------------

template <typename Q>
static __global__ void k_embed_quantised(float *x, const unsigned char *table, const int32_t *token,
                                         const int32_t *chosen, int n, int columns) {
    using W = quantised_weights<Q>;
    dependents_may_start();
    dependency_wait();
    int id = token[blockIdx.x], row = id < 0 ? chosen[~id] : id, n_slices = columns / SLICE;
    const unsigned char *records = table + (size_t)(row / 8) * n_slices * W::RECORD;
    for (int k = (int)threadIdx.x; k < n; k += PRODUCT_THREADS)
        x[(size_t)blockIdx.x * n + k] = W::value(records + (size_t)(k / SLICE) * W::RECORD, row % 8, k % SLICE);
}

// A thread writes two chunks' shares of one lane.
template <typename Q>
static __global__ void k_pack_quantised(unsigned char *out, const unsigned char *rows, size_t first, size_t n, int n_in,
                                        size_t row_bytes, int columns) {
    using W = quantised_weights<Q>;
    dependency_wait();
    size_t i = (size_t)blockIdx.x * PRODUCT_THREADS + threadIdx.x, n_slices = (size_t)(columns / SLICE);
    int t = (int)(i % 4), pair = (int)(i / 4 % 2), slice = (int)(i / 8 % n_slices);
    size_t row = i / 8 / n_slices;
    if (row >= n) return;
    const unsigned char *from = rows + row * row_bytes;
    unsigned char *record = out + ((first + row) / 8 * n_slices + (size_t)slice) * W::RECORD;
    int g = (int)((first + row) % 8);
    W::put(record, g * 4 + t, from, slice, pair, n_in);
    if (t == 0 && pair == 0) Q::put_scales(record + W::INTEGERS + g * Q::SCALE_BYTES, from, slice, n_in);
}

// ---- Launchers ----------------------------------------------------------------------------------------------------

extern "C" size_t cuda_quantised_record(enum dtype type) {
    size_t bytes = 0;
    with_format(type, [&](auto q) { bytes = quantised_weights<decltype(q)>::RECORD; });
    return bytes;
}

extern "C" void cuda_pack_quantised(struct cuda_state *s, const struct matrix *out, const void *rows, size_t row,
                                    size_t n_rows) {
    size_t columns = padded_columns(out->n_in), threads = n_rows * (columns / SLICE) * 8;
    with_format(out->type, [&](auto q) {
        launch_kernel(s, "packing weights", k_pack_quantised<decltype(q)>,
                      {grid_for(round_up(threads, PRODUCT_THREADS) / PRODUCT_THREADS), PRODUCT_THREADS, 0},
                      (unsigned char *)(uintptr_t)out->data, (const unsigned char *)rows, row, n_rows, (int)out->n_in,
                      out->row_bytes, (int)columns);
    });
}

extern "C" void cuda_quantised_embed(const struct op_ctx *ctx, float *x, const struct matrix *table,
                                     const int32_t *token, size_t n_tokens) {
    with_format(table->type, [&](auto q) {
        launch_kernel(cuda_of(ctx), "embed", k_embed_quantised<decltype(q)>, {grid_for(n_tokens), PRODUCT_THREADS, 0},
                      x, (const unsigned char *)table->data, token, ctx->chosen, (int)table->n_in,
                      (int)padded_columns(table->n_in));
    });
}

void quantised_matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens) {
    with_format(w->type, [&](auto q) { launch_matmul<quantised_weights<decltype(q)>>(ctx, y, x, w, n_tokens); });
}

bool quantised_may_share(const struct cuda_state *s, const struct matrix *w, size_t n_tokens) {
    bool may = false;
    with_format(w->type, [&](auto q) {
        may = may_share<quantised_weights<decltype(q)>>(s, w->n_out, padded_columns(w->n_in), n_tokens);
    });
    return may;
}

// As many pairs a block as give each SM about one block.
template <enum product_mode MODE> static constexpr int most_pairs() {
    return MODE == PRODUCT_RESIDUAL ? 1 : MODE == PRODUCT_QKV ? 2 : 3;
}

template <typename W, enum product_mode MODE, bool NORM>
static void product(const struct op_ctx *ctx, const char *what, const product_args &p, enum dtype type, size_t pairs) {
    size_t n_sms = (size_t)cuda_of(ctx)->n_sms, tokens = (size_t)p.n_tokens;
    bool small = is_small(cuda_of(ctx), tokens, type);
    if constexpr (!W::RARE) {
        // The next products' weights shall fit beside.
        constexpr int MOST = most_pairs<MODE>();
        bool fit = (size_t)(p.columns / SLICE) * W::RECORD * 2 * MOST <= MAX_SHARED / 2;
        bool many = small && pairs > n_sms && tokens <= 4 && fit;
        if (many && launch_small<W, MODE, NORM, MOST>(ctx, what, p, pairs)) return;
    }
    if (small && launch_small<W, MODE, NORM, 1>(ctx, what, p, pairs)) return;
    if constexpr (!W::RARE) {
        if constexpr (MODE == PRODUCT_RESIDUAL)
            if (!cuda_in_parts(ctx, p, type) && launch_sharing<W>(ctx, what, p)) return;
        if (!small && cuda_group_product(ctx, what, MODE, p, type, pairs)) return;
        size_t large = round_up(pairs, 8) / 8 * (round_up(tokens, 64) / 64);
        if (tokens <= 32) {
            launch_tiles<W, MODE, NORM, 1, 1>(ctx, what, p, pairs);
            return;
        }
        if (tokens > 64 && large * 4 >= n_sms * 3) {
            launch_tiles<W, MODE, NORM, 4, 2>(ctx, what, p, pairs);
            return;
        }
    }
    launch_tiles<W, MODE, NORM, 2, 2>(ctx, what, p, pairs);
}

void quantised_product(const struct op_ctx *ctx, const char *what, const product_args &p, enum product_mode mode,
                       enum dtype type, size_t pairs) {
    with_format(type, [&](auto q) {
        using W = quantised_weights<decltype(q)>;
        if (mode == PRODUCT_QKV) product<W, PRODUCT_QKV, true>(ctx, what, p, type, pairs);
        else if (mode == PRODUCT_RESIDUAL) product<W, PRODUCT_RESIDUAL, false>(ctx, what, p, type, pairs);
        else if (mode == PRODUCT_GATE_UP) product<W, PRODUCT_GATE_UP, true>(ctx, what, p, type, pairs);
        else product<W, PRODUCT_PLAIN, true>(ctx, what, p, type, pairs);
    });
}

template <typename W, enum product_mode MODE, bool NORM> static void allow_all(struct cuda_state *s) {
    allow_small<W, MODE, NORM, 1>(s);
    allow_tile<W, MODE, 2, 2>(s);
    if constexpr (!W::RARE) {
        if constexpr (MODE == PRODUCT_RESIDUAL) allow_sharing<W>(s);
        allow_small<W, MODE, NORM, most_pairs<MODE>()>(s);
        allow_tile<W, MODE, 1, 1>(s);
        allow_tile<W, MODE, 4, 2>(s);
    }
}

extern "C" void cuda_load_quantised(struct cuda_state *s, enum dtype type) {
    with_format(type, [&](auto q) {
        using W = quantised_weights<decltype(q)>;
        allow_all<W, PRODUCT_QKV, true>(s);
        allow_all<W, PRODUCT_RESIDUAL, false>(s);
        allow_all<W, PRODUCT_GATE_UP, true>(s);
        allow_all<W, PRODUCT_PLAIN, true>(s);
    });
}
