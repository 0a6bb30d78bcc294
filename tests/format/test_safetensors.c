// test_safetensors.c: what the reader of safetensors accepts, what it refuses and with which words, and the writer.
#include "base/buffer.h"
#include "base/file.h"
#include "format/safetensors.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[] = "/tmp/tandem-safetensors-XXXXXX";

static const char *in_folder(const char *name) {
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void put(const char *name, const void *bytes, size_t n) {
    struct error err;
    if (!file_write(in_folder(name), bytes, n, &err)) fail_msg("%s", err.text);
}

// A file of a header and `n_data` bytes of data 0, 1, 2, ...; `length` overrides the header's length.
static void build(struct buffer *file, const char *header, size_t n_header, uint64_t length, size_t n_data) {
    buffer_clear(file);
    for (int i = 0; i < 8; i++) assert_true(buffer_append_byte(file, (char)(unsigned char)(length >> (8 * i))));
    assert_true(buffer_append(file, header, n_header));
    for (size_t i = 0; i < n_data; i++) assert_true(buffer_append_byte(file, (char)(unsigned char)i));
}

// Parses from a block of exactly the right size, so that a sanitizer sees any read past the end.
static bool parse(const struct buffer *file, struct error *err) {
    struct tensor_set set;
    void *exact = malloc(file->len ? file->len : 1);
    assert_non_null(exact);
    if (file->len) memcpy(exact, file->data, file->len);
    bool ok = safetensors_parse(exact, file->len, "x", &set, err);
    if (ok) tensor_set_free(&set);
    free(exact);
    return ok;
}

static void refused_bytes(const char *header, size_t n_header, size_t n_data, const char *words) {
    struct buffer file = {0};
    struct error err = {""};
    build(&file, header, n_header, n_header, n_data);
    if (parse(&file, &err)) fail_msg("accepted: %s", header);
    if (!strstr(err.text, words)) fail_msg("expected \"%s\" in: %s", words, err.text);
    if (strncmp(err.text, "x: ", 3) != 0) fail_msg("no file name in: %s", err.text);
    buffer_free(&file);
}

static void refused(const char *header, size_t n_data, const char *words) {
    refused_bytes(header, strlen(header), n_data, words);
}

static void accepted(const char *header, size_t n_data) {
    struct buffer file = {0};
    struct error err = {""};
    build(&file, header, strlen(header), strlen(header), n_data);
    if (!parse(&file, &err)) fail_msg("%s", err.text);
    buffer_free(&file);
}

#define GOOD                                                                                                           \
    "{\"__metadata__\":{\"format\":\"pt\"},\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[4,16]},"        \
    "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}  "
enum { GOOD_DATA = 16 };

static void test_good(void **state) {
    (void)state;
    struct buffer file = {0};
    struct tensor_set set;
    struct error err = {""};
    char text[64];
    build(&file, GOOD, strlen(GOOD), strlen(GOOD), GOOD_DATA);
    if (!safetensors_parse(file.data, file.len, "x", &set, &err)) fail_msg("%s", err.text);
    assert_int_equal(set.n, 2);
    assert_string_equal(set.tensors[0].name, "a");
    const struct tensor *b = tensor_find(&set, "b");
    assert_non_null(b);
    assert_int_equal(b->type, DTYPE_BF16);
    assert_int_equal(b->n_elements, 6);
    assert_int_equal(b->n_bytes, 12);
    assert_string_equal(tensor_shape_text(b, text, sizeof text), "[2, 3]");
    assert_int_equal(*(const unsigned char *)b->data, 4);
    assert_null(tensor_find(&set, "c"));
    tensor_set_free(&set);
    buffer_free(&file);
    accepted("{}", 0);
    accepted("{\"s\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[0,8]}}", 8);
    accepted("{\"z\":{\"dtype\":\"F32\",\"shape\":[0,9],\"data_offsets\":[4,4]},"
             "\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}",
             4);
    accepted("{\"odd\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
             "\"f\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[1,5]}}",
             5);
}

static void test_truncation(void **state) {
    (void)state;
    struct buffer file = {0};
    build(&file, GOOD, strlen(GOOD), strlen(GOOD), GOOD_DATA);
    size_t whole = file.len;
    for (size_t n = 0; n < whole; n++) { // every byte, the tensors' borders among them
        struct error err = {""};
        file.len = n;
        assert_false(parse(&file, &err));
        assert_true(strlen(err.text) > 3);
    }
    file.len = whole;
    assert_true(buffer_append_byte(&file, 0));
    struct error err = {""};
    assert_false(parse(&file, &err));
    assert_non_null(strstr(err.text, "16 bytes"));
    buffer_free(&file);
}

static void test_header_length(void **state) {
    (void)state;
    static const uint64_t lengths[] = {UINT64_MAX, UINT64_MAX - 7, 1ull << 63, 100000001, 100000000, 3, 0};
    struct buffer file = {0};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        struct error err = {""};
        build(&file, "{}", 2, lengths[i], 0);
        assert_false(parse(&file, &err));
        const char *words = lengths[i] > 100000000 ? "limit" : lengths[i] == 0 ? "begin with '{'" : "truncated";
        if (!strstr(err.text, words)) fail_msg("%llu: %s", (unsigned long long)lengths[i], err.text);
    }
    buffer_free(&file);
}

#define ENTRY(shape, offsets) "{\"a\":{\"dtype\":\"U8\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static void test_bad_json(void **state) {
    (void)state;
    refused("[]", 0, "begin with '{'");
    refused(" {}", 0, "begin with '{'");
    refused("{", 0, "line 1");
    refused("{}}", 0, "line 1");
    refused("{\"a\xff\":{}}", 0, "decode byte 0xff");
    refused("{\"a\\u0000b\":{}}", 0, "NUL");
    refused_bytes("{\"a\0b\":1}", 9, 0, "line 1");
    refused("{\"a\":1}", 0, "a");
    refused("{\"a\":{}}", 0, "dtype");
    refused("{\"a\":{},\"a\":{}}", 0, "duplicate");
    refused("{\"a\":{},\"\\u0061\":{}}", 0, "duplicate");
    refused("{\"__metadata__\":{},\"__metadata__\":{}}", 0, "duplicate");
    refused("{\"__metadata__\":[]}", 0, "__metadata__");
    refused("{\"__metadata__\":{\"k\":1}}", 0, "\"k\"");
    struct buffer deep = {0};
    assert_true(buffer_append_text(&deep, "{\"a\":"));
    for (int i = 0; i < 100000; i++) assert_true(buffer_append_byte(&deep, '['));
    refused(buffer_text(&deep), 0, "depth");
    buffer_free(&deep);
}

static void test_bad_numbers(void **state) {
    (void)state;
    static const char *const bad[] = {"1e400", "-1", "1.5",  "1.0",  "18446744073709551616",
                                      "null",  "[]", "true", "\"1\""};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[256];
        snprintf(text, sizeof text, ENTRY("[%s]", "[0,1]"), bad[i]);
        refused(text, 1, i == 0 || i == 4 ? "line 1" : "a");
        snprintf(text, sizeof text, ENTRY("[1]", "[0,%s]"), bad[i]);
        refused(text, 1, i == 0 || i == 4 ? "line 1" : "data_offsets");
        snprintf(text, sizeof text, ENTRY("[1]", "[%s,1]"), bad[i]);
        refused(text, 1, i == 0 || i == 4 ? "line 1" : "data_offsets");
    }
    refused(ENTRY("[1]", "[0,9007199254740993]"), 1, "9007199254740993"); // 2^53 + 1, not rounded
    refused(ENTRY("[1]", "[0]"), 1, "data_offsets");
    refused(ENTRY("[1]", "[0,1,1]"), 1, "data_offsets");
    refused(ENTRY("1", "[0,1]"), 1, "shape");
    refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "data_offsets");
}

static void test_bad_sizes(void **state) {
    (void)state;
    refused(ENTRY("[9223372036854775807]", "[0,1]"), 1, "a");
    refused(ENTRY("[4294967296,4294967296]", "[0,0]"), 0, "overflow"); // 2^64 wraps to 0
    refused(ENTRY("[4294967297,4294967297,4294967297]", "[0,1]"), 1, "overflow");
    refused("{\"a\":{\"dtype\":\"F64\",\"shape\":[2305843009213693952],\"data_offsets\":[0,0]}}", 0, "overflow");
    refused(ENTRY("[2]", "[0,1]"), 1, "data_offsets");
    refused(ENTRY("[0]", "[0,1]"), 1, "data_offsets");
    refused(ENTRY("[1,1,1,1,1,1,1,1,1]", "[0,1]"), 1, "9 dimensions");
    accepted(ENTRY("[1,1,1,1,1,1,1,1]", "[0,1]"), 1);
    refused("{\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "F8_E4M3");
    refused("{\"a\":{\"dtype\":\"Q8_0\",\"shape\":[32],\"data_offsets\":[0,34]}}", 34, "BF16"); // lists what is known
    refused("{\"a\":{\"dtype\":\"f32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "f32");
    refused("{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "dtype");
}

#define PAIR(a, b)                                                                                                     \
    "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" a "},\"b\":{\"dtype\":\"U8\",\"shape\":[4],"            \
    "\"data_offsets\":" b "}}"

static void test_bad_places(void **state) {
    (void)state;
    accepted(PAIR("[0,4]", "[4,8]"), 8);
    accepted(PAIR("[4,8]", "[0,4]"), 8);
    refused(PAIR("[4,0]", "[4,8]"), 8, "reversed");
    refused(PAIR("[0,4]", "[2,6]"), 6, "overlap");
    refused(PAIR("[0,4]", "[0,4]"), 4, "overlap");
    refused(PAIR("[0,4]", "[5,9]"), 9, "gap");
    refused(PAIR("[1,5]", "[5,9]"), 9, "gap");
    refused(PAIR("[0,4]", "[4,8]"), 7, "truncated");
    refused(PAIR("[0,4]", "[4,8]"), 9, "9");
    refused(PAIR("[0,4]", "[9223372036854775803,9223372036854775807]"), 8, "truncated");
}

// ---- folders -------------------------------------------------------------------------------------------------------

static void put_shard(const char *file, const char *tensor) {
    char header[256];
    struct buffer bytes = {0};
    snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", tensor);
    build(&bytes, header, strlen(header), strlen(header), 4);
    put(file, bytes.data, bytes.len);
    buffer_free(&bytes);
}

static void folder_refused(const char *index, const char *words) {
    struct tensor_set set;
    struct error err = {""};
    put("model.safetensors.index.json", index, strlen(index));
    if (safetensors_open_folder(folder, &set, &err)) fail_msg("accepted: %s", index);
    if (!strstr(err.text, words)) fail_msg("expected \"%s\" in: %s", words, err.text);
}

static void test_folder(void **state) {
    (void)state;
    struct tensor_set set;
    struct error err = {""};
    assert_false(safetensors_open_folder(folder, &set, &err));
    assert_non_null(strstr(err.text, "neither"));

    put_shard("s1.safetensors", "a");
    put_shard("s2.safetensors", "b");
    static const char good[] = "{\"metadata\":{},\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"}}";
    put("model.safetensors.index.json", good, strlen(good));
    if (!safetensors_open_folder(folder, &set, &err)) fail_msg("%s", err.text);
    assert_int_equal(set.n, 2);
    assert_int_equal(set.n_maps, 2);
    assert_non_null(strstr(tensor_find(&set, "b")->file, "s2.safetensors"));
    tensor_set_free(&set);

    folder_refused("{}", "weight_map");
    folder_refused("{\"weight_map\":{}}", "no shard");
    folder_refused("{\"weight_map\":{\"a\":1}}", "no string");
    folder_refused("{\"weight_map\":{\"a\":\"../s1.safetensors\"}}", "plain file name");
    folder_refused("{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "plain file name");
    folder_refused("{\"weight_map\":{\"a\":\"..\"}}", "plain file name");
    folder_refused("{\"weight_map\":{\"a\":\"x\\\\y\"}}", "plain file name");
    folder_refused("{\"weight_map\":{\"a\":\"\"}}", "plain file name");
    folder_refused("{\"weight_map\":{\"a\":\"s3.safetensors\"}}", "missing");
    folder_refused("{\"weight_map\":{\"b\":\"s1.safetensors\"}}", "does not list");
    folder_refused("{\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s1.safetensors\"}}", "does not hold");
    folder_refused("{\"weight_map\":{\"b\":\"s1.safetensors\",\"a\":\"s2.safetensors\"}}", "places in");
    folder_refused("{\"weight_map\":{\"a\":\"s1.safetensors\"},\"weight_map\":{}}", "duplicate");
    put_shard("s2.safetensors", "a"); // the same tensor in both
    folder_refused("{\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"}}", "places in s1");

    put_shard("model.safetensors", "c"); // one file goes before an index
    if (!safetensors_open_folder(folder, &set, &err)) fail_msg("%s", err.text);
    assert_non_null(tensor_find(&set, "c"));
    tensor_set_free(&set);
    assert_false(safetensors_open(folder, &set, &err));
    assert_non_null(strstr(err.text, "regular file"));
}

// ---- the writer ----------------------------------------------------------------------------------------------------

static void test_write(void **state) {
    (void)state;
    static const float values[6] = {1, 2, 3, 4, 5, 6};
    static const unsigned char byte[1] = {9};
    struct tensor tensors[3] = {
        {.name = "a \"quoted\" name", .type = DTYPE_U8, .rank = 0, .n_bytes = 1, .data = byte},
        {.name = "z", .type = DTYPE_F32, .rank = 2, .shape = {2, 3}, .n_bytes = 24, .data = values},
        {.name = "empty", .type = DTYPE_I64, .rank = 1, .shape = {0}, .n_bytes = 0, .data = NULL},
    };
    const struct safetensors_meta meta[] = {{"tandem", "1"}, {"prompt", "line\n\"two\""}};
    struct tensor_set set;
    struct error err = {""};
    char path[256];
    snprintf(path, sizeof path, "%s", in_folder("written.safetensors"));
    if (!safetensors_write(path, tensors, 3, meta, 2, &err)) fail_msg("%s", err.text);
    if (!safetensors_open(path, &set, &err)) fail_msg("%s", err.text);
    assert_int_equal(set.n, 3);
    const struct tensor *z = tensor_find(&set, "z");
    assert_int_equal(z->shape[1], 3);
    assert_memory_equal(z->data, values, sizeof values);
    assert_int_equal(*(const unsigned char *)tensor_find(&set, "a \"quoted\" name")->data, 9);
    assert_int_equal(tensor_find(&set, "empty")->n_elements, 0);
    tensor_set_free(&set);

    tensors[1].n_bytes = 20;
    assert_false(safetensors_write(path, tensors, 3, NULL, 0, &err));
    assert_non_null(strstr(err.text, "z"));
    tensors[1].n_bytes = 24;
    tensors[2].name = "z";
    assert_false(safetensors_write(path, tensors, 3, NULL, 0, &err));
    tensors[2].name = "\xff";
    assert_false(safetensors_write(path, tensors, 3, NULL, 0, &err));
    tensors[2].name = "q";
    tensors[2].type = DTYPE_Q8_0;
    assert_false(safetensors_write(path, tensors, 3, NULL, 0, &err));
    assert_non_null(strstr(err.text, "Q8_0"));
    assert_true(safetensors_write(path, tensors, 0, NULL, 0, &err));
    assert_true(safetensors_open(path, &set, &err));
    assert_int_equal(set.n, 0);
    tensor_set_free(&set);
    assert_false(safetensors_write("/nonexistent/x.safetensors", tensors, 1, NULL, 0, &err));
    assert_non_null(strstr(err.text, "/nonexistent/x.safetensors"));
}

// A file that shrinks while it is mapped reads as zeros and trips the guard.
static void test_truncated_while_mapped(void **state) {
    (void)state;
    enum { N = 1 << 20 };
    char *data = calloc(N, 1), path[256];
    assert_non_null(data);
    memset(data, 7, N);
    struct tensor t = {.name = "t", .type = DTYPE_U8, .rank = 1, .shape = {N}, .n_bytes = N, .data = data};
    struct tensor_set set;
    struct error err = {""};
    snprintf(path, sizeof path, "%s", in_folder("shrinks.safetensors"));
    assert_true(safetensors_write(path, &t, 1, NULL, 0, &err));
    assert_true(safetensors_open(path, &set, &err));
    file_guard_install();
    assert_int_equal(((const volatile unsigned char *)set.tensors[0].data)[N - 1], 7);
    assert_int_equal(truncate(path, 4096), 0);
    assert_false(file_guard_tripped());
    assert_int_equal(((const volatile unsigned char *)set.tensors[0].data)[N - 1], 0);
    assert_true(file_guard_tripped());
    tensor_set_free(&set);
    free(data);
}

static int make_folder(void **state) {
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    (void)state;
    static const char *const names[] = {"s1.safetensors",      "s2.safetensors",
                                        "model.safetensors",   "model.safetensors.index.json",
                                        "written.safetensors", "shrinks.safetensors"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) unlink(in_folder(names[i]));
    return rmdir(folder);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),       cmocka_unit_test(test_truncation),
        cmocka_unit_test(test_bad_json),   cmocka_unit_test(test_header_length),
        cmocka_unit_test(test_bad_sizes),  cmocka_unit_test(test_bad_numbers),
        cmocka_unit_test(test_bad_places), cmocka_unit_test(test_folder),
        cmocka_unit_test(test_write),      cmocka_unit_test(test_truncated_while_mapped),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
