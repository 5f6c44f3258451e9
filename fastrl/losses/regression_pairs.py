"""Regressions of log-ratios on rewards or labels, and density-ratio estimation, on pairs; DRO on single answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.losses.kl import safe_exp
from fastrl.losses.margin import PairLoss, RatioPairLoss, Referenced, pairs
from fastrl.losses.nash import old_or_own
from fastrl.losses.pairwise import Ranged, one_of
from fastrl.tokens import TokenBatch, TokenStats


def reward_difference(batch: TokenBatch, why: str) -> Tensor:
    """[P] reward of the first answer less that of the second; which is which is of no account to a regression."""
    if batch.rewards is None:
        raise ValueError(f"{why} needs batch.rewards [S]; got None")
    first, second = pairs(batch.rewards)
    return first - second


@dataclass(frozen=True)
class REBEL(PairLoss):
    """REBEL (Gao et al. 2024, eq. 9): relative log-ratios to the sampling policy are regressed on relative rewards.

    beta = 1 / eta of the paper. The policy of the last round is old_logprobs (None: the current policy).
    """

    paper: ClassVar[str] = "Gao et al. 2024, arXiv:2404.16767, Alg. 1"
    formula: ClassVar[str] = "(beta (log pi - log old)(y) - beta (log pi - log old)(y') - (R(y) - R(y')))^2"
    beta: float = 1.0

    def log_ratios(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.summed(stats.logprobs - old_or_own(stats, batch), batch)

    def offset(self, batch: TokenBatch) -> Tensor:
        return reward_difference(batch, type(self).__name__.lower()) + super().offset(batch)

    def link(self, margin: Tensor) -> Tensor:
        return margin.square()


@dataclass(frozen=True)
class REFUEL(REBEL):
    """REFUEL (Gao et al. 2024): REBEL from a turn on. Both answers share the turns before, which the mask leaves out;
    rewards are the returns from that turn to the end."""

    paper: ClassVar[str] = "Gao et al. 2024, arXiv:2410.04612, Alg. 1"
    formula: ClassVar[str] = "(beta (log pi - log old)(y_h) - beta (log pi - log old)(y_h') - (R_h - R_h'))^2"


@dataclass(frozen=True)
class CoPG(RatioPairLoss):
    """Contrastive policy gradient (Flet-Berliac et al. 2024): each answer is the other's baseline, on or off policy."""

    paper: ClassVar[str] = "Flet-Berliac et al. 2024, arXiv:2406.19185, the CoPG gradient"
    formula: ClassVar[str] = "(R(y) - R(y') - beta (r(y) - r(y')))^2 / (2 beta)"

    def offset(self, batch: TokenBatch) -> Tensor:
        return reward_difference(batch, "copg") + super().offset(batch)

    def link(self, margin: Tensor) -> Tensor:
        return margin.square() / (2 * self.beta)


@dataclass(frozen=True)
class BFPO(Ranged, RatioPairLoss):
    """Bi-factorial preference optimisation (Zhang et al. 2024): IPO whose target knows which answers are safe.

    batch.labels [S] bool: True = safe; chosen: the more helpful. The target is 1/2 (both safe), 1 (only the chosen),
    -1 (only the rejected: the order turns round) or -1/2 (neither), over beta, with b1 = 3 and alpha = 1/2.
    """

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2408.15313, the BFPO loss"
    formula: ClassVar[str] = "(h - ((b1 s_w - s_l) / (b1 - 1) - alpha) / beta)^2, s = 1 if safe"
    b1: float = 3.0
    alpha: float = 0.5
    ranges: ClassVar = {"b1": (1.0, float("inf"), "()")}

    def scale(self, batch: TokenBatch) -> float:
        return 1.0

    def offset(self, batch: TokenBatch) -> Tensor:
        if batch.labels is None:
            raise ValueError("bfpo needs batch.labels [S] (True = safe); got None")
        chosen, rejected = pairs(batch.labels.double())
        target = ((self.b1 * chosen - rejected) / (self.b1 - 1) - self.alpha) / self.beta
        return target + super().offset(batch)

    def link(self, margin: Tensor) -> Tensor:
        return margin.square()


DIL_KINDS = ("lsif", "ukl", "bce")


@dataclass(frozen=True)
class DIL(RatioPairLoss):
    """Direct imitation learning (Xiao et al. 2025): preferences as density-ratio estimation, on mean log-ratios.

    kind: lsif (least squares), ukl (unnormalised KL, KLIEP) or bce (a classifier).
    """

    paper: ClassVar[str] = "Xiao et al. 2025, On a connection between imitation learning and RLHF, ICLR, table 1"
    formula: ClassVar[str] = "lsif: -e^r_w + e^(2 r_l) / 2; ukl: -r_w + e^r_l; bce: -log sigma(r_w) - log sigma(-r_l)"
    takes_offset: ClassVar[bool] = False
    length_normalised: bool = True
    kind: str = "lsif"

    def __post_init__(self):
        super().__post_init__()
        one_of("kind", self.kind, DIL_KINDS)

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        if self.kind == "lsif":
            return 0.5 * safe_exp(2 * rejected) - safe_exp(chosen)
        if self.kind == "ukl":
            return safe_exp(rejected) - chosen
        return -logsigmoid(chosen) - logsigmoid(-rejected)


@dataclass(frozen=True)
class DRO(Ranged, Referenced):
    """Direct reward optimisation (Richemond et al. 2024, eq. 5): single answers with scalar rewards. Scope: sequence.

    Reads rewards [S] and per_sequence["values"] [S]: V(x) of each prompt, which is fitted on its own. beta: tau.
    """

    paper: ClassVar[str] = "Richemond et al. 2024, arXiv:2405.19107, the DRO loss"
    formula: ClassVar[str] = "(R - V(x) - beta (log pi - log ref))^2 / 2"
    scope: ClassVar[str] = "sequence"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [S]
        if batch.rewards is None:
            raise ValueError("dro needs batch.rewards [S]; got None")
        gain = (batch.rewards - batch.sequence("values", "dro")).to(stats.logprobs.dtype)
        return 0.5 * (gain - self.rewards(stats, batch)).square()

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"rewards": self.rewards(stats, batch)}


REGRESSION_PAIRS = {
    "rebel": REBEL,
    "refuel": REFUEL,
    "copg": CoPG,
    "bfpo": BFPO,
    "dil": DIL,
    "dro": DRO,
}
