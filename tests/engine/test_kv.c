// test_kv.c: the KV pages' books: no page lost, leaked, handed out twice or shared with the wrong sequence.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/kv.h"

enum { TOKENS = 4 };

static struct kv_pool open_pool(size_t n_pages) {
    struct kv_pool p;
    assert_true(kv_pool_create(&p, n_pages, TOKENS, 7, NULL));
    return p;
}

static void assert_whole(const struct kv_pool *p) {
    struct error err = {0};
    if (!kv_check(p, &err)) fail_msg("%s", err.text);
}

static void grow(struct kv_pool *p, struct kv_seq *s, const int32_t *ids, size_t n) {
    struct kv_copy copy;
    assert_true(kv_reserve(p, s, n, &copy));
    kv_commit(p, s, ids, n);
    assert_whole(p);
}

static void takes_every_page_once(void **state) {
    (void)state;
    struct kv_pool p = open_pool(50);
    bool seen[50] = {false};
    for (int i = 0; i < 50; i++) {
        int32_t page = kv_take(&p);
        assert_in_range(page, 0, 49);
        assert_false(seen[page]);
        seen[page] = true;
    }
    assert_int_equal(kv_take(&p), -1);
    kv_share(&p, 3);
    kv_drop(&p, 3);
    assert_int_equal(p.n_free, 0);
    kv_drop(&p, 3);
    assert_int_equal(p.n_free, 1);
    kv_pool_free(&p);
}

static void finds_what_was_computed(void **state) {
    (void)state;
    struct kv_pool p = open_pool(16);
    int32_t ids[14] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}, a_pages[8], b_pages[8];
    struct kv_seq a = {.pages = a_pages, .tenant = 1}, b = {.pages = b_pages, .tenant = 1};
    grow(&p, &a, ids, 5);
    grow(&p, &a, ids, 9);
    assert_int_equal(kv_match(&p, &b, ids, 14, 13), 12); // whole pages, below the limit
    assert_int_equal(b_pages[0], a_pages[0]);
    assert_true(kv_is_shared(&p, a_pages[2]));
    kv_trim(&p, &a, 0);
    kv_trim(&p, &b, 0);
    assert_whole(&p);
    assert_int_equal(p.n_idle, 3);
    assert_int_equal(kv_match(&p, &b, ids, 14, 11), 8); // still there, nobody uses it
    kv_trim(&p, &b, 0);
    int32_t other[14];
    memcpy(other, ids, sizeof ids);
    other[2] = 99; // a different beginning: the equal pages behind it are not the same
    assert_int_equal(kv_match(&p, &b, other, 14, 13), 0);
    b.tenant = 2; // another tenant finds nothing
    assert_int_equal(kv_match(&p, &b, ids, 14, 13), 0);
    kv_pool_free(&p);
}

// With one bucket for all, every lookup collides: the ids alone tell pages apart.
static void a_collision_shares_nothing(void **state) {
    (void)state;
    struct kv_pool p = open_pool(16);
    p.n_buckets = 1;
    int32_t pages[3][8];
    for (int32_t k = 0; k < 3; k++) {
        int32_t ids[8] = {k, 2, 3, 4, 5, 6, 7, 8};
        struct kv_seq s = {.pages = pages[k], .tenant = 1};
        grow(&p, &s, ids, 8);
    }
    for (int32_t k = 0; k < 3; k++) {
        int32_t ids[9] = {k, 2, 3, 4, 5, 6, 7, 8, 9}, found[8];
        struct kv_seq s = {.pages = found, .tenant = 1};
        assert_int_equal(kv_match(&p, &s, ids, 9, 9), 8);
        assert_memory_equal(found, pages[k], 2 * sizeof *found);
    }
    kv_pool_free(&p);
}

static void the_same_page_is_kept_once(void **state) {
    (void)state;
    struct kv_pool p = open_pool(8);
    int32_t ids[8] = {1, 2, 3, 4, 5, 6, 7, 8}, a_pages[4], b_pages[4];
    struct kv_seq a = {.pages = a_pages, .tenant = 1}, b = {.pages = b_pages, .tenant = 1};
    struct kv_copy copy;
    assert_true(kv_reserve(&p, &a, 8, &copy) && kv_reserve(&p, &b, 8, &copy));
    kv_commit(&p, &a, ids, 8); // both computed it at the same time
    kv_commit(&p, &b, ids, 8);
    assert_memory_equal(a_pages, b_pages, 2 * sizeof *a_pages);
    assert_int_equal(p.n_free, 6);
    assert_whole(&p);
    kv_pool_free(&p);
}

static void a_shared_page_is_copied_before_it_is_written(void **state) {
    (void)state;
    struct kv_pool p = open_pool(8);
    int32_t ids[8] = {1, 2, 3, 4, 5, 6, 7, 8}, a_pages[4], b_pages[4];
    struct kv_seq a = {.pages = a_pages, .tenant = 1}, b = {.pages = b_pages, .tenant = 1};
    struct kv_copy copy;
    grow(&p, &a, ids, 6);
    kv_fork(&p, &b, &a);
    int32_t half = a_pages[1];
    assert_true(kv_reserve(&p, &b, 1, &copy));
    assert_int_equal(copy.from, half);
    assert_int_equal(copy.to, b_pages[1]);
    assert_int_not_equal(copy.to, half);
    assert_true(kv_reserve(&p, &a, 1, &copy)); // alone again: nothing to copy
    assert_int_equal(copy.to, -1);
    assert_int_equal(a_pages[1], half);
    assert_int_equal(a_pages[0], b_pages[0]);
    // Trimmed into a cached page and written again: the cache must not know the page by its old ids.
    kv_commit(&p, &a, ids, 2);
    assert_true(kv_is_cached(&p, half));
    kv_trim(&p, &a, 5);
    assert_true(kv_reserve(&p, &a, 1, &copy));
    assert_false(kv_is_cached(&p, half));
    assert_whole(&p);
    kv_pool_free(&p);
}

static void the_least_recently_used_goes_first_and_from_the_back(void **state) {
    (void)state;
    struct kv_pool p = open_pool(4);
    int32_t a_ids[8] = {1, 2, 3, 4, 5, 6, 7, 8}, b_ids[8] = {11, 12, 13, 14, 15, 16, 17, 18}, pages[4];
    struct kv_seq s = {.pages = pages, .tenant = 1};
    grow(&p, &s, a_ids, 8);
    kv_trim(&p, &s, 0);
    grow(&p, &s, b_ids, 8);
    kv_trim(&p, &s, 0);
    assert_int_equal(kv_available(&p), 4);
    assert_true(kv_take(&p) >= 0); // takes a's second page
    assert_int_equal(kv_match(&p, &s, a_ids, 8, 8), 4);
    kv_trim(&p, &s, 0);
    assert_true(kv_take(&p) >= 0); // b's second: a's first was used since
    assert_int_equal(kv_match(&p, &s, b_ids, 8, 8), 4);
    kv_trim(&p, &s, 0);
    assert_int_equal(p.n_evicted, 2);
    assert_whole(&p);
    kv_pool_free(&p);
}

static void what_is_poisoned_is_not_found_again(void **state) {
    (void)state;
    struct kv_pool p = open_pool(8);
    int32_t ids[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, a_pages[4], b_pages[4], c_pages[4];
    struct kv_seq a = {.pages = a_pages, .tenant = 1}, b = {.pages = b_pages, .tenant = 1};
    struct kv_seq c = {.pages = c_pages, .tenant = 1};
    grow(&p, &a, ids, 8);
    assert_int_equal(kv_match(&p, &b, ids, 9, 9), 8);
    kv_poison(&p, &a);
    assert_int_equal(kv_match(&p, &c, ids, 9, 9), 0);
    grow(&p, &b, ids, 4); // b goes on, but what it computes behind the lost pages cannot be named any more
    assert_int_equal(p.n_cached, 0);
    kv_trim(&p, &b, 0);
    assert_int_equal(p.n_free, 8);
    kv_pool_free(&p);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(takes_every_page_once),
                                       cmocka_unit_test(finds_what_was_computed),
                                       cmocka_unit_test(a_collision_shares_nothing),
                                       cmocka_unit_test(the_same_page_is_kept_once),
                                       cmocka_unit_test(a_shared_page_is_copied_before_it_is_written),
                                       cmocka_unit_test(the_least_recently_used_goes_first_and_from_the_back),
                                       cmocka_unit_test(what_is_poisoned_is_not_found_again)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
