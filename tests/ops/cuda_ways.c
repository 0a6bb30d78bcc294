// cuda_ways.c: the ways (cuda_ways.h), and the comparison with the oracles.
#include "cuda_ways.h"

#include "base/clock.h"
#include "base/size.h"
#include "format/fp8.h"
#include "format/quantize.h"
#include "model/oracle.h"
#include "model/synthetic.h"
#include "ops/sampling.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MAX_ROWS = 512, KEEP_EVERY = 37, STEPS_AT_DEPTH = 3, CHAIN_STEPS = 24 };

const struct ops *cuda;
struct pool *pool;

static void *checked(size_t count, size_t item) {
    void *p = size_alloc_zero(count, item);
    assert_non_null(p);
    return p;
}

uint32_t all_fused(void) {
    uint32_t mask;
    assert_true(fusion_parse("on", &mask, NULL));
    return mask;
}

// ---- Running a sequence one way -----------------------------------------------------------------------------------

struct way {
    char name[160];
    uint32_t fusion;
    size_t lead, chunk, n_seqs;
    size_t n_long, long_chunk; // the last ones go in chunks of their own, again and again
    bool of_long;              // the last sequence is the one compared, not the first
    bool few;                  // logits of at most one token a sequence and step: the last layer runs these alone
    bool backwards;            // pages
    uint32_t variants;         // the device's, that are turned round
};

static int32_t id_at(const struct model *m, size_t seq, size_t position) {
    return (int32_t)((position * 7919 + seq * 104729 + position * position * 31 + 17) % m->config.n_vocab);
}

static bool kept(size_t position, size_t length) {
    return position % KEEP_EVERY == 0 || position + 1 == length;
}

static size_t n_kept(size_t length) {
    size_t n = 0;
    for (size_t i = 0; i < length; i++) n += kept(i, length);
    return n;
}

// A watched step is not recorded, does without the op that both stores K and V and attends, and has all of its tokens
// in the last layer.
static const uint32_t unwatched = 1u << FUSED_STEP | 1u << FUSED_ROPE_ATTENTION;

static bool is_shown(const struct way *w) {
    return !(w->fusion & unwatched) && !w->few;
}

// Takes attention's results of the wanted tokens: there a difference is seen that rounding to bf16 hides from the
// logits.
struct watch {
    float *attention; // [n_kept, n_layers, width]
    size_t n_layers, width, at;
    const struct batch *batch;
};

static void watch_attention(void *user, const char *name, int layer, const float *data, size_t n_rows,
                            size_t n_columns) {
    const struct watch *w = user;
    (void)n_rows;
    if (strcmp(name, "attn") != 0) return;
    for (size_t i = 0; i < w->batch->n_logit_rows; i++)
        memcpy(w->attention + ((w->at + i) * w->n_layers + (size_t)layer) * w->width,
               data + (size_t)w->batch->logit_rows[i] * n_columns, n_columns * sizeof *data);
}

// What a sequence computes in a step that begins at `at`.
static size_t share_of(const struct way *w, size_t q, size_t at, size_t length) {
    size_t n = q + w->n_long >= w->n_seqs ? w->long_chunk : at == 0 && w->lead ? w->lead : w->chunk;
    return n < length - at ? n : length - at;
}

static size_t most_tokens(const struct way *w) {
    return (w->n_seqs - w->n_long) * (w->chunk > w->lead ? w->chunk : w->lead) + w->n_long * w->long_chunk;
}

// Logits of the compared sequence at the kept positions: [n_kept, n_vocab], and, where the step is not recorded as a
// whole, what attention returned there. The others' ids differ from its own.
static void run_way(const struct subject *s, const struct way *w, const struct plan *p, float *out, float *attention) {
    size_t length = p->length;
    const struct model_config *c = &s->model->config;
    struct error err = {0};
    size_t most = most_tokens(w), compared = w->of_long ? w->n_seqs - 1 : 0;
    size_t per_seq = (length + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS, n_pages = per_seq * w->n_seqs;
    struct run_options o = {.ops = cuda,
                            .pool = pool,
                            .fusion = w->fusion,
                            .max_tokens = most,
                            .max_logit_rows = most < MAX_ROWS ? most : MAX_ROWS,
                            .max_positions = length,
                            .weights = s->weights,
                            .max_pages = n_pages};
    struct run *run = run_create(s->model, &o, &err);
    if (!run) fail_msg("%s", err.text);
    struct kv_store kv;
    if (!kv_store_create_on(cuda->device, &kv, c, p->fp8 ? DTYPE_FP8 : DTYPE_BF16, n_pages, &err))
        fail_msg("%s", err.text);
    cuda->device->fill(cuda->device, kv.memory, 0xFF, kv.bytes); // NaN
    int32_t *token = checked(most, 4), *position = checked(most, 4), *seq = checked(most, 4), *rows = checked(most, 4);
    int32_t *seq_start = checked(w->n_seqs + 1, 4), *page_start = checked(w->n_seqs + 1, 4);
    int32_t *kv_len = checked(w->n_seqs, 4), *pages = checked(n_pages, 4);
    size_t *at = checked(w->n_seqs, sizeof *at);
    for (size_t i = 0; i < n_pages; i++) {
        size_t page = i % per_seq * w->n_seqs + i / per_seq;
        pages[i] = (int32_t)(w->backwards ? n_pages - 1 - page : page);
    }
    struct watch watch = {.attention = attention, .n_layers = c->n_layers, .width = c->n_heads * c->head_dim};
    struct ops *table = (struct ops *)(uintptr_t)cuda;
    size_t least_left_out = table->least_left_out;
    table->least_left_out = w->few ? 0 : SIZE_MAX;
    if (is_shown(w)) run_set_tap(run, watch_attention, &watch);
    while (at[compared] < length) {
        size_t n_mine = 0, n_rows = 0, first = 0; // compared: positions, and rows of these, from the first on
        struct batch b = {.n_seqs = w->n_seqs,
                          .token = token,
                          .position = position,
                          .seq = seq,
                          .seq_start = seq_start,
                          .page_start = page_start,
                          .pages = pages,
                          .kv_len = kv_len,
                          .logit_rows = rows};
        for (size_t q = 0; q < w->n_seqs; q++) {
            seq_start[q] = (int32_t)b.n_tokens;
            page_start[q] = (int32_t)(q * per_seq);
            if (at[q] == length) at[q] = 0;
            size_t end = at[q] + share_of(w, q, at[q], length);
            kv_len[q] = (int32_t)end;
            for (; at[q] < end; at[q]++, b.n_tokens++) {
                token[b.n_tokens] = id_at(s->model, (q + w->n_seqs - compared) % w->n_seqs, at[q]);
                position[b.n_tokens] = (int32_t)at[q];
                seq[b.n_tokens] = (int32_t)q;
                bool is_kept = q == compared && kept(at[q], length);
                if (is_kept && n_mine++ == 0) first = b.n_logit_rows;
                if (is_kept && w->few && n_mine > 1) rows[first] = (int32_t)b.n_tokens;
                else if (is_kept || (w->few && q != compared && q % 2 && at[q] + 1 == end))
                    rows[b.n_logit_rows++] = (int32_t)b.n_tokens;
            }
            if (q == compared) n_rows = b.n_logit_rows - (n_mine ? first : b.n_logit_rows);
        }
        seq_start[w->n_seqs] = (int32_t)b.n_tokens;
        page_start[w->n_seqs] = (int32_t)n_pages;
        watch.batch = &b;
        const float *logits = model_forward(s->model, run, &kv, &b);
        watch.at += b.n_logit_rows;
        if (!run_error(run, &err)) fail_msg("%s: %s", w->name, err.text);
        memcpy(out + (n_mine - n_rows) * c->n_vocab, logits + first * c->n_vocab, n_rows * c->n_vocab * sizeof *out);
        out += n_mine * c->n_vocab;
    }
    table->least_left_out = least_left_out;
    int32_t *all[] = {token, position, seq, rows, seq_start, page_start, kv_len, pages};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(at);
    kv_store_free(&kv);
    run_free(run);
}

struct ways {
    struct way list[320];
    size_t n, lead;
};

static void add_way(struct ways *all, uint32_t fusion, size_t chunk, size_t n_seqs, bool backwards) {
    char text[256];
    assert_true(all->n < sizeof all->list / sizeof all->list[0]);
    struct way *w = &all->list[all->n++];
    *w = (struct way){.fusion = fusion, .lead = all->lead, .chunk = chunk, .n_seqs = n_seqs, .backwards = backwards};
    snprintf(w->name, sizeof w->name, "fusion %.30s, chunk %zu, %zu sequences%s",
             fusion_text(fusion, text, sizeof text), chunk, n_seqs, backwards ? ", pages backwards" : "");
}

// The last n ways.
static void make_few(struct ways *all, size_t n) {
    for (size_t i = all->n - n; i < all->n; i++) {
        struct way *w = &all->list[i];
        size_t used = strlen(w->name);
        w->few = true;
        snprintf(w->name + used, sizeof w->name - used, ", few logits");
    }
}

// Sequences of one token beside two of many in every step: one of each kind is compared.
static void add_mixed(struct ways *all, uint32_t fusion, size_t n_single) {
    enum { N_LONG = 2, LONG_CHUNK = 70 };
    for (int of_long = 0; of_long < 2; of_long++) {
        add_way(all, fusion, 1, n_single + N_LONG, of_long);
        struct way *w = &all->list[all->n - 1];
        size_t used = strlen(w->name);
        if (of_long) w->lead = 0;
        w->n_long = N_LONG;
        w->long_chunk = LONG_CHUNK;
        w->of_long = of_long;
        snprintf(w->name + used, sizeof w->name - used, ", %d of them %d tokens a step%s", N_LONG, LONG_CHUNK,
                 of_long ? ", of which the last" : "");
    }
}

uint32_t variant_named(const char *name) {
    for (size_t i = 0; cuda->device->variant_names[i]; i++)
        if (strcmp(cuda->device->variant_names[i], name) == 0) return i < cuda->device->n_variants ? 1u << i : 0;
    fail_msg("no variant is called %s", name);
    return 0;
}

// Each of the device's other kernels, or those that it stands in for: in steps of many tokens, and in steps of one
// token a sequence. Most of attention's are for one of both.
static void add_variants(struct ways *all, const struct plan *p) {
    const uint32_t on = all_fused(), watched = on & ~unwatched;
    for (size_t i = 0; i < cuda->device->n_variants; i++) {
        const char *name = cuda->device->variant_names[i];
        if (p->variants && !(p->variants >> i & 1)) continue;
        size_t from = all->n,
               least = strcmp(name, "cluster-products") == 0 || strcmp(name, "products-in-parts") == 0 ? 3 : 31;
        if (strcmp(name, "stream-attention") != 0) {
            for (size_t k = 0; k < p->n_chunks; k++)
                if (p->chunks[k] > least && p->chunks[k] <= p->length) add_way(all, watched, p->chunks[k], 1, k % 2);
            add_way(all, watched, p->length, 1, true);
            if (p->n_ragged) add_way(all, watched, 40, p->n_ragged, true);
            for (size_t k = from; k < all->n; k++) all->list[k].lead = 0;
        }
        if (strcmp(name, "wide-attention") != 0) {
            if (strcmp(name, "stream-attention") != 0) add_way(all, on, 1, 1, true);
            else
                for (size_t k = 0; k < p->n_neighbours; k++) add_way(all, on, 1, p->neighbours[k], k % 2);
            if (p->n_neighbours) add_way(all, watched, 1, p->neighbours[p->n_neighbours - 1], true);
        }
        for (; from < all->n; from++) {
            struct way *w = &all->list[from];
            size_t used = strlen(w->name);
            w->variants = 1u << i;
            snprintf(w->name + used, sizeof w->name - used, ", %s %s", name,
                     cuda->device->variants >> i & 1 ? "off" : "on");
        }
    }
}

// Ways in which few logits are wanted: in long chunks, with whoever reads K and V fused and whoever stores them not,
// and the other way round; and of sequences side by side.
static void add_few(struct ways *all, const struct plan *p) {
    const uint32_t on = all_fused(), store = 1u << FUSED_QK_NORM_ROPE_STORE;
    for (size_t i = 0; i < p->n_chunks; i++) {
        if (p->chunks[i] == 1 || p->chunks[i] > p->length) continue;
        add_way(all, on, p->chunks[i], 1, i % 2);
        if (p->chunks[i] * 4 > p->length) all->list[all->n - 1].lead = 0;
        make_few(all, 1);
    }
    if (p->each_op) {
        add_way(all, on & ~store, 20, 1, false);
        make_few(all, 1);
        add_way(all, on & ~(1u << FUSED_ROPE_ATTENTION), 20, 1, false);
        make_few(all, 1);
        add_way(all, 0, 20, 1, false);
        make_few(all, 1);
    }
    if (p->n_ragged) {
        add_way(all, on, 13, p->n_ragged, true);
        make_few(all, 1);
        add_way(all, on, 40, p->n_ragged, true);
        all->list[all->n - 1].lead = 0;
        make_few(all, 1);
    }
    if (p->n_mixed) {
        add_mixed(all, on, p->n_mixed);
        make_few(all, 2);
    }
}

static void plan_ways(struct ways *all, const struct plan *p) {
    const uint32_t on = all_fused(), step = 1u << FUSED_STEP;
    *all = (struct ways){.lead = p->lead};
    add_way(all, 0, p->standard_chunk, 1, false);
    all->list[0].lead = 0;
    if (p->singly) add_way(all, 0, 1, 1, false);
    add_way(all, on, 1, 1, false);
    add_way(all, on & ~step, 1, 1, true);
    add_way(all, on & ~(1u << FUSED_ROPE_ATTENTION), 1, 1, false);
    add_way(all, on & ~unwatched, 1, 1, true);
    for (int op = 0; p->each_op && op < FUSED_STEP; op++) {
        add_way(all, 1u << op, 1, 3, true);
        add_way(all, 1u << op, 50, 1, false);
    }
    for (size_t i = 0; i < p->n_chunks; i++)
        if (p->chunks[i] <= p->length) add_way(all, on, p->chunks[i], 1, i % 2);
    if (p->whole) add_way(all, on, p->length, 1, true);
    if (p->whole) add_way(all, 0, p->length, 1, true);
    for (size_t i = 0; i < p->n_neighbours; i++) add_way(all, on, 1, p->neighbours[i], i % 2);
    if (p->n_ragged) add_way(all, on, 13, p->n_ragged, true);
    if (p->n_crowd) add_way(all, on & ~step, 1, p->n_crowd, true);
    if (p->n_ragged) add_mixed(all, on, p->n_ragged);
    if (p->n_mixed) add_mixed(all, on, p->n_mixed);
    add_few(all, p);
    add_variants(all, p);
}

// How many of n numbers differ in a bit; `first`: the first of them.
static size_t n_different(const float *expected, const float *found, size_t n, size_t *first) {
    size_t wrong = 0;
    for (size_t k = 0; k < n; k++)
        if (memcmp(&expected[k], &found[k], sizeof *found) != 0 && wrong++ == 0) *first = k;
    return wrong;
}

size_t compare_ways(const struct subject *s, const char *name, const struct plan *p, size_t *n_ways) {
    struct ways *all = checked(1, sizeof *all);
    plan_ways(all, p);
    const struct model_config *c = &s->model->config;
    size_t rows = n_kept(p->length), floats = rows * c->n_vocab, different = 0;
    size_t watched = rows * c->n_layers * c->n_heads * c->head_dim;
    float *expected = checked(floats + watched, sizeof *expected), *found = checked(floats + watched, sizeof *found);
    for (size_t i = 0; i < all->n && !(p->until_first && different); i++) {
        const struct way *w = &all->list[i];
        double start = clock_seconds();
        size_t first = 0, wrong, compared = is_shown(w) ? floats + watched : floats;
        for (size_t k = 0; k < floats + watched; k++) found[k] = w->few && k < floats ? expected[k] : NAN;
        uint32_t variants = cuda->device->variants;
        cuda->device->variants ^= w->variants;
        run_way(s, w, p, i == 0 ? expected : found, (i == 0 ? expected : found) + floats);
        cuda->device->variants = variants;
        for (size_t k = 0; i == 0 && k < floats + watched; k++)
            if (!isfinite(expected[k])) fail_msg("%s: %s: no number at %zu", name, w->name, k);
        wrong = i == 0 ? 0 : n_different(expected, found, compared, &first);
        if (wrong) {
            bool of_logits = first < floats;
            size_t width = of_logits ? c->n_vocab : c->n_heads * c->head_dim, at = of_logits ? first : first - floats;
            print_message("%s: %s: %zu of %zu numbers differ, the first in %s, row %zu, %zu: %.9g, not %.9g\n", name,
                          w->name, wrong, compared, of_logits ? "logits" : "attention", at / width, at % width,
                          (double)found[first], (double)expected[first]);
            different++;
        } else if (clock_seconds() - start > 2) {
            print_message("%s: %s: %.1f s\n", name, w->name, clock_seconds() - start);
        }
    }
    if (n_ways) *n_ways = all->n;
    free(expected);
    free(found);
    free(all);
    return different;
}

// Small finite numbers in all pages: some hundred pages of a head, again and again.
static void fill_randomly(struct kv_store *kv) {
    enum { PAGES = 509 };
    bool fp8 = kv->layers[0].type == DTYPE_FP8;
    size_t elements = kv->layers[0].head_dim * KV_PAGE_TOKENS, page = fp8 ? elements / 32 * 33 : 2 * elements;
    unsigned char *random = checked(kv->bytes, 1);
    size_t some = kv->bytes < PAGES * page ? kv->bytes : PAGES * page;
    uint32_t rng = 12345;
    for (size_t i = 0; i < some; i += 2) {
        rng = rng * 1664525u + 1013904223u;
        uint16_t v = (uint16_t)((rng >> 16 & 0x807Fu) | (0x3E80u + (rng >> 8 & 0x100u)));
        // In eight bits: any numbers, and behind each page of a head scales of 2^-9 to 2^-2.
        if (fp8 && i % page < elements) v = (uint16_t)((rng >> 16) & 0xFEFEu);
        else if (fp8) v = (uint16_t)(0xEEEEu + (rng >> 16 & 0x0707u));
        memcpy(random + i, &v, 2);
    }
    for (size_t at = some; at < kv->bytes; at += some)
        memcpy(random + at, random, kv->bytes - at < some ? kv->bytes - at : some);
    cuda->device->put(cuda->device, kv->memory, random, kv->bytes);
    free(random);
}

// What a page has from a slot on becomes no number, of K and V in bf16; in eight bits the slots' scales do.
static void spoil_slots(struct kv_store *kv, size_t page, size_t slot) {
    for (size_t l = 0; l < 2 * kv->n_layers; l++) {
        const struct kv_layer *layer = &kv->layers[l / 2];
        bool fp8 = layer->type == DTYPE_FP8, of_v = l % 2;
        size_t elements = layer->head_dim * KV_PAGE_TOKENS, blocks = layer->head_dim / FP8_BLOCK;
        size_t bytes = fp8 ? elements / FP8_BLOCK * (FP8_BLOCK + 1) : 2 * elements;
        for (size_t head = 0; head < layer->n_kv_heads; head++) {
            unsigned char *at =
                (unsigned char *)(of_v ? layer->v : layer->k) + (page * layer->n_kv_heads + head) * bytes;
            for (size_t i = 0; i < blocks && !fp8; i++)
                cuda->device->fill(cuda->device, at + (i * KV_PAGE_TOKENS + slot) * 64, 0xFF,
                                   (KV_PAGE_TOKENS - slot) * 64);
            for (size_t i = slot * blocks; i < KV_PAGE_TOKENS * blocks && fp8; i++) {
                size_t s = i / blocks, v = i % blocks * KV_PAGE_TOKENS + s % 8 / 2 * 8 + s / 8 * 2 + s % 2;
                cuda->device->fill(cuda->device, at + elements + (of_v ? v : i), 0xFF, 1);
            }
        }
    }
}

static void run_at_depths(const struct subject *s, enum dtype kv_type, uint32_t fusion, const size_t *depths,
                          size_t n_depths, float *out) {
    const struct model_config *c = &s->model->config;
    struct error err = {0};
    size_t most = 0;
    for (size_t i = 0; i < n_depths; i++) most = depths[i] + STEPS_AT_DEPTH > most ? depths[i] + STEPS_AT_DEPTH : most;
    size_t n_pages = (most + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    struct run_options o = {.ops = cuda,
                            .pool = pool,
                            .fusion = fusion,
                            .max_tokens = 1,
                            .max_logit_rows = 1,
                            .max_positions = most,
                            .weights = s->weights,
                            .max_pages = n_pages};
    struct run *run = run_create(s->model, &o, &err);
    struct kv_store kv;
    if (!run || !kv_store_create_on(cuda->device, &kv, c, kv_type, n_pages, &err)) fail_msg("%s", err.text);
    int32_t *pages = checked(n_pages, sizeof *pages);
    for (size_t i = 0; i < n_pages; i++) pages[i] = (int32_t)(n_pages - 1 - i);
    fill_randomly(&kv);
    for (size_t i = 0; i < n_depths * STEPS_AT_DEPTH; i++, out += c->n_vocab) {
        int32_t position = (int32_t)(depths[i / STEPS_AT_DEPTH] + i % STEPS_AT_DEPTH), kv_len = position + 1;
        int32_t token = id_at(s->model, 0, (size_t)position), zero = 0, starts[] = {0, 1};
        int32_t page_start[] = {0, position / KV_PAGE_TOKENS + 1};
        struct batch b = {.n_tokens = 1,
                          .n_seqs = 1,
                          .n_logit_rows = 1,
                          .token = &token,
                          .position = &position,
                          .seq = &zero,
                          .seq_start = starts,
                          .page_start = page_start,
                          .pages = pages,
                          .kv_len = &kv_len,
                          .logit_rows = &zero};
        const float *logits = model_forward(s->model, run, &kv, &b);
        if (!run_error(run, &err)) fail_msg("depth %d: %s", (int)position, err.text);
        memcpy(out, logits, c->n_vocab * sizeof *out);
    }
    free(pages);
    kv_store_free(&kv);
    run_free(run);
}

// How many steps' logits differ.
static size_t different_steps(const struct subject *s, const size_t *depths, size_t n_depths, const float *expected,
                              const float *found) {
    size_t n = s->model->config.n_vocab, steps = n_depths * STEPS_AT_DEPTH, different = 0;
    for (size_t i = 0; i < steps; i++) {
        size_t first = 0, wrong = n_different(expected + i * n, found + i * n, n, &first);
        if (wrong)
            print_message("depth %zu: %zu of %zu logits differ, the first at %zu: %.9g, not %.9g\n",
                          depths[i / STEPS_AT_DEPTH] + i % STEPS_AT_DEPTH, wrong, n, first,
                          (double)found[i * n + first], (double)expected[i * n + first]);
        different += wrong > 0;
    }
    return different;
}

size_t compare_depths(const struct subject *s, uint32_t variant, const size_t *depths, size_t n_depths) {
    size_t n = n_depths * STEPS_AT_DEPTH * s->model->config.n_vocab;
    float *with = checked(n, sizeof *with), *without = checked(n, sizeof *without);
    uint32_t variants = cuda->device->variants;
    cuda->device->variants = variants & ~variant;
    run_at_depths(s, DTYPE_BF16, all_fused(), depths, n_depths, without);
    cuda->device->variants = variants | variant;
    run_at_depths(s, DTYPE_BF16, all_fused(), depths, n_depths, with);
    cuda->device->variants = variants;
    size_t different = different_steps(s, depths, n_depths, without, with);
    free(with);
    free(without);
    return different;
}

size_t compare_depths_fp8(const struct subject *s, const size_t *depths, size_t n_depths) {
    size_t n = n_depths * STEPS_AT_DEPTH * s->model->config.n_vocab;
    float *fused = checked(n, sizeof *fused), *standard = checked(n, sizeof *standard);
    run_at_depths(s, DTYPE_FP8, 0, depths, n_depths, standard);
    run_at_depths(s, DTYPE_FP8, all_fused(), depths, n_depths, fused);
    size_t different = different_steps(s, depths, n_depths, standard, fused);
    free(fused);
    free(standard);
    return different;
}

static void run_company(const struct subject *s, const size_t *depths, size_t n, bool fp8, float *out) {
    const struct model_config *c = &s->model->config;
    struct error err = {0};
    size_t n_pages = 0, longest = 0;
    int32_t *numbers = checked(8 * (n + 1), sizeof *numbers), *at = numbers;
    struct batch b = {.n_tokens = n, .n_seqs = n, .n_logit_rows = n};
    int32_t *const arrays[] = {at, at += n + 1, at += n + 1, at += n + 1, at += n + 1, at += n + 1, at += n + 1};
    const int32_t **places[] = {&b.token, &b.position, &b.seq, &b.seq_start, &b.page_start, &b.kv_len, &b.logit_rows};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) *places[i] = arrays[i];
    for (size_t i = 0; i < n; i++) {
        const int32_t values[] = {
            id_at(s->model, i, depths[i]), (int32_t)depths[i], (int32_t)i, (int32_t)i, (int32_t)n_pages,
            (int32_t)depths[i] + 1,        (int32_t)i};
        for (size_t k = 0; k < sizeof values / sizeof *values; k++) arrays[k][i] = values[k];
        n_pages += depths[i] / KV_PAGE_TOKENS + 1;
        longest = depths[i] > longest ? depths[i] : longest;
    }
    arrays[3][n] = (int32_t)n;
    arrays[4][n] = (int32_t)n_pages;
    int32_t *pages = checked(n_pages, sizeof *pages);
    for (size_t i = 0; i < n_pages; i++) pages[i] = (int32_t)(n_pages - 1 - i);
    b.pages = pages;
    struct run_options o = {.ops = cuda,
                            .pool = pool,
                            .fusion = all_fused(),
                            .max_tokens = n,
                            .max_logit_rows = n,
                            .max_positions = longest + 1,
                            .weights = s->weights,
                            .max_pages = n_pages};
    struct run *run = run_create(s->model, &o, &err);
    struct kv_store kv;
    if (!run || !kv_store_create_on(cuda->device, &kv, c, fp8 ? DTYPE_FP8 : DTYPE_BF16, n_pages, &err))
        fail_msg("%s", err.text);
    fill_randomly(&kv);
    for (size_t i = 0; i < n; i++)
        spoil_slots(&kv, (size_t)pages[(size_t)arrays[4][i + 1] - 1], depths[i] % KV_PAGE_TOKENS);
    const float *logits = model_forward(s->model, run, &kv, &b);
    if (!run_error(run, &err)) fail_msg("%zu sequences: %s", n, err.text);
    memcpy(out, logits, n * c->n_vocab * sizeof *out);
    free(pages);
    free(numbers);
    kv_store_free(&kv);
    run_free(run);
}

size_t compare_company(const struct subject *s, uint32_t variant, const size_t *depths, size_t n, bool fp8) {
    size_t width = s->model->config.n_vocab, different = 0;
    float *with = checked(n * width, sizeof *with), *without = checked(n * width, sizeof *without);
    uint32_t variants = cuda->device->variants;
    cuda->device->variants = variants & ~variant;
    run_company(s, depths, n, fp8, without);
    cuda->device->variants = variants | variant;
    run_company(s, depths, n, fp8, with);
    cuda->device->variants = variants;
    for (size_t i = 0; i < n; i++) {
        size_t first = 0, wrong = n_different(without + i * width, with + i * width, width, &first);
        for (size_t k = 0; k < width && !wrong; k++)
            if (!isfinite(with[i * width + k])) fail_msg("sequence %zu at depth %zu: no number", i, depths[i]);
        if (wrong && different++ < 8)
            print_message(
                "sequence %zu of %zu, at depth %zu: %zu of %zu logits differ, the first at %zu: %.9g, not %.9g\n", i, n,
                depths[i], wrong, width, first, (double)with[i * width + first], (double)without[i * width + first]);
    }
    free(with);
    free(without);
    return different;
}

// ---- Steps queued one behind the other ----------------------------------------------------------------------------

// How the tokens of steps of one token are chosen, in turns; every seventh step has a second sequence beside.
static struct sample_row chain_row(size_t step) {
    struct sample_row r = {.top_p = 1, .seed = 5 + step};
    if (step % 6 == 4) r.scale = sampling_scale(0.8);
    if (step % 10 == 9) r.scale = sampling_scale(1.1), r.top_k = 20;
    r.ban = step % 8 == 7;
    return r;
}

// `choices` [CHAIN_STEPS]: the first sequence's, from `depth` on, over pages of random numbers. late: a step is queued
// before the choice of the step before it is waited for. sampled: with the token that the step before chose.
static void run_chain(const struct subject *s, size_t depth, bool late, bool sampled, struct greedy_choice *choices) {
    struct error err = {0};
    size_t most = depth + CHAIN_STEPS, per_seq = most / KV_PAGE_TOKENS + 1;
    struct run_options o = {.ops = cuda,
                            .pool = pool,
                            .fusion = all_fused(),
                            .max_tokens = 2,
                            .max_logit_rows = 2,
                            .max_positions = most,
                            .weights = s->weights,
                            .max_pages = 2 * per_seq};
    struct run *run = run_create(s->model, &o, &err);
    struct kv_store kv;
    if (!run || !kv_store_create_on(cuda->device, &kv, &s->model->config, DTYPE_BF16, 2 * per_seq, &err))
        fail_msg("%s", err.text);
    int32_t *pages = checked(2 * per_seq, sizeof *pages);
    for (size_t i = 0; i < 2 * per_seq; i++) pages[i] = (int32_t)(2 * per_seq - 1 - i);
    fill_randomly(&kv);
    for (size_t i = 0; i < CHAIN_STEPS; i++) {
        size_t n = i % 7 == 5 ? 2 : 1;
        int32_t at = (int32_t)(depth + i), banned[] = {3, 11};
        int32_t token[] = {sampled && i % 3 > 0 ? ~0 : id_at(s->model, 0, depth + i), id_at(s->model, 1, depth + i)};
        struct sample_row rows[] = {chain_row(i), chain_row(i + 1)};
        struct batch b = {.n_tokens = n,
                          .n_seqs = n,
                          .n_logit_rows = n,
                          .token = token,
                          .position = (const int32_t[]){at, at},
                          .seq = (const int32_t[]){0, 1},
                          .seq_start = (const int32_t[]){0, 1, 2},
                          .page_start = (const int32_t[]){0, (int32_t)per_seq, 2 * (int32_t)per_seq},
                          .pages = pages,
                          .kv_len = (const int32_t[]){at + 1, at + 1},
                          .logit_rows = (const int32_t[]){0, 1},
                          .sample = sampled ? rows : NULL,
                          .banned = sampled ? banned : NULL,
                          .n_banned = sampled ? 2 : 0};
        model_queue(s->model, run, &kv, &b);
        if (late && i > 0) choices[i - 1] = run_choices_of(run, run_turn(run) ^ 1)[0];
        if (!late || i + 1 == CHAIN_STEPS) choices[i] = run_choices(run)[0];
        if (i % 11 == 8 && !isfinite(run_logits(run)[0])) fail_msg("step %zu: no number", i);
    }
    if (!run_error(run, &err)) fail_msg("depth %zu: %s", depth, err.text);
    free(pages);
    kv_store_free(&kv);
    run_free(run);
}

size_t compare_chain(const struct subject *s, uint32_t variants, size_t depth, bool sampled) {
    struct greedy_choice expected[CHAIN_STEPS], found[CHAIN_STEPS];
    uint32_t all = cuda->device->variants;
    size_t different = 0;
    cuda->device->variants = all & ~variants;
    run_chain(s, depth, false, sampled, expected);
    cuda->device->variants = all | variants;
    for (int late = 0; late < 2; late++) {
        run_chain(s, depth, late, sampled, found);
        for (size_t i = 0; i < CHAIN_STEPS; i++) {
            if (!expected[i].ok) fail_msg("step %zu: no number", i);
            if (memcmp(&expected[i], &found[i], sizeof *found) == 0) continue;
            print_message("depth %zu, step %zu%s%s: token %d (%.9g, %d), not %d (%.9g)\n", depth, i,
                          late ? ", queued ahead" : "", sampled ? ", sampled" : "", (int)found[i].id,
                          (double)found[i].logprob, (int)found[i].ok, (int)expected[i].id, (double)expected[i].logprob);
            different++;
        }
    }
    cuda->device->variants = all;
    return different;
}

static const size_t chunks_of_plan[] = {2,  3,  4,  5,  7,  8,  9,   15,  16,  17,  24, 31,
                                        32, 33, 48, 63, 64, 65, 100, 128, 129, 200, 300};
static const size_t neighbours_of_plan[] = {2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 100, 256};

const struct plan long_plan = {.standard_chunk = 97,
                               .singly = true,
                               .whole = true,
                               .n_ragged = 7,
                               .n_crowd = 32,
                               .n_mixed = 140,
                               .each_op = true,
                               .chunks = chunks_of_plan,
                               .n_chunks = sizeof chunks_of_plan / sizeof chunks_of_plan[0],
                               .neighbours = neighbours_of_plan,
                               .n_neighbours = sizeof neighbours_of_plan / sizeof neighbours_of_plan[0]};

static void load_subject(struct subject *s, const char *model) {
    struct error err = {0};
    *s = (struct subject){0};
    struct model_load_options load = {.pool = pool};
    s->model = strncmp(model, "synthetic:", 10) == 0 ? model_synthetic(model, pool, NULL, &err)
                                                     : model_load(MODEL_FOLDER, model, &load, &err);
    if (!s->model) fail_msg("%s", err.text);
}

static void upload_subject(struct subject *s) {
    struct error err = {0};
    if (!model_runs_on(s->model, cuda->device, &err)) fail_msg("%s", err.text);
    s->weights = weights_upload(s->model, cuda->device, pool, NULL, &err);
    if (!s->weights) fail_msg("%s", err.text);
}

void open_subject(struct subject *s, const char *model) {
    load_subject(s, model);
    upload_subject(s);
}

// Fewer of what a model has: rows and columns of its matrices go unused.
static void cut(struct model *m, const struct part *part) {
    struct model_config *c = &m->config;
    assert_true(part->n_layers <= c->n_layers && part->n_vocab <= c->n_vocab && part->n_ff <= c->n_ff &&
                part->head_dim <= c->head_dim && part->n_heads * part->head_dim <= c->n_heads * c->head_dim &&
                part->n_kv_heads * part->head_dim <= c->n_kv_heads * c->head_dim);
    if (part->n_layers) c->n_layers = part->n_layers;
    if (part->n_vocab) c->n_vocab = m->embed.n_out = m->head.n_out = part->n_vocab;
    if (part->n_ff) c->n_ff = part->n_ff;
    if (part->n_heads) {
        c->n_heads = part->n_heads;
        c->n_kv_heads = part->n_kv_heads;
        c->head_dim = part->head_dim;
    }
    for (size_t i = 0; i < c->n_layers; i++) {
        struct layer_weights *w = &m->layers[i];
        w->wq.n_out = w->wo.n_in = c->n_heads * c->head_dim;
        w->wk.n_out = w->wv.n_out = c->n_kv_heads * c->head_dim;
        w->w_gate.n_out = w->w_up.n_out = w->w_down.n_in = c->n_ff;
    }
}

// The matrix in another type, in the model's arena.
static void retype(struct model *m, struct matrix *w, enum dtype type) {
    size_t row_bytes;
    assert_true(dtype_row_bytes(type, w->n_in, &row_bytes));
    unsigned char *data = arena_alloc(&m->arena, w->n_out, row_bytes);
    float *row = checked(w->n_in, sizeof *row);
    assert_non_null(data);
    for (size_t r = 0; r < w->n_out; r++) {
        dtype_to_f32(w->type, (const unsigned char *)w->data + r * w->row_bytes, row, w->n_in);
        dtype_from_f32(type, row, data + r * row_bytes, w->n_in);
    }
    free(row);
    w->type = type;
    w->row_bytes = row_bytes;
    w->data = data;
}

void open_part(struct subject *s, const char *model, const struct part *part) {
    open_part_as(s, model, part, DTYPE_COUNT);
}

void open_part_as(struct subject *s, const char *model, const struct part *part, enum dtype type) {
    load_subject(s, model);
    struct model *m = s->model;
    cut(m, part);
    if (type != DTYPE_COUNT) {
        bool tied = m->head.data == m->embed.data;
        retype(m, &m->embed, type);
        if (tied) m->head = m->embed;
        else retype(m, &m->head, type);
        for (size_t i = 0; i < m->config.n_layers; i++) {
            struct layer_weights *w = &m->layers[i];
            struct matrix *all[] = {&w->wq, &w->wk, &w->wv, &w->wo, &w->w_gate, &w->w_up, &w->w_down};
            for (size_t k = 0; k < sizeof all / sizeof all[0]; k++) retype(m, all[k], type);
        }
    }
    upload_subject(s);
}

void open_loud(struct subject *s, const char *model, const struct part *part, float by) {
    load_subject(s, model);
    struct model *m = s->model;
    cut(m, part);
    size_t n = m->config.head_dim;
    for (size_t i = 0; i < m->config.n_layers; i++) {
        float *norm = arena_alloc(&m->arena, n, sizeof *norm);
        assert_non_null(norm);
        assert_non_null(m->layers[i].q_norm);
        for (size_t c = 0; c < n; c++) norm[c] = m->layers[i].q_norm[c] * by;
        m->layers[i].q_norm = norm;
    }
    upload_subject(s);
}

void close_subject(struct subject *s) {
    weights_free(s->weights);
    model_free(s->model);
}

// ---- Against the oracle -------------------------------------------------------------------------------------------

enum { ORACLE_TOKENS = 70 };

// One recorded activation of one path.
struct record {
    char name[32];
    int layer;
    size_t n;
    double *data;
};

struct records {
    struct record *list;
    size_t n;
};

static struct record *add_record(struct records *r, const char *name, int layer, size_t n) {
    r->list = realloc(r->list, (r->n + 1) * sizeof *r->list);
    assert_non_null(r->list);
    struct record *x = &r->list[r->n++];
    snprintf(x->name, sizeof x->name, "%s", name);
    x->layer = layer;
    x->n = n;
    x->data = checked(n, sizeof *x->data);
    return x;
}

static void record_oracle(void *user, const char *name, int layer, const double *data, size_t n_rows,
                          size_t n_columns) {
    memcpy(add_record(user, name, layer, n_rows * n_columns)->data, data, n_rows * n_columns * sizeof *data);
}

static void record_run(void *user, const char *name, int layer, const float *data, size_t n_rows, size_t n_columns) {
    struct record *r = add_record(user, name, layer, n_rows * n_columns);
    for (size_t i = 0; i < r->n; i++) r->data[i] = (double)data[i];
}

static void free_records(struct records *r) {
    for (size_t i = 0; i < r->n; i++) free(r->list[i].data);
    free(r->list);
}

static const struct record *find_record(const struct records *r, const char *name, int layer) {
    for (size_t i = 0; i < r->n; i++)
        if (r->list[i].layer == layer && strcmp(r->list[i].name, name) == 0) return &r->list[i];
    return NULL;
}

static double distance(const struct record *a, const struct record *b) {
    double sum = 0;
    for (size_t i = 0; i < a->n; i++) sum += (a->data[i] - b->data[i]) * (a->data[i] - b->data[i]);
    return sqrt(sum / (double)a->n);
}

static void run_oracle(const struct subject *s, enum oracle_kind kind, struct records *out) {
    struct error err = {0};
    int32_t ids[ORACLE_TOKENS];
    size_t rows[ORACLE_TOKENS];
    for (size_t i = 0; i < ORACLE_TOKENS; i++) ids[i] = id_at(s->model, 0, i), rows[i] = i;
    struct oracle *o = oracle_create(s->model, kind, pool, ORACLE_TOKENS, &err);
    double *logits = checked(ORACLE_TOKENS * s->model->config.n_vocab, sizeof *logits);
    struct oracle_step step = {.ids = ids,
                               .n = ORACLE_TOKENS,
                               .tap = record_oracle,
                               .tap_user = out,
                               .logit_rows = rows,
                               .n_logit_rows = ORACLE_TOKENS};
    if (!o || !oracle_run(o, &step, logits, &err)) fail_msg("%s", err.text);
    free(logits);
    oracle_free(o);
}

static void run_device(const struct subject *s, uint32_t fusion, struct records *out) {
    struct error err = {0};
    int32_t ids[ORACLE_TOKENS], position[ORACLE_TOKENS], seq[ORACLE_TOKENS] = {0};
    int32_t seq_start[] = {0, ORACLE_TOKENS}, page_start[] = {0, 3}, pages[] = {2, 0, 1}, kv_len[] = {ORACLE_TOKENS};
    for (int32_t i = 0; i < ORACLE_TOKENS; i++) ids[i] = id_at(s->model, 0, (size_t)i), position[i] = i;
    struct run_options o = {.ops = cuda,
                            .pool = pool,
                            .fusion = fusion,
                            .max_tokens = ORACLE_TOKENS,
                            .max_logit_rows = ORACLE_TOKENS,
                            .max_positions = ORACLE_TOKENS,
                            .weights = s->weights};
    struct run *run = run_create(s->model, &o, &err);
    struct kv_store kv;
    if (!run || !kv_store_create_on(cuda->device, &kv, &s->model->config, DTYPE_BF16, 3, &err))
        fail_msg("%s", err.text);
    cuda->device->fill(cuda->device, kv.memory, 0xFF, kv.bytes); // NaN
    struct batch b = {.n_tokens = ORACLE_TOKENS,
                      .n_seqs = 1,
                      .n_logit_rows = ORACLE_TOKENS,
                      .token = ids,
                      .position = position,
                      .seq = seq,
                      .seq_start = seq_start,
                      .page_start = page_start,
                      .pages = pages,
                      .kv_len = kv_len,
                      .logit_rows = position};
    run_set_tap(run, record_run, out);
    model_forward(s->model, run, &kv, &b);
    if (!run_error(run, &err)) fail_msg("%s", err.text);
    kv_store_free(&kv);
    run_free(run);
}

size_t judge_results(const struct subject *s, const char *model, double logits_limit) {
    struct records t = {0}, h = {0};
    run_oracle(s, ORACLE_T, &t);
    run_oracle(s, ORACLE_H, &h);
    size_t bad = 0;
    for (int fused = 0; fused < 2; fused++) {
        struct records found = {0};
        double worst = 0, logits = -1;
        run_device(s, fused ? all_fused() : 0, &found);
        assert_true(found.n > 0);
        for (size_t i = 0; i < found.n; i++) {
            const struct record *r = &found.list[i], *exact = find_record(&t, r->name, r->layer),
                                *hf = find_record(&h, r->name, r->layer);
            if (!exact || !hf || exact->n != r->n)
                fail_msg("%s: no oracle for %s of layer %d", model, r->name, r->layer);
            double mine = distance(r, exact), theirs = distance(hf, exact);
            double ratio = theirs > 0 ? mine / theirs : mine > 0 ? INFINITY : 0;
            bool is_logits = strcmp(r->name, "logits") == 0;
            if (is_logits) logits = ratio;
            else if (ratio > worst) worst = ratio;
            if (ratio <= (is_logits ? logits_limit : 2.0)) continue;
            if (bad++ < 20)
                print_message("%s: %s of layer %d: error %.4g, Hugging Face's %.4g\n", model, r->name, r->layer, mine,
                              theirs);
        }
        print_message("%s, %s: error over Hugging Face's: logits %.3f, worst activation %.3f\n", model,
                      fused ? "fused" : "standard", logits, worst);
        free_records(&found);
    }
    free_records(&t);
    free_records(&h);
    return bad;
}
