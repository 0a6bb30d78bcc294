// gguf_write.c: see gguf_write.h.
#include "format/gguf_write.h"

#include "base/buffer.h"
#include "base/file.h"
#include "base/size.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>

enum { ALIGNMENT = 32 };

struct gguf_writer {
    struct buffer values, infos; // metadata and tensors as they stand in the file
    uint64_t n_values, n_tensors;
    size_t *sizes; // [n_tensors] bytes of each one's data
    size_t data_bytes;
    struct file_output file;
    size_t tensor, written; // of which tensor how much data was written
};

struct gguf_writer *gguf_writer_create(struct error *err) {
    struct gguf_writer *w = size_alloc_zero(1, sizeof *w);
    if (!w) error_set(err, "out of memory");
    return w;
}

void gguf_writer_free(struct gguf_writer *w) {
    if (!w) return;
    file_output_close(&w->file);
    buffer_free(&w->values);
    buffer_free(&w->infos);
    free(w->sizes);
    free(w);
}

// ---- Metadata

static bool put(struct buffer *b, uint64_t u, size_t n) {
    unsigned char bytes[8];
    for (size_t i = 0; i < n; i++) bytes[i] = (unsigned char)(u >> 8 * i);
    return buffer_append(b, bytes, n);
}

static bool put_text(struct buffer *b, const char *text, size_t n) {
    return put(b, n, 8) && (n == 0 || buffer_append(b, text, n));
}

static bool put_key(struct gguf_writer *w, const char *key, enum gguf_type type) {
    w->n_values++;
    return put_text(&w->values, key, strlen(key)) && put(&w->values, (uint64_t)type, 4);
}

static uint64_t f32_bits(float f) {
    union {
        float f;
        uint32_t u;
    } v = {.f = f};
    return v.u;
}

static uint64_t f64_bits(double f) {
    union {
        double f;
        uint64_t u;
    } v = {.f = f};
    return v.u;
}

bool gguf_write_u32(struct gguf_writer *w, const char *key, uint32_t value) {
    return put_key(w, key, GGUF_U32) && put(&w->values, value, 4);
}

bool gguf_write_f32(struct gguf_writer *w, const char *key, float value) {
    return put_key(w, key, GGUF_F32) && put(&w->values, f32_bits(value), 4);
}

bool gguf_write_bool(struct gguf_writer *w, const char *key, bool value) {
    return put_key(w, key, GGUF_BOOL) && put(&w->values, value, 1);
}

bool gguf_write_string(struct gguf_writer *w, const char *key, const char *text, size_t n) {
    return put_key(w, key, GGUF_STRING) && put_text(&w->values, text, n);
}

static bool put_array(struct gguf_writer *w, const char *key, enum gguf_type type, size_t n) {
    return put_key(w, key, GGUF_ARRAY) && put(&w->values, (uint64_t)type, 4) && put(&w->values, n, 8);
}

bool gguf_write_i32s(struct gguf_writer *w, const char *key, const int32_t *values, size_t n) {
    bool ok = put_array(w, key, GGUF_I32, n);
    for (size_t i = 0; ok && i < n; i++) ok = put(&w->values, (uint32_t)values[i], 4);
    return ok;
}

bool gguf_write_strings(struct gguf_writer *w, const char *key, size_t n) {
    return put_array(w, key, GGUF_STRING, n);
}

bool gguf_write_element(struct gguf_writer *w, const char *text, size_t n) {
    return put_text(&w->values, text, n);
}

static size_t width(enum gguf_type type) {
    switch (type) {
    case GGUF_U8:
    case GGUF_I8:
    case GGUF_BOOL: return 1;
    case GGUF_U16:
    case GGUF_I16: return 2;
    case GGUF_U32:
    case GGUF_I32:
    case GGUF_F32: return 4;
    case GGUF_U64:
    case GGUF_I64:
    case GGUF_F64: return 8;
    case GGUF_STRING:
    case GGUF_ARRAY: break;
    }
    return 0;
}

bool gguf_write_value(struct gguf_writer *w, const struct gguf_value *v) {
    if (v->type == GGUF_STRING) return gguf_write_string(w, v->key, v->as.s.data, v->as.s.len);
    if (v->type == GGUF_ARRAY) {
        enum gguf_type type = v->as.array.type;
        bool ok = put_array(w, v->key, type, v->as.array.n);
        if (ok && type != GGUF_STRING)
            return v->as.array.n == 0 || buffer_append(&w->values, v->as.array.raw, v->as.array.n * width(type));
        for (size_t i = 0; ok && i < v->as.array.n; i++)
            ok = put_text(&w->values, v->as.array.strings[i].data, v->as.array.strings[i].len);
        return ok;
    }
    uint64_t bits = v->type == GGUF_F32 ? f32_bits((float)v->as.f) : v->type == GGUF_F64 ? f64_bits(v->as.f) : v->as.u;
    return put_key(w, v->key, v->type) && put(&w->values, bits, width(v->type));
}

// ---- Tensors

// The file's number of a type (gguf.c has the whole table).
static int type_number(enum dtype type) {
    static const struct {
        enum dtype type;
        int number;
    } numbers[] = {{DTYPE_F32, 0},   {DTYPE_F16, 1},   {DTYPE_Q4_0, 2},  {DTYPE_Q4_1, 3},  {DTYPE_Q5_0, 6},
                   {DTYPE_Q5_1, 7},  {DTYPE_Q8_0, 8},  {DTYPE_Q2_K, 10}, {DTYPE_Q3_K, 11}, {DTYPE_Q4_K, 12},
                   {DTYPE_Q5_K, 13}, {DTYPE_Q6_K, 14}, {DTYPE_BF16, 30}};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (numbers[i].type == type) return numbers[i].number;
    return -1;
}

bool gguf_write_tensor(struct gguf_writer *w, struct tensor *t, struct error *err) {
    int number = type_number(t->type);
    if (number < 0) return error_set(err, "tensor %.200s: GGUF has no %s", t->name, dtype_info(t->type)->name);
    if (t->rank < 1 || t->rank > 4)
        return error_set(err, "tensor %.200s: expected 1 to 4 dimensions, found %d", t->name, t->rank);
    if (!tensor_measure(t, err)) return false;
    size_t *sizes = size_realloc(w->sizes, w->n_tensors + 1, sizeof *sizes);
    if (!sizes) return error_set(err, "out of memory");
    w->sizes = sizes;
    bool ok = put_text(&w->infos, t->name, strlen(t->name)) && put(&w->infos, (uint64_t)t->rank, 4);
    for (int i = t->rank; ok && i-- > 0;) ok = put(&w->infos, t->shape[i], 8); // innermost first
    ok = ok && put(&w->infos, (uint64_t)number, 4) && put(&w->infos, w->data_bytes, 8);
    if (!ok || !size_add(w->data_bytes, t->n_bytes, &w->data_bytes) ||
        !size_align_up(w->data_bytes, ALIGNMENT, &w->data_bytes))
        return error_set(err, "out of memory");
    w->sizes[w->n_tensors++] = t->n_bytes;
    return true;
}

static size_t head_bytes(const struct gguf_writer *w) {
    size_t n = 4 + 4 + 8 + 8 + w->values.len + w->infos.len;
    return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

size_t gguf_writer_size(const struct gguf_writer *w) {
    return head_bytes(w) + w->data_bytes;
}

// ---- The file

static bool write_padding(struct gguf_writer *w, size_t n, struct error *err) {
    static const char zeros[ALIGNMENT];
    return file_output_write(&w->file, zeros, (ALIGNMENT - n % ALIGNMENT) % ALIGNMENT, err);
}

static bool check_space(const struct gguf_writer *w, struct error *err) {
    struct statvfs disk;
    size_t needed = gguf_writer_size(w);
    if (fstatvfs(w->file.fd, &disk) != 0 || w->file.temporary.len == 0) return true; // then writing will tell
    if ((double)disk.f_bavail * (double)disk.f_frsize >= (double)needed) return true;
    return error_set(err, "cannot write %s: it needs %.1f MB, the disk has %.1f MB left", w->file.path.data,
                     (double)needed / 1e6, (double)disk.f_bavail * (double)disk.f_frsize / 1e6);
}

bool gguf_writer_begin(struct gguf_writer *w, const char *path, struct error *err) {
    if (!file_output_open(&w->file, path, err)) return false;
    struct buffer head = {0};
    bool ok = buffer_append(&head, "GGUF", 4) && put(&head, 3, 4) && put(&head, w->n_tensors, 8) &&
              put(&head, w->n_values, 8);
    if (!ok) error_set(err, "out of memory");
    ok = ok && check_space(w, err) && file_output_write(&w->file, head.data, head.len, err) &&
         file_output_write(&w->file, buffer_text(&w->values), w->values.len, err) &&
         file_output_write(&w->file, buffer_text(&w->infos), w->infos.len, err) &&
         write_padding(w, head.len + w->values.len + w->infos.len, err);
    buffer_free(&head);
    return ok;
}

bool gguf_write_data(struct gguf_writer *w, const void *data, size_t n, struct error *err) {
    for (const char *at = data; n > 0;) {
        if (w->tensor == w->n_tensors)
            return error_set(err, "more data than the tensors of %s hold", w->file.path.data);
        size_t left = w->sizes[w->tensor] - w->written, piece = n < left ? n : left;
        if (!file_output_write(&w->file, at, piece, err)) return false;
        w->written += piece;
        at += piece;
        n -= piece;
        if (w->written < w->sizes[w->tensor]) continue;
        if (!write_padding(w, w->written, err)) return false;
        w->tensor++;
        w->written = 0;
    }
    return true;
}

bool gguf_writer_finish(struct gguf_writer *w, struct error *err) {
    if (w->tensor != w->n_tensors)
        return error_set(err, "the data of %s ends in tensor %zu of %llu", w->file.path.data, w->tensor + 1,
                         (unsigned long long)w->n_tensors);
    return file_output_finish(&w->file, err);
}
