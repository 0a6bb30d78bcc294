// persistent_attention.cuh: attention within the kernel of all layers (persistent.cu), from the pushed q, k and v to
// the out product's inputs.
#ifndef TANDEM_OPS_CUDA_PERSISTENT_ATTENTION_CUH
#define TANDEM_OPS_CUDA_PERSISTENT_ATTENTION_CUH

#include "ops/cuda/persistent_ring.cuh"

// ---- Attention
// -------------------------------------------------------------------------------------------------------

// q's row or k, normed and rotated: kv.cuh's load_head of what was pushed.
static __device__ __forceinline__ void load_rotated(float (&v)[4], const float *from, const float *norm,
                                                    const float (&cos_sin)[4], float eps, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = from[lane + 32 * i];
    if (norm) {
        float s = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            s = fmaf(v[i], v[i], s);
            s = fmaf(v[i + 2], v[i + 2], s);
        }
        float r = 1.0f / sqrtf(warp_sum(s) / (float)HEAD + eps);
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = v[i] * r * norm[lane + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float lo = v[i], hi = v[i + 2], cosine = cos_sin[i], sine = cos_sin[i + 2];
        v[i] = fmaf(lo, cosine, -(hi * sine));
        v[i + 2] = fmaf(hi, cosine, lo * sine);
    }
}

enum { KV_STEP = 32 * KV_PAGE_TOKENS }; // elements of a page from channel c to c + 32

// This token's k, by a warp: into its page, in memory and where it stands in the ring.
static __device__ __forceinline__ void put_k(const float (&v)[4], unsigned char *here, unsigned char *there, int slot,
                                             int lane) {
    int first = kv_index(slot, lane);
    __nv_bfloat16 *to = reinterpret_cast<__nv_bfloat16 *>(here) + first;
    __nv_bfloat16 *memory = reinterpret_cast<__nv_bfloat16 *>(there) + first;
#pragma unroll
    for (int i = 0; i < 4; i++) to[i * KV_STEP] = memory[i * KV_STEP] = __float2bfloat16_rn(v[i]);
}

// The same of v, by the last four warps, 32 channels each; and the slots behind it are cleared: what they hold may be
// no number.
static __device__ __forceinline__ void put_v(const float *v, unsigned char *here, unsigned char *there, int slot,
                                             int warp, int lane) {
    int block = warp - 4, first = block * KV_STEP + kv_index(slot, lane);
    uint4 *behind = reinterpret_cast<uint4 *>(here) + block * (KV_STEP / 8);
    __nv_bfloat16 *memory = reinterpret_cast<__nv_bfloat16 *>(there);
    reinterpret_cast<__nv_bfloat16 *>(here)[first] = memory[first] = __float2bfloat16_rn(v[32 * block + lane]);
#pragma unroll 1
    for (int i = 4 * (slot + 1) + lane; i < KV_STEP / 8; i += 32) behind[i] = make_uint4(0, 0, 0, 0);
}

// What attention needs that this token brings: q's rows before the first round, by a warp each; k and v before the
// round in which this block attends to them.
template <int GROUP>
static __device__ __forceinline__ void prepare(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                               const persistent_layer &w, const float (&cos_sin)[4], int layer,
                                               ring_place at, bool first, bool own, int position, int page, int warp,
                                               int lane) {
    int slot = position % KV_PAGE_TOKENS;
    size_t there = ((size_t)page * p.n_kv_heads + me.kv_head) * (SLOT_BYTES / 2);
    at = at.ahead((unsigned)(me.last_page % CHUNK_PAGES));
    if (own && warp >= GROUP) wait_for(p, &sh->full[at.slot], at.parity());
    if (warp < GROUP ? first : own && warp == GROUP) {
        float v[4];
        load_rotated(v, sh->qkv + warp * HEAD, w.head_norm[0] ? sh->head_norm[layer % 2][warp == GROUP] : NULL, cos_sin,
                     p.eps, lane);
        if (warp == GROUP) {
            put_k(v, sh->ring[at.slot], w.kv[0] + there, slot, lane);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Channel 8 e + 2 t + k of these 32: word 2 (e % 2) of the uint4.
                __nv_bfloat16 *to = reinterpret_cast<__nv_bfloat16 *>(&sh->q[warp][i][lane / 16][lane % 8 / 2]);
                to[lane / 8 % 2 * 4 + lane % 2] = __float2bfloat16_rn(v[i] * p.scale);
            }
        }
    } else if (own && warp >= 4) {
        put_v(sh->qkv + (GROUP + 1) * HEAD, sh->ring[at.slot] + SLOT_BYTES / 2, w.kv[1] + there, slot, warp, lane);
    }
}

// A warp's page, of which n positions are seen: o, maximum and sum of each row. As attention.cuh's scores, with q in
// the order in which the matrix instruction takes it.
template <int GROUP>
static __device__ __forceinline__ void attend_page(const persistent_args &p, persistent_shared *sh, ring_place at,
                                                   unsigned turn, int n, int warp, int lane) {
    using reader = page_reader<bf16_kv<HEAD>>;
    const unsigned char *page = sh->ring[at.slot];
    float s[4][4] = {}, m, l;
    uint32_t pairs[4], none[4] = {0, 0, 0, 0};
    bool real = lane < 4 * GROUP;
    wait_for(p, &sh->full[at.slot], at.parity());
#pragma unroll
    for (int i = 0; i < HEAD / 32; i++) {
        uint4 first = make_uint4(0, 0, 0, 0), second = first;
        if (real) {
            first = sh->q[lane / 4][i][0][lane % 4];
            second = sh->q[lane / 4][i][1][lane % 4];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 x = reader::k(page, j, i, lane);
            mma(s[j], first.x, first.y, first.z, first.w, x.x, x.y);
            mma(s[j], second.x, second.y, second.z, second.w, x.z, x.w);
        }
    }
    softmax_row(pairs, m, l, s, 0, n, lane % 4);
    if (real && lane % 4 == 0) sh->state[turn][warp][lane / 4] = make_float2(m, l);
    float *o = (turn ? sh->deep.o : sh->o)[warp] + lane / 4 * HEAD + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < HEAD / 8; i++) {
        float d[4];
        values(d, pairs, none, reader::v(page + SLOT_BYTES / 2, i, lane));
        if (real) *reinterpret_cast<float2 *>(o + i * 8) = make_float2(d[0], d[1]);
    }
}

// The channels of a row's `quad`, a quarter of an eighth: 16 h + 2 t, + 1, + 8, + 9 of 32, which are eight bytes of
// inputs as put_inputs has them.
static __device__ __forceinline__ int first_of_quad(int quad) {
    return quad / 8 * 32 + quad / 4 % 2 * 16 + quad % 4 * 2;
}

static __device__ __forceinline__ int bytes_before_quad(int quad) {
    return quad / 8 * 64 + quad % 4 * 16 + quad / 4 % 2 * 8;
}

// A chunk's n pages in order, to all blocks of the cluster; the only chunk as inputs of the next product.
template <int GROUP>
static __device__ __forceinline__ void push_chunk(persistent_shared *sh, int rank, int n, bool only, int thread) {
    constexpr int QUADS = GROUP * HEAD / 4, AT_ONCE = WORKERS / QUADS; // blocks pushed to at once
    int quad = thread % QUADS, row = quad / (HEAD / 4), from = first_of_quad(quad);
    chain s = CHAIN_START;
    float4 of = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < CHUNK_PAGES; i++) {
        float a, c;
        if (i >= n) break;
        float2 low = *reinterpret_cast<const float2 *>(sh->o[i] + from);
        float2 high = *reinterpret_cast<const float2 *>(sh->o[i] + from + 8), state = sh->state[0][i][row];
        chain_add(s, state.x, state.y, a, c);
        of.x = chain_value(of.x, a, low.x, c);
        of.y = chain_value(of.y, a, low.y, c);
        of.z = chain_value(of.z, a, high.x, c);
        of.w = chain_value(of.w, a, high.y, c);
    }
    unsigned there = (unsigned)(thread / QUADS);
    if (only) {
        // What chaining one chunk does: -0 becomes +0.
        float r = s.l;
        uint2 rounded = make_uint2(pack_bf16((of.x + 0.0f) / r, (of.y + 0.0f) / r),
                                   pack_bf16((of.z + 0.0f) / r, (of.w + 0.0f) / r));
#pragma unroll
        for (unsigned i = 0; i < CLUSTER; i += AT_ONCE)
            push8(sh->inputs + bytes_before_quad(quad), rounded, &sh->chunks_arrived, there + i);
        return;
    }
    chunk_result *to = &sh->chunk[rank];
#pragma unroll
    for (unsigned i = 0; i < CLUSTER; i += AT_ONCE) {
        push16(to->o + 4 * quad, of, &sh->chunks_arrived, there + i);
        if (quad % (HEAD / 4) == 0)
            push16(&to->state[row], make_float4(s.m, s.l, 0, 0), &sh->chunks_arrived, there + i);
    }
}

// Attention of the cluster's heads over up to eight chunks, one a block.
template <int GROUP>
static __device__ __forceinline__ void attend(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                              const persistent_layer &w, ring_place &at, const float (&cos_sin)[4],
                                              int layer, int position, int token_page, int thread) {
    thread = afresh(thread);
    int warp = thread / 32, lane = thread % 32, n = pages_of(me, me.rank);
    bool own = me.rank == me.n_chunks - 1;
    if (n <= 0) return;
    if (thread == 0) barrier_expect(&sh->qkv_arrived, (GROUP + 2) * HEAD * 4);
    wait_for(p, &sh->qkv_arrived, layer % 2);
    prepare<GROUP>(p, sh, me, w, cos_sin, layer, at, true, own, position, token_page, warp, lane);
    sync_some(1, WORKERS);
    if (warp < n)
        attend_page<GROUP>(p, sh, at.ahead((unsigned)warp), 0,
                           position + 1 - (me.rank * (int)CHUNK_PAGES + warp) * ATTN_BLOCK, warp, lane);
    if (own) stores_before_copies(); // prepare's
    pass(sh, at, n, lane);
    sync_some(1, WORKERS);
    push_chunk<GROUP>(sh, me.rank, n, me.n_chunks == 1, thread);
}

// The n chunks in ascending order, rounded, as inputs of the next product.
template <int GROUP> static __device__ __forceinline__ void chain_chunks(persistent_shared *sh, int n, int thread) {
    chain s = CHAIN_START;
    float sum = 0;
    if (thread < GROUP * HEAD) {
#pragma unroll 2
        for (int i = 0; i < n; i++) {
            const chunk_result *next = &sh->chunk[i];
            float2 state = *reinterpret_cast<const float2 *>(&next->state[thread / HEAD]);
            float a, c;
            chain_add(s, state.x, state.y, a, c);
            sum = chain_value(sum, a, next->o[thread], c);
        }
        *reinterpret_cast<__nv_bfloat16 *>(sh->inputs + bytes_before_quad(thread / 4) + thread % 4 * 2) =
            __float2bfloat16_rn(sum / s.l);
    }
    sync_some(1, WORKERS);
}

// ---- At its own pace
// ---------------------------------------------------------------------------------------------------
// Every block runs through its chunks alone: a page's slot is filled again as soon as
// its warp has read it, and a chunk's pages are combined while the next one's are multiplied. What becomes of a chunk
// is noted in memory, where each block of the KV head's cluster collects some channels of all chunks.

// Two words that stand and fall together, past the SMs' caches.
static __device__ __forceinline__ uint64_t look_at(const uint64_t *at) {
    return *(const volatile uint64_t *)at;
}

static __device__ __forceinline__ void put_note(uint64_t *at, float v, uint32_t number) {
    *(volatile uint64_t *)at = (uint64_t)number << 32 | __float_as_uint(v);
}

static __device__ __forceinline__ float await_note(const persistent_args &p, const uint64_t *at, uint32_t number) {
    patience w = {};
    for (;;) {
        uint64_t v = look_at(at);
        if (v >> 32 == number) return __uint_as_float((uint32_t)v);
        w.look(p);
        poll_again();
    }
}

// A chunk's n pages in order.
template <int GROUP>
static __device__ __forceinline__ void note_chunk(const persistent_shared *sh, uint64_t *to, uint32_t number,
                                                  unsigned turn, int n, int thread) {
    if (thread >= GROUP * HEAD) return;
    int row = thread / HEAD;
    chain s = CHAIN_START;
    float of = 0;
#pragma unroll
    for (int i = 0; i < CHUNK_PAGES; i++) {
        float a, c;
        if (i >= n) break;
        float2 state = sh->state[turn][i][row];
        chain_add(s, state.x, state.y, a, c);
        of = chain_value(of, a, (turn ? sh->deep.o : sh->o)[i][thread], c);
    }
    put_note(to + thread, of, number);
    if (thread % HEAD < 2) put_note(to + GROUP * HEAD + 2 * row + thread % 2, thread % 2 ? s.l : s.m, number);
}

// This block's chunks.
template <int GROUP>
static __device__ __forceinline__ void
attend_deep(const persistent_args &p, persistent_shared *sh, const block_place &me, const persistent_layer &w,
            ring_place &at, const float (&cos_sin)[4], int layer, int position, int token_page, int thread) {
    thread = afresh(thread);
    int warp = thread / 32, lane = thread % 32;
    const chunk_share &share = sh->share;
    uint32_t number = sh->first_number + (uint32_t)layer;
    unsigned done = (unsigned)(layer * share.n); // so far
    uint64_t *q = p.notes + (size_t)share.head * HEAD_NOTES, *chunks = q + Q_NOTES, *before = NULL;
    float *q_here = reinterpret_cast<float *>(sh->q) + 2 * thread; // two values; a zero is next
    if (me.kv_head >= 0) {
        if (thread == 0) barrier_expect(&sh->qkv_arrived, (GROUP + 2) * HEAD * 4);
        wait_for(p, &sh->qkv_arrived, layer % 2);
        prepare<GROUP>(p, sh, me, w, cos_sin, layer, at, true, false, position, token_page, warp, lane);
    } else if (thread < GROUP * HEAD / 2) {
        *q_here = await_note(p, q + thread, number);
    }
    sync_some(1, WORKERS);
    if (me.kv_head >= 0 && me.rank == 0 && share.helped > 0 && thread < GROUP * HEAD / 2)
        put_note(q + thread, *q_here, number);
#pragma unroll 1
    for (int chunk = share.first, n_before = 0;; chunk += share.step, done++) {
        bool more = chunk < share.end;
        int n = pages_of(me, chunk);
        unsigned turn = done % 2;
        if (more) {
            if (chunk == me.n_chunks - 1) {
                sync_some(1, WORKERS); // nobody waits for a slot's last lap
                prepare<GROUP>(p, sh, me, w, cos_sin, layer, at, false, true, position, token_page, warp, lane);
                stores_before_copies();
                sync_some(1, WORKERS);
            }
            if (done >= 2) wait_for(p, &sh->o_empty[turn], done / 2 % 2 ^ 1);
            if (warp < n) {
                ring_place mine = at.ahead((unsigned)warp);
                await_lap(p, sh, mine);
                attend_page<GROUP>(p, sh, mine, turn, position + 1 - (chunk * (int)CHUNK_PAGES + warp) * ATTN_BLOCK,
                                   warp, lane);
                __syncwarp();
                if (lane < WORKER_WARPS) barrier_arrive(&sh->empty[mine.slot]); // for all warps: no other reads it
            }
            at = at.ahead((unsigned)n);
            __syncwarp();
            if (lane == 0) barrier_arrive(&sh->o_full[turn]);
        }
        if (before) {
            wait_for(p, &sh->o_full[turn ^ 1], (done - 1) / 2 % 2);
            note_chunk<GROUP>(sh, before, number, turn ^ 1, n_before, thread);
            __syncwarp();
            if (lane == 0) barrier_arrive(&sh->o_empty[turn ^ 1]);
        }
        if (!more) break;
        before = chunks + (size_t)chunk * CHUNK_NOTES;
        n_before = n;
    }
    sync_some(1, WORKERS); // o has been read
}

// This block's channels of all chunks in ascending order, rounded, to all blocks of the cluster as inputs of the next
// product.
template <int GROUP>
static __device__ __forceinline__ void collect_chunks(const persistent_args &p, persistent_shared *sh,
                                                      const block_place &me, int layer, int thread) {
    constexpr int BLOCKS_A_ROW = HEAD / COLLECTED, SHARE = WINDOW / WORKER_WARPS;
    static_assert(COLLECTED == 32 && 2 * SHARE <= 32, "a channel a lane, and a warp's states");
    thread = afresh(thread);
    int warp = thread / 32, lane = thread % 32;
    if (me.rank >= GROUP * BLOCKS_A_ROW) return;
    uint32_t number = sh->first_number + (uint32_t)layer;
    const uint64_t *from = p.notes + (size_t)me.kv_head * HEAD_NOTES + Q_NOTES + (size_t)warp * CHUNK_NOTES;
    chain s = CHAIN_START;
    float sum = 0;
#pragma unroll 1
    for (int first = 0; first < me.n_chunks; first += WINDOW, from += (size_t)WINDOW * CHUNK_NOTES) {
        int n = min((int)WINDOW, me.n_chunks - first), mine = warp + lane / 2 * WORKER_WARPS;
        if (first > 0) sync_some(1, WORKERS); // the last window has been read
        // Looked at again and again until they are there; then the rest is, mostly.
        if (lane < 2 * SHARE && mine < n)
            (lane % 2 ? sh->deep.window.state[mine].y : sh->deep.window.state[mine].x) = await_note(
                p, from + (size_t)(mine - warp) * CHUNK_NOTES + GROUP * HEAD + me.rank / BLOCKS_A_ROW * 2 + lane % 2,
                number);
        __syncwarp();
        uint64_t v[SHARE];
        patience w = {};
        for (bool complete = false; !complete;) {
            complete = true;
#pragma unroll
            for (int i = 0; i < SHARE; i++) {
                v[i] = (uint64_t)number << 32;
                if (warp + i * WORKER_WARPS < n)
                    v[i] = look_at(from + (size_t)i * WORKER_WARPS * CHUNK_NOTES + me.rank * COLLECTED + lane);
            }
#pragma unroll
            for (int i = 0; i < SHARE; i++) complete &= v[i] >> 32 == number;
            if (complete) break;
            w.look(p);
            poll_again();
        }
#pragma unroll
        for (int i = 0; i < SHARE; i++)
            if (warp + i * WORKER_WARPS < n)
                sh->deep.window.o[warp + i * WORKER_WARPS][lane] = __uint_as_float((uint32_t)v[i]);
        sync_some(1, WORKERS);
        if (warp > 0) continue;
#pragma unroll 4
        for (int i = 0; i < n; i++) {
            float2 state = sh->deep.window.state[i];
            float a, c;
            chain_add(s, state.x, state.y, a, c);
            sum = chain_value(sum, a, sh->deep.window.o[i][lane], c);
        }
    }
    if (warp > 0) return;
    sh->own[lane] = sum / s.l;
    __syncwarp();
    // As put_inputs has 32 columns: a quarter of them to a block.
    const float *quarter = sh->own + lane % 4 * 2;
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = pack_bf16(quarter[8 * i], quarter[8 * i + 1]);
    push16(sh->inputs + me.rank * COLLECTED * 2 + lane % 4 * 16,
           make_float4(__uint_as_float(r[0]), __uint_as_float(r[1]), __uint_as_float(r[2]), __uint_as_float(r[3])),
           &sh->chunks_arrived, (unsigned)lane / 4);
}

// Its result, rounded, as inputs of the next product.
template <int GROUP, enum pace PACE>
static __device__ __forceinline__ void finish_attention(const persistent_args &p, persistent_shared *sh,
                                                        const block_place &me, int layer, int thread) {
    bool ready = PACE == OWN_PACE || me.n_chunks == 1; // rounded already
    uint64_t *arrived = &sh->chunks_arrived;
    if (thread == 0)
        barrier_expect(arrived, ready ? GROUP * HEAD * 2 : (uint32_t)me.n_chunks * GROUP * (HEAD * 4 + 16));
    wait_for(p, arrived, layer % 2);
    if (!ready) chain_chunks<GROUP>(sh, me.n_chunks, thread);
}

#endif
