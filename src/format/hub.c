// hub.c: see hub.h. The one place of the library that reads the environment.
#include "format/hub.h"

#include "base/file.h"

#include <ctype.h>
#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

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

// Appends a path from the environment; ~ at its beginning is HOME.
static bool append_path(struct buffer *path, const char *value) {
    const char *home = environment("HOME");
    if (value[0] == '~' && (value[1] == '/' || !value[1]) && home) return buffer_printf(path, "%s%s", home, value + 1);
    return buffer_append_text(path, value);
}

// Appends the folder of everything that Hugging Face's tools keep; `from` says which variable names it.
static bool append_hf_home(struct buffer *path, const char **from, struct error *err) {
    const char *value;
    bool ok;
    if ((value = environment(*from = "HF_HOME"))) ok = append_path(path, value);
    else if ((value = environment(*from = "XDG_CACHE_HOME")))
        ok = append_path(path, value) && buffer_append_text(path, "/huggingface");
    else if ((value = environment(*from = "HOME"))) ok = buffer_printf(path, "%s/.cache/huggingface", value);
    else return error_set(err, "none of HF_HUB_CACHE, HF_HOME and HOME is set, so there is no Hugging Face cache");
    return ok || out_of_memory(err);
}

bool hub_own_cache(struct buffer *path) {
    const char *value = environment("XDG_CACHE_HOME");
    if (value) return append_path(path, value) && buffer_append_text(path, "/tandem");
    value = environment("HOME");
    return value && buffer_printf(path, "%s/.cache/tandem", value);
}

// Appends the cache's root; `from` says which variable names it.
static bool append_cache_root(struct buffer *path, const char **from, struct error *err) {
    const char *value = environment(*from = "HF_HUB_CACHE");
    if (!value) value = environment(*from = "HUGGINGFACE_HUB_CACHE");
    if (value) return append_path(path, value) || out_of_memory(err);
    return append_hf_home(path, from, err) && (buffer_append_text(path, "/hub") || out_of_memory(err));
}

// The settings that are on or off, in huggingface_hub's spelling.
static bool is_on(const char *name) {
    static const char *const yes[] = {"1", "on", "yes", "true"};
    const char *value = environment(name);
    for (size_t i = 0; value && i < sizeof yes / sizeof *yes; i++)
        if (strcasecmp(value, yes[i]) == 0) return true;
    return false;
}

// HF_TOKEN, or the first line of the token's file. It becomes a header: no control characters.
static bool read_token(struct hub_settings *s, struct error *err) {
    const char *value = environment("HF_TOKEN"), *path = environment("HF_TOKEN_PATH"), *from;
    if (!value) value = environment("HUGGING_FACE_HUB_TOKEN");
    if (path ? !append_path(&s->token_path, path) && !out_of_memory(err)
             : !append_hf_home(&s->token_path, &from, err) ||
                   (!buffer_append_text(&s->token_path, "/token") && !out_of_memory(err)))
        return false;
    if (value) {
        if (!buffer_append_text(&s->token, value)) return out_of_memory(err);
    } else if (!is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") && file_exists(s->token_path.data)) {
        if (!file_read(s->token_path.data, 4096, &s->token, err)) return error_prefix(err, "the hub's token: ");
    }
    struct buffer *t = &s->token;
    size_t skip = t->len ? strspn(t->data, " \t\r\n") : 0;
    while (t->len > skip && isspace((unsigned char)t->data[t->len - 1])) t->data[--t->len] = '\0';
    if (skip) memmove(t->data, t->data + skip, t->len - skip + 1), t->len -= skip;
    for (size_t i = 0; i < t->len; i++)
        if (t->data[i] <= ' ' || t->data[i] == 127)
            return error_set(err, "the hub's token (from %s) holds a blank or a control character at place %zu",
                             value ? "HF_TOKEN" : s->token_path.data, i + 1);
    return true;
}

bool hub_settings_read(struct hub_settings *s, struct error *err) {
    *s = (struct hub_settings){
        .stall_s = 60, .ca_file = environment("SSL_CERT_FILE"), .offline = is_on("HF_HUB_OFFLINE")};
    const char *endpoint = environment("HF_ENDPOINT"), *timeout = environment("HF_HUB_DOWNLOAD_TIMEOUT");
    if (!endpoint) endpoint = "https://huggingface.co";
    size_t n = strlen(endpoint);
    while (n && endpoint[n - 1] == '/') n--;
    if (strncasecmp(endpoint, "https://", 8) != 0 && strncasecmp(endpoint, "http://", 7) != 0) {
        error_set(err, "HF_ENDPOINT: expected an address that begins with https://, found \"%s\"", endpoint);
        goto err;
    }
    if (!buffer_append(&s->endpoint, endpoint, n)) {
        out_of_memory(err);
        goto err;
    }
    if (timeout && (s->stall_s = strtod(timeout, NULL)) < 1) s->stall_s = 1;
    if (!append_cache_root(&s->cache, &s->cache_from, err) || !read_token(s, err)) goto err;
    return true;
err:
    hub_settings_free(s);
    return false;
}

void hub_settings_free(struct hub_settings *s) {
    buffer_free(&s->endpoint);
    buffer_free(&s->cache);
    buffer_free(&s->token);
    buffer_free(&s->token_path);
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

// How many GGUF files a snapshot holds, the first by name in `path` and all in `list`; 0 if it holds safetensors.
static size_t find_gguf(const char *folder, struct buffer *path, struct buffer *list) {
    struct dirent **entries;
    size_t n_gguf = 0;
    bool safetensors = false, ok = true;
    int n = scandir(folder, &entries, NULL, alphasort);
    for (int i = 0; i < n; i++) {
        const char *name = entries[i]->d_name;
        size_t len = strlen(name);
        if (strncmp(name, "model.safetensors", 17) == 0) safetensors = true;
        if (len > 5 && strcasecmp(name + len - 5, ".gguf") == 0) {
            if (n_gguf++ == 0) ok = ok && buffer_printf(path, "%s/%s", folder, name);
            ok = ok && buffer_printf(list, "\n  %s/%s", folder, name);
        }
        free(entries[i]);
    }
    if (n >= 0) free(entries);
    return safetensors || !ok ? 0 : n_gguf;
}

// A snapshot's folder, or its GGUF file where that is the model.
static bool choose_in_snapshot(const char *model, const char *folder, enum model_kind *kind, struct buffer *path,
                               struct error *err) {
    struct buffer gguf = {0}, list = {0};
    size_t n = find_gguf(folder, &gguf, &list);
    bool ok = true;
    if (n > 1)
        ok = error_set(err, "model %s holds %zu GGUF files in the Hugging Face cache: name one of them%s", model, n,
                       list.data);
    else if (n == 1) *kind = MODEL_GGUF;
    if (ok) ok = buffer_append_text(path, n == 1 ? gguf.data : folder) || out_of_memory(err);
    buffer_free(&gguf);
    buffer_free(&list);
    return ok;
}

// What an error says about a cached model without refs/main: which commits are there.
static void list_snapshots(const char *root, struct buffer *out) {
    struct dirent **entries;
    struct buffer folder = {0};
    int n = buffer_printf(&folder, "%s/snapshots", root) ? scandir(folder.data, &entries, NULL, alphasort) : -1;
    for (int i = 0; i < n; i++) {
        if (entries[i]->d_name[0] != '.' && out->len < 512 &&
            !buffer_printf(out, "%s%s/%s", out->len ? ", " : "; it holds ", folder.data, entries[i]->d_name))
            buffer_clear(out);
        free(entries[i]);
    }
    if (n >= 0) free(entries);
    buffer_free(&folder);
}

static bool resolve_cached(const char *model, enum model_kind *kind, struct buffer *path, struct error *err) {
    const char *slash = strchr(model, '/'), *from = NULL;
    struct buffer root = {0}, ref = {0}, commit = {0}, folder = {0}, found = {0};
    bool ok = false;
    if (!append_cache_root(&root, &from, err)) {
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
                  model, root.data, from, model);
        goto done;
    }
    if (!file_exists(ref.data)) {
        list_snapshots(root.data, &found);
        error_set(err,
                  "model %s: its folder %s in the Hugging Face cache (from %s) has no refs/main%s; `tandem pull %s` "
                  "downloads what is missing",
                  model, root.data, from, buffer_text(&found), model);
        goto done;
    }
    if (!read_commit(ref.data, &commit, err)) {
        error_prefix(err, "model %s: in the Hugging Face cache (from %s), but without a usable refs/main: ", model,
                     from);
        goto done;
    }
    if (!buffer_printf(&folder, "%s/snapshots/%s", root.data, commit.data)) {
        out_of_memory(err);
        goto done;
    }
    ok = file_is_folder(folder.data) ? choose_in_snapshot(model, folder.data, kind, path, err)
                                     : error_set(err, "model %s: refs/main names commit %s, but there is no folder %s",
                                                 model, commit.data, folder.data);
done:
    buffer_free(&root);
    buffer_free(&ref);
    buffer_free(&commit);
    buffer_free(&folder);
    buffer_free(&found);
    return ok;
}

bool hub_is_name(const char *model) {
    const char *slash = strchr(model, '/');
    return slash && is_hub_word(model, (size_t)(slash - model)) && is_hub_word(slash + 1, strlen(slash + 1));
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
    if (!hub_is_name(model))
        return error_set(err,
                         "model %s: no such file or folder, and not of the form OWNER/NAME, which would be looked "
                         "up in the Hugging Face cache",
                         model);
    return resolve_cached(model, kind, path, err);
}
