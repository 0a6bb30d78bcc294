// stage_ops.c: every op alone. The primitives on chosen inputs are judged by T; whatever else may compute the same (a
// fused op, another number of tokens, threads, pages, neighbours or instruction set) must return the same bits.
#include "doctor/stage_ops.h"

#include "base/clock.h"
#include "base/size.h"
#include "model/oracle.h"
#include "ops/kv_page.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Tokens in a step: small numbers, the borders of every tile, a page, a chunk; the most telling first.
static const size_t token_counts[] = {1,  2,  3,  5,   7,   17,  33,  4,   8,   16,  31, 65, 6,  9,  12, 15,
                                      32, 63, 64, 127, 129, 257, 300, 128, 255, 256, 10, 11, 13, 14, 48, 96};
enum { N_TOKEN_COUNTS = sizeof token_counts / sizeof token_counts[0], MAX_TOKENS = 300, MAX_POOLS = 5 };

// Every name that ops_cpu knows; those that this machine lacks are left out.
static const char *const isa_names[] = {"portable",   "avx2",  "avx512", "avx512bf16",
                                        "avx512vnni", "avx10", "amx",    "neon"};
enum { N_ISAS = sizeof isa_names / sizeof isa_names[0] };

struct stage {
    struct doctor *d;
    struct stage_report *r;
    struct error *err;
    struct judgement judged;
    const struct ops *variants[N_ISAS]; // other instruction sets than the one under test
    size_t n_variants;
    struct pool *pools[MAX_POOLS]; // other numbers of threads
    size_t n_pools;
    struct room room;                                                 // on the ops' device
    size_t n_layers, n_counts, most_tokens, longest, most_neighbours; // covered, for the summary
    double layer_budget;                                              // seconds
};

static double uniform(uint32_t *rng) {
    *rng = *rng * 1664525u + 1013904223u;
    return (double)(*rng >> 8) / 8388608.0 - 1;
}

// ---- Inputs --------------------------------------------------------------------------------------------------------

// The residual stream of n tokens: ordinary rows, and rows that break careless code: one channel a thousand times the
// others; so small that only eps counts; large; nearly all zero; all zero; with subnormal values.
static float *make_rows(struct arena *arena, size_t n, size_t hidden, uint32_t seed, bool plain) {
    float *x = arena_alloc(arena, n * hidden, sizeof *x);
    uint32_t rng = seed;
    for (size_t t = 0; x && t < n; t++) {
        float *row = x + t * hidden;
        size_t kind = plain ? 0 : t % 16;
        for (size_t i = 0; i < hidden; i++) row[i] = (float)(uniform(&rng) * 1.7);
        if (kind == 3 || kind == 10) row[(t * 37 + 11) % hidden] *= 1000;
        if (kind == 4)
            for (size_t i = 0; i < hidden; i++) row[i] *= 1e-5f;
        if (kind == 5)
            for (size_t i = 0; i < hidden; i++) row[i] *= 1e4f;
        if (kind == 6)
            for (size_t i = 0; i < hidden; i++) row[i] = 0;
        if (kind == 7)
            for (size_t i = 0; i < hidden; i++) row[i] = i % 61 == 5 ? row[i] : 0;
        if (kind == 8 && hidden > 16) row[5] = 1e-41f, row[12] = -3e-40f;
    }
    return x;
}

// K or V of positions that an earlier step stored.
static float *make_past(struct arena *arena, const struct doctor *d, size_t n, uint32_t seed) {
    size_t width = d->model->config.n_kv_heads * d->model->config.head_dim;
    float *p = arena_alloc(arena, n * width + 1, sizeof *p);
    uint32_t rng = seed;
    for (size_t i = 0; p && i < n * width; i++) p[i] = (float)(uniform(&rng) * 2);
    if (p) kv_as_stored(d->kv_type, p, p, n * width);
    return p;
}

// Norm weights up to 128, as no training would leave them and published models nearly do: a pair of channels far above
// the rest, small ones, negative ones.
static const float *make_norm(struct arena *arena, size_t n, uint32_t seed, float hot) {
    float *w = arena_alloc(arena, n, sizeof *w);
    uint32_t rng = seed;
    for (size_t i = 0; w && i < n; i++) w[i] = (float)(uniform(&rng) * 0.7 + 0.9);
    if (w && n > 3) {
        w[n / 3] = hot;
        w[(n / 3 + n / 2) % n] = -hot * 0.75f;
        w[1] = 1e-3f;
    }
    return w;
}

// ---- Comparing -----------------------------------------------------------------------------------------------------

// What a comparison is called, and how it is blamed.
struct comparison {
    enum fault_kind kind;
    const char *check;
    const char *variant;
    bool fused; // blame the fused op, not the primitive
};

static bool same_row(const float *a, const float *b, size_t n, size_t *where) {
    if (memcmp(a, b, n * sizeof *a) == 0) return true;
    for (size_t i = 0; i < n; i++) {
        if (memcmp(&a[i], &b[i], sizeof *a) == 0 || (isnan(a[i]) && isnan(b[i]))) continue;
        *where = i;
        return false;
    }
    return true;
}

static void bits_fault(struct stage *s, const struct comparison *how, int layer, enum segment seg, int position,
                       size_t column, float expected, float found) {
    struct fault *f = segment_fault(s->r, how->kind, how->check, &s->d->model->config, layer, seg, position, column,
                                    (double)expected, (double)found);
    snprintf(f->op, sizeof f->op, "%s",
             how->fused ? fusion_info(segment_infos[seg].fused)->name : segment_infos[seg].primitive);
    snprintf(f->variant, sizeof f->variant, "%s", how->variant);
    fault_say(f, "%s: %s, %s: %s at position %d, column %zu is %.9g where the plain run has %.9g", f->tensor,
              how->check, how->variant, f->op, position, column, f->found, f->expected);
}

// Rows of `got` against rows first + i of `plain`. The first segment that differs is reported: those after it were fed
// by it.
static bool compare(struct stage *s, const struct op_case *c, const struct capture *plain, size_t first,
                    const struct capture *got, const struct comparison *how) {
    const struct model_config *m = &s->d->model->config;
    s->r->n_checks++;
    if (got->overran || got->kv_touched) {
        struct fault *f =
            stage_fault(s->r, how->kind, got->overran ? "scratch is not overrun" : "only its slots written");
        f->layer = c ? c->layer : -1;
        snprintf(f->op, sizeof f->op, "%s",
                 got->overran ? "attention"
                 : how->fused ? "qk_norm_rope_store"
                              : "kv_store");
        snprintf(f->variant, sizeof f->variant, "%s", how->variant);
        if (!got->overran) f->position = got->touched_position;
        fault_say(f, "%s: %s", how->variant,
                  got->overran ? "an op wrote beyond the scratch that ops_scratch_floats asks for"
                               : "a KV slot that belongs to no token of the step was written");
        return false;
    }
    for (int seg = 0; seg < SEG_COUNT; seg++) {
        if (!got->present[seg] || !plain->present[seg]) continue;
        size_t columns = segment_columns(m, (enum segment)seg), at = 0;
        for (size_t t = 0; t < got->n_rows; t++) {
            const float *a = plain->seg[seg] + (first + t) * columns, *b = got->seg[seg] + t * columns;
            if (same_row(a, b, columns, &at)) continue;
            bits_fault(s, how, c ? c->layer : -1, (enum segment)seg, c ? case_position(c, t) : (int)t, at, a[at],
                       b[at]);
            return false;
        }
    }
    return true;
}

// ---- One case in every way -----------------------------------------------------------------------------------------

static struct op_way plain_way(struct stage *s) {
    return (struct op_way){.ops = s->d->ops, .pool = s->d->pool, .room = &s->room};
}

static bool fused_differs(const struct stage *s) {
    for (int i = 0; i < FUSED_COUNT; i++)
        if ((s->d->fusion >> i & 1) && fusion_available(s->d->ops, (enum fused_op)i)) return true;
    return false;
}

// Whether some fused op is one that only unwatched runs take.
static bool has_unwatched(const struct stage *s) {
    return (s->d->fusion >> FUSED_ROPE_ATTENTION & 1) && fusion_available(s->d->ops, FUSED_ROPE_ATTENTION);
}

// All fused ops with nobody watching: none waits for the host, each begins as early as it may, and those run that have
// parts to be shown. What differs is then blamed on such an op, if without it nothing does.
static bool leave_alone(struct stage *s, const struct op_case *c, const struct capture *plain, struct capture *got,
                        uint32_t flipped, const char *what) {
    char variant[96];
    struct comparison how = {FAULT_FUSED, "fused = its primitives", variant, true};
    struct op_way way = plain_way(s);
    way.fusion = s->d->fusion;
    way.unwatched = true;
    way.flipped = flipped;
    size_t before = s->r->n_faults;
    snprintf(variant, sizeof variant, "%s, all fused, unwatched%s", c->name, what);
    if (!run_layer(c, &way, got, s->err)) return false;
    if (compare(s, c, plain, 0, got, &how) || !has_unwatched(s)) return true;
    way.fusion &= ~(1u << FUSED_ROPE_ATTENTION);
    struct stage_report silent = {0}, *loud = s->r;
    s->r = &silent;
    bool ok = run_layer(c, &way, got, s->err), same = ok && compare(s, c, plain, 0, got, &how);
    s->r = loud;
    if (same && before < MAX_FAULTS)
        snprintf(s->r->faults[before].op, sizeof s->r->faults[before].op, "%s",
                 fusion_info(FUSED_ROPE_ATTENTION)->name);
    return ok;
}

// A device's kernels that may stand in for others: each used where it was not, or not where it was.
static bool vary_kernels(struct stage *s, const struct op_case *c, const struct capture *plain, struct capture *got) {
    struct device *device = s->d->ops->device;
    char variant[96];
    for (size_t i = 0; device && i < device->n_variants; i++) {
        bool used = device->variants >> i & 1;
        for (int fused = 0; fused <= 1; fused++) {
            struct comparison how = {FAULT_VARIANT, "kernels agree", variant, fused != 0};
            struct op_way way = plain_way(s);
            way.fusion = fused ? s->d->fusion : 0;
            way.flipped = 1u << i;
            snprintf(variant, sizeof variant, "%s, %s %s", c->name, used ? "without" : "with",
                     device->variant_names[i]);
            if (!run_layer(c, &way, got, s->err)) return false;
            compare(s, c, plain, 0, got, &how);
        }
        snprintf(variant, sizeof variant, ", %s %s", used ? "without" : "with", device->variant_names[i]);
        if (fused_differs(s) && !leave_alone(s, c, plain, got, 1u << i, variant)) return false;
    }
    return true;
}

// Threads, pages and instruction sets, on the plain and on the fused path; or a device's kernels.
static bool vary_case(struct stage *s, const struct op_case *c, const struct capture *plain, struct capture *got) {
    char variant[96];
    for (int fused = 0; fused <= 1; fused++) {
        struct comparison how = {FAULT_VARIANT, NULL, variant, fused != 0};
        struct op_way way = plain_way(s);
        way.fusion = fused ? s->d->fusion : 0;
        how.check = "page numbers do not matter";
        for (uint32_t order = 1; order <= 2; order++) {
            way.page_order = order * 7919;
            snprintf(variant, sizeof variant, "%s, pages permuted", c->name);
            if (!run_layer(c, &way, got, s->err)) return false;
            compare(s, c, plain, 0, got, &how);
        }
        how.check = "threads do not matter";
        way.page_order = 0;
        for (size_t i = 0; i < s->n_pools; i++) {
            way.pool = s->pools[i];
            snprintf(variant, sizeof variant, "%s, %d threads", c->name, pool_size(way.pool));
            if (!run_layer(c, &way, got, s->err)) return false;
            compare(s, c, plain, 0, got, &how);
        }
        how.check = "instruction sets agree";
        way.pool = s->d->pool;
        for (size_t i = 0; i < s->n_variants; i++) {
            way.ops = s->variants[i];
            snprintf(variant, sizeof variant, "%s, %s", c->name, way.ops->name);
            if (!run_layer(c, &way, got, s->err)) return false;
            compare(s, c, plain, 0, got, &how);
        }
    }
    return vary_kernels(s, c, plain, got);
}

// The fused path, and each fused op alone.
static bool fuse_case(struct stage *s, const struct op_case *c, const struct capture *plain, struct capture *got) {
    char variant[96];
    struct op_way way = plain_way(s);
    struct comparison how = {FAULT_FUSED, "fused = its primitives", variant, true};
    if (!fused_differs(s)) return true;
    for (int i = 0; i <= FUSED_NORM_HEAD; i++) {
        way.fusion = s->d->fusion & 1u << i;
        if (!way.fusion || !fusion_available(s->d->ops, (enum fused_op)i) || i == FUSED_NORM_HEAD) continue;
        snprintf(variant, sizeof variant, "%s, %s alone", c->name, fusion_info((enum fused_op)i)->name);
        if (!run_layer(c, &way, got, s->err)) return false;
        compare(s, c, plain, 0, got, &how);
    }
    way.fusion = s->d->fusion;
    snprintf(variant, sizeof variant, "%s, all fused", c->name);
    if (!run_layer(c, &way, got, s->err)) return false;
    compare(s, c, plain, 0, got, &how);
    return !s->d->ops->device || leave_alone(s, c, plain, got, 0, "");
}

// ---- The cases -----------------------------------------------------------------------------------------------------

// The first and the last of n rows, at most `most` in all.
static size_t choose_rows(size_t n, size_t most, size_t *rows) {
    size_t k = 0;
    for (size_t i = 0; i < n; i++)
        if (n <= most || i < most / 2 || i >= n - most / 2) rows[k++] = i;
    return k;
}

// The numbers of tokens of a sweep: the most telling ones, and, for `every`, all others up to MAX_TOKENS after them.
static size_t choose_counts(bool every, size_t counts[MAX_TOKENS]) {
    bool chosen[MAX_TOKENS + 1] = {false};
    size_t n = 0;
    for (; n < N_TOKEN_COUNTS; n++) {
        counts[n] = token_counts[n];
        chosen[counts[n]] = true;
    }
    for (size_t i = 1; i <= MAX_TOKENS && every; i++)
        if (!chosen[i]) counts[n++] = i;
    return n;
}

// One prompt of many tokens, then pieces of it: the first T tokens, and the last T after the others.
static bool check_counts(struct stage *s, const struct op_case *c, const struct capture *plain, struct capture *got) {
    const struct model_config *m = &s->d->model->config;
    size_t n = plain->n_rows, done = 0, counts[MAX_TOKENS];
    size_t n_counts = choose_counts(s->d->options.thorough && c->layer == 0, counts);
    double end = clock_seconds() + s->layer_budget;
    bool fused = fused_differs(s);
    for (size_t i = 0; i < n_counts; i++) {
        if (counts[i] > n) continue;
        if (done >= 6 && clock_seconds() > end) break;
        done++;
        for (int last = 0; last <= 1; last++) {
            size_t count = counts[i], first = last ? n - count : 0;
            if (last && first == 0) continue;
            struct op_sequence seq = {
                .past = first, .n = count, .past_k = plain->seg[SEG_KV_K], .past_v = plain->seg[SEG_KV_V]};
            struct op_case piece = *c;
            piece.seqs = &seq;
            piece.n_seqs = 1;
            piece.x = c->x + first * m->hidden;
            char variant[96];
            snprintf(variant, sizeof variant, "T=%zu at position %zu", count, first);
            for (int f = 0; f <= fused; f++) {
                struct op_way way = plain_way(s);
                way.fusion = f ? s->d->fusion : 0;
                struct comparison how = {f ? FAULT_FUSED : FAULT_VARIANT,
                                         f ? "fused = its primitives" : "the number of tokens does not matter", variant,
                                         f != 0};
                if (!run_layer(&piece, &way, got, s->err)) return false;
                compare(s, &piece, plain, first, got, &how);
            }
        }
    }
    if (done > s->n_counts) s->n_counts = done;
    return true;
}

static bool check_prompt(struct stage *s, const struct layer_weights *w, int layer, size_t n, struct arena *arena) {
    enum { JUDGED = 24 };
    const struct model_config *m = &s->d->model->config;
    struct op_sequence seq = {.n = n};
    struct op_case c = {.name = "one prompt",
                        .d = s->d,
                        .weights = w,
                        .layer = layer,
                        .seqs = &seq,
                        .n_seqs = 1,
                        .x =
                            make_rows(arena, n, m->hidden, (uint32_t)(s->d->options.seed + 17 * (size_t)layer), false)};
    struct capture plain, got;
    struct op_way way = plain_way(s);
    size_t rows[JUDGED], n_rows = choose_rows(n, JUDGED, rows);
    if (!c.x) return error_set(s->err, "out of memory for %zu tokens", n);
    if (!capture_create(&plain, arena, m, n, false, s->err) || !capture_create(&got, arena, m, n, false, s->err) ||
        !run_layer(&c, &way, &plain, s->err))
        return false;
    compare(s, &c, &plain, 0, &plain, &(struct comparison){FAULT_OP, "only its slots written", "plain", false});
    return judge_layer(&c, &plain, rows, n_rows, s->r, &s->judged, s->err) && fuse_case(s, &c, &plain, &got) &&
           check_counts(s, &c, &plain, &got);
}

enum { MAX_SEQS = 256 };

// Several sequences in one step, decode and prefill mixed; each (or every so many) alone must give the same bits.
static bool check_batch(struct stage *s, const struct layer_weights *w, int layer, const char *name, size_t n_seqs,
                        const size_t *past, const size_t *n, bool vary, size_t alone_each, struct arena *arena) {
    enum { JUDGED = 8 };
    const struct model_config *m = &s->d->model->config;
    struct op_sequence seqs[MAX_SEQS];
    size_t total = 0, rows[JUDGED];
    for (size_t i = 0; i < n_seqs; i++) {
        uint32_t seed = (uint32_t)(1000 * s->d->options.seed + 31 * (size_t)layer + 2 * i);
        seqs[i] = (struct op_sequence){.past = past[i],
                                       .n = n[i],
                                       .past_k = make_past(arena, s->d, past[i], seed),
                                       .past_v = make_past(arena, s->d, past[i], seed + 1)};
        if (!seqs[i].past_k || !seqs[i].past_v) return error_set(s->err, "out of memory for %zu positions", past[i]);
        total += n[i];
        if (past[i] + n[i] > s->longest) s->longest = past[i] + n[i];
    }
    struct op_case c = {.name = name,
                        .d = s->d,
                        .weights = w,
                        .layer = layer,
                        .seqs = seqs,
                        .n_seqs = n_seqs,
                        .x = make_rows(arena, total, m->hidden, (uint32_t)(s->d->options.seed + 3), true)};
    struct capture plain, got;
    struct op_way way = plain_way(s);
    if (!c.x) return error_set(s->err, "out of memory for %zu tokens", total);
    if (!capture_create(&plain, arena, m, total, false, s->err) ||
        !capture_create(&got, arena, m, total, false, s->err) || !run_layer(&c, &way, &plain, s->err) ||
        !judge_layer(&c, &plain, rows, choose_rows(total, JUDGED, rows), s->r, &s->judged, s->err) ||
        !fuse_case(s, &c, &plain, &got) || (vary && !vary_case(s, &c, &plain, &got)))
        return false;
    for (size_t i = 0, first = 0; i < n_seqs; first += n[i++]) {
        if (i % alone_each != 0 && i != n_seqs - 1) continue;
        struct op_case alone = c;
        char variant[96];
        alone.seqs = &seqs[i];
        alone.n_seqs = 1;
        alone.x = c.x + first * m->hidden;
        snprintf(variant, sizeof variant, "%s, sequence %zu alone", name, i);
        for (int f = 0; f <= 1; f++) {
            struct comparison how = {FAULT_VARIANT, "neighbours do not matter", variant, f != 0};
            way.fusion = f ? s->d->fusion : 0;
            if (!run_layer(&alone, &way, &got, s->err)) return false;
            compare(s, &alone, &plain, first, &got, &how);
        }
    }
    return true;
}

static bool check_ragged(struct stage *s, const struct layer_weights *w, int layer, struct arena *arena) {
    static const size_t past[] = {0, 31, 32, 63, 100, 5}, n[] = {1, 1, 1, 2, 37, 20};
    return check_batch(s, w, layer, "ragged batch", 6, past, n, true, 1, arena);
}

// To 8,192 positions, on a device to 16,384.
static bool check_long(struct stage *s, const struct layer_weights *w, int layer, struct arena *arena) {
    size_t past[] = {255, 2048, 4095, 8185, 16377}, n[] = {1, 1, 3, 7, 7}, n_seqs = 4;
    size_t context = s->d->model->config.context;
    if (s->d->ops->device) n_seqs = s->d->options.budget < 10 ? 2 : 5;
    size_t most = n_seqs;
    for (size_t i = 0; i < most; i++)
        if (past[i] + n[i] > context)
            past[i] = context > n[i] ? context - n[i] : 0, n_seqs = i + 1 < n_seqs ? i + 1 : n_seqs;
    if (past[n_seqs - 1] + n[n_seqs - 1] > context) return true;
    return check_batch(s, w, layer, "long contexts", n_seqs, past, n, false, 1, arena);
}

// Only devices are worth these: a CPU's ops see rows, and the rows of a tile are all that lie next to each other.
//
// A token each for as many sequences as a step may have: what is streamed, recorded and split differs by their number.
static bool check_neighbours(struct stage *s, const struct layer_weights *w, int layer, struct arena *arena) {
    static const size_t counts[] = {2, 9, 33, 64, 256};
    size_t past[MAX_SEQS], n[MAX_SEQS], context = s->d->model->config.context;
    for (size_t i = 0; i < MAX_SEQS; i++) {
        past[i] = i % 16 == 3 ? 255 + i : i * 37 % 131;
        if (past[i] >= context) past[i] = context - 1;
        n[i] = 1;
    }
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        char name[32];
        if (i > 1 && clock_seconds() > s->d->deadline) break;
        snprintf(name, sizeof name, "%zu sequences", counts[i]);
        bool ok = check_batch(s, w, layer, name, counts[i], past, n, i == 1, counts[i] / 8 + 1, arena);
        arena_free(arena);
        if (!ok) return false;
        s->most_neighbours = counts[i];
    }
    return true;
}

// Whole chunks of a long prompt in one step; the last of their tokens, which see all others, are judged by T in a step
// of their own.
static bool check_chunks(struct stage *s, const struct layer_weights *w, int layer, struct arena *arena) {
    enum { MOST = 2048, TAIL = 17 };
    static const size_t counts[] = {512, 1024, 2048};
    const struct model_config *m = &s->d->model->config;
    float *x = make_rows(arena, MOST, m->hidden, (uint32_t)s->d->options.seed + 5, false);
    struct capture plain, got;
    size_t rows[TAIL];
    if (!x) return error_set(s->err, "out of memory for %d tokens", MOST);
    if (!capture_create(&plain, arena, m, MOST, false, s->err) || !capture_create(&got, arena, m, MOST, false, s->err))
        return false;
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        char name[32];
        if (counts[i] > m->context || clock_seconds() > s->d->deadline) break;
        snprintf(name, sizeof name, "T=%zu", counts[i]);
        struct op_sequence seq = {.n = counts[i]};
        struct op_case c = {.name = name, .d = s->d, .weights = w, .layer = layer, .seqs = &seq, .n_seqs = 1, .x = x};
        struct op_way way = plain_way(s);
        if (!run_layer(&c, &way, &plain, s->err) || !fuse_case(s, &c, &plain, &got) ||
            !vary_kernels(s, &c, &plain, &got))
            return false;
        struct op_sequence tail = {
            .past = counts[i] - TAIL, .n = TAIL, .past_k = plain.seg[SEG_KV_K], .past_v = plain.seg[SEG_KV_V]};
        struct op_case end = c;
        end.seqs = &tail;
        end.x = x + tail.past * m->hidden;
        struct comparison how = {FAULT_VARIANT, "the number of tokens does not matter", "its last 17 tokens", false};
        if (!run_layer(&end, &way, &got, s->err)) return false;
        compare(s, &end, &plain, tail.past, &got, &how);
        if (!judge_layer(&end, &got, rows, choose_rows(TAIL, TAIL, rows), s->r, &s->judged, s->err)) return false;
        s->most_tokens = counts[i] > s->most_tokens ? counts[i] : s->most_tokens;
        s->n_counts++;
    }
    return true;
}

// The same weights with norms that no training leaves behind.
static bool check_adversarial(struct stage *s, const struct layer_weights *w, int layer, struct arena *arena) {
    enum { TOKENS = 40 };
    const struct model_config *m = &s->d->model->config;
    struct layer_weights hot = *w;
    hot.attn_norm = make_norm(arena, m->hidden, 5, 128);
    hot.mlp_norm = make_norm(arena, m->hidden, 6, 96);
    if (w->q_norm) hot.q_norm = make_norm(arena, m->head_dim, 7, 24);
    if (w->k_norm) hot.k_norm = make_norm(arena, m->head_dim, 7, 96.5f);
    struct op_sequence seq = {.n = TOKENS};
    struct op_case c = {.name = "norm weights to 128",
                        .d = s->d,
                        .weights = &hot,
                        .layer = layer,
                        .seqs = &seq,
                        .n_seqs = 1,
                        .x = make_rows(arena, TOKENS, m->hidden, 99, false)};
    struct capture plain, got;
    struct op_way way = plain_way(s);
    size_t rows[TOKENS];
    if (!c.x || !hot.attn_norm || !hot.mlp_norm) return error_set(s->err, "out of memory");
    return capture_create(&plain, arena, m, TOKENS, false, s->err) &&
           capture_create(&got, arena, m, TOKENS, false, s->err) && run_layer(&c, &way, &plain, s->err) &&
           judge_layer(&c, &plain, rows, choose_rows(TOKENS, 16, rows), s->r, &s->judged, s->err) &&
           fuse_case(s, &c, &plain, &got) && vary_case(s, &c, &plain, &got);
}

// ---- Embedding, head, products of odd shapes -----------------------------------------------------------------------

// Rows of the embedding, exactly; the first and the last among them.
static bool check_embed(struct stage *s) {
    enum { ROWS = 64 };
    const struct matrix *table = &s->d->model->embed;
    int32_t ids[ROWS];
    uint32_t rng = (uint32_t)s->d->options.seed;
    for (size_t i = 0; i < ROWS; i++) {
        rng = rng * 1664525u + 1013904223u;
        ids[i] = (int32_t)(i == 0 ? 0 : i == 1 ? table->n_out - 1 : (rng >> 4) % table->n_out);
    }
    struct arena arena = {0};
    struct device *device = s->d->ops->device;
    size_t bytes = ROWS * table->n_in * sizeof(float);
    float *x = arena_alloc(&arena, ROWS * table->n_in, sizeof *x), *own = x;
    double *t = arena_alloc(&arena, ROWS * table->n_in, sizeof *t);
    const int32_t *rows = ids;
    struct op_ctx ctx = {.ops = s->d->ops, .pool = s->d->pool, .layer = -1};
    bool ok = x && t ? oracle_embed(ORACLE_T, t, table, ids, ROWS, s->err) : error_set(s->err, "out of memory");
    if (ok && device) {
        own = room_take(&s->room, bytes, s->err);
        rows = room_put(&s->room, ids, sizeof ids, s->err);
        ok = own && rows;
    }
    if (ok) {
        ctx.ops->embed(&ctx, own, device ? &s->d->weights->embed : table, rows, ROWS);
        if (device) device->get(device, x, own, bytes);
        for (size_t i = 0; i < ROWS * table->n_in; i++) {
            if (i % table->n_in == 0) s->r->n_checks++;
            if ((double)x[i] == t[i]) continue;
            struct fault *f = stage_fault(s->r, FAULT_OP, "embed against T");
            snprintf(f->op, sizeof f->op, "embed");
            snprintf(f->tensor, sizeof f->tensor, "embed");
            f->channel = (int)(i % table->n_in);
            f->position = (int)(i / table->n_in);
            f->expected = t[i];
            f->found = (double)x[i];
            fault_say(f, "embed: channel %d of token id %d is %.9g, the file holds %.9g", f->channel,
                      ids[i / table->n_in], f->found, f->expected);
            break;
        }
    }
    arena_free(&arena);
    return ok;
}

static bool check_head(struct stage *s) {
    enum { TOKENS = 40, MOST = 17 };
    const struct model_config *m = &s->d->model->config;
    static const int32_t all[MOST] = {0, 2, 3, 5, 7, 8, 9, 11, 13, 16, 17, 21, 24, 30, 31, 33, 39};
    static const struct { size_t first, n; } parts[] = {{0, 1}, {16, 1}, {15, 2}, {3, 3}, {8, 5}, {4, 8}, {8, 9}};
    struct arena arena = {0};
    struct capture plain, got;
    struct head_case c = {.d = s->d, .n_tokens = TOKENS, .rows = all, .n_rows = MOST};
    struct op_way way = plain_way(s);
    c.x = make_rows(&arena, TOKENS, m->hidden, 77, false);
    bool ok = c.x ? capture_create(&plain, &arena, m, MOST, true, s->err) &&
                        capture_create(&got, &arena, m, MOST, true, s->err) && run_head(&c, &way, &plain, s->err)
                  : error_set(s->err, "out of memory");
    struct head_case judged = c;
    judged.n_rows = m->n_vocab > 32768 ? 6 : MOST;
    ok = ok && judge_head(&judged, &plain, s->r, &s->judged, s->err);
    for (int f = 0; ok && f <= 1; f++) {
        struct comparison how = {f ? FAULT_FUSED : FAULT_VARIANT,
                                 f ? "fused = its primitives" : "the number of rows does not matter", "all rows",
                                 f != 0};
        way.fusion = f ? s->d->fusion : 0;
        if (f) {
            ok = run_head(&c, &way, &got, s->err);
            if (ok) compare(s, NULL, &plain, 0, &got, &how);
        }
        for (size_t i = 0; ok && i < sizeof parts / sizeof parts[0]; i++) {
            struct head_case part = c;
            part.rows = all + parts[i].first;
            part.n_rows = parts[i].n;
            how.variant = "some rows";
            ok = run_head(&part, &way, &got, s->err);
            if (ok) compare(s, NULL, &plain, parts[i].first, &got, &how);
        }
        how.kind = FAULT_VARIANT;
        how.check = "instruction sets agree";
        c.n_rows = 2;
        for (size_t i = 0; ok && i < s->n_variants; i++) {
            way.ops = s->variants[i];
            how.variant = way.ops->name;
            ok = run_head(&c, &way, &got, s->err);
            if (ok) compare(s, NULL, &plain, 0, &got, &how);
        }
        c.n_rows = MOST;
        way.ops = s->d->ops;
    }
    arena_free(&arena);
    return ok;
}

// ---- The stage -----------------------------------------------------------------------------------------------------

static bool open_stage(struct stage *s) {
    static const int thread_counts[MAX_POOLS] = {1, 2, 3, 5, 8};
    for (size_t i = 0; i < N_ISAS && !s->d->ops->device; i++) {
        const struct ops *ops = ops_cpu(isa_names[i], NULL);
        if (ops && ops != s->d->ops && strcmp(ops->name, s->d->ops->name) != 0) s->variants[s->n_variants++] = ops;
    }
    s->room.device = s->d->ops->device;
    for (size_t i = 0; i < MAX_POOLS && !s->d->ops->device; i++) {
        if (thread_counts[i] == pool_size(s->d->pool)) continue;
        s->pools[s->n_pools] = pool_create(thread_counts[i], s->err);
        if (!s->pools[s->n_pools]) return false;
        s->n_pools++;
    }
    return true;
}

static void close_stage(struct stage *s) {
    room_close(&s->room);
    for (size_t i = 0; i < s->n_pools; i++) pool_free(s->pools[i]);
}

// How many tokens the sweep's prompt has: fewer where a layer is so large that it would take minutes, or in a hurry.
static size_t prompt_tokens(const struct stage *s) {
    const struct model_config *c = &s->d->model->config;
    size_t per_token = (2 * c->n_heads + 2 * c->n_kv_heads) * c->head_dim * c->hidden + 3 * c->n_ff * c->hidden;
    bool hurry = s->d->options.budget<10, few = per_token>((size_t)1 << 27) || hurry;
    size_t n = few && !s->d->options.thorough ? 65 : MAX_TOKENS;
    if (hurry && s->d->ops->device) n = 37; // a page and a part of one
    return n < c->context ? n : c->context;
}

static bool check_layer(struct stage *s, int layer, bool full) {
    struct arena arena = {0};
    const struct layer_weights *w = &s->d->model->layers[layer];
    size_t n = prompt_tokens(s);
    bool ok = check_prompt(s, w, layer, full ? n : n < 33 ? n : 33, &arena);
    arena_free(&arena);
    ok = ok && check_ragged(s, w, layer, &arena);
    arena_free(&arena);
    if (n > s->most_tokens) s->most_tokens = n;
    s->n_layers++;
    return ok;
}

static bool check_layers(struct stage *s) {
    size_t n = s->d->model->config.n_layers, order[3] = {0, n - 1, n / 2}, n_first = n < 3 ? n : 3;
    double left = s->d->deadline - clock_seconds();
    s->layer_budget = s->d->options.thorough ? INFINITY : left / 6;
    bool small = doctor_model_is_small(s->d);
    for (size_t i = 0; i < n_first; i++) {
        if (!check_layer(s, (int)order[i], i == 0 || small || s->d->options.thorough)) return false;
        doctor_progress(s->d, 0.1 + 0.6 * (double)(i + 1) / (double)n_first);
    }
    for (size_t i = 0; i < n && n > 3; i++) {
        if (i == order[0] || i == order[1] || i == order[2]) continue;
        if (clock_seconds() > s->d->deadline - left / 2) break;
        if (!check_layer(s, (int)i, s->d->options.thorough)) return false;
        doctor_progress(s->d, 0.7 + 0.2 * (double)(i + 1) / (double)n);
    }
    return true;
}

static void summarise(struct stage *s) {
    struct buffer *b = &s->r->summary;
    stage_figure(s->r, "values_judged", (double)s->judged.n_values);
    stage_figure(s->r, "worst_error_over_h", s->judged.worst_of_h);
    stage_figure(s->r, "worst_error_over_bound", s->judged.worst_of_bound);
    stage_figure(s->r, "int8_input_cost", s->judged.quantised_cost);
    size_t n = s->d->model->config.n_layers;
    struct device *device = s->d->ops->device;
    (void)buffer_printf(b, "%zu of %zu layers, %zu token counts to %zu, contexts to %zu, ", s->n_layers, n, s->n_counts,
                        s->most_tokens, s->longest);
    if (device)
        (void)buffer_printf(b, "%zu kernels with others in their place, %zu neighbours", device->n_variants,
                            s->most_neighbours);
    else (void)buffer_printf(b, "%zu instruction set%s, threads 1-8", s->n_variants + 1, s->n_variants ? "s" : "");
    if (s->judged.worst_of_h > 0)
        (void)buffer_printf(b, "; largest error %.2f of H's (%s)", s->judged.worst_of_h, s->judged.where);
    stage_note(s->r, "%.3g million values judged by T; the largest error is %.2f of what f32 rounding allows",
               (double)s->judged.n_values / 1e6, s->judged.worst_of_bound);
    if (s->judged.quantised_cost > 0)
        stage_note(s->r, "products round their input to int8: that alone moves a row by up to %.2g of its size",
                   s->judged.quantised_cost);
    if (!fused_differs(s)) stage_note(s->r, "no fused op is chosen: there is nothing to compare with its primitives");
}

bool stage_ops(struct doctor *d, struct stage_report *r, struct error *err) {
    struct stage s = {.d = d, .r = r, .err = err};
    struct arena arena = {0};
    bool ok = open_stage(&s) && check_embed(&s) && check_layers(&s);
    ok = ok && check_long(&s, &d->model->layers[0], 0, &arena);
    arena_free(&arena);
    doctor_progress(d, 0.93);
    ok = ok && check_adversarial(&s, &d->model->layers[0], 0, &arena);
    arena_free(&arena);
    if (d->ops->device) {
        ok = ok && check_neighbours(&s, &d->model->layers[0], 0, &arena);
        arena_free(&arena);
        ok = ok && (clock_seconds() > d->deadline || check_chunks(&s, &d->model->layers[0], 0, &arena));
        arena_free(&arena);
    }
    doctor_progress(d, 0.96);
    ok = ok && check_head(&s);
    if (ok) summarise(&s);
    close_stage(&s);
    return ok;
}
