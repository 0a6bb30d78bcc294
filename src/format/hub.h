// hub.h: from what the user calls MODEL to files on this disk, and what the environment says about the Hugging Face
// hub.
//
// MODEL is an existing path (a folder in Hugging Face's layout, or a .gguf file), synthetic:SHAPE[:TYPE[:SEED]] (random
// weights, model/synthetic.h; `path` is then all of it), or OWNER/NAME, looked up in the
// Hugging Face cache: HF_HUB_CACHE, else HF_HOME/hub, else $XDG_CACHE_HOME/huggingface/hub, else
// ~/.cache/huggingface/hub; models--OWNER--NAME/snapshots/COMMIT, the commit of refs/main. A snapshot that holds no
// safetensors but one GGUF file is that file. Nothing is downloaded here: that is pull.h.
#ifndef TANDEM_FORMAT_HUB_H
#define TANDEM_FORMAT_HUB_H

#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>

enum model_kind { MODEL_FOLDER, MODEL_GGUF, MODEL_SYNTHETIC };

// Fills `path` (replaced) with the folder or file. An error lists what was tried.
bool hub_resolve(const char *model, enum model_kind *kind, struct buffer *path, struct error *err);

// Is it OWNER/NAME, in the hub's letters?
bool hub_is_name(const char *model);

// Appends the folder of what tandem itself keeps: $XDG_CACHE_HOME/tandem, else ~/.cache/tandem. False: neither variable
// is set.
bool hub_own_cache(struct buffer *path);

// What the variables of huggingface_hub say. All zero can be freed.
struct hub_settings {
    struct buffer endpoint; // HF_ENDPOINT, else https://huggingface.co; no '/' at the end
    struct buffer cache;    // the cache's root
    const char *cache_from; // the variable that says so
    struct buffer token;    // HF_TOKEN, else what the file HF_TOKEN_PATH (HF_HOME/token) holds; empty: none
    struct buffer token_path;
    const char *ca_file; // SSL_CERT_FILE; NULL: the system's certificates
    double stall_s;      // HF_HUB_DOWNLOAD_TIMEOUT: seconds without a byte after which a connection counts as dead
    bool offline;        // HF_HUB_OFFLINE
};
bool hub_settings_read(struct hub_settings *s, struct error *err);
void hub_settings_free(struct hub_settings *s);

#endif
