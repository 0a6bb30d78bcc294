// perplexity.c: `tandem perplexity`: how well a model predicts a text, and how far its predictions are from those of
// another run.
//
// The text is cut into windows of --chunk tokens; in each, the second half is scored and the first is context only, as
// llama.cpp does it, so that figures compare.
#include "cli/cli.h"

#include "base/file.h"
#include "base/size.h"
#include "format/safetensors.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STEP_TOKENS = 128, DEFAULT_WINDOW = 512 };

// What one scored position gave.
struct score {
    double nll, kl, base_nll;
    bool same_top;
};

struct job {
    tandem_engine *engine;
    struct token_ids ids;
    size_t window, n_windows, first,
        n_scored;         // each window's positions first .. window - 2 are scored: n_scored in all
    struct score *scores; // [n_scored]
    struct run *run;
    struct kv_store kv;
    // Saved logits, written or compared with.
    struct file_output save;
    struct tensor_set base;
    const float *base_logits; // [n_scored, n_vocab]; NULL: no comparison
};

// ---- Scores of a step's rows, on all threads

struct rows_job {
    const float *logits, *base; // [n, n_vocab]; base may be NULL
    const int32_t *next;        // [n] the token that came
    size_t n_vocab;
    struct score *scores; // [n]
};

static size_t best_of(const float *x, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

// ln of the sum of exponentials.
static double log_sum(const float *x, size_t n, double most) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += exp((double)x[i] - most);
    return most + log(sum);
}

static void score_rows(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct rows_job *j = user;
    for (size_t r = begin; r < end; r++) {
        const float *q = j->logits + r * j->n_vocab, *p = j->base ? j->base + r * j->n_vocab : NULL;
        size_t q_best = best_of(q, j->n_vocab), next = (size_t)j->next[r];
        double q_sum = log_sum(q, j->n_vocab, (double)q[q_best]);
        struct score *s = &j->scores[r];
        s->nll = q_sum - (double)q[next];
        if (!p) continue;
        size_t p_best = best_of(p, j->n_vocab);
        double p_sum = log_sum(p, j->n_vocab, (double)p[p_best]), kl = 0;
        for (size_t i = 0; i < j->n_vocab; i++) {
            double log_p = (double)p[i] - p_sum;
            kl += exp(log_p) * (log_p - ((double)q[i] - q_sum));
        }
        s->kl = kl > 0 ? kl : 0; // rounding may leave a trace below 0
        s->base_nll = p_sum - (double)p[next];
        s->same_top = p_best == q_best;
    }
}

// ---- Running

// Runs tokens [at, at + n) of a window, whose ids are given, in pages 0, 1, 2, ... Returns the logits of the last
// n_rows.
static const float *run_piece(struct job *j, const int32_t *ids, size_t at, size_t n, size_t n_rows) {
    static int32_t position[STEP_TOKENS], seq[STEP_TOKENS], rows[STEP_TOKENS];
    int32_t seq_start[] = {0, (int32_t)n}, kv_len = (int32_t)(at + n);
    size_t n_pages = (at + n + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    int32_t page_start[] = {0, (int32_t)n_pages}, *pages = size_alloc(n_pages, sizeof *pages);
    if (!pages) return NULL;
    for (size_t i = 0; i < n_pages; i++) pages[i] = (int32_t)i;
    for (size_t i = 0; i < n; i++) {
        position[i] = (int32_t)(at + i);
        seq[i] = 0;
    }
    for (size_t i = 0; i < n_rows; i++) rows[i] = (int32_t)(n - n_rows + i);
    struct batch b = {.n_tokens = n,
                      .n_seqs = 1,
                      .n_logit_rows = n_rows,
                      .token = ids + at,
                      .position = position,
                      .seq = seq,
                      .seq_start = seq_start,
                      .page_start = page_start,
                      .pages = pages,
                      .kv_len = &kv_len,
                      .logit_rows = rows};
    const float *logits = model_forward(j->engine->model, j->run, &j->kv, &b);
    free(pages);
    return logits;
}

static bool run_window(struct job *j, size_t w) {
    size_t n_vocab = j->engine->model->config.n_vocab, scored = j->window - 1 - j->first;
    int32_t bos = j->engine->tokenizer ? tokenizer_bos(j->engine->tokenizer) : -1;
    int32_t *ids = size_alloc(j->window, sizeof *ids);
    if (!ids) return cli_fail("out of memory") == 0;
    memcpy(ids, j->ids.ids + w * j->window, j->window * sizeof *ids);
    if (j->engine->tokenizer && tokenizer_adds_bos(j->engine->tokenizer) && bos >= 0) ids[0] = bos;
    bool ok = true;
    for (size_t at = 0; ok && at + 1 < j->window; at += STEP_TOKENS) {
        size_t n = j->window - 1 - at < STEP_TOKENS ? j->window - 1 - at : STEP_TOKENS;
        size_t first = at > j->first ? at : j->first, n_rows = at + n > first ? at + n - first : 0;
        const float *logits = run_piece(j, ids, at, n, n_rows);
        if (!logits) ok = cli_fail("out of memory") == 0;
        if (!logits || n_rows == 0) continue;
        if (!logits_finite(logits, n_rows * n_vocab)) {
            ok = cli_fail("the logits of window %zu hold NaN or Inf: `tandem check` finds out why", w + 1) == 0;
            break;
        }
        size_t row = w * scored + (first - j->first);
        struct rows_job rows = {.logits = logits,
                                .base = j->base_logits ? j->base_logits + row * n_vocab : NULL,
                                .next = ids + first + 1,
                                .n_vocab = n_vocab,
                                .scores = j->scores + row};
        pool_for(j->engine->pool, n_rows, 1, score_rows, &rows);
        struct error err = {0};
        if (j->save.open && !file_output_write(&j->save, logits, n_rows * n_vocab * sizeof *logits, &err))
            ok = cli_fail("%s", err.text) == 0;
    }
    free(ids);
    return ok;
}

// ---- Saved logits: a safetensors file of tokens [n_windows, window] and logits [n_scored, n_vocab], f32

static bool begin_save(struct job *j, const char *path) {
    size_t tokens = j->n_windows * j->window * sizeof(int32_t), n_vocab = j->engine->model->config.n_vocab;
    size_t logits = j->n_scored * n_vocab * sizeof(float);
    struct buffer head = {0};
    bool ok = buffer_printf(&head,
                            "{\"tokens\":{\"dtype\":\"I32\",\"shape\":[%zu,%zu],\"data_offsets\":[0,%zu]},"
                            "\"logits\":{\"dtype\":\"F32\",\"shape\":[%zu,%zu],\"data_offsets\":[%zu,%zu]}}",
                            j->n_windows, j->window, tokens, j->n_scored, n_vocab, tokens, tokens + logits);
    while (ok && head.len % 8 != 0) ok = buffer_append_byte(&head, ' ');
    unsigned char size[8];
    for (int i = 0; i < 8; i++) size[i] = (unsigned char)((uint64_t)head.len >> 8 * i);
    struct error err = {0};
    if (!ok) error_set(&err, "out of memory");
    ok = ok && file_output_open(&j->save, path, &err) && file_output_write(&j->save, size, sizeof size, &err) &&
         file_output_write(&j->save, head.data, head.len, &err) &&
         file_output_write(&j->save, j->ids.ids, tokens, &err);
    buffer_free(&head);
    if (!ok) return cli_fail("%s", err.text) == 0;
    fprintf(stderr, "tandem: perplexity: saving %.1f MB of logits\n", (double)(tokens + logits) / 1e6);
    return true;
}

static bool end_save(struct job *j) {
    struct error err = {0};
    return file_output_finish(&j->save, &err) || cli_fail("%s", err.text) == 0;
}

// Opens saved logits; the window is the file's.
static bool open_base(struct job *j, const char *path, size_t *window) {
    struct error err = {0};
    if (!safetensors_open(path, &j->base, &err)) return cli_fail("%s", err.text) == 0;
    const struct tensor *tokens = tensor_find(&j->base, "tokens"), *logits = tensor_find(&j->base, "logits");
    size_t n_vocab = j->engine->model->config.n_vocab;
    if (!tokens || !logits || tokens->type != DTYPE_I32 || tokens->rank != 2 || logits->type != DTYPE_F32 ||
        logits->rank != 2 || (uintptr_t)logits->data % sizeof(float) != 0)
        return cli_fail("%s: expected a file that `tandem perplexity --save-logits` wrote", path) == 0;
    if (logits->shape[1] != n_vocab)
        return cli_fail("%s: its logits are those of %zu tokens, the model has %zu", path, logits->shape[1], n_vocab) ==
               0;
    if (*window && *window != tokens->shape[1])
        return cli_fail("%s: its windows have %zu tokens, --chunk says %zu", path, tokens->shape[1], *window) == 0;
    *window = tokens->shape[1];
    return true;
}

static bool match_base(struct job *j, const char *path) {
    const struct tensor *tokens = tensor_find(&j->base, "tokens"), *logits = tensor_find(&j->base, "logits");
    if (tokens->shape[0] != j->n_windows || logits->shape[0] != j->n_scored ||
        memcmp(tokens->data, j->ids.ids, tokens->n_bytes) != 0)
        return cli_fail("%s: it was saved for another text, or with another tokenizer", path) == 0;
    j->base_logits = logits->data;
    return true;
}

// ---- Telling

static int by_value(const void *x, const void *y) {
    double a = *(const double *)x, b = *(const double *)y;
    return (a > b) - (a < b);
}

// Mean of n values and its standard error.
static void mean_of(const double *v, size_t n, double *mean, double *error) {
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++) sum += v[i];
    *mean = sum / (double)n;
    for (size_t i = 0; i < n; i++) squares += (v[i] - *mean) * (v[i] - *mean);
    *error = n > 1 ? sqrt(squares / (double)(n - 1) / (double)n) : 0;
}

// The value below which a share of the sorted values lies.
static double quantile(const double *sorted, size_t n, double share) {
    size_t i = (size_t)ceil(share * (double)n);
    return sorted[i > 0 ? i - 1 : 0];
}

static json_t *kl_json(struct job *j, double *v, double nll) {
    double mean, error, base, base_error;
    size_t n = j->n_scored, same = 0;
    for (size_t i = 0; i < n; i++) v[i] = j->scores[i].base_nll;
    mean_of(v, n, &base, &base_error);
    for (size_t i = 0; i < n; i++) {
        v[i] = j->scores[i].kl;
        same += j->scores[i].same_top;
    }
    mean_of(v, n, &mean, &error);
    qsort(v, n, sizeof *v, by_value);
    double top = (double)same / (double)n;
    return json_pack("{s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f}", "mean", mean, "standard_error", error, "median",
                     quantile(v, n, 0.5), "p99", quantile(v, n, 0.99), "p99_9", quantile(v, n, 0.999), "max", v[n - 1],
                     "top1_agreement", top, "top1_standard_error", sqrt(top * (1 - top) / (double)n), "base_perplexity",
                     exp(base), "perplexity_ratio", exp(nll - base));
}

static double number(const json_t *o, const char *key) {
    return json_number_value(json_object_get(o, key));
}

static int tell(const struct cli_options *o, struct job *j) {
    double *v = size_alloc(j->n_scored, sizeof *v), nll, error;
    if (!v) return cli_fail("out of memory");
    for (size_t i = 0; i < j->n_scored; i++) v[i] = j->scores[i].nll;
    mean_of(v, j->n_scored, &nll, &error);
    json_t *kl = j->base_logits ? kl_json(j, v, nll) : NULL;
    free(v);
    if (o->given[OPT_JSON]) {
        json_t *out =
            json_pack("{s:s,s:I,s:I,s:I,s:I,s:f,s:f,s:f,s:f,s:s}", "model", cli_model(o), "tokens",
                      (json_int_t)j->ids.n, "windows", (json_int_t)j->n_windows, "chunk", (json_int_t)j->window,
                      "scored", (json_int_t)j->n_scored, "nll", nll, "nll_standard_error", error, "perplexity",
                      exp(nll), "perplexity_standard_error", exp(nll) * error, "device", j->engine->ops->name);
        if (kl) json_object_set(out, "kl", kl);
        json_decref(kl);
        return cli_print_json(out) ? EXIT_GOOD : EXIT_FAULT;
    }
    printf("scored      %zu tokens: the second halves of %zu windows of %zu\n", j->n_scored, j->n_windows, j->window);
    printf("NLL         %.6f +- %.6f\n", nll, error);
    printf("perplexity  %.4f +- %.4f\n", exp(nll), exp(nll) * error);
    if (kl) {
        printf("base        perplexity %.4f, this one's is %.6f times that\n", number(kl, "base_perplexity"),
               number(kl, "perplexity_ratio"));
        printf("KL          mean %.3g +- %.2g, median %.3g, p99 %.3g, p99.9 %.3g, max %.3g\n", number(kl, "mean"),
               number(kl, "standard_error"), number(kl, "median"), number(kl, "p99"), number(kl, "p99_9"),
               number(kl, "max"));
        printf("top-1       the same in %.3f%% +- %.3f%%\n", 100 * number(kl, "top1_agreement"),
               100 * number(kl, "top1_standard_error"));
    }
    json_decref(kl);
    return cli_flush() ? EXIT_GOOD : EXIT_FAULT;
}

// ---- The command

static bool read_text(const struct cli_options *o, struct job *j) {
    struct buffer text = {0};
    struct error err = {0};
    bool ok = cli_read(o->text[OPT_TEXT_FILE], &text);
    if (ok && !j->engine->tokenizer) ok = cli_fail("the model has no tokenizer: %s", j->engine->tokenizer_error) == 0;
    if (ok && !tokenizer_encode(j->engine->tokenizer, buffer_text(&text), text.len, false, &j->ids, &err))
        ok = cli_fail("%s", err.text) == 0;
    buffer_free(&text);
    return ok;
}

static bool plan(struct job *j, size_t window) {
    size_t context = j->engine->model->config.context;
    struct error err = {0};
    if (window == 0) window = context < DEFAULT_WINDOW ? context : DEFAULT_WINDOW;
    if (window > context) return cli_fail("--chunk: the model has %zu positions, found %zu", context, window) == 0;
    if (j->ids.n < window) window = j->ids.n; // a short text is one window
    if (window < 4) return cli_fail("the text has %zu tokens: expected at least 4", j->ids.n) == 0;
    j->window = window;
    j->n_windows = j->ids.n / window;
    j->first = window / 2;
    j->n_scored = j->n_windows * (window - 1 - j->first);
    j->scores = size_alloc_zero(j->n_scored, sizeof *j->scores);
    struct run_options run = {.ops = j->engine->ops,
                              .pool = j->engine->pool,
                              .fusion = j->engine->fusion,
                              .max_tokens = STEP_TOKENS,
                              .max_logit_rows = STEP_TOKENS,
                              .max_positions = window,
                              .weights = j->engine->weights};
    if (!j->scores) return cli_fail("out of memory") == 0;
    if (!kv_store_create_on(j->engine->ops->device, &j->kv, &j->engine->model->config, j->engine->kv_type,
                            (window + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS, &err) ||
        !(j->run = run_create(j->engine->model, &run, &err)))
        return cli_fail("%s", err.text) == 0;
    return true;
}

static int measure(const struct cli_options *o, struct job *j) {
    size_t window = 0;
    const char *save = o->text[OPT_SAVE_LOGITS], *base = o->text[OPT_KLD];
    struct cli_bar bar = {0};
    struct log log = cli_log(&bar);
    if (!cli_size(o, OPT_CHUNK, 4, (size_t)1 << 24, &window)) return EXIT_USAGE;
    if ((base && !open_base(j, base, &window)) || !read_text(o, j) || !plan(j, window) ||
        (base && !match_base(j, base)) || (save && !begin_save(j, save)))
        return EXIT_FAULT;
    for (size_t w = 0; w < j->n_windows; w++) {
        if (!run_window(j, w)) return EXIT_FAULT;
        log_progress(&log, "reading", w + 1, j->n_windows);
    }
    if (save && !end_save(j)) return EXIT_FAULT;
    return tell(o, j);
}

static int run(const struct cli_options *o) {
    struct job j = {0};
    if (!o->given[OPT_TEXT_FILE]) return cli_usage("expected -f FILE: the text (- is standard input)");
    if (o->given[OPT_SAVE_LOGITS] && o->given[OPT_KLD]) return cli_usage("expected one of --save-logits and --kld");
    j.engine = cli_open_as(o, &(tandem_options){.context = 32});
    if (!j.engine) return EXIT_FAULT;
    int status = measure(o, &j);
    file_output_close(&j.save);
    run_free(j.run);
    kv_store_free(&j.kv);
    tensor_set_free(&j.base);
    token_ids_free(&j.ids);
    free(j.scores);
    tandem_close(j.engine);
    return status;
}

static const enum option_id options[] = {OPT_TEXT_FILE, OPT_CHUNK,   OPT_SAVE_LOGITS, OPT_KLD,
                                         OPT_JSON,      OPT_THREADS, OPT_DEVICE,      OPT_ISA,
                                         OPT_FUSION,    OPT_KV_TYPE, OPT_REPACK,      OPT_HELP};

const struct command command_perplexity = {
    .name = "perplexity",
    .summary = "how well a model predicts a text, and its distance from another run",
    .usage = "[MODEL] -f FILE [--chunk N] [--save-logits FILE | --kld FILE] [--json]",
    .details =
        "The text is cut into windows of --chunk tokens (default 512); the second half of each is scored, the first "
        "is\n"
        "its context, as in llama.cpp. What is left over at the end is not used. Special tokens in the text are plain\n"
        "text.\n\n"
        "--save-logits writes the logits of every scored token (4 bytes for each entry of the vocabulary); --kld\n"
        "compares with such a file: the Kullback-Leibler divergence of this run from that one, in nats a token.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
