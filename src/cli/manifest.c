// manifest.c: see manifest.h.
#include "cli/manifest.h"

#include "base/digest.h"
#include "base/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// Adds {"name", "bytes", "sha256" or "sha256_tree"} of a file; one that is missing is left out if it is `optional`.
static bool add_file(json_t *list, const char *folder, const char *name, bool optional, bool tree, struct pool *pool,
                     struct error *err) {
    struct buffer path = {0};
    struct digest digest;
    struct file_map map = {0};
    bool ok = folder ? buffer_printf(&path, "%s/%s", folder, name) : buffer_append_text(&path, name);
    if (!ok) return error_set(err, "out of memory");
    if (!optional || file_exists(path.data)) {
        ok = file_map_open(&map, path.data, err) && (tree ? digest_tree(map.data, map.size, pool, &digest, err)
                                                          : digest_bytes(map.data, map.size, &digest, err));
        if (ok)
            json_array_append_new(list, json_pack("{s:s,s:I,s:s}", "name", base_name(name), "bytes",
                                                  (json_int_t)map.size, tree ? "sha256_tree" : "sha256", digest.hex));
        file_map_close(&map);
    }
    buffer_free(&path);
    return ok;
}

// Every file that a tensor of the model stands in, once.
static bool add_weight_files(json_t *list, const tandem_engine *e, struct error *err) {
    const struct model *m = e->model;
    if (m->kind == MODEL_GGUF) return add_file(list, NULL, m->path, false, true, e->pool, err);
    for (size_t i = 0; i < m->files.n; i++) {
        const char *file = m->files.tensors[i].file;
        bool seen = false;
        for (size_t k = 0; k < json_array_size(list); k++)
            seen = seen ||
                   strcmp(json_string_value(json_object_get(json_array_get(list, k), "name")), base_name(file)) == 0;
        if (!seen && !add_file(list, NULL, file, false, true, e->pool, err)) return false;
    }
    return true;
}

static json_t *model_identity(const tandem_engine *e, const char *name, struct error *err) {
    static const char *const formats[] = {
        [MODEL_FOLDER] = "safetensors", [MODEL_GGUF] = "gguf", [MODEL_SYNTHETIC] = "synthetic"};
    const struct model *m = e->model;
    json_t *files = json_array();
    bool ok = true;
    if (m->kind == MODEL_FOLDER)
        ok = add_file(files, m->path, "config.json", false, false, NULL, err) &&
             add_file(files, m->path, "generation_config.json", true, false, NULL, err);
    if (ok && m->kind != MODEL_SYNTHETIC) ok = add_weight_files(files, e, err);
    char *path = m->kind == MODEL_SYNTHETIC ? strdup(m->path) : realpath(m->path, NULL);
    json_t *out = ok ? json_pack("{s:s,s:s,s:s,s:s,s:O}", "name", name, "path", path ? path : m->path, "format",
                                 formats[m->kind], "architecture", arch_name(m->config.arch), "files", files)
                     : NULL;
    free(path);
    json_decref(files);
    return out;
}

static json_t *text_identity(const tandem_engine *e, struct error *err) {
    json_t *files = json_array(), *out = NULL;
    const char *jinja = e->tokenizer ? tokenizer_chat_template(e->tokenizer) : NULL;
    struct digest d;
    bool ok = true;
    if (e->model->kind == MODEL_FOLDER) {
        static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"};
        for (size_t i = 0; ok && i < 3; i++) ok = add_file(files, e->model->path, names[i], true, false, NULL, err);
    }
    if (ok && jinja) ok = digest_bytes(jinja, strlen(jinja), &d, err);
    if (ok)
        out = json_pack("{s:s?,s:O,s:s,s:s?}", "tokenizer", e->tokenizer ? tokenizer_describe(e->tokenizer) : NULL,
                        "tokenizer_files", files, "template", template_name(e->template_kind), "template_sha256",
                        jinja ? d.hex : NULL);
    json_decref(files);
    return out;
}

static json_t *run_identity(const tandem_engine *e, struct error *err) {
    char fusion[256];
    struct digest binary;
    if (!digest_file("/proc/self/exe", false, NULL, &binary, err)) return NULL;
    return json_pack("{s:s,s:s,s:s,s:s,s:s,s:s,s:i,s:I}", "version", tandem_version(), "compiler", __VERSION__,
                     "binary_sha256", binary.hex, "device", e->ops->name, "fusion",
                     fusion_text(e->fusion, fusion, sizeof fusion), "kv_type", dtype_info(e->kv_type)->name, "threads",
                     pool_size(e->pool), "context", (json_int_t)e->context);
}

json_t *manifest_identity(const tandem_engine *e, const char *name, struct error *err) {
    json_t *model = model_identity(e, name, err), *text = model ? text_identity(e, err) : NULL,
           *run = text ? run_identity(e, err) : NULL;
    json_t *out = run ? json_pack("{s:O,s:O,s:O}", "model", model, "text", text, "run", run) : NULL;
    if (run && !out) error_set(err, "out of memory for the manifest");
    json_decref(model);
    json_decref(text);
    json_decref(run);
    return out;
}

static json_t *ids_json(const struct token_ids *list) {
    json_t *array = json_array();
    for (size_t i = 0; i < list->n; i++) json_array_append_new(array, json_integer(list->ids[i]));
    return array;
}

bool manifest_write(const char *path, const tandem_engine *e, const struct manifest_run *r, struct error *err) {
    char hash[17];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)r->hash);
    json_t *identity = manifest_identity(e, r->model, err), *sampling = cli_sampling_json(r->sampling),
           *bias = json_array();
    if (!identity) goto fail;
    for (size_t i = 0; i < r->sampling->values.n_bias; i++)
        json_array_append_new(bias, json_pack("{s:i,s:f}", "id", (int)r->sampling->values.bias_ids[i], "bias",
                                              (double)r->sampling->values.bias[i]));
    json_object_set(sampling, "logit_bias", bias);
    json_object_set_new(sampling, "ignore_eos", json_boolean(r->sampling->values.ignore_end));
    json_t *out = json_pack("{s:i,s:O,s:O,s:{s:o},s:{s:o,s:s,s:s}}", "tandem_manifest", MANIFEST_FORMAT, "identity",
                            identity, "sampling", sampling, "prompt", "ids", ids_json(r->prompt), "output", "ids",
                            ids_json(r->tokens), "finish_reason", r->finish, "logits_hash", hash);
    char *text = out ? json_dumps(out, JSON_INDENT(2) | JSON_REAL_PRECISION(17)) : NULL;
    struct buffer line = {0};
    bool ok = text && buffer_printf(&line, "%s\n", text);
    if (!ok) error_set(err, "out of memory for the manifest");
    ok = ok && file_write(path, line.data, line.len, err);
    buffer_free(&line);
    free(text);
    json_decref(out);
    json_decref(sampling);
    json_decref(bias);
    json_decref(identity);
    return ok;
fail:
    json_decref(sampling);
    json_decref(bias);
    return false;
}

static void compare(const char *field, const json_t *then, const json_t *now, json_t *changes) {
    char inner[256];
    const char *key;
    json_t *value;
    if (json_is_object(then) && json_is_object(now)) {
        json_object_foreach((json_t *)(uintptr_t)then, key, value) {
            if (strcmp(key, "path") == 0 || strcmp(key, "name") == 0) continue;
            snprintf(inner, sizeof inner, "%s%s%s", field, *field ? "." : "", key);
            compare(inner, value, json_object_get(now, key), changes);
        }
        return;
    }
    if (json_is_array(then) && json_is_array(now) && json_array_size(then) == json_array_size(now)) {
        for (size_t i = 0; i < json_array_size(then); i++) {
            const char *name = json_string_value(json_object_get(json_array_get(then, i), "name"));
            snprintf(inner, sizeof inner, "%s[%s]", field, name ? name : "");
            compare(inner, json_array_get(then, i), json_array_get(now, i), changes);
        }
        return;
    }
    if (now && json_equal(then, now)) return;
    json_t *change = json_pack("{s:s,s:O}", "field", field, "then", then);
    json_object_set_new(change, "now", now ? json_incref((json_t *)(uintptr_t)now) : json_null());
    json_array_append_new(changes, change);
}

void manifest_compare(const json_t *then, const json_t *now, json_t *changes) {
    compare("", then, now, changes);
}
