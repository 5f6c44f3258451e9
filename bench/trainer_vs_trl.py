"""A training step of fastrl against the same step of TRL's own trainer: SFT and DPO.

    python bench/trainer_vs_trl.py                         both stages, 2 rounds of 1 + 3 steps each; about 10 minutes
    python bench/trainer_vs_trl.py --stages sft --rounds 1 --steps 3 --out /tmp/x.json

Same Qwen3-style model directory (hidden 256, 4 layers, vocabulary 32768, random weights), same word-level tokenizer
(a word is a token), same long-tailed rows in the same order, same hyper-parameters, fp32, no checkpointing. fastrl runs
through `fastrl.train.run`, the code path of the command line; TRL through SFTTrainer / DPOTrainer with their defaults.

Every contender runs in processes of its own, in alternation. Time: median over the steps after the first. fastrl's is
its own timing_s/step (from picking the rows to the end of the optimizer step); TRL's runs from on_step_begin to
on_step_end, so that its data loading is not counted. Memory: the process's high-water mark over the whole run, less its
size when the policy had just been loaded (bench/common.py): gradients, optimizer and DPO's reference model count.
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

MODEL = dict(hidden_size=256, num_hidden_layers=4, vocab_size=32768, intermediate_size=1024, head_dim=64)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True)
LENGTHS = dict(prompt_median=60, answer_median=90, sigma=0.9, cut=480)
TRAINING = dict(
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    max_length=1024,
    learning_rate=1e-4,
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
    logging_steps=1,
    save_strategy="no",
    seed=42,
)
SPECIAL = ("<pad>", "<eos>", "<unk>")


# -- one model, one tokenizer, one set of rows -------------------------------------------------------------------------
def make_model(path: Path, **other: int) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    sizes = {**MODEL, **HEADS, **other}
    words = [*SPECIAL, *(f"w{i}" for i in range(sizes["vocab_size"] - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    Qwen3ForCausalLM(config).save_pretrained(path)


def make_rows(count: int, stage: str, seed: int) -> list[dict[str, str]]:
    """Words drawn uniformly; lengths lognormal, cut at LENGTHS["cut"]."""
    import torch

    make = torch.Generator().manual_seed(seed)

    def text(median: int) -> str:
        length = median * torch.randn((), generator=make).mul(LENGTHS["sigma"]).exp().item()
        n = min(max(1, round(length)), LENGTHS["cut"])
        ids = torch.randint(MODEL["vocab_size"] - len(SPECIAL), (n,), generator=make).tolist()
        return " ".join(f"w{i}" for i in ids)

    answers = ("completion",) if stage == "sft" else ("chosen", "rejected")
    rows = []
    for _ in range(count):
        prompt = text(LENGTHS["prompt_median"])
        rows.append({"prompt": prompt} | {name: " " + text(LENGTHS["answer_median"]) for name in answers})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shape_of_rows(rows: list[dict[str, str]], answers: tuple[str, ...], batch: int) -> dict[str, Any]:
    """Tokens of the rows (eos included), and how many a batch padded to its longest sequence would hold."""
    lengths = [[len((row["prompt"] + row[a]).split()) + 1 for a in answers] for row in rows]
    padded = 0
    for start in range(0, len(rows), batch):
        block = [n for per_row in lengths[start : start + batch] for n in per_row]
        padded += max(block) * len(block)
    real = sum(map(sum, lengths))
    return {"tokens_per_step": round(real / len(rows) * batch), "padded_over_real": round(padded / real, 2)}


# -- contenders --------------------------------------------------------------------------------------------------------
class LoadedModel:
    """Takes the process's size right after the first from_pretrained, every weight touched, and resets the peak."""

    def __init__(self):
        from transformers import PreTrainedModel

        self.mib: float | None = None
        original = PreTrainedModel.from_pretrained.__func__

        def from_pretrained(cls, *args, **kwargs):
            model = original(cls, *args, **kwargs)
            if self.mib is None:
                loaded = model[0] if isinstance(model, tuple) else model  # with output_loading_info
                for tensor in loaded.state_dict().values():
                    tensor.double().sum()
                self.mib = common.settle()
            return model

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def run_fastrl(stage: str, work: Path, steps: int) -> tuple[list[float], list[float]]:
    """(seconds, loss) of every step, from metrics.jsonl."""
    from fastrl.train import DPOConfig, SFTConfig, run

    config = {"sft": SFTConfig, "dpo": DPOConfig}[stage]
    out = tempfile.mkdtemp(dir=work)
    data = str(work / f"{stage}_rows.jsonl")
    paths = dict(model_name_or_path=str(work / "model"), dataset_name=data, output_dir=out)
    run(config(**paths, **TRAINING, max_steps=steps, use_cpu=True))
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    records = [r for line in lines if "timing_s/step" in (r := json.loads(line))]
    return [r["timing_s/step"] for r in records], [r["loss"] for r in records]


def step_clock():
    """A callback for transformers' trainers: `seconds` of each optimizer step, data loading not counted."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []

        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds.append(time.perf_counter() - self.began)

    return Clock()


def record_losses(trainer) -> list[float]:
    """Filled with every loss that the trainer computes; its own log rounds them."""
    losses, original = [], trainer.compute_loss

    def compute_loss(*args, **kwargs):
        made = original(*args, **kwargs)
        losses.append((made[0] if isinstance(made, tuple) else made).item())
        return made

    trainer.compute_loss = compute_loss
    return losses


def run_trl(stage: str, work: Path, steps: int) -> tuple[list[float], list[float]]:
    """(seconds, loss) of every step."""
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer

    kind = {"sft": "SFT", "dpo": "DPO"}[stage]
    cache = tempfile.mkdtemp(dir=work)
    rows = load_dataset("json", data_files=str(work / f"{stage}_rows_in_order.jsonl"), split="train", cache_dir=cache)
    out = tempfile.mkdtemp(dir=work)
    quiet = dict(report_to="none", disable_tqdm=True, dataloader_pin_memory=False, output_dir=out)
    same = dict(max_steps=steps, use_cpu=True, bf16=False, train_sampling_strategy="sequential")
    config = getattr(trl, f"{kind}Config")(**TRAINING, **same, **quiet, model_init_kwargs={"dtype": "float32"})

    clock = step_clock()
    model = str(work / "model")
    trainer = getattr(trl, f"{kind}Trainer")(
        model, args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model), callbacks=[clock]
    )
    losses = record_losses(trainer)
    trainer.train()
    return clock.seconds, losses


def worker(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(args.threads)
    loaded = LoadedModel()
    run = {"fastrl": run_fastrl, "trl": run_trl}[args.worker]
    seconds, losses = run(args.stages, Path(args.work), args.steps)
    peak = None if loaded.mib is None else round(common.resident_mib("VmHWM") - loaded.mib, 1)
    return {"seconds": seconds, "losses": losses, "loaded_mib": loaded.mib, "peak_over_model_mib": peak}


# -- measuring ---------------------------------------------------------------------------------------------------------
def measure_stage(stage: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    from fastrl.data.sampler import IndexSampler

    batch = TRAINING["per_device_train_batch_size"]
    rows = make_rows(batch * args.steps, stage, args.seed)
    in_order = [rows[i] for i in IndexSampler(len(rows), TRAINING["seed"]).order(0)]
    write_rows(work / f"{stage}_rows.jsonl", rows)
    write_rows(work / f"{stage}_rows_in_order.jsonl", in_order)
    runs: dict[str, list[dict]] = {"fastrl": [], "trl": []}
    for _ in range(args.rounds):
        for name, done in runs.items():
            flags = ["--worker", name, "--stages", stage, "--work", str(work)]
            flags += ["--steps", str(args.steps), "--threads", str(args.threads)]
            done.append(common.undisturbed(lambda f=flags: common.in_subprocess(__file__, f, args.threads), args.quiet))
            seconds = ", ".join(f"{s:.2f}" for s in done[-1]["seconds"])
            print(f"{stage} {name}: {seconds} s; peak {done[-1]['peak_over_model_mib']} MiB over the model", flush=True)
    contenders = {}
    for name, done in runs.items():
        row = common.summary([s for one in done for s in one["seconds"][1:]])
        peaks = [one["peak_over_model_mib"] for one in done]
        row["peak_over_model_mib"] = None if None in peaks else statistics.median(peaks)
        contenders[name] = {**row, "losses": done[0]["losses"]}
    ours, theirs = contenders["fastrl"], contenders["trl"]
    gaps = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    memory = (ours["peak_over_model_mib"], theirs["peak_over_model_mib"])
    return {
        **shape_of_rows(in_order, ("completion",) if stage == "sft" else ("chosen", "rejected"), batch),
        "contenders": contenders,
        "speedup": round(theirs["median_s"] / ours["median_s"], 2),
        "memory_ratio": None if None in memory else round(memory[0] / memory[1], 3),
        "first_loss_gap": float(f"{gaps[0]:.3e}"),
        "largest_loss_gap": float(f"{max(gaps):.3e}"),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="sft,dpo", help="sft, dpo or both, separated by a comma")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a process; the first is warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", type=float, default=0.2, help="time again if others used this many cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="another file than bench/results/trainer_vs_trl.json")
    parser.add_argument("--worker", choices=("fastrl", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.worker:
        print("\n" + json.dumps(worker(args)))
        return
    record: dict[str, Any] = {"bench": "trainer_vs_trl", "command": common.command()}
    record |= {"model": {**MODEL, **HEADS}, "lengths": LENGTHS, "training": TRAINING}
    record |= {"environment": common.environment(args.threads), "stages": {}}
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work) / "model")
        for stage in args.stages.split(","):
            record["stages"][stage] = measure_stage(stage, Path(work), args)
    path = common.write_json("trainer_vs_trl", record, args.out)
    for stage, row in record["stages"].items():
        gaps = f"loss gap {row['first_loss_gap']:.1e} at step 1, {row['largest_loss_gap']:.1e} at most"
        print(f"{stage}: {row['speedup']}x faster, {row['memory_ratio']} of the memory, {gaps}")
    print(path)


if __name__ == "__main__":
    main()
