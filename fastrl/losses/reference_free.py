"""Preference losses without a reference: SimPO, CPO, AlphaPO, ORPO on pairs, TPO on triples.

C, R: log pi of chosen and rejected, summed over trained tokens; C / n_c, R / n_r where an answer's length divides them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import relu

from fastrl.losses.margin import (
    NOT_NEGATIVE,
    PairLoss,
    Scored,
    check_numbers,
    log_loss,
    own_length,
    pairs,
    safe_expm1,
)
from fastrl.objective import group_index
from fastrl.tokens import TokenBatch, TokenStats, segment_sum

KINDS = ("sigmoid", "hinge", "ipo")


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")


def link_of(kind: str, gap: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """sigmoid -log sigma(beta gap), labels smoothed; hinge max(0, 1 - beta gap); ipo (gap - 1 / (2 beta))^2."""
    if kind == "hinge":
        return relu(1 - beta * gap)
    if kind == "ipo":
        return (gap - 1 / (2 * beta)).square()
    return log_loss(beta * gap, label_smoothing)


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)), p = exp(mean log-prob), to full precision; p is held below 1 by one unit in the last place."""
    x = mean_logprobs.clamp(max=-torch.finfo(mean_logprobs.dtype).eps)
    small = x > -math.log(2)  # log(1 - e^x): each form on the side where it does not cancel
    near, far = torch.where(small, x, -1.0), torch.where(small, -1.0, x)
    return x - torch.where(small, torch.log(-torch.expm1(near)), torch.log1p(-far.exp()))


@dataclass(frozen=True)
class SimPO(PairLoss):
    """Simple preference optimisation (Meng et al. 2024, eq. 6). gamma: the target margin. Scope: pair."""

    paper: ClassVar[str] = "Meng et al. 2024, arXiv:2405.14734, eq. 6"
    formula: ClassVar[str] = "-log sigma(beta (C / n_c - R / n_r) - gamma)"
    beta: float = 2.0
    length_normalised: bool = True
    gamma: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, label_smoothing=(0.0, 0.5, "[)"))

    def offset(self, batch: TokenBatch) -> Tensor | float:
        return self.gamma + super().offset(batch)

    def link(self, margin: Tensor) -> Tensor:
        return log_loss(margin, self.label_smoothing)

    def rewards(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.beta * self.scores(stats, batch)


@dataclass(frozen=True)
class AlphaPO(SimPO):
    """SimPO on the reward (1 - p^-alpha) / alpha, p the (length-normalised) probability (Gupta et al. 2025).

    alpha = 0 is SimPO. Taken as -expm1(-alpha log p) / alpha: p itself underflows for any longer answer.
    """

    paper: ClassVar[str] = "Gupta et al. 2025, arXiv:2501.03884"
    formula: ClassVar[str] = "-log sigma(beta (R_c - R_r) - gamma), R = (1 - exp(-alpha log p)) / alpha"
    alpha: float = 0.25

    def scores(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        log_p = super().scores(stats, batch)
        return -safe_expm1(-self.alpha * log_p) / self.alpha if self.alpha else log_p


@dataclass(frozen=True)
class WithNLL(PairLoss):
    """... + nll_coef * NLL of the chosen, mean over all chosen tokens of the whole step."""

    nll_coef: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, nll_coef=NOT_NEGATIVE)

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        """per_sequence "nll_share": pairs of the step / chosen tokens of the step."""
        every = everywhere(pairs(batch.lengths)[0])
        share = every.shape[0] / every.sum().clamp(min=1).double()  # int / int would be float32
        return {"per_sequence": {"nll_share": share.expand(batch.num_segments)}}

    def nll(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[P], whose mean over the pairs of the step is the mean over its chosen tokens."""
        share, _ = pairs(batch.sequence("nll_share", type(self).__name__).to(stats.logprobs.dtype))
        return -pairs(segment_sum(stats.logprobs, batch))[0] * share

    def extra(self, stats: TokenStats, batch: TokenBatch) -> Tensor | None:
        return self.nll_coef * self.nll(stats, batch) if self.nll_coef else None

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {**super().metrics(stats, batch), "nll_loss": self.nll(stats, batch)}


@dataclass(frozen=True)
class CPO(WithNLL):
    """Contrastive preference optimisation (Xu et al. 2024, eq. 3 and the NLL of the chosen). Scope: pair.

    kind: sigmoid (the paper), hinge, or ipo; length_normalised as TRL's for ipo is the caller's choice.
    """

    paper: ClassVar[str] = "Xu et al. 2024, arXiv:2401.08417, eq. 3 and its NLL term"
    formula: ClassVar[str] = "-log sigma(beta (C - R)) + nll_coef NLL(chosen)"
    kind: str = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.kind)
        check_numbers(self, label_smoothing=(0.0, 0.5, "[)"))

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        gap = chosen - rejected - self.offset(batch) / self.beta
        return link_of(self.kind, gap, self.beta, self.label_smoothing)

    def rewards(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.beta * self.scores(stats, batch)


@dataclass(frozen=True)
class ORPO(WithNLL):
    """Odds ratio preference optimisation (Hong et al. 2024, eq. 6); odds of the mean log-prob. Scope: pair.

    The NLL is over trained tokens of the chosen; train its prompt too where it should count (TRL's ORPO does).
    """

    paper: ClassVar[str] = "Hong et al. 2024, arXiv:2403.07691, eq. 6"
    formula: ClassVar[str] = "NLL(chosen) - beta log sigma(log odds(chosen) - log odds(rejected))"
    length_normalised: bool = True

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return self.beta * log_loss(log_odds(chosen) - log_odds(rejected) - self.offset(batch))

    def rewards(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.beta * self.scores(stats, batch)

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        chosen, rejected = pairs(self.scores(stats, batch))
        gap = log_odds(chosen) - log_odds(rejected)
        return {**super().metrics(stats, batch), "log_odds_chosen": gap, "log_odds_ratio": -log_loss(gap)}


@dataclass(frozen=True)
class TPO(Scored):
    """Triple preference optimisation (Saeidi et al. 2024): a pair loss and the NLL of a gold answer. Scope: group.

    The sequences of a triple share a group id and come in the order chosen, rejected, gold (others may lie between).
    kind: sigmoid, hinge or ipo; gamma: target margin (TPO-L: length_normalised=True, gamma=0.5). The NLL is the mean
    over all gold tokens of the step; value: one for each triple.
    """

    paper: ClassVar[str] = "Saeidi et al. 2024, arXiv:2405.16681"
    formula: ClassVar[str] = "-log sigma(beta (C - R) - gamma) + nll_coef NLL(gold)"
    beta: float = 0.01
    nll_coef: float = 1.0
    kind: str = "sigmoid"
    gamma: float = 0.0
    label_smoothing: float = 0.0
    length_normalised: bool = False
    scope: ClassVar[str] = "group"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.kind)
        check_numbers(self, nll_coef=NOT_NEGATIVE, label_smoothing=(0.0, 0.5, "[)"))

    @staticmethod
    def triples(batch: TokenBatch) -> Tensor:
        """[G, 3] sequences: chosen, rejected, gold of each triple, in order of first appearance."""
        index = group_index(batch)
        counts = torch.bincount(index)
        if bool((counts != 3).any()):
            raise ValueError(f"tpo needs three sequences to a group (chosen, rejected, gold), got {counts.tolist()}")
        return torch.argsort(index, stable=True).view(-1, 3)

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        """per_sequence "gold_share": triples of the step / gold tokens of the step."""
        every = everywhere(batch.lengths[self.triples(batch)[:, 2]])
        share = every.shape[0] / every.sum().clamp(min=1).double()  # int / int would be float32
        return {"per_sequence": {"gold_share": share.expand(batch.num_segments)}}

    def scores(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        made = super().scores(stats, batch)
        return made / own_length(batch, made) if self.length_normalised else made

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [G]
        chosen, rejected, gold = self.triples(batch).unbind(1)
        scores = self.scores(stats, batch)
        gap = scores[chosen] - scores[rejected] - self.gamma / self.beta
        share = batch.sequence("gold_share", "tpo").to(scores.dtype)
        nll = -(segment_sum(stats.logprobs, batch) * share)[gold]
        return link_of(self.kind, gap, self.beta, self.label_smoothing) + self.nll_coef * nll

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """[G] values of each metric; TRL's names."""
        scores, (chosen, rejected, _) = self.scores(stats, batch), self.triples(batch).unbind(1)
        c, r = scores[chosen], scores[rejected]
        return {
            "rewards/chosen": self.beta * c,
            "rewards/rejected": self.beta * r,
            "rewards/margins": self.beta * (c - r),
            "rewards/accuracies": (c > r).float(),
            "logps/chosen": c,
            "logps/rejected": r,
        }


REFERENCE_FREE = {"simpo": SimPO, "alphapo": AlphaPO, "cpo": CPO, "orpo": ORPO, "tpo": TPO}
