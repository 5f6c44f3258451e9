"""A TRL script unpatched and patched by one line, for each trainer: step time and memory.

    python bench/drop_in.py                        all five trainers, 2 rounds of 1 + 3 steps each; about 15 minutes
    python bench/drop_in.py --kinds sft,dpo --rounds 1 --steps 3 --out /tmp/x.json

Model, tokenizer, rows and hyper-parameters are those of bench/trainer_vs_trl.py; the trainers run with their defaults.
KTO reads the same prompts and answers, every other one desirable; GRPO and RLOO sample 8 answers of 64 tokens to one
prompt a step (transformers' own generate, the same on both sides, is part of the step and is shown beside it).

Every contender runs in processes of its own, in alternation. Time: from on_step_begin to on_step_end, median over the
steps after the first. Memory: the process's high-water mark over the whole run, less its size when the policy had just
been loaded: gradients, optimizer, reference models count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from trainer_vs_trl import (
    HEADS,
    LENGTHS,
    MODEL,
    TRAINING,
    LoadedModel,
    make_model,
    make_rows,
    record_losses,
    write_rows,
)  # fmt: skip

KINDS = ("sft", "dpo", "kto", "grpo", "rloo")
SAMPLED = dict(num_generations=8, max_completion_length=64, beta=0.0)


def rows_of(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    rows = make_rows(count, "dpo" if kind == "dpo" else "sft", seed)
    if kind == "kto":
        return [row | {"label": i % 2 == 0} for i, row in enumerate(rows)]
    return [{"prompt": row["prompt"]} for row in rows] if kind in ("grpo", "rloo") else rows


def low_words(completions, **columns):
    """Share of words whose number is even: a reward that varies."""
    return [sum(int(w[1:]) % 2 == 0 for w in c.split() if w[1:].isdigit()) / 64 for c in completions]


def make_trainer(kind: str, work: Path, steps: int, clock):
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer

    cache = tempfile.mkdtemp(dir=work)
    rows = load_dataset("json", data_files=str(work / f"{kind}.jsonl"), split="train", cache_dir=cache)
    given = {k: v for k, v in TRAINING.items() if kind not in ("grpo", "rloo") or k != "max_length"}
    given |= dict(max_steps=steps, use_cpu=True, bf16=False, model_init_kwargs={"dtype": "float32"})
    given |= dict(report_to="none", disable_tqdm=True, dataloader_pin_memory=False)
    given["output_dir"] = tempfile.mkdtemp(dir=work)
    more: dict[str, Any] = {}
    if kind in ("grpo", "rloo"):
        given |= SAMPLED
        more["reward_funcs"] = low_words
    else:
        given["train_sampling_strategy"] = "sequential"
    name, model = kind.upper(), str(work / "model")
    config = getattr(trl, f"{name}Config")(**given)
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = getattr(trl, f"{name}Trainer")
    return trainer(model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[clock], **more)


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every step, seconds of generation within it, losses, memory."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(args.threads)
    loaded = LoadedModel()
    sampling: list[float] = []
    seconds: list[float] = []
    generated: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            sampling.clear()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.began)
            generated.append(sum(sampling))

    trainer = make_trainer(args.kinds, Path(args.work), args.steps, Clock)
    if args.worker == "patched":
        import fastrl.integrations.trl

        fastrl.integrations.trl.patch(trainer)
    if hasattr(trainer, "_generate"):
        wrap_generate(trainer, sampling)
    losses = record_losses(trainer)
    trainer.train()
    peak = None if loaded.mib is None else round(common.resident_mib("VmHWM") - loaded.mib, 1)
    return {"seconds": seconds, "generated": generated, "losses": losses, "peak_over_model_mib": peak}


def wrap_generate(trainer, sampling: list[float]) -> None:
    original = trainer._generate

    def generate(*args, **kwargs):
        began = time.perf_counter()
        made = original(*args, **kwargs)
        sampling.append(time.perf_counter() - began)
        return made

    trainer._generate = generate


# -- measuring ---------------------------------------------------------------------------------------------------------
def measure(kind: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    write_rows(work / f"{kind}.jsonl", rows_of(kind, TRAINING["per_device_train_batch_size"] * args.steps, args.seed))
    runs: dict[str, list[dict]] = {"unpatched": [], "patched": []}
    for _ in range(args.rounds):
        for name, done in runs.items():
            flags = ["--worker", name, "--kinds", kind, "--work", str(work)]
            flags += ["--steps", str(args.steps), "--threads", str(args.threads)]
            done.append(common.undisturbed(lambda f=flags: common.in_subprocess(__file__, f, args.threads), args.quiet))
            seconds = ", ".join(f"{s:.2f}" for s in done[-1]["seconds"])
            print(f"{kind} {name}: {seconds} s; peak {done[-1]['peak_over_model_mib']} MiB over the model", flush=True)
    contenders = {}
    for name, done in runs.items():
        row = common.summary([s for one in done for s in one["seconds"][1:]])
        row["generation_s"] = statistics.median([s for one in done for s in one["generated"][1:]])
        peaks = [one["peak_over_model_mib"] for one in done]
        row["peak_over_model_mib"] = None if None in peaks else statistics.median(peaks)
        contenders[name] = {**row, "losses": done[0]["losses"]}
    theirs, mine = contenders["unpatched"], contenders["patched"]
    pairs = zip(theirs["losses"], mine["losses"], strict=True)
    memory = (mine["peak_over_model_mib"], theirs["peak_over_model_mib"])
    return {
        "contenders": contenders,
        "speedup": round(theirs["median_s"] / mine["median_s"], 2),
        "memory_ratio": None if None in memory else round(memory[0] / memory[1], 3),
        "largest_loss_gap": float(f"{max(abs(a - b) for a, b in pairs):.3e}"),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help="trainers, separated by commas")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a process; the first is warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", type=float, default=0.2, help="time again if others used this many cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="another file than bench/results/drop_in.json")
    parser.add_argument("--worker", choices=("unpatched", "patched"), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.worker:
        print("\n" + json.dumps(worker(args)))
        return
    record: dict[str, Any] = {"bench": "drop_in", "command": common.command()}
    record |= {"model": {**MODEL, **HEADS}, "lengths": LENGTHS, "training": TRAINING, "sampled": SAMPLED}
    record |= {"environment": common.environment(args.threads), "trainers": {}}
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work) / "model")
        for kind in args.kinds.split(","):
            record["trainers"][kind] = measure(kind, Path(work), args)
    path = common.write_json("drop_in", record, args.out)
    for kind, row in record["trainers"].items():
        gap = f"losses {row['largest_loss_gap']:.1e} apart at most"
        print(f"{kind}: {row['speedup']}x faster, {row['memory_ratio']} of the memory, {gap}")
    print(path)


if __name__ == "__main__":
    main()
