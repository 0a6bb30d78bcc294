// cuda_sampling.h: a device's choice of tokens held against the host's sampler: random rows of logits of many shapes,
// all settings that both know. Included by the tests on a GPU and on the emulated one.
#ifndef TANDEM_TESTS_CUDA_SAMPLING_H
#define TANDEM_TESTS_CUDA_SAMPLING_H

#include "ops/ops.h"

#include <stddef.h>

struct sampling_plan {
    size_t n_vocab, n_rows, n_rounds; // n_rows rows in a step
    unsigned seed;
};

// How many of n_rounds * n_rows tokens differ; the first few are told. *n_filtered: those that needed a filter.
size_t compare_sampling(const struct ops *cuda, const struct sampling_plan *plan, size_t *n_filtered);

// The most probable token of each of n_rows rows of random logits, some of them equal, some no numbers: how many of
// them or their log-probabilities are not what f64 says; the first few are told.
size_t compare_choices(const struct ops *cuda, size_t n_vocab, size_t n_rows, unsigned seed);

#endif
