"""What the flags say about adapters and quantised weights, done to a model that was just loaded."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.models import PackedModel
from fastrl.models.adapters import TRAINED, AdapterOptions, AdapterReference, add_adapters, load_reference_adapter
from fastrl.models.load import base_of
from fastrl.models.quantised import Quantisation, load_options
from fastrl.train.config import TrainConfig
from fastrl.train.flags import ConfigError

# Flags that a directory of adapters has an answer of its own to -> its name for them.
KEPT = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}


def options_of(config: TrainConfig) -> AdapterOptions:
    targets = config.lora_target_modules or ["all-linear"]
    return AdapterOptions(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=targets[0] if len(targets) == 1 and not targets[0].isidentifier() else targets,
        target_parameters=config.lora_target_parameters,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def quantisation_of(config: TrainConfig, dtype: torch.dtype | str, device: torch.device) -> dict[str, Any]:
    """Options of the loaders: nothing, or the `quantisation` that the flags ask for."""
    if config.quantised is None:
        return {}
    bits = 4 if config.load_in_4bit else 8
    how = Quantisation(bits, config.bnb_4bit_quant_type, config.use_bnb_nested_quant, config.bnb_4bit_quant_storage)
    return {"quantisation": load_options(how, dtype, device)}


def adapt(model: PackedModel, config: TrainConfig, with_reference: bool) -> None:
    """Give the model (of an ActorCritic: the policy) its adapters, unless it was loaded with some.

    with_reference: a run that starts from adapters needs them once more, frozen, to be held against.
    Raises ConfigError where flags and loaded adapters contradict each other.
    """
    policy, start = getattr(model, "actor", model), config.model_name_or_path
    if not config.use_peft:
        if policy.adapters is not None:
            raise ConfigError(
                f"--model_name_or_path {start} holds adapters; add --use_peft true to train them on, or merge them "
                "into their base first (fastrl.models.adapters.merge_adapters)"
            )
        return
    if policy.adapters is None:
        add_adapters(policy, options_of(config))
    else:
        check_same(policy, config)
    if with_reference and base_of(start) is not None:
        load_reference_adapter(policy, start)


def check_same(policy: PackedModel, config: TrainConfig) -> None:
    """Raises ConfigError for a flag that was given and that the loaded adapters answer otherwise."""
    saved = policy.adapters.handle.peft_config[TRAINED]
    for name, theirs in KEPT.items():
        value, own = getattr(config, name), getattr(saved, theirs)
        if value != config.__dataclass_fields__[name].default and value != own:
            raise ConfigError(f"--{name} {value}: the adapters that training goes on from have {own}; drop the flag")


def start_of(model: PackedModel) -> AdapterReference:
    """The reference of an adapted model (of an ActorCritic: the policy)."""
    return AdapterReference(getattr(model, "actor", model))
