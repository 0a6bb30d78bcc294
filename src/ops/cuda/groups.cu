// groups.cu: products for many tokens by Hopper's asynchronous matrix instructions (group_kernel.cuh), with bf16
// weights: a slice of 128 columns is one chain of eight instructions from +0; a finished chain is added to the total
// while the next one runs. It also packs tokens and chooses among tiles. The bits are those of products.cu's kernels.
#include "ops/cuda/parts.cuh"
#include "ops/cuda/results.cuh"

typedef group_shape<bf16_weights, 1, 1, 1, 32, 4, 4> shape_64x32;
typedef group_shape<bf16_weights, 1, 1, 1, 64, 3, 3> shape_64x64;
typedef group_shape<bf16_weights, 1, 2, 1, 64, 4, 4> shape_64x128;
typedef group_shape<bf16_weights, 2, 1, 1, 64, 4, 4> shape_128x64;
typedef group_shape<bf16_weights, 2, 1, 2, 64, 3, 3> shape_128x128;
typedef group_shape<bf16_weights, 2, 1, 3, 64, 2, 2> shape_128x192;
// Most of a tile's weights ahead of its tokens.
typedef group_shape<bf16_weights, 1, 1, 1, 32, 8, 4> shape_64x32_deep;
typedef group_shape<bf16_weights, 1, 1, 1, 64, 8, 3> shape_64x64_deep;
// Shared by two blocks.
typedef group_shape<bf16_weights, 1, 1, 1, 32, 5, 4, 12> shape_pair;

// ---- Packing ------------------------------------------------------------------------------------------------------

static __device__ __forceinline__ float add_squares(float s, float4 v) {
    s = fmaf(v.x, v.x, s);
    s = fmaf(v.y, v.y, s);
    s = fmaf(v.z, v.z, s);
    return fmaf(v.w, v.w, s);
}

static __device__ __forceinline__ void put_packed(unsigned char *packed, int token, int k, int token_units, float4 v) {
    *reinterpret_cast<uint2 *>(packed + packed_at(token, k, token_units)) =
        make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}

// A block a token, rounded as it is; columns up to a whole slice become zero.
static __global__ void k_pack_tokens(product_args p, unsigned char *packed, int token_units) {
    dependents_may_start();
    dependency_wait();
    int i = (int)blockIdx.x;
    const float *x = input_row(p, i);
    for (int k = 4 * (int)threadIdx.x; k < p.columns; k += 4 * NORM_THREADS)
        put_packed(packed, i, k, token_units, load4(x, k, p.n_in));
}

// The same, normed. The norm's weights are asked for before the kernel before has ended, and the first columns are
// read once.
static __global__ void __launch_bounds__(NORM_THREADS, 6)
    k_norm_tokens(product_args p, unsigned char *packed, int token_units) {
    enum { AT_ONCE = 4 * NORM_THREADS, PIECES = 2 }; // columns; so many of these are held
    __shared__ float sums[NORM_WARPS];
    int i = (int)blockIdx.x, first = 4 * (int)threadIdx.x;
    float4 v[PIECES], n[PIECES];
    dependents_may_start();
#pragma unroll
    for (int c = 0; c < PIECES; c++) n[c] = load4(p.norm, first + c * AT_ONCE, p.n_in);
    dependency_wait();
    const float *x = input_row(p, i);
    float s = 0; // as norm_partial
#pragma unroll
    for (int c = 0; c < PIECES; c++) v[c] = load4(x, first + c * AT_ONCE, p.n_in);
#pragma unroll
    for (int c = 0; c < PIECES; c++)
        if (first + c * AT_ONCE < p.n_in) s = add_squares(s, v[c]);
#pragma unroll 1
    for (int k = first + PIECES * AT_ONCE; k < p.n_in; k += AT_ONCE) s = add_squares(s, load4(x, k, p.n_in));
    s = warp_sum(s);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = s;
    __syncthreads();
    float r = norm_rate(sums, p.n_in, p.eps);
#pragma unroll
    for (int c = 0; c < PIECES; c++)
        if (first + c * AT_ONCE < p.columns)
            put_packed(packed, i, first + c * AT_ONCE, token_units, scale4(v[c], r, n[c]));
#pragma unroll 1
    for (int k = first + PIECES * AT_ONCE; k < p.columns; k += AT_ONCE)
        put_packed(packed, i, k, token_units, scale4(load4(x, k, p.n_in), r, load4(p.norm, k, p.n_in)));
}

// Eight tokens a block, a warp each, where there are many: whole units are written at once. A lane sums squares in the
// place of eight threads of norm_partial.
template <bool NORM> static __global__ void k_pack_units(product_args p, unsigned char *packed, int token_units) {
    enum { AT_ONCE = 4 * NORM_THREADS, PIECE = 16 }; // columns; bytes
    __shared__ __align__(16) unsigned char unit[AT_ONCE * UNIT_ROWS * 2];
    dependents_may_start();
    dependency_wait();
    int thread = (int)threadIdx.x, lane = thread % 32, slot = thread / 32, i = (int)blockIdx.x * UNIT_ROWS + slot;
    const float *x = input_row(p, min(i, p.n_tokens - 1));
    float4 v[NORM_WARPS];
    float r = 1.0f;
    auto load = [&](int base) {
#pragma unroll
        for (int w = 0; w < NORM_WARPS; w++) v[w] = load4(x, base + (w * 32 + lane) * 4, i < p.n_tokens ? p.n_in : 0);
    };
    if (NORM) {
        float s[NORM_WARPS] = {};
        for (int base = 0; base < p.n_in; base += AT_ONCE) {
            load(base);
#pragma unroll
            for (int w = 0; w < NORM_WARPS; w++) {
                if (base + (w * 32 + lane) * 4 < p.n_in) s[w] = add_squares(s[w], v[w]);
            }
        }
#pragma unroll
        for (int w = 0; w < NORM_WARPS; w++) s[w] = warp_sum(s[w]);
        r = norm_rate(s, p.n_in, p.eps);
    }
    for (int base = 0; base < p.columns; base += AT_ONCE) {
        if (!NORM || p.n_in > AT_ONCE) load(base);
#pragma unroll
        for (int w = 0; w < NORM_WARPS; w++) {
            int k = (w * 32 + lane) * 4, matrix = k % HALF / 8;
            float4 y = NORM ? scale4(v[w], r, load4(p.norm, base + k, p.n_in)) : v[w];
            *reinterpret_cast<uint2 *>(unit + k / HALF * HALF_BYTES + matrix * K_STEP + (slot ^ matrix) * PIECE +
                                       k % 8 * 2) = make_uint2(pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
        }
        __syncthreads();
        for (int at = thread * PIECE; at < AT_ONCE * UNIT_ROWS * 2; at += NORM_THREADS * PIECE) {
            int half = at / HALF_BYTES, matrix = at % HALF_BYTES / K_STEP, row = at % K_STEP / PIECE;
            if (base + half * HALF >= p.columns) break;
            *reinterpret_cast<uint4 *>(packed + ((size_t)(base / HALF + half) * token_units + blockIdx.x) * HALF_BYTES +
                                       at % HALF_BYTES) =
                *reinterpret_cast<const uint4 *>(unit + half * HALF_BYTES + matrix * K_STEP + (row ^ matrix) * PIECE);
        }
        __syncthreads();
    }
}

template <bool NORM>
static void pack(struct cuda_state *s, const char *what, const product_args &p, unsigned char *packed,
                 int token_units) {
    enum { MANY = 1024 };
    size_t units = ((size_t)p.n_tokens + UNIT_ROWS - 1) / UNIT_ROWS;
    if (p.n_tokens >= MANY)
        launch_kernel(s, what, k_pack_units<NORM>, {grid_for(units), NORM_THREADS, 0}, p, packed, token_units);
    else
        launch_kernel(s, what, NORM ? k_norm_tokens : k_pack_tokens, {grid_for((size_t)p.n_tokens), NORM_THREADS, 0}, p,
                      packed, token_units);
}

// ---- A slice of bf16 weights
// ----

// A slice's weights of this warp's 16 rows, as the instructions take them, and where its tokens are.
struct slice {
    uint32_t a[8][4];
    uint64_t tokens;
};

// Which part of a stage is a warp's, in bytes.
struct share {
    int weights, tokens;
};

template <class S> static __device__ __forceinline__ share share_of(int thread) {
    int group = thread / 128;
    return {(group % S::WM * 8 + thread / 32 % 4 * 2) * S::UNIT_BYTES + thread % 32 * 16,
            group / S::WM * S::C * S::N / 8 * HALF_BYTES};
}

// A consumer's places in the rings: the next weights, the next tokens, and the next tokens to be given back.
struct places {
    position weights, tokens, last;
};

template <class S>
static __device__ __forceinline__ void load_slice(slice &s, const ring<S> &r, places &at, const share &own) {
    const uint4 *weights = reinterpret_cast<const uint4 *>(r.weights(at.weights.stage) + own.weights);
    barrier_wait(&r.weights_full[at.weights.stage], (uint32_t)at.weights.round & 1);
#pragma unroll
    for (int c = 0; c < SLICE / 32; c++) {
        uint4 u = load_staged(weights + c * CHUNK_LANES);
        uint4 v = load_staged(weights + c * CHUNK_LANES + S::UNIT_BYTES / 16);
        uint32_t *a = s.a[c * 2];
        a[0] = u.x, a[1] = v.x, a[2] = u.y, a[3] = v.y;
        a[4] = u.z, a[5] = v.z, a[6] = u.w, a[7] = v.w;
    }
    s.tokens = group_operand(r.tokens(at.tokens.stage) + own.tokens, K_STEP, COLUMN_STEP);
    if (S::APART) barrier_wait(&r.tokens_full[at.tokens.stage], (uint32_t)at.tokens.round & 1);
    at.weights.advance<S::AHEAD>();
    at.tokens.advance<S::STAGES>();
}

template <class S> static __device__ __forceinline__ void give_back(const ring<S> &r, places &at) {
    __syncwarp(); // all lanes have waited for what reads it
    barrier_arrive(&r.tokens_empty[at.last.stage]);
    at.last.advance<S::STAGES>();
}

// One chain: a slice of one of the group's chains of tokens.
template <class S> static __device__ __forceinline__ void multiply(float (&d)[S::N / 2], const slice &s, int chain) {
    group_fence();
#pragma unroll
    for (int k = 0; k < 8; k++) {
        int at = chain * (S::N / 8) * COLUMN_STEP + k / 4 * S::TOKEN_BYTES + k % 4 * 2 * K_STEP;
        group_mma(d, s.a[k][0], s.a[k][1], s.a[k][2], s.a[k][3], s.tokens + (uint64_t)(at >> 4), k > 0);
    }
    group_commit();
}

// The first chain of the slice that was loaded last. Its weights' stage is given back only now: until a matrix
// instruction takes what was loaded, it may not have come.
template <class S>
static __device__ __forceinline__ void begin_slice(const ring<S> &r, float (&d)[S::N / 2], const slice &s,
                                                   const places &at) {
    int used = (at.weights.stage > 0 ? at.weights.stage : S::AHEAD) - 1;
    multiply<S>(d, s, 0);
    if (!S::APART) return; // until the tokens' is
    __syncwarp();          // all lanes have used it
    barrier_arrive(&r.weights_empty[used]);
}

template <class S, int P>
static __device__ __forceinline__ void add_chain(float (&total)[S::N / 2], float (&d)[S::N / 2]) {
    group_wait<P>(d);
#pragma unroll
    for (int i = 0; i < S::N / 2; i++) total[i] += d[i];
}

// One slice; meanwhile the next one's weights are loaded. With a single chain a slice, it stays under way while the
// slice before is added.
template <class S>
static __device__ __forceinline__ void step(const ring<S> &r, float (&total)[S::C][S::N / 2], float (&d)[S::N / 2],
                                            float (&other)[S::N / 2], const slice &now, slice &following, places &at,
                                            bool more, bool is_first, const share &own) {
    begin_slice<S>(r, d, now, at);
    if constexpr (S::C == 1) {
        add_chain<S, 1>(total[0], other);
        if (!is_first) give_back<S>(r, at);
        if (more) load_slice<S>(following, r, at, own);
    } else {
        multiply<S>(other, now, 1);
        if (more) load_slice<S>(following, r, at, own);
        add_chain<S, 1>(total[0], d);
        add_chain<S, 0>(total[1], other);
        give_back<S>(r, at);
    }
}

struct bf16_consumer {
    template <class S> static __device__ __forceinline__ void run(const group_args &a, const ring<S> &r, int thread) {
        int lane = thread % 32;
        share own = share_of<S>(thread);
        int n_pieces = all_pieces(a);
        places at = {};
        for (int piece = (int)blockIdx.x; piece < n_pieces; piece += (int)gridDim.x) {
            piece_of_work w = piece_at(a, piece);
            int n_slices = w.n;
            old_rows<S::N> old; // with one chain a group there are registers for it from here on
            if constexpr (S::C == 1) old.ask(a, warp_tile_of<S>(w, thread), 0, lane);
            float total[S::C][S::N / 2], d0[S::N / 2], d1[S::N / 2];
#pragma unroll
            for (int i = 0; i < S::N / 2; i++) {
                d0[i] = d1[i] = -0.0f;
#pragma unroll
                for (int c = 0; c < S::C; c++) total[c][i] = -0.0f; // -0 + x is x, also for -0
            }
            if constexpr (S::C > 2) {
                // No register is left for a second chain: the other group's runs while this one adds.
                slice now;
                for (int s = 0; s < n_slices; s++) {
                    load_slice<S>(now, r, at, own);
#pragma unroll
                    for (int c = 0; c < S::C; c++) {
                        if (c == 0) begin_slice<S>(r, d0, now, at);
                        else multiply<S>(d0, now, c);
                        add_chain<S, 0>(total[c], d0);
                    }
                    give_back<S>(r, at);
                }
            } else {
                slice even, odd;
                load_slice<S>(even, r, at, own);
                for (int s = 0; s < n_slices; s += 2) {
                    bool more = s + 1 < n_slices;
                    step<S>(r, total, d0, d1, even, odd, at, more, s == 0, own);
                    if (!more) break;
                    if constexpr (S::C == 2) step<S>(r, total, d0, d1, odd, even, at, s + 2 < n_slices, false, own);
                    else step<S>(r, total, d1, d0, odd, even, at, s + 2 < n_slices, false, own);
                }
                if constexpr (S::C == 1) {
                    if (n_slices % 2 == 0) add_chain<S, 0>(total[0], d1);
                    else add_chain<S, 0>(total[0], d0);
                    give_back<S>(r, at);
                }
            }
            int from = opaque(thread);
            if constexpr (S::C > 1) old.ask(a, warp_tile_of<S>(w, from), 0, from % 32);
            if (!finish_whole<S>(a, w, from, old, total)) finish_tile<S>(a, r, w, thread, total);
        }
    }
};

// A tile whose slices the blocks of a cluster share: the first adds its own up and hands the sums on; the others keep
// those of their slices apart until the sums of all slices before have come, and then add them, too. Only a thread's
// own sums pass: all blocks hold a tile's elements in the same places.
struct sharing_consumer {
    // A thread's sums of the slices that its block has.
    template <class S> struct sums {
        static constexpr int QUADS = S::N / 8, ALL = S::WARPS * 32;
        bool adds;    // in `total`; else they are kept apart
        float4 *held; // [slices][QUADS][ALL], this thread's first
        float total[1][S::N / 2];

        __device__ __forceinline__ void take(const float (&d)[S::N / 2], int slice) {
#pragma unroll
            for (int i = 0; i < S::N / 2; i++) total[0][i] = adds ? total[0][i] + d[i] : total[0][i];
#pragma unroll
            for (int i = 0; !adds && i < QUADS; i++)
                held[(slice * QUADS + i) * ALL] = make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]);
        }
        // The sums before, and behind them those of `n` slices.
        __device__ __forceinline__ void follow(const float4 *before, int n) {
#pragma unroll
            for (int i = 0; i < QUADS; i++) {
                float4 v = before[i * ALL];
#pragma unroll 4
                for (int slice = 0; slice < n; slice++) v = add4(v, held[(slice * QUADS + i) * ALL]);
                total[0][4 * i] = v.x, total[0][4 * i + 1] = v.y, total[0][4 * i + 2] = v.z, total[0][4 * i + 3] = v.w;
            }
        }
    };

    // Slice `index`, and the sums of the one before while it is under way; meanwhile the next one's weights are loaded.
    template <class S>
    static __device__ __forceinline__ void step(const ring<S> &r, sums<S> &all, float (&d)[S::N / 2],
                                                float (&before)[S::N / 2], const slice &now, slice &following,
                                                places &at, int index, int n, const share &own) {
        begin_slice<S>(r, d, now, at);
        group_wait<1>(before);
        if (index > 0) {
            give_back<S>(r, at);
            all.take(before, index - 1);
        }
        if (index + 1 < n) load_slice<S>(following, r, at, own);
    }

    template <class S>
    static __device__ __forceinline__ void last(const ring<S> &r, sums<S> &all, float (&d)[S::N / 2], places &at,
                                                int index) {
        group_wait<0>(d);
        give_back<S>(r, at);
        all.take(d, index);
    }

    template <class S> static __device__ __forceinline__ void run(const group_args &a, const ring<S> &r, int thread) {
        static_assert(S::C == 1, "one chain a group");
        share own = share_of<S>(thread);
        piece_of_work w = piece_at(a, (int)blockIdx.x);
        float4 *inbox = reinterpret_cast<float4 *>(r.shared + S::INBOX_AT) + thread;
        places at = {};
        sums<S> all = {w.rank == 0, reinterpret_cast<float4 *>(r.shared + S::HELD_AT) + thread, {}};
        float d0[S::N / 2], d1[S::N / 2];
        old_rows<S::N> old;
        old.ask(a, warp_tile_of<S>(w, thread), 0, thread % 32);
#pragma unroll
        for (int i = 0; i < S::N / 2; i++) all.total[0][i] = d0[i] = d1[i] = -0.0f; // -0 + x is x, also for -0
        slice even, odd;
        load_slice<S>(even, r, at, own);
        for (int s = 0; s < w.n; s += 2) {
            step<S>(r, all, d0, d1, even, odd, at, s, w.n, own);
            if (s + 1 < w.n) step<S>(r, all, d1, d0, odd, even, at, s + 1, w.n, own);
        }
        if (w.n % 2 == 0) last<S>(r, all, d1, at, w.n - 1);
        else last<S>(r, all, d0, at, w.n - 1);
        if (w.rank > 0) {
            barrier_wait(r.inbox, 0);
            all.follow(inbox, w.n);
        }
        if (w.rank + 1 < a.sharing) {
#pragma unroll
            for (int i = 0; i < sums<S>::QUADS; i++) {
                const float *v = &all.total[0][4 * i];
                push16(&inbox[i * sums<S>::ALL], make_float4(v[0], v[1], v[2], v[3]), r.inbox, (unsigned)w.rank + 1);
            }
            return;
        }
        if (!finish_whole<S>(a, w, thread, old, all.total)) finish_tile<S>(a, r, w, thread, all.total);
    }
};

// ---- Launchers ----------------------------------------------------------------------------------------------------

// Tiles, and how long an H200's SMs take for them when all have one: us for a slice of columns, and for what is done
// once a tile (docs/SPEED.md).
struct shape_info {
    int rows, tokens, per_sm;
    float slice, once, alone; // `alone`: part of that where an SM has one, and not the two that it can hold
};
static const shape_info shapes[] = {
    {64, 32, 2, 0.6f, 0.75f, 0.77f}, {64, 64, 2, 0.75f, 1.2f, 0.84f}, {64, 128, 1, 0.6f, 2.2f, 1},
    {128, 64, 1, 0.6f, 2.1f, 1},     {128, 128, 1, 0.8f, 5, 1},       {128, 192, 1, 1.33f, 5.5f, 1},
    {128, 256, 1, 1.73f, 6.65f, 1},  {64, 32, 1, 0.36f, 1.3f, 1},     {64, 64, 1, 0.42f, 2.3f, 1},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0], TILE_64X32 = 0, TILE_PIECES = 6, DEEP = 7, TILE_SHARED = N_SHAPES };

static int tiles_of(int n, int size) {
    return (n + size - 1) / size;
}

// The least time of the busiest SM. Of few tokens tiles that an SM has to itself are not worth it: they wait until
// attention has ended (docs/SPEED.md).
static int choose_shape(int rows, int n_tokens, int slices, int n_sms) {
    int best = 0;
    float least = 0;
    int n_shapes = n_tokens <= CLUSTER_TOKENS ? (int)DEEP : (int)N_SHAPES;
    for (int i = 0; i < n_shapes; i++) {
        const shape_info *s = &shapes[i];
        int n = tiles_of(rows, s->rows) * tiles_of(n_tokens, s->tokens);
        float cost = (float)tiles_of(n, n_sms * s->per_sm) * ((float)slices * s->slice + s->once);
        if (n <= n_sms) cost *= s->alone;
        if (i > 0 && cost >= least) continue;
        best = i;
        least = cost;
    }
    return best;
}

template <class S> static void launch(struct cuda_state *s, const char *what, group_args &a, int rows) {
    a.row_tiles = tiles_of(rows, S::ROWS);
    a.token_tiles = tiles_of(a.p.n_tokens, S::TOKENS);
    a.ending = ending_of(a, rows, S::ROWS);
    size_t tiles = (size_t)all_pieces(a), most = (size_t)s->n_sms * S::BLOCKS;
    launch_kernel(s, what, k_group<S, bf16_consumer>, {grid_for(tiles < most ? tiles : most), S::THREADS, S::SHARED},
                  a);
}

// Whether two blocks of a cluster can share each tile of 64 by 32, all clusters at once; each has a slice, or more.
static bool can_share(const struct cuda_state *s, int rows, int n_tokens, int slices) {
    return tiles_of(rows, shape_pair::ROWS) * tiles_of(n_tokens, shape_pair::TOKENS) <= s->n_pairs && slices >= 2 &&
           tiles_of(slices, 2) <= shape_pair::HELD;
}

static void launch_shared(struct cuda_state *s, const char *what, group_args &a, int rows) {
    a.row_tiles = tiles_of(rows, shape_pair::ROWS);
    a.token_tiles = tiles_of(a.p.n_tokens, shape_pair::TOKENS);
    a.sharing = 2;
    a.ending = ending_of(a, rows, shape_pair::ROWS);
    launch_kernel(s, what, k_group<shape_pair, sharing_consumer>,
                  {grid_for((size_t)all_pieces(a)), shape_pair::THREADS, shape_pair::SHARED, 2}, a);
}

bool cuda_group_has(const struct cuda_state *s, enum dtype type) {
    if (type == DTYPE_BF16) return s->device.variants & VARIANT_WGMMA;
    return s->device.variants & VARIANT_WGMMA_QUANTISED && cuda_has_group_quantised(type);
}

// For a few dozen tokens: of more, too much passes through memory, of less, clusters are faster (docs/SPEED.md).
bool cuda_in_parts(const struct op_ctx *ctx, const product_args &p, enum dtype type) {
    struct cuda_state *s = cuda_of(ctx);
    bool measured = s->tile_shape > 0 && s->tile_shape != TILE_PIECES + 1 && !is_small(s, (size_t)p.n_tokens, type);
    bool fits = p.n_tokens >= FEWEST_IN_PARTS && p.n_tokens <= MOST_IN_PARTS && s->tile_shape == 0;
    return HOPPER && type == DTYPE_BF16 && cuda_group_has(s, type) && s->device.variants & VARIANT_PARTS &&
           (fits || measured) && p.n_out[0] % 4 == 0 &&
           (size_t)p.n_tokens * (size_t)p.n_out[0] * (size_t)(p.columns / SLICE) <= PARTS_FLOATS;
}

bool cuda_group_product(const struct op_ctx *ctx, const char *what, enum product_mode mode, const product_args &p,
                        enum dtype type, size_t pairs) {
    struct cuda_state *s = cuda_of(ctx);
    if (!HOPPER || !cuda_group_has(s, type)) return false;
    size_t token_units = packed_units((size_t)p.n_tokens);
    unsigned char *first = (unsigned char *)ctx->scratch, *second = second_half(ctx);
    int rows = (int)pairs * 16, slices = p.columns / SLICE, shape = s->tile_shape - 1;
    bool in_parts = mode == PRODUCT_RESIDUAL && cuda_in_parts(ctx, p, type);
    group_args a = {p, mode, first, NULL, (int)token_units, 0, 0, 1, 0, END_ANY};
    bool stored = false;
    if (mode == PRODUCT_RESIDUAL && s->packed == p.x && s->packed_tokens == p.n_tokens) {
        a.tokens = second;
    } else if (p.norm && cuda_add_and_pack(s, what, p, first, (int)token_units)) {
    } else if (p.norm) {
        pack<true>(s, what, p, first, (int)token_units);
    } else {
        pack<false>(s, what, p, first, (int)token_units);
    }
    bool packs = mode == PRODUCT_GATE_UP && p.n_out[0] % SLICE == 0;
    const float *y = p.y[0];
    if (packs) a.act = second;
    if (packs && p.packed_only) a.p.y[0] = NULL;
    bool shares = mode == PRODUCT_RESIDUAL && !in_parts && can_share(s, rows, p.n_tokens, slices);
    if (shape < 0) {
        if (in_parts) shape = TILE_64X32;
        else if (shares && s->device.variants & VARIANT_CLUSTERS) shape = TILE_SHARED;
        else shape = choose_shape(rows, p.n_tokens, slices, s->n_sms);
    }
    if (in_parts) {
        a.mode = PRODUCT_PLAIN;
        a.p.y[0] = parts_of(ctx);
        a.part = (size_t)p.n_tokens * (size_t)p.n_out[0];
    }
    if (type != DTYPE_BF16) shape = -1;
    switch (shape) {
    case -1: cuda_group_quantised(s, what, a, rows, type); break;
    case TILE_64X32: launch<shape_64x32>(s, what, a, rows); break;
    case 1: launch<shape_64x64>(s, what, a, rows); break;
    case 2: launch<shape_64x128>(s, what, a, rows); break;
    case 3: launch<shape_128x64>(s, what, a, rows); break;
    case 4: launch<shape_128x128>(s, what, a, rows); break;
    case 5: launch<shape_128x192>(s, what, a, rows); break;
    case TILE_SHARED:
        if (shares) launch_shared(s, what, a, rows);
        else launch<shape_64x32_deep>(s, what, a, rows);
        break;
    case 7: launch<shape_64x32_deep>(s, what, a, rows); break;
    case 8: launch<shape_64x64_deep>(s, what, a, rows); break;
    default: stored = cuda_piece_product(s, what, a, rows); break;
    }
    s->stored = stored ? p.y[1] : NULL;
    if (packs) {
        s->packed = y;
        s->packed_tokens = p.n_tokens;
    }
    if (in_parts) s->pending = {p.y[0], a.p.y[0], p.n_out[0], all_slices(a), p.n_tokens};
    return true;
}

// Tokens packed for a product, and a second time for the next one.
size_t cuda_group_floats(const struct ops_limits *l) {
    size_t tokens = (l->max_tokens + MOST_TOKENS - 1) / MOST_TOKENS * MOST_TOKENS;
    return tokens * padded_columns(l->max_width) + 2 * BEYOND / sizeof(float);
}

template <class S, class CONSUMER = bf16_consumer> static void allow(struct cuda_state *s) {
    allow_shared(s, "preparing products", k_group<S, CONSUMER>, S::SHARED);
}

// Clusters of two that the GPU holds at once.
template <class S> static int count_pairs(struct cuda_state *s) {
    cudaLaunchAttribute attributes[MOST_ATTRIBUTES] = {};
    cudaLaunchConfig_t config = launch_config(s, {grid_for(2), S::THREADS, S::SHARED, 2}, attributes);
    int n = 0;
    cuda_check(s, cudaOccupancyMaxActiveClusters(&n, k_group<S, sharing_consumer>, &config), "preparing products");
    return n;
}

extern "C" bool cuda_groups_setup(struct cuda_state *s) {
    // A product's block, which wants nearly all of it, shall begin beside.
    cuda_check(s, cudaFuncSetAttribute(k_norm_tokens, cudaFuncAttributePreferredSharedMemoryCarveout, 100),
               "preparing products");
    allow<shape_64x32>(s);
    allow<shape_64x64>(s);
    allow<shape_64x128>(s);
    allow<shape_128x64>(s);
    allow<shape_128x128>(s);
    allow<shape_128x192>(s);
    cuda_piece_setup(s);
    allow<shape_64x32_deep>(s);
    allow<shape_64x64_deep>(s);
    allow<shape_pair, sharing_consumer>(s);
    s->n_pairs = count_pairs<shape_pair>(s);
    cuda_parts_setup(s);
    return s->failed == cudaSuccess;
}
