// internal.h: between the emulator's two halves: blocks.c runs the threads of one block, runtime.c everything around.
#ifndef TANDEM_TESTS_EMULATOR_INTERNAL_H
#define TANDEM_TESTS_EMULATOR_INTERNAL_H

#include "cuda_runtime_api.h"
#include "emulator.h"

enum { MOST_THREADS = 384, MOST_SHARED = 227 * 1024 };

extern struct emulator_options emulated_options;
extern struct emulator_counts emulated_counts;

// A kernel of a stream or of a graph.
struct kernel_node {
    struct emulated_kernel kernel;
    dim3 grid;
    unsigned threads;
    size_t shared;
    bool early;       // may begin before the kernel before has ended
    unsigned cluster; // blocks of a cluster, which run side by side; 0: none
};

uint64_t emulated_random(void);
// One in n, if the order is free at all.
bool emulated_chance(unsigned n);

// Ends the program: a line with what went wrong, in which thread of which kernel.
_Noreturn void emulated_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// A block's memory and threads. Two may be under way, one of them suspended.
struct block;
struct block *block_create(void); // NULL: out of memory
void block_free(struct block *b);
// Runs block `index` of a grid until it ends (true), or, where `early`, until all its threads wait for the kernel
// before (false).
bool block_start(struct block *b, const struct kernel_node *k, size_t index, bool early);
void block_resume(struct block *b); // to its end
// Runs n blocks of a grid of clusters from `first` on, whole clusters, side by side, to their end.
void blocks_run_together(struct block **blocks, size_t first, size_t n, const struct kernel_node *k);

// Which allocation an address belongs to or lies near, in words; for messages.
void emulated_describe(const void *address, char *text, size_t size);
// Fails unless [p, p + bytes) lies within one allocation.
void emulated_check_range(const void *p, size_t bytes, const char *what);

#endif
