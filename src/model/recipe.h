// recipe.h: which type each weight of a quantised model gets, by the names that GGUF files are known by (q8_0, q4_k_m
// ...).
//
// The mixes are llama.cpp's (its src/llama-quant.cpp, without an importance matrix): the head in 6 bits, and the value
// and down projections of some layers in more bits than the rest. A pure recipe gives every matrix the one type.
// Vectors stay f32. A row that does not fill whole blocks of 256 gets a type with blocks of 32, as there.
#ifndef TANDEM_MODEL_RECIPE_H
#define TANDEM_MODEL_RECIPE_H

#include "model/config.h"
#include "model/names.h"

struct recipe {
    const char *name;   // "q4_k_m"
    enum dtype base;    // of most matrices
    uint32_t file_type; // GGUF's general.file_type
};

const struct recipe *recipe_find(const char *name, struct error *err); // case-insensitive; NULL with the list of names
const char *recipe_names(void);

// The type of one matrix with rows of n_in elements.
enum dtype recipe_type(const struct recipe *recipe, bool pure, const struct model_config *config, enum weight_part part,
                       size_t layer, size_t n_in);

#endif
