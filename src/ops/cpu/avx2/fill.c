// fill.c: puts the AVX2 versions into a table that holds the portable ones.
#include "ops/cpu/avx2/avx2.h"

void avx2_fill(struct ops *ops) {
#if defined(__AVX2__)
    ops->name = "cpu/avx2";
    ops->takes_octets = true;
    avx2_fill_rows(ops);
    avx2_fill_matmul(ops);
    avx2_fill_attention(ops);
#else
    (void)ops;
#endif
}
