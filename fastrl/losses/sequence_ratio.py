"""Policy losses whose coefficient needs a whole sequence's ratio: s = exp(mean_t d), R = exp(sum_t d).

Each gives its sequence's value on every one of the sequence's n tokens (KL, entropy and any aggregation go on top), so
that under its own aggregation the sequence counts as the paper has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.kl import safe_exp
from fastrl.losses.policy import Clipped, PolicyLoss, check_numbers, log_ratio, warn_once
from fastrl.tokens import TokenBatch, TokenStats, segment_mean, segment_sum

WIDE = 0.05  # a mean of n log-ratios spreads 1/sqrt(n) as far as each: no clip this far out is ever met


def of_sequences(values: Tensor, batch: TokenBatch) -> Tensor:
    """[T] float64 whose mean over tokens is the mean over sequences of `values` [T], the same on a sequence's rows."""
    return values.double() * batch.num_tokens / (batch.num_sequences * batch.spread(batch.lengths))


@dataclass(frozen=True)
class SequenceClipped(Clipped):
    """One ratio a sequence: what is reported of it counts sequences."""

    own_scope: ClassVar[str] = "sequence"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def metrics(self, stats, batch):
        made = super().metrics(stats, batch)
        return made | {n: of_sequences(x, batch) for n, x in made.items() if n.startswith(("clip_ratio/", "ratio"))}


@dataclass(frozen=True)
class GSPO(SequenceClipped):
    """ppo_clip on the sequence's ratio s (Zheng et al. 2025, eq. 5-7). c_t = -s A / n where unclipped."""

    paper: ClassVar[str] = "Zheng et al. 2025, arXiv:2507.18071, eq. 5-7"
    formula: ClassVar[str] = "-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), s = exp(mean d)"
    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self):
        super().__post_init__()
        if min(self.clip_low, self.clip_high) > WIDE:
            warn_once(
                "gspo",
                f"{type(self).__name__} clips the mean over a sequence of the log-ratios, which at "
                f"clip_low={self.clip_low:g}, clip_high={self.clip_high:g} never happens: the clip is without effect. "
                "The paper's are 3e-4 and 4e-4",
            )

    def log_ratio(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return batch.spread(segment_mean(log_ratio(stats, batch), batch))


@dataclass(frozen=True)
class GSPOToken(GSPO):
    """GSPO with advantages of tokens: value and clip of s, gradient of the token alone (eq. 13-14). c_t = -s A_t."""

    paper: ClassVar[str] = "Zheng et al. 2025, arXiv:2507.18071, eq. 13-14"
    formula: ClassVar[str] = "-min(u A, clip(u, 1 - clip_low, 1 + clip_high) A), u = sg(s) pi / sg(pi)"

    def log_ratio(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return super().log_ratio(stats, batch).detach() + (stats.logprobs - stats.logprobs.detach())


@dataclass(frozen=True)
class LUSPO(GSPO):
    """GSPO times the sequence's length (Liu et al. 2026): no 1/n, so that length earns nothing. c_t = -s A."""

    paper: ClassVar[str] = "Liu et al. 2026, arXiv:2602.05261, eq. 8"
    formula: ClassVar[str] = "n times gspo: -n min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)"
    aggregate: ClassVar[str] = "sequence_mean_token_sum"


@dataclass(frozen=True)
class RLOO(SequenceClipped):
    """ppo_clip on the product R of a sequence's ratios: REINFORCE with whole completions as actions (Ahmadian et al.
    2024), clipped as TRL does. c_t = -R A. Advantages: leave-one-out (fastrl.advantages)."""

    paper: ClassVar[str] = "Ahmadian et al. 2024, arXiv:2402.14740, eq. 8"
    formula: ClassVar[str] = "-min(R A, clip(R, 1 - clip_low, 1 + clip_high) A), R = exp(sum d)"

    def log_ratio(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return batch.spread(segment_sum(log_ratio(stats, batch), batch))


@dataclass(frozen=True)
class GMPO(PolicyLoss):
    """-A exp(mean_t d~), d~ clipped in log space on the side that the advantage pushes to (Zhao et al. 2025).

    clip_low, clip_high: of the log-ratio: each token's ratio is within [e^-clip_low, e^clip_high].
    """

    paper: ClassVar[str] = "Zhao et al. 2025, arXiv:2507.20673, eq. 4-6"
    formula: ClassVar[str] = "-A exp(mean d~), d~ = min(d, clip_high) if A > 0 else max(d, -clip_low)"
    clip_low: float = 0.4
    clip_high: float = 0.4
    own_scope: ClassVar[str] = "sequence"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "clip_low", "clip_high", at_least=0)

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        d, advantages = log_ratio(stats, batch), batch.token_advantages
        d = torch.where(advantages > 0, d.clamp(max=self.clip_high), d.clamp(min=-self.clip_low))
        return -advantages * batch.spread(safe_exp(segment_mean(d, batch)))

    def metrics(self, stats, batch):
        d, advantages = log_ratio(stats, batch), batch.token_advantages
        below, above = (advantages < 0) & (d < -self.clip_low), (advantages > 0) & (d > self.clip_high)
        made = {
            "clip_ratio/low_mean": below.float(),
            "clip_ratio/high_mean": above.float(),
            "clip_ratio/region_mean": (below | above).float(),
        }
        return {**super().metrics(stats, batch), **made}


@dataclass(frozen=True)
class VESPO(PolicyLoss):
    """-sg(phi(W)) A log pi, phi(W) = W^k e^(lambda (1 - W)), k and lambda by the sign of A (arXiv:2602.10693).

    W = R, or with `from_rollout` the product of pi / rollout: the mismatch is then in W, and needs no correction.
    log W is held within [log 1e-8, 20]; outside phi is 0 in effect.
    """

    paper: ClassVar[str] = "VESPO 2026, arXiv:2602.10693, eq. 13-14"
    formula: ClassVar[str] = "-sg(W^k e^(lambda (1 - W))) A log pi, W = exp(sum d)"
    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0
    from_rollout: bool = False
    own_scope: ClassVar[str] = "sequence"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "k_pos", "k_neg", at_least=0)
        check_numbers(self, "lambda_pos", "lambda_neg", above=0)

    @property
    def anchor(self) -> str:
        return "rollout" if self.from_rollout else "old"

    def phi(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[T] weight of each token, without gradient."""
        if self.from_rollout and batch.rollout_logprobs is None:
            raise ValueError("vespo with from_rollout=True needs batch.rollout_logprobs [T]; got None")
        d = stats.logprobs - batch.rollout_logprobs if self.from_rollout else log_ratio(stats, batch)
        log_w = batch.spread(segment_sum(d.detach().double(), batch)).clamp(math.log(1e-8), 20.0)
        gains = batch.token_advantages >= 0
        k, scale = (
            torch.full_like(log_w, neg).masked_fill(gains, pos)
            for pos, neg in ((self.k_pos, self.k_neg), (self.lambda_pos, self.lambda_neg))
        )
        return (k * log_w - scale * torch.expm1(log_w)).exp().to(d.dtype)

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -self.phi(stats, batch) * batch.token_advantages * stats.logprobs

    def metrics(self, stats, batch):
        return {**super().metrics(stats, batch), "vespo/phi_seq_mean": of_sequences(self.phi(stats, batch), batch)}


@dataclass(frozen=True)
class TOPR(PolicyLoss):
    """-A log pi where A >= 0; -sg(clip(R, low, high)) A log pi where A < 0 (Le Roux et al. 2025): tapered negatives.

    Positives are learned whatever their ratio; negatives only as far as the policy still gives them weight.
    """

    paper: ClassVar[str] = "Le Roux et al. 2025, arXiv:2503.14286, eq. 6-8"
    formula: ClassVar[str] = "-A log pi if A >= 0 else -sg(clip(R, low, high)) A log pi, R = exp(sum d)"
    low: float = 0.0
    high: float = 1.0
    own_scope: ClassVar[str] = "sequence"
    aggregate: ClassVar[str] = "sequence_mean_token_sum"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.low < self.high < math.inf:
            raise ValueError(f"topr needs 0 <= low < high, got {self.low} and {self.high}")

    def weight(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T], without gradient
        low = math.log(self.low) if self.low else -math.inf
        tapered = safe_exp(segment_sum(log_ratio(stats, batch).detach(), batch).clamp(low, math.log(self.high)))
        return torch.where(batch.token_advantages < 0, batch.spread(tapered), torch.ones_like(stats.logprobs))

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -self.weight(stats, batch) * batch.token_advantages * stats.logprobs


SEQUENCE_RATIO = {
    "gspo": GSPO,
    "gspo_token": GSPOToken,
    "luspo": LUSPO,
    "gmpo": GMPO,
    "vespo": VESPO,
    "rloo": RLOO,
    "topr": TOPR,
}
