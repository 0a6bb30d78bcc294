// group_attention.cu: attention of prompts by Hopper's asynchronous matrix instructions (groups.cuh): two groups of
// four warps have 64 rows each, in wide.cu's order, and every page serves both. The arithmetic is attention.cuh's:
// scores are a chain over the channels from +0, a page's values a chain from +0 over its slots; wgmma returns the bits
// of mma.sync (docs/NUMERICS.md).
//
// Blocks stay and take tiles as they come, the long ones first. One warp takes the tiles, tells the others, and has
// pages copied into a ring in shared memory; three more turn pages, in place, into the matrices that wgmma reads: of
// each 512 bytes (8 slots or channels by 32 columns, matrix.cuh) lane l's four words become word l of four matrices of
// 8 by 8. So the next tile's pages are there before this one has ended. A page of eight bits comes to the end of its
// place and is expanded from the beginning on, so that what is written never reaches what is still to be read.
//
// Who orders what: a copy's end is waited for at `arrived`; what a turning warp has rewritten, and fenced for the
// matrix instructions, it reports at `ready`; a consumer warp whose instructions on a page have ended reports at
// `empty`, and only then is the next copy into that stage asked for. A tile is told at `told`, and its place used again
// when all lanes have read it, which each reports at `taken`.
#include "ops/cuda/groups.cuh"
#include "ops/cuda/wide.cuh"

enum {
    STAGES = 8, // pages of K and V
    PRODUCER_WARPS = 4,
    TURNING_WARPS = PRODUCER_WARPS - 1, // the last one takes tiles and asks for pages
    PLACES = 2,                         // for tiles that have been told
    GROUP_ATTENTION_THREADS = ATTN_THREADS + 32 * PRODUCER_WARPS,
};

// What a block works on: a tile of rows of a KV head.
struct work {
    int kv_head, token, end; // the tile's tokens; kv_head -1: there are no more tiles
    int limit, n_pages;      // positions that its last row sees; their pages, rounded up to pairs
    const int32_t *pages;
};

template <int HD> struct group_attention_shared {
    static constexpr int PAGE = bf16_kv<HD>::BYTES; // as it is multiplied
    alignas(128) unsigned char k[STAGES][PAGE], v[STAGES][PAGE];
    float4 sum[ATTN_WARPS][HD / 8][32];
    work tiles[PLACES];
    uint64_t arrived[STAGES], ready[STAGES / 2], empty[STAGES / 2], told[PLACES], taken[PLACES];
};

// ---- Producers
// -------------------------------------------------------------------------------------------------------

static __device__ __forceinline__ work find_work(const attention_params &p, int tile) {
    work w;
    int heads = p.kv.n_kv_heads, size = p.tile_tokens * ATTN_WARPS;
    w.kv_head = tile % heads;
    int seq = find_tile(p.b, size, p.n_tiles - 1 - tile / heads, w.token);
    w.end = min(w.token + size, p.b.seq_start[seq + 1]);
    w.limit = p.b.position[w.end - 1] + 1;
    w.n_pages = (w.limit + 2 * ATTN_BLOCK - 1) / (2 * ATTN_BLOCK) * 2;
    w.pages = p.b.pages + p.b.page_start[seq];
    return w;
}

// Where in its place a page comes to.
template <typename KV> constexpr int PAGE_BEGIN = bf16_kv<KV::HD>::BYTES - KV::BYTES;

// Asks for a page; beyond the last one for nothing. `number`: of all the block's pages.
template <typename KV>
static __device__ __forceinline__ void ask_page(group_attention_shared<KV::HD> *sh, const attention_params &p,
                                                const work &w, int page, int number) {
    int slot = number % STAGES;
    bool any = page * ATTN_BLOCK < w.limit;
    if (number >= STAGES) barrier_wait(&sh->empty[slot / 2], (uint32_t)(number / STAGES - 1) & 1);
    barrier_expect(&sh->arrived[slot], any ? 2 * KV::BYTES : 0);
    if (!any) return;
    bulk_copy(sh->k[slot] + PAGE_BEGIN<KV>, head_page(p.kv, false, w.pages[page], w.kv_head), KV::BYTES,
              &sh->arrived[slot]);
    bulk_copy(sh->v[slot] + PAGE_BEGIN<KV>, head_page(p.kv, true, w.pages[page], w.kv_head), KV::BYTES,
              &sh->arrived[slot]);
}

// One thread of the block: takes tiles, the next one while this one's pages are asked for, until there are no more.
// Each block is refused one tile; the last to be sets the count back.
template <typename KV>
static __device__ __forceinline__ void ask_pages(group_attention_shared<KV::HD> *sh, const attention_params &p) {
    unsigned n_tiles = (unsigned)(p.n_tiles * p.kv.n_kv_heads), tile = atomicAdd(p.arrivals, 1u);
    int number = 0;
#pragma unroll 1
    for (int i = 0;; i++) {
        int place = i % PLACES;
        work w = {-1, 0, 0, 0, 0, NULL};
        bool any = tile < n_tiles;
        if (any) {
            w = find_work(p, (int)tile);
            tile = atomicAdd(p.arrivals, 1u);
        } else if (tile == n_tiles + gridDim.x - 1) *p.arrivals = 0;
        if (i >= PLACES) barrier_wait(&sh->taken[place], (uint32_t)(i / PLACES - 1) & 1);
        sh->tiles[place] = w;
        barrier_arrive(&sh->told[place]);
        if (!any) return;
#pragma unroll 1
        for (int page = 0; page < w.n_pages; page++) ask_page<KV>(sh, p, w, page, number + page);
        number += w.n_pages;
    }
}

// The block's tile i.
template <typename KV> static __device__ __forceinline__ work take_tile(group_attention_shared<KV::HD> *sh, int i) {
    int place = i % PLACES;
    barrier_wait(&sh->told[place], (uint32_t)(i / PLACES) & 1);
    work w = sh->tiles[place];
    w.kv_head = warp_uniform(w.kv_head);
    w.n_pages = warp_uniform(w.n_pages);
    barrier_arrive(&sh->taken[place]);
    return w;
}

// A page of K or V, of which n slots are in use: of V the others become zeros.
template <typename KV, bool OF_V>
static __device__ __forceinline__ void turn_page(unsigned char *page, int n, int lane) {
    constexpr int AT_ONCE = 4, ACROSS = KV::HD / 32, UNITS = KV::HD / 8;
    static_assert(512 * (UNITS - AT_ONCE) <= PAGE_BEGIN<KV> + KV::BYTES / UNITS / 256 * 256 * (UNITS - AT_ONCE),
                  "the last units are read before they are written over");
    v_slots slots = slots_in_use(n, -1, lane % 4);
    const unsigned char *from = page + PAGE_BEGIN<KV>;
#pragma unroll 1
    for (int first = 0; first < UNITS; first += AT_ONCE) {
        uint4 x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i += 2) {
            if (OF_V) page_reader<KV>::two(x[i], x[i + 1], from, (first + i) / 2, lane);
            else
                for (int e = i; e < i + 2; e++)
                    x[e] = page_reader<KV>::k(from, (first + e) / ACROSS, (first + e) % ACROSS, lane);
        }
        if (OF_V && n < ATTN_BLOCK) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) x[i] = real_slots(x[i], slots, 0);
        }
        __syncwarp(); // all lanes have read them
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) store_matrices(page + (first + i) * 512 + lane * 16, x[i]);
    }
}

// A turning warp's part: a stage is always the same warp's, which so has seen the stage's last page before it waits for
// the next one.
template <typename KV>
static __device__ __forceinline__ void turn_pages(group_attention_shared<KV::HD> *sh, int warp, int lane) {
    int number = 0;
#pragma unroll 1
    for (int i = 0;; i++) {
        work w = take_tile<KV>(sh, i);
        if (w.kv_head < 0) return;
#pragma unroll 1
        for (int page = 0; page < w.n_pages; page++, number++) {
            int slot = number % STAGES, n = w.limit - page * ATTN_BLOCK;
            if (slot % TURNING_WARPS != warp) continue;
            barrier_wait(&sh->arrived[slot], (uint32_t)(number / STAGES) & 1);
            if (n > 0) {
                turn_page<KV, false>(sh->k[slot], ATTN_BLOCK, lane);
                turn_page<KV, true>(sh->v[slot], n, lane);
                stores_before_copies();
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&sh->ready[slot / 2]);
        }
    }
}

// ---- Consumers
// -------------------------------------------------------------------------------------------------------

// Query heads of a KV head: GROUP, so that the compiler knows where rows lie, or, where that is 0, any number.
template <int GROUP> static __device__ __forceinline__ int heads_of(const attention_params &p) {
    return GROUP ? GROUP : p.n_heads / p.kv.n_kv_heads;
}

// Rates of RMSNorm (normalise_head) of 16 heads that a warp has in registers: every lane's is that of row `lane / 2`,
// from squares' sums that are added as warp_sum adds them, but 16 of them at once.
template <int HD>
static __device__ __forceinline__ float head_rates(const head_registers<HD> (&x)[ROWS], float eps, int lane) {
    float s[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        s[row] = 0;
#pragma unroll
        for (int k = 0; k < head_registers<HD>::PAIRS; k++) {
            s[row] = fmaf(x[row].lo[k], x[row].lo[k], s[row]);
            s[row] = fmaf(x[row].hi[k], x[row].hi[k], s[row]);
        }
    }
#pragma unroll
    for (int step = 0; step < 4; step++) { // half of the rows to the lane across, half kept
        const int o = 16 >> step;
#pragma unroll
        for (int row = 0; row < ROWS / 2; row++) {
            if (row >= o / 2) continue;
            float kept = lane & o ? s[row + o / 2] : s[row], given = lane & o ? s[row] : s[row + o / 2];
            s[row] = kept + __shfl_xor_sync(~0u, given, o);
        }
    }
    s[0] += __shfl_xor_sync(~0u, s[0], 1);
    return 1.0f / sqrtf(s[0] / (float)HD + eps);
}

// A lane's channels of a head, `x` its first.
template <int HD> static __device__ __forceinline__ head_registers<HD> own_channels(const float *x) {
    head_registers<HD> h;
#pragma unroll
    for (int k = 0; k < head_registers<HD>::PAIRS; k++) {
        h.lo[k] = x[32 * k];
        h.hi[k] = x[32 * k + HD / 2];
    }
    return h;
}

// A warp's rows of q, normed and rotated on the way: through `room`, [16][HD] floats of shared memory, where channels
// stand in eights that a row's number turns (against bank conflicts).
template <int HD, int GROUP>
static __device__ __forceinline__ void load_turned(wide_q<HD> &q, float *room, const attention_params &p,
                                                   const warp_rows &rows, int kv_head, int lane) {
    constexpr int PAIRS = head_registers<HD>::PAIRS, HALF = HD / 2;
    int group = heads_of<GROUP>(p), head = 0, token = 0, last = max(rows.n_tokens - 1, 0);
    head_registers<HD> norm = read_head<HD>(p.q_norm, lane), x[ROWS], turn[ROWS]; // all asked for at once
    const float *from = p.q + ((size_t)rows.token * p.n_heads + (size_t)kv_head * group) * HD + lane;
    const float *cos_sin = p.cos_sin + (size_t)rows.token * HD + lane;
#pragma unroll
    for (int row = 0; row < ROWS; row++) { // those that there are not are like others
        int t = min(token, last);
        x[row] = own_channels<HD>(from + (size_t)(t * p.n_heads + head) * HD);
        turn[row] = own_channels<HD>(cos_sin + (size_t)t * HD);
        if (++head == group) head = 0, token++;
    }
    if (p.q_norm) {
        float rate = head_rates<HD>(x, p.eps, lane);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float r = __shfl_sync(~0u, rate, 2 * row);
#pragma unroll
            for (int k = 0; k < PAIRS; k++) {
                x[row].lo[k] = x[row].lo[k] * r * norm.lo[k];
                x[row].hi[k] = x[row].hi[k] * r * norm.hi[k];
            }
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
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
            q.of[e / 4][e % 4 * 2 + half] = pack_bf16(v.x * p.scale, v.y * p.scale);
        }
    }
    __syncwarp(); // the room is used otherwise from here on
}

// softmax_row of a row that sees the whole page.
static __device__ __forceinline__ void softmax_whole(uint32_t (&p)[4], float &m, float &l, const float (&s)[4][4],
                                                     int half) {
    m = s[0][2 * half];
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
                                                    const unsigned char *pages) {
    constexpr int STEP = 2 * 128, SLOTS = KV::HD / 8 * 128; // of 16 channels; to the next 8 slots
    float d[16 * PAGES];
    uint64_t k = group_operand(pages, 128, SLOTS);
    group_fence();
#pragma unroll
    for (int i = 0; i < KV::HD / 16; i++) {
        const uint32_t *h = &q.of[i / 2][i % 2 * 4];
        group_mma(d, h[0], h[1], h[2], h[3], k + (uint64_t)(i * STEP >> 4), i > 0);
    }
    group_commit();
    group_wait<0>(d);
#pragma unroll
    for (int i = 0; i < 16 * PAGES; i++) s[i / 16][i % 16 / 4][i % 4] = d[i];
}

// The group's rows and one page.
template <typename KV>
static __device__ __forceinline__ void group_page(wide_sums<KV::HD> &sums, const unsigned char *k_page,
                                                  const unsigned char *v_page, const wide_q<KV::HD> &q,
                                                  const warp_rows &rows, int first, int lane) {
    constexpr int PARTS = KV::HD / 64; // of 64 channels
    float s[1][4][4], a[2], c[2], d[PARTS][32];
    uint32_t pairs[2][4];
    group_scores<KV, 1>(s, q, k_page);
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

// wide_sums' end_chunk, but nothing is read before the first chunk of a tile, and after the last one, the results stay
// in `of`. `all_see`: all rows that there are see some of the chunk.
template <int HD>
static __device__ __forceinline__ void end_chunk(wide_sums<HD> &sums, const int (&position)[2], int first, bool all_see,
                                                 bool is_last) {
    float a[2], c[2];
    if (all_see) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            chain_add(sums.all[half], sums.chunk[half].m, sums.chunk[half].l, a[half], c[half]);
    } else {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bool sees = position[half] >= first;
            chain before = sums.all[half];
            chain_add(sums.all[half], sums.chunk[half].m, sums.chunk[half].l, a[half], c[half]);
            if (!sees) sums.all[half] = before, a[half] = c[half] = 1;
#pragma unroll
            for (int i = 0; i < HD / 8; i++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++)
                    sums.of[i][e] = sees ? sums.of[i][e] : -0.0f; // adds nothing
        }
    }
    auto join = [&](int i, float4 v) {
        sums.of[i][0] = chain_value(v.x, a[0], sums.of[i][0], c[0]);
        sums.of[i][1] = chain_value(v.y, a[0], sums.of[i][1], c[0]);
        sums.of[i][2] = chain_value(v.z, a[1], sums.of[i][2], c[1]);
        sums.of[i][3] = chain_value(v.w, a[1], sums.of[i][3], c[1]);
    };
    if (first == 0) {
#pragma unroll
        for (int i = 0; i < HD / 8; i++) join(i, make_float4(0, 0, 0, 0));
    } else {
#pragma unroll
        for (int i = 0; i < HD / 8; i++) join(i, sums.sum[i * 32]);
    }
    if (is_last) return;
#pragma unroll
    for (int i = 0; i < HD / 8; i++)
        sums.sum[i * 32] = make_float4(sums.of[i][0], sums.of[i][1], sums.of[i][2], sums.of[i][3]);
    sums.next_chunk();
}

template <typename KV, int GROUP>
static __device__ __forceinline__ void put_rows(const attention_params &p, const warp_rows &rows,
                                                const wide_sums<KV::HD> &sums, int kv_head, int lane) {
    enum { AT_ONCE = PACKED_COLUMNS / 8 };
    int group = heads_of<GROUP>(p);
    quotients by[2];
    float *out[2];
    unsigned char *packed[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = lane / 4 + 8 * half, token = rows.token + row / group;
        int column = (kv_head * group + row % group) * KV::HD + 2 * (lane % 4);
        by[half].start(rows.position[half] < 0 ? 1.0f : sums.all[half].l);
        out[half] = p.out + (size_t)token * p.n_heads * KV::HD + column;
        packed[half] = p.packed + packed_at(token, column, p.token_units);
    }
#pragma unroll
    for (int i = 0; i < KV::HD / 8; i += AT_ONCE) {
        float x[AT_ONCE][4];
        bool fast = by[0].takes() && by[1].takes();
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                x[j][e] = sums.of[i + j][e];
                fast &= quotients::takes(x[j][e]);
            }
        if (fast) {
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[j][e] = by[e / 2].of(x[j][e]);
        } else {
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[j][e] = x[j][e] / by[e / 2].divisor;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (rows.position[half] < 0) continue;
            if (p.out) {
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    *reinterpret_cast<float2 *>(out[half] + j * 8) = make_float2(x[j][2 * half], x[j][2 * half + 1]);
            }
            if (p.packed) {
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    *reinterpret_cast<uint32_t *>(packed[half] + j * MATRIX_BYTES) =
                        pack_bf16(x[j][2 * half], x[j][2 * half + 1]);
            }
            out[half] += PACKED_COLUMNS;
            packed[half] += (size_t)p.token_units * PACKED_BYTES;
        }
    }
}

// The group's rows and two pages of a chunk. WHOLE: all rows see all of both.
template <typename KV, bool WHOLE>
static __device__ __forceinline__ void group_pair(wide_sums<KV::HD> &sums, const unsigned char *k_pages,
                                                  const unsigned char *v_pages, const wide_q<KV::HD> &q,
                                                  const warp_rows &rows, int first, int lane) {
    constexpr int PARTS = KV::HD / 64; // of 64 channels
    float s[2][4][4], a[2][2], c[2][2], d[PARTS][32];
    uint32_t pairs[2][2][4];
    group_scores<KV, 2>(s, q, k_pages);
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
    // What is there is weighted once for both pages: all weights are powers of two, so that the bits are those of one
    // page after the other (but for sums that are subnormal: below 2^-126).
    float of_all[2], of_first[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        of_all[half] = a[0][half] * a[1][half];
        of_first[half] = c[0][half] * a[1][half];
    }
    if (of_all[0] != 1.0f || of_all[1] != 1.0f) {
#pragma unroll
        for (int i = 0; i < KV::HD / 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums.of[i][e] *= of_all[e / 2];
    }
    __syncwarp();
#pragma unroll
    for (int page = 0; page < 2; page++) {
        const float(&weights)[2] = page ? c[1] : of_first;
#pragma unroll
        for (int k = 0; k < PARTS; k++) {
            if (PARTS > 1 && (page == 0 || k == 0)) group_wait<1>(d[k]);
            else group_wait<0>(d[k]);
#pragma unroll
            for (int i = 0; i < 32; i++) // chain_value
                sums.of[8 * k + i / 4][i % 4] = fmaf(d[k][i], weights[i % 4 / 2], sums.of[8 * k + i / 4][i % 4]);
            if (page == 0) multiply(1, k);
        }
    }
}

// A warp's rows of a tile, and which pages they see.
struct group_rows {
    warp_rows rows;
    int whole_pairs, last_page; // of pages: that all of the group's rows see all of; the last one that any sees, or -1
};

template <int GROUP>
static __device__ __forceinline__ group_rows rows_of(const attention_params &p, const work &w, int warp, int lane) {
    group_rows r;
    int group = heads_of<GROUP>(p), first = w.token + warp / 4 * 4 * p.tile_tokens;
    r.rows.token = w.token + warp * p.tile_tokens;
    r.rows.n_tokens = max(0, min(p.tile_tokens, w.end - r.rows.token));
    if (r.rows.n_tokens == 0) r.rows.token = w.token; // what is read for them stands for nothing
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = (lane / 4 + 8 * half) / group;
        r.rows.position[half] = row < r.rows.n_tokens ? p.b.position[r.rows.token + row] : -1;
    }
    r.last_page = first < w.end ? p.b.position[min(first + 4 * p.tile_tokens, w.end) - 1] / ATTN_BLOCK : -1;
    r.whole_pairs = first < w.end ? (p.b.position[first] + 1) / (2 * ATTN_BLOCK) : 0;
    r.last_page = warp_uniform(r.last_page);
    r.whole_pairs = warp_uniform(r.whole_pairs);
    return r;
}

// Which pair of stages is next.
struct ring_place {
    int pair;
    uint32_t parity;

    __device__ __forceinline__ void next() {
        if (++pair == STAGES / 2) pair = 0, parity ^= 1;
    }
};

// A pair of pages, once it is there, is worked on and given back.
template <int HD, typename WORK>
static __device__ __forceinline__ void use_pair(group_attention_shared<HD> *sh, ring_place &at, int lane,
                                                const WORK &work) {
    barrier_wait(&sh->ready[at.pair], at.parity);
    work(sh->k[2 * at.pair], sh->v[2 * at.pair]);
    __syncwarp();
    if (lane == 0) barrier_arrive(&sh->empty[at.pair]);
    at.next();
}

// A warp's part of what its group does of a tile: pages in pairs, as they come.
template <typename KV, int GROUP>
static __device__ __forceinline__ void consume_pages(group_attention_shared<KV::HD> *sh, const attention_params &p,
                                                     const work &w, ring_place &at, int warp, int lane) {
    enum { CHUNK_PAIRS = CHUNK_PAGES / 2 };
    group_rows r = rows_of<GROUP>(p, w, warp, lane);
    wide_q<KV::HD> q;
    if (p.cos_sin) load_turned<KV::HD, GROUP>(q, &sh->sum[warp][0][0].x, p, r.rows, w.kv_head, lane);
    else q.load(p, r.rows, w.kv_head, lane);
    wide_sums<KV::HD> sums;
    sums.all[0] = sums.all[1] = CHAIN_START;
    sums.sum = &sh->sum[warp][0][lane];
    sums.next_chunk();
#pragma unroll 1
    for (int pair = 0; pair < w.n_pages / 2;) {
        int begin = pair, end = min(begin + CHUNK_PAIRS, w.n_pages / 2), whole = min(end, r.whole_pairs);
#pragma unroll 1
        for (; pair < whole; pair++)
            use_pair(sh, at, lane, [&](const unsigned char *k, const unsigned char *v) {
                group_pair<KV, true>(sums, k, v, q, r.rows, 0, lane);
            });
#pragma unroll 1
        for (; pair < end; pair++)
            use_pair(sh, at, lane, [&](const unsigned char *k, const unsigned char *v) {
                int first = pair * 2 * ATTN_BLOCK;
                if (2 * pair + 1 <= r.last_page) group_pair<KV, false>(sums, k, v, q, r.rows, first, lane);
                else if (2 * pair <= r.last_page) group_page<KV>(sums, k, v, q, r.rows, first, lane);
            });
        bool is_last = 2 * end > r.last_page;
        if (2 * begin <= r.last_page)
            end_chunk(sums, r.rows.position, begin * 2 * ATTN_BLOCK, begin < r.whole_pairs, is_last);
    }
    put_rows<KV, GROUP>(p, r.rows, sums, w.kv_head, lane);
}

template <typename KV, int GROUP>
static __device__ __forceinline__ void consume_tiles(group_attention_shared<KV::HD> *sh, const attention_params &p,
                                                     int warp, int lane) {
    ring_place at = {0, 0};
#pragma unroll 1
    for (int i = 0;; i++) {
        work w = take_tile<KV>(sh, i);
        if (w.kv_head < 0) return;
        consume_pages<KV, GROUP>(sh, p, w, at, warp, lane);
    }
}

template <int HD> static __device__ __forceinline__ void start_barriers(group_attention_shared<HD> *sh) {
    for (int i = 0; i < STAGES; i++) barrier_init_for(&sh->arrived[i], 1);
    for (int i = 0; i < STAGES / 2; i++) {
        barrier_init_for(&sh->ready[i], 2);
        barrier_init_for(&sh->empty[i], ATTN_WARPS);
    }
    for (int i = 0; i < PLACES; i++) {
        barrier_init_for(&sh->told[i], 1);
        barrier_init_for(&sh->taken[i], 32 * (ATTN_WARPS + TURNING_WARPS));
    }
    barrier_fence();
}

template <typename KV, int GROUP>
static __global__ void __launch_bounds__(GROUP_ATTENTION_THREADS, 1) k_group_attention(attention_params p) {
#if HOPPER
    DYNAMIC_SHARED(raw);
    constexpr int HD = KV::HD;
    group_attention_shared<HD> *sh = reinterpret_cast<group_attention_shared<HD> *>(raw);
    int thread = (int)threadIdx.x, warp = warp_uniform(thread / 32), lane = thread % 32;
    dependents_may_start();
    if (thread == 0) start_barriers<HD>(sh);
    __syncthreads();
    dependency_wait();
    if (warp >= ATTN_WARPS) {
        registers_down<40>();
        if (warp < ATTN_WARPS + TURNING_WARPS) turn_pages<KV>(sh, warp - ATTN_WARPS, lane);
        else if (lane == 0) ask_pages<KV>(sh, p);
    } else {
        registers_up<232>();
        consume_tiles<bf16_kv<HD>, GROUP>(sh, p, warp, lane);
    }
#endif
}

// ---- Launcher
// ------------------------------------------------------------------------------------------------------------

template <typename KV, int GROUP> static void launch_for(struct cuda_state *s, attention_params p, size_t tiles) {
    size_t blocks = tiles * (size_t)p.kv.n_kv_heads;
    if (blocks > (size_t)s->n_sms) blocks = (size_t)s->n_sms;
    p.n_tiles = (int)tiles;
    launch_kernel(s, "wide attention", k_group_attention<KV, GROUP>,
                  {grid_for(blocks), GROUP_ATTENTION_THREADS, sizeof(group_attention_shared<KV::HD>)}, p);
}

template <typename KV> static void launch(struct cuda_state *s, const attention_params &p, size_t tiles) {
    switch (p.n_heads / p.kv.n_kv_heads) {
    case 2: launch_for<KV, 2>(s, p, tiles); break;
    case 4: launch_for<KV, 4>(s, p, tiles); break;
    default: launch_for<KV, 0>(s, p, tiles);
    }
}

bool cuda_group_attention_takes(const struct cuda_state *s, size_t head_dim) {
    return HOPPER && s->device.variants & VARIANT_WGMMA_ATTENTION && (head_dim == 64 || head_dim == 128);
}

bool cuda_group_attention(struct cuda_state *s, const attention_params &p, size_t tiles, int head_dim) {
    if (!cuda_group_attention_takes(s, (size_t)head_dim)) return false;
    if (head_dim == 128) p.kv.is_fp8 ? launch<fp8_kv<128>>(s, p, tiles) : launch<bf16_kv<128>>(s, p, tiles);
    else p.kv.is_fp8 ? launch<fp8_kv<64>>(s, p, tiles) : launch<bf16_kv<64>>(s, p, tiles);
    return true;
}

template <typename KV, int GROUP> static void allow_for(struct cuda_state *s) {
    cuda_check(s,
               cudaFuncSetAttribute(k_group_attention<KV, GROUP>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)sizeof(group_attention_shared<KV::HD>)),
               "preparing attention");
}

template <typename KV> static void allow(struct cuda_state *s) {
    allow_for<KV, 0>(s);
    allow_for<KV, 2>(s);
    allow_for<KV, 4>(s);
}

extern "C" bool cuda_group_attention_setup(struct cuda_state *s) {
    allow<bf16_kv<64>>(s);
    allow<fp8_kv<64>>(s);
    allow<bf16_kv<128>>(s);
    allow<fp8_kv<128>>(s);
    return s->failed == cudaSuccess;
}
