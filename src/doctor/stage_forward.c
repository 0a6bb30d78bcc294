// stage_forward.c: runs of a prompt through model_forward, on KV of their own, for the model stage and the diagnosis.
// It judges nothing.
#include "doctor/doctor.h"

#include "base/size.h"

#include <stdlib.h>
#include <string.h>

// One run's memory.
struct forward {
    struct run *run;
    struct kv_store kv;
    int32_t *position, *seq, *rows, *pages; // [n] three times; [n_pages]
};

static bool open_forward(struct forward *f, const struct doctor *d, const struct forward_options *o, size_t n,
                         size_t chunk, bool logits, struct error *err) {
    size_t n_pages = (n + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS, all = o->page_order ? 2 * n_pages + 1 : n_pages;
    struct run_options options = {.ops = o->ops ? o->ops : d->ops,
                                  .pool = o->pool ? o->pool : d->pool,
                                  .fusion = o->fusion,
                                  .max_tokens = chunk,
                                  .max_logit_rows = logits ? chunk : 1,
                                  .max_positions = n};
    options.weights = options.ops->device ? d->weights : NULL;
    f->position = size_alloc(n, sizeof *f->position);
    f->seq = size_alloc_zero(n, sizeof *f->seq);
    f->rows = size_alloc(n, sizeof *f->rows);
    f->pages = size_alloc(all, sizeof *f->pages);
    if (!f->position || !f->seq || !f->rows || !f->pages) return error_set(err, "out of memory for %zu tokens", n);
    for (size_t i = 0; i < n; i++) f->position[i] = f->rows[i] = (int32_t)i;
    doctor_order_pages(f->pages, all, o->page_order);
    if (!kv_store_create_on(options.ops->device, &f->kv, &d->model->config, o->kv_type, all, err)) return false;
    f->run = run_create(d->model, &options, err);
    if (!f->run) return false;
    if (o->poison) {
        doctor_poison(&f->kv, f->kv.memory, f->kv.bytes); // NaN in every type of KV
        run_poison(f->run);
    }
    run_set_tap(f->run, o->tap, o->user);
    return true;
}

static void close_forward(struct forward *f) {
    run_free(f->run);
    kv_store_free(&f->kv);
    free(f->position);
    free(f->seq);
    free(f->rows);
    free(f->pages);
}

bool doctor_forward(const struct doctor *d, const struct forward_options *o, const int32_t *ids, size_t n,
                    float *logits, struct error *err) {
    struct forward f = {0};
    size_t chunk = o->chunk && o->chunk < n ? o->chunk : n, n_vocab = d->model->config.n_vocab;
    bool ok = n > 0 || error_set(err, "the prompt is empty");
    ok = ok && open_forward(&f, d, o, n, chunk, logits != NULL, err);
    for (size_t at = 0; ok && at < n; at += chunk) {
        size_t count = n - at < chunk ? n - at : chunk;
        int32_t seq_start[2] = {0, (int32_t)count}, kv_len = (int32_t)(at + count);
        int32_t page_start[2] = {0, (int32_t)((at + count + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS)};
        struct batch b = {.n_tokens = count,
                          .n_seqs = 1,
                          .n_logit_rows = logits ? count : 0,
                          .token = ids + at,
                          .position = f.position + at,
                          .seq = f.seq,
                          .seq_start = seq_start,
                          .page_start = page_start,
                          .pages = f.pages,
                          .kv_len = &kv_len,
                          .logit_rows = f.rows};
        const float *out = model_forward(d->model, f.run, &f.kv, &b);
        ok = run_error(f.run, err);
        if (ok && logits) memcpy(logits + at * n_vocab, out, count * n_vocab * sizeof *out);
    }
    close_forward(&f);
    return ok;
}
