// bench_run.h: the measuring half of `tandem bench`: steps of a model timed at a batch size and a depth, next to the
// read bandwidth of the machine at that moment. It prints nothing.
#ifndef TANDEM_CLI_BENCH_RUN_H
#define TANDEM_CLI_BENCH_RUN_H

#include "engine/engine.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { BENCH_MOST_REPEATS = 100, BENCH_VARIANTS = 2 };

enum bench_kind { BENCH_PREFILL, BENCH_DECODE };

// One line of the table: what is to be measured.
struct bench_case {
    enum bench_kind kind;
    size_t batch;    // sequences side by side; of prefill: prompts, of which a step holds as many as fit
    size_t depth;    // positions in the KV of every sequence before the first timed step
    size_t n_tokens; // of each sequence and repeat; for decode 0: as many as take about half a second, 4 to 64
};

struct spread {
    double median, min, max;
};

// What one variant (a set of fused ops) of a case measured.
struct bench_result {
    uint32_t fusion;
    struct spread tps; // tokens a second, all sequences together
    double gbs;        // weights and KV that a repeat must read at least, over its time: median
    double share;      // of the read bandwidth measured right before the same repeat: median
    double gflops;     // multiply-adds count twice: median
    uint64_t hash;     // of the first sequence's logits after the prompt (prefill) or the first step (decode)
};

struct bench_outcome {
    struct bench_result variants[BENCH_VARIANTS]; // [n_variants]
    size_t n_tokens, n_repeats;
    struct spread ratio; // two variants: tps of the first over that of the second, repeat by repeat
};

struct bench;

struct bench_options {
    size_t max_tokens; // most tokens of a step: the prefill's chunk, or the largest batch
    size_t max_batch;
    size_t max_positions; // of a sequence: depth and tokens together
    size_t n_pages;       // of KV, all sequences together
    size_t n_repeats;
    double max_seconds; // stop repeating a case after this long (at least one repeat is made)
    uint32_t fusion[BENCH_VARIANTS];
    size_t n_variants; // 1, or 2 to compare
    void (*progress)(void *user, size_t done, size_t total);
    void *user;
};

// The engine stays the caller's and must outlive the bench; nobody else may use it meanwhile.
struct bench *bench_create(tandem_engine *engine, const struct bench_options *options, struct error *err);
void bench_free(struct bench *bench);
bool bench_measure(struct bench *bench, const struct bench_case *what, struct bench_outcome *out, struct error *err);

// Read bandwidth over all repeats so far, in GB/s: every thread adds up its part of a buffer much larger than the
// caches.
struct spread bench_bandwidth(const struct bench *bench);
size_t bench_buffer_bytes(const struct bench *bench);

struct spread bench_spread(const double *values, size_t n); // n at most 4096

// KV pages that a case needs, and the bytes of one page.
size_t bench_pages(const struct bench_case *what);
size_t bench_page_bytes(const tandem_engine *engine);
size_t bench_available_memory(void); // what the system can still give, in bytes; 0: unknown

#endif
