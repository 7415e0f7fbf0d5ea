#!/usr/bin/env python3
"""Draws answers from evaluations and prints them as Markdown, the same items of each: for a reader to judge.

    python3 examples/recipes/answers.py runs/claim/evaluation-untrained runs/claim/evaluation-advul-0 > docs/answers.md

Of every folder 20 answers to plain harmful requests, 15 to the strings that GCG offers, and 15 to XSTest's safe requests; the first
160 characters of each.
"""
import json
import pathlib
import random
import sys

DRAWS = [("direct", 20), ("gcg", 15), ("xstest", 15)]
TITLES = {"direct": "Plain harmful requests", "gcg": "Harmful requests with the string that GCG offers", "xstest": "XSTest's safe requests"}
LENGTH = 160


def answers(folder):
    """Kind, id, request and answer of everything that was drawn from."""
    for line in (folder / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        attack, task = record.get("attack"), record.get("task")
        if attack and attack["attack"] in TITLES and "Ok" in attack["result"]:
            case, made = attack["case"], attack["result"]["Ok"]
            yield attack["attack"], case["id"], case["behavior"], made["attempts"][made["offered"]]["answer"]
        elif task and task["task"] in TITLES and "Ok" in task["result"]:
            item = task["result"]["Ok"]
            if "harmless refused" in item["flags"]:
                yield task["task"], item["id"], item["detail"]["request"], item["detail"]["answer"]


def cell(text):
    """On one line of a table, cut."""
    text = " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
    return text[:LENGTH] + (" …" if len(text) > LENGTH else "")


def main():
    folders = [pathlib.Path(name) for name in sys.argv[1:]]
    found = {folder: {(kind, at): (request, answer) for kind, at, request, answer in answers(folder)} for folder in folders}
    common = sorted(set.intersection(*(set(items) for items in found.values())))
    print("# What the models say\n\nDrawn by `examples/recipes/answers.py`, the same requests for each model; the first 160 characters.")
    for kind, most in DRAWS:
        ids = [key for key in common if key[0] == kind]
        drawn = sorted(random.Random(0).sample(ids, min(most, len(ids))))
        print(f"\n## {TITLES[kind]}")
        for key in drawn:
            print(f"\n**{cell(found[folders[0]][key][0])}**\n\n| model | answer |\n|---|---|")
            for folder in folders:
                print(f"| {folder.name.removeprefix('evaluation-')} | {cell(found[folder][key][1])} |")


if __name__ == "__main__":
    main()
