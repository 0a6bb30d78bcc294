// oracle.h: what the right answer is: two oracles that judge every backend, written from the formulas.
//
// T is f64 arithmetic on the stored weights, RoPE angles included. H rounds to bf16 where Hugging Face's bf16 models do
// (docs/NUMERICS.md has the table); it is the yardstick: an op is right when its error against T is at most twice H's.
// The oracles share no code with src/ops, nor with src/format/quant.c: they have their own dequantisation.
//
// Numbers are f64, row-major. In H every input is rounded to bf16 first (a value that is one already stays), every
// weight too, and every output is a bf16 value; sums are f64, rounded once. `pool` may be NULL: one thread. Results do
// not depend on the number of threads, nor on how a sequence is cut into calls.
#ifndef TANDEM_MODEL_ORACLE_H
#define TANDEM_MODEL_ORACLE_H

#include "base/error.h"
#include "base/pool.h"
#include "model/model.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum oracle_kind { ORACLE_T, ORACLE_H };

// ---- Single ops ----------------------------------------------------------------------------------------------------

// A matrix's row `row` as f64 [n_in]: the f32 value that the format defines, exactly. T's view of a weight.
bool oracle_row(const struct matrix *w, size_t row, double *out, struct error *err);

// x[t] = row token[t] of the table. x: [n_tokens, table->n_in]. Refuses ids outside [0, table->n_out).
bool oracle_embed(enum oracle_kind kind, double *x, const struct matrix *table, const int32_t *token, size_t n_tokens,
                  struct error *err);

// y = x / sqrt(mean(x^2) + eps) * w. H: in f32, rounded to bf16 before the weight. x, y: [n_rows, n]; w: [n]; y may be
// x.
void oracle_rmsnorm(enum oracle_kind kind, struct pool *pool, double *y, const double *x, const float *w, double eps,
                    size_t n_rows, size_t n);

// The same for each head's channels, with one weight [head_dim]. x, y: [n_tokens, n_heads * head_dim]; y may be x.
void oracle_head_rmsnorm(enum oracle_kind kind, struct pool *pool, double *y, const double *x, const float *w,
                         double eps, size_t n_tokens, size_t n_heads, size_t head_dim);

// y[t][o] = sum_i W[o][i] x[t][i] + bias[o]; bias [n_out] or NULL. H rounds once, after the bias. x: [n_tokens, n_in];
// y: [n_tokens, n_out], not x. False when memory runs out or w's type holds no weights.
bool oracle_linear(enum oracle_kind kind, struct pool *pool, double *y, const double *x, const struct matrix *w,
                   const float *bias, size_t n_tokens, struct error *err);

// The rates of a model's RoPE angles [head_dim / 2] and the factor on cosines and sines, from the config's numbers
// (and, for GGUF, the file's rope_freqs.weight); scaling applied. H: in f32, as Hugging Face computes them.
bool oracle_rope_rates(enum oracle_kind kind, const struct model *model, double *rates, double *magnitude,
                       struct error *err);

// Turns channel c of each head with c + head_dim / 2 by the angle position * rates[c]. H: f32 angle, cos and sin
// rounded to bf16, each product and the sum rounded to bf16. x, y: [n_tokens, n_heads * head_dim]; position:
// [n_tokens]; y may be x.
void oracle_rope(enum oracle_kind kind, struct pool *pool, double *y, const double *x, const double *rates,
                 double magnitude, const int32_t *position, size_t n_tokens, size_t n_heads, size_t head_dim);

// Causal grouped-query attention of one sequence: query t sees the positions 0 .. position[t].
// out[t][h] = sum_j softmax_j(q . k_j / sqrt(head_dim)) v_j, head h reads KV head h / (n_heads / n_kv_heads). H: scores
// rounded to bf16 before and after the scale, softmax in f32, probabilities and result rounded to bf16.
// q, out: [n_tokens, n_heads * head_dim]; k, v: [n_positions, n_kv_heads * head_dim], row = position. Refuses positions
// outside [0, n_positions). Rows after position[t] are not read for token t.
struct oracle_attention {
    const double *q, *k, *v;
    const int32_t *position; // [n_tokens]
    size_t n_tokens, n_positions, n_heads, n_kv_heads, head_dim;
};
bool oracle_attention(enum oracle_kind kind, struct pool *pool, double *out, const struct oracle_attention *a,
                      struct error *err);

// act = silu(gate) * up, silu(g) = g / (1 + exp(-g)). H: silu rounded to bf16, then the product. act may be gate.
void oracle_silu_mul(enum oracle_kind kind, struct pool *pool, double *act, const double *gate, const double *up,
                     size_t n);

// x += y
void oracle_add(enum oracle_kind kind, struct pool *pool, double *x, const double *y, size_t n);

// ---- A whole sequence ----------------------------------------------------------------------------------------------

// As tap_fn (ops.h), with f64 data: every name of `tandem trace`'s list (CLI.md), in the order of computation; layer is
// -1 outside the layers. q_norm and k_norm come only from models that have them; final_norm and logits hold the wanted
// rows. Data is valid during the call.
typedef void oracle_tap_fn(void *user, const char *name, int layer, const double *data, size_t n_rows,
                           size_t n_columns);

// One sequence and its own f64 K and V, room for max_positions of them. Weights are read from the model's files, bound
// here by name, and not through the model's own binding, so that a mistake in that shows; a model without files
// (synthetic weights) is read through its binding. The model must outlive the oracle. Not for several threads at once.
struct oracle;
struct oracle *oracle_create(const struct model *model, enum oracle_kind kind, struct pool *pool, size_t max_positions,
                             struct error *err);
void oracle_free(struct oracle *oracle);

// What to run: n ids at positions position0 .. position0 + n - 1. position0 is at most the number of positions already
// run: positions from position0 on are run again, those before are kept.
struct oracle_step {
    const int32_t *ids; // [n]
    size_t n, position0;
    oracle_tap_fn *tap; // NULL: nobody watches
    void *tap_user;
    const size_t *logit_rows; // [n_logit_rows] indices below n
    size_t n_logit_rows;
};
// logits: [n_logit_rows, n_vocab], or NULL when n_logit_rows is 0. Refuses ids, rows and positions out of range.
bool oracle_run(struct oracle *oracle, const struct oracle_step *step, double *logits, struct error *err);

#endif
