// digest.c: see digest.h.
#include "base/digest.h"

#include "base/file.h"
#include "base/size.h"

#include <openssl/evp.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

enum { BYTES = 32 };

static bool sha256(const void *data, size_t n, unsigned char out[BYTES]) {
    return EVP_Digest(data, n, out, NULL, EVP_sha256(), NULL) == 1;
}

static bool no_digest(struct error *err) {
    return error_set(err, "libcrypto cannot compute SHA-256");
}

static void write_hex(const unsigned char raw[BYTES], struct digest *out) {
    for (int i = 0; i < BYTES; i++) snprintf(out->hex + (ptrdiff_t)2 * i, 3, "%02x", raw[i]);
}

bool digest_bytes(const void *data, size_t n, struct digest *out, struct error *err) {
    unsigned char raw[BYTES];
    if (!sha256(n ? data : "", n, raw)) return no_digest(err);
    write_hex(raw, out);
    return true;
}

struct tree_job {
    const unsigned char *data;
    size_t n;
    unsigned char *digests; // [n_pieces, BYTES]
    atomic_bool failed;
};

static void tree_pieces(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    struct tree_job *j = user;
    for (size_t i = begin; i < end; i++) {
        size_t at = i * DIGEST_PIECE, n = j->n - at < DIGEST_PIECE ? j->n - at : DIGEST_PIECE;
        if (!sha256(j->data + at, n, j->digests + i * BYTES)) atomic_store(&j->failed, true);
    }
}

bool digest_tree(const void *data, size_t n, struct pool *pool, struct digest *out, struct error *err) {
    size_t n_pieces = n / DIGEST_PIECE + (n % DIGEST_PIECE != 0);
    struct tree_job j = {.data = data, .n = n, .digests = size_alloc(n_pieces, BYTES)};
    if (!j.digests) return error_set(err, "out of memory");
    atomic_init(&j.failed, false);
    if (pool) pool_for(pool, n_pieces, 1, tree_pieces, &j);
    else tree_pieces(&j, 0, n_pieces, 0);
    bool ok = atomic_load(&j.failed) ? no_digest(err) : digest_bytes(j.digests, n_pieces * BYTES, out, err);
    free(j.digests);
    return ok;
}

bool digest_file(const char *path, bool tree, struct pool *pool, struct digest *out, struct error *err) {
    struct file_map map;
    if (!file_map_open(&map, path, err)) return false;
    bool ok = tree ? digest_tree(map.data, map.size, pool, out, err) : digest_bytes(map.data, map.size, out, err);
    file_map_close(&map);
    return ok;
}

// ---- In pieces ----------------------------------------------------------------------------------------------------

static bool no_stream(struct error *err) {
    return error_set(err, "libcrypto cannot compute a digest");
}

static struct digest_stream *stream_create(const EVP_MD *kind, struct error *err) {
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    if (context && EVP_DigestInit_ex(context, kind, NULL) == 1) return (struct digest_stream *)context;
    EVP_MD_CTX_free(context);
    no_stream(err);
    return NULL;
}

struct digest_stream *digest_stream_sha256(struct error *err) {
    return stream_create(EVP_sha256(), err);
}

struct digest_stream *digest_stream_git(uint64_t size, struct error *err) {
    char header[32];
    int n = snprintf(header, sizeof header, "blob %llu", (unsigned long long)size);
    struct digest_stream *s = stream_create(EVP_sha1(), err);
    if (s && digest_stream_add(s, header, (size_t)n + 1, err)) return s; // its NUL, too
    digest_stream_free(s);
    return NULL;
}

bool digest_stream_add(struct digest_stream *s, const void *data, size_t n, struct error *err) {
    return EVP_DigestUpdate((EVP_MD_CTX *)s, data, n) == 1 || no_stream(err);
}

bool digest_stream_end(struct digest_stream *s, struct digest *out, struct error *err) {
    unsigned char raw[EVP_MAX_MD_SIZE];
    unsigned n = 0;
    if (EVP_DigestFinal_ex((EVP_MD_CTX *)s, raw, &n) != 1 || n > BYTES) return no_stream(err);
    for (unsigned i = 0; i < n; i++) snprintf(out->hex + (ptrdiff_t)2 * i, 3, "%02x", raw[i]);
    return true;
}

void digest_stream_free(struct digest_stream *s) {
    EVP_MD_CTX_free((EVP_MD_CTX *)s);
}
