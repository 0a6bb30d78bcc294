// wide.cu: attention of prompts. A block of threads takes up to 128 rows of one KV head, 16 a warp (64 tokens where two
// query heads share it), and every page that it loads serves all of them. The arithmetic is attention.cuh's: a row's
// bits are those of the other kernels.
//
// A warp computes the scores of a chunk's eight pages first and keeps p in registers: when the chunk's maximum is
// known, each result of the values is weighted and added in ascending order of pages. While one of K and V is used, the
// other's next chunk is on its way.
#include "ops/cuda/attention.cuh"

enum { FROM_TOKENS = 32 }; // a sequence, on average: fewer leave warps without rows

template <int HD> struct wide_shared {
    uint4 k[CHUNK_PAGES][ATTN_BLOCK * HD / 8], v[CHUNK_PAGES][ATTN_BLOCK * HD / 8];
    q_rows<HD> q[ATTN_WARPS];
    float max[ATTN_WARPS][CHUNK_PAGES][ROWS], sum[ATTN_WARPS][CHUNK_PAGES][ROWS]; // of a chunk's pages
    uint64_t k_arrived[CHUNK_PAGES], v_arrived[CHUNK_PAGES];
};

// A warp's 16 rows, and its lane's two of them: g and g + 8.
struct warp_rows {
    int token, n_tokens; // the first, and how many; 0: the warp has no rows
    int position[2];     // of the lane's rows; -1: no such row
    int last_page;       // that any of its rows sees; -1: none
};

// Which sequence's tokens this block takes: tiles are counted through the sequences, the last ones first, since they
// see most pages. Returns the sequence and sets `token` to the first of at most `size`.
static __device__ __forceinline__ int find_tile(const batch_view &b, int size, int &token) {
    int tile = (int)(gridDim.x - 1 - blockIdx.x), start = 0;
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
template <int HD>
static __device__ __forceinline__ void load_page(wide_shared<HD> *sh, const attention_params &p, bool of_v, int kv_head,
                                                 int page, int slot, int lane) {
    const __nv_bfloat16 *from = (of_v ? p.kv.v : p.kv.k) + head_page(p.kv, page, kv_head);
    uint4 *to = of_v ? sh->v[slot] : sh->k[slot];
#if HOPPER
    if (lane != 0) return;
    uint64_t *bar = of_v ? &sh->v_arrived[slot] : &sh->k_arrived[slot];
    barrier_expect(bar, ATTN_BLOCK * HD * 2);
    bulk_copy(to, from, ATTN_BLOCK * HD * 2, bar);
#else
    for (int i = lane; i < ATTN_BLOCK * HD / 8; i += 32) to[i] = reinterpret_cast<const uint4 *>(from)[i];
#endif
}

template <int HD>
static __device__ __forceinline__ void prepare_q(q_rows<HD> *q, const attention_params &p, const warp_rows &rows,
                                                 int kv_head, int lane) {
    int group = p.n_heads / p.kv.n_kv_heads;
#pragma unroll 1
    for (int row = 0; row < ROWS; row++) {
        bool real = row / group < rows.n_tokens;
        const float *x =
            p.q + ((size_t)(rows.token + row / group) * p.n_heads + (size_t)kv_head * group + row % group) * HD;
        for (int c = lane; c < HD; c += 32) put_q(q, row, c, real ? x[c] : 0.0f);
    }
    __syncwarp();
}

// The weights of a chunk's first n pages for one row (those beyond stay as they are), its maximum and sum. `max` and
// `sum`: the row's of each page, ROWS apart.
static __device__ __forceinline__ void weigh(float (&weight)[CHUNK_PAGES][2], int half, float &m, float &l,
                                             const float *max, const float *sum, int n) {
    m = max[0];
#pragma unroll
    for (int k = 1; k < CHUNK_PAGES; k++)
        if (k < n) m = fmaxf(m, max[k * ROWS]);
    l = 0;
#pragma unroll
    for (int k = 0; k < CHUNK_PAGES; k++) {
        if (k >= n) break;
        float w = exp2_fast(max[k * ROWS] - m);
        weight[k][half] = w;
        l = k == 0 ? sum[0] * w : fmaf(sum[k * ROWS], w, l);
    }
}

template <int HD> static __global__ void __launch_bounds__(ATTN_THREADS, 1) k_wide_attention(attention_params p) {
    DYNAMIC_SHARED(raw);
    wide_shared<HD> *sh = reinterpret_cast<wide_shared<HD> *>(raw);
    int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    int kv_head = (int)blockIdx.y, group = p.n_heads / p.kv.n_kv_heads, token;
    dependents_may_start();
    if (HOPPER && lane == 0) {
        barrier_init(&sh->k_arrived[warp]);
        barrier_init(&sh->v_arrived[warp]);
        barrier_fence();
    }
    dependency_wait();
    int seq = find_tile(p.b, p.tile_tokens * ATTN_WARPS, token), seq_end = p.b.seq_start[seq + 1];
    int end = min(token + p.tile_tokens * ATTN_WARPS, seq_end);
    int limit = p.b.position[end - 1] + 1, last_page = (limit - 1) / ATTN_BLOCK, n_chunks = last_page / CHUNK_PAGES + 1;
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
        load_page<HD>(sh, p, false, kv_head, pages[warp], warp, lane);
        load_page<HD>(sh, p, true, kv_head, pages[warp], warp, lane);
    }
    prepare_q<HD>(&sh->q[warp], p, rows, kv_head, lane);
    __syncthreads();

    chain state[2] = {};
    float sum[HD / 8][4];
#pragma unroll 1
    for (int chunk = 0; chunk < n_chunks; chunk++) {
        int first = chunk * CHUNK_PAGES, mine = rows.last_page + 1 - first; // pages of the chunk that the warp needs
        int next = first + CHUNK_PAGES + warp;
        uint32_t parity = (uint32_t)chunk & 1;
        uint32_t pairs[CHUNK_PAGES][2][4];
#pragma unroll
        for (int k = 0; k < CHUNK_PAGES; k++) {
            if (k >= mine) break;
            float s[4][4];
            barrier_wait(&sh->k_arrived[k], parity);
            scores<HD, true>(s, &sh->q[warp], sh->k[k], p.scale, lane);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float m, l;
                softmax_row(pairs[k][half], m, l, s, half, rows.position[half] + 1 - (first + k) * ATTN_BLOCK, t);
                if (t == 0) {
                    sh->max[warp][k][g + 8 * half] = m;
                    sh->sum[warp][k][g + 8 * half] = l;
                }
            }
        }
        __syncthreads(); // K has been read
        if (next <= last_page) load_page<HD>(sh, p, false, kv_head, pages[next], warp, lane);
        int n[2] = {row_blocks(rows.position[0], chunk), row_blocks(rows.position[1], chunk)};
        float weight[CHUNK_PAGES][2], a[2], b[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (n[half] == 0) continue;
            float m, l;
            weigh(weight, half, m, l, &sh->max[warp][0][g + 8 * half], &sh->sum[warp][0][g + 8 * half], n[half]);
            if (chunk == 0) state[half] = {m, l};
            else chain_add(state[half], m, l, a[half], b[half]);
        }
        if (chunk == n_chunks - 1 && limit % ATTN_BLOCK != 0) {
            if (warp == last_page % CHUNK_PAGES) {
                barrier_wait(&sh->v_arrived[warp], parity);
                clear_slots<HD>(sh->v[warp], limit - last_page * ATTN_BLOCK, lane);
            }
            __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < CHUNK_PAGES; k++)
            if (k < mine) barrier_wait(&sh->v_arrived[k], parity);
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
            float of[4];
#pragma unroll
            for (int k = 0; k < CHUNK_PAGES; k++) {
                if (k >= mine) break;
                float d[4];
                values(d, pairs[k][0], pairs[k][1], sh->v[k][i * CHUNK_LANES + lane]);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (k < n[e / 2]) of[e] = k == 0 ? d[e] * weight[0][e / 2] : fmaf(d[e], weight[k][e / 2], of[e]);
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (n[e / 2] > 0) sum[i][e] = chunk == 0 ? of[e] : fmaf(sum[i][e], a[e / 2], of[e] * b[e / 2]);
        }
        __syncthreads(); // V has been read
        if (next <= last_page) load_page<HD>(sh, p, true, kv_head, pages[next], warp, lane);
#if !HOPPER
        __syncthreads();
#endif
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = g + 8 * half;
        if (rows.position[half] < 0) continue;
        float *out =
            p.out + ((size_t)(rows.token + row / group) * p.n_heads + (size_t)kv_head * group + row % group) * HD;
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
            *reinterpret_cast<float2 *>(out + i * 8 + 2 * t) =
                make_float2(sum[i][2 * half] / state[half].l, sum[i][2 * half + 1] / state[half].l);
    }
}

// ---- Launcher
// ------------------------------------------------------------------------------------------------------------

template <int HD> static void launch(struct cuda_state *s, const attention_params &p, size_t tiles) {
    launch_kernel(s, "wide attention", k_wide_attention<HD>,
                  {grid_for(tiles, (size_t)p.kv.n_kv_heads), ATTN_THREADS, sizeof(wide_shared<HD>)}, p);
}

bool cuda_wide_attention(struct cuda_state *s, const attention_params &p, const struct batch *host, int head_dim) {
    if (!(s->device.variants & VARIANT_WIDE_ATTENTION) || host->n_tokens < FROM_TOKENS * host->n_seqs) return false;
    size_t size = (size_t)p.tile_tokens * ATTN_WARPS, tiles = 0;
    for (size_t i = 0; i < host->n_seqs; i++)
        tiles += ((size_t)(host->seq_start[i + 1] - host->seq_start[i]) + size - 1) / size;
    if (head_dim == 32) launch<32>(s, p, tiles);
    else if (head_dim == 64) launch<64>(s, p, tiles);
    else if (head_dim == 96) launch<96>(s, p, tiles);
    else launch<128>(s, p, tiles);
    return true;
}

template <int HD> static void allow(struct cuda_state *s) {
    cuda_check(s,
               cudaFuncSetAttribute(k_wide_attention<HD>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)sizeof(wide_shared<HD>)),
               "preparing attention");
}

extern "C" bool cuda_wide_setup(struct cuda_state *s) {
    allow<32>(s);
    allow<64>(s);
    allow<96>(s);
    allow<128>(s);
    return s->failed == cudaSuccess;
}
