// ops.h: every operation that a model is made of: its shapes, its formula, its rounding points and the order of its
// sums.
//
// The contract (DESIGN.md section 3):
// - A PRIMITIVE does one thing. The primitives together are the standard path, which `--fusion=off` runs.
// - A FUSED op replaces a fixed list of primitives and returns the same bits as composing them, at every T, context
// length
//   and thread count. fusion.c holds each fused op's composition; a backend that lacks a fused op runs the composition.
// - The order in which an output element's terms are added depends only on the model and on the element's own position
// in
//   its sequence: never on T, on neighbours, on page numbers or on the number of threads.
// - On the CPU all instruction sets return the same bits (docs/NUMERICS.md states the one exception, subnormal
// products).
//
// Numbers: activations are f32, row-major, [n_rows, n_columns]. "dot16" below is the sum order of every dot product:
// sixteen partial sums, acc[l] = fma(a[k], b[k], acc[l]) for ascending k with k % 16 == l, starting from +0, then the
// fixed tree acc[l] += acc[l+8] (l < 8), += acc[l+4], += acc[l+2], acc[0] + acc[1]. A tail of n % 16 terms goes to the
// first lanes. "sum16" is the same with b = 1.
//
// Products with weights (matmul) multiply in one of three ways, by the type of the weights:
// - F32, F16: dot16 of the weights, converted exactly, and x as it is.
// - BF16: x is rounded to bf16, nearest even. "dotpair" is dot16 with pairs dealt out: lane l takes the terms k with
//   (k / 2) % 16 == l, ascending pairs, the odd k of a pair before the even one; then dot16's tree.
// - Quantised, on the CPU (a device rounds x to bf16: docs/NUMERICS.md): x is rounded to integers of at most M in
//   blocks of ACT_BLOCK, M = 4,095 for Q8_0 and 127 for the other types: a = max |x_i|, inverse = M / a,
//   q_i = nearest_even(x_i * inverse), d = a / M, all in f32; a < 2^-100 gives d = 0, q = 0; NaN or Inf in a block
//   gives d = NaN, q = 0. The weights are w_i = scale_g * u_i + min_g in groups g of 16 or 32 elements
//   (format/groups.h). "qdot" is one chain over ascending groups, from y = +0, each group in block b:
//     y = fma(scale_g * d_b, (float)(sum_i u_i q_i), y);  then, for types with minima,  y = fma(min_g, d_b *
//     (float)(sum_i q_i), y).  The integer sums are exact, and so is their conversion (below 2^24).
// ops_round_activation gives the rounded x.
#ifndef TANDEM_OPS_OPS_H
#define TANDEM_OPS_OPS_H

#include "base/pool.h"
#include "format/dtype.h"
#include "ops/device.h"
#include "ops/sampling.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    KV_PAGE_TOKENS = 32,  // positions in a KV page
    ATTN_BLOCK = 32,      // positions that attention on the CPU sums before it combines: absolute, one page
    ACT_BLOCK = 32,       // activations that share a scale in a product with quantised weights
    ACT_MOST = 127,       // the largest integer that they are rounded to
    ACT_MOST_WIDE = 4095, // the same for Q8_0: 32 * 128 * 4095 is below 2^24
    ATTN_CHUNK = 256,     // the same on a GPU (docs/NUMERICS.md)
    MOST_BANNED = 64,     // ids that a step may ban
};

// A stored weight matrix W [n_out, n_in]; its product with x [n_in] is y[o] = sum_i W[o][i] x[i].
struct matrix {
    const char *name;
    enum dtype type;
    size_t n_out, n_in;
    size_t row_bytes; // bytes from one row to the next
    const void *data;
    // NULL, or a copy of the first n_out / 8 * 8 rows in octets (format/octets.h), which ops that take octets multiply.
    const unsigned char *octets;
};

// One step's work: T tokens of S sequences, prefill and decode mixed (DESIGN.md section 2).
struct batch {
    size_t n_tokens, n_seqs, n_logit_rows;
    const int32_t *token;      // [n_tokens] ids; on a device also ~r: what the step before chose for its row r
    const int32_t *position;   // [n_tokens] each token's position in its sequence; a sequence's follow each other
    const int32_t *seq;        // [n_tokens] index of each token's sequence
    const int32_t *seq_start;  // [n_seqs + 1] the tokens of sequence s are seq_start[s] .. seq_start[s+1]
    const int32_t *page_start; // [n_seqs + 1] its KV pages are pages[page_start[s]] .. pages[page_start[s+1]], in order
    const int32_t *pages;      // [page_start[n_seqs]]
    const int32_t *kv_len;     // [n_seqs] positions in the KV after this step
    const int32_t *logit_rows; // [n_logit_rows] the tokens whose logits are wanted
    // On a device only: how a token is chosen for each of these rows, at the position behind the row's; NULL: greedily.
    const struct sample_row *sample; // [n_logit_rows]
    const int32_t *banned;           // [n_banned] ids that rows with `ban` never choose
    size_t n_banned;
    const struct batch *host; // the same batch on the host, where the arrays above are a device's; else NULL
};

// The K and V pages of one layer. K and V are rounded once, to `type`, when they are stored: kv_page.h has the layout
// and the rounding. The stored values are exact in f32, and that is what attention multiplies.
struct kv_layer {
    enum dtype type; // BF16, F16, F32, Q8_0 or FP8 (blocks of 32 channels); a device: those of its kv_types
    void *k, *v;
    size_t n_pages, n_kv_heads, head_dim;
};

struct ops;
struct ops_limits;
struct qk_norm_rope_store_args;

// The token chosen for a row of logits: the most probable one, or the one that batch.sample calls for.
struct greedy_choice {
    int32_t id;    // the smallest, of several
    float logprob; // natural log of its softmax probability; 0 where batch.sample called for it
    int32_t ok;    // 0: NaN or Inf in the row, and the rest means nothing
};

// Observes intermediate results; `name` as in `tandem trace` without "layers.N." (CLI.md). layer is -1 outside the
// layers.
typedef void tap_fn(void *user, const char *name, int layer, const float *data, size_t n_rows, size_t n_columns);

// What an op runs with. One per running step; only the engine's thread uses it.
struct op_ctx {
    const struct ops *ops;
    struct pool *pool;
    uint32_t fusion; // bit (1 << enum fused_op): use the backend's fused op, where it has one
    float *scratch;  // [scratch_floats] shared by the op in progress; its size is ops_scratch_floats(...)
    size_t scratch_floats;
    tap_fn *tap; // NULL: nobody watches
    void *tap_user;
    int layer;             // for the tap
    const int32_t *chosen; // [rows] what the step before chose, on a device; NULL elsewhere
};

// ---- Fused ops: arguments ------------------------------------------------------------------------------------------

enum fused_op {
    FUSED_NORM_QKV,
    FUSED_QK_NORM_ROPE_STORE,
    FUSED_ATTENTION,
    FUSED_ROPE_ATTENTION, // both of the former
    FUSED_OUT_RESIDUAL,
    FUSED_NORM_GATE_UP,
    FUSED_DOWN_RESIDUAL,
    FUSED_NORM_HEAD,
    FUSED_STEP, // the whole sequence in one kernel or graph; the CPU has none
    FUSED_COUNT
};

// norm_qkv: n = rmsnorm(x, norm); q = matmul(n, wq) + bq; k, v alike. wq NULL: k and v alone.
struct norm_qkv_args {
    size_t n_tokens;
    const float *x;    // [n_tokens, hidden]
    const float *norm; // [hidden]
    float eps;
    const struct matrix *wq, *wk, *wv;
    const float *bq, *bk, *bv; // [n_out] or NULL
    float *normed;             // [n_tokens, hidden] for the composition
    float *q, *k, *v;          // [n_tokens, n_heads * head_dim], [n_tokens, n_kv_heads * head_dim] twice
    // What the rope_attention that follows at once (without wq, the qk_norm_rope_store) does with q, k and v, which
    // nothing else reads: a backend may store K and V already, and need not write k and v then. NULL: others read them.
    const struct qk_norm_rope_store_args *store;
};

// qk_norm_rope_store: q, k = head_rmsnorm (where q_norm, k_norm are given); q, k = rope; k, v stored in their pages.
// n_heads 0: there is no q.
struct qk_norm_rope_store_args {
    const struct batch *batch;
    size_t n_heads, n_kv_heads, head_dim;
    const float *q_norm, *k_norm; // [head_dim], both or none (NULL)
    float eps;
    const float *cos_sin; // [n_tokens, head_dim]: head_dim / 2 cosines, then the sines, of each token's position
    float *q, *k;         // in place
    const float *v;
    struct kv_layer *kv;
};

// attention: causal, grouped-query, over the pages. For each token and head, blocks of ops.attn_block absolute
// positions b (on a GPU otherwise rounded and scaled: docs/NUMERICS.md):
//   s_j = dot16(q, k_j) * scale              j <= position
//   m_b = max_j s_j; p_j = exp32(s_j - m_b); l_b = sum16_j p_j; o_b[c] = fma chain over ascending j of p_j v_j[c]
// combined in ascending order of b: m' = max(m, m_b); a = exp32(m - m'); c = exp32(m_b - m');
//   l = fma(l, a, l_b * c); o = fma(o, a, o_b * c)   (the first block is taken as it is)
// out = o / l. Query head h reads KV head h / (n_heads / n_kv_heads).
//
// Over K and V of Q8_0 (on the CPU) integers are multiplied. k_i = d_b u_i, v_j = d_j u_j in blocks b of 32 channels:
//   q's head is rounded once: a = max |q_i|, f = a / 32767, Q_i = nearest_even(q_i * (32767 / a)), as ACT_BLOCK's rule
//   has it for a < 2^-100, NaN and Inf;
//   s_j = t * (f * scale), t one chain over ascending b of t = fma(d_b, (float)(sum_i Q_i u_i), t) from +0;
//   o_b[c] = (float)(sum_j W_j u_j[c]) * (D / 32767), D = max_j d_j of the block's positions j <= position, g_j = d_j *
//   (32767 / D), W_j = nearest_even(p_j * g_j); D = 0: W = 0; D NaN or Inf: o_b is NaN.
// The integer sums are exact; their conversion rounds to nearest.
struct attention_args {
    const struct batch *batch;
    size_t n_heads, n_kv_heads, head_dim;
    float scale;    // 1 / sqrt(head_dim)
    const float *q; // [n_tokens, n_heads * head_dim]
    const struct kv_layer *kv;
    float *out;                  // [n_tokens, n_heads * head_dim]
    const struct matrix *reader; // as norm_gate_up_args.reader
};

// rope_attention: qk_norm_rope_store, then attention; q and k need not hold their rotated values afterwards.
struct rope_attention_args {
    const struct qk_norm_rope_store_args *store;
    const struct attention_args *attention;
};

// out_residual, down_residual: y = matmul(in, w); x += y.
struct proj_residual_args {
    size_t n_tokens;
    const float *in; // [n_tokens, w->n_in]
    const struct matrix *w;
    float *projected; // [n_tokens, w->n_out] for the composition
    float *x;         // [n_tokens, w->n_out], in place
};

// norm_gate_up: n = rmsnorm(x, norm); act = silu(matmul(n, gate)) * matmul(n, up).
struct norm_gate_up_args {
    size_t n_tokens;
    const float *x;    // [n_tokens, hidden]
    const float *norm; // [hidden]
    float eps;
    const struct matrix *w_gate, *w_up;
    float *normed;    // [n_tokens, hidden] for the composition
    float *gate, *up; // [n_tokens, n_ff] for the composition
    float *act;       // [n_tokens, n_ff]; may be the same memory as gate
    // The matrix of the product that follows at once (out_residual, down_residual) and alone reads the result: a
    // backend that hands results on rounded and packed need not write them to memory as floats. NULL: others read it.
    const struct matrix *reader;
};

// norm_head: rows = x[logit_rows]; n = rmsnorm(rows, norm); logits = matmul(n, head).
struct norm_head_args {
    const struct batch *batch;
    const float *x; // [n_tokens, hidden]
    const float *norm;
    float eps;
    const struct matrix *head;
    float *rows, *normed; // [n_logit_rows, hidden] for the composition
    float *logits;        // [n_logit_rows, n_vocab]
};

// layers: every layer of a step, x in place; where the backend has a kernel for it.
struct layers_shape {
    size_t n_layers, hidden, n_ff, n_heads, n_kv_heads, head_dim;
};
struct layer_refs {
    const float *attn_norm, *mlp_norm, *bq, *bk, *bv, *q_norm, *k_norm;
    const struct matrix *wq, *wk, *wv, *wo, *w_gate, *w_up, *w_down;
    struct kv_layer *kv;
};
// What the op of all layers does first, so that a step of one token is so few kernels that none need be recorded, and
// its first one may begin while the step before ends: the batch's arrays come from the host, x from the embedding,
// cos_sin from the table of all positions.
struct step_opening {
    const int32_t *staging; // [n_words] the arrays in memory of the host that the device reads
    int32_t *arrays;        // [n_words] where they belong
    size_t n_words;
    const struct matrix *embed;
    const float *rope; // [max_positions, head_dim]
};
struct layers_args {
    struct layers_shape shape;
    const struct batch *batch;
    const struct step_opening *opening; // NULL: x, cos_sin and the batch's arrays are there
    const struct layer_refs *layers;    // [n_layers]
    float eps, scale;                   // 1 / sqrt(head_dim)
    const float *cos_sin;               // [n_tokens, head_dim]
    float *x;                           // [n_tokens, hidden]
    float *board;                       // [board_floats] of this model's alone; all bits set before its first use
};

// sample: the next token of each row of logits, by ops/sampling.h.
struct sample_args {
    const struct batch *batch; // sample, banned, position, logit_rows
    const float *logits;       // [n_logit_rows, n_vocab]
    size_t n_vocab;
    enum sampling_filter filter;
    struct greedy_choice *out; // [n_logit_rows] memory that the host can read too
    int32_t *chosen;           // [n_logit_rows] the same ids, for the next step
};

// ---- The table -----------------------------------------------------------------------------------------------------

// One backend's ops. Filled portable-first, then overridden; chosen once at start.
struct ops {
    const struct cpu_kernels *kernels; // the CPU's own: the dot products of one tile
    const char *name;                  // "cpu/avx2", "cuda:0"
    bool takes_octets;                 // products are faster with matrix.octets
    // The last layer leaves out tokens whose logits nobody wants where they are so many; SIZE_MAX: never.
    size_t least_left_out;
    size_t attn_block;     // positions of attention's blocks: ATTN_BLOCK, or ATTN_CHUNK
    struct device *device; // whose memory every pointer of an op's arguments is; NULL: the host's

    // Floats of scratch beyond ops_scratch_floats' own count; NULL: none.
    bool (*scratch_floats)(const struct ops *ops, const struct ops_limits *limits, size_t *out);

    // Primitives.

    // x[t] = row token[t] of the table, converted exactly to f32. Ids are in range: the caller checked.
    void (*embed)(const struct op_ctx *ctx, float *x, const struct matrix *table, const int32_t *token,
                  size_t n_tokens);
    // y = x * r * w, r = 1 / sqrt(dot16(x, x) / n + eps), evaluated as (x * r) * w; y may be x.
    void (*rmsnorm)(const struct op_ctx *ctx, float *y, const float *x, const float *w, float eps, size_t n_rows,
                    size_t n);
    // y[t][o] = dot16, dotpair or qdot of W[o] and x[t], by the weights' type (above).
    void (*matmul)(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens);
    // y[t] += b
    void (*bias)(const struct op_ctx *ctx, float *y, const float *b, size_t n_rows, size_t n);
    // rmsnorm of each head's head_dim channels with one weight [head_dim]; in place. x: [n_tokens, n_heads * head_dim].
    void (*head_rmsnorm)(const struct op_ctx *ctx, float *x, const float *w, float eps, size_t n_tokens, size_t n_heads,
                         size_t head_dim);
    // Rotates channel c with channel c + head_dim / 2: lo' = lo * cos - hi * sin, hi' = hi * cos + lo * sin, each as
    // fma(lo, cos, -(hi * sin)) and fma(hi, cos, lo * sin); in place.
    void (*rope)(const struct op_ctx *ctx, float *x, const float *cos_sin, size_t n_tokens, size_t n_heads,
                 size_t head_dim);
    // Rounds K and V of every token to kv->type and writes them to their slots.
    void (*kv_store)(const struct op_ctx *ctx, struct kv_layer *kv, const struct batch *batch, const float *k,
                     const float *v);
    // x += y
    void (*add)(const struct op_ctx *ctx, float *x, const float *y, size_t n);
    // act = silu(gate) * up, silu(g) = g / (1 + exp32(-g)); act may be gate.
    void (*silu_mul)(const struct op_ctx *ctx, float *act, const float *gate, const float *up, size_t n);
    // y[r] = x[rows[r]]
    void (*gather)(const struct op_ctx *ctx, float *y, const float *x, const int32_t *rows, size_t n_rows, size_t n);
    // out[r] of logits[r]: [n_rows, n]. `out` is memory that the host can read too. NULL: the backend has none.
    void (*choose)(const struct op_ctx *ctx, struct greedy_choice *out, const float *logits, size_t n_rows, size_t n);
    // Instead of choose, where the batch says how. NULL: the backend has none.
    void (*sample)(const struct op_ctx *ctx, const struct sample_args *a);
    // Attention's four parts, for one token and one head; n_kv = position + 1, `pages` is the sequence's page list.
    void (*attn_scores)(const struct op_ctx *ctx, float *s, const float *q, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages, size_t n_kv,
                        float scale); // s: [n_kv]
    void (*attn_softmax)(const struct op_ctx *ctx, float *s, float *block_max, float *block_sum,
                         size_t n_kv); // s becomes p; [n_blocks] twice
    void (*attn_values)(const struct op_ctx *ctx, float *o, const float *p, const struct kv_layer *kv, size_t kv_head,
                        const int32_t *pages,
                        size_t n_kv); // o: [n_blocks, head_dim]
    void (*attn_combine)(const struct op_ctx *ctx, float *out, const float *block_max, const float *block_sum,
                         const float *o, size_t n_blocks, size_t head_dim);

    // Fused ops; NULL where the backend has none.
    void (*norm_qkv)(const struct op_ctx *ctx, const struct norm_qkv_args *a);
    void (*qk_norm_rope_store)(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a);
    void (*attention)(const struct op_ctx *ctx, const struct attention_args *a);
    void (*rope_attention)(const struct op_ctx *ctx, const struct rope_attention_args *a);
    void (*out_residual)(const struct op_ctx *ctx, const struct proj_residual_args *a);
    void (*norm_gate_up)(const struct op_ctx *ctx, const struct norm_gate_up_args *a);
    void (*down_residual)(const struct op_ctx *ctx, const struct proj_residual_args *a);
    void (*norm_head)(const struct op_ctx *ctx, const struct norm_head_args *a);
    // False: not this shape, or not this batch; nothing was done. Memory: 0 floats: never. NULL: the backend has none.
    bool (*layers)(const struct op_ctx *ctx, const struct layers_args *a);
    size_t (*board_floats)(const struct ops *ops, const struct layers_shape *shape);
};

// The CPU's table for this machine, or for a named instruction set ("portable", "avx2", "avx512", ...; NULL or "auto":
// the best that this CPU has). NULL with the list of known names when the name is unknown or the CPU lacks it.
const struct ops *ops_cpu(const char *isa, struct error *err);

// The instruction sets that this build knows, from the plainest to the widest.
struct isa_info {
    const char *name, *needs; // as ops_cpu takes it; what the CPU must have
    bool available;
    const char *why_not; // NULL when available
};
const struct isa_info *ops_cpu_isas(size_t *n);

// x[n] as a product with `weights` multiplies it (above), exactly, as f64: what an oracle feeds its own product to
// judge an op by. n is a multiple of ACT_BLOCK for quantised weights.
void ops_round_activation(enum dtype weights, const float *x, double *out, size_t n);
// Whether that is with 8 bits: quantised weights, but for Q8_0, whose inputs have 13.
bool ops_rounds_to_int8(enum dtype weights);
// The type whose rule that is for these ops' products with `weights`: itself, but on a device BF16 for quantised types.
enum dtype ops_input_rule(const struct ops *ops, enum dtype weights);
// The ops of --device: "auto" or NULL, "cpu", "cuda", "cuda:N"; `isa` is the CPU's. On "auto" without a usable GPU, the
// CPU's, and why goes to `why` (an error that holds no text: no GPU was to be expected). ops_close frees them.
const struct ops *ops_open(const char *device, const char *isa, struct error *why, struct error *err);
void ops_close(const struct ops *ops); // NULL and a CPU's are fine

// ---- Running: the fused op, or its composition --------------------------------------------------------------------

void ops_norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a);
void ops_qk_norm_rope_store(const struct op_ctx *ctx, const struct qk_norm_rope_store_args *a);
void ops_attention(const struct op_ctx *ctx, const struct attention_args *a);
void ops_rope_attention(const struct op_ctx *ctx, const struct rope_attention_args *a);
void ops_out_residual(const struct op_ctx *ctx, const struct proj_residual_args *a);
void ops_norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a);
void ops_down_residual(const struct op_ctx *ctx, const struct proj_residual_args *a);
void ops_norm_head(const struct op_ctx *ctx, const struct norm_head_args *a);

// Shows a result to the context's tap, if there is one: fetched from the device, where the ops have one.
void ops_tap(const struct op_ctx *ctx, const char *name, const float *data, size_t n_rows, size_t n_columns);

// What fusion.c knows of each fused op.
struct fusion_info {
    const char *name;              // as --fusion spells it
    const char *const *primitives; // the primitives that it replaces, in order; NULL-terminated
};
const struct fusion_info *fusion_info(enum fused_op op);
bool fusion_available(const struct ops *ops, enum fused_op op);
// "on", "off" or a comma-separated list of names to bits. False with the list of names when one is unknown.
bool fusion_parse(const char *text, uint32_t *mask, struct error *err);
// The mask as "on", "off" or a list, into `text`.
const char *fusion_text(uint32_t mask, char *text, size_t size);

// Floats of op_ctx.scratch that any op needs at these limits; false on overflow. Composed attention takes a score for
// every position, a fused one does not.
struct ops_limits {
    size_t max_tokens, max_positions; // per step, per sequence
    size_t max_width;                 // the largest n_in of any matrix
    size_t n_heads, head_dim;
    int n_threads;
};
bool ops_scratch_floats(const struct ops_limits *limits, size_t *out);

#endif
