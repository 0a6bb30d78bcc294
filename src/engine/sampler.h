// sampler.h: from logits to a token. Deterministic: the noise is a function of (seed, position, token id) alone, so
// that a choice depends neither on the batch nor on what was filtered away.
#ifndef TANDEM_ENGINE_SAMPLER_H
#define TANDEM_ENGINE_SAMPLER_H

#include "base/error.h"
#include "tandem.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct candidate {
    float logit;
    int32_t id;
};

// Scratch for one choice at a time, planned at start.
struct sampler {
    size_t n_vocab;
    float *logits;                // [n_vocab] working copy
    struct candidate *candidates; // [n_vocab]
    uint32_t *count;              // [n_vocab] zero between choices
};
bool sampler_create(struct sampler *s, size_t n_vocab, struct error *err);
void sampler_free(struct sampler *s);
size_t sampler_bytes(size_t n_vocab);

// Checks every field; names the one that is wrong.
bool sampling_check(const tandem_sampling *sampling, size_t n_vocab, struct error *err);

// What a choice sees of the sequence: all ids so far, of which those from `n_prompt` on were generated.
struct sampler_history {
    const int32_t *ids; // [n]
    size_t n, n_prompt;
};

// Chooses the token at position history.n. `banned` ids (end tokens with ignore_end) are never chosen, nor those whose
// bit in `mask` (32 a word; NULL: all are set) is clear. Logits are finite, and something is left to choose.
int32_t sampler_choose(struct sampler *s, const tandem_sampling *sampling, const float *logits,
                       struct sampler_history history, const int32_t *banned, size_t n_banned, const uint32_t *mask);

// Uniform noise in (0, 1) for one token at one position.
double sampler_uniform(uint64_t seed, uint64_t position, int32_t id);

// Natural log of the softmax probability of `id`, and the n most probable ids in falling order (ties: smaller id
// first).
float logits_logprob(const float *logits, size_t n_vocab, int32_t id);
void logits_top(const float *logits, size_t n_vocab, tandem_token *top, size_t n);
// Both, for the price of one: of token->id, and of the n most probable.
void logits_logprobs(const float *logits, size_t n_vocab, tandem_token *token, tandem_token *top, size_t n);
bool logits_finite(const float *logits, size_t n_vocab);
uint64_t logits_hash(uint64_t hash, const float *logits, size_t n_vocab); // chainable; start with 0

#endif
