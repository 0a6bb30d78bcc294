// stream.cu: attention of many sequences of one token each: as fast as K and V can be read. The blocks stay on the GPU.
// Each of their warps has a KV head and an equal part of all sequences' pages, a run of chunks; a part's heads, whose
// pages lie side by side in memory, are read at the same time. The pages, their numbers and the next sequence's q, k
// and v are on their way before they are wanted, so that nothing but the memory is waited for. The arithmetic is
// attention.cuh's: a row's bits are those of the other kernels.
//
// A warp that has all chunks of a sequence adds them up in registers; else they go to memory, and the warp that ends
// last combines them.
#include "ops/cuda/columns.cuh"

enum { STREAM_TOKENS = 1024, STREAM_ROWS = 8, STREAM_SHARED = 226 * 1024, STREAM_WAY = 8192 };
static_assert(STREAM_TOKENS % ATTN_THREADS == 0, "every thread has as many tokens");

// What a token costs: its pages, twice, and one for the beginning.
enum { CHUNK_COST = 2 * CHUNK_PAGES };

static __device__ __forceinline__ int token_cost(int position) {
    return 2 * (position / ATTN_BLOCK + 1) + 1;
}

static __device__ __forceinline__ int n_chunks_to(int position) {
    return position / ATTN_CHUNK + 1;
}

template <typename KV, int R> struct stream_warp {
    union {
        alignas(16) q_rows<KV::HD, R> q;
        float rows[(R > 2 ? R : 2) * KV::HD]; // later: k and v before they are rounded, results
    };
    fresh_words<KV::HD> fresh;
};

// R: at least the rows. K pages and V pages take stages in turns.
template <typename KV, int R> struct stream_shared {
    // More on their way would not be read faster, and what else is read would queue behind them.
    static constexpr int PAGE = KV::BYTES, STAGES = PAGE > STREAM_WAY / 2 ? 2 : STREAM_WAY / PAGE;
    alignas(64) unsigned char page[ATTN_WARPS][STAGES][PAGE];
    stream_warp<KV, R> warp[ATTN_WARPS];
    uint64_t arrived[ATTN_WARPS][STAGES];
    int cost[STREAM_TOKENS + 1]; // of all tokens before
    int position[STREAM_TOKENS], first_page[STREAM_TOKENS];
    int counts[ATTN_WARPS];
    float norms[2][KV::HD]; // the weights of q's and k's norm
};

// ---- Who does what ------------------------------------------------------------------------------------------------

// A chunk of a token; token n_tokens: the end.
struct stream_place {
    int token, chunk;

    __device__ __forceinline__ bool is(const stream_place &b) const {
        return token == b.token && chunk == b.chunk;
    }
    // The next one. `n_chunks`: of this one's token.
    __device__ __forceinline__ void step(int n_chunks) {
        if (++chunk < n_chunks) return;
        chunk = 0;
        token++;
    }
};

// The tables. Every thread has up to four tokens.
template <typename KV, int R>
static __device__ __forceinline__ void fill_tables(stream_shared<KV, R> *sh, const batch_view &b, int thread) {
    constexpr int EACH = STREAM_TOKENS / ATTN_THREADS;
    int warp = thread / 32, lane = thread % 32, n[EACH], total = 0, before = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int token = thread * EACH + i;
        n[i] = 0;
        if (token >= b.n_tokens) continue;
        int position = __ldcg(b.position + token);
        sh->position[token] = position;
        sh->first_page[token] = __ldcg(b.page_start + __ldcg(b.seq + token));
        n[i] = token_cost(position);
        total += n[i];
    }
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        int other = __shfl_xor_sync(~0u, total, o);
        if (lane & o) before += other;
        total += other;
    }
    if (lane == 0) sh->counts[warp] = total;
    __syncthreads();
    for (int w = 0; w < warp; w++) before += sh->counts[w];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (thread * EACH + i <= b.n_tokens) sh->cost[thread * EACH + i] = before;
        before += n[i];
    }
    if (thread == ATTN_THREADS - 1 && b.n_tokens == STREAM_TOKENS) sh->cost[STREAM_TOKENS] = before;
    __syncthreads();
}

// Where part `part` of n_parts equal ones begins: the first chunk that does so at that cost or beyond.
template <typename KV, int R>
static __device__ __forceinline__ stream_place find_part(const stream_shared<KV, R> *sh, const attention_params &p,
                                                         int part, int n_parts, int lane) {
    int n_tokens = p.b.n_tokens, all = sh->cost[n_tokens], low = 0;
    int from = all / n_parts * part + (all % n_parts * part + n_parts - 1) / n_parts; // all part / n_parts, rounded up
    if (from >= all) return {n_tokens, 0};
    for (int i = lane; i < n_tokens; i += 32) low += sh->cost[i] <= from;
#pragma unroll
    for (int o = 16; o; o >>= 1) low += __shfl_xor_sync(~0u, low, o);
    low--;
    int rest = from - sh->cost[low], n_chunks = n_chunks_to(sh->position[low]);
    if (rest == 0) return {low, 0};
    int chunk = max(1, (rest - 1 + CHUNK_COST - 1) / CHUNK_COST);
    if (!p.split || chunk >= n_chunks) return {low + 1, 0};
    return {low, chunk};
}

// ---- What is on its way -------------------------------------------------------------------------------------------

// Where a warp's pages come from: runs ahead of their use, through the same chunks, and of the pages' numbers by a
// chunk more.
struct stream_source {
    stream_place next, end;
    int next_pages, next_number; // of the chunk `next`: how many (0: there is none), and the lane's number
    int n_items, item;           // of this chunk's pages, K and V in turns
    int head;
    int number;
    int slot; // where the next page goes

    template <typename KV, int R>
    __device__ __forceinline__ void look(const stream_shared<KV, R> *sh, const attention_params &p, int lane) {
        next_pages = 0;
        if (next.is(end)) return;
        next_pages = row_blocks(sh->position[next.token], next.chunk);
        next_number = 0;
        if (lane < next_pages)
            next_number = __ldcg(p.b.pages + sh->first_page[next.token] + next.chunk * CHUNK_PAGES + lane);
    }

    template <typename KV, int R>
    __device__ __forceinline__ void start(const stream_shared<KV, R> *sh, const attention_params &p,
                                          const stream_place &from, const stream_place &to, int kv_head, int lane) {
        next = from;
        head = kv_head;
        end = to;
        slot = item = n_items = 0;
        look<KV, R>(sh, p, lane);
    }

    // Asks for the next page, if there is one, into the stage whose turn it is; all lanes have read what was there.
    template <typename KV, int R>
    __device__ __forceinline__ void ask(stream_shared<KV, R> *sh, const attention_params &p, int warp, int lane) {
        using shared = stream_shared<KV, R>;
        if (item == n_items) {
            if (next_pages == 0) return;
            item = 0;
            n_items = 2 * next_pages;
            number = next_number;
            next.step(n_chunks_to(sh->position[next.token]));
            look<KV, R>(sh, p, lane);
        }
        const unsigned char *from = head_page(p.kv, item % 2, __shfl_sync(~0u, number, item / 2), head);
        unsigned char *to = sh->page[warp][slot];
        if (lane == 0) {
            barrier_expect(&sh->arrived[warp][slot], shared::PAGE);
            // Of short contexts the page that this step's K and V go to is most of what is read.
            bulk_copy_once(to, from, shared::PAGE, &sh->arrived[warp][slot], p.max_chunks > 1);
        }
        item++;
        slot = slot + 1 == shared::STAGES ? 0 : slot + 1;
    }

    // Asks for the next two pages after those, as far as their numbers are there, into the cache: the memory has work
    // until the kernel before has ended and the first pages have been used.
    template <typename KV> __device__ __forceinline__ void ask_ahead(const attention_params &p, int lane) {
        int at = item + lane, index = at < n_items ? at : at - n_items;
        int here = __shfl_sync(~0u, number, index / 2 % 32), then = __shfl_sync(~0u, next_number, index / 2 % 32);
        if (lane < 2 && at < n_items + 2 * next_pages)
            ask_cache(head_page(p.kv, index % 2, at < n_items ? here : then, head), KV::BYTES);
    }
};

// A token's rows of q of a KV head, and its k, v, rotation and page, as they come from memory.
template <int HD, int R> struct stream_input {
    head_registers<HD> q[R], k, v, cos_sin;
    int page; // where k and v belong

    template <typename SHARED>
    __device__ __forceinline__ void load(const SHARED *sh, const attention_params &p, int token, int kv_head,
                                         int lane) {
        size_t first = ((size_t)token * p.n_heads + (size_t)kv_head * p.rows) * HD;
        size_t at = ((size_t)token * p.kv.n_kv_heads + kv_head) * HD;
#pragma unroll
        for (int i = 0; i < R; i++) q[i] = read_head<HD>(i < p.rows ? p.q + first + i * HD : NULL, lane);
        page = __ldcg(p.b.pages + sh->first_page[token] + sh->position[token] / KV_PAGE_TOKENS);
        cos_sin = read_head<HD>(p.cos_sin + (size_t)token * HD, lane);
        k = read_head<HD>(p.k + at, lane);
        v = read_head<HD>(p.v + at, lane);
    }
};

// ---- A token's KV head --------------------------------------------------------------------------------------------

// q's rows, normed and rotated; and, where this warp has the last chunk, this token's k and v (slot -1:
// another has).
template <typename KV, int R>
static __device__ __forceinline__ void prepare(columns<KV::HD, R> &q, stream_warp<KV, R> *sh, const attention_params &p,
                                               stream_input<KV::HD, R> &in, const float (&norms)[2][KV::HD], int head,
                                               int slot, int lane) {
    constexpr int HD = KV::HD, PAIRS = head_registers<HD>::PAIRS, HALF = HD / 2;
    head_registers<HD> norm = read_head<HD>(p.q_norm ? norms[0] : NULL, lane);
#pragma unroll
    for (int row = 0; row < R; row++) {
        head_registers<HD> &x = in.q[row];
        if (p.q_norm) normalise_head<HD>(x, norm, p.eps);
        rotate_head<HD>(x, in.cos_sin);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            if (lane + 32 * i >= HALF) continue;
            put_q(&sh->q, row, lane + 32 * i, x.lo[i], p.scale);
            put_q(&sh->q, row, lane + 32 * i + HALF, x.hi[i], p.scale);
        }
    }
    __syncwarp();
    q.load(&sh->q, lane);
    __syncwarp();
    if (slot >= 0) {
        if (p.k_norm) normalise_head<HD>(in.k, read_head<HD>(norms[1], lane), p.eps);
        rotate_head<HD>(in.k, in.cos_sin);
        store_fresh<HD>(&sh->fresh, sh->rows, p.kv, in.page, head, slot, false, in.k, lane);
        store_fresh<HD>(&sh->fresh, sh->rows + HD, p.kv, in.page, head, slot, true, in.v, lane);
        __syncwarp();
    }
}

// A lane's two rows of a sequence's chunks so far.
template <int HD> struct stream_sums {
    chain of_row[2];
    float of[HD / 16][4];

    __device__ __forceinline__ void start() {
        of_row[0] = of_row[1] = CHAIN_START;
#pragma unroll
        for (int i = 0; i < HD / 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) of[i][e] = 0;
    }

    __device__ __forceinline__ void add(const column_chain<HD> &chunk) {
        float a[2], c[2];
#pragma unroll
        for (int e = 0; e < 2; e++) chain_add(of_row[e], chunk.unit[e], chunk.l[e], a[e], c[e]);
#pragma unroll
        for (int i = 0; i < HD / 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) of[i][e] = chain_value(of[i][e], a[e % 2], chunk.of[i][e], c[e % 2]);
    }
};

// The rows' values, `of` and where they belong as of column_chain's, to shared memory, divided by `by`; then eight
// after the other to `take`.
template <typename KV, int R, bool DIVIDE, typename TAKE>
static __device__ __forceinline__ void put_rows(stream_warp<KV, R> *sh, const float (&of)[KV::HD / 16][4],
                                                const float (&by)[2], int n_rows, int lane, const TAKE &take) {
    constexpr int HD = KV::HD;
    int g = lane / 4, t = lane % 4;
    float *rows = sh->rows;
    __syncwarp(); // what stood there has been read
#pragma unroll
    for (int e = 0; e < 2; e++) {
        int row = 2 * t + e;
        if (row >= n_rows) continue;
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
            float v = of[i / 2][i % 2 * 2 + e];
            rows[row * HD + 8 * i + g] = DIVIDE ? v / by[e] : v;
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < n_rows * HD / 8; i += 32) {
        const float4 *from = reinterpret_cast<const float4 *>(rows) + 2 * i;
        take(8 * i, from[0], from[1]);
    }
}

static __device__ __forceinline__ float *part_of(const attention_params &p, int token, int chunk, int head, int dim) {
    return p.partial + (((size_t)token * p.max_chunks + chunk) * p.kv.n_kv_heads + head) * part_floats(p.rows, dim);
}

template <typename KV, int R>
static __device__ __forceinline__ void put_part(stream_warp<KV, R> *sh, const attention_params &p,
                                                const column_chain<KV::HD> &chunk, const stream_place &at, int head,
                                                int lane) {
    constexpr int HD = KV::HD;
    float *part = part_of(p, at.token, at.chunk, head, HD);
    put_rows<KV, R, false>(sh, chunk.of, {1, 1}, p.rows, lane, [&](int i, float4 a, float4 b) {
        reinterpret_cast<float4 *>(part + i)[0] = a;
        reinterpret_cast<float4 *>(part + i)[1] = b;
    });
#pragma unroll
    for (int e = 0; e < 2; e++) {
        int row = 2 * lane + e;
        if (row >= p.rows) continue;
        part[p.rows * HD + row] = chunk.unit[e];
        part[p.rows * (HD + 1) + row] = chunk.l[e];
    }
}

// The last warp to end a chunk of this token and KV head: all of them in order.
template <int HD>
static __device__ __forceinline__ void combine_parts(const attention_params &p, int token, int head, int n_chunks,
                                                     int lane) {
    constexpr int N = HD / 32, AT_ONCE = 8;
    const float *from = part_of(p, token, 0, head, HD);
    size_t step = (size_t)p.kv.n_kv_heads * part_floats(p.rows, HD);
#pragma unroll 1
    for (int row = 0; row < p.rows; row++) {
        chain s = CHAIN_START;
        float sum[N] = {};
#pragma unroll 1
        for (int k = 0; k < n_chunks; k += AT_ONCE) {
            float of[AT_ONCE][N], m[AT_ONCE], l[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const float *chunk = from + (size_t)min(k + i, n_chunks - 1) * step;
                m[i] = __ldcg(chunk + p.rows * HD + row);
                l[i] = __ldcg(chunk + p.rows * (HD + 1) + row);
#pragma unroll
                for (int c = 0; c < N; c++) of[i][c] = __ldcg(chunk + row * HD + lane + 32 * c);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                float a, b;
                if (k + i >= n_chunks) break;
                chain_add(s, m[i], l[i], a, b);
#pragma unroll
                for (int c = 0; c < N; c++) sum[c] = chain_value(sum[c], a, of[i][c], b);
            }
        }
#pragma unroll
        for (int c = 0; c < N; c++) {
            int column = (head * p.rows + row) * HD + lane + 32 * c;
            float v = sum[c] / s.l;
            p.out[(size_t)token * p.n_heads * HD + column] = v;
            if (p.packed)
                *reinterpret_cast<__nv_bfloat16 *>(p.packed + packed_at(token, column, p.token_units)) =
                    __float2bfloat16_rn(v);
        }
    }
}

// A page of K and one of V, of which n slots are in use, one of them (slot, if not negative) this step's.
template <typename KV, int R>
static __device__ __forceinline__ void stream_page(column_chain<KV::HD> &chunk, const columns<KV::HD, R> &q,
                                                   stream_shared<KV, R> *sh, const attention_params &p,
                                                   stream_source &source, int &stage, uint32_t &parity, int n, int slot,
                                                   int warp, int lane) {
    column_page<KV> page;
    float s[4][2], m[2];
    uint32_t pairs[4];
    auto read = [&]() {
        __syncwarp();
        source.ask<KV, R>(sh, p, warp, lane);
        if (++stage == stream_shared<KV, R>::STAGES) stage = 0, parity ^= 1;
    };
    page.keys(sh->page[warp][stage], lane);
    barrier_wait(&sh->arrived[warp][stage], parity);
    column_scores<KV, R>(s, q, page);
    read();
    if (slot >= 0) fresh_scores(s, q, &sh->warp[warp].fresh, slot, lane);
    column_lift(s, m, n, lane);
    chunk.raise(m);
    chunk.weigh(pairs, s);
    page.values(sh->page[warp][stage], &sh->warp[warp].fresh, n, slot, lane);
    barrier_wait(&sh->arrived[warp][stage], parity);
    if (column_page<KV>::MASKS && (n < ATTN_BLOCK || slot >= 0)) chunk.template add<true>(page, pairs);
    else chunk.template add<false>(page, pairs);
    read();
}

template <typename KV, int R>
static __global__ void __launch_bounds__(ATTN_THREADS, 1) k_stream_attention(attention_params p) {
    DYNAMIC_SHARED(raw);
    using shared = stream_shared<KV, R>;
    shared *sh = reinterpret_cast<shared *>(raw);
    constexpr int HD = KV::HD;
    int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32;
    if (lane == 0) {
        for (int i = 0; i < shared::STAGES; i++) barrier_init(&sh->arrived[warp][i]);
        barrier_fence();
    }
    dependents_may_start();
    static_assert(2 * HD <= ATTN_THREADS, "a weight of a norm each");
    const float *norms = thread < HD ? p.q_norm : p.k_norm;
    float norm = thread < 2 * HD && norms ? norms[thread % HD] : 0.0f;
    fill_tables<KV, R>(sh, p.b, thread);
    // A part's heads are neighbours among the blocks.
    int index = warp * (int)gridDim.x + (int)blockIdx.x, head = index % p.kv.n_kv_heads;
    int part = index / p.kv.n_kv_heads, n_parts = (int)gridDim.x * ATTN_WARPS / p.kv.n_kv_heads;
    stream_place at = find_part<KV, R>(sh, p, part, n_parts, lane);
    stream_place end = find_part<KV, R>(sh, p, part + 1, n_parts, lane);
    stream_source source;
    source.start<KV, R>(sh, p, at, end, head, lane);
#pragma unroll 1
    for (int i = 0; i < shared::STAGES; i++) source.ask<KV, R>(sh, p, warp, lane);
    if (thread < 2 * HD) sh->norms[thread / HD][thread % HD] = norm;
    if (lane == 0) sh->warp[warp].fresh.zeros = make_uint4(0, 0, 0, 0);
    __syncthreads();
    source.ask_ahead<KV>(p, lane);
    dependency_wait();
    stream_input<HD, R> in;
    if (!at.is(end)) in.load(sh, p, at.token, head, lane);
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    while (!at.is(end)) {
        int position = sh->position[at.token], n_chunks = n_chunks_to(position);
        int last = at.token == end.token ? end.chunk : n_chunks, first = at.chunk;
        bool alone = first == 0 && last == n_chunks;
        columns<HD, R> q;
        prepare<KV, R>(q, &sh->warp[warp], p, in, sh->norms, head, last == n_chunks ? position % KV_PAGE_TOKENS : -1,
                       lane);
        stream_place following = {at.token + 1, 0};
        if (last == n_chunks && !following.is(end)) in.load(sh, p, at.token + 1, head, lane);
        stream_sums<HD> sums;
        column_chain<HD> chunk;
        sums.start();
#pragma unroll 1
        for (; at.chunk < last; at.chunk++) {
            int n_pages = row_blocks(position, at.chunk);
            chunk.start();
#pragma unroll 1
            for (int k = 0; k < n_pages; k++) {
                int n = position + 1 - (at.chunk * CHUNK_PAGES + k) * ATTN_BLOCK;
                int slot = n <= ATTN_BLOCK ? n - 1 : -1;
                stream_page<KV, R>(chunk, q, sh, p, source, stage, parity, n, slot, warp, lane);
            }
            if (alone) sums.add(chunk);
            else put_part<KV, R>(&sh->warp[warp], p, chunk, at, head, lane);
        }
        if (alone) {
            const float l[2] = {sums.of_row[0].l, sums.of_row[1].l};
            put_rows<KV, R, true>(&sh->warp[warp], sums.of, l, p.rows, lane, [&](int i, float4 a, float4 b) {
                put_results(p, at.token, head * p.rows * HD + i, a, b);
            });
        } else {
            unsigned *arrived = p.arrivals + (size_t)at.token * p.kv.n_kv_heads + head, before = 0;
            __syncwarp();
            if (lane == 0) before = count_arrival(arrived, (unsigned)(last - first));
            if (__shfl_sync(~0u, before, 0) + (unsigned)(last - first) == (unsigned)n_chunks) {
                if (lane == 0) *arrived = 0;
                combine_parts<HD>(p, at.token, head, n_chunks, lane);
            }
        }
        at = last == n_chunks ? following : end;
        __syncwarp(); // the results have been read
    }
}

// ---- Launcher -----------------------------------------------------------------------------------------------------

template <typename KV, int R> static void launch_rows(struct cuda_state *s, const attention_params &p) {
    launch_kernel(s, "attention", k_stream_attention<KV, R>,
                  {grid_for((size_t)s->n_sms), ATTN_THREADS, sizeof(stream_shared<KV, R>)}, p);
}

template <typename KV> static void launch(struct cuda_state *s, const attention_params &p) {
    if (p.rows <= 2) launch_rows<KV, 2>(s, p);
    else if (p.rows <= 4) launch_rows<KV, 4>(s, p);
    else launch_rows<KV, STREAM_ROWS>(s, p);
}

bool cuda_stream_attention(struct cuda_state *s, const attention_params &params, size_t n_tokens, size_t scratch_floats,
                           int head_dim) {
    attention_params p = params;
    size_t tiles = n_tokens * (size_t)p.kv.n_kv_heads;
    // Fewer tiles, up to two on an SM at once and two after those, are better off with a block each; and of longer
    // contexts in bf16 such blocks read more.
    enum { MOST_CHUNKS = 8 };
    size_t few = (size_t)s->n_sms * (p.rows <= 2 ? 4 : 1);
    if (!HOPPER || !(s->device.variants & VARIANT_STREAM_ATTENTION) || tiles <= few || n_tokens > STREAM_TOKENS ||
        p.rows > STREAM_ROWS || (!p.kv.is_fp8 && p.max_chunks > MOST_CHUNKS))
        return false;
    p.split =
        tiles <= MOST_ARRIVALS && tiles * (size_t)p.max_chunks * part_floats(p.rows, head_dim) <= scratch_floats / 2;
#define LAUNCH(KV) launch<KV>(s, p)
    BY_KV(p.kv.is_fp8, head_dim, LAUNCH);
    return true;
}

// Scratch, of which partial results may take one half: within bounds, what does not fit is not split.
size_t cuda_stream_floats(int n_sms, const struct ops_limits *l) {
    (void)n_sms;
    size_t rows = l->max_tokens * l->n_heads, most = rows < SPLIT_ROWS ? rows : SPLIT_ROWS, chunks = 1;
    while (chunks * ATTN_CHUNK < l->max_positions) chunks *= 2;
    while (most < rows && most * chunks * (l->head_dim + 4) < MOST_PARTIAL) most = 2 * most < rows ? 2 * most : rows;
    return 2 * most * chunks * (l->head_dim + 4);
}

template <typename KV, int R> static void allow_rows(struct cuda_state *s) {
    static_assert(sizeof(stream_shared<KV, R>) <= STREAM_SHARED, "an SM's shared memory");
    allow_shared(s, "preparing attention", k_stream_attention<KV, R>, sizeof(stream_shared<KV, R>));
}

template <typename KV> static void allow(struct cuda_state *s) {
    allow_rows<KV, 2>(s);
    allow_rows<KV, 4>(s);
    allow_rows<KV, STREAM_ROWS>(s);
}

void cuda_load_stream(struct cuda_state *s, bool is_fp8, int head_dim) {
#define ALLOW(KV) allow<KV>(s)
    BY_KV(is_fp8, head_dim, ALLOW);
}
