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

static struct cursor *compile(const char *schema, struct error *err) {
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
    struct cursor *c = a ? cursor_create(a, err) : NULL;
    automaton_unref(a);
    return c;
}

static bool allows(struct cursor *a, const char *text) {
    cursor_reset(a);
    return cursor_accept(a, text, strlen(text)) && cursor_complete(a);
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
         {"[1, \"a\"]", "[]", "[1]"},
         {"[\"a\"]", "[1, \"a\", 2]"}},
        {"{\"prefixItems\": [{\"type\": \"integer\"}], \"items\": {\"type\": \"null\"}}",
         {"[1]", "[]", "[1, null, null]"},
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
        {"{\"type\": \"string\", \"pattern\": \"^a[b-d]*\\\\.$\"}",
         {"\"a.\"", "\"abcd.\""},
         {"\"a\"", "\"ae.\"", "\"xa.\"", "\"a.x\""}},
        {"{\"type\": \"string\", \"pattern\": \"a|^b\", \"maxLength\": 3}",
         {"\"a\"", "\"xax\"", "\"bxx\"",
          "\"\xC3\xA9\xC3\xA9"
          "a\""},
         {"\"xb\"", "\"xxxa\"", "\"\""}},
        {"{\"type\": \"string\", \"pattern\": \"^\\\"[^\\\"]{2}\\\"$\"}",
         {"\"\\\"xy\\\"\"", "\"\\\"\\n\\\\\\\"\""},
         {"\"xy\"", "\"\\\"x\\\"\""}},
        {"{\"type\": \"string\", \"pattern\": \"^(ab){2,3}$\", \"minLength\": 5}",
         {"\"ababab\""},
         {"\"abab\"", "\"ababa\"", "\"abababab\""}},
        {"{\"type\": \"string\", \"pattern\": \"^(?!^[-+.]*$)[+-]?0*\\\\d*\\\\.?\\\\d*$\"}",
         {"\"1\"", "\"-1.5\"", "\".5\"", "\"007.\""},
         {"\"\"", "\"-\"", "\".\"", "\"+.\"", "\"1e5\""}},
        {"{\"type\": \"string\", \"format\": \"date\"}",
         {"\"2024-02-29\"", "\"1999-12-31\""},
         {"\"2023-02-29\"", "\"1900-02-29\"", "\"2024-13-01\"", "\"0000-01-01\"", "\"2024-1-1\""}},
        {"{\"type\": \"string\", \"maxLength\": 4000}", {"\"\"", "\"abc\""}, {"\"", "1"}},
        {"{\"type\": \"integer\", \"minimum\": -12, \"maximum\": 105}",
         {"-12", "-9", "0", "99", "100", "105"},
         {"-13", "-20", "-100", "106", "110", "200", "1000", "-0"}},
        {"{\"type\": \"integer\", \"minimum\": 5}", {"5", "10", "999999999999999999"}, {"4", "0", "-5", "05"}},
        {"{\"type\": \"integer\", \"exclusiveMaximum\": -7}", {"-8", "-70", "-1000"}, {"-7", "-1", "0", "8"}},
        {"{\"type\": \"number\", \"minimum\": 0.5, \"exclusiveMaximum\": 2}",
         {"0.5", "0.50", "1", "1.999", "0.51"},
         {"0.49", "0", "2", "2.0", "-1", "0.", "1e0", "10"}},
        {"{\"type\": \"number\", \"minimum\": -1.25, \"maximum\": 0}",
         {"-1.25", "-1.2", "-0.0", "0", "0.0", "-1"},
         {"-1.251", "-1.3", "-2", "0.1", "1"}},
        {"{\"type\": \"integer\", \"multipleOf\": 7}", {"0", "7", "-14", "70"}, {"1", "8", "-0", "07"}},
        {"{\"type\": \"integer\", \"multipleOf\": 5, \"minimum\": 3, \"maximum\": 12}", {"5", "10"}, {"0", "3", "15"}},
        {"{\"type\": \"number\", \"multipleOf\": 0.01}", {"1", "-2.5", "0.01"}, {"0.001", "1e2"}},
        {"{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"string\"}, \"b\": {\"type\": \"integer\"}}, "
         "\"not\": {\"required\": [\"a\", \"b\"]}}",
         {"{}", "{\"a\": \"x\"}", "{\"b\": 1}"},
         {"{\"a\": \"x\", \"b\": 1}"}},
        {"{\"not\": {\"type\": [\"object\", \"array\"]}}", {"1", "\"a\"", "null", "true"}, {"{}", "[]", "[1]"}},
        {"{\"not\": {\"enum\": [\"a\", \"bc\", 1, 2.5, null, true]}}",
         {"\"ab\"", "\"b\"", "false", "1.5", "3", "[]"},
         {"\"a\"", "\"bc\"", "1", "1.0", "2.5", "2.50", "null", "true"}},
        {"{\"type\": \"string\", \"not\": {\"const\": \"no\"}}",
         {"\"n\"", "\"non\"", "\"\""},
         {"\"no\"", "1", "\"\\u006eo\""}},
        {"{\"type\": \"integer\", \"not\": {\"minimum\": 3, \"maximum\": 5}}", {"2", "6", "-1"}, {"3", "4", "5"}},
        {"{\"type\": \"string\", \"not\": {\"minLength\": 3}, \"allOf\": [{\"not\": {\"const\": \"\"}}]}",
         {"\"a\"", "\"ab\""},
         {"\"\"", "\"abc\""}},
        {"{\"type\": \"array\", \"items\": {\"type\": \"integer\"}, \"not\": {\"items\": {\"minimum\": 5}}}",
         {"[1]", "[9, 1]", "[4, 9]"},
         {"[]", "[9]", "[5, 6]"}},
        {"{\"not\": {\"anyOf\": [{\"type\": \"object\"}, {\"const\": \"x\"}, {\"not\": {\"type\": [\"string\", "
         "\"object\"]}}]}}",
         {"\"y\"", "\"\""},
         {"\"x\"", "{}", "1", "null"}},
        {"{\"type\": \"object\", \"properties\": {\"kind\": {\"enum\": [\"a\", \"b\"]}, \"n\": {\"type\": "
         "\"integer\"}}, \"required\": [\"kind\"], \"if\": {\"properties\": {\"kind\": {\"const\": \"a\"}}}, \"then\": "
         "{\"required\": [\"n\"]}, \"else\": {\"properties\": {\"n\": false}}}",
         {"{\"kind\": \"a\", \"n\": 1}", "{\"kind\": \"b\"}"},
         {"{\"kind\": \"a\"}", "{\"kind\": \"b\", \"n\": 1}", "{}"}},
        {"{\"type\": \"object\", \"properties\": {\"kind\": {\"enum\": [\"a\", \"b\"]}, \"n\": {\"type\": "
         "\"integer\"}}, \"if\": {\"properties\": {\"kind\": {\"const\": \"a\"}}}, \"then\": {\"required\": [\"n\"]}}",
         {"{\"n\": 1}", "{\"kind\": \"b\"}", "{\"kind\": \"a\", \"n\": 2}"},
         {"{\"kind\": \"a\"}", "{}"}},
        {"{\"type\": \"integer\", \"if\": {\"minimum\": 10}, \"then\": {\"multipleOf\": 5, \"maximum\": 100}}",
         {"3", "9", "15", "100"},
         {"11", "101"}},
        {"{\"type\": \"object\", \"properties\": {\"a\": {}, \"b\": {}, \"c\": {}}, \"dependentRequired\": {\"a\": "
         "[\"b\", \"c\"]}}",
         {"{}", "{\"b\": 1}", "{\"a\": 1, \"b\": 2, \"c\": 3}"},
         {"{\"a\": 1}", "{\"a\": 1, \"b\": 2}"}},
        {"{\"type\": \"object\", \"properties\": {\"card\": {\"type\": \"integer\"}, \"zip\": {\"type\": \"string\"}}, "
         "\"dependentSchemas\": {\"card\": {\"required\": [\"zip\"]}}}",
         {"{}", "{\"zip\": \"x\"}", "{\"card\": 1, \"zip\": \"x\"}"},
         {"{\"card\": 1}"}},
        {"{\"type\": \"array\", \"items\": {\"type\": \"integer\"}, \"contains\": {\"minimum\": 5}}",
         {"[5]", "[1, 7]", "[7, 1, 2]"},
         {"[]", "[1]", "[1, 2, 3]"}},
        {"{\"type\": \"array\", \"items\": {\"enum\": [1, 2, 3]}, \"contains\": {\"const\": 1}, \"minContains\": 2, "
         "\"maxContains\": 3, \"maxItems\": 4}",
         {"[1, 1]", "[1, 2, 1]", "[1, 1, 3, 1]", "[2, 3, 1, 1]"},
         {"[1]", "[2, 3, 1]", "[1, 1, 1, 1]", "[1, 1, 2, 2, 2]", "[]"}},
        {"{\"type\": \"array\", \"items\": {\"type\": \"boolean\"}, \"contains\": {\"const\": true}, \"minContains\": "
         "0, \"maxContains\": 1, \"minItems\": 2}",
         {"[false, false]", "[true, false]", "[false, true, false, false]"},
         {"[true]", "[true, true]", "[]", "[false]"}},
        {"{\"oneOf\": [{\"type\": \"integer\", \"maximum\": 9}, {\"type\": \"integer\", \"minimum\": 5}]}",
         {"4", "10", "-3"},
         {"5", "9", "7"}},
        {"{\"type\": \"object\", \"properties\": {\"a\": {}, \"b\": {}}, \"oneOf\": [{\"required\": [\"a\"]}, "
         "{\"required\": [\"b\"]}]}",
         {"{\"a\": 1}", "{\"b\": 1}"},
         {"{}", "{\"a\": 1, \"b\": 1}"}},
        {"{\"oneOf\": [{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"integer\"}}, \"required\": "
         "[\"a\"]}, {\"type\": \"object\", \"properties\": {\"a\": {\"enum\": [1, \"x\"]}}, \"required\": [\"a\"]}]}",
         {"{\"a\": 2}", "{\"a\": \"x\"}"},
         {"{\"a\": 1}", "{}", "{\"a\": \"y\"}"}},
        {"{\"type\": \"array\", \"uniqueItems\": true, \"items\": {\"type\": [\"boolean\", \"null\"]}}",
         {"[]", "[true]", "[null, false, true]"},
         {"[true, true]", "[null, null]", "[1]", "[true, false, null, true]"}},
        {"{\"type\": \"array\", \"uniqueItems\": true, \"items\": {\"enum\": [1, 2, 3]}, \"minItems\": 2}",
         {"[1,2]", "[3, 1, 2]"},
         {"[]", "[1]", "[1,1]", "[1,2,3,1]"}},
        {"{\"properties\": {\"a\": {\"type\": \"null\"}}, \"additionalProperties\": {\"type\": \"integer\"}}",
         {"{}", "{\"a\": null}", "{\"a\": null, \"b\": 1}", "{\"ab\": 1, \"\": 2}"},
         {"{\"a\": 1}", "{\"b\": null}", "{\"b\": 1, \"a\": null}", "{\"\\u0061\": 1}"}},
        {"{\"patternProperties\": {\"^x_\": {\"type\": \"integer\"}}, \"additionalProperties\": false}",
         {"{}", "{\"x_\": 1}", "{\"x_a\": 1, \"x_b\": 2}"},
         {"{\"a\": 1}", "{\"x_a\": null}"}},
        {"{\"type\": \"object\", \"minProperties\": 1, \"maxProperties\": 2}",
         {"{\"a\": 1}", "{\"a\": 1, \"b\": 2}"},
         {"{}", "{\"a\": 1, \"b\": 2, \"c\": 3}"}},
        {"{\"allOf\": [{\"properties\": {\"a\": {\"minimum\": 2}}, \"required\": [\"a\"]}, {\"properties\": {\"a\": "
         "{\"type\": "
         "\"integer\"}, \"b\": {\"type\": \"null\"}}}], \"type\": \"object\"}",
         {"{\"a\": 2}", "{\"a\": 30, \"b\": null}"},
         {"{}", "{\"a\": 1}", "{\"a\": 2.5}", "{\"b\": null}"}},
        {"{\"type\": \"object\", \"properties\": {\"k\": {\"type\": \"string\"}}, \"required\": [\"k\"], \"oneOf\": "
         "[{\"properties\": {\"k\": {\"const\": \"a\"}, \"n\": {\"type\": \"integer\"}}}, {\"properties\": {\"k\": "
         "{\"const\": "
         "\"b\"}}}]}",
         {"{\"k\": \"a\", \"n\": 1}", "{\"k\": \"b\"}", "{\"k\": \"a\"}"},
         {"{\"k\": \"c\"}", "{\"k\": \"b\", \"n\": 1}", "{}"}},
        {"{\"properties\": {\"v\": {\"type\": \"integer\"}, \"next\": {\"anyOf\": [{\"$ref\": \"#\"}, {\"type\": "
         "\"null\"}]}}, "
         "\"required\": [\"v\", \"next\"]}",
         {"{\"v\": 1, \"next\": null}", "{\"v\": 1, \"next\": {\"v\": 2, \"next\": {\"v\": 3, \"next\": null}}}"},
         {"{\"v\": 1}", "{\"v\": 1, \"next\": {}}", "{\"v\": 1, \"next\": {\"v\": 2, \"next\": null}"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct error err = {0};
        struct cursor *a = compile(cases[i].schema, &err);
        if (!a) fail_msg("%s: %s", cases[i].schema, err.text);
        for (size_t k = 0; k < 6 && cases[i].good[k]; k++)
            if (!allows(a, cases[i].good[k])) fail_msg("%s refuses %s", cases[i].schema, cases[i].good[k]);
        for (size_t k = 0; k < 8 && cases[i].bad[k]; k++)
            if (allows(a, cases[i].bad[k])) fail_msg("%s allows %s", cases[i].schema, cases[i].bad[k]);
        cursor_free(a);
    }
}

static void refuses_by_name(void **state) {
    (void)state;
    static const struct {
        const char *schema, *says;
    } cases[] = {
        {"{\"type\": \"string\", \"pattern\": \"(?=a)\"}", "pattern: look-ahead"},
        {"{\"type\": \"string\", \"pattern\": \"(a)\\\\1\"}", "pattern: a back reference"},
        {"{\"type\": \"string\", \"pattern\": \"(a{1000}){1000}\"}", "pattern: more than"},
        {"{\"type\": \"string\", \"pattern\": \"(\"}", "pattern: a ( without"},
        {"{\"type\": \"string\", \"pattern\": \"^[a-z]+$\", \"maxLength\": 100000}", "maxLength"},
        {"{\"not\": {}}", "nothing can satisfy"},
        {"{\"not\": {\"pattern\": \"a\"}}", "not: of pattern is not supported"},
        {"{\"not\": {\"const\": [1]}}", "not: of an array"},
        {"{\"not\": {\"not\": {\"$ref\": \"#\"}}}", "this leads to itself"},
        {"{\"not\": {\"$ref\": \"#\"}}", "this leads to itself"},
        {"{\"if\": {\"multipleOf\": 2}, \"then\": {\"minimum\": 3}}", "if: of multipleOf is not supported"},
        {"{\"contains\": {\"const\": 1}, \"prefixItems\": [{}]}", "contains: beside"},
        {"{\"contains\": {\"const\": 1}, \"minItems\": 100}", "contains: where more than 64"},
        {"{\"dependentRequired\": {\"a\": 1}}", "dependentRequired: expected arrays"},
        {"{\"type\": \"array\", \"uniqueItems\": true}", "uniqueItems"},
        {"{\"type\": \"object\", \"patternProperties\": {\"a\": true, \"b\": true}}", "patternProperties"},
        {"{\"type\": \"object\", \"minProperties\": 2}", "minProperties"},
        {"{\"type\": \"integer\", \"multipleOf\": 7, \"minimum\": 20000}", "multipleOf"},
        {"{\"type\": \"number\", \"multipleOf\": 2.5}", "multipleOf"},
        {"{\"type\": \"number\", \"minimum\": 1e-30}", "minimum"},
        {"{\"oneOf\": [{\"type\": \"integer\"}, {\"type\": \"number\"}]}", "oneOf"},
        {"{\"oneOf\": [{\"properties\": {\"a\": true}}, {\"properties\": {\"b\": true}}]}", "nothing can satisfy"},
        {"{\"oneOf\": [{\"multipleOf\": 2}, {\"multipleOf\": 3}]}", "oneOf"},
        // What is written for the first may be a string.
        {"{\"oneOf\": [{\"properties\": {\"a\": true}, \"anyOf\": [{\"type\": \"string\"}]}, {\"type\": \"string\", "
         "\"pattern\": \"a\"}]}",
         "oneOf"},
        {"{\"$ref\": \"#/nowhere\"}", "$ref"},
        {"{\"$ref\": \"http://example.org/\"}", "$ref"},
        {"{\"$ref\": \"#\"}", "$ref: this leads to itself"},
        {"{\"anyOf\": [{\"$ref\": \"#\"}, {\"type\": \"null\"}]}", "$ref: this leads to itself"},
        {"{\"allOf\": [{\"$ref\": \"#\"}, {\"type\": \"null\"}]}", "this leads to itself"},
        {"{\"type\": \"object\", \"properties\": {\"a\": {\"$ref\": \"#\"}}, \"required\": [\"a\"]}", "never ends"},
        {"{\"properties\": {\"a\": {\"type\": \"strin\"}}}", "schema.a"},
        {"{\"type\": \"object\", \"required\": [\"a\"], \"additionalProperties\": false}", "nothing can satisfy"},
        {"{\"type\": \"string\", \"minLength\": 5000000}", "minLength"},
        {"{\"enum\": []}", "enum"},
        {"{\"type\": \"string\", \"enum\": [1]}", "nothing can satisfy"},
        {"false", "false"},
        {"3", "an object, true or false"},
        {"{\"type\": \"array\", \"minItems\": 3, \"maxItems\": 2}", "nothing can satisfy"},
        {"{\"unknownKeyword\": 1}", "unknownKeyword"},
        {"{\"$schema\": \"http://example.org/meta\"}", "$schema"},
        {"{\"properties\": {\"a\": {\"$id\": \"b\"}}}", "$id"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct error err = {0};
        struct cursor *a = compile(cases[i].schema, &err);
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
        struct cursor *a = compile(schemas[i], &err), *b = compile(schemas[i], &err);
        assert_non_null(a);
        for (int walk = 0; walk < 6; walk++) {
            char text[4096] = "";
            size_t n = 0;
            cursor_reset(a);
            for (int step = 0; step < 60 && n < 3000; step++) {
                uint32_t mask[N_VOCAB / 32];
                cursor_mask(a, mask);
                assert_null(cursor_failed(a));
                size_t n_allowed = 0;
                int32_t chosen = -1;
                for (int32_t id = 0; id < N_VOCAB; id++) {
                    bool bit = mask[id / 32] >> id % 32 & 1;
                    size_t size = 0;
                    const char *bytes = tokenizer_token_bytes(tok, id, &size);
                    if (step % 20 == 0 && bytes && !tokenizer_is_special(tok, id) && bytes[0] != '<') {
                        cursor_reset(b);
                        bool fits = cursor_accept(b, text, n) && cursor_accept(b, bytes, size);
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
                assert_true(cursor_accept(a, bytes, size));
            }
            struct jsonscan scan = {0};
            for (size_t k = 0; k < n; k++) assert_true(jsonscan_feed(&scan, (unsigned char)text[k]));
        }
        cursor_free(a);
        cursor_free(b);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(allows_what_is_valid_and_nothing_else),
                                       cmocka_unit_test(refuses_by_name), cmocka_unit_test(masks_are_exact)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
