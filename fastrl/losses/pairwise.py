"""Preference losses that change one part of DPO's: its offset, scale, link, token weights or pair weights.

h = m_w - m_l, m the score of a sequence (losses/margin.py), w the chosen and l the rejected; r = log pi - log ref.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.losses.margin import (
    NOT_NEGATIVE,
    POSITIVE,
    RatioPairLoss,
    check_numbers,
    interleaved,
    pairs,
)
from fastrl.tokens import TokenBatch, TokenStats, segment_sum


class Ranged:
    """Mixin: `ranges` names the interval that each number must lie in, as check_numbers reads it."""

    ranges: ClassVar[dict[str, tuple[float, float, str]]] = {}

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, **self.ranges)


def one_of(name: str, value: str, known) -> None:
    """Raises ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")


def score_gap(batch: TokenBatch, why: str) -> Tensor:
    """[P] how much better the chosen is than the rejected: batch.margins, else the difference of batch.rewards."""
    if batch.margins is not None:
        return batch.margins
    if batch.rewards is None:
        raise ValueError(f"{why} needs batch.margins [P] or batch.rewards [S]; got neither")
    chosen, rejected = pairs(batch.rewards)
    return chosen - rejected


def positions(batch: TokenBatch) -> Tensor:
    """[T] int64: number of each row within its sequence, from 0."""
    rows = torch.arange(batch.targets.shape[0], device=batch.targets.device)
    return rows - batch.spread(batch.cu_seqlens[:-1].long())


# -- offsets and scales ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ODPO(Ranged, RatioPairLoss):
    """DPO with an offset (Amini et al. 2024, eq. 8): the better the chosen's score, the wider the margin asked for.

    Reads the score gap s_w - s_l (score_gap). f="log" (the paper's) or "linear". A gap <= 0 counts as 1e-6 under log.
    """

    paper: ClassVar[str] = "Amini et al. 2024, arXiv:2402.10571, the ODPO loss"
    formula: ClassVar[str] = "-log sigma(beta h - alpha f(s_w - s_l)), f = log or identity"
    alpha: float = 1.0
    f: str = "log"
    ranges: ClassVar = {"alpha": NOT_NEGATIVE}

    def __post_init__(self):
        super().__post_init__()
        one_of("f", self.f, ("log", "linear"))

    def offset(self, batch: TokenBatch) -> Tensor:
        gap = score_gap(batch, "odpo")
        return self.alpha * (gap.clamp(min=1e-6).log() if self.f == "log" else gap) + super().offset(batch)


@dataclass(frozen=True)
class MODPO(Ranged, RatioPairLoss):
    """Multi-objective DPO (Zhou et al. 2023): one objective's preferences, the others' rewards as a margin.

    weight = w_k of the objective that labelled the pairs; the score gap is the other objectives', weighted:
    w_-k^T (r_-k(y_w) - r_-k(y_l)).
    """

    paper: ClassVar[str] = "Zhou et al. 2023, arXiv:2310.03708, the MODPO loss"
    formula: ClassVar[str] = "-log sigma((beta h - w_-k^T (r_w - r_l)) / w_k)"
    weight: float = 0.5
    ranges: ClassVar = {"weight": (0.0, 1.0, "(]")}

    def scale(self, batch: TokenBatch) -> float:
        return self.beta / self.weight

    def offset(self, batch: TokenBatch) -> Tensor:
        return score_gap(batch, "modpo") / self.weight + super().offset(batch)


@dataclass(frozen=True)
class LengthDPO(Ranged, RatioPairLoss):
    """R-DPO, DPO regularised for length (Park et al. 2024, eq. 9): the reward is read as r - alpha |y|.

    The optimal policy's beta log ratio is then r - alpha |y| + const, so a longer chosen needs less of it.
    """

    paper: ClassVar[str] = "Park et al. 2024, arXiv:2403.19159, eq. 9"
    formula: ClassVar[str] = "-log sigma(beta h + alpha (n_w - n_l))"
    alpha: float = 0.01

    def offset(self, batch: TokenBatch) -> Tensor:
        chosen, rejected = pairs(batch.lengths)
        return self.alpha * (rejected - chosen).double() + super().offset(batch)


@dataclass(frozen=True)
class MallowsDPO(Ranged, RatioPairLoss):
    """Mallows-theta-DPO (Chen et al. 2024): margins scaled by how settled the reference is on this prompt.

    Reads per_token["ref_entropy"]: entropy of the reference at each row over log V, in (0, 1).
    H(x) is the mean of both answers' means; dispersion: the paper's phi*.
    """

    paper: ClassVar[str] = "Chen et al. 2024, arXiv:2405.14953, eq. 12"
    formula: ClassVar[str] = "-log sigma(-2 dispersion log(H) beta h), H = (mean_t H_w,t + mean_t H_l,t) / 2"
    dispersion: float = 0.5
    ranges: ClassVar = {"dispersion": POSITIVE}

    def scale(self, batch: TokenBatch) -> Tensor:
        mean = segment_sum(batch.token("ref_entropy", "mallows_dpo"), batch) / batch.lengths.clamp(min=1)
        chosen, rejected = pairs(mean)
        return -2 * self.dispersion * self.beta * (0.5 * (chosen + rejected)).clamp(min=1e-6).log()


# -- token weights -----------------------------------------------------------------------------------------------------
class TokenWeighted:
    """Mixin: own_weights [T] times the weights that the batch gives."""

    def token_weights(self, batch: TokenBatch) -> Tensor:
        given, own = super().token_weights(batch), self.own_weights(batch)
        return own if given is None else own * given


@dataclass(frozen=True)
class SamPO(TokenWeighted, RatioPairLoss):
    """SamPO (Lu et al. 2024): both answers count the same number of tokens, drawn at random from the longer.

    min(n_w, n_l) tokens of each answer are kept: those of the smallest per_token["draws"] (uniform numbers of the
    caller) where that column is given, else those whose hash of (position, target, seed) is smallest, which needs no
    column and is the same however the step is cut.
    """

    paper: ClassVar[str] = "Lu et al. 2024, arXiv:2406.10957, the SamPO loss"
    formula: ClassVar[str] = "-log sigma(beta (sum_kept r_w,t - sum_kept r_l,t)), min(n_w, n_l) tokens kept of each"
    seed: int = 0

    def own_weights(self, batch: TokenBatch) -> Tensor:
        draws = batch.per_token.get("draws")
        draws = scattered(positions(batch), batch.targets, self.seed) if draws is None else draws
        shared = torch.minimum(*pairs(batch.lengths))
        return (rank_within(draws, batch) < batch.spread(interleaved(shared, shared))).to(torch.float32)


def scattered(position: Tensor, target: Tensor, seed: int) -> Tensor:
    """[T] int64 in [0, 2^31): a hash of the three, multiplicative twice (Knuth's and MurmurHash's constants)."""
    x = (position.long() * 2654435761 + target.long() * 40503 + seed * 97 + 12345) & 0x7FFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    return x ^ (x >> 15)


def rank_within(values: Tensor, batch: TokenBatch) -> Tensor:
    """[T] int64: rank of each row's value among its own sequence's, from 0; ties by position."""
    by_value = torch.argsort(values, stable=True)
    order = by_value[torch.argsort(batch.segment_ids[by_value], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = positions(batch)
    return rank


@dataclass(frozen=True)
class D2PO(Ranged, TokenWeighted, RatioPairLoss):
    """D2PO, temporal decay (Shao et al. 2025): token t of an answer, from 0, counts gamma^t."""

    paper: ClassVar[str] = "Shao et al. 2025, arXiv:2502.14340, the D2PO loss"
    formula: ClassVar[str] = "-log sigma(beta (sum_t gamma^t r_w,t - sum_t gamma^t r_l,t))"
    gamma: float = 0.98
    ranges: ClassVar = {"gamma": (0.0, 1.0, "(]")}

    def own_weights(self, batch: TokenBatch) -> Tensor:
        return (positions(batch).double() * math.log(self.gamma)).exp()


@dataclass(frozen=True)
class DMPO(Ranged, TokenWeighted, RatioPairLoss):
    """DMPO, multi-turn preferences (Shi et al. 2024): turn t of T counts gamma^t (1 - gamma^(T-t)) / (1 - gamma^T).

    Reads per_token["turns"]: number of each row's turn, from 0 (only the agent's own tokens are trained), and
    per_sequence["num_turns"]: T; without it, one more than the last turn that has a trained row.
    """

    paper: ClassVar[str] = "Shi et al. 2024, arXiv:2406.14868, the DMPO loss"
    formula: ClassVar[str] = (
        "-log sigma(beta (sum_t phi_t r_w,t - sum_t phi_t r_l,t)), phi_t = gamma^t (1 - gamma^(T-t)) / (1 - gamma^T)"
    )
    gamma: float = 0.9
    ranges: ClassVar = {"gamma": (0.0, 1.0, "(]")}

    def own_weights(self, batch: TokenBatch) -> Tensor:
        turns = batch.token("turns", "dmpo").double()
        count = batch.per_sequence.get("num_turns")
        if count is None:
            count = turns.new_zeros(batch.num_segments).scatter_reduce(0, batch.segment_ids, turns + 1, "amax")
        count = batch.spread(count.double())
        if self.gamma == 1.0:  # the limit
            return 1 - turns / count
        log = math.log(self.gamma)
        share = torch.expm1((count - turns) * log) / torch.expm1(count * log)
        return (turns * log).exp() * share


# -- pair weights and labels -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WeightedDPO(RatioPairLoss):
    """IW-DPO (Lodkaew et al. 2025): each pair counts its importance under the distribution of deployment.

    Reads per_sequence["pair_weights"], the chosen's entry: p_test / p_train of the whole pair, made by the caller.
    """

    paper: ClassVar[str] = "Lodkaew et al. 2025, Importance weighting for aligning language models, TMLR"
    formula: ClassVar[str] = "-w log sigma(beta h)"

    def own_pair_weight(self, batch: TokenBatch) -> Tensor:
        return pairs(batch.sequence("pair_weights", "iw_dpo"))[0]

    def pair_weight(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        own, other = self.own_pair_weight(batch).detach(), super().pair_weight(stats, batch)
        return own if other is None else own * other


@dataclass(frozen=True)
class RewardDifferenceDPO(WeightedDPO):
    """RDO (Wang et al. 2024): each pair counts its reward difference, as given (the caller normalises)."""

    paper: ClassVar[str] = "Wang et al. 2024, arXiv:2408.09385, the reweighted DPO loss"
    formula: ClassVar[str] = "-(s_w - s_l) log sigma(beta h)"

    def own_pair_weight(self, batch: TokenBatch) -> Tensor:
        return score_gap(batch, "rdo")


@dataclass(frozen=True)
class MMPO(Ranged, RatioPairLoss):
    """Margin matching (Kim et al. 2024): the label is soft, p = sigma(gamma (s_w - s_l))."""

    paper: ClassVar[str] = "Kim et al. 2024, arXiv:2410.03145, the MMPO loss"
    formula: ClassVar[str] = "-p log sigma(beta h) - (1-p) log sigma(-beta h), p = sigma(gamma (s_w - s_l))"
    gamma: float = 1.0
    ranges: ClassVar = {"gamma": NOT_NEGATIVE}

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        margin = self.margin(chosen, rejected, batch)
        p = torch.sigmoid(self.gamma * score_gap(batch, "mmpo").to(margin.dtype))
        return -p * logsigmoid(margin) - (1 - p) * logsigmoid(-margin)


@dataclass(frozen=True)
class ActiveDPO(Ranged, RatioPairLoss):
    """ADPO (Ji et al. 2024, Alg. 2): a pair whose |beta h| exceeds `confidence` takes the model's own label, sign h.

    The other pairs are those whose labels are asked for: there the chosen is the chosen.
    """

    paper: ClassVar[str] = "Ji et al. 2024, arXiv:2402.09401, Alg. 2"
    formula: ClassVar[str] = "-log sigma(c beta h), c = sign h where |beta h| > confidence, else 1"
    confidence: float = 1.0
    ranges: ClassVar = {"confidence": NOT_NEGATIVE}

    def link(self, margin: Tensor) -> Tensor:
        own = (margin.detach().abs() > self.confidence) & (margin.detach() < 0)
        return -logsigmoid(torch.where(own, -margin, margin))


PAIRWISE = {
    "odpo": ODPO,
    "modpo": MODPO,
    "r_dpo": LengthDPO,
    "mallows_dpo": MallowsDPO,
    "sampo": SamPO,
    "d2po": D2PO,
    "dmpo": DMPO,
    "iw_dpo": WeightedDPO,
    "rdo": RewardDifferenceDPO,
    "mmpo": MMPO,
    "adpo": ActiveDPO,
}
