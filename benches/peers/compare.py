#!/usr/bin/env python3
"""This crate's benchmarks and their peers in turn, row by row, on one machine and one libtorch.

    make bench-peers          # from the top of the repository; goes on where it was stopped

Each row (an attack iteration, a whole update of either algorithm; two shapes; equal and ragged lengths) is run by
Criterion (`--quick`: once, after a warm-up) and by each style of step.py (once, after a warm-up), and all of that three
times over. What was measured is kept in target/peers/results.jsonl, a line for each number; remove it to begin anew.

Ratios are of the runs of one repetition, so that a machine whose speed drifts does not make them up: the median, and the
least and greatest in brackets. The floor is the time that an attack iteration's matrix products would take at the rate of
one large product, measured in the same repetition.
"""
import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
TOP = HERE.parent.parent
RESULTS = TOP / "target/peers/results.jsonl"
ROWS = ["attack", "advipo", "advul"]
SHAPES = ["gemma-small", "smollm2-135m"]
LENGTHS = ["equal", "ragged"]
STYLES = ["published", "tuned", "merged"]


def output(command):
    done = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}")
    return done.stdout


def bench(name, *options):
    return output(["cargo", "bench", "--bench", name, "--", *options])


def criterion(name):
    """Seconds of a benchmark."""
    bench("step", "--quick", "--exact", name)
    estimates = json.loads((TOP / "target/criterion" / name / "new/estimates.json").read_text())
    return estimates["mean"]["point_estimate"] / 1e9


def ours(row, shape, lengths):
    memory = int(bench("memory", row, shape, lengths).split()[-1])
    return {"seconds": criterion(f"{row}/{shape}/{lengths}"), "memory_mb": memory}


def peer(python, style, row, shape, lengths):
    options = ["--repeats", "1", "--style", style, "--row", row, "--shape", shape, "--lengths", lengths]
    printed = json.loads(output([python, str(HERE / "step.py"), *options]).splitlines()[-1])
    return {"seconds": printed["seconds"][0], "memory_mb": printed["memory_mb"]}


class Results:
    """What was measured so far, by (repetition, row, shape, lengths, side)."""

    def __init__(self, path):
        self.path = path
        self.numbers = {}
        if path.exists():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self.numbers[tuple(record["key"])] = record["found"]

    def get(self, key, measure):
        if key not in self.numbers:
            print("measuring", *key, file=sys.stderr, flush=True)
            self.numbers[key] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "found": self.numbers[key]}) + "\n")
        return self.numbers[key]


def floor_operations(shape, lengths):
    """Floating-point operations of an attack iteration: 2 forward and 2 backward for each weight and token that meet."""
    config = json.loads((HERE.parent / "shapes.json").read_text())[shape]
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    block = 2 * hidden * dim * (heads + groups) + 3 * hidden * config["intermediate_size"]
    rows, prompt, target = 8, 64, 24
    shortest = prompt if lengths == "equal" else prompt // 4
    tokens = sum(shortest + (prompt - shortest) * row // (rows - 1) + target for row in range(rows))
    return 4 * config["num_hidden_layers"] * block * tokens + 4 * config["vocab_size"] * hidden * rows * target


def spread(numbers):
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def table(results, repeats):
    lines = [
        "| row | ours, seconds | published / ours | tuned / ours | merged / ours | ours / floor | memory, MiB: ours, published, tuned, merged |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, shape, lengths in itertools.product(ROWS, SHAPES, LENGTHS):
        of = lambda side, field: [results[number, row, shape, lengths, side][field] for number in range(repeats)]
        seconds = of("ours", "seconds")
        ratios = [spread([a / b for a, b in zip(of(style, "seconds"), seconds)]) for style in STYLES]
        floor = "-"
        if row == "attack":
            products = [results[number, "product", "", "", "ours"]["seconds"] for number in range(repeats)]
            share = floor_operations(shape, lengths) / (2 * 2048**3)
            floor = spread([second / (product * share) for second, product in zip(seconds, products)])
        memory = ", ".join(str(round(statistics.median(of(side, "memory_mb")))) for side in ["ours", *STYLES])
        lines.append(f"| {row}, {shape}, {lengths} | {spread(seconds)} | {' | '.join(ratios)} | {floor} | {memory} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="one with transformers and peft")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    results = Results(RESULTS)
    for number in range(arguments.repeats):
        results.get((number, "product", "", "", "ours"), lambda: {"seconds": criterion("product/float32")})
        for what in itertools.product(ROWS, SHAPES, LENGTHS):
            results.get((number, *what, "ours"), lambda: ours(*what))
            for style in STYLES:
                results.get((number, *what, style), lambda: peer(arguments.python, style, *what))
    print(table(results.numbers, arguments.repeats))


if __name__ == "__main__":
    main()
