"""The longest context that one GPU trains under a memory cap, switch by switch: updates of an 8B and a 1.7B shape.

    python bench/long_context.py                   Qwen3-8B's shape under 80 GiB, both under 24 GiB; under 9 minutes
    python bench/long_context.py --only "full"     rungs whose names begin so
    python bench/long_context.py --rehearse --out /tmp/x.json    a tiny shape on the CPU, caps in MiB; no results

Weights are random. An update is forward, backward and optimizer step of one sequence: of grpo the clipped policy loss
with given advantages and old log-probs (the reference, if any, has scored before and is gone), of sft the likelihood.
The first of two updates makes the optimizer's states, the second has them. The cap is
torch.cuda.set_per_process_memory_fraction; on the CPU the limit of the address space. Each rung has a process of its
own: it starts from what `fastrl plan` says and halves the interval between what fits and what does not, to 3% or until
its share of --budget-s is spent. What did not run is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

SHAPES = {
    "8B": dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=False,
    ),
    "1.7B": dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    ),
    "tiny": dict(
        hidden_size=128, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=512, tie_word_embeddings=True,
    ),
}  # fmt: skip
POSITIONS = 1 << 22
LEAN = dict(
    dtype="bfloat16", bf16_update="stochastic", optim="adamw_torch_8bit", optimizer_in_backward=True, max_grad_norm=0.0
)
TILED = dict(gradient_checkpointing=True, tiled_mlp="auto")
OFFLOADED = {**TILED, "activation_offloading": True}
LORA = dict(dtype="bfloat16", use_peft=True)


@dataclass(frozen=True)
class Rung:
    """A shape under a cap (GiB; MiB in a rehearsal) with some switches. asked: tokens that it should reach."""

    name: str
    shape: str
    stage: str
    cap: float
    flags: dict[str, Any] = field(default_factory=dict)
    asked: int | None = None


RUNGS = (
    Rung("full, all switches", "8B", "grpo", 80, {**LEAN, **OFFLOADED}, asked=65536),
    Rung("full, all switches", "1.7B", "grpo", 24, {**LEAN, **OFFLOADED}, asked=32768),
    Rung("LoRA, all switches", "8B", "grpo", 80, {**LORA, **OFFLOADED}, asked=131072),
    Rung("LoRA, all switches", "1.7B", "grpo", 24, {**LORA, **OFFLOADED}, asked=65536),
    Rung("full, no offloading", "8B", "grpo", 80, {**LEAN, **TILED}),
    Rung("full, no tiled MLP", "8B", "grpo", 80, {**LEAN, "gradient_checkpointing": True}),
    Rung("full, selective checkpointing", "8B", "grpo", 80, {**LEAN, "gradient_checkpointing_policy": "selective"}),
    Rung("full, no checkpointing", "8B", "grpo", 80, {**LEAN, "gradient_checkpointing": False}),
    Rung("full, float32 masters, 8-bit states", "1.7B", "grpo", 24, {**OFFLOADED, "optim": "adamw_torch_8bit"}),
    Rung("sft, full, all switches", "8B", "sft", 80, {**LEAN, **OFFLOADED}),
)
REHEARSED = (
    Rung("full, checkpointed", "tiny", "grpo", 200, {"gradient_checkpointing": True}),
    Rung("full, no checkpointing", "tiny", "grpo", 200, {"gradient_checkpointing": False}),
    Rung("LoRA, tiled", "tiny", "sft", 200, {"use_peft": True, "gradient_checkpointing": True, "tiled_mlp": 4}),
)
CLOSE = 1.03  # what fits and what does not, apart at most


# -- one rung, in a process of its own ---------------------------------------------------------------------------------
def probe_rung(rung: Rung, device: str, deadline: float) -> dict[str, Any]:
    import torch

    from fastrl.train.plan import Device, MemoryModel

    with tempfile.TemporaryDirectory() as work:
        config = config_of(rung, Path(work), device)
        size = rung.cap * (common.MIB if device == "cpu" else 1 << 30)
        plan = MemoryModel(config, Device("", device, int(size)))
        if device == "cpu":  # there the cap is beyond what is mapped when the states are there
            room = size + plan.device.base + sum(plan.weights.values()) + plan.optimizer
            plan = MemoryModel(config, Device("", device, int(room / 0.95)))
        plan.shape = dataclasses.replace(plan.shape, new_tokens=0, family=())  # nothing is sampled, nothing shared
        planned = max(256, plan.most_tokens(as_one=True))
        update = Update(config, plan, torch.device(device))
        update.run(256)  # states of the optimizer, libraries, kernels
        limit_memory(size, device)
        found = bisect(update, planned, deadline)
    return {**found, "planned_tokens": planned}


def config_of(rung: Rung, work: Path, device: str):
    """The stage's config over a directory that holds a config.json and no weights."""
    from transformers import Qwen3Config

    from fastrl.train.config import CONFIGS

    Qwen3Config(**SHAPES[rung.shape], max_position_embeddings=POSITIONS, rope_theta=1e6).save_pretrained(work)
    flags = dict(model_name_or_path=str(work), dataset_name="none", output_dir="none", use_cpu=device == "cpu")
    flags |= dict(per_device_train_batch_size=1, learning_rate=1e-6)
    if rung.stage == "grpo":
        # Groups are of two at least; an update of one of the two is what is measured.
        flags |= dict(reward_funcs=["think_format"], num_generations=2, per_device_train_batch_size=2)
        flags |= dict(max_completion_length=POSITIONS // 2, max_prompt_length=POSITIONS // 2, share_prompts=False)
    else:
        flags |= dict(max_length=None)
    return CONFIGS[rung.stage](**flags, **rung.flags)


class Update:
    """Model, optimizer and objective of a rung; `run(T)` makes one update of a sequence of T tokens."""

    def __init__(self, config, plan, device):
        import torch

        from fastrl.models import activations
        from fastrl.train import optim, workbench
        from fastrl.train.adapted import adapt
        from fastrl.train.plan import skeleton

        torch.manual_seed(0)
        part, architecture = plan.parts[0], plan.architectures["policy"]
        with skeleton.quiet(), device:
            model = skeleton.build(part, architecture, config)
        model.train()
        adapt(model, config, with_reference=False)
        activations.apply(model, workbench.switches_of(config), device)
        workbench.disable_dropout(model)
        self.config, self.model, self.device = config, model, device
        self.guard = optim.StepGuard.from_config(optim.build_optimizer(model, config), model, config)
        self.objective, self.how = law_of(config, plan.autocast)

    def run(self, tokens: int) -> None:
        from fastrl.train.step import loss_of

        for micro, _ in self.guard.rounds([self.micro_batch(tokens)], lr=1e-6):
            loss_of(self.model, self.objective, micro, self.how).loss.backward()
        self.guard.step(1e-6)

    def micro_batch(self, tokens: int):
        """One sequence, an eighth of it prompt, with what the objective reads."""
        from fastrl.data.types import Sample
        from fastrl.train.step import global_counts, micro_batch

        prompt = max(1, tokens // 8)
        ids = [(31 * t) % 509 for t in range(tokens)]
        fields = {"group_id": 0, "advantage": 0.5, "old_logprobs": [-6.0] * (tokens - prompt)}
        sample = Sample.from_parts(ids[:prompt], ids[prompt:], **(fields if self.config.stage == "grpo" else {}))
        return micro_batch([sample], global_counts([sample]), self.device)

    def forget(self) -> None:
        """After memory ran out: no gradients, no graph, no cached blocks."""
        import gc

        import torch

        for p in self.model.parameters():
            p.grad = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def law_of(config, autocast):
    from fastrl.train.stages import grpo_objective, sft
    from fastrl.train.step import Forward

    if config.stage == "grpo":
        return grpo_objective.objective_of(config), Forward(config.temperature, ("entropy",), autocast)
    return sft.objective_of(config, None), Forward(1.0, (), autocast)


def limit_memory(size: float, device: str) -> None:
    """From here on an allocation beyond `size` bytes fails; on the CPU beyond what is mapped now."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
        return
    import resource

    common.settle()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + int(size), resource.RLIM_INFINITY))


def bisect(update: Update, guess: int, deadline: float) -> dict[str, Any]:
    """The longest sequence whose update fits: from the guess up or down by quarters, then halving what is between."""
    tries: list[dict[str, Any]] = []
    good, bad, at = 0, None, round_down(guess)
    while time.monotonic() < deadline and (bad is None or bad > max(good, 1) * CLOSE) and at > good:
        fitted, seconds = attempt(update, at)
        tries.append({"tokens": at, "fits": fitted, "seconds": round(seconds, 2)})
        print(f"  {at:,} tokens: {'fits' if fitted else 'does not fit'}, {seconds:.1f} s", file=sys.stderr, flush=True)
        good, bad = (at, bad) if fitted else (good, at)
        at = round_down(at * 5 // 4 if bad is None else (good + bad) // 2 if good else at * 3 // 4)
    speed = next((t for t in reversed(tries) if t["fits"]), None)
    made = {"tokens": good, "least_too_many": bad, "tries": tries}
    return made | ({"tokens_per_s": round(speed["tokens"] / max(speed["seconds"], 0.01), 1)} if speed else {})


def round_down(tokens: int) -> int:
    step = 512 if tokens > 8192 else 16
    return max(16, tokens // step * step)


def attempt(update: Update, tokens: int) -> tuple[bool, float]:
    """(does an update of so many tokens fit, seconds it took)."""
    from fastrl.train.budget import attempt as try_it

    began = time.perf_counter()
    _, said = try_it(lambda: update.run(tokens))
    if update.device.type == "cuda" and not said:
        import torch

        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    update.forget()
    return not said, seconds


# -- all of them -------------------------------------------------------------------------------------------------------
def climb(rungs: list[Rung], args: argparse.Namespace) -> list[dict[str, Any]]:
    began, rows = time.monotonic(), []
    for i, rung in enumerate(rungs):
        row = {"name": rung.name, "shape": rung.shape, "stage": rung.stage, "cap": rung.cap, "flags": rung.flags}
        row["asked"] = rung.asked
        left = args.budget_s - (time.monotonic() - began)
        share = left / (len(rungs) - i) * (1.6 if i < len(rungs) - 1 else 1.0)  # most rungs leave some over
        if left < 20:
            rows.append({**row, "not_run": "the time for this run was spent"})
            continue
        print(f"{rung.shape}, {rung.name}, {rung.cap:g}:", file=sys.stderr, flush=True)
        rows.append(row | in_process(rung, min(share, left), args))
        held = rung.asked is not None and rows[-1].get("tokens", 0) >= rung.asked
        rows[-1]["held"] = held if rung.asked is not None else None
    return rows


def in_process(rung: Rung, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """The rung's own record, or why there is none."""
    words = [sys.executable, __file__, "--worker", json.dumps(vars(rung)), "--budget-s", str(seconds)]
    words += ["--device", args.device, "--threads", str(args.threads)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds + 60, check=False)
    except subprocess.TimeoutExpired:
        return {"not_run": f"took longer than {seconds + 60:.0f} s"}
    sys.stderr.write(done.stderr if done.returncode == 0 else "")
    if done.returncode:
        return {"not_run": (done.stderr.strip().splitlines() or ["died"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rungs whose names begin so")
    parser.add_argument("--budget-s", type=float, default=500.0)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, caps in MiB")
    parser.add_argument("--out", help="another file than bench/results/long_context_<device>.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cpu" if args.rehearse else args.device
    return args


def main() -> None:
    args = parse()
    import torch

    torch.set_num_threads(args.threads)
    if args.worker:
        deadline = time.monotonic() + args.budget_s
        print("\n" + json.dumps(probe_rung(Rung(**json.loads(args.worker)), args.device, deadline)))
        return
    rungs = [r for r in (REHEARSED if args.rehearse else RUNGS) if r.name.startswith(args.only)]
    record: dict[str, Any] = {"bench": "long_context", "command": common.command(), "measured": not args.rehearse}
    record |= {"environment": common.environment(args.threads, args.device), "rungs": climb(rungs, args)}
    for row in record["rungs"]:
        reached = f"{row['tokens']:,} tokens" if "tokens" in row else row["not_run"]
        print(f"{row['shape']:5s} {row['stage']:5s} {row['cap']:5g}  {row['name']:40s} {reached}")
    device = record["environment"]["device"].split(",")[0].replace(" ", "_").lower() if args.device == "cuda" else "cpu"
    print(common.write_json(f"long_context_{device}", record, args.out))


if __name__ == "__main__":
    main()
