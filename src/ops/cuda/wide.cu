// wide.cu: attention of prompts. A block of threads takes up to 128 rows of one KV head, 16 a warp (64 tokens where two
// query heads share it), and every page that it loads serves all of them. The arithmetic is attention.cuh's: a row's
// bits are those of the other kernels.
//
// A warp goes from page to page by itself: scores, softmax, values, and what its chunk has so far stays in the matrix
// instructions' sums, which are scaled only where a row's unit is raised. Pages come in groups; while one group is
// used, the next one is on its way.
#include "ops/cuda/wide.cuh"

enum {
    FROM_TOKENS = 32,       // a sequence, on average: fewer leave warps without rows
    GROUP = HOPPER ? 4 : 1, // pages
};
static_assert(HOPPER ? ATTN_WARPS == 2 * GROUP : ATTN_WARPS >= 2 * GROUP, "two warps a page of a group");

template <typename KV> struct wide_shared {
    alignas(64) unsigned char k[2 * GROUP][KV::BYTES], v[2 * GROUP][KV::BYTES];
    float4 sum[ATTN_WARPS][KV::HD / 8][32];
    uint64_t k_arrived[2 * GROUP], v_arrived[2 * GROUP];
};

// One warp's page of a kind into shared memory.
template <typename KV>
static __device__ __forceinline__ void load_page(wide_shared<KV> *sh, const attention_params &p, bool of_v, int kv_head,
                                                 int page, int slot, int lane) {
    const unsigned char *from = head_page(p.kv, of_v, page, kv_head);
    unsigned char *to = of_v ? sh->v[slot] : sh->k[slot];
    if (!asks(lane)) return;
    warp_copy(to, from, KV::BYTES, of_v ? &sh->v_arrived[slot] : &sh->k_arrived[slot], lane);
}

// scores of attention.cuh, with q in registers.
template <typename KV>
static __device__ __forceinline__ void wide_scores(float (&s)[4][4], const wide_q<KV::HD> &q, const unsigned char *page,
                                                   int lane) {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = 0;
#pragma unroll
    for (int i = 0; i < KV::HD / 32; i++) {
        const uint32_t(&h)[8] = q.of[i];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 k = page_reader<KV>::k(page, j, i, lane);
            mma(s[j], h[0], h[1], h[2], h[3], k.x, k.y);
            mma(s[j], h[4], h[5], h[6], h[7], k.z, k.w);
        }
    }
}

// A page's values join their chunk's. SPECIAL: some slots are not in use: a loop of its own, since a branch within
// would keep the chip from overlapping the rounds.
template <typename KV, bool SPECIAL>
static __device__ __forceinline__ void wide_values(wide_sums<KV::HD> &sums, const uint32_t (&pairs)[2][4],
                                                   const unsigned char *page, const v_slots &slots, int lane) {
#pragma unroll
    for (int i = 0; i < KV::HD / 8; i++) {
        uint4 v = page_reader<KV>::v(page, i, lane);
        if (SPECIAL) v = real_slots(v, slots, 0);
        chain_values(sums.chunk.of[i], pairs[0], pairs[1], v);
    }
}

// A warp's rows and one page, of which n slots are in use.
template <typename KV>
static __device__ __forceinline__ void wide_page(wide_sums<KV::HD> &sums, wide_shared<KV> *sh, const wide_q<KV::HD> &q,
                                                 const warp_rows &rows, int page, int n, int at, uint32_t parity,
                                                 int lane) {
    float s[4][4], m[2];
    uint32_t pairs[2][4];
    barrier_wait(&sh->k_arrived[at], parity);
    wide_scores<KV>(s, q, sh->k[at], lane);
#pragma unroll
    for (int half = 0; half < 2; half++)
        m[half] = row_unit(lift_row(s, half, rows.position[half] + 1 - page * ATTN_BLOCK, lane % 4));
    sums.chunk.raise(m);
#pragma unroll
    for (int half = 0; half < 2; half++) row_weights(pairs[half], s, half, sums.chunk.unit[half]);
    chain_sum(sums.chunk.l, pairs[0], pairs[1]);
    barrier_wait(&sh->v_arrived[at], parity);
    if (n < ATTN_BLOCK) wide_values<KV, true>(sums, pairs, sh->v[at], slots_in_use(n, -1, lane % 4), lane);
    else wide_values<KV, false>(sums, pairs, sh->v[at], {}, lane);
}

template <typename KV> static __global__ void __launch_bounds__(ATTN_THREADS, 1) k_wide_attention(attention_params p) {
    DYNAMIC_SHARED(raw);
    constexpr int HD = KV::HD;
    wide_shared<KV> *sh = reinterpret_cast<wide_shared<KV> *>(raw);
    int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    int kv_head = (int)blockIdx.x, group = p.n_heads / p.kv.n_kv_heads, token;
    dependents_may_start();
    bool loads = HOPPER || warp < 2 * GROUP;
    if (loads && lane == 0) {
        barrier_init(&sh->k_arrived[warp]);
        barrier_init(&sh->v_arrived[warp]);
        barrier_fence();
    }
    __syncwarp();
    dependency_wait();
    int tile = (int)(gridDim.y - 1 - blockIdx.y), seq = find_tile(p.b, p.tile_tokens * ATTN_WARPS, tile, token);
    int seq_end = p.b.seq_start[seq + 1];
    int end = min(token + p.tile_tokens * ATTN_WARPS, seq_end);
    int limit = p.b.position[end - 1] + 1, last_page = (limit - 1) / ATTN_BLOCK, n_groups = last_page / GROUP + 1;
    const int32_t *pages = p.b.pages + p.b.page_start[seq];
    warp_rows rows;
    rows.token = token + warp * p.tile_tokens;
    rows.n_tokens = max(0, min(p.tile_tokens, end - rows.token));
    rows.last_page = rows.n_tokens ? p.b.position[rows.token + rows.n_tokens - 1] / ATTN_BLOCK : -1;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = (g + 8 * half) / group;
        rows.position[half] = at < rows.n_tokens ? p.b.position[rows.token + at] : -1;
    }
    if (loads && warp <= last_page) {
        load_page<KV>(sh, p, false, kv_head, pages[warp], warp, lane);
        load_page<KV>(sh, p, true, kv_head, pages[warp], warp, lane);
    }
    wide_q<HD> q;
    q.load(p, rows, kv_head, lane);
    __syncthreads();

    wide_sums<HD> sums;
    sums.start(&sh->sum[warp][0][lane]);
#pragma unroll 1
    for (int i = 0; i < n_groups; i++) {
#pragma unroll 1
        for (int page = i * GROUP; page < (i + 1) * GROUP && page <= rows.last_page; page++) {
            wide_page<KV>(sums, sh, q, rows, page, limit - page * ATTN_BLOCK, page % (2 * GROUP), (uint32_t)i / 2 & 1,
                          lane);
            if (page % CHUNK_PAGES == CHUNK_PAGES - 1 || page == rows.last_page)
                sums.end_chunk(rows.position, page / CHUNK_PAGES * ATTN_CHUNK);
        }
        __syncthreads(); // the group has been read
        // GROUP warps ask for K, others for V.
        int next = (i + 2) * GROUP + warp % GROUP;
        if (loads && next <= last_page)
            load_page<KV>(sh, p, warp >= GROUP, kv_head, pages[next], next % (2 * GROUP), lane);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = g + 8 * half;
        if (rows.position[half] < 0) continue;
        int to = rows.token + row / group, first = (kv_head * group + row % group) * HD + 2 * t;
        float *out = p.out + (size_t)to * p.n_heads * HD + first;
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
            float4 v = sums.sum[i * 32];
            float l = sums.all[half].l;
            float2 x = half ? make_float2(v.z / l, v.w / l) : make_float2(v.x / l, v.y / l);
            if (p.out) *reinterpret_cast<float2 *>(out + i * 8) = x;
            if (p.packed)
                *reinterpret_cast<uint32_t *>(p.packed + packed_at(to, first + i * 8, p.token_units)) =
                    pack_bf16(x.x, x.y);
        }
    }
}

// ---- Launcher -----------------------------------------------------------------------------------------------------

template <typename KV> static void launch(struct cuda_state *s, const attention_params &p, size_t tiles) {
    launch_kernel(s, "wide attention", k_wide_attention<KV>,
                  {grid_for((size_t)p.kv.n_kv_heads, tiles), ATTN_THREADS, sizeof(wide_shared<KV>)}, p);
}

bool cuda_wide_takes(const struct cuda_state *s, const struct batch *host, size_t n_single) {
    return s->device.variants & VARIANT_WIDE_ATTENTION &&
           host->n_tokens - n_single >= FROM_TOKENS * (host->n_seqs - n_single);
}

bool cuda_wide_attention(struct cuda_state *s, attention_params p, const struct batch *host, size_t n_single,
                         int head_dim, bool packed_only) {
    if (!cuda_wide_takes(s, host, n_single)) return false;
    size_t size = (size_t)p.tile_tokens * ATTN_WARPS, tiles = 0;
    if (packed_only && p.packed) p.out = NULL;
    p.b.seq_start += n_single;
    p.b.page_start += n_single;
    p.b.n_seqs -= (int)n_single;
    for (size_t i = n_single; i < host->n_seqs; i++)
        tiles += ((size_t)(host->seq_start[i + 1] - host->seq_start[i]) + size - 1) / size;
    if (cuda_group_attention(s, p, tiles, head_dim)) return true;
#define LAUNCH(KV) launch<KV>(s, p, tiles)
    BY_KV(p.kv.is_fp8, head_dim, LAUNCH);
    return true;
}

template <typename KV> static void allow(struct cuda_state *s) {
    static_assert(sizeof(wide_shared<KV>) <= SM_SHARED, "an SM's shared memory");
    allow_shared(s, "preparing attention", k_wide_attention<KV>, sizeof(wide_shared<KV>));
}

void cuda_load_wide(struct cuda_state *s, bool is_fp8, int head_dim) {
#define ALLOW(KV) allow<KV>(s)
    BY_KV(is_fp8, head_dim, ALLOW);
}
