// trace.c: `tandem trace`: named intermediate tensors of a run, written to a safetensors file.
#include "cli/cli.h"

#include "base/size.h"
#include "format/safetensors.h"

#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// One traced tensor: rows arrive in order, a step at a time.
struct traced {
    char name[64];
    size_t columns;
    struct buffer data; // f32
};

struct recorder {
    struct traced *list; // [n]
    size_t n, cap;
    char **globs; // [n_globs]
    size_t n_globs;
    bool out_of_memory;
};

static bool wanted(const struct recorder *r, const char *name) {
    for (size_t i = 0; i < r->n_globs; i++)
        if (fnmatch(r->globs[i], name, 0) == 0) return true;
    return false;
}

static struct traced *find_or_add(struct recorder *r, const char *name, size_t columns) {
    for (size_t i = 0; i < r->n; i++)
        if (strcmp(r->list[i].name, name) == 0) return &r->list[i];
    if (r->n == r->cap) {
        size_t cap = r->cap ? 2 * r->cap : 64;
        struct traced *list = size_realloc(r->list, cap, sizeof *list);
        if (!list) return NULL;
        r->list = list;
        r->cap = cap;
    }
    struct traced *t = &r->list[r->n++];
    *t = (struct traced){.columns = columns};
    snprintf(t->name, sizeof t->name, "%s", name);
    return t;
}

static void record(void *user, const char *name, int layer, const float *data, size_t rows, size_t columns) {
    struct recorder *r = user;
    char full[64];
    if (layer >= 0) snprintf(full, sizeof full, "layers.%d.%s", layer, name);
    else snprintf(full, sizeof full, "%s", name);
    if (!wanted(r, full)) return;
    struct traced *t = find_or_add(r, full, columns);
    if (!t || !buffer_append(&t->data, data, rows * columns * sizeof *data)) r->out_of_memory = true;
}

static bool split_globs(struct recorder *r, const char *text) {
    for (const char *p = text;; p++) {
        const char *comma = strchr(p, ',');
        size_t n = comma ? (size_t)(comma - p) : strlen(p);
        char **globs = size_realloc(r->globs, r->n_globs + 1, sizeof *globs);
        if (!globs) return false;
        r->globs = globs;
        if (!(r->globs[r->n_globs] = strndup(p, n))) return false;
        r->n_globs++;
        if (!comma) return true;
        p = comma;
    }
}

static bool write_trace(const struct recorder *r, const struct token_ids *ids, const char *path) {
    struct tensor *tensors = size_alloc_zero(r->n + 1, sizeof *tensors);
    struct error err = {0};
    if (!tensors) return cli_fail("out of memory") == 0;
    tensors[0] = (struct tensor){.name = "ids",
                                 .type = DTYPE_I32,
                                 .rank = 1,
                                 .shape = {ids->n},
                                 .n_elements = ids->n,
                                 .n_bytes = ids->n * sizeof *ids->ids,
                                 .data = ids->ids};
    for (size_t i = 0; i < r->n; i++) {
        const struct traced *t = &r->list[i];
        size_t rows = t->data.len / sizeof(float) / t->columns;
        tensors[i + 1] = (struct tensor){.name = t->name,
                                         .type = DTYPE_F32,
                                         .rank = 2,
                                         .shape = {rows, t->columns},
                                         .n_elements = rows * t->columns,
                                         .n_bytes = t->data.len,
                                         .data = t->data.data};
    }
    bool ok = safetensors_write(path, tensors, r->n + 1, NULL, 0, &err);
    if (!ok) cli_fail("%s", err.text);
    free(tensors);
    return ok;
}

static bool read_ids(const struct cli_options *o, const tandem_engine *e, struct token_ids *ids) {
    struct error err = {0};
    struct buffer text = {0};
    bool ok = true;
    if (o->given[OPT_IDS]) {
        ok = cli_parse_ids(o->text[OPT_IDS], ids);
    } else if (o->given[OPT_IDS_FILE]) {
        ok = cli_read(o->text[OPT_IDS_FILE], &text) && cli_parse_ids(buffer_text(&text), ids);
    } else if (!e->tokenizer) {
        ok = cli_fail("the model has no tokenizer: %s", e->tokenizer_error) == 0;
    } else if (!tokenizer_encode(e->tokenizer, o->text[OPT_PROMPT], strlen(o->text[OPT_PROMPT]), true, ids, &err)) {
        ok = cli_fail("%s", err.text) == 0;
    }
    buffer_free(&text);
    if (ok && ids->n == 0) ok = cli_fail("the prompt is empty: expected at least one token") == 0;
    return ok;
}

static int trace_with(const struct cli_options *o, tandem_engine *e, uint32_t fusion) {
    struct recorder r = {0};
    struct token_ids ids = {0};
    struct error err = {0};
    int status = EXIT_FAULT;
    if (!split_globs(&r, o->given[OPT_GLOBS] ? o->text[OPT_GLOBS] : "logits")) {
        cli_fail("out of memory");
    } else if (read_ids(o, e, &ids)) {
        if (!engine_trace(e, ids.ids, ids.n, fusion, record, &r, &err)) cli_fail("%s", err.text);
        else if (r.out_of_memory) cli_fail("out of memory for the traced tensors");
        else if (r.n == 0)
            cli_fail("no tensor of this path matches \"%s\"", o->given[OPT_GLOBS] ? o->text[OPT_GLOBS] : "logits");
        else if (write_trace(&r, &ids, o->text[OPT_OUTPUT])) status = EXIT_GOOD;
    }
    if (status == EXIT_GOOD)
        fprintf(stderr, "wrote %zu tensors of %zu tokens to %s\n", r.n + 1, ids.n, o->text[OPT_OUTPUT]);
    for (size_t i = 0; i < r.n; i++) buffer_free(&r.list[i].data);
    for (size_t i = 0; i < r.n_globs; i++) free(r.globs[i]);
    free(r.globs);
    free(r.list);
    token_ids_free(&ids);
    return status;
}

static int run(const struct cli_options *o) {
    int sources = o->given[OPT_PROMPT] + o->given[OPT_IDS] + o->given[OPT_IDS_FILE];
    const char *path = o->given[OPT_PATH] ? o->text[OPT_PATH] : "fused";
    if (sources != 1) return cli_usage("expected one of --prompt, --ids and --ids-file");
    if (!o->given[OPT_OUTPUT]) return cli_usage("expected -o FILE");
    bool standard = strcmp(path, "standard") == 0;
    if (!standard && strcmp(path, "fused") != 0)
        return cli_usage("--path: expected fused or standard, found \"%s\"", path);
    tandem_engine *e = cli_open(o);
    if (!e) return EXIT_FAULT;
    int status = trace_with(o, e, standard ? 0 : e->fusion);
    tandem_close(e);
    return status;
}

static const enum option_id options[] = {OPT_PROMPT, OPT_IDS,    OPT_IDS_FILE, OPT_GLOBS,   OPT_PATH,
                                         OPT_OUTPUT, OPT_CTX,    OPT_FUSION,   OPT_KV_TYPE, OPT_THREADS,
                                         OPT_ISA,    OPT_DEVICE, OPT_HELP};

const struct command command_trace = {
    .name = "trace",
    .summary = "write named tensors of a run to a safetensors file",
    .usage = "[MODEL] (-p TEXT | --ids IDS | --ids-file FILE) [--tensors GLOB,...] -o OUT.safetensors",
    .details = "The prompt is plain text in which special tokens count; nothing is added. Tensors: ids, embed, "
               "layers.N.{attn_norm,\n"
               "q, k, v, q_norm, k_norm, q_rope, k_rope, attn, attn_out, resid_mid, mlp_norm, gate, up, act, mlp_out, "
               "resid},\n"
               "final_norm, logits; one row for each token. A fused op does not hold its inner tensors: --path "
               "standard has all.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
