// hub.c: see hub.h. The one place of the library that reads the environment (HF_HUB_CACHE, HF_HOME, HOME).
#include "format/hub.h"

#include "base/file.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

static const char *environment(const char *name) {
    const char *value = getenv(name);
    return value && value[0] ? value : NULL;
}

static bool out_of_memory(struct error *err) {
    return error_set(err, "out of memory");
}

// A file counts as GGUF by its name, or by the four bytes with which it begins.
static bool resolve_file(const char *model, enum model_kind *kind, struct error *err) {
    struct file_map map;
    if (!file_map_open(&map, model, err)) return false;
    size_t n = strlen(model);
    bool is_gguf = (n >= 5 && strcmp(model + n - 5, ".gguf") == 0) || (map.size >= 4 && !memcmp(map.data, "GGUF", 4));
    file_map_close(&map);
    *kind = MODEL_GGUF;
    return is_gguf || error_set(err,
                                "%s is a file, but no GGUF file; name a .gguf file, or the folder that holds "
                                "config.json and the weights",
                                model);
}

// One half of OWNER/NAME: letters, digits, '.', '_' and '-', as the hub allows. No leading '.' or '-', no ".." and no
// "--" (which the cache's folder names use as the separator).
static bool is_hub_word(const char *word, size_t n) {
    if (n == 0 || n > 96 || word[0] == '.' || word[0] == '-') return false;
    for (size_t i = 0; i < n; i++) {
        char c = word[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (!letter && c != '.' && c != '_' && c != '-') return false;
        if (i > 0 && c == word[i - 1] && (c == '.' || c == '-')) return false;
    }
    return true;
}

// Fills `path` with the cache's root; `source` says where it comes from.
static bool cache_root(struct buffer *path, const char **source, struct error *err) {
    const char *value;
    bool ok;
    if ((value = environment("HF_HUB_CACHE"))) {
        *source = "HF_HUB_CACHE";
        ok = buffer_append_text(path, value);
    } else if ((value = environment("HF_HOME"))) {
        *source = "HF_HOME";
        ok = buffer_printf(path, "%s/hub", value);
    } else if ((value = environment("HOME"))) {
        *source = "HOME";
        ok = buffer_printf(path, "%s/.cache/huggingface/hub", value);
    } else {
        return error_set(err, "none of HF_HUB_CACHE, HF_HOME and HOME is set, so there is no Hugging Face cache");
    }
    return ok || out_of_memory(err);
}

// Reads the commit that refs/main names: hexadecimal digits, so that it cannot lead out of the cache.
static bool read_commit(const char *ref_path, struct buffer *commit, struct error *err) {
    if (!file_read(ref_path, 256, commit, err)) return false;
    while (commit->len && isspace((unsigned char)commit->data[commit->len - 1])) commit->data[--commit->len] = '\0';
    const char *text = buffer_text(commit);
    if (commit->len == 0 || strspn(text, "0123456789abcdefABCDEF") != commit->len)
        return error_set(err, "%s: expected a commit in hexadecimal digits", ref_path);
    return true;
}

static bool resolve_cached(const char *model, struct buffer *path, struct error *err) {
    const char *slash = strchr(model, '/'), *source = NULL;
    struct buffer root = {0}, ref = {0}, commit = {0};
    bool ok = false;
    if (!cache_root(&root, &source, err)) {
        error_prefix(err, "model %s: no such file or folder here, and ", model);
        goto done;
    }
    if (!buffer_printf(&root, "/models--%.*s--%s", (int)(slash - model), model, slash + 1) ||
        !buffer_printf(&ref, "%s/refs/main", root.data)) {
        out_of_memory(err);
        goto done;
    }
    if (!file_is_folder(root.data)) {
        error_set(err,
                  "model %s: no such file or folder here, and it is not in the Hugging Face cache: no folder %s "
                  "(from %s); `tandem pull %s` downloads it",
                  model, root.data, source, model);
        goto done;
    }
    if (!read_commit(ref.data, &commit, err)) {
        error_prefix(err, "model %s: in the Hugging Face cache (from %s), but without a usable refs/main: ", model,
                     source);
        goto done;
    }
    if (!buffer_printf(path, "%s/snapshots/%s", root.data, commit.data)) {
        out_of_memory(err);
        goto done;
    }
    ok = file_is_folder(path->data) || error_set(err, "model %s: refs/main names commit %s, but there is no folder %s",
                                                 model, commit.data, path->data);
done:
    buffer_free(&root);
    buffer_free(&ref);
    buffer_free(&commit);
    return ok;
}

bool hub_resolve(const char *model, enum model_kind *kind, struct buffer *path, struct error *err) {
    buffer_clear(path);
    *kind = MODEL_FOLDER;
    if (model[0] == '\0') return error_set(err, "the model's name is empty");
    if (file_is_folder(model)) return buffer_append_text(path, model) || out_of_memory(err);
    if (file_exists(model)) {
        if (!resolve_file(model, kind, err)) return false;
        return buffer_append_text(path, model) || out_of_memory(err);
    }
    if (strncmp(model, "synthetic:", 10) == 0) {
        *kind = MODEL_SYNTHETIC;
        return buffer_append_text(path, model) || out_of_memory(err);
    }
    const char *slash = strchr(model, '/');
    if (!slash || !is_hub_word(model, (size_t)(slash - model)) || !is_hub_word(slash + 1, strlen(slash + 1)))
        return error_set(err,
                         "model %s: no such file or folder, and not of the form OWNER/NAME, which would be looked "
                         "up in the Hugging Face cache",
                         model);
    return resolve_cached(model, path, err);
}
