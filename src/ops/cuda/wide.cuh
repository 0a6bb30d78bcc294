// wide.cuh: what the kernels of prompts' attention (wide.cu, group_attention.cu) have in common: a block's tile of
// rows, a warp's share of q, and what its rows have so far.
#ifndef TANDEM_OPS_CUDA_WIDE_CUH
#define TANDEM_OPS_CUDA_WIDE_CUH

#include "ops/cuda/attention.cuh"

// A warp's 16 rows, and its lane's two of them: g and g + 8.
struct warp_rows {
    int token, n_tokens; // the first, and how many; 0: the warp has no rows
    int position[2];     // of the lane's rows; -1: no such row
    int last_page;       // that any of its rows sees; -1: none
};

// Which sequence's tokens tile `tile` has: tiles are counted through the sequences; the last ones are taken first,
// since they see most pages, of all heads side by side. Returns the sequence and sets `token` to the first of at most
// `size`.
static __device__ __forceinline__ int find_tile(const batch_view &b, int size, int tile, int &token) {
    int start = b.seq_start[0];
    for (int seq = 0;; seq++) {
        int end = b.seq_start[seq + 1], n = (end - start + size - 1) / size;
        if (tile < n) {
            token = start + tile * size;
            return seq;
        }
        tile -= n;
        start = end;
    }
}

// A lane's share of its warp's rows of q as scores takes them: times attention's scale, rounded.
template <int HD> struct wide_q {
    uint32_t of[HD / 32][8];

    __device__ __forceinline__ void load(const attention_params &p, const warp_rows &rows, int kv_head, int lane) {
        int group = p.n_heads / p.kv.n_kv_heads, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = g + 8 * half;
            const float *x =
                p.q + ((size_t)(rows.token + row / group) * p.n_heads + (size_t)kv_head * group + row % group) * HD;
#pragma unroll
            for (int e = 0; e < HD / 8; e++) {
                float2 v = make_float2(0, 0);
                if (rows.position[half] >= 0) v = *reinterpret_cast<const float2 *>(x + e * 8 + 2 * t);
                of[e / 4][e % 4 * 2 + half] = pack_bf16(v.x * p.scale, v.y * p.scale);
            }
        }
    }
};

// A warp's two rows a lane: what a chunk has so far, and, in shared memory, what the chunks before have: a float4 for
// every 8 channels and lane.
template <int HD> struct wide_sums {
    chunk_chain<HD / 8, false> chunk; // l[0] and l[2] are its rows' sums
    chain all[2];
    float4 *sum; // [HD / 8][32], the lane's first

    __device__ __forceinline__ void start(float4 *room) {
        all[0] = all[1] = CHAIN_START;
        sum = room;
#pragma unroll
        for (int i = 0; i < HD / 8; i++) sum[i * 32] = make_float4(0, 0, 0, 0);
        chunk.start();
    }

    // The chunk has ended: joins those before it, in the rows that see any of it.
    __device__ __forceinline__ void end_chunk(const int (&position)[2], int first) {
        float a[2] = {1, 1}, c[2];
        bool sees[2] = {position[0] >= first, position[1] >= first};
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (sees[half]) chain_add(all[half], chunk.unit[half], chunk.l[2 * half], a[half], c[half]);
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
            float4 v = sum[i * 32];
            if (sees[0]) {
                v.x = chain_value(v.x, a[0], chunk.of[i][0], c[0]);
                v.y = chain_value(v.y, a[0], chunk.of[i][1], c[0]);
            }
            if (sees[1]) {
                v.z = chain_value(v.z, a[1], chunk.of[i][2], c[1]);
                v.w = chain_value(v.w, a[1], chunk.of[i][3], c[1]);
            }
            sum[i * 32] = v;
        }
        chunk.start();
    }
};

// Whether prompts of this batch are for wide.cu; and whether group_attention.cu has them.
bool cuda_wide_takes(const struct cuda_state *s, const struct batch *host, size_t n_single);
bool cuda_group_attention_takes(const struct cuda_state *s, size_t head_dim);
// The norm, rotation and store of k and v alone, where attention norms and rotates q (pointwise.cu). False: too few
// tokens for it.
bool cuda_store_kv(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a);
// Its part for bf16: pages.cu. False: also for eight bits.
bool cuda_store_pages(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a);

#endif
