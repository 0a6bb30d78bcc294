// test_json.c: what JSON is refused, and the words of typed reads.
#include "base/buffer.h"
#include "base/file.h"
#include "format/json.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static json_t *parse(const char *text) {
    struct error err = {""};
    json_t *root = json_parse(text, strlen(text), "t.json", &err);
    if (!root) fail_msg("%s", err.text);
    return root;
}

static void refused(const char *text, size_t n, const char *words) {
    struct error err = {""};
    assert_null(json_parse(text, n, "t.json", &err));
    if (!strstr(err.text, words)) fail_msg("expected \"%s\" in: %s", words, err.text);
    assert_int_equal(strncmp(err.text, "t.json: line ", 13), 0);
}

static void test_refused(void **state) {
    (void)state;
    struct error err = {""};
    refused("", 0, "line 1");
    refused("{\"a\":1,\n \"a\":2}", 15, "line 2, column");
    refused("{\"a\":1,\"\\u0061\":2}", 18, "duplicate");
    refused("{\"a\":1} x", 9, "end of file");
    refused("{\"a\":1", 6, "line 1");
    refused("[1e400]", 7, "overflow");
    refused("[99999999999999999999]", 22, "too big");
    refused("[\"\xed\xa0\x80\"]", 7, "decode"); // a surrogate in UTF-8
    refused("[\"\\ud800\"]", 10, "\\ud800");
    refused("[\"\xc0\xaf\"]", 6, "decode"); // an overlong form
    refused("[NaN]", 5, "NaN");
    refused("{\"a\0\":1}", 8, "line 1");
    assert_null(json_parse("[0\0]", 4, "t.json", &err));
    assert_non_null(strstr(err.text, "not valid JSON"));
    struct buffer deep = {0};
    for (int i = 0; i < 100000; i++) assert_true(buffer_append_byte(&deep, '['));
    refused(deep.data, deep.len, "depth");
    buffer_free(&deep);
    assert_null(json_parse("{", 1, "t.json", NULL)); // nobody asked why
    refused("1", 1, "expected an object or an array");
    refused("\"x\"", 3, "expected an object or an array");
}

static void test_ints(void **state) {
    (void)state;
    json_t *o = parse("{\"n\":7,\"big\":9007199254740993,\"real\":1.0,\"text\":\"7\",\"null\":null}");
    struct error err = {""};
    int64_t n = -5;
    assert_true(json_read_int(o, "t.json", "absent", 0, 9, &n, &err));
    assert_true(json_read_int(o, "t.json", "null", 0, 9, &n, &err));
    assert_int_equal(n, -5);
    assert_true(json_read_int(o, "t.json", "n", 0, 9, &n, &err));
    assert_int_equal(n, 7);
    assert_true(json_read_int(o, "t.json", "big", 0, INT64_MAX, &n, &err));
    assert_true(n == 9007199254740993);
    assert_false(json_read_int(o, "t.json", "n", 8, 9, &n, &err));
    assert_string_equal(err.text, "t.json: \"n\": expected an integer from 8 to 9, found 7");
    assert_false(json_read_int(o, "t.json", "n", 0, 6, &n, &err));
    assert_false(json_read_int(o, "t.json", "real", 0, 9, &n, &err));
    assert_non_null(strstr(err.text, "\"real\": expected an integer"));
    assert_false(json_read_int(o, "t.json", "text", 0, 9, &n, &err));
    assert_non_null(strstr(err.text, "string"));
    json_decref(o);
}

static void test_others(void **state) {
    (void)state;
    json_t *o = parse("{\"i\":2,\"r\":0.5,\"t\":true,\"f\":false,\"s\":\"text\",\"o\":{},\"a\":[],\"null\":null}");
    struct error err = {""};
    double d = 9;
    bool b = false;
    const char *s = "before";
    assert_true(json_read_number(o, "w", "null", &d, &err) && json_read_number(o, "w", "none", &d, &err));
    assert_true(d > 8.5);
    assert_true(json_read_number(o, "w", "i", &d, &err));
    assert_true(d > 1.9 && d < 2.1);
    assert_true(json_read_number(o, "w", "r", &d, &err));
    assert_true(d > 0.4 && d < 0.6);
    static const char *const no_number[] = {"t", "f", "s", "o", "a"};
    for (size_t i = 0; i < 5; i++) {
        assert_false(json_read_number(o, "w", no_number[i], &d, &err));
        assert_non_null(strstr(err.text, "expected a number"));
    }
    assert_true(json_read_bool(o, "w", "t", &b, &err) && b);
    assert_true(json_read_bool(o, "w", "null", &b, &err) && b);
    assert_true(json_read_bool(o, "w", "f", &b, &err) && !b);
    assert_false(json_read_bool(o, "w", "i", &b, &err));
    assert_non_null(strstr(err.text, "expected true or false, found"));
    assert_true(json_read_text(o, "w", "null", &s, &err));
    assert_string_equal(s, "before");
    assert_true(json_read_text(o, "w", "s", &s, &err));
    assert_string_equal(s, "text");
    assert_false(json_read_text(o, "w", "r", &s, &err));
    assert_non_null(strstr(err.text, "w: \"r\": expected a string"));
    json_decref(o);
}

static void test_files(void **state) {
    (void)state;
    char path[] = "/tmp/tandem-json-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    struct error err = {""};
    assert_null(json_load_path(path, 100, &err)); // empty
    assert_true(file_write(path, "{\"k\":[1]}", 9, &err));
    json_t *o = json_load_path(path, 9, &err);
    assert_non_null(o);
    json_decref(o);
    assert_null(json_load_path(path, 8, &err));
    assert_non_null(strstr(err.text, "more than the limit of 8"));
    unlink(path);
    assert_null(json_load_path(path, 100, &err));
    assert_non_null(strstr(err.text, path));
    assert_null(json_load_path("/dev/zero", 100, &err));
    assert_non_null(strstr(err.text, "regular file"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_ints),
        cmocka_unit_test(test_others),
        cmocka_unit_test(test_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
