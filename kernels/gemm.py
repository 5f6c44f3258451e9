"""Library GEMMs with a float32 result from 2-byte operands: nothing is rounded before the last step. torch only.

CUDA: torch.mm(out_dtype=float32). Elsewhere (CPU under the interpreter, ROCm) the operands are widened first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SLAB = 32 << 20  # bytes of a product that waits to be added: small enough to stay in L2


def spans(n: int, step: int) -> Iterator[tuple[int, int]]:
    """[0, n) in ranges of at most `step`."""
    return ((a, min(a + step, n)) for a in range(0, n, max(1, step)))


def widens(x: Tensor) -> bool:
    """Whether x's GEMMs must be fed float32 copies to give a float32 result."""
    return x.dtype != torch.float32 and (x.device.type != "cuda" or torch.version.hip is not None)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out [M, N] float32 = a [M, K] @ b [K, N], float32 accumulation."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if widens(a):
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out [M, N] float32 += a [M, K] @ b [K, N], in slabs of rows."""
    if a.dtype == torch.float32:
        return out.addmm_(a, b)
    rows = max(1, SLAB // (4 * out.shape[1]))
    slab = out.new_empty((min(rows, out.shape[0]), out.shape[1]))
    for m0, m1 in spans(out.shape[0], rows):
        out[m0:m1] += product(a[m0:m1], b, slab[: m1 - m0])
    return out
