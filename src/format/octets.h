// octets.h: rows in the order in which a CPU with 256-bit registers multiplies them. Eight consecutive rows are an
// octet: the same bytes as the rows. BF16: two quads of four rows, one behind the other, each in lines of 64 bytes,
// line c of the four rows side by side, so that memory is read in one stream. Quantised types: block after block, and
// within a block field by field, the eight rows side by side:
//   the f16 fields at the block's start (d; or d and m), each as eight halves,
//   the other bytes as 32-bit words, each as eight words: row r is lane r of a register,
//   the f16 field at the end of Q6_K's block as eight halves.
// So an octet takes 8 * row_bytes, and the octet of rows 8 i .. 8 i + 7 stands at 8 i * row_bytes, as the rows do.
#ifndef TANDEM_FORMAT_OCTETS_H
#define TANDEM_FORMAT_OCTETS_H

#include "format/dtype.h"

enum { OCTET_ROWS = 8, QUAD_ROWS = 4, QUAD_LINE = 64 };

bool octets_known(enum dtype type); // BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K
// The same for rows of so many bytes: BF16's must be whole lines.
bool octets_fit(enum dtype type, size_t row_bytes);

// Packs eight rows of row_bytes bytes each, one behind the other, into `to` [8 * row_bytes]; any alignment.
void octets_pack(enum dtype type, void *to, const void *rows, size_t row_bytes);
// The way back.
void octets_unpack(enum dtype type, void *rows, const void *octet, size_t row_bytes);

#endif
