#!/usr/bin/env python3
"""Writes rows that have random strings behind what the user says, for docs/small.md ("Strings behind the request").

    .real/venv/bin/python examples/recipes/strings.py FOLDER

into FOLDER, from the files that run.sh reads and runs/claim/utility.jsonl, which it writes:

    held_out.csv, held_out_targets.json            the behaviours that `advul --seed 0` holds out, as they are
    held_out_strings.csv, …_targets.json           each of them behind five strings
    training.csv, training_targets.json,           the others, each as it is and behind four strings
    training_refusals.csv
    utility.jsonl                                  utility rows, four of ten behind a string; their answers stay

and prints five strings.

A string has 5 to 24 tokens. Each is an exclamation mark, which GCG begins with, or any printable token of ASCII, in shares that
are drawn anew for every string.
"""

import csv
import hashlib
import json
import os
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer

VARIANTS, UTILITY_SHARE = 4, 0.4
MODEL = Path(os.environ.get("MODEL", ".real/smollm2"))
BEHAVIORS = Path(os.environ.get("BEHAVIORS", "data/adv_training_behaviors.csv"))
UTILITY = Path("runs/claim/utility.jsonl")


class Strings:
    """Draws strings, none twice."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.seen = set()
        self.mark = tokenizer.encode(" !").ids[0]
        self.tokens = [token for token in range(tokenizer.get_vocab_size()) if self.plain(token)]

    def plain(self, token):
        text = self.tokenizer.decode([token])
        return text.isascii() and text.isprintable() and text.strip() and "<|" not in text and not text.startswith("<")

    def draw(self, rng):
        while True:
            length, marks = rng.randint(5, 24), rng.random()
            tokens = [self.mark if rng.random() < marks else rng.choice(self.tokens) for _ in range(length)]
            text = self.tokenizer.decode(tokens)
            if text not in self.seen:
                self.seen.add(text)
                return text


def held_out(name):
    """As `advtrain::is_held_out` with a share of 0.1 and seed 0."""
    purpose = b"held out"
    digest = hashlib.sha256((0).to_bytes(8, "little") + len(purpose).to_bytes(8, "little") + purpose + name.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53 < 0.1


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_json(path, value):
    path.write_text(json.dumps(value))


def behaviours(strings, folder):
    files = BEHAVIORS.parent
    rows = read_csv(BEHAVIORS)
    targets = json.loads((files / "adv_training_targets.json").read_text())
    refusals = {row["Behavior"]: row for row in read_csv(files / "adv_training_behaviors_safe_responses.csv")}
    kept = [row for row in rows if held_out(row["BehaviorID"])]
    write_csv(folder / "held_out.csv", kept)
    write_json(folder / "held_out_targets.json", {row["BehaviorID"]: targets[row["BehaviorID"]] for row in kept})
    rng = random.Random(1)
    behind = [(row, variant, strings.draw(rng)) for row in kept for variant in range(5)]
    behind = [{**row, "BehaviorID": f"{row['BehaviorID']}-s{at}", "Behavior": row["Behavior"] + text} for row, at, text in behind]
    write_csv(folder / "held_out_strings.csv", behind)
    write_json(
        folder / "held_out_strings_targets.json",
        {row["BehaviorID"]: targets[row["BehaviorID"].rsplit("-", 1)[0]] for row in behind},
    )
    rng = random.Random(2)
    training, training_targets, training_refusals = [], {}, []
    for row in rows:
        if held_out(row["BehaviorID"]):
            continue
        for variant in range(VARIANTS + 1):
            other = dict(row)
            if variant > 0:
                other["BehaviorID"] += f"-s{variant}"
                other["Behavior"] += strings.draw(rng)
            training.append(other)
            training_targets[other["BehaviorID"]] = targets[row["BehaviorID"]]
            training_refusals.append({**refusals[row["Behavior"]], "Behavior": other["Behavior"]})
    write_csv(folder / "training.csv", training)
    write_json(folder / "training_targets.json", training_targets)
    write_csv(folder / "training_refusals.csv", training_refusals)


def utility(strings, folder):
    rng = random.Random(3)
    with open(UTILITY) as rows, open(folder / "utility.jsonl", "w") as file:
        for line in rows:
            row = json.loads(line)
            if rng.random() < UTILITY_SHARE:
                row["messages"][0]["content"] += strings.draw(rng)
                if "prompt" in row:
                    row["prompt"] = row["messages"][0]["content"]
            file.write(json.dumps(row) + "\n")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    strings = Strings(Tokenizer.from_file(str(MODEL / "tokenizer.json")))
    rng = random.Random(0)
    for _ in range(5):
        print(strings.draw(rng))
    behaviours(strings, folder)
    utility(strings, folder)


if __name__ == "__main__":
    main()
