// group_attention.cu: attention of prompts by Hopper's asynchronous matrix instructions (groups.cuh): two groups of
// four warps have 64 rows each, in wide.cu's order, and every page serves both. The arithmetic is attention.cuh's:
// scores are a chain over the channels from +0 for q's high parts and one for its low parts, a page's values a chain
// from +0 over its slots; wgmma returns the bits of mma.sync (docs/NUMERICS.md).
//
// Four more warps (the producers) have pages copied into a ring in shared memory and turn them, in place, into the
// matrices that wgmma reads: of each 512 bytes (8 slots or channels by 32 columns, matrix.cuh) lane l's four words
// become word l of four matrices of 8 by 8. Who orders what: a copy's end is waited for at `arrived`; what a producer
// warp has rewritten, and fenced for the matrix instructions, it reports at `ready`; a consumer warp whose instructions
// on a page have ended reports at `empty`, and only then is the next copy into that stage asked for.
#include "ops/cuda/groups.cuh"
#include "ops/cuda/wide.cuh"

enum {
    STAGES = 8, // pages of K and V
    PRODUCER_WARPS = 4,
    GROUP_ATTENTION_THREADS = ATTN_THREADS + 32 * PRODUCER_WARPS,
};

template <typename KV> struct group_attention_shared {
    alignas(128) unsigned char k[STAGES][KV::BYTES], v[STAGES][KV::BYTES];
    float4 sum[ATTN_WARPS][KV::HD / 8][32];
    uint64_t arrived[STAGES], ready[STAGES], empty[STAGES];
};

// ---- Producers
// -------------------------------------------------------------------------------------------------------

// What a block works on: a tile of rows of a KV head.
struct work {
    int kv_head, token, end; // the tile's tokens
    int limit, last_page;    // positions that its last row sees; their last page
    const int32_t *pages;
};

// Asks for a page; beyond the last one for nothing.
template <typename KV>
static __device__ __forceinline__ void ask_page(group_attention_shared<KV> *sh, const attention_params &p,
                                                const work &w, int page) {
    int slot = page % STAGES;
    if (page >= STAGES) barrier_wait(&sh->empty[slot], (uint32_t)(page / STAGES - 1) & 1);
    barrier_expect(&sh->arrived[slot], page <= w.last_page ? 2 * KV::BYTES : 0);
    if (page > w.last_page) return;
    bulk_copy(sh->k[slot], head_page(p.kv, false, w.pages[page], w.kv_head), KV::BYTES, &sh->arrived[slot]);
    bulk_copy(sh->v[slot], head_page(p.kv, true, w.pages[page], w.kv_head), KV::BYTES, &sh->arrived[slot]);
}

// A page of K or V, of which n slots are in use: of V the others become zeros.
template <typename KV, bool OF_V>
static __device__ __forceinline__ void turn_page(unsigned char *page, int n, int lane) {
    enum { AT_ONCE = 4 };
    v_slots slots = slots_in_use(n, -1, lane % 4);
#pragma unroll 1
    for (unsigned char *own = page; own < page + KV::BYTES; own += AT_ONCE * 512) {
        uint4 x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) x[i] = *reinterpret_cast<const uint4 *>(own + i * 512 + lane * 16);
        if (OF_V && n < ATTN_BLOCK) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) x[i] = real_slots(x[i], slots, 0);
        }
        __syncwarp(); // all lanes have read them
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            uint32_t *to = reinterpret_cast<uint32_t *>(own + i * 512) + lane;
            to[0] = x[i].x;
            to[32] = x[i].y;
            to[64] = x[i].z;
            to[96] = x[i].w;
        }
    }
}

// Pages come in pairs: the last one may be none. They are dealt out to the producer warps, each of which has its next
// page asked for before it turns one.
template <typename KV>
static __device__ __forceinline__ void produce_pages(group_attention_shared<KV> *sh, const attention_params &p,
                                                     const work &w, int warp, int lane) {
    int last = w.last_page | 1;
    if (lane == 0 && warp <= last) ask_page<KV>(sh, p, w, warp);
#pragma unroll 1
    for (int page = warp; page <= last; page += PRODUCER_WARPS) {
        int slot = page % STAGES;
        if (lane == 0 && page + PRODUCER_WARPS <= last) ask_page<KV>(sh, p, w, page + PRODUCER_WARPS);
        __syncwarp();
        barrier_wait(&sh->arrived[slot], (uint32_t)(page / STAGES) & 1);
        if (page <= w.last_page) {
            turn_page<KV, false>(sh->k[slot], ATTN_BLOCK, lane);
            turn_page<KV, true>(sh->v[slot], w.limit - page * ATTN_BLOCK, lane);
            stores_before_copies();
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&sh->ready[slot]);
    }
}

// ---- Consumers
// -------------------------------------------------------------------------------------------------------

// A warp's rows of q, normed and rotated on the way: through `room`, [16][HD] floats of shared memory, where channels
// stand in eights that a row's number turns (against bank conflicts).
template <int HD>
static __device__ __forceinline__ void load_turned(wide_q<HD> &q, float *room, const attention_params &p,
                                                   const warp_rows &rows, int kv_head, int lane) {
    constexpr int PAIRS = head_registers<HD>::PAIRS, HALF = HD / 2;
    int group = p.n_heads / p.kv.n_kv_heads;
    head_registers<HD> norm = read_head<HD>(p.q_norm, lane), x[ROWS], turn[ROWS]; // all asked for at once
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        int token = rows.token + row / group;
        bool real = row / group < rows.n_tokens;
        const float *from = p.q + ((size_t)token * p.n_heads + (size_t)kv_head * group + row % group) * HD;
        x[row] = read_head<HD>(real ? from : NULL, lane);
        turn[row] = read_head<HD>(real ? p.cos_sin + (size_t)token * HD : NULL, lane);
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        if (p.q_norm) normalise_head<HD>(x[row], norm, p.eps);
        rotate_head<HD>(x[row], turn[row]);
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            int c = lane + 32 * k;
            room[row * HD + (c ^ row % 8 * 8)] = x[row].lo[k];
            room[row * HD + ((c + HALF) ^ row % 8 * 8)] = x[row].hi[k];
        }
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = lane / 4 + 8 * half;
#pragma unroll
        for (int e = 0; e < HD / 8; e++) {
            float2 v = *reinterpret_cast<const float2 *>(room + row * HD + ((e * 8) ^ row % 8 * 8) + 2 * (lane % 4));
            uint32_t pair = pack_bf16(v.x, v.y);
            q.high[e / 4][e % 4 * 2 + half] = pair;
            q.low[e / 4][e % 4 * 2 + half] = pack_bf16(v.x - bf16_low(pair), v.y - bf16_high(pair));
        }
    }
    __syncwarp(); // the room is used otherwise from here on
}

// softmax_row of a row that sees the whole page.
static __device__ __forceinline__ void softmax_whole(uint32_t (&p)[4], float &m, float &l, const float (&s)[4][4],
                                                     int half) {
    m = MINUS_INFINITY;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) m = fmaxf(m, s[j][2 * half + e]);
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = ceilf(fmaxf(m, __shfl_xor_sync(~0u, m, 2)));
    l = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        p[j] = pack_bf16(exp2_fast(s[j][2 * half] - m), exp2_fast(s[j][2 * half + 1] - m));
        l += bf16_low(p[j]);
        l += bf16_high(p[j]);
    }
    l += __shfl_xor_sync(~0u, l, 1);
    l += __shfl_xor_sync(~0u, l, 2);
}

// scores of attention.cuh of the group's rows and turned pages of K that lie one after the other.
template <typename KV, int PAGES>
static __device__ __forceinline__ void group_scores(float (&s)[PAGES][4][4], const wide_q<KV::HD> &q,
                                                    const unsigned char *pages, float scale) {
    constexpr int STEP = 2 * 128, SLOTS = KV::HD / 8 * 128; // of 16 channels; to the next 8 slots
    float high[16 * PAGES], low[16 * PAGES];
    uint64_t k = group_operand(pages, 128, SLOTS);
    group_fence();
#pragma unroll
    for (int i = 0; i < KV::HD / 16; i++) {
        const uint32_t *h = &q.high[i / 2][i % 2 * 4];
        group_mma(high, h[0], h[1], h[2], h[3], k + (uint64_t)(i * STEP >> 4), i > 0);
    }
#pragma unroll
    for (int i = 0; i < KV::HD / 16; i++) {
        const uint32_t *l = &q.low[i / 2][i % 2 * 4];
        group_mma(low, l[0], l[1], l[2], l[3], k + (uint64_t)(i * STEP >> 4), i > 0);
    }
    group_commit();
    group_wait<0>(high);
    group_wait<0>(low);
#pragma unroll
    for (int i = 0; i < 16 * PAGES; i++) s[i / 16][i % 16 / 4][i % 4] = (high[i] + low[i]) * scale;
}

// The group's rows and one page.
template <typename KV>
static __device__ __forceinline__ void group_page(wide_sums<KV::HD> &sums, const unsigned char *k_page,
                                                  const unsigned char *v_page, const wide_q<KV::HD> &q,
                                                  const warp_rows &rows, int first, float scale, int lane) {
    constexpr int PARTS = KV::HD / 64; // of 64 channels
    float s[1][4][4], a[2], c[2], d[PARTS][32];
    uint32_t pairs[2][4];
    group_scores<KV, 1>(s, q, k_page, scale);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m, l;
        softmax_row(pairs[half], m, l, s[0], half, rows.position[half] + 1 - first, lane % 4);
        chain_add(sums.chunk[half], m, l, a[half], c[half]);
    }
    if (a[0] != 1.0f || a[1] != 1.0f) {
#pragma unroll
        for (int i = 0; i < KV::HD / 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums.of[i][e] *= a[e / 2];
    }
    __syncwarp();
    uint64_t v = group_operand(v_page, 128, 512);
    group_fence();
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            group_mma(d[k], pairs[0][2 * i], pairs[1][2 * i], pairs[0][2 * i + 1], pairs[1][2 * i + 1],
                      v + (uint64_t)((k * 8 * 512 + i * 256) >> 4), i > 0);
        group_commit();
    }
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
        if (k + 1 < PARTS) group_wait<1>(d[k]);
        else group_wait<0>(d[k]);
#pragma unroll
        for (int i = 0; i < 32; i++) // chain_value
            sums.of[8 * k + i / 4][i % 4] = fmaf(d[k][i], c[i % 4 / 2], sums.of[8 * k + i / 4][i % 4]);
    }
}

template <typename KV>
static __device__ __forceinline__ void put_rows(const attention_params &p, const warp_rows &rows,
                                                const wide_sums<KV::HD> &sums, int kv_head, int lane) {
    constexpr int HD = KV::HD;
    int group = p.n_heads / p.kv.n_kv_heads;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = lane / 4 + 8 * half;
        if (rows.position[half] < 0) continue;
        int to = rows.token + row / group, first = (kv_head * group + row % group) * HD + 2 * (lane % 4);
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

// The group's rows and two pages of a chunk. WHOLE: all rows see all of both.
template <typename KV, bool WHOLE>
static __device__ __forceinline__ void group_pair(wide_sums<KV::HD> &sums, const unsigned char *k_pages,
                                                  const unsigned char *v_pages, const wide_q<KV::HD> &q,
                                                  const warp_rows &rows, int first, float scale, int lane) {
    constexpr int PARTS = KV::HD / 64; // of 64 channels
    float s[2][4][4], a[2][2], c[2][2], d[PARTS][32];
    uint32_t pairs[2][2][4];
    group_scores<KV, 2>(s, q, k_pages, scale);
#pragma unroll
    for (int page = 0; page < 2; page++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m, l;
            if (WHOLE) softmax_whole(pairs[page][half], m, l, s[page], half);
            else
                softmax_row(pairs[page][half], m, l, s[page], half, rows.position[half] + 1 - first - page * ATTN_BLOCK,
                            lane % 4);
            chain_add(sums.chunk[half], m, l, a[page][half], c[page][half]);
        }
    __syncwarp();
    auto multiply = [&](int page, int k) {
        uint64_t v = group_operand(v_pages + page * KV::BYTES, 128, 512);
        group_fence();
#pragma unroll
        for (int i = 0; i < 2; i++)
            group_mma(d[k], pairs[page][0][2 * i], pairs[page][1][2 * i], pairs[page][0][2 * i + 1],
                      pairs[page][1][2 * i + 1], v + (uint64_t)((k * 8 * 512 + i * 256) >> 4), i > 0);
        group_commit();
    };
#pragma unroll
    for (int k = 0; k < PARTS; k++) multiply(0, k);
#pragma unroll
    for (int page = 0; page < 2; page++) {
        if (a[page][0] != 1.0f || a[page][1] != 1.0f) {
#pragma unroll
            for (int i = 0; i < KV::HD / 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums.of[i][e] *= a[page][e / 2];
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < PARTS; k++) {
            if (PARTS > 1 && (page == 0 || k == 0)) group_wait<1>(d[k]);
            else group_wait<0>(d[k]);
#pragma unroll
            for (int i = 0; i < 32; i++) // chain_value
                sums.of[8 * k + i / 4][i % 4] = fmaf(d[k][i], c[page][i % 4 / 2], sums.of[8 * k + i / 4][i % 4]);
            if (page == 0) multiply(1, k);
        }
    }
}

// A warp's part of all that its group does: pages in pairs, as they come.
template <typename KV>
static __device__ __forceinline__ void consume_pages(group_attention_shared<KV> *sh, const attention_params &p,
                                                     const work &w, int warp, int lane) {
    int group = p.n_heads / p.kv.n_kv_heads, last = w.last_page;
    warp_rows rows;
    rows.token = w.token + warp * p.tile_tokens;
    rows.n_tokens = max(0, min(p.tile_tokens, w.end - rows.token));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = (lane / 4 + 8 * half) / group;
        rows.position[half] = row < rows.n_tokens ? p.b.position[rows.token + row] : -1;
    }
    int group_first = w.token + warp / 4 * 4 * p.tile_tokens;
    int own_last =
        group_first < w.end ? p.b.position[min(group_first + 4 * p.tile_tokens, w.end) - 1] / ATTN_BLOCK : -1;
    int group_position = group_first < w.end ? p.b.position[group_first] : -1;
    wide_q<KV::HD> q;
    if (p.cos_sin) load_turned<KV::HD>(q, &sh->sum[warp][0][0].x, p, rows, w.kv_head, lane);
    else q.load(p, rows, w.kv_head, lane);
    wide_sums<KV::HD> sums;
    sums.start(&sh->sum[warp][0][lane]);
#pragma unroll 1
    for (int page = 0; page <= last; page += 2) {
        int slot = page % STAGES, first = page * ATTN_BLOCK;
        uint32_t parity = (uint32_t)(page / STAGES) & 1;
        barrier_wait(&sh->ready[slot], parity);
        barrier_wait(&sh->ready[slot + 1], parity);
        if (first + 2 * ATTN_BLOCK <= group_position + 1)
            group_pair<KV, true>(sums, sh->k[slot], sh->v[slot], q, rows, first, p.scale, lane);
        else if (page + 1 <= own_last)
            group_pair<KV, false>(sums, sh->k[slot], sh->v[slot], q, rows, first, p.scale, lane);
        else if (page <= own_last) group_page<KV>(sums, sh->k[slot], sh->v[slot], q, rows, first, p.scale, lane);
        __syncwarp();
        if (lane < 2) barrier_arrive(&sh->empty[slot + lane]);
        if (page <= own_last && (page % CHUNK_PAGES == CHUNK_PAGES - 2 || page + 2 > own_last))
            sums.end_chunk(rows.position, page / CHUNK_PAGES * ATTN_CHUNK);
    }
    put_rows<KV>(p, rows, sums, w.kv_head, lane);
}

template <typename KV>
static __global__ void __launch_bounds__(GROUP_ATTENTION_THREADS, 1) k_group_attention(attention_params p) {
#if HOPPER
    DYNAMIC_SHARED(raw);
    group_attention_shared<KV> *sh = reinterpret_cast<group_attention_shared<KV> *>(raw);
    int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32;
    dependents_may_start();
    if (thread == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init_for(&sh->arrived[i], 1);
            barrier_init_for(&sh->ready[i], 1);
            barrier_init_for(&sh->empty[i], ATTN_WARPS);
        }
        barrier_fence();
    }
    __syncthreads();
    dependency_wait();
    work w;
    w.kv_head = (int)blockIdx.x;
    int seq = find_tile(p.b, p.tile_tokens * ATTN_WARPS, w.token);
    w.end = min(w.token + p.tile_tokens * ATTN_WARPS, p.b.seq_start[seq + 1]);
    w.limit = p.b.position[w.end - 1] + 1;
    w.last_page = (w.limit - 1) / ATTN_BLOCK;
    w.pages = p.b.pages + p.b.page_start[seq];
    if (warp >= ATTN_WARPS) {
        registers_down<40>();
        produce_pages<KV>(sh, p, w, warp - ATTN_WARPS, lane);
    } else {
        registers_up<232>();
        consume_pages<KV>(sh, p, w, warp, lane);
    }
#endif
}

// ---- Launcher
// ------------------------------------------------------------------------------------------------------------

template <typename KV> static void launch(struct cuda_state *s, const attention_params &p, size_t tiles) {
    launch_kernel(
        s, "wide attention", k_group_attention<KV>,
        {grid_for((size_t)p.kv.n_kv_heads, tiles), GROUP_ATTENTION_THREADS, sizeof(group_attention_shared<KV>)}, p);
}

bool cuda_group_attention_takes(const struct cuda_state *s, bool is_fp8, size_t head_dim) {
    return HOPPER && s->device.variants & VARIANT_WGMMA_ATTENTION && !is_fp8 && (head_dim == 64 || head_dim == 128);
}

bool cuda_group_attention(struct cuda_state *s, const attention_params &p, size_t tiles, int head_dim) {
    if (!cuda_group_attention_takes(s, p.kv.is_fp8, (size_t)head_dim)) return false;
    if (head_dim == 128) launch<bf16_kv<128>>(s, p, tiles);
    else launch<bf16_kv<64>>(s, p, tiles);
    return true;
}

template <typename KV> static void allow(struct cuda_state *s) {
    cuda_check(s,
               cudaFuncSetAttribute(k_group_attention<KV>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)sizeof(group_attention_shared<KV>)),
               "preparing attention");
}

extern "C" bool cuda_group_attention_setup(struct cuda_state *s) {
    allow<bf16_kv<64>>(s);
    allow<bf16_kv<128>>(s);
    return s->failed == cudaSuccess;
}
