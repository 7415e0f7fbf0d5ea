#!/usr/bin/env python3
"""The plots of docs/performance.md from what the benchmarks left in target/: docs/strength.svg and docs/growth.svg.

    make plots

Each is drawn if its numbers are there: of `cargo bench --bench strength` and `cargo bench --bench growth`.
"""
import collections
import json
import pathlib

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "advtrain", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

TOP = pathlib.Path(__file__).parent.parent
TARGET, DOCS = TOP / "target", TOP / "docs"
STAGES = {
    "before": "the model as it is, from zero",
    "hardened": "after hardening, from zero",
    "warm": "after hardening, from the start that an earlier attack left",
}
GROWTH = {"steps": "iterations of an attack", "rows": "rows attacked together", "prompt": "tokens of each prompt"}
SHAPES = ["gemma-small", "smollm2-135m"]
# The same line for the same attack in every panel.
LINES = [(colour, style) for style in ["-", "--"] for colour in plt.colormaps["tab10"].colors]


def save(figure, name):
    figure.savefig(DOCS / name, bbox_inches="tight", metadata={"Date": None})
    print(DOCS / name)


def strength():
    """A row of panels for each model that was attacked: loss against passes, a panel for each stage."""
    curves = {}
    for path in sorted((TARGET / "strength").glob("*.jsonl")):
        curves[path.stem] = collections.defaultdict(lambda: collections.defaultdict(list))
        for record in map(json.loads, path.read_text().splitlines()):
            curves[path.stem][record["when"]][record["attack"]].append((record["passes"], record["loss"]))
    if not curves:
        return
    lines = {}
    figure, panels = plt.subplots(len(curves), len(STAGES), figsize=(13, 4 * len(curves)), squeeze=False)
    for (model, stages), row in zip(curves.items(), panels):
        for (stage, title), panel in zip(STAGES.items(), row):
            panel.set_title(f"{model}: {title}", fontsize=9)
            panel.set_xlabel("forward and backward passes")
            panel.set_ylabel("loss of the harmful target, nats per token")
            panel.set_xscale("log")
            losses = [loss for points in stages[stage].values() for _, loss in points]
            if losses and max(losses) > 5 * min(losses):
                panel.set_yscale("log")
            panel.set_xticks([1, 2, 3, 5, 10, 20], labels=["1", "2", "3", "5", "10", "20"], minor=False)
            panel.minorticks_off()
            for attack, points in stages[stage].items():
                colour, style = lines.setdefault(attack, LINES[len(lines)])
                panel.plot(*zip(*points), style, color=colour, marker=".", linewidth=1, label=attack)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False)
    figure.tight_layout()
    save(figure, "strength.svg")


def growth():
    """Seconds against each of what can grow, a panel each."""
    figure, panels = plt.subplots(1, len(GROWTH), figsize=(13, 3.6))
    found = False
    for (name, title), panel in zip(GROWTH.items(), panels):
        panel.set_xlabel(title)
        panel.set_ylabel("seconds of the attack" if name == "steps" else "seconds of an iteration")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        for shape in SHAPES:
            paths = (TARGET / "criterion" / f"growth-{name}-{shape}").glob("*/new/estimates.json")
            read = lambda path: json.loads(path.read_text())["mean"]["point_estimate"] / 1e9
            points = sorted((int(path.parts[-3]), read(path)) for path in paths)
            if points:
                found = True
                panel.plot(*zip(*points), marker=".", linewidth=1, label=shape)
                panel.set_xticks([point[0] for point in points], labels=[str(point[0]) for point in points])
                panel.minorticks_off()
                panel.legend(frameon=False)
    figure.tight_layout()
    if found:
        save(figure, "growth.svg")


if __name__ == "__main__":
    strength()
    growth()
