// pull.c: the download itself: asking the hub, blobs, links and refs. See pull.h; which files: pull_list.c.
#include "format/pull.h"

#include "base/digest.h"
#include "base/file.h"
#include "base/size.h"
#include "format/http.h"
#include "format/json.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

struct pull {
    const struct hub_settings *hub;
    const struct pull_options *options;
    struct pull_result *result;
    struct http *http;
    struct buffer folder; // CACHE/models--OWNER--NAME
    struct buffer locks;  // CACHE/.locks/models--OWNER--NAME
    uint64_t all_done, all_size;
};

static bool out_of_memory(struct error *err) {
    return error_set(err, "out of memory");
}

void pull_result_free(struct pull_result *r) {
    arena_free(&r->arena);
    *r = (struct pull_result){0};
}

// ---- Folders ------------------------------------------------------------------------------------------------------

// Makes the folders that `path` lies in, as mkdir -p does.
static bool make_folders(const char *path, struct error *err) {
    struct buffer part = {0};
    bool ok = buffer_append_text(&part, path) || out_of_memory(err);
    for (char *slash = ok ? strchr(part.data + 1, '/') : NULL; ok && slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        if (mkdir(part.data, 0777) != 0 && errno != EEXIST)
            ok = error_set(err, "cannot make the folder %s: %s", part.data, strerror(errno));
        else if (!file_is_folder(part.data)) ok = error_set(err, "%s is in the way: expected a folder", part.data);
        *slash = '/';
    }
    buffer_free(&part);
    return ok;
}

static bool open_folders(struct pull *p, struct error *err) {
    const char *model = p->options->model, *slash = strchr(model, '/');
    return (buffer_printf(&p->folder, "%s/models--%.*s--%s", p->hub->cache.data, (int)(slash - model), model,
                          slash + 1) &&
            buffer_printf(&p->locks, "%s/.locks/models--%.*s--%s", p->hub->cache.data, (int)(slash - model), model,
                          slash + 1)) ||
           out_of_memory(err);
}

// ---- Asking the hub -----------------------------------------------------------------------------------------------

// What a status other than 200 means for `what` ("revision main"), and what to do about it.
static bool refuse_status(const struct pull *p, const struct http_reply *r, const char *what, struct error *err) {
    const char *model = p->options->model, *host = p->hub->endpoint.data;
    bool has_token = p->hub->token.len > 0;
    const char *said = r->error_text[0] ? r->error_text : "no reason given";
    bool gated = strcmp(r->error_code, "GatedRepo") == 0;
    if (gated || r->status == 403)
        return error_set(err,
                         "%s: access is restricted (status %ld: %s). Accept its conditions at %s/%s with your account, "
                         "and %s",
                         model, r->status, said, host, model,
                         has_token ? "check that your token is of that account and may read it"
                                   : "give a token of it in HF_TOKEN");
    if (strcmp(r->error_code, "RevisionNotFound") == 0)
        return error_set(err, "%s has no revision \"%s\": --revision takes a branch, a tag or a commit", model,
                         p->options->revision ? p->options->revision : "main");
    if (strcmp(r->error_code, "EntryNotFound") == 0)
        return error_set(err, "%s: %s: the hub lists the file but does not have it (status %ld)", model, what,
                         r->status);
    if (r->status == 401 && has_token)
        return error_set(err,
                         "%s: the hub refuses the token (status 401: %s). It comes from HF_TOKEN or %s; is it still "
                         "valid, and is the name right?",
                         model, said, p->hub->token_path.data);
    if (r->status == 401 || r->status == 404)
        return error_set(
            err,
            "%s: %s knows no such model, or it is private or gated (status %ld). Check the name; if you have "
            "access, make a token at %s/settings/tokens and put it into HF_TOKEN or %s",
            model, host, r->status, host, p->hub->token_path.data);
    if (r->status == 429)
        return error_set(err, "%s: the hub answers that there were too many requests (status 429): try again later%s",
                         model, has_token ? "" : ", or with a token in HF_TOKEN, which is allowed more");
    return error_set(err, "%s: %s: the hub answers with status %ld: %s", model, what, r->status, said);
}

static bool ask_for_list(struct pull *p, struct error *err) {
    const char *revision = p->options->revision ? p->options->revision : "main";
    struct buffer url = {0}, body = {0};
    struct http_reply reply;
    json_t *info = NULL;
    bool ok = (buffer_printf(&url, "%s/api/models/%s/revision/", p->hub->endpoint.data, p->options->model) &&
               http_escape(&url, revision, false)) ||
              out_of_memory(err);
    ok = ok && http_get(p->http, url.data, JSON_MAX_BYTES, &body, &reply, err);
    if (ok && reply.status != 200) ok = refuse_status(p, &reply, "its description", err);
    if (ok) ok = (info = json_parse(buffer_text(&body), body.len, url.data, err)) != NULL;
    ok = ok && pull_choose(info, p->options, p->result, err);
    json_decref(info);
    buffer_free(&url);
    buffer_free(&body);
    return ok;
}

static bool file_url(const struct pull *p, const struct pull_file *f, struct buffer *url) {
    return buffer_printf(url, "%s/%s/resolve/%s/", p->hub->endpoint.data, p->options->model, p->result->commit) &&
           http_escape(url, f->name, true);
}

// The tag becomes a file's name.
static bool is_tag(const char *etag) {
    size_t n = strlen(etag);
    return n > 0 && n <= 128 && etag[0] != '.' &&
           strspn(etag, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == n;
}

static bool ask_for_file(struct pull *p, struct pull_file *f, struct error *err) {
    struct buffer url = {0};
    struct http_reply reply;
    bool ok = file_url(p, f, &url) || out_of_memory(err);
    ok = ok && http_head(p->http, url.data, &reply, err);
    if (ok && reply.status != 200 && (reply.status / 100 != 3 || !reply.location[0]))
        ok = refuse_status(p, &reply, f->name, err);
    if (ok) {
        const char *etag = reply.linked_etag[0] ? reply.linked_etag : reply.etag;
        f->has_size = reply.has_size;
        f->size = reply.size;
        if (!is_tag(etag)) ok = error_set(err, "%s: the hub gives the file no usable ETag: \"%s\"", f->name, etag);
        else ok = (f->etag = arena_copy_text(&p->result->arena, etag, strlen(etag))) || out_of_memory(err);
    }
    buffer_free(&url);
    return ok;
}

// ---- One blob -----------------------------------------------------------------------------------------------------

struct blob {
    struct pull *p;
    struct pull_file *file;
    struct pull_progress progress;
    struct buffer path, partial, lock;
    int fd, lock_fd;
    uint64_t length; // of the partial file, all of it in `digest`
    struct digest_stream *digest;
};

static void tell(struct blob *b) {
    const struct pull_options *o = b->p->options;
    b->progress.done = b->length;
    b->progress.all_done = b->p->all_done + (b->length > b->file->present ? b->length - b->file->present : 0);
    if (o->progress) o->progress(o->user, &b->progress);
}

// A digest by the tag's form: 64 digits are a SHA-256, 40 are git's; no digest for others, whose length must do.
static bool start_digest(struct blob *b, struct error *err) {
    const char *etag = b->file->etag;
    size_t n = strlen(etag);
    digest_stream_free(b->digest);
    b->digest = NULL;
    if (strspn(etag, "0123456789abcdef") != n || !(n == 64 || (n == 40 && b->file->has_size))) return true;
    b->digest = n == 64 ? digest_stream_sha256(err) : digest_stream_git(b->file->size, err);
    return b->digest != NULL;
}

static bool restart_blob(void *user, struct error *err) {
    struct blob *b = user;
    b->length = 0;
    b->file->present = 0;
    if (ftruncate(b->fd, 0) != 0 || lseek(b->fd, 0, SEEK_SET) != 0)
        return error_set(err, "cannot empty %s: %s", b->partial.data, strerror(errno));
    return start_digest(b, err);
}

static bool write_blob(void *user, const void *bytes, size_t n, struct error *err) {
    struct blob *b = user;
    const char *at = bytes;
    uint64_t end = b->length + n;
    if (b->file->has_size && end > b->file->size)
        return error_set(err, "%s: the host sends more than the %llu bytes that the hub states", b->file->name,
                         (unsigned long long)b->file->size);
    for (size_t left = n; left > 0;) {
        ssize_t done = write(b->fd, at, left);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0)
            return error_set(err, "cannot write %s: %s. What came so far is kept; the same command goes on from there",
                             b->partial.data, strerror(errno));
        at += done;
        left -= (size_t)done;
    }
    b->length = end;
    b->file->fetched += n;
    if (b->digest && !digest_stream_add(b->digest, bytes, n, err)) return false;
    tell(b);
    return true;
}

static bool is_stopped(const struct pull *p, struct error *err) {
    if (!p->options->stop || !atomic_load(p->options->stop)) return false;
    error_set(err, "interrupted");
    return true;
}

// Reads what an earlier call left into the digest.
static bool take_up(struct blob *b, struct error *err) {
    static const size_t piece = (size_t)1 << 20;
    struct stat st;
    if (fstat(b->fd, &st) != 0)
        return error_set(err, "cannot read the size of %s: %s", b->partial.data, strerror(errno));
    uint64_t size = (uint64_t)st.st_size;
    if (b->file->has_size && size > b->file->size) return restart_blob(b, err);
    char *bytes = size ? malloc(piece) : NULL;
    if (size && !bytes) return out_of_memory(err);
    bool ok = true;
    b->progress.checking = true;
    while (ok && b->length < size) {
        ssize_t n = read(b->fd, bytes, piece);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) ok = error_set(err, "cannot read %s: %s", b->partial.data, n ? strerror(errno) : "it shrank");
        else ok = (!b->digest || digest_stream_add(b->digest, bytes, (size_t)n, err)) && !is_stopped(b->p, err);
        if (ok) b->length += (uint64_t)n, b->file->present = b->length, tell(b);
    }
    b->progress.checking = false;
    free(bytes);
    return ok;
}

// Is the finished file what the hub says it is? `*wrong`: it is not, and was emptied.
static bool check_blob(struct blob *b, bool *wrong, struct error *err) {
    struct digest found;
    *wrong = b->file->has_size && b->length != b->file->size;
    if (*wrong)
        error_set(err, "%s: expected %llu bytes, received %llu", b->file->name, (unsigned long long)b->file->size,
                  (unsigned long long)b->length);
    if (!*wrong && b->digest) {
        if (!digest_stream_end(b->digest, &found, err)) return false;
        *wrong = strcmp(found.hex, b->file->etag) != 0;
        if (*wrong)
            error_set(err, "%s: wrong checksum: expected %s, received %s. The file was discarded", b->file->name,
                      b->file->etag, found.hex);
    }
    struct error why;
    return !*wrong || (restart_blob(b, &why) && false);
}

static bool download(struct blob *b, struct error *err) {
    struct http_sink sink = {.write = write_blob, .restart = restart_blob, .user = b};
    struct http_reply reply;
    struct buffer url = {0};
    bool ok = file_url(b->p, b->file, &url) || out_of_memory(err);
    uint64_t offset = b->length;
    if (ok && !(b->file->has_size && offset == b->file->size)) {
        ok = http_fetch(b->p->http, url.data, &offset, &sink, &reply, err);
        if (ok && reply.status == 416)
            ok = restart_blob(b, err); // what is here is no beginning of that: the check fails
        else if (ok && reply.status != 200 && reply.status != 206) ok = refuse_status(b->p, &reply, b->file->name, err);
    }
    buffer_free(&url);
    return ok;
}

// Fills the partial file, from where it ends; a wrong beginning that an earlier call left gets a second chance.
static bool complete(struct blob *b, struct error *err) {
    bool wrong = false, ok = start_digest(b, err) && take_up(b, err);
    bool resumed = b->length > 0;
    ok = ok && download(b, err) && check_blob(b, &wrong, err);
    if (wrong && resumed) {
        log_warn(b->p->options->log, "%s; downloading it anew", err->text);
        resumed = false;
        ok = start_digest(b, err) && download(b, err) && check_blob(b, &wrong, err);
    }
    if (wrong) unlink(b->partial.data);
    b->file->source = resumed ? PULL_RESUMED : PULL_FETCHED;
    return ok;
}

static bool lock_blob(struct blob *b, struct error *err) {
    if (!make_folders(b->lock.data, err)) return false;
    b->lock_fd = open(b->lock.data, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (b->lock_fd < 0) return error_set(err, "cannot write %s: %s", b->lock.data, strerror(errno));
    for (bool told = false; flock(b->lock_fd, LOCK_EX | LOCK_NB) != 0; told = true) {
        if (errno != EWOULDBLOCK && errno != EINTR) return true; // a file system without locks
        if (!told) log_info(b->p->options->log, "another process downloads %s: waiting for it", b->file->name);
        if (is_stopped(b->p, err)) return false;
        usleep(100000);
    }
    return true;
}

static bool write_out(struct blob *b, struct error *err) {
    bool ok = fsync(b->fd) == 0 || errno == EINVAL || errno == ENOTSUP;
    ok = ok && rename(b->partial.data, b->path.data) == 0;
    return ok || error_set(err, "cannot write %s: %s", b->path.data, strerror(errno));
}

// Is the blob there, and as long as the hub says?
static bool has_blob(const char *path, const struct pull_file *f, struct stat *st) {
    return stat(path, st) == 0 && S_ISREG(st->st_mode) && (!f->has_size || (uint64_t)st->st_size == f->size);
}

static bool fetch_blob(struct pull *p, size_t i, struct error *err) {
    struct stat st;
    struct pull_file *f = &p->result->files[i];
    struct blob b = {.p = p, .file = f, .fd = -1, .lock_fd = -1};
    b.progress = (struct pull_progress){.file = f->name,
                                        .index = i,
                                        .n_files = p->result->n_files,
                                        .size = f->has_size ? f->size : 0,
                                        .all_size = p->all_size};
    bool ok = (buffer_printf(&b.path, "%s/blobs/%s", p->folder.data, f->etag) &&
               buffer_printf(&b.partial, "%s.incomplete", b.path.data) &&
               buffer_printf(&b.lock, "%s/%s.lock", p->locks.data, f->etag)) ||
              out_of_memory(err);
    ok = ok && make_folders(b.path.data, err) && lock_blob(&b, err);
    if (ok && !has_blob(b.path.data, f, &st)) {
        f->present = 0;
        b.fd = open(b.partial.data, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
        ok = b.fd >= 0 || error_set(err, "cannot write %s: %s", b.partial.data, strerror(errno));
        ok = ok && complete(&b, err) && write_out(&b, err);
    }
    if (ok) {
        p->all_done += f->fetched;
        b.progress.finished = true;
        b.progress.source = f->source;
        b.length = b.length ? b.length : f->size;
        tell(&b);
    }
    if (b.fd >= 0) close(b.fd);
    if (b.lock_fd >= 0) close(b.lock_fd); // and the lock with it
    digest_stream_free(b.digest);
    buffer_free(&b.path);
    buffer_free(&b.partial);
    buffer_free(&b.lock);
    return ok;
}

// ---- The snapshot -------------------------------------------------------------------------------------------------

// Links snapshots/COMMIT/NAME to its blob, atomically.
static bool link_file(const struct pull *p, const struct pull_file *f, struct error *err) {
    struct buffer path = {0}, fresh = {0}, target = {0}, blob = {0};
    bool ok = buffer_printf(&path, "%s/%s", p->result->path, f->name) &&
              buffer_printf(&fresh, "%s.incomplete", path.data) &&
              buffer_printf(&blob, "%s/blobs/%s", p->folder.data, f->etag) && buffer_append_text(&target, "../../");
    for (const char *c = f->name; ok && (c = strchr(c, '/')); c++) ok = buffer_append_text(&target, "../");
    ok = (ok && buffer_printf(&target, "blobs/%s", f->etag)) || out_of_memory(err);
    ok = ok && make_folders(path.data, err);
    if (ok) {
        unlink(fresh.data);
        if (symlink(target.data, fresh.data) == 0) ok = rename(fresh.data, path.data) == 0;
        else
            ok = (errno == EPERM || errno == ENOTSUP || errno == ENOSYS) &&
                 rename(blob.data, path.data) == 0; // no links here
        if (!ok) {
            error_set(err, "cannot write %s: %s", path.data, strerror(errno));
            unlink(fresh.data);
        }
    }
    buffer_free(&path);
    buffer_free(&fresh);
    buffer_free(&target);
    buffer_free(&blob);
    return ok;
}

// What is here already: the file itself (`f->source` stays PULL_CACHED and it gets no tag), its blob, or a part of it.
static bool look_up(struct pull *p, struct pull_file *f, bool *linked, struct error *err) {
    struct buffer path = {0};
    struct stat st;
    bool ok = buffer_printf(&path, "%s/%s", p->result->path, f->name) || out_of_memory(err);
    *linked = ok && stat(path.data, &st) == 0 && S_ISREG(st.st_mode);
    if (*linked) {
        f->size = (uint64_t)st.st_size;
        f->has_size = true;
    } else if (ok && (ok = ask_for_file(p, f, err))) {
        buffer_clear(&path);
        ok = buffer_printf(&path, "%s/blobs/%s", p->folder.data, f->etag) || out_of_memory(err);
        bool whole = ok && has_blob(path.data, f, &st);
        ok = ok && (whole || buffer_append_text(&path, ".incomplete") || out_of_memory(err));
        if (whole || (ok && stat(path.data, &st) == 0)) f->present = (uint64_t)st.st_size;
    }
    buffer_free(&path);
    return ok;
}

static bool check_space(const struct pull *p, struct error *err) {
    struct statvfs fs;
    uint64_t room;
    if (statvfs(p->folder.data, &fs) != 0) return true; // not known: then writing will tell
    if (__builtin_mul_overflow((uint64_t)fs.f_bavail, (uint64_t)fs.f_frsize, &room) || p->all_size <= room) return true;
    return error_set(err, "%s: not enough space in %s (from %s): %.1f GB are to be downloaded, %.1f GB are free",
                     p->options->model, p->hub->cache.data, p->hub->cache_from, (double)p->all_size / 1e9,
                     (double)room / 1e9);
}

static bool write_ref(const struct pull *p, struct error *err) {
    const char *revision = p->options->revision ? p->options->revision : "main", *commit = p->result->commit;
    if (strcmp(revision, commit) == 0) return true; // a commit needs no name
    struct buffer path = {0};
    bool ok = buffer_printf(&path, "%s/refs/%s", p->folder.data, revision) || out_of_memory(err);
    ok = ok && make_folders(path.data, err) && file_write(path.data, commit, strlen(commit), err);
    buffer_free(&path);
    return ok;
}

static bool pull_files(struct pull *p, struct error *err) {
    struct pull_result *r = p->result;
    struct buffer path = {0};
    bool *linked = arena_alloc_zero(&r->arena, r->n_files, sizeof *linked);
    bool ok = (linked && buffer_printf(&path, "%s/snapshots/%s", p->folder.data, r->commit)) || out_of_memory(err);
    r->path = ok ? arena_copy_text(&r->arena, path.data, path.len) : NULL;
    buffer_free(&path);
    if (!r->path) return out_of_memory(err);
    for (size_t i = 0; i < r->n_files; i++) {
        struct pull_file *f = &r->files[i];
        uint64_t more;
        if (!look_up(p, f, &linked[i], err)) return false;
        if (linked[i] || !f->has_size || f->present > f->size) continue;
        if (__builtin_add_overflow(p->all_size, f->size - f->present, &more))
            return error_set(err, "%s: the hub states impossible sizes", p->options->model);
        p->all_size = more;
    }
    if (!make_folders(r->path, err) || !check_space(p, err)) return false;
    for (size_t i = 0; i < r->n_files; i++)
        if (!linked[i] && (!fetch_blob(p, i, err) || !link_file(p, &r->files[i], err))) return false;
    return write_ref(p, err);
}

bool pull_model(const struct hub_settings *hub, const struct pull_options *options, struct pull_result *result,
                struct error *err) {
    struct pull p = {.hub = hub, .options = options, .result = result};
    struct http_options http = {.token = hub->token.len ? hub->token.data : NULL,
                                .ca_file = hub->ca_file,
                                .stall_s = hub->stall_s,
                                .stop = options->stop,
                                .log = options->log};
    struct error ours;
    if (!err) err = &ours; // a failed check says so before the second attempt
    *result = (struct pull_result){0};
    if (!hub_is_name(options->model))
        return error_set(err, "expected OWNER/NAME, as the hub calls a model, found \"%s\"", options->model);
    if (options->revision && !pull_name_is_safe(options->revision))
        return error_set(err, "expected a branch, a tag or a commit, found \"%s\"", options->revision);
    if (hub->offline) return error_set(err, "HF_HUB_OFFLINE is set: nothing is downloaded");
    bool ok =
        open_folders(&p, err) && (p.http = http_create(&http, err)) && ask_for_list(&p, err) && pull_files(&p, err);
    http_free(p.http);
    buffer_free(&p.folder);
    buffer_free(&p.locks);
    if (!ok) pull_result_free(result);
    return ok;
}
