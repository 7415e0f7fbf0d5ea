#!/usr/bin/env python3
"""Record what EleutherAI's lm-evaluation-harness computes on SmolLM2-135M-Instruct for toy questions, for tests/real.rs.

    python3 harness_reference.py SMOLLM2_FOLDER ../fixtures/data ../fixtures/harness.json

Pinned: lm_eval 0.4.9.1, datasets 3.6.0, transformers 4.57.6, torch 2.11.0; float32 on the CPU. The two tasks are written as arc_easy and mmlu
of the harness are, on the files of the folder in place of their data sets. Written are acc and acc_norm of each,
and the log-likelihood of each answer.
"""
import csv
import json
import pathlib
import sys
import tempfile

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

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


def main():
    model, data, out = map(pathlib.Path, sys.argv[1:])
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
        model = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1)
        record = {}
        for task, shots in (("toy_arc", 0), ("toy_mmlu", 5)):
            found = simple_evaluate(model, tasks=[task], num_fewshot=shots, task_manager=manager, bootstrap_iters=0)
            scores = {name.split(",")[0]: value for name, value in found["results"][task].items() if name.startswith("acc")}
            samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
            likelihoods = [[answer[0][0] for answer in sample["resps"]] for sample in samples]
            record[task] = {**{name: scores[name] for name in ("acc", "acc_norm") if name in scores}, "log_likelihoods": likelihoods}
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
