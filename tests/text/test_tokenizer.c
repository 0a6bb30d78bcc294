// test_tokenizer.c: how a tokenizer treats added tokens, invalid UTF-8, normal forms and long words, on vocabularies
// small enough to work out by hand. Agreement with the PyPI library is tests/e2e/test_tokenizer.py's subject.
#include "text/tokenizer.h"

#include "base/buffer.h"
#include "base/clock.h"
#include "text/pretokenizer.h"
#include "text/unicode.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true}"

// A tokenizer.json whose tokens 0 to 255 are the bytes, 256 and on those of `vocab` ("\"ab\":256,..."), or an object of
// parts: NULL where a default will do.
struct parts {
    const char *vocab, *merges, *added, *normalizer, *pre, *post, *decoder, *model;
};

static void append_byte_token(struct buffer *b, unsigned byte) {
    static const char escape[] = "\\u%04x";
    unsigned c = byte;
    if (byte <= 0x20) c = 0x100 + byte;
    else if (byte >= 0x7F && byte <= 0xA0) c = 0x121 + (byte - 0x7F);
    else if (byte == 0xAD) c = 0x143;
    assert_true(buffer_append_text(b, byte ? ",\"" : "\""));
    char text[16];
    snprintf(text, sizeof text, escape, c);
    assert_true(buffer_append_text(b, text));
    assert_true(buffer_printf(b, "\":%u", byte));
}

static struct buffer write_file(const struct parts *p) {
    struct buffer b = {0};
    assert_true(buffer_printf(&b,
                              "{\"added_tokens\":[%s],\"normalizer\":%s,\"pre_tokenizer\":%s,\"post_processor\":%s,",
                              p->added ? p->added : "", p->normalizer ? p->normalizer : "null",
                              p->pre ? p->pre : BYTE_LEVEL, p->post ? p->post : "null"));
    assert_true(buffer_printf(&b, "\"decoder\":%s,\"model\":{\"type\":\"BPE\",%s\"vocab\":{",
                              p->decoder ? p->decoder : BYTE_LEVEL, p->model ? p->model : ""));
    for (unsigned byte = 0; byte < 256; byte++) append_byte_token(&b, byte);
    assert_true(buffer_printf(&b, "%s%s},\"merges\":[%s]}}", p->vocab ? "," : "", p->vocab ? p->vocab : "",
                              p->merges ? p->merges : ""));
    return b;
}

static struct tokenizer *open_parts(const struct parts *p) {
    struct error err = {""};
    struct buffer b = write_file(p);
    struct tokenizer *tok = tokenizer_open_bytes(b.data, b.len, NULL, 0, &err);
    if (!tok) fail_msg("%s", err.text);
    buffer_free(&b);
    return tok;
}

static void refused(const struct parts *p, const char *words) {
    struct error err = {""};
    struct buffer b = write_file(p);
    assert_null(tokenizer_open_bytes(b.data, b.len, NULL, 0, &err));
    if (!strstr(err.text, words)) fail_msg("expected \"%s\" in: %s", words, err.text);
    buffer_free(&b);
}

// Encodes and compares with ids as text, "97 98".
static void encodes(const struct tokenizer *tok, const char *text, size_t n, bool special, const char *expected) {
    struct error err = {""};
    struct token_ids ids = {0};
    struct buffer found = {0};
    if (!tokenizer_encode(tok, text, n, special, &ids, &err)) fail_msg("%s", err.text);
    for (size_t i = 0; i < ids.n; i++) assert_true(buffer_printf(&found, "%s%d", i ? " " : "", ids.ids[i]));
    assert_string_equal(buffer_text(&found), expected);
    buffer_free(&found);
    token_ids_free(&ids);
}

static void test_merges(void **state) {
    (void)state;
    // Lowest rank first: "abc" is a+bc although ab is a token. Then leftmost: "aaa" is aa+a.
    struct parts p = {.vocab = "\"bc\":256,\"ab\":257,\"aa\":258", .merges = "\"b c\",[\"a\",\"b\"],\"\\u0061 a\""};
    struct tokenizer *tok = open_parts(&p);
    encodes(tok, "abc", 3, false, "97 256");
    encodes(tok, "ab", 2, false, "257");
    encodes(tok, "aaa", 3, false, "258 97");
    encodes(tok, "", 0, false, "");
    encodes(tok, "\0", 1, false, "0");
    tokenizer_free(tok);
    p.model = "\"ignore_merges\":true,";
    p.vocab = "\"bc\":256,\"ab\":257,\"aa\":258,\"abc\":259";
    tok = open_parts(&p);
    encodes(tok, "abc", 3, false, "259");
    encodes(tok, "abcb", 4, false, "97 256 98");
    tokenizer_free(tok);
}

static void test_invalid_utf8(void **state) {
    (void)state;
    struct tokenizer *tok = open_parts(&(struct parts){.normalizer = "{\"type\":\"NFC\"}"});
    encodes(tok, "a\xFF\xC0\xAF\xED\xA0\x80", 7, false, "97 255 192 175 237 160 128");
    encodes(tok, "\xE2\x82", 2, false, "226 130");              // cut short
    encodes(tok, "e\xCC\x81\xCC", 4, false, "195 169 204");     // composed up to the broken mark
    encodes(tok, "e\xFF\xCC\x81", 4, false, "101 255 204 129"); // nothing joins across an invalid byte
    tokenizer_free(tok);
    tok = open_parts(&(struct parts){0});
    encodes(tok, "e\xCC\x81", 3, false, "101 204 129"); // no normaliser: as it is
    tokenizer_free(tok);
}

static void test_added_tokens(void **state) {
    (void)state;
    static const struct parts p = {.normalizer = "{\"type\":\"NFC\"}",
                                   .added = "{\"id\":300,\"content\":\"<s>\",\"special\":true,\"normalized\":false},"
                                            "{\"id\":301,\"content\":\"<s>x\",\"normalized\":false},"
                                            "{\"id\":302,\"content\":\"<l>\",\"lstrip\":true,\"normalized\":false},"
                                            "{\"id\":303,\"content\":\"<r>\",\"rstrip\":true,\"normalized\":false},"
                                            "{\"id\":304,\"content\":\"ww\",\"single_word\":true,\"normalized\":false},"
                                            "{\"id\":305,\"content\":\"\\u00e9\\u00e9\",\"normalized\":true}"};
    struct tokenizer *tok = open_parts(&p);
    encodes(tok, "<s>", 3, true, "300");
    encodes(tok, "<s>", 3, false, "60 115 62"); // special text is plain text
    encodes(tok, "<s>x", 4, true, "301");       // the longest
    encodes(tok, "<s>x", 4, false, "301");      // not special: always an id
    encodes(tok, "a \n<l> b", 8, false, "97 302 32 98");
    encodes(tok, "a <r> \n b", 9, false, "97 32 303 98");
    encodes(tok, "ww aww ww", 9, false, "304 32 97 119 119 32 304");
    encodes(tok, "e\xCC\x81\xC3\xA9", 5, false, "305"); // found after normalisation
    assert_true(tokenizer_is_special(tok, 300));
    assert_false(tokenizer_is_special(tok, 301));
    assert_false(tokenizer_is_special(tok, 1 << 30));
    assert_int_equal(tokenizer_n_ids(tok), 306);
    assert_int_equal(tokenizer_find(tok, "<s>"), 300);
    assert_int_equal(tokenizer_find(tok, " "), 32);
    assert_int_equal(tokenizer_find(tok, "nothing"), -1);
    struct error err = {""};
    struct buffer text = {0};
    assert_true(tokenizer_decode(tok, (const int32_t[]){300, 97, 32, 255, 302}, 5, false, &text, &err));
    assert_string_equal(buffer_text(&text), "<s>a \xFF<l>");
    buffer_clear(&text);
    assert_true(tokenizer_decode(tok, (const int32_t[]){300, 97, 302}, 3, true, &text, &err));
    assert_string_equal(buffer_text(&text), "a<l>");
    assert_false(tokenizer_decode(tok, (const int32_t[]){299}, 1, false, &text, &err)); // a hole
    assert_non_null(strstr(err.text, "299"));
    assert_false(tokenizer_decode(tok, (const int32_t[]){-1}, 1, false, &text, &err));
    buffer_free(&text);
    tokenizer_free(tok);
}

static void test_bos(void **state) {
    (void)state;
    struct parts p = {.added = "{\"id\":300,\"content\":\"<s>\",\"special\":true}"};
    p.post = "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},"
             "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}]}";
    struct tokenizer *tok = open_parts(&p);
    assert_true(tokenizer_adds_bos(tok));
    assert_int_equal(tokenizer_bos(tok), 300);
    encodes(tok, "a", 1, true, "97"); // the caller puts it in front
    tokenizer_free(tok);
    p.post = "{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":\"A\"}},"
             "{\"SpecialToken\":{\"id\":\"<s>\"}}]}";
    refused(&p, "post_processor");
    // As Llama 3's files have it: offsets first, then the template.
#define LLAMA3_POST(id)                                                                                                \
    "{\"type\":\"Sequence\",\"processors\":[{\"type\":\"ByteLevel\"},{\"type\":\"TemplateProcessing\",\"single\":["    \
    "{\"SpecialToken\":{\"id\":\"" id "\"}},{\"Sequence\":{\"id\":\"A\"}}]}]}"
    p.post = LLAMA3_POST("<s>");
    tok = open_parts(&p);
    assert_true(tokenizer_adds_bos(tok) && tokenizer_bos(tok) == 300);
    tokenizer_free(tok);
    p.post = LLAMA3_POST("<none>");
    refused(&p, "post_processor names \"<none>\", which is no token");
    p.post = "{\"type\":\"Sequence\",\"processors\":[{\"type\":\"RobertaProcessing\"}]}";
    refused(&p, "RobertaProcessing");
    p.post = "{\"type\":\"BertProcessing\"}";
    refused(&p, "BertProcessing");
    p.post = NULL;
    struct buffer b = write_file(&p);
    struct error err = {""};
    static const char without[] = "{\"add_bos_token\":true}";
    assert_null(tokenizer_open_bytes(b.data, b.len, without, sizeof without - 1, &err));
    assert_non_null(strstr(err.text, "no \"bos_token\" is given"));
    static const char good[] = "{\"add_bos_token\":true,\"bos_token\":{\"content\":\"<s>\"},\"eos_token\":\"<s>\","
                               "\"chat_template\":[{\"name\":\"default\",\"template\":\"T\"}]}",
                      bad[] = "{\"eos_token\":\"<e>\"}";
    tok = tokenizer_open_bytes(b.data, b.len, good, sizeof good - 1, &err);
    assert_non_null(tok);
    assert_true(tokenizer_adds_bos(tok) && tokenizer_bos(tok) == 300 && tokenizer_eos(tok) == 300);
    assert_string_equal(tokenizer_chat_template(tok), "T");
    tokenizer_free(tok);
    assert_null(tokenizer_open_bytes(b.data, b.len, bad, sizeof bad - 1, &err));
    assert_non_null(strstr(err.text, "<e>"));
    buffer_free(&b);
}

#define SPLIT(regex)                                                                                                   \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex                    \
    "\"},\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"              \
    "\"use_regex\":false}]}"

#define SPLIT_AS(behavior, invert)                                                                                     \
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"x\"},\"behavior\":\"" behavior "\",\"invert\":" invert "}"
#define NORMALIZERS(list) "{\"type\":\"Sequence\",\"normalizers\":[" list "]}"

static void test_refused(void **state) {
    (void)state;
    refused(&(struct parts){.vocab = "\"ab\":255"}, "id 255 is given to two tokens");
    refused(&(struct parts){.vocab = "\"ab\":256,\"ab\":257"}, "\"ab\" occurs twice");
    refused(&(struct parts){.vocab = "\"ab\":-1"}, "-1");
    refused(&(struct parts){.vocab = "\"ab\":99999999"}, "99999999");
    refused(&(struct parts){.vocab = "\"ab\":99999999999999999999"}, "64 bits");
    refused(&(struct parts){.vocab = "\"ab\":1.5"}, "an integer");
    refused(&(struct parts){.vocab = "\"ab\":\"1\""}, "an integer");
    refused(&(struct parts){.vocab = "\"a\\ud800\":256"}, "surrogate");
    refused(&(struct parts){.vocab = "\"a\\u0000\":256"}, "escape");
    refused(&(struct parts){.merges = "\"a b\""}, "joins \"a\" and \"b\" to what is no token");
    refused(&(struct parts){.merges = "\"a xyz\""}, "\"xyz\", which is no token");
    refused(&(struct parts){.merges = "\"a\""}, "no pair");
    refused(&(struct parts){.merges = "[\"a\"]"}, "other side");
    refused(&(struct parts){.merges = "7"}, "a string");
    refused(&(struct parts){.vocab = "\"ab\":256", .merges = "\"a b\",[\"a\",\"b\"]"}, "repeats merge 0");
    refused(&(struct parts){.added = "{\"id\":97,\"content\":\"zz\"}"}, "id 97");
    refused(&(struct parts){.added = "{\"id\":5,\"content\":\"a\"}"}, "has id 5, but that text is id 97");
    refused(&(struct parts){.added = "{\"id\":-5,\"content\":\"zz\"}"}, "-5");
    refused(&(struct parts){.added = "{\"content\":\"zz\"}"}, "needs \"content\" and \"id\"");
    refused(&(struct parts){.normalizer = "{\"type\":\"NFKC\"}"}, "normalizer NFKC is not supported");
    refused(&(struct parts){.pre = "{\"type\":\"Metaspace\"}"}, "Metaspace is not supported");
    refused(&(struct parts){.pre = "null"}, "ByteLevel");
    refused(&(struct parts){.pre = SPLIT("(a")}, "(a");
    refused(&(struct parts){.decoder = "{\"type\":\"Metaspace\"}"}, "decoder Metaspace");
    refused(&(struct parts){.model = "\"byte_fallback\":true,"}, "byte_fallback");
    refused(&(struct parts){.model = "\"dropout\":0.1,"}, "dropout");
    refused(&(struct parts){.model = "\"continuing_subword_prefix\":\"##\","}, "continuing_subword_prefix");
    refused(&(struct parts){.pre = SPLIT_AS("Removed", "false")}, "behavior Removed");
    refused(&(struct parts){.pre = SPLIT_AS("Isolated", "true")}, "Isolated, inverted,");
    refused(&(struct parts){.pre = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\"},{\"type\":"
                                   "\"ByteLevel\",\"add_prefix_space\":true}]}"},
            "add_prefix_space inside a Sequence");
    refused(&(struct parts){.pre = "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTE_LEVEL ",{\"type\":\"Digits\"}]}"},
            "Digits behind ByteLevel");
    refused(&(struct parts){.pre = "{\"type\":\"Split\",\"pattern\":{\"String\":\" \"}}"}, "only a Regex pattern");
    refused(&(struct parts){.normalizer = NORMALIZERS("{\"type\":\"NFC\"},{\"type\":\"Lowercase\"}")}, "Lowercase");
    refused(&(struct parts){.normalizer = "{\"type\":\"Sequence\"}"}, "\"normalizers\": expected an array");
    static const char wordpiece[] =
        "{\"pre_tokenizer\":" BYTE_LEVEL ",\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}}";
    struct error err = {""};
    assert_null(tokenizer_open_bytes(wordpiece, sizeof wordpiece - 1, NULL, 0, &err));
    if (!strstr(err.text, "WordPiece is not supported")) fail_msg("%s", err.text);
    assert_null(tokenizer_open_folder("tests/text", &err));
    assert_non_null(strstr(err.text, "tokenizer.json"));
}

static void test_truncated(void **state) {
    (void)state;
    static const struct parts p = {
        .vocab = "\"ab\":256", .merges = "\"a b\"", .added = "{\"id\":300,\"content\":\"<s>\"}"};
    struct buffer b = write_file(&p);
    for (size_t n = 0; n < b.len; n++) {
        struct error err = {""};
        assert_null(tokenizer_open_bytes(b.data, n, NULL, 0, &err));
        assert_true(err.text[0] != 0);
    }
    buffer_free(&b);
}

static void test_patterns(void **state) {
    (void)state;
    // A pattern without a scanner: matches and what lies between are words.
    struct tokenizer *tok =
        open_parts(&(struct parts){.vocab = "\"ab\":256,\"ba\":257", .merges = "\"a b\",\"b a\"", .pre = SPLIT("b")});
    encodes(tok, "abab", 4, false, "97 98 97 98");
    encodes(tok, "a\xFF", 2, false, "97 255");
    tokenizer_free(tok);
    // A pattern that backtracks for ever is an error that names it.
    tok = open_parts(&(struct parts){.pre = SPLIT("(?:a|aa)+[cd]")});
    struct buffer text = {0};
    for (int i = 0; i < 3000; i++) assert_true(buffer_append_byte(&text, 'a'));
    struct token_ids ids = {0};
    struct error err = {""};
    assert_false(tokenizer_encode(tok, text.data, text.len, false, &ids, &err));
    assert_non_null(strstr(err.text, "(?:a|aa)+[cd]"));
    assert_int_equal(ids.n, 0);
    token_ids_free(&ids);
    buffer_free(&text);
    tokenizer_free(tok);
}

// Ten million marks on one letter, and a word of four million letters: neither is quadratic. The bound is far above
// what either takes, and far below what a quadratic one would.
static void test_long(void **state) {
    (void)state;
    struct tokenizer *tok = open_parts(&(struct parts){
        .vocab = "\"aa\":256,\"aaaa\":257", .merges = "\"a a\",\"aa aa\"", .normalizer = "{\"type\":\"NFC\"}"});
    struct buffer text = {0};
    struct token_ids ids = {0};
    struct error err = {""};
    double begin = clock_seconds();
    for (int i = 0; i < 4000001; i++) assert_true(buffer_append_byte(&text, 'a'));
    assert_true(tokenizer_encode(tok, text.data, text.len, false, &ids, &err));
    assert_int_equal(ids.n, 1000001);
    assert_int_equal(ids.ids[999999], 257);
    assert_int_equal(ids.ids[1000000], 97);
    buffer_clear(&text);
    for (int i = 0; i < 1000000; i++) assert_true(buffer_append(&text, i % 2 ? "\xCC\x81" : "\xCC\xA3", 2));
    assert_true(tokenizer_encode(tok, text.data, text.len, false, &ids, &err));
    assert_true(clock_seconds() - begin < 60);
    token_ids_free(&ids);
    buffer_free(&text);
    tokenizer_free(tok);
}

static void nfc_gives(const char *text, const char *expected) {
    struct buffer out = {0};
    assert_true(unicode_nfc(text, strlen(text), &out));
    assert_string_equal(buffer_text(&out), expected);
    assert_true(unicode_nfc_prefix(expected, strlen(expected)) <= strlen(expected));
    buffer_free(&out);
}

static void test_normalizers(void **state) {
    (void)state;
    static const char *const forms[] = {"{\"type\":\"NFC\"}", NORMALIZERS("{\"type\":\"NFC\"}"), NORMALIZERS("")};
    for (size_t i = 0; i < 3; i++) {
        struct tokenizer *tok = open_parts(&(struct parts){.normalizer = forms[i]});
        encodes(tok, "e\xcc\x81", 3, false, i < 2 ? "195 169" : "101 204 129");
        tokenizer_free(tok);
    }
}

static void test_nfc(void **state) {
    (void)state;
    nfc_gives("", "");
    nfc_gives("plain", "plain");
    nfc_gives("e\u0301", "\u00e9");
    nfc_gives("a\u0301\u0323", "\u1ea1\u0301");  // sorted, then composed
    nfc_gives("\u1112\u1161\u11ab", "\ud55c");   // Hangul
    nfc_gives("\uac00\u11a8", "\uac01");         //
    nfc_gives("\u212b", "\u00c5");               // a singleton
    nfc_gives("\u0958", "\u0915\u093c");         // excluded from composition
    nfc_gives("x\u0345\u0301", "x\u0301\u0345"); //
    nfc_gives("\u0301e\u0301", "\u0301\u00e9");  // a mark with nothing to stand on
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_merges),      cmocka_unit_test(test_invalid_utf8), cmocka_unit_test(test_added_tokens),
        cmocka_unit_test(test_normalizers), cmocka_unit_test(test_bos),          cmocka_unit_test(test_refused),
        cmocka_unit_test(test_truncated),   cmocka_unit_test(test_patterns),     cmocka_unit_test(test_long),
        cmocka_unit_test(test_nfc),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
