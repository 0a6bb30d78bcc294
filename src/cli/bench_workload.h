// bench_workload.h: whole workloads for `tandem bench`: many requests at once, through the scheduler.
#ifndef TANDEM_CLI_BENCH_WORKLOAD_H
#define TANDEM_CLI_BENCH_WORKLOAD_H

#include "cli/cli.h"

// "offline-256" or "offline-N": the first N of its 256 requests. 0: no such workload.
size_t workload_requests(const char *name);

struct workload_options {
    size_t n_requests;
    size_t repeat; // nothing is taken from the cache of one with another number
    void (*progress)(void *user, size_t done, size_t total); // in tokens generated; may be NULL
    void *user;
};

struct workload_outcome {
    size_t n_prompt, n_cached, n_output; // tokens; n_cached: of the prompts, not computed
    double seconds;                      // from the first request to the last token
    uint64_t tokens_hash;                // of all generated ids, in the order of the requests
};

// How many tokens of KV the engine should have for it: all that will ever be there, or, on the CPU, what fits into
// `available` bytes (0: unknown). 0 (reported) when the model cannot be read.
size_t workload_kv_tokens(const struct cli_options *o, const char *model, size_t n_requests, size_t available);

// Runs the workload on an engine that nobody else uses. Temperature 0.6, end tokens ignored, nothing shared.
bool workload_run(tandem_engine *engine, const struct workload_options *options, struct workload_outcome *out,
                  struct error *err);

#endif
