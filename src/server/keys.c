// keys.c: API keys: a file with one key a line, blank lines and lines that begin with # left out. A key's text gives
// its tenant, so that a key that stays in the file keeps its cached prefixes when the file is read again.
#include "server/internal.h"

#include "base/file.h"
#include "base/size.h"

#include <stdlib.h>
#include <string.h>

enum { KEY_BYTES = 256, MAX_KEYS = 10000 };

struct keys {
    unsigned char (*padded)[KEY_BYTES]; // [n] padded with zeros
    uint64_t *tenants;                  // [n]
    size_t n;
};

void keys_free(struct keys *k) {
    if (!k) return;
    free(k->padded);
    free(k->tenants);
    free(k);
}

// FNV-1a, to number tenants: two keys with one number would only share cached prefixes, and a file that holds such a
// pair is refused.
static uint64_t tenant_of(const char *key, size_t n) {
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)key[i]) * 0x100000001B3u;
    h >>= 3;
    return h ? h : 1;
}

static bool add_key(struct keys *k, const char *key, size_t n, size_t line, struct error *err) {
    if (n < 8 || n >= KEY_BYTES)
        return error_set(err, "line %zu: a key has 8 to %d bytes, this one %zu", line, KEY_BYTES - 1, n);
    for (size_t i = 0; i < n; i++)
        if (key[i] <= ' ' || key[i] > '~') return error_set(err, "line %zu: a key holds printable ASCII only", line);
    if (k->n == MAX_KEYS) return error_set(err, "more than %d keys", MAX_KEYS);
    void *padded = size_realloc(k->padded, k->n + 1, sizeof *k->padded);
    if (!padded) return error_set(err, "out of memory");
    k->padded = padded;
    uint64_t *tenants = size_realloc(k->tenants, k->n + 1, sizeof *tenants);
    if (!tenants) return error_set(err, "out of memory");
    k->tenants = tenants;
    memset(k->padded[k->n], 0, KEY_BYTES);
    memcpy(k->padded[k->n], key, n);
    k->tenants[k->n] = tenant_of(key, n);
    for (size_t i = 0; i < k->n; i++)
        if (k->tenants[i] == k->tenants[k->n]) return error_set(err, "line %zu: this key is there twice", line);
    k->n++;
    return true;
}

struct keys *keys_load(const char *path, struct error *err) {
    struct buffer text = {0};
    struct keys *k = size_alloc_zero(1, sizeof *k);
    bool ok = k ? file_read(path, 4 << 20, &text, err) : error_set(err, "out of memory");
    size_t line = 0;
    for (const char *at = buffer_text(&text), *next; ok && *at; at = next) {
        const char *end = strchr(at, '\n');
        next = end ? end + 1 : at + strlen(at);
        if (!end) end = next;
        line++;
        while (end > at && (end[-1] == ' ' || end[-1] == '\r' || end[-1] == '\t')) end--;
        if (end == at || *at == '#') continue;
        ok = add_key(k, at, (size_t)(end - at), line, err);
        if (!ok) error_prefix(err, "%s: ", path);
    }
    if (ok && k->n == 0) ok = error_set(err, "%s: no key in it (one a line, 8 to %d bytes)", path, KEY_BYTES - 1);
    if (text.data) memset(text.data, 0, text.len);
    buffer_free(&text);
    if (ok) return k;
    keys_free(k);
    return NULL;
}

uint64_t keys_check(const struct keys *k, const char *key) {
    unsigned char given[KEY_BYTES] = {0};
    size_t n = strnlen(key, KEY_BYTES);
    uint64_t found = 0;
    memcpy(given, key, n < KEY_BYTES ? n : 0); // one that is too long equals none: no key is empty
    for (size_t i = 0; i < k->n; i++) {
        unsigned difference = 0;
        for (size_t b = 0; b < KEY_BYTES; b++) difference |= (unsigned)(given[b] ^ k->padded[i][b]);
        uint64_t mask = (uint64_t)0 - (uint64_t)(difference == 0);
        found |= k->tenants[i] & mask;
    }
    return found;
}
