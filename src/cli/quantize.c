// quantize.c: `tandem quantize`: a model written as a GGUF file in other types.
#include "cli/cli.h"

#include "base/clock.h"
#include "base/file.h"
#include "model/convert.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Loads IN with all its values checked, and its tokenizer.
struct source {
    struct model *model;
    struct tokenizer *tokenizer; // of a folder that has one
};

static bool open_source(const struct cli_options *o, struct pool *pool, const struct log *log, struct source *s) {
    struct error err = {0}, why = {0};
    struct buffer path = {0};
    enum model_kind kind;
    struct model_load_options load = {.check_values = true, .pool = pool, .log = log};
    s->model = hub_resolve(o->model, &kind, &path, &err) ? model_load(kind, path.data, &load, &err) : NULL;
    buffer_free(&path);
    if (!s->model) return cli_fail("%s", err.text) == 0;
    if (s->model->kind != MODEL_FOLDER) return true;
    s->tokenizer = tokenizer_open_folder(s->model->path, &why);
    if (!s->tokenizer)
        fprintf(stderr, "tandem: quantize: warning: the file gets no vocabulary, only token ids will work: %s\n",
                why.text);
    return true;
}

static void warn_quantised(const struct model *m) {
    const struct tensor_set *set = m->kind == MODEL_GGUF ? &m->gguf.tensors : &m->files;
    for (size_t i = 0; i < set->n; i++) {
        if (!dtype_info(set->tensors[i].type)->is_quantised) continue;
        fprintf(
            stderr,
            "tandem: quantize: warning: the source is quantised already (%s is %s): what it lost does not come back\n",
            set->tensors[i].name, dtype_info(set->tensors[i].type)->name);
        return;
    }
}

static double bits_per_weight(const struct convert_result *r) {
    double bytes = 0, elements = 0;
    for (size_t i = 0; i < r->n; i++)
        bytes += (double)r->tensors[i].n_bytes, elements += (double)r->tensors[i].n_elements;
    return 8 * bytes / elements;
}

static int tell(const struct cli_options *o, const struct model *m, const struct recipe *recipe,
                const struct convert_result *r, double seconds) {
    if (o->given[OPT_JSON]) {
        json_t *list = json_array();
        for (size_t i = 0; i < r->n; i++) {
            const struct convert_tensor *t = &r->tensors[i];
            json_array_append_new(list, json_pack("{s:s,s:s,s:s,s:I,s:f}", "name", t->name, "from",
                                                  dtype_info(t->from)->name, "to", dtype_info(t->to)->name, "bytes",
                                                  (json_int_t)t->n_bytes, "relative_error", t->error));
        }
        return cli_print_json(json_pack("{s:s,s:s,s:s,s:b,s:I,s:I,s:f,s:f,s:o}", "input", o->model, "output",
                                        o->operand_2, "type", recipe->name, "pure", o->given[OPT_PURE], "source_bytes",
                                        (json_int_t)m->weight_bytes, "bytes", (json_int_t)r->n_bytes, "bits_per_weight",
                                        bits_per_weight(r), "seconds", seconds, "tensors", list))
                   ? EXIT_GOOD
                   : EXIT_FAULT;
    }
    size_t counts[DTYPE_COUNT] = {0};
    for (size_t i = 0; i < r->n; i++) counts[r->tensors[i].to]++;
    printf("%s: %.1f MB from %.1f MB, %.2f bits a weight, %.1f s;", o->operand_2, (double)r->n_bytes / 1e6,
           (double)m->weight_bytes / 1e6, bits_per_weight(r), seconds);
    const char *comma = "";
    for (int i = 0; i < DTYPE_COUNT; i++) {
        if (counts[i] == 0) continue;
        printf("%s %zu %s", comma, counts[i], dtype_info((enum dtype)i)->name);
        comma = ",";
    }
    putchar('\n');
    return cli_flush() ? EXIT_GOOD : EXIT_FAULT;
}

static int quantize(const struct cli_options *o, const struct recipe *recipe, struct pool *pool) {
    struct cli_bar bar = {0};
    struct log log = cli_log(&bar);
    struct source s = {0};
    struct error err = {0};
    struct convert_result result;
    int status = EXIT_FAULT;
    double start = clock_seconds();
    if (open_source(o, pool, &log, &s)) {
        struct convert_options options = {
            .recipe = recipe, .pure = o->given[OPT_PURE], .tokenizer = s.tokenizer, .pool = pool, .log = &log};
        warn_quantised(s.model);
        options.stop = cli_stop_on_interrupt();
        if (convert_model(s.model, o->operand_2, &options, &result, &err)) {
            status = tell(o, s.model, recipe, &result, clock_seconds() - start);
            convert_result_free(&result);
        } else if (atomic_load(options.stop)) {
            status = cli_interrupted("nothing was written");
        } else {
            cli_fail("%s", err.text);
        }
        cli_on_interrupt(NULL);
    }
    tokenizer_free(s.tokenizer);
    model_free(s.model);
    return status;
}

static int run(const struct cli_options *o) {
    struct error err = {0};
    size_t threads = 0;
    if (!o->given[OPT_TYPE]) return cli_usage("expected --type: one of %s", recipe_names());
    const struct recipe *recipe = recipe_find(o->text[OPT_TYPE], &err);
    if (!recipe) return cli_usage("--type: %s", err.text);
    if (!cli_size(o, OPT_THREADS, 1, 1024, &threads)) return EXIT_USAGE;
    if (file_is_folder(o->operand_2)) return cli_fail("%s is a folder: expected the name of a file", o->operand_2);
    if (file_exists(o->operand_2) && !o->given[OPT_FORCE])
        return cli_fail("%s exists already: --force replaces it", o->operand_2);
    struct pool *pool = pool_create((int)threads, &err);
    if (!pool) return cli_fail("%s", err.text);
    int status = quantize(o, recipe, pool);
    pool_free(pool);
    return status;
}

static const enum option_id options[] = {OPT_TYPE, OPT_PURE, OPT_FORCE, OPT_THREADS, OPT_JSON, OPT_HELP};

const struct command command_quantize = {
    .name = "quantize",
    .summary = "write a model as a GGUF file in another type",
    .usage = "IN OUT.gguf --type TYPE [--pure] [--force] [--json]",
    .details =
        "IN is a MODEL: a folder of safetensors, a GGUF file, OWNER/NAME in the Hugging Face cache, synthetic:SHAPE. "
        "The\n"
        "file holds tokenizer, chat template and everything else that tandem and llama.cpp need.\n\n"
        "types: q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k, and\n"
        "bf16, f16, f32, which convert only. Mixes (q4_k_m ...) give some matrices more bits, and all but q8_0 keep "
        "the\n"
        "head in q6_k; --pure gives every matrix the one type, which is smaller and faster, and less exact. Scales "
        "are\n"
        "fitted to the least squared error.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
    .two_operands = true,
};
