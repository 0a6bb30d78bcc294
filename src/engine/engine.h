// engine.h: what an engine and a session are made of, for the command line, the server and the doctor; everybody else
// uses include/tandem.h. The public functions are implemented in engine.c (the engine, text), session.c (sessions) and
// request.c (requests); step.c runs the model for both.
//
// Sessions and requests stand side by side on one pool of pages. A session belongs to a caller, who decides what runs
// when; its pages are never cached nor taken away. Requests belong to the scheduler. A session that needs a page takes
// a cached one that nobody uses, and a request that finds all pages held by sessions fails by name.
#ifndef TANDEM_ENGINE_ENGINE_H
#define TANDEM_ENGINE_ENGINE_H

#include "base/log.h"
#include "base/pool.h"
#include "engine/kv.h"
#include "engine/sampler.h"
#include "engine/sched.h"
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
    struct device_weights *weights; // on the ops' device; NULL: the model's own
    uint32_t fusion;
    enum dtype kv_type;
    size_t context, chunk, max_batch, max_step_tokens;
    int32_t end_ids[2 * MAX_EOS + 1]; // generation_config.json's, else the config's, and the tokenizer's
    size_t n_end_ids;

    pthread_mutex_t lock; // one call at a time; guards all below
    struct run *run;
    struct kv_store kv;
    struct kv_pool pages;
    struct requests *requests; // request.c
    struct sampler *samplers;  // [n_samplers] for choices side by side
    size_t n_samplers;
    struct step_arrays { // one step's batch, as in struct batch
        int32_t *token, *position, *seq, *seq_start, *page_start, *pages, *kv_len, *logit_rows;
        struct sample_row *sample; // [max_batch]
    } step;
    tandem_memory memory;
};

struct tandem_session {
    tandem_engine *engine;
    int32_t *ids;     // [engine->context]
    size_t n_ids;     // what the session holds
    size_t n_prompt;  // ids from here on were generated since the last append or set
    struct kv_seq kv; // kv.n_kv <= n_ids are computed; kv.pages: [pages of a full context]
    tandem_sampling sampling;
    int32_t *bias_ids; // owned copies behind `sampling`
    float *bias;
    atomic_bool cancelled;

    // About the last token, for --json and /stats.
    const float *last_logits; // [n_vocab] valid until the engine's next step
    uint64_t hash;            // of all logits that tokens were sampled from
};

// ---- A step (step.c)

// A sequence's share of a step: its tokens ids[kv->n_kv] .. ids[kv->n_kv + n - 1]; the logits of the last n_rows of
// them are wanted. The pages are there.
struct engine_share {
    const int32_t *ids;
    const struct kv_seq *kv;
    size_t n, n_rows;
    const tandem_sampling *sampling; // how a device chooses the token behind them; NULL: greedily
};

// Runs one ragged batch. Returns the logits, a row for each that is wanted, in order, valid until the next step; the
// caller says with kv_commit that the tokens are computed. At most max_batch shares, max_step_tokens tokens and
// max_batch rows. The lock is held.
const float *engine_run(tandem_engine *engine, const struct engine_share *shares, size_t n_shares);
// The same without waiting: run_logits and run_choices of engine->run give what came of it.
void engine_queue(tandem_engine *engine, const struct engine_share *shares, size_t n_shares);

// Whether a device can choose tokens so: no biases, no penalties. The rest is ops/sampling.h's.
bool engine_can_choose(const tandem_engine *engine, const tandem_sampling *sampling);

// Whether the logits behind the first n tokens of a sequence can be sampled from. NaN or Inf is an error that names the
// op which made it (tripwire.h); the K and V are still the sequence's, and the caller drops them.
bool engine_check_logits(tandem_engine *engine, const float *logits, const int32_t *ids, const struct kv_seq *kv,
                         size_t n, struct error *err);

// What to say of logits that are known to hold NaN or Inf.
void engine_explain_logits(tandem_engine *engine, const int32_t *ids, const struct kv_seq *kv, size_t n,
                           struct error *err);

// A token to be chosen on the host. Pointers are the caller's, valid during the call.
struct engine_choice {
    const float *logits; // [n_vocab]
    const tandem_sampling *sampling;
    struct sampler_history history;
    const uint32_t *mask; // NULL: none
    bool wants_logprob, wants_hash;
    tandem_token *top; // [n_top] to be filled
    size_t n_top;
    bool is_finite;     // filled; false: nothing was chosen (engine_explain_logits says why)
    tandem_token token; // filled; logprob as wanted, else 0
    uint64_t hash;      // of logits before; these are added, if wanted
};
// Chooses n tokens side by side on the engine's threads. The same bits as one by one. The lock is held.
void engine_choose(tandem_engine *engine, struct engine_choice *choices, size_t n);

// Fills `to` with a copy of `from` whose biases are owned by the caller: free *ids and *bias. Checks every field.
bool engine_copy_sampling(const tandem_engine *engine, const tandem_sampling *from, tandem_sampling *to, int32_t **ids,
                          float **bias, struct error *err);

// ---- Requests (request.c)
bool requests_create(tandem_engine *engine, const tandem_options *options, struct error *err);
void requests_free(tandem_engine *engine);
// Waits for the requests' steps under way and keeps what they chose: others may run steps now.
void requests_settle(tandem_engine *engine);

// Where a sampling value came from, for people.
struct sampling_sources {
    const char *temperature, *top_k, *top_p, *min_p, *repeat_penalty;
};
void sampling_defaults(const tandem_engine *engine, bool thinking, tandem_sampling *out,
                       struct sampling_sources *sources);

// What an engine with these options would take, without opening one (tandem_memory_plan's figures). The model is only
// read. False with what tandem_open would say.
struct engine_plan {
    tandem_memory memory;
    size_t context, max_batch, n_pages;
    enum dtype kv_type;
    char ops[64]; // their name
    // The copy of the weights in the CPU's own order (--repack): its bytes, 0: none; the file that keeps it, empty:
    // memory.
    size_t repacked;
    char repacked_in[512];
};
bool engine_plan(struct model *model, const tandem_options *options, struct engine_plan *out, struct error *err);

bool engine_is_end(const tandem_engine *engine, int32_t id);

// The prompt's ids of a chat document; `between` as template_encode takes it. `err` as everywhere inside.
bool engine_render(const tandem_engine *engine, const struct template_document *doc, struct template_options options,
                   const struct template_stretches *between, struct token_ids *ids, struct error *err);

// Runs all ids of a fresh sequence in one sequence of chunks and hands the logits of every position to the tap (and
// whatever else the tap watches). For traces and teacher forcing. `fusion` as in struct op_ctx.
bool engine_trace(tandem_engine *engine, const int32_t *ids, size_t n, uint32_t fusion, tap_fn *tap, void *user,
                  struct error *err);

#endif
