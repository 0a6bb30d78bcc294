// oracle_weights.c: the oracle's own view of stored weights: each type's elements from the format's definition, and its
// own binding of a file's tensors by name. It shares neither with the engine, so that a mistake in either shows.
#include "model/oracle_parts.h"

#include "base/size.h"

#include <stdio.h>

// ---- Elements ------------------------------------------------------------------------------------------------------

// Element i of a block, as the GGUF specification and its reference dequantiser define it. The products are exact in
// f64; the one rounding to f32 is the definition's.

static double half_at(const unsigned char *p) {
    unsigned bits = p[0] | (unsigned)p[1] << 8, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double sign = bits >> 15 ? -1 : 1;
    if (exponent == 0) return sign * mantissa * 0x1p-24;
    if (exponent == 31) return mantissa ? (double)NAN : sign * (double)INFINITY;
    uint64_t u = (uint64_t)(exponent + 1008) << 52 | (uint64_t)mantissa << 42;
    double v;
    memcpy(&v, &u, sizeof v);
    return sign * v;
}

static int nibble(const unsigned char *q, size_t i) { // of 32 elements: the low halves of 16 bytes, then the high ones
    return i < 16 ? q[i] & 15 : q[i - 16] >> 4;
}

static int bit_of_word(const unsigned char *word, size_t i) {
    return word[i / 8] >> i % 8 & 1;
}

static double q8_0(const unsigned char *b, size_t i) { // d, 32 signed bytes
    return half_at(b) * (signed char)b[2 + i];
}

static double q4_0(const unsigned char *b, size_t i) { // d, nibbles
    return half_at(b) * (nibble(b + 2, i) - 8);
}

static double q4_1(const unsigned char *b, size_t i) { // d, m, nibbles
    return half_at(b) * nibble(b + 4, i) + half_at(b + 2);
}

static double q5_0(const unsigned char *b, size_t i) { // d, 32 fifth bits, nibbles
    return half_at(b) * (nibble(b + 6, i) + 16 * bit_of_word(b + 2, i) - 16);
}

static double q5_1(const unsigned char *b, size_t i) { // d, m, 32 fifth bits, nibbles
    return half_at(b) * (nibble(b + 8, i) + 16 * bit_of_word(b + 4, i)) + half_at(b + 2);
}

// The K types, superblocks of 256. Two bits of element i: four planes of 32 in each 32 bytes.
static int crumb(const unsigned char *q, size_t i) {
    return q[32 * (i / 128) + i % 32] >> 2 * (i % 128 / 32) & 3;
}

static double q2_k(const unsigned char *b, size_t i) { // scales [16], q [64], d, dmin
    int scale = b[i / 16];
    return half_at(b + 80) * (scale & 15) * crumb(b + 16, i) - half_at(b + 82) * (scale >> 4);
}

static double q3_k(const unsigned char *b, size_t i) { // third bits [32], q [64], scales [12], d
    const unsigned char *scales = b + 96;
    size_t g = i / 16;
    int low = g < 8 ? scales[g] & 15 : scales[g - 8] >> 4;
    int high = scales[8 + g % 4] >> 2 * (g / 4) & 3;
    int q = crumb(b + 32, i) + 4 * (b[i % 32] >> i / 32 & 1) - 4;
    return half_at(b + 108) * (low + 16 * high - 32) * q;
}

// Scale and minimum k of the eight of Q4_K and Q5_K: six bits each in 12 bytes.
static int scale_6(const unsigned char *s, size_t k) {
    return k < 4 ? s[k] & 63 : (s[k + 4] & 15) + 16 * (s[k - 4] >> 6);
}

static int min_6(const unsigned char *s, size_t k) {
    return k < 4 ? s[k + 4] & 63 : (s[k + 4] >> 4) + 16 * (s[k] >> 6);
}

static int nibble_of_64(const unsigned char *q, size_t i) { // 64 elements: low halves of 32 bytes, then high ones
    unsigned char byte = q[32 * (i / 64) + i % 32];
    return i % 64 < 32 ? byte & 15 : byte >> 4;
}

static double q4_k(const unsigned char *b, size_t i) { // d, dmin, scales [12], q [128]
    const unsigned char *s = b + 4;
    size_t k = i / 32;
    return half_at(b) * scale_6(s, k) * nibble_of_64(b + 16, i) - half_at(b + 2) * min_6(s, k);
}

static double q5_k(const unsigned char *b, size_t i) { // d, dmin, scales [12], fifth bits [32], q [128]
    const unsigned char *s = b + 4;
    size_t k = i / 32;
    int q = nibble_of_64(b + 48, i) + 16 * (b[16 + i % 32] >> k & 1);
    return half_at(b) * scale_6(s, k) * q - half_at(b + 2) * min_6(s, k);
}

static double q6_k(const unsigned char *b, size_t i) { // low nibbles [128], high crumbs [64], scales [16], d
    size_t at = i % 128;
    unsigned char byte = b[64 * (i / 128) + at % 64];
    int q = (at < 64 ? byte & 15 : byte >> 4) + 16 * crumb(b + 128, i) - 32;
    return half_at(b + 208) * (signed char)b[192 + i / 16] * q;
}

static double bf16_at(const unsigned char *p) {
    uint32_t u = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
    float f;
    memcpy(&f, &u, sizeof f);
    return (double)f;
}

static double f32_at(const unsigned char *p) {
    float f;
    memcpy(&f, p, sizeof f);
    return (double)f;
}

// Elements and bytes of a block; false: the type holds no weights.
static bool block_of(enum dtype type, size_t *elements, size_t *bytes) {
    static const struct {
        size_t elements, bytes;
    } blocks[DTYPE_COUNT] = {
        [DTYPE_F32] = {1, 4},      [DTYPE_F16] = {1, 2},      [DTYPE_BF16] = {1, 2},     [DTYPE_Q8_0] = {32, 34},
        [DTYPE_Q4_0] = {32, 18},   [DTYPE_Q4_1] = {32, 20},   [DTYPE_Q5_0] = {32, 22},   [DTYPE_Q5_1] = {32, 24},
        [DTYPE_Q2_K] = {256, 84},  [DTYPE_Q3_K] = {256, 110}, [DTYPE_Q4_K] = {256, 144}, [DTYPE_Q5_K] = {256, 176},
        [DTYPE_Q6_K] = {256, 210},
    };
    if ((unsigned)type >= DTYPE_COUNT || blocks[type].elements == 0) return false;
    *elements = blocks[type].elements;
    *bytes = blocks[type].bytes;
    return true;
}

#define EACH_ELEMENT(element)                                                                                          \
    for (size_t i = 0; i < n; i++) out[i] = (double)(float)element(src + i / length * bytes, i % length)

void oracle_elements(const struct oracle_matrix *w, size_t row, size_t first, double *out, size_t n) {
    size_t head = w->interleaved_head, length, bytes;
    if (head) {
        size_t c = row % head, half = head / 2;
        row = row - c + (c < half ? 2 * c : 2 * (c - half) + 1);
    }
    if (!block_of(w->m.type, &length, &bytes)) return; // oracle_matrix_check refused it
    const unsigned char *src = (const unsigned char *)w->m.data + row * w->m.row_bytes + first / length * bytes;
    switch (w->m.type) {
    case DTYPE_F32:
        for (size_t i = 0; i < n; i++) out[i] = f32_at(src + 4 * i);
        break;
    case DTYPE_F16:
        for (size_t i = 0; i < n; i++) out[i] = half_at(src + 2 * i);
        break;
    case DTYPE_BF16:
        for (size_t i = 0; i < n; i++) out[i] = bf16_at(src + 2 * i);
        break;
    case DTYPE_Q8_0: EACH_ELEMENT(q8_0); break;
    case DTYPE_Q4_0: EACH_ELEMENT(q4_0); break;
    case DTYPE_Q4_1: EACH_ELEMENT(q4_1); break;
    case DTYPE_Q5_0: EACH_ELEMENT(q5_0); break;
    case DTYPE_Q5_1: EACH_ELEMENT(q5_1); break;
    case DTYPE_Q2_K: EACH_ELEMENT(q2_k); break;
    case DTYPE_Q3_K: EACH_ELEMENT(q3_k); break;
    case DTYPE_Q4_K: EACH_ELEMENT(q4_k); break;
    case DTYPE_Q5_K: EACH_ELEMENT(q5_k); break;
    case DTYPE_Q6_K: EACH_ELEMENT(q6_k); break;
    default: break;
    }
}

bool oracle_matrix_check(const struct matrix *m, struct error *err) {
    size_t length, bytes, row;
    const char *name = m->name ? m->name : "(matrix)";
    if (!block_of(m->type, &length, &bytes))
        return error_set(err, "tensor %s: the oracle reads no weights of this type", name);
    if (m->n_in % length != 0 || !size_mul(m->n_in / length, bytes, &row) || m->row_bytes < row)
        return error_set(err, "tensor %s: %zu bytes are no row of %zu elements", name, m->row_bytes, m->n_in);
    return true;
}

bool oracle_row(const struct matrix *m, size_t row, double *out, struct error *err) {
    if (!oracle_matrix_check(m, err)) return false;
    if (row >= m->n_out)
        return error_set(err, "tensor %s: expected a row below %zu, found %zu", m->name, m->n_out, row);
    struct oracle_matrix w = {.m = *m};
    for (size_t first = 0; first < m->n_in; first += ORACLE_CHUNK)
        oracle_elements(&w, row, first, out + first, m->n_in - first < ORACLE_CHUNK ? m->n_in - first : ORACLE_CHUNK);
    return true;
}

// ---- Binding -------------------------------------------------------------------------------------------------------

struct binder {
    struct oracle_weights *w;
    const struct model *model;
    const struct tensor_set *set;
    bool gguf;
    struct error *err;
};

// The tensor of this name, Hugging Face's or GGUF's, with exactly this shape (columns 0: a vector).
static const struct tensor *find(const struct binder *b, const char *name, size_t rows, size_t columns) {
    const struct tensor *t = tensor_find(b->set, name);
    bool fits = t && t->shape[0] == rows && (columns ? t->rank == 2 && t->shape[1] == columns : t->rank == 1);
    if (!fits) error_set(b->err, "oracle: tensor %s is %s", name, t ? "of another shape" : "missing");
    return fits ? t : NULL;
}

static bool bind_matrix(const struct binder *b, const char *name, size_t n_out, size_t n_in,
                        struct oracle_matrix *out) {
    const struct tensor *t = find(b, name, n_out, n_in);
    if (!t) return false;
    size_t length, bytes;
    *out =
        (struct oracle_matrix){.m = {.name = t->name, .type = t->type, .n_out = n_out, .n_in = n_in, .data = t->data}};
    if (block_of(t->type, &length, &bytes)) out->m.row_bytes = n_in / length * bytes;
    return oracle_matrix_check(&out->m, b->err);
}

static bool bind_vector(struct binder *b, const char *name, size_t n, const float **out) {
    const struct tensor *t = find(b, name, n, 0);
    if (!t) return false;
    const unsigned char *src = t->data;
    float *v = arena_alloc(&b->w->arena, n, sizeof *v);
    if (!v) return error_set(b->err, "out of memory for tensor %s", name);
    switch (t->type) { // each is exact in f32
    case DTYPE_F32:
        for (size_t i = 0; i < n; i++) v[i] = (float)f32_at(src + 4 * i);
        break;
    case DTYPE_F16:
        for (size_t i = 0; i < n; i++) v[i] = (float)half_at(src + 2 * i);
        break;
    case DTYPE_BF16:
        for (size_t i = 0; i < n; i++) v[i] = (float)bf16_at(src + 2 * i);
        break;
    default: return error_set(b->err, "oracle: tensor %s: expected F32, F16 or BF16 for a vector", name);
    }
    *out = v;
    return true;
}

// A layer's tensors: the name's middle differs between the formats, the shape does not.
static bool bind_layer(struct binder *b, size_t layer) {
    const struct model_config *c = &b->model->config;
    struct oracle_layer *w = &b->w->layers[layer];
    size_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    struct {
        const char *hf, *gguf;
        size_t n_out, n_in; // n_in 0: a vector
        bool present;
        struct oracle_matrix *matrix;
        const float **vector;
    } parts[] = {
        {"input_layernorm.weight", "attn_norm.weight", c->hidden, 0, true, NULL, &w->attn_norm},
        {"self_attn.q_proj.weight", "attn_q.weight", q, c->hidden, true, &w->wq, NULL},
        {"self_attn.k_proj.weight", "attn_k.weight", kv, c->hidden, true, &w->wk, NULL},
        {"self_attn.v_proj.weight", "attn_v.weight", kv, c->hidden, true, &w->wv, NULL},
        {"self_attn.q_proj.bias", "attn_q.bias", q, 0, c->qkv_bias, NULL, &w->bq},
        {"self_attn.k_proj.bias", "attn_k.bias", kv, 0, c->qkv_bias, NULL, &w->bk},
        {"self_attn.v_proj.bias", "attn_v.bias", kv, 0, c->qkv_bias, NULL, &w->bv},
        {"self_attn.q_norm.weight", "attn_q_norm.weight", c->head_dim, 0, c->qk_norm, NULL, &w->q_norm},
        {"self_attn.k_norm.weight", "attn_k_norm.weight", c->head_dim, 0, c->qk_norm, NULL, &w->k_norm},
        {"self_attn.o_proj.weight", "attn_output.weight", c->hidden, q, true, &w->wo, NULL},
        {"post_attention_layernorm.weight", "ffn_norm.weight", c->hidden, 0, true, NULL, &w->mlp_norm},
        {"mlp.gate_proj.weight", "ffn_gate.weight", c->n_ff, c->hidden, true, &w->w_gate, NULL},
        {"mlp.up_proj.weight", "ffn_up.weight", c->n_ff, c->hidden, true, &w->w_up, NULL},
        {"mlp.down_proj.weight", "ffn_down.weight", c->hidden, c->n_ff, true, &w->w_down, NULL},
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        char name[96];
        if (!parts[i].present) continue;
        if (b->gguf) snprintf(name, sizeof name, "blk.%zu.%s", layer, parts[i].gguf);
        else snprintf(name, sizeof name, "model.layers.%zu.%s", layer, parts[i].hf);
        if (parts[i].matrix ? !bind_matrix(b, name, parts[i].n_out, parts[i].n_in, parts[i].matrix)
                            : !bind_vector(b, name, parts[i].n_out, parts[i].vector))
            return false;
    }
    if (b->gguf && c->arch == ARCH_LLAMA) w->wq.interleaved_head = w->wk.interleaved_head = c->head_dim;
    return true;
}

static bool bind_files(struct binder *b) {
    const struct model_config *c = &b->model->config;
    struct oracle_weights *w = b->w;
    if (!bind_matrix(b, b->gguf ? "token_embd.weight" : "model.embed_tokens.weight", c->n_vocab, c->hidden,
                     &w->embed) ||
        !bind_vector(b, b->gguf ? "output_norm.weight" : "model.norm.weight", c->hidden, &w->final_norm))
        return false;
    w->head = w->embed;
    if (!c->tied && !bind_matrix(b, b->gguf ? "output.weight" : "lm_head.weight", c->n_vocab, c->hidden, &w->head))
        return false;
    for (size_t i = 0; i < c->n_layers; i++)
        if (!bind_layer(b, i)) return false;
    return true;
}

// A model without files: what its own binding holds.
static bool bind_model(struct binder *b) {
    const struct model *m = b->model;
    struct oracle_weights *w = b->w;
    w->embed.m = m->embed;
    w->head.m = m->head;
    w->final_norm = m->final_norm;
    if (!oracle_matrix_check(&m->embed, b->err) || !oracle_matrix_check(&m->head, b->err)) return false;
    for (size_t i = 0; i < m->config.n_layers; i++) {
        const struct layer_weights *from = &m->layers[i];
        w->layers[i] = (struct oracle_layer){.attn_norm = from->attn_norm,
                                             .mlp_norm = from->mlp_norm,
                                             .wq.m = from->wq,
                                             .wk.m = from->wk,
                                             .wv.m = from->wv,
                                             .wo.m = from->wo,
                                             .w_gate.m = from->w_gate,
                                             .w_up.m = from->w_up,
                                             .w_down.m = from->w_down,
                                             .bq = from->bq,
                                             .bk = from->bk,
                                             .bv = from->bv,
                                             .q_norm = from->q_norm,
                                             .k_norm = from->k_norm};
        const struct matrix *all[] = {&from->wq,     &from->wk,   &from->wv,    &from->wo,
                                      &from->w_gate, &from->w_up, &from->w_down};
        for (size_t k = 0; k < sizeof all / sizeof all[0]; k++)
            if (!oracle_matrix_check(all[k], b->err)) return false;
    }
    return true;
}

bool oracle_weights_bind(struct oracle_weights *w, const struct model *model, struct error *err) {
    bool gguf = model->kind == MODEL_GGUF;
    struct binder b = {
        .w = w, .model = model, .set = gguf ? &model->gguf.tensors : &model->files, .gguf = gguf, .err = err};
    *w = (struct oracle_weights){0};
    w->layers = arena_alloc_zero(&w->arena, model->config.n_layers, sizeof *w->layers);
    if (!w->layers) return error_set(err, "out of memory for %zu layers", model->config.n_layers);
    return b.set->n > 0 ? bind_files(&b) : bind_model(&b);
}

void oracle_weights_free(struct oracle_weights *w) {
    arena_free(&w->arena);
    *w = (struct oracle_weights){0};
}
