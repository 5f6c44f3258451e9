"""Peak memory and speed of an optimizer step against the length of its sequences: fastrl and TRL's own trainers.

    python bench/memory.py                         sweep and what must hold; under 15 minutes on two cores
    python bench/memory.py --short --out /tmp/x.json    every path once, under a minute; figures mean nothing
    python bench/memory.py --parts holds           bench/trainer_vs_trl.py's model and data, asked against measured

Same Qwen3-style model (hidden 256, 4 layers, vocabulary 32768, random weights, fp32), same sequences, same
hyper-parameters, gradient checkpointing on in all. Every sequence of a point has the same length: half prompt, half
completion. sft: 2 sequences a step. dpo: 1 pair. grpo: the update alone, 4 given completions of one prompt, whose
advantages are given too; nothing is sampled. Every contender of every point runs in a process of its own.

Time: median over the steps after the first. Memory: the process's high-water mark over the whole run, less its size
when the policy had just been loaded. `liger` is TRL with use_liger_kernel, where it is installed and runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
import trainer_vs_trl as base
from asked import TRAINER

from fastrl.bench import plots

LENGTHS = (256, 512, 1024, 2048, 4096)
SHORT = dict(lengths=(64,), steps=2, model=dict(vocab_size=512, num_hidden_layers=2))
SEQUENCES = {"sft": 2, "dpo": 2, "grpo": 4}  # of a step
UNITS = {"sft": 2, "dpo": 1, "grpo": 4}  # per_device_train_batch_size
STAGES = tuple(SEQUENCES)
TRAINING = {**base.TRAINING, "gradient_checkpointing": True}
CONTENDERS = ("fastrl", "trl", "liger")
WORDS = 256  # of the vocabulary that texts are made of: the tokenizer knows as many in every model


# -- data --------------------------------------------------------------------------------------------------------------
def words(count: int, seed: int) -> str:
    import torch

    ids = torch.randint(WORDS, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{i}" for i in ids)


def make_rows(stage: str, length: int, count: int) -> list[dict[str, str]]:
    """Rows whose sequences have exactly `length` tokens: length/2 of prompt, the rest completion and its end."""
    half, rows = length // 2, []
    answers = {"sft": ("completion",), "dpo": ("chosen", "rejected"), "grpo": ()}[stage]
    for i in range(count):
        prompt = {"prompt": words(half, 10 * i)}
        rows.append(prompt | {name: " " + words(length - half - 1, 10 * i + k) for k, name in enumerate(answers, 1)})
    return rows


def completions(length: int) -> tuple[list[list[int]], list[float]]:
    """(token ids of each completion, its advantage) of a GRPO step: the same in every step and for every contender."""
    import torch

    made = torch.Generator().manual_seed(1)
    first = len(base.SPECIAL)
    ids = torch.randint(first, first + WORDS, (SEQUENCES["grpo"], length - length // 2), generator=made).tolist()
    return ids, [1.0, -1.0, 0.5, -0.5]


# -- contenders: (seconds, losses) of every step -----------------------------------------------------------------------
def run_fastrl(stage: str, length: int, work: Path, steps: int) -> tuple[list[float], list[float]]:
    from fastrl.train import run
    from fastrl.train.config import CONFIGS

    out = tempfile.mkdtemp(dir=work)
    paths = dict(model_name_or_path=str(work / "model"), dataset_name=str(work / "rows.jsonl"), output_dir=out)
    options = TRAINING | {"per_device_train_batch_size": UNITS[stage], "max_length": length}
    options["max_tokens_per_device"] = length * SEQUENCES[stage]
    if stage == "grpo":
        give_completions(length)
        options.pop("max_length")
        options |= dict(num_generations=SEQUENCES["grpo"], max_completion_length=length - length // 2, beta=0.0)
        options["reward_funcs"] = ["think_format"]
    run(CONFIGS[stage](**paths, **options, max_steps=steps, use_cpu=True))
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    records = [r for line in lines if "timing_s/step" in (r := json.loads(line))]
    return [r["timing_s/step"] for r in records], [r["loss"] for r in records]


def give_completions(length: int) -> None:
    """GRPOStage takes its completions from here instead of sampling them."""
    from fastrl.data.types import Sample
    from fastrl.train.stages.grpo import GRPOStage

    ids, advantages = completions(length)

    def roll_out(self, log):
        prompts = [self.prompts[i] for i in self.order.take(self.prompts_at_once)]
        made = zip(ids, advantages, strict=True)
        return [[Sample.from_parts(prompts[0].ids, c, group_id=0, advantage=a) for c, a in made]]

    GRPOStage.roll_out = roll_out


def run_trl(stage: str, length: int, work: Path, steps: int, liger: bool = False) -> tuple[list[float], list[float]]:
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer

    kind = stage.upper()
    cache = tempfile.mkdtemp(dir=work)
    rows = load_dataset("json", data_files=str(work / "rows.jsonl"), split="train", cache_dir=cache)
    options = TRAINING | {"per_device_train_batch_size": UNITS[stage], "max_length": length}
    options |= dict(report_to="none", disable_tqdm=True, dataloader_pin_memory=False, output_dir=str(work / "trl"))
    options |= dict(max_steps=steps, use_cpu=True, bf16=False, model_init_kwargs={"dtype": "float32"})
    options["use_liger_kernel"] = liger
    more: dict[str, Any] = {}
    if stage == "grpo":
        options.pop("max_length")
        options |= dict(num_generations=SEQUENCES["grpo"], max_completion_length=length - length // 2, beta=0.0)
        more["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)

    clock = base.step_clock()
    model = str(work / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = getattr(trl, f"{kind}Config")(**options)
    trainer = getattr(trl, f"{kind}Trainer")(
        model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[clock], **more
    )
    if stage == "grpo":
        trainer._generate_and_score_completions = lambda inputs: given(tokenizer, inputs, length)
    losses = base.record_losses(trainer)
    trainer.train()
    return clock.seconds, losses


def given(tokenizer, inputs: list[dict], length: int) -> dict[str, Any]:
    """What TRL's GRPO trainer makes of sampled completions, of given ones."""
    import torch

    ids, advantages = completions(length)
    prompts = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in inputs])
    made = torch.tensor(ids)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": made,
        "completion_mask": torch.ones_like(made),
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(made.numel()),
    }


def worker(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(args.threads)
    loaded = base.LoadedModel()
    stage, length, work = args.stages, int(args.lengths), Path(args.work)
    if args.worker == "fastrl":
        seconds, losses = run_fastrl(stage, length, work, args.steps)
    else:
        seconds, losses = run_trl(stage, length, work, args.steps, liger=args.worker == "liger")
    peak = None if loaded.mib is None else round(common.resident_mib("VmHWM") - loaded.mib, 1)
    return {"seconds": seconds, "losses": losses, "loaded_mib": loaded.mib, "peak_over_model_mib": peak}


# -- measuring ---------------------------------------------------------------------------------------------------------
def measure_point(stage: str, length: int, names: list[str], work: Path, args: argparse.Namespace) -> dict[str, Any]:
    base.write_rows(work / "rows.jsonl", make_rows(stage, length, 4 * args.steps))
    tokens = SEQUENCES[stage] * length
    point: dict[str, Any] = {"stage": stage, "length": length, "tokens_per_step": tokens, "contenders": {}}
    for name in names:
        flags = ["--worker", name, "--stages", stage, "--lengths", str(length), "--work", str(work)]
        flags += ["--steps", str(args.steps), "--threads", str(args.threads)]
        try:
            done = common.undisturbed(lambda f=flags: common.in_subprocess(__file__, f, args.threads), args.quiet)
        except RuntimeError as error:
            if name == "fastrl":
                raise
            reason = str(error).strip().splitlines()[-1][:200]
            point["contenders"][name] = {"not_run": reason}
            print(f"{stage} {length} {name}: {reason}", flush=True)
            continue
        seconds = statistics.median(done["seconds"][1:])
        row = {"median_s": round(seconds, 4), "tokens_per_s": round(tokens / seconds, 1)}
        point["contenders"][name] = row | {n: done[n] for n in ("peak_over_model_mib", "losses")}
        print(f"{stage} {length} {name}: {seconds:.2f} s, peak {done['peak_over_model_mib']} MiB", flush=True)
    return {**point, **compared(point["contenders"])}


def compared(contenders: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """TRL's time over fastrl's, fastrl's memory over TRL's, and how far their losses are apart at step 1."""
    ours, theirs = contenders.get("fastrl", {}), contenders.get("trl", {})
    if "median_s" not in ours or "median_s" not in theirs:
        return {}
    peaks = (ours["peak_over_model_mib"], theirs["peak_over_model_mib"])
    return {
        "speedup": round(theirs["median_s"] / ours["median_s"], 2),
        "memory_ratio": None if None in peaks else round(peaks[0] / peaks[1], 3),
        "first_loss_gap": float(f"{abs(ours['losses'][0] - theirs['losses'][0]):.3e}"),
    }


def measure_holds(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines asked of bench/trainer_vs_trl.py's model and data."""
    found = {}
    own = argparse.Namespace(**{**vars(args), "rounds": 1, "steps": 3 if args.short else 4, "seed": 0})
    with tempfile.TemporaryDirectory() as work:
        base.make_model(Path(work) / "model")
        for stage in ("sft", "dpo"):
            found[stage] = base.measure_stage(stage, Path(work), own)
    return [line.row(line.read(found)) for line in TRAINER]


def names_of(args: argparse.Namespace) -> list[str]:
    there = {"fastrl": True, "trl": True, "liger": importlib.util.find_spec("liger_kernel") is not None}
    return [n for n in args.contenders.split(",") if there[n]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="sweep,holds")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a process; the first is warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", type=float, default=0.2, help="time again if others used this many cores; 0: never")
    parser.add_argument("--short", action="store_true", help="one short length and a tiny model: a rehearsal")
    parser.add_argument("--out", help="another file than bench/results/memory_cpu.json")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.short and not args.worker:
        args.parts, args.lengths = "sweep", ",".join(map(str, SHORT["lengths"]))
        args.steps, args.quiet = SHORT["steps"], None
    args.quiet = args.quiet or None
    return args


def draw(points: list[dict[str, Any]], folder: Path) -> list[Path]:
    """memory_peak.png and memory_speed.png: one panel a stage."""
    made = []
    for name, field, label in (
        ("memory_peak", "peak_over_model_mib", "peak over the model, MiB"),
        ("memory_speed", "tokens_per_s", "tokens / s"),
    ):
        panels = []
        for stage in dict.fromkeys(p["stage"] for p in points):
            mine = [p for p in points if p["stage"] == stage]
            lines = []
            for contender in CONTENDERS:
                pairs = [(p["length"], p["contenders"].get(contender, {}).get(field)) for p in mine]
                pairs = [(x, y) for x, y in pairs if y is not None]
                if pairs:
                    lines.append(plots.Line(contender, *zip(*pairs, strict=True)))
            panels.append(plots.Panel(f"{stage} update", "tokens of a sequence", label, lines))
        made.append(plots.lines(panels, folder / f"{name}.png"))
    return made


def main() -> None:
    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.worker:
        print("\n" + json.dumps(worker(args)))
        return
    model = {**base.MODEL, **base.HEADS, "max_position_embeddings": 8192} | (SHORT["model"] if args.short else {})
    record: dict[str, Any] = {"bench": "memory", "command": common.command(), "measured": not args.short}
    record |= {"model": model, "sequences": SEQUENCES, "environment": common.environment(args.threads)}
    record |= {"points": [], "lines": []}
    if "sweep" in args.parts:
        with tempfile.TemporaryDirectory() as work:
            base.make_model(Path(work) / "model", **model)
            for stage in args.stages.split(","):
                for length in map(int, args.lengths.split(",")):
                    record["points"].append(measure_point(stage, length, names_of(args), Path(work), args))
    if "holds" in args.parts:
        record["lines"] = measure_holds(args)
    path = common.write_json("memory_cpu", record, args.out)
    if record["points"]:
        draw(record["points"], path.parent if args.out else common.ROOT / "docs")
    for line in record["lines"]:
        verdict = {True: "holds", False: "missed", None: ""}[line["held"]]
        print(f"{line['line']:56s} {line['asked']:>10s} {line['measured']:>10} {verdict}")
    print(path)


if __name__ == "__main__":
    main()
