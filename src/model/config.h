// config.h: what a model's configuration says, from config.json or GGUF metadata. Nothing is inferred from weights:
// what a family has (q/k norms, biases) follows from the architecture and the config's fields.
#ifndef TANDEM_MODEL_CONFIG_H
#define TANDEM_MODEL_CONFIG_H

#include "base/error.h"
#include "format/gguf.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum arch { ARCH_QWEN3, ARCH_QWEN2, ARCH_LLAMA };

enum rope_scaling { ROPE_PLAIN, ROPE_LINEAR, ROPE_YARN, ROPE_LLAMA3 };

struct rope_config {
    double theta;
    enum rope_scaling scaling;
    double factor;                            // linear, yarn, llama3
    double original_context;                  // yarn, llama3
    double beta_fast, beta_slow, attn_factor; // yarn; attn_factor 0: 0.1 ln(factor) + 1
    double low_freq_factor, high_freq_factor; // llama3
};

enum { MAX_EOS = 16 };

struct model_config {
    enum arch arch;
    size_t n_layers, hidden, n_heads, n_kv_heads, head_dim, n_ff, n_vocab;
    size_t context; // max_position_embeddings
    double rms_eps;
    struct rope_config rope;
    bool qk_norm;  // per-head RMSNorm of q and k (qwen3)
    bool qkv_bias; // biases of the q, k, v projections
    bool tied;     // the head is the embedding
    int32_t bos;   // -1: none
    int32_t eos[MAX_EOS];
    size_t n_eos;
    char source[32]; // "config.json", "GGUF metadata"
};

// Each checks every number it takes (zero, negative, absurd, contradictory) and names the field.
bool model_config_from_json(const json_t *config, struct model_config *out, struct error *err);
bool model_config_from_gguf(const struct gguf *g, struct model_config *out, struct error *err);
const char *arch_name(enum arch arch);

// Sampling defaults, from generation_config.json. A field that the file lacks keeps `set` false.
struct generation_config {
    struct {
        bool set;
        double value;
    } temperature, top_k, top_p, min_p, repetition_penalty;
    bool do_sample_set, do_sample;
    int32_t eos[MAX_EOS];
    size_t n_eos;
};
bool generation_config_from_json(const json_t *config, struct generation_config *out, struct error *err);

// The RoPE angles' rates of one model: inv_freq[head_dim / 2], in f64, scaling applied; and the factor on cosines and
// sines (yarn's, else 1). `factors` [head_dim / 2] divide the rates (llama3's rope_freqs.weight in GGUF), or NULL.
void rope_rates(const struct model_config *config, const float *factors, double *inv_freq, double *magnitude);

#endif
