// pool.h: a fixed set of threads that run one parallel loop at a time. Which thread computes an item never changes the
// item's bits: each output element is computed whole by one call.
#ifndef TANDEM_BASE_POOL_H
#define TANDEM_BASE_POOL_H

#include "base/error.h"

#include <stddef.h>

struct pool;

// `n_threads` >= 1, the caller included; 0 asks for what this process may use (affinity mask and cgroup quota).
struct pool *pool_create(int n_threads, struct error *err);
void pool_free(struct pool *pool); // NULL is fine
int pool_size(const struct pool *pool);
int pool_usable_cpus(void);
// The smallest CPU quota, in CPUs rounded up, of the groups that `list` (in the format of /proc/self/cgroup) names
// under `mount`, and of those above them; 0: there is none. For pool_usable_cpus and its test.
int pool_cgroup_cpus(const char *list, const char *mount);

// Calls fn(ctx, begin, end, thread) for pieces of [0, n) of at most `grain` items until all are done; `thread` is in
// [0, pool_size). The caller takes part; returns when every piece is done. One loop at a time: only the thread that
// owns the engine calls this.
typedef void pool_fn(void *ctx, size_t begin, size_t end, int thread);
void pool_for(struct pool *pool, size_t n, size_t grain, pool_fn *fn, void *ctx);

#endif
