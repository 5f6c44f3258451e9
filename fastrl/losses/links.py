"""Preference losses with another link than DPO's, or a law of both log-ratios: h = r_w - r_l, r = log pi - log ref."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.losses.kl import safe_exp
from fastrl.losses.margin import NOT_NEGATIVE, POSITIVE, PairLoss, RatioPairLoss, pairs
from fastrl.losses.pairwise import Ranged, one_of
from fastrl.tokens import TokenBatch, TokenStats, segment_sum

GPO_LINKS = ("logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage")


@dataclass(frozen=True)
class GPO(RatioPairLoss):
    """Generalised preference optimisation (Tang et al. 2024, table 1): any convex loss f of M = beta h, and Savage's.

    f: logistic log(1 + e^-M), hinge max(0, 1-M), squared (M-1)^2, exponential e^-M, truncated_quadratic
    max(0, 1-M)^2, savage 1 / (1 + e^M)^2.
    """

    paper: ClassVar[str] = "Tang et al. 2024, arXiv:2402.05749, table 1"
    formula: ClassVar[str] = "f(beta h), f convex with f'(0) < 0"
    f: str = "exponential"

    def __post_init__(self):
        super().__post_init__()
        one_of("f", self.f, GPO_LINKS)

    def link(self, margin: Tensor) -> Tensor:
        below = torch.relu(1 - margin)
        return {
            "logistic": lambda: -logsigmoid(margin),
            "hinge": lambda: below,
            "squared": lambda: (margin - 1).square(),
            "exponential": lambda: safe_exp(-margin),
            "truncated_quadratic": lambda: below.square(),
            "savage": lambda: torch.sigmoid(-margin).square(),
        }[self.f]()


@dataclass(frozen=True)
class ChiPO(Ranged, RatioPairLoss):
    """chi-PO (Huang et al. 2024, Alg. 1): chi-squared beside KL, phi(z) = z + log z of the probability ratio z.

    r_max: half the bound on the margin (the paper's clip to 2 R_max); None: no clip. e^r goes on as its tangent past
    r = 40 (losses.kl.safe_exp).
    """

    paper: ClassVar[str] = "Huang et al. 2024, arXiv:2407.13399, Alg. 1"
    formula: ClassVar[str] = "-log sigma(clip(beta (e^r_w + r_w) - beta (e^r_l + r_l), -2 r_max, 2 r_max))"
    r_max: float | None = None
    ranges: ClassVar = {"r_max": POSITIVE}

    def transform(self, scores: Tensor) -> Tensor:
        return safe_exp(scores) + scores

    def link(self, margin: Tensor) -> Tensor:
        if self.r_max is not None:
            margin = margin.clamp(-2 * self.r_max, 2 * self.r_max)
        return -logsigmoid(margin)


@dataclass(frozen=True)
class DPOPositive(Ranged, RatioPairLoss):
    """DPOP (Pal et al. 2024, eq. 3): a chosen less likely than under the reference is penalised inside the link."""

    paper: ClassVar[str] = "Pal et al. 2024, arXiv:2402.13228, eq. 3"
    formula: ClassVar[str] = "-log sigma(beta (r_w - r_l - penalty max(0, -r_w)))"
    penalty: float = 50.0
    ranges: ClassVar = {"penalty": NOT_NEGATIVE}

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return super().law(chosen - self.penalty * torch.relu(-chosen), rejected, batch)


@dataclass(frozen=True)
class DPOShift(Ranged, RatioPairLoss):
    """DPO-Shift (Yang et al. 2025): the rejected's log-ratio counts f <= 1, which keeps the chosen's from falling."""

    paper: ClassVar[str] = "Yang et al. 2025, arXiv:2502.07599, the DPO-Shift loss"
    formula: ClassVar[str] = "-log sigma(beta (r_w - f r_l))"
    f: float = 0.95
    ranges: ClassVar = {"f": (0.0, 1.0, "(]")}

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return super().law(chosen, self.f * rejected, batch)


@dataclass(frozen=True)
class MinorDPO(RatioPairLoss):
    """MinorDPO (Xie and Chen 2024): a rejected that is less likely than under the reference already is left alone."""

    paper: ClassVar[str] = "Xie and Chen 2024, arXiv:2408.09834, the MinorDPO loss"
    formula: ClassVar[str] = "-log sigma(beta (r_w - max(0, r_l)))"

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return super().law(chosen, torch.relu(rejected), batch)


@dataclass(frozen=True)
class CalDPO(RatioPairLoss):
    """Cal-DPO (Xiao et al. 2024): DPO without beta, and both log-ratios drawn to +-1 / (2 beta)."""

    paper: ClassVar[str] = "Xiao et al. 2024, arXiv:2412.14516, the Cal-DPO loss"
    formula: ClassVar[str] = "-log sigma(r_w - r_l) + (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2"

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        target = 0.5 / self.beta
        margin = chosen - rejected - self.offset(batch)
        return -logsigmoid(margin) + (chosen - target).square() + (rejected + target).square()


# -- without a reference -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SLiC(Ranged, PairLoss):
    """SLiC-HF (Zhao et al. 2023, eq. 1): a hinge on log-probs beside the likelihood of a good answer, here the chosen.

    With beta = 1 as in the paper; delta: the margin. nll_coef: lambda, on the chosen's summed log-prob.
    """

    paper: ClassVar[str] = "Zhao et al. 2023, arXiv:2305.10425, eq. 1"
    formula: ClassVar[str] = "max(0, delta - beta (S_w - S_l)) - nll_coef S_w"
    beta: float = 1.0
    delta: float = 1.0
    nll_coef: float = 1.0
    ranges: ClassVar = {"delta": NOT_NEGATIVE, "nll_coef": NOT_NEGATIVE}

    def link(self, margin: Tensor) -> Tensor:
        return torch.relu(self.delta - margin)

    def extra(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return -self.nll_coef * pairs(segment_sum(stats.logprobs, batch))[0]


@dataclass(frozen=True)
class SimPER(PairLoss):
    """SimPER (Xiao et al. 2025): inverse perplexities, e^(mean log-prob), of both answers; no number to set."""

    paper: ClassVar[str] = "Xiao et al. 2025, arXiv:2502.00883, the SimPER loss"
    formula: ClassVar[str] = "e^(S_l / n_l) - e^(S_w / n_w)"
    takes_offset: ClassVar[bool] = False
    length_normalised: bool = True

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return safe_exp(rejected) - safe_exp(chosen)


LINKS = {
    "gpo": GPO,
    "chi_po": ChiPO,
    "dpop": DPOPositive,
    "dpo_shift": DPOShift,
    "minor_dpo": MinorDPO,
    "cal_dpo": CalDPO,
    "slic": SLiC,
    "simper": SimPER,
}
