// stage_weights.c: is what the model reads what the file holds? It owns its own list of a config's weights, so that a
// mistake in the loader's cannot hide, and the statistics of the values. It corrects nothing.
#include "doctor/doctor.h"

#include "base/size.h"
#include "format/safetensors.h"
#include "model/oracle.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- What a config asks for ----------------------------------------------------------------------------------------

enum part { EMBED, HEAD, FINAL_NORM, ATTN_NORM, WQ, WK, WV, BQ, BK, BV, Q_NORM, K_NORM, WO, MLP_NORM, GATE, UP, DOWN };

// Names in a Hugging Face folder and in GGUF; '#' is the layer. (docs/MODEL.md)
static const struct {
    const char *hf, *gguf, *op;
} names[] = {
    [EMBED] = {"model.embed_tokens.weight", "token_embd.weight", "embed"},
    [HEAD] = {"lm_head.weight", "output.weight", "norm_head"},
    [FINAL_NORM] = {"model.norm.weight", "output_norm.weight", "norm_head"},
    [ATTN_NORM] = {"model.layers.#.input_layernorm.weight", "blk.#.attn_norm.weight", "norm_qkv"},
    [WQ] = {"model.layers.#.self_attn.q_proj.weight", "blk.#.attn_q.weight", "norm_qkv"},
    [WK] = {"model.layers.#.self_attn.k_proj.weight", "blk.#.attn_k.weight", "norm_qkv"},
    [WV] = {"model.layers.#.self_attn.v_proj.weight", "blk.#.attn_v.weight", "norm_qkv"},
    [BQ] = {"model.layers.#.self_attn.q_proj.bias", "blk.#.attn_q.bias", "norm_qkv"},
    [BK] = {"model.layers.#.self_attn.k_proj.bias", "blk.#.attn_k.bias", "norm_qkv"},
    [BV] = {"model.layers.#.self_attn.v_proj.bias", "blk.#.attn_v.bias", "norm_qkv"},
    [Q_NORM] = {"model.layers.#.self_attn.q_norm.weight", "blk.#.attn_q_norm.weight", "qk_norm_rope_store"},
    [K_NORM] = {"model.layers.#.self_attn.k_norm.weight", "blk.#.attn_k_norm.weight", "qk_norm_rope_store"},
    [WO] = {"model.layers.#.self_attn.o_proj.weight", "blk.#.attn_output.weight", "out_residual"},
    [MLP_NORM] = {"model.layers.#.post_attention_layernorm.weight", "blk.#.ffn_norm.weight", "norm_gate_up"},
    [GATE] = {"model.layers.#.mlp.gate_proj.weight", "blk.#.ffn_gate.weight", "norm_gate_up"},
    [UP] = {"model.layers.#.mlp.up_proj.weight", "blk.#.ffn_up.weight", "norm_gate_up"},
    [DOWN] = {"model.layers.#.mlp.down_proj.weight", "blk.#.ffn_down.weight", "down_residual"},
};

// One weight: what the config asks for, what the model is bound to, and what the file has.
struct slot {
    enum part part;
    int layer; // -1: outside the layers
    char name[96];
    bool wanted;                // by the config
    size_t rows, columns;       // columns 0: a vector
    const struct matrix *bound; // a matrix, or
    const float *vector;        // a vector; both NULL: nothing is bound
    const struct tensor *file;  // NULL: the file has no such tensor
};

// Values of one tensor, as stored.
struct stats {
    double max, sum_squares;
    size_t n, n_nan, n_inf, n_zero_rows;
    size_t first_bad_row, first_bad_column; // SIZE_MAX: none
    uint64_t hash;                          // of the bytes
};

struct weights {
    struct doctor *d;
    struct stage_report *r;
    const struct tensor_set *set;
    struct slot *slots; // [n]
    size_t n;
    int *claims;         // [set->n] slots that name this tensor
    struct stats *stats; // [set->n]
};

static void name_of(const struct weights *w, enum part part, int layer, char *out, size_t size) {
    const char *pattern = w->d->kind == MODEL_GGUF ? names[part].gguf : names[part].hf;
    const char *mark = strchr(pattern, '#');
    if (mark) snprintf(out, size, "%.*s%d%s", (int)(mark - pattern), pattern, layer, mark + 1);
    else snprintf(out, size, "%s", pattern);
}

static struct slot *add_slot(struct weights *w, enum part part, int layer, bool wanted, size_t rows, size_t columns) {
    struct slot *s = &w->slots[w->n++];
    *s = (struct slot){.part = part, .layer = layer, .wanted = wanted, .rows = rows, .columns = columns};
    name_of(w, part, layer, s->name, sizeof s->name);
    s->file = tensor_find(w->set, s->name);
    if (s->file && wanted) w->claims[s->file - w->set->tensors]++;
    return s;
}

static void add_layer(struct weights *w, int i) {
    const struct model_config *c = &w->d->model->config;
    const struct layer_weights *l = &w->d->model->layers[i];
    size_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    add_slot(w, ATTN_NORM, i, true, c->hidden, 0)->vector = l->attn_norm;
    add_slot(w, WQ, i, true, q, c->hidden)->bound = &l->wq;
    add_slot(w, WK, i, true, kv, c->hidden)->bound = &l->wk;
    add_slot(w, WV, i, true, kv, c->hidden)->bound = &l->wv;
    add_slot(w, BQ, i, c->qkv_bias, q, 0)->vector = l->bq;
    add_slot(w, BK, i, c->qkv_bias, kv, 0)->vector = l->bk;
    add_slot(w, BV, i, c->qkv_bias, kv, 0)->vector = l->bv;
    add_slot(w, Q_NORM, i, c->qk_norm, c->head_dim, 0)->vector = l->q_norm;
    add_slot(w, K_NORM, i, c->qk_norm, c->head_dim, 0)->vector = l->k_norm;
    add_slot(w, WO, i, true, c->hidden, q)->bound = &l->wo;
    add_slot(w, MLP_NORM, i, true, c->hidden, 0)->vector = l->mlp_norm;
    add_slot(w, GATE, i, true, c->n_ff, c->hidden)->bound = &l->w_gate;
    add_slot(w, UP, i, true, c->n_ff, c->hidden)->bound = &l->w_up;
    add_slot(w, DOWN, i, true, c->hidden, c->n_ff)->bound = &l->w_down;
}

static bool list_slots(struct weights *w, struct error *err) {
    const struct model *m = w->d->model;
    const struct model_config *c = &m->config;
    size_t per_layer = DOWN - ATTN_NORM + 1, count;
    if (size_mul_add(c->n_layers, per_layer, 3, &count)) w->slots = size_alloc_zero(count, sizeof *w->slots);
    w->claims = size_alloc_zero(w->set->n, sizeof *w->claims);
    w->stats = size_alloc_zero(w->set->n, sizeof *w->stats);
    if (!w->slots || !w->claims || !w->stats) return error_set(err, "out of memory for %zu layers", c->n_layers);
    add_slot(w, EMBED, -1, true, c->n_vocab, c->hidden)->bound = &m->embed;
    for (size_t i = 0; i < c->n_layers; i++) add_layer(w, (int)i);
    add_slot(w, FINAL_NORM, -1, true, c->hidden, 0)->vector = m->final_norm;
    if (!c->tied) add_slot(w, HEAD, -1, true, c->n_vocab, c->hidden)->bound = &m->head;
    return true;
}

// ---- Binding -------------------------------------------------------------------------------------------------------

static struct fault *slot_fault(struct weights *w, const struct slot *s, const char *check) {
    struct fault *f = stage_fault(w->r, FAULT_WEIGHT, check);
    f->layer = s->layer;
    snprintf(f->op, sizeof f->op, "%s", names[s->part].op);
    snprintf(f->tensor, sizeof f->tensor, "%s", s->name);
    return f;
}

// The row of the file that belongs in row r of the bound matrix: the same, but for q and k of the llama family in GGUF,
// whose rows stand there as RoPE pairs (0, half, 1, half + 1, ...) of each head.
static size_t file_row(const struct weights *w, const struct slot *s, size_t r) {
    const struct model_config *c = &w->d->model->config;
    if (w->d->kind != MODEL_GGUF || c->arch != ARCH_LLAMA || (s->part != WQ && s->part != WK)) return r;
    size_t half = c->head_dim / 2, channel = r % c->head_dim;
    return r - channel + (channel < half ? 2 * channel : 2 * (channel - half) + 1);
}

// Which tensor of the file holds exactly these values, for the message; NULL: none.
static const char *owner_of_vector(const struct weights *w, const float *v, size_t n) {
    for (size_t i = 0; i < w->set->n; i++) {
        const struct tensor *t = &w->set->tensors[i];
        const struct dtype_info *info = dtype_info(t->type);
        if (t->n_elements != n || !info->is_weight || info->is_quantised) continue;
        size_t k = 0;
        for (float x; k < n; k++) {
            dtype_to_f32(t->type, (const unsigned char *)t->data + k * info->block_bytes, &x, 1);
            if (memcmp(&x, &v[k], sizeof x) != 0) break;
        }
        if (k == n) return t->name;
    }
    return NULL;
}

static void check_vector(struct weights *w, const struct slot *s) {
    const struct matrix row = {.name = s->name,
                               .type = s->file->type,
                               .n_out = 1,
                               .n_in = s->rows,
                               .row_bytes = s->file->n_bytes,
                               .data = s->file->data};
    double *expected = size_alloc(s->rows, sizeof *expected);
    if (!expected || !oracle_row(&row, 0, expected, NULL)) {
        free(expected);
        struct fault *f = slot_fault(w, s, "weight = file");
        fault_say(f, "tensor %s cannot be read as values", s->name);
        return;
    }
    w->r->n_checks++;
    for (size_t i = 0; i < s->rows; i++) {
        if ((double)s->vector[i] == expected[i]) continue;
        if (isnan(expected[i])) continue; // the statistics say so
        struct fault *f = slot_fault(w, s, "weight = file");
        const char *owner = owner_of_vector(w, s->vector, s->rows);
        f->channel = (int)i;
        f->expected = expected[i];
        f->found = (double)s->vector[i];
        fault_say(f, "%s [%zu]: the file holds %.9g, the model reads %.9g%s%s", s->name, i, f->expected, f->found,
                  owner ? ", which is what the file has in " : "", owner ? owner : "");
        break;
    }
    free(expected);
}

static const char *owner_of_matrix(const struct weights *w, const struct matrix *m) {
    for (size_t i = 0; i < w->set->n; i++) {
        const struct tensor *t = &w->set->tensors[i];
        size_t bytes = m->n_out * m->row_bytes;
        if (t->type != m->type || t->n_bytes != bytes) continue;
        if (t->data == m->data || memcmp(t->data, m->data, bytes) == 0) return t->name;
    }
    return NULL;
}

static void check_matrix(struct weights *w, const struct slot *s) {
    const struct matrix *m = s->bound;
    size_t row_bytes;
    w->r->n_checks++;
    if (m->type != s->file->type || m->n_out != s->rows || m->n_in != s->columns ||
        !dtype_row_bytes(m->type, m->n_in, &row_bytes) || m->row_bytes != row_bytes) {
        struct fault *f = slot_fault(w, s, "weight = file");
        fault_say(f, "%s: expected [%zu, %zu] %s, the model reads [%zu, %zu] %s in rows of %zu bytes", s->name, s->rows,
                  s->columns, dtype_info(s->file->type)->name, m->n_out, m->n_in, dtype_info(m->type)->name,
                  m->row_bytes);
        return;
    }
    if (m->data == s->file->data && file_row(w, s, 1) == 1) return;
    for (size_t r = 0; r < s->rows; r++) {
        const unsigned char *bound = (const unsigned char *)m->data + r * row_bytes;
        const unsigned char *stored = (const unsigned char *)s->file->data + file_row(w, s, r) * row_bytes;
        if (bound == stored || memcmp(bound, stored, row_bytes) == 0) continue;
        struct fault *f = slot_fault(w, s, "weight = file");
        const char *owner = owner_of_matrix(w, m);
        f->channel = (int)r;
        fault_say(f, "%s: row %zu is not the file's row %zu%s%s", s->name, r, file_row(w, s, r),
                  owner ? "; all of it is what the file has in " : "", owner ? owner : "");
        return;
    }
}

static bool fits(const struct slot *s) {
    return s->columns ? s->file->rank == 2 && s->file->shape[0] == s->rows && s->file->shape[1] == s->columns
                      : s->file->rank == 1 && s->file->shape[0] == s->rows;
}

static void check_slot(struct weights *w, const struct slot *s) {
    bool bound = s->vector || (s->bound && s->bound->data);
    w->r->n_checks++;
    if (!s->wanted) {
        if (!bound) return;
        struct fault *f = slot_fault(w, s, "nothing bound but what the config asks for");
        if (s->vector) f->found = (double)s->vector[0];
        f->channel = 0;
        fault_say(f, "%s has no %s, but the model reads one%s", w->d->model->config.source, s->name,
                  s->file ? "" : ": the file holds none either, so its values come from nowhere");
        return;
    }
    if (!bound || !s->file || !fits(s)) {
        char shape[160] = "";
        if (s->file) tensor_shape_text(s->file, shape, sizeof shape);
        struct fault *f = slot_fault(w, s, "every weight bound");
        fault_say(f, "%s [%zu%s%.0zu]: %s %s", s->name, s->rows, s->columns ? ", " : "", s->columns,
                  !s->file ? "the file has no such tensor, yet the model reads something in its place"
                  : !bound ? "not bound: nothing reads it, though the file has it"
                           : "the file's tensor has another shape:",
                  s->file && bound ? shape : "");
        return;
    }
    if (s->columns) check_matrix(w, s);
    else check_vector(w, s);
}

// No memory serves two weights, but for a tied head.
static void check_shared(struct weights *w) {
    for (size_t i = 0; i < w->n; i++) {
        const struct slot *a = &w->slots[i];
        const void *data = a->bound ? a->bound->data : a->vector;
        if (!data || !a->wanted) continue;
        w->r->n_checks++;
        for (size_t k = 0; k < i; k++) {
            const struct slot *b = &w->slots[k];
            if ((b->bound ? b->bound->data : (const void *)b->vector) != data) continue;
            struct fault *f = slot_fault(w, a, "every tensor bound once");
            fault_say(f, "%s and %s are bound to the same memory", b->name, a->name);
            break;
        }
    }
}

static void check_head(struct weights *w) {
    const struct model *m = w->d->model;
    if (!m->config.tied) return;
    w->r->n_checks++;
    if (m->head.data == m->embed.data && m->head.type == m->embed.type && m->head.n_out == m->embed.n_out &&
        m->head.n_in == m->embed.n_in && m->head.row_bytes == m->embed.row_bytes)
        return;
    struct fault *f = stage_fault(w->r, FAULT_WEIGHT, "a tied head is the embedding");
    char name[96];
    name_of(w, HEAD, -1, name, sizeof name);
    snprintf(f->op, sizeof f->op, "norm_head");
    snprintf(f->tensor, sizeof f->tensor, "%s", name);
    fault_say(f, "%s says that the head is the embedding, but the model reads %s as its head", m->config.source,
              m->head.name ? m->head.name : "something else");
}

static void check_rope(struct weights *w, struct error *err) {
    const struct model *m = w->d->model;
    size_t half = m->config.head_dim / 2;
    double *rates = size_alloc(half, sizeof *rates), magnitude;
    w->r->n_checks++;
    if (rates && oracle_rope_rates(ORACLE_T, m, rates, &magnitude, err)) {
        for (size_t i = 0; i <= half; i++) {
            double expected = i < half ? rates[i] : magnitude, found = i < half ? m->inv_freq[i] : m->rope_magnitude;
            if (fabs(found - expected) <= 1e-12 * fabs(expected)) continue;
            struct fault *f = stage_fault(w->r, FAULT_WEIGHT, "RoPE rates = config");
            snprintf(f->op, sizeof f->op, "rope");
            f->channel = i < half ? (int)i : -1;
            f->expected = expected;
            f->found = found;
            fault_say(f, "RoPE %s %zu: the config (theta %g) gives %.12g, the model uses %.12g",
                      i < half ? "rate of pair" : "magnitude", i, m->config.rope.theta, expected, found);
            break;
        }
    }
    free(rates);
}

// ---- Values --------------------------------------------------------------------------------------------------------

struct scan {
    const struct tensor *t;
    size_t n_rows, n_columns, row_bytes;
    struct stats *threads; // [pool_size]
};

static uint64_t mix(uint64_t h) {
    h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93u;
    return h ^ (h >> 32);
}

static uint64_t hash_bytes(const unsigned char *p, size_t n, uint64_t seed) {
    uint64_t h = seed;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        h = (h ^ word) * 0x9E3779B97F4A7C15u;
        h ^= h >> 29;
    }
    for (; n > 0; p++, n--) h = (h ^ *p) * 0x100000001B3u;
    return mix(h);
}

static void scan_rows(void *user, size_t begin, size_t end, int thread) {
    struct scan *s = user;
    struct stats *out = &s->threads[thread];
    enum { PIECE = 1024 }; // a multiple of every block length
    float v[PIECE];
    const struct dtype_info *info = dtype_info(s->t->type);
    for (size_t row = begin; row < end; row++) {
        const unsigned char *data = (const unsigned char *)s->t->data + row * s->row_bytes;
        float row_max = 0;
        for (size_t column = 0; column < s->n_columns; column += PIECE) {
            size_t n = s->n_columns - column < PIECE ? s->n_columns - column : PIECE;
            dtype_to_f32(s->t->type, data + column / info->block_len * info->block_bytes, v, n);
            float max = 0, squares = 0, poison = 0;
            for (size_t i = 0; i < n; i++) {
                float size = fabsf(v[i]);
                max = size > max ? size : max;
                squares += v[i] * v[i];
                poison += v[i] * 0.0f;
            }
            if (poison == 0) {
                out->sum_squares += (double)squares;
                row_max = max > row_max ? max : row_max;
                continue;
            }
            for (size_t i = 0; i < n; i++) {
                if (isfinite(v[i])) continue;
                if (isnan(v[i])) out->n_nan++;
                else out->n_inf++;
                if (row < out->first_bad_row) out->first_bad_row = row, out->first_bad_column = column + i;
                row_max = 1;
            }
        }
        if (row_max == 0) out->n_zero_rows++;
        if ((double)row_max > out->max) out->max = (double)row_max;
        out->hash += mix(hash_bytes(data, s->row_bytes, row));
    }
}

static void add_stats(struct stats *to, const struct stats *from) {
    if (from->max > to->max) to->max = from->max;
    to->sum_squares += from->sum_squares;
    to->n_nan += from->n_nan;
    to->n_inf += from->n_inf;
    to->n_zero_rows += from->n_zero_rows;
    to->hash += from->hash;
    if (from->first_bad_row >= to->first_bad_row) return;
    to->first_bad_row = from->first_bad_row;
    to->first_bad_column = from->first_bad_column;
}

// Reads every value of every tensor that may hold weights, once.
static bool measure(struct weights *w, struct error *err) {
    int n_threads = pool_size(w->d->pool);
    struct stats *threads = size_alloc((size_t)n_threads, sizeof *threads);
    if (!threads) return error_set(err, "out of memory");
    for (size_t i = 0; i < w->set->n; i++) {
        const struct tensor *t = &w->set->tensors[i];
        struct scan s = {.t = t, .threads = threads};
        s.n_columns = t->rank > 0 ? t->shape[t->rank - 1] : 1;
        w->stats[i] = (struct stats){.n = t->n_elements, .first_bad_row = SIZE_MAX};
        if (!dtype_info(t->type)->is_weight || t->n_elements == 0 ||
            !dtype_row_bytes(t->type, s.n_columns, &s.row_bytes))
            continue;
        s.n_rows = t->n_elements / s.n_columns;
        for (int k = 0; k < n_threads; k++) threads[k] = (struct stats){.first_bad_row = SIZE_MAX};
        pool_for(w->d->pool, s.n_rows, 64, scan_rows, &s);
        for (int k = 0; k < n_threads; k++) add_stats(&w->stats[i], &threads[k]);
        doctor_progress(w->d, (double)(i + 1) / (double)w->set->n);
    }
    free(threads);
    return true;
}

static const struct slot *slot_of(const struct weights *w, const struct tensor *t) {
    for (size_t i = 0; i < w->n; i++)
        if (w->slots[i].file == t) return &w->slots[i];
    return NULL;
}

static double rms_of(const struct stats *s) {
    return s->n ? sqrt(s->sum_squares / (double)s->n) : 0;
}

static void check_values(struct weights *w) {
    for (size_t i = 0; i < w->set->n; i++) {
        const struct tensor *t = &w->set->tensors[i];
        const struct stats *s = &w->stats[i];
        w->r->n_checks++;
        if (s->n_nan + s->n_inf == 0) continue;
        const struct slot *slot = slot_of(w, t);
        if (!slot || !slot->wanted) {
            stage_note(w->r, "%s holds %zu NaN and %zu Inf, but nothing reads it", t->name, s->n_nan, s->n_inf);
            continue;
        }
        struct fault *f = slot_fault(w, slot, FINITE_CHECK);
        f->channel = (int)(t->rank == 1 ? s->first_bad_column : s->first_bad_row);
        f->found = s->n_nan ? (double)NAN : (double)INFINITY;
        fault_say(f, "%s holds %zu NaN and %zu Inf, the first at [%zu, %zu]", t->name, s->n_nan, s->n_inf,
                  s->first_bad_row, s->first_bad_column);
    }
}

// Tensors whose RMS is far from that of the same weight in other layers, all-zero rows, twins.
static void note_unusual(struct weights *w) {
    enum { MOST = 8 };
    size_t n_layers = w->d->model->config.n_layers, named = 0;
    for (size_t i = 0; i < w->n && named < MOST; i++) {
        const struct slot *s = &w->slots[i];
        if (!s->file || !s->wanted || s->layer < 0 || n_layers < 4) continue;
        double rms = rms_of(&w->stats[s->file - w->set->tensors]), others = 0;
        size_t n = 0;
        for (size_t k = 0; k < w->n; k++) {
            const struct slot *o = &w->slots[k];
            if (o->part != s->part || o == s || !o->file) continue;
            others += log(rms_of(&w->stats[o->file - w->set->tensors]) + 1e-30);
            n++;
        }
        double usual = n ? exp(others / (double)n) : rms;
        if (rms > 0 && rms < 20 * usual && rms > usual / 20) continue;
        stage_note(w->r, "%s: RMS %.4g, in the other layers %.4g", s->name, rms, usual);
        named++;
    }
    for (size_t i = 0; i < w->set->n && named < 2 * MOST; i++) {
        const struct tensor *t = &w->set->tensors[i];
        const struct stats *s = &w->stats[i];
        if (!s->n_zero_rows) continue;
        if (t->rank == 1) stage_note(w->r, "%s: all values are zero", t->name);
        else stage_note(w->r, "%s: %zu of %zu rows are all zero", t->name, s->n_zero_rows, t->shape[0]);
        named++;
    }
}

static int by_hash(const void *a, const void *b) {
    const struct stats *const *x = a, *const *y = b;
    return ((*x)->hash > (*y)->hash) - ((*x)->hash < (*y)->hash);
}

static bool same_bytes(const struct tensor *a, const struct tensor *b) {
    return a->type == b->type && a->n_bytes == b->n_bytes && memcmp(a->data, b->data, a->n_bytes) == 0;
}

// Two tensors with the same bytes are legal (norms that training never moved) and worth a line when they are matrices.
static bool note_twins(struct weights *w, struct error *err) {
    const struct stats **sorted = size_alloc(w->set->n, sizeof *sorted);
    size_t n = 0, matrices = 0, vectors = 0;
    if (!sorted) return error_set(err, "out of memory");
    for (size_t i = 0; i < w->set->n; i++)
        if (w->stats[i].hash) sorted[n++] = &w->stats[i];
    qsort(sorted, n, sizeof *sorted, by_hash);
    for (size_t i = 1; i < n; i++) {
        const struct tensor *a = &w->set->tensors[sorted[i - 1] - w->stats],
                            *b = &w->set->tensors[sorted[i] - w->stats];
        if (sorted[i]->hash != sorted[i - 1]->hash || !same_bytes(a, b)) continue;
        if (a->rank == 1) vectors++;
        else if (++matrices <= 4) stage_note(w->r, "%s and %s hold the same bytes", a->name, b->name);
    }
    if (matrices > 4) stage_note(w->r, "%zu more pairs of matrices hold the same bytes", matrices - 4);
    if (vectors) stage_note(w->r, "%zu vectors hold the same bytes as another one", vectors);
    free(sorted);
    return true;
}

// Tensors of the file that the config has no place for.
static size_t note_unread(struct weights *w) {
    size_t n = 0;
    char head[96];
    name_of(w, HEAD, -1, head, sizeof head);
    for (size_t i = 0; i < w->set->n; i++) {
        const struct tensor *t = &w->set->tensors[i];
        w->r->n_checks++;
        bool known = strstr(t->name, "rotary_emb.inv_freq") || strcmp(t->name, "rope_freqs.weight") == 0;
        if (w->claims[i] || known) continue;
        if (w->d->model->config.tied && strcmp(t->name, head) == 0) {
            bool same = t->n_bytes == w->d->model->embed.n_out * w->d->model->embed.row_bytes &&
                        memcmp(t->data, w->d->model->embed.data, t->n_bytes) == 0;
            stage_note(w->r, "%s is not read: the config ties the head to the embedding, %s", t->name,
                       same ? "and the bytes are the same" : "WHICH IS DIFFERENT");
            continue;
        }
        if (++n <= 8)
            stage_note(w->r, "%s is in the file, but the config has no place for it: nothing reads it", t->name);
    }
    if (n > 8) stage_note(w->r, "%zu more tensors of the file are not read", n - 8);
    return n;
}

// ---- q and k norms -------------------------------------------------------------------------------------------------

static double largest(const float *v, size_t n) {
    double max = 0;
    for (size_t i = 0; v && i < n; i++)
        if (fabs((double)v[i]) > max) max = fabs((double)v[i]);
    return max;
}

// The largest norm weight of each layer: genuine models reach 100, and every rounding difference grows with it.
static void note_norms(struct weights *w, bool of_k, double *max, size_t *where) {
    const struct model *m = w->d->model;
    struct buffer line = {0};
    *max = 0;
    for (size_t i = 0; i < m->config.n_layers; i++) {
        double x = largest(of_k ? m->layers[i].k_norm : m->layers[i].q_norm, m->config.head_dim);
        if (x > *max) *max = x, *where = i;
        (void)buffer_printf(&line, " %.3g", x);
    }
    stage_note(w->r, "largest |%c_norm| by layer:%s", of_k ? 'k' : 'q', buffer_text(&line));
    buffer_free(&line);
}

static void summarise(struct weights *w, size_t n_bound, size_t n_unread) {
    (void)buffer_printf(&w->r->summary, "%zu tensors bound once, %zu unread", n_bound, n_unread);
    if (!w->d->model->config.qk_norm) return;
    double q_max, k_max;
    size_t q_where = 0, k_where = 0;
    note_norms(w, false, &q_max, &q_where);
    note_norms(w, true, &k_max, &k_where);
    (void)buffer_printf(&w->r->summary, "; largest q_norm %.4g (layer %zu), k_norm %.4g (layer %zu)", q_max, q_where,
                        k_max, k_where);
}

bool stage_weights(struct doctor *d, struct stage_report *r, struct error *err) {
    struct weights w = {.d = d, .r = r, .set = d->kind == MODEL_GGUF ? &d->model->gguf.tensors : &d->model->files};
    bool ok = list_slots(&w, err);
    size_t n_bound = 0;
    for (size_t i = 0; ok && i < w.n; i++) {
        check_slot(&w, &w.slots[i]);
        n_bound += w.slots[i].wanted;
    }
    if (ok) {
        check_shared(&w);
        check_head(&w);
        check_rope(&w, err);
        ok = measure(&w, err);
    }
    if (ok) {
        check_values(&w);
        size_t n_unread = note_unread(&w);
        note_unusual(&w);
        ok = note_twins(&w, err);
        summarise(&w, n_bound, n_unread);
    }
    free(w.slots);
    free(w.claims);
    free(w.stats);
    return ok;
}
