// test_pages.c: the KV page pool keeps its books: no page lost, leaked or handed out twice.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/pages.h"

static void takes_every_page_once(void **state) {
    (void)state;
    struct page_pool p;
    bool seen[50] = {false};
    assert_true(page_pool_create(&p, 50, NULL));
    for (int i = 0; i < 50; i++) {
        int32_t page = page_take(&p);
        assert_in_range(page, 0, 49);
        assert_false(seen[page]);
        seen[page] = true;
    }
    assert_int_equal(page_take(&p), -1);
    page_pool_free(&p);
}

static void frees_with_the_last_use(void **state) {
    (void)state;
    struct page_pool p;
    assert_true(page_pool_create(&p, 2, NULL));
    int32_t page = page_take(&p);
    assert_false(page_is_shared(&p, page));
    page_share(&p, page);
    assert_true(page_is_shared(&p, page));
    page_drop(&p, page);
    assert_int_equal(p.n_free, 1);
    page_drop(&p, page);
    assert_int_equal(p.n_free, 2);
    page_pool_free(&p);
}

// 100,000 random operations against a plain count of uses.
static void random_use(void **state) {
    (void)state;
    enum { N = 37 };
    struct page_pool p;
    unsigned uses[N] = {0};
    uint64_t rng = 1;
    assert_true(page_pool_create(&p, N, NULL));
    for (int i = 0; i < 100000; i++) {
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        int32_t page = (int32_t)((rng >> 33) % N);
        switch ((rng >> 60) % 3) {
        case 0: {
            int32_t got = page_take(&p);
            if (got < 0) break;
            assert_int_equal(uses[got], 0);
            uses[got] = 1;
            break;
        }
        case 1:
            if (uses[page]) page_share(&p, page), uses[page]++;
            break;
        default:
            if (uses[page]) page_drop(&p, page), uses[page]--;
        }
        size_t n_free = 0;
        for (int k = 0; k < N; k++) n_free += uses[k] == 0;
        assert_int_equal(p.n_free, n_free);
    }
    page_pool_free(&p);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(takes_every_page_once),
                                       cmocka_unit_test(frees_with_the_last_use), cmocka_unit_test(random_use)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
