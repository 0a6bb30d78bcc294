// parts.cu: what products in parts leave behind (groups.cu): each slice's sums of a product that adds to the residual
// stream lie in memory, apart, [slices, n_tokens, n_out]. They are added to it, in ascending order, by whoever reads it
// next: with the norm and the rounding of the next product's inputs, if that is next; else alone. So such a product's
// slices can be multiplied by all SMs at once, and the bits are those of every other kernel.
#include "ops/cuda/common.cuh"
#include "ops/cuda/packed.cuh"
#include "ops/cuda/products.cuh"

enum {
    PARTS_AT_ONCE = 24, // of a thread's four columns, asked for before the first is added
    PARTS_HELD = 2,     // of a thread's columns, in fours, kept for the norm
};

struct parts_args {
    float *x; // [n_tokens, n_out]
    const float *parts;
    int n_out, n_parts, n_tokens;
};

// Columns k .. k + 3 of a token, with the parts.
static __device__ __forceinline__ float4 add_parts(const parts_args &q, int token, int k) {
    size_t at = (size_t)token * (size_t)q.n_out + (size_t)k, step = (size_t)q.n_tokens * (size_t)q.n_out;
    float4 before = *reinterpret_cast<const float4 *>(q.x + at), sum = make_float4(-0.0f, -0.0f, -0.0f, -0.0f);
    for (int first = 0; first < q.n_parts; first += PARTS_AT_ONCE) {
        float4 v[PARTS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; i++)
            if (first + i < q.n_parts)
                v[i] = __ldcg(reinterpret_cast<const float4 *>(q.parts + at + (size_t)(first + i) * step));
#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; i++)
            if (first + i < q.n_parts)
                sum = make_float4(sum.x + v[i].x, sum.y + v[i].y, sum.z + v[i].z, sum.w + v[i].w);
    }
    return make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
}

// A block a token.
static __global__ void k_add_parts(parts_args q) {
    dependents_may_start();
    dependency_wait();
    int token = (int)blockIdx.x;
    for (int k = 4 * (int)threadIdx.x; k < q.n_out; k += 4 * NORM_THREADS)
        *reinterpret_cast<float4 *>(q.x + (size_t)token * (size_t)q.n_out + k) = add_parts(q, token, k);
}

// A block a token: also normed, rounded and packed; columns up to a whole slice become zero. At most PARTS_HELD * 1,024
// columns.
static __global__ void __launch_bounds__(NORM_THREADS)
    k_add_and_pack(parts_args q, product_args p, unsigned char *packed, int token_units) {
    __shared__ float sums[NORM_WARPS];
    int token = (int)blockIdx.x, thread = (int)threadIdx.x;
    dependents_may_start();
    float4 n[PARTS_HELD], v[PARTS_HELD];
#pragma unroll
    for (int i = 0; i < PARTS_HELD; i++) n[i] = load4(p.norm, 4 * (thread + i * NORM_THREADS), p.n_in);
    dependency_wait();
    float s = 0; // as norm_partial
#pragma unroll
    for (int i = 0; i < PARTS_HELD; i++) {
        int k = 4 * (thread + i * NORM_THREADS);
        v[i] = make_float4(0, 0, 0, 0);
        if (k >= p.n_in) continue;
        v[i] = add_parts(q, token, k);
        *reinterpret_cast<float4 *>(q.x + (size_t)token * (size_t)q.n_out + k) = v[i];
        s = fmaf(v[i].x, v[i].x, s);
        s = fmaf(v[i].y, v[i].y, s);
        s = fmaf(v[i].z, v[i].z, s);
        s = fmaf(v[i].w, v[i].w, s);
    }
    s = warp_sum(s);
    if (thread % 32 == 0) sums[thread / 32] = s;
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
    if (!s->pending.x) return;
    parts_args q = take_parts(s);
    launch_kernel(s, "adding parts", k_add_parts, {grid_for((size_t)q.n_tokens), NORM_THREADS, 0}, q);
}

bool cuda_add_and_pack(struct cuda_state *s, const char *what, const product_args &p, unsigned char *packed,
                       int token_units) {
    if (!s->pending.x || s->pending.x != p.x || s->pending.n_tokens != p.n_tokens || s->pending.n_out != p.n_in ||
        p.rows || p.columns > PARTS_HELD * 4 * NORM_THREADS)
        return false;
    parts_args q = take_parts(s);
    launch_kernel(s, what, k_add_and_pack, {grid_for((size_t)q.n_tokens), NORM_THREADS, 0}, q, p, packed, token_units);
    return true;
}
