// helpers.h: what the tests of the ops share: random data, a context whose scratch is poisoned and guarded.
#ifndef TANDEM_TESTS_OPS_HELPERS_H
#define TANDEM_TESTS_OPS_HELPERS_H

#include "ops/ops.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define U 0x1p-24 // unit roundoff of f32

static const float canary = 1234.5f;

static inline float uniform(uint32_t *rng) {
    *rng = *rng * 1664525u + 1013904223u;
    return (float)(*rng >> 8) / 8388608.0f - 1.0f;
}

static inline void *checked_alloc(size_t count, size_t item) {
    void *p = calloc(count ? count : 1, item);
    assert_non_null(p);
    return p;
}

static inline float *random_floats(size_t n, float scale, uint32_t seed) {
    float *x = checked_alloc(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = uniform(&seed) * scale;
    return x;
}

static inline float *nan_floats(size_t n) {
    float *x = checked_alloc(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = NAN;
    return x;
}

// A context with exactly the scratch that the limits ask for, all NaN, and a canary behind it.
static inline struct op_ctx open_ctx(const struct ops *ops, struct ops_limits limits, uint32_t fusion) {
    struct op_ctx c = {.ops = ops, .pool = pool_create(limits.n_threads, NULL), .fusion = fusion};
    assert_non_null(c.pool);
    assert_true(ops_scratch_floats(&limits, &c.scratch_floats));
    c.scratch = nan_floats(c.scratch_floats + 1);
    c.scratch[c.scratch_floats] = canary;
    return c;
}

static inline void close_ctx(struct op_ctx *c) {
    assert_true(c->scratch[c->scratch_floats] == canary);
    pool_free(c->pool);
    free(c->scratch);
}

#endif
