"""Everything a run needs before its first step: device, seeds, model, tokenizer, data and the stage that joins them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from fastrl.data import Limits, Report, Rows, encode_dpo, encode_prompts, encode_sft, load
from fastrl.data.types import DataError
from fastrl.models import PackedModel, load_causal_lm, load_reference, load_tokenizer, save_pretrained
from fastrl.rewards import load_rewards
from fastrl.rollout import TransformersSampler
from fastrl.train.config import DatasetConfig, GRPOConfig, SFTConfig, TrainConfig
from fastrl.train.flags import ConfigError
from fastrl.train.output_dir import Run
from fastrl.train.stages.base import Setting, Stage
from fastrl.train.stages.dpo import DPOStage
from fastrl.train.stages.grpo import GRPOStage
from fastrl.train.stages.sft import SFTStage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "auto": "auto"}


@dataclass
class Workbench:
    """What the loop works with. notes: lines for the reader (dropped rows, ...). generators: random states to save."""

    model: PackedModel
    stage: Stage
    tokenizer: Any
    save_model: Callable[[Path], None]
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    generators: dict[str, torch.Generator] = field(default_factory=dict)


def build(config: TrainConfig, run: Run) -> Workbench:
    """Load the data first (its errors are cheap to meet), then the models, then the stage."""
    transformers.utils.logging.disable_progress_bar()  # the run has a bar of its own
    transformers.utils.logging.set_verbosity_error()  # lengths are checked and reported here
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    train_rows = load(config.dataset_name, config.dataset_train_split, config.dataset_config)
    test_rows = held_out_rows(config)
    tokenizer = tokenizer_of(config)
    start = config.model_name_or_path if run.resume is None else str(run.resume.path)
    model = load_model(config, start, tokenizer, device)
    model.train()
    if getattr(config, "disable_dropout", False):
        disable_dropout(model)
    reference = None
    if getattr(config, "beta", 0.0):
        reference = load_reference(config.model_name_or_path, **model_options(config), tokenizer=tokenizer).to(device)
    autocast = torch.bfloat16 if (device.type == "cuda" if config.bf16 is None else config.bf16) else None
    setting = Setting(config, model, reference, tokenizer, device, autocast)
    notes = list(model.notes)
    if config.dtype == "bfloat16":
        notes.append(
            "--dtype bfloat16 keeps no float32 master weights: an update below 1/256 of a weight is lost, most of "
            "them at learning rates below 1e-4; --dtype float32 --bf16 true computes in bf16 and loses none"
        )
    stage = STAGES[config.stage](setting, train_rows, test_rows, notes)
    return Workbench(
        model, stage, tokenizer, lambda path: save_pretrained(model, tokenizer, path), train_rows.fingerprint, notes
    )


def tokenizer_of(config: TrainConfig) -> Any:
    """The tokenizer, or a message that names the flag: this is where a wrong model path shows first."""
    try:
        return load_tokenizer(config.model_name_or_path, revision=config.model_revision)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--model_name_or_path {config.model_name_or_path} cannot be loaded ({reason}); give a directory that "
            "save_pretrained wrote, or the name of a model on the hub"
        ) from error


def held_out_rows(config: TrainConfig) -> Rows | None:
    """The evaluation split, or None when nothing will be evaluated."""
    if config.eval_strategy == "no" and not config.eval_on_start:
        return None
    return load(config.dataset_name, config.dataset_test_split, config.dataset_config)


def model_options(config: TrainConfig) -> dict[str, Any]:
    return {
        "dtype": DTYPES[config.dtype],
        "attn_implementation": config.attn_implementation,
        "revision": config.model_revision,
    }


def load_model(config: TrainConfig, path: str, tokenizer: Any, device: torch.device) -> PackedModel:
    model = load_causal_lm(path, **model_options(config), tokenizer=tokenizer).to(device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Dropout modules, and the rates that attention layers pass to their kernels."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


# -- stages: rows of a dataset -> samples or prompts ---------------------------------------------------------------
def limits_of(config: DatasetConfig, model: PackedModel) -> Limits:
    return Limits(config.max_length, model.context_length, config.truncation, config.max_dropped_fraction)


def noted(notes: list[str], split: str, made: tuple[list, Report]) -> list:
    """What was made of the rows; what happened to them on the way goes to the notes."""
    items, report = made
    notes += [f"{split}: {line}" for line in report.lines()]
    return items


def sft_stage(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> SFTStage:
    config: SFTConfig = setting.config
    options = {
        "completion_only_loss": config.completion_only_loss,
        "assistant_only_loss": config.assistant_only_loss,
    }

    def encode(rows: Rows | None, split: str) -> list:
        limits = limits_of(config, setting.model)
        return [] if rows is None else noted(notes, split, encode_sft(rows, setting.tokenizer, limits, **options))

    return SFTStage(setting, encode(train, "train"), encode(test, "test"))


def dpo_stage(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> DPOStage:
    def encode(rows: Rows | None, split: str) -> list:
        if rows is None:
            return []
        limits = limits_of(setting.config, setting.model)
        flat = noted(notes, split, encode_dpo(rows, setting.tokenizer, limits))
        return list(zip(flat[0::2], flat[1::2], strict=True))

    return DPOStage(setting, encode(train, "train"), encode(test, "test"))


def grpo_stage(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> GRPOStage:
    config: GRPOConfig = setting.config
    context = setting.model.context_length
    room = None if context is None else context - config.max_completion_length
    if room is not None and room < 1:
        raise DataError(
            f"--max_completion_length {config.max_completion_length} leaves no room for a prompt in the model's "
            f"context of {context} tokens; lower it"
        )
    known = [n for n in (room, config.max_prompt_length) if n is not None]
    longest = min(known) if known else None

    def encode(rows: Rows | None, split: str) -> list:
        if rows is None:
            return []
        return noted(notes, split, encode_prompts(rows, setting.tokenizer, longest, config.max_dropped_fraction))

    sampler = TransformersSampler(setting.model.model, setting.tokenizer)
    scorer = load_rewards(config.reward_funcs, config.reward_weights, setting.tokenizer)
    return GRPOStage(setting, encode(train, "train"), encode(test, "test"), sampler, scorer)


STAGES = {"sft": sft_stage, "dpo": dpo_stage, "grpo": grpo_stage}
