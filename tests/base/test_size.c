// test_size.c: checked size arithmetic at its borders.
#include "base/size.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void test_arithmetic(void **state) {
    (void)state;
    size_t r = 77;
    assert_true(size_add(SIZE_MAX - 1, 1, &r) && r == SIZE_MAX);
    assert_false(size_add(SIZE_MAX, 1, &r));
    assert_true(size_mul(SIZE_MAX, 1, &r) && r == SIZE_MAX);
    assert_true(size_mul(0, SIZE_MAX, &r) && r == 0);
    assert_false(size_mul((size_t)1 << 32, (size_t)1 << 32, &r));
    assert_true(size_sub(5, 5, &r) && r == 0);
    r = 77;
    assert_false(size_sub(4, 5, &r));
    assert_false(size_mul_add(SIZE_MAX, 1, 1, &r));
    assert_false(size_mul_add(SIZE_MAX, 2, 0, &r));
    assert_int_equal(r, 77); // untouched by failures
    assert_true(size_mul_add(3, 4, 5, &r) && r == 17);
    assert_true(size_from_u64(UINT64_MAX, &r) && r == SIZE_MAX);
}

static void test_alignment(void **state) {
    (void)state;
    size_t r = 77;
    assert_true(size_align_up(0, 32, &r) && r == 0);
    assert_true(size_align_up(1, 32, &r) && r == 32);
    assert_true(size_align_up(32, 32, &r) && r == 32);
    assert_true(size_align_up(SIZE_MAX - 31, 32, &r) && r == SIZE_MAX - 31);
    assert_false(size_align_up(SIZE_MAX - 30, 32, &r));
    assert_true(size_align_up(SIZE_MAX, 1, &r) && r == SIZE_MAX);
}

static void test_ranges(void **state) {
    (void)state;
    assert_true(size_range_fits(0, 0, 0));
    assert_true(size_range_fits(10, 0, 10));
    assert_true(size_range_fits(3, 7, 10));
    assert_false(size_range_fits(3, 8, 10));
    assert_false(size_range_fits(11, 0, 10));
    assert_false(size_range_fits(SIZE_MAX, 1, 10));
    assert_false(size_range_fits(1, SIZE_MAX, 10));
}

static void test_allocation(void **state) {
    (void)state;
    assert_null(size_alloc(SIZE_MAX / 2, 3));
    assert_null(size_alloc_zero(SIZE_MAX / 2, 3));
    assert_null(size_alloc_aligned(SIZE_MAX / 2, 3));
    assert_null(size_alloc_aligned(SIZE_MAX, 1));
    char *p = size_alloc(0, 8);
    assert_non_null(p);
    assert_null(size_realloc(p, SIZE_MAX / 2, 3)); // p stays valid
    p = size_realloc(p, 3, 1);
    assert_non_null(p);
    memcpy(p, "ab", 3);
    free(p);
    char *zero = size_alloc_zero(0, 8), *zeros = size_alloc_zero(10, 10), *aligned = size_alloc_aligned(7, 1);
    assert_non_null(zero);
    assert_non_null(zeros);
    assert_non_null(aligned);
    for (int i = 0; i < 100; i++) assert_int_equal(zeros[i], 0);
    assert_int_equal((uintptr_t)aligned % 64, 0);
    free(zero);
    free(zeros);
    free(aligned);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_arithmetic),
        cmocka_unit_test(test_alignment),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
