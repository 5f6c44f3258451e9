"""Forward statistics of a linear head without logits: log-prob, entropy, logsumexp, sum p^2, argmax hit. 1 GEMM.

Program (row block, column range) walks the [BLOCK_N, BLOCK_V] tiles of its range; each tile's logits live only in the
fp32 accumulator and are folded into a few numbers a row (numerics.fold_tile). The partial results [splits, N] of the
ranges are joined in a fixed order by a small second kernel: no atomics, the same bits every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    ROW_GROUP,
    LogitScale,
    check_operands,
    descriptor,
    packed,
    pick_splits,
    processor_count,
    widen_dots,
)
from .linear_tile import cut_columns, grouped, project_tile
from .numerics import fold_tile, log1p, merge, to_logits
from .tiles import LINEAR_STATS, Tile, operand_tile, pick


# -- kernels -------------------------------------------------------------------------------------------------------
@triton.jit
def linear_stats_kernel(
    hidden, weight, bias, targets, outer_rows, parts, firsts,
    N, V, H, splits, tiles_per_split, stride_hn, stride_hk, stride_wv, stride_wk, inner, outer,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, ARGMAX: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """parts [5, splits, N] fp32 = (top, tail, weighted, squares, z of the target); firsts [splits, N] int32."""
    block, split = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), splits, GROUP)
    n0 = block * BLOCK_N
    rows = n0 + tl.arange(0, BLOCK_N)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-1)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    if outer_rows is not None:
        scale = tl.load(outer_rows + rows, mask=inside, other=1.0)[:, None]
    else:
        scale = outer

    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    tail = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    at_target = tl.zeros((BLOCK_N,), tl.float32)
    first = tl.zeros((BLOCK_N,), tl.int32)
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tl.cdiv(V, BLOCK_V))
    for tile in range(begin, end):
        v0 = tile * BLOCK_V
        raw = project_tile(
            hidden, weight, n0, v0, N, V, H, stride_hn, stride_hk, stride_wv, stride_wk,
            BLOCK_N, BLOCK_V, BLOCK_K, TMA, EVEN_K, WIDEN,
        )  # fmt: skip
        pieces = cut_columns(raw, PARTS)
        for part in tl.static_range(PARTS):
            z = pieces[part]
            col = v0 + part * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
            if bias is not None:
                z += tl.load(bias + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
            z, _ = to_logits(z, inner, scale, SOFTCAP)
            z = tl.where(col[None, :] < V, z, float("-inf"))
            # The target's logit is taken from the very accumulator that enters the sum: log p <= 0 by construction.
            if tl.max(((target >= v0) & (target < v0 + BLOCK_V)).to(tl.int32), 0) > 0:
                at_target += tl.sum(tl.where(col[None, :] == target[:, None], z, 0.0), 1)
            top, tail, first, weighted, squares = fold_tile(
                z, col, top, tail, first, weighted, squares, ENTROPY, SQUARES, ARGMAX
            )  # fmt: skip

    plane = tl.cast(splits, tl.int64) * N
    out = parts + tl.cast(split, tl.int64) * N + rows
    tl.store(out, top, mask=inside)
    tl.store(out + plane, tail, mask=inside)
    tl.store(out + 2 * plane, weighted, mask=inside)
    tl.store(out + 3 * plane, squares, mask=inside)
    tl.store(out + 4 * plane, at_target, mask=inside)
    tl.store(firsts + tl.cast(split, tl.int64) * N + rows, first, mask=inside)


@triton.jit
def finish_stats_kernel(
    parts, firsts, targets, out_max, out_log_sum, out_logprobs, out_entropy, out_lse, out_squares, out_hits,
    N, V, splits, columns_per_split, log_v, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the ranges left to right; each output [N]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    plane = tl.cast(splits, tl.int64) * N
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    tail = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.int32)
    for s in range(0, splits):
        at = tl.cast(s, tl.int64) * N + rows
        top, tail, first, weighted, squares = merge(
            top, tail, first, weighted, squares,
            tl.load(parts + at, mask=inside, other=float("-inf")),
            tl.load(parts + plane + at, mask=inside, other=0.0),
            tl.load(firsts + at, mask=inside, other=0),
            tl.load(parts + 2 * plane + at, mask=inside, other=0.0),
            tl.load(parts + 3 * plane + at, mask=inside, other=0.0),
        )  # fmt: skip
    target = tl.load(targets + rows, mask=inside, other=0)
    known = (target >= 0) & (target < V)
    owner = tl.where(known, target, 0).to(tl.int64) // columns_per_split
    z_target = tl.load(parts + 4 * plane + owner * N + rows, mask=inside, other=0.0)
    # softmax of a row whose largest logit is infinite is undefined; an unknown target has no log-prob.
    poison = tl.where(tl.abs(top) == float("inf"), float("nan"), 0.0)
    log_sum = log1p(tail) + poison
    logprobs = z_target - top - log_sum + tl.where(known, 0.0, float("nan"))
    # Rounding alone could carry a flat row's entropy above log V.
    entropy = log_sum + weighted / (1.0 + tail)
    entropy = tl.where(entropy > log_v, log_v, entropy)
    tl.store(out_max + rows, top, mask=inside)
    tl.store(out_log_sum + rows, log_sum, mask=inside)
    tl.store(out_logprobs + rows, logprobs, mask=inside)
    tl.store(out_entropy + rows, entropy, mask=inside)
    tl.store(out_lse + rows, top + log_sum, mask=inside)
    tl.store(out_squares + rows, log1p(squares) - 2.0 * log_sum, mask=inside)
    tl.store(out_hits + rows, (first == target).to(tl.int8), mask=inside)


# -- launchers -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RowStats:
    """Statistics of N rows, each [N] float32 (is_argmax bool)."""

    max: Tensor
    log_sum: Tensor
    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    log_sum_sq_probs: Tensor
    is_argmax: Tensor


def new_parts(n: int, splits: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised partial results: [5, splits, N] float32 and [splits, N] int32."""
    parts = torch.empty((5, splits, n), dtype=torch.float32, device=like.device)
    return parts, torch.empty((splits, n), dtype=torch.int32, device=like.device)


def finish(parts: Tensor, firsts: Tensor, targets: Tensor, vocabulary: int, columns_per_split: int) -> RowStats:
    """Partial results -> statistics. Unasked statistics hold finite nonsense; the caller drops them."""
    _, splits, n = parts.shape
    out = [torch.empty(n, dtype=torch.float32, device=parts.device) for _ in range(6)]
    hits = torch.empty(n, dtype=torch.int8, device=parts.device)
    if n:
        finish_stats_kernel[(triton.cdiv(n, 256),)](
            parts, firsts, targets, *out, hits, n, vocabulary, splits, columns_per_split, math.log(vocabulary),
            BLOCK=256, enable_fp_fusion=True,
        )  # fmt: skip
    return RowStats(*out, hits.bool())


def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: LogitScale | None = None,
    *,
    entropy: bool = True,
    squares: bool = True,
    argmax: bool = True,
    tile: Tile | None = None,
    splits: int | None = None,
) -> RowStats:
    """Statistics of softmax(z), z = scale(hidden @ weight.T + bias), for every row; [N, V] is never formed.

    Args:
        hidden: [N, H], weight: [V, H], one dtype of bfloat16, float16, float32; any strides (rows of 16-byte multiples
            with unit inner stride take the fast load path).
        targets: [N] int; outside [0, V): that row's log-prob is NaN.
        bias: [V] or None. scale: LogitScale, outer a float or float32 [N].
        entropy, squares, argmax: False leaves entropy, log_sum_sq_probs, is_argmax undefined, and costs less.
        tile, splits: overrides of the table's tile and of the number of column ranges.
    Returns: RowStats, [N] each; extra memory 24 * splits * N bytes.
    Raises: ValueError, TypeError on operands that do not fit.
    Numerics: online softmax (Milakov and Gimelshein 2018), the top's own term kept out of the sum.
    """
    n, v, h = check_operands(hidden, weight, targets, bias)
    scale = scale or LogitScale()
    targets, bias = packed(targets), packed(bias)
    tile, tma = operand_tile(tile or pick(LINEAR_STATS, hidden), hidden, weight)
    tiles, blocks = triton.cdiv(v, tile.columns), triton.cdiv(n, tile.rows)
    splits = min(splits or pick_splits(blocks, tiles, processor_count(hidden), ROW_GROUP), tiles)
    each = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, each)
    parts, firsts = new_parts(n, splits, hidden)
    if n:
        inner, outer, outer_rows = scale.arguments()
        linear_stats_kernel[(blocks * splits,)](
            descriptor(hidden, tile.rows, tile.depth) if tma else hidden,
            descriptor(weight, tile.columns, tile.depth) if tma else weight,
            bias, targets, outer_rows, parts, firsts,
            n, v, h, splits, each, *hidden.stride(), *weight.stride(), inner, outer,
            BLOCK_N=tile.rows, BLOCK_V=tile.columns, BLOCK_K=tile.depth, GROUP=ROW_GROUP,
            TMA=tma, EVEN_K=h % tile.depth == 0, WIDEN=widen_dots(hidden),
            SOFTCAP=scale.softcap, ENTROPY=entropy, SQUARES=squares, ARGMAX=argmax,
            PARTS=tile.parts, **tile.options(),
        )  # fmt: skip
    return finish(parts, firsts, targets, v, each * tile.columns)
