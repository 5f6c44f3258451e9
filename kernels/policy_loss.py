"""The clipped surrogate with KL and entropy terms, over [T] vectors: loss, its coefficients and its metrics at once.

    d = log pi - log pi_old,  r = e^d,  D = log pi - log pi_ref,  A = advantage,  w = weight
    loss = sum_t w (-clip(r) A + kl_coef KL(D) - entropy_coef H)
    c_t = dloss/dlogp_t = w (-A r [not clipped] + kl_coef dKL/dD),   h_t = dloss/dH_t = -w entropy_coef

The sums are taken in a fixed order: a program folds its own range of tokens, a second kernel adds the programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import packed
from .tiles import VECTORS, Tile, pick

SUMS = ("loss", "above", "below", "clipped", "ratio", "kl")
KL_KINDS = ("k1", "k2", "k3")
STEPS = 4  # blocks of tokens per program: one launch is enough up to 4096 tokens
LINEAR_FROM = tl.constexpr(40.0)  # past e^40 the exponential goes on as its tangent
SERIES_BELOW = tl.constexpr(0.5)


# -- kernels -------------------------------------------------------------------------------------------------------
@triton.jit
def full_exp(x):
    """exp(x) within an ulp at every size: x = n ln 2 + r, |r| <= ln 2 / 2, exp(x) = 2^n exp(r), exp(r) by its series.

    The chip's own exp rounds x log2(e) once, which at |x| = 20 costs 10 ulp. n times the first part of ln 2 is exact.
    """
    x = tl.where(x < -150.0, -150.0, x)  # exp is 0 there already, and inf - inf is not
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.4286068202862268e-06
    series = tl.full(x.shape, 1.0, tl.float32)
    for i in tl.static_range(7):  # 1 + r/1 (1 + r/2 (1 + ... r/7)): the next term is below 2^-27
        series = 1.0 + r * (1.0 / (7 - i)) * series
    return series * tl.exp2(n)


@triton.jit
def tangent_exp(x):
    """(exp(x) with its tangent past 40, the derivative of that)."""
    over = tl.where(x > LINEAR_FROM, x - LINEAR_FROM, 0.0)
    e = full_exp(tl.where(x > LINEAR_FROM, LINEAR_FROM, x))
    return e * (1.0 + over), e


@triton.jit
def kl_terms(gap, KIND: tl.constexpr):
    """(KL estimate, its derivative) at D = gap: k1 D, k2 D^2 / 2, k3 e^-D - 1 + D."""
    if KIND == 1:
        return gap, tl.full(gap.shape, 1.0, tl.float32)
    elif KIND == 2:
        return 0.5 * gap * gap, gap
    else:
        x = -gap
        small = tl.abs(x) < SERIES_BELOW
        near = tl.where(small, x, 0.0)
        series = tl.full(x.shape, 1.0, tl.float32)
        for i in tl.static_range(11):  # 1 + x/3 (1 + x/4 (1 + ... x/13)): the next term is below 2^-30
            series = 1.0 + near * (1.0 / (13 - i)) * series
        value, slope = tangent_exp(x)
        # e^x - 1 = x (1 + x/2 S) where e^x - 1 - x = x^2/2 S
        value = tl.where(small, 0.5 * near * near * series, value - 1.0 - x)
        slope = tl.where(small, near * (1.0 + 0.5 * near * series), slope - 1.0)
        return value, -slope


@triton.jit
def policy_loss_kernel(
    logprobs, entropy, old, ref, advantages, weights, out_c, out_h, parts,
    T, log_high, log_low, log_dual, ratio_high, ratio_low, ratio_dual, kl_coef, entropy_coef,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, DUAL: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Tokens [pid * STEPS * BLOCK, ...) -> out_c, out_h [T] and parts [6, programs] in the order of SUMS.

    old None: d = 0. ref None: no KL, KIND 0: KL is reported but not in the loss. entropy None: no entropy term.
    """
    pid = tl.program_id(0).to(tl.int64)
    zero = tl.zeros((BLOCK,), tl.float32)
    loss_sum, above_sum, below_sum, clipped_sum, ratio_sum, kl_sum = zero, zero, zero, zero, zero, zero
    for step in range(STEPS):
        t = (pid * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = t < T
        logp = tl.load(logprobs + t, mask=inside, other=0.0).to(tl.float32)
        if old is not None:
            d = logp - tl.load(old + t, mask=inside, other=0.0).to(tl.float32)
        else:
            d = logp - logp
        a = tl.load(advantages + t, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + t, mask=inside, other=0.0)
        used = weight != 0.0
        w = weight.to(tl.float32)
        above = (a > 0.0) & (d > log_high)
        below = (a < 0.0) & (d < log_low)
        clipped = above | below
        value, slope = tangent_exp(d)
        ratio = tl.where(above, ratio_high, tl.where(below, ratio_low, value))
        if DUAL:
            dual = (a < 0.0) & (d > log_dual)
            ratio = tl.where(dual, ratio_dual, ratio)
            clipped = clipped | dual
        loss = -ratio * a
        c = tl.where(clipped, 0.0, -slope * a)
        if ref is not None:
            gap = logp - tl.load(ref + t, mask=inside, other=0.0).to(tl.float32)
            if KIND != 0:
                kl, d_kl = kl_terms(gap, KIND)
                loss += kl_coef * kl
                c += kl_coef * d_kl
            reported, _ = kl_terms(gap, 3)
            kl_sum += tl.where(inside, reported, 0.0)
        if entropy is not None:
            loss -= entropy_coef * tl.load(entropy + t, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_h + t, tl.where(used, -w * entropy_coef, 0.0), mask=inside)
        # A token of weight zero contributes nothing, whatever its value.
        tl.store(out_c + t, tl.where(used, w * c, 0.0), mask=inside)
        loss_sum += tl.where(used, w * loss, 0.0)
        above_sum += tl.where(above, 1.0, 0.0)
        below_sum += tl.where(below, 1.0, 0.0)
        clipped_sum += tl.where(clipped, 1.0, 0.0)
        ratio_sum += tl.where(inside, value, 0.0)
    plane = tl.num_programs(0).to(tl.int64)
    tl.store(parts + pid, tl.sum(loss_sum, 0))
    tl.store(parts + plane + pid, tl.sum(above_sum, 0))
    tl.store(parts + 2 * plane + pid, tl.sum(below_sum, 0))
    tl.store(parts + 3 * plane + pid, tl.sum(clipped_sum, 0))
    tl.store(parts + 4 * plane + pid, tl.sum(ratio_sum, 0))
    tl.store(parts + 5 * plane + pid, tl.sum(kl_sum, 0))


@triton.jit
def finish_sums_kernel(parts, out_sums, P, BLOCK: tl.constexpr):
    """out_sums[k] = sum over the programs of parts [k, P], in float64."""
    k = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, P, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(parts + k * P + at, mask=at < P, other=0.0).to(tl.float64)
    tl.store(out_sums + k, tl.sum(total, 0).to(tl.float32))


# -- launcher ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Surrogate:
    """The numbers of the law, as the kernel takes them. log_dual None: no dual clip. kl None: no KL in the loss."""

    log_high: float
    log_low: float
    log_dual: float | None
    ratio_high: float
    ratio_low: float
    ratio_dual: float
    kl: str | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0


@dataclass(frozen=True)
class PolicyLoss:
    """sums: [6] float32 in the order of SUMS, the loss first. c: [T] float32. h: [T] float32 or None."""

    sums: Tensor
    c: Tensor
    h: Tensor | None


def policy_loss(
    law: Surrogate,
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    entropy: Tensor | None = None,
    tile: Tile | None = None,
) -> PolicyLoss:
    """Loss, coefficients and metric sums of T tokens in one launch (two above 4096 tokens), without a host sync.

    Args:
        law: Surrogate. logprobs, advantages, weights: [T] float; all are widened to float32, weights float64 narrowed.
        old: [T], or None for a ratio of exactly 1. ref: [T] or None; needed when law.kl is set.
        entropy: [T], needed when law.entropy_coef is not 0.
    Returns: PolicyLoss; the metric sums run over every token, weights aside ("kl" is k3, 0 without ref).
    Raises: ValueError on vectors that do not fit.
    """
    given = {"logprobs": logprobs, "advantages": advantages, "weights": weights, "old": old, "ref": ref}
    entropy = entropy if law.entropy_coef else None
    check_vectors(logprobs.shape[0] if logprobs.dim() == 1 else -1, {**given, "entropy": entropy})
    if (law.kl and ref is None) or (law.entropy_coef and entropy is None):
        raise ValueError("a KL term needs ref [T] and an entropy term needs entropy [T]; got None")
    t = logprobs.shape[0]
    tile = tile or pick(VECTORS, logprobs)
    programs = triton.cdiv(t, STEPS * tile.columns)
    parts = torch.empty((len(SUMS), programs), dtype=torch.float32, device=logprobs.device)
    c = torch.empty(t, dtype=torch.float32, device=logprobs.device)
    h = torch.empty_like(c) if law.entropy_coef else None
    if t == 0:
        return PolicyLoss(parts.new_zeros(len(SUMS)), c, h)
    vectors = [packed(x) for x in (logprobs, entropy, old, ref, advantages, weights)]
    dual = law.log_dual is not None
    policy_loss_kernel[(programs,)](
        *vectors, c, h, parts,
        t, law.log_high, law.log_low, law.log_dual if dual else 0.0,
        law.ratio_high, law.ratio_low, law.ratio_dual, law.kl_coef, law.entropy_coef,
        BLOCK=tile.columns, STEPS=STEPS, DUAL=dual, KIND=0 if law.kl is None else 1 + KL_KINDS.index(law.kl),
        **tile.options(),
    )  # fmt: skip
    if programs == 1:
        return PolicyLoss(parts.view(-1), c, h)
    sums = torch.empty(len(SUMS), dtype=torch.float32, device=logprobs.device)
    finish_sums_kernel[(len(SUMS),)](parts, sums, programs, BLOCK=256, enable_fp_fusion=True)
    return PolicyLoss(sums, c, h)


def check_vectors(t: int, vectors: dict[str, Tensor | None]) -> None:
    """ValueError unless every vector that is given is [T]."""
    for name, x in vectors.items():
        if x is not None and (x.dim() != 1 or x.shape[0] != t):
            raise ValueError(f"{name} is {list(x.shape)}; expected [T={t}] as logprobs")
