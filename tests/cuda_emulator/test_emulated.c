// test_emulated.c: the CUDA backend's own sources on the emulated GPU (emulator.h): whole models in every way that
// there is to run them give the same bytes of logits, and are as close to the f64 oracle as the contract asks. Unlike
// test_cuda.c it needs no GPU; it proves the order of sums, the indices and the waiting, not the chip's arithmetic.
//
//   test_emulated [PATTERN]    only the tests whose names match (cmocka's pattern)
//   test_emulated_80           the sources' path for chips before Hopper: fewer tests
#include "emulator.h"

#include "../ops/cuda_sampling.h"
#include "../ops/cuda_ways.h"
#include "base/clock.h"
#include "doctor/doctor.h"
#include "format/noise.h"
#include "ops/cuda/device.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

// ---- The same bits in every way -----------------------------------------------------------------------------------

// The size of the GPU decides on the shapes of tiles.
static void open_gpu(uint64_t seed, int n_sms) {
    struct error err = {0};
    emulator_set(&(struct emulator_options){.seed = seed, .n_sms = n_sms});
    cuda = ops_open("cuda", NULL, NULL, &err);
    if (!cuda) fail_msg("%s", err.text);
}

// Parts of the models, since an emulated GPU does some 10 million multiplications a second.
static void same_bits(const char *model, struct part part, struct plan plan, uint64_t seed, int n_sms) {
    double start = clock_seconds();
    struct subject s;
    size_t n_ways = 0;
    open_gpu(seed, n_sms);
    open_part(&s, model, &part);
    size_t different = compare_ways(&s, model, &plan, &n_ways);
    print_message("%s: %zu ways, %zu differ, %.1f s\n", model, n_ways, different, clock_seconds() - start);
    close_subject(&s);
    ops_close(cuda);
    assert_int_equal(different, 0);
}

// Across the end of a page; every product's kernel, by the number of tokens; recorded or not.
static void test_qwen3(void **state) {
    (void)state;
    static const size_t chunks[] = {2, 4, 7, 9, 17, 33}, neighbours[] = {2, 4, 9};
    same_bits("synthetic:tiny-qwen3", (struct part){.n_layers = 2, .n_vocab = 203, .n_ff = 200},
              (struct plan){.length = 40,
                            .lead = 31,
                            .standard_chunk = 11,
                            .singly = true,
                            .whole = true,
                            .each_op = true,
                            .chunks = chunks,
                            .n_chunks = 6,
                            .neighbours = neighbours,
                            .n_neighbours = 3,
                            .n_ragged = 3,
                            .n_crowd = 3},
              1, 8);
}

// A sequence in two chunks of 256 positions: split over blocks and combined, or not.
static void test_split(void **state) {
    (void)state;
    static const size_t chunks[] = {3, 10}, neighbours[] = {3};
    same_bits("synthetic:tiny-qwen3", (struct part){.n_layers = 1, .n_vocab = 64, .n_ff = 64},
              (struct plan){.length = 262,
                            .lead = 252,
                            .standard_chunk = 131,
                            .chunks = chunks,
                            .n_chunks = 2,
                            .neighbours = neighbours,
                            .n_neighbours = 1},
              2, 8);
    // On a small GPU many sequences are not split, or streamed.
    same_bits(
        "synthetic:tiny-qwen3", (struct part){.n_layers = 1, .n_vocab = 64, .n_ff = 64},
        (struct plan){.length = 259, .lead = 254, .standard_chunk = 131, .neighbours = neighbours, .n_neighbours = 1},
        13, 1);
    // In eight bits two blocks share an SM, of groups of two query heads and of more.
    for (size_t i = 0; i < 2; i++)
        same_bits("models/tandem-tiny", (struct part){1, 64, 64, i ? 4 : 2, 1, i ? 64 : 128},
                  (struct plan){.length = 258,
                                .lead = 255,
                                .standard_chunk = 129,
                                .neighbours = neighbours,
                                .n_neighbours = 1,
                                .fp8 = true},
                  14 + i, 1);
}

// Scores far apart.
static void test_loud(void **state) {
    (void)state;
    static const struct plan plan = {.length = 262, .lead = 252, .standard_chunk = 131};
    struct subject s;
    open_gpu(3, 8);
    open_loud(&s, "synthetic:tiny-qwen3", &(struct part){.n_layers = 1, .n_vocab = 64, .n_ff = 64}, 24);
    assert_int_equal(compare_ways(&s, "loud", &plan, NULL), 0);
    close_subject(&s);
    ops_close(cuda);
}

// Prompts deep enough for every stage of attention's ring to be used again; in chunks that leave half of the last
// tile's rows empty, too. K and V in 16 bits and in eight; groups of 1, 2 and 4 query heads.
static void test_prompts(void **state) {
    (void)state;
    static const size_t chunks[] = {40, 100};
    for (size_t i = 0; i < 4; i++)
        same_bits(
            "models/tandem-tiny", (struct part){1, 64, 64, i == 3 ? 4 : 2, i == 1 ? 2 : 1, i % 2 ? 64 : 128},
            (struct plan){
                .length = 330, .lead = 328, .standard_chunk = 165, .chunks = chunks, .n_chunks = 2, .fp8 = i >= 2},
            31 + i, 2);
}

// Sequences of all depths side by side, their chunks dealt out to few warps and to many.
static void test_company(void **state) {
    (void)state;
    static const struct {
        const char *model;
        struct part part;
        int n_sms;
    } shapes[] = {
        {"synthetic:tiny-qwen3", {1, 64, 64, 0, 0, 0}, 2}, {"models/tandem-tiny", {1, 64, 64, 2, 1, 128}, 1},
        {"models/tandem-tiny", {1, 64, 64, 3, 1, 128}, 3}, {"models/tandem-tiny", {1, 64, 64, 5, 1, 96}, 1},
        {"models/tandem-tiny", {1, 64, 64, 16, 2, 32}, 2},
    };
    static const size_t depths[] = {0, 255, 31, 700, 32, 256, 5, 63, 1030, 40};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        double start = clock_seconds();
        struct subject s;
        size_t different, n = sizeof depths / sizeof depths[0];
        open_gpu(60 + i, shapes[i].n_sms);
        open_part(&s, shapes[i].model, &shapes[i].part);
        uint32_t streams = variant_named("stream-attention");
        different =
            compare_company(&s, streams, depths, n, false) + compare_company(&s, streams, depths + 1, n - 3, true);
        print_message("shape %zu: %zu sequences differ, %.1f s\n", i, different, clock_seconds() - start);
        close_subject(&s);
        ops_close(cuda);
        assert_int_equal(different, 0);
    }
}

// Large tiles whose stages are filled again and again.
static void test_tiles(void **state) {
    (void)state;
    static const size_t chunks[] = {40, 70};
    for (int n_sms = 1; n_sms <= 132; n_sms += 131)
        same_bits("synthetic:tiny-llama", (struct part){.n_layers = 1, .n_vocab = 70, .n_ff = 768},
                  (struct plan){.length = 72, .lead = 69, .standard_chunk = 36, .chunks = chunks, .n_chunks = 2}, 3,
                  n_sms);
}

// Every tile of the products by warp groups, those that add to the residual stream in parts and not.
static void test_groups(void **state) {
    (void)state;
    static const size_t chunks[] = {40};
    for (int shape = 1; shape <= 10; shape++) {
        struct subject s;
        struct plan plan = {.length = 68,
                            .lead = 66,
                            .standard_chunk = 34,
                            .chunks = chunks,
                            .n_chunks = 1,
                            .variants = VARIANT_WGMMA | VARIANT_PARTS};
        size_t n_ways = 0;
        open_gpu((uint64_t)shape, 4);
        cuda->device->variants |= VARIANT_PARTS;
        ((struct cuda_state *)(uintptr_t)cuda)->tile_shape = shape;
        open_part(&s, "synthetic:tiny-qwen3",
                  &(struct part){.n_layers = 1, .n_vocab = 150, .n_ff = shape % 2 ? 256 : 200});
        size_t different = compare_ways(&s, "groups", &plan, &n_ways);
        close_subject(&s);
        ops_close(cuda);
        print_message("tile %d: %zu ways, %zu differ\n", shape, n_ways, different);
        assert_int_equal(different, 0);
    }
}

// Large tiles whose rows all exist, several a block: each way in which their results are written. Of 200 tokens, tiles
// of 192 reach beyond what has room for them.
static void test_pieces(void **state) {
    (void)state;
    static const size_t chunks[] = {200, 270};
    for (int shape = 5; shape <= 7; shape++) {
        struct subject s;
        struct plan plan = {.length = 274,
                            .lead = 270,
                            .standard_chunk = 137,
                            .chunks = chunks,
                            .n_chunks = 2,
                            .n_ragged = shape == 7 ? 3 : 0, // K and V of sequences that begin anywhere
                            .variants = VARIANT_WGMMA | VARIANT_STORE_HEADS};
        size_t n_ways = 0;
        open_gpu(80 + (uint64_t)shape, 3);
        ((struct cuda_state *)(uintptr_t)cuda)->tile_shape = shape;
        open_part(&s, "synthetic:qwen3-0.6b", &(struct part){1, 75, 256, 2, 1, 128});
        size_t different = compare_ways(&s, "pieces", &plan, &n_ways);
        close_subject(&s);
        ops_close(cuda);
        print_message("tile %d: %zu ways, %zu differ\n", shape, n_ways, different);
        assert_int_equal(different, 0);
    }
}

// Products in clusters: one, several side by side, and more than the GPU holds; quantised weights; and these by warp
// groups, in small tiles and in large ones.
static void test_clusters(void **state) {
    (void)state;
    static const struct {
        const char *model;
        int n_sms, n_ff, shape;
    } cases[] = {
        {"synthetic:tiny-qwen3", 8, 200, 0},
        {"synthetic:tiny-qwen2", 24, 72, 0},
        {"synthetic:tiny-qwen3:q8_0", 8, 288, 0},
        {"synthetic:tiny-qwen3:q4_k", 2, 256, 2},
    };
    static const size_t chunks[] = {9, 40};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct subject s;
        struct plan plan = {.length = 44, .lead = 40, .standard_chunk = 22, .chunks = chunks, .n_chunks = 2};
        size_t n_ways = 0;
        open_gpu(60 + i, cases[i].n_sms);
        cuda->device->variants |= VARIANT_CLUSTERS | VARIANT_WGMMA_QUANTISED;
        cuda->device->variants &= ~(uint32_t)VARIANT_PARTS;
        ((struct cuda_state *)(uintptr_t)cuda)->tile_shape = cases[i].shape;
        open_part(&s, cases[i].model, &(struct part){.n_layers = 1, .n_vocab = 75, .n_ff = (size_t)cases[i].n_ff});
        size_t different = compare_ways(&s, "clusters", &plan, &n_ways);
        close_subject(&s);
        ops_close(cuda);
        print_message("%s on %d SMs: %zu ways, %zu differ\n", cases[i].model, cases[i].n_sms, n_ways, different);
        assert_int_equal(different, 0);
    }
}

// Large tiles of quantised weights with more slices than a ring has stages.
static void test_quantised_ring(void **state) {
    (void)state;
    static const size_t chunks[] = {40};
    struct subject s;
    struct plan plan = {.length = 44, .lead = 40, .standard_chunk = 22, .chunks = chunks, .n_chunks = 1};
    size_t n_ways = 0;
    open_gpu(70, 3);
    cuda->device->variants |= VARIANT_WGMMA_QUANTISED;
    ((struct cuda_state *)(uintptr_t)cuda)->tile_shape = 2;
    open_part(&s, "synthetic:qwen3-0.6b:q8_0", &(struct part){1, 75, 128, 2, 1, 128});
    size_t different = compare_ways(&s, "ring", &plan, &n_ways);
    close_subject(&s);
    ops_close(cuda);
    print_message("%zu ways, %zu differ\n", n_ways, different);
    assert_int_equal(different, 0);
}

// Grouped heads of other widths, biases, no norm of heads.
static void test_heads(void **state) {
    (void)state;
    static const struct {
        const char *model;
        struct part part;
        bool fp8;
    } shapes[] = {
        {"synthetic:tiny-qwen2", {1, 96, 128, 4, 1, 64}, true},
        {"synthetic:tiny-llama", {1, 96, 128, 8, 4, 32}, false},
        {"synthetic:tiny-llama", {1, 96, 128, 3, 3, 32}, false},
        {"models/tandem-tiny", {1, 96, 128, 5, 1, 96}, false},
        {"models/tandem-tiny", {1, 96, 128, 4, 2, 128}, false},
        {"models/tandem-tiny", {1, 96, 128, 16, 1, 32}, false},
        {"models/tandem-tiny", {1, 96, 128, 2, 1, 128}, true},
        {"models/tandem-tiny", {1, 96, 128, 5, 1, 96}, true},
    };
    static const size_t chunks[] = {3, 12}, neighbours[] = {5};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        same_bits(shapes[i].model, shapes[i].part,
                  (struct plan){.length = 36,
                                .lead = 28,
                                .standard_chunk = 18,
                                .chunks = chunks,
                                .n_chunks = 2,
                                .neighbours = neighbours,
                                .n_neighbours = 1,
                                .fp8 = shapes[i].fp8},
                  4 + i, 2);
}

// ---- Quantised weights --------------------------------------------------------------------------------------------

// Those for which all kernels are made, and one for which fewer are.
static const char *const quantised[] = {"q8_0", "q4_0", "q4_k", "q6_k", "q2_k"};
enum { N_QUANTISED = sizeof quantised / sizeof quantised[0] };

// Every product's kernel, by the number of tokens; K types ask for rows of 256.
static void test_quantised(void **state) {
    (void)state;
    static const size_t chunks[] = {3, 9}, neighbours[] = {2, 5};
    for (size_t i = 0; i < N_QUANTISED; i++) {
        char model[64];
        snprintf(model, sizeof model, "synthetic:tiny-qwen3:%s", quantised[i]);
        same_bits(model, (struct part){.n_layers = 1, .n_vocab = 75, .n_ff = i < 2 ? 160 : 256},
                  (struct plan){.length = 36,
                                .lead = 33,
                                .standard_chunk = 18,
                                .chunks = chunks,
                                .n_chunks = i == 0 ? 2 : 1,
                                .neighbours = neighbours,
                                .n_neighbours = 2},
                  20 + i, 8);
    }
}

// Larger tiles; and types that differ within a layer.
static void test_quantised_tiles(void **state) {
    (void)state;
    static const size_t chunks[] = {40};
    static const char *const models[] = {"synthetic:tiny-llama:q8_0", "synthetic:tiny-llama:q4_k_m"};
    for (size_t i = 0; i < 2; i++)
        same_bits(models[i], (struct part){.n_layers = 1, .n_vocab = 70, .n_ff = 256},
                  (struct plan){.length = 67, .lead = 66, .standard_chunk = 36, .chunks = chunks, .n_chunks = 1},
                  30 + i, 1);
}

// The element (row, column) and one product's row, from the types' definitions, in f64.
static void test_quantised_values(void **state) {
    (void)state;
    enum { ROWS = 21, MOST_TOKENS = 9 };
    static const enum dtype types[] = {DTYPE_Q8_0, DTYPE_Q4_0, DTYPE_Q4_1, DTYPE_Q5_0, DTYPE_Q5_1,
                                       DTYPE_Q2_K, DTYPE_Q3_K, DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};
    enum { N_TYPES = sizeof types / sizeof types[0] };
    static const size_t widths[] = {32, 256, 288, 768};
    struct error err = {0};
    open_gpu(40, 4);
    struct device *d = cuda->device;
    for (size_t i = 0; i < 4 * N_TYPES; i++) {
        enum dtype type = types[i / 4];
        size_t n_in = widths[i % 4], row_bytes;
        if (!dtype_row_bytes(type, n_in, &row_bytes)) continue;
        unsigned char *data = calloc(ROWS, row_bytes);
        float *values = calloc(ROWS * n_in, sizeof *values), *x = calloc(MOST_TOKENS * n_in, sizeof *x);
        float *found = calloc((n_in + ROWS) * MOST_TOKENS, sizeof *found);
        double *rounded = calloc(n_in, sizeof *rounded);
        assert_true(data && values && x && found && rounded);
        struct noise noise;
        noise_seed(&noise, 7, i);
        for (size_t r = 0; r < ROWS; r++) noise_row(&noise, type, data + r * row_bytes, n_in, 0.1f);
        dtype_to_f32(type, data, values, ROWS * n_in);
        noise_floats(&noise, x, MOST_TOKENS * n_in, 1.0f);
        struct matrix w = {"w", type, ROWS, n_in, row_bytes, data, NULL}, there;
        assert_true(d->matrix_bytes(d, &w) > 0);
        if (!matrix_upload(&w, d, NULL, &there, &err)) fail_msg("%s", err.text);
        float *dx = d->alloc(d, (n_in + ROWS) * MOST_TOKENS * sizeof *dx, "x", &err), *dy = dx + n_in * MOST_TOKENS;
        int32_t ids[] = {20, 0, 7, 8, 13, 20, 1, 2, 3}, *dids = d->alloc(d, sizeof ids, "ids", &err);
        struct op_ctx ctx = {.ops = cuda};
        d->put(d, dids, ids, sizeof ids);
        cuda->embed(&ctx, dx, &there, dids, MOST_TOKENS);
        d->get(d, found, dx, MOST_TOKENS * n_in * sizeof *found);
        for (size_t t = 0; t < MOST_TOKENS; t++)
            assert_memory_equal(found + t * n_in, values + (size_t)ids[t] * n_in, n_in * sizeof *found);
        d->put(d, dx, x, MOST_TOKENS * n_in * sizeof *x);
        cuda->matmul(&ctx, dy, dx, &there, MOST_TOKENS);
        d->get(d, found, dy, MOST_TOKENS * ROWS * sizeof *found);
        for (size_t t = 0; t < MOST_TOKENS; t++) {
            ops_round_activation(DTYPE_BF16, x + t * n_in, rounded, n_in);
            for (size_t r = 0; r < ROWS; r++) {
                double sum = 0, size = 0;
                for (size_t k = 0; k < n_in; k++) {
                    double term = rounded[k] * (double)values[r * n_in + k];
                    sum += term;
                    size += fabs(term);
                }
                // A minimum's term and the scale's may be several times as large as their sum.
                double off = fabs((double)found[t * ROWS + r] - sum);
                if (!(off <= size * 0x1p-20))
                    fail_msg("%s, %zu columns: token %zu, row %zu: %.9g, not %.9g", dtype_info(type)->name, n_in, t, r,
                             (double)found[t * ROWS + r], sum);
            }
        }
        d->free(d, (void *)(uintptr_t)there.data);
        d->free(d, dx);
        d->free(d, dids);
        free(data);
        free(values);
        free(x);
        free(found);
        free(rounded);
    }
    ops_close(cuda);
}

// Weights on their way: rows of 256 KB, 16 of which are copied at once, so that slots are used again.
static void test_upload(void **state) {
    (void)state;
    enum { ROWS = 85, COLUMNS = 131072 };
    struct error err = {0};
    open_gpu(50, 4);
    struct device *d = cuda->device;
    uint16_t *data = calloc((size_t)ROWS * COLUMNS, sizeof *data);
    float *found = calloc(COLUMNS, sizeof *found), *wanted = calloc(COLUMNS, sizeof *wanted);
    float *dx = d->alloc(d, COLUMNS * sizeof *dx, "x", &err);
    int32_t *dids = d->alloc(d, sizeof *dids, "ids", &err);
    assert_true(data && found && wanted && dx && dids);
    for (size_t i = 0; i < (size_t)ROWS * COLUMNS; i++) data[i] = (uint16_t)(0x3C00 + (i * 2654435761u >> 20) % 1024);
    struct matrix w = {"w", DTYPE_BF16, ROWS, COLUMNS, COLUMNS * sizeof *data, data, NULL}, there;
    struct op_ctx ctx = {.ops = cuda};
    struct pool *const pools[] = {NULL, pool};
    for (size_t i = 0; i < 2; i++) {
        if (!matrix_upload(&w, d, pools[i], &there, &err)) fail_msg("%s", err.text);
        for (int32_t row = 0; row < ROWS; row++) {
            d->put(d, dids, &row, sizeof row);
            cuda->embed(&ctx, dx, &there, dids, 1);
            d->get(d, found, dx, COLUMNS * sizeof *found);
            dtype_to_f32(DTYPE_BF16, data + (size_t)row * COLUMNS, wanted, COLUMNS);
            assert_memory_equal(found, wanted, COLUMNS * sizeof *found);
        }
        d->free(d, (void *)(uintptr_t)there.data);
    }
    struct matrix wide = {"wide", DTYPE_BF16, 1, (5 << 20) / 2, 5 << 20, data, NULL};
    assert_false(matrix_upload(&wide, d, NULL, &there, &err));
    assert_non_null(strstr(err.text, "wide"));
    d->free(d, dx);
    d->free(d, dids);
    free(data);
    free(found);
    free(wanted);
    ops_close(cuda);
}

// All layers in one kernel, whose blocks run side by side: two clusters, each with a KV head; three, one without; two,
// one with the KV head and the other with all columns of n_ff; across the ends of a page and of chunks, beyond one and
// two chunks for every block of a cluster, and beyond those that are collected at once, some of them others' than the
// cluster's with the KV head.
static void test_persistent(void **state) {
    (void)state;
    static const struct {
        int n_sms;
        struct part part;
    } shapes[] = {
        {24, {.n_layers = 3, .n_vocab = 96, .n_ff = 700}},
        {16, {.n_layers = 1, .n_vocab = 96, .n_ff = 300, .n_heads = 2, .n_kv_heads = 2, .head_dim = 128}},
        {8, {.n_layers = 2, .n_vocab = 96, .n_ff = 128, .n_heads = 2, .n_kv_heads = 1, .head_dim = 128}},
        {24, {.n_layers = 2, .n_vocab = 96, .n_ff = 416}},
        {8, {.n_layers = 1, .n_vocab = 96, .n_ff = 128, .n_heads = 1, .n_kv_heads = 1, .head_dim = 128}},
        {16, {.n_layers = 1, .n_vocab = 96, .n_ff = 256, .n_heads = 1, .n_kv_heads = 1, .head_dim = 128}},
        {24, {.n_layers = 2, .n_vocab = 96, .n_ff = 416}},
        {16, {.n_layers = 2, .n_vocab = 96, .n_ff = 128, .n_heads = 2, .n_kv_heads = 1, .head_dim = 128}},
    };
    static const enum dtype types[] = {DTYPE_BF16, DTYPE_BF16, DTYPE_BF16, DTYPE_Q8_0,
                                       DTYPE_Q4_0, DTYPE_BF16, DTYPE_Q8_0, DTYPE_Q8_0};
    static const size_t depths[] = {0, 30, 254, 510, 2046, 2303, 4094, 16638};
    static const struct { size_t first, n; } range[] = {{0, 7}, {0, 5}, {0, 7}, {0, 3}, {0, 3}, {7, 1}, {6, 1}, {0, 7}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        double start = clock_seconds();
        struct subject s;
        open_gpu(20 + i, shapes[i].n_sms);
        open_part_as(&s, "models/tandem-tiny", &shapes[i].part, types[i]);
        size_t before = emulator_counts().together, n = range[i].n;
        size_t different = compare_depths(&s, variant_named("persistent"), depths + range[i].first, n);
        size_t ran = emulator_counts().together - before;
        print_message("shape %zu: %zu steps in one kernel, %zu differ, %.1f s\n", i, ran, different,
                      clock_seconds() - start);
        close_subject(&s);
        ops_close(cuda);
        assert_int_equal(different, 0);
        assert_int_equal(ran, 3 * n);
    }
}

// Steps of one token queued as three kernels or as two, between batches, across the ends of a page and of chunks, and
// from the kernel for one chunk a block to the one for several.
static void test_chain(void **state) {
    (void)state;
    static const struct part part = {
        .n_layers = 2, .n_vocab = 300, .n_ff = 224, .n_heads = 2, .n_kv_heads = 1, .head_dim = 128};
    static const size_t depths[] = {20, 2030};
    for (size_t i = 0; i < 4; i++) {
        double start = clock_seconds();
        struct subject s;
        open_gpu(40 + i, i % 2 ? 8 : 16);
        open_part_as(&s, "models/tandem-tiny", &part, i / 2 ? DTYPE_Q8_0 : DTYPE_BF16);
        uint32_t chained = variant_named("chained-steps"), beside = variant_named("choice-beside");
        if (i % 2) cuda->device->variants &= ~beside;
        size_t different = compare_chain(&s, i % 2 ? chained : chained | beside, depths[i / 2], false) +
                           compare_chain(&s, i % 2 ? chained : chained | beside, depths[i / 2], true);
        print_message("depth %zu%s: %zu differ, %.1f s\n", depths[i / 2], i % 2 ? "" : ", choices beside", different,
                      clock_seconds() - start);
        close_subject(&s);
        ops_close(cuda);
        assert_int_equal(different, 0);
    }
}

// ---- The most probable token, and the host's sampler, on the device -----------------------------------------------

// Rows shorter than a block's threads, longer than its registers hold.
static void test_choices(void **state) {
    (void)state;
    static const size_t sizes[] = {31, 203, 4099, 200003}, rows[] = {5, 16, 4, 2};
    for (size_t i = 0; i < 4; i++) {
        open_gpu(30 + i, 8);
        size_t different = compare_choices(cuda, sizes[i], rows[i], (unsigned)i);
        ops_close(cuda);
        assert_int_equal(different, 0);
    }
}

static void test_sampling(void **state) {
    (void)state;
    static const struct sampling_plan plans[] = {{203, 64, 12, 1}, {4099, 7, 8, 2}, {9, 16, 20, 3}, {1500, 270, 1, 4}};
    for (size_t i = 0; i < sizeof plans / sizeof *plans; i++) {
        double start = clock_seconds();
        size_t n_filtered = 0;
        open_gpu(20 + i, i % 2 ? 132 : 8);
        size_t different = compare_sampling(cuda, &plans[i], &n_filtered);
        ops_close(cuda);
        print_message("%zu tokens of %zu, %zu of them filtered, %zu differ, %.1f s\n",
                      plans[i].n_rows * plans[i].n_rounds, plans[i].n_vocab, n_filtered, different,
                      clock_seconds() - start);
        assert_int_equal(different, 0);
    }
}

// ---- Against the oracle -------------------------------------------------------------------------------------------

static void judge(const char *model, double logits_limit) {
    struct subject s;
    open_gpu(11, 8);
    open_subject(&s, model);
    size_t bad = judge_results(&s, model, logits_limit);
    close_subject(&s);
    ops_close(cuda);
    assert_int_equal(bad, 0);
}

static void test_oracle(void **state) {
    (void)state;
    judge("synthetic:tiny-qwen2", 0.6);
    judge("models/tandem-tiny", 0.5);
    judge("synthetic:tiny-qwen3:q8_0", 0.6);
}

// A build's kernels run on the chips that they were compiled for; any other is named.
static void test_chips(void **state) {
    (void)state;
    static const int chips[] = {75, 80, 86, 89, 90, 100, 120};
    struct error err = {0};
    emulator_set(&(struct emulator_options){.seed = 1});
    cuda = ops_open("cuda", NULL, NULL, &err);
    if (!cuda) fail_msg("%s", err.text);
    bool hopper = variant_named("persistent") != 0;
    ops_close(cuda);
    for (size_t i = 0; i < sizeof chips / sizeof *chips; i++) {
        char capability[32];
        snprintf(capability, sizeof capability, "capability is %d.%d;", chips[i] / 10, chips[i] % 10);
        emulator_set(&(struct emulator_options){.seed = 1, .chip = chips[i]});
        const struct ops *ops = ops_open("cuda:0", NULL, NULL, &err);
        if (hopper ? chips[i] == 90 : chips[i] >= 80) {
            if (!ops) fail_msg("%s", err.text);
            ops_close(ops);
            continue;
        }
        assert_null(ops);
        assert_non_null(strstr(err.text, capability));
        assert_non_null(strstr(err.text, hopper ? "make CUDA_CHIP=80 builds for others" : "8.0 and later"));
    }
    emulator_set(&(struct emulator_options){.seed = 1});
}

// ---- The doctor ---------------------------------------------------------------------------------------------------

// `tandem check --device cuda`: every op alone and in its place, fused and not, and the logits, against the oracles on
// the CPU. A diagnosis that is asked although nothing is wrong names nothing.
static void examine(const char *device, const char *kv_type, uint32_t stages) {
    struct error err = {0};
    emulator_set(&(struct emulator_options){.seed = 12, .n_sms = 4});
    struct doctor_options options = {.model = "synthetic:micro-qwen3",
                                     .device = device,
                                     .kv_type = kv_type,
                                     .stages = stages,
                                     .threads = 1,
                                     .seed = 1,
                                     .budget = 1,
                                     .no_diagnosis = true};
    struct doctor *d = doctor_open(&options, &err);
    if (!d) fail_msg("%s", err.text);
    assert_non_null(d->ops->device);
    struct doctor_report *report = calloc(1, sizeof *report);
    assert_non_null(report);
    if (!doctor_run(d, report, &err)) fail_msg("%s", err.text);
    if (report->verdict != VERDICT_OK) fail_msg("%s", report->first.message);
    assert_int_equal(report->stages[STAGE_OPS].verdict, VERDICT_OK);
    assert_true(report->stages[STAGE_OPS].n_checks > 2000);
    if (stages >> STAGE_MODEL & 1) assert_true(report->stages[STAGE_MODEL].n_checks > 500);
    if (!diagnose(d, report, &err)) fail_msg("%s", err.text);
    if (report->first.message[0]) fail_msg("%s", report->first.message);
    assert_int_equal(report->n_diagnoses, 0);
    doctor_report_free(report);
    free(report);
    doctor_close(d);
}

static void test_doctor(void **state) {
    (void)state;
    examine("cuda:0", "bf16", 1u << STAGE_OPS | 1u << STAGE_MODEL);
    examine("cuda:0", "fp8", 1u << STAGE_OPS);
}

static int create_pool(void **state) {
    (void)state;
    struct error err = {0};
    pool = pool_create(1, &err);
    return pool ? 0 : -1;
}

static int say_counts(void **state) {
    (void)state;
    pool_free(pool);
    struct emulator_counts c = emulator_counts();
    print_message("%zu launches of %zu blocks, %zu of them begun early; %zu copies, %zu late; %zu graphs; %zu matrix "
                  "instructions\n",
                  c.launches, c.blocks, c.early_blocks, c.copies, c.late_copies, c.replayed, c.matrix_steps);
    return 0;
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chips),   cmocka_unit_test(test_qwen3),          cmocka_unit_test(test_company),
        cmocka_unit_test(test_prompts), cmocka_unit_test(test_split),          cmocka_unit_test(test_loud),
        cmocka_unit_test(test_tiles),   cmocka_unit_test(test_heads),          cmocka_unit_test(test_persistent),
        cmocka_unit_test(test_chain),   cmocka_unit_test(test_choices),        cmocka_unit_test(test_oracle),
        cmocka_unit_test(test_doctor),  cmocka_unit_test(test_quantised),      cmocka_unit_test(test_quantised_tiles),
        cmocka_unit_test(test_pieces),  cmocka_unit_test(test_quantised_ring), cmocka_unit_test(test_quantised_values),
        cmocka_unit_test(test_groups),  cmocka_unit_test(test_sampling),       cmocka_unit_test(test_clusters),
        cmocka_unit_test(test_upload),
    };
    // What an older chip has of its own: how stages and pages come, and less shared memory for them.
    const struct CMUnitTest of_an_older_chip[] = {
        cmocka_unit_test(test_chips), cmocka_unit_test(test_heads),   cmocka_unit_test(test_split),
        cmocka_unit_test(test_tiles), cmocka_unit_test(test_prompts), cmocka_unit_test(test_oracle),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    else if (strstr(argv[0], "test_emulated_80"))
        return cmocka_run_group_tests(of_an_older_chip, create_pool, say_counts);
    return cmocka_run_group_tests(tests, create_pool, say_counts);
}
