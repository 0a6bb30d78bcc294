// pieces.cu: products of most tokens: tiles of 128 rows by 256 tokens, with a ring that is given back in pieces. A
// slice of such a tile is 96 KB, of which shared memory holds two: given back as a whole, nothing is on its way while
// the last of a slice is multiplied. Here a slice's weights are given back as soon as a matrix instruction has taken
// them (before, their loads may still be under way, and a copy may overtake them), and the tokens of each of its two
// chains, of 128 tokens, when that chain has ended. The arithmetic, and the bits, are those of groups.cu. Each way in
// which a tile ends has a kernel of its own, whose code stays in the SM's cache.
//
// While a tile ends nothing is multiplied. Of many tokens, where results are but rounded and packed, it ends in halves,
// of a chain's tokens each, beside the next chain's matrix instructions: the first half beside the last chain of the
// second one, the second half beside the next tile's first chain.
//
// Who orders what: a producer warp asks for a quarter of a slice's weights and for half of a chain's tokens. A copy
// into a place of the ring is asked for when all eight consumer warps have reported at its `empty` barrier; they do so
// behind the instructions that take the weights, or when the matrix instructions that read the tokens have ended.
#include "ops/cuda/heads.cuh"

typedef group_shape<bf16_weights, 2, 1, 4, 64, 2, 2> shape; // its chains are the parts in which results are written
struct half_shape : shape {
    static constexpr int C = shape::C / 2;
};
enum { CHAINS = 2, N = 128, WEIGHT_BYTES = shape::UNITS * shape::UNIT_BYTES, CHAIN_BYTES = N * SLICE * 2 };
enum { PIECE_BYTES = CHAIN_BYTES / 2 }; // a producer warp's
static_assert((int)CHAINS * 2 == (int)PRODUCERS, "half a chain's tokens a producer warp");
static_assert(shape::STAGES == 2, "slices count stages");

struct piece_ring {
    unsigned char *stages; // a stage: weights, then tokens: [half of the slice][TOKEN_UNITS][HALF_BYTES]
    uint64_t *weights_full, *weights_empty;                   // [STAGES]
    uint64_t (*tokens_full)[CHAINS], (*tokens_empty)[CHAINS]; // [STAGES]
};

// Which tile of rows, and of tokens.
struct tile_place {
    int row, token;
};

// As row_tile and token_tile. Where K and V are stored, a tile of K, and then one of V, comes after every `period` - 1
// of q's: these ends take longer, with little to do for memory and for matrix instructions, and shall not be all SMs'
// at once. `period` 0: in the order of rows.
template <enum ending END>
static __device__ __forceinline__ tile_place place_of_tile(const group_args &a, int period, int tile) {
    int first = tile / (BAND * a.row_tiles) * BAND, wide = min((int)BAND, a.token_tiles - first);
    int within = tile - first * a.row_tiles, row = within / wide, token = first + within - row * wide;
    if (END == END_HEADS && period > 0) {
        int queries = a.p.n_out[0] / HEAD_DIM, turn = row / period, others = a.row_tiles - queries;
        bool is_other = turn < others && row - turn * period == period - 1;
        row = is_other ? queries + turn % 2 * (others / 2) + turn / 2 : row - min(turn, others);
    }
    return {row, token};
}

// Warp `own`. Weights of the first stages are asked for before the kernel before has ended.
template <enum ending END>
static __device__ __forceinline__ void produce_pieces(const group_args &a, const piece_ring &r, int period, int own,
                                                      int lane) {
    constexpr int UNITS = shape::UNITS / PRODUCERS;
    int steps = a.p.columns / SLICE, n_tiles = a.row_tiles * a.token_tiles, mine = own * UNITS + lane;
    int stage = 0, round = 0, filled = 0, ahead = min((int)shape::STAGES, steps);
    size_t half_bytes = (size_t)a.token_units * HALF_BYTES;
    unsigned char *weights_to = r.stages + mine * shape::UNIT_BYTES;
    unsigned char *tokens_to = r.stages + WEIGHT_BYTES + own * (PIECE_BYTES / 2) + (lane - 30) * shape::TOKEN_BYTES;
    for (int tile = (int)blockIdx.x; tile < n_tiles; tile += (int)gridDim.x) {
        tile_place place = place_of_tile<END>(a, period, tile);
        const unsigned char *unit = unit_of<bf16_weights>(a, place.row * (shape::UNITS / 2) + mine / 2, mine % 2);
        const unsigned char *tokens = a.tokens + (size_t)place.token * shape::TOKEN_BYTES + own * (PIECE_BYTES / 2) +
                                      (size_t)(lane - 30) * half_bytes;
        for (int h = 0; h < steps; h++, filled++) {
            auto ask_weights = [&](int at, int slice) {
                if (lane == 0) barrier_expect(&r.weights_full[at], WEIGHT_BYTES / PRODUCERS);
                __syncwarp();
                if (lane < UNITS)
                    bulk_copy(weights_to + at * shape::STAGE, unit + slice * shape::UNIT_BYTES, shape::UNIT_BYTES,
                              &r.weights_full[at]);
            };
            if (filled == 0) {
                for (int i = 0; i < ahead; i++) ask_weights(i, i);
                dependency_wait();
            }
            if (filled >= ahead) {
                if (round > 0) barrier_wait(&r.weights_empty[stage], (uint32_t)(round - 1) & 1);
                ask_weights(stage, h);
            }
            if (round > 0) barrier_wait(&r.tokens_empty[stage][own / 2], (uint32_t)(round - 1) & 1);
            if (lane == 0) barrier_expect(&r.tokens_full[stage][own / 2], PIECE_BYTES);
            __syncwarp();
            if (lane >= 30)
                bulk_copy(tokens_to + stage * shape::STAGE, tokens + (size_t)h * 2 * half_bytes, PIECE_BYTES / 2,
                          &r.tokens_full[stage][own / 2]);
            if (++stage == shape::STAGES) stage = 0, round++;
        }
    }
}

typedef float tile_sums[shape::C][shape::N / 2]; // a thread's
typedef uint32_t slice_weights[8][4];

// What a consumer thread knows.
struct consumer {
    const group_args &a;
    const heads_end &heads;
    const piece_ring &r;
    int period, thread, n; // slices so far
};

// Columns 32 FROM to 32 TO of the n-th slice's weights of this warp's 16 rows, as the instructions take them.
template <int FROM, int TO> static __device__ __forceinline__ void load_weights(slice_weights &w, const consumer &c) {
    int own = (c.thread / 128 * 8 + c.thread / 32 % 4 * 2) * shape::UNIT_BYTES + c.thread % 32 * 16;
    const uint4 *weights = reinterpret_cast<const uint4 *>(c.r.stages + c.n % 2 * shape::STAGE + own);
    if (FROM == 0) barrier_wait(&c.r.weights_full[c.n % 2], (uint32_t)(c.n / 2 % 2));
#pragma unroll
    for (int i = FROM; i < TO; i++) {
        uint4 u = load_staged(weights + i * CHUNK_LANES);
        uint4 v = load_staged(weights + i * CHUNK_LANES + shape::UNIT_BYTES / 16);
        uint32_t *a = w[i * 2];
        a[0] = u.x, a[1] = v.x, a[2] = u.y, a[3] = v.y;
        a[4] = u.z, a[5] = v.z, a[6] = u.w, a[7] = v.w;
    }
}

// Instructions FROM to TO of a chain.
template <int FROM, int TO>
static __device__ __forceinline__ void multiply(float (&d)[N / 2], const slice_weights &w, uint64_t tokens) {
    if (FROM == 0) group_fence();
#pragma unroll
    for (int k = FROM; k < TO; k++) {
        int at = k / 4 * shape::TOKEN_BYTES + k % 4 * 2 * K_STEP;
        group_mma(d, w[k][0], w[k][1], w[k][2], w[k][3], tokens + (uint64_t)(at >> 4), k > 0);
    }
    group_commit();
}

template <int CHAIN, bool FIRST>
static __device__ __forceinline__ void add_chain(tile_sums &total, const float (&d)[N / 2]) {
    float zero = opaque(-0.0f); // -0 + x is x, also for -0; an addition, for a copy might not be one
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        float &sum = total[CHAIN * half_shape::C + i / (shape::N / 2)][i % (shape::N / 2)];
        sum = (FIRST ? zero : sum) + d[i];
    }
}

// A slice; what is to be done beside its first and its second chain. `more`: another one's weights are loaded behind
// it; EARLY: the first of them when half of this one's second chain has taken what they overwrite.
template <bool FIRST, bool EARLY, class BESIDE_FIRST, class BESIDE_SECOND>
static __device__ __forceinline__ void multiply_slice(consumer &c, bool more, tile_sums &total, float (&d)[N / 2],
                                                      slice_weights &w, BESIDE_FIRST beside_first,
                                                      BESIDE_SECOND beside_second) {
    const piece_ring &r = c.r;
    int stage = c.n % 2;
    uint32_t parity = (uint32_t)(c.n / 2 % 2);
    uint64_t tokens = group_operand(r.stages + stage * shape::STAGE + WEIGHT_BYTES, K_STEP, COLUMN_STEP);
    uint64_t second = tokens + (uint64_t)(CHAIN_BYTES / 2 >> 4);
    barrier_wait(&r.tokens_full[stage][0], parity);
    multiply<0, 8>(d, w, tokens);
    __syncwarp(); // all lanes have used what they loaded
    barrier_arrive(&r.weights_empty[stage]);
    beside_first();
    barrier_wait(&r.tokens_full[stage][1], parity);
    group_wait<0>(d);
    barrier_arrive(&r.tokens_empty[stage][0]);
    add_chain<0, FIRST>(total, d);
    if (EARLY) {
        multiply<0, 4>(d, w, second);
        multiply<4, 8>(d, w, second);
        beside_second();
        group_wait_all_but<1>();
        c.n++;
        load_weights<0, 2>(w, c);
        group_wait<0>(d);
        barrier_arrive(&r.tokens_empty[stage][1]);
        load_weights<2, 4>(w, c);
    } else {
        multiply<0, 8>(d, w, second);
        beside_second();
        group_wait<0>(d);
        barrier_arrive(&r.tokens_empty[stage][1]);
        c.n++;
        if (more) load_weights<0, 4>(w, c);
    }
    add_chain<1, FIRST>(total, d);
}

static __device__ __forceinline__ void nothing() {
}

// ---- Tiles that end beside matrix instructions --------------------------------------------------------------------

// Half of a tile's sums. Its place is found here: a register from there to the tile's end would not be there.
template <enum ending END, int HALF>
static __device__ __forceinline__ void finish_half(const consumer &c, int tile, const tile_sums &total) {
    static_assert(END == END_GATED, "others take more registers, or are no faster so");
    int from = opaque(c.thread);
    tile_place place = place_of_tile<END>(c.a, c.period, tile);
    warp_tile w = warp_tile_of<shape>({place.row, place.token, 0, 0, 0}, from);
    w.token += HALF * half_shape::C * shape::N;
    pack_gated<half_shape>(
        c.a, w, from % 32,
        *reinterpret_cast<const float(*)[half_shape::C][shape::N / 2]>(&total[HALF * half_shape::C]));
}

// Of two slices or more.
template <enum ending END> static __device__ __forceinline__ void consume_on(consumer &c) {
    int n_slices = c.a.p.columns / SLICE, n_tiles = c.a.row_tiles * c.a.token_tiles, before = -1;
    tile_sums total;
    float d[N / 2];
    slice_weights w;
    load_weights<0, 4>(w, c);
#pragma unroll 1
    for (int tile = (int)blockIdx.x; tile < n_tiles; tile += (int)gridDim.x) {
        multiply_slice<true, true>(
            c, true, total, d, w,
            [&] {
                if (before >= 0) finish_half<END, 1>(c, before, total);
            },
            nothing);
#pragma unroll 1
        for (int s = 2; s < n_slices; s++) multiply_slice<false, true>(c, true, total, d, w, nothing, nothing);
        multiply_slice<false, false>(c, tile + (int)gridDim.x < n_tiles, total, d, w, nothing, [&] {
            // A branch, for else much of it would be done before the instructions that it is to be beside.
            if (opaque(tile) >= 0) finish_half<END, 0>(c, tile, total);
        });
        before = tile;
    }
    finish_half<END, 1>(c, before, total);
}

// ---- Tiles that end by themselves ---------------------------------------------------------------------------------

// What becomes of a tile's sums. `where`: which tile of rows, and of tokens: known before it is multiplied, for the
// divisions take long.
template <enum ending END>
static __device__ __forceinline__ void finish_piece(const consumer &c, int where, const tile_sums &total) {
    int from = opaque(c.thread), lane = from % 32;
    piece_of_work work = {where >> 16, where & 0xFFFF, 0, 0, 0};
    warp_tile w = warp_tile_of<shape>(work, from);
    float *rooms = reinterpret_cast<float *>(c.r.stages + shape::STAGED_AT), *room = rooms + from / 32 * shape::N * 16;
    if (END == END_HEADS) {
        finish_heads<shape>(c.a, c.heads, w, work.row, rooms, warp_uniform(from / 32), lane, total);
    } else if (END == END_ROWS) {
        write_rows<shape>(c.a, w, 0, lane, total);
    } else if (END == END_ADDED) {
        add_rows<shape>(c.a, w, room, lane, total);
    } else if (END == END_GATED) {
        pack_gated<shape>(c.a, w, lane, total);
    } else {
        ring<shape> staged = {c.r.stages, NULL, NULL, NULL, NULL, NULL};
        finish_tile<shape>(c.a, staged, work, c.thread, total);
    }
}

template <enum ending END, bool EARLY> static __device__ __forceinline__ void consume_apart(consumer &c) {
    int n_slices = c.a.p.columns / SLICE, n_tiles = c.a.row_tiles * c.a.token_tiles;
    for (int tile = (int)blockIdx.x; tile < n_tiles; tile += (int)gridDim.x) {
        tile_place place = place_of_tile<END>(c.a, c.period, tile);
        int where = place.row << 16 | place.token;
        tile_sums total;
        float d[N / 2];
        slice_weights w;
#pragma unroll
        for (int i = 0; i < N; i++) total[i / (shape::N / 2)][i % (shape::N / 2)] = -0.0f; // -0 + x is x, also for -0
        load_weights<0, 4>(w, c);
#pragma unroll 1
        for (int s = EARLY; s < n_slices; s++)
            multiply_slice<false, EARLY>(c, s + 1 < n_slices, total, d, w, nothing, nothing);
        if (EARLY) multiply_slice<false, false>(c, false, total, d, w, nothing, nothing);
        finish_piece<END>(c, where, total);
    }
}

template <enum ending END, bool OF_MANY>
static __global__ void __launch_bounds__(shape::THREADS, 1) k_group_pieces(group_args a, heads_end h, int period) {
#if HOPPER
    DYNAMIC_SHARED(shared);
    __shared__ __align__(8) uint64_t weights_full[shape::STAGES], weights_empty[shape::STAGES];
    __shared__ __align__(8) uint64_t tokens_full[shape::STAGES][CHAINS], tokens_empty[shape::STAGES][CHAINS];
    int thread = (int)threadIdx.x, warp = thread / 32;
    piece_ring r = {shared, weights_full, weights_empty, tokens_full, tokens_empty};
    if (thread == 0) {
        for (int i = 0; i < shape::STAGES; i++) {
            barrier_init_for(&weights_full[i], PRODUCERS);
            barrier_init_for(&weights_empty[i], 32 * shape::WARPS);
            for (int c = 0; c < CHAINS; c++) {
                barrier_init_for(&tokens_full[i][c], 2);
                barrier_init_for(&tokens_empty[i][c], 32 * shape::WARPS);
            }
        }
        barrier_fence();
    }
    consumer c = {a, h, r, period, thread, 0};
    __syncthreads();
    dependents_may_start();
    if (warp >= shape::WARPS) {
        registers_down<24>();
        produce_pieces<END>(a, r, period, warp - shape::WARPS, thread % 32);
    } else {
        registers_up<240>();
        dependency_wait();
        if constexpr (END == END_GATED && OF_MANY) consume_on<END>(c);
        else consume_apart<END, OF_MANY && (END == END_ROWS || END == END_ADDED)>(c);
    }
#endif
}

template <enum ending END, bool OF_MANY>
static void launch_of(struct cuda_state *s, const char *what, const group_args &a, const heads_end &h) {
    size_t tiles = (size_t)a.row_tiles * (size_t)a.token_tiles, most = (size_t)s->n_sms;
    int others = a.row_tiles - a.p.n_out[0] / HEAD_DIM,
        period = END == END_HEADS && a.p.n_tokens >= MANY_TOKENS ? a.row_tiles / others : 0;
    launch_kernel(s, what, k_group_pieces<END, OF_MANY>,
                  {grid_for(tiles < most ? tiles : most), shape::THREADS, shape::SHARED}, a, h, period);
}

template <enum ending END>
static void launch(struct cuda_state *s, const char *what, const group_args &a, const heads_end &h) {
    constexpr bool DIFFER = END == END_ROWS || END == END_ADDED || END == END_GATED;
    if (DIFFER && a.p.n_tokens >= MANY_TOKENS) launch_of<END, DIFFER>(s, what, a, h);
    else launch_of<END, false>(s, what, a, h);
}

bool cuda_piece_product(struct cuda_state *s, const char *what, group_args &a, int rows) {
    a.row_tiles = (rows + shape::ROWS - 1) / shape::ROWS;
    a.token_tiles = (a.p.n_tokens + shape::TOKENS - 1) / shape::TOKENS;
    enum ending ending = all_slices(a) < 2 ? END_ANY : ending_of(a, rows, shape::ROWS);
    // A block's warps are never further apart than a ring, so that none is in the room of the tile before (heads.cuh).
    if (ending == END_ROWS && a.p.heads && all_slices(a) > shape::STAGES) ending = END_HEADS;
    heads_end heads = ending == END_HEADS ? *a.p.heads : heads_end{};
    switch (ending) {
    case END_ROWS: launch<END_ROWS>(s, what, a, heads); break;
    case END_ADDED: launch<END_ADDED>(s, what, a, heads); break;
    case END_GATED: launch<END_GATED>(s, what, a, heads); break;
    case END_HEADS: launch<END_HEADS>(s, what, a, heads); break;
    case END_ANY: launch<END_ANY>(s, what, a, heads); break;
    }
    return ending == END_HEADS;
}

template <enum ending END, bool OF_MANY = false> static void allow(struct cuda_state *s) {
    allow_shared(s, "preparing products", k_group_pieces<END, OF_MANY>, shape::SHARED);
}

void cuda_piece_setup(struct cuda_state *s) {
    allow<END_ANY>(s);
    allow<END_ROWS>(s);
    allow<END_ADDED>(s);
    allow<END_GATED>(s);
    allow<END_HEADS>(s);
    allow<END_ROWS, true>(s);
    allow<END_ADDED, true>(s);
    allow<END_GATED, true>(s);
}
