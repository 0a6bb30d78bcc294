// matmul.c: matrix products in AVX2, alone and fused with what stands before and behind them.
//
// A parallel loop runs over tiles of TILE_ROWS rows of one or more matrices. A tile's dot products for all tokens go
// into a small buffer on the stack (dense.c, quantised.c, or a wider instruction set's), and the epilogue adds a bias
// or a residual, or joins gate and up, on the way to memory. Which tile an element is in changes nothing about its sum.
#include "ops/cpu/avx2/avx2.h"

#if defined(__AVX2__)

#include "ops/cpu/avx2/kernels.h"
#include "ops/cpu/avx2/vec.h"

enum {
    ROUND_GRAIN = 16384,
    PAIR_FROM = 16, // tokens from which on two tiles go together
};

// ---- Tiles and epilogues ------------------------------------------------------------------------------------------

struct part {
    const struct matrix *w, *up; // up: NULL, or gate's partner
    const float *x;              // [n_tokens, n_in] as it is multiplied, or act_rows
    float *y;                    // [n_tokens, n_out]
    const float *bias;           // NULL or [n_out]
    bool add;                    // y += instead of y =
};

struct product {
    struct part parts[3];
    size_t n_parts, n_tokens;
    const struct cpu_kernels *kernels;
    float *panels; // NULL, or BF16 is multiplied lane by lane: [threads][panel_floats]
    size_t panel_floats;
};

// How a type's inputs are rounded: each its own place in the scratch. Integers of 8 and of 13 bits share an act_row.
enum input { INPUT_PLAIN, INPUT_BF16, INPUT_INTEGERS };

static enum input input_of(const struct matrix *w) {
    return w->type == DTYPE_BF16 ? INPUT_BF16 : dtype_info(w->type)->is_quantised ? INPUT_INTEGERS : INPUT_PLAIN;
}

static size_t input_floats(const struct matrix *w) {
    return input_of(w) == INPUT_INTEGERS ? act_row_floats(w->n_in) : w->n_in;
}

static size_t n_tiles(const struct matrix *w) {
    return (w->n_out + TILE_ROWS - 1) / TILE_ROWS;
}

static void dots(const struct product *p, float *out, const struct matrix *w, size_t row, size_t n_rows, const float *x,
                 size_t n_tokens, int thread) {
    const struct cpu_kernels *k = p->kernels;
    float *panel = p->panels ? p->panels + (size_t)thread * p->panel_floats : NULL;
    if (input_of(w) == INPUT_INTEGERS) k->quantised(out, w, row, n_rows, x, n_tokens);
    else if (panel && w->type == DTYPE_BF16) k->lanes->multiply(out, panel, w, row, n_rows, x, n_tokens);
    else k->dense(out, w, row, n_rows, x, n_tokens);
}

// v[r] to y[t][row + r].
static void write_row(const struct part *p, const float *v, size_t row, size_t n_rows, size_t t) {
    float *y = p->y + t * p->w->n_out + row;
    size_t r = 0;
    for (; r + 8 <= n_rows; r += 8) {
        __m256 x = _mm256_load_ps(v + r);
        if (p->bias) x = _mm256_add_ps(x, _mm256_loadu_ps(p->bias + row + r));
        if (p->add) x = _mm256_add_ps(_mm256_loadu_ps(y + r), x);
        _mm256_storeu_ps(y + r, x);
    }
    for (; r < n_rows; r++) {
        float x = p->bias ? v[r] + p->bias[row + r] : v[r];
        y[r] = p->add ? y[r] + x : x;
    }
}

// Whether two tiles can go through `quantised_pair`.
static bool pairs(const struct product *p, const struct matrix *a, const struct matrix *b, size_t last_row, size_t n) {
    return p->kernels->quantised_pair && n >= PAIR_FROM && a->type == b->type && input_of(a) == INPUT_INTEGERS &&
           last_row + TILE_ROWS <= a->n_out;
}

// Two tiles, of gate and of up or neighbours.
static void dots_pair(const struct product *p, float *const *out, const struct matrix *a, const struct matrix *b,
                      size_t row_a, size_t row_b, const float *x, size_t n_tokens, int thread) {
    const struct matrix *w[2] = {a, b};
    const size_t row[2] = {row_a, row_b};
    if (pairs(p, a, b, row_b, n_tokens) && p->kernels->quantised_pair(out, w, row, x, n_tokens)) return;
    for (size_t i = 0; i < 2; i++) {
        size_t left = w[i]->n_out - row[i];
        dots(p, out[i], w[i], row[i], left < TILE_ROWS ? left : TILE_ROWS, x, n_tokens, thread);
    }
}

// Tokens t0 .. t0 + n of a tile, or of two neighbours, n <= TILE_TOKENS.
static void run_tiles(const struct product *product, const struct part *p, size_t tile, size_t count, size_t t0,
                      size_t n, int thread) {
    float out[TILE_ROWS * TILE_TOKENS] __attribute__((aligned(64)));
    float second[TILE_ROWS * TILE_TOKENS] __attribute__((aligned(64)));
    float *const both[2] = {out, second};
    size_t row = tile * TILE_ROWS, n_rows = p->w->n_out - row < TILE_ROWS ? p->w->n_out - row : TILE_ROWS;
    const float *x = p->x + t0 * input_floats(p->w);
    if (p->up) {
        dots_pair(product, both, p->w, p->up, row, row, x, n, thread);
        for (size_t t = 0; t < n; t++) {
            float *g = out + t * TILE_ROWS, *u = second + t * TILE_ROWS;
            size_t r = 0;
            for (; r + 8 <= n_rows; r += 8)
                _mm256_storeu_ps(g + r, silu_mul_8(_mm256_load_ps(g + r), _mm256_load_ps(u + r)));
            for (; r < n_rows; r++) g[r] = g[r] / (1.0f + exp32(-g[r])) * u[r];
        }
    } else if (count == 2) {
        dots_pair(product, both, p->w, p->w, row, row + TILE_ROWS, x, n, thread);
    } else {
        dots(product, out, p->w, row, n_rows, x, n, thread);
    }
    for (size_t t = 0; t < n; t++) { // neighbours side by side: the results are not in the cache
        write_row(p, out + t * TILE_ROWS, row, n_rows, t0 + t);
        if (count == 2) write_row(p, second + t * TILE_ROWS, row + TILE_ROWS, TILE_ROWS, t0 + t);
    }
}

// All tiles of a piece meet the same tokens before others come: those stay in L2.
static void product_piece(void *user, size_t begin, size_t end, int thread) {
    const struct product *p = user;
    // Lanes are laid out anew for other tokens, so that they want many; integers are unpacked sooner than they are
    // fetched from L3.
    const size_t beside = p->panels ? p->kernels->lanes->tokens : 1;
    const size_t most = p->panels ? TILE_TOKENS / beside * beside : TILE_TOKENS / 2;
    for (size_t t = 0; t < p->n_tokens; t += most) {
        const size_t n = p->n_tokens - t < most ? p->n_tokens - t : most;
        for (size_t i = begin, together; i < end; i += together) {
            size_t part = 0, tile = i;
            while (tile >= n_tiles(p->parts[part].w)) tile -= n_tiles(p->parts[part++].w);
            const struct matrix *w = p->parts[part].w;
            const bool two = i + 1 < end && !p->parts[part].up && pairs(p, w, w, (tile + 1) * TILE_ROWS, n);
            together = two ? 2 : 1;
            run_tiles(p, &p->parts[part], tile, together, t, n, thread);
        }
    }
}

static void run_product(const struct op_ctx *ctx, struct product *p) {
    size_t n = 0;
    p->kernels = ctx->ops->kernels;
    for (size_t i = 0; i < p->n_parts; i++) n += n_tiles(p->parts[i].w);
    const size_t pieces = 8 * (size_t)pool_size(ctx->pool); // as many for each thread
    pool_for(ctx->pool, n, (n + pieces - 1) / pieces, product_piece, p);
}

// ---- Inputs -------------------------------------------------------------------------------------------------------

static void deal_pairs(float *to, const float *from, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m256 a = _mm256_loadu_ps(from + i), b = _mm256_loadu_ps(from + i + 8);
        __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xDD)),
                even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
        _mm256_storeu_pd((double *)(void *)(to + i), _mm256_permute4x64_pd(odd, 0xD8));
        _mm256_storeu_pd((double *)(void *)(to + i + 8), _mm256_permute4x64_pd(even, 0xD8));
    }
    for (; i < n; i++) to[i] = from[i];
}

static void round_row(float *y, const float *x, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_castsi256_ps(round_to_bf16(_mm256_loadu_ps(x + i))));
    for (; i < n; i++) y[i] = bf16_to_f32(bf16_from_f32(x[i]));
}

// Rows of inputs: normalised, where there is a norm, and rounded in the ways that are asked for.
struct input_job {
    const struct cpu_kernels *kernels;
    const float *x, *norm; // norm: NULL, or the weights of rmsnorm
    const int32_t *rows;   // NULL: row t is x[t]
    float eps;
    size_t n;
    float *plain, *rounded, *integers; // where to; NULL: not wanted. With a norm, integers need plain
    bool bytes, wide;                  // integers of 8 bits, of 13
    size_t n_tokens;
    float *room; // NULL, or rows are dealt out by lanes: room for a row, `apart` floats for each thread
    size_t apart;
};

static const float *row_of(const struct input_job *j, size_t t) {
    return j->x + (j->rows ? (size_t)j->rows[t] : t) * j->n;
}

static void round_input(const struct input_job *j, float *to, size_t t) {
    if (j->norm) avx2_rmsnorm_row(to, row_of(j, t), j->norm, j->eps, j->n, true);
    else round_row(to, row_of(j, t), j->n);
}

// Groups of tokens, for products lane by lane.
static void lanes_piece(void *user, size_t begin, size_t end, int thread) {
    const struct input_job *j = user;
    float *room = j->room + (size_t)thread * j->apart;
    const size_t most = j->kernels->lanes->tokens;
    for (size_t g = begin; g < end; g++) {
        const size_t t = g * most, n = j->n_tokens - t < most ? j->n_tokens - t : most;
        for (size_t i = 0; i < n; i++) round_input(j, room + i * j->n, t + i);
        j->kernels->lanes->deal(j->rounded + t * j->n, room, j->n, n);
    }
}

static void input_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct input_job *j = user;
    for (size_t t = begin; t < end; t++) {
        const float *x = row_of(j, t);
        if (j->rounded) {
            float *rounded = j->rounded + t * j->n;
            round_input(j, rounded, t);
            j->kernels->deal_pairs(rounded, rounded, j->n);
        }
        if (j->plain) {
            avx2_rmsnorm_row(j->plain + t * j->n, x, j->norm, j->eps, j->n, false);
            x = j->plain + t * j->n;
        }
        if (!j->integers) continue;
        struct act_row row = act_row_beside(j->integers, j->n, t, j->n_tokens, j->kernels->beside);
        avx2_round_row(&row, x, j->n, j->bytes, j->wide);
    }
}

static void want_integers(struct input_job *j, const struct matrix *w) {
    if (input_of(w) != INPUT_INTEGERS) return;
    if (ops_rounds_to_int8(w->type)) j->bytes = true;
    else j->wide = true;
}

// Sets the parts' x from `j->x`, each way of rounding done once, in the scratch: panels, where there are any, BF16's,
// the integers' behind it.
static void make_inputs(const struct op_ctx *ctx, struct input_job j, float *plain, struct product *p) {
    bool wants[3] = {false, false, false};
    for (size_t i = 0; i < p->n_parts; i++) {
        wants[input_of(p->parts[i].w)] = true;
        want_integers(&j, p->parts[i].w);
        if (p->parts[i].up) want_integers(&j, p->parts[i].up);
    }
    j.kernels = ctx->ops->kernels;
    j.n = p->parts[0].w->n_in;
    j.n_tokens = p->n_tokens;
    if (j.norm && (wants[INPUT_PLAIN] || wants[INPUT_INTEGERS])) j.plain = plain;
    float *at = ctx->scratch;
    const struct lane_kernels *by_lanes = wants[INPUT_BF16] && j.n % 32 == 0 ? j.kernels->lanes : NULL;
    if (by_lanes && p->n_tokens < by_lanes->from) by_lanes = NULL;
    if (by_lanes) {
        p->panels = at;
        p->panel_floats = lanes_panel_floats(j.n);
        at += (size_t)pool_size(ctx->pool) * p->panel_floats;
    }
    float *rounded = wants[INPUT_BF16] ? at : NULL;
    const size_t beside = by_lanes ? by_lanes->tokens : 1, groups = (p->n_tokens + beside - 1) / beside;
    if (wants[INPUT_INTEGERS]) j.integers = at + (rounded ? groups * beside : 0) * j.n;
    if (by_lanes) { // in the room for panels
        struct input_job lanes = j;
        lanes.rounded = rounded, lanes.room = p->panels, lanes.apart = p->panel_floats;
        pool_for(ctx->pool, groups, 1, lanes_piece, &lanes);
    } else {
        j.rounded = rounded;
    }
    size_t grain = ROUND_GRAIN / (4 * j.n + 1) + 1;
    if (j.integers) // two threads that write rows side by side would take the lines from each other
        grain = (grain + j.kernels->beside - 1) / j.kernels->beside * j.kernels->beside;
    if (j.plain || j.rounded || j.integers) pool_for(ctx->pool, p->n_tokens, grain, input_piece, &j);
    const float *x[] = {j.norm ? j.plain : j.x, rounded, j.integers};
    for (size_t i = 0; i < p->n_parts; i++) p->parts[i].x = x[input_of(p->parts[i].w)];
}

// ---- The ops ------------------------------------------------------------------------------------------------------

static void matmul(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens) {
    struct product p = {.parts = {{.w = w, .y = y}}, .n_parts = 1, .n_tokens = n_tokens};
    make_inputs(ctx, (struct input_job){.x = x}, NULL, &p);
    run_product(ctx, &p);
}

static void norm_qkv(const struct op_ctx *ctx, const struct norm_qkv_args *a) {
    struct product p = {.parts = {{.w = a->wk, .y = a->k, .bias = a->bk}, {.w = a->wv, .y = a->v, .bias = a->bv}},
                        .n_parts = 2,
                        .n_tokens = a->n_tokens};
    if (a->wq) p.parts[p.n_parts++] = (struct part){.w = a->wq, .y = a->q, .bias = a->bq};
    make_inputs(ctx, (struct input_job){.x = a->x, .norm = a->norm, .eps = a->eps}, a->normed, &p);
    run_product(ctx, &p);
}

static void residual(const struct op_ctx *ctx, const struct proj_residual_args *a) {
    struct product p = {.parts = {{.w = a->w, .y = a->x, .add = true}}, .n_parts = 1, .n_tokens = a->n_tokens};
    make_inputs(ctx, (struct input_job){.x = a->in}, NULL, &p);
    run_product(ctx, &p);
}

static void norm_gate_up(const struct op_ctx *ctx, const struct norm_gate_up_args *a) {
    struct input_job norm = {.x = a->x, .norm = a->norm, .eps = a->eps};
    struct product p = {.parts = {{.w = a->w_gate, .up = a->w_up, .y = a->act}}, .n_parts = 1, .n_tokens = a->n_tokens};
    if (input_of(a->w_gate) == input_of(a->w_up)) {
        make_inputs(ctx, norm, a->normed, &p);
        run_product(ctx, &p);
        return;
    }
    // Inputs that differ (one is bf16, the other quantised: a rare file): the two products stay apart.
    p.parts[0] = (struct part){.w = a->w_gate, .y = a->gate};
    p.parts[1] = (struct part){.w = a->w_up, .y = a->up};
    p.n_parts = 2;
    make_inputs(ctx, norm, a->normed, &p);
    run_product(ctx, &p);
    ctx->ops->silu_mul(ctx, a->act, a->gate, a->up, a->n_tokens * a->w_gate->n_out);
}

static void norm_head(const struct op_ctx *ctx, const struct norm_head_args *a) {
    struct product p = {.parts = {{.w = a->head, .y = a->logits}}, .n_parts = 1, .n_tokens = a->batch->n_logit_rows};
    struct input_job norm = {.x = a->x, .norm = a->norm, .eps = a->eps, .rows = a->batch->logit_rows};
    make_inputs(ctx, norm, a->normed, &p);
    run_product(ctx, &p);
}

const struct cpu_kernels avx2_kernels = {
    avx2_dense,       avx2_quantised,  NULL, deal_pairs, &avx2_lanes, AVX2_BESIDE, avx2_wide_scores, avx2_wide_values,
    avx2_byte_scores, avx2_byte_values};

void avx2_fill_matmul(struct ops *ops) {
    ops->kernels = &avx2_kernels;
    ops->matmul = matmul;
    ops->norm_qkv = norm_qkv;
    ops->out_residual = residual;
    ops->norm_gate_up = norm_gate_up;
    ops->down_residual = residual;
    ops->norm_head = norm_head;
}

#endif
