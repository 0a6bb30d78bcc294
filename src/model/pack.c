// pack.c: the copy of a model's quantised and BF16 matrices in the order in which the CPU multiplies them
// (format/octets.h). It owns that copy's memory; the file's own rows stay where they are, for whoever reads single
// rows. What the cache's file looks like is pack_cache.c's.
#include "model/pack.h"
#include "base/file_cache.h"
#include "base/memory.h"
#include "base/size.h"
#include "format/octets.h"

#include <stdlib.h>

enum { ALIGNMENT = 64, MATRICES_OF_LAYER = 7, ROWS_AT_A_TIME = 64, FORGET_BYTES = 16 << 20 };

static size_t octets_bytes(const struct matrix *m) {
    return m->n_out / OCTET_ROWS * OCTET_ROWS * m->row_bytes;
}

static bool add_matrix(struct packed *p, struct matrix *m, bool bf16) {
    if (!octets_fit(m->type, m->row_bytes) || m->n_out < OCTET_ROWS || (m->type == DTYPE_BF16 && !bf16)) return true;
    p->matrices[p->n] = m;
    p->at[p->n++] = p->bytes;
    size_t bytes = (octets_bytes(m) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return size_add(p->bytes, bytes, &p->bytes);
}

// Every matrix that a step multiplies with; bf16: of that type, too. False: out of memory.
static bool collect(struct packed *p, struct model *m, bool bf16) {
    size_t most = m->config.n_layers * MATRICES_OF_LAYER + 1;
    p->matrices = size_alloc(most, sizeof(struct matrix *));
    p->at = size_alloc(most, sizeof *p->at);
    bool ok = p->matrices && p->at && add_matrix(p, &m->head, bf16);
    for (size_t i = 0; ok && i < m->config.n_layers; i++) {
        struct layer_weights *w = &m->layers[i];
        struct matrix *all[MATRICES_OF_LAYER] = {&w->wq, &w->wk, &w->wv, &w->wo, &w->w_gate, &w->w_up, &w->w_down};
        for (size_t k = 0; ok && k < MATRICES_OF_LAYER; k++) ok = add_matrix(p, all[k], bf16);
    }
    return ok;
}

struct pack_job {
    const struct matrix *m;
    unsigned char *to;
    size_t first; // octet
};

static void pack_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct pack_job *j = user;
    const size_t stride = OCTET_ROWS * j->m->row_bytes;
    for (size_t i = j->first + begin; i < j->first + end; i++)
        octets_pack(j->m->type, j->to + i * stride, (const unsigned char *)j->m->data + i * stride, j->m->row_bytes);
}

// The file's rows leave the memory once they are packed: at no time are two copies of the model resident.
static void forget(const struct model *m, const void *rows, size_t bytes) {
    const struct tensor_set *files = m->kind == MODEL_GGUF ? &m->gguf.tensors : &m->files;
    for (size_t i = 0; m->kind != MODEL_SYNTHETIC && i < files->n_maps; i++)
        file_map_forget(&files->maps[i], rows, bytes);
}

static void pack_matrix(const struct model *m, const struct matrix *w, unsigned char *to, struct pool *pool) {
    const size_t octet = OCTET_ROWS * w->row_bytes, n = w->n_out / OCTET_ROWS, most = FORGET_BYTES / octet + 1;
    for (size_t first = 0; first < n; first += most) {
        struct pack_job j = {.m = w, .to = to, .first = first};
        const size_t here = n - first < most ? n - first : most;
        pool_for(pool, here, ROWS_AT_A_TIME / OCTET_ROWS, pack_piece, &j);
        forget(m, (const unsigned char *)w->data + first * octet, here * octet);
    }
}

static void pack_all(const struct model *m, const struct packed *p, unsigned char *memory,
                     const struct pack_options *o) {
    for (size_t i = 0; i < p->n; i++) {
        pack_matrix(m, p->matrices[i], memory + p->at[i], o->pool);
        log_progress(o->log, "repacking", i + 1, p->n);
    }
}

// Some memory must stay for what comes after the weights.
static bool fits_memory(size_t bytes) {
    const size_t available = memory_available(), margin = (size_t)256 << 20;
    return available > margin && available - margin >= bytes + bytes / 16;
}

static void free_packed(struct packed *p) {
    free(p->matrices);
    free(p->at);
    *p = (struct packed){0};
}

static void use(const struct packed *p, const unsigned char *octets) {
    for (size_t i = 0; i < p->n; i++) p->matrices[i]->octets = octets + p->at[i];
}

bool model_pack_cached(struct model *m, const struct pack_options *o) {
    struct packed p = {0};
    struct pack_cache cache = {0};
    struct error why = {0};
    bool ok = !m->packed.data && collect(&p, m, true) && pack_cache_find(&cache, m, &p, o) &&
              pack_cache_open(&cache, &p, o->pool, &m->packed, &why);
    if (ok) use(&p, m->packed.data + PACK_HEADER);
    else if (why.text[0]) log_info(o->log, "repacked weights are made anew: %s", why.text);
    pack_cache_free(&cache);
    free_packed(&p);
    return ok;
}

bool model_pack_place(struct model *m, const struct pack_options *o, struct buffer *path, size_t *bytes) {
    struct packed p = {0};
    struct pack_cache cache = {0};
    bool ok = collect(&p, m, true);
    if (ok && !pack_cache_find(&cache, m, &p, o) && !o->bf16_in_memory) {
        free_packed(&p);
        ok = collect(&p, m, false);
    }
    *bytes = p.bytes;
    *path = cache.path;
    cache.path = (struct buffer){0};
    pack_cache_free(&cache);
    free_packed(&p);
    return ok;
}

// Into the cache's file. False: `why` it cannot be, and nothing is done.
static bool pack_file(struct model *m, const struct packed *p, const struct pack_cache *cache,
                      const struct pack_options *o, struct error *why) {
    struct file_cache file;
    if (!file_cache_begin(&file, cache->path.data, PACK_HEADER + p->bytes, why)) return false;
    pack_all(m, p, file.data + PACK_HEADER, o);
    bool ok = pack_cache_seal(cache, p, o->pool, file.data, why);
    if (!ok) file_cache_abandon(&file);
    return ok && file_cache_publish(&file, why) && pack_cache_open(cache, p, o->pool, &m->packed, why);
}

static bool pack_memory(struct model *m, const struct packed *p, const struct pack_options *o, struct error *why) {
    unsigned char *memory = NULL;
    if (!fits_memory(p->bytes))
        return error_set(why, "%zu MB of free memory are wanted, %zu MB are there", p->bytes / 1000000,
                         memory_available() / 1000000);
    if (!file_map_memory(&m->packed, p->bytes, &memory, why)) return false;
    pack_all(m, p, memory, o);
    return true;
}

bool model_pack(struct model *m, const struct pack_options *o) {
    struct packed p = {0};
    struct pack_cache cache = {0};
    struct error why = {0};
    bool ok = m->packed.data != NULL, in_file = false;
    if (ok) return true;
    ok = collect(&p, m, true) || error_set(&why, "out of memory");
    if (ok && p.n > 0) {
        in_file = pack_cache_find(&cache, m, &p, o) && pack_file(m, &p, &cache, o, &why);
        if (!in_file && why.text[0]) log_info(o->log, "repacked weights are not kept: %s", why.text);
        if (!in_file && !o->bf16_in_memory) {
            free_packed(&p);
            ok = collect(&p, m, false) || error_set(&why, "out of memory");
        }
        ok = ok && (in_file || p.n == 0 || pack_memory(m, &p, o, &why));
        if (ok && p.n > 0) use(&p, m->packed.data + (in_file ? PACK_HEADER : 0));
    }
    if (!ok) log_info(o->log, "weights are multiplied as the file has them, which is slower: %s", why.text);
    pack_cache_free(&cache);
    free_packed(&p);
    return ok;
}
