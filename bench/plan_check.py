"""What `fastrl plan` says against what a run really takes, on the CPU.

    python bench/plan_check.py                     every case; about two minutes
    python bench/plan_check.py --cases sft,dpo --out /tmp/x.json

Each case is a run of `fastrl.train.run` on random weights and texts: two optimizer steps (the second has the states of
the first). Measured: the process's high-water mark over the whole run, loading and saving included, less its size
before it, when the same stage has run once on a tiny model, so that every library is loaded. Memory that is freed goes
back to the system at once (MALLOC_MMAP_THRESHOLD_ is fixed), so that the mark is of what lives. Planned: the largest
phase less the plan's row `runtime`, from the same flags, at the tokens of the run's micro-batches.

slope: bytes a token, of a case at two numbers of tokens. words: what is left of two vocabularies' peaks when the bytes
of their weights, gradients and optimizer states are taken off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import trainer_vs_trl as base

MODEL = dict(hidden_size=256, num_hidden_layers=5, vocab_size=8192, intermediate_size=1024, head_dim=64)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True)
TINY = dict(hidden_size=32, num_hidden_layers=2, vocab_size=512, intermediate_size=64, head_dim=16)
# glibc: blocks from 64 KiB on are mapped by themselves and unmapped when freed, and the heap's end goes back.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
STEPS = 2
GROUP = 8  # completions of a prompt
LIMIT = 0.10
# No two completions alike: an advantage of zero would leave the head's backward out.
REWARD = "def reward(completions, **_):\n    return [float(sum(map(ord, c)) % 97) for c in completions]\n"


@dataclass(frozen=True)
class Case:
    """stage and flags of a run. model: over MODEL. length, count: tokens of a sequence, sequences (rows) of a step."""

    name: str
    stage: str
    flags: dict[str, Any] = field(default_factory=dict)
    model: dict[str, int] = field(default_factory=dict)
    length: int = 128
    count: int = 8

    @property
    def rows(self) -> int:
        """Rows of the dataset that make a step."""
        return {"dpo": self.count // 2, "grpo": self.count // GROUP}.get(self.stage, self.count)


WHOLE = {"gradient_checkpointing": False}
CASES = (
    Case("sft", "sft", WHOLE),
    Case("dpo", "dpo", WHOLE),
    Case("grpo", "grpo", WHOLE, count=16),
    Case("lora", "sft", {**WHOLE, "use_peft": True}),
    Case("checkpointed", "sft", {"gradient_checkpointing": True, "optim": "sgd"}, length=256),
)
# For the slope and for the two vocabularies.
MORE = (
    Case("sft at twice the tokens", "sft", WHOLE, length=256),
    Case("sft at twice the words", "sft", WHOLE, {"vocab_size": 16384}),
)


# -- one run -----------------------------------------------------------------------------------------------------------
def texts(case: Case) -> list[dict[str, str]]:
    """Rows of one step, repeated: sequences a little shorter than `length`, no two alike, so that none is padded."""
    rows = []
    for i in range(case.rows * STEPS):
        k = i % case.rows
        half, rest = case.length // 2, case.length - case.length // 2 - 1 - k
        row = {"prompt": words(half, i)}
        if case.stage == "dpo":
            row |= {"chosen": " " + words(rest, 100 + i), "rejected": " " + words(rest - case.rows, 200 + i)}
        elif case.stage == "sft":
            row |= {"completion": " " + words(rest, 100 + i)}
        rows.append(row)
    return rows


def words(count: int, seed: int) -> str:
    import torch

    ids = torch.randint(500, (max(1, count),), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{i}" for i in ids)


def config_of(case: Case, work: Path, model: str):
    from fastrl.train.config import CONFIGS

    data = work / "rows.jsonl"
    base.write_rows(data, texts(case))
    flags = dict(model_name_or_path=str(work / model), dataset_name=str(data), output_dir=tempfile.mkdtemp(dir=work))
    flags |= dict(use_cpu=True, max_steps=STEPS, logging_steps=1, save_strategy="no", learning_rate=1e-5)
    flags |= dict(per_device_train_batch_size=case.count, max_tokens_per_device=1 << 20)
    if case.stage == "grpo":
        (work / "reward.py").write_text(REWARD)
        flags |= dict(num_generations=GROUP, max_completion_length=case.length // 2)
        flags |= dict(reward_funcs=[f"{work / 'reward.py'}:reward"])
        flags |= dict(max_prompt_length=case.length // 2)
    else:
        flags |= dict(max_length=case.length)
    if case.stage == "dpo":
        flags |= dict(per_device_train_batch_size=case.rows)
    return CONFIGS[case.stage](**{**flags, **case.flags})


def model_of(work: Path, sizes: dict[str, int]) -> str:
    """The folder of a model of these sizes, made once."""
    name = "-".join(map(str, sizes.values()))
    if not (work / name).is_dir():
        base.make_model(work / name, **sizes)
    return name


def run_case(case: Case, work: Path, cache: dict) -> dict[str, Any]:
    """Warm up on the tiny model, then the measured run; the plan of the same flags."""
    from fastrl.train import loop, run
    from fastrl.train.plan import Device, MemoryModel

    tiny, model = model_of(work, {**HEADS, **TINY}), model_of(work, {**MODEL, **HEADS, **case.model})
    began = [time.monotonic()]
    run(config_of(dataclasses.replace(case, length=32), work, tiny))
    began.append(time.monotonic())
    seen: list[int] = []
    original = loop.loss_of

    def loss_of(model, objective, micro, how):
        seen.append(micro.input_ids.shape[0])
        return original(model, objective, micro, how)

    loop.loss_of = loss_of
    config = config_of(case, work, model)
    before = common.settle()
    run(config)
    loop.loss_of = original
    began.append(time.monotonic())
    measured = None if before is None else common.resident_mib("VmHWM") - before
    plan = MemoryModel(config, Device("cpu", "cpu", 64 << 30), cache=cache)
    plan.shape = dataclasses.replace(plan.shape, tokens=max(seen), step_tokens=max(seen))  # each step is one of them
    estimate = plan.estimate()
    began.append(time.monotonic())
    print(case.name, *(f"{b - a:.1f} s" for a, b in zip(began, began[1:], strict=False)), file=sys.stderr, flush=True)
    planned = (estimate.total - plan.device.base) / common.MIB
    return {
        "case": case.name, "stage": case.stage, "flags": case.flags, "model": case.model, "tokens": max(seen),
        "measured_mib": None if measured is None else round(measured, 1), "planned_mib": round(planned, 1),
        "error": None if measured is None else round(planned / measured - 1, 4), "phase": estimate.peak.name,
        "phases_mib": {p.name: {n: round(x / common.MIB, 1) for n, x in p.rows.items()} for p in estimate.phases},
        "static_mib": round(static(plan) / common.MIB, 1),
    }  # fmt: skip


def static(plan) -> float:
    """Weights, gradients and optimizer states of everything: what grows with the vocabulary by itself."""
    return sum(plan.weights.values()) + sum(s.gradients for s in plan.trained) + plan.optimizer


def worker(names: list[str], threads: int) -> list[dict[str, Any]]:
    """Cases one after another in this process; what each leaves behind is given back before the next."""
    import torch

    torch.set_num_threads(threads)
    cache: dict = {}
    with tempfile.TemporaryDirectory() as work:
        return [run_case(case, Path(work), cache) for case in (*CASES, *MORE) if case.name in names]


# -- the record --------------------------------------------------------------------------------------------------------
def measured(names: list[str], threads: int) -> list[dict[str, Any]]:
    """In a process whose allocator hides nothing."""
    kept = {name: os.environ.get(name) for name in MALLOC}
    os.environ.update(MALLOC)
    try:
        flags = ["--worker", "--cases", ",".join(names), "--threads", str(threads)]
        return common.in_subprocess(__file__, flags, threads)["cases"]
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def slopes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes a token, measured and planned, of `sft` at two numbers of tokens; and the peak without what grows with the
    vocabulary at two vocabularies."""
    found = {row["case"]: row for row in rows}
    made: dict[str, Any] = {}
    one, two = found.get("sft"), found.get("sft at twice the tokens")
    if one and two:
        tokens = two["tokens"] - one["tokens"]
        made["kib_a_token"] = {
            name: round((two[f"{name}_mib"] - one[f"{name}_mib"]) * 1024 / tokens, 1)
            for name in ("measured", "planned")
        }
    wide = found.get("sft at twice the words")
    if one and wide:
        made["beyond_static_mib"] = {
            str(row["model"].get("vocab_size", MODEL["vocab_size"])): round(row["measured_mib"] - row["static_mib"], 1)
            for row in (one, wide)
        }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(c.name for c in (*CASES, *MORE)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="another file than bench/results/plan_cpu.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    names = args.cases.split(",")
    if args.worker:
        print("\n" + json.dumps({"cases": worker(names, args.threads)}))
        return
    rows = measured(names, args.threads)
    record = {"bench": "plan_check", "command": common.command(), "limit": LIMIT, "model": {**MODEL, **HEADS}}
    record |= {"environment": common.environment(args.threads), "cases": rows, **slopes(rows)}
    for row in rows:
        print(f"{row['case']:26s} {row['tokens']:6d} tokens  measured {row['measured_mib']:8.1f} MiB  "
              f"planned {row['planned_mib']:8.1f}  {row['error']:+.1%}")  # fmt: skip
    print(json.dumps(slopes(rows)))
    print(common.write_json("plan_cpu", record, args.out))


if __name__ == "__main__":
    main()
