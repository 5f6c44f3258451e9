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
from fastrl.models import PackedModel, activations, load_causal_lm, load_reference, load_tokenizer, save_pretrained
from fastrl.models.adapters import merge_adapters
from fastrl.models.ulysses import split_sequences
from fastrl.train import adapted
from fastrl.train.combinations import Facts, check_model
from fastrl.train.config import TrainConfig
from fastrl.train.flags import ConfigError
from fastrl.train.output_dir import Run
from fastrl.train.parallel import ShardOptions, World, reshard, roots, shard
from fastrl.train.stages import distill, dpo, grpo, kto, ppo, prm, reward, rloo, sft
from fastrl.train.stages.base import Setting, Stage
from fastrl.train.step import ALONE
from fastrl.train.together import gathered, loaded

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

    def merge(self, path: Path) -> None:
        """Beside the adapters saved in `path` the model that they and their base make, where it was asked for."""
        config = self.stage.setting.config
        if config.merge_adapters:
            merge_adapters(path, DTYPES[config.dtype], self.tokenizer)


def build(config: TrainConfig, run: Run, world: World = ALONE) -> Workbench:
    """Load the data first (its errors are cheap to meet), then the models, then the stage."""
    transformers.utils.logging.disable_progress_bar()  # the run has a bar of its own
    transformers.utils.logging.set_verbosity_error()  # lengths are checked and reported here
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    device = world.device
    train_rows = load(config.dataset_name, config.dataset_train_split, config.dataset_config)
    test_rows = held_out_rows(config)
    tokenizer = tokenizer_of(config)
    start = config.model_name_or_path if run.resume is None else str(run.resume.path)
    autocast = torch.bfloat16 if (device.type == "cuda" if config.bf16 is None else config.bf16) else None
    model = load_model(config, start, tokenizer, world, autocast)
    model.train()
    if getattr(config, "disable_dropout", False):
        disable_dropout(model)
    reference = reference_model(config, run, model, tokenizer, world, autocast)
    if world.dp_rank:  # what the ranks draw from here on (dropout) differs; new weights above did not
        torch.manual_seed(config.seed + world.dp_rank)
    setting = Setting(config, model, reference, tokenizer, device, autocast, world)
    notes = [*model.notes, *check_model(config, Facts(device.type, world.size))]
    del reference  # the stage may let it go
    stage = STAGES[config.stage](setting, train_rows, test_rows, notes)

    def save_model(path: Path) -> None:
        """On every rank: the weights are gathered before anything is written, and rank 0 writes."""
        moved = setting.reference if getattr(config, "sync_ref_model", False) else None
        state, moved_state = gathered(model, world), None if moved is None else gathered(moved, world)
        if world.is_main:
            save_pretrained(model, tokenizer, path, state=state)
        if world.is_main and moved is not None:
            save_pretrained(moved, None, path / REFERENCE, state=moved_state)

    return Workbench(model, stage, tokenizer, save_model, train_rows.fingerprint, notes)


def needs_reference(config: TrainConfig) -> bool:
    return bool(getattr(config, "needs_reference", getattr(config, "beta", 0.0)))


def reference_model(
    config: TrainConfig, run: Run, model: PackedModel, tokenizer: Any, world: World, autocast: torch.dtype | None
):
    """A frozen copy of the starting model; under adapters their base, which is there; None where nothing reads it."""
    if not needs_reference(config):
        return None
    if config.use_peft:
        return adapted.start_of(model)

    def load() -> PackedModel:
        reference = load_reference(reference_of(config, run), **model_options(config), tokenizer=tokenizer)
        activations.apply(reference, switches_of(config).scoring(), world.device)
        return reference

    return placed(loaded(world, load), config, world, autocast)


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


def load_model(config: TrainConfig, path: str, tokenizer: Any, world: World, autocast: torch.dtype | None):
    """Weights, then adapters, then what saves activations, then the split over the ranks: each sees the one before."""
    options = {**model_options(config), "tokenizer": tokenizer}
    options |= adapted.quantisation_of(config, options["dtype"], world.device)
    loader = LOADERS.get(config.stage)

    def load() -> PackedModel:
        model = load_causal_lm(path, **options) if loader is None else loader(config, path, options)
        adapted.adapt(model, config, needs_reference(config))
        activations.apply(model, switches_of(config), world.device)
        return model

    return placed(loaded(world, load), config, world, autocast)


def switches_of(config: TrainConfig) -> activations.Switches:
    return activations.Switches(
        checkpointing=config.gradient_checkpointing,
        policy=config.gradient_checkpointing_policy,
        offload=config.activation_offloading,
        tiled_mlp=activations.AUTO if config.tiled_mlp == "auto" else config.tiled_mlp,
        compile=config.torch_compile,
        fp8=config.fp8,
        float32=tuple(config.fp32_modules),
    )


def placed(model: PackedModel, config: TrainConfig, world: World, autocast: torch.dtype | None) -> PackedModel:
    """On its device, or split over those of all ranks."""
    if world.size == 1:
        return model.to(world.device)
    shard(model, world, ShardOptions(config.reshard_after_forward, config.cpu_offload, autocast))
    if world.sequence_group is not None:
        for root in roots(model):
            split_sequences(root, world.sequence_group)
        reshard(model)
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
