// test_dtype.c: the table of element types and the conversions to and from half precision. Whole blocks are compared
// with another implementation in tests/e2e/test_quant.py.
#include "format/dtype.h"
#include "format/finite.h"
#include "format/groups.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

// What the bits say is what the values are: random bytes, of which some are NaN or Inf, and each f16 of a block in
// turn.
static void test_is_finite(void **state) {
    (void)state;
    enum { BLOCKS = 3, MOST = BLOCKS * 256 };
    uint32_t rng = 5;
    for (int t = 0; t < DTYPE_COUNT; t++) {
        enum dtype type = (enum dtype)t;
        const struct dtype_info *info = dtype_info(type);
        size_t n = BLOCKS * info->block_len, n_bytes = BLOCKS * info->block_bytes, n_good = 0, n_bad = 0;
        if (!info->is_weight) continue;
        for (int trial = 0; trial < 3000; trial++) {
            unsigned char bytes[BLOCKS * 210 + 1];
            float values[MOST];
            bool finite = true;
            for (size_t i = 0; i < n_bytes; i++)
                bytes[1 + i] = (unsigned char)((rng = rng * 1664525u + 1013904223u) >> 24);
            dtype_to_f32(type, bytes + 1, values, n); // any alignment
            for (size_t i = 0; i < n; i++) finite = finite && isfinite(values[i]);
            assert_int_equal(dtype_is_finite(type, bytes + 1, n), finite);
            n_good += finite, n_bad += !finite;
        }
        assert_true(n_good > 100 && n_bad > 10);
    }
}

static void test_names(void **state) {
    (void)state;
    for (int i = 0; i < DTYPE_COUNT; i++) {
        enum dtype type;
        assert_true(dtype_from_name(dtype_info((enum dtype)i)->name, &type));
        assert_int_equal(type, i);
    }
    enum dtype type;
    assert_true(dtype_from_name("q4_k", &type));
    assert_int_equal(type, DTYPE_Q4_K);
    assert_false(dtype_from_name("Q4_", &type));
    assert_false(dtype_from_name("", &type));
}

static void test_row_bytes(void **state) {
    (void)state;
    size_t n = 7;
    assert_true(dtype_row_bytes(DTYPE_BF16, 3, &n));
    assert_int_equal(n, 6);
    assert_true(dtype_row_bytes(DTYPE_Q6_K, 512, &n));
    assert_int_equal(n, 420);
    assert_true(dtype_row_bytes(DTYPE_Q8_0, 0, &n));
    assert_int_equal(n, 0);
    assert_false(dtype_row_bytes(DTYPE_Q8_0, 33, &n));
    assert_false(dtype_row_bytes(DTYPE_F32, SIZE_MAX / 2, &n));
    assert_int_equal(n, 0);
}

static void test_f16_round_trip(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = f16_to_f32((uint16_t)h);
        if (isnan(f)) assert_true(isnan(f16_to_f32(f16_from_f32(f))));
        else assert_int_equal(f16_from_f32(f), h);
    }
}

// Integers, scales and minima say the same as dtype_to_f32, bit for bit, of random blocks with finite scales.
static void test_groups(void **state) {
    (void)state;
    enum { N = 2048 };
    uint64_t random = 5;
    for (enum dtype type = 0; type < DTYPE_COUNT; type++) {
        const struct dtype_info *info = dtype_info(type);
        if (!info->is_weight || !info->is_quantised) continue;
        static unsigned char data[N / 32 * 40];
        static float values[N], scale[N / 16], min[N / 16];
        static int8_t q[N];
        for (size_t i = 0; i < sizeof data; i++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            data[i] = (unsigned char)(random >> 56) & 0xBB;
        }
        memset(min, 0, sizeof min);
        dtype_to_f32(type, data, values, N);
        dtype_to_groups(type, data, q, scale, min, N);
        size_t len = dtype_group_len(type), with_min = 0;
        for (size_t i = 0; i < N; i++) {
            float v = scale[i / len] * (float)q[i] + min[i / len];
            if (v == 0 && values[i] == 0) continue; // -0 + 0
            assert_int_equal(bits_of(v), bits_of(values[i]));
        }
        for (size_t g = 0; g < N / len; g++) with_min += min[g] != 0;
        assert_int_equal(with_min > 0, dtype_has_min(type));
    }
}

// Against the definition: the nearest half, of two equally near the one with an even mantissa.
static void test_f16_rounding(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 0x7BFF; h++) { // between each finite half and the next one
        float low = f16_to_f32((uint16_t)h), high = f16_to_f32((uint16_t)(h + 1));
        float middle = (low + high) / 2; // exact in f32
        assert_int_equal(f16_from_f32(middle), h & 1 ? h + 1 : h);
        assert_int_equal(f16_from_f32(nextafterf(middle, 0)), h);
        assert_int_equal(f16_from_f32(nextafterf(middle, INFINITY)), h + 1);
        assert_int_equal(f16_from_f32(-middle), 0x8000 | (h & 1 ? h + 1 : h));
    }
    assert_int_equal(f16_from_f32(65504), 0x7BFF);
    assert_int_equal(f16_from_f32(nextafterf(65520, 0)), 0x7BFF);
    assert_int_equal(f16_from_f32(65520), 0x7C00);
    assert_int_equal(f16_from_f32(INFINITY), 0x7C00);
    assert_int_equal(f16_from_f32(-3e38f), 0xFC00);
}

static void test_bf16(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = bf16_to_f32((uint16_t)h);
        if (isnan(f)) assert_true(isnan(bf16_to_f32(bf16_from_f32(f))));
        else assert_int_equal(bf16_from_f32(f), h);
    }
    assert_int_equal(bf16_from_f32(bf16_to_f32(0x3F80) * (1 + 1 / 256.0f)), 0x3F80); // halfway, to even
    assert_int_equal(bf16_from_f32(bf16_to_f32(0x3F81) * (1 + 1 / 256.0f)), 0x3F82);
    assert_int_equal(bf16_from_f32(3.4e38f), 0x7F80);
}

// Block loops respect their bounds and any alignment of the source.
static void test_blocks_in_place(void **state) {
    (void)state;
    for (int i = 0; i < DTYPE_COUNT; i++) {
        const struct dtype_info *info = dtype_info((enum dtype)i);
        if (!info->is_weight) continue;
        unsigned char raw[1 + 2 * 256];
        float once[256 + 1], again[2 * 256 + 1];
        for (size_t k = 0; k < sizeof raw; k++) raw[k] = (unsigned char)(k * 37 % 61);
        memmove(raw + 1 + info->block_bytes, raw + 1, info->block_bytes);
        once[info->block_len] = again[2 * info->block_len] = 1234;
        dtype_to_f32((enum dtype)i, raw + 1, once, info->block_len);
        dtype_to_f32((enum dtype)i, raw + 1, again, 2 * info->block_len);
        assert_memory_equal(once, again, info->block_len * sizeof(float));
        assert_memory_equal(once, again + info->block_len, info->block_len * sizeof(float));
        assert_int_equal(bits_of(once[info->block_len]), bits_of(1234));
        assert_int_equal(bits_of(again[2 * info->block_len]), bits_of(1234));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_is_finite), cmocka_unit_test(test_names),
        cmocka_unit_test(test_row_bytes), cmocka_unit_test(test_f16_round_trip),
        cmocka_unit_test(test_groups),    cmocka_unit_test(test_f16_rounding),
        cmocka_unit_test(test_bf16),      cmocka_unit_test(test_blocks_in_place),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
