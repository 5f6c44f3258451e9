"""torch.compile, one decoder layer at a time: short to compile, and checkpointing and sharding go along.

Attention stays outside: it reads the packing, whose lists differ in every micro-batch, and calls a kernel that a
compiler could not better. Token counts are symbols, so another pack needs no new code.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastrl.models.attention import register
from fastrl.models.tiled_mlp import TiledMLP, decoder_layers

BACKEND = "inductor"


def compile_layers(model: nn.Module, device: torch.device) -> list[str]:
    """Compile every decoder layer, in place. Returns notes. Raises ValueError where no compiler is installed."""
    if lacking := missing_compiler(device):
        raise ValueError(f"--torch_compile needs {lacking}; install one, or drop the flag")
    hide_attention()
    layers = decoder_layers(model)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, TiledMLP):  # each tile is compiled, the walk over them is not
                module.whole = compiled(module.whole)
                module.forward = torch.compiler.disable(module.forward)
        layer.compile(dynamic=True, backend=BACKEND)
    return [] if layers else [f"--torch_compile does nothing: {type(model).__name__} names no layers"]


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile would run for this device and does not find, in words."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "triton and a C compiler for it"
    named = os.environ.get("CXX")
    known = [named] if named else ["g++", "clang++", "c++"]
    return None if any(shutil.which(name) for name in known) else f"a C++ compiler ({', '.join(known)})"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled once, whatever is bound into it: all layers of a kind share the code."""
    if isinstance(function, functools.partial):
        return functools.partial(compiled(function.func), *function.args, **function.keywords)
    return _compiled(function, BACKEND)


@functools.cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, backend=backend)


def hide_attention() -> None:
    """From now on a compiler breaks off at packed attention and goes on behind it (fastrl.models.attention)."""
    importlib.import_module("torch._dynamo")
    register()
