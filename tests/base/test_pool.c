// test_pool.c: every item of a loop is visited exactly once, whatever the sizes, over thousands of loops.
#include "base/pool.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

enum { MAX_ITEMS = 5000 };

struct visit {
    atomic_uchar count[MAX_ITEMS];
    size_t n, grain;
    int n_threads;
    atomic_bool bad; // a piece out of bounds: asserts would leave the worker's stack
};

static void visit_items(void *ctx, size_t begin, size_t end, int thread) {
    struct visit *v = ctx;
    if (begin >= end || end > v->n || end - begin > (v->grain ? v->grain : 1) || thread < 0 || thread >= v->n_threads) {
        atomic_store(&v->bad, true);
        return;
    }
    for (size_t i = begin; i < end; i++) atomic_fetch_add_explicit(&v->count[i], 1, memory_order_relaxed);
}

static void run(struct pool *pool, struct visit *v, size_t n, size_t grain) {
    memset(v, 0, sizeof *v);
    v->n = n;
    v->grain = grain;
    v->n_threads = pool_size(pool);
    pool_for(pool, n, grain, visit_items, v);
    assert_false(v->bad);
    for (size_t i = 0; i < n; i++) {
        if (v->count[i] != 1) fail_msg("item %zu of %zu (grain %zu): visited %d times", i, n, grain, v->count[i]);
    }
}

static void test_every_item_once(void **state) {
    (void)state;
    static const size_t counts[] = {0, 1, 2, 3, 7, 64, 65, 1000, MAX_ITEMS},
                        grains[] = {0, 1, 2, 5, 64, 999, SIZE_MAX / 4};
    static const int threads[] = {1, 2, 3, 5};
    static struct visit v;
    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++) {
        struct error err = {0};
        struct pool *pool = pool_create(threads[t], &err);
        assert_non_null(pool);
        assert_int_equal(pool_size(pool), threads[t]);
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
            for (size_t k = 0; k < sizeof grains / sizeof *grains; k++) run(pool, &v, counts[i], grains[k]);
        }
        pool_free(pool);
    }
}

static void test_many_loops(void **state) {
    (void)state;
    static struct visit v;
    struct pool *pool = pool_create(3, NULL);
    assert_non_null(pool);
    for (size_t i = 0; i < 3000; i++) {
        run(pool, &v, 1 + i % 37, 1 + i % 3);
        if (i % 1000 == 999) usleep(20000); // long enough for the workers to fall asleep
    }
    pool_free(pool);
}

static void test_create_and_free(void **state) {
    (void)state;
    struct error err = {0};
    for (int i = 0; i < 50; i++) pool_free(pool_create(4, &err)); // at once, while the workers start
    pool_free(NULL);
    assert_null(pool_create(-1, &err));
    assert_null(pool_create(1025, &err));
    assert_non_null(strstr(err.text, "found 1025"));
    struct pool *pool = pool_create(0, &err);
    assert_non_null(pool);
    assert_int_equal(pool_size(pool), pool_usable_cpus());
    pool_free(pool);
}

static void put(const char *folder, const char *file, const char *text) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

// Quotas of both cgroup versions: the process's own group, one above it, and a container's root.
static void test_cgroup_quota(void **state) {
    (void)state;
    char root[] = "/tmp/tandem-cgroup-XXXXXX", a[64], b[64], v1[64], list[64];
    assert_non_null(mkdtemp(root));
    snprintf(a, sizeof a, "%s/a", root);
    snprintf(b, sizeof b, "%s/a/b", root);
    snprintf(v1, sizeof v1, "%s/cpu", root);
    snprintf(list, sizeof list, "%s/list", root);
    assert_true(mkdir(a, 0700) == 0 && mkdir(b, 0700) == 0 && mkdir(v1, 0700) == 0);
    assert_int_equal(pool_cgroup_cpus(list, root), 0); // no such file
    put(root, "list", "0::/a/b\n");
    assert_int_equal(pool_cgroup_cpus(list, root), 0); // no quota
    put(b, "cpu.max", "max 100000\n");
    put(a, "cpu.max", "350000 100000\n");
    assert_int_equal(pool_cgroup_cpus(list, root), 4); // 3.5, from above
    put(b, "cpu.max", "100000 100000\n");
    assert_int_equal(pool_cgroup_cpus(list, root), 1);
    put(root, "list", "0::/not/here\n");
    assert_int_equal(pool_cgroup_cpus(list, root), 0);
    put(root, "cpu.max", "250000 100000\n");
    assert_int_equal(pool_cgroup_cpus(list, root), 3); // a container's root
    put(root, "list", "5:memory:/x\n4:cpu,cpuacct:/elsewhere\n");
    assert_int_equal(pool_cgroup_cpus(list, root), 0);
    put(v1, "cpu.cfs_quota_us", "-1\n");
    put(v1, "cpu.cfs_period_us", "100000\n");
    assert_int_equal(pool_cgroup_cpus(list, root), 0);
    put(v1, "cpu.cfs_quota_us", "200000\n");
    assert_int_equal(pool_cgroup_cpus(list, root), 2);
    put(root, "list", "nonsense\n::\n4:cpu\n");
    assert_int_equal(pool_cgroup_cpus(list, root), 3); // "::" is the root of version 2
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", root);
    assert_int_equal(system(command), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_item_once),
        cmocka_unit_test(test_many_loops),
        cmocka_unit_test(test_create_and_free),
        cmocka_unit_test(test_cgroup_quota),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
