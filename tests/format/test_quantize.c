// test_quantize.c: rounding to blocks: never worse than the usual rule, within known bounds, sane on odd values.
#include "format/quantize.h"

#include "format/noise.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 1 << 14 };

static const enum dtype quantised[] = {DTYPE_Q8_0, DTYPE_Q4_0, DTYPE_Q4_1, DTYPE_Q5_0, DTYPE_Q5_1,
                                       DTYPE_Q2_K, DTYPE_Q3_K, DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};
enum { N_QUANTISED = sizeof quantised / sizeof quantised[0] };

static float x[N], y[N];
static unsigned char bytes[4 * N];

// Something like trained weights: a sum of several noises, with a few large ones.
static void make_values(uint64_t seed) {
    struct noise noise;
    noise_seed(&noise, seed, 0);
    noise_floats(&noise, x, N, 0.02f);
    for (int k = 0; k < 3; k++) {
        noise_floats(&noise, y, N, 0.02f);
        for (int i = 0; i < N; i++) x[i] += y[i];
    }
    for (int i = 0; i < N; i += 97) x[i] *= 3;
}

static double round_trip(enum dtype type) {
    double off = 0, all = 0;
    memset(bytes, 0xA5, sizeof bytes);
    dtype_from_f32(type, x, bytes, N);
    dtype_to_f32(type, bytes, y, N);
    for (int i = 0; i < N; i++) {
        assert_true(isfinite(y[i]));
        off += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
        all += (double)x[i] * (double)x[i];
    }
    return all > 0 ? sqrt(off / all) : sqrt(off);
}

// "The largest magnitude over the farthest code", as reference quantisers have it.
static double usual_rule(float farthest, float low, float high) {
    double off = 0, all = 0;
    for (int b = 0; b < N; b += 32) {
        float most = 0;
        for (int i = 0; i < 32; i++)
            if (fabsf(x[b + i]) > fabsf(most)) most = x[b + i];
        float d = f16_to_f32(f16_from_f32(most / farthest));
        for (int i = 0; i < 32; i++) {
            float code = roundf(x[b + i] / d);
            code = code < low ? low : code > high ? high : code;
            double e = (double)x[b + i] - (double)(d * code);
            off += e * e;
            all += (double)x[b + i] * (double)x[b + i];
        }
    }
    return sqrt(off / all);
}

static void no_worse_than_the_usual_rule(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 5; seed++) {
        make_values(seed);
        double q4 = round_trip(DTYPE_Q4_0), q5 = round_trip(DTYPE_Q5_0), q8 = round_trip(DTYPE_Q8_0);
        assert_true(q4 < 0.97 * usual_rule(-8, -8, 7)); // by far, in fact
        assert_true(q5 < 0.97 * usual_rule(-16, -16, 15));
        assert_true(q8 <= usual_rule(127, -127, 127) * (1 + 1e-6));
    }
}

static void within_bounds(void **state) {
    (void)state;
    static const double most[N_QUANTISED] = {0.0075, 0.11, 0.095, 0.055, 0.046, 0.34, 0.19, 0.09, 0.045, 0.024};
    make_values(7);
    for (int i = 0; i < N_QUANTISED; i++) {
        double error = round_trip(quantised[i]);
        if (error > most[i]) fail_msg("%s: relative error %g", dtype_info(quantised[i])->name, error);
    }
    assert_true(round_trip(DTYPE_Q4_K) < round_trip(DTYPE_Q4_0) && round_trip(DTYPE_Q5_K) < round_trip(DTYPE_Q5_0));
    assert_true(round_trip(DTYPE_F32) == 0 && round_trip(DTYPE_BF16) < 0x1p-8 && round_trip(DTYPE_F16) < 0x1p-11);
}

// What is in a type already comes out of it as it went in, but for scales that the fit finds only nearly.
static void values_of_the_type_stay(void **state) {
    (void)state;
    static const double most[N_QUANTISED] = {5e-3, 0.01, 0.04, 0.01, 0.04, 0.1, 0.04, 0.05, 0.04, 0.02};
    for (int i = 0; i < N_QUANTISED; i++) {
        struct noise noise;
        noise_seed(&noise, 3, (uint64_t)i);
        noise_row(&noise, quantised[i], bytes, N, 0.05f);
        dtype_to_f32(quantised[i], bytes, x, N);
        double error = round_trip(quantised[i]);
        if (error > most[i]) fail_msg("%s: relative error %g", dtype_info(quantised[i])->name, error);
    }
}

static void odd_values(void **state) {
    (void)state;
    for (int i = 0; i < N_QUANTISED; i++) {
        memset(x, 0, sizeof x);
        assert_true(round_trip(quantised[i]) == 0); // zeros stay zeros
        for (int k = 0; k < N; k++) x[k] = k / 256 % 2 ? 0.25f : -0.25f;
        if (round_trip(quantised[i]) > 0.02) fail_msg("%s: constants", dtype_info(quantised[i])->name);
        memset(x, 0, sizeof x);
        for (int k = 0; k < N; k += 256) x[k + k / 256 % 256] = 1; // one value in a superblock
        if (round_trip(quantised[i]) > 0.02) fail_msg("%s: outliers", dtype_info(quantised[i])->name);
        for (int k = 0; k < N; k++) x[k] = (float)(k % 7 - 3) * 1e-30f; // too small for any f16 scale
        round_trip(quantised[i]);
        for (int k = 0; k < N; k++) x[k] = 1 + (float)(k % 13) * 0.01f; // all positive, far from 0
        if (round_trip(quantised[i]) > 0.08) fail_msg("%s: offsets", dtype_info(quantised[i])->name);
        for (int k = 0; k < N; k++) x[k] = (float)(k % 31 - 15) * 1e3f;
        if (round_trip(quantised[i]) > 0.4) fail_msg("%s: large values", dtype_info(quantised[i])->name);
        for (int k = 0; k < N; k++) x[k] = (float)(k % 3 - 1) * 1e30f; // beyond every scale: finite, if far off
        round_trip(quantised[i]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_worse_than_the_usual_rule),
        cmocka_unit_test(within_bounds),
        cmocka_unit_test(values_of_the_type_stay),
        cmocka_unit_test(odd_values),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
