"""One best tile per architecture and kernel: a small table, no search in a user's first step.

Source of every entry: compiles without register spills ahead of time (bench/aot_check.py); not yet timed on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import has_descriptor, interpreting


@dataclass(frozen=True)
class Tile:
    """rows x columns of logits per program, the step along H, and Triton's launch options."""

    rows: int
    columns: int
    depth: int = 64
    num_warps: int = 8
    num_stages: int = 3
    parts: int = 1  # the epilogue takes the tile's columns in so many parts (1, 2, 4 or 8)
    descriptors: bool = False  # read operands through tensor maps (TMA) where their strides allow it

    def options(self) -> dict:
        """Triton's launch options. Fusing a*b + c is asked for by name: its default changes between releases."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# architecture -> tile, for 2-byte inputs.
LINEAR_STATS = {
    "sm_80": Tile(128, 128, 32, 8, 3, 8),
    "sm_90": Tile(128, 256, 64, 8, 4, 8, descriptors=True),
    "sm_100": Tile(128, 256, 64, 8, 3, 8, descriptors=True),
    "sm_120": Tile(128, 64, 64, 8, 3, 2, descriptors=True),
    "gfx942": Tile(128, 128, 32, 8, 2, 4),
    "interpreter": Tile(32, 64, 32, 4, 1, 2, descriptors=True),
}
LINEAR_DLOGITS = dict(LINEAR_STATS)
# Two accumulators, one a head; the statistics carry four sums a row besides, and 128 x 128 spills there on sm_90.
DIVERGENCE_DLOGITS = {
    "sm_80": Tile(64, 128, 32, 8, 3, 4),
    "sm_90": Tile(128, 128, 64, 8, 3, 8, descriptors=True),
    "sm_100": Tile(128, 128, 64, 8, 3, 8, descriptors=True),
    "sm_120": Tile(64, 128, 64, 8, 2, 4, descriptors=True),
    "gfx942": Tile(64, 128, 32, 8, 2, 4),
    "interpreter": Tile(32, 64, 32, 4, 1, 2, descriptors=True),
}
DIVERGENCE_STATS = DIVERGENCE_DLOGITS | {"sm_90": Tile(128, 64, 64, 8, 4, 4, descriptors=True)}
DIVERGENCE_POINTERS = DIVERGENCE_DLOGITS["sm_80"]
DIVERGENCE_FP32 = Tile(32, 64, 32, 4, 2, 4)  # as FP32_LINEAR: for whoever calls the kernels by hand
# Row kernels: columns of one row per step.
ROWS = {
    "sm_80": Tile(1, 4096, num_warps=8),
    "sm_90": Tile(1, 4096, num_warps=8),
    "sm_100": Tile(1, 4096, num_warps=8),
    "sm_120": Tile(1, 4096, num_warps=8),
    "gfx942": Tile(1, 4096, num_warps=8),
    "interpreter": Tile(1, 128),
}
# Gathered rows (rows x columns of H per step), and kernels over [T] vectors (elements per step).
GATHER = {**dict.fromkeys(ROWS, Tile(16, 128, num_warps=8)), "interpreter": Tile(8, 32)}
VECTORS = {**dict.fromkeys(ROWS, Tile(1, 1024, num_warps=4)), "interpreter": Tile(1, 128)}
# Operands that no tensor map can describe (unaligned rows, transposed weights), on chips whose tile wants one.
POINTERS = LINEAR_STATS["sm_80"]
# fp32 operands take twice the shared memory and run on the vector units; on sm_80, with every option, 24 bytes spill.
# The triton backend sends fp32 to library GEMMs and the row kernels instead.
FP32_LINEAR = Tile(64, 64, 32, 4, 2)


@functools.cache
def architecture(index: int) -> str:
    """The table key of CUDA/ROCm device `index`: the nearest entry at or below its capability; -1: interpreter."""
    if index < 0:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(index)[0]
    return next(f"sm_{m}0" for m in (12, 10, 9, 8) if major >= m or m == 8)


def pick(table: dict[str, Tile], x: Tensor) -> Tile:
    """The tile for tensor x's device; ValueError off the GPU unless interpreting."""
    if x.device.type != "cuda" and not interpreting():
        raise ValueError(
            f"hidden is on {x.device}; the Triton kernels need a CUDA or ROCm tensor (or TRITON_INTERPRET=1, "
            "set before triton is imported); use backend='torch'"
        )
    name = architecture(x.device.index if x.device.type == "cuda" else -1)
    if x.dtype == torch.float32 and table not in (ROWS, GATHER, VECTORS) and name != "interpreter":
        return FP32_LINEAR
    return table[name]


def operand_tile(tile: Tile, hidden: Tensor, weight: Tensor) -> tuple[Tile, bool]:
    """(tile, whether to read through tensor maps); without them a tile made for them gives way to POINTERS."""
    if not tile.descriptors:
        return tile, False
    if has_descriptor(hidden) and has_descriptor(weight):
        return tile, True
    return (tile if interpreting() else POINTERS), False
