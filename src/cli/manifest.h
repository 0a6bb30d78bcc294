// manifest.h: the record of a run that `run --manifest` writes and `replay` reads (docs/REPLAY.md).
#ifndef TANDEM_CLI_MANIFEST_H
#define TANDEM_CLI_MANIFEST_H

#include "cli/cli.h"

#include <jansson.h>

enum { MANIFEST_FORMAT = 1 };

// What the numbers of a run can depend on: model, tokenizer, template, build and run. `model` is what the user named.
// Hashes whole files on the engine's threads. NULL (with err) on failure.
json_t *manifest_identity(const tandem_engine *engine, const char *model, struct error *err);

struct manifest_run {
    const char *model;
    const struct cli_sampling *sampling;
    const struct token_ids *prompt, *tokens;
    const char *finish;
    uint64_t hash; // of all logits that tokens were sampled from
};

// Writes the manifest of a run.
bool manifest_write(const char *path, const tandem_engine *engine, const struct manifest_run *run, struct error *err);

// Appends {"field", "then", "now"} to `changes` for every leaf in which two identities differ. Paths of files are no
// difference.
void manifest_compare(const json_t *then, const json_t *now, json_t *changes);

#endif
