// pack_cache.c: the file that keeps a model's octets from one start to the next. It owns the file's header and its
// checks; pack.c makes the octets.
//
// The header is text: a magic line, the key, and SHA-256 of the sums of the octets and of the header before it. The key
// names the model's file by device, inode, size and both its times (a change of the file changes one of them), and
// holds a digest of the matrices' names, types, shapes and places, and of 4 KiB of each. The octets' sums are 16 words
// of 64 bits for every 4 MiB: fast enough to be checked at every start, and no damaged word leaves them as they were.
#include "model/pack.h"

#include "base/digest.h"
#include "base/size.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { CHUNK = 4 << 20, LANES = 8, SAMPLE = 4096 };

static bool digest_plan(const struct packed *p, struct digest *out) {
    struct digest_stream *s = digest_stream_sha256(NULL);
    bool ok = s != NULL;
    for (size_t i = 0; ok && i < p->n; i++) {
        const struct matrix *m = p->matrices[i];
        char line[512];
        int n = snprintf(line, sizeof line, "%.300s %s %zu %zu %zu\n", m->name, dtype_info(m->type)->name, m->n_out,
                         m->n_in, p->at[i]);
        size_t bytes = m->n_out * m->row_bytes;
        ok = digest_stream_add(s, line, (size_t)n, NULL) &&
             digest_stream_add(s, m->data, bytes < SAMPLE ? bytes : SAMPLE, NULL);
    }
    ok = ok && digest_stream_end(s, out, NULL);
    digest_stream_free(s);
    return ok;
}

bool pack_cache_find(struct pack_cache *c, const struct model *m, const struct packed *p,
                     const struct pack_options *o) {
    struct stat st;
    struct digest plan, name;
    *c = (struct pack_cache){0};
    if (!o->cache || m->kind != MODEL_GGUF || p->n == 0 || p->bytes < o->cache_least) return false;
    char *real = realpath(m->path, NULL);
    bool ok = real && stat(real, &st) == 0 && digest_plan(p, &plan) && digest_bytes(real, strlen(real), &name, NULL);
    if (ok) {
        const char *base = strrchr(real, '/') ? strrchr(real, '/') + 1 : real;
        int n = snprintf((char *)c->key, sizeof c->key,
                         "tandem octets 1\nfile %ju %ju %jd %jd.%09ld %jd.%09ld\nmatrices %s\nbytes %zu\n",
                         (uintmax_t)st.st_dev, (uintmax_t)st.st_ino, (intmax_t)st.st_size, (intmax_t)st.st_mtim.tv_sec,
                         st.st_mtim.tv_nsec, (intmax_t)st.st_ctim.tv_sec, st.st_ctim.tv_nsec, plan.hex, p->bytes);
        c->key_bytes = (size_t)n;
        ok = buffer_printf(&c->path, "%s/octets/%.120s-%.16s", o->cache, base, name.hex);
    }
    free(real);
    if (!ok) pack_cache_free(c);
    return ok;
}

void pack_cache_free(struct pack_cache *c) {
    buffer_free(&c->path);
    *c = (struct pack_cache){0};
}

// ---- Sums

struct sum_job {
    const unsigned char *data;
    size_t bytes;
    uint64_t (*sums)[2 * LANES];
};

static void sum_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    const struct sum_job *j = user;
    for (size_t i = begin; i < end; i++) {
        uint64_t plain[LANES] = {0}, weighted[LANES] = {0}, v[LANES];
        const unsigned char *at = j->data + i * CHUNK;
        size_t left = j->bytes - i * CHUNK < CHUNK ? j->bytes - i * CHUNK : CHUNK; // a multiple of 64
        for (size_t k = 0; k + sizeof v <= left; k += sizeof v) {
            memcpy(v, at + k, sizeof v);
            for (size_t l = 0; l < LANES; l++) plain[l] += v[l];
            for (size_t l = 0; l < LANES; l++) weighted[l] += plain[l];
        }
        memcpy(j->sums[i], plain, sizeof plain);
        memcpy(j->sums[i] + LANES, weighted, sizeof weighted);
    }
}

static bool digest_octets(const unsigned char *data, size_t bytes, struct pool *pool, struct digest *out,
                          struct error *err) {
    size_t n = (bytes + CHUNK - 1) / CHUNK;
    struct sum_job j = {.data = data, .bytes = bytes, .sums = size_alloc(n, sizeof *j.sums)};
    if (!j.sums) return error_set(err, "out of memory");
    pool_for(pool, n, 1, sum_piece, &j);
    bool ok = digest_bytes(j.sums, n * sizeof *j.sums, out, err);
    free(j.sums);
    return ok;
}

// The header of a file with these octets: the rest of it is zero.
static bool make_header(const struct pack_cache *c, const struct packed *p, struct pool *pool,
                        const unsigned char *octets, unsigned char *header, struct error *err) {
    struct digest sums, own;
    memset(header, 0, PACK_HEADER);
    if (!digest_octets(octets, p->bytes, pool, &sums, err)) return false;
    int n = snprintf((char *)header, PACK_HEADER, "%.*sdata %s\n", (int)c->key_bytes, (const char *)c->key, sums.hex);
    if (!digest_bytes(header, (size_t)n, &own, err)) return false;
    snprintf((char *)header + n, PACK_HEADER - (size_t)n, "header %s\n", own.hex);
    return true;
}

bool pack_cache_seal(const struct pack_cache *c, const struct packed *p, struct pool *pool, unsigned char *file,
                     struct error *err) {
    return make_header(c, p, pool, file + PACK_HEADER, file, err);
}

bool pack_cache_open(const struct pack_cache *c, const struct packed *p, struct pool *pool, struct file_map *map,
                     struct error *err) {
    unsigned char header[PACK_HEADER];
    if (!file_exists(c->path.data) || !file_map_open(map, c->path.data, err)) return false;
    bool ok = map->size == PACK_HEADER + p->bytes ||
              error_set(err, "%s: expected %zu bytes, found %zu", c->path.data, PACK_HEADER + p->bytes, map->size);
    ok = ok && (memcmp(map->data, c->key, c->key_bytes) == 0 ||
                error_set(err, "%s: it was made from another file, or this one as it was before", c->path.data));
    ok = ok && make_header(c, p, pool, map->data + PACK_HEADER, header, err) &&
         (memcmp(map->data, header, PACK_HEADER) == 0 || error_set(err, "%s: it is damaged", c->path.data));
    if (!ok) file_map_close(map);
    return ok;
}
