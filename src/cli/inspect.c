// inspect.c: `tandem inspect`: what a model is, what it would take to run it, and what its weights look like.
#include "cli/cli.h"

#include "ops/kv_page.h"

#include <ctype.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Statistics of one tensor's values.
struct stats {
    double min, max, sum_squares;
    size_t n, n_nan, n_inf;
};

static void add_values(struct stats *s, const float *v, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (isnan(v[i])) s->n_nan++;
        else if (isinf(v[i])) s->n_inf++;
        else {
            if ((double)v[i] < s->min) s->min = (double)v[i];
            if ((double)v[i] > s->max) s->max = (double)v[i];
            s->sum_squares += (double)v[i] * (double)v[i];
        }
    }
    s->n += n;
}

static struct stats tensor_stats(const struct tensor *t) {
    enum { PIECE = 4096 }; // a multiple of every block length
    float v[PIECE];
    struct stats s = {.min = INFINITY, .max = -INFINITY};
    const struct dtype_info *info = dtype_info(t->type);
    for (size_t at = 0; at < t->n_elements; at += PIECE) {
        size_t n = t->n_elements - at < PIECE ? t->n_elements - at : PIECE;
        dtype_to_f32(t->type, (const unsigned char *)t->data + at / info->block_len * info->block_bytes, v, n);
        add_values(&s, v, n);
    }
    return s;
}

static const struct tensor_set *files_of(const struct model *m) {
    return m->kind == MODEL_GGUF ? &m->gguf.tensors : &m->files;
}

static json_t *shape_json(const struct tensor *t) {
    json_t *shape = json_array();
    for (int i = 0; i < t->rank; i++) json_array_append_new(shape, json_integer((json_int_t)t->shape[i]));
    return shape;
}

// One tensor's line or object. Returns whether it holds NaN or Inf.
static bool tell_tensor(const struct tensor *t, bool with_stats, json_t *list) {
    char shape[160];
    bool is_weight = dtype_info(t->type)->is_weight;
    struct stats s = with_stats && is_weight ? tensor_stats(t) : (struct stats){0};
    double rms = s.n ? sqrt(s.sum_squares / (double)s.n) : 0;
    if (list) {
        json_t *o = json_pack("{s:s,s:s,s:o,s:I}", "name", t->name, "dtype", dtype_info(t->type)->name, "shape",
                              shape_json(t), "bytes", (json_int_t)t->n_bytes);
        if (with_stats && is_weight)
            json_object_set_new(o, "stats",
                                json_pack("{s:f,s:f,s:f,s:I,s:I}", "min", isfinite(s.min) ? s.min : 0.0, "max",
                                          isfinite(s.max) ? s.max : 0.0, "rms", rms, "nan", (json_int_t)s.n_nan, "inf",
                                          (json_int_t)s.n_inf));
        json_array_append_new(list, o);
    } else {
        printf("%-52s %-5s %-18s", t->name, dtype_info(t->type)->name, tensor_shape_text(t, shape, sizeof shape));
        if (with_stats && is_weight) printf(" min %11.5g  max %11.5g  rms %11.5g", s.min, s.max, rms);
        if (s.n_nan || s.n_inf) printf("  NaN %zu  Inf %zu", s.n_nan, s.n_inf);
        putchar('\n');
    }
    return s.n_nan || s.n_inf;
}

static double largest(const float *v, size_t n) {
    double max = 0;
    for (size_t i = 0; i < n; i++)
        if (fabs((double)v[i]) > max) max = fabs((double)v[i]);
    return max;
}

static size_t kv_bytes_per_token(const struct model_config *c, enum dtype type) {
    return 2 * c->n_layers * c->n_kv_heads * kv_bytes(type, c->head_dim);
}

// The plan for these options, as `tandem run` would make it; --batch: so many whole contexts side by side.
static bool make_plan(const struct cli_options *o, struct model *m, struct engine_plan *plan) {
    struct error err = {0};
    size_t threads = 0, context = 0, batch = 0;
    if (!cli_size(o, OPT_THREADS, 1, 1024, &threads) || !cli_size(o, OPT_CTX, 1, (size_t)1 << 24, &context) ||
        !cli_size(o, OPT_BATCH, 1, 1024, &batch))
        return false;
    tandem_options options = {.threads = (int)threads,
                              .context = context,
                              .max_batch = batch,
                              .kv_type = o->text[OPT_KV_TYPE],
                              .repack = o->text[OPT_REPACK],
                              .isa = o->text[OPT_ISA],
                              .device = o->text[OPT_DEVICE]};
    bool ok = engine_plan(m, &options, plan, &err);
    options.context = plan->context;
    options.kv_tokens = plan->context * batch;
    if (ok && batch) ok = engine_plan(m, &options, plan, &err);
    if (!ok) cli_fail("%s", err.text);
    return ok;
}

static size_t plan_total(const struct engine_plan *p) {
    return p->memory.weights + p->memory.kv + p->memory.activations;
}

static json_t *plan_json(const struct engine_plan *p) {
    return json_pack("{s:I,s:I,s:I,s:I,s:I,s:I,s:s,s:s,s:I,s:s}", "weights", (json_int_t)p->memory.weights, "kv",
                     (json_int_t)p->memory.kv, "activations", (json_int_t)p->memory.activations, "total",
                     (json_int_t)plan_total(p), "context", (json_int_t)p->context, "batch", (json_int_t)p->max_batch,
                     "kv_type", dtype_info(p->kv_type)->name, "device", p->ops, "repacked", (json_int_t)p->repacked,
                     "repacked_in", p->repacked_in);
}

static json_t *model_json(const struct model *m, const struct tokenizer *tok, enum template_kind kind,
                          const struct engine_plan *plan) {
    const struct model_config *c = &m->config;
    static const char *const formats[] = {
        [MODEL_FOLDER] = "safetensors", [MODEL_GGUF] = "gguf", [MODEL_SYNTHETIC] = "synthetic"};
    json_t *eos = json_array();
    for (size_t i = 0; i < c->n_eos; i++) json_array_append_new(eos, json_integer(c->eos[i]));
    return json_pack("{s:s,s:s,s:s,s:{s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:f,s:f,s:b,s:b,s:b,s:o},s:I,s:I,s:o,s:s?,s:s}",
                     "path", m->path, "format", formats[m->kind], "architecture", arch_name(c->arch), "config",
                     "n_layers", (json_int_t)c->n_layers, "hidden", (json_int_t)c->hidden, "n_heads",
                     (json_int_t)c->n_heads, "n_kv_heads", (json_int_t)c->n_kv_heads, "head_dim",
                     (json_int_t)c->head_dim, "n_ff", (json_int_t)c->n_ff, "n_vocab", (json_int_t)c->n_vocab, "context",
                     (json_int_t)c->context, "rms_eps", c->rms_eps, "rope_theta", c->rope.theta, "qk_norm", c->qk_norm,
                     "qkv_bias", c->qkv_bias, "tied", c->tied, "eos", eos, "weight_bytes", (json_int_t)m->weight_bytes,
                     "kv_bytes_per_token", (json_int_t)kv_bytes_per_token(c, plan->kv_type), "memory", plan_json(plan),
                     "tokenizer", tok ? tokenizer_describe(tok) : NULL, "chat_template", template_name(kind));
}

static void print_plan(const struct model *m, const struct engine_plan *p) {
    char type[16];
    snprintf(type, sizeof type, "%s", dtype_info(p->kv_type)->name);
    for (char *at = type; *at; at++) *at = (char)tolower((unsigned char)*at);
    printf("memory plan    %s, a context of %zu, up to %zu sequences a step\n", p->ops, p->context, p->max_batch);
    printf("  weights      %9.1f MB", (double)p->memory.weights / 1e6);
    if (p->repacked) printf("  repacked in %s", p->repacked_in[0] ? p->repacked_in : "memory");
    if (p->repacked_in[0] && access(p->repacked_in, F_OK) != 0) printf(" (by the first run)");
    printf("\n");
    printf("  KV           %9.1f MB  %zu tokens in %s, %.1f KB each\n", (double)p->memory.kv / 1e6,
           p->n_pages * KV_PAGE_TOKENS, type, (double)kv_bytes_per_token(&m->config, p->kv_type) / 1e3);
    printf("  activations  %9.1f MB  with logits, sampling and scratch\n", (double)p->memory.activations / 1e6);
    printf("  total        %9.1f MB\n", (double)plan_total(p) / 1e6);
}

static void print_model(const struct model *m, const struct tokenizer *tok, const char *why, enum template_kind kind,
                        const struct engine_plan *plan) {
    const struct model_config *c = &m->config;
    printf("model          %s\n", m->path);
    printf("architecture   %s (%s): %zu layers, hidden %zu, %zu query heads, %zu KV heads, head_dim %zu, MLP %zu\n",
           arch_name(c->arch), c->source, c->n_layers, c->hidden, c->n_heads, c->n_kv_heads, c->head_dim, c->n_ff);
    printf("vocabulary     %zu rows, head %s\n", c->n_vocab, c->tied ? "tied to the embedding" : "of its own");
    printf("norms, biases  eps %g, q/k norm %s, q/k/v biases %s\n", c->rms_eps, c->qk_norm ? "yes" : "no",
           c->qkv_bias ? "yes" : "no");
    static const char *const scaling[] = {"none", "linear", "yarn", "llama3"};
    printf("positions      %zu, RoPE theta %g, scaling %s\n", c->context, c->rope.theta, scaling[c->rope.scaling]);
    printf("tokenizer      %s\n", tok ? tokenizer_describe(tok) : why);
    printf("chat template  %s\n", template_name(kind));
    print_plan(m, plan);
}

static void tell_norms(const struct model *m, json_t *out) {
    if (!m->config.qk_norm) return;
    json_t *list = json_array();
    for (size_t i = 0; i < m->config.n_layers; i++) {
        double q = largest(m->layers[i].q_norm, m->config.head_dim),
               k = largest(m->layers[i].k_norm, m->config.head_dim);
        if (!out) printf("layer %-3zu        largest |q_norm| %9.4f   largest |k_norm| %9.4f\n", i, q, k);
        json_array_append_new(list, json_pack("{s:f,s:f}", "q_norm_max", q, "k_norm_max", k));
    }
    if (out) json_object_set(out, "qk_norms", list);
    json_decref(list);
}

static json_t *machine_json(void) {
    const struct ops *best = ops_cpu(NULL, NULL);
    json_t *isas = json_array();
    size_t n;
    const struct isa_info *isa = ops_cpu_isas(&n);
    for (size_t i = 0; i < n; i++)
        json_array_append_new(isas, json_pack("{s:s,s:s,s:b}", "name", isa[i].name, "needs", isa[i].needs, "available",
                                              isa[i].available));
    return json_pack("{s:s,s:i,s:s,s:o}", "version", tandem_version(), "cpus", pool_usable_cpus(), "ops",
                     best ? best->name : "none", "isas", isas);
}

static int tell_machine(bool json) {
    if (json) return cli_print_json(machine_json()) ? EXIT_GOOD : EXIT_FAULT;
    const struct ops *best = ops_cpu(NULL, NULL);
    printf("tandem         %s\nCPUs           %d usable by this process\nops            %s\n", tandem_version(),
           pool_usable_cpus(), best ? best->name : "none");
    size_t n;
    const struct isa_info *isa = ops_cpu_isas(&n);
    for (size_t i = 0; i < n; i++)
        printf("--isa          %-12s %-22s %s\n", isa[i].name, isa[i].needs, isa[i].available ? "yes" : isa[i].why_not);
    for (int i = 0; i < FUSED_COUNT; i++)
        printf("fused op       %-20s %s\n", fusion_info((enum fused_op)i)->name,
               best && fusion_available(best, (enum fused_op)i) ? "yes" : "no: its primitives run");
    return EXIT_GOOD;
}

static void warn(void *user, enum log_level level, const char *text) {
    (void)user;
    fprintf(stderr, "tandem: inspect: %s%s\n", level == LOG_WARN ? "warning: " : "", text);
}

static int inspect_model(const struct cli_options *o, struct model *m) {
    struct error why = {0};
    struct engine_plan plan = {0};
    if (!make_plan(o, m, &plan)) return EXIT_FAULT;
    bool json = o->given[OPT_JSON], bad = false;
    struct tokenizer *tok = NULL;
    if (m->kind == MODEL_SYNTHETIC) error_set(&why, "none: the model is synthetic");
    else tok = m->kind == MODEL_GGUF ? tokenizer_open_gguf(&m->gguf, &why) : tokenizer_open_folder(m->path, &why);
    enum template_kind kind = template_recognise(tok ? tokenizer_chat_template(tok) : NULL);
    json_t *out = json ? model_json(m, tok, kind, &plan) : NULL;
    if (!json) print_model(m, tok, why.text, kind, &plan);
    if (o->given[OPT_STATS]) tell_norms(m, out);
    if (o->given[OPT_TENSORS] || o->given[OPT_STATS]) {
        json_t *list = json ? json_array() : NULL;
        for (size_t i = 0; i < files_of(m)->n; i++)
            bad = tell_tensor(&files_of(m)->tensors[i], o->given[OPT_STATS], list) || bad;
        if (json) json_object_set_new(out, "tensors", list);
    }
    int status = json && !cli_print_json(out) ? EXIT_FAULT : EXIT_GOOD;
    if (bad) status = cli_fail("some weights are NaN or Inf");
    tokenizer_free(tok);
    return status;
}

static int run(const struct cli_options *o) {
    if (o->given[OPT_MACHINE]) return tell_machine(o->given[OPT_JSON]);
    const char *name = cli_model(o);
    if (!name) return EXIT_FAULT;
    struct error err = {0};
    struct buffer path = {0};
    enum model_kind kind;
    struct log log = {.message = warn};
    struct model_load_options options = {.log = &log};
    struct model *m = hub_resolve(name, &kind, &path, &err) ? model_load(kind, path.data, &options, &err) : NULL;
    int status = m ? inspect_model(o, m) : cli_fail("%s", err.text);
    buffer_free(&path);
    model_free(m);
    return status;
}

static const enum option_id options[] = {OPT_TENSORS, OPT_STATS,  OPT_MACHINE, OPT_CTX,    OPT_BATCH, OPT_KV_TYPE,
                                         OPT_THREADS, OPT_DEVICE, OPT_ISA,     OPT_REPACK, OPT_JSON,  OPT_HELP};

const struct command command_inspect = {
    .name = "inspect",
    .summary = "what a model is: config, tensors, statistics, memory",
    .usage = "[MODEL] [--tensors] [--stats] [--machine] [--ctx N] [--batch N] [--kv-type TYPE] [--json]",
    .details =
        "Reads headers only, and fails on whatever `tandem run` would refuse; --stats reads every value. The memory\n"
        "plan is the one that `tandem run` makes with the same options; with --batch, for so many whole contexts.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
