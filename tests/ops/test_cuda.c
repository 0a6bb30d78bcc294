// test_cuda.c: the CUDA backend on a real GPU, whole models deep: every way to run a sequence (standard and fused, each
// fused op alone, any chunking, next to neighbours, other pages, recorded or not) gives the same bytes of logits, over
// poisoned pages; and every intermediate result is as close to the f64 oracle as the contract asks. Skipped, with the
// reason, where there is no GPU.
#include "base/clock.h"
#include "cuda_sampling.h"
#include "cuda_trials.h"
#include "cuda_ways.h"
#ifdef TANDEM_CUDA
#include "ops/cuda/device.h"
#endif

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

// `lead`: the positions before it are run in one chunk, in every way (0: none): what a large model's time allows.
static void same_bits_of(const char *model, size_t length, size_t lead, bool whole, bool fp8) {
    if (!cuda) skip();
    struct subject s;
    struct plan plan = long_plan;
    size_t n_ways = 0;
    plan.length = length;
    plan.lead = lead;
    plan.whole = whole;
    plan.fp8 = fp8;
    open_subject(&s, model);
    size_t different = compare_ways(&s, model, &plan, &n_ways);
    print_message("%s: %zu ways, %zu differ\n", model, n_ways, different);
    close_subject(&s);
    assert_int_equal(different, 0);
}

static void same_bits(const char *model, size_t length, bool whole) {
    same_bits_of(model, length, 0, whole, false);
}

static void test_tiny_qwen3(void **state) {
    (void)state;
    same_bits("synthetic:tiny-qwen3", 601, true);
}

static void test_tiny_qwen2(void **state) {
    (void)state;
    same_bits("synthetic:tiny-qwen2", 301, true);
}

static void test_tiny_llama(void **state) {
    (void)state;
    same_bits("synthetic:tiny-llama", 300, true);
}

static void test_tandem_tiny(void **state) {
    (void)state;
    same_bits("models/tandem-tiny", 290, true);
}

// Scores so far apart that a row's unit is raised on its way (src/ops/cuda/group_attention.cu); K and V in 16 bits and
// in eight.
static void test_loud(void **state) {
    (void)state;
    if (!cuda) skip();
    for (int fp8 = 0; fp8 < 2; fp8++) {
        struct subject s;
        struct plan plan = long_plan;
        size_t n_ways = 0;
        plan.length = 601;
        plan.fp8 = fp8;
        open_loud(&s, "synthetic:tiny-qwen3", &(struct part){.n_layers = 2, .n_vocab = 64}, 24);
        size_t different = compare_ways(&s, "loud", &plan, &n_ways);
        print_message("synthetic:tiny-qwen3, loud: %zu ways, %zu differ\n", n_ways, different);
        close_subject(&s);
        assert_int_equal(different, 0);
    }
}

static void test_quantised(void **state) {
    (void)state;
    static const char *const types[] = {"q8_0", "q4_0", "q4_k_m", "q6_k"};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        char model[64];
        snprintf(model, sizeof model, "synthetic:tiny-%s:%s", i % 2 ? "llama" : "qwen3", types[i]);
        same_bits(model, 140, true);
    }
}

// Types that no kernel of their own multiplies side by side.
static void test_rare_types(void **state) {
    (void)state;
    static const char *const types[] = {"q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q5_k"};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        char model[64];
        snprintf(model, sizeof model, "synthetic:tiny-%s:%s", i % 2 ? "llama" : "qwen3", types[i]);
        same_bits(model, 70, false);
    }
}

static void test_fp8(void **state) {
    (void)state;
    same_bits_of("synthetic:tiny-qwen3", 290, 0, true, true);
    same_bits_of("synthetic:tiny-llama", 140, 0, true, true);
}

static void test_large_fp8(void **state) {
    (void)state;
    same_bits_of("synthetic:qwen3-0.6b", 270, 250, false, true);
}

static void test_large_quantised(void **state) {
    (void)state;
    same_bits_of("synthetic:qwen3-0.6b:q8_0", 130, 110, false, false);
}

static void test_full_shape(void **state) {
    (void)state;
    same_bits("synthetic:qwen3-0.6b", 280, false);
}

static const size_t deep[] = {0, 30, 254, 510, 1022, 2046, 2303, 3000, 4094, 8190, 16600, 32700, 40957};
enum { N_DEEP = sizeof deep / sizeof deep[0] };

// One token at depths around the ends of pages and chunks, by the kernel of all layers and by all others.
static void test_depths(void **state) {
    (void)state;
    if (!cuda) skip();
    static const char *const models[] = {"models/tandem-tiny", "synthetic:qwen3-0.6b"};
    uint32_t persistent = variant_named("persistent");
    for (size_t i = 0; i < 2; i++) {
        struct subject s;
        open_subject(&s, models[i]);
        size_t different = compare_depths(&s, persistent, deep, N_DEEP);
        print_message("%s: %zu steps differ\n", models[i], different);
        close_subject(&s);
        assert_int_equal(different, 0);
    }
}

// The same with K and V in eight bits, by the standard path and by fused ops: groups of two query heads, and of four.
static void test_depths_fp8(void **state) {
    (void)state;
    if (!cuda) skip();
    static const struct part groups[] = {{0}, {2, 96, 128, 16, 4, 128}};
    for (size_t i = 0; i < 2; i++) {
        struct subject s;
        open_part(&s, "synthetic:qwen3-0.6b", &groups[i]);
        size_t different = compare_depths_fp8(&s, deep, N_DEEP);
        print_message("%zu KV heads: %zu steps differ\n", s.model->config.n_kv_heads, different);
        close_subject(&s);
        assert_int_equal(different, 0);
    }
}

// Steps of one token queued as three kernels or as two, one behind the other.
static void test_chain(void **state) {
    (void)state;
    if (!cuda) skip();
    static const char *const models[] = {"models/tandem-tiny", "synthetic:qwen3-0.6b:q8_0", "synthetic:qwen3-0.6b"};
    static const size_t depths[] = {0, 240, 2030, 8170};
    uint32_t chained = variant_named("chained-steps"), beside = variant_named("choice-beside");
    uint32_t variants = cuda->device->variants;
    for (size_t i = 0; i < 3; i++) {
        struct subject s;
        size_t different = 0;
        open_subject(&s, models[i]);
        for (size_t k = 0; k < (i == 0 ? 16 : 8); k++) { // a large model's K and V are filled by the host
            cuda->device->variants = k % 2 ? variants & ~beside : variants;
            different += compare_chain(&s, k % 2 ? chained : chained | beside, depths[k / 4], k / 2 % 2);
        }
        cuda->device->variants = variants;
        print_message("%s: %zu steps differ\n", models[i], different);
        close_subject(&s);
        assert_int_equal(different, 0);
    }
}

#ifdef TANDEM_CUDA
// One step of a kernel whose blocks wait for others that never come, since it has one cluster more than the GPU holds
// at once: an error that says so, soon; and the next step fails at once. The GPU is lost to this process.
static void test_stuck(void **state) {
    (void)state;
    struct cuda_state *gpu = (struct cuda_state *)(void *)(uintptr_t)cuda;
    enum { MOST_CLUSTERS = 16 }; // of the kernel: where the GPU holds all of them, none is kept waiting
    if (!cuda || gpu->n_clusters == 0 || gpu->n_clusters >= MOST_CLUSTERS) skip();
    struct subject s;
    struct error err = {0};
    open_subject(&s, "synthetic:qwen3-0.6b"); // which has weights for every cluster
    gpu->n_clusters++;
    struct run_options o = {.ops = cuda,
                            .pool = pool,
                            .max_tokens = 1,
                            .max_logit_rows = 1,
                            .max_positions = KV_PAGE_TOKENS,
                            .weights = s.weights,
                            .max_pages = 1};
    assert_true(fusion_parse("on", &o.fusion, NULL));
    struct run *run = run_create(s.model, &o, &err);
    struct kv_store kv;
    if (!run || !kv_store_create_on(cuda->device, &kv, &s.model->config, DTYPE_BF16, 1, &err)) fail_msg("%s", err.text);
    int32_t zero = 0, one = 1, starts[] = {0, 1};
    struct batch b = {.n_tokens = 1,
                      .n_seqs = 1,
                      .n_logit_rows = 1,
                      .token = &zero,
                      .position = &zero,
                      .seq = &zero,
                      .seq_start = starts,
                      .page_start = starts,
                      .pages = &zero,
                      .kv_len = &one,
                      .logit_rows = &zero};
    for (int i = 0; i < 2; i++) {
        double start = clock_seconds(), took;
        model_queue(s.model, run, &kv, &b);
        assert_false(run_choices(run)[0].ok);
        const float *logits = run_logits(run);
        assert_true(isnan(logits[0]));
        assert_false(run_error(run, &err));
        took = clock_seconds() - start;
        print_message("step %d: %.2f s, %s\n", i, took, err.text);
        assert_non_null(strstr(err.text, "whose blocks waited for each other"));
        assert_true(i == 0 ? took > 0.5 && took < 10 : took < 0.5);
    }
    kv_store_free(&kv);
    run_free(run);
    close_subject(&s);
}

// In a process of its own.
static void test_stuck_apart(void **state) {
    (void)state;
    if (!cuda) skip();
    char path[4096], *const arguments[] = {path, (char *)(uintptr_t) "--stuck", NULL};
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    assert_true(n > 0);
    path[n] = '\0';
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        alarm(60);
        execv(path, arguments);
        _exit(2);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}
#endif

// Many sequences of all depths side by side: streamed, and not.
static void test_company(void **state) {
    (void)state;
    if (!cuda) skip();
    static const char *const models[] = {"models/tandem-tiny", "synthetic:qwen3-0.6b"};
    static const size_t counts[] = {40, 97, 300, 20}, most[] = {300, 200, 40, 2500};
    uint32_t streams = variant_named("stream-attention");
    for (size_t i = 0; i < 2; i++) {
        struct subject s;
        size_t different = 0, depths[300], n = 0;
        open_subject(&s, models[i]);
        for (size_t j = 0; j < (i ? 4 : 3); j++)
            for (int fp8 = 0; fp8 < 2; fp8++, n += counts[j]) {
                for (size_t q = 0; q < counts[j]; q++) depths[q] = q % 7 == 3 ? q * 131 % most[j] : q * q % most[j];
                different += compare_company(&s, streams, depths, counts[j], fp8);
            }
        print_message("%s: %zu of %zu sequences differ\n", models[i], different, n);
        close_subject(&s);
        assert_int_equal(different, 0);
    }
}

// The same request alone and among up to 255 others: tokens, and of tandem-tiny all logits, 100,000 times each.
static void test_trials(void **state) {
    (void)state;
    if (!cuda) skip();
    static const struct trial_plan plans[] = {
        {.model = "synthetic:qwen3-0.6b", .device = "cuda", .kv_type = "bf16", .n_trials = 100000},
        {.model = "synthetic:qwen3-0.6b", .device = "cuda", .kv_type = "fp8", .n_trials = 20000},
        {.model = "models/tandem-tiny", .device = "cuda", .kv_type = "bf16", .n_trials = 100000, .hash = true},
    };
    for (size_t i = 0; i < sizeof plans / sizeof *plans; i++) {
        double start = clock_seconds();
        size_t different = differing_trials(&plans[i]);
        print_message("%.1f s\n", clock_seconds() - start);
        assert_int_equal(different, 0);
    }
}

static void judge(const char *model, double logits_limit) {
    if (!cuda) skip();
    struct subject s;
    open_subject(&s, model);
    size_t bad = judge_results(&s, model, logits_limit);
    close_subject(&s);
    assert_int_equal(bad, 0);
}

static void test_oracle_tiny(void **state) {
    (void)state;
    // The CPU's ops have 0.47, 0.56 and 0.52 on the same ids: these models' logits cancel more than a trained model's.
    judge("synthetic:tiny-qwen3", 0.6);
    judge("synthetic:tiny-qwen2", 0.6);
    judge("synthetic:tiny-llama", 0.6);
}

static void test_oracle_quantised(void **state) {
    (void)state;
    judge("synthetic:tiny-qwen3:q8_0", 0.6);
    judge("synthetic:tiny-qwen2:q4_k_m", 0.6);
    judge("synthetic:tiny-llama:q4_0", 0.6);
}

static void test_oracle_tandem_tiny(void **state) {
    (void)state;
    judge("models/tandem-tiny", 0.5);
}

static void test_sampling(void **state) {
    (void)state;
    if (!cuda) skip();
    static const struct sampling_plan plans[] = {
        {151936, 1, 60, 1}, {151936, 32, 12, 2}, {151936, 256, 2, 3}, {8192, 300, 4, 4}};
    for (size_t i = 0; i < sizeof plans / sizeof *plans; i++) {
        size_t n_filtered = 0, different = compare_sampling(cuda, &plans[i], &n_filtered);
        print_message("%zu tokens of %zu, %zu of them filtered: %zu differ from the host's\n",
                      plans[i].n_rows * plans[i].n_rounds, plans[i].n_vocab, n_filtered, different);
        assert_int_equal(different, 0);
    }
}

static void test_choices(void **state) {
    (void)state;
    if (!cuda) skip();
    static const size_t sizes[] = {31, 8192, 151936, 200003}, rows[] = {5, 64, 16, 4};
    for (size_t i = 0; i < 4; i++) assert_int_equal(compare_choices(cuda, sizes[i], rows[i], (unsigned)i), 0);
}

// ---- Opening, and what cannot be opened ---------------------------------------------------------------------------

static void test_devices_by_name(void **state) {
    (void)state;
    struct error err = {0};
    assert_null(ops_open("gpu", NULL, NULL, &err));
    assert_non_null(strstr(err.text, "expected auto, cpu, cuda or cuda:N"));
    assert_null(ops_open("cuda:x", NULL, NULL, &err));
    assert_null(ops_open("cuda:999", NULL, NULL, &err));
    assert_non_null(strstr(err.text, "cuda:999"));
    const struct ops *cpu = ops_open("cpu", NULL, NULL, &err);
    assert_non_null(cpu);
    assert_null(cpu->device);
    ops_close(cpu);
}

static void test_too_much_memory(void **state) {
    (void)state;
    if (!cuda) skip();
    struct error err = {0};
    assert_null(cuda->device->alloc(cuda->device, (size_t)1 << 50, "a test", &err));
    assert_non_null(strstr(err.text, "out of memory for a test"));
    assert_true(cuda->device->sync(cuda->device, &err));
}

static int open_gpu(void **state) {
    (void)state;
    struct error err = {0};
    pool = pool_create(0, &err);
    cuda = ops_open("cuda", NULL, NULL, &err);
    if (!cuda) print_message("skipped: %s\n", err.text);
    else print_message("on %s\n", cuda->device->name);
    return pool ? 0 : -1;
}

static int close_gpu(void **state) {
    (void)state;
    ops_close(cuda);
    pool_free(pool);
    return 0;
}

// With an argument: only the tests whose names match it (cmocka's pattern).
int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_devices_by_name),
        cmocka_unit_test(test_too_much_memory),
        cmocka_unit_test(test_oracle_tiny),
        cmocka_unit_test(test_oracle_tandem_tiny),
        cmocka_unit_test(test_tiny_qwen3),
        cmocka_unit_test(test_tiny_qwen2),
        cmocka_unit_test(test_tiny_llama),
        cmocka_unit_test(test_tandem_tiny),
        cmocka_unit_test(test_full_shape),
        cmocka_unit_test(test_oracle_quantised),
        cmocka_unit_test(test_quantised),
        cmocka_unit_test(test_depths),
        cmocka_unit_test(test_depths_fp8),
        cmocka_unit_test(test_sampling),
        cmocka_unit_test(test_fp8),
        cmocka_unit_test(test_large_fp8),
        cmocka_unit_test(test_large_quantised),
        cmocka_unit_test(test_company),
        cmocka_unit_test(test_trials),
        cmocka_unit_test(test_rare_types),
        cmocka_unit_test(test_choices),
        cmocka_unit_test(test_chain),
        cmocka_unit_test(test_loud),
#ifdef TANDEM_CUDA
        cmocka_unit_test(test_stuck_apart),
#endif
    };
#ifdef TANDEM_CUDA
    const struct CMUnitTest stuck[] = {cmocka_unit_test(test_stuck)};
    if (argc > 1 && strcmp(argv[1], "--stuck") == 0) return cmocka_run_group_tests(stuck, open_gpu, close_gpu);
#endif
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, open_gpu, close_gpu);
}
