// tensor.h: what a model file holds, whatever its format: a list of named tensors that point into mapped memory.
#ifndef TANDEM_FORMAT_TENSOR_H
#define TANDEM_FORMAT_TENSOR_H

#include "base/arena.h"
#include "base/error.h"
#include "base/file.h"
#include "format/dtype.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TENSOR_MAX_RANK = 8 };

struct tensor {
    const char *name;
    enum dtype type;
    int rank;
    size_t shape[TENSOR_MAX_RANK]; // outermost first, as in PyTorch: a projection is [n_out, n_in]
    size_t n_elements;
    size_t n_bytes;
    const void
        *data; // row-major, into the mapping; alignment as the file has it (GGUF: 32, safetensors: none promised)
    const char *file; // path of the file it stands in, for messages
};

// The tensors of one model: one GGUF or safetensors file, or all shards of a folder. Sorted by name; names are unique.
struct tensor_set {
    struct tensor *tensors; // [n] malloc'ed
    size_t n;
    struct file_map *maps; // [n_maps]
    size_t n_maps;
    struct arena arena; // owns names and maps[]
};

const struct tensor *tensor_find(const struct tensor_set *set, const char *name); // NULL when absent
void tensor_set_free(struct tensor_set *set);

// For the readers. tensor_measure computes n_elements and n_bytes from type, rank and shape, and refuses sizes that
// overflow and rows that do not fill whole blocks. tensor_set_sort puts tensors[] into the order of their names and
// refuses duplicates.
bool tensor_measure(struct tensor *t, struct error *err);
bool tensor_set_sort(struct tensor_set *set, struct error *err);

// "[151936, 1024]" into `text`; returns text.
const char *tensor_shape_text(const struct tensor *t, char *text, size_t size);

#endif
