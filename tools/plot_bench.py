#!/usr/bin/env python3
"""Draws what `tandem bench --json` measured, as one SVG file.

plot_bench.py OUT.svg RUN.json [RUN.json ...]

Each file is one run and gives a line for every model, type and setting of fusion in it; lines carry the spread (least to
most) of the repeats. Panels: prefill by length, decode by depth, decode by batch, and the share of the read bandwidth that
decoding reached. Needs nothing but Python.
"""
import json
import math
import pathlib
import sys
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 460, 320, 62, 42, 46, 16
COLOURS = ["#1b6ca8", "#d1495b", "#2e8b57", "#8d5a97", "#e08e1a", "#4a4a4a", "#00798c", "#a0522d"]


def nice_ticks(top):
    step = 10 ** math.floor(math.log10(top or 1))
    for factor in (0.1, 0.2, 0.25, 0.5, 1):
        if top / (step * factor) <= 6:
            step *= factor
            break
    return [i * step for i in range(int(top / step) + 1)]


class Panel:
    def __init__(self, title, x_label, y_label):
        self.title, self.x_label, self.y_label, self.lines = title, x_label, y_label, {}

    def add(self, label, x, y, low, high):
        self.lines.setdefault(label, []).append((x, y, low, high))

    def draw(self, at_x, at_y, colours):
        xs = sorted({p[0] for line in self.lines.values() for p in line})
        top = max(p[3] for line in self.lines.values() for p in line) * 1.05 or 1
        inner_w, inner_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

        def px(x):  # every measured place has the same distance from the next: 0, 1024, 4096, ... have no common scale
            return at_x + LEFT + (inner_w * (xs.index(x) + 0.5) / len(xs))

        def py(y):
            return at_y + TOP + inner_h * (1 - y / top)

        out = [f'<text x="{at_x + LEFT}" y="{at_y + 22}" class="title">{escape(self.title)}</text>']
        for tick in nice_ticks(top):
            out.append(f'<line x1="{at_x + LEFT}" x2="{at_x + WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}" '
                       f'class="grid"/><text x="{at_x + LEFT - 6}" y="{py(tick) + 4:.1f}" class="y">{tick:g}</text>')
        for x in xs:
            out.append(f'<text x="{px(x):.1f}" y="{at_y + HEIGHT - BOTTOM + 16}" class="x">{x:,}</text>')
        out.append(f'<text x="{at_x + LEFT + inner_w / 2}" y="{at_y + HEIGHT - 12}" class="x">{escape(self.x_label)}</text>')
        out.append(f'<text x="{at_x + LEFT}" y="{at_y + TOP - 6}" class="unit">{escape(self.y_label)}</text>')
        for label, points in self.lines.items():
            colour, points = colours[label], sorted(points)
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _, _ in points)
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for x, y, low, high in points:
                out.append(f'<line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(low):.1f}" y2="{py(high):.1f}" '
                           f'stroke="{colour}"/><circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{colour}">'
                           f"<title>{escape(label)}: {y:.4g} ({low:.4g} to {high:.4g})</title></circle>")
        return out


def panels_of(runs):
    prefill = Panel("Prefill", "tokens of the prompt", "tok/s")
    depth = Panel("Decode, one sequence", "tokens in the KV", "tok/s")
    batch = Panel("Decode, all sequences together", "sequences", "tok/s")
    share = Panel("Share of the measured read bandwidth, one sequence", "tokens in the KV", "%")
    several = len({r["model"] for _, run in runs for r in run["results"]}) > 1
    both = len({r["fusion"] for _, run in runs for r in run["results"]}) > 1
    for name, run in runs:
        for r in run["results"]:
            label = r["type"]
            if several:
                label = f"{pathlib.PurePath(r['model']).name}, {label}"
            if both:
                label += f", fusion {r['fusion']}"
            if len(runs) > 1:
                label = f"{name}: {label}"
            tps = r["tps"]
            if r["kind"] == "prefill":
                prefill.add(label, r["n_tokens"], tps["median"], tps["min"], tps["max"])
                continue
            if r["batch"] == 1:
                depth.add(label, r["depth"], tps["median"], tps["min"], tps["max"])
                percent = 100 * r["bandwidth_share"]
                share.add(label, r["depth"], percent, percent, percent)
            if r["depth"] == 0:
                batch.add(label, r["batch"], tps["median"], tps["min"], tps["max"])
    return [p for p in (prefill, depth, share, batch) if p.lines]


def draw(runs):
    panels = panels_of(runs)
    if not panels:
        sys.exit("plot_bench.py: these files hold no results")
    labels = sorted({label for p in panels for label in p.lines})
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    columns = min(2, len(panels))
    rows = (len(panels) + columns - 1) // columns
    width, below = columns * WIDTH, rows * HEIGHT
    machines = sorted({f"{run['cpu']}, {run['device']}, {run['threads']} threads; reads {run['bandwidth_gbs']:.1f} GB/s"
                       for _, run in runs})
    height = below + 20 * (len(labels) + len(machines)) + 20
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
           "<style>text{font:12px sans-serif;fill:#222}.title{font-size:15px;font-weight:bold}.grid{stroke:#ddd}"
           ".x{text-anchor:middle}.y{text-anchor:end}.unit{fill:#777}</style>",
           f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for i, panel in enumerate(panels):
        out += panel.draw(i % columns * WIDTH, i // columns * HEIGHT, colours)
    for i, label in enumerate(labels):
        y = below + 20 * i + 12
        out.append(f'<rect x="{LEFT}" y="{y - 8}" width="18" height="4" fill="{colours[label]}"/>'
                   f'<text x="{LEFT + 26}" y="{y}">{escape(label)}</text>')
    for i, machine in enumerate(machines):
        out.append(f'<text x="{LEFT}" y="{below + 20 * (len(labels) + i) + 14}" class="unit">{escape(machine)}</text>')
    return "\n".join([*out, "</svg>", ""])


def main(arguments):
    if len(arguments) < 2 or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__.strip())
    runs = []
    for path in arguments[1:]:
        run = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if "results" not in run or "bandwidth_gbs" not in run:
            sys.exit(f"plot_bench.py: {path}: expected what `tandem bench --json` prints")
        runs.append((pathlib.PurePath(path).stem, run))
    pathlib.Path(arguments[0]).write_text(draw(runs), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
