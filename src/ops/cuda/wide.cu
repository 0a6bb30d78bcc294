// wide.cu: attention of prompts. A block of threads takes up to 128 rows of one KV head, 16 a warp (64 tokens where two
// query heads share it), and every page that it loads serves all of them. The arithmetic is attention.cuh's: a row's
// bits are those of the other kernels.
//
// A warp goes from page to page by itself: scores, softmax, values, and what it has so far is weighted anew only where
// a row's maximum has grown. Pages come in groups; while one group is used, the next one is on its way.
#include "ops/cuda/attention.cuh"

enum {
    FROM_TOKENS = 32, // a sequence, on average: fewer leave warps without rows
    GROUP = 4,        // pages
};
static_assert(ATTN_WARPS == 2 * GROUP, "two warps a page of a group");

template <typename KV> struct wide_shared {
    alignas(16) unsigned char k[2 * GROUP][KV::BYTES], v[2 * GROUP][KV::BYTES];
    float4 sum[ATTN_WARPS][KV::HD / 8][32];
    uint64_t k_arrived[2 * GROUP], v_arrived[2 * GROUP];
};

// A warp's 16 rows, and its lane's two of them: g and g + 8.
struct warp_rows {
    int token, n_tokens; // the first, and how many; 0: the warp has no rows
    int position[2];     // of the lane's rows; -1: no such row
    int last_page;       // that any of its rows sees; -1: none
};

// Which sequence's tokens this block takes: tiles are counted through the sequences, the last ones first, since they
// see most pages, of all heads side by side. Returns the sequence and sets `token` to the first of at most `size`.
static __device__ __forceinline__ int find_tile(const batch_view &b, int size, int &token) {
    int tile = (int)(gridDim.y - 1 - blockIdx.y), start = 0;
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

// One warp's page of a kind into shared memory.
template <typename KV>
static __device__ __forceinline__ void load_page(wide_shared<KV> *sh, const attention_params &p, bool of_v, int kv_head,
                                                 int page, int slot, int lane) {
    const unsigned char *from = head_page(p.kv, of_v, page, kv_head);
    unsigned char *to = of_v ? sh->v[slot] : sh->k[slot];
#if HOPPER
    if (lane != 0) return;
    uint64_t *bar = of_v ? &sh->v_arrived[slot] : &sh->k_arrived[slot];
    barrier_expect(bar, KV::BYTES);
    bulk_copy(to, from, KV::BYTES, bar);
#else
    for (int i = lane; i < KV::BYTES / 16; i += 32)
        reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(from)[i];
#endif
}

// A lane's share of its warp's rows of q as scores takes them, rounded in two parts.
template <int HD> struct wide_q {
    uint32_t high[HD / 32][8], low[HD / 32][8];

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
                uint32_t pair = pack_bf16(v.x, v.y);
                high[e / 4][e % 4 * 2 + half] = pair;
                low[e / 4][e % 4 * 2 + half] = pack_bf16(v.x - bf16_low(pair), v.y - bf16_high(pair));
            }
        }
    }
};

// scores of attention.cuh, with q in registers.
template <typename KV>
static __device__ __forceinline__ void wide_scores(float (&s)[4][4], const wide_q<KV::HD> &q, const unsigned char *page,
                                                   float scale, int lane) {
    float low[4][4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = 0;
#pragma unroll
    for (int i = 0; i < KV::HD / 32; i++) {
        const uint32_t(&h)[8] = q.high[i], (&l)[8] = q.low[i];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 k = page_reader<KV>::k(page, j, i, lane);
            mma(s[j], h[0], h[1], h[2], h[3], k.x, k.y);
            mma(low[j], l[0], l[1], l[2], l[3], k.x, k.y);
            mma(s[j], h[4], h[5], h[6], h[7], k.z, k.w);
            mma(low[j], l[4], l[5], l[6], l[7], k.z, k.w);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = (s[j][e] + low[j][e]) * scale;
}

// A warp's two rows a lane: what a chunk has so far, and, in shared memory, what the chunks before have: a float4 for
// every 8 channels and lane.
template <int HD> struct wide_sums {
    chain chunk[2], all[2];
    float of[HD / 8][4];
    float4 *sum; // [HD / 8][32], the lane's first

    __device__ __forceinline__ void next_chunk() {
        chunk[0] = chunk[1] = CHAIN_START;
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) of[i][e] = 0;
    }

    __device__ __forceinline__ void start(float4 *room) {
        all[0] = all[1] = CHAIN_START;
        sum = room;
#pragma unroll
        for (int i = 0; i < HD / 8; i++) sum[i * 32] = make_float4(0, 0, 0, 0);
        next_chunk();
    }

    // The chunk has ended: joins those before it, in the rows that see any of it.
    __device__ __forceinline__ void end_chunk(const int (&position)[2], int first) {
        float a[2] = {1, 1}, c[2];
        bool sees[2] = {position[0] >= first, position[1] >= first};
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (sees[half]) chain_add(all[half], chunk[half].m, chunk[half].l, a[half], c[half]);
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
            float4 v = sum[i * 32];
            if (sees[0]) {
                v.x = chain_value(v.x, a[0], of[i][0], c[0]);
                v.y = chain_value(v.y, a[0], of[i][1], c[0]);
            }
            if (sees[1]) {
                v.z = chain_value(v.z, a[1], of[i][2], c[1]);
                v.w = chain_value(v.w, a[1], of[i][3], c[1]);
            }
            sum[i * 32] = v;
        }
        next_chunk();
    }
};

// A warp's rows and one page, of which n slots are in use.
template <typename KV>
static __device__ __forceinline__ void wide_page(wide_sums<KV::HD> &sums, wide_shared<KV> *sh, const wide_q<KV::HD> &q,
                                                 const warp_rows &rows, int page, int n, int at, uint32_t parity,
                                                 float scale, int lane) {
    constexpr int HD = KV::HD;
    float s[4][4], a[2], c[2];
    uint32_t pairs[2][4];
    barrier_wait(&sh->k_arrived[at], parity);
    wide_scores<KV>(s, q, sh->k[at], scale, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m, l;
        softmax_row(pairs[half], m, l, s, half, rows.position[half] + 1 - page * ATTN_BLOCK, lane % 4);
        chain_add(sums.chunk[half], m, l, a[half], c[half]);
    }
    if (a[0] != 1.0f || a[1] != 1.0f) {
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums.of[i][e] *= a[e / 2];
    }
    __syncwarp();
    barrier_wait(&sh->v_arrived[at], parity);
    auto add = [&](int i, const float(&d)[4]) {
#pragma unroll
        for (int e = 0; e < 4; e++) sums.of[i][e] = fmaf(d[e], c[e / 2], sums.of[i][e]); // chain_value
    };
    if (n < ATTN_BLOCK) page_values<KV, true>(sh->v[at], pairs, slots_in_use(n, -1, lane % 4), NULL, lane, add);
    else page_values<KV, false>(sh->v[at], pairs, {}, NULL, lane, add);
}

template <typename KV> static __global__ void __launch_bounds__(ATTN_THREADS, 1) k_wide_attention(attention_params p) {
    DYNAMIC_SHARED(raw);
    constexpr int HD = KV::HD;
    wide_shared<KV> *sh = reinterpret_cast<wide_shared<KV> *>(raw);
    int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    int kv_head = (int)blockIdx.x, group = p.n_heads / p.kv.n_kv_heads, token;
    dependents_may_start();
    if (HOPPER && lane == 0) {
        barrier_init(&sh->k_arrived[warp]);
        barrier_init(&sh->v_arrived[warp]);
        barrier_fence();
    }
    __syncwarp();
    dependency_wait();
    int seq = find_tile(p.b, p.tile_tokens * ATTN_WARPS, token), seq_end = p.b.seq_start[seq + 1];
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
    if (warp <= last_page) {
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
                          p.scale, lane);
            if (page % CHUNK_PAGES == CHUNK_PAGES - 1 || page == rows.last_page)
                sums.end_chunk(rows.position, page / CHUNK_PAGES * ATTN_CHUNK);
        }
        __syncthreads(); // the group has been read
        // Half of the warps ask for K, the others for V.
        int next = (i + 2) * GROUP + warp % GROUP;
        if (next <= last_page) load_page<KV>(sh, p, warp >= GROUP, kv_head, pages[next], next % (2 * GROUP), lane);
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
            *reinterpret_cast<float2 *>(out + i * 8) = x;
            if (p.packed)
                *reinterpret_cast<uint32_t *>(p.packed + packed_at(to, first + i * 8, p.token_units)) =
                    pack_bf16(x.x, x.y);
        }
    }
}

// ---- Launcher
// ------------------------------------------------------------------------------------------------------------

template <typename KV> static void launch(struct cuda_state *s, const attention_params &p, size_t tiles) {
    launch_kernel(s, "wide attention", k_wide_attention<KV>,
                  {grid_for((size_t)p.kv.n_kv_heads, tiles), ATTN_THREADS, sizeof(wide_shared<KV>)}, p);
}

bool cuda_wide_attention(struct cuda_state *s, const attention_params &p, const struct batch *host, int head_dim) {
    if (!(s->device.variants & VARIANT_WIDE_ATTENTION) || host->n_tokens < FROM_TOKENS * host->n_seqs) return false;
    size_t size = (size_t)p.tile_tokens * ATTN_WARPS, tiles = 0;
    for (size_t i = 0; i < host->n_seqs; i++)
        tiles += ((size_t)(host->seq_start[i + 1] - host->seq_start[i]) + size - 1) / size;
#define LAUNCH(KV) launch<KV>(s, p, tiles)
    BY_KV(p.kv.is_fp8, head_dim, LAUNCH);
    return true;
}

template <typename KV> static void allow(struct cuda_state *s) {
    cuda_check(s,
               cudaFuncSetAttribute(k_wide_attention<KV>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)sizeof(wide_shared<KV>)),
               "preparing attention");
}

extern "C" bool cuda_wide_setup(struct cuda_state *s) {
    allow<bf16_kv<32>>(s);
    allow<fp8_kv<32>>(s);
    allow<bf16_kv<64>>(s);
    allow<fp8_kv<64>>(s);
    allow<bf16_kv<96>>(s);
    allow<fp8_kv<96>>(s);
    allow<bf16_kv<128>>(s);
    allow<fp8_kv<128>>(s);
    return s->failed == cudaSuccess;
}
