// fuzz_json_scan.c: any bytes as JSON: the scanner that reads in place and jansson's tree refuse the same texts and
// read the same values.
#include "../format/scan_tree.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *why;
    if (!scan_agrees((const char *)data, size, &why)) abort();
    return 0;
}
