// gguf.c: the reader of GGUF files; see gguf.h. It owns the file's structure; what the metadata means is the model's
// and the tokenizer's.
//
// The file is walked twice: first only checked, without any allocation, so that a hostile file costs no memory, then
// again to fill the tables, whose sizes the first walk has proved to be in proportion to the file.
#include "format/gguf.h"

#include "base/size.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANK = 4, DEFAULT_ALIGNMENT = 32, MAX_NAME_BYTES = 65535, MIN_KV_BYTES = 14, MIN_TENSOR_BYTES = 33 };

struct cursor {
    const unsigned char *data;
    size_t size, at;
    struct error *err;
};

// How a file's type numbers map to ours (source: the table in the GGUF specification); the rest are refused by name.
static const struct {
    const char *name;
    int type; // enum dtype, or -1: not supported
} tensor_types[] = {
    [0] = {"F32", DTYPE_F32},    [1] = {"F16", DTYPE_F16},    [2] = {"Q4_0", DTYPE_Q4_0},  [3] = {"Q4_1", DTYPE_Q4_1},
    [4] = {"Q4_2", -1},          [5] = {"Q4_3", -1},          [6] = {"Q5_0", DTYPE_Q5_0},  [7] = {"Q5_1", DTYPE_Q5_1},
    [8] = {"Q8_0", DTYPE_Q8_0},  [9] = {"Q8_1", -1},          [10] = {"Q2_K", DTYPE_Q2_K}, [11] = {"Q3_K", DTYPE_Q3_K},
    [12] = {"Q4_K", DTYPE_Q4_K}, [13] = {"Q5_K", DTYPE_Q5_K}, [14] = {"Q6_K", DTYPE_Q6_K}, [15] = {"Q8_K", -1},
    [16] = {"IQ2_XXS", -1},      [17] = {"IQ2_XS", -1},       [18] = {"IQ3_XXS", -1},      [19] = {"IQ1_S", -1},
    [20] = {"IQ4_NL", -1},       [21] = {"IQ3_S", -1},        [22] = {"IQ2_S", -1},        [23] = {"IQ4_XS", -1},
    [24] = {"I8", DTYPE_I8},     [25] = {"I16", DTYPE_I16},   [26] = {"I32", DTYPE_I32},   [27] = {"I64", DTYPE_I64},
    [28] = {"F64", DTYPE_F64},   [29] = {"IQ1_M", -1},        [30] = {"BF16", DTYPE_BF16}, [34] = {"TQ1_0", -1},
    [35] = {"TQ2_0", -1},        [39] = {"MXFP4", -1},        [40] = {"NVFP4", -1},        [41] = {"Q1_0", -1},
};
enum { N_TENSOR_TYPES = sizeof tensor_types / sizeof *tensor_types };

static const char *const value_names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                          "bool", "string", "array", "u64", "i64", "f64"};
static const size_t value_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8}; // 0: not of fixed size
enum { N_VALUE_TYPES = sizeof value_bytes / sizeof *value_bytes };

static uint64_t load(const unsigned char *p, size_t n) {
    uint64_t u = 0;
    for (size_t i = n; i-- > 0;) u = u << 8 | p[i];
    return u;
}

static bool take(struct cursor *c, size_t n, const unsigned char **out, const char *what) {
    if (!size_range_fits(c->at, n, c->size)) {
        error_set(c->err, "truncated: %s needs %zu bytes at byte %zu, the file has %zu", what, n, c->at, c->size);
        return false;
    }
    *out = c->data + c->at;
    c->at += n;
    return true;
}

static bool take_u32(struct cursor *c, uint32_t *out, const char *what) {
    const unsigned char *p;
    if (!take(c, 4, &p, what)) return false;
    *out = (uint32_t)load(p, 4);
    return true;
}

static bool take_u64(struct cursor *c, uint64_t *out, const char *what) {
    const unsigned char *p;
    if (!take(c, 8, &p, what)) return false;
    *out = load(p, 8);
    return true;
}

static bool take_string(struct cursor *c, struct gguf_string *out, const char *what) {
    uint64_t length = 0;
    const unsigned char *p;
    size_t len;
    if (!take_u64(c, &length, what)) return false;
    if (!size_from_u64(length, &len) || len > c->size - c->at)
        return error_set(c->err, "truncated: %s is said to have %" PRIu64 " bytes at byte %zu, the file has %zu", what,
                         length, c->at, c->size);
    if (!take(c, len, &p, what)) return false;
    *out = (struct gguf_string){.data = (const char *)p, .len = len};
    return true;
}

// A name that will be used as a C string and shown in messages: printable ASCII and bytes of UTF-8, no control bytes.
static bool take_name(struct cursor *c, struct gguf_string *out, const char *what) {
    size_t at = c->at;
    if (!take_string(c, out, what)) return false;
    if (out->len == 0 || out->len > MAX_NAME_BYTES)
        return error_set(c->err, "%s at byte %zu: expected 1 to %d bytes, found %zu", what, at, MAX_NAME_BYTES,
                         out->len);
    for (size_t i = 0; i < out->len; i++) {
        unsigned char byte = (unsigned char)out->data[i];
        if (byte < 0x20 || byte >= 0x7F)
            return error_set(c->err, "%s at byte %zu: expected printable ASCII, found byte 0x%02x", what, at, byte);
    }
    return true;
}

static bool take_scalar(struct cursor *c, struct gguf_value *v, const char *key) {
    const unsigned char *p;
    size_t n = value_bytes[v->type];
    if (!take(c, n, &p, key)) return false;
    uint64_t u = load(p, n);
    switch (v->type) {
    case GGUF_I8: v->as.i = (int8_t)u; break;
    case GGUF_I16: v->as.i = (int16_t)u; break;
    case GGUF_I32: v->as.i = (int32_t)u; break;
    case GGUF_I64: v->as.i = (int64_t)u; break;
    case GGUF_F32: {
        float f;
        uint32_t bits = (uint32_t)u;
        memcpy(&f, &bits, sizeof f);
        v->as.f = (double)f;
        break;
    }
    case GGUF_F64: memcpy(&v->as.f, &u, sizeof v->as.f); break;
    case GGUF_BOOL:
        if (u > 1) return error_set(c->err, "%s: expected a bool of 0 or 1, found %d", key, (int)u);
        v->as.u = u;
        break;
    default: v->as.u = u; break;
    }
    return true;
}

// `arena` NULL: the value is only checked.
static bool take_array(struct cursor *c, struct gguf_value *v, const char *key, struct arena *arena) {
    uint32_t type;
    uint64_t count = 0;
    if (!take_u32(c, &type, key) || !take_u64(c, &count, key)) return false;
    if (type >= N_VALUE_TYPES) return error_set(c->err, "%s: unknown type %" PRIu32 " of array elements", key, type);
    if (type == GGUF_ARRAY) return error_set(c->err, "%s: arrays of arrays are not supported", key);
    size_t item = type == GGUF_STRING ? 8 : value_bytes[type]; // the least that one element takes
    if (count > (c->size - c->at) / item)
        return error_set(c->err, "truncated: %s is said to have %" PRIu64 " elements, more than the file can hold", key,
                         count);
    size_t n = (size_t)count;
    v->as.array.type = (enum gguf_type)type;
    v->as.array.n = n;
    v->as.array.strings = NULL;
    if (type != GGUF_STRING) {
        if (!take(c, n * item, &v->as.array.raw, key)) return false; // checked just above
        for (size_t i = 0; type == GGUF_BOOL && i < n; i++) {
            if (v->as.array.raw[i] > 1)
                return error_set(c->err, "%s: expected bools of 0 or 1, found %d", key, v->as.array.raw[i]);
        }
        return true;
    }
    v->as.array.raw = c->data + c->at;
    if (arena) {
        v->as.array.strings = arena_alloc(arena, n, sizeof *v->as.array.strings);
        if (!v->as.array.strings) return error_set(c->err, "out of memory for %zu strings of %s", n, key);
    }
    for (size_t i = 0; i < n; i++) {
        struct gguf_string s;
        if (!take_string(c, &s, key)) return false;
        if (arena) v->as.array.strings[i] = s;
    }
    return true;
}

static bool take_value(struct cursor *c, struct gguf_value *v, struct arena *arena) {
    struct gguf_string key = {0};
    uint32_t type;
    char shown[128];
    if (!take_name(c, &key, "a metadata key")) return false;
    snprintf(shown, sizeof shown, "%.*s", (int)(key.len < 100 ? key.len : 100), key.data);
    if (!take_u32(c, &type, shown)) return false;
    if (type >= N_VALUE_TYPES) return error_set(c->err, "%s: unknown value type %" PRIu32, shown, type);
    v->key = NULL;
    v->type = (enum gguf_type)type;
    if (arena && !(v->key = arena_copy_text(arena, key.data, key.len))) return error_set(c->err, "out of memory");
    if (type == GGUF_STRING) return take_string(c, &v->as.s, shown);
    if (type == GGUF_ARRAY) return take_array(c, v, shown, arena);
    return take_scalar(c, v, shown);
}

static bool refuse_type(struct cursor *c, const char *tensor, uint32_t type) {
    char known[256] = "";
    size_t used = 0;
    for (size_t i = 0; i < N_TENSOR_TYPES; i++) {
        if (tensor_types[i].name && tensor_types[i].type >= 0 && used < sizeof known)
            used += (size_t)snprintf(known + used, sizeof known - used, " %s", tensor_types[i].name);
    }
    if (type < N_TENSOR_TYPES && tensor_types[type].name)
        return error_set(c->err, "tensor %.200s: type %s is not supported (supported:%s)", tensor,
                         tensor_types[type].name, known);
    return error_set(c->err, "tensor %.200s: unknown type number %" PRIu32 " (supported:%s)", tensor, type, known);
}

// One entry of the tensor list. t->data is left to place_tensors; its offset goes to *offset. t->name is valid during
// the first walk only up to the next call: it stands in `name`.
static bool take_tensor(struct cursor *c, struct tensor *t, uint64_t *offset, struct arena *arena, char *name,
                        size_t name_size) {
    struct gguf_string text = {0};
    uint32_t rank = 0, type = 0;
    if (!take_name(c, &text, "a tensor's name")) return false;
    snprintf(name, name_size, "%.*s", (int)(text.len < name_size ? text.len : name_size - 1), text.data);
    *t = (struct tensor){.name = name};
    if (arena && !(t->name = arena_copy_text(arena, text.data, text.len))) return error_set(c->err, "out of memory");
    if (!take_u32(c, &rank, name)) return false;
    if (rank < 1 || rank > MAX_RANK)
        return error_set(c->err, "tensor %s: expected 1 to %d dimensions, found %" PRIu32, name, MAX_RANK, rank);
    t->rank = (int)rank;
    for (uint32_t i = 0; i < rank; i++) {
        uint64_t dim = 0;
        size_t *place = &t->shape[rank - 1 - i];
        if (!take_u64(c, &dim, name)) return false;
        if (dim == 0) return error_set(c->err, "tensor %s: dimension %" PRIu32 " is zero", name, i);
        if (!size_from_u64(dim, place))
            return error_set(c->err, "tensor %s: dimension %" PRIu64 " is too large", name, dim);
    }
    if (!take_u32(c, &type, name) || !take_u64(c, offset, name)) return false;
    if (type >= N_TENSOR_TYPES || !tensor_types[type].name || tensor_types[type].type < 0)
        return refuse_type(c, name, type);
    t->type = (enum dtype)tensor_types[type].type;
    return tensor_measure(t, c->err);
}

static bool take_head(struct cursor *c, uint32_t *version, size_t *n_tensors, size_t *n_values) {
    const unsigned char *magic;
    uint64_t tensors = 0, values = 0;
    if (!take(c, 4, &magic, "the magic number")) return false;
    if (memcmp(magic, "GGUF", 4) != 0) return error_set(c->err, "no GGUF file: it does not begin with \"GGUF\"");
    if (!take_u32(c, version, "the version")) return false;
    if (*version == 1) return error_set(c->err, "GGUF version 1 is not supported (supported: 2 and 3); convert it");
    if (*version != 0 && (*version & 0xFFFF) == 0)
        return error_set(c->err, "a big-endian GGUF file is not supported; convert it to little-endian");
    if (*version < 2 || *version > 3)
        return error_set(c->err, "GGUF version %" PRIu32 " is not supported (supported: 2 and 3)", *version);
    if (!take_u64(c, &tensors, "the number of tensors") || !take_u64(c, &values, "the number of metadata values"))
        return false;
    size_t left = c->size - c->at;
    if (tensors > left / MIN_TENSOR_BYTES)
        return error_set(c->err, "truncated: %" PRIu64 " tensors are announced, more than the file can hold", tensors);
    if (values > left / MIN_KV_BYTES)
        return error_set(c->err, "truncated: %" PRIu64 " metadata values are announced, more than the file can hold",
                         values);
    *n_tensors = (size_t)tensors;
    *n_values = (size_t)values;
    return true;
}

// The first walk: everything up to the tensor data is well formed.
static bool check(struct cursor c, size_t n_values, size_t n_tensors) {
    struct gguf_value value;
    struct tensor tensor;
    uint64_t offset;
    char name[256];
    for (size_t i = 0; i < n_values; i++) {
        if (!take_value(&c, &value, NULL)) return false;
    }
    for (size_t i = 0; i < n_tensors; i++) {
        if (!take_tensor(&c, &tensor, &offset, NULL, name, sizeof name)) return false;
    }
    return true;
}

static int compare_keys(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool check_keys(const struct gguf *g, struct error *err) {
    const char **keys = size_alloc(g->n_values, sizeof *keys);
    if (!keys) return error_set(err, "out of memory");
    for (size_t i = 0; i < g->n_values; i++) keys[i] = g->values[i].key;
    qsort(keys, g->n_values, sizeof *keys, compare_keys);
    bool ok = true;
    for (size_t i = 1; ok && i < g->n_values; i++) {
        if (strcmp(keys[i], keys[i - 1]) == 0)
            ok = error_set(err, "the metadata key %.200s stands there twice", keys[i]);
    }
    free(keys);
    return ok;
}

static bool find_alignment(const struct gguf *g, size_t *alignment, struct error *err) {
    uint32_t n = DEFAULT_ALIGNMENT;
    if (gguf_find(g, "general.alignment") && !gguf_get_u32(g, "general.alignment", &n, err)) return false;
    if (n == 0 || (n & (n - 1)) != 0)
        return error_set(err, "general.alignment: expected a power of two, found %" PRIu32, n);
    *alignment = n;
    return true;
}

// A model split over several files stands in none of them; to run one part would miss tensors for no visible reason.
static bool check_whole(const struct gguf *g, struct error *err) {
    uint32_t n_parts = 1;
    if (gguf_find(g, "split.count") && !gguf_get_u32(g, "split.count", &n_parts, err)) return false;
    return n_parts <= 1 ||
           error_set(err, "one part of a model split into %" PRIu32 " files: merge them into one file first", n_parts);
}

static int compare_places(const void *a, const void *b) {
    uintptr_t x = (uintptr_t)((const struct tensor *)a)->data, y = (uintptr_t)((const struct tensor *)b)->data;
    return (x > y) - (x < y);
}

// Turns the tensors' offsets into addresses; each must lie in the file, aligned, and overlap no other. `header_end` is
// where the tensor list ends.
static bool place_tensors(struct gguf *g, const uint64_t *offsets, const struct cursor *c) {
    size_t alignment = DEFAULT_ALIGNMENT, start;
    if (!find_alignment(g, &alignment, c->err)) return false;
    if (g->tensors.n == 0) return true;
    if (!size_align_up(c->at, alignment, &start) || start > c->size)
        return error_set(c->err, "truncated: the file ends at byte %zu, before the tensor data", c->size);
    struct tensor *tensors = g->tensors.tensors;
    for (size_t i = 0; i < g->tensors.n; i++) {
        struct tensor *t = &tensors[i];
        size_t offset;
        if (!size_from_u64(offsets[i], &offset) || !size_range_fits(offset, t->n_bytes, c->size - start))
            return error_set(c->err,
                             "truncated: tensor %.200s takes %zu bytes at byte %" PRIu64 " of the data, which has %zu",
                             t->name, t->n_bytes, offsets[i], c->size - start);
        if (offset % alignment != 0)
            return error_set(c->err, "tensor %.200s: offset %zu is no multiple of the alignment %zu", t->name, offset,
                             alignment);
        t->data = c->data + start + offset;
    }
    qsort(tensors, g->tensors.n, sizeof *tensors, compare_places);
    for (size_t i = 1; i < g->tensors.n; i++) {
        const struct tensor *t = &tensors[i], *previous = t - 1;
        if ((const unsigned char *)t->data - (const unsigned char *)previous->data < (ptrdiff_t)previous->n_bytes)
            return error_set(c->err, "the tensors %.200s and %.200s overlap", previous->name, t->name);
    }
    return true;
}

// The second walk, and the checks that need the whole.
static bool fill(struct cursor c, struct gguf *g, size_t n_values, size_t n_tensors, const char *file) {
    struct arena *arena = &g->tensors.arena;
    uint64_t *offsets = size_alloc(n_tensors, sizeof *offsets);
    char name[256];
    bool ok = false;
    g->values = arena_alloc(arena, n_values, sizeof *g->values);
    g->tensors.tensors = size_alloc(n_tensors, sizeof *g->tensors.tensors);
    if (!offsets || !g->values || !g->tensors.tensors) {
        error_set(c.err, "out of memory for %zu metadata values and %zu tensors", n_values, n_tensors);
        goto done;
    }
    for (; g->n_values < n_values; g->n_values++) {
        if (!take_value(&c, &g->values[g->n_values], arena)) goto done;
    }
    for (; g->tensors.n < n_tensors; g->tensors.n++) {
        struct tensor *t = &g->tensors.tensors[g->tensors.n];
        if (!take_tensor(&c, t, &offsets[g->tensors.n], arena, name, sizeof name)) goto done;
        t->file = file;
    }
    ok = check_keys(g, c.err) && check_whole(g, c.err) && place_tensors(g, offsets, &c) &&
         tensor_set_sort(&g->tensors, c.err);
done:
    free(offsets);
    return ok;
}

// Fills `g`, which may hold a mapping already; the caller closes it on failure.
static bool parse(const void *data, size_t size, const char *name, struct gguf *g, struct error *err) {
    struct cursor c = {.data = data, .size = size, .err = err};
    size_t n_tensors = 0, n_values = 0;
    const char *file = arena_copy_text(&g->tensors.arena, name, strlen(name));
    if (!file) return error_set(err, "out of memory");
    return (take_head(&c, &g->version, &n_tensors, &n_values) && check(c, n_values, n_tensors) &&
            fill(c, g, n_values, n_tensors, file)) ||
           error_prefix(err, "%s: ", name);
}

bool gguf_parse(const void *data, size_t size, const char *name, struct gguf *g, struct error *err) {
    *g = (struct gguf){0};
    if (parse(data, size, name, g, err)) return true;
    gguf_close(g);
    return false;
}

bool gguf_open(const char *path, struct gguf *g, struct error *err) {
    *g = (struct gguf){0};
    g->tensors.maps = arena_alloc_zero(&g->tensors.arena, 1, sizeof *g->tensors.maps);
    if (!g->tensors.maps) return error_set(err, "out of memory");
    if (file_map_open(&g->tensors.maps[0], path, err)) {
        g->tensors.n_maps = 1;
        if (parse(g->tensors.maps[0].data, g->tensors.maps[0].size, path, g, err)) return true;
    }
    gguf_close(g);
    return false;
}

void gguf_close(struct gguf *g) {
    tensor_set_free(&g->tensors);
    *g = (struct gguf){0};
}

const struct gguf_value *gguf_find(const struct gguf *g, const char *key) {
    for (size_t i = 0; i < g->n_values; i++) {
        if (strcmp(g->values[i].key, key) == 0) return &g->values[i];
    }
    return NULL;
}

static const struct gguf_value *find_required(const struct gguf *g, const char *key, struct error *err) {
    const struct gguf_value *v = gguf_find(g, key);
    if (!v) error_set(err, "the metadata key %s is missing", key);
    return v;
}

static bool refuse_value(const struct gguf_value *v, const char *expected, struct error *err) {
    return error_set(err, "%s: expected %s, found %s", v->key, expected, value_names[v->type]);
}

bool gguf_get_u32(const struct gguf *g, const char *key, uint32_t *out, struct error *err) {
    const struct gguf_value *v = find_required(g, key, err);
    if (!v) return false;
    bool fits;
    switch (v->type) {
    case GGUF_U8:
    case GGUF_U16:
    case GGUF_U32:
    case GGUF_U64: fits = v->as.u <= UINT32_MAX; break;
    case GGUF_I8:
    case GGUF_I16:
    case GGUF_I32:
    case GGUF_I64: fits = v->as.i >= 0 && v->as.i <= UINT32_MAX; break;
    default: return refuse_value(v, "an integer", err);
    }
    if (!fits) return error_set(err, "%s: the value does not fit in 0 to %" PRIu32, key, UINT32_MAX);
    *out = (uint32_t)v->as.u; // of a signed value that is not negative the bits are the same
    return true;
}

bool gguf_get_f64(const struct gguf *g, const char *key, double *out, struct error *err) {
    const struct gguf_value *v = find_required(g, key, err);
    if (!v) return false;
    if (v->type != GGUF_F32 && v->type != GGUF_F64) return refuse_value(v, "f32 or f64", err);
    *out = v->as.f;
    return true;
}

bool gguf_get_bool(const struct gguf *g, const char *key, bool *out, struct error *err) {
    const struct gguf_value *v = find_required(g, key, err);
    if (!v) return false;
    if (v->type != GGUF_BOOL) return refuse_value(v, "bool", err);
    *out = v->as.u != 0;
    return true;
}

bool gguf_get_string(const struct gguf *g, const char *key, struct gguf_string *out, struct error *err) {
    const struct gguf_value *v = find_required(g, key, err);
    if (!v) return false;
    if (v->type != GGUF_STRING) return refuse_value(v, "string", err);
    *out = v->as.s;
    return true;
}

// Element i as a scalar; the caller checked that it is a number and that i < n.
static struct gguf_value element(const struct gguf_value *array, size_t i) {
    struct gguf_value v = {.key = array->key, .type = array->as.array.type};
    struct cursor c = {.data = array->as.array.raw, .size = array->as.array.n * value_bytes[v.type]};
    c.at = i * value_bytes[v.type];
    if (!take_scalar(&c, &v, "")) v.as.u = 0;
    return v;
}

int64_t gguf_array_i64(const struct gguf_value *array, size_t i) {
    struct gguf_value v = element(array, i);
    if (v.type != GGUF_F32 && v.type != GGUF_F64) return v.as.i;
    return v.as.f > -0x1p63 && v.as.f < 0x1p63 ? (int64_t)v.as.f : INT64_MIN; // NaN and what is out of range too
}

double gguf_array_f64(const struct gguf_value *array, size_t i) {
    struct gguf_value v = element(array, i);
    if (v.type == GGUF_F32 || v.type == GGUF_F64) return v.as.f;
    bool is_signed = v.type == GGUF_I8 || v.type == GGUF_I16 || v.type == GGUF_I32 || v.type == GGUF_I64;
    return is_signed ? (double)v.as.i : (double)v.as.u;
}
