// test_pack.c: a model's octets, made in memory or kept in a file: the rows come back out of them, a kept file is taken
// only when it is whole and made from this very model, and nothing that happens to it is more than a slower start.
#include "base/file.h"
#include "base/file_cache.h"
#include "format/octets.h"
#include "model/convert.h"
#include "model/model.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[] = "/tmp/tandem-pack-XXXXXX";
static char gguf[300], kept[400], temporary[410];
static struct pool *pool;

static void shell(const char *format, const char *a, const char *b) {
    char command[1024];
    snprintf(command, sizeof command, format, a, b);
    assert_int_equal(system(command), 0);
}

static struct model *load(void) {
    struct error err = {0};
    struct model *m = model_load(MODEL_GGUF, gguf, &(struct model_load_options){0}, &err);
    if (!m) fail_msg("%s", err.text);
    return m;
}

static struct pack_options options(const char *cache) {
    return (struct pack_options){.pool = pool, .cache = cache};
}

static bool is_kept(void) {
    struct model *m = load();
    struct pack_options o = options(folder);
    bool kept_it = model_pack_cached(m, &o);
    assert_true(kept_it == (m->layers[0].wq.octets != NULL));
    model_free(m);
    return kept_it;
}

static void check_rows(const struct matrix *w) {
    unsigned char *rows = malloc(OCTET_ROWS * w->row_bytes);
    assert_non_null(rows);
    assert_non_null(w->octets);
    for (size_t r = 0; r + OCTET_ROWS <= w->n_out; r += OCTET_ROWS) {
        octets_unpack(w->type, rows, w->octets + r * w->row_bytes, w->row_bytes);
        assert_memory_equal(rows, (const unsigned char *)w->data + r * w->row_bytes, OCTET_ROWS * w->row_bytes);
    }
    free(rows);
}

static void check_model(const struct model *m) {
    check_rows(&m->head);
    for (size_t i = 0; i < m->config.n_layers; i++) {
        const struct layer_weights *w = &m->layers[i];
        const struct matrix *all[] = {&w->wq, &w->wk, &w->wv, &w->wo, &w->w_gate, &w->w_up, &w->w_down};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) check_rows(all[k]);
    }
}

// Packs with the cache and checks what came of it, wherever it stands.
static void pack_and_check(const char *cache) {
    struct model *m = load();
    struct pack_options o = options(cache);
    assert_true(model_pack(m, &o));
    check_model(m);
    model_free(m);
}

static int create(void **state) {
    (void)state;
    struct error err = {0};
    const struct model_load_options load_options = {0};
    pool = pool_create(2, &err);
    if (!pool || !mkdtemp(folder)) return -1;
    snprintf(gguf, sizeof gguf, "%s/tiny.gguf", folder);
    struct model *m = model_load(MODEL_FOLDER, "models/tandem-tiny", &load_options, &err);
    struct convert_result result = {0};
    const struct convert_options o = {.recipe = recipe_find("q4_0", &err), .pool = pool};
    bool ok = m && o.recipe && convert_model(m, gguf, &o, &result, &err);
    if (!ok) fprintf(stderr, "%s\n", err.text);
    convert_result_free(&result);
    model_free(m);
    return ok ? 0 : -1;
}

static int destroy(void **state) {
    (void)state;
    pool_free(pool);
    shell("rm -rf %s%s", folder, "");
    return 0;
}

// Leaves one kept file and its name in `kept`.
static int keep(void **state) {
    (void)state;
    shell("rm -rf %s/octets%s", folder, "");
    pack_and_check(folder);
    char command[400];
    snprintf(command, sizeof command, "ls %s/octets/*", folder);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    assert_non_null(fgets(kept, sizeof kept, f));
    kept[strcspn(kept, "\n")] = '\0';
    assert_null(fgets(command, sizeof command, f)); // one file, no temporary
    pclose(f);
    snprintf(temporary, sizeof temporary, "%s.tmp", kept);
    return 0;
}

static void in_memory(void **state) {
    (void)state;
    pack_and_check(NULL);
    assert_false(is_kept());
}

static void in_a_file(void **state) {
    (void)state;
    assert_true(is_kept());
    struct stat before, after;
    assert_int_equal(stat(kept, &before), 0);
    struct model *m = load();
    struct pack_options o = options(folder);
    assert_true(model_pack_cached(m, &o));
    check_model(m);
    model_free(m);
    assert_int_equal(stat(kept, &after), 0);
    assert_true(before.st_ino == after.st_ino && before.st_mtim.tv_nsec == after.st_mtim.tv_nsec); // nothing is written
    assert_int_equal(after.st_mode & 0777, 0600);
    o.cache_least = (size_t)1 << 40;
    m = load();
    assert_false(model_pack_cached(m, &o));
    model_free(m);
}

static void flip(long at) {
    FILE *f = fopen(kept, "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, at, at < 0 ? SEEK_END : SEEK_SET), 0);
    int c = fgetc(f);
    assert_int_equal(fseek(f, -1, SEEK_CUR), 0);
    fputc(c ^ 1, f);
    assert_int_equal(fclose(f), 0);
}

static void damaged(void **state) {
    (void)state;
    static const long places[] = {0, 20, 200, 300, 3000, 4095, 4096, 4097, 100000, 5000000, -1};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        flip(places[i]);
        assert_false(is_kept());
        flip(places[i]);
        assert_true(is_kept());
    }
    flip(100000);
    pack_and_check(folder); // and is made anew
    assert_true(is_kept());
}

static void truncated(void **state) {
    (void)state;
    struct stat st;
    assert_int_equal(stat(kept, &st), 0);
    const off_t sizes[] = {0, 1, 100, 4095, 4096, 8192, st.st_size - 1, st.st_size + 1};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        assert_int_equal(truncate(kept, sizes[i]), 0);
        assert_false(is_kept());
        pack_and_check(folder);
        assert_true(is_kept());
    }
}

static void of_another_file(void **state) {
    (void)state;
    assert_true(is_kept());
    const struct timespec times[2] = {{1000000000, 0}, {1000000000, 0}};
    assert_int_equal(utimensat(AT_FDCWD, gguf, times, 0), 0); // as a file unpacked from an archive
    assert_false(is_kept());
    pack_and_check(folder);
    assert_true(is_kept());
    shell("cp -p %s %s.copy", gguf, gguf); // the same name, size and time of change: another inode
    shell("mv %s.copy %s", gguf, gguf);
    assert_false(is_kept());
    pack_and_check(folder);
    assert_true(is_kept());
}

static void stale_temporary(void **state) {
    (void)state;
    shell("rm %s && head -c 100000000 /dev/zero > %s", kept, temporary);
    pack_and_check(folder);
    assert_true(is_kept());
    assert_false(file_exists(temporary));
}

// While another process writes the file, this one makes its octets in memory and touches nothing.
static void another_is_writing(void **state) {
    (void)state;
    assert_int_equal(unlink(kept), 0);
    int fd = open(temporary, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0 && write(fd, "theirs", 6) == 6 && flock(fd, LOCK_EX) == 0);
    pack_and_check(folder);
    assert_false(file_exists(kept));
    char bytes[8] = "";
    assert_int_equal(pread(fd, bytes, sizeof bytes, 0), 6);
    assert_memory_equal(bytes, "theirs", 6);
    close(fd);
    pack_and_check(folder);
    assert_true(is_kept());
}

static void many_writers(void **state) {
    (void)state;
    enum { WRITERS = 6 };
    assert_int_equal(unlink(kept), 0);
    for (int i = 0; i < WRITERS; i++) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child > 0) continue;
        struct error err = {0};
        struct model *m = load(); // threads do not survive a fork
        struct pack_options o = {.pool = pool_create(1, &err), .cache = folder};
        bool ok = model_pack_cached(m, &o) || model_pack(m, &o);
        check_model(m);
        _exit(ok ? 0 : 1);
    }
    for (int i = 0; i < WRITERS; i++) {
        int status;
        assert_true(wait(&status) > 0);
        assert_int_equal(status, 0);
    }
    assert_true(is_kept());
    assert_false(file_exists(temporary));
}

static void nowhere_to_write(void **state) {
    (void)state;
    pack_and_check("/proc/no/such/folder");
    shell("rm -rf %s/octets && touch %s/octets", folder, folder);
    pack_and_check(folder);
    assert_false(is_kept());
}

static void too_large_for_the_disk(void **state) {
    (void)state;
    struct error err = {0};
    struct file_cache f;
    char path[400];
    snprintf(path, sizeof path, "%s/large/file", folder);
    assert_false(file_cache_begin(&f, path, (size_t)1 << 50, &err));
    assert_non_null(strstr(err.text, "free"));
    snprintf(path, sizeof path, "%s/large/file.tmp", folder);
    assert_false(file_exists(path));
}

static struct model *load_bf16(enum model_kind kind, const char *path) {
    struct error err = {0};
    struct model *m = model_load(kind, path, &(struct model_load_options){0}, &err);
    if (!m) fail_msg("%s", err.text);
    assert_true(m->head.type == DTYPE_BF16);
    return m;
}

// BF16 is copied into a file that later starts map; into memory only where that is asked for.
static void plain_weights(void **state) {
    (void)state;
    struct error err = {0};
    char path[350];
    snprintf(path, sizeof path, "%s/bf16.gguf", folder);
    struct model *m = load_bf16(MODEL_FOLDER, "models/tandem-tiny");
    struct convert_result result = {0};
    const struct convert_options convert = {.recipe = recipe_find("bf16", &err), .pool = pool};
    assert_true(convert_model(m, path, &convert, &result, &err));
    convert_result_free(&result);
    struct pack_options o = options(folder), nowhere = options(NULL);
    assert_true(model_pack(m, &o));
    assert_null(m->head.octets);
    o.bf16_in_memory = true;
    assert_true(model_pack(m, &o));
    check_model(m);
    model_free(m);
    m = load_bf16(MODEL_GGUF, path);
    assert_true(model_pack(m, &nowhere));
    assert_null(m->head.octets);
    o.bf16_in_memory = false;
    assert_false(model_pack_cached(m, &o));
    assert_true(model_pack(m, &o));
    check_model(m);
    model_free(m);
    m = load_bf16(MODEL_GGUF, path);
    assert_true(model_pack_cached(m, &o));
    check_model(m);
    model_free(m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(in_memory),
        cmocka_unit_test_setup(in_a_file, keep),
        cmocka_unit_test_setup(damaged, keep),
        cmocka_unit_test_setup(truncated, keep),
        cmocka_unit_test_setup(of_another_file, keep),
        cmocka_unit_test_setup(stale_temporary, keep),
        cmocka_unit_test_setup(another_is_writing, keep),
        cmocka_unit_test_setup(many_writers, keep),
        cmocka_unit_test(nowhere_to_write),
        cmocka_unit_test(too_large_for_the_disk),
        cmocka_unit_test_setup(plain_weights, keep),
    };
    return cmocka_run_group_tests(tests, create, destroy);
}
