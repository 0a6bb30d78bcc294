// test_error.c: the text of error messages.
#include "base/error.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static void test_set_and_prefix(void **state) {
    (void)state;
    struct error err;
    assert_false(error_set(&err, "expected %d, found %s", 3, "four"));
    assert_string_equal(err.text, "expected 3, found four");
    assert_false(error_prefix(&err, "%s: ", "file"));
    assert_string_equal(err.text, "file: expected 3, found four");
    assert_false(error_set(NULL, "nobody asks"));
    assert_false(error_prefix(NULL, "nobody asks"));
}

static void test_cut_at_a_character(void **state) {
    (void)state;
    struct error err;
    char text[2000];
    for (size_t offset = 0; offset < 4; offset++) { // four-byte characters that straddle the end in every way
        memset(text, 'a', offset);
        for (size_t i = offset; i + 4 < sizeof text; i += 4) memcpy(text + i, "\xf0\x9f\x99\x82", 5);
        error_set(&err, "%s", text);
        size_t n = strlen(err.text);
        assert_true(n < sizeof err.text && n > sizeof err.text - 6);
        assert_int_equal((n - offset) % 4, 0);
        error_prefix(&err, "%s", "ab");
        n = strlen(err.text);
        assert_int_equal((n - 2 - offset) % 4, 0);
    }
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    error_set(&err, "short");
    error_prefix(&err, "%s", text);
    assert_int_equal(strlen(err.text), sizeof err.text - 1);
}

static void test_control_bytes(void **state) {
    (void)state;
    struct error err;
    error_set(&err, "tensor %s\tline\nnext\x7f", "\x1b[2Jname\r");
    assert_string_equal(err.text, "tensor ?[2Jname?\tline\nnext?");
    error_prefix(&err, "\x07: ");
    assert_string_equal(err.text, "?: tensor ?[2Jname?\tline\nnext?");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_set_and_prefix),
        cmocka_unit_test(test_cut_at_a_character),
        cmocka_unit_test(test_control_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
