// heads.cuh: how a tile of 128 rows by 256 tokens ends that is a head of K or V of prompts: its sums go to their pages
// at once, rounded, those of K normed and turned before. Nothing of them is in memory as floats then, but for tokens
// whose attention reads them so.
//
// Who orders what: V's sums pass through a warp's own part of `room`. K's pass through all of it, a chain's tokens at a
// time: all consumer warps write it, meet, read it, and meet again before it is written anew. Only they use it.
#ifndef TANDEM_OPS_CUDA_HEADS_CUH
#define TANDEM_OPS_CUDA_HEADS_CUH

#include "ops/cuda/keys.cuh"
#include "ops/cuda/results.cuh"

enum { HEAD_BARRIER = 1 };

// Where a token's K and V belong, as one number; -1: there is no such token.
static __device__ __forceinline__ int place_number(const batch_view &b, int token) {
    if (token >= b.n_tokens) return -1;
    kv_place at = place_of(b, token);
    return at.page * KV_PAGE_TOKENS + at.slot;
}

// 32 tokens of V by a warp that has 16 channels of them, from `channel` on: through 1 KB of shared memory, [tokens][2
// words], from where a lane takes a word of two tokens, as they stand in pages. Which of its two places a word has
// there has to do with bank conflicts alone. `at`: the lane's token's place.
static __device__ __forceinline__ void put_tokens(const heads_end &h, int head, int channel, int at,
                                                  unsigned char *room, int lane, const float *v) {
    unsigned char *put = room + lane * 32 + lane / 4 % 2 * 16;
    store_turned(
        put, make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[4], v[5]), pack_bf16(v[8], v[9]), pack_bf16(v[12], v[13])));
    store_turned((unsigned char *)((uintptr_t)put ^ 16), make_uint4(pack_bf16(v[2], v[3]), pack_bf16(v[6], v[7]),
                                                                    pack_bf16(v[10], v[11]), pack_bf16(v[14], v[15])));
    __syncwarp();
    channel += (lane % 2 ^ lane / 8 % 2) * 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int its = __shfl_sync(~0u, at, half * 16 + lane / 2);
        if (its < 0) continue;
        reinterpret_cast<uint4 *>(
            head_page(h.kv, true, its / KV_PAGE_TOKENS, head))[kv_word(its % KV_PAGE_TOKENS, channel)] =
            reinterpret_cast<const uint4 *>(room)[half * 32 + lane];
    }
}

template <class S>
static __device__ __forceinline__ void store_value_sums(const heads_end &h, int head, int token, int warp, int lane,
                                                        float *room, const float (&total)[S::C][S::N / 2]) {
    constexpr int PARTS = S::C * S::N / 32;      // of 32 tokens
    constexpr int PLACES = 16 * S::N * 4 / 1024; // for them, in the warp's part of the room
    static_assert(PARTS == 2 * S::C && S::N == 64, "two parts a chain");
    unsigned char *mine = reinterpret_cast<unsigned char *>(room + warp * 16 * S::N);
    int at[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; p++) at[p] = place_number(h.b, token + p * 32 + lane);
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        if (p >= PLACES && p % PLACES == 0) __syncwarp(); // all have been taken
        put_tokens(h, head, warp * 16, at[p], mine + p % PLACES * 1024, lane, &total[p / 2][p % 2 * 16]);
    }
}

// A chain's tokens with all channels of a head, [N tokens][HEAD_DIM]; which four of 32 a channel's stand in has to do
// with bank conflicts alone.
struct key_room {
    float *put[4];        // of the lane's first token row g of its warp's 16, of the second one's; of row g + 8
    const float *take[2]; // of the lane's token, channels 8 t to 8 t + 3, the next four

    __device__ __forceinline__ key_room(float *room, int warp, int lane) {
        int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 4; i++)
            put[i] = room + (2 * t + i % 2) * HEAD_DIM + ((16 * warp + g + i / 2 * 8) ^ turn(2 * t + i % 2));
#pragma unroll
        for (int i = 0; i < 2; i++) take[i] = room + (8 * warp + g) * HEAD_DIM + ((8 * t + 4 * i) ^ turn(g));
    }
    static __device__ __forceinline__ int turn(int token) {
        return 8 * (token % 4 ^ token / 4 % 2) + 4 * (token % 2);
    }
};

template <class S>
static __device__ __forceinline__ void store_key_sums(const heads_end &h, int head, int token, int warp, int lane,
                                                      float *room, const float (&total)[S::C][S::N / 2]) {
    static_assert(S::C == 4 && S::WARPS * 8 == S::N, "a chain a lane, eight tokens of it a warp");
    int t = lane % 4, last = h.b.n_tokens - 1, mine = token + 8 * warp + lane / 4;
    int at = place_number(h.b, mine + t * S::N); // of the chain's token that has the lane's number
    key_room rows(room, warp, lane);
#pragma unroll 1
    for (int c = 0; c < S::C; c++) {
        key<HEAD_DIM> x, turn;
        uint32_t out[HEAD_DIM / 8];
        turn.load(h.cos_sin + (size_t)min(mine + c * S::N, last) * HEAD_DIM + 8 * t);
#pragma unroll
        for (int k = 0; k < S::C; k++) {
            if (k != c) continue;
#pragma unroll
            for (int i = 0; i < S::N / 2; i++) rows.put[i % 4][i / 4 * 8 * HEAD_DIM] = total[k][i];
        }
        sync_some(HEAD_BARRIER, S::WARPS * 32);
        x.load(rows.take[0], rows.take[1]);
        sync_some(HEAD_BARRIER, S::WARPS * 32);
        if (h.norm) normalise_key<HEAD_DIM>(x, h.norm + 8 * t, h.eps);
        turn_key<HEAD_DIM>(out, x, turn);
        int its = __shfl_sync(~0u, at, lane / 4 * 4 + c);
        if (its >= 0) store_key<HEAD_DIM>(h.kv, {its / KV_PAGE_TOKENS, its % KV_PAGE_TOKENS}, head, out, t);
    }
}

// A tile's tokens from `token` on of heads of q, then of k, then of v: `row` counts them.
template <class S>
static __device__ __forceinline__ void finish_heads(const group_args &a, const heads_end &h, const warp_tile &w,
                                                    int row, float *room, int warp, int lane,
                                                    const float (&total)[S::C][S::N / 2]) {
    int head = row - a.p.n_out[0] / HEAD_DIM, n_kv = h.kv.n_kv_heads;
    if (head < 0 || w.token < h.n_single) write_rows<S>(a, w, 0, lane, total);
    if (head < 0) return;
    if (head < n_kv) store_key_sums<S>(h, head, w.token, warp, lane, room, total);
    else store_value_sums<S>(h, head - n_kv, w.token, warp, lane, room, total);
}

#endif
