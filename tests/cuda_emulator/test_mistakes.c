// test_mistakes.c: the test of the test: each mistake that sow.py sows into the CUDA sources is found, by other bytes
// of logits or by the emulator's own refusal; and without one nothing is. Built with TANDEM_TESTS_GPU it does the same
// on a real GPU (make gpu-mistakes), where larger models are run besides and a race may go unseen. One examination
// after the other: of programs that share a GPU each takes ten times as long.
//
//   test_mistakes          the test
//   test_mistakes NUMBER   that mistake alone, with all that is said of it; status 1: found
#include "emulator.h"
#include "mistake.h"

#include "../ops/cuda_ways.h"
#include "ops/cuda/device.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum place { PAGES, SPLIT, TILES, PAIRS, LAYERS, DEEP, COMPANY, HEADS, CHAIN };
struct mistake {
    const char *name;
    enum place place; // of the examinations below, the one that shows it
};
#include "mistakes.inc"
enum { N_MISTAKES = sizeof mistakes / sizeof mistakes[0] };

#ifdef TANDEM_TESTS_GPU
enum { ON_A_GPU = 1 };
int sown_mistake;
static mistake_teller *tellers[64];
static size_t n_tellers;

void mistake_enrol(mistake_teller *tell) {
    if (n_tellers == sizeof tellers / sizeof *tellers) abort();
    tellers[n_tellers++] = tell;
}

bool mistake_tell_kernels(void) {
    for (size_t i = 0; i < n_tellers; i++)
        if (!tellers[i]()) return false;
    return true;
}

void emulator_set(const struct emulator_options *options) {
    (void)options;
}
#else
enum { ON_A_GPU = 0 };

bool mistake_tell_kernels(void) {
    return true;
}
#endif

static void open_gpu(void) {
    struct error err = {0};
    cuda = ops_open("cuda", NULL, NULL, &err);
    if (!cuda) fail_msg("%s", err.text);
    if (!mistake_tell_kernels()) fail_msg("the kernels cannot be told which mistake to make");
}

// Whether some way differs; none is run after it.
static bool any_differs(const struct subject *s, const char *name, struct plan plan) {
    plan.until_first = true;
    return compare_ways(s, name, &plan, NULL) > 0;
}

// All layers in one kernel, against the others; deep: several chunks a block.
static bool is_found_in_layers(uint64_t seed, bool deep) {
    static const size_t depths[] = {30, 254}, deep_one[] = {4350};
    static const struct part part = {
        .n_layers = 2, .n_vocab = 64, .n_ff = 224, .n_heads = 2, .n_kv_heads = 1, .head_dim = 128};
    struct subject s;
    emulator_set(&(struct emulator_options){.seed = seed, .n_sms = 8});
    open_gpu();
    open_part_as(&s, "models/tandem-tiny", &part, deep ? DTYPE_Q8_0 : DTYPE_BF16);
    size_t different = compare_depths(&s, variant_named("persistent"), deep ? deep_one : depths, deep ? 1 : 2);
    close_subject(&s);
    ops_close(cuda);
    return different > 0;
}

// Sequences side by side, streamed and not.
static bool is_found_in_company(uint64_t seed) {
    static const size_t depths[] = {40, 1300, 3, 255, 31, 290, 64, 7, 33, 1, 2, 5, 9, 12, 20, 28, 60};
    static const struct part part = {
        .n_layers = 1, .n_vocab = 64, .n_ff = 64, .n_heads = 4, .n_kv_heads = 2, .head_dim = 128};
    struct subject s;
    emulator_set(&(struct emulator_options){.seed = seed, .n_sms = 1});
    open_gpu();
    open_part(&s, "models/tandem-tiny", &part);
    size_t different =
        compare_company(&s, variant_named("stream-attention"), depths, sizeof depths / sizeof depths[0], false);
    close_subject(&s);
    ops_close(cuda);
    return different > 0;
}

// Large tiles of q, k and v, of sequences that begin anywhere in their pages, and beside single tokens.
static bool is_found_in_heads(uint64_t seed) {
    static const struct part part = {
        .n_layers = 1, .n_vocab = 64, .n_ff = 128, .n_heads = 2, .n_kv_heads = 1, .head_dim = 128};
    static const struct plan plan = {.length = 72, .lead = 70, .standard_chunk = 36, .n_ragged = 3};
    struct subject s;
    emulator_set(&(struct emulator_options){.seed = seed, .n_sms = 3});
    open_gpu();
    ((struct cuda_state *)(uintptr_t)cuda)->tile_shape = 7;
    open_part(&s, "synthetic:qwen3-0.6b", &part);
    bool differs = any_differs(&s, "heads", plan);
    close_subject(&s);
    ops_close(cuda);
    return differs;
}

// Steps of one token, each queued before the choice of the one before is known, and batches between.
static bool is_found_in_chain(uint64_t seed) {
    static const struct part part = {
        .n_layers = 1, .n_vocab = 300, .n_ff = 128, .n_heads = 2, .n_kv_heads = 1, .head_dim = 128};
    struct subject s;
    emulator_set(&(struct emulator_options){.seed = seed, .n_sms = 8});
    open_gpu();
    open_part(&s, "models/tandem-tiny", &part);
    uint32_t variants = variant_named("chained-steps") | variant_named("choice-beside");
    size_t different = compare_chain(&s, variants, 20, true) + compare_chain(&s, variants, 20, false);
    close_subject(&s);
    ops_close(cuda);
    return different > 0;
}

static bool is_found_in_part(enum place place, uint64_t seed) {
    if (place == LAYERS || place == DEEP) return is_found_in_layers(seed, place == DEEP);
    if (place == COMPANY) return is_found_in_company(seed);
    if (place == HEADS) return is_found_in_heads(seed);
    if (place == CHAIN) return is_found_in_chain(seed);
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
        [PAIRS] = {.length = 72, .lead = 70, .standard_chunk = 36},
    };
    const struct part parts[] = {[PAGES] = {.n_layers = 2, .n_vocab = 64, .n_ff = 72},
                                 [SPLIT] = {.n_layers = 1, .n_vocab = 64, .n_ff = 72},
                                 [TILES] = {.n_layers = 1, .n_vocab = 64, .n_ff = 768},
                                 [PAIRS] = {.n_layers = 1, .n_vocab = 64, .n_ff = 768}};
    emulator_set(&(struct emulator_options){.seed = seed, .n_sms = place == TILES ? 1 : place == PAIRS ? 24 : 8});
    struct subject s;
    open_gpu();
    open_part(&s, place == TILES || place == PAIRS ? "synthetic:tiny-llama" : "synthetic:tiny-qwen3", &parts[place]);
    bool differs = any_differs(&s, "a part", plans[place]);
    cuda->device->variants = 0; // the kernels that others stand in for
    if (place != SPLIT) differs = differs || any_differs(&s, "a part", plans[place]);
    close_subject(&s);
    ops_close(cuda);
    return differs;
}

// Eight KV heads, so that sequences are streamed that are as few as `out` takes packed, and so deep that a part holds
// several chunks of one.
static size_t compare_deep_company(void) {
    enum { COMPANIONS = 150 };
    static const struct part part = {.n_layers = 2, .n_vocab = 64};
    size_t company[COMPANIONS];
    for (size_t q = 0; q < COMPANIONS; q++) company[q] = q * q * 7 % 2000;
    struct subject s;
    open_part(&s, "synthetic:qwen3-0.6b", &part);
    size_t different = compare_company(&s, variant_named("stream-attention"), company, COMPANIONS, false);
    close_subject(&s);
    return different;
}

// In whole models, which fill a real GPU.
static bool is_found_at_large(enum place place) {
    static const size_t depths[] = {0, 30, 254, 510, 1022}, deep[] = {2046, 2303, 4350, 8190, 16638};
    static const char *const models[] = {"synthetic:tiny-qwen3", "synthetic:tiny-llama", "models/tandem-tiny"};
    static const size_t chunks[] = {5, 33, 128}, neighbours[] = {40, 3}; // the last one with each variant
    static const struct plan plan = {.length = 290,
                                     .lead = 253,
                                     .standard_chunk = 97,
                                     .whole = true,
                                     .chunks = chunks,
                                     .n_chunks = 3,
                                     .neighbours = neighbours,
                                     .n_neighbours = 2,
                                     .n_ragged = 7,
                                     .n_crowd = 32};
    enum { COMPANIONS = 300 };
    size_t different = 0, company[COMPANIONS];
    for (size_t q = 0; q < COMPANIONS; q++) company[q] = q * q % 300;
    open_gpu();
    for (size_t i = place < LAYERS ? 0 : 2; i < 3 && different == 0; i++) {
        struct subject s;
        open_subject(&s, models[i]);
        uint32_t variants = cuda->device->variants;
        if (place == LAYERS || place == DEEP)
            different = compare_depths(&s, variant_named("persistent"), place == DEEP ? deep : depths, 5);
        else if (place == CHAIN)
            different = compare_chain(&s, variant_named("chained-steps") | variant_named("choice-beside"), 240, true);
        else if (place == COMPANY)
            different = compare_company(&s, variant_named("stream-attention"), company, COMPANIONS, false);
        else different = any_differs(&s, models[i], plan);
        cuda->device->variants = 0; // the kernels that others stand in for
        if (different == 0 && place < LAYERS) different = any_differs(&s, models[i], plan);
        cuda->device->variants = variants;
        close_subject(&s);
    }
    if (place == COMPANY && different == 0) different = compare_deep_company();
    ops_close(cuda);
    return different > 0;
}

static bool is_found(enum place place, uint64_t seed) {
    return is_found_in_part(place, seed) || (ON_A_GPU && is_found_at_large(place));
}

enum { MOST_SECONDS = 60 };

// In a process of its own, which the emulator may end, or the driver's verdict on the kernels: this program again.
static pid_t examine(int number, enum place place) {
    char of_number[16], of_place[16];
    snprintf(of_number, sizeof of_number, "%d", number);
    snprintf(of_place, sizeof of_place, "%d", (int)place);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        bool quiet = number > 0;
        if (quiet && (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr))) _exit(2);
        alarm(MOST_SECONDS);
        execl("/proc/self/exe", "test_mistakes", of_number, of_place, (char *)NULL);
        _exit(127);
    }
    return child;
}

static bool is_found_apart(int number, enum place place) {
    int status;
    pid_t child = examine(number, place);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_false(WIFEXITED(status) && WEXITSTATUS(status) == 127);
    return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void test_none(void **state) {
    (void)state;
    for (int place = PAGES; place <= CHAIN; place++) assert_false(is_found_apart(0, (enum place)place));
}

// Of these an H200 showed nothing: it ran as if no barrier were missing. The emulator never does.
static bool may_go_unseen(const struct mistake *m) {
    static const char *const races[] = {
        "no barrier before a product's inputs are read", "no barrier before a tile's stage is overwritten",
        "a group's sums read before they are there", "a head's keys written over while they are read"};
    for (size_t i = 0; ON_A_GPU && i < sizeof races / sizeof *races; i++)
        if (strcmp(m->name, races[i]) == 0) return true;
    return false;
}

static void test_each(void **state) {
    (void)state;
    size_t missed = 0, unseen = 0;
    for (int i = 0; i < N_MISTAKES; i++) {
        int status;
        pid_t child = examine(i + 1, mistakes[i].place);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_false(WIFEXITED(status) && WEXITSTATUS(status) == 127);
        bool found = !(WIFEXITED(status) && WEXITSTATUS(status) == 0), excused = !found && may_go_unseen(&mistakes[i]);
        print_message("%2d %s: %s\n", i + 1, mistakes[i].name,
                      excused                                              ? "not seen, a race"
                      : !found                                             ? "NOT FOUND"
                      : WIFEXITED(status) && WEXITSTATUS(status) == 1      ? "found by the results"
                      : WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM ? "found, the run did not end"
                                                                           : "found, it ended the run");
        unseen += excused;
        missed += !found && !excused;
    }
    print_message("%zu of %d found, %zu races not seen\n", N_MISTAKES - missed - unseen, N_MISTAKES, unseen);
    assert_int_equal(missed, 0);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_none),
        cmocka_unit_test(test_each),
    };
    int only = argc > 1 ? atoi(argv[1]) : -1;
    struct error err = {0};
    pool = pool_create(1, &err); // no thread of its own: forks keep it
    if (!pool) return 1;
    if (only < 0 || only > N_MISTAKES) return cmocka_run_group_tests(tests, NULL, NULL);
    sown_mistake = only;
    enum place place = argc > 2 ? (enum place)atoi(argv[2]) : only ? mistakes[only - 1].place : PAGES;
    bool found = is_found(place, (uint64_t)only);
    printf("%s: %s\n", only ? mistakes[only - 1].name : "no mistake", found ? "found" : "nothing found");
    return found;
}
