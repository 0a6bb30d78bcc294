// diff.c: `tandem diff`: compares two traces and names the first divergence; the work is doctor/diff.c's.
#include "cli/cli.h"

#include "base/file.h"
#include "doctor/diff.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const char *const verdict_names[] = {"equal", "rounding", "diverged"};

// JSON has no infinities: null then.
static json_t *number(double v) {
    return isfinite(v) ? json_real(v) : json_null();
}

static json_t *index_or_null(bool known, size_t i) {
    return known ? json_integer((json_int_t)i) : json_null();
}

static json_t *place_json(const struct diff_tensor *t, const struct diff_place *p) {
    bool heads = t->n_heads > 0;
    return json_pack("{s:I, s:o, s:I, s:o, s:o}", "position", (json_int_t)p->position, "head",
                     index_or_null(heads, heads ? p->column / t->head_dim : 0), "channel",
                     (json_int_t)(heads ? p->column % t->head_dim : p->column), "expected", number(p->a), "found",
                     number(p->b));
}

static json_t *tensor_json(const struct diff_tensor *t) {
    json_t *o = json_pack("{s:s, s:o, s:s, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:b}", "name", t->name, "layer",
                          index_or_null(t->layer >= 0, (size_t)t->layer), "op", t->op, "rows", (json_int_t)t->n_rows,
                          "columns", (json_int_t)t->n_columns, "different", (json_int_t)t->n_different, "max_abs",
                          number(t->max_abs), "rms_relative", number(t->rms_relative), "error", number(t->error),
                          "input_error", number(t->input_error), "limit", number(t->limit), "diverges", t->departs);
    if (o && t->n_different) {
        json_object_set_new(o, "first", place_json(t, &t->first));
        json_object_set_new(o, "worst", place_json(t, &t->worst));
    }
    return o;
}

// The tensor to look at, where in it, and how far the fault reaches.
struct finding {
    const struct diff_tensor *tensor;
    struct diff_place place;
    struct buffer extent;
};

static bool find(const struct diff *d, struct finding *f, struct error *err) {
    *f = (struct finding){0};
    if (d->first == d->n) return true;
    struct diff_profile profile;
    f->tensor = &d->tensors[d->first];
    if (!diff_profile(d, f->tensor, &profile, err)) return false;
    f->place = diff_first_wrong(d, f->tensor, &profile);
    bool ok = diff_extent(d, f->tensor, &profile, &f->extent);
    diff_profile_free(&profile);
    return ok || error_set(err, "out of memory");
}

static bool print_json(const struct diff *d, const struct finding *f) {
    json_t *tensors = json_array(), *first = json_null();
    for (size_t i = 0; tensors && i < d->n; i++) json_array_append_new(tensors, tensor_json(&d->tensors[i]));
    if (f->tensor) {
        first = place_json(f->tensor, &f->place);
        json_object_set_new(first, "tensor", json_string(f->tensor->name));
        json_object_set_new(first, "layer", index_or_null(f->tensor->layer >= 0, (size_t)f->tensor->layer));
        json_object_set_new(first, "op", json_string(f->tensor->op));
        json_object_set_new(first, "error", number(f->tensor->error));
        json_object_set_new(first, "input_error", number(f->tensor->input_error));
        json_object_set_new(first, "limit", number(f->tensor->limit));
        json_object_set_new(first, "extent", json_string(buffer_text(&f->extent)));
    }
    return cli_print_json(json_pack("{s:b, s:s, s:s, s:b, s:o, s:o, s:I, s:I}", "equal", d->verdict == DIFF_EQUAL,
                                    "verdict", verdict_names[d->verdict], "precision", d->precision, "must_be_equal",
                                    d->must_be_equal, "first", first, "tensors", tensors, "only_in_a",
                                    (json_int_t)d->n_only_a, "only_in_b", (json_int_t)d->n_only_b));
}

// ---- Text ----------------------------------------------------------------------------------------------------------

static void print_side(char letter, const struct diff_side *s) {
    printf("%c  %s", letter, s->file);
    if (s->producer[0]) printf(": %s%s%s", s->producer, s->path[0] ? ", path " : "", s->path);
    if (s->device[0] && strcmp(s->device, "oracle") != 0) printf(" on %s", s->device);
    if (s->precision[0]) printf(", %s", s->precision);
    putchar('\n');
}

static void print_finding(const struct diff *d, const struct finding *f) {
    const struct diff_tensor *t = f->tensor;
    const struct diff_place *p = &f->place;
    bool departs = d->verdict == DIFF_DEPARTS;
    printf("\nfirst %s: %s", departs ? "divergence" : "difference", t->name);
    if (t->op[0]) printf(" (computed by %s)", t->op);
    printf("\n  position %d", p->position);
    if (t->n_heads) printf(", head %zu, channel %zu", p->column / t->head_dim, p->column % t->head_dim);
    else printf(", channel %zu", p->column);
    printf(": A has %.9g, B has %.9g\n", p->a, p->b);
    if (departs) printf("  where: %s\n", buffer_text(&f->extent));
    printf("  %zu of %zu elements differ; error %.2e; what it was computed from: %.2e\n", t->n_different,
           t->n_rows * t->n_columns, t->error, t->input_error);
    if (departs && d->must_be_equal)
        printf("  Two paths of one backend agree bit for bit, by contract: %s is where to look.\n", t->op);
    else if (departs)
        printf(
            "  Its inputs agree %.0f times better than it does, which rounding (%s) does not explain: the fault is in\n"
            "  %s, in what it reads beside its inputs (weights, positions, the KV), or in an op between that was not\n"
            "  traced.\n",
            t->error / (t->input_error > d->roundoff ? t->input_error : d->roundoff), d->precision,
            t->op[0] ? t->op : t->name);
}

// The tensor that stands for tensors[i]'s line of the plot, and the first tensor of the next line: a layer is one line,
// the residual stream's error or, where that was not traced, the largest; outside the layers every tensor is one.
static const struct diff_tensor *line_of(const struct diff *d, size_t *i, bool *departs) {
    const struct diff_tensor *shown = &d->tensors[*i];
    int layer = shown->layer;
    *departs = false;
    for (bool first = true; *i < d->n && d->tensors[*i].layer == layer && (layer >= 0 || first);
         (*i)++, first = false) {
        const struct diff_tensor *t = &d->tensors[*i];
        *departs = *departs || t->departs;
        if (strcmp(t->part, "resid") == 0 || (strcmp(shown->part, "resid") != 0 && t->error > shown->error)) shown = t;
    }
    return shown;
}

// The error's growth on a logarithmic scale.
static void print_growth(const struct diff *d) {
    enum { WIDTH = 50 };
    double low = 0;
    bool departs;
    for (size_t i = 0; i < d->n;) {
        const struct diff_tensor *t = line_of(d, &i, &departs);
        if (t->error > 0) low = fmin(low, floor(log10(t->error)) - 1);
    }
    if (low == 0) return;
    printf("\nerror of the residual stream by layer, from 1e%.0f to 1; ! where a tensor diverges\n", low);
    for (size_t i = 0; i < d->n;) {
        const struct diff_tensor *t = line_of(d, &i, &departs);
        double log = t->error > 0 ? fmin(log10(t->error), 0) : low;
        int full = (int)((log - low) / -low * WIDTH + 0.5);
        printf("  %-20s %8.1e %c%s", t->name, t->error, departs ? '!' : ' ', full ? " " : "");
        for (int k = 0; k < full; k++) putchar('#');
        putchar('\n');
    }
}

static void print_text(const struct diff *d, const struct finding *f) {
    print_side('A', &d->a);
    print_side('B', &d->b);
    printf("%zu tensors at %zu positions: %zu equal, %zu within rounding, %zu beyond", d->n, d->n_rows, d->n_equal,
           d->n_rounding, d->n_departs);
    if (d->n_later) printf(", %zu different ones computed later", d->n_later);
    putchar('\n');
    if (d->n_only_a) printf("%zu tensors are only in A\n", d->n_only_a);
    if (d->n_only_b) printf("%zu tensors are only in B\n", d->n_only_b);
    if (f->tensor) {
        print_finding(d, f);
        print_growth(d);
    }
    switch (d->verdict) {
    case DIFF_EQUAL: printf("\nverdict: equal, every element\n"); break;
    case DIFF_ROUNDING: printf("\nverdict: equal within rounding (%s)\n", d->precision); break;
    case DIFF_DEPARTS: printf("\nverdict: diverged at %s\n", f->tensor->name); break;
    }
}

static bool write_report(const struct diff *d, const char *path, struct error *err) {
    struct buffer html = {0};
    bool ok = diff_html(d, &html, err) && file_write(path, html.data, html.len, err);
    buffer_free(&html);
    if (ok) fprintf(stderr, "wrote the report to %s\n", path);
    return ok;
}

static int run(const struct cli_options *o) {
    struct error err = {0};
    struct finding f = {0};
    int status = EXIT_FAULT;
    struct diff *d = diff_open(o->model, o->operand_2, &err);
    bool ok = d && find(d, &f, &err) && (!o->given[OPT_REPORT] || write_report(d, o->text[OPT_REPORT], &err));
    if (!ok) {
        cli_fail("%s", err.text);
    } else if (o->given[OPT_JSON]) {
        if (print_json(d, &f) && d->verdict != DIFF_DEPARTS) status = EXIT_GOOD;
    } else {
        print_text(d, &f);
        if (d->verdict != DIFF_DEPARTS) status = EXIT_GOOD;
    }
    buffer_free(&f.extent);
    diff_free(d);
    return status;
}

static const enum option_id options[] = {OPT_REPORT, OPT_JSON, OPT_HELP};

const struct command command_diff = {
    .name = "diff",
    .summary = "compare two traces and name the first divergence",
    .usage = "A.safetensors B.safetensors [--report FILE.html] [--json]",
    .details =
        "A and B are traces of the same token ids: tandem trace's, or tools/hf_trace.py's for another engine. A is "
        "the\n"
        "reference. Every tensor that both have is compared, in the order of computation; a tensor diverges when its\n"
        "error is far above that of what it was computed from. Two of tandem's own paths on one backend must be "
        "equal.\n"
        "Exit status: 0 equal, or equal within rounding; 1 diverged, or not comparable.\n",
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .run = run,
    .two_operands = true,
};
