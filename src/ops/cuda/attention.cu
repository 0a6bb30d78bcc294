// attention.cu: paged attention, as primitives and fused: a block of threads takes a tile of up to 16 rows, and a warp
// a page of a chunk.
#include "ops/cuda/attention.cuh"
#include "ops/cuda/products.cuh"

// ---- Primitives
// ------------------------------------------------------------------------------------------------------

template <int HD>
static __global__ void k_scores(float *s, const float *q, kv_view kv, int kv_head, const int32_t *pages, int n_kv,
                                float scale) {
    __shared__ q_rows<HD> rows;
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x, block = (int)blockIdx.x;
    for (int c = lane; c < HD; c += 32) {
        for (int r = 1; r < 8; r++) put_q(&rows, r, c, 0.0f);
        put_q(&rows, 0, c, q[c]);
    }
    __syncwarp();
    float out[4][4];
    scores<HD, false>(out, &rows, reinterpret_cast<const uint4 *>(kv.k + head_page(kv, pages[block], kv_head)), scale,
                      lane);
    for (int j = 0; lane < 4 && j < 4; j++)
        for (int e = 0; e < 2; e++) {
            int position = block * ATTN_BLOCK + 8 * j + 2 * lane + e;
            if (position < n_kv) s[position] = out[j][e];
        }
}

static __global__ void k_softmax(float *s, float *block_max, float *block_sum, int n_kv) {
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x, t = lane % 4, first = (int)blockIdx.x * ATTN_BLOCK, n = n_kv - first;
    float in[4][4] = {}, m, l;
    uint32_t p[4];
    for (int j = 0; j < 4; j++)
        for (int e = 0; e < 2; e++)
            if (8 * j + 2 * t + e < n) in[j][e] = s[first + 8 * j + 2 * t + e];
    __syncwarp();
    softmax_row(p, m, l, in, 0, n, t);
    for (int j = 0; lane < 4 && j < 4; j++) {
        if (8 * j + 2 * t < n) s[first + 8 * j + 2 * t] = bf16_low(p[j]);
        if (8 * j + 2 * t + 1 < n) s[first + 8 * j + 2 * t + 1] = bf16_high(p[j]);
    }
    if (lane == 0) {
        block_max[blockIdx.x] = m;
        block_sum[blockIdx.x] = l;
    }
}

static __global__ void k_values(float *o, const float *p, kv_view kv, int kv_head, const int32_t *pages, int n_kv) {
    dependents_may_start();
    dependency_wait();
    int lane = (int)threadIdx.x, g = lane / 4, t = lane % 4, first = (int)blockIdx.x * ATTN_BLOCK, n = n_kv - first;
    uint32_t pairs[4], none[4] = {0, 0, 0, 0};
    for (int j = 0; j < 4; j++) {
        int at = 8 * j + 2 * t;
        pairs[j] = pack_bf16(g == 0 && at < n ? p[first + at] : 0.0f, g == 0 && at + 1 < n ? p[first + at + 1] : 0.0f);
    }
    const uint4 *page = reinterpret_cast<const uint4 *>(kv.v + head_page(kv, pages[blockIdx.x], kv_head));
    for (int i = 0; i < kv.head_dim / 8; i++) {
        float out[4];
        uint4 x = page[i * CHUNK_LANES + lane];
        x.x = real_slots(x.x, 2 * t, n);
        x.y = real_slots(x.y, 8 + 2 * t, n);
        x.z = real_slots(x.z, 16 + 2 * t, n);
        x.w = real_slots(x.w, 24 + 2 * t, n);
        values(out, pairs, none, x);
        for (int e = 0; g == 0 && e < 2; e++) o[(size_t)blockIdx.x * kv.head_dim + i * 8 + 2 * t + e] = out[e];
    }
}

static __global__ void k_combine(float *out, const float *block_max, const float *block_sum, const float *o,
                                 int n_blocks, int head_dim) {
    dependents_may_start();
    dependency_wait();
    int channel = (int)threadIdx.x;
    chain s = {0, 0};
    float sum = 0;
    for (int first = 0; first < n_blocks; first += CHUNK_PAGES) {
        float weight[CHUNK_PAGES], m, l;
        int n = min(CHUNK_PAGES, n_blocks - first);
        chunk_weights(weight, m, l, block_max + first, block_sum + first, n, 1);
        float of = 0;
        for (int i = 0; i < n; i++) {
            float v = o[(size_t)(first + i) * head_dim + channel];
            of = i == 0 ? v * weight[0] : fmaf(v, weight[i], of);
        }
        if (first == 0) {
            s = {m, l};
            sum = of;
        } else {
            float a, c;
            chain_add(s, m, l, a, c);
            sum = fmaf(sum, a, of * c);
        }
    }
    out[channel] = sum / s.l;
}

// ---- Fused
// -----------------------------------------------------------------------------------------------------------

template <int HD> struct attention_shared {
    uint4 k[ATTN_WARPS][ATTN_BLOCK * HD / 8], v[ATTN_WARPS][ATTN_BLOCK * HD / 8];
    q_rows<HD> q;
    uint64_t k_arrived[ATTN_WARPS], v_arrived[ATTN_WARPS];
    float max[CHUNK_PAGES][ROWS], sum[CHUNK_PAGES][ROWS], weight[CHUNK_PAGES][ROWS];
    float chunk_max[ROWS], chunk_sum[ROWS];
    int position[ROWS];         // of each row's token; -1: no such row
    __nv_bfloat16 fresh[2][HD]; // this step's k and v
    bool last;
    alignas(16) float o[4]; // [CHUNK_PAGES][rows][HD]
};

template <int HD>
static __device__ __forceinline__ void ask_for(attention_shared<HD> *sh, const attention_params &p, bool of_v,
                                               int kv_head, const int32_t *pages, int index, int warp) {
    size_t at = head_page(p.kv, __ldcg(pages + index), kv_head);
    const __nv_bfloat16 *from = (of_v ? p.kv.v : p.kv.k) + at;
    uint64_t *bar = of_v ? &sh->v_arrived[warp] : &sh->k_arrived[warp];
    barrier_expect(bar, ATTN_BLOCK * HD * 2);
    bulk_copy(of_v ? sh->v[warp] : sh->k[warp], from, ATTN_BLOCK * HD * 2, bar);
}

// q's rows (normed and rotated where FUSED) into shared memory, a warp a row; and where FUSED this token's k and v,
// into their page and beside.
template <int HD, bool FUSED, int RT>
static __device__ __forceinline__ void prepare_rows(attention_shared<HD> *sh, const attention_params &p, int token,
                                                    int kv_head, bool owns_position, int warp, int lane) {
    int group = p.n_heads / p.kv.n_kv_heads;
    constexpr int PAIRS = head_registers<HD>::PAIRS, HALF = HD / 2;
    const float *cos_sin = FUSED ? p.cos_sin + (size_t)token * HD : NULL;
#pragma unroll 1
    for (int row = warp; row < (RT > 8 ? 16 : 8); row += ATTN_WARPS) {
        head_registers<HD> x = {};
        if (sh->position[row] >= 0)
            x = load_head<HD>(
                p.q + ((size_t)(token + row / group) * p.n_heads + (size_t)kv_head * group + row % group) * HD,
                FUSED ? p.q_norm : NULL, cos_sin, p.eps, lane);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            if (lane + 32 * i >= HALF) continue;
            put_q(&sh->q, row, lane + 32 * i, x.lo[i]);
            put_q(&sh->q, row, lane + 32 * i + HALF, x.hi[i]);
        }
    }
    if (!FUSED || !owns_position || warp < ATTN_WARPS - 2) return;
    bool of_v = warp == ATTN_WARPS - 1;
    head_registers<HD> x = load_head<HD>((of_v ? p.v : p.k) + ((size_t)token * p.kv.n_kv_heads + kv_head) * HD,
                                         of_v ? NULL : p.k_norm, of_v ? NULL : cos_sin, p.eps, lane);
    int position = sh->position[0], slot = position % KV_PAGE_TOKENS;
    int page = p.b.pages[p.b.page_start[p.b.seq[token]] + position / KV_PAGE_TOKENS];
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) {
        int c = lane + 32 * (i / 2) + i % 2 * HALF;
        if (lane + 32 * (i / 2) >= HALF) continue;
        __nv_bfloat16 rounded = __float2bfloat16_rn(i % 2 ? x.hi[i / 2] : x.lo[i / 2]);
        sh->fresh[of_v][c] = rounded;
        if (of_v) p.kv.v[v_index(p.kv, page, kv_head, slot, c)] = rounded;
        else p.kv.k[k_index(p.kv, page, kv_head, slot, c)] = rounded;
    }
}

// A warp's page of a chunk: scores, softmax, values; the next chunk's page is asked for as soon as this one is read.
template <int HD, bool FUSED, int RT>
static __device__ __forceinline__ void one_page(attention_shared<HD> *sh, const attention_params &p, int kv_head,
                                                const int32_t *pages, int index, int last_page, int limit, int next,
                                                uint32_t parity, int warp, int lane) {
    int g = lane / 4, t = lane % 4, first = index * ATTN_BLOCK, n = limit - first;
    constexpr bool tall = RT > 8;
    float s[4][4], m[2], l[2];
    uint32_t pairs[2][4] = {};
#if HOPPER
    barrier_wait(&sh->k_arrived[warp], parity);
#else
    const uint4 *from_k = reinterpret_cast<const uint4 *>(p.kv.k + head_page(p.kv, pages[index], kv_head));
    const uint4 *from_v = reinterpret_cast<const uint4 *>(p.kv.v + head_page(p.kv, pages[index], kv_head));
    for (int i = lane; i < ATTN_BLOCK * HD / 8; i += 32) {
        sh->k[warp][i] = from_k[i];
        sh->v[warp][i] = from_v[i];
    }
    __syncwarp();
#endif
    bool patch = FUSED && index == last_page;
    int slot = (limit - 1) % KV_PAGE_TOKENS;
    if (patch) {
        __nv_bfloat16 *k = reinterpret_cast<__nv_bfloat16 *>(sh->k[warp]);
        for (int c = lane; c < HD; c += 32) k[unit_index((size_t)slot, (size_t)c, HD)] = sh->fresh[0][c];
        __syncwarp();
    }
    scores<HD, tall>(s, &sh->q, sh->k[warp], p.scale, lane);
    __syncwarp();
    if (HOPPER && next <= last_page && lane == 0) ask_for<HD>(sh, p, false, kv_head, pages, next, warp);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = g + half * 8;
        if (half == 1 && !tall) break;
        softmax_row(pairs[half], m[half], l[half], s, half, sh->position[row] + 1 - first, t);
        if (t == 0 && row < p.rows) {
            sh->max[index % CHUNK_PAGES][row] = m[half];
            sh->sum[index % CHUNK_PAGES][row] = l[half];
        }
    }
#if HOPPER
    barrier_wait(&sh->v_arrived[warp], parity);
#endif
    if (patch) {
        __nv_bfloat16 *v = reinterpret_cast<__nv_bfloat16 *>(sh->v[warp]);
        for (int c = lane; c < HD; c += 32) v[unit_index((size_t)c, (size_t)slot, KV_PAGE_TOKENS)] = sh->fresh[1][c];
        __syncwarp();
    }
    if (n < ATTN_BLOCK) {
        clear_slots<HD>(sh->v[warp], n, lane);
        __syncwarp();
    }
    float *o = sh->o + (size_t)warp * p.rows * HD;
#pragma unroll 4
    for (int i = 0; i < HD / 8; i++) {
        float d[4];
        values(d, pairs[0], pairs[1], sh->v[warp][i * CHUNK_LANES + lane]);
        if (g < p.rows) *reinterpret_cast<float2 *>(o + g * HD + i * 8 + 2 * t) = make_float2(d[0], d[1]);
        if (tall && g + 8 < p.rows)
            *reinterpret_cast<float2 *>(o + (g + 8) * HD + i * 8 + 2 * t) = make_float2(d[2], d[3]);
    }
    __syncwarp();
    if (HOPPER && next <= last_page && lane == 0) ask_for<HD>(sh, p, true, kv_head, pages, next, warp);
}

// RT: at least p.rows.
template <int HD, bool FUSED, int RT>
static __global__ void __launch_bounds__(ATTN_THREADS, 1) k_attention(attention_params p) {
    DYNAMIC_SHARED(raw);
    attention_shared<HD> *sh = reinterpret_cast<attention_shared<HD> *>(raw);
    constexpr int OWN = (RT * HD + ATTN_THREADS - 1) / ATTN_THREADS;
    int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32;
    int token = (int)blockIdx.x, kv_head = (int)blockIdx.y, group = p.n_heads / p.kv.n_kv_heads;
    dependents_may_start();
    if (!FUSED) dependency_wait(); // the kernel before stores K and V
    int seq = __ldcg(p.b.seq + token), seq_start = __ldcg(p.b.seq_start + seq);
    int end = min(token + p.tile_tokens, __ldcg(p.b.seq_start + seq + 1));
    int limit = __ldcg(p.b.position + end - 1) + 1, last_page = (limit - 1) / ATTN_BLOCK;
    int n_chunks = last_page / CHUNK_PAGES + 1, chunk = p.split ? (int)blockIdx.z : 0;
    int stride = p.split ? (int)gridDim.z : 1;
    bool apart = p.split && n_chunks > 1; // this block's chunks are combined with others' at the end
    if ((token - seq_start) % p.tile_tokens != 0 || chunk >= n_chunks) {
        if (FUSED) dependency_wait();
        return;
    }
    const int32_t *pages = p.b.pages + __ldcg(p.b.page_start + seq);
    if (HOPPER && lane == 0) {
        barrier_init(&sh->k_arrived[warp]);
        barrier_init(&sh->v_arrived[warp]);
        barrier_fence();
        if (chunk * CHUNK_PAGES + warp <= last_page) {
            ask_for<HD>(sh, p, false, kv_head, pages, chunk * CHUNK_PAGES + warp, warp);
            ask_for<HD>(sh, p, true, kv_head, pages, chunk * CHUNK_PAGES + warp, warp);
        }
    }
    if (thread < ROWS)
        sh->position[thread] =
            thread < p.rows && token + thread / group < end ? __ldcg(p.b.position + token + thread / group) : -1;
    __syncthreads();
    if (FUSED) dependency_wait();
    prepare_rows<HD, FUSED, RT>(sh, p, token, kv_head, chunk == (n_chunks - 1) % stride, warp, lane);
    __syncthreads();

    chain state[OWN];
    float sum[OWN];
    size_t tile = (size_t)token * p.kv.n_kv_heads + kv_head, size = (size_t)p.rows * (HD + 2);
    for (uint32_t parity = 0; chunk < n_chunks; chunk += stride, parity ^= 1) {
        int index = chunk * CHUNK_PAGES + warp, next = index + stride * CHUNK_PAGES;
        if (index <= last_page)
            one_page<HD, FUSED, RT>(sh, p, kv_head, pages, index, last_page, limit, next, parity, warp, lane);
        __syncthreads();
        if (thread < p.rows) {
            int n = row_blocks(sh->position[thread], chunk);
            float m = 0, l = 0;
            if (n > 0) chunk_weights(&sh->weight[0][thread], m, l, &sh->max[0][thread], &sh->sum[0][thread], n, ROWS);
            sh->chunk_max[thread] = m;
            sh->chunk_sum[thread] = l;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int at = i * ATTN_THREADS + thread, row = at / HD,
                n = row < p.rows ? row_blocks(sh->position[row], chunk) : 0;
            if (n == 0) continue;
            float of = sh->o[at] * sh->weight[0][row];
            for (int k = 1; k < n; k++) of = fmaf(sh->o[(size_t)k * p.rows * HD + at], sh->weight[k][row], of);
            if (apart) {
                float *mine = p.partial + (tile * p.max_chunks + chunk) * size;
                mine[at] = of;
                if (at % HD == 0) {
                    mine[p.rows * HD + row] = sh->chunk_max[row];
                    mine[p.rows * (HD + 1) + row] = sh->chunk_sum[row];
                }
            } else if (chunk == 0) {
                state[i] = {sh->chunk_max[row], sh->chunk_sum[row]};
                sum[i] = of;
            } else {
                float a, c;
                chain_add(state[i], sh->chunk_max[row], sh->chunk_sum[row], a, c);
                sum[i] = fmaf(sum[i], a, of * c);
            }
        }
        __syncthreads();
    }

    if (apart) {
        __threadfence();
        __syncthreads();
        if (thread == 0) sh->last = atomicAdd(p.arrivals + tile, 1u) == (unsigned)min(n_chunks, stride) - 1;
        __syncthreads();
        if (!sh->last) return;
        __threadfence();
        if (thread == 0) p.arrivals[tile] = 0;
        const float *all = p.partial + tile * p.max_chunks * size;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int at = i * ATTN_THREADS + thread, row = at / HD;
            if (row >= p.rows) continue;
            for (int k = 0; k < n_chunks; k++) {
                const float *from = all + k * size;
                float of = __ldcg(from + at), m = __ldcg(from + p.rows * HD + row),
                      l = __ldcg(from + p.rows * (HD + 1) + row);
                if (k == 0) {
                    state[i] = {m, l};
                    sum[i] = of;
                } else {
                    float a, c;
                    chain_add(state[i], m, l, a, c);
                    sum[i] = fmaf(sum[i], a, of * c);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int at = i * ATTN_THREADS + thread, row = at / HD;
        if (row >= p.rows || sh->position[row] < 0) continue;
        p.out[((size_t)(token + row / group) * p.n_heads + (size_t)kv_head * group + row % group) * HD + at % HD] =
            sum[i] / state[i].l;
    }
}

// ---- Launchers
// -------------------------------------------------------------------------------------------------------

// Calls `call` with HD as a constant.
#define BY_HEAD_DIM(dim, call)                                                                                         \
    do {                                                                                                               \
        switch (dim) {                                                                                                 \
        case 32: call(32); break;                                                                                      \
        case 64: call(64); break;                                                                                      \
        case 96: call(96); break;                                                                                      \
        case 128: call(128); break;                                                                                    \
        default: cuda_check(s, cudaErrorInvalidValue, "attention with this head_dim");                                 \
        }                                                                                                              \
    } while (0)

static void attn_scores(const struct op_ctx *ctx, float *out, const float *q, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv, float scale) {
    struct cuda_state *s = cuda_of(ctx);
#define SCORES(HD)                                                                                                     \
    launch_kernel(s, "attn_scores", k_scores<HD>, {grid_for((n_kv + ATTN_BLOCK - 1) / ATTN_BLOCK), 32, 0}, out, q,     \
                  view(kv), (int)kv_head, pages, (int)n_kv, scale *LOG2_E)
    BY_HEAD_DIM(kv->head_dim, SCORES);
}

static void attn_softmax(const struct op_ctx *ctx, float *scores, float *block_max, float *block_sum, size_t n_kv) {
    launch_kernel(cuda_of(ctx), "attn_softmax", k_softmax, {grid_for((n_kv + ATTN_BLOCK - 1) / ATTN_BLOCK), 32, 0},
                  scores, block_max, block_sum, (int)n_kv);
}

static void attn_values(const struct op_ctx *ctx, float *o, const float *p, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv) {
    launch_kernel(cuda_of(ctx), "attn_values", k_values, {grid_for((n_kv + ATTN_BLOCK - 1) / ATTN_BLOCK), 32, 0}, o, p,
                  view(kv), (int)kv_head, pages, (int)n_kv);
}

static void attn_combine(const struct op_ctx *ctx, float *out, const float *block_max, const float *block_sum,
                         const float *o, size_t n_blocks, size_t head_dim) {
    launch_kernel(cuda_of(ctx), "attn_combine", k_combine, {grid_for(1), (unsigned)head_dim, 0}, out, block_max,
                  block_sum, o, (int)n_blocks, (int)head_dim);
}

// The longest context, up to the next power of two, in chunks: what a recorded sequence may depend on.
static size_t most_chunks(const struct batch *b) {
    const struct batch *host = b->host ? b->host : b;
    size_t longest = ATTN_CHUNK;
    for (size_t i = 0; i < host->n_seqs; i++)
        while (longest < (size_t)host->kv_len[i]) longest *= 2;
    return longest / ATTN_CHUNK;
}

static attention_params params_for(const struct op_ctx *ctx, const struct attention_args *a, bool one_each) {
    struct cuda_state *s = cuda_of(ctx);
    int group = (int)(a->n_heads / a->n_kv_heads);
    attention_params p = {};
    p.kv = view(a->kv);
    p.b = view(a->batch);
    p.q = a->q;
    p.out = a->out;
    p.scale = a->scale * LOG2_E;
    p.n_heads = (int)a->n_heads;
    p.tile_tokens = one_each ? 1 : ROWS / group;
    p.rows = p.tile_tokens * group;
    p.partial = ctx->scratch;
    p.arrivals = s->arrivals;
    p.max_chunks = (int)most_chunks(a->batch);
    p.split = one_each && a->batch->n_tokens * a->n_heads <= SPLIT_ROWS && most_chunks(a->batch) > 1 &&
              a->batch->n_tokens * a->n_kv_heads < 3 * (size_t)s->n_sms;
    return p;
}

template <int HD> static size_t attention_bytes(int rows) {
    return sizeof(attention_shared<HD>) + CHUNK_PAGES * (size_t)rows * HD * sizeof(float);
}

template <int HD, bool FUSED>
static void launch_attention(struct cuda_state *s, const attention_params &p, size_t n_tokens, size_t chunks) {
    // As many blocks as the SMs hold at once: each loads its next chunk while it works on one.
    size_t tiles = n_tokens * (size_t)p.kv.n_kv_heads, fit = (size_t)s->n_sms / tiles, blocks = 1;
    if (p.split) blocks = fit == 0 ? 1 : chunks < fit ? chunks : fit;
    struct launch l = {grid_for(n_tokens, (size_t)p.kv.n_kv_heads, blocks), ATTN_THREADS, attention_bytes<HD>(p.rows)};
    if (p.rows <= 2) launch_kernel(s, "attention", k_attention<HD, FUSED, 2>, l, p);
    else if (p.rows <= 8) launch_kernel(s, "attention", k_attention<HD, FUSED, 8>, l, p);
    else launch_kernel(s, "attention", k_attention<HD, FUSED, 16>, l, p);
}

static void attention(const struct op_ctx *ctx, const struct attention_args *a) {
    struct cuda_state *s = cuda_of(ctx);
    bool one_each = a->batch->n_tokens == a->batch->n_seqs;
    attention_params p = params_for(ctx, a, one_each);
    if (!one_each && cuda_wide_attention(s, p, a->batch->host ? a->batch->host : a->batch, (int)a->head_dim)) return;
#define ATTENTION(HD) launch_attention<HD, false>(s, p, a->batch->n_tokens, most_chunks(a->batch))
    BY_HEAD_DIM(a->head_dim, ATTENTION);
}

// For a batch of one token a sequence; else its parts.
static void rope_attention(const struct op_ctx *ctx, const struct rope_attention_args *r) {
    const struct attention_args *a = r->attention;
    struct cuda_state *s = cuda_of(ctx);
    if (a->batch->n_tokens != a->batch->n_seqs) {
        ops_qk_norm_rope_store(ctx, r->store);
        ops_attention(ctx, a);
        return;
    }
    attention_params p = params_for(ctx, a, true);
    p.k = r->store->k;
    p.v = r->store->v;
    p.q_norm = r->store->q_norm;
    p.k_norm = r->store->k_norm;
    p.cos_sin = r->store->cos_sin;
    p.eps = r->store->eps;
#define ROPE_ATTENTION(HD) launch_attention<HD, true>(s, p, a->batch->n_tokens, most_chunks(a->batch))
    BY_HEAD_DIM(a->head_dim, ROPE_ATTENTION);
}

size_t cuda_split_floats(const struct ops *ops, const struct ops_limits *l) {
    (void)ops;
    size_t rows = l->max_tokens * l->n_heads < SPLIT_ROWS ? l->max_tokens * l->n_heads : SPLIT_ROWS, chunks = 1;
    while (chunks * ATTN_CHUNK < l->max_positions) chunks *= 2;
    return rows * chunks * (l->head_dim + 2);
}

template <int HD, bool FUSED, int RT> static void allow(struct cuda_state *s) {
    cuda_check(s,
               cudaFuncSetAttribute(k_attention<HD, FUSED, RT>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)attention_bytes<HD>(RT)),
               "preparing attention");
}

template <int HD> static void allow_shared(struct cuda_state *s) {
    allow<HD, false, 2>(s);
    allow<HD, false, 8>(s);
    allow<HD, false, 16>(s);
    allow<HD, true, 2>(s);
    allow<HD, true, 8>(s);
    allow<HD, true, 16>(s);
}

extern "C" bool cuda_attention_setup(struct cuda_state *s) {
    allow_shared<32>(s);
    allow_shared<64>(s);
    allow_shared<96>(s);
    allow_shared<128>(s);
    return s->failed == cudaSuccess;
}

extern "C" void cuda_fill_attention(struct ops *ops) {
    ops->attn_scores = attn_scores;
    ops->attn_softmax = attn_softmax;
    ops->attn_values = attn_values;
    ops->attn_combine = attn_combine;
    ops->attention = attention;
    ops->rope_attention = rope_attention;
}
