// synthetic.h: models with random weights, made in memory: the shapes of published models for benchmarks and the
// doctor, and tiny shapes for tests. They have no tokenizer and say nothing sensible, but cost what a real model costs.
//
// Every command and the library take the name `synthetic:SHAPE[:TYPE[:SEED]]` for MODEL. Shapes are those of the
// published config.json files; TYPE is any type that holds weights (bf16, f16, f32, q8_0, q4_k, ...; default bf16), the
// type of every matrix, the embedding included, or a mix as `tandem quantize` makes it (q4_k_m, ...). Vectors are f32
// beside quantised matrices, else of TYPE.
//
// The bytes are a function of shape, type and seed alone. Weights are scaled so that activations stay of order one:
// projections have standard deviation 1 / sqrt(n_in), those back into the residual stream less by sqrt(2 n_layers);
// logits have a standard deviation of about 1.5 (more would make a tied model repeat its last token for ever).
#ifndef TANDEM_MODEL_SYNTHETIC_H
#define TANDEM_MODEL_SYNTHETIC_H

#include "model/model.h"

// `name`: with or without "synthetic:". Freed with model_free. Fills with `pool`'s threads (NULL: with one).
struct model *model_synthetic(const char *name, struct pool *pool, const struct log *log, struct error *err);

// The config of a shape, without weights.
bool synthetic_config(const char *shape, struct model_config *out, struct error *err);

// "qwen3-0.6b, qwen3-1.7b, ..."
const char *synthetic_shapes(void);

#endif
