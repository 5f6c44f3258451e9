"""The DPO table: losses of a pair's log-ratios to a reference. c, r: log-ratios of chosen and rejected; M = c - r."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, softplus

from fastrl.losses.kl import safe_exp
from fastrl.losses.margin import (
    NOT_NEGATIVE,
    POSITIVE,
    RatioPairLoss,
    check_numbers,
    chosen_nll,
    interleaved,
    log_loss,
    pairs,
    safe_expm1,
)
from fastrl.losses.transport import AOT, AOTUnpaired
from fastrl.tokens import TokenBatch, TokenStats

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class Divergent(RatioPairLoss):
    """f_divergence: M is the difference of f'(pi/ref) (f-DPO, Wang et al. 2023, arXiv:2309.16240, table 1).

    u = log(pi/ref): reverse_kl u, forward_kl 1 - e^-u, js_divergence log 2 + log sigma(u),
    alpha_divergence (e^((a-1) u) - 1)/(a-1), a = f_alpha; a = 1 is reverse_kl. Past e^40 the exponentials go on as
    their tangents.
    """

    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.f_divergence not in F_DIVERGENCES:
            raise ValueError(f"f_divergence is {self.f_divergence!r}; expected one of {', '.join(F_DIVERGENCES)}")

    def transform(self, scores: Tensor) -> Tensor:
        if self.f_divergence == "forward_kl":
            return -safe_expm1(-scores)
        if self.f_divergence == "js_divergence":
            return math.log(2) + logsigmoid(scores)
        if self.f_divergence == "alpha_divergence" and self.f_alpha != 1:
            return safe_expm1((self.f_alpha - 1) * scores) / (self.f_alpha - 1)
        return scores


@dataclass(frozen=True)
class DPO(Divergent):
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7). Scope: pair.

    loss = -(1-e) log sigma(beta M) - e log sigma(-beta M), e = label_smoothing (cDPO, Mitchell 2023).
    reference_free=True takes log ref = 0.
    """

    paper: ClassVar[str] = "Rafailov et al. 2023, arXiv:2305.18290, eq. 7"
    formula: ClassVar[str] = "-(1 - e) log sigma(beta M) - e log sigma(-beta M)"
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, label_smoothing=(0.0, 0.5, "[)"))

    def link(self, margin: Tensor) -> Tensor:
        return log_loss(margin, self.label_smoothing)


@dataclass(frozen=True)
class SigmoidNorm(DPO):
    """DPO on scores divided by their answer's length (TRL's sigmoid_norm; LN-DPO of Tulu 3). Scope: pair."""

    paper: ClassVar[str] = "Lambert et al. 2024, arXiv:2411.15124, length-normalised DPO"
    formula: ClassVar[str] = "-log sigma(beta (c / n_c - r / n_r))"
    length_normalised: bool = True


@dataclass(frozen=True)
class DPONLL(DPO):
    """DPO + nll_coef * the chosen's mean negative log-likelihood (iterative RPO, Pang et al. 2024, eq. 1)."""

    paper: ClassVar[str] = "Pang et al. 2024, arXiv:2404.19733, eq. 1"
    formula: ClassVar[str] = "-log sigma(beta M) + nll_coef NLL(chosen) / n_c"
    nll_coef: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, nll_coef=NOT_NEGATIVE)

    def extra(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.nll_coef * chosen_nll(stats, batch)


@dataclass(frozen=True)
class RobustDPO(DPO):
    """An unbiased estimate of DPO under labels flipped at rate e = label_smoothing (Ray Chowdhury et al. 2024)."""

    paper: ClassVar[str] = "Ray Chowdhury et al. 2024, arXiv:2403.00409, the rDPO loss"
    formula: ClassVar[str] = "(-(1 - e) log sigma(beta M) + e log sigma(-beta M)) / (1 - 2 e)"
    label_smoothing: float = 0.1

    def link(self, margin: Tensor) -> Tensor:
        # log sigma(M) - log sigma(-M) = M: no difference of two large logarithms is left.
        return log_loss(margin) - self.label_smoothing / (1 - 2 * self.label_smoothing) * margin


@dataclass(frozen=True)
class Hinge(Divergent):
    """Hinge loss on the margin (Zhao et al. 2023, SLiC; Liu et al. 2023, RSO). Scope: pair."""

    paper: ClassVar[str] = "Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657"
    formula: ClassVar[str] = "max(0, 1 - beta M)"

    def link(self, margin: Tensor) -> Tensor:
        return relu(1 - margin)


@dataclass(frozen=True)
class IPO(Divergent):
    """Identity preference optimisation (Azar et al. 2023, eq. 17), beta its tau. Scope: pair.

    Scores are means over an answer's tokens, as its authors confirmed to TRL; length_normalised=False takes the sums of
    the paper.
    """

    paper: ClassVar[str] = "Azar et al. 2023, arXiv:2310.12036, eq. 17"
    formula: ClassVar[str] = "(c / n_c - r / n_r - 1 / (2 beta))^2"
    length_normalised: bool = True

    def scale(self, batch: TokenBatch) -> float:
        return 1.0

    def link(self, margin: Tensor) -> Tensor:
        return (margin - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class EXOPair(Divergent):
    """Reverse KL between the pair's softmax and smoothed labels (EXO, Ji et al. 2024, eq. 16). Scope: pair."""

    paper: ClassVar[str] = "Ji et al. 2024, arXiv:2402.00856, eq. 16"
    formula: ClassVar[str] = "q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e), q = sigma(beta M)"
    label_smoothing: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, label_smoothing=(0.0, 0.5, "()"))

    def link(self, margin: Tensor) -> Tensor:
        log_kept, log_flipped = math.log1p(-self.label_smoothing), math.log(self.label_smoothing)
        kept = margin.sigmoid() * (logsigmoid(margin) - log_kept)
        return kept + (-margin).sigmoid() * (logsigmoid(-margin) - log_flipped)


@dataclass(frozen=True)
class NCAPair(RatioPairLoss):
    """Noise contrastive alignment of a pair (Chen et al. 2024, NCA with two answers). Scope: pair."""

    paper: ClassVar[str] = "Chen et al. 2024, arXiv:2402.05369, NCA with two answers"
    formula: ClassVar[str] = "-log sigma(beta c) - log sigma(-beta c) / 2 - log sigma(-beta r) / 2"
    takes_offset: ClassVar[bool] = False

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        c, r = self.beta * chosen, self.beta * rejected
        return softplus(-c) + 0.5 * softplus(c) + 0.5 * softplus(r)


@dataclass(frozen=True)
class BCOPair(RatioPairLoss):
    """Binary classifier on both answers, without BCO's reward shift (Jung et al. 2024). Scope: pair."""

    paper: ClassVar[str] = "Jung et al. 2024, arXiv:2404.04656, with delta = 0"
    formula: ClassVar[str] = "-log sigma(beta c) - log sigma(-beta r)"
    takes_offset: ClassVar[bool] = False

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return log_loss(self.beta * chosen) + log_loss(-self.beta * rejected)


@dataclass(frozen=True)
class SPPOHard(RatioPairLoss):
    """Self-play preference optimisation with win probabilities 1 and 0 (Wu et al. 2024, eq. 4.7). Scope: pair."""

    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2405.00675, eq. 4.7"
    formula: ClassVar[str] = "(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2"
    takes_offset: ClassVar[bool] = False

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return (chosen - 0.5 / self.beta).square() + (rejected + 0.5 / self.beta).square()


@dataclass(frozen=True)
class APOZero(RatioPairLoss):
    """Anchored preference optimisation: chosen up, rejected down (D'Oosterlinck et al. 2024, eq. 7). Scope: pair."""

    paper: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7"
    formula: ClassVar[str] = "1 - sigma(beta c) + sigma(beta r)"
    takes_offset: ClassVar[bool] = False

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return (-self.beta * chosen).sigmoid() + (self.beta * rejected).sigmoid()


@dataclass(frozen=True)
class APODown(RatioPairLoss):
    """Anchored: chosen down, rejected down further (D'Oosterlinck et al. 2024, eq. 8). Scope: pair."""

    paper: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8"
    formula: ClassVar[str] = "sigma(beta c) + 1 - sigma(beta (c - r))"
    takes_offset: ClassVar[bool] = False

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return (self.beta * chosen).sigmoid() + (self.beta * (rejected - chosen)).sigmoid()


@dataclass(frozen=True)
class DiscoPOP(Divergent):
    """Logistic and exponential loss mixed by g = sigma(beta M / tau) (DiscoPOP, Lu et al. 2024, eq. 5). Scope: pair."""

    paper: ClassVar[str] = "Lu et al. 2024, arXiv:2406.08414, eq. 5"
    formula: ClassVar[str] = "-(1 - g) log sigma(beta M) + g exp(-beta M), g = sigma(beta M / tau)"
    tau: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, tau=POSITIVE)

    def link(self, margin: Tensor) -> Tensor:
        gate = margin / self.tau
        return log_loss(margin) * (-gate).sigmoid() + safe_exp(-margin) * gate.sigmoid()


@dataclass(frozen=True)
class ChosenNLL:
    """Negative log-likelihood of the chosen, mean over all chosen tokens of the step; rejected give 0. Scope: token.

    The generation loss of MPO (Wang et al. 2024), and the SFT term of other sums.
    """

    paper: ClassVar[str] = "Wang et al. 2024, arXiv:2411.10442, generation loss"
    formula: ClassVar[str] = "-log pi on the chosen's tokens"
    needs_reference: ClassVar[bool] = False
    scope: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "token_mean"

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        """per_token "chosen_share": trained tokens of the step / chosen ones, on the chosen's tokens; else 0."""
        chosen, _ = pairs(batch.lengths)
        every = everywhere(batch.lengths)
        share = every.sum().double() / everywhere(chosen).sum().clamp(min=1)
        weight = interleaved(torch.ones_like(chosen), torch.zeros_like(chosen)) * share
        return {"per_token": {"chosen_share": batch.spread(weight)}}

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -stats.logprobs * batch.token("chosen_share", "sft").to(stats.logprobs.dtype)

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"nll_loss": self(stats, batch)}


PREFERENCE = {
    "dpo": DPO,
    "dpo_nll": DPONLL,
    "robust": RobustDPO,
    "hinge": Hinge,
    "ipo": IPO,
    "exo_pair": EXOPair,
    "nca_pair": NCAPair,
    "bco_pair": BCOPair,
    "sppo_hard": SPPOHard,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "discopop": DiscoPOP,
    "sft": ChosenNLL,
    "sigmoid_norm": SigmoidNorm,
}
