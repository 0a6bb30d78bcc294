// diff_html.c: the report of `tandem diff` for people: verdict, first divergence, a heat map of layers and tensors, the
// growth of the error, the worst positions and channels. One HTML page; its pictures are SVG inside it.
#include "doctor/diff.h"

#include "base/size.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct page {
    struct buffer *out;
    bool ok;
};

__attribute__((format(printf, 2, 3))) static void put(struct page *p, const char *format, ...) {
    char text[2048];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    p->ok = p->ok && n >= 0 && (size_t)n < sizeof text && buffer_append(p->out, text, (size_t)n);
}

// Text from files: names, paths.
static void put_escaped(struct page *p, const char *text) {
    for (; *text; text++) {
        switch (*text) {
        case '<': put(p, "&lt;"); break;
        case '>': put(p, "&gt;"); break;
        case '&': put(p, "&amp;"); break;
        case '"': put(p, "&quot;"); break;
        default: p->ok = p->ok && buffer_append_byte(p->out, (unsigned char)*text < 32 ? ' ' : *text);
        }
    }
}

static const char style[] =
    ":root{--page:#f9f9f7;--card:#fcfcfb;--ink:#0b0b0b;--soft:#52514e;--faint:#898781;--line:#e1e0d9;--good:#006300;"
    "--bad:#d03b3b;--warn:#8a6100;--series:#2a78d6;--none:#f0efec;"
    "--s0:#e4eefb;--s1:#cde2fb;--s2:#b7d3f6;--s3:#9ec5f4;--s4:#6da7ec;--s5:#3987e5;--s6:#256abf;--s7:#184f95;--s8:#"
    "0d366b}\n"
    "@media(prefers-color-scheme:dark){:root{--page:#0d0d0d;--card:#1a1a19;--ink:#fff;--soft:#c3c2b7;--faint:#898781;"
    "--line:#2c2c2a;--good:#0ca30c;--bad:#e66767;--warn:#fab219;--series:#3987e5;--none:#242423;"
    "--s0:#0d2038;--s1:#0d366b;--s2:#104281;--s3:#184f95;--s4:#1c5cab;--s5:#256abf;--s6:#3987e5;--s7:#6da7ec;--s8:#"
    "b7d3f6}}\n"
    "body{font:15px/1.5 system-ui,sans-serif;background:var(--page);color:var(--ink);max-width:1080px;margin:2em auto;"
    "padding:0 1em}\n"
    "h1{font-size:1.5em;margin:0 0 .3em}h2{font-size:1.1em;margin:0 0 .6em}\n"
    "section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1em 1.2em;margin:1em 0;"
    "overflow-x:auto}\n"
    "p{margin:.3em 0}.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}\n"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.15em .8em .15em "
    "0;text-align:left}\n"
    "td.n,th.n{text-align:right}th{color:var(--soft);font-weight:600}tr.bad td{color:var(--bad)}\n"
    "code{font-family:ui-monospace,monospace}svg text{fill:var(--soft);font:11px system-ui,sans-serif}\n"
    "svg .grid{stroke:var(--line)}svg .curve{stroke:var(--series);stroke-width:2;fill:none}\n"
    "svg .dot{fill:var(--series)}svg .dot.bad{fill:var(--bad)}svg .bar{fill:var(--series)}\n"
    "svg .first{fill:none;stroke:var(--bad);stroke-width:3}svg .mark{stroke:var(--bad);stroke-width:1.5}\n"
    "svg .x{fill:var(--none)}svg .s0{fill:var(--s0)}svg .s1{fill:var(--s1)}svg .s2{fill:var(--s2)}svg "
    ".s3{fill:var(--s3)}"
    "svg .s4{fill:var(--s4)}svg .s5{fill:var(--s5)}svg .s6{fill:var(--s6)}svg .s7{fill:var(--s7)}svg "
    ".s8{fill:var(--s8)}\n";

// ---- Verdict -------------------------------------------------------------------------------------------------------

static void put_side(struct page *p, const char *letter, const struct diff_side *s) {
    put(p, "<tr><th>%s</th><td><code>", letter);
    put_escaped(p, s->file);
    put(p, "</code></td><td>");
    put_escaped(p, s->producer);
    put(p, "</td><td>");
    put_escaped(p, s->path);
    put(p, "</td><td>");
    put_escaped(p, s->precision);
    put(p, "</td><td>");
    put_escaped(p, strcmp(s->device, "oracle") == 0 ? "" : s->device);
    put(p, "</td><td>");
    put_escaped(p, s->model);
    put(p, "</td></tr>\n");
}

static void put_verdict(struct page *p, const struct diff *d) {
    put(p, "<section>");
    if (d->verdict == DIFF_EQUAL) put(p, "<h1 class=good>&#10003; Equal, every element</h1>");
    if (d->verdict == DIFF_ROUNDING) put(p, "<h1 class=good>&#10003; Equal within rounding (%s)</h1>", d->precision);
    if (d->verdict == DIFF_DEPARTS) {
        put(p, "<h1 class=bad>&#10007; Diverged at <code>");
        put_escaped(p, d->tensors[d->first].name);
        put(p, "</code></h1>");
    }
    put(p,
        "<p>%zu tensors at %zu positions: %zu equal, %zu within rounding, <b>%zu beyond</b>, %zu different ones "
        "computed "
        "later.%s</p>\n<table><tr><th></th><th>trace</th><th>producer</th><th>path</th><th>precision</th><th>device</"
        "th>"
        "<th>model</th></tr>\n",
        d->n, d->n_rows, d->n_equal, d->n_rounding, d->n_departs, d->n_later,
        d->must_be_equal ? " Two paths of one backend: they have to be equal." : "");
    put_side(p, "A", &d->a);
    put_side(p, "B", &d->b);
    put(p, "</table>");
    if (d->n_only_a || d->n_only_b)
        put(p, "<p class=soft>%zu tensors are only in A, %zu only in B.</p>", d->n_only_a, d->n_only_b);
    put(p, "</section>\n");
}

static void put_first(struct page *p, const struct diff *d, const struct diff_profile *profile) {
    const struct diff_tensor *t = &d->tensors[d->first];
    struct diff_place at = diff_first_wrong(d, t, profile);
    struct buffer extent = {0};
    p->ok = p->ok && diff_extent(d, t, profile, &extent);
    put(p, "<section><h2>First %s</h2><table>\n<tr><th>tensor</th><td><code>",
        d->verdict == DIFF_DEPARTS ? "divergence" : "difference");
    put_escaped(p, t->name);
    put(p, "</code>%s%s</td></tr>\n", t->op[0] ? ", computed by " : "", t->op);
    if (t->layer >= 0) put(p, "<tr><th>layer</th><td>%d</td></tr>\n", t->layer);
    put(p, "<tr><th>position</th><td>%d</td></tr>\n", at.position);
    if (t->n_heads)
        put(p, "<tr><th>head, channel</th><td>%zu, %zu</td></tr>\n", at.column / t->head_dim, at.column % t->head_dim);
    else put(p, "<tr><th>channel</th><td>%zu</td></tr>\n", at.column);
    put(p, "<tr><th>A has</th><td>%.9g</td></tr>\n<tr><th>B has</th><td>%.9g</td></tr>\n", at.a, at.b);
    if (d->verdict == DIFF_DEPARTS) {
        put(p, "<tr><th>where</th><td>");
        put_escaped(p, buffer_text(&extent));
        put(p, "</td></tr>\n");
    }
    put(p,
        "<tr><th>error</th><td>%.2e; what it was computed from: %.2e; allowed: %.2e</td></tr>\n"
        "<tr><th>differ</th><td>%zu of %zu elements, by at most %.3g</td></tr></table></section>\n",
        t->error, t->input_error, t->limit, t->n_different, t->n_rows * t->n_columns, t->max_abs);
    buffer_free(&extent);
}

// ---- Heat map ------------------------------------------------------------------------------------------------------

static const char *const map_columns[] = {"attn_norm", "q",      "k",    "v",        "q_norm",    "k_norm",
                                          "q_rope",    "k_rope", "attn", "attn_out", "resid_mid", "mlp_norm",
                                          "gate",      "up",     "act",  "mlp_out",  "resid"};
enum { N_MAP_COLUMNS = sizeof map_columns / sizeof map_columns[0], CELL_W = 54, CELL_H = 20, LEFT = 70, TOP = 66 };

// log10 of the scale's lower end: the power of ten below the smallest error.
static double scale_low(const struct diff *d) {
    double low = -2;
    for (size_t i = 0; i < d->n; i++)
        if (d->tensors[i].error > 0) low = fmin(low, floor(log10(d->tensors[i].error)));
    return fmax(low, -18);
}

enum { N_COLOURS = 9 };

// N_COLOURS equal steps of log10(error) from `low` to 0.
static int colour_of(double error, double low) {
    double step = error > 0 ? (log10(error) - low) / -low * N_COLOURS : 0;
    return !(step > 0) ? 0 : step >= N_COLOURS ? N_COLOURS - 1 : (int)step;
}

static void put_cell(struct page *p, const struct diff *d, const struct diff_tensor *t, int x, int y, int w) {
    bool first = d->verdict == DIFF_DEPARTS && t == &d->tensors[d->first];
    if (t->n_different) put(p, "<rect class=s%d", colour_of(t->error, scale_low(d)));
    else put(p, "<rect class=x");
    put(p, " x=%d y=%d width=%d height=%d rx=2><title>", x, y, w - 2, CELL_H - 2);
    put_escaped(p, t->name);
    if (t->n_different) put(p, ": error %.2e, largest difference %.3g</title></rect>", t->error, t->max_abs);
    else put(p, ": equal</title></rect>");
    if (first) put(p, "<rect class=first x=%d y=%d width=%d height=%d rx=3 />", x - 1, y - 1, w, CELL_H);
    else if (t->departs)
        put(p, "<line class=mark x1=%d y1=%d x2=%d y2=%d />", x + 3, y + CELL_H - 5, x + w - 5, y + CELL_H - 5);
    put(p, "\n");
}

static void put_map(struct page *p, const struct diff *d) {
    int n_layers = 0, y = TOP;
    for (size_t i = 0; i < d->n; i++)
        if (d->tensors[i].layer >= n_layers) n_layers = d->tensors[i].layer + 1;
    int height = TOP + (n_layers + 3) * CELL_H + 54, width = LEFT + N_MAP_COLUMNS * CELL_W + 10;
    put(p,
        "<section><h2>Where they differ: layers and tensors, in the order of computation</h2>\n<svg viewBox=\"0 0 %d "
        "%d\" "
        "width=%d role=img aria-label=\"heat map of errors\">\n",
        width, height, width);
    for (int c = 0; c < N_MAP_COLUMNS; c++)
        put(p, "<text x=%d y=%d transform=\"rotate(-40 %d %d)\">%s</text>\n", LEFT + c * CELL_W + 14, TOP - 8,
            LEFT + c * CELL_W + 14, TOP - 8, map_columns[c]);
    int row = 0, last_layer = -1;
    for (size_t i = 0; i < d->n; i++) {
        const struct diff_tensor *t = &d->tensors[i];
        int column = 0;
        while (column < N_MAP_COLUMNS && strcmp(t->part, map_columns[column]) != 0) column++;
        if (t->layer < 0 && !t->op[0]) continue; // no tensor of a model
        if (i > 0 && (t->layer < 0 || t->layer != last_layer)) row++;
        y = TOP + row * CELL_H;
        if (t->layer < 0 || t->layer != last_layer) {
            if (t->layer >= 0) put(p, "<text x=4 y=%d>layer %d</text>\n", y + 14, t->layer);
            else put(p, "<text x=4 y=%d>%s</text>\n", y + 14, t->name);
            last_layer = t->layer;
        }
        if (t->layer < 0) put_cell(p, d, t, LEFT, y, N_MAP_COLUMNS * CELL_W);
        else put_cell(p, d, t, LEFT + column * CELL_W, y, CELL_W);
    }
    y += CELL_H + 16;
    put(p, "<text x=4 y=%d>error</text><rect class=x x=%d y=%d width=34 height=14 /><text x=%d y=%d>equal</text>\n",
        y + 11, LEFT, y, LEFT, y + 26);
    for (int s = 0; s < N_COLOURS; s++)
        put(p, "<rect class=s%d x=%d y=%d width=42 height=14 /><text x=%d y=%d>%.0e</text>\n", s, LEFT + 44 + s * 44, y,
            LEFT + 44 + s * 44, y + 26, pow(10, scale_low(d) * (1 - (double)s / N_COLOURS)));
    put(p, "<text x=%d y=%d>red: beyond rounding; framed: the first</text></svg></section>\n",
        LEFT + 60 + N_COLOURS * 44, y + 11);
}

// ---- Curves and bars -----------------------------------------------------------------------------------------------

// The residual stream, which passes an error on from layer to layer.
static bool on_stream(const struct diff_tensor *t) {
    return strcmp(t->part, "embed") == 0 || strncmp(t->part, "resid", 5) == 0 || t->layer < 0;
}

static void put_growth(struct page *p, const struct diff *d) {
    enum { W = 980, H = 220, X0 = 46, Y0 = 10 };
    double low = scale_low(d);
    double step_x = (double)(W - X0 - 20) / (double)(d->n > 1 ? d->n - 1 : 1);
    put(p,
        "<section><h2>How the error grows</h2>\n<svg viewBox=\"0 0 %d %d\" width=%d role=img aria-label=\"error of "
        "each "
        "tensor, logarithmic\">\n",
        W, H + 40, W);
    int every = low < -9 ? 2 : 1;
    for (int e = (int)low; e <= 0; e += every) {
        double y = Y0 + (double)e / low * H;
        put(p, "<line class=grid x1=%d x2=%d y1=%.1f y2=%.1f /><text x=4 y=%.1f>1e%d</text>\n", X0, W, y, y, y + 4, e);
    }
    put(p, "<polyline class=curve points=\"");
    for (size_t i = 0; i < d->n; i++) {
        if (!on_stream(&d->tensors[i])) continue;
        double e = d->tensors[i].error, v = e > 0 ? fmin(fmax(log10(e), low), 0) : low;
        put(p, "%.1f,%.1f ", X0 + (double)i * step_x, Y0 + v / low * H);
    }
    put(p, "\"/>\n");
    int last_layer = -1;
    double last_label = -100;
    for (size_t i = 0; i < d->n; i++) {
        const struct diff_tensor *t = &d->tensors[i];
        double v = t->error > 0 ? fmin(fmax(log10(t->error), low), 0) : low, x = X0 + (double)i * step_x;
        put(p, "<circle class=\"dot%s\" cx=%.1f cy=%.1f r=%d><title>", t->departs ? " bad" : "", x, Y0 + v / low * H,
            t->departs || d->n < 60 ? 4 : 3);
        put_escaped(p, t->name);
        put(p, ": error %.2e, inputs %.2e, allowed %.2e</title></circle>\n", t->error, t->input_error, t->limit);
        if (t->layer > last_layer) {
            last_layer = t->layer;
            if (x - last_label > 48) {
                put(p, "<line class=grid x1=%.1f x2=%.1f y1=%d y2=%d /><text x=%.1f y=%d>layer %d</text>\n", x, x, Y0,
                    Y0 + H + 4, x, Y0 + H + 18, t->layer);
                last_label = x;
            }
        }
    }
    put(p, "</svg><p class=soft>Each dot is a tensor, in the order of computation; the line follows the residual "
           "stream. Red: further from its inputs than "
           "rounding explains.</p></section>\n");
}

// Bars of one kind of profile: positions or heads.
static void put_bars(struct page *p, const char *what, const double *errors, size_t n, const int32_t *names) {
    enum { W = 980, H = 90, X0 = 46, MAX_BARS = 400 };
    double largest = 0;
    for (size_t i = 0; i < n; i++)
        if (isfinite(errors[i])) largest = fmax(largest, errors[i]);
    if (n < 2 || largest == 0) return;
    size_t per_bar = (n + MAX_BARS - 1) / MAX_BARS, n_bars = (n + per_bar - 1) / per_bar;
    double w = fmin((double)(W - X0) / (double)n_bars, 40);
    put(p, "<p>By %s (largest %.2e)</p><svg viewBox=\"0 0 %d %d\" width=%d role=img aria-label=\"error by %s\">\n",
        what, largest, W, H + 20, W, what);
    for (size_t bar = 0; bar < n_bars; bar++) {
        size_t worst = bar * per_bar;
        for (size_t i = worst; i < n && i < (bar + 1) * per_bar; i++)
            if (!(errors[i] <= errors[worst])) worst = i;
        double h = (isfinite(errors[worst]) ? errors[worst] / largest : 1) * H;
        put(p, "<rect class=bar x=%.1f y=%.1f width=%.1f height=%.1f><title>%s %d: %.2e</title></rect>\n",
            X0 + (double)bar * w, H - h, fmax(w - 2, 1), h, what, names ? names[worst] : (int)worst, errors[worst]);
    }
    put(p, "<text x=%d y=%d>%d</text><text x=%.1f y=%d text-anchor=end>%d</text></svg>\n", X0, H + 14,
        names ? names[0] : 0, X0 + (double)n_bars * w, H + 14, names ? names[n - 1] : (int)n - 1);
}

static void put_channels(struct page *p, const struct diff_tensor *t, const double *errors) {
    enum { SHOWN = 12 };
    size_t worst[SHOWN], n = 0;
    for (size_t c = 0; c < t->n_columns; c++) {
        size_t at = n;
        while (at > 0 && errors[c] > errors[worst[at - 1]]) at--;
        if (at == SHOWN || !(errors[c] > 0)) continue;
        if (n < SHOWN) n++;
        memmove(&worst[at + 1], &worst[at], (n - 1 - at) * sizeof worst[0]);
        worst[at] = c;
    }
    put(p, "<p>Worst channels</p><table><tr>%s<th class=n>channel</th><th class=n>error</th></tr>\n",
        t->n_heads ? "<th class=n>head</th>" : "");
    for (size_t i = 0; i < n; i++) {
        put(p, "<tr>");
        if (t->n_heads) put(p, "<td class=n>%zu</td>", worst[i] / t->head_dim);
        put(p, "<td class=n>%zu</td><td class=n>%.2e</td></tr>\n", t->n_heads ? worst[i] % t->head_dim : worst[i],
            errors[worst[i]]);
    }
    put(p, "</table>");
}

static void put_table(struct page *p, const struct diff *d) {
    put(p,
        "<section><details><summary>All %zu tensors</summary><table><tr><th>tensor</th><th>op</th><th "
        "class=n>differ</th>"
        "<th class=n>largest difference</th><th class=n>RMS, relative</th><th class=n>error</th><th class=n>of "
        "inputs</th>"
        "<th class=n>allowed</th></tr>\n",
        d->n);
    for (size_t i = 0; i < d->n; i++) {
        const struct diff_tensor *t = &d->tensors[i];
        put(p, "<tr%s><td><code>", t->departs ? " class=bad" : "");
        put_escaped(p, t->name);
        put(p,
            "</code></td><td>%s</td><td class=n>%zu of %zu</td><td class=n>%.3g</td><td class=n>%.2e</td><td "
            "class=n>%.2e</td><td class=n>%.2e</td><td class=n>%.2e</td></tr>\n",
            t->op, t->n_different, t->n_rows * t->n_columns, t->max_abs, t->rms_relative, t->error, t->input_error,
            t->limit);
    }
    put(p, "</table></details></section>\n");
}

bool diff_html(const struct diff *d, struct buffer *out, struct error *err) {
    struct page p = {.out = out, .ok = true};
    struct diff_profile profile = {0};
    bool differs = d->first < d->n;
    if (differs && !diff_profile(d, &d->tensors[d->first], &profile, err)) return false;
    put(&p, "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport "
            "content=\"width=device-width\"><title>tandem diff</title>\n<style>\n");
    p.ok = p.ok && buffer_append_text(out, style);
    put(&p, "</style>\n");
    put_verdict(&p, d);
    if (differs) put_first(&p, d, &profile);
    put_map(&p, d);
    if (differs) {
        const struct diff_tensor *t = &d->tensors[d->first];
        put_growth(&p, d);
        put(&p, "<section><h2>Inside <code>");
        put_escaped(&p, t->name);
        put(&p, "</code></h2>\n");
        put_bars(&p, "position", profile.rows, t->n_rows, d->positions);
        put_bars(&p, "head", profile.heads, t->n_heads, NULL);
        put_channels(&p, t, profile.columns);
        put(&p, "</section>\n");
    }
    put_table(&p, d);
    put(&p, "</html>\n");
    diff_profile_free(&profile);
    return p.ok || error_set(err, "out of memory for the report");
}
