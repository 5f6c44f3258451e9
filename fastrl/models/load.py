"""Models and tokenizers from a directory or hub name. No code that comes with a model is run, nothing is unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastrl.models.attention import NAMES, UnsupportedModelError
from fastrl.models.check import check_parity, pack_model
from fastrl.models.outline import believed, fact
from fastrl.models.packed import PackedModel
from fastrl.models.quantised import quantised_parameters, settle

# The packed one (None), or one of transformers' own by name. A hub path here would fetch a kernel, which is code.
ATTENTION = (*NAMES.values(), "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")


def load_causal_lm(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    *,
    revision: str = "main",
    tokenizer: Any = None,
    quantisation: dict[str, Any] | None = None,
) -> PackedModel:
    """Any transformers causal LM, checked against its own logits on two short packed documents.

    Args:
        path: directory or hub name; a directory of PEFT's adapters gives their base with them on it.
        dtype: of the weights; None means float32, "auto" the saved one.
        attn_implementation: None is the packed one. "flash_attention_2" and _3 are transformers' own, packed too;
            "sdpa", "eager" and "flex_attention" are run one sequence at a time.
        tokenizer: if given, its vocabulary must fit the model's.
        quantisation: keywords of from_pretrained that quantise the body (fastrl.models.quantised).

    Raises: UnsupportedModelError for an architecture that only runs with code of its own, has no linear head, or whose
        logits are not those of its head; ValueError if the directory lacks a model or weights of it, if the tokenizer
        knows more tokens than the model, or if attn_implementation is not in ATTENTION.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    packs = is_packed(attn_implementation)
    if (base := base_of(path)) is not None:
        how = {"revision": base.revision, "tokenizer": tokenizer, "quantisation": quantisation}
        return with_adapters(load_causal_lm(base.path, dtype, attn_implementation, **how), path)
    refuse_foreign_code(path, revision)
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(f"{path} is a {config.model_type!r} model, no causal LM that transformers knows")
    how = {"dtype": dtype, "attn_implementation": attn_implementation, "quantisation": quantisation}
    model = read_model(AutoModelForCausalLM, path, revision=revision, **how)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model, path)
    if packs:
        return pack_model(model)
    packed = PackedModel(model)
    believed(packed, lambda: check_parity(packed))
    return packed


def load_reference(path: str | Path, dtype=None, attn_implementation: str | None = None, **options: Any) -> PackedModel:
    """A frozen copy in eval mode: no gradient, no dropout. Arguments as load_causal_lm."""
    return load_causal_lm(path, dtype, attn_implementation, **options).requires_grad_(False).eval()


def is_packed(attn_implementation: str | None) -> bool:
    """Whether this attention is asked to take several sequences in one call. Raises ValueError for an unknown one."""
    if attn_implementation is not None and attn_implementation not in ATTENTION:
        known = ", ".join(ATTENTION)
        raise ValueError(f"attn_implementation is {attn_implementation!r}; expected None or one of {known}")
    return attn_implementation in (None, *NAMES.values()) or attn_implementation.startswith("flash_attention")


def read_model(
    auto: Any,
    path: str | Path,
    *,
    revision: str,
    dtype: torch.dtype | str | None,
    attn_implementation: str | None,
    quantisation: dict[str, Any] | None,
    fresh: tuple[str, ...] = (),
    **changes: Any,
) -> nn.Module:
    """transformers' model of class `auto` with every weight that the directory should have.

    fresh: beginnings of names of weights that may be missing and are drawn. changes: of the configuration. Inside
    `without_weights` the same model on the meta device; one that is kept quantised is read there too.
    """
    from transformers import AutoConfig, GenerationConfig

    attention = {"attn_implementation": None if attn_implementation in NAMES.values() else attn_implementation}
    options = {"revision": revision, "trust_remote_code": False, **changes}
    model: nn.Module | None = None

    def read() -> dict[str, Any]:
        nonlocal model
        model, found = auto.from_pretrained(
            path,
            dtype=torch.float32 if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
            **attention,
            **options,
            **(quantisation or {}),
        )
        if quantisation:
            settle(model)
        missing = [key for key in found["missing_keys"] if not key.startswith(fresh)]
        refuse_incomplete(path, {**found, "missing_keys": missing})
        generation = getattr(model, "generation_config", None)
        return {
            "dtype": str(model.config.dtype).removeprefix("torch."),
            "generation": None if generation is None else json.loads(generation.to_json_string(use_diff=False)),
            "quantised": bool(quantised_parameters(model)) or getattr(model, "hf_quantizer", None) is not None,
        }

    told = fact(read)
    if model is None and told["quantised"]:
        read()
    if model is None:
        config = AutoConfig.from_pretrained(path, **options)
        with torch.device("meta"):
            model = auto.from_config(config, dtype=getattr(torch, told["dtype"]), **attention).eval()
        if told["generation"] is not None:
            model.generation_config = GenerationConfig.from_dict(told["generation"])
    return model


class Base(NamedTuple):
    """What adapters were made for: directory or hub name, and its revision."""

    path: str
    revision: str


def base_of(path: str | Path) -> Base | None:
    """The base of a directory of PEFT's adapters; None for any other place. Needs no PEFT.

    Raises ValueError if the adapters do not say what their base is, or lie in the directory of a model.
    """
    config = Path(path) / "adapter_config.json"
    if not config.is_file():
        return None
    if (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} holds a model and adapters (adapter_config.json); give each a directory of its own")
    said = json.loads(config.read_text(encoding="utf-8"))
    if not said.get("base_model_name_or_path"):
        raise ValueError(f"{config} names no base_model_name_or_path; write there what the adapters were trained on")
    return Base(said["base_model_name_or_path"], said.get("revision") or "main")


def with_adapters(packed: PackedModel, path: str | Path) -> PackedModel:
    """The adapters of a directory, trainable, on their base."""
    from fastrl.models.adapters import load_adapters

    load_adapters(packed, path)
    return packed


def load_tokenizer(path: str | Path, *, revision: str = "main") -> Any:
    """The tokenizer saved with the model; that of their base for adapters without one.

    Raises UnsupportedModelError if it comes with code of its own.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if (base := base_of(path)) is not None and not (Path(path) / "tokenizer_config.json").is_file():
        path, revision = base
    refuse_foreign_code(path, revision, get_tokenizer_config(str(path), revision=revision))
    return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def refuse_foreign_code(path: str | Path, revision: str, config: dict | None = None) -> None:
    """Raises UnsupportedModelError if the configuration names code to import (auto_map), ValueError if it is absent."""
    from transformers import PretrainedConfig

    place = Path(path)
    if config is None and (place.is_dir() or place.is_absolute()) and not (place / "config.json").is_file():
        raise ValueError(f"{path} is no model directory: it has no config.json")
    if config is None:
        config, _ = PretrainedConfig.get_config_dict(str(path), revision=revision)
    if config.get("auto_map"):
        raise UnsupportedModelError(
            f"{path} comes with code of its own (auto_map: {', '.join(sorted(config['auto_map']))}), which is never "
            "run. If transformers knows the architecture, copy the model and delete auto_map from its configuration"
        )


def refuse_incomplete(path: str | Path, found: dict) -> None:
    """transformers fills missing weights with random numbers; nobody wants to train those."""
    lacking = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if lacking:
        raise ValueError(
            f"{path} lacks {len(lacking)} weights of the model, or has them in another shape: {', '.join(lacking[:4])}"
        )


def check_vocabulary(tokenizer: Any, model: Any, path: str | Path = "") -> None:
    """Raises ValueError if the tokenizer knows a token that the model's embedding or head has no row for."""
    largest = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    rows = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
    if largest > rows:
        raise ValueError(
            f"the tokenizer of {path} has {largest} tokens but the model only {rows} rows for them; use the tokenizer "
            "it was trained with, or resize the model's embeddings and save it first"
        )
