// group_attention.cu: attention of prompts by Hopper's asynchronous matrix instructions (groups.cuh): two groups of
// four warps have 64 rows each, in wide.cu's order, and every page serves both. The arithmetic is attention.cuh's:
// scores are a chain over the channels from +0, a page's values a chain from +0 over its slots; wgmma returns the bits
// of mma.sync (docs/NUMERICS.md). Pages are worked on in pairs; a pair is masked where some of a group's rows do not
// see all of it.
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

// A page of K in bf16. Where the eight slots j of 32 channels i stand, 4 i + j, those with j and i in each other's
// place come to stand, or in heads of 64 channels 2 j + i: four of them at a time, which change their places among
// themselves.
template <int HD> static __device__ __forceinline__ void turn_keys(unsigned char *page, int lane) {
    constexpr int AT_ONCE = 4;
    static_assert(HD == 64 || HD == 128, "two or four blocks of channels");
#pragma unroll 1
    for (int i = 0; i < HD / 8 / AT_ONCE; i++) {
        uint4 x[AT_ONCE];
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++) {
            int from = HD == 128 ? 5 * e ^ 4 * i : (e < 3 ? e : 4) ^ 7 * i;
            x[e] = page_reader<bf16_kv<HD>>::k(page, from % 4, from / 4, lane);
        }
        __syncwarp(); // all lanes have read them
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++) {
            int to = HD == 128 ? 5 * e ^ i : (e < 3 ? 2 * e : 1) ^ 7 * i;
            store_matrices(page + to * 512 + lane * 16, x[e]);
        }
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
                if (KV::BYTES == bf16_kv<KV::HD>::BYTES) turn_keys<KV::HD>(sh->k[slot], lane);
                else turn_page<KV, false>(sh->k[slot], ATTN_BLOCK, lane);
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
#pragma unroll
    for (int j = 0; j < 4; j++) {
        p[j] = pack_bf16(exp2_fast(s[j][2 * half] - m), exp2_fast(s[j][2 * half + 1] - m));
        l = j > 0 ? l + bf16_low(p[j]) : bf16_low(p[j]);
        l += bf16_high(p[j]);
    }
    l += __shfl_xor_sync(~0u, l, 1);
    l += __shfl_xor_sync(~0u, l, 2);
}

// The group's rows times a pair of turned pages of K that lie one after the other: scores of attention.cuh of the first
// page and then of the second, once they have been waited for.
template <int HD>
static __device__ __forceinline__ void ask_scores(float (&s)[32], const wide_q<HD> &q, const unsigned char *k_pages) {
    constexpr int STEP = 2 * 128, SLOTS = HD / 8 * 128; // of 16 channels; to the next 8 slots
    uint64_t k = group_operand(k_pages, 128, SLOTS);
    group_fence();
#pragma unroll
    for (int i = 0; i < HD / 16; i++) {
        const uint32_t *a = &q.of[i / 2][i % 2 * 4];
        group_mma(s, a[0], a[1], a[2], a[3], k + (uint64_t)(i * STEP >> 4), i > 0);
    }
    group_commit();
}

// What a warp's two rows a lane have so far. Where attention.cuh weights it anew for every higher maximum, here it
// stands in units of one maximum, the row's `unit`, from the first page to the last, unless another one is far above
// that. All weights are powers of two, so that the bits are the same (but for sums 2^90 times smaller than the others).
template <int HD> struct group_sums {
    float unit[2], l[2], chunk_l[2]; // -inf: no unit yet; of the chunks before this one; of this one
    float of[HD / 8][4];             // the chunk's values
    float4 *all;                     // those of the chunks before, in shared memory: [HD / 8][32], the lane's first
    bool any;                        // there are chunks before

    __device__ __forceinline__ void start(float4 *room) {
        unit[0] = unit[1] = MINUS_INFINITY;
        l[0] = l[1] = 0;
        all = room;
        any = false;
        next_chunk();
    }
    __device__ __forceinline__ void next_chunk() {
        chunk_l[0] = chunk_l[1] = 0;
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) of[i][e] = 0;
    }
    // Whether these maxima are far above the units.
    __device__ __forceinline__ bool far(const float (&m)[2]) const {
        return m[0] - unit[0] > UNIT_RANGE || m[1] - unit[1] > UNIT_RANGE;
    }
    // Everything in units of those that are.
    __device__ __forceinline__ void change_units(const float (&m)[2]) {
        float by[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float to = m[half] - unit[half] > UNIT_RANGE ? m[half] : unit[half];
            by[half] = exp2_fast(unit[half] - to);
            unit[half] = to;
            l[half] *= by[half];
            chunk_l[half] *= by[half];
        }
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) of[i][e] *= by[e / 2];
            if (!any) continue;
            float4 v = all[i * 32];
            all[i * 32] = make_float4(v.x * by[0], v.y * by[0], v.z * by[1], v.w * by[1]);
        }
    }
    // The chunk joins those before it. After the last one the results stay in `of` and `l`.
    __device__ __forceinline__ void end_chunk(bool is_last) {
        l[0] += chunk_l[0];
        l[1] += chunk_l[1];
        if (any) {
#pragma unroll
            for (int i = 0; i < HD / 8; i++) {
                float4 v = all[i * 32];
                of[i][0] += v.x, of[i][1] += v.y, of[i][2] += v.z, of[i][3] += v.w;
            }
        }
        if (is_last) return;
#pragma unroll
        for (int i = 0; i < HD / 8; i++) all[i * 32] = make_float4(of[i][0], of[i][1], of[i][2], of[i][3]);
        any = true;
        next_chunk();
    }
};

// What a pair's pages weigh.
struct pair_weights {
    float of[2][2]; // [page][half]
};

// A pair's softmax. WHOLE: all rows see all of both pages; otherwise the pair begins at position `first`.
template <int HD, bool WHOLE>
static __device__ __forceinline__ pair_weights pair_softmax(uint32_t (&p)[2][2][4], group_sums<HD> &sums,
                                                            const float (&s)[32], const warp_rows &rows, int first,
                                                            int lane) {
    typedef float page_scores[4][4];
    pair_weights w;
    float m[2][2], l[2][2], top[2]; // [half][page]
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int page = 0; page < 2; page++) {
            const page_scores &its = reinterpret_cast<const page_scores &>(s[16 * page]);
            int n = rows.position[half] + 1 - first - page * ATTN_BLOCK;
            if (WHOLE) softmax_whole(p[page][half], m[half][page], l[half][page], its, half);
            else softmax_row(p[page][half], m[half][page], l[half][page], its, half, n, lane % 4);
        }
        top[half] = fmaxf(m[half][0], m[half][1]);
    }
    if (sums.far(top)) sums.change_units(top);
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int page = 0; page < 2; page++) w.of[page][half] = exp2_fast(m[half][page] - sums.unit[half]);
        sums.chunk_l[half] = fmaf(l[half][1], w.of[1][half], fmaf(l[half][0], w.of[0][half], sums.chunk_l[half]));
    }
    return w;
}

// A pair's values, half of the channels at a time: while they are added to what the chunk has, the others are
// multiplied.
template <int HD> struct pair_values {
    static constexpr int PAGE = bf16_kv<HD>::BYTES, PARTS = 2, SUMS = HD / PARTS / 2;
    float d[2][SUMS];
    uint64_t v; // both pages, as matrix instructions take them
    const uint32_t (&p)[2][2][4];
    const pair_weights &w;

    // Part i of those of both pages.
    __device__ __forceinline__ void ask(int i) {
        const uint32_t(&a)[4] = p[i / PARTS][0], (&b)[4] = p[i / PARTS][1];
        uint64_t at = v + (uint64_t)((i / PARTS * PAGE + i % PARTS * (HD / PARTS / 8) * 512) >> 4);
        group_fence();
        group_mma(d[i % 2], a[0], b[0], a[1], b[1], at, 0);
        group_mma(d[i % 2], a[2], b[2], a[3], b[3], at + (256 >> 4), 1);
        group_commit();
    }
    __device__ __forceinline__ void add(group_sums<HD> &sums, int i) const {
#pragma unroll
        for (int e = 0; e < SUMS; e++) { // chain_value
            float &of = sums.of[i % PARTS * SUMS / 4 + e / 4][e % 4];
            of = fmaf(d[i % 2][e], w.of[i / PARTS][e % 4 / 2], of);
        }
    }
    // Parts begin to end - 1, of which the first two have been asked for.
    __device__ __forceinline__ void finish(group_sums<HD> &sums, int begin, int end) {
#pragma unroll
        for (int i = begin; i < end; i++) {
            if (i + 1 < end) group_wait<1>(d[i % 2]);
            else group_wait<0>(d[i % 2]);
            add(sums, i);
            if (i + 2 < end) ask(i + 2);
        }
    }
};

// Joins a pair's values. WHOLE, or `second`: the second page's too.
template <int HD, bool WHOLE>
static __device__ __forceinline__ void join_values(group_sums<HD> &sums, const unsigned char *v_pages,
                                                   const uint32_t (&p)[2][2][4], const pair_weights &w, bool second) {
    constexpr int PARTS = pair_values<HD>::PARTS;
    pair_values<HD> values = {{}, group_operand(v_pages, 128, 512), p, w};
    __syncwarp();
    values.ask(0);
    values.ask(1);
    if (WHOLE) {
        values.finish(sums, 0, 2 * PARTS);
        return;
    }
    values.finish(sums, 0, PARTS);
    if (!second) return;
    values.ask(PARTS);
    values.ask(PARTS + 1);
    values.finish(sums, PARTS, 2 * PARTS);
}

template <typename KV, int GROUP>
static __device__ __forceinline__ void put_rows(const attention_params &p, const warp_rows &rows,
                                                const group_sums<KV::HD> &sums, int kv_head, int lane) {
    enum { AT_ONCE = PACKED_COLUMNS / 8 };
    int group = heads_of<GROUP>(p);
    quotients by[2];
    float *out[2];
    unsigned char *packed[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = lane / 4 + 8 * half, token = rows.token + row / group;
        int column = (kv_head * group + row % group) * KV::HD + 2 * (lane % 4);
        by[half].start(rows.position[half] < 0 ? 1.0f : sums.l[half]);
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

// A warp has done with a pair of stages.
template <int HD>
static __device__ __forceinline__ void give_back(group_attention_shared<HD> *sh, ring_place &at, int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&sh->empty[at.pair]);
    at.next();
}

// Pairs that only other groups' rows see.
template <int HD>
static __device__ __forceinline__ void skip_pairs(group_attention_shared<HD> *sh, ring_place &at, int n, int lane) {
#pragma unroll 1
    for (; n > 0; n--) {
        barrier_wait(&sh->ready[at.pair], at.parity);
        give_back(sh, at, lane);
    }
}

// A warp's part of what its group does of a tile's pages: in pairs, as they come. `q`: the warp's rows.
template <typename KV>
static __device__ __forceinline__ void use_pairs(group_attention_shared<KV::HD> *sh, group_sums<KV::HD> &sums,
                                                 const wide_q<KV::HD> &q, const group_rows &r, ring_place &at,
                                                 int n_pairs, int lane) {
    enum { CHUNK_PAIRS = CHUNK_PAGES / 2 };
    constexpr int HD = KV::HD;
    float s[32];
    uint32_t p[2][2][4];
    int pair = 0, n_whole = min(r.whole_pairs, n_pairs - 1);
    auto take_scores = [&] {
        barrier_wait(&sh->ready[at.pair], at.parity);
        ask_scores(s, q, sh->k[2 * at.pair]);
        group_wait<0>(s);
    };
#pragma unroll 1
    for (; pair < n_whole; pair++) {
        take_scores();
        pair_weights w = pair_softmax<HD, true>(p, sums, s, r.rows, 0, lane);
        join_values<HD, true>(sums, sh->v[2 * at.pair], p, w, true);
        give_back(sh, at, lane);
        if (pair % CHUNK_PAIRS == CHUNK_PAIRS - 1) sums.end_chunk(false);
    }
#pragma unroll 1
    for (; pair < n_pairs; pair++) {
        bool is_last = pair + 1 == n_pairs;
        take_scores();
        pair_weights w = pair_softmax<HD, false>(p, sums, s, r.rows, pair * 2 * ATTN_BLOCK, lane);
        join_values<HD, false>(sums, sh->v[2 * at.pair], p, w, 2 * pair + 1 <= r.last_page);
        give_back(sh, at, lane);
        if (is_last || pair % CHUNK_PAIRS == CHUNK_PAIRS - 1) sums.end_chunk(is_last);
    }
}

template <typename KV, int GROUP>
static __device__ __forceinline__ void consume_pages(group_attention_shared<KV::HD> *sh, const attention_params &p,
                                                     const work &w, ring_place &at, int warp, int lane) {
    group_rows r = rows_of<GROUP>(p, w, warp, lane);
    int n_pairs = r.last_page < 0 ? 0 : r.last_page / 2 + 1;
    if (n_pairs > 0) {
        wide_q<KV::HD> q;
        if (p.cos_sin) load_turned<KV::HD, GROUP>(q, &sh->sum[warp][0][0].x, p, r.rows, w.kv_head, lane);
        else q.load(p, r.rows, w.kv_head, lane);
        group_sums<KV::HD> sums;
        sums.start(&sh->sum[warp][0][lane]);
        use_pairs<KV>(sh, sums, q, r, at, n_pairs, lane);
        skip_pairs(sh, at, w.n_pages / 2 - n_pairs, lane);
        put_rows<KV, GROUP>(p, r.rows, sums, w.kv_head, lane);
    } else skip_pairs(sh, at, w.n_pages / 2, lane);
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
