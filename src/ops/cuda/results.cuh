// results.cuh: what becomes of a tile's sums where nothing is special: all of its rows exist, and none has a bias. All
// SMs write at once, and nothing else happens meanwhile: so each ending has a short way of its own, without what
// group_kernel.cuh's must ask.
//
// A thread's sums: lane 4 g + t of a warp's 16 rows has row g, tokens 8 i + 2 t and 8 i + 2 t + 1, then row g + 8 of
// these, for i = 0, 1, ...
#ifndef TANDEM_OPS_CUDA_RESULTS_CUH
#define TANDEM_OPS_CUDA_RESULTS_CUH

#include "ops/cuda/group_kernel.cuh"

// Which ending a product's tiles of that many rows have.
static inline enum ending ending_of(const group_args &a, int rows, int tile_rows) {
    const product_args &p = a.p;
    bool whole = rows % tile_rows == 0;
    for (int i = 0; i < (a.mode == PRODUCT_QKV ? 3 : 1); i++) whole = whole && p.n_out[i] % 16 == 0 && !p.b[i];
    if (!whole) return END_ANY;
    if (a.mode == PRODUCT_GATE_UP) return a.act && !p.y[0] ? END_GATED : END_ANY;
    return a.mode == PRODUCT_RESIDUAL ? END_ADDED : END_ROWS;
}

// A warp's first pair of units in the tile, and the tile's first token.
struct warp_tile {
    int pair, token;
};

// Where the pair's rows of `token` are, and how far from token to token.
struct result_rows {
    float *at;
    int n_out;
};

static __device__ __forceinline__ result_rows rows_of(const group_args &a, int pair, int token) {
    int segment = 0;
    if (a.mode == PRODUCT_QKV)
        while (segment < 2 && pair >= a.p.n_pairs[segment]) pair -= a.p.n_pairs[segment++];
    int n_out = a.p.n_out[segment];
    return {a.p.y[segment] + (size_t)token * n_out + pair * 16, n_out};
}

// Straight from registers: eight rows' neighbours are 32 bytes, a whole sector. `part`: floats to where these results
// begin.
template <class S>
static __device__ __forceinline__ void write_rows(const group_args &a, const warp_tile &w, size_t part, int lane,
                                                  const float (&total)[S::C][S::N / 2]) {
    int limit = a.p.n_tokens - w.token - lane % 4 * 2;
    result_rows rows = rows_of(a, w.pair, w.token + lane % 4 * 2);
    float *to = rows.at + part + lane / 4;
    int n_out = rows.n_out;
    size_t step = (size_t)8 * n_out;
#pragma unroll
    for (int i = 0; i < S::C * S::N / 2; i += 4, to += step) {
        const float *v = &total[i / (S::N / 2)][i % (S::N / 2)];
        if (2 * i < limit) to[0] = v[0], to[8] = v[2];
        if (2 * i + 1 < limit) to[n_out] = v[1], to[n_out + 8] = v[3];
    }
}

// A chain's sums in shared memory, [N tokens][16 rows], for float4s of them; where each lane writes has to do with bank
// conflicts alone.
template <int N> struct turned_chain {
    float *at[4]; // of the first token's row g, of the second one's; the same of row g + 8
    const float4 *quads;

    __device__ __forceinline__ turned_chain(float *room, int lane) {
        int g = lane / 4, t = lane % 4, turn = t / 2 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++)
            at[i] = room + ((2 * t + i % 2) ^ t % 2) * 16 + ((g / 4 + i / 2 * 2) ^ turn) * 4 + g % 4;
        quads = reinterpret_cast<const float4 *>(room) + (g ^ g / 2 % 2) * 4 + (t ^ g / 4 * 2);
    }
    __device__ __forceinline__ void put(const float (&total)[N / 2]) const {
#pragma unroll
        for (int i = 0; i < N / 2; i++) at[i % 4][i / 4 * 128] = total[i];
    }
    // Rows 4 (lane % 4) .. of token 8 i + lane / 4.
    __device__ __forceinline__ float4 take(int i) const {
        return quads[i * 32];
    }
};

// Through shared memory, for what is added to must be read, in fewer instructions: that of the next chain while this
// one is written.
template <class S>
static __device__ __forceinline__ void add_rows(const group_args &a, const warp_tile &w, float *room, int lane,
                                                const float (&total)[S::C][S::N / 2]) {
    constexpr int N = S::N, TAKES = N / 8;
    static_assert(S::C == 4, "two chains a round");
    int limit = a.p.n_tokens - w.token - lane / 4;
    result_rows rows = rows_of(a, w.pair, w.token + lane / 4);
    float *to = rows.at + lane % 4 * 4;
    int n_out = rows.n_out;
    size_t step = (size_t)8 * n_out;
    turned_chain<N> turned(room, lane);
    float4 even[TAKES], odd[TAKES];
    auto ask = [&](float4(&before)[TAKES], const float *x, int most) {
#pragma unroll
        for (int i = 0; i < TAKES; i++, x += step) {
            before[i] = make_float4(0, 0, 0, 0);
            if (i * 8 < most) before[i] = *reinterpret_cast<const float4 *>(x);
        }
    };
    auto put = [&](const float4(&before)[TAKES]) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < TAKES; i++, to += step)
            if (i * 8 < limit) *reinterpret_cast<float4 *>(to) = add4(before[i], turned.take(i));
        limit -= N;
        __syncwarp();
    };
    ask(even, to, limit);
#pragma unroll 1
    for (int c = 0; c < S::C; c += 2) {
        ask(odd, to + N * (size_t)n_out, limit - N);
        if (c == 0) turned.put(total[0]);
        else turned.put(total[2]);
        put(even);
        if (c == 0) ask(even, to + N * (size_t)n_out, limit - N);
        if (c == 0) turned.put(total[1]);
        else turned.put(total[3]);
        put(odd);
    }
}

// Rounded and packed, straight from registers: of eight tokens a lane holds one column, and takes two columns of one
// token for it, which lie where its word is. There is room for eights of tokens, of which the first is one.
template <class S>
static __device__ __forceinline__ void pack_gated(const group_args &a, const warp_tile &w, int lane,
                                                  const float (&total)[S::C][S::N / 2]) {
    int n = a.p.n_tokens - w.token;
    unsigned char *to = a.act + packed_at(w.token, w.pair * 8, a.token_units) + lane * 4;
#pragma unroll
    for (int i = 0; i < S::C * S::N / 2; i += 4) {
        const float *v = &total[i / (S::N / 2)][i % (S::N / 2)];
        uint32_t pair = pack_bf16(silu_mul(v[0], v[2]), silu_mul(v[1], v[3]));
        uint32_t word = transpose(pair);
        if (i / 4 * 8 < n) *reinterpret_cast<uint32_t *>(to + i / 4 * HALF_BYTES) = word;
    }
}

// ---- Smaller tiles (groups.cu) ------------------------------------------------------------------------------------

template <class S> static __device__ __forceinline__ warp_tile warp_tile_of(const piece_of_work &w, int thread) {
    return {w.row * (S::UNITS / 2) + thread / 128 % S::WM * 4 + thread / 32 % 4,
            w.token * S::TOKENS + thread / 128 / S::WM * S::C * S::N};
}

// What a chain's sums will be added to; zeros where nothing is.
template <int N> struct old_rows {
    float x[N / 2];

    __device__ __forceinline__ void ask(const group_args &a, const warp_tile &w, int chain, int lane) {
        int token = w.token + chain * N + lane % 4 * 2, limit = a.p.n_tokens - token;
        result_rows rows = rows_of(a, w.pair, token);
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float *from = rows.at + lane / 4 + (size_t)(i / 4 * 8 + i % 2) * rows.n_out + i / 2 % 2 * 8;
            x[i] = a.ending == END_ADDED && i / 4 * 8 + i % 2 < limit ? *from : 0.0f;
        }
    }
};

// False: it is not done. `old`: of the first chain.
template <class S>
static __device__ __forceinline__ bool finish_whole(const group_args &a, const piece_of_work &w, int thread,
                                                    old_rows<S::N> &old, float (&total)[S::C][S::N / 2]) {
    warp_tile tile = warp_tile_of<S>(w, thread);
    int lane = thread % 32;
    if (a.ending == END_ANY) return false;
    if (a.ending == END_GATED) {
        pack_gated<S>(a, tile, lane, total);
        return true;
    }
    if (a.ending == END_ADDED) {
#pragma unroll
        for (int c = 0; c < S::C; c++) {
            if (c > 0) old.ask(a, tile, c, lane);
#pragma unroll
            for (int i = 0; i < S::N / 2; i++) total[c][i] = old.x[i] + total[c][i];
        }
    }
    write_rows<S>(a, tile, (size_t)w.first * a.part, lane, total);
    return true;
}

#endif
