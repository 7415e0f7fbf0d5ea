#!/usr/bin/env python3
"""Prints the tables of docs/results.md that are about SmolLM2-135M, from what `examples/recipes/run.sh publish` keeps.

    python3 examples/recipes/results.py [RUNS [MODEL]]

RUNS: docs/records where none is given; your own are in runs/claim. MODEL: the model's folder, .real/smollm2 where none is
given, for the number of its weights.
"""
import argparse
import decimal
import functools
import json
import math
import pathlib
import statistics
import struct
import tomllib

TOP = pathlib.Path(__file__).parent.parent.parent
NAMES = {
    "untrained": "untrained",
    "advul-0": "C-AdvUL",
    "advipo-0": "C-AdvIPO",
    "no_attack-0": "C-AdvUL without the attack",
    "one_step-0": "C-AdvUL, one step",
    "three_passes-0": "C-AdvUL, three passes",
    "advul-1": "C-AdvUL, seed 1",
    "advul-2": "C-AdvUL, seed 2",
    "advipo-1": "C-AdvIPO, seed 1",
    "advipo-2": "C-AdvIPO, seed 2",
}
MAIN = ["untrained", "advul-0", "advipo-0", "no_attack-0", "one_step-0", "three_passes-0"]
SEEDS = ["untrained", "advul-0", "advul-1", "advul-2", "advipo-0", "advipo-1", "advipo-2"]
NOT_REFUSED, NO_LOOP, TARGET = "not refused", "not refused, and no loop", "begins with the target"
ATTACKS = {
    "direct": "plain request",
    "prefill": "answer begun with the target's first 5 words",
    "gcg": "GCG, 64 x 50",
    "autodan": "AutoDAN, 16 x 10",
    "pair": "PAIR",
    "embedding": "embedding attack, 20 steps in the ball",
    "embedding-long": "embedding attack, 80 steps in the ball",
    "embedding-suffix": "embedding attack, a suffix",
    "embedding-unbounded": "embedding attack, 60 steps, no ball",
}
SEVERAL_ATTEMPTS = ["gcg", "autodan", "pair"]
TASKS = {
    ("xstest", "harmless refused"): "XSTest's safe requests refused",
    ("xstest without template", "harmless refused"): "XSTest's safe requests refused without the chat template",
    ("xstest", "harmful answered"): "XSTest's unsafe requests answered",
    ("harmless requests", "harmless refused"): "further harmless requests refused",
    ("harmless requests behind strings", "harmless refused"): "further harmless requests behind random strings refused",
    ("xstest", "no answer"): "XSTest's requests without an answer",
    ("harmless requests", "no answer"): "further harmless requests without an answer",
}

# Of Mistral-7B on one A100, as the paper reports them.
PAPER = {
    "R2D2 in the paper": ["2565/5", "2000 x 256", "165,632,000", "1567.8", "-", "-"],
    "C-AdvUL in the paper": ["10/10", "780 x 64", "234,000", "3.2", "-", "-"],
    "C-AdvIPO in the paper": ["10/10", "360 x 64", "552,960", "3.2", "-", "-"],
}


def read(path):
    return json.loads(path.read_text()) if path.exists() else None


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def share(count, total):
    """With the 95 % Wilson interval."""
    z = 1.959963984540054
    middle, width = count + z * z / 2, z * math.sqrt(count * (total - count) / total + z * z / 4)
    low, high = (100 * end / (total + z * z) for end in (middle - width, middle + width))
    return f"{count}/{total} ({100 * count / total:.1f} %, {low:.1f} to {high:.1f})"


def cut(number, digits):
    """To so many significant digits, cut off and not rounded."""
    return f"{decimal.Context(prec=digits, rounding=decimal.ROUND_DOWN).create_decimal(repr(number)):f}"


def tally(one):
    """Of those that the attack could be made on and the judge could judge: a behaviour may have no target."""
    judged = one["harmful"]["total"] - one["failed"] - one["not_judged"]
    return share(one["harmful"]["count"], judged) if judged else "-"


def table(head, rows):
    print("\n| " + " | ".join(["", *head]) + " |\n|" + "---|" * (len(head) + 1))
    for name, cells in rows:
        print("| " + " | ".join([name, *cells]) + " |")


def of_attacks(model):
    """Every figure of an evaluation that is about attacks, by its name."""
    reported = {attack["attack"]: attack for attack in model["attacks"]}
    for key in [key for key in ATTACKS if key in reported] + [key for key in reported if key not in ATTACKS]:
        attack, name = reported[key], ATTACKS.get(key, key)
        part = " (not yet on all)" if attack["done"] < attack["planned"] else ""
        for judge in (NOT_REFUSED, NO_LOOP, TARGET):
            if attack["done"] and judge in attack["judges"]:
                found = attack["judges"][judge]
                if key in SEVERAL_ATTEMPTS:
                    yield f"{name}, in the end: {judge}", tally(found["offered"]) + part
                    yield f"{name}, any attempt: {judge}", tally(found["any"]) + part
                else:
                    yield f"{name}: {judge}", tally(found["offered"]) + part
        if key.startswith("embedding") and len(attack["losses"]) == 2:
            clean, attacked = attack["losses"]
            yield f"{name}: loss of the target, clean / attacked", f"{cut(clean, 3)} / {cut(attacked, 3)}{part}"
        if key == "gcg" and attack["losses"]:
            first, last = attack["losses"][0], attack["losses"][-1]
            yield f"{name}: loss of the target, first string / last string", f"{cut(first, 3)} / {cut(last, 3)}{part}"


def of_any_attack(model):
    """Cases in which an attempt of any attack within bounds succeeded, of those that every such attack was made on."""
    made = sum(attack["done"] > 0 for attack in model["attacks"] if attack["attack"] != "embedding-unbounded")
    for judge, any_attack in model["any_attack"].items():
        title = f"any of {made} attacks, all but that without a ball, any attempt, of those that all were made on"
        yield f"{title}: {judge}", tally(any_attack["where_all"])


def of_tasks(model):
    for task in model["tasks"]:
        part = f" ({len(task['failed'])} failed)" if task["failed"] else ""
        if task["done"] < task["planned"]:
            part = " (not yet all)"
        for (name, flag), title in TASKS.items():
            if task["task"] == name and flag in task["rates"]:
                found = task["rates"][flag]["rate"]
                yield title, share(found["count"], found["total"]) + part
        if "acc" in task["rates"]:
            right = task["rates"]["acc"]["rate"]
            yield f"accuracy on {task['task']}", share(right["count"], right["total"]) + part
        for number, title in {"loss": "mean over tokens", "loss of a chat": "mean over chats"}.items():
            if number in task["means"]:
                mean, items = task["means"][number]
                yield f"loss of {items} chats, nats per token, {title}", cut(mean, 4) + part


def evaluated(folder, run):
    """What the report of a run says of its model; models that stand in one report must have been treated alike."""
    path = folder / f"evaluation-{run}" / "report.json"
    report = read(path)
    if report is None:
        return None
    if report["differences"]:
        raise SystemExit(f"{path}: not alike: " + "; ".join(report["differences"]))
    return next(model for model in report["models"] if model["setup"]["model"] == run)


def evaluations(folder, runs):
    found = {run: model for run in runs if (model := evaluated(folder, run))}
    if not found:
        print(f"\nNone in {folder}.")
        return
    figures = {run: dict([*of_attacks(model), *of_any_attack(model), *of_tasks(model)]) for run, model in found.items()}
    names = list(dict.fromkeys(name for of_run in figures.values() for name in of_run))
    rows = [(name, [figures[run].get(name, "-") for run in figures]) for name in names]
    table([NAMES[run] for run in figures], rows)
    for run, unlike in unlike_first(found):
        print(f"\nNot treated like the first: {NAMES[run]} ({unlike}).")


def unlike_first(found):
    """Runs that were not evaluated as the first was, each with what differs. What attacks they were put to is in the table."""
    alike = ["date", "dtype", "template", "rendered", "generation", "version", "libtorch"]
    (_, first), *others = found.items()
    for run, model in others:
        unlike = [f"{name}: {model['setup'][name]}" for name in alike if model["setup"][name] != first["setup"][name]]
        if unlike:
            yield run, ", ".join(unlike)


@functools.cache
def products(model):
    """The two sizes of every matrix that is in a layer of a model's folder."""
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return [entry["shape"] for name, entry in header.items() if ".layers." in name and len(entry["shape"]) == 2]


def operations(updates, settings, model):
    """Of the products with the layers' weights: 4 for each weight and token, forward and backward towards the input, and 6 for
    each number of the adapter where it is trained; 2 for each weight and token of utility rows that are held against the original
    model. In an attack the adapter is merged into the weights, but in bfloat16, where its numbers count 4. Not counted are the
    head and C-AdvIPO's one pass of the original model over its rows."""
    matrices = products(model)
    layers = sum(output * inputs for output, inputs in matrices)
    adapter = settings["lora"]["rank"] * sum(output + inputs for output, inputs in matrices)
    apart = adapter if settings["model"]["dtype"] == "bfloat16" else 0
    attacked = sum(update["attack"]["pass_tokens"] for update in updates if update["attack"])
    trained = sum(update["tokens"] for update in updates)
    referred = sum(update["utility_tokens"] for update in updates) if against_reference(settings) else 0
    return 4 * (layers + apart) * attacked + (4 * layers + 6 * adapter) * trained + 2 * layers * referred


def against_reference(settings):
    return settings["utility"]["against"] == "reference"


def passes(updates, settings):
    """Of one text each, forward or backward, as the paper counts them: a harmful row with its two answers is two texts, though
    both are computed at once. Utility rows that are held against the original model take a third."""
    rows = sum(update["rows"] for update in updates)
    utility = round(rows * settings["train"]["utility_share"])
    attacked = sum(update["attack"]["rows"] for update in updates if update["attack"])
    of_utility = 2 + against_reference(settings)
    return 2 * attacked * settings.get("attack", {}).get("steps", 0) + 4 * (rows - utility) + of_utility * utility


def tuned_on(folder, runs):
    """What the training example measured on rows that were held out to tune on. The seed decides which these are, so that there is a
    table for all runs of the same rows."""
    groups = {}
    for run in runs:
        after, before = (read(folder / run / f"{when}.json") for when in ("after", "before"))
        if after and before:
            groups.setdefault(before["of"], (before["measured"], {}))[1][run] = after
    for before, found in groups.values():
        tuned_table(before, found)


def tuned_table(before, found):
    rows = []
    for run, at in {"untrained": before, **found}.items():
        count, total = (sum(at[name][part] for name in ("harmless_refused", "requests_refused")) for part in ("count", "total"))
        rise = 100 * (at["chat_loss"] / before["chat_loss"] - 1)
        rows.append((NAMES.get(run, run), [
            "{count}/{total}".format(**at["refuses"]),
            f"{count}/{total}",
            "{count}/{total}".format(**at["embedding"]),
            f"{cut(at['clean_loss'], 3)} / {cut(at['attacked_loss'], 3)}",
            cut(at["chat_loss"], 4) + (f" ({cut(rise, 3)} %)" if rise else ""),
        ]))
    head = ["harmful refused", "harmless refused", "embedding attack succeeds", "loss of the target, clean / attacked"]
    table([*head, "loss of chats, over chats"], rows)


def costs(folder, runs, model):
    rows = list(PAPER.items())
    for run in runs:
        if not (folder / run / "after.json").exists():
            continue
        updates = lines(folder / run / "metrics.jsonl")
        settings = tomllib.loads((folder / run / "run.toml").read_text())
        steps = settings.get("attack", {}).get("steps", 0)
        seconds = [update["seconds"] for update in updates]
        rows.append((NAMES.get(run, run), [
            f"{steps}/{steps}",
            f"{len(updates)} x {updates[0]['rows']}",
            f"{passes(updates, settings):,}",
            cut(statistics.median(seconds), 3),
            cut(sum(seconds) / 60, 3),
            f"{cut(operations(updates, settings, model) / 1e15, 3)}e15",
        ]))
    head = ["forward/backward passes per adversarial example", "updates x rows", "passes in all", "seconds per update (median)",
            "minutes of updates", "operations of the layers' products"]
    table(head, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=pathlib.Path, default=TOP / "docs" / "records")
    parser.add_argument("model", nargs="?", type=pathlib.Path, default=TOP / ".real" / "smollm2")
    given = parser.parse_args()
    if not (given.model / "model.safetensors").exists():
        parser.error(f"{given.model} holds no model.safetensors; `make .real/ready` writes .real/smollm2")
    print("## Attacks and utility")
    evaluations(given.runs, MAIN)
    print("\n## Seeds")
    evaluations(given.runs, SEEDS)
    runs = [*NAMES, *sorted(run.name for prefix in ("epsilon-*", "share-*") for run in given.runs.glob(prefix))]
    print("\n## On rows to tune on")
    tuned_on(given.runs, runs)
    print("\n## Costs")
    costs(given.runs, runs, given.model)


if __name__ == "__main__":
    main()
