"""Losses of iterative and online preference training: self-play, mirror descent, optimism.

Their pairs are sampled by a recent policy and labelled by a preference model; r = log pi - log ref, h = r_w - r_l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.losses.margin import NOT_NEGATIVE, PairLoss, RatioPairLoss, Referenced, check_numbers, pairs
from fastrl.losses.pairwise import Ranged
from fastrl.tokens import TokenBatch, TokenStats, segment_sum


def old_or_own(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """[T] log-probs of the policy that sampled; without old_logprobs it is the current one, held constant."""
    return stats.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs


# -- DPO with a term for exploration -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Optimistic(Ranged, RatioPairLoss):
    """DPO + alpha sum over the pair's answers that the reference sampled of `optimism`; the base of XPO and SELM.

    Reads per_sequence["from_reference"]: 1 (or True) on sequences sampled from the reference, else 0.
    """

    alpha: float = 1e-5
    ranges: ClassVar = {"alpha": NOT_NEGATIVE}

    def optimism(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[S]"""
        return segment_sum(stats.logprobs, batch)

    def extra(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        value = self.optimism(stats, batch)
        explored = batch.sequence("from_reference", type(self).__name__).to(value.dtype)
        return self.alpha * torch.add(*pairs(explored * value))


@dataclass(frozen=True)
class XPO(Optimistic):
    """Exploratory preference optimisation (Xie et al. 2024, Alg. 1): the reference's own samples grow less likely."""

    paper: ClassVar[str] = "Xie et al. 2024, arXiv:2405.21046, Alg. 1"
    formula: ClassVar[str] = "-log sigma(beta h) + alpha log pi(y~), y~ the answer sampled from the reference"


@dataclass(frozen=True)
class SELM(Optimistic):
    """Self-exploring language models (Zhang et al. 2024): XPO's term on beta times the log-ratio."""

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2405.19332, the SELM objective"
    formula: ClassVar[str] = "-log sigma(beta h) + alpha beta (log pi - log ref)(y~), y~ sampled from the reference"
    alpha: float = 1e-3

    def optimism(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.beta * self.log_ratios(stats, batch)


@dataclass(frozen=True)
class VPO(Ranged, RatioPairLoss):
    """Value-incentivised preference optimisation (Cen et al. 2024): the value function as a regulariser, either way.

    With rewards calibrated to mean 0 on y ~ pi_cal, the optimal value is -beta E_cal[log pi - log ref]: offline it is
    made small (pessimism), online=True makes it large. y ~ pi_cal are the chosen, or the sequences marked 1 in
    per_sequence["calibration"].
    """

    paper: ClassVar[str] = "Cen et al. 2024, arXiv:2405.19320, the VPO objective"
    formula: ClassVar[str] = "-log sigma(beta h) -+ alpha beta (log pi - log ref)(y_cal), - offline, + online"
    alpha: float = 1e-2
    online: bool = False
    ranges: ClassVar = {"alpha": NOT_NEGATIVE}

    def extra(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        ratios = self.beta * self.log_ratios(stats, batch)
        marked = batch.per_sequence.get("calibration")
        value = pairs(ratios)[0] if marked is None else torch.add(*pairs(ratios * marked.to(ratios.dtype)))
        return (self.alpha if self.online else -self.alpha) * value


@dataclass(frozen=True)
class SPIN(RatioPairLoss):
    """Self-play fine-tuning (Chen et al. 2024, eq. 4.7), logistic: chosen = data, rejected = the last iterate's sample.

    The reference is the last iterate; beta is the paper's lambda.
    """

    paper: ClassVar[str] = "Chen et al. 2024, arXiv:2401.01335, eq. 4.7"
    formula: ClassVar[str] = "log(1 + exp(-lambda h)), the reference being the last iterate"


# -- Nash equilibria ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class INPO(Ranged, PairLoss):
    """Iterative Nash policy optimisation (Zhang et al. 2024): IPO against the reference and the last iterate at once.

    beta is the paper's eta; tau_over_eta: the reference's share, tau / eta. ref_logprobs: the frozen reference,
    old_logprobs: the last iterate, which sampled the pairs (None: the current policy).
    """

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2407.00617, eq. 8"
    formula: ClassVar[str] = "(h(log pi - (tau/eta) log ref - (1 - tau/eta) log old) - 1/(2 eta))^2"
    beta: float = 0.005
    tau_over_eta: float = 1 / 3
    needs_reference: ClassVar[bool] = True
    ranges: ClassVar = {"tau_over_eta": (0.0, 1.0, "[]")}

    def log_ratios(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        if batch.ref_logprobs is None:
            raise ValueError("inpo needs batch.ref_logprobs [T] (the frozen reference); got None")
        a, old = self.tau_over_eta, old_or_own(stats, batch)
        return self.summed(stats.logprobs - old - a * (batch.ref_logprobs - old), batch)

    def scale(self, batch: TokenBatch) -> float:
        return 1.0

    def link(self, margin: Tensor) -> Tensor:
        return (margin - 0.5 / self.beta).square()


@dataclass(frozen=True)
class IPOMD(RatioPairLoss):
    """IPO-MD and online IPO (Calandriello et al. 2024): IPO's square on sums, with a win probability for a label.

    The pairs come from the mixture pi^(1-b) ref^b (IPO-MD) or from the policy (online IPO); the loss is the same.
    Reads per_sequence["win_rate"], the chosen's entry: P(chosen beats rejected); without it 1.
    """

    paper: ClassVar[str] = "Calandriello et al. 2024, arXiv:2403.08635, the online IPO loss"
    formula: ClassVar[str] = "p (h - 1/(2 beta))^2 + (1 - p) (h + 1/(2 beta))^2, p = P(y_w beats y_l)"

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        h, target = chosen - rejected - self.offset(batch), 0.5 / self.beta
        given = batch.per_sequence.get("win_rate")
        if given is None:
            return (h - target).square()
        p = pairs(given)[0].to(h.dtype)
        return p * (h - target).square() + (1 - p) * (h + target).square()


@dataclass(frozen=True)
class SPPO(Referenced):
    """Self-play preference optimisation (Wu et al. 2024, Alg. 1): each answer's log-ratio is regressed on its win rate.

    Reads per_sequence["win_rate"]: P(y beats the last iterate), the mean over its rivals. The reference is the last
    iterate; beta = 1 / eta of the paper. Scope: sequence.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2405.00675, Alg. 1"
    formula: ClassVar[str] = "(log pi(y) - log ref(y) - (P(y) - 1/2) / beta)^2"
    beta: float = 1e-3
    scope: ClassVar[str] = "sequence"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [S]
        ratios = self.log_ratios(stats, batch)
        return (ratios - (batch.sequence("win_rate", "sppo").to(ratios.dtype) - 0.5) / self.beta).square()

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"rewards": self.rewards(stats, batch)}


@dataclass(frozen=True)
class NashMD:
    """Nash-MD policy gradient (Munos et al. 2023, section 7): REINFORCE on the win rate, regularised by KL.

    Reads per_sequence["win_rate"]: P(y beats the mixture's sample). The KL to the reference has the score-function
    gradient of its sampled value: D_t = log pi - log ref, held constant, times that of log pi(y_t). Scope: token.
    """

    paper: ClassVar[str] = "Munos et al. 2023, arXiv:2312.00886, section 7"
    formula: ClassVar[str] = "(beta stop(log pi - log ref) - (P - 1/2)) log pi, summed over an answer"
    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    scope: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "sequence_mean_token_sum"

    def __post_init__(self):
        check_numbers(self, beta=NOT_NEGATIVE)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        if batch.ref_logprobs is None:
            raise ValueError("nash_md needs batch.ref_logprobs [T]; got None")
        gain = batch.spread(batch.sequence("win_rate", "nash_md").to(stats.logprobs.dtype) - 0.5)
        drift = stats.logprobs.detach() - batch.ref_logprobs
        return (self.beta * drift - gain) * stats.logprobs


# -- negative answers alone --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class NPO(Ranged, Referenced):
    """Negative preference optimisation (Zhang et al. 2024, eq. 3): unlearning, DPO's rejected half. Scope: sequence."""

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2404.05868, eq. 3"
    formula: ClassVar[str] = "-(2/beta) log sigma(-beta (log pi - log ref))"
    scope: ClassVar[str] = "sequence"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def shifted(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[S] what is pushed down."""
        return self.beta * self.log_ratios(stats, batch)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [S]
        return -2 / self.beta * logsigmoid(-self.shifted(stats, batch))

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"rewards": self.rewards(stats, batch)}


@dataclass(frozen=True)
class SimNPO(NPO):
    """SimNPO (Fan et al. 2024): NPO without a reference, on mean log-probs and a margin gamma."""

    paper: ClassVar[str] = "Fan et al. 2024, arXiv:2410.07163, the SimNPO loss"
    formula: ClassVar[str] = "-(2/beta) log sigma(-(beta/n) log pi - gamma)"
    beta: float = 2.5
    reference_free: bool = True
    gamma: float = 0.0

    def shifted(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return super().shifted(stats, batch) / batch.lengths.clamp(min=1) + self.gamma


NASH = {
    "xpo": XPO,
    "selm": SELM,
    "vpo": VPO,
    "spin": SPIN,
    "inpo": INPO,
    "ipo_md": IPOMD,
    "sppo": SPPO,
    "nash_md": NashMD,
    "npo": NPO,
    "simnpo": SimNPO,
}
