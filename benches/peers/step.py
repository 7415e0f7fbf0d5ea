#!/usr/bin/env python3
"""The work of this crate's benchmarks, done in transformers and PEFT: one row of the comparison per call.

    python3 step.py --shape smollm2-135m --row attack --style merged --lengths ragged

--row     attack    one iteration of ten: forward and backward, for the perturbation alone
          advipo    a whole update of C-AdvIPO: the attack, both losses, clipping, AdamW
          advul     a whole update of C-AdvUL: the same, and the utility rows
--style   published as the authors' implementation computes: embeddings and targets as one-hot products with the
                    vocabulary, logits of every position, the adapter's dropout on, a pass for each continuation
          tuned     embeddings looked up, logits of target positions alone, no dropout in the attack; the head is given a
                    copy in one piece of their hidden states, since libtorch would copy the whole table for each row of a
                    slice, which in bfloat16 on a CPU takes several times as long as all else
          merged    tuned, and the adapter merged into the weights while the attack runs

Prints one JSON object: seconds (a list, one number per timed repetition; of an attack, per iteration) and memory_mb, the
peak while it ran less what was resident once model and optimiser were built.

Pinned versions: ../../tests/real/requirements.txt
"""
import argparse
import contextlib
import json
import pathlib
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES = json.loads((pathlib.Path(__file__).parent.parent / "shapes.json").read_text())
ROWS, UTILITY_ROWS = 8, 56
PROMPT, TARGET, SAFE = 64, 24, 8
STEPS = 10
MARGIN = 1 / (2 * 0.25)


@dataclass
class Rows:
    """Prompts padded on the left, with continuations of one length behind them."""

    ids: torch.Tensor  # [rows, PROMPT + continuation]
    attended: torch.Tensor  # the same shape, 1 where there is a token
    continuation: int

    @property
    def targets(self):
        return self.ids[:, -self.continuation :]

    def cut(self, size):
        parts = zip(self.ids.split(size), self.attended.split(size))
        return [Rows(ids, attended, self.continuation) for ids, attended in parts]


def prompts(count, ragged):
    """Ids and attention of prompts; ragged ones go from a quarter of the length to all of it."""
    ids = torch.randint(5, 40_000, (count, PROMPT))
    shortest = PROMPT // 4 if ragged else PROMPT
    lengths = [shortest + (PROMPT - shortest) * row // max(count - 1, 1) for row in range(count)]
    attended = torch.stack([(torch.arange(PROMPT) >= PROMPT - length).long() for length in lengths])
    return ids, attended


def behind(prompt, continuation, device):
    ids, attended = prompt
    added = torch.randint(5, 40_000, (len(ids), continuation))
    ids = torch.cat([ids, added], 1)
    attended = torch.cat([attended, torch.ones_like(added)], 1)
    return Rows(ids.to(device), attended.to(device), continuation)


class Peer:
    def __init__(self, shape, style, dtype, device):
        torch.manual_seed(0)
        config = dict(SHAPES[shape])
        config = AutoConfig.for_model(config.pop("model_type"), **config)
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        base.config.use_cache = False
        adapter = LoraConfig(r=64, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, adapter).train()
        self.factors = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.factors, lr=2e-4, weight_decay=0.001)
        self.published, self.merged = style == "published", style == "merged"
        self.table = self.model.get_input_embeddings()
        if not self.published:
            self.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
        self.radius = 0.1 * self.table.weight.norm(dim=-1).mean().item()

    def one_hot(self, ids):
        return F.one_hot(ids, self.table.num_embeddings).to(self.table.weight.dtype)

    def embed(self, ids):
        """Un-scaled embeddings, out of reach of gradients."""
        weight = self.table.weight.detach()
        return self.one_hot(ids) @ weight if self.published else F.embedding(ids, weight)

    def log_probs(self, embeddings, rows):
        """Of each target [rows, continuation]."""
        # Gemma's factor is inside the embedding layer, which is bypassed here.
        embeddings = embeddings * getattr(self.table, "scalar_embed_scale", 1.0)
        keep = 0 if self.published else rows.continuation + 1
        logits = self.model(inputs_embeds=embeddings, attention_mask=rows.attended, logits_to_keep=keep).logits
        logits = logits[:, -rows.continuation - 1 : -1].float()
        if self.published:
            return -F.cross_entropy(logits.transpose(1, 2), self.one_hot(rows.targets).float().transpose(1, 2), reduction="none")
        return -F.cross_entropy(logits.transpose(1, 2), rows.targets, reduction="none")

    @contextlib.contextmanager
    def attacked(self):
        """The model while an attack runs on it."""
        for factor in self.factors:
            factor.requires_grad_(False)
        if not self.published:
            self.model.eval()
        if self.merged:
            self.model.merge_adapter()
        yield
        if self.merged:
            self.model.unmerge_adapter()
        self.model.train()
        for factor in self.factors:
            factor.requires_grad_(True)

    def attack(self, rows, steps=STEPS):
        """The perturbation [rows, PROMPT, hidden] after steps along signs, projected into each token's ball."""
        embeddings = self.embed(rows.ids)
        movable = rows.attended[:, :PROMPT, None].to(embeddings.dtype)
        found = torch.zeros_like(embeddings[:, :PROMPT])
        with self.attacked():
            for step in range(steps):
                found.requires_grad_(True)
                loss = -self.log_probs(add(embeddings, found * movable), rows).mean(1).sum()
                (gradient,) = torch.autograd.grad(loss, found)
                with torch.no_grad():
                    size = (1 - step / steps) * self.radius / embeddings.shape[-1] ** 0.5
                    found = found - size * gradient.sign()
                    found = found * (self.radius / found.norm(dim=-1, keepdim=True)).clamp(max=1)
        return found * movable

    def update(self, harmful, safe, utility, steps=STEPS):
        found = self.attack(harmful, steps)
        of = lambda rows: self.log_probs(add(self.embed(rows.ids), found), rows).mean(1)
        if utility is None:
            loss = (of(safe) - of(harmful) - MARGIN).square().mean()
        else:
            loss = 0.5 * of(harmful).mean() - 0.5 * of(safe).mean()
        loss.backward()
        for part in utility.cut(ROWS) if utility else []:
            (-self.log_probs(self.embed(part.ids), part).mean(1).sum() / UTILITY_ROWS).backward()
        torch.nn.utils.clip_grad_norm_(self.factors, 0.3)
        self.optimizer.step()
        self.optimizer.zero_grad()


def add(embeddings, found):
    """The perturbation on the prompt's places."""
    return torch.cat([embeddings[:, :PROMPT] + found, embeddings[:, PROMPT:]], 1)


class Memory:
    """Resident memory of this process, or what is held of a GPU, on which nothing else may run; in MiB."""

    def __init__(self, device):
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.empty_cache()
        else:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        self.before = self.held("VmRSS")

    def held(self, field):
        if self.cuda:
            free, total = torch.cuda.mem_get_info()
            return (total - free) / 2**20
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    def peak(self):
        """PyTorch keeps what it once had of a GPU, so that it is the peak at the end."""
        return round(self.held("VmHWM") - self.before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--row", choices=["attack", "advipo", "advul"], required=True)
    parser.add_argument("--style", choices=["published", "tuned", "merged"], required=True)
    parser.add_argument("--lengths", choices=["equal", "ragged"], default="equal")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()

    peer = Peer(arguments.shape, arguments.style, getattr(torch, arguments.dtype), arguments.device)
    ragged = arguments.lengths == "ragged"
    prompt = prompts(ROWS, ragged)
    harmful, safe = (behind(prompt, length, arguments.device) for length in (TARGET, SAFE))
    utility = behind(prompts(UTILITY_ROWS, ragged), TARGET, arguments.device) if arguments.row == "advul" else None

    def once(steps=STEPS):
        begin = time.perf_counter()
        if arguments.row == "attack":
            peer.attack(harmful, steps)
        else:
            peer.update(harmful, safe, utility, steps)
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / (steps if arguments.row == "attack" else 1)

    memory = Memory(arguments.device)
    # What is allocated, compiled and cached at first is then there.
    once(steps=1)
    seconds = [once() for _ in range(arguments.repeats)]
    print(json.dumps({**vars(arguments), "seconds": seconds, "memory_mb": memory.peak()}))


if __name__ == "__main__":
    main()
