// speed_cuda.c: the CUDA backend's ops one by one, at the shapes of a model, timed as recorded sequences of all layers'
// (so that weights come from memory, as in a step) and held to the bits of the standard composition. For measurements
// and for the choice of tiles; `make gpu-check` is the test. The emulator runs it, too (--check).
//
//   speed_cuda [--tokens 32,256] [--shapes] [--check] [--small] [--depth 64] [--no-head] [--warm]
//
// --shapes: every tile of the products by warp groups (src/ops/cuda/groups.cu), not only the chosen one. --check: bits
// alone, no times. --small: an eighth of everything, and odd sizes. --depth: also attention of that many sequences, so
// deep, and the choice of their tokens. --warm: one layer's weights again and again, which are in the cache then.
#include "base/clock.h"
#include "base/size.h"
#include "model/model.h"
#include "ops/cuda/device.h"
#include "ops/ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LAYERS = 28, MOST_TIMES = 8, N_SHAPES = 10, MOST_IN_PARTS = 64 };
enum way {
    TILES,
    GROUPS,
    CLUSTERS,
    STORE_HEADS,
    PARTS,
    SHAPES,
    PARTS_SHAPES = SHAPES + N_SHAPES,
    N_WAYS = PARTS_SHAPES + N_SHAPES
};

struct layer {
    struct matrix wq, wk, wv, wo, gate, up, down;
};

struct bench {
    const struct ops *ops;
    struct device *device;
    struct op_ctx ctx;
    size_t hidden, q, kv, ff, vocab, n_layers, most;
    struct layer layers[MAX_LAYERS];
    struct matrix head;
    float *x, *x0, *in, *normed, *act, *up, *qkv[3], *projected, *logits, *norm;
    int32_t *rows;
    struct batch batch; // of a sequence a token
    struct kv_layer cache[MAX_LAYERS];
    float *cos_sin;
    struct greedy_choice *choices;
    size_t depth, n_heads, n_kv_heads, head_dim;
    struct batch prompt; // one sequence
    struct kv_layer prompt_cache;
    bool check_only, shapes, warm;
    size_t different;
    uint64_t key;
};

static void fail(const char *what) {
    fprintf(stderr, "speed_cuda: %s\n", what);
    exit(1);
}

static uint64_t seed = 88172645463325252u;
static uint32_t next_random(void) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)(seed >> 16);
}

// About normal numbers, as bf16.
static uint16_t random_bf16(void) {
    float f = ((float)(next_random() & 0xFFFF) + (float)(next_random() & 0xFFFF)) / 65536.0f - 1.0f;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static void *memory(struct bench *b, size_t bytes) {
    struct error err = {0};
    void *p = b->device->alloc(b->device, bytes, "a benchmark", &err);
    if (!p) fail(err.text);
    b->device->fill(b->device, p, 0, bytes);
    return p;
}

static float *random_floats(struct bench *b, size_t n, float scale) {
    float *device = memory(b, n * sizeof *device), *host = size_alloc(n, sizeof *host);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)random_bf16() << 16 | (next_random() & 0xFFFF);
        memcpy(&host[i], &bits, sizeof bits);
        host[i] *= scale;
    }
    b->device->put(b->device, device, host, n * sizeof *host);
    free(host);
    return device;
}

// `n` matrices of one random content at places of their own.
static void matrices(struct bench *b, size_t n_out, size_t n_in, size_t n, size_t at) {
    struct error err = {0};
    uint16_t *host = size_alloc(n_out * n_in, sizeof *host);
    for (size_t i = 0; i < n_out * n_in; i++) host[i] = random_bf16();
    struct matrix w = {
        .name = "w", .type = DTYPE_BF16, .n_out = n_out, .n_in = n_in, .row_bytes = n_in * 2, .data = host};
    for (size_t i = 0; i < n; i++) {
        struct matrix *out = at == SIZE_MAX ? &b->head : (struct matrix *)(void *)((char *)&b->layers[i] + at);
        if (!matrix_upload(&w, b->device, NULL, out, &err)) fail(err.text);
    }
    free(host);
}

// LAYER: all products of a layer. QKV_STORE: with the heads' norm, rotation and storing, of a prompt.
enum op { QKV, OUT, GATE_UP, DOWN, MLP, LAYER, QKV_STORE, HEAD, N_PRODUCTS, ATTENTION = N_PRODUCTS, CHOOSE, N_OPS };
static const char *const op_names[] = {"qkv",   "out",       "gate_up", "down",      "gate_up+down",
                                       "layer", "qkv+store", "head",    "attention", "choose"};

static void run_op(struct bench *b, enum op op, size_t layer, size_t n_tokens) {
    const struct layer *w = &b->layers[b->warm ? 0 : layer];
    struct batch host = *(b->prompt.host ? b->prompt.host : &b->prompt), prompt = b->prompt;
    host.n_tokens = prompt.n_tokens = n_tokens;
    prompt.host = &host;
    struct qk_norm_rope_store_args store = {.batch = &prompt,
                                            .n_heads = b->n_heads,
                                            .n_kv_heads = b->n_kv_heads,
                                            .head_dim = b->head_dim,
                                            .q_norm = b->norm,
                                            .k_norm = b->norm,
                                            .eps = 1e-6f,
                                            .cos_sin = b->x0,
                                            .q = b->qkv[0],
                                            .k = b->qkv[1],
                                            .v = b->qkv[2],
                                            .kv = &b->prompt_cache};
    struct batch batch = {.n_tokens = n_tokens, .n_logit_rows = n_tokens, .logit_rows = b->rows};
    if (op == QKV || op == QKV_STORE || op == LAYER)
        ops_norm_qkv(&b->ctx, &(struct norm_qkv_args){.n_tokens = n_tokens,
                                                      .x = b->x,
                                                      .norm = b->norm,
                                                      .eps = 1e-6f,
                                                      .wq = &w->wq,
                                                      .wk = &w->wk,
                                                      .wv = &w->wv,
                                                      .normed = b->normed,
                                                      .q = b->qkv[0],
                                                      .k = b->qkv[1],
                                                      .v = b->qkv[2]});
    if (op == QKV_STORE) ops_qk_norm_rope_store(&b->ctx, &store);
    if (op == OUT || op == LAYER)
        ops_out_residual(&b->ctx,
                         &(struct proj_residual_args){
                             .n_tokens = n_tokens, .in = b->in, .w = &w->wo, .projected = b->projected, .x = b->x});
    if (op == GATE_UP || op == MLP || op == LAYER)
        ops_norm_gate_up(&b->ctx, &(struct norm_gate_up_args){.n_tokens = n_tokens,
                                                              .x = b->x,
                                                              .norm = b->norm,
                                                              .eps = 1e-6f,
                                                              .w_gate = &w->gate,
                                                              .w_up = &w->up,
                                                              .normed = b->normed,
                                                              .gate = b->act,
                                                              .up = b->up,
                                                              .act = b->act,
                                                              .reader = op == GATE_UP ? NULL : &w->down});
    if (op == DOWN || op == MLP || op == LAYER)
        ops_down_residual(&b->ctx, &(struct proj_residual_args){.n_tokens = n_tokens,
                                                                .in = op == DOWN ? b->in : b->act,
                                                                .w = &w->down,
                                                                .projected = b->projected,
                                                                .x = b->x});
    if (op == HEAD)
        ops_norm_head(&b->ctx, &(struct norm_head_args){.batch = &batch,
                                                        .x = b->x,
                                                        .norm = b->norm,
                                                        .eps = 1e-6f,
                                                        .head = &b->head,
                                                        .rows = b->normed,
                                                        .normed = b->normed,
                                                        .logits = b->logits});
}

static void run_step(struct bench *b, enum op op, size_t layer, size_t n_tokens) {
    if (op == CHOOSE) {
        b->ops->choose(&b->ctx, b->choices, b->logits, n_tokens, b->vocab);
        return;
    }
    struct qk_norm_rope_store_args store = {.batch = &b->batch,
                                            .n_heads = b->n_heads,
                                            .n_kv_heads = b->n_kv_heads,
                                            .head_dim = b->head_dim,
                                            .q_norm = b->norm,
                                            .k_norm = b->norm,
                                            .eps = 1e-6f,
                                            .cos_sin = b->cos_sin,
                                            .q = b->qkv[0],
                                            .k = b->qkv[1],
                                            .v = b->qkv[2],
                                            .kv = &b->cache[layer]};
    struct attention_args attention = {.batch = &b->batch,
                                       .n_heads = b->n_heads,
                                       .n_kv_heads = b->n_kv_heads,
                                       .head_dim = b->head_dim,
                                       .scale = 0.1f,
                                       .q = b->qkv[0],
                                       .kv = &b->cache[layer],
                                       .out = b->in};
    ops_rope_attention(&b->ctx, &(struct rope_attention_args){&store, &attention});
}

// n sequences, `depth` positions deep, each at its next token.
static void create_batch(struct bench *b, size_t n) {
    size_t per = b->depth / KV_PAGE_TOKENS + 1, page = b->n_kv_heads * b->head_dim * KV_PAGE_TOKENS * 2;
    struct batch *host = size_alloc_zero(1, sizeof *host);
    const size_t counts[] = {n, n, n, n + 1, n + 1, n, n * per};
    int32_t *arrays[7], *device[7];
    for (size_t i = 0; i < 7; i++) {
        arrays[i] = size_alloc_zero(counts[i], sizeof *arrays[i]);
        for (size_t k = 0; k < counts[i]; k++)
            arrays[i][k] = (int32_t)(i == 0 ? 0 : i == 1 ? b->depth : i == 4 ? k * per : i == 5 ? b->depth + 1 : k);
        device[i] = memory(b, counts[i] * sizeof *arrays[i]);
        b->device->put(b->device, device[i], arrays[i], counts[i] * sizeof *arrays[i]);
    }
    *host = (struct batch){.n_tokens = n,
                           .n_seqs = n,
                           .n_logit_rows = n,
                           .token = arrays[0],
                           .position = arrays[1],
                           .seq = arrays[2],
                           .seq_start = arrays[3],
                           .page_start = arrays[4],
                           .kv_len = arrays[5],
                           .pages = arrays[6]};
    b->batch = *host;
    b->batch.host = host;
    b->batch.token = device[0];
    b->batch.position = device[1];
    b->batch.seq = device[2];
    b->batch.seq_start = device[3];
    b->batch.page_start = device[4];
    b->batch.kv_len = device[5];
    b->batch.pages = device[6];
    for (size_t i = 0; i < b->n_layers; i++)
        b->cache[i] = (struct kv_layer){.type = DTYPE_BF16,
                                        .k = memory(b, n * per * page),
                                        .v = memory(b, n * per * page),
                                        .n_pages = n * per,
                                        .n_kv_heads = b->n_kv_heads,
                                        .head_dim = b->head_dim};
    b->cos_sin = random_floats(b, n * b->head_dim, 1.0f);
    b->choices = b->device->alloc_host(b->device, n * sizeof *b->choices);
}

// A prompt of at most n tokens.
static void create_prompt(struct bench *b, size_t n) {
    struct batch *host = size_alloc_zero(1, sizeof *host);
    size_t n_pages = (n + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    int32_t *arrays[4], *device[4];
    for (size_t i = 0; i < 4; i++) {
        size_t count = i == 3 ? n_pages : n + 2;
        arrays[i] = size_alloc_zero(count, sizeof *arrays[i]);
        for (size_t k = 0; k < count; k++) arrays[i][k] = (int32_t)(i == 0 || i == 3 ? k : i == 1 ? 0 : k == 1 ? n : 0);
        device[i] = memory(b, count * sizeof *arrays[i]);
        b->device->put(b->device, device[i], arrays[i], count * sizeof *arrays[i]);
    }
    *host = (struct batch){.n_tokens = n,
                           .n_seqs = 1,
                           .position = arrays[0],
                           .seq = arrays[1],
                           .seq_start = arrays[2],
                           .page_start = arrays[1],
                           .pages = arrays[3]};
    b->prompt = *host;
    b->prompt.host = host;
    b->prompt.position = device[0];
    b->prompt.seq = device[1];
    b->prompt.seq_start = device[2];
    b->prompt.page_start = device[1];
    b->prompt.pages = device[3];
    size_t bytes = n_pages * KV_PAGE_TOKENS * b->kv * 2;
    b->prompt_cache = (struct kv_layer){.type = DTYPE_BF16,
                                        .k = memory(b, bytes),
                                        .v = memory(b, bytes),
                                        .n_pages = n_pages,
                                        .n_kv_heads = b->n_kv_heads,
                                        .head_dim = b->head_dim};
}

static void free_batch(struct bench *b) {
    for (size_t i = 0; i < b->n_layers; i++) {
        b->device->free(b->device, b->cache[i].k);
        b->device->free(b->device, b->cache[i].v);
    }
}

static size_t results(const struct bench *b, enum op op, int part, const float **at) {
    if (op == QKV_STORE && part > 0) {
        *at = part == 1 ? b->prompt_cache.k : b->prompt_cache.v;
        return b->kv / 2;
    }
    if (op == QKV_STORE) op = QKV;
    *at = op == QKV ? b->qkv[part] : op == GATE_UP ? b->act : op == HEAD ? b->logits : b->x;
    return op == QKV ? (part == 0 ? b->q : b->kv) : op == GATE_UP ? b->ff : op == HEAD ? b->vocab : b->hidden;
}

// What the op returns for layer 0, from the same x every time.
static float *take_results(struct bench *b, enum op op, size_t n_tokens, size_t *n) {
    size_t total = 0, at = 0;
    int parts = op == QKV || op == QKV_STORE ? 3 : 1;
    const float *from;
    for (int i = 0; i < parts; i++) total += results(b, op, i, &from) * n_tokens;
    float *out = size_alloc(total, sizeof *out);
    b->device->move(b->device, b->x, b->x0, b->most * b->hidden * sizeof(float));
    for (int i = 0; i < parts; i++) {
        size_t count = results(b, op, i, &from) * n_tokens;
        if (op == QKV || op == QKV_STORE || op == GATE_UP || op == HEAD)
            b->device->fill(b->device, (void *)(uintptr_t)from, 0xFF, count * sizeof(float));
    }
    run_op(b, op, 0, n_tokens);
    for (int i = 0; i < parts; i++) {
        size_t count = results(b, op, i, &from) * n_tokens;
        b->device->get(b->device, out + at, from, count * sizeof *out);
        at += count;
    }
    struct error err = {0};
    if (!b->device->sync(b->device, &err)) fail(err.text);
    *n = total;
    return out;
}

static size_t compare(struct bench *b, enum op op, size_t n_tokens, const float *expected) {
    size_t n, wrong = 0;
    float *found = take_results(b, op, n_tokens, &n);
    for (size_t i = 0; i < n; i++) wrong += memcmp(&found[i], &expected[i], sizeof *found) != 0;
    free(found);
    b->different += wrong > 0;
    return wrong;
}

// Seconds of one op, the fastest of some recorded runs through all layers.
static double time_op(struct bench *b, enum op op, size_t n_tokens) {
    size_t n = op == HEAD || op == CHOOSE ? 1 : b->n_layers, per = n == 1 ? 2 : 1;
    double best = 1e9;
    b->key++;
    for (int i = 0; i < MOST_TIMES; i++) {
        struct error err = {0};
        double start = clock_seconds();
        if (!b->device->begin(b->device, b->key)) {
            for (size_t k = 0; k < per; k++)
                for (size_t layer = 0; layer < n; layer++)
                    op < N_PRODUCTS ? run_op(b, op, layer, n_tokens) : run_step(b, op, layer, n_tokens);
            b->device->end(b->device);
        }
        if (!b->device->sync(b->device, &err)) fail(err.text);
        double seconds = (clock_seconds() - start) / (double)(n * per);
        if (i > 0 && seconds < best) best = seconds;
    }
    return best;
}

static double op_flop(const struct bench *b, enum op op, size_t n_tokens) {
    const size_t weights[] = {(b->q + 2 * b->kv) * b->hidden, b->q * b->hidden,
                              2 * b->ff * b->hidden,          b->ff * b->hidden,
                              3 * b->ff * b->hidden,          (2 * b->q + 2 * b->kv + 3 * b->ff) * b->hidden,
                              (b->q + 2 * b->kv) * b->hidden, b->vocab * b->hidden};
    return 2.0 * (double)weights[op] * (double)n_tokens;
}

static void measure(struct bench *b, enum op op, size_t n_tokens) {
    struct cuda_state *s = (struct cuda_state *)(uintptr_t)b->ops;
    size_t n;
    const uint32_t proven = b->device->variants;
    uint32_t on;
    if (!fusion_parse("on", &on, NULL)) fail("fusion");
    b->ctx.fusion = 0;
    float *expected = take_results(b, op, n_tokens, &n);
    b->ctx.fusion = on;
    printf("%-12s T %4zu", op_names[op], n_tokens);
    const uint32_t apart = ~(uint32_t)(VARIANT_WGMMA | VARIANT_CLUSTERS | VARIANT_STORE_HEADS | VARIANT_PARTS);
    const bool adds = op == OUT || op == DOWN || op == MLP || op == LAYER;
    for (int way = 0; way < (b->shapes ? N_WAYS : SHAPES); way++) {
        bool in_parts = way == PARTS || way >= PARTS_SHAPES;
        if ((way == CLUSTERS || in_parts) && !adds) continue;
        if (way >= PARTS_SHAPES && n_tokens > MOST_IN_PARTS) continue; // too much passes through memory
        if (way == STORE_HEADS && op != QKV_STORE) continue;
        b->device->variants = (proven & apart) | (way > TILES ? VARIANT_WGMMA : 0u) |
                              (way == CLUSTERS ? VARIANT_CLUSTERS : 0u) | (way > CLUSTERS ? VARIANT_STORE_HEADS : 0u) |
                              (in_parts ? VARIANT_PARTS : 0u);
        s->tile_shape = way == CLUSTERS ? -1 : way < SHAPES ? 0 : (way - SHAPES) % N_SHAPES + 1;
        size_t wrong = compare(b, op, n_tokens, expected);
        if (b->check_only) {
            printf("  %s", wrong ? "DIFFERS" : "same");
            continue;
        }
        double seconds = time_op(b, op, n_tokens);
        printf(" %s%6.1f us %3.0f%s",
               way == TILES          ? ""
               : way == GROUPS       ? "| "
               : way == CLUSTERS     ? "| clusters "
               : way == STORE_HEADS  ? "| store-heads "
               : way == PARTS        ? "| parts "
               : way == SHAPES       ? "\n  tiles "
               : way == PARTS_SHAPES ? "\n  parts "
                                     : " ",
               seconds * 1e6, op_flop(b, op, n_tokens) / seconds / 1e12, wrong ? " DIFFERS" : "");
    }
    printf("\n");
    fflush(stdout);
    b->device->variants = proven;
    s->tile_shape = 0;
    free(expected);
}

static void create(struct bench *b, bool small) {
    struct error err = {0};
    b->ops = ops_open("cuda", NULL, NULL, &err);
    if (!b->ops) fail(err.text);
    b->device = b->ops->device;
    *b = (struct bench){.ops = b->ops,
                        .device = b->device,
                        .check_only = b->check_only,
                        .shapes = b->shapes,
                        .warm = b->warm,
                        .most = b->most,
                        .depth = b->depth};
    b->n_heads = 16;
    b->n_kv_heads = 8;
    b->head_dim = 128;
    b->hidden = small ? 200 : 1024;
    b->q = small ? 208 : 2048;
    b->kv = small ? 72 : 1024;
    b->ff = small ? 256 : 3072;
    b->vocab = small ? 300 : 151936;
    b->n_layers = small ? 1 : MAX_LAYERS;
    matrices(b, b->q, b->hidden, b->n_layers, offsetof(struct layer, wq));
    matrices(b, b->kv, b->hidden, b->n_layers, offsetof(struct layer, wk));
    matrices(b, b->kv, b->hidden, b->n_layers, offsetof(struct layer, wv));
    matrices(b, b->hidden, b->q, b->n_layers, offsetof(struct layer, wo));
    matrices(b, b->ff, b->hidden, b->n_layers, offsetof(struct layer, gate));
    matrices(b, b->ff, b->hidden, b->n_layers, offsetof(struct layer, up));
    matrices(b, b->hidden, b->ff, b->n_layers, offsetof(struct layer, down));
    matrices(b, b->vocab, b->hidden, 1, SIZE_MAX);
    size_t t = b->most, heads = t < 256 ? t : 256, width = b->ff > b->q ? b->ff : b->q;
    b->x0 = random_floats(b, t * b->hidden, 1.0f);
    b->x = memory(b, t * b->hidden * sizeof(float));
    b->in = random_floats(b, t * width, 1.0f);
    b->norm = random_floats(b, b->hidden, 1.0f);
    b->normed = memory(b, t * b->hidden * sizeof(float));
    b->projected = memory(b, t * b->hidden * sizeof(float));
    b->act = memory(b, t * b->ff * sizeof(float));
    b->up = memory(b, t * b->ff * sizeof(float));
    b->qkv[0] = memory(b, t * b->q * sizeof(float));
    b->qkv[1] = memory(b, t * b->kv * sizeof(float));
    b->qkv[2] = memory(b, t * b->kv * sizeof(float));
    b->logits = memory(b, heads * b->vocab * sizeof(float));
    b->rows = memory(b, heads * sizeof *b->rows);
    int32_t *rows = size_alloc(heads, sizeof *rows);
    for (size_t i = 0; i < heads; i++) rows[i] = (int32_t)(heads - 1 - i);
    b->device->put(b->device, b->rows, rows, heads * sizeof *rows);
    free(rows);
    struct ops_limits limits = {
        .max_tokens = t, .max_positions = 1, .max_width = width, .n_heads = 1, .head_dim = 32, .n_threads = 1};
    create_prompt(b, t);
    size_t floats;
    if (!b->ops->scratch_floats(b->ops, &limits, &floats)) fail("scratch");
    b->ctx = (struct op_ctx){
        .ops = b->ops, .scratch = memory(b, floats * sizeof(float)), .scratch_floats = floats, .layer = -1};
}

int main(int argc, char **argv) {
    static struct bench b;
    const char *tokens = "32,64,128,256,512,2048";
    bool small = false, head = true;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--tokens") == 0 && i + 1 < argc) tokens = argv[++i];
        else if (strcmp(argv[i], "--shapes") == 0) b.shapes = true;
        else if (strcmp(argv[i], "--check") == 0) b.check_only = true;
        else if (strcmp(argv[i], "--small") == 0) small = true;
        else if (strcmp(argv[i], "--warm") == 0) b.warm = true;
        else if (strcmp(argv[i], "--depth") == 0 && i + 1 < argc) b.depth = strtoul(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--no-head") == 0) head = false;
        else fail("an unknown option");
    }
    for (const char *at = tokens; *at;) {
        char *end;
        size_t n = strtoul(at, &end, 10);
        if (end == at) fail("--tokens: numbers are expected");
        if (n > b.most) b.most = n;
        at = *end ? end + 1 : end;
    }
    create(&b, small);
    printf("%s; without warp groups | with%s; us, TFLOP/s\n", b.device->name,
           b.shapes ? ", then 64x32 64x64 64x128 128x64 128x128 128x192 128x256; 64x32 64x64 with more stages; "
                      "64x32 shared by two (rows by tokens)"
                    : "");
    for (const char *at = tokens; *at;) {
        char *end;
        size_t n = strtoul(at, &end, 10);
        for (int op = 0; op < N_PRODUCTS; op++)
            if ((op != HEAD || (head && n <= 256)) && (op != QKV_STORE || (!small && n > 64)))
                measure(&b, (enum op)op, n);
        if (b.depth && n <= 256) {
            create_batch(&b, n);
            for (int op = ATTENTION; op < N_OPS; op++)
                printf("%-12s T %4zu %6.1f us\n", op_names[op], n, time_op(&b, (enum op)op, n) * 1e6);
            free_batch(&b);
        }
        at = *end ? end + 1 : end;
    }
    printf("%zu differ\n", b.different);
    return b.different > 0;
}
