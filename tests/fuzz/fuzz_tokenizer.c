// fuzz_tokenizer.c: tokenizer files of any bytes, and text of any bytes.
//
// The input is cut at its first two 0xFF bytes, which no JSON holds: tokenizer.json, tokenizer_config.json, text. What
// opens must encode, or say why not, and the ids must decode.
#include "text/tokenizer.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok) {
    if (!ok) abort();
}

static void round_trip(const struct tokenizer *tok, const char *text, size_t n, bool special) {
    struct error err = {""};
    struct token_ids ids = {0};
    struct buffer back = {0};
    if (tokenizer_encode(tok, text, n, special, &ids, &err)) {
        require(ids.n <= n + 1);
        require(tokenizer_decode(tok, ids.ids, ids.n, false, &back, &err));
    } else {
        require(err.text[0] != 0 && ids.n == 0);
    }
    token_ids_free(&ids);
    buffer_free(&back);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const uint8_t *end = data + size, *cut = size ? memchr(data, 0xFF, size) : NULL, *config = NULL;
    size_t n_json = cut ? (size_t)(cut - data) : size, n_config = 0, n_text = 0;
    const char *text = "";
    if (cut) {
        config = cut + 1;
        cut = config < end ? memchr(config, 0xFF, (size_t)(end - config)) : NULL;
        n_config = (size_t)((cut ? cut : end) - config);
        if (cut) {
            text = (const char *)cut + 1;
            n_text = (size_t)(end - cut) - 1;
        }
    }
    struct error err = {""};
    struct tokenizer *tok =
        tokenizer_open_bytes((const char *)data, n_json, n_config ? (const char *)config : NULL, n_config, &err);
    require(tok || err.text[0] != 0);
    if (!tok) return 0;
    round_trip(tok, text, n_text, false);
    round_trip(tok, text, n_text, true);
    for (int32_t id = -1; id <= tokenizer_n_ids(tok) && id < 1000; id++) {
        size_t n;
        const char *bytes = tokenizer_token_bytes(tok, id, &n);
        require(bytes || n == 0);
        tokenizer_is_special(tok, id);
    }
    require(tokenizer_find(tok, "a") < tokenizer_n_ids(tok));
    tokenizer_free(tok);
    return 0;
}
