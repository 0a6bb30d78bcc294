// pull.h: downloading a model from the hub into the Hugging Face cache, in the layout that huggingface_hub keeps:
//
//   models--OWNER--NAME/blobs/ETAG               a file's bytes, under the hub's name for them
//   models--OWNER--NAME/snapshots/COMMIT/PATH    a relative link to its blob
//   models--OWNER--NAME/refs/REVISION            the commit that a branch or tag means; written last
//   .locks/models--OWNER--NAME/ETAG.lock         held while a blob is written
//
// A blob is ETAG.incomplete until its bytes are all there, are what the hub's digest says (SHA-256 of a large file,
// git's name of a small one) and are on the disk; a later call goes on where that file ends. So nothing of an
// interrupted download is ever seen as a model, and nothing of it is lost.
#ifndef TANDEM_FORMAT_PULL_H
#define TANDEM_FORMAT_PULL_H

#include "base/arena.h"
#include "base/error.h"
#include "base/log.h"
#include "format/hub.h"

#include <jansson.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum pull_source { PULL_CACHED, PULL_FETCHED, PULL_RESUMED };

struct pull_file {
    const char *name; // its path in the repository, checked by pull_name_is_safe
    const char *etag; // checked to be a file name
    bool has_size;
    uint64_t size;
    uint64_t fetched; // bytes that came over the network
    uint64_t present; // bytes that an earlier call left
    enum pull_source source;
};

// All zero can be freed.
struct pull_result {
    const char *commit;
    const char *path;        // the snapshot's folder
    struct pull_file *files; // [n_files]
    size_t n_files;
    struct arena arena;
};
void pull_result_free(struct pull_result *r);

struct pull_progress {
    const char *file;
    size_t index, n_files;
    uint64_t done, size;         // of this file; size 0: not known
    uint64_t all_done, all_size; // of what this call downloads
    bool checking;               // reading what an earlier call left, not downloading
    bool finished;               // this file is complete
    enum pull_source source;     // with finished
};

struct pull_options {
    const char *model;           // OWNER/NAME
    const char *revision;        // branch, tag or commit; NULL: main
    const char *const *includes; // [n_includes] globs of paths, '*' matches '/' too; none: what tandem needs
    size_t n_includes;
    const struct log *log;
    void (*progress)(void *user, const struct pull_progress *p); // may be NULL
    void *user;
    const atomic_bool *stop; // ends the call, with an error, within a second
};

bool pull_model(const struct hub_settings *hub, const struct pull_options *options, struct pull_result *result,
                struct error *err);

// ---- For tests ----------------------------------------------------------------------------------------------------

// A relative path that stays inside its folder: no empty, "." or ".." part, no backslash, no control character, and
// short enough for a file system.
bool pull_name_is_safe(const char *name);

// Which files of a repository's description (the hub's /api/models/OWNER/NAME/revision/REVISION) to download: names
// into r->files, their copies in r->arena; also r->commit. Errors say what the repository has instead.
bool pull_choose(const json_t *info, const struct pull_options *options, struct pull_result *r, struct error *err);

#endif
