// names.c: see names.h.
#include "model/names.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// %zu is the layer.
static const struct {
    const char *hf, *gguf;
} names[PART_COUNT] = {
    [PART_EMBED] = {"model.embed_tokens.weight", "token_embd.weight"},
    [PART_HEAD] = {"lm_head.weight", "output.weight"},
    [PART_FINAL_NORM] = {"model.norm.weight", "output_norm.weight"},
    [PART_ATTN_NORM] = {"model.layers.%zu.input_layernorm.weight", "blk.%zu.attn_norm.weight"},
    [PART_WQ] = {"model.layers.%zu.self_attn.q_proj.weight", "blk.%zu.attn_q.weight"},
    [PART_WK] = {"model.layers.%zu.self_attn.k_proj.weight", "blk.%zu.attn_k.weight"},
    [PART_WV] = {"model.layers.%zu.self_attn.v_proj.weight", "blk.%zu.attn_v.weight"},
    [PART_BQ] = {"model.layers.%zu.self_attn.q_proj.bias", "blk.%zu.attn_q.bias"},
    [PART_BK] = {"model.layers.%zu.self_attn.k_proj.bias", "blk.%zu.attn_k.bias"},
    [PART_BV] = {"model.layers.%zu.self_attn.v_proj.bias", "blk.%zu.attn_v.bias"},
    [PART_Q_NORM] = {"model.layers.%zu.self_attn.q_norm.weight", "blk.%zu.attn_q_norm.weight"},
    [PART_K_NORM] = {"model.layers.%zu.self_attn.k_norm.weight", "blk.%zu.attn_k_norm.weight"},
    [PART_WO] = {"model.layers.%zu.self_attn.o_proj.weight", "blk.%zu.attn_output.weight"},
    [PART_MLP_NORM] = {"model.layers.%zu.post_attention_layernorm.weight", "blk.%zu.ffn_norm.weight"},
    [PART_GATE] = {"model.layers.%zu.mlp.gate_proj.weight", "blk.%zu.ffn_gate.weight"},
    [PART_UP] = {"model.layers.%zu.mlp.up_proj.weight", "blk.%zu.ffn_up.weight"},
    [PART_DOWN] = {"model.layers.%zu.mlp.down_proj.weight", "blk.%zu.ffn_down.weight"},
};

bool weight_is_layered(enum weight_part part) {
    return part >= PART_ATTN_NORM;
}

void weight_name(enum model_kind kind, enum weight_part part, size_t layer, char *name, size_t size) {
    const char *pattern = kind == MODEL_GGUF ? names[part].gguf : names[part].hf;
    const char *mark = strstr(pattern, "%zu");
    if (!mark) snprintf(name, size, "%s", pattern);
    else snprintf(name, size, "%.*s%zu%s", (int)(mark - pattern), pattern, layer, mark + 3);
}

bool weight_from_name(enum model_kind kind, const char *name, enum weight_part *part, size_t *layer) {
    const char *number = strpbrk(name, "0123456789");
    size_t n = number ? (size_t)strtoull(number, NULL, 10) : 0;
    char candidate[WEIGHT_NAME_SIZE];
    for (int i = 0; i < PART_COUNT; i++) {
        weight_name(kind, (enum weight_part)i, n, candidate, sizeof candidate);
        if (strcmp(candidate, name) != 0) continue;
        *part = (enum weight_part)i;
        *layer = n;
        return true;
    }
    return false;
}

bool weight_shape(const struct model_config *c, enum weight_part part, size_t *rows, size_t *columns) {
    size_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    *columns = 0;
    switch (part) {
    case PART_EMBED: *rows = c->n_vocab, *columns = c->hidden; return true;
    case PART_HEAD: *rows = c->n_vocab, *columns = c->hidden; return !c->tied;
    case PART_FINAL_NORM:
    case PART_ATTN_NORM:
    case PART_MLP_NORM: *rows = c->hidden; return true;
    case PART_WQ: *rows = q, *columns = c->hidden; return true;
    case PART_WK:
    case PART_WV: *rows = kv, *columns = c->hidden; return true;
    case PART_BQ: *rows = q; return c->qkv_bias;
    case PART_BK:
    case PART_BV: *rows = kv; return c->qkv_bias;
    case PART_Q_NORM:
    case PART_K_NORM: *rows = c->head_dim; return c->qk_norm;
    case PART_WO: *rows = c->hidden, *columns = q; return true;
    case PART_GATE:
    case PART_UP: *rows = c->n_ff, *columns = c->hidden; return true;
    case PART_DOWN: *rows = c->hidden, *columns = c->n_ff; return true;
    case PART_COUNT: break;
    }
    return false;
}
