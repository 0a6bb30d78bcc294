// persistent_attention.cuh: attention within the kernel of all layers (persistent.cu), from the pushed q, k and v to
// the out product's inputs.
#ifndef TANDEM_OPS_CUDA_PERSISTENT_ATTENTION_CUH
#define TANDEM_OPS_CUDA_PERSISTENT_ATTENTION_CUH

#include "ops/cuda/held.cuh"
#include "ops/cuda/persistent_ring.cuh"

// ---- Attention ----------------------------------------------------------------------------------------------------

// q's row or k, normed and rotated: kv.cuh's load_head of what was pushed.
static __device__ __forceinline__ void load_rotated(float (&v)[4], const float *from, const float *norm,
                                                    const float *cos_sin, float eps, int lane) {
    float w[4], turn[4]; // all that is read is asked for at once
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = from[lane + 32 * i];
#pragma unroll
    for (int i = 0; i < 4; i++) turn[i] = cos_sin[lane + 32 * i];
    if (norm) {
        float s = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = norm[lane + 32 * i];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            s = fmaf(v[i], v[i], s);
            s = fmaf(v[i + 2], v[i + 2], s);
        }
        float r = 1.0f / sqrtf(warp_sum(s) / (float)HEAD + eps);
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = v[i] * r * w[i];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float lo = v[i], hi = v[i + 2], cosine = turn[i], sine = turn[i + 2];
        v[i] = fmaf(lo, cosine, -(hi * sine));
        v[i + 2] = fmaf(hi, cosine, lo * sine);
    }
}

enum {
    KV_STEP = 32 * KV_PAGE_TOKENS,   // elements of a page from channel c to c + 32
    HALF_STEP = KV_PAGE_TOKENS * 32, // bytes from slot s to s + 16
};

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
                                               const persistent_layer &w, int layer, ring_place at, bool first,
                                               bool own, int position, int page, int warp, int lane) {
    position = opaque(position);
    int slot = (int)((unsigned)position % KV_PAGE_TOKENS);
    auto in = [&](unsigned char *kv) { return kv + ((size_t)page * p.n_kv_heads + me.kv_head) * (SLOT_BYTES / 2); };
    at = at.ahead((unsigned)position / KV_PAGE_TOKENS % CHUNK_PAGES);
    if (own && warp >= GROUP) wait_for(p, &sh->full[at.slot], at.parity());
    if (warp < GROUP ? first : own && warp == GROUP) {
        float v[4];
        load_rotated(v, sh->qkv + warp * HEAD,
                     p.is_normed || w.head_norm[0] ? sh->head_norm[layer % 2][warp == GROUP] : NULL, sh->cos_sin, p.eps,
                     lane);
        if (warp == GROUP) {
            put_k(v, sh->ring[at.slot], in(w.kv[0]), slot, lane);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Channel 8 e + 2 t + k of these 32.
                __nv_bfloat16 *to = reinterpret_cast<__nv_bfloat16 *>(&sh->q[warp][i][lane % 8 / 2]);
                to[lane / 8 * 2 + lane % 2] = __float2bfloat16_rn(v[i] * p.scale);
            }
        }
    } else if (own && warp >= 4) {
        put_v(sh->qkv + (GROUP + 1) * HEAD, sh->ring[at.slot] + SLOT_BYTES / 2, in(w.kv[1]), slot, warp, lane);
    }
}

// ---- A chunk ------------------------------------------------------------------------------------------------------
// A warp finds the weights of a page; when all pages' are there, it takes sixteen channels of all of them. K's slots
// and V's channels are the rows of the matrix instruction, and q's and p's rows its columns, as in columns.cuh: the
// group's again and again, so that column c is row c % GROUP, and no lane is without.

// Scores of row t % GROUP at slots 8 j + g.
template <int GROUP>
static __device__ __forceinline__ void page_scores(float (&s)[4], const persistent_shared *sh,
                                                   const unsigned char *page, int lane) {
    // Four matrices at once: slots, the next eight, and both at the next eight channels.
    int slot = lane / 8 % 2 * 8 + lane % 8, channel = lane / 16 * 8;
    const unsigned char *low = page + kv_word(slot, channel) * 16, *high = page + kv_word(slot, channel + 16) * 16;
    float d[2][4] = {};
#pragma unroll
    for (int i = 0; i < HEAD / 32; i++) {
        uint4 q = sh->q[lane / 4 % GROUP][i][lane % 4];
        int here = i * KV_STEP * 2;
#pragma unroll
        for (int m = 0; m < 2; m++) {
            uint4 k = load_matrices<false>(low + here + m * HALF_STEP);
            mma(d[m], k.x, k.y, k.z, k.w, q.x, q.y);
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
            uint4 k = load_matrices<false>(high + here + m * HALF_STEP);
            mma(d[m], k.x, k.y, k.z, k.w, q.z, q.w);
        }
    }
    bool second = lane % GROUP;
#pragma unroll
    for (int j = 0; j < 4; j++) s[j] = second ? d[j / 2][j % 2 * 2 + 1] : d[j / 2][j % 2 * 2];
}

// A warp's page, of which n positions are seen: its weights and their unit.
template <int GROUP>
static __device__ __forceinline__ void weigh_page(persistent_shared *sh, const unsigned char *page, unsigned turn,
                                                  int n, int warp, int lane) {
    int g = lane / 4, half = lane % 4 / 2;
    float s[4], m = NO_UNIT;
    page_scores<GROUP>(s, sh, page, lane);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        s[j] = 8 * j + g < n ? s[j] + LIFT : MINUS_INFINITY;
        m = fmaxf(m, s[j]);
    }
#pragma unroll
    for (int o = 4; o < 32; o *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, o));
    m = ceilf(m);
    // Slots 16 half + g and the one 8 further, of those that the lane has.
    uint32_t pair = pack_bf16(exp2_fast((half ? s[2] : s[0]) - m), exp2_fast((half ? s[3] : s[1]) - m));
    uint16_t *to = reinterpret_cast<uint16_t *>(&sh->p[turn][warp][lane % GROUP][g / 2]) + 4 * half + g % 2;
    to[0] = (uint16_t)pair;
    to[2] = (uint16_t)(pair >> 16);
    if (lane < GROUP) sh->unit[turn][lane][warp] = m;
}

// The chunk's n pages, a page a warp; then this warp knows that all have come.
template <int GROUP>
static __device__ __forceinline__ void weigh_chunk(const persistent_args &p, persistent_shared *sh, ring_place at,
                                                   unsigned turn, int chunk, int n, int position, int warp, int lane) {
    if (warp < n) {
        ring_place mine = at.ahead((unsigned)warp);
        wait_for(p, &sh->full[mine.slot], mine.parity());
        weigh_page<GROUP>(sh, sh->ring[mine.slot], turn, position + 1 - (chunk * (int)CHUNK_PAGES + warp) * ATTN_BLOCK,
                          warp, lane);
    } else if (lane < GROUP) {
        sh->unit[turn][lane][warp] = NO_UNIT;
    }
    if (n > 1 || warp > 0) await_slots(p, sh, at, n, lane);
}

// What a warp has of a chunk: o[i] of row i % GROUP and channel 16 warp + i / 2 * 8 + g, l[i] of row i % GROUP, the
// unit of row g % GROUP.
struct warp_share {
    float o[4], l[4], unit;
};

// From n pages' weights, when all warps have written theirs. All pages but the last are given back.
template <int GROUP>
static __device__ __forceinline__ warp_share chain_pages(persistent_shared *sh, ring_place at, unsigned turn, int n,
                                                         int warp, int lane) {
    int row = lane / 4 % GROUP;
    // Four matrices at once: slots' channels, their next eight, and both of the next eight slots.
    int here = SLOT_BYTES / 2 + kv_word(lane / 16 * 8 + lane % 8, 16 * warp + lane / 8 % 2 * 8) * 16;
    const unsigned char *v = sh->ring[at.slot] + here;
    warp_share c = {};
    uint4 first = load_matrices<true>(v), second = load_matrices<true>(v + HALF_STEP);
    sync_some(1, WORKERS); // weighed
    float unit[CHUNK_PAGES];
#pragma unroll
    for (int i = 0; i < CHUNK_PAGES; i += 4) {
        float4 four = *reinterpret_cast<const float4 *>(&sh->unit[turn][row][i]);
        unit[i] = four.x, unit[i + 1] = four.y, unit[i + 2] = four.z, unit[i + 3] = four.w;
    }
    c.unit = fmaxf(fmaxf(fmaxf(unit[0], unit[1]), fmaxf(unit[2], unit[3])),
                   fmaxf(fmaxf(unit[4], unit[5]), fmaxf(unit[6], unit[7])));
#pragma unroll
    for (int i = 0; i < CHUNK_PAGES; i++) {
        uint4 p = sh->p[turn][i][row][lane % 4], next[2] = {};
        float rate = exp2_fast(unit[i] - c.unit);
        uint32_t rates = pack_bf16(rate, rate);
        ring_place then = at.ahead(1);
        v = sh->ring[then.slot] + here;
        if (i + 1 < CHUNK_PAGES && i + 1 < n)
            next[0] = load_matrices<true>(v), next[1] = load_matrices<true>(v + HALF_STEP);
        p = make_uint4(mul_bf16_pairs(p.x, rates), mul_bf16_pairs(p.y, rates), mul_bf16_pairs(p.z, rates),
                       mul_bf16_pairs(p.w, rates));
        mma(c.l, ONES, ONES, ONES, ONES, p.x, p.y);
        mma(c.o, first.x, first.y, first.z, first.w, p.x, p.y);
        mma(c.l, ONES, ONES, ONES, ONES, p.z, p.w);
        mma(c.o, second.x, second.y, second.z, second.w, p.z, p.w);
        if (i + 1 >= n) break;
        give_back(sh, at, lane);
        at = then;
        first = next[0], second = next[1];
    }
    return c;
}

// Where put_inputs has channel c.
static __device__ __forceinline__ int bytes_before(int c) {
    return c / 32 * 64 + c % 8 / 2 * 16 + c % 32 / 8 * 4 + c % 2 * 2;
}

// o / l, times what inputs are multiplied by.
template <typename W> static __device__ __forceinline__ void divide(float (&r)[4], const warp_share &c) {
    quotients by[2];
    bool fast = true;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        by[i].start(c.l[i] / held_units<W>::INPUTS);
        fast &= by[i].takes();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        fast &= quotients::takes(c.o[i]);
        r[i] = by[i % 2].of(c.o[i]);
    }
    if (fast) return;
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = (c.o[i] + 0.0f) / by[i % 2].divisor; // chaining one chunk makes +0 of -0
}

// A chunk, to all blocks of the cluster; the only chunk as inputs of the next product.
template <int GROUP, typename W>
static __device__ __forceinline__ void push_chunk(persistent_shared *sh, const warp_share &c, int rank, bool only,
                                                  int warp, int lane) {
    int g = lane / 4, t = lane % 4;
    if (only) {
        float r[4];
        divide<W>(r, c);
        // Turned over: channels 2t, 2t + 1 of row g % GROUP; and the eight behind.
        uint2 two = make_uint2(transpose(pack_bf16(r[0], r[1])), transpose(pack_bf16(r[2], r[3])));
        unsigned char *to = sh->inputs + g % GROUP * HEAD * 2 + bytes_before(16 * warp + 2 * t);
#pragma unroll
        for (int i = 0; i < CLUSTER; i += 8 / GROUP) push8(to, two, &sh->chunks_arrived, (unsigned)(g / GROUP + i));
        return;
    }
    chunk_result *to = &sh->chunk[rank];
#pragma unroll
    for (int i = 0; i < CLUSTER; i += 4) {
        unsigned there = (unsigned)(t + i);
        if (GROUP == 2)
            push16(to->o + (8 * warp + g) * 4, make_float4(c.o[0], c.o[1], c.o[2], c.o[3]), &sh->chunks_arrived, there);
        else
            push8(to->o + (8 * warp + g) * 2, make_uint2(__float_as_uint(c.o[0]), __float_as_uint(c.o[2])),
                  &sh->chunks_arrived, there);
        if (warp == 0 && g < GROUP)
            push16(&to->state[g], make_float4(c.unit, g ? c.l[1] : c.l[0], 0, 0), &sh->chunks_arrived, there);
    }
}

// Attention of the cluster's heads over up to eight chunks, one a block.
template <int GROUP, typename W>
static __device__ __forceinline__ void attend(const persistent_args &p, persistent_shared *sh, const block_place &me,
                                              const persistent_layer &w, ring_place &at, kept_slots &kept, int layer,
                                              int position, int token_page, int thread) {
    thread = afresh(thread);
    int warp = thread / 32, lane = thread % 32, n = pages_of(me, me.rank);
    bool own = me.rank == me.n_chunks - 1;
    if (n > 0) {
        if (thread == 0) barrier_expect(&sh->qkv_arrived, (GROUP + 2) * HEAD * 4);
        wait_for(p, &sh->qkv_arrived, layer % 2);
    }
    give_all_back(sh, kept, lane); // there is no room for out's slots and a chunk's pages
    if (n <= 0) return;
    prepare<GROUP>(p, sh, me, w, layer, at, true, own, position, token_page, warp, lane);
    sync_some(1, WORKERS);
    weigh_chunk<GROUP>(p, sh, at, 0, me.rank, n, position, warp, lane);
    push_chunk<GROUP, W>(sh, chain_pages<GROUP>(sh, at, 0, n, warp, lane), me.rank, me.n_chunks == 1, warp, lane);
    at = at.ahead((unsigned)n - 1);
    if (own) before_copies(); // prepare's
    pass(sh, at, 1, lane);
}

// The n chunks in ascending order, in one unit, rounded, as inputs of the next product.
template <int GROUP, typename W>
static __device__ __forceinline__ void chain_chunks(persistent_shared *sh, int n, int thread) {
    // As chunks were pushed: of a warp's channels g and g + 8, of all rows, one after the other.
    int row = thread % GROUP, channel = thread / (16 * GROUP) * 16 + thread / GROUP % 2 * 8 + thread / (2 * GROUP) % 8;
    if (thread < GROUP * HEAD) {
        float most = MINUS_INFINITY, o = 0, l = 0, of[CLUSTER];
        float2 state[CLUSTER];
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) {
            state[i] = make_float2(MINUS_INFINITY, 0);
            if (i < n) state[i] = *reinterpret_cast<const float2 *>(&sh->chunk[i].state[row]);
            of[i] = i < n ? sh->chunk[i].o[thread] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) most = fmaxf(most, state[i].x);
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) {
            if (i >= n) break;
            float rate = exp2_fast(state[i].x - most);
            l = fmaf(state[i].y, rate, l);
            o = fmaf(of[i], rate, o);
        }
        *reinterpret_cast<__nv_bfloat16 *>(sh->inputs + row * HEAD * 2 + bytes_before(channel)) =
            __float2bfloat16_rn(o / (l / held_units<W>::INPUTS));
    }
    sync_some(1, WORKERS);
}

// ---- At its own pace ----------------------------------------------------------------------------------------------
// Every block runs through its chunks alone, and pages' slots are filled again as soon as they have been read. What
// becomes of a chunk is noted in memory, where each block of the KV head's cluster collects some channels of all
// chunks.

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

// A chunk: of the lanes that have the same values each notes one.
template <int GROUP>
static __device__ __forceinline__ void note_chunk(uint64_t *to, const warp_share &c, uint32_t number, int warp,
                                                  int lane) {
    int g = lane / 4, t = lane % 4;
    float value = t / 2 ? (t % 2 ? c.o[3] : c.o[2]) : t % 2 ? c.o[1] : c.o[0];
    if (t % 2 < GROUP) put_note(to + t % 2 * HEAD + 16 * warp + t / 2 * 8 + g, value, number);
    if (warp == 0 && g < GROUP && t < 2)
        put_note(to + GROUP * HEAD + 2 * g + t, t == 0 ? c.unit : g ? c.l[1] : c.l[0], number);
}

// This block's chunks.
template <int GROUP>
static __device__ __forceinline__ void
attend_deep(const persistent_args &p, persistent_shared *sh, const block_place &me, const persistent_layer &w,
            ring_place &at, kept_slots &kept, int layer, int position, int token_page, int thread) {
    thread = afresh(thread);
    int warp = thread / 32, lane = thread % 32;
    const chunk_share &share = sh->share;
    uint32_t number = sh->first_number + (uint32_t)layer;
    uint64_t *q = p.notes + (size_t)share.head * HEAD_NOTES, *chunks = q + Q_NOTES;
    float *q_here = reinterpret_cast<float *>(sh->q) + thread; // two values
    if (me.kv_head >= 0) {
        if (thread == 0) barrier_expect(&sh->qkv_arrived, (GROUP + 2) * HEAD * 4);
        wait_for(p, &sh->qkv_arrived, layer % 2);
        give_all_back(sh, kept, lane); // out's
        prepare<GROUP>(p, sh, me, w, layer, at, true, false, position, token_page, warp, lane);
    } else if (thread < GROUP * HEAD / 2) {
        *q_here = await_note(p, q + thread, number);
    }
    sync_some(1, WORKERS);
    if (me.kv_head >= 0 && me.rank == 0 && share.helped > 0 && thread < GROUP * HEAD / 2)
        put_note(q + thread, *q_here, number);
    unsigned turn = 0;
#pragma unroll 1
    for (int chunk = share.first; chunk < share.end; chunk += share.step, turn ^= 1) {
        int n = pages_of(me, chunk);
        if (chunk == me.n_chunks - 1) {
            prepare<GROUP>(p, sh, me, w, layer, at, false, true, position, token_page, warp, lane);
            before_copies();
            sync_some(1, WORKERS);
        }
        weigh_chunk<GROUP>(p, sh, at, turn, chunk, n, position, warp, lane);
        warp_share c = chain_pages<GROUP>(sh, at, turn, n, warp, lane);
        at = at.ahead((unsigned)n - 1);
        pass(sh, at, 1, lane);
        note_chunk<GROUP>(chunks + (size_t)chunk * CHUNK_NOTES, c, number, warp, lane);
    }
}

// This block's channels of all chunks in ascending order, rounded, to all blocks of the cluster as inputs of the next
// product.
template <int GROUP, typename W>
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
            (lane % 2 ? sh->window.state[mine].y : sh->window.state[mine].x) = await_note(
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
                sh->window.o[warp + i * WORKER_WARPS][lane] = __uint_as_float((uint32_t)v[i]);
        sync_some(1, WORKERS);
        if (warp > 0) continue;
#pragma unroll 4
        for (int i = 0; i < n; i++) {
            float2 state = sh->window.state[i];
            float a, c;
            chain_add(s, state.x, state.y, a, c);
            sum = chain_value(sum, a, sh->window.o[i][lane], c);
        }
    }
    if (warp > 0) return;
    sh->own[lane] = sum / (s.l / held_units<W>::INPUTS);
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
template <int GROUP, typename W, enum pace PACE>
static __device__ __forceinline__ void finish_attention(const persistent_args &p, persistent_shared *sh,
                                                        const block_place &me, int layer, int thread) {
    bool ready = PACE == OWN_PACE || me.n_chunks == 1; // rounded already
    uint64_t *arrived = &sh->chunks_arrived;
    if (thread == 0)
        barrier_expect(arrived, ready ? GROUP * HEAD * 2 : (uint32_t)me.n_chunks * GROUP * (HEAD * 4 + 16));
    wait_for(p, arrived, layer % 2);
    if (!ready) chain_chunks<GROUP, W>(sh, me.n_chunks, thread);
}

#endif
