// pool.c: the thread pool. Workers spin for a short while after a loop, since the next one is usually microseconds
// away, then sleep on a condition variable.
#include "base/pool.h"

#include "base/size.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SPIN_ROUNDS = 20000, MAX_THREADS = 1024 };

struct pool {
    int n_threads;        // the caller included
    int n_started;        // workers running: n_threads - 1 once created
    pthread_t *workers;   // [n_threads - 1]
    pthread_mutex_t lock; // guards sleeping and waking
    pthread_cond_t wake;
    bool quit; // under lock
    atomic_int n_sleeping;

    // The loop in progress, written by the caller before it raises `generation`.
    pool_fn *fn;
    void *ctx;
    size_t n, grain;
    atomic_size_t next;     // first item not handed out yet
    atomic_uint generation; // counts loops
    atomic_int n_busy;      // workers that have not finished this loop
    atomic_int next_index;  // hands every worker its thread number at start
};

static void cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void work(struct pool *pool, int thread) {
    for (;;) {
        size_t begin = atomic_fetch_add_explicit(&pool->next, pool->grain, memory_order_relaxed);
        if (begin >= pool->n) return;
        size_t end = pool->n - begin < pool->grain ? pool->n : begin + pool->grain;
        pool->fn(pool->ctx, begin, end, thread);
    }
}

// Waits for a loop after `seen`; false: the pool is closing.
static bool wait_for_loop(struct pool *pool, unsigned seen) {
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (atomic_load_explicit(&pool->generation, memory_order_acquire) != seen) return true;
        cpu_relax();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->n_sleeping, 1);
    while (atomic_load(&pool->generation) == seen && !pool->quit) pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->n_sleeping, 1);
    bool quit = pool->quit;
    pthread_mutex_unlock(&pool->lock);
    return !quit;
}

static void *worker_main(void *arg) {
    struct pool *pool = arg;
    int thread = atomic_fetch_add(&pool->next_index, 1);
    for (unsigned seen = 0; wait_for_loop(pool, seen);) {
        seen = atomic_load_explicit(&pool->generation, memory_order_acquire);
        work(pool, thread);
        atomic_fetch_sub_explicit(&pool->n_busy, 1, memory_order_release);
    }
    return NULL;
}

void pool_for(struct pool *pool, size_t n, size_t grain, pool_fn *fn, void *ctx) {
    if (n == 0) return;
    if (grain == 0) grain = 1;
    if (pool->n_threads == 1 || n <= grain) {
        for (size_t begin = 0; begin < n; begin += grain) fn(ctx, begin, n - begin < grain ? n : begin + grain, 0);
        return;
    }
    pool->fn = fn;
    pool->ctx = ctx;
    pool->n = n;
    pool->grain = grain;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->n_busy, pool->n_threads - 1, memory_order_relaxed);
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->n_sleeping) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
    work(pool, 0);
    for (int i = 0; atomic_load_explicit(&pool->n_busy, memory_order_acquire) > 0; i++) {
        if (i < SPIN_ROUNDS) cpu_relax();
        else sched_yield();
    }
}

// The CPU quota of the cgroup (v2) that this process sees as its root, in whole CPUs; 0 when there is none.
static int cgroup_cpus(void) {
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "re");
    if (!f) return 0;
    long quota = 0, period = 0;
    int n = fscanf(f, "%ld %ld", &quota, &period);
    fclose(f);
    if (n != 2 || quota <= 0 || period <= 0) return 0;
    return (int)((quota + period - 1) / period);
}

int pool_usable_cpus(void) {
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    int quota = cgroup_cpus();
    if (quota > 0 && quota < n) n = quota;
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n;
}

struct pool *pool_create(int n_threads, struct error *err) {
    if (n_threads < 0 || n_threads > MAX_THREADS) {
        error_set(err, "threads: expected 1 to %d (0: choose), found %d", MAX_THREADS, n_threads);
        return NULL;
    }
    if (n_threads == 0) n_threads = pool_usable_cpus();
    struct pool *pool = size_alloc_zero(1, sizeof *pool);
    pthread_t *workers = size_alloc_zero((size_t)n_threads, sizeof *workers);
    if (!pool || !workers) {
        free(pool);
        free(workers);
        error_set(err, "out of memory for %d threads", n_threads);
        return NULL;
    }
    pool->n_threads = n_threads;
    pool->workers = workers;
    atomic_init(&pool->next_index, 1);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (int i = 0; i + 1 < n_threads; i++) {
        int code = pthread_create(&workers[i], NULL, worker_main, pool);
        if (code != 0) {
            error_set(err, "cannot start thread %d of %d: %s", i + 2, n_threads, strerror(code));
            pool_free(pool);
            return NULL;
        }
        pool->n_started++;
    }
    return pool;
}

void pool_free(struct pool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    pool->quit = true;
    pool->n = 0;                            // written before `generation` tells the workers to look
    atomic_fetch_add(&pool->generation, 1); // ends the spinning too
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->n_started; i++) pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool->workers);
    free(pool);
}

int pool_size(const struct pool *pool) {
    return pool->n_threads;
}
