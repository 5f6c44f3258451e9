"""The state of every random generator, as tensors (safetensors) and plain values (JSON). No pickle."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor

from fastrl.rollout import seed_of


def rng_state(generators: dict[str, torch.Generator] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON) of torch's CPU and CUDA, python's and, when loaded, numpy's generators, and of `generators`."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{i}"] = state
    for name, generator in (generators or {}).items():
        tensors[f"generator.{name}"] = generator.get_state()
    version, internal, gauss = random.getstate()
    plain: dict[str, Any] = {"python": [version, list(internal), gauss]}
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        plain["numpy"] = [kind, keys.tolist(), int(position), int(has_gauss), float(cached)]
    return tensors, plain


def set_rng_state(
    tensors: dict[str, Tensor], plain: dict[str, Any], generators: dict[str, torch.Generator] | None = None
) -> None:
    """Put back what `rng_state` gave. Raises KeyError naming a generator that was not saved."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        saved = [tensors[name] for name in sorted((n for n in tensors if n.startswith("cuda.")), key=_device)]
        for device, state in enumerate(saved[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
    for name, generator in (generators or {}).items():
        generator.set_state(tensors[f"generator.{name}"])
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    if "numpy" in plain:
        import numpy

        kind, keys, position, has_gauss, cached = plain["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))


def derive_rng_state(key: tuple[int | str, ...], generators: dict[str, torch.Generator] | None = None) -> None:
    """Start every generator from a key, for a rank whose own state nobody saved."""
    torch.manual_seed(seed_of("torch", *key))
    random.seed(seed_of("python", *key))
    for name, generator in (generators or {}).items():
        generator.manual_seed(seed_of(name, *key))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed_of("numpy", *key) % 2**32)


def _device(name: str) -> int:
    return int(name.partition(".")[2])
