// test_hub.c: what MODEL resolves to, in a scratch folder with a Hugging Face cache of our own making.
#include "format/hub.h"

#include "base/file.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char start[4096];
static char folder[] = "/tmp/tandem-hub-XXXXXX";

static void make_folder(const char *path) {
    assert_int_equal(mkdir(path, 0777), 0);
}

static void write_text(const char *path, const char *text) {
    assert_true(file_write(path, text, strlen(text), NULL));
}

#define CACHED "cache/models--Own--Na.me_1"

static int set_up(void **state) {
    (void)state;
    assert_non_null(getcwd(start, sizeof start));
    assert_non_null(mkdtemp(folder));
    assert_int_equal(chdir(folder), 0);
    make_folder("cache");
    make_folder(CACHED);
    make_folder(CACHED "/refs");
    make_folder(CACHED "/snapshots");
    make_folder(CACHED "/snapshots/abc123");
    write_text(CACHED "/snapshots/abc123/config.json", "{}");
    make_folder("tokenizer");
    write_text("tokenizer/tokenizer.json", "{}");
    write_text("tokenizer/tokenizer_config.json", "{}");
    write_text("m.gguf", "");
    write_text("unnamed", "GGUF....");
    write_text("model.safetensors", "");
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    static const char *const paths[] = {"m.gguf",
                                        "unnamed",
                                        "model.safetensors",
                                        "tokenizer/tokenizer.json",
                                        "tokenizer/tokenizer_config.json",
                                        "tokenizer",
                                        CACHED "/snapshots/abc123/config.json",
                                        CACHED "/snapshots/abc123",
                                        CACHED "/snapshots",
                                        CACHED "/refs/main",
                                        CACHED "/refs",
                                        CACHED,
                                        "cache"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) remove(paths[i]);
    return chdir(start) || remove(folder);
}

static void set_environment(const char *hub_cache, const char *hf_home, const char *home) {
    assert_int_equal(hub_cache ? setenv("HF_HUB_CACHE", hub_cache, 1) : unsetenv("HF_HUB_CACHE"), 0);
    assert_int_equal(hf_home ? setenv("HF_HOME", hf_home, 1) : unsetenv("HF_HOME"), 0);
    assert_int_equal(unsetenv("XDG_CACHE_HOME") | unsetenv("HUGGINGFACE_HUB_CACHE"), 0);
    assert_int_equal(home ? setenv("HOME", home, 1) : unsetenv("HOME"), 0);
}

static void found(const char *model, enum model_kind kind, const char *expected) {
    enum model_kind got;
    struct buffer path = {0};
    struct error err = {0};
    assert_true(buffer_append_text(&path, "old"));
    if (!hub_resolve(model, &got, &path, &err)) fail_msg("%s", err.text);
    assert_int_equal(got, kind);
    assert_string_equal(path.data, expected);
    buffer_free(&path);
}

static void not_found(const char *model, const char *expected) {
    enum model_kind kind;
    struct buffer path = {0};
    struct error err = {0};
    assert_false(hub_resolve(model, &kind, &path, &err));
    if (!strstr(err.text, expected)) fail_msg("expected \"%s\" in \"%s\"", expected, err.text);
    buffer_free(&path);
}

static void test_paths(void **state) {
    (void)state;
    found("tokenizer", MODEL_FOLDER, "tokenizer");
    found(CACHED "/snapshots/abc123/", MODEL_FOLDER, CACHED "/snapshots/abc123/");
    found("m.gguf", MODEL_GGUF, "m.gguf");
    found("unnamed", MODEL_GGUF, "unnamed");
    not_found("model.safetensors", "no GGUF file");
    not_found("/dev/null", "is not a regular file");
    not_found("", "empty");
    assert_int_equal(mkfifo("pipe", 0600), 0);
    not_found("pipe", "is not a regular file"); // and does not wait for a writer
    unlink("pipe");
}

static void test_cache(void **state) {
    (void)state;
    set_environment("cache", "nowhere", "nowhere");
    not_found("Own/Na.me_1", "refs/main");
    write_text(CACHED "/refs/main", "abc123\n");
    found("Own/Na.me_1", MODEL_FOLDER, CACHED "/snapshots/abc123");
    not_found("Own/Other", "cache/models--Own--Other");
    write_text(CACHED "/refs/main", "def456");
    not_found("Own/Na.me_1", "def456");
    static const char *const bad[] = {"", "\n", "../../..", "abc/123", "abc123\nmore", "/etc"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_text(CACHED "/refs/main", bad[i]);
        not_found("Own/Na.me_1", "hexadecimal");
    }
    set_environment("", "home", "nowhere");
    not_found("Own/Na.me_1", "home/hub/models--Own--Na.me_1");
    set_environment(NULL, NULL, "me");
    not_found("Own/Na.me_1", "me/.cache/huggingface/hub/models--Own--Na.me_1");
    assert_int_equal(setenv("XDG_CACHE_HOME", "xdg", 1), 0);
    not_found("Own/Na.me_1", "xdg/huggingface/hub/models--Own--Na.me_1");
    set_environment(NULL, "~/there", "me");
    not_found("Own/Na.me_1", "me/there/hub/models--Own--Na.me_1");
    set_environment(NULL, NULL, NULL);
    not_found("Own/Na.me_1", "none of HF_HUB_CACHE, HF_HOME and HOME is set");
}

static void test_path_tricks(void **state) {
    (void)state;
    set_environment("cache", NULL, NULL);
    static const char *const names[] = {"a",      "/a",         "a/",   "a/b/c",  "../b",     "a/..",  "./b",
                                        "a/.b",   ".a/b",       "-a/b", "a--b/c", "a/b..c",   "a b/c", "a/b\n",
                                        "a\\b/c", "\xC3\xA4/b", "a/~",  "~/b",    "a/b%2e%2e"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) not_found(names[i], "OWNER/NAME");
    char long_name[300];
    memset(long_name, 'a', sizeof long_name);
    long_name[1] = '/';
    long_name[sizeof long_name - 1] = '\0';
    not_found(long_name, "OWNER/NAME");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_paths),
        cmocka_unit_test(test_cache),
        cmocka_unit_test(test_path_tricks),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
