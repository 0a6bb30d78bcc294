// test_arena.c: allocations of an arena are apart, aligned and freed together.
#include "base/arena.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static void test_apart_and_aligned(void **state) {
    (void)state;
    enum { N = 2000 };
    struct arena a = {0};
    unsigned char *items[N];
    for (size_t i = 0; i < N; i++) { // sizes around the block size too
        size_t size = i % 100 == 99 ? 65536 - 50 + i / 20 : i % 67;
        items[i] = arena_alloc(&a, size, 1);
        assert_non_null(items[i]);
        assert_int_equal((uintptr_t)items[i] % 16, 0);
        memset(items[i], (int)(i % 251), size);
    }
    for (size_t i = 0; i < N; i++) {
        size_t size = i % 100 == 99 ? 65536 - 50 + i / 20 : i % 67;
        for (size_t k = 0; k < size; k++) assert_int_equal(items[i][k], i % 251);
    }
    arena_free(&a);
    assert_null(a.blocks);
    arena_free(&a); // an empty one may be freed again
}

static void test_overflow(void **state) {
    (void)state;
    struct arena a = {0};
    assert_null(arena_alloc(&a, SIZE_MAX, 1));
    assert_null(arena_alloc(&a, SIZE_MAX - 20, 1));
    assert_null(arena_alloc(&a, SIZE_MAX / 2 + 1, 2)); // wraps to 0
    assert_null(arena_alloc_zero(&a, SIZE_MAX / 8, 16));
    assert_null(arena_copy_text(&a, "x", SIZE_MAX));
    assert_non_null(arena_alloc(&a, 0, 8));
    arena_free(&a);
}

static void test_copies(void **state) {
    (void)state;
    struct arena a = {0};
    unsigned char *dirty = arena_alloc(&a, 100, 1);
    assert_non_null(dirty);
    memset(dirty, 0xFF, 100);
    const unsigned char *zero = arena_alloc_zero(&a, 100, 3);
    assert_non_null(zero);
    for (size_t i = 0; i < 300; i++) assert_int_equal(zero[i], 0);
    assert_string_equal(arena_copy_text(&a, "text and more", 4), "text");
    assert_string_equal(arena_copy_text(&a, NULL, 0), "");
    arena_free(&a);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_apart_and_aligned),
        cmocka_unit_test(test_overflow),
        cmocka_unit_test(test_copies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
