// recipe.c: see recipe.h.
#include "model/recipe.h"

#include <string.h>
#include <strings.h>

// The numbers are llama.cpp's enum llama_ftype.
static const struct recipe recipes[] = {
    {"f32", DTYPE_F32, 0},      {"f16", DTYPE_F16, 1},      {"bf16", DTYPE_BF16, 32},   {"q8_0", DTYPE_Q8_0, 7},
    {"q4_0", DTYPE_Q4_0, 2},    {"q4_1", DTYPE_Q4_1, 3},    {"q5_0", DTYPE_Q5_0, 8},    {"q5_1", DTYPE_Q5_1, 9},
    {"q2_k", DTYPE_Q2_K, 10},   {"q3_k_s", DTYPE_Q3_K, 11}, {"q3_k_m", DTYPE_Q3_K, 12}, {"q3_k_l", DTYPE_Q3_K, 13},
    {"q4_k_s", DTYPE_Q4_K, 14}, {"q4_k_m", DTYPE_Q4_K, 15}, {"q5_k_s", DTYPE_Q5_K, 16}, {"q5_k_m", DTYPE_Q5_K, 17},
    {"q6_k", DTYPE_Q6_K, 18},
};
enum { N_RECIPES = sizeof recipes / sizeof recipes[0] };

const char *recipe_names(void) {
    return "f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, "
           "q5_k_m, "
           "q6_k";
}

const struct recipe *recipe_find(const char *name, struct error *err) {
    for (int i = 0; i < N_RECIPES; i++)
        if (strcasecmp(recipes[i].name, name) == 0) return &recipes[i];
    // The plain names of the K types mean the medium mixes, as in llama.cpp.
    static const char *const medium[] = {"q3_k", "q3_k_m", "q4_k", "q4_k_m", "q5_k", "q5_k_m"};
    for (int i = 0; i < 6; i += 2)
        if (strcasecmp(medium[i], name) == 0) return recipe_find(medium[i + 1], err);
    error_set(err, "type \"%.40s\": expected one of %s", name, recipe_names());
    return NULL;
}

// The layers whose value and down projections get more bits: the first and last eighth, and every third between.
static bool more_bits(size_t layer, size_t n) {
    return layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2;
}

static enum dtype value_type(const struct recipe *r, const struct model_config *c, size_t layer) {
    switch (r->file_type) {
    case 10: return c->n_heads / c->n_kv_heads >= 4 ? DTYPE_Q4_K : DTYPE_Q3_K;
    case 12: return layer < 2 ? DTYPE_Q5_K : DTYPE_Q4_K;
    case 13: return DTYPE_Q5_K;
    case 14: return layer < 4 ? DTYPE_Q5_K : r->base;
    case 15:
    case 17: return more_bits(layer, c->n_layers) ? DTYPE_Q6_K : r->base;
    default: return r->base;
    }
}

static enum dtype down_type(const struct recipe *r, const struct model_config *c, size_t layer) {
    switch (r->file_type) {
    case 10: return DTYPE_Q3_K;
    case 12: return layer < c->n_layers / 16 ? DTYPE_Q5_K : DTYPE_Q4_K;
    case 13: return DTYPE_Q5_K;
    case 14: return layer < c->n_layers / 8 ? DTYPE_Q5_K : r->base;
    case 15:
    case 17: return more_bits(layer, c->n_layers) ? DTYPE_Q6_K : r->base;
    default: return r->base;
    }
}

static enum dtype output_type(const struct recipe *r) {
    switch (r->file_type) {
    case 10: return DTYPE_Q3_K;
    case 12: return DTYPE_Q4_K;
    case 13: return DTYPE_Q5_K;
    default: return r->base;
    }
}

static enum dtype choose(const struct recipe *r, const struct model_config *c, enum weight_part part, size_t layer) {
    if (!dtype_info(r->base)->is_quantised || r->base == DTYPE_Q8_0) return r->base;
    switch (part) {
    case PART_HEAD: return DTYPE_Q6_K;
    case PART_EMBED: return c->tied ? DTYPE_Q6_K : r->base;
    case PART_WV: return value_type(r, c, layer);
    case PART_DOWN: return down_type(r, c, layer);
    case PART_WO: return output_type(r);
    default: return r->base;
    }
}

// A type for rows that are no whole number of the wanted one's blocks.
static enum dtype fall_back(enum dtype type, size_t n_in) {
    if (n_in % dtype_info(type)->block_len == 0) return type;
    if (n_in % 32 != 0) return DTYPE_F16;
    switch (type) {
    case DTYPE_Q2_K:
    case DTYPE_Q3_K: return DTYPE_Q4_0;
    case DTYPE_Q4_K: return DTYPE_Q5_0;
    case DTYPE_Q5_K: return DTYPE_Q5_1;
    default: return DTYPE_Q8_0;
    }
}

enum dtype recipe_type(const struct recipe *r, bool pure, const struct model_config *c, enum weight_part part,
                       size_t layer, size_t n_in) {
    return fall_back(pure ? r->base : choose(r, c, part, layer), n_in);
}
