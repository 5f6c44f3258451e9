"""A head module, as it computes now, as one linear map: logits = hidden . weight^T + bias. Adapters included.

LoRA on the head is exact as extra columns of both sides, dropout and all:

    W h + sum_a s_a B_a (A_a h)  =  [W | B_1 | B_2 ...] . [h | s_1 A_1 h | s_2 A_2 h ...]

The other way, an effective weight W + s B A, costs the same [V, H] of memory and rounds the small product away when W
is bfloat16. In both ways the gradient of the whole [V, H + r] is made where only B's is wanted: a trained adapter on
the head costs what a trained head does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrl.models.attention import UnsupportedModelError
from fastrl.models.head import LMHead


class LinearForm(NamedTuple):
    """hidden [..., K], weight [V, K], bias [V] or None, in the weight's dtype; K is H plus the ranks of adapters."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class LowRank(NamedTuple):
    """One adapter: scale * up(down(dropout(h))), down [r, H] and up [V, r] linear layers."""

    down: nn.Linear
    dropout: nn.Module
    up: nn.Linear
    scale: float


@dataclass(frozen=True)
class Parts:
    """A head module taken apart, as it stands now.

    linear: the layer at the bottom. adapters: those that are on. rows: PEFT's layer of trainable tokens, some rows of
    the weight being its own.
    """

    linear: nn.Linear
    adapters: tuple[LowRank, ...] = ()
    rows: nn.Module | None = None


def linear_form(module: nn.Module, hidden: Tensor, read: Callable[[Tensor], Tensor] = lambda x: x) -> LinearForm:
    """`module(hidden)` written as one linear map. Raises UnsupportedModelError for a module that is none, by name.

    read: what gives a whole weight, for a caller outside of the module's own call whose weights may be sharded.
    """
    parts = parts_of(module)
    weight, bias = read(parts.linear.weight), None if parts.linear.bias is None else read(parts.linear.bias)
    if parts.rows is not None:  # PEFT leaves the bias out here
        weight, bias = parts.rows.get_merged_weights(parts.rows.active_adapters), None
    sides, weights = [hidden.to(weight.dtype)], [weight]
    for down, dropout, up, scale in parts.adapters:
        columns = F.linear(dropout(hidden.to(down.weight.dtype)), read(down.weight)) * scale
        sides.append(columns.to(weight.dtype))
        weights.append(read(up.weight).to(weight.dtype))
        if up.bias is not None:
            shift = read(up.bias) * scale
            bias = shift if bias is None else bias + shift
    if not parts.adapters:
        return LinearForm(sides[0], weight, bias)
    return LinearForm(torch.cat(sides, -1), torch.cat(weights, 1), bias)


def parts_of(module: nn.Module) -> Parts:
    """Raises UnsupportedModelError, by name, for a module that is no linear map as it stands."""
    # Sharding gives a module a class of its own, below the one it had.
    if any(kind.__module__.startswith("peft.") for kind in type(module).__mro__):
        return _wrapped(module)
    if isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, LMHead.forward):
        return Parts(module)
    raise UnsupportedModelError(
        f"the LM head is a {type(module).__module__}.{type(module).__qualname__}, which is no plain linear layer; the "
        "fused operators read torch.nn.Linear, and PEFT's LoRA and modules_to_save over it"
    )


def _wrapped(module: nn.Module) -> Parts:
    """What PEFT's own forward of these modules does with adapters that are merged, disabled or not there."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    from fastrl.models.lora_head import LoraHead

    if isinstance(module, ModulesToSaveWrapper):
        copies = [module.modules_to_save[name] for name in module.active_adapters if name in module.modules_to_save]
        return parts_of(module.original_module if module.disable_adapters or not copies else copies[0])
    layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
    lora = isinstance(layer, LoraLinear) and type(layer).forward in (LoraLinear.forward, LoraHead.forward)
    if not lora and layer is module:
        raise UnsupportedModelError(
            f"the LM head is wrapped by PEFT's {type(module).__qualname__}, which has no fused form here; LoRA on a "
            "plain linear head, modules_to_save=['lm_head'] and trainable_token_indices have"
        )
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    parts = parts_of(layer.base_layer)
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return parts
    if not lora:
        return replace(parts, rows=layer)
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return replace(parts, adapters=parts.adapters + tuple(_low_rank(layer, name) for name in names))


def _low_rank(layer: nn.Module, name: str) -> LowRank:
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None or getattr(layer, "use_dora", {}).get(name, False):
        kind = "DoRA" if variant is None else type(variant).__name__
        raise UnsupportedModelError(
            f"adapter {name!r} on the LM head is a {kind}, which rescales whole rows of the head and is no sum of low "
            "ranks; leave lm_head out of its target_modules, or use plain LoRA there"
        )
    return LowRank(layer.lora_A[name], layer.lora_dropout[name], layer.lora_B[name], layer.scaling[name])
