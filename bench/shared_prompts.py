"""A GRPO update whose completions share one copy of their prompt, against the same with a copy for each.

    python bench/shared_prompts.py                         5 rounds of each, about 3 minutes on two cores
    python bench/shared_prompts.py --rounds 1 --prompts 1 --out /tmp/x.json      a rehearsal

The model of bench/trainer_vs_trl.py (hidden 256, 4 layers, vocabulary 32768, random weights), fp32, no checkpointing;
4 prompts of 400 tokens with 8 completions of 60 tokens each, all in one micro-batch. Two times:

    body     forward and backward of the layers alone, from the hidden states that the head reads
    update   the clipped loss through the fused head (with its entropy), backward, clipping, AdamW

Both layouts stand in one process, in alternating rounds; a speedup is a ratio of two medians. Memory: the peak of an
update over the loaded model with its gradients and optimizer state, in a process of its own for each. The layouts'
loss, log-probs and gradients are compared on the way.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
from typing import Any

import common
import trainer_vs_trl

ASKED = {"body": 3.0, "update": 2.0}  # times faster than unshared
LAYOUTS = ("shared", "unshared")


class Update:
    """One optimizer step of a GRPO batch, in either layout."""

    def __init__(self, args: argparse.Namespace):
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from fastrl import losses
        from fastrl.models import pack_model
        from fastrl.train.step import Forward, plan

        torch.manual_seed(0)
        sizes = trainer_vs_trl.MODEL | trainer_vs_trl.HEADS
        self.model = pack_model(Qwen3ForCausalLM(Qwen3Config(**sizes))).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, foreach=True)
        self.objective, self.how = losses.get("grpo"), Forward(1.0, ("entropy",))
        samples = batch_of(args, sizes["vocab_size"])
        everything = sum(len(s) for s in samples)
        self.micros = {
            name: plan(samples, everything, torch.device("cpu"), share_prompts=name == "shared") for name in LAYOUTS
        }
        assert all(len(micros) == 1 for micros in self.micros.values())
        self.upstream = torch.randn(self.micros["shared"][0].rows.shape[0], sizes["hidden_size"])

    def tokens(self, name: str) -> int:
        return self.micros[name][0].input_ids.shape[0]

    def body(self, name: str) -> None:
        [micro] = self.micros[name]
        self.model.zero_grad()
        self.model.hidden(micro.input_ids, micro.cu_seqlens, micro.rows).backward(self.upstream)

    def update(self, name: str) -> Any:
        import torch

        out = self.gradients(name)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return out

    def gradients(self, name: str) -> Any:
        from fastrl.train.step import loss_of

        self.model.zero_grad()
        out = loss_of(self.model, self.objective, self.micros[name][0], self.how)
        out.loss.backward()
        return out


def batch_of(args: argparse.Namespace, words: int) -> list:
    from fastrl.data.types import Sample

    draw, made = random.Random(0), []
    for group in range(args.prompts):
        prompt = [draw.randrange(3, words) for _ in range(args.prompt_tokens)]
        for k in range(args.completions):
            answer = [draw.randrange(3, words) for _ in range(args.completion_tokens)]
            old = [-10.4 + 0.05 * draw.gauss(0, 1) for _ in answer]  # about log(1/V), as an untrained model has it
            advantage = (-1.0) ** k * draw.random()
            made.append(Sample.from_parts(prompt, answer, group_id=group, advantage=advantage, old_logprobs=old))
    return made


def agreement(update: Update) -> dict[str, float]:
    """Largest differences between the layouts: loss, log-probs (absolute), gradients (norm over norm)."""
    found = {}
    for name in LAYOUTS:
        out = update.gradients(name)
        grads = {n: p.grad.clone() for n, p in update.model.named_parameters()}
        found[name] = float(out.loss.detach()), out.stats.logprobs, grads
    (loss, logprobs, grads), (other, others, theirs) = (found[name] for name in LAYOUTS)
    return {
        "loss": abs(loss - other),
        "logprobs": float((logprobs - others).abs().max()),
        "gradients": max(float((g - theirs[n]).norm() / theirs[n].norm()) for n, g in grads.items()),
    }


def peak(args: argparse.Namespace) -> dict[str, Any]:
    """Of one update in a process that has made one before, so that gradients and states are there."""
    import torch

    torch.set_num_threads(args.threads)
    update = Update(args)
    update.update("shared")
    mib, _ = common.extra_peak_mib(lambda: update.update(args.worker))
    return {"peak_mib": mib}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(args.threads)
    update = Update(args)
    record: dict[str, Any] = {"tokens": {name: update.tokens(name) for name in LAYOUTS}}
    record["largest_differences"] = {n: float(f"{x:.2e}") for n, x in agreement(update).items()}
    for what, asked in ASKED.items():
        calls = {name: functools.partial(getattr(update, what), name) for name in LAYOUTS}
        rows = {n: common.summary(s) for n, s in common.alternate(calls, args.rounds, limit=args.quiet or None).items()}
        speedup = rows["unshared"]["median_s"] / rows["shared"]["median_s"]
        record[what] = {**rows, "speedup": round(speedup, 2), "asked": asked, "holds": speedup >= asked}
    return record


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("prompts", 4), ("completions", 8), ("prompt_tokens", 400), ("completion_tokens", 60)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", type=float, default=0.2, help="time again if others used this many cores; 0: never")
    parser.add_argument("--out", help="another file than bench/results/shared_prompts.json")
    parser.add_argument("--worker", choices=LAYOUTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.worker:
        print("\n" + json.dumps(peak(args)))
        return
    record: dict[str, Any] = {"bench": "shared_prompts", "command": common.command()}
    record |= {"model": {**trainer_vs_trl.MODEL, **trainer_vs_trl.HEADS}, "dtype": "float32"}
    sizes = ("prompts", "completions", "prompt_tokens", "completion_tokens")
    record |= {name: getattr(args, name) for name in sizes}
    record |= {"environment": common.environment(args.threads), **measure(args), "peak_mib": {}}
    flags = [f"--{name}={getattr(args, name)}" for name in (*sizes, "threads")]
    for name in LAYOUTS:
        made = common.in_subprocess(__file__, [*flags, "--worker", name], args.threads)
        record["peak_mib"][name] = None if made["peak_mib"] is None else round(made["peak_mib"], 1)
    path = common.write_json("shared_prompts", record, args.out)
    for what in ASKED:
        row = record[what]
        verdict = "holds" if row["holds"] else "does not hold"
        print(f"{what}: {row['speedup']}x faster, asked {row['asked']}x: {verdict}")
    print(f"tokens {record['tokens']}, peak MiB {record['peak_mib']}, differences {record['largest_differences']}")
    print(path)


if __name__ == "__main__":
    main()
