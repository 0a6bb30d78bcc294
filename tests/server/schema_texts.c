// schema_texts.c: which texts a schema's grammar allows, and what its masks cost, for tests/e2e/test_schema_*.py. Each
// line of the input is {"schema": ..., "texts": ["...", ...]}. Each line of the output is a string that says why the
// schema was refused, or an array of true and false.
//
//   schema_texts            no tokens: only bytes are tried
//   schema_texts FOLDER     with a tokenizer's vocabulary: each text is written token by token, twice, as a request
//   would
//                           and as the next would; the line is {"accepted": [...], "compile_ms": ..., "tokens": ...,
//                           "cold_us": [mean, largest], "warm_us": [mean, largest], "bytes": ...}, the microseconds of
//                           the processor for one mask
//   schema_texts FOLDER times    the line is {"refused": WHY or null, "ms": ...}: the processor's time to compile and
//   for
//                                one mask
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/automaton.h"
#include "server/schema.h"

enum { N_VOCAB = 151936 }; // Qwen3's

static struct tokenizer *tokenizer; // NULL: none
static const struct vocabulary *vocabulary;
static uint32_t mask[N_VOCAB / 32];
static bool times;

struct cost {
    double total, most;
    size_t n;
};

// The processor's time: others may keep the machine busy.
static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static bool allows(struct cursor *c, const struct pyjson *text) {
    cursor_reset(c);
    return cursor_accept(c, text->text, text->n_text) && cursor_complete(c);
}

// The text's tokens, each in its mask.
static bool write_tokens(struct cursor *c, const struct pyjson *text, struct cost *cost) {
    struct token_ids ids = {0};
    struct error err = {0};
    bool ok = tokenizer_encode(tokenizer, text->text, text->n_text, false, &ids, &err);
    cursor_reset(c);
    for (size_t i = 0; ok && i < ids.n; i++) {
        size_t n = 0;
        const char *bytes = tokenizer_token_bytes(tokenizer, ids.ids[i], &n);
        double before = cpu_seconds();
        cursor_mask(c, mask);
        double took = (cpu_seconds() - before) * 1e6;
        cost->total += took;
        cost->n++;
        if (took > cost->most) cost->most = took;
        ok = (mask[ids.ids[i] / 32] >> ids.ids[i] % 32 & 1) && cursor_accept(c, bytes, n);
    }
    token_ids_free(&ids);
    return ok && cursor_complete(c);
}

static bool put_tokens(struct automaton *a, const struct pyjson *texts, double compiled, struct buffer *out) {
    struct error err = {0};
    struct cost costs[2] = {{.n = 0}, {.n = 0}};
    bool ok = buffer_append_text(out, "{\"accepted\": [");
    for (int pass = 0; pass < 2; pass++) {
        struct cursor *c = cursor_create(a, &err);
        if (!c) return false;
        for (const struct pyjson *t = texts->first; ok && t; t = t->next) {
            bool accepted = write_tokens(c, t, &costs[pass]);
            if (pass == 0) ok = buffer_printf(out, "%s%s", accepted ? "true" : "false", t->next ? ", " : "");
        }
        if (texts->n == 0) cursor_mask(c, mask);
        if (cursor_failed(c)) {
            buffer_clear(out);
            ok = pyjson_write_string(cursor_failed(c), strlen(cursor_failed(c)), out);
            cursor_free(c);
            return ok;
        }
        cursor_free(c);
    }
    ok = ok && buffer_printf(out, "], \"compile_ms\": %.3f, \"tokens\": %zu, \"bytes\": %zu", compiled * 1e3,
                             costs[0].n, automaton_bytes(a));
    for (int pass = 0; ok && pass < 2; pass++)
        ok = buffer_printf(out, ", \"%s_us\": [%.2f, %.2f]", pass ? "warm" : "cold",
                           costs[pass].n ? costs[pass].total / (double)costs[pass].n : 0.0, costs[pass].most);
    return ok && buffer_append_byte(out, '}');
}

static bool put_texts(struct automaton *a, const struct pyjson *texts, struct buffer *out) {
    struct error err = {0};
    struct cursor *c = cursor_create(a, &err);
    bool ok = c && buffer_append_byte(out, '[');
    for (const struct pyjson *t = texts->first; ok && t; t = t->next)
        ok = buffer_printf(out, "%s%s", allows(c, t) ? "true" : "false", t->next ? ", " : "");
    cursor_free(c);
    return ok && buffer_append_byte(out, ']');
}

static bool put_time(struct automaton *a, const char *refused, double begun, struct buffer *out) {
    struct error err = {0};
    struct cursor *c = a ? cursor_create(a, &err) : NULL;
    if (c) cursor_mask(c, mask);
    if (c && cursor_failed(c)) refused = cursor_failed(c);
    bool ok = buffer_append_text(out, "{\"refused\": ");
    if (!refused) ok = ok && buffer_append_text(out, "null");
    else ok = ok && pyjson_write_string(refused, strlen(refused), out);
    cursor_free(c);
    return ok && buffer_printf(out, ", \"ms\": %.2f}", (cpu_seconds() - begun) * 1e3);
}

static bool answer(const struct pyjson *line, struct buffer *out) {
    struct grammar g = {0};
    struct error err = {0};
    uint32_t start = 0, end = grammar_accept(&g);
    struct automaton *a = NULL;
    double before = cpu_seconds();
    if (schema_compile(&g, pyjson_get(line, "schema"), "test", end, &start, &err)) {
        g.start = start;
        a = automaton_create(vocabulary, &g, false, &err);
    }
    grammar_free(&g);
    double compiled = cpu_seconds() - before;
    if (times) {
        bool ok = put_time(a, a ? NULL : err.text, before, out);
        automaton_unref(a);
        return ok;
    }
    if (!a) return pyjson_write_string(err.text, strlen(err.text), out);
    const struct pyjson *texts = pyjson_get(line, "texts");
    bool ok = tokenizer ? put_tokens(a, texts, compiled, out) : put_texts(a, texts, out);
    automaton_unref(a);
    return ok;
}

int main(int argc, char **argv) {
    struct error err = {0};
    if (argc > 1) tokenizer = tokenizer_open_folder(argv[1], &err);
    times = argc > 2;
    int32_t eos = tokenizer ? tokenizer_eos(tokenizer) : -1;
    struct vocabulary *v = argc > 1 && !tokenizer
                               ? NULL
                               : vocabulary_create(tokenizer, tokenizer ? N_VOCAB : 0, &eos, tokenizer ? 1 : 0, &err);
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
    tokenizer_free(tokenizer);
    return !ok;
}
