// weights.c: loading a model: opening its files, binding every weight once by name, type and exact shape, and checking
// its values. See model.h.
#include "model/model.h"

#include "base/size.h"
#include "format/finite.h"
#include "format/json.h"
#include "format/safetensors.h"
#include "model/names.h"
#include "model/synthetic.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The state of binding: which tensors of the file something asked for.
struct binder {
    struct model *model;
    const struct tensor_set *set;
    bool *used; // [set->n]
    struct error *err;
};

// Finds a tensor by name and exact shape (columns 0: a vector of `rows`), and marks it as used.
static const struct tensor *find(struct binder *b, const char *name, size_t rows, size_t columns) {
    const struct tensor *t = tensor_find(b->set, name);
    if (!t) {
        error_set(b->err, "tensor %s is missing: %s asks for it, with shape [%zu%s%.0zu]", name,
                  b->model->config.source, rows, columns ? ", " : "", columns);
        return NULL;
    }
    bool fits =
        columns ? t->rank == 2 && t->shape[0] == rows && t->shape[1] == columns : t->rank == 1 && t->shape[0] == rows;
    char shape[160];
    if (!fits) {
        error_set(b->err, "tensor %s: expected shape [%zu%s%.0zu], found %s", name, rows, columns ? ", " : "", columns,
                  tensor_shape_text(t, shape, sizeof shape));
        return NULL;
    }
    if (!dtype_info(t->type)->is_weight) {
        error_set(b->err, "tensor %s: expected a type that holds weights (F32, F16, BF16 or a quantised one), found %s",
                  name, dtype_info(t->type)->name);
        return NULL;
    }
    b->used[t - b->set->tensors] = true;
    return t;
}

static bool bind_matrix(struct binder *b, enum weight_part part, size_t layer, size_t n_out, size_t n_in,
                        struct matrix *out) {
    char name[WEIGHT_NAME_SIZE];
    weight_name(b->model->kind, part, layer, name, sizeof name);
    const struct tensor *t = find(b, name, n_out, n_in);
    if (!t) return false;
    *out = (struct matrix){.name = t->name, .type = t->type, .n_out = n_out, .n_in = n_in, .data = t->data};
    if (!dtype_row_bytes(t->type, n_in, &out->row_bytes))
        return error_set(b->err, "tensor %s: rows of %zu elements are no whole %s blocks", name, n_in,
                         dtype_info(t->type)->name);
    b->model->weight_bytes += t->n_bytes;
    return true;
}

// A vector, converted to f32 into the arena.
static bool bind_vector(struct binder *b, enum weight_part part, size_t layer, size_t n, const float **out) {
    char name[WEIGHT_NAME_SIZE];
    weight_name(b->model->kind, part, layer, name, sizeof name);
    const struct tensor *t = find(b, name, n, 0);
    if (!t) return false;
    if (dtype_info(t->type)->is_quantised)
        return error_set(b->err, "tensor %s: expected F32, F16 or BF16 for a vector, found %s", name,
                         dtype_info(t->type)->name);
    float *v = arena_alloc(&b->model->arena, n, sizeof *v);
    if (!v) return error_set(b->err, "out of memory for tensor %s", name);
    dtype_to_f32(t->type, t->data, v, n);
    b->model->weight_bytes += n * sizeof *v;
    for (size_t i = 0; i < n; i++)
        if (!isfinite(v[i])) return error_set(b->err, "tensor %s: %s at [%zu]", name, isnan(v[i]) ? "NaN" : "Inf", i);
    *out = v;
    return true;
}

// GGUF stores the q and k rows of the llama family so that a head's channels 2i and 2i+1 form a RoPE pair; here, as in
// Hugging Face, channel i pairs with i + head_dim / 2. Row 2i of a head goes to i, row 2i+1 to i + head_dim / 2.
// (Convention of the converter for general.architecture = llama; no other family is stored so.)
static bool unpermute_heads(struct model *model, struct matrix *m, struct error *err) {
    size_t head_dim = model->config.head_dim;
    unsigned char *rows = arena_alloc(&model->arena, m->n_out, m->row_bytes);
    if (!rows) return error_set(err, "out of memory for tensor %s", m->name);
    for (size_t r = 0; r < m->n_out; r++) {
        size_t head = r / head_dim, c = r % head_dim;
        size_t to = head * head_dim + c / 2 + (c % 2) * (head_dim / 2);
        memcpy(rows + to * m->row_bytes, (const unsigned char *)m->data + r * m->row_bytes, m->row_bytes);
    }
    m->data = rows;
    return true;
}

static bool bind_layer(struct binder *b, size_t i) {
    const struct model_config *c = &b->model->config;
    struct layer_weights *w = &b->model->layers[i];
    size_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    if (!bind_vector(b, PART_ATTN_NORM, i, c->hidden, &w->attn_norm) ||
        !bind_matrix(b, PART_WQ, i, q, c->hidden, &w->wq) || !bind_matrix(b, PART_WK, i, kv, c->hidden, &w->wk) ||
        !bind_matrix(b, PART_WV, i, kv, c->hidden, &w->wv) || !bind_matrix(b, PART_WO, i, c->hidden, q, &w->wo) ||
        !bind_vector(b, PART_MLP_NORM, i, c->hidden, &w->mlp_norm) ||
        !bind_matrix(b, PART_GATE, i, c->n_ff, c->hidden, &w->w_gate) ||
        !bind_matrix(b, PART_UP, i, c->n_ff, c->hidden, &w->w_up) ||
        !bind_matrix(b, PART_DOWN, i, c->hidden, c->n_ff, &w->w_down))
        return false;
    if (c->qkv_bias && (!bind_vector(b, PART_BQ, i, q, &w->bq) || !bind_vector(b, PART_BK, i, kv, &w->bk) ||
                        !bind_vector(b, PART_BV, i, kv, &w->bv)))
        return false;
    if (c->qk_norm && (!bind_vector(b, PART_Q_NORM, i, c->head_dim, &w->q_norm) ||
                       !bind_vector(b, PART_K_NORM, i, c->head_dim, &w->k_norm)))
        return false;
    if (b->model->kind == MODEL_GGUF && c->arch == ARCH_LLAMA)
        return unpermute_heads(b->model, &w->wq, b->err) && unpermute_heads(b->model, &w->wk, b->err);
    return true;
}

// With a tied head a stored one is redundant: skipped when it equals the embedding, named when it does not.
static void skip_stored_head(struct binder *b, const struct log *log) {
    char name[WEIGHT_NAME_SIZE];
    weight_name(b->model->kind, PART_HEAD, 0, name, sizeof name);
    const struct tensor *head = tensor_find(b->set, name);
    if (!head) return;
    b->used[head - b->set->tensors] = true;
    size_t bytes = b->model->embed.n_out * b->model->embed.row_bytes;
    if (head->n_bytes != bytes || memcmp(head->data, b->model->embed.data, bytes) != 0)
        log_warn(log, "tensor %s differs from the embedding, but %s says that they are tied: the embedding is used",
                 name, b->model->config.source);
}

static bool is_buffer(const char *name) {
    size_t n = strlen(name);
    static const char suffix[] = "rotary_emb.inv_freq";
    return n >= sizeof suffix - 1 && strcmp(name + n - (sizeof suffix - 1), suffix) == 0;
}

static void warn_unused(const struct binder *b, const struct log *log) {
    enum { NAMED = 10 };
    size_t n = 0;
    for (size_t i = 0; i < b->set->n; i++) {
        if (b->used[i] || is_buffer(b->set->tensors[i].name)) continue;
        if (++n <= NAMED)
            log_warn(log, "tensor %s is not used: %s has no place for it", b->set->tensors[i].name,
                     b->model->config.source);
    }
    if (n > NAMED) log_warn(log, "%zu more tensors are not used", n - NAMED);
}

static bool bind_rope(struct binder *b) {
    struct model *m = b->model;
    const float *factors = NULL;
    const struct tensor *t = m->kind == MODEL_GGUF ? tensor_find(b->set, "rope_freqs.weight") : NULL;
    if (t) {
        if (!find(b, "rope_freqs.weight", m->config.head_dim / 2, 0)) return false;
        float *v = arena_alloc(&m->arena, m->config.head_dim / 2, sizeof *v);
        if (!v) return error_set(b->err, "out of memory for tensor rope_freqs.weight");
        dtype_to_f32(t->type, t->data, v, m->config.head_dim / 2);
        for (size_t i = 0; i < m->config.head_dim / 2; i++)
            if (!(v[i] > 0 && v[i] < 1e6f))
                return error_set(b->err, "tensor rope_freqs.weight: expected positive factors, found %g at [%zu]",
                                 (double)v[i], i);
        factors = v;
    }
    m->inv_freq = arena_alloc(&m->arena, m->config.head_dim / 2, sizeof *m->inv_freq);
    if (!m->inv_freq) return error_set(b->err, "out of memory");
    rope_rates(&m->config, factors, m->inv_freq, &m->rope_magnitude);
    return true;
}

bool model_bind(struct model *m, const struct log *log, struct error *err) {
    struct binder b = {.model = m, .set = m->kind == MODEL_GGUF ? &m->gguf.tensors : &m->files, .err = err};
    const struct model_config *c = &m->config;
    b.used = arena_alloc_zero(&m->arena, b.set->n, sizeof *b.used);
    m->layers = arena_alloc_zero(&m->arena, c->n_layers, sizeof *m->layers);
    if (!b.used || !m->layers) return error_set(err, "out of memory for %zu layers", c->n_layers);
    if (!bind_matrix(&b, PART_EMBED, 0, c->n_vocab, c->hidden, &m->embed)) return false;
    if (c->tied) {
        m->head = m->embed;
        skip_stored_head(&b, log);
    } else if (!bind_matrix(&b, PART_HEAD, 0, c->n_vocab, c->hidden, &m->head)) {
        return false;
    }
    if (!bind_vector(&b, PART_FINAL_NORM, 0, c->hidden, &m->final_norm)) return false;
    for (size_t i = 0; i < c->n_layers; i++)
        if (!bind_layer(&b, i)) return false;
    if (!bind_rope(&b)) return false;
    warn_unused(&b, log);
    return true;
}

// ---- Values -------------------------------------------------------------------------------------------------------

// The first bad value of a matrix, found by many threads: the smallest flat index wins.
struct value_scan {
    const struct matrix *m;
    atomic_size_t first_bad; // SIZE_MAX: none
};

static void scan_rows(void *ctx, size_t begin, size_t end, int thread) {
    (void)thread;
    struct value_scan *s = ctx;
    enum { CHUNK = 256 }; // a multiple of every block length
    float v[CHUNK];
    const struct dtype_info *info = dtype_info(s->m->type);
    for (size_t row = begin; row < end; row++) {
        const unsigned char *data = (const unsigned char *)s->m->data + row * s->m->row_bytes;
        if (dtype_is_finite(s->m->type, data, s->m->n_in)) continue;
        for (size_t column = 0; column < s->m->n_in; column += CHUNK) {
            size_t n = s->m->n_in - column < CHUNK ? s->m->n_in - column : CHUNK;
            dtype_to_f32(s->m->type, data + column / info->block_len * info->block_bytes, v, n);
            for (size_t i = 0; i < n; i++) {
                if (isfinite(v[i])) continue;
                size_t at = row * s->m->n_in + column + i, seen = atomic_load(&s->first_bad);
                while (at < seen && !atomic_compare_exchange_weak(&s->first_bad, &seen, at)) continue;
                return;
            }
        }
    }
}

static bool check_matrix(const struct matrix *m, struct pool *pool, struct error *err) {
    struct value_scan s = {.m = m};
    atomic_init(&s.first_bad, SIZE_MAX);
    if (pool) pool_for(pool, m->n_out, 64, scan_rows, &s);
    else scan_rows(&s, 0, m->n_out, 0);
    size_t at = atomic_load(&s.first_bad);
    if (at == SIZE_MAX) return true;
    const struct dtype_info *info = dtype_info(m->type);
    size_t row = at / m->n_in, column = at % m->n_in;
    float v[256];
    size_t block = column / info->block_len;
    dtype_to_f32(m->type, (const unsigned char *)m->data + row * m->row_bytes + block * info->block_bytes, v,
                 info->block_len);
    return error_set(err, "tensor %s: %s at [%zu, %zu]", m->name, isnan(v[column % info->block_len]) ? "NaN" : "Inf",
                     row, column);
}

bool model_check_values(const struct model *m, struct pool *pool, const struct log *log, struct error *err) {
    if (!check_matrix(&m->embed, pool, err)) return false;
    if (!m->config.tied && !check_matrix(&m->head, pool, err)) return false;
    for (size_t i = 0; i < m->config.n_layers; i++) {
        const struct layer_weights *w = &m->layers[i];
        const struct matrix *all[] = {&w->wq, &w->wk, &w->wv, &w->wo, &w->w_gate, &w->w_up, &w->w_down};
        for (size_t k = 0; k < sizeof all / sizeof all[0]; k++)
            if (!check_matrix(all[k], pool, err)) return false;
        log_progress(log, "loading", i + 1, m->config.n_layers);
    }
    return true;
}

// ---- Opening ------------------------------------------------------------------------------------------------------

enum { MAX_CONFIG_BYTES = 4 << 20 }; // those in use have a few KB; lists of modules make some longer

static bool read_config_file(const char *folder, const char *file, bool optional, json_t **out, struct error *err) {
    struct buffer path = {0};
    *out = NULL;
    if (!buffer_printf(&path, "%s/%s", folder, file)) return error_set(err, "out of memory");
    bool ok = true;
    if (!optional && !file_exists(path.data) && !file_is_broken_link(path.data)) {
        ok = error_set(err, "%s holds no %s: expected a model's folder in Hugging Face's layout, or a .gguf file",
                       folder, file);
    } else if (!optional || file_exists(path.data)) {
        *out = json_load_path(path.data, MAX_CONFIG_BYTES, err);
        ok = *out != NULL;
    }
    buffer_free(&path);
    return ok;
}

static bool open_folder(struct model *m, struct error *err) {
    json_t *config = NULL, *generation = NULL;
    bool ok = read_config_file(m->path, "config.json", false, &config, err) &&
              model_config_from_json(config, &m->config, err) &&
              read_config_file(m->path, "generation_config.json", true, &generation, err) &&
              (!generation || generation_config_from_json(generation, &m->generation, err)) &&
              safetensors_open_folder(m->path, &m->files, err);
    json_decref(config);
    json_decref(generation);
    return ok;
}

struct model *model_load(enum model_kind kind, const char *path, const struct model_load_options *options,
                         struct error *err) {
    if (kind == MODEL_SYNTHETIC) return model_synthetic(path, options->pool, options->log, err);
    struct model *m = size_alloc_zero(1, sizeof *m);
    if (!m) {
        error_set(err, "out of memory");
        return NULL;
    }
    m->kind = kind;
    m->path = strdup(path);
    bool ok = m->path || error_set(err, "out of memory");
    if (ok && kind == MODEL_FOLDER) ok = open_folder(m, err);
    else if (ok) ok = gguf_open(path, &m->gguf, err) && model_config_from_gguf(&m->gguf, &m->config, err);
    ok = ok && model_bind(m, options->log, err) &&
         (!options->check_values || model_check_values(m, options->pool, options->log, err));
    if (!ok) {
        model_free(m);
        return NULL;
    }
    return m;
}

void model_free(struct model *m) {
    if (!m) return;
    if (m->kind == MODEL_GGUF) gguf_close(&m->gguf);
    else tensor_set_free(&m->files);
    file_map_close(&m->packed);
    arena_free(&m->arena);
    free(m->path);
    free(m);
}
