// fuzz_config.c: any bytes as JSON, through the strict parser and the typed reads that config files go through.
#include "format/json.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct error err = {0};
    json_t *root = json_parse((const char *)data, size, "fuzz", &err);
    if (!root) {
        if (err.text[0] == '\0') abort(); // every refusal says why
        return 0;
    }
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value) {
        int64_t n = 5;
        double f = 0;
        bool flag;
        const char *text;
        if (json_read_int(root, "fuzz", key, 1, 1000, &n, &err) && (n < 1 || n > 1000)) abort();
        if (json_read_number(root, "fuzz", key, &f, &err) && !isfinite(f)) abort();
        json_read_bool(root, "fuzz", key, &flag, &err);
        json_read_text(root, "fuzz", key, &text, &err);
    }
    json_decref(root);
    return 0;
}
