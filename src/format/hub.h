// hub.h: from what the user calls MODEL to files on this disk.
//
// MODEL is an existing path (a folder in Hugging Face's layout, or a .gguf file), synthetic:SHAPE[:TYPE[:SEED]] (random
// weights, model/synthetic.h; `path` is then all of it), or OWNER/NAME, looked up in the
// Hugging Face cache: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub;
// models--OWNER--NAME/snapshots/COMMIT, the commit of refs/main. Nothing is downloaded here.
#ifndef TANDEM_FORMAT_HUB_H
#define TANDEM_FORMAT_HUB_H

#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>

enum model_kind { MODEL_FOLDER, MODEL_GGUF, MODEL_SYNTHETIC };

// Fills `path` (replaced) with the folder or file. An error lists what was tried.
bool hub_resolve(const char *model, enum model_kind *kind, struct buffer *path, struct error *err);

#endif
