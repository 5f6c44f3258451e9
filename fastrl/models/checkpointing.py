"""Gradient checkpointing of decoder layers: which values wait for the backward, and where.

transformers hands each layer's forward to the function that its modules carry as `_gradient_checkpointing_func`; ours
takes the place of torch's. The packing is bound into what is handed over, so a recomputed layer reads it again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastrl.models import tiled_mlp
from fastrl.models.compiled import compiled
from fastrl.models.offload import Offloader
from fastrl.models.packed import PackedModel

PRODUCTS = {"aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm"}  # of activations and weights


def checkpoint_layers(
    packed: PackedModel, policy: str = "full", offloader: Offloader | None = None, compiling: bool = False
) -> None:
    """Recompute each layer in the backward (non-reentrant), where the architecture supports it; else a note.

    policy: full keeps each layer's input; selective also attention and every other matrix product, so that less than
    half of the arithmetic is done twice. offloader: where the inputs wait. compiling: the layers are compiled.

    Raises ValueError for another policy.
    """
    if policy not in ("full", "selective"):
        raise ValueError(f"policy is {policy!r}; expected full or selective")
    packed.gradient_checkpointing_enable()
    products = not any("expert" in name for name, _ in packed.model.named_modules())
    if policy == "selective" and not products:  # experts add up in place, so a product may not be what it was
        packed.notes.append(f"selective checkpointing of {packed.name} keeps attention alone, for it has experts")
    function = checkpoint_function(policy, offloader, compiling, products)
    for module in packed.model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = function


def checkpoint_function(
    policy: str, offloader: Offloader | None, compiling: bool, products: bool = True
) -> Callable[..., Any]:
    """What transformers calls as run(forward of a layer with its keywords bound, hidden states, ...)."""
    options = {"context_fn": functools.partial(selective_contexts, products)} if policy == "selective" else {}

    def run(function: Callable[..., Any], *args: Any) -> Any:
        inner = compiled(function) if compiling else function
        with contextlib.nullcontext() if offloader is None else offloader.hooks():
            return checkpoint(inner, *args, use_reentrant=False, **options)

    # The layer inside is compiled; a compiler that came in through this call would have to follow the hooks too.
    return torch.compiler.disable(run) if compiling else run


# -- selective ---------------------------------------------------------------------------------------------------------
def selective_contexts(products: bool = True) -> tuple[Any, Any]:
    """Contexts of a forward and of its recomputation. Counting starts anew in every layer."""
    return create_selective_checkpoint_contexts(KeepSome(products))


class KeepSome:
    """Keep what attention gives, which costs the most to make again, and (products) every other matrix product."""

    def __init__(self, products: bool = True):
        self.products = products
        self.seen = {False: 0, True: 0}  # products so far, in the forward and in the recomputation

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = not tiled_mlp.is_running() and self._keep(context, op, args, kwargs)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def _keep(self, context: Any, op: Any, args: tuple, kwargs: dict) -> bool:
        name = _name(op)
        if name in PRODUCTS:
            self.seen[context.is_recompute] += 1
            return self.products and self.seen[context.is_recompute] % 2 == 0
        # An op that is not run again draws no random numbers again, and all later dropout would differ.
        return _is_attention(name) and not _drops(op, args, kwargs)


@functools.cache
def _name(op: Any) -> str:
    """aten::mm of aten.mm.default."""
    return op.name().split(".")[0]


@functools.cache
def _is_attention(name: str) -> bool:
    return "attention" in name or "attn" in name


def _drops(op: Any, args: tuple, kwargs: dict) -> bool:
    schema = getattr(op, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    given = dict(zip(names, args, strict=False)) | kwargs
    return any("dropout" in name and isinstance(x, float) and x > 0 for name, x in given.items())
