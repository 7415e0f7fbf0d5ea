#!/usr/bin/env python3
"""This crate's benchmarks and their peers in turn, row by row, on one machine and one libtorch.

    make bench-peers                   # from the top of the repository; goes on where it was stopped
    make bench-peers DEVICE=cuda       # the shape gemma-2b in bfloat16 on a GPU

Each row (an attack iteration, a whole update of either algorithm; two shapes; equal and ragged lengths; bfloat16 where the
processor multiplies it) is run by Criterion (`--quick`: after a warm-up) and by each style of step.py (once, after one of a single
iteration), and all of that three times over. What was measured is kept in target/peers/results-DEVICE.jsonl, a line for
each number; remove it to begin anew.

Ratios are of the runs of one repetition, so that a machine whose speed drifts does not make them up: the median, and the
least and greatest in brackets. The floor is the time that an attack iteration's matrix products would take at the rate of
one large product, measured in the same repetition: of libtorch's own product, and of oneDNN's.
"""
import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
TOP = HERE.parent.parent
ROWS = ["attack", "advipo", "advul"]
SHAPES = ["gemma-small", "smollm2-135m"]
LENGTHS = ["equal", "ragged"]
STYLES = ["published", "tuned", "merged"]


def cases(device):
    """Row, shape, lengths, dtype."""
    if device != "cpu":
        return list(itertools.product(ROWS, ["gemma-2b"], LENGTHS, ["bfloat16"]))
    wide = [(*case, "float32") for case in itertools.product(ROWS, SHAPES, LENGTHS)]
    if "avx512_bf16" not in pathlib.Path("/proc/cpuinfo").read_text():
        print("bfloat16: left out, this processor has no unit for it", file=sys.stderr)
        return wide
    half = itertools.chain(
        itertools.product(["attack"], SHAPES, LENGTHS), itertools.product(["advipo", "advul"], SHAPES, ["equal"])
    )
    return wide + [(*case, "bfloat16") for case in half]


def products(dtype, device):
    """The large products whose rates give a floor, and how many rows their matrices have."""
    if device != "cpu":
        return {dtype: 8192}
    return {"float32": 2048, "float32-onednn": 2048} if dtype == "float32" else {dtype: 2048}


def output(command, device):
    environment = {**os.environ, "BENCH_DEVICE": device}
    done = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}")
    return done.stdout


class Bench:
    """Measures on a device."""

    def __init__(self, python, device):
        self.python, self.device = python, device

    def cargo(self, name, *options):
        return output(["cargo", "bench", "--bench", name, "--", *options], self.device)

    def criterion(self, name):
        self.cargo("step", "--quick", "--exact", name)
        estimates = json.loads((TOP / "target/criterion" / name / "new/estimates.json").read_text())
        return {"seconds": estimates["mean"]["point_estimate"] / 1e9}

    def ours(self, row, shape, lengths, dtype):
        group = row if dtype == "float32" else f"{row}-{dtype}"
        memory = int(self.cargo("memory", row, shape, lengths, dtype).split()[-1])
        return {**self.criterion(f"{group}/{shape}/{lengths}"), "memory_mb": memory}

    def peer(self, style, row, shape, lengths, dtype):
        options = {"style": style, "row": row, "shape": shape, "lengths": lengths, "dtype": dtype, "device": self.device}
        command = [self.python, str(HERE / "step.py"), "--repeats", "1"]
        command += [part for option, value in options.items() for part in (f"--{option}", value)]
        printed = json.loads(output(command, self.device).splitlines()[-1])
        return {"seconds": printed["seconds"][0], "memory_mb": printed["memory_mb"]}


class Results:
    """What was measured so far, by (repetition, row, shape, lengths, side)."""

    def __init__(self, path):
        self.path = path
        self.numbers = {}
        if path.exists():
            whole = path.read_text()
            whole = whole[: whole.rfind("\n") + 1]  # a line that a kill cut short is measured again
            path.write_text(whole)
            for line in whole.splitlines():
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
    """Floating-point operations of an attack iteration: 2 forward and 2 backward for each weight and token that must meet. A row's
    last token predicts nothing, and behind the keys and values of the last block only the predictors of targets go on."""
    config = json.loads((HERE.parent / "shapes.json").read_text())[shape]
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    block = 2 * hidden * dim * (heads + groups) + 3 * hidden * config["intermediate_size"]
    rows, prompt, target = 8, 64, 24
    shortest = prompt if lengths == "equal" else prompt // 4
    tokens = sum(shortest + (prompt - shortest) * row // (rows - 1) + target - 1 for row in range(rows))
    keys_and_values, predictors = 2 * hidden * dim * groups, rows * target
    last = keys_and_values * tokens + (block - keys_and_values) * predictors
    return 4 * ((config["num_hidden_layers"] - 1) * block * tokens + last + config["vocab_size"] * hidden * predictors)


def spread(numbers):
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def table(results, device, repeats):
    lines = [
        "| row | ours, seconds | published / ours | tuned / ours | merged / ours | ours / floor | memory, MiB: ours, published, tuned, merged |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, shape, lengths, dtype in cases(device):
        of = lambda side, field: [results[number, row, shape, lengths, dtype, side][field] for number in range(repeats)]
        seconds = of("ours", "seconds")
        ratios = [spread([a / b for a, b in zip(of(style, "seconds"), seconds)]) for style in STYLES]
        floors = ["-"]
        if row == "attack":
            operations = floor_operations(shape, lengths)
            one = lambda number, name, size: results[number, "product", name]["seconds"] * operations / (2 * size**3)
            floors = [
                spread([a / one(number, name, size) for number, a in enumerate(seconds)])
                for name, size in products(dtype, device).items()
            ]
        memory = ", ".join(str(round(statistics.median(of(side, "memory_mb")))) for side in ["ours", *STYLES])
        name = f"{row}, {shape}, {lengths}, {dtype}"
        lines.append(f"| {name} | {spread(seconds)} | {' | '.join(ratios)} | {'; '.join(floors)} | {memory} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="one with transformers and peft")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = arguments.device
    bench = Bench(arguments.python, device)
    results = Results(TOP / f"target/peers/results-{device.replace(':', '')}.jsonl")
    for number in range(arguments.repeats):
        for dtype in sorted({case[-1] for case in cases(device)}):
            for name in products(dtype, device):
                results.get((number, "product", name), lambda: bench.criterion(f"product/{name}"))
        for case in cases(device):
            results.get((number, *case, "ours"), lambda: bench.ours(*case))
            for style in STYLES:
                results.get((number, *case, style), lambda: bench.peer(style, *case))
    print(table(results.numbers, device, arguments.repeats))


if __name__ == "__main__":
    main()
