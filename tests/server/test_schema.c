// test_schema.c: JSON Schemas become automata that allow what they should, and masks say what the automaton says.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "server/automaton.h"
#include "server/jsonscan.h"
#include "server/schema.h"

static struct tokenizer *tok;
static struct vocabulary *vocabulary;
enum { N_VOCAB = 8192 };
static int32_t end_id;

static int set_up(void **state) {
    (void)state;
    struct error err = {0};
    tok = tokenizer_open_folder("models/tandem-tiny", &err);
    if (!tok) return 1;
    end_id = tokenizer_eos(tok);
    vocabulary = vocabulary_create(tok, N_VOCAB, &end_id, 1, &err);
    return vocabulary ? 0 : 1;
}

static int tear_down(void **state) {
    (void)state;
    vocabulary_free(vocabulary);
    tokenizer_free(tok);
    return 0;
}

static struct automaton *compile(const char *schema, struct error *err) {
    struct arena arena = {0};
    struct grammar g = {0};
    struct pyjson *v = pyjson_parse(&arena, schema, strlen(schema), "schema", err);
    struct automaton *a = NULL;
    if (!v) fail_msg("%s", err->text);
    uint32_t start, end = grammar_accept(&g);
    if (schema_compile(&g, v, "test", end, &start, err)) {
        g.start = start;
        a = automaton_create(vocabulary, &g, false, err);
    }
    grammar_free(&g);
    arena_free(&arena);
    return a;
}

static bool allows(struct automaton *a, const char *text) {
    automaton_reset(a);
    return automaton_accept(a, text, strlen(text)) && automaton_complete(a);
}

static void allows_what_is_valid_and_nothing_else(void **state) {
    (void)state;
    static const struct {
        const char *schema, *good[6], *bad[8];
    } cases[] = {
        {"true", {"1", "{}", "[1, {\"a\": null}]", "\"x\"", "-0.5e3", "true"}, {"", "{", "01", "nul", "[1,]", "{}}"}},
        {"{}", {"null", "[]"}, {"nulll"}},
        {"{\"type\": \"null\"}", {"null"}, {"1", "\"null\""}},
        {"{\"type\": \"boolean\"}", {"true", "false"}, {"True", "1"}},
        {"{\"type\": \"integer\"}", {"0", "-1", "123456789", "10"}, {"-0", "01", "1.0", "1e3", "", "-"}},
        {"{\"type\": \"integer\", \"minimum\": 0}", {"0", "7"}, {"-1"}},
        {"{\"type\": \"integer\", \"minimum\": 1}", {"1", "70"}, {"0", "-1"}},
        {"{\"type\": \"integer\", \"exclusiveMinimum\": 0}", {"1"}, {"0"}},
        {"{\"type\": \"number\"}", {"0", "-1.5", "1e3", "0.001", "12E-7", "-0"}, {"1.", ".5", "01", "1e", "1e123"}},
        {"{\"type\": \"string\"}",
         {"\"\"", "\"a b\"", "\"\\n\\u00e9\\\"\"", "\"\xC3\xA9\xF0\x9F\x98\x80\""},
         {"\"", "a", "\"\n\"", "\"\\x\"", "\"\xC3\"", "\"\\ud800\"", "\"\xED\xA0\x80\""}},
        {"{\"type\": \"string\", \"minLength\": 2, \"maxLength\": 3}",
         {"\"ab\"", "\"\xC3\xA9\\n\\u00e9\""},
         {"\"a\"", "\"abcd\"", "\"\""}},
        {"{\"enum\": [\"a\", 1, null, {\"x\": [1]}]}",
         {"\"a\"", "1", "null", "{\"x\": [1]}"},
         {"\"b\"", "2", "{\"x\":[1]}"}},
        {"{\"const\": \"a\\\"b\"}", {"\"a\\\"b\""}, {"\"a\""}},
        {"{\"type\": \"string\", \"enum\": [\"a\", 1]}", {"\"a\""}, {"1"}},
        {"{\"type\": [\"string\", \"null\"]}", {"\"x\"", "null"}, {"1", "true"}},
        {"{\"type\": \"array\", \"items\": {\"type\": \"integer\"}}",
         {"[]", "[1]", "[1, 2,3]", "[\n  1\n]"},
         {"[1.5]", "[,]", "[1 2]", "[\"\"]"}},
        {"{\"type\": \"array\", \"items\": {\"type\": \"integer\"}, \"minItems\": 2, \"maxItems\": 3}",
         {"[1,2]", "[1,2,3]"},
         {"[]", "[1]", "[1,2,3,4]"}},
        {"{\"type\": \"array\", \"items\": {\"type\": \"integer\"}, \"minItems\": 3}",
         {"[1,2,3]", "[1,2,3,4,5]"},
         {"[]", "[1]", "[1,2]"}},
        {"{\"type\": \"array\", \"items\": {\"type\": \"integer\"}, \"minItems\": 1}", {"[1]", "[1,2]"}, {"[]"}},
        {"{\"prefixItems\": [{\"type\": \"integer\"}, {\"type\": \"string\"}], \"items\": false}",
         {"[1, \"a\"]"},
         {"[]", "[1]", "[1, \"a\", 2]"}},
        {"{\"prefixItems\": [{\"type\": \"integer\"}], \"items\": {\"type\": \"null\"}}",
         {"[1]", "[1, null, null]"},
         {"[null]", "[1, 2]"}},
        {"{\"type\": \"object\"}", {"{}", "{\"a\": [1, {}]}"}, {"[]", "1", "{\"a\"}"}},
        {"{\"type\": \"object\", \"additionalProperties\": {\"type\": \"integer\"}}",
         {"{}", "{\"a\": 1, \"b\": 2}"},
         {"{\"a\": \"\"}"}},
        {"{\"properties\": {\"a\": {\"type\": \"integer\"}, \"b\": {\"type\": \"string\"}, \"c\": true}, \"required\": "
         "[\"b\"]}",
         {"{\"b\": \"\"}", "{\"a\": 1, \"b\": \"\"}", "{\"b\": \"\", \"c\": []}",
          "{ \"a\":1,\"b\":\"x\", \"c\": {\"d\": 1} }", "{\n  \"b\": \"\"\n}"},
         {"{}", "{\"a\": 1}", "{\"b\": \"\", \"a\": 1}", "{\"b\": \"\",}", "{,\"b\": \"\"}", "{\"b\": 1}",
          "{\"a\": 1 \"b\": \"\"}", "{\"b\": \"\", \"d\": 1}"}},
        {"{\"properties\": {\"a\": {\"type\": \"null\"}}, \"additionalProperties\": false}",
         {"{}", "{\"a\": null}"},
         {"{\"b\": 1}"}},
        {"{\"type\": \"object\", \"required\": [\"x\"]}", {"{\"x\": 1}"}, {"{}"}},
        {"{\"type\": \"object\", \"properties\": {}, \"additionalProperties\": false}", {"{}"}, {"{\"a\": 1}"}},
        {"{\"anyOf\": [{\"type\": \"integer\"}, {\"type\": \"array\", \"items\": {\"type\": \"boolean\"}}]}",
         {"1", "[true]"},
         {"[1]", "true"}},
        {"{\"oneOf\": [{\"type\": \"integer\"}, {\"type\": \"string\"}]}", {"1", "\"\""}, {"null"}},
        {"{\"$ref\": \"#/$defs/a~1b\", \"$defs\": {\"a/b\": {\"$ref\": \"#/$defs/c\"}, \"c\": {\"type\": \"null\"}}}",
         {"null"},
         {"1"}},
        {"{\"title\": \"T\", \"description\": \"d\", \"type\": \"null\", \"default\": 1, \"format\": \"date\"}",
         {"null"},
         {"1"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct error err = {0};
        struct automaton *a = compile(cases[i].schema, &err);
        if (!a) fail_msg("%s: %s", cases[i].schema, err.text);
        for (size_t k = 0; k < 6 && cases[i].good[k]; k++)
            if (!allows(a, cases[i].good[k])) fail_msg("%s refuses %s", cases[i].schema, cases[i].good[k]);
        for (size_t k = 0; k < 8 && cases[i].bad[k]; k++)
            if (allows(a, cases[i].bad[k])) fail_msg("%s allows %s", cases[i].schema, cases[i].bad[k]);
        automaton_free(a);
    }
}

static void refuses_by_name(void **state) {
    (void)state;
    static const struct {
        const char *schema, *says;
    } cases[] = {
        {"{\"type\": \"string\", \"pattern\": \"a\"}", "pattern"},
        {"{\"not\": {}}", "not"},
        {"{\"if\": {}}", "if"},
        {"{\"type\": \"array\", \"uniqueItems\": true}", "uniqueItems"},
        {"{\"type\": \"array\", \"contains\": {}}", "contains"},
        {"{\"type\": \"object\", \"patternProperties\": {}}", "patternProperties"},
        {"{\"type\": \"object\", \"minProperties\": 1}", "minProperties"},
        {"{\"type\": \"integer\", \"maximum\": 5}", "maximum"},
        {"{\"type\": \"integer\", \"minimum\": 5}", "minimum"},
        {"{\"type\": \"number\", \"minimum\": 0}", "minimum"},
        {"{\"type\": \"number\", \"multipleOf\": 2}", "multipleOf"},
        {"{\"allOf\": [{}, {}]}", "allOf"},
        {"{\"oneOf\": [{\"type\": \"integer\"}, {\"type\": \"number\"}]}", "oneOf"},
        {"{\"anyOf\": [{}], \"type\": \"object\"}", "type"},
        {"{\"$ref\": \"#/nowhere\"}", "$ref"},
        {"{\"$ref\": \"http://example.org/\"}", "$ref"},
        {"{\"$ref\": \"#\"}", "$ref"},
        {"{\"type\": \"object\", \"properties\": {\"a\": {\"$ref\": \"#\"}}}", "recursive"},
        {"{\"properties\": {\"a\": {\"type\": \"strin\"}}}", "schema.a"},
        {"{\"type\": \"object\", \"required\": [\"a\"], \"additionalProperties\": false}", "required"},
        {"{\"type\": \"string\", \"maxLength\": 5000}", "maxLength"},
        {"{\"type\": \"string\", \"maxLength\": 4000}", "too large"},
        {"{\"enum\": []}", "enum"},
        {"{\"type\": \"string\", \"enum\": [1]}", "enum"},
        {"false", "false"},
        {"3", "an object, true or false"},
        {"{\"type\": \"array\", \"minItems\": 3, \"maxItems\": 2}", "minItems"},
        {"{\"dependentRequired\": {}}", "dependentRequired"},
        {"{\"unknownKeyword\": 1}", "unknownKeyword"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct error err = {0};
        struct automaton *a = compile(cases[i].schema, &err);
        if (a || !strstr(err.text, cases[i].says)) fail_msg("%s: %s", cases[i].schema, a ? "allowed" : err.text);
    }
}

static uint64_t rng = 1;
static uint64_t draw(uint64_t below) {
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (rng >> 33) % below;
}

// Random walks over allowed tokens end in valid texts; and at each step the mask is what trying every token says.
static void masks_are_exact(void **state) {
    (void)state;
    static const char *const schemas[] = {
        "true", "{\"type\": \"object\"}", "{\"type\": \"string\", \"maxLength\": 12}",
        "{\"properties\": {\"name\": {\"type\": \"string\"}, \"n\": {\"type\": \"number\"}, \"k\": {\"enum\": "
        "[\"one\", \"other\"]}}, "
        "\"required\": [\"name\", \"k\"]}",
        "{\"type\": \"array\", \"items\": {\"anyOf\": [{\"type\": \"integer\"}, {\"type\": \"object\"}]}}"};
    for (size_t i = 0; i < sizeof schemas / sizeof schemas[0]; i++) {
        struct error err = {0};
        struct automaton *a = compile(schemas[i], &err), *b = compile(schemas[i], &err);
        assert_non_null(a);
        for (int walk = 0; walk < 6; walk++) {
            char text[4096] = "";
            size_t n = 0;
            automaton_reset(a);
            for (int step = 0; step < 60 && n < 3000; step++) {
                const uint32_t *mask = automaton_mask(a);
                assert_null(automaton_failed(a));
                size_t n_allowed = 0;
                int32_t chosen = -1;
                for (int32_t id = 0; id < N_VOCAB; id++) {
                    bool bit = mask[id / 32] >> id % 32 & 1;
                    size_t size = 0;
                    const char *bytes = tokenizer_token_bytes(tok, id, &size);
                    if (step % 20 == 0 && bytes && !tokenizer_is_special(tok, id) && bytes[0] != '<') {
                        automaton_reset(b);
                        bool fits = automaton_accept(b, text, n) && automaton_accept(b, bytes, size);
                        if (fits != bit)
                            fail_msg("%s: behind %s, token %d: %d, mask %d", schemas[i], text, id, fits, bit);
                    }
                    if (bit && draw(++n_allowed) == 0) chosen = id;
                }
                assert_true(n_allowed > 0);
                if (chosen == end_id) break;
                size_t size = 0;
                const char *bytes = tokenizer_token_bytes(tok, chosen, &size);
                memcpy(text + n, bytes, size);
                text[n += size] = '\0';
                assert_true(automaton_accept(a, bytes, size));
            }
            struct jsonscan scan = {0};
            for (size_t k = 0; k < n; k++) assert_true(jsonscan_feed(&scan, (unsigned char)text[k]));
        }
        automaton_free(a);
        automaton_free(b);
    }
}

// Schemas made to cost time or memory are refused or fail soon.
static void hostile_schemas_are_bounded(void **state) {
    (void)state;
    struct buffer text = {0};
    struct error err = {0};
    buffer_append_text(&text, "{\"anyOf\": [");
    for (int i = 0; i < 3000; i++)
        buffer_printf(&text, "%s{\"type\": \"array\", \"items\": {\"type\": \"string\"}}", i ? "," : "");
    buffer_append_text(&text, "]}");
    struct automaton *a = compile(buffer_text(&text), &err);
    assert_null(a); // more places than there may be, or more threads
    buffer_clear(&text);
    buffer_append_text(
        &text, "{\"type\": \"array\", \"maxItems\": 4000, \"items\": {\"type\": \"array\", \"maxItems\": 4000}}");
    assert_null(compile(buffer_text(&text), &err));
    buffer_clear(&text);
    for (int i = 0; i < 100; i++) buffer_append_text(&text, "{\"type\": \"array\", \"items\": ");
    buffer_append_text(&text, "true");
    for (int i = 0; i < 100; i++) buffer_append_text(&text, "}");
    assert_null(compile(buffer_text(&text), &err));
    buffer_clear(&text);
    buffer_append_text(&text, "{\"enum\": [");
    for (int i = 0; i < 2000; i++) buffer_printf(&text, "%s\"value %d of many\"", i ? "," : "", i * 7919);
    buffer_append_text(&text, "]}");
    a = compile(buffer_text(&text), &err);
    if (a) {
        automaton_mask(a); // the answer or a failure by name, in bounded time
        automaton_free(a);
    }
    buffer_free(&text);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(allows_what_is_valid_and_nothing_else),
                                       cmocka_unit_test(refuses_by_name), cmocka_unit_test(masks_are_exact),
                                       cmocka_unit_test(hostile_schemas_are_bounded)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
