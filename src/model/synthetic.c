// synthetic.c: see synthetic.h. It owns the table of shapes and the choice of scales; random rows are format/noise.c's,
// binding is weights.c's.
#include "model/synthetic.h"

#include "base/size.h"
#include "format/noise.h"
#include "model/names.h"
#include "model/recipe.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Sources: the config.json of Qwen/Qwen3-0.6B, -1.7B, -4B, -8B, -14B and -32B. The tiny shapes are nobody's.
static const struct {
    const char *name;
    enum arch arch;
    size_t n_layers, hidden, n_heads, n_kv_heads, head_dim, n_ff, n_vocab, context;
    double theta;
    bool tied;
} shapes[] = {
    {"qwen3-0.6b", ARCH_QWEN3, 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1e6, true},
    {"qwen3-1.7b", ARCH_QWEN3, 28, 2048, 16, 8, 128, 6144, 151936, 40960, 1e6, true},
    {"qwen3-4b", ARCH_QWEN3, 36, 2560, 32, 8, 128, 9728, 151936, 40960, 1e6, true},
    {"qwen3-8b", ARCH_QWEN3, 36, 4096, 32, 8, 128, 12288, 151936, 40960, 1e6, false},
    {"qwen3-14b", ARCH_QWEN3, 40, 5120, 40, 8, 128, 17408, 151936, 40960, 1e6, false},
    {"qwen3-32b", ARCH_QWEN3, 64, 5120, 64, 8, 128, 25600, 151936, 40960, 1e6, false},
    {"tiny-qwen3", ARCH_QWEN3, 3, 256, 4, 2, 64, 512, 640, 16384, 1e6, true},
    {"tiny-qwen2", ARCH_QWEN2, 3, 256, 4, 1, 64, 512, 640, 16384, 1e6, true},
    {"tiny-llama", ARCH_LLAMA, 3, 256, 8, 4, 32, 768, 640, 16384, 1e4, false},
    {"micro-qwen3", ARCH_QWEN3, 2, 64, 4, 2, 32, 96, 200, 16384, 1e6, true},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

const char *synthetic_shapes(void) {
    return "qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b, qwen3-14b, qwen3-32b, tiny-qwen3, tiny-qwen2, tiny-llama, "
           "micro-qwen3";
}

bool synthetic_config(const char *shape, struct model_config *c, struct error *err) {
    for (int i = 0; i < N_SHAPES; i++) {
        if (strcmp(shape, shapes[i].name) != 0) continue;
        *c = (struct model_config){.arch = shapes[i].arch,
                                   .n_layers = shapes[i].n_layers,
                                   .hidden = shapes[i].hidden,
                                   .n_heads = shapes[i].n_heads,
                                   .n_kv_heads = shapes[i].n_kv_heads,
                                   .head_dim = shapes[i].head_dim,
                                   .n_ff = shapes[i].n_ff,
                                   .n_vocab = shapes[i].n_vocab,
                                   .context = shapes[i].context,
                                   .rms_eps = 1e-6,
                                   .rope = {.theta = shapes[i].theta},
                                   .qk_norm = shapes[i].arch == ARCH_QWEN3,
                                   .qkv_bias = shapes[i].arch == ARCH_QWEN2,
                                   .tied = shapes[i].tied,
                                   .bos = -1,
                                   .source = "synthetic shape"};
        return true;
    }
    return error_set(err, "synthetic shape \"%.64s\": expected one of %s", shape, synthetic_shapes());
}

// The types of the matrices: one for all, or a mix.
struct types {
    enum dtype type;             // without a mix; with one, that of most
    const struct recipe *recipe; // NULL: no mix
};

// SHAPE[:TYPE[:SEED]]
static bool parse_name(const char *name, char shape[32], struct types *types, uint64_t *seed, struct error *err) {
    static const char prefix[] = "synthetic:";
    if (strncmp(name, prefix, sizeof prefix - 1) == 0) name += sizeof prefix - 1;
    char parts[3][32] = {"", "bf16", "1"};
    for (int i = 0;; i++) {
        size_t n = strcspn(name, ":");
        if (i == 3 || n >= sizeof parts[0])
            return error_set(err, "synthetic model: expected synthetic:SHAPE[:TYPE[:SEED]], found \"%.100s\"", name);
        memcpy(parts[i], name, n);
        parts[i][n] = '\0';
        name += n;
        if (*name++ == '\0') break;
    }
    memcpy(shape, parts[0], sizeof parts[0]);
    *types = (struct types){0};
    if (!dtype_from_name(parts[1], &types->type) || !dtype_info(types->type)->is_weight) {
        types->recipe = recipe_find(parts[1], NULL);
        if (!types->recipe)
            return error_set(err, "synthetic model: type \"%s\": expected one of %s, or a plain q3_k, q4_k or q5_k",
                             parts[1], recipe_names());
        types->type = types->recipe->base;
    }
    char *end;
    errno = 0;
    *seed = strtoull(parts[2], &end, 10);
    if (parts[2][0] < '0' || parts[2][0] > '9' || *end || errno)
        return error_set(err, "synthetic model: seed: expected a whole number, found \"%s\"", parts[2]);
    return true;
}

// ---- Laying out: names, shapes, and where each tensor stands in one piece of memory

static bool add_tensor(struct model *m, enum weight_part part, size_t layer, const struct types *types, size_t *total,
                       struct error *err) {
    size_t rows, columns;
    if (!weight_shape(&m->config, part, &rows, &columns)) return true;
    char name[WEIGHT_NAME_SIZE];
    weight_name(MODEL_SYNTHETIC, part, layer, name, sizeof name);
    bool vector = columns == 0;
    enum dtype type = types->type;
    if (types->recipe && !vector) type = recipe_type(types->recipe, false, &m->config, part, layer, columns);
    struct tensor *t = &m->files.tensors[m->files.n];
    *t = (struct tensor){.name = arena_copy_text(&m->files.arena, name, strlen(name)),
                         .type = vector && dtype_info(type)->is_quantised ? DTYPE_F32 : type,
                         .rank = vector ? 1 : 2,
                         .shape = {rows, columns},
                         .file = "synthetic"};
    if (!t->name) return error_set(err, "out of memory");
    if (!tensor_measure(t, err)) return false;
    m->files.n++;
    return size_add(*total, t->n_bytes, total) && size_align_up(*total, 64, total);
}

static bool lay_out(struct model *m, const struct types *types, struct error *err) {
    struct tensor_set *set = &m->files;
    size_t total = 0, at = 0;
    unsigned char *memory;
    set->tensors = size_alloc_zero(m->config.n_layers + 1, PART_COUNT * sizeof *set->tensors);
    set->maps = arena_alloc_zero(&set->arena, 1, sizeof *set->maps);
    if (!set->tensors || !set->maps) return error_set(err, "out of memory");
    for (int part = 0; part < PART_COUNT; part++) {
        size_t n = weight_is_layered((enum weight_part)part) ? m->config.n_layers : 1;
        for (size_t layer = 0; layer < n; layer++)
            if (!add_tensor(m, (enum weight_part)part, layer, types, &total, err)) return false;
    }
    if (!tensor_set_sort(set, err) || !file_map_memory(&set->maps[0], total, &memory, err)) return false;
    set->n_maps = 1;
    for (size_t i = 0; i < set->n; i++) {
        set->tensors[i].data = memory + at;
        at = (at + set->tensors[i].n_bytes + 63) / 64 * 64;
    }
    return true;
}

// ---- Filling

// What a part's values look like: `mean` plus noise of `deviation`.
static void choose_scale(const struct model_config *c, enum weight_part part, size_t n_in, float *mean,
                         float *deviation) {
    double back = 1 / sqrt(2.0 * (double)c->n_layers);
    *mean = 0;
    *deviation = (float)(1 / sqrt((double)(n_in ? n_in : 1)));
    switch (part) {
    case PART_EMBED:
    case PART_HEAD: *deviation = (float)(1.5 / sqrt((double)c->hidden)); break;
    case PART_WO:
    case PART_DOWN: *deviation *= (float)back; break;
    case PART_BQ:
    case PART_BK:
    case PART_BV: *deviation = 0.5f; break;
    case PART_Q_NORM:
    case PART_K_NORM: *mean = 1.5f, *deviation = 0.2f; break;
    case PART_FINAL_NORM:
    case PART_ATTN_NORM:
    case PART_MLP_NORM: *mean = 1, *deviation = 0.2f; break;
    default: break;
    }
}

struct fill_job {
    const struct tensor *tensor;
    unsigned char *data;
    size_t row_bytes;
    float mean, deviation;
    uint64_t seed, stream; // stream + row is a row's own
};

static void fill_rows(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct fill_job *j = user;
    for (size_t row = begin; row < end; row++) {
        struct noise noise;
        noise_seed(&noise, j->seed, j->stream + row);
        noise_row(&noise, j->tensor->type, j->data + row * j->row_bytes, j->tensor->shape[1], j->deviation);
    }
}

static void fill_vector(const struct fill_job *j) {
    struct noise noise;
    noise_seed(&noise, j->seed, j->stream);
    for (size_t i = 0; i < j->tensor->shape[0]; i++) {
        float v;
        noise_floats(&noise, &v, 1, j->deviation);
        v += j->mean;
        uint16_t h = j->tensor->type == DTYPE_BF16 ? bf16_from_f32(v) : f16_from_f32(v);
        if (j->tensor->type == DTYPE_F32) memcpy(j->data + 4 * i, &v, 4);
        else memcpy(j->data + 2 * i, &h, 2);
    }
}

static void fill(struct model *m, uint64_t seed, struct pool *pool, const struct log *log) {
    size_t done = 0, total = 0;
    for (size_t i = 0; i < m->files.n; i++) total += m->files.tensors[i].n_bytes;
    for (size_t i = 0; i < m->files.n; i++) {
        const struct tensor *t = &m->files.tensors[i];
        enum weight_part part = PART_EMBED;
        size_t layer = 0;
        weight_from_name(MODEL_SYNTHETIC, t->name, &part, &layer);
        struct fill_job j = {.tensor = t, .data = (unsigned char *)(uintptr_t)t->data, .seed = seed};
        j.stream = ((uint64_t)part << 16 | layer) << 32;
        choose_scale(&m->config, part, t->rank == 2 ? t->shape[1] : 0, &j.mean, &j.deviation);
        if (t->rank == 1) {
            fill_vector(&j);
        } else {
            j.row_bytes = t->n_bytes / t->shape[0];
            if (pool) pool_for(pool, t->shape[0], 64, fill_rows, &j);
            else fill_rows(&j, 0, t->shape[0], 0);
        }
        done += t->n_bytes;
        log_progress(log, "making weights", done, total);
    }
}

struct model *model_synthetic(const char *name, struct pool *pool, const struct log *log, struct error *err) {
    char shape[32];
    struct types types;
    uint64_t seed = 0;
    struct model *m = size_alloc_zero(1, sizeof *m);
    if (!m) {
        error_set(err, "out of memory");
        return NULL;
    }
    m->kind = MODEL_SYNTHETIC;
    m->path = strdup(name);
    bool ok = (m->path || error_set(err, "out of memory")) && parse_name(name, shape, &types, &seed, err) &&
              synthetic_config(shape, &m->config, err) && lay_out(m, &types, err);
    if (ok) fill(m, seed, pool, log);
    if (ok && model_bind(m, log, err)) return m;
    model_free(m);
    return NULL;
}
