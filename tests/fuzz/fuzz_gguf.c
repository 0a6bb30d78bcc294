// fuzz_gguf.c: any bytes as a GGUF file. What is accepted is read to its last byte, so that the sanitizers see a tensor
// or a string that points outside.
#include "format/gguf.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static unsigned sum(const void *bytes, size_t n) {
    const unsigned char *p = bytes;
    unsigned s = 0;
    for (size_t i = 0; i < n; i++) s += p[i];
    return s;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static volatile unsigned sink; // keeps the reads alive
    (void)sink;
    struct gguf g;
    struct error err = {0};
    if (!gguf_parse(data, size, "fuzz", &g, &err)) {
        if (err.text[0] == '\0') abort(); // every refusal says why
        return 0;
    }
    for (size_t i = 0; i < g.n_values; i++) {
        const struct gguf_value *v = &g.values[i];
        uint32_t u;
        double f;
        bool flag;
        struct gguf_string s;
        if (gguf_find(&g, v->key) != v) abort(); // keys are unique
        gguf_get_u32(&g, v->key, &u, &err);
        gguf_get_f64(&g, v->key, &f, &err);
        gguf_get_bool(&g, v->key, &flag, &err);
        if (gguf_get_string(&g, v->key, &s, &err)) sink += sum(s.data, s.len);
        for (size_t k = 0; v->type == GGUF_ARRAY && k < v->as.array.n; k++) {
            if (v->as.array.strings) sink += sum(v->as.array.strings[k].data, v->as.array.strings[k].len);
            else sink += (unsigned)gguf_array_i64(v, k) + (gguf_array_f64(v, k) > 0);
        }
    }
    for (size_t i = 0; i < g.tensors.n; i++) {
        const struct tensor *t = &g.tensors.tensors[i];
        if (tensor_find(&g.tensors, t->name) != t) abort();
        sink += sum(t->data, t->n_bytes);
    }
    gguf_close(&g);
    return 0;
}
