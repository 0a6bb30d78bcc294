// pack.h: what pack.c and pack_cache.c share.
#ifndef TANDEM_MODEL_PACK_H
#define TANDEM_MODEL_PACK_H

#include "model/model.h"

// The matrices of a model that have octets, and where these stand.
struct packed {
    struct matrix **matrices; // [n]
    size_t *at;               // [n]
    size_t n, bytes;
};

enum { PACK_HEADER = 4096 }; // bytes before the octets in the cache's file

// ---- pack_cache.c
struct pack_cache {
    struct buffer path;     // the file; empty: this model has none
    unsigned char key[512]; // what it must say of the model's file and of the order of the octets
    size_t key_bytes;
};
// Where the cache of this model's octets is, and its key. False: there is none for this model.
bool pack_cache_find(struct pack_cache *c, const struct model *m, const struct packed *p, const struct pack_options *o);
void pack_cache_free(struct pack_cache *c); // all zero is fine

// Opens the file and checks every byte of it. False with `err` empty: there is no such file.
bool pack_cache_open(const struct pack_cache *c, const struct packed *p, struct pool *pool, struct file_map *map,
                     struct error *err);
// Writes the header of a file whose octets are in place.
bool pack_cache_seal(const struct pack_cache *c, const struct packed *p, struct pool *pool, unsigned char *file,
                     struct error *err);

#endif
