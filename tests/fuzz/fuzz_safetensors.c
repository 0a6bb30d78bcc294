// fuzz_safetensors.c: any bytes as a safetensors file. What is accepted must be readable to its last byte.
#include "format/safetensors.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct tensor_set set;
    struct error err;
    if (!safetensors_parse(data, size, "fuzz", &set, &err)) return 0;
    static volatile unsigned sum; // keeps the reads alive
    (void)sum;
    for (size_t i = 0; i < set.n; i++) {
        const struct tensor *t = &set.tensors[i];
        if (tensor_find(&set, t->name) != t) abort();
        for (size_t k = 0; k < t->n_bytes; k++) sum += ((const unsigned char *)t->data)[k];
    }
    tensor_set_free(&set);
    return 0;
}
