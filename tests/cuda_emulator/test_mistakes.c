// test_mistakes.c: the test of the test: each mistake that sow.py sows into the CUDA sources is found, by other bytes
// of logits or by the emulator's own refusal; and without one nothing is.
//
//   test_mistakes          the test
//   test_mistakes NUMBER   that mistake alone, with all that is said of it
#include "emulator.h"

#include "../ops/cuda_ways.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum place { PAGES, SPLIT, TILES, LAYERS, COMPANY };
struct mistake {
    const char *name;
    enum place place; // of the examinations below, the one that shows it
};
#include "mistakes.inc"
enum { N_MISTAKES = sizeof mistakes / sizeof mistakes[0] };

static void open_gpu(void) {
    struct error err = {0};
    cuda = ops_open("cuda", NULL, NULL, &err);
    if (!cuda) fail_msg("%s", err.text);
}

// All layers in one kernel, against the others.
static bool is_found_in_layers(uint64_t seed) {
    static const size_t depths[] = {30, 254};
    static const struct part part = {
        .n_layers = 2, .n_vocab = 64, .n_ff = 200, .n_heads = 2, .n_kv_heads = 1, .head_dim = 128};
    struct subject s;
    uint32_t variant = 0;
    emulator_set(&(struct emulator_options){.seed = seed, .n_sms = 8});
    open_gpu();
    open_part(&s, "models/tandem-tiny", &part);
    for (size_t i = 0; i < cuda->device->n_variants; i++)
        if (strcmp(cuda->device->variant_names[i], "persistent") == 0) variant = 1u << i;
    size_t different = compare_depths(&s, variant, depths, 2);
    close_subject(&s);
    ops_close(cuda);
    return different > 0;
}

// Sequences side by side, streamed and not.
static bool is_found_in_company(uint64_t seed) {
    static const size_t depths[] = {40, 1300, 3, 255, 31, 290};
    static const struct part part = {.n_layers = 1, .n_vocab = 64, .n_ff = 64};
    struct subject s;
    uint32_t variant = 0;
    emulator_set(&(struct emulator_options){.seed = seed, .n_sms = 1});
    open_gpu();
    open_part(&s, "synthetic:tiny-qwen3", &part);
    for (size_t i = 0; i < cuda->device->n_variants; i++)
        if (strcmp(cuda->device->variant_names[i], "stream-attention") == 0) variant = 1u << i;
    size_t different = compare_company(&s, variant, depths, sizeof depths / sizeof depths[0], false);
    close_subject(&s);
    ops_close(cuda);
    return different > 0;
}

static bool is_found(enum place place, uint64_t seed) {
    if (place == LAYERS) return is_found_in_layers(seed);
    if (place == COMPANY) return is_found_in_company(seed);
    static const size_t chunks[] = {9, 33}, neighbours[] = {3};
    const struct plan plans[] = {
        [PAGES] = {.length = 37,
                   .lead = 29,
                   .standard_chunk = 12,
                   .chunks = chunks,
                   .n_chunks = 2,
                   .neighbours = neighbours,
                   .n_neighbours = 1,
                   .n_ragged = 2},
        [SPLIT] = {.length = 258, .lead = 253, .standard_chunk = 129},
        [TILES] = {.length = 72, .lead = 70, .standard_chunk = 36},
    };
    const struct part parts[] = {[PAGES] = {.n_layers = 2, .n_vocab = 64, .n_ff = 72},
                                 [SPLIT] = {.n_layers = 1, .n_vocab = 64, .n_ff = 72},
                                 [TILES] = {.n_layers = 1, .n_vocab = 64, .n_ff = 768}};
    emulator_set(&(struct emulator_options){.seed = seed, .n_sms = place == TILES ? 1 : 8});
    struct subject s;
    open_gpu();
    open_part(&s, place == TILES ? "synthetic:tiny-llama" : "synthetic:tiny-qwen3", &parts[place]);
    size_t different = compare_ways(&s, "a part", &plans[place], NULL);
    cuda->device->variants = 0; // the kernels that others stand in for
    if (different == 0 && place != SPLIT) different = compare_ways(&s, "a part", &plans[place], NULL);
    close_subject(&s);
    ops_close(cuda);
    return different > 0;
}

// In a process of its own, which the emulator may end.
static bool is_found_apart(int number, enum place place) {
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr)) _exit(2);
        alarm(60);
        emulator_mistake = number;
        _exit(is_found(place, (uint64_t)number) ? 1 : 0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void test_none(void **state) {
    (void)state;
    for (int place = PAGES; place <= COMPANY; place++) assert_false(is_found_apart(0, (enum place)place));
}

static void test_each(void **state) {
    (void)state;
    size_t missed = 0;
    for (int i = 0; i < N_MISTAKES; i++) {
        bool found = is_found_apart(i + 1, mistakes[i].place);
        print_message("%2d %s: %s\n", i + 1, mistakes[i].name, found ? "found" : "NOT FOUND");
        missed += !found;
    }
    assert_int_equal(missed, 0);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_none),
        cmocka_unit_test(test_each),
    };
    int only = argc > 1 ? atoi(argv[1]) : 0;
    struct error err = {0};
    pool = pool_create(1, &err); // no thread of its own: forks keep it
    if (!pool) return 1;
    if (only < 1 || only > N_MISTAKES) return cmocka_run_group_tests(tests, NULL, NULL);
    emulator_mistake = only;
    printf("%s: %s\n", mistakes[only - 1].name, is_found(mistakes[only - 1].place, (uint64_t)only) ? "found" : "no");
    return 0;
}
