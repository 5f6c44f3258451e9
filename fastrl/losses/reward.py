"""Reward models: losses on one number a sequence (HeadStats.scores), from pairs, lists, ratings or labels.

d = r(chosen) - r(rejected) on interleaved pairs, m = batch.margins where they are given. sp(x) = log(1 + e^x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.losses.kl import safe_exp
from fastrl.losses.margin import pairs
from fastrl.objective import group_index, num_groups
from fastrl.tokens import HeadStats, TokenBatch

LOG_VARIANCE = 30.0  # log-variances beyond +-30 are taken at the bound: the loss stays inside float32


def softplus(x: Tensor) -> Tensor:
    """sp(x) = -log sigma(-x), to full precision everywhere (torch's own softplus is x from 20 on)."""
    return -logsigmoid(-x)


# -- what these losses share -------------------------------------------------------------------------------------------
def check_numbers(law) -> None:
    """Every number of a loss is finite. Raises ValueError naming the option, what was expected and what came."""
    for f in fields(law):
        value = getattr(law, f.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isfinite(value):
            raise ValueError(f"{f.name} must be finite, got {value}")


def check_range(law, name: str, low: float, high: float = math.inf, closed: bool = False) -> None:
    """low < option < high (closed: low <= option <= high), or ValueError."""
    value = getattr(law, name)
    if not (low <= value <= high if closed else low < value < high):
        words = "between" if closed else "strictly between"
        raise ValueError(f"{name} must be {words} {low:g} and {high:g}, got {value}")


def scores_of(stats: HeadStats, outputs: int | None = None) -> Tensor:
    """[S] scores, or [S, K] where `outputs` says that several are read (0: any number of them)."""
    scores = getattr(stats, "scores", None)
    if scores is None:
        raise ValueError(
            "this loss reads the scores of a reward head: give HeadStats(scores=...) to fastrl.loss_from_scores"
        )
    wrong = scores.dim() != 1 if outputs is None else scores.dim() != 2 or outputs not in (0, scores.shape[1])
    if wrong:
        want = "[S]" if outputs is None else f"[S, K={outputs or 'any'}]"
        raise ValueError(f"scores must be {want} for this loss, got {list(scores.shape)}")
    return scores


def log_variance_of(stats: HeadStats) -> Tensor:
    if stats.log_variance is None:
        raise ValueError("this loss needs the log_variance of a mean-variance head beside its mean; got None")
    return stats.log_variance.clamp(-LOG_VARIANCE, LOG_VARIANCE)


def column_of(batch: TokenBatch, name: str) -> Tensor:
    """[S] a field or a further column of the batch."""
    value = getattr(batch, name, None) if hasattr(batch, name) else batch.per_sequence.get(name)
    if value is None:
        raise ValueError(f"this loss needs batch.{name} [S]; got None")
    return value


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
    """

    paper: ClassVar[str] = "Leng et al. 2024, PPO-M, arXiv:2410.09724"
    formula: ClassVar[str] = "-log sigma(r_w,hi - r_w,lo) - log sigma(r_l,lo - r_l,hi)"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [P]
        high, low = scores_of(stats, 2).unbind(1)
        chosen, rejected = pairs(high - low)
        loss = softplus(-chosen) + softplus(rejected)
        return loss + self.center * pairs(high + low)[0].square() if self.center else loss

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


# -- lists -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PlackettLuceReward:
    """Likelihood of a ranking, best first: -sum_k [r_k - logsumexp over those ranked k or worse]. Scope: group.

    batch.rewards rank a group's sequences (higher is better); equals compete with each other (Breslow's rule), so that
    the order in which they come says nothing. A sequence whose rank is NaN is left out.
    """

    paper: ClassVar[str] = "Plackett 1975; Ouyang et al. 2022 for K answers a prompt; Xia et al. 2008, ListMLE"
    formula: ClassVar[str] = "-sum_k [r_k - log sum_{j ranked k or worse} e^(r_j)]"
    scope: ClassVar[str] = "group"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [G]
        scores, ranks, group = scores_of(stats), column_of(batch, "rewards"), group_index(batch)
        same = group[:, None] == group[None, :]
        ranked = ~ranks.isnan()
        mine = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        rivals = mine | (same & (ranks[None, :] <= ranks[:, None]))  # [S, S]
        lost = scores[None, :].masked_fill(~rivals, -math.inf).logsumexp(1) - scores
        lost = torch.where(ranked, lost, torch.zeros_like(lost))
        return lost.new_zeros(num_groups(batch)).index_add(0, group, lost)


# -- ratings and labels ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RewardRegression:
    """(r - y)^2 of each sequence's score and its rating batch.rewards. Scope: sequence."""

    paper: ClassVar[str] = "Wang et al. 2024, HelpSteer2, arXiv:2406.08673 (one attribute)"
    formula: ClassVar[str] = "(r - y)^2"
    scope: ClassVar[str] = "sequence"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [S]
        return (scores_of(stats) - column_of(batch, "rewards").to(stats.scores.dtype)).square()

    def metrics(self, stats: HeadStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"mean_reward": stats.scores}


@dataclass(frozen=True)
class MultiAttribute:
    """Mean over the attributes that were rated of (r_k - y_k)^2. Scope: sequence.

    scores [S, K]; ratings per_sequence["attributes"] [S, K], NaN where an attribute was not rated.
    """

    paper: ClassVar[str] = "Wang et al. 2024, ArmoRM, arXiv:2406.12845, eq. 1"
    formula: ClassVar[str] = "mean over rated k of (r_k - y_k)^2"
    scope: ClassVar[str] = "sequence"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [S]
        scores, ratings = scores_of(stats, 0), column_of(batch, "attributes")
        if ratings.shape != scores.shape:
            raise ValueError(f"attributes must be {list(scores.shape)} like the scores, got {list(ratings.shape)}")
        rated = ~ratings.isnan()
        gap = torch.where(rated, scores - ratings.nan_to_num(0.0).to(scores.dtype), torch.zeros_like(scores))
        return gap.square().sum(1) / rated.sum(1).clamp(min=1)


@dataclass(frozen=True)
class QuantileReward:
    """Pinball loss of K quantiles of a rating, at levels (k + 1/2) / K. Scope: sequence.

    u = y - q_k: mean over k of max(level u, (level - 1) u). scores [S, K], y = batch.rewards.
    """

    paper: ClassVar[str] = "Dorka 2024, quantile reward models, arXiv:2409.10164"
    formula: ClassVar[str] = "mean_k max(a_k u_k, (a_k - 1) u_k), u_k = y - q_k, a_k = (k + 1/2) / K"
    scope: ClassVar[str] = "sequence"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [S]
        quantiles = scores_of(stats, 0)
        k = quantiles.shape[1]
        levels = (torch.arange(k, device=quantiles.device, dtype=quantiles.dtype) + 0.5) / k
        u = column_of(batch, "rewards").to(quantiles.dtype)[:, None] - quantiles
        return torch.where(u >= 0, levels * u, (levels - 1) * u).mean(1)


@dataclass(frozen=True)
class GaussianReward:
    """Gaussian negative log-likelihood of a rating under a mean-variance head. Scope: sequence."""

    mean_variance: ClassVar[bool] = True
    paper: ClassVar[str] = "Nix and Weigend 1994; Lou et al. 2024, uncertainty-aware reward model, arXiv:2410.00847"
    formula: ClassVar[str] = "(log s^2 + (r - y)^2 / s^2) / 2"
    scope: ClassVar[str] = "sequence"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [S]
        gap = scores_of(stats) - column_of(batch, "rewards").to(stats.scores.dtype)
        return gaussian_nll(gap, log_variance_of(stats))


def gaussian_nll(gap: Tensor, log_variance: Tensor) -> Tensor:
    """(log s^2 + gap^2 / s^2) / 2, without the constant."""
    return 0.5 * (log_variance + gap.square() * safe_exp(-log_variance))


@dataclass(frozen=True)
class Verifier:
    """Is the answer right? Binary cross-entropy of each score with batch.labels [S]. Scope: sequence."""

    paper: ClassVar[str] = "Cobbe et al. 2021, arXiv:2110.14168, section 4.2"
    formula: ClassVar[str] = "-log sigma(r) if right else -log sigma(-r)"
    scope: ClassVar[str] = "sequence"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [S]
        scores, right = scores_of(stats), column_of(batch, "labels").bool()
        return softplus(torch.where(right, -scores, scores))

    def metrics(self, stats: HeadStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"accuracy": ((stats.scores > 0) == batch.labels.bool()).float(), "mean_reward": stats.scores}


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
    "plackett_luce_reward": PlackettLuceReward,
    "reward_regression": RewardRegression,
    "multi_attribute": MultiAttribute,
    "quantile_reward": QuantileReward,
    "gaussian_reward": GaussianReward,
    "verifier": Verifier,
}
