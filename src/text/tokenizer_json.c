// tokenizer_json.c: tokenizers from tokenizer.json and tokenizer_config.json. What those ask for and this library lacks
// is refused by name.
#include "base/file.h"
#include "format/json.h"
#include "text/tokenizer_parts.h"
#include "text/tokenizer_reader.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define FILE_NAME "tokenizer.json"
#define CONFIG_NAME "tokenizer_config.json"

// Vocabulary and merges take most of the file and are read in place; the rest goes to the general parser, whose own
// limit is lower.
enum { MAX_FILE_BYTES = 256 << 20 };

// A member that may be absent or null: NULL then.
static const json_t *member(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    return json_is_null(value) ? NULL : value;
}

static const char *type_of(const json_t *object) {
    const char *type = json_string_value(member(object, "type"));
    return type ? type : "(no type)";
}

static bool is_type(const json_t *object, const char *type) {
    return strcmp(type_of(object), type) == 0;
}

// Checked first: what else another kind of tokenizer holds that tandem lacks says less.
static bool check_model_type(const json_t *root, struct error *err) {
    const json_t *model = member(root, "model");
    if (!json_is_object(model)) return error_set(err, FILE_NAME ": \"model\": expected an object");
    return !member(model, "type") || is_type(model, "BPE") || // old files name no type
           error_set(err, FILE_NAME ": model %.60s is not supported; tandem knows byte-level BPE", type_of(model));
}

static bool read_normalizer(struct tokenizer *tok, const json_t *root, struct error *err) {
    const json_t *normalizer = member(root, "normalizer");
    if (!normalizer) return true;
    if (is_type(normalizer, "Sequence")) {
        const json_t *list = member(normalizer, "normalizers");
        for (size_t i = 0; i < json_array_size(list); i++) {
            normalizer = json_array_get(list, i);
            if (!is_type(normalizer, "NFC")) goto unknown;
            tok->nfc = true;
        }
        return json_is_array(list) || error_set(err, FILE_NAME ": normalizer: \"normalizers\": expected an array");
    }
    if (!is_type(normalizer, "NFC")) goto unknown;
    tok->nfc = true;
    return true;
unknown:
    return error_set(err, FILE_NAME ": normalizer %.60s is not supported; tandem knows NFC and none",
                     type_of(normalizer));
}

static bool read_split(struct tokenizer *tok, const json_t *split, struct error *err) {
    const char *where = FILE_NAME ": pre_tokenizer Split", *behavior = "(none)";
    bool invert = false;
    if (!json_read_text(split, where, "behavior", &behavior, err) ||
        !json_read_bool(split, where, "invert", &invert, err))
        return false;
    const json_t *regex = member(member(split, "pattern"), "Regex");
    if (!json_is_string(regex)) return error_set(err, "%s: only a Regex pattern is supported", where);
    if (strcmp(behavior, "Isolated") != 0 || invert)
        return error_set(err, "%s: behavior %.60s%s is not supported; tandem knows Isolated", where, behavior,
                         invert ? ", inverted," : "");
    return pretokenizer_add_pattern(tok->pre, json_string_value(regex), json_string_length(regex), err) ||
           error_prefix(err, FILE_NAME ": ");
}

// One stage. ByteLevel comes last, because what stands behind it would see the alphabet; it is what makes this
// byte-level BPE.
static bool read_stage(struct tokenizer *tok, const json_t *stage, bool alone, bool *byte_level, struct error *err) {
    const char *where = FILE_NAME ": pre_tokenizer";
    if (*byte_level) return error_set(err, "%s: %.60s behind ByteLevel is not supported", where, type_of(stage));
    if (is_type(stage, "Split")) return read_split(tok, stage, err);
    if (is_type(stage, "Digits")) {
        bool each = false;
        return json_read_bool(stage, where, "individual_digits", &each, err) &&
               pretokenizer_add(tok->pre, each ? PRETOKENIZER_DIGITS : PRETOKENIZER_DIGITS_CONTIGUOUS, err);
    }
    if (is_type(stage, "ByteLevel")) {
        bool prefix = true, regex = true; // the library's defaults
        if (!json_read_bool(stage, where, "add_prefix_space", &prefix, err) ||
            !json_read_bool(stage, where, "use_regex", &regex, err))
            return false;
        if (prefix && !alone)
            return error_set(err, "%s: ByteLevel with add_prefix_space inside a Sequence is not supported", where);
        tok->prefix_space = prefix;
        *byte_level = true;
        return !regex || pretokenizer_add(tok->pre, PRETOKENIZER_GPT2, err);
    }
    return error_set(err, "%s: %.60s is not supported; tandem knows Sequence, Split, Digits and ByteLevel", where,
                     type_of(stage));
}

static bool read_pretokenizer(struct tokenizer *tok, const json_t *root, struct error *err) {
    const json_t *pre = member(root, "pre_tokenizer");
    bool byte_level = false;
    if (pre && is_type(pre, "Sequence")) {
        const json_t *list = member(pre, "pretokenizers");
        for (size_t i = 0; i < json_array_size(list); i++) {
            if (!read_stage(tok, json_array_get(list, i), false, &byte_level, err)) return false;
        }
    } else if (pre && !read_stage(tok, pre, true, &byte_level, err)) {
        return false;
    }
    return byte_level ||
           error_set(err, FILE_NAME ": pre_tokenizer: no ByteLevel; only byte-level BPE is supported, SentencePiece "
                                    "and others are not");
}

static bool read_decoder(const json_t *root, struct error *err) {
    const json_t *decoder = member(root, "decoder");
    if (is_type(decoder, "ByteLevel")) return true;
    return error_set(err, FILE_NAME ": decoder %.60s is not supported; tandem knows ByteLevel", type_of(decoder));
}

static bool read_model(struct tokenizer *tok, const struct tokenizer_outline *outline, const json_t *root,
                       bool *ignore_merges, struct error *err) {
    const char *where = FILE_NAME ": model", *prefix = "", *suffix = "";
    const json_t *model = member(root, "model");
    double dropout = 0;
    bool byte_fallback = false;
    if (!json_read_text(model, where, "continuing_subword_prefix", &prefix, err) ||
        !json_read_text(model, where, "end_of_word_suffix", &suffix, err) ||
        !json_read_number(model, where, "dropout", &dropout, err) ||
        !json_read_bool(model, where, "byte_fallback", &byte_fallback, err) ||
        !json_read_bool(model, where, "ignore_merges", ignore_merges, err))
        return false;
    if (*prefix || *suffix)
        return error_set(err, "%s: continuing_subword_prefix and end_of_word_suffix are not supported", where);
    if (dropout != 0) return error_set(err, "%s: dropout %g is not supported", where, dropout);
    if (byte_fallback) return error_set(err, "%s: byte_fallback (SentencePiece) is not supported", where);
    if (!tokenizer_read_vocab(outline, tok->bpe, err) || !tokenizer_read_merges(outline, tok->bpe, err)) return false;
    bpe_end_model(tok->bpe);
    return true;
}

static bool read_added(struct tokenizer *tok, const json_t *root, struct error *err) {
    const json_t *list = member(root, "added_tokens");
    if (list && !json_is_array(list)) return error_set(err, FILE_NAME ": \"added_tokens\": expected an array");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *entry = json_array_get(list, i);
        const char *where = FILE_NAME ": added_tokens", *text = NULL;
        struct added_token token = {0};
        int64_t id = -1;
        bool normalized = true;
        if (!json_read_text(entry, where, "content", &text, err) ||
            !json_read_int(entry, where, "id", 0, BPE_MAX_ID, &id, err) ||
            !json_read_bool(entry, where, "special", &token.special, err) ||
            !json_read_bool(entry, where, "lstrip", &token.lstrip, err) ||
            !json_read_bool(entry, where, "rstrip", &token.rstrip, err) ||
            !json_read_bool(entry, where, "single_word", &token.single_word, err) ||
            !json_read_bool(entry, where, "normalized", &normalized, err))
            return false;
        if (!text || id < 0) return error_set(err, "%s: entry %zu needs \"content\" and \"id\"", where, i);
        token.id = (int32_t)id;
        if (!tokenizer_add(tok, &token, text, strlen(text), normalized, err)) return error_prefix(err, FILE_NAME ": ");
    }
    return true;
}

// The one thing that a TemplateProcessing may do here is to put one token in front of a single text.
static bool read_template(struct tokenizer *tok, const json_t *processor, struct error *err) {
    const json_t *list = member(processor, "single"), *front = NULL;
    bool text_seen = false;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *special = member(json_array_get(list, i), "SpecialToken");
        if (special && (front || text_seen))
            return error_set(err, FILE_NAME ": post_processor: a template that adds more than one token in front is "
                                            "not supported");
        if (special) front = member(special, "id");
        else text_seen = true;
    }
    if (!front) return true;
    const char *text = json_string_value(front);
    tok->bos = text ? bpe_find(tok->bpe, text, strlen(text)) : -1;
    tok->adds_bos = true;
    return tok->bos >= 0 ||
           error_set(err, FILE_NAME ": post_processor names \"%.60s\", which is no token", text ? text : "(no text)");
}

static bool read_post_processor(struct tokenizer *tok, const json_t *root, struct error *err) {
    const json_t *post = member(root, "post_processor"), *list = member(post, "processors");
    if (!post || is_type(post, "ByteLevel")) return true; // ByteLevel touches offsets only
    if (is_type(post, "TemplateProcessing")) return read_template(tok, post, err);
    if (!is_type(post, "Sequence")) goto unknown;
    for (size_t i = 0; i < json_array_size(list); i++) {
        post = json_array_get(list, i);
        if (is_type(post, "ByteLevel")) continue;
        if (!is_type(post, "TemplateProcessing")) goto unknown;
        if (!read_template(tok, post, err)) return false;
    }
    return true;
unknown:
    return error_set(err,
                     FILE_NAME ": post_processor %.60s is not supported; tandem knows TemplateProcessing and "
                               "ByteLevel",
                     type_of(post));
}

// "bos_token" and "eos_token" are a text, an object with "content", or null.
static bool read_special_id(const struct tokenizer *tok, const json_t *config, const char *key, int32_t *id,
                            struct error *err) {
    const json_t *value = member(config, key);
    if (!value) return true;
    if (json_is_object(value)) value = member(value, "content");
    if (!json_is_string(value)) return error_set(err, CONFIG_NAME ": \"%s\": expected a text", key);
    int32_t found = bpe_find(tok->bpe, json_string_value(value), json_string_length(value));
    if (found < 0)
        return error_set(err, CONFIG_NAME ": \"%s\" is \"%.60s\", which is no token", key, json_string_value(value));
    *id = found;
    return true;
}

static bool set_chat_template(struct tokenizer *tok, const char *text, struct error *err) {
    char *copy = strdup(text);
    if (!copy) return error_set(err, "chat template: out of memory");
    free(tok->chat_template);
    tok->chat_template = copy;
    return true;
}

// "chat_template" is a text, or a list of named ones of which "default" counts.
static bool read_chat_template(struct tokenizer *tok, const json_t *config, struct error *err) {
    const json_t *value = member(config, "chat_template");
    if (!value) return true;
    if (json_is_string(value)) return set_chat_template(tok, json_string_value(value), err);
    if (!json_is_array(value)) return error_set(err, CONFIG_NAME ": \"chat_template\": expected a text or a list");
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *entry = json_array_get(value, i);
        const char *name = json_string_value(member(entry, "name")), *text;
        if (!name || strcmp(name, "default") != 0) continue;
        text = json_string_value(member(entry, "template"));
        if (text) return set_chat_template(tok, text, err);
    }
    return true;
}

static bool read_config(struct tokenizer *tok, const json_t *config, struct error *err) {
    if (!json_is_object(config)) return error_set(err, CONFIG_NAME ": expected an object");
    if (!read_special_id(tok, config, "bos_token", &tok->bos, err) ||
        !read_special_id(tok, config, "eos_token", &tok->eos, err) ||
        !json_read_bool(config, CONFIG_NAME, "add_bos_token", &tok->adds_bos, err) ||
        !read_chat_template(tok, config, err))
        return false;
    if (tok->adds_bos && tok->bos < 0)
        return error_set(err, CONFIG_NAME ": \"add_bos_token\" is true, but no \"bos_token\" is given");
    return true;
}

static bool read_tokenizer(struct tokenizer *tok, const struct tokenizer_outline *outline, const json_t *root,
                           struct error *err) {
    bool ignore_merges = false;
    if (!json_is_object(root)) return error_set(err, FILE_NAME ": expected an object");
    return check_model_type(root, err) && read_normalizer(tok, root, err) && read_pretokenizer(tok, root, err) &&
           read_decoder(root, err) && read_model(tok, outline, root, &ignore_merges, err) &&
           read_added(tok, root, err) && read_post_processor(tok, root, err) &&
           (tokenizer_finish(tok, ignore_merges, err) || error_prefix(err, FILE_NAME ": "));
}

struct tokenizer *tokenizer_open_bytes(const char *json, size_t n_json, const char *config, size_t n_config,
                                       struct error *err) {
    struct tokenizer_outline outline;
    struct tokenizer *tok = NULL;
    json_t *root = NULL, *settings = NULL;
    bool ok = false;
    if (!tokenizer_outline(json, n_json, &outline, err)) return NULL;
    root = json_parse(buffer_text(&outline.rest), outline.rest.len, FILE_NAME, err);
    if (!root || !(tok = tokenizer_create(err))) goto done;
    if (!read_tokenizer(tok, &outline, root, err)) goto done;
    if (config) {
        settings = json_parse(config, n_config, CONFIG_NAME, err);
        if (!settings || !read_config(tok, settings, err)) goto done;
    }
    ok = true;
done:
    buffer_free(&outline.rest);
    json_decref(settings);
    json_decref(root);
    if (ok) return tok;
    tokenizer_free(tok);
    return NULL;
}

// Reads folder/name; absent files leave `out` empty and *found false.
static bool read_file(const char *folder, const char *name, bool needed, struct buffer *out, bool *found,
                      struct error *err) {
    struct buffer path = {0};
    bool ok = buffer_printf(&path, "%s/%s", folder, name) || error_set(err, "%s: out of memory", name);
    *found = ok && (needed || file_exists(path.data));
    if (*found) ok = file_read(path.data, MAX_FILE_BYTES, out, err);
    buffer_free(&path);
    return ok;
}

struct tokenizer *tokenizer_open_folder(const char *folder, struct error *err) {
    struct buffer json = {0}, config = {0}, chat = {0};
    struct tokenizer *tok = NULL;
    bool has_json, has_config, has_chat;
    if (read_file(folder, FILE_NAME, true, &json, &has_json, err) &&
        read_file(folder, CONFIG_NAME, false, &config, &has_config, err) &&
        read_file(folder, "chat_template.jinja", false, &chat, &has_chat, err)) {
        tok = tokenizer_open_bytes(buffer_text(&json), json.len, has_config ? buffer_text(&config) : NULL, config.len,
                                   err);
        if (!tok) error_prefix(err, "%s: ", folder);
        if (tok && has_chat && !set_chat_template(tok, buffer_text(&chat), err)) {
            tokenizer_free(tok);
            tok = NULL;
        }
    }
    buffer_free(&json);
    buffer_free(&config);
    buffer_free(&chat);
    return tok;
}
