// parts.cu: what products in parts leave behind (groups.cu): each slice's sums of a product that adds to the residual
// stream lie in memory, apart, [slices, n_tokens, n_out]. They are added to it, in ascending order, by whoever reads it
// next: with the norm and the rounding of the next product's inputs, if that is next; else alone. So such a product's
// slices can be multiplied by all SMs at once, and the bits are those of every other kernel.
#include "ops/cuda/common.cuh"
#include "ops/cuda/packed.cuh"
#include "ops/cuda/parts.cuh"

enum {
    PARTS_AT_ONCE = 8,         // of a thread's four columns, asked for before the first is added
    PARTS_HELD = 2,            // of a thread's columns, in fours, kept for the norm
    PARTS_SHARED = 112 * 1024, // bytes of a token's parts, beside which a next product's block has room
};

struct parts_args {
    float *x; // [n_tokens, n_out]
    const float *parts;
    int n_out, n_parts, n_tokens;
};

static __device__ __forceinline__ float4 add_four(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// A block a token.
static __global__ void k_add_parts(parts_args q) {
    dependents_may_start();
    dependency_wait();
    size_t row = (size_t)blockIdx.x * (size_t)q.n_out, step = (size_t)q.n_tokens * (size_t)q.n_out;
    for (int k = 4 * (int)threadIdx.x; k < q.n_out; k += 4 * NORM_THREADS) {
        float *x = q.x + row + k;
        float4 before = *reinterpret_cast<const float4 *>(x), sum = make_float4(-0.0f, -0.0f, -0.0f, -0.0f);
        for (int first = 0; first < q.n_parts; first += PARTS_AT_ONCE) {
            float4 v[PARTS_AT_ONCE];
#pragma unroll
            for (int i = 0; i < PARTS_AT_ONCE; i++)
                if (first + i < q.n_parts)
                    v[i] = __ldcg(reinterpret_cast<const float4 *>(q.parts + row + k + (size_t)(first + i) * step));
#pragma unroll
            for (int i = 0; i < PARTS_AT_ONCE; i++)
                if (first + i < q.n_parts) sum = add_four(sum, v[i]);
        }
        *reinterpret_cast<float4 *>(x) = add_four(before, sum);
    }
}

// A block a token, whose parts are copied into shared memory at once; also normed, rounded and packed; columns up to a
// whole slice become zero. At most PARTS_HELD * 1,024 columns.
static __global__ void __launch_bounds__(NORM_THREADS)
    k_add_and_pack(parts_args q, product_args p, unsigned char *packed, int token_units) {
    DYNAMIC_SHARED(shared); // [n_parts, n_out] floats
    __shared__ float sums[NORM_WARPS];
    __shared__ __align__(8) uint64_t arrived;
    int token = (int)blockIdx.x, thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32;
    int mine = (q.n_parts - warp + NORM_WARPS - 1) / NORM_WARPS; // parts that this warp asks for
    uint32_t bytes = (uint32_t)q.n_out * (uint32_t)sizeof(float);
    size_t row = (size_t)token * (size_t)q.n_out, step = (size_t)q.n_tokens * (size_t)q.n_out;
    if (thread == 0) {
        barrier_init_for(&arrived, NORM_WARPS);
        barrier_fence();
    }
    __syncthreads();
    dependents_may_start();
    float4 n[PARTS_HELD], v[PARTS_HELD];
#pragma unroll
    for (int i = 0; i < PARTS_HELD; i++) n[i] = load4(p.norm, 4 * (thread + i * NORM_THREADS), p.n_in);
    dependency_wait();
    if (lane == 0) barrier_expect(&arrived, (uint32_t)mine * bytes);
    __syncwarp();
    for (int i = lane; i < mine; i += 32) {
        int part = i * NORM_WARPS + warp;
        bulk_copy(shared + (size_t)part * bytes, q.parts + row + (size_t)part * step, bytes, &arrived);
    }
#pragma unroll
    for (int i = 0; i < PARTS_HELD; i++) v[i] = load4(q.x + row, 4 * (thread + i * NORM_THREADS), p.n_in);
    barrier_wait(&arrived, 0);
    float s = 0; // as norm_partial
#pragma unroll
    for (int i = 0; i < PARTS_HELD; i++) {
        int k = 4 * (thread + i * NORM_THREADS);
        if (k >= p.n_in) continue;
        const unsigned char *at = shared + (size_t)k * sizeof(float);
        float4 sum = *reinterpret_cast<const float4 *>(at);
#pragma unroll 8
        for (int part = 1; part < q.n_parts; part++)
            sum = add_four(sum, *reinterpret_cast<const float4 *>(at + (size_t)part * bytes));
        v[i] = add_four(v[i], sum);
        *reinterpret_cast<float4 *>(q.x + row + k) = v[i];
        s = fmaf(v[i].x, v[i].x, s);
        s = fmaf(v[i].y, v[i].y, s);
        s = fmaf(v[i].z, v[i].z, s);
        s = fmaf(v[i].w, v[i].w, s);
    }
    s = warp_sum(s);
    if (lane == 0) sums[warp] = s;
    __syncthreads();
    float r = norm_rate(sums, p.n_in, p.eps);
#pragma unroll
    for (int i = 0; i < PARTS_HELD; i++) {
        int k = 4 * (thread + i * NORM_THREADS);
        if (k >= p.columns) continue;
        float4 y = k < p.n_in ? scale4(v[i], r, n[i]) : v[i];
        *reinterpret_cast<uint2 *>(packed + packed_at(token, k, token_units)) =
            make_uint2(pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
    }
}

// Before launch_config sees it, who would add the parts, too.
static parts_args take_parts(struct cuda_state *s) {
    parts_args q = {s->pending.x, s->pending.parts, s->pending.n_out, s->pending.n_parts, s->pending.n_tokens};
    s->pending.x = NULL;
    return q;
}

extern "C" void cuda_add_parts(struct cuda_state *s) {
    cuda_choose_now(s);
    if (!s->pending.x) return;
    parts_args q = take_parts(s);
    launch_kernel(s, "adding parts", k_add_parts, {grid_for((size_t)q.n_tokens), NORM_THREADS, 0}, q);
}

bool cuda_add_and_pack(struct cuda_state *s, const char *what, const product_args &p, unsigned char *packed,
                       int token_units) {
    size_t shared = (size_t)s->pending.n_parts * (size_t)p.n_in * sizeof(float);
    if (!HOPPER || !s->pending.x || s->pending.x != p.x || s->pending.n_tokens != p.n_tokens || p.rows ||
        s->pending.n_out != p.n_in || p.columns > PARTS_HELD * 4 * NORM_THREADS || shared > PARTS_SHARED)
        return false;
    parts_args q = take_parts(s);
    launch_kernel(s, what, k_add_and_pack, {grid_for((size_t)q.n_tokens), NORM_THREADS, shared}, q, p, packed,
                  token_units);
    return true;
}

void cuda_parts_setup(struct cuda_state *s) {
    allow_shared(s, "preparing products", k_add_and_pack, PARTS_SHARED);
}
