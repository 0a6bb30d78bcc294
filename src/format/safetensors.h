// safetensors.h: reading and writing .safetensors files.
//
// The layout: 8 bytes little-endian header length, a JSON header, then the data. The reader accepts exactly what the
// format allows (https://github.com/huggingface/safetensors, "Format"): header at most 100 MB, no duplicate keys,
// offsets that are ordered, contiguous and end at the end of the file, size equal to shape times type. Anything else is
// refused with a message that names the tensor or byte.
#ifndef TANDEM_FORMAT_SAFETENSORS_H
#define TANDEM_FORMAT_SAFETENSORS_H

#include "base/error.h"
#include "format/tensor.h"

#include <stdbool.h>

// One file.
bool safetensors_open(const char *path, struct tensor_set *set, struct error *err);

// A Hugging Face folder: model.safetensors, or the shards that model.safetensors.index.json names. Shard names are
// plain file names inside the folder; every tensor of the index must stand in its shard, and no other may. A name never
// leads out of the folder, a symbolic link may: the hub's cache keeps its files elsewhere and links to them, and a link
// is put there by whoever owns the folder, not by what a downloaded file says. Its target must be a regular file.
bool safetensors_open_folder(const char *folder, struct tensor_set *set, struct error *err);

// The same parser on bytes in memory (fuzzing, tests): `data` stays the caller's and must outlive the set.
bool safetensors_parse(const void *data, size_t size, const char *name, struct tensor_set *set, struct error *err);

// Writes `n` tensors (name, type, rank, shape, data; n_bytes is checked) with an optional flat metadata object
// `keys`/`values` of `n_meta` strings.
struct safetensors_meta {
    const char *key, *value;
};
bool safetensors_write(const char *path, const struct tensor *tensors, size_t n, const struct safetensors_meta *meta,
                       size_t n_meta, struct error *err);

#endif
