// bench.c: `tandem bench`: what is to be measured, and how it is told: a table, JSON or CSV. Measuring is
// bench_run.c's.
#include "cli/bench_run.h"
#include "cli/bench_workload.h"
#include "cli/cli.h"

#include "base/size.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST_LIST = 32, MOST_CASES = MOST_LIST * MOST_LIST + MOST_LIST, MOST_TYPES = 16, DEFAULT_CHUNK = 256 };

// What the command line asks for.
struct request {
    size_t prefill[MOST_LIST], depth[MOST_LIST], batch[MOST_LIST], n_prefill, n_depth, n_batch;
    bool decode;
    bool chosen;                                       // the user named what to measure: nothing is left out silently
    size_t n_repeats, chunk, n_prompts, decode_tokens; // decode_tokens 0: by time
    double max_seconds;
    uint32_t fusion[BENCH_VARIANTS];
    size_t n_fusions;
    const char *models[MOST_TYPES]; // one run for each
    size_t n_models;
    struct bench_case cases[MOST_CASES];
    size_t n_cases;
};

// What is told at the end.
struct report {
    bool json, csv, has_header;
    json_t *results;
    char device[64], cpu[128];
    int threads;
    struct spread bandwidth;
    size_t buffer_bytes;
};

// ---- Asking

static bool parse_fusion(const struct cli_options *o, struct request *r) {
    struct error err = {0};
    const char *text = o->given[OPT_FUSIONS] ? o->text[OPT_FUSIONS] : "on";
    bool on_off = strcmp(text, "on,off") == 0, off_on = strcmp(text, "off,on") == 0;
    r->n_fusions = on_off || off_on ? 2 : 1;
    if (r->n_fusions == 2) {
        fusion_parse(on_off ? "on" : "off", &r->fusion[0], NULL);
        fusion_parse(on_off ? "off" : "on", &r->fusion[1], NULL);
        return true;
    }
    return fusion_parse(text, &r->fusion[0], &err) || (cli_usage("--fusion: %s", err.text), false);
}

// The models: MODEL, or a synthetic shape in one or several types.
static bool parse_models(const struct cli_options *o, struct request *r) {
    static char names[MOST_TYPES][96];
    if (!o->given[OPT_SYNTHETIC]) {
        if (o->given[OPT_TYPE]) return cli_usage("--type goes with --synthetic"), false;
        r->models[r->n_models++] = cli_model(o);
        return r->models[0] != NULL;
    }
    if (o->model) return cli_usage("expected either a MODEL or --synthetic, found both"), false;
    const char *types = o->given[OPT_TYPE] ? o->text[OPT_TYPE] : "bf16";
    for (const char *p = types;; p++) {
        size_t n = strcspn(p, ",");
        if (r->n_models == MOST_TYPES) return cli_usage("--type: expected at most %d types", MOST_TYPES), false;
        snprintf(names[r->n_models], sizeof names[0], "synthetic:%.40s:%.*s", o->text[OPT_SYNTHETIC],
                 (int)(n < 40 ? n : 40), p);
        r->models[r->n_models] = names[r->n_models];
        r->n_models++;
        p += n;
        if (!*p) return true;
    }
}

static bool parse_request(const struct cli_options *o, struct request *r) {
    static const size_t depths[] = {0, 1024, 4096, 16384}, batches[] = {1, 8, 32}, prefills[] = {64, 512, 2048};
    const size_t most = (size_t)1 << 24;
    bool asks_decode =
        o->given[OPT_DECODE_STEPS] || o->given[OPT_DECODE_TOKENS] || o->given[OPT_DEPTH] || o->given[OPT_BATCH];
    r->n_repeats = 5;
    r->chunk = DEFAULT_CHUNK;
    r->n_prompts = 1;
    if (!cli_sizes(o, OPT_PREFILL, 1, most, r->prefill, MOST_LIST, &r->n_prefill) ||
        !cli_sizes(o, OPT_DEPTH, 0, most, r->depth, MOST_LIST, &r->n_depth) ||
        !cli_sizes(o, OPT_BATCH, 1, 1024, r->batch, MOST_LIST, &r->n_batch) ||
        !cli_size(o, OPT_DECODE_TOKENS, 1, most, &r->decode_tokens) ||
        !cli_size(o, OPT_REPEAT, 1, BENCH_MOST_REPEATS, &r->n_repeats) ||
        !cli_size(o, OPT_PROMPTS, 1, 1024, &r->n_prompts) || !cli_size(o, OPT_CHUNK, 1, 65536, &r->chunk) ||
        !parse_fusion(o, r))
        return false;
    if (o->given[OPT_PROMPTS] && !o->given[OPT_PREFILL]) return cli_usage("--prompts goes with --prefill"), false;
    if (o->given[OPT_JSON] && o->given[OPT_CSV]) return cli_usage("expected one of --json and --csv"), false;
    if (o->given[OPT_WORKLOAD] && workload_requests(o->text[OPT_WORKLOAD]) == 0)
        return cli_usage("--workload: expected offline-256, or offline-N for its first N requests, found \"%s\"",
                         o->text[OPT_WORKLOAD]),
               false;
    if (o->given[OPT_WORKLOAD] && (r->n_fusions > 1 || r->n_batch > 1))
        return cli_usage("--workload goes with one --batch and one --fusion"), false;
    r->max_seconds = o->given[OPT_REPEAT] ? INFINITY : 20;
    r->chosen = asks_decode || o->given[OPT_PREFILL];
    r->decode = asks_decode || !r->chosen;
    if (!r->chosen) {
        memcpy(r->prefill, prefills, sizeof prefills);
        r->n_prefill = sizeof prefills / sizeof prefills[0];
    }
    for (size_t i = 0; i < r->n_prefill; i++)
        r->cases[r->n_cases++] =
            (struct bench_case){.kind = BENCH_PREFILL, .batch = r->n_prompts, .n_tokens = r->prefill[i]};
    if (r->decode && r->n_depth == 0 && r->n_batch == 0) { // --decode alone, or nothing at all
        for (size_t i = 0; i < sizeof depths / sizeof depths[0]; i++)
            r->cases[r->n_cases++] =
                (struct bench_case){.kind = BENCH_DECODE, .batch = 1, .depth = depths[i], .n_tokens = r->decode_tokens};
        for (size_t i = 1; i < sizeof batches / sizeof batches[0]; i++)
            r->cases[r->n_cases++] =
                (struct bench_case){.kind = BENCH_DECODE, .batch = batches[i], .n_tokens = r->decode_tokens};
        r->chosen = false;
    } else if (r->decode) {
        if (r->n_depth == 0) r->depth[r->n_depth++] = 0;
        if (r->n_batch == 0) r->batch[r->n_batch++] = 1;
        for (size_t i = 0; i < r->n_batch; i++)
            for (size_t k = 0; k < r->n_depth; k++)
                r->cases[r->n_cases++] = (struct bench_case){
                    .kind = BENCH_DECODE, .batch = r->batch[i], .depth = r->depth[k], .n_tokens = r->decode_tokens};
    }
    return parse_models(o, r);
}

static size_t positions_of(const struct bench_case *c) {
    return c->depth + (c->n_tokens ? c->n_tokens : 64);
}

// Whether a case can be run: the model's positions, and the memory for its KV. Left out with a note when the user did
// not name it, refused when he did.
static bool fits(const struct request *r, const tandem_engine *e, const struct bench_case *c, bool *refused) {
    size_t context = e->model->config.context, bytes, available = bench_available_memory();
    char why[256] = "";
    if (positions_of(c) > context)
        snprintf(why, sizeof why, "needs %zu positions, the model has %zu", positions_of(c), context);
    else if (!size_mul(bench_pages(c), bench_page_bytes(e), &bytes) || (available && bytes > available / 10 * 8))
        snprintf(why, sizeof why, "needs %.1f GB of KV, more than eight tenths of the %.1f GB of memory that are free",
                 (double)bench_pages(c) * (double)bench_page_bytes(e) / 1e9, (double)available / 1e9);
    if (!*why) return true;
    const char *kind = c->kind == BENCH_PREFILL ? "prefill" : "decode";
    size_t n = c->kind == BENCH_PREFILL ? c->n_tokens : c->depth;
    if (r->chosen) {
        cli_fail("%s of batch %zu at %zu tokens %s", kind, c->batch, n, why);
        *refused = true;
    } else {
        fprintf(stderr, "tandem: bench: left out: %s of batch %zu at %zu tokens %s\n", kind, c->batch, n, why);
    }
    return false;
}

// ---- Telling

static void read_cpu_name(char *name, size_t size) {
    FILE *f = fopen("/proc/cpuinfo", "re");
    char line[512];
    snprintf(name, size, "unknown");
    while (f && fgets(line, sizeof line, f)) {
        if (strncmp(line, "model name", 10) != 0) continue;
        char *colon = strchr(line, ':');
        if (colon) snprintf(name, size, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
        break;
    }
    if (f) fclose(f);
}

// The type that most of the weights have, in small letters.
static const char *main_type(const struct model *m, char *name, size_t size) {
    double bytes[DTYPE_COUNT] = {0};
    int most = 0;
    for (size_t i = 0; i < m->config.n_layers; i++) {
        const struct layer_weights *w = &m->layers[i];
        const struct matrix *all[] = {&w->wq, &w->wk, &w->wv, &w->wo, &w->w_gate, &w->w_up, &w->w_down};
        for (size_t k = 0; k < sizeof all / sizeof all[0]; k++)
            bytes[all[k]->type] += (double)(all[k]->n_out * all[k]->row_bytes);
    }
    for (int i = 1; i < DTYPE_COUNT; i++)
        if (bytes[i] > bytes[most]) most = i;
    snprintf(name, size, "%s", dtype_info((enum dtype)most)->name);
    for (char *p = name; *p; p++)
        if (*p >= 'A' && *p <= 'Z') *p = (char)(*p - 'A' + 'a');
    return name;
}

static json_t *spread_json(struct spread s) {
    return json_pack("{s:f,s:f,s:f}", "median", s.median, "min", s.min, "max", s.max);
}

static void add_result(struct report *rep, const char *model, const char *type, const struct bench_case *c,
                       const struct bench_outcome *out, size_t n_fusions) {
    for (size_t v = 0; v < n_fusions; v++) {
        const struct bench_result *r = &out->variants[v];
        char hash[17], fusion[256];
        snprintf(hash, sizeof hash, "%016llx", (unsigned long long)r->hash);
        json_t *o = json_pack("{s:s,s:s,s:s,s:I,s:I,s:I,s:I,s:s,s:o,s:f,s:f,s:f,s:s}", "kind",
                              c->kind == BENCH_PREFILL ? "prefill" : "decode", "model", model, "type", type, "batch",
                              (json_int_t)c->batch, "depth", (json_int_t)c->depth, "n_tokens",
                              (json_int_t)out->n_tokens, "repeats", (json_int_t)out->n_repeats, "fusion",
                              fusion_text(r->fusion, fusion, sizeof fusion), "tps", spread_json(r->tps), "gbs", r->gbs,
                              "bandwidth_share", r->share, "gflops", r->gflops, "logits_hash", hash);
        if (n_fusions > 1 && v == 0) json_object_set_new(o, "ratio", spread_json(out->ratio));
        json_array_append_new(rep->results, o);
        if (rep->json) continue;
        if (rep->csv) {
            printf("%s,%s,\"%s\",%s,%zu,%zu,%zu,%zu,\"%s\",%.4f,%.4f,%.4f,%.4f,%.4f,%.3f,%s\n", rep->device,
                   c->kind == BENCH_PREFILL ? "prefill" : "decode", model, type, c->batch, c->depth, out->n_tokens,
                   out->n_repeats, fusion, r->tps.median, r->tps.min, r->tps.max, r->gbs, r->share, r->gflops, hash);
            continue;
        }
        char test[64], depth[32] = "", batch[32] = "";
        if (c->depth) snprintf(depth, sizeof depth, " at %zu", c->depth);
        if (c->batch > 1) snprintf(batch, sizeof batch, " x%zu", c->batch);
        snprintf(test, sizeof test, "%s %zu%s%s%s%.14s", c->kind == BENCH_PREFILL ? "prefill" : "decode", out->n_tokens,
                 depth, batch, n_fusions > 1 ? ", fusion " : "", n_fusions > 1 ? fusion : "");
        printf("%-34s %9.2f  %9.2f %9.2f  %7.2f  %5.1f%%  %8.1f  %s\n", test, r->tps.median, r->tps.min, r->tps.max,
               r->gbs, 100 * r->share, r->gflops, hash);
    }
    if (n_fusions > 1 && !rep->json && !rep->csv) {
        char first[256], second[256];
        printf("  fusion %s over %s: %.3f times the speed (%.3f to %.3f over %zu pairs)\n",
               fusion_text(out->variants[0].fusion, first, sizeof first),
               fusion_text(out->variants[1].fusion, second, sizeof second), out->ratio.median, out->ratio.min,
               out->ratio.max, out->n_repeats);
    }
    fflush(stdout);
}

// Once, before the first row.
static void print_header(struct report *rep) {
    if (rep->has_header) return;
    rep->has_header = true;
    if (rep->csv)
        printf("device,kind,model,type,batch,depth,n_tokens,repeats,fusion,tps_median,tps_min,tps_max,gbs,"
               "bandwidth_share,gflops,logits_hash\n");
    else if (!rep->json)
        printf("%-34s %9s  %9s %9s  %7s  %6s  %8s  %s\n", "", "tok/s", "min", "max", "GB/s", "share", "GFLOP/s",
               "logits hash");
    fflush(stdout); // rows take their time
}

static bool finish_report(struct report *rep) {
    if (rep->json)
        return cli_print_json(json_pack("{s:s,s:s,s:i,s:s,s:f,s:o,s:I,s:O}", "device", rep->device, "cpu", rep->cpu,
                                        "threads", rep->threads, "version", tandem_version(), "bandwidth_gbs",
                                        rep->bandwidth.median, "bandwidth", spread_json(rep->bandwidth),
                                        "bandwidth_buffer_bytes", (json_int_t)rep->buffer_bytes, "results",
                                        rep->results));
    if (!rep->csv && rep->buffer_bytes == 0) printf("\n%s, %s, %d threads\n", rep->cpu, rep->device, rep->threads);
    else if (!rep->csv)
        printf("\n%s, %s, %d threads; reads %.1f GB/s (%.1f to %.1f, buffer of %.0f MB)\n", rep->cpu, rep->device,
               rep->threads, rep->bandwidth.median, rep->bandwidth.min, rep->bandwidth.max,
               (double)rep->buffer_bytes / 1e6);
    return cli_flush();
}

// ---- Running

static void show_repeat(void *user, size_t done, size_t total) {
    if (cli_can_redraw()) fprintf(stderr, "\r\033[K%s: repeat %zu of %zu ", (const char *)user, done, total);
}

static bool run_cases(const struct request *r, struct report *rep, struct bench *b, const char *model, const char *type,
                      const bool *runs) {
    double prefill_tps = 0;
    print_header(rep);
    for (size_t i = 0; i < r->n_cases; i++) {
        const struct bench_case *c = &r->cases[i];
        struct bench_outcome out;
        struct error err = {0};
        if (!runs[i]) continue;
        double guess = c->kind == BENCH_PREFILL && prefill_tps > 0 ? (double)(c->n_tokens * c->batch) / prefill_tps : 0;
        if (!r->chosen && guess > 60) {
            fprintf(stderr, "tandem: bench: left out: prefill of %zu tokens would take %.0f s; --prefill %zu runs it\n",
                    c->n_tokens, guess, c->n_tokens);
            continue;
        }
        show_repeat((void *)(uintptr_t)(c->kind == BENCH_PREFILL ? "prefill" : "decode"), 0, r->n_repeats);
        bool ok = bench_measure(b, c, &out, &err);
        if (cli_can_redraw()) fprintf(stderr, "\r\033[K");
        if (!ok) return cli_fail("%s: %s", model, err.text) == 0;
        if (c->kind == BENCH_PREFILL) prefill_tps = out.variants[0].tps.median;
        add_result(rep, model, type, c, &out, r->n_fusions);
        if (ferror(stdout)) return false; // nobody reads on
        if (r->n_fusions > 1 && out.variants[0].hash != out.variants[1].hash)
            return cli_fail("%s: the logits of --fusion on and off differ: `tandem check %s` finds where", model,
                            model) == 0;
    }
    return true;
}

static bool run_model(const struct cli_options *o, const struct request *r, struct report *rep, const char *model) {
    tandem_engine *e = cli_open_as(o, &(tandem_options){.model = model, .context = 32, .fusion = "on"});
    if (!e) return false;
    struct bench_options options = {.max_tokens = r->chunk,
                                    .max_batch = 1,
                                    .max_positions = 1,
                                    .n_repeats = r->n_repeats,
                                    .max_seconds = r->max_seconds,
                                    .n_variants = r->n_fusions,
                                    .progress = show_repeat,
                                    .user = (void *)(uintptr_t)model};
    bool runs[MOST_CASES], refused = false, ok = false;
    for (size_t i = 0; i < r->n_cases; i++) {
        const struct bench_case *c = &r->cases[i];
        runs[i] = fits(r, e, c, &refused);
        if (!runs[i]) continue;
        if (c->batch > options.max_batch) options.max_batch = c->batch;
        if (positions_of(c) > options.max_positions) options.max_positions = positions_of(c);
        if (bench_pages(c) > options.n_pages) options.n_pages = bench_pages(c);
    }
    if (options.max_batch > options.max_tokens) options.max_tokens = options.max_batch;
    memcpy(options.fusion, r->fusion, sizeof options.fusion);
    char type[16];
    struct error err = {0};
    struct bench *b = refused || options.n_pages == 0 ? NULL : bench_create(e, &options, &err);
    if (b) {
        snprintf(rep->device, sizeof rep->device, "%s", e->ops->name);
        ok = run_cases(r, rep, b, model, main_type(e->model, type, sizeof type), runs);
        rep->bandwidth = bench_bandwidth(b);
        rep->buffer_bytes = bench_buffer_bytes(b);
        rep->threads = pool_size(e->pool);
    } else if (!refused) {
        cli_fail("%s", err.text[0] ? err.text : "nothing is left to measure");
    }
    bench_free(b);
    tandem_close(e);
    return ok;
}

// A workload: its own engine, with the KV that it needs; results as of the other kinds.
static bool run_workload(const struct cli_options *o, const struct request *r, struct report *rep, const char *model) {
    size_t n = workload_requests(o->text[OPT_WORKLOAD]), batch = r->n_batch ? r->batch[0] : n;
    size_t kv_tokens = workload_kv_tokens(o, model, n, bench_available_memory() / 10 * 7);
    if (kv_tokens == 0) return false;
    tandem_options base = {.model = model,
                           .context = 2048,
                           .kv_tokens = kv_tokens,
                           .chunk = o->given[OPT_CHUNK] ? r->chunk : 0,
                           .max_batch = batch,
                           .fusion = o->given[OPT_FUSIONS] ? o->text[OPT_FUSIONS] : "on"};
    tandem_engine *e = cli_open_as(o, &base);
    if (!e) return false;
    double tps[BENCH_MOST_REPEATS];
    struct workload_options options = {
        .n_requests = n, .progress = show_repeat, .user = (void *)(uintptr_t) "workload: token"};
    struct workload_outcome out = {0};
    struct error err = {0};
    size_t n_repeats = o->given[OPT_REPEAT] ? r->n_repeats : 1;
    bool ok = true;
    for (size_t i = 0; ok && i < n_repeats; i++) {
        uint64_t hash = out.tokens_hash;
        options.repeat = i;
        ok = workload_run(e, &options, &out, &err);
        if (ok && i > 0 && out.tokens_hash != hash) ok = error_set(&err, "repeat %zu gave other tokens", i + 1);
        tps[i] = (double)out.n_output / out.seconds;
    }
    if (cli_can_redraw()) fprintf(stderr, "\r\033[K");
    if (!ok) cli_fail("%s: %s", model, err.text);
    rep->threads = pool_size(e->pool);
    snprintf(rep->device, sizeof rep->device, "%s", e->ops->name);
    char type[16], hash[17], fusion[256];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)out.tokens_hash);
    main_type(e->model, type, sizeof type);
    struct spread s = ok ? bench_spread(tps, n_repeats) : (struct spread){0};
    if (ok)
        json_array_append_new(rep->results,
                              json_pack("{s:s,s:s,s:s,s:s,s:I,s:I,s:I,s:I,s:I,s:I,s:s,s:o,s:n,s:n,s:n,s:n,s:s}", "kind",
                                        "workload", "workload", o->text[OPT_WORKLOAD], "model", model, "type", type,
                                        "batch", (json_int_t)batch, "depth", (json_int_t)0, "n_tokens",
                                        (json_int_t)out.n_output, "n_prompt_tokens", (json_int_t)out.n_prompt,
                                        "n_cached_tokens", (json_int_t)out.n_cached, "repeats", (json_int_t)n_repeats,
                                        "fusion", fusion_text(e->fusion, fusion, sizeof fusion), "tps", spread_json(s),
                                        "gbs", "bandwidth_share", "gflops", "logits_hash", "tokens_hash", hash));
    if (ok && rep->csv) print_header(rep);
    if (ok && rep->csv)
        printf("%s,workload,\"%s\",%s,%zu,0,%zu,%zu,\"%s\",%.4f,%.4f,%.4f,,,,\n", rep->device, model, type, batch,
               out.n_output, n_repeats, fusion_text(e->fusion, fusion, sizeof fusion), s.median, s.min, s.max);
    else if (ok && !rep->json)
        printf(
            "%s: %zu requests, %zu tokens in, %zu out, %.2f tok/s out, %.1f s; KV of %zu tokens, hash of the ids %s\n",
            o->text[OPT_WORKLOAD], n, out.n_prompt, out.n_output, s.median, out.seconds, kv_tokens, hash);
    tandem_close(e);
    return ok;
}

static int run(const struct cli_options *o) {
    struct request *r = size_alloc_zero(1, sizeof *r);
    struct report rep = {.json = o->given[OPT_JSON], .csv = o->given[OPT_CSV], .results = json_array()};
    int status = EXIT_USAGE;
    if (r && parse_request(o, r)) {
        bool ok = true;
        status = EXIT_FAULT;
        read_cpu_name(rep.cpu, sizeof rep.cpu);
        if (!o->given[OPT_WORKLOAD] || rep.csv) {
            const struct ops *ops = ops_cpu(o->text[OPT_ISA], NULL);
            snprintf(rep.device, sizeof rep.device, "%s", ops ? ops->name : "");
        }
        for (size_t i = 0; ok && i < r->n_models; i++)
            ok = o->given[OPT_WORKLOAD] ? run_workload(o, r, &rep, r->models[i]) : run_model(o, r, &rep, r->models[i]);
        if (ok && finish_report(&rep)) status = EXIT_GOOD;
    }
    json_decref(rep.results);
    free(r);
    return status;
}

static const enum option_id options[] = {OPT_SYNTHETIC,     OPT_TYPE,    OPT_PREFILL, OPT_PROMPTS, OPT_DECODE_STEPS,
                                         OPT_DECODE_TOKENS, OPT_DEPTH,   OPT_BATCH,   OPT_CHUNK,   OPT_REPEAT,
                                         OPT_WORKLOAD,      OPT_FUSIONS, OPT_KV_TYPE, OPT_REPACK,  OPT_THREADS,
                                         OPT_DEVICE,        OPT_ISA,     OPT_JSON,    OPT_CSV,     OPT_HELP};

const struct command command_bench = {
    .name = "bench",
    .summary = "speed: prefill and decode, beside the machine's read bandwidth",
    .usage =
        "[MODEL | --synthetic SHAPE [--type TYPE,...]] [--prefill N,...] [--prompts N] [--decode]\n"
        "       [--depth N,...] [--batch N,...] [--decode-tokens N] [--workload NAME] [--repeat N] [--json | --csv]",
    .details =
        "Without options: prompts of 64, 512 and 2048 tokens; decoding at depths 0, 1024, 4096 and 16384; batches of "
        "8\n"
        "and 32; each until 5 repeats or 20 seconds are over. Sampling is not part of what is timed. The KV at a "
        "depth\n"
        "holds random numbers. --workload offline-256 runs nano-vllm's benchmark through the scheduler: 256 requests "
        "of 100\nto 1024 tokens, 142,827 in and 133,966 out; offline-N is its first N requests.\n\n"
        "  share      GB/s of weights and KV that must be read, over the read bandwidth: all threads add up a buffer\n"
        "             much larger than the caches, right before every repeat\n"
        "  logits     a hash of the first sequence's logits: the same for every batch, chunk, thread count and "
        "fusion\n\n"
        "shapes: qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b, qwen3-14b, qwen3-32b, tiny-qwen3, tiny-qwen2, tiny-llama, "
        "micro-qwen3\n"
        "types:  bf16, f16, f32, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k, in every\n"
        "        matrix, or the mixes of `tandem quantize` (q4_k_m, ...); several make a run each\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
};
