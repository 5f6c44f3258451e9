"""Where the triton backend's dlogits go: dH, dW and db, accumulated in float32 and rounded once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrl.kernels.gemm import accumulate, product
from fastrl.kernels.linear_dlogits import RowGradient
from fastrl.ops.head import HeadSpec

HALF = (torch.bfloat16, torch.float16)
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


class Sink:
    """Takes in dlogits, accumulates dH, dW, db in float32, casts once.

    float16 dlogits are kept in units of a power of two (`scale`), so that coefficients as small as 1 / tokens do not
    underflow; it is undone in float32 and costs one host read a chunk, for float16 alone.
    """

    def __init__(self, head: HeadSpec, hidden: Tensor, needs: tuple[bool, bool, bool]):
        self.head, self.hidden, self.needs, self.scale = head, hidden, needs, math.inf
        weight, f32 = head.weight, torch.float32
        sliced = hidden.dtype in HALF
        self.d_hidden = hidden.new_zeros(hidden.shape, dtype=f32) if needs[0] else None
        self.d_bias = weight.new_zeros(weight.shape[0], dtype=f32) if needs[2] else None
        self.d_weight: Tensor | None = None  # [V, H], float32 (rows) or hidden's dtype (slices)
        self.slab: Tensor | None = None
        self.fresh = sliced

    def rescale(self, law: RowGradient) -> RowGradient:
        """Bring a chunk's law into the units of the accumulators, lowering these units if it would overflow float16."""
        if self.hidden.dtype != torch.float16 or law.rise.numel() == 0:
            self.scale = 1.0
            return law
        # |dz| <= |rise| + |fall|, because e^-x x < 1; 2^14 leaves a factor 4 below the largest float16.
        peak = float(torch.maximum(law.rise.abs() + law.fall.abs(), law.at_target.abs()).max())
        fits = 2.0 ** (14 - math.frexp(peak)[1]) if 0 < peak < math.inf else 1.0
        fits = min(max(fits, 2.0**-40), 2.0**40)
        if fits < self.scale:
            for x in (self.d_hidden, self.d_weight, self.d_bias):
                if x is not None and self.scale != math.inf:
                    x.mul_(fits / self.scale)
            self.scale = fits
        return RowGradient(law.max, *(x * self.scale for x in law.arguments()[1:]))

    def add_rows(self, dz: Tensor, a: int, b: int, rows: Tensor | None) -> None:
        """dz [K, V] of rows [a, b), or of `rows` among them: whole rows at a time."""
        weight = self.head.weight
        h = self.hidden[a:b] if rows is None else self.hidden[a:b][rows]
        if self.d_bias is not None:
            self.d_bias += dz.sum(0, dtype=torch.float32)
        if self.d_hidden is not None:
            d_h = product(dz, weight, dz.new_empty(h.shape, dtype=torch.float32))
            self.d_hidden[a:b].copy_(d_h) if rows is None else self.d_hidden[a:b].index_copy_(0, rows, d_h)
        if self.needs[1]:
            if self.d_weight is None:
                self.d_weight = product(dz.t(), h, weight.new_empty(weight.shape, dtype=torch.float32))
            else:
                accumulate(self.d_weight, dz.t(), h)

    def add_slice(self, dz: Tensor, sums: Tensor | None, h: Tensor, rows: tuple, columns: tuple) -> None:
        """dz of rows [a, b) and columns [v0, v1); all rows of a slice come before `end_slice`."""
        (a, b), (v0, v1) = rows, columns
        if sums is not None:
            self.d_bias[v0:v1] += sums
        if self.d_hidden is not None:
            accumulate(self.d_hidden[a:b], dz, self.head.weight[v0:v1])
        if self.needs[1]:
            if self.slab is None:
                self.slab = dz.new_empty((v1 - v0, h.shape[1]), dtype=torch.float32)
            slab = self.slab[: v1 - v0]
            product(dz.t(), h, slab) if self.fresh else accumulate(slab, dz.t(), h)
            self.fresh = False

    def end_slice(self, v0: int, v1: int) -> None:
        if self.needs[1] and self.slab is not None:
            if self.d_weight is None:
                self.d_weight = torch.empty_like(self.head.weight, memory_format=torch.contiguous_format)
            slab = self.slab[: v1 - v0]
            self.d_weight[v0:v1] = slab if self.scale == 1.0 else slab.mul_(1 / self.scale)
            self.fresh = True

    def finish(self) -> Grads:
        """(dH, dW, db) in the inputs' dtypes, scale undone."""
        weight = self.head.weight
        if self.needs[1] and self.d_weight is None:
            self.d_weight = weight.new_zeros(weight.shape)
        made = []
        for x, like in ((self.d_hidden, self.hidden), (self.d_weight, weight), (self.d_bias, self.head.bias)):
            if x is not None and x.dtype == torch.float32 and self.scale not in (1.0, math.inf):
                x.mul_(1 / self.scale)
            made.append(None if x is None else x.to(like.dtype))
        return tuple(made)
