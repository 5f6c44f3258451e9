"""Everything a run needs before its first step: device, seeds, model, tokenizer, data and the stage that joins them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from fastrl.data import Rows, load
from fastrl.models import PackedModel, load_causal_lm, load_reference, load_tokenizer, save_pretrained
from fastrl.train.config import TrainConfig
from fastrl.train.flags import ConfigError
from fastrl.train.output_dir import Run
from fastrl.train.stages import distill, dpo, grpo, kto, ppo, prm, reward, rloo, sft
from fastrl.train.stages.base import Setting, Stage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "auto": "auto"}
REFERENCE = "reference"  # in a checkpoint: a reference model that has moved (sync_ref_model)


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
    if getattr(config, "needs_reference", getattr(config, "beta", 0.0)):
        reference = load_reference(reference_of(config, run), **model_options(config), tokenizer=tokenizer).to(device)
    autocast = torch.bfloat16 if (device.type == "cuda" if config.bf16 is None else config.bf16) else None
    setting = Setting(config, model, reference, tokenizer, device, autocast)
    notes = list(model.notes)
    if config.dtype == "bfloat16":
        notes.append(
            "--dtype bfloat16 keeps no float32 master weights: an update below 1/256 of a weight is lost, most of "
            "them at learning rates below 1e-4; --dtype float32 --bf16 true computes in bf16 and loses none"
        )
    stage = STAGES[config.stage](setting, train_rows, test_rows, notes)

    def save_model(path: Path) -> None:
        save_pretrained(model, tokenizer, path)
        if getattr(config, "sync_ref_model", False):
            save_pretrained(setting.reference, None, path / REFERENCE)

    return Workbench(model, stage, tokenizer, save_model, train_rows.fingerprint, notes)


def reference_of(config: TrainConfig, run: Run) -> str:
    """Where the reference is loaded from: the starting model, or the checkpoint to go on from if it moved."""
    moved = None if run.resume is None else run.resume.path / REFERENCE
    return str(moved) if moved is not None and moved.is_dir() else config.model_name_or_path


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
    options = {**model_options(config), "tokenizer": tokenizer}
    loader = LOADERS.get(config.stage)
    model = (load_causal_lm(path, **options) if loader is None else loader(config, path, options)).to(device)
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


STAGES = {
    "sft": sft.build,
    "dpo": dpo.build,
    "grpo": grpo.build,
    "kto": kto.build,
    "reward": reward.build,
    "prm": prm.build,
    "ppo": ppo.build,
    "distill": distill.build,
    "rloo": rloo.build,
}
# Stages whose model is no causal LM: (config, path, options of the loaders) -> model.
LOADERS = {"reward": reward.load_model, "prm": prm.load_model, "ppo": ppo.load_model}
