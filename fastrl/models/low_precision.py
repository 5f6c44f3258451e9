"""Parts of a model that compute in another precision than the rest: float8 products, float32 norms and routers."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastrl.models.tiled_mlp import decoder_layers

CAPABILITY = (8, 9)  # Ada and later multiply in float8


# -- float8 ------------------------------------------------------------------------------------------------------------
def convert_to_float8(
    model: nn.Module, head: nn.Module, recipe: str, device: torch.device, emulate: bool = False
) -> list[str]:
    """Let the body's linear layers multiply in float8, scaled anew at every call (torchao.float8), in place.

    Weights stay as they are. Left alone: the head, frozen layers, and those whose sides are no multiples of 16.
    Returns notes. recipe: tensorwise, rowwise or rowwise_with_gw_hp (torchao's names). emulate: round as float8 does
    but multiply in the old precision; runs on any device, for tests.

    Raises ValueError for a device that cannot, without torchao, or for an unknown recipe.
    """
    if not emulate and (why := _no_float8(device)):
        raise ValueError(f"--fp8 {recipe} needs a GPU of compute capability 8.9 or higher, {why}; --bf16 true works")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"--fp8 {recipe} needs torchao: pip install torchao")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    # The gradient of a weight multiplies over tokens, of which there may be any number.
    config = dataclasses.replace(config, pad_inner_dim=True, emulate=emulate)
    chosen = {id(m) for m in model.modules() if m is not head and _takes_float8(m)}
    if not chosen:
        raise ValueError(f"--fp8 {recipe} finds no linear layer in {type(model).__name__} that it could convert")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: id(module) in chosen)
    return [f"{len(chosen)} linear layers multiply in float8 ({recipe}); this changes results"]


def _no_float8(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= CAPABILITY else f"this one has {capability[0]}.{capability[1]}"


def _takes_float8(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.requires_grad and not any(n % 16 for n in module.weight.shape)


# -- float32 -----------------------------------------------------------------------------------------------------------
def compute_in_float32(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    """Let the modules whose names match compute in float32 whatever autocast says around them, in place.

    Raises ValueError for a pattern that nothing matches, for head, embedding and whole layers, and for weights that
    are not float32: rounded before they are used, they would gain nothing.
    """
    whole = {id(m) for m in (model.get_output_embeddings(), model.get_input_embeddings(), *decoder_layers(model))}
    found = []
    for pattern in patterns:
        matched = matching(model, pattern)
        if not matched:
            raise ValueError(f"--fp32_modules {pattern} matches no module of {type(model).__name__}")
        found += [m for m in matched if m not in found]
    for module in found:
        if any(id(m) in whole for m in module.modules()):
            raise ValueError("--fp32_modules names parts of layers or the last norm, not layers, embedding or head")
        if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
            raise ValueError("--fp32_modules needs float32 weights: --dtype float32 with --bf16 true")
        if not isinstance(module, Float32):
            module.__class__ = _in_float32(type(module))
    return found


def matching(model: nn.Module, pattern: str) -> list[nn.Module]:
    """Modules whose dotted name, or an end of it from some dot on, matches: *norm, mlp.gate, layers.0.self_attn.

    Of nested ones the outermost.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts))] if name else []
        if any(fnmatchcase(end, pattern) for end in ends) and not any(name.startswith(f"{n}.") for n in found):
            found[name] = module
    return list(found.values())


@functools.cache
def _in_float32(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Float32{kind.__name__}", (Float32, kind), {})


class Float32(nn.Module):
    """Before a module's own class among its bases: its inputs become float32, and autocast is off inside.

    An output of the input's shape goes back to its dtype, so that a norm leaves the residual stream as it was; any
    other, such as a router's scores, stays float32.
    """

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        shape, dtype = hidden.shape, hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, args, kwargs = tree_map_only(Tensor, _wide, (hidden, args, kwargs))
            out = super().forward(hidden, *args, **kwargs)
        return tree_map_only(Tensor, lambda x: x.to(dtype) if x.shape == shape else x, out)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x
