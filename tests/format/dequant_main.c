// dequant_main.c: `dequant_main TYPE < BLOCKS > FLOATS`: dequantises whole blocks, for comparison with other
// implementations (tests/e2e/test_quant.py).
#include "base/size.h"
#include "format/dtype.h"

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    enum dtype type;
    if (argc != 2 || !dtype_from_name(argv[1], &type) || !dtype_info(type)->is_weight) {
        fprintf(stderr, "usage: dequant_main TYPE < BLOCKS > FLOATS\n");
        return 2;
    }
    const struct dtype_info *info = dtype_info(type);
    unsigned char *block = size_alloc(1, info->block_bytes);
    float *values = size_alloc(info->block_len, sizeof *values);
    int status = block && values ? 0 : 1;
    while (status == 0 && fread(block, info->block_bytes, 1, stdin) == 1) {
        dtype_to_f32(type, block, values, info->block_len);
        if (fwrite(values, sizeof *values, info->block_len, stdout) != info->block_len) status = 1;
    }
    free(block);
    free(values);
    return fflush(stdout) == 0 ? status : 1;
}
