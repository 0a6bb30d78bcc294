// convert.c: see convert.h. Rounding to blocks is format/quantize.c's, the file's layout gguf_write.c's.
#include "model/convert.h"

#include "base/size.h"
#include "format/gguf_write.h"
#include "format/quantize.h"
#include "text/tokenizer_write.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// One tensor to be written.
struct job {
    const struct tensor *source;
    struct tensor out;
    bool copy;         // as it is
    size_t half_turn;  // rows of the llama family's q and k change places within heads: half of head_dim; else 0
    const float *made; // values that stand in no file (RoPE factors)
};

struct converter {
    const struct model *model;
    const struct convert_options *options;
    struct gguf_writer *writer;
    struct job *jobs; // [n_jobs]
    size_t n_jobs, cap_jobs;
    struct arena arena; // names, made values
    struct error *err;
};

static bool no_memory(struct error *err) {
    return error_set(err, "out of memory");
}

// ---- Metadata

static bool put_u32(struct converter *c, const char *suffix, size_t value) {
    char key[128];
    snprintf(key, sizeof key, "%s.%s", arch_name(c->model->config.arch), suffix);
    return gguf_write_u32(c->writer, key, (uint32_t)value);
}

static bool put_f32(struct converter *c, const char *suffix, double value) {
    char key[128];
    snprintf(key, sizeof key, "%s.%s", arch_name(c->model->config.arch), suffix);
    return gguf_write_f32(c->writer, key, (float)value);
}

static bool put_text(struct converter *c, const char *key, const char *text) {
    return gguf_write_string(c->writer, key, text, strlen(text));
}

static bool write_rope_scaling(struct converter *c) {
    const struct rope_config *r = &c->model->config.rope;
    char key[128];
    if (r->scaling != ROPE_LINEAR && r->scaling != ROPE_YARN) return true; // llama3's are a tensor, rope_freqs.weight
    snprintf(key, sizeof key, "%s.rope.scaling.type", arch_name(c->model->config.arch));
    if (!put_text(c, key, r->scaling == ROPE_LINEAR ? "linear" : "yarn") ||
        !put_f32(c, "rope.scaling.factor", r->factor))
        return false;
    if (r->scaling == ROPE_LINEAR) return true;
    return put_u32(c, "rope.scaling.original_context_length", (size_t)r->original_context) &&
           put_f32(c, "rope.scaling.yarn_beta_fast", r->beta_fast) &&
           put_f32(c, "rope.scaling.yarn_beta_slow", r->beta_slow) &&
           (r->attn_factor <= 0 || put_f32(c, "rope.scaling.attn_factor", r->attn_factor));
}

// A name for people: the folder's.
static const char *display_name(const char *path) {
    size_t n = strlen(path);
    while (n > 0 && path[n - 1] == '/') n--;
    size_t start = n;
    while (start > 0 && path[start - 1] != '/') start--;
    return path + start;
}

static bool write_new_metadata(struct converter *c) {
    const struct model_config *m = &c->model->config;
    bool ok = put_text(c, "general.architecture", arch_name(m->arch)) && put_text(c, "general.type", "model") &&
              put_text(c, "general.name", display_name(c->model->path)) &&
              gguf_write_u32(c->writer, "general.file_type", c->options->recipe->file_type) &&
              gguf_write_u32(c->writer, "general.quantization_version", 2) && put_u32(c, "block_count", m->n_layers) &&
              put_u32(c, "context_length", m->context) && put_u32(c, "embedding_length", m->hidden) &&
              put_u32(c, "feed_forward_length", m->n_ff) && put_u32(c, "attention.head_count", m->n_heads) &&
              put_u32(c, "attention.head_count_kv", m->n_kv_heads) && put_u32(c, "attention.key_length", m->head_dim) &&
              put_u32(c, "attention.value_length", m->head_dim) &&
              put_f32(c, "attention.layer_norm_rms_epsilon", m->rms_eps) &&
              put_f32(c, "rope.freq_base", m->rope.theta) && put_u32(c, "rope.dimension_count", m->head_dim) &&
              put_u32(c, "vocab_size", m->n_vocab) && write_rope_scaling(c);
    if (!ok) return no_memory(c->err);
    if (c->options->tokenizer) return tokenizer_write_gguf(c->options->tokenizer, m->n_vocab, c->writer, c->err);
    return put_text(c, "tokenizer.ggml.model", "no_vocab") || no_memory(c->err);
}

static bool copy_metadata(struct converter *c) {
    const struct gguf *g = &c->model->gguf;
    bool ok = gguf_write_u32(c->writer, "general.file_type", c->options->recipe->file_type) &&
              gguf_write_u32(c->writer, "general.quantization_version", 2);
    for (size_t i = 0; ok && i < g->n_values; i++) {
        const char *key = g->values[i].key;
        if (strcmp(key, "general.file_type") == 0 || strcmp(key, "general.quantization_version") == 0 ||
            strcmp(key, "general.alignment") == 0)
            continue;
        ok = gguf_write_value(c->writer, &g->values[i]);
    }
    return ok || no_memory(c->err);
}

// ---- Which tensors

static bool add_job(struct converter *c, const struct job *j) {
    if (c->n_jobs == c->cap_jobs) {
        size_t cap = c->cap_jobs ? 2 * c->cap_jobs : 256;
        struct job *jobs = size_realloc(c->jobs, cap, sizeof *jobs);
        if (!jobs) return no_memory(c->err);
        c->jobs = jobs;
        c->cap_jobs = cap;
    }
    c->jobs[c->n_jobs] = *j;
    return gguf_write_tensor(c->writer, &c->jobs[c->n_jobs++].out, c->err);
}

static bool add_weight(struct converter *c, const struct tensor *source, enum weight_part part, size_t layer) {
    const struct model_config *m = &c->model->config;
    char name[WEIGHT_NAME_SIZE];
    struct job j = {.source = source, .out = *source};
    weight_name(MODEL_GGUF, part, layer, name, sizeof name);
    j.out.name = arena_copy_text(&c->arena, name, strlen(name));
    if (!j.out.name) return no_memory(c->err);
    j.out.type = source->rank == 2 ? recipe_type(c->options->recipe, c->options->pure, m, part, layer, source->shape[1])
                                   : DTYPE_F32;
    if (c->model->kind != MODEL_GGUF && m->arch == ARCH_LLAMA && (part == PART_WQ || part == PART_WK))
        j.half_turn = m->head_dim / 2;
    return add_job(c, &j);
}

static bool add_weights(struct converter *c) {
    const struct model *m = c->model;
    for (int part = 0; part < PART_COUNT; part++) {
        size_t n = weight_is_layered((enum weight_part)part) ? m->config.n_layers : 1, rows, columns;
        if (!weight_shape(&m->config, (enum weight_part)part, &rows, &columns)) continue;
        for (size_t layer = 0; layer < n; layer++) {
            char name[WEIGHT_NAME_SIZE];
            weight_name(m->kind, (enum weight_part)part, layer, name, sizeof name);
            const struct tensor *t = tensor_find(&m->files, name);
            if (!t) return error_set(c->err, "tensor %s is missing", name);
            if (!add_weight(c, t, (enum weight_part)part, layer)) return false;
        }
    }
    return true;
}

static bool add_rope_factors(struct converter *c) {
    const struct model_config *m = &c->model->config;
    if (m->rope.scaling != ROPE_LLAMA3) return true;
    size_t n = m->head_dim / 2;
    float *factors = arena_alloc(&c->arena, n, sizeof *factors);
    if (!factors) return no_memory(c->err);
    for (size_t i = 0; i < n; i++)
        factors[i] = (float)(pow(m->rope.theta, -2.0 * (double)i / (double)m->head_dim) / c->model->inv_freq[i]);
    struct job j = {.out = {.name = "rope_freqs.weight", .type = DTYPE_F32, .rank = 1, .shape = {n}}, .made = factors};
    return add_job(c, &j);
}

static bool add_gguf_tensors(struct converter *c) {
    const struct tensor_set *set = &c->model->gguf.tensors;
    for (size_t i = 0; i < set->n; i++) {
        enum weight_part part;
        size_t layer;
        const struct tensor *t = &set->tensors[i];
        bool known = weight_from_name(MODEL_GGUF, t->name, &part, &layer);
        if (known ? !add_weight(c, t, part, layer) : !add_job(c, &(struct job){.source = t, .out = *t, .copy = true}))
            return false;
    }
    return true;
}

// ---- Converting

struct rows_job {
    const struct job *j;
    unsigned char *out;
    float *scratch; // [n_threads, 2, n_in]
    size_t n_in, from_bytes, to_bytes;
    double *squares; // [n_rows, 2] of the differences and the values
    const atomic_bool *stop;
};

static size_t source_row(const struct job *j, size_t row) {
    if (j->half_turn == 0) return row;
    size_t head_dim = 2 * j->half_turn, head = row / head_dim, c = row % head_dim;
    return head * head_dim + c / 2 + c % 2 * j->half_turn;
}

static void convert_rows(void *user, size_t begin, size_t end, int thread) {
    const struct rows_job *r = user;
    float *x = r->scratch + (size_t)thread * 2 * r->n_in, *y = x + r->n_in;
    for (size_t row = begin; row < end; row++) {
        if (r->stop && atomic_load(r->stop)) return;
        const unsigned char *from = (const unsigned char *)r->j->source->data + source_row(r->j, row) * r->from_bytes;
        unsigned char *to = r->out + row * r->to_bytes;
        dtype_to_f32(r->j->source->type, from, x, r->n_in);
        dtype_from_f32(r->j->out.type, x, to, r->n_in);
        dtype_to_f32(r->j->out.type, to, y, r->n_in);
        double off = 0, all = 0;
        for (size_t i = 0; i < r->n_in; i++) {
            double d = (double)x[i] - (double)y[i];
            off += d * d;
            all += (double)x[i] * (double)x[i];
        }
        r->squares[2 * row] = off;
        r->squares[2 * row + 1] = all;
    }
}

static bool convert_tensor(struct converter *c, const struct job *j, double *error) {
    const struct tensor *t = j->source;
    size_t n_rows = t->rank == 2 ? t->shape[0] : 1,
           n_threads = c->options->pool ? (size_t)pool_size(c->options->pool) : 1;
    struct rows_job r = {.j = j, .n_in = t->n_elements / n_rows, .stop = c->options->stop};
    r.from_bytes = t->n_bytes / n_rows;
    r.to_bytes = j->out.n_bytes / n_rows;
    r.out = size_alloc(j->out.n_bytes, 1);
    r.scratch = size_alloc(2 * n_threads * r.n_in, sizeof *r.scratch);
    r.squares = size_alloc_zero(n_rows, 2 * sizeof *r.squares);
    bool ok = (r.out && r.scratch && r.squares) || no_memory(c->err);
    double off = 0, all = 0;
    if (ok && c->options->pool) pool_for(c->options->pool, n_rows, 8, convert_rows, &r);
    else if (ok) convert_rows(&r, 0, n_rows, 0);
    for (size_t i = 0; ok && i < n_rows; i++) off += r.squares[2 * i], all += r.squares[2 * i + 1];
    *error = all > 0 ? sqrt(off / all) : 0;
    if (ok && c->options->stop && atomic_load(c->options->stop)) ok = error_set(c->err, "interrupted");
    ok = ok && gguf_write_data(c->writer, r.out, j->out.n_bytes, c->err);
    free(r.out);
    free(r.scratch);
    free(r.squares);
    return ok;
}

static bool write_tensors(struct converter *c, struct convert_result *result) {
    size_t done = 0, total = 0;
    result->tensors = arena_alloc_zero(&result->arena, c->n_jobs, sizeof *result->tensors);
    if (!result->tensors) return no_memory(c->err);
    for (size_t i = 0; i < c->n_jobs; i++) total += c->jobs[i].out.n_elements;
    for (size_t i = 0; i < c->n_jobs; i++) {
        const struct job *j = &c->jobs[i];
        double error = 0;
        bool ok = j->made   ? gguf_write_data(c->writer, j->made, j->out.n_bytes, c->err)
                  : j->copy ? gguf_write_data(c->writer, j->source->data, j->out.n_bytes, c->err)
                            : convert_tensor(c, j, &error);
        if (!ok) return false;
        struct convert_tensor *out = &result->tensors[result->n++];
        *out = (struct convert_tensor){.name = arena_copy_text(&result->arena, j->out.name, strlen(j->out.name)),
                                       .from = j->source ? j->source->type : DTYPE_F32,
                                       .to = j->out.type,
                                       .n_elements = j->out.n_elements,
                                       .n_bytes = j->out.n_bytes,
                                       .error = error};
        if (!out->name) return no_memory(c->err);
        done += j->out.n_elements;
        log_progress(c->options->log, "quantising", done, total);
    }
    return true;
}

bool convert_model(const struct model *model, const char *path, const struct convert_options *options,
                   struct convert_result *result, struct error *err) {
    struct converter c = {.model = model, .options = options, .err = err, .writer = gguf_writer_create(err)};
    bool gguf = model->kind == MODEL_GGUF;
    *result = (struct convert_result){0};
    bool ok = c.writer && (gguf ? copy_metadata(&c) : write_new_metadata(&c)) &&
              (gguf ? add_gguf_tensors(&c) : add_weights(&c) && add_rope_factors(&c)) &&
              gguf_writer_begin(c.writer, path, err) && write_tensors(&c, result) && gguf_writer_finish(c.writer, err);
    if (ok) result->n_bytes = gguf_writer_size(c.writer);
    else convert_result_free(result);
    gguf_writer_free(c.writer);
    arena_free(&c.arena);
    free(c.jobs);
    return ok;
}

void convert_result_free(struct convert_result *r) {
    arena_free(&r->arena);
    *r = (struct convert_result){0};
}
