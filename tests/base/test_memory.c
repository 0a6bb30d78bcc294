// test_memory.c: what memory_available makes of the system's files.
#include "base/file.h"
#include "base/memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

static char folder[] = "/tmp/tandem-memory-XXXXXX";

static const char *in(const char *name) {
    static char path[4][256];
    static size_t n;
    snprintf(path[n = (n + 1) % 4], sizeof path[0], "%s/%s", folder, name);
    return path[n];
}

static void put(const char *name, const char *text) {
    struct error err = {0};
    assert_true(file_write(in(name), text, strlen(text), &err));
}

static size_t available(void) {
    return memory_available_from(in("meminfo"), in("groups"), folder);
}

static int create(void **state) {
    (void)state;
    if (!mkdtemp(folder)) return -1;
    return mkdir(in("a"), 0700) || mkdir(in("a/b"), 0700);
}

static int destroy(void **state) {
    (void)state;
    char command[300];
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command);
}

static void the_system_says(void **state) {
    (void)state;
    assert_true(available() == SIZE_MAX);
    put("meminfo", "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    700 kB\n");
    assert_int_equal(available(), 700 * 1024);
}

// A group's limit, less what it holds, files it has read not counted; every group above counts too.
static void groups_say_less(void **state) {
    (void)state;
    put("groups", "12:cpu:/x\n0::/a/b\n");
    put("a/b/memory.max", "max\n");
    assert_int_equal(available(), 700 * 1024);
    put("a/memory.max", "600000\n");
    assert_int_equal(available(), 600000);
    put("a/memory.current", "500000\n");
    assert_int_equal(available(), 100000);
    put("a/memory.stat", "anon 1\nfile 400000\nfile_mapped 3\n");
    assert_int_equal(available(), 500000);
    put("a/b/memory.max", "1000\n");
    put("a/b/memory.current", "2000\n");
    assert_int_equal(available(), 0);
}

// A container's group is the root, and the path in the list leads nowhere.
static void the_root_counts(void **state) {
    (void)state;
    put("groups", "0::/nowhere/at/all\n");
    assert_int_equal(available(), 700 * 1024);
    put("memory.max", "5000\n");
    assert_int_equal(available(), 5000);
}

static void this_machine(void **state) {
    (void)state;
    assert_true(memory_available() > 1 << 20);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_system_says),
        cmocka_unit_test(groups_say_less),
        cmocka_unit_test(the_root_counts),
        cmocka_unit_test(this_machine),
    };
    return cmocka_run_group_tests(tests, create, destroy);
}
