// fuzz_schema.c: any JSON as a schema, then any text against it: what the automaton calls complete is JSON, nothing
// that it allows leads nowhere, and the work is bounded.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "server/automaton.h"
#include "server/jsonscan.h"
#include "server/schema.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static bool is_number(const struct jsonscan *s) {
    return s->depth == 0 &&
           (s->state == SCAN_ZERO || s->state == SCAN_DIGITS || s->state == SCAN_FRACTION || s->state == SCAN_EXPONENT);
}

// The text, byte by byte, as far as it is allowed.
static void try_text(struct cursor *c, const uint8_t *text, size_t n) {
    struct jsonscan scan = {0};
    bool deep = false; // deeper than the scanner goes
    for (size_t i = 0; i < n && !deep; i++) {
        const char byte = (const char)text[i];
        if (!cursor_accept(c, &byte, 1)) return;
        deep = scan.depth == JSONSCAN_DEPTH;
        if (!jsonscan_feed(&scan, text[i]) && !deep) abort();
        if (cursor_complete(c) && scan.state != SCAN_DONE && !is_number(&scan) && !deep) abort();
    }
}

// From where the text has led there is a way to an end, which the grammar's bytes show: a mask over single bytes is
// never empty unless the text is complete.
static void require_a_way(struct cursor *c) {
    uint32_t mask[8];
    if (cursor_failed(c)) return;
    cursor_mask(c, mask);
    bool any = false;
    for (int i = 0; i < 8; i++) any = any || mask[i];
    if (!any && !cursor_complete(c) && !cursor_failed(c)) abort();
}

// The input is the schema, up to a NUL; the rest is the text.
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct branch bytes[256];
    static uint32_t no_end[8];
    for (int i = 0; i < 256; i++) bytes[i] = (struct branch){.id = i, .end = (uint32_t)i + 1, .byte = (uint8_t)i};
    // A vocabulary of the single bytes.
    const struct vocabulary v = {.branches = bytes, .n = 256, .n_words = 8, .longest = 1, .only_end = no_end};
    struct error err = {0};
    const uint8_t *end = memchr(data, 0, size);
    size_t n = end ? (size_t)(end - data) : size;
    struct arena arena = {0};
    struct grammar g = {0};
    struct pyjson *schema = pyjson_parse(&arena, (const char *)data, n, "schema", &err);
    uint32_t start, accept = grammar_accept(&g);
    if (schema && schema_compile(&g, schema, "fuzz", accept, &start, &err)) {
        g.start = start;
        struct automaton *a = automaton_create(&v, &g, false, &err);
        struct cursor *c = a ? cursor_create(a, &err) : NULL;
        if (c) require_a_way(c);
        if (c && n < size) try_text(c, data + n + 1, size - n - 1);
        if (c && !cursor_failed(c) && (n == size || cursor_accept(c, "", 0))) require_a_way(c);
        cursor_free(c);
        automaton_unref(a);
    } else if (schema && !err.text[0]) {
        abort(); // refused without a reason
    }
    grammar_free(&g);
    arena_free(&arena);
    return 0;
}
