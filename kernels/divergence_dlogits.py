"""Two-head divergences, second half: dL/d(h.W + b) of the student, from recomputed tiles or from logits in memory.

    dz_v = coefficient * p_v ((g_v - reference) - mean)         forward_kl: coefficient * (p_v - q_v)
with three numbers a row (`DivergenceLaw`), and times 1 - tanh^2 under softcap. A vocabulary slice dz [N, slice] is
written once in the student's dtype; dH += dz @ W_slice and dW_slice = dz.T @ H are library GEMMs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergence_tile import (
    FORWARD,
    KINDS,
    Operand,
    check_pair,
    check_raw,
    divergence_terms,
    finish_logits,
    load_norms,
    load_scale,
    operand_arguments,
    pair_tile,
)
from .launch import ROW_GROUP, LogitScale, packed, widen_dots
from .linear_tile import cut_columns, grouped, project_tile
from .tiles import DIVERGENCE_DLOGITS, ROWS, Tile, pick


@dataclass(frozen=True)
class DivergenceLaw:
    """What a row's dlogits need besides both heads' logits.

    norms: [4, N] float32 as divergence_stats takes them. rows: [3, N] float32, contiguous: the reference and mean of
    DivergenceStats, and the coefficient dL/dD with the slope of the logit transform folded in.
    kind, beta: as in divergence_stats.
    """

    norms: Tensor
    rows: Tensor
    kind: str
    beta: float = 0.5


# -- kernels -------------------------------------------------------------------------------------------------------
@triton.jit
def divergence_gradient(p, g, t, reference, mean, coefficient, SOFTCAP: tl.constexpr, KIND: tl.constexpr):
    """dL/d(h.W + b) [R, C] from divergence_terms and the rows' three numbers [R]."""
    if KIND == FORWARD:
        d = g * coefficient[:, None]
    else:
        d = tl.where(p == 0.0, 0.0, p * ((g - reference[:, None]) - mean[:, None]) * coefficient[:, None])
    if SOFTCAP:
        d *= 1.0 - t * t
    return d


@triton.jit
def load_law(law, rows, N, inside):
    """(reference, mean, coefficient) of rows, 0 past the end."""
    plane = tl.cast(N, tl.int64)
    reference = tl.load(law + rows, mask=inside, other=0.0)
    mean = tl.load(law + plane + rows, mask=inside, other=0.0)
    return reference, mean, tl.load(law + 2 * plane + rows, mask=inside, other=0.0)


@triton.jit
def divergence_dlogits_kernel(
    hidden, weight, bias, other_hidden, other_weight, other_bias, outer_rows, other_outer_rows, norms, law, dz,
    d_bias_parts, N, V, H, K, stride_hn, stride_hk, stride_wv, stride_wk,
    stride_gn, stride_gk, stride_uv, stride_uk, stride_dn, inner, outer, other_inner, other_outer, beta, alpha,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dz [N, V] (row stride stride_dn) of a vocabulary slice; d_bias_parts [row blocks, V] or None."""
    block, tile = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    n0 = block * BLOCK_N
    v0 = tile * BLOCK_V
    rows = n0 + tl.arange(0, BLOCK_N)
    inside = rows < N
    left = project_tile(
        hidden, weight, n0, v0, N, V, H, stride_hn, stride_hk, stride_wv, stride_wk,
        BLOCK_N, BLOCK_V, BLOCK_K, TMA, EVEN_K, WIDEN,
    )  # fmt: skip
    right = project_tile(
        other_hidden, other_weight, n0, v0, N, V, K, stride_gn, stride_gk, stride_uv, stride_uk,
        BLOCK_N, BLOCK_V, BLOCK_K, TMA, EVEN_K, WIDEN,
    )  # fmt: skip
    top, log_sum, other_top, other_log_sum = load_norms(norms, rows, N, inside)
    reference, mean, coefficient = load_law(law, rows, N, inside)
    scale = load_scale(outer_rows, rows, inside, outer)
    other_scale = load_scale(other_outer_rows, rows, inside, other_outer)
    left_pieces = cut_columns(left, PARTS)
    right_pieces = cut_columns(right, PARTS)
    out = dz + rows.to(tl.int64)[:, None] * stride_dn
    for part in tl.static_range(PARTS):
        column = v0 + part * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
        col = column[None, :]
        z, t = finish_logits(left_pieces[part], bias, col, V, inner, scale, SOFTCAP)
        other, _ = finish_logits(right_pieces[part], other_bias, col, V, other_inner, other_scale, OTHER_SOFTCAP)
        p, _, g = divergence_terms(z, other, top, log_sum, other_top, other_log_sum, beta, alpha, KIND)
        d = divergence_gradient(p, g, t, reference, mean, coefficient, SOFTCAP, KIND)
        tl.store(out + col, d.to(dz.dtype.element_ty), mask=inside[:, None] & (col < V))
        if d_bias_parts is not None:
            # Rows past the end are exactly 0: p = q = 0 there.
            tl.store(d_bias_parts + tl.cast(block, tl.int64) * V + column, tl.sum(d, 0), mask=column < V)


@triton.jit
def divergence_row_dlogits_kernel(
    raw, bias, other_raw, other_bias, outer_rows, other_outer_rows, norms, law, dz,
    N, V, stride_n, stride_gn, stride_dn, inner, outer, other_inner, other_outer, beta, alpha,
    BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One row per program, left to right: dz[row, v] may overwrite raw[row, v / 2] but nothing to its right."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    inside = rows < N
    top, log_sum, other_top, other_log_sum = load_norms(norms, rows, N, inside)
    reference, mean, coefficient = load_law(law, rows, N, inside)
    scale = load_scale(outer_rows, rows, inside, outer)
    other_scale = load_scale(other_outer_rows, rows, inside, other_outer)
    source = raw + rows.to(tl.int64)[:, None] * stride_n
    other_source = other_raw + rows.to(tl.int64)[:, None] * stride_gn
    out = dz + rows.to(tl.int64)[:, None] * stride_dn
    for v0 in range(0, V, BLOCK_V):
        col = (v0 + tl.arange(0, BLOCK_V))[None, :]
        left = tl.load(source + col, mask=col < V, other=0.0)
        right = tl.load(other_source + col, mask=col < V, other=0.0)
        z, t = finish_logits(left, bias, col, V, inner, scale, SOFTCAP)
        other, _ = finish_logits(right, other_bias, col, V, other_inner, other_scale, OTHER_SOFTCAP)
        p, _, g = divergence_terms(z, other, top, log_sum, other_top, other_log_sum, beta, alpha, KIND)
        d = divergence_gradient(p, g, t, reference, mean, coefficient, SOFTCAP, KIND)
        # All threads have read this block before any of them writes over it.
        tl.debug_barrier()
        tl.store(out + col, d.to(dz.dtype.element_ty), mask=col < V)


# -- launchers -----------------------------------------------------------------------------------------------------
def divergence_dlogits(
    student: Operand,
    teacher: Operand,
    law: DivergenceLaw,
    *,
    need_bias: bool = False,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dL/d(h.W + b) of the student for a vocabulary slice: weights [V', H], [V', H'] and biases [V'] are the slice's.

    Args: as divergence_stats. need_bias: also return the column sums. out: [N, V'] of the student's dtype with unit
        inner stride, or None to allocate.
    Returns: (dz [N, V'] in the student's dtype, column sums of the unrounded dz [V'] float32 or None).
    Raises: ValueError, TypeError on operands that do not fit.
    """
    n, v, h, k = check_pair(student, teacher, law.norms)
    _check_law(law, n)
    hidden = student.hidden
    out = hidden.new_empty((n, v)) if out is None else out
    if out.shape != (n, v) or out.stride(1) != 1 or out.dtype != hidden.dtype:
        raise ValueError(f"out is {list(out.shape)} {out.dtype}; expected [{n}, {v}] {hidden.dtype}, unit inner stride")
    tile, tma = pair_tile(tile, DIVERGENCE_DLOGITS, student, teacher)
    blocks, tiles = triton.cdiv(n, tile.rows), triton.cdiv(v, tile.columns)
    sums = torch.empty((blocks, v), dtype=torch.float32, device=hidden.device) if need_bias else None
    if n:
        inner, outer, outer_rows = student.scale.arguments()
        other_inner, other_outer, other_outer_rows = teacher.scale.arguments()
        divergence_dlogits_kernel[(blocks * tiles,)](
            *operand_arguments(student, tile, tma), *operand_arguments(teacher, tile, tma),
            outer_rows, other_outer_rows, law.norms, law.rows, out, sums, n, v, h, k,
            *hidden.stride(), *student.weight.stride(), *teacher.hidden.stride(), *teacher.weight.stride(),
            out.stride(0), inner, outer, other_inner, other_outer,
            law.beta, 1.0 - law.beta,
            BLOCK_N=tile.rows, BLOCK_V=tile.columns, BLOCK_K=tile.depth, GROUP=ROW_GROUP,
            TMA=tma, EVEN_K=h % tile.depth == 0 and k % tile.depth == 0,
            WIDEN=widen_dots(hidden) or widen_dots(teacher.hidden),
            SOFTCAP=student.scale.softcap, OTHER_SOFTCAP=teacher.scale.softcap, KIND=KINDS.index(law.kind),
            PARTS=tile.parts, **tile.options(),
        )  # fmt: skip
    return out, None if sums is None else sums.sum(0)


def divergence_row_dlogits(
    raw: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    scales: tuple[LogitScale, LogitScale],
    law: DivergenceLaw,
    out: Tensor,
    tile: Tile | None = None,
) -> Tensor:
    """The same from raw logits in memory, into `out` [N, V]: the student's own rows, reinterpreted (row_dlogits)."""
    check_raw(raw, law.norms)
    n, v = raw[0].shape
    _check_law(law, n)
    same_rows = out.data_ptr() == raw[0].data_ptr() and out.stride(0) * out.element_size() == raw[0].stride(0) * 4
    if out.shape != raw[0].shape or not same_rows:
        got = f"{list(out.shape)} {out.dtype}, strides {out.stride()}"
        raise ValueError(f"out is {got}; expected the student's own rows, reinterpreted")
    tile = tile or pick(ROWS, raw[0])
    if n:
        inner, outer, outer_rows = scales[0].arguments()
        other_inner, other_outer, other_outer_rows = scales[1].arguments()
        divergence_row_dlogits_kernel[(n,)](
            raw[0], packed(biases[0]), raw[1], packed(biases[1]), outer_rows, other_outer_rows, law.norms, law.rows,
            out, n, v, raw[0].stride(0), raw[1].stride(0), out.stride(0), inner, outer, other_inner, other_outer,
            law.beta, 1.0 - law.beta,
            BLOCK_V=tile.columns, SOFTCAP=scales[0].softcap, OTHER_SOFTCAP=scales[1].softcap,
            KIND=KINDS.index(law.kind), **tile.options(),
        )  # fmt: skip
    return out


def _check_law(law: DivergenceLaw, n: int) -> None:
    if law.rows.shape != (3, n) or law.rows.dtype != torch.float32 or not law.rows.is_contiguous():
        raise ValueError(f"law.rows is {list(law.rows.shape)} {law.rows.dtype}; expected [3, N={n}] float32")
