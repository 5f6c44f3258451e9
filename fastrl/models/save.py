"""Models back to a directory that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrl.models.packed import PackedModel


def save_pretrained(model: PackedModel, tokenizer: Any, directory: str | Path, **options: Any) -> None:
    """Model (safetensors) and tokenizer, so that plain transformers loads them with the same log-probs.

    Tied embeddings are stored once and tied again on loading. options: of transformers' save_pretrained (state_dict for
    weights gathered elsewhere, max_shard_size).
    """
    model.model.save_pretrained(directory, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
