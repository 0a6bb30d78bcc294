// heads.cuh: how a tile of 128 rows by 256 tokens ends that is a head of K or V of prompts: its sums go to their pages
// at once, rounded, those of K normed and turned before. Nothing of them is in memory as floats then, but for tokens
// whose attention reads them so.
//
// Who orders what: V's sums stay in their threads. K's pass through `room`, a chain's tokens at a time: all consumer
// warps write it, meet, read it, and meet again before it is written anew. Only they use it.
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

// Where tokens fill pages, a lane's sums of one are its 16 bytes of it. `channel`: the first of the warp's 16.
template <class S, int PAGES>
static __device__ __forceinline__ void store_whole_pages(const heads_end &h, int head, int channel,
                                                         const int (&at)[PAGES], int lane,
                                                         const float (&total)[S::C][S::N / 2]) {
#pragma unroll
    for (int p = 0; p < PAGES; p++) {
        int page = __shfl_sync(~0u, at[p], 0) / KV_PAGE_TOKENS;
        uint4 *to = reinterpret_cast<uint4 *>(head_page(h.kv, true, page, head)) + channel / 8 * CHUNK_LANES + lane;
        const float *v = &total[p * 16 / (S::N / 2)][p * 16 % (S::N / 2)];
        to[0] =
            make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[4], v[5]), pack_bf16(v[8], v[9]), pack_bf16(v[12], v[13]));
        to[CHUNK_LANES] =
            make_uint4(pack_bf16(v[2], v[3]), pack_bf16(v[6], v[7]), pack_bf16(v[10], v[11]), pack_bf16(v[14], v[15]));
    }
}

// Where they don't: through the warp's part of the room, [16 channels][N tokens], a token a lane.
template <class S, int PAGES>
static __device__ __forceinline__ void store_scattered(const heads_end &h, int head, int channel,
                                                       const int (&at)[PAGES], int lane, float *room,
                                                       const float (&total)[S::C][S::N / 2]) {
    int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int c = 0; c < S::C; c++) {
        int places[2] = {at[0], at[1]};
#pragma unroll
        for (int k = 0; k < S::C; k++) {
            if (k != c) continue;
            places[0] = at[2 * k], places[1] = at[2 * k + 1];
#pragma unroll
            for (int i = 0; i < S::N / 2; i += 2)
                *reinterpret_cast<float2 *>(room + (g + i / 2 % 2 * 8) * S::N + ((i / 4 * 8 + 2 * t) ^ g % 4 * 8)) =
                    make_float2(total[k][i], total[k][i + 1]);
        }
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int its = places[half];
            if (its < 0) continue;
            __nv_bfloat16 *to = reinterpret_cast<__nv_bfloat16 *>(head_page(h.kv, true, its / KV_PAGE_TOKENS, head)) +
                                kv_index(true, its % KV_PAGE_TOKENS, channel, HEAD_DIM);
#pragma unroll
            for (int i = 0; i < 16; i++)
                to[kv_index(true, 0, i, HEAD_DIM)] =
                    __float2bfloat16_rn(room[i * S::N + ((half * 32 + lane) ^ i % 4 * 8)]);
        }
        __syncwarp();
    }
}

template <class S>
static __device__ __forceinline__ void store_value_sums(const heads_end &h, int head, int token, int warp, int lane,
                                                        float *room, const float (&total)[S::C][S::N / 2]) {
    constexpr int PAGES = S::C * S::N / KV_PAGE_TOKENS;
    static_assert(PAGES == 2 * S::C && S::N == 2 * KV_PAGE_TOKENS, "two pages a chain");
    int at[PAGES];
    bool whole = true;
#pragma unroll
    for (int p = 0; p < PAGES; p++) at[p] = place_number(h.b, token + p * KV_PAGE_TOKENS + lane);
#pragma unroll
    for (int p = 0; p < PAGES; p++) {
        int first = __shfl_sync(~0u, at[p], 0);
        whole = whole && at[p] % KV_PAGE_TOKENS == lane && at[p] - lane == first;
    }
    if (__all_sync(~0u, whole)) store_whole_pages<S>(h, head, warp * 16, at, lane, total);
    else store_scattered<S>(h, head, warp * 16, at, lane, room + warp * 16 * S::N, total);
}

// A chain's tokens with all channels of a head, [N tokens][HEAD_DIM]; which eight of four a channel's stand in has to
// do with bank conflicts alone.
struct key_room {
    float *put[4];        // of the lane's first token row g of its warp's 16, of the second one's; of row g + 8
    const float *take[4]; // of the lane's token, its two channels of eights 0 to 3

    __device__ __forceinline__ key_room(float *room, int warp, int lane) {
        int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            put[i] = room + (2 * t + i % 2) * HEAD_DIM + ((16 * warp + g + i / 2 * 8) ^ 8 * turn(2 * t + i % 2));
            take[i] = room + (8 * warp + g) * HEAD_DIM + 8 * (i ^ turn(g)) + 2 * t;
        }
    }
    static __device__ __forceinline__ int turn(int token) {
        return token % 4 ^ token / 4 % 2;
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
        turn.load(h.cos_sin + (size_t)min(mine + c * S::N, last) * HEAD_DIM + 2 * t);
#pragma unroll
        for (int k = 0; k < S::C; k++) {
            if (k != c) continue;
#pragma unroll
            for (int i = 0; i < S::N / 2; i++) rows.put[i % 4][i / 4 * 8 * HEAD_DIM] = total[k][i];
        }
        sync_some(HEAD_BARRIER, S::WARPS * 32);
#pragma unroll
        for (int e = 0; e < HEAD_DIM / 8; e++)
            x.x[e] = *reinterpret_cast<const float2 *>(rows.take[e % 4] + e / 4 * 32);
        sync_some(HEAD_BARRIER, S::WARPS * 32);
        if (h.norm) normalise_key<HEAD_DIM>(x, h.norm + 2 * t, h.eps);
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
