"""A head module, as it computes now, as one linear map: logits = hidden . weight^T + bias. Adapters included.

LoRA on the head is exact as extra columns of both sides, dropout and all:

    W h + sum_a s_a B_a (A_a h)  =  [W | B_1 | B_2 ...] . [h | s_1 A_1 h | s_2 A_2 h ...]

The other way, an effective weight W + s B A, costs the same [V, H] of memory and rounds the small product away when W
is bfloat16. In both ways the gradient of the whole [V, H + r] is made where only B's is wanted: a trained adapter on
the head costs what a trained head does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastrl.models import LMHead, UnsupportedModelError


class LinearForm(NamedTuple):
    """hidden [..., K], weight [V, K], bias [V] or None, in the weight's dtype; K is H plus the ranks of adapters."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def linear_form(module: nn.Module, hidden: Tensor) -> LinearForm:
    """`module(hidden)` written as one linear map. Raises UnsupportedModelError for a module that is none, by name."""
    if type(module).__module__.startswith("peft."):
        return _adapted(module, hidden)
    if isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, LMHead.forward):
        return LinearForm(hidden.to(module.weight.dtype), module.weight, module.bias)
    raise UnsupportedModelError(
        f"the LM head is a {type(module).__module__}.{type(module).__qualname__}, which is no plain linear layer; the "
        "fused operators read torch.nn.Linear, and PEFT's LoRA and modules_to_save over it"
    )


def check_linear(module: nn.Module) -> None:
    """Raises UnsupportedModelError, by name, if the module is no linear map as it stands."""
    weight = getattr(base_of(module), "weight", None)
    if weight is None:
        weight = torch.zeros(0, 0)
    with torch.no_grad():
        linear_form(module, weight.new_zeros((0, weight.shape[-1])))


def base_of(module: nn.Module) -> nn.Module:
    """The layer under PEFT's wrappers, for its sizes."""
    while type(module).__module__.startswith("peft."):
        inner = [getattr(module, name, None) for name in ("base_layer", "original_module")]
        module = next((x for x in inner if isinstance(x, nn.Module)), nn.Identity())
    return module


def _adapted(module: nn.Module, hidden: Tensor) -> LinearForm:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        copies = [module.modules_to_save[name] for name in module.active_adapters if name in module.modules_to_save]
        return linear_form(module.original_module if module.disable_adapters or not copies else copies[0], hidden)
    if type(module) is LoraLinear:
        return _low_rank(module, hidden)
    if isinstance(module, TrainableTokensWrapper):
        return _with_new_rows(module.token_adapter, hidden)
    raise UnsupportedModelError(
        f"the LM head is wrapped by PEFT's {type(module).__qualname__}, which has no fused form here; LoRA on a plain "
        "linear head, modules_to_save=['lm_head'] and trainable_token_indices have"
    )


def _with_new_rows(layer: nn.Module, hidden: Tensor) -> LinearForm:
    """PEFT's trainable tokens on a tied head: some rows of the weight are the adapter's, and a bias is left out."""
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        if layer.merged and layer.disable_adapters:
            layer.unmerge()
        return linear_form(layer.base_layer, hidden)
    base = linear_form(layer.base_layer, hidden)
    return LinearForm(base.hidden, layer.get_merged_weights(layer.active_adapters), None)


def _low_rank(module: nn.Module, hidden: Tensor) -> LinearForm:
    """PEFT's LoRA over a linear layer: what its forward does with merged and disabled adapters is done here too."""
    if module.disable_adapters and module.merged:
        module.unmerge()
    base = linear_form(module.base_layer, hidden)
    off = module.disable_adapters or module.merged
    names = [] if off else [name for name in module.active_adapters if name in module.lora_A]
    sides, weights, bias = [base.hidden], [base.weight], base.bias
    for name in names:
        _refuse_variant(module, name)
        down, up, scale = module.lora_A[name], module.lora_B[name], module.scaling[name]
        columns = down(module.lora_dropout[name](hidden.to(down.weight.dtype))) * scale
        sides.append(columns.to(base.hidden.dtype))
        weights.append(up.weight.to(base.weight.dtype))
        if up.bias is not None:
            bias = up.bias * scale if bias is None else bias + up.bias * scale
    if not names:
        return base
    return LinearForm(torch.cat(sides, -1), torch.cat(weights, 1), bias)


def _refuse_variant(module: nn.Module, name: str) -> None:
    variant = getattr(module, "lora_variant", {}).get(name)
    dora = getattr(module, "use_dora", {}).get(name, False)
    if variant is not None or dora:
        kind = "DoRA" if variant is None else type(variant).__name__
        raise UnsupportedModelError(
            f"adapter {name!r} on the LM head is a {kind}, which rescales whole rows of the head and is no sum of low "
            "ranks; leave lm_head out of its target_modules, or use plain LoRA there"
        )
