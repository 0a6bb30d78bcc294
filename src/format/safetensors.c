// safetensors.c: see safetensors.h. It owns the reading of one file and of a folder of shards, and the writer; tensors
// point into the mapped files, nothing is copied.
#include "format/safetensors.h"

#include "base/buffer.h"
#include "base/size.h"
#include "format/json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LENGTH_BYTES = 8, MAX_HEADER = 100000000, MAX_INDEX = JSON_MAX_BYTES }; // the format's own limit: 100 MB
#define META_KEY "__metadata__"

// Tensors collected from one file or many, before they become a set.
struct list {
    struct tensor *items; // malloc'ed
    size_t n, cap;
};

static struct tensor *list_add(struct list *list) {
    if (list->n == list->cap) {
        size_t cap;
        if (!size_mul_add(list->cap, 2, 64, &cap)) return NULL;
        struct tensor *items = size_realloc(list->items, cap, sizeof *items);
        if (!items) return NULL;
        list->items = items;
        list->cap = cap;
    }
    return &list->items[list->n++];
}

static uint64_t read_u64(const unsigned char *p) {
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | p[i];
    return n;
}

// The types that a safetensors file may hold, for messages: the plain ones, which are spelt as in the format.
static bool read_type(const char *name, enum dtype *type) {
    return dtype_from_name(name, type) && !dtype_info(*type)->is_quantised &&
           strcmp(name, dtype_info(*type)->name) == 0;
}

static bool refuse_type(const char *tensor, const char *found, struct error *err) {
    char known[256] = "";
    size_t used = 0;
    for (int i = 0; i < DTYPE_COUNT; i++) {
        const struct dtype_info *info = dtype_info((enum dtype)i);
        if (!info->is_quantised && used < sizeof known)
            used += (size_t)snprintf(known + used, sizeof known - used, " %s", info->name);
    }
    return error_set(err, "tensor %s: the element type %.40s is not supported (supported:%s)", tensor, found, known);
}

// A size from the header: a JSON integer that is not negative.
static bool read_size(const json_t *value, size_t *out) {
    return json_is_integer(value) && json_integer_value(value) >= 0 &&
           size_from_u64((uint64_t)json_integer_value(value), out);
}

static bool read_shape(const json_t *shape, struct tensor *t, struct error *err) {
    if (!json_is_array(shape)) return error_set(err, "tensor %s: \"shape\" is missing or no list", t->name);
    size_t rank = json_array_size(shape);
    if (rank > TENSOR_MAX_RANK)
        return error_set(err, "tensor %s: %zu dimensions, at most %d are supported", t->name, rank, TENSOR_MAX_RANK);
    t->rank = (int)rank;
    for (size_t i = 0; i < rank; i++) {
        if (!read_size(json_array_get(shape, i), &t->shape[i]))
            return error_set(err, "tensor %s: dimension %zu of \"shape\" is no integer of 0 or more", t->name, i);
    }
    return true;
}

// One entry of the header. `data` is the file's data part, `n_data` bytes.
static bool read_tensor(const json_t *entry, const unsigned char *data, size_t n_data, struct tensor *t,
                        struct error *err) {
    if (!json_is_object(entry)) return error_set(err, "tensor %s: expected an object in the header", t->name);
    const json_t *type = json_object_get(entry, "dtype");
    if (!json_is_string(type)) return error_set(err, "tensor %s: \"dtype\" is missing or no string", t->name);
    if (!read_type(json_string_value(type), &t->type)) return refuse_type(t->name, json_string_value(type), err);
    if (!read_shape(json_object_get(entry, "shape"), t, err) || !tensor_measure(t, err)) return false;
    const json_t *offsets = json_object_get(entry, "data_offsets");
    size_t begin, end;
    if (!json_is_array(offsets) || json_array_size(offsets) != 2 || !read_size(json_array_get(offsets, 0), &begin) ||
        !read_size(json_array_get(offsets, 1), &end))
        return error_set(err, "tensor %s: \"data_offsets\" is no list of two integers of 0 or more", t->name);
    if (begin > end) return error_set(err, "tensor %s: data_offsets [%zu, %zu] are reversed", t->name, begin, end);
    if (end > n_data)
        return error_set(err,
                         "tensor %s: data_offsets [%zu, %zu] pass the end of the data (%zu bytes): is the file "
                         "truncated?",
                         t->name, begin, end, n_data);
    if (end - begin != t->n_bytes) {
        char shape[256];
        return error_set(err, "tensor %s: shape %s of %s takes %zu bytes, but data_offsets [%zu, %zu] give it %zu",
                         t->name, tensor_shape_text(t, shape, sizeof shape), dtype_info(t->type)->name, t->n_bytes,
                         begin, end, end - begin);
    }
    t->data = data + begin;
    return true;
}

static bool check_metadata(const json_t *meta, struct error *err) {
    if (!json_is_object(meta)) return error_set(err, META_KEY " is no object");
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)meta, key, value) {
        if (!json_is_string(value)) return error_set(err, META_KEY ": the value of \"%.80s\" is no string", key);
    }
    return true;
}

// By place in the file; of two that begin together the empty one comes first.
static int compare_places(const void *a, const void *b) {
    const struct tensor *x = *(const struct tensor *const *)a, *y = *(const struct tensor *const *)b;
    uintptr_t px = (uintptr_t)x->data, py = (uintptr_t)y->data;
    if (px != py) return px < py ? -1 : 1;
    return (x->n_bytes > y->n_bytes) - (x->n_bytes < y->n_bytes);
}

// Do the tensors tile the data part, without gap, overlap or rest?
static bool check_tiling(const struct tensor *tensors, size_t n, const unsigned char *data, size_t n_data,
                         struct error *err) {
    const struct tensor **order = size_alloc(n, sizeof(const struct tensor *));
    bool ok = false;
    if (!order) return error_set(err, "out of memory");
    for (size_t i = 0; i < n; i++) order[i] = &tensors[i];
    qsort(order, n, sizeof(const struct tensor *), compare_places);
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        size_t begin = (size_t)((const unsigned char *)order[i]->data - data);
        if (begin != at) {
            error_set(err, "tensor %s begins at byte %zu of the data, expected %zu: %s", order[i]->name, begin, at,
                      begin < at ? "tensors overlap" : "there is a gap before it");
            goto done;
        }
        at += order[i]->n_bytes;
    }
    if (at != n_data) {
        error_set(err, "the tensors take %zu bytes of data, but the file holds %zu", at, n_data);
        goto done;
    }
    ok = true;
done:
    free(order);
    return ok;
}

// Appends the tensors of one file to `list`; names go into `arena`. `file` lives as long as the arena.
static bool parse(const unsigned char *bytes, size_t size, const char *file, struct arena *arena, struct list *list,
                  struct error *err) {
    if (size < LENGTH_BYTES)
        return error_set(err, "truncated: expected the 8 bytes of the header's length, found %zu", size);
    uint64_t length = read_u64(bytes);
    if (length > MAX_HEADER)
        return error_set(err, "header length %llu is above the format's limit of %d: no safetensors file?",
                         (unsigned long long)length, MAX_HEADER);
    size_t n_header = (size_t)length;
    if (!size_range_fits(LENGTH_BYTES, n_header, size))
        return error_set(err, "truncated: a header of %zu bytes is announced, the file holds %zu after its length",
                         n_header, size - LENGTH_BYTES);
    const unsigned char *data = bytes + LENGTH_BYTES + n_header;
    size_t n_data = size - LENGTH_BYTES - n_header, first = list->n;
    if (n_header == 0 || bytes[LENGTH_BYTES] != '{') return error_set(err, "the header does not begin with '{'");
    bool ok = false;
    json_t *header = json_parse((const char *)bytes + LENGTH_BYTES, n_header, "header", err);
    if (!header) return false;
    const char *key;
    json_t *value;
    json_object_foreach(header, key, value) {
        if (strcmp(key, META_KEY) == 0) {
            if (!check_metadata(value, err)) goto done;
            continue;
        }
        struct tensor *t = list_add(list);
        char *name = arena_copy_text(arena, key, strlen(key));
        if (!t || !name) {
            error_set(err, "out of memory");
            goto done;
        }
        *t = (struct tensor){.name = name, .file = file};
        if (!read_tensor(value, data, n_data, t, err)) goto done;
    }
    ok = check_tiling(list->n ? &list->items[first] : NULL, list->n - first, data, n_data, err);
done:
    json_decref(header);
    return ok;
}

// Moves the collected tensors into the set's arena, sorted.
static bool finish(struct tensor_set *set, const struct list *list, struct error *err) {
    set->tensors = arena_alloc(&set->arena, list->n, sizeof *set->tensors);
    if (!set->tensors) return error_set(err, "out of memory");
    if (list->n) memcpy(set->tensors, list->items, list->n * sizeof *set->tensors);
    set->n = list->n;
    return tensor_set_sort(set, err);
}

bool safetensors_parse(const void *data, size_t size, const char *name, struct tensor_set *set, struct error *err) {
    *set = (struct tensor_set){0};
    struct list list = {0};
    const char *file = arena_copy_text(&set->arena, name, strlen(name));
    bool ok = file ? parse(data, size, file, &set->arena, &list, err) && finish(set, &list, err)
                   : error_set(err, "out of memory");
    free(list.items);
    if (!ok) {
        tensor_set_free(set);
        error_prefix(err, "%s: ", name);
    }
    return ok;
}

// Maps one file into set->maps[n_maps], which has room for it.
static bool map_shard(const char *path, struct tensor_set *set, struct list *list, struct error *err) {
    const char *file = arena_copy_text(&set->arena, path, strlen(path));
    if (!file) return error_set(err, "out of memory");
    struct file_map *map = &set->maps[set->n_maps];
    if (!file_map_open(map, path, err)) return false;
    set->n_maps++;
    return parse(map->data, map->size, file, &set->arena, list, err) || error_prefix(err, "%s: ", path);
}

bool safetensors_open(const char *path, struct tensor_set *set, struct error *err) {
    *set = (struct tensor_set){0};
    struct list list = {0};
    set->maps = arena_alloc_zero(&set->arena, 1, sizeof *set->maps);
    bool ok = set->maps ? map_shard(path, set, &list, err) && finish(set, &list, err) : error_set(err, "out of memory");
    free(list.items);
    if (!ok) tensor_set_free(set);
    return ok;
}

static bool is_plain_name(const char *name) {
    return name[0] != '\0' && !strpbrk(name, "/\\") && !strstr(name, "..") && strcmp(name, ".") != 0;
}

// The distinct shards of the index, as the keys of a new object; NULL on error.
static json_t *list_shards(const json_t *weight_map, struct error *err) {
    json_t *shards = json_object();
    if (!shards) {
        error_set(err, "out of memory");
        return NULL;
    }
    const char *tensor;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)weight_map, tensor, value) {
        const char *shard = json_string_value(value);
        if (!shard) {
            error_set(err, "the shard of tensor %s is no string", tensor);
        } else if (!is_plain_name(shard)) {
            error_set(err, "tensor %s: the shard name \"%s\" is no plain file name in the model's folder", tensor,
                      shard);
        } else if (json_object_set_new(shards, shard, json_null()) != 0) {
            error_set(err, "out of memory");
        } else {
            continue;
        }
        json_decref(shards);
        return NULL;
    }
    if (json_object_size(shards) == 0) {
        error_set(err, "weight_map names no shard");
        json_decref(shards);
        return NULL;
    }
    return shards;
}

// Every tensor of the shard just read (list[first..]) must be placed there by the index.
static bool check_shard(const struct list *list, size_t first, const json_t *weight_map, const char *shard,
                        struct error *err) {
    for (size_t i = first; i < list->n; i++) {
        const char *expected = json_string_value(json_object_get(weight_map, list->items[i].name));
        if (!expected)
            return error_set(err, "shard %s holds tensor %s, which the index does not list", shard,
                             list->items[i].name);
        if (strcmp(expected, shard) != 0)
            return error_set(err, "shard %s holds tensor %s, which the index places in %s", shard, list->items[i].name,
                             expected);
    }
    return true;
}

static bool open_shards(const char *folder, const json_t *weight_map, struct tensor_set *set, struct list *list,
                        struct error *err) {
    bool ok = false;
    struct buffer path = {0};
    json_t *shards = list_shards(weight_map, err);
    if (!shards) return false;
    set->maps = arena_alloc_zero(&set->arena, json_object_size(shards), sizeof *set->maps);
    if (!set->maps) {
        error_set(err, "out of memory");
        goto done;
    }
    const char *shard;
    json_t *unused;
    json_object_foreach(shards, shard, unused) {
        size_t first = list->n;
        buffer_clear(&path);
        if (!buffer_printf(&path, "%s/%s", folder, shard)) {
            error_set(err, "out of memory");
            goto done;
        }
        if (!file_exists(path.data)) {
            error_set(err, "shard %s is missing from the folder", shard);
            goto done;
        }
        if (!map_shard(path.data, set, list, err) || !check_shard(list, first, weight_map, shard, err)) goto done;
    }
    if (!finish(set, list, err)) goto done;
    const char *tensor;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)weight_map, tensor, value) {
        if (tensor_find(set, tensor)) continue;
        error_set(err, "the index places tensor %s in shard %s, which does not hold it", tensor,
                  json_string_value(value));
        goto done;
    }
    ok = true;
done:
    buffer_free(&path);
    json_decref(shards);
    return ok;
}

static bool open_index(const char *folder, const char *index_path, struct tensor_set *set, struct error *err) {
    *set = (struct tensor_set){0};
    struct list list = {0};
    bool ok = false;
    json_t *index = json_load_path(index_path, MAX_INDEX, err);
    if (!index) return false;
    const json_t *weight_map = json_object_get(index, "weight_map");
    if (json_is_object(weight_map)) ok = open_shards(folder, weight_map, set, &list, err);
    else error_set(err, "\"weight_map\" is missing or no object");
    if (!ok) {
        tensor_set_free(set);
        error_prefix(err, "%s: ", index_path);
    }
    free(list.items);
    json_decref(index);
    return ok;
}

bool safetensors_open_folder(const char *folder, struct tensor_set *set, struct error *err) {
    *set = (struct tensor_set){0};
    struct buffer path = {0};
    bool ok = false;
    if (!buffer_printf(&path, "%s/model.safetensors", folder)) {
        error_set(err, "out of memory");
        goto done;
    }
    if (file_exists(path.data)) {
        ok = safetensors_open(path.data, set, err);
        goto done;
    }
    if (!buffer_append_text(&path, ".index.json")) {
        error_set(err, "out of memory");
    } else if (file_exists(path.data)) {
        ok = open_index(folder, path.data, set, err);
    } else {
        error_set(err, "%s holds neither model.safetensors nor model.safetensors.index.json", folder);
    }
done:
    buffer_free(&path);
    return ok;
}

// The header's object for `tensors`; NULL on error. Types, sizes and names are checked on the way.
static json_t *make_header(const struct tensor *tensors, size_t n, const struct safetensors_meta *meta, size_t n_meta,
                           struct error *err) {
    json_t *header = json_object(), *metadata = json_object();
    size_t at = 0;
    if (!header || !metadata) goto no_memory;
    for (size_t i = 0; i < n_meta; i++) {
        if (json_object_set_new(metadata, meta[i].key, json_string(meta[i].value)) != 0) goto not_text;
    }
    if (n_meta && json_object_set(header, META_KEY, metadata) != 0) goto no_memory;
    for (size_t i = 0; i < n; i++) {
        struct tensor t = tensors[i];
        if (dtype_info(t.type)->is_quantised) {
            refuse_type(t.name, dtype_info(t.type)->name, err);
            goto err;
        }
        if (t.rank < 0 || t.rank > TENSOR_MAX_RANK || !tensor_measure(&t, err) || t.n_bytes != tensors[i].n_bytes) {
            error_set(err, "tensor %s: n_bytes is %zu, which is not what its shape and type take", t.name,
                      tensors[i].n_bytes);
            goto err;
        }
        size_t end;
        if (!size_add(at, t.n_bytes, &end) || end > INT64_MAX || json_object_get(header, t.name)) {
            error_set(err, "tensor %s: the name is used twice or the file is too large", t.name);
            goto err;
        }
        json_t *shape = json_array();
        for (int k = 0; k < t.rank; k++) json_array_append_new(shape, json_integer((json_int_t)t.shape[k]));
        json_t *entry = json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtype_info(t.type)->name, "shape", shape,
                                  "data_offsets", (json_int_t)at, (json_int_t)end);
        if (!entry) goto no_memory;
        if (json_object_set_new(header, t.name, entry) != 0) goto not_text;
        at = end;
    }
    json_decref(metadata);
    return header;
not_text:
    error_set(err, "a tensor's name or the metadata is not UTF-8");
    goto err;
no_memory:
    error_set(err, "out of memory");
err:
    json_decref(metadata);
    json_decref(header);
    return NULL;
}

bool safetensors_write(const char *path, const struct tensor *tensors, size_t n, const struct safetensors_meta *meta,
                       size_t n_meta, struct error *err) {
    bool ok = false;
    struct buffer head = {0};
    struct file_part *parts = NULL;
    char *text = NULL;
    size_t n_parts;
    json_t *header = make_header(tensors, n, meta, n_meta, err);
    if (!header) {
        error_prefix(err, "cannot write %s: ", path);
        goto done;
    }
    text = json_dumps(header, JSON_COMPACT);
    if (!text || !size_add(n, 1, &n_parts) || !(parts = size_alloc(n_parts, sizeof *parts))) {
        error_set(err, "cannot write %s: out of memory", path);
        goto done;
    }
    size_t length = strlen(text), padded;
    if (!size_align_up(length, 8, &padded) || padded > MAX_HEADER) {
        error_set(err, "cannot write %s: the header's %zu bytes are above the format's limit of %d", path, length,
                  MAX_HEADER);
        goto done;
    }
    unsigned char prefix[LENGTH_BYTES];
    for (int i = 0; i < LENGTH_BYTES; i++) prefix[i] = (unsigned char)(padded >> (8 * i));
    bool built = buffer_append(&head, prefix, sizeof prefix) && buffer_append(&head, text, length);
    for (size_t i = length; built && i < padded; i++) built = buffer_append_byte(&head, ' ');
    if (!built) {
        error_set(err, "cannot write %s: out of memory", path);
        goto done;
    }
    parts[0] = (struct file_part){.bytes = head.data, .n = head.len};
    for (size_t i = 0; i < n; i++) parts[i + 1] = (struct file_part){.bytes = tensors[i].data, .n = tensors[i].n_bytes};
    ok = file_write_parts(path, parts, n_parts, err);
done:
    free(parts);
    free(text);
    buffer_free(&head);
    json_decref(header);
    return ok;
}
