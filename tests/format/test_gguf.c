// test_gguf.c: the GGUF reader on good files and on every way that we know to make a bad one. Each file is parsed from
// an allocation of exactly its size, so that AddressSanitizer sees any read past its end.
#include "base/buffer.h"
#include "format/gguf.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { F32 = 0, IQ2_XXS = 16, MXFP4 = 39, Q8_0 = 8 };

static void put(struct buffer *b, const void *bytes, size_t n) {
    assert_true(buffer_append(b, bytes, n));
}

static void put_number(struct buffer *b, uint64_t u, int n_bytes) {
    for (int i = 0; i < n_bytes; i++) assert_true(buffer_append_byte(b, (char)(u >> (8 * i))));
}

static void put_string(struct buffer *b, const char *text) {
    put_number(b, strlen(text), 8);
    put(b, text, strlen(text));
}

static void put_head(struct buffer *b, uint32_t version, uint64_t n_tensors, uint64_t n_values) {
    buffer_clear(b);
    put(b, "GGUF", 4);
    put_number(b, version, 4);
    put_number(b, n_tensors, 8);
    put_number(b, n_values, 8);
}

static void put_key(struct buffer *b, const char *key, enum gguf_type type) {
    put_string(b, key);
    put_number(b, type, 4);
}

static void put_tensor(struct buffer *b, const char *name, uint32_t rank, const uint64_t *dims, uint32_t type,
                       uint64_t offset) {
    put_string(b, name);
    put_number(b, rank, 4);
    for (uint32_t i = 0; i < rank; i++) put_number(b, dims[i], 8);
    put_number(b, type, 4);
    put_number(b, offset, 8);
}

static void put_data(struct buffer *b, size_t n) {
    while (b->len % 32) assert_true(buffer_append_byte(b, 0));
    for (size_t i = 0; i < n; i++) assert_true(buffer_append_byte(b, (char)i));
}

static bool parse(const char *bytes, size_t n, struct gguf *g, void **copy, struct error *err) {
    *copy = malloc(n ? n : 1);
    assert_non_null(*copy);
    if (n) memcpy(*copy, bytes, n);
    return gguf_parse(*copy, n, "file", g, err);
}

static void refused(const struct buffer *b, const char *expected) {
    struct gguf g;
    struct error err = {0};
    void *copy;
    assert_false(parse(b->data, b->len, &g, &copy, &err));
    if (!strstr(err.text, expected)) fail_msg("expected \"%s\" in \"%s\"", expected, err.text);
    assert_memory_equal(err.text, "file: ", 6);
    free(copy);
}

// A file with a value of every type, arrays, and two tensors.
static void put_good(struct buffer *b, uint32_t version) {
    put_head(b, version, 2, 15);
    put_key(b, "u8", GGUF_U8), put_number(b, 200, 1);
    put_key(b, "i8", GGUF_I8), put_number(b, (uint64_t)-3, 1);
    put_key(b, "u16", GGUF_U16), put_number(b, 60000, 2);
    put_key(b, "i16", GGUF_I16), put_number(b, (uint64_t)-300, 2);
    put_key(b, "u32", GGUF_U32), put_number(b, 4000000000, 4);
    put_key(b, "i32", GGUF_I32), put_number(b, 7, 4);
    put_key(b, "f32", GGUF_F32), put_number(b, 0x3FC00000, 4); // 1.5
    put_key(b, "bool", GGUF_BOOL), put_number(b, 1, 1);
    put_key(b, "string", GGUF_STRING), put_string(b, "h\xFFi");
    put_key(b, "u64", GGUF_U64), put_number(b, UINT64_MAX, 8);
    put_key(b, "i64", GGUF_I64), put_number(b, (uint64_t)-9, 8);
    put_key(b, "f64", GGUF_F64), put_number(b, 0xC000000000000000, 8); // -2
    put_key(b, "texts", GGUF_ARRAY), put_number(b, GGUF_STRING, 4), put_number(b, 2, 8);
    put_string(b, ""), put_string(b, "ab");
    put_key(b, "ints", GGUF_ARRAY), put_number(b, GGUF_I16, 4), put_number(b, 2, 8);
    put_number(b, 5, 2), put_number(b, (uint64_t)-6, 2);
    put_key(b, "floats", GGUF_ARRAY), put_number(b, GGUF_F32, 4), put_number(b, 3, 8);
    put_number(b, 0x40200000, 4), put_number(b, 0x7FC00000, 4), put_number(b, 0x7F000000, 4); // 2.5, NaN, 2^127
    put_tensor(b, "z.weight", 2, (uint64_t[]){32, 3}, Q8_0, 0);                               // 3 x 34 bytes
    put_tensor(b, "a.weight", 1, (uint64_t[]){4}, F32, 128);
    put_data(b, 128 + 16);
}

static void test_good(void **state) {
    (void)state;
    struct buffer b = {0};
    for (uint32_t version = 2; version <= 3; version++) {
        struct gguf g;
        struct error err = {0};
        void *copy;
        put_good(&b, version);
        if (!parse(b.data, b.len, &g, &copy, &err)) fail_msg("%s", err.text);
        assert_int_equal(g.version, version);
        assert_int_equal(g.n_values, 15);
        assert_int_equal(g.tensors.n, 2);
        assert_string_equal(g.tensors.tensors[0].name, "a.weight");
        const struct tensor *z = tensor_find(&g.tensors, "z.weight");
        assert_non_null(z);
        assert_int_equal(z->rank, 2);
        assert_int_equal(z->shape[0], 3);
        assert_int_equal(z->shape[1], 32);
        assert_int_equal(z->n_bytes, 102);
        assert_int_equal(((const unsigned char *)z->data)[5], 5);
        assert_int_equal(((const unsigned char *)g.tensors.tensors[0].data)[1], 129);
        assert_null(tensor_find(&g.tensors, "b"));
        gguf_close(&g);
        free(copy);
    }
    buffer_free(&b);
}

static void test_values(void **state) {
    (void)state;
    struct buffer b = {0};
    struct gguf g;
    struct error err = {0};
    void *copy;
    uint32_t u;
    double f;
    bool flag;
    struct gguf_string s;
    put_good(&b, 3);
    assert_true(parse(b.data, b.len, &g, &copy, &err));
    assert_true(gguf_get_u32(&g, "u8", &u, &err) && u == 200);
    assert_true(gguf_get_u32(&g, "u16", &u, &err) && u == 60000);
    assert_true(gguf_get_u32(&g, "u32", &u, &err) && u == 4000000000);
    assert_true(gguf_get_u32(&g, "i32", &u, &err) && u == 7);
    assert_false(gguf_get_u32(&g, "i8", &u, &err));
    assert_false(gguf_get_u32(&g, "i64", &u, &err));
    assert_false(gguf_get_u32(&g, "u64", &u, &err));
    assert_non_null(strstr(err.text, "u64: the value does not fit"));
    assert_false(gguf_get_u32(&g, "f32", &u, &err));
    assert_string_equal(err.text, "f32: expected an integer, found f32");
    assert_false(gguf_get_u32(&g, "none", &u, &err));
    assert_string_equal(err.text, "the metadata key none is missing");
    assert_true(gguf_get_f64(&g, "f32", &f, &err) && f == 1.5);
    assert_true(gguf_get_f64(&g, "f64", &f, &err) && f == -2);
    assert_false(gguf_get_f64(&g, "i32", &f, &err));
    assert_false(gguf_get_f64(&g, "none", &f, &err));
    assert_true(gguf_get_bool(&g, "bool", &flag, &err) && flag);
    assert_false(gguf_get_bool(&g, "u8", &flag, &err));
    assert_false(gguf_get_bool(&g, "none", &flag, &err));
    assert_true(gguf_get_string(&g, "string", &s, &err) && s.len == 3);
    assert_memory_equal(s.data, "h\xFFi", 3);
    assert_false(gguf_get_string(&g, "texts", &s, &err));
    assert_false(gguf_get_string(&g, "none", &s, &err));
    assert_int_equal(gguf_find(&g, "i16")->as.i, -300);
    const struct gguf_value *texts = gguf_find(&g, "texts");
    assert_int_equal(texts->as.array.n, 2);
    assert_int_equal(texts->as.array.strings[0].len, 0);
    assert_memory_equal(texts->as.array.strings[1].data, "ab", 2);
    const struct gguf_value *ints = gguf_find(&g, "ints"), *floats = gguf_find(&g, "floats");
    assert_int_equal(gguf_array_i64(ints, 0), 5);
    assert_int_equal(gguf_array_i64(ints, 1), -6);
    assert_true(gguf_array_f64(ints, 1) == -6.0);
    assert_true(gguf_array_f64(floats, 0) == 2.5);
    assert_int_equal(gguf_array_i64(floats, 0), 2);
    assert_true(gguf_array_i64(floats, 1) == INT64_MIN);
    assert_true(gguf_array_i64(floats, 2) == INT64_MIN);
    gguf_close(&g);
    free(copy);
    buffer_free(&b);
}

// Cut after any byte the file is refused: the last tensor ends at its end.
static void test_truncation(void **state) {
    (void)state;
    struct buffer b = {0};
    put_good(&b, 3);
    for (size_t n = 0; n < b.len; n++) {
        struct gguf g;
        struct error err = {0};
        void *copy;
        if (parse(b.data, n, &g, &copy, &err)) fail_msg("accepted at %zu of %zu bytes", n, b.len);
        assert_non_null(strstr(err.text, "truncated"));
        free(copy);
    }
    buffer_free(&b);
}

static void test_head(void **state) {
    (void)state;
    struct buffer b = {0};
    put_head(&b, 3, 0, 0);
    b.data[0] = 'g';
    refused(&b, "no GGUF file");
    put_head(&b, 0, 0, 0), refused(&b, "version 0 is not supported");
    put_head(&b, 1, 0, 0), refused(&b, "GGUF version 1 is not supported");
    put_head(&b, 4, 0, 0), refused(&b, "version 4 is not supported");
    put_head(&b, 3u << 24, 0, 0), refused(&b, "big-endian");
    put_head(&b, 3, UINT64_MAX, 0), refused(&b, "18446744073709551615 tensors are announced");
    put_head(&b, 3, 0, UINT64_MAX), refused(&b, "18446744073709551615 metadata values are announced");
    put_head(&b, 3, 1ull << 61, 1ull << 61), refused(&b, "tensors are announced");
    buffer_free(&b);
}

static void test_bad_values(void **state) {
    (void)state;
    struct buffer b = {0};
    char rest[64] = {0};
    put_head(&b, 3, 0, 1), put_number(&b, UINT64_MAX, 8), put(&b, rest, 64);
    refused(&b, "is said to have 18446744073709551615 bytes");
    put_head(&b, 3, 0, 1), put_string(&b, ""), put(&b, rest, 64), refused(&b, "expected 1 to 65535 bytes, found 0");
    put_head(&b, 3, 0, 1), put_number(&b, 3, 8), put(&b, "a\0b", 3), put(&b, rest, 64);
    refused(&b, "found byte 0x00");
    put_head(&b, 3, 0, 1), put_string(&b, "k\xC3"), put(&b, rest, 64), refused(&b, "found byte 0xc3");
    put_head(&b, 3, 0, 1), put_key(&b, "k", 13), put(&b, rest, 64), refused(&b, "k: unknown value type 13");
    put_head(&b, 3, 0, 1), put_key(&b, "k", GGUF_STRING), put_number(&b, UINT64_MAX - 7, 8), put(&b, rest, 64);
    refused(&b, "k is said to have");
    put_head(&b, 3, 0, 1), put_key(&b, "k", GGUF_BOOL), put_number(&b, 2, 1), put(&b, rest, 64);
    refused(&b, "k: expected a bool of 0 or 1, found 2");
    static const struct {
        uint32_t type;
        uint64_t n;
        const char *expected;
    } arrays[] = {
        {GGUF_U8, UINT64_MAX, "more than the file can hold"}, {GGUF_U64, 1ull << 61, "more than the file can hold"},
        {GGUF_STRING, 1ull << 61, "more than the file can"},  {GGUF_STRING, 100, "more than the file can hold"},
        {GGUF_F32, 17, "more than the file can hold"},        {GGUF_ARRAY, 0, "arrays of arrays"},
        {13, 1, "unknown type 13 of array elements"},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        put_head(&b, 3, 0, 1), put_key(&b, "k", GGUF_ARRAY), put_number(&b, arrays[i].type, 4);
        put_number(&b, arrays[i].n, 8), put(&b, rest, 64);
        refused(&b, arrays[i].expected);
    }
    put_head(&b, 3, 0, 1), put_key(&b, "k", GGUF_ARRAY), put_number(&b, GGUF_BOOL, 4), put_number(&b, 1, 8);
    put_number(&b, 7, 1), refused(&b, "k: expected bools of 0 or 1, found 7");
    put_head(&b, 3, 0, 1), put_key(&b, "k", GGUF_ARRAY), put_number(&b, GGUF_STRING, 4), put_number(&b, 1, 8);
    put_number(&b, UINT64_MAX, 8), refused(&b, "k is said to have 18446744073709551615 bytes");
    put_head(&b, 3, 0, 2), put_key(&b, "k", GGUF_U32), put_number(&b, 1, 4), put_key(&b, "k", GGUF_U32);
    put_number(&b, 1, 4), refused(&b, "the metadata key k stands there twice");
    put_head(&b, 3, 0, 1), put_key(&b, "split.count", GGUF_U16), put_number(&b, 3, 2),
        refused(&b, "split into 3 files");
    buffer_free(&b);
}

static void one_tensor(struct buffer *b, uint32_t rank, const uint64_t *dims, uint32_t type, uint64_t offset) {
    put_head(b, 3, 1, 0);
    put_tensor(b, "t", rank, dims, type, offset);
    put_data(b, 256);
}

static void test_bad_tensors(void **state) {
    (void)state;
    static const struct {
        uint32_t rank, type;
        uint64_t dims[9], offset;
        const char *expected;
    } cases[] = {
        {0, F32, {0}, 0, "expected 1 to 4 dimensions, found 0"},
        {5, F32, {1, 1, 1, 1, 1}, 0, "expected 1 to 4 dimensions, found 5"},
        {9, F32, {1, 1, 1, 1, 1, 1, 1, 1, 1}, 0, "found 9"},
        {1, F32, {0}, 0, "dimension 0 is zero"},
        {2, F32, {4, 0}, 0, "dimension 1 is zero"},
        {1, F32, {1ull << 63}, 0, "overflows"},
        {1, F32, {1ull << 62}, 0, "overflows"},                      // x 4 bytes = 0
        {2, F32, {1ull << 32, 1ull << 32}, 0, "overflows"},          // product 0
        {2, F32, {(1ull << 32) + 1, (1ull << 32) + 1}, 0, "overfl"}, // product small
        {4, F32, {1ull << 16, 1ull << 16, 1ull << 16, 1ull << 14}, 0, "overflows"},
        {2, Q8_0, {32, 1ull << 58}, 0, "takes 9799832789158199296 bytes"},
        {1, Q8_0, {31}, 0, "no whole number of Q8_0 blocks of 32"},
        {2, Q8_0, {16, 2}, 0, "no whole number of Q8_0 blocks of 32"},
        {1, F32, {65}, 0, "takes 260 bytes"},
        {1, F32, {1}, 256, "takes 4 bytes at byte 256"},
        {1, F32, {1}, UINT64_MAX - 3, "takes 4 bytes"},
        {1, F32, {1}, UINT64_MAX - 31, "takes 4 bytes"},
        {1, F32, {1}, 4, "offset 4 is no multiple of the alignment 32"},
        {1, IQ2_XXS, {256}, 0, "type IQ2_XXS is not supported (supported: F32 F16 Q4_0"},
        {1, MXFP4, {256}, 0, "type MXFP4 is not supported"},
        {1, 31, {256}, 0, "unknown type number 31"},
        {1, UINT32_MAX, {256}, 0, "unknown type number 4294967295"},
    };
    struct buffer b = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        one_tensor(&b, cases[i].rank, cases[i].dims, cases[i].type, cases[i].offset);
        refused(&b, cases[i].expected);
    }
    uint64_t dims[] = {9}; // 36 bytes
    put_head(&b, 3, 2, 0);
    put_tensor(&b, "x", 1, dims, F32, 0), put_tensor(&b, "y", 1, dims, F32, 32), put_data(&b, 256);
    refused(&b, "the tensors x and y overlap");
    put_head(&b, 3, 2, 0);
    put_tensor(&b, "x", 1, dims, F32, 64), put_tensor(&b, "y", 1, dims, F32, 64), put_data(&b, 256);
    refused(&b, "overlap");
    put_head(&b, 3, 2, 0);
    put_tensor(&b, "x", 1, dims, F32, 0), put_tensor(&b, "x", 1, dims, F32, 64), put_data(&b, 256);
    refused(&b, "tensor x stands there twice");
    buffer_free(&b);
}

static void test_alignment(void **state) {
    (void)state;
    static const struct {
        uint32_t alignment;
        const char *expected; // NULL: good
    } cases[] = {
        {0, "expected a power of two, found 0"},
        {24, "expected a power of two, found 24"},
        {8, NULL},
        {64, "truncated"},
        {1u << 31, "truncated"},
    };
    struct buffer b = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_head(&b, 3, 1, 1);
        put_key(&b, "general.alignment", GGUF_U32), put_number(&b, cases[i].alignment, 4);
        put_tensor(&b, "t", 1, (uint64_t[]){1}, F32, 0);
        while (b.len % 8) put_number(&b, 0, 1);
        put_number(&b, 0x3F800000, 4);
        struct gguf g;
        struct error err = {0};
        void *copy;
        if (cases[i].expected) {
            refused(&b, cases[i].expected);
        } else {
            if (!parse(b.data, b.len, &g, &copy, &err)) fail_msg("%s", err.text);
            assert_int_equal((const char *)g.tensors.tensors[0].data - (const char *)copy, b.len - 4);
            gguf_close(&g);
            free(copy);
        }
    }
    put_head(&b, 3, 0, 1), put_key(&b, "general.alignment", GGUF_STRING), put_string(&b, "32");
    refused(&b, "general.alignment: expected an integer, found string");
    buffer_free(&b);
}

// Good files with bytes overwritten at random: whatever the answer, no bad read, no leak (the sanitizers' to say).
static void test_random_damage(void **state) {
    (void)state;
    struct buffer b = {0};
    put_good(&b, 3);
    uint32_t seed = 1;
    size_t n_accepted = 0;
    for (int round = 0; round < 20000; round++) {
        char *copy = malloc(b.len);
        assert_non_null(copy);
        memcpy(copy, b.data, b.len);
        for (int i = 0; i <= round % 3; i++) {
            seed = seed * 1664525u + 1013904223u;
            copy[seed / 7 % b.len] = (char)(seed >> 24);
        }
        struct gguf g;
        if (gguf_parse(copy, b.len, "file", &g, NULL)) {
            n_accepted++;
            gguf_close(&g);
        }
        free(copy);
    }
    assert_true(n_accepted > 100 && n_accepted < 20000); // damage to data and values goes unseen, to structure not
    buffer_free(&b);
}

static void test_open(void **state) {
    (void)state;
    char folder[] = "/tmp/tandem-gguf-XXXXXX";
    assert_non_null(mkdtemp(folder));
    struct buffer b = {0}, path = {0};
    struct gguf g;
    struct error err = {0};
    assert_true(buffer_printf(&path, "%s/m.gguf", folder));
    assert_false(gguf_open(path.data, &g, &err));
    assert_non_null(strstr(err.text, "cannot open"));
    assert_true(file_write(path.data, "", 0, &err));
    assert_false(gguf_open(path.data, &g, &err));
    assert_non_null(strstr(err.text, "truncated: the magic number"));
    put_good(&b, 3);
    assert_true(file_write(path.data, b.data, b.len, &err));
    assert_true(gguf_open(path.data, &g, &err));
    assert_string_equal(g.tensors.tensors[0].file, path.data);
    gguf_close(&g);
    assert_false(gguf_open(folder, &g, &err));
    assert_non_null(strstr(err.text, "is not a regular file"));
    remove(path.data);
    remove(folder);
    buffer_free(&b);
    buffer_free(&path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),      cmocka_unit_test(test_values),        cmocka_unit_test(test_truncation),
        cmocka_unit_test(test_head),      cmocka_unit_test(test_bad_values),    cmocka_unit_test(test_bad_tensors),
        cmocka_unit_test(test_alignment), cmocka_unit_test(test_random_damage), cmocka_unit_test(test_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
