// trace.c: `tandem trace`: named intermediate tensors of a run, written to a safetensors file.
#include "cli/cli.h"

#include "base/size.h"
#include "format/safetensors.h"
#include "model/oracle.h"

#include <errno.h>
#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// One traced tensor: rows arrive in order, a step at a time.
struct traced {
    char name[64];
    size_t columns, n_seen; // rows that arrived, wanted or not
    struct buffer data;     // f32 or f64
};

struct recorder {
    struct traced *list; // [n]
    size_t n, cap;
    char **globs; // [n_globs]
    size_t n_globs;
    bool *rows; // [n_ids] which positions are wanted
    int32_t *positions;
    size_t n_ids, n_positions; // of them, in ascending order
    enum dtype type;           // F32 or F64: what is written
    const struct log *log;     // of an oracle's run, which can be slow
    size_t n_layers, chunk_first, chunk;
    bool out_of_memory;
};

static bool wanted(const struct recorder *r, const char *name) {
    for (size_t i = 0; i < r->n_globs; i++)
        if (fnmatch(r->globs[i], name, 0) == 0) return true;
    return false;
}

// The tensor of this name if it is wanted, new when it is the first time; NULL otherwise and without memory.
static struct traced *find_or_add(struct recorder *r, const char *name, int layer, size_t columns) {
    char full[64];
    if (layer >= 0) snprintf(full, sizeof full, "layers.%d.%s", layer, name);
    else snprintf(full, sizeof full, "%s", name);
    for (size_t i = 0; i < r->n; i++)
        if (strcmp(r->list[i].name, full) == 0) return &r->list[i];
    if (!wanted(r, full)) return NULL;
    if (r->n == r->cap) {
        size_t cap = r->cap ? 2 * r->cap : 64;
        struct traced *list = size_realloc(r->list, cap, sizeof *list);
        if (!list) {
            r->out_of_memory = true;
            return NULL;
        }
        r->list = list;
        r->cap = cap;
    }
    struct traced *t = &r->list[r->n++];
    *t = (struct traced){.columns = columns};
    memcpy(t->name, full, sizeof full);
    return t;
}

// The tap of the engine's paths.
static void record(void *user, const char *name, int layer, const float *data, size_t rows, size_t columns) {
    struct recorder *r = user;
    struct traced *t = find_or_add(r, name, layer, columns);
    for (size_t row = 0; t && row < rows; row++, t->n_seen++)
        if (t->n_seen < r->n_ids && r->rows[t->n_seen] &&
            !buffer_append(&t->data, data + row * columns, columns * sizeof *data))
            r->out_of_memory = true;
}

// The tap of the oracles. H's values are bf16 ones, exact in f32. Of the last norm and the logits, an oracle computes
// the wanted rows alone.
static void record_oracle(void *user, const char *name, int layer, const double *data, size_t rows, size_t columns) {
    struct recorder *r = user;
    if (strcmp(name, "resid") == 0)
        log_progress(r->log, "tracing", r->chunk_first * r->n_layers + r->chunk * ((size_t)layer + 1),
                     r->n_ids * r->n_layers);
    struct traced *t = find_or_add(r, name, layer, columns);
    bool all = layer < 0 && strcmp(name, "embed") != 0;
    for (size_t row = 0; t && row < rows; row++, t->n_seen++) {
        if (!all && (t->n_seen >= r->n_ids || !r->rows[t->n_seen])) continue;
        const double *v = data + row * columns;
        bool ok = true;
        if (r->type == DTYPE_F64) ok = buffer_append(&t->data, v, columns * sizeof *v);
        for (size_t i = 0; ok && r->type == DTYPE_F32 && i < columns; i++) {
            float f = (float)v[i];
            ok = buffer_append(&t->data, &f, sizeof f);
        }
        if (!ok) r->out_of_memory = true;
    }
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

// A position of a list: -1 is the last token's.
static bool parse_position(const char **text, size_t n, size_t *out) {
    char *end;
    errno = 0;
    long long p = strtoll(*text, &end, 10);
    if (end == *text || errno) return false;
    if (p < 0) p += (long long)n;
    *text = end;
    if (p < 0 || (unsigned long long)p >= n) return false;
    *out = (size_t)p;
    return true;
}

// "0,10-20,-1" to rows[]; NULL: all.
static bool select_positions(struct recorder *r, const char *text, size_t n) {
    r->n_ids = n;
    r->rows = size_alloc_zero(n, sizeof *r->rows);
    r->positions = size_alloc(n, sizeof *r->positions);
    if (!r->rows || !r->positions) return cli_fail("out of memory") == 0;
    for (const char *p = text; p; p++) {
        size_t first, last;
        bool ok = parse_position(&p, n, &first);
        last = first;
        if (ok && *p == '-') {
            p++;
            ok = parse_position(&p, n, &last);
        }
        if (!ok || first > last || (*p && *p != ','))
            return cli_fail("--positions: expected positions below %zu, as in 0,10-20,-1 (the last), found \"%s\"", n,
                            text) == 0;
        for (size_t i = first; i <= last; i++) r->rows[i] = true;
        if (!*p) break;
    }
    for (size_t i = 0; i < n; i++) {
        if (!text) r->rows[i] = true;
        if (r->rows[i]) r->positions[r->n_positions++] = (int32_t)i;
    }
    return true;
}

static struct tensor vector_of(const char *name, const int32_t *data, size_t n) {
    return (struct tensor){.name = name,
                           .type = DTYPE_I32,
                           .rank = 1,
                           .shape = {n},
                           .n_elements = n,
                           .n_bytes = n * sizeof *data,
                           .data = data};
}

static bool write_trace(const struct recorder *r, const struct token_ids *ids, const char *out,
                        const struct safetensors_meta *meta, size_t n_meta) {
    struct tensor *tensors = size_alloc_zero(r->n + 2, sizeof *tensors);
    struct error err = {0};
    size_t n = 0;
    if (!tensors) return cli_fail("out of memory") == 0;
    tensors[n++] = vector_of("ids", ids->ids, ids->n);
    if (r->n_positions < r->n_ids) tensors[n++] = vector_of("positions", r->positions, r->n_positions);
    for (size_t i = 0; i < r->n; i++) {
        const struct traced *t = &r->list[i];
        size_t rows = t->data.len / dtype_info(r->type)->block_bytes / t->columns;
        tensors[n++] = (struct tensor){.name = t->name,
                                       .type = r->type,
                                       .rank = 2,
                                       .shape = {rows, t->columns},
                                       .n_elements = rows * t->columns,
                                       .n_bytes = t->data.len,
                                       .data = t->data.data};
    }
    bool ok = safetensors_write(out, tensors, n, meta, n_meta, &err);
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

// All ids through an oracle, in chunks that cost it nothing. The head runs only for what was asked of it.
static bool trace_oracle(struct recorder *r, const tandem_engine *e, enum oracle_kind kind, const struct token_ids *ids,
                         struct error *err) {
    enum { CHUNK = 64 };
    size_t n_vocab = e->model->config.n_vocab, rows[CHUNK], n_logits;
    bool head = wanted(r, "logits") || wanted(r, "final_norm"), ok = true;
    double *logits = NULL;
    if (head && (!size_mul(CHUNK, n_vocab, &n_logits) || !(logits = size_alloc(n_logits, sizeof *logits))))
        return error_set(err, "out of memory for the logits");
    struct oracle *o = oracle_create(e->model, kind, e->pool, ids->n, err);
    for (size_t at = 0; o && ok && at < ids->n; at += CHUNK) {
        size_t n = ids->n - at < CHUNK ? ids->n - at : CHUNK, n_rows = 0;
        for (size_t i = 0; head && i < n; i++)
            if (r->rows[at + i]) rows[n_rows++] = i;
        r->chunk_first = at;
        r->chunk = n;
        ok = oracle_run(o,
                        &(struct oracle_step){.ids = ids->ids + at,
                                              .n = n,
                                              .position0 = at,
                                              .tap = record_oracle,
                                              .tap_user = r,
                                              .logit_rows = rows,
                                              .n_logit_rows = n_rows},
                        logits, err);
    }
    ok = ok && o;
    oracle_free(o);
    free(logits);
    return ok;
}

enum path { PATH_FUSED, PATH_STANDARD, PATH_T, PATH_H, N_PATHS };
static const char *const path_names[N_PATHS] = {"fused", "standard", "T", "H"};

static bool trace_path(struct recorder *r, tandem_engine *e, enum path path, const struct token_ids *ids) {
    struct error err = {0};
    struct cli_bar bar = {0};
    struct log log = cli_log(&bar);
    bool ok;
    r->type = path == PATH_T ? DTYPE_F64 : DTYPE_F32;
    r->log = &log;
    r->n_layers = e->model->config.n_layers;
    if (path == PATH_T || path == PATH_H) ok = trace_oracle(r, e, path == PATH_T ? ORACLE_T : ORACLE_H, ids, &err);
    else ok = engine_trace(e, ids->ids, ids->n, path == PATH_STANDARD ? 0 : e->fusion, record, r, &err);
    r->log = NULL;
    if (!ok) cli_fail("%s", err.text);
    else if (r->out_of_memory) ok = cli_fail("out of memory for the traced tensors") == 0;
    return ok;
}

// The coarsest rounding on an engine's path: of the inputs of matrix products, and of K and V.
static const char *engine_precision(const tandem_engine *e) {
    bool bf16 = e->kv_type == DTYPE_BF16, quantised = dtype_info(e->kv_type)->is_quantised;
    const struct model *m = e->model;
    for (size_t i = 0; i < m->config.n_layers; i++) {
        const struct layer_weights *w = &m->layers[i];
        const struct matrix *all[] = {&w->wq, &w->wk, &w->wv, &w->wo, &w->w_gate, &w->w_up, &w->w_down, &m->head};
        for (size_t k = 0; k < sizeof all / sizeof all[0]; k++) {
            bf16 = bf16 || ops_input_rule(e->ops, all[k]->type) == DTYPE_BF16;
            quantised = quantised || dtype_info(ops_input_rule(e->ops, all[k]->type))->is_quantised;
        }
    }
    return quantised ? "int8" : bf16 ? "bf16" : "f32";
}

// What `tandem diff` and people need to know about a trace.
static bool write_described(const struct recorder *r, const struct cli_options *o, const tandem_engine *e,
                            enum path path, const struct token_ids *ids) {
    const struct model_config *c = &e->model->config;
    char heads[32], kv_heads[32], head_dim[32];
    snprintf(heads, sizeof heads, "%zu", c->n_heads);
    snprintf(kv_heads, sizeof kv_heads, "%zu", c->n_kv_heads);
    snprintf(head_dim, sizeof head_dim, "%zu", c->head_dim);
    bool oracle = path == PATH_T || path == PATH_H;
    const char *precision = path == PATH_T ? "f64" : path == PATH_H ? "bf16" : engine_precision(e);
    struct safetensors_meta meta[] = {{"producer", "tandem"},
                                      {"version", tandem_version()},
                                      {"path", path_names[path]},
                                      {"precision", precision},
                                      {"model", e->model->path},
                                      {"n_heads", heads},
                                      {"n_kv_heads", kv_heads},
                                      {"head_dim", head_dim},
                                      {"device", oracle ? "oracle" : e->ops->name},
                                      {"kv_type", oracle ? precision : dtype_info(e->kv_type)->name}};
    return write_trace(r, ids, o->text[OPT_OUTPUT], meta, sizeof meta / sizeof meta[0]);
}

// Behind a message that nothing matches a pattern.
static const char *where_to_look(enum path path) {
    return path == PATH_FUSED ? "; a fused op does not hold its inner tensors, --path standard holds all" : "";
}

// A pattern that nothing matches is a slip of the pen more often than not.
static void tell_of_idle_globs(const struct recorder *r, enum path path) {
    for (size_t i = 0; i < r->n_globs; i++) {
        size_t j = 0;
        while (j < r->n && fnmatch(r->globs[i], r->list[j].name, 0) != 0) j++;
        if (j == r->n)
            fprintf(stderr, "tandem: trace: warning: no tensor of this path matches \"%s\"%s\n", r->globs[i],
                    where_to_look(path));
    }
}

static int trace_with(const struct cli_options *o, tandem_engine *e, enum path path) {
    struct recorder r = {0};
    struct token_ids ids = {0};
    const char *globs = o->given[OPT_GLOBS] ? o->text[OPT_GLOBS] : "logits";
    int status = EXIT_FAULT;
    if (!split_globs(&r, globs)) {
        cli_fail("out of memory");
    } else if (read_ids(o, e, &ids) && select_positions(&r, o->text[OPT_POSITIONS], ids.n) &&
               trace_path(&r, e, path, &ids)) {
        if (r.n == 0) cli_fail("no tensor of this path matches \"%s\"%s", globs, where_to_look(path));
        else if (write_described(&r, o, e, path, &ids)) status = EXIT_GOOD;
    }
    if (status == EXIT_GOOD) {
        tell_of_idle_globs(&r, path);
        fprintf(stderr, "wrote %zu tensors of %zu tokens to %s\n", r.n, r.n_positions, o->text[OPT_OUTPUT]);
    }
    for (size_t i = 0; i < r.n; i++) buffer_free(&r.list[i].data);
    for (size_t i = 0; i < r.n_globs; i++) free(r.globs[i]);
    free(r.globs);
    free(r.list);
    free(r.rows);
    free(r.positions);
    token_ids_free(&ids);
    return status;
}

static int run(const struct cli_options *o) {
    int sources = o->given[OPT_PROMPT] + o->given[OPT_IDS] + o->given[OPT_IDS_FILE];
    const char *name = o->given[OPT_PATH] ? o->text[OPT_PATH] : path_names[PATH_FUSED];
    if (sources != 1) return cli_usage("expected one of --prompt, --ids and --ids-file");
    if (!o->given[OPT_OUTPUT]) return cli_usage("expected -o FILE");
    int path = 0;
    while (path < N_PATHS && strcmp(name, path_names[path]) != 0) path++;
    if (path == N_PATHS) return cli_usage("--path: expected fused, standard, T or H, found \"%s\"", name);
    tandem_engine *e = cli_open(o);
    if (!e) return EXIT_FAULT;
    int status = trace_with(o, e, (enum path)path);
    tandem_close(e);
    return status;
}

static const enum option_id options[] = {OPT_PROMPT, OPT_IDS,     OPT_IDS_FILE, OPT_GLOBS,  OPT_POSITIONS,
                                         OPT_PATH,   OPT_OUTPUT,  OPT_CTX,      OPT_FUSION, OPT_KV_TYPE,
                                         OPT_REPACK, OPT_THREADS, OPT_ISA,      OPT_DEVICE, OPT_HELP};

const struct command command_trace = {
    .name = "trace",
    .summary = "write named tensors of a run to a safetensors file",
    .usage = "[MODEL] (-p TEXT | --ids IDS | --ids-file FILE) [--tensors GLOB,...] [--path PATH] -o OUT.safetensors",
    .details = "The prompt is plain text in which special tokens count; nothing is added. Tensors: ids, embed, "
               "layers.N.{attn_norm,\n"
               "q, k, v, q_norm, k_norm, q_rope, k_rope, attn, attn_out, resid_mid, mlp_norm, gate, up, act, mlp_out, "
               "resid},\n"
               "final_norm, logits; one row for each token. Example: --tensors 'layers.*.resid,logits'.\n\n"
               "Paths: fused is what `run` computes; a fused op does not hold its inner tensors. standard has every "
               "tensor and,\n"
               "by contract, the same bits. T is exact: f64 arithmetic on the stored weights, written as f64. H rounds "
               "to bf16\n"
               "where Hugging Face does. `tandem diff` compares two traces.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
