// gguf_write.h: writing GGUF files, version 3, little-endian. First all metadata, then all tensors' names, types and
// shapes, then gguf_writer_begin, then their data in the same order, in pieces of any size, then gguf_writer_finish.
//
// The file is written beside its destination and renamed at the end: a crash, a full disk or gguf_writer_free before
// the end leave the destination as it was.
#ifndef TANDEM_FORMAT_GGUF_WRITE_H
#define TANDEM_FORMAT_GGUF_WRITE_H

#include "base/error.h"
#include "format/gguf.h"
#include "format/tensor.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct gguf_writer;

struct gguf_writer *gguf_writer_create(struct error *err);
void gguf_writer_free(struct gguf_writer *w); // removes what is unfinished; NULL is fine

// Metadata. Each returns false when memory runs out; a key given twice shows when the file is read.
bool gguf_write_u32(struct gguf_writer *w, const char *key, uint32_t value);
bool gguf_write_f32(struct gguf_writer *w, const char *key, float value);
bool gguf_write_bool(struct gguf_writer *w, const char *key, bool value);
bool gguf_write_string(struct gguf_writer *w, const char *key, const char *text, size_t n);
bool gguf_write_i32s(struct gguf_writer *w, const char *key, const int32_t *values, size_t n);
bool gguf_write_value(struct gguf_writer *w, const struct gguf_value *value); // as another file has it
// An array of n strings: begun once, then each is added.
bool gguf_write_strings(struct gguf_writer *w, const char *key, size_t n);
bool gguf_write_element(struct gguf_writer *w, const char *text, size_t n);

// A tensor; its type, rank and shape count. Sets n_elements and n_bytes.
bool gguf_write_tensor(struct gguf_writer *w, struct tensor *t, struct error *err);

size_t gguf_writer_size(const struct gguf_writer *w); // bytes of the whole file, once all tensors are named

// Opens the file and writes all but the data. Fails early when the disk has not that much space.
bool gguf_writer_begin(struct gguf_writer *w, const char *path, struct error *err);
bool gguf_write_data(struct gguf_writer *w, const void *data, size_t n, struct error *err);
bool gguf_writer_finish(struct gguf_writer *w, struct error *err);

#endif
