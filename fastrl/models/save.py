"""Models back to a directory that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastrl.models.actor_critic import CRITIC, ActorCritic
from fastrl.models.packed import PackedModel


def save_pretrained(
    model: PackedModel | ActorCritic,
    tokenizer: Any,
    directory: str | Path,
    *,
    state: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Model (safetensors) and tokenizer, so that plain transformers loads them with the same log-probs.

    Tied embeddings are stored once and tied again on loading. state: weights gathered from several ranks, under the
    names of model.state_dict(), those that `is_saved`; None: the model's own. options: of transformers' save_pretrained
    (max_shard_size, ...). A policy's critic goes to the folder value_model inside. Adapters are written without their
    base, as PEFT writes them.
    """
    pair = isinstance(model, ActorCritic)
    if state is not None:
        options["state_dict"] = below(state, "actor.model." if pair else "model.")
    adapters = getattr(model, "actor", model).adapters
    if adapters is None:
        model.model.save_pretrained(directory, **options)
    else:
        adapters.save(directory, options.get("state_dict"))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if pair:
        critic = None if state is None else below(state, "critic.")
        save_pretrained(model.critic, tokenizer, Path(directory) / CRITIC, state=critic)


def is_saved(model: PackedModel | ActorCritic, name: str) -> bool:
    """Whether `save_pretrained` writes the entry `name` of model.state_dict()."""
    if isinstance(model, ActorCritic):
        part, _, name = name.partition(".")
        model = getattr(model, part)
    return model.adapters is None or model.adapters.saved(name.removeprefix("model."))


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
