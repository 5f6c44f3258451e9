"""Models back to a directory that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrl.models.actor_critic import CRITIC, ActorCritic
from fastrl.models.packed import PackedModel


def save_pretrained(model: PackedModel | ActorCritic, tokenizer: Any, directory: str | Path, **options: Any) -> None:
    """Model (safetensors) and tokenizer, so that plain transformers loads them with the same log-probs.

    Tied embeddings are stored once and tied again on loading. options: of transformers' save_pretrained (state_dict for
    weights gathered elsewhere, max_shard_size). A policy's critic goes to the folder value_model inside.
    """
    model.model.save_pretrained(directory, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if isinstance(model, ActorCritic):
        save_pretrained(model.critic, tokenizer, Path(directory) / CRITIC)
