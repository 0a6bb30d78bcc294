// gguf.h: reading GGUF files, versions 2 and 3, little-endian
// (source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
//
// GGUF lists dimensions innermost first; `struct tensor` has them outermost first, so that a projection is [n_out,
// n_in] here too. A file that is one part of a split model is refused. Tensor names and the order of rows are as the
// file has them: translating those is model/weights.c's work.
#ifndef TANDEM_FORMAT_GGUF_H
#define TANDEM_FORMAT_GGUF_H

#include "base/error.h"
#include "format/tensor.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum gguf_type { // value types of metadata, numbered as in the file
    GGUF_U8 = 0,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64
};

struct gguf_string {
    const char *data; // not NUL-terminated, may hold any byte
    size_t len;
};

struct gguf_value {
    const char *key;
    enum gguf_type type;
    union {
        uint64_t u; // U8 to U64, BOOL (0 or 1)
        int64_t i;  // I8 to I64
        double f;   // F32, F64
        struct gguf_string s;
        struct {
            enum gguf_type type; // of the elements; arrays of arrays are refused
            size_t n;
            const unsigned char *raw;    // scalars: packed little-endian, unaligned
            struct gguf_string *strings; // STRING elements: [n]
        } array;
    } as;
};

struct gguf {
    uint32_t version;
    struct gguf_value *values; // [n_values], in file order; keys are unique
    size_t n_values;
    struct tensor_set tensors;
};

bool gguf_open(const char *path, struct gguf *g, struct error *err);
bool gguf_parse(const void *data, size_t size, const char *name, struct gguf *g, struct error *err); // bytes in memory
void gguf_close(struct gguf *g);

const struct gguf_value *gguf_find(const struct gguf *g, const char *key); // NULL when absent

// Typed reading. Each returns false with a message that names the key when it is absent or has another type; integers
// of any width and sign are accepted where the value fits.
bool gguf_get_u32(const struct gguf *g, const char *key, uint32_t *out, struct error *err);
bool gguf_get_f64(const struct gguf *g, const char *key, double *out, struct error *err); // F32 or F64
bool gguf_get_bool(const struct gguf *g, const char *key, bool *out, struct error *err);
bool gguf_get_string(const struct gguf *g, const char *key, struct gguf_string *out, struct error *err);
// Element `i` of an array as a number; that i < n and that the elements are numbers was checked by the caller. A float
// is cut to an integer, INT64_MIN where none fits.
int64_t gguf_array_i64(const struct gguf_value *array, size_t i);
double gguf_array_f64(const struct gguf_value *array, size_t i);

#endif
