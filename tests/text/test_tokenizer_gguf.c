// test_tokenizer_gguf.c: what a vocabulary in GGUF metadata must hold, with which words it is refused, and how the
// types of tokens count. Agreement with the PyPI library is tests/e2e/test_gguf_vocab.py's subject.
#include "format/gguf.h"
#include "text/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 16 };

// Metadata under construction: the values that tokenizer_open_gguf looks up.
struct metadata {
    struct gguf_value values[MOST];
    size_t n;
    struct gguf_string tokens[MOST], merges[MOST];
    int32_t types[MOST];
};

static struct gguf_string text(const char *s) {
    return (struct gguf_string){s, strlen(s)};
}

static struct gguf_value *find(struct metadata *m, const char *key) {
    for (size_t i = 0; i < m->n; i++)
        if (strcmp(m->values[i].key, key) == 0) return &m->values[i];
    m->values[m->n].key = key;
    return &m->values[m->n++];
}

static void drop(struct metadata *m, const char *key) {
    struct gguf_value *v = find(m, key);
    *v = m->values[--m->n];
}

static void set_text(struct metadata *m, const char *key, const char *value) {
    struct gguf_value *v = find(m, key);
    v->type = GGUF_STRING;
    v->as.s = text(value);
}

static void set_number(struct metadata *m, const char *key, enum gguf_type type, uint64_t value) {
    struct gguf_value *v = find(m, key);
    v->type = type;
    v->as.u = value;
}

static void set_strings(struct metadata *m, const char *key, struct gguf_string *list, size_t n) {
    struct gguf_value *v = find(m, key);
    v->type = GGUF_ARRAY;
    v->as.array.type = GGUF_STRING;
    v->as.array.n = n;
    v->as.array.strings = list;
}

static void set_types(struct metadata *m, size_t n, enum gguf_type type) {
    struct gguf_value *v = find(m, "tokenizer.ggml.token_type");
    v->type = GGUF_ARRAY;
    v->as.array.type = type;
    v->as.array.n = n;
    v->as.array.raw = (const unsigned char *)m->types;
}

// Tokens: a b c ab <s> (control) <u> (user-defined) [PAD6] (unused) bc (normal); merges: "a b", "b c".
enum { N_TOKENS = 8 };
static void good(struct metadata *m) {
    static const char *const tokens[] = {"a", "b", "c", "ab", "<s>", "<u>", "[PAD6]", "bc"};
    static const int32_t types[] = {1, 1, 1, 1, 3, 4, 5, 1};
    *m = (struct metadata){.n = 0};
    for (size_t i = 0; i < N_TOKENS; i++) {
        m->tokens[i] = text(tokens[i]);
        m->types[i] = types[i];
    }
    m->merges[0] = text("a b");
    m->merges[1] = text("b c");
    set_text(m, "tokenizer.ggml.model", "gpt2");
    set_text(m, "tokenizer.ggml.pre", "gpt-2");
    set_strings(m, "tokenizer.ggml.tokens", m->tokens, N_TOKENS);
    set_strings(m, "tokenizer.ggml.merges", m->merges, 2);
    set_types(m, N_TOKENS, GGUF_I32);
}

static struct tokenizer *open(struct metadata *m, struct error *err) {
    struct gguf g = {.values = m->values, .n_values = m->n};
    return tokenizer_open_gguf(&g, err);
}

static void refused(struct metadata *m, const char *words) {
    struct error err = {""};
    struct tokenizer *tok = open(m, &err);
    if (tok) fail_msg("accepted, where \"%s\" was expected", words);
    if (!strstr(err.text, words)) fail_msg("expected \"%s\" in: %s", words, err.text);
}

static void check_ids(const struct tokenizer *tok, const char *s, bool special, const char *wanted) {
    struct error err = {""};
    struct token_ids ids = {0};
    char found[128] = "";
    size_t used = 0;
    if (!tokenizer_encode(tok, s, strlen(s), special, &ids, &err)) fail_msg("%s", err.text);
    for (size_t i = 0; i < ids.n; i++)
        used += (size_t)snprintf(found + used, sizeof found - used, "%s%d", i ? " " : "", ids.ids[i]);
    assert_string_equal(found, wanted);
    token_ids_free(&ids);
}

static void test_good(void **state) {
    (void)state;
    struct metadata m;
    struct error err = {""};
    good(&m);
    set_number(&m, "tokenizer.ggml.bos_token_id", GGUF_U32, 4);
    set_number(&m, "tokenizer.ggml.eos_token_id", GGUF_U64, 5);
    set_number(&m, "tokenizer.ggml.add_bos_token", GGUF_BOOL, 1);
    set_text(&m, "tokenizer.chat_template", "{{ x }}");
    struct tokenizer *tok = open(&m, &err);
    if (!tok) fail_msg("%s", err.text);
    assert_int_equal(tokenizer_bos(tok), 4);
    assert_int_equal(tokenizer_eos(tok), 5);
    assert_true(tokenizer_adds_bos(tok));
    assert_string_equal(tokenizer_chat_template(tok), "{{ x }}");
    check_ids(tok, "abc", false, "3 2");
    check_ids(tok, "a<s>bc<u>", true, "0 4 7 5"); // a control token is found where special tokens are asked for
    check_ids(tok, "a<u>b", false, "0 5 1");      // a user-defined one always
    assert_true(tokenizer_is_special(tok, 4));
    assert_false(tokenizer_is_special(tok, 5));
    size_t n;
    assert_null(tokenizer_token_bytes(tok, 6, &n)); // an unused one is none
    struct buffer out = {0};
    struct token_ids ids = {0};
    assert_false(tokenizer_decode(tok, (const int32_t[]){0, 6}, 2, false, &out, &err));
    assert_non_null(strstr(err.text, "6"));
    assert_false(tokenizer_encode(tok, "a<s>", 4, false, &ids, &err)); // no token for '<' as plain text
    assert_int_equal(ids.n, 0);
    token_ids_free(&ids);
    buffer_free(&out);
    tokenizer_free(tok);
}

static void test_defaults(void **state) {
    (void)state;
    struct metadata m;
    struct error err = {""};
    good(&m);
    drop(&m, "tokenizer.ggml.token_type"); // all are normal then
    struct tokenizer *tok = open(&m, &err);
    if (!tok) fail_msg("%s", err.text);
    assert_int_equal(tokenizer_bos(tok), -1);
    assert_int_equal(tokenizer_eos(tok), -1);
    assert_false(tokenizer_adds_bos(tok));
    assert_null(tokenizer_chat_template(tok));
    assert_false(tokenizer_is_special(tok, 4));
    tokenizer_free(tok);
}

// "abc" has no merges to it from bytes but is a token: Llama 3 takes it whole, the others do not.
static void test_ignore_merges(void **state) {
    (void)state;
    static const char *const families[] = {"llama-bpe", "llama3", "llama-v3", "qwen2", "smollm", "gpt-2"};
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        struct metadata m;
        struct error err = {""};
        good(&m);
        m.tokens[7] = text("abc");
        set_strings(&m, "tokenizer.ggml.merges", m.merges, 1);
        set_text(&m, "tokenizer.ggml.pre", families[i]);
        set_number(&m, "tokenizer.ggml.bos_token_id", GGUF_U32, 4);
        struct tokenizer *tok = open(&m, &err);
        if (!tok) fail_msg("%s", err.text);
        check_ids(tok, "abc", false, i < 3 ? "7" : "3 2");
        assert_int_equal(tokenizer_adds_bos(tok), i < 3);
        tokenizer_free(tok);
    }
}

static void test_refused(void **state) {
    (void)state;
    struct metadata m;
    good(&m), drop(&m, "tokenizer.ggml.model"), refused(&m, "tokenizer.ggml.model");
    good(&m), set_text(&m, "tokenizer.ggml.model", "llama"), refused(&m, "SentencePiece");
    good(&m), set_number(&m, "tokenizer.ggml.model", GGUF_U8, 1), refused(&m, "tokenizer.ggml.model");
    good(&m), set_text(&m, "tokenizer.ggml.pre", "tekken"), refused(&m, "\"tekken\"; tandem knows qwen2");
    good(&m), set_number(&m, "tokenizer.ggml.pre", GGUF_U8, 1), refused(&m, "tokenizer.ggml.pre");
    good(&m), drop(&m, "tokenizer.ggml.tokens"), refused(&m, "tokenizer.ggml.tokens: expected an array");
    good(&m), set_text(&m, "tokenizer.ggml.tokens", "a"), refused(&m, "found another type");
    good(&m), drop(&m, "tokenizer.ggml.merges"), refused(&m, "tokenizer.ggml.merges: expected an array");
    good(&m), set_types(&m, N_TOKENS - 1, GGUF_I32), refused(&m, "token_type: expected an array of 8");
    good(&m), set_types(&m, N_TOKENS, GGUF_U8), refused(&m, "token_type: expected");
    good(&m), m.types[2] = 0, refused(&m, "token 2 has the unknown type 0");
    good(&m), m.types[2] = 7, refused(&m, "token 2 has the unknown type 7");
    good(&m), m.tokens[7] = text("ab"), refused(&m, "occurs twice");
    good(&m), m.merges[0] = text("ab"), refused(&m, "merge 0, \"ab\", is no pair");
    good(&m), m.merges[0] = text("a b c"), refused(&m, "no pair");
    good(&m), m.merges[1] = text("a x"), refused(&m, "tokenizer.ggml.merges");
    good(&m), m.merges[1] = text("a b"), refused(&m, "tokenizer.ggml.merges");
    good(&m), m.merges[0] = text(""), refused(&m, "no pair");
    good(&m), set_number(&m, "tokenizer.ggml.bos_token_id", GGUF_U32, 6), refused(&m, "bos_token_id is 6");
    good(&m), set_number(&m, "tokenizer.ggml.eos_token_id", GGUF_U32, 99), refused(&m, "eos_token_id is 99");
    good(&m), set_number(&m, "tokenizer.ggml.eos_token_id", GGUF_U64, 1ull << 40), refused(&m, "eos_token_id");
    good(&m), set_text(&m, "tokenizer.ggml.bos_token_id", "x"), refused(&m, "bos_token_id");
    good(&m), set_number(&m, "tokenizer.ggml.add_bos_token", GGUF_BOOL, 1),
        refused(&m, "no tokenizer.ggml.bos_token_id");
    good(&m), set_number(&m, "tokenizer.ggml.add_bos_token", GGUF_U8, 1), refused(&m, "add_bos_token");
    good(&m), set_number(&m, "tokenizer.chat_template", GGUF_U8, 1), refused(&m, "chat_template");
    good(&m), set_text(&m, "tokenizer.chat_template", "x");
    find(&m, "tokenizer.chat_template")->as.s = (struct gguf_string){"a\0b", 3};
    refused(&m, "zero byte");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_ignore_merges),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
