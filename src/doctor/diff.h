// diff.h: `tandem diff`: two traces of the same token ids, tensor by tensor in the order of computation, and the first
// place where they depart by more than rounding explains.
//
// The measure. d = B - A, and each row (a token) is divided by the RMS of A's row, so that a token with huge
// activations (the first one often has them) hides no other. A tensor's error is the largest of: the RMS of d over
// everything, over one row, over one head (divided by that head's RMS), over one column (divided by 1 + that column's
// RMS). A fault in one head, one token or one channel is then as large as one in all of them.
//
// The judgement. A tensor departs when its error is more than diff_growth(op) times the largest error among the tensors
// it was computed from (in either trace's absence of one: from what that was computed from), or than the unit roundoff
// of the coarser trace, whichever is larger: rounding errors grow from op to op, but slowly. Two traces of tandem's own
// paths on one backend have to be equal, and depart at the first difference.
#ifndef TANDEM_DOCTOR_DIFF_H
#define TANDEM_DOCTOR_DIFF_H

#include "base/buffer.h"
#include "base/error.h"
#include "format/tensor.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum diff_verdict { DIFF_EQUAL, DIFF_ROUNDING, DIFF_DEPARTS };

// One of the two files.
struct diff_side {
    struct tensor_set set;
    const char *file;
    const int32_t *ids; // [n_ids]
    size_t n_ids;
    int32_t *positions; // [n_positions] of the rows of every tensor, ascending
    size_t n_positions;
    // From the metadata; "" and 0 where it says nothing.
    char producer[32], path[32], precision[16], device[32], kv_type[16], version[32], model[256];
    size_t n_heads, n_kv_heads, head_dim;
};

struct diff_place {
    int32_t position;
    size_t column;
    double a, b; // the values there
};

struct diff_tensor {
    char name[64];
    int layer;        // -1 outside the layers
    const char *part; // the name without "layers.N."
    const char *op;   // what computes it: "rmsnorm", "matmul", ...; "" for a name that is not known
    size_t n_rows, n_columns;
    size_t n_heads, head_dim; // 0: no heads, or not known
    const struct tensor *a, *b;
    size_t n_different;      // elements
    double max_abs;          // of B - A; infinite where one is NaN or Inf and the other is not
    double rms_relative;     // RMS(B - A) / RMS(A)
    double error;            // the measure above
    double input_error;      // the largest error of what it was computed from; 0 when nothing of that was traced
    double limit;            // what `error` may be
    bool departs;            // error > limit
    struct diff_place first; // the first different element, where n_different > 0
    struct diff_place worst; // the largest difference
};

struct diff {
    struct diff_side a, b;
    size_t *rows_a, *rows_b; // [n_rows] rows of the common positions
    int32_t *positions;      // [n_rows]
    size_t n_rows;
    struct diff_tensor *tensors; // [n] in the order of computation
    size_t n;
    size_t n_only_a, n_only_b; // tensors that one file has and the other lacks
    bool must_be_equal;        // tandem's own paths on one backend
    double roundoff;           // of the coarser trace; 0 when they must be equal
    const char *precision;     // its name
    enum diff_verdict verdict;
    // Tensors that are equal, within rounding, beyond it, and different but computed after the first that is beyond.
    size_t n_equal, n_rounding, n_departs, n_later;
    size_t first; // index of the first tensor that departs, else the first that differs; n when all are equal
};

// Reads and compares. Errors: not a trace, other ids, no common positions or tensors, other shapes.
struct diff *diff_open(const char *file_a, const char *file_b, struct error *err);
void diff_free(struct diff *d); // NULL is fine

// Where a tensor that differs goes wrong: the rows, heads and columns whose own error is above its limit (or, within
// the limit, the worst).
struct diff_profile {
    double *rows, *heads, *columns; // errors, as in the measure: [n_rows], [n_heads], [n_columns]
};
bool diff_profile(const struct diff *d, const struct diff_tensor *t, struct diff_profile *p, struct error *err);
void diff_profile_free(struct diff_profile *p);

// The element to look at first: in the first row that is wrong, its worst column.
struct diff_place diff_first_wrong(const struct diff *d, const struct diff_tensor *t, const struct diff_profile *p);
// "every position", "positions 32 to 63", "position 5; head 3 of 4; channels 7, 71".
bool diff_extent(const struct diff *d, const struct diff_tensor *t, const struct diff_profile *p, struct buffer *out);

// How much larger than its inputs' error an op's own may be.
double diff_growth(const char *op);

// The report: one HTML page without outside resources.
bool diff_html(const struct diff *d, struct buffer *out, struct error *err);

#endif
