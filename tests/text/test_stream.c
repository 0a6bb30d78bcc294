// test_stream.c: stop strings, thinking and characters that arrive in pieces.
#include "text/stream.h"

#include "base/buffer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct got {
    struct buffer part[2];
};

static void collect(void *user, enum stream_part part, const char *text, size_t n) {
    struct got *g = user;
    assert_true(n > 0);
    assert_true(buffer_append(&g->part[part], text, n));
}

// Feeds `text` in pieces of `step` bytes and compares what came out.
static void check(const char *text, struct stream_options options, size_t step, const char *content,
                  const char *reasoning, const char *stop) {
    struct stream *s = stream_create(&options, NULL);
    assert_non_null(s);
    struct got g = {0};
    size_t n = strlen(text);
    for (size_t i = 0; i < n; i += step)
        assert_true(stream_feed(s, text + i, n - i < step ? n - i : step, collect, &g));
    assert_true(stream_finish(s, collect, &g));
    assert_string_equal(buffer_text(&g.part[STREAM_CONTENT]), content);
    assert_string_equal(buffer_text(&g.part[STREAM_REASONING]), reasoning);
    if (stop) assert_string_equal(stream_stop_text(s), stop);
    else assert_false(stream_stopped(s));
    buffer_free(&g.part[0]);
    buffer_free(&g.part[1]);
    stream_free(s);
}

static void every_step(const char *text, struct stream_options options, const char *content, const char *reasoning,
                       const char *stop) {
    for (size_t step = 1; step <= 12; step++) check(text, options, step, content, reasoning, stop);
    check(text, options, 1000, content, reasoning, stop);
}

static void test_characters(void **state) {
    (void)state;
    struct stream_options none = {0};
    every_step("h\xC3\xA9 \xF0\x9F\x98\x80!", none, "h\xC3\xA9 \xF0\x9F\x98\x80!", "", NULL);
    every_step("a\xFFz", none, "a\xEF\xBF\xBDz", "", NULL);
    every_step("a\xF0\x9Fz", none, "a\xEF\xBF\xBDz", "", NULL);
    every_step("a\xE2\x82", none, "a\xEF\xBF\xBD", "", NULL);
    every_step("\xED\xA0\x80", none, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD", "", NULL);
}

static void test_stops(void **state) {
    (void)state;
    const char *stops[] = {"abab", "\xC3\xA9nd", "aac"};
    struct stream_options o = {.stops = stops, .n_stops = 3};
    every_step("xababy", o, "x", "", "abab");
    every_step("xabaab", o, "xabaab", "", NULL);
    every_step("aaac", o, "a", "", "aac");
    every_step("the \xC3\xA9nd.", o, "the ", "", "\xC3\xA9nd");
    every_step("the \xC3\xA9n", o, "the \xC3\xA9n", "", NULL);
}

static void test_thinking(void **state) {
    (void)state;
    struct stream_options o = {.split_thinking = true}, open = {.split_thinking = true, .starts_in_thinking = true};
    every_step("<think>\nhm\n</think>\n\nyes", o, "yes", "hm", NULL);
    every_step("<think>\n\n</think>\n\nyes", o, "yes", "", NULL);
    every_step("no tags <think>", o, "no tags <think>", "", NULL);
    every_step("<thin", o, "<thin", "", NULL);
    every_step("hm</think>yes</think>", open, "yes</think>", "hm", NULL);
    every_step("<think>a</thin b", o, "", "a</thin b", NULL);
}

// The same by other means: the whole text at once.
static void reference(const char *text, struct stream_options o, struct buffer part[2], const char **stop) {
    size_t n = strlen(text), cut = n;
    *stop = NULL;
    for (size_t end = 1; end <= n && !*stop; end++)
        for (size_t j = 0; j < o.n_stops; j++) {
            size_t length = strlen(o.stops[j]);
            if (length > end || memcmp(text + end - length, o.stops[j], length) != 0) continue;
            if (*stop && length <= strlen(*stop)) continue;
            *stop = o.stops[j];
            cut = end - length;
        }
    char *copy = strndup(text, cut), *at = copy;
    bool inside = o.starts_in_thinking;
    if (o.split_thinking && !inside) {
        size_t space = strspn(at, " \n\t\r");
        inside = strncmp(at + space, "<think>", 7) == 0;
        if (inside) at += space + 7;
    }
    if (o.split_thinking && inside) {
        at += strspn(at, "\n");
        char *close = strstr(at, "</think>");
        size_t length = close ? (size_t)(close - at) : strlen(at);
        char *after = close ? close + 8 + strspn(close + 8, "\n") : at + length;
        while (close && length && at[length - 1] == '\n') length--;
        assert_true(buffer_append(&part[STREAM_REASONING], at, length));
        at = after;
    }
    assert_true(buffer_append_text(&part[STREAM_CONTENT], at));
    free(copy);
}

static uint32_t next_random(uint32_t *seed) {
    *seed = *seed * 1664525u + 1013904223u;
    return *seed >> 16;
}

static void test_random(void **state) {
    (void)state;
    static const char *const pieces[] = {"a",  "b", "<",    "<think>",  "</think>", "\n", "\n\n",
                                         "ab", " ", "</th", "\xC3\xA9", "think>",   "<t", "\xF0\x9F\x98\x80"};
    static const char *const stops[] = {"ab", "aab", "\n\n\n", "\xC3\xA9", "bab<", "</think>\n\na"};
    uint32_t seed = 7;
    for (int round = 0; round < 20000; round++) {
        struct buffer text = {0}, want[2] = {{0}, {0}};
        size_t n_pieces = next_random(&seed) % 14;
        for (size_t i = 0; i < n_pieces; i++)
            assert_true(buffer_append_text(&text, pieces[next_random(&seed) % (sizeof pieces / sizeof *pieces)]));
        const char *chosen[3] = {0};
        struct stream_options o = {.stops = chosen, .n_stops = next_random(&seed) % 4};
        for (size_t i = 0; i < o.n_stops; i++) chosen[i] = stops[next_random(&seed) % 6];
        o.split_thinking = next_random(&seed) % 4 != 0;
        o.starts_in_thinking = o.split_thinking && next_random(&seed) % 3 == 0;
        const char *stop;
        reference(buffer_text(&text), o, want, &stop);
        size_t step = 1 + next_random(&seed) % 9;
        check(buffer_text(&text), o, step, buffer_text(&want[0]), buffer_text(&want[1]), stop);
        check(buffer_text(&text), o, 1000, buffer_text(&want[0]), buffer_text(&want[1]), stop);
        buffer_free(&text);
        buffer_free(&want[0]);
        buffer_free(&want[1]);
    }
}

static void count_bytes(void *user, enum stream_part part, const char *text, size_t n) {
    (void)part;
    (void)text;
    *(size_t *)user += n;
}

// Held-back text must not be looked at again and again: each of these would take hours if time were quadratic.
static void test_linear(void **state) {
    (void)state;
    enum { N = 4000000 };
    char *text = malloc(N), *needle = malloc(20001);
    assert_non_null(text);
    assert_non_null(needle);
    memset(needle, 'a', 20000);
    memcpy(needle + 19999, "b", 2);
    const char *stops[] = {needle};
    struct stream_options cases[] = {
        {.stops = stops, .n_stops = 1}, {.split_thinking = true}, {.split_thinking = true, .starts_in_thinking = true}};
    for (size_t c = 0; c < 3; c++) {
        memset(text, c == 0 ? 'a' : '\n', N);
        text[0] = c == 2 ? 'x' : text[0];
        struct stream *s = stream_create(&cases[c], NULL);
        assert_non_null(s);
        size_t got = 0;
        for (size_t i = 0; i < N; i += 4) assert_true(stream_feed(s, text + i, 4, count_bytes, &got));
        assert_true(stream_finish(s, count_bytes, &got));
        assert_int_equal(got, N);
        stream_free(s);
    }
    free(text);
    free(needle);
}

static void test_refuses(void **state) {
    (void)state;
    const char *bad[] = {"", "\xFF"};
    for (size_t i = 0; i < 2; i++) {
        struct error err = {""};
        assert_null(stream_create(&(struct stream_options){.stops = &bad[i], .n_stops = 1}, &err));
        assert_true(strlen(err.text) > 0);
    }
}

static void test_nothing_after_a_stop(void **state) {
    (void)state;
    const char *stops[] = {"\n"};
    struct stream *s = stream_create(&(struct stream_options){.stops = stops, .n_stops = 1}, NULL);
    assert_non_null(s);
    size_t got = 0;
    assert_true(stream_feed(s, "yes\nno\xFF", 7, count_bytes, &got));
    assert_true(stream_feed(s, "no", 2, count_bytes, &got));
    assert_true(stream_finish(s, count_bytes, &got));
    assert_int_equal(got, 3);
    stream_free(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_characters),
        cmocka_unit_test(test_stops),
        cmocka_unit_test(test_thinking),
        cmocka_unit_test(test_random),
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_nothing_after_a_stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
