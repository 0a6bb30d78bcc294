// fuzz_schema.c: any JSON as a schema, then any text against it: what the automaton calls complete is JSON, and the
// work is bounded.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "server/automaton.h"
#include "server/jsonscan.h"
#include "server/schema.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// Half of the input is the schema, up to a NUL; the rest is the text.
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char no_tokens[] = "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": []}}";
    struct error err;
    struct tokenizer *tokenizer = tokenizer_open_bytes(no_tokens, sizeof no_tokens - 1, NULL, 0, &err);
    struct vocabulary *vocabulary = vocabulary_create(tokenizer, 0, NULL, 0, &err); // no tokens: only bytes are tried
    if (!vocabulary) abort();
    const uint8_t *end = memchr(data, 0, size);
    size_t n = end ? (size_t)(end - data) : size;
    struct arena arena = {0};
    struct grammar g = {0};
    struct pyjson *schema = pyjson_parse(&arena, (const char *)data, n, "schema", &err);
    uint32_t start, accept = grammar_accept(&g);
    if (schema && schema_compile(&g, schema, "fuzz", accept, &start, &err)) {
        g.start = start;
        struct automaton *a = automaton_create(vocabulary, &g, false, &err);
        struct jsonscan scan = {0};
        bool json = true;
        for (size_t i = n + 1; a && i < size; i++) {
            const char byte = (char)data[i];
            json = json && jsonscan_feed(&scan, data[i]);
            if (!automaton_accept(a, &byte, 1)) break;
            if (!json) abort();
            bool number = scan.depth == 0 && (scan.state == SCAN_ZERO || scan.state == SCAN_DIGITS ||
                                              scan.state == SCAN_FRACTION || scan.state == SCAN_EXPONENT);
            if (automaton_complete(a) && scan.state != SCAN_DONE && !number) abort();
        }
        automaton_free(a);
    }
    grammar_free(&g);
    arena_free(&arena);
    vocabulary_free(vocabulary);
    tokenizer_free(tokenizer);
    return 0;
}
