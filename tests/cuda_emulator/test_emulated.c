// test_emulated.c: the CUDA backend's own sources on the emulated GPU (emulator.h): whole models in every way that
// there is to run them give the same bytes of logits, and are as close to the f64 oracle as the contract asks. Unlike
// test_cuda.c it needs no GPU; it proves the order of sums, the indices and the waiting, not the chip's arithmetic.
//
//   test_emulated [PATTERN]    only the tests whose names match (cmocka's pattern)
//   test_emulated_80           the sources' path for chips before Hopper: fewer tests
#include "emulator.h"

#include "../ops/cuda_ways.h"
#include "base/clock.h"
#include "doctor/doctor.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

// ---- The same bits in every way
// -----------------------------------------------------------------------------------------------

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

// Grouped heads of other widths, biases, no norm of heads.
static void test_heads(void **state) {
    (void)state;
    static const struct {
        const char *model;
        struct part part;
    } shapes[] = {
        {"synthetic:tiny-qwen2", {1, 96, 128, 4, 1, 64}}, {"synthetic:tiny-llama", {1, 96, 128, 8, 4, 32}},
        {"synthetic:tiny-llama", {1, 96, 128, 3, 3, 32}}, {"models/tandem-tiny", {1, 96, 128, 5, 1, 96}},
        {"models/tandem-tiny", {1, 96, 128, 4, 2, 128}},  {"models/tandem-tiny", {1, 96, 128, 16, 1, 32}},
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
                                .n_neighbours = 1},
                  4 + i, 8);
}

// ---- Against the oracle
// ----------------------------------------------------------------------------------------------------------

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
}

// ---- The doctor
// ------------------------------------------------------------------------------------------------------------------

// `tandem check --device cuda`: every op in its place, fused and not, and the logits, against the oracles on the CPU.
static void test_doctor(void **state) {
    (void)state;
    struct error err = {0};
    emulator_set(&(struct emulator_options){.seed = 12, .n_sms = 8});
    struct doctor_options options = {.model = "synthetic:tiny-llama",
                                     .device = "cuda:0+wide-attention",
                                     .stages = 1u << STAGE_MODEL | 1u << STAGE_OPS,
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
    assert_int_equal(report->stages[STAGE_OPS].verdict, VERDICT_SKIPPED);
    assert_int_equal(report->stages[STAGE_MODEL].verdict, VERDICT_OK);
    assert_true(report->stages[STAGE_MODEL].n_checks > 500);
    doctor_report_free(report);
    free(report);
    doctor_close(d);
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
        cmocka_unit_test(test_qwen3), cmocka_unit_test(test_split),  cmocka_unit_test(test_tiles),
        cmocka_unit_test(test_heads), cmocka_unit_test(test_oracle), cmocka_unit_test(test_doctor),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    else if (strstr(argv[0], "test_emulated_80")) cmocka_set_test_filter("test_heads");
    return cmocka_run_group_tests(tests, create_pool, say_counts);
}
