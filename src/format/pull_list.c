// pull_list.c: which files of a repository are downloaded. See pull.h.
#include "format/pull.h"

#include "base/size.h"
#include "format/json.h"

#include <fnmatch.h>
#include <stdlib.h>
#include <string.h>

// What `tandem run` reads, beside the weights.
static const char *const needed[] = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                                     "chat_template.jinja"};
static const char single[] = "model.safetensors", index_name[] = "model.safetensors.index.json",
                  shards[] = "model-*-of-*.safetensors";

enum { MAX_PART = 255, MAX_NAME = 1024, SHOWN = 20 };

bool pull_name_is_safe(const char *name) {
    if (strlen(name) > MAX_NAME) return false;
    for (const char *part = name;; part++) {
        size_t n = strcspn(part, "/");
        if (n == 0 || n > MAX_PART || (n == 1 && part[0] == '.') || (n == 2 && part[0] == '.' && part[1] == '.'))
            return false;
        for (size_t i = 0; i < n; i++)
            if ((unsigned char)part[i] < ' ' || part[i] == 127 || part[i] == '\\') return false;
        part += n;
        if (!*part) return true;
    }
}

static const char *name_of(const json_t *sibling) {
    return json_string_value(json_object_get(sibling, "rfilename"));
}

static bool has_file(const json_t *siblings, const char *glob) {
    size_t i;
    const json_t *sibling;
    json_array_foreach(siblings, i, sibling) if (fnmatch(glob, name_of(sibling), FNM_PATHNAME) == 0) return true;
    return false;
}

static bool is_needed(const char *name, const char *weights) {
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if (strcmp(name, needed[i]) == 0) return true;
    return strcmp(name, weights) == 0 || (weights == index_name && fnmatch(shards, name, FNM_PATHNAME) == 0);
}

static bool is_included(const char *name, const struct pull_options *o) {
    for (size_t i = 0; i < o->n_includes; i++)
        if (fnmatch(o->includes[i], name, 0) == 0) return true;
    return false;
}

// The names that match `glob`, as the lines of an error.
static void list_names(const json_t *siblings, const char *glob, struct buffer *out) {
    size_t i, n = 0;
    const json_t *sibling;
    json_array_foreach(siblings, i, sibling) {
        if (fnmatch(glob, name_of(sibling), 0) != 0) continue;
        if (n++ < SHOWN && !buffer_printf(out, "\n  %.200s", name_of(sibling))) return;
    }
    if (n > SHOWN && !buffer_printf(out, "\n  and %zu more", n - SHOWN)) return;
}

static bool refuse_repository(const json_t *siblings, const struct pull_options *o, struct error *err) {
    struct buffer list = {0};
    if (o->n_includes) {
        list_names(siblings, "*", &list);
        error_set(err, "%s: no file's name matches --include %s. It has%s", o->model, o->includes[0],
                  list.len ? list.data : " no files");
    } else if (has_file(siblings, "*.gguf")) {
        list_names(siblings, "*.gguf", &list);
        error_set(err, "%s holds GGUF files, no safetensors: choose with --include GLOB%s", o->model,
                  buffer_text(&list));
    } else {
        list_names(siblings, "*", &list);
        error_set(err, "%s holds no model that tandem reads: expected config.json and %s (or %s), found%s", o->model,
                  single, index_name, list.len ? list.data : " no files");
    }
    buffer_free(&list);
    return false;
}

// The list, every member checked to be an object with a name.
static const json_t *read_siblings(const json_t *info, const char *model, struct error *err) {
    const json_t *siblings = json_object_get(info, "siblings"), *sibling;
    size_t i;
    bool good = json_is_array(siblings);
    if (good) json_array_foreach(siblings, i, sibling) good = good && name_of(sibling);
    if (good) return siblings;
    error_set(err, "%s: the hub's description has no list of files (\"siblings\", each with \"rfilename\")", model);
    return NULL;
}

bool pull_choose(const json_t *info, const struct pull_options *o, struct pull_result *r, struct error *err) {
    const char *commit = json_string_value(json_object_get(info, "sha"));
    if (!commit || strlen(commit) != 40 || strspn(commit, "0123456789abcdef") != 40)
        return error_set(err, "%s: the hub's description names no commit (\"sha\": 40 hexadecimal digits)", o->model);
    const json_t *siblings = read_siblings(info, o->model, err), *sibling;
    if (!siblings) return false;
    const char *weights = has_file(siblings, single) ? single : index_name;
    if (!o->n_includes && (!has_file(siblings, weights) || !has_file(siblings, "config.json")))
        return refuse_repository(siblings, o, err);
    r->commit = arena_copy_text(&r->arena, commit, strlen(commit));
    r->files = arena_alloc_zero(&r->arena, json_array_size(siblings), sizeof *r->files);
    if (!r->commit || !r->files) return error_set(err, "out of memory");
    size_t i;
    json_array_foreach(siblings, i, sibling) {
        const char *name = name_of(sibling);
        if (o->n_includes ? !is_included(name, o) : !is_needed(name, weights)) continue;
        if (!pull_name_is_safe(name))
            return error_set(err,
                             "%s: the hub lists a file \"%.200s\": that name leads out of its folder or is no path",
                             o->model, name);
        char *copy = arena_copy_text(&r->arena, name, strlen(name));
        if (!copy) return error_set(err, "out of memory");
        r->files[r->n_files++].name = copy;
    }
    return r->n_files > 0 || refuse_repository(siblings, o, err);
}
