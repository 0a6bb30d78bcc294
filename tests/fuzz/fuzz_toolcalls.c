// fuzz_toolcalls.c: any text as a stream of tool calls, cut anywhere: the same result however it is cut, arguments that
// are JSON objects, and no byte that came from nowhere.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/buffer.h"
#include "server/jsonscan.h"
#include "server/toolcalls.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct seen {
    struct buffer out;
    struct jsonscan scan;
    bool whole; // the mode in which a call is reported when it is complete
};

static void on_text(void *user, const char *text, size_t n) {
    if (!buffer_append(&((struct seen *)user)->out, text, n)) abort();
}

static void on_begin(void *user, const char *name) {
    struct seen *s = user;
    s->scan = (struct jsonscan){0};
    if (!buffer_printf(&s->out, "\x01%s\x02", name)) abort();
}

static void on_arguments(void *user, const char *text, size_t n) {
    struct seen *s = user;
    for (size_t i = 0; i < n; i++)
        if (!jsonscan_feed(&s->scan, (unsigned char)text[i])) abort();
    if (!buffer_append(&s->out, text, n)) abort();
}

static void on_end(void *user) {
    struct seen *s = user;
    if (s->whole && s->scan.state != SCAN_DONE) abort();
    if (!buffer_append_byte(&s->out, '\x03')) abort();
}

static bool on_known(void *user, const char *name) {
    (void)user;
    return name[0] != 'x';
}

static struct seen parse(const char *text, size_t n, size_t step, bool incremental) {
    struct seen s = {.whole = !incremental};
    struct toolcalls_sink sink = {on_text, on_begin, on_arguments, on_end, on_known, &s};
    struct toolcalls *t = toolcalls_create(&sink, incremental, NULL);
    if (!t) abort();
    for (size_t i = 0; i < n; i += step)
        if (!toolcalls_feed(t, text + i, n - i < step ? n - i : step)) abort();
    if (!toolcalls_finish(t)) abort();
    toolcalls_free(t);
    return s;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    size_t step = 1 + data[0] % 40, n = size - 1;
    const char *text = (const char *)data + 1;
    for (int incremental = 0; incremental < 2; incremental++) {
        struct seen a = parse(text, n, n, incremental), b = parse(text, n, step, incremental);
        if (a.out.len != b.out.len || (a.out.len && memcmp(a.out.data, b.out.data, a.out.len) != 0)) abort();
        buffer_free(&a.out);
        buffer_free(&b.out);
    }
    return 0;
}
