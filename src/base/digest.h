// digest.h: SHA-256 and git's names of files, by libcrypto.
#ifndef TANDEM_BASE_DIGEST_H
#define TANDEM_BASE_DIGEST_H

#include "base/error.h"
#include "base/pool.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

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

// Of bytes that come in pieces: SHA-256, or git's name of a file with `size` bytes (40 digits: SHA-1 of
// "blob SIZE", a NUL and the bytes).
struct digest_stream;
struct digest_stream *digest_stream_sha256(struct error *err);
struct digest_stream *digest_stream_git(uint64_t size, struct error *err);
bool digest_stream_add(struct digest_stream *s, const void *data, size_t n, struct error *err);
bool digest_stream_end(struct digest_stream *s, struct digest *out, struct error *err); // nothing can be added then
void digest_stream_free(struct digest_stream *s);                                       // NULL is fine

#endif
