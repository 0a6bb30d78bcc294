// replay.c: `tandem replay`: does a recorded run again and says whether every bit came out the same.
#include "cli/manifest.h"

#include "base/size.h"
#include "format/json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// What a manifest asks to be repeated.
struct record {
    json_t *root;
    const json_t *identity;
    struct token_ids prompt, output;
    const char *finish, *hash, *model, *fusion, *device, *kv_type;
    int64_t context;
    tandem_sampling sampling;
    int32_t *bias_ids;
    float *bias;
};

// ---- Reading

static bool read_ids(const json_t *holder, const char *where, struct token_ids *out, struct error *err) {
    const json_t *list = json_object_get(holder, "ids");
    if (!json_is_array(list)) return error_set(err, "%s.ids: expected a list of token ids", where);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX)
            return error_set(err, "%s.ids[%zu]: expected a token id", where, i);
        int32_t id = (int32_t)json_integer_value(v);
        if (!token_ids_append(out, &id, 1)) return error_set(err, "out of memory");
    }
    return true;
}

static bool read_value(const json_t *sampling, const char *name, double *out, struct error *err) {
    const json_t *v = json_object_get(json_object_get(sampling, name), "value");
    if (!json_is_number(v)) return error_set(err, "sampling.%s.value: expected a number", name);
    *out = json_number_value(v);
    return true;
}

static bool read_bias(const json_t *sampling, struct record *r, struct error *err) {
    const json_t *list = json_object_get(sampling, "logit_bias");
    size_t n = json_array_size(list); // 0 when there is none
    r->bias_ids = size_alloc(n, sizeof *r->bias_ids);
    r->bias = size_alloc(n, sizeof *r->bias);
    if (!r->bias_ids || !r->bias) return error_set(err, "out of memory");
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_object_get(json_array_get(list, i), "id"),
                     *bias = json_object_get(json_array_get(list, i), "bias");
        if (!json_is_integer(id) || !json_is_number(bias) || json_integer_value(id) < 0 ||
            json_integer_value(id) > INT32_MAX)
            return error_set(err, "sampling.logit_bias[%zu]: expected an id and a bias", i);
        r->bias_ids[i] = (int32_t)json_integer_value(id);
        r->bias[i] = (float)json_number_value(bias);
    }
    r->sampling.bias_ids = r->bias_ids;
    r->sampling.bias = r->bias;
    r->sampling.n_bias = n;
    return true;
}

static bool read_sampling(const json_t *sampling, struct record *r, struct error *err) {
    double top_k = 0;
    tandem_sampling *s = &r->sampling;
    const json_t *seed = json_object_get(json_object_get(sampling, "seed"), "value");
    if (!read_value(sampling, "temperature", &s->temperature, err) || !read_value(sampling, "top_k", &top_k, err) ||
        !read_value(sampling, "top_p", &s->top_p, err) || !read_value(sampling, "min_p", &s->min_p, err) ||
        !read_value(sampling, "repeat_penalty", &s->repeat_penalty, err) ||
        !read_value(sampling, "presence_penalty", &s->presence_penalty, err) ||
        !read_value(sampling, "frequency_penalty", &s->frequency_penalty, err))
        return false;
    if (!(top_k >= 0 && top_k <= INT32_MAX)) return error_set(err, "sampling.top_k.value: expected 0 to %d", INT32_MAX);
    if (!json_is_integer(seed)) return error_set(err, "sampling.seed.value: expected a whole number");
    s->top_k = (int32_t)top_k;
    s->seed = (uint64_t)json_integer_value(seed);
    s->ignore_end = json_is_true(json_object_get(sampling, "ignore_eos"));
    return read_bias(sampling, r, err);
}

static bool read_text(const json_t *o, const char *where, const char *key, const char **out, struct error *err) {
    *out = json_string_value(json_object_get(o, key));
    return *out || error_set(err, "%s.%s: expected a text", where, key);
}

static bool read_record(const char *path, struct record *r, struct error *err) {
    r->root = json_load_path(path, JSON_MAX_BYTES, err);
    if (!r->root) return false;
    int64_t format = 0;
    if (!json_is_object(r->root) || !json_read_int(r->root, path, "tandem_manifest", 1, 1 << 20, &format, err) ||
        format != MANIFEST_FORMAT) {
        if (!err->text[0] || format)
            error_set(err, "expected a manifest that `tandem run --manifest` wrote, of format %d", MANIFEST_FORMAT);
        return error_prefix(err, "%s: ", path);
    }
    const json_t *output = json_object_get(r->root, "output");
    r->identity = json_object_get(r->root, "identity");
    const json_t *model = json_object_get(r->identity, "model"), *run = json_object_get(r->identity, "run");
    bool ok = read_ids(json_object_get(r->root, "prompt"), "prompt", &r->prompt, err) &&
              read_ids(output, "output", &r->output, err) &&
              read_text(output, "output", "finish_reason", &r->finish, err) &&
              read_text(output, "output", "logits_hash", &r->hash, err) &&
              read_text(model, "identity.model", "path", &r->model, err) &&
              read_text(run, "identity.run", "fusion", &r->fusion, err) &&
              read_text(run, "identity.run", "device", &r->device, err) &&
              read_text(run, "identity.run", "kv_type", &r->kv_type, err) &&
              json_read_int(run, "identity.run", "context", 1, 1 << 24, &r->context, err) &&
              read_sampling(json_object_get(r->root, "sampling"), r, err);
    return ok || error_prefix(err, "%s: ", path);
}

static void free_record(struct record *r) {
    token_ids_free(&r->prompt);
    token_ids_free(&r->output);
    free(r->bias_ids);
    free(r->bias);
    json_decref(r->root);
}

// ---- Running

// How the second run went.
struct outcome {
    size_t n_equal; // tokens that came out the same
    bool differs;   // the next one did not: `found` in place of the record's
    int32_t found;
    bool failed; // or there was an error
    char error[1024];
    char hash[17];
};

static bool rerun(tandem_engine *e, const struct record *r, struct outcome *out) {
    char err[1024];
    tandem_session *s = tandem_session_new(e, &r->sampling, err, sizeof err);
    if (!s || tandem_session_append(s, r->prompt.ids, r->prompt.n, err, sizeof err) != TANDEM_OK) {
        cli_fail("%s", err);
        tandem_session_free(s);
        return false;
    }
    bool expects_error = strcmp(r->finish, "error") == 0;
    size_t n = r->output.n + expects_error;
    while (out->n_equal < n && !out->differs && !out->failed) {
        tandem_token token;
        int status = tandem_session_next(s, &token, out->error, sizeof out->error);
        if (status != TANDEM_OK && status != TANDEM_END) out->failed = true;
        else if (out->n_equal == r->output.n || token.id != r->output.ids[out->n_equal])
            out->differs = true, out->found = token.id;
        else out->n_equal++;
    }
    if (expects_error && out->failed && out->n_equal == r->output.n) out->failed = false; // as it was then
    snprintf(out->hash, sizeof out->hash, "%016llx", (unsigned long long)s->hash);
    tandem_session_free(s);
    return true;
}

// The name of a device's instruction set ("avx2" of "cpu/avx2"), where this machine has it.
static const char *isa_of(const char *device) {
    const char *slash = strchr(device, '/');
    return slash && ops_cpu(slash + 1, NULL) ? slash + 1 : NULL;
}

// ---- Telling

static json_t *token_json(const tandem_engine *e, int32_t id) {
    size_t n = 0;
    const char *bytes = e->tokenizer ? tokenizer_token_bytes(e->tokenizer, id, &n) : NULL;
    json_t *text = bytes ? json_stringn(bytes, n) : NULL; // NULL: no valid UTF-8 by itself
    return json_pack("{s:i,s:o}", "id", (int)id, "token", text ? text : json_null());
}

static int tell(const struct cli_options *o, const tandem_engine *e, const struct record *r, const struct outcome *out,
                json_t *changes) {
    bool same_tokens = !out->differs && !out->failed, equal = same_tokens && strcmp(out->hash, r->hash) == 0;
    json_t *first = json_null();
    if (out->differs) {
        json_t *expected = out->n_equal < r->output.n ? token_json(e, r->output.ids[out->n_equal]) : json_null();
        first = json_pack("{s:I,s:I,s:o,s:o}", "index", (json_int_t)out->n_equal, "position",
                          (json_int_t)(r->prompt.n + out->n_equal), "expected", expected, "found",
                          token_json(e, out->found));
    }
    if (o->given[OPT_JSON]) {
        json_t *all = json_pack("{s:s,s:I,s:I,s:O,s:O,s:{s:s,s:s}}", "verdict", equal ? "equal" : "different", "tokens",
                                (json_int_t)r->output.n, "equal_tokens", (json_int_t)out->n_equal, "changed", changes,
                                "first_difference", first, "logits_hash", "expected", r->hash, "found", out->hash);
        if (out->failed) json_object_set_new(all, "error", json_string(out->error));
        json_decref(first);
        return cli_print_json(all) && equal ? EXIT_GOOD : EXIT_FAULT;
    }
    for (size_t i = 0; i < json_array_size(changes); i++) {
        const json_t *c = json_array_get(changes, i);
        char *then = json_dumps(json_object_get(c, "then"), JSON_ENCODE_ANY | JSON_COMPACT),
             *now = json_dumps(json_object_get(c, "now"), JSON_ENCODE_ANY | JSON_COMPACT);
        printf("changed    %s: %s then, %s now\n", json_string_value(json_object_get(c, "field")), then ? then : "?",
               now ? now : "?");
        free(then);
        free(now);
    }
    if (out->differs) {
        char *expected = json_dumps(json_object_get(first, "expected"), JSON_ENCODE_ANY | JSON_COMPACT),
             *found = json_dumps(json_object_get(first, "found"), JSON_ENCODE_ANY | JSON_COMPACT);
        printf("different  token %zu of %zu (position %zu): expected %s, found %s\n", out->n_equal + 1, r->output.n,
               r->prompt.n + out->n_equal, expected ? expected : "?", found ? found : "?");
        free(expected);
        free(found);
    } else if (out->failed) {
        printf("different  after %zu of %zu tokens: %s\n", out->n_equal, r->output.n, out->error);
    } else if (!equal) {
        printf("different  all %zu tokens are the same, but the logits are not: hash %s then, %s now\n", r->output.n,
               r->hash, out->hash);
    } else {
        printf("equal      %zu tokens behind a prompt of %zu, every bit of their logits (hash %s)\n", r->output.n,
               r->prompt.n, out->hash);
    }
    json_decref(first);
    return equal ? EXIT_GOOD : EXIT_FAULT;
}

static int run(const struct cli_options *o) {
    struct record r = {0};
    struct error err = {0};
    struct outcome out = {0};
    int status = EXIT_FAULT;
    if (!o->model) return cli_usage("expected a manifest that `tandem run --manifest` wrote");
    if (!read_record(o->model, &r, &err)) {
        cli_fail("%s", err.text);
        free_record(&r);
        return EXIT_FAULT;
    }
    const char *model = o->given[OPT_MODEL] ? o->text[OPT_MODEL] : r.model;
    tandem_options base = {.model = model, .context = (size_t)r.context};
    if (!o->given[OPT_FUSION]) base.fusion = r.fusion;
    if (!o->given[OPT_ISA]) base.isa = isa_of(r.device);
    char kv_type[16];
    snprintf(kv_type, sizeof kv_type, "%s", r.kv_type);
    for (char *p = kv_type; *p; p++)
        if (*p >= 'A' && *p <= 'Z') *p = (char)(*p - 'A' + 'a');
    base.kv_type = kv_type;
    tandem_engine *e = cli_open_as(o, &base);
    json_t *now = e ? manifest_identity(e, model, &err) : NULL, *changes = json_array();
    if (e && !now) cli_fail("%s", err.text);
    if (now) {
        manifest_compare(r.identity, now, changes);
        if (rerun(e, &r, &out)) status = tell(o, e, &r, &out, changes);
    }
    json_decref(now);
    json_decref(changes);
    tandem_close(e);
    free_record(&r);
    return status;
}

static const enum option_id options[] = {OPT_MODEL, OPT_JSON, OPT_THREADS, OPT_DEVICE, OPT_ISA, OPT_FUSION, OPT_HELP};

const struct command command_replay = {
    .name = "replay",
    .summary = "do a recorded run again, and prove that every bit is the same",
    .usage = "MANIFEST.json [--model MODEL] [--json]",
    .details =
        "A manifest is what `tandem run --manifest FILE` wrote. What changed since then (files of the model, build,\n"
        "device, ...) is listed, and the first token that differs, if one does. Status 0: every token and every bit\n"
        "of the logits is the same. --fusion, --isa and --threads run it another way: the bits must not change.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
