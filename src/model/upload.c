// upload.c: the copies of a model's weights in a device's memory, and how they get there. It owns no layout: the device
// does.
#include "model/model.h"

#include "base/pool.h"
#include "base/size.h"

#include <stdlib.h>
#include <string.h>

// ---- Copying ------------------------------------------------------------------------------------------------------
// A file's pages are no memory that a device copies fast. So the host's threads copy a few MB at a time into slots of
// such memory, while slots before are on their way; without slots each copy is waited for.

enum {
    SLOTS = DEVICE_MARKS, // a slot is free again when its mark is reached
    SLOT_BYTES = 4 << 20,
    PIECE_BYTES = 256 << 10, // for a thread
};

struct carrier {
    struct device *device;
    struct pool *pool;
    void *slots[SLOTS]; // NULL: there are none
    void *room;         // on the device, for rows as a file has them
    unsigned turn;
};

static bool open_carrier(struct carrier *c, struct device *d, struct pool *pool, size_t room, struct error *err) {
    *c = (struct carrier){.device = d, .pool = pool};
    c->room = d->alloc(d, room < SLOT_BYTES ? room : SLOT_BYTES, "copying weights", err);
    bool has_slots = c->room && pool;
    for (size_t i = 0; i < SLOTS && has_slots; i++) has_slots = (c->slots[i] = d->alloc_host(d, SLOT_BYTES)) != NULL;
    if (!has_slots) c->pool = NULL;
    return c->room;
}

static void close_carrier(struct carrier *c) {
    struct device *d = c->device;
    d->free(d, c->room); // waits for all copies
    for (size_t i = 0; i < SLOTS; i++) d->free_host(d, c->slots[i]);
}

struct piece {
    unsigned char *to;
    const unsigned char *from;
};

static void copy_piece(void *ctx, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct piece *p = ctx;
    memcpy(p->to + begin, p->from + begin, end - begin);
}

// At most SLOT_BYTES.
static void carry(struct carrier *c, void *to, const void *from, size_t bytes) {
    struct device *d = c->device;
    if (!c->pool) {
        d->put(d, to, from, bytes);
        return;
    }
    unsigned turn = c->turn++ % SLOTS;
    d->reach(d, turn);
    pool_for(c->pool, bytes, PIECE_BYTES, copy_piece, &(struct piece){c->slots[turn], from});
    d->send(d, to, c->slots[turn], bytes);
    d->mark(d, turn);
}

static bool carry_matrix(struct carrier *c, struct matrix *out, const struct matrix *w, struct error *err) {
    size_t per_step = SLOT_BYTES / w->row_bytes;
    if (per_step == 0)
        return error_set(err, "tensor %s: rows of %zu bytes cannot be copied to %s; at most %d are expected", w->name,
                         w->row_bytes, c->device->name, SLOT_BYTES);
    if (!c->device->new_matrix(c->device, out, w, err)) return false;
    for (size_t at = 0; at < w->n_out; at += per_step) {
        size_t n = w->n_out - at < per_step ? w->n_out - at : per_step;
        carry(c, c->room, (const unsigned char *)w->data + at * w->row_bytes, n * w->row_bytes);
        c->device->pack_rows(c->device, out, c->room, at, n);
    }
    return true;
}

bool matrix_upload(const struct matrix *w, struct device *device, struct pool *pool, struct matrix *out,
                   struct error *err) {
    struct carrier c;
    *out = (struct matrix){0};
    bool ok = open_carrier(&c, device, pool, w->n_out * w->row_bytes, err) && carry_matrix(&c, out, w, err);
    close_carrier(&c);
    if (ok && device->sync(device, err)) return true;
    device->free(device, (void *)(uintptr_t)out->data);
    *out = (struct matrix){0};
    return false;
}

// ---- All weights --------------------------------------------------------------------------------------------------

// Everything that a device copy of the weights is made of, one after the other.
struct upload {
    const struct model *model;
    struct device_weights *out; // NULL: only count
    struct device *device;
    struct carrier carrier;
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
    return carry_matrix(&u->carrier, out, w, u->err) && own(u, (void *)(uintptr_t)out->data);
}

static bool vector(struct upload *u, const float *v, size_t n, const float **out) {
    if (!v) return true;
    u->bytes += n * sizeof *v;
    if (!u->out) return true;
    void *copy = u->device->alloc(u->device, n * sizeof *v, "weights", u->err);
    if (!own(u, copy)) return false;
    for (size_t at = 0, step = SLOT_BYTES / sizeof *v; at < n; at += step)
        carry(&u->carrier, (float *)copy + at, v + at, (n - at < step ? n - at : step) * sizeof *v);
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

struct device_weights *weights_upload(const struct model *model, struct device *device, struct pool *pool,
                                      const struct log *log, struct error *err) {
    enum { PER_LAYER = 14, OUTSIDE = 3 };
    struct device_weights *w = size_alloc_zero(1, sizeof *w);
    if (!w) goto memory;
    w->device = device;
    w->layers = size_alloc_zero(model->config.n_layers, sizeof *w->layers);
    w->owned = size_alloc_zero(model->config.n_layers * PER_LAYER + OUTSIDE, sizeof *w->owned);
    if (!w->layers || !w->owned) goto memory;
    struct upload u = {.model = model, .out = w, .device = device, .err = err};
    bool ok = open_carrier(&u.carrier, device, pool, SLOT_BYTES, err) && everything(&u, log);
    close_carrier(&u.carrier);
    if (!ok || !device->sync(device, err)) goto err;
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
