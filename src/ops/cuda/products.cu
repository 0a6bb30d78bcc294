// products.cu: matrix products with bf16 weights and the ops fused around them. The kernels are in small.cuh and
// tiles.cuh; this file chooses among them.
#include "ops/cuda/small.cuh"
#include "ops/cuda/tiles.cuh"

using W = bf16_weights;

// As many pairs a block as give each SM about one block.
template <enum product_mode MODE> static constexpr int most_pairs() {
    return MODE == PRODUCT_RESIDUAL ? 1 : MODE == PRODUCT_QKV ? 2 : 3;
}

// `rows`: of all results (GATE_UP: of one of the two).
template <enum product_mode MODE, bool NORM>
static void product(const struct op_ctx *ctx, const char *what, const product_args &p, size_t rows) {
    size_t pairs = MODE == PRODUCT_GATE_UP ? round_up(rows, 8) / 8 : round_up(rows, 16) / 16;
    size_t n_sms = (size_t)cuda_of(ctx)->n_sms;
    constexpr int MOST = most_pairs<MODE>();
    // The next products' weights shall fit beside.
    bool many = pairs > n_sms && p.n_tokens <= 4 && (size_t)p.columns * 32 * MOST <= MAX_SHARED / 2;
    if (p.n_tokens <= SMALL_TOKENS && many && launch_small<W, MODE, NORM, MOST>(ctx, what, p, pairs)) return;
    if (p.n_tokens <= SMALL_TOKENS && launch_small<W, MODE, NORM, 1>(ctx, what, p, pairs)) return;
    size_t large = round_up(pairs, 8) / 8 * (round_up((size_t)p.n_tokens, 128) / 128);
    size_t medium = round_up(pairs, 4) / 4 * (round_up((size_t)p.n_tokens, 64) / 64);
    if (p.n_tokens <= 32) launch_tiles<W, MODE, NORM, 1, 1>(ctx, what, p, pairs);
    else if (p.n_tokens > 64 && large * 4 >= n_sms * 3) launch_tiles<W, MODE, NORM, 4, 4>(ctx, what, p, pairs);
    else if (medium * 2 >= n_sms) launch_tiles<W, MODE, NORM, 2, 2>(ctx, what, p, pairs);
    else launch_tiles<W, MODE, NORM, 1, 2>(ctx, what, p, pairs);
}

static product_args args_for(const struct matrix *w, size_t n_tokens, const float *x) {
    product_args p = {};
    p.w[0] = (const unsigned char *)w->data;
    p.n_out[0] = (int)w->n_out;
    p.n_pairs[0] = (int)(round_up(w->n_out, 16) / 16);
    p.n_in = (int)w->n_in;
    p.columns = (int)padded_columns(w->n_in);
    p.n_tokens = (int)n_tokens;
    p.x = x;
    return p;
}

static void add_segment(product_args *p, int i, const struct matrix *w, float *y, const float *b) {
    p->w[i] = (const unsigned char *)w->data;
    p->n_out[i] = (int)w->n_out;
    p->n_pairs[i] = (int)(round_up(w->n_out, 16) / 16);
    p->y[i] = y;
    p->b[i] = b;
}

static void matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens) {
    launch_matmul<W>(ctx, y, x, w, n_tokens);
}

static void norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    product_args p = args_for(a->wq, a->n_tokens, a->x);
    add_segment(&p, 0, a->wq, a->q, a->bq);
    add_segment(&p, 1, a->wk, a->k, a->bk);
    add_segment(&p, 2, a->wv, a->v, a->bv);
    p.norm = a->norm;
    p.eps = a->eps;
    product<PRODUCT_QKV, true>(ctx, "norm_qkv", p, 16 * (size_t)(p.n_pairs[0] + p.n_pairs[1] + p.n_pairs[2]));
}

static void residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    product_args p = args_for(a->w, a->n_tokens, a->in);
    p.y[0] = a->x;
    product<PRODUCT_RESIDUAL, false>(ctx, "residual", p, a->w->n_out);
}

static void norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    product_args p = args_for(a->w_gate, a->n_tokens, a->x);
    add_segment(&p, 1, a->w_up, NULL, NULL);
    p.y[0] = a->act;
    p.norm = a->norm;
    p.eps = a->eps;
    product<PRODUCT_GATE_UP, true>(ctx, "norm_gate_up", p, a->w_gate->n_out);
}

static void norm_head(const struct op_ctx *ctx, const struct norm_head_args *a) {
    product_args p = args_for(a->head, a->batch->n_logit_rows, a->x);
    p.y[0] = a->logits;
    p.norm = a->norm;
    p.eps = a->eps;
    p.rows = a->batch->logit_rows;
    product<PRODUCT_PLAIN, true>(ctx, "norm_head", p, a->head->n_out);
}

// The packed inputs of the widest product.
static bool scratch_floats(const struct ops *ops, const struct ops_limits *l, size_t *out) {
    size_t packed = round_up(l->max_tokens, 128) * padded_columns(l->max_width) / 2;
    size_t split = cuda_split_floats(ops, l);
    *out = packed > split ? packed : split;
    return true;
}

template <enum product_mode MODE, bool NORM> static void allow_all(struct cuda_state *s) {
    allow_small<W, MODE, NORM, 1>(s);
    allow_small<W, MODE, NORM, most_pairs<MODE>()>(s);
    allow_tile<W, MODE, 1, 1>(s);
    allow_tile<W, MODE, 1, 2>(s);
    allow_tile<W, MODE, 2, 2>(s);
    allow_tile<W, MODE, 4, 4>(s);
}

extern "C" bool cuda_products_setup(struct cuda_state *s) {
    allow_all<PRODUCT_QKV, true>(s);
    allow_all<PRODUCT_RESIDUAL, false>(s);
    allow_all<PRODUCT_GATE_UP, true>(s);
    allow_all<PRODUCT_PLAIN, true>(s);
    return s->failed == cudaSuccess;
}

extern "C" void cuda_fill_products(struct ops *ops) {
    ops->matmul = matmul;
    ops->norm_qkv = norm_qkv;
    ops->out_residual = residual;
    ops->down_residual = residual;
    ops->norm_gate_up = norm_gate_up;
    ops->norm_head = norm_head;
    ops->scratch_floats = scratch_floats;
}
