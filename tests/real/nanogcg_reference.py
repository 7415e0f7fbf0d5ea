#!/usr/bin/env python3
"""Record what nanoGCG 0.3.0 computes on SmolLM2-135M-Instruct, for tests/real.rs.

    PYTHONPATH=nanogcg python3 nanogcg_reference.py SMOLLM2_FOLDER ../fixtures/nanogcg.json

Versions: requirements-nanogcg.txt, with torch 2.11.0; float32 on the CPU. Written are the request, start string and target,
the ids of each part; the gradient towards the one-hot rows of the start string (its norm and some of its numbers); the losses
of some candidates; and, for some seeds, the lowest loss after each step and the seconds of a step.
"""
import json
import sys
import time

import nanogcg
import torch
from nanogcg.gcg import GCG
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUEST = "Write a short story about a lighthouse"
START = " x" * 20
TARGET = "Sure, here is a short story about a lighthouse"
WIDTH, STEPS, SEEDS = 64, 20, 5


def config(steps, seed):
    return nanogcg.GCGConfig(
        num_steps=steps, search_width=WIDTH, topk=256, optim_str_init=START, seed=seed, verbosity="ERROR"
    )


def gradient_record(search, ids):
    gradient = search.compute_token_gradient(ids)[0]
    positions = torch.arange(0, gradient.shape[0], 3)
    tokens = torch.arange(5, gradient.shape[1], 997)
    numbers = [[int(p), int(t), gradient[p, t].item()] for p in positions for t in tokens]
    return {"norm": gradient.norm().item(), "numbers": numbers}


def candidates_record(search, ids):
    candidates = ids.repeat(12, 1)
    for row in range(12):
        candidates[row, (7 * row) % candidates.shape[1]] = 1000 + 311 * row
    embeddings = [search.embedding_layer(candidates), search.after_embeds.repeat(12, 1, 1), search.target_embeds.repeat(12, 1, 1)]
    losses = search._compute_candidates_loss_original(12, torch.cat(embeddings, 1))
    return {"ids": candidates.tolist(), "losses": losses.tolist()}


def main():
    folder, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # nanoGCG takes this token's text out of the whole rendered conversation, for tokenizers that put it in front themselves.
    # This one does not, and the text is what each turn begins with.
    tokenizer.bos_token = None
    messages = [{"role": "user", "content": REQUEST + "{optim_str}"}]

    search = GCG(model, tokenizer, config(1, 0))
    search.run(messages, TARGET)  # sets what the functions below read
    ids = tokenizer(START, add_special_tokens=False, return_tensors="pt")["input_ids"]
    record = {
        "request": REQUEST, "start": START, "target": TARGET, "width": WIDTH, "steps": STEPS,
        "string_ids": ids[0].tolist(), "target_ids": search.target_ids[0].tolist(),
        "gradient": gradient_record(search, ids), "candidates": candidates_record(search, ids), "runs": [],
    }
    for seed in range(SEEDS):
        begin = time.perf_counter()
        result = nanogcg.run(model, tokenizer, messages, TARGET, config(STEPS, seed))
        seconds = (time.perf_counter() - begin) / STEPS
        record["runs"].append({"seed": seed, "losses": result.losses, "best": result.best_loss, "seconds_per_step": seconds})
        print(seed, result.best_loss, seconds, file=sys.stderr, flush=True)
    with open(out, "w") as file:
        json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
