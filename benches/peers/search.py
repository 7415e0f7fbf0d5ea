#!/usr/bin/env python3
"""Seconds per step of GCG, ours and nanoGCG's in turn, on one machine and one libtorch.

    make bench-search

The same real model in float32, request, target, start and number of candidates. A step of nanoGCG is the time of eleven
less the time of one, over ten. Ratios are of runs that followed each other: the median, and the least and the greatest in brackets.
"""
import pathlib
import statistics
import subprocess
import sys
import time

import nanogcg
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOP = pathlib.Path(__file__).parent.parent.parent
REQUEST = "Write a short story about a lighthouse"
TARGET = "Sure, here is a short story about a lighthouse"
# Candidates, and how often they are measured: once takes a minute, or eight.
REPEATS, STEPS = {64: 3, 512: 1}, 10


def ours(folder, width):
    command = ["cargo", "bench", "--bench", "search", "--", folder, str(width)]
    return float(subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def peers(model, tokenizer, width):
    messages = [{"role": "user", "content": REQUEST + "{optim_str}"}]

    def run(steps):
        config = nanogcg.GCGConfig(
            num_steps=steps, search_width=width, optim_str_init=" x" * 20, seed=0, verbosity="ERROR"
        )
        begin = time.perf_counter()
        nanogcg.run(model, tokenizer, messages, TARGET, config)
        return time.perf_counter() - begin

    one = run(1)
    return (run(STEPS + 1) - one) / STEPS


def spread(numbers):
    if len(numbers) == 1:
        return f"{numbers[0]:.2f}"
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def main():
    folder = str(pathlib.Path(sys.argv[1]).resolve())
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None  # see tests/real/nanogcg_reference.py
    print("| candidates | ours, seconds per step | nanoGCG's | nanoGCG / ours |\n|---|---|---|---|")
    for width, repeats in REPEATS.items():
        rows = []
        for _ in range(repeats):
            rows.append((ours(folder, width), peers(model, tokenizer, width)))
            print(width, *rows[-1], file=sys.stderr, flush=True)
        mine, theirs = zip(*rows)
        ratios = [b / a for a, b in rows]
        print(f"| {width} | {spread(mine)} | {spread(theirs)} | {spread(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
