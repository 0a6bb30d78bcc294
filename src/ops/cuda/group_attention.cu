// group_attention.cu: attention of prompts by Hopper's asynchronous matrix instructions (groups.cuh): two groups of
// four warps have 64 rows each, in wide.cu's order, and every page serves both. The arithmetic is attention.cuh's, and
// wgmma returns the bits of mma.sync (docs/NUMERICS.md). Pages are worked on in pairs, a pair's 64 scores a row at
// once; a pair is masked where some of a group's rows do not see all of it. A chunk's values stay in the registers of
// one matrix instruction, of which eight more columns, ones in shared memory, are its sums. While a pair's p are
// computed, the values of the pair before are multiplied, and the other group's scores and values.
//
// A row keeps one unit, some powers of two above its first scores, until a score is not below it. So all that a pair
// needs of its maxima is whether that is so in any row of the warp.
//
// Blocks stay and take tiles as they come, the long ones first. One warp takes the tiles, tells the others, and has
// pages copied into a ring in shared memory, so that the next tile's pages are there before this one has ended. In bf16
// they are multiplied as they come, in rows of 64 bytes: K with 32 channels a row, V with its columns beside each
// other; another warp clears a last page's slots that are not in use. Pages of eight bits are expanded by three warps,
// into the matrices that wgmma reads: of each 512 bytes (8 slots or channels by 32 columns, matrix.cuh) lane l's four
// words become word l of four matrices of 8 by 8. Such a page comes to the end of its place and is expanded from the
// beginning on, so that what is written never reaches what is still to be read.
//
// Who orders what: a copy's end is waited for at `ready`, or, where a warp is to change the page before, at `arrived`
// (eight bits) or `cut` (unused slots of V; one for each place, since several can be on their way): what that warp has
// written, and fenced for the matrix instructions, it reports at `ready`. A consumer warp whose instructions on a pair
// have ended reports at `empty`, and only then is the next copy into its place asked for. A tile is told at `told`, and
// its place used again when all lanes have read it, which each reports at `taken`. A warp's rows of q come to where it
// keeps the sums of chunks, at `rows`: it asks for them when all its lanes have read, and fenced, the last sums.
#include "ops/cuda/groups.cuh"
#include "ops/cuda/wide.cuh"

enum {
    PAIR = 2, // pages that are worked on at once
    RING_PAIRS = 4,
    STAGES = PAIR * RING_PAIRS, // pages of K, and of V
    PRODUCER_WARPS = 4,
    TURNING_WARPS = PRODUCER_WARPS - 1, // the last one takes tiles and asks for pages
    PLACES = 2,                         // for tiles that have been told
    GROUP_ATTENTION_THREADS = ATTN_THREADS + 32 * PRODUCER_WARPS,
};

// What a block works on: a tile of rows of a KV head.
struct work {
    int kv_head, token, end; // the tile's tokens; kv_head -1: there are no more tiles
    int limit, n_pairs;      // positions that its last row sees; their pages in pairs
    const int32_t *pages;
};

enum { OF_K, OF_V, KINDS };

enum { PAGE_BLOCK = ATTN_BLOCK * 64 }; // bytes of a page's 32 channels

template <int HD> struct group_attention_shared {
    static constexpr int PAGE = bf16_kv<HD>::BYTES; // as it is multiplied
    alignas(512) unsigned char k[STAGES][PAGE];     // in bf16 a pair's 32 channels at a time
    struct {
        unsigned char of[PAGE], ones[PAGE_BLOCK]; // a further block of columns
    } v[STAGES];
    float4 sum[ATTN_WARPS][HD / 8][32];
    work tiles[PLACES];
    uint64_t arrived[KINDS][STAGES], ready[KINDS][RING_PAIRS], empty[KINDS][RING_PAIRS], cut[RING_PAIRS];
    uint64_t told[PLACES], taken[PLACES];
    uint64_t rows[ATTN_WARPS]; // a warp's rows of q have come

    __device__ __forceinline__ unsigned char *page(int kind, int stage) {
        return kind == OF_V ? v[stage].of : k[stage];
    }
};

// ---- Producers ----------------------------------------------------------------------------------------------------

static __device__ __forceinline__ work find_work(const attention_params &p, int tile) {
    work w;
    int heads = p.kv.n_kv_heads, size = p.tile_tokens * ATTN_WARPS;
    w.kv_head = tile % heads;
    int seq = find_tile(p.b, size, p.n_tiles - 1 - tile / heads, w.token);
    w.end = min(w.token + size, p.b.seq_start[seq + 1]);
    w.limit = p.b.position[w.end - 1] + 1;
    w.n_pairs = (w.limit + PAIR * ATTN_BLOCK - 1) / (PAIR * ATTN_BLOCK);
    w.pages = p.b.pages + p.b.page_start[seq];
    return w;
}

// Whether the pair is the tile's last one and its last page is not full.
static __device__ __forceinline__ bool is_cut(const work &w, int pair) {
    return pair == w.n_pairs - 1 && w.limit % ATTN_BLOCK != 0;
}

// Where in its place a page comes to.
template <typename KV> constexpr int PAGE_BEGIN = bf16_kv<KV::HD>::BYTES - KV::BYTES;

// Whether the pages are expanded in shared memory, to another order there.
template <typename KV> constexpr bool TURNED = KV::BYTES != bf16_kv<KV::HD>::BYTES;

// Warps that turn pages, or clear slots.
template <typename KV> constexpr int TURNERS = TURNED<KV> ? TURNING_WARPS : 1;

// Asks for the pages of a pair's K or V that some row sees. `pages`: the lane's of 32 pages' numbers. `number`: of all
// the block's pairs.
template <typename KV>
static __device__ __forceinline__ void ask_pair(group_attention_shared<KV::HD> *sh, const attention_params &p,
                                                const work &w, int kind, int pair, int number, int32_t pages,
                                                int lane) {
    constexpr int BLOCKS = KV::HD / 32;
    int place = number % RING_PAIRS, n = min((int)PAIR, (w.limit + ATTN_BLOCK - 1) / ATTN_BLOCK - pair * PAIR);
    bool in_blocks = !TURNED<KV> && kind == OF_K;
    int i = in_blocks ? lane / BLOCKS : lane, block = in_blocks ? lane % BLOCKS : 0;
    int page = __shfl_sync(~0u, pages, (pair * PAIR + i) % 32), stage = place * PAIR + i;
    const unsigned char *from = head_page(p.kv, kind == OF_V, page, w.kv_head);
    if (number >= RING_PAIRS) barrier_wait(&sh->empty[kind][place], (uint32_t)(number / RING_PAIRS - 1) & 1);
    if (TURNED<KV>) {
        if (i >= PAIR) return;
        barrier_expect(&sh->arrived[kind][stage], i < n ? KV::BYTES : 0);
        if (i < n) bulk_copy(sh->page(kind, stage) + PAGE_BEGIN<KV>, from, KV::BYTES, &sh->arrived[kind][stage]);
        return;
    }
    uint64_t *bar = kind == OF_V && is_cut(w, pair) ? &sh->cut[place] : &sh->ready[kind][place];
    if (lane == 0) barrier_expect(bar, (uint32_t)n * KV::BYTES);
    __syncwarp();
    if (i >= n) return;
    if (kind == OF_V) bulk_copy(sh->v[stage].of, from, KV::BYTES, bar);
    else bulk_copy(sh->k[place * PAIR] + (block * PAIR + i) * PAGE_BLOCK, from + block * PAGE_BLOCK, PAGE_BLOCK, bar);
}

static __device__ __forceinline__ unsigned next_tile(const attention_params &p, int lane) {
    unsigned tile = 0;
    if (lane == 0) tile = atomicAdd(p.arrivals, 1u);
    return __shfl_sync(~0u, tile, 0);
}

// Takes the block's tile i and tells it. Each block is refused one tile; the last to be sets the count back.
template <typename KV>
static __device__ __forceinline__ work tell_tile(group_attention_shared<KV::HD> *sh, const attention_params &p, int i,
                                                 unsigned tile, int lane) {
    unsigned n_tiles = (unsigned)(p.n_tiles * p.kv.n_kv_heads);
    int place = i % PLACES;
    work w = {-1, 0, 0, 0, 0, NULL};
    if (tile < n_tiles) w = find_work(p, (int)tile);
    else if (tile == n_tiles + gridDim.x - 1) *p.arrivals = 0;
    if (i >= PLACES) barrier_wait(&sh->taken[place], (uint32_t)(i / PLACES - 1) & 1);
    if (lane == 0) {
        sh->tiles[place] = w;
        barrier_arrive(&sh->told[place]);
    }
    return w;
}

// One warp of the block: takes tiles until there are no more, each when it has asked for all pages of the one before.
// If it took them earlier, the blocks with the longest tiles would have the longest of the next ones, too.
template <typename KV>
static __device__ __forceinline__ void ask_pages(group_attention_shared<KV::HD> *sh, const attention_params &p,
                                                 int lane) {
    work w = tell_tile<KV>(sh, p, 0, next_tile(p, lane), lane);
    int number = 0;
#pragma unroll 1
    for (int i = 1; w.kv_head >= 0; i++) {
        int n_pages = (w.limit + ATTN_BLOCK - 1) / ATTN_BLOCK;
        int32_t pages = 0;
#pragma unroll 1
        for (int pair = 0; pair < w.n_pairs; pair++, number++) {
            int first = pair * PAIR;
            if (first % 32 == 0) pages = first + lane < n_pages ? w.pages[first + lane] : 0;
            ask_pair<KV>(sh, p, w, OF_K, pair, number, pages, lane);
            ask_pair<KV>(sh, p, w, OF_V, pair, number, pages, lane);
        }
        w = tell_tile<KV>(sh, p, i, next_tile(p, lane), lane);
    }
}

// The block's tile i.
template <typename KV> static __device__ __forceinline__ work take_tile(group_attention_shared<KV::HD> *sh, int i) {
    int place = i % PLACES;
    barrier_wait(&sh->told[place], (uint32_t)(i / PLACES) & 1);
    work w = sh->tiles[place];
    w.kv_head = warp_uniform(w.kv_head);
    w.token = warp_uniform(w.token);
    w.end = warp_uniform(w.end);
    w.limit = warp_uniform(w.limit);
    w.n_pairs = (w.limit + PAIR * ATTN_BLOCK - 1) / (PAIR * ATTN_BLOCK);
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

// A turning warp's pages of a pair: a stage is always the same warp's, which so has seen the stage's last page before
// it waits for the next one.
template <typename KV, int KIND>
static __device__ __forceinline__ void turn_pair(group_attention_shared<KV::HD> *sh, const work &w, int pair,
                                                 int number, int warp, int lane) {
    int place = number % RING_PAIRS;
#pragma unroll 1
    for (int i = 0; i < PAIR; i++) {
        int stage = place * PAIR + i, n = w.limit - (pair * PAIR + i) * ATTN_BLOCK;
        if ((KIND * STAGES + stage) % TURNING_WARPS != warp) continue;
        barrier_wait(&sh->arrived[KIND][stage], (uint32_t)(number / RING_PAIRS) & 1);
        if (n > 0) {
            turn_page<KV, KIND == OF_V>(sh->page(KIND, stage), KIND == OF_V ? n : ATTN_BLOCK, lane);
            before_copies();
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&sh->ready[KIND][place]);
    }
}

// The slots of a page of V from n on become zeros.
template <int HD> static __device__ __forceinline__ void clear_slots(unsigned char *page, int n, int lane) {
    if (lane < n) return;
#pragma unroll
    for (int block = 0; block < HD / 32; block++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            reinterpret_cast<uint4 *>(page + block * PAGE_BLOCK + lane * 64)[i] = make_uint4(0, 0, 0, 0);
}

// A turning warp's part.
template <typename KV>
static __device__ __forceinline__ void turn_pages(group_attention_shared<KV::HD> *sh, int warp, int lane) {
    int number = 0;
    uint32_t parities = 0; // of each place's next page that is cut
#pragma unroll 1
    for (int i = 0;; i++) {
        work w = take_tile<KV>(sh, i);
        if (w.kv_head < 0) return;
        if (TURNED<KV>) {
#pragma unroll 1
            for (int pair = 0; pair < w.n_pairs; pair++, number++) {
                turn_pair<KV, OF_K>(sh, w, pair, number, warp, lane);
                turn_pair<KV, OF_V>(sh, w, pair, number, warp, lane);
            }
            continue;
        }
        number += w.n_pairs;
        if (!is_cut(w, w.n_pairs - 1)) continue;
        int last = (w.limit - 1) / ATTN_BLOCK % PAIR, place = (number - 1) % RING_PAIRS;
        barrier_wait(&sh->cut[place], parities >> place & 1);
        parities ^= 1u << place;
        clear_slots<KV::HD>(sh->v[place * PAIR + last].of, w.limit % ATTN_BLOCK, lane);
        before_copies();
        __syncwarp();
        if (lane == 0) barrier_arrive(&sh->ready[OF_V][place]);
    }
}

// ---- Consumers ----------------------------------------------------------------------------------------------------

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

// A tile's tokens of a warp: the first, and how many. Without any the first is a token of the tile.
static __device__ __forceinline__ warp_rows tokens_of(const attention_params &p, const work &w, int warp) {
    warp_rows r;
    r.token = w.token + warp * p.tile_tokens;
    r.n_tokens = max(0, min(p.tile_tokens, w.end - r.token));
    if (r.n_tokens == 0) r.token = w.token; // what is read for them stands for nothing
    return r;
}

// Asks for a warp's rows of q, as they are, to come to `room`, which the warp has read.
template <int HD, int GROUP>
static __device__ __forceinline__ void ask_rows(float *room, uint64_t *bar, const attention_params &p, const work &w,
                                                int warp, int lane) {
    warp_rows rows = tokens_of(p, w, warp);
    int group = heads_of<GROUP>(p), n = max(rows.n_tokens, 1), bytes = group * HD * 4;
    before_copies();
    if (lane == 0) barrier_expect(bar, (uint32_t)(n * bytes));
    __syncwarp();
    if (lane >= n) return;
    const float *from = p.q + ((size_t)(rows.token + lane) * p.n_heads + (size_t)w.kv_head * group) * HD;
    bulk_copy(room + lane * group * HD, from, (uint32_t)bytes, bar);
}

// What norms and turns a warp's rows of q: asked for before it is needed.
template <int HD> struct row_angles {
    head_registers<HD> norm, turn[ROWS];

    template <int GROUP>
    __device__ __forceinline__ void ask(const attention_params &p, const warp_rows &rows, int lane) {
        int group = heads_of<GROUP>(p), head = 0, token = 0, last = max(rows.n_tokens - 1, 0);
        const float *cos_sin = p.cos_sin + (size_t)rows.token * HD + lane;
        norm = read_head<HD>(p.q_norm, lane);
#pragma unroll
        for (int row = 0; row < ROWS; row++) { // those that there are not are like others
            turn[row] = own_channels<HD>(cos_sin + (size_t)min(token, last) * HD);
            if (++head == group) head = 0, token++;
        }
    }
};

// A warp's rows of q that have been asked for, normed and rotated on the way: through `room`, [16][HD] floats of shared
// memory, where channels come to stand in eights that a row's number turns (against bank conflicts).
template <int HD, int GROUP>
static __device__ __forceinline__ void load_turned(wide_q<HD> &q, float *room, uint64_t *bar, uint32_t parity,
                                                   const attention_params &p, const warp_rows &rows,
                                                   const row_angles<HD> &angles, int lane) {
    constexpr int PAIRS = head_registers<HD>::PAIRS, HALF = HD / 2;
    int group = heads_of<GROUP>(p), head = 0, token = 0, last = max(rows.n_tokens - 1, 0);
    head_registers<HD> x[ROWS];
    barrier_wait(bar, parity);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        x[row] = own_channels<HD>(room + (min(token, last) * group + head) * HD + lane);
        if (++head == group) head = 0, token++;
    }
    __syncwarp(); // all lanes have read them
    if (p.q_norm) {
        float rate = head_rates<HD>(x, p.eps, lane);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float r = __shfl_sync(~0u, rate, 2 * row);
#pragma unroll
            for (int k = 0; k < PAIRS; k++) {
                x[row].lo[k] = x[row].lo[k] * r * angles.norm.lo[k];
                x[row].hi[k] = x[row].hi[k] * r * angles.norm.hi[k];
            }
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        rotate_head<HD>(x[row], angles.turn[row]);
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

// Asks for a group's rows times a pair of pages of K: scores of attention.cuh of the first page and then of the second.
template <typename KV>
static __device__ __forceinline__ void ask_scores(float (&s)[32], const wide_q<KV::HD> &q,
                                                  const unsigned char *k_pages) {
    constexpr int HD = KV::HD;
    uint64_t k = TURNED<KV> ? group_operand(k_pages, 128, HD / 8 * 128) : group_operand_64(k_pages, 16, 512);
#pragma unroll
    for (int i = 0; i < HD / 16; i++) {
        int at = TURNED<KV> ? i * 2 * 128 : i / 2 * PAIR * PAGE_BLOCK + i % 2 * 32;
        const uint32_t *a = &q.of[i / 2][i % 2 * 4];
        group_mma(s, a[0], a[1], a[2], a[3], k + (uint64_t)(at >> 4), i > 0);
    }
}

// What a warp's two rows a lane have so far. Chunks join in a row's one unit, by additions: the bits are
// attention.cuh's, but for sums 2^90 times smaller than the others.
template <int HD> struct group_sums {
    float unit[2], l[2];  // l: of the chunks before this one
    float of[HD / 2 + 4]; // the chunk's values, and, four times, its sums: of the ones
    float4 *all;          // values of the chunks before, in shared memory: [HD / 8][32], the lane's first
    bool any;             // there are chunks before
    bool is_raised;       // some of the warp's units, above those that all this is in
    float raised[2];      // what it is to be multiplied by

    __device__ __forceinline__ void start(float4 *room, const warp_rows &rows) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unit[half] = rows.position[half] < 0 ? 1.0f : NO_UNIT;
            l[half] = 0;
        }
        all = room;
        any = is_raised = false;
#pragma unroll
        for (int i = 0; i < HD / 2 + 4; i++) of[i] = 0;
    }
    // Raises the units of rows that have lifted scores not below them.
    __device__ __forceinline__ void raise(const float (&s)[32]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m = NO_UNIT;
#pragma unroll
            for (int i = 0; i < 32; i += 4) m = fmaxf(m, fmaxf(s[i + 2 * half], s[i + 2 * half + 1]));
            m = row_unit(m);
            raised[half] = raise_unit(unit[half], m < unit[half] ? NO_UNIT : m + UNIT_RANGE);
        }
        is_raised = true;
    }
    // Everything in the new units.
    __device__ __forceinline__ void change_units() {
#pragma unroll
        for (int half = 0; half < 2; half++) l[half] *= raised[half];
#pragma unroll
        for (int i = 0; i < HD / 2 + 4; i++) of[i] *= raised[i % 4 / 2];
        if (any) {
#pragma unroll
            for (int i = 0; i < HD / 8; i++) {
                float4 v = all[i * 32];
                all[i * 32] = make_float4(v.x * raised[0], v.y * raised[0], v.z * raised[1], v.w * raised[1]);
            }
        }
        is_raised = false;
    }
    // The chunk joins those before it. After the last one the results stay in `of` and `l`.
    __device__ __forceinline__ void end_chunk(bool is_last) {
        l[0] += of[HD / 2];
        l[1] += of[HD / 2 + 2];
        if (any) {
#pragma unroll
            for (int i = 0; i < HD / 8; i++) {
                float4 v = all[i * 32];
                of[4 * i] += v.x, of[4 * i + 1] += v.y, of[4 * i + 2] += v.z, of[4 * i + 3] += v.w;
            }
        }
        if (is_last) return;
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
            all[i * 32] = make_float4(of[4 * i], of[4 * i + 1], of[4 * i + 2], of[4 * i + 3]);
        any = true;
    }
};

// Scores beyond the lane's rows' own positions: -inf. The pair begins at position `first`.
static __device__ __forceinline__ void mask_scores(float (&s)[32], const warp_rows &rows, int first, int lane) {
#pragma unroll
    for (int i = 0; i < 32; i++)
        if (first + i / 4 * 8 + lane % 4 * 2 + i % 2 > rows.position[i % 4 / 2]) s[i] = MINUS_INFINITY;
}

// Scores become p, not yet rounded. Lifted scores that are not negative are in order as integers, too; units that are
// not positive are raised anyway.
template <int HD> static __device__ __forceinline__ void weigh_scores(float (&s)[32], group_sums<HD> &sums) {
    int most[2];
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] += LIFT;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        most[half] = max(__float_as_int(s[2 * half]), __float_as_int(s[2 * half + 1]));
#pragma unroll
        for (int i = 4; i < 32; i += 4)
            most[half] = __vimax3_s32(most[half], __float_as_int(s[i + 2 * half]), __float_as_int(s[i + 2 * half + 1]));
    }
    bool above = most[0] >= __float_as_int(sums.unit[0]) || most[1] >= __float_as_int(sums.unit[1]) ||
                 !(fminf(sums.unit[0], sums.unit[1]) > 0);
    if (__any_sync(~0u, above)) sums.raise(s);
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] = exp2_fast(s[i] - sums.unit[i % 4 / 2]);
}

// Asks for a pair's p times its pages of V and the ones after them, from step FROM on to TO of four, two a page. `add`:
// to the chunk's values.
template <typename KV, int FROM, int TO>
static __device__ __forceinline__ void ask_values(float (&of)[KV::HD / 2 + 4], const uint32_t (&p)[16],
                                                  group_attention_shared<KV::HD> *sh, int stage, bool add) {
    constexpr int PAGE = (int)sizeof sh->v[0];
    uint64_t v =
        TURNED<KV> ? group_operand(sh->v[stage].of, 128, 512) : group_operand_64(sh->v[stage].of, PAGE_BLOCK, 512);
    auto step = [&](int i, uint32_t adds) {
        uint64_t at = v + (uint64_t)((i / 2 * PAGE + i % 2 * (TURNED<KV> ? 256 : 16 * 64)) >> 4);
        group_mma_across<!TURNED<KV>>(of, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], at, adds);
    };
#pragma unroll
    for (int i = FROM; i < TO; i++) step(i, i > 0 || add);
}

// Which pair of stages is next.
struct pair_place {
    int pair;
    uint32_t parity;

    __device__ __forceinline__ pair_place next() const {
        return pair + 1 == RING_PAIRS ? pair_place{0, parity ^ 1} : pair_place{pair + 1, parity};
    }
};

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
                x[j][e] = sums.of[4 * (i + j) + e];
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
    int group = heads_of<GROUP>(p), behind = w.limit - w.end; // a sequence's positions follow each other
    int first = w.token + warp / 4 * 4 * p.tile_tokens, last = min(first + 4 * p.tile_tokens, w.end) - 1;
    r.rows = tokens_of(p, w, warp);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = (lane / 4 + 8 * half) / group;
        r.rows.position[half] = row < r.rows.n_tokens ? behind + r.rows.token + row : -1;
    }
    r.last_page = first < w.end ? (behind + last) / ATTN_BLOCK : -1;
    r.whole_pairs = first < w.end ? (behind + first + 1) / (PAIR * ATTN_BLOCK) : 0;
    return r;
}

// Which pairs of K and of V a warp comes to next.
struct pair_places {
    pair_place of[KINDS];
};

// A warp waits for a pair's K or V: its first stage.
template <int HD>
static __device__ __forceinline__ int wait_for(group_attention_shared<HD> *sh, int kind, const pair_place &at) {
    barrier_wait(&sh->ready[kind][at.pair], at.parity);
    return at.pair * PAIR;
}

// A warp has done with the pair before.
template <int HD>
static __device__ __forceinline__ void give_back(group_attention_shared<HD> *sh, int kind, pair_place &at, int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&sh->empty[kind][at.pair]);
    at = at.next();
}

// Pairs that only other groups' rows see.
template <int HD>
static __device__ __forceinline__ void skip_pairs(group_attention_shared<HD> *sh, pair_places &at, int n, int lane) {
#pragma unroll 1
    for (; n > 0; n--) {
#pragma unroll
        for (int kind = 0; kind < KINDS; kind++) {
            wait_for(sh, kind, at.of[kind]);
            give_back(sh, kind, at.of[kind], lane);
        }
    }
}

// A warp's part of what its group does of a tile's pairs, as they come. `q`: the warp's rows.
template <typename KV> struct pair_loop {
    static constexpr int HD = KV::HD, CHUNK_PAIRS = CHUNK_PAGES / PAIR;
    group_attention_shared<HD> *sh;
    group_sums<HD> &sums;
    const wide_q<HD> &q;
    const group_rows &r;
    pair_places &at;
    int n_pairs, lane;

    __device__ __forceinline__ void weigh(float (&s)[32], int pair) const {
        if (pair >= r.whole_pairs) mask_scores(s, r.rows, pair * PAIR * ATTN_BLOCK, lane);
        weigh_scores<HD>(s, sums);
    }
    static __device__ __forceinline__ void round(uint32_t (&p)[16], const float (&s)[32]) {
#pragma unroll
        for (int i = 0; i < 16; i++) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
    }
    // The first pair's scores become p. `k` and `v` are the stages that are multiplied next.
    __device__ __forceinline__ void begin(float (&s)[32], int &k, int &v) const {
        k = wait_for(sh, OF_K, at.of[OF_K]);
        __syncwarp();
        group_fence();
        ask_scores<KV>(s, q, sh->k[k]);
        group_commit();
        v = wait_for(sh, OF_V, at.of[OF_V]);
        if (n_pairs > 1) k = wait_for(sh, OF_K, at.of[OF_K].next());
        group_wait<0>(s);
        give_back(sh, OF_K, at.of[OF_K], lane);
        weigh(s, 0);
        sums.is_raised = false; // nothing stands in the units before
    }
    // Pages are waited for while the scores are, so that nothing is between p and the next instructions.
    __device__ __forceinline__ void run() const {
        float s[32];
        uint32_t p[16];
        int k, v;
        begin(s, k, v);
        round(p, s);
#pragma unroll 1
        for (int pair = 0; pair + 1 < n_pairs; pair++) {
            group_fence();
            ask_scores<KV>(s, q, sh->k[k]);
            group_commit();
            ask_values<KV, 0, 4>(sums.of, p, sh, v, pair % CHUNK_PAIRS > 0);
            group_commit();
            if (pair + 2 < n_pairs) k = wait_for(sh, OF_K, at.of[OF_K].next());
            v = wait_for(sh, OF_V, at.of[OF_V].next());
            group_wait<1>(s);
            give_back(sh, OF_K, at.of[OF_K], lane);
            weigh(s, pair + 1);
            group_wait<0>(sums.of);
            give_back(sh, OF_V, at.of[OF_V], lane);
            if (sums.is_raised) sums.change_units();
            if (pair % CHUNK_PAIRS == CHUNK_PAIRS - 1) sums.end_chunk(false);
            round(p, s);
        }
        group_fence();
        ask_values<KV, 0, 2>(sums.of, p, sh, v, (n_pairs - 1) % CHUNK_PAIRS > 0);
        if (PAIR * n_pairs - 1 <= r.last_page) { // the second page is there
            group_fence();
            ask_values<KV, 2, 4>(sums.of, p, sh, v, true);
        }
        group_commit();
        group_wait<0>(sums.of);
        give_back(sh, OF_V, at.of[OF_V], lane);
        sums.end_chunk(true);
    }
};

// The block's tile i, of which a warp asks for its rows of q.
template <typename KV, int GROUP>
static __device__ __forceinline__ work take_tile_and_ask(group_attention_shared<KV::HD> *sh, const attention_params &p,
                                                         int i, group_rows &r, row_angles<KV::HD> &angles, int warp,
                                                         int lane) {
    work w = take_tile<KV>(sh, i);
    if (w.kv_head < 0) return w;
    r = rows_of<GROUP>(p, w, warp, lane);
    if (p.cos_sin) {
        ask_rows<KV::HD, GROUP>(&sh->sum[warp][0][0].x, &sh->rows[warp], p, w, warp, lane);
        angles.template ask<GROUP>(p, r.rows, lane);
    }
    return w;
}

template <typename KV, int GROUP>
static __device__ __forceinline__ void consume_tiles(group_attention_shared<KV::HD> *sh, const attention_params &p,
                                                     int warp, int lane) {
    pair_places at = {};
    group_rows r = {}, next = {};
    row_angles<KV::HD> angles;
    work w = take_tile_and_ask<KV, GROUP>(sh, p, 0, r, angles, warp, lane);
#pragma unroll 1
    for (int i = 0; w.kv_head >= 0; i++) {
        group_sums<KV::HD> sums;
        int n_pairs = r.last_page < 0 ? 0 : r.last_page / PAIR + 1, kv_head = w.kv_head;
        wide_q<KV::HD> q;
        if (p.cos_sin)
            load_turned<KV::HD, GROUP>(q, &sh->sum[warp][0][0].x, &sh->rows[warp], (uint32_t)i & 1, p, r.rows, angles,
                                       lane);
        else q.load(p, r.rows, kv_head, lane);
        sums.start(&sh->sum[warp][0][lane], r.rows);
        if (n_pairs > 0) pair_loop<KV>{sh, sums, q, r, at, n_pairs, lane}.run();
        skip_pairs(sh, at, w.n_pairs - n_pairs, lane);
        w = take_tile_and_ask<KV, GROUP>(sh, p, i + 1, next, angles, warp, lane);
        if (n_pairs > 0) put_rows<KV, GROUP>(p, r.rows, sums, kv_head, lane);
        r = next;
    }
}

template <typename KV> static __device__ __forceinline__ void start_barriers(group_attention_shared<KV::HD> *sh) {
    for (int kind = 0; kind < KINDS; kind++) {
        for (int i = 0; i < STAGES; i++) barrier_init_for(&sh->arrived[kind][i], 1);
        for (int i = 0; i < RING_PAIRS; i++) {
            barrier_init_for(&sh->ready[kind][i], TURNED<KV> ? PAIR : 1);
            barrier_init_for(&sh->empty[kind][i], ATTN_WARPS);
        }
    }
    for (int i = 0; i < PLACES; i++) {
        barrier_init_for(&sh->told[i], 1);
        barrier_init_for(&sh->taken[i], 32 * (ATTN_WARPS + TURNERS<KV>));
    }
    for (int i = 0; i < RING_PAIRS; i++) barrier_init_for(&sh->cut[i], 1);
    for (int i = 0; i < ATTN_WARPS; i++) barrier_init_for(&sh->rows[i], 1);
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
    if (thread == 0) start_barriers<KV>(sh);
    for (int i = thread; i < STAGES * PAGE_BLOCK / 16; i += GROUP_ATTENTION_THREADS)
        reinterpret_cast<uint4 *>(sh->v[i / (PAGE_BLOCK / 16)].ones)[i % (PAGE_BLOCK / 16)] =
            make_uint4(ONES, ONES, ONES, ONES);
    before_copies();
    __syncthreads();
    dependency_wait();
    if (warp >= ATTN_WARPS) {
        registers_down<40>();
        if (warp < ATTN_WARPS + TURNERS<KV>) turn_pages<KV>(sh, warp - ATTN_WARPS, lane);
        else if (warp == ATTN_WARPS + TURNING_WARPS) ask_pages<KV>(sh, p, lane);
    } else {
        registers_up<232>();
        consume_tiles<KV, GROUP>(sh, p, warp, lane);
    }
#endif
}

// ---- Launcher -----------------------------------------------------------------------------------------------------

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
    allow_shared(s, "preparing attention", k_group_attention<KV, GROUP>, sizeof(group_attention_shared<KV::HD>));
}

template <typename KV> static void allow(struct cuda_state *s) {
    allow_for<KV, 0>(s);
    allow_for<KV, 2>(s);
    allow_for<KV, 4>(s);
}

void cuda_load_group_attention(struct cuda_state *s, bool is_fp8, int head_dim) {
    if (head_dim == 128) is_fp8 ? allow<fp8_kv<128>>(s) : allow<bf16_kv<128>>(s);
    else if (head_dim == 64) is_fp8 ? allow<fp8_kv<64>>(s) : allow<bf16_kv<64>>(s);
}
