// config.c: reading and checking a model's configuration; see config.h. It owns no weights.
#include "model/config.h"

#include "format/json.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_LAYERS = 1024, MAX_WIDTH = 1 << 20, MAX_HEADS = 4096, MAX_HEAD_DIM = 512, MAX_VOCAB = 1 << 24 };
enum { MAX_CONTEXT = 1 << 24 };

static const struct {
    enum arch arch;
    const char *type;     // config.json's model_type and GGUF's general.architecture
    const char *hf_class; // config.json's architectures[0]
} families[] = {
    {ARCH_QWEN3, "qwen3", "Qwen3ForCausalLM"},
    {ARCH_QWEN2, "qwen2", "Qwen2ForCausalLM"},
    {ARCH_LLAMA, "llama", "LlamaForCausalLM"},
};
enum { N_FAMILIES = sizeof families / sizeof families[0] };

const char *arch_name(enum arch arch) {
    for (int i = 0; i < N_FAMILIES; i++)
        if (families[i].arch == arch) return families[i].type;
    return "?";
}

static bool unsupported_arch(const char *found, struct error *err) {
    return error_set(err,
                     "unsupported architecture \"%s\"; supported: qwen3 (Qwen3ForCausalLM), qwen2 (Qwen2ForCausalLM), "
                     "llama (LlamaForCausalLM)",
                     found);
}

static void set_family(struct model_config *c, enum arch arch) {
    c->arch = arch;
    c->qk_norm = arch == ARCH_QWEN3;
    c->qkv_bias = arch == ARCH_QWEN2;
}

// What must hold between the numbers, whatever file they came from.
static bool check(const struct model_config *c, struct error *err) {
    const char *w = c->source;
    if (c->n_heads % c->n_kv_heads != 0)
        return error_set(err, "%s: %zu attention heads are no multiple of %zu KV heads", w, c->n_heads, c->n_kv_heads);
    if (c->head_dim % 2 != 0) return error_set(err, "%s: head_dim: expected an even number, found %zu", w, c->head_dim);
    if (!(c->rms_eps > 0 && c->rms_eps < 1))
        return error_set(err, "%s: RMSNorm epsilon: expected a number between 0 and 1, found %g", w, c->rms_eps);
    if (!(c->rope.theta >= 1 && c->rope.theta <= 1e12))
        return error_set(err, "%s: rope_theta: expected 1 to 1e12, found %g", w, c->rope.theta);
    if (c->rope.scaling == ROPE_PLAIN) return true;
    const struct rope_config *r = &c->rope;
    if (!(r->factor >= 1 && r->factor <= 1e6))
        return error_set(err, "%s: RoPE scaling factor: expected 1 to 1e6, found %g", w, r->factor);
    if (r->scaling != ROPE_LINEAR && !(r->original_context >= 1 && r->original_context <= MAX_CONTEXT))
        return error_set(err, "%s: RoPE scaling's original context: expected 1 to %d, found %g", w, MAX_CONTEXT,
                         r->original_context);
    if (r->scaling == ROPE_LLAMA3 && !(r->low_freq_factor > 0 && r->high_freq_factor > r->low_freq_factor))
        return error_set(err, "%s: RoPE scaling: expected 0 < low_freq_factor < high_freq_factor, found %g and %g", w,
                         r->low_freq_factor, r->high_freq_factor);
    if (r->scaling == ROPE_YARN && !(r->beta_slow > 0 && r->beta_fast > r->beta_slow))
        return error_set(err, "%s: RoPE scaling: expected 0 < beta_slow < beta_fast, found %g and %g", w, r->beta_slow,
                         r->beta_fast);
    if (r->scaling == ROPE_YARN && !(r->attn_factor >= 0 && r->attn_factor < 100))
        return error_set(err, "%s: RoPE scaling: attention_factor: expected 0 to 100, found %g", w, r->attn_factor);
    return true;
}

// ---- config.json --------------------------------------------------------------------------------------------------

static const char where[] = "config.json";

// A required (or, with `fallback`, optional) size in [1, max].
static bool read_size(const json_t *o, const char *key, int64_t max, const size_t *fallback, size_t *out,
                      struct error *err) {
    int64_t n = fallback ? (int64_t)*fallback : 0;
    if (!json_read_int(o, where, key, 1, max, &n, err)) return false;
    if (n == 0) return error_set(err, "%s: %s is missing", where, key);
    *out = (size_t)n;
    return true;
}

static bool read_token_ids(const json_t *o, const char *file, const char *key, int32_t *ids, size_t *n,
                           struct error *err) {
    const json_t *v = json_object_get(o, key);
    *n = 0;
    if (!v || json_is_null(v)) return true;
    size_t count = json_is_array(v) ? json_array_size(v) : 1;
    if (count > MAX_EOS) return error_set(err, "%s: %s: expected at most %d ids, found %zu", file, key, MAX_EOS, count);
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= MAX_VOCAB)
            return error_set(err, "%s: %s: expected a token id or a list of ids from 0 to %d", file, key,
                             MAX_VOCAB - 1);
        ids[i] = (int32_t)json_integer_value(id);
    }
    *n = count;
    return true;
}

static bool read_rope_scaling(const json_t *o, struct model_config *c, struct error *err) {
    struct rope_config *r = &c->rope;
    const char *type = NULL;
    if (!json_read_text(o, "config.json: rope_scaling", "type", &type, err) ||
        !json_read_text(o, "config.json: rope_scaling", "rope_type", &type, err))
        return false;
    if (!type || strcmp(type, "default") == 0) return true;
    if (strcmp(type, "linear") == 0) r->scaling = ROPE_LINEAR;
    else if (strcmp(type, "yarn") == 0) r->scaling = ROPE_YARN;
    else if (strcmp(type, "llama3") == 0) r->scaling = ROPE_LLAMA3;
    else
        return error_set(err, "%s: rope_scaling: unsupported type \"%s\"; supported: default, linear, yarn, llama3",
                         where, type);
    r->original_context = (double)c->context;
    r->beta_fast = 32;
    r->beta_slow = 1;
    static const char in[] = "config.json: rope_scaling";
    return json_read_number(o, in, "factor", &r->factor, err) &&
           json_read_number(o, in, "original_max_position_embeddings", &r->original_context, err) &&
           json_read_number(o, in, "beta_fast", &r->beta_fast, err) &&
           json_read_number(o, in, "beta_slow", &r->beta_slow, err) &&
           json_read_number(o, in, "attention_factor", &r->attn_factor, err) &&
           json_read_number(o, in, "low_freq_factor", &r->low_freq_factor, err) &&
           json_read_number(o, in, "high_freq_factor", &r->high_freq_factor, err);
}

static bool read_rope(const json_t *o, struct model_config *c, struct error *err) {
    c->rope = (struct rope_config){.theta = 10000, .factor = 0};
    if (!json_read_number(o, where, "rope_theta", &c->rope.theta, err)) return false;
    // transformers 5 keeps theta and scaling together in rope_parameters.
    static const char *const keys[] = {"rope_scaling", "rope_parameters"};
    for (int i = 0; i < 2; i++) {
        const json_t *scaling = json_object_get(o, keys[i]);
        if (!scaling || json_is_null(scaling)) continue;
        if (!json_is_object(scaling)) return error_set(err, "%s: %s: expected an object or null", where, keys[i]);
        if (!json_read_number(scaling, where, "rope_theta", &c->rope.theta, err)) return false;
        if (!read_rope_scaling(scaling, c, err)) return false;
    }
    return true;
}

static bool read_family(const json_t *o, struct model_config *c, struct error *err) {
    const json_t *list = json_object_get(o, "architectures");
    const char *name = json_is_array(list) ? json_string_value(json_array_get(list, 0)) : NULL;
    const char *type = NULL;
    if (!json_read_text(o, where, "model_type", &type, err)) return false;
    if (!name && !type) return error_set(err, "%s: neither architectures nor model_type says what the model is", where);
    for (int i = 0; i < N_FAMILIES; i++) {
        if (name ? strcmp(name, families[i].hf_class) == 0 : strcmp(type, families[i].type) == 0) {
            set_family(c, families[i].arch);
            return true;
        }
    }
    return unsupported_arch(name ? name : type, err);
}

// Features that would change the numbers and that tandem lacks: refused rather than ignored.
static bool refuse_unsupported(const json_t *o, const struct model_config *c, struct error *err) {
    const char *act = "silu";
    bool bias = false, mlp_bias = false, window = false;
    if (!json_read_text(o, where, "hidden_act", &act, err) || !json_read_bool(o, where, "attention_bias", &bias, err) ||
        !json_read_bool(o, where, "mlp_bias", &mlp_bias, err) ||
        !json_read_bool(o, where, "use_sliding_window", &window, err))
        return false;
    if (strcmp(act, "silu") != 0)
        return error_set(err, "%s: hidden_act: expected \"silu\", found \"%s\" (no other activation is supported)",
                         where, act);
    if (bias && c->arch != ARCH_QWEN2)
        return error_set(err, "%s: attention_bias is true: not supported for %s", where, arch_name(c->arch));
    if (mlp_bias) return error_set(err, "%s: mlp_bias is true: not supported", where);
    if (window) return error_set(err, "%s: use_sliding_window is true: not supported", where);
    const json_t *quant = json_object_get(o, "quantization_config");
    if (quant && !json_is_null(quant))
        return error_set(
            err,
            "%s: quantization_config: quantised safetensors are not supported; use the unquantised model or "
            "a GGUF file",
            where);
    return true;
}

bool model_config_from_json(const json_t *o, struct model_config *c, struct error *err) {
    *c = (struct model_config){.bos = -1, .rms_eps = 1e-6};
    snprintf(c->source, sizeof c->source, "%s", where);
    if (!json_is_object(o)) return error_set(err, "%s: expected an object", where);
    if (!read_family(o, c, err) || !refuse_unsupported(o, c, err)) return false;
    static const size_t default_context = 2048;
    if (!read_size(o, "num_hidden_layers", MAX_LAYERS, NULL, &c->n_layers, err) ||
        !read_size(o, "hidden_size", MAX_WIDTH, NULL, &c->hidden, err) ||
        !read_size(o, "num_attention_heads", MAX_HEADS, NULL, &c->n_heads, err) ||
        !read_size(o, "num_key_value_heads", MAX_HEADS, &c->n_heads, &c->n_kv_heads, err) ||
        !read_size(o, "intermediate_size", MAX_WIDTH, NULL, &c->n_ff, err) ||
        !read_size(o, "vocab_size", MAX_VOCAB, NULL, &c->n_vocab, err) ||
        !read_size(o, "max_position_embeddings", MAX_CONTEXT, &default_context, &c->context, err))
        return false;
    if (!json_object_get(o, "head_dim") && c->hidden % c->n_heads != 0)
        return error_set(err, "%s: hidden_size %zu is no multiple of %zu attention heads, and head_dim is missing",
                         where, c->hidden, c->n_heads);
    // Qwen3's own default is 128 whatever the width; the others divide the width by the heads.
    size_t head_dim = c->arch == ARCH_QWEN3 ? 128 : c->hidden / c->n_heads;
    if (!read_size(o, "head_dim", MAX_HEAD_DIM, &head_dim, &c->head_dim, err)) return false;
    if (c->head_dim > MAX_HEAD_DIM)
        return error_set(err, "%s: head_dim: expected at most %d, found %zu", where, MAX_HEAD_DIM, c->head_dim);
    int32_t bos[MAX_EOS];
    size_t n_bos;
    if (!json_read_number(o, where, "rms_norm_eps", &c->rms_eps, err) ||
        !json_read_bool(o, where, "tie_word_embeddings", &c->tied, err) || !read_rope(o, c, err) ||
        !read_token_ids(o, where, "bos_token_id", bos, &n_bos, err) ||
        !read_token_ids(o, where, "eos_token_id", c->eos, &c->n_eos, err))
        return false;
    if (n_bos) c->bos = bos[0];
    return check(c, err);
}

bool generation_config_from_json(const json_t *o, struct generation_config *g, struct error *err) {
    static const char file[] = "generation_config.json";
    *g = (struct generation_config){0};
    if (!json_is_object(o)) return error_set(err, "%s: expected an object", file);
    double nothing = nan("");
    g->temperature.value = g->top_k.value = g->top_p.value = g->min_p.value = g->repetition_penalty.value = nothing;
    if (!json_read_number(o, file, "temperature", &g->temperature.value, err) ||
        !json_read_number(o, file, "top_k", &g->top_k.value, err) ||
        !json_read_number(o, file, "top_p", &g->top_p.value, err) ||
        !json_read_number(o, file, "min_p", &g->min_p.value, err) ||
        !json_read_number(o, file, "repetition_penalty", &g->repetition_penalty.value, err) ||
        !json_read_bool(o, file, "do_sample", &g->do_sample, err) ||
        !read_token_ids(o, file, "eos_token_id", g->eos, &g->n_eos, err))
        return false;
    g->do_sample_set = json_is_boolean(json_object_get(o, "do_sample"));
    g->temperature.set = !isnan(g->temperature.value);
    g->top_k.set = !isnan(g->top_k.value);
    g->top_p.set = !isnan(g->top_p.value);
    g->min_p.set = !isnan(g->min_p.value);
    g->repetition_penalty.set = !isnan(g->repetition_penalty.value);
    if ((g->temperature.set && !(g->temperature.value >= 0 && g->temperature.value <= 100)) ||
        (g->top_k.set && !(g->top_k.value >= 0 && g->top_k.value <= MAX_VOCAB)) ||
        (g->top_p.set && !(g->top_p.value >= 0 && g->top_p.value <= 1)) ||
        (g->min_p.set && !(g->min_p.value >= 0 && g->min_p.value <= 1)) ||
        (g->repetition_penalty.set && !(g->repetition_penalty.value > 0 && g->repetition_penalty.value <= 100)))
        return error_set(
            err,
            "%s: a sampling value is out of range (temperature 0 to 100, top_k 0 to 2^24, top_p and min_p 0 "
            "to 1, repetition_penalty above 0)",
            file);
    return true;
}

// ---- GGUF metadata ------------------------------------------------------------------------------------------------

// "ARCH.suffix" into `key`.
static const char *arch_key(const struct model_config *c, const char *suffix, char *key, size_t size) {
    snprintf(key, size, "%s.%s", arch_name(c->arch), suffix);
    return key;
}

static bool gguf_size(const struct gguf *g, const struct model_config *c, const char *suffix, size_t max,
                      const size_t *fallback, size_t *out, struct error *err) {
    char key[128];
    arch_key(c, suffix, key, sizeof key);
    if (fallback && !gguf_find(g, key)) {
        *out = *fallback;
        return true;
    }
    uint32_t n;
    if (!gguf_get_u32(g, key, &n, err)) return false;
    if (n < 1 || n > max) return error_set(err, "%s: expected 1 to %zu, found %u", key, max, n);
    *out = n;
    return true;
}

static bool gguf_number(const struct gguf *g, const struct model_config *c, const char *suffix, double *out,
                        struct error *err) {
    char key[128];
    arch_key(c, suffix, key, sizeof key);
    return !gguf_find(g, key) || gguf_get_f64(g, key, out, err);
}

static bool string_is(struct gguf_string s, const char *text) {
    return s.len == strlen(text) && memcmp(s.data, text, s.len) == 0;
}

static bool gguf_rope(const struct gguf *g, struct model_config *c, struct error *err) {
    struct rope_config *r = &c->rope;
    *r = (struct rope_config){.theta = 10000, .beta_fast = 32, .beta_slow = 1, .original_context = (double)c->context};
    if (!gguf_number(g, c, "rope.freq_base", &r->theta, err)) return false;
    char key[128];
    if (!gguf_find(g, arch_key(c, "rope.scaling.type", key, sizeof key))) return true;
    struct gguf_string type;
    if (!gguf_get_string(g, key, &type, err)) return false;
    if (string_is(type, "none")) return true;
    if (string_is(type, "linear")) r->scaling = ROPE_LINEAR;
    else if (string_is(type, "yarn")) r->scaling = ROPE_YARN;
    else
        return error_set(err, "%s: unsupported type \"%.*s\"; supported: none, linear, yarn", key,
                         type.len < 64 ? (int)type.len : 64, type.data);
    char original_key[128];
    uint32_t original;
    if (gguf_find(g, arch_key(c, "rope.scaling.original_context_length", original_key, sizeof original_key))) {
        if (!gguf_get_u32(g, original_key, &original, err)) return false;
        r->original_context = original;
    }
    return gguf_number(g, c, "rope.scaling.factor", &r->factor, err) &&
           gguf_number(g, c, "rope.scaling.yarn_beta_fast", &r->beta_fast, err) &&
           gguf_number(g, c, "rope.scaling.yarn_beta_slow", &r->beta_slow, err) &&
           gguf_number(g, c, "rope.scaling.attn_factor", &r->attn_factor, err);
}

static bool gguf_token(const struct gguf *g, const char *key, int32_t *out, struct error *err) {
    if (!gguf_find(g, key)) return true;
    uint32_t id;
    if (!gguf_get_u32(g, key, &id, err)) return false;
    if (id >= MAX_VOCAB) return error_set(err, "%s: expected a token id below %d, found %u", key, MAX_VOCAB, id);
    *out = (int32_t)id;
    return true;
}

bool model_config_from_gguf(const struct gguf *g, struct model_config *c, struct error *err) {
    *c = (struct model_config){.bos = -1};
    snprintf(c->source, sizeof c->source, "GGUF metadata");
    struct gguf_string arch;
    if (!gguf_get_string(g, "general.architecture", &arch, err)) return false;
    int family = -1;
    for (int i = 0; i < N_FAMILIES; i++)
        if (string_is(arch, families[i].type)) family = i;
    if (family < 0) {
        char name[65];
        snprintf(name, sizeof name, "%.*s", arch.len < 64 ? (int)arch.len : 64, arch.data);
        return unsupported_arch(name, err);
    }
    set_family(c, families[family].arch);
    if (!gguf_size(g, c, "block_count", MAX_LAYERS, NULL, &c->n_layers, err) ||
        !gguf_size(g, c, "embedding_length", MAX_WIDTH, NULL, &c->hidden, err) ||
        !gguf_size(g, c, "attention.head_count", MAX_HEADS, NULL, &c->n_heads, err) ||
        !gguf_size(g, c, "attention.head_count_kv", MAX_HEADS, &c->n_heads, &c->n_kv_heads, err) ||
        !gguf_size(g, c, "feed_forward_length", MAX_WIDTH, NULL, &c->n_ff, err) ||
        !gguf_size(g, c, "context_length", MAX_CONTEXT, NULL, &c->context, err))
        return false;
    size_t head_dim = c->hidden / c->n_heads;
    if (!gguf_size(g, c, "attention.key_length", MAX_HEAD_DIM, &head_dim, &c->head_dim, err)) return false;
    if (c->head_dim < 2 || c->head_dim > MAX_HEAD_DIM)
        return error_set(err, "GGUF metadata: head_dim: expected 2 to %d, found %zu", MAX_HEAD_DIM, c->head_dim);
    if (!gguf_number(g, c, "attention.layer_norm_rms_epsilon", &c->rms_eps, err) || !gguf_rope(g, c, err)) return false;
    const struct tensor *embed = tensor_find(&g->tensors, "token_embd.weight");
    if (!embed || embed->rank != 2) return error_set(err, "tensor token_embd.weight is missing or no matrix");
    if (embed->shape[0] > MAX_VOCAB)
        return error_set(err, "tensor token_embd.weight: expected at most %d rows, found %zu", MAX_VOCAB,
                         embed->shape[0]);
    c->n_vocab = embed->shape[0];
    c->tied = !tensor_find(&g->tensors, "output.weight");
    int32_t eos = -1;
    if (!gguf_token(g, "tokenizer.ggml.bos_token_id", &c->bos, err) ||
        !gguf_token(g, "tokenizer.ggml.eos_token_id", &eos, err))
        return false;
    if (eos >= 0) c->eos[c->n_eos++] = eos;
    return check(c, err);
}

// ---- RoPE ---------------------------------------------------------------------------------------------------------

// YaRN (https://arxiv.org/abs/2309.00071, section 3.2): dimensions that turn often keep their rate, slow ones are
// stretched by the factor, those between are blended linearly in the dimension's index.
static double yarn_rate(const struct rope_config *r, size_t head_dim, size_t i, double rate) {
    double turns_to_dim = (double)head_dim / (2 * log(r->theta));
    double two_pi = 2 * acos(-1.0);
    double low = floor(turns_to_dim * log(r->original_context / (r->beta_fast * two_pi)));
    double high = ceil(turns_to_dim * log(r->original_context / (r->beta_slow * two_pi)));
    if (low < 0) low = 0;
    if (high > (double)head_dim - 1) high = (double)head_dim - 1;
    if (high == low) high += 0.001;
    double ramp = ((double)i - low) / (high - low);
    ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
    return rate / r->factor * ramp + rate * (1 - ramp);
}

// Llama 3.1's rule: wavelengths longer than original/low are stretched by the factor, shorter than original/high are
// kept, and between them the two are blended.
static double llama3_rate(const struct rope_config *r, double rate) {
    double wavelength = 2 * acos(-1.0) / rate;
    if (wavelength < r->original_context / r->high_freq_factor) return rate;
    if (wavelength > r->original_context / r->low_freq_factor) return rate / r->factor;
    double smooth =
        (r->original_context / wavelength - r->low_freq_factor) / (r->high_freq_factor - r->low_freq_factor);
    return (1 - smooth) * rate / r->factor + smooth * rate;
}

void rope_rates(const struct model_config *c, const float *factors, double *inv_freq, double *magnitude) {
    const struct rope_config *r = &c->rope;
    for (size_t i = 0; i < c->head_dim / 2; i++) {
        double rate = pow(r->theta, -2.0 * (double)i / (double)c->head_dim);
        switch (r->scaling) {
        case ROPE_PLAIN: break;
        case ROPE_LINEAR: rate /= r->factor; break;
        case ROPE_YARN: rate = yarn_rate(r, c->head_dim, i, rate); break;
        case ROPE_LLAMA3: rate = llama3_rate(r, rate); break;
        }
        inv_freq[i] = factors ? rate / (double)factors[i] : rate;
    }
    *magnitude = 1;
    if (r->scaling == ROPE_YARN) *magnitude = r->attn_factor > 0 ? r->attn_factor : 0.1 * log(r->factor) + 1;
}
