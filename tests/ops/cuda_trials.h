// cuda_trials.h: requests alone and among others, through the engine and its scheduler.
#ifndef TANDEM_TESTS_CUDA_TRIALS_H
#define TANDEM_TESTS_CUDA_TRIALS_H

#include <stdbool.h>
#include <stddef.h>

struct trial_plan {
    const char *model, *device, *kv_type; // as tandem_open takes them
    size_t n_trials;
    bool hash; // the logits are compared, too, and tokens are chosen on the host
};

// Runs each of 500 requests alone, and then n_trials of them, drawn at random, as they come and go among up to 255
// others; some find what others of their tenant have left in the cache. Returns how many end with other tokens (or
// logits) than alone; says which first.
size_t differing_trials(const struct trial_plan *plan);

#endif
