"""Two-head divergences, first half: D(p, q) of every row and E_p[g], from the normalisers of both heads.

p and q are the softmax of the student's and of the teacher's logits, whose maximum and log-sum are known here (from
linear_stats or row_stats). dL/dz_v = p_v (g_v - E_p[g]) with g_v = dD/dp_v (divergence_tile).
Each program forms a tile of both heads' logits in two fp32 accumulators and folds it into four numbers a row; the parts
of the column ranges are added in a fixed order: no atomics, the same bits every run.
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
from .launch import ROW_GROUP, LogitScale, packed, pick_splits, processor_count, widen_dots
from .linear_tile import cut_columns, grouped, project_tile
from .tiles import DIVERGENCE_STATS, ROWS, Tile, pick

SURE = tl.constexpr(0.75)  # no two words of a row are likelier than this


# -- kernels -------------------------------------------------------------------------------------------------------
@triton.jit
def fold_divergence(p, term, g, value, sure, mass, rest, KIND: tl.constexpr):
    """Add [R, C] terms to the carried sums [R]: D; g of the word with p > SURE; p and p g of the other words."""
    value += tl.sum(term, 1)
    if KIND != FORWARD:
        hit = p > SURE
        sure += tl.sum(tl.where(hit, g, 0.0), 1)
        mass += tl.sum(tl.where(hit, 0.0, p), 1)
        rest += tl.sum(tl.where(hit, 0.0, tl.where(p == 0.0, 0.0, p * g)), 1)
    return value, sure, mass, rest


@triton.jit
def divergence_stats_kernel(
    hidden, weight, bias, other_hidden, other_weight, other_bias, outer_rows, other_outer_rows, norms, parts,
    N, V, H, K, splits, tiles_per_split, stride_hn, stride_hk, stride_wv, stride_wk,
    stride_gn, stride_gk, stride_uv, stride_uk, inner, outer, other_inner, other_outer, beta, alpha,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """norms [4, N] fp32 (load_norms) -> parts [4, splits, N] fp32 (fold_divergence). The teacher's tensors: other_*."""
    block, split = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), splits, GROUP)
    n0 = block * BLOCK_N
    rows = n0 + tl.arange(0, BLOCK_N)
    inside = rows < N
    top, log_sum, other_top, other_log_sum = load_norms(norms, rows, N, inside)
    scale = load_scale(outer_rows, rows, inside, outer)
    other_scale = load_scale(other_outer_rows, rows, inside, other_outer)
    value = tl.zeros((BLOCK_N,), tl.float32)
    sure = tl.zeros((BLOCK_N,), tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    rest = tl.zeros((BLOCK_N,), tl.float32)
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tl.cdiv(V, BLOCK_V))
    for tile in range(begin, end):
        v0 = tile * BLOCK_V
        left = project_tile(
            hidden, weight, n0, v0, N, V, H, stride_hn, stride_hk, stride_wv, stride_wk,
            BLOCK_N, BLOCK_V, BLOCK_K, TMA, EVEN_K, WIDEN,
        )  # fmt: skip
        right = project_tile(
            other_hidden, other_weight, n0, v0, N, V, K, stride_gn, stride_gk, stride_uv, stride_uk,
            BLOCK_N, BLOCK_V, BLOCK_K, TMA, EVEN_K, WIDEN,
        )  # fmt: skip
        left_pieces = cut_columns(left, PARTS)
        right_pieces = cut_columns(right, PARTS)
        for part in tl.static_range(PARTS):
            col = (v0 + part * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS))[None, :]
            z, _ = finish_logits(left_pieces[part], bias, col, V, inner, scale, SOFTCAP)
            other, _ = finish_logits(right_pieces[part], other_bias, col, V, other_inner, other_scale, OTHER_SOFTCAP)
            p, term, g = divergence_terms(z, other, top, log_sum, other_top, other_log_sum, beta, alpha, KIND)
            value, sure, mass, rest = fold_divergence(p, term, g, value, sure, mass, rest, KIND)
    plane = tl.cast(splits, tl.int64) * N
    out = parts + tl.cast(split, tl.int64) * N + rows
    tl.store(out, value, mask=inside)
    tl.store(out + plane, sure, mask=inside)
    tl.store(out + 2 * plane, mass, mask=inside)
    tl.store(out + 3 * plane, rest, mask=inside)


@triton.jit
def divergence_row_stats_kernel(
    raw, bias, other_raw, other_bias, outer_rows, other_outer_rows, norms, parts,
    N, V, splits, tiles_per_split, stride_n, stride_gn, inner, outer, other_inner, other_outer, beta, alpha,
    BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The same from raw logits in memory: raw, other_raw [N, V] fp32 (row strides stride_n, stride_gn)."""
    pid = tl.program_id(0)
    rows = pid % N + tl.arange(0, 1)
    split = pid // N
    inside = rows < N
    top, log_sum, other_top, other_log_sum = load_norms(norms, rows, N, inside)
    scale = load_scale(outer_rows, rows, inside, outer)
    other_scale = load_scale(other_outer_rows, rows, inside, other_outer)
    source = raw + rows.to(tl.int64)[:, None] * stride_n
    other_source = other_raw + rows.to(tl.int64)[:, None] * stride_gn
    value = tl.zeros((1,), tl.float32)
    sure = tl.zeros((1,), tl.float32)
    mass = tl.zeros((1,), tl.float32)
    rest = tl.zeros((1,), tl.float32)
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tl.cdiv(V, BLOCK_V))
    for tile in range(begin, end):
        col = (tile * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
        left = tl.load(source + col, mask=col < V, other=0.0)
        right = tl.load(other_source + col, mask=col < V, other=0.0)
        z, _ = finish_logits(left, bias, col, V, inner, scale, SOFTCAP)
        other, _ = finish_logits(right, other_bias, col, V, other_inner, other_scale, OTHER_SOFTCAP)
        p, term, g = divergence_terms(z, other, top, log_sum, other_top, other_log_sum, beta, alpha, KIND)
        value, sure, mass, rest = fold_divergence(p, term, g, value, sure, mass, rest, KIND)
    plane = tl.cast(splits, tl.int64) * N
    out = parts + tl.cast(split, tl.int64) * N + rows
    tl.store(out, value)
    tl.store(out + plane, sure)
    tl.store(out + 2 * plane, mass)
    tl.store(out + 3 * plane, rest)


# -- launchers -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DivergenceStats:
    """Of N rows, each [N] float32: value D; reference, the g that the others are taken relative to (that of a word
    likelier than 3/4, whose gradient would otherwise cancel; else 0); mean = E_p[g - reference]."""

    value: Tensor
    reference: Tensor
    mean: Tensor


def join(parts: Tensor, norms: Tensor) -> DivergenceStats:
    """parts [4, splits, N] -> DivergenceStats. E_p[g - s] = (sum p g - s sum p) / sum p, the first two over the words
    but the sure one, whose own term is zero: nothing cancels as its probability e^-log_sum nears 1. Divided by the sum
    of p, which is 1 but for the rounding of log_sum, so that this rounding does not enter times E[g]."""
    value, sure, mass, rest = parts.sum(1).unbind(0)
    total = mass + torch.where(mass < 0.5, torch.exp(-norms[1]), 0)
    return DivergenceStats(value, sure, (rest - torch.where(sure == 0, 0, sure * mass)) / total)


def divergence_stats(
    student: Operand,
    teacher: Operand,
    norms: Tensor,
    kind: str,
    beta: float = 0.5,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> DivergenceStats:
    """D and E_p[g] of every row; [N, V] is never formed. One GEMM a head.

    Args: student, teacher: any strides, one V; each its own dtype and hidden size. norms: [4, N] float32, the maximum
        and log-sum of the student's logits, then of the teacher's. kind: one of KINDS. beta: jsd alone.
        tile, splits: overrides of the table's tile and of the number of column ranges.
    Returns: DivergenceStats; extra memory 16 * splits * N bytes.
    Raises: ValueError, TypeError on operands that do not fit.
    """
    n, v, h, k = check_pair(student, teacher, norms)
    tile, tma = pair_tile(tile, DIVERGENCE_STATS, student, teacher)
    tiles, blocks = triton.cdiv(v, tile.columns), triton.cdiv(n, tile.rows)
    splits = min(splits or pick_splits(blocks, tiles, processor_count(student.hidden), ROW_GROUP), tiles)
    each = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, each)
    parts = torch.empty((4, splits, n), dtype=torch.float32, device=norms.device)
    if n:
        inner, outer, outer_rows = student.scale.arguments()
        other_inner, other_outer, other_outer_rows = teacher.scale.arguments()
        divergence_stats_kernel[(blocks * splits,)](
            *operand_arguments(student, tile, tma), *operand_arguments(teacher, tile, tma),
            outer_rows, other_outer_rows, norms, parts, n, v, h, k, splits, each,
            *student.hidden.stride(), *student.weight.stride(), *teacher.hidden.stride(), *teacher.weight.stride(),
            inner, outer, other_inner, other_outer, beta, 1.0 - beta,
            BLOCK_N=tile.rows, BLOCK_V=tile.columns, BLOCK_K=tile.depth, GROUP=ROW_GROUP,
            TMA=tma, EVEN_K=h % tile.depth == 0 and k % tile.depth == 0,
            WIDEN=widen_dots(student.hidden) or widen_dots(teacher.hidden),
            SOFTCAP=student.scale.softcap, OTHER_SOFTCAP=teacher.scale.softcap, KIND=KINDS.index(kind),
            PARTS=tile.parts, **tile.options(),
        )  # fmt: skip
    return join(parts, norms)


def divergence_row_stats(
    raw: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    scales: tuple[LogitScale, LogitScale],
    norms: Tensor,
    kind: str,
    beta: float = 0.5,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> DivergenceStats:
    """The same from raw logits in memory: raw (student's, teacher's) [N, V] float32, unit inner stride; only read."""
    check_raw(raw, norms)
    n, v = raw[0].shape
    tile = tile or pick(ROWS, raw[0])
    tiles = triton.cdiv(v, tile.columns)
    splits = min(splits or pick_splits(n, tiles, 4 * processor_count(raw[0])), tiles)
    each = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, each)
    parts = torch.empty((4, splits, n), dtype=torch.float32, device=norms.device)
    if n:
        inner, outer, outer_rows = scales[0].arguments()
        other_inner, other_outer, other_outer_rows = scales[1].arguments()
        divergence_row_stats_kernel[(n * splits,)](
            raw[0], packed(biases[0]), raw[1], packed(biases[1]), outer_rows, other_outer_rows, norms, parts,
            n, v, splits, each, raw[0].stride(0), raw[1].stride(0), inner, outer, other_inner, other_outer,
            beta, 1.0 - beta,
            BLOCK_V=tile.columns, SOFTCAP=scales[0].softcap, OTHER_SOFTCAP=scales[1].softcap, KIND=KINDS.index(kind),
            **tile.options(),
        )  # fmt: skip
    return join(parts, norms)
