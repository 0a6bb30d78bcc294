// upload.c: the copies of a model's weights in a device's memory. It owns no layout: the device does.
#include "model/model.h"

#include "base/size.h"

#include <stdlib.h>

// Everything that a device copy of the weights is made of, one after the other.
struct upload {
    const struct model *model;
    struct device_weights *out; // NULL: only count
    struct device *device;
    struct error *err;
    size_t bytes;
};

static bool own(struct upload *u, void *memory) {
    if (!memory) return false;
    u->out->owned[u->out->n_owned++] = memory;
    return true;
}

static bool matrix(struct upload *u, const struct matrix *w, struct matrix *out) {
    size_t n = u->device->matrix_bytes(u->device, w);
    if (n == 0)
        return error_set(u->err,
                         "%s cannot multiply tensor %s [%zu, %zu]: its type is %s; a quantised type (tandem quantize "
                         "makes one), or BF16 with rows of a multiple of 4, is expected",
                         u->device->name, w->name, w->n_out, w->n_in, dtype_info(w->type)->name);
    if (!size_add(u->bytes, n, &u->bytes)) return error_set(u->err, "tensor %s is too large", w->name);
    if (!u->out) return true;
    return u->device->put_matrix(u->device, out, w, u->err) && own(u, (void *)(uintptr_t)out->data);
}

static bool vector(struct upload *u, const float *v, size_t n, const float **out) {
    if (!v) return true;
    u->bytes += n * sizeof *v;
    if (!u->out) return true;
    void *copy = u->device->alloc(u->device, n * sizeof *v, "weights", u->err);
    if (!own(u, copy)) return false;
    u->device->put(u->device, copy, v, n * sizeof *v);
    *out = copy;
    return true;
}

static bool layer(struct upload *u, const struct layer_weights *w, struct layer_weights *out) {
    const struct model_config *c = &u->model->config;
    size_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    return vector(u, w->attn_norm, c->hidden, &out->attn_norm) && vector(u, w->mlp_norm, c->hidden, &out->mlp_norm) &&
           vector(u, w->bq, q, &out->bq) && vector(u, w->bk, kv, &out->bk) && vector(u, w->bv, kv, &out->bv) &&
           vector(u, w->q_norm, c->head_dim, &out->q_norm) && vector(u, w->k_norm, c->head_dim, &out->k_norm) &&
           matrix(u, &w->wq, &out->wq) && matrix(u, &w->wk, &out->wk) && matrix(u, &w->wv, &out->wv) &&
           matrix(u, &w->wo, &out->wo) && matrix(u, &w->w_gate, &out->w_gate) && matrix(u, &w->w_up, &out->w_up) &&
           matrix(u, &w->w_down, &out->w_down);
}

static bool everything(struct upload *u, const struct log *log) {
    const struct model *m = u->model;
    struct device_weights none = {0}, *out = u->out ? u->out : &none;
    struct layer_weights skipped;
    if (!matrix(u, &m->embed, &out->embed) || !vector(u, m->final_norm, m->config.hidden, &out->final_norm))
        return false;
    if (m->head.data == m->embed.data) out->head = out->embed;
    else if (!matrix(u, &m->head, &out->head)) return false;
    for (size_t i = 0; i < m->config.n_layers; i++) {
        log_progress(log, "copying weights to the device", i, m->config.n_layers);
        if (!layer(u, &m->layers[i], u->out ? &out->layers[i] : &skipped)) return false;
    }
    log_progress(log, "copying weights to the device", m->config.n_layers, m->config.n_layers);
    return true;
}

bool model_runs_on(const struct model *m, struct device *d, struct error *err) {
    const struct model_config *c = &m->config;
    return d->can_run(d, c->n_heads, c->n_kv_heads, c->head_dim, err) && weights_device_bytes(m, d, err) > 0;
}

size_t weights_device_bytes(const struct model *model, struct device *device, struct error *err) {
    struct upload u = {.model = model, .device = device, .err = err};
    return everything(&u, NULL) ? u.bytes : 0;
}

struct device_weights *weights_upload(const struct model *model, struct device *device, const struct log *log,
                                      struct error *err) {
    enum { PER_LAYER = 14, OUTSIDE = 3 };
    struct device_weights *w = size_alloc_zero(1, sizeof *w);
    if (!w) goto memory;
    w->device = device;
    w->layers = size_alloc_zero(model->config.n_layers, sizeof *w->layers);
    w->owned = size_alloc_zero(model->config.n_layers * PER_LAYER + OUTSIDE, sizeof *w->owned);
    if (!w->layers || !w->owned) goto memory;
    struct upload u = {.model = model, .out = w, .device = device, .err = err};
    if (!everything(&u, log) || !device->sync(device, err)) goto err;
    w->bytes = u.bytes;
    return w;
memory:
    error_set(err, "out of memory for %zu layers", model->config.n_layers);
err:
    weights_free(w);
    return NULL;
}

void weights_free(struct device_weights *w) {
    if (!w) return;
    for (size_t i = 0; i < w->n_owned; i++) w->device->free(w->device, w->owned[i]);
    free(w->owned);
    free(w->layers);
    free(w);
}
