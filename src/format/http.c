// http.c: see http.h.
#include "format/http.h"

#include "base/clock.h"

#include <ctype.h>
#include <curl/curl.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

// In a row without a byte of progress; the waits between them are FIRST_WAIT, twice that, ... seconds.
enum { MAX_ATTEMPTS = 5, MAX_REDIRECTS = 5, MAX_RETRY_AFTER = 300 };
static const double FIRST_WAIT = 0.5;

struct http {
    struct http_options options;
    CURL *curl;
    struct curl_slist *headers;
    char curl_error[CURL_ERROR_SIZE];
    bool reached; // has any host ever answered? Until then a failed connection is final: there is no network

    // the request in progress
    struct http_reply *reply;
    double retry_after; // seconds, 0: not said
    long hop_status;    // of the response whose headers are being read
    uint64_t range_start;
    bool has_range, too_long, began;
    size_t max_bytes;
    struct buffer *body;          // http_get
    const struct http_sink *sink; // http_fetch
    uint64_t *offset;
    struct error sink_error;
    bool sink_failed;
};

// ---- Headers ------------------------------------------------------------------------------------------------------

static void copy_text(char *out, size_t size, const char *text, size_t n) {
    if (n >= size) n = 0; // too long to be meant: as if it were absent
    memcpy(out, text, n);
    out[n] = '\0';
}

// An entity tag without W/ and its quotes.
static void copy_etag(char *out, size_t size, const char *text, size_t n) {
    if (n > 2 && text[0] == 'W' && text[1] == '/') text += 2, n -= 2;
    if (n >= 2 && text[0] == '"' && text[n - 1] == '"') text++, n -= 2;
    copy_text(out, size, text, n);
}

static bool read_number(const char *text, size_t n, uint64_t *out) {
    char digits[24], *end;
    copy_text(digits, sizeof digits, text, n);
    if (!isdigit((unsigned char)digits[0])) return false;
    errno = 0;
    unsigned long long value = strtoull(digits, &end, 10);
    if (*end || errno) return false;
    *out = value;
    return true;
}

// Seconds, or a date.
static double read_retry_after(const char *text, size_t n) {
    uint64_t seconds;
    char date[64];
    if (read_number(text, n, &seconds)) return seconds > MAX_RETRY_AFTER ? MAX_RETRY_AFTER : (double)seconds;
    copy_text(date, sizeof date, text, n);
    time_t then = curl_getdate(date, NULL), now = time(NULL);
    if (then <= now) return 0;
    return then - now > MAX_RETRY_AFTER ? MAX_RETRY_AFTER : (double)(then - now);
}

// "bytes 100-199/200"
static bool read_range(const char *text, size_t n, uint64_t *start) {
    if (n < 7 || strncasecmp(text, "bytes ", 6) != 0) return false;
    size_t digits = 0;
    while (6 + digits < n && isdigit((unsigned char)text[6 + digits])) digits++;
    return 6 + digits < n && text[6 + digits] == '-' && read_number(text + 6, digits, start);
}

static void take_header(struct http *h, const char *name, size_t n_name, const char *value, size_t n) {
#define IS(text) (n_name == sizeof(text) - 1 && strncasecmp(name, text, n_name) == 0)
    struct http_reply *r = h->reply;
    uint64_t size;
    if (IS("etag") && !r->etag[0]) copy_etag(r->etag, sizeof r->etag, value, n);
    else if (IS("x-linked-etag")) copy_etag(r->linked_etag, sizeof r->linked_etag, value, n);
    else if (IS("x-linked-size") && read_number(value, n, &size)) r->size = size, r->has_size = true;
    else if (IS("x-repo-commit")) copy_text(r->commit, sizeof r->commit, value, n);
    else if (IS("x-error-code")) copy_text(r->error_code, sizeof r->error_code, value, n);
    else if (IS("x-error-message")) copy_text(r->error_text, sizeof r->error_text, value, n);
    else if (IS("location")) copy_text(r->location, sizeof r->location, value, n);
    else if (IS("retry-after")) h->retry_after = read_retry_after(value, n);
    else if (IS("content-range")) h->has_range = read_range(value, n, &h->range_start);
    else if (IS("content-length") && h->hop_status / 100 == 2 && !r->has_size && read_number(value, n, &size))
        r->size = size, r->has_size = true;
#undef IS
}

static size_t on_header(char *line, size_t one, size_t n, void *user) {
    (void)one;
    struct http *h = user;
    size_t len = n;
    while (len && (line[len - 1] == '\r' || line[len - 1] == '\n')) len--;
    if (len > 5 && strncmp(line, "HTTP/", 5) == 0) { // a response begins: the one before was a redirect or a proxy's
        const char *space = memchr(line, ' ', len);
        h->hop_status = space ? strtol(space + 1, NULL, 10) : 0;
        h->has_range = false;
        h->retry_after = 0;
        return n;
    }
    const char *colon = memchr(line, ':', len);
    if (!colon) return n;
    const char *value = colon + 1, *end = line + len;
    while (value < end && (*value == ' ' || *value == '\t')) value++;
    while (end > value && (end[-1] == ' ' || end[-1] == '\t')) end--;
    take_header(h, line, (size_t)(colon - line), value, (size_t)(end - value));
    return n;
}

// ---- Bodies -------------------------------------------------------------------------------------------------------

static bool begin_body(struct http *h) {
    h->began = true;
    if (*h->offset == 0 && h->hop_status == 200) return true;
    if (h->hop_status == 206 && h->has_range && h->range_start == *h->offset) return true;
    if (h->hop_status == 206)
        return error_set(&h->sink_error,
                         "the host answered with another range than the one from byte %llu that was asked for",
                         (unsigned long long)*h->offset);
    *h->offset = 0;
    return h->sink->restart(h->sink->user, &h->sink_error);
}

static size_t on_body(char *bytes, size_t one, size_t n, void *user) {
    (void)one;
    struct http *h = user;
    if (h->body) {
        if (h->body->len + n > h->max_bytes) {
            h->too_long = true;
            return 0;
        }
        return buffer_append(h->body, bytes, n) ? n : 0;
    }
    if (!h->sink || (h->hop_status != 200 && h->hop_status != 206)) return n; // an error's text, of no use
    if ((!h->began && !begin_body(h)) || !h->sink->write(h->sink->user, bytes, n, &h->sink_error)) {
        h->sink_failed = true;
        return 0;
    }
    *h->offset += n;
    return n;
}

static int on_progress(void *user, curl_off_t a, curl_off_t b, curl_off_t c, curl_off_t d) {
    (void)a, (void)b, (void)c, (void)d;
    const struct http *h = user;
    return h->options.stop && atomic_load(h->options.stop);
}

// ---- Attempts -----------------------------------------------------------------------------------------------------

static bool interrupted(const struct http *h, struct error *err) {
    if (!h->options.stop || !atomic_load(h->options.stop)) return false;
    error_set(err, "interrupted");
    return true;
}

static bool wait_seconds(const struct http *h, double seconds, struct error *err) {
    for (double end = clock_seconds() + seconds, left; (left = end - clock_seconds()) > 0;) {
        if (interrupted(h, err)) return false;
        double nap = left < 0.1 ? left : 0.1;
        nanosleep(&(struct timespec){.tv_nsec = (long)(nap * 1e9)}, NULL);
    }
    return !interrupted(h, err);
}

static bool is_worth_another(const struct http *h, CURLcode code, long status) {
    switch (code) {
    case CURLE_OK: return status == 408 || status == 429 || (status >= 500 && status != 501);
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_RESOLVE_PROXY:
    case CURLE_COULDNT_CONNECT:
    case CURLE_SSL_CONNECT_ERROR: return h->reached;
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_PARTIAL_FILE:
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
    case CURLE_GOT_NOTHING:
    case CURLE_HTTP2:
    case CURLE_HTTP2_STREAM: return true;
    default: return false;
    }
}

static void host_of(const char *url, char *out, size_t size) {
    const char *start = strstr(url, "://");
    start = start ? start + 3 : url;
    snprintf(out, size, "%.*s", (int)strcspn(start, "/?#"), start);
}

static bool transfer_failed(const struct http *h, const char *url, CURLcode code, struct error *err) {
    char host[256];
    host_of(url, host, sizeof host);
    const char *text = h->curl_error[0] ? h->curl_error : curl_easy_strerror(code);
    switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_RESOLVE_PROXY:
    case CURLE_COULDNT_CONNECT:
        return error_set(err, "cannot reach %s: %s. Is this machine online, and does it need a proxy (https_proxy)?",
                         host, text);
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CACERT_BADFILE:
        return error_set(err,
                         "%s: its certificate cannot be verified: %s. The system's come with the package "
                         "ca-certificates; SSL_CERT_FILE names others",
                         host, text);
    default: return error_set(err, "%s: %s", host, text);
    }
}

static CURLcode perform(struct http *h, const char *url) {
    char range[32];
    *h->reply = (struct http_reply){0};
    h->hop_status = 0;
    h->retry_after = 0;
    h->has_range = h->too_long = h->began = h->sink_failed = false;
    h->curl_error[0] = '\0';
    if (h->body) buffer_clear(h->body);
    if (h->offset && *h->offset > 0) snprintf(range, sizeof range, "%llu-", (unsigned long long)*h->offset);
    curl_easy_setopt(h->curl, CURLOPT_URL, url);
    curl_easy_setopt(h->curl, CURLOPT_RANGE, h->offset && *h->offset > 0 ? range : NULL);
    // From https never to http, where anybody could answer.
    curl_easy_setopt(h->curl, CURLOPT_REDIR_PROTOCOLS_STR, strncmp(url, "https:", 6) == 0 ? "https" : "http,https");
    CURLcode code = curl_easy_perform(h->curl);
    curl_easy_getinfo(h->curl, CURLINFO_RESPONSE_CODE, &h->reply->status);
    if (h->reply->status) h->reached = true;
    return code;
}

// The answer of `url`, after as many attempts as it takes; a fetch goes on where the last one ended.
static bool request(struct http *h, const char *url, struct error *err) {
    double pause = FIRST_WAIT;
    for (int attempt = 1;; attempt++) {
        uint64_t before = h->offset ? *h->offset : 0;
        CURLcode code = perform(h, url);
        if (h->sink_failed) {
            if (err) *err = h->sink_error;
            return false;
        }
        if (interrupted(h, err)) return false;
        if (h->too_long) return error_set(err, "%s: the answer is longer than %zu bytes", url, h->max_bytes);
        bool again = is_worth_another(h, code, h->reply->status);
        if (code == CURLE_OK && !again) return true;
        if (h->offset && *h->offset > before) attempt = 1, pause = FIRST_WAIT;
        if (!again || attempt == MAX_ATTEMPTS) return code == CURLE_OK || transfer_failed(h, url, code, err);
        double seconds = h->retry_after > pause ? h->retry_after : pause;
        char host[256];
        host_of(url, host, sizeof host);
        if (code != CURLE_OK)
            log_warn(h->options.log, "%s: %s; trying again in %.1f s", host,
                     h->curl_error[0] ? h->curl_error : curl_easy_strerror(code), seconds);
        else
            log_warn(h->options.log, "%s answers with status %ld; trying again in %.1f s", host, h->reply->status,
                     seconds);
        if (!wait_seconds(h, seconds, err)) return false;
        pause *= 2;
    }
}

// ---- The interface ------------------------------------------------------------------------------------------------

bool http_head(struct http *h, const char *url, struct http_reply *reply, struct error *err) {
    char next[2048];
    h->reply = reply;
    h->body = NULL;
    h->sink = NULL;
    h->offset = NULL;
    curl_easy_setopt(h->curl, CURLOPT_NOBODY, 1L);
    curl_easy_setopt(h->curl, CURLOPT_FOLLOWLOCATION, 0L);
    for (int i = 0; i <= MAX_REDIRECTS; i++) {
        if (!request(h, url, err)) return false;
        // A path alone: the hub renamed something. A whole URL: it says where the bytes are, and the rest about them.
        bool moved = reply->status / 100 == 3 && reply->location[0] == '/' && reply->location[1] != '/';
        if (!moved) return true;
        const char *target = NULL;
        if (curl_easy_getinfo(h->curl, CURLINFO_REDIRECT_URL, &target) != CURLE_OK || !target) return true;
        if (strlen(target) >= sizeof next) return error_set(err, "%s: a redirect to an overlong place", url);
        memcpy(next, target, strlen(target) + 1);
        url = next;
    }
    return error_set(err, "%s: more than %d redirects", url, MAX_REDIRECTS);
}

static bool get(struct http *h, const char *url, struct error *err) {
    curl_easy_setopt(h->curl, CURLOPT_HTTPGET, 1L);
    curl_easy_setopt(h->curl, CURLOPT_FOLLOWLOCATION, 1L);
    return request(h, url, err);
}

bool http_get(struct http *h, const char *url, size_t max_bytes, struct buffer *body, struct http_reply *reply,
              struct error *err) {
    buffer_clear(body);
    h->reply = reply;
    h->body = body;
    h->max_bytes = max_bytes;
    h->sink = NULL;
    h->offset = NULL;
    return get(h, url, err);
}

bool http_fetch(struct http *h, const char *url, uint64_t *offset, const struct http_sink *sink,
                struct http_reply *reply, struct error *err) {
    h->reply = reply;
    h->body = NULL;
    h->sink = sink;
    h->offset = offset;
    return get(h, url, err);
}

bool http_escape(struct buffer *out, const char *text, bool keep_slashes) {
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        bool plain = (c < 128 && isalnum(c)) || strchr("-._~", c) || (c == '/' && keep_slashes);
        if (!(plain ? buffer_append_byte(out, (char)c) : buffer_printf(out, "%%%02X", c))) return false;
    }
    return true;
}

static bool add_header(struct http *h, const char *line) {
    struct curl_slist *longer = curl_slist_append(h->headers, line);
    if (longer) h->headers = longer;
    return longer != NULL;
}

static bool set_options(struct http *h) {
    const struct http_options *o = &h->options;
    struct buffer bearer = {0};
    bool ok = add_header(h, "Accept-Encoding: identity"); // sizes are those of the files
    // libcurl leaves this header out where a redirect leads to another host.
    if (o->token) ok = ok && buffer_printf(&bearer, "Authorization: Bearer %s", o->token) && add_header(h, bearer.data);
    buffer_free(&bearer);
    if (!ok) return false;
    long stall = o->stall_s < 1 ? 1 : (long)o->stall_s;
    curl_easy_setopt(h->curl, CURLOPT_HTTPHEADER, h->headers);
    curl_easy_setopt(h->curl, CURLOPT_USERAGENT, "tandem");
    curl_easy_setopt(h->curl, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(h->curl, CURLOPT_MAXREDIRS, (long)MAX_REDIRECTS);
    curl_easy_setopt(h->curl, CURLOPT_CONNECTTIMEOUT, 30L);
    curl_easy_setopt(h->curl, CURLOPT_LOW_SPEED_LIMIT, 1L);
    curl_easy_setopt(h->curl, CURLOPT_LOW_SPEED_TIME, stall);
    curl_easy_setopt(h->curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(h->curl, CURLOPT_BUFFERSIZE, 256L << 10);
    curl_easy_setopt(h->curl, CURLOPT_ERRORBUFFER, h->curl_error);
    curl_easy_setopt(h->curl, CURLOPT_HEADERFUNCTION, on_header);
    curl_easy_setopt(h->curl, CURLOPT_HEADERDATA, h);
    curl_easy_setopt(h->curl, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(h->curl, CURLOPT_WRITEDATA, h);
    curl_easy_setopt(h->curl, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(h->curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    curl_easy_setopt(h->curl, CURLOPT_XFERINFODATA, h);
    if (o->ca_file) curl_easy_setopt(h->curl, CURLOPT_CAINFO, o->ca_file);
    return true;
}

struct http *http_create(const struct http_options *options, struct error *err) {
    if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK) {
        error_set(err, "libcurl cannot start");
        return NULL;
    }
    struct http *h = calloc(1, sizeof *h);
    if (h) {
        h->options = *options;
        h->curl = curl_easy_init();
    }
    if (!h || !h->curl || !set_options(h)) {
        error_set(err, "out of memory for a connection");
        if (h) http_free(h);
        else curl_global_cleanup();
        return NULL;
    }
    return h;
}

void http_free(struct http *h) {
    if (!h) return;
    curl_easy_cleanup(h->curl);
    curl_slist_free_all(h->headers);
    free(h);
    curl_global_cleanup();
}
