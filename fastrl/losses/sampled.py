"""On-policy distillation: the student's own tokens, weighed by what the teacher says of them. l = log p(y).

The teacher's log-probs of the tokens are `batch.per_token["teacher_logprobs"]` [T].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.kl import safe_exp
from fastrl.objective import Divergence
from fastrl.tokens import TokenBatch, TokenStats, segment_sum


def teacher_advantage(stats: TokenStats | None, batch: TokenBatch, why: str) -> Tensor:
    """[T] log q(y) - log p_old(y), a constant. Without old log-probs the sampling policy is the current one."""
    teacher = batch.token("teacher_logprobs", why)
    if batch.old_logprobs is not None:
        return teacher - batch.old_logprobs
    if stats is None:
        raise ValueError(f"{why} needs batch.old_logprobs [T], those of the policy that sampled; got None")
    return teacher.to(stats.logprobs.dtype) - stats.logprobs.detach()


def suffix_sums(x: Tensor, batch: TokenBatch, discount: float = 1.0) -> Tensor:
    """[T] float64: sum over u >= t in t's sequence of discount^(u - t) x_u, by doubling the reach log2(T) times."""
    ids, y, step = batch.segment_ids, x.double(), 1
    while step < y.shape[0]:
        ahead = torch.where(ids[step:] == ids[:-step], y[step:], 0.0)
        y = y + discount * torch.nn.functional.pad(ahead, (0, step))
        discount, step = discount * discount, 2 * step
    return y


@dataclass(frozen=True)
class OPD:
    """On-policy distillation: reverse KL by its policy gradient at the sampled tokens. Scope: token.

    c_t = -(log q - log p_old). On policy its expectation is the gradient of KL(p||q) given each prefix.
    """

    paper: ClassVar[str] = "Lu and Thinking Machines 2025, On-Policy Distillation; Gu et al. 2024, arXiv:2306.08543"
    formula: ClassVar[str] = "-(log q - log p_old) log p"
    scope: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "token_mean"

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -teacher_advantage(stats, batch, "opd").to(stats.logprobs.dtype) * stats.logprobs

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"teacher_kl": stats.logprobs - batch.token("teacher_logprobs").to(stats.logprobs.dtype)}


@dataclass(frozen=True)
class OPDImportance(OPD):
    """OPD with the importance ratio rho = p / p_old for batches that the current policy did not sample."""

    formula: ClassVar[str] = "-(log q - log p_old) rho, rho = p / p_old"

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        logp, old = stats.logprobs, batch.old_logprobs
        rho = safe_exp(logp - (logp.detach() if old is None else old.to(logp.dtype)))
        return -teacher_advantage(stats, batch, "opd_is").to(logp.dtype) * rho


@dataclass(frozen=True)
class IWOPD(OPD):
    """OPD whose early tokens weigh more: once the student has left the teacher's path, what follows says less.

    w_t = 1 + gamma (1 - sum_{u<t} |a_u| / sum_u |a_u|), a = log q - log p_old: from 1 + gamma at the first token.
    Needs batch.old_logprobs.
    """

    paper: ClassVar[str] = "On the Position Bias of On-Policy Distillation 2026, arXiv:2606.22600"
    formula: ClassVar[str] = "-w a log p, w = 1 + gamma (1 - prefix|a| / sum|a|), a = log q - log p_old"
    gamma: float = 0.5
    epsilon: float = 1e-8

    def __post_init__(self):
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must be >= 0 and finite, got {self.gamma}")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be positive and finite, got {self.epsilon}")

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        a = teacher_advantage(None, batch, "iw_opd")
        size = a.abs().double()
        total = batch.spread(segment_sum(size, batch))
        before = (total - suffix_sums(size, batch)).clamp(min=0.0)
        weight = 1 + self.gamma * (1 - before / total.clamp(min=self.epsilon))
        return {"per_token": {"distill_advantage": (weight * a).to(a.dtype)}}

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -batch.token("distill_advantage", "iw_opd").to(stats.logprobs.dtype) * stats.logprobs


@dataclass(frozen=True)
class MiniLLM(OPD):
    """Reverse KL of whole sequences: the divergence of this token, and a policy gradient of what comes after it.

    A_t = sum_{u>t} gamma^(u-t-1) (log q - log p_old)(y_u), divided by the sum of those powers with
    length_normalised (the mean of what is left). The ratio is clipped as in PPO. Needs batch.old_logprobs and, with
    single_step, a teacher in the call for KL(p||q) of the token itself. single_step=False leaves that divergence out:
    the token's own log-ratio is then a part of A_t, its sum over u >= t of gamma^(u-t).
    """

    paper: ClassVar[str] = "Gu et al. 2024, arXiv:2306.08543, sec. 2.2"
    formula: ClassVar[str] = "KL(p||q) - min(rho A, clip(rho, 1 - eps, 1 + eps) A), A = mean of later log q/p_old"
    gamma: float = 1.0
    length_normalised: bool = True
    single_step: bool = True
    clip: float = 0.2
    linear_in_divergence: ClassVar[bool] = True
    divergence: ClassVar[Divergence] = Divergence("reverse_kl")

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must be between 0 and 1, got {self.clip}")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("divergence",) if self.single_step else ()

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        a = teacher_advantage(None, batch, "minillm")
        total = self._total(a, batch)
        if self.length_normalised:
            total = total / self._total(torch.ones_like(a), batch).clamp(min=1.0)
        return {"per_token": {"distill_advantage": total.to(a.dtype)}}

    def _total(self, x: Tensor, batch: TokenBatch) -> Tensor:
        """[T] float64 discounted sum from the token after t on; from t itself where no divergence stands for t."""
        return self._later(x, batch) if self.single_step else suffix_sums(x, batch, self.gamma)

    def _later(self, x: Tensor, batch: TokenBatch) -> Tensor:
        """[T] float64 sum over u > t of gamma^(u-t-1) x_u: the suffix sum of the next token of the sequence."""
        sums, ids = suffix_sums(x, batch, self.gamma), batch.segment_ids
        return torch.nn.functional.pad(torch.where(ids[1:] == ids[:-1], sums[1:], 0.0), (0, min(1, len(ids))))

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        advantage = batch.token("distill_advantage", "minillm").to(stats.logprobs.dtype)
        d = stats.logprobs - batch.old_logprobs.to(stats.logprobs.dtype)
        above = (advantage > 0) & (d > math.log1p(self.clip))
        below = (advantage < 0) & (d < math.log1p(-self.clip))
        rho = safe_exp(torch.where(above | below, torch.zeros_like(d), d))
        rho = torch.where(above, 1 + self.clip, torch.where(below, 1 - self.clip, rho))
        return -rho * advantage + (stats.divergence if self.single_step else 0.0)
