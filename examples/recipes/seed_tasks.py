#!/usr/bin/env python3
"""Prints Self-Instruct's seed tasks as chats of UltraChat's form, one of each: the instruction with the first instance's
input, and its output.

    python3 examples/recipes/seed_tasks.py seed_tasks.jsonl > self_instruct_seed.jsonl
"""
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    for task in map(json.loads, file):
        instance = task["instances"][0]
        prompt = "\n\n".join(part for part in (task["instruction"].strip(), instance["input"].strip()) if part)
        turns = [("user", prompt), ("assistant", instance["output"].strip())]
        messages = [{"role": role, "content": content} for role, content in turns]
        print(json.dumps({"prompt_id": task["id"], "prompt": prompt, "messages": messages}))
