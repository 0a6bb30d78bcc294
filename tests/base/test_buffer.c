// test_buffer.c: the growable buffer, the arena and error texts.
#include "base/buffer.h"

#include "base/arena.h"
#include "base/error.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void test_buffer(void **state) {
    (void)state;
    struct buffer b = {0};
    assert_string_equal(buffer_text(&b), "");
    assert_true(buffer_append(&b, NULL, 0));
    for (int i = 0; i < 1000; i++) {
        assert_true(buffer_append_byte(&b, (char)('a' + i % 26)));
        assert_int_equal(b.len, i + 1);
        assert_int_equal(b.data[b.len], 0);
    }
    for (int i = 0; i < 1000; i++) assert_int_equal(b.data[i], 'a' + i % 26);
    buffer_clear(&b);
    assert_string_equal(buffer_text(&b), "");
    assert_true(buffer_append_text(&b, "x=") && buffer_printf(&b, "%d%s", -5, "") && buffer_append(&b, "\0y", 2));
    assert_int_equal(b.len, 6);
    assert_memory_equal(b.data, "x=-5\0y", 7);
    assert_false(buffer_reserve(&b, SIZE_MAX)); // too much: the contents stay
    assert_false(buffer_reserve(&b, SIZE_MAX - b.len));
    assert_memory_equal(b.data, "x=-5\0y", 7);
    char *taken = buffer_take(&b);
    assert_memory_equal(taken, "x=-5\0y", 7);
    assert_null(b.data);
    free(taken);
    taken = buffer_take(&b);
    assert_string_equal(taken, "");
    free(taken);
    buffer_free(&b);
    buffer_free(&b);
}

static void test_arena(void **state) {
    (void)state;
    struct arena a = {0};
    unsigned char *parts[300];
    for (size_t i = 0; i < 300; i++) { // some larger than a block of the arena
        size_t n = i % 50 == 49 ? 100000 : i;
        parts[i] = arena_alloc(&a, n, 1);
        assert_non_null(parts[i]);
        assert_int_equal((uintptr_t)parts[i] % 16, 0);
        memset(parts[i], (int)(i & 255), n);
    }
    for (size_t i = 0; i < 300; i++) {
        size_t n = i % 50 == 49 ? 100000 : i;
        for (size_t k = 0; k < n; k++) assert_int_equal(parts[i][k], i & 255); // nothing overlaps
    }
    unsigned char *zeros = arena_alloc_zero(&a, 100, 8);
    assert_non_null(zeros);
    for (int i = 0; i < 800; i++) assert_int_equal(zeros[i], 0);
    assert_string_equal(arena_copy_text(&a, "abcdef", 3), "abc");
    assert_string_equal(arena_copy_text(&a, NULL, 0), "");
    assert_null(arena_alloc(&a, SIZE_MAX / 2, 3));
    assert_null(arena_alloc(&a, SIZE_MAX, 1));
    assert_null(arena_alloc_zero(&a, SIZE_MAX / 2, 3));
    assert_null(arena_copy_text(&a, "", SIZE_MAX));
    arena_free(&a);
    arena_free(&a);
}

static void test_error(void **state) {
    (void)state;
    struct error err;
    assert_false(error_set(NULL, "x"));
    assert_false(error_prefix(NULL, "x"));
    assert_false(error_set(&err, "%s has %d", "it", 3));
    assert_string_equal(err.text, "it has 3");
    assert_false(error_prefix(&err, "%s: ", "file"));
    assert_string_equal(err.text, "file: it has 3");
}

// A text that does not fit is cut between characters, wherever the border falls in a character of 1 to 4 bytes.
static void test_error_cut(void **state) {
    (void)state;
    static const char *const characters[] = {"a", "\xC3\xA4", "\xE2\x82\xAC", "\xF0\x9F\x98\x80"};
    for (size_t width = 1; width <= 4; width++) {
        for (size_t shift = 0; shift < 4; shift++) {
            struct buffer b = {0};
            struct error err;
            for (size_t i = 0; i < shift; i++) assert_true(buffer_append_byte(&b, 'x'));
            while (b.len < 2 * sizeof err.text) assert_true(buffer_append_text(&b, characters[width - 1]));
            error_set(&err, "%s", b.data);
            size_t len = strlen(err.text), room = sizeof err.text - 1;
            assert_true(len <= room && len + 2 * width > room); // at most a character more than needed is lost
            assert_int_equal((len - shift) % width, 0);
            assert_memory_equal(err.text, b.data, len);
            error_prefix(&err, "y");
            len = strlen(err.text);
            assert_true(len <= room);
            assert_int_equal((len - shift - 1) % width, 0);
            error_prefix(&err, "%s", b.data);
            assert_true(strlen(err.text) <= room);
            buffer_free(&b);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_buffer),
        cmocka_unit_test(test_arena),
        cmocka_unit_test(test_error),
        cmocka_unit_test(test_error_cut),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
