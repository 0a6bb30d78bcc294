// products.cu: matrix products and the ops fused around them. The kernels are in small.cuh, tiles.cuh and groups.cu;
// this file chooses among them for bf16 weights, and leaves quantised ones to quantised.cu.
#include "ops/cuda/clusters.cuh"
#include "ops/cuda/packed.cuh"
#include "ops/cuda/small.cuh"
#include "ops/cuda/tiles.cuh"

using W = bf16_weights;

enum { LARGE = HOPPER ? 4 : 2 }; // half the pairs of a large tile: of which there is room for two stages

// As many pairs a block as give each SM about one block.
template <enum product_mode MODE> static constexpr int most_pairs() {
    return MODE == PRODUCT_RESIDUAL ? 1 : MODE == PRODUCT_QKV ? 2 : 3;
}

template <enum product_mode MODE, bool NORM>
static void product(const struct op_ctx *ctx, const char *what, const product_args &p, size_t pairs) {
    size_t n_sms = (size_t)cuda_of(ctx)->n_sms;
    constexpr int MOST = most_pairs<MODE>();
    // The next products' weights shall fit beside.
    bool many = pairs > n_sms && p.n_tokens <= 4 && (size_t)p.columns * 32 * MOST <= MAX_SHARED / 2;
    bool small = is_small(cuda_of(ctx), (size_t)p.n_tokens, DTYPE_BF16);
    if (small && many && launch_small<W, MODE, NORM, MOST>(ctx, what, p, pairs)) return;
    if (small && launch_small<W, MODE, NORM, 1>(ctx, what, p, pairs)) return;
    if (MODE == PRODUCT_RESIDUAL && !cuda_in_parts(ctx, p, DTYPE_BF16) &&
        (p.n_tokens <= CLUSTER_TOKENS || cuda_of(ctx)->tile_shape < 0) && launch_sharing<W>(ctx, what, p))
        return;
    if (!small && cuda_group_product(ctx, what, MODE, p, DTYPE_BF16, pairs)) return;
    size_t large = round_up(pairs, 2 * LARGE) / (2 * LARGE) * (round_up((size_t)p.n_tokens, 128) / 128);
    size_t medium = round_up(pairs, 4) / 4 * (round_up((size_t)p.n_tokens, 64) / 64);
    if (p.n_tokens <= 32) launch_tiles<W, MODE, NORM, 1, 1>(ctx, what, p, pairs);
    else if (p.n_tokens > 64 && large * 4 >= n_sms * 3) launch_tiles<W, MODE, NORM, LARGE, 4>(ctx, what, p, pairs);
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
    if (w->type == DTYPE_BF16) launch_matmul<W>(ctx, y, x, w, n_tokens);
    else quantised_matmul(ctx, y, x, w, n_tokens);
}

// A product with weights of any type; `pairs` of units, of GATE_UP's two matrices as one.
template <enum product_mode MODE, bool NORM>
static void product_of(const struct op_ctx *ctx, const char *what, const product_args &p, enum dtype type,
                       size_t pairs) {
    if (type == DTYPE_BF16) product<MODE, NORM>(ctx, what, p, pairs);
    else quantised_product(ctx, what, p, MODE, type, pairs);
}

// Neighbours among q, k and v of one type are one product. A product's own segments are its last ones.
static void norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    cuda_of(ctx)->stored = NULL;
    const struct matrix *w[] = {a->wq, a->wk, a->wv};
    float *y[] = {a->q, a->k, a->v};
    const float *b[] = {a->bq, a->bk, a->bv};
    heads_end heads;
    bool prompts = a->store && cuda_heads_end(ctx, a->store, &heads);
    for (int first = a->wq ? 0 : 1, end; first < 3; first = end) {
        for (end = first + 1; end < 3 && w[end]->type == w[first]->type;) end++;
        product_args p = args_for(w[first], a->n_tokens, a->x);
        size_t pairs = 0;
        p.n_pairs[0] = p.n_out[0] = 0;
        for (int i = first, at = 3 - (end - first); i < end; i++, at++) {
            add_segment(&p, at, w[i], y[i], b[i]);
            pairs += (size_t)p.n_pairs[at];
        }
        p.norm = a->norm;
        p.eps = a->eps;
        if (prompts && first <= 1 && end == 3) p.heads = &heads;
        product_of<PRODUCT_QKV, true>(ctx, "norm_qkv", p, w[first]->type, pairs);
    }
}

static void residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    product_args p = args_for(a->w, a->n_tokens, a->in);
    p.y[0] = a->x;
    product_of<PRODUCT_RESIDUAL, false>(ctx, "residual", p, a->w->type, (size_t)p.n_pairs[0]);
}

static void normed(const struct op_ctx *ctx, const char *what, const struct norm_gate_up_args *a,
                   const struct matrix *w, float *y) {
    product_args p = args_for(w, a->n_tokens, a->x);
    p.y[0] = y;
    p.norm = a->norm;
    p.eps = a->eps;
    product_of<PRODUCT_PLAIN, true>(ctx, what, p, w->type, (size_t)p.n_pairs[0]);
}

bool cuda_reads_packed(const struct op_ctx *ctx, enum fused_op op, const struct matrix *w, size_t n_tokens) {
    const struct cuda_state *s = cuda_of(ctx);
    if (!HOPPER || !w || ctx->tap || !(ctx->fusion >> op & 1)) return false;
    if (is_small(s, n_tokens, w->type) || !cuda_group_has(s, w->type)) return false;
    if (cuda_in_parts(ctx, args_for(w, n_tokens, NULL), w->type)) return true;
    return !(w->type == DTYPE_BF16 ? may_share<W>(s, w->n_out, padded_columns(w->n_in), n_tokens)
                                   : quantised_may_share(s, w, n_tokens));
}

static void norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    if (a->w_gate->type != a->w_up->type) {
        normed(ctx, "norm_gate_up", a, a->w_gate, a->gate);
        normed(ctx, "norm_gate_up", a, a->w_up, a->up);
        ctx->ops->silu_mul(ctx, a->act, a->gate, a->up, a->n_tokens * a->w_gate->n_out);
        return;
    }
    product_args p = args_for(a->w_gate, a->n_tokens, a->x);
    add_segment(&p, 1, a->w_up, NULL, NULL);
    p.y[0] = a->act;
    p.packed_only = cuda_reads_packed(ctx, FUSED_DOWN_RESIDUAL, a->reader, a->n_tokens);
    p.norm = a->norm;
    p.eps = a->eps;
    product_of<PRODUCT_GATE_UP, true>(ctx, "norm_gate_up", p, a->w_gate->type, round_up(a->w_gate->n_out, 8) / 8);
}

static void norm_head(const struct op_ctx *ctx, const struct norm_head_args *a) {
    product_args p = args_for(a->head, a->batch->n_logit_rows, a->x);
    p.y[0] = a->logits;
    p.norm = a->norm;
    p.eps = a->eps;
    p.rows = a->batch->n_tokens == 1 ? NULL : a->batch->logit_rows;
    struct cuda_state *s = cuda_of(ctx);
    if (s->marking && s->device.variants & VARIANT_BESIDE) p.best = s->best + s->best_turn;
    product_of<PRODUCT_PLAIN, true>(ctx, "norm_head", p, a->head->type, (size_t)p.n_pairs[0]);
}

// The packed inputs of the widest product.
static bool scratch_floats(const struct ops *ops, const struct ops_limits *l, size_t *out) {
    size_t packed = round_up(l->max_tokens, 128) * padded_columns(l->max_width) / 2;
    size_t split = cuda_split_floats(ops, l), groups = cuda_group_floats(l);
    if (groups > packed) packed = groups;
    *out = (packed > split ? packed : split) + PARTS_FLOATS;
    return true;
}

template <enum product_mode MODE, bool NORM> static void allow_all(struct cuda_state *s) {
    if (MODE == PRODUCT_RESIDUAL) allow_sharing<W>(s);
    allow_small<W, MODE, NORM, 1>(s);
    allow_small<W, MODE, NORM, most_pairs<MODE>()>(s);
    allow_tile<W, MODE, 1, 1>(s);
    allow_tile<W, MODE, 1, 2>(s);
    allow_tile<W, MODE, 2, 2>(s);
    allow_tile<W, MODE, LARGE, 4>(s);
}

extern "C" void cuda_load_products(struct cuda_state *s, enum dtype type) {
    if (s->loaded_types >> type & 1) return;
    s->loaded_types |= 1u << type;
    if (type == DTYPE_BF16) {
        allow_all<PRODUCT_QKV, true>(s);
        allow_all<PRODUCT_RESIDUAL, false>(s);
        allow_all<PRODUCT_GATE_UP, true>(s);
        allow_all<PRODUCT_PLAIN, true>(s);
    } else {
        cuda_load_quantised(s, type);
        if (HOPPER) cuda_load_group_quantised(s, type);
    }
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
