// products.cuh: what all kernels of products share: arguments, how weights are read, how inputs are staged, and what
// becomes of a sum.
//
// An output element is the sum over slices of 128 columns, in ascending order. A slice's own sum is the weights'
// business (their `slice`): of bf16 it is a chain of eight matrix instructions of 16 columns each, from +0; of
// quantised weights see quantised.cuh. That order is the same in every kernel and for every number of tokens, so that
// all kernels return the same bits (docs/NUMERICS.md).
#ifndef TANDEM_OPS_CUDA_PRODUCTS_CUH
#define TANDEM_OPS_CUDA_PRODUCTS_CUH

#include "ops/cuda/common.cuh"
#include "ops/cuda/kv.cuh"
#include "ops/cuda/matrix.cuh"

enum product_mode {
    PRODUCT_PLAIN,    // y = W x
    PRODUCT_QKV,      // three matrices, each with its y and perhaps a bias
    PRODUCT_RESIDUAL, // y += W x
    PRODUCT_GATE_UP,  // y = silu(W0 x) * (W1 x)
};

enum { PRODUCT_THREADS = 256, WARPS = PRODUCT_THREADS / 32, MAX_SHARED = SM_SHARED - 1024 };
enum { COPY_THREADS = HOPPER ? 1 : (int)PRODUCT_THREADS }; // of a block that ask for its copies

struct product_args {
    const unsigned char *w[3]; // units of 8 rows, each a record for every slice
    float *y[3];               // [n_tokens, n_out]
    const float *b[3];         // [n_out] or NULL
    int n_out[3], n_pairs[3];
    int n_in, columns; // columns: padded to whole slices
    int n_tokens;
    const float *x;      // [n_tokens, n_in], or the rows of it that `rows` names
    const int32_t *rows; // [n_tokens] or NULL
    const float *norm;   // [n_in]
    float eps;
    unsigned long long *best; // PLAIN, one token: the best row's key (choice.cuh) is told here; or NULL
    bool packed_only;         // GATE_UP: y need not be written where the next product reads it packed (packed.cuh)
    const heads_end *heads;   // QKV, for launchers: k and v need not be written if they are stored at once; or NULL
};

static __device__ __forceinline__ const float *input_row(const product_args &p, int i) {
    return p.x + (size_t)(p.rows ? p.rows[i] : i) * p.n_in;
}

// ---- Weights ------------------------------------------------------------------------------------------------------

// A kind of weights has a RECORD, the bytes of 8 rows by a slice of columns, says whether it is RARE (then fewer
// kernels are made for it), and has
//   slice<MT, NT, PAIRED>(d, lane, record, input)
// which sets d[i][j] to the slice's sums of pair i of units and 8 tokens j, in mma's order: unit 2 i is rows 0 to 7 and
// unit 2 i + 1 rows 8 to 15 (zeros unless PAIRED), record(u) is where unit u's record stands, and input(j, c) is this
// lane's share of the slice's columns 32 c to 32 c + 31 of the tokens.
struct bf16_weights {
    static constexpr int RECORD = SLICE * 16;
    static constexpr bool RARE = false;

    template <int MT, int NT, bool PAIRED, typename RECORDS, typename INPUT>
    static __device__ __forceinline__ void slice(float (&d)[MT][NT][4], int lane, RECORDS record, INPUT input) {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) d[i][j][e] = 0;
#pragma unroll
        for (int c = 0; c < SLICE / 32; c++) {
            uint4 x[NT];
#pragma unroll
            for (int j = 0; j < NT; j++) x[j] = input(j, c);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                int at = (c * CHUNK_LANES + lane) * 16;
                uint4 u = *reinterpret_cast<const uint4 *>(record(2 * i) + at), v = make_uint4(0, 0, 0, 0);
                if (PAIRED) v = *reinterpret_cast<const uint4 *>(record(2 * i + 1) + at);
#pragma unroll
                for (int j = 0; j < NT; j++) mma(d[i][j], u.x, v.x, u.y, v.y, x[j].x, x[j].y);
#pragma unroll
                for (int j = 0; j < NT; j++) mma(d[i][j], u.z, v.z, u.w, v.w, x[j].z, x[j].w);
            }
        }
    }
};

// The unit that stands at place `odd` of a pair: a pair is two units of one matrix, or (GATE_UP) a unit of gate and the
// same one of up.
template <typename W, enum product_mode MODE>
static __device__ __forceinline__ const unsigned char *pair_unit(const product_args &p, int pair, int odd) {
    size_t unit = (size_t)(p.columns / SLICE) * W::RECORD;
    if (MODE == PRODUCT_GATE_UP) return p.w[odd] + (size_t)min(pair, (p.n_out[0] + 7) / 8 - 1) * unit;
    int segment = 0;
    while (segment < (MODE == PRODUCT_QKV ? 2 : 0) && pair >= p.n_pairs[segment]) pair -= p.n_pairs[segment++];
    return p.w[segment] + (size_t)(min(pair, p.n_pairs[segment] - 1) * 2 + odd) * unit;
}

// ---- Inputs -------------------------------------------------------------------------------------------------------

// Where the shares of columns k .. k + 3 of a token stand in shared memory, and their rounding: 32 columns of a token
// are 64 bytes, in the order of matrix.cuh.
static __device__ __forceinline__ void put_inputs(unsigned char *acts, int k, int slots, int token, float4 v) {
    unsigned char *at = acts + (k / 32 * slots + token) * 64 + k % 8 / 2 * 16 + k % 32 / 8 * 4;
    *reinterpret_cast<uint32_t *>(at) = pack_bf16(v.x, v.y);
    *reinterpret_cast<uint32_t *>(at + 16) = pack_bf16(v.z, v.w);
}

static __device__ __forceinline__ float4 load4(const float *x, int k, int n) {
    return k < n ? *reinterpret_cast<const float4 *>(x + k) : make_float4(0, 0, 0, 0);
}

static __device__ __forceinline__ float4 scale4(float4 v, float r, float4 n) {
    return make_float4(v.x * r * n.x, v.y * r * n.y, v.z * r * n.z, v.w * r * n.w);
}

enum { HELD = 4, HELD_COLUMNS = HELD * 4 * PRODUCT_THREADS }; // of a single token's inputs, in registers

// One token's inputs of at most HELD_COLUMNS columns: read once. The norm's weights are asked for before the kernel
// before has ended.
template <bool NORM>
static __device__ __forceinline__ void stage_one(const product_args &p, unsigned char *acts, float *sums) {
    int thread = (int)threadIdx.x;
    float4 w[HELD], v[HELD];
#pragma unroll
    for (int i = 0; NORM && i < HELD; i++) w[i] = load4(p.norm, 4 * thread + i * 4 * PRODUCT_THREADS, p.n_in);
    dependency_wait();
    const float *x = input_row(p, 0);
#pragma unroll
    for (int i = 0; i < HELD; i++) v[i] = load4(x, 4 * thread + i * 4 * PRODUCT_THREADS, p.n_in);
    float r = 1.0f;
    if (NORM) {
        float s = 0; // as norm_partial
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (4 * thread + i * 4 * PRODUCT_THREADS >= p.n_in) break;
            s = fmaf(v[i].x, v[i].x, s);
            s = fmaf(v[i].y, v[i].y, s);
            s = fmaf(v[i].z, v[i].z, s);
            s = fmaf(v[i].w, v[i].w, s);
        }
        s = warp_sum(s);
        if (thread % 32 == 0) sums[thread / 32] = s;
        __syncthreads();
        r = norm_rate(sums, p.n_in, p.eps);
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int k = 4 * thread + i * 4 * PRODUCT_THREADS;
        if (k < p.columns) put_inputs(acts, k, 1, 0, NORM ? scale4(v[i], r, w[i]) : v[i]);
    }
}

// Several tokens' inputs, or long ones.
template <bool NORM, int SLOTS>
static __device__ __forceinline__ void stage_some(const product_args &p, unsigned char *acts, float *sums) {
    int thread = (int)threadIdx.x;
    dependency_wait();
    if (NORM) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            float s = i < p.n_tokens ? norm_partial(input_row(p, i), p.n_in, thread) : 0.0f;
            if (thread % 32 == 0) sums[i * NORM_WARPS + thread / 32] = s;
        }
        __syncthreads();
    }
    for (int k = 4 * thread; k < p.columns; k += 4 * PRODUCT_THREADS) {
        float4 n = NORM ? load4(p.norm, k, p.n_in) : make_float4(0, 0, 0, 0), v[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; i++)
            v[i] = i < p.n_tokens ? load4(input_row(p, i), k, p.n_in) : make_float4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            if (NORM) v[i] = scale4(v[i], norm_rate(sums + i * NORM_WARPS, p.n_in, p.eps), n);
            put_inputs(acts, k, SLOTS, i, v[i]);
        }
    }
}

// ---- Results ------------------------------------------------------------------------------------------------------

// What happens to a finished sum of one row and token.
template <enum product_mode MODE>
static __device__ __forceinline__ void finish(const product_args &p, int segment, int row, int token, float sum) {
    if (row >= p.n_out[segment] || token >= p.n_tokens) return;
    float *at = p.y[segment] + (size_t)token * p.n_out[segment] + row;
    if (MODE == PRODUCT_RESIDUAL) *at += sum;
    else *at = p.b[segment] ? sum + p.b[segment][row] : sum;
}

// ---- For launchers ------------------------------------------------------------------------------------------------

static inline size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

// Products with quantised weights: of the standard path, and fused (`pairs` of units, of GATE_UP's two matrices as
// one).
void quantised_matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens);
void quantised_product(const struct op_ctx *ctx, const char *what, const product_args &p, enum product_mode mode,
                       enum dtype type, size_t pairs);

// Whether what follows at once takes k and v of these tokens from their pages alone, but for some; sets `end` to how
// they get there.
bool cuda_heads_end(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a, heads_end *end);

// Whether such a product of the residual stream is one for clusters (clusters.cuh).
bool quantised_may_share(const struct cuda_state *s, const struct matrix *w, size_t n_tokens);

// Products by warp groups (groups.cu): of `pairs` pairs of units. False: they are not in use.
bool cuda_group_product(const struct op_ctx *ctx, const char *what, enum product_mode mode, const product_args &p,
                        enum dtype type, size_t pairs);
bool cuda_group_has(const struct cuda_state *s, enum dtype type);
// Whether so few tokens' products norm and round their inputs themselves (small.cuh): up to SMALL_TOKENS, but fewer
// where warp groups are faster (docs/SPEED.md).
static inline bool is_small(const struct cuda_state *s, size_t n_tokens, enum dtype type) {
    size_t most = type == DTYPE_BF16 ? 3 : type == DTYPE_Q8_0 || type == DTYPE_Q4_0 ? 5 : (size_t)SMALL_TOKENS;
    return n_tokens <= (HOPPER && cuda_group_has(s, type) ? most : (size_t)SMALL_TOKENS);
}
// Whether out_residual or down_residual (`op`) of that many tokens with `w` reads its input packed, and nothing else
// reads it. `w` may be NULL.
bool cuda_reads_packed(const struct op_ctx *ctx, enum fused_op op, const struct matrix *w, size_t n_tokens);
size_t cuda_group_floats(const struct ops_limits *limits);
// Whether such a product that adds to the residual stream is done in parts.
bool cuda_in_parts(const struct op_ctx *ctx, const product_args &p, enum dtype type);
// Adds what is pending to x, which is `p`'s input, and norms and packs it; false: it is not.
bool cuda_add_and_pack(struct cuda_state *s, const char *what, const product_args &p, unsigned char *packed,
                       int token_units);

// Floats of scratch that attention's partial results take.
size_t cuda_split_floats(const struct ops *ops, const struct ops_limits *limits);

#endif
