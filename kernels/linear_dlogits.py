"""Second pass of the linear head: recompute a vocabulary slice's logits tile by tile and write dL/d(h.W + b).

    dz_v = exp(z_v - max) * (rise - fall * (z_v - max))        off the target,   dz_y = at_target
with rise, fall and at_target three numbers a row (`RowGradient`), and times 1 - tanh^2 under softcap. The slice
dz [N, slice] is written once in the input dtype; dH += dz @ W_slice and dW_slice = dz.T @ H are library GEMMs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ROW_GROUP, LogitScale, check_operands, descriptor, packed, widen_dots
from .linear_tile import cut_columns, grouped, project_tile
from .numerics import to_dlogits, to_logits
from .tiles import LINEAR_DLOGITS, Tile, operand_tile, pick


@dataclass(frozen=True)
class RowGradient:
    """What a row's dlogits need besides its logits, each float32 [N]. The slope of the logit transform is folded in.

    max: the row's largest logit. rise, fall: see the module's formula. at_target: dL/dz at the target, slope included.
    """

    max: Tensor
    rise: Tensor
    fall: Tensor
    at_target: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.max, self.rise, self.fall, self.at_target


# -- kernel --------------------------------------------------------------------------------------------------------
@triton.jit
def linear_dlogits_kernel(
    hidden, weight, bias, targets, outer_rows, top, rise, fall, at_target, dz, d_bias_parts,
    N, V, H, column0, stride_hn, stride_hk, stride_wv, stride_wk, stride_dn, inner, outer,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dz [N, V] (row stride stride_dn) for the V columns from column0 on; d_bias_parts [row blocks, V] or None."""
    block, tile = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    n0 = block * BLOCK_N
    v0 = tile * BLOCK_V
    rows = n0 + tl.arange(0, BLOCK_N)
    inside = rows < N
    raw = project_tile(
        hidden, weight, n0, v0, N, V, H, stride_hn, stride_hk, stride_wv, stride_wk,
        BLOCK_N, BLOCK_V, BLOCK_K, TMA, EVEN_K, WIDEN,
    )  # fmt: skip
    target = (tl.load(targets + rows, mask=inside, other=column0 - 1).to(tl.int64) - column0).to(tl.int32)
    row_top = tl.load(top + rows, mask=inside, other=float("inf"))
    row_rise = tl.load(rise + rows, mask=inside, other=0.0)
    row_fall = tl.load(fall + rows, mask=inside, other=0.0) if ENTROPY else row_rise
    row_target = tl.load(at_target + rows, mask=inside, other=0.0)
    if outer_rows is not None:
        scale = tl.load(outer_rows + rows, mask=inside, other=1.0)[:, None]
    else:
        scale = outer
    pieces = cut_columns(raw, PARTS)
    out = dz + rows.to(tl.int64)[:, None] * stride_dn
    for part in tl.static_range(PARTS):
        z = pieces[part]
        col = v0 + part * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
        if bias is not None:
            z += tl.load(bias + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
        z, t = to_logits(z, inner, scale, SOFTCAP)
        hit = col[None, :] == target[:, None]
        d = to_dlogits(z, t, hit, row_top, row_rise, row_fall, row_target, SOFTCAP, ENTROPY)
        tl.store(out + col[None, :], d.to(dz.dtype.element_ty), mask=inside[:, None] & (col < V)[None, :])
        if d_bias_parts is not None:
            # Rows past the end are exactly 0: exp(z - inf), and no target.
            total = tl.sum(d, 0)
            tl.store(d_bias_parts + tl.cast(block, tl.int64) * V + col, total, mask=col < V)


# -- launcher ------------------------------------------------------------------------------------------------------
def linear_dlogits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: LogitScale,
    rows: RowGradient,
    *,
    column0: int = 0,
    entropy: bool = True,
    need_bias: bool = False,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dL/d(h.W + b) for a vocabulary slice.

    Args:
        hidden: [N, H]. weight: [V', H], bias: [V'], the slice from vocabulary column `column0` on; views are fine.
        targets: [N] int, in the whole vocabulary's numbering. scale: as in the forward. rows: RowGradient.
        entropy: False when every rows.fall is zero. need_bias: also return the column sums.
        out: [N, V'] of hidden's dtype with unit inner stride, or None to allocate.
    Returns: (dz [N, V'] in hidden's dtype, column sums of the unrounded dz [V'] float32 or None).
    Raises: ValueError, TypeError on operands that do not fit.
    """
    n, v, h = check_operands(hidden, weight, targets, bias)
    targets, bias = packed(targets), packed(bias)
    out = hidden.new_empty((n, v)) if out is None else out
    if out.shape != (n, v) or out.stride(1) != 1 or out.dtype != hidden.dtype:
        raise ValueError(f"out is {list(out.shape)} {out.dtype}; expected [{n}, {v}] {hidden.dtype}, unit inner stride")
    tile, tma = operand_tile(tile or pick(LINEAR_DLOGITS, hidden), hidden, weight)
    blocks, tiles = triton.cdiv(n, tile.rows), triton.cdiv(v, tile.columns)
    sums = torch.empty((blocks, v), dtype=torch.float32, device=hidden.device) if need_bias else None
    if n:
        inner, outer, outer_rows = scale.arguments()
        linear_dlogits_kernel[(blocks * tiles,)](
            descriptor(hidden, tile.rows, tile.depth) if tma else hidden,
            descriptor(weight, tile.columns, tile.depth) if tma else weight,
            bias, targets, outer_rows, *rows.arguments(), out, sums,
            n, v, h, column0, *hidden.stride(), *weight.stride(), out.stride(0), inner, outer,
            BLOCK_N=tile.rows, BLOCK_V=tile.columns, BLOCK_K=tile.depth, GROUP=ROW_GROUP,
            TMA=tma, EVEN_K=h % tile.depth == 0, WIDEN=widen_dots(hidden),
            SOFTCAP=scale.softcap, ENTROPY=entropy, PARTS=tile.parts, **tile.options(),
        )  # fmt: skip
    return out, None if sums is None else sums.sum(0)
