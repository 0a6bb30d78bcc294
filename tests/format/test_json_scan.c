// test_json_scan.c: JSON read in place: held against jansson's tree on good, broken and random texts, and the words of
// its refusals.
#include "scan_tree.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <cmocka.h>

static void agree(const char *text, size_t n) {
    const char *why;
    void *exact = malloc(n ? n : 1); // of exactly this size, so that a sanitizer sees any read past the end
    assert_non_null(exact);
    if (n) memcpy(exact, text, n);
    if (!scan_agrees(exact, n, &why)) {
        for (size_t i = 0; i < n; i++) print_error("%02x ", (unsigned char)text[i]);
        fail_msg("%s: %.*s", why, (int)n, text);
    }
    free(exact);
}

static const char *const documents[] = {
    "{}",
    "[]",
    " [ ] ",
    "{\"a\":1}",
    "{\"a\":[1,2,{\"b\":null}],\"c\":true,\"d\":false}\n",
    "[0,-0,-1,9223372036854775807,-9223372036854775808,9223372036854775808,-9223372036854775809]",
    "[9223372036854775807,-9223372036854775808,-0,12]",
    "[0.5,-1e-3,1E+2,0e0,1e308,2.2250738585072014e-308,1e-400]",
    "[1e400]",
    "[-1e999]",
    "[01]",
    "[-]",
    "[1.]",
    "[.5]",
    "[+1]",
    "[1e]",
    "[1e+]",
    "[0x1]",
    "[1 2]",
    "[1,]",
    "[,1]",
    "{\"a\"}",
    "{\"a\":}",
    "{\"a\":1,}",
    "{,}",
    "{a:1}",
    "{'a':1}",
    "{\"a\":1 \"b\":2}",
    "{1:2}",
    "[1}",
    "{\"a\":1]",
    "[tru]",
    "[nul",
    "[nullx]",
    "[True]",
    "[NaN]",
    "[\"a\\u0000b\"]",
    "{\"a\\u0000\":1}",
    "[\"\\ud83d\\ude00\"]",
    "[\"\\ud83d\"]",
    "[\"\\ude00\"]",
    "[\"\\ud83dx\"]",
    "[\"\\ud83d\\u0041\"]",
    "[\"\\u12\"]",
    "[\"\\u123g\"]",
    "[\"\\x\"]",
    "[\"\\",
    "[\"",
    "[\"\\\"",
    "[\"tab\there\"]",
    "[\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\"]",
    "[\"\xff\"]",
    "[\"\xc0\xaf\"]",
    "[\"\xed\xa0\x80\"]",
    "[\"\xf5\x80\x80\x80\"]",
    "[\"\xe2\x82\"]",
    "\xef\xbb\xbf{}",
    "{\"a\":1,\"a\":2}",
    "{\"a\":1,\"\\u0061\":2}",
    "{\"\\u0061\":1,\"\\u0061b\":2}",
    "{\"a\":{\"a\":{\"a\":1}}}",
    "{\"a\":{\"b\":1,\"c\":2,\"b\":3}}",
    "{\"\":1,\"\":2}",
    "{\"\\\"\":1,\"\\\\\":2}",
    "[{\"a\":1},{\"a\":1}]",
    "{} {}",
    "[]]",
    "",
    " ",
    "{",
    "[",
    "[[",
    "{\"a\":[",
    "1",
    "\"a\"",
    "null",
    "/**/{}",
    "{}//",
    "[1,\n2,\r\n3,\t4]",
    "{\"a]\":\"}\",\"b\":[\"[\",\"\\\\\"]}",
    "[\"\\/\\b\\f\\n\\r\\t\"]",
    "[\f1]",
    "[\"\x7f\"]",
};
enum { N_DOCUMENTS = sizeof documents / sizeof *documents };

static void test_documents(void **state) {
    (void)state;
    for (size_t i = 0; i < N_DOCUMENTS; i++) {
        size_t n = strlen(documents[i]);
        for (size_t length = 0; length <= n; length++) agree(documents[i], length); // cut at every byte, too
    }
    agree("[\"a\0b\"]", 7);
    agree("{\"a\0\":1}", 8);
    agree("[1]\0", 4);
}

static uint32_t draw(uint64_t *seed) {
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*seed >> 33);
}

// Random damage to good texts, and random sequences of pieces.
static void test_random(void **state) {
    (void)state;
    static const char *const pieces[] = {"{",     "}",           "[",  "]",       ",",    ":",    "\"a\"",
                                         "\"b\"", "\"\\u0061\"", "1",  "-2.5e1",  "null", "true", " ",
                                         "\n",    "\"",          "\\", "{\"a\":", "[[",   "]]",   "\xc3\xa9"};
    uint64_t seed = 1;
    char text[256];
    for (int round = 0; round < 200000; round++) {
        size_t n = 0;
        if (round % 2) {
            for (uint32_t k = draw(&seed) % 12; k > 0; k--) {
                const char *piece = pieces[draw(&seed) % (sizeof pieces / sizeof *pieces)];
                memcpy(text + n, piece, strlen(piece));
                n += strlen(piece);
            }
        } else {
            const char *document = documents[draw(&seed) % N_DOCUMENTS];
            n = strlen(document);
            memcpy(text, document, n);
            for (uint32_t k = draw(&seed) % 3; n > 0 && k > 0; k--)
                text[draw(&seed) % n] = "{}[],:\"\\0159.-+eu tn\n\xe9"[draw(&seed) % 23];
        }
        agree(text, n);
    }
}

static void refused(const char *text, const char *words) {
    struct error err = {""};
    if (json_scan_check(text, strlen(text), "f.json", &err)) fail_msg("accepted: %s", text);
    if (!strstr(err.text, words)) fail_msg("expected \"%s\" in: %s", words, err.text);
    assert_int_equal(strncmp(err.text, "f.json: line ", 13), 0);
    assert_false(json_scan_check(text, strlen(text), "f.json", NULL)); // nobody asked why
}

static void test_words(void **state) {
    (void)state;
    refused("{\"a\":1,\n \"a\":2}", "line 2, column 2: not valid JSON: duplicate object key \"a\"");
    refused("{\"x\":{\"\\u0061\":1,\"b\":1,\"a\":1}}", "line 1, column 24: not valid JSON: duplicate object key \"a\"");
    refused("[1,\n\n  x]", "line 3, column 3: not valid JSON: a value was expected");
    refused("[99999999999999999999]", "too big integer");
    refused("[1e400]", "real number overflow");
    refused("[1.x]", "decimal point");
    refused("[1e]", "exponent");
    refused("[-]", "number");
    refused("[\"\\q\"]", "unknown escape");
    refused("[\"\\u00\"]", "hexadecimal");
    refused("[\"\\u0000\"]", "NUL");
    refused("[\"\\ud800\"]", "surrogate");
    refused("[\"a\nb\"]", "control character");
    refused("[\"\xff\"]", "byte 0xff");
    refused("[\"abc", "line 1, column 2: not valid JSON: a string without an end");
    refused("{1:2}", "a key in quotes");
    refused("{\"a\" 1}", "':'");
    refused("{\"a\":1 2}", "',' or '}'");
    refused("[1 2]", "',' or ']'");
    refused("[1] 2", "after the end");
    refused("[1,", "the text ends where a value was expected");
}

static void test_depth(void **state) {
    (void)state;
    struct buffer text = {0};
    for (int depth = JSON_SCAN_MAX_DEPTH; depth <= JSON_SCAN_MAX_DEPTH + 1; depth++) {
        buffer_clear(&text);
        for (int i = 0; i < depth; i++) assert_true(buffer_append_byte(&text, '['));
        for (int i = 0; i < depth; i++) assert_true(buffer_append_byte(&text, ']'));
        struct error err = {""};
        bool ok = json_scan_check(buffer_text(&text), text.len, "f", &err);
        assert_int_equal(ok, depth == JSON_SCAN_MAX_DEPTH);
        if (!ok) assert_non_null(strstr(err.text, "depth"));
    }
    buffer_free(&text);
}

// 300,000 keys, of which two are equal and far apart; and keys that differ in nothing but an escape's spelling.
static void test_many_keys(void **state) {
    (void)state;
    struct buffer text = {0};
    struct error err = {""};
    assert_true(buffer_append_byte(&text, '{'));
    for (int i = 0; i < 300000; i++) assert_true(buffer_printf(&text, "\"key%d\":%d,", i, i));
    size_t good = text.len;
    assert_true(buffer_append_text(&text, "\"last\":0}"));
    if (!json_scan_check(buffer_text(&text), text.len, "f", &err)) fail_msg("%s", err.text);
    text.len = good;
    assert_true(buffer_append_text(&text, "\"k\\u0065y0\":0}"));
    assert_false(json_scan_check(buffer_text(&text), text.len, "f", &err));
    assert_non_null(strstr(err.text, "duplicate object key \"key0\""));
    buffer_free(&text);
}

static void test_sizes(void **state) {
    (void)state;
    static const struct {
        const char *text;
        bool good;
        size_t value;
    } cases[] = {{"0", true, 0},    {" 17 ", true, 17},  {"9223372036854775807", true, 9223372036854775807u},
                 {"-0", true, 0},   {"-1", false, 0},    {"1.0", false, 0},
                 {"1e2", false, 0}, {"\"1\"", false, 0}, {"null", false, 0},
                 {"[]", false, 0},  {"", false, 0},      {"99999999999999999999", false, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct json_cursor c = {cases[i].text, strlen(cases[i].text), 0};
        size_t value = 42;
        assert_int_equal(json_cursor_size(&c, &value), cases[i].good);
        assert_int_equal(value, cases[i].good ? cases[i].value : 42);
    }
}

// A text that changes after the check (a mapped file that is written to): every walk still ends inside it.
static void test_changed_text(void **state) {
    (void)state;
    static const char good[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,2]},\"b\\u0061\":[1.5,null]}";
    uint64_t seed = 2;
    for (int round = 0; round < 20000; round++) {
        size_t n = sizeof good - 1;
        char *text = malloc(n);
        assert_non_null(text);
        memcpy(text, good, n);
        for (int k = 0; k < 4; k++) text[draw(&seed) % n] = "{}[],:\"\\u0 \xff\0"[draw(&seed) % 13];
        struct json_cursor c = {text, n, 0};
        struct buffer key = {0};
        size_t members = 0, size;
        for (json_cursor_enter(&c); json_cursor_more(&c); members++) {
            assert_true(json_cursor_key(&c, &key));
            if (!json_cursor_size(&c, &size)) json_cursor_skip(&c);
            assert_true(c.at <= n && members <= n);
        }
        buffer_free(&key);
        free(text);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_documents),    cmocka_unit_test(test_random),    cmocka_unit_test(test_words),
        cmocka_unit_test(test_depth),        cmocka_unit_test(test_many_keys), cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_changed_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
