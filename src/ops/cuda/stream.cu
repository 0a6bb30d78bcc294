// stream.cu: attention of many sequences of one token each, or of long ones: as fast as K and V can be read. A warp
// takes a chunk of a sequence's KV head from its first page to its last, by itself; the pages of its next chunk are on
// their way before this one ends, so that nothing but the memory is waited for. The arithmetic is attention.cuh's: a
// row's bits are those of the other kernels.
//
// Chunks of all sequences are numbered through (the table `starts`), and warps take them in turns. A sequence's chunks
// are combined by the warp that ends last.
#include "ops/cuda/attention.cuh"

enum { STREAM_TOKENS = 1024, STREAM_SHARED = 226 * 1024, STREAM_MOST_STAGES = 8 };

template <typename KV, int RT> struct stream_warp {
    q_rows<KV::HD, RT> q;
    fresh_row<KV::HD> fresh;
};

// RT: rows. K pages and V pages take stages in turns.
template <typename KV, int RT> struct stream_shared {
    static constexpr int PAGE = KV::BYTES;
    static constexpr int ROOM =
        (STREAM_SHARED - ATTN_WARPS * (int)(sizeof(stream_warp<KV, RT>) + 8 * STREAM_MOST_STAGES) -
         4 * (STREAM_TOKENS + ATTN_WARPS + 8)) /
        (ATTN_WARPS * PAGE);
    static constexpr int STAGES = ROOM < STREAM_MOST_STAGES ? ROOM : STREAM_MOST_STAGES;
    alignas(16) unsigned char page[ATTN_WARPS][STAGES][PAGE];
    stream_warp<KV, RT> warp[ATTN_WARPS];
    uint64_t arrived[ATTN_WARPS][STAGES];
    int starts[STREAM_TOKENS + 1]; // of each token's chunks; the last: their number
    int counts[ATTN_WARPS];
};

// One chunk of a token's KV head.
struct stream_task {
    int token, kv_head, chunk, n_chunks, position, n_pages;
};

// sh->starts. Every thread has up to four tokens.
template <typename KV, int RT>
static __device__ __forceinline__ void count_chunks(stream_shared<KV, RT> *sh, const batch_view &b, int thread) {
    constexpr int EACH = STREAM_TOKENS / ATTN_THREADS;
    int warp = thread / 32, lane = thread % 32, n[EACH], total = 0, before = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int token = thread * EACH + i;
        n[i] = token < b.n_tokens ? __ldcg(b.position + token) / ATTN_CHUNK + 1 : 0;
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
        if (thread * EACH + i < b.n_tokens) sh->starts[thread * EACH + i] = before;
        before += n[i];
    }
    if (thread == ATTN_THREADS - 1) sh->starts[b.n_tokens] = before;
    __syncthreads();
}

template <typename KV, int RT>
static __device__ __forceinline__ stream_task find_task(const stream_shared<KV, RT> *sh, const attention_params &p,
                                                        int index) {
    stream_task task;
    int at = index / p.kv.n_kv_heads, low = 0, high = p.b.n_tokens;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (sh->starts[middle] <= at) low = middle;
        else high = middle;
    }
    task.token = low;
    task.kv_head = index % p.kv.n_kv_heads;
    task.chunk = at - sh->starts[low];
    task.n_chunks = sh->starts[low + 1] - sh->starts[low];
    task.position = __ldcg(p.b.position + low);
    task.n_pages = row_blocks(task.position, task.chunk);
    return task;
}

// Where a warp's pages come from: runs ahead of their use, through the same tasks.
struct stream_source {
    int index, stride, n_tasks; // of tasks
    int kv_head, n_items, item; // of this task's pages, K and V in turns
    int page;                   // of the lane's number in the chunk
    int slot;                   // where the next page goes

    template <typename KV, int RT>
    __device__ __forceinline__ void begin_task(const stream_shared<KV, RT> *sh, const attention_params &p, int lane) {
        item = n_items = 0;
        if (index >= n_tasks) return;
        stream_task task = find_task<KV, RT>(sh, p, index);
        const int32_t *pages = p.b.pages + __ldcg(p.b.page_start + __ldcg(p.b.seq + task.token));
        kv_head = task.kv_head;
        n_items = 2 * task.n_pages;
        page = lane < task.n_pages ? __ldcg(pages + task.chunk * CHUNK_PAGES + lane) : 0;
    }

    // Asks for the next page, if there is one, into the stage whose turn it is; all lanes have read what was there.
    template <typename KV, int RT>
    __device__ __forceinline__ void ask(stream_shared<KV, RT> *sh, const attention_params &p, int warp, int lane) {
        using shared = stream_shared<KV, RT>;
        if (item == n_items) {
            if (index >= n_tasks) return;
            index += stride;
            begin_task<KV, RT>(sh, p, lane);
            if (n_items == 0) return;
        }
        int number = __shfl_sync(~0u, page, item / 2);
        const unsigned char *from = head_page(p.kv, item % 2, number, kv_head);
        unsigned char *to = sh->page[warp][slot];
#if HOPPER
        if (lane == 0) {
            barrier_expect(&sh->arrived[warp][slot], shared::PAGE);
            bulk_copy(to, from, shared::PAGE, &sh->arrived[warp][slot]);
        }
#else
        for (int i = lane; i < shared::PAGE / 16; i += 32)
            reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(from)[i];
        __syncwarp();
#endif
        item++;
        slot = slot + 1 == shared::STAGES ? 0 : slot + 1;
    }
};

// The task's rows of q, normed and rotated where FUSED; and, with the last chunk, this token's k and v.
template <typename KV, int RT, bool FUSED>
static __device__ __forceinline__ void prepare_task(stream_warp<KV, RT> *sh, const attention_params &p,
                                                    const stream_task &task, int lane) {
    constexpr int HD = KV::HD, PAIRS = head_registers<HD>::PAIRS, HALF = HD / 2;
    const float *cos_sin = FUSED ? p.cos_sin + (size_t)task.token * HD : NULL;
    size_t head = (size_t)task.token * p.n_heads + (size_t)task.kv_head * p.rows;
#pragma unroll(RT <= 2 ? 2 : 1)
    for (int row = 0; row < RT; row++) {
        head_registers<HD> x = {};
        if (row < p.rows) x = load_head<HD>(p.q + (head + row) * HD, FUSED ? p.q_norm : NULL, cos_sin, p.eps, lane);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            if (lane + 32 * i >= HALF) continue;
            put_q(&sh->q, row, lane + 32 * i, x.lo[i]);
            put_q(&sh->q, row, lane + 32 * i + HALF, x.hi[i]);
        }
    }
    if (FUSED && task.chunk == task.n_chunks - 1) {
        size_t at = ((size_t)task.token * p.kv.n_kv_heads + task.kv_head) * HD;
        int slot = task.position % KV_PAGE_TOKENS;
        int page =
            __ldcg(p.b.pages + __ldcg(p.b.page_start + __ldcg(p.b.seq + task.token)) + task.position / KV_PAGE_TOKENS);
        head_registers<HD> k = load_head<HD>(p.k + at, p.k_norm, cos_sin, p.eps, lane);
        head_registers<HD> v = load_head<HD>(p.v + at, NULL, NULL, p.eps, lane);
        store_fresh(&sh->fresh, p.kv, page, task.kv_head, slot, false, k, lane);
        store_fresh(&sh->fresh, p.kv, page, task.kv_head, slot, true, v, lane);
    }
    __syncwarp();
}

// The last warp to end a chunk of this token and KV head: all of them in order.
template <int HD>
static __device__ __forceinline__ void combine_chunks(const attention_params &p, const stream_task &task, size_t first,
                                                      int lane) {
    constexpr int N = HD / 32, AT_ONCE = 8;
    size_t size = (size_t)p.rows * (HD + 2), step = (size_t)p.kv.n_kv_heads * size;
    const float *from = p.partial + (first * p.kv.n_kv_heads + task.kv_head) * size;
#pragma unroll 1
    for (int row = 0; row < p.rows; row++) {
        chain s = CHAIN_START;
        float sum[N] = {};
#pragma unroll 1
        for (int k = 0; k < task.n_chunks; k += AT_ONCE) {
            float of[AT_ONCE][N], m[AT_ONCE], l[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const float *chunk = from + (size_t)min(k + i, task.n_chunks - 1) * step;
                m[i] = __ldcg(chunk + p.rows * HD + row);
                l[i] = __ldcg(chunk + p.rows * (HD + 1) + row);
#pragma unroll
                for (int c = 0; c < N; c++) of[i][c] = __ldcg(chunk + row * HD + lane + 32 * c);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                float a, b;
                if (k + i >= task.n_chunks) break;
                chain_add(s, m[i], l[i], a, b);
#pragma unroll
                for (int c = 0; c < N; c++) sum[c] = chain_value(sum[c], a, of[i][c], b);
            }
        }
        float *out = p.out + ((size_t)task.token * p.n_heads + (size_t)task.kv_head * p.rows + row) * HD;
#pragma unroll
        for (int c = 0; c < N; c++) out[lane + 32 * c] = sum[c] / s.l;
    }
}

// A chunk has been summed up: the result, or this chunk's part of it.
template <typename KV, int RT>
static __device__ __forceinline__ void end_task(const stream_shared<KV, RT> *sh, const attention_params &p,
                                                const stream_task &task, const chain (&s)[2],
                                                const float (&of)[KV::HD / 8][RT > 8 ? 4 : 2], int lane) {
    constexpr int HD = KV::HD;
    int g = lane / 4, t = lane % 4;
    bool alone = task.n_chunks == 1;
    size_t size = (size_t)p.rows * (HD + 2), first = (size_t)sh->starts[task.token];
    float *part = p.partial + ((first + task.chunk) * p.kv.n_kv_heads + task.kv_head) * size;
    float *to = alone ? p.out + ((size_t)task.token * p.n_heads + (size_t)task.kv_head * p.rows) * HD : part;
#pragma unroll
    for (int half = 0; half < (RT > 8 ? 2 : 1); half++) {
        int row = g + 8 * half;
        if (row >= p.rows) continue;
        float l = s[half].l;
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
            *reinterpret_cast<float2 *>(to + row * HD + i * 8 + 2 * t) =
                alone ? make_float2(of[i][2 * half] / l, of[i][2 * half + 1] / l)
                      : make_float2(of[i][2 * half], of[i][2 * half + 1]);
        if (!alone && t == 0) {
            part[p.rows * HD + row] = s[half].m;
            part[p.rows * (HD + 1) + row] = l;
        }
    }
    if (alone) return;
    __syncwarp();
    unsigned *arrived = p.arrivals + (size_t)task.token * p.kv.n_kv_heads + task.kv_head, before = 0;
    if (lane == 0) before = count_arrival(arrived);
    if (__shfl_sync(~0u, before, 0) != (unsigned)task.n_chunks - 1) return;
    if (lane == 0) *arrived = 0;
    combine_chunks<HD>(p, task, first, lane);
}

template <typename KV, int RT, bool FUSED>
static __global__ void __launch_bounds__(ATTN_THREADS, 1) k_stream_attention(attention_params p) {
    DYNAMIC_SHARED(raw);
    using shared = stream_shared<KV, RT>;
    shared *sh = reinterpret_cast<shared *>(raw);
    constexpr int HD = KV::HD;
    constexpr bool TALL = RT > 8;
    int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32, t = lane % 4;
    if (HOPPER && lane == 0) {
        for (int i = 0; i < shared::STAGES; i++) barrier_init(&sh->arrived[warp][i]);
        barrier_fence();
    }
    dependents_may_start();
    if (!FUSED) dependency_wait(); // the kernel before stores K and V
    count_chunks<KV, RT>(sh, p.b, thread);
    stream_source source;
    int index = warp * (int)gridDim.x + (int)blockIdx.x;
    source.index = index;
    source.stride = (int)gridDim.x * ATTN_WARPS;
    source.n_tasks = sh->starts[p.b.n_tokens] * p.kv.n_kv_heads;
    source.slot = 0;
    source.begin_task<KV, RT>(sh, p, lane);
#pragma unroll 1
    for (int i = 0; i < shared::STAGES; i++) source.ask<KV, RT>(sh, p, warp, lane);
    if (FUSED) dependency_wait();
    int at = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (; index < source.n_tasks; index += source.stride) {
        stream_task task = find_task<KV, RT>(sh, p, index);
        prepare_task<KV, RT, FUSED>(&sh->warp[warp], p, task, lane);
        const fresh_row<HD> *fresh = &sh->warp[warp].fresh;
        chain sum[2] = {CHAIN_START, CHAIN_START};
        float of[HD / 8][TALL ? 4 : 2] = {};
#pragma unroll 1
        for (int k = 0; k < task.n_pages; k++) {
            int n = task.position + 1 - (task.chunk * CHUNK_PAGES + k) * ATTN_BLOCK; // slots in use
            int slot = FUSED && n <= ATTN_BLOCK ? n - 1 : -1;                        // this step's
            float s[4][4], a[2] = {1, 1}, c[2];
            uint32_t pairs[2][4] = {};
            barrier_wait(&sh->arrived[warp][at], parity);
            scores<KV, TALL>(s, &sh->warp[warp].q, sh->page[warp][at], p.scale, lane, fresh, slot);
            __syncwarp();
            source.ask<KV, RT>(sh, p, warp, lane);
            if (++at == shared::STAGES) at = 0, parity ^= 1;
#pragma unroll
            for (int half = 0; half < (TALL ? 2 : 1); half++) {
                float m, l;
                softmax_row(pairs[half], m, l, s, half, n, t);
                chain_add(sum[half], m, l, a[half], c[half]);
            }
            if (a[0] != 1.0f || a[1] != 1.0f) {
#pragma unroll
                for (int i = 0; i < HD / 8; i++)
#pragma unroll
                    for (int e = 0; e < (TALL ? 4 : 2); e++) of[i][e] *= a[e / 2];
            }
            __syncwarp();
            v_slots slots = slots_in_use(n, slot, t);
            barrier_wait(&sh->arrived[warp][at], parity);
            auto add = [&](int i, const float(&d)[4]) {
#pragma unroll
                for (int e = 0; e < (TALL ? 4 : 2); e++) of[i][e] = fmaf(d[e], c[e / 2], of[i][e]); // chain_value
            };
            if (n < ATTN_BLOCK || slot >= 0) page_values<KV, true>(sh->page[warp][at], pairs, slots, fresh, lane, add);
            else page_values<KV, false>(sh->page[warp][at], pairs, slots, fresh, lane, add);
            __syncwarp();
            source.ask<KV, RT>(sh, p, warp, lane);
            if (++at == shared::STAGES) at = 0, parity ^= 1;
        }
        end_task<KV, RT>(sh, p, task, sum, of, lane);
        __syncwarp(); // q has been read
    }
}

// ---- Launcher
// ------------------------------------------------------------------------------------------------------------

template <typename KV, int RT> static void launch_rows(struct cuda_state *s, const attention_params &p, bool fused) {
    struct launch l = {grid_for((size_t)s->n_sms), ATTN_THREADS, sizeof(stream_shared<KV, RT>)};
    if (fused) launch_kernel(s, "attention", k_stream_attention<KV, RT, true>, l, p);
    else launch_kernel(s, "attention", k_stream_attention<KV, RT, false>, l, p);
}

template <typename KV> static void launch(struct cuda_state *s, const attention_params &p, bool fused) {
    if (p.rows <= 2) launch_rows<KV, 2>(s, p, fused);
    else if (p.rows <= 8) launch_rows<KV, 8>(s, p, fused);
    else launch_rows<KV, 16>(s, p, fused);
}

bool cuda_stream_attention(struct cuda_state *s, const attention_params &p, size_t n_tokens, size_t scratch_floats,
                           int head_dim) {
    size_t tiles = n_tokens * (size_t)p.kv.n_kv_heads, chunks = (size_t)p.max_chunks;
    // A recorded step may meet contexts of half of the longest to the longest.
    // Long contexts lose: what a warp reads between its chunks waits behind all that is on its way to the others.
    enum { MOST_STREAMED = 2 };
    bool many =
        tiles >= (size_t)s->n_sms && tiles * ((chunks + 1) / 2) > 2 * (size_t)s->n_sms && chunks <= MOST_STREAMED;
    if (!(s->device.variants & VARIANT_STREAM_ATTENTION) || !many || n_tokens > STREAM_TOKENS ||
        tiles > MOST_ARRIVALS || n_tokens * chunks * (size_t)p.n_heads * (size_t)(head_dim + 2) > scratch_floats)
        return false;
    bool fused = p.k != NULL;
#define LAUNCH(KV) launch<KV>(s, p, fused)
    BY_KV(p.kv.is_fp8, head_dim, LAUNCH);
    return true;
}

template <typename KV, int RT> static void allow_rows(struct cuda_state *s) {
    int bytes = (int)sizeof(stream_shared<KV, RT>);
    static_assert(sizeof(stream_shared<KV, RT>) <= STREAM_SHARED, "an SM's shared memory");
    cuda_check(
        s, cudaFuncSetAttribute(k_stream_attention<KV, RT, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "preparing attention");
    cuda_check(
        s, cudaFuncSetAttribute(k_stream_attention<KV, RT, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "preparing attention");
}

template <typename KV> static void allow(struct cuda_state *s) {
    allow_rows<KV, 2>(s);
    allow_rows<KV, 8>(s);
    allow_rows<KV, 16>(s);
}

extern "C" bool cuda_stream_setup(struct cuda_state *s) {
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
