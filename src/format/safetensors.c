// safetensors.c: see safetensors.h. It owns the reading of one file and of a folder of shards, and the writer; tensors
// point into the mapped files, nothing is copied.
#include "format/safetensors.h"

#include "base/buffer.h"
#include "base/size.h"
#include "format/json.h"
#include "format/json_scan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The header's limit is the format's own. Indexes in use have at most 10 MB (100,000 tensors).
enum { LENGTH_BYTES = 8, MAX_HEADER = 100000000, MAX_INDEX = 64 << 20 };
#define META_KEY "__metadata__"

// Tensors collected from one file or many, before they become a set.
struct list {
    struct tensor *items; // malloc'ed
    size_t n, cap;
};

// Makes room for `extra` more, and no more than that.
static bool list_reserve(struct list *list, size_t extra, struct error *err) {
    size_t cap;
    if (!size_add(list->n, extra, &cap)) return error_set(err, "out of memory");
    if (cap <= list->cap) return true;
    struct tensor *items = size_realloc(list->items, cap, sizeof *items);
    if (!items) return error_set(err, "out of memory");
    list->items = items;
    list->cap = cap;
    return true;
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

// The list of sizes at the cursor, of which the first `max` land in `out`; *n gets how many there are. False: it is no
// list (*n is 0), or item *n is no integer of 0 or more.
static bool read_sizes(struct json_cursor *c, size_t max, size_t *out, size_t *n) {
    *n = 0;
    if (json_cursor_type(c) != '[') return false;
    for (json_cursor_enter(c); json_cursor_more(c); ++*n) {
        size_t value;
        if (!json_cursor_size(c, &value)) {
            if (*n < max) return false;
            json_cursor_skip(c);
        } else if (*n < max) {
            out[*n] = value;
        }
    }
    return true;
}

static bool read_shape(struct json_cursor *c, struct tensor *t, struct error *err) {
    size_t rank;
    bool is_list = json_cursor_type(c) == '[', good = read_sizes(c, TENSOR_MAX_RANK, t->shape, &rank);
    if (!is_list) return error_set(err, "tensor %s: \"shape\" is missing or no list", t->name);
    if (rank > TENSOR_MAX_RANK)
        return error_set(err, "tensor %s: %zu dimensions, at most %d are supported", t->name, rank, TENSOR_MAX_RANK);
    if (!good) return error_set(err, "tensor %s: dimension %zu of \"shape\" is no integer of 0 or more", t->name, rank);
    t->rank = (int)rank;
    return true;
}

static bool read_dtype(struct json_cursor *c, struct tensor *t, struct buffer *text, struct error *err) {
    if (json_cursor_type(c) != '"') return error_set(err, "tensor %s: \"dtype\" is missing or no string", t->name);
    if (!json_cursor_text(c, text)) return error_set(err, "out of memory");
    return read_type(buffer_text(text), &t->type) || refuse_type(t->name, buffer_text(text), err);
}

// Where the members of one entry stand; a cursor of n 0 (type 0) is an absent one.
struct entry {
    struct json_cursor dtype, shape, offsets;
};

static bool find_members(struct json_cursor *c, struct entry *e, struct buffer *key, struct error *err) {
    *e = (struct entry){0};
    for (json_cursor_enter(c); json_cursor_more(c); json_cursor_skip(c)) {
        if (!json_cursor_key(c, key)) return error_set(err, "out of memory");
        if (strcmp(buffer_text(key), "dtype") == 0) e->dtype = *c;
        if (strcmp(buffer_text(key), "shape") == 0) e->shape = *c;
        if (strcmp(buffer_text(key), "data_offsets") == 0) e->offsets = *c;
    }
    return true;
}

// One entry of the header, at the cursor. `data` is the file's data part, `n_data` bytes.
static bool read_tensor(struct json_cursor *c, const unsigned char *data, size_t n_data, struct tensor *t,
                        struct buffer *scratch, struct error *err) {
    struct entry e;
    size_t offsets[2], n_offsets;
    if (json_cursor_type(c) != '{') return error_set(err, "tensor %s: expected an object in the header", t->name);
    if (!find_members(c, &e, scratch, err) || !read_dtype(&e.dtype, t, scratch, err) || !read_shape(&e.shape, t, err) ||
        !tensor_measure(t, err))
        return false;
    if (!read_sizes(&e.offsets, 2, offsets, &n_offsets) || n_offsets != 2)
        return error_set(err, "tensor %s: \"data_offsets\" is no list of two integers of 0 or more", t->name);
    size_t begin = offsets[0], end = offsets[1];
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

static bool check_metadata(struct json_cursor *c, struct buffer *key, struct error *err) {
    if (json_cursor_type(c) != '{') return error_set(err, META_KEY " is no object");
    for (json_cursor_enter(c); json_cursor_more(c); json_cursor_skip(c)) {
        if (!json_cursor_key(c, key)) return error_set(err, "out of memory");
        if (json_cursor_type(c) != '"')
            return error_set(err, META_KEY ": the value of \"%.80s\" is no string", buffer_text(key));
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

// At most how many tensors a checked header describes: members whose text is long enough for an entry.
static size_t count_entries(struct json_cursor c) {
    size_t n = 0;
    for (json_cursor_enter(&c); json_cursor_more(&c);) {
        json_cursor_skip(&c); // the key
        if (json_cursor_type(&c) == ':') c.at++;
        size_t start = c.at;
        json_cursor_skip(&c);
        if (c.at - start >= sizeof "{'dtype':'U8','shape':[],'data_offsets':[0,0]}" - 1) n++;
    }
    return n;
}

// Appends the tensors of a checked header to `list`, which has room for them.
static bool read_header(struct json_cursor c, const unsigned char *data, size_t n_data, const char *file,
                        struct arena *arena, struct list *list, struct error *err) {
    struct buffer text = {0};
    bool ok = true;
    for (json_cursor_enter(&c); ok && json_cursor_more(&c);) {
        if (!json_cursor_key(&c, &text)) {
            ok = error_set(err, "out of memory");
        } else if (strcmp(buffer_text(&text), META_KEY) == 0) {
            ok = check_metadata(&c, &text, err);
        } else {
            struct tensor t = {.name = arena_copy_text(arena, buffer_text(&text), text.len), .file = file};
            ok = t.name ? read_tensor(&c, data, n_data, &t, &text, err) : error_set(err, "out of memory");
            if (ok && list->n == list->cap) ok = error_set(err, "the header changed while it was read");
            if (ok) list->items[list->n++] = t;
        }
    }
    buffer_free(&text);
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
    struct json_cursor header = {(const char *)bytes + LENGTH_BYTES, n_header, 0};
    return json_scan_check(header.text, n_header, "header", err) && list_reserve(list, count_entries(header), err) &&
           read_header(header, data, n_data, file, arena, list, err) &&
           check_tiling(list->n > first ? &list->items[first] : NULL, list->n - first, data, n_data, err);
}

// Hands the collected tensors to the set, sorted.
static bool finish(struct tensor_set *set, struct list *list, struct error *err) {
    set->tensors = list->items;
    set->n = list->n;
    *list = (struct list){0};
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

// An index: where it places each tensor.
struct place {
    const char *tensor, *shard;
};
struct index {
    struct place *places; // [n] malloc'ed, sorted by tensor
    const char **shards;  // [n_shards] malloc'ed, sorted, each once
    size_t n, n_shards;
    struct arena names;
};

static void index_free(struct index *index) {
    free(index->places);
    free(index->shards);
    arena_free(&index->names);
}

static int by_tensor(const void *a, const void *b) {
    return strcmp(((const struct place *)a)->tensor, ((const struct place *)b)->tensor);
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

// One member of "weight_map", at the cursor.
static bool read_place(struct json_cursor *c, struct index *index, struct buffer *text, struct error *err) {
    struct place *place = &index->places[index->n];
    if (!json_cursor_key(c, text) || !(place->tensor = arena_copy_text(&index->names, buffer_text(text), text->len)))
        return error_set(err, "out of memory");
    if (json_cursor_type(c) != '"') return error_set(err, "the shard of tensor %s is no string", place->tensor);
    if (!json_cursor_text(c, text)) return error_set(err, "out of memory");
    if (!is_plain_name(buffer_text(text)))
        return error_set(err, "tensor %s: the shard name \"%s\" is no plain file name in the model's folder",
                         place->tensor, buffer_text(text));
    // Tensors of one shard mostly follow each other.
    const struct place *previous = index->n ? place - 1 : NULL;
    place->shard = previous && strcmp(previous->shard, buffer_text(text)) == 0
                       ? previous->shard
                       : arena_copy_text(&index->names, buffer_text(text), text->len);
    if (!place->shard) return error_set(err, "out of memory");
    index->n++;
    return true;
}

static bool list_shards(struct index *index, struct error *err) {
    index->shards = size_alloc(index->n, sizeof(const char *));
    if (!index->shards) return error_set(err, "out of memory");
    for (size_t i = 0; i < index->n; i++) index->shards[i] = index->places[i].shard;
    qsort(index->shards, index->n, sizeof(const char *), by_text);
    for (size_t i = 0; i < index->n; i++)
        if (i == 0 || strcmp(index->shards[i], index->shards[i - 1]) != 0)
            index->shards[index->n_shards++] = index->shards[i];
    return true;
}

// `c` stands at the value of "weight_map".
static bool read_weight_map(struct json_cursor c, struct index *index, struct error *err) {
    struct buffer text = {0};
    size_t n = 0;
    struct json_cursor counter = c;
    for (json_cursor_enter(&counter); json_cursor_more(&counter); n++) {
        json_cursor_skip(&counter);
        if (json_cursor_type(&counter) == ':') counter.at++;
        json_cursor_skip(&counter);
    }
    if (n == 0) return error_set(err, "weight_map names no shard");
    index->places = size_alloc(n, sizeof *index->places);
    bool ok = index->places || error_set(err, "out of memory");
    for (json_cursor_enter(&c); ok && index->n < n && json_cursor_more(&c);) ok = read_place(&c, index, &text, err);
    buffer_free(&text);
    if (!ok) return false;
    qsort(index->places, index->n, sizeof *index->places, by_tensor);
    return list_shards(index, err);
}

static bool read_index(const char *path, struct index *index, struct error *err) {
    struct buffer json = {0}, key = {0};
    struct json_cursor weight_map = {0};
    bool ok = file_read(path, MAX_INDEX, &json, err) && json_scan_check(buffer_text(&json), json.len, path, err);
    if (!ok) goto done;
    struct json_cursor c = {buffer_text(&json), json.len, 0};
    if (json_cursor_type(&c) == '{') {
        for (json_cursor_enter(&c); json_cursor_more(&c); json_cursor_skip(&c)) {
            if (!json_cursor_key(&c, &key)) {
                ok = error_set(err, "%s: out of memory", path);
                goto done;
            }
            if (strcmp(buffer_text(&key), "weight_map") == 0) weight_map = c;
        }
    }
    if (json_cursor_type(&weight_map) == '{') ok = read_weight_map(weight_map, index, err);
    else ok = error_set(err, "\"weight_map\" is missing or no object");
    if (!ok) error_prefix(err, "%s: ", path);
done:
    buffer_free(&json);
    buffer_free(&key);
    return ok;
}

// Every tensor of the shard just read (list[first..]) must be placed there by the index.
static bool check_shard(const struct list *list, size_t first, const struct index *index, const char *shard,
                        struct error *err) {
    for (size_t i = first; i < list->n; i++) {
        struct place wanted = {.tensor = list->items[i].name};
        const struct place *place = bsearch(&wanted, index->places, index->n, sizeof wanted, by_tensor);
        if (!place)
            return error_set(err, "shard %s holds tensor %s, which the index does not list", shard, wanted.tensor);
        if (strcmp(place->shard, shard) != 0)
            return error_set(err, "shard %s holds tensor %s, which the index places in %s", shard, wanted.tensor,
                             place->shard);
    }
    return true;
}

// The hub's cache holds links to blobs; one that was interrupted, links to nothing.
static bool refuse_broken_link(const char *path, struct error *err) {
    return error_set(err, "%s is a symbolic link to a file that is not there: was a download interrupted?", path);
}

static bool open_shards(const char *folder, const struct index *index, struct tensor_set *set, struct list *list,
                        struct error *err) {
    bool ok = false;
    struct buffer path = {0};
    set->maps = arena_alloc_zero(&set->arena, index->n_shards, sizeof *set->maps);
    if (!set->maps) return error_set(err, "out of memory");
    for (size_t i = 0; i < index->n_shards; i++) {
        const char *shard = index->shards[i];
        size_t first = list->n;
        buffer_clear(&path);
        if (!buffer_printf(&path, "%s/%s", folder, shard)) {
            error_set(err, "out of memory");
            goto done;
        }
        if (!file_exists(path.data)) {
            if (file_is_broken_link(path.data)) refuse_broken_link(path.data, err);
            else error_set(err, "shard %s is missing from the folder", shard);
            goto done;
        }
        if (!map_shard(path.data, set, list, err) || !check_shard(list, first, index, shard, err)) goto done;
    }
    if (!finish(set, list, err)) goto done;
    for (size_t i = 0; i < index->n; i++) {
        if (tensor_find(set, index->places[i].tensor)) continue;
        error_set(err, "the index places tensor %s in shard %s, which does not hold it", index->places[i].tensor,
                  index->places[i].shard);
        goto done;
    }
    ok = true;
done:
    buffer_free(&path);
    return ok;
}

static bool open_index(const char *folder, const char *index_path, struct tensor_set *set, struct error *err) {
    *set = (struct tensor_set){0};
    struct list list = {0};
    struct index index = {0};
    bool ok = read_index(index_path, &index, err);
    if (ok && !open_shards(folder, &index, set, &list, err)) ok = error_prefix(err, "%s: ", index_path);
    if (!ok) tensor_set_free(set);
    free(list.items);
    index_free(&index);
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
    if (file_is_broken_link(path.data)) {
        refuse_broken_link(path.data, err);
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
