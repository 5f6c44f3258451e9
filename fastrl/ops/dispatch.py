"""Which backend and which strategy run: decided here, once, from the tensors.

    strategy   GEMMs                          what it keeps between forward and backward
    forward    1                              nothing: no gradients are wanted
    one_pass   3, 2 with a frozen head        the finished gradients; fused_loss only
    two_pass   4, 3 with a frozen head        three numbers a row; the backward makes the logits again
    cached     between one_pass and two_pass  the logits of as many rows as fit the workspace
    frozen     2                              dlogprob/dhidden of every row; a frozen head and log-probs alone

Rows whose coefficient is zero leave every GEMM of a backward.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference", "torch", "native", "triton")
STRATEGIES = ("one_pass", "two_pass", "cached", "frozen", "forward")
_MODULES = {
    "torch": "fastrl.ops.torch_backend",
    "native": "fastrl.ops.native_backend",
    "triton": "fastrl.ops.triton_backend",
}
_WORKSPACE = {"cpu": 64 << 20, "cuda": 1 << 30}


def pick(backend: str | None, hidden: Tensor, native: bool = False, group: bool = False) -> str:
    """The backend's name: as asked, or `triton` on a GPU where it is installed, else `native` where it is compiled and
    the operator has one (`native`), else `torch`. An operator without native row work takes `torch` in its place, and
    so does a head that is cut over a process group (`group`) in place of `triton`.

    Raises: ValueError on a backend that is unknown, not installed or does not fit, with the reason."""
    if backend is None:
        on_gpu = hidden.device.type == "cuda" and hidden.dtype != torch.float64 and not group
        if on_gpu and _has("triton"):
            return "triton"
        fits = native and hidden.device.type == "cpu" and hidden.dtype != torch.float64
        return "native" if fits and _has("native") else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected None or one of {', '.join(BACKENDS)}")
    if group and backend in ("reference", "triton"):
        raise ValueError(f"backend={backend!r} does not take a process_group; use backend=None, 'torch' or 'native'")
    if backend == "triton" and not _has("triton"):
        raise ValueError("backend='triton' was asked for but triton is not installed; use backend='torch'")
    if backend == "native":
        if not native:
            return "torch"
        _check_native(hidden)
    return backend


def _check_native(hidden: Tensor) -> None:
    if hidden.device.type != "cpu" or hidden.dtype == torch.float64:
        raise ValueError(
            f"backend='native' takes float32, bfloat16 or float16 on the CPU, got {hidden.dtype} on {hidden.device}; "
            "use backend='torch'"
        )
    if not _has("native"):
        from fastrl.ops.rows_native import library

        raise ValueError(f"backend='native' was asked for but is {library()[1]}; use backend='torch'")


def _has(name: str) -> bool:
    """has_triton or has_native; to torch.compile the answer is a constant."""
    if torch.compiler.is_compiling():
        from fastrl.ops import compiled

        return compiled.has(name)
    return has_triton() if name == "triton" else has_native()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_native() -> bool:
    from fastrl.ops.rows_native import library

    return library()[0] is not None


def module(name: str) -> ModuleType:
    """The backend's module: statistics, gradients, one_pass."""
    return importlib.import_module(_MODULES[name])


def statistics_strategy(strategy: str | None, backend: str, needs: tuple[bool, ...], differentiable: tuple) -> str:
    """How per-token statistics are made. needs: whether hidden, weight, bias want gradients.

    Raises: ValueError where the one asked for by name does not fit, with the reason.
    """
    head_frozen = not any(needs[1:])
    if strategy is None:
        if not any(needs) or not differentiable:
            return "forward"
        if needs[0] and head_frozen and differentiable == ("logprobs",):
            return "frozen"
        return "two_pass" if backend == "triton" else "cached"
    if strategy not in STRATEGIES or strategy == "one_pass":
        own = ", ".join(s for s in STRATEGIES if s != "one_pass")
        raise ValueError(f"strategy is {strategy!r}; per-token statistics take None or one of {own}")
    if strategy == "forward" and any(needs):
        raise ValueError("strategy='forward' has no backward, but an input requires grad; use torch.no_grad() or None")
    if strategy == "frozen" and not (head_frozen and differentiable in ((), ("logprobs",))):
        raise ValueError(
            "strategy='frozen' is for a head without gradients and log-probs as the only differentiable output; "
            f"got requires_grad {needs} of hidden, weight, bias and outputs {differentiable}; use 'cached'"
        )
    if strategy == "cached" and backend == "triton":
        raise ValueError("strategy='cached' is kept by the torch and native backends; with triton use 'two_pass'")
    return strategy


def loss_strategy(strategy: str | None) -> str:
    """How fused_loss runs: `one_pass` unless asked otherwise."""
    if strategy not in (None, "one_pass", "two_pass", "cached"):
        raise ValueError(f"strategy is {strategy!r}; fused_loss takes None, one_pass, two_pass or cached")
    return strategy or "one_pass"


def workspace(workspace_bytes: int | None, hidden: Tensor, vocabulary: int) -> int:
    """Bytes of logits that may exist at once: as asked, or 1 GiB on CUDA, 64 MiB on the CPU (118 above 100k words)."""
    if workspace_bytes is not None:
        if not workspace_bytes > 0:
            raise ValueError(f"workspace_bytes must be a positive number of bytes, got {workspace_bytes}")
        return int(workspace_bytes)
    if hidden.device.type == "cpu":
        return 118 << 20 if vocabulary > 100_000 else _WORKSPACE["cpu"]
    return _WORKSPACE.get(hidden.device.type, 256 << 20)
