"""What the two-head divergence kernels share: the terms of D and its derivative, operands and their checks.

With p and q the softmax of the student's and of the teacher's logits, D(p, q) = sum of the terms, g_v = dD/dp_v:
    FORWARD  q log(q/p)                           p - q is the gradient itself
    REVERSE  p log(p/q)                           log(p/q)
    JSD      b q log(q/m) + (1-b) p log(p/m)      (1-b) log(p/m),   m = b q + (1-b) p
    TVD      |p - q| / 2                          sign(p - q) / 2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LogitScale, check_operands, descriptor, has_descriptor, interpreting, packed
from .numerics import to_logits
from .tiles import DIVERGENCE_FP32, DIVERGENCE_POINTERS, Tile, pick

KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")
FORWARD, REVERSE, JSD, TVD = (tl.constexpr(i) for i in range(4))


# -- device functions ----------------------------------------------------------------------------------------------
@triton.jit
def expm1_below(x):
    """exp(x) - 1 for x <= 0: its series while that is small, within 2 ulp."""
    s = 1.0 / 720.0 + x * (1.0 / 5040.0)
    s = 1.0 / 120.0 + x * s
    s = 1.0 / 24.0 + x * s
    s = 1.0 / 6.0 + x * s
    s = 0.5 + x * s
    return tl.where(x > -0.35, x + x * x * s, tl.exp(x) - 1.0)


@triton.jit
def divergence_terms(z, other, top, log_sum, other_top, other_log_sum, beta, alpha, KIND: tl.constexpr):
    """Logits of both heads [R, C], rows' normalisers [R] -> (p, terms of D, g), [R, C] each; g = p - q for FORWARD."""
    a = (z - top[:, None]) - log_sum[:, None]
    b = (other - other_top[:, None]) - other_log_sum[:, None]
    p = tl.exp(a)
    q = tl.exp(b)
    # log p = -inf beside log q = -inf: the one whose probability multiplies the ratio is bounded, and 0 * ratio = 0.
    if KIND != FORWARD:
        a = tl.maximum(a, -1000.0)
    if KIND != REVERSE:
        b = tl.maximum(b, -1000.0)
    ratio = a - b
    below = -tl.abs(ratio)
    shrink = expm1_below(below)  # min(p, q) / max(p, q) - 1
    # p - q without cancellation.
    size = -tl.maximum(p, q) * shrink
    gap = tl.where(ratio < 0.0, -size, size)
    if KIND == FORWARD:
        # sum q log(q/p) = sum (q log(q/p) + p - q): every term >= 0, and blind to an error of either normaliser.
        term = gap - tl.where(q == 0.0, 0.0, q * ratio)
        g = gap
    elif KIND == REVERSE:
        term = tl.where(p == 0.0, 0.0, p * ratio) - gap
        g = ratio
    elif KIND == TVD:
        term = 0.5 * size
        g = tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, 0.0))
    else:
        # Where p >= q, log p/m is taken straight, elsewhere log q/m; the other of the two lies log p/q apart.
        above = ratio >= 0.0
        share = tl.where(above, beta, alpha)
        lost = share * shrink  # m / max(p, q) - 1, good while it is small
        near = lost > -0.5
        u = 1.0 + lost
        whole = tl.where(above, alpha, beta) + share * tl.exp(below)  # m / max(p, q), good where that is small
        log_m = tl.log(tl.where(near, u, whole))
        # As numerics.log1p: the rounding of u is undone by the factor lost / (u - 1).
        log_m = tl.where(near, tl.where(u == 1.0, lost, log_m * (lost / tl.where(u == 1.0, 1.0, u - 1.0))), log_m)
        p_to_m = tl.where(above, -log_m, ratio - log_m)
        q_to_m = tl.where(above, -log_m - ratio, -log_m)
        term = alpha * p * p_to_m + beta * q * q_to_m
        g = alpha * p_to_m
    return p, term, g


@triton.jit
def load_norms(norms, rows, N, inside):
    """(top, log_sum, other_top, other_log_sum) of rows; past the end such that p = q = 0."""
    plane = tl.cast(N, tl.int64)
    top = tl.load(norms + rows, mask=inside, other=float("inf"))
    log_sum = tl.load(norms + plane + rows, mask=inside, other=0.0)
    other_top = tl.load(norms + 2 * plane + rows, mask=inside, other=float("inf"))
    other_log_sum = tl.load(norms + 3 * plane + rows, mask=inside, other=0.0)
    return top, log_sum, other_top, other_log_sum


@triton.jit
def load_scale(outer_rows, rows, inside, outer):
    """[R, 1] per-row scale, or the float."""
    if outer_rows is not None:
        scale = tl.load(outer_rows + rows, mask=inside, other=1.0)[:, None]
    else:
        scale = outer
    return scale


@triton.jit
def finish_logits(raw, bias, col, V, inner, scale, SOFTCAP: tl.constexpr):
    """Raw logits of columns col [C] or [1, C] -> (z, t) as numerics.to_logits, z = -inf outside the vocabulary."""
    if bias is not None:
        raw += tl.load(bias + col, mask=col < V, other=0.0).to(tl.float32)
    z, t = to_logits(raw, inner, scale, SOFTCAP)
    return tl.where(col < V, z, float("-inf")), t


# -- host ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Operand:
    """One head's part in a launch: hidden [N, H] and weight [V, H] of one dtype, bias [V] or None, LogitScale."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: LogitScale


def pair_tile(tile: Tile | None, table: dict[str, Tile], student: Operand, teacher: Operand) -> tuple[Tile, bool]:
    """(tile, whether all four matrices are read through tensor maps); without them, DIVERGENCE_POINTERS."""
    wide = torch.float32 in (student.hidden.dtype, teacher.hidden.dtype) and not interpreting()
    tile = tile or (DIVERGENCE_FP32 if wide else pick(table, student.hidden))
    if not tile.descriptors:
        return tile, False
    matrices = (student.hidden, student.weight, teacher.hidden, teacher.weight)
    if all(has_descriptor(x) for x in matrices):
        return tile, True
    return (tile if interpreting() else DIVERGENCE_POINTERS), False


def operand_arguments(x: Operand, tile: Tile, tma: bool) -> tuple:
    """(hidden, weight, bias) as the kernels take them."""
    bias = packed(x.bias)
    if not tma:
        return x.hidden, x.weight, bias
    return descriptor(x.hidden, tile.rows, tile.depth), descriptor(x.weight, tile.columns, tile.depth), bias


def check_pair(student: Operand, teacher: Operand, norms: Tensor) -> tuple[int, int, int, int]:
    """(N, V, H, K), or ValueError/TypeError naming both sides. norms: [4, N] float32."""
    n = student.hidden.shape[0]
    if norms.shape != (4, n) or norms.dtype != torch.float32 or not norms.is_contiguous():
        got = f"{list(norms.shape)} {norms.dtype}"
        raise ValueError(f"norms is {got} but hidden is {list(student.hidden.shape)}; expected [4, N={n}] float32")
    _, v, h = check_operands(student.hidden, student.weight, norms[0], student.bias)
    n2, v2, k = check_operands(teacher.hidden, teacher.weight, teacher.hidden[:, 0], teacher.bias)
    if (n2, v2) != (n, v):
        raise ValueError(f"the student is [N={n}, V={v}] but the teacher is [N={n2}, V={v2}]; expected the same")
    return n, v, h, k


def check_raw(raw: tuple[Tensor, Tensor], norms: Tensor) -> None:
    """ValueError unless both are [N, V] float32 with unit inner stride and norms is [4, N] float32."""
    for x in raw:
        if x.shape != raw[0].shape or x.dtype != torch.float32 or (x.shape[1] > 1 and x.stride(1) != 1):
            got = f"{list(x.shape)} {x.dtype}, strides {x.stride()}"
            raise ValueError(f"raw is {got}; expected {list(raw[0].shape)} float32 with unit inner stride, both heads")
    n = raw[0].shape[0]
    if norms.shape != (4, n) or norms.dtype != torch.float32 or not norms.is_contiguous():
        raise ValueError(f"norms is {list(norms.shape)} {norms.dtype} but raw has {n} rows; expected [4, N] float32")
