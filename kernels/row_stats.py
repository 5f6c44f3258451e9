"""Statistics of rows whose raw logits already lie in memory: the first half of the one-pass loss, after a library GEMM.

Program (row, column range) streams its range once and folds it as linear_stats does; the same second kernel joins the
ranges. The logits are only read: bias, scale, softcap and temperature are applied on the fly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LogitScale, packed, pick_splits, processor_count
from .linear_stats import RowStats, finish, new_parts
from .numerics import fold_tile, to_logits
from .tiles import ROWS, Tile, pick


@triton.jit
def row_stats_kernel(
    raw, bias, targets, outer_rows, parts, firsts,
    N, V, splits, tiles_per_split, stride_n, inner, outer,
    BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, ARGMAX: tl.constexpr,
):  # fmt: skip
    """raw [N, V] fp32 (row stride stride_n) -> parts [5, splits, N], firsts [splits, N], as linear_stats_kernel."""
    pid = tl.program_id(0)
    row = pid % N
    split = pid // N
    one = tl.arange(0, 1)
    target = tl.load(targets + row + one)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    if outer_rows is not None:
        scale = tl.load(outer_rows + row)
    else:
        scale = outer
    source = raw + tl.cast(row, tl.int64) * stride_n
    top = tl.full((1,), float("-inf"), tl.float32)
    tail = tl.zeros((1,), tl.float32)
    weighted = tl.zeros((1,), tl.float32)
    squares = tl.zeros((1,), tl.float32)
    at_target = tl.zeros((1,), tl.float32)
    first = tl.zeros((1,), tl.int32)
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tl.cdiv(V, BLOCK_V))
    for tile in range(begin, end):
        col = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        wide = col[None, :]
        z = tl.load(source + wide, mask=wide < V, other=0.0)
        if bias is not None:
            z += tl.load(bias + wide, mask=wide < V, other=0.0).to(tl.float32)
        z, _ = to_logits(z, inner, scale, SOFTCAP)
        z = tl.where(wide < V, z, float("-inf"))
        at_target += tl.sum(tl.where(wide == target[:, None], z, 0.0), 1)
        top, tail, first, weighted, squares = fold_tile(
            z, col, top, tail, first, weighted, squares, ENTROPY, SQUARES, ARGMAX
        )  # fmt: skip
    plane = tl.cast(splits, tl.int64) * N
    out = parts + tl.cast(split, tl.int64) * N + row + one
    tl.store(out, top)
    tl.store(out + plane, tail)
    tl.store(out + 2 * plane, weighted)
    tl.store(out + 3 * plane, squares)
    tl.store(out + 4 * plane, at_target)
    tl.store(firsts + tl.cast(split, tl.int64) * N + row + one, first)


def row_stats(
    raw: Tensor,
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
    """Statistics of softmax(scale(raw + bias)) for every row.

    Args: raw: [N, V] float32, unit inner stride, any row stride. targets: [N] int. The rest: as linear_stats.
    Returns: RowStats, [N] each. Raises: ValueError on operands that do not fit.
    """
    check_rows(raw, targets, bias)
    targets, bias = packed(targets), packed(bias)
    n, v = raw.shape
    scale = scale or LogitScale()
    tile = tile or pick(ROWS, raw)
    tiles = triton.cdiv(v, tile.columns)
    splits = min(splits or pick_splits(n, tiles, 4 * processor_count(raw)), tiles)
    each = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, each)
    parts, firsts = new_parts(n, splits, raw)
    if n:
        inner, outer, outer_rows = scale.arguments()
        row_stats_kernel[(n * splits,)](
            raw, bias, targets, outer_rows, parts, firsts, n, v, splits, each, raw.stride(0), inner, outer,
            BLOCK_V=tile.columns, SOFTCAP=scale.softcap, ENTROPY=entropy, SQUARES=squares, ARGMAX=argmax,
            **tile.options(),
        )  # fmt: skip
    return finish(parts, firsts, targets, v, each * tile.columns)


def check_rows(raw: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """ValueError unless raw is [N, V] float32 with unit inner stride and the vectors fit it."""
    if raw.dim() != 2 or raw.dtype != torch.float32 or (raw.shape[1] > 1 and raw.stride(1) != 1):
        got = f"{list(raw.shape)} {raw.dtype}, strides {raw.stride()}"
        raise ValueError(f"raw is {got}; expected [N, V] float32 with unit inner stride")
    n, v = raw.shape
    if targets.shape != (n,):
        raise ValueError(f"targets is {list(targets.shape)} but raw is {list(raw.shape)}; expected [N={n}]")
    if bias is not None and bias.shape != (v,):
        raise ValueError(f"bias is {list(bias.shape)} but raw is {list(raw.shape)}; expected [V={v}]")
    if v == 0 or v >= 2**31 or n >= 2**31:
        raise ValueError(f"raw is {list(raw.shape)}; the kernels take 0 < V and N, V < 2^31")
