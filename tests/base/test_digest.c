// test_digest.c: SHA-256 of known texts, and the digest by pieces against its definition.
#include "base/digest.h"

#include <openssl/evp.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void known_digests(void **state) { // FIPS 180-4's examples
    (void)state;
    struct digest d;
    assert_true(digest_bytes("abc", 3, &d, NULL));
    assert_string_equal(d.hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_true(digest_bytes(NULL, 0, &d, NULL));
    assert_string_equal(d.hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

static void pieces_are_hashed_in_order(void **state) {
    (void)state;
    size_t n = 2 * (size_t)DIGEST_PIECE + 5;
    unsigned char *data = malloc(n), digests[3 * 32];
    assert_non_null(data);
    for (size_t i = 0; i < n; i++) data[i] = (unsigned char)(i * 7 + i / 1000);
    for (size_t i = 0; i < 3; i++)
        assert_true(EVP_Digest(data + i * DIGEST_PIECE, i < 2 ? DIGEST_PIECE : 5, digests + 32 * i, NULL, EVP_sha256(),
                               NULL) == 1);
    struct digest expected, one, many;
    struct pool *pool = pool_create(3, NULL);
    assert_true(digest_bytes(digests, sizeof digests, &expected, NULL));
    assert_true(digest_tree(data, n, NULL, &one, NULL) && digest_tree(data, n, pool, &many, NULL));
    assert_string_equal(one.hex, expected.hex);
    assert_string_equal(many.hex, expected.hex);
    data[DIGEST_PIECE] ^= 1;
    assert_true(digest_tree(data, n, pool, &many, NULL));
    assert_string_not_equal(many.hex, expected.hex);
    pool_free(pool);
    free(data);
}

static void a_missing_file_is_named(void **state) {
    (void)state;
    struct digest d;
    struct error err = {0};
    assert_false(digest_file("/nonexistent/file", true, NULL, &d, &err));
    assert_non_null(strstr(err.text, "/nonexistent/file"));
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(known_digests), cmocka_unit_test(pieces_are_hashed_in_order),
                                       cmocka_unit_test(a_missing_file_is_named)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
