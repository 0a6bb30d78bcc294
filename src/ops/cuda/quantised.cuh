// quantised.cuh: quantised weights as products read them on the device, and a slice's sum.
//
// A record holds 8 rows by 128 columns: the integers, then each row's scales, as many bytes as the file has but for
// some padding. The integers are stored without their sign, u = q + BIAS, in the order in which tensor cores want them:
// lane 4 g + t of chunk c (32 columns) holds row g, columns 32 c + 8 r + 2 t + h for r = 0 to 3 and h = 0, 1, as
// - 8 bits: 8 bytes, byte 2 r + h;
// - 4 bits: a word, bits 4 r .. of its low half (h = 0) and of its high half (h = 1);
// - 6 bits: the low four like 4 bits, and after those of all chunks the high two: a word for two chunks, of whose
// halves
//   bits 2 i .. are value i = 4 (c % 2) + r.
//
// The sum: the input is rounded to bf16, integers are exact in bf16. A group (16 or 32 columns) is one or two matrix
// instructions from +0, in ascending order, and the slice's sum a chain over its groups from +0:
//   y = fma(scale, sum q x, y);  then, for types with minima,  y = fma(min, sum x, y)
// where sum x is a matrix instruction, or two, of ones. scale and min are the f32 values of format/groups.h.
#ifndef TANDEM_OPS_CUDA_QUANTISED_CUH
#define TANDEM_OPS_CUDA_QUANTISED_CUH

#include "ops/cuda/products.cuh"

// ---- Formats ------------------------------------------------------------------------------------------------------
// What a format says of itself: BITS, BIAS, GROUP (columns of a scale), HAS_MIN, SCALE_BYTES of a row's slice;
// `scales`, a row's scales as they are stored, with scale(c, j) of chunk c's group j, 64 times too large, and min(c,
// j); where the stored value k of a row of the file is, and where a slice's scales are.

static __device__ __forceinline__ uint16_t bytes_16(const unsigned char *p) {
    return (uint16_t)(p[0] | p[1] << 8);
}

// A half of v as f32, 64 times as large.
static __device__ __forceinline__ float half_64(uint32_t v, int high) {
    return half_to_float((uint16_t)(high ? v >> 16 : v)) * 64.0f;
}

// One f16 scale for 32 columns.
struct half_scales {
    static constexpr int GROUP = 32, SCALE_BYTES = 8;
    static constexpr bool HAS_MIN = false;

    struct scales {
        uint2 raw;
        __device__ __forceinline__ float scale(int c, int) const {
            return half_64(c < 2 ? raw.x : raw.y, c % 2);
        }
        // As it is stored.
        __device__ __forceinline__ float own(int c) const {
            uint32_t v = c < 2 ? raw.x : raw.y;
            return half_to_float((uint16_t)(c % 2 ? v >> 16 : v));
        }
        __device__ __forceinline__ float min(int, int) const {
            return 0;
        }
    };
    static __device__ __forceinline__ scales load(const unsigned char *p) {
        return {*reinterpret_cast<const uint2 *>(p)};
    }
    // The file's blocks of 32 take block_bytes, of which the first two are the scale.
    static __device__ void put(unsigned char *to, const unsigned char *row, int slice, int n_in, int block_bytes) {
        for (int c = 0; c < 4 && slice * SLICE + c * 32 < n_in; c++)
            reinterpret_cast<uint16_t *>(to)[c] = bytes_16(row + (slice * 4 + c) * block_bytes);
    }
};

// One f16 scale and one f16 minimum for 32 columns: a chunk's d [2], m [2].
struct half_min_scales {
    static constexpr int GROUP = 32, SCALE_BYTES = 16;
    static constexpr bool HAS_MIN = true;

    struct scales {
        uint4 raw;
        __device__ __forceinline__ uint32_t chunk(int c) const {
            return c == 0 ? raw.x : c == 1 ? raw.y : c == 2 ? raw.z : raw.w;
        }
        __device__ __forceinline__ float scale(int c, int) const {
            return half_64(chunk(c), 0);
        }
        __device__ __forceinline__ float min(int c, int) const {
            return half_to_float((uint16_t)(chunk(c) >> 16));
        }
    };
    static __device__ __forceinline__ scales load(const unsigned char *p) {
        return {*reinterpret_cast<const uint4 *>(p)};
    }
    static __device__ void put(unsigned char *to, const unsigned char *row, int slice, int n_in, int block_bytes) {
        for (int i = 0; i < 16 && slice * SLICE + i / 4 * 32 < n_in; i++)
            to[i] = row[(slice * 4 + i / 4) * block_bytes + i % 4];
    }
};

// A scale and a minimum of six bits for 32 columns, in units of two f16s that 256 columns share: d [2], dmin [2], the
// slice's scales [4] and minima [4].
struct k_min_scales_32 {
    static constexpr int GROUP = 32, SCALE_BYTES = 12;
    static constexpr bool HAS_MIN = true;

    struct scales {
        uint32_t d, scale_6, min_6;
        __device__ __forceinline__ float scale(int c, int) const {
            return half_64(d, 0) * (float)(scale_6 >> 8 * c & 255u);
        }
        __device__ __forceinline__ float min(int c, int) const {
            return -(half_to_float((uint16_t)(d >> 16)) * (float)(min_6 >> 8 * c & 255u));
        }
    };
    static __device__ __forceinline__ scales load(const unsigned char *p) {
        const uint32_t *w = reinterpret_cast<const uint32_t *>(p);
        return {w[0], w[1], w[2]};
    }
    // `block`: the 256 columns'; the order of the bits is that of format/groups.c.
    static __device__ void put(unsigned char *to, const unsigned char *block, int slice) {
        const unsigned char *packed = block + 4;
        for (int i = 0; i < 4; i++) to[i] = block[i];
        for (int i = 0; i < 4; i++) {
            bool first = slice % 2 == 0;
            to[4 + i] = (unsigned char)(first ? packed[i] & 63 : (packed[8 + i] & 15) | (packed[i] >> 2 & 48));
            to[8 + i] = (unsigned char)(first ? packed[4 + i] & 63 : packed[8 + i] >> 4 | (packed[4 + i] >> 2 & 48));
        }
    }
};

// A signed scale of eight bits for 16 columns, in units of an f16 that 256 columns share: d [2], nothing [2], the
// slice's scales [8].
struct k_scales_16 {
    static constexpr int GROUP = 16, SCALE_BYTES = 12;
    static constexpr bool HAS_MIN = false;

    struct scales {
        uint32_t d, scale_8[2];
        __device__ __forceinline__ float scale(int c, int j) const {
            return half_64(d, 0) * (float)(int8_t)(scale_8[c / 2] >> (c % 2 * 16 + j * 8));
        }
        __device__ __forceinline__ float min(int, int) const {
            return 0;
        }
    };
    static __device__ __forceinline__ scales load(const unsigned char *p) {
        const uint32_t *w = reinterpret_cast<const uint32_t *>(p);
        return {w[0], {w[1], w[2]}};
    }
};

// The formats, in the order of enum dtype. RARE: fewer kernels.

struct q8_0 : half_scales {
    static constexpr int BITS = 8, BIAS = 128;
    static constexpr bool RARE = false;
    static __device__ unsigned stored(const unsigned char *row, int k) {
        return row[k / 32 * 34 + 2 + k % 32] ^ 0x80u;
    }
    static __device__ void put_scales(unsigned char *to, const unsigned char *row, int slice, int n_in) {
        put(to, row, slice, n_in, 34);
    }
};

// Nibble k % 32 of a block of 16 bytes: the low ones first.
static __device__ __forceinline__ unsigned nibble(const unsigned char *block, int k) {
    return block[k % 16] >> (k / 16 % 2 * 4) & 15u;
}

// The fifth bit of it, at its place.
static __device__ __forceinline__ unsigned fifth_bit(const unsigned char *bits, int k) {
    return (bits[k % 32 / 8] >> k % 8 & 1u) << 4;
}

struct q4_0 : half_scales {
    static constexpr int BITS = 4, BIAS = 8;
    static constexpr bool RARE = false;
    static __device__ unsigned stored(const unsigned char *row, int k) {
        return nibble(row + k / 32 * 18 + 2, k);
    }
    static __device__ void put_scales(unsigned char *to, const unsigned char *row, int slice, int n_in) {
        put(to, row, slice, n_in, 18);
    }
};

struct q4_1 : half_min_scales {
    static constexpr int BITS = 4, BIAS = 0;
    static constexpr bool RARE = true;
    static __device__ unsigned stored(const unsigned char *row, int k) {
        return nibble(row + k / 32 * 20 + 4, k);
    }
    static __device__ void put_scales(unsigned char *to, const unsigned char *row, int slice, int n_in) {
        put(to, row, slice, n_in, 20);
    }
};

struct q5_0 : half_scales {
    static constexpr int BITS = 6, BIAS = 16;
    static constexpr bool RARE = true;
    static __device__ unsigned stored(const unsigned char *row, int k) {
        const unsigned char *b = row + k / 32 * 22;
        return nibble(b + 6, k) | fifth_bit(b + 2, k);
    }
    static __device__ void put_scales(unsigned char *to, const unsigned char *row, int slice, int n_in) {
        put(to, row, slice, n_in, 22);
    }
};

struct q5_1 : half_min_scales {
    static constexpr int BITS = 6, BIAS = 0;
    static constexpr bool RARE = true;
    static __device__ unsigned stored(const unsigned char *row, int k) {
        const unsigned char *b = row + k / 32 * 24;
        return nibble(b + 8, k) | fifth_bit(b + 4, k);
    }
    static __device__ void put_scales(unsigned char *to, const unsigned char *row, int slice, int n_in) {
        put(to, row, slice, n_in, 24);
    }
};

// Four bits for a scale and four for a minimum of 16 columns: d [2], dmin [2], the slice's pairs [8].
struct q2_k {
    static constexpr int BITS = 4, BIAS = 0, GROUP = 16, SCALE_BYTES = 12;
    static constexpr bool HAS_MIN = true, RARE = true;

    struct scales {
        uint32_t d, pairs[2];
        __device__ __forceinline__ uint32_t pair(int c, int j) const {
            return pairs[c / 2] >> (c % 2 * 16 + j * 8);
        }
        __device__ __forceinline__ float scale(int c, int j) const {
            return half_64(d, 0) * (float)(pair(c, j) & 15u);
        }
        __device__ __forceinline__ float min(int c, int j) const {
            return -(half_to_float((uint16_t)(d >> 16)) * (float)(pair(c, j) >> 4 & 15u));
        }
    };
    static __device__ __forceinline__ scales load(const unsigned char *p) {
        const uint32_t *w = reinterpret_cast<const uint32_t *>(p);
        return {w[0], {w[1], w[2]}};
    }
    static __device__ unsigned stored(const unsigned char *row, int k) {
        return row[k / 256 * 84 + 16 + k / 128 % 2 * 32 + k % 32] >> (k / 32 % 4 * 2) & 3u;
    }
    static __device__ void put_scales(unsigned char *to, const unsigned char *row, int slice, int) {
        const unsigned char *b = row + slice / 2 * 84;
        for (int i = 0; i < 4; i++) to[i] = b[80 + i];
        for (int i = 0; i < 8; i++) to[4 + i] = b[slice % 2 * 8 + i];
    }
};

struct q3_k : k_scales_16 {
    static constexpr int BITS = 4, BIAS = 4;
    static constexpr bool RARE = true;
    static __device__ unsigned stored(const unsigned char *row, int k) {
        const unsigned char *b = row + k / 256 * 110;
        unsigned low = b[32 + k / 128 % 2 * 32 + k % 32] >> (k / 32 % 4 * 2) & 3u;
        return low | (b[k % 32] >> (k % 256 / 32) & 1u) << 2;
    }
    static __device__ void put_scales(unsigned char *to, const unsigned char *row, int slice, int) {
        const unsigned char *b = row + slice / 2 * 110, *packed = b + 96;
        for (int i = 0; i < 2; i++) to[i] = b[108 + i];
        for (int i = 0; i < 8; i++) {
            int g = slice % 2 * 8 + i; // format/groups.c has the order of the bits
            int low = packed[g % 8] >> 4 * (g / 8) & 15, high = packed[8 + g % 4] >> 2 * (g / 4) & 3;
            to[4 + i] = (unsigned char)((low | high << 4) - 32);
        }
    }
};

struct q4_k : k_min_scales_32 {
    static constexpr int BITS = 4, BIAS = 0;
    static constexpr bool RARE = false;
    static __device__ unsigned stored(const unsigned char *row, int k) {
        return row[k / 256 * 144 + 16 + k / 64 % 4 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15u;
    }
    static __device__ void put_scales(unsigned char *to, const unsigned char *row, int slice, int) {
        put(to, row + slice / 2 * 144, slice);
    }
};

struct q5_k : k_min_scales_32 {
    static constexpr int BITS = 6, BIAS = 0;
    static constexpr bool RARE = true;
    static __device__ unsigned stored(const unsigned char *row, int k) {
        const unsigned char *b = row + k / 256 * 176;
        unsigned low = b[48 + k / 64 % 4 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15u;
        return low | (b[16 + k % 32] >> (k % 256 / 32) & 1u) << 4;
    }
    static __device__ void put_scales(unsigned char *to, const unsigned char *row, int slice, int) {
        put(to, row + slice / 2 * 176, slice);
    }
};

struct q6_k : k_scales_16 {
    static constexpr int BITS = 6, BIAS = 32;
    static constexpr bool RARE = false;
    static __device__ unsigned stored(const unsigned char *row, int k) {
        const unsigned char *b = row + k / 256 * 210;
        int half = k / 128 % 2, s = k / 32 % 4;
        unsigned low = b[64 * half + s % 2 * 32 + k % 32] >> (s / 2 * 4) & 15u;
        return low | (b[128 + 32 * half + k % 32] >> 2 * s & 3u) << 4;
    }
    static __device__ void put_scales(unsigned char *to, const unsigned char *row, int slice, int) {
        const unsigned char *b = row + slice / 2 * 210;
        for (int i = 0; i < 2; i++) to[i] = b[208 + i];
        for (int i = 0; i < 8; i++) to[4 + i] = b[192 + slice % 2 * 8 + i];
    }
};

// ---- Products -----------------------------------------------------------------------------------------------------

// Two stored values, one in each half of a word, as bf16s of (u - BIAS) / 64, exactly. A bf16 whose bits are u is
// u 2^-133, subnormal or not, and 2^127 is bf16's largest power. `shift`: the values stand so many bits higher.
template <int BIAS, int SHIFT = 0> static __device__ __forceinline__ uint32_t to_bf16(uint32_t stored) {
    constexpr uint32_t FACTOR = (uint32_t)(254 - SHIFT) << 7; // 2^(127 - SHIFT)
    // -BIAS / 64: 2 is 0xC000, and half of a power is 0x80 less.
    constexpr uint32_t OFFSET = BIAS == 128  ? 0xC000u
                                : BIAS == 32 ? 0xBF00u
                                : BIAS == 16 ? 0xBE80u
                                : BIAS == 8  ? 0xBE00u
                                : BIAS == 4  ? 0xBD80u
                                             : 0x8000u;
    static_assert(BIAS == 0 || OFFSET != 0x8000u, "a bias that is known");
    return fma_bf16x2(stored, FACTOR * 0x10001u, OFFSET * 0x10001u);
}

template <typename Q> struct quantised_weights {
    static constexpr int INTEGERS = Q::BITS * SLICE, RECORD = INTEGERS + 8 * Q::SCALE_BYTES;
    static constexpr bool RARE = Q::RARE;

    // A lane's share of chunk c as two steps of mma's 8-column operand.
    static __device__ __forceinline__ void fragment(const unsigned char *record, int lane, int c, uint32_t (&f)[4]) {
        if (Q::BITS == 8) {
            uint2 w = *reinterpret_cast<const uint2 *>(record + c * 256 + lane * 8);
            f[0] = to_bf16<Q::BIAS>(__byte_perm(w.x, 0, 0x4140));
            f[1] = to_bf16<Q::BIAS>(__byte_perm(w.x, 0, 0x4342));
            f[2] = to_bf16<Q::BIAS>(__byte_perm(w.y, 0, 0x4140));
            f[3] = to_bf16<Q::BIAS>(__byte_perm(w.y, 0, 0x4342));
            return;
        }
        uint32_t w = *reinterpret_cast<const uint32_t *>(record + c * 128 + lane * 4);
        if (Q::BITS == 4) {
            f[0] = to_bf16<Q::BIAS>(w & 0x000F000Fu);
            f[1] = to_bf16<Q::BIAS, 4>(w & 0x00F000F0u);
            f[2] = to_bf16<Q::BIAS>(w >> 8 & 0x000F000Fu);
            f[3] = to_bf16<Q::BIAS, 4>(w >> 8 & 0x00F000F0u);
            return;
        }
        uint32_t high = *reinterpret_cast<const uint32_t *>(record + 512 + c / 2 * 128 + lane * 4);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int at = 2 * (c % 2 * 4 + r);
            uint32_t top = at <= 4 ? high << (4 - at) : high >> (at - 4);
            f[r] = to_bf16<Q::BIAS>((w >> 4 * r & 0x000F000Fu) | (top & 0x00300030u));
        }
    }

    template <int MT, int NT, bool PAIRED, typename RECORDS, typename INPUT>
    static __device__ __forceinline__ void slice(float (&d)[MT][NT][4], int lane, RECORDS record, INPUT input) {
        constexpr uint32_t ONES = 0x3F803F80u;
        constexpr int GROUPS = 32 / Q::GROUP; // of a chunk
        typename Q::scales upper[MT], lower[MT];
#pragma unroll
        for (int i = 0; i < MT; i++) {
            int at = INTEGERS + lane / 4 * Q::SCALE_BYTES;
            upper[i] = Q::load(record(2 * i) + at);
            if (PAIRED) lower[i] = Q::load(record(2 * i + 1) + at);
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) d[i][j][e] = 0;
        }
#pragma unroll
        for (int c = 0; c < SLICE / 32; c++) {
            uint4 x[NT];
            uint32_t u[MT][4], v[MT][4];
#pragma unroll
            for (int j = 0; j < NT; j++) x[j] = input(j, c);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                fragment(record(2 * i), lane, c, u[i]);
                if (PAIRED) fragment(record(2 * i + 1), lane, c, v[i]);
                else v[i][0] = v[i][1] = v[i][2] = v[i][3] = 0;
            }
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                float sum[MT][NT][4] = {}, plain[NT][4] = {};
#pragma unroll
                for (int step = group; step < (GROUPS == 1 ? 2 : group + 1); step++) {
#pragma unroll
                    for (int j = 0; j < NT; j++) {
                        uint32_t low = step ? x[j].z : x[j].x, high = step ? x[j].w : x[j].y;
                        if (Q::HAS_MIN) mma(plain[j], ONES, ONES, ONES, ONES, low, high);
#pragma unroll
                        for (int i = 0; i < MT; i++)
                            mma(sum[i][j], u[i][2 * step], v[i][2 * step], u[i][2 * step + 1], v[i][2 * step + 1], low,
                                high);
                    }
                }
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    float above = upper[i].scale(c, group), below = PAIRED ? lower[i].scale(c, group) : 0.0f;
                    float above_min = 0, below_min = 0;
                    if (Q::HAS_MIN) above_min = upper[i].min(c, group);
                    if (Q::HAS_MIN && PAIRED) below_min = lower[i].min(c, group);
#pragma unroll
                    for (int j = 0; j < NT; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            d[i][j][e] = fmaf(e < 2 ? above : below, sum[i][j][e], d[i][j][e]);
                            if (Q::HAS_MIN)
                                d[i][j][e] = fmaf(e < 2 ? above_min : below_min, plain[j][e % 2], d[i][j][e]);
                        }
                }
            }
        }
    }

    // Element (row g, column k) of a record, as the file's type defines it.
    static __device__ float value(const unsigned char *record, int g, int k) {
        int lane = g * 4 + k % 8 / 2, c = k / 32, r = k % 32 / 8, h = k % 2;
        unsigned u;
        if (Q::BITS == 8) {
            u = record[c * 256 + lane * 8 + 2 * r + h];
        } else {
            u = *reinterpret_cast<const uint32_t *>(record + c * 128 + lane * 4) >> (4 * r + 16 * h) & 15u;
            if (Q::BITS == 6)
                u |= (*reinterpret_cast<const uint32_t *>(record + 512 + c / 2 * 128 + lane * 4) >>
                          (2 * (c % 2 * 4 + r) + 16 * h) &
                      3u)
                     << 4;
        }
        typename Q::scales s = Q::load(record + INTEGERS + g * Q::SCALE_BYTES);
        int group = k % 32 / Q::GROUP;
        float scale = s.scale(c, group) * 0.015625f, value = scale * (float)((int)u - Q::BIAS);
        return Q::HAS_MIN ? value + s.min(c, group) : value;
    }

    // Writes a lane's share of two chunks, 2 pair and 2 pair + 1, of a row of the file; columns beyond n_in become q =
    // 0.
    static __device__ void put(unsigned char *record, int lane, const unsigned char *row, int slice, int pair,
                               int n_in) {
        uint32_t top = 0;
        for (int c = 2 * pair; c < 2 * pair + 2; c++) {
            uint32_t low = 0;
            for (int i = 0; i < 8; i++) {
                int r = i / 2, h = i % 2, k = slice * SLICE + c * 32 + 8 * r + 2 * (lane % 4) + h;
                uint32_t u = k < n_in ? Q::stored(row, k) : (uint32_t)Q::BIAS;
                if (Q::BITS == 8) record[c * 256 + lane * 8 + i] = (unsigned char)u;
                low |= (u & 15u) << (4 * r + 16 * h);
                top |= (u >> 4 & 3u) << (2 * (c % 2 * 4 + r) + 16 * h);
            }
            if (Q::BITS != 8) *reinterpret_cast<uint32_t *>(record + c * 128 + lane * 4) = low;
        }
        if (Q::BITS == 6) *reinterpret_cast<uint32_t *>(record + 512 + pair * 128 + lane * 4) = top;
    }
};

#endif
