"""Models and tokenizers from a directory or hub name, and back to one. No code that comes with a model is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastrl.models.attention import register
from fastrl.models.packed import PackedModel, UnsupportedModelError, check_parity


def load_causal_lm(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    *,
    revision: str = "main",
    tokenizer: Any = None,
) -> PackedModel:
    """Any transformers causal LM, checked against its own logits on two short packed documents.

    Args:
        path: directory or hub name. dtype: of the weights; None means float32, "auto" the saved one.
        attn_implementation: None is the packed one; any of transformers' others runs one sequence at a time.
        tokenizer: if given, its vocabulary must fit the model's.

    Raises: UnsupportedModelError for an architecture that only runs with code of its own, has no linear head, or whose
        logits are not those of its head; ValueError if the tokenizer knows more tokens than the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(f"{path} is a {config.model_type!r} model, which is no causal LM that transformers knows")
    model = AutoModelForCausalLM.from_pretrained(
        path,
        revision=revision,
        dtype=torch.float32 if dtype is None else dtype,
        attn_implementation=attn_implementation or register(),
        trust_remote_code=False,
    )
    packed = PackedModel(model)
    vocabulary = packed.head.weight.shape[0]
    if tokenizer is not None and len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens but the model's head only {vocabulary}; use the "
            "tokenizer it was trained with, or resize the model's embeddings and save it first"
        )
    check_parity(packed)
    return packed


def load_reference(path: str | Path, dtype=None, attn_implementation: str | None = None, **options: Any) -> PackedModel:
    """A frozen copy in eval mode: no gradient, no dropout. Arguments as load_causal_lm."""
    return load_causal_lm(path, dtype, attn_implementation, **options).requires_grad_(False).eval()


def load_tokenizer(path: str | Path, *, revision: str = "main") -> Any:
    """The tokenizer saved with the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def save_pretrained(model: PackedModel, tokenizer: Any, directory: str | Path) -> None:
    """Model (safetensors) and tokenizer, so that plain transformers loads them with the same log-probs."""
    model.model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
