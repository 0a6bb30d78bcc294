// emulator.h: a GPU on the CPU, for tests: slow, strict and in no hurry to be kind. The backend's sources are compiled
// by g++ against the headers beside this one; no nvcc, driver or GPU is needed.
//
// What it does as a GPU might, in an order that a seed decides:
// - What is queued on a stream runs when somebody waits for it, not before: so host memory that changes too early
// shows.
// - The threads of a block are fibers that change only where they must wait (barriers, warp instructions, copies): one
//   may be a whole phase ahead of the others. The blocks of a grid run one after another, in any order;
//   those of a grid of clusters side by side, taking turns where they wait. What one pushes to another's shared memory
//   arrives like a bulk copy.
// - Some blocks of the next six kernels of a stream begin early, up to their dependency_wait, while device memory can
//   only be read; a graph's first kernel does not.
// - Bulk copies happen any time between being asked for and being waited for.
// - What load_staged loads may come as late as the matrix instruction that takes it: until then its stage must be
//   whole.
// - A recorded graph holds its kernels' arguments as they were.
// What it refuses, by ending the program with a line: reads and writes outside an allocation (both ends are guarded),
// before dependency_wait also writes; warps whose lanes meet at different instructions; blocks that hang; misplaced or
// unaligned copies; more shared memory than was allowed. New memory, shared memory included, is NaN.
// What it cannot show: the chip's memory model (a missing fence, a generic write unordered with a copy), its
// arithmetic inside one matrix instruction, its exp2, time.
#ifndef TANDEM_TESTS_EMULATOR_H
#define TANDEM_TESTS_EMULATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct emulator_options {
    uint64_t seed;
    int n_sms;       // 0: 8
    int chip;        // its compute capability, times ten; 0: one that the sources are compiled for, 9.0 or 8.6
    bool keep_order; // threads, blocks and copies in their natural order, and none early
};
void emulator_set(const struct emulator_options *options);

// What has happened since the program began.
struct emulator_counts {
    size_t launches, together, replayed, blocks, early_blocks, copies, late_copies, matrix_steps;
};
struct emulator_counts emulator_counts(void);

// A seeded mistake's number, read by sources that were patched for the test of the tests; 0: none.
extern int sown_mistake;

#endif
