// schema_texts.c: which texts a schema's grammar allows, for tests/e2e/test_schema_suite.py. Each line of the input is
// {"schema": ..., "texts": ["...", ...]}; each line of the output a string that says why the schema was refused, or an
// array of true and false.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/automaton.h"
#include "server/schema.h"

static const struct vocabulary *vocabulary;

static bool allows(struct cursor *c, const struct pyjson *text) {
    cursor_reset(c);
    return cursor_accept(c, text->text, text->n_text) && cursor_complete(c);
}

static bool answer(const struct pyjson *line, struct buffer *out) {
    struct grammar g = {0};
    struct error err = {0};
    uint32_t start = 0, end = grammar_accept(&g);
    struct automaton *a = NULL;
    if (schema_compile(&g, pyjson_get(line, "schema"), "test", end, &start, &err)) {
        g.start = start;
        a = automaton_create(vocabulary, &g, false, &err);
    }
    grammar_free(&g);
    struct cursor *c = a ? cursor_create(a, &err) : NULL;
    automaton_unref(a);
    if (!c) return pyjson_write_string(err.text, strlen(err.text), out);
    bool ok = buffer_append_byte(out, '[');
    for (const struct pyjson *t = pyjson_get(line, "texts")->first; ok && t; t = t->next)
        ok = buffer_printf(out, "%s%s", allows(c, t) ? "true" : "false", t->next ? ", " : "");
    cursor_free(c);
    return ok && buffer_append_byte(out, ']');
}

int main(void) {
    struct error err = {0};
    struct vocabulary *v = vocabulary_create(NULL, 0, NULL, 0, &err); // no tokens: only bytes are tried
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    bool ok = v != NULL;
    vocabulary = v;
    while (ok && (n = getline(&line, &cap, stdin)) > 0) {
        struct arena arena = {0};
        struct buffer out = {0};
        struct pyjson *parsed = pyjson_parse(&arena, line, (size_t)n, "line", &err);
        ok = parsed && answer(parsed, &out);
        if (ok) puts(buffer_text(&out));
        buffer_free(&out);
        arena_free(&arena);
    }
    if (!ok) fprintf(stderr, "%s\n", err.text);
    free(line);
    vocabulary_free(v);
    return !ok;
}
