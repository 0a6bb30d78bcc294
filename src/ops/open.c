// open.c: which backend's ops --device names. Each backend owns its table.
#include "ops/ops.h"

#include "ops/cuda/cuda.h"

#include <string.h>

static bool parse_index(const char *text, int *out) {
    *out = 0;
    if (strcmp(text, "cuda") == 0) return true;
    if (strncmp(text, "cuda:", 5) != 0 || !text[5]) return false;
    for (const char *at = text + 5; *at; at++) {
        if (*at < '0' || *at > '9' || *out > 9999) return false;
        *out = *out * 10 + (*at - '0');
    }
    return true;
}

const struct ops *ops_open(const char *device, const char *isa, struct error *why, struct error *err) {
    int index;
    if (!device || strcmp(device, "auto") == 0) {
        const struct ops *cuda = ops_cuda_count() > 0 ? ops_cuda_open(0, why) : NULL;
        return cuda ? cuda : ops_cpu(isa, err);
    }
    if (strcmp(device, "cpu") == 0) return ops_cpu(isa, err);
    if (parse_index(device, &index)) return ops_cuda_open(index, err);
    error_set(err, "device '%s': expected auto, cpu, cuda or cuda:N", device);
    return NULL;
}

void ops_close(const struct ops *ops) {
    if (ops && ops->device) ops_cuda_close(ops);
}
