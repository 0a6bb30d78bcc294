// quantize.h: f32 to every type that a GGUF file may hold. The block layouts are quant.c's, read the other way.
//
// Scales are fitted: of several candidates for a block, and the least-squares scale of each one's codes, the one with
// the least squared error is kept, measured with the scale as it is stored (rounded to f16 or 6 bits). It costs time,
// and is at least as close as the usual rule "largest magnitude over largest code", which is always among the
// candidates.
#ifndef TANDEM_FORMAT_QUANTIZE_H
#define TANDEM_FORMAT_QUANTIZE_H

#include "format/dtype.h"

#include <stddef.h>

// n elements (whole blocks) of a weight type from `src`. NaN and Inf must not be there: the caller checked.
void dtype_from_f32(enum dtype type, const float *src, void *dst, size_t n);

#endif
