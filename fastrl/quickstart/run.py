"""`fastrl quickstart`: a model from a config, SFT, then GRPO, and held-out accuracy at each stop."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from fastrl.quickstart.make_data import DATA

SFT = {
    "max_steps": 800,
    "per_device_train_batch_size": 128,
    "learning_rate": 6e-3,
    "warmup_steps": 20,
    "logging_steps": 40,
}
GRPO = {
    "max_steps": 200,
    "per_device_train_batch_size": 256,
    "num_generations": 8,
    "max_completion_length": 5,
    "learning_rate": 3e-4,
    "warmup_steps": 50,
    "logging_steps": 10,
}
SHARED = {"gradient_checkpointing": False, "save_strategy": "no"}
SHORT = {"sft": {"max_steps": 400}, "grpo": {"max_steps": 40, "warmup_steps": 10}}


def main(argv: list[str] | None = None) -> int:
    """Entry of `fastrl quickstart`; returns 0 if the model learned what it should, else 1."""
    parser = argparse.ArgumentParser(prog="fastrl quickstart", description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/quickstart", help="where models, metrics and the plot go")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same numbers")
    parser.add_argument("--short", action="store_true", help="fewer steps: checks that everything runs, for CI")
    args = parser.parse_args(argv)
    began = time.monotonic()
    report = quickstart(Path(args.output_dir), args.seed, args.short)
    report["seconds"] = round(time.monotonic() - began, 1)
    show(report)
    sft, grpo = report["accuracy"]["after SFT"], report["accuracy"]["after GRPO"]
    if not (0.3 <= sft <= 0.6 and grpo >= sft + 0.15):
        print("This is not what the quickstart should show: 30-60% after SFT, at least 15 points more after GRPO.")
        return 1
    return 0


def quickstart(out: Path, seed: int, short: bool) -> dict:
    """Everything after the command line. Returns accuracies, and leaves report.json and accuracy.png in `out`."""
    import torch
    import transformers

    from fastrl.quickstart.model import build_model
    from fastrl.train import GRPOConfig, SFTConfig, run
    from fastrl.train.plots import quickstart_figure

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and the numbers are the same on any machine
    if out.exists():
        shutil.rmtree(out)
    data = lay_out(out / "data")
    build_model(out / "model", seed)
    accuracy = {"before": exact_match(out / "model")}

    options = {**SHARED, **SFT, **(SHORT["sft"] if short else {})}
    sft = SFTConfig(
        model_name_or_path=str(out / "model"),
        dataset_name=str(data / "sft"),
        output_dir=str(out / "sft"),
        seed=seed,
        **options,
    )
    announce(sft)
    sft_result = run(sft)
    accuracy["after SFT"] = exact_match(out / "sft")

    options = {**SHARED, **GRPO, **(SHORT["grpo"] if short else {})}
    grpo = GRPOConfig(
        model_name_or_path=str(out / "sft"),
        dataset_name=str(data / "rl"),
        output_dir=str(out / "grpo"),
        reward_funcs=["exact_answer"],
        eval_strategy="steps",
        eval_steps=20,
        eval_temperature=0.0,
        seed=seed,
        **options,
    )
    announce(grpo)
    grpo_result = run(grpo)
    accuracy["after GRPO"] = exact_match(out / "grpo")

    figure = quickstart_figure(out / "accuracy.png", accuracy, sft_result.history, grpo_result.history)
    report = {"accuracy": accuracy, "prompts": len(held_out()), "seed": seed, "figure": str(figure)}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def lay_out(root: Path) -> Path:
    """The shipped files as two dataset directories, each with the held-out prompts as its test split."""
    for stage in ("sft", "rl"):
        (root / stage).mkdir(parents=True)
        shutil.copyfile(DATA / f"{stage}.jsonl", root / stage / "train.jsonl")
        shutil.copyfile(DATA / "test.jsonl", root / stage / "test.jsonl")
    return root


def held_out() -> list[dict]:
    return [json.loads(line) for line in (DATA / "test.jsonl").read_text().splitlines()]


def exact_match(model_dir: Path) -> float:
    """Part of the held-out prompts that the saved model answers exactly, decoded greedily by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastrl.rollout import Sampling, TransformersSampler

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    rows = held_out()
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    made = TransformersSampler(model, tokenizer).generate(prompts, Sampling(5, temperature=0.0))
    answers = [tokenizer.decode(c.ids, skip_special_tokens=True).strip() for [c] in made]
    return sum(a == row["answer"] for a, row in zip(answers, rows, strict=True)) / len(rows)


def announce(config) -> None:
    """The command a user would type for this stage."""
    flags = ["model_name_or_path", "dataset_name", "output_dir", "learning_rate", "max_steps"]
    flags += ["per_device_train_batch_size"] + (["reward_funcs", "num_generations"] if config.stage == "grpo" else [])
    words = []
    for name in flags:
        value = getattr(config, name)
        words.append(f"--{name} {' '.join(value) if isinstance(value, list) else value}")
    print(f"\n$ fastrl {config.stage} " + " \\\n      ".join(words) + "\n", flush=True)


def show(report: dict) -> None:
    print(f"\nHeld-out accuracy, {report['prompts']} sums never trained on (greedy, exact match):")
    for name, value in report["accuracy"].items():
        print(f"  {name:<12}{value:7.1%}  {'#' * round(40 * value)}")
    print(f"\n{report['seconds']:.0f} s in all. Curves: {report['figure']}")
