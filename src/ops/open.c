// open.c: which backend's ops --device names. Each backend owns its table.
#include "ops/ops.h"

#include "ops/cuda/cuda.h"

#include <string.h>

// "cuda", "cuda:N"; either may go on with +NAME and ~NAME, kernels to use or not (device.h): `variants` is where.
static bool parse_index(const char *text, int *out, const char **variants) {
    size_t n = strcspn(text, "+~");
    *variants = text + n;
    *out = 0;
    if (n == 4 && strncmp(text, "cuda", 4) == 0) return true;
    if (strncmp(text, "cuda:", 5) != 0 || n == 5) return false;
    for (const char *at = text + 5; at < *variants; at++) {
        if (*at < '0' || *at > '9' || *out > 9999) return false;
        *out = *out * 10 + (*at - '0');
    }
    return true;
}

// "+wide-attention": a name ends at the next sign or at the end.
static bool choose_variants(struct device *d, const char *list, struct error *err) {
    while (*list) {
        bool on = *list++ == '+';
        size_t n = strcspn(list, "+~"), i = 0;
        while (i < d->n_variants && (strlen(d->variant_names[i]) != n || strncmp(d->variant_names[i], list, n) != 0))
            i++;
        if (i == d->n_variants) return error_set(err, "%s has no kernels called '%.*s'", d->name, (int)n, list);
        d->variants = on ? d->variants | 1u << i : d->variants & ~(1u << i);
        list += n;
    }
    return true;
}

const struct ops *ops_open(const char *device, const char *isa, struct error *why, struct error *err) {
    int index;
    const char *variants;
    if (!device || strcmp(device, "auto") == 0) {
        const struct ops *cuda = ops_cuda_count() > 0 ? ops_cuda_open(0, why) : NULL;
        return cuda ? cuda : ops_cpu(isa, err);
    }
    if (strcmp(device, "cpu") == 0) return ops_cpu(isa, err);
    if (parse_index(device, &index, &variants)) {
        const struct ops *cuda = ops_cuda_open(index, err);
        if (!cuda || choose_variants(cuda->device, variants, err)) return cuda;
        ops_cuda_close(cuda);
        return NULL;
    }
    error_set(err, "device '%s': expected auto, cpu, cuda or cuda:N", device);
    return NULL;
}

void ops_close(const struct ops *ops) {
    if (ops && ops->device) ops_cuda_close(ops);
}
