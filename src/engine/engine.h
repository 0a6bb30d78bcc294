// engine.h: what an engine and a session are made of, for the command line, the server and the doctor; everybody else
// uses include/tandem.h. The public functions are implemented in engine.c (the engine, text) and session.c (sessions,
// steps).
#ifndef TANDEM_ENGINE_ENGINE_H
#define TANDEM_ENGINE_ENGINE_H

#include "base/log.h"
#include "base/pool.h"
#include "engine/pages.h"
#include "engine/sampler.h"
#include "model/model.h"
#include "tandem.h"
#include "text/template.h"
#include "text/tokenizer.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

struct tandem_engine {
    struct model *model;
    struct tokenizer *tokenizer; // NULL: the model has none (trace and --ids still work)
    char tokenizer_error[512];   // why
    enum template_kind template_kind;
    struct log log; // its texts go to the options' callbacks
    struct pool *pool;
    const struct ops *ops;
    uint32_t fusion;
    enum dtype kv_type;
    size_t context, chunk, max_batch, max_step_tokens;
    int32_t end_ids[2 * MAX_EOS + 1]; // generation_config.json's, else the config's, and the tokenizer's
    size_t n_end_ids;

    pthread_mutex_t lock; // one call at a time; guards all below
    struct run *run;
    struct kv_store kv;
    struct page_pool pages;
    struct sampler sampler;
    struct step_arrays { // one step's batch, as in struct batch
        int32_t *token, *position, *seq, *seq_start, *page_start, *pages, *kv_len, *logit_rows;
    } step;
    tandem_memory memory;
};

struct tandem_session {
    tandem_engine *engine;
    int32_t *ids;    // [engine->context]
    size_t n_ids;    // what the session holds
    size_t n_prompt; // ids from here on were generated since the last append or set
    size_t n_kv;     // ids whose K and V are computed: n_kv <= n_ids
    int32_t *pages;  // [pages of a full context] the first n_pages are this session's
    size_t n_pages;
    tandem_sampling sampling;
    int32_t *bias_ids; // owned copies behind `sampling`
    float *bias;
    atomic_bool cancelled;

    // About the last token, for --json and /stats.
    const float *last_logits; // [n_vocab] valid until the engine's next step
    uint64_t hash;            // of all logits that tokens were sampled from
};

// Where a sampling value came from, for people.
struct sampling_sources {
    const char *temperature, *top_k, *top_p, *min_p, *repeat_penalty;
};
void sampling_defaults(const tandem_engine *engine, bool thinking, tandem_sampling *out,
                       struct sampling_sources *sources);

bool engine_is_end(const tandem_engine *engine, int32_t id);

// The prompt's ids of a chat document. `err` as everywhere inside.
bool engine_render(const tandem_engine *engine, const struct template_document *doc, struct template_options options,
                   struct token_ids *ids, struct error *err);

// Runs all ids of a fresh sequence in one sequence of chunks and hands the logits of every position to the tap (and
// whatever else the tap watches). For traces and teacher forcing. `fusion` as in struct op_ctx.
bool engine_trace(tandem_engine *engine, const int32_t *ids, size_t n, uint32_t fusion, tap_fn *tap, void *user,
                  struct error *err);

#endif
