// finite.h: does a tensor hold NaN or Inf? From the bits of floats and of blocks' scales alone, which is many times
// faster than to convert them.
#ifndef TANDEM_FORMAT_FINITE_H
#define TANDEM_FORMAT_FINITE_H

#include "format/dtype.h"

// Whether n elements (whole blocks) of a weight type, at any alignment, hold neither: finite scales make finite values.
bool dtype_is_finite(enum dtype type, const void *src, size_t n);

#endif
