// products.cu: matrix products and the ops fused around them.
//
// An output element is the sum over slices of 128 columns, in ascending order; a slice's sum is a chain of eight
// matrix instructions of 16 columns each, from +0. That order is the same in every kernel and for every number of
// tokens, so that all kernels return the same bits (docs/NUMERICS.md).
#include "ops/cuda/products.cuh"

enum { PRODUCT_THREADS = 256, WARPS = PRODUCT_THREADS / 32, MAX_SHARED = 226 * 1024 };

// ---- The standard product
// --------------------------------------------------------------------------------------------

// The share of lane 4 g + t in columns 2t, 2t+1 and 8+2t, 9+2t of one step, rounded.
static __device__ __forceinline__ uint32_t rounded_pair(const float *x, int k, int n_in) {
    float low = k < n_in ? x[k] : 0.0f, high = k + 1 < n_in ? x[k + 1] : 0.0f;
    return pack_bf16(low, high);
}

// A block computes 16 rows for 8 tokens; its warps take slices in turn.
static __global__ void __launch_bounds__(PRODUCT_THREADS)
    k_matmul(float *y, const float *x, const uint4 *w, int n_out, int n_in, int columns, int n_tokens) {
    __shared__ float part[WARPS][16 * 8];
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int n_slices = columns / SLICE, chunks = columns / 32, token = (int)blockIdx.y * 8 + g;
    const uint4 *a = w + (size_t)blockIdx.x * 2 * chunks * CHUNK_LANES + lane, *b = a + (size_t)chunks * CHUNK_LANES;
    const float *in = x + (size_t)token * n_in;
    float total = 0;
    for (int base = 0; base < n_slices; base += WARPS) {
        int s = base + warp;
        float d[4] = {0, 0, 0, 0};
        for (int c = s * 4; s < n_slices && c < s * 4 + 4; c++) {
            uint4 wa = a[c * CHUNK_LANES], wb = b[c * CHUNK_LANES];
            uint32_t p[4] = {0, 0, 0, 0};
            if (token < n_tokens)
                for (int i = 0; i < 4; i++) p[i] = rounded_pair(in, c * 32 + i * 8 + 2 * t, n_in);
            mma(d, wa.x, wb.x, wa.y, wb.y, p[0], p[1]);
            mma(d, wa.z, wb.z, wa.w, wb.w, p[2], p[3]);
        }
        part[warp][g * 8 + 2 * t] = d[0];
        part[warp][g * 8 + 2 * t + 1] = d[1];
        part[warp][(g + 8) * 8 + 2 * t] = d[2];
        part[warp][(g + 8) * 8 + 2 * t + 1] = d[3];
        __syncthreads();
        if (threadIdx.x < 128)
            for (int i = 0; i < WARPS && base + i < n_slices; i++)
                total = base + i == 0 ? part[0][threadIdx.x] : total + part[i][threadIdx.x];
        __syncthreads();
    }
    int row = (int)blockIdx.x * 16 + (int)threadIdx.x / 8;
    token = (int)blockIdx.y * 8 + (int)threadIdx.x % 8;
    if (threadIdx.x < 128 && row < n_out && token < n_tokens) y[(size_t)token * n_out + row] = total;
}

// ---- A few tokens: weights through shared memory, asked for before the kernel before has ended
// ------------------------

// Where a block's units stand and what its rows are. A pair of units gives 16 rows of one matrix, or (GATE_UP) 8 rows
// of gate and the same 8 of up; a residual's block has one unit.
template <enum product_mode MODE>
static __device__ __forceinline__ void find_units(const product_args &p, int block, const uint4 *&a, const uint4 *&b,
                                                  int &segment, int &row) {
    size_t unit = (size_t)p.columns / 32 * CHUNK_LANES;
    segment = 0;
    if (MODE == PRODUCT_RESIDUAL) {
        row = block * 8;
        a = b = p.w[0] + (size_t)block * unit;
    } else if (MODE == PRODUCT_GATE_UP) {
        row = block * 8;
        a = p.w[0] + (size_t)block * unit;
        b = p.w[1] + (size_t)block * unit;
    } else {
        if (MODE == PRODUCT_QKV)
            while (segment < 2 && block >= p.n_pairs[segment]) block -= p.n_pairs[segment++];
        row = block * 16;
        a = p.w[segment] + (size_t)block * 2 * unit;
        b = a + unit;
    }
}

// What happens to a finished sum of one row and token (GATE_UP: both sums).
template <enum product_mode MODE>
static __device__ __forceinline__ void finish(const product_args &p, int segment, int row, int token, float sum,
                                              float up) {
    if (row >= p.n_out[segment]) return;
    float *at = p.y[segment] + (size_t)token * p.n_out[segment] + row;
    if (MODE == PRODUCT_RESIDUAL) *at += sum;
    else if (MODE == PRODUCT_GATE_UP) *at = silu_mul(sum, up);
    else *at = p.b[segment] ? sum + p.b[segment][row] : sum;
}

// The inputs of up to 8 tokens, normed (or as they are) and rounded, into shared memory: 32 columns of a token are 64
// bytes, in the order of matrix.cuh.
template <bool NORM>
static __device__ __forceinline__ void stage_inputs(const product_args &p, unsigned char *acts, float *sums,
                                                    int slots) {
    int thread = (int)threadIdx.x;
    if (NORM) {
        for (int i = 0; i < p.n_tokens; i++) {
            float s = norm_partial(input_row(p, i), p.n_in, thread);
            if (thread % 32 == 0) sums[i * NORM_WARPS + thread / 32] = s;
        }
        __syncthreads();
    }
    for (int i = 0; i < p.n_tokens; i++) {
        const float *x = input_row(p, i);
        float r = NORM ? norm_rate(sums + i * NORM_WARPS, p.n_in, p.eps) : 1.0f;
        for (int k = 4 * thread; k < p.columns; k += 4 * PRODUCT_THREADS) {
            float4 v = make_float4(0, 0, 0, 0);
            if (k < p.n_in) v = *reinterpret_cast<const float4 *>(x + k);
            if (NORM && k < p.n_in) {
                float4 n = *reinterpret_cast<const float4 *>(p.norm + k);
                v = make_float4(v.x * r * n.x, v.y * r * n.y, v.z * r * n.z, v.w * r * n.w);
            }
            unsigned char *at = acts + ((size_t)(k / 32) * slots + i) * 64 + k % 8 / 2 * 16 + k % 32 / 8 * 4;
            *reinterpret_cast<uint32_t *>(at) = pack_bf16(v.x, v.y);
            *reinterpret_cast<uint32_t *>(at + 16) = pack_bf16(v.z, v.w);
        }
    }
}

template <enum product_mode MODE, bool NORM>
static __global__ void __launch_bounds__(PRODUCT_THREADS) k_small(product_args p, int slots) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ __align__(8) uint64_t arrived;
    __shared__ float sums[SMALL_TOKENS * NORM_WARPS];
    constexpr int UNITS = MODE == PRODUCT_RESIDUAL ? 1 : 2, ROWS = UNITS * 8;
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    int n_slices = p.columns / SLICE, unit_bytes = p.columns * 16;
    const uint4 *a, *b;
    int segment, row;
    find_units<MODE>(p, (int)blockIdx.x, a, b, segment, row);
    uint4 *weights = reinterpret_cast<uint4 *>(shared);
    unsigned char *acts = shared + (size_t)UNITS * unit_bytes;
    float *part = reinterpret_cast<float *>(acts + (size_t)p.columns * 2 * slots);
#if HOPPER
    if (thread == 0) {
        barrier_init(&arrived);
        barrier_fence();
        barrier_expect(&arrived, (uint32_t)(UNITS * unit_bytes));
        bulk_copy(weights, a, (uint32_t)unit_bytes, &arrived);
        if (UNITS == 2) bulk_copy(weights + unit_bytes / 16, b, (uint32_t)unit_bytes, &arrived);
    }
#else
    for (int i = thread; i < unit_bytes / 16; i += PRODUCT_THREADS) {
        weights[i] = a[i];
        if (UNITS == 2) weights[unit_bytes / 16 + i] = b[i];
    }
#endif
    dependents_may_start();
    dependency_wait();
    stage_inputs<NORM>(p, acts, sums, slots);
    __syncthreads();
    barrier_wait(&arrived, 0);
    const uint4 *wa = weights + lane, *wb = UNITS == 2 ? wa + unit_bytes / 16 : wa;
    for (int s = warp; s < n_slices; s += WARPS) {
        float d[4] = {0, 0, 0, 0};
#pragma unroll
        for (int c = s * 4; c < s * 4 + 4; c++) {
            uint4 u = wa[c * CHUNK_LANES], v = make_uint4(0, 0, 0, 0), x = make_uint4(0, 0, 0, 0);
            if (UNITS == 2) v = wb[c * CHUNK_LANES];
            if (g < slots) x = *reinterpret_cast<const uint4 *>(acts + ((size_t)c * slots + g) * 64 + t * 16);
            mma(d, u.x, v.x, u.y, v.y, x.x, x.y);
            mma(d, u.z, v.z, u.w, v.w, x.z, x.w);
        }
        float *to = part + (size_t)s * ROWS * slots;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (2 * t + i >= slots) continue;
            to[g * slots + 2 * t + i] = d[i];
            if (UNITS == 2) to[(g + 8) * slots + 2 * t + i] = d[2 + i];
        }
    }
    __syncthreads();
    constexpr int FINISHED = MODE == PRODUCT_GATE_UP ? 8 : ROWS; // rows of results
    if (thread >= FINISHED * slots || thread % slots >= p.n_tokens) return;
    float sum = part[thread], up = MODE == PRODUCT_GATE_UP ? part[thread + 8 * slots] : 0.0f;
    for (int s = 1; s < n_slices; s++) {
        sum += part[(size_t)s * ROWS * slots + thread];
        if (MODE == PRODUCT_GATE_UP) up += part[(size_t)s * ROWS * slots + thread + 8 * slots];
    }
    finish<MODE>(p, segment, row + thread / slots, thread % slots, sum, up);
}

// ---- More tokens: inputs packed first, then products from registers
// --------------------------------------------------

// Tokens' inputs, normed (or as they are) and rounded, in units; tokens up to a whole tile and columns up to a whole
// slice become zero.
template <bool NORM> static __global__ void k_pack_inputs(product_args p, __nv_bfloat16 *packed) {
    __shared__ float sums[NORM_WARPS];
    dependents_may_start();
    dependency_wait();
    int i = (int)blockIdx.x, thread = (int)threadIdx.x;
    bool real = i < p.n_tokens;
    const float *x = real ? input_row(p, i) : NULL;
    float r = 1.0f;
    if (NORM && real) {
        float s = norm_partial(x, p.n_in, thread);
        if (thread % 32 == 0) sums[thread / 32] = s;
        __syncthreads();
        r = norm_rate(sums, p.n_in, p.eps);
    }
    for (int k = 4 * thread; k < p.columns; k += 4 * PRODUCT_THREADS) {
        float4 v = make_float4(0, 0, 0, 0);
        if (real && k < p.n_in) v = *reinterpret_cast<const float4 *>(x + k);
        if (NORM && real && k < p.n_in) {
            float4 n = *reinterpret_cast<const float4 *>(p.norm + k);
            v = make_float4(v.x * r * n.x, v.y * r * n.y, v.z * r * n.z, v.w * r * n.w);
        }
        uint32_t *at = reinterpret_cast<uint32_t *>(packed + unit_index((size_t)i, (size_t)k, (size_t)p.columns));
        at[0] = pack_bf16(v.x, v.y);
        at[4] = pack_bf16(v.z, v.w);
    }
}

// A block computes a pair of units for NT units of tokens.
template <enum product_mode MODE, int NT>
static __global__ void __launch_bounds__(PRODUCT_THREADS) k_packed(product_args p, const uint4 *packed) {
    extern __shared__ __align__(128) unsigned char shared[];
    float *part = reinterpret_cast<float *>(shared); // [WARPS][16][NT * 8]
    constexpr int TOKENS = NT * 8, OUTPUTS = 16 * TOKENS, OWN = (OUTPUTS + PRODUCT_THREADS - 1) / PRODUCT_THREADS;
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    int n_slices = p.columns / SLICE;
    size_t unit = (size_t)p.columns / 32 * CHUNK_LANES;
    const uint4 *a, *b;
    int segment, row;
    find_units<MODE == PRODUCT_RESIDUAL ? PRODUCT_PLAIN : MODE>(p, (int)blockIdx.x, a, b, segment, row);
    const uint4 *x = packed + (size_t)blockIdx.y * NT * unit + lane;
    a += lane;
    b += lane;
    float total[OWN];
    dependents_may_start();
    dependency_wait();
    for (int base = 0; base < n_slices; base += WARPS) {
        int s = base + warp;
        if (s < n_slices) {
            float d[NT][4] = {};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int c = (s * 4 + i) * CHUNK_LANES;
                uint4 u = a[c], v = b[c];
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    uint4 in = x[(size_t)n * unit + c];
                    mma(d[n], u.x, v.x, u.y, v.y, in.x, in.y);
                    mma(d[n], u.z, v.z, u.w, v.w, in.z, in.w);
                }
            }
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    part[(size_t)warp * OUTPUTS + (g + i / 2 * 8) * TOKENS + n * 8 + 2 * t + i % 2] = d[n][i];
        }
        __syncthreads();
#pragma unroll
        for (int o = 0; o < OWN; o++) {
            int at = o * PRODUCT_THREADS + thread;
            for (int i = 0; at < OUTPUTS && i < WARPS && base + i < n_slices; i++)
                total[o] = base + i == 0 ? part[at] : total[o] + part[(size_t)i * OUTPUTS + at];
        }
        __syncthreads();
    }
    if (MODE == PRODUCT_GATE_UP) { // the other half's sums, through shared memory
#pragma unroll
        for (int o = 0; o < OWN; o++)
            if (o * PRODUCT_THREADS + thread < OUTPUTS) part[o * PRODUCT_THREADS + thread] = total[o];
        __syncthreads();
    }
    constexpr int FINISHED = MODE == PRODUCT_GATE_UP ? OUTPUTS / 2 : OUTPUTS;
#pragma unroll
    for (int o = 0; o < OWN; o++) {
        int at = o * PRODUCT_THREADS + thread, token = (int)blockIdx.y * TOKENS + at % TOKENS;
        if (at >= FINISHED || token >= p.n_tokens) continue;
        finish<MODE>(p, segment, row + at / TOKENS, token, total[o],
                     MODE == PRODUCT_GATE_UP ? part[at + OUTPUTS / 2] : 0.0f);
    }
}

// ---- Launchers
// -------------------------------------------------------------------------------------------------------

static size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

static void matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens) {
    launch_kernel(cuda_of(ctx), "matmul", k_matmul,
                  {grid_for(round_up(w->n_out, 16) / 16, round_up(n_tokens, 8) / 8), PRODUCT_THREADS, 0}, y, x,
                  (const uint4 *)w->data, (int)w->n_out, (int)w->n_in, (int)padded_columns(w->n_in), (int)n_tokens);
}

static size_t small_shared(const product_args &p, int units, int slots) {
    size_t columns = (size_t)p.columns;
    return columns * 16 * units + columns * 2 * slots + columns / SLICE * 8 * units * slots * sizeof(float);
}

template <enum product_mode MODE, bool NORM, int NT>
static void launch_packed(const struct op_ctx *ctx, const char *what, const product_args &p, size_t blocks) {
    size_t tokens = round_up((size_t)p.n_tokens, NT * 8);
    __nv_bfloat16 *packed = (__nv_bfloat16 *)ctx->scratch;
    launch_kernel(cuda_of(ctx), what, k_pack_inputs<NORM>, {grid_for(tokens), PRODUCT_THREADS, 0}, p, packed);
    launch_kernel(cuda_of(ctx), what, k_packed<MODE, NT>,
                  {grid_for(blocks, tokens / (NT * 8)), PRODUCT_THREADS, WARPS * 16 * NT * 8 * sizeof(float)}, p,
                  (const uint4 *)packed);
}

// `rows`: of all results (GATE_UP: of one of the two).
template <enum product_mode MODE, bool NORM>
static void product(const struct op_ctx *ctx, const char *what, const product_args &p, size_t rows) {
    constexpr int UNITS = MODE == PRODUCT_RESIDUAL ? 1 : 2,
                  PER_BLOCK = MODE == PRODUCT_QKV || MODE == PRODUCT_PLAIN ? 16 : 8;
    int slots = p.n_tokens <= 1 ? 1 : p.n_tokens <= 2 ? 2 : p.n_tokens <= 4 ? 4 : 8;
    size_t shared = small_shared(p, UNITS, slots);
    if (p.n_tokens <= SMALL_TOKENS && shared <= MAX_SHARED) {
        launch_kernel(cuda_of(ctx), what, k_small<MODE, NORM>,
                      {grid_for(round_up(rows, PER_BLOCK) / PER_BLOCK), PRODUCT_THREADS, shared}, p, slots);
        return;
    }
    size_t blocks = MODE == PRODUCT_GATE_UP ? round_up(rows, 8) / 8 : round_up(rows, 16) / 16;
    if (p.n_tokens <= 16) launch_packed<MODE, NORM, 2>(ctx, what, p, blocks);
    else if (p.n_tokens <= 32) launch_packed<MODE, NORM, 4>(ctx, what, p, blocks);
    else launch_packed<MODE, NORM, 8>(ctx, what, p, blocks);
}

static product_args args_for(const struct matrix *w, size_t n_tokens, const float *x) {
    product_args p = {};
    p.w[0] = (const uint4 *)w->data;
    p.n_out[0] = (int)w->n_out;
    p.n_pairs[0] = (int)(round_up(w->n_out, 16) / 16);
    p.n_in = (int)w->n_in;
    p.columns = (int)padded_columns(w->n_in);
    p.n_tokens = (int)n_tokens;
    p.x = x;
    return p;
}

static void add_segment(product_args *p, int i, const struct matrix *w, float *y, const float *b) {
    p->w[i] = (const uint4 *)w->data;
    p->n_out[i] = (int)w->n_out;
    p->n_pairs[i] = (int)(round_up(w->n_out, 16) / 16);
    p->y[i] = y;
    p->b[i] = b;
}

static void norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    product_args p = args_for(a->wq, a->n_tokens, a->x);
    add_segment(&p, 0, a->wq, a->q, a->bq);
    add_segment(&p, 1, a->wk, a->k, a->bk);
    add_segment(&p, 2, a->wv, a->v, a->bv);
    p.norm = a->norm;
    p.eps = a->eps;
    product<PRODUCT_QKV, true>(ctx, "norm_qkv", p, 16 * (size_t)(p.n_pairs[0] + p.n_pairs[1] + p.n_pairs[2]));
}

static void residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    product_args p = args_for(a->w, a->n_tokens, a->in);
    p.y[0] = a->x;
    product<PRODUCT_RESIDUAL, false>(ctx, "residual", p, a->w->n_out);
}

static void norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    product_args p = args_for(a->w_gate, a->n_tokens, a->x);
    add_segment(&p, 1, a->w_up, NULL, NULL);
    p.y[0] = a->act;
    p.norm = a->norm;
    p.eps = a->eps;
    product<PRODUCT_GATE_UP, true>(ctx, "norm_gate_up", p, a->w_gate->n_out);
}

static void norm_head(const struct op_ctx *ctx, const struct norm_head_args *a) {
    product_args p = args_for(a->head, a->batch->n_logit_rows, a->x);
    p.y[0] = a->logits;
    p.norm = a->norm;
    p.eps = a->eps;
    p.rows = a->batch->logit_rows;
    product<PRODUCT_PLAIN, true>(ctx, "norm_head", p, a->head->n_out);
}

// The packed inputs of the widest product.
static bool scratch_floats(const struct ops *ops, const struct ops_limits *l, size_t *out) {
    size_t packed = round_up(l->max_tokens, 128) * padded_columns(l->max_width) / 2;
    size_t split = cuda_split_floats(ops, l);
    *out = packed > split ? packed : split;
    return true;
}

template <enum product_mode MODE, bool NORM> static void allow_shared(struct cuda_state *s) {
    cuda_check(s, cudaFuncSetAttribute(k_small<MODE, NORM>, cudaFuncAttributeMaxDynamicSharedMemorySize, MAX_SHARED),
               "preparing products");
}

extern "C" bool cuda_products_setup(struct cuda_state *s) {
    allow_shared<PRODUCT_QKV, true>(s);
    allow_shared<PRODUCT_RESIDUAL, false>(s);
    allow_shared<PRODUCT_GATE_UP, true>(s);
    allow_shared<PRODUCT_PLAIN, true>(s);
    return s->failed == cudaSuccess;
}

extern "C" void cuda_fill_products(struct ops *ops) {
    ops->matmul = matmul;
    ops->norm_qkv = norm_qkv;
    ops->out_residual = residual;
    ops->down_residual = residual;
    ops->norm_gate_up = norm_gate_up;
    ops->norm_head = norm_head;
    ops->scratch_floats = scratch_floats;
}
