"""Host-side helpers that the launchers share: operands, the logit scale, grids. No kernels here."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROW_GROUP = 16  # row blocks that share the weight tiles in L2; at H=4096 their hidden rows are 16 MiB in bf16


@dataclass(frozen=True)
class LogitScale:
    """z = outer * tanh(inner * raw) with softcap, z = outer * raw without.

    outer: float, or float32 [N] one per row. inner: float, read only with softcap.
    """

    outer: float | Tensor = 1.0
    inner: float = 1.0
    softcap: bool = False

    def arguments(self) -> tuple[float, float, Tensor | None]:
        """(inner, outer, outer_rows) as the kernels take them."""
        if isinstance(self.outer, Tensor):
            return self.inner, 1.0, self.outer
        return self.inner, self.outer, None


def interpreting() -> bool:
    """True under TRITON_INTERPRET=1, where kernels run in numpy on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def widen_dots(x: Tensor) -> bool:
    """Whether the kernels must widen x's dtype before a dot: numpy has no bfloat16."""
    return interpreting() and x.dtype == torch.bfloat16


def check_operands(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    """(N, V, H), or ValueError/TypeError naming both sides."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is {list(hidden.shape)}, weight is {list(weight.shape)}; expected [N, H] and [V, H]")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}; the kernels take one of float32, bfloat16, "
            "float16 for both; use backend='torch' for other dtypes"
        )
    n, (v, h) = hidden.shape[0], weight.shape
    if targets.shape != (n,):
        raise ValueError(f"targets is {list(targets.shape)} but hidden is {list(hidden.shape)}; expected [N={n}]")
    if bias is not None and bias.shape != (v,):
        raise ValueError(f"bias is {list(bias.shape)} but weight is {list(weight.shape)}; expected [V={v}]")
    if v == 0 or v >= 2**31 or n >= 2**31:
        raise ValueError(f"hidden is [N={n}, H={h}], weight is [V={v}, H={h}]; the kernels take 0 < V and N, V < 2^31")
    return n, v, h


def packed(x: Tensor | None) -> Tensor | None:
    """The vector x with unit stride: itself, or a copy of an expanded or strided view."""
    return None if x is None else x.contiguous()


def has_descriptor(x: Tensor) -> bool:
    """Whether x [rows, cols] can be read through a tensor map: unit inner stride, 16-byte rows and base."""
    size = x.element_size()
    return (
        x.stride(1) == 1
        and x.stride(0) > 0
        and x.stride(0) * size % 16 == 0
        and x.data_ptr() % 16 == 0
        and x.shape[0] > 0
        and x.shape[1] > 0
    )


def descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Tensor map of x with blocks [rows, cols]; reads outside x give 0."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols])


@functools.cache
def processors(index: int) -> int:
    """Streaming multiprocessors of CUDA device `index` (1 in the interpreter)."""
    return 1 if index < 0 else torch.cuda.get_device_properties(index).multi_processor_count


def processor_count(x: Tensor) -> int:
    return processors(x.device.index if x.device.type == "cuda" else -1)


@functools.cache
def pick_splits(row_blocks: int, tiles: int, cores: int, group: int | None = None, most: int = 128) -> int:
    """Into how many column ranges to cut the vocabulary: the fewest whose programs fill whole waves of the GPU.

    A range keeps at least 4 tiles, which pay for its partial results. With `group`, the programs in flight are to be
    that many row blocks by several ranges, so that the hidden rows they share stay in L2: cores / group ranges.
    """
    if row_blocks == 0:
        return 1
    most = max(1, min(most, tiles // 4))
    least = 1 if group is None else min(most, -(-cores // min(row_blocks, group)))
    best, best_use = least, 0.0
    for s in range(least, most + 1):
        each = -(-tiles // s)
        ranges = -(-tiles // each)
        waves = -(-row_blocks * ranges // cores)
        # Work done over work paid for: the last range may be short, the last wave partly empty.
        use = row_blocks * tiles / (waves * cores * each)
        if use > best_use * 1.02:
            best, best_use = ranges, use
    return best
