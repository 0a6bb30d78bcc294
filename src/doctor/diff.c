// diff.c: reading two traces, measuring how far apart each tensor is, and finding the first that departs. See diff.h.
#include "doctor/diff.h"

#include "base/size.h"
#include "format/json.h"
#include "format/safetensors.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TRACED_LAYERS = 4096, MAX_INPUTS = 3 };

// Every tensor of a trace in the order of computation, and what it is computed from.
enum part {
    PART_EMBED,
    PART_ATTN_NORM,
    PART_Q,
    PART_K,
    PART_V,
    PART_Q_NORM,
    PART_K_NORM,
    PART_Q_ROPE,
    PART_K_ROPE,
    PART_ATTN,
    PART_ATTN_OUT,
    PART_RESID_MID,
    PART_MLP_NORM,
    PART_GATE,
    PART_UP,
    PART_ACT,
    PART_MLP_OUT,
    PART_RESID,
    PART_FINAL_NORM,
    PART_LOGITS,
    N_PARTS,
    PART_STREAM, // as an input: the residual stream that enters the layer
    PART_NONE,
};

static const struct {
    const char *name, *op;
    bool in_layer;
    int heads; // 1: query heads, 2: KV heads
    enum part inputs[MAX_INPUTS];
} parts[N_PARTS] = {
    [PART_EMBED] = {"embed", "embed", false, 0, {PART_NONE}},
    [PART_ATTN_NORM] = {"attn_norm", "rmsnorm", true, 0, {PART_STREAM, PART_NONE}},
    [PART_Q] = {"q", "matmul", true, 1, {PART_ATTN_NORM, PART_NONE}},
    [PART_K] = {"k", "matmul", true, 2, {PART_ATTN_NORM, PART_NONE}},
    [PART_V] = {"v", "matmul", true, 2, {PART_ATTN_NORM, PART_NONE}},
    [PART_Q_NORM] = {"q_norm", "head_rmsnorm", true, 1, {PART_Q, PART_NONE}},
    [PART_K_NORM] = {"k_norm", "head_rmsnorm", true, 2, {PART_K, PART_NONE}},
    [PART_Q_ROPE] = {"q_rope", "rope", true, 1, {PART_Q_NORM, PART_NONE}},
    [PART_K_ROPE] = {"k_rope", "rope", true, 2, {PART_K_NORM, PART_NONE}},
    [PART_ATTN] = {"attn", "attention", true, 1, {PART_Q_ROPE, PART_K_ROPE, PART_V}},
    [PART_ATTN_OUT] = {"attn_out", "matmul", true, 0, {PART_ATTN, PART_NONE}},
    [PART_RESID_MID] = {"resid_mid", "add", true, 0, {PART_STREAM, PART_ATTN_OUT, PART_NONE}},
    [PART_MLP_NORM] = {"mlp_norm", "rmsnorm", true, 0, {PART_RESID_MID, PART_NONE}},
    [PART_GATE] = {"gate", "matmul", true, 0, {PART_MLP_NORM, PART_NONE}},
    [PART_UP] = {"up", "matmul", true, 0, {PART_MLP_NORM, PART_NONE}},
    [PART_ACT] = {"act", "silu_mul", true, 0, {PART_GATE, PART_UP, PART_NONE}},
    [PART_MLP_OUT] = {"mlp_out", "matmul", true, 0, {PART_ACT, PART_NONE}},
    [PART_RESID] = {"resid", "add", true, 0, {PART_RESID_MID, PART_MLP_OUT, PART_NONE}},
    [PART_FINAL_NORM] = {"final_norm", "rmsnorm", false, 0, {PART_STREAM, PART_NONE}},
    [PART_LOGITS] = {"logits", "matmul", false, 0, {PART_FINAL_NORM, PART_NONE}},
};

// ---- Reading -------------------------------------------------------------------------------------------------------

static void meta_text(const json_t *meta, const char *key, char *out, size_t size) {
    const char *text = json_string_value(json_object_get(meta, key));
    snprintf(out, size, "%s", text ? text : "");
}

static size_t meta_number(const json_t *meta, const char *key) {
    const char *text = json_string_value(json_object_get(meta, key));
    long n = text ? strtol(text, NULL, 10) : 0;
    return n > 0 && n <= 1 << 20 ? (size_t)n : 0;
}

// The header once more, for what the reader of tensors passes over. It was parsed before: its length is sound.
static bool read_metadata(struct diff_side *s, struct error *err) {
    const unsigned char *bytes = s->set.maps[0].data;
    uint64_t length = 0;
    for (int i = 0; i < 8; i++) length |= (uint64_t)bytes[i] << 8 * i;
    if (length > JSON_MAX_BYTES) return true; // more tensors than a trace has; no metadata then
    json_t *header = json_parse((const char *)bytes + 8, (size_t)length, s->file, err);
    if (!header) return false;
    const json_t *meta = json_object_get(header, "__metadata__");
    meta_text(meta, "producer", s->producer, sizeof s->producer);
    meta_text(meta, "path", s->path, sizeof s->path);
    meta_text(meta, "precision", s->precision, sizeof s->precision);
    meta_text(meta, "device", s->device, sizeof s->device);
    meta_text(meta, "kv_type", s->kv_type, sizeof s->kv_type);
    meta_text(meta, "version", s->version, sizeof s->version);
    meta_text(meta, "model", s->model, sizeof s->model);
    s->n_heads = meta_number(meta, "n_heads");
    s->n_kv_heads = meta_number(meta, "n_kv_heads");
    s->head_dim = meta_number(meta, "head_dim");
    json_decref(header);
    return true;
}

static const int32_t *vector_of(const struct diff_side *s, const char *name, size_t *n, struct error *err) {
    const struct tensor *t = tensor_find(&s->set, name);
    if (!t) return NULL;
    if (t->type != DTYPE_I32 || t->rank != 1 || t->n_elements == 0) {
        error_set(err, "%s: tensor %s: expected a vector of I32", s->file, name);
        return NULL;
    }
    *n = t->n_elements;
    return t->data;
}

static int32_t element_i32(const int32_t *v, size_t i) { // data in a file may stand at any address
    int32_t x;
    memcpy(&x, (const unsigned char *)v + i * sizeof x, sizeof x);
    return x;
}

static bool open_side(struct diff_side *s, const char *file, struct error *err) {
    s->file = file;
    if (!safetensors_open(file, &s->set, err)) return false;
    struct error why = {0};
    s->ids = vector_of(s, "ids", &s->n_ids, &why);
    if (!s->ids && !why.text[0]) error_set(&why, "%s is no trace: it has no tensor ids", file);
    const int32_t *positions = s->ids ? vector_of(s, "positions", &s->n_positions, &why) : NULL;
    if (why.text[0]) return error_set(err, "%s", why.text);
    if (!read_metadata(s, err)) return false;
    if (!positions) s->n_positions = s->n_ids;
    s->positions = size_alloc(s->n_positions, sizeof *s->positions);
    if (!s->positions) return error_set(err, "out of memory");
    for (size_t i = 0; i < s->n_positions; i++) {
        s->positions[i] = positions ? element_i32(positions, i) : (int32_t)i;
        if (s->positions[i] < 0 || (size_t)s->positions[i] >= s->n_ids || (i && s->positions[i] <= s->positions[i - 1]))
            return error_set(err, "%s: tensor positions: expected ascending positions below %zu, found %d at [%zu]",
                             file, s->n_ids, s->positions[i], i);
    }
    return true;
}

static bool check_ids(const struct diff *d, struct error *err) {
    if (d->a.n_ids != d->b.n_ids)
        return error_set(err, "the traces are of different prompts: %s has %zu token ids, %s has %zu", d->a.file,
                         d->a.n_ids, d->b.file, d->b.n_ids);
    for (size_t i = 0; i < d->a.n_ids; i++) {
        int32_t a = element_i32(d->a.ids, i), b = element_i32(d->b.ids, i);
        if (a != b)
            return error_set(err, "the traces are of different prompts: at position %zu %s has id %d, %s has %d", i,
                             d->a.file, a, d->b.file, b);
    }
    return true;
}

static bool match_rows(struct diff *d, struct error *err) {
    size_t n = d->a.n_positions < d->b.n_positions ? d->a.n_positions : d->b.n_positions;
    d->rows_a = size_alloc(n, sizeof *d->rows_a);
    d->rows_b = size_alloc(n, sizeof *d->rows_b);
    d->positions = size_alloc(n, sizeof *d->positions);
    if (!d->rows_a || !d->rows_b || !d->positions) return error_set(err, "out of memory");
    for (size_t i = 0, j = 0; i < d->a.n_positions && j < d->b.n_positions;) {
        int32_t a = d->a.positions[i], b = d->b.positions[j];
        if (a == b) {
            d->rows_a[d->n_rows] = i;
            d->rows_b[d->n_rows] = j;
            d->positions[d->n_rows++] = a;
        }
        i += a <= b;
        j += b <= a;
    }
    if (d->n_rows == 0) return error_set(err, "the traces have no position in common");
    return true;
}

// "layers.3.q" to 3 and PART_Q; PART_NONE: a name that is no trace's.
static enum part part_of(const char *name, int *layer) {
    const char *rest = name;
    *layer = -1;
    if (strncmp(name, "layers.", 7) == 0 && name[7] >= '0' && name[7] <= '9') {
        char *end;
        long n = strtol(name + 7, &end, 10);
        if (*end == '.' && n >= 0 && n < MAX_TRACED_LAYERS) {
            *layer = (int)n;
            rest = end + 1;
        }
    }
    for (int i = 0; i < N_PARTS; i++)
        if (parts[i].in_layer == (*layer >= 0) && strcmp(rest, parts[i].name) == 0) return (enum part)i;
    *layer = -1;
    return PART_NONE;
}

// Order of computation; names that are no trace's come last, by name.
static int compare_tensors(const void *x, const void *y) {
    const struct diff_tensor *a = x, *b = y;
    int layer_a, layer_b;
    enum part part_a = part_of(a->name, &layer_a), part_b = part_of(b->name, &layer_b);
    int group_a = part_a == PART_NONE ? 3 : part_a >= PART_FINAL_NORM ? 2 : part_a != PART_EMBED;
    int group_b = part_b == PART_NONE ? 3 : part_b >= PART_FINAL_NORM ? 2 : part_b != PART_EMBED;
    if (group_a != group_b) return group_a - group_b;
    if (group_a == 3) return strcmp(a->name, b->name);
    if (layer_a != layer_b) return layer_a - layer_b;
    return (int)part_a - (int)part_b;
}

static bool comparable(const struct tensor *t) {
    return t->type == DTYPE_F64 || dtype_info(t->type)->is_weight;
}

static bool add_tensor(struct diff *d, const struct tensor *a, const struct tensor *b, struct error *err) {
    char shape_a[160], shape_b[160];
    const struct {
        const struct diff_side *side;
        const struct tensor *t;
    } both[2] = {{&d->a, a}, {&d->b, b}};
    if (a->rank != 2 || b->rank != 2 || a->shape[1] != b->shape[1] || a->shape[1] == 0)
        return error_set(err, "tensor %s has shape %s in %s and %s in %s: these are traces of different models",
                         a->name, tensor_shape_text(a, shape_a, sizeof shape_a), d->a.file,
                         tensor_shape_text(b, shape_b, sizeof shape_b), d->b.file);
    for (int i = 0; i < 2; i++) {
        if (both[i].t->shape[0] != both[i].side->n_positions)
            return error_set(err, "%s: tensor %s has %zu rows, but the trace is of %zu positions", both[i].side->file,
                             a->name, both[i].t->shape[0], both[i].side->n_positions);
        if (!comparable(both[i].t))
            return error_set(err, "%s: tensor %s: expected F32, F64, F16 or BF16, found %s", both[i].side->file,
                             a->name, dtype_info(both[i].t->type)->name);
    }
    struct diff_tensor *t = &d->tensors[d->n++];
    *t = (struct diff_tensor){
        .a = a, .b = b, .n_rows = d->n_rows, .n_columns = a->shape[1], .op = "", .limit = INFINITY};
    snprintf(t->name, sizeof t->name, "%s", a->name);
    enum part part = part_of(t->name, &t->layer);
    t->part = part == PART_NONE ? t->name : parts[part].name;
    if (part == PART_NONE) return true;
    t->op = parts[part].op;
    const struct diff_side *known = d->a.head_dim ? &d->a : &d->b;
    size_t heads = parts[part].heads == 1 ? known->n_heads : parts[part].heads == 2 ? known->n_kv_heads : 0;
    if (heads && known->head_dim && heads == t->n_columns / known->head_dim && t->n_columns % known->head_dim == 0) {
        t->n_heads = heads;
        t->head_dim = known->head_dim;
    }
    return true;
}

static bool match_tensors(struct diff *d, struct error *err) {
    d->tensors = size_alloc_zero(d->a.set.n, sizeof *d->tensors);
    if (!d->tensors) return error_set(err, "out of memory");
    for (size_t i = 0; i < d->a.set.n; i++) {
        const struct tensor *a = &d->a.set.tensors[i], *b = tensor_find(&d->b.set, a->name);
        if (strcmp(a->name, "ids") == 0 || strcmp(a->name, "positions") == 0) continue;
        if (!b) d->n_only_a++;
        else if (!add_tensor(d, a, b, err)) return false;
    }
    for (size_t i = 0; i < d->b.set.n; i++) {
        const char *name = d->b.set.tensors[i].name;
        if (strcmp(name, "ids") != 0 && strcmp(name, "positions") != 0 && !tensor_find(&d->a.set, name)) d->n_only_b++;
    }
    if (d->n == 0) return error_set(err, "the traces have no tensor in common");
    qsort(d->tensors, d->n, sizeof *d->tensors, compare_tensors);
    return true;
}

// ---- Measuring -----------------------------------------------------------------------------------------------------

static void load_row(const struct tensor *t, size_t row, double *out) {
    size_t n = t->shape[1];
    const unsigned char *src = (const unsigned char *)t->data + row * (t->n_bytes / t->shape[0]);
    if (t->type == DTYPE_F64) {
        memcpy(out, src, n * sizeof *out);
        return;
    }
    float piece[256];
    for (size_t at = 0; at < n; at += 256) {
        size_t m = n - at < 256 ? n - at : 256;
        dtype_to_f32(t->type, src + at * dtype_info(t->type)->block_bytes, piece, m);
        for (size_t i = 0; i < m; i++) out[at + i] = (double)piece[i];
    }
}

static bool same(double a, double b) {
    return a == b || (isnan(a) && isnan(b));
}

static double finite_rms(const double *v, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        if (isfinite(v[i])) sum += v[i] * v[i];
    return sqrt(sum / (double)n);
}

// Sums over a tensor's rows: of squares of differences and of values, both relative to their row.
struct sums {
    double *row, *head_d, *head_a, *column_d, *column_a; // [n_rows], [n_heads] x 2, [n_columns] x 2
    double *a, *b;                                       // [n_columns] one row
    double *memory;
};

static bool sums_create(struct sums *s, const struct diff_tensor *t, struct error *err) {
    size_t n = t->n_rows + 2 * t->n_heads, total;
    bool fits = size_mul_add(t->n_columns, 4, n, &total);
    s->memory = fits ? size_alloc_zero(total, sizeof *s->memory) : NULL;
    if (!s->memory) return error_set(err, "out of memory for tensor %s", t->name);
    s->row = s->memory;
    s->head_d = s->row + t->n_rows;
    s->head_a = s->head_d + t->n_heads;
    s->column_d = s->head_a + t->n_heads;
    s->column_a = s->column_d + t->n_columns;
    s->a = s->column_a + t->n_columns;
    s->b = s->a + t->n_columns;
    return true;
}

static void sum_tensor(const struct diff *d, const struct diff_tensor *t, struct sums *s) {
    for (size_t r = 0; r < t->n_rows; r++) {
        load_row(t->a, d->rows_a[r], s->a);
        load_row(t->b, d->rows_b[r], s->b);
        double scale = finite_rms(s->a, t->n_columns), row = 0;
        if (scale == 0) scale = finite_rms(s->b, t->n_columns);
        if (scale == 0) scale = 1;
        for (size_t c = 0; c < t->n_columns; c++) {
            double a = isfinite(s->a[c]) ? s->a[c] / scale : 0, e = 0;
            if (!same(s->a[c], s->b[c])) e = isfinite(s->b[c] - s->a[c]) ? (s->b[c] - s->a[c]) / scale : INFINITY;
            row += e * e;
            s->column_d[c] += e * e;
            s->column_a[c] += a * a;
            if (t->n_heads) {
                s->head_d[c / t->head_dim] += e * e;
                s->head_a[c / t->head_dim] += a * a;
            }
        }
        s->row[r] = sqrt(row / (double)t->n_columns);
    }
}

// A head whose values are far below the others' is not judged by its own noise.
static double head_error(const struct diff_tensor *t, const struct sums *s, size_t h) {
    double n = (double)(t->n_rows * t->head_dim), floor = 0.25;
    return sqrt(s->head_d[h] / n) / fmax(sqrt(s->head_a[h] / n), floor);
}

static double column_error(const struct diff_tensor *t, const struct sums *s, size_t c) {
    double n = (double)t->n_rows;
    return sqrt(s->column_d[c] / n) / (1 + sqrt(s->column_a[c] / n));
}

// max that lets no NaN in (Inf / Inf: what was infinite stays so).
static double larger(double a, double b) {
    return isnan(b) ? INFINITY : b > a ? b : a;
}

static bool measure(const struct diff *d, struct diff_tensor *t, struct error *err) {
    struct sums s;
    if (!sums_create(&s, t, err)) return false;
    double squares = 0, squares_a = 0, rows = 0, worst = -1;
    for (size_t r = 0; r < t->n_rows; r++) {
        load_row(t->a, d->rows_a[r], s.a);
        load_row(t->b, d->rows_b[r], s.b);
        for (size_t c = 0; c < t->n_columns; c++) {
            double a = s.a[c], b = s.b[c], e = fabs(b - a);
            if (isfinite(a)) squares_a += a * a;
            if (same(a, b)) continue;
            if (!isfinite(e)) e = INFINITY;
            struct diff_place place = {.position = d->positions[r], .column = c, .a = a, .b = b};
            if (t->n_different++ == 0) t->first = place;
            if (e > worst) {
                worst = e;
                t->worst = place;
            }
            squares += e * e;
        }
    }
    if (t->n_different) {
        t->max_abs = worst;
        t->rms_relative = squares_a > 0 ? sqrt(squares / squares_a) : INFINITY;
        sum_tensor(d, t, &s);
        for (size_t r = 0; r < t->n_rows; r++) {
            rows += s.row[r] * s.row[r];
            t->error = larger(t->error, s.row[r]);
        }
        t->error = larger(t->error, sqrt(rows / (double)t->n_rows));
        for (size_t h = 0; h < t->n_heads; h++) t->error = larger(t->error, head_error(t, &s, h));
        for (size_t c = 0; c < t->n_columns; c++) t->error = larger(t->error, column_error(t, &s, c));
    }
    free(s.memory);
    return true;
}

bool diff_profile(const struct diff *d, const struct diff_tensor *t, struct diff_profile *p, struct error *err) {
    struct sums s;
    *p = (struct diff_profile){0};
    if (!sums_create(&s, t, err)) return false;
    p->rows = size_alloc(t->n_rows, sizeof *p->rows);
    p->heads = size_alloc(t->n_heads, sizeof *p->heads);
    p->columns = size_alloc(t->n_columns, sizeof *p->columns);
    bool ok = p->rows && p->heads && p->columns;
    if (ok) {
        sum_tensor(d, t, &s);
        memcpy(p->rows, s.row, t->n_rows * sizeof *p->rows);
        for (size_t h = 0; h < t->n_heads; h++) p->heads[h] = head_error(t, &s, h);
        for (size_t c = 0; c < t->n_columns; c++) p->columns[c] = column_error(t, &s, c);
    } else {
        diff_profile_free(p);
        error_set(err, "out of memory for tensor %s", t->name);
    }
    free(s.memory);
    return ok;
}

void diff_profile_free(struct diff_profile *p) {
    free(p->rows);
    free(p->heads);
    free(p->columns);
    *p = (struct diff_profile){0};
}

// ---- Judging -------------------------------------------------------------------------------------------------------

// The largest growths measured between T, H and the engine's paths, on tandem-tiny, its loud variant and random models:
// silu_mul 4.6, attention 3.6, head_rmsnorm 3.3, matmul 2.8, rmsnorm 2.0, rope 1.7, add 1.1. A few times that, since
// larger models amplify more; a wrong op is off by a large part of its values, hundreds of times bf16's roundoff.
double diff_growth(const char *op) {
    static const struct {
        const char *op;
        double growth;
    } known[] = {{"rmsnorm", 5},    {"head_rmsnorm", 8}, {"matmul", 8}, {"rope", 4},
                 {"attention", 16}, {"silu_mul", 12},    {"add", 3}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strcmp(op, known[i].op) == 0) return known[i].growth;
    return 2; // embed: rounding of its own
}

// What rounding explains without any growth. RoPE's angle is position * rate, in f32 in most engines: off by up to its
// own roundoff times the position, in absolute terms.
static double base_of(const struct diff *d, const struct diff_tensor *t) {
    double base = larger(d->roundoff, t->input_error), angle = (double)(d->positions[d->n_rows - 1] + 1) * 0x1p-24;
    return strcmp(t->op, "rope") == 0 && d->roundoff >= 0x1p-24 ? larger(base, angle) : base;
}

// Where inputs are already far apart, growth alone would allow any output: half of the values' size, or thrice the
// inputs' error, is then the limit.
static double limit_of(const struct diff *d, const struct diff_tensor *t) {
    double base = base_of(d, t);
    return fmin(diff_growth(t->op) * base, fmax(0.5, 3 * base));
}

// Unit roundoffs. A trace that does not say how it was computed counts as bf16, like most.
static const struct {
    const char *name;
    double roundoff;
} precisions[] = {{"f64", 0x1p-53}, {"f32", 0x1p-24}, {"f16", 0x1p-11}, {"bf16", 0x1p-8}, {"int8", 0x1p-7}};

static double roundoff_of(const struct diff_side *s, const char **name) {
    for (size_t i = 0; i < sizeof precisions / sizeof precisions[0]; i++) {
        if (strcmp(s->precision, precisions[i].name) != 0) continue;
        *name = precisions[i].name;
        return precisions[i].roundoff;
    }
    *name = "bf16";
    return 0x1p-8;
}

static bool engine_path(const struct diff_side *s) {
    return strcmp(s->producer, "tandem") == 0 && (strcmp(s->path, "fused") == 0 || strcmp(s->path, "standard") == 0);
}

// Instruction sets of the CPU return the same bits: "cpu/avx2" and "cpu/portable" are one backend.
static bool same_backend(const struct diff_side *a, const struct diff_side *b) {
    size_t n = strcspn(a->device, "/");
    return n > 0 && n == strcspn(b->device, "/") && strncmp(a->device, b->device, n) == 0;
}

static void choose_rule(struct diff *d) {
    const struct diff_side *a = &d->a, *b = &d->b;
    d->must_be_equal = engine_path(a) && engine_path(b) && same_backend(a, b) && strcmp(a->kv_type, b->kv_type) == 0 &&
                       strcmp(a->version, b->version) == 0 && strcmp(a->model, b->model) == 0;
    const char *name_a, *name_b;
    double u_a = roundoff_of(a, &name_a), u_b = roundoff_of(b, &name_b);
    d->roundoff = d->must_be_equal ? 0 : u_a > u_b ? u_a : u_b;
    d->precision = u_a > u_b ? name_a : name_b;
}

// The verdict, the first tensor to look at, and counts.
static void conclude(struct diff *d) {
    d->first = d->n;
    for (size_t i = d->n; i-- > 0;) {
        struct diff_tensor *t = &d->tensors[i];
        if (d->must_be_equal) t->limit = 0;
        t->departs = d->must_be_equal ? t->n_different > 0 : t->error > t->limit;
        if (t->n_different && d->verdict != DIFF_DEPARTS) d->verdict = DIFF_ROUNDING;
        if (t->departs) d->verdict = DIFF_DEPARTS;
    }
    for (size_t i = d->n; i-- > 0;) {
        const struct diff_tensor *t = &d->tensors[i];
        d->n_equal += t->n_different == 0;
        d->n_departs += t->departs;
        if (d->verdict == DIFF_DEPARTS ? t->departs : t->n_different > 0) d->first = i;
    }
    for (size_t i = d->first; d->verdict == DIFF_DEPARTS && i < d->n; i++)
        d->n_later += d->tensors[i].n_different > 0 && !d->tensors[i].departs;
    d->n_rounding = d->n - d->n_equal - d->n_departs - d->n_later;
}

// Errors of every part in the order of computation; a part that was not traced has its inputs' error.
static bool judge(struct diff *d, struct error *err) {
    int n_layers = 0;
    for (size_t i = 0; i < d->n; i++)
        if (d->tensors[i].layer >= n_layers) n_layers = d->tensors[i].layer + 1;
    double(*known)[N_PARTS] = size_alloc_zero((size_t)n_layers + 2, sizeof *known); // [0]: before the layers
    if (!known) return error_set(err, "out of memory");
    size_t at = 0;
    for (int layer = -1; layer <= n_layers; layer++) {
        for (int part = 0; part < N_PARTS; part++) {
            if (parts[part].in_layer ? layer < 0 || layer == n_layers : (part == PART_EMBED) != (layer < 0)) continue;
            double *error = &known[layer + 1][part], input = 0;
            for (int i = 0; i < MAX_INPUTS && parts[part].inputs[i] != PART_NONE; i++) {
                enum part from = parts[part].inputs[i];
                double e = from != PART_STREAM ? known[layer + 1][from]
                           : layer <= 0        ? known[0][PART_EMBED]
                                               : known[layer][PART_RESID];
                input = larger(input, e);
            }
            *error = input;
            struct diff_tensor *t = &d->tensors[at];
            int t_layer;
            if (at == d->n || part_of(t->name, &t_layer) != (enum part)part ||
                t_layer != (parts[part].in_layer ? layer : -1))
                continue;
            t->input_error = input;
            t->limit = limit_of(d, t);
            *error = t->error;
            at++;
        }
    }
    free(known);
    conclude(d);
    return true;
}

struct diff *diff_open(const char *file_a, const char *file_b, struct error *err) {
    struct diff *d = size_alloc_zero(1, sizeof *d);
    if (!d) {
        error_set(err, "out of memory");
        return NULL;
    }
    bool ok = open_side(&d->a, file_a, err) && open_side(&d->b, file_b, err) && check_ids(d, err) &&
              match_rows(d, err) && match_tensors(d, err);
    for (size_t i = 0; ok && i < d->n; i++) ok = measure(d, &d->tensors[i], err);
    if (ok) choose_rule(d);
    if (ok && judge(d, err)) return d;
    diff_free(d);
    return NULL;
}

void diff_free(struct diff *d) {
    if (!d) return;
    tensor_set_free(&d->a.set);
    tensor_set_free(&d->b.set);
    free(d->a.positions);
    free(d->b.positions);
    free(d->rows_a);
    free(d->rows_b);
    free(d->positions);
    free(d->tensors);
    free(d);
}

// ---- Where ---------------------------------------------------------------------------------------------------------

// Above this a row, head or column counts as wrong: a little more than what the inputs explain, or, where nothing is
// above that, half the largest error.
static double threshold(const struct diff *d, const struct diff_tensor *t, const double *errors, size_t n) {
    double largest = 0, base = 2.5 * base_of(d, t);
    for (size_t i = 0; i < n; i++) largest = larger(largest, errors[i]);
    return t->departs && largest > base ? base : isfinite(largest) ? largest / 2 : 1e300;
}

struct diff_place diff_first_wrong(const struct diff *d, const struct diff_tensor *t, const struct diff_profile *p) {
    double limit = threshold(d, t, p->rows, t->n_rows), worst = -1;
    if (d->must_be_equal || t->n_different == 0) return t->first;
    size_t row = 0;
    while (row + 1 < t->n_rows && !(p->rows[row] > limit)) row++;
    double *a = size_alloc(t->n_columns, sizeof *a), *b = size_alloc(t->n_columns, sizeof *b);
    struct diff_place place = t->worst;
    if (a && b) {
        load_row(t->a, d->rows_a[row], a);
        load_row(t->b, d->rows_b[row], b);
        for (size_t c = 0; c < t->n_columns; c++) {
            double e = same(a[c], b[c]) ? 0 : fabs(b[c] - a[c]);
            if (isnan(e)) e = INFINITY;
            if (e <= worst) continue;
            worst = e;
            place = (struct diff_place){.position = d->positions[row], .column = c, .a = a[c], .b = b[c]};
        }
    }
    free(a);
    free(b);
    return place;
}

// "channels 7, 71" or "positions 32 to 63"; nothing when all are wrong, or most.
static bool list_wrong(struct buffer *out, const char *what, const double *errors, size_t n, double limit,
                       const int32_t *names) {
    size_t n_wrong = 0, first = 0, last = 0;
    for (size_t i = 0; i < n; i++) {
        if (!(errors[i] > limit)) continue;
        if (n_wrong++ == 0) first = i;
        last = i;
    }
    const char *before = out->len ? "; " : "";
    int from = names ? names[first] : (int)first, to = names ? names[last] : (int)last;
    if (n_wrong > 1 && first > 0 && n_wrong == n - first)
        return buffer_printf(out, "%severy %s from %d on", before, what, from);
    if (n_wrong == 0 || 4 * n_wrong > 3 * n) return true;
    if (n_wrong == 1) return buffer_printf(out, "%s%s %d alone", before, what, from);
    if (n_wrong == last - first + 1) return buffer_printf(out, "%s%ss %d to %d", before, what, from, to);
    if (n_wrong > 8) return buffer_printf(out, "%s%zu of %zu %ss, the first %d", before, n_wrong, n, what, from);
    bool ok = buffer_printf(out, "%s%ss", before, what);
    for (size_t i = first, k = 0; ok && i <= last; i++)
        if (errors[i] > limit) ok = buffer_printf(out, "%s %d", k++ ? "," : "", names ? names[i] : (int)i);
    return ok;
}

bool diff_extent(const struct diff *d, const struct diff_tensor *t, const struct diff_profile *p, struct buffer *out) {
    bool ok = list_wrong(out, "position", p->rows, t->n_rows, threshold(d, t, p->rows, t->n_rows), d->positions) &&
              list_wrong(out, "head", p->heads, t->n_heads, threshold(d, t, p->heads, t->n_heads), NULL) &&
              list_wrong(out, t->n_heads ? "column" : "channel", p->columns, t->n_columns,
                         threshold(d, t, p->columns, t->n_columns), NULL);
    return ok && (out->len || buffer_append_text(out, "everywhere"));
}
