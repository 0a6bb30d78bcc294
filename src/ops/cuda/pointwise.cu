// pointwise.cu: primitives that touch each element once, the norms, and the places of K and V. Formulas: ops.h; orders
// of sums: common.cuh.
#include "ops/cuda/common.cuh"
#include "ops/cuda/kv.cuh"
#include "ops/cuda/matrix.cuh"
#include "ops/cuda/wide.cuh"

enum { THREADS = 256 };

// ---- Kernels ------------------------------------------------------------------------------------------------------

static __global__ void k_embed(float *x, const __nv_bfloat16 *table, const int32_t *token, const int32_t *chosen, int n,
                               int columns) {
    dependents_may_start();
    dependency_wait();
    int32_t id = token[blockIdx.x];
    size_t row = (size_t)(id < 0 ? chosen[~id] : id);
    for (int k = (int)threadIdx.x; k < n; k += THREADS)
        x[(size_t)blockIdx.x * n + k] = __bfloat162float(table[unit_index(row, (size_t)k, (size_t)columns)]);
}

static __global__ void k_rmsnorm(float *y, const float *x, const float *w, float eps, int n) {
    __shared__ float sums[NORM_WARPS];
    dependents_may_start();
    dependency_wait();
    const float *row = x + (size_t)blockIdx.x * n;
    float s = norm_partial(row, n, (int)threadIdx.x);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = s;
    __syncthreads();
    float r = norm_rate(sums, n, eps);
    for (int k = (int)threadIdx.x; k < n; k += NORM_THREADS) y[(size_t)blockIdx.x * n + k] = row[k] * r * w[k];
}

static __global__ void k_bias(float *y, const float *b, size_t n_rows, size_t n) {
    dependents_may_start();
    dependency_wait();
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n_rows * n) y[i] += b[i % n];
}

static __global__ void k_add(float *x, const float *y, size_t n) {
    dependents_may_start();
    dependency_wait();
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) x[i] += y[i];
}

static __global__ void k_silu_mul(float *act, const float *gate, const float *up, size_t n) {
    dependents_may_start();
    dependency_wait();
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) act[i] = silu_mul(gate[i], up[i]);
}

static __global__ void k_gather(float *y, const float *x, const int32_t *rows, size_t n) {
    dependents_may_start();
    dependency_wait();
    const float *from = x + (size_t)rows[blockIdx.x] * n;
    for (size_t k = threadIdx.x; k < n; k += THREADS) y[(size_t)blockIdx.x * n + k] = from[k];
}

// A warp a head.
static __global__ void k_head_rmsnorm(float *x, const float *w, float eps, size_t n_heads, int head_dim) {
    dependents_may_start();
    dependency_wait();
    size_t head = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (head < n_heads) head_norm(x + head * head_dim, w, eps, head_dim, (int)threadIdx.x % 32);
}

static __global__ void k_rope(float *x, const float *cos_sin, size_t n_tokens, size_t n_heads, int head_dim) {
    dependents_may_start();
    dependency_wait();
    size_t head = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (head >= n_tokens * n_heads) return;
    head_rope(x + head * head_dim, cos_sin + head / n_heads * head_dim, head_dim, (int)threadIdx.x % 32);
}

// A block a token.
static __global__ void k_kv_store(kv_view kv, batch_view b, const float *k, const float *v) {
    dependents_may_start();
    dependency_wait();
    int t = (int)blockIdx.x, position = b.position[t];
    int page = b.pages[b.page_start[b.seq[t]] + position / KV_PAGE_TOKENS], slot = position % KV_PAGE_TOKENS;
    int width = kv.n_kv_heads * kv.head_dim;
    for (int i = (int)threadIdx.x; i < width; i += THREADS) // whole warps: head_dim is a multiple of 32
        for (int of_v = 0; of_v < 2; of_v++)
            kv_put(kv, of_v, page, i / kv.head_dim, slot, i % kv.head_dim, (of_v ? v : k)[(size_t)t * width + i]);
}

// qk_norm_rope_store: a warp a head of q, k or v of a token.
static __global__ void k_qk_norm_rope_store(kv_view kv, batch_view b, float *q, float *k, const float *v,
                                            const float *q_norm, const float *k_norm, const float *cos_sin, float eps,
                                            int n_heads) {
    dependents_may_start();
    dependency_wait();
    int per_token = n_heads + 2 * kv.n_kv_heads, lane = (int)threadIdx.x % 32, dim = kv.head_dim;
    size_t i = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (i >= (size_t)b.n_tokens * per_token) return;
    int t = (int)(i / per_token), head = (int)(i % per_token), kv_head = head - n_heads;
    const float *cs = cos_sin + (size_t)t * dim;
    if (head < n_heads) {
        float *at = q + ((size_t)t * n_heads + head) * dim;
        if (q_norm) head_norm(at, q_norm, eps, dim, lane);
        head_rope(at, cs, dim, lane);
        return;
    }
    int position = b.position[t], slot = position % KV_PAGE_TOKENS;
    int page = b.pages[b.page_start[b.seq[t]] + position / KV_PAGE_TOKENS];
    if (kv_head < kv.n_kv_heads) {
        float *at = k + ((size_t)t * kv.n_kv_heads + kv_head) * dim;
        if (k_norm) head_norm(at, k_norm, eps, dim, lane);
        head_rope(at, cs, dim, lane);
        __syncwarp();
        for (int c = lane; c < dim; c += 32) kv_put(kv, false, page, kv_head, slot, c, at[c]);
    } else {
        kv_head -= kv.n_kv_heads;
        const float *at = v + ((size_t)t * kv.n_kv_heads + kv_head) * dim;
        for (int c = lane; c < dim; c += 32) kv_put(kv, true, page, kv_head, slot, c, at[c]);
    }
}

// The same for many heads of 64 or 128 channels, in bf16: first all blocks of q and k, whose warps take HEADS_AT_ONCE
// heads of a token, then those of v, whose threads take eight channels of V_AT_ONCE tokens.
enum { HEADS_AT_ONCE = 4, V_AT_ONCE = 4 };

struct store_args {
    kv_view kv;
    batch_view b;
    float *q, *k;
    const float *v, *q_norm, *k_norm, *cos_sin;
    float eps;
    int n_heads, turning_blocks; // blocks of q and k
};

template <int DIM> static __device__ __forceinline__ void turn_heads(const store_args &a, int i, int lane) {
    constexpr int HALF = DIM / 2, PAIRS = head_registers<DIM>::PAIRS;
    int n_kv = a.kv.n_kv_heads, n = a.n_heads + n_kv, per_token = (n + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;
    int token = i / per_token, first = i % per_token * HEADS_AT_ONCE;
    if (token >= a.b.n_tokens) return;
    head_registers<DIM> h[HEADS_AT_ONCE], turn = read_head<DIM>(a.cos_sin + (size_t)token * DIM, lane);
    head_registers<DIM> q_norm = read_head<DIM>(a.q_norm, lane), k_norm = read_head<DIM>(a.k_norm, lane);
    float *at[HEADS_AT_ONCE];
#pragma unroll
    for (int e = 0; e < HEADS_AT_ONCE; e++) {
        int head = first + e;
        at[e] = head < a.n_heads ? a.q + ((size_t)token * a.n_heads + head) * DIM
                                 : a.k + ((size_t)token * n_kv + head - a.n_heads) * DIM;
        h[e] = read_head<DIM>(head < n ? at[e] : NULL, lane);
    }
    kv_place place = place_of(a.b, token);
#pragma unroll
    for (int e = 0; e < HEADS_AT_ONCE; e++) {
        int head = first + e;
        if (a.q_norm) normalise_head<DIM>(h[e], head < a.n_heads ? q_norm : k_norm, a.eps);
        rotate_head<DIM>(h[e], turn);
        if (head >= n) continue;
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            int c = lane + 32 * k;
            at[e][c] = h[e].lo[k];
            at[e][c + HALF] = h[e].hi[k];
            if (head < a.n_heads) continue;
            kv_put(a.kv, false, place.page, head - a.n_heads, place.slot, c, h[e].lo[k]);
            kv_put(a.kv, false, place.page, head - a.n_heads, place.slot, c + HALF, h[e].hi[k]);
        }
    }
}

// Thread i's eight channels, one word of a page, of V_AT_ONCE tokens.
template <int DIM> static __device__ __forceinline__ void store_values(const store_args &a, int i) {
    int n_kv = a.kv.n_kv_heads, words = n_kv * DIM / 8, word = i % words, first = i / words * V_AT_ONCE;
    int head = word / (DIM / 8), c = word % (DIM / 8) * 8;
    float4 v[V_AT_ONCE][2];
#pragma unroll
    for (int e = 0; e < V_AT_ONCE; e++) {
        const float4 *from =
            reinterpret_cast<const float4 *>(a.v) + ((size_t)min(first + e, a.b.n_tokens - 1) * words + word) * 2;
        v[e][0] = from[0];
        v[e][1] = from[1];
    }
#pragma unroll
    for (int e = 0; e < V_AT_ONCE; e++) {
        if (first + e >= a.b.n_tokens) break;
        kv_put_word(a.kv, true, place_of(a.b, first + e), head, c, v[e][0], v[e][1]);
    }
}

template <int DIM> static __global__ void __launch_bounds__(THREADS) k_store_heads(store_args a) {
    dependents_may_start();
    dependency_wait();
    int block = (int)blockIdx.x, thread = (int)threadIdx.x;
    if (block < a.turning_blocks) turn_heads<DIM>(a, block * (THREADS / 32) + thread / 32, thread % 32);
    else store_values<DIM>(a, (block - a.turning_blocks) * THREADS + thread);
}

static __global__ void k_pack_rows(__nv_bfloat16 *out, const __nv_bfloat16 *rows, size_t first, size_t n, size_t n_in,
                                   size_t row_elements, size_t columns) {
    dependency_wait();
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n * n_in) out[unit_index(first + i / n_in, i % n_in, columns)] = rows[i / n_in * row_elements + i % n_in];
}

// ---- Launchers ----------------------------------------------------------------------------------------------------

static size_t blocks(size_t n, size_t per_block) {
    return (n + per_block - 1) / per_block;
}

static void embed(const struct op_ctx *ctx, float *x, const struct matrix *table, const int32_t *token,
                  size_t n_tokens) {
    if (table->type != DTYPE_BF16) {
        cuda_quantised_embed(ctx, x, table, token, n_tokens);
        return;
    }
    launch_kernel(cuda_of(ctx), "embed", k_embed, {grid_for(n_tokens), THREADS, 0}, x,
                  (const __nv_bfloat16 *)table->data, token, ctx->chosen, (int)table->n_in,
                  (int)padded_columns(table->n_in));
}

static void rmsnorm(const struct op_ctx *ctx, float *y, const float *x, const float *w, float eps, size_t n_rows,
                    size_t n) {
    launch_kernel(cuda_of(ctx), "rmsnorm", k_rmsnorm, {grid_for(n_rows), NORM_THREADS, 0}, y, x, w, eps, (int)n);
}

static void bias(const struct op_ctx *ctx, float *y, const float *b, size_t n_rows, size_t n) {
    launch_kernel(cuda_of(ctx), "bias", k_bias, {grid_for(blocks(n_rows * n, THREADS)), THREADS, 0}, y, b, n_rows, n);
}

static void add(const struct op_ctx *ctx, float *x, const float *y, size_t n) {
    launch_kernel(cuda_of(ctx), "add", k_add, {grid_for(blocks(n, THREADS)), THREADS, 0}, x, y, n);
}

static void silu(const struct op_ctx *ctx, float *act, const float *gate, const float *up, size_t n) {
    launch_kernel(cuda_of(ctx), "silu_mul", k_silu_mul, {grid_for(blocks(n, THREADS)), THREADS, 0}, act, gate, up, n);
}

static void gather(const struct op_ctx *ctx, float *y, const float *x, const int32_t *rows, size_t n_rows, size_t n) {
    launch_kernel(cuda_of(ctx), "gather", k_gather, {grid_for(n_rows), THREADS, 0}, y, x, rows, n);
}

static void head_rmsnorm(const struct op_ctx *ctx, float *x, const float *w, float eps, size_t n_tokens, size_t n_heads,
                         size_t head_dim) {
    launch_kernel(cuda_of(ctx), "head_rmsnorm", k_head_rmsnorm,
                  {grid_for(blocks(n_tokens * n_heads, THREADS / 32)), THREADS, 0}, x, w, eps, n_tokens * n_heads,
                  (int)head_dim);
}

static void rope(const struct op_ctx *ctx, float *x, const float *cos_sin, size_t n_tokens, size_t n_heads,
                 size_t head_dim) {
    launch_kernel(cuda_of(ctx), "rope", k_rope, {grid_for(blocks(n_tokens * n_heads, THREADS / 32)), THREADS, 0}, x,
                  cos_sin, n_tokens, n_heads, (int)head_dim);
}

static void kv_store(const struct op_ctx *ctx, struct kv_layer *kv, const struct batch *b, const float *k,
                     const float *v) {
    launch_kernel(cuda_of(ctx), "kv_store", k_kv_store, {grid_for(b->n_tokens), THREADS, 0}, view(kv), view(b), k, v);
    cuda_of(ctx)->has_new_kv = true;
}

// By k_store_heads. False: too few tokens, or another kind of K and V.
static bool store_heads(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a) {
    struct cuda_state *s = cuda_of(ctx);
    size_t per_token = blocks(a->n_heads + a->n_kv_heads, HEADS_AT_ONCE);
    size_t turning = blocks(a->batch->n_tokens * per_token, THREADS / 32);
    size_t words = a->n_kv_heads * a->head_dim / 8,
           storing = blocks(blocks(a->batch->n_tokens, V_AT_ONCE) * words, THREADS);
    bool fills = turning + storing >= 4 * (size_t)s->n_sms; // measured at 2,048 tokens and more
    if (!(s->device.variants & VARIANT_STORE_HEADS) || !fills || is_fp8(a->kv) ||
        (a->head_dim != 64 && a->head_dim != 128))
        return false;
    store_args args = {view(a->kv), view(a->batch),  a->q,        a->k, a->v, a->q_norm, a->k_norm, a->cos_sin,
                       a->eps,      (int)a->n_heads, (int)turning};
    struct launch l = {grid_for(turning + storing), THREADS, 0};
    if (a->head_dim == 64) launch_kernel(s, "qk_norm_rope_store", k_store_heads<64>, l, args);
    else launch_kernel(s, "qk_norm_rope_store", k_store_heads<128>, l, args);
    return true;
}

// A warp a head; n_heads: of q.
static void store_by_warps(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a, size_t n_heads) {
    size_t warps = a->batch->n_tokens * (n_heads + 2 * a->n_kv_heads);
    launch_kernel(cuda_of(ctx), "qk_norm_rope_store", k_qk_norm_rope_store,
                  {grid_for(blocks(warps, THREADS / 32)), THREADS, 0}, view(a->kv), view(a->batch), a->q, a->k, a->v,
                  a->q_norm, a->k_norm, a->cos_sin, a->eps, (int)n_heads);
}

bool cuda_store_kv(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a) {
    if (cuda_store_pages(ctx, a)) return true;
    if (is_fp8(a->kv)) store_by_warps(ctx, a, 0);
    return is_fp8(a->kv);
}

static void qk_norm_rope_store(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a) {
    struct cuda_state *s = cuda_of(ctx);
    bool stored = s->stored == a->k;
    s->stored = NULL;
    if (a->n_heads > 0) {
        if (!store_heads(ctx, a)) store_by_warps(ctx, a, a->n_heads);
        return;
    }
    if (!stored && !cuda_store_kv(ctx, a)) store_by_warps(ctx, a, 0);
    s->has_new_kv = true;
}

extern "C" void cuda_pack_rows(struct cuda_state *s, const struct matrix *out, const void *rows, size_t row,
                               size_t n_rows) {
    launch_kernel(s, "packing weights", k_pack_rows, {grid_for(blocks(n_rows * out->n_in, THREADS)), THREADS, 0},
                  (__nv_bfloat16 *)(uintptr_t)out->data, (const __nv_bfloat16 *)rows, row, n_rows, out->n_in,
                  out->row_bytes / 2, padded_columns(out->n_in));
}

extern "C" void cuda_fill_pointwise(struct ops *ops) {
    ops->embed = embed;
    ops->rmsnorm = rmsnorm;
    ops->bias = bias;
    ops->add = add;
    ops->silu_mul = silu;
    ops->gather = gather;
    ops->head_rmsnorm = head_rmsnorm;
    ops->rope = rope;
    ops->kv_store = kv_store;
    ops->qk_norm_rope_store = qk_norm_rope_store;
}
