// groups.h: quantised blocks as what they are: integers, a scale and a minimum for each group of consecutive elements.
// Element i of group g is scale[g] * q[i] + min[g]; evaluated in f32 in that order it is dtype_to_f32's value, bit for
// bit. It owns no layout knowledge but its own copy of the bit positions, which tests hold against quant.c's.
#ifndef TANDEM_FORMAT_GROUPS_H
#define TANDEM_FORMAT_GROUPS_H

#include "format/dtype.h"

size_t dtype_group_len(enum dtype type); // 16 or 32
bool dtype_has_min(enum dtype type);     // else every min is 0

// `n` elements (whole blocks) at `src` (any alignment) of a quantised type: q[n], scale[n / group_len], and
// min[n / group_len], which is written only where the type has minima.
void dtype_to_groups(enum dtype type, const void *src, int8_t *q, float *scale, float *min, size_t n);

#endif
