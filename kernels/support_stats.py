"""Log-softmax over each row's own kept words: gathered dot products, statistics, dlogits and the gathered sums back.

One program per row in the forward: blocks of kept entries by blocks of H, folded into the running statistics as a
vocabulary's tiles are (numerics.py). The raw logits [nnz] are kept. Backward: dz over [nnz], then
    dH_n = sum of dz_e W_k over row n's entries,   dW_k = sum of dz_e h_n over word k's entries (sorted by word)
both by one kernel with one program per sum and block of H: no atomics, one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LogitScale, check_operands, packed
from .linear_dlogits import RowGradient
from .numerics import fold_tile, log1p, to_dlogits, to_logits
from .tiles import GATHER, VECTORS, Tile, pick

SPAN = 32  # blocks of entries that one partial sum takes


# -- kernels -------------------------------------------------------------------------------------------------------
@triton.jit
def gathered_dots(source, index, known, x, H, stride_sn, stride_sk, stride_xk, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS] float32 source[index] . x over H; rows that are not `known` are read as 0."""
    base = source + index[:, None] * stride_sn
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for h0 in range(0, H, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        a = tl.load(x + h.to(tl.int64) * stride_xk, mask=h < H, other=0.0).to(tl.float32)
        wide = h[None, :].to(tl.int64)
        b = tl.load(base + wide * stride_sk, mask=known[:, None] & (wide < H), other=0.0).to(tl.float32)
        total += a[None, :] * b
    return tl.sum(total, 1)


@triton.jit
def support_stats_kernel(
    hidden, weight, bias, targets, indices, starts, stops, outer_rows, raw,
    out_max, out_log_sum, out_logprobs, out_entropy, out_lse, out_squares, out_hits,
    V, H, stride_hn, stride_hk, stride_wv, stride_wk, inner, outer,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Row n keeps indices[starts[n]:stops[n]]. raw [nnz] fp32; out_hits bit 0: target kept, bit 1: it is the argmax."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    begin, end = tl.load(starts + row), tl.load(stops + row)
    target = tl.load(targets + row).to(tl.int64)
    if outer_rows is not None:
        scale = tl.load(outer_rows + row)
    else:
        scale = outer
    top = tl.full((1,), float("-inf"), tl.float32)
    tail = tl.zeros((1,), tl.float32)
    weighted = tl.zeros((1,), tl.float32)
    squares = tl.zeros((1,), tl.float32)
    at_target = tl.zeros((1,), tl.float32)
    found = tl.zeros((1,), tl.int32)
    first = tl.zeros((1,), tl.int32)
    for e0 in range(begin, end, BLOCK_N):
        e = e0 + tl.arange(0, BLOCK_N)
        inside = e < end
        word = tl.load(indices + e, mask=inside, other=-1)
        known = (word >= 0) & (word < V)
        x = hidden + row * stride_hn
        z = gathered_dots(weight, word, known, x, H, stride_wv, stride_wk, stride_hk, BLOCK_N, BLOCK_H)
        if bias is not None:
            z += tl.load(bias + word, mask=known, other=0.0).to(tl.float32)
        z = tl.where(known, z, float("nan"))  # a word outside the vocabulary poisons its row
        tl.store(raw + e, z, mask=inside)
        z, _ = to_logits(z, inner, scale, SOFTCAP)
        hit = inside & (word == target)
        at_target += tl.sum(tl.where(hit, z, 0.0), 0)
        found += tl.sum(hit.to(tl.int32), 0)
        z = tl.where(inside, z, float("-inf"))
        top, tail, first, weighted, squares = fold_tile(
            z[None, :], (e - begin).to(tl.int32), top, tail, first, weighted, squares, ENTROPY, SQUARES, False
        )  # fmt: skip
    empty = end <= begin
    poison = tl.where((tl.abs(top) == float("inf")) & (end > begin), float("nan"), 0.0)
    log_sum = log1p(tail) + poison
    logprobs = tl.where(found > 0, at_target - top - log_sum, float("-inf"))
    entropy = log_sum + weighted / (1.0 + tail)
    most = tl.log(tl.maximum(end - begin, 1).to(tl.float32))
    tl.store(out_max + row + one, top)
    tl.store(out_log_sum + row + one, log_sum)
    tl.store(out_logprobs + row + one, logprobs)
    tl.store(out_entropy + row + one, tl.where(entropy > most, most, entropy))
    tl.store(out_lse + row + one, top + log_sum)
    tl.store(out_squares + row + one, tl.where(empty, float("-inf"), log1p(squares) - 2.0 * log_sum))
    is_argmax = (found > 0) & (at_target == top)
    tl.store(out_hits + row + one, ((found > 0).to(tl.int32) + 2 * is_argmax.to(tl.int32)).to(tl.int8))


@triton.jit
def support_dlogits_kernel(
    raw, targets, indices, starts, stops, outer_rows, top, rise, fall, at_target, out_dz,
    inner, outer, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """out_dz [nnz] = dL/d(raw), one program per row; entries of no row are left as they are."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    begin, end = tl.load(starts + row), tl.load(stops + row)
    target = tl.load(targets + row).to(tl.int64)
    if outer_rows is not None:
        scale = tl.load(outer_rows + row)
    else:
        scale = outer
    row_top = tl.load(top + row + one)
    row_rise = tl.load(rise + row + one)
    row_fall = tl.load(fall + row + one) if ENTROPY else row_rise
    row_target = tl.load(at_target + row + one)
    for e0 in range(begin, end, BLOCK):
        e = (e0 + tl.arange(0, BLOCK))[None, :]
        z = tl.load(raw + e, mask=e < end, other=0.0)
        word = tl.load(indices + e, mask=e < end, other=-1)
        z, t = to_logits(z, inner, scale, SOFTCAP)
        d = to_dlogits(z, t, word == target, row_top, row_rise, row_fall, row_target, SOFTCAP, ENTROPY)
        tl.store(out_dz + e, d, mask=e < end)


@triton.jit
def gather_sum_kernel(
    source, index, coef, starts, stops, out, N, H, stride_sn, stride_sk, stride_on,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """out[s] = sum of coef[e] source[index[e]] for e in [starts[s], stops[s]); coef 0 reads nothing."""
    s = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    wide = h[None, :].to(tl.int64)
    begin, end = tl.load(starts + s), tl.load(stops + s)
    total = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for span in range(begin, end, SPAN * BLOCK_N):  # sums of sums: their error does not grow with the number of terms
        part = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for e0 in range(span, tl.minimum(span + SPAN * BLOCK_N, end), BLOCK_N):
            e = e0 + tl.arange(0, BLOCK_N)
            c = tl.load(coef + e, mask=e < end, other=0.0)
            i = tl.load(index + e, mask=e < end, other=0)
            used = (c != 0.0) & (i >= 0) & (i < N)
            x = tl.load(source + i[:, None] * stride_sn + wide * stride_sk, mask=used[:, None] & (wide < H), other=0.0)
            part += c[:, None] * x.to(tl.float32)
        total += part
    tl.store(out + s * stride_on + h, tl.sum(total, 0).to(out.dtype.element_ty), mask=h < H)


# -- launchers -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SupportStats:
    """raw: [nnz] float32, h.W + b of each entry that a row keeps (others undefined). The rest [N] float32 or bool."""

    raw: Tensor
    max: Tensor
    log_sum: Tensor
    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    log_sum_sq_probs: Tensor
    found: Tensor
    is_argmax: Tensor


@dataclass(frozen=True)
class Entries:
    """Row n keeps indices[starts[n]:stops[n]]. indices: [nnz], starts and stops: [N], all int64."""

    indices: Tensor
    starts: Tensor
    stops: Tensor

    def check(self, n: int) -> None:
        for name in ("indices", "starts", "stops"):
            x = getattr(self, name)
            if x.dim() != 1 or x.dtype != torch.int64 or (name != "indices" and x.shape[0] != n):
                raise ValueError(f"{name} is {list(x.shape)} {x.dtype}; expected int64, [nnz] or [N={n}]")

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return packed(self.indices), packed(self.starts), packed(self.stops)


def support_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    entries: Entries,
    bias: Tensor | None = None,
    scale: LogitScale | None = None,
    *,
    entropy: bool = True,
    squares: bool = True,
    tile: Tile | None = None,
) -> SupportStats:
    """Statistics of softmax over each row's kept words; 2*nnz*H flops, 4*nnz bytes.

    Args: hidden [N, H], weight [V, H], bias [V] or None, targets [N] and scale as linear_stats; entries: Entries.
        entropy, squares: False leaves entropy, log_sum_sq_probs undefined.
    Returns: SupportStats. A word outside [0, V) makes its row NaN; an empty row has log-prob and logsumexp -inf.
    Raises: ValueError, TypeError on operands that do not fit.
    """
    n, v, h = check_operands(hidden, weight, targets, bias)
    entries.check(n)
    scale, tile = scale or LogitScale(), tile or pick(GATHER, hidden)
    raw = torch.empty(entries.indices.shape, dtype=torch.float32, device=hidden.device)
    out = [torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(6)]
    hits = torch.empty(n, dtype=torch.int8, device=hidden.device)
    if n:
        inner, outer, outer_rows = scale.arguments()
        support_stats_kernel[(n,)](
            hidden, weight, packed(bias), packed(targets), *entries.arguments(), outer_rows, raw, *out, hits,
            v, h, *hidden.stride(), *weight.stride(), inner, outer,
            BLOCK_N=tile.rows, BLOCK_H=tile.columns, SOFTCAP=scale.softcap, ENTROPY=entropy, SQUARES=squares,
            **tile.options(),
        )  # fmt: skip
    return SupportStats(raw, *out, (hits & 1) > 0, (hits & 2) > 0)


def support_dlogits(
    raw: Tensor,
    targets: Tensor,
    entries: Entries,
    scale: LogitScale,
    rows: RowGradient,
    *,
    entropy: bool = True,
    tile: Tile | None = None,
) -> Tensor:
    """[nnz] float32 dL/d(raw) of the entries that a row keeps, 0 for the others. rows: as linear_dlogits takes it."""
    n = targets.shape[0]
    entries.check(n)
    dz = torch.zeros_like(raw)
    tile = tile or pick(VECTORS, raw)
    if n:
        inner, outer, outer_rows = scale.arguments()
        indices, starts, stops = entries.arguments()
        support_dlogits_kernel[(n,)](
            raw, packed(targets), indices, starts, stops, outer_rows, *rows.arguments(), dz, inner, outer,
            BLOCK=min(tile.columns, 256), SOFTCAP=scale.softcap, ENTROPY=entropy, **tile.options(),
        )  # fmt: skip
    return dz


def gather_sum(source: Tensor, coef: Tensor, entries: Entries, out: Tensor, tile: Tile | None = None) -> Tensor:
    """out[s] = sum of coef[e] * source[indices[e]] over e in [starts[s], stops[s]), in float32, rounded once.

    Args: source: [N, H]. coef: [nnz] float32; an entry of coefficient 0 is not read. entries: Entries, of out's rows.
        out: [S, H] with unit inner stride; every row is written.
    Returns: out.
    """
    (s, h), n = out.shape, source.shape[0]
    entries.check(s)
    if source.dim() != 2 or source.shape[1] != h or coef.shape != entries.indices.shape:
        got = f"source {list(source.shape)}, coef {list(coef.shape)}, indices {list(entries.indices.shape)}"
        raise ValueError(f"{got}, out {list(out.shape)}; expected [N, H], [nnz], [nnz], [S, H]")
    tile = tile or pick(GATHER, source)
    if s and h:
        index, starts, stops = entries.arguments()
        gather_sum_kernel[(s, triton.cdiv(h, tile.columns))](
            source, index, packed(coef), starts, stops, out, n, h, *source.stride(), out.stride(0),
            BLOCK_N=tile.rows, BLOCK_H=tile.columns, SPAN=SPAN, **tile.options(),
        )  # fmt: skip
    return out
