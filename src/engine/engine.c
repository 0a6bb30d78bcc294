// engine.c: opening an engine: model, tokenizer, threads, and the plan of all memory; and its text functions. Sessions
// and steps are session.c's.
#include "engine/engine.h"

#include "base/clock.h"
#include "base/size.h"
#include "format/hub.h"
#include "ops/kv_page.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum {
    DEFAULT_CONTEXT = 8192,
    DEFAULT_CHUNK = 256,
    DEVICE_CHUNK = 2048,
    DEFAULT_BATCH = 8,
    MAX_BATCH = 1024,
    MAX_CHUNK = 65536,
    MAX_SAMPLERS = 16,      // tokens chosen side by side
    REPACK_KEPT = 32 << 20, // fewer bytes of weights are repacked faster than a file is opened
};

const char *tandem_version(void) {
    return "0.1.0";
}

// Copies an inner error to a caller's buffer, at the public border.
static void give_error(const struct error *e, char *err, size_t err_size) {
    if (err && err_size) snprintf(err, err_size, "%s", e->text);
}

static void forward_message(void *user, enum log_level level, const char *text) {
    const tandem_options *o = user;
    if (o->log) o->log(o->user, level == LOG_WARN ? TANDEM_LOG_WARN : TANDEM_LOG_INFO, text);
}

static void forward_progress(void *user, const char *what, double fraction) {
    const tandem_options *o = user;
    if (o->progress) o->progress(o->user, what, fraction);
}

// ---- Opening ------------------------------------------------------------------------------------------------------

static bool choose_limits(tandem_engine *e, const tandem_options *o, struct error *err) {
    size_t model_context = e->model->config.context;
    e->context = o->context ? o->context : model_context < DEFAULT_CONTEXT ? model_context : DEFAULT_CONTEXT;
    if (e->context > model_context)
        return error_set(err, "context: the model has %zu positions, %zu were asked for", model_context, e->context);
    e->chunk = o->chunk ? o->chunk : e->ops->device ? DEVICE_CHUNK : DEFAULT_CHUNK;
    if (e->chunk > MAX_CHUNK) return error_set(err, "chunk: expected 1 to %d, found %zu", MAX_CHUNK, e->chunk);
    e->max_batch = o->max_batch ? o->max_batch : DEFAULT_BATCH;
    if (e->max_batch > MAX_BATCH)
        return error_set(err, "max_batch: expected 1 to %d, found %zu", MAX_BATCH, e->max_batch);
    size_t most; // tokens that all sequences of a step can have
    if (size_mul(e->context, e->max_batch, &most) && e->chunk > most) e->chunk = most;
    e->max_step_tokens = e->chunk > e->max_batch ? e->chunk : e->max_batch;
    if (!kv_type_parse(o->kv_type, &e->kv_type, err)) return false;
    return kv_type_fits(e->kv_type, e->model->config.head_dim, e->ops->device, err);
}

// Keys the hash of the prefix cache, so that nobody can prepare prompts that collide.
static uint64_t hash_seed(void) {
    uint64_t seed = 0;
    if (getrandom(&seed, sizeof seed, 0) != (ssize_t)sizeof seed) seed = (uint64_t)(clock_seconds() * 1e9);
    return seed;
}

// Refuses what a device's memory cannot hold, before anything is allocated.
static bool check_device_memory(const tandem_engine *e, size_t weights, size_t kv, size_t activations,
                                struct error *err) {
    struct device *d = e->ops->device;
    size_t available = d->available(d), needed = SIZE_MAX;
    if (size_add(weights, kv, &needed) && size_add(needed, activations, &needed) && needed <= available) return true;
    return error_set(err,
                     "%s: the plan does not fit\n  weights      %9.3f GB\n  KV           %9.3f GB\n"
                     "  activations  %9.3f GB\n  free         %9.3f GB of %.3f\n"
                     "a smaller --ctx, or fewer sessions at once, needs less",
                     d->name, (double)weights / 1e9, (double)kv / 1e9, (double)activations / 1e9,
                     (double)available / 1e9, (double)d->memory / 1e9);
}

// The weights' copy on the device, if the ops have one. The KV's size is checked with them.
static bool place_weights(tandem_engine *e, const struct run_options *run, size_t n_pages, struct error *err) {
    struct device *d = e->ops->device;
    const struct model_config *c = &e->model->config;
    if (!d) return true;
    size_t weights = weights_device_bytes(e->model, d, err), kv = kv_store_bytes(c, e->kv_type, n_pages);
    if (!weights || !check_device_memory(e, weights, kv, run_bytes(e->model, run), err)) return false;
    e->weights = weights_upload(e->model, d, e->pool, &e->log, err);
    return e->weights != NULL;
}

static size_t session_pages(const tandem_engine *e) {
    return (e->context + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
}

// KV pages of all sessions: at least a whole context.
static size_t all_pages(const tandem_engine *e, const tandem_options *o) {
    size_t kv_tokens = o->kv_tokens ? o->kv_tokens : e->context;
    size_t n_pages = kv_tokens / KV_PAGE_TOKENS + (kv_tokens % KV_PAGE_TOKENS != 0);
    return n_pages < session_pages(e) ? session_pages(e) : n_pages;
}

static struct run_options step_options(const tandem_engine *e) {
    return (struct run_options){.ops = e->ops,
                                .pool = e->pool,
                                .fusion = e->fusion,
                                .max_tokens = e->max_step_tokens,
                                .max_logit_rows = e->max_batch,
                                .max_positions = e->context,
                                .max_pages = session_pages(e) * e->max_batch};
}

// As many as there are threads to choose, and no more than there are rows.
static size_t n_samplers(const tandem_engine *e, int n_threads) {
    size_t n = n_threads > MAX_SAMPLERS ? MAX_SAMPLERS : (size_t)n_threads;
    return n < e->max_batch ? n : e->max_batch;
}

static bool create_samplers(tandem_engine *e, struct error *err) {
    size_t n = n_samplers(e, pool_size(e->pool));
    e->samplers = size_alloc_zero(n, sizeof *e->samplers);
    if (!e->samplers) return error_set(err, "out of memory for sampling");
    for (; e->n_samplers < n; e->n_samplers++)
        if (!sampler_create(&e->samplers[e->n_samplers], e->model->config.n_vocab, err)) return false;
    return true;
}

static tandem_memory memory_of(const tandem_engine *e, const struct run_options *run, size_t n_pages, size_t weights) {
    int n_threads = e->pool ? pool_size(e->pool) : run->n_threads;
    size_t samplers = n_samplers(e, n_threads) * sampler_bytes(e->model->config.n_vocab);
    return (tandem_memory){.weights = weights,
                           .kv = kv_store_bytes(&e->model->config, e->kv_type, n_pages),
                           .activations = run_bytes(e->model, run) + samplers};
}

static bool plan_memory(tandem_engine *e, const tandem_options *o, struct error *err) {
    size_t per_session = session_pages(e), n_pages = all_pages(e, o), step_pages;
    struct run_options run = step_options(e);
    struct step_arrays *s = &e->step;
    if (!place_weights(e, &run, n_pages, err)) return false;
    run.weights = e->weights;
    if (!kv_store_create_on(e->ops->device, &e->kv, &e->model->config, e->kv_type, n_pages, err) ||
        !kv_pool_create(&e->pages, n_pages, KV_PAGE_TOKENS, hash_seed(), err) || !create_samplers(e, err))
        return false;
    e->run = run_create(e->model, &run, err);
    if (!e->run) return false;
    s->token = size_alloc(e->max_step_tokens, sizeof *s->token);
    s->position = size_alloc(e->max_step_tokens, sizeof *s->position);
    s->seq = size_alloc(e->max_step_tokens, sizeof *s->seq);
    s->seq_start = size_alloc(e->max_batch + 1, sizeof *s->seq_start);
    s->page_start = size_alloc(e->max_batch + 1, sizeof *s->page_start);
    s->kv_len = size_alloc(e->max_batch, sizeof *s->kv_len);
    s->logit_rows = size_alloc(e->max_batch, sizeof *s->logit_rows);
    s->pages = size_mul(per_session, e->max_batch, &step_pages) ? size_alloc(step_pages, sizeof *s->pages) : NULL;
    s->sample = size_alloc(e->max_batch, sizeof *s->sample);
    if (!s->sample || !s->token || !s->position || !s->seq || !s->seq_start || !s->page_start || !s->kv_len ||
        !s->logit_rows || !s->pages)
        return error_set(err, "out of memory for batches of %zu sessions", e->max_batch);
    if (!requests_create(e, o, err)) return false;
    e->memory = memory_of(e, &run, n_pages, e->weights ? e->weights->bytes : e->model->weight_bytes);
    return true;
}

static void add_end_id(tandem_engine *e, int32_t id) {
    if (id < 0 || (size_t)id >= e->model->config.n_vocab || engine_is_end(e, id)) return;
    e->end_ids[e->n_end_ids++] = id;
}

bool engine_is_end(const tandem_engine *e, int32_t id) {
    for (size_t i = 0; i < e->n_end_ids; i++)
        if (e->end_ids[i] == id) return true;
    return false;
}

// The tokenizer and the chat template. A model without a tokenizer is still good for ids.
static bool open_text(tandem_engine *e, const tandem_options *o, struct error *err) {
    struct error why = {0};
    if (e->model->kind == MODEL_SYNTHETIC) error_set(&why, "a synthetic model has none");
    else
        e->tokenizer = e->model->kind == MODEL_GGUF ? tokenizer_open_gguf(&e->model->gguf, &why)
                                                    : tokenizer_open_folder(e->model->path, &why);
    if (!e->tokenizer) {
        snprintf(e->tokenizer_error, sizeof e->tokenizer_error, "%.500s", why.text);
        if (e->model->kind != MODEL_SYNTHETIC) log_warn(&e->log, "no tokenizer: %s", why.text);
    }
    if (e->tokenizer && e->model->kind == MODEL_GGUF && !gguf_find(&e->model->gguf, "tokenizer.ggml.pre"))
        log_warn(&e->log,
                 "the file names no pre-tokeniser (tokenizer.ggml.pre): text is cut as llama.cpp's \"default\" "
                 "does, which may not be how the model was trained");
    if (o->chat_template && !template_from_name(o->chat_template, &e->template_kind))
        return error_set(err, "unknown chat template \"%s\"; expected one of %s", o->chat_template, template_names());
    if (!o->chat_template && e->tokenizer) e->template_kind = template_recognise(tokenizer_chat_template(e->tokenizer));
    if (e->tokenizer && (size_t)tokenizer_n_ids(e->tokenizer) > e->model->config.n_vocab)
        return error_set(err, "the tokenizer has %d ids, but the embedding only %zu rows",
                         tokenizer_n_ids(e->tokenizer), e->model->config.n_vocab);
    const struct generation_config *g = &e->model->generation;
    const struct model_config *c = &e->model->config;
    for (size_t i = 0; i < g->n_eos; i++) add_end_id(e, g->eos[i]);
    for (size_t i = 0; i < c->n_eos && g->n_eos == 0; i++) add_end_id(e, c->eos[i]);
    if (e->tokenizer) add_end_id(e, tokenizer_eos(e->tokenizer));
    return true;
}

// On "auto", a GPU that cannot run this model gives way to the CPU, and says why.
static bool settle_device(tandem_engine *e, const tandem_options *o, struct error *err) {
    struct device *d = e->ops->device;
    struct error why = {0};
    if (!d || model_runs_on(e->model, d, &why)) return true;
    if (o->device && strcmp(o->device, "auto") != 0) return error_set(err, "%s", why.text);
    log_warn(&e->log, "running on the CPU: %s", why.text);
    ops_close(e->ops);
    e->ops = ops_cpu(o->isa, err);
    return e->ops != NULL;
}

// Whether weights are put in the ops' own order, and how. cache: to be freed after.
static bool how_to_repack(tandem_engine *e, const tandem_options *o, bool *packs, struct pack_options *pack,
                          struct buffer *cache, struct error *err) {
    const char *how = o->repack ? o->repack : "on";
    const bool on = strcmp(how, "on") == 0, memory = strcmp(how, "memory") == 0;
    if (!on && !memory && strcmp(how, "off") != 0)
        return error_set(err, "repack: expected on, memory or off, found \"%s\"", how);
    *packs = (on || memory) && e->ops->takes_octets;
    const bool keeps = *packs && on && hub_own_cache(cache);
    *pack = (struct pack_options){.pool = e->pool,
                                  .log = &e->log,
                                  .cache = keeps ? cache->data : NULL,
                                  .cache_least = REPACK_KEPT,
                                  .bf16_in_memory = memory || e->model->kind == MODEL_SYNTHETIC};
    return true;
}

// Where the repacked weights will be.
static bool plan_repacking(tandem_engine *e, const tandem_options *o, struct engine_plan *out, struct error *err) {
    struct buffer cache = {0}, path = {0};
    struct pack_options pack;
    bool packs, ok = how_to_repack(e, o, &packs, &pack, &cache, err);
    if (ok && packs) {
        ok = model_pack_place(e->model, &pack, &path, &out->repacked) || error_set(err, "out of memory");
        snprintf(out->repacked_in, sizeof out->repacked_in, "%s", path.data ? path.data : "");
    }
    buffer_free(&path);
    buffer_free(&cache);
    return ok;
}

// Checks the weights' values and puts the weights in the order that the ops like best; without room for that they stay
// as they are.
static bool prepare_weights(tandem_engine *e, const tandem_options *o, struct error *err) {
    struct buffer cache = {0};
    struct pack_options pack;
    bool packs;
    if (!how_to_repack(e, o, &packs, &pack, &cache, err)) return false;
    bool ok = packs && model_pack_cached(e->model, &pack);
    if (!ok) {
        ok = model_check_values(e->model, e->pool, &e->log, err);
        if (ok && packs) model_pack(e->model, &pack);
    }
    buffer_free(&cache);
    return ok;
}

// A GPU takes a quarter of a second to open, on a thread of its own beside the model's files.
struct opening {
    const tandem_options *options;
    const struct ops *ops; // NULL: err says why
    struct error why, err; // why: of running on the CPU
    pthread_t thread;
    bool has_thread;
};

static void *open_ops(void *ctx) {
    struct opening *p = ctx;
    p->ops = ops_open(p->options->device, p->options->isa, &p->why, &p->err);
    return NULL;
}

static void begin_opening(struct opening *p, const tandem_options *o) {
    *p = (struct opening){.options = o};
    p->has_thread = pthread_create(&p->thread, NULL, open_ops, p) == 0;
    if (!p->has_thread) open_ops(p);
}

static bool end_opening(struct opening *p, tandem_engine *e, struct error *err) {
    if (p->has_thread) pthread_join(p->thread, NULL);
    e->ops = p->ops;
    if (!e->ops) *err = p->err;
    else if (p->why.text[0]) log_warn(&e->log, "running on the CPU: %s", p->why.text);
    return e->ops != NULL;
}

static bool load_model(tandem_engine *e, const tandem_options *o, struct error *err) {
    enum model_kind kind;
    struct buffer path = {0};
    bool ok = fusion_parse(o->fusion ? o->fusion : "on", &e->fusion, err) &&
              (e->pool = pool_create(o->threads, err)) != NULL && hub_resolve(o->model, &kind, &path, err);
    struct model_load_options load = {.pool = e->pool, .log = &e->log};
    if (ok) e->model = model_load(kind, path.data, &load, err);
    buffer_free(&path);
    return e->model && open_text(e, o, err);
}

static bool open_parts(tandem_engine *e, const tandem_options *o, struct error *err) {
    e->log = (struct log){.message = forward_message, .progress = forward_progress, .user = (void *)(uintptr_t)o};
    if (!o->model) return error_set(err, "no model was named");
    struct opening opening;
    begin_opening(&opening, o);
    bool ok = load_model(e, o, err);
    ok = end_opening(&opening, e, err) && ok && settle_device(e, o, err) && prepare_weights(e, o, err) &&
         choose_limits(e, o, err) && plan_memory(e, o, err);
    e->log = (struct log){0}; // the options are the caller's: nothing is said after this call
    return ok;
}

bool engine_plan(struct model *model, const tandem_options *o, struct engine_plan *out, struct error *err) {
    tandem_engine *e = size_alloc_zero(1, sizeof *e);
    if (!e) return error_set(err, "out of memory");
    e->model = model;
    e->ops = ops_open(o->device, o->isa, NULL, err);
    bool ok = e->ops && settle_device(e, o, err) && choose_limits(e, o, err);
    size_t weights = model->weight_bytes;
    if (ok && e->ops->device) ok = (weights = weights_device_bytes(model, e->ops->device, err)) != 0;
    if (ok) {
        struct run_options run = step_options(e);
        run.n_threads = o->threads > 0 ? o->threads : pool_usable_cpus();
        *out = (struct engine_plan){.context = e->context,
                                    .max_batch = e->max_batch,
                                    .n_pages = all_pages(e, o),
                                    .kv_type = e->kv_type,
                                    .memory = memory_of(e, &run, all_pages(e, o), weights)};
        snprintf(out->ops, sizeof out->ops, "%s", e->ops->name);
        ok = plan_repacking(e, o, out, err);
        if (ok && (out->memory.kv == SIZE_MAX || run_bytes(model, &run) == SIZE_MAX))
            ok = error_set(err, "the plan for a context of %zu is beyond what can be addressed", e->context);
    }
    ops_close(e->ops);
    free(e);
    return ok;
}

tandem_engine *tandem_open(const tandem_options *options, char *err, size_t err_size) {
    struct error error = {0};
    tandem_engine *e = size_alloc_zero(1, sizeof *e);
    if (!e) {
        error_set(&error, "out of memory");
        give_error(&error, err, err_size);
        return NULL;
    }
    pthread_mutex_init(&e->lock, NULL);
    if (!open_parts(e, options, &error)) {
        give_error(&error, err, err_size);
        tandem_close(e);
        return NULL;
    }
    return e;
}

void tandem_close(tandem_engine *e) {
    if (!e) return;
    requests_free(e);
    struct step_arrays *s = &e->step;
    int32_t *arrays[] = {s->token,      s->position, s->seq,    s->seq_start,
                         s->page_start, s->pages,    s->kv_len, s->logit_rows};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) free(arrays[i]);
    free(s->sample);
    for (size_t i = 0; i < e->n_samplers; i++) sampler_free(&e->samplers[i]);
    free(e->samplers);
    kv_pool_free(&e->pages);
    kv_store_free(&e->kv);
    run_free(e->run);
    weights_free(e->weights);
    ops_close(e->ops);
    tokenizer_free(e->tokenizer);
    model_free(e->model);
    pool_free(e->pool);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

size_t tandem_context(const tandem_engine *e) {
    return e->context;
}

tandem_memory tandem_memory_plan(const tandem_engine *e) {
    return e->memory;
}

// ---- Sampling defaults --------------------------------------------------------------------------------------------

static bool is_qwen3(enum template_kind kind) {
    return kind == TEMPLATE_QWEN3 || kind == TEMPLATE_QWEN3_INSTRUCT_2507 ||
           kind == TEMPLATE_QWEN3_INSTRUCT_REASONING || kind == TEMPLATE_QWEN3_THINKING_2507;
}

void sampling_defaults(const tandem_engine *e, bool thinking, tandem_sampling *out, struct sampling_sources *from) {
    static const char file[] = "generation_config.json", none[] = "default";
    static const char preset_on[] = "Qwen3 thinking preset", preset_off[] = "Qwen3 non-thinking preset";
    const struct generation_config *g = &e->model->generation;
    *out = (tandem_sampling){.temperature = 1, .top_p = 1, .repeat_penalty = 1};
    *from = (struct sampling_sources){none, none, none, none, none};
    // Qwen3's model cards: 0.6, 0.95, 20 with thinking, 0.7, 0.8, 20 without. The file of a model that can do both
    // holds the former; a model that can do one is in that mode, whatever was asked for.
    bool qwen3 = is_qwen3(e->template_kind), both = template_can_hush(e->template_kind);
    if (!both) thinking = template_has_thinking(e->template_kind);
    if (qwen3) {
        out->temperature = thinking ? 0.6 : 0.7;
        out->top_p = thinking ? 0.95 : 0.8;
        out->top_k = 20;
        from->temperature = from->top_p = from->top_k = from->min_p = thinking ? preset_on : preset_off;
    }
    bool file_counts = thinking || !both;
    if (file_counts && g->temperature.set) out->temperature = g->temperature.value, from->temperature = file;
    if (file_counts && g->top_p.set && g->top_p.value > 0) out->top_p = g->top_p.value, from->top_p = file;
    if (file_counts && g->top_k.set) out->top_k = (int32_t)g->top_k.value, from->top_k = file;
    if (file_counts && g->min_p.set) out->min_p = g->min_p.value, from->min_p = file;
    if (g->repetition_penalty.set) out->repeat_penalty = g->repetition_penalty.value, from->repeat_penalty = file;
    if (g->do_sample_set && !g->do_sample)
        out->temperature = 0, from->temperature = "generation_config.json (do_sample)";
}

tandem_sampling tandem_sampling_default(const tandem_engine *e, bool thinking) {
    tandem_sampling out;
    struct sampling_sources sources;
    sampling_defaults(e, thinking, &out, &sources);
    return out;
}

// ---- Text ---------------------------------------------------------------------------------------------------------

static bool need_tokenizer(const tandem_engine *e, struct error *err) {
    return e->tokenizer || error_set(err, "the model has no usable tokenizer: %s", e->tokenizer_error);
}

bool engine_render(const tandem_engine *e, const struct template_document *doc, struct template_options options,
                   const struct template_stretches *between, struct token_ids *ids, struct error *err) {
    if (!need_tokenizer(e, err)) return false;
    if (e->template_kind == TEMPLATE_UNKNOWN)
        return error_set(err, "the model's chat template is unknown to tandem; name one with --template: %s",
                         template_names());
    struct buffer text = {0};
    struct template_marks marks = {0};
    bool ok = template_render(e->template_kind, doc, options, &text, &marks, err) &&
              template_encode(e->tokenizer, buffer_text(&text), text.len, &marks, between, ids, err);
    template_marks_free(&marks);
    buffer_free(&text);
    return ok;
}

// Hands a list over to the caller.
static int give_ids(bool ok, struct token_ids *list, const struct error *error, int32_t **ids, size_t *n, char *err,
                    size_t err_size) {
    if (!ok) {
        give_error(error, err, err_size);
        token_ids_free(list);
        return TANDEM_ERROR;
    }
    *ids = list->ids;
    *n = list->n;
    return TANDEM_OK;
}

int tandem_tokenize(const tandem_engine *e, const char *text, size_t n, bool special, int32_t **ids, size_t *n_ids,
                    char *err, size_t err_size) {
    struct error error = {0};
    struct token_ids list = {0};
    bool ok = need_tokenizer(e, &error) && tokenizer_encode(e->tokenizer, text, n, special, &list, &error);
    return give_ids(ok, &list, &error, ids, n_ids, err, err_size);
}

int tandem_detokenize(const tandem_engine *e, const int32_t *ids, size_t n_ids, char **text, size_t *n, char *err,
                      size_t err_size) {
    struct error error = {0};
    struct buffer out = {0};
    bool ok = need_tokenizer(e, &error) && tokenizer_decode(e->tokenizer, ids, n_ids, false, &out, &error);
    *n = out.len;
    *text = ok ? buffer_take(&out) : NULL;
    if (!*text) {
        if (ok) error_set(&error, "out of memory");
        give_error(&error, err, err_size);
        buffer_free(&out);
        return TANDEM_ERROR;
    }
    return TANDEM_OK;
}

int tandem_apply_template(const tandem_engine *e, const char *json, size_t n, int thinking, int32_t **ids,
                          size_t *n_ids, char *err, size_t err_size) {
    struct error error = {0};
    struct token_ids list = {0};
    struct template_document *doc = template_parse(json, n, "messages", &error);
    struct template_options options = {.enable_thinking = thinking, .add_generation_prompt = -1};
    bool ok = doc && engine_render(e, doc, options, NULL, &list, &error);
    template_document_free(doc);
    return give_ids(ok, &list, &error, ids, n_ids, err, err_size);
}

void tandem_free(void *memory) {
    free(memory);
}
