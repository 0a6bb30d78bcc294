// stage_ops_run.c: runs a layer's ops, or the head's, alone and keeps what each computes. It owns the memory around
// them, all of which is NaN before the run, and judges nothing. On a device it works on copies there; what the KV holds
// before and after is the host's to look at.
#include "doctor/stage_ops.h"

#include "base/size.h"
#include "ops/kv_page.h"

#include <math.h>
#include <string.h>

const struct segment_info segment_infos[SEG_COUNT] = {
    [SEG_ATTN_NORM] = {"attn_norm", "rmsnorm", FUSED_NORM_QKV},
    [SEG_Q] = {"q", "matmul", FUSED_NORM_QKV},
    [SEG_K] = {"k", "matmul", FUSED_NORM_QKV},
    [SEG_V] = {"v", "matmul", FUSED_NORM_QKV},
    [SEG_Q_NORM] = {"q_norm", "head_rmsnorm", FUSED_QK_NORM_ROPE_STORE},
    [SEG_K_NORM] = {"k_norm", "head_rmsnorm", FUSED_QK_NORM_ROPE_STORE},
    [SEG_Q_ROPE] = {"q_rope", "rope", FUSED_QK_NORM_ROPE_STORE},
    [SEG_K_ROPE] = {"k_rope", "rope", FUSED_QK_NORM_ROPE_STORE},
    [SEG_KV_K] = {"stored k", "kv_store", FUSED_QK_NORM_ROPE_STORE},
    [SEG_KV_V] = {"stored v", "kv_store", FUSED_QK_NORM_ROPE_STORE},
    [SEG_ATTN] = {"attn", "attention", FUSED_ATTENTION},
    [SEG_ATTN_OUT] = {"attn_out", "matmul", FUSED_OUT_RESIDUAL},
    [SEG_RESID_MID] = {"resid_mid", "add", FUSED_OUT_RESIDUAL},
    [SEG_MLP_NORM] = {"mlp_norm", "rmsnorm", FUSED_NORM_GATE_UP},
    [SEG_GATE] = {"gate", "matmul", FUSED_NORM_GATE_UP},
    [SEG_UP] = {"up", "matmul", FUSED_NORM_GATE_UP},
    [SEG_ACT] = {"act", "silu_mul", FUSED_NORM_GATE_UP},
    [SEG_MLP_OUT] = {"mlp_out", "matmul", FUSED_DOWN_RESIDUAL},
    [SEG_RESID] = {"resid", "add", FUSED_DOWN_RESIDUAL},
    [SEG_FINAL_NORM] = {"final_norm", "rmsnorm", FUSED_NORM_HEAD},
    [SEG_LOGITS] = {"logits", "matmul", FUSED_NORM_HEAD},
};

size_t segment_head_dim(const struct model_config *c, enum segment seg) {
    return seg >= SEG_Q && seg <= SEG_ATTN ? c->head_dim : 0;
}

size_t segment_columns(const struct model_config *c, enum segment seg) {
    switch (seg) {
    case SEG_Q:
    case SEG_Q_NORM:
    case SEG_Q_ROPE:
    case SEG_ATTN: return c->n_heads * c->head_dim;
    case SEG_K:
    case SEG_V:
    case SEG_K_NORM:
    case SEG_K_ROPE:
    case SEG_KV_K:
    case SEG_KV_V: return c->n_kv_heads * c->head_dim;
    case SEG_GATE:
    case SEG_UP:
    case SEG_ACT: return c->n_ff;
    case SEG_LOGITS: return c->n_vocab;
    case SEG_ATTN_NORM:
    case SEG_ATTN_OUT:
    case SEG_RESID_MID:
    case SEG_MLP_NORM:
    case SEG_MLP_OUT:
    case SEG_RESID:
    case SEG_FINAL_NORM:
    case SEG_COUNT: break;
    }
    return c->hidden;
}

static float *floats(struct arena *arena, size_t rows, size_t columns) {
    size_t n;
    return size_mul(rows, columns, &n) ? arena_alloc(arena, n, sizeof(float)) : NULL;
}

bool capture_create(struct capture *c, struct arena *arena, const struct model_config *config, size_t max_rows,
                    bool head, struct error *err) {
    *c = (struct capture){.max_rows = max_rows};
    for (int s = head ? SEG_FINAL_NORM : 0; s < (head ? SEG_COUNT : SEG_FINAL_NORM); s++) {
        c->seg[s] = floats(arena, max_rows, segment_columns(config, (enum segment)s));
        if (!c->seg[s]) return error_set(err, "out of memory for the results of %zu rows", max_rows);
    }
    return true;
}

static void capture_tap(void *user, const char *name, int layer, const float *data, size_t n_rows, size_t n_columns) {
    (void)layer;
    struct capture *c = user;
    for (int s = 0; s < SEG_COUNT; s++) {
        if (strcmp(segment_infos[s].name, name) != 0 || !c->seg[s]) continue;
        memcpy(c->seg[s], data, n_rows * n_columns * sizeof *data);
        c->present[s] = true;
    }
}

static float *poisoned(struct arena *arena, size_t rows, size_t columns) {
    float *p = floats(arena, rows, columns);
    for (size_t i = 0; p && i < rows * columns; i++) p[i] = NAN;
    return p;
}

// ---- The ops' memory -----------------------------------------------------------------------------------------------

// Where the ops of one run work: on the host, or on a device.
struct place {
    struct device *device; // NULL: the host
    struct room *room;
    struct arena *arena;
    struct error *err;
};

static float *fresh(const struct place *p, size_t rows, size_t columns) {
    size_t n;
    if (!p->device) return poisoned(p->arena, rows, columns);
    return size_mul(rows, columns, &n) ? room_take(p->room, n * sizeof(float), p->err) : NULL;
}

// The host's array itself, or its copy.
static const void *at_hand(const struct place *p, const void *data, size_t bytes) {
    return p->device && data ? room_put(p->room, data, bytes, p->err) : data;
}

// A result, whether anybody watched it or not.
static void keep(struct capture *c, const struct place *p, enum segment seg, const float *data, size_t columns) {
    size_t bytes = c->n_rows * columns * sizeof *data;
    if (p->device) p->device->get(p->device, c->seg[seg], data, bytes);
    else memcpy(c->seg[seg], data, bytes);
    c->present[seg] = true;
}

static const float canary = 1234.5f;
enum { CANARIES = 16 };

static bool open_ctx(struct op_ctx *ctx, const struct doctor *d, const struct op_way *way, size_t n_tokens,
                     size_t n_positions, const struct place *p) {
    const struct model_config *c = &d->model->config;
    size_t q = c->n_heads * c->head_dim, width = c->hidden > c->n_ff ? c->hidden : c->n_ff, own = 0;
    struct ops_limits limits = {.max_tokens = n_tokens,
                                .max_positions = n_positions,
                                .max_width = width > q ? width : q,
                                .n_heads = c->n_heads,
                                .head_dim = c->head_dim,
                                .n_threads = p->device ? 1 : pool_size(way->pool)};
    *ctx = (struct op_ctx){.ops = way->ops, .pool = way->pool, .fusion = way->fusion, .layer = -1};
    if (!ops_scratch_floats(&limits, &ctx->scratch_floats) ||
        (way->ops->scratch_floats && !way->ops->scratch_floats(way->ops, &limits, &own)))
        return error_set(p->err, "the scratch size overflows");
    if (own > ctx->scratch_floats) ctx->scratch_floats = own;
    ctx->scratch = fresh(p, ctx->scratch_floats + CANARIES, 1);
    if (!ctx->scratch) return error_set(p->err, "out of memory for scratch");
    float row[CANARIES];
    for (size_t i = 0; i < CANARIES; i++) row[i] = canary;
    if (p->device) p->device->put(p->device, ctx->scratch + ctx->scratch_floats, row, sizeof row);
    else memcpy(ctx->scratch + ctx->scratch_floats, row, sizeof row);
    return true;
}

static bool overran(const struct op_ctx *ctx, const struct place *p) {
    float row[CANARIES];
    if (p->device) p->device->get(p->device, row, ctx->scratch + ctx->scratch_floats, sizeof row);
    else memcpy(row, ctx->scratch + ctx->scratch_floats, sizeof row);
    for (size_t i = 0; i < CANARIES; i++)
        if (row[i] != canary) return true;
    return false;
}

// ---- The KV --------------------------------------------------------------------------------------------------------

size_t case_tokens(const struct op_case *c) {
    size_t n = 0;
    for (size_t s = 0; s < c->n_seqs; s++) n += c->seqs[s].n;
    return n;
}

int case_position(const struct op_case *c, size_t row) {
    size_t s = 0;
    while (row >= c->seqs[s].n) row -= c->seqs[s++].n;
    return (int)(c->seqs[s].past + row);
}

// The step's memory, for one run.
struct step {
    const struct op_case *c;
    const struct model_config *config;
    struct batch batch;
    int32_t *ints;
    struct kv_layer kv;
    size_t kv_bytes;
    int32_t *owner;        // [n_pages] sequence that a page belongs to, -1: none
    int32_t *first;        // [n_pages] its first position
    unsigned char *before; // the KV's bytes before the run: K, then V
};

static void fill_past(struct step *s, size_t seq) {
    const struct op_sequence *q = &s->c->seqs[seq];
    const int32_t *pages = s->batch.pages + s->batch.page_start[seq];
    size_t hd = s->kv.head_dim, width = s->kv.n_kv_heads * hd;
    for (size_t p = 0; p < q->past; p++)
        for (size_t h = 0; h < s->kv.n_kv_heads; h++) {
            size_t row = kv_row(&s->kv, (size_t)pages[p / KV_PAGE_TOKENS], h, p % KV_PAGE_TOKENS);
            kv_store_row(&s->kv, KV_K, row, q->past_k + p * width + h * hd);
            kv_store_row(&s->kv, KV_V, row, q->past_v + p * width + h * hd);
        }
}

static bool open_kv(struct step *s, const struct op_way *way, size_t n_used, struct arena *arena, struct error *err) {
    size_t n_pages = way->page_order ? n_used + n_used / 2 + 3 : n_used;
    const struct model_config *m = s->config;
    s->kv = (struct kv_layer){
        .type = s->c->d->kv_type, .n_pages = n_pages, .n_kv_heads = m->n_kv_heads, .head_dim = m->head_dim};
    bool fits = size_mul(n_pages, kv_page_bytes(&s->kv), &s->kv_bytes);
    s->kv.k = fits ? arena_alloc(arena, s->kv_bytes, 1) : NULL;
    s->kv.v = fits ? arena_alloc(arena, s->kv_bytes, 1) : NULL;
    s->before = fits ? arena_alloc(arena, 2 * s->kv_bytes, 1) : NULL;
    s->owner = arena_alloc(arena, n_pages, sizeof *s->owner);
    s->first = arena_alloc_zero(arena, n_pages, sizeof *s->first);
    int32_t *order = arena_alloc(arena, n_pages, sizeof *order);
    if (!s->kv.k || !s->kv.v || !s->before || !s->owner || !s->first || !order)
        return error_set(err, "out of memory for %zu KV pages", n_pages);
    memset(s->kv.k, 0xFF, s->kv_bytes); // NaN in every type
    memset(s->kv.v, 0xFF, s->kv_bytes);
    for (size_t i = 0; i < n_pages; i++) s->owner[i] = -1;
    doctor_order_pages(order, n_pages, way->page_order);
    memcpy((int32_t *)(uintptr_t)s->batch.pages, order, n_used * sizeof *order);
    for (size_t seq = 0; seq < s->c->n_seqs; seq++) {
        for (int32_t i = s->batch.page_start[seq]; i < s->batch.page_start[seq + 1]; i++) {
            s->owner[order[i]] = (int32_t)seq;
            s->first[order[i]] = (i - s->batch.page_start[seq]) * KV_PAGE_TOKENS;
        }
        fill_past(s, seq);
    }
    memcpy(s->before, s->kv.k, s->kv_bytes);
    memcpy(s->before + s->kv_bytes, s->kv.v, s->kv_bytes);
    return true;
}

static bool open_step(struct step *s, const struct op_case *c, const struct op_way *way, struct arena *arena,
                      size_t *max_positions, struct error *err) {
    size_t n = case_tokens(c), n_pages = 0, most = 0;
    for (size_t i = 0; i < c->n_seqs; i++) {
        size_t len = c->seqs[i].past + c->seqs[i].n;
        n_pages += (len + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
        most = len > most ? len : most;
    }
    *s = (struct step){.c = c, .config = &c->d->model->config};
    int32_t *ints = arena_alloc_zero(arena, 3 * n + 3 * (c->n_seqs + 1) + n_pages, sizeof *ints);
    if (!ints) return error_set(err, "out of memory for a step of %zu tokens", n);
    int32_t *token = ints, *position = token + n, *seq = position + n, *seq_start = seq + n,
            *page_start = seq_start + c->n_seqs + 1, *kv_len = page_start + c->n_seqs + 1,
            *pages = kv_len + c->n_seqs + 1;
    size_t row = 0, page = 0;
    for (size_t i = 0; i < c->n_seqs; i++) {
        const struct op_sequence *q = &c->seqs[i];
        seq_start[i] = (int32_t)row;
        page_start[i] = (int32_t)page;
        kv_len[i] = (int32_t)(q->past + q->n);
        for (size_t k = 0; k < q->n; k++, row++) {
            position[row] = (int32_t)(q->past + k);
            seq[row] = (int32_t)i;
        }
        page += (q->past + q->n + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    }
    seq_start[c->n_seqs] = (int32_t)row;
    page_start[c->n_seqs] = (int32_t)page;
    s->batch = (struct batch){.n_tokens = n,
                              .n_seqs = c->n_seqs,
                              .token = token,
                              .position = position,
                              .seq = seq,
                              .seq_start = seq_start,
                              .page_start = page_start,
                              .pages = pages,
                              .kv_len = kv_len};
    *max_positions = most;
    return open_kv(s, way, n_pages, arena, err);
}

// What the step stored, in the order of its tokens.
static void read_stored(const struct step *s, struct capture *out) {
    size_t hd = s->kv.head_dim, width = s->kv.n_kv_heads * hd;
    for (size_t t = 0; t < s->batch.n_tokens; t++) {
        size_t p = (size_t)s->batch.position[t];
        size_t page = (size_t)s->batch.pages[(size_t)s->batch.page_start[s->batch.seq[t]] + p / KV_PAGE_TOKENS];
        for (size_t h = 0; h < s->kv.n_kv_heads; h++) {
            size_t row = kv_row(&s->kv, page, h, p % KV_PAGE_TOKENS), to = t * width + h * hd;
            for (size_t c = 0; c < hd; c++) {
                out->seg[SEG_KV_K][to + c] = kv_value(&s->kv, KV_K, s->kv.k, row, c);
                out->seg[SEG_KV_V][to + c] = kv_value(&s->kv, KV_V, s->kv.v, row, c);
            }
        }
    }
    out->present[SEG_KV_K] = out->present[SEG_KV_V] = true;
}

// Slots that belong to no token of this step hold the bytes that they held.
static void check_untouched(const struct step *s, struct capture *out) {
    size_t hd = s->kv.head_dim;
    for (size_t page = 0; page < s->kv.n_pages; page++)
        for (size_t slot = 0; slot < KV_PAGE_TOKENS; slot++) {
            int32_t owner = s->owner[page];
            size_t position = (size_t)s->first[page] + slot;
            const struct op_sequence *q = owner >= 0 ? &s->c->seqs[owner] : NULL;
            if (q && position >= q->past && position < q->past + q->n) continue;
            for (size_t h = 0; h < s->kv.n_kv_heads; h++) {
                size_t row = kv_row(&s->kv, page, h, slot);
                if (kv_same_row(&s->kv, KV_K, s->kv.k, s->before, row) &&
                    kv_same_row(&s->kv, KV_V, s->kv.v, s->before + s->kv_bytes, row))
                    continue;
                out->kv_touched = true;
                out->touched_position = q ? (int)position : -1;
                out->touched_channel = (int)(h * hd);
                return;
            }
        }
}

// ---- A layer -------------------------------------------------------------------------------------------------------

// Cosines, then sines, in f64, rounded once.
static void fill_cos_sin(const struct model *m, const struct batch *b, float *cos_sin) {
    size_t half = m->config.head_dim / 2;
    for (size_t t = 0; t < b->n_tokens; t++)
        for (size_t i = 0; i < half; i++) {
            double angle = (double)b->position[t] * m->inv_freq[i];
            cos_sin[t * 2 * half + i] = (float)(cos(angle) * m->rope_magnitude);
            cos_sin[t * 2 * half + half + i] = (float)(sin(angle) * m->rope_magnitude);
        }
}

// What the ops of one layer work on. Buffers: [n_tokens, ...]
struct bench {
    float *x, *normed, *q, *k, *v, *attn, *projected, *gate, *up;
    const float *cos_sin;
    const struct batch *batch;
    struct batch placed;
    struct kv_layer kv;
    struct layer_weights w;
};

// The layer's weights where the ops read them. The case's vectors may be others than the model's.
static bool place_weights(struct layer_weights *w, const struct op_case *c, const struct place *p) {
    const struct model_config *m = &c->d->model->config;
    const struct layer_weights *usual = &c->d->model->layers[c->layer];
    *w = *c->weights;
    if (!p->device) return true;
    *w = c->d->weights->layers[c->layer];
    const struct {
        const float *wanted, *usual, **to;
        size_t n;
    } vectors[] = {{c->weights->attn_norm, usual->attn_norm, &w->attn_norm, m->hidden},
                   {c->weights->mlp_norm, usual->mlp_norm, &w->mlp_norm, m->hidden},
                   {c->weights->q_norm, usual->q_norm, &w->q_norm, m->head_dim},
                   {c->weights->k_norm, usual->k_norm, &w->k_norm, m->head_dim}};
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) {
        if (vectors[i].wanted == vectors[i].usual) continue;
        *vectors[i].to = at_hand(p, vectors[i].wanted, vectors[i].n * sizeof(float));
        if (!*vectors[i].to) return false;
    }
    return true;
}

static bool open_bench(struct bench *b, const struct op_case *c, const struct step *s, const struct place *p) {
    const struct model_config *m = s->config;
    size_t n = s->batch.n_tokens, q = m->n_heads * m->head_dim, kv = m->n_kv_heads * m->head_dim;
    float *cos_sin = poisoned(p->arena, n, m->head_dim);
    if (!cos_sin) return error_set(p->err, "out of memory for the angles of %zu tokens", n);
    fill_cos_sin(c->d->model, &s->batch, cos_sin);
    *b = (struct bench){.x = fresh(p, n, m->hidden),
                        .normed = fresh(p, n, m->hidden),
                        .q = fresh(p, n, q),
                        .k = fresh(p, n, kv),
                        .v = fresh(p, n, kv),
                        .attn = fresh(p, n, q),
                        .projected = fresh(p, n, m->hidden),
                        .gate = fresh(p, n, m->n_ff),
                        .up = fresh(p, n, m->n_ff),
                        .cos_sin = at_hand(p, cos_sin, n * m->head_dim * sizeof *cos_sin),
                        .batch = &s->batch,
                        .kv = s->kv};
    if (!b->x || !b->normed || !b->q || !b->k || !b->v || !b->attn || !b->projected || !b->gate || !b->up ||
        !b->cos_sin)
        return error_set(p->err, "out of memory for the activations of %zu tokens", n);
    size_t bytes = n * m->hidden * sizeof *b->x;
    if (!place_weights(&b->w, c, p)) return false;
    if (!p->device) {
        memcpy(b->x, c->x, bytes);
        return true;
    }
    b->batch = &b->placed;
    p->device->put(p->device, b->x, c->x, bytes);
    return room_put_batch(p->room, &s->batch, &b->placed, p->err) && room_put_pages(p->room, &s->kv, &b->kv, p->err);
}

static void run_attention(const struct op_ctx *ctx, const struct model_config *m, struct bench *b) {
    size_t n = b->batch->n_tokens;
    float eps = (float)m->rms_eps;
    ops_norm_qkv(ctx, &(struct norm_qkv_args){.n_tokens = n,
                                              .x = b->x,
                                              .norm = b->w.attn_norm,
                                              .eps = eps,
                                              .wq = &b->w.wq,
                                              .wk = &b->w.wk,
                                              .wv = &b->w.wv,
                                              .bq = b->w.bq,
                                              .bk = b->w.bk,
                                              .bv = b->w.bv,
                                              .normed = b->normed,
                                              .q = b->q,
                                              .k = b->k,
                                              .v = b->v});
    struct qk_norm_rope_store_args store = {.batch = b->batch,
                                            .n_heads = m->n_heads,
                                            .n_kv_heads = m->n_kv_heads,
                                            .head_dim = m->head_dim,
                                            .q_norm = b->w.q_norm,
                                            .k_norm = b->w.k_norm,
                                            .eps = eps,
                                            .cos_sin = b->cos_sin,
                                            .q = b->q,
                                            .k = b->k,
                                            .v = b->v,
                                            .kv = &b->kv};
    struct attention_args attention = {.batch = b->batch,
                                       .n_heads = m->n_heads,
                                       .n_kv_heads = m->n_kv_heads,
                                       .head_dim = m->head_dim,
                                       .scale = (float)(1 / sqrt((double)m->head_dim)),
                                       .q = b->q,
                                       .kv = &b->kv,
                                       .out = b->attn};
    ops_rope_attention(ctx, &(struct rope_attention_args){&store, &attention});
    ops_out_residual(ctx, &(struct proj_residual_args){
                              .n_tokens = n, .in = b->attn, .w = &b->w.wo, .projected = b->projected, .x = b->x});
}

static void run_mlp(const struct op_ctx *ctx, const struct model_config *m, struct bench *b) {
    size_t n = b->batch->n_tokens;
    ops_norm_gate_up(ctx, &(struct norm_gate_up_args){.n_tokens = n,
                                                      .x = b->x,
                                                      .norm = b->w.mlp_norm,
                                                      .eps = (float)m->rms_eps,
                                                      .w_gate = &b->w.w_gate,
                                                      .w_up = &b->w.w_up,
                                                      .normed = b->normed,
                                                      .gate = b->gate,
                                                      .up = b->up,
                                                      .act = b->gate});
    ops_down_residual(ctx, &(struct proj_residual_args){
                               .n_tokens = n, .in = b->gate, .w = &b->w.w_down, .projected = b->projected, .x = b->x});
}

static struct place open_place(const struct op_way *way, struct arena *arena, struct error *err) {
    struct place p = {.device = way->ops->device, .room = way->room, .arena = arena, .err = err};
    if (p.device) p.device->variants ^= way->flipped;
    if (p.device) room_empty(p.room);
    return p;
}

// Ends a run on the place; false: the device has failed.
static bool leave(const struct place *p, const struct op_way *way) {
    if (!p->device) return true;
    p->device->variants ^= way->flipped;
    return p->device->sync(p->device, p->err);
}

bool run_layer(const struct op_case *c, const struct op_way *way, struct capture *out, struct error *err) {
    struct arena arena = {0};
    struct step s;
    struct bench b;
    struct op_ctx ctx;
    size_t n = case_tokens(c), max_positions = 0;
    const struct model_config *m = &c->d->model->config;
    struct place p = open_place(way, &arena, err);
    bool ok = open_step(&s, c, way, &arena, &max_positions, err) && open_bench(&b, c, &s, &p) &&
              open_ctx(&ctx, c->d, way, n, max_positions, &p);
    if (ok) {
        memset(out->present, 0, sizeof out->present);
        out->kv_touched = false;
        out->n_rows = n;
        ctx.tap = way->unwatched ? NULL : capture_tap;
        ctx.tap_user = out;
        ctx.layer = c->layer;
        run_attention(&ctx, m, &b);
        if (!way->unwatched) keep(out, &p, SEG_RESID_MID, b.x, m->hidden);
        run_mlp(&ctx, m, &b);
        keep(out, &p, SEG_RESID, b.x, m->hidden);
        out->overran = overran(&ctx, &p);
        ok = !p.device || room_get_pages(p.room, &b.kv, &s.kv, err);
    }
    if (ok) {
        read_stored(&s, out);
        check_untouched(&s, out);
    }
    ok = leave(&p, way) && ok;
    arena_free(&arena);
    return ok;
}

// ---- The head ------------------------------------------------------------------------------------------------------

bool run_head(const struct head_case *c, const struct op_way *way, struct capture *out, struct error *err) {
    struct arena arena = {0};
    struct op_ctx ctx;
    const struct model *m = c->d->model;
    size_t hidden = m->config.hidden;
    struct place p = open_place(way, &arena, err);
    float *rows = fresh(&p, c->n_rows, hidden);
    float *logits = fresh(&p, c->n_rows, m->config.n_vocab);
    const float *x = at_hand(&p, c->x, c->n_tokens * hidden * sizeof *x);
    struct batch batch = {.n_tokens = c->n_tokens, .n_logit_rows = c->n_rows, .logit_rows = c->rows}, placed = batch;
    bool ok = (rows && logits && x) || error_set(err, "out of memory for %zu rows of logits", c->n_rows);
    ok = ok && open_ctx(&ctx, c->d, way, c->n_tokens, 1, &p);
    if (ok && p.device) ok = room_put_batch(p.room, &batch, &placed, err);
    if (ok) {
        memset(out->present, 0, sizeof out->present);
        out->n_rows = c->n_rows;
        ctx.tap = way->unwatched ? NULL : capture_tap;
        ctx.tap_user = out;
        ops_norm_head(&ctx, &(struct norm_head_args){.batch = &placed,
                                                     .x = x,
                                                     .norm = p.device ? c->d->weights->final_norm : m->final_norm,
                                                     .eps = (float)m->config.rms_eps,
                                                     .head = p.device ? &c->d->weights->head : &m->head,
                                                     .rows = rows,
                                                     .normed = rows,
                                                     .logits = logits});
        keep(out, &p, SEG_LOGITS, logits, m->config.n_vocab);
        out->overran = overran(&ctx, &p);
    }
    ok = leave(&p, way) && ok;
    arena_free(&arena);
    return ok;
}

struct fault *segment_fault(struct stage_report *r, enum fault_kind kind, const char *check,
                            const struct model_config *config, int layer, enum segment seg, int position, size_t column,
                            double expected, double found) {
    struct fault *f = stage_fault(r, kind, check);
    size_t hd = segment_head_dim(config, seg);
    f->layer = layer;
    f->position = position;
    f->head = hd ? (int)(column / hd) : -1;
    f->channel = (int)(hd ? column % hd : column);
    f->expected = expected;
    f->found = found;
    if (layer >= 0) snprintf(f->tensor, sizeof f->tensor, "layers.%d.%s", layer, segment_infos[seg].name);
    else snprintf(f->tensor, sizeof f->tensor, "%s", segment_infos[seg].name);
    return f;
}
