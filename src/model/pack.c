// pack.c: the copy of a model's quantised matrices in the order in which the CPU multiplies them (format/octets.h). It
// owns that copy's memory; the file's own rows stay where they are, for whoever reads single rows.
#include "base/memory.h"
#include "base/size.h"
#include "format/octets.h"
#include "model/model.h"

#include <stdlib.h>

enum { ALIGNMENT = 64, MATRICES_OF_LAYER = 7, ROWS_AT_A_TIME = 64 };

struct packed {
    struct matrix **matrices; // [n]
    size_t *at;               // [n] where each one's octets begin
    size_t n, bytes;
};

static size_t octets_bytes(const struct matrix *m) {
    return m->n_out / OCTET_ROWS * OCTET_ROWS * m->row_bytes;
}

static bool add_matrix(struct packed *p, struct matrix *m) {
    if (!octets_known(m->type) || m->n_out < OCTET_ROWS) return true;
    p->matrices[p->n] = m;
    p->at[p->n++] = p->bytes;
    size_t bytes = (octets_bytes(m) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return size_add(p->bytes, bytes, &p->bytes);
}

// Every matrix that a step multiplies with. False: out of memory.
static bool collect(struct packed *p, struct model *m) {
    size_t most = m->config.n_layers * MATRICES_OF_LAYER + 1;
    p->matrices = size_alloc(most, sizeof(struct matrix *));
    p->at = size_alloc(most, sizeof *p->at);
    bool ok = p->matrices && p->at && add_matrix(p, &m->head);
    for (size_t i = 0; ok && i < m->config.n_layers; i++) {
        struct layer_weights *w = &m->layers[i];
        struct matrix *all[MATRICES_OF_LAYER] = {&w->wq, &w->wk, &w->wv, &w->wo, &w->w_gate, &w->w_up, &w->w_down};
        for (size_t k = 0; ok && k < MATRICES_OF_LAYER; k++) ok = add_matrix(p, all[k]);
    }
    return ok;
}

struct pack_job {
    const struct matrix *m;
    unsigned char *to;
};

static void pack_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct pack_job *j = user;
    const size_t stride = OCTET_ROWS * j->m->row_bytes;
    for (size_t i = begin; i < end; i++)
        octets_pack(j->m->type, j->to + i * stride, (const unsigned char *)j->m->data + i * stride, j->m->row_bytes);
}

// The file's rows leave the memory once they are packed: at no time are two copies of the model resident.
static void forget_rows(const struct model *m, const struct matrix *w) {
    const struct tensor_set *files = m->kind == MODEL_GGUF ? &m->gguf.tensors : &m->files;
    for (size_t i = 0; m->kind != MODEL_SYNTHETIC && i < files->n_maps; i++)
        file_map_forget(&files->maps[i], w->data, w->n_out * w->row_bytes);
}

static void pack_all(const struct model *m, const struct packed *p, unsigned char *memory,
                     const struct pack_options *o) {
    for (size_t i = 0; i < p->n; i++) {
        struct pack_job j = {.m = p->matrices[i], .to = memory + p->at[i]};
        pool_for(o->pool, j.m->n_out / OCTET_ROWS, ROWS_AT_A_TIME / OCTET_ROWS, pack_piece, &j);
        forget_rows(m, j.m);
        log_progress(o->log, "repacking", i + 1, p->n);
    }
}

// Some memory must stay for what comes after the weights.
static bool fits_memory(size_t bytes) {
    const size_t available = memory_available(), margin = (size_t)256 << 20;
    return available > margin && available - margin >= bytes + bytes / 16;
}

bool model_pack(struct model *m, const struct pack_options *o) {
    struct packed p = {0};
    unsigned char *memory = NULL;
    struct error err = {0};
    bool ok = false;
    if (m->packed.data) return true;
    if (!collect(&p, m)) {
        error_set(&err, "out of memory");
        goto done;
    }
    ok = p.n == 0;
    if (ok) goto done;
    if (!fits_memory(p.bytes)) {
        error_set(&err, "%zu MB of free memory are wanted, %zu MB are there", p.bytes / 1000000,
                  memory_available() / 1000000);
        goto done;
    }
    ok = file_map_memory(&m->packed, p.bytes, &memory, &err);
    if (!ok) goto done;
    pack_all(m, &p, memory, o);
    for (size_t i = 0; i < p.n; i++) p.matrices[i]->octets = memory + p.at[i];
done:
    if (!ok) log_info(o->log, "weights are multiplied as the file has them, which is slower: %s", err.text);
    free(p.matrices);
    free(p.at);
    return ok;
}
