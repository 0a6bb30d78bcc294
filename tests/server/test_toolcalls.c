// test_toolcalls.c: tool calls are found however the text is cut, and what is no call stays text, to the byte.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "server/jsonscan.h"
#include "server/toolcalls.h"

// What a parser reported, as one text: plain text as it is, a call as [name|arguments].
struct seen {
    struct buffer out;
    int pieces;
};

static void on_text(void *user, const char *text, size_t n) {
    buffer_append(&((struct seen *)user)->out, text, n);
}

static void on_begin(void *user, const char *name) {
    buffer_printf(&((struct seen *)user)->out, "[%s|", name);
}

static void on_arguments(void *user, const char *text, size_t n) {
    struct seen *s = user;
    s->pieces++;
    buffer_append(&s->out, text, n);
}

static void on_end(void *user) {
    buffer_append_byte(&((struct seen *)user)->out, ']');
}

static bool on_known(void *user, const char *name) {
    (void)user;
    return strcmp(name, "f") == 0 || strcmp(name, "get \"it\"") == 0;
}

// Feeds `text` in pieces of `step` bytes.
static struct seen parse(const char *text, size_t step, bool incremental, char *malformed, size_t size) {
    struct seen s = {0};
    struct toolcalls_sink sink = {on_text, on_begin, on_arguments, on_end, on_known, &s};
    struct toolcalls *t = toolcalls_create(&sink, incremental, NULL);
    size_t n = strlen(text);
    for (size_t i = 0; i < n; i += step) assert_true(toolcalls_feed(t, text + i, n - i < step ? n - i : step));
    assert_true(toolcalls_finish(t));
    if (malformed) snprintf(malformed, size, "%s", toolcalls_malformed(t) ? toolcalls_malformed(t) : "");
    toolcalls_free(t);
    return s;
}

#define OPEN "<tool_call>\n"
#define CLOSE "\n</tool_call>"

static void finds_calls(void **state) {
    (void)state;
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"plain text", "plain text"},
        {"", ""},
        {"a < b <tool <tool_callx> \n c ", "a < b <tool <tool_callx> \n c "},
        {OPEN "{\"name\": \"f\", \"arguments\": {\"a\": 1}}" CLOSE, "[f|{\"a\": 1}]"},
        {OPEN "{\"name\": \"f\", \"arguments\": {}}" CLOSE, "[f|{}]"},
        {"<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>", "[f|{}]"},
        {"I look.\n" OPEN "{\"name\": \"f\", \"arguments\": {\"a\": {\"b\": [1, {}]}}}" CLOSE "\n",
         "I look.[f|{\"a\": {\"b\": [1, {}]}}]"},
        {OPEN "{\"name\": \"f\", \"arguments\": {}}" CLOSE "\n" OPEN
              "{\"name\": \"f\", \"arguments\": {\"x\": \"\"}}" CLOSE,
         "[f|{}][f|{\"x\": \"\"}]"},
        {OPEN "{\"arguments\": {\"a\": \"}\\\"</tool_call>\"}, \"name\": \"f\"}" CLOSE,
         "[f|{\"a\": \"}\\\"</tool_call>\"}]"},
        {OPEN "{\"id\": [1, \"name\"], \"name\": \"get \\\"it\\\"\", \"arguments\": {\"\\u00e9\": \"\xC3\xA9\"}, "
              "\"z\": {\"name\": 3}}" CLOSE " done",
         "[get \"it\"|{\"\\u00e9\": \"\xC3\xA9\"}] done"},
        // what comes twice: the first, as a stream has told it already
        {OPEN "{\"name\": \"f\", \"arguments\": {\"x\": [1, \"}\"]}, \"arguments\": {\"y\": [2]}}" CLOSE,
         "[f|{\"x\": [1, \"}\"]}]"},
        {OPEN "{\"name\": \"f\", \"arguments\": {\"x\": {}} , \"name\": \"g\", \"z\": [{}]}" CLOSE, "[f|{\"x\": {}}]"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (size_t step = 1; step < 60; step += step < 4 ? 1 : 13)
            for (int incremental = 0; incremental < 2; incremental++) {
                char why[200];
                struct seen s = parse(cases[i].text, step, incremental, why, sizeof why);
                assert_string_equal(buffer_text(&s.out), cases[i].expected);
                assert_string_equal(why, "");
                buffer_free(&s.out);
            }
}

static void what_is_no_call_is_text(void **state) {
    (void)state;
    static const struct {
        const char *text, *why;
    } cases[] = {
        {OPEN "{\"name\": \"g\", \"arguments\": {}}" CLOSE, "no tool called \"g\""},
        {OPEN "not json" CLOSE, "no JSON object"},
        {OPEN "[1]" CLOSE, "no JSON object"},
        {OPEN "{\"name\": \"f\"}" CLOSE, "\"arguments\""},
        {OPEN "{\"arguments\": {}}" CLOSE, "\"name\""},
        {OPEN "{\"name\": 1, \"arguments\": {}}" CLOSE, "\"name\""},
        {OPEN "{\"name\": \"f\", \"arguments\": \"{}\"}" CLOSE, "\"arguments\""},
        {OPEN "{\"name\": \"f\", \"arguments\": {}} x" CLOSE, "</tool_call>"},
        {OPEN "{\"name\": \"f\", \"arguments\": {}}", "not finished"},
        {OPEN "{'name': 'f'}" CLOSE, "not valid JSON"},
        {OPEN, "not finished"},
        {"before\n" OPEN "{\"name\": \"g\", \"arguments\": {}}" CLOSE " after", "no tool"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (size_t step = 1; step < 60; step += 7) {
            char why[200];
            struct seen s = parse(cases[i].text, step, false, why, sizeof why);
            const char *expected = cases[i].text;
            if (strncmp(expected, "before\n", 7) == 0) { // the white space in front of the tag was given up already
                assert_memory_equal(buffer_text(&s.out), "before", 6);
                expected += 7;
                assert_string_equal(buffer_text(&s.out) + 6, expected);
            } else {
                assert_string_equal(buffer_text(&s.out), expected);
            }
            assert_non_null(strstr(why, cases[i].why));
            buffer_free(&s.out);
        }
}

static void arguments_come_as_they_are_written(void **state) {
    (void)state;
    const char *text = OPEN "{\"name\": \"f\", \"arguments\": {\"text\": \"a long text, word by word\"}}" CLOSE;
    struct seen s = parse(text, 5, true, NULL, 0);
    assert_true(s.pieces > 3);
    buffer_free(&s.out);
    s = parse(text, 5, false, NULL, 0);
    assert_int_equal(s.pieces, 1);
    buffer_free(&s.out);
    // Broken off in the middle: what was reported stays, the rest is text.
    char why[200];
    s = parse(OPEN "{\"name\": \"f\", \"arguments\": {\"a\": 1, oops", 1, true, why, sizeof why);
    assert_string_equal(buffer_text(&s.out), "[f|{\"a\": 1, ]oops");
    assert_non_null(strstr(why, "not valid JSON"));
    buffer_free(&s.out);
}

static bool scan(const char *text, bool *complete) {
    struct jsonscan s = {0};
    for (const char *p = text; *p; p++)
        if (!jsonscan_feed(&s, (unsigned char)*p)) return false;
    *complete = s.state == SCAN_DONE;
    return true;
}

static void scans_json(void **state) {
    (void)state;
    static const char *const whole[] = {"{}",
                                        "[]",
                                        " {\"a\" : [1, -2.5e+3, 0.1, 0, 1E5, true, false, null, \"\"]} ",
                                        "\"\\u00e9\\n\"",
                                        "[[[]]]",
                                        "{\"\":{\"\":[{}]}}",
                                        "\"\xF0\x9F\x98\x80\xC3\xA9\xE2\x82\xAC\"",
                                        "true"};
    static const char *const begun[] = {"",   "{",  "{\"a\"", "{\"a\":", "[1,",     "-",         "1",
                                        "1.", "1e", "1e-",    "tru",     "\"\\u12", "\"\xE2\x82"};
    static const char *const wrong[] = {
        "}",   "{,", "{a",         "{\"a\",",        "{\"a\":}", "[,",         "[1,]",  "{\"a\":1,}", "01",
        "1.e", "+1", ".5",         "nul1",           "\"\x01",   "\"\n",       "\"\\x", "\"\\u12g",   "{} {",
        "[1}", "{]", "\"\xC0\x80", "\"\xED\xA0\x80", "\"\xF5",   "\"\xE2\x28", "--",    "1-",         "truee",
        "'a'"};
    bool complete;
    for (size_t i = 0; i < sizeof whole / sizeof whole[0]; i++) assert_true(scan(whole[i], &complete) && complete);
    for (size_t i = 0; i < sizeof begun / sizeof begun[0]; i++) assert_true(scan(begun[i], &complete) && !complete);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) assert_false(scan(wrong[i], &complete));
    struct jsonscan deep = {0};
    for (int i = 0; i < JSONSCAN_DEPTH; i++) assert_true(jsonscan_feed(&deep, '['));
    assert_false(jsonscan_feed(&deep, '['));
}

// Random bytes and mutated calls: nothing is lost and nothing is invented.
static void random_text(void **state) {
    (void)state;
    static const char *const words[] = {"<tool_call>",
                                        "</tool_call>",
                                        "{\"name\": \"f\", \"arguments\": ",
                                        "{}",
                                        "}",
                                        "{",
                                        "\"",
                                        "\\",
                                        "\n",
                                        " ",
                                        "x",
                                        "<",
                                        "\"name\"",
                                        ":",
                                        ",",
                                        "1",
                                        "[",
                                        "]",
                                        "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>"};
    uint64_t rng = 9;
    for (int round = 0; round < 20000; round++) {
        char text[400] = "";
        size_t n = 0;
        for (int i = 0; i < 12; i++) {
            rng = rng * 6364136223846793005u + 1442695040888963407u;
            const char *w = words[(rng >> 33) % (sizeof words / sizeof words[0])];
            n += (size_t)snprintf(text + n, sizeof text - n, "%s", w);
            if (n > 350) break;
        }
        struct seen a = parse(text, 1, false, NULL, 0), b = parse(text, 1 + (size_t)(round % 17), false, NULL, 0);
        assert_string_equal(buffer_text(&a.out), buffer_text(&b.out));
        struct seen c = parse(text, 3, true, NULL, 0), d = parse(text, 64, true, NULL, 0);
        assert_string_equal(buffer_text(&c.out), buffer_text(&d.out));
        buffer_free(&a.out);
        buffer_free(&b.out);
        buffer_free(&c.out);
        buffer_free(&d.out);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(finds_calls), cmocka_unit_test(what_is_no_call_is_text),
                                       cmocka_unit_test(arguments_come_as_they_are_written),
                                       cmocka_unit_test(scans_json), cmocka_unit_test(random_text)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
