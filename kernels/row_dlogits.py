"""Raw logits in memory -> dL/d(raw logits), in the same memory: the second half of the one-pass loss.

Half-precision heads: row r's float32 logits (4 V bytes) make room for its 2-byte dlogits, which go to the first half
of the row; the second half is then free, and `compact_rows` gathers the rows with a nonzero coefficient there. Every
source lies in a first half and every destination in a second one: the gather needs no other memory and no order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import LogitScale, packed
from .linear_dlogits import RowGradient
from .numerics import to_dlogits, to_logits
from .row_stats import check_rows
from .tiles import ROWS, Tile, pick


# -- kernels -------------------------------------------------------------------------------------------------------
@triton.jit
def row_dlogits_kernel(
    raw, bias, targets, outer_rows, top, rise, fall, at_target, dz,
    V, stride_n, stride_dn, inner, outer,
    BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One row per program, left to right: dz[row, v] may overwrite raw[row, v / 2] but nothing to its right."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    target = tl.load(targets + row + one)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    row_top = tl.load(top + row + one)
    row_rise = tl.load(rise + row + one)
    row_fall = tl.load(fall + row + one) if ENTROPY else row_rise
    row_target = tl.load(at_target + row + one)
    if outer_rows is not None:
        scale = tl.load(outer_rows + row)
    else:
        scale = outer
    source = raw + row * stride_n
    out = dz + row * stride_dn
    for v0 in range(0, V, BLOCK_V):
        col = (v0 + tl.arange(0, BLOCK_V))[None, :]
        z = tl.load(source + col, mask=col < V, other=0.0)
        if bias is not None:
            z += tl.load(bias + col, mask=col < V, other=0.0).to(tl.float32)
        z, t = to_logits(z, inner, scale, SOFTCAP)
        hit = col == target[:, None]
        d = to_dlogits(z, t, hit, row_top, row_rise, row_fall, row_target, SOFTCAP, ENTROPY)
        # All threads have read this block before any of them writes over it.
        tl.debug_barrier()
        tl.store(out + col, d.to(dz.dtype.element_ty), mask=col < V)


@triton.jit
def compact_rows_kernel(source, rows, out, V, stride_sn, stride_on, BLOCK_V: tl.constexpr):
    """out[i] = source[rows[i]], one row block per program."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i).to(tl.int64)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(source + row * stride_sn + col, mask=col < V)
    tl.store(out + i * stride_on + col, x, mask=col < V)


# -- launchers -----------------------------------------------------------------------------------------------------
def row_dlogits(
    raw: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: LogitScale,
    rows: RowGradient,
    out: Tensor,
    *,
    entropy: bool = True,
    tile: Tile | None = None,
) -> Tensor:
    """dL/d(raw) into `out` [N, V], which is raw itself or shares its rows' memory from their first byte on.

    Args: raw [N, V] float32, unit inner stride; the rest: as linear_dlogits. Returns: out.
    Raises: ValueError on operands that do not fit.
    """
    check_rows(raw, targets, bias)
    targets, bias = packed(targets), packed(bias)
    n, v = raw.shape
    same_rows = out.data_ptr() == raw.data_ptr() and out.stride(0) * out.element_size() == raw.stride(0) * 4
    if out.shape != raw.shape or not same_rows:
        got = f"{list(out.shape)} {out.dtype}, strides {out.stride()}"
        raise ValueError(f"out is {got}; expected raw's own rows, reinterpreted")
    tile = tile or pick(ROWS, raw)
    if n:
        inner, outer, outer_rows = scale.arguments()
        row_dlogits_kernel[(n,)](
            raw, bias, targets, outer_rows, *rows.arguments(), out, v, raw.stride(0), out.stride(0), inner, outer,
            BLOCK_V=tile.columns, SOFTCAP=scale.softcap, ENTROPY=entropy, **tile.options(),
        )  # fmt: skip
    return out


def compact_rows(source: Tensor, rows: Tensor, out: Tensor, tile: Tile | None = None) -> Tensor:
    """out [K, V] = source[rows], rows [K] int; source and out must not overlap."""
    if out.shape != (rows.shape[0], source.shape[1]) or out.dtype != source.dtype:
        expected = f"[{rows.shape[0]}, {source.shape[1]}] {source.dtype}"
        raise ValueError(f"out is {list(out.shape)} {out.dtype}; expected {expected}")
    tile = tile or pick(ROWS, source)
    k, v = out.shape
    if k:
        compact_rows_kernel[(k, triton.cdiv(v, tile.columns))](
            source, rows, out, v, source.stride(0), out.stride(0), BLOCK_V=tile.columns, **tile.options()
        )  # fmt: skip
    return out
