// tensor.c: see tensor.h.
#include "format/tensor.h"

#include "base/size.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int by_name(const void *a, const void *b) {
    const struct tensor *x = a, *y = b;
    return strcmp(x->name, y->name);
}

const struct tensor *tensor_find(const struct tensor_set *set, const char *name) {
    if (set->n == 0) return NULL;
    struct tensor wanted = {.name = name};
    return bsearch(&wanted, set->tensors, set->n, sizeof *set->tensors, by_name);
}

void tensor_set_free(struct tensor_set *set) {
    for (size_t i = 0; i < set->n_maps; i++) file_map_close(&set->maps[i]);
    arena_free(&set->arena);
    free(set->tensors);
    *set = (struct tensor_set){0};
}

bool tensor_set_sort(struct tensor_set *set, struct error *err) {
    if (set->n < 2) return true;
    qsort(set->tensors, set->n, sizeof *set->tensors, by_name);
    for (size_t i = 1; i < set->n; i++) {
        const struct tensor *t = &set->tensors[i], *previous = t - 1;
        if (strcmp(t->name, previous->name) != 0) continue;
        if (strcmp(t->file, previous->file) == 0)
            return error_set(err, "%s: tensor %.200s stands there twice", t->file, t->name);
        return error_set(err, "tensor %.200s stands both in %s and in %s", t->name, previous->file, t->file);
    }
    return true;
}

bool tensor_measure(struct tensor *t, struct error *err) {
    char shape[256];
    const struct dtype_info *info = dtype_info(t->type);
    size_t n = 1, n_bytes, n_rows = 1;
    for (int i = 0; i < t->rank; i++) {
        if (!size_mul(n, t->shape[i], &n))
            return error_set(err, "tensor %.200s: the number of elements of %s overflows", t->name,
                             tensor_shape_text(t, shape, sizeof shape));
        if (i + 1 < t->rank) n_rows = n;
    }
    size_t row_len = t->rank ? t->shape[t->rank - 1] : 1;
    if (row_len % info->block_len != 0)
        return error_set(err, "tensor %.200s: rows of %zu elements in %s are no whole number of %s blocks of %zu",
                         t->name, row_len, tensor_shape_text(t, shape, sizeof shape), info->name, info->block_len);
    if (!dtype_row_bytes(t->type, row_len, &n_bytes) || !size_mul(n_bytes, n_rows, &n_bytes))
        return error_set(err, "tensor %.200s: the size in bytes of %s %s overflows", t->name, info->name,
                         tensor_shape_text(t, shape, sizeof shape));
    t->n_elements = n;
    t->n_bytes = n_bytes;
    return true;
}

const char *tensor_shape_text(const struct tensor *t, char *text, size_t size) {
    size_t used = 0;
    for (int i = 0; i <= t->rank; i++) {
        const char *before = i == 0 ? "[" : ", ";
        int n = i < t->rank ? snprintf(text + used, size - used, "%s%zu", before, t->shape[i])
                            : snprintf(text + used, size - used, "%s]", i == 0 ? "[" : "");
        if (n < 0 || (size_t)n >= size - used) break;
        used += (size_t)n;
    }
    return text;
}
