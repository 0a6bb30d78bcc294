// digest.h: SHA-256, by libcrypto.
#ifndef TANDEM_BASE_DIGEST_H
#define TANDEM_BASE_DIGEST_H

#include "base/error.h"
#include "base/pool.h"

#include <stdbool.h>
#include <stddef.h>

struct digest {
    char hex[65]; // 64 digits, small letters, and a NUL
};

bool digest_bytes(const void *data, size_t n, struct digest *out, struct error *err);

// For large data, on all threads of `pool` (NULL: one): SHA-256 of the SHA-256 digests (32 bytes each, in order) of its
// pieces of DIGEST_PIECE bytes, the last one shorter; of no pieces for no bytes.
enum { DIGEST_PIECE = 16 << 20 };
bool digest_tree(const void *data, size_t n, struct pool *pool, struct digest *out, struct error *err);

// The same of a whole file; `tree`: by pieces.
bool digest_file(const char *path, bool tree, struct pool *pool, struct digest *out, struct error *err);

#endif
