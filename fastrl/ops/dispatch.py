"""Which backend runs: decided here, once, from the tensors."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference", "torch", "triton")
_MODULES = {"torch": "fastrl.ops.torch_backend", "triton": "fastrl.ops.triton_backend"}
_WORKSPACE = {"cpu": 64 << 20, "cuda": 1 << 30}


def pick(backend: str | None, hidden: Tensor) -> str:
    """The backend's name: as asked, or `triton` on a GPU where it is installed, else `torch`."""
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; expected None or one of {', '.join(BACKENDS)}")
        if backend == "triton" and not has_triton():
            raise ValueError("backend='triton' was asked for but triton is not installed; use backend='torch'")
        return backend
    if hidden.device.type == "cuda" and hidden.dtype != torch.float64 and has_triton():
        return "triton"
    return "torch"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def module(name: str) -> ModuleType:
    """The backend's module: statistics, gradients, one_pass."""
    return importlib.import_module(_MODULES[name])


def workspace(workspace_bytes: int | None, hidden: Tensor, vocabulary: int) -> int:
    """Bytes of logits that may exist at once: as asked, or 1 GiB on CUDA, 64 MiB on the CPU (128 above 100k words)."""
    if workspace_bytes is not None:
        if not workspace_bytes > 0:
            raise ValueError(f"workspace_bytes must be a positive number of bytes, got {workspace_bytes}")
        return int(workspace_bytes)
    default = _WORKSPACE.get(hidden.device.type, 256 << 20)
    return default * 2 if hidden.device.type == "cpu" and vocabulary > 100_000 else default
