// names.h: what each weight is called in a Hugging Face folder and in GGUF, and its shape in a config. It reads no
// files.
#ifndef TANDEM_MODEL_NAMES_H
#define TANDEM_MODEL_NAMES_H

#include "format/hub.h"
#include "model/config.h"

#include <stdbool.h>
#include <stddef.h>

enum weight_part {
    PART_EMBED,
    PART_HEAD,
    PART_FINAL_NORM,
    PART_ATTN_NORM, // from here on: one of each layer
    PART_WQ,
    PART_WK,
    PART_WV,
    PART_BQ,
    PART_BK,
    PART_BV,
    PART_Q_NORM,
    PART_K_NORM,
    PART_WO,
    PART_MLP_NORM,
    PART_GATE,
    PART_UP,
    PART_DOWN,
    PART_COUNT
};

enum { WEIGHT_NAME_SIZE = 96 };

// "blk.3.attn_q.weight" (MODEL_GGUF) or "model.layers.3.self_attn.q_proj.weight" (any other kind).
void weight_name(enum model_kind kind, enum weight_part part, size_t layer, char *name, size_t size);

// The other way round: which part and layer a tensor's name means; false for any other name.
bool weight_from_name(enum model_kind kind, const char *name, enum weight_part *part, size_t *layer);

bool weight_is_layered(enum weight_part part);

// Rows and columns (0: a vector); false when this config has no such weight.
bool weight_shape(const struct model_config *config, enum weight_part part, size_t *rows, size_t *columns);

#endif
