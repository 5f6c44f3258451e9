"""Bytes of optimizer states, and of what a step works with beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from fastrl.train.config import TrainConfig
from fastrl.train.optim.codecs import codec_of
from fastrl.train.optim.sliced import MOMENTS, SLICE

Weight = tuple[tuple[int, ...], torch.dtype, bool]  # shape, dtype, whether Muon moves it
LOW_BITS = {"adamw_torch_8bit": "8bit", "adamw_torch_4bit": "4bit"}
SLICES = 9  # float32 copies of a slice while it is worked on


def state_bytes(config: TrainConfig, weights: Iterable[Weight]) -> int:
    """Of all states of these weights."""
    return int(sum(_states(config, *weight) for weight in weights))


def _states(config: TrainConfig, shape: tuple[int, ...], dtype: torch.dtype, matrix: bool) -> float:
    name, n = config.optim, math.prod(shape)
    if config.bf16_update != "none" or name in LOW_BITS:
        p = torch.empty(shape, dtype=dtype, device="meta")
        kinds = LOW_BITS.get(name, "bfloat16")
        parts = [codec_of(p, kinds, moment == "exp_avg").new(p) for moment in MOMENTS]
        kahan = p.nbytes if config.bf16_update == "kahan" and dtype is torch.bfloat16 else 0
        return sum(x.nbytes for part in parts for x in part.values()) + kahan
    if name == "sgd":
        return 0
    if name == "adafactor":  # a row and a column of each matrix
        return 4 * (n // shape[-1] + n // shape[-2] if len(shape) > 1 else n)
    if name.endswith("8bit"):  # bitsandbytes
        return 2 * n
    return n * dtype.itemsize * (1 if name == "muon" and matrix else 2)


def step_bytes(config: TrainConfig, kind: str, weights: list[Weight]) -> int:
    """What the update of one weight makes and drops, of the one that takes most."""
    return max((_work(config, kind, *weight) for weight in weights), default=0)


def _work(config: TrainConfig, kind: str, shape: tuple[int, ...], dtype: torch.dtype, matrix: bool) -> int:
    """A root and a quotient of AdamW on the CPU, where the plain one is not fused; Muon's iterates, in bfloat16; the
    float32 values of one slice of narrow states and weights."""
    n = math.prod(shape)
    if config.bf16_update != "none" or config.optim in LOW_BITS:
        return SLICES * 4 * min(n, SLICE)
    if config.optim == "sgd" or config.optim == "adafactor":
        return 2 * n * dtype.itemsize
    if config.optim == "muon" and matrix:
        return 2 * n * dtype.itemsize + 4 * 2 * n
    return 0 if kind == "cuda" or config.optim == "adamw_torch_fused" else 2 * n * dtype.itemsize
