"""The margin of a preference pair, and the two bases that most preference losses are a few lines on.

    m_i = phi(sum_t a_t (log pi_t - sum_k b_k log pi_k,t)) / n_i     score of a sequence, [S]
    M   = scale (m_w - m_l) - offset                                 margin of a pair, [P]; w chosen, l rejected
    L   = weight link(M) + extra                                     loss of a pair, [P]

Pairs are interleaved: sequences 2p and 2p+1 are chosen and rejected of pair p. A loss derives from PairLoss (no
reference: k is empty) or RatioPairLoss (against one or several references) and overrides what is its own:

    hook                             shape      default
    token_weights(batch)             [T], None  a_t: batch.per_token["token_weights"] where it is there, times ld_alpha
    reference(batch)                 [T], None  sum_k b_k log pi_k: None, or batch.ref_logprobs / `references`
    transform(scores)                [S]        phi: the identity
    scale(batch)                     [P], float beta
    offset(batch)                    [P], float margin_coef * batch.margins, 0 where margin_coef is 0
    link(margin)                     [P]        -log sigma(M)
    law(chosen, rejected, batch)     [P]        link(scale (chosen - rejected) - offset); for laws of both scores
    pair_weight(stats, batch)        [P], None  WPO's where use_weighting, else None; must carry no gradient
    extra(stats, batch)              [P], None  None; an additive term such as an NLL of the chosen
    rewards(stats, batch)            [S]        beta * score before phi and length: metrics "rewards/..."

`length_normalised` divides every score by its number of trained tokens. Helpers: pairs, own_length, mean_logprobs,
log_loss (label smoothing), chosen_nll, safe_expm1, check_numbers. Laws see whole pairs and no untrained row.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.losses.kl import LINEAR_FROM
from fastrl.tokens import TokenBatch, TokenStats, segment_sum


def pairs(per_sequence: Tensor) -> tuple[Tensor, Tensor]:
    """[S] -> chosen [P], rejected [P]."""
    if per_sequence.shape[0] % 2:
        raise ValueError(
            f"pairs are interleaved chosen, rejected: the batch has an odd {per_sequence.shape[0]} sequences"
        )
    return per_sequence[0::2], per_sequence[1::2]


def interleaved(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[P], [P] -> [S], the inverse of `pairs`."""
    return torch.stack((chosen, rejected), 1).flatten()


def own_length(batch: TokenBatch, like: Tensor) -> Tensor:
    """[S] trained tokens of each sequence, at least 1, in the dtype of `like`."""
    return batch.lengths.clamp(min=1).to(like.dtype)


def mean_logprobs(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """[S] log pi(y) / n."""
    return segment_sum(stats.logprobs, batch) / own_length(batch, stats.logprobs)


def log_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigma(M) - e log sigma(-M), e = label_smoothing in [0, 1]."""
    if not label_smoothing:
        return -logsigmoid(margin)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def chosen_nll(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """[P] mean negative log-likelihood of the chosen's trained tokens."""
    return -pairs(mean_logprobs(stats, batch))[0]


def safe_expm1(x: Tensor) -> Tensor:
    """e^x - 1 to full relative precision, and past 40 its tangent, as losses.kl.safe_exp."""
    over = (x - LINEAR_FROM).clamp(min=0.0)
    return torch.expm1(x.clamp(max=LINEAR_FROM)) + over * math.exp(LINEAR_FROM)


def check_numbers(objective, **bounds: tuple[float, float]) -> None:
    """Every float option is finite, and each named one lies in its interval.

    bounds: option=(low, high, which ends belong: "[]", "[)", "(]" or "()"). Options that are None pass.
    Raises: ValueError naming the option, what was expected and what came.
    """
    for f in dataclasses.fields(objective):
        value = getattr(objective, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{f.name} must be finite, got {value}")
    for name, (low, high, ends) in bounds.items():
        value = getattr(objective, name)
        if value is None:
            continue
        above = value >= low if ends[0] == "[" else value > low
        below = value <= high if ends[1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name} must be in {ends[0]}{low}, {high}{ends[1]}, got {value}")


POSITIVE = (0.0, math.inf, "()")
NOT_NEGATIVE = (0.0, math.inf, "[)")


@dataclass(frozen=True)
class Scored:
    """beta and the score of a sequence; what paired and unpaired losses share."""

    beta: float = 0.1

    def __post_init__(self):
        check_numbers(self, beta=POSITIVE)

    @property
    def needs_reference(self) -> bool:
        """Whether batch.ref_logprobs is read: a trainer that sees False loads no reference model."""
        return False

    def reference(self, batch: TokenBatch) -> Tensor | None:
        return None

    def token_weights(self, batch: TokenBatch) -> Tensor | None:
        return batch.per_token.get("token_weights")

    def transform(self, scores: Tensor) -> Tensor:
        return scores

    def summed(self, per_token: Tensor, batch: TokenBatch) -> Tensor:
        """[T] -> [S]: sum_t a_t x_t."""
        weights = self.token_weights(batch)
        return segment_sum(per_token if weights is None else per_token * weights.to(per_token.dtype), batch)

    def log_ratios(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[S] sum_t a_t (log pi_t - sum_k b_k log pi_k,t); plain log-probs without a reference."""
        reference = self.reference(batch)
        # The difference first: sums over a long answer are large, and what is left of them is small.
        return self.summed(stats.logprobs if reference is None else stats.logprobs - reference, batch)

    def scores(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[S] m."""
        return self.transform(self.log_ratios(stats, batch))

    def rewards(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[S] implicit rewards, for metrics."""
        return self.beta * self.log_ratios(stats, batch)


@dataclass(frozen=True)
class Referenced(Scored):
    """reference_free=True takes log ref = 0. references: ((per_token column, b_k), ...) in place of ref_logprobs."""

    reference_free: bool = False
    references: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for entry in self.references:
            if len(entry) != 2 or not isinstance(entry[0], str) or not math.isfinite(entry[1]):
                raise ValueError(f"references must be (column, finite weight) pairs, got {entry!r}")
        if self.references and self.reference_free:
            raise ValueError("references and reference_free=True exclude each other; drop one")

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    def reference(self, batch: TokenBatch) -> Tensor | None:
        if self.reference_free:
            return None
        if self.references:
            return sum(weight * self._column(name, batch) for name, weight in self.references)
        return self._column("ref_logprobs", batch)

    def _column(self, name: str, batch: TokenBatch) -> Tensor:
        if name != "ref_logprobs":
            return batch.token(name, type(self).__name__)
        if batch.ref_logprobs is None:
            raise ValueError(
                f"{type(self).__name__} needs batch.ref_logprobs [T]; got None (score with the reference, or give the "
                "loss reference_free=True)"
            )
        return batch.ref_logprobs


@dataclass(frozen=True)
class PairLoss(Scored):
    """A loss of chosen and rejected without a reference; see the head of this file for its hooks.

    length_normalised: scores are means over trained tokens. ld_alpha: weight of the tokens past the shorter answer's
    length (LD-DPO, Liu et al. 2024, arXiv:2409.06411). use_weighting: each pair weighs
    w(chosen) w(rejected), w = exp mean_t (log pi_t - log sum_v p_v^2), no gradient (WPO, Zhou et al. 2024,
    arXiv:2406.11827, eq. 2). margin_coef: offset margin_coef * batch.margins (ODPO, Amini et al. 2024); ValueError in
    a class with takes_offset False, whose law has no margin to shift.
    """

    length_normalised: bool = False
    ld_alpha: float | None = None
    use_weighting: bool = False
    margin_coef: float = 0.0
    takes_offset: ClassVar[bool] = True
    scope: ClassVar[str] = "pair"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, ld_alpha=(0.0, 1.0, "[]"))
        if self.margin_coef and not self.takes_offset:
            raise ValueError(
                f"margin_coef must be 0 in {type(self).__name__}, whose law has no margin to shift, "
                f"got {self.margin_coef}"
            )

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("log_sum_sq_probs",) if self.use_weighting else ()

    # -- the hooks -----------------------------------------------------------------------------------------------------
    def token_weights(self, batch: TokenBatch) -> Tensor | None:
        given = super().token_weights(batch)
        if self.ld_alpha is None:
            return given
        kept = beyond_shared_length(batch, self.ld_alpha)
        return kept if given is None else given * kept

    def scores(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        made = super().scores(stats, batch)
        return made / own_length(batch, made) if self.length_normalised else made

    def scale(self, batch: TokenBatch) -> Tensor | float:
        return self.beta

    def offset(self, batch: TokenBatch) -> Tensor | float:
        if not self.margin_coef:
            return 0.0
        if batch.margins is None:
            raise ValueError(f"{type(self).__name__} with margin_coef needs batch.margins [P]; got None")
        return self.margin_coef * batch.margins

    def link(self, margin: Tensor) -> Tensor:
        return log_loss(margin)

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return self.link(self.margin(chosen, rejected, batch))

    def margin(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        """[P] scale (chosen - rejected) - offset, in the dtype of the scores whatever those two have."""
        made = self.scale(batch), self.offset(batch)
        scale, offset = (x.to(chosen.dtype) if isinstance(x, Tensor) else x for x in made)
        return scale * (chosen - rejected) - offset

    def pair_weight(self, stats: TokenStats, batch: TokenBatch) -> Tensor | None:
        return on_policy_weight(stats, batch) if self.use_weighting else None

    def extra(self, stats: TokenStats, batch: TokenBatch) -> Tensor | None:
        return None

    # -- what is made of them ------------------------------------------------------------------------------------------
    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [P]
        loss = self.law(*pairs(self.scores(stats, batch)), batch)
        weight, extra = self.pair_weight(stats, batch), self.extra(stats, batch)
        loss = loss if weight is None else loss * weight
        return loss if extra is None else loss + extra

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """[P] values of each metric; TRL's names."""
        chosen, rejected = pairs(self.rewards(stats, batch))
        logps_chosen, logps_rejected = pairs(self.summed(stats.logprobs, batch))
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": logps_chosen,
            "logps/rejected": logps_rejected,
        }


@dataclass(frozen=True)
class RatioPairLoss(Referenced, PairLoss):
    """A loss of both log-ratios to a reference."""


def beyond_shared_length(batch: TokenBatch, alpha: float) -> Tensor:
    """[T] float64: 1 on the first min(n_w, n_l) trained tokens of both answers, alpha on the rest of the longer."""
    shared = torch.minimum(*pairs(batch.lengths))
    position = torch.arange(batch.targets.shape[0], device=batch.targets.device)
    position = position - batch.spread(batch.cu_seqlens[:-1].long())
    inside = position < batch.spread(interleaved(shared, shared))
    return torch.where(inside, 1.0, torch.full_like(inside, alpha, dtype=torch.float64))


def on_policy_weight(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """[P] w(chosen) w(rejected) of WPO; at most V^2, as log pi <= 0 and log sum_v p_v^2 >= -log V."""
    aligned = segment_sum((stats.logprobs - stats.log_sum_sq_probs).detach(), batch)
    chosen, rejected = pairs(aligned / own_length(batch, aligned))
    return (chosen + rejected).exp()
