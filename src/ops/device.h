// device.h: the memory of a backend whose ops do not work on the host's. A struct ops names its device; NULL means the
// host, whose memory needs none of this.
//
// Everything that is asked of a device is queued in one order, together with the ops of its table; what returns a value
// to the host waits for all that was queued before. A failure of the device (it was lost, a kernel faulted) is kept:
// later calls do nothing, and `sync` reports it.
#ifndef TANDEM_OPS_DEVICE_H
#define TANDEM_OPS_DEVICE_H

#include "base/error.h"
#include "format/dtype.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { DEVICE_MARKS = 4 };

struct matrix;

struct device {
    char name[160]; // "cuda:0 (NVIDIA H200)", for people
    size_t memory;  // bytes it has

    // Whether its attention has kernels for such heads; false with what is missing.
    bool (*can_run)(struct device *d, size_t n_heads, size_t n_kv_heads, size_t head_dim, struct error *err);

    // Bytes; `what` is for the message when they cannot be had. The memory's contents are undefined.
    void *(*alloc)(struct device *d, size_t bytes, const char *what, struct error *err);
    void (*free)(struct device *d, void *memory);                            // NULL is fine
    void *(*alloc_host)(struct device *d, size_t bytes);                     // host memory that copies fast; NULL: none
    void (*free_host)(struct device *d, void *memory);                       // NULL is fine
    size_t (*available)(struct device *d);                                   // bytes that alloc could give
    void (*put)(struct device *d, void *to, const void *from, size_t bytes); // host to device; `from` may change after
    void (*send)(struct device *d, void *to, const void *from, size_t bytes); // the same, but `from`, of alloc_host,
                                                                              // may not change before it was waited for
    void (*get)(struct device *d, void *to, const void *from, size_t bytes);  // device to host, waits
    void (*move)(struct device *d, void *to, const void *from, size_t bytes); // device to device, no overlap
    void (*fill)(struct device *d, void *to, uint8_t byte, size_t bytes);
    bool (*sync)(struct device *d, struct error *err);
    // Marks what was queued so far with a number below DEVICE_MARKS; `reach` waits for all before the number's last
    // mark, if there is one, and for nothing behind it. False: the device has failed.
    void (*mark)(struct device *d, unsigned number);
    bool (*reach)(struct device *d, unsigned number);
    // Marks by the next op that chooses one token, and without a break in the queue. NULL: `mark` alone marks.
    void (*mark_by_choice)(struct device *d, unsigned number);

    // Device data on the host, valid until the next call; NULL when that failed. For taps.
    const void *(*show)(struct device *d, const void *data, size_t bytes);

    // A weight matrix in the order in which the device's products read it: the bytes that it takes there (0: its type
    // is not multiplied there), room for it, without a value (`out` is for this device's ops only; free out->data), and
    // n of its rows from `first` on, which stand at `rows` on the device as in a file, put in their places.
    size_t (*matrix_bytes)(struct device *d, const struct matrix *w);
    bool (*new_matrix)(struct device *d, struct matrix *out, const struct matrix *w, struct error *err);
    void (*pack_rows)(struct device *d, const struct matrix *out, const void *rows, size_t first, size_t n);

    // Loads what attention to such K and V runs; else the first step does, which may then find no memory left.
    void (*load_attention)(struct device *d, enum dtype kv_type, size_t head_dim);

    // A sequence of ops that is run again and again. begin: true if the device ran the sequence of `key` as it was
    // recorded before (all that the ops read through pointers may have changed, their arguments not): the caller skips
    // it. Else the caller queues the sequence, which may be recorded, and calls end. NULL: this device records nothing.
    bool (*begin)(struct device *d, uint64_t key);
    void (*end)(struct device *d);

    // Kernels that stand in for others and return the same bits: bit i of `variants` is set when variant_names[i] is in
    // use, which may change while nothing is recorded.
    const char *const *variant_names; // [n_variants], then those that other devices of its kind have, then NULL
    size_t n_variants;
    uint32_t variants;

    uint32_t kv_types; // bit (1 << enum dtype): K and V may be stored so
};

#endif
