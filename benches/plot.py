#!/usr/bin/env python3
"""The plots of docs/, each from what a command left behind, and drawn if that is there.

    make plots
    python3 benches/plot.py RECORDS

docs/strength.svg and docs/growth.svg from `cargo bench --bench strength` and `cargo bench --bench growth`; curves.svg, epsilon.svg and
share.svg from a folder of records, beside them: docs/records, which `examples/recipes/run.sh publish` keeps, where none is named.
"""
import collections
import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "advtrain", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

TOP = pathlib.Path(__file__).parent.parent
TARGET, DOCS = TOP / "target", TOP / "docs"
RUNS = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "records"
STAGES = {
    "before": "the model as it is, from zero",
    "hardened": "after hardening, from zero",
    "warm": "after hardening, from the start that an earlier attack left",
}
GROWTH = {"steps": "iterations of an attack", "rows": "rows attacked together", "prompt": "tokens of each prompt"}
SHAPES = ["gemma-small", "smollm2-135m"]
# The same line for the same attack in every panel.
LINES = [(colour, style) for style in ["-", "--"] for colour in plt.colormaps["tab10"].colors]


def save(figure, path):
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    print(path)


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
    save(figure, DOCS / "strength.svg")


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
        save(figure, DOCS / "growth.svg")


def measured(run):
    """What was measured of a run, by update: before it, on the way, and after it."""
    points = {0: json.loads((run / "before.json").read_text())["measured"]}
    curve = run / "curve.jsonl"
    for point in map(json.loads, curve.read_text().splitlines() if curve.exists() else []):
        points[point["update"]] = point["measured"]
    if (run / "after.json").exists():
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["update"]
        points[last] = json.loads((run / "after.json").read_text())
    return points


def refused(*names):
    """The share of answers that refuse, over these sets together."""
    return lambda at: 100 * sum(at[name]["count"] for name in names) / sum(at[name]["total"] for name in names)


# Panels of a run's plots: how each is titled, and the number of what was measured.
MEASURES = {
    "harmful requests refused, %": refused("refuses"),
    "harmless requests refused, %": refused("harmless_refused", "requests_refused"),
    "loss of the harmful target,\nembedding attack at epsilon 0.1,\nnats per token": lambda at: at["attacked_loss"],
    "loss of held-out chats,\nnats per token": lambda at: at["chat_loss"],
}


def panels_of_measures():
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(14, 3.4))
    for panel, title in zip(panels, MEASURES):
        panel.set_ylabel(title)
        if "%" in title:
            panel.set_ylim(-3, 103)
    return figure, panels


def curves():
    """What was measured over training, a line for each recipe."""
    found = {name: sorted(measured(RUNS / run).items()) for run, name in RECIPES.items() if (RUNS / run / "curve.jsonl").exists()}
    if not found:
        return
    figure, panels = panels_of_measures()
    for name, points in found.items():
        for panel, measure in zip(panels, MEASURES.values()):
            panel.plot([update for update, _ in points], [measure(at) for _, at in points], marker=".", linewidth=1, label=name)
            panel.set_xlabel("updates")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False)
    figure.tight_layout()
    save(figure, RUNS / "curves.svg")


def sweep(prefix, base, label, name):
    """What was measured at the end of runs that differ in one number, which their names end in; `base` is that of C-AdvUL's recipe,
    which is called epsilon-0.1 where it was made once more, on the device of the others."""
    recipe = RUNS / "epsilon-0.1"
    runs = {base: recipe if recipe.exists() else RUNS / "advul-0"}
    runs |= {float(run.name.removeprefix(prefix)): run for run in RUNS.glob(f"{prefix}*")}
    runs = {value: measured(run) for value, run in sorted(runs.items()) if (run / "after.json").exists()}
    if len(runs) < 2:
        return
    figure, panels = panels_of_measures()
    before = next(iter(runs.values()))[0]
    for panel, measure in zip(panels, MEASURES.values()):
        panel.plot(list(runs), [measure(points[max(points)]) for points in runs.values()], marker="o", linewidth=1)
        panel.axhline(measure(before), linestyle=":", color="grey", linewidth=1)
        panel.set_xlabel(label)
        if "epsilon" in label:
            panel.set_xscale("log")
        panel.set_xticks(list(runs), labels=[f"{value:g}" for value in runs])
        panel.minorticks_off()
    figure.tight_layout()
    save(figure, RUNS / name)


RECIPES = {
    "advul-0": "C-AdvUL",
    "advipo-0": "C-AdvIPO",
    "one_step-0": "C-AdvUL with one attack step",
    "three_passes-0": "C-AdvUL with three passes",
    "no_attack-0": "C-AdvUL without the attack",
}

if __name__ == "__main__":
    strength()
    growth()
    curves()
    sweep("epsilon-", 0.1, "epsilon of training,\nshare of the mean embedding norm", "epsilon.svg")
    sweep("share-", 0.875, "share of utility rows", "share.svg")
