#!/usr/bin/env python3
"""What transformers computes with a model folder, for the Rust tests to compare with.

    python3 reference.py logits MODEL_DIR [--adapter DIR] [--dtype DTYPE] --ids IDS.json --out OUT.safetensors
    python3 reference.py generate MODEL_DIR [--adapter DIR] --prompts PROMPTS.json --tokens N --out OUT.json
    python3 reference.py render MODEL_DIR --prompts PROMPTS.json --out OUT.json

Uses the transformers that is on the path, 4.57.6 or 5.17.0; requirements.txt and requirements-tf4.txt name the rest.
Models run in float32 on the CPU, with a PEFT adapter (unmerged, no dropout) where one is given. Nothing is downloaded.
With `--dtype bfloat16` the model runs in the dtype that its config.json names, which must be that one.

logits: IDS.json is a list of lists of token ids. Each is run alone, without padding; OUT holds `logits.<i>`,
    float32 [len, vocab].

render: PROMPTS.json as below. OUT is a list of {"text", "ids"}: the rendered chat template with the generation prompt, and
    its ids.

generate: PROMPTS.json is a list; an entry is the text of one user message, or a list of {"role", "content"}. OUT is
    {"transformers": version, "stop": end ids, "prompts": [{"messages", "text", "ids", "single", "batched"}]}:
    the rendered chat template with the generation prompt, its ids, and the ids generated greedily from the prompt
    alone and from one left-padded batch of all prompts. Generation ends after N ids or with the first end id, which is kept.

Silent when it works; otherwise one line on stderr and exit status 1.
"""
import argparse
import json
import os
import pathlib
import sys
import warnings

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
warnings.filterwarnings("ignore")

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class Failure(Exception):
    """What the user is told, without a traceback."""


def load_model(folder: pathlib.Path, adapter: pathlib.Path | None, dtype: torch.dtype = torch.float32):
    for needed in filter(None, (folder, adapter)):
        if not needed.is_dir():
            raise Failure(f"{needed} is not a folder")
    transformers.utils.logging.disable_progress_bar()
    # Missing and unexpected tensors are warnings to transformers.
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto" if dtype != torch.float32 else dtype, output_loading_info=True
    )
    wrong = [key for keys in report.values() for key in keys]
    if wrong or model.dtype != dtype:
        raise Failure(f"{folder} was read as {model.dtype}, missing, unexpected or of another shape are {wrong}")
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def read_list(path: pathlib.Path) -> list:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise Failure(f"{path} is not JSON: {error}") from error
    if not isinstance(content, list) or not content:
        raise Failure(f"{path} should hold a list that is not empty")
    return content


def logits(args: argparse.Namespace) -> None:
    rows = read_list(args.ids)
    model = load_model(args.model, args.adapter, getattr(torch, args.dtype))
    vocab = model.get_input_embeddings().weight.shape[0]
    found = {}
    for i, row in enumerate(rows):
        if not isinstance(row, list) or not row or not all(type(id) is int and 0 <= id < vocab for id in row):
            raise Failure(f"{args.ids}: entry {i} is not a list of ids from 0 to {vocab - 1}")
        found[f"logits.{i}"] = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float().contiguous()
    save_file(found, args.out)


def messages_of(prompt, at: str) -> list:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return prompt
    raise Failure(f"{at} is neither a text nor a list of messages")


def rendered(tokenizer, messages: list) -> dict:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself.
    return {"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


def render(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [messages_of(prompt, f"{args.prompts}: entry {i}") for i, prompt in enumerate(read_list(args.prompts))]
    found = [rendered(tokenizer, messages) for messages in prompts]
    args.out.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")


def left_padded(rows: list, pad: int) -> tuple:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def greedy(model, rows: list, tokens: int, stop: list) -> list:
    """The ids generated after each of the rows, which are run as one batch."""
    ids, mask = left_padded(rows, stop[0] if stop else 0)
    settings = dict(max_new_tokens=tokens, do_sample=False, num_beams=1, eos_token_id=stop or None)
    output = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=stop[0] if stop else 0, **settings)
    made = []
    for row in output[:, ids.shape[1] :].tolist():
        end = next((at + 1 for at, id in enumerate(row) if id in stop), len(row))
        made.append(row[:end])
    return made


def generate(args: argparse.Namespace) -> None:
    prompts = [messages_of(prompt, f"{args.prompts}: entry {i}") for i, prompt in enumerate(read_list(args.prompts))]
    if args.tokens < 1:
        raise Failure("--tokens must be at least 1")
    model = load_model(args.model, args.adapter)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    stop = model.generation_config.eos_token_id
    stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
    found = [{"messages": messages, **rendered(tokenizer, messages)} for messages in prompts]
    batched = greedy(model, [prompt["ids"] for prompt in found], args.tokens, stop)
    for prompt, row in zip(found, batched):
        prompt["single"] = greedy(model, [prompt["ids"]], args.tokens, stop)[0]
        prompt["batched"] = row
    result = {"transformers": transformers.__version__, "stop": stop, "prompts": found}
    args.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for action in (logits, generate, render):
        command = commands.add_parser(action.__name__)
        command.set_defaults(action=action)
        command.add_argument("model", type=pathlib.Path, metavar="MODEL_DIR")
        command.add_argument("--out", type=pathlib.Path, required=True)
        if action is not render:
            command.add_argument("--adapter", type=pathlib.Path, metavar="DIR")
        if action is logits:
            command.add_argument("--ids", type=pathlib.Path, required=True)
            command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
        else:
            command.add_argument("--prompts", type=pathlib.Path, required=True)
        if action is generate:
            command.add_argument("--tokens", type=int, required=True)
    args = parser.parse_args()
    try:
        with torch.inference_mode():
            args.action(args)
    except Exception as error:
        name = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
        sys.exit(f"reference.py: {name}{' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
