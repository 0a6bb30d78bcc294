// cuda_ways.h: whole models on a CUDA device in every way that there is to run them, for the tests on a GPU
// (test_cuda.c) and on the emulated one (tests/cuda_emulator). Failures that are not a difference of results end the
// test.
#ifndef TANDEM_TESTS_CUDA_WAYS_H
#define TANDEM_TESTS_CUDA_WAYS_H

#include "model/model.h"
#include "ops/ops.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

extern const struct ops *cuda; // NULL: no GPU
extern struct pool *pool;

struct subject {
    struct model *model;
    struct device_weights *weights;
};
void open_subject(struct subject *s, const char *model); // "synthetic:NAME" or a folder
// The same with parts of its matrices: 0s leave a size as it is.
struct part {
    size_t n_layers, n_vocab, n_ff, n_heads, n_kv_heads, head_dim; // the last three together
};
void open_part(struct subject *s, const char *model, const struct part *part);
void open_part_as(struct subject *s, const char *model, const struct part *part,
                  enum dtype type); // its matrices converted to a type
// The norms' weights of q's heads `by` times as large, so that scores are as far apart.
void open_loud(struct subject *s, const char *model, const struct part *part, float by);
void close_subject(struct subject *s);

// What is run: `length` positions of a sequence, the first `lead` of them in one chunk and the rest in the way's.
struct plan {
    size_t length, lead;
    size_t standard_chunk; // of the run that the others are compared with: no op fused
    bool singly;           // also one token at a time without fused ops
    bool whole;            // also in one chunk, fused and not
    bool each_op;          // each fused op alone
    const size_t *chunks;  // [n_chunks] all fused
    size_t n_chunks;
    const size_t *neighbours; // [n_neighbours] sequences side by side, a token each
    size_t n_neighbours;
    bool fp8;          // K and V in eight bits
    bool until_first;  // none after the first way that differs
    uint32_t variants; // only these of the device's are turned round; 0: all
    // Sequences in chunks of 13, or one token each beside two in long chunks; side by side, not recorded; one token
    // each beside two in long chunks; 0: none of these.
    size_t n_ragged, n_crowd, n_mixed;
};
extern const struct plan long_plan; // a GPU's, but for length

// How many ways return other bytes of logits than the standard path. Says which.
size_t compare_ways(const struct subject *s, const char *name, const struct plan *plan, size_t *n_ways);

// The bit of the device's variant of that name; fails the test if there is none.
uint32_t variant_named(const char *name);

// One token at each of the depths, three steps each, over pages of random numbers, with and without a variant of the
// device's: how many steps' logits differ.
size_t compare_depths(const struct subject *s, uint32_t variant, const size_t *depths, size_t n_depths);

// The same with K and V in eight bits, by the standard path and by fused ops.
size_t compare_depths_fp8(const struct subject *s, const size_t *depths, size_t n_depths);

// One step of `n` sequences, a token each at depths of their own, over pages of random numbers, with and without a
// variant of the device's: how many sequences' logits differ.
size_t compare_company(const struct subject *s, uint32_t variant, const size_t *depths, size_t n, bool fp8);

// Some steps of one token, and a few of two sequences between them, from a depth on: how many choices differ where
// `variants` of the device's are on, each step waited for or queued before the choice of the step before is known, from
// those of steps that are waited for without the variants. sampled: each token is what the step before chose, in one
// way or another, or, every third, one of its own.
size_t compare_chain(const struct subject *s, uint32_t variants, size_t depth, bool sampled);

// How many results of one step of 70 tokens are further from T than twice H is, or logits than `logits_limit` of it; by
// the standard path and fused.
size_t judge_results(const struct subject *s, const char *name, double logits_limit);

uint32_t all_fused(void);

#endif
