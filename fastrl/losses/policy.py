"""Policy-gradient losses on packed tokens. d = log pi - log pi_old, r = e^d, A = advantage, D = log pi - log pi_ref."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.kl import KINDS, kl_estimate, safe_exp
from fastrl.tokens import TokenBatch, TokenStats


def log_ratio(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """[T] d. Without old log-probs the sampling policy is the current one: d is 0 with gradient 1."""
    old = batch.old_logprobs
    return stats.logprobs - (stats.logprobs.detach() if old is None else old)


def kl_to_reference(kind: str, stats: TokenStats, batch: TokenBatch) -> Tensor:
    if batch.ref_logprobs is None:
        raise ValueError("a KL term needs batch.ref_logprobs [T]; got None (set kl_coef=0 or score with a reference)")
    return kl_estimate(kind, stats.logprobs, batch.ref_logprobs)


@dataclass(frozen=True)
class Reinforce:
    """-A log pi(y_t): c_t = -A (Williams 1992). Scope: token.

    kl_coef * KL and -entropy_coef * H are added per token, as in every loss of this file.
    """

    kl_coef: float = 0.0
    kl: str = "k3"
    entropy_coef: float = 0.0
    scope: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "token_mean"

    def __post_init__(self):
        if self.kl not in KINDS:
            raise ValueError(f"kl is {self.kl!r}; expected one of {', '.join(KINDS)}")
        for name in ("kl_coef", "entropy_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("entropy",) if self.entropy_coef else ()

    def inert(self, batch: TokenBatch) -> Tensor | None:
        """[T] bool: rows whose loss and gradient are 0 whatever the model says; None: there may be none."""
        return None if self.kl_coef or self.entropy_coef else batch.token_advantages == 0

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -batch.token_advantages * stats.logprobs

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        loss = self.policy_loss(stats, batch)
        if self.kl_coef:
            loss = loss + self.kl_coef * kl_to_reference(self.kl, stats, batch)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * stats.entropy
        return loss

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """[T] values of each metric; TRL's names."""
        if batch.ref_logprobs is None:
            return {}
        return {"kl": kl_estimate("k3", stats.logprobs, batch.ref_logprobs)}


@dataclass(frozen=True)
class ClippedSurrogate:
    """The numbers that make up PPOClip's law, for a kernel that holds the same law (fastrl/ops/policy_kernel.py)."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl: str
    kl_coef: float
    entropy_coef: float


@dataclass(frozen=True)
class PPOClip(Reinforce):
    """Clipped surrogate, -min(r A, clip(r, 1-clip_low, 1+clip_high) A) (Schulman et al. 2017, eq. 7). Scope: token.

    clip_high > clip_low is DAPO's clip-higher. dual_clip = c > 1 bounds the loss of negative advantages by -c A
    (Ye et al. 2020, eq. 5; TRL's `delta`). c_t = -A r where unclipped, else 0; on ties the unclipped branch.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.clip_low <= 1 and 0 <= self.clip_high < math.inf):
            raise ValueError(f"clip_low must be in [0, 1] and clip_high >= 0, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(f"dual_clip must exceed 1 + clip_high = {1 + self.clip_high}, got {self.dual_clip}")

    @property
    def clipped_surrogate(self) -> ClippedSurrogate | None:
        """Its numbers if this object's law is exactly the one written here; None for a subclass that changes it."""
        law = ("__call__", "policy_loss", "bounds", "metrics")
        if any(getattr(type(self), name) is not getattr(PPOClip, name) for name in law):
            return None
        return ClippedSurrogate(*(getattr(self, f.name) for f in fields(ClippedSurrogate)))

    def bounds(self, d: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T] bools: clipped above (A > 0), clipped below (A < 0), dual-clipped (A < 0). Decided on d, without exp."""
        low = math.log1p(-self.clip_low) if self.clip_low < 1 else -math.inf
        above = (advantages > 0) & (d > math.log1p(self.clip_high))
        below = (advantages < 0) & (d < low)
        dual = torch.zeros_like(above) if self.dual_clip is None else (advantages < 0) & (d > math.log(self.dual_clip))
        return above, below, dual

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        d, advantages = log_ratio(stats, batch), batch.token_advantages
        above, below, dual = self.bounds(d, advantages)
        # Clipped tokens are replaced before exp, so that no overflow there can reach the gradient as 0 * inf.
        ratio = safe_exp(torch.where(above | below | dual, torch.zeros_like(d), d))
        ratio = torch.where(above, 1 + self.clip_high, torch.where(below, 1 - self.clip_low, ratio))
        if self.dual_clip is not None:
            ratio = torch.where(dual, self.dual_clip, ratio)
        return -ratio * advantages

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        d = log_ratio(stats, batch)
        above, below, dual = self.bounds(d, batch.token_advantages)
        made = {
            "clip_ratio/low_mean": below.float(),
            "clip_ratio/high_mean": above.float(),
            "clip_ratio/region_mean": (above | below | dual).float(),
            "ratio": safe_exp(d),
        }
        return {**super().metrics(stats, batch), **made}


@dataclass(frozen=True)
class GRPO(PPOClip):
    """Group relative policy optimisation (Shao et al. 2024, eq. 3): PPOClip, mean over a sequence, then sequences."""

    aggregate: ClassVar[str] = "sequence_mean_token_mean"


@dataclass(frozen=True)
class DAPO(PPOClip):
    """DAPO (Yu et al. 2025, eq. 8): clip-higher 0.2/0.28, mean over all tokens of the step."""

    clip_high: float = 0.28


@dataclass(frozen=True)
class DrGRPO(PPOClip):
    """Dr. GRPO (Liu et al. 2025): tokens summed and divided by a constant length, so length earns nothing.

    max_length: the completion limit (tokens). Use with advantages that are not divided by the group's std.
    """

    max_length: int = 0
    aggregate: ClassVar[str] = "constant"

    def __post_init__(self):
        super().__post_init__()
        if self.max_length < 0:
            raise ValueError(f"max_length must be the completion limit in tokens, got {self.max_length}")
