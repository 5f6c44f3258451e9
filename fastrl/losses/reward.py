"""Reward models: losses on one number a sequence (HeadStats.scores), from interleaved pairs.

d = r(chosen) - r(rejected), m = batch.margins where they are given. sp(x) = log(1 + e^x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.heads import check_numbers, check_range, column_of, log_variance_of, scores_of, softplus
from fastrl.losses.margin import pairs
from fastrl.tokens import HeadStats, TokenBatch


def pair_metrics(scores: Tensor) -> dict[str, Tensor]:
    """[P] TRL's names."""
    chosen, rejected = pairs(scores)
    return {
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "mean_reward": (chosen + rejected) / 2,
    }


@dataclass(frozen=True)
class PairReward:
    """Base of the pair losses: a law of d, and center * (r_chosen + r_rejected)^2 (Eisenstein et al. 2023, eq. 2)."""

    center: float = 0.0
    scope: ClassVar[str] = "pair"
    reads: ClassVar[str] = "scores"

    def __post_init__(self):
        check_numbers(self)

    def pair_loss(self, d: Tensor, batch: TokenBatch) -> Tensor:  # [P] -> [P]
        raise NotImplementedError

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [P]
        chosen, rejected = pairs(scores_of(stats))
        loss = self.pair_loss(chosen - rejected, batch)
        return loss + self.center * (chosen + rejected).square() if self.center else loss

    def metrics(self, stats: HeadStats, batch: TokenBatch) -> dict[str, Tensor]:
        return pair_metrics(stats.scores)


# -- pairs -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class BradleyTerry(PairReward):
    """sp(-(d - m)), with label_smoothing e: (1 - e) sp(-(d - m)) + e sp(d - m). Scope: pair.

    m: batch.margins (Touvron et al. 2023, Llama 2), 0 where none are given.
    """

    paper: ClassVar[str] = "Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1"
    formula: ClassVar[str] = "-(1 - e) log sigma(d - m) - e log sigma(m - d) + center (r_w + r_l)^2"
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    def pair_loss(self, d: Tensor, batch: TokenBatch) -> Tensor:
        x = d if batch.margins is None else d - batch.margins.to(d.dtype)
        loss = (1 - self.label_smoothing) * softplus(-x)
        return loss + self.label_smoothing * softplus(x) if self.label_smoothing else loss


@dataclass(frozen=True)
class SoftBradleyTerry(PairReward):
    """y sp(-d) + (1 - y) sp(d): y in [0, 1] is how surely the chosen one is better. Scope: pair.

    y: per_sequence["preference"], read at the chosen sequence. See updated_labels for iterative data smoothing.
    """

    paper: ClassVar[str] = "Zhu et al. 2024, iterative data smoothing, arXiv:2401.16335"
    formula: ClassVar[str] = "-y log sigma(d) - (1 - y) log sigma(-d)"

    def pair_loss(self, d: Tensor, batch: TokenBatch) -> Tensor:
        y = column_of(batch, "preference")[0::2].to(d.dtype)
        return y * softplus(-d) + (1 - y) * softplus(d)


def updated_labels(labels: Tensor, d: Tensor, rate: float = 0.1) -> Tensor:
    """[P] y <- (1 - rate) y + rate sigma(d), without graph: once an epoch, after SoftBradleyTerry has used y."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    return (1 - rate) * labels + rate * torch.sigmoid(d.detach()).to(labels.dtype)


@dataclass(frozen=True)
class HingeReward(PairReward):
    """max(0, gap - d). Scope: pair."""

    paper: ClassVar[str] = "Mu et al. 2024, rule-based rewards, arXiv:2411.01111"
    formula: ClassVar[str] = "max(0, gap - d)"
    gap: float = 1.0

    def pair_loss(self, d: Tensor, batch: TokenBatch) -> Tensor:
        return (self.gap - d).clamp(min=0.0)


@dataclass(frozen=True)
class R3M(PairReward):
    """Bradley-Terry with each pair shifted at a price: the least over delta >= 0 of sp(-(d + delta)) + lam delta.

    With b = log(1/lam - 1): sp(-d) where d >= b, else lam (b - d) - log(1 - lam); |dL/dd| <= lam. Scope: pair.
    """

    paper: ClassVar[str] = "Bukharin et al. 2024, R3M, arXiv:2406.15568"
    formula: ClassVar[str] = "sp(-d) if d >= log(1/lam - 1) else lam (log(1/lam - 1) - d) - log(1 - lam)"
    lam: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "lam", 0.0, 0.5)

    def pair_loss(self, d: Tensor, batch: TokenBatch) -> Tensor:
        border = math.log(1 / self.lam - 1)
        return torch.where(d >= border, softplus(-d), self.lam * (border - d) - math.log1p(-self.lam))


@dataclass(frozen=True)
class AdaptiveScale(PairReward):
    """Bradley-Terry with a temperature of its own for each pair, by distributionally robust optimisation. Scope: pair.

    tau = clip(|d| / c, tau_min, tau_max), constant in the gradient; c = logit p with binary entropy H(p) = log 2 - rho.
    """

    paper: ClassVar[str] = "Hong et al. 2024, adaptive preference scaling, arXiv:2406.02764"
    formula: ClassVar[str] = "tau sp(-d / tau) + (rho - log 2) tau, tau = clip(|d| / c(rho), tau_min, tau_max)"
    rho: float = 0.1
    tau_min: float = 0.1
    tau_max: float = 10.0

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "rho", 0.0, math.log(2))
        if not 0 < self.tau_min <= self.tau_max:
            raise ValueError(f"tau_min must be in (0, tau_max = {self.tau_max}], got {self.tau_min}")

    @property
    def c(self) -> float:
        """logit of the p > 1/2 whose entropy is log 2 - rho, by bisection on the logit."""
        low, high = 0.0, 60.0
        for _ in range(200):
            x = (low + high) / 2
            p, q = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))
            entropy = p * math.log1p(math.exp(-x)) + q * (x + math.log1p(math.exp(-x)))
            low, high = (x, high) if entropy > math.log(2) - self.rho else (low, x)
        return (low + high) / 2

    def pair_loss(self, d: Tensor, batch: TokenBatch) -> Tensor:
        tau = (d.detach().abs() / self.c).clamp(self.tau_min, self.tau_max)
        return tau * softplus(-d / tau) + (self.rho - math.log(2)) * tau


@dataclass(frozen=True)
class PCRM(PairReward):
    """sp(-d) + sp(d - D), D = b1 / (s + b2) + b3: a bound on d, tighter the more alike the two answers. Scope: pair.

    s in [0, 1]: per_sequence["similarity"] read at the chosen sequence (fastrl.rewards.calibration.angular_similarity)
    or, where there is none, min / max of per_sequence["length"]. The minimum lies at d = D / 2.
    """

    paper: ClassVar[str] = "Zhou et al. 2024, prior constraints-based reward model, arXiv:2404.00978"
    formula: ClassVar[str] = "-log sigma(d) - log sigma(D - d), D = b1 / (s + b2) + b3"
    b1: float = 6.0
    b2: float = 0.001
    b3: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "b1", 0.0)
        check_range(self, "b2", 0.0)

    def similarity(self, batch: TokenBatch) -> Tensor:  # [P]
        if "similarity" in batch.per_sequence:
            return batch.per_sequence["similarity"][0::2]
        a, b = pairs(batch.sequence("length", "pcrm without a column 'similarity'").double())
        return torch.minimum(a, b) / torch.maximum(a, b).clamp(min=1)

    def pair_loss(self, d: Tensor, batch: TokenBatch) -> Tensor:
        bound = (self.b1 / (self.similarity(batch) + self.b2) + self.b3).to(d.dtype)
        return softplus(-d) + softplus(d - bound)


@dataclass(frozen=True)
class BradleyTerryTies(PairReward):
    """Rao and Kupper's model with draws: P(w > l) = e^w / (e^w + theta e^l), the rest is a draw. Scope: pair.

    per_sequence["tie"] (read at the chosen sequence) marks the draws; without it there are none.
    """

    paper: ClassVar[str] = "Rao and Kupper 1967; Liu et al. 2024, arXiv:2410.05328"
    formula: ClassVar[str] = "sp(log theta - d); draws: log(theta + e^d) + log(theta + e^-d) - log(theta^2 - 1)"
    theta: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "theta", 1.0)

    def pair_loss(self, d: Tensor, batch: TokenBatch) -> Tensor:
        border = math.log(self.theta)
        won = softplus(border - d)
        if "tie" not in batch.per_sequence:
            return won
        # log(theta + e^x) = log theta + sp(x - log theta)
        drawn = 2 * border + softplus(d - border) + softplus(-d - border) - math.log(self.theta**2 - 1)
        return torch.where(batch.per_sequence["tie"][0::2].bool(), drawn, won)


@dataclass(frozen=True)
class ConfidencePairs(PairReward):
    """Reward calibration of stated confidence: two scores a sequence, (stated high, stated low). Scope: pair.

    sp(-(r_w,high - r_w,low)) + sp(-(r_l,low - r_l,high)): confidence pays for the good answer, doubt for the bad one.
    center draws (high + low) of both answers towards 0.
    """

    paper: ClassVar[str] = "Leng et al. 2024, PPO-M, arXiv:2410.09724"
    formula: ClassVar[str] = "-log sigma(r_w,hi - r_w,lo) - log sigma(r_l,lo - r_l,hi)"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [P]
        high, low = scores_of(stats, 2).unbind(1)
        chosen, rejected = pairs(high - low)
        loss = softplus(-chosen) + softplus(rejected)
        return loss + self.center * sum(pairs((high + low).square())) if self.center else loss

    def metrics(self, stats: HeadStats, batch: TokenBatch) -> dict[str, Tensor]:
        return pair_metrics(stats.scores[:, 0] - stats.scores[:, 1])


def log_normal_cdf(z: Tensor) -> Tensor:
    """log Phi(z). torch's log_ndtr has the value, but in float32 its gradient dies below z = -1e4.

    Each piece sees harmless numbers outside its range. Far down, Phi(z) = phi(z) / -z (1 - y + 3 y^2 - 15 y^3 ...) with
    y = 1 / z^2; above, phi(z) and the scaled erfc are multiplied in the logarithm.
    """
    high, low = z > -1, z < -10
    top = torch.where(high, z, 0.0) * math.sqrt(0.5)
    middle, tail = torch.where(high | low, -1.0, z), torch.where(low, z, -10.0)
    y = 1 / tail.square()
    series = torch.log1p(-y * (1 - 3 * y * (1 - 5 * y * (1 - 7 * y * (1 - 9 * y)))))
    below = -0.5 * tail.square() - torch.log(-tail) - 0.5 * math.log(2 * math.pi) + series
    between = -0.5 * middle.square() + torch.log(0.5 * torch.special.erfcx(-middle * math.sqrt(0.5)))
    return torch.where(high, torch.log1p(-0.5 * torch.erfc(top)), torch.where(low, below, between))


@dataclass(frozen=True)
class MeanVariancePairs(PairReward):
    """Distributional preference learning: -log Phi((mu_w - mu_l) / sqrt(s_w^2 + s_l^2)). Scope: pair.

    HeadStats: scores are the means [S], log_variance [S].
    """

    mean_variance: ClassVar[bool] = True
    paper: ClassVar[str] = "Siththaranjan et al. 2024, arXiv:2312.08358, section 4"
    formula: ClassVar[str] = "-log Phi((mu_w - mu_l) / sqrt(s_w^2 + s_l^2))"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [P]
        chosen, rejected = pairs(scores_of(stats))
        spread = torch.logaddexp(*pairs(log_variance_of(stats)))
        loss = -log_normal_cdf((chosen - rejected) * torch.exp(-0.5 * spread))
        return loss + self.center * (chosen + rejected).square() if self.center else loss


REWARD = {
    "bradley_terry": BradleyTerry,
    "soft_bradley_terry": SoftBradleyTerry,
    "bradley_terry_ties": BradleyTerryTies,
    "hinge_reward": HingeReward,
    "r3m": R3M,
    "adaptive_scale": AdaptiveScale,
    "pcrm": PCRM,
    "confidence_pairs": ConfidencePairs,
    "mean_variance_pairs": MeanVariancePairs,
}
