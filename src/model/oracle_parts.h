// oracle_parts.h: what the oracle's files share among themselves: bf16 rounding, a weight's rows, the binding by name.
#ifndef TANDEM_MODEL_ORACLE_PARTS_H
#define TANDEM_MODEL_ORACLE_PARTS_H

#include "model/oracle.h"

#include <math.h>
#include <string.h>

enum { ORACLE_CHUNK = 256 }; // elements of a row that are converted at once; a multiple of every block length

// To bf16's eight significant bits, ties to even, straight from f64.
static inline double oracle_bf16(double v) {
    double magnitude = fabs(v);
    if (!(magnitude < INFINITY)) return v;
    if (magnitude < 0x1p-126) { // subnormal: multiples of 2^-133
        double shift = 0x1.8p-81;
        return copysign((magnitude + shift) - shift, v);
    }
    uint64_t u;
    memcpy(&u, &magnitude, sizeof u);
    u += ((uint64_t)1 << 44) - 1 + (u >> 45 & 1);
    u &= ~(((uint64_t)1 << 45) - 1);
    memcpy(&magnitude, &u, sizeof u);
    return copysign(magnitude < 0x1p128 ? magnitude : INFINITY, v);
}

// What `kind` makes of an operand.
static inline double oracle_operand(enum oracle_kind kind, double v) {
    return kind == ORACLE_H ? oracle_bf16(v) : v;
}

// A matrix and the order of its rows. `interleaved_head`: 0, or head_dim, when each head's rows stand in the order
// 0, head_dim / 2, 1, head_dim / 2 + 1, ... (q and k of GGUF files of the llama family).
struct oracle_matrix {
    struct matrix m;
    size_t interleaved_head;
};

// Elements [first, first + n) of a row; first is a multiple of ORACLE_CHUNK, n whole blocks. m.type holds weights.
void oracle_elements(const struct oracle_matrix *w, size_t row, size_t first, double *out, size_t n);
// False when the type holds no weights or the rows are no whole blocks.
bool oracle_matrix_check(const struct matrix *m, struct error *err);

// oracle_linear for a matrix in either order.
bool oracle_product(enum oracle_kind kind, struct pool *pool, double *y, const double *x, const struct oracle_matrix *w,
                    const float *bias, size_t n_tokens, struct error *err);

struct oracle_layer {
    const float *attn_norm, *mlp_norm; // [hidden]
    struct oracle_matrix wq, wk, wv, wo, w_gate, w_up, w_down;
    const float *bq, *bk, *bv;    // NULL where the config has none
    const float *q_norm, *k_norm; // [head_dim]; NULL where the config has none
};

struct oracle_weights {
    struct oracle_matrix embed, head;
    const float *final_norm;
    struct oracle_layer *layers; // [n_layers]
    struct arena arena;
};

// On failure, too, oracle_weights_free is due.
bool oracle_weights_bind(struct oracle_weights *w, const struct model *model, struct error *err);
void oracle_weights_free(struct oracle_weights *w);

#endif
