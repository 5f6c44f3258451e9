"""Sums over segments of a packed [T] vector, their spreading back, and DPO's pair logits. One program per segment.

A program walks its segment block by block, each lane of the block with its own compensated sum (Neumaier 1974), and
adds the lanes as a tree: no atomics, one fixed order, and an error that does not grow with the length.
Pairs are interleaved: segments 2p and 2p+1 are chosen and rejected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import packed
from .tiles import VECTORS, Tile, pick


# -- kernels -------------------------------------------------------------------------------------------------------
@triton.jit
def add_compensated(total, lost, x):
    """(total + x, what that sum has rounded away so far)."""
    new = total + x
    big = tl.abs(total) >= tl.abs(x)
    error = tl.where(big, (total - new) + x, (x - new) + total)
    # An infinite sum has no error to give back: inf - inf would make it NaN.
    return new, lost + tl.where(tl.abs(new) == float("inf"), 0.0, error)


@triton.jit
def fold_segment(values, minus, begin, end, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Sum of values[begin:end] (minus[begin:end] taken off each value first, unless None)."""
    total = tl.zeros((BLOCK,), ACC)
    lost = tl.zeros((BLOCK,), ACC)
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        x = tl.load(values + t, mask=t < end, other=0.0).to(ACC)
        if minus is not None:
            x -= tl.load(minus + t, mask=t < end, other=0.0).to(ACC)
        total, lost = add_compensated(total, lost, x)
    return tl.sum(total, 0) + tl.sum(lost, 0)


@triton.jit
def segment_sum_kernel(values, bounds, out_sums, MEAN: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """out_sums[s] = sum of values[bounds[s]:bounds[s+1]], divided by max(length, 1) with MEAN."""
    s = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(bounds + s).to(tl.int64), tl.load(bounds + s + 1).to(tl.int64)
    total = fold_segment(values, None, begin, end, BLOCK, ACC)
    if MEAN:
        total /= tl.maximum(end - begin, 1).to(ACC)
    tl.store(out_sums + s, total.to(out_sums.dtype.element_ty))


@triton.jit
def segment_spread_kernel(per_segment, bounds, out_rows, factor, MEAN: tl.constexpr, PAIRS: tl.constexpr,
                          BLOCK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """out_rows[t] = per_segment[s] on the rows of segment s, divided by its length with MEAN.

    PAIRS: factor * per_segment[s // 2], negated on the rejected (odd) segments.
    """
    s = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(bounds + s).to(tl.int64), tl.load(bounds + s + 1).to(tl.int64)
    if PAIRS:
        x = tl.load(per_segment + s // 2).to(ACC) * factor
        x = tl.where(s % 2 == 0, x, -x)
    else:
        x = tl.load(per_segment + s).to(ACC)
    if MEAN:
        x /= tl.maximum(end - begin, 1).to(ACC)
    row = tl.zeros((BLOCK,), ACC) + x
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        tl.store(out_rows + t, row.to(out_rows.dtype.element_ty), mask=t < end)


@triton.jit
def pair_logits_kernel(logprobs, ref, bounds, out_logits, out_sums, beta, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """out_logits[p] = beta (chosen - rejected), out_sums[s] = sum of log pi - log ref. ref None: log ref = 0."""
    p = tl.program_id(0).to(tl.int64)
    begin, middle = tl.load(bounds + 2 * p).to(tl.int64), tl.load(bounds + 2 * p + 1).to(tl.int64)
    end = tl.load(bounds + 2 * p + 2).to(tl.int64)
    chosen = fold_segment(logprobs, ref, begin, middle, BLOCK, ACC)
    rejected = fold_segment(logprobs, ref, middle, end, BLOCK, ACC)
    tl.store(out_logits + p, beta * (chosen - rejected))
    tl.store(out_sums + 2 * p, chosen)
    tl.store(out_sums + 2 * p + 1, rejected)


# -- launchers -----------------------------------------------------------------------------------------------------
def segment_sum(values: Tensor, bounds: Tensor, *, mean: bool = False, tile: Tile | None = None) -> Tensor:
    """[T] -> [S] sums (means) of values[bounds[s]:bounds[s+1]] in values' dtype; empty segments give 0.

    Args: values: [T] float, summed in float32 (float64 for float64). bounds: [S+1] int32 or int64, ascending.
    Raises: ValueError on vectors that do not fit.
    """
    values, bounds, acc = _vectors(values, bounds)
    s = bounds.shape[0] - 1
    out = torch.empty(s, dtype=values.dtype, device=values.device)
    tile = tile or pick(VECTORS, values)
    if s:
        segment_sum_kernel[(s,)](values, bounds, out, MEAN=mean, BLOCK=tile.columns, ACC=acc, **tile.options())
    return out


def segment_spread(
    per_segment: Tensor, bounds: Tensor, length: int, *, mean: bool = False, tile: Tile | None = None
) -> Tensor:
    """[S] -> [T = length]: each segment's number on its rows (divided by its length with mean): segment_sum's adjoint.

    Rows outside every segment give 0. Raises: ValueError on vectors that do not fit.
    """
    per_segment, bounds, acc = _vectors(per_segment, bounds)
    s = bounds.shape[0] - 1
    if per_segment.shape[0] != s:
        raise ValueError(f"per_segment is {list(per_segment.shape)} but bounds is {list(bounds.shape)}; expected [S]")
    return _spread(per_segment, bounds, length, 1.0, dict(MEAN=mean, PAIRS=False, ACC=acc), tile)


def pair_logits(
    logprobs: Tensor, ref: Tensor | None, bounds: Tensor, beta: float, *, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """(logits [P], log-ratio sums [S]): beta ((pi - ref)(chosen) - (pi - ref)(rejected)) of each pair, in one launch.

    Args: logprobs, ref: [T] float of one dtype, ref None for log ref = 0. bounds: [2P+1] int, ascending.
    Returns: both in the accumulation dtype. Raises: ValueError on vectors that do not fit or an odd S.
    """
    logprobs, bounds, acc = _vectors(logprobs, bounds)
    if ref is not None and ref.shape != logprobs.shape:
        raise ValueError(f"ref is {list(ref.shape)} but logprobs is {list(logprobs.shape)}; expected [T] both")
    s = bounds.shape[0] - 1
    check_even(s)
    dtype = torch.float64 if acc == tl.float64 else torch.float32
    out = torch.empty(s // 2, dtype=dtype, device=logprobs.device)
    sums = torch.empty(s, dtype=dtype, device=logprobs.device)
    tile = tile or pick(VECTORS, logprobs)
    if s:
        pair_logits_kernel[(s // 2,)](
            logprobs, packed(ref), bounds, out, sums, beta, BLOCK=tile.columns, ACC=acc, **tile.options()
        )  # fmt: skip
    return out, sums


def pair_coefficients(
    per_pair: Tensor, bounds: Tensor, length: int, beta: float, *, tile: Tile | None = None
) -> Tensor:
    """[P] dL/dlogits -> [T = length] dL/dlogp: beta times the pair's on chosen rows, minus that on rejected ones."""
    per_pair, bounds, acc = _vectors(per_pair, bounds)
    check_even(bounds.shape[0] - 1)
    if per_pair.shape[0] * 2 != bounds.shape[0] - 1:
        raise ValueError(f"per_pair is {list(per_pair.shape)} but bounds is {list(bounds.shape)}; expected [P], [2P+1]")
    return _spread(per_pair, bounds, length, beta, dict(MEAN=False, PAIRS=True, ACC=acc), tile)


def _spread(x: Tensor, bounds: Tensor, length: int, factor: float, flags: dict, tile: Tile | None) -> Tensor:
    out = torch.zeros(length, dtype=x.dtype, device=x.device)
    tile = tile or pick(VECTORS, x)
    if bounds.shape[0] > 1:
        segment_spread_kernel[(bounds.shape[0] - 1,)](
            x, bounds, out, factor, **flags, BLOCK=tile.columns, **tile.options()
        )  # fmt: skip
    return out


def check_even(s: int) -> None:
    if s % 2:
        raise ValueError(f"pairs are interleaved chosen, rejected: got an odd {s} sequences")


def _vectors(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, tl.dtype]:
    """(x, bounds) packed, and the dtype to add in; ValueError unless both are vectors that fit."""
    if x.dim() != 1 or not x.is_floating_point():
        raise ValueError(f"values is {list(x.shape)} {x.dtype}; expected a float vector")
    if bounds.dim() != 1 or bounds.shape[0] < 1 or bounds.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"bounds is {list(bounds.shape)} {bounds.dtype}; expected [S+1] int32 or int64")
    return packed(x), packed(bounds), tl.float64 if x.dtype == torch.float64 else tl.float32
