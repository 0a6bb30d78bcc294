// pool.c: the thread pool. Workers spin for a few dozen microseconds after a loop, since the next one is usually closer
// than that, then sleep. A loop never waits for a worker that the system has not let run: the caller hands out pieces
// until none is left, closes the loop, and waits only for workers that had joined it. How many CPUs there are is
// cpus.c's.
#include "base/pool.h"

#include "base/size.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    SPIN_ROUNDS = 2000, // of cpu_relax(): 30 to 100 microseconds
    YIELDS = 50,        // of the caller, before it sleeps too
    MAX_THREADS = 1024,
};

// The state of the loop in progress, in one word: its number, whether workers may still join, and how many are at it.
static const uint64_t loop_unit = UINT64_C(1) << 32, loop_open = UINT64_C(1) << 31, loop_workers = 0xFFFF;

struct pool {
    int n_threads;        // the caller included
    int n_started;        // workers running: n_threads - 1 once created
    int spin_rounds;      // 0 with more threads than CPUs: whoever spins then keeps another from working
    pthread_t *workers;   // [n_threads - 1]
    pthread_mutex_t lock; // guards sleeping and waking
    pthread_cond_t wake, done;
    bool quit; // under lock
    atomic_int n_sleeping;
    atomic_bool caller_sleeps;
    atomic_int next_index; // hands every worker its thread number at start

    // The loop: written by the caller while no worker is at it, read by workers that joined.
    pool_fn *fn;
    void *ctx;
    size_t n, grain;
    _Alignas(64) _Atomic uint64_t state;
    _Alignas(64) atomic_size_t next; // first item not handed out yet
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

static bool is_new(uint64_t state, uint64_t seen) {
    return state / loop_unit != seen / loop_unit;
}

// Waits for a loop after `seen`; false: the pool is closing.
static bool wait_for_loop(struct pool *pool, uint64_t seen) {
    for (int i = 0; i < pool->spin_rounds; i++) {
        if (is_new(atomic_load_explicit(&pool->state, memory_order_relaxed), seen)) return true;
        cpu_relax();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->n_sleeping, 1);
    while (!is_new(atomic_load(&pool->state), seen) && !pool->quit) pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->n_sleeping, 1);
    bool quit = pool->quit;
    pthread_mutex_unlock(&pool->lock);
    return !quit;
}

// Joins the loop in progress, if it is still open; its state either way.
static bool join_loop(struct pool *pool, uint64_t *state) {
    *state = atomic_load_explicit(&pool->state, memory_order_relaxed);
    while (*state & loop_open)
        if (atomic_compare_exchange_weak_explicit(&pool->state, state, *state + 1, memory_order_acquire,
                                                  memory_order_relaxed))
            return true;
    return false;
}

static void *worker_main(void *arg) {
    struct pool *pool = arg;
    int thread = atomic_fetch_add(&pool->next_index, 1);
    for (uint64_t seen = 0; wait_for_loop(pool, seen);) {
        if (!join_loop(pool, &seen)) continue;
        work(pool, thread);
        uint64_t before = atomic_fetch_sub(&pool->state, 1);
        if ((before & (loop_workers | loop_open)) == 1 && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
    }
    return NULL;
}

// Waits until the workers that joined have finished their pieces.
static void wait_for_workers(struct pool *pool) {
    for (int i = 0; i < pool->spin_rounds + YIELDS; i++) {
        if ((atomic_load_explicit(&pool->state, memory_order_acquire) & loop_workers) == 0) return;
        if (i < pool->spin_rounds) cpu_relax();
        else sched_yield();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->caller_sleeps, true);
    while ((atomic_load(&pool->state) & loop_workers) > 0) pthread_cond_wait(&pool->done, &pool->lock);
    atomic_store(&pool->caller_sleeps, false);
    pthread_mutex_unlock(&pool->lock);
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
    uint64_t number = atomic_load_explicit(&pool->state, memory_order_relaxed) / loop_unit + 1;
    atomic_store(&pool->state, number * loop_unit | loop_open);
    if (atomic_load(&pool->n_sleeping) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
    work(pool, 0);
    atomic_fetch_and(&pool->state, ~loop_open);
    wait_for_workers(pool);
}

struct pool *pool_create(int n_threads, struct error *err) {
    if (n_threads < 0 || n_threads > MAX_THREADS) {
        error_set(err, "threads: expected 1 to %d (0: choose), found %d", MAX_THREADS, n_threads);
        return NULL;
    }
    if (n_threads == 0) n_threads = pool_usable_cpus();
    struct pool *pool = size_alloc_aligned(1, sizeof *pool);
    pthread_t *workers = size_alloc_zero((size_t)n_threads, sizeof *workers);
    if (!pool || !workers) {
        free(pool);
        free(workers);
        error_set(err, "out of memory for %d threads", n_threads);
        return NULL;
    }
    memset(pool, 0, sizeof *pool);
    pool->n_threads = n_threads;
    pool->spin_rounds = n_threads <= pool_usable_cpus() ? SPIN_ROUNDS : 0;
    pool->workers = workers;
    atomic_init(&pool->next_index, 1);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
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
    atomic_fetch_add(&pool->state, loop_unit); // a closed loop: ends the spinning
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->n_started; i++) pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_cond_destroy(&pool->done);
    pthread_mutex_destroy(&pool->lock);
    free(pool->workers);
    free(pool);
}

int pool_size(const struct pool *pool) {
    return pool->n_threads;
}
