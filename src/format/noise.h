// noise.h: rows of random weights in every type that holds weights. The same seed gives the same bytes everywhere.
#ifndef TANDEM_FORMAT_NOISE_H
#define TANDEM_FORMAT_NOISE_H

#include "format/dtype.h"

#include <stddef.h>
#include <stdint.h>

enum { NOISE_LANES = 16 };

struct noise {
    uint32_t lane[NOISE_LANES]; // generators side by side, so that a loop over them becomes vector code
};

// Streams of one seed are independent of each other: one for every row, so that threads may fill in any order.
void noise_seed(struct noise *noise, uint64_t seed, uint64_t stream);

// n floats, symmetric around 0, of standard deviation `deviation`, none further than 2.5 times that from 0.
void noise_floats(struct noise *noise, float *dst, size_t n, float deviation);

// A row of n elements (whole blocks) of a weight type. Quantised types get random blocks that are valid and whose
// values have about mean 0 and the standard deviation asked for: every code is as likely as any other.
void noise_row(struct noise *noise, enum dtype type, unsigned char *dst, size_t n, float deviation);

#endif
