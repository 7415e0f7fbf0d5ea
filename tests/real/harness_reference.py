#!/usr/bin/env python3
"""Record what EleutherAI's lm-evaluation-harness computes for toy questions.

    python3 harness_reference.py SMOLLM2_FOLDER SMOLLM2_FOLDER ../fixtures/data ../fixtures/harness.json
    python3 harness_reference.py --make-gemma ../fixtures/harness_gemma
    python3 harness_reference.py ../fixtures/harness_gemma ../fixtures/tokenizer_sp ../fixtures/data \\
        ../fixtures/harness_gemma.json

The folders are those of a model and of its tokenizer. The first record, of SmolLM2-135M-Instruct, is for tests/real.rs; the
second, of a random Gemma of two layers whose questions the harness puts behind the begin-of-sequence token, for
tests/evaluation.rs. float32 on the CPU, with what requirements-harness.txt pins. The two tasks are written as arc_easy and
mmlu of the harness are, on the files of the folder in place of their data sets. Written are acc and acc_norm of each, the
log-likelihood of each answer, and the versions.
"""
import argparse
import csv
import json
import pathlib
import tempfile
from importlib.metadata import version

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GemmaConfig, GemmaForCausalLM

PACKAGES = ["lm_eval", "datasets", "transformers", "tokenizers", "torch", "numpy"]

MMLU = """
task: toy_mmlu
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}, dev: {dev}}}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about common birds.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

ARC = """
task: toy_arc
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
"""


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arc(folder):
    for line in (folder / "arc.jsonl").read_text().splitlines():
        item = json.loads(line)
        choices = item["question"]["choices"]
        columns = {name: [choice[name] for choice in choices] for name in ("text", "label")}
        yield {"id": item["id"], "question": item["question"]["stem"], "choices": columns, "answerKey": item["answerKey"]}


def mmlu(path):
    with path.open(newline="") as file:
        for question, *choices, letter in csv.reader(file):
            yield {"question": question, "choices": choices, "answer": "ABCD".index(letter)}


def make_gemma(out):
    """A random model whose vocabulary is that of fixtures/tokenizer_sp."""
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=560, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        initializer_range=0.4,
    )
    GemmaForCausalLM(config).save_pretrained(out)
    (out / "generation_config.json").unlink()


def record(model, tokenizer, data, out):
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        files = {
            "arc": write_lines(work / "arc.jsonl", arc(data)),
            "test": write_lines(work / "test.jsonl", mmlu(data / "mmlu/test/common_birds_test.csv")),
            "dev": write_lines(work / "dev.jsonl", mmlu(data / "mmlu/dev/common_birds_dev.csv")),
        }
        (work / "toy_arc.yaml").write_text(ARC.format(test=files["arc"]))
        (work / "toy_mmlu.yaml").write_text(MMLU.format(test=files["test"], dev=files["dev"]))
        manager = TaskManager(include_path=str(work), include_defaults=False)
        model = HFLM(pretrained=str(model), tokenizer=str(tokenizer), dtype="float32", device="cpu", batch_size=1)
        found = {"versions": {name: version(name) for name in PACKAGES}}
        for task, shots in (("toy_arc", 0), ("toy_mmlu", 5)):
            found[task] = scored(model, task, shots, manager)
    out.write_text(json.dumps(found, indent=1) + "\n")


def scored(model, task, shots, manager):
    found = simple_evaluate(model, tasks=[task], num_fewshot=shots, task_manager=manager, bootstrap_iters=0)
    scores = {name.split(",")[0]: value for name, value in found["results"][task].items() if name.startswith("acc")}
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    likelihoods = [[answer[0][0] for answer in sample["resps"]] for sample in samples]
    return {**{name: scores[name] for name in ("acc", "acc_norm") if name in scores}, "log_likelihoods": likelihoods}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("paths", nargs="*", type=pathlib.Path, metavar="MODEL TOKENIZER DATA OUT")
    arguments.add_argument("--make-gemma", type=pathlib.Path, metavar="OUT")
    arguments = arguments.parse_args()
    if arguments.make_gemma:
        return make_gemma(arguments.make_gemma)
    if len(arguments.paths) != 4:
        raise SystemExit("four paths are needed: model, tokenizer, data, out")
    record(*arguments.paths)


if __name__ == "__main__":
    main()
