// tokenizer_json.c: tokenizers from tokenizer.json and tokenizer_config.json. What those ask for and this library lacks
// is refused by name.
#include "base/file.h"
#include "base/size.h"
#include "text/tokenizer_parts.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

enum { MAX_FILE = 256 << 20 };

static const char *text_of(const json_t *object, const char *key) {
    const char *s = json_string_value(json_object_get(object, key));
    return s ? s : "";
}

static bool flag_of(const json_t *object, const char *key) {
    return json_is_true(json_object_get(object, key));
}

static json_t *parse(const char *text, size_t n, const char *name, struct error *err) {
    json_error_t e;
    json_t *root = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &e);
    if (!root) error_set(err, "%s: line %d, column %d: %s", name, e.line, e.column, e.text);
    else if (!json_is_object(root)) {
        error_set(err, "%s: expected an object at the top", name);
        json_decref(root);
        root = NULL;
    }
    return root;
}

static bool add_step(struct pretokenizer *p, enum pretokenizer_step step, struct error *err) {
    if (p->n_steps == PRETOKENIZER_MAX_STEPS)
        return error_set(err, "tokenizer.json: pre_tokenizer has more than %d steps", PRETOKENIZER_MAX_STEPS);
    p->steps[p->n_steps++] = step;
    return true;
}

// `bytes_seen`: the ByteLevel step, which must come last, was there.
static bool read_pre_step(struct tokenizer *tok, const json_t *pre, bool *bytes_seen, struct error *err) {
    const char *type = text_of(pre, "type");
    if (*bytes_seen) return error_set(err, "tokenizer.json: pre-tokenizer '%s' after ByteLevel is not supported", type);
    if (strcmp(type, "ByteLevel") == 0) {
        *bytes_seen = true;
        if (flag_of(pre, "add_prefix_space"))
            return error_set(err, "tokenizer.json: ByteLevel with add_prefix_space is not supported");
        const json_t *use = json_object_get(pre, "use_regex");
        return json_is_false(use) || add_step(&tok->pre, PRETOKENIZER_GPT2, err);
    }
    if (strcmp(type, "Digits") == 0)
        return add_step(&tok->pre, flag_of(pre, "individual_digits") ? PRETOKENIZER_DIGIT_EACH : PRETOKENIZER_DIGIT_RUN,
                        err);
    if (strcmp(type, "Split") != 0)
        return error_set(
            err, "tokenizer.json: pre-tokenizer '%s' is not supported (Sequence, Split, Digits, ByteLevel)", type);
    const json_t *regex = json_object_get(json_object_get(pre, "pattern"), "Regex");
    if (!json_is_string(regex) || strcmp(text_of(pre, "behavior"), "Isolated") != 0 || flag_of(pre, "invert"))
        return error_set(err, "tokenizer.json: Split needs a Regex pattern, behavior Isolated and no invert");
    enum pretokenizer_step step;
    if (!pretokenizer_recognise(json_string_value(regex), json_string_length(regex), &step))
        return error_set(err, "tokenizer.json: the pre-tokenizer's regex is not supported: %s",
                         json_string_value(regex));
    return add_step(&tok->pre, step, err);
}

static bool read_pre(struct tokenizer *tok, const json_t *pre, struct error *err) {
    bool bytes_seen = false;
    const json_t *list = json_object_get(pre, "pretokenizers");
    if (strcmp(text_of(pre, "type"), "Sequence") != 0) {
        if (!read_pre_step(tok, pre, &bytes_seen, err)) return false;
    } else {
        for (size_t i = 0; i < json_array_size(list); i++)
            if (!read_pre_step(tok, json_array_get(list, i), &bytes_seen, err)) return false;
    }
    return bytes_seen || error_set(err, "tokenizer.json: pre_tokenizer has no ByteLevel; only byte-level BPE is "
                                        "supported");
}

static bool read_normalizer(struct tokenizer *tok, const json_t *normalizer, struct error *err) {
    if (!normalizer || json_is_null(normalizer)) return true;
    const char *type = text_of(normalizer, "type");
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_object_get(normalizer, "normalizers");
        for (size_t i = 0; i < json_array_size(list); i++) {
            const json_t *each = json_array_get(list, i);
            if (strcmp(text_of(each, "type"), "NFC") != 0)
                return error_set(err, "tokenizer.json: normalizer '%s' is not supported (NFC or none)",
                                 text_of(each, "type"));
            tok->nfc = true;
        }
        return true;
    }
    if (strcmp(type, "NFC") != 0)
        return error_set(err, "tokenizer.json: normalizer '%s' is not supported (NFC or none)", type);
    tok->nfc = true;
    return true;
}

static bool id_in_range(const json_t *value, const char *content, int32_t *id, struct error *err) {
    json_int_t v = json_integer_value(value);
    if (!json_is_integer(value) || v < 0 || v >= TOKENIZER_MAX_IDS)
        return error_set(err, "tokenizer.json: the id of token '%.60s' is no integer in [0, %d)", content,
                         TOKENIZER_MAX_IDS);
    *id = (int32_t)v;
    return true;
}

// One more than the largest id of the file; ids may have holes, within reason.
static bool count_ids(json_t *vocab, const json_t *added, int32_t *out, struct error *err) {
    const char *key;
    json_t *value;
    int32_t max = -1, id = -1;
    json_object_foreach(vocab, key, value) {
        if (!id_in_range(value, key, &id, err)) return false;
        if (id > max) max = id;
    }
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *each = json_array_get(added, i);
        if (!id_in_range(json_object_get(each, "id"), text_of(each, "content"), &id, err)) return false;
        if (id > max) max = id;
    }
    *out = max + 1;
    return true;
}

static bool read_added(struct tokenizer *tok, const json_t *added, struct error *err) {
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *each = json_array_get(added, i), *content = json_object_get(each, "content");
        if (!json_is_string(content) || json_string_length(content) == 0)
            return error_set(err, "tokenizer.json: added token %zu has no content", i);
        const char *text = json_string_value(content);
        size_t n = json_string_length(content);
        if (flag_of(each, "single_word"))
            return error_set(err, "tokenizer.json: added token '%.60s': single_word is not supported", text);
        int32_t id = (int32_t)json_integer_value(json_object_get(each, "id"));
        int32_t known = tokenizer_find_content(tok, text, n);
        if (known != id && !tokenizer_put(tok, id, text, n, err)) return false;
        if (tok->tokens[id].added) return error_set(err, "tokenizer.json: token '%.60s' is added twice", text);
        tok->tokens[id].added = true;
        tok->tokens[id].special = flag_of(each, "special");
        struct added_token token = {
            .id = id, .text = text, .n = n, .lstrip = flag_of(each, "lstrip"), .rstrip = flag_of(each, "rstrip")};
        if (!added_set_add(tok, flag_of(each, "normalized") ? &tok->normalized : &tok->raw, token))
            return error_set(err, "tokenizer.json: out of memory");
    }
    return true;
}

static bool read_merges(struct tokenizer *tok, const json_t *merges, struct error *err) {
    if (!json_is_array(merges)) return error_set(err, "tokenizer.json: model.merges: expected an array");
    size_t n = json_array_size(merges);
    if (n > TOKENIZER_MAX_IDS || !bpe_reserve(&tok->bpe, n))
        return error_set(err, "tokenizer.json: %zu merges are too many", n);
    for (size_t i = 0; i < n; i++) {
        const json_t *m = json_array_get(merges, i), *a = json_array_get(m, 0), *b = json_array_get(m, 1);
        bool ok;
        if (json_is_string(m)) {
            const char *text = json_string_value(m), *gap = memchr(text, ' ', json_string_length(m));
            if (!gap) return error_set(err, "tokenizer.json: merge %zu, '%.60s', is no pair", i, text);
            size_t left = (size_t)(gap - text);
            ok = tokenizer_merge(tok, text, left, gap + 1, json_string_length(m) - left - 1, (uint32_t)i, err);
        } else {
            if (json_array_size(m) != 2 || !json_is_string(a) || !json_is_string(b))
                return error_set(err, "tokenizer.json: merge %zu is no pair of strings", i);
            ok = tokenizer_merge(tok, json_string_value(a), json_string_length(a), json_string_value(b),
                                 json_string_length(b), (uint32_t)i, err);
        }
        if (!ok) return false;
    }
    return true;
}

static bool check_model(const json_t *model, struct error *err) {
    const char *type = text_of(model, "type");
    if (strcmp(type, "BPE") != 0 && !(type[0] == '\0' && json_object_get(model, "merges")))
        return error_set(err, "tokenizer.json: model type '%s' is not supported (BPE)", type);
    if (flag_of(model, "byte_fallback"))
        return error_set(err, "tokenizer.json: byte_fallback (SentencePiece vocabularies) is not supported");
    if (text_of(model, "continuing_subword_prefix")[0] || text_of(model, "end_of_word_suffix")[0])
        return error_set(err, "tokenizer.json: continuing_subword_prefix and end_of_word_suffix are not supported");
    const json_t *dropout = json_object_get(model, "dropout");
    if (dropout && !json_is_null(dropout) && json_number_value(dropout) != 0)
        return error_set(err, "tokenizer.json: dropout is not supported");
    if (!json_is_object(json_object_get(model, "vocab")))
        return error_set(err, "tokenizer.json: model.vocab: expected an object");
    return true;
}

static struct tokenizer *from_json(const json_t *root, struct error *err) {
    const json_t *model = json_object_get(root, "model"), *added = json_object_get(root, "added_tokens");
    int32_t n_ids;
    if (!check_model(model, err)) return NULL;
    json_t *vocab = json_object_get(model, "vocab"), *value;
    if (!count_ids(vocab, added, &n_ids, err)) return NULL;
    struct tokenizer *tok = tokenizer_new(n_ids, err);
    if (!tok) return NULL;
    tok->ignore_merges = flag_of(model, "ignore_merges");
    if (!read_normalizer(tok, json_object_get(root, "normalizer"), err)) goto fail;
    if (!read_pre(tok, json_object_get(root, "pre_tokenizer"), err)) goto fail;
    const char *key;
    json_object_foreach(vocab, key, value) {
        if (!tokenizer_put(tok, (int32_t)json_integer_value(value), key, strlen(key), err)) goto fail;
    }
    if (!read_merges(tok, json_object_get(model, "merges"), err)) goto fail;
    if (!read_added(tok, added, err)) goto fail;
    if (strcmp(text_of(json_object_get(root, "decoder"), "type"), "ByteLevel") != 0) {
        error_set(err, "tokenizer.json: decoder '%s' is not supported (ByteLevel)",
                  text_of(json_object_get(root, "decoder"), "type"));
        goto fail;
    }
    if (!tokenizer_finish(tok, err)) goto fail;
    return tok;
fail:
    tokenizer_free(tok);
    return NULL;
}

// bos_token and eos_token are a string, an object with "content", or null.
static int32_t special_id(const struct tokenizer *tok, const json_t *config, const char *key) {
    const json_t *value = json_object_get(config, key);
    if (json_is_object(value)) value = json_object_get(value, "content");
    return json_is_string(value) ? tokenizer_find_content(tok, json_string_value(value), json_string_length(value))
                                 : -1;
}

static bool read_config(struct tokenizer *tok, const json_t *config, struct error *err) {
    tok->bos = special_id(tok, config, "bos_token");
    tok->eos = special_id(tok, config, "eos_token");
    tok->adds_bos = flag_of(config, "add_bos_token") && tok->bos >= 0;
    const json_t *chat = json_object_get(config, "chat_template");
    if (!json_is_string(chat)) return true;
    tok->chat_template = arena_copy_text(&tok->arena, json_string_value(chat), json_string_length(chat));
    return tok->chat_template || error_set(err, "tokenizer_config.json: out of memory");
}

struct tokenizer *tokenizer_open_bytes(const char *json, size_t n_json, const char *config, size_t n_config,
                                       struct error *err) {
    json_t *root = parse(json, n_json, "tokenizer.json", err);
    if (!root) return NULL;
    struct tokenizer *tok = from_json(root, err);
    json_decref(root);
    if (!tok || !config) return tok;
    json_t *settings = parse(config, n_config, "tokenizer_config.json", err);
    bool ok = settings && read_config(tok, settings, err);
    json_decref(settings);
    if (ok) return tok;
    tokenizer_free(tok);
    return NULL;
}

// Reads folder/name where it exists.
static bool read_optional(const char *folder, const char *name, struct buffer *out, bool *found, struct error *err) {
    struct buffer path = {0};
    bool ok = buffer_printf(&path, "%s/%s", folder, name);
    if (!ok) error_set(err, "%s: out of memory", name);
    *found = ok && file_exists(path.data);
    if (*found) ok = file_read(path.data, MAX_FILE, out, err);
    buffer_free(&path);
    return ok;
}

struct tokenizer *tokenizer_open_folder(const char *folder, struct error *err) {
    struct buffer json = {0}, config = {0}, chat = {0};
    struct tokenizer *tok = NULL;
    bool has_json, has_config, has_chat;
    if (!read_optional(folder, "tokenizer.json", &json, &has_json, err) ||
        !read_optional(folder, "tokenizer_config.json", &config, &has_config, err) ||
        !read_optional(folder, "chat_template.jinja", &chat, &has_chat, err))
        goto done;
    if (!has_json) {
        error_set(err, "%s: no tokenizer.json in this folder", folder);
        goto done;
    }
    tok = tokenizer_open_bytes(buffer_text(&json), json.len, has_config ? buffer_text(&config) : NULL, config.len, err);
    if (!tok) {
        error_prefix(err, "%s: ", folder);
        goto done;
    }
    if (has_chat) tok->chat_template = arena_copy_text(&tok->arena, buffer_text(&chat), chat.len);
    if (has_chat && !tok->chat_template) {
        error_set(err, "%s: out of memory", folder);
        tokenizer_free(tok);
        tok = NULL;
    }
done:
    buffer_free(&chat);
    buffer_free(&config);
    buffer_free(&json);
    return tok;
}
