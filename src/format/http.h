// http.h: a small HTTP client, by libcurl: asking for a file's properties, reading a short answer, and fetching a long
// one from where an earlier attempt ended. It knows redirects, proxies (libcurl reads http_proxy, https_proxy,
// all_proxy and no_proxy), the token and when to try again; it knows nothing of hubs, caches and files.
#ifndef TANDEM_FORMAT_HTTP_H
#define TANDEM_FORMAT_HTTP_H

#include "base/buffer.h"
#include "base/error.h"
#include "base/log.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct http_options {
    const char *token;       // sent to the host of the URL and to no host that it redirects to; NULL: none
    const char *ca_file;     // certificates to trust (PEM), NULL: the system's
    double stall_s;          // a transfer that stands still for so long is cut and tried again
    const atomic_bool *stop; // set from outside: every call ends within a second with an error; NULL: never
    const struct log *log;   // says why there is another attempt; NULL: silent
};

// What the answer's headers said. Text that was absent is "".
struct http_reply {
    long status;
    bool has_size;
    uint64_t size;         // of the whole file
    char etag[192];        // without quotes and W/
    char commit[96];       // X-Repo-Commit
    char error_code[64];   // X-Error-Code
    char error_text[512];  // X-Error-Message
    char linked_etag[192]; // X-Linked-ETag, of the file that a redirect leads to
    char location[2048];   // where a redirect leads to
};

struct http;
struct http *http_create(const struct http_options *options, struct error *err); // the options are borrowed
void http_free(struct http *h);                                                  // NULL is fine

// Each returns true when the host answered, whatever the status; false when there was no answer after several attempts
// (a cut connection, 408, 429 and 5xx are tried again, after the time that Retry-After asks for or a growing one).

// HEAD. Redirects are followed within the host only, so that the reply is the hub's own.
bool http_head(struct http *h, const char *url, struct http_reply *reply, struct error *err);

// GET of at most `max_bytes` into `body` (replaced); more is an error.
bool http_get(struct http *h, const char *url, size_t max_bytes, struct buffer *body, struct http_reply *reply,
              struct error *err);

// GET of a file from *offset on; redirects are followed. The bytes of a good answer go to `write`, each call moving
// *offset; before them `restart` is called, and *offset set to 0, when the server sends the file from its beginning. A
// false from either ends the call with its error.
struct http_sink {
    bool (*write)(void *user, const void *bytes, size_t n, struct error *err);
    bool (*restart)(void *user, struct error *err);
    void *user;
};
bool http_fetch(struct http *h, const char *url, uint64_t *offset, const struct http_sink *sink,
                struct http_reply *reply, struct error *err);

// `text` with all but letters, digits and -._~ (and '/', if `keep_slashes`) as %XX, appended.
bool http_escape(struct buffer *out, const char *text, bool keep_slashes);

#endif
