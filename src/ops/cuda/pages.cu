// pages.cu: K's norm and rotation, and the places of K and V, for the many tokens of prompts: bf16 pages are written 16
// bytes a lane, eight tokens' 32 channels at once. Formulas: ops.h; order of a norm's sum: kv.cuh.
#include "ops/cuda/keys.cuh"
#include "ops/cuda/wide.cuh"

enum {
    PAGES_THREADS = 128,
    PAGES_WARPS = PAGES_THREADS / 32,
    HEADS_IN_TURN = 2, // of K, for which a warp keeps its tokens' cosines
    V_TOKENS = 32,     // of a warp
};

struct pages_args {
    kv_view kv;
    batch_view b;
    const float *k, *v; // [n_tokens, n_kv_heads, head_dim]
    const float *norm;  // [head_dim] or NULL
    const float *cos_sin;
    float eps;
    int key_blocks;
};

// ---- K: a warp has eight tokens' heads, one after the other (keys.cuh) --------------------------------------------

template <int DIM> static __device__ __forceinline__ void store_keys(const pages_args &a, int warp, int lane) {
    int n_kv = a.kv.n_kv_heads, in_turn = (n_kv + HEADS_IN_TURN - 1) / HEADS_IN_TURN, t = lane % 4;
    int first = warp / in_turn * 8, head = warp % in_turn * HEADS_IN_TURN, end = min(head + HEADS_IN_TURN, n_kv);
    if (first >= a.b.n_tokens) return;
    int token = min(first + lane / 4, a.b.n_tokens - 1);
    bool real = first + lane / 4 < a.b.n_tokens;
    const float *from = a.k + ((size_t)token * n_kv + head) * DIM + 8 * t;
    key<DIM> h, turn;
    h.load(from);
    kv_place at = place_of(a.b, token);
    turn.load(a.cos_sin + (size_t)token * DIM + 8 * t);
#pragma unroll 1
    for (; head < end; head++, from += DIM) {
        uint32_t out[DIM / 8];
        if (a.norm) normalise_key<DIM>(h, a.norm + 8 * t, a.eps);
        turn_key<DIM>(out, h, turn);
        if (head + 1 < end) h.load(from + DIM);
        if (real) store_key<DIM>(a.kv, at, head, out, t);
    }
}

// ---- V: a warp has 32 tokens' 32 channels of a head. Lane 4 g + t has tokens g, g + 8, ..., and channels 8 t to
// 8 t + 7 of the 32.
// ----------------------------------------------------------------------------------------------------------------

template <int DIM> static __device__ __forceinline__ void store_values(const pages_args &a, int warp, int lane) {
    constexpr int PARTS = DIM / 32, EACH = V_TOKENS / 8;
    int n_kv = a.kv.n_kv_heads, first = warp / (n_kv * PARTS) * V_TOKENS;
    int head = warp / PARTS % n_kv, c = warp % PARTS * 32 + lane % 4 * 8;
    if (first >= a.b.n_tokens) return;
    float4 v[EACH][2];
    kv_place at[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int token = min(first + 8 * e + lane / 4, a.b.n_tokens - 1);
        const float4 *from = reinterpret_cast<const float4 *>(a.v + ((size_t)token * n_kv + head) * DIM + c);
        v[e][0] = from[0];
        v[e][1] = from[1];
        at[e] = place_of(a.b, token);
    }
#pragma unroll
    for (int e = 0; e < EACH; e++)
        if (first + 8 * e + lane / 4 < a.b.n_tokens) kv_put_word(a.kv, true, at[e], head, c, v[e][0], v[e][1]);
}

template <int DIM> static __global__ void __launch_bounds__(PAGES_THREADS) k_store_pages(pages_args a) {
    dependents_may_start();
    dependency_wait();
    int block = (int)blockIdx.x, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    if (block < a.key_blocks) store_keys<DIM>(a, block * PAGES_WARPS + warp, lane);
    else store_values<DIM>(a, (block - a.key_blocks) * PAGES_WARPS + warp, lane);
}

// ---- Launcher -----------------------------------------------------------------------------------------------------

static size_t parts_of(size_t n, size_t size) {
    return (n + size - 1) / size;
}

bool cuda_store_pages(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a) {
    struct cuda_state *s = cuda_of(ctx);
    size_t n = a->batch->n_tokens;
    size_t keys = parts_of(parts_of(n, 8) * parts_of(a->n_kv_heads, HEADS_IN_TURN), PAGES_WARPS);
    size_t values = parts_of(parts_of(n, V_TOKENS) * a->n_kv_heads * (a->head_dim / 32), PAGES_WARPS);
    bool fills = keys + values >= 4 * (size_t)s->n_sms;
    if (!(s->device.variants & VARIANT_STORE_HEADS) || !fills || is_fp8(a->kv) ||
        (a->head_dim != 64 && a->head_dim != 128))
        return false;
    pages_args args = {view(a->kv), view(a->batch), a->k, a->v, a->k_norm, a->cos_sin, a->eps, (int)keys};
    struct launch l = {grid_for(keys + values), PAGES_THREADS, 0};
    if (a->head_dim == 64) launch_kernel(s, "qk_norm_rope_store", k_store_pages<64>, l, args);
    else launch_kernel(s, "qk_norm_rope_store", k_store_pages<128>, l, args);
    return true;
}
