// test_file.c: files that are missing, odd, too large, or that shrink while they are mapped.
#include "base/file.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[] = "/tmp/tandem-file-XXXXXX";
static char path[64];

static int set_up(void **state) {
    (void)state;
    assert_non_null(mkdtemp(folder));
    strcpy(path, folder);
    strcat(path, "/f");
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    unlink(path);
    return rmdir(folder); // fails when a temporary file was left behind
}

static void test_read(void **state) {
    (void)state;
    struct buffer b = {0};
    struct error err = {0};
    assert_false(file_read(path, 100, &b, &err));
    assert_non_null(strstr(err.text, "No such file"));
    assert_true(file_write(path, "hello", 5, &err));
    assert_true(buffer_append_text(&b, "> "));
    assert_true(file_read(path, 5, &b, &err));
    assert_string_equal(b.data, "> hello");
    assert_false(file_read(path, 4, &b, &err));
    assert_non_null(strstr(err.text, "5 bytes, more than the limit of 4"));
    assert_string_equal(b.data, "> hello");
    assert_true(file_write(path, "", 0, &err));
    buffer_clear(&b);
    assert_true(file_read(path, 0, &b, &err));
    assert_int_equal(b.len, 0);
    buffer_free(&b);
}

static void test_odd_files(void **state) {
    (void)state;
    struct buffer b = {0};
    struct file_map map;
    struct error err = {0};
    assert_false(file_read(folder, 100, &b, &err));
    assert_non_null(strstr(err.text, "is not a regular file"));
    assert_false(file_read("/dev/zero", 100, &b, &err));
    assert_false(file_map_open(&map, "/dev/zero", &err));
    assert_null(map.data);
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_false(file_map_open(&map, path, &err)); // returns at once: nobody writes into it
    assert_non_null(strstr(err.text, "is not a regular file"));
    unlink(path);
    assert_int_equal(symlink("f", path), 0); // to itself
    assert_false(file_map_open(&map, path, &err));
    assert_false(file_exists(path));
    assert_true(file_is_broken_link(path));
    unlink(path);
    assert_false(file_is_broken_link(path)); // nothing at all
    assert_false(file_is_broken_link(folder));
    assert_true(file_is_folder(folder));
    assert_true(file_exists(folder));
    assert_false(file_is_folder("/dev/zero"));
    buffer_free(&b);
}

static void test_write(void **state) {
    (void)state;
    struct file_map map;
    struct error err = {0};
    struct file_part parts[] = {{"ab", 2}, {NULL, 0}, {"cde", 3}};
    assert_true(file_write(path, "old", 3, &err));
    assert_true(file_map_open(&map, path, &err));
    assert_true(file_write_parts(path, parts, 3, &err));
    assert_memory_equal(map.data, "old", 3); // a reader keeps the old file
    file_map_close(&map);
    assert_true(file_map_open(&map, path, &err));
    assert_int_equal(map.size, 5);
    assert_memory_equal(map.data, "abcde", 5);
    file_map_close(&map);
    file_map_close(&map);
    struct stat st;
    mode_t mask = umask(022);
    assert_true(file_write(path, "x", 1, &err));
    umask(mask);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0644);
    assert_false(file_write("/nonexistent/x", "x", 1, &err));
    assert_non_null(strstr(err.text, "cannot write /nonexistent/x"));
    assert_false(file_write(folder, "x", 1, &err)); // a folder stands there; tear_down sees leftovers
}

// A disk that takes no more: the old file stays, and no temporary one.
static void test_full_disk(void **state) {
    (void)state;
    struct error err = {0};
    struct buffer b = {0};
    assert_true(file_write(path, "old", 3, &err));
    struct rlimit old, small;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    small = (struct rlimit){.rlim_cur = 1000, .rlim_max = old.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    static const char bytes[5000];
    bool written = file_write(path, bytes, sizeof bytes, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_false(written);
    assert_true(file_read(path, 10, &b, &err));
    assert_string_equal(b.data, "old");
    buffer_free(&b);
}

static void test_map_empty(void **state) {
    (void)state;
    struct file_map map;
    struct error err = {0};
    assert_true(file_write(path, "", 0, &err));
    assert_true(file_map_open(&map, path, &err));
    assert_int_equal(map.size, 0);
    assert_null(map.data);
    file_map_close(&map);
}

// SIGBUS from a mapping that is not ours still ends the process.
static void test_foreign_sigbus(void **state) {
    (void)state;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct rlimit none = {0, 0};
        setrlimit(RLIMIT_CORE, &none);
        file_guard_install();
        char name[] = "/tmp/tandem-bus-XXXXXX";
        int fd = mkstemp(name);
        unlink(name);
        if (fd < 0) _exit(1);
        volatile const char *p = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0); // the file is empty
        _exit(p == MAP_FAILED ? 1 : p[0]);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGBUS);
}

static void test_shrinking_file(void **state) {
    (void)state;
    struct file_map map;
    struct error err = {0};
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = 4 * page;
    char *bytes = malloc(size);
    assert_non_null(bytes);
    memset(bytes, 7, size);
    assert_true(file_write(path, bytes, size, &err));
    free(bytes);
    assert_true(file_map_open(&map, path, &err));
    file_guard_install();
    assert_false(file_guard_tripped());
    assert_int_equal(truncate(path, (off_t)page), 0);
    const volatile unsigned char *data = map.data;
    assert_int_equal(data[page - 1], 7);
    assert_false(file_guard_tripped());
    assert_int_equal(data[2 * page + 5], 0);
    assert_true(file_guard_tripped());
    assert_int_equal(data[4 * page - 1], 0);
    assert_int_equal(data[page], 0);
    file_map_close(&map);
    signal(SIGBUS, SIG_DFL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_read),           cmocka_unit_test(test_odd_files), cmocka_unit_test(test_write),
        cmocka_unit_test(test_full_disk),      cmocka_unit_test(test_map_empty), cmocka_unit_test(test_foreign_sigbus),
        cmocka_unit_test(test_shrinking_file),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
