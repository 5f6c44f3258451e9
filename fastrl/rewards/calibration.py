"""Transforms of scores before they become advantages: length and confidence calibration, tails, demonstrations, steps.

Every function takes and gives [N] tensors (one number a completion), is computed in float32 at least, and treats the
completions of a batch alike, whatever their order. NaN marks a completion without a score: it is left out of every
statistic and stays NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _like(name: str, x: Tensor, rewards: Tensor) -> Tensor:
    if x.shape != rewards.shape:
        raise ValueError(f"{name} must be {list(rewards.shape)} like the rewards, got {list(x.shape)}")
    return x.to(_wide(rewards).dtype)


def _mean(x: Tensor) -> Tensor:
    """Of the numbers that are there; 0 where there are none."""
    seen = ~x.isnan()
    return x.nan_to_num(0.0).sum() / seen.sum().clamp(min=1)


# -- length (Huang et al. 2024, post-hoc reward calibration, arXiv:2409.17407) -----------------------------------------
def length_mean_calibrated(rewards: Tensor, lengths: Tensor, window: float) -> Tensor:
    """RC-Mean: r_i - mean of the rewards whose length is within `window` (exclusive) of its own, itself included."""
    r, lengths = _wide(rewards), _like("lengths", lengths, rewards)
    near = ((lengths[:, None] - lengths[None, :]).abs() < window) & ~r.isnan()[None, :]
    total = torch.where(near, r.nan_to_num(0.0)[None, :], torch.zeros_like(near, dtype=r.dtype)).sum(1)
    return r - total / near.sum(1).clamp(min=1)


def length_trend_calibrated(rewards: Tensor, lengths: Tensor, fraction: float = 2 / 3, passes: int = 3) -> Tensor:
    """RC-LWR: r_i less the locally weighted linear trend of reward on length (LOWESS, Cleveland 1979).

    fraction: part of the completions that each local fit sees, weighted by the tricube of their distance.
    passes: fits with outliers weighted down by the bisquare of their residual; 1 is the plain fit.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    seen = ~rewards.isnan()
    x, y = _like("lengths", lengths, rewards)[seen].double(), rewards[seen].double()
    if len(x) < 2:
        return _wide(rewards) * 0
    distance = (x[:, None] - x[None, :]).abs()
    reach = distance.sort(1).values[:, max(1, math.ceil(fraction * len(x)) - 1), None]
    tricube = (1 - (distance / reach.clamp(min=1e-12)).clamp(max=1) ** 3) ** 3
    tricube = torch.where(distance == 0, torch.ones_like(tricube), tricube)
    robust, trend = torch.ones_like(x), torch.zeros_like(y)
    for _ in range(passes):
        trend = _local_line(x, y, tricube * robust)
        gap = (y - trend).abs()
        scale = 6 * gap.median()
        if not scale > 1e-12 * y.abs().max():
            break
        robust = (1 - (gap / scale).clamp(max=1) ** 2) ** 2
    out = torch.full_like(_wide(rewards), math.nan)
    out[seen] = (y - trend).to(out.dtype)
    return out


def _local_line(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """[N] value at x_i of the line fitted to all points under weights[i]."""
    total = weights.sum(1).clamp(min=1e-12)
    mx, my = (weights @ x) / total, (weights @ y) / total
    dx = x[None, :] - mx[:, None]
    spread = (weights * dx.square()).sum(1)
    tilt = (weights * dx * (y[None, :] - my[:, None])).sum(1)
    slope = torch.where(spread > 1e-12 * x.square().max().clamp(min=1), tilt / spread.clamp(min=1e-30), 0.0)
    return my + slope * (x - mx)


# -- tails -------------------------------------------------------------------------------------------------------------
def quantile_dropout(rewards: Tensor, quantile: float) -> Tensor:
    """Reward dropout: r where it reaches the batch's quantile, else 0; 0 changes nothing (Lee and Lee 2024)."""
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    r = _wide(rewards)
    if r.numel() == 0 or quantile == 0 or bool(r.isnan().all()):
        return r
    return torch.where(r.isnan() | (r >= r.nanquantile(quantile)), r, torch.zeros_like(r))


def cvar_count(batch: int, step: int, *, alpha: float, rho: float, steps: int, warmup: int) -> int:
    """How many of the lowest rewards are trained at this step (risk-averse RLHF, Chaudhary et al. 2024, 2501.06911).

    All up to `warmup`; then ceil(B max(alpha, 1 - (1 - alpha) (step - warmup) / (rho steps))).
    """
    if not (0 < alpha <= 1 and rho > 0 and steps > 0):
        raise ValueError(f"alpha must be in (0, 1], rho and steps positive; got {alpha}, {rho}, {steps}")
    if step <= warmup:
        return batch
    part = max(alpha, 1 - (1 - alpha) * (step - warmup) / (rho * steps))
    return math.ceil(batch * part - 1e-9)


def lowest(rewards: Tensor, count: int) -> Tensor:
    """[N] bool: the `count` lowest rewards and whatever equals the last of them; NaN never."""
    r = _wide(rewards)
    known = r[~r.isnan()]
    if count <= 0 or not known.numel():
        return torch.zeros_like(r, dtype=torch.bool)
    return r <= known.kthvalue(min(count, known.numel())).values


# -- against another answer to the same prompt -------------------------------------------------------------------------
def demonstration_matched(rewards: Tensor, demonstrations: Tensor) -> Tensor:
    """RCfD: -(R(y) - R(y_demo))^2 (Rita et al. 2024, arXiv:2404.19409)."""
    return -(_wide(rewards) - _like("demonstrations", demonstrations, rewards)).square()


def above_initial(rewards: Tensor, initial: Tensor) -> Tensor:
    """Contrastive rewards: R(y) - R(y of the starting policy) (Shen et al. 2024, arXiv:2403.07708)."""
    return _wide(rewards) - _like("initial", initial, rewards)


# -- stated confidence, c in [0, 1] ------------------------------------------------------------------------------------
def running_mean(mean: float, rewards: Tensor, rate: float = 0.1) -> float:
    """m <- rate mean(r) + (1 - rate) m, before confidence_adjusted reads it."""
    return rate * float(_mean(_wide(rewards))) + (1 - rate) * mean


def confidence_adjusted(
    rewards: Tensor, confidence: Tensor, mean: float, weight: float = 0.5, difference: bool = False
) -> Tensor:
    """PPO-C (Leng et al. 2024, arXiv:2410.09724): r + s w |r| (c - 1/2), s = 1 where r >= mean else -1.

    difference: r + w (r - mean) (c - 1/2).
    """
    r, c = _wide(rewards), _like("confidence", confidence, rewards)
    if difference:
        return r + weight * (r - mean) * (c - 0.5)
    sign = 2 * (r >= mean).to(r.dtype) - 1
    return r + sign * weight * r.abs() * (c - 0.5)


def order_preserving(rewards: Tensor, confidence: Tensor, weight: float = 0.4) -> Tensor:
    """CONQORD (Tao et al. 2024, arXiv:2404.17287): q_i + weight sum_j (q_i - q_j)(c_i - c_j)."""
    q, c = _wide(rewards), _like("confidence", confidence, rewards)
    products = (q[:, None] - q[None, :]) * (c[:, None] - c[None, :])
    return q + weight * products.nan_to_num(0.0).sum(1)


def confidence_score(correct: Tensor, confidence: Tensor) -> Tensor:
    """SaySelf (Xu et al. 2024, arXiv:2405.20974): 1 - 2 (correct - confidence)^2."""
    c = _wide(confidence)
    return 1 - 2 * (_like("correct", correct, c) - c).square()


def bin_calibrated(
    rewards: Tensor, confidence: Tensor, correct: Tensor, weight: float = 1.0, bins: int = 10, least: int = 1
) -> Tensor:
    """r - weight |c - accuracy of the bin that c falls in|; bins of fewer than `least` completions leave r as it is."""
    r, c = _wide(rewards), _like("confidence", confidence, rewards)
    where = (c * bins).long().clamp(0, bins - 1)
    count = r.new_zeros(bins).index_add(0, where, torch.ones_like(c))
    right = r.new_zeros(bins).index_add(0, where, _like("correct", correct, rewards))
    gap = (c - (right / count.clamp(min=1))[where]).abs()
    return r - torch.where(count[where] >= least, weight * gap, torch.zeros_like(gap))


# -- distributions and likeness ----------------------------------------------------------------------------------------
def risk_quantile(mean: Tensor, log_variance: Tensor, quantile: float) -> Tensor:
    """mu + s Phi^-1(q): a low quantile is a cautious reward (distributional preference learning, arXiv:2312.08358)."""
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be strictly between 0 and 1, got {quantile}")
    z = torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)).item()
    return _wide(mean) + z * (0.5 * _wide(log_variance)).exp()


def angular_similarity(a: Tensor, b: Tensor) -> Tensor:
    """(pi - arccos(cos clamped to [0, 1])) / pi of two sets of features [N, D]: in [1/2, 1] (PCRM, 2404.00978)."""
    cosine = torch.nn.functional.cosine_similarity(_wide(a), _wide(b), dim=-1)
    return (math.pi - torch.arccos(cosine.clamp(0.0, 1.0))) / math.pi


# -- labels of a step from K completions of its prefix -----------------------------------------------------------------
def step_label(correct: Tensor, kind: str = "hard", eta: float = 2.0) -> Tensor:
    """[..., K] outcomes -> [...] label of the step: hard any, soft mean (Math-Shepherd, arXiv:2312.08935), or
    entropy: (logsumexp(eta c) - log K) / eta (ER-PRM, Zhang et al. 2024, arXiv:2412.11006)."""
    c = _wide(correct) if correct.is_floating_point() else correct.float()
    if kind == "hard":
        return (c > 0).any(-1).to(c.dtype)
    if kind == "soft":
        return c.mean(-1)
    if kind == "entropy":
        if not eta > 0:
            raise ValueError(f"eta must be positive, got {eta}")
        return ((eta * c).logsumexp(-1) - math.log(c.shape[-1])) / eta
    raise ValueError(f"kind is {kind!r}; expected hard, soft or entropy")


def progress(q: Tensor, before: Tensor, after: Tensor, alpha: float = 1.0) -> Tensor:
    """Q + alpha (V' - V): a step's value and what it gains under a prover policy (Setlur et al. 2024, 2410.08146)."""
    return _wide(q) + alpha * (_wide(after) - _wide(before))
