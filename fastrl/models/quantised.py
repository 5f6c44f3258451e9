"""Base weights in 4 or 8 bits through bitsandbytes (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

The linear layers of the body are quantised as they are loaded. Embedding and head stay as they are: the fused
operators read the head. What is trained are adapters over them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantisation:
    """bits: 4 or 8. quant_type: nf4 or fp4. nested: the quantisation constants in 8 bits too. storage: dtype that the
    packed 4-bit values are kept as, None: uint8."""

    bits: int
    quant_type: str = "nf4"
    nested: bool = False
    storage: str | None = None


def load_options(how: Quantisation, dtype: torch.dtype | str, device: torch.device) -> dict[str, Any]:
    """Keywords for from_pretrained. Needs bitsandbytes when the model is loaded.

    dtype: of the weights; 4-bit layers compute in it (TRL's rule), "auto" in bfloat16. transformers leaves the head
    out by itself, whether of words or of scores.
    """
    from transformers import BitsAndBytesConfig

    if how.bits == 8:
        made = BitsAndBytesConfig(load_in_8bit=True)
    else:
        made = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
            bnb_4bit_quant_type=how.quant_type,
            bnb_4bit_use_double_quant=how.nested,
            bnb_4bit_quant_storage=how.storage,
        )
    return {"quantization_config": made, "device_map": {"": str(device)}}


def settle(model: nn.Module) -> None:
    """What a model that was loaded quantised needs to be trained here.

    accelerate's hooks go, which move inputs between devices: there is one. bitsandbytes' layers stay in training mode:
    in eval mode they round otherwise on a CPU, so that a reference would differ from a policy that is still the same,
    and on some CPUs they change their weights to a form that has no gradient.
    """
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every cast, at every call
    for module in model.modules():
        if is_quantised(module):
            module.training, module.train = True, MethodType(_stay, module)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def is_quantised(x: Tensor | nn.Module) -> bool:
    """Whether a parameter holds packed bits of bitsandbytes, which only its own layer can read; or is such a layer."""
    return type(x).__module__.split(".")[0] == "bitsandbytes"


def quantised_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Those parameters: whole on every rank, since a part of a packed weight cannot be read."""
    return {x for x in module.parameters() if is_quantised(x)}
